"""Connect slow clients in large numbers: the server must answer others, stay small and free everything."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import statistics
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import Server, serving, until

SECONDS = float(os.environ.get("SLOW_SECONDS", "10"))  # SLOW_SECONDS=60 runs for the full minute


@pytest.fixture(autouse=True, scope="module")
def enough_descriptors() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with serving(tmp_path / "data", stop_within=20) as running:
        yield running


def connect(server: Server, request: bytes = b"") -> socket.socket:
    client = socket.create_connection(("127.0.0.1", server.port))
    client.sendall(request)
    return client


def test_slow_clients_do_not_slow_down_others(server: Server, tmp_path: Path) -> None:
    for name, size in ("large", 64 << 20), ("small", 1000):
        assert server.ask("PUT", f"app/{name}", bytes(size)).status == 201
    slow_upload = b"PUT /artefacts/app/slow%d HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n"
    download = b"GET /artefacts/app/large HTTP/1.1\r\nHost: localhost\r\n\r\n"
    before, taken = server.descriptors(), []
    with contextlib.ExitStack() as opened:
        for _ in range(200):
            opened.enter_context(connect(server))
        for _ in range(20):
            opened.enter_context(connect(server, download))
        uploads = [opened.enter_context(connect(server, slow_upload % number)) for number in range(50)]
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            for client in uploads:
                client.sendall(b"x")
            for _ in range(5):
                start = time.monotonic()
                with urllib.request.urlopen(f"{server.url}app/small", timeout=10) as answer:
                    assert len(answer.read()) == 1000
                taken.append(time.monotonic() - start)
            time.sleep(0.2)  # the pace of the slow clients
        print(f"median of a normal GET meanwhile: {statistics.median(taken) * 1000:.1f} ms")
        assert server.memory("VmHWM") < 100e6
    until(lambda: server.descriptors() <= before, 30)
    assert not list((tmp_path / "data/.incoming").iterdir())


def test_more_than_a_thousand_connections(server: Server) -> None:
    before = server.descriptors()
    with contextlib.ExitStack() as opened:
        for _ in range(1100):
            opened.enter_context(connect(server))
        with urllib.request.urlopen(server.url) as answer:
            assert answer.status == 200
    until(lambda: server.descriptors() <= before, 30)
