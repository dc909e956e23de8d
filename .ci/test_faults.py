"""Check that no acknowledged push is lost, whatever fails.

The process is killed at every system call of every operation, every system call fails, the order of the calls
is checked for power cuts, and disks fill up or vanish.

strace injects the faults into a forked child that works on a `Repository`. Between its start and its report,
the child does nothing but the operation. The report uses system calls that are not traced.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import pytest
from support import PATIENCE, Answer, Client, serving, sha256, until

import artefacts as a

KEEP = 2
OWN_FOLDERS = (".incoming", ".locks", ".trash")
LARGE = bytes(range(256)) * 1200  # more than an upload keeps in memory
NEW = b"new " * 1000
# u::rwx,g::r-x,o::r-- as the kernel stores it (acl(5)): version 2, then (tag, permissions, no id) each
DEFAULT_ACL = struct.pack("<IHHiHHiHHi", 2, 1, 7, -1, 4, 5, -1, 0x20, 4, -1)

# == A child under strace =========================================================================

CHANGING = [
    "open", "openat", "mkdir", "mkdirat", "write", "pwrite64", "ftruncate", "fallocate", "copy_file_range",
    "fsync", "fdatasync", "rename", "renameat", "renameat2", "link", "linkat", "unlink", "unlinkat", "rmdir",
    "utimensat", "fsetxattr", "fchmod", "fchown", "flock",
]
READING = [
    "close", "read", "pread64", "getdents64", "fgetxattr", "fstat", "newfstatat", "statx", "statfs", "fcntl",
    "dup",
]
# These change bytes, times, attributes or the owner of an open file.
WRITING = {"write", "pwrite64", "copy_file_range", "ftruncate", "utimensat", "fsetxattr", "fchown"}
# A file system may allocate late, so that each of these calls can report that the disk is full.
ALLOCATING = set(CHANGING) - {"flock", "unlink", "unlinkat", "rmdir"}


class Child:
    """A forked process that pauses at each report. It ends with the context."""

    def __init__(self, work: Callable[[Callable[[object], None]], None]) -> None:
        """Run `work` in the child. Its argument sends a report and returns when the child may proceed."""
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._ours.settimeout(PATIENCE)
        self.pid = os.fork()
        if self.pid:
            theirs.close()
            return
        status = 1
        try:
            self._ours.close()
            unraisable: list[object] = []
            sys.unraisablehook = unraisable.append  # above all ResourceWarnings

            def report(message: object) -> None:
                theirs.send(json.dumps(message).encode())
                if not theirs.recv(1):
                    os._exit(1)

            work(report)
            status = 2 if unraisable else 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    def receive(self) -> Any:
        """Return the next report, or None if the child has died."""
        message = self._ours.recv(1 << 16)
        return json.loads(message) if message else None

    def proceed(self) -> None:
        self._ours.send(b".")

    def end(self) -> int:
        """End a waiting child. Return the exit status, which is negative if a signal killed the child."""
        self._ours.close()
        pid, self.pid = self.pid, 0
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.pid:
            self.end()


def run_in_child(work: Callable[[], object]) -> None:
    """Run the work in a child process, so that everything a repository holds open ends with it."""
    with Child(lambda report: report(bool(work()))) as child:
        assert child.receive() is not None, "the child failed: see the traceback above"


@contextlib.contextmanager
def tracing(pid: int, log: Path, *injected: str) -> Iterator[None]:
    """Run strace on all threads of a process.

    For `when=`, strace counts each system call of each thread separately, from here on.
    """
    names = ",".join("?" + name for name in CHANGING + READING + ["sendto"])
    faults = (word for inject in injected for word in ("-e", f"inject={inject}"))
    command = ["strace", "-f", "-y", "-s", "0", "-o", str(log), "-e", f"trace={names}", *faults]
    strace = subprocess.Popen([*command, "-p", str(pid)], stderr=subprocess.PIPE, text=True)
    try:
        assert strace.stderr is not None
        line = strace.stderr.readline()
        assert "attached" in line, line
        yield
    finally:
        strace.terminate()  # detaches from the process
        strace.communicate(timeout=PATIENCE)


class Call(NamedTuple):
    name: str
    paths: tuple[str, ...]
    arguments: str
    result: str

    def succeeded(self) -> bool:
        return self.result[:1] not in ("-", "?")  # "-": failed; "?": cut short

    def changes(self) -> bool:
        """Return whether the call may change the disk or a lock."""
        return self.name in CHANGING and ("open" not in self.name or "O_CREAT" in self.arguments)


LINE = re.compile(r"\d+ +(\w+)\((.*)\) += (.*)")
PATH = re.compile(r'\d+<([^<>]*)>(?:\(deleted\))?(?:, "([^"]*)")?|"(/[^"]*)"')


def calls(log: Path) -> list[Call]:
    """Return the system calls in a log of strace, up to the first report."""
    found: list[Call] = []
    for line in log.read_text().splitlines():
        match = LINE.fullmatch(line)
        if match is None:
            continue
        name, arguments, result = match.groups()
        if name == "sendto":
            return found
        paths = (os.path.join(*filter(None, groups)) for groups in PATH.findall(arguments.replace('""', "0")))
        found.append(Call(name, tuple(paths), arguments, result))
    return found


def each_call(log: Path) -> Iterator[tuple[str, Call]]:
    """Yield each call with its `inject` option for strace, in which %s stands for the fault."""
    counted: Counter[str] = Counter()
    for call in calls(log):
        counted[call.name] += 1
        yield f"{call.name}:%s:when={counted[call.name]}", call


# == The state of the disk ==========================================================================


class Stored(NamedTuple):
    content: bytes
    time: int | None  # ns; None: stored by the operation under test, later than all others
    type: str


Tree = dict[str, Stored]


def tree(data: Path, known: Mapping[str, Stored] | None = None) -> Tree:
    """Return every file below the data directory, without the repository's own folders.

    A time that is not among the `known` times of the artefact becomes None. Asserts that it is a later one.
    """
    found: Tree = {}
    for file in data.rglob("*"):
        path = file.relative_to(data).as_posix()
        if not path.startswith(OWN_FOLDERS) and file.is_file():
            time: int | None = file.stat().st_mtime_ns
            if known is not None:
                same = [stored for name, stored in known.items() if artefact_of(name) == artefact_of(path)]
                times = [stored.time for stored in same if stored.time]
                if time not in times:
                    assert file.stat().st_mtime_ns > max(times, default=0), f"{path} became older"
                    time = None
            type = os.getxattr(file, "user.mime_type").decode()
            found[path] = Stored(file.read_bytes(), time, type)
    return found


def artefact_of(path: str) -> tuple[str, str]:
    """Return (directory, id) of the path of an artefact or a version."""
    directory, _, id = path.partition("/")
    if id.startswith(".versions/"):
        id = id.removeprefix(".versions/").rpartition("/")[0]
    return directory, id


def leftovers(data: Path) -> list[str]:
    """Return the names in .incoming and .trash."""
    return [f"{own}/{name}" for own in (".incoming", ".trash") for name in os.listdir(data / own)]


def version_of(stored: Stored) -> str:
    return a.Artefact("", "", 0, (stored.time or 0) // 1000, "", None).version


def without(tree: Tree, *paths: str) -> Tree:
    return {path: stored for path, stored in tree.items() if path not in paths}


def version_paths(tree: Tree, id: str = "lib/x") -> list[str]:
    """Return the paths of the versions of an artefact in app, oldest first."""
    return sorted(path for path in tree if path.startswith(f"app/.versions/{id}/"))


def with_current_as_version(tree: Tree, id: str = "lib/x") -> Tree:
    """Return the tree after the current file is linked under its version name."""
    current = tree[f"app/{id}"]
    return tree | {f"app/.versions/{id}/{version_of(current)}": current}


def states_of_replace(tree: Tree, new: Stored) -> list[Tree]:
    """Return the states of a push to lib/x. It has KEEP versions already, so the oldest one is pruned."""
    linked = with_current_as_version(tree)
    full = linked | {"app/lib/x": new}
    return [tree, linked, full, without(full, version_paths(tree)[0])]


def states_of_delete(tree: Tree) -> list[Tree]:
    """Return the states of a delete of lib/x, which also prunes the oldest version."""
    linked = with_current_as_version(tree)
    full = without(linked, "app/lib/x")
    return [tree, linked, full, without(full, version_paths(tree)[0])]


def states_of_erase_all(tree: Tree) -> list[Tree]:
    """Return the states of an erase of lib/x: first the artefact goes, then its versions, oldest first."""
    steps = [tree]
    for path in ["app/lib/x", *version_paths(tree)]:
        steps.append(without(steps[-1], path))
    return steps


def states_of_expire(tree: Tree) -> list[Tree]:
    """Return the states of an expire of app: one artefact after the other, each with its versions, and last
    the versions of the deleted one."""
    steps = [tree]
    versions = version_paths(tree, "gone")
    for path in ["app/lib/x", *version_paths(tree), "app/lib/y", "app/z", *versions]:
        steps.append(without(steps[-1], path))
    return steps


def promote(repository: a.Repository, source: str, target: str) -> None:
    """Promote an artefact of app to another id."""
    with repository.fetch("app", source) as content:
        repository.promote(content, "app", target)


def expire(repository: a.Repository) -> None:
    """Expire all artefacts of app."""
    repository.keep_days = lambda directory: 0 if directory == "app" else None
    assert [artefact.id for artefact in repository.expire()] == ["lib/x", "lib/y", "z", "gone"]


def push(repository: a.Repository, directory: str, id: str, content: bytes,
         type: str = "text/x-new") -> a.Artefact:
    with repository.stage() as upload:
        for start in range(0, len(content), 50_000):  # pieces, as from a network
            upload.write(content[start : start + 50_000])
        return repository.push(upload, directory, id, type=type)[0]


def oldest_version(tree: Tree) -> str:
    return os.path.basename(version_paths(tree)[0])


class Operation(NamedTuple):
    """An operation on a repository, and the trees that it leads through, from the old one to the new one.

    In between, a version may already be linked or not yet be pruned. Nothing is ever missing.
    """

    run: Callable[[a.Repository, Tree], object]
    states: Callable[[Tree], list[Tree]]
    commits: str = "rename"  # prefix of the system call that makes the new state current
    keep: int = KEEP


OPERATIONS = {
    "first push": Operation(
        lambda repository, _: push(repository, "fresh", "deep/er/x", LARGE),
        lambda tree: [tree, tree | {"fresh/deep/er/x": Stored(LARGE, None, "text/x-new")}],
    ),
    "replacing push, keeping none": Operation(
        lambda repository, _: push(repository, "plain", "x", NEW),
        lambda tree: [tree, tree | {"plain/x": Stored(NEW, None, "text/x-new")}],
        keep=0,
    ),
    "replacing push": Operation(
        lambda repository, _: push(repository, "app", "lib/x", NEW),
        lambda tree: states_of_replace(tree, Stored(NEW, None, "text/x-new")),
    ),
    "first version": Operation(
        lambda repository, _: push(repository, "plain", "x", NEW),
        lambda tree: [
            tree,
            tree | {f"plain/.versions/x/{version_of(tree['plain/x'])}": tree["plain/x"]},
            tree | {
                f"plain/.versions/x/{version_of(tree['plain/x'])}": tree["plain/x"],
                "plain/x": Stored(NEW, None, "text/x-new"),
            },
        ],
    ),
    "replacing push of an artefact from the future": Operation(
        lambda repository, _: push(repository, "plain", "future", NEW),
        lambda tree: [tree, tree | {"plain/future": Stored(NEW, None, "text/x-new")}],
        keep=0,
    ),
    "delete": Operation(lambda repository, _: repository.delete("app", "lib/x"), states_of_delete, "unlink"),
    "delete, keeping none": Operation(
        lambda repository, _: repository.delete("plain", "x"), lambda tree: [tree, without(tree, "plain/x")],
        "unlink", 0,
    ),
    "restore": Operation(
        lambda repository, old: repository.restore("app", "lib/x", oldest_version(old)),
        lambda tree: states_of_replace(tree, tree[version_paths(tree)[0]]._replace(time=None)),
    ),
    "promote": Operation(
        lambda repository, _: promote(repository, "lib/y", "lib/x"),
        lambda tree: states_of_replace(tree, tree["app/lib/y"]._replace(time=None)),
    ),
    "expire": Operation(lambda repository, _: expire(repository), states_of_expire, "unlink"),
    "erase": Operation(
        lambda repository, old: repository.erase("app", "lib/x", oldest_version(old)),
        lambda tree: [tree, without(tree, version_paths(tree)[0])],
        "unlink",
    ),
    "erase all": Operation(
        lambda repository, _: repository.delete("app", "lib/x", versions_too=True),
        states_of_erase_all, "unlink",
    ),
    "directory delete": Operation(
        lambda repository, _: repository.delete_directory("app"),
        lambda tree: [tree, {path: stored for path, stored in tree.items() if not path.startswith("app/")}],
    ),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a folder, in memory if attributes work there: hundreds of cases fsync, and none needs a disk."""
    with contextlib.ExitStack() as stack:
        try:
            path = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
            os.setxattr(path, "user.test", b"")
        except OSError:
            path = tmp_path_factory.mktemp("place")
        yield path


