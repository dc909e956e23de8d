"""Run the histories of test_history.py on GlusterFS, and kill a brick during writes.

Two servers use two mounts of one volume (replica 3). Not part of the normal run. As root, with Debian's
glusterfs-server installed:

    unshare --net --mount --pid --fork --mount-proc python -m pytest -q .ci/glusterfs.py

All daemons and mounts end with that namespace. Outside of one, nothing is started.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from support import PATIENCE, Client, Server, keep, serving, sha256, until
from test_history import (  # the fixture `servers` below replaces the one there
    at_once,
    test_increments_are_not_lost,
    test_many_at_once,
    test_of_many_exactly_one_wins,
    test_one_request_after_the_other,
)

__all__ = [
    "keep",
    "test_increments_are_not_lost",
    "test_many_at_once",
    "test_of_many_exactly_one_wins",
    "test_one_request_after_the_other",
]

ADDRESS = "10.99.0.1"  # an address of lo: glusterd refuses 127.0.0.1
STATE = "/var/lib/glusterd", "/var/log/glusterfs", "/run"  # an empty tmpfs hides each of them
# All caches are off, because a host would decide on a state of a second ago. open-behind is off, because it
# opens a file only at the first read, when the file may already be replaced.
CACHES = "open-behind quick-read stat-prefetch write-behind io-cache read-ahead readdir-ahead"
OPTIONS = "--entry-timeout=0", "--attribute-timeout=0", "--negative-timeout=0"


def call(*command: object) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def gluster(*arguments: object) -> str:
    return call("gluster", "--mode=script", *arguments)


@pytest.fixture(scope="module")
def mounts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Mount one volume of three bricks twice, as two hosts would."""
    names = [name for _, name in socket.if_nameindex()]
    if names != ["lo"] or os.geteuid() != 0:
        pytest.fail("Run it as root, and in a network namespace of its own: see the docstring.")
    call("ip", "link", "set", "lo", "up")
    call("ip", "address", "add", f"{ADDRESS}/32", "dev", "lo")
    for state in STATE:
        call("mount", "-t", "tmpfs", "none", state)
    root = tmp_path_factory.mktemp("volume")
    bricks, (one, two) = [root / f"brick{n}" for n in range(3)], (root / "one", root / "two")
    for folder in (*bricks, one, two, Path("/run/gluster")):
        os.mkdir(folder)
    call("glusterd")
    until(lambda: subprocess.run(["gluster", "volume", "info"], capture_output=True).returncode == 0)
    gluster("volume", "create", "v", "replica", 3, *(f"{ADDRESS}:{brick}" for brick in bricks), "force")
    for translator in CACHES.split():
        gluster("volume", "set", "v", f"performance.{translator}", "off")
    gluster("volume", "start", "v")
    for mount in one, two:
        call("glusterfs", f"--volfile-server={ADDRESS}", "--volfile-id=v", *OPTIONS, mount)
    until(lambda: os.path.ismount(one) and os.path.ismount(two))
    until(lambda: len(brick_processes()) == 3)
    return one, two


@pytest.fixture(scope="module")
def servers(mounts: tuple[Path, Path], keep: str) -> Iterator[tuple[Server, Server]]:
    with ExitStack() as stack:
        options = "--keep-versions", keep
        one, two = (stack.enter_context(serving(mount / f"data-{keep}", *options)) for mount in mounts)
        yield one, two


def brick_processes() -> dict[str, int]:
    """Return the process of each running brick, by the brick's name."""
    files = {path.stem.rpartition("-")[2]: path for path in Path("/run/gluster/vols/v").glob("*.pid")}
    found = {brick: path.read_text().strip() for brick, path in files.items()}
    return {brick: int(pid) for brick, pid in found.items() if pid and os.path.exists(f"/proc/{pid}")}


def kill(brick: int) -> None:
    os.kill(brick, signal.SIGKILL)
    os.waitpid(brick, 0)  # as process 1 we are its parent; glusterd takes a zombie for a running brick


def heal() -> None:
    """Start the missing bricks and wait until all are equal."""
    gluster("volume", "start", "v", "force")
    until(lambda: len(brick_processes()) == 3)
    until(lambda: gluster("volume", "heal", "v", "info").count("Number of entries: 0") == 3)


def test_killed_brick_loses_no_acknowledged_push(servers: tuple[Server, Server], keep: str) -> None:
    """Kill a brick during writes. Kill another one after the first has come back and is healed.

    Both servers must have each acknowledged push, complete, each time.
    """

    def work(client: Client, number: int) -> dict[str, str]:
        acknowledged = {}
        for n in range(60):
            if number == 0 and n == 20:
                kill(killed)
            body = b"%d-%d " % (number, n) * (1, 5_000, 100_000)[n % 3]
            path = f"killed/{number}/{n % 40}"  # the last 20 replace the first ones
            answer = client.ask("PUT", path, body)
            assert answer.status in (200, 201), answer.body
            acknowledged[path] = sha256(body)
        return acknowledged

    def check() -> None:
        for server in servers:
            with server.client() as client:
                for path, digest in acknowledged.items():
                    assert sha256(client.ask("GET", path).body) == digest, path

    (brick, killed), (_, other), *_ = sorted(brick_processes().items())
    acknowledged: dict[str, str] = {}
    for part in at_once(servers, work):
        acknowledged |= part
    assert brick not in brick_processes()
    check()
    heal()
    kill(other)
    check()
    heal()
