"""The page in a real browser: headless Chromium, driven by selenium, against the running program.

Needs Debian's `chromium` and `chromium-driver`. Starts `python artefacts.py` of the folder above this one.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import io
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import wave
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import BaseRequestHandler, TCPServer, ThreadingTCPServer
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote, urlsplit
from urllib.request import Request, urlopen

import pytest
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
ODD_NAMES = (
    'quotes "double" and \'single\'.txt',
    "<b onmouseover=alert(1)>tag</b><script>document.title='ran'<",
    "space  and\u00a0no-break.txt",
    "#fragment?query%20percent%&amp;.txt",
    "javascript:alert(1)",
    "emoji 🎉🏳️‍🌈.txt",
    "שלום עולם.txt",
    "\u202egnp.exe",
    "folder with #/child ?.txt",
    "@@ {0} %s $& u0041",
)
DROP = """
const [target, files] = arguments, transfer = new DataTransfer();
for (const [name, text, repeat] of files) transfer.items.add(new File([text.repeat(repeat)], name));
for (const type of ["dragenter", "dragover", "drop"])
  target.dispatchEvent(new DragEvent(type, {dataTransfer: transfer, bubbles: true, cancelable: true}));
"""


class Program:
    """The running program and requests to it."""

    def __init__(self, url: str, data: Path) -> None:
        self.url = url
        self.data = data
        self.address = urlsplit(url).netloc

    def request(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(self.address, timeout=10)
        with contextlib.closing(connection):
            connection.request(method, "/artefacts/" + quote(path), body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read()

    def put(self, path: str, body: bytes = b"content") -> None:
        assert self.request("PUT", path, body)[0] in (200, 201)

    def get(self, path: str) -> bytes | None:
        status, body = self.request("GET", path)
        return body if status == 200 else None

    def detail(self, method: str, path: str, **headers: str) -> str:
        """Return the detail of a request that is refused."""
        status, body = self.request(method, path, b"", **headers)
        assert status >= 400
        return str(json.loads(body)["detail"])

    def listing(self, directory: str) -> list[str]:
        return [artefact["id"] for artefact in json.loads(self.get(directory) or b"{}").get("artefacts", [])]

    def incoming(self) -> set[str]:
        """Return the names of the current staging files."""
        return {path.name for path in (self.data / ".incoming").iterdir()}


@contextlib.contextmanager
def running(data: Path, *options: str) -> Iterator[Program]:
    command = [sys.executable, "artefacts.py", "--port", "0", "--data", str(data), "--quiet", *options]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield Program(process.stdout.readline().strip(), data)
        finally:
            process.terminate()
            assert process.wait(15) == 0


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    with running(tmp_path_factory.mktemp("data"), "--keep-versions", "5") as program:
        yield program


def luminance(color: str) -> float:
    """Return the relative luminance of a computed color (WCAG 2)."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
    red, green, blue = (((part + 0.055) / 1.055) ** 2.4 if part > 0.04 else part / 12.92 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@contextlib.contextmanager
def at_work(server: TCPServer) -> Iterator[None]:
    """Run the server on a thread of its own until the `with` ends, then close it."""
    with server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def elsewhere(page: str, type: str, then: int = 200) -> Iterator[tuple[str, list[str]]]:
    """Run another server that answers every request with this page. After the first answer, the status is
    `then`. Yield its URL and the list of requests that it received."""
    seen: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            if server.socket.fileno() < 0:  # closed, but the browser had connected before
                return
            seen.append(f"{self.command} {self.path}")
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(then if seen[1:] else 200)
            self.send_header("Content-Type", type)
            self.end_headers()
            self.wfile.write(page.encode())

        do_GET = do_PUT = do_POST = do_DELETE = answer

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    with at_work(server):
        yield f"http://127.0.0.1:{server.server_port}/", seen


class Narrow(ThreadingTCPServer):
    """A proxy that slows down uploads to the program.

    The browser's own throttling may send a cancelled upload to its end."""

    daemon_threads = True

    def __init__(self, program: Program, bytes_per_second: float) -> None:
        """Set the speed of each connection. `bytes_per_second` can be changed later; 0 breaks connections."""
        super().__init__(("127.0.0.1", 0), BaseRequestHandler, bind_and_activate=False)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)  # lest all wait in the kernel
        self.server_bind()
        self.server_activate()
        self.program = program
        self.bytes_per_second = bytes_per_second
        self.url = f"http://127.0.0.1:{self.server_address[1]}/artefacts/"

    def finish_request(self, request: Any, client_address: Any) -> None:
        host, port = self.program.address.split(":")
        with socket.create_connection((host, int(port))) as onward:
            threading.Thread(target=self.back, args=(onward, request)).start()
            with contextlib.suppress(OSError):  # one of them has gone
                while (piece := request.recv(8192)) and self.bytes_per_second:
                    onward.sendall(piece)
                    time.sleep(len(piece) / self.bytes_per_second)
                onward.shutdown(socket.SHUT_RDWR)
                if not self.bytes_per_second:
                    request.shutdown(socket.SHUT_RDWR)

    def back(self, onward: socket.socket, request: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while piece := onward.recv(65536):
                request.sendall(piece)
            request.shutdown(socket.SHUT_WR)


class Browser:
    """A page in the browser, and what a person does with it."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, url: str) -> None:
        self.driver.get(url)

    def until(self, condition: Callable[[], Any], seconds: float = 10) -> Any:
        replaced = [StaleElementReferenceException]  # the page was left while the condition looked at it
        waiting = WebDriverWait(self.driver, seconds, 0.02, ignored_exceptions=replaced)
        return waiting.until(lambda _: condition())

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def find(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def texts(self, selector: str) -> list[str]:
        """Return the texts of the elements that are visible."""
        found: list[str] = self.run("""return [...document.querySelectorAll(arguments[0])]
            .filter(element => element.checkVisibility()).map(element => element.textContent)""", selector)
        return found

    def names(self) -> list[str]:
        return self.texts("tbody a")

    def row(self, name: str) -> WebElement:
        links = self.driver.find_elements(By.CSS_SELECTOR, "tbody a")
        link = next(link for link in links if link.get_property("textContent") == name)
        return link.find_element(By.XPATH, "ancestor::tr")

    def press(self, text: str, within: WebElement | None = None) -> None:
        """Press the visible button with this text."""
        buttons = (within or self.driver).find_elements(By.TAG_NAME, "button")
        same = (button for button in buttons if button.get_property("textContent") == text)
        next(button for button in same if self.run("return arguments[0].checkVisibility()", button)).click()

    def back(self) -> None:
        """Go back, and wait until the page has fetched its rows again."""
        self.driver.back()
        entries = "performance.getEntriesByType('resource').filter(entry => entry.initiatorType === 'fetch')"
        self.until(lambda: self.run(f"return {entries}.length"))
        time.sleep(0.2)

    def type(self, selector: str, text: str) -> None:
        """Replace the content of a field."""
        self.find(selector).send_keys(Keys.CONTROL + "a" + Keys.NULL + (text or Keys.DELETE))

    def keys(self, *keys: str) -> None:
        """Send keys to the focused element."""
        ActionChains(self.driver).send_keys(*keys).perform()

    def question(self) -> str:
        """Wait for the dialog. Return its question."""
        self.until(lambda: self.find("dialog").is_displayed())
        return self.find("dialog p").text

    def answer(self, text: str) -> None:
        self.press(text, self.find("dialog"))

    def confirm(self, button: str, row: str) -> None:
        """Press a row's button, then the button with the same text in the dialog."""
        self.press(button, self.row(row))
        self.question()
        self.answer(button)

    def pasted(self) -> str:
        """Return the text in the clipboard."""
        self.find("#into").send_keys(Keys.CONTROL + "av")
        return str(self.find("#into").get_property("value"))

    def status(self) -> str:
        return self.find("[role=status]").text

    def drop(self, *files: tuple[str, str] | tuple[str, str, int]) -> None:
        self.run(DROP, self.find("#upload"), [(*file, 1)[:3] for file in files])

    def requested(self) -> set[str]:
        """Return the hosts that were requested since the last call."""
        events = [json.loads(entry["message"])["message"] for entry in self.log("performance")]
        sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
        urls = [urlsplit(params["request"]["url"]) for params in sent]
        return {url.netloc for url in urls if url.scheme in ("http", "https", "ws", "wss")}

    def log(self, kind: str) -> list[dict[str, Any]]:
        """Return the log entries since the last call."""
        return self.driver.get_log(kind)  # type: ignore[no-any-return, no-untyped-call]


@contextlib.contextmanager
def chromium(profile: Path, preferences: dict[str, Any]) -> Iterator[Browser]:
    options = webdriver.ChromeOptions()
    for option in (*OPTIONS, f"--user-data-dir={profile}"):
        options.add_argument(option)
    options.binary_location = shutil.which("chromium") or ""
    options.add_experimental_option("prefs", preferences)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        yield Browser(driver)
    finally:
        driver.quit()


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("profile"), {}) as browser:
        yield browser


