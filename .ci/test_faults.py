"""Nothing acknowledged is lost: the process killed at every system call of every operation, every
system call failing, the order of the calls that a power cut would tell, full and vanishing disks.

strace interferes with a forked child that works on a `Repository`; there is nothing but the operation
between its start and its report, which it sends and receives by calls that are not traced."""

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
OWN = (".incoming", ".locks", ".trash")
LARGE = bytes(range(256)) * 1200  # more than is held in memory
NEW = b"new " * 1000

# == A child, and strace ==========================================================================

CHANGING = [
    "open", "openat", "mkdir", "mkdirat", "write", "pwrite64", "ftruncate", "fallocate", "copy_file_range",
    "fsync", "fdatasync", "rename", "renameat", "renameat2", "link", "linkat", "unlink", "unlinkat", "rmdir",
    "utimensat", "fsetxattr", "fchmod", "flock",
]
READING = [
    "close", "read", "pread64", "getdents64", "fgetxattr", "fstat", "newfstatat", "statx", "statfs", "fcntl",
    "dup",
]
# Where they stand for what was allocated late, these tell that there is no room.
ALLOCATING = set(CHANGING) - {"flock", "unlink", "unlinkat", "rmdir"}


class Child:
    """A forked process; it pauses where it reports. With the `with` it ends."""

    def __init__(self, work: Callable[[Callable[[object], None]], None]) -> None:
        """`work` receives what it reports by; it returns once the child may go on."""
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
            sys.unraisablehook = unraisable.append  # a ResourceWarning, above all

            def report(told: object) -> None:
                theirs.send(json.dumps(told).encode())
                if not theirs.recv(1):
                    os._exit(1)

            work(report)
            status = 2 if unraisable else 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    def hear(self) -> Any:
        """The next report; None where the child has died."""
        told = self._ours.recv(1 << 16)
        return json.loads(told) if told else None

    def proceed(self) -> None:
        self._ours.send(b".")

    def end(self) -> int:
        """Its exit status, negative where a signal killed it. Where it waits, it is told to end."""
        self._ours.close()
        pid, self.pid = self.pid, 0
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.pid:
            self.end()


def apart(work: Callable[[], object]) -> None:
    """Runs it in a process of its own, with which all that a repository holds is gone."""
    with Child(lambda report: report(bool(work()))) as child:
        assert child.hear() is not None, "it failed: see the traceback above"


@contextlib.contextmanager
def tracing(pid: int, log: Path, *injected: str) -> Iterator[None]:
    """strace on a running process and all its threads. Each system call of each thread has a counter
    of its own for `when=`, from here on."""
    names = ",".join("?" + name for name in CHANGING + READING + ["sendto"])
    faults = (word for inject in injected for word in ("-e", f"inject={inject}"))
    command = ["strace", "-f", "-y", "-s", "0", "-o", str(log), "-e", f"trace={names}", *faults]
    strace = subprocess.Popen([*command, "-p", str(pid)], stderr=subprocess.PIPE, text=True)
    try:
        assert strace.stderr is not None
        told = strace.stderr.readline()
        assert "attached" in told, told
        yield
    finally:
        strace.terminate()  # it detaches
        strace.communicate(timeout=PATIENCE)


class Call(NamedTuple):
    name: str
    paths: tuple[str, ...]
    arguments: str
    result: str

    def done(self) -> bool:
        return self.result[:1] not in ("-", "?")  # neither failed nor cut short

    def changes(self) -> bool:
        """Whether the disk, or who holds a lock, may be another after it."""
        return self.name in CHANGING and ("open" not in self.name or "O_CREAT" in self.arguments)


LINE = re.compile(r"\d+ +(\w+)\((.*)\) += (.*)")
PATH = re.compile(r'\d+<([^<>]*)>(?:\(deleted\))?(?:, "([^"]*)")?|"(/[^"]*)"')


def calls(log: Path) -> list[Call]:
    """The system calls in a log of strace, up to the first report."""
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
    """(strace's word for this one call, what is to happen left open; the call)"""
    counted: Counter[str] = Counter()
    for call in calls(log):
        counted[call.name] += 1
        yield f"{call.name}:%s:when={counted[call.name]}", call


# == What is on disk, and what may be ==============================================================


