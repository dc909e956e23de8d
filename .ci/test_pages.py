"""Reports that run scripts, in a real browser, without an origin and under a second host name.

A report's script tries to read other artefacts and to push with the visitor's rights. Needs what
test_browser.py needs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import pytest
from test_browser import Browser, Program, chromium, running

# Chromium sends no credentials with the parts of a page without an origin: they have to be readable without.
ANONYMOUS = '[anonymous]\nread = ["site"]\n'
CONFIG = '[[directory]]\nname = "site"\npages = true\n'
DIGEST = hashlib.sha256(b"all").hexdigest()
TOKENS = f'[[token]]\nname = "all"\nsha256 = "{DIGEST}"\nread = ["*"]\nwrite = ["*"]\n'
REPORT = """<!doctype html><meta charset="utf-8"><title>report</title><link rel="stylesheet" href="style.css">
<img id="image" src="image.svg"><form method="post" enctype="multipart/form-data" target="frame">
<input type="hidden" name="field"></form><iframe name="frame"></iframe>
<script src="part.js"></script>
<script>
const first = FIRST, results = {part: window.part};
const read = async (url, options) => (await fetch(url, options)).text();
const attempt = (name, promise) => promise.then(
  (value) => { results[name] = value; }, (error) => { results[name] = `failed: ${error.name}`; });
const stored = async () => { localStorage.setItem("x", "kept"); return localStorage.getItem("x"); };
const opened = async (url) => {
  document.querySelector("form").action = url;
  document.querySelector("form").submit();
  return "sent";
};
addEventListener("load", async () => {
  for (const base of [location.origin === "null" ? first : location.origin, first]) {
    const name = base === first ? "first" : "second", secret = `${base}/artefacts/secret/x`;
    await attempt(`${name}: own`, read(`${base}/artefacts/site/report/data.json`));
    await attempt(`${name}: secret`, read(secret, {credentials: "include"}));
    await attempt(`${name}: opaque secret`, read(secret, {mode: "no-cors", credentials: "include"}));
    for (const method of ["PUT", "DELETE", "POST"])
      await attempt(`${name}: ${method}`, read(`${base}/artefacts/secret/${method === "POST" ? "new" : "x"}`,
        {method, body: method === "DELETE" ? undefined : "evil", credentials: "include"}));
    await attempt(`${name}: simple`, read(`${base}/artefacts/site/simple`,
      {method: "POST", mode: "no-cors", body: "evil", credentials: "include"}));
    await attempt(`${name}: form`, opened(`${base}/artefacts/site`));
  }
  await attempt("storage", stored());
  results.color = getComputedStyle(document.body).color;
  results.image = document.querySelector("#image").naturalWidth;
  window.results = results;
  setTimeout(() => { document.title = "done"; }, 300);
});
</script>
"""
PARTS = {
    "style.css": b"body { color: rgb(1, 2, 3); }", "part.js": b"window.part = 'loaded';",
    "data.json": b'"data"', "image.svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="7" height="7"/>',
}  # fmt: skip


@pytest.fixture(scope="module", params=["without tokens", "with tokens"])
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    folder = tmp_path_factory.mktemp("pages")
    (folder / "config").write_text(CONFIG + (ANONYMOUS + TOKENS if request.param == "with tokens" else ""))
    yield from serve(folder)


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """Return a program that serves its reports under the name localhost."""
    folder = tmp_path_factory.mktemp("second")
    (folder / "config").write_text(CONFIG + TOKENS)
    yield from serve(folder, "--pages-host", "localhost")


def serve(folder: Path, *options: str) -> Iterator[Program]:
    with running(folder / "data", "--config", str(folder / "config"), *options) as program:
        report = REPORT.replace("FIRST", json.dumps(f"http://{program.address}"))
        for name, body in {**PARTS, "index.html": report.encode()}.items():
            push(program, f"site/report/{name}", body)
        push(program, "secret/x", b"secret")
        yield program


def push(program: Program, path: str, body: bytes) -> None:
    request = Request(program.url + path, body, {"Authorization": "Bearer all"}, method="PUT")
    with urlopen(request) as answer:
        assert answer.status == 201


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    with chromium(tmp_path / "profile", {}) as browser:
        yield browser


def sign_in(browser: Browser, url: str) -> None:
    """Give the browser the visitor's token for a host. It sends it with every further request there."""
    parts = urlsplit(url)
    browser.open(f"http://visitor:all@{parts.netloc}/artefacts/site/report/data.json")


def results_of(browser: Browser, url: str) -> dict[str, Any]:
    """Open a report. Return what its script could do."""
    browser.open(url)
    browser.until(lambda: browser.driver.title == "done", 30)
    results: dict[str, Any] = browser.run("return window.results")
    return results


def is_unchanged(program: Program) -> bool:
    """Return whether nothing was pushed and nothing deleted."""
    files = {str(path.relative_to(program.data)) for path in program.data.rglob("*") if path.is_file()}
    artefacts = {name for name in files if not name.startswith(".")}
    report = {f"site/report/{name}" for name in (*PARTS, "index.html")}
    return artefacts == report | {"secret/x"} and (program.data / "secret/x").read_bytes() == b"secret"


def test_report_without_an_origin_runs_but_reads_and_changes_nothing(
    program: Program, browser: Browser
) -> None:
    sign_in(browser, program.url)
    results = results_of(browser, f"{program.url}site/report/")
    assert (results["part"], results["color"], results["image"]) == ("loaded", "rgb(1, 2, 3)", 7)
    assert browser.run("return window.origin") == "null"
    answers = {name: answer for name, answer in results.items() if name.startswith("first: ")}
    assert len(answers) == 8 and answers.pop("first: form") == "sent"
    assert set(answers.values()) == {"failed: TypeError"} and results["storage"] == "failed: SecurityError"
    assert is_unchanged(program)


def test_report_under_the_second_name_has_an_origin_but_reads_no_other_directory(
    second: Program, browser: Browser
) -> None:
    there = f"http://localhost:{urlsplit(second.url).port}/artefacts/site/report/"
    sign_in(browser, there)
    sign_in(browser, second.url)
    results = results_of(browser, f"{second.url}site/report/")
    assert browser.driver.current_url == there
    assert (results["part"], results["color"], results["image"]) == ("loaded", "rgb(1, 2, 3)", 7)
    assert (results["second: own"], results["storage"]) == ('"data"', "kept")
    for method in "secret", "PUT", "DELETE", "POST":
        assert json.loads(results[f"second: {method}"])["status"] == 403
        assert results[f"first: {method}"] == "failed: TypeError"
    assert results["second: opaque secret"] != "secret"
    assert results["first: opaque secret"] == "failed: TypeError"
    assert is_unchanged(second)
