"""Slow and hostile clients: the server answers others meanwhile, stays small, and frees all afterwards."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent
SECONDS = float(os.environ.get("SLOW_SECONDS", "10"))  # the full minute: SLOW_SECONDS=60


@pytest.fixture(autouse=True, scope="module")
def enough_descriptors() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    command = [sys.executable, "artefacts.py", "--port", "0", "--data", str(tmp_path / "data"), "--quiet"]
    with subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline().split(":")[2].split("/")[0])
        yield process, port
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def descriptors(process: subprocess.Popen[str]) -> int:
    return len(os.listdir(f"/proc/{process.pid}/fd"))


def peak_memory(process: subprocess.Popen[str]) -> int:
    """Bytes."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def connect(port: int, request: bytes = b"") -> socket.socket:
    client = socket.create_connection(("127.0.0.1", port))
    client.sendall(request)
    return client


def eventually(condition: object, seconds: float = 30) -> None:
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)


def test_slow_clients_hinder_nobody(server: tuple[subprocess.Popen[str], int], tmp_path: Path) -> None:
    process, port = server
    url = f"http://127.0.0.1:{port}/artefacts/app"
    for name, size in ("large", 64 << 20), ("small", 1000):
        request = urllib.request.Request(f"{url}/{name}", bytes(size), method="PUT")
        urllib.request.urlopen(request).close()
    slow_upload = b"PUT /artefacts/app/slow%d HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n"
    download = b"GET /artefacts/app/large HTTP/1.1\r\nHost: localhost\r\n\r\n"
    before, taken = descriptors(process), []
    with contextlib.ExitStack() as opened:
        for _ in range(200):
            opened.enter_context(connect(port))
        for _ in range(20):
            opened.enter_context(connect(port, download))
        uploads = [
            opened.enter_context(connect(port, slow_upload % number)) for number in range(50)
        ]
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            for client in uploads:
                client.sendall(b"x")
            for _ in range(5):
                start = time.monotonic()
                with urllib.request.urlopen(f"{url}/small", timeout=10) as answer:
                    assert len(answer.read()) == 1000
                taken.append(time.monotonic() - start)
            time.sleep(0.2)  # the pace of the slow, not a wait for something
        print(f"a normal GET meanwhile: {statistics.median(taken) * 1000:.1f} ms at the median")
        assert peak_memory(process) < 100e6
    eventually(lambda: descriptors(process) <= before)
    assert not list((tmp_path / "data/.incoming").iterdir())


def test_more_than_a_thousand_connections(server: tuple[subprocess.Popen[str], int]) -> None:
    process, port = server
    before = descriptors(process)
    with contextlib.ExitStack() as opened:
        for _ in range(1100):
            opened.enter_context(connect(port))
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/artefacts/") as answer:
            assert answer.status == 200
    eventually(lambda: descriptors(process) <= before)