class Stored(NamedTuple):
    content: bytes
    time: int | None  # ns; None: of the operation in flight, later than all others
    type: str


Tree = dict[str, Stored]


def tree(data: Path, known: Mapping[str, Stored] | None = None) -> Tree:
    """Every file below the data directory, the repository's own folders aside. A time that is not
    `known` of the artefact is None, once it is seen to be later than those that are."""
    found: Tree = {}
    for file in data.rglob("*"):
        path = file.relative_to(data).as_posix()
        if not path.startswith(OWN) and file.is_file():
            time: int | None = file.stat().st_mtime_ns
            if known is not None:
                others = {name: stored for name, stored in known.items() if named(name) == named(path)}
                times = [stored.time for stored in others.values() if stored.time]
                if time not in times:
                    assert file.stat().st_mtime_ns > max(times, default=0), f"{path} became older"
                    time = None
            type = os.getxattr(file, "user.mime_type").decode()
            found[path] = Stored(file.read_bytes(), time, type)
    return found


def named(path: str) -> tuple[str, str]:
    """(directory, id) of an artefact's or a version's path."""
    directory, _, id = path.partition("/")
    if id.startswith(".versions/"):
        id = id.removeprefix(".versions/").rpartition("/")[0]
    return directory, id


def left(data: Path) -> list[str]:
    """What lies in .incoming and .trash."""
    return [f"{own}/{name}" for own in (".incoming", ".trash") for name in os.listdir(data / own)]


def version(stored: Stored) -> str:
    return a.Artefact("", "", 0, (stored.time or 0) // 1000, "", None).version


def without(tree: Tree, *paths: str) -> Tree:
    return {path: stored for path, stored in tree.items() if path not in paths}


def kept(tree: Tree, id: str = "lib/x") -> list[str]:
    """The paths of an artefact's versions in app, oldest first."""
    return sorted(path for path in tree if path.startswith(f"app/.versions/{id}/"))


def linked(tree: Tree, id: str = "lib/x") -> Tree:
    """After the current file got its version's name too."""
    current = tree[f"app/{id}"]
    return tree | {f"app/.versions/{id}/{version(current)}": current}


def replaced(tree: Tree, new: Stored) -> list[Tree]:
    """lib/x has KEEP versions already, so one more has to go."""
    full = linked(tree) | {"app/lib/x": new}
    return [tree, linked(tree), full, without(full, kept(tree)[0])]


def deleted(tree: Tree) -> list[Tree]:
    full = without(linked(tree), "app/lib/x")
    return [tree, linked(tree), full, without(full, kept(tree)[0])]


def erased(tree: Tree) -> list[Tree]:
    """With all its versions: first the artefact, then they, oldest first."""
    steps = [tree]
    for path in ["app/lib/x", *kept(tree)]:
        steps.append(without(steps[-1], path))
    return steps


def push(repository: a.Repository, directory: str, id: str, content: bytes,
         type: str = "text/x-new") -> a.Artefact:
    with repository.stage() as upload:
        for start in range(0, len(content), 50_000):  # as they come from a network
            upload.write(content[start : start + 50_000])
        return repository.push(upload, directory, id, type=type)[0]


def oldest(tree: Tree) -> str:
    return os.path.basename(kept(tree)[0])


class Operation(NamedTuple):
    """`states`: the trees through which it goes, from the old one to the new one. In between, a version
    may have its name already, or may not be pruned yet: never is anything missing."""

    run: Callable[[a.Repository, Tree], object]
    states: Callable[[Tree], list[Tree]]
    commits: str = "rename"  # how the system call begins from which on the new state is current
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
        lambda tree: replaced(tree, Stored(NEW, None, "text/x-new")),
    ),
    "first version": Operation(
        lambda repository, _: push(repository, "plain", "x", NEW),
        lambda tree: [
            tree,
            tree | {f"plain/.versions/x/{version(tree['plain/x'])}": tree["plain/x"]},
            tree | {
                f"plain/.versions/x/{version(tree['plain/x'])}": tree["plain/x"],
                "plain/x": Stored(NEW, None, "text/x-new"),
            },
        ],
    ),
    "replacing push of what is from the future": Operation(
        lambda repository, _: push(repository, "plain", "future", NEW),
        lambda tree: [tree, tree | {"plain/future": Stored(NEW, None, "text/x-new")}],
        keep=0,
    ),
    "delete": Operation(lambda repository, _: repository.delete("app", "lib/x"), deleted, "unlink"),
    "delete, keeping none": Operation(
        lambda repository, _: repository.delete("plain", "x"), lambda tree: [tree, without(tree, "plain/x")],
        "unlink", 0,
    ),
    "restore": Operation(
        lambda repository, old: repository.restore("app", "lib/x", oldest(old)),
        lambda tree: replaced(tree, tree[kept(tree)[0]]._replace(time=None)),
    ),
    "erase": Operation(
        lambda repository, old: repository.erase("app", "lib/x", oldest(old)),
        lambda tree: [tree, without(tree, kept(tree)[0])],
        "unlink",
    ),
    "erase all": Operation(lambda repository, _: repository.erase_all("app", "lib/x"), erased, "unlink"),
    "directory delete": Operation(
        lambda repository, _: repository.delete_directory("app"),
        lambda tree: [tree, {path: stored for path, stored in tree.items() if not path.startswith("app/")}],
    ),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """In memory where that takes attributes: hundreds of cases wait for fsync, and none needs a disk."""
    with contextlib.ExitStack() as stack:
        try:
            path = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
            os.setxattr(path, "user.test", b"")
        except OSError:
            path = tmp_path_factory.mktemp("place")
        yield path