@pytest.fixture(scope="module")
def before(place: Path) -> Path:
    """Return a data directory with artefacts, versions and a deleted artefact. Each case uses a copy."""
    data = place / "before"
    repository = a.Repository(data, keep_versions=KEEP)
    (data / "app").mkdir()
    with contextlib.suppress(OSError):  # the commit then changes the access after the file is sealed
        os.setxattr(data / "app", "system.posix_acl_default", DEFAULT_ACL)
    for number in range(KEEP + 1):
        push(repository, "app", "lib/x", b"x%d " % number * 100, f"text/x-{number}")
        push(repository, "app", "gone", b"gone %d" % number)
    repository.delete("app", "gone")
    for directory, id in (("app", "lib/y"), ("app", "z"), ("plain", "x"), ("plain", "future")):
        push(repository, directory, id, f"{directory}/{id}".encode(), "text/x-old")
    day = time.time_ns() // 1000 * 1000 + 24 * 3600 * 10**9
    os.utime(data / "plain/future", ns=(day, day))
    list(repository.artefacts("plain", digests=True))  # stores a digest for the new time
    for number, operation in enumerate(OPERATIONS.values()):  # imports late modules before the cases
        copy = data.with_name(f"copy{number}")
        shutil.copytree(data, copy)
        operation.run(a.Repository(copy, keep_versions=operation.keep), tree(copy))
    return data


