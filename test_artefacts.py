"""Check the contract of artefacts.py. The sections follow the parts of the module."""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import datetime as dt
import errno
import fcntl
import fnmatch
import gc
import hashlib
import http.client
import io
import ipaddress
import itertools
import json
import os
import pty
import random
import re
import select
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.message import Message
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote, unquote, urlsplit
from urllib.request import urlopen

import pytest
from falcon import HTTPBadRequest, HTTPRangeNotSatisfiable, testing

import artefacts as a

# == Helpers and fixtures =========================================================================


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


T1, T2, T3 = "20240101T000000.000001Z", "20240102T000000.000002Z", "20240103T000000.000003Z"
V1, V2 = "20240101T000000.000000Z", "20240102T000000.000000Z"
LARGE_BODY = random.Random(1).randbytes(3 * 1024 * 1024 + 1)  # more than an upload keeps in memory
LARGE_SIZE = 200 * 1024 * 1024  # bytes
PROGRAM = Path(a.__file__)
IMPORT = f"import sys; sys.path.insert(0, {str(PROGRAM.parent)!r}); import artefacts; "
MAX_SIZE = 100 << 20  # bytes; --max-size of the fixture `program`
EXISTING = "/artefacts/app/there"
ABSENT = "/artefacts/app/new"
CHUNKED = "Transfer-Encoding: chunked"
FORM = {"Content-Type": "multipart/form-data; boundary=XX"}
MULTIPART = "Content-Type: multipart/form-data; boundary=b"
BASIC = "application/octet-stream"
TIME = 784111777  # the example of RFC 9110 §5.6.7
DATE, LATER, EARLIER = (a.http_date(TIME + seconds) for seconds in (0, 1, -1))
DIGEST, OTHER = sha256(b"one"), sha256(b"two")
B64 = base64.b64encode(bytes.fromhex(DIGEST)).decode()
ONE, TWO, NEW = (f'"{sha256(content)}"' for content in (b"one", b"two", b"new"))
MODIFIED = "Tue, 02 Jan 2024 00:00:00 GMT"  # T2 as a header field
INITIAL = {"app/x.txt": b"two", f"app/.versions/x.txt/{T1}": b"one", "app/f/y": b"why"}
RESTORE = f"POST /app/x.txt?restore={T1}"
SECRET = b"not for you"
READER, CI, IDLE, COLON = "of-the-reader", "of-the-builder", "of-one-without-rights", "p:ss:wörd"
DIGESTS = [sha256(token.encode()) for token in (READER, CI, IDLE, COLON)]
TOKENS = f"""
anonymous = {{read = ["public"]}}
token = [
    {{name = "reader", sha256 = "{DIGESTS[0]}", read = ["*"]}},
    {{name = "ci", sha256 = "{DIGESTS[1]}", read = ["app-*", "public"], write = ["app-*", "nightly"]}},
    {{name = "idle", sha256 = "{DIGESTS[2]}"}},
    {{name = "colon", sha256 = "{DIGESTS[3]}", read = ["app-?"]}},
]
"""
LOG_TIME = r"\[\d\d/[A-Z][a-z]+/\d{4}(:\d\d){3} \+0000\]"
LOGGED = re.compile(rf'127\.0\.0\.1 - \S+ {LOG_TIME} "[ -~]*" \d{{3}} (\d+|-)')
Events = list[tuple[str, str | int]]
Rules = list[tuple[Callable[..., object], list[tuple[Any, ...]]]]  # a function; arguments and result


def next_version(version: str) -> str:
    """Return the name of a version that is one microsecond later."""
    return a.Artefact("", "", 0, a.version_time(version) + 1, "", None).version


def add_file(file: Path, content: bytes, version: str = T1) -> None:
    """Write a file by hand, with the modification time that the version names."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    os.utime(file, ns=(a.version_time(version) * 1000,) * 2)


def damage(file: Path, content: bytes) -> None:
    """Overwrite the beginning of a file as a failing disk would: size and modification time stay."""
    before = file.stat()
    with file.open("r+b") as damaged:
        damaged.write(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def fill(data: Path, *directories: str) -> Path:
    """Write x and one earlier version by hand into each directory. Return the data directory."""
    for directory in directories:
        for name, version in (("x", V2), (f".versions/x/{V1}", V1)):
            add_file(data / directory / name, version.encode(), version)
    return data


def write_secrets(outside: Path) -> None:
    """Write files that the program must not touch, where links and paths of the tests point."""
    for name in ("secret", "folder/secret", f"folder/{V1}", "folder/x", "folder/d/x", f"folder/e/x/{V1}"):
        (outside / name).parent.mkdir(parents=True, exist_ok=True)
        (outside / name).write_bytes(SECRET)


def state_of(folder: Path) -> list[object]:
    """Return the time and the size of everything below a folder, to compare it with a later state."""
    files = sorted((folder, *folder.rglob("*")))
    return [(file, status.st_mtime_ns, status.st_size) for file in files for status in [file.lstat()]]


def tree(path: Path) -> dict[str, bytes]:
    """Return the content of each file below a folder, by relative path.

    A link has its target as its content. An empty folder ends in a slash. Lock files are left out,
    and so are the repository's own folders if they are empty.
    """
    found = {}
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path).as_posix()
        if name.startswith(".locks/"):
            continue
        if file.is_symlink():
            found[name] = b"-> " + os.fsencode(file.readlink())
        elif file.is_file():
            found[name] = file.read_bytes()
        elif name not in (".incoming", ".locks", ".trash") and not any(file.iterdir()):
            found[name + "/"] = b""
    return found


def require_attributes(data: Path) -> None:
    """Skip the test if the file system has no extended attributes."""
    try:
        os.setxattr(data, "user.test", b"")
    except (AttributeError, OSError):
        pytest.skip("no extended attributes here")


def installed(command: str) -> str:
    """Return the command's name. If it is missing, skip the test, or fail it if REQUIRE_CLIENTS is set."""
    if shutil.which(command) is None:
        reason = f"{command} is not installed"
        if os.environ.get("REQUIRE_CLIENTS"):
            pytest.fail(reason)
        pytest.skip(reason)
    return command


def without_privileges() -> list[str]:
    """Return the words to put before a command, so that file permissions apply to it even for root."""
    if os.geteuid():
        return []
    return [installed("setpriv"), "--bounding-set=-all", "--inh-caps=-all"]


@contextlib.contextmanager
def leased(path: Path) -> Iterator[Callable[[], object]]:
    """Yield a function that takes a write lease on the file: until the end, no one else can open it."""

    def lease() -> None:
        try:
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        except OSError:
            pytest.skip("there are no leases here")

    before = signal.signal(signal.SIGIO, signal.SIG_IGN)  # sent by the kernel to the holder of the lease
    try:
        with path.open("rb+") as file:
            yield lease
    finally:
        signal.signal(signal.SIGIO, before)


def eventually(condition: Callable[[], object], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"the condition did not become true within {seconds} s"
        time.sleep(0.005)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def repository(data: Path) -> a.Repository:
    """Return a repository that keeps no versions."""
    return a.Repository(data)


@pytest.fixture
def versioned(data: Path) -> a.Repository:
    """Return a repository that keeps two versions."""
    return a.Repository(data, keep_versions=2)


def push(repository: a.Repository, id: str, content: bytes, **options: Any) -> a.Artefact:
    with repository.stage() as upload:
        upload.write(content)
        return repository.push(upload, "app", id, **options)[0]


def fetched(repository: a.Repository, id: str, version: str | None = None) -> bytes:
    with repository.fetch("app", id, version) as content:
        return content.read(0, content.artefact.size)


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> Events:
    """Record the system calls of a commit, in order, while they are carried out.

    fsync is recorded with the inode, the others with the name that they create or remove.
    """
    events: Events = []

    def record(call: str) -> None:
        carry_out = getattr(os, call)

        def recorded(*args: Any, **options: Any) -> None:
            what = args[1] if call in ("rename", "link") else args[0]
            events.append((call, os.fstat(what).st_ino if call == "fsync" else os.path.basename(what)))
            carry_out(*args, **options)

        monkeypatch.setattr(os, call, recorded)

    for call in "fsync", "mkdir", "link", "rename", "unlink":
        record(call)
    return events


def in_order(events: Events, *wanted: tuple[str, Path | str]) -> None:
    """Assert that these calls were made in this order. Other calls may stand between them."""
    rest = iter(events)
    for call, what in wanted:
        event = (call, what.stat().st_ino if isinstance(what, Path) else what)
        assert event in rest, f"{call} of {what} is missing or too early in {events}"


def cases_of(rules: Rules) -> list[Any]:
    """Return each row as a parameter, named after its function and its number among that function's rows."""
    rows = [(f"{rule.__name__} {n}", rule, case) for rule, cases in rules for n, case in enumerate(cases)]
    return [pytest.param(rule, case, id=id) for id, rule, case in rows]


def check_rule(rule: Callable[..., object], case: tuple[Any, ...]) -> None:
    """Call the function with all of the row but its last item: the result, or the exception, to expect."""
    *arguments, expected = case
    with pytest.raises(expected) if isinstance(expected, type) else contextlib.nullcontext():
        assert rule(*arguments) == expected


@pytest.fixture
def client(data: Path) -> testing.TestClient:
    """Return a client of an application that holds INITIAL and keeps two versions."""
    for (name, content), version in zip(INITIAL.items(), (T2, T1, T3), strict=True):
        add_file(data / name, content, version)
    return testing.TestClient(a.create_app(data, keep_versions=2, fsync=False))


@pytest.fixture
def empty_client(data: Path) -> testing.TestClient:
    """Return a client of an application without any artefact."""
    return testing.TestClient(a.create_app(data, fsync=False))


def client_of(data: Path, config: str, **options: Any) -> testing.TestClient:
    file = data.with_name("config.toml")
    file.write_text(config)
    return testing.TestClient(a.create_app(data, config=file, fsync=False, **options))


def call(client: testing.TestClient, request: str, **options: Any) -> testing.Result:
    """Send a request such as `GET /path?query`. PUT, POST and PATCH have the body `new` by default."""
    method, _, target = request.partition(" ")
    path, _, query = target.partition("?")
    options = {"body": b"new" if method in ("PUT", "POST", "PATCH") else b"", **options}
    return client.simulate_request(method, path, query_string=query, **options)


def simulate(client: testing.TestClient, line: str, *fields: str, body: bytes = b"") -> testing.Result:
    method, path = line.split(" ", 1)
    headers = dict(field.split(": ", 1) for field in fields)
    return client.simulate_request(method, path, headers=headers, body=body)


def post(client: testing.TestClient, path: str, *parts: bytes) -> testing.Result:
    return client.simulate_post(path, headers=FORM, body=b"".join(parts) + b"--XX--\r\n")


def part(name: bytes, content: bytes = b"content", more: bytes = b"") -> bytes:
    disposition = b'Content-Disposition: form-data; name="file"; filename="' + name + b'"'
    return b"--XX\r\n" + disposition + more + b"\r\n\r\n" + content + b"\r\n"


def streamed_form(body: io.BytesIO) -> dict[str, Any]:
    """Return the environ of a chunked form in a WSGI server that streams bodies."""
    environ = testing.create_environ("/artefacts/app", method="POST", headers=FORM)
    environ.pop("CONTENT_LENGTH", None)
    chunked = {"HTTP_TRANSFER_ENCODING": "chunked", "wsgi.input_terminated": True}
    return environ | chunked | {"wsgi.input": body}


def form_of(*files: tuple[str, bytes], fields: str = "") -> bytes:
    start = '--b\r\nContent-Disposition: form-data; name="f"; filename="%s"%s\r\n\r\n'
    return b"".join((start % (name, fields)).encode() + body + b"\r\n" for name, body in files) + b"--b--\r\n"


def ids(answer: dict[str, Any]) -> list[str]:
    return [artefact["id"] for artefact in answer.get("artefacts", [])]


def basic(password: str, user: str = "anyone") -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def bearer(token: str | None) -> list[str]:
    return [] if token is None else [f"Authorization: Bearer {token}"]


def all_digest_fields(digest: bytes) -> list[str]:
    encoded = base64.b64encode(digest).decode()
    return [f"Repr-Digest: sha-256=:{encoded}:", f"Content-Digest: sha-256=:{encoded}:",
            f"Digest: SHA-256={encoded}", f"X-Checksum-Sha256: {digest.hex()}"]  # fmt: skip


STATUS = ("-o", "answer", "-w", "%{http_code} %{size_upload}")


def head(method: str, path: str, *fields: str, version: str = "1.1") -> bytes:
    """Return the header of a request."""
    lines = (f"{method} {path} HTTP/{version}", "Host: localhost", *fields, "", "")
    return "\r\n".join(lines).encode("latin-1")


def put(path: str, body: bytes, *fields: str, method: str = "PUT") -> bytes:
    """Return a request with its body."""
    return head(method, path, f"Content-Length: {len(body)}", *fields) + body


def pieces(body: bytes, size: int) -> bytes:
    """Return a body in the chunked transfer coding."""
    cut = (body[start : start + size] for start in range(0, len(body), size))
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in cut) + b"0\r\n\r\n"


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Message
    body: bytes

    @property
    def etag(self) -> str:
        return str(self.headers["ETag"])

    def is_problem(self, status: int) -> bool:
        """Assert that it is a problem (RFC 9457) with this status that reveals nothing internal."""
        assert (self.status, self.headers["Content-Type"]) == (status, "application/problem+json"), self
        problem = json.loads(self.body)
        assert problem["status"] == status and problem["title"] and len(problem["detail"]) > 10
        assert "Traceback" not in problem["detail"] and "/tmp" not in problem["detail"]
        return True


class Connection:
    """Send raw bytes and read responses strictly by RFC 9112."""

    def __init__(self, port: int, receive_buffer: int = 0) -> None:
        with contextlib.ExitStack() as on_error:
            self.socket = on_error.enter_context(socket.socket())
            self.socket.settimeout(20)
            if receive_buffer:
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.socket.connect(("127.0.0.1", port))
            self.file = self.socket.makefile("rb")
            on_error.pop_all()

    def send(self, data: bytes) -> Self:
        self.socket.sendall(data)
        return self

    def answer(self, *, to_head: bool = False) -> Answer:
        line = self.file.readline()
        assert re.fullmatch(rb"HTTP/1\.[01] [1-5][0-9]{2} [ -~]+\r\n", line), line
        headers, status = http.client.parse_headers(self.file), int(line[9:12])
        if status < 200 or status == 204:  # RFC 9112 §6.1, RFC 9110 §8.6
            assert "Transfer-Encoding" not in headers
            assert "Content-Length" not in headers
        if to_head or status < 200 or status in (204, 304):
            return Answer(status, headers, b"")
        if headers["Transfer-Encoding"] == "chunked":
            return Answer(status, headers, b"".join(iter(self._chunk, b"")))
        length = int(headers["Content-Length"])
        body = self.file.read(length)
        assert len(body) == length
        return Answer(status, headers, body)

    def _chunk(self) -> bytes:
        chunk = self.file.read(int(self.file.readline(), 16) + 2)
        assert chunk.endswith(b"\r\n")
        return chunk[:-2]

    def ask(self, request: bytes) -> Answer:
        return self.send(request).answer(to_head=request.startswith(b"HEAD "))

    def ends(self) -> bool:
        """Return whether the server closes the connection without sending another byte."""
        return self.file.read() == b""

    def abort(self) -> None:
        """Reset the connection, as after a crash of the client."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def close(self) -> None:
        self.file.close()
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Program:
    """Run `python artefacts.py` as a process, with warnings as errors.

    Leaving the context stops it, and asserts that it exits with 0 and logs only request lines and lines that
    match `logged`.
    """

    def __init__(self, data: Path, *options: str, code: Sequence[str] = (str(PROGRAM),),
                 before: Sequence[str] = (), logged: str = "(?!)") -> None:  # fmt: skip
        self.data, self.quiet = data, "--quiet" in options
        self.logged = re.compile(f"{LOGGED.pattern}|{LOG_TIME} ({logged})")
        self.log = data.with_name(f"{data.name}-{id(self):x}.log")
        program = [*before, sys.executable, "-W", "error", *code]
        command = [*program, "--data", str(data), "--port", "0", *options]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        assert self.process.stdout is not None
        with self.process.stdout as output:  # the program writes one line and nothing after it
            url = re.fullmatch(r"http://127\.0\.0\.1:([0-9]+)/artefacts/\n", output.readline())
        assert url is not None, self.log.read_text()
        self.port = int(url[1])
        self.url = f"http://127.0.0.1:{self.port}/artefacts/"

    def connect(self, receive_buffer: int = 0) -> Connection:
        return Connection(self.port, receive_buffer)

    def ask(self, request: bytes) -> Answer:
        """Send one request on a new connection and return the response."""
        with self.connect() as connection:
            return connection.ask(request)

    def get(self, path: str, *fields: str) -> Answer:
        return self.ask(head("GET", path, *fields))

    def incoming(self) -> list[str]:
        return os.listdir(self.data / ".incoming")

    def peak_memory(self, *, restart: bool = False) -> int:
        """Return the peak of the resident memory in bytes. With `restart`, begin a new measurement."""
        if restart:
            Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024

    def listens(self) -> bool:
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", self.port)) == 0

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal, wait for the end and return the exit status."""
        self.process.send_signal(number)
        return self.process.wait(20)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        try:
            assert error[0] is not None or self.process.poll() is not None or self.stop() == 0
        finally:
            self.process.kill()
            self.process.wait()
        log = self.log.read_text().splitlines()
        assert all(map(self.logged.fullmatch, log)), [line for line in log if not self.logged.fullmatch(line)]
        assert not (self.quiet and log)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    data = tmp_path_factory.mktemp("program") / "data"
    with Program(data, "--max-size", str(MAX_SIZE)) as running:
        running.ask(put("/artefacts/app/there", b"there"))
        yield running


@pytest.fixture(scope="module")
def large(program: Program) -> bytes:
    """Store /artefacts/app/large, which is larger than the buffers of a connection, and return its bytes."""
    body = os.urandom(40_000_000)
    assert program.ask(put("/artefacts/app/large", body)).status == 201
    return body


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Program]]:
    """Run two processes that serve one data directory."""
    data = tmp_path_factory.mktemp("pair") / "data"
    with Program(data) as one, Program(data) as other:
        yield [one, other]


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """Run the program with tokens."""
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "c.toml").write_text(TOKENS + 'directory = [{name = "app-*", max_size = 10}]')
    data = fill(folder / "data", "public", "app-1", "secret")
    logged = "artefacts: '.*' has versions: keep_versions = 0 makes a push erase them"
    with Program(data, "--config", str(folder / "c.toml"), "--no-fsync", logged=logged) as running:
        yield running


@pytest.fixture(scope="module")
def exposed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """Run the program without tokens, on the loopback. Assert that no file beside its data changes."""
    folder = tmp_path_factory.mktemp("exposed")
    outside, data = folder / "outside", fill(folder / "data", "app", "app/d")
    write_secrets(outside)
    before = state_of(outside)
    with Program(data, "--no-fsync", "--keep-versions=5", "--allow-host=Artefacts.example") as running:
        yield running
        assert running.process.poll() is None and running.get("/artefacts/app/x").body == V2.encode()
    assert state_of(outside) == before and set(os.listdir(folder)) == {"data", "outside", running.log.name}


def ask(program: Program, line: str, *fields: str, body: bytes = b"") -> Answer:
    method, path = line.split(" ", 1)
    return program.ask(put(path, body, *fields, method=method))


def is_client_error(answer: Answer, request: object) -> bool:
    """Assert that it is a problem with a 4xx status, and that the request injected no header field."""
    assert 400 <= answer.status < 500, (answer.status, request)
    return answer.is_problem(answer.status) and "X-Evil" not in answer.headers


def open_count(program: Program, name: str) -> int:
    """Return how many file descriptors of the process refer to the file."""
    files = Path(f"/proc/{program.process.pid}/fd")
    return sum(os.path.realpath(file).endswith(f"/{name}") for file in files.iterdir())


def start_upload(program: Program) -> Connection:
    """Send a part of an upload and wait until the program has received some of it."""
    connection = program.connect()
    connection.send(head("PUT", "/artefacts/app/slow", "Content-Length: 600000") + bytes(500_000))
    eventually(program.incoming)
    return connection


def send_together(pair: list[Program], requests: Sequence[bytes]) -> list[int]:
    """Send all requests at the same moment, alternately to both processes. Return the sorted statuses."""
    ready = threading.Barrier(len(requests))

    def send(number: int) -> int:
        with pair[number % 2].connect() as connection:
            ready.wait(10)
            return connection.ask(requests[number]).status

    with concurrent.futures.ThreadPoolExecutor(len(requests)) as clients:
        return sorted(clients.map(send, range(len(requests))))