@pytest.fixture(scope="module")
def before(place: Path) -> Path:
    """A data directory with something of everything. Each case has a copy."""
    data = place / "before"
    repository = a.Repository(data, keep_versions=KEEP)
    for number in range(KEEP + 1):
        push(repository, "app", "lib/x", b"x%d " % number * 100, f"text/x-{number}")
        push(repository, "app", "gone", b"gone %d" % number)
    repository.delete("app", "gone")
    for directory, id in (("app", "lib/y"), ("app", "z"), ("plain", "x"), ("plain", "future")):
        push(repository, directory, id, f"{directory}/{id}".encode(), "text/x-old")
    day = time.time_ns() // 1000 * 1000 + 24 * 3600 * 10**9
    os.utime(data / "plain/future", ns=(day, day))
    list(repository.artefacts("plain", digests=True))  # it has one for its new time then
    for number, operation in enumerate(OPERATIONS.values()):  # what they import late is there then
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


def tells(data: Path, expected: Tree) -> None:
    """That a repository opened anew has these artefacts and versions, with the digests of their bytes."""
    repository = a.Repository(data, keep_versions=KEEP)
    assert {found for _, found in repository.verify()} <= {"whole"}
    listed = {
        f"{directory}/{artefact.id}" for directory in repository.directories()
        for artefact in repository.artefacts(directory)
    }
    assert listed == {path for path in expected if "/.versions/" not in path}
    for directory, id in set(map(named, expected)):
        digests = {}
        for path, stored in expected.items():
            if path == f"{directory}/{id}":
                digests["current" if stored.time is None else version(stored)] = sha256(stored.content)
            elif path.startswith(f"{directory}/.versions/{id}/"):
                digests[path.rpartition("/")[2]] = sha256(stored.content)
        told = repository.versions(directory, id)
        new = f"{directory}/{id}" in expected and expected[f"{directory}/{id}"].time is None
        assert digests == {
            "current" if current and new else artefact.version: artefact.sha256 for artefact, current in told
        }


def works_on(repository: a.Repository, directory: str, id: str) -> None:
    """That it takes a push, a delete and a restore there, and deletes a directory."""
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
    """(directory, id) of what the operation changes."""
    old, *_, new = operation.states(tree)
    return min(named(path) for path in old | new if old.get(path) != new.get(path))


@contextlib.contextmanager
def performed(operation: Operation, data: Path, log: Path, *injected: str) -> Iterator[tuple[Child, Any]]:
    """A child that performs it under strace, and what it reports: None if it was killed, else what
    was raised. It then goes on to other work, and reports what it has open in the end."""

    def work(report: Callable[[object], None]) -> None:
        repository = a.Repository(data, keep_versions=operation.keep)
        report("ready")
        raised: list[object] = []
        try:
            operation.run(repository, seen)
        except OSError as error:
            raised = ["OSError", error.errno]
        except a.ArtefactsError as error:
            raised = [type(error).__name__, error.detail]
        report(raised)
        tells(data, tree(data, seen))
        repository.keeps = lambda _: KEEP
        works_on(repository, *target(operation, seen))
        with os.scandir("/proc/self/fd") as entries:
            opened = [os.readlink(entry.path) for entry in entries]
        report([name for name in opened if name.startswith(str(data))])

    seen = tree(data)
    with Child(work) as child:
        assert child.hear() == "ready"
        with tracing(child.pid, log, *injected):
            child.proceed()
            raised = child.hear()
        yield child, raised


