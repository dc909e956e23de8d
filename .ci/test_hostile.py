"""Check which files the program opens under hostile requests and planted links (strace).

Check also that it works behind the README's reverse proxies (nginx, Caddy, Apache), with TLS (openssl, curl).
"""

from __future__ import annotations

import contextlib
import html
import itertools
import json
import os
import random
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, urldefrag, urljoin

import pytest
from readme import block

from test_artefacts import (
    CHUNKED,
    CI,
    LITERAL,
    MULTIPART,
    PROGRAM,
    QUERIES,
    READER,
    SECRET,
    TARGETS,
    TOKENS,
    V1,
    Program,
    ask,
    eventually,
    fill,
    form_of,
    head,
    put,
    sha256,
    state_of,
    write_secrets,
)

# == Opened files =================================================================================

CALL = re.compile(r"(\w+)\((.*)\) += (-?\d+)(?:<(.*)>)?.*")
NAMED = re.compile(r'(?:\d+|AT_FDCWD)<([^>]*)>(?:\(deleted\))?, (?:"((?:[^"\\]|\\.)*)"|NULL)')
LOOKING = {"newfstatat", "statx", "faccessat", "faccessat2", "readlinkat"}
CHANGING = {"mkdirat", "unlinkat", "renameat", "renameat2", "linkat", "utimensat"}
# The interpreter imports some modules late and searches its path for them. The C library checks whether the
# time zone has changed, and reads the kernel's overcommit setting.
FOLDERS = (sys.prefix, sys.base_prefix, PROGRAM.parent, "/etc/localtime", "/proc/sys/vm/overcommit_memory")
SYSTEM_PATHS = tuple({f"{os.path.abspath(folder)}/" for folder in FOLDERS})


@contextlib.contextmanager
def traced(program: Program, folder: Path) -> Iterator[None]:
    """Write the system calls that name files to one file per thread, until the program ends.

    The delays widen the gap between a check and the use of the checked name.
    """
    options = "-ff -y -q -s 5000 -e trace=%file -e inject=openat,renameat,linkat,utimensat:delay_enter=100"
    command = ["strace", *options.split(" "), "-o", str(folder / "calls"), "-p", str(program.process.pid)]
    folder.mkdir()
    with subprocess.Popen(command, stderr=subprocess.PIPE) as strace:
        threads = list(Path(f"/proc/{program.process.pid}/task").glob("*/status"))
        eventually(lambda: not any("TracerPid:\t0" in thread.read_text() for thread in threads))
        yield
        assert program.stop() == 0
        strace.communicate(timeout=20)


def leaves_data(line: str, data: str) -> bool:
    """Return whether a call reached something outside `data`, or could have through a link."""
    match = CALL.fullmatch(line)
    if match is None:
        return not line.startswith(("---", "+++"))
    name, arguments, result, opened = match.groups()
    named: list[tuple[str, str]] = NAMED.findall(arguments)
    if named and all(f"{path}/".startswith(SYSTEM_PATHS) for _, path in named):
        return name not in LOOKING and "O_RDONLY" not in arguments
    if name in ("mkdir", "statfs"):  # the data directory or a folder of the repository; mkdir follows no link
        return re.match(rf'"{re.escape(data[:-1])}(/\.\w+)?"', arguments) is None
    if name in LOOKING and "AT_EMPTY_PATH" in arguments:  # an open file
        return False
    # Allowed: the data directory by its path, a name in it, or a name in an open folder below it.
    named = [(data, f"{path}/".removeprefix(data)[:-1]) if path[:1] == "/" else (folder, path)
             for folder, path in named]  # fmt: skip
    within = [f"{folder}/".startswith(data) and "/" not in path and path != ".." for folder, path in named]
    if not within or not all(within):
        return True
    if name == "openat":
        return "O_NOFOLLOW" not in arguments or (int(result) >= 0 and not f"{opened}/".startswith(data))
    if name in LOOKING or name == "utimensat":  # an empty name means the folder itself
        return bool(named[0][1]) and "AT_SYMLINK_NOFOLLOW" not in arguments
    return name not in CHANGING or "AT_SYMLINK_FOLLOW" in arguments


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Program]:
    """Run the program under strace. Assert that it opened and changed nothing outside its data."""
    data, outside, trace = tmp_path / "data", tmp_path / "outside", tmp_path / "trace"
    write_secrets(outside)
    before = state_of(outside)
    program = Program(fill(data, "app"), "--no-fsync", "--keep-versions=5")
    try:
        with traced(program, trace):
            yield program
            assert program.get("/artefacts/app/x").status == 200
    finally:
        program.process.kill()
        program.process.wait()
    calls = [line for file in trace.iterdir() for line in file.read_text().splitlines()]
    assert sum(line.startswith("openat") and f"<{data}/" in line for line in calls) > 100
    assert [line for line in calls if leaves_data(line, f"{data}/")] == []
    assert state_of(outside) == before
    assert set(os.listdir(tmp_path)) == {"data", "outside", "trace", program.log.name}