@contextlib.contextmanager
def copied(before: Path) -> Iterator[Path]:
    data = before.with_name("data")
    shutil.copytree(before, data)
    try:
        yield data
    finally:
        shutil.rmtree(data)


def assert_state(data: Path, expected: Tree) -> None:
    """Assert that a new repository has these artefacts and versions, with the digests of their bytes."""
    repository = a.Repository(data, keep_versions=KEEP)
    assert {found for _, found in repository.verify()} <= {"whole"}
    listed = {
        f"{directory}/{artefact.id}" for directory in repository.directories()
        for artefact in repository.artefacts(directory)
    }
    assert listed == {path for path in expected if "/.versions/" not in path}
    for directory, id in set(map(artefact_of, expected)):
        digests = {}
        for path, stored in expected.items():
            if path == f"{directory}/{id}":
                digests["current" if stored.time is None else version_of(stored)] = sha256(stored.content)
            elif path.startswith(f"{directory}/.versions/{id}/"):
                digests[path.rpartition("/")[2]] = sha256(stored.content)
        versions = repository.versions(directory, id)
        new = f"{directory}/{id}" in expected and expected[f"{directory}/{id}"].time is None
        assert digests == {
            "current" if current and new else artefact.version: artefact.sha256
            for artefact, current in versions
        }