def recovers(data: Path, expected: Tree, directory: str, id: str) -> None:
    """That a repository opened anew tells the expected state and works on."""

    def work() -> None:
        tells(data, expected)
        works_on(a.Repository(data, keep_versions=KEEP), directory, id)
        for name in left(data):
            os.utime(data / name, (1, 1))
        a.Repository(data)
        assert left(data) == [], "not swept"

    apart(work)


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_killed_at_every_call(before: Path, operation: Operation) -> None:
    """What was acknowledged is there; what was in flight is old or new, and whole. Killed at a call that
    changes nothing, it would leave what it leaves at the next one."""
    log, old = before.with_name("log"), tree(before)
    states = operation.states(old)
    with copied(before) as data, performed(operation, data, log) as (_, raised):
        assert raised == [] and tree(data, old) == states[-1] and left(data) == []
        cases = [(inject, call) for inject, call in each_call(log) if call.changes()]
    reached = 0
    for inject, call in cases:
        with copied(before) as data:
            with performed(operation, data, log, inject % "signal=KILL") as (child, raised):
                assert (raised, child.end()) == (None, -signal.SIGKILL), f"{call} was not hit"
            found = tree(data, old)
            assert found in states[reached:], f"killed at {call}"
            reached = states.index(found)
            assert len(left(data)) <= 1, f"killed at {call}"
            recovers(data, found, *target(operation, old))
    assert len(cases) > len(states) and reached >= len(states) - 2


# == What a power cut would leave =================================================================


class PowerCut:
    """Follows system calls and knows what of them no fsync has made durable yet: a kill does not lose
    it, a power cut may. What is done must never rest on what could still be lost."""

    def __init__(self, data: Path) -> None:
        self.data = f"{data}/"
        self.names: set[str] = set()  # made, replaced or removed, the folder not synced since
        self.contents: set[str] = set()  # of files, and times of folders
        self.locks: set[str] = set()

    def follow(self, call: Call) -> None:
        if not call.done() or not call.paths:
            return
        path = call.paths[-1]
        if call.name == "flock":
            self.locks.add(path)
        elif call.name == "close":
            self.locks.discard(path)
        elif call.name in ("fsync", "fdatasync"):
            self.contents.discard(path)
            self.names = {name for name in self.names if os.path.dirname(name) != path}
        elif call.name in ("write", "pwrite64", "ftruncate", "utimensat", "fsetxattr"):
            self.contents.add(path)
        elif call.name.startswith(("mkdir", "link")) or "O_CREAT" in call.arguments:
            self.enter(path)
        elif call.name.startswith("rename"):
            assert call.paths[0] not in self.contents, f"{path} was renamed before its bytes were durable"
            assert self.is_own(path) or not self.versions(), f"{path} went before its version was durable"
            self.enter(path)
            self.leave(call.paths[0])
        elif call.name.startswith("unlink") and "AT_REMOVEDIR" not in call.arguments:
            self.leave(path)

    def enter(self, name: str) -> None:
        """A name that is to last."""
        if self.is_own(name):
            return
        assert self.locks or not name.startswith(self.data), f"{name} was made without the lock"
        assert not any(name.startswith(f"{lost}/") for lost in self.names), f"{name} is in what may be lost"
        self.names.add(name)

    def leave(self, name: str) -> None:
        """A name that goes for good."""
        if self.is_own(name):
            return
        assert self.locks, f"{name} was removed without the lock"
        if "/.versions/" in name:
            assert self.pending() == self.versions(), f"{name} went before what took its place was durable"
        else:
            assert not self.versions(), f"{name} went before its version was durable"
        self.names.add(name)

    def is_own(self, name: str) -> bool:
        return name.removeprefix(self.data).startswith(OWN)

    def pending(self) -> set[str]:
        return {name for name in self.names | self.contents if not self.is_own(name)}

    def versions(self) -> set[str]:
        return {name for name in self.pending() if "/.versions/" in name}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_a_power_cut_loses_nothing(before: Path, operation: Operation) -> None:
    """Each step is durable before the next one rests on it, and all are before the answer."""
    log = before.with_name("log")
    with copied(before) as data, performed(operation, data, log) as (_, raised):
        assert raised == []
    cut = PowerCut(data)
    for call in calls(log):
        cut.follow(call)
    assert cut.pending() == set()
    assert any(call.name.startswith(operation.commits) for call in calls(log))


