"""What the checks in this folder share: the program as a process of its own, and a client."""

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
    """One connection, opened anew where the server closed it."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)

    def ask(self, method: str, path: str, body: bytes | Iterable[bytes] | None = None,
            fields: dict[str, str] | None = None) -> Answer:
        """The answer to one request; `path` is below /artefacts/. A body in pieces is sent chunked."""
        chunked = body is not None and not isinstance(body, bytes)
        self._connection.request(method, f"/artefacts/{path}", body, fields or {}, encode_chunked=chunked)
        with self._connection.getresponse() as response:
            return Answer(response.status, response.headers, response.read())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()


class Server(NamedTuple):
    process: subprocess.Popen[str]
    port: int
    told: IO[str]  # its standard error

    def log(self) -> str:
        return os.pread(self.told.fileno(), 1 << 26, 0).decode()  # and not by the position it writes at

    def client(self) -> Client:
        return Client(self.port)

    def ask(self, method: str, path: str, body: bytes | Iterable[bytes] | None = None,
            fields: dict[str, str] | None = None) -> Answer:
        """One request on a connection of its own."""
        with self.client() as client:
            return client.ask(method, path, body, fields)

    def descriptors(self) -> Counter[str]:
        """What the process has open, connections aside."""
        found = []
        for fd in os.listdir(f"/proc/{self.process.pid}/fd"):
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                found.append(os.readlink(f"/proc/{self.process.pid}/fd/{fd}"))
        return Counter(name for name in found if not name.startswith("socket:"))


@contextlib.contextmanager
def serving(data: Path, *options: str, tracebacks: bool = False) -> Iterator[Server]:
    """The program on a free port, warnings being errors. In the end it stops as it should, without a
    traceback, unless what is done to it should give some."""
    arguments = [sys.executable, "-W", "error", str(PROGRAM), "--port", "0", "--data", str(data), "--quiet"]
    with tempfile.TemporaryFile("w+") as told:
        process = subprocess.Popen([*arguments, *options], stdout=subprocess.PIPE, stderr=told, text=True)
        try:
            assert process.stdout is not None
            url = process.stdout.readline()
            if url:
                yield Server(process, int(url.split(":")[2].partition("/")[0]), told)
                process.send_signal(signal.SIGTERM)
                process.wait(PATIENCE)
        finally:
            process.kill()
            process.communicate()
            told.seek(0)
            log = told.read()
            sys.stderr.write(log)  # which pytest shows where a test fails
    assert process.returncode == 0, log
    assert tracebacks or "Traceback" not in log, log


def until(condition: Callable[[], object], within: float = PATIENCE) -> None:
    """Waits for what another process does in its own time."""
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.002)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