def assert_works(repository: a.Repository, directory: str, id: str) -> None:
    """Assert that push, delete and restore work on the artefact, and that a directory can be deleted."""
    def current() -> bytes:
        with repository.fetch(directory, id) as content:
            return content.read(0, content.artefact.size)

    with contextlib.suppress(a.NotFound):
        newest = repository.versions(directory, id)[0][0].version
        assert push(repository, directory, id, b"again").version > newest
    pushed = push(repository, directory, id, b"more")
    assert current() == b"more"
    repository.delete(directory, id)
    with pytest.raises(a.NotFound):
        current()
    assert repository.restore(directory, id, pushed.version)[0].version > pushed.version
    assert current() == b"more"
    push(repository, "spare", "x", b"")
    repository.delete_directory("spare")


def target(operation: Operation, tree: Tree) -> tuple[str, str]:
    """Return (directory, id) of the artefact that the operation changes."""
    old, *_, new = operation.states(tree)
    return min(artefact_of(path) for path in old | new if old.get(path) != new.get(path))


@contextlib.contextmanager
def performed(operation: Operation, data: Path, log: Path, *injected: str) -> Iterator[tuple[Child, Any]]:
    """Perform an operation in a child under strace. Yield the child and its first report.

    The report is None if the child was killed, otherwise the error that was raised, as a list. If the child
    may proceed, it does other work and reports which files below the data directory are then open.
    """

    def work(report: Callable[[object], None]) -> None:
        repository = a.Repository(data, keep_versions=operation.keep)
        report("ready")
        raised: list[object] = []
        try:
            operation.run(repository, old)
        except OSError as error:
            raised = ["OSError", error.errno]
        except a.ArtefactsError as error:
            raised = [type(error).__name__, error.detail]
        report(raised)
        assert_state(data, tree(data, old))
        repository.keeps = lambda _: KEEP
        assert_works(repository, *target(operation, old))
        with os.scandir("/proc/self/fd") as entries:
            opened = [os.readlink(entry.path) for entry in entries]
        report([name for name in opened if name.startswith(str(data))])

    old = tree(data)
    with Child(work) as child:
        assert child.receive() == "ready"
        with tracing(child.pid, log, *injected):
            child.proceed()
            raised = child.receive()
        yield child, raised


def assert_recovers(data: Path, expected: Tree, directory: str, id: str) -> None:
    """Assert that a new repository sweeps what is left over, has the expected state, and works."""

    def work() -> None:
        repository = a.Repository(data, keep_versions=KEEP)
        assert leftovers(data) == [], "not swept"
        assert_state(data, expected)
        assert_works(repository, directory, id)

    run_in_child(work)


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_kill_at_every_system_call(before: Path, operation: Operation) -> None:
    """Kill the process at each call that changes something: the artefact is old or new, never mixed.

    A kill at any other call would leave the same state as at the next changing call.
    """
    log, old = before.with_name("log"), tree(before)
    states = operation.states(old)
    with copied(before) as data, performed(operation, data, log) as (_, raised):
        assert raised == [] and tree(data, old) == states[-1] and leftovers(data) == []
        cases = [(inject, call) for inject, call in each_call(log) if call.changes()]
    reached = 0
    for inject, call in cases:
        with copied(before) as data:
            with performed(operation, data, log, inject % "signal=KILL") as (child, raised):
                assert (raised, child.end()) == (None, -signal.SIGKILL), f"{call} was not hit"
            found = tree(data, old)
            assert found in states[reached:], f"killed at {call}"
            reached = states.index(found)
            assert len(leftovers(data)) <= 1, f"killed at {call}"
            assert_recovers(data, found, *target(operation, old))
    assert len(cases) > len(states) and reached >= len(states) - 2


# == Power cuts ===================================================================================