def kills_after_mkdir(before: Path, log: Path) -> list[str]:
    """For strace: of a first push, at the call after each folder is made."""
    with copied(before) as data, performed(OPERATIONS["first push"], data, log):
        found = list(each_call(log))
    made = [at for at, (_, call) in enumerate(found) if call.name.startswith("mkdir") and call.done()]
    assert len(made) >= 3
    return [found[at + 1][0] % "signal=KILL" for at in made]


def test_a_folder_of_a_killed_push_is_durable_before_it_is_filled(before: Path) -> None:
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


def test_a_folder_of_a_killed_push_is_not_in_the_way(before: Path) -> None:
    log = before.with_name("log")
    for kill in kills_after_mkdir(before, log):
        with copied(before) as data:
            with performed(OPERATIONS["first push"], data, log, kill) as (_, raised):
                assert raised is None
            apart(lambda: works_on(a.Repository(data, keep_versions=KEEP), "fresh", "deep"))


def test_a_new_data_directory_is_durable(tmp_path: Path) -> None:
    def work(report: Callable[[object], None]) -> None:
        report("ready")
        push(a.Repository(data), "app", "x", b"x")
        report("pushed")

    data, log = tmp_path / "new/data", tmp_path / "log"
    with Child(work) as child:
        assert child.hear() == "ready"
        with tracing(child.pid, log):
            child.proceed()
            assert child.hear() == "pushed"
    cut = PowerCut(data)
    for call in calls(log):
        cut.follow(call)
    assert cut.pending() == set()


# == System calls that fail =======================================================================


def errors_of(at: int, call: Call) -> list[int]:
    """What may go wrong with it. A close that strace lets fail would not even be tried; see below."""
    if call.name in ("close", "fcntl", "dup"):
        return [errno.EMFILE] if "DUPFD" in call.arguments else []
    found = [errno.EIO]
    if call.name in ALLOCATING and call.changes():
        found.append((errno.ENOSPC, errno.EDQUOT)[at % 2])  # which are told apart nowhere here
    return found + [errno.EMFILE] * call.name.startswith("open")


@pytest.mark.parametrize(
    "operation", ["first push", "replacing push", "delete", "restore", "directory delete"]
)
def test_a_fault_at_every_call(before: Path, subtests: pytest.Subtests, operation: str) -> None:
    """The old state stands, or, once it is current, the new; nothing is left; the next work is fine."""

    def go_on(child: Child) -> Counter[str]:
        """What it has open after more work, which goes well."""
        child.proceed()
        opened = child.hear()
        assert opened is not None, told
        return Counter(opened)

    log, old, told = before.with_name("log"), tree(before), "without a fault"
    states = OPERATIONS[operation].states(old)
    with copied(before) as data, performed(OPERATIONS[operation], data, log) as (child, _):
        usual = go_on(child)
        found = enumerate(each_call(log))
        cases = [(inject, call, error) for at, (inject, call) in found for error in errors_of(at, call)]
    for inject, call, error in cases:
        name = errno.errorcode[error]
        told = f"{name} at {call.name}({call.arguments.replace(str(data), '')})"
        with subtests.test(told), copied(before) as data:
            with performed(OPERATIONS[operation], data, log, inject % f"error={name}") as (child, raised):
                # What is in the trash is gone already; it is removed another time.
                clearing = not call.name.startswith("rename") and re.search(r"\.trash[/>]", call.arguments)
                assert raised == ([] if clearing else ["OSError", error]), told
                if call.name in ("fsync", "fdatasync"):  # what it was of is given up, not tried again
                    later = iter(calls(log))
                    failed = next(one for one in later if one.name == call.name and not one.done())
                    names = [one.name for one in later if failed.paths[0] in one.paths]
                    assert not any(name.startswith(("fsync", "fdatasync", "rename")) for name in names), told
                became = tree(data, old)
                assert became in states, told
                removing = call.name.startswith(("unlink", "rmdir"))
                assert removing or not [name for name in left(data) if ".trash" not in name], told
                assert not go_on(child) - usual, told
                child.proceed()
                assert child.hear() is None and child.end() == 0, told


