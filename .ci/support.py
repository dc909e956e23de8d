"""Run the program as a process and talk to it: shared by the checks in this folder."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, Self

import pytest

import artefacts

PROGRAM = Path(artefacts.__file__).resolve()
PATIENCE = 120  # seconds: no deadline here measures speed; the machine may be busy


class Answer(NamedTuple):
    status: int
    fields: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """Send requests over one connection, which is reopened if the server closed it."""

    def __init__(self, port: int) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)

    def ask(self, method: str, path: str, body: bytes | Iterable[bytes] | None = None,
            fields: dict[str, str] | None = None) -> Answer:
        """Send one request and return its response.

        `path` is below /artefacts/. A body in pieces is sent chunked.
        """
        chunked = body is not None and not isinstance(body, bytes)
        self.connection.request(method, f"/artefacts/{path}", body, fields or {}, encode_chunked=chunked)
        with self.connection.getresponse() as response:
            return Answer(response.status, response.headers, response.read())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()


class Server(NamedTuple):
    process: subprocess.Popen[str]
    url: str  # of the listing of directories; ends in a slash
    port: int
    stderr: IO[str]

    def log(self) -> str:
        """Return what the program has written to standard error."""
        return os.pread(self.stderr.fileno(), 1 << 26, 0).decode()  # leaves the position of the writer alone

    def client(self) -> Client:
        return Client(self.port)

    def ask(self, method: str, path: str, body: bytes | Iterable[bytes] | None = None,
            fields: dict[str, str] | None = None) -> Answer:
        """Send one request on a new connection and return its response."""
        with self.client() as client:
            return client.ask(method, path, body, fields)

    def open_files(self) -> Counter[str]:
        """Count the open file descriptors by name.

        Sockets are left out, and so are folders, some of which are kept open on purpose, except .incoming,
        .locks and .trash.
        """
        found = []
        for fd in Path(f"/proc/{self.process.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                name = os.readlink(fd)
                if not fd.is_dir() or name.endswith((".incoming", ".locks", ".trash")):
                    found.append(name)
        return Counter(name for name in found if not name.startswith("socket:"))

    def descriptors(self) -> int:
        """Return the number of open file descriptors, sockets included."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def memory(self, field: str) -> int:
        """Return a figure of /proc/PID/status in bytes: VmRSS (resident now) or VmHWM (its peak)."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(status.partition(f"{field}:")[2].split()[0])


@contextlib.contextmanager
def serving(data: Path, *options: str, tracebacks: bool = False, requests_logged: bool = False,
            stop_within: float = PATIENCE) -> Iterator[Server]:
    """Run the program on a free port, with warnings as errors.

    Leaving the context stops it with SIGTERM. Asserts that it then exits with 0 within `stop_within` seconds,
    and that it logged no traceback, unless the test provokes some (`tracebacks`).
    """
    arguments = [sys.executable, "-W", "error", str(PROGRAM), "--port", "0", "--data", str(data)]
    arguments += ["--quiet"] * (not requests_logged)
    with tempfile.TemporaryFile("w+") as stderr:
        process = subprocess.Popen([*arguments, *options], stdout=subprocess.PIPE, stderr=stderr, text=True)
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            if url:
                yield Server(process, url, int(url.split(":")[2].partition("/")[0]), stderr)
                process.send_signal(signal.SIGTERM)
                process.wait(stop_within)
        finally:
            process.kill()
            process.communicate()
            stderr.seek(0)
            log = stderr.read()
            sys.stderr.write(log)  # pytest shows it if a test fails
    assert process.returncode == 0, log
    assert tracebacks or "Traceback" not in log, log


@pytest.fixture(scope="module", params=["0", "2", "all"])
def keep(request: pytest.FixtureRequest) -> str:
    """Return a value of --keep-versions."""
    return str(request.param)


def until(condition: Callable[[], object], within: float = PATIENCE) -> None:
    """Wait until another process has done something. Fail after `within` seconds."""
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, f"the condition did not become true within {within} s"
        time.sleep(0.002)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