class PowerCut:
    """Follow system calls and remember which changes no fsync has made durable yet.

    A power cut may lose these changes; a kill does not. Asserts that no step depends on a change that may
    still be lost.
    """

    def __init__(self, data: Path) -> None:
        self.data = f"{data}/"
        self.names: set[str] = set()  # created, replaced or removed; the folder is not fsynced since
        self.contents: set[str] = set()  # files with bytes, times or attributes that are not fsynced
        self.locks: set[str] = set()

    def follow(self, call: Call) -> None:
        if not call.succeeded() or not call.paths:
            return
        path = call.paths[-1]
        if call.name == "flock":
            self.locks.add(path)
        elif call.name == "close":
            self.locks.discard(path)
        elif call.name in ("fsync", "fdatasync"):
            self.contents.discard(path)
            self.names = {name for name in self.names if os.path.dirname(name) != path}
        elif call.name == "utimensat" and "AT_SYMLINK_NOFOLLOW" in call.arguments:
            assert self.locks  # the time of a directory, which may be lost
        elif call.name in WRITING:
            self.contents.add(path)
        elif call.name.startswith(("mkdir", "link")) or "O_CREAT" in call.arguments:
            self.add_name(path)
        elif call.name.startswith("rename"):
            assert call.paths[0] not in self.contents, f"{path} was renamed before its bytes were durable"
            assert self.is_own(path) or not self.versions(), f"{path} came before its version was durable"
            self.add_name(path)
            self.remove_name(call.paths[0])
        elif call.name.startswith("unlink") and "AT_REMOVEDIR" not in call.arguments:
            self.remove_name(path)

    def add_name(self, name: str) -> None:
        """Record a name that must last."""
        if self.is_own(name):
            return
        assert self.locks or not name.startswith(self.data), f"{name} was created without the lock"
        inside = [folder for folder in self.names if name.startswith(f"{folder}/")]
        assert not inside, f"{name} was created in a folder that is not durable"
        self.names.add(name)

    def remove_name(self, name: str) -> None:
        """Record the removal of a name."""
        if self.is_own(name):
            return
        assert self.locks, f"{name} was removed without the lock"
        if "/.versions/" in name:
            assert self.pending() == self.versions(), f"{name} was removed before its replacement was durable"
        else:
            assert not self.versions(), f"{name} was removed before its version was durable"
        self.names.add(name)

    def is_own(self, name: str) -> bool:
        return name.removeprefix(self.data).startswith(OWN_FOLDERS)

    def pending(self) -> set[str]:
        return {name for name in self.names | self.contents if not self.is_own(name)}

    def versions(self) -> set[str]:
        return {name for name in self.pending() if "/.versions/" in name}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_power_cut_loses_nothing(before: Path, operation: Operation) -> None:
    """Check that each step is durable before the next depends on it, and all steps before the response."""
    log = before.with_name("log")
    with copied(before) as data, performed(operation, data, log) as (_, raised):
        assert raised == []
    cut = PowerCut(data)
    for call in calls(log):
        cut.follow(call)
    assert cut.pending() == set()
    assert any(call.name.startswith(operation.commits) for call in calls(log))


def kills_after_mkdir(before: Path, log: Path) -> list[str]:
    """Return the options for strace that kill a first push right after each folder is created."""
    with copied(before) as data, performed(OPERATIONS["first push"], data, log):
        found = list(each_call(log))
    made = [at for at, (_, call) in enumerate(found) if call.name.startswith("mkdir") and call.succeeded()]
    assert len(made) >= 3
    return [found[at + 1][0] % "signal=KILL" for at in made]


def test_folder_of_a_killed_push_is_made_durable_before_use(before: Path) -> None:
    log, operation = before.with_name("log"), OPERATIONS["first push"]
    for kill in kills_after_mkdir(before, log):
        with copied(before) as data:
            cut = PowerCut(data)
            for injected in ([kill], []):
                with performed(operation, data, log, *injected) as (_, raised):
                    assert raised == (None if injected else [])
                for call in calls(log):
                    cut.follow(call)
                cut.locks.clear()
                assert bool(cut.pending()) == bool(injected)


def test_folder_of_a_killed_push_does_not_conflict(before: Path) -> None:
    log = before.with_name("log")
    for kill in kills_after_mkdir(before, log):
        with copied(before) as data:
            with performed(OPERATIONS["first push"], data, log, kill) as (_, raised):
                assert raised is None
            run_in_child(lambda: assert_works(a.Repository(data, keep_versions=KEEP), "fresh", "deep"))


def test_new_data_directory_is_durable(tmp_path: Path) -> None:
    def work(report: Callable[[object], None]) -> None:
        report("ready")
        push(a.Repository(data), "app", "x", b"x")
        report("pushed")

    data, log = tmp_path / "new/data", tmp_path / "log"
    with Child(work) as child:
        assert child.receive() == "ready"
        with tracing(child.pid, log):
            child.proceed()
            assert child.receive() == "pushed"
    cut = PowerCut(data)
    for call in calls(log):
        cut.follow(call)
    assert cut.pending() == set()


# == Failing system calls =========================================================================


def errors_of(at: int, call: Call) -> list[int]:
    """Return the errors to inject into a call. For close see FailingClose: strace would skip the call."""
    if call.name in ("close", "fcntl", "dup"):
        return [errno.EMFILE] if "DUPFD" in call.arguments else []
    found = [errno.EIO]
    if call.name in ALLOCATING and call.changes():
        found.append((errno.ENOSPC, errno.EDQUOT)[at % 2])  # the program treats both alike
    return found + [errno.EMFILE] * call.name.startswith("open")


@pytest.mark.parametrize(
    "operation", ["first push", "replacing push", "delete", "restore", "promote", "directory delete"]
)
def test_error_at_every_system_call(before: Path, subtests: pytest.Subtests, operation: str) -> None:
    """Fail each call: the state is old, or new once it is current; no leftovers; later work succeeds."""

    def open_after_more_work(child: Child) -> Counter[str]:
        """Let the child do more work, which must succeed. Return the files that are then open."""
        child.proceed()
        opened = child.receive()
        assert opened is not None, fault
        return Counter(opened)

    log, old, fault = before.with_name("log"), tree(before), "without a fault"
    states = OPERATIONS[operation].states(old)
    with copied(before) as data, performed(OPERATIONS[operation], data, log) as (child, _):
        usual = open_after_more_work(child)
        found = enumerate(each_call(log))
        cases = [(inject, call, error) for at, (inject, call) in found for error in errors_of(at, call)]
    for inject, call, error in cases:
        name = errno.errorcode[error]
        fault = f"{name} at {call.name}({call.arguments.replace(str(data), '')})"
        with subtests.test(fault), copied(before) as data:
            with performed(OPERATIONS[operation], data, log, inject % f"error={name}") as (child, raised):
                # The contents of the trash are already deleted. The next sweep removes them.
                in_trash = ".trash>" in call.arguments and not call.name.startswith("rename")
                clearing = in_trash or ".trash/" in call.arguments
                assert raised == ([] if clearing else ["OSError", error]), fault
                if call.name in ("fsync", "fdatasync"):  # the file must be discarded, not fsynced again
                    later = iter(calls(log))
                    failed = next(one for one in later if one.name == call.name and not one.succeeded())
                    names = [one.name for one in later if failed.paths[0] in one.paths]
                    assert not any(name.startswith(("fsync", "fdatasync", "rename")) for name in names), fault
                assert tree(data, old) in states, fault
                removing = call.name.startswith(("unlink", "rmdir"))
                assert removing or not [name for name in leftovers(data) if ".trash" not in name], fault
                assert not open_after_more_work(child) - usual, fault
                child.proceed()
                assert child.receive() is None and child.end() == 0, fault