@pytest.mark.parametrize("operation", ["replacing push", "delete", "restore"])
def test_a_stale_handle_is_looked_up_again(before: Path, subtests: pytest.Subtests, operation: str) -> None:
    """As NFS and GlusterFS have it, once, of a file that another host replaced since the lookup."""

    def stale(call: Call) -> bool:
        looked = call.name == "openat" and not call.changes() and "O_DIRECTORY" not in call.arguments
        return (looked or call.name == "fgetxattr") and any("lib/x" in path for path in call.paths)

    log, old = before.with_name("log"), tree(before)
    states = OPERATIONS[operation].states(old)
    with copied(before) as data, performed(OPERATIONS[operation], data, log):
        cases = [(inject, call) for inject, call in each_call(log) if stale(call)]
    assert {call.name for _, call in cases} == {"openat", "fgetxattr"}
    for inject, call in cases:
        with subtests.test(f"{call.name}({call.arguments})"), copied(before) as data:
            with performed(OPERATIONS[operation], data, log, inject % "error=ESTALE") as (_, raised):
                assert any("ESTALE" in call.result for call in calls(log))
                assert raised == [] and tree(data, old) == states[-1]


class FailingClose:
    """The close that strace cannot let fail as Linux does: the descriptor is gone, and yet there is an
    error, such as NFS's where it has no room for what it buffered. So it is of a file that is written."""

    def __init__(self, failing: int) -> None:
        self.failing, self.number, self.close = failing, 0, os.close

    def __call__(self, fd: int) -> None:
        written = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
        self.close(fd)
        self.number += written
        if written and self.number == self.failing:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))


@pytest.mark.parametrize("operation", ["first push", "replacing push", "delete", "restore"])
def test_a_fault_at_every_close(before: Path, subtests: pytest.Subtests, operation: str) -> None:
    """As above. An answer may be an error although the new state is there, but not the reverse."""

    def work(report: Callable[[object], None]) -> None:
        repository, close = a.Repository(data, keep_versions=KEEP), FailingClose(failing)
        raised = False
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "close", close)
            try:
                OPERATIONS[operation].run(repository, old)
            except OSError:
                raised = True
        assert left(data) == []
        found = tree(data, old)
        assert found in states and (raised or found == states[-1])
        tells(data, found)
        works_on(repository, *target(OPERATIONS[operation], old))
        with os.scandir("/proc/self/fd") as entries:
            opened = [os.readlink(entry.path) for entry in entries]
        report([close.number, [name for name in opened if name.startswith(str(data))]])

    old = tree(before)
    states = OPERATIONS[operation].states(old)
    data = before.with_name("data")
    failing, closes, usual = 0, 1, Counter[str]()
    while failing <= closes:
        with subtests.test(close=failing), copied(before), Child(work) as child:
            number, opened = child.hear()
            if not failing:
                closes, usual = number, Counter(opened)
            assert Counter(opened) == usual
        failing += 1
    assert closes > 0


def test_a_fault_while_hashing_refuses_the_push(before: Path) -> None:
    """Also on the thread that hashes what was staged."""
    operation = OPERATIONS["first push"]._replace(
        run=lambda repository, _: push(repository, "fresh", "deep/er/x", LARGE * 8)
    )
    old = tree(before)
    with copied(before) as data:
        fault = "pread64:error=EIO:when=1+"
        with performed(operation, data, before.with_name("log"), fault) as (child, raised):
            assert raised == ["OSError", errno.EIO]
            assert tree(data) == old and left(data) == []
            child.proceed()
            assert child.hear() is not None


def test_decisions_are_made_under_the_lock(tmp_path: Path) -> None:
    """On what is current then: nobody else holds the lock, nor can."""

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
        repository.erase_all("app", "x", check=check)
        assert last() == (current, "held")

    seen: list[str | None] = []
    apart(work)