def test_no_path_leads_outside_the_data_directory(served: Program) -> None:
    for target in TARGETS:
        for method in ("GET", "PUT", "DELETE", "POST"):
            answer = ask(served, f"{method} {target}", MULTIPART, body=form_of(("n", b"1")))
            assert 400 <= answer.status < 500, (method, target)
    for line in itertools.chain.from_iterable(QUERIES.values()):
        ask(served, f"GET /artefacts/{line}")
    for odd in LITERAL:
        assert ask(served, f"PUT /artefacts/{odd}/{odd}", body=bytes(300_000)).status == 201
        assert ask(served, f"DELETE /artefacts/{odd}").status == 204


def requests(directory: str) -> list[bytes]:
    """Return every kind of request for a directory that has x, d/x and a version of each."""
    base, form = f"/artefacts/{directory}", form_of(("x", SECRET[::-1]))
    queries = ("", "?versions", f"?version={V1}", "?at=2024-01-01", "?format=tar", "?format=sha256sums")
    found = [put(base + path + query, b"", method="GET") for path in ("", "/x", "/d/x") for query in queries]
    for path in ("/x/secret", "/secret", "/d"):
        found += [put(base + path, bytes(300_000), method=method) for method in ("GET", "PUT", "DELETE")]
    for path in ("/x", "/d/x"):
        found += [put(base + path, body) for body in (b"1", bytes(300_000))]
        found += [put(f"{base}{path}?restore={V1}", b"", method="POST")]
        for query in ("", f"?version={V1}", "?versions"):
            found += [put(base + path + query, b"", method="DELETE")]
    return [*found, put(base, form, MULTIPART, method="POST"), put(base, b"", method="DELETE")]


def ask_all(program: Program, requests: list[bytes], *, swapping: bool = False) -> Iterator[int]:
    """Yield the status of each request. Assert that no response reveals SECRET.

    While the directory is being swapped for a link, an archive may break off after its first byte.
    """
    for request in requests:
        if swapping and b"?format=tar" in request:
            status, body = ask_for_archive(program, request)
        else:
            answer = program.ask(request)
            status, body = answer.status, answer.body
        assert SECRET not in body and sha256(SECRET).encode() not in body, request[:80]
        yield status