@pytest.mark.parametrize("operation", ["replacing push", "delete", "restore"])
def test_stale_handle_is_looked_up_again(before: Path, subtests: pytest.Subtests, operation: str) -> None:
    """Inject one ESTALE, as NFS and GlusterFS report if another host replaced the file after the lookup."""

    def can_be_stale(call: Call) -> bool:
        lookup = call.name == "openat" and not call.changes() and "O_DIRECTORY" not in call.arguments
        return (lookup or call.name == "fgetxattr") and any("lib/x" in path for path in call.paths)

    log, old = before.with_name("log"), tree(before)
    states = OPERATIONS[operation].states(old)
    with copied(before) as data, performed(OPERATIONS[operation], data, log):
        cases = [(inject, call) for inject, call in each_call(log) if can_be_stale(call)]
    assert {call.name for _, call in cases} == {"openat", "fgetxattr"}
    for inject, call in cases:
        with subtests.test(f"{call.name}({call.arguments})"), copied(before) as data:
            with performed(OPERATIONS[operation], data, log, inject % "error=ESTALE") as (_, raised):
                assert any("ESTALE" in call.result for call in calls(log))
                assert raised == [] and tree(data, old) == states[-1]


class FailingClose:
    """Replace os.close: the descriptor is closed and yet an error is raised, which strace cannot do.

    Linux does this if, for example, NFS has no room for buffered bytes, so only written files are affected.
    """

    def __init__(self, failing: int) -> None:
        self.failing, self.number, self.close = failing, 0, os.close

    def __call__(self, fd: int) -> None:
        written = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
        self.close(fd)
        self.number += written
        if written and self.number == self.failing:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))


@pytest.mark.parametrize("operation", ["first push", "replacing push", "delete", "restore"])
def test_error_at_every_close(before: Path, subtests: pytest.Subtests, operation: str) -> None:
    """Fail each close: an error may be reported for a new state, but never success for the old state."""

    def work(report: Callable[[object], None]) -> None:
        repository, close = a.Repository(data, keep_versions=KEEP), FailingClose(failing)
        raised = False
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "close", close)
            try:
                OPERATIONS[operation].run(repository, old)
            except OSError:
                raised = True
        assert leftovers(data) == []
        found = tree(data, old)
        assert found in states and (raised or found == states[-1])
        assert_state(data, found)
        assert_works(repository, *target(OPERATIONS[operation], old))
        with os.scandir("/proc/self/fd") as entries:
            opened = [os.readlink(entry.path) for entry in entries]
        report([close.number, [name for name in opened if name.startswith(str(data))]])

    old = tree(before)
    states = OPERATIONS[operation].states(old)
    data = before.with_name("data")
    failing, closes, usual = 0, 1, Counter[str]()
    while failing <= closes:
        with subtests.test(close=failing), copied(before), Child(work) as child:
            number, opened = child.receive()
            if not failing:
                closes, usual = number, Counter(opened)
            assert Counter(opened) == usual
        failing += 1
    assert closes > 0


def test_read_error_while_hashing_refuses_the_push(before: Path) -> None:
    """Fail reads of the staging file, also on the thread that hashes it."""
    operation = OPERATIONS["first push"]._replace(
        run=lambda repository, _: push(repository, "fresh", "deep/er/x", LARGE * 8)
    )
    old = tree(before)
    with copied(before) as data:
        fault = "pread64:error=EIO:when=1+"
        with performed(operation, data, before.with_name("log"), fault) as (child, raised):
            assert raised == ["OSError", errno.EIO]
            assert tree(data) == old and leftovers(data) == []
            child.proceed()
            assert child.receive() is not None


