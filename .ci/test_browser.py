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
from urllib.parse import quote, urlsplit
from urllib.request import Request, urlopen

import pytest
from selenium import webdriver
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
        """Set the speed of each connection. `bytes_per_second` can be changed later."""
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
                while piece := request.recv(8192):
                    onward.sendall(piece)
                    time.sleep(len(piece) / self.bytes_per_second)
                onward.shutdown(socket.SHUT_RDWR)

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
        return WebDriverWait(self.driver, seconds, 0.02).until(lambda _: condition())

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
        next(button for button in buttons if button.is_displayed() and button.text == text).click()

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
    assert href == f"{directory}/a.bin#sha256={hashlib.sha256(body).hexdigest()}"


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


def test_a_thousand_files_are_uploaded(browser: Browser, program: Program, directory: str) -> None:
    program.put(f"{directory}/there")
    browser.open(program.url + directory)
    browser.run("""const {send} = XMLHttpRequest.prototype;
        let under_way = window.most = 0;
        XMLHttpRequest.prototype.send = function (body) {
            window.most = Math.max(most, ++under_way);
            this.addEventListener("loadend", () => under_way--);
            send.call(this, body);
        };""")
    browser.drop(*((f"{number}", "x") for number in range(1000)))
    browser.until(lambda: browser.run("return most"))
    assert browser.run("return most") < 10  # of more than a thousand, the browser drops some
    stored = program.data / directory  # looked into, for each look at the page has it laid out anew
    browser.until(lambda: len(list(stored.iterdir())) == 1001, 120)
    browser.until(lambda: browser.texts("output") == ["1001 of 1001"])
    assert browser.status() == "1000 stored, 0 not, 0 to go."
    assert len(program.listing(directory)) == 1001


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
    bars = browser.run("return [...document.querySelectorAll('progress')].map(bar => bar.value)")
    assert all(0 < bar < 1 for bar in bars[:3]) and bars[3:] == [0, 0]
    browser.until(lambda: browser.run("return document.querySelector('progress').value") > bars[0])
    assert browser.find("progress").accessible_name == "0.bin"
    bar = "return document.querySelector('#uploads li:not([class]) progress').value"
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
    assert browser.question() == "Replace \u2068old <1>\u2069?"
    browser.answer("Cancel")
    browser.until(lambda: browser.names() == ["old <1>", "other"])
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


def test_the_newest_come_first_where_one_wants(browser: Browser, program: Program, directory: str) -> None:
    for name in ("b", "c", "a"):
        program.put(f"{directory}/{name}")
    browser.open(program.url + directory)
    browser.find("#newest").click()
    browser.until(lambda: browser.names() == ["a", "c", "b"])
    browser.find("#newest").click()
    browser.until(lambda: browser.names() == ["a", "b", "c"])


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
    ("query", "control"), [("", "Newest first"), ("", "Delete"), ("/a?versions", "Restore")]
)
def test_it_says_that_the_server_is_away(
    started: Browser, program: Program, directory: str, query: str, control: str
) -> None:
    """First a proxy answers with an error and HTML, then nothing answers."""
    for body in (b"one", b"two"):
        program.put(f"{directory}/a", body)
    request = Request(f"{program.url}{quote(directory)}{query}", headers={"Accept": "text/html"})
    with urlopen(request) as answer:
        page = answer.read().decode()

    def attempt() -> None:
        if control == "Newest first":
            started.find("#newest").click()
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
    browser.open(program.url + directory)
    assert program.request("DELETE", directory)[0] == 204
    browser.find("#newest").click()
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
    browser.driver.back()
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
    browser.find("#newest").click()
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

    for name in ("Folder", "Files", "Upload", "Filter", "Newest first", "a", digest[:12], "Link"):
        tab_to(name)
    browser.keys(Keys.ENTER)
    browser.until(lambda: browser.status() == "Link copied.")
    assert focused() == "Link"
    tab_to("Delete")
    browser.keys(Keys.ENTER)
    browser.question()
    assert focused() == "Cancel"
    browser.keys(Keys.ESCAPE)
    browser.until(lambda: not browser.find("dialog").is_displayed())
    assert focused() == "Delete" and program.get(f"{directory}/a") == b"content"


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