def ask_for_archive(program: Program, request: bytes) -> tuple[int, bytes]:
    """Return the status and all bytes of a response, which is complete if it is not chunked."""
    with program.connect() as connection:
        connection.send(request.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
        header, _, body = connection.file.read().partition(b"\r\n\r\n")
    assert re.match(rb"HTTP/1\.1 [1-5][0-9]{2} ", header), header
    length = re.search(rb"\r\ncontent-length: ([0-9]+)", header, re.I)
    assert length is None or len(body) == int(length[1])
    assert length is not None or b"\r\ntransfer-encoding: chunked" in header.lower()
    return int(header[9:12]), body


LINKS = [  # a link (@: the directory of the case), and its target outside the data
    ("@", "folder"), ("@/x", "secret"), ("@/x", "folder"), ("@/x", "nothing"), ("@/d", "folder"),
    ("@/.versions", "folder"), ("@/.versions/x", "folder"), (f"@/.versions/x/{V1}", "secret"),
    (".locks/@", "secret"), (".locks/@", "nothing"), (".incoming/0-1-0", "secret"),
    (".trash/0-1-0", "folder"), (".incoming", "folder"), (".trash", "folder"), (".locks", "folder"),
]  # fmt: skip


def test_no_planted_link_leads_outside(served: Program, tmp_path: Path) -> None:
    """Plant links in the data: they may spoil the directory, but must not lead outside."""
    for number, (name, target) in enumerate(LINKS):
        directory = f"planted-{number}"
        link, aside = served.data / name.replace("@", directory), served.data / f".aside-{number}"
        fill(served.data, directory, f"{directory}/d")
        if link.exists():
            link.rename(aside)
        link.symlink_to(tmp_path / "outside" / target)
        assert max(ask_all(served, requests(directory))) < 500
        if link.is_symlink():
            link.unlink()
        if aside.exists() and "@" not in name:
            aside.rename(link)
        assert ask(served, "PUT /artefacts/afterwards/x", body=bytes(300_000)).status in (200, 201)


PLACES = [
    "@", "@/d", "@/x", "@/.versions", "@/.versions/x", f"@/.versions/x/{V1}", ".locks", ".locks/@",
    ".incoming", ".trash",
]  # fmt: skip


def swap(place: Path, target: Path, aside: Path, done: threading.Event) -> None:
    """Replace a file or folder by a link and back, again and again."""
    while not done.wait(0.001):
        with contextlib.suppress(OSError):  # the requests change it too
            place.rename(aside)
            place.symlink_to(target)
            done.wait(0.001)
        with contextlib.suppress(OSError):
            if place.is_symlink():
                place.unlink()
            aside.rename(place)
        shutil.rmtree(aside, ignore_errors=True)


def swap_in_trash(trash: Path, target: Path, aside: Path, done: threading.Event) -> None:
    """Replace folders in the trash by links while they are being removed."""
    aside.mkdir()
    numbers = itertools.count()
    while not done.wait(0.0001):
        with contextlib.suppress(OSError, IndexError):  # already removed
            for removed in trash.iterdir():
                folder = random.choice([folder for folder in removed.iterdir() if not folder.is_symlink()])
                folder.rename(aside / str(next(numbers)))
                folder.symlink_to(target)


def run_while_swapping(swapping: Callable[[threading.Event], None], work: Callable[[int], None]) -> None:
    """Run the work in two threads while another thread swaps. Raise the error of any of them."""
    done = threading.Event()
    with ThreadPoolExecutor(3) as threads:
        swapped = threads.submit(swapping, done)
        try:
            for finished in [threads.submit(work, number) for number in range(2)]:
                finished.result()
        finally:
            done.set()
        swapped.result()


def test_no_link_swapped_during_requests_leads_outside(served: Program, tmp_path: Path) -> None:
    for number, name in enumerate(PLACES):
        directory = f"swapped-{number}"
        place, aside = served.data / name.replace("@", directory), served.data / f".aside-{number}"
        target = tmp_path / "outside" / ("secret" if name[-1] in "xZ" or name == ".locks/@" else "folder")

        def work(client: int, directory: str = directory) -> None:
            assert set(ask_all(served, requests(directory)[client:], swapping=True))

        fill(served.data, directory, f"{directory}/d")
        run_while_swapping(lambda done: swap(place, target, aside, done), work)  # noqa: B023


def test_no_link_swapped_during_a_removal_leads_outside(served: Program, tmp_path: Path) -> None:
    def work(client: int) -> None:
        for number in range(5):
            directory = f"removed-{client}-{number}"
            fill(served.data, *(f"{directory}/{folder}" for folder in range(50)))
            ask(served, f"DELETE /artefacts/{directory}")

    folders = served.data / ".trash", tmp_path / "outside/folder", served.data / ".aside"
    run_while_swapping(lambda done: swap_in_trash(*folders, done), work)


# == Behind a proxy ===============================================================================

# What surrounds each configuration of the README.
NGINX_FRAME = """\
user root;
daemon off;
pid {folder}/pid;
error_log {folder}/error.log;
events {{}}
http {{
    access_log off;
    gzip on;
    gzip_types *;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    {server}
}}
"""
CADDY_FRAME = "{{\n    admin off\n    auto_https disable_redirects\n}}\n{server}"
APACHE_FRAME = """\
ServerRoot {folder}
PidFile {folder}/pid
ErrorLog {folder}/error.log
Listen 127.0.0.1:{port}
User nobody
Group nogroup
LoadModule mpm_event_module /usr/lib/apache2/modules/mod_mpm_event.so
LoadModule authz_core_module /usr/lib/apache2/modules/mod_authz_core.so
LoadModule env_module /usr/lib/apache2/modules/mod_env.so
LoadModule filter_module /usr/lib/apache2/modules/mod_filter.so
LoadModule deflate_module /usr/lib/apache2/modules/mod_deflate.so
SetOutputFilter DEFLATE
LoadModule reqtimeout_module /usr/lib/apache2/modules/mod_reqtimeout.so
LoadModule ssl_module /usr/lib/apache2/modules/mod_ssl.so
LoadModule proxy_module /usr/lib/apache2/modules/mod_proxy.so
LoadModule proxy_http_module /usr/lib/apache2/modules/mod_proxy_http.so
{server}
"""
PROXIES = {  # the beginning of the README's block, its frame, and the command
    "nginx": ("server {", NGINX_FRAME, "nginx -e {folder}/error.log -c {folder}/config"),
    "caddy": ("artefacts.example {", CADDY_FRAME, "caddy run --adapter caddyfile --config {folder}/config"),
    "apache": ("<VirtualHost", APACHE_FRAME, "apache2 -f {folder}/config -DFOREGROUND"),
}


class Proxy(NamedTuple):
    """A running proxy in front of the program, with curl as its client."""

    name: str
    program: Program
    port: int
    folder: Path

    @property
    def origin(self) -> str:
        return f"https://artefacts.example:{self.port}"

    def curl(self, *arguments: str, input: bytes = b"") -> tuple[int, bytes]:
        """Run curl and return the status and the body. `@/` in an argument stands for the origin."""
        command = ["curl", "-sS", "-m", "60", "--cacert", "certificate", "-w", "%{stderr}%{http_code}"]
        command += ["--resolve", f"*:{self.port}:127.0.0.1"]
        command += [argument.replace("@/", f"{self.origin}/") for argument in arguments]
        done = subprocess.run(command, input=input, capture_output=True, cwd=self.folder, timeout=90)
        assert done.returncode == 0, done
        return int(done.stderr), done.stdout

    def connect(self) -> ssl.SSLSocket:
        context = ssl.create_default_context(cafile=str(self.folder / "certificate"))
        plain = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        return context.wrap_socket(plain, server_hostname="artefacts.example")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


@pytest.fixture(scope="module", params=PROXIES)
def proxy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    folder, port = tmp_path_factory.mktemp(request.param), free_port()
    config, certificate, key = folder / "config", folder / "certificate", folder / "key"
    subprocess.run([
        "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
        "-subj", "/CN=artefacts.example", "-addext", "subjectAltName=DNS:artefacts.example",
        "-keyout", key, "-out", certificate,
    ], check=True, capture_output=True)  # fmt: skip
    (folder / "tokens.toml").write_text(TOKENS)
    data, options = fill(folder / "data", "public", "app-1"), f"--no-fsync --config={folder}/tokens.toml"
    logged = "artefacts: '.*' has versions: keep_versions = 0 makes a push erase them"
    with Program(data, *options.split(" "), logged=logged) as program, contextlib.ExitStack() as stack:
        start, frame, command = PROXIES[request.param]
        server = block(start)
        for name, other in (
            ("listen 443", f"listen 127.0.0.1:{port}"), ("*:443", f"127.0.0.1:{port}"),
            ("127.0.0.1:8080", f"127.0.0.1:{program.port}"),
            ("example {", f"example:{port} {{\n    bind 127.0.0.1"),
            ("/etc/ssl/artefacts.example.pem", str(certificate)),
            ("/etc/ssl/artefacts.example.key", str(key)),
        ):  # fmt: skip
            server = server.replace(name, other)
        config.write_text(frame.format(folder=folder, port=port, server=server))
        arguments = command.format(folder=folder).split()
        log = stack.enter_context((folder / "log").open("wb"))
        environment = os.environ | {"XDG_DATA_HOME": str(folder), "XDG_CONFIG_HOME": str(folder)}
        process = stack.enter_context(subprocess.Popen(arguments, stdout=log, stderr=log, env=environment))
        stack.callback(process.terminate)
        running = Proxy(request.param, program, port, folder)

        def listening() -> bool:
            assert process.poll() is None, (folder / "log").read_text()
            with socket.socket() as client:
                return client.connect_ex(("127.0.0.1", port)) == 0

        eventually(listening, 30)
        yield running


def test_bearer_and_basic_pass_the_proxy(proxy: Proxy) -> None:
    (proxy.folder / "f.txt").write_bytes(b"hello")
    bearer, path = ("-H", f"Authorization: Bearer {CI}"), "@/artefacts/app-1/below/f%20%252f%C3%BC.txt"
    assert proxy.curl("-T", "f.txt", path)[0] == 401
    assert proxy.curl("-T", "f.txt", "-u", "ci:wrong", path)[0] == 401
    assert proxy.curl("-T", "f.txt", "-u", f"reader:{READER}", path)[0] == 403
    assert proxy.curl("-T", "f.txt", *bearer, path)[0] == 201
    assert proxy.curl("-T", "f.txt", "-u", f"ci:{CI}", path)[0] == 200
    assert proxy.curl(path)[0] == 401
    assert proxy.curl(*bearer, path) == (200, b"hello")
    assert proxy.curl("-u", f"reader:{READER}", "-H", "Range: bytes=1-3", path) == (206, b"ell")
    assert proxy.curl(*bearer, "-H", f'If-None-Match: "{sha256(b"hello")}"', path)[0] == 304
    assert proxy.curl(*bearer, "-H", "If-None-Match: *", "-T", "f.txt", path)[0] == 412
    status, shown = proxy.curl("-I", "@/artefacts/public/x")
    etag = sha256(proxy.curl("@/artefacts/public/x")[1])
    assert status == 200 and f'etag: "{etag}"' in shown.decode().lower()
    assert (proxy.program.data / "app-1/below/f %2fü.txt").read_bytes() == b"hello"
    assert proxy.curl("--path-as-is", *bearer, "@/artefacts/app-1/..%2f..%2fx")[0] == 404
    assert proxy.curl(*bearer, "-X", "DELETE", path)[0] == 204


def test_links_lead_back_through_the_proxy(proxy: Proxy) -> None:
    bearer, base = ("-H", f"Authorization: Bearer {CI}"), f"{proxy.origin}/artefacts/app-1/"
    urls = {f"{base}{quote(name)}": name.encode() for name in ("plain.txt", "with space#?.txt", "ü/%2e.txt")}
    for url, content in urls.items():
        status, body = proxy.curl("-T", "-", *bearer, url, input=content)
        assert status == 201 and urljoin(base, json.loads(body)["href"]) == url
        assert proxy.curl(*bearer, url) == (200, content)
    listed = json.loads(proxy.curl(*bearer, "@/artefacts/app-1")[1])["artefacts"]
    assert {urljoin(base, entry["href"]) for entry in listed} >= set(urls)
    page = proxy.curl(*bearer, "-H", "Accept: text/html", "@/artefacts/app-1/")[1].decode()
    links = [urljoin(base, html.unescape(link)) for link in re.findall(r'href="([^"]*)"', page)]
    assert {urldefrag(link).url for link in links} >= set(urls)
    status, shown = proxy.curl("-I", "@/")
    assert status == 303 and "location: /artefacts/\r\n" in shown.decode().lower()


def test_upload_is_streamed_through_the_proxy(proxy: Proxy) -> None:
    """Check that the program has the beginning of an upload before its end is sent."""
    size, token = 40_000_000, f"Authorization: Bearer {CI}"
    for number, (field, start, end) in enumerate((
        (f"Content-Length: {size}", b"", b""), (CHUNKED, b"%x\r\n" % size, b"\r\n0\r\n\r\n"),
    )):  # fmt: skip
        header = head("PUT", f"/artefacts/app-1/large-{number}", token, field)
        with proxy.connect() as client, client.makefile("rb") as answer:
            client.sendall(header.replace(b"localhost", b"artefacts.example") + start + bytes(size // 2))
            incoming = proxy.program.data / ".incoming"
            eventually(lambda: any(file.stat().st_size > size // 4 for file in incoming.iterdir()))  # noqa: B023
            client.sendall(bytes(size - size // 2) + end)
            assert answer.readline().startswith(b"HTTP/1.1 201 ")
        assert (proxy.program.data / f"app-1/large-{number}").stat().st_size == size
    status, body = proxy.curl("-H", token, "@/artefacts/app-1/large-0")
    assert status == 200 and body == bytes(size)
    assert proxy.curl("-H", token, "-r", "39999990-", "@/artefacts/app-1/large-0") == (206, bytes(10))


def test_refused_upload_gets_its_response(proxy: Proxy) -> None:
    # Caddy closes while curl still sends. curl may then lose a response, whatever server is behind Caddy.
    (proxy.folder / "large").write_bytes(bytes(20_000_000 if proxy.name == "nginx" else 50_000))
    for fields in ((), ("-u", "x:wrong"), ("-H", "Expect:"), ("-H", CHUNKED)):
        assert proxy.curl("-T", "large", *fields, "@/artefacts/app-1/refused")[0] == 401, fields
    eventually(lambda: proxy.program.incoming() == [])


def test_own_pages_may_push_through_the_proxy(proxy: Proxy) -> None:
    """Compare Origin with Host, which must arrive as the browser sent it."""

    def push(origin: str) -> int:
        fields = ("-u", f"ci:{CI}", "-H", f"Origin: {origin}")
        return proxy.curl(*fields, "-T", "-", "@/artefacts/app-1/own", input=b"1")[0]

    assert push(proxy.origin) in (200, 201)
    assert push("https://artefacts.example") == 403 and push("null") == 403