# == The same through the server ==================================================================


def refused(answer: Answer, statuses: tuple[int, ...], path: Path) -> None:
    """That it is a problem of ours, told clearly, without telling where our disk has what."""
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
def test_a_fault_is_a_clear_answer(tmp_path: Path, fault: str, status: int) -> None:
    data, numbers = tmp_path / "data", itertools.count()
    with serving(data, "--keep-versions", "all", tracebacks=True) as server, server.client() as client:
        def put_all(*statuses: int) -> None:
            """A small, a large and a chunked one, a new one in a new folder, and a restored one."""
            for answer in (
                client.ask("PUT", "app/x", NEW), client.ask("PUT", "app/x", LARGE * 4),
                client.ask("PUT", "app/x", [NEW, LARGE]), client.ask("PUT", f"new/{next(numbers)}/x", NEW),
                client.ask("POST", f"app/x?restore={version}"),
            ):
                if status in statuses:
                    refused(answer, statuses, tmp_path)
                else:
                    assert answer.status in statuses, answer

        version = client.ask("PUT", "app/x", b"old").fields["Artefact-Version"]
        put_all(200, 201)
        current = client.ask("PUT", "app/x", b"current").fields["ETag"]
        usual = server.descriptors()
        before = client.ask("GET", "app/x?versions").json, client.ask("GET", "app").json
        with tracing(server.process.pid, tmp_path / "log", f"{fault}:when=1+"):
            put_all(status)
        assert client.ask("GET", "app/x").fields["ETag"] == current and left(data) == []
        assert before == (client.ask("GET", "app/x?versions").json, client.ask("GET", "app").json)
        put_all(200, 201)
        assert client.ask("DELETE", "app/x").status == 204
        until(lambda: server.descriptors() <= usual)


# == Disks that are full, read-only, gone =========================================================