def test_decisions_are_made_under_the_lock(tmp_path: Path) -> None:
    """Assert in each check that it sees the current state and that the lock is held."""

    def check(current: a.Content | None) -> None:
        seen.append(None if current is None else current.artefact.version)
        with open(tmp_path / ".locks/app", "a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                seen.append("free")
            except BlockingIOError:
                seen.append("held")

    def work() -> None:
        def last() -> tuple[str | None, str | None]:
            return seen[-2], seen[-1]

        repository = a.Repository(tmp_path, keep_versions=KEEP)
        for content in (b"0", b"1"):
            with repository.stage() as upload:
                upload.write(content)
                current = repository.push(upload, "app", "x", check=check)[0].version
        first = seen[-2]
        assert first is not None and last() == (first, "held")
        restored = repository.restore("app", "x", first, check=check)[0].version
        assert last() == (current, "held")
        repository.delete("app", "x", check=check)
        assert last() == (restored, "held")
        repository.erase("app", "x", restored, check=check)
        assert last() == (restored, "held")
        current = push(repository, "app", "x", b"2").version
        repository.delete("app", "x", check=check, versions_too=True)
        assert last() == (current, "held")

    seen: list[str | None] = []
    run_in_child(work)


# == Faults behind the server =====================================================================


def assert_problem(answer: Answer, statuses: tuple[int, ...], path: Path) -> None:
    """Assert that the response is a complete problem (RFC 9457) that does not reveal the path."""
    assert answer.status in statuses, answer
    assert answer.fields["Content-Type"] == "application/problem+json"
    assert answer.json["status"] == answer.status
    assert answer.json["title"] and answer.json["detail"].endswith(".")
    assert str(path) not in answer.body.decode()


@pytest.mark.parametrize(
    ("fault", "status"),
    [
        ("fsync:error=ENOSPC", 507), ("/^rename:error=EDQUOT", 507), ("fsync:error=EIO", 500),
        ("/^rename:error=EIO", 500), ("utimensat:error=EIO", 500), ("openat:error=EMFILE", 503),
    ],
)
def test_fault_gets_a_clear_response(tmp_path: Path, fault: str, status: int) -> None:
    data, numbers = tmp_path / "data", itertools.count()
    with serving(data, "--keep-versions", "all", tracebacks=True) as server, server.client() as client:
        def put_all(*statuses: int) -> None:
            """Push a small, a large and a chunked body, push into a new folder, and restore a version."""
            for answer in (
                client.ask("PUT", "app/x", NEW), client.ask("PUT", "app/x", LARGE * 4),
                client.ask("PUT", "app/x", [NEW, LARGE]), client.ask("PUT", f"new/{next(numbers)}/x", NEW),
                client.ask("POST", f"app/x?restore={version}"),
            ):
                if status in statuses:
                    assert_problem(answer, statuses, tmp_path)
                else:
                    assert answer.status in statuses, answer

        version = client.ask("PUT", "app/x", b"old").fields["Artefact-Version"]
        put_all(200, 201)
        current = client.ask("PUT", "app/x", b"current").fields["ETag"]
        usual = server.open_files()
        before = client.ask("GET", "app/x?versions").json, client.ask("GET", "app").json
        with tracing(server.process.pid, tmp_path / "log", f"{fault}:when=1+"):
            put_all(status)
        assert client.ask("GET", "app/x").fields["ETag"] == current and leftovers(data) == []
        assert before == (client.ask("GET", "app/x?versions").json, client.ask("GET", "app").json)
        put_all(200, 201)
        assert client.ask("DELETE", "app/x").status == 204
        until(lambda: server.open_files() <= usual)


# == Full, read-only and vanished disks ===========================================================

ROOM = 4 * 1024 * 1024


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of ROOM bytes."""
    if os.geteuid():
        pytest.skip("only root can mount one")
    mounted = tmp_path / "disk"
    mounted.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "none", mounted], check=True)
    yield mounted
    subprocess.run(["umount", mounted], check=True)


def free_space(disk: Path) -> int:
    status = os.statvfs(disk)
    return status.f_bavail * status.f_frsize


def body(size: int) -> bytes:
    return (LARGE * (size // len(LARGE) + 1))[:size]


def in_pieces(content: bytes) -> Iterator[bytes]:
    for start in range(0, len(content), 100_000):
        yield content[start : start + 100_000]


def test_full_disk(disk: Path) -> None:
    """Push bodies of many sizes, up to and beyond the free space, with Content-Length and chunked."""
    page, statuses = 4096, set()
    with serving(disk / "data") as server, server.client() as client:
        assert client.ask("PUT", "app/old", b"old").status == 201
        room = free_space(disk)
        near = (room + pages * page + more for pages in (-2, -1, 0, 1, 2) for more in (-1, 0, 1))
        for size in (*range(0, ROOM + 400_000, 150_001), *near):
            content = body(size)
            for chunked in (False, True):
                answer = client.ask("PUT", "app/new", in_pieces(content) if chunked else content)
                if answer.status == 201:
                    assert size <= room and client.ask("GET", "app/new").body == content
                    assert client.ask("DELETE", "app/new").status == 204
                else:
                    assert_problem(answer, (507,), disk)
                    assert size > room - 4 * page and client.ask("GET", "app/new").status == 404
                until(lambda: free_space(disk) == room, 20)  # sooner than an idle connection is closed
                assert leftovers(disk / "data") == []
                statuses.add((chunked, answer.status))
        assert statuses == {(False, 201), (False, 507), (True, 201), (True, 507)}

        assert client.ask("PUT", "app/filling", body(room - 10 * page)).status == 201
        assert_problem(client.ask("PUT", "app/old", in_pieces(body(20 * page))), (507,), disk)
        assert client.ask("GET", "app/old").body == b"old"
        assert client.ask("DELETE", "app/filling").status == 204
        assert client.ask("PUT", "app/old", body(20 * page)).status == 200


def test_disk_that_fills_up_during_an_upload(disk: Path) -> None:
    """Check that bytes for which there was no room do not appear in a later upload."""
    content = body(ROOM // 2)
    head = f"PUT /artefacts/app/new HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n"
    with serving(disk / "data") as server, server.client() as client:
        for _ in range(3):
            with socket.create_connection(("127.0.0.1", server.port), PATIENCE) as connection:
                connection.sendall(head.encode() + content[: ROOM // 4])
                until(lambda: free_space(disk) <= ROOM - ROOM // 4)
                (disk / "filling").write_bytes(bytes(free_space(disk) - ROOM // 16))
                connection.sendall(content[ROOM // 4 :])
                assert connection.recv(1 << 16).startswith(b"HTTP/1.1 507 ")
            (disk / "filling").unlink()
            until(lambda: leftovers(disk / "data") == [])
            assert client.ask("PUT", "app/new", content[::-1]).status in (200, 201)
            assert client.ask("GET", "app/new").body == content[::-1]
            assert client.ask("DELETE", "app/new").status == 204


@pytest.mark.parametrize("expect", ["Expect: 100-continue\r\n", ""])
def test_announced_body_without_room_is_refused_before_it_is_sent(disk: Path, expect: str) -> None:
    with serving(disk / "data") as server:
        with socket.create_connection(("127.0.0.1", server.port), PATIENCE) as connection:
            request = "PUT /artefacts/app/x HTTP/1.1\r\nHost: localhost\r\n"
            connection.sendall(f"{request}Content-Length: {ROOM + 1}\r\n{expect}\r\n".encode())
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 507 ")
        assert not (disk / "data/.incoming").exists() or leftovers(disk / "data") == []


def statuses_of_all(client: Client, version: str) -> dict[str, int]:
    """Send one request of each kind and return the statuses. Each write would change something."""
    answers = {
        "PUT": client.ask("PUT", "app/x", time.time_ns().to_bytes(8, "big")),
        "PUT large": client.ask("PUT", "app/x", time.time_ns().to_bytes(8, "big") + LARGE),
        "PUT new": client.ask("PUT", f"app{time.time_ns()}/x", b""),
        "restore": client.ask("POST", f"app/x?restore={version}"),
        "GET": client.ask("GET", "app/old"),
        "versions": client.ask("GET", "app/old?versions"),
        "listing": client.ask("GET", "app"),
        "directories": client.ask("GET", ""),
        "DELETE": client.ask("DELETE", "app/x"),
        "DELETE directory": client.ask("DELETE", "spare"),
    }
    for answer in answers.values():
        assert answer.status < 300 or answer.json["detail"], answer
    return {request: answer.status for request, answer in answers.items()}


def assert_all_works(client: Client) -> str:
    """Assert that every kind of request succeeds. Return a version of app/x."""
    assert client.ask("PUT", "app/old", b"old").status in (200, 201)
    assert client.ask("PUT", "spare/x", b"").status in (200, 201)
    version = client.ask("PUT", "app/x", b"first").fields["Artefact-Version"]
    assert max(statuses_of_all(client, version).values()) < 300
    assert client.ask("PUT", "spare/x", b"").status in (200, 201)
    return client.ask("PUT", "app/x", b"last").fields["Artefact-Version"]


def test_disk_that_becomes_read_only(disk: Path) -> None:
    with serving(disk / "data", "--keep-versions", "9", tracebacks=True) as server, server.client() as client:
        version = assert_all_works(client)
        usual = server.open_files()
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        try:
            statuses = statuses_of_all(client, version)
            reading = {"GET", "versions", "listing", "directories"}
            assert {statuses[request] for request in reading} == {200}
            assert {status for request, status in statuses.items() if request not in reading} == {500}
            assert_problem(client.ask("PUT", "app/x", NEW), (500,), disk)
        finally:
            subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
        assert_all_works(client)
        until(lambda: server.open_files() <= usual)


@pytest.mark.parametrize("how", ["moved", "removed"])
def test_data_directory_that_vanishes(tmp_path: Path, how: str) -> None:
    """Move or remove the data directory: nothing may get 404 or be acknowledged until it is back."""
    data, away = tmp_path / "data", tmp_path / "away"
    with serving(data, "--keep-versions", "9", tracebacks=True) as server, server.client() as client:
        version = assert_all_works(client)
        content = client.ask("GET", "app/x").body
        data.rename(away)
        moved = tree(away)
        if how == "removed":
            shutil.rmtree(away)
        statuses = statuses_of_all(client, version)
        assert min(statuses.values()) >= 500, statuses
        assert_problem(client.ask("GET", "app/x"), (500, 503, 507), tmp_path)
        if how == "moved":
            assert tree(away) == moved
            away.rename(data)
            assert client.ask("GET", "app/x").body == content
        else:
            data.mkdir()
            assert client.ask("GET", "app/x").status == 404
        assert_all_works(client)


def test_data_directory_that_is_replaced(tmp_path: Path) -> None:
    """Check that an acknowledged push is in the directory that now has the path."""
    data = tmp_path / "data"
    with serving(data, tracebacks=True) as server, server.client() as client:
        assert client.ask("PUT", "app/x", b"old").status == 201
        data.rename(tmp_path / "old")
        data.mkdir()
        assert client.ask("PUT", "app/x", b"new").status == 201
        assert client.ask("GET", "").json["directories"]
    assert (data / "app/x").read_bytes() == b"new" and (tmp_path / "old/app/x").read_bytes() == b"old"