def start_error(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """Return the error line of a refused start. A start that is not refused reports a used port."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert a.main([f"--port={taken.getsockname()[1]}", *options]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("artefacts.py: ") and shown.err.count("\n") == 1, shown
    return shown.err


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """Run the program without fsync, for forms and archives."""
    data = tmp_path_factory.mktemp("served") / "data"
    with Program(data, "--no-fsync", logged="artefacts: .*") as running:
        yield running


@pytest.fixture
def curl(program: Program, tmp_path: Path) -> Callable[..., str]:
    def run(*arguments: str, input: bytes = b"") -> str:
        """Run curl and return its output. `@/` in an argument stands for the server's URL."""
        expanded = [argument.replace("@/", program.url.removesuffix("artefacts/")) for argument in arguments]
        command = [installed("curl"), "-sS", "-m", "20", *expanded]
        done = subprocess.run(command, input=input, capture_output=True, cwd=tmp_path, check=False)
        assert done.returncode == 0, done
        return done.stdout.decode()

    (tmp_path / "f.txt").write_bytes(b"hello\n")
    return run


def run_curl(*arguments: str) -> tuple[int, dict[str, Any]]:
    """Run curl and return the status and the JSON of the response."""
    command = [installed("curl"), "-sS", "-w", "%{http_code}", *arguments]
    answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(answer[-3:]), json.loads(answer[:-3])


def pipe(url: str, command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run `curl URL | command` in a folder."""
    script = f"set -o pipefail; {installed('curl')} -fsS '{url}' | {command}"
    installed(command.split()[0])
    return subprocess.run([installed("bash"), "-c", script], cwd=folder, capture_output=True, text=True)


TREE = {
    "0 empty": b"", "1.0/block": b"x" * 512, "1.0/less": b"x" * 511, "1.0/more": b"x" * 513, "empty": b"",
    "ü ☃/" + "long/" * 50 + "e" * 250: b"deep", "ü.txt": b"\0\xff",
}  # fmt: skip


@pytest.fixture(scope="module")
def tree_url(served: Program) -> str:
    """Store the artefacts of TREE and return their URL. The first one gets a time in 2001."""
    for id, content in TREE.items():
        with closing(http.client.HTTPConnection(urlsplit(served.url).netloc, timeout=30)) as connection:
            connection.request("PUT", f"/artefacts/tree/{quote(id)}", content)
            assert connection.getresponse().status == 201
    os.utime(served.data / "tree/0 empty", ns=(0, 1_000_000_000_123_457_000))
    return f"{served.url}tree"


# == Values and names =============================================================================

NAMES = [
    "x", " ", "a b", "'\"<>&%?#;:*|+=@", "x.", "a..b", "~", "-rf", "é", "e\u0301", "日本語", "😀",
    "\u202e\u05ea\u05e4", "\u2028", "\u00a0", "x" * 255, "é" * 127,
]  # fmt: skip
BAD_NAMES = [
    "", ".", "..", ".x", ".versions", "a/b", "/", "a\\b", "\0", "a\nb", "x\n", "\x1f", "\x7f", "\x85",
    "\ufffd", "a\udcff", "x" * 256, "é" * 128,
]  # fmt: skip
VALUES: Rules = [
    (a.check_segment, [(name, "id", name) for name in NAMES]),
    (a.check_segment, [(name, "id", a.InvalidName) for name in BAD_NAMES]),
    (a.check_names, [("app", "a/b/c", ("a", "b", "c")), ("app", "/".join("x" * 512), ("x",) * 512)]),
    (a.check_names, [(directory, "x", a.InvalidName) for directory in ("", "a/b", ".app")]),
    (a.check_names, [("app", id, a.InvalidName) for id in (
        "", "/a", "a/", "a//b", "a/../b", "a/.b", "/".join("x" * 513))]),
    (a.version_time, [(T1, 1704067200_000001), ("19700101T000000.000000Z", 0)]),
    (a.version_time, [(name, a.NotFound) for name in (
        "", "20240230T000000.000000Z", "20240101T000000Z", "../x", T1 + "\n", "\u0662" + T1[1:])]),
    (a.type_of, [
        ("x.txt", "text/plain"), ("x.TXT", "text/plain"), ("x.tar.gz", "application/gzip"),
        ("x", BASIC), ("d.txt/x", BASIC), ("x.svg", "image/svg+xml"), ("x", "text/x; a=b", "text/x; a=b"),
    ]),
    (a.type_of, [("x.txt", announced, "text/plain") for announced in (
        "", BASIC, BASIC + "; a=b", "Application/X-WWW-Form-Urlencoded", "multipart/form-data; boundary=x",
        "garbage", "a/b\r\nEvil: 1")]),
    (a.type_of, [(f"x.{extension}", type) for extensions, type in (
        ("md", "text/markdown"), ("webp", "image/webp"), ("avif", "image/avif"), ("woff2", "font/woff2"),
        ("7z", "application/x-7z-compressed"), ("rpm", "application/x-rpm"), ("msi", "application/x-msi"),
        ("apk", "application/vnd.android.package-archive"), ("dmg", "application/x-apple-diskimage"),
        ("diff patch", "text/x-diff"), ("ini conf log sha256 SHA256 c rs", "text/plain"),
        ("wasm", "application/wasm"),
        ("parquet", "application/vnd.apache.parquet"), ("onnx", "application/onnx"), ("flac", "audio/flac"),
        ("js mjs", "text/javascript"), ("jsonl", "application/jsonl"), ("json map", "application/json"),
        ("ipynb", "application/x-ipynb+json"), ("sarif", "application/sarif+json"), ("html htm", "text/html"),
        ("css", "text/css"), ("pdf", "application/pdf"), ("png", "image/png"), ("jpg jpeg", "image/jpeg"),
        ("mp4", "video/mp4"), ("webm", "video/webm"), ("mp3", "audio/mpeg"), ("wav", "audio/wav"),
        ("zip whl", "application/zip"), ("tgz tar.gz gz", "application/gzip"), ("tar", "application/x-tar"),
        ("jar", "application/java-archive"), ("deb", "application/vnd.debian.binary-package"),
        ("xml pom", "application/xml"), ("yaml yml", "application/yaml"), ("toml", "application/toml"),
        ("csv", "text/csv"), ("svg", "image/svg+xml"), ("bin unknown x.md.", BASIC),
    ) for extension in extensions.split()]),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "case"), cases_of(VALUES))
def test_value(rule: Callable[..., object], case: tuple[Any, ...]) -> None:
    check_rule(rule, case)


@pytest.mark.parametrize("name", NAMES)
def test_every_allowed_name_can_be_stored_and_fetched(data: Path, name: str) -> None:
    client = testing.TestClient(a.create_app(data, keep_versions=2, fsync=False))
    path = a.href("", name, f"{name}/{name}")
    assert [call(client, f"PUT {path}", body=content).status_code for content in (b"1", b"2")] == [201, 200]
    assert tree(data)[f"{name}/{name}/{name}"] == b"2" == call(client, f"GET {path}").content
    assert len(call(client, f"GET {path}?versions").json["versions"]) == 2
    [listed] = call(client, f"GET {a.href('', name)}").json["artefacts"]
    assert (listed["directory"], listed["id"], listed["href"]) == (name, f"{name}/{name}", path)
    assert call(client, f"DELETE {a.href('', name)}").status_code == 204 and tree(data) == {}


ODD_NAMES = [
    'quo"te', "a; filename=b", "a\u202egpj.exe", "<script>alert(1).html", "\u2066\u2028\u2029", "a' b*=",
    "🎉, b", "%0d%0aX-Evil: y", "=?utf-8?q?x?=", "e\u0301", "&amp;", "a,b;c=d", "${x}", "\ufeff", "-rf",
    "ﬀ" * 85,
]  # fmt: skip


def test_odd_names_do_not_break_header_fields(exposed: Program) -> None:
    plain = ask(exposed, "PUT /artefacts/names/plain")
    fields = set(plain.headers), set(exposed.get("/artefacts/names/plain").headers)
    for name in ODD_NAMES:
        path = f"/artefacts/names/below/{quote(name, safe='')}"
        pushed, fetched = ask(exposed, f"PUT {path}"), exposed.get(path)
        assert (pushed.status, fetched.status) == (201, 200)
        assert (set(pushed.headers), set(fetched.headers)) == fields
        shown, encoded = fetched.headers["Content-Disposition"].rsplit("; filename*=UTF-8''", 1)
        assert unquote(encoded) == name and unquote(pushed.headers["Location"]).endswith(f"/below/{name}")
        assert shown.startswith('inline; filename="') and shown.count('"') - shown.count('\\"') == 2
        assert fetched.headers["Link"].isascii() and is_client_error(ask(exposed, f"PUT {path}/n"), name)
    listed = json.loads(exposed.get("/artefacts/names?prefix=below/").body)["artefacts"]
    assert [entry["id"] for entry in listed] == sorted(f"below/{name}" for name in ODD_NAMES)
    assert exposed.get("/artefacts/names?prefix=below/a&limit=1").headers["Link"].isascii()


# == Storage: files ===============================================================================


def test_artefact_and_folder_cannot_share_a_name(data: Path, versioned: a.Repository) -> None:
    push(versioned, "a", b"1")
    push(versioned, "b/c/d", b"2")
    for id in "a/b", "a/b/c", "b", "b/c":
        with pytest.raises(a.Conflict):
            push(versioned, id, b"3")
        for operation in versioned.fetch, versioned.delete:
            with pytest.raises(a.NotFound):
                operation("app", id)
    add_file(data / "file", b"4")
    with versioned.stage() as upload, pytest.raises(a.Conflict):
        versioned.push(upload, "file", "x")
    assert tree(data) == {"app/a": b"1", "app/b/c/d": b"2", "file": b"4"}
    (data / "app/e/f").mkdir(parents=True)
    push(versioned, "e", b"5")  # empty folders do not conflict
    assert tree(data) == {"app/a": b"1", "app/b/c/d": b"2", "file": b"4", "app/e": b"5"}


LINKS = [  # a link, its target, the error that a push of app/d/x then raises
    ("app", "folder", a.Conflict), ("app/d", "folder", a.Conflict), ("app/d/x", "secret", a.Conflict),
    ("app/d/x", "folder", a.Conflict), ("app/d/x", "nothing", a.Conflict),
    ("app/.versions", "versions", a.Conflict), ("app/.versions/d/x", "folder", a.Conflict),
    (f"app/.versions/d/x/{T1}", "secret", None),
    (".incoming", "folder", OSError), (".locks", "folder", OSError), (".locks/app", "secret", OSError),
]  # fmt: skip


@pytest.mark.parametrize(("link", "target", "error"), LINKS)
def test_symbolic_links_are_not_followed(
    data: Path, tmp_path: Path, versioned: a.Repository, link: str, target: str, error: type[Exception] | None
) -> None:
    outside = tmp_path / "outside"
    for name in "secret", "folder/x", "folder/d/x", f"folder/{T1}", f"versions/d/x/{T1}":
        add_file(outside / name, b"secret")
    before = tree(outside)
    add_file(data / "app/d/x", b"mine", T3)
    if (data / link).is_dir():
        (data / link).rename(tmp_path / "aside")
    (data / link).unlink(missing_ok=True)
    (data / link).parent.mkdir(parents=True, exist_ok=True)
    (data / link).symlink_to(outside / target)

    def read(version: str | None = None) -> None:
        assert fetched(versioned, "d/x", version) != b"secret"

    def listed() -> None:
        found = [*versioned.artefacts("app", digests=True), *dict(versioned.versions("app", "d/x"))]
        assert sha256(b"secret") not in {artefact.sha256 for artefact in found}

    with pytest.raises(error) if error else contextlib.nullcontext():
        push(a.Repository(data, keep_versions=1), "d/x", LARGE_BODY)
    operations: list[Callable[[], object]] = [
        read, lambda: read(T1), listed, lambda: versioned.restore("app", "d/x", T1), read,
        lambda: push(versioned, "d/x", b"2"), lambda: push(versioned, "d/x", b"3"),
        lambda: versioned.erase("app", "d/x", T1), lambda: versioned.delete("app", "d/x"),
        lambda: versioned.delete("app", "d/x", versions_too=True),
        lambda: versioned.delete_directory("app"),
        versioned.sweep, lambda: a.Repository(data),
    ]  # fmt: skip
    for operation in operations:
        with contextlib.suppress(a.ArtefactsError, OSError):
            operation()
        assert tree(outside) == before


@pytest.mark.parametrize("done", [False, True])
def test_removing_a_missing_name_is_not_an_error(
    data: Path, monkeypatch: pytest.MonkeyPatch, done: bool
) -> None:
    """Ignore ENOENT: a person removed the name, or a replica of GlusterFS does not know the folder yet."""

    def reports_missing(call: Callable[..., None]) -> Callable[..., None]:
        def called(name: str, *, dir_fd: int | None = None) -> None:
            if done:
                with contextlib.suppress(OSError):  # the folder is not empty
                    call(name, dir_fd=dir_fd)
            removed.append(name)
            raise FileNotFoundError(errno.ENOENT, "", name)

        return called

    removed: list[str] = []
    repository = a.Repository(data, keep_versions=1)
    first, second = push(repository, "d/x", b"1").version, push(repository, "d/x", b"2").version
    monkeypatch.setattr(os, "unlink", reports_missing(os.unlink))
    monkeypatch.setattr(os, "rmdir", reports_missing(os.rmdir))
    push(repository, "d/x", b"3")
    assert removed == [first, "x"] and fetched(repository, "d/x") == b"3"
    repository.erase("app", "d/x", second)
    assert removed == [first, "x", second, "x"]


@pytest.mark.parametrize("settled", [False, True])
def test_artefact_replaced_during_a_listing_is_listed(
    repository: a.Repository, monkeypatch: pytest.MonkeyPatch, settled: bool
) -> None:
    """Simulate btrfs, which does not list a name that was created after the folder was opened."""
    for id in "xy":
        push(repository, id, b"old")
    if settled:
        time.sleep(2 * a.TICK / 1e9)
    scandir = os.scandir

    def without_x(folder: int) -> Any:
        monkeypatch.setattr(os, "scandir", scandir)
        push(repository, "x", b"new")
        return contextlib.nullcontext([entry for entry in scandir(folder) if entry.name != "x"])

    monkeypatch.setattr(os, "scandir", without_x)
    for _ in range(2):
        assert [artefact.id for artefact in repository.artefacts("app")] == ["x", "y"]
    assert os.scandir is scandir


@pytest.mark.parametrize(("pause", "tick"), [(0, a.TICK), (0, 1 << 60), (2 * a.TICK / 1e9, a.TICK)])
def test_listing_reflects_changes_made_by_hand(
    data: Path, repository: a.Repository, monkeypatch: pytest.MonkeyPatch, pause: float, tick: int
) -> None:
    """Compare after changes in quick succession, and after changes to a folder whose names are cached.

    Within a tick, nothing is cached. A busy machine may take longer than a real one, but not 36 years."""
    app, real_tick = data / "app", a.TICK
    monkeypatch.setattr(a, "TICK", tick)
    changes: list[Callable[[], object]] = [
        lambda: (app / "x").write_bytes(b"1"), lambda: (app / "x").rename(app / "y"),
        lambda: (app / "d").mkdir(), lambda: (app / "y").rename(app / "d/y"),
        lambda: (app / "d/y").write_bytes(b"22"), lambda: (app / "d").rename(app / "e"),
        lambda: (app / "e/y").unlink(), lambda: (app / "e").rmdir(), lambda: (app / "e").write_bytes(b"3"),
        lambda: app.rename(data / "b"), lambda: app.mkdir(), lambda: (app / "z").touch(),
        lambda: (app / "z").unlink(), lambda: (app / "d").symlink_to(data / "b"),
    ]  # fmt: skip
    app.mkdir(parents=True)
    for change in changes:
        change()
        found = {str(path.relative_to(app)) for path in app.rglob("*") if path.is_file()}
        for _ in range(2 * app.exists()):
            assert [artefact.id for artefact in repository.artefacts("app")] == sorted(found)
            time.sleep(pause)
    if pause or tick > real_tick:
        assert bool(repository.files._listed) == bool(pause)


def test_leftovers_of_dead_processes_are_swept_and_live_uploads_are_not(
    data: Path, repository: a.Repository
) -> None:
    for own in ".incoming", ".trash":
        add_file(data / own / "folder/x", b"1")
        add_file(data / own / "file", b"2")
    with repository.stage() as upload:
        upload.write(LARGE_BODY)
        a.Repository(data).sweep()
        assert list(tree(data).values()) == [LARGE_BODY]
        repository.push(upload, "app", "x")
    assert tree(data) == {"app/x": LARGE_BODY}


def test_a_tree_of_1500_levels_is_removed_from_the_trash_at_start(data: Path) -> None:
    deep = data / ".trash/deep"
    deep.mkdir(parents=True)
    at = os.open(deep, os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("d", dir_fd=at)
        below = os.open("d", os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = below
    os.close(at)
    os.utime(deep, (0, 0))
    with Program(data) as program:
        assert program.get("/artefacts/").status == 200
    assert os.listdir(data / ".trash") == []


def test_lost_and_found_is_not_a_directory(data: Path, repository: a.Repository) -> None:
    add_file(data / "lost+found/x", b"of the file system")
    push(repository, "lost+found/x", b"an id may have this name")
    assert repository.directories() == ["app"]
    with repository.stage() as upload:
        for operation in (
            lambda name: repository.fetch(name, "x"), lambda name: list(repository.artefacts(name)),
            lambda name: repository.push(upload, name, "x"), repository.delete_directory,
        ):  # fmt: skip
            with pytest.raises(a.InvalidName, match="file system"):
                operation("lost+found")
    assert {artefact.directory for artefact, _ in repository.verify()} == {"app"}
    assert sorted(tree(data)) == ["app/lost+found/x", "lost+found/x"]


def test_unreadable_names_are_not_listed_but_reported(data: Path) -> None:
    """List a closed file, a closed folder, and a folder that cannot be entered."""
    code = IMPORT + """
import json
repository, unreadable = artefacts.Reader(sys.argv[1]), []
ids = [artefact.id for artefact in repository.artefacts("app", digests=True, unreadable=unreadable)]
print(json.dumps([ids, unreadable]))
"""
    for id in "a", "closed/x", "f/closed", "f/open", "names/x", "z":
        add_file(data / "app" / id, b"1")
    modes = {"app/closed": 0, "app/f/closed": 0, "app/names": 0o444}
    for name, mode in modes.items():
        (data / name).chmod(mode)
    command = [*without_privileges(), sys.executable, "-c", code, str(data)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    ids, unreadable = json.loads(done.stdout)
    assert ids == ["a", "f/open", "z"] and sorted(unreadable) == ["closed/", "f/closed", "names/x"]
    assert done.stderr.count("Permission denied") == 3
    for name in modes:
        (data / name).chmod(0o755)


def test_data_directory_that_cannot_be_written_can_be_read(data: Path) -> None:
    code = IMPORT + """
repository = artefacts.Repository(sys.argv[1])
with repository.fetch("app", "x") as content:
    print(content.whole().decode())
try:
    repository.check_health()
except PermissionError:
    print("read only")
"""
    add_file(data / "app/x", b"content")
    data.chmod(0o555)
    command = [*without_privileges(), sys.executable, "-c", code, str(data)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines() == ["content", "read only"]
    assert "can only be read" in done.stderr and "Traceback" not in done.stderr
    data.chmod(0o755)
    assert tree(data) == {"app/x": b"content"}


def test_folder_that_another_process_made_again_is_fsynced(data: Path, events: Events) -> None:
    """Remove and make a folder behind the back of a repository that knows the folder to be durable."""
    repository, other = a.Repository(data), a.Repository(data)
    push(repository, "d/x", b"one")
    for _ in range(3):
        other.delete("app", "d/x")
        (data / "app/d").mkdir()
        events.clear()
        push(repository, "d/x", b"one")
        in_order(events, ("fsync", data / "app"), ("rename", "x"), ("fsync", data / "app/d"))


def test_no_folder_is_kept_open(data: Path) -> None:
    """An open folder would keep the file system from being unmounted, or mounted again as read-only."""
    repository = a.Repository(data, keep_versions=1)
    removals: list[Callable[[], object]] = [
        lambda: repository.delete("app", "d/e/x"),
        lambda: repository.delete("app", "d/e/x", versions_too=True),
        lambda: repository.delete_directory("app"),
    ]  # fmt: skip
    for remove in removals:
        for content in b"1", b"2":
            push(repository, "d/e/x", content)
        remove()
        gc.collect()
        with os.scandir("/proc/self/fd") as entries:
            opened = [os.readlink(entry.path) for entry in entries if os.path.lexists(entry.path)]
        assert [name for name in opened if name.startswith(str(data))] == []


@pytest.mark.parametrize("mode", [0o2775, 0o775])
def test_file_has_the_group_of_a_setgid_folder(data: Path, events: Events, mode: int) -> None:
    if os.geteuid():
        pytest.skip("only root gives files to any group")
    repository = a.Repository(data, keep_versions=1)
    for folder in data / "app", data / "app/d":
        folder.mkdir()
        os.chown(folder, -1, 12345)
        folder.chmod(mode)
    for content in b"1", b"2":
        push(repository, "d/new/x", content)
        in_order(events, ("rename", "x"))
    found = {path.name: path.stat().st_gid == 12345 for path in (data / "app").rglob("*")}
    assert set(found.values()) == {True} if mode & 0o2000 else not found["x"]
    file = data / "app/d/new/x"
    synced = [event for event in events if event == ("fsync", file.stat().st_ino)]
    assert len(synced) == (2 if mode & 0o2000 else 1)  # the change of the group is durable, too


def test_deep_tree_is_removed_without_quadratic_work(
    data: Path, repository: a.Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    def count(depth: int, remove: Callable[[str], object]) -> int:
        """Return how many system calls remove an artefact of so many segments."""
        counted = itertools.count()

        def counting(call: Callable[..., Any]) -> Callable[..., Any]:
            def called(*args: Any, **options: Any) -> Any:
                next(counted)
                return call(*args, **options)

            return called

        id = "/".join("x" * depth)
        push(repository, id, b"1")
        with monkeypatch.context() as patch:
            for name in "open", "rename", "rmdir", "stat", "fstat", "unlink", "listdir", "scandir", "fchmod":
                patch.setattr(os, name, counting(getattr(os, name)))
            remove(id)
        assert tree(data) in ({}, {"app/": b""})
        return next(counted)

    for remove in lambda id: repository.delete("app", id), lambda _: repository.delete_directory("app"):
        assert count(512, remove) < 2.5 * count(256, remove)


def test_sweep_removes_the_file_of_a_killed_upload_only(data: Path, repository: a.Repository) -> None:
    code = IMPORT + """
import time
with artefacts.Repository(sys.argv[1]).stage() as upload:
    upload.write(bytes(artefacts.PIECE + 1))  # more than stays in memory
    print("written", flush=True)
    time.sleep(600)
"""
    for signal_number in signal.SIGKILL, signal.SIGTERM:
        command = [sys.executable, "-c", code, str(data)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None and process.stdout.readline() == "written\n"
            repository.sweep()
            a.Repository(data)
            assert [*tree(data).values()] == [bytes(a.PIECE + 1)]
            process.send_signal(signal_number)
        repository.sweep()
        assert tree(data) == {}


@pytest.mark.parametrize("sweep", ["is over", "goes on"])
def test_sweep_between_the_creation_of_a_staging_file_and_its_lock(
    data: Path, repository: a.Repository, monkeypatch: pytest.MonkeyPatch, sweep: str
) -> None:
    """Sweep before the writer has the lock: it makes another file, without waiting for the sweep."""

    def lock(fd: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        [name] = os.listdir(data / ".incoming")
        if sweep == "is over":
            a.Repository(data)
        else:
            sweeping.append(os.open(data / ".incoming" / name, os.O_RDWR))
            flock(sweeping[0], fcntl.LOCK_EX)
        flock(fd, operation)

    flock, sweeping = fcntl.flock, list[int]()
    monkeypatch.setattr(fcntl, "flock", lock)
    with repository.stage() as upload:
        upload.write(LARGE_BODY)
        for fd in sweeping:
            os.close(fd)
        repository.sweep()
        repository.push(upload, "app", "x")
    assert tree(data) == {"app/x": LARGE_BODY}


def test_staging_file_that_cannot_be_locked_is_removed(
    data: Path, repository: a.Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    with monkeypatch.context() as patch, pytest.raises(OSError, match=os.strerror(errno.ENOLCK)):
        patch.setattr(fcntl, "flock", refuse)
        push(repository, "x", b"one")
    assert tree(data) == {}


def start(command: Sequence[str]) -> subprocess.Popen[str]:
    """Start a process with three pipes."""
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def test_processes_that_sweep_at_once_do_not_disturb_each_other(data: Path, repository: a.Repository) -> None:
    code = IMPORT + """
repository = artefacts.Reader(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
artefacts.Repository(sys.argv[1])
"""
    for number in range(300):
        add_file(data / f".incoming/{number}", b"orphan")
        add_file(data / f".trash/{number}/a/b/c", b"deleted")
    command = [sys.executable, "-c", code, str(data)]
    with repository.stage() as upload, contextlib.ExitStack() as stack:
        upload.write(LARGE_BODY)
        sweepers = [stack.enter_context(start(command)) for _ in range(3)]
        for sweeper in sweepers:
            assert sweeper.stdout is not None and sweeper.stdout.readline() == "ready\n"
        for sweeper in sweepers:
            assert sweeper.stdin is not None
            sweeper.stdin.write("\n")
            sweeper.stdin.flush()
        assert [sweeper.communicate(timeout=60) for sweeper in sweepers] == [("", "")] * 3
        repository.sweep()
        assert [*tree(data).values()] == [LARGE_BODY]
        repository.push(upload, "app", "x")
    assert tree(data) == {"app/x": LARGE_BODY}


@pytest.mark.parametrize("error", [errno.EXDEV, errno.EBUSY, errno.EINVAL, errno.EILSEQ, errno.ENAMETOOLONG])
def test_refusal_of_the_file_system_names_the_directory(
    data: Path, repository: a.Repository, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise OSError(error, os.strerror(error))

    push(repository, "x", b"one")
    for call, operation in (
        ("rename", lambda: push(repository, "x", b"two")), ("mkdir", lambda: push(repository, "d/x", b"two")),
        ("rename", lambda: repository.delete_directory("app")),
    ):  # fmt: skip
        with monkeypatch.context() as patch, pytest.raises(a.CannotStore, match="'app'") as caught:
            patch.setattr(os, call, refuse)
            operation()
        assert str(data) not in caught.value.detail
        assert tree(data) == {"app/x": b"one"}
    push(repository, "d/x", b"two")
    assert tree(data) == {"app/x": b"one", "app/d/x": b"two"}


def test_large_folders_are_listed_as_small_ones(
    data: Path, repository: a.Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = ["a", "a-b", "a.d/x", "a.d/y", "b", "d/e/f", "d/g", "d-", "d0", "é", "🎈", *map(str, range(20))]
    for id in ids:
        push(repository, id, b"1")
    (data / "app/.hidden").touch()
    (data / "app/back\\slash").touch()
    open(os.fsencode(data) + b"/app/\xff", "w").close()
    filters = ["", "a", "a.d", "a.d/", "a.d/x", "d", "d/e/f", "d/g", "é", "1", "19", "z"]
    for limit in a.KNOWN, 3:
        monkeypatch.setattr(a, "KNOWN", limit)
        for prefix, after in itertools.product(filters, filters):
            found = [artefact.id for artefact in repository.artefacts("app", prefix=prefix, after=after)]
            assert found == sorted(id for id in ids if id.startswith(prefix) and id > after)


def test_name_that_is_missing_while_it_is_replaced_is_found(data: Path, repository: a.Repository) -> None:
    """Rename the file away before it is replaced, as an NFS client does that has it open."""
    file, away, new = data / "app/x", data / "app/.nfs1", data / ".incoming/new"
    push(repository, "x", b"there")
    repository.files.pauses = (0.1,) * 20
    stop = threading.Event()

    def replace() -> None:
        while not stop.wait(0.04):
            new.write_bytes(b"there")
            file.rename(away)
            time.sleep(0.003)
            new.rename(file)
            away.unlink()

    with ThreadPoolExecutor(1) as other_host:
        replaced = other_host.submit(replace)
        try:
            end = time.monotonic() + 1
            while time.monotonic() < end:
                assert fetched(repository, "x") == b"there"
                assert [found.id for found in repository.artefacts("app")] == ["x"]
        finally:
            stop.set()
        replaced.result(10)


@pytest.mark.parametrize(
    ("call", "stale", "expected"),
    [
        ("scandir", "b", ["a/x", "c"]), ("scandir", "app", []), ("open", "b", ["a/x", "c"]),
        ("stat", "c", ["a/x", "b/x"]),
    ],
)
def test_what_another_host_removes_during_a_listing_is_skipped(
    data: Path, monkeypatch: pytest.MonkeyPatch, call: str, stale: str, expected: list[str]
) -> None:
    """Simulate NFS: a folder that is open, or a name in it, has a stale handle (ESTALE)."""

    def fail(file: Any, *args: Any, **options: Any) -> Any:
        name = os.readlink(f"/proc/self/fd/{file}") if call == "scandir" else file
        if os.path.basename(name) == stale:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return carry_out(file, *args, **options)

    repository, carry_out, unreadable = a.Repository(data), getattr(os, call), list[str]()
    for id in "a/x", "b/x", "c":
        push(repository, id, b"1")
    monkeypatch.setattr(os, call, fail)
    assert [artefact.id for artefact in repository.artefacts("app", unreadable=unreadable)] == expected
    assert not unreadable


# == Storage: metadata ============================================================================


def test_file_added_by_hand_is_an_artefact(data: Path, repository: a.Repository) -> None:
    add_file(data / "app/d/x.tar.gz", b"one", T1)
    [artefact] = repository.artefacts("app")
    assert artefact == a.Artefact("app", "d/x.tar.gz", 3, a.version_time(T1), "application/gzip", None)
    [artefact] = repository.artefacts("app", digests=True)
    assert (artefact.version, artefact.sha256) == (T1, sha256(b"one"))
    os.link(data / "app/d/x.tar.gz", data / "app/x.txt")  # the type follows the name
    assert [artefact.type for artefact in repository.artefacts("app")] == ["application/gzip", "text/plain"]
    (data / "app/x.txt").unlink()
    require_attributes(data)
    [artefact] = a.Repository(data).artefacts("app")  # the digest is stored with the file, not in the process
    assert artefact.sha256 == sha256(b"one")


@pytest.mark.parametrize("attributes", ["as they are", "not on this system", "refused"])
def test_types_and_digests_with_and_without_attributes(
    data: Path, repository: a.Repository, monkeypatch: pytest.MonkeyPatch, attributes: str
) -> None:
    def refuse(*_: object) -> bytes:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    if attributes == "as they are":
        require_attributes(data)
    elif attributes == "refused":
        monkeypatch.setattr(os, "getxattr", refuse, raising=False)
        monkeypatch.setattr(os, "setxattr", refuse, raising=False)
    else:
        monkeypatch.setattr(a, "HAS_ATTRIBUTES", False)
    assert push(repository, "x.txt", b"one", type="text/markdown").sha256 == sha256(b"one")
    for used in repository, a.Repository(data):
        for content, edited in (b"one", b"two"), (b"two", b"three"), (b"three", b"one"):
            with used.fetch("app", "x.txt") as current:
                assert current.digested().sha256 == sha256(content)
            with used.fetch("app", "x.txt") as current:
                assert current.artefact.sha256 == sha256(content)  # the stored digest
            (data / "app/x.txt").write_bytes(edited)  # edit in place
    with a.Repository(data).fetch("app", "x.txt") as current:
        assert current.artefact.type == ("text/markdown" if attributes == "as they are" else "text/plain")


@pytest.mark.parametrize("late", [False, True])
def test_digest_is_not_stored_for_bytes_changed_during_hashing(
    data: Path, repository: a.Repository, late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Overwrite a file while its digest is computed, or just after: the digest must not be stored."""
    file, compute, write = data / "app/x", a.sha256_of, a.write_digest
    add_file(file, b"one")

    def overwrites() -> None:
        if file.read_bytes() == b"one":
            file.write_bytes(b"two")

    def computes(fd: int) -> str:
        digest = compute(fd)
        if not late:
            overwrites()
        return digest

    def writes(*arguments: Any) -> None:
        if late:
            overwrites()
        write(*arguments)

    monkeypatch.setattr(a, "sha256_of", computes)
    monkeypatch.setattr(a, "write_digest", writes)
    with repository.fetch("app", "x") as content:
        assert content.digested().sha256 == sha256(b"one")
    with repository.fetch("app", "x") as content:
        assert content.digested().sha256 == sha256(b"two")


def test_caches_are_bounded(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = a.Repository(data)
    for number in range(9):
        push(repository, "x", b"%d" % number)
    assert len(repository.metadata.known) == 1  # replaced artefacts are not cached
    monkeypatch.setattr(a, "KNOWN", 4)
    repository = a.Repository(data)
    time.sleep(2 * a.TICK / 1e9)
    for number in range(9):
        push(repository, f"folder{number}/x", b"%d" % number)
        assert len(repository.metadata.known) <= 4 and len(repository.files.durable_folders) <= 4
        assert [*repository.artefacts("app", prefix=f"folder{number}")]
    time.sleep(2 * a.TICK / 1e9)
    for number in range(9):
        assert [*repository.artefacts("app", prefix=f"folder{number}")]
        assert sum(map(len, repository.files._listed.values())) < 4
    assert fetched(repository, "x") == b"8" and fetched(repository, "folder0/x") == b"0"
    monkeypatch.setattr(a, "MEMORY", 10_000)
    repository = a.Repository(data)
    time.sleep(2 * a.TICK / 1e9)
    for number in range(9):
        with repository.fetch("app", f"folder{number}/x", from_memory=True) as content:
            assert content.digested() and content.whole() == b"%d" % number
        assert len(repository.metadata.small) == number % 4 + 1


CHANGES: dict[str, Callable[[Path, Path], object]] = {  # each changes a file; another file stands beside it
    "edited in place": lambda file, other: file.write_bytes(b"two"),
    "another one under its name": lambda file, other: other.rename(file),
    "deleted": lambda file, other: file.unlink(),
    "moved": lambda file, other: file.rename(other),
    "a link to it": lambda file, other: file.symlink_to(file.rename(other)),
    "a link to its folder": lambda file, other: move_and_link(file.parent),
    "a link to its directory": lambda file, other: move_and_link(file.parents[1]),
}


def move_and_link(folder: Path) -> None:
    folder.symlink_to(folder.rename(folder.with_name("moved")))


@pytest.mark.parametrize("change", CHANGES)
def test_cached_content_reflects_changes_made_by_hand(
    data: Path, repository: a.Repository, change: str
) -> None:
    def fetched_from_memory() -> bytes:
        with repository.fetch("app", "d/x", from_memory=True) as content:
            assert content.digested().sha256 == sha256(content.whole())
            return content.whole()

    push(repository, "d/x", b"one")
    time.sleep(2 * a.TICK / 1e9)
    assert [fetched_from_memory() for _ in range(3)] == [b"one"] * 3 and len(repository.metadata.small) == 1
    add_file(data / "app/other", b"two", T3)
    CHANGES[change](data / "app/d/x", data / "app/other")
    if change in ("edited in place", "another one under its name"):
        assert fetched_from_memory() == fetched(repository, "d/x") == b"two"
    else:
        with pytest.raises(a.NotFound):
            fetched_from_memory()


def test_cache_does_not_hide_a_change_within_one_clock_tick(data: Path) -> None:
    repository = a.Repository(data, fsync=False)  # on a busy disk, an fsync takes longer than a tick
    quick = 0  # a busy machine may take longer than a tick, but not each time
    for number in range(20):
        pushed = time.time_ns()
        push(repository, "x", content := b"%02d" % number)
        with repository.fetch("app", "x", from_memory=True) as current:
            assert current.whole() == content
        if time.time_ns() < pushed + a.TICK // 2:  # file times may be some ms behind
            assert not repository.metadata.small
            quick += 1
        (data / "app/x").write_bytes(b"..")
        with repository.fetch("app", "x", from_memory=True) as current:
            assert current.whole() == b".."
    assert quick


# == Storage: upload ==============================================================================


@pytest.mark.parametrize("content", [b"", b"few", LARGE_BODY], ids=["none", "few", "many"])
def test_refused_or_abandoned_upload_leaves_no_file(
    data: Path, repository: a.Repository, content: bytes
) -> None:
    def refuse(current: a.Content | None) -> None:
        raise a.PreconditionFailed("no")

    with repository.stage() as upload:
        upload.write(content)
        assert list(tree(data).values()) == [content] * (content is LARGE_BODY)
    with pytest.raises(a.PreconditionFailed):
        push(repository, "x", content, check=refuse)
    with pytest.raises(a.TooLarge), repository.stage(limit=len(content)) as upload:
        upload.write(content)
        upload.write(b"1")
    with pytest.raises(a.OutOfSpace):
        repository.admit("app", "x", 1 << 62)
    assert tree(data) == {}


def test_digest_of_a_large_upload_in_uneven_pieces(data: Path, repository: a.Repository) -> None:
    sizes, content = random.Random(2), LARGE_BODY + LARGE_BODY[::-1]
    with repository.stage() as upload:
        rest = memoryview(content)
        while rest:
            size = sizes.choice([1, 5000, 70_000, 300_000])
            upload.write(bytes(rest[:size]))
            rest = rest[size:]
        upload.verify(len(content), sha256(content))
        for length, digest in ((len(content) + 1, None), (None, sha256(LARGE_BODY))):
            with pytest.raises(a.Mismatch):
                upload.verify(length, digest)
        artefact, _ = repository.push(upload, "app", "x")
    assert (artefact.size, artefact.sha256) == (len(content), sha256(content))
    assert tree(data) == {"app/x": content}


def test_digest_of_a_complete_upload_does_not_wait_for_other_uploads(repository: a.Repository) -> None:
    go, content = threading.Event(), LARGE_BODY * 4
    blocked = [a.hash_threads(os.getpid()).submit(go.wait, 20) for _ in range(os.cpu_count() or 1)]
    try:
        with repository.stage() as upload, repository.stage() as aborted:
            upload.write(content)
            aborted.write(content)
            upload.write(b"more")
            assert upload.digest() == sha256(content + b"more")
            upload.write(content)
            assert upload.digest() == sha256(content + b"more" + content)
        assert not any(other.done() for other in blocked)
    finally:
        go.set()


def test_upload_can_be_pushed_only_once(
    data: Path, repository: a.Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with repository.stage() as upload:
        upload.write(b"one")
        stored, _ = repository.push(upload, "app", "x")
        with pytest.raises(ValueError, match="stage another one"):
            repository.push(upload, "app", "y")
        with pytest.raises(ValueError, match="stage another one"):
            upload.write(b"more")
    with repository.stage() as upload:  # a failed fsync must not be retried: the kernel has dropped the pages
        upload.write(b"two")
        with monkeypatch.context() as patch, pytest.raises(OSError, match=os.strerror(errno.EIO)):
            patch.setattr(os, "fsync", fails)
            repository.push(upload, "app", "x")
        assert os.listdir(data / ".incoming") == []
        with pytest.raises(ValueError, match="stage another one"):
            repository.push(upload, "app", "x")
    assert tree(data) == {"app/x": b"one"} and list(repository.artefacts("app")) == [stored]


def test_large_upload_works_after_a_fork(data: Path) -> None:
    code = IMPORT + """
import os
def push(repository, id):
    with repository.stage() as upload:
        for _ in range(40):
            upload.write(bytes(100_000))
        repository.push(upload, "app", id)
repository = artefacts.Repository(sys.argv[1])
push(repository, "parent")
if child := os.fork():
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
push(repository, "child")
"""
    subprocess.run([sys.executable, "-c", code, data], check=True, timeout=20)
    assert sorted(tree(data)) == ["app/child", "app/parent"]


@pytest.mark.parametrize("copies", ["whole pieces", "a few bytes", "not here", "not between these"])
def test_copy_has_the_bytes_and_the_digest(
    repository: a.Repository, monkeypatch: pytest.MonkeyPatch, copies: str
) -> None:
    """Copy where copy_file_range works, returns early, is missing (macOS), or fails at once (EXDEV)."""
    if copies == "not here":
        monkeypatch.delattr(os, "copy_file_range", raising=False)
    elif not hasattr(os, "copy_file_range"):
        pytest.skip("there is no copy_file_range here")
    else:
        copy = os.copy_file_range

        def copy_some(source: int, target: int, count: int, offset: int) -> int:
            if copies == "not between these":
                raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
            return copy(source, target, min(count, 300_000) if copies == "a few bytes" else count, offset)

        monkeypatch.setattr(os, "copy_file_range", copy_some)
    for content in b"", b"few", LARGE_BODY:
        push(repository, "x", content)
        with repository.fetch("app", "x") as source, repository.stage() as upload:
            upload.copy(source)
            upload.verify(len(content), sha256(content))
            assert repository.push(upload, "app", "copy")[0].sha256 == sha256(content)
        assert fetched(repository, "copy") == content


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EIO, 0])
def test_failed_copy_is_not_continued(
    data: Path, repository: a.Repository, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    """Fail at once, or cut the source short (0): nothing is stored, and no other way of copying is tried."""

    def fail(source: int, target: int, count: int, offset: int) -> int:
        calls.append(offset)
        if error:
            raise OSError(error, os.strerror(error))
        os.truncate(data / "app/x", 1000)
        return copy(source, target, count, offset)

    if not hasattr(os, "copy_file_range"):
        pytest.skip("there is no copy_file_range here")
    calls, copy = list[int](), os.copy_file_range
    push(repository, "x", LARGE_BODY)
    monkeypatch.setattr(os, "copy_file_range", fail)
    expected = pytest.raises(OSError, match=os.strerror(error)) if error else pytest.raises(a.Damaged)
    with repository.fetch("app", "x") as source, expected:
        repository.promote(source, "other", "x")
    assert list(tree(data)) == ["app/x"] and calls == ([0] if error else [0, 1000])


# == Storage: versions ============================================================================


@pytest.mark.parametrize("keep", [0, 1, 2, a.ALL])
def test_keep_versions_limits_the_kept_versions(data: Path, keep: int) -> None:
    for keep_versions in keep, lambda directory: keep:
        repository = a.Repository(data, keep_versions=keep_versions)
        pushed = [push(repository, "d/x", b"%d" % n) for n in range(5)]
        earlier = {f"app/.versions/d/x/{pushed[n].version}": b"%d" % n for n in range(max(0, 4 - keep), 4)}
        assert tree(data) == {"app/d/x": b"4", **earlier}
        versions = [artefact.version for artefact in reversed(pushed)]
        listed = [(artefact.version, current) for artefact, current in repository.versions("app", "d/x")]
        assert listed == [(version, version == versions[0]) for version in versions[: keep + 1]]
        repository.delete_directory("app")


@pytest.mark.parametrize("keep", [0, 2, a.ALL])
@pytest.mark.parametrize("clock", ["stands still", "goes back", "was ahead"])
def test_versions_strictly_increase_and_are_modification_times(
    data: Path, monkeypatch: pytest.MonkeyPatch, clock: str, keep: int
) -> None:
    repository = a.Repository(data, keep_versions=keep)
    times = [push(repository, "x", b"0").time]
    if clock == "was ahead":
        os.utime(data / "app/x", ns=(4_102_444_800_000_000_999,) * 2)
        times = [4_102_444_800_000_000]
    else:
        hours, now = itertools.count(1) if clock == "goes back" else itertools.repeat(0), time.time_ns()
        monkeypatch.setattr(time, "time_ns", lambda: now - next(hours) * 3_600_000_000_000)
    for content in b"1", b"2", b"3":
        times.append(push(repository, "x", content).time)
        assert times[-1] == (data / "app/x").stat().st_mtime_ns // 1000
    repository.delete("app", "x")
    if keep:
        times.append(push(repository, "x", b"4").time)
    assert times == sorted({*times})
    versions = list((data / "app/.versions/x").glob("*"))
    assert len(versions) == min(keep, 4)
    assert {a.version_time(file.name) for file in versions} <= {*times}
    assert all(a.version_time(file.name) == file.stat().st_mtime_ns // 1000 for file in versions)


@pytest.mark.parametrize("keep", [5, a.ALL])
def test_version_name_is_not_reused_after_erase(data: Path, keep: int) -> None:
    repository = a.Repository(data, keep_versions=keep)
    push(repository, "x", b"one")
    os.utime(data / "app/x", times=(4_102_444_800, 4_102_444_800))
    push(repository, "x", b"two")
    repository.delete("app", "x")
    repository.erase("app", "x", "21000101T000000.000001Z")
    assert push(repository, "x", b"three").version == "21000101T000000.000002Z"
    repository.delete("app", "x")
    add_file(data / "app/x", b"of old", T1)
    repository.delete("app", "x")
    assert push(repository, "x", b"four").version == "21000101T000000.000003Z"


def test_version_at_an_instant(data: Path, repository: a.Repository) -> None:
    add_file(data / "app/.versions/x" / T1, b"1", T1)
    add_file(data / "app/.versions/x" / T2, b"2", T2)
    add_file(data / "app/x", b"3", T3)
    for version, following in (T1, T2), (T2, T3), (T3, "20990101T000000.000000Z"):
        for at in a.version_time(version), a.version_time(following) - 1:
            assert repository.version_at("app", "x", at) == version
    with pytest.raises(a.NotFound):
        repository.version_at("app", "x", a.version_time(T1) - 1)


def test_folder_named_like_a_version_is_not_a_version(data: Path) -> None:
    repository, below = a.Repository(data, keep_versions=1), f"x/{T1}"
    for content in b"1", b"2":
        push(repository, below, content)
    repository.delete("app", below)  # x is free again, but .versions/x still holds the folder of x/{T1}
    for content in b"3", b"4", b"5":
        push(repository, "x", content)
    assert sorted(tree(data).values()) == [b"2", b"4", b"5"]
    assert len(repository.versions("app", "x")) == 2
    repository.delete("app", "x", versions_too=True)
    assert [*tree(data).values()] == [b"2"] and len(repository.versions("app", below)) == 1


@pytest.mark.parametrize("then", ["push", "delete"])
@pytest.mark.parametrize("leftover", ["link", "copy", "other"])
def test_existing_file_under_the_version_name(data: Path, leftover: str, then: str) -> None:
    """Meet a link that a crash left before the rename, a copy, or a different file of a person."""
    repository, version = a.Repository(data, keep_versions=1), data / "app/.versions/x.txt" / T1
    add_file(data / "app/x.txt", b"one", T1)
    add_file(version, b"0ne" if leftover == "other" else b"one", T1)
    if leftover == "link":
        version.unlink()
        os.link(data / "app/x.txt", version)
    assert [current for _, current in repository.versions("app", "x.txt")] == [True]
    after = tree(data)
    if leftover == "other":  # nothing is lost: the current file gets the next free version name
        repository.keeps = lambda _: 2
        after[f"app/.versions/x.txt/{next_version(T1)}"] = b"one"
    if then == "push":
        push(repository, "x.txt", b"two")
        after["app/x.txt"] = b"two"
    else:
        repository.delete("app", "x.txt")
        del after["app/x.txt"]
    assert tree(data) == after
    assert {artefact.type for artefact, _ in repository.versions("app", "x.txt")} == {"text/plain"}


@pytest.mark.parametrize("keep", [3, a.ALL])
def test_files_with_equal_times_become_separate_versions(data: Path, keep: int) -> None:
    """Use a time ahead of the clock: each further version gets the next microsecond."""
    repository, far = a.Repository(data, keep_versions=keep), "21000101T000000.000000Z"
    for content in b"one", b"two":
        add_file(data / "app/x", content, far)
        repository.delete("app", "x")
    add_file(data / "app/x", b"three", far)
    assert push(repository, "x", b"four").time > a.version_time(far) + 2
    versions = [artefact.version for artefact, _ in repository.versions("app", "x")]
    contents = [fetched(repository, "x", version) for version in versions]
    assert contents == [b"four", b"three", b"two", b"one"] and len(set(versions)) == 4


def test_push_after_the_last_possible_time_is_refused(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository, last = a.Repository(data, keep_versions=3), "21000101T000000.000000Z"
    monkeypatch.setattr(a, "LAST_TIME", a.version_time(last))  # no file system can store the real last time
    add_file(data / "app/x", b"one", last)
    assert push(repository, "x", b"two").version == last
    with pytest.raises(a.Conflict, match="Touch"):
        push(repository, "x", b"three")
    assert fetched(repository, "x") == b"two"


def test_replaced_file_is_kept_even_with_an_old_time(data: Path) -> None:
    repository = a.Repository(data, keep_versions=1)
    for id in "replaced", "deleted":
        push(repository, id, b"one")
        push(repository, id, b"two")
        add_file(data / "app" / id, b"by hand", T1)
        if id == "replaced":
            push(repository, id, b"three")
        else:
            repository.delete("app", id)
        assert tree(data / "app/.versions" / id) == {T1: b"by hand"}


def test_file_without_a_valid_version_name_is_ignored(data: Path, versioned: a.Repository) -> None:
    for name in "20261399T000000.000000Z", "20260230T000000.000000Z":
        add_file(data / "app/.versions/x" / name, b"stray")
    push(versioned, "x", b"one")
    push(versioned, "x", b"two")
    versions = [artefact.version for artefact, _ in versioned.versions("app", "x")]
    assert [fetched(versioned, "x", version) for version in versions] == [b"two", b"one"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_file_of_another_user_becomes_a_version(data: Path) -> None:
    """Copy the file if fs.protected_hardlinks forbids to link it."""
    add_file(data / "app/x", b"one", T1)
    os.chown(data / "app/x", 1, 1)
    with Program(data, "--keep-versions", "3", before=without_privileges()) as program:
        assert program.ask(put("/artefacts/app/x", b"two")).status == 200
        assert program.get(f"/artefacts/app/x?version={T1}").body == b"one"
        assert program.ask(head("DELETE", "/artefacts/app/x")).status == 204


def test_names_of_10000_versions_are_read_without_opening_one(
    data: Path, repository: a.Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    def record(path: str, *args: Any, **options: Any) -> int:
        opened.append(os.path.basename(path))
        return carry_out(path, *args, **options)

    start, opened, carry_out = a.version_time(T1), list[str](), os.open
    names = [a.Artefact("", "", 0, start + number, "", None).version for number in range(10_000)]
    add_file(data / "app/x", b"current", T3)
    (data / "app/.versions/x").mkdir(parents=True)
    for name in names:
        (data / "app/.versions/x" / name).touch()
    monkeypatch.setattr(os, "open", record)
    assert repository.version_names("app", "x") == [(T3, True)] + [(name, False) for name in reversed(names)]
    assert repository.version_at("app", "x", start + 5000) == names[5000]
    assert not set(opened) & set(names) and len(opened) < 20
    repository.delete("app", "x", versions_too=True)
    assert not set(opened) & set(names) and len(opened) < 60
    assert tree(data) == {"app/": b""}


def test_names_of_versions_are_found_beside_a_stream_of_commits(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Commit after each lookup of the current artefact: the answer is of one moment, and comes."""

    def then_push(*args: Any, **options: Any) -> a.Content | None:
        content = find(*args, **options)
        with monkeypatch.context() as patch:
            patch.setattr(repository, "look_up", find)
            pushed.append(push(repository, "x", b"%d" % len(pushed)).version)
        return content

    repository, find = a.Repository(data, keep_versions=a.ALL, fsync=False), a.Repository(data).look_up
    pushed = [push(repository, "x", b"0").version]
    monkeypatch.setattr(repository, "look_up", then_push)
    names = repository.version_names("app", "x")
    assert [name for name, _ in names] == pushed[-2::-1] and [name for name, current in names if current] == [
        pushed[-2]
    ]


@pytest.mark.parametrize("year", [1960, 1969, 2099, 2106])
def test_times_other_than_now(data: Path, year: int) -> None:
    """Keep, fetch, restore and expire a file of another time. The epoch is the first version."""
    repository = a.Repository(data, keep_versions=2, keep_days=lambda _: 1)
    add_file(data / "app/x", b"old")
    seconds = (datetime(year, 6, 1, tzinfo=UTC) - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(seconds=1)
    os.utime(data / "app/x", (seconds, seconds))
    if (data / "app/x").stat().st_mtime != seconds:
        pytest.skip("the file system does not know this time")
    shown = f"{year}-06-01T00:00:00" if year > 1970 else "1970-01-01T00:00:00"
    [artefact] = repository.artefacts("app", digests=True)
    assert artefact.modified == f"{shown}.000000Z" and artefact.sha256 == sha256(b"old")
    assert [expired.id for expired in repository.expire(dry_run=True)] == (["x"] if year < 1970 else [])
    new = push(repository, "x", b"new")
    assert new.time == artefact.time + 1 if year > 2026 else new.time > a.version_time(T3)
    assert repository.version_names("app", "x") == [(new.version, True), (artefact.version, False)]
    assert fetched(repository, "x", artefact.version) == b"old"
    assert repository.version_at("app", "x", artefact.time) == artefact.version
    restored, _ = repository.restore("app", "x", artefact.version)
    assert restored.time > new.time and fetched(repository, "x") == b"old"
    assert [*repository.expire()] == [] and len(tree(data)) == 3


# == Storage: the repository ======================================================================


def test_push_creates_then_replaces(data: Path, repository: a.Repository) -> None:
    with repository.stage() as upload:
        upload.write(b"o")
        upload.write(b"ne")
        first, created = repository.push(upload, "app", "x.txt")
    mtime = (data / "app/x.txt").stat().st_mtime_ns
    assert created and mtime % 1000 == 0
    assert first == a.Artefact("app", "x.txt", 3, mtime // 1000, "text/plain", sha256(b"one"), is_utf8=True)
    assert tree(data) == {"app/x.txt": b"one"}
    assert repository.directories() == ["app"] and list(repository.artefacts("app")) == [first]

    with repository.stage() as upload:
        upload.write(b"two")
        second, created = repository.push(upload, "app", "x.txt", type="text/x-two")
    assert not created and second.time > first.time and second.type == "text/x-two"
    assert tree(data) == {"app/x.txt": b"two"}


def test_identical_push_changes_nothing(data: Path, versioned: a.Repository) -> None:
    first, before = push(versioned, "x", b"one"), (data / "app/x").stat()
    assert push(versioned, "x", b"one") == first
    assert (data / "app/x").stat() == before and tree(data) == {"app/x": b"one"}


def test_delete_restore_erase(data: Path, versioned: a.Repository) -> None:
    one, two = push(versioned, "d/x", b"one", type="text/x-one"), push(versioned, "d/x", b"two")
    v1, v2 = f"app/.versions/d/x/{one.version}", f"app/.versions/d/x/{two.version}"

    versioned.delete("app", "d/x")
    assert tree(data) == {v1: b"one", v2: b"two"}
    assert [current for _, current in versioned.versions("app", "d/x")] == [False, False]
    for operation in versioned.fetch, versioned.delete:
        with pytest.raises(a.NotFound):
            operation("app", "d/x")

    restored, created = versioned.restore("app", "d/x", one.version)
    assert created and restored.time > two.time and restored.type == "text/x-one"
    assert tree(data) == {"app/d/x": b"one", v1: b"one", v2: b"two"}
    with pytest.raises(a.Conflict):
        versioned.erase("app", "d/x", restored.version)

    versioned.delete("app", "d/x")
    v3 = f"app/.versions/d/x/{restored.version}"
    assert tree(data) == {v2: b"two", v3: b"one"}  # the oldest version is pruned
    versioned.erase("app", "d/x", two.version)
    assert tree(data) == {v3: b"one"}
    with pytest.raises(a.NotFound):
        versioned.erase("app", "d/x", two.version)

    push(versioned, "d/x", b"three")
    versioned.delete("app", "d/x", versions_too=True)
    assert tree(data) == {"app/": b""}
    with pytest.raises(a.NotFound):
        versioned.delete("app", "d/x", versions_too=True)
    with pytest.raises(a.NotFound):
        versioned.versions("app", "d/x")


def test_erasing_all_of_a_deleted_artefact_runs_the_check(data: Path, versioned: a.Repository) -> None:
    def refuse(current: a.Content | None) -> None:
        assert current is None
        raise a.PreconditionFailed("")

    push(versioned, "x", b"one")
    versioned.delete("app", "x")
    before = tree(data)
    with pytest.raises(a.PreconditionFailed):
        versioned.delete("app", "x", check=refuse, versions_too=True)
    assert tree(data) == before and list(before.values()) == [b"one"]


def test_deleted_directory_leaves_no_file(data: Path, versioned: a.Repository) -> None:
    for id, content in itertools.product(("x", "d/y"), (b"1", b"2")):
        push(versioned, id, content)
    add_file(data / "other/z", b"3")
    (data / "app/outside").symlink_to("../other")
    versioned.delete_directory("app")
    assert tree(data) == {"other/z": b"3"} and os.listdir(data / ".trash") == []
    with pytest.raises(a.NotFound):
        versioned.delete_directory("app")
    with pytest.raises(a.NotFound):
        list(versioned.artefacts("app"))


def test_listing_is_sorted_and_filtered(data: Path, repository: a.Repository) -> None:
    ids = ["a.b", "a/b", "a/b.c", "a/c/d", "a0", "B", " x", "é", "\N{OLD ITALIC LETTER A}", "a b", "z/z"]
    for id in ids:
        add_file(data / "app" / id, id.encode())
    for name in ".hidden", "a/.hidden", "new\nline", "back\\slash":
        add_file(data / "app" / name, b"not an artefact")
    os.mkfifo(data / "app/fifo")
    (data / "app/link").symlink_to("B")
    (data / "app/empty").mkdir()
    (data / ".other").mkdir()
    (data / "link").symlink_to("app")
    assert repository.directories() == ["app"]
    starts = ["", "a", "a/", "a/c", "a/c/", "b", "zz", *ids]
    for prefix, after in itertools.product(starts, starts):
        found = [artefact.id for artefact in repository.artefacts("app", prefix=prefix, after=after)]
        assert found == [id for id in sorted(ids) if id.startswith(prefix) and id > after]
    with pytest.raises(a.NotFound):
        repository.fetch("app", "fifo")


def test_open_content_survives_replacement_and_deletion(repository: a.Repository) -> None:
    push(repository, "x", LARGE_BODY)
    with repository.fetch("app", "x") as content:
        start = content.read(0, 1000)
        push(repository, "x", b"two")
        repository.delete("app", "x")
        repository.delete_directory("app")
        assert start + content.read(1000, len(LARGE_BODY)) == LARGE_BODY


def test_reader_never_sees_a_missing_or_mixed_artefact(data: Path) -> None:
    def write() -> None:
        for content in itertools.cycle(states):
            push(repository, "x", content)
            if enough.is_set():
                return

    repository, states = a.Repository(data, fsync=False), (b"a" * 100_000, b"b" * 200_000)
    seen, enough, deadline = [states[0]], threading.Event(), time.monotonic() + 30
    push(repository, "x", states[0])
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        try:
            while (len(seen) < 200 or len({*seen}) < 2) and time.monotonic() < deadline:
                seen.append(fetched(repository, "x"))
        finally:
            enough.set()
        writing.result()
    assert {*seen} == {*states}


def increment(data: str, times: int) -> None:
    """Increment a stored number several times. Each push requires that the number is still the one read."""
    repository = a.Repository(data, keep_versions=a.ALL)
    while times:
        number, seen = b"0", None
        with contextlib.suppress(a.NotFound), repository.fetch("app", "x") as content:
            number, seen = content.read(0, 99), content.digested().sha256

        def check(current: a.Content | None, seen: str | None = seen) -> None:
            if seen != (current and current.digested().sha256):
                raise a.PreconditionFailed("another was faster")

        with contextlib.suppress(a.PreconditionFailed):
            push(repository, "x", b"%d" % (int(number) + 1), check=check)
            times -= 1


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_exactly_one_of_many_conditional_writers_wins(
    data: Path, repository: a.Repository, kind: str
) -> None:
    """Count with conditional pushes: no increment is lost, and every state is kept as a version."""

    def run(_: int) -> None:
        if kind == "threads":
            increment(str(data), 10)
        else:
            command = [sys.executable, "-W", "error", "-c", program]
            subprocess.run(command, env=environment, check=True, timeout=60)

    program = f"import {__name__} as t; t.increment({str(data)!r}, 10)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, range(4)))
    digests = [artefact.sha256 for artefact, _ in repository.versions("app", "x")]
    assert digests == [sha256(b"%d" % n) for n in range(40, 0, -1)]


def test_same_bytes_with_another_type_are_a_new_version(data: Path, versioned: a.Repository) -> None:
    require_attributes(data)
    first = push(versioned, "x.txt", b"one")
    second = push(versioned, "x.txt", b"one", type="text/markdown")
    assert second.time > first.time and second.type == "text/markdown"
    for unspecific in None, "", "application/octet-stream", "text/markdown":
        assert push(versioned, "x.txt", b"one", type=unspecific) == second
    assert len(tree(data)) == 2
    restored, _ = versioned.restore("app", "x.txt", first.version)
    assert (restored.type, restored.is_utf8, restored.time > second.time) == ("text/plain", True, True)
    types = [artefact.type for artefact, _ in a.Repository(data).versions("app", "x.txt")]
    assert types == ["text/plain", "text/markdown", "text/plain"]


@pytest.mark.parametrize(("id", "content", "type", "expected"), [
    ("x.txt", "größe".encode(), None, True), ("x.txt", "größe".encode("latin-1"), None, False),
    ("x.txt", "größe".encode(), "text/plain", False), ("x.txt", "größe".encode(), "text/html", False),
    ("x.zip", b"one", None, False), ("x.txt", b"", None, True), ("x.txt", b"\xc3", None, False),
    ("x.txt", "é".encode() * 200_000, None, True), ("x.txt", b"a" + "é".encode() * 200_000, None, True),
    ("x.txt", b"a" * a.PIECE * 2 + b"\xff", None, False),
])  # fmt: skip
def test_text_that_is_utf8_is_known_to_be(
    data: Path, repository: a.Repository, id: str, content: bytes, type: str | None, expected: bool
) -> None:
    require_attributes(data)
    assert push(repository, id, content, type=type).is_utf8 == expected
    for used in repository, a.Repository(data):
        with used.fetch("app", id) as found:
            assert found.artefact.is_utf8 == expected
    add_file(data / f"by-hand/{id}", content)
    with repository.fetch("by-hand", id) as found:
        assert found.digested().is_utf8 == (expected or type is not None)
    os.link(data / f"app/{id}", data / "app/x.html")  # another name has its own type
    with repository.fetch("app", "x.html") as found:
        assert not found.artefact.is_utf8


def test_deleted_artefacts_are_found_with_their_newest_version(data: Path, versioned: a.Repository) -> None:
    for id in "d/x", "d/y", "z", "z/below", "current":
        with contextlib.suppress(a.Conflict):
            push(versioned, id, b"1")
    newest = {id: push(versioned, id, b"2").version for id in ("d/x", "d/y", "z", "current")}
    assert [*versioned.deleted("app")] == []
    for id in "d/x", "d/y", "z":
        versioned.delete("app", id)
    add_file(data / "app/.versions/z/no version", b"by hand")
    add_file(data / "app/.versions" / T1, b"of no artefact")
    del newest["current"]
    assert {artefact.id: artefact.version for artefact in versioned.deleted("app")} == newest
    assert [artefact.id for artefact in versioned.deleted("app", prefix="d/", after="d/x")] == ["d/y"]
    versioned.restore("app", "z", newest["z"])
    versioned.delete("app", "d/y", versions_too=True)
    assert [(artefact.id, artefact.size) for artefact in versioned.deleted("app")] == [("d/x", 1)]
    with pytest.raises(a.NotFound):
        [*versioned.deleted("other")]
    add_file(data / "plain/x", b"1")
    assert [*versioned.deleted("plain")] == []


# == Storage: promote =============================================================================


def test_promote_an_artefact_and_a_version(data: Path, versioned: a.Repository) -> None:
    require_attributes(data)
    first = push(versioned, "x.txt", LARGE_BODY, type="text/x-first")
    push(versioned, "x.txt", b"second")
    with versioned.fetch("app", "x.txt", first.version) as source:
        promoted, created = versioned.promote(source, "releases", "1.0/x.bin")
    assert created and promoted.time > first.time
    assert (promoted.type, promoted.sha256) == ("text/x-first", first.sha256)
    with versioned.fetch("app", "x.txt") as source:
        replaced, created = versioned.promote(source, "releases", "1.0/x.bin")
        assert not created and (replaced.type, replaced.is_utf8) == ("text/plain", False)
        assert versioned.promote(source, "releases", "1.0/x.bin") == (replaced, False)  # nothing changes
        assert versioned.promote(source, "releases", "x.txt")[0].is_utf8  # its type comes from its name
    with versioned.fetch("app", "x.txt") as source:  # an artefact onto itself
        assert versioned.promote(source, "app", "x.txt") == (source.artefact, False)
    assert tree(data) == {
        "app/x.txt": b"second", f"app/.versions/x.txt/{first.version}": LARGE_BODY,
        "releases/x.txt": b"second", "releases/1.0/x.bin": b"second",
        f"releases/.versions/1.0/x.bin/{promoted.version}": LARGE_BODY,
    }  # fmt: skip


def test_refused_promotion_changes_nothing(
    data: Path, repository: a.Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(current: a.Content | None) -> None:
        assert current is not None
        raise a.PreconditionFailed("")

    require_attributes(data)
    push(repository, "x", LARGE_BODY)
    push(repository, "target", b"old")
    push(repository, "folder/x", b"")
    before = tree(data)
    with repository.fetch("app", "x") as source:
        for error, target, options in (
            (a.TooLarge, "target", {"limit": len(LARGE_BODY) - 1}), (a.InvalidName, ".x", {}),
            (a.PreconditionFailed, "target", {"check": refuse}), (a.Conflict, "folder", {}),
        ):  # fmt: skip
            with pytest.raises(error):
                repository.promote(source, "app", target, **options)
        with monkeypatch.context() as patch, pytest.raises(a.OutOfSpace):
            patch.setattr(os, "statvfs", lambda _: os.statvfs_result((4096, 4096, *[1] * 8)))
            repository.promote(source, "app", "target")
    assert tree(data) == before
    damage(data / "app/x", bytes(10))
    with repository.fetch("app", "x") as source, pytest.raises(a.Damaged):
        repository.promote(source, "app", "target")
    os.truncate(data / "app/x", 10)
    assert tree(data) == before | {"app/x": bytes(10)}


def test_exactly_one_of_many_promotions_wins(data: Path, repository: a.Repository) -> None:
    """Promote different sources to one new name: the check under the lock admits the first one only."""

    def absent(current: a.Content | None) -> None:
        if current is not None:
            raise a.PreconditionFailed("")

    def promote(number: int) -> bool:
        with repository.fetch("app", str(number)) as source, contextlib.suppress(a.PreconditionFailed):
            together.wait(20)
            return repository.promote(source, "releases", "x", check=absent)[1]
        return False

    together = threading.Barrier(8)
    for number in range(8):
        push(repository, str(number), b"%d" % number * 100_000)
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(promote, range(8)))
    assert won.count(True) == 1
    assert tree(data / "releases") == {"x": b"%d" % won.index(True) * 100_000}
    assert os.listdir(data / ".incoming") == []


# == Storage: retention ===========================================================================

DAYS = {"nightly": 30, "app": 30, "forever": None}


def make_old(file: Path, days: float = 40) -> None:
    """Let the last push of an artefact be this long ago."""
    time_ns = (time.time_ns() // 1000 - int(days * a.DAY)) * 1000
    with contextlib.suppress(OSError, AttributeError):
        os.removexattr(file, a.PUSHED_ATTRIBUTE)
    os.utime(file, ns=(time_ns, time_ns))


@pytest.fixture
def expiring(data: Path) -> a.Repository:
    """Return a repository that keeps two versions, and artefacts for the days of DAYS."""
    return a.Repository(data, keep_versions=2, keep_days=lambda directory: DAYS[directory])


def test_expire_deletes_what_was_not_pushed_for_days(data: Path, expiring: a.Repository) -> None:
    for directory, name in itertools.product(DAYS, ("d/old", "edge", "new")):
        add_file(data / directory / name, name.encode())
    add_file(data / f"nightly/.versions/d/old/{T1}", b"version of the old one")
    add_file(data / f"nightly/.versions/gone/{T1}", b"version of a deleted one")
    add_file(data / f"nightly/.versions/new/{T1}", b"version of the new one")
    for directory in DAYS:
        make_old(data / directory / "d/old", 30.1)
        make_old(data / directory / "edge", 29.9)
        make_old(data / directory / "new", 0)
    before = tree(data)
    expired = [(artefact.directory, artefact.id) for artefact in expiring.expire(dry_run=True)]
    assert expired == [("app", "d/old"), ("nightly", "d/old"), ("nightly", "gone")] and tree(data) == before
    assert [(artefact.directory, artefact.id) for artefact in expiring.expire()] == expired
    assert tree(data) == {
        f"nightly/.versions/new/{T1}": b"version of the new one",
        **{f"{directory}/{name}": name.encode() for directory in DAYS for name in ("edge", "new")},
        "forever/d/old": b"d/old",
    }  # fmt: skip
    for name in "edge", "new":
        make_old(data / "app" / name)
    assert [artefact.id for artefact in expiring.expire()] == ["edge", "new"]
    assert [*expiring.expire()] == [] and tree(data / "app") == {} and (data / "app").is_dir()


def test_push_of_the_same_bytes_renews_an_artefact(data: Path, expiring: a.Repository) -> None:
    require_attributes(data)
    add_file(data / "app/x", b"one")
    make_old(data / "app/x")
    with expiring.fetch("app", "x") as content:
        before = content.digested()
    assert [artefact.id for artefact in expiring.expire(dry_run=True)] == ["x"]
    assert push(expiring, "x", b"one") == before  # clients see no change
    assert [*expiring.expire()] == [] and tree(data) == {"app/x": b"one"}
    assert [*a.Repository(data, keep_days=lambda _: 30).expire()] == []  # it is stored with the file
    tomorrow = a.Repository(data, keep_days=lambda _: -1)
    assert [artefact.id for artefact in tomorrow.expire(dry_run=True)] == ["x"]
    unlimited = a.Repository(data)
    make_old(data / "app/x")
    push(unlimited, "x", b"one")  # costs nothing where no artefact expires
    assert [artefact.id for artefact in expiring.expire()] == ["x"] and tree(data) == {"app/": b""}


def test_renewal_is_durable(
    data: Path, events: Events, expiring: a.Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    def record(fd: int, name: str, value: bytes) -> None:
        events.append(("setxattr", name))
        carry_out(fd, name, value)

    require_attributes(data)
    carry_out = os.setxattr
    push(expiring, "x", b"one")
    events.clear()
    monkeypatch.setattr(os, "setxattr", record)
    push(expiring, "x", b"one")
    in_order(events, ("setxattr", a.PUSHED_ATTRIBUTE), ("fsync", data / "app/x"))


@pytest.mark.parametrize("attributes", ["not on this system", "refused", "out of space"])
def test_artefact_that_cannot_be_renewed_is_stored_again(
    data: Path, expiring: a.Repository, monkeypatch: pytest.MonkeyPatch, attributes: str
) -> None:
    """Without attributes, a new version keeps the bytes of a push from expiring. It is never just lost."""

    def refuse(*_: object) -> None:
        code = errno.ENOSPC if attributes == "out of space" else errno.ENOTSUP
        raise OSError(code, os.strerror(code))

    add_file(data / "app/x", b"one")
    make_old(data / "app/x")
    [*expiring.artefacts("app", digests=True)]
    if attributes == "not on this system":
        monkeypatch.setattr(a, "HAS_ATTRIBUTES", False)
    else:
        monkeypatch.setattr(os, "setxattr", refuse, raising=False)
    if attributes == "out of space":
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            push(expiring, "x", b"one")
    else:
        push(expiring, "x", b"one")
        assert [*expiring.expire()] == [] and tree(data)["app/x"] == b"one" and len(tree(data)) == 2


def test_expire_continues_after_errors_and_finishes_what_was_left(
    data: Path, expiring: a.Repository, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Fail to remove one artefact, and die between an artefact and its versions."""

    def unlink(name: str, **options: Any) -> None:
        if name in ("b", T1):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        carry_out(name, **options)

    for name in "a", "b", "c", f".versions/c/{T1}", "d":
        add_file(data / "app" / name, name.encode())
    carry_out = os.unlink
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", unlink)
        assert [artefact.id for artefact in expiring.expire()] == ["a", "d"]
    assert re.findall("app/. cannot be deleted", caplog.text) == [
        "app/b cannot be deleted", "app/c cannot be deleted", "app/c cannot be deleted",
    ]  # fmt: skip
    assert sorted(tree(data)) == [f"app/.versions/c/{T1}", "app/b"]
    assert [artefact.id for artefact in expiring.expire()] == ["b", "c"] and tree(data) == {"app/": b""}


def test_expire_continues_after_what_cannot_be_read(data: Path) -> None:
    code = IMPORT + """
repository = artefacts.Repository(sys.argv[1], keep_days=lambda _: 30)
print(*(f"{artefact.directory}/{artefact.id}" for artefact in repository.expire()))
"""
    stays = [
        "a/x", f"b/.versions/y/{T1}", "b/x", f"c/.versions/closed/{T1}", f"c/.versions/file/{T2}", "c/file",
        "c/folder/x",
    ]  # fmt: skip
    for name in *stays, f"c/.versions/gone/{T1}", f"c/.versions/old/{T1}", "c/old", "d/x":
        add_file(data / name, b"")
    closed = ["a", "b/.versions", "c/.versions/closed", f"c/.versions/old/{T1}", "c/file", "c/folder"]
    for name in closed:
        (data / name).chmod(0)
    command = [*without_privileges(), sys.executable, "-c", code, str(data)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "c/old c/gone d/x\n"
    assert done.stderr.count("Permission denied") == 7 and "Traceback" not in done.stderr
    for name in closed:
        with contextlib.suppress(FileNotFoundError):
            (data / name).chmod(0o755)
    assert sorted(tree(data)) == [*stays, "d/"]


def test_directory_deleted_during_expire(
    data: Path, expiring: a.Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "app/x", "app/y", "nightly/x":
        add_file(data / name, b"")
    expired = expiring.expire()
    assert next(expired).id == "x"
    expiring.delete_directory("app")
    assert [artefact.directory for artefact in expired] == ["nightly"]
    monkeypatch.setattr(expiring, "directories", lambda: ["app"])  # deleted after it was listed
    assert [*expiring.expire()] == []


def expire_until_killed(data: str) -> None:
    """Expire again and again, and print a line for each deletion."""
    repository = a.Repository(data, keep_days=lambda _: 30)
    while True:
        for artefact in repository.expire():
            print(artefact.id, flush=True)


@pytest.mark.parametrize("content", [b"same", None], ids=["same bytes", "new bytes"])
@pytest.mark.parametrize("kind", ["thread", "process"])
def test_artefact_that_is_being_pushed_is_not_expired(
    data: Path, expiring: a.Repository, kind: str, content: bytes | None
) -> None:
    """Expire all the time. An artefact whose push was acknowledged is there until it is old again."""

    def expire() -> None:
        while not enough.is_set():
            expired.extend(artefact.id for artefact in expiring.expire())

    def deletions() -> int:
        return len(expired) if kind == "thread" else output.read_text().count("x\n")

    require_attributes(data)
    enough, expired, output = threading.Event(), list[str](), data.with_name("output")
    program = f"import {__name__} as t; t.expire_until_killed({str(data)!r})"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with contextlib.ExitStack() as stack:
        if kind == "thread":
            running = stack.enter_context(ThreadPoolExecutor(1)).submit(expire)
            stack.callback(enough.set)
        else:
            command = [sys.executable, "-W", "error", "-c", program]
            log = stack.enter_context(output.open("w"))
            process = subprocess.Popen(command, env=environment, stdout=log)
            stack.callback(process.wait)
            stack.callback(process.kill)
        deadline, number = time.monotonic() + 60, 0
        while deletions() < 30 or number < 100:
            assert time.monotonic() < deadline and (kind == "process" or not running.done())
            body, number = content or b"%d" % number, number + 1
            push(expiring, "x", body)
            with contextlib.suppress(FileNotFoundError):
                make_old(data / "app/x")
            assert push(expiring, "x", body).sha256 == sha256(body)
            for _ in range(3):
                assert fetched(expiring, "x") == body
                time.sleep(0.001)


# == Storage: checks at start and while running ===================================================


def test_check_health(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = a.Repository(tmp_path / "data")
    repository.check_health()
    assert tree(tmp_path / "data") == {}
    with monkeypatch.context() as patch, pytest.raises(a.OutOfSpace):
        patch.setattr(os, "statvfs", lambda _: os.statvfs_result((4096, 4096, *[1] * 8)))
        repository.check_health()
    with monkeypatch.context() as patch, pytest.raises(OSError, match="other bytes"):
        patch.setattr(os, "pread", lambda *_: b"\0" * 6)
        repository.check_health()
    (tmp_path / "data").rename(tmp_path / "away")
    with pytest.raises((a.Unavailable, FileNotFoundError)):
        repository.check_health()
    assert tree(tmp_path) == {"away/.incoming/": b"", "away/.locks/": b"", "away/.trash/": b""}


def test_directories_whose_versions_the_next_push_erases_are_named(
    data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in "kept", "dropped":
        add_file(data / name / f".versions/x/{T1}", b"")
    add_file(data / "plain/x", b"")
    a.Repository(data, keep_versions=lambda directory: int(directory == "kept")).check_directories()
    assert [record.getMessage() for record in caplog.records] == [
        "'dropped' has versions: keep_versions = 0 makes a push erase them"
    ]


# == Storage: durability ==========================================================================


def test_each_step_of_a_commit_is_durable_before_the_next(
    data: Path, events: Events, versioned: a.Repository
) -> None:
    app, versions = data / "app", data / "app/.versions"
    one = push(versioned, "d/x", b"one")
    in_order(events, ("fsync", app / "d/x"), ("rename", "x"), ("fsync", app / "d"))
    in_order(events, ("mkdir", "app"), ("fsync", data), ("mkdir", "d"), ("fsync", app), ("rename", "x"))
    events.clear()
    two = push(versioned, "d/x", b"two")
    in_order(events, ("fsync", app / "d/x"), ("rename", "x"), ("fsync", app / "d"))
    in_order(events, ("mkdir", ".versions"), ("fsync", app), ("mkdir", "d"), ("fsync", versions))
    in_order(events, ("mkdir", "x"), ("fsync", versions / "d"), ("link", one.version), ("rename", "x"))
    in_order(events, ("link", one.version), ("fsync", versions / "d/x"), ("rename", "x"))
    push(versioned, "d/y", b"so that the folder stays")
    events.clear()
    versioned.delete("app", "d/x")
    in_order(events, ("link", two.version), ("fsync", versions / "d/x"), ("unlink", "x"))
    in_order(events, ("unlink", "x"), ("fsync", app / "d"))
    versioned.erase("app", "d/x", one.version)
    in_order(events, ("unlink", one.version), ("fsync", versions / "d/x"))
    events.clear()
    versioned.delete_directory("app")
    assert events[0][0] == "rename"
    in_order(events, ("fsync", data))


def test_recreated_or_foreign_folder_is_fsynced(data: Path, events: Events) -> None:
    """Fsync a recreated folder, which may have the inode of the old one, and one of another process."""
    repository = a.Repository(data)
    for by_another in False, False, True:
        if by_another:
            (data / "app/d").mkdir(parents=True)
            repository = a.Repository(data)
        events.clear()
        push(repository, "d/x", b"one")
        in_order(events, ("fsync", data), ("fsync", data / "app"), ("rename", "x"))
        assert (("mkdir", "d") in events) != by_another
        repository.delete_directory("app")


def test_failed_fsync_leaves_the_old_state_and_is_not_retried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, events: Events
) -> None:
    def started(name: str) -> a.Repository:
        repository = a.Repository(tmp_path / name, keep_versions=2)
        push(repository, "d/x", b"one")
        events.clear()
        return repository

    push(started("good"), "d/x", b"two")
    count = [call for call, _ in events[: events.index(("rename", "x"))]].count("fsync")
    assert count >= 4  # the staging file, the parents of new folders, the version's folder
    carry_out = os.fsync
    for failing in range(count):
        repository, calls = started(f"fails {failing}"), itertools.count()

        def fsync(fd: int, failing: int = failing, calls: itertools.count[int] = calls) -> None:
            if next(calls) == failing:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            carry_out(fd)

        with monkeypatch.context() as patch, pytest.raises(OSError, match=os.strerror(errno.EIO)):
            patch.setattr(os, "fsync", fsync)
            push(repository, "d/x", b"two")
        assert next(calls) == failing + 1  # no fsync after the failed one
        assert not any(name.startswith(".incoming") for name in tree(Path(repository.root)))
        assert [current for _, current in repository.versions("app", "d/x")] == [True]
        assert fetched(repository, "d/x") == b"one"
        push(repository, "d/x", b"two")
        assert fetched(repository, "d/x") == b"two" and len(repository.versions("app", "d/x")) == 2


def test_fsync_can_be_disabled(data: Path, events: Events) -> None:
    repository = a.Repository(data, keep_versions=2, fsync=False)
    one = push(repository, "x", b"one")
    push(repository, "x", LARGE_BODY)
    repository.restore("app", "x", one.version)
    repository.erase("app", "x", one.version)
    repository.delete("app", "x")
    repository.delete("app", "x", versions_too=True)
    repository.delete_directory("app")
    assert events and "fsync" not in {call for call, _ in events}


# == Storage: damage ==============================================================================


def test_damaged_version_is_not_restored(data: Path, versioned: a.Repository) -> None:
    require_attributes(data)
    one = push(versioned, "x", b"one")
    push(versioned, "x", b"two")
    add_file(data / "app/.versions/x" / one.version, b"0ne", one.version)  # as by a failing disk
    with pytest.raises(a.Damaged):
        versioned.restore("app", "x", one.version)
    assert fetched(versioned, "x") == b"two"


@pytest.mark.parametrize("attributes", [True, False])
def test_push_of_the_same_bytes_repairs_a_damaged_artefact(
    data: Path, repository: a.Repository, attributes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(a, "HAS_ATTRIBUTES", attributes)
    for size in 10, 2_000_000:
        content, file = os.urandom(size), data / f"app/{size}"
        push(repository, file.name, content)
        damage(file, bytes(10))
        push(repository, file.name, content)
        assert file.read_bytes() == content
        repaired = file.stat()
        push(repository, file.name, content)
        assert file.stat() == repaired  # an undamaged file is not written again


def test_verify_distinguishes_damage_from_change(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    repository = a.Repository(data, keep_versions=1)
    for content in b"one", b"two":
        push(repository, "kept/x", content)
    for name in "whole", "edited":
        push(repository, name, b"as it was stored")
    verify = ["--data", str(data), "--verify", "--no-fsync"]
    assert a.main(verify) == 0
    assert capsys.readouterr().out == "4 whole, 0 new, 0 changed, 0 damaged\n"

    (data / "app/edited").write_bytes(b"edited in place")
    (data / "app/dropped").write_bytes(b"dropped in by hand")
    (version,) = (data / "app/.versions/kept/x").iterdir()
    damage(version, b"0ne")
    assert a.main(verify) == 1
    *found, counts = capsys.readouterr().out.splitlines()
    assert sorted(line.rpartition(" ")[0] for line in found) == [
        "changed: app/edited", "damaged: app/kept/x", "new: app/dropped",
    ]  # fmt: skip
    assert any(line.endswith(version.name) for line in found)
    assert counts == "2 whole, 1 new, 1 changed, 1 damaged"

    with pytest.raises(a.Damaged):  # a damaged version cannot become current
        repository.restore("app", "kept/x", version.name)
    assert a.main(verify) == 1  # the stored digest that shows the damage is still there
    assert capsys.readouterr().out.splitlines()[-1] == "4 whole, 0 new, 0 changed, 1 damaged"


def test_verify_shows_progress_on_a_terminal(data: Path) -> None:
    for name in "ab":
        add_file(data / "app" / name, bytes(3_000_000))
    terminal, theirs = pty.openpty()
    command = [sys.executable, a.__file__, "--data", str(data), "--verify"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs, text=True, timeout=60)
    os.close(theirs)
    written = b""
    with contextlib.suppress(OSError):  # EIO at the end of the output
        while piece := os.read(terminal, 1 << 16):
            written += piece
    os.close(terminal)
    new, *_, counts = done.stdout.splitlines()
    assert new.startswith("new: app/a ") and counts == "0 whole, 2 new, 0 changed, 0 damaged"
    half, whole = "#" * 20 + " " * 20, "#" * 40
    shown = written.decode().replace("\033[K", "").split("\r")
    assert [line for line in shown if line.startswith("[")] == [
        f"[{half}]  50%, 1 files ", f"[{whole}] 100%, 2 files ",
    ]  # fmt: skip


def test_verify_continues_after_an_unreadable_file(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    id = "/".join(["i" * 203] * 5)[:1015]  # the paths of its versions are longer than an id may be
    for name, content in ("a", b"one"), (id, b"one"), (id, b"two"), ("z", b"one"):
        push(a.Repository(data, keep_versions=1), name, content)
    (version,) = (data / "app/.versions" / id).iterdir()
    damage(version, b"0ne")
    (data / "app/a").chmod(0)
    for folder in "app/closed", "closed":
        add_file(data / folder / "x", b"")
        (data / folder).chmod(0)
    os.symlink("a", data / "app/latest")  # a link is not an artefact and is not reported
    os.mkfifo(data / "app/fifo")
    command = [*without_privileges(), sys.executable, str(PROGRAM), "--data", str(data), "--verify"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    *found, counts = done.stdout.splitlines()
    closed = ["unreadable: closed/", "unreadable: closed/.versions/"]
    damaged = f"damaged: app/{id} {version.name}"
    assert found == ["unreadable: app/a", "unreadable: app/closed/", damaged, *closed]
    assert counts == "2 whole, 0 new, 0 changed, 1 damaged, 4 unreadable" and done.returncode == 1
    assert done.stderr.count("Permission denied") == 4 and "Traceback" not in done.stderr
    for folder in "app/closed", "closed":
        (data / folder).chmod(0o755)


def test_verify_creates_no_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert a.main(["--verify", "--data", str(tmp_path / "typo")]) == 2 and not os.listdir(tmp_path)
    assert "typo: The data directory does not exist" in capsys.readouterr().err
    add_file(tmp_path / "backup/app/x", b"one")
    assert a.main(["--verify", "--data", str(tmp_path / "backup")]) == 0
    assert os.listdir(tmp_path / "backup") == ["app"]


# == HTTP semantics, as tables ====================================================================

SEMANTICS: Rules = [
    (a.http_date, [(TIME, "Sun, 06 Nov 1994 08:49:37 GMT")]),
    (a.http_seconds, [(date, TIME) for date in (
        "Sun, 06 Nov 1994 08:49:37 GMT", "Sunday, 06-Nov-94 08:49:37 GMT", "Sun Nov  6 08:49:37 1994")]),
    (a.http_seconds, [(text, None) for text in (
        None, "", "yesterday", "784111777", "Sun, 32 Nov 1994 08:49:37 GMT")]),
    (a.instant, [
        ("2024-01-01T00:00:00.000001Z", 1704067200_000001), ("2024-01-01t01:00:00+01:00", 1704067200_000000),
        ("2024-01-01T01:00:00 01:00", 1704067200_000000), ("2023-12-31", 1704067199_999999),
        ("2024-01-01T00:00:00z", 1704067200_000000), ("2024-01-01T00:00:00.0000019Z", 1704067200_000001),
    ]),
    (a.instant, [(text, HTTPBadRequest) for text in (
        "", "now", "2024-01-01T00:00:00", "2024-02-30", "2024", T1 + "0")]),
    (a.content_disposition, [
        ("x.txt", "inline; filename=\"x.txt\"; filename*=UTF-8''x.txt"),
        ("a \"b\\;", "inline; filename=\"a \\\"b\\\\;\"; filename*=UTF-8''a%20%22b%5C%3B"),
        ("é€", "inline; filename=\"\xc3\xa9\xe2\x82\xac\"; filename*=UTF-8''%C3%A9%E2%82%AC"),
    ]),
    (a.preferred_format, [(None, accept, "json") for accept in (
        "*/*", "", "application/json", "garbage", "image/png", "text/html;q=0.5, application/json;q=0.6")]),
    (a.preferred_format, [
        (None, "text/plain", "sha256sums"), (None, "Text/HTML", "html"),
        (None, ",text/html, ,", "html"), ("json", "text/html", "json"),
        ("sha256sums", "*/*", "sha256sums"), ("pdf", "*/*", HTTPBadRequest), ("", "*/*", HTTPBadRequest),
    ]),
    (a.announced_sha256, [
        ({}, None), ({"HTTP_REPR_DIGEST": f"sha-256=:{B64}:"}, DIGEST),
        ({"HTTP_DIGEST": f"SHA-256={B64}"}, DIGEST), ({"HTTP_REPR_DIGEST": "sha-512=:eA==:"}, None),
        ({"HTTP_CONTENT_DIGEST": f"md5=:x:, sha-256 = :{B64}: , sha-512=:y:"}, DIGEST),
        ({"HTTP_X_CHECKSUM_SHA256": f" {DIGEST.upper()} "}, DIGEST),
        ({"HTTP_DIGEST": f"SHA-256={B64}", "HTTP_X_CHECKSUM_SHA256": DIGEST}, DIGEST),
        ({"HTTP_DIGEST": f"SHA-256={B64}", "HTTP_X_CHECKSUM_SHA256": OTHER}, HTTPBadRequest),
    ]),
    (a.announced_sha256, [({"HTTP_" + field: value}, HTTPBadRequest) for field, value in (
        ("REPR_DIGEST", f"sha-256={B64}"), ("REPR_DIGEST", "sha-256=::"), ("DIGEST", f"SHA-256={DIGEST}"),
        ("DIGEST", "SHA-256="), ("X_CHECKSUM_SHA256", B64), ("X_CHECKSUM_SHA256", ""))]),
    (a.byte_range, [(field, None, 10, '"e"', TIME, part) for field, part in (
        ("bytes=0-0", (0, 1)), ("bytes=2-5", (2, 4)), ("bytes=5-", (5, 5)), ("bytes=-3", (7, 3)),
        ("bytes=-99", (0, 10)), ("bytes=8-99", (8, 2)), ("BYTES= 1-2 ", (1, 2)),
        ("bytes=0-" + "9" * 5000, (0, 10)))]),
    (a.byte_range, [(field, None, 10, '"e"', TIME, None) for field in (
        "", "bytes=0-1,3-4", "bytes=5-2", "bytes=-", "bytes=", "bytes=a-b", "lines=0-1", "0-1",
        "bytes=0x1-2", "bytes=\u0661-\u0662", "bytes=+1-2")]),
    (a.byte_range, [(field, None, 10, '"e"', TIME, HTTPRangeNotSatisfiable) for field in (
        "bytes=10-", "bytes=99-100", "bytes=-0", "bytes=" + "9" * 5000 + "-")]),
    (a.byte_range, [(field, None, 0, '"e"', TIME, None) for field in (
        "bytes=0-", "bytes=-5", "bytes=0-0", "bytes=-0", "bytes=9-")]),
    (a.byte_range, [("bytes=2-5", '"e"', 10, '"e"', None, (2, 4)), ("bytes=2-5", DATE, 10, '"e"', None, None),
                    ("bytes=2-5", "x", 10, '"e"', None, None)]),
    (a.byte_range, [("bytes=2-5", same, 10, '"e"', TIME, (2, 4)) for same in ('"e"', DATE)]),
    (a.byte_range, [("bytes=2-5", other, 10, '"e"', TIME, None) for other in (
        '"f"', 'W/"e"', LATER, EARLIER, "", "e")]),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "case"), cases_of(SEMANTICS))
def test_http_rule(rule: Callable[..., object], case: tuple[Any, ...]) -> None:
    check_rule(rule, case)


READ, WRITE = "GET HEAD", "PUT POST DELETE"
ANY = f"{READ} {WRITE}"
Expected = type[Exception] | int | None
PRECONDITIONS: list[tuple[Expected, str, str | None, list[str]]] = [
    # expected result, methods, current entity tag (its time is TIME), header fields: RFC 9110 §13.2.2
    (None, ANY, '"e"', ['If-None-Match: "e-br"', 'If-None-Match: "-gzip"', 'If-None-Match: "e-gzip-gzip"']),
    (412, ANY, '"e"', ['If-Match: "e-gzip"']), (412, WRITE, '"e"', ['If-None-Match: "e-gzip"']),
    (304, READ, '"e"', ['If-None-Match: "e-gzip"', 'If-None-Match: "f", W/"e-gzip"']),
    (None, ANY, '"e"', [
        "", 'If-Match: "e"', 'If-Match: "f" , "e"', 'If-Match: ,"e",', "If-Match: *", "If-Match:  * ",
        f"If-Unmodified-Since: {DATE}", f"If-Unmodified-Since: {LATER}", "If-Unmodified-Since: yesterday",
        f'If-Match: "e" | If-Unmodified-Since: {EARLIER}', 'If-None-Match: "f"', "If-None-Match: ",
    ]),
    (412, ANY, '"e"', [
        'If-Match: "f"', 'If-Match: "f,e"', 'If-Match: W/"e"', 'If-Match: "E"', "If-Match: ", "If-Match: e",
        'If-Match: "e", f', 'If-Match: *, "e"', f"If-Unmodified-Since: {EARLIER}",
        f'If-Match: "f" | If-Unmodified-Since: {LATER}', 'If-Match: "f" | If-None-Match: "e"',
        f'If-Unmodified-Since: {EARLIER} | If-None-Match: "e"',
    ]),
    (None, ANY, None, ["", f"If-Unmodified-Since: {EARLIER}", "If-None-Match: *", 'If-None-Match: "e"']),
    (412, ANY, None, ['If-Match: "e"', "If-Match: *"]),
    (304, READ, '"e"', [
        'If-None-Match: "e"', 'If-None-Match: "f", W/"e"', "If-None-Match: *", f"If-Modified-Since: {DATE}",
        f"If-Modified-Since: {LATER}", 'If-Match: "e" | If-None-Match: "e"',
        f'If-Match: "e" | If-Modified-Since: {LATER}',
    ]),
    (None, READ, '"e"', [
        "If-None-Match: e", f"If-Modified-Since: {EARLIER}", "If-Modified-Since: yesterday",
        f'If-None-Match: "f" | If-Modified-Since: {LATER}',
    ]),
    (412, WRITE, '"e"', ['If-None-Match: "e"', 'If-None-Match: W/"e"', "If-None-Match: *"]),
    (None, WRITE, '"e"', [f"If-Modified-Since: {LATER}"]),
    (HTTPBadRequest, WRITE, '"e"', ["If-None-Match: e", 'If-None-Match: "f" x "g"']),
]  # fmt: skip


@pytest.mark.parametrize(
    ("expected", "methods", "etag", "fields"),
    [(expected, methods, etag, fields) for expected, methods, etag, rows in PRECONDITIONS for fields in rows],
)
def test_precondition(expected: Expected, methods: str, etag: str | None, fields: str) -> None:
    pairs = (field.partition(": ") for field in fields.split(" | ") if field)
    conditions = {"HTTP_" + name.upper().replace("-", "_"): value for name, _, value in pairs}
    for method in methods.split():
        with pytest.raises(expected) if isinstance(expected, type) else contextlib.nullcontext():
            assert a.failed_precondition(method, conditions, etag, TIME if etag else None) == expected


@pytest.mark.parametrize(("method", "status", "fields"), [
    ("GET", 304, {"If-None-Match": TWO}), ("HEAD", 304, {"If-None-Match": TWO}),
    ("GET", 304, {"If-Modified-Since": MODIFIED}), ("GET", 200, {"If-None-Match": ONE}),
    ("GET", 304, {"If-None-Match": TWO, "Range": "bytes=9-"}), ("PUT", 200, {"If-Match": TWO}),
    ("PUT", 200, {"If-None-Match": ONE}),
    ("PUT", 200, {"If-Unmodified-Since": MODIFIED}), ("PUT", 200, {"X-Checksum-Sha256": NEW[1:-1]}),
    ("DELETE", 204, {"If-Match": "*"}), ("DELETE", 204, {"If-Match": f"{ONE}, {TWO}"}),
])  # fmt: skip
def test_conditional_request(
    data: Path, client: testing.TestClient, method: str, status: int, fields: dict[str, str]
) -> None:
    result = call(client, f"{method} /artefacts/app/x.txt", headers=fields)
    assert result.status_code == status and "Content-Range" not in result.headers
    if status == 304:
        whole = call(client, "GET /artefacts/app/x.txt").headers
        for name in "ETag", "Last-Modified", "Cache-Control", "Artefact-Version":
            assert result.headers[name] == whole[name]
        assert result.content == b""
    assert tree(data).get("app/x.txt") == {"PUT": b"new", "DELETE": None}.get(method, b"two")


def test_ranges(client: testing.TestClient) -> None:
    """Check an artefact that is sent from memory and one that is streamed."""
    for content in b"0123456789", LARGE_BODY:
        call(client, "PUT /artefacts/app/x", body=content)
        size, etag = len(content), f'"{sha256(content)}"'
        for field, start, stop in (
            ("bytes=2-5", 2, 6), ("bytes=-3", size - 3, size), (f"bytes=1-{size * 2}", 1, size),
        ):  # fmt: skip
            for fields in {}, {"If-Range": etag}:
                part = call(client, "GET /artefacts/app/x", headers={"Range": field, **fields})
                assert (part.status_code, part.content == content[start:stop]) == (206, True)
                assert part.headers["Content-Range"] == f"bytes {start}-{stop - 1}/{size}"
                assert part.headers["ETag"] == etag
        for field, if_range in ("bytes=0-1,3-4", etag), ("lines=0-1", etag), ("bytes=2-5", ONE):
            whole = call(client, "GET /artefacts/app/x", headers={"Range": field, "If-Range": if_range})
            assert (whole.status_code, whole.content == content) == (200, True)
            assert whole.headers["Content-Length"] == str(size) and "Content-Range" not in whole.headers


def test_if_range_with_a_date_needs_a_minute_without_a_change(program: Program) -> None:
    path, file = "/artefacts/settled/x", program.data / "settled/x"
    program.ask(put(path, b"aaaaaaaa"))
    date = program.get(path).headers["Last-Modified"]
    program.ask(put(path, b"bbbbbbbb"))
    for age, status in (0, 200), (50, 200), (70, 206), (-100, 200):  # seconds since the change
        if age:
            os.utime(file, (0, time.time() - age))
            date = program.get(path).headers["Last-Modified"] or a.http_date(int(time.time()) - age)
        answer = program.get(path, "Range: bytes=4-", f"If-Range: {date}")
        assert (answer.status, answer.body) == (status, b"bbbb" * (2 if status == 200 else 1)), age
    etag = program.get(path).etag
    assert program.get(path, "Range: bytes=4-", f"If-Range: {etag}").status == 206


def test_any_range_of_an_empty_artefact_gets_200(program: Program) -> None:
    program.ask(put("/artefacts/app/empty", b""))
    for field in "bytes=0-", "bytes=0-0", "bytes=-1", "bytes=5-9":
        answer = program.get("/artefacts/app/empty", f"Range: {field}")
        assert (answer.status, answer.body, answer.headers["Content-Length"]) == (200, b"", "0"), field


@pytest.mark.parametrize(("name", "body", "announced", "type"), [
    ("x.txt", "grün\n".encode(), None, "text/plain; charset=utf-8"),
    ("x.txt", b"gr\xfcn", None, "text/plain"), ("x.txt", b"", None, "text/plain; charset=utf-8"),
    ("x.html", b"<p>ascii", None, "text/html; charset=utf-8"),
    ("x.txt", "grün".encode(), "text/plain", "text/plain"), ("x", "grün".encode(), None, BASIC),
    ("x.txt", "grün".encode(), "text/html;charset=x", "text/html;charset=x"),
    ("x.json", b"{}", None, "application/json"),
    ("x.txt", "ü".encode() * 200_000, BASIC, "text/plain; charset=utf-8"),
    ("x.txt", "ü".encode() * 200_000 + b"\xc3", None, "text/plain"),
])  # fmt: skip
def test_charset_of_text(
    empty_client: testing.TestClient, name: str, body: bytes, announced: str | None, type: str
) -> None:
    fields = {} if announced is None else {"Content-Type": announced}
    stored = call(empty_client, f"PUT /artefacts/app/{name}", body=body, headers=fields).json
    assert stored["type"] == type.removesuffix("; charset=utf-8")
    for method in "GET", "HEAD":
        assert call(empty_client, f"{method} /artefacts/app/{name}").headers["Content-Type"] == type


def test_push_of_the_same_bytes_with_another_type(program: Program) -> None:
    path = "/artefacts/types/x.txt"
    assert program.ask(put(path, b"same")).status == 201
    for sent, status in ("text/x-a", 200), ("text/x-a", 200), (BASIC, 200), ("text/x-b", 200):
        answer = program.ask(put(path, b"same", f"Content-Type: {sent}"))
        expected = "text/x-a" if sent == BASIC else sent
        assert (answer.status, json.loads(answer.body)["type"]) == (status, expected)
        assert program.get(path).headers["Content-Type"] == expected


# == Resources over HTTP ==========================================================================

WITHOUT_X = {"app/f/y": b"why"}
REQUESTS: list[tuple[str, int, bytes, dict[str, bytes]]] = [
    # request, status, start of the response body, tree afterwards
    ("GET /", 200, b'{"directories": [', INITIAL),
    ("GET /app", 200, b'{"directory": "app", "artefacts": [{', INITIAL),
    ("DELETE /app", 204, b"", {}),
    ("GET /app/x.txt", 200, b"two", INITIAL),
    ("GET /app/f/y", 200, b"why", INITIAL),
    (f"GET /app/x.txt?version={T1}", 200, b"one", INITIAL),
    (f"GET /app/x.txt?version={T2}", 200, b"two", INITIAL),
    ("GET /app/x.txt?at=2024-01-01", 200, b"one", INITIAL),
    ("GET /app/x.txt?at=2024-01-02T00:00:00.000002Z", 200, b"two", INITIAL),
    ("GET /app/x.txt?versions", 200, b'{"directory": "app", "id": "x.txt", "versions": [{', INITIAL),
    ("POST /app/n", 201, b'{"directory": "app", "id": "n", ', {**INITIAL, "app/n": b"new"}),
    ("POST /app/f/g/n", 201, b"{", {**INITIAL, "app/f/g/n": b"new"}),
    (RESTORE, 201, b"{", {**INITIAL, "app/x.txt": b"one", f"app/.versions/x.txt/{T2}": b"two"}),
    ("PUT /app/n", 201, b"{", {**INITIAL, "app/n": b"new"}),
    ("PUT /new/n", 201, b'{"directory": "new", "id": "n", ', {**INITIAL, "new/n": b"new"}),
    ("PUT /app/x.txt", 200, b"{", {**INITIAL, "app/x.txt": b"new", f"app/.versions/x.txt/{T2}": b"two"}),
    ("DELETE /app/x.txt", 204, b"",
     {f"app/.versions/x.txt/{T2}": b"two", f"app/.versions/x.txt/{T1}": b"one", **WITHOUT_X}),
    (f"DELETE /app/x.txt?version={T1}", 204, b"", {"app/x.txt": b"two", **WITHOUT_X}),
    ("DELETE /app/x.txt?versions", 204, b"", WITHOUT_X),
]  # fmt: skip


@pytest.mark.parametrize("slash", ["", "/"])
@pytest.mark.parametrize("base", ["/artefacts", "/artefact"])
@pytest.mark.parametrize(("line", "status", "answer", "after"), REQUESTS, ids=[row[0] for row in REQUESTS])
def test_request(
    data: Path, client: testing.TestClient, base: str, slash: str,
    line: str, status: int, answer: bytes, after: dict[str, bytes],
) -> None:  # fmt: skip
    method, _, target = line.partition(" ")
    path, _, query = target.partition("?")
    target = f"{base}{path.rstrip('/')}{slash}?unknown=1&{query}"
    result = call(client, f"{method} {target}")
    assert result.status_code == status and result.content.startswith(answer) and tree(data) == after
    if status == 204:
        assert result.content == b""
    elif method == "GET":
        head = call(client, f"HEAD {target}")
        assert (head.status_code, head.content, head.headers) == (200, b"", result.headers)
    else:
        stored = result.json
        assert set(stored) == {"directory", "id", "href", "version", "size", "type", "sha256", "modified"}
        assert result.headers["ETag"] == f'"{stored["sha256"]}"'
        assert result.headers.get("Location") == (stored["href"] if status == 201 else None)
        assert call(client, f"GET {stored['href']}").content == after[f"{stored['directory']}/{stored['id']}"]
    options = call(client, f"OPTIONS {target}")
    assert options.status_code == 200 and method in options.headers["Allow"].split(", ")


def test_header_fields_of_an_artefact(data: Path, client: testing.TestClient) -> None:
    digest = base64.b64encode(hashlib.sha256(b"two").digest()).decode()
    expected = {
        "content-type": "text/plain; charset=utf-8", "content-length": "3", "etag": TWO,
        "cache-control": "no-cache, no-transform",
        "cross-origin-resource-policy": "same-origin",
        "last-modified": MODIFIED, "accept-ranges": "bytes", "x-content-type-options": "nosniff",
        "repr-digest": f"sha-256=:{digest}:", "digest": f"SHA-256={digest}",
        "link": '</artefacts/app/x.txt?versions>; rel="version-history"', "artefact-version": T2,
        "content-disposition": "inline; filename=\"x.txt\"; filename*=UTF-8''x.txt",
    }  # fmt: skip
    headers = dict(call(client, "GET /artefacts/app/x.txt").headers)
    assert headers.pop("content-security-policy") == (
        "sandbox allow-same-origin; default-src 'none'; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data:; media-src 'self'; font-src 'self'")
    assert headers == expected
    at = call(client, "GET /artefacts/app/x.txt?at=2024-01-01").headers
    assert at["Cache-Control"] == "no-cache, no-transform"
    earlier = call(client, f"GET /artefacts/app/x.txt?version={T1}").headers
    assert (earlier["Cache-Control"], earlier["ETag"]) == ("max-age=31536000, immutable", ONE)
    assert earlier["Artefact-Version"] == T1


def test_last_modified_of_any_time(data: Path, client: testing.TestClient) -> None:
    """Check that a time before 1970 counts as 1970, and a time in the future as none."""
    epoch = "Thu, 01 Jan 1970 00:00:00 GMT"
    for name, seconds, date in (
        ("1960", -315619200, epoch), ("1969", -1, epoch), ("1970", 0, epoch),
        ("2001", 10**9, "Sun, 09 Sep 2001 01:46:40 GMT"),
        ("2099", 4070908800, None), ("2106", 4294967296, None),
    ):  # fmt: skip
        path, file = f"/artefacts/times/{name}", data / "times" / name
        add_file(file, b"old")
        os.utime(file, ns=(0, seconds * 10**9))
        assert call(client, f"GET {path}").headers.get("Last-Modified") == date, name
        own = date or a.http_date(seconds)
        fresh = call(client, f"GET {path}", headers={"If-Modified-Since": own})
        assert fresh.status_code == (200 if date is None else 304), name
        for since in own, epoch if date is None else own:  # ours always holds; none is ignored
            assert call(client, f"PUT {path}", headers={"If-Unmodified-Since": since}).status_code == 200
            add_file(file, b"old")
            os.utime(file, ns=(0, seconds * 10**9))
        stale = call(client, f"PUT {path}", headers={"If-Unmodified-Since": "Wed, 31 Dec 1969 00:00:00 GMT"})
        assert stale.status_code == (200 if date is None else 412), name


def test_listings_must_be_revalidated(client: testing.TestClient) -> None:
    for target, method in itertools.product(("", "/app", "/app/x.txt?versions"), ("GET", "HEAD")):
        for format in "json", "html":
            headers = call(client, f"{method} /artefacts{target}", headers={"Accept": f"*/{format}"}).headers
            assert (headers["Cache-Control"], headers["X-Content-Type-Options"]) == ("no-cache", "nosniff")


def test_specific_type_of_the_client_is_stored(client: testing.TestClient) -> None:
    by_name, form = "application/gzip", "application/x-www-form-urlencoded"
    for sent, stored in (form, by_name), (BASIC, by_name), ("text/x-n; a=b", "text/x-n; a=b"):
        call(client, f"PUT /artefacts/app/{sent}.tar.gz", headers={"Content-Type": sent})
        headers = call(client, f"GET /artefacts/app/{sent}.tar.gz").headers
        assert headers["Content-Type"] == stored and "Content-Encoding" not in headers


def test_identical_put_changes_nothing(data: Path, client: testing.TestClient) -> None:
    before = call(client, "GET /artefacts/app/x.txt").headers
    result = call(client, "PUT /artefacts/app/x.txt", body=b"two")
    assert (result.status_code, result.json["version"], tree(data)) == (200, T2, INITIAL)
    assert call(client, "GET /artefacts/app/x.txt").headers == before


def test_body_over_max_size_is_refused(data: Path) -> None:
    client = testing.TestClient(a.create_app(data, max_size=5, fsync=False))
    chunked = {"wsgi.input_terminated": True, "CONTENT_LENGTH": "", "HTTP_TRANSFER_ENCODING": "chunked"}
    for extras, content, status in (
        ({}, b"12345", 201), ({}, b"123456", 413), (chunked, b"12346", 200), (chunked, b"123456", 413),
    ):  # fmt: skip
        assert call(client, "PUT /artefacts/app/x", body=content, extras=extras).status_code == status
    assert tree(data) == {"app/x": b"12346"}


def test_listings(client: testing.TestClient) -> None:
    def artefact(id: str, content: bytes, modified: str, type: str) -> dict[str, Any]:
        return {
            "directory": "app", "id": id, "href": f"/artefacts/app/{id}", "size": 3, "type": type,
            "sha256": sha256(content), "modified": modified, "version": re.sub("[-:]", "", modified),
        }  # fmt: skip

    x = artefact("x.txt", b"two", "2024-01-02T00:00:00.000002Z", "text/plain")
    y = artefact("f/y", b"why", "2024-01-03T00:00:00.000003Z", BASIC)
    earlier = artefact("x.txt", b"one", "2024-01-01T00:00:00.000001Z", "text/plain")
    directory = {"directory": "app", "href": "/artefacts/app/"}
    assert call(client, "GET /artefacts/").json == {"directories": [directory]}
    listing = call(client, "GET /artefacts/app")
    assert listing.json == {"directory": "app", "artefacts": [{**y, "sha256": None}, {**x, "sha256": None}]}
    assert listing.headers["Vary"] == "Accept"
    for target, accept in ("/artefacts/app?format=sha256sums", "*/*"), ("/artefacts/app", "text/plain"):
        sums = call(client, f"GET {target}", headers={"Accept": accept})
        assert sums.text == f"{sha256(b'why')}  f/y\n{sha256(b'two')}  x.txt\n"
        assert sums.headers["Content-Type"].startswith("text/plain") and sums.headers["Vary"] == "Accept"
    assert call(client, "GET /artefacts/app", headers={"Accept": "image/png"}).json["artefacts"] == [y, x]
    assert call(client, "GET /artefacts/app?prefix=f/").json["artefacts"] == [y]
    assert call(client, "GET /artefacts/app?after=f/y").json["artefacts"] == [x]
    x |= {"href": f"/artefacts/app/x.txt?version={T2}", "current": True}
    earlier |= {"href": f"/artefacts/app/x.txt?version={T1}", "current": False}
    versions = call(client, "GET /artefacts/app/x.txt?versions").json
    assert versions == {"directory": "app", "id": "x.txt", "versions": [x, earlier]}


@pytest.mark.parametrize("format", ["tar", "sha256sums", "json"])
def test_head_of_a_listing_has_the_fields_of_get(tree_url: str, format: str) -> None:
    headers = []
    with closing(http.client.HTTPConnection(urlsplit(tree_url).netloc, timeout=30)) as connection:
        for method in ("GET", "HEAD", "GET"):  # one connection: HEAD must not leave body bytes behind
            connection.request(method, f"/artefacts/tree?format={format}")
            answer = connection.getresponse()
            assert bool(answer.read()) == (method == "GET")
            headers.append(dict(answer.getheaders()) | {"Date": "", "Transfer-Encoding": ""})
    assert headers[0] == headers[1] == headers[2]


def test_sha256sum_checks_a_download(tree_url: str, tmp_path: Path) -> None:
    for artefact in run_curl(tree_url)[1]["artefacts"]:
        (tmp_path / artefact["id"]).parent.mkdir(parents=True, exist_ok=True)
        with urlopen(f"http://{urlsplit(tree_url).netloc}{artefact['href']}") as answer:
            (tmp_path / artefact["id"]).write_bytes(answer.read())
    check = (f"{tree_url}?format=sha256sums", "sha256sum --strict --quiet -c -", tmp_path)
    assert pipe(*check).returncode == 0
    (tmp_path / "1.0/less").write_bytes(b"y" * 511)
    assert pipe(*check).stdout == "1.0/less: FAILED\n"


def test_preconditions_apply_to_forms(empty_client: testing.TestClient, data: Path) -> None:
    for field in ({"If-Match": '"0"'}, {"If-Match": "*"}, {"If-None-Match": "0"}):
        for path in "/artefacts/app", "/artefacts/app/id":
            body = part(b"a") + b"--XX--\r\n"
            result = empty_client.simulate_post(path, headers=FORM | field, body=body)
            assert result.status_code == (400 if "If-None-Match" in field else 412), (field, path)
    assert tree(data / "app") == {}


# == Resources over HTTP: forms ===================================================================


def test_curl_pushes_the_files_of_a_form(served: Program, tmp_path: Path) -> None:
    files = {"a b.bin": b"\r\n--a\0\xff", "empty": b"", "ü ☃.html": b"<p>"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    arguments = [argument for name in files for argument in ("-F", f"file=@{tmp_path / name}")]
    status, answer = run_curl(*arguments, "-F", "comment=no file", f"{served.url}curl/")
    assert (status, answer["directory"], answer["refused"]) == (201, "curl", [])
    assert (ids(answer), tree(served.data / "curl")) == (list(files), files)
    assert answer["artefacts"] == run_curl(f"{served.url}curl/")[1]["artefacts"]
    assert answer["artefacts"][2]["type"] == "text/html"
    file = f"file=@{tmp_path / 'empty'};type=image/png;filename=x"
    status, answer = run_curl("-F", file, f"{served.url}curl")
    assert (status, answer["artefacts"][0]["type"]) == (201, "image/png")


@pytest.mark.parametrize(
    ("name", "id"),
    [
        (b"folder/sub/a", "a"), (b"/a", "a"), (rb"C:\folder\a", "a"), (b"../a", "a"), (rb"..\\..\\a", "a"),
        (rb"a \"quoted\" name", 'a "quoted" name'), (b"100%; a=b", "100%; a=b"), ("ü ☃".encode(), "ü ☃"),
        (b"..", None), (b".hidden", None), (b"folder/", None), (b"\x01", None), (b"x" * 256, None),
        (b"\xff", None), (b"say %22hi%22", 'say "hi"'),
    ],
)  # fmt: skip
def test_part_is_named_after_its_file_without_folders(
    empty_client: testing.TestClient, data: Path, name: bytes, id: str | None
) -> None:
    result = post(empty_client, "/artefacts/app/", part(b"before"), part(name), part(b"later"))
    assert result.status_code == (201 if id else 400)
    assert tree(data / "app") == dict.fromkeys(("before", id, "later") if id else ("before",), b"content")
    assert set(ids(result.json)) == set(tree(data / "app"))
    assert [refused["status"] for refused in result.json["refused"]] == ([] if id else [400])


def test_form_without_a_file_is_refused(empty_client: testing.TestClient, data: Path) -> None:
    nothing, field = part(b"", b""), b'--XX\r\nContent-Disposition: form-data; name="f"\r\n\r\nx\r\n'
    for parts in ((nothing,), (field,), ()):
        result = post(empty_client, "/artefacts/app", *parts)
        assert (result.status_code, tree(data / "app")) == (400, {})
        assert "no file" in result.json["detail"]
    assert post(empty_client, "/artefacts/app", field, nothing, part(b"a"), nothing).status_code == 201
    assert tree(data / "app") == {"a": b"content"}


@pytest.mark.parametrize(("name", "status"), [("there", 409), (".name", 400)])
def test_a_form_stops_at_its_first_refusal(data: Path, name: str, status: int) -> None:
    client = testing.TestClient(a.create_app(data, fsync=False, max_size=1000))
    post(client, "/artefacts/app", part(b"there"))
    bad = part(name.encode(), b"x")
    result = post(client, "/artefacts/app", part(b"before"), bad, part(b"later"), part(b"there"))
    assert (result.status_code, result.json["status"]) == (status, status)
    assert result.headers["Content-Type"] == "application/problem+json"
    [refused] = result.json["refused"]
    assert (refused["id"], refused["status"]) == (name, status) and refused["detail"]
    assert result.json["detail"].startswith(refused["detail"]) and ids(result.json) == ["before"]
    assert tree(data / "app") == dict.fromkeys(("there", "before"), b"content")
    assert not any((data / ".incoming").iterdir())


def test_truncated_form_stores_only_whole_files(empty_client: testing.TestClient, data: Path) -> None:
    files = {"one": b"1\r\n--X\r\n", "two": b"\r\n\r\n--XYno"}
    form = b"".join(part(name.encode(), content) for name, content in files.items()) + b"--XX--"
    for cut in range(len(form)):
        result = empty_client.simulate_post(f"/artefacts/{cut}", headers=FORM, body=form[:cut])
        found = tree(data / str(cut))
        assert result.status_code == 400, cut
        assert found.items() <= files.items(), cut
        assert ids(result.json) == list(found), cut
    assert empty_client.simulate_post("/artefacts/all", headers=FORM, body=form).status_code == 201


@pytest.mark.parametrize(
    ("boundary", "body"),
    [
        (boundary, part(b"a") + b"--XX--")
        for boundary in ("", "; boundary=", f"; boundary={'X' * 71}", "; boundary=YY", '; boundary="\xe9"')
    ] + [("; boundary=XX", body) for body in (
        b"", b"no form", part(b"a") + b"--YY--\r\n", part(b"a") + part(b"b" * 9000) + b"--XX--\r\n",
        part(b"a") + part(b"b", more=b"\r\nContent-Transfer-Encoding: base64") + b"--XX--\r\n",
        b"--XX\r\n\r\nno fields\r\n--XX--\r\n",
        b"--XX\r\nContent-Disposition: form-data; filename*=no-such''%e9\r\n\r\nx\r\n--XX--\r\n",
    )],
)  # fmt: skip
def test_malformed_form_is_refused(
    empty_client: testing.TestClient, data: Path, boundary: str, body: bytes
) -> None:
    fields = {"Content-Type": f"multipart/form-data{boundary}"}
    result = empty_client.simulate_post("/artefacts/app", headers=fields, body=body)
    assert (result.status_code, bool(result.json["detail"])) == (400, True)
    assert ids(result.json) == list(tree(data / "app"))


def test_part_type_comes_from_its_header_or_its_name(empty_client: testing.TestClient) -> None:
    said = (b"", b"\r\nContent-Type: text/plain", b"\r\nContent-Type: application/octet-stream")
    parts = [part(b"%d.html" % number, more=more) for number, more in enumerate(said)]
    types = [artefact["type"] for artefact in post(empty_client, "/artefacts/app", *parts).json["artefacts"]]
    assert types == ["text/html", "text/plain", "text/html"]


def test_digest_of_a_form_is_refused(empty_client: testing.TestClient, data: Path) -> None:
    digest = {"X-Checksum-Sha256": sha256(b"content")}
    body = part(b"a") + b"--XX--\r\n"
    result = empty_client.simulate_post("/artefacts/app", headers=FORM | digest, body=body)
    assert (result.status_code, tree(data / "app")) == (400, {}) and "PUT" in result.json["detail"]


def test_part_with_an_invalid_type_gets_the_type_of_its_name(empty_client: testing.TestClient) -> None:
    result = post(empty_client, "/artefacts/app", part(b"a.html", more=b"\r\nContent-Type: \xff/\xff"))
    assert [artefact["type"] for artefact in result.json["artefacts"]] == ["text/html"]


def test_form_is_never_stored_as_it_is(empty_client: testing.TestClient, data: Path) -> None:
    assert post(empty_client, "/artefacts/app/1.0/x", part(b"other")).status_code == 201
    assert post(empty_client, "/artefacts/app/1.0/x", part(b"other", b"2")).status_code == 409
    assert post(empty_client, "/artefacts/app/two", part(b"a"), part(b"b", b"2")).status_code == 409
    assert empty_client.simulate_put("/artefacts/app/put", headers=FORM, body=part(b"a")).status_code == 415
    assert empty_client.simulate_post("/artefacts/app", body=b"no form").status_code == 415
    assert tree(data / "app") == {"1.0/x": b"content", "two": b"content"}


def test_chunked_form_on_a_streaming_server(empty_client: testing.TestClient, data: Path) -> None:
    response = testing.StartResponseMock()
    empty_client.app(streamed_form(io.BytesIO(part(b"a") + b"--XX--\r\n")), response)
    assert (response.status, tree(data / "app")) == ("201 Created", {"a": b"content"})


@pytest.mark.parametrize("breaks", ["in a file", "between files", "at once"])
def test_chunked_form_whose_stream_raises(
    empty_client: testing.TestClient, data: Path, breaks: str
) -> None:
    class Breaking(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if not (piece := super().read(size)):
                raise ValueError("Bad chunked transfer size")
            return piece

    whole = {"in a file": part(b"a") + part(b"b")[:-5], "between files": part(b"a"), "at once": b""}[breaks]
    response = testing.StartResponseMock()
    answer = b"".join(empty_client.app(streamed_form(Breaking(whole)), response))
    listed = json.loads(answer)
    assert response.status == "400 Bad Request" and "broke off" in str(listed)
    assert ids(listed) == list(tree(data / "app"))


@pytest.mark.parametrize("fields", [(), ("-H", "Transfer-Encoding: chunked")], ids=["length", "chunked"])
def test_large_form_is_not_held_in_memory(served: Program, tmp_path: Path, fields: tuple[str, ...]) -> None:
    with open(tmp_path / "large", "wb") as file:
        file.truncate(LARGE_SIZE)
    before, url = served.peak_memory(restart=True), f"{served.url}large{len(fields)}/"
    assert run_curl(*fields, "-F", f"file=@{tmp_path / 'large'}", url)[0] == 201
    assert served.peak_memory() - before < 16 * 1024 * 1024
    copy = served.data / f"large{len(fields)}/large"
    subprocess.run([installed("cmp"), tmp_path / "large", copy], check=True)


def test_odd_forms_do_not_break_header_fields(exposed: Program) -> None:
    """Remove folders from file names, and ignore a type that contains a line break."""
    for name, status in (("../../up", 201), ("/etc/up2", 201), ("C:\\up3", 201), ("..", 400), ("../", 400),
                         (".u", 400), ("a\0", 400), ("a\nb", 400), ("x" * 256, 400)):  # fmt: skip
        answer = ask(exposed, "POST /artefacts/form", MULTIPART, body=form_of((name, b"1")))
        assert answer.status == status, name
    assert {name for name in tree(exposed.data) if "form" in name} == {"form/up", "form/up2", "form/up3"}
    for type in ("a/b\n", "text/html\n\n;<script>alert(1)</script>", "a/b;\v", "a/b\0", "a/b\r;x"):
        body = form_of(("t", b"1"), fields=f"\r\nContent-Type: {type}")
        pushed = ask(exposed, "POST /artefacts/form/type", MULTIPART, body=body)
        if pushed.status != 201:
            assert is_client_error(pushed, type)
            continue
        assert exposed.get("/artefacts/form/type").body == b"1", type
        ask(exposed, "DELETE /artefacts/form/type?versions")


@pytest.mark.parametrize(("parameter", "id"), [
    ("filename*=UTF-8''%C3%BC.txt", "ü.txt"), ("filename*=utf-8'en'a%2Fb.txt; filename=x", "b.txt"),
    ("filename*=iso-8859-1''%fc.txt", "ü.txt"), ("filename*=utf-8''%ff.txt", None),
    ("filename*=utf-7''%2BAPw-.txt", None), ("filename*=unicode_escape''%5Cud800", None),
    ("filename*=utf-16''%d8%00", None), ("filename*=idna''a", None), ("filename*=utf-8''%ed%a0%80", None),
    ("filename*=''x", None), ("filename*=x", None), ("filename=\"\xed\xa0\x80\"", None),
])  # fmt: skip
def test_file_name_is_utf_8_or_iso_8859_1(
    served: Program, tmp_path: Path, parameter: str, id: str | None
) -> None:
    directory = f"/artefacts/names{sha256(parameter.encode())[:9]}"
    body = f"--b\r\nContent-Disposition: form-data; name=f; {parameter}\r\n\r\nx\r\n--b--\r\n"
    for accept in "application/json", "text/html":
        answer = ask(served, f"POST {directory}", MULTIPART, f"Accept: {accept}", body=body.encode("latin-1"))
        assert b"\\ud8" not in answer.body
        if id is None:
            assert answer.status == 400
        elif accept == "application/json":
            assert (answer.status, ids(json.loads(answer.body))) == (201, [id])


def test_form_counts_as_a_whole_for_max_size(tmp_path: Path) -> None:
    data = tmp_path / "data"
    body = form_of(*((f"{n}", bytes(60_000)) for n in range(20)))
    with Program(data, "--max-size=100kB", "--no-fsync") as program:
        for request in (
            head("POST", "/artefacts/app", MULTIPART, CHUNKED) + pieces(body, 50_000),
            put("/artefacts/app", body, MULTIPART, method="POST"),
        ):  # fmt: skip
            answer = program.ask(request)
            assert answer.is_problem(413) and "PUT" in json.loads(answer.body)["detail"]
            eventually(lambda: not program.incoming())
        assert tree(data) == {}
        small = form_of(("a", bytes(60_000)))
        assert ask(program, "POST /artefacts/app", MULTIPART, body=small).status == 201


def test_encoded_part_is_told_to_use_put(empty_client: testing.TestClient, data: Path) -> None:
    encoded = part(b"a", b"eA==", b"\r\nContent-Transfer-Encoding: base64")
    result = post(empty_client, "/artefacts/app", part(b"first"), encoded)
    assert result.status_code == 400 and "PUT the file itself" in result.json["detail"]
    assert "Content-Transfer-Encoding" in result.json["detail"]
    assert tree(data / "app") == {"first": b"content"}


@pytest.mark.parametrize("field", ["Upgrade-Insecure-Requests: 1", "Sec-Fetch-Mode: navigate", "X: y"])
def test_refused_form_of_a_browser_without_script(served: Program, field: str) -> None:
    fields = MULTIPART, "Accept: text/html,*/*;q=0.8", field
    ask(served, "PUT /artefacts/browser/taken")
    ask(served, "DELETE /artefacts/browser/a")
    answer = ask(served, "POST /artefacts/browser", *fields, body=form_of(("a", b"1"), ("taken", b"2")))
    assert (answer.status, answer.headers["Content-Type"]) == (409, "text/html; charset=utf-8")
    assert b"Not everything was stored" in answer.body and b"taken" in answer.body
    assert ask(served, "POST /artefacts/browser", *fields, body=form_of((field[:3], b"1"))).status == 303


# == Resources over HTTP: archives ================================================================


def test_gnu_tar_reproduces_files_and_times(served: Program, tree_url: str, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    assert pipe(f"{tree_url}?format=tar", "tar -x -C tree", tmp_path).returncode == 0
    assert tree(tmp_path / "tree") == TREE
    original, copied = (
        [(artefact.id, artefact.version) for artefact in a.Repository(data).artefacts("tree")]
        for data in (served.data, tmp_path)
    )
    assert original == copied
    assert original[0] == ("0 empty", "20010909T014640.123457Z")


@pytest.mark.parametrize("prefix", ["", "1.0/", "none"])
def test_python_reads_the_tar_filtered_by_prefix(tree_url: str, prefix: str) -> None:
    with urlopen(f"{tree_url}?format=tar&prefix={prefix}") as answer:
        archive = io.BytesIO(answer.read())
    assert len(archive.getbuffer()) % tarfile.BLOCKSIZE == 0
    with tarfile.open(fileobj=archive) as opened:
        files = ((member.name, opened.extractfile(member)) for member in opened)
        found = {name: file.read() for name, file in files if file is not None}
    assert found == {id: content for id, content in TREE.items() if id.startswith(prefix)}


def test_large_tar_is_not_held_in_memory(served: Program, tmp_path: Path) -> None:
    (served.data / "sparse").mkdir()
    for name in ("a", "b"):
        with open(served.data / "sparse" / name, "wb") as file:
            file.truncate(LARGE_SIZE)
    before = served.peak_memory(restart=True)
    assert pipe(f"{served.url}sparse?format=tar", "tar -t", tmp_path).stdout == "a\nb\n"
    assert served.peak_memory() - before < 64 * 1024 * 1024


def test_aborted_tar_does_not_look_complete(served: Program) -> None:
    file = served.data / "shrinks/a"
    file.parent.mkdir()
    file.touch()
    os.truncate(file, LARGE_SIZE)
    with urlopen(f"{served.url}shrinks?format=tar") as answer:
        answer.read(1024)
        os.truncate(file, 1024)
        with pytest.raises((http.client.IncompleteRead, ConnectionError)):
            answer.read()


def test_zip_has_all_names_bytes_and_times(served: Program, tree_url: str) -> None:
    with urlopen(f"{tree_url}?format=zip") as answer:
        assert answer.headers["Content-Type"] == "application/zip"
        assert 'filename="tree.zip"' in answer.headers["Content-Disposition"]
        archive = zipfile.ZipFile(io.BytesIO(answer.read()))
    assert archive.testzip() is None
    assert {info.filename: archive.read(info) for info in archive.infolist()} == TREE
    for info in archive.infolist():
        time = (served.data / "tree" / info.filename).stat().st_mtime
        assert struct.unpack("<HHBl", info.extra) == (0x5455, 5, 1, int(time))
        assert dt.datetime(*info.date_time, tzinfo=dt.UTC).timestamp() == time // 2 * 2


def test_large_zip_is_not_held_in_memory(served: Program, tmp_path: Path) -> None:
    (served.data / "zip64").mkdir()
    size = a.MAX_ZIP32 + 1
    with open(served.data / "zip64/a", "wb") as file:
        file.truncate(size)
    before = served.peak_memory(restart=True)
    with urlopen(f"{served.url}zip64?format=zip") as answer:
        head = answer.read(1024)
        assert answer.headers.get("Content-Length") is None and head[4:6] == b"\x2d\x00"  # 4.5: ZIP64
        while answer.read(1024 * 1024):
            pass
    assert served.peak_memory() - before < 64 * 1024 * 1024


# == Resources over HTTP: listings ================================================================


@pytest.fixture(scope="module")
def long_url(served: Program) -> str:
    """Return the URL of a directory whose listing is sent as a stream."""
    (served.data / "long").mkdir()
    for number in range(25_000):
        (served.data / f"long/artefact-{number:05}").touch()
    return f"{served.url}long"


@pytest.mark.parametrize("format", ["json", "html", "sha256sums"])
def test_long_listing_is_streamed_completely(long_url: str, format: str) -> None:
    names = [f"artefact-{number:05}" for number in range(25_000)]
    with urlopen(f"{long_url}?format={format}") as answer:
        assert answer.headers.get("Content-Length") is None or format == "sha256sums"
        body = answer.read()
    if format == "json":
        assert [artefact["id"] for artefact in json.loads(body)["artefacts"]] == names
    elif format == "html":
        assert re.findall(r'<td role="rowheader"><a href="([^"]*)"', body.decode()) == [
            f"long/{name}" for name in names]
    else:
        assert body.decode() == "".join(f"{sha256(b'')}  {name}\n" for name in names)


def test_slow_readers_of_listings_hold_no_worker(served: Program, long_url: str) -> None:
    path = urlsplit(long_url).path
    with contextlib.ExitStack() as stack:
        for _ in range(12):
            connection = stack.enter_context(served.connect(receive_buffer=4096))
            connection.send(head("GET", path))
        started = time.monotonic()
        assert len(json.loads(served.get(f"{path}?limit=3").body)["artefacts"]) == 3
        assert time.monotonic() - started < 10


@pytest.mark.parametrize("pattern", [
    "*", "x*", "*.txt", "f/?", "*y", "[fx]*", "[!x]*", "f*y", "*/*", "", "[", "*[*", "x.txt", "X*", "f/[a-z]",
])  # fmt: skip
def test_match_selects_as_fnmatchcase_does(client: testing.TestClient, pattern: str) -> None:
    listed = call(client, f"GET /artefacts/app?match={quote(pattern)}").json
    assert ids(listed) == [id for id in ("f/y", "x.txt") if fnmatch.fnmatchcase(id, pattern)]


@pytest.mark.parametrize("pattern", [
    "*a" * 127 + "b", "*" * 254 + "b", "*" + "?" * 253 + "b", "[" * 255, "*[a-b]" * 42 + "c",
    "*?" * 127 + "b", "*" + "a" * 253 + "b", "*" + "[!b]" * 63 + "c", "[!" * 127, "*a?" * 84 + "*b",
    "[z-a]" * 51, "[^a" * 84 + "]",
])  # fmt: skip
def test_no_pattern_costs_more_than_a_tenth_of_a_second(tmp_path: Path, pattern: str) -> None:
    data = tmp_path / "data"
    for end in "defghijk":
        add_file(data / "app" / ("a" * 250) / ("a" * 250) / ("ab" * 125) / ("a" * 250 + end), b"")
    client = testing.TestClient(a.create_app(data, fsync=False))
    call(client, "GET /artefacts/app")
    started = time.thread_time()
    assert ids(call(client, f"GET /artefacts/app?match={quote(pattern)}").json) == []
    assert time.thread_time() - started < 0.1
    assert call(client, f"GET /artefacts/app?match={quote(pattern)}{'x' * 255}").status_code == 400


def test_newest_artefacts(empty_client: testing.TestClient, data: Path) -> None:
    for id, version in ("a.zip", T2), ("b.zip", T3), ("c.txt", T1):
        add_file(data / "app" / id, b"", version)
    assert call(empty_client, "GET /artefacts/app?sort=newest").json.keys() == {"directory", "artefacts"}
    for query, expected in {
        "sort=newest": ["b.zip", "a.zip", "c.txt"], "sort=newest&limit=2": ["b.zip", "a.zip"],
        "sort=newest&match=*c*": ["c.txt"], "sort=newest&prefix=a": ["a.zip"],
    }.items():  # fmt: skip
        assert ids(call(empty_client, f"GET /artefacts/app?{query}").json) == expected
    assert call(empty_client, "GET /artefacts/app?sort=size").status_code == 400
    for query, newest in {"": "b.zip", "&match=c*": "c.txt", "&prefix=a": "a.zip"}.items():
        result = call(empty_client, f"GET /artefacts/app?newest{query}")
        assert (result.status_code, result.headers["Location"]) == (307, f"/artefacts/app/{newest}")
    for target in "app?newest&match=none", "none?newest":
        assert call(empty_client, f"GET /artefacts/{target}").status_code == 404


def test_deleted_artefacts_are_listed_with_their_newest_version(client: testing.TestClient) -> None:
    assert ids(call(client, "GET /artefacts/app?deleted").json) == []
    call(client, "PUT /artefacts/app/x.txt", body=b"three")
    call(client, "DELETE /artefacts/app/x.txt")
    call(client, "DELETE /artefacts/app/f/y")
    first, second = call(client, "GET /artefacts/app?deleted").json["artefacts"]
    assert (first["id"], second["id"], second["sha256"]) == ("f/y", "x.txt", sha256(b"three"))
    assert second["href"] == f"/artefacts/app/x.txt?version={second['version']}"
    assert call(client, f"GET {second['href']}").content == b"three"
    assert ids(call(client, "GET /artefacts/app?deleted&match=x*").json) == ["x.txt"]
    page = call(client, "GET /artefacts/app/?deleted&format=html").text
    assert f'href="x.txt?version={second["version"]}"' in page
    assert call(client, "GET /artefacts/app?deleted&format=tar").status_code == 400
    call(client, f"POST /artefacts/app/x.txt?restore={second['version']}")
    assert ids(call(client, "GET /artefacts/app?deleted").json) == ["f/y"]


def test_an_unreadable_file_or_folder_does_not_break_a_listing(data: Path) -> None:
    add_file(data / "app/a", b"a", T1)
    add_file(data / "app/closed", b"closed", T1)
    add_file(data / "app/folder/x", b"x", T1)
    (data / "app/closed").chmod(0)
    (data / "app/folder").chmod(0)
    logged = r"artefacts: (ERROR )?(app/\S+ cannot be read|GET \S+): .*"
    with Program(data, before=without_privileges(), logged=logged) as program:
        listing = json.loads(program.get("/artefacts/app").body)
        assert ids(listing) == ["a"] and listing["unreadable"] == ["closed", "folder/"]
        listing = json.loads(program.get("/artefacts/app?limit=1&after=a").body)
        assert ids(listing) == [] and listing["unreadable"] == ["closed", "folder/"]
        assert program.get("/artefacts/app?format=sha256sums").body.decode() == f"{sha256(b'a')}  a\n"
        assert program.get("/artefacts/app?format=html").status == 200
        for format in "tar", "zip":
            answer = program.get(f"/artefacts/app?format={format}")
            assert answer.is_problem(500) and b"closed, folder/" in answer.body
            assert program.get(f"/artefacts/app?format={format}&prefix=a").status == 200
    (data / "app/folder").chmod(0o755)


def test_folders_are_listed_in_every_format(served: Program, tmp_path: Path) -> None:
    content = {"1.4.0/a b.txt": b"1", "1.4.0/linux/app": b"22", "1.4.00": b"no", "1.4.0.x/y": b"no"}
    for id, body in content.items():
        served.ask(put(a.href("", "folders", id), body))
    path, inside = "/artefacts/folders/1.4.0/", ["1.4.0/a b.txt", "1.4.0/linux/app"]
    listing = served.get(path)
    assert ids(json.loads(listing.body)) == inside and listing.headers["Cache-Control"] == "no-cache"
    assert ids(json.loads(served.get(f"{path}?match=*app").body)) == inside[1:]
    first = json.loads(served.get(f"{path}?limit=1").body)
    assert ids(json.loads(served.get(first["next"]).body)) == inside[1:] and first["next"].startswith(path)
    page = served.get(path, "Accept: text/html").body.decode()
    assert re.findall(r'rowheader"><a href="([^"]*)"', page) == ["a%20b.txt", "linux/app"]
    assert "#sha256=" not in page
    accept = "Accept: application/vnd.pypi.simple.v1+html;q=0.1, text/html;q=0.01"
    assert f'href="linux/app#sha256={sha256(b"22")}"' in served.get(path, accept).body.decode()
    url = f"{served.url}folders/1.4.0/"
    for format in "tar", "zip":
        with urlopen(f"{url}?format={format}") as answer:
            archive = io.BytesIO(answer.read())
            assert f'filename="1.4.0.{format}"' in answer.headers["Content-Disposition"]
        if format == "tar":
            with tarfile.open(fileobj=archive) as opened:
                names = opened.getnames()
        else:
            names = zipfile.ZipFile(archive).namelist()
        assert names == ["a b.txt", "linux/app"]
    (tmp_path / "linux").mkdir()
    for name in "a b.txt", "linux/app":
        (tmp_path / name).write_bytes(served.get(path + quote(name)).body)
    assert pipe(f"{url}?format=sha256sums", "sha256sum --strict --quiet -c -", tmp_path).returncode == 0


def test_what_answers_the_url_of_a_folder(client: testing.TestClient, data: Path) -> None:
    add_file(data / "app/1.0/x", b"x", T1)
    (data / "app/link").symlink_to(data / "app/1.0")
    result = call(client, "GET /artefacts/app/1.0?limit=1&unknown")
    assert result.status_code == 308
    assert result.headers["Location"] == "/artefacts/app/1.0/?limit=1&unknown"
    for target, status in (
        ("app/1.0/", 200), ("app/x.txt/", 200), ("app/none/", 404), ("app/link/", 404), ("app/1.0/x/y/", 404),
        ("app/1.0/?versions", 404), (f"app/1.0/?version={T1}", 404), ("app/1.0/?prefix=f/", 400),
        ("app/1.0/?prefix=1.0/x", 200), ("none/1.0/", 404),
    ):  # fmt: skip
        for method in "GET", "HEAD":
            assert call(client, f"{method} /artefacts/{target}").status_code == status, target
    assert call(client, "GET /artefacts/app/1.0/?newest").headers["Location"] == "/artefacts/app/1.0/x"
    call(client, "DELETE /artefacts/app/1.0/x")
    assert ids(call(client, "GET /artefacts/app/1.0/?deleted").json) == ["1.0/x"]


PROMOTING = """
[[token]]
name = "ci"
sha256 = "{}"
read = ["staging"]
write = ["releases", "small", "once"]
[[directory]]
name = "small"
max_size = 2
[[directory]]
name = "once"
write_once = true
""".format(sha256(b"ci"))


def test_promote_copies_an_artefact(served: Program) -> None:
    name = "a b+ü%?#.zip"
    source = a.href("", "staging", f"1.0/{name}")
    stored = json.loads(served.ask(put(source, b"first", "Content-Type: text/x-own")).body)
    target = f"/artefacts/releases/app?from={quote(source)}"
    answer = served.ask(head("POST", target))
    promoted = json.loads(answer.body)
    assert (answer.status, answer.headers["Location"]) == (201, "/artefacts/releases/app")
    assert answer.headers["ETag"] == f'"{sha256(b"first")}"'
    assert {**stored, "directory": "releases", "id": "app", "href": "/artefacts/releases/app",
            "version": promoted["version"], "modified": promoted["modified"]} == promoted  # fmt: skip
    assert served.get("/artefacts/releases/app").headers["Content-Type"] == "text/x-own"
    assert served.ask(head("POST", target)).is_problem(409)
    assert served.ask(head("PUT", target)).status == 200  # the same bytes
    served.ask(put(source, b"second", "Content-Type: text/x-own"))
    assert served.ask(head("PUT", target, "If-None-Match: *")).is_problem(412)
    assert served.ask(head("PUT", target, f'If-Match: "{sha256(b"second")}"')).is_problem(412)
    assert served.ask(head("PUT", target, f'If-Match: "{sha256(b"first")}"')).status == 200
    assert served.get("/artefacts/releases/app").body == b"second"


def test_promote_of_an_earlier_version_under_a_prefix(client: testing.TestClient) -> None:
    options: dict[str, Any] = {"root_path": "/repo", "body": b""}
    for base in "", "/repo":
        target = f"/artefacts/new/x?from={base}/artefact/app/x.txt&version="
        assert call(client, f"PUT {target}{T1}", **options).json["sha256"] == sha256(b"one")
        assert call(client, f"PUT {target}{T2}", **options).json["sha256"] == sha256(b"two")
        assert call(client, f"PUT {target}{T3}", **options).status_code == 404


@pytest.mark.parametrize("source", [
    "", "app/x.txt", "http://localhost/artefacts/app/x.txt", "//localhost/artefacts/app/x.txt",
    "/artefacts/app/", "/artefacts/app", f"/artefacts/app/x.txt%3Fversion={T1}", "/other/app/x.txt",
    "/artefacts/../x",
    "/artefacts/app/%252e%252e/x", "/artefacts/app/.hidden", "/artefacts/app/%25ff", "/artefacts/a%252fb/c",
])  # fmt: skip
def test_promote_from_another_path_is_refused(client: testing.TestClient, data: Path, source: str) -> None:
    assert call(client, f"POST /artefacts/app/n?from={source}", body=b"").status_code == 400
    assert tree(data) == INITIAL


def test_promote_needs_the_right_to_read_its_source(tmp_path: Path) -> None:
    data = fill(tmp_path / "data", "staging", "secret")
    client = client_of(data, PROMOTING)
    for target, source, status, body in (
        ("POST releases/x", "staging/x", 201, b""), ("POST releases/y", "secret/x", 404, b""),
        ("POST releases/y", "secret/missing", 404, b""), ("POST releases/y", "missing/x", 404, b""),
        ("POST staging/y", "staging/x", 403, b""), ("POST releases/y", "staging/x", 400, b"body"),
        ("PUT small/x", "staging/x", 413, b""), ("PUT once/x", "staging/x", 201, b""),
        ("PUT once/x", "staging/x", 409, b""), ("PUT releases/x", "staging/x", 200, b""),
        ("PUT releases/x/y", "staging/x", 409, b""),
    ):  # fmt: skip
        method, _, path = target.partition(" ")
        line = f"{method} /artefacts/{path}?from=/artefacts/{source}"
        result = simulate(client, line, "Authorization: Bearer ci", body=body)
        assert result.status_code == status, (line, result.text)
    line, token = "POST /artefacts/releases/y?from=/artefacts/secret/", "Authorization: Bearer ci"
    details = [simulate(client, line + id, token).json for id in ("x", "none")]
    assert details[0]["detail"].replace("'x'", "'none'") == details[1]["detail"]


def test_health_is_checked_at_most_once_a_second(data: Path) -> None:
    client = client_of(data, '[[token]]\nname = "ci"\nsha256 = "' + sha256(b"ci") + '"\nread = ["*"]')
    for method in "GET", "HEAD":
        result = call(client, f"{method} /healthz")
        assert result.status_code == 200 and result.headers["Cache-Control"].endswith("no-cache")
    assert call(client, "GET /healthz").json == {"status": "ok"}
    assert call(client, "GET /artefacts/").status_code == 401
    for folder in data.iterdir():
        shutil.rmtree(folder)
    data.rmdir()
    assert call(client, "GET /healthz").status_code == 200  # the last answer
    time.sleep(1.1)
    result = call(client, "GET /healthz")
    assert (result.status_code, result.headers["Retry-After"]) == (503, "5")
    assert "data directory" in result.json["detail"] and str(data) not in result.text
    data.mkdir()
    time.sleep(1.1)
    assert call(client, "GET /healthz").status_code == 200


def test_health_of_a_data_directory_that_cannot_be_written(data: Path) -> None:
    fill(data, "secret-name")
    (data / ".incoming").mkdir()
    (data / ".incoming").chmod(0o555)
    logged = r"artefacts: (the data directory cannot be used|GET /healthz|'secret-name' has versions).*"
    with Program(data, before=without_privileges(), logged=logged) as program:
        answer = program.get("/healthz")
        assert answer.is_problem(503) and answer.headers["Retry-After"] == "5"
        assert b"permission" in answer.body
        assert b"secret" not in answer.body and b"incoming" not in answer.body
    (data / ".incoming").chmod(0o755)


PAGES = """
[[directory]]
name = "site*"
pages = true
"""
NAVIGATION = "Upgrade-Insecure-Requests: 1", "Accept: text/html"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """Return a program with directories whose scripts may run, also under a second name."""
    folder = tmp_path_factory.mktemp("pages")
    (folder / "config").write_text(PAGES)
    for id in "site/coverage/index.html", "site/coverage/a b.js", "site/plain/x", "other/index.html":
        add_file(folder / "data" / id, b"text")
    options = "--config", str(folder / "config"), "--pages-host", "Pages.localhost"
    with Program(folder / "data", *options) as program:
        yield program


def ask_under(host: str, pages: Program, request: bytes) -> Answer:
    """Send a request under another name of the program, and return the response."""
    return pages.ask(request.replace(b"Host: localhost", f"Host: {host}:{pages.port}".encode()))


def test_scripts_run_only_in_directories_with_pages(pages: Program) -> None:
    def policies(path: str, *fields: str, host: str = "localhost") -> tuple[str | None, str | None]:
        answer = ask_under(host, pages, head("GET", path, *fields))
        assert answer.status in (200, 304) and answer.headers["X-Content-Type-Options"] in ("nosniff", None)
        return answer.headers["Content-Security-Policy"], answer.headers["Cross-Origin-Resource-Policy"]

    scripts = "sandbox allow-scripts allow-popups allow-forms allow-modals allow-downloads"
    page = "/artefacts/site/coverage/index.html"
    assert policies(page) == (scripts, "cross-origin")
    assert policies(page, f'If-None-Match: "{sha256(b"text")}"')[1] == "cross-origin"
    assert policies(f"{page}?at=2999-01-01") == (scripts, "cross-origin")
    assert policies("/artefacts/site/coverage/") == (scripts, "cross-origin")
    assert policies(page, host="pages.localhost") == (None, "cross-origin")
    assert policies("/artefacts/site/coverage/a%20b.js") == (a.POLICY, "cross-origin")
    assert policies("/artefacts/other/index.html") == (a.POLICY, "same-origin")
    assert policies("/artefacts/site/plain/")[1] == "same-origin"  # a listing
    listing = json.loads(pages.get("/artefacts/site/coverage/?format=json").body)
    assert ids(listing) == ["coverage/a b.js", "coverage/index.html"]


def test_index_of_a_folder_is_shown_at_its_url_with_a_slash(pages: Program) -> None:
    answer = pages.get("/artefacts/site/coverage?x=1")
    assert (answer.status, answer.headers["Location"]) == (308, "/artefacts/site/coverage/?x=1")
    answer = pages.get("/artefacts/site/coverage/")
    assert (answer.status, answer.body) == (200, b"text")
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    assert ids(json.loads(pages.get("/artefacts/site/plain/").body)) == ["plain/x"]


def test_browser_is_redirected_to_the_name_for_pages(pages: Program) -> None:
    for path in "/artefacts/site/coverage/", "/artefacts/site/coverage/index.html?x=%C3%A9&y":
        request = head("GET", path, *NAVIGATION)
        answer = ask_under("localhost", pages, request)
        location = f"http://pages.localhost:{pages.port}{path}"
        assert (answer.status, answer.headers["Location"]) == (307, location)
        assert ask_under("pages.localhost", pages, request).status == 200
    assert pages.get("/artefacts/site/coverage/a%20b.js", *NAVIGATION).status == 200
    assert pages.get("/artefacts/other/index.html", *NAVIGATION).status == 200


def test_name_for_pages_serves_nothing_else(pages: Program) -> None:
    page = "/artefacts/site/coverage/index.html"
    for method in "GET", "HEAD":
        for path in page, "/artefacts/site", "/artefacts/site/plain/":
            assert ask_under("PAGES.localhost", pages, head(method, path)).status == 200
    refused = (
        "GET /", "GET /artefacts/", "GET /artefacts/other", "GET /artefacts/other/index.html", "GET /healthz",
        f"DELETE {page}", f"POST {page}", f"OPTIONS {page}", "POST /artefacts/site", "DELETE /artefacts/site",
    )  # fmt: skip
    for line in refused:
        method, _, path = line.partition(" ")
        assert ask_under("pages.localhost", pages, head(method, path)).is_problem(403), line
    assert ask_under("pages.localhost", pages, put(page, b"new")).is_problem(403)
    for host, may_push in ("localhost", True), ("pages.localhost", False):  # the listing offers what works
        listing = ask_under(host, pages, head("GET", "/artefacts/site", *NAVIGATION)).body
        assert (b'id="upload"' in listing, b'name="delete"' in listing) == (may_push, may_push)
    origin = f"Origin: http://pages.localhost:{pages.port}"
    for fields in (origin,), ("Sec-Fetch-Site: same-site", origin), ("Origin: null",):
        assert pages.ask(put(page, b"new", *fields)).is_problem(403)
    assert pages.get(page).body == b"text"


def test_listings_leave_no_file_open(client: testing.TestClient, data: Path) -> None:
    call(client, "PUT /artefacts/app/deleted")
    call(client, "DELETE /artefacts/app/deleted")
    targets = [f"app?{query}" for query in (
        "deleted", "newest", "sort=newest", "limit=1", "match=x*", "format=tar", "format=zip", "format=html",
        "format=sha256sums", "prefix=f/&limit=1", "deleted&format=html&limit=1",
    )] + ["app/f/", "app/f", "app/none/", "app/x.txt?versions", ""]  # fmt: skip
    before = len(os.listdir("/proc/self/fd"))
    for method, target in itertools.product(("GET", "HEAD"), targets):
        assert call(client, f"{method} /artefacts/{target}").status_code < 500
    assert len(os.listdir("/proc/self/fd")) == before


# == Resources over HTTP: curl, as people use it ==================================================


def test_curl_uploads(curl: Callable[..., str], tmp_path: Path) -> None:
    stored = json.loads(curl("-T", "f.txt", "@/artefacts/curl/"))
    assert (stored["id"], stored["size"], stored["type"]) == ("f.txt", 6, "text/plain")
    assert json.loads(curl("-T", "-", "@/artefacts/curl/piped", input=b"piped"))["size"] == 5
    stored = json.loads(curl("--data-binary", "@f.txt", "@/artefacts/curl/posted.json"))
    assert (stored["sha256"], stored["type"]) == (sha256(b"hello\n"), "application/json")
    assert json.loads(curl("-X", "PUT", "@/artefacts/curl/empty"))["size"] == 0
    assert json.loads(curl("-T", "/dev/null", "@/artefacts/curl/null"))["size"] == 0
    large = os.urandom(5_000_000)
    (tmp_path / "large").write_bytes(large)
    assert curl("-T", "large", "@/artefacts/curl/", *STATUS) == "201 5000000"
    assert curl("-T", ".", "@/artefacts/curl/large", *STATUS, input=large).startswith("200 ")
    curl("-o", "back", "@/artefacts/curl/large")
    assert (tmp_path / "back").read_bytes() == large


def test_curl_gets_a_refusal_before_it_sends_the_body(curl: Callable[..., str], tmp_path: Path) -> None:
    """Send `Expect`. Every version of curl sends it by itself with `-T` from 1 MB on."""
    (tmp_path / "large").write_bytes(bytes(2_000_000))
    with_expect = ("-H", "Expect: 100-continue", "-T", "large", *STATUS)
    assert curl("-H", "If-None-Match: *", *with_expect, "@" + EXISTING) == "412 0"
    assert curl("-X", "POST", *with_expect, "@" + EXISTING) == "409 0"
    assert curl(*with_expect, "@/artefacts/app/.hidden") == "400 0"
    assert curl("-H", f"Content-Length: {MAX_SIZE + 1}", *with_expect, "@" + ABSENT) == "413 0"
    etag = sha256(bytes(2_000_000))
    assert curl(*with_expect, "@/artefacts/app/unchanged") == "201 2000000"
    assert curl("-H", f'If-None-Match: "{etag}"', *with_expect, "@/artefacts/app/unchanged") == "412 0"


def test_curl_resumes_a_download(curl: Callable[..., str], tmp_path: Path, large: bytes) -> None:
    (tmp_path / "large").write_bytes(large[:1_000_000])
    curl("-C", "-", "-o", "large", "@/artefacts/app/large")
    assert (tmp_path / "large").read_bytes() == large
    curl("-C", "-", "-o", "large", "@/artefacts/app/large")  # already complete: 416 with the length
    assert (tmp_path / "large").read_bytes() == large
    # A resumed upload would store only its tail.
    # With Expect: curl 8.14 does not send it by itself for so few bytes.
    with_expect = ("-H", "Expect: 100-continue", "-T", "f.txt")
    assert curl("-C", "2", *with_expect, "@/artefacts/curl/part", *STATUS) == "400 0"
    assert curl("@/artefacts/curl/part", *STATUS) == "404 0"


def test_curl_revalidates_a_download(curl: Callable[..., str], tmp_path: Path) -> None:
    url = "@" + EXISTING
    code = ("-o", "got", "-w", "%{http_code}")
    assert curl("--etag-save", "etag", url, *code) == "200"
    assert (tmp_path / "etag").read_text().strip() == f'"{sha256(b"there")}"'
    assert curl("--etag-compare", "etag", url, *code) == "304"
    assert curl("-R", url, *code) == "200"  # -R gives "got" the time of Last-Modified
    assert curl("-z", "got", url, *code) == "304"
    assert curl("-z", "Thu, 01 Jan 1970 00:00:00 GMT", url, *code) == "200"


@pytest.mark.parametrize("name", [
    "plain.tar.gz", "with space.txt", "quo'te.bin", "ünïcödé ✓.zip", "a;b=c.txt", "100%.txt", 'q"q.txt',
])  # fmt: skip
def test_curl_saves_under_the_artefact_name(curl: Callable[..., str], tmp_path: Path, name: str) -> None:
    assert curl("-T", "f.txt", f"@/artefacts/curl/below/{quote(name)}", *STATUS) == "201 6"
    before = set(os.listdir(tmp_path))
    curl("-OJ", f"@/artefacts/curl/below/{quote(name)}")
    (saved,) = set(os.listdir(tmp_path)) - before
    # curl does not unescape a quotation mark, and falls back to the URL's last segment.
    assert saved == (name if '"' not in name else quote(name))
    assert (tmp_path / saved).read_bytes() == b"hello\n"


def test_curl_head_request(curl: Callable[..., str]) -> None:
    header = curl("-I", "@" + EXISTING)
    assert header.startswith("HTTP/1.1 200 OK\r\n")
    assert header.endswith("\r\n\r\n")
    assert f'\nETag: "{sha256(b"there")}"\r\n' in header
    assert "\nContent-Length: 5\r\n" in header
    assert curl("-I", "@/artefacts/app", *STATUS) == "200 0"


# == The page, and artefacts in a browser =========================================================


def test_stored_content_cannot_run_scripts(exposed: Program) -> None:
    for name, type in (
        ("p.html", "text/html; charset=utf-8"), ("p.svg", "image/svg+xml"), ("p.xml", "application/xml"),
        ("p.js", "text/javascript"), ("p.pdf", "application/pdf"), ("large", "text/html"), ("p", "text/xsl"),
    ):  # fmt: skip
        path, body = f"/artefacts/active/{name}", b"<script>1</script>" * (20_000 if name == "large" else 1)
        version = json.loads(ask(exposed, f"PUT {path}", f"Content-Type: {type}", body=body).body)["version"]
        for line in (f"GET {path}", f"HEAD {path}", f"GET {path}?version={version}"):
            headers = ask(exposed, line, "Range: bytes=0-3").headers
            policy = {rule.strip() for rule in headers["Content-Security-Policy"].split(";")}
            assert headers["Content-Type"] == type and headers["X-Content-Type-Options"] == "nosniff"
            assert {"sandbox allow-same-origin", "default-src 'none'"} <= policy
            assert "script" not in "".join(policy)


def test_only_clients_such_as_pip_get_digests_in_links(served: Program) -> None:
    """Other programs would take the fragment for a part of the name."""
    served.ask(put("/artefacts/wheels/a%201.whl", b"wheel"))
    simple, digest = "application/vnd.pypi.simple.v1+html", f"#sha256={sha256(b'wheel')}"
    for accept, fragment in (
        (f"application/vnd.pypi.simple.v1+json, {simple};q=0.1, text/html;q=0.01", digest),
        (simple, digest), ("text/html", ""),
        ("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", ""),
    ):  # fmt: skip
        for field in "X: y", "Upgrade-Insecure-Requests: 1":
            page = served.get("/artefacts/wheels/?format=html", f"Accept: {accept}", field).body.decode()
            assert re.findall(r'rowheader"><a href="([^"]*)"', page) == [f"a%201.whl{fragment}"]
        versions = served.get("/artefacts/wheels/a%201.whl?versions&format=html", f"Accept: {accept}")
        assert b"#sha256=" not in versions.body


def test_page_shows_the_time_of_a_change_in_a_folder(program: Program) -> None:
    def changed() -> str:
        page = program.get("/artefacts/?format=html").body.decode()
        found = re.search('href="/artefacts/folders/".*?datetime="([^"]+)"', page)
        assert found is not None
        return found[1]

    shown = []
    for request in (
        put("/artefacts/folders/x/a", b"1"), put("/artefacts/folders/x/b", b"2"),
        head("DELETE", "/artefacts/folders/x/b"),
    ):  # fmt: skip
        assert program.ask(request).status in (201, 204)
        shown.append(changed())
        time.sleep(2 * a.TICK / 1e9)
    assert shown == sorted({*shown})


# == Access =======================================================================================


def test_token_includes_the_anonymous_rights(tmp_path: Path) -> None:
    open_to_all = TOKENS.replace('read = ["public"]', 'read = ["public"], write = ["drop"]')
    client = client_of(fill(tmp_path / "data", "public"), open_to_all)
    for number, token in enumerate((None, READER, CI, IDLE, "unknown")):
        listing = simulate(client, "GET /artefacts/public/x?versions", *bearer(token))
        assert (listing.status_code, listing.headers["Cache-Control"]) == (200, "private, no-cache")
        assert simulate(client, f"PUT /artefacts/drop/{number}", *bearer(token)).status_code == 201


PERMISSIONS: list[tuple[str, int, int, int, int]] = [
    # request; status without a token, with READER, with CI, with IDLE
    ("GET /", 303, 303, 303, 303), ("GET /artefacts", 200, 200, 200, 200),
    ("GET /artefacts/public/x", 200, 200, 200, 200), ("PUT /artefacts/public/n", 401, 403, 403, 403),
    ("POST /artefacts/public", 401, 403, 403, 403), ("DELETE /artefacts/public", 401, 403, 403, 403),
    ("GET /artefacts/secret", 401, 200, 403, 403), ("HEAD /artefacts/secret/x", 401, 200, 403, 403),
    ("GET /artefacts/secret/x?versions", 401, 200, 403, 403), ("GET /artefacts/none/x", 401, 404, 403, 403),
    ("GET /artefacts/secret?format=tar", 401, 200, 403, 403), ("GET /artefacts/secret/n", 401, 404, 403, 403),
    (f"GET /artefacts/secret/x?version={V1}", 401, 200, 403, 403),
    ("GET /artefacts/.x/x", 401, 404, 403, 403), ("OPTIONS /artefacts/secret/x", 401, 200, 403, 403),
    ("PATCH /artefacts/secret/x", 401, 403, 403, 403), ("GET /artefacts/app-1/x", 401, 200, 200, 403),
    ("GET /artefacts/Public/x", 401, 404, 403, 403), ("GET /artefacts/public%2Fx", 200, 200, 200, 200),
    ("GET /artefacts/secret%2Fx", 401, 200, 403, 403),
    ("GET /artefacts/public/../secret/x", 404, 404, 404, 404), ("PUT /artefacts/app-1/n", 401, 403, 201, 403),
    ("POST /artefacts/app-1/n", 401, 403, 409, 403), ("DELETE /artefacts/app-1/n", 401, 403, 204, 403),
    (f"POST /artefacts/app-1/x?restore={V1}", 401, 403, 201, 403),
    (f"DELETE /artefacts/app-1/x?version={V1}", 401, 403, 204, 403),
    ("DELETE /artefacts/app-1/x?versions", 401, 403, 204, 403),
    ("DELETE /artefacts/app-1", 401, 403, 204, 403), ("PUT /artefacts/nightly/n", 401, 403, 201, 403),
    ("GET /artefacts/nightly/n", 401, 200, 403, 403),
]  # fmt: skip


@pytest.mark.parametrize("base", ["/artefacts", "/artefact"])
def test_permissions(tmp_path: Path, base: str) -> None:
    data = fill(tmp_path / "data", "public", "app-1", "secret")
    client = client_of(data, TOKENS, keep_versions=5)
    for token, shown in ((None, "public"), (READER, "app-1 public secret"), (CI, "app-1 public")):
        listed = simulate(client, f"GET {base}", *bearer(token)).json["directories"]
        assert [entry["directory"] for entry in listed] == shown.split()
    for line, *statuses in PERMISSIONS:
        # refused requests come first, while the target still exists
        for status, token in sorted(zip(statuses, ("", READER, CI, IDLE), strict=True), reverse=True):
            before = tree(data)
            result = simulate(client, line.replace("/artefacts", base), *bearer(token or None))
            assert result.status_code == status, (line, token)
            assert ("WWW-Authenticate" in result.headers) == (status == 401)
            if status in (401, 403):
                assert result.headers["Content-Type"] == "application/problem+json" and tree(data) == before
            if "ETag" in result.headers and line[:4] in ("GET ", "HEAD"):
                assert result.headers["Cache-Control"].startswith("private, ")


CREDENTIALS: dict[int, list[str]] = {  # status of a GET that needs a token: values of Authorization
    200: [f"Bearer {CI}", f"bearer {CI}", f"BEARER {CI}", basic(CI), basic(CI, ""), basic(CI, "naïve"),
          basic(COLON), basic(CI).replace("B", "b", 1)],
    403: [f"Bearer {IDLE}", basic(IDLE)],
    401: [
        "", "Bearer", "Bearer ", "Bearer\t", f"Bearer {CI}x", f"Bearer {CI[:-1]}", f"Bearer {CI.upper()}", CI,
        f"Bearer x {CI}", f"Bearer {CI} {CI}", f"Bearer {CI},", f"Bearer: {CI}", f"Bearer={CI}",
        "Bearer \xff\xfe", f"Bearer anyone:{CI}", f"Bearer {basic(CI)[6:]}", f"Bearer {DIGESTS[1]}",
        "Bearer " + "x" * 60_000, "Bearer " * 5000, f"Token {CI}", f"Digest {CI}", f"Negotiate {CI}", "Basic",
        "Basic ", "Basic ====", "Basic Og==", "Basic //79", "Basic \xff", f"Basic {CI}", f"Basic anyone:{CI}",
        basic(""), basic("", CI), basic(CI[:-1]), "Basic " + base64.b64encode(CI.encode()).decode(),
        "Basic " + "QQ==" * 15_000, f"Bearer {CI}\r\nAuthorization: Bearer {CI}",
        f"Bearer wrong\r\nAuthorization: Bearer {CI}", f"{basic(CI)}\r\nAuthorization: Bearer {CI}",
        f"\r\nX-Token: {CI}", f"\r\nCookie: token={CI}",
    ],
}  # fmt: skip


def test_credentials(guarded: Program) -> None:
    for status, values in CREDENTIALS.items():
        for value in values:
            answer = ask(guarded, "GET /artefacts/app-1/x", f"Authorization: {value}")
            assert answer.status == status, value[:80]
            assert status == 200 or answer.is_problem(status)
            if status == 401:
                challenge = answer.headers["WWW-Authenticate"]
                assert all(part in challenge for part in ('Basic realm="', 'charset="UTF-8"', "Bearer"))


def test_log_shows_the_token_name_but_not_its_value(guarded: Program) -> None:
    for directory, value in (("app-1", f"Bearer {CI}"), ("secret", basic(CI)), ("app-1", "Bearer not-known")):
        ask(guarded, f"GET /artefacts/{directory}/logged", f"Authorization: {value}")
    eventually(lambda: guarded.log.read_text().count("/logged") == 3)
    log = guarded.log.read_text()
    lines = [line.split() for line in log.splitlines() if "/logged" in line]
    assert [(line[2], line[-2]) for line in lines] == [("ci", "404"), ("ci", "403"), ("-", "401")]
    assert not [secret for secret in (CI, READER, "not-known", DIGESTS[1], basic(CI)[6:]) if secret in log]


def test_existence_is_not_revealed_without_read_access(tmp_path: Path) -> None:
    """Get the same response for existing, missing and invalid names, with any precondition."""
    client, etag = client_of(fill(tmp_path / "data", "public", "secret"), TOKENS), sha256(V2.encode())
    conditions: tuple[list[str], ...] = (
        [], [f'If-None-Match: "{etag}"'], [f'If-Match: "{etag}"'], ["If-None-Match: *"],
        ["Range: bytes=99-"], ["Repr-Digest: sha-256=:?:"],
    )  # fmt: skip
    for line in (
        "GET ", "HEAD ", "OPTIONS ", "PUT ", "POST ", "DELETE ", "GET ?versions", f"GET ?version={V1}",
        f"POST ?restore={V1}", f"DELETE ?version={V1}", "DELETE ?versions",
    ):  # fmt: skip
        method, query = line.split(" ")
        for token in (None, IDLE):
            answers = {
                (result.status, result.text, repr(sorted(result.headers.items())))
                for path in ("secret", "none", "secret/x", "secret/y", "none/x", "secret/x/y", "secret/.x")
                for fields in conditions
                for request in [f"{method} /artefacts/{path}{query}"]
                for result in [simulate(client, request, *fields, *bearer(token))]
            }
            assert len(answers) == 1, answers


@pytest.mark.parametrize("announced", ["Content-Length: 5000000", CHUNKED])
def test_refused_upload_is_not_awaited_or_stored(guarded: Program, announced: str) -> None:
    """Announce a body and never send it: the refusal comes anyway, without a 100 before it."""
    for line, token, status in (
        ("PUT secret/n", None, 401), ("POST secret/n", None, 401), ("POST secret", None, 401),
        ("PUT secret/n", "x", 401), ("DELETE secret", None, 401), ("PUT secret/x", CI, 403),
        ("POST public", CI, 403), ("PUT app-1/n", READER, 403), ("POST app-1/n?restore=x", IDLE, 403),
        *[("PUT app-1/n", CI, 413), ("POST app-1/n", CI, 413)] * (announced != CHUNKED),
    ):  # fmt: skip
        method, path = line.split(" ")
        for expect in ("X: y", "Expect: 100-continue"):
            fields = [announced, expect, *bearer(token), *[MULTIPART] * path.isalpha()]
            with guarded.connect() as connection:
                answer = connection.ask(head(method, f"/artefacts/{path}", *fields))
                assert answer.is_problem(status) and answer.headers["Connection"].lower() == "close", line
                assert guarded.incoming() == [], line


def test_upload_without_rights_is_refused_before_its_body(tmp_path: Path) -> None:
    config, token = tmp_path / "config.toml", "a-token-that-nobody-guesses"
    config.write_text(f'[[token]]\nname = "ci"\nsha256 = "{sha256(token.encode())}"\nwrite = ["nightly"]\n')
    with Program(tmp_path / "data", "--config", str(config)) as program:
        for directory, field, status in (
            ("nightly", "X: y", 401), ("nightly", "Authorization: Bearer wrong", 401),
            ("nightly", f"Authorization: Basic A{basic(token)[6:]}", 401),
            ("app", f"Authorization: {basic(token)}", 403),
        ):  # fmt: skip
            for announced in ("Content-Length: 5000000", CHUNKED):
                path = f"/artefacts/{directory}/x"
                answer = program.ask(head("PUT", path, announced, "Expect: 100-continue", field))
                assert answer.is_problem(status)
                assert ("WWW-Authenticate" in answer.headers) == (status == 401)
        assert program.ask(put("/artefacts/nightly/x", b"1", f"Authorization: Bearer {token}")).status == 201
        assert program.ask(put("/artefacts/nightly/x", b"2", f"Authorization: {basic(token)}")).status == 200
        assert os.listdir(program.data / "nightly") == ["x"]
    log = program.log.read_text()
    assert "127.0.0.1 - ci [" in log
    assert token not in log


@pytest.mark.parametrize(("before", "line"), [
    ("", "GET public"), ("", "GET public/x?versions"), ("", "GET public/x?at=2024-01-02"),
    ("", "OPTIONS public"), ("GET", "PUT secret/n"), ("DELETE", "POST secret"),
])  # fmt: skip
def test_client_without_rights_cannot_fill_the_disk(guarded: Program, before: str, line: str) -> None:
    """Send a body with a request that does not use one, and a pipelined upload."""
    method, path = line.split(" ")
    with guarded.connect() as connection, contextlib.suppress(ConnectionError):
        connection.send(head(before, "/artefacts/public") if before else b"")
        connection.send(head(method, f"/artefacts/{path}", CHUNKED))
        for _ in range(30):  # more than the socket buffers hold, so that the server has received most of it
            connection.send(b"100000\r\n" + bytes(1 << 20) + b"\r\n")
        staged = (guarded.data / ".incoming").iterdir()
        assert sum(file.stat().st_size for file in staged) <= 1 << 20


def test_write_once_artefacts_cannot_be_changed(tmp_path: Path) -> None:
    data = fill(tmp_path / "data", "releases-1", "other")
    client = client_of(data, 'directory = [{name = "releases*", write_once = true}]', keep_versions=2)
    before, once = tree(data), "/artefacts/releases-1"
    for status, line, fields, body in (
        (409, f"PUT {once}/x", (), b"new"), (409, f"PUT {once}/x", (), V2.encode()),
        (409, f"PUT {once}/x", ("If-Match: *",), b"new"), (409, f"POST {once}/x", (), b"new"),
        (409, f"POST {once}/x?restore={V1}", (), b""), (409, f"POST {once}/x?restore={V2}", (), b""),
        (409, f"POST {once}", (MULTIPART,), form_of(("x", b"new"))),
        (409, f"POST {once}/x", (MULTIPART,), form_of(("y", b"new"))), (409, f"PUT {once}/x/y", (), b"new"),
        (403, f"DELETE {once}/x", (), b""), (403, f"DELETE {once}", (), b""),
        (403, f"DELETE {once}/x?version={V1}", (), b""), (403, f"DELETE {once}/x?versions", (), b""),
        (403, "DELETE /artefact/releases-1/", (), b""),
    ):  # fmt: skip
        result = simulate(client, line, *fields, body=body)
        assert (result.status_code, tree(data)) == (status, before), line
        assert result.headers["Content-Type"] == "application/problem+json"
    assert simulate(client, f"PUT {once}/n", body=b"1").status_code == 201
    assert simulate(client, f"POST {once}/m", body=b"1").status_code == 201
    mixed = simulate(client, f"POST {once}", MULTIPART, body=form_of(("l", b"1"), ("x", b"1"), ("l", b"2")))
    assert (mixed.status_code, [row["id"] for row in mixed.json["refused"]]) == (409, ["x"])
    assert tree(data) == before | {f"releases-1/{name}": b"1" for name in "lmn"}
    for line in ("PUT other/x", f"POST other/x?restore={V1}", "DELETE other"):
        assert simulate(client, line.replace(" ", " /artefacts/"), body=b"2").status_code < 300


def test_first_matching_rule_decides_each_key(tmp_path: Path) -> None:
    config = """directory = [
        {name = "open-*", write_once = false}, {name = "*-all", keep_versions = "all", max_size = "1 kB"},
        {name = "[!x]*-*", write_once = true, keep_versions = 1, max_size = 100},
        {name = "open-late", write_once = true, max_size = 1}]"""
    client = client_of(tmp_path / "data", config, keep_versions=2, max_size=10)
    for directory, replaced, keep, largest in (
        ("open-1", 200, 1, 100), ("open-all", 200, 4, 1000), ("a-all", 409, 0, 1000),
        ("open-late", 200, 1, 100), ("a-b", 409, 0, 100), ("plain", 200, 2, 10), ("x-1", 200, 2, 10),
        ("OPEN-1", 409, 0, 100),
    ):  # fmt: skip
        path = f"/artefacts/{directory}/x"
        statuses = {simulate(client, f"PUT {path}", body=b"%d" % number).status_code for number in range(5)}
        assert statuses == {201, replaced}, directory
        assert len(simulate(client, f"GET {path}?versions").json["versions"]) == keep + 1, directory
        for size, status in ((largest, 201), (largest + 1, 413)):
            assert simulate(client, f"PUT {path}-{size}", body=bytes(size)).status_code == status, directory


def test_max_size_of_a_directory(guarded: Program) -> None:
    eleven, before, folder = b"12345678901", tree(guarded.data), "/artefacts/app-1"
    n, token = folder + "/n", bearer(CI)[0]
    for request in (
        put(n, eleven, token), put(n, eleven, token, method="POST"), put(folder + "/x", eleven, token),
        head("PUT", n, CHUNKED, token) + pieces(eleven, 4),
        head("PUT", n, CHUNKED, token) + pieces(bytes(3_000_000), 65536),
        put(n, form_of(("x", eleven)), MULTIPART, token, method="POST"),
        put(folder, form_of(("n", eleven)), MULTIPART, token, method="POST"),
        head("POST", folder, CHUNKED, MULTIPART, token) + pieces(form_of(("n", eleven)), 7),
    ):  # fmt: skip
        answer = guarded.ask(request)
        assert (answer.status, answer.headers["Content-Type"]) == (413, "application/problem+json"), request
        assert tree(guarded.data) == before
    answer = ask(guarded, f"POST {folder}", MULTIPART, token, body=form_of(("small", b"1"), ("n", eleven)))
    assert answer.is_problem(413) and "PUT the files" in json.loads(answer.body)["detail"]
    assert tree(guarded.data) == before
    assert ask(guarded, "PUT /artefacts/nightly/n", token, body=bytes(3_000_000)).status == 201


TOKEN, KEY = '[[token]]\nname = "t"\n', f'sha256 = "{DIGESTS[0]}"\n'
MISTAKES: list[tuple[str, str]] = [  # a config file, and the place that the error line names
    ('read = ["*"]', "read"), ("[anonymos]\nread = []", "anonymos"), ('"a\\nb" = 1', "a"),
    ("[anonymous.x]", "x"), ('[anonymous]\nreads = ["*"]', "reads"), ('[anonymous]\nname = "x"', "name"),
    ("anonymous = 1", "anonymous"), ('[anonymous]\nread = "*"', "anonymous"),
    ("[anonymous]\nread = [1]", "anonymous"), ("[directory]", "directory"),
    ("[[anonymous]]\nread = []", "anonymous"), (TOKEN + KEY + "wirte = []", "wirte"),
    ('[token]\nname = "t"', "token"), (f"[[token]]\n{KEY}", "name"), (TOKEN, "sha256"),
    (f'[[token]]\nname = ""\n{KEY}', "token"), ("token = 1", "token"),
    (f"[[token]]\nname = 5\n{KEY}", "token"), (TOKEN + 'sha256 = ""', "token"),
    (TOKEN + "sha256 = 1", "token"),
    (TOKEN + KEY + '[[token]]\nname = "u"\nsha256 = "0"', "2"),
    (f'{TOKEN}sha256 = "{"g" * 64}"', "token"),
    (TOKEN + KEY + "read = {}", "token"), (TOKEN + KEY + 'write = [["*"]]', "token"),
    ("[[token]]\n[[token]]", "1"),
    (TOKEN + KEY + TOKEN + f'sha256 = "{DIGESTS[1]}"', "same"),
    (TOKEN + KEY + f'[[token]]\nname = "u"\n{KEY}', "same"),
    (f'{TOKEN}sha256 = "{sha256(b"")}"', "token"), ("[[directory]]\nwrite_once = true", "name"),
    *((f'[[directory]]\nname = "a"\n[[directory]]\nname = "b"\n{line}', "2") for line in (
        'write_once = "yes"', "write_once = 1", "keep_versions = -1", 'keep_versions = "some"',
        "keep_versions = true", "keep_versions = 1.5", "max_size = -1", "max_size = true",
        'max_size = "2 parsecs"', 'max_size = ""', "max_size = 1.5", "max_size = []", 'writeonce = "x"',
    )),
    ('[[directory]]\nname = ["*"]', "directory"), ("[[directory]", "line 1"), ("\n\nx = ?", "line 3"),
    ("\0", "line 1"), ('name = "\udcff"', "utf-8"), ("[anonymous]\n[anonymous]", "line 2"),
    ("x = " + "[" * 5000, ""),
]  # fmt: skip


def test_mistake_in_the_config_file_stops_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, data = tmp_path / "c.toml", tmp_path / "data"
    for text, place in MISTAKES:
        file.write_bytes(text.encode(errors="surrogateescape"))
        message = start_error(capsys, f"--config={file}", f"--data={data}")
        assert str(file) in message and place in message.replace(str(file), ""), (text[:200], message)
        with pytest.raises(ValueError, match=r"c\.toml"):
            a.create_app(data, config=file)
    file.write_text(TOKEN + f'sha256 = "{CI}"')  # not its digest
    assert CI not in start_error(capsys, f"--config={file}")
    file.chmod(0)
    closed = [file] if os.geteuid() else []  # root can read every file
    for unreadable in (tmp_path / "missing", tmp_path, *closed):
        assert str(unreadable) in start_error(capsys, f"--config={unreadable}", f"--data={data}")
    assert not data.exists()


@pytest.mark.parametrize("name", ["ci", 'quo"te\\', "ünï", "🎉", "a = 1 # b", "\x7f", "two\nlines", ""])
def test_new_token_works_when_its_lines_are_pasted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    status = a.main(["--new-token", name])
    shown = capsys.readouterr()
    if status != 0:  # an invalid name is refused
        assert (status, shown.out, shown.err.count("\n")) == (2, "", 1) and not (name and name.isprintable())
        return
    token, lines = shown.err.removesuffix("\n"), shown.out
    assert len(token) >= 32 and token not in lines
    client = client_of(fill(tmp_path / "data", "app"), lines)
    assert simulate(client, "GET /artefacts/app/x").status_code == 401
    assert simulate(client, "PUT /artefacts/app/x", *bearer(token), body=b"1").status_code == 200
    assert simulate(client, "GET /artefacts/app/x", f"Authorization: {basic(token)}").content == b"1"


def test_network_address_needs_tokens_or_open(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens, rules, data = tmp_path / "tokens", tmp_path / "rules", f"--data={tmp_path / 'data'}"
    tokens.write_text(TOKENS)
    rules.write_text('[anonymous]\nread = ["*"]\n')
    for host in ("0.0.0.0", "::", "", "192.0.2.1", "128.0.0.1", "localhost.example"):
        for config in ([], [f"--config={rules}"]):
            assert "--open" in start_error(capsys, data, f"--host={host}", *config)
    for option in (f"--config={tokens}", "--open"):
        command = [sys.executable, str(PROGRAM), "--host=0.0.0.0", "--port=0", "--quiet", data, option]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            port = urlsplit(process.stdout.readline().strip()).port or 0
            with socket.create_connection(("127.0.0.1", port)) as client, client.makefile("rb") as answer:
                client.sendall(b"GET /artefacts/ HTTP/1.1\r\nHost: a.example\r\n\r\n")
                assert answer.readline() == b"HTTP/1.1 200 OK\r\n"
            process.terminate()


def test_host_in_the_target_overrides_the_host_field(exposed: Program) -> None:
    """Check RFC 9112 §3.2.2."""
    for host, other, status in ("localhost", "evil.example", 403), ("evil.example", "localhost", 303):
        request = f"GET http://{other}/ HTTP/1.1\r\nHost: {host}\r\n\r\n"
        assert exposed.ask(request.encode()).status == status


HOSTS: dict[tuple[int, ...], list[str]] = {
    (200, 201): [
        "localhost", "LocalHost:8080", "localhost:", "localhost:65535", "127.0.0.1", "127.1.2.3:80", "[::1]",
        "[::1]:8080", "x.localhost", "localhost.", "artefacts.example", "ARTEFACTS.EXAMPLE:8080",
    ],
    (403,): [
        "example.org", "localhost.example.org", "127.0.0.1.example.org", "evil-localhost",
        "artefacts.example.org", "x.artefacts.example", "10.0.0.1", "0.0.0.0", "[::2]:80", "[::]",
        "2130706433", "0x7f.1",
    ],
    (400, 403): ["", ":80", "%6cocalhost", "*"],
    (400,): [
        "localhost, example.org", "local host", "[::1", "::1", "[localhost]", "[::1]x", "localhost:port",
        "\x7f", "localhost:123456", "localhost:-1", "user@localhost", "http://localhost", "localhost/",
        "localhost#", "\xff", "<script>", "localh\xf6st", "localhost\0", "x" * 60_000 + "<",
        "localhost\r\nHost: example.org", "localhost\r\nHost: localhost", "example.org\r\nHost: localhost",
        "localhost\r\nhOST:",
    ],
}  # fmt: skip


def test_host_field(exposed: Program, guarded: Program) -> None:
    def status(program: Program, line: str, fields: str = "", version: str = "1.1") -> int:
        request = f"{line} HTTP/{version}\r\n{fields}Content-Length: 0\r\n\r\n".encode("latin-1")
        answer = program.ask(request)
        return answer.status if answer.status < 300 or answer.is_problem(answer.status) else 0

    for statuses, hosts in HOSTS.items():
        for field in (f"Host: {host}\r\n" for host in hosts):
            assert status(exposed, "GET /artefacts/app/x", field) in statuses, field[:80]
            assert status(exposed, "PUT /artefacts/host/x", field) in statuses, field[:80]
            # with tokens any host name is accepted, but it must be valid
            expected = (400,) if statuses == (400,) else (200,) if statuses != (400, 403) else (200, 400)
            assert status(guarded, "GET /artefacts/public/x", field) in expected, field[:80]
    assert status(exposed, "GET /artefacts/app/x") == status(guarded, "GET /artefacts/public/x") == 400
    assert status(exposed, "GET /artefacts/app/x", "Host : localhost\r\n") == 400
    assert status(guarded, "GET /artefacts/public/x", version="1.0") == 200
    assert status(exposed, "PUT /artefacts/host/x", "Origin: null\r\n", version="1.0") == 403


OWN_ORIGINS = ["X: y", "Origin: http://localhost", "Origin: HTTPS://LocalHost", "Sec-Fetch-Site: same-origin",
       "Sec-Fetch-Site: none", "Sec-Fetch-Site: same-origin\r\nOrigin: http://localhost",
       "Referer: http://localhost/", "Referer: https://LocalHost/artefacts/app", "Referer: http://localhost",
       "Sec-Fetch-Site: none\r\nReferer: http://example.org/",
       "Origin: http://localhost\r\nReferer: http://example.org/", "Referer: http://artefacts.example:8443/builds/",
       "Origin: https://artefacts.example"]  # fmt: skip
FOREIGN_ORIGINS = [
    *(f"Referer: {referer}" for referer in (
        "http://example.org/", "http://example.org", "http://localhost:81/", "http://localhost.example.org/",
        "http://x.artefacts.example/", "http://artefacts.example@example.org/", "http://localhost@example.org/",
        "http://example.org/http://localhost/", "file:///x", "about:blank", "", "\xff",
        "http://artefacts.example:80:x@example.org/",
    )),
    *(f"Origin: {origin}" for origin in (
        "http://example.org", "null", "", "localhost", "http://", "http://localhost:81",
        "http://localhost.example.org", "http://example.org/http://localhost", "http://127.0.0.1", "file://",
        "\xff", "http://localhost/", "http://localhost, http://example.org",
        "http://localhost\r\nOrigin: http://example.org",
    )),
    *(f"Sec-Fetch-Site: {site}" for site in (
        "cross-site", "same-site", "", "nonsense", "same-origin, cross-site",
        "same-site\r\nOrigin: http://localhost", "cross-site\r\nSec-Fetch-Site: same-origin",
        "cross-site\r\nOrigin: http://localhost",
    )),
]  # fmt: skip


def test_page_of_another_site_cannot_change_anything(exposed: Program) -> None:
    before = tree(exposed.data)
    for field in FOREIGN_ORIGINS:
        for line in ("GET app/x", "HEAD app/x", "OPTIONS app/x", "GET app", "GET "):
            assert ask(exposed, line.replace(" ", " /artefacts/"), field).status == 200
        for line in (
            "PUT app/x", "PUT app/n", "POST app/n", "POST app", f"POST app/x?restore={V1}", "PATCH app/x",
            "DELETE app", "DELETE app/x", "DELETE app/x?versions", f"DELETE app/x?version={V1}",
        ):  # fmt: skip
            line = line.replace(" ", " /artefacts/")
            assert ask(exposed, line, field, MULTIPART, body=form_of(("n", b"1"))).is_problem(403), field
    assert tree(exposed.data) == before
    fields = FOREIGN_ORIGINS[0], "Access-Control-Request-Method: PUT"
    preflight = ask(exposed, "OPTIONS /artefacts/app/x", *fields)
    assert not [name for name in preflight.headers if name.lower().startswith("access-control")]
    for field in OWN_ORIGINS:
        assert ask(exposed, "PUT /artefacts/own/x", field).status in (200, 201), field
    request = put("/artefacts/own/x", b"", "Origin: http://artefacts.example:81")
    for host in b"artefacts.example:81", b"artefacts.example", b"127.0.0.1:8080":  # as a proxy may rewrite it
        assert exposed.ask(request.replace(b"localhost", host)).status == 200


NO_PATTERN = "the value is not a pattern that can match"
CONFIGS: list[tuple[str, str]] = [  # a config file, and what its error line says
    ('[token]\nname = "ci"', "[[token]]"), ("[directory]", "[[directory]]"), ("[tokens]", "[[token]]"),
    *((f"[[directory]]\nname = {name}", f"directory: number 1: 'name': {NO_PATTERN}")
      for name in ("'app/*'", "'.x'", "''", "'a\\b'", "'lost+found'", "5")),
    *((f"[anonymous]\nread = ['ok', '{name}']", f"anonymous: number 1: 'read': {NO_PATTERN}")
      for name in ("app/x", ".versions", "")),
    *((f"[[directory]]\nname = 'a'\nkeep_days = {days}", "'keep_days': the value is not a number of days")
      for days in ("0", "-1", "1.5", "true", "'1'", "10_000_000")),
    ("[[directory]]\nname = 'a'\npages = 1", "'pages': the value is not true or false"),
    ("[[directory]]\nname = 'a'\nmax_size = 0", "'max_size'"),
    (TOKEN + KEY + f'[[token]]\nname = "u"\nsha256 = "{CI}"', "token: number 2: 'sha256'"),
]  # fmt: skip


def test_error_of_a_config_file_names_the_place(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    for text, message in CONFIGS:
        file.write_text(text)
        with pytest.raises(ValueError) as error:  # noqa: PT011
            a.read_config(file)
        said = str(error.value)
        assert said.startswith(f"{file}: ") and message in said and CI not in said, (text, said)
    file.write_text("[[directory]]\nname = 'a-*'\nkeep_days = 30\npages = true")
    settings = a.Settings(a.read_config(file))
    assert [settings.rule("a-1", key) for key in ("keep_days", "pages")] == [30, True]
    assert [settings.rule("b", key) for key in ("keep_days", "pages")] == [None, None]


def test_every_response_is_closed_to_other_sites(program: Program) -> None:
    requests = [
        (200, head("GET", EXISTING)), (200, head("HEAD", EXISTING)), (200, head("GET", "/artefacts/app")),
        (200, head("GET", "/artefacts/", "Accept: text/html")), (200, head("OPTIONS", EXISTING)),
        (206, head("GET", EXISTING, "Range: bytes=0-1")), (303, head("GET", "/")),
        (404, head("GET", "/nowhere")),
        (304, head("GET", EXISTING, f"If-None-Match: {program.get(EXISTING).etag}")),
        (404, head("GET", ABSENT)), (405, head("PATCH", EXISTING)), (409, put(EXISTING, b"", method="POST")),
        (412, put(EXISTING, b"", 'If-Match: "x"')), (416, head("GET", EXISTING, "Range: bytes=9-")),
        (403, put(EXISTING, b"", "Origin: http://example.org")), (400, b"GARBAGE\r\n\r\n"),
        (413, head("PUT", ABSENT, "Content-Length: 999999999999")), (201, put("/artefacts/app/corp", b"")),
        (204, head("DELETE", "/artefacts/app/corp")),
    ]  # fmt: skip
    for status, request in requests:
        answer = program.ask(request)
        assert answer.status == status, request
        assert answer.headers.get_all("Cross-Origin-Resource-Policy") == ["same-origin"], request


# == Errors =======================================================================================

PUT_N, PUT_X = "PUT /app/n", "PUT /app/x.txt"
PROBLEMS: list[tuple[int, str, dict[str, str], list[str]]] = [  # status, part of detail, fields, requests
    (404, "none", {}, [
        "GET /none", "DELETE /none", "GET /app/none", "DELETE /app/none", "GET /app/none?versions",
        "DELETE /app/none?versions", "GET /app/x.txt?version=none", "DELETE /app/x.txt?version=none",
        "POST /app/x.txt?restore=none",
    ]),
    (404, "no artefact", {}, ["GET /app/g", "DELETE /app/f", "GET /app/x.txt/y", "GET /app/X.txt"]),
    (404, T3, {}, [f"{what}={T3}" for what in (
        "GET /app/x.txt?version", "DELETE /app/x.txt?version", "POST /app/x.txt?restore")]),
    (404, "?versions", {}, [
        "GET /app/x.txt?at=2023-01-01", "GET /app/x.txt?version=", "DELETE /app/x.txt?version=",
        "POST /app/x.txt?restore=",
    ]),
    (405, "Allow", {}, ["PATCH /app/x.txt", "PUT /app", "PUT /app/", "POST /", "DELETE /"]),
    (400, "begins with '.'", {}, [
        "PUT /.app/x", "PUT /app/.versions/x", "PUT /app/../x", "DELETE /.trash"]),
    (404, "begins with '.'", {}, [
        "GET /%2e%2e", "GET /app/.zarray", "GET /app/f/.well-known/x", "GET /.trash"]),
    (404, "control", {}, ["GET /app/a%0ab"]), (404, "255", {}, ["GET /app/" + "x" * 256]),
    (404, "UTF-8", {}, ["GET /%FF"]),
    (400, "is empty", {}, ["PUT /app/a//b", "PUT /app/a//", "PUT //x"]),
    (400, "control", {}, ["PUT /app/%00", "PUT /app/a%0ab", "DELETE /%00"]),
    (400, "backslash", {}, ["PUT /app/a%5Cb"]),
    (400, "UTF-8", {}, ["PUT /app/%FF"]),
    (400, "255", {}, ["PUT /app/" + "x" * 256]),
    (400, "1024", {}, ["PUT /app/" + "/".join("x" * 513)]),
    (400, "'at'", {}, ["GET /app/x.txt?at=now", "GET /app/x.txt?at="]),
    (400, "'limit'", {}, ["GET /app?limit=0", "GET /app?limit=x", "GET /app?limit="]),
    (400, "'pdf'", {}, ["GET /app?format=pdf"]),
    (400, "Content-Range", {"Content-Range": "bytes 1-3/4"}, [PUT_N, PUT_X, "POST /app/n"]),
    (400, "4 bytes", {"Content-Length": "4"}, [PUT_N, PUT_X, "POST /app/n"]),
    (400, "SHA-256", {"Repr-Digest": f"sha-256=:{B64}:"}, [PUT_N, PUT_X, "POST /app/n"]),
    (400, "SHA-256", {"Content-Digest": f"sha-256=:{B64}:"}, [PUT_N]),
    (400, "SHA-256", {"Digest": f"SHA-256={B64}"}, [PUT_N]),
    (400, "SHA-256", {"X-Checksum-Sha256": DIGEST}, [PUT_N]),
    (400, "Repr-Digest", {"X-Checksum-Sha256": "?"}, [PUT_N]),
    (400, "quoted", {"If-None-Match": "unquoted"}, [PUT_X, "DELETE /app/x.txt", RESTORE]),
    (409, "PUT", {}, ["POST /app/x.txt"]),
    (409, "in the way", {}, ["PUT /app/x.txt/y", "PUT /app/f", "POST /app/f"]),
    (409, "current", {}, [f"DELETE /app/x.txt?version={T2}"]),
    (412, "Fetch", {"If-Match": ONE}, [
        PUT_X, PUT_N, "POST /app/n", RESTORE, "GET /app/x.txt", "DELETE /app/x.txt",
        "DELETE /app/x.txt?versions", f"DELETE /app/x.txt?version={T2}", f"GET /app/x.txt?version={T2}",
    ]),
    (412, "Fetch", {"If-Match": ""}, [PUT_X, PUT_N, "DELETE /app/x.txt"]),
    (412, "Fetch", {"If-None-Match": "*"}, [PUT_X, RESTORE, "DELETE /app/x.txt"]),
    (412, "Fetch", {"If-None-Match": TWO}, [PUT_X]),
    (412, "Fetch", {"If-Unmodified-Since": MODIFIED.replace("2024", "2023")}, [
        PUT_X, "DELETE /app/x.txt", "GET /app/x.txt"]),
    (415, "Content-Encoding", {"Content-Encoding": "gzip"}, [PUT_N, "POST /app/n"]),
    (416, "3 bytes", {"Range": "bytes=3-"}, ["GET /app/x.txt"]),
    (507, "disk", {"Content-Length": "9" * 18}, [PUT_N, "POST /app/n"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("status", "word", "fields", "line"),
    [(status, word, fields, line) for status, word, fields, lines in PROBLEMS for line in lines],
)
def test_problem_details(
    data: Path, client: testing.TestClient, status: int, word: str, fields: dict[str, str], line: str
) -> None:
    result = call(client, line.replace(" /", " /artefacts/", 1), headers=fields)
    assert (result.status_code, result.headers["Content-Type"]) == (status, "application/problem+json")
    members = {"title", "status", "detail", *(["code"] if status == 409 else [])}
    assert set(result.json) == members and word in result.json["detail"]
    assert result.headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert (result.json["status"], result.json["title"]) == (status, result.status[4:])
    assert ("Allow" in result.headers) == (status == 405)
    assert result.headers.get("Content-Range") == ("bytes */3" if status == 416 else None)
    assert str(data) not in result.text and "Traceback" not in result.text and "Errno" not in result.text
    assert tree(data) == INITIAL


def test_responses_do_not_reveal_server_paths(data: Path, client: testing.TestClient) -> None:
    (data / "app/link").symlink_to(data)
    (data / ".locks").mkdir(exist_ok=True)
    (data / ".locks/app").symlink_to(data)
    (data / ".incoming").rmdir()
    (data / ".incoming").write_bytes(b"no folder")
    for line in (
        "GET /app/link", "GET /app/link/x", "PUT /app/link", "PUT /app/n", "DELETE /app/x.txt", RESTORE,
        "DELETE /app",
    ):  # fmt: skip
        result = call(client, line.replace(" /", " /artefacts/", 1))
        assert result.status_code == (404 if line.startswith("GET") else 409)
        assert str(data) not in result.text and "Errno" not in result.text
    assert call(client, "GET /artefacts/app/x.txt").content == b"two"


ODD_VALUES = [
    "", " ", "*", '"', "W/", "\xff\xfe", "a" * 9000, "0", "-1", "9" * 400, "bytes=--", "Sun, 99 Foo",
    ";,==", "\t", "%00",
]  # fmt: skip
FIELDS = (
    "Accept", "Content-Digest", "Content-Encoding", "Content-Range", "Content-Type", "Digest", "If-Match",
    "If-Modified-Since", "If-None-Match", "If-Range", "If-Unmodified-Since", "Range", "Repr-Digest",
    "Transfer-Encoding", "X-Checksum-Sha256",
)  # fmt: skip
PARAMETERS = ("after", "at", "format", "limit", "prefix", "restore", "version", "versions")


def test_client_input_never_causes_a_server_error(client: testing.TestClient) -> None:
    paths, methods = ("", "/app", "/app/x.txt", "/app/n"), ("GET", "PUT", "POST", "DELETE")
    for path, odd, method in itertools.product(paths, ODD_VALUES, methods):
        for field in FIELDS:
            status = call(client, f"{method} /artefacts{path}", headers={field: odd}).status_code
            assert status < 500, (method, path, field, odd)
        for name in PARAMETERS:
            status = call(client, f"{method} /artefacts{path}?{name}={quote(odd)}").status_code
            assert status < 500, (method, path, name, odd)


def test_files_that_cannot_be_read_or_removed(data: Path) -> None:
    add_file(data / "app/closed", b"closed", T1)
    add_file(data / "app/open", b"open", T2)
    add_file(data / "old/pkg/mod/go.mod", b"module")
    (data / "old/pkg/mod").chmod(0o555)
    (data / "app/closed").chmod(0)
    logged = r"artefacts: ([A-Z]+ /artefacts/app\S*:|app/closed cannot be read:) .*Permission denied.*"
    with Program(data, before=without_privileges(), logged=logged) as program:
        assert ids(json.loads(program.get("/artefacts/app").body)) == ["open"]
        assert program.get("/artefacts/app?format=sha256sums").body.endswith(b"  open\n")
        assert program.get("/artefacts/app/open").body == b"open"
        assert program.get("/artefacts/app/closed").is_problem(500)
        assert program.ask(put("/artefacts/app/closed", b"new")).status == 500  # unreadable
        assert program.ask(head("DELETE", "/artefacts/old")).status == 204
        assert not (data / "old").exists() and os.listdir(data / ".trash") == []


def test_leased_file_gets_503(data: Path) -> None:
    path = "/artefacts/app/leased"
    add_file(data / "app/leased", b"1")
    with Program(data, logged=r"artefacts: (PUT|GET) .*Errno 11.*") as program:
        with leased(data / "app/leased") as lease:
            lease()
            assert program.ask(put(path, b"2")).is_problem(503)
            assert program.get(path).is_problem(503)
        assert program.ask(put(path, b"2")).status == 200


def test_conflict_has_a_code(tmp_path: Path) -> None:
    config = '[[directory]]\nname = "once"\nwrite_once = true'
    client = client_of(fill(tmp_path / "data", "app", "once"), config)
    for line, code in (
        ("POST /app/x", "exists"), ("PUT /once/x", "write_once"), ("POST /once/x", "write_once"),
        ("PUT /app/x/y", "in_the_way"), (f"DELETE /app/x?version={V2}", "in_the_way"),
    ):  # fmt: skip
        result = call(client, line.replace(" /", " /artefacts/"))
        assert (result.status_code, result.json.get("code")) == (409, code), line


STORAGE_ERRORS: list[tuple[Exception, int, int, str]] = [  # error; status of a write, of a read; detail
    (a.CannotStore("'app' is on another file system."), 507, 507, "'app'"),
    (a.Unavailable("The data directory does not exist."), 503, 503, "data"),
    *((OSError(number, "?", "/srv"), 400, 404, "file system cannot store this name") for number in (
        errno.EINVAL, errno.EILSEQ, errno.ENAMETOOLONG)),
    *((OSError(number, "?", "/srv"), 507, 507, "?versions") for number in (errno.ENOSPC, errno.EDQUOT)),
    (OSError(errno.EMFILE, "?"), 503, 503, "Try again"), (OSError(errno.ELOOP, "?"), 409, 409, "link"),
    (OSError(errno.EXDEV, "/srv"), 500, 500, "Internal error"),
]  # fmt: skip


@pytest.mark.parametrize(("error", "write", "read", "detail"), STORAGE_ERRORS)
def test_error_of_the_storage(
    client: testing.TestClient, monkeypatch: pytest.MonkeyPatch,
    error: Exception, write: int, read: int, detail: str,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    for name in "fetch", "admit":
        monkeypatch.setattr(a.Repository, name, fail)
    for line, status in ("PUT /artefacts/app/n", write), ("GET /artefacts/app/n", read):
        result = call(client, line)
        assert result.status_code == status and detail in result.json["detail"] and "/srv" not in result.text
        assert result.headers.get("Retry-After") == ("10" if status == 503 else None)
        assert ("code" in result.json) == (status == 409)


def test_unencoded_query_is_told_to_encode_it(program: Program, empty_client: testing.TestClient) -> None:
    for query in b"prefix=\xc3\xa4", b"prefix=\xe4":
        answer = program.ask(b"GET /artefacts/app?" + query + b" HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert answer.is_problem(400) and "percent-encoded" in json.loads(answer.body)["detail"]
        environ = testing.create_environ("/artefacts/app") | {"QUERY_STRING": query.decode("latin-1")}
        response = testing.StartResponseMock()  # of a server that passes it on
        assert b"percent-encoded" in b"".join(empty_client.app(environ, response))
        assert response.status == "400 Bad Request"


N = 58_000  # the longest header field or query that is accepted has almost 64 KiB
BLANKS = " " * N
EXPENSIVE: dict[str, list[str]] = {
    "Accept": [
        'text/html;b1="' + ";" * N, "," * N, "a/b," * (N // 4), "*/*;q=0.1," * (N // 10), '"' * N,
        "text/html" + ";a" * (N // 2), 'text/html;a="\\' + '\\"' * (N // 2),
    ],
    "Content-Type": [
        'multipart/form-data; boundary="' + ";" * N, 'multipart/form-data; boundary=XX;b="' + ";" * N,
        "multipart/form-data" + ";a=b" * (N // 4), "a/b" + "\t " * (N // 2) + "x", "a/b;" * (N // 4),
    ],
    "If-None-Match": ['"' * N, 'W/"a",' * (N // 6), '"a" ' * (N // 4), "," * N, '"a ' * (N // 3), BLANKS],
    "If-Match": ['"' * N, "W/" * (N // 2), '"a' * (N // 2), BLANKS + "*"],
    "If-Modified-Since": ["9" * N, f"Sun,{BLANKS}06 Nov 1994 08:49:37 GMT", "Sun, " * (N // 5)],
    "Range": ["bytes=" + "0-0," * (N // 4), "bytes=0-" + "9" * N, f"bytes={BLANKS}x"],
    "Repr-Digest": [", \t" * (N // 3) + "sha-256", f"sha-256=:{'A' * N}:", "sha-256=:AA==:," * (N // 15)],
    "Digest": ["SHA-256=" + "A" * N, "SHA-256=AAAA," * (N // 13), "SHA-256=" + "=" * N],
    "X-Checksum-Sha256": ["9" * N], "Content-Range": ["bytes " + "9" * N],
    "Content-Encoding": ["x," * (N // 2)],
    "Authorization": ["Basic " + "A" * N, "Basic " + "QQ==" * (N // 4), f"Bearer {BLANKS}x"],
    "Host": ["x" * N, "1." * (N // 2), "[" + "1:" * (N // 2) + "]", "localhost" + ":" * N],
    "Origin": ["http://" + "x" * N, "://" * (N // 3)], "Referer": ["http://" + "/" * N, "://" * (N // 3)],
}
LONG_QUERIES = [
    "a&" * (N // 2), "limit=1&" * (N // 8), "prefix=" + "%41" * (N // 3), "prefix=" + "%" * N, "&" * N,
    "&".join(map(str, range(N // 6))), "prefix=" + "," * N, "at=" + "1" * N, "limit=" + "0" * N + "1",
    f"at=2024-01-01T00:00:00.{'1' * N}Z", "version=" + "1" * N,
]
LONG_PARTS = [
    'Content-Disposition: form-data; name="f"; filename="' + ";" * 8000 + '"',
    'Content-Disposition: form-data; filename="a"; x="' + ";" * 4000 + '"', "X: y\r\n" * 1000,
    "Content-Disposition: form-data" + "; a=b" * 800, "Content-Disposition: " + ";" * 4000,
    "Content-Disposition: form-data; filename*=utf-8''" + "%41" * 1200,
    'Content-Disposition: form-data; filename="a"\r\nContent-Type: text/html;b="' + ";" * 3900,
]


def test_no_field_costs_more_than_100_ms(empty_client: testing.TestClient) -> None:
    """Measure this process: the server's own time, without the socket."""
    call(empty_client, "PUT /artefacts/app/x")
    lines = "GET /artefacts/app/x", "GET /artefacts/app", "PUT /artefacts/app/y", "POST /artefacts/app"
    requests: list[tuple[str, dict[str, str], str]] = []
    for (name, values), line in itertools.product(EXPENSIVE.items(), lines):
        requests += ((line, {name: value}, "x") for value in values)
    for path, query in itertools.product(("app/x", "app", ""), LONG_QUERIES):
        requests.append((f"GET /artefacts/{path}?{query}", {}, ""))
    for header in LONG_PARTS:
        requests.append(("POST /artefacts/app", FORM, f"--XX\r\n{header}\r\n\r\nx\r\n--XX--\r\n"))
    for line, fields, body in requests:
        started = time.thread_time()
        result = call(empty_client, line, headers=fields, body=body if line[0] == "P" else "")
        assert time.thread_time() - started < 0.1, (line[:80], str(fields)[:80])
        assert result.status_code < 500, (line[:80], str(fields)[:80])


# == The application ==============================================================================


def test_import_has_no_side_effects(tmp_path: Path) -> None:
    code = (
        "import logging, os, signal, sys, threading\n"
        "sys.dont_write_bytecode = True\n"
        "before = [*map(signal.getsignal, signal.Signals)]\n" + IMPORT +
        "assert os.listdir() == [] and threading.active_count() == 1 and not logging.root.handlers\n"
        "assert [*map(signal.getsignal, signal.Signals)] == before\n"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=10, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_root_redirects_to_the_listing(client: testing.TestClient) -> None:
    assert call(client, "GET /nowhere").status_code == 404 and call(client, "PUT /").status_code == 405
    for method, prefix in itertools.product(("GET", "HEAD"), ("", "/repo", "/a b")):
        result = call(client, f"{method} /", root_path=prefix)
        assert (result.status_code, result.headers["Location"]) == (303, quote(prefix) + "/artefacts/")


@pytest.mark.parametrize("prefix", ["", "/repo", "/dé pôt"])
def test_paged_listing_of_a_mounted_application(client: testing.TestClient, prefix: str) -> None:
    ids, base = [f"p&{n} +é" for n in range(5)], quote(prefix)
    mounted = prefix.encode().decode("latin-1")  # the form of SCRIPT_NAME in PEP 3333
    for id in ids:
        result = call(client, f"PUT {a.href('', 'app', id)}", root_path=mounted)
        assert result.headers["Location"] == result.json["href"] == a.href(base, "app", id)
    found, following, pages = [], f"{a.href('', 'app')}?limit=2&prefix=p%26", 0
    while following:
        page = call(client, f"GET {following}", root_path=mounted)
        found += [listed["id"] for listed in page.json["artefacts"]]
        following, pages = page.json.get("next", ""), pages + 1
        assert page.headers.get("Link") == (f'<{following}>; rel="next"' if following else None)
        following = following.removeprefix(base)
    assert (found, pages) == (ids, 3)


def test_embedded_application_leaves_authentication_to_its_host(tmp_path: Path) -> None:
    client = testing.TestClient(a.create_app(fill(tmp_path / "data", "app")))
    for value in (basic("of the other stack"), "Bearer ey.J.0", "Negotiate YII=", "nonsense"):
        for host in ("artefacts.example", "10.0.0.7:8443"):
            fields = f"Authorization: {value}", f"Origin: https://{host}", f"Host: {host}"
            assert simulate(client, "GET /artefacts/app/x", *fields).status_code == 200
            assert simulate(client, "PUT /artefacts/app/x", *fields, body=V2.encode()).status_code == 200
    cached = simulate(client, "GET /artefacts/app/x").headers["Cache-Control"]
    assert cached == "no-cache, no-transform"


# == Connections: raw sockets =====================================================================


def test_connection_stays_open_after_every_complete_request(program: Program) -> None:
    etag, path = f'"{sha256(b"there")}"', "/artefacts/app/open"
    requests = [
        (put(path, b"1"), 201), (put(path, b"1"), 200), (put(path, b"1", method="POST"), 409),
        (put(path, b"2", 'If-Match: "0"'), 412), (put(path, b"2", "Content-Range: bytes 0-0/9"), 400),
        (head("PUT", path, "Transfer-Encoding: chunked") + pieces(b"3", 1), 200), (head("GET", path), 200),
        (head("HEAD", path), 200), (head("DELETE", path), 204), (head("DELETE", path), 404),
        (head("GET", EXISTING, f"If-None-Match: {etag}"), 304), (head("GET", EXISTING, 'If-Match: "0"'), 412),
        (head("GET", EXISTING, "Range: bytes=9-"), 416), (head("GET", EXISTING, "Range: bytes=0-1"), 206),
        (head("OPTIONS", EXISTING), 200), (head("PATCH", EXISTING), 405),
        (head("GET", "/artefacts/.app"), 404), (head("HEAD", path), 404), (head("GET", "/"), 303),
        (head("GET", "/else"), 404),
        (b"\r\n" + head("GET", EXISTING), 200),
    ]  # fmt: skip
    with program.connect() as connection:
        for request, status in requests:
            answer = connection.ask(request)
            assert answer.status == status, request
            assert answer.headers.get("Connection", "keep-alive").lower() == "keep-alive", request
    for last in (head("GET", EXISTING, "Connection: close"), head("GET", EXISTING, version="1.0")):
        with program.connect() as connection:
            assert connection.ask(last).body == b"there"
            assert connection.ends()


def test_pipelined_requests_run_in_order(program: Program, large: bytes) -> None:
    path = "/artefacts/app/pipelined"
    requests = [
        put(path, b"1"), head("GET", path), put(path, b"22"), head("GET", "/artefacts/app/large"),
        head("HEAD", path), head("DELETE", path), head("GET", path), head("GET", "/artefacts/app"),
        head("PUT", path, "Transfer-Encoding: chunked") + pieces(b"333", 2), head("GET", path),
    ]  # fmt: skip
    with program.connect() as connection:
        connection.send(b"".join(requests))
        answers = [connection.answer(to_head=request.startswith(b"HEAD ")) for request in requests]
    assert [answer.status for answer in answers] == [201, 200, 200, 200, 200, 204, 404, 200, 201, 200]
    assert (answers[1].body, answers[4].headers["Content-Length"], answers[9].body) == (b"1", "2", b"333")
    assert answers[3].body == large


def test_pipelined_large_fetches_do_not_block_other_clients(tmp_path: Path) -> None:
    path, content = "/artefacts/app/large", bytes(20 << 20)
    with Program(tmp_path / "data") as program:
        assert program.ask(put(path, content)).status == 201
        with program.connect() as connection:
            connection.send(head("GET", path) * 3)
            assert program.get("/artefacts/app").status == 200
            assert [connection.answer().body == content for _ in range(3)] == [True] * 3


def test_pipelined_request_sees_the_effect_of_earlier_requests(program: Program) -> None:
    """Send the body late: a decision from the header alone must wait for the DELETE before it."""
    path = "/artefacts/app/late"
    program.ask(put(path, b"1"))
    with program.connect() as connection:
        connection.send(head("DELETE", path) + head("POST", path, "Content-Length: 1"))
        assert connection.answer().status == 204
        assert connection.send(b"2").answer().status == 201
    assert program.get(path).body == b"2"


@pytest.mark.parametrize("last", [
    head("GET", EXISTING, "Connection: close"), head("GET", EXISTING + "?versions", "Connection: close"),
    head("GET", EXISTING, version="1.0"), b"nonsense\r\n\r\n",
    head("GET", EXISTING, "Connection: TE, close"),
    head("GET", EXISTING, "Connection: Close", "Connection: x"),
    put(EXISTING, b"another", "Connection: close", "If-None-Match: *"),
    put(EXISTING, b"there", "Connection: close"),
])  # fmt: skip
def test_bytes_after_the_last_request_are_ignored(program: Program, last: bytes) -> None:
    with program.connect() as connection:
        answer = connection.send(last + head("DELETE", EXISTING)).answer()
        assert answer.headers["Connection"] == "close" and connection.ends()
    assert program.get(EXISTING).body == b"there"


def test_last_response_is_complete_even_if_more_bytes_follow(program: Program, large: bytes) -> None:
    for following in (b"\r\n", head("DELETE", "/artefacts/app/large")):
        with program.connect(receive_buffer=4096) as connection:
            connection.send(head("GET", "/artefacts/app/large", "Connection: close"))
            assert connection.file.peek(1)
            connection.send(following)
            assert connection.answer().body == large
            assert connection.ends()


def test_request_may_arrive_in_any_pieces(program: Program) -> None:
    body = bytes(range(20))
    request = head("PUT", "/artefacts/app/pieces", "Transfer-Encoding: chunked") + pieces(body, 6)
    with program.connect() as connection:
        for cut in range(1, len(request)):
            # One send carries a whole request and the first part. The response to the request proves
            # that the server has received the first part and nothing of the second.
            assert connection.ask(head("GET", EXISTING) + request[:cut]).body == b"there"
            answer = connection.send(request[cut:]).answer()
            assert json.loads(answer.body)["sha256"] == sha256(body), cut
        for byte in request:
            connection.send(bytes([byte]))
        assert connection.answer().status == 200
    assert program.get("/artefacts/app/pieces").body == body


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
def test_chunked_body_is_decoded_from_any_pieces(size: int) -> None:
    body = b"5;a=b\r\nhello\r\n01\r\n\r\r\n0A\r\n0\r\n\r\n0\r\n\r\n\r\n0;x\r\nX: y\r\nZ: \r\n\r\n"
    decoder, content, received = a.BodyDecoder(None), b"", b""
    for start in range(0, len(body), size):
        received += body[start : start + size]
        piece, taken = decoder.decode(received + b"GET"[: 3 * (start + size >= len(body))])
        content, received = content + piece, received[taken:]
    assert decoder.complete and received == b""
    assert content == b"hello\r0\r\n\r\n0\r\n\r\n"


@pytest.mark.parametrize("body", [
    b"5\r\nhelloX", b"5\r\nhello\rX", b"5\rX", b"0\r\n\n", b"5;" + b"x" * 5000,
    b"5;" + b"x" * 5000 + b"\r\nhello",
])  # fmt: skip
def test_malformed_chunks_are_refused_at_once(body: bytes) -> None:
    with pytest.raises(HTTPBadRequest):
        decoder, received = a.BodyDecoder(None), body
        while received:
            received = received[decoder.decode(received)[1] :]


def test_header_cache_does_not_mix_requests(program: Program) -> None:
    """Send pairs of requests that share the request line, the header fields, or both."""
    path, fields = "/artefacts/app/alike", (CHUNKED, "Content-Type: text/x-one")
    with program.connect() as one, program.connect() as other:
        for connection, content in itertools.product((one, other), (b"1", b"22", b"")):
            answer = connection.ask(head("PUT", path, *fields) + pieces(content, 1))
            assert b'"size": %d, "type": "text/x-one"' % len(content) in answer.body
            assert other.ask(head("GET", path)).body == content
            assert one.ask(head("GET", path, "Range: bytes=-1")).body == content[-1:]
            assert b'"size": %d,' % len(content) in one.ask(head("GET", path + "?versions")).body
            assert other.ask(head("DELETE", path)).status == 204
            assert other.ask(head("GET", path)).is_problem(404)


def test_bytes_after_the_content_length_are_another_request(program: Program) -> None:
    with program.connect() as connection:
        request = head("PUT", "/artefacts/app/short", "Content-Length: 3") + b"abcdef\r\n\r\n"
        assert connection.ask(request).status == 201
        assert connection.answer().is_problem(400)
        assert connection.ends()
    assert program.get("/artefacts/app/short").body == b"abc"


@pytest.mark.parametrize("announced", ["Content-Length: 4", CHUNKED])
def test_expect_100_continue(program: Program, announced: str) -> None:
    path = f"/artefacts/expected/{len(announced)}"
    with program.connect() as connection:
        assert connection.ask(head("PUT", path, announced, "Expect: 100-continue")).status == 100
        body = pieces(b"body", 3) if announced == CHUNKED else b"body"
        assert connection.send(body).answer().status == 201
        # A request without a body needs no 100.
        assert connection.ask(head("GET", path, "Expect: 100-continue")).body == b"body"
        assert connection.ask(put(path, b"", "Expect: 100-continue")).status == 200
        # A body that has already arrived needs no 100 either.
        answer = connection.ask(put(path, b"new", "Expect: 100-continue"))
        assert (connection.answer() if answer.status == 100 else answer).status == 200
    assert program.get(path).body == b"new"


def test_100_continue_follows_the_previous_streamed_response(program: Program, large: bytes) -> None:
    expecting = head("PUT", "/artefacts/app/waits", "Content-Length: 9", "Expect: 100-continue")
    with program.connect() as connection:
        connection.send(head("GET", "/artefacts/app?format=tar&prefix=large") + expecting)
        time.sleep(0.2)  # by then the stream has filled the buffers and waits
        with tarfile.open(fileobj=io.BytesIO(connection.answer().body)) as archive:
            assert archive.getnames() == ["large"]
        assert connection.answer().status == 100
        assert connection.ask(b"123456789").status == 201


def test_body_sent_without_waiting_for_100_continue(program: Program) -> None:
    """Omit the 100, which is not needed then (RFC 9110 §10.1.1)."""
    path, expect = "/artefacts/app/along", "Expect: 100-continue"
    refused, stored = put(path, b"1", expect, 'If-Match: "0"'), put(path, b"2", expect)
    requests = (refused, 412), (stored, 201), (head("GET", path), 200)
    with program.connect() as connection:
        connection.send(b"".join(request for request, _ in requests))
        assert [connection.answer().status for _ in requests] == [status for _, status in requests]
        assert connection.ask(head("GET", path)).body == b"2"


REFUSALS = [
    ("PUT", EXISTING, "If-None-Match: *", 412), ("PUT", EXISTING, 'If-Match: "0"', 412),
    ("PUT", ABSENT, "If-Match: *", 412), ("POST", EXISTING, "X: y", 409),
    ("PUT", EXISTING + "/below", "X: y", 409),
    ("PUT", "/artefacts/app/.new", "X: y", 400), ("PUT", "/artefacts/.app/new", "X: y", 400),
    ("PUT", "/artefacts/app/%ff", "X: y", 400), ("PUT", ABSENT, "Content-Range: bytes 5-9/10", 400),
    ("PUT", ABSENT, "Repr-Digest: sha-256=:short:", 400), ("PUT", "/artefacts/app", "X: y", 405),
    ("PUT", ABSENT, "Content-Encoding: gzip", 415), ("PUT", ABSENT, "Sec-Fetch-Site: cross-site", 403),
    ("PUT", "/", "X: y", 405),
]  # fmt: skip
ANNOUNCED = [
    *((*refusal, announced) for refusal in REFUSALS for announced in ("Content-Length: 5000000", CHUNKED)),
    *(("PUT", ABSENT, "X: y", 413, f"Content-Length: {size}") for size in (MAX_SIZE + 1, 1 << 62, 10**30)),
    *((method, EXISTING, "X: y", 413, f"Content-Length: {10**30}") for method in ("GET", "DELETE")),
]


@pytest.mark.parametrize("expect", ["X-Expect: nothing", "Expect: 100-continue"])
@pytest.mark.parametrize(("method", "path", "field", "status", "announced"), ANNOUNCED)
def test_refusal_is_sent_before_the_body(
    program: Program, method: str, path: str, field: str, status: int, announced: str, expect: str
) -> None:
    with program.connect() as connection:
        answer = connection.ask(head(method, path, announced, field, expect))
        assert answer.is_problem(status)
        assert answer.headers["Connection"].lower() == "close"
        assert program.incoming() == []
        assert connection.ends()
    assert program.get(EXISTING).body == b"there"
    assert program.get(ABSENT).status == 404


@pytest.mark.parametrize("announced", ["Content-Length: 5000000", CHUNKED])
def test_unknown_digest_is_computed_before_the_body_arrives(program: Program, announced: str) -> None:
    id, content = f"dropped-{len(announced)}", os.urandom(100_000)
    add_file(program.data / "app" / id, content)
    condition, expect = f'If-None-Match: "{sha256(content)}"', "Expect: 100-continue"
    with program.connect() as connection:
        answer = connection.ask(head("PUT", f"/artefacts/app/{id}", announced, condition, expect))
        assert answer.is_problem(412) and connection.ends()
    add_file(program.data / "app" / id, content + b"another")
    with program.connect() as connection:
        assert connection.ask(head("PUT", f"/artefacts/app/{id}", announced, condition, expect)).status == 100


def test_pipelined_upload_is_refused_before_its_body(program: Program) -> None:
    path, expect = "/artefacts/app/there", "Expect: 100-continue"
    with program.connect() as connection:
        refused = head("PUT", path, "Content-Length: 9", 'If-Match: "0"', expect)
        connection.send(head("GET", "/artefacts/app") + refused)
        assert connection.answer().status == 200 and connection.answer().is_problem(412)
    with program.connect() as connection:
        welcome = head("PUT", "/artefacts/app/behind", "Content-Length: 9", expect)
        connection.send(head("GET", "/artefacts/app") + welcome)
        assert [connection.answer().status for _ in range(2)] == [200, 100]
        assert connection.ask(b"123456789").status == 201


def test_half_closed_client_gets_every_response(program: Program, large: bytes) -> None:
    """Read the rest of the refused upload: closing with unread bytes would reset the connection."""
    for _ in range(5):
        with program.connect() as connection:
            refused = put(EXISTING, bytes(500_000), 'If-Match: "0"')
            connection.send(head("GET", "/artefacts/app/large") + refused)
            connection.socket.shutdown(socket.SHUT_WR)
            assert connection.answer().body == large
            time.sleep(0.1)
            assert connection.answer().is_problem(412) and connection.ends()


@pytest.mark.parametrize(("path", "field", "status"), [
    (EXISTING, "If-None-Match: *", 412), (ABSENT, "X: y", 413), ("/artefacts/app/.new", "X: y", 400)
])  # fmt: skip
@pytest.mark.parametrize("chunked", [False, True])
def test_client_that_sends_everything_before_it_reads_gets_its_refusal(
    program: Program, path: str, field: str, status: int, chunked: bool
) -> None:
    """Keep reading after the refusal: closing at once would reset the connection (RFC 9112 §9.6)."""
    size, piece = MAX_SIZE + (1 << 20 if status == 413 else 0), bytes(1 << 20)
    with program.connect() as connection:
        connection.send(head("PUT", path, CHUNKED if chunked else f"Content-Length: {size}", field))
        for _ in range(size >> 20):
            connection.send(b"100000\r\n" + piece + b"\r\n" if chunked else piece)
        assert connection.send(b"0\r\n\r\n" if chunked else b"").answer().is_problem(status)
        assert connection.ends()
    eventually(lambda: program.incoming() == [])


def test_digest_mismatch_stores_nothing(program: Program) -> None:
    path, body = "/artefacts/app/digest", os.urandom(400_000)
    for field in all_digest_fields(hashlib.sha256(b"else").digest()):
        assert program.ask(put(path, body, field)).is_problem(400), field
        assert program.ask(head("PUT", path, CHUNKED, field) + pieces(body, 65536)).is_problem(400), field
    assert program.get(path).status == 404
    eventually(lambda: program.incoming() == [])
    for field in all_digest_fields(hashlib.sha256(body).digest()):
        assert program.ask(put(path, body, field)).status in (201, 200), field


def test_concurrent_large_uploads_do_not_mix(program: Program) -> None:
    """Alternate between uploads, which share one receive buffer: no piece may end up in another upload."""
    bodies = {f"/artefacts/app/{name}": os.urandom(1_500_000) for name in "abc"}
    with contextlib.ExitStack() as connections:
        clients = {path: connections.enter_context(program.connect()) for path in bodies}
        for path, client in clients.items():
            client.send(head("PUT", path, f"Content-Length: {len(bodies[path])}"))
        for start in range(0, 1_500_000, 100_000):  # the first two pieces of each stay in memory
            for path, client in clients.items():
                client.send(bodies[path][start : start + 100_000])
        assert [client.answer().status for client in clients.values()] == [201, 201, 201]
    assert {path: program.get(path).body for path in bodies} == bodies


def test_bytes_of_a_failed_upload_do_not_reach_another_upload(tmp_path: Path) -> None:
    code = IMPORT + """
def fail(self, data, original=artefacts.Upload.write):
    if not data:
        return
    artefacts.Upload.write = original
    raise MemoryError
artefacts.Upload.write = fail
artefacts.main()
"""
    path, body = "/artefacts/app/x", os.urandom(2_000_000)
    with Program(tmp_path / "data", code=("-c", code), logged=".*") as program:
        with program.connect() as connection, contextlib.suppress(OSError):
            connection.send(put(path, bytes(2_000_000)))
            assert connection.ends()
        assert "MemoryError" in program.log.read_text()
        eventually(lambda: program.incoming() == [])
        assert program.ask(put(path, body)).status == 201
        assert program.get(path).body == body


@pytest.mark.parametrize("end", ["closed", "reset", "half closed"])
@pytest.mark.parametrize("announced", ["Content-Length: 1000000", CHUNKED])
def test_truncated_body_is_discarded(program: Program, announced: str, end: str) -> None:
    start = b"f4240\r\n" if announced == CHUNKED else b""
    with program.connect() as connection:
        connection.send(head("PUT", "/artefacts/app/cut", announced) + start + bytes(999_999))
        eventually(program.incoming)
        if end == "half closed":
            connection.socket.shutdown(socket.SHUT_WR)
            eventually(lambda: program.incoming() == [])
        elif end == "reset":
            connection.abort()
    eventually(lambda: program.incoming() == [])
    assert program.get("/artefacts/app/cut").status == 404


def test_ranges_of_a_large_artefact(program: Program, large: bytes) -> None:
    path = "/artefacts/app/large"
    with program.connect() as connection:
        for first, last in ((0, 0), (5, 200_004), (20_000_000, len(large) - 1), (1, len(large) - 2)):
            answer = connection.ask(head("GET", path, f"Range: bytes={first}-{last}"))
            assert (answer.status, answer.body) == (206, large[first : last + 1])
            assert connection.ask(head("HEAD", path)).headers["Content-Length"] == str(len(large))


def test_download_continues_after_replacement_and_deletion(program: Program) -> None:
    path, body = "/artefacts/app/going", os.urandom(30_000_000)
    program.ask(put(path, body))
    with program.connect(receive_buffer=4096) as connection:
        assert connection.send(head("GET", path)).file.peek(1)
        assert program.ask(put(path, b"other")).status == 200
        assert program.ask(head("DELETE", path)).status == 204
        assert connection.answer().body == body


def test_download_of_a_truncated_file_ends(program: Program) -> None:
    """Truncate a file while it is served. The response cannot be complete, but it must not loop forever."""
    program.ask(put("/artefacts/app/edited", bytes(30_000_000)))
    with program.connect(receive_buffer=4096) as connection:
        assert connection.send(head("GET", "/artefacts/app/edited")).file.peek(1)
        os.truncate(program.data / "app/edited", 1000)
        assert len(connection.file.read()) < 30_000_000
    assert program.get("/artefacts/app/edited").body == bytes(1000)


def test_failed_stream_ends_only_its_own_connection(tmp_path: Path) -> None:
    data = tmp_path / "data"
    add_file(data / "app/large", os.urandom(40_000_000))
    with Program(data, logged="artefacts: a response broke off: 'large' became shorter.*") as program:
        with program.connect() as connection:
            connection.send(head("GET", "/artefacts/app?format=tar"))
            connection.file.readline()
            os.truncate(data / "app/large", 30_000_000)
            with pytest.raises((ValueError, AssertionError, OSError)):
                while connection._chunk():
                    pass
        assert program.get("/artefacts/app").status == 200


def test_no_request_runs_after_a_stream_that_fails_at_once(data: Path) -> None:
    """Take a lease on a file after it was listed: a tar then cannot open it."""
    for name in "abc":
        add_file(data / "app" / name, b"x")
    logged = "artefacts: a response broke off: .*"
    with leased(data / "app/b") as lease, Program(data, logged=logged) as program:
        assert program.get("/artefacts/app").status == 200
        lease()
        for number in range(10):
            with program.connect() as connection:
                following = put(f"/artefacts/other/{number}", b"x")
                connection.send(head("GET", "/artefacts/app?format=tar") + following)
                received = connection.file.read()
            assert received.startswith(b"HTTP/1.1 200 ") and received.count(b"HTTP/1.1") == 1
            assert program.get(f"/artefacts/other/{number}").status == 404


def test_clients_that_do_not_read_hold_no_worker_thread(tmp_path: Path) -> None:
    path, tar = "/artefacts/app/large", head("GET", "/artefacts/app?format=tar")
    with Program(tmp_path / "data", "--threads", "2") as program, contextlib.ExitStack() as readers:
        content = os.urandom(40_000_000)
        assert program.ask(put(path, content)).status == 201
        for request in [tar] * 3 + [head("GET", path) + head("GET", "/artefacts/app")] * 3:
            readers.enter_context(program.connect()).send(request)
        late = readers.enter_context(program.connect())
        late.send(head("GET", path) + tar + head("GET", path) + put("/artefacts/app/x", b"small"))
        for number in range(8):
            assert program.ask(put(f"/artefacts/app/{number}", b"small")).status == 201
            assert program.get("/artefacts/app").status == 200
        answers = [late.answer() for _ in range(4)]
        assert [answer.status for answer in answers] == [200, 200, 200, 201]
        assert answers[0].body == answers[2].body == content
        with tarfile.open(fileobj=io.BytesIO(answers[1].body)) as archive:
            assert set(archive.getnames()) == {"large", *map(str, range(8))}


def test_idle_clients_do_not_delay_others(program: Program, large: bytes) -> None:
    """Open 300 connections: most are silent, some stop in a request, 30 do not read (more than threads)."""
    with contextlib.ExitStack() as opened:
        for number in range(300):
            connection = opened.enter_context(program.connect(receive_buffer=4096))
            if number % 10 == 0:
                assert connection.send(head("GET", "/artefacts/app/large")).file.read(5) == b"HTTP/"
            elif number % 10 == 1:
                connection.send(b"GET /artefacts/app/th")
            elif number % 10 == 2:
                connection.send(head("PUT", "/artefacts/app/lazy", "Content-Length: 100") + b"x")
        assert program.get(EXISTING).body == b"there"
        assert program.ask(put("/artefacts/app/among-lazy", b"1")).status == 201
        assert program.get("/artefacts/app/large").body == large


def test_unremovable_staging_file_does_not_block_connections(data: Path) -> None:
    path = "/artefacts/app/x"
    half = head("PUT", "/artefacts/app/y", "Content-Length: 2000000") + bytes(1_000_000)
    logged = "artefacts: an upload or a file cannot be closed or removed: .*"
    with Program(data, before=without_privileges(), logged=logged) as program:
        with program.connect() as connection, program.connect() as unfinished:
            connection.send(head("PUT", path, "Content-Length: 600000", f"X-Checksum-Sha256: {'0' * 64}"))
            connection.send(bytes(599_999))
            unfinished.send(half)
            eventually(lambda: len(program.incoming()) == 2)
            (data / ".incoming").chmod(0o555)
            assert connection.ask(b"x").is_problem(400)
            assert connection.ask(head("GET", "/artefacts/app")).status in (200, 404)
            program.process.send_signal(signal.SIGTERM)
            eventually(lambda: not program.listens())
        assert program.process.wait(20) == 0
    (data / ".incoming").chmod(0o755)


def test_interrupted_worker_does_not_delay_its_result(tmp_path: Path) -> None:
    """Interrupt the worker right after it leaves its result: the event loop must see the result at once."""
    code = IMPORT + """
import time
import zipfile
class Result(list):
    def append(self, result):
        super().append(result)
        self.server.pull_trigger()
        time.sleep(0.01)
def begin(self, server, *others, original=artefacts.Connection.__init__, **named):
    original(self, server, *others, **named)
    self.result = Result()
    self.result.server = server
artefacts.Connection.__init__ = begin
artefacts.main()
"""
    requests = [head("GET", "/artefacts/"), head("GET", "/artefacts/app?format=tar")] * 20
    with Program(tmp_path / "data", "--quiet", code=("-c", code)) as program:
        assert program.ask(put("/artefacts/app/x", b"x")).status == 201
        with program.connect() as connection:
            connection.send(b"".join(requests))
            assert [connection.answer().status for _ in requests] == [200] * 40


def test_no_busy_loop_while_a_worker_waits_for_a_lost_client(program: Program) -> None:
    def processor_time() -> int:
        fields = Path(f"/proc/{program.process.pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])  # in clock ticks: 100 per second

    program.ask(put("/artefacts/held/x", b"x"))
    with open(program.data / ".locks/held", "rb+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for _ in range(5):
            with program.connect() as connection:
                connection.send(put("/artefacts/held/x", b"y"))
                connection.abort()
        time.sleep(0.2)
        before = processor_time()
        time.sleep(1)
        assert processor_time() - before < 50
    assert program.get("/artefacts/held/x").status == 200


def test_client_lost_during_a_download_leaves_no_open_file(program: Program, large: bytes) -> None:
    for leave in (Connection.close, Connection.abort):
        connection = program.connect(receive_buffer=4096).send(head("GET", "/artefacts/app/large"))
        assert connection.file.read(5) == b"HTTP/"
        assert open_count(program, "large") == 1
        leave(connection)
        eventually(lambda: open_count(program, "large") == 0)


def test_client_lost_during_a_push_leaves_no_open_file(program: Program) -> None:
    descriptors = Path(f"/proc/{program.process.pid}/fd")
    before = len(list(descriptors.iterdir())) + 3
    for number in range(100):
        with program.connect() as connection:
            connection.send(put("/artefacts/gone/small", b"%d" % number))
            connection.abort()
    eventually(lambda: len(list(descriptors.iterdir())) <= before and not program.incoming())


def test_urgent_data_is_no_part_of_a_request(program: Program) -> None:
    with program.connect() as connection:
        connection.socket.send(b"G")
        connection.socket.send(b"x", socket.MSG_OOB)
        assert connection.ask(b"ET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n").status == 200


def test_connection_times_out_only_without_progress(tmp_path: Path) -> None:
    """Close a connection that is silent for waitress's timeout, but none that still makes progress."""
    timeout = "artefacts.waitress.server.Adjustments."
    code = IMPORT + f"{timeout}channel_timeout = 1; {timeout}cleanup_interval = 0; artefacts.main()"
    add_file(tmp_path / "data/app/large", bytes(40_000_000))
    add_file(tmp_path / "data/lib/larger", bytes(40_000_000))
    with Program(tmp_path / "data", "--quiet", code=("-c", code)) as program:
        with (
            program.connect() as silent, program.connect(receive_buffer=4096) as lazy,
            program.connect() as connection, program.connect(receive_buffer=4096) as slow,
        ):  # fmt: skip
            connection.send(head("PUT", "/artefacts/app/slow", "Content-Length: 2000000") + bytes(1_000_000))
            lazy.send(head("GET", "/artefacts/app?format=tar"))
            slow.send(head("GET", "/artefacts/lib/larger"))
            for _ in range(25):
                time.sleep(0.1)
                connection.send(bytes(4_000))
                assert slow.file.read(4_000)
            assert open_count(program, "larger")
            assert silent.ends()
            eventually(lambda: program.get("/artefacts/app") and not open_count(program, "large"))
            assert connection.send(bytes(900_000)).answer().status == 201


STALLED = IMPORT + """
import os, time
def stalled(self, until, original=artefacts.Upload._hash):
    while not os.path.exists(GO):
        time.sleep(0.01)
    original(self, until)
artefacts.Upload._hash = stalled
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
@pytest.mark.parametrize("then", ["hashed", "silent"])
def test_receiving_pauses_while_hashing_is_far_behind(tmp_path: Path, then: str) -> None:
    """Receive the rest once the hash has caught up. A paused connection does not count as silent."""
    go, timeout = tmp_path / "go", "artefacts.waitress.server.Adjustments."
    code = STALLED.replace("GO", repr(str(go)))
    if then == "silent":
        code += f"{timeout}channel_timeout = 2; {timeout}cleanup_interval = 0\n"
    body = os.urandom(a.HASH_BEHIND + 4 * a.GATHER + 100_000)

    def received() -> int:
        return sum(file.stat().st_size for file in (tmp_path / "data/.incoming").iterdir())

    with (
        Program(tmp_path / "data", "--quiet", code=("-c", code + "artefacts.main()")) as program,
        program.connect() as connection,
    ):
        connection.send(head("PUT", "/artefacts/app/x", f"Content-Length: {len(body)}"))
        sent = a.HASH_BEHIND
        connection.send(body[:sent])
        eventually(lambda: received() == sent)
        if then == "hashed":
            connection.send(body[sent : sent + 1000])
            time.sleep(0.3)
            assert received() == sent
            go.touch()
            eventually(lambda: received() == sent + 1000)
            sent += 1000
        else:
            for _ in range(40):
                connection.send(body[sent : sent + 1000])
                sent += 1000
                time.sleep(0.1)
                assert program.get("/").status == 303  # makes the server look for silent connections
            go.touch()
        assert connection.send(body[sent:]).answer().status == 201
        assert program.get("/artefacts/app/x").body == body


def patched(*statements: str) -> tuple[str, str]:
    """Return the code that runs the program with other constants."""
    return "-c", IMPORT + "; ".join((*statements, "artefacts.main()"))


def receives_end(connection: Connection, seconds: float) -> bool:
    """Return whether the server closes the connection within that time, without a byte."""
    connection.socket.settimeout(seconds)
    with contextlib.suppress(TimeoutError, ConnectionResetError):
        return connection.socket.recv(1) == b""
    return False


def test_header_has_a_deadline_and_a_body_has_none(tmp_path: Path) -> None:
    code = patched("artefacts.HEADER_TIME = 1", "artefacts.CLEANUP = 0.1")
    with (
        Program(tmp_path / "data", code=code) as program, program.connect() as slow,
        program.connect() as body,
    ):  # fmt: skip
        body.send(head("PUT", "/artefacts/app/x", "Content-Length: 25"))
        started = time.monotonic()
        for byte in bytes(25):
            with contextlib.suppress(OSError):
                slow.send(b"G")
            body.send(bytes([byte]))
            time.sleep(0.1)
        assert receives_end(slow, 5) and time.monotonic() - started < 5
        assert body.answer().status == 201
        with program.connect() as late:  # the time before the first byte does not count
            time.sleep(1.5)
            assert late.ask(head("GET", "/artefacts/app/x")).status == 200
            late.send(b"GET /artefacts/app/x HTTP/1.1\r\n")
            time.sleep(0.5)
            assert late.ask(b"Host: localhost\r\n\r\n").status == 200


def test_oldest_connection_without_a_header_makes_room(tmp_path: Path) -> None:
    code = patched("artefacts.CONNECTIONS = 20")
    with Program(tmp_path / "data", code=code) as program, contextlib.ExitStack() as opened:
        slow = [opened.enter_context(program.connect()).send(b"GET /") for _ in range(60)]
        for number in range(5):
            assert program.ask(put(f"/artefacts/app/{number}", b"x")).status == 201
        assert receives_end(slow[0], 5)


def test_connection_waits_while_all_others_have_requests(tmp_path: Path) -> None:
    with (
        Program(tmp_path / "data", code=patched("artefacts.CONNECTIONS = 20")) as program,
        contextlib.ExitStack() as opened,
    ):
        busy = [opened.enter_context(program.connect()) for _ in range(20)]
        for number, connection in enumerate(busy):
            request = head("PUT", f"/artefacts/app/{number}", "Content-Length: 1", "Expect: 100-continue")
            assert connection.ask(request).status == 100
        late = opened.enter_context(program.connect()).send(head("GET", "/artefacts/"))
        assert select.select([late.socket], [], [], 0.5)[0] == []
        assert [connection.ask(b"x").status for connection in busy] == [201] * 20
        assert late.answer().status == 200


def test_lookups_on_a_shared_file_system_do_not_delay_others(tmp_path: Path) -> None:
    code = patched("artefacts.pauses_of = lambda path: [1]")
    with Program(tmp_path / "data", code=code) as program, program.connect() as missing:
        missing.send(head("GET", "/artefacts/app/missing"))
        assert program.get("/").status == 303
        assert select.select([missing.socket], [], [], 0)[0] == []
        assert missing.answer().status == 404


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a data directory with 10,000 artefacts, all hard links of a few files."""
    folder = tmp_path_factory.mktemp("many") / "data/app"
    folder.mkdir(parents=True)
    for number in range(10_000):
        (folder / f"a-name-of-the-usual-length-{number:05}.tar.gz").write_bytes(b"x")
    return folder.parent


def test_abandoned_listings_do_not_delay_a_push(many: Path) -> None:
    with Program(many, "--quiet") as program:
        program.ask(put("/artefacts/app/small", b"small"))
        for _ in range(300):
            with program.connect() as connection:
                connection.send(head("GET", "/artefacts/app"))
        started = time.monotonic()
        assert program.get("/artefacts/app/small").body == b"small"
        assert time.monotonic() - started < 2
        assert program.ask(put("/artefacts/other/x", b"x")).status == 201
        assert time.monotonic() - started < 4


@pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
def test_clients_that_do_not_read_listings_take_little_memory(many: Path) -> None:
    with Program(many, "--quiet") as program, contextlib.ExitStack() as opened:
        for _ in range(300):
            connection = opened.enter_context(program.connect(receive_buffer=4096))
            connection.send(head("GET", "/artefacts/app"))
        slowest = 0.0
        for number in range(20):
            path = f"/artefacts/other/{number}"
            for request in (put(path, b"x"), head("GET", path)):
                started = time.monotonic()
                assert program.ask(request).status in (200, 201)
                slowest = max(slowest, time.monotonic() - started)
            time.sleep(0.2)
        assert slowest < 5
        assert program.peak_memory() < 300_000_000


def test_too_many_waiting_requests_get_503(tmp_path: Path) -> None:
    code = patched("artefacts.WAITING = 2")
    with (
        Program(tmp_path / "data", "--threads=1", code=code) as program,
        contextlib.ExitStack() as opened,
    ):
        program.ask(put("/artefacts/held/x", b"x"))
        lock = opened.enter_context(open(program.data / ".locks/held", "rb+"))
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting = [opened.enter_context(program.connect()) for _ in range(3)]
        for number, connection in enumerate(waiting):
            connection.send(put(f"/artefacts/held/{number}", b"y"))
            time.sleep(0.2)
        answer = program.ask(put("/artefacts/held/last", b"y"))
        assert answer.is_problem(503) and int(answer.headers["Retry-After"]) > 0
        assert program.get("/artefacts/held/x").body == b"x"
        assert program.get("/artefacts/held").status == 200  # listings have workers of their own
        fcntl.flock(lock, fcntl.LOCK_UN)
        assert [connection.answer().status for connection in waiting] == [201] * 3


@pytest.mark.parametrize("announced", ["Content-Length: 1000000000", CHUNKED])
@pytest.mark.parametrize(("method", "status"), [("GET", 200), ("HEAD", 200), ("DELETE", 204), ("PATCH", 405)])
def test_unneeded_body_is_not_waited_for(program: Program, method: str, status: int, announced: str) -> None:
    path = "/artefacts/app/unneeded"
    program.ask(put(path, b"x"))
    with program.connect() as connection:
        answer = connection.ask(head(method, path, announced, "Expect: 100-continue"))
        assert (answer.status, answer.headers["Connection"]) == (status, "close")
        with contextlib.suppress(OSError):
            for _ in range(10):
                connection.send(bytes(1_000_000))
        assert program.incoming() == [] and connection.ends()
    with program.connect() as connection:  # a body that came with its header ends where it says
        assert connection.ask(put(path, b"abc", method=method)).status in (status, 404)
        assert connection.ask(head("GET", EXISTING)).body == b"there"


def test_refused_upload_may_go_on_for_a_while(tmp_path: Path) -> None:
    """Read on after a refusal while bytes arrive, until a limit of its own."""
    code = patched("artefacts.LINGER = 1", "artefacts.LINGER_IN_ALL = 4", "artefacts.CLEANUP = 0.1")
    refused = head("PUT", "/artefacts/app/x", "Content-Length: 1000000000", "If-Match: *")
    with Program(tmp_path / "data", code=code) as program:
        with program.connect() as connection:
            connection.send(refused)
            for _ in range(10):
                connection.send(bytes(100_000))
                time.sleep(0.25)
            assert connection.answer().is_problem(412) and connection.ends()
        with program.connect() as silent, program.connect() as endless:
            silent.send(refused)
            endless.send(refused)
            started = time.monotonic()
            with pytest.raises(OSError, match=r"reset|pipe"):
                while time.monotonic() < started + 10:
                    endless.send(bytes(1000))
                    time.sleep(0.1)
            assert 3 < time.monotonic() - started < 8
            with pytest.raises(OSError, match=r"reset|pipe"):  # it was closed, so the client is reset
                for _ in range(3):
                    silent.send(b"x")
                    time.sleep(0.1)


def test_no_connection_is_reset_while_idle_ones_are_closed(tmp_path: Path) -> None:
    timeout = "artefacts.waitress.server.Adjustments."
    code = patched(f"{timeout}channel_timeout = 1", "artefacts.CLEANUP = 0")
    request = head("GET", "/artefacts/app/x", "Connection: close")

    def fetch(program: Program) -> int:
        failed, end = 0, time.monotonic() + 4
        with contextlib.ExitStack() as opened:
            while time.monotonic() < end:
                opened.enter_context(program.connect())  # stays idle
                for _ in range(20):
                    try:
                        failed += program.ask(request).body != b"x"
                    except OSError:
                        failed += 1
        return failed

    with Program(tmp_path / "data", "--quiet", "--no-fsync", code=code) as program:
        program.ask(put("/artefacts/app/x", b"x"))
        with concurrent.futures.ThreadPoolExecutor(4) as clients:
            assert list(clients.map(fetch, [program] * 4)) == [0] * 4


SYNTAX = [  # a request, and its status; None: it is closed without an answer
    *((f"GET {EXISTING} HTTP/{version}\r\nHost: localhost\r\n\r\n", status) for version, status in (
        ("1.0", 200), ("1.1", 200), ("1.2", 200), ("1.9", 200), ("2.0", 505), ("3.0", 505), ("0.9", 400),
        ("1", 400), ("1.10", 400), ("x", 400),
    )),
    ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505), (f"GET {EXISTING}\r\n\r\n", 400),
    (f"GET {EXISTING}\r\n", 400),
    ("GET\r\n", 400), (f"GET {EXISTING} HTTP/1.1\r\n\r\n", 400), (f"GET {EXISTING} HTTP/1.0\r\n\r\n", 200),
    ("GET /nowhere HTTP/1.1\r\n\r\n", 400), ("GET /nowhere HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", 400),
    *((f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n", status) for target, status in (
        ("artefacts/app", 400), ("*", 400), ("localhost:80", 400), ("ftp://localhost/", 400),
        (f"http://localhost{EXISTING}", 200), (f"HTTP://localhost:80{EXISTING}", 200), ("?x", 400),
        ("http://localhost", 303), ("http://", 400),
    )),
    ("OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n", 200), ("CONNECT a:80 HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("FETCH / HTTP/1.1\r\nHost: localhost\r\n\r\n", 501), ("X-Y * HTTP/1.1\r\nHost: localhost\r\n\r\n", 501),
    (f"GET {EXISTING} HTTP/1.1\nHost: localhost\n\n", 400),
    (f"GET {EXISTING} HTTP/1.1\r\nHost: localhost\n\r\n", 400),
    (f"GET {EXISTING} HTTP/1.1\r\nHost: localhost\n\n", 400),
    *((f"GET {EXISTING} HTTP/1.1\r\nHost: localhost\r\n{field}\r\n\r\n", status) for field, status in (
        ("X:", 200), ("X: \t y \t", 200), ("X y", 400), ("X : y", 400), (": y", 400), ("X: y\0", 400),
        ("X: y\r\n z", 400), (" X: y", 400), ("X_Y: z", 200),
    )),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(SYNTAX)))
def test_request_syntax(program: Program, number: int) -> None:
    request, status = SYNTAX[number]
    with program.connect() as connection:
        answer = connection.ask(request.encode("latin-1"))
        assert answer.status == status and (status < 400 or answer.is_problem(status))
        assert status < 400 or connection.ends()


@pytest.mark.parametrize(("body", "is_valid"), [
    (b"5 ; a = b\r\nhello\r\n0\r\n\r\n", True), (b'5;a="b;\\"\xff";c\r\nhello\r\n0\r\n\r\n', True),
    (b"5\r\nhello\r\n0;a\t=b\r\nX-Y: \xff z\r\nZ:\r\n\r\n", True),
    (b"5;=\r\nhello\r\n0\r\n\r\n", False), (b"5;a b\r\nhello\r\n0\r\n\r\n", False),
    (b"5;a=\r\nhello\r\n0\r\n\r\n", False), (b'5;a="b\r\nhello\r\n0\r\n\r\n', False),
    (b"5;\r\nhello\r\n0\r\n\r\n", False), (b"5\r\nhello\r\n0\r\nX y\r\n\r\n", False),
    (b"5\r\nhello\r\n0\r\nX: \0\r\n\r\n", False), (b"5\r\nhello\r\n0\r\nX : y\r\n\r\n", False),
])  # fmt: skip
def test_chunk_extensions_and_trailers(program: Program, body: bytes, is_valid: bool) -> None:
    with program.connect() as connection:
        answer = connection.ask(head("PUT", "/artefacts/app/chunked", CHUNKED) + body)
        assert answer.status in (200, 201) if is_valid else answer.is_problem(400)
        assert not is_valid or connection.ask(head("GET", "/artefacts/app/chunked")).body == b"hello"


# == Connections: hostile input ===================================================================

MEGABYTE = b"x" * 1_000_000
BAD_BODIES = [  # header fields, the bytes after the header, HTTP version
    *(([CHUNKED], line + b"\r\nabc\r\n0\r\n\r\n", "1.1") for line in (
        b"xyz", b"-3", b"+3", b"0x3", b"2", b"1_0", b"3 3", b"3;\0=1", b"3 ", b"", b"\n3", b"3\r",
        b"4\r\nabcd3", b"0\r\nX: y\nZ: 1", b"0\r\n\n",
        # Framing bytes must not fill the memory either.
        b"1" * 1_000_000, b"3;" + MEGABYTE, b"0\r\nX: " + MEGABYTE, b"0\r\n" + b"X: y\r\n" * 200_000,
    )),
    # If the end of the body is unclear, the bytes after it could be taken for a request that the client
    # never sent (RFC 9112 §11.2). HTTP/1.0 has no Transfer-Encoding (§6.1).
    *((fields, b"3\r\nabc\r\n0\r\n\r\n", version) for fields, version in (
        ([CHUNKED], "1.0"), ([CHUNKED, "Content-Length: 3"], "1.0"), ([CHUNKED, "Content-Length: 3"], "1.1"),
        (["Transfer-Encoding : chunked"], "1.1"), (["Transfer-Encoding: \x0bchunked"], "1.1"),
        (["Transfer-Encoding: "], "1.1"), (["Transfer-Encoding: ,"], "1.1"),
        (["Transfer-Encoding:", "Content-Length: 3"], "1.1"), ([CHUNKED, CHUNKED], "1.1"),
        (["Transfer-Encoding: gzip, chunked"], "1.1"), (["Transfer-Encoding: chunked, identity"], "1.1"),
        *(([f"Content-Length: {length}"], "1.1") for length in (
            "+3", "-1", "1_0", "0x3", "3, 3", "\xb3", "9" * 5000, "3\r\nContent-Length: 0", "3\r\n folded",
            "3\r\nX: a\rb", "3\r\nX: " + "x" * 1_000_000,
        )),
    )),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(BAD_BODIES)))
def test_body_of_unclear_length_is_refused(program: Program, number: int) -> None:
    fields, body, version = BAD_BODIES[number]
    request = head("PUT", "/artefacts/app/garbage", "Connection: keep-alive", *fields, version=version)
    with program.connect() as connection:
        answer = connection.ask(request + body + head("DELETE", EXISTING))
        assert answer.is_problem(answer.status)
        assert answer.status in (400, 413, 431, 501)
        assert connection.ends()
    assert program.get(EXISTING).body == b"there"
    assert program.get("/artefacts/app/garbage").status == 404
    eventually(lambda: program.incoming() == [])


@pytest.mark.parametrize("line", [
    b"GET", b"\0\1\2\3", b": HTTP/1.1", b"get / HTTP/1.1", b"GET / FTP/1.0", b"GET  /  HTTP/1.1",
    b"GET /a b HTTP/1.1", b"GET http://[::1 HTTP/1.1", b"GET /\xff\xfe HTTP/1.1", b"GET /\r/ HTTP/1.1",
    b"\x16\x03\x01\x02\0\1\0\1\xfc",
])  # fmt: skip
def test_garbage_request_line_is_refused(program: Program, line: bytes) -> None:
    answer = program.ask(line + b"\r\nHost: localhost\r\n\r\n")
    assert answer.is_problem(answer.status)
    assert 400 <= answer.status < 500
    assert program.get(EXISTING).status == 200


BAD_SEGMENTS = [  # invalid segments, as they may be written in a path
    "..", ".", "%2e%2e", "%2E%2e", ".%2e", "..%2f..", "%2e%2e%2f%2e%2e", "..%5c..", "..\\..", "%5c..",
    "x%5cy", "%00", "..%00", "x%00y", "%2e%2e%00", "%c0%ae%c0%ae", "%c0%af..", "..%c0%af",
    "%e0%80%ae%e0%80%ae", "%f0%80%80%ae", "%ff", "%ed%a0%80", "..;", "....", ".versions", "%2everssions",
    "%2fetc", "x%2f..%2f..", "x/../..", "x%2f%2f", "%0a", "%7f", "%0d%0aX-Evil:%20y", "%c2%85", "\x01",
    "%ef%bf%bd", "x" * 256, "%e2%82%ac" * 86, "\xff",
]  # fmt: skip
PLACES = ["{}/x", "{}", "app/{}", "app/{}/x", "app/d/{}/../outside/secret", "app/.versions/{}", "{}/../../x"]
TARGETS = [
    *(f"/artefacts/{place.format(bad)}" for bad in BAD_SEGMENTS for place in PLACES), "//etc/passwd",
    "//localhost/artefacts/app/x", "/artefacts//x", "/artefacts/app//x", "//../outside", "/etc/passwd",
    "/../artefacts/app/n", "/%2e%2e/artefacts/app/n", "/artefacts/../outside/secret", "/artefacts\\app",
    "/data/app/x", "file:///etc/passwd", "ftp://localhost/etc/passwd", "http://localhost/../../etc/passwd",
    "http:///etc/passwd", "*", "..", "", "localhost:80", "/artefactsx/app", "/.incoming/",
    "/artefacts/.locks/app", "/\0", "/artefacts/.trash", f"/artefacts/app/.versions/x/{V1}",
    "http://[::1/artefacts", "http://localhost:port/../x", "http://localhost/artefacts/%2e%2e/x",
    "/artefacts/app/" + "a/" * 513 + "a", "/artefacts/" + "x" * 60_000,
]  # fmt: skip
LITERAL = ["%252e%252e", "%252E.%252f%252E", "%u002e%u002e", "%25%32%65", "%2", "%zz", "~", "%257f", "x%2520"]
QUERIES = {
    404: [f"app/x?version={bad}" for bad in ("../../../outside/secret", "..", "%00", V1 + "%00", "1" * 5000)],
    400: [
        *(f"app/x?at={bad}" for bad in ("1" * 5000, "-" * 5000, "%00", "%0d%0aX-Evil:y")),
        *(f"app?limit={bad}" for bad in ("1" * 5000, "-1", "1e9", "%00", "%d9%a3", "1_0")),
        "app?format=../../x",
    ],
    200: [
        "app/x?restore=../../x", "app?prefix=../../outside", "app?after=../../outside&prefix=%00",
        "app?limit=" + "9" * 18, "app?" + "&".join(f"limit{n}=1" for n in range(4000)),
        "app?prefix=" + "a" * 60_000, "app?prefix=%0d%0aX-Evil:%20y&limit=1",
        "app?after=" + "9" * 5000 + "/../x",
    ],
}  # fmt: skip


def test_no_path_leads_outside_the_data_directory(exposed: Program) -> None:
    before = tree(exposed.data)
    for target in TARGETS:
        for method in ("GET", "PUT", "DELETE", "POST"):
            answer = ask(exposed, f"{method} {target}", MULTIPART, body=form_of(("n", b"1")))
            assert is_client_error(answer, (method, target[:100]))
    for status, lines in QUERIES.items():
        for line in lines:
            answer = exposed.get(f"/artefacts/{line}")
            assert answer.status == status and "X-Evil" not in answer.headers, line[:80]
            assert status == 200 or is_client_error(answer, line)
    for bad in ("../../../outside/secret", "..", "%00", "1" * 5000, "", V1[:-1], V1 + "/"):
        assert is_client_error(ask(exposed, f"POST /artefacts/app/x?restore={bad}"), bad)
        assert is_client_error(ask(exposed, f"DELETE /artefacts/app/x?version={bad}"), bad)
    assert tree(exposed.data) == before
    for odd in LITERAL:  # a path is decoded exactly once
        for path in (f"literal/{odd}", f"literal/{odd}-f/{odd}", f"{odd}/x"):
            assert ask(exposed, f"PUT /artefacts/{path}", body=odd.encode()).status == 201
            assert (exposed.data / unquote(path)).read_bytes() == odd.encode()
            assert exposed.get(f"/artefacts/{path}").body == odd.encode()


BOMBS: list[tuple[str, str, str]] = [  # method; allowed statuses; header fields
    *(("GET", statuses, f"Range: bytes={ranges}") for statuses, ranges in (
        ("200", ",".join(["0-0"] * 10_000)), ("206", "0-" + "9" * 5000), ("416", "9" * 5000 + "-"),
        ("206", "-" + "9" * 5000), ("206", "0" * 5000 + "-1"), ("200", " " * 60_000), ("200", "\xb2-"),
    )),
    *(("GET", "200", field) for field in (
        "If-None-Match: " + '"' * 60_000, "If-None-Match: " + 'W/"a",' * 10_000,
        "If-None-Match: " + "W/" * 30_000, "If-Modified-Since: " + "9" * 5000, "If-Range: " + '"' * 60_000,
        "Accept: " + "a/b;q=0.1," * 6000, "Accept: " + ";" * 60_000,
        'Accept: text/html;b1="' + ";" * 60_000, "Cookie: " + "a=b;" * 15_000,
        "X: y\r\n" * 5000 + "X: y",
    )),
    ("GET", "412", "If-Match: " + '"a' * 30_000), ("GET", "431", "X: " + "x" * 1_000_000),
    ("GET", "431", "X: y\r\n" * 50_000 + "X: y"), ("GET", "400", "X: a\rX-Evil: y"),
    ("PUT", "400 413", "Content-Length: " + "9" * 5000),
    ("PUT", "400 413", "Content-Length: " + "0" * 5000 + "1"),
    ("PUT", "400", "Content-Range: bytes " + "9" * 5000), ("PUT", "400", "X-Checksum-Sha256: " + "9" * 5000),
    ("PUT", "200", "Repr-Digest: " + ", \t" * 20_000 + "sha-256"), ("PUT", "400", "Digest: SHA-256=\xff"),
    ("PUT", "400", "Repr-Digest: sha-256=:" + "A" * 60_000 + ":"),
    ("PUT", "415", "Content-Encoding: " + "x," * 9000), ("PUT", "200", "Content-Type: a/b;" + " " * 60_000),
    ("PUT", "200", "Content-Type: " + "a/" * 30_000), ("PUT", "200", "Content-Type: \xff<script>"),
    ("POST", "400", MULTIPART + "b" * 60_000), ("POST", "400", MULTIPART + '; c="' + ";" * 60_000),
    ("POST", "400", MULTIPART[:-2]),
]  # fmt: skip


def test_huge_header_fields_and_numbers(exposed: Program) -> None:
    paths = {"GET": "/artefacts/app/x", "PUT": "/artefacts/odd/fields", "POST": "/artefacts/odd"}
    ask(exposed, "PUT /artefacts/odd/fields")
    for method, statuses, fields in BOMBS:
        length = "" if "Length" in fields else "Content-Length: 0\r\n"
        request = f"{method} {paths[method]} HTTP/1.1\r\nHost: localhost\r\n{length}{fields}\r\n\r\n"
        started = time.monotonic()
        with exposed.connect() as connection:
            with contextlib.suppress(ConnectionError):
                connection.send(request.encode("latin-1"))
            answer = connection.answer()
        assert str(answer.status) in statuses, (answer.status, fields[:80])
        assert answer.status < 400 or is_client_error(answer, fields[:80])
        assert "X-Evil" not in answer.headers and time.monotonic() - started < 5, fields[:80]


# == The program as a process =====================================================================


def test_log_has_one_line_per_request(tmp_path: Path) -> None:
    path, evil = "/artefacts/app/x", '/artefacts/app/\x1b[31m"\\\xff'
    requests = [
        (put(path, b"12345"), f'"PUT {path} HTTP/1.1" 201 '), (put(path, b"1", "If-None-Match: *"), '" 412 '),
        (head("GET", path), '" 200 5'), (head("HEAD", path), '" 200 -'), (head("DELETE", path), '" 204 -'),
        (head("GET", evil), r'"GET /artefacts/app/\x1b[31m\x22\x5c\xff HTTP/1.1" 4'),
        (head("GET", "/x", "Content-Length: many"), '"GET /x HTTP/1.1" 400 '),
    ]  # fmt: skip
    with Program(tmp_path / "data") as program:
        for number, (request, expected) in enumerate(requests, 1):
            program.ask(request)
            eventually(lambda: program.log.read_text().count("\n") == number)  # noqa: B023
            logged = program.log.read_text().splitlines()[-1]
            assert expected in logged


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_unwritable_log_does_not_stop_responses(tmp_path: Path) -> None:
    command = [sys.executable, str(PROGRAM), "--data", str(tmp_path / "data"), "--port", "0"]
    with open("/dev/full", "wb") as full:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=full, text=True)
    with process:
        assert process.stdout is not None
        with Connection(urlsplit(process.stdout.readline().strip()).port or 0) as connection:
            connection.send(head("GET", "/artefacts/") * 3)
            assert [connection.answer().status for _ in range(3)] == [200] * 3
        process.terminate()


@pytest.mark.parametrize("options", [
    "--nonsense", "--port many", "--port 70000", "--port {port}", "--threads 0", "--keep-versions -1",
    "--keep-versions some", "--max-size 2parsecs", "--max-size -1", "--data {file}", "--data {file}/below",
    "--config {file}/missing", "--config {broken}", "--host 0.0.0.0", "--host 203.0.113.1 --open",
])  # fmt: skip
def test_bad_option_prints_one_line_and_exits_2(program: Program, tmp_path: Path, options: str) -> None:
    file, broken = tmp_path / "file", tmp_path / "broken.toml"
    file.touch()
    broken.write_text("[anonymous]\nread = everything\n")
    given = options.format(file=file, broken=broken, port=program.port).split()
    command = [sys.executable, str(PROGRAM), "--port", "0", "--data", str(tmp_path / "data"), *given]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    assert (ended.returncode, ended.stdout) == (2, ""), ended
    assert re.fullmatch(r"artefacts\.py: [^\n]{10,}\n", ended.stderr), ended.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_right_after_the_url_stops_the_program(tmp_path: Path, number: int) -> None:
    for _ in range(3):
        with Program(tmp_path / "data") as program:
            assert program.stop(number) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_lets_running_requests_finish(tmp_path: Path, number: signal.Signals) -> None:
    large = os.urandom(30_000_000)
    with Program(tmp_path / "data", "--quiet") as program, contextlib.ExitStack() as opened:
        program.ask(put("/artefacts/app/large", large))
        for _ in range(5):
            opened.enter_context(program.connect())  # never sent a request
        opened.enter_context(program.connect()).ask(head("GET", "/artefacts/"))  # is idle after its request
        reader = opened.enter_context(program.connect(receive_buffer=4096))
        assert reader.send(head("GET", "/artefacts/app/large")).file.read(1) == b"H"
        writer = opened.enter_context(start_upload(program))
        program.process.send_signal(number)
        eventually(lambda: not program.listens())
        assert writer.send(bytes(100_000)).answer().status == 201
        assert reader.file.read().endswith(large)
        assert program.process.wait(5) == 0  # the idle connections are still open
    assert (tmp_path / "data/app/slow").read_bytes() == bytes(600_000)
    assert not program.incoming()


def test_second_signal_stops_at_once(tmp_path: Path) -> None:
    code = ("-W", "ignore", str(PROGRAM))  # an immediate exit leaves resources open
    with Program(tmp_path / "data", "--quiet", code=code) as program, start_upload(program):
        program.process.send_signal(signal.SIGINT)
        eventually(lambda: not program.listens())
        program.process.send_signal(signal.SIGINT)
        assert program.process.wait(a.GRACE / 2) != 0


def test_unfinished_request_delays_the_stop_only_by_the_grace_period(tmp_path: Path) -> None:
    code = IMPORT + "artefacts.GRACE = 1; artefacts.main()"
    with Program(tmp_path / "data", "--quiet", code=("-c", code)) as program, start_upload(program):
        with program.connect() as large:
            large.send(head("PUT", "/artefacts/app/x", "Content-Length: 2000000") + bytes(1_000_000))
            eventually(program.incoming)
            assert program.stop() == 0
    assert program.incoming() == [] and not (tmp_path / "data/app").exists()


def test_kill_loses_no_acknowledged_push_and_tears_none(tmp_path: Path) -> None:
    data = tmp_path / "data"
    sent: dict[str, list[str]] = {}  # by id: digests of the bodies, in the order of sending
    acknowledged: dict[str, int] = {}  # by id: how many of them were acknowledged

    def upload(worker: int) -> None:
        for number in itertools.count():
            id = f"replaced-{worker}" if number % 2 else f"{worker}/{number}"
            body = os.urandom((1000, 300_000, 2_000_000)[number % 3])
            sent.setdefault(id, []).append(sha256(body))
            try:
                assert program.ask(put(f"/artefacts/app/{id}", body)).status in (200, 201)
            except (OSError, AssertionError):
                assert killed.is_set()
                return
            acknowledged[id] = len(sent[id])

    for round in range(3):
        killed = threading.Event()
        sent.clear()
        acknowledged.clear()
        with Program(data, "--keep-versions", "2") as program:
            with concurrent.futures.ThreadPoolExecutor(6) as workers:
                uploads = [workers.submit(upload, worker + 10 * round) for worker in range(6)]
                eventually(lambda: len(acknowledged) > 20, 20)
                killed.set()
                program.process.kill()
                program.process.wait()
            assert [future.result() for future in uploads] == [None] * 6
        with Program(data, "--keep-versions", "2") as program:
            for id, count in acknowledged.items():
                answer = program.get(f"/artefacts/app/{id}")
                assert sha256(answer.body) in sent[id][count - 1 :], id
                assert answer.etag == f'"{sha256(answer.body)}"'
            listed = program.get("/artefacts/app?format=sha256sums").body.decode()
            for digest, id in (line.split("  ") for line in listed.splitlines()):
                assert sha256((data / "app" / id).read_bytes()) == digest
                assert id not in sent or digest in sent[id]
            for id in sent:
                assert program.ask(put(f"/artefacts/app/{id}", b"again")).status in (200, 201)


def test_exactly_one_of_many_replacements_wins(pair: list[Program]) -> None:
    etag = pair[0].ask(put("/artefacts/app/contended", b"0")).etag
    for round in range(1, 13):
        bodies = [f"{round} by {client}".encode() for client in range(8)]
        requests = [put("/artefacts/app/contended", body, f"If-Match: {etag}") for body in bodies]
        assert send_together(pair, requests) == [200] + [412] * 7
        answer = pair[round % 2].get("/artefacts/app/contended")
        assert answer.body in bodies
        etag = answer.etag


@pytest.mark.parametrize(("method", "field", "refusal"), [
    ("POST", "X: y", 409), ("PUT", "If-None-Match: *", 412)
])  # fmt: skip
def test_exactly_one_of_many_creations_wins(
    pair: list[Program], method: str, field: str, refusal: int
) -> None:
    for round in range(12):
        path = f"/artefacts/{method}-{round}/created"
        requests = [put(path, b"%d" % client, field, method=method) for client in range(8)]
        assert send_together(pair, requests) == [201] + [refusal] * 7


def test_concurrent_increments_with_if_match_are_exact(pair: list[Program]) -> None:
    path, clients, each = "/artefacts/app/counter", 6, 12
    pair[0].ask(put(path, b"0"))

    def count(client: int) -> None:
        with pair[client % 2].connect() as connection:
            done = 0
            while done < each:
                current = connection.ask(head("GET", path))
                following = b"%d" % (int(current.body) + 1)
                done += connection.ask(put(path, following, f"If-Match: {current.etag}")).status == 200

    with concurrent.futures.ThreadPoolExecutor(clients) as workers:
        list(workers.map(count, range(clients)))
    assert pair[1].get(path).body == b"%d" % (clients * each)


def test_reader_never_sees_a_torn_or_missing_artefact(pair: list[Program]) -> None:
    path, written = "/artefacts/app/replaced", threading.Event()
    pair[0].ask(put(path, b"first"))

    def read(reader: int) -> int:
        seen = set()
        with pair[reader % 2].connect() as connection:
            while not written.is_set():
                answer = connection.ask(head("GET", path))
                assert (answer.status, answer.etag) == (200, f'"{sha256(answer.body)}"')
                seen.add(answer.etag)
        return len(seen)

    with concurrent.futures.ThreadPoolExecutor(4) as readers:
        reading = [readers.submit(read, reader) for reader in range(4)]
        try:
            for number in range(60):
                assert pair[number % 2].ask(put(path, os.urandom((300, 400_000)[number % 2]))).status == 200
        finally:
            written.set()
        assert all(future.result() > 3 for future in reading)


def test_concurrent_pushes_and_deletes_in_the_same_folders(pair: list[Program]) -> None:
    """Create and remove the same folders all the time: each request succeeds or gets 404."""
    path, allowed = "/artefacts/busy/a/b/c", {200, 201, 204, 404}
    requests = [
        put(path, b"1"), head("DELETE", path), put(path, bytes(300_000)), head("GET", "/artefacts/busy"),
        put("/artefacts/busy/a/d", b"2"), head("DELETE", "/artefacts/busy/a/d"), head("GET", "/artefacts/"),
        head("DELETE", "/artefacts/busy"), head("GET", path), head("GET", path + "?versions"),
    ]  # fmt: skip

    def work(worker: int) -> set[int]:
        with pair[worker % 2].connect() as connection:
            turn = [requests[(worker + 3 * number) % len(requests)] for number in range(100)]
            return {connection.ask(request).status for request in turn}

    with concurrent.futures.ThreadPoolExecutor(6) as workers:
        assert set().union(*workers.map(work, range(6))) == allowed
    assert pair[0].ask(put(path, b"last")).status in (200, 201)
    assert pair[1].get(path).body == b"last"


def last_line(program: Program, part: str) -> str:
    """Return the log's first line with a text, as soon as there is one."""
    def found() -> list[str]:
        return [line for line in program.log.read_text().splitlines() if part in line]

    eventually(found)
    return found()[0]


def test_log_shows_aborted_uploads_and_downloads(tmp_path: Path) -> None:
    add_file(tmp_path / "data/app/large", bytes(40_000_000))
    with Program(tmp_path / "data") as program:
        with start_upload(program):
            pass
        assert last_line(program, "PUT /artefacts/app/slow").endswith('HTTP/1.1" 499 -')
        with program.connect(receive_buffer=4096) as connection:
            connection.send(head("GET", "/artefacts/app/large")).file.read(100_000)
        sent = int(last_line(program, "GET /artefacts/app/large").rpartition(" 200 ")[2])
        assert 90_000 < sent < 40_000_000


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
@pytest.mark.parametrize("options", [[], ["--new-token", "x"], ["--verify"]])
def test_unwritable_standard_output_is_one_line(tmp_path: Path, options: list[str]) -> None:
    command = [sys.executable, str(PROGRAM), "--data", str(tmp_path), "--port", "0", *options]
    for redirect in (">/dev/full", ">&-"):
        shell = ["sh", "-c", f"exec {shlex.join(command)} {redirect}"]
        ended = subprocess.run(shell, stderr=subprocess.PIPE, text=True, timeout=20, check=False)
        assert ended.returncode == 2 and ended.stderr.count("\n") == 1, ended
        assert ended.stderr.startswith("artefacts.py: standard output: "), ended


def test_start_errors_say_what_is_wrong(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    data = f"--data={tmp_path / 'data'}"
    assert "300.1.1.1' does not appear to be an IPv4" in start_error(capsys, data, "--host=300.1.1.1")
    for options in (["--max-size=0"], ["--keep-days=0"], ["--prefix=builds"], ["--trusted-proxy=x"]):
        with pytest.raises(SystemExit):
            a.parse_options(options)
        assert capsys.readouterr().err.count("\n") == 1
    other = "import sys; sys.getfilesystemencoding = lambda: 'iso8859-1'; "
    command = [sys.executable, "-c", other + IMPORT + "sys.exit(artefacts.main())"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2 and "UTF-8" in ended.stderr and ended.stderr.count("\n") == 1, ended


def test_grace_period_and_harmless_signals(tmp_path: Path) -> None:
    with Program(tmp_path / "data", "--grace", "1") as program, start_upload(program):
        for number in (signal.SIGHUP, signal.SIGUSR1):
            program.process.send_signal(number)
        assert program.get("/artefacts/").status == 200
        started = time.monotonic()
        assert program.stop() == 0 and 0.9 < time.monotonic() - started < 4


def test_hangup_rereads_the_config(tmp_path: Path) -> None:
    config, path = tmp_path / "c.toml", "/artefacts/app/x"
    config.write_text('[anonymous]\nread = ["*"]\nwrite = ["*"]')
    logged = "artefacts: the old rules stay: .*nonsense.*"
    with Program(tmp_path / "data", "--config", str(config), logged=logged) as program:
        assert program.ask(put(path, b"1")).status == 201
        with program.connect() as running:
            running.send(head("PUT", path, "Content-Length: 1"))
            running.send(b"")
            config.write_text(config.read_text() + '\n[[directory]]\nname = "app"\nwrite_once = true')
            time.sleep(0.2)
            program.process.send_signal(signal.SIGHUP)
            eventually(lambda: program.ask(put(path, b"2")).status == 409)
        config.write_text("nonsense = 1")
        program.process.send_signal(signal.SIGHUP)
        last_line(program, "the old rules stay")
        assert program.ask(put(path, b"3")).status == 409 and program.get(path).body == b"1"


def children(program: Program) -> list[int]:
    """Return the processes that a program has started and that live."""
    pid = program.process.pid
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_processes_serve_one_port_and_survive_each_other(tmp_path: Path) -> None:
    path, logged = "/artefacts/app/x", "artefacts: process [0-9]+ ended with status 9; another one starts"
    with Program(tmp_path / "data", "--processes=4", logged=logged) as program:
        eventually(lambda: len(children(program)) == 4)
        with contextlib.ExitStack() as stack:
            connections = [stack.enter_context(program.connect()) for _ in range(40)]
            answers = [connection.ask(put(f"{path}{at}", b"x")) for at, connection in enumerate(connections)]
            assert [answer.status for answer in answers] == [201] * 40
            victim = children(program)[0]
            os.kill(victim, signal.SIGKILL)
            ended = 0
            for at, connection in enumerate(connections):  # those of the dead process are closed, no other
                try:
                    assert connection.ask(head("GET", f"{path}{at}")).body == b"x"
                except (AssertionError, OSError):
                    assert connection.socket.recv(1) == b""
                    ended += 1
            assert 0 < ended < 40
        assert [program.get(path + str(at)).status for at in range(40)] == [200] * 40
        eventually(lambda: len(children(program)) == 4 and victim not in children(program))


def test_processes_finish_requests_and_end_together(tmp_path: Path) -> None:
    with Program(tmp_path / "data", "--processes=2") as program, start_upload(program) as upload:
        eventually(lambda: len(children(program)) == 2)
        both = children(program)
        for pid in (program.process.pid, *both, *both):  # as service managers do it
            os.kill(pid, signal.SIGTERM)
        eventually(lambda: not program.listens())
        assert upload.send(bytes(100_000)).answer().status == 201
        assert program.process.wait(10) == 0
        assert not any(Path(f"/proc/{pid}").exists() for pid in both)


def test_processes_end_with_the_first_one(tmp_path: Path) -> None:
    with Program(tmp_path / "data", "--processes=2") as program:
        eventually(lambda: len(children(program)) == 2)
        program.process.kill()
        eventually(lambda: not program.listens())


def test_processes_have_the_same_rules_after_a_hangup(tmp_path: Path) -> None:
    config, path = tmp_path / "c.toml", "/artefacts/app/x"
    config.write_text('[anonymous]\nread = ["*"]\nwrite = ["*"]')
    logged = "artefacts: the old rules stay: .*nonsense.*"
    with Program(tmp_path / "data", "--processes=2", "--config", str(config), logged=logged) as program:

        def statuses() -> set[int]:
            return {program.ask(put(path, os.urandom(9))).status for _ in range(20)}

        assert program.ask(put(path, b"1")).status == 201 and statuses() == {200}
        rules = config.read_text() + '\n[[directory]]\nname = "app"\nwrite_once = true'
        config.write_text(rules)
        program.process.send_signal(signal.SIGHUP)
        eventually(lambda: statuses() == {409})
        config.write_text("nonsense = 1")
        program.process.send_signal(signal.SIGHUP)
        last_line(program, "the old rules stay")
        assert statuses() == {409}


def test_log_lines_of_processes_stay_whole(tmp_path: Path) -> None:
    """Log long lines from four processes into one pipe, whose other end is read slowly."""
    command = [sys.executable, str(PROGRAM), f"--data={tmp_path / 'data'}", "--port=0", "--processes=4"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        port = urlsplit(process.stdout.readline().decode()).port or 0

        def ask(number: int) -> None:
            with Connection(port) as connection:
                for _ in range(20):
                    assert connection.ask(head("GET", "/artefacts/" + "x" * 100 * number)).status == 404

        with ThreadPoolExecutor(40) as clients:
            done = [clients.submit(ask, number) for number in range(1, 41)]
            lines = [process.stderr.readline().decode() for _ in range(800)]
            assert not any(future.exception(20) for future in done)
        process.terminate()
        assert process.wait(10) == 0
    line = re.compile(r'127\.0\.0\.1 - - \[[^]]+\] "GET /artefacts/(x+)( HTTP/1.1)?" 404 [0-9]+\n')
    lengths = [len(match[1]) for match in map(line.fullmatch, lines) if match]
    wanted = [min(100 * number, 3500 - 15) for number in range(1, 41)]
    assert sorted(lengths) == sorted(wanted * 20)


def test_port_in_use_is_noticed_with_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Program(tmp_path / "data", "--processes=2") as program:
        options = f"--data={tmp_path / 'other'}", f"--port={program.port}", "--processes=2"
        assert "Address already in use" in start_error(capsys, *options)


def test_sweep_deletes_what_keep_days_says(tmp_path: Path) -> None:
    data, config = tmp_path / "data", tmp_path / "c.toml"
    config.write_text('[[directory]]\nname = "kept"\nkeep_days = 999999')
    for name in ("app/old", "kept/old"):
        add_file(data / name, b"x")
    Path(data / "app/new").write_bytes(b"x")
    command = [sys.executable, str(PROGRAM), "--data", str(data), "--keep-days=30", f"--config={config}"]

    def sweep(*options: str) -> str:
        asked = [*command, "--sweep", *options]
        return subprocess.run(asked, check=True, capture_output=True, text=True).stdout

    os.utime(data / "app/old", ns=(0, a.version_time(T1) * 1000))
    orphan, trash = data / ".incoming/0-1-0", data / ".trash/0-1-0"
    add_file(orphan, b"x")
    trash.mkdir(parents=True)
    assert sweep("--dry-run") == f"app/old {T1}\n" and (data / "app/old").exists()
    assert orphan.exists() and trash.exists()
    assert subprocess.run([*command, "--dry-run"], check=False, capture_output=True).returncode == 2
    assert sweep() == f"app/old {T1}\n" and not (data / "app/old").exists()
    assert not orphan.exists() and not trash.exists()
    assert (data / "app/new").exists() and (data / "kept/old").exists() and sweep() == ""


def test_program_sweeps_while_it_runs(tmp_path: Path) -> None:
    data = tmp_path / "data"
    add_file(data / "app/old", b"x")
    code = patched("artefacts.SWEEP_EVERY = 0.2")
    logged = "artefacts: keep_days: deleted app/old.? .*"
    with Program(data, "--keep-days=30", code=code, logged=logged) as program:
        last_line(program, "deleted app/old ")
        add_file(data / "app/old2", b"x")
        last_line(program, "deleted app/old2 ")
        assert program.get("/artefacts/app").status == 200


@contextlib.contextmanager
def printing_url(command: list[str]) -> Iterator[int]:
    """Run a program that prints a URL, and yield its port. Assert that SIGTERM stops it."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            yield urlsplit(process.stdout.readline()).port or 0
            process.terminate()
            assert process.wait(10) == 0
        finally:
            process.kill()


@pytest.mark.skipif(not os.path.exists("/proc/net/if_inet6"), reason="no IPv6 here")
@pytest.mark.parametrize("hosts", [["localhost"], ["::"], ["127.0.0.1", "::1"]])
def test_several_addresses(tmp_path: Path, hosts: list[str]) -> None:
    options = [f"--host={host}" for host in hosts]
    command = [sys.executable, str(PROGRAM), f"--data={tmp_path / 'data'}", "--port=0", "--open", *options]
    with printing_url(command) as port:
        for address in ("127.0.0.1", "::1"):
            with socket.create_connection((address, port), 5) as connection:
                connection.sendall(head("GET", "/artefacts/", "Connection: close"))
                assert connection.makefile("rb").read().startswith(b"HTTP/1.1 200 ")


def test_prefix_precedes_every_link(tmp_path: Path) -> None:
    command = [sys.executable, str(PROGRAM), f"--data={tmp_path / 'data'}", "--port=0", "--prefix=/büilds/x"]
    prefix = "/b%C3%BCilds/x"
    with printing_url(command) as port:
        for before in ("", prefix.lower()):
            with Connection(port) as connection:
                answer = connection.ask(put(f"{before}/artefacts/app/x", b"x"))
                assert json.loads(answer.body)["href"] == f"{prefix}/artefacts/app/x"
                assert before or answer.headers["Location"] == f"{prefix}/artefacts/app/x"
                assert connection.ask(head("GET", f"{before}/")).headers["Location"] == f"{prefix}/artefacts/"


@pytest.mark.parametrize(("forwarded", "logged"), [
    ("192.0.2.1", "192.0.2.1"), ("203.0.113.9, 192.0.2.1, 10.0.0.3", "192.0.2.1"), ("10.1.1.1", "10.1.1.1"),
    ("192.0.2.1, nonsense, 10.0.0.3", "10.0.0.3"), ("2001:db8::1", "2001:db8::1"), ("", "127.0.0.1"),
])  # fmt: skip
def test_address_from_a_trusted_proxy(forwarded: str, logged: str) -> None:
    proxies = [ipaddress.ip_network(network) for network in ("127.0.0.1", "10.0.0.0/8")]
    assert a.client_address("127.0.0.1", forwarded.split(","), proxies) == logged
    assert a.client_address("192.0.2.7", forwarded.split(","), proxies) == "192.0.2.7"


def test_log_shows_the_address_from_a_trusted_proxy(tmp_path: Path) -> None:
    logged = '192.0.2.1 - .*'
    with Program(tmp_path / "data", "--trusted-proxy=127.0.0.0/8") as program:
        program.logged = re.compile(logged)
        program.get("/artefacts/", "X-Forwarded-For: 198.51.100.1, 192.0.2.1, 127.0.0.9")
        assert last_line(program, "GET /artefacts/").startswith("192.0.2.1 - ")


# == The README ===================================================================================


def test_readme_contains_the_help_text() -> None:
    command, environment = [sys.executable, str(PROGRAM), "--help"], os.environ | {"COLUMNS": "90"}
    help_text = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    readme = PROGRAM.with_name("README.md").read_text()
    assert "\n".join(f"    {line}" if line else "" for line in help_text.splitlines()) in readme