ROOM = 4 * 1024 * 1024


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of ROOM bytes."""
    if os.geteuid():
        pytest.skip("only root can mount one")
    mounted = tmp_path / "disk"
    mounted.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "none", mounted], check=True)
    yield mounted
    subprocess.run(["umount", mounted], check=True)


def free(disk: Path) -> int:
    status = os.statvfs(disk)
    return status.f_bavail * status.f_frsize


def body(size: int) -> bytes:
    return (LARGE * (size // len(LARGE) + 1))[:size]


def in_pieces(content: bytes) -> Iterator[bytes]:
    for start in range(0, len(content), 100_000):
        yield content[start : start + 100_000]


def test_a_full_disk(disk: Path) -> None:
    """Uploads of every size up to and past what there is room for, announced and chunked."""
    page, statuses = 4096, set()
    with serving(disk / "data") as server, server.client() as client:
        assert client.ask("PUT", "app/old", b"old").status == 201
        room = free(disk)
        near = (room + pages * page + more for pages in (-2, -1, 0, 1, 2) for more in (-1, 0, 1))
        for size in (*range(0, ROOM + 400_000, 150_001), *near):
            content = body(size)
            for chunked in (False, True):
                answer = client.ask("PUT", "app/new", in_pieces(content) if chunked else content)
                if answer.status == 201:
                    assert size <= room and client.ask("GET", "app/new").body == content
                    assert client.ask("DELETE", "app/new").status == 204
                else:
                    refused(answer, (507,), disk)
                    assert size > room - 4 * page and client.ask("GET", "app/new").status == 404
                until(lambda: free(disk) == room, 20)  # sooner than an idle connection is closed
                assert left(disk / "data") == []
                statuses.add((chunked, answer.status))
        assert statuses == {(False, 201), (False, 507), (True, 201), (True, 507)}

        assert client.ask("PUT", "app/filling", body(room - 10 * page)).status == 201
        refused(client.ask("PUT", "app/old", in_pieces(body(20 * page))), (507,), disk)
        assert client.ask("GET", "app/old").body == b"old"
        assert client.ask("DELETE", "app/filling").status == 204
        assert client.ask("PUT", "app/old", body(20 * page)).status == 200


def test_a_disk_that_fills_up_while_uploads_arrive(disk: Path) -> None:
    """The rest of what there was no room for is found in no other upload."""
    content = body(ROOM // 2)
    head = f"PUT /artefacts/app/new HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n"
    with serving(disk / "data") as server, server.client() as client:
        for _ in range(3):
            with socket.create_connection(("127.0.0.1", server.port), PATIENCE) as connection:
                connection.sendall(head.encode() + content[: ROOM // 4])
                until(lambda: free(disk) <= ROOM - ROOM // 4)
                (disk / "filling").write_bytes(bytes(free(disk) - ROOM // 16))
                connection.sendall(content[ROOM // 4 :])
                assert connection.recv(1 << 16).startswith(b"HTTP/1.1 507 ")
            (disk / "filling").unlink()
            until(lambda: left(disk / "data") == [])
            assert client.ask("PUT", "app/new", content[::-1]).status in (200, 201)
            assert client.ask("GET", "app/new").body == content[::-1]
            assert client.ask("DELETE", "app/new").status == 204


@pytest.mark.parametrize("expect", ["Expect: 100-continue\r\n", ""])
def test_what_is_announced_and_has_no_room_is_refused_before_its_body(disk: Path, expect: str) -> None:
    with serving(disk / "data") as server:
        with socket.create_connection(("127.0.0.1", server.port), PATIENCE) as connection:
            request = "PUT /artefacts/app/x HTTP/1.1\r\nHost: localhost\r\n"
            connection.sendall(f"{request}Content-Length: {ROOM + 1}\r\n{expect}\r\n".encode())
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 507 ")
        assert not (disk / "data/.incoming").exists() or left(disk / "data") == []


def asked(client: Client, version: str) -> dict[str, int]:
    """The statuses of one request of each kind; each writing one would change something."""
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


def all_is_well(client: Client) -> str:
    """Once it is; the name of a version of app/x."""
    assert client.ask("PUT", "app/old", b"old").status in (200, 201)
    assert client.ask("PUT", "spare/x", b"").status in (200, 201)
    version = client.ask("PUT", "app/x", b"first").fields["Artefact-Version"]
    assert max(asked(client, version).values()) < 300
    assert client.ask("PUT", "spare/x", b"").status in (200, 201)
    return client.ask("PUT", "app/x", b"last").fields["Artefact-Version"]


def test_a_disk_that_becomes_read_only(disk: Path) -> None:
    with serving(disk / "data", "--keep-versions", "9", tracebacks=True) as server, server.client() as client:
        version = all_is_well(client)
        usual = server.descriptors()
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        try:
            statuses = asked(client, version)
            reading = {"GET", "versions", "listing", "directories"}
            assert {statuses[request] for request in reading} == {200}
            assert {status for request, status in statuses.items() if request not in reading} == {500}
            refused(client.ask("PUT", "app/x", NEW), (500,), disk)
        finally:
            subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
        all_is_well(client)
        until(lambda: server.descriptors() <= usual)


@pytest.mark.parametrize("how", ["moved", "removed"])
def test_a_data_directory_that_vanishes(tmp_path: Path, how: str) -> None:
    """Nothing is told to be missing, and nothing acknowledged, that is not under the path served."""
    data, away = tmp_path / "data", tmp_path / "away"
    with serving(data, "--keep-versions", "9", tracebacks=True) as server, server.client() as client:
        version = all_is_well(client)
        content = client.ask("GET", "app/x").body
        data.rename(away)
        moved = tree(away)
        if how == "removed":
            shutil.rmtree(away)
        statuses = asked(client, version)
        assert min(statuses.values()) >= 500, statuses
        refused(client.ask("GET", "app/x"), (500, 503, 507), tmp_path)
        if how == "moved":
            assert tree(away) == moved
            away.rename(data)
            assert client.ask("GET", "app/x").body == content
        else:
            data.mkdir()
            assert client.ask("GET", "app/x").status == 404
        all_is_well(client)


def test_a_data_directory_that_is_replaced(tmp_path: Path) -> None:
    """What is acknowledged is in the one that has the path now."""
    data = tmp_path / "data"
    with serving(data, tracebacks=True) as server, server.client() as client:
        assert client.ask("PUT", "app/x", b"old").status == 201
        data.rename(tmp_path / "old")
        data.mkdir()
        assert client.ask("PUT", "app/x", b"new").status == 201
        assert client.ask("GET", "").json["directories"]
    assert (data / "app/x").read_bytes() == b"new" and (tmp_path / "old/app/x").read_bytes() == b"old"