@pytest.fixture
def browser(started: Browser, program: Program) -> Iterator[Browser]:
    """Yield the browser. Afterwards check that no other host was requested."""
    started.requested()
    yield started
    assert started.requested() <= {program.address}


@pytest.fixture(scope="module")
def without_script(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    preferences = {"profile.default_content_setting_values.javascript": 2}
    with chromium(tmp_path_factory.mktemp("profile"), preferences) as browser:
        yield browser


@pytest.fixture
def apart(tmp_path: Path) -> Iterator[Browser]:
    """Yield another browser, for a test that requests other hosts."""
    with chromium(tmp_path / "profile", {}) as browser:
        yield browser


@pytest.fixture
def narrow(program: Program) -> Iterator[Narrow]:
    line = Narrow(program, 1_000_000)
    with at_work(line):
        yield line


@pytest.fixture
def directory(request: pytest.FixtureRequest) -> str:
    """Return the name of a directory for this test alone."""
    return request.node.name.removeprefix("test_")[:40]  # type: ignore[no-any-return]


def test_odd_names_are_shown_and_linked(browser: Browser, program: Program, directory: str) -> None:
    for name in ODD_NAMES:
        program.put(f"{directory}/{name}", name.encode())
    browser.open(program.url + directory)
    assert sorted(browser.names()) == sorted(ODD_NAMES)
    for slash in ("", "/"):
        browser.open(program.url + directory + slash)
        links = browser.run("return [...document.links].map(link => [link.textContent, link.href])")
        assert links.pop(0) == ["Skip to the list", browser.driver.current_url + "#content"]
        assert links.pop(0) == ["Artefacts", program.url]
        for name, url in links:
            path = urlsplit(url).path.removeprefix("/artefacts/")
            connection = http.client.HTTPConnection(program.address, timeout=10)
            with contextlib.closing(connection):
                connection.request("GET", "/artefacts/" + path)
                assert connection.getresponse().read() == name.encode()
    assert browser.driver.find_elements(By.CSS_SELECTOR, "tbody b, tbody script, tbody [onmouseover]") == []
    assert browser.driver.title == f"Artefacts: {directory}"


def test_an_odd_directory_can_be_opened_and_its_odd_artefacts_versions_too(
    browser: Browser, program: Program
) -> None:
    directory, name = "d <i>&\"'#?%41 ש", ODD_NAMES[3]
    program.put(f"{directory}/{name}", b"1")
    browser.open(program.url)
    browser.row(directory).find_element(By.TAG_NAME, "a").click()
    browser.until(lambda: browser.names() == [name])
    assert browser.find("h1").text == f"Artefacts / {directory}"
    browser.press("Versions", browser.row(name))
    browser.until(lambda: browser.texts("h1 bdi") == [directory, name])
    browser.find("tbody a").click()
    browser.until(lambda: browser.find("body").text == "1")


def test_the_listing_tells_size_age_and_digest(browser: Browser, program: Program, directory: str) -> None:
    body = b"x" * 1_234_567
    program.put(f"{directory}/a.bin", body)
    browser.open(program.url + directory)
    cells = browser.texts("tbody td")
    assert cells[:4] == ["a.bin", "1.23 MB", "just now", hashlib.sha256(body).hexdigest()[:12]]
    assert browser.find("tbody td:nth-child(2)").get_attribute("title") == "1234567 bytes"
    href = browser.find("tbody a").get_dom_attribute("href")
    assert href == f"{directory}/a.bin"
    digest = browser.find("tbody td:nth-child(4)").get_attribute("title")
    assert digest == hashlib.sha256(body).hexdigest()


def test_dropped_files_are_uploaded(browser: Browser, program: Program, directory: str) -> None:
    program.put(f"{directory}/there")
    files = [(name.replace("/", "-"), f"content of {name}", 1) for name in ODD_NAMES]
    files += [("empty", "", 1), ("large", "large " * 10, 100_000)]
    browser.open(program.url + directory)
    browser.drop(*files)
    browser.until(lambda: len(browser.names()) == len(files) + 1)
    assert browser.status() == f"{len(files)} stored, 0 not, 0 to go."
    for name, text, times in files:
        assert program.get(f"{directory}/{name}") == (text * times).encode()


def test_five_thousand_files_are_uploaded(browser: Browser, program: Program, directory: str) -> None:
    program.put(f"{directory}/there")
    browser.open(program.url + directory)
    browser.run("""const {send} = XMLHttpRequest.prototype;
        let under_way = window.most = 0;
        XMLHttpRequest.prototype.send = function (body) {
            window.most = Math.max(most, ++under_way);
            this.addEventListener("loadend", () => under_way--);
            send.call(this, body);
        };""")
    browser.drop(*((f"{number}", "x") for number in range(5000)))
    browser.until(lambda: browser.run("return most"))
    assert browser.run("return most") < 10  # of more than a thousand requests, the browser drops some
    stored = program.data / directory  # not the page: each look at it lays it out again
    browser.until(lambda: len(list(stored.iterdir())) == 5001, 600)
    browser.until(lambda: browser.texts("output") == ["5001 of 5001"])
    assert browser.status() == "5000 stored, 0 not, 0 to go."
    assert len(program.listing(directory)) == 5001


def test_a_file_whose_current_state_cannot_be_read_does_not_stop_the_others(
    browser: Browser, program: Program, directory: str
) -> None:
    for name in ("b", "there"):
        program.put(f"{directory}/{name}", b"old")
    browser.open(program.url + directory)
    browser.run("""const real = fetch;
        window.fetch = (url, options) => options.method === "HEAD" && /[/][bc]$/.test(url)
            ? Promise.reject(new TypeError("lost")) : real(url, options);""")
    browser.drop(*((name, "new") for name in "abcd"))
    browser.until(lambda: browser.names() == ["a", "b", "c", "d", "there"])
    assert [program.get(f"{directory}/{name}") for name in "abcd"] == [b"new", b"old", b"new", b"new"]
    assert browser.texts(".failed bdi") == ["b"]


def test_files_are_uploaded_by_the_form_into_a_folder(
    browser: Browser, program: Program, directory: str, tmp_path: Path
) -> None:
    program.put(f"{directory}/there")
    for name in ("one.txt", "two.txt"):
        (tmp_path / name).write_text(name)
    browser.open(program.url + directory + "/?format=html")
    browser.find("#into").send_keys("1.4.0/linux/")
    browser.find("#files").send_keys(f"{tmp_path / 'one.txt'}\n{tmp_path / 'two.txt'}")
    browser.until(lambda: browser.names() == ["1.4.0/linux/one.txt", "1.4.0/linux/two.txt", "there"])
    assert program.get(f"{directory}/1.4.0/linux/two.txt") == b"two.txt"


def test_a_directory_is_made_by_uploading_into_it(browser: Browser, program: Program, tmp_path: Path) -> None:
    (tmp_path / "first").write_text("first")
    browser.open(program.url)
    browser.find("#files").send_keys(str(tmp_path / "first"))
    assert browser.run("return document.querySelector('#into').validity.valueMissing")
    browser.find("#into").send_keys("brand new" + Keys.ENTER)
    browser.until(lambda: "brand new" in browser.names())
    assert program.get("brand new/first") == b"first"


def test_a_directory_without_a_name_is_refused(browser: Browser, program: Program) -> None:
    browser.open(program.url)
    for nameless in ("/", "//"):
        browser.type("#into", nameless)
        browser.drop(("file", "text"))
        assert browser.run("return document.querySelector('#into').validity.patternMismatch")
    assert "Type a name" in str(browser.find("#into").get_attribute("title"))  # shown with the refusal
    assert browser.texts("#uploads li") == []
    browser.type("#into", "/nameless/but/for this/")
    browser.drop(("file", "text"))
    browser.until(lambda: program.get("nameless/but/for this/file") == b"text")


def test_no_folder_leads_out_of_the_directory(browser: Browser, program: Program, directory: str) -> None:
    program.put(f"{directory}/there")
    browser.open(program.url + directory)
    for folder in ("..", "a/../..", ".hidden"):
        browser.type("#into", folder)
        browser.drop(("file", "text"))
        assert browser.run("return document.querySelector('#into').validity.patternMismatch")
    assert browser.texts("#uploads li") == []


def test_progress_is_shown_three_go_at_a_time_and_each_can_be_cancelled(
    apart: Browser, program: Program, directory: str, narrow: Narrow
) -> None:
    browser = apart
    program.put(f"{directory}/there")
    browser.open(narrow.url + directory)
    browser.drop(*((f"{number}.bin", "x", 16_000_000) for number in range(5)))
    browser.until(lambda: sum("/s" in text for text in browser.texts("#uploads span")) == 3)
    assert browser.texts("#uploads span")[3:] == ["waiting", "waiting"]
    bars = browser.run("return [...document.querySelectorAll('#uploads progress')].map(bar => bar.value)")
    assert all(0 < bar < 1 for bar in bars[:3]) and bars[3:] == [0, 0]
    browser.until(lambda: browser.run("return document.querySelector('#uploads progress').value") > bars[0])
    assert browser.find("#uploads progress").accessible_name == "0.bin"
    bar = "return document.querySelector('#uploads li.open progress').value"
    for _ in range(4):
        browser.until(lambda: browser.run(bar) > 0)
        browser.press("Cancel", browser.find("#uploads"))
    narrow.bytes_per_second = math.inf
    browser.until(lambda: "4.bin" in browser.names())
    assert browser.texts("#uploads span") == ["cancelled"] * 4 + ["stored"]
    browser.until(lambda: not program.incoming())
    assert program.listing(directory) == ["4.bin", "there"]


def test_it_asks_before_it_replaces(browser: Browser, program: Program, directory: str) -> None:
    program.put(f"{directory}/old <1>", b"old")
    browser.open(program.url + directory)
    browser.drop(("old <1>", "new"), ("other", "other"))
    assert browser.question() == "Replace 1 of 2 files? \u2068old <1>\u2069 (3 B, stored just now)"
    browser.answer("Cancel")
    browser.until(lambda: browser.names() == ["old <1>", "other"])
    assert browser.status() == "Nothing was changed: \u2068old <1>\u2069 stayed as before."
    assert program.get(f"{directory}/old <1>") == b"old"
    browser.drop(("old <1>", "new"))
    browser.question()
    browser.answer("Replace")
    browser.until(lambda: program.get(f"{directory}/old <1>") == b"new")


def test_it_asks_one_question_at_a_time(browser: Browser, program: Program, directory: str) -> None:
    program.put(f"{directory}/a", b"old")
    program.put(f"{directory}/b", b"old")
    browser.open(program.url + directory)
    browser.drop(("a", "new"))
    browser.drop(("b", "new"))
    first = browser.question()
    browser.answer("Replace")
    browser.until(lambda: browser.question() != first)
    browser.answer("Replace")
    browser.until(lambda: [program.get(f"{directory}/{name}") for name in "ab"] == [b"new", b"new"])


def test_it_replaces_nothing_that_changed_since_it_asked(
    browser: Browser, program: Program, directory: str
) -> None:
    program.put(f"{directory}/a", b"old")
    browser.open(program.url + directory)
    browser.drop(("a", "mine"))
    browser.question()
    program.put(f"{directory}/a", b"another's")
    browser.answer("Replace")
    browser.until(lambda: browser.texts(".failed"))
    changed = program.detail("PUT", f"{directory}/a", **{"If-None-Match": "*"})
    assert browser.texts(".failed span") == [changed]
    assert program.get(f"{directory}/a") == b"another's"


def test_it_says_why_an_upload_failed(browser: Browser, program: Program, directory: str) -> None:
    program.put(f"{directory}/folder/child")
    browser.open(program.url + directory)
    browser.drop((".hidden", "text"), ("folder", "text"), ("fine", "text"))
    browser.until(lambda: "fine" in browser.names())
    why = [program.detail("PUT", f"{directory}/{name}") for name in (".hidden", "folder")]
    assert browser.texts(".failed span") == why
    assert browser.status() == "1 stored, 2 not, 0 to go."


def test_the_listing_is_filtered_as_one_types(browser: Browser, program: Program, directory: str) -> None:
    for number in range(30):
        program.put(f"{directory}/Build-{number}.txt", b"%d" % number)
    browser.open(program.url + directory)
    browser.type("#search", "build 2")
    assert browser.names() == [f"Build-{number}.txt" for number in (12, 2, *range(20, 30))]
    assert browser.texts("output") == ["12 of 30"]
    browser.type("#search", hashlib.sha256(b"17").hexdigest().upper())
    assert browser.names() == ["Build-17.txt"]
    browser.type("#search", hashlib.sha256(b"17").hexdigest()[:12])
    assert browser.names() == ["Build-17.txt"]


def test_the_columns_sort_without_another_request(
    browser: Browser, program: Program, directory: str
) -> None:
    for name, size in (("1.9", 3), ("1.10", 1), ("1.2", 2)):
        program.put(f"{directory}/{name}", b"x" * size)
    browser.open(program.url + directory)
    sort = "[...document.querySelectorAll('th')].map(header => header.getAttribute('aria-sort'))"
    for column, names, order in (
        ("Name", ["1.2", "1.9", "1.10"], ["ascending", "none", "none", None]),
        ("Name", ["1.10", "1.9", "1.2"], ["descending", "none", "none", None]),
        ("Size", ["1.9", "1.2", "1.10"], ["none", "descending", "none", None]),
        ("Size", ["1.10", "1.2", "1.9"], ["none", "ascending", "none", None]),
        ("Stored", ["1.2", "1.10", "1.9"], ["none", "none", "descending", None]),
        ("Stored", ["1.9", "1.10", "1.2"], ["none", "none", "ascending", None]),
    ):
        browser.press(column, browser.find("thead"))
        assert browser.names() == names
        assert browser.run(f"return {sort}") == order
    assert browser.run("return performance.getEntriesByType('resource').length") == 0


def test_link_curl_command_and_digest_are_copied(
    browser: Browser, program: Program, directory: str, tmp_path: Path
) -> None:
    name, digest = "it's $HOME.txt", hashlib.sha256(b"content").hexdigest()
    program.put(f"{directory}/{name}")
    browser.open(program.url + directory)
    browser.press("Link", browser.row(name))
    assert browser.pasted() == f"{program.url}{directory}/it%27s%20%24HOME.txt"
    browser.press("curl", browser.row(name))
    assert browser.status() == "curl command copied."
    subprocess.run(browser.pasted() + " -s", shell=True, cwd=tmp_path, check=True)
    assert (tmp_path / name).read_bytes() == b"content"
    browser.press(digest[:12])
    assert browser.pasted() == digest


@pytest.mark.parametrize("directory", ["x';touch$IFS$9planted;'", "[1-3]{a,b}"])
def test_a_curl_command_is_safe_to_paste(
    browser: Browser, program: Program, directory: str, tmp_path: Path
) -> None:
    """The author of a link chooses how its URL is written. The browser does not encode these characters."""
    name = "it's {a,b} [1-3] $(touch planted).txt"
    program.put(f"{directory}/{name}")
    browser.open(f"{program.url}{directory}/")
    browser.press("curl")
    subprocess.run(browser.pasted() + " -s", shell=True, cwd=tmp_path, check=True)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [(name, b"content")]


def test_credentials_in_the_url_are_neither_in_the_way_nor_copied(started: Browser, tmp_path: Path) -> None:
    config = tmp_path / "artefacts.toml"
    sha256 = hashlib.sha256(b"secret").hexdigest()
    config.write_text(f'[[token]]\nname = "ci"\nsha256 = "{sha256}"\nread = ["*"]\nwrite = ["*"]\n')
    authorization = {"Authorization": "Basic " + base64.b64encode(b"ci:secret").decode()}
    with running(tmp_path / "data", "--config", str(config), "--keep-versions", "5") as program:
        assert program.request("PUT", "private/a", b"old", **authorization)[0] == 201
        started.open(program.url.replace("//", "//ci:secret@") + "private")
        started.drop(("b", "new"))
        started.until(lambda: started.names() == ["a", "b"])
        started.press("Link", started.row("a"))
        assert started.pasted() == f"{program.url}private/a"
        started.press("curl", started.row("a"))
        assert started.pasted() == f"curl -fOJ '{program.url}private/a'"
        started.confirm("Delete", "a")
        started.until(lambda: "Its versions are kept." in started.status())
        started.press("Show deleted")
        started.until(lambda: started.names() == ["a"])
        started.press("Versions", started.row("a"))
        started.until(lambda: "Restore" in started.texts("td button"))
        started.confirm("Restore", *started.names())
        started.until(lambda: len(started.names()) == 2)
        assert program.request("GET", "private/a", None, **authorization) == (200, b"old")


def test_an_artefact_is_deleted_once_that_is_confirmed(
    browser: Browser, program: Program, directory: str
) -> None:
    program.put(f"{directory}/a & b")
    program.put(f"{directory}/c")
    browser.open(program.url + directory)
    browser.press("Delete", browser.row("a & b"))
    assert browser.question() == "Delete \u2068a & b\u2069, 7 B, stored just now?"
    browser.answer("Cancel")
    assert program.get(f"{directory}/a & b") == b"content"
    browser.press("Delete", browser.row("a & b"))
    browser.question()
    browser.answer("Delete")
    browser.until(lambda: "is deleted" in browser.status())
    assert program.listing(directory) == ["c"]
    assert browser.texts("output") == ["1 of 1"]


def test_nothing_is_deleted_that_changed_since_it_was_listed(
    browser: Browser, program: Program, directory: str
) -> None:
    program.put(f"{directory}/a", b"listed")
    browser.open(program.url + directory)
    program.put(f"{directory}/a", b"newer")
    browser.press("Delete", browser.row("a"))
    browser.question()
    browser.answer("Delete")
    changed = program.detail("DELETE", f"{directory}/a", **{"If-Match": '"listed"'})
    browser.until(lambda: browser.status() == changed)
    assert program.get(f"{directory}/a") == b"newer"


def test_a_directory_is_deleted_once_that_is_confirmed(
    browser: Browser, program: Program, directory: str
) -> None:
    program.put(f"{directory}/a")
    browser.open(program.url)
    browser.press("Delete", browser.row(directory))
    assert directory in browser.question()
    browser.answer("Delete")
    browser.until(lambda: directory not in browser.names())
    assert program.request("GET", directory)[0] == 404
    left = len(browser.names())
    assert browser.texts("output") == [f"{left} of {left}"]


@pytest.mark.parametrize(
    ("query", "control"), [("?limit=1", "Stored"), ("", "Delete"), ("/a?versions", "Restore")]
)
def test_it_says_that_the_server_is_away(
    started: Browser, program: Program, directory: str, query: str, control: str
) -> None:
    """First a proxy answers with an error and HTML, then nothing answers."""
    for body in (b"one", b"two"):
        program.put(f"{directory}/a", body)
    program.put(f"{directory}/b")
    request = Request(f"{program.url}{quote(directory)}{query}", headers={"Accept": "text/html"})
    with urlopen(request) as answer:
        page = answer.read().decode()

    def attempt() -> None:
        if control == "Stored":
            started.press("Stored", started.find("thead"))
        else:
            started.confirm(control, names[-1])

    started.log("browser")
    with elsewhere(page, "text/html", 502) as (url, _):
        started.open(f"{url}artefacts/{quote(directory)}{query}")
        names = started.names()
        attempt()
        started.until(lambda: started.status() == "The answer was 502.")
    attempt()
    started.until(lambda: "does not answer" in started.status())
    assert started.names() == names
    assert not [entry for entry in started.log("browser") if "Uncaught" in entry["message"]]


def test_a_listing_that_is_gone_stays_as_it_was(browser: Browser, program: Program, directory: str) -> None:
    program.put(f"{directory}/a")
    program.put(f"{directory}/b")
    browser.open(program.url + directory + "?limit=1")
    assert program.request("DELETE", directory)[0] == 204
    browser.press("Stored", browser.find("thead"))
    browser.until(lambda: browser.status() == program.detail("GET", directory))
    assert browser.names() == ["a"]


def test_versions_are_listed_fetched_restored_and_erased(
    browser: Browser, program: Program, directory: str
) -> None:
    for body in (b"one", b"two", b"three"):
        program.put(f"{directory}/a.txt", body)
    browser.open(program.url + directory)
    browser.press("Versions", browser.row("a.txt"))
    browser.until(lambda: len(browser.names()) == 3)
    newest, middle, oldest = browser.names()
    assert newest > middle > oldest
    browser.driver.find_element(By.LINK_TEXT, oldest).click()
    browser.until(lambda: browser.find("body").text == "one")
    browser.back()
    browser.press("Restore", browser.row(oldest))
    assert oldest in browser.question()
    browser.answer("Restore")
    browser.until(lambda: len(browser.names()) == 4)
    assert program.get(f"{directory}/a.txt") == b"one"
    browser.press("Delete", browser.row(middle))
    assert middle in browser.question()
    browser.answer("Delete")
    browser.until(lambda: len(browser.names()) == 3)
    assert middle not in browser.names()


def test_what_was_deleted_can_be_restored(browser: Browser, program: Program, directory: str) -> None:
    program.put(f"{directory}/a")
    browser.open(program.url + directory)
    browser.press("Delete", browser.row("a"))
    browser.question()
    browser.answer("Delete")
    browser.until(lambda: "Its versions are kept." in browser.status())
    browser.press("Show deleted")
    browser.until(lambda: browser.names() == ["a"])
    browser.press("Versions", browser.row("a"))
    browser.until(lambda: "Restore" in browser.texts("td button"))
    browser.press("Restore")
    browser.question()
    browser.answer("Restore")
    browser.until(lambda: program.get(f"{directory}/a") == b"content")


def test_a_listing_that_was_cut_leads_on(browser: Browser, program: Program, directory: str) -> None:
    for name in ("a", "b & c", "d"):
        program.put(f"{directory}/{name}")
    browser.open(program.url + directory + "?limit=2")
    assert browser.names() == ["a", "b & c"]
    browser.find("[rel=next]").click()
    browser.until(lambda: browser.names() == ["d"])


def test_it_leads_on_where_the_listing_does_by_now(
    browser: Browser, program: Program, directory: str
) -> None:
    for name in ("a", "b"):
        program.put(f"{directory}/{name}")
    browser.open(program.url + directory + "?limit=2")
    assert "More" not in browser.texts("a")
    browser.drop(("c", "text"))
    browser.until(lambda: "More" in browser.texts("a"))
    program.request("DELETE", f"{directory}/c")
    browser.press("Stored", browser.find("thead"))
    browser.until(lambda: "More" not in browser.texts("a"))
    assert browser.names() == ["b", "a"]


def test_the_keyboard_is_enough(browser: Browser, program: Program, directory: str) -> None:
    program.put(f"{directory}/a")
    digest = hashlib.sha256(b"content").hexdigest()
    browser.open(program.url + directory)

    def focused() -> str:
        return browser.driver.switch_to.active_element.accessible_name

    def tab_to(name: str) -> None:
        for _ in range(20):
            browser.keys(Keys.TAB)
            if focused() == name:
                return
        pytest.fail(f"{name} cannot be reached")

    controls = ("Folder", "Files", "or a folder", "Upload", "Filter", "zip", "Name")
    for name in (*controls, "a", f"{digest[:12]} a", "Versions a", "Link a"):
        tab_to(name)
    browser.keys(Keys.ENTER)
    browser.until(lambda: browser.status() == "Link copied.")
    assert focused() == "Link a"
    tab_to("Delete a")
    browser.keys(Keys.ENTER)
    browser.question()
    assert focused() == "Cancel"
    browser.keys(Keys.ESCAPE)
    browser.until(lambda: not browser.find("dialog").is_displayed())
    assert focused() == "Delete a" and program.get(f"{directory}/a") == b"content"


def test_every_control_has_a_name(browser: Browser, program: Program, directory: str) -> None:
    program.put(f"{directory}/a")
    (program.data / directory / "dropped in by hand").write_bytes(b"")
    for path in ("", directory, f"{directory}/a?versions"):
        browser.open(program.url + path)
        controls = browser.driver.find_elements(By.CSS_SELECTOR, "a, button, input")
        assert controls and all(control.accessible_name for control in controls if control.is_displayed())


@pytest.mark.parametrize(("width", "height"), [(1000, 640), (320, 640)])
def test_nothing_covers_what_has_the_focus(
    browser: Browser, program: Program, directory: str, width: int, height: int
) -> None:
    for number in range(20):
        program.put(f"{directory}/{number:02}.bin")
    screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    try:
        browser.open(program.url + directory)
        browser.press("curl")
        assert browser.status() == "curl command copied."
        covered = browser.run("""
            const all = [...document.querySelectorAll("a, button, input")];
            const controls = all.filter(one => one.checkVisibility());
            return [...controls, ...controls.toReversed()].filter(one => {
              one.focus();
              const {x, y, width, height} = one.getBoundingClientRect();
              return ![1, height / 2, height - 1].every(down =>
                one.contains(document.elementFromPoint(x + width / 2, y + down)));
            }).map(one => one.textContent);""")
        assert covered == []
    finally:
        browser.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_the_tables_head_stays_in_sight(browser: Browser, program: Program, directory: str) -> None:
    for number in range(40):
        program.put(f"{directory}/{number:02}.bin")
    browser.open(program.url + directory)
    on_top = browser.run("""document.querySelector("tbody tr:nth-child(20)").scrollIntoView(true);
        return [...document.querySelectorAll("thead :is(th, td)")].map(cell => {
          const {x, width} = cell.getBoundingClientRect();
          return cell.contains(document.elementFromPoint(x + width / 2, 5));
        });""")
    assert on_top == [True] * 5


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read_on_a_phone_and_in_the_dark(
    browser: Browser, program: Program, directory: str, scheme: str
) -> None:
    program.put(f"phone/{'long-name-without-a-break' * 8}.tar.gz")
    program.put(f"phone/{'long-name-without-a-break' * 8}.tar.gz", b"2")
    command = browser.driver.execute_cdp_cmd
    command("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    phone = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    command("Emulation.setDeviceMetricsOverride", phone)
    try:
        for path in ("", "phone", f"phone/{'long-name-without-a-break' * 8}.tar.gz?versions"):
            browser.open(program.url + path)
            assert browser.run("return document.documentElement.scrollWidth") == 360
            assert browser.names()
            ink, paper, *hints = browser.run("""const style = getComputedStyle(document.documentElement);
                const hints = [...document.querySelectorAll("[placeholder]")];
                return [style.color, style.backgroundColor,
                        ...hints.map(hint => getComputedStyle(hint, "::placeholder").color)]""")
            assert (luminance(ink) > luminance(paper)) == (scheme == "dark")
            assert contrast(ink, paper) > 15 and all(contrast(hint, paper) >= 4.5 for hint in hints)
    finally:
        command("Emulation.clearDeviceMetricsOverride", {})
        command("Emulation.setEmulatedMedia", {"features": []})


def test_the_policy_admits_nothing_else(apart: Browser, program: Program, directory: str) -> None:
    """Markup that got into the page cannot run a script, add a style or a frame, or request another host."""
    browser = apart
    program.put(f"{directory}/a")
    browser.open(program.url + directory)
    with elsewhere("", "text/html") as (url, seen):
        browser.run("""
            window.refused = [];
            document.onsecuritypolicyviolation = event => refused.push(event.effectiveDirective);
            const [url] = arguments;
            const make = (name, values) => Object.assign(document.createElement(name), values);
            const handler = make("b"), form = make("form", {action: url, method: "post"});
            handler.setAttribute("onclick", "document.title = 'ran'");
            document.body.append(
              make("img", {src: url}), make("iframe", {src: url}), make("script", {src: url}), handler, form,
              make("script", {textContent: "document.title = 'ran'"}),
              make("style", {textContent: "body { display: none }"}));
            fetch(url).catch(() => 0);
            handler.click();
            form.submit();""", url)  # fmt: skip
        wanted = {
            "connect-src", "form-action", "frame-src", "img-src", "script-src-attr", "script-src-elem",
            "style-src-elem",
        }  # fmt: skip
        browser.until(lambda: wanted <= set(browser.run("return refused")))
        assert browser.driver.title == f"Artefacts: {directory}" and browser.find("body").is_displayed()
        browser.open(url + "opened")
        assert set(seen) <= {"GET /opened", "GET /favicon.ico"}


def test_the_page_itself_breaks_no_policy(browser: Browser, program: Program, directory: str) -> None:
    program.put(f"{directory}/a")
    browser.log("browser")
    for path in ("", directory, f"{directory}/a?versions"):
        browser.open(program.url + path)
    assert browser.log("browser") == []


SCRIPT = """<script>
document.getElementById("mark").textContent = "ran";
fetch("/artefacts/").then(answer => answer.text()).then(text => fetch("stolen", {method: "PUT", body: text}));
</script>"""
FILES = {
    "page.html": f"""<!doctype html><p id="mark">as it was</p>{SCRIPT}
        <img src="x" onerror="document.getElementById('mark').textContent = 'ran'">""",
    "image.svg": f"""<svg xmlns="http://www.w3.org/2000/svg"><text id="mark">as it was</text>
        {SCRIPT.replace("=>", "=&gt;")}
        <g onload="document.getElementById('mark').textContent = 'ran'"/></svg>""",
}


@pytest.mark.parametrize("name", FILES)
def test_what_was_uploaded_runs_nothing(apart: Browser, program: Program, name: str) -> None:
    """Files try to run a script and read the listing. They can from another server, but not from ours."""
    mark = "return document.getElementById('mark').textContent"
    with elsewhere(FILES[name], "image/svg+xml" if name.endswith("svg") else "text/html") as (url, seen):
        apart.open(url + "artefacts/" + name)
        apart.until(lambda: apart.run(mark) == "ran" and "PUT /artefacts/stolen" in seen)
        apart.open("about:blank")
    program.put(f"hostile/{name}", FILES[name].encode())
    apart.open(f"{program.url}hostile/{name}")
    assert apart.run(mark) == "as it was"
    apart.open(f"{program.url}hostile/")
    assert apart.names() == program.listing("hostile") and "stolen" not in apart.names()


IMAGE = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect width="9" height="9"/></svg>'
STYLE = b"p { color: rgb(1, 2, 3) }"


def tone() -> bytes:
    """Return a WAV file of a tenth of a second."""
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setparams((1, 1, 8000, 0, "NONE", ""))
        writer.writeframes(bytes(800))
    return file.getvalue()


def test_a_report_shows_its_styles_images_and_media(apart: Browser, program: Program) -> None:
    report = b"""<!doctype html><link rel="stylesheet" href="css/style.css"><p style="margin: 7px">text
        <img src="image.svg"><img src="data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAA=">
        <audio src="tone.wav" controls></audio>"""
    for name, content in (
        ("index.html", report), ("css/style.css", STYLE), ("image.svg", IMAGE), ("tone.wav", tone()),
    ):  # fmt: skip
        program.put(f"report/{name}", content)
    apart.open(f"{program.url}report/index.html")
    style = "return (style => [style.color, style.marginTop])(getComputedStyle(document.querySelector('p')))"
    assert apart.run(style) == ["rgb(1, 2, 3)", "7px"]
    assert apart.run("return [...document.images].map(image => image.naturalWidth)") == [9, 1]
    duration = "return document.querySelector('audio, video').duration"
    assert apart.until(lambda: apart.run(duration)) == 0.1
    apart.open(f"{program.url}report/tone.wav")
    assert apart.until(lambda: apart.run(duration)) == 0.1
    apart.open(f"{program.url}report/image.svg")
    assert apart.run("return document.documentElement.getBoundingClientRect().width") == 9


def test_other_sites_cannot_use_artefacts(apart: Browser, program: Program) -> None:
    for name, content in ("x.js", b"window.stolen = 1"), ("x.css", STYLE), ("x.svg", IMAGE):
        program.put(f"private/{name}", content)
    url = f"{program.url}private"
    page = f"""<!doctype html><script src="{url}/x.js"></script><link rel="stylesheet" href="{url}/x.css">
        <img src="{url}/x.svg"><img src="{url}/none.svg"><p>text"""
    with elsewhere(page, "text/html") as (other, _):
        apart.open(other)
        assert apart.run("return [...document.images].map(image => image.naturalWidth)") == [0, 0]
        color = "getComputedStyle(document.querySelector('p')).color"
        assert apart.run(f"return [window.stolen ?? null, {color}]") == [None, "rgb(0, 0, 0)"]


def test_without_script_it_lists_links_and_uploads(
    without_script: Browser, program: Program, directory: str, tmp_path: Path
) -> None:
    browser = without_script
    program.put(f"{directory}/a <b>.txt", b"a")
    (tmp_path / "by hand.txt").write_text("by hand")
    (tmp_path / "second.txt").write_text("second")
    browser.open(program.url)
    browser.driver.find_element(By.LINK_TEXT, directory).click()
    assert browser.find("h1").text == f"Artefacts / {directory}"
    assert not browser.find("#search").is_displayed()
    browser.find("#files").send_keys(f"{tmp_path / 'by hand.txt'}\n{tmp_path / 'second.txt'}")
    browser.press("Upload")
    browser.until(lambda: browser.driver.find_elements(By.LINK_TEXT, "by hand.txt"))
    assert urlsplit(browser.driver.current_url).path.rstrip("/") == f"/artefacts/{directory}"
    assert program.get(f"{directory}/by hand.txt") == b"by hand"
    assert program.get(f"{directory}/second.txt") == b"second"
    browser.driver.find_element(By.LINK_TEXT, "a <b>.txt").click()
    browser.until(lambda: browser.find("body").text == "a")


def test_without_script_versions_are_listed(
    without_script: Browser, program: Program, directory: str
) -> None:
    browser = without_script
    program.put(f"{directory}/a.txt", b"one")
    program.put(f"{directory}/a.txt", b"two")
    browser.open(program.url + directory)
    assert browser.texts("td:last-child button") == ["Versions"]
    browser.press("Versions")
    browser.until(lambda: len(browser.driver.find_elements(By.CSS_SELECTOR, "tbody tr")) == 2)
    browser.driver.find_elements(By.CSS_SELECTOR, "tbody a")[1].click()
    browser.until(lambda: browser.find("body").text == "one")
    browser.driver.back()
    browser.press("Restore")
    browser.until(lambda: program.get(f"{directory}/a.txt") == b"one")


# == Many rows ====================================================================================


def fill(program: Program, directory: str, count: int) -> None:
    """Put artefacts into a directory by hand, without a request for each."""
    folder = program.data / directory
    folder.mkdir()
    for number in range(count):
        (folder / f"build-1.{number}.txt").write_bytes(b"x" * (number % 7))


# Run a script. Return the time until the next frame is shown, in ms.
TIMED = """const done = arguments[0], start = performance.now();
%s;
requestAnimationFrame(() => setTimeout(() => done(performance.now() - start)));"""


def test_ten_thousand_rows_are_sorted_and_filtered_quickly(
    browser: Browser, program: Program, directory: str
) -> None:
    """The bounds hold for the best of three runs: the machine may be busy.

    Measured: first paint 0.3 s, sort 0.4 s, filter 0.1 s. With all buttons in one form a sort took 343 s."""
    fill(program, directory, 10_000)
    painted = []
    for _ in range(3):
        browser.open(f"{program.url}{directory}/?format=html")
        painted.append(browser.run("return performance.getEntriesByType('paint')[0].startTime"))
    assert min(painted) < 1000
    assert browser.texts("output") == ["10000 of 10000"]
    timed = browser.driver.execute_async_script
    for value in ("name", "size", "time"):
        click = f"document.querySelector('th [value={value}]').click()"
        assert min(timed(TIMED % click) for _ in range(3)) < 2000
    browser.press("Name", browser.find("thead"))
    first = browser.run("return [...document.links].slice(2, 5).map(link => link.textContent)")
    assert first == ["build-1.0.txt", "build-1.1.txt", "build-1.2.txt"]
    words = ("build 77", "no such artefact", "")
    found = sum("77" in str(number) for number in range(10_000))
    texts = ("const field = document.querySelector('#search'); field.value = '%s';"
             "field.dispatchEvent(new Event('input'))")  # fmt: skip
    for word, count in zip(words, (f"{found} of 10000", "0 of 10000", "10000 of 10000"), strict=True):
        assert min(timed(TIMED % (texts % word)) for _ in range(3)) < 2000
        assert browser.texts("output") == [count]


def test_a_large_directory_is_cut_and_the_server_filters_and_sorts_it(
    browser: Browser, program: Program, directory: str
) -> None:
    fill(program, directory, 1205)
    program.put(f"{directory}/zz[1] *?.txt")
    browser.open(program.url + directory)
    assert len(browser.names()) == 1000 and browser.texts("[rel=next]") == ["More"]
    assert browser.texts("output") == ["1000 of more; the server filters and sorts"]
    browser.type("#search", "BUILD 1.120")
    wanted = ["build-1.120.txt", *(f"build-1.120{number}.txt" for number in range(5))]
    browser.until(lambda: browser.names() == wanted)
    assert browser.texts("output") == ["6 found by the server"]
    browser.type("#search", "[1] *?")
    browser.until(lambda: browser.names() == ["zz[1] *?.txt"])
    browser.type("#search", "")
    browser.until(lambda: len(browser.names()) == 1000)
    browser.press("Stored", browser.find("thead"))
    browser.until(lambda: browser.names()[0] == "zz[1] *?.txt")
    assert len(browser.names()) == 1000
    assert browser.texts("output") == ["1000 of more; the server filters and sorts"]
    assert not browser.find("th [value=size]").is_enabled()
    browser.press("Name", browser.find("thead"))
    browser.until(lambda: browser.names()[0] == "build-1.0.txt")
    browser.run("document.querySelector('[rel=next]').scrollIntoView()")  # estimated heights change
    browser.find("[rel=next]").click()
    browser.until(lambda: "zz[1] *?.txt" in browser.names())
    assert browser.texts("output") == ["206 of more; the server filters and sorts"]
    browser.type("#search", "1.0.txt")
    browser.until(lambda: browser.names() == ["build-1.0.txt"])


def test_back_shows_the_rows_as_they_were(browser: Browser, program: Program, directory: str) -> None:
    for name in ("a-1", "a-2", "a-10", "b"):
        program.put(f"{directory}/{name}")
    browser.open(program.url + directory)
    browser.type("#search", "a-")
    browser.press("Name", browser.find("thead"))
    browser.press("Name", browser.find("thead"))
    assert browser.names() == ["a-10", "a-2", "a-1"]
    browser.press("Versions", browser.row("a-2"))
    browser.until(lambda: browser.texts("h1 bdi") == [directory, "a-2"])
    program.put(f"{directory}/a-3")
    browser.back()
    assert browser.names() == ["a-10", "a-3", "a-2", "a-1"]
    assert browser.find("#search").get_property("value") == "a-"
    assert browser.texts("output") == ["4 of 5"]
    assert browser.find("th").get_attribute("aria-sort") == "descending"


# == Failures and rights ==========================================================================


def test_an_upload_goes_on_after_the_connection_broke(
    apart: Browser, program: Program, directory: str, narrow: Narrow
) -> None:
    browser = apart
    program.put(f"{directory}/there")
    browser.open(narrow.url + directory)
    browser.drop(("large.bin", "x", 8_000_000))
    shown = r"[\d.]+ MB of 8 MB, [\d.]+ [kM]B/s, done in \d+ sec\."
    browser.until(lambda: re.fullmatch(shown, browser.texts("#uploads span")[0]))
    narrow.bytes_per_second = 0
    browser.until(lambda: browser.texts(".failed span"))
    assert browser.texts(".failed span")[0].startswith("The connection broke.")
    focused = browser.driver.switch_to.active_element
    assert focused.accessible_name == "Retry large.bin"
    narrow.bytes_per_second = 4_000_000
    browser.keys(Keys.ENTER)
    browser.until(lambda: browser.texts("#uploads span") == ["storing…"])
    browser.until(lambda: browser.texts("#uploads span") == ["stored"])
    browser.until(lambda: browser.names() == ["large.bin", "there"])


def test_a_declined_file_can_be_tried_again(
    browser: Browser, program: Program, directory: str
) -> None:
    program.put(f"{directory}/a", b"old")
    browser.open(program.url + directory)
    browser.drop(("a", "new"))
    assert browser.question() == "Replace \u2068a\u2069 (3 B, stored just now)?"
    browser.answer("Cancel")
    browser.until(lambda: "stayed as before" in browser.status())
    assert browser.texts(".failed span") == ["not replaced"]
    browser.drop(("b", "other"))
    browser.until(lambda: browser.names() == ["a", "b"])
    assert browser.status() == "1 stored, 1 not, 0 to go."
    browser.press("Retry", browser.find("#uploads"))
    browser.question()
    browser.answer("Replace")
    browser.until(lambda: program.get(f"{directory}/a") == b"new")


def test_a_large_file_is_not_sent_before_the_question(
    apart: Browser, program: Program, directory: str, narrow: Narrow
) -> None:
    program.put(f"{directory}/a", b"old")
    apart.open(narrow.url + directory)
    apart.drop(("a", "x", 100_000_000))  # would take 100 s
    assert "Replace \u2068a\u2069" in apart.question()
    apart.answer("Cancel")


def tokens(folder: Path) -> str:
    """Write a configuration with a reader, a writer, a public directory and a write-once one."""
    text = '[anonymous]\nread = ["public"]\n[[directory]]\nname = "once"\nwrite_once = true\n'
    for name, write in (("reader", "[]"), ("writer", '["*"]')):
        digest = hashlib.sha256(name.encode()).hexdigest()
        text += f'[[token]]\nname = "{name}"\nsha256 = "{digest}"\nread = ["*"]\nwrite = {write}\n'
    (folder / "artefacts.toml").write_text(text)
    return str(folder / "artefacts.toml")


def test_the_page_offers_what_the_visitor_may_do(apart: Browser, tmp_path: Path) -> None:
    with running(tmp_path / "data", "--config", tokens(tmp_path), "--keep-versions", "5") as program:
        basic = {"Authorization": "Basic " + base64.b64encode(b":writer").decode()}
        for path in ("public/a", "public/a", "once/a", "private/a"):
            program.request("PUT", path, path.encode() + str(time.time()).encode(), **basic)

        def offered() -> set[str]:
            form = {"form"} if apart.driver.find_elements(By.CSS_SELECTOR, "#upload") else set()
            return form | {"Delete", "Restore", "Sign in"} & set(apart.texts("button"))

        apart.open(program.url)
        assert apart.names() == ["public"] and offered() == {"Sign in"}
        apart.open(program.url + "public")
        assert apart.names() == ["a"] and offered() == {"Sign in"}
        assert apart.driver.find_elements(By.CSS_SELECTOR, "header span") == []

        def sign_in(token: str) -> None:
            value = "Basic " + base64.b64encode(f":{token}".encode()).decode()
            apart.driver.execute_cdp_cmd("Network.enable", {})
            headers = {"headers": {"Authorization": value}}
            apart.driver.execute_cdp_cmd("Network.setExtraHTTPHeaders", headers)

        sign_in("reader")
        for path in ("", "public", "public/a?versions"):
            apart.open(program.url + path)
            assert apart.texts("header span") == ["Signed in as reader"] and offered() == set()
        sign_in("writer")
        apart.open(program.url)
        assert offered() == {"form", "Delete"}
        assert not apart.row("once").find_element(By.CSS_SELECTOR, "[name=delete]").is_displayed()
        assert apart.row("public").find_element(By.CSS_SELECTOR, "[name=delete]").is_displayed()
        apart.open(program.url + "public")
        assert offered() == {"form", "Delete"}
        apart.open(program.url + "public/a?versions")
        assert offered() == {"Delete", "Restore"}
        apart.open(program.url + "once")
        assert offered() == {"form"} and not apart.find("#upload").is_displayed()
        apart.open(program.url + "once/a?versions")
        assert offered() == set() and apart.names()


def test_signing_in_once_reveals_everything(apart: Browser, tmp_path: Path) -> None:
    """Chromium's own dialog cannot be driven here: the credentials stand in the URL that it would ask for."""
    with running(tmp_path / "data", "--config", tokens(tmp_path)) as program:
        basic = {"Authorization": "Basic " + base64.b64encode(b":writer").decode()}
        program.request("PUT", "public/a", b"a", **basic)
        program.request("PUT", "private/a", b"a", **basic)
        apart.open(program.url + "public")
        form = apart.run("return document.querySelector('[name=login]').form.action")
        assert form == program.url
        connection = http.client.HTTPConnection(program.address, timeout=10)
        with contextlib.closing(connection):
            connection.request("GET", "/artefacts/?login=")
            answer = connection.getresponse()
            assert answer.status == 401 and (answer.getheader("WWW-Authenticate") or "").startswith("Basic")
        apart.open(program.url.replace("//", "//:reader@") + "?login=")
        apart.until(lambda: apart.names() == ["private", "public"])
        apart.open(program.url + "private/")  # below the root, without credentials in the URL
        assert apart.names() == ["a"]


@pytest.mark.parametrize(
    ("path", "status", "back"),
    [
        ("public/nothing", "404 Not Found", "public/"),
        ("public/no/thing", "404 Not Found", "public/no/"),
        ("public?format=x", "400 Bad Request", ""),
    ],
)
def test_a_failed_navigation_shows_a_page(
    without_script: Browser, tmp_path: Path, path: str, status: str, back: str
) -> None:
    browser = without_script
    with running(tmp_path / "data", "--config", tokens(tmp_path)) as program:
        basic = {"Authorization": "Basic " + base64.b64encode(b":writer").decode()}
        program.request("PUT", "public/a", b"a", **basic)
        browser.open(program.url + path)
        assert browser.texts("h1") == [f"Artefacts / {status}"]
        with pytest.raises(HTTPError) as refused:
            urlopen(program.url + path)
        with refused.value as answer:
            assert browser.texts("main p")[0] == json.load(answer)["detail"]
        assert browser.find("main a").get_property("href") == program.url + back
        browser.open(program.url)
        browser.driver.find_element(By.LINK_TEXT, "public").click()
        assert browser.names() == ["a"]


def test_a_missing_token_shows_a_page(apart: Browser, tmp_path: Path) -> None:
    """Headless Chromium waits for ever at its dialog. Another server shows what a cancelled dialog shows."""
    with running(tmp_path / "data", "--config", tokens(tmp_path)) as program:
        for path in ("private", "nothing"):
            request = Request(program.url + path, headers={"Upgrade-Insecure-Requests": "1"})
            with pytest.raises(HTTPError) as refused:
                urlopen(request)
            with refused.value as answer:
                assert answer.headers["WWW-Authenticate"] and answer.status == 401
                page = answer.read().decode()
            with elsewhere(page, "text/html; charset=utf-8") as (url, _):
                apart.open(url)
                assert apart.texts("h1 bdi") == ["401 Unauthorized"]
                assert apart.texts("main p") == [program.detail("GET", path), "Sign in", "Back"]
                sign_in, back = apart.driver.find_elements(By.CSS_SELECTOR, "main a")
                assert back.get_dom_attribute("href") == "/artefacts/"
                assert sign_in.get_property("href") == apart.driver.current_url


def test_a_refused_right_shows_a_page(apart: Browser, tmp_path: Path) -> None:
    text = Path(tokens(tmp_path)).read_text().replace('read = ["*"]', 'read = ["public"]', 1)
    (tmp_path / "artefacts.toml").write_text(text)
    with running(tmp_path / "data", "--config", str(tmp_path / "artefacts.toml")) as program:
        apart.open(program.url.replace("//", "//:reader@") + "private")
        assert apart.texts("h1 bdi") == ["403 Forbidden"] and apart.names() == []
        apart.find("main a").click()
        apart.until(lambda: apart.texts("h1") == ["Artefacts"])


def test_an_unavailable_repository_shows_a_page(apart: Browser, tmp_path: Path) -> None:
    with running(tmp_path / "data") as program:
        program.put("a/b")
        (tmp_path / "data").rename(tmp_path / "moved")
        for path, back in ("", ""), ("a", ""), ("a/b", "a/"):
            apart.open(program.url + path)
            assert apart.texts("h1") == ["Artefacts / 503 Service Unavailable"]
            assert apart.texts("main p")[0] == program.detail("GET", path)
            assert apart.find("main a").get_property("href") == program.url + back
        (tmp_path / "moved").rename(tmp_path / "data")
        apart.open(program.url + "a")
        assert apart.names() == ["b"]


# == Folders, several artefacts, downloads ========================================================


def tree(folder: Path) -> Path:
    """Make a folder with files, a nested folder and dot files."""
    for name in ("one.txt", "sub/two.txt", ".hidden", ".git/config", "sub/.cache"):
        (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "tree" / name).write_text(name)
    return folder / "tree"


SKIPPED = "2 stored, 0 not, 0 to go. 3 skipped: their names, or their folders' names, begin with a dot."


def test_a_chosen_folder_keeps_its_paths(
    browser: Browser, program: Program, directory: str, tmp_path: Path
) -> None:
    program.put(f"{directory}/there")
    browser.open(program.url + directory)
    browser.find("#into").send_keys("1.4.0")
    browser.find("#tree").send_keys(str(tree(tmp_path)))
    wanted = ["1.4.0/tree/one.txt", "1.4.0/tree/sub/two.txt", "there"]
    browser.until(lambda: browser.names() == wanted)
    assert browser.status() == SKIPPED and program.get(f"{directory}/{wanted[1]}") == b"sub/two.txt"


def test_a_dropped_folder_keeps_its_paths(
    browser: Browser, program: Program, directory: str, tmp_path: Path
) -> None:
    program.put(f"{directory}/there")
    browser.open(program.url + directory)
    data = {"items": [], "files": [str(tree(tmp_path))], "dragOperationsMask": 1}
    for type in ("dragEnter", "dragOver", "drop"):
        event = {"type": type, "x": 200, "y": 100, "data": data}
        browser.driver.execute_cdp_cmd("Input.dispatchDragEvent", event)
    browser.until(lambda: browser.names() == ["there", "tree/one.txt", "tree/sub/two.txt"])
    assert browser.status() == SKIPPED


def test_a_folder_has_a_page(
    browser: Browser, program: Program, directory: str, tmp_path: Path
) -> None:
    inside = ["linux/app", "notes #1?.txt"]
    for name in (*(f"1.4 #0/{name}" for name in inside), "other"):
        program.put(f"{directory}/{name}")
    (tmp_path / "new").write_text("new")
    browser.open(f"{program.url}{directory}/{quote('1.4 #0')}")
    assert browser.driver.current_url == f"{program.url}{directory}/{quote('1.4 #0')}/"
    assert browser.texts("h1") == [f"Artefacts / {directory} / 1.4 #0"] and browser.names() == inside
    parents = browser.run("return [...document.querySelectorAll('h1 a')].map(link => link.href)")
    assert parents == [program.url, f"{program.url}{directory}/"]
    browser.find("#into").send_keys("sub")
    browser.find("#files").send_keys(str(tmp_path / "new"))
    browser.until(lambda: browser.names() == [*inside, "sub/new"])
    assert program.get(f"{directory}/1.4 #0/sub/new") == b"new"
    browser.run("arguments[0].scrollIntoView({block: 'center'})", browser.row("sub/new"))
    browser.confirm("Delete", "sub/new")
    browser.until(lambda: "Undo" in browser.texts("button"))
    browser.press("Show deleted")
    browser.until(lambda: browser.names() == ["sub/new"])
    assert browser.texts("h1") == [f"Artefacts / {directory} / 1.4 #0 / deleted"]
    browser.confirm("Restore", "sub/new")
    browser.until(lambda: browser.names() == [])
    browser.driver.find_element(By.LINK_TEXT, "1.4 #0").click()
    browser.until(lambda: browser.names() == [*inside, "sub/new"])
    browser.press("Versions", browser.row("notes #1?.txt"))
    browser.until(lambda: browser.texts("h1 bdi")[-1] == "1.4 #0/notes #1?.txt")
    browser.driver.back()
    browser.until(lambda: browser.names() == [*inside, "sub/new"])
    browser.driver.find_element(By.LINK_TEXT, directory).click()
    browser.until(lambda: len(browser.names()) == 4)


def test_it_asks_once_for_many_files_in_a_dialog_that_fits_the_screen(
    browser: Browser, program: Program, directory: str
) -> None:
    for number in range(200):
        program.put(f"{directory}/{'long-name-' * 12}{number:03}", b"old")
    phone = {"width": 390, "height": 640, "deviceScaleFactor": 1, "mobile": True}
    browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    try:
        browser.open(program.url + directory)
        browser.drop(*((f"{'long-name-' * 12}{number:03}", "new") for number in range(240)))
        browser.until(lambda: browser.find("dialog").is_displayed(), 30)
        assert browser.question().startswith("Replace 200 of 240 files? \u2068long-name-")
        assert browser.question().endswith(" …") and browser.question().count("long-name-") == 12 * 10
        box = browser.run("return document.querySelector('dialog').getBoundingClientRect().toJSON()")
        assert box["x"] >= 0 and box["y"] >= 0 and box["right"] <= 390 and box["bottom"] <= 640
        assert browser.texts("#total span")[0].startswith("40 of 240 files, ")
        browser.answer("Replace")
        browser.until(lambda: browser.status() == "240 stored, 0 not, 0 to go.", 30)
    finally:
        browser.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert program.get(f"{directory}/{'long-name-' * 12}000") == b"new"


def test_the_shown_artefacts_are_deleted_and_brought_back(
    browser: Browser, program: Program, directory: str
) -> None:
    for number in range(12):
        program.put(f"{directory}/build-{number}.txt", b"%d" % number)
    browser.open(program.url + directory)
    assert "Delete the" not in "".join(browser.texts("button"))
    browser.type("#search", "build-1")
    browser.press("Delete the 3 shown")
    names = ", ".join(f"\u2068build-{number}.txt\u2069" for number in (1, 10, 11))
    assert browser.question() == f"Delete the 3 shown? {names}"
    browser.answer("Cancel")
    assert len(program.listing(directory)) == 12
    browser.press("Delete the 3 shown")
    browser.question()
    browser.answer("Delete")
    browser.until(lambda: browser.status() == "3 are deleted. Their versions are kept.")
    assert len(program.listing(directory)) == 9 and browser.texts("output") == ["0 of 9"]
    assert browser.driver.switch_to.active_element.text == "Undo"
    browser.press("Undo")
    browser.until(lambda: browser.status() == "3 are restored.")
    assert len(program.listing(directory)) == 12 and browser.texts("output") == ["3 of 12"]
    assert "Undo" not in browser.texts("button")


def test_undo_replaces_nothing_that_was_pushed_since(
    browser: Browser, program: Program, directory: str
) -> None:
    program.put(f"{directory}/a", b"old")
    browser.open(program.url + directory)
    browser.confirm("Delete", "a")
    browser.until(lambda: "Undo" in browser.texts("button"))
    program.put(f"{directory}/a", b"newer")
    browser.press("Undo")
    changed = program.detail("PUT", f"{directory}/a", **{"If-None-Match": "*"})
    browser.until(lambda: browser.status() == changed)
    assert program.get(f"{directory}/a") == b"newer"


def test_deleted_artefacts_are_shown_and_restored(
    browser: Browser, program: Program, directory: str
) -> None:
    for name in ("a", "b", "c/d"):
        program.put(f"{directory}/{name}", name.encode())
        if name != "a":
            assert program.request("DELETE", f"{directory}/{name}")[0] == 204
    browser.open(program.url + directory)
    browser.press("Show deleted")
    browser.until(lambda: browser.names() == ["b", "c/d"])
    browser.press("Restore", browser.row("c/d"))
    assert browser.question() == "Restore \u2068c/d\u2069?"
    browser.answer("Restore")
    browser.until(lambda: browser.names() == ["b"])
    assert browser.status() == "\u2068c/d\u2069 is restored."
    assert program.get(f"{directory}/c/d") == b"c/d"
    browser.driver.find_element(By.LINK_TEXT, directory).click()
    browser.until(lambda: browser.names() == ["a", "c/d"])


def test_everything_is_downloaded_without_script(
    without_script: Browser, program: Program, directory: str
) -> None:
    browser = without_script
    for name in ("a", "b/c"):
        program.put(f"{directory}/{name}")
    digest = hashlib.sha256(b"content").hexdigest()
    for slash in ("", "/"):
        browser.open(program.url + directory + slash)
        assert browser.texts(".bar form button")[:3] == ["zip", "tar", "checksums"]
        browser.press("checksums")
        browser.until(lambda: browser.find("body").text.split() == [digest, "a", digest, "b/c"])
        browser.driver.back()
        urls = browser.run("""return [...document.querySelectorAll("[name=format]")].map(
            ({form, value}) => `${form.action}?format=${value}`)""")
        kinds = []
        for url in urls:
            with urlopen(url) as answer:
                kinds.append(answer.headers["Content-Type"])
        assert kinds == ["application/zip", "application/x-tar", "text/plain; charset=utf-8"]


def test_directories_show_when_they_changed(browser: Browser, program: Program, directory: str) -> None:
    program.put(f"{directory}/a")
    program.put(f"{directory}2/a")
    os.utime(program.data / f"{directory}2", (0, time.time() - 3 * 86400 - 60))
    browser.open(program.url)

    def changed(name: str) -> str:
        return browser.row(name).find_element(By.TAG_NAME, "time").text

    assert changed(directory) == "just now" and changed(f"{directory}2") == "3 days ago"
    search = browser.find("#search")
    assert search.accessible_name == "Filter directories"
    search.send_keys(f"{directory}2")
    assert browser.names() == [f"{directory}2"]
    browser.type("#search", "")
    browser.press("Changed", browser.find("thead"))
    assert browser.names().index(directory) < browser.names().index(f"{directory}2")


# == Accessibility ================================================================================


def test_a_skip_link_and_a_key_lead_past_the_form(
    browser: Browser, program: Program, directory: str
) -> None:
    program.put(f"{directory}/a")
    browser.open(program.url + directory)
    browser.keys(Keys.TAB)
    assert browser.driver.switch_to.active_element.text == "Skip to the list"
    browser.keys(Keys.ENTER)
    browser.keys("/")
    assert browser.driver.switch_to.active_element.accessible_name == "Filter"
    browser.keys("/")
    assert browser.find("#search").get_property("value") == "/"
    browser.type("#search", "")
    browser.confirm("Delete", "a")
    browser.until(lambda: "is deleted" in browser.status())
    assert browser.driver.switch_to.active_element.text == "Undo"


def test_the_buttons_are_named_after_their_rows(browser: Browser, program: Program, directory: str) -> None:
    program.put(f"{directory}/a.txt")
    browser.open(program.url + directory)
    names = [button.accessible_name for button in browser.find("tbody").find_elements(By.TAG_NAME, "button")]
    digest = hashlib.sha256(b"content").hexdigest()[:12]
    texts = (digest, "Versions", "Link", "curl", "Delete")
    assert names == [f"{text} a.txt" for text in texts]


def test_the_form_is_folded_on_a_phone(browser: Browser, program: Program) -> None:
    program.put("folded/a")
    phone = {"width": 390, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    try:
        browser.open(program.url + "folded")
        assert not browser.find("#upload").is_displayed()
        assert browser.run("return document.querySelector('tbody tr').getBoundingClientRect().y") < 300
        browser.find("summary").click()
        assert browser.find("#upload").is_displayed()
    finally:
        browser.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.until(lambda: browser.find("#upload").is_displayed())
    assert not browser.find("summary").is_displayed()


def test_the_listing_is_printed_without_controls(browser: Browser, program: Program, directory: str) -> None:
    program.put(f"{directory}/a")
    browser.open(program.url + directory)
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        assert browser.texts("form, input, td:last-child, footer") == []
        digest = hashlib.sha256(b"content").hexdigest()[:12]
        assert browser.texts("tbody td") == ["a", "7 B", "just now", digest]
        assert browser.texts("h1, tbody a") == [f"Artefacts / {directory}", "a"]
    finally:
        browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


AUDIT = """const done = arguments[0];
axe.run(document).then(({violations}) => done(violations.map(({id, nodes}) => [id, nodes[0].html])));"""


@pytest.mark.skipif("AXE_CORE" not in os.environ, reason="AXE_CORE is not the path of axe.min.js")
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_violation_in_any_state(
    browser: Browser, program: Program, directory: str, scheme: str, width: int
) -> None:
    for number in range(30):
        program.put(f"{directory}/build-{number}.txt", b"%d" % number)
    program.put(f"{directory}/build-0.txt", b"new")
    program.request("DELETE", f"{directory}/build-1.txt")
    command = browser.driver.execute_cdp_cmd
    command("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    screen = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    command("Emulation.setDeviceMetricsOverride", screen)

    def audit() -> None:
        browser.run(Path(os.environ["AXE_CORE"]).read_text())
        assert browser.driver.execute_async_script(AUDIT) == []
        assert browser.run("return document.documentElement.scrollWidth <= innerWidth")

    try:
        for path in ("", "?deleted", "?limit=5", "/build-0.txt?versions", "/nothing", "?format=x"):
            browser.open(program.url + directory + path)
            audit()
        browser.open(program.url)
        audit()
        browser.open(program.url + directory)
        if width < 500:
            browser.find("summary").click()
        browser.type("#search", "build-2")
        browser.drop(("build-2.txt", "text"), ("new.txt", "text"), ("build-3.txt/", "text"))
        browser.question()
        audit()
        browser.answer("Cancel")
        browser.until(lambda: "stayed as before" in browser.status())
        audit()
        browser.run("arguments[0].scrollIntoView({block: 'center'})", browser.find("thead"))
        browser.press("Name", browser.find("thead"))
        browser.run("arguments[0].scrollIntoView({block: 'center'})", browser.row("build-2.txt"))
        browser.confirm("Delete", "build-2.txt")
        browser.until(lambda: "Undo" in browser.texts("button"))
        audit()
        browser.run("document.querySelector('tbody a').focus(); document.querySelector('.skip').focus()")
        audit()
    finally:
        command("Emulation.clearDeviceMetricsOverride", {})
        command("Emulation.setEmulatedMedia", {"features": []})
