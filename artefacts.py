#!/usr/bin/env python3
"""Artefacts: a repository for build outputs, over plain HTTP, in plain files.

    python artefacts.py                               serves data/ at http://127.0.0.1:8080/
    curl -T app.zip http://127.0.0.1:8080/artefacts/nightly/
    create_app("data")                                the same as a WSGI application

URLs (`/artefact/` is the same as `/artefacts/`, with or without a trailing slash):

    /artefacts/                   GET   the directories
    /artefacts/<directory>        GET   its artefacts    POST  a form    DELETE  all of it
    /artefacts/<directory>/<id>   GET   PUT   POST   DELETE   one artefact,
        ?versions ?version=V ?at=TIME ?restore=V              and its earlier versions

On disk (all state is here: there is no database and no index):

    data/<directory>/<id>                        an artefact: its current bytes
    data/<directory>/.versions/<id>/<version>    an earlier version
    data/.incoming/  .locks/  .trash/            staging files; one lock a directory; what is being deleted

The commit (`Repository.push`):

    1. Stream the body into .incoming/, hashing it. Check it, set its time and attributes, fsync.
    2. Take the directory's lock (flock, so that processes and hosts exclude each other).
    3. Check the preconditions against the current state.
    4. Make missing folders durable. Hard-link the current file under its version name, fsync.
    5. Rename the staging file over the name. Release the lock, fsync the folder, and answer.

The parts, each using only the parts above it:

    Values           constants, names, times, types, the artefact, and the errors of the storage.
    Files            open, make durable, list, lock and remove folders and files, by descriptor.
    Metadata         keeps type and digest in extended attributes, with a cache in memory.
    Uploads          stage a body in .incoming/ and hash it.
    Versions         name, keep and drop the earlier versions of one artefact.
    Reading          finds and opens artefacts and versions. It takes no lock.
    The repository   commits: every change, under a lock. It knows nothing of HTTP.
    HTTP semantics   decides on header text and validators, in pure functions.
    Resources        parse a request, call the repository, render the response.
    The page         renders listings for people.
    Errors           turn exceptions into responses, by one table.
    Access           decides who may do what, by tokens and rules.
    The application  puts these together: `create_app`.
    Connections      serve it over HTTP/1.1 on waitress's loop, threads and parser.
    The program      reads options, and runs until it is stopped: `main`.
"""

from __future__ import annotations

import argparse
import base64
import codecs
import contextlib
import datetime
import errno
import fcntl
import fnmatch
import functools
import gc
import hashlib
import hmac
import io
import ipaddress
import itertools
import json
import logging
import mimetypes
import os
import re
import resource
import secrets
import signal
import socket
import stat
import struct
import sys
import tarfile
import termios
import time
import tomllib
import types
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, ParamSpec, Self, TypeVar
from urllib.parse import quote, urlencode

import falcon
import waitress.parser
import waitress.server
import waitress.task
import waitress.wasyncore
from falcon.util import BufferedReader

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication, WSGIEnvironment
    from falcon.media.multipart import BodyPart

# == Values =======================================================================================

INCOMING, LOCKS, TRASH, VERSIONS = ".incoming", ".locks", ".trash", ".versions"
LOST_AND_FOUND = "lost+found"  # on every fresh ext4; only root can read it
ALL = sys.maxsize  # keep_versions: every version
PIECE = 256 * 1024  # bytes read or copied at once
COPY_PIECE = 16 * 1024 * 1024  # bytes that the kernel copies at once, while a thread hashes behind it
HASH_INLINE = 1024 * 1024  # bytes of an upload that are hashed by its writer; the rest by a thread behind it
HASH_PIECE = 1024 * 1024  # bytes that this thread reads at once
HASH_BEHIND = 4 * HASH_PIECE  # bytes staged and not hashed: from here on the hash limits the upload
MAX_ID = 1024  # bytes of an id; below any usual data directory its path stays within PATH_MAX
SMALL = 64 * 1024  # bytes: an artefact up to this size is read at once, and cached
KNOWN = 32_768  # artefacts whose metadata is cached, and names of listings: some 20 MB
MEMORY = 8 * 1024 * 1024  # bytes of small artefacts that are cached
OPEN_FOLDERS = 256  # folders that are kept open because their names are known to be durable
SCANS = 5  # times that a folder is read if it changes meanwhile
VERSION_SCANS = 20  # times that the names of versions are read if commits change them meanwhile
ESTALE_RETRIES = 20  # lookups of a name that another host keeps replacing
TICK = 20_000_000  # ns: file times are at least this precise (the kernel's clock ticks every 1 to 10 ms)

HAS_ATTRIBUTES = hasattr(os, "getxattr")  # not on macOS

SEGMENT = re.compile(r"(?!\.)[^\x00-\x1f\x7f-\x9f/\\\ufffd\ud800-\udfff]{1,255}")
VERSION = re.compile(r"[0-9]{8}T[0-9]{6}\.[0-9]{6}Z")
SHA256 = re.compile(r"[0-9a-f]{64}")
MEDIA_TYPE = re.compile(r"[\w!#$&^.+-]{1,127}/[\w!#$&^.+-]{1,127}(?:[ \t]*;[\x20-\x7e\t]{0,200})?", re.A)
log = logging.getLogger("artefacts")
EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
MICROSECOND = datetime.timedelta(microseconds=1)
DAY = 86_400_000_000  # µs
LAST_TIME = 253402300799_999999  # µs: the end of the year 9999, the last time that a date can express

# The interpreter's table, not the machine's: a type must not depend on where the program runs.
# Compressed files have the type of the compressed format, and never a Content-Encoding.
TYPES = mimetypes.MimeTypes().types_map[True] | {
    ".gz": "application/gzip", ".tgz": "application/gzip", ".bz2": "application/x-bzip2",
    ".xz": "application/x-xz", ".zst": "application/zstd", ".br": "application/x-brotli",
    ".whl": "application/zip", ".jar": "application/java-archive", ".log": "text/plain",
    ".deb": "application/vnd.debian.binary-package", ".toml": "application/toml",
    ".yaml": "application/yaml", ".yml": "application/yaml",
}  # fmt: skip
UNSPECIFIC_TYPES = ("application/octet-stream", falcon.MEDIA_URLENCODED, falcon.MEDIA_MULTIPART)

K = TypeVar("K")
P = ParamSpec("P")
T = TypeVar("T")


class ArtefactsError(Exception):
    """Base of all errors of the storage. `detail` tells the person what happened and what to do."""

    def __init__(self, detail: str, headers: Any = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.headers = headers


class InvalidName(ArtefactsError):
    """A name breaks a rule. The detail says which one."""


class Mismatch(ArtefactsError):
    """The bytes that arrived have another length or digest than announced."""


class NotFound(ArtefactsError):
    """The directory, artefact or version does not exist."""


class Conflict(ArtefactsError):
    """Something that exists prevents the change. `code`: "exists", "in_the_way" or "write_once"."""

    def __init__(self, detail: str, code: str = "in_the_way") -> None:
        super().__init__(detail)
        self.code = code


class PreconditionFailed(ArtefactsError):
    """The current state is not the one that the writer expected."""


class TooLarge(ArtefactsError):
    """The bytes exceed the limit."""


class OutOfSpace(ArtefactsError):
    """The file system has less space than is needed."""


class CannotStore(ArtefactsError):
    """The file system of a directory does not allow what a commit needs."""


class Unavailable(ArtefactsError):
    """The data directory does not exist."""


class Damaged(ArtefactsError):
    """The bytes on disk are not the bytes that were stored."""


@functools.lru_cache(4096)
def _second(seconds: int) -> tuple[str, str]:
    """Return a second since the epoch as versions write it, and as RFC 3339 writes it."""
    at = EPOCH + datetime.timedelta(seconds=seconds)
    return at.strftime("%Y%m%dT%H%M%S"), at.strftime("%Y-%m-%dT%H:%M:%S")


@dataclass(frozen=True, slots=True)
class Artefact:
    """What is known about one stored file."""

    directory: str
    id: str
    size: int  # bytes
    time: int  # µs since the epoch: when it was stored
    type: str  # the media type
    sha256: str | None  # hex; None: not known yet
    is_utf8: bool = False  # whether its type is a text type by its name, and its bytes are known to be UTF-8

    def is_named(self, directory: str, id: str) -> bool:
        return self.id == id and self.directory == directory

    @property
    def version(self) -> str:
        """Return the name of the version, `20261123T014455.123456Z`. Names sort by time."""
        return f"{_second(self.time // 1_000_000)[0]}.{self.time % 1_000_000:06d}Z"

    @property
    def modified(self) -> str:
        """Return the same time in the format of RFC 3339, in UTC."""
        return f"{_second(self.time // 1_000_000)[1]}.{self.time % 1_000_000:06d}Z"


def version_time(version: str) -> int:
    """Return the µs since the epoch that a version is named after. NotFound: it is not a version."""
    with contextlib.suppress(ValueError):
        if VERSION.fullmatch(version):
            return (datetime.datetime.fromisoformat(version) - EPOCH) // MICROSECOND
    raise NotFound(f"'{version}' is not a version. ?versions lists them.")


def is_version(name: str) -> bool:
    try:
        return version_time(name) >= 0
    except NotFound:
        return False


def current_time() -> int:
    """Return the wall-clock time in µs since the epoch."""
    return min(time.time_ns() // 1000, LAST_TIME - 1)


def check_segment(name: str, what: str) -> str:
    """Return the name if it is valid. InvalidName: it breaks a rule; `what` it names is in the detail."""
    if SEGMENT.fullmatch(name) and (len(name) < 64 or len(name.encode()) <= 255):
        return name
    rules = {
        r"": "is empty",
        r"\..*": "begins with '.'; those names are the repository's own",
        r".*[\ufffd\ud800-\udfff].*": "is not UTF-8",
        r".*[\x00-\x1f\x7f-\x9f].*": "has a control character",
        r".*[/\\].*": "has a slash or a backslash",
        r".*": "is longer than 255 bytes",
    }
    broken = next(message for rule, message in rules.items() if re.fullmatch(rule, name, re.S))
    raise InvalidName(f"A segment of the {what} {broken}. Choose another name.")


def check_directory(name: str) -> str:
    """Return the name of a directory if it is valid. InvalidName: it breaks a rule."""
    if name == LOST_AND_FOUND:
        raise InvalidName(f"'{name}' belongs to the file system. Choose another name.")
    return check_segment(name, "directory")


@functools.lru_cache(1024)
def check_names(directory: str, id: str) -> tuple[str, ...]:
    """Return the segments of the id. InvalidName: a name breaks a rule, or the id is too long."""
    check_directory(directory)
    if len(id) > MAX_ID // 4 and len(id.encode(errors="replace")) > MAX_ID:
        raise InvalidName(f"The id is longer than {MAX_ID} bytes. Choose a shorter one.")
    return tuple(check_segment(segment, "id") for segment in id.split("/"))


def specific_type(announced: str | None) -> str | None:
    """Return the media type that a client chose, None if it is missing, malformed or unspecific."""
    announced = (announced or "").strip()
    if not MEDIA_TYPE.fullmatch(announced):
        return None
    return None if announced.partition(";")[0].rstrip().lower() in UNSPECIFIC_TYPES else announced


@functools.lru_cache(1024)
def type_of(id: str, announced: str | None = None) -> str:
    """Return the media type to store: the client's if it is specific, else the type of the name."""
    by_name = TYPES.get(os.path.splitext(id)[1].lower(), "application/octet-stream")
    return specific_type(announced) or by_name


# == Files: folders and files below the data directory, by descriptor =============================

FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # a FIFO must not block the reader
STAGE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
STAGED = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # NFS locks only what can be written
LOCK = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
NOT_A_FILE = {errno.ENOTDIR, errno.ELOOP, errno.ENXIO}  # opening a link or a socket, or below a file
MISSING = (FileNotFoundError, NotADirectoryError)


def retry_on_estale(look_up: Callable[P, T]) -> Callable[P, T]:
    """Retry on ESTALE: on NFS and GlusterFS another host may replace a file between lookup and use."""

    @functools.wraps(look_up)
    def retry(*args: P.args, **kwargs: P.kwargs) -> T:
        for _ in range(ESTALE_RETRIES):
            try:
                return look_up(*args, **kwargs)
            except OSError as error:
                if error.errno != errno.ESTALE:
                    raise
        return look_up(*args, **kwargs)

    return retry


class Descriptor:
    """A file descriptor. Closed at the end of a `with` block, by `close()`, or with the last reference."""

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.release())

    def release(self) -> int:
        """Return the descriptor, which the caller closes. This object is then empty."""
        fd, self.fd = self.fd, -1
        return fd

    def __enter__(self) -> int:
        return self.fd

    def __exit__(self, *_: object) -> None:
        self.close()

    __del__ = close


class Bounded(dict[K, T]):
    """A cache with a limit on total cost. When the limit is exceeded, the whole cache is cleared."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = self.free = limit

    def keep(self, key: K, value: T, cost: int = 1) -> None:
        """Add an entry, unless it alone exceeds the limit."""
        if cost > self.free:
            self.clear()
            self.free = self.limit
        if cost <= self.free:
            self.free -= cost
            self[key] = value


class Files:
    """Folders and files below one root. Follows no symbolic link. Any method may raise OSError.

    A folder's path is a sequence of names below the root, a file is a name in an open folder."""

    def __init__(self, root: str, fsync: bool) -> None:
        """root: an absolute path without links; fsync: False gives up durability in a power cut."""
        self.root, self.fsync = root, fsync
        # Folders whose names are known to be durable. Each is kept open: no other folder gets the inode
        # number of an open one, even if another process removes it and makes a new one.
        self.durable_folders = Bounded[tuple[int, int], Descriptor](OPEN_FOLDERS)
        self._listed = Bounded[tuple[int, ...], list[str]](KNOWN)
        self._token, self._number = secrets.token_hex(8), itertools.count()

    def sync(self, fd: int) -> None:
        """Fsync, unless durability was given up. Never retried: after a failure the kernel has
        dropped the pages, and a second call would report a success that is none."""
        if self.fsync:
            os.fsync(fd)

    def unique_name(self) -> str:
        """Return a name that no other thread, process or host uses for a staging file."""
        return f"{self._token}-{os.getpid()}-{next(self._number)}"

    def make_root(self) -> None:
        """Make the root if it is missing, and the folders that it is in, durably."""
        missing, path = [], self.root
        while not os.path.lexists(path):
            missing.append(path)
            path = os.path.dirname(path)
        for path in reversed(missing):
            with contextlib.suppress(FileExistsError):
                os.mkdir(path)
            with Descriptor(os.open(os.path.dirname(path), FOLDER)) as parent:
                self.sync(parent)

    def open_folder(self, *names: str) -> Descriptor:
        """Return an open folder, by default the root. The caller closes it. Unavailable: there is no root."""
        try:
            folder = Descriptor(os.open("/".join((self.root, *names[:1])), FOLDER))
        except FileNotFoundError:
            try:
                os.lstat(self.root)
            except FileNotFoundError:
                raise Unavailable("The data directory does not exist. Tell who runs this server.") from None
            raise
        for name in names[1:]:
            with folder as parent:
                folder = Descriptor(os.open(name, FOLDER, dir_fd=parent))
        return folder

    def open_own(self, name: str) -> Descriptor:
        """Return one of the repository's own folders, made if it is missing. The caller closes it."""
        try:
            return self.open_folder(name)
        except FileNotFoundError:
            with contextlib.suppress(FileExistsError):
                os.mkdir(f"{self.root}/{name}")
            return self.open_folder(name)

    def make_folder(self, *names: str) -> Descriptor:
        """Return an open folder, made if it is missing. The caller closes it. Conflict: a file or a
        link is in the way. The names of all folders in the path are durable, parents first. An
        existing folder is synced once, too: its maker may have died before its own fsync."""
        with contextlib.suppress(*MISSING):
            with (folder := self.open_folder(*names)) as fd:
                if not self.fsync or inode(fd) in self.durable_folders:
                    return Descriptor(folder.release())
        folder = self.open_folder()
        for name in names:
            with folder as parent:
                folder = self._make_child(parent, name, "/".join(names[1:]))
        return folder

    def _make_child(self, parent: int, name: str, path: str) -> Descriptor:
        """Return the folder of this name, open, made if it is missing, with a durable name."""
        try:
            folder = Descriptor(os.open(name, FOLDER, dir_fd=parent))
        except FileNotFoundError:
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, dir_fd=parent)
            folder = Descriptor(os.open(name, FOLDER, dir_fd=parent))
        except NotADirectoryError:
            raise in_the_way(path) from None
        with folder as fd:
            if self.fsync and (key := inode(fd)) not in self.durable_folders:
                self.sync(parent)
                self.durable_folders.keep(key, Descriptor(os.dup(fd)))
            return Descriptor(folder.release())

    def lock(self, name: str, wait: bool = True) -> Descriptor:
        """Take a lock against threads, processes and hosts. The caller closes it, which releases it.
        BlockingIOError: it is taken, and `wait` is False."""
        with self.open_own(LOCKS) as locks:
            lock = Descriptor(os.open(name, LOCK, 0o666, dir_fd=locks))
        with lock as fd:
            fcntl.flock(fd, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            return Descriptor(lock.release())

    def names(self, folder: int) -> list[str]:
        """Return the valid names in an open folder, sorted, a folder's with a slash at its end.

        A folder that changes meanwhile is read again, and the names of all reads count: btrfs does not
        show a name that is replaced after the folder was opened. The result is cached while the folder's
        own times show no change, unless a change within one tick of the clock could be hidden."""
        found: set[str] = set()
        for scan in range(SCANS):
            now, status = time.time_ns(), os.fstat(folder)
            names = self._listed.get(key := identity(status))
            if names is not None:
                return names
            with os.scandir(folder) as entries:
                found.update(
                    entry.name + "/" if entry.is_dir(follow_symlinks=False) else entry.name
                    for entry in entries if SEGMENT.fullmatch(entry.name)
                )
            settled = now > status.st_ctime_ns + TICK
            if identity(os.fstat(folder)) == key and (settled or scan):
                break
        names = sorted(found)
        if not scan:
            self._listed.keep(key, names, len(names) + 1)
        return names

    def walk(self, folder: int, inside: str = "", prefix: str = "", after: str = "", longest: int = MAX_ID,
             unreadable: list[tuple[str, OSError]] | None = None) -> Iterator[tuple[str, int, str]]:
        """Yield (id, its open folder, its name there) for every file below an open folder, in the
        order of ids: those that begin with `prefix` and sort after `after`, `longest` bytes at most.
        `inside` is the id of the folder itself, with a slash at its end.

        Does not enter folders in which no id can match. Folders that cannot be read are added to
        `unreadable`; if that is None, their OSError is raised. A folder removed meanwhile is skipped."""
        for name in self.names(folder):
            id = inside + name
            if len(id) > MAX_ID // 4 and len(id.encode()) > longest:
                continue
            if name[-1] != "/":
                if id.startswith(prefix) and id > after:
                    yield id, folder, name
            elif id.startswith(prefix[: len(id)]) and (id > after or after.startswith(id)):
                try:
                    with Descriptor(os.open(name[:-1], FOLDER, dir_fd=folder)) as child:
                        yield from self.walk(child, id, prefix, after, longest, unreadable)
                except MISSING:
                    pass
                except OSError as error:
                    if unreadable is None:
                        raise
                    unreadable.append((id, error))

    def remove_tree(self, parent: int, name: str) -> None:
        """Remove a file, or a folder with everything below it, from an open folder.

        Folders are first moved up into the outermost one, so that any depth needs few descriptors and no
        recursion: shutil.rmtree fails at 1,000 levels before Python 3.13, and at read-only folders."""
        if not stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
            os.unlink(name, dir_fd=parent)
            return
        folders: list[str] = []
        with open_writable(parent, name) as top:

            def empty(folder: int) -> None:
                for child in os.listdir(folder):
                    if stat.S_ISDIR(os.stat(child, dir_fd=folder, follow_symlinks=False).st_mode):
                        open_writable(folder, child).close()  # a read-only folder cannot be moved
                        folders.append(self.unique_name())
                        os.rename(child, folders[-1], src_dir_fd=folder, dst_dir_fd=top)
                    else:
                        os.unlink(child, dir_fd=folder)

            empty(top)
            while folders:
                name_in_top = folders.pop()
                with open_writable(top, name_in_top) as folder:
                    empty(folder)
                os.rmdir(name_in_top, dir_fd=top)
        os.rmdir(name, dir_fd=parent)
        self.close_removed()

    def close_removed(self) -> None:
        """Close the durable folders that were removed: an open one prevents a remount as read-only."""
        for key, folder in tuple(self.durable_folders.items()):
            try:
                if os.fstat(folder.fd).st_nlink:
                    continue
            except OSError as error:
                if error.errno != errno.ESTALE:  # another host removed it
                    raise
            self.durable_folders.pop(key, None)

    def remove_empty(self, parent: int, name: str) -> None:
        """Remove a folder below which there are only empty folders, as a crash may leave them."""
        with Descriptor(os.open(name, FOLDER, dir_fd=parent)) as folder:
            for child in os.listdir(folder):
                self.remove_empty(folder, child)
        os.rmdir(name, dir_fd=parent)

    def remove_while_empty(self, *names: str) -> None:
        """Remove a folder if it is empty, then those above it, but not the first of the path."""
        with contextlib.ExitStack() as stack:
            parents = [stack.enter_context(self.open_folder(names[0]))]
            for name in names[1:-1]:
                parents.append(stack.enter_context(Descriptor(os.open(name, FOLDER, dir_fd=parents[-1]))))
            for name in reversed(names[1:]):
                try:
                    os.rmdir(name, dir_fd=parents.pop())
                except OSError as error:
                    # ENOENT: it was removed by hand, or is missing on one of GlusterFS's replicas only.
                    # EBUSY: something is mounted there.
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT, errno.EBUSY):
                        raise
                    break
        self.close_removed()


def open_writable(parent: int, name: str) -> Descriptor:
    """Return an open folder whose permissions allow to remove what is in it, if it is ours."""
    with (folder := Descriptor(os.open(name, FOLDER, dir_fd=parent))) as fd:
        with contextlib.suppress(PermissionError):
            os.fchmod(fd, 0o700)
        return Descriptor(folder.release())


@contextlib.contextmanager
def explain_refusal(directory: str) -> Iterator[None]:
    """Turn the errors by which the file system of a directory refuses a name or a rename into CannotStore."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.EXDEV, errno.EBUSY):
            raise CannotStore(
                f"The directory '{directory}' is on another file system than the data directory (a mount, an "
                "overlay, a project quota): nothing can be moved to or from it. Tell who runs this server."
            ) from error
        if error.errno in (errno.EINVAL, errno.EILSEQ, errno.ENAMETOOLONG):
            raise CannotStore(
                f"The file system of the directory '{directory}' does not accept this name. Choose another."
            ) from error
        raise


def in_the_way(path: str) -> Conflict:
    return Conflict(f"Something that is no artefact (a folder, a file, a link) is in the way of '{path}'.")


def inode(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def identity(status: os.stat_result) -> tuple[int, ...]:
    """Return a value that changes whenever a file's bytes or attributes do."""
    return (status.st_ino, status.st_dev, status.st_ctime_ns, status.st_mtime_ns, status.st_size)


def write_all(fd: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


# == Metadata: type and digest in extended attributes =============================================

TYPE_ATTRIBUTE = "user.mime_type"  # freedesktop.org's name
DIGEST_ATTRIBUTE = "user.artefacts.sha256"  # "<hex> <size> <mtime in ns>", and " utf-8" for `is_utf8`
PUSHED_ATTRIBUTE = "user.artefacts.pushed"  # µs since the epoch: the last push of bytes that were current
# Errors of a file system that has no attributes, or none for us. The cache in memory replaces them.
NO_ATTRIBUTES = {errno.ENOTSUP, errno.EPERM, errno.EACCES, errno.EROFS, errno.ENOSYS, errno.E2BIG}


def read_attribute(fd: int, name: str) -> str:
    """Return an extended attribute of an open file, "" if it or the support for it is missing."""
    try:
        return os.getxattr(fd, name).decode("latin-1") if HAS_ATTRIBUTES else ""
    except OSError as error:
        if error.errno not in NO_ATTRIBUTES | {errno.ENODATA}:
            raise
        return ""


def inherit_access(fd: int, folder: int) -> bool:
    """Give a staging file the group of a setgid folder and the folder's default ACL (acl(5)), as if it
    had been made there. Return whether anything changed, which the caller then makes durable."""
    status, changed = os.fstat(folder), False
    acl = read_attribute(folder, "system.posix_acl_default").encode("latin-1")
    if status.st_mode & stat.S_ISGID and os.fstat(fd).st_gid != status.st_gid:
        with contextlib.suppress(PermissionError):  # the group is not ours
            os.fchown(fd, -1, status.st_gid)
            changed = True
    if acl:  # 4 bytes of version, then (tag, permissions, id) each; a file is not executable
        entries = struct.iter_unpack("<HHI", acl[4:])
        of_file = [struct.pack("<HHI", tag, permissions & 6, id) for tag, permissions, id in entries]
        os.setxattr(fd, "system.posix_acl_access", acl[:4] + b"".join(of_file))
        changed = True
    return changed


def write_digest(fd: int, artefact: Artefact, status: os.stat_result) -> None:
    if HAS_ATTRIBUTES:
        value = f"{artefact.sha256} {stamp_of(status)}{' utf-8' if artefact.is_utf8 else ''}"
        os.setxattr(fd, DIGEST_ATTRIBUTE, value.encode())


def write_attributes(fd: int, artefact: Artefact) -> None:
    """Store type and digest with an open file, if its file system has attributes."""
    try:
        if HAS_ATTRIBUTES:
            os.setxattr(fd, TYPE_ATTRIBUTE, artefact.type.encode())
        write_digest(fd, artefact, os.fstat(fd))
    except OSError as error:
        if error.errno not in NO_ATTRIBUTES:
            raise


def stamp_of(status: os.stat_result) -> str:
    """Return the part of the digest attribute that says for which content it was computed."""
    return f"{status.st_size} {status.st_mtime_ns}"


def time_of(status: os.stat_result) -> int:
    """Return a file's modification time in µs since the epoch, cut to what a date can express."""
    return min(max(status.st_mtime_ns // 1000, 0), LAST_TIME)


def is_utf8(fd: int, artefact: Artefact) -> bool:
    """Return whether a file has a text type by its name, and its bytes are UTF-8. Reads a text file."""
    if not artefact.type.startswith("text/") or artefact.type != type_of(artefact.id):
        return False
    decoder, start = codecs.getincrementaldecoder("utf-8")(), 0
    with contextlib.suppress(UnicodeDecodeError):
        while piece := os.pread(fd, PIECE, start):
            decoder.decode(piece)
            start += len(piece)
        decoder.decode(b"", final=True)
        return True
    return False


def sha256_of(fd: int) -> str:
    """Return the SHA-256 of an open file, in hex. Reads the whole file."""
    digest, start = hashlib.sha256(), 0
    while piece := os.pread(fd, PIECE, start):
        digest.update(piece)
        start += len(piece)
    return digest.hexdigest()


class Metadata:
    """Caches what is known about files, by their `identity`: a changed file is read again.

    Without the cache of attributes, listings take three times as long; without the bytes of small
    artefacts, fetches take 1.12 times as long."""

    def __init__(self) -> None:
        self.known = Bounded[tuple[int, ...], Artefact](KNOWN)
        self.small = Bounded[tuple[int, ...], Content](MEMORY)

    def cached(self, directory: str, id: str, status: os.stat_result) -> Artefact | None:
        """Return the artefact if it is in the cache under this name: a file can have two names."""
        known = self.known.get(identity(status))
        return known if known is not None and known.is_named(directory, id) else None

    def read(self, directory: str, id: str, fd: int, status: os.stat_result) -> Artefact:
        """Return the artefact with the type and digest of the open file's attributes. The digest is
        None if it is missing, or if the stored one belongs to another size or modification time."""
        known = self.cached(directory, id, status)
        if known is None:
            digest, _, stamp = read_attribute(fd, DIGEST_ATTRIBUTE).partition(" ")
            utf8 = stamp.endswith(" utf-8")
            valid = stamp.removesuffix(" utf-8") == stamp_of(status) and SHA256.fullmatch(digest) is not None
            type = type_of(id, read_attribute(fd, TYPE_ATTRIBUTE))
            utf8 = utf8 and valid and type == type_of(id)  # a second name of the file has its own type
            sha256 = digest if valid else None
            known = Artefact(directory, id, status.st_size, time_of(status), type, sha256, utf8)
            self.known.keep(identity(status), known)
        return known

    def store_digest(self, fd: int, artefact: Artefact, status: os.stat_result) -> None:
        """Store a digest that was computed from an open file, in its attributes if they can be written,
        and in the cache. `status` is from before the computation: nothing is stored for a file that was
        changed since. A failure must not fail a fetch; it only costs computing the digest again."""
        if identity(os.fstat(fd)) == identity(status):
            with contextlib.suppress(OSError):
                write_digest(fd, artefact, status)
            after = os.fstat(fd)
            if stamp_of(after) == stamp_of(status):
                self.known.keep(identity(after), replace(artefact, time=time_of(after)))


class Content:
    """One open file, which stays the same whatever happens to its name. The receiver closes it."""

    def __init__(self, metadata: Metadata, artefact: Artefact, file: Descriptor, status: os.stat_result,
                 whole: bytes | None = None) -> None:
        self.artefact = artefact  # as known without reading the file: the digest may be None
        self.file, self.status = file, status
        self._metadata, self._whole = metadata, whole

    def digested(self) -> Artefact:
        """Return the artefact with its digest. Reads the whole file and stores the digest if it is
        not known yet."""
        if self.artefact.sha256 is None:
            # A change within one tick of the file system's clock would have the same time.
            time.sleep(min(max(0, self.status.st_mtime_ns + TICK - time.time_ns()), TICK) / 1e9)
            utf8, sha256 = is_utf8(self.file.fd, self.artefact), sha256_of(self.file.fd)
            self.artefact = replace(self.artefact, sha256=sha256, is_utf8=utf8)
            self._metadata.store_digest(self.file.fd, self.artefact, self.status)
        return self.artefact

    def verified(self) -> tuple[Artefact, str]:
        """Read the whole file. Return the artefact with the digest of its bytes and what they are:
        "whole", "damaged" (other bytes than stored), "changed" (edited in place) or "new" (never hashed).
        The digest of a changed or new file is stored."""
        stored = self.artefact.sha256
        if stored is None:
            has_stale_digest = bool(read_attribute(self.file.fd, DIGEST_ATTRIBUTE))
            return self.digested(), "changed" if has_stale_digest else "new"
        artefact = replace(self.artefact, sha256=sha256_of(self.file.fd))
        return artefact, "whole" if artefact.sha256 == stored else "damaged"

    def last_push(self) -> int:
        """Return when these bytes were last pushed, in µs since the epoch."""
        renewed = read_attribute(self.file.fd, PUSHED_ATTRIBUTE)
        return max(self.artefact.time, int(renewed) if re.fullmatch("[0-9]{1,18}", renewed) else 0)

    def renew(self) -> bool:
        """Store that these bytes were pushed now. Return whether the file has attributes. The caller
        makes it durable."""
        try:
            if HAS_ATTRIBUTES:
                os.setxattr(self.file.fd, PUSHED_ATTRIBUTE, str(current_time()).encode())
            return HAS_ATTRIBUTES
        except OSError as error:
            if error.errno not in NO_ATTRIBUTES:
                raise
            return False

    def read(self, start: int, length: int) -> bytes:
        """Return at most `length` bytes, from byte `start` on."""
        return os.pread(self.file.fd, length, start)

    def pieces(self) -> Iterator[bytes]:
        """Yield all bytes, PIECE at a time. Damaged: the file was cut short."""
        for start in range(0, size := self.artefact.size, PIECE):
            piece = self.read(start, length := min(PIECE, size - start))
            if len(piece) != length:
                raise Damaged(f"'{self.artefact.id}' became shorter while it was read. Fetch it again.")
            yield piece

    def whole(self) -> bytes:
        """Return all bytes of a SMALL artefact, and cache them unless a change within one tick of the
        clock could be hidden. Damaged: the file was cut short."""
        if self._whole is None:
            self._whole = b"".join(self.pieces())
            if self.artefact.sha256 is not None and time.time_ns() >= self.status.st_ctime_ns + TICK:
                cached = Content(self._metadata, self.artefact, Descriptor(-1), self.status, self._whole)
                cost = len(self._whole) + 2048  # with the objects around them
                self._metadata.small.keep(identity(self.status), cached, cost)
        return self._whole

    def detach(self) -> io.FileIO:
        """Return the file as an object of its own, which the caller closes. This one is then closed."""
        return io.FileIO(self.file.release())

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# == Uploads: bytes on their way in ===============================================================


class HashThreads:
    """Threads that compute digests, a pool for each process: a fork has none of its parent's threads."""

    def __init__(self) -> None:
        self._pool: tuple[int, ThreadPoolExecutor] | None = None  # and the process that it belongs to

    def submit(self, job: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        if self._pool is None or self._pool[0] != os.getpid():
            self._pool = os.getpid(), ThreadPoolExecutor(os.cpu_count(), "sha256")
        return self._pool[1].submit(job, *args, **kwargs)


class Upload:
    """A body on its way in: a staging file in `.incoming/`, and its digest.

    The file has a name, because btrfs before Linux 6.15.3 does not fsync files without one. It is made by
    the first write. An upload is pushed once; any use after that raises ValueError. The caller of
    `Repository.stage` closes it; closing removes a file that was not pushed."""

    def __init__(self, files: Files, hash_threads: HashThreads, limit: int | None = None) -> None:
        self.size = 0  # bytes
        self.limit = limit  # bytes
        self.fault: Exception | None = None  # set if a write failed where it could not raise; see `verify`
        self.sealed = False  # whether the file is complete and durable
        self._files, self._hash_threads = files, hash_threads
        self._file, self._name, self._incoming = Descriptor(-1), "", Descriptor(-1)
        self._sha256, self._hashed, self._read = hashlib.sha256(), 0, 0  # bytes hashed; bytes read
        self._hashing: Future[None] | None = None
        self._closed = False

    def write(self, data: bytes | memoryview) -> None:
        """Append to the file. TooLarge: the limit is exceeded."""
        if self.limit is not None and self.size + len(data) > self.limit:
            raise TooLarge(f"At most {self.limit} bytes are accepted here. Send less.")
        write_all(self._staged(), data)
        self.size += len(data)
        if self.size <= HASH_INLINE:
            self._sha256.update(data)
            self._hashed = self.size
        else:
            self._hash_behind()

    def copy(self, content: Content) -> None:
        """Append a stored file: the kernel copies or shares the bytes where it can (copy_file_range).
        Damaged: the file was cut short. TooLarge: the limit is exceeded."""
        size = content.artefact.size
        if self.limit is not None and size > self.limit:
            raise TooLarge(f"At most {self.limit} bytes are accepted here. The artefact has {size}.")
        file = self._staged()
        try:
            while self.size < size:
                copied = os.copy_file_range(content.file.fd, file, COPY_PIECE, self.size)
                if not copied:
                    raise Damaged(f"'{content.artefact.id}' became shorter while it was copied.")
                self.size += copied
                self._hash_behind()
        except (OSError, AttributeError) as error:  # not on macOS
            if self.size or getattr(error, "errno", 0) in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                raise
            for piece in content.pieces():
                self.write(piece)

    def _hash_behind(self) -> None:
        if self.size - self._hashed >= HASH_PIECE and (self._hashing is None or self._hashing.done()):
            self._hashing = self._hash_threads.submit(self._hash, self.size)

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes of what was written, from its start: at most `size`, or all if negative."""
        if not self.size or not size:
            return b""
        piece = os.pread(self._file.fd, self.size if size < 0 else size, self._read)
        self._read += len(piece)
        return piece

    def equals(self, content: Content) -> bool:
        """Return whether a stored file has exactly these bytes. The bytes are compared, not the digests:
        a digest only tells what was stored, and a push of the same bytes repairs a damaged artefact."""
        return self.size == content.artefact.size and all(
            os.pread(self._file.fd, PIECE, start) == content.read(start, PIECE)
            for start in range(0, self.size, PIECE)
        )

    def verify(self, length: int | None, sha256: str | None) -> None:
        """Raise Mismatch if the written bytes have another length or digest than the ones given."""
        if self.fault is not None:
            raise self.fault
        if length is not None and length != self.size:
            raise Mismatch(f"{length} bytes were announced, {self.size} arrived. Send it again.")
        if sha256 is not None and sha256 != self.digest():
            raise Mismatch(f"The bytes that arrived have another SHA-256: {self.digest()}. Send it again.")

    def digest(self) -> str:
        """Return the SHA-256, in hex, of all bytes written so far."""
        self._end_hashing()
        self._hash(self.size)
        return self._sha256.hexdigest()

    def seal(self, artefact: Artefact) -> None:
        """Set the file's time and attributes, and fsync it."""
        file = self._staged()
        os.utime(file, ns=(artefact.time * 1000, artefact.time * 1000))
        write_attributes(file, artefact)
        self.sync()
        self.sealed = True

    def sync(self) -> None:
        """Fsync the file. If that fails the upload is closed: a second fsync would report a success that
        is none."""
        try:
            self._files.sync(self._staged())
        except OSError:
            self.close()
            raise

    def link(self, folder: int, name: str) -> None:
        """Give the file another name, in an open folder. FileExistsError: the name is taken."""
        os.link(self._name, name, src_dir_fd=self._incoming.fd, dst_dir_fd=folder, follow_symlinks=False)

    def move(self, folder: int, name: str) -> None:
        """Rename the file to `name` in an open folder: the moment of the commit."""
        os.rename(self._name, name, src_dir_fd=self._incoming.fd, dst_dir_fd=folder)
        self._name = ""

    @property
    def moved(self) -> bool:
        """Return whether the file was moved to its name."""
        return self._file.fd >= 0 and not self._name

    @property
    def hashing(self) -> Future[None] | None:
        """Return the running hash job if the hash is HASH_BEHIND bytes behind the writer."""
        return self._hashing if self.size - self._hashed >= HASH_BEHIND else None

    def status(self) -> os.stat_result:
        """Return the status of the file, which may have been moved."""
        return os.fstat(self._file.fd)

    @property
    def fd(self) -> int:
        """Return the descriptor of the staging file, made if it is missing. The upload closes it."""
        return self._staged()

    def close(self) -> None:
        """Free everything. A file that was not moved is removed."""
        self._closed = True
        self._end_hashing()
        name, self._name = self._name, ""
        with self._incoming as incoming, self._file:
            if name:
                with contextlib.suppress(FileNotFoundError):  # removed by a sweep
                    os.unlink(name, dir_fd=incoming)

    def _staged(self) -> int:
        """Return the descriptor of the staging file, made if it is missing."""
        if self._closed or self.moved:
            raise ValueError("this upload is pushed or closed; stage another one")
        while self._file.fd < 0:
            self._incoming, self._name = self._files.open_own(INCOMING), self._files.unique_name()
            self._file = Descriptor(os.open(self._name, STAGE, 0o666, dir_fd=self._incoming.fd))
            with contextlib.suppress(BlockingIOError):  # a sweep removes what it can lock
                fcntl.flock(self._file.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(self._file.fd).st_nlink:
                    break
            self._file.close()  # a sweep came between the file and its lock: it removes this one
        return self._file.fd

    def _end_hashing(self) -> None:
        """Return when no thread hashes this upload. A job that has not started is cancelled: it would
        wait for the hashes of others. An error in the job occurs again where the hash is completed."""
        if self._hashing is not None and not self._hashing.cancel():
            self._hashing.exception()

    def _hash(self, end: int) -> None:
        # From the page cache and not from a queue: however far the hash falls behind a fast
        # client, it uses no memory and the receiving thread does not wait for it.
        while self._hashed < end and not self._closed:
            piece = os.pread(self._file.fd, min(HASH_PIECE, end - self._hashed), self._hashed)
            if not piece:
                raise Damaged("The staging file became shorter. Push the artefact again.")
            self._sha256.update(piece)
            self._hashed += len(piece)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# == Versions: the earlier versions of one artefact ===============================================


class Versions:
    """The earlier versions of one artefact: files named after their times, in `.versions/<id>/`.

    The folder's own modification time is that of the newest version. Everything that changes them is
    called under the directory's lock."""

    def __init__(self, files: Files, stage: Callable[[], Upload], directory: str,
                 segments: Sequence[str]) -> None:
        self._files, self._stage = files, stage
        self._folder, self._name = (directory, *segments[:-1]), segments[-1]
        self._path = (directory, VERSIONS, *segments)

    @retry_on_estale
    def names(self) -> list[str]:
        """Return the names of the versions, oldest first."""
        with self._open() or contextlib.nullcontext() as folder:
            if folder is None:
                return []
            with os.scandir(folder) as entries:
                return sorted(
                    entry.name for entry in entries
                    if is_version(entry.name) and entry.is_file(follow_symlinks=False)
                )

    @retry_on_estale
    def newest_time(self) -> int:
        """Return the time (µs) of the newest version, -1 if there is none. Does not read the names,
        which may be thousands."""
        with self._open() or contextlib.nullcontext() as folder:
            return -1 if folder is None else time_of(os.fstat(folder))

    def keep(self, current: Content, newest: int) -> str:
        """Hard-link the current file under its version name and fsync. If other bytes have the name,
        use the next microsecond. Return the version. `newest` (µs): the newest time after the commit."""
        version = current.artefact
        make_folder = self._files.make_folder
        with make_folder(*self._folder) as folder, make_folder(*self._path) as versions:
            while not self._link(current, version, folder, versions):
                if version.time == LAST_TIME:
                    raise Conflict(f"No version is later than '{version.id}'. Touch the file.")
                version = replace(version, time=version.time + 1)
            newest = max(newest, version.time)
            os.utime(versions, ns=(newest * 1000, newest * 1000))
            self._files.sync(versions)
        return version.version

    def _link(self, current: Content, version: Artefact, folder: int, versions: int) -> bool:
        """Link the current file, or a copy of it if its time is another one or it belongs to another
        user (fs.protected_hardlinks). Return whether its bytes have the version's name now."""
        name = version.version
        try:
            if version.time == current.artefact.time:
                with contextlib.suppress(PermissionError):
                    os.link(self._name, name, src_dir_fd=folder, dst_dir_fd=versions, follow_symlinks=False)
                    return True
            with self._stage() as copy:
                copy.copy(current)
                inherit_access(copy.fd, versions)
                copy.seal(replace(version, sha256=current.digested().sha256))
                copy.link(versions, name)
            return True
        except FileExistsError:  # after a crash between link and rename, or put there by hand
            if not stat.S_ISREG(os.stat(name, dir_fd=versions, follow_symlinks=False).st_mode):
                return False
            with Descriptor(os.open(name, READ, dir_fd=versions)) as existing:
                return sha256_of(existing) == current.digested().sha256

    def drop(self, names: Sequence[str]) -> None:
        """Erase versions in this order, durably, and remove the folders that are then empty."""
        if not names:
            return
        with self._files.open_folder(*self._path) as folder:
            newest = os.fstat(folder).st_mtime_ns
            for name in names:
                with contextlib.suppress(FileNotFoundError):  # removed by hand
                    os.unlink(name, dir_fd=folder)
            os.utime(folder, ns=(newest, newest))
            self._files.sync(folder)
        self._files.remove_while_empty(*self._path)

    def prune(self, earlier: Sequence[str], added: str | None, keep: int) -> None:
        """Erase the oldest of the earlier versions until `keep` remain with the added one, which stays
        however old it is: a file put there by hand may have any time."""
        others = [name for name in earlier if name != added]
        self.drop(others[: max(0, len(others) + (added is not None) - keep)])

    def _open(self) -> Descriptor | None:
        """Return the open folder, or None if it is missing. The caller closes it."""
        try:
            # It is usually missing: this saves three calls.
            os.lstat(f"{self._files.root}/{self._path[0]}/{VERSIONS}")
            return self._files.open_folder(*self._path)
        except MISSING:
            return None


# == Reading: artefacts and versions, found and opened ============================================


def log_unreadable(directory: str, errors: Iterable[tuple[str, OSError]]) -> None:
    for id, error in errors:
        log.error("%s/%s cannot be read: %s", directory, id, error)


class Reader:
    """Reads the artefacts below one data directory. Takes no lock: one file is opened, and that inode
    is read to its end. Every method checks the names that it is given (InvalidName) and may raise OSError."""

    def __init__(self, data: str | os.PathLike[str] = "data", *, fsync: bool = True) -> None:
        self.files, self.metadata = Files(os.path.realpath(data), fsync), Metadata()
        self.hash_threads = HashThreads()
        self.root, self.durable = self.files.root, fsync

    def directories(self) -> list[str]:
        """Return the names of the directories, sorted."""
        with self.files.open_folder() as root, os.scandir(root) as entries:
            return sorted(
                entry.name for entry in entries
                if SEGMENT.fullmatch(entry.name) and entry.name != LOST_AND_FOUND
                and entry.is_dir(follow_symlinks=False)
            )

    def artefacts(self, directory: str, *, prefix: str = "", after: str = "", digests: bool = False,
                  unreadable: list[str] | None = None) -> Generator[Artefact, None, None]:
        """Yield the artefacts of a directory whose ids begin with `prefix` and sort after `after`, by
        id. NotFound: there is no such directory. `digests`: compute the missing ones. What cannot be
        read is logged, and its id added to `unreadable` at the end, a folder's with a slash. A caller
        that does not read to the end closes the generator."""
        errors: list[tuple[str, OSError]] = []
        with self.open_directory(directory) as folder:
            for id, inside, name in self.files.walk(folder, "", prefix, after, unreadable=errors):
                try:
                    artefact = self._describe(inside, name, directory, id, digests)
                except OSError as error:
                    errors.append((id, error))
                else:
                    if artefact is not None:
                        yield artefact
        log_unreadable(directory, errors)
        if unreadable is not None:
            unreadable.extend(id for id, _ in errors)

    def deleted(self, directory: str, *, prefix: str = "", after: str = "") -> Iterator[Artefact]:
        """Yield the newest version of each deleted artefact of a directory, by id. NotFound: there is no
        such directory. Their digests may not be known. What cannot be read is logged."""
        newest: dict[str, str] = {}
        errors: list[tuple[str, OSError]] = []
        with self.open_directory(directory), contextlib.suppress(*MISSING):
            with self.files.open_folder(directory, VERSIONS) as folder:
                for path, _, version in self.files.walk(folder, longest=MAX_ID + 32, unreadable=errors):
                    id = path.rpartition("/")[0]
                    if id.startswith(prefix) and id > after and is_version(version):
                        newest[id] = version
        for id in sorted(newest):
            try:
                with self.fetch(directory, id, newest[id]) as content:
                    if self.current(directory, check_names(directory, id)) is None:
                        yield content.artefact
            except (NotFound, InvalidName):
                pass
            except OSError as error:
                errors.append((id, error))
        log_unreadable(directory, errors)

    def fetch(self, directory: str, id: str, version: str | None = None,
              from_memory: bool = False) -> Content:
        """Open an artefact: the current one or the given version. The caller closes it. NotFound.

        from_memory: a SMALL artefact may come from the cache if its file is unchanged. Then it is not
        open, and only its digest and `whole()` can be used."""
        segments = check_names(directory, id)
        cached = self._find_small(directory, segments, id) if from_memory and version is None else None
        current = cached or self.current(directory, segments)
        if current is not None:
            if version is None or current.artefact.version == version:
                return current
            current.close()
        if version is None:
            raise NotFound(f"'{directory}' has no artefact '{id}'.")
        # The current artefact was looked up first: it becomes a version before it is replaced.
        at, earlier = version_time(version), None
        with contextlib.suppress(Conflict):
            earlier = self.find(directory, (VERSIONS, *segments, version), id, at)
        if earlier is None:
            raise NotFound(f"'{id}' has no version '{version}'. ?versions lists them.")
        return earlier

    def versions(self, directory: str, id: str) -> list[tuple[Artefact, bool]]:
        """Return all versions, newest first, each with whether it is the current one. NotFound: there
        is none. Computes the digests that are not known yet."""
        for _ in range(SCANS):
            names, found = self.version_names(directory, id), []
            for version, is_current in names:
                with contextlib.suppress(NotFound), self.fetch(directory, id, version) as content:
                    found.append((content.digested(), is_current))
            if len(found) == len(names):
                break  # else one was replaced or erased meanwhile
        return found

    def version_names(self, directory: str, id: str) -> list[tuple[str, bool]]:
        """Return the names of all versions, newest first, each with whether it is the current one.
        NotFound: there is none. Opens no version."""
        segments = check_names(directory, id)
        versions = self.versions_of(directory, segments)
        earlier, current = versions.names(), None
        for _ in range(VERSION_SCANS):
            with self.current(directory, segments) or contextlib.nullcontext() as content:
                current = content and content.artefact.version
            before, earlier = earlier, versions.names()
            if earlier == before:
                break  # else a commit made the current one an earlier one meanwhile
        else:
            earlier = [name for name in earlier if current is None or name < current]
        if current is None and not earlier:
            raise NotFound(f"'{directory}' has no artefact '{id}', and no versions of it.")
        names = {*earlier, current} if current is not None else {*earlier}
        return [(name, name == current) for name in sorted(names, reverse=True)]

    def version_at(self, directory: str, id: str, at: int) -> str:
        """Return the newest version stored at or before `at` (µs since the epoch). NotFound: none."""
        for version, _ in self.version_names(directory, id):
            if version_time(version) <= at:
                return version
        raise NotFound(f"'{id}' has no version as old as that. ?versions lists them.")

    def verify(self) -> Iterator[tuple[Artefact, str]]:
        """Read every artefact and every version, and yield each with what its bytes are: as
        `Content.verified` says, or "unreadable" (a folder, too) for a reason that the log tells."""
        for directory in self.directories():
            for path in ((directory,), (directory, VERSIONS)):
                unreadable: list[tuple[str, OSError]] = []
                try:
                    with self.files.open_folder(*path) as folder:
                        yield from self._verify_folder(folder, path, unreadable)
                except FileNotFoundError:  # no versions, or removed meanwhile
                    pass
                except OSError as error:
                    unreadable.append(("", error))
                for id, reason in unreadable:
                    log.error("%s/%s: %s", "/".join(path), id, reason)
                    yield Artefact(directory, "/".join((*path[1:], id)), 0, 0, "", None), "unreadable"

    def _verify_folder(self, folder: int, path: Sequence[str],
                       unreadable: list[tuple[str, OSError]]) -> Iterator[tuple[Artefact, str]]:
        for id, inside, name in self.files.walk(folder, longest=MAX_ID + 32, unreadable=unreadable):
            of, time = id, None
            if VERSIONS in path:
                of = id.rpartition("/")[0]
                if not of or not is_version(name):
                    continue
                time = version_time(name)
            try:
                with self._open(inside, name, path[0], of, time) as content:
                    yield content.verified()
            except (FileNotFoundError, Conflict):  # removed meanwhile; no file
                pass
            except OSError as error:
                if error.errno not in NOT_A_FILE:
                    unreadable.append((id, error))

    # -- lookups --

    @retry_on_estale
    def open_directory(self, directory: str) -> Descriptor:
        """Return an open directory. The caller closes it. NotFound."""
        check_directory(directory)
        try:
            return self.files.open_folder(directory)
        except MISSING:
            detail = f"The directory '{directory}' does not exist. It is created by the first push."
            raise NotFound(detail) from None

    @retry_on_estale
    def find(self, directory: str, path: Sequence[str], id: str = "",
             time: int | None = None) -> Content | None:
        """Open the file at a path below a directory, or return None if there is none. The caller
        closes it. Conflict: something else has the name. `id` and `time` (µs) are those of a version."""
        id = id or "/".join(path)
        try:
            with self.files.open_folder(directory, *path[:-1]) as folder:
                return self._open(folder, path[-1], directory, id, time)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno in NOT_A_FILE:
                raise in_the_way(id) from None
            raise

    def current(self, directory: str, segments: Sequence[str]) -> Content | None:
        """Open the current artefact, or return None if there is none, whatever else has the name."""
        try:
            return self.find(directory, segments)
        except Conflict:
            return None

    def versions_of(self, directory: str, segments: Sequence[str]) -> Versions:
        return Versions(self.files, self.stage, directory, segments)

    def stage(self, limit: int | None = None) -> Upload:
        """Return a new upload of at most `limit` bytes. The caller closes it."""
        return Upload(self.files, self.hash_threads, limit)

    def _open(self, folder: int, name: str, directory: str, id: str, time: int | None = None) -> Content:
        """Open a file in an open folder. FileNotFoundError: there is none, or only an empty folder.
        Conflict: something else has the name. `time`: µs, of a version."""
        with (file := Descriptor(os.open(name, READ, dir_fd=folder))) as fd:
            status = os.fstat(fd)
            if stat.S_ISDIR(status.st_mode) and next(self.files.walk(fd), None) is None:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
            if not stat.S_ISREG(status.st_mode):
                raise in_the_way(id)
            artefact = self.metadata.read(directory, id, fd, status)
            if time is not None and time != artefact.time:
                artefact = replace(artefact, time=time)
            return Content(self.metadata, artefact, Descriptor(file.release()), status)

    def _find_small(self, directory: str, segments: Sequence[str], id: str) -> Content | None:
        """Return a cached artefact if its file is unchanged. None also if the file cannot be looked up:
        opening it tells why."""
        try:
            with self.files.open_folder(directory, *segments[:-1]) as folder:
                status = os.stat(segments[-1], dir_fd=folder, follow_symlinks=False)
        except OSError:
            return None
        content = self.metadata.small.get(identity(status))
        return content if content is not None and content.artefact.is_named(directory, id) else None

    @retry_on_estale
    def _describe(self, folder: int, name: str, directory: str, id: str, digest: bool) -> Artefact | None:
        """Return the artefact of this name in an open folder; None if it is gone or no file. `digest`:
        compute a missing digest."""
        try:
            status = os.stat(name, dir_fd=folder, follow_symlinks=False)
            known = self.metadata.cached(directory, id, status)
            if known is not None and (known.sha256 is not None or not digest):
                return known  # the file need not be opened
            if not stat.S_ISREG(status.st_mode):
                return None
            with self._open(folder, name, directory, id) as content:
                return content.digested() if digest else content.artefact
        except (FileNotFoundError, Conflict):
            return None


# == The repository ===============================================================================

Check = Callable[[Content | None], None]  # gets the current artefact before it changes; raises to refuse


def accept_any(current: Content | None) -> None:
    """Accept any current state: the check of an unconditional write."""


class Repository(Reader):
    """Artefacts in directories, as plain files under one data directory. A change is durable when its
    method returns. Knows nothing of HTTP.

    Any number of instances, in any number of processes, may work on one data directory: all state is on
    disk, and every decision is made under a lock of the file system."""

    def __init__(self, data: str | os.PathLike[str] = "data", *,
                 keep_versions: int | Callable[[str], int] = 0,
                 keep_days: Callable[[str], int | None] = lambda _: None, fsync: bool = True) -> None:
        """Make the data directory if it is missing, and remove what crashes left. If it cannot be
        written, the log says so, and everything can still be read.

        keep_versions: how many versions before the current one are kept (ALL: every one), or a function
        of the directory. keep_days: after how many days without a push `expire` deletes an artefact
        (None: never). fsync: False gives up durability in a power cut."""
        super().__init__(data, fsync=fsync)
        self.keeps = keep_versions if callable(keep_versions) else lambda _: keep_versions
        self.keep_days = keep_days
        try:
            self.files.make_root()
            for name in (INCOMING, LOCKS, TRASH):
                self.files.open_own(name).close()
            self.sweep()
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS) or not os.path.isdir(self.root):
                raise
            log.warning("%s cannot be written: %s. Artefacts can only be read.", self.root, error.strerror)

    def admit(self, directory: str, id: str, size: int, check: Check = accept_any) -> None:
        """Raise what a push of `size` bytes would raise now, as far as that is known without the
        bytes: for invalid names, for what is in the way, by `check`, and OutOfSpace."""
        segments = check_names(directory, id)
        with self.find(directory, segments) or contextlib.nullcontext() as current:
            check(current)
        self.check_space(size)

    def check_space(self, size: int) -> None:
        """Raise OutOfSpace if fewer than `size` bytes are free."""
        free = os.statvfs(self.root)
        if size > free.f_bavail * free.f_frsize:
            raise OutOfSpace(f"{size} bytes are more than the disk has left. Delete something first.")

    def push(self, upload: Upload, directory: str, id: str, *, type: str | None = None, by_name: bool = False,
             check: Check = accept_any, wait: bool = True) -> tuple[Artefact, bool]:
        """Commit an upload under its name. Return the current artefact and whether it is new. A push
        of the bytes that are already current, with their type, changes nothing. by_name: the type comes
        from a name and not from a client.

        `check` gets the current artefact (or None) under the lock; what it raises is passed on.
        Conflict: a folder is in the way of the artefact, or an artefact in the way of a folder.
        BlockingIOError: the directory's lock is taken, and `wait` is False (on the event loop)."""
        segments = check_names(directory, id)
        versions = self.versions_of(directory, segments)
        # 1. The body is in .incoming/, hashed. Set its time and attributes, and fsync. The same bytes need
        # no fsync, and large ones are not compared under the lock.
        new = Artefact(directory, id, upload.size, current_time(), type_of(id, type), upload.digest())
        by_name = by_name or specific_type(type) is None
        new = replace(new, is_utf8=by_name and is_utf8(upload.fd, new))
        compared = self._compare(upload, new, segments, type) if self.durable else None
        if compared is None:
            upload.seal(new)
        # 2. Take the directory's lock.
        with explain_refusal(directory), (lock := self.files.lock(directory, wait)):
            with self.find(directory, segments) or contextlib.nullcontext() as current:
                # 3. Check the preconditions against the current state.
                check(current)
                # 4. Make missing folders durable.
                with self.files.make_folder(directory, *segments[:-1]) as folder:
                    if current is not None and is_identical(current, upload, new, compared, type) and (
                        self.keep_days(directory) is None or current.renew()
                    ):
                        new = current.artefact
                        self.files.sync(current.file.fd)  # it was renewed, or put there by hand
                    else:
                        new = self._replace(upload, new, current, folder, versions)
                    # 5. Release the lock, so that the fsyncs of many pushes overlap, and fsync the folder.
                    lock.close()
                    self.files.sync(folder)
                if upload.moved:
                    self.metadata.known.keep(identity(upload.status()), new)
                    if current is not None:
                        self.metadata.known.pop(identity(current.status), None)
        return new, current is None

    def _replace(self, upload: Upload, new: Artefact, current: Content | None, folder: int,
                 versions: Versions) -> Artefact:
        """Keep the current file as a version (step 4) and rename the upload over it (step 5). Return the
        new artefact, whose version is later than all others."""
        keep, name = self.keeps(new.directory), new.id.rpartition("/")[2]
        earlier = [] if keep == ALL else versions.names()
        newest = max(
            current.artefact.time if current is not None else -1,
            version_time(earlier[-1]) if earlier else -1,
            versions.newest_time() if earlier or keep == ALL else -1,
        )
        if new.time <= newest or not upload.sealed:
            new = replace(new, time=min(max(newest + 1, current_time()), LAST_TIME))
            upload.seal(new)
        kept = versions.keep(current, new.time) if current is not None and keep else None
        if kept is not None and version_time(kept) >= new.time:
            new = replace(new, time=min(version_time(kept) + 1, LAST_TIME))
            upload.seal(new)
        if inherit_access(upload.fd, folder):
            upload.sync()
        try:
            upload.move(folder, name)
        except IsADirectoryError:  # below it are only empty folders, or `find` would have raised
            self.files.remove_empty(folder, name)
            upload.move(folder, name)
        if earlier:
            self.files.sync(folder)  # else a power cut could undo the rename, but not the pruning
            versions.prune(earlier, kept, keep)
        return new

    def _compare(self, upload: Upload, new: Artefact, segments: Sequence[str],
                 type: str | None) -> tuple[int, ...] | None:
        """Return the identity of the current file if it has the upload's bytes, else None."""
        with self.find(new.directory, segments) or contextlib.nullcontext() as current:
            if current is not None and is_identical(current, upload, new, None, type):
                return identity(current.status)
        return None

    def restore(self, directory: str, id: str, version: str, *,
                check: Check = accept_any) -> tuple[Artefact, bool]:
        """Push the bytes and the type of an earlier version as a new version, as `push` does.
        NotFound: there is no such version. Damaged: its bytes are not those that were stored."""

        def check_both(current: Content | None) -> None:
            self.fetch(directory, id, version).close()  # NotFound: it was erased meanwhile
            check(current)

        with self.fetch(directory, id, version) as content:
            return self.promote(content, directory, id, check=check_both)

    def promote(self, source: Content, directory: str, id: str, *, limit: int | None = None,
                check: Check = accept_any) -> tuple[Artefact, bool]:
        """Push a copy of a stored file, with its type, as `push` does. The bytes are hashed once more:
        Damaged: they are not those that were stored. The caller closes the source."""
        artefact = source.artefact
        self.admit(directory, id, artefact.size, check)
        with self.stage(limit) as upload:
            upload.copy(source)
            if artefact.sha256 not in (None, upload.digest()):
                raise Damaged(f"Version '{artefact.version}' is damaged on disk. Choose another one.")
            by_name = artefact.is_utf8 or artefact.sha256 is None
            return self.push(upload, directory, id, type=artefact.type, by_name=by_name, check=check)

    def delete(self, directory: str, id: str, *, check: Check = accept_any) -> None:
        """Delete an artefact. If versions are kept, it becomes one. NotFound."""
        segments, keep = check_names(directory, id), self.keeps(directory)
        self.fetch(directory, id).close()  # NotFound: no lock file is made
        versions = self.versions_of(directory, segments)
        with self.files.lock(directory), self.fetch(directory, id) as current:
            check(current)
            earlier, kept = versions.names() if keep < ALL else [], None
            if keep:
                kept = versions.keep(current, max(current.artefact.time, versions.newest_time()))
            self._unlink(directory, segments)
            versions.prune(earlier, kept, keep)

    def erase(self, directory: str, id: str, version: str, *, check: Check = accept_any) -> None:
        """Erase one earlier version. NotFound. Conflict: it is the current one."""
        self.fetch(directory, id, version).close()
        versions = self.versions_of(directory, check_names(directory, id))
        with self.files.lock(directory), self.fetch(directory, id, version) as content:
            check(content)
            if version not in versions.names():
                raise Conflict(f"'{version}' is the current version. DELETE the artefact itself.")
            versions.drop([version])

    def erase_all(self, directory: str, id: str, *, check: Check = accept_any) -> None:
        """Erase an artefact with all its versions. NotFound: there is neither."""
        self.version_names(directory, id)
        segments = check_names(directory, id)
        versions = self.versions_of(directory, segments)
        with self.files.lock(directory):
            with self.current(directory, segments) or contextlib.nullcontext() as current:
                check(current)
                if current is not None:
                    self._unlink(directory, segments)
            versions.drop(versions.names())

    def delete_directory(self, directory: str) -> None:
        """Delete a directory, its artefacts and their versions, in one rename. NotFound."""
        self.open_directory(directory).close()
        name = self.files.unique_name()
        with self.files.open_folder() as root, self.files.open_own(TRASH) as trash:
            with self.files.lock(directory):
                self.open_directory(directory).close()  # a folder, not a symbolic link
                with explain_refusal(directory):
                    os.rename(directory, name, src_dir_fd=root, dst_dir_fd=trash)
                self.files.sync(root)
            self._discard(trash, TRASH, name)

    def expire(self, dry_run: bool = False) -> Iterator[Artefact]:
        """Delete the artefacts whose last push is older than `keep_days`, with all their versions, and
        yield them. Deleted artefacts that have versions left are among them. An artefact that is pushed
        meanwhile stays. What cannot be deleted is logged. dry_run: only yield them."""
        for directory in self.directories():
            days = self.keep_days(directory)
            if days is None:
                continue
            limit = current_time() - days * DAY
            try:
                for artefact in itertools.chain(self.artefacts(directory), self.deleted(directory)):
                    if artefact.time < limit and self._expire(directory, artefact.id, limit, dry_run):
                        yield artefact
            except NotFound:  # the directory was deleted meanwhile
                pass
            except OSError as error:
                log_unreadable(directory, [("", error)])

    def _expire(self, directory: str, id: str, limit: int, dry_run: bool) -> bool:
        """Erase an artefact with all its versions. Return False if it cannot be erased, or if its last
        push is not before `limit` (µs since the epoch)."""

        def check_age(_: Content | None) -> None:
            names = self.version_names(directory, id)
            current = next((name for name, is_current in names if is_current), names[0][0])
            with self.fetch(directory, id, current) as content:
                if content.last_push() >= limit:
                    raise PreconditionFailed("It was pushed meanwhile.")

        try:
            check_age(None)
            if not dry_run:
                self.erase_all(directory, id, check=check_age)
            return True
        except (NotFound, PreconditionFailed):
            pass
        except OSError as error:
            log.error("%s/%s cannot be deleted: %s", directory, id, error)
        return False

    def sweep(self) -> None:
        """Remove staging files whose writer has died, and what is left in the trash."""
        for own in (INCOMING, TRASH):
            with self.files.open_own(own) as folder:
                for name in os.listdir(folder):
                    self._discard(folder, own, name)

    def _discard(self, folder: int, own: str, name: str) -> None:
        """Remove a trash folder, or a staging file that no writer locks. If that fails the log says so,
        and the next sweep tries again."""
        try:
            with contextlib.ExitStack() as stack:
                if own == INCOMING:
                    with contextlib.suppress(IsADirectoryError):  # put there by hand
                        file = Descriptor(os.open(name, STAGED, dir_fd=folder))
                        fcntl.flock(stack.enter_context(file), fcntl.LOCK_EX | fcntl.LOCK_NB)
                self.files.remove_tree(folder, name)
        except (FileNotFoundError, BlockingIOError):  # removed by another process; in use
            pass
        except OSError as error:
            log.warning("%s/%s/%s cannot be removed: %s", self.root, own, name, error)

    def check_health(self) -> None:
        """Write, fsync, read and remove a staging file. OSError, Unavailable, OutOfSpace."""
        self.check_space(1024 * 1024)
        with self.stage() as upload:
            upload.write(b"health")
            self.files.sync(upload.fd)
            if upload.read() != b"health":
                raise OSError(errno.EIO, "a file has other bytes than were written")

    def check_directories(self) -> None:
        """Log what the next pushes to a directory would fail at, or would erase."""
        device = os.lstat(f"{self.root}/{INCOMING}").st_dev
        for directory in self.directories():
            with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                if os.lstat(f"{self.root}/{directory}").st_dev != device:
                    log.warning("'%s' is on another file system: nothing can be pushed to it", directory)
            if not self.keeps(directory) and os.path.exists(f"{self.root}/{directory}/{VERSIONS}"):
                log.warning("'%s' has versions: keep_versions = 0 makes a push erase them", directory)

    def _unlink(self, directory: str, segments: Sequence[str]) -> None:
        """Remove an artefact's name, durably, and the folders that are then empty."""
        with self.files.open_folder(directory, *segments[:-1]) as folder:
            os.unlink(segments[-1], dir_fd=folder)
            self.files.sync(folder)
        self.files.remove_while_empty(directory, *segments[:-1])


def is_identical(current: Content, upload: Upload, new: Artefact, compared: tuple[int, ...] | None,
                 type: str | None) -> bool:
    """Return whether the current file has the upload's bytes, and the type if the client chose one.
    `compared`: the identity of a file that is known to have the bytes."""
    if current.artefact.size != new.size or current.digested().sha256 != new.sha256:
        return False
    if specific_type(type) is not None and HAS_ATTRIBUTES and current.artefact.type != new.type:
        return False
    return identity(current.status) == compared or upload.equals(current)


class InvalidRequest(ArtefactsError):
    """temp"""
class Unreadable(ArtefactsError):
    """temp"""
class HeaderTooLarge(ArtefactsError):
    """temp"""
class Unimplemented(ArtefactsError):
    """temp"""
class Unsupported(ArtefactsError):
    """temp"""
class UnsatisfiableRange(ArtefactsError):
    """temp"""
class Unauthenticated(ArtefactsError):
    """temp"""
class Forbidden(ArtefactsError):
    """temp"""


# == HTTP semantics: pure functions of header text and validators =================================

ENTITY_TAG = re.compile(r'(W/)?"([\x21\x23-\x7e\x80-\xff]*)"')
BYTE_RANGE = re.compile(r"bytes=[ \t]*(?=[0-9]|-[0-9])([0-9]*)-([0-9]*)[ \t]*", re.I)
SHA256_MEMBER = re.compile(r"(?:^|,)[ \t]*sha-256[ \t]*=([^,;]*)", re.I)
URL_SAFE = re.compile(r"[\w.~/-]*", re.A)
CONDITIONS = ("HTTP_IF_MATCH", "HTTP_IF_NONE_MATCH", "HTTP_IF_MODIFIED_SINCE", "HTTP_IF_UNMODIFIED_SINCE")
FORMATS = ("json", "html", "sha256sums", "tar")
NOT_MODIFIED = ("ETag", "Last-Modified", "Cache-Control", "Artefact-Version")  # RFC 9110 §15.4.5
HARMLESS = {  # whatever is stored, it runs nothing here (Fetch; CSP 3)
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:",
}


@functools.lru_cache(1024)
def http_date(seconds: int) -> str:
    """IMF-fixdate (RFC 9110 §5.6.7)."""
    return falcon.dt_to_http(EPOCH + datetime.timedelta(seconds=seconds))


def http_seconds(field: str | None) -> int | None:
    """A date field's seconds since the epoch; None where it is absent or no HTTP-date, which RFC
    9110 §13.1.3 has ignored."""
    if field:
        with contextlib.suppress(ValueError, OverflowError):
            return int(falcon.http_date_to_dt(field.strip(), obs_date=True).timestamp())
    return None


def tag_matches(field: str, etag: str | None, *, strong: bool) -> bool:
    """Whether an If-Match or If-None-Match names this entity tag, None where there is no
    representation (RFC 9110 §8.8.3.2). InvalidRequest where it is no list of entity tags."""
    if field == etag:  # what every revalidation sends
        return True
    if field.strip(" \t") == "*":
        return etag is not None
    if ENTITY_TAG.sub("", field).strip(" \t,"):
        raise InvalidRequest('An entity tag is quoted: "<sha256>". Mend the If-Match or If-None-Match.')
    tags = ENTITY_TAG.findall(field)
    return any(f'"{tag}"' == etag and not (weak and strong) for weak, tag in tags)


def failed_precondition(method: str, conditions: Mapping[str, str], etag: str | None,
                        modified: int | None) -> int | None:
    """None where the method is to be performed, else 304 or 412, in the order of RFC 9110 §13.2.2.

    `conditions`: the fields by their WSGI names; `etag` and `modified` (seconds): of the current
    representation, None where there is none. InvalidRequest: an unreadable If-None-Match on a
    write, for to ignore it would replace what the client wanted to protect."""
    reading = method in ("GET", "HEAD")
    if "HTTP_IF_MATCH" in conditions:
        matched = False
        with contextlib.suppress(InvalidRequest):
            matched = tag_matches(conditions["HTTP_IF_MATCH"], etag, strong=True)
        if not matched:
            return 412
    elif modified is not None:
        since = http_seconds(conditions.get("HTTP_IF_UNMODIFIED_SINCE"))
        if since is not None and modified > since:
            return 412
    if "HTTP_IF_NONE_MATCH" in conditions:
        try:
            if tag_matches(conditions["HTTP_IF_NONE_MATCH"], etag, strong=False):
                return 304 if reading else 412
        except InvalidRequest:
            if not reading:
                raise
    elif reading and modified is not None:
        since = http_seconds(conditions.get("HTTP_IF_MODIFIED_SINCE"))
        if since is not None and modified <= since:
            return 304
    return None


def byte_range(field: str, if_range: str | None, size: int, etag: str,
               modified: int) -> tuple[int, int] | None:
    """(first byte, length) of the one range asked for; None where the whole is to be sent: for
    several, another unit, garbage (RFC 9110 §14.2), or an If-Range that names another
    representation (§13.1.5). UnsatisfiableRange."""
    match = BYTE_RANGE.fullmatch(field)
    if match is None:
        return None
    if if_range is not None and if_range.strip() != etag and http_seconds(if_range) != modified:
        return None
    # Numbers may have thousands of digits, which `int` refuses; 19 exceed every file.
    first, last = (int(digits.lstrip("0")[:19] or "0") if digits else None for digits in match.groups())
    if first is None:  # the last bytes; of nothing, they are the whole
        if last and not size:
            return None
        first, last = max(0, size - (last or 0)), size - 1
    elif last is not None and last < first:
        return None
    if first >= size:
        detail = f"The artefact has {size} bytes. Ask for some of these, or for the whole."
        raise UnsatisfiableRange(detail, {"Content-Range": f"bytes */{size}"})
    return first, min(size - 1 if last is None else last, size - 1) - first + 1


def announced_sha256(environ: WSGIEnvironment) -> str | None:
    """The SHA-256, in hex, that the client says its content has: Repr-Digest, Content-Digest (RFC
    9530), Digest (RFC 3230) or X-Checksum-Sha256. Other algorithms are ignored, as RFC 9530 §2 has
    it. InvalidRequest where it cannot be read or two differ."""
    found = set()
    for field in ("HTTP_REPR_DIGEST", "HTTP_CONTENT_DIGEST", "HTTP_DIGEST"):
        for value in SHA256_MEMBER.findall(environ.get(field, "")):
            value = value.strip(" \t")
            if field != "HTTP_DIGEST":  # a structured field's byte sequence stands between colons
                value = value[1:-1] if value[:1] == value[-1:] == ":" else "?"
            with contextlib.suppress(ValueError):
                value = base64.b64decode(value, validate=True).hex()
            found.add(value)
    if "HTTP_X_CHECKSUM_SHA256" in environ:
        found.add(environ["HTTP_X_CHECKSUM_SHA256"].strip().lower())
    if len(found) > 1 or not all(map(SHA256.fullmatch, found)):
        raise InvalidRequest(
            "The digest fields have no SHA-256 that can be read, or two. Send 'Repr-Digest: "
            "sha-256=:<base64>:' or 'X-Checksum-Sha256: <hex>'."
        )
    return found.pop() if found else None


def body_length(environ: WSGIEnvironment) -> int | None:
    """The bytes that the body is announced to have, None where they are not (it is chunked).
    InvalidRequest or Unsupported where it must not be stored."""
    if "HTTP_CONTENT_RANGE" in environ:  # RFC 9110 §14.5
        raise InvalidRequest("A part of an artefact cannot be stored. Send the whole, without Content-Range.")
    if environ.get("HTTP_CONTENT_ENCODING", "").strip().lower() not in ("", "identity"):
        detail = "A Content-Encoding is not kept. Send the artefact as it is."
        raise Unsupported(detail, {"Accept-Encoding": "identity"})
    length = environ.get("CONTENT_LENGTH") or None
    if "HTTP_TRANSFER_ENCODING" in environ and length is None:  # RFC 9112 §6.1; who decoded it says so
        if environ.get("SERVER_PROTOCOL") == "HTTP/1.0" or not environ.get("wsgi.input_terminated"):
            raise InvalidRequest("Transfer-Encoding cannot be read here. Send a Content-Length.")
        return None
    if length is not None and not re.fullmatch("[0-9]{1,18}", length):
        raise InvalidRequest("Content-Length is a number of bytes. Mend it.")
    return int(length or 0)


def preferred_format(wanted: str | None, accept: str) -> str:
    """One of FORMATS: what `?format=` says, else what Accept prefers (RFC 9110 §12.5.1), else JSON."""
    if wanted is None:
        accept = ",".join(filter(str.strip, accept.lower().split(",")))  # RFC 9110 §5.6.1.2, §8.3.1
        with contextlib.suppress(ValueError, falcon.HTTPError):
            best = falcon.mediatypes.best_match(("application/json", "text/html", "text/plain"), accept)
            wanted = {"text/html": "html", "text/plain": "sha256sums"}.get(best)
        return wanted if wanted in FORMATS else "json"
    if wanted not in FORMATS:
        raise InvalidRequest(f"'{wanted}' is none of the formats {', '.join(FORMATS)}. Choose one.")
    return wanted


def instant(text: str) -> int:
    """µs since the epoch of an RFC 3339 time, or of the end of a date, UTC."""
    text = text.strip().upper().replace(" ", "+")  # as which a '+' arrives in a query
    if re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", text):
        text += "T23:59:59.999999Z"
    with contextlib.suppress(ValueError):
        at = datetime.datetime.fromisoformat(text)
        if at.tzinfo is not None:
            return (at - EPOCH) // MICROSECOND
    raise InvalidRequest("'at' is a date, or a time with its offset: 2026-11-23, 2026-11-23T01:44:55Z.")


def content_disposition(name: str) -> str:
    """`inline` under this name (RFC 6266, RFC 8187). curl reads only `filename`, as raw bytes."""
    raw = re.sub(r'["\\]', r"\\\g<0>", name).encode().decode("latin-1")
    return f"inline; filename=\"{raw}\"; filename*=UTF-8''{quote(name, safe='')}"


def href(base: str, directory: str, id: str = "", version: str = "") -> str:
    """The canonical path of a directory, an artefact or a version, mounted under `base`."""
    path = f"{base}/artefacts/{quoted(directory)}/{quoted(id)}"
    return f"{path}?version={version}" if version else path


def quoted(path: str) -> str:
    """As it stands in a URL. The test first, because a listing quotes thousands that need none."""
    return path if URL_SAFE.fullmatch(path) else quote(path)


@functools.lru_cache(1024)
def representation_fields(artefact: Artefact, base: str, caching: str) -> tuple[tuple[str, str], ...]:
    """What a GET says of an artefact whose digest is known."""
    digest = base64.b64encode(bytes.fromhex(artefact.sha256 or "")).decode()
    return (
        ("Content-Type", artefact.type),
        ("ETag", f'"{artefact.sha256}"'),
        # not later than now: RFC 9110 §8.8.2.1
        ("Last-Modified", http_date(min(artefact.time // 1_000_000, int(time.time())))),
        ("Cache-Control", caching),
        ("Accept-Ranges", "bytes"),
        ("Repr-Digest", f"sha-256=:{digest}:"),
        ("Digest", f"SHA-256={digest}"),
        ("Link", f'<{href(base, artefact.directory, artefact.id)}?versions>; rel="version-history"'),
        ("Artefact-Version", artefact.version),
        ("Content-Disposition", content_disposition(artefact.id.rpartition("/")[2])),
        *HARMLESS.items(),
    )


def artefact_json(artefact: Artefact, base: str, version: str = "", more: str = "") -> str:
    """An ARTEFACT; `more`: further members."""
    return (
        f'{{"directory": {_json(artefact.directory)}, "id": {_json(artefact.id)}, '
        f'"href": "{href(base, artefact.directory, artefact.id, version)}", '
        f'"version": "{artefact.version}", "size": {artefact.size}, "type": {_json(artefact.type)}, '
        f'"sha256": {_json(artefact.sha256) if artefact.sha256 else "null"}, '
        f'"modified": "{artefact.modified}"{more}}}'
    )


# A listing has thousands, and the next one the same ones again.
row_json = functools.lru_cache(KNOWN // 2)(artefact_json)
_json = json.encoder.encode_basestring_ascii


# == Resources ====================================================================================

# In the environ of a first look (see "Connections"): whether the body is there; and who may take a while
HEADERS_ONLY, ON_WORKER = "artefacts.headers_only", "artefacts.on_worker"


class NeedsBody(falcon.HTTPStatus):
    """At a first look there is nothing to object to, and the answer needs the body, or a while (100); or
    what may be objected to takes a while itself, and so a worker (102)."""


def require_body(req: falcon.Request) -> None:
    """What follows reads the body, waits for a lock or the disk, or writes."""
    if HEADERS_ONLY in req.env:
        raise NeedsBody(falcon.HTTP_100)


def digested(req: falcon.Request, content: Content) -> Artefact:
    """What is known of it with its digest, be it that all of it has to be read."""
    if content.artefact.sha256 is None and HEADERS_ONLY in req.env and not req.env[ON_WORKER]:
        raise NeedsBody(falcon.HTTP_102)
    return content.digested()


class Resource:
    def __init__(self, repository: Repository, settings: Settings) -> None:
        self.repository = repository
        self.settings = settings

    def check_erasable(self, directory: str) -> None:
        if self.settings.of(directory, "write_once"):
            raise Forbidden(f"What is in '{directory}' stays: it is written once. Push under another name.")

    def push_form(self, req: falcon.Request, resp: falcon.Response, directory: str,
                  id: str | None = None) -> None:
        """Stores each file of a form (RFC 7578) under its own name, or under `id`; each is a commit
        of its own. 201 if all were stored, else the first refusal's status, and the list."""
        if not is_form(req):
            raise Unsupported("A directory takes a form's files (curl -F file=@f). PUT artefacts below it.")
        length = body_length(req.env)
        if announced_sha256(req.env) is not None:
            raise InvalidRequest("A digest is checked of an artefact, not of a form. PUT the file itself.")
        check_names(directory, "-" if id is None else id)
        self.repository.check_space(length or 0)
        require_body(req)
        body = req.env["wsgi.input"]
        if isinstance(body, Upload):
            body.verify(length, None)
        check = absence(directory, preconditions(req), self.settings)
        stored, refused = self._push_parts(files_of_form(req, length), directory, id, check)
        if not stored and not refused:
            raise InvalidRequest("The form has no file. Choose one (curl -F file=@f).")
        resp.status = falcon.code_to_http_status(refused[0]["status"] if refused else 201)
        self._tell_pushed(req, resp, directory, stored, refused)

    def _push_parts(self, files: Iterator[tuple[str, str, Iterator[bytes]]], directory: str,
                    id: str | None, check: Check) -> tuple[list[Artefact], list[dict[str, Any]]]:
        """What was stored, and of what was not: id, status, detail."""
        stored: list[Artefact] = []
        refused: list[dict[str, Any]] = []
        try:
            for name, type, content in files:
                try:
                    stored.append(self._push_part(directory, id or name, type, content, check))
                except (ArtefactsError, OSError) as error:
                    status, detail = answer_to(error)
                    refused.append({"id": id or name, "status": status, "detail": detail})
        except (falcon.HTTPError, Mismatch) as error:
            told = error.detail if isinstance(error, Mismatch) else error.description
            detail = f"The form cannot be read from here on ({told}). Send it again."
            refused.append({"id": None, "status": 400, "detail": detail})
        return stored, refused

    def _tell_pushed(self, req: falcon.Request, resp: falcon.Response, directory: str,
                     stored: Sequence[Artefact], refused: Sequence[Mapping[str, Any]]) -> None:
        base = base_of(req)
        if format_of(req) == "html":  # a person's browser, without its script
            if not refused:
                raise falcon.HTTPSeeOther(href(base, directory))
            render_page(resp, refusals_page(directory, refused, base))
            return
        rows = ", ".join(artefact_json(artefact, base) for artefact in stored)
        text = f'"directory": {_json(directory)}, "artefacts": [{rows}], "refused": {json.dumps(refused)}}}'
        if refused:
            detail = f"{len(stored)} stored, {len(refused)} refused: 'refused' tells which, and why."
            start = problem(str(resp.status), detail).decode().rstrip("}\n")
            render_json(resp, f"{start}, {text}", "application/problem+json")
        else:
            render_json(resp, "{" + text)

    def _push_part(self, directory: str, id: str, type: str, content: Iterable[bytes],
                   check: Check) -> Artefact:
        self.repository.admit(directory, id, 0, check)
        with self.repository.stage(self.settings.of(directory, "max_size")) as upload:
            for piece in content:
                upload.write(piece)
            return self.repository.push(upload, directory, id, type=type, check=check)[0]

    def on_propfind(self, req: falcon.Request, resp: falcon.Response, **_: str) -> None:
        # sccache asks so before it writes; it takes 404 for "not there yet", and gives up at 405
        raise NotFound("This is no WebDAV collection. PUT works without one.")


class Root:
    """`/`"""

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        raise falcon.HTTPSeeOther(base_of(req) + "/artefacts/")

    on_head = on_get


class Directories(Resource):
    """`/artefacts/`"""

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        require_body(req)
        who, base = req.env["artefacts.who"], base_of(req)
        names = [name for name in self.repository.directories() if who.may("read", name)]
        resp.set_header("Vary", "Accept")
        if format_of(req) == "html":
            render_page(resp, directories_page(names, base))
            return
        rows = (f'{{"directory": {_json(name)}, "href": {_json(href(base, name))}}}' for name in names)
        render_json(resp, f'{{"directories": [{", ".join(rows)}]}}')

    on_head = on_get


class Directory(Resource):
    """`/artefacts/<directory>`"""

    def on_get(self, req: falcon.Request, resp: falcon.Response, directory: str) -> None:
        require_body(req)
        format = format_of(req)
        limit = whole_number(req.get_param("limit"))
        listing = self.repository.artefacts(
            directory, prefix=req.get_param("prefix") or "", after=req.get_param("after") or "",
            digests=format == "sha256sums",
        )
        with contextlib.closing(listing):
            found = list(itertools.islice(listing, limit and limit + 1))
        following = None
        if limit is not None and len(found) > limit:
            del found[limit:]
            following = next_page(req, directory, found[-1].id)
            resp.set_header("Link", f'<{following}>; rel="next"')
        resp.set_header("Vary", "Accept")
        if format == "tar":
            resp.content_type = "application/x-tar"
            resp.set_header("Content-Disposition", content_disposition(f"{directory}.tar"))
            resp.stream = tar(self.repository, found) if req.method == "GET" else iter(())
        elif format == "sha256sums":
            resp.content_type = "text/plain; charset=utf-8"
            resp.text = "".join(f"{artefact.sha256}  {artefact.id}\n" for artefact in found)
        elif format == "html":
            here = "" if req.env["PATH_INFO"].endswith("/") else quote(directory, safe="") + "/"
            render_page(resp, directory_page(directory, found, here, following))
        else:
            base = base_of(req)
            rows = ", ".join(map(row_json, found, itertools.repeat(base)))
            more = f', "next": {_json(following)}' if following else ""
            render_json(resp, f'{{"directory": {_json(directory)}, "artefacts": [{rows}]{more}}}')

    on_head = on_get

    def on_post(self, req: falcon.Request, resp: falcon.Response, directory: str) -> None:
        self.push_form(req, resp, directory)

    def on_delete(self, req: falcon.Request, resp: falcon.Response, directory: str) -> None:
        self.check_erasable(directory)
        require_body(req)
        self.repository.delete_directory(directory)
        resp.status = falcon.HTTP_204


class ArtefactResource(Resource):
    """`/artefacts/<directory>/<id>`"""

    def on_get(self, req: falcon.Request, resp: falcon.Response, directory: str, id: str) -> None:
        version, caching = None, "no-cache"
        if req.query_string:
            if req.has_param("versions"):
                self._list_versions(req, resp, directory, id)
                return
            if req.has_param("at"):
                require_body(req)
                version = self.repository.version_at(directory, id, instant(req.get_param("at") or ""))
            elif req.has_param("version"):
                version, caching = req.get_param("version"), "max-age=31536000, immutable"
        with self.repository.fetch(directory, id, version, from_memory=True) as content:
            self._answer(req, resp, content, caching)

    on_head = on_get

    def _list_versions(self, req: falcon.Request, resp: falcon.Response, directory: str, id: str) -> None:
        require_body(req)
        versions, base = self.repository.versions(directory, id), base_of(req)
        resp.set_header("Vary", "Accept")
        if format_of(req) == "html":
            render_page(resp, versions_page(versions, directory, id, base))
            return
        rows = ", ".join(
            artefact_json(artefact, base, artefact.version, f', "current": {json.dumps(current)}')
            for artefact, current in versions
        )
        render_json(resp, f'{{"directory": {_json(directory)}, "id": {_json(id)}, "versions": [{rows}]}}')

    def _answer(self, req: falcon.Request, resp: falcon.Response, content: Content, caching: str) -> None:
        """The representation, or the part of it, that the request's conditions and range select."""
        artefact = digested(req, content)
        etag, modified = f'"{artefact.sha256}"', artefact.time // 1_000_000
        conditions = conditions_of(req)
        status = failed_precondition(req.method, conditions, etag, modified) if conditions else None
        if status == 412:
            raise changed()
        part = None
        if status is None and "HTTP_RANGE" in req.env and req.method == "GET":
            field, if_range = req.env["HTTP_RANGE"], req.env.get("HTTP_IF_RANGE")
            part = byte_range(field, if_range, artefact.size, etag, modified)
        fields = representation_fields(artefact, base_of(req), self.settings.caching(caching))
        if status is not None:
            resp.status = falcon.HTTP_304
            resp.set_headers([field for field in fields if field[0] in NOT_MODIFIED])
            return
        resp.set_headers(fields)
        start, length = part or (0, artefact.size)
        if part is not None:
            resp.status = falcon.HTTP_206
            resp.set_header("Content-Range", f"bytes {start}-{start + length - 1}/{artefact.size}")
        if req.method == "HEAD":
            resp.content_length = length
        elif artefact.size <= SMALL:
            resp.data = content.whole()[start : start + length]
        elif length <= SMALL:
            resp.data = content.read(start, length)
        else:
            send_file(req, resp, content, start, length)

    def on_put(self, req: falcon.Request, resp: falcon.Response, directory: str, id: str) -> None:
        self._push(req, resp, directory, id, self._check(req, directory, id))

    def on_post(self, req: falcon.Request, resp: falcon.Response, directory: str, id: str) -> None:
        if req.has_param("restore"):
            if isinstance(req.env["wsgi.input"], Upload):
                req.env["wsgi.input"].limit = PIECE  # whoever sends a body, it is not looked at
            require_body(req)
            version, check = req.get_param("restore") or "", self._check(req, directory, id)
            restored, _ = self.repository.restore(directory, id, version, check=check)
            if format_of(req) == "html":  # likewise
                raise falcon.HTTPSeeOther(href(base_of(req), directory, id) + "?versions")
            self._tell_stored(req, resp, restored, created=True)
        elif is_form(req):
            self.push_form(req, resp, directory, id)
        else:
            self._push(req, resp, directory, id, absence(directory, preconditions(req), self.settings))

    def on_delete(self, req: falcon.Request, resp: falcon.Response, directory: str, id: str) -> None:
        self.check_erasable(directory)
        require_body(req)
        check = preconditions(req)
        if req.has_param("versions"):
            self.repository.erase_all(directory, id, check=check)
        elif req.has_param("version"):
            self.repository.erase(directory, id, req.get_param("version") or "", check=check)
        else:
            self.repository.delete(directory, id, check=check)
        resp.status = falcon.HTTP_204

    def _check(self, req: falcon.Request, directory: str, id: str) -> Check:
        """What is to be decided before what is current is replaced."""
        check = preconditions(req)
        if self.settings.of(directory, "write_once"):
            return absence(directory, check, self.settings)
        return check

    def _push(self, req: falcon.Request, resp: falcon.Response, directory: str, id: str,
              check: Check) -> None:
        if is_form(req):
            raise Unsupported("A form is not stored as it is. POST it, or PUT the file itself.")
        length, sha256 = body_length(req.env), announced_sha256(req.env)
        limit = self.settings.of(directory, "max_size")
        if limit is not None and length is not None and length > limit:
            raise TooLarge(f"At most {limit} bytes are accepted here. Send less.")
        body = req.env["wsgi.input"]
        received = isinstance(body, Upload)  # by the part on waitress
        if received:
            body.limit = limit
        if not received or req.env.get(HEADERS_ONLY) is False:
            self.repository.admit(directory, id, length or 0, check)
        at_once = received and req.env.get(HEADERS_ONLY) is True and not self.repository.durable
        if not at_once:
            require_body(req)
        with contextlib.nullcontext(body) if received else self.repository.stage(limit) as upload:
            if not received:
                receive(req, length, upload)
            upload.verify(length, sha256)
            type = req.content_type
            try:
                stored = self.repository.push(upload, directory, id, type=type, check=check, wait=not at_once)
            except BlockingIOError:  # of the lock; of a file, another program's lease of it
                if not at_once:
                    raise
                raise NeedsBody(falcon.HTTP_100) from None
        artefact, created = stored
        self._tell_stored(req, resp, artefact, created)

    def _tell_stored(self, req: falcon.Request, resp: falcon.Response, artefact: Artefact,
                     created: bool) -> None:
        base = base_of(req)
        if created:
            resp.status = falcon.HTTP_201
            resp.location = href(base, artefact.directory, artefact.id)
        resp.set_headers({"ETag": f'"{artefact.sha256}"', "Artefact-Version": artefact.version})
        render_json(resp, artefact_json(artefact, base))


def base_of(req: falcon.Request) -> str:
    """The path that the app is mounted under, as it stands in a URL."""
    return quote(req.root_path) if req.root_path else ""


def format_of(req: falcon.Request) -> str:
    return preferred_format(req.get_param("format"), req.get_header("Accept") or "*/*")


def conditions_of(req: falcon.Request) -> dict[str, str]:
    return {name: req.env[name] for name in CONDITIONS if name in req.env}


def changed() -> PreconditionFailed:
    return PreconditionFailed(
        "The artefact is not, or no longer, as the request's precondition says. Fetch it and decide anew."
    )


def preconditions(req: falcon.Request) -> Check:
    """The request's preconditions, to be decided on what is current."""
    conditions = conditions_of(req)

    def check(current: Content | None) -> None:
        etag = modified = None
        if current is not None:
            artefact = digested(req, current)
            etag, modified = f'"{artefact.sha256}"', artefact.time // 1_000_000
        if failed_precondition(req.method, conditions, etag, modified):
            raise changed()

    return check if conditions else accept_any


def absence(directory: str, check: Check, settings: Settings) -> Check:
    """That nothing is there yet, and `check`."""

    def check_absence(current: Content | None) -> None:
        if current is not None:
            once = settings.of(directory, "write_once")
            hint = "It is written once. Choose another name." if once else "PUT replaces it."
            raise Conflict(f"'{directory}' has an artefact '{current.artefact.id}' already. {hint}")
        check(current)

    return check_absence


def whole_number(text: str | None) -> int | None:
    if text is not None and not re.fullmatch("0{0,9}[1-9][0-9]{0,17}", text):
        raise InvalidRequest("'limit' is a whole number from 1. Mend it.")
    return None if text is None else int(text)


def next_page(req: falcon.Request, directory: str, after: str) -> str:
    """The path of the same listing's continuation."""
    query = {name: req.get_param(name) for name in ("format", "prefix", "limit") if req.has_param(name)}
    return f"{href(base_of(req), directory)}?{urlencode(query | {'after': after})}"


def is_form(req: falcon.Request) -> bool:
    return (req.content_type or "").partition(";")[0].strip().lower() == falcon.MEDIA_MULTIPART


def files_of_form(req: falcon.Request, length: int | None) -> Iterator[tuple[str, str, Iterator[bytes]]]:
    """(name without folders, in which browsers differ; type; content) of a form's files. HTTPError
    where it is no form, or none from here on; the content's InvalidRequest where it was cut short."""
    handler = falcon.media.MultipartFormHandler()
    handler.parse_options.max_body_part_count = 0  # any number
    stream = BufferedReader(reader_of(req, length), sys.maxsize if length is None else length)

    def content(part: BodyPart) -> Iterator[bytes]:
        while piece := part.stream.read(PIECE):
            yield piece
        if not stream.peek(1):  # where the delimiter should be
            raise InvalidRequest("The form ends within this file. Send it again.")

    for part in handler.deserialize(stream, req.content_type, length):
        name, type = "\ufffd", ""
        with contextlib.suppress(UnicodeDecodeError):
            name = (part.filename or "").replace("%22", '"')  # as which HTML has it sent
            # `content_type` does not tell a text/plain that was sent from none.
            type = part._headers.get(b"content-type", b"").decode()
        if name:  # else a field, or a file that was not chosen
            yield name.replace("\\", "/").rpartition("/")[2], type, content(part)


def tar(repository: Repository, artefacts: Iterable[Artefact]) -> Iterator[bytes]:
    """The artefacts as a POSIX (pax) archive, with their times."""
    for artefact in artefacts:
        with contextlib.suppress(NotFound), repository.fetch(artefact.directory, artefact.id) as content:
            info, current = tarfile.TarInfo(artefact.id), content.artefact  # it may be another by now
            info.size, info.mtime = current.size, current.time / 1e6
            yield info.tobuf(tarfile.PAX_FORMAT)
            yield from content.pieces()
            yield bytes(-current.size % tarfile.BLOCKSIZE)
    yield bytes(2 * tarfile.BLOCKSIZE)


def render_json(resp: falcon.Response, text: str, type: str = falcon.MEDIA_JSON) -> None:
    resp.content_type = type
    resp.data = text.encode() + b"\n"


def render_page(resp: falcon.Response, text: str) -> None:
    resp.content_type = "text/html; charset=utf-8"
    resp.set_header("Content-Security-Policy", page_policy())
    resp.data = text.encode()


def send_file(req: falcon.Request, resp: falcon.Response, content: Content, start: int, length: int) -> None:
    """Streams a part of the file, which the server closes. Only waitress is handed the file itself:
    of the others, not all keep to its position and to Content-Length."""
    resp.content_length = length
    file = content.detach()
    if "waitress.client_disconnected" in req.env:
        file.seek(start)
        resp.stream = file
    else:
        resp.stream = pieces(file, start, start + length)


def pieces(file: io.FileIO, start: int, stop: int) -> Iterator[bytes]:
    with file:
        while start < stop and (piece := os.pread(file.fileno(), min(PIECE, stop - start), start)):
            start += len(piece)
            yield piece


def reader_of(req: falcon.Request, length: int | None) -> Callable[[int], bytes]:
    """Reads the body: by its length, or, where it is chunked, to the end that the server sets. Mismatch
    where it breaks off."""
    stream = req.env["wsgi.input"] if length is None else req.bounded_stream

    def read(size: int) -> bytes:
        try:
            return bytes(stream.read(size))
        except Exception:  # cheroot's is ValueError, gunicorn's of a family of its own
            raise Mismatch("The body broke off. Send it again.") from None

    return read


def receive(req: falcon.Request, length: int | None, upload: Upload) -> None:
    """Streams a request's body into an upload, on servers that leave that to the application."""
    read = reader_of(req, length)
    while piece := read(PIECE):
        upload.write(piece)


# == The page =====================================================================================
#
# Rendered here, and of use as it is. The script renders no row: after a change it fetches the same
# page anew and takes its table. Below a listing, artefacts and the listing's continuation are the only
# links (what else leads somewhere is a button), so that pip, wget and rclone take nothing else for one.

PAGE = r"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:"><title>@@</title>
<style>
:root { color-scheme: light dark; --soft: light-dark(#59646e, #9aa6b1); --blue: light-dark(#0757a8, #7ab8ff);
  --red: light-dark(#b3261e, #ff938a); --paper: light-dark(#fff, #15191d); --edge: 1px solid #8886;
  font: 1rem/1.5 system-ui, sans-serif; background: var(--paper); accent-color: var(--blue);
  scroll-padding: 3rem 0 6rem; }  /* what has the focus lies clear of what is sticky */
body { max-width: 70rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; } h1 { font-size: 1.4rem; }
a { color: var(--blue); text-decoration: none; } a:hover { text-decoration: underline; } ul { padding: 0; }
.bar, li { display: flex; flex-wrap: wrap; gap: .4rem 1rem; align-items: center; } #search { flex: 1; }
.bar p { flex: 1 0 100%; margin: 0; } li :is(bdi, span) { flex: 1 1 12rem; text-align: left; }
#uploads li { content-visibility: auto; contain-intrinsic-size: auto 2.6rem; padding: 2px; } /* thousands */
li[class] progress { display: none; } .failed span { color: var(--red); } label, input { max-width: 100%; }
button, input { font: inherit; color: inherit; background: var(--paper); border: var(--edge);
  border-radius: .4rem; padding: .3rem .7rem; box-sizing: border-box; }
:focus-visible, .over { outline: 2px solid var(--blue); }
#upload { border: 2px dashed #8886; border-radius: .6rem; padding: 1rem; background: #8881; }
main:not(:has(time)) label:has(#newest) { display: none; } button:hover, tbody tr:hover { background: #8881; }
tbody:empty::after { content: "Nothing here yet."; }
table { width: 100%; border-collapse: collapse; margin-top: 1rem; } tr { border-bottom: var(--edge); }
td, th { padding: .3rem .4rem; text-align: left; white-space: nowrap; } td:nth-child(2) { text-align: right; }
thead, #status { position: sticky; background: var(--paper); } thead { top: 0; } ::placeholder { opacity: 1; }
#status { bottom: 0; max-height: 5rem; overflow: auto; } td:first-child { white-space: normal; width: 99%; }
td button { border: 0; padding: 0 .8rem 0 0; background: none; } .gone a { text-decoration: line-through; }
#upload p, time, output, span, td button:not(:hover), .gone a, ::placeholder { color: var(--soft); }
dialog { max-width: min(30rem, 80vw); background: var(--paper); border: var(--edge); border-radius: .6rem; }
@media (max-width: 48rem) { thead { display: none; } tr { display: flex; flex-wrap: wrap; padding: .3rem 0; }
  td { padding: .1rem .4rem; } td:first-child { flex: 1 1 100%; } }
@media (scripting: none) { .script, td:last-child [type=button] { display: none; } }
</style>
@@
<p id="status" role="status"></p>
<dialog aria-labelledby="question"><form method="dialog" class="bar"><p id="question"></p>
<button>Cancel</button><button id="yes" value="yes"></button></form></dialog>
<template><li><bdi></bdi><progress value="0"></progress><span>waiting</span><button>Cancel</button></template>
<script type="module">
const $ = (query) => document.querySelector(query), all = (query) => [...document.querySelectorAll(query)];
const form = $("#upload"), files = $("#files"), search = $("#search"), newest = $("#newest");
const say = (text) => { $("#status").textContent = text; };
const isolated = (name) => `\u2068${name}\u2069`;  // from the direction of the text around it
const megabytes = (bytes) => (bytes / 1e6).toFixed(1);
// Without credentials (fetch takes none, nobody is to copy any) and what a shell or curl gives a meaning
const plain = (url, {origin, pathname, search} = new URL(url)) =>
  origin + (pathname + search).replace(/['[\]{}]/g, (sign) => `%${sign.charCodeAt().toString(16)}`);
const facts = (row, link = row.querySelector("a")) => ({row, url: plain(link.href), name: link.textContent,
  digest: link.hash.slice("#sha256=".length), time: row.querySelector("time")?.dateTime});
let running = 0, queue = [];  // uploads: how many are at work, and those that wait for their turn
const lines = {stored: 0, failed: 0, open: 0};  // of the uploads
let asking = Promise.resolve();  // the last question; the next one waits for its answer

function tally() {  // what was deleted but has versions stays as a row
  const [shown, there] = [":not([hidden])", ""].map((which) => all(`tbody tr:not(.gone)${which}`).length);
  if (search) $("output").value = `${shown} of ${there}`;
}
function show() {  // the rows: in which order, which of them, and how old they are
  const rows = all("tbody tr").map((row) => facts(row)), words = search?.value.toLowerCase().split(/\s+/);
  if (newest?.checked) rows.sort((a, b) => a.time < b.time ? 1 : -1).map(({row}) => $("tbody").append(row));
  for (const {row, name, digest} of search ? rows : [])
    row.hidden = !words.every((word) => name.toLowerCase().includes(word)
      || word.length >= 12 && digest.startsWith(word));  // as much of it as is shown
  tally();
  for (const time of all("time")) {
    const at = new Date(time.dateTime), hours = Math.max(0, Date.now() - at) / 3600000;
    const [count, unit] = hours < 1 ? [hours * 60, "min"] : hours < 48 ? [hours, "h"] : [hours / 24, "days"];
    time.textContent = count < 1 ? "just now" : `${Math.floor(count)} ${unit} ago`;
    time.title = at.toLocaleString();
  }
}
async function request(method, url, headers) {  // throws what is to be said where it was not done
  const answer = await fetch(plain(url), {method, headers})
    .catch(() => { throw "The server does not answer. Try again later."; });
  if (answer.ok) return answer;
  throw (await answer.json().catch(() => ({}))).detail ?? `The answer was ${answer.status}.`;  // a proxy's
}
addEventListener("unhandledrejection", (event) => { event.preventDefault(); say(event.reason); });
const head = (url) => fetch(url, {method: "HEAD"}).catch(() => ({ok: false}));

async function refresh() {
  const text = await (await request("GET", location, {Accept: "text/html"})).text();
  const table = new DOMParser().parseFromString(text, "text/html").querySelector("table");
  if (!table) throw "The answer is no listing. Load the page anew.";
  $("table").replaceWith(table);
  show();
}
const ask = (question, yes, dialog = $("dialog")) => asking = asking.then(() => new Promise((resolve) => {
  [$("#question").textContent, $("#yes").textContent, dialog.returnValue] = [question, yes, ""];
  dialog.onclose = () => resolve(dialog.returnValue);
  dialog.showModal();
}));
function copy(text, what) {  // navigator.clipboard is there on https and localhost only
  document.oncopy = (event) => [event.preventDefault(), event.clipboardData.setData("text/plain", text)];
  say(document.execCommand("copy") ? `${what} copied.` : `Copy it by hand: ${text}`);
  document.oncopy = null;
}
const actions = {  // of the buttons, by their names
  link: ({url}) => copy(url, "Link"),
  curl: ({url}) => copy(`curl -fOJ '${url}'`, "curl command"),
  sha256: ({digest}) => copy(digest, "SHA-256"),
  async restore({name, button}) {
    if (!await ask(`Restore ${name}?`, "Restore")) return;
    await request("POST", button.formAction);
    await refresh();
  },
  async delete({row, url, digest, name}) {
    const [, size, age] = [...row.cells].map((cell) => cell.textContent);
    const what = age ? `, ${size}, stored ${age}` : " and all that is in it";
    if (!await ask(`Delete ${isolated(name)}${what}?`, "Delete")) return;
    await request("DELETE", url, digest ? {"If-Match": `"${digest}"`} : {});
    const {ok: kept} = await head(`${url}?versions`);
    if (kept) row.className = "gone"; else row.remove();  // where there are versions they stay within reach
    tally();
    say(`${isolated(name)} is deleted.${kept ? " Its versions are kept." : ""}`);
  },
};
document.addEventListener("click", (event) => {
  const button = event.target.closest("button"), action = actions[button?.name];
  if (!action) return;
  event.preventDefault();
  action({button, ...facts(button.closest("tr"))});
});

async function push(chosen) {  // asks first, and once, about what would be replaced
  const folder = $("#into").value.split("/").filter(Boolean);
  const uploads = [], rest = chosen.entries();
  const look = async () => {
    for (const [at, file] of rest) {
      const path = [...folder, file.name], url = plain(form.action) + path.map(encodeURIComponent).join("/");
      const there = await head(url);  // where that fails, what is there is not replaced
      uploads[at] = {file, url, name: path.join("/"), etag: there.ok && there.headers.get("ETag")};
    }
  };
  await Promise.all(Array.from({length: 6}, look));  // the browser holds only so many requests
  const names = uploads.filter(({etag}) => etag).map(({name}) => isolated(name)).join(", ");
  const replace = names && await ask(`Replace ${names}?`, "Replace");
  queue = queue.concat(uploads.filter(({etag}) => replace || !etag).map(upload));
  while (running < 3 && queue.length) work();
}
async function work() {
  for (running++; queue.length;) await queue.shift()();
  if (!--running) refresh();
}
function upload({file, url, name, etag}) {  // adds a line to the list; returns what sends the file
  const line = $("template").content.firstElementChild.cloneNode(true), request = new XMLHttpRequest();
  const [label, bar, note, cancel] = line.children, end = (state, text) => {
    [line.className, note.textContent] = [state, text];
    cancel.remove();
    lines[state]++;
    lines.open--;
    say(`${lines.stored} stored, ${lines.failed} not, ${lines.open} to go.`);
  };
  const send = () => new Promise((resolve) => {
    const began = performance.now();
    request.open("PUT", url);
    request.setRequestHeader(...(etag ? ["If-Match", etag] : ["If-None-Match", "*"]));
    request.responseType = "json";
    request.upload.onprogress = ({loaded, total}) => {
      const speed = loaded / (performance.now() - began) * 1000;
      note.textContent = `${megabytes(loaded)} of ${megabytes(total)} MB, ${megabytes(speed)} MB/s`;
      bar.value = loaded / total;
    };
    request.onload = () => request.status < 300 ? end("stored", "stored")
      : end("failed", request.response?.detail ?? `The answer was ${request.status}.`);
    request.onerror = () => end("failed", "It could not be read or sent. Is it a folder?");
    request.onloadend = resolve;
    request.send(file);
  });
  cancel.onclick = () => {
    queue = queue.filter((other) => other !== send);
    request.abort();
    end("failed", "cancelled");
  };
  label.textContent = bar.ariaLabel = name;
  $("#uploads").append(line);
  lines.open++;
  return send;
}
if (form) {
  files.onchange = () => form.requestSubmit();
  form.onsubmit = (event) => {
    event.preventDefault();
    push([...files.files]);
    files.value = "";
  };
  for (const type of ["dragover", "dragleave", "drop"]) document.addEventListener(type, (event) => {
    if (!event.dataTransfer.types.includes("Files")) return;
    event.preventDefault();
    form.classList.toggle("over", type === "dragover");
    if (type === "drop") files.files = event.dataTransfer.files, form.requestSubmit();
  });
  [search.oninput, newest.onchange] = [show, refresh];
  addEventListener("beforeunload", (event) => { if (running) event.preventDefault(); });
}
show();
</script>
"""
UPLOAD = """<form id="upload" class="bar" method="post" enctype="multipart/form-data" action="%s">
<label class="script">%s pattern="(?!/*$|\\.|.*/\\.).*"
 title="Type a name, or names with / between them. None begins with a dot."></label>
<label>Files <input id="files" type="file" name="file" multiple required></label><button>Upload</button>
<p class="script">Or drop files anywhere on this page.</p></form><ul id="uploads"></ul>
<div class="bar script"><input id="search" type="search" aria-label="Filter" placeholder="Name or SHA-256">
<label><input id="newest" type="checkbox"> Newest first</label><output></output></div>
"""
BUTTON = '<button type="button" name="{}" title="{}">{}</button>'  # of no use without the script
COPY = BUTTON.format("link", "Copy link", "Link") + BUTTON.format("curl", "Copy curl command", "curl")
DELETE = BUTTON.format("delete", "", "Delete")


@functools.cache
def page_policy() -> str:
    """The Content-Security-Policy of a page: only its own style and script, known by their hashes."""
    inline = re.findall(r"<(?:style|script)[^>]*>(.*?)</(?:style|script)>", PAGE, re.S)
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in inline]
    return (
        "default-src 'none'; style-src 'sha256-{}'; script-src 'sha256-{}'; connect-src 'self'; "
        "img-src data:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ).format(*hashes)


def page(title: str, heading: str, content: str) -> str:
    """A page, of its title (text), its heading and its content (HTML)."""
    start, middle, end = PAGE.split("@@")
    return f"{start}{escape(title)}{middle}<main><h1>{heading}</h1>\n{content}</main>{end}"


def page_table(method: str, rows: Iterable[str], foot: str = "") -> str:
    head = "<thead><tr><th>Name<th>Size<th>Stored<th>SHA-256<td></thead>"
    return f'<form method="{method}"><table>{head}\n<tbody>{"".join(rows)}</tbody>{foot}</table></form>\n'


def page_row(artefact: Artefact, link: str, name: str, buttons: str) -> str:
    size, unit = float(artefact.size), 0
    while size >= 999.5:
        size, unit = size / 1000, unit + 1
    sha256, time = artefact.sha256, artefact.modified
    copy = BUTTON.format("sha256", f"Copy {sha256}", sha256[:12]) if sha256 else ""
    return (
        f'<tr><td role="rowheader"><a href="{link}{f"#sha256={sha256}" if sha256 else ""}">'
        f'<bdi>{escape(name)}</bdi></a><td title="{artefact.size} bytes">{size:.3g} {["", *"kMGTPE"][unit]}B'
        f'<td><time datetime="{time}">{time[:16].replace("T", " ")}</time><td>{copy}<td>{COPY}{buttons}\n'
    )


def directories_page(names: Sequence[str], base: str) -> str:
    """The directories; `base`: where the program is mounted."""
    row = '<tr><td role="rowheader"><a href="{}"><bdi>{}</bdi></a><td>{}\n'
    rows = "".join(row.format(href(base, name), escape(name), DELETE) for name in names)
    form = UPLOAD % (f"{base}/artefacts/", 'Directory <input id="into" required')
    table = f"<table><tbody>{rows}</tbody></table>\n"
    return page("Artefacts", "Artefacts", f'<div class="script">{form}</div>{table}')


def directory_page(directory: str, artefacts: Iterable[Artefact], here: str, following: str | None) -> str:
    """A directory's artefacts. `here`: what leads from the page's URL into the directory; `following`:
    the URL of the listing's continuation."""

    def row(artefact: Artefact) -> str:
        link = here + quote(artefact.id)
        versions = f'<button name="versions" formaction="{link}">Versions</button>'
        return page_row(artefact, link, artefact.id, versions + DELETE)

    heading = f'<a href="{"./" if here else "../"}">Artefacts</a> / <bdi>{escape(directory)}</bdi>'
    form = UPLOAD % (here or "./", 'Folder <input id="into" placeholder="optional"')
    more = f'<tfoot><tr><td><a rel="next" href="{escape(following)}">More</a></tfoot>' if following else ""
    return page(f"Artefacts: {directory}", heading, form + page_table("get", map(row, artefacts), more))


def versions_page(versions: Iterable[tuple[Artefact, bool]], directory: str, id: str, base: str) -> str:
    """The versions of an artefact, each with whether it is the current one."""

    def row(artefact: Artefact, current: bool) -> str:
        version = artefact.version
        restore = f'<button name="restore" formaction="?restore={version}">Restore</button>{DELETE}'
        link = href(base, directory, id, version)
        return page_row(artefact, link, version, "<span>current</span>" if current else restore)

    up = f'<a href="{base}/artefacts/">Artefacts</a> / <a href="{href(base, directory)}">'
    heading = f"{up}<bdi>{escape(directory)}</bdi></a> / <bdi>{escape(id)}</bdi>"
    return page(f"Artefacts: {directory}/{id}", heading, page_table("post", itertools.starmap(row, versions)))


def refusals_page(directory: str, refused: Iterable[Mapping[str, Any]], base: str) -> str:
    """What a form's files were refused for, where no script asked."""
    row, title = "<li><bdi>{}</bdi><span>{}</span>", "Not everything was stored"
    rows = "".join(row.format(escape(file["id"] or ""), escape(file["detail"])) for file in refused)
    return page(title, title, f'<ul>{rows}</ul><p><a href="{href(base, directory)}">Back</a></p>')


# == Errors: one mapping from exceptions to answers ===============================================

STATUSES: dict[type[ArtefactsError], int] = {
    InvalidName: 400, InvalidRequest: 400, Unreadable: 400, Mismatch: 400,
    Unauthenticated: 401, Forbidden: 403, NotFound: 404, Conflict: 409,
    PreconditionFailed: 412, TooLarge: 413, Unsupported: 415, UnsatisfiableRange: 416,
    HeaderTooLarge: 431, Damaged: 500, Unimplemented: 501, Unavailable: 503, OutOfSpace: 507,
}
OS_ERRORS = {
    errno.ENOSPC: (507, "The disk is full. Delete something, or tell who runs this server."),
    errno.EDQUOT: (507, "The quota is used up. Delete something, or tell who runs this server."),
    errno.EFBIG: (413, "The file system holds no file of this size. Send less."),
    errno.ENAMETOOLONG: (400, "The file system holds no name of this length. Choose a shorter one."),
    errno.ELOOP: (409, "A symbolic link is in the way; none is followed. Choose another name."),
    errno.ENOTDIR: (409, "Something that is no folder is in the way. Choose another name."),
    errno.EAGAIN: (503, "Another program holds the file. Try again later."),
    errno.EMFILE: (503, "Too many files are open. Try again later."),
    errno.ENFILE: (503, "Too many files are open. Try again later."),
    errno.EROFS: (500, "The data directory cannot be written. Tell who runs this server."),
    errno.EACCES: (500, "The server may not read or change this file or folder. Tell who runs it."),
    errno.EPERM: (500, "The server may not read or change this file or folder. Tell who runs it."),
    errno.EIO: (500, "The disk cannot be read or written. Tell who runs this server."),
}
DETAILS = {  # of the framework's own errors
    400: "The request cannot be understood. Mend it.",
    404: "Nothing is served under this path. Artefacts are at /artefacts/<directory>/<id>.",
    405: "The method is not one for this resource. Use one of those in 'Allow'.",
    500: "Something went wrong here, and nothing was stored. Tell who runs this server; its log says more.",
}


def problem(status: str, detail: str) -> bytes:
    """An error as `application/problem+json` (RFC 9457)."""
    code, _, title = status.partition(" ")
    return json.dumps({"title": title, "status": int(code), "detail": detail}).encode() + b"\n"


def serialize_problem(req: falcon.Request, resp: falcon.Response, error: falcon.HTTPError) -> None:
    render_problem(resp, error.status_code, error.description or DETAILS.get(error.status_code))


def render_problem(resp: falcon.Response, code: int, detail: str | None) -> None:
    resp.status = status = falcon.code_to_http_status(code)
    resp.data = problem(status, detail or status)
    resp.content_type = "application/problem+json"
    resp.set_headers({"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"})


def answer_to(error: Exception) -> tuple[int, str]:
    """(status, detail) of whatever went wrong; OSError and the unforeseen tell no more than helps."""
    if isinstance(error, ArtefactsError):
        return STATUSES[type(error)], error.detail
    if isinstance(error, OSError) and error.errno in OS_ERRORS:
        return OS_ERRORS[error.errno]
    return 500, DETAILS[500]


def refuse(req: falcon.Request, resp: falcon.Response, error: Exception, params: Any) -> None:
    """The one handler of all errors. What went wrong on our side stands in the log."""
    status, detail = answer_to(error)
    if status >= 500:
        log.error("%s %s: %s", req.method, req.path, error, exc_info=detail == DETAILS[500])
    # Not raised as an HTTPError: Falcon keeps that in a cycle with its traceback, in which the connection
    # and what it received would be kept, too, until the garbage is collected.
    resp.set_headers(dict(getattr(error, "headers", None) or {}))
    render_problem(resp, status, detail)


# == Access: who may do what, and what holds for which directory ==================================

HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[\w.~!$&'()*+;=%-]*)(?::[0-9]{0,5})?", re.A)
CHALLENGE = {"WWW-Authenticate": 'Basic realm="artefacts", charset="UTF-8", Bearer realm="artefacts"'}


@dataclass(frozen=True, slots=True)
class Token:
    """Whoever shows it may read and write the directories that match one of these shell patterns."""

    name: str
    sha256: str = ""  # hex, of the token, which itself is stored nowhere
    read: tuple[str, ...] = ()
    write: tuple[str, ...] = ()

    def may(self, action: str, directory: str) -> bool:
        patterns = self.read if action == "read" else self.write
        return "*" in patterns or any(fnmatch.fnmatchcase(directory, pattern) for pattern in patterns)

    def besides(self, other: Token) -> Token:
        """The same, who may also do what the other may."""
        return replace(self, read=self.read + other.read, write=self.write + other.write)


EVERYONE = Token("-", read=("*",), write=("*",))


@dataclass(frozen=True, slots=True)
class Rule:
    """What holds for the directories that match `name`, a shell pattern; None: not said here."""

    name: str
    write_once: bool | None = None
    keep_versions: int | None = None
    max_size: int | None = None  # bytes


@dataclass(frozen=True, slots=True)
class Settings:
    """What the resources and the gate go by."""

    keep_versions: int = 0
    max_size: int | None = None  # bytes of one artefact
    tokens: tuple[Token, ...] = ()
    anonymous: Token = EVERYONE
    rules: tuple[Rule, ...] = ()
    hosts: frozenset[str] | None = None  # names besides the loopback's; None: every name will do

    def of(self, directory: str, key: str) -> Any:
        """What the first rule that matches and says something of the key has for it."""
        for rule in self.rules:
            if getattr(rule, key) is not None and fnmatch.fnmatchcase(directory, rule.name):
                return getattr(rule, key)
        return getattr(self, key, None)

    def caching(self, wanted: str) -> str:
        return f"private, {wanted}" if self.tokens else wanted

    def identify(self, authorization: str | None) -> Token:
        """Who asks, by a Bearer token, or Basic with the token as the password: anybody, where it is none
        of those known. Without tokens, telling people apart is not our business."""
        if authorization is None or not self.tokens:
            return self.anonymous
        scheme, _, secret = authorization.strip().partition(" ")
        if scheme.lower() == "basic":
            try:
                secret = base64.b64decode(secret.strip(), validate=True).decode().partition(":")[2]
            except ValueError:
                secret = ""
        digest = hashlib.sha256(secret.strip().encode()).hexdigest()
        known = [token for token in self.tokens if hmac.compare_digest(token.sha256, digest)]
        if scheme.lower() not in ("basic", "bearer") or not secret or not known:
            return self.anonymous
        return known[0]


class Gate:
    """Stands before every resource, on every server; at a first look, too."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.fields = {"Cache-Control": settings.caching("no-cache"), "X-Content-Type-Options": "nosniff"}

    def process_resource(self, req: falcon.Request, resp: falcon.Response, resource: object,
                         params: dict[str, Any]) -> None:
        reading = req.method in ("GET", "HEAD", "OPTIONS", "PROPFIND")
        self.check_site(req.env, reading)
        if "id" not in params or req.method not in ("GET", "HEAD") or req.has_param("versions"):
            resp.set_headers(self.fields)  # the others have their own
        who = self.settings.identify(req.env.get("HTTP_AUTHORIZATION"))
        req.env["artefacts.who"] = who
        directory = params.get("directory")
        if directory is not None and not who.may("read" if reading else "write", directory):
            self.turn_away(who)
        if directory is None and not who.read and not who.write:
            self.turn_away(who)

    def turn_away(self, who: Token) -> NoReturn:
        if who is self.settings.anonymous and self.settings.tokens:
            detail = "A token is needed here, and one that is known. Send it as Bearer, or as a password."
            raise Unauthenticated(detail, CHALLENGE)
        raise Forbidden("This is not yours to do here. Ask who runs this server.")

    def check_site(self, environ: WSGIEnvironment, reading: bool) -> None:
        """Refuses what another site makes a browser ask for (DNS rebinding; forged requests)."""
        host = environ.get("HTTP_HOST")
        name = host_name(host or "")
        if name is None or (host is None and environ.get("SERVER_PROTOCOL") == "HTTP/1.1"):
            raise InvalidRequest("The Host field is missing, or none (RFC 9112 §3.2). Mend it.")
        if self.settings.hosts is not None and host is not None and not is_loopback(name):
            if name not in self.settings.hosts:
                raise Forbidden(f"This server is not known as '{name}'. --allow-host makes it so.")
        if reading:
            return
        site, origin = environ.get("HTTP_SEC_FETCH_SITE"), environ.get("HTTP_ORIGIN")
        if site is not None:
            foreign = site not in ("same-origin", "none")
        else:
            foreign = origin is not None and (not host or origin.partition("://")[2].lower() != host.lower())
        if foreign:
            raise Forbidden("Another site's page may change nothing here. Use this server's own.")


@functools.lru_cache(256)
def host_name(field: str) -> str | None:
    """The name in a Host field, in lower case and without the port; None where it is malformed."""
    match = HOST.fullmatch(field)
    return match and match[1].lower()


@functools.lru_cache(256)
def is_loopback(host: str) -> bool:
    """Whether a name or an address means this machine to everyone."""
    name = host.strip("[]").lower().removesuffix(".")
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(name).is_loopback
    return name == "localhost" or name.endswith(".localhost")


def number_of_bytes(value: object) -> int:
    """1048576, "500MB", "2GiB"."""
    match = re.fullmatch(r"([0-9]{1,15})\s*([KMGT]?)(i?)B?", str(value).strip(), re.I)
    if match is None or isinstance(value, bool) or (match[3] and not match[2]):
        raise ValueError(f"{value!r} is no number of bytes, such as 1048576, 500MB or 2GiB")
    power = " KMGT".index(match[2].upper() or " ")
    return int(match[1]) * int((1024 if match[3] else 1000) ** power)


def number_of_versions(value: object) -> int:
    """10, or "all"."""
    if value != "all" and (isinstance(value, bool) or not re.fullmatch("[0-9]{1,9}", str(value))):
        raise ValueError(f"{value!r} is neither a number of versions nor 'all'")
    return ALL if value == "all" else int(str(value))


def _of_type(type: type, told: str) -> Callable[[object], Any]:
    def convert(value: object) -> object:
        if not isinstance(value, type) or (type is str and not re.fullmatch(".+", str(value))):
            raise ValueError(f"{value!r} is not {told}")
        return value

    return convert


def _patterns(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(pattern, str) for pattern in value):
        raise ValueError(f"{value!r} is not a list of patterns")
    return tuple(value)


def _digest(value: object) -> str:
    text = value if isinstance(value, str) else ""
    if not SHA256.fullmatch(text) or text == hashlib.sha256().hexdigest():
        raise ValueError("'sha256' is not the SHA-256 of a token, in hex")  # it may be the token: not told
    return text


_NAME = _of_type(str, "a name")
CONFIG: dict[str, dict[str, Callable[[Any], Any]]] = {
    "anonymous": {"read": _patterns, "write": _patterns},
    "token": {"name": _NAME, "sha256": _digest, "read": _patterns, "write": _patterns},
    "directory": {"name": _NAME, "write_once": _of_type(bool, "true or false"),
                  "keep_versions": number_of_versions, "max_size": number_of_bytes},
}


def read_config(path: str | os.PathLike[str]) -> Settings:
    """The settings in a TOML file. OSError; ValueError names the place of a mistake: nothing in the
    file is ignored."""
    with open(path, "rb") as file:
        try:
            table = tomllib.load(file)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: {error}") from None
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in CONFIG}
    for name, sections in table.items():
        if name not in CONFIG:
            raise ValueError(f"{path}: {name!r} is none of {', '.join(CONFIG)}")
        sections = [sections] if name == "anonymous" else sections
        for number, section in enumerate(sections if isinstance(sections, list) else [None], 1):
            place = f"{path}: [[{name}]] {number}" if name != "anonymous" else f"{path}: [anonymous]"
            found[name].append(_checked(place, section, CONFIG[name]))
    names = [token["name"] for token in found["token"]]
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: two tokens have the same name")
    digests = [token["sha256"] for token in found["token"]]
    if len(set(digests)) < len(digests):
        raise ValueError(f"{path}: two tokens have the same sha256")
    closed = bool(found["token"] or found["anonymous"])
    anonymous = Token("-", **dict(*found["anonymous"])) if closed else EVERYONE
    tokens = tuple(Token(**token).besides(anonymous) for token in found["token"])
    rules = tuple(Rule(**rule) for rule in found["directory"])
    return Settings(tokens=tokens, anonymous=anonymous, rules=rules)


def _checked(place: str, section: object, keys: dict[str, Callable[[Any], Any]]) -> dict[str, Any]:
    if not isinstance(section, dict):
        raise ValueError(f"{place} is not a table")
    for key in section:
        if key not in keys:
            raise ValueError(f"{place}: unknown key {key!r}; known are {', '.join(keys)}")
    for key in ("name", "sha256"):
        if key in keys and key not in section:
            raise ValueError(f"{place}: '{key}' is missing")
    try:
        return {key: keys[key](value) for key, value in section.items()}
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


# == The application ==============================================================================


def create_app(data: str | os.PathLike[str] = "data", *, keep_versions: int = 0, max_size: int | None = None,
               fsync: bool = True, config: str | os.PathLike[str] | None = None) -> falcon.App[Any, Any]:
    """The repository in `data` (made where it is missing) as a WSGI application.

    keep_versions: versions kept before the current one (ALL: every one); max_size: bytes of one
    artefact; fsync: False gives up durability in a power cut; config: a TOML file of tokens and rules
    for directories, without which everyone may do everything. OSError where `data` or `config`
    cannot be used; ValueError for a mistake in the latter."""
    settings = read_config(config) if config is not None else Settings()
    settings = replace(settings, keep_versions=keep_versions, max_size=max_size)
    return application(make_repository(data, settings, fsync), settings)


def make_repository(data: str | os.PathLike[str], settings: Settings, fsync: bool) -> Repository:
    def keep_versions(directory: str) -> int:
        return int(settings.of(directory, "keep_versions"))

    return Repository(data, keep_versions=keep_versions, fsync=fsync)


def application(repository: Repository, settings: Settings) -> falcon.App[Any, Any]:
    app: falcon.App[Any, Any] = falcon.App(middleware=[Gate(settings)])
    app.req_options.strip_url_path_trailing_slash = True
    app.set_error_serializer(serialize_problem)
    app.add_error_handler(Exception, refuse)  # but of the framework's own, whose handlers are nearer
    app.add_route("/", Root())
    for base in ("/artefacts", "/artefact"):
        app.add_route(base, Directories(repository, settings))
        app.add_route(base + "/{directory}", Directory(repository, settings))
        app.add_route(base + "/{directory}/{id:path}", ArtefactResource(repository, settings))
    return app


# == Connections: HTTP/1.1 on a socket (RFC 9112) =================================================
#
# What makes a file server of a loop over sockets and some threads (`Server`).
#
# - The socket is the loop's alone. A worker asks the application, or a stream for its next piece, and
#   leaves what it got: nothing is locked here, and no thread waits for a client. A connection has one
#   request under way at a time; what is sent behind it (pipelining) waits.
# - A first look: as soon as a request's header is there, the application is called with
#   HEADERS_ONLY in its environ. It answers 100 where it needs the body, a lock, or a while; 102 where
#   the look itself takes a while, so that a worker takes it; any other answer is final. So a refusal
#   comes before the body, from the code that would refuse it after; and what can be answered at once
#   is, without a hand-over between threads.
# - A body is received into an `Upload`: written once, beside the data, and hashed meanwhile, so that
#   the commit is a rename. A large one comes in large pieces, all through one buffer; a file is sent by
#   the kernel, from its cache to the socket (sendfile).
# - A connection stays open after 204, 304 and chunked answers, which end by themselves.
# - One that ends reads on for LINGER seconds: closed at once it would be reset, and the client might
#   lose the answer (RFC 9112 §9.6).

LINGER = 30  # seconds
RECEIVE = 64 * 1024  # bytes asked of a socket at once
BUFFER = 4 * 1024 * 1024  # bytes asked of it where they are all of one body: few large writes cost the least
SEND = 512 * 1024  # bytes of a stream taken, and sent, at once: each is a hand-over between threads
SENT = 60 * 1024  # bytes of a file sent at once: see `File.send`
TURN = 8 * 1024 * 1024  # bytes sent to one client before the others have their turn
GATHERED = 1024 * 1024  # bytes that are to be in a socket before it is read, while the hash is far behind
MAX_HEADER, MAX_BODY = 64 * 1024, 10**18  # bytes
MAX_LINE = 4096  # bytes of a line between chunks, of all lines behind them, of a logged one
KNOWN_LINE, KNOWN_FIELDS = 256, 1024  # bytes that a header's may have to be remembered
OF_LINE = ("REQUEST_METHOD", "PATH_INFO", "QUERY_STRING", "REQUEST_URI", "HTTP_HOST")  # in an environ
TRANSFER_ENCODING = re.compile(rb"\r\ntransfer-encoding:([^\r]*)", re.I)
ABSOLUTE_FORM = re.compile("https?://([^/?#]*)", re.I)
MORE = getattr(socket, "MSG_MORE", 0)  # what follows goes into the same packet; not on macOS
FIRST_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,15})(?:;[\t\x20-\x7e\x80-\xff]*)?\r\n")
NEXT_CHUNK = re.compile(rb"\r\n" + FIRST_CHUNK.pattern)
TRAILER = re.compile(rb"(?:[^\r\n]+\r\n)*\r\n")
BARE = re.compile(rb"\r(?!\n|\Z)|(?<!\r)\n")
Answer = tuple[str, list[tuple[str, str]], Iterable[bytes], str]  # status, fields, content; who asked


class Header(NamedTuple):
    """What the header of a request says."""

    environ: WSGIEnvironment  # but for the client's, and the body; shared, so never changed
    length: int | None  # bytes of the body; None: it is chunked
    closes: bool  # whether the connection is to end with the answer
    expects: bool  # 100 Continue, before the body is sent


def checked_header(server: Server, raw: bytes) -> Header:
    """What the server's parser makes of a header, where nobody could read another message;
    ArtefactsError."""
    header = server.parse(raw)
    environ = header.environ
    codings = [coding.strip(b" \t").lower() for coding in TRANSFER_ENCODING.findall(raw)]
    if codings and (codings != [b"chunked"] or header.length is not None or "CONTENT_LENGTH" in environ):
        # RFC 9112 §6.1: what follows such a header could be taken for another request
        raise Unreadable("Transfer-Encoding: chunked goes with HTTP/1.1, without a length. Mend it.")
    if header.length is not None and header.length >= MAX_BODY:
        raise TooLarge("No file system holds so many bytes. Send less.")
    if absolute := ABSOLUTE_FORM.match(environ["REQUEST_URI"]):  # it goes before Host (RFC 9112 §3.2.2)
        environ["HTTP_HOST"] = absolute[1]
    options = environ.get("HTTP_CONNECTION", "").lower().split(",")
    return header._replace(closes=header.closes or "close" in map(str.strip, options))


known_header = functools.lru_cache(1024)(checked_header)


def read_header(server: Server, raw: bytes) -> Header:
    """Clients send the same fields again and again: line and fields are remembered apart. As above."""
    line, _, fields = raw.partition(b"\r\n")
    if not line.endswith(b" HTTP/1.1") or len(line) > KNOWN_LINE or len(fields) > KNOWN_FIELDS:
        return checked_header(server, raw)
    header = known_header(server, b"GET / HTTP/1.1\r\n" + fields)
    own = known_header(server, line + b"\r\n\r\n")
    environ = header.environ | {name: own.environ[name] for name in OF_LINE if name in own.environ}
    return header._replace(environ=environ)


class Chunks:
    """Takes a chunked body apart as it arrives (RFC 9112 §7.1). Its trailer is dropped, as §7.1.2 allows."""

    complete = False

    def __init__(self) -> None:
        self.remain = 0  # bytes of this chunk's content
        self.expected = FIRST_CHUNK  # behind that

    def take(self, data: bytes) -> tuple[bytes, int]:
        """(content, how many bytes were taken); the others come again, with more. Unreadable."""
        content, at = bytearray(), 0
        while at < len(data) and not self.complete:
            if self.remain:
                piece = data[at : at + self.remain]
                content += piece
                at, self.remain = at + len(piece), self.remain - len(piece)
            elif (line := self.expected.match(data, at)) and line.end() - at <= MAX_LINE:
                at, self.complete = line.end(), self.expected is TRAILER
                self.remain = 0 if self.complete else int(line[1], 16)
                self.expected = NEXT_CHUNK if self.remain else TRAILER
            else:
                rest = data[at:]
                broken = self.expected is not TRAILER and b"\n" in rest[2:]
                broken |= self.expected is NEXT_CHUNK and not b"\r\n".startswith(rest[:2])
                if broken or BARE.search(rest) or len(rest) > MAX_LINE:
                    raise Unreadable("The chunks of the body cannot be told apart. Mend the request.")
                break
        return bytes(content), at


class Request:
    """One request as it is received, its body into an Upload, which the connection closes."""

    def __init__(self, header: Header, client: WSGIEnvironment, repository: Repository) -> None:
        self.header = header
        self.chunks = Chunks() if header.length is None else None
        self.remain = header.length or 0  # bytes of a body without chunks
        self.looked = False  # whether the application had its first look before the body
        self.upload: Upload | None = None
        if header.length != 0:
            limited = header.environ["REQUEST_METHOD"] not in ("PUT", "POST")
            self.upload = repository.stage(PIECE if limited else None)  # of a push, the resource knows it
        self.environ = header.environ | client | {"wsgi.input": self.upload or io.BytesIO()}

    @property
    def complete(self) -> bool:
        return self.chunks.complete if self.chunks is not None else not self.remain

    @property
    def over(self) -> bool:
        """Whether no more is to be received: it is complete, or what came cannot be kept."""
        return self.complete or (self.upload is not None and self.upload.fault is not None)

    def receive(self, data: bytes | memoryview) -> int:
        """Takes what is its own of the data: so many bytes. Unreadable. What keeps it from being stored waits
        in the upload for the application."""
        content: bytes | memoryview
        if self.chunks is not None:
            content, taken = self.chunks.take(bytes(data))
        else:
            content, taken = data[: self.remain], min(len(data), self.remain)
            self.remain -= taken
        if self.upload is not None:
            try:
                self.upload.write(content)
            except (ArtefactsError, OSError) as error:
                self.upload.fault = error
            if self.complete:
                self.environ["CONTENT_LENGTH"] = str(self.upload.size)
        return taken


class File:
    """A `wsgi.file_wrapper` (PEP 3333): a file on its way out, from its position on. It is not read: the
    connection has the kernel send it, and closes it."""

    remain = 0  # bytes

    def __init__(self, file: io.FileIO, size: int = 0) -> None:
        self.file, self.at, self.close = file, file.tell(), file.close

    def __bool__(self) -> bool:
        return self.remain > 0

    def __iter__(self) -> Iterator[bytes]:
        return iter(functools.partial(self.file.read, PIECE), b"")

    def send(self, to: int) -> int:
        """How much the socket took; OSError, BlockingIOError among them."""
        # Whole pages, and no more than one packet of the loopback holds (65,483 bytes): 64 KiB would each
        # time leave 53 for another one, which costs as much, and wakes the client again.
        sent = os.sendfile(to, self.file.fileno(), self.at, min(SENT, self.remain))
        if not sent:
            raise OSError(errno.EIO, "the file was cut short in place")
        self.at, self.remain = self.at + sent, self.remain - sent
        return sent


def ask(application: WSGIApplication, environ: WSGIEnvironment) -> Answer:
    def start_response(status: str, fields: list[tuple[str, str]], exc_info: object = None) -> None:
        started[:] = status, fields

    started: list[Any] = []
    body: Iterable[bytes] = application(environ, start_response)  # type: ignore[arg-type]
    return started[0], started[1], body, environ.get("artefacts.who", EVERYONE).name


def close_body(body: object) -> None:
    """Whoever ends an answer closes what it was of, where that can be closed (PEP 3333)."""
    try:
        if hasattr(body, "close"):
            body.close()
    except OSError as error:  # of an upload's unlinking, too: a sweep comes to it. Nobody here can do better
        log.error("what is done with cannot be closed, or removed: %s", error)


def framed(body: Iterable[bytes], chunked: bool) -> Generator[bytes, None, None]:
    """What is sent of a body, some SEND bytes at a time: each is a hand-over. Closes it."""
    try:
        gathered = bytearray()
        for piece in itertools.chain(body, (b"",)):
            gathered += piece
            if gathered and (len(gathered) >= SEND or not piece):
                yield b"%x\r\n%b\r\n" % (len(gathered), bytes(gathered)) if chunked else bytes(gathered)
                gathered.clear()
        if chunked:
            yield b"0\r\n\r\n"
    finally:
        close_body(body)


class Connection:
    """What one client sends and is sent. The loop calls `readable`, `writable` and the `handle_`s; a
    worker calls `service`, and until that has left its `result` nobody else touches the request."""

    socket: Any  # these are the loop's part
    connected: bool
    close: Callable[[], None]

    def __init__(self, server: Server, address: tuple[str, int]) -> None:
        self.server, self.address = server, address
        self.client = {
            "REMOTE_ADDR": address[0], "REMOTE_HOST": address[0], "REMOTE_PORT": str(address[1]),
            "wsgi.file_wrapper": File,
        }  # fmt: skip
        self.received = b""  # of which nothing is made yet
        self.line = b""  # the first one of the request
        self.request: Request | None = None  # under way: being received, worked on, or answered
        self.working = False  # whether it is a worker's
        self.result: list[Any] = []  # what the worker left
        self.answered = False  # whether what is sent is its answer, and not 100 Continue
        self.body: Iterable[bytes] = ()  # of the answer
        self.out: bytes | memoryview = b""  # what is to be sent; then
        self.file: File | None = None  # what of it is to be sent; or
        self.stream: Generator[bytes, None, None] | None = None  # where more comes from
        self.lingering = 0.0  # until when what arrives is thrown away
        self.closes = False  # whether the connection ends with the answer
        self.will_close = False  # at once
        self.last_activity = time.time()
        self.gathering: Future[None] | None = None  # what `gather` awaits, or awaited
        self.unread = b""  # how much of what was sent, when `is_silent` looked last

    # -- what the loop asks and tells --

    def readable(self) -> bool:
        return not (self.working or self.out or self.file or self.will_close)

    def writable(self) -> bool:
        return bool(self.result or self.out or self.file or (self.will_close and not self.working))

    def handle_read(self) -> None:
        self.last_activity = time.time()
        body = self.request if self.request is not None and self.request.remain else None
        data = self.server.buffer[: RECEIVE if body is None else body.remain]
        try:
            data = data[: self.socket.recv_into(data)]
        except BlockingIOError:
            return
        except OSError:
            data = data[:0]
        if not data or 0 < self.lingering < time.time():
            self.handle_close()
        elif body is not None:
            body.receive(data)
            self.gather(body)
        elif not self.lingering:
            self.received += data
        self.go_on()

    def handle_write(self) -> None:
        if self.result:
            self.working = False
            self.take(self.result.pop())
        elif self.will_close:
            self.handle_close()
        else:
            self.flush()
        self.go_on()

    def handle_close(self) -> None:
        """The client is gone, or is to be; what a worker is at is closed when that has left its result."""
        if self.working and not self.result:
            self.will_close = True
            return
        if self.lingering and self.connected:
            # The client may have ended what it sends before all of it was read here (POLLHUP).
            with contextlib.suppress(OSError):
                for _ in range(TURN // BUFFER):
                    self.socket.recv_into(self.server.buffer)
        self.release()
        self.close()

    def handle_expt(self) -> None:
        """Urgent data, which is no part of HTTP, and would be told of again and again."""
        self.handle_close()

    def is_silent(self, since: float) -> bool:
        """Whether nothing has moved since then. A client that reads slowly shows in its socket's buffer; as
        writable that is told of only when a good part of it is free."""
        if self.gathering is not None:
            self.await_bytes(1)  # the hash may wait for others so long that who trickles would seem silent
        if self.writable() and self.last_activity < since:
            with contextlib.suppress(OSError):  # not on macOS
                before, self.unread = self.unread, fcntl.ioctl(self.socket, termios.TIOCOUTQ, bytes(4))
                if self.unread != before:
                    self.last_activity = time.time()
        # In this order: a worker sets the time before it leaves its result.
        return bool(self.result or not self.working) and self.last_activity < since

    # -- receiving --

    def gather(self, request: Request) -> None:
        """While the hash is far behind, nothing ends sooner for being received sooner, and few large pieces
        cost less than many small ones. So the loop is not told of the socket before GATHERED bytes are
        there, or the client has ended, or the hash is done with what it is at: that always comes, and
        nobody who sends little waits for longer."""
        hashing = request.upload.hashing if request.upload and request.remain > GATHERED else None
        if hashing is not None and hashing is not self.gathering:
            self.gathering = hashing
            self.await_bytes(GATHERED)
            hashing.add_done_callback(lambda _: self.await_bytes(1))  # at once, where it is done

    def await_bytes(self, least: int) -> None:
        """Also called by a thread that hashes, when the socket may be closed already."""
        with contextlib.suppress(OSError):
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, least)

    def go_on(self) -> None:
        """Works on what was received, until somebody has to be waited for."""
        while self.connected and self.readable() and not self.lingering:
            try:
                if not self.step():
                    return
            except ArtefactsError as error:
                code, detail = answer_to(error)
                content = problem(status := falcon.code_to_http_status(code), detail)
                fields = [("content-type", "application/problem+json"), ("content-length", str(len(content)))]
                self.reply((status, fields, [content], "-"))

    def step(self) -> bool:
        """Whether something came of it; ArtefactsError of what cannot be read."""
        request = self.request = self.request or self.begin()
        if request is None:
            return False
        if not request.over:
            self.received = self.received[request.receive(self.received) :]
        if request.over:
            self.perform(request)
            return True
        if request.looked:
            return False
        request.looked = True
        answer = self.look(request)
        if answer[0].startswith("102"):
            self.hand_over()
        else:
            self.admit(request, answer)
        return True

    def begin(self) -> Request | None:
        """What the header begins, if it is there; ArtefactsError."""
        self.received = self.received.lstrip(b"\r\n")  # RFC 9112 §2.2
        header, end, rest = self.received.partition(b"\r\n\r\n")
        if not end and len(header) <= MAX_HEADER:
            return None
        self.received, self.line = rest, header[:MAX_LINE].partition(b"\r\n")[0]
        if len(header) > MAX_HEADER:
            raise HeaderTooLarge(f"The header has more than {MAX_HEADER} bytes. Send less.")
        read = read_header(self.server, header + end)
        return Request(read, self.client, self.server.repository)

    def look(self, request: Request) -> Answer:
        """The application's first look at it."""
        more = {HEADERS_ONLY: request.over, ON_WORKER: self.working}
        return ask(self.server.application, request.environ | more)

    def admit(self, request: Request, answer: Answer) -> None:
        """Sends the answer, or, where it is 100, has the body come."""
        if not answer[0].startswith("100"):
            self.reply(answer)
        elif request.header.expects:
            self.out = b"HTTP/1.1 100 Continue\r\n\r\n"
            self.flush()

    def perform(self, request: Request) -> None:
        """Answers it at once where that can be done; else it is a worker's. What is durable takes a while."""
        upload = request.upload
        if upload is None or (upload.size <= PIECE and not self.server.repository.durable):
            answer = self.look(request)
            if not answer[0].startswith("10"):
                self.reply(answer)
                return
        self.hand_over()

    # -- what a worker does --

    def hand_over(self) -> None:
        self.working = True
        self.server.add_task(self)

    def service(self) -> None:
        """Gets what takes a while: the answer, or the next piece of its stream (empty behind the last)."""
        result: Any = None
        try:
            request = self.request
            assert request is not None
            if self.stream is not None:
                result = next(self.stream, b"")
            elif request.over:
                result = ask(self.server.application, request.environ)
            else:
                result = self.look(request)
        except Exception as error:
            unforeseen = not isinstance(error, (ArtefactsError, OSError))
            log.error("an answer broke off: %s", error, exc_info=unforeseen)
        self.last_activity = time.time()
        self.result.append(result)  # and nothing more: it is the loop's from now on
        self.server.pull_trigger()

    def take(self, result: Any) -> None:
        """What it left; None where it broke off."""
        request = self.request
        if result is None or request is None:
            self.handle_close()
        elif not self.answered:
            self.admit(request, result)
        else:
            self.out, self.stream = result, self.stream if result else None
            self.flush()

    # -- sending --

    def reply(self, answer: Answer) -> None:
        """Begins to send the answer to the request under way, or to what is none."""
        status, fields, body, who = answer
        request, environ = self.request, self.request.environ if self.request else {}
        if request is not None:
            close_body(request.upload)  # so that nothing of a refused upload is left when the client knows
        version, length = environ.get("SERVER_PROTOCOL", "HTTP/1.1"), dict(fields).get("content-length")
        ended = length is not None or status[:3] in ("204", "304")  # RFC 9112 §6.3
        chunked = not ended and version == "HTTP/1.1"
        last = request is None or not request.complete or request.header.closes
        self.closes = last or not (ended or chunked)
        if self.closes:
            fields.append(("connection", "close"))
        elif version == "HTTP/1.0":
            fields.append(("connection", "keep-alive"))
        if chunked:
            fields.append(("transfer-encoding", "chunked"))
        fields += (("date", http_date(int(time.time()))), ("server", "artefacts"))
        lines = [f"{version} {status}", *itertools.starmap(field_line, fields), "\r\n"]
        self.out, self.answered, self.body = "\r\n".join(lines).encode("latin-1"), True, body
        if isinstance(body, list):
            self.out += b"".join(body)
        elif isinstance(body, File):
            self.file, body.remain = body, int(length or 0)
        else:
            self.body = self.stream = framed(body, chunked)
        if not self.server.quiet:
            size = length if environ.get("REQUEST_METHOD") != "HEAD" else None
            log_request(self.address[0], who, self.line, f"{status[:3]} {size or '-'}")
        self.flush()

    def flush(self) -> None:
        """Sends what the socket takes, TURN bytes at most: then the others have theirs."""
        left = TURN
        try:
            while self.out:
                sent = self.socket.send(self.out, MORE if self.file else 0)
                self.out, left = memoryview(self.out)[sent:], left - sent
            while self.file and left > 0:
                left -= self.file.send(self.socket.fileno())
        except BlockingIOError:
            pass
        except OSError:  # the client is gone, or the file was cut short
            self.handle_close()
        if left < TURN:
            self.last_activity, self.unread = time.time(), b""  # what is unread then is another part
        if self.connected and not self.out and not self.file:
            self.sent()

    def sent(self) -> None:
        """What there was has left."""
        self.out = b""  # and not an empty view of it
        if self.stream is not None:
            self.hand_over()
        elif self.answered:
            self.release()
            if self.closes:
                self.lingering, self.received = time.time() + LINGER, b""
                with contextlib.suppress(OSError):
                    self.socket.shutdown(socket.SHUT_WR)

    def release(self) -> None:
        """Closes what was received and what was answered."""
        left = [result[2] for result in self.result if isinstance(result, tuple)]
        for body in (self.body, self.request and self.request.upload, *left):
            close_body(body)
        self.answered, self.request, self.body, self.file, self.stream = False, None, (), None, None
        self.gathering = None


def log_request(address: str, who: str, line: bytes, answer: str) -> None:
    """A line in the common log format; what is not printable ASCII in it is escaped."""
    when = time.strftime("%d/%b/%Y:%H:%M:%S +0000", time.gmtime())
    who = escaped(who).replace(" ", "\\x20")
    # A log that cannot be written is no reason to answer less; and who would be told?
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(f'{address} - {who} [{when}] "{escaped(line.decode("latin-1"))}" {answer}\n')


def escaped(text: str) -> str:
    return re.sub(r'[^\x20-\x7e]|["\\]', lambda match: f"\\x{ord(match[0]):02x}", text)


@functools.lru_cache(1024)
def field_line(name: str, value: str) -> str:
    """A line of an answer's header, its name as people are used to read it."""
    if "\n" in value or "\r" in value:
        raise ValueError(f"the field {name} has a line break in it")
    name = {"etag": "ETag", "www-authenticate": "WWW-Authenticate"}.get(name, name.title())
    return f"{name}: {value}"


# == On waitress ==================================================================================
#
# Stock waitress runs the application well. Here it is asked for less: to listen, to wait for sockets and
# to hold the threads; and for its parser of headers. That relies on attributes that it does not
# document (REQUIRED; most have not changed since 2012). Where one is missing, the stock server runs.

REQUIRED = (
    (waitress.wasyncore.dispatcher, "socket connected close del_channel _fileno _map"),
    (waitress.server.TcpWSGIServer, "channel_class active_channels application adj task_dispatcher add_task"),
    (waitress.server.TcpWSGIServer, "maintenance trigger pull_trigger effective_port"),
    (waitress.parser, "ParsingError TransferEncodingNotImplemented"),
    (waitress.parser.HTTPRequestParser, "parse_header chunked content_length body_rcv"),
    (waitress.parser.HTTPRequestParser, "connection_close expect_continue"),
    (waitress.task.WSGITask, "get_environment"),
)
GRACE = 10  # seconds that requests in flight have to finish after SIGTERM or Ctrl-C


class Channel(Connection, waitress.wasyncore.dispatcher):
    """A connection as waitress's loop and its threads know it."""

    total_outbufs_len = 0  # `run` asks for it, of a stock channel; here the request stays until all has left

    def __init__(self, server: Server, sock: socket.socket, address: tuple[str, int], adj: Any,
                 map: dict[int, Any]) -> None:
        Connection.__init__(self, server, address)
        waitress.wasyncore.dispatcher.__init__(self, sock, map)
        self.connected = True
        server.active_channels[self._fileno] = self

    @property
    def requests(self) -> bool:
        return self.working

    def del_channel(self, map: dict[int, Any] | None = None) -> None:
        self.server.active_channels.pop(self._fileno, None)
        super().del_channel(map)

    def cancel(self) -> None:
        """Of what no worker came to before the end."""
        self.working = False


class Server(waitress.server.TcpWSGIServer):
    channel_class = Channel

    def __init__(self, app: WSGIApplication, repository: Repository, quiet: bool, **options: Any) -> None:
        self.repository, self.quiet = repository, quiet
        self.buffer = memoryview(bytearray(BUFFER))  # the loop's: what is received is taken out at once
        super().__init__(app, **options)

    def maintenance(self, now: float) -> None:
        """Closes connections on which nothing moves."""
        for channel in list(self.active_channels.values()):
            if channel.is_silent(now - self.adj.channel_timeout):
                channel.handle_close()

    def parse(self, header: bytes) -> Header:
        """Unreadable, Unimplemented."""
        parser = waitress.parser.HTTPRequestParser(self.adj)
        try:
            parser.parse_header(header)
        except waitress.parser.TransferEncodingNotImplemented as error:
            raise Unimplemented(f"{error}. Mend the request.") from None
        except waitress.parser.ParsingError as error:
            raise Unreadable(f"{error}. Mend the request.") from None
        except ValueError:  # of urlsplit; of int with more than 4300 digits
            raise Unreadable("The header cannot be read. Mend the request.") from None
        parser.body_rcv = None
        channel = types.SimpleNamespace(server=self, addr=("", 0), check_client_disconnected=None)
        environ = waitress.task.WSGITask(channel, parser).get_environment()
        length = None if parser.chunked else parser.content_length
        return Header(environ, length, parser.connection_close, parser.expect_continue)


def make_server(app: WSGIApplication, repository: Repository, options: argparse.Namespace) -> Any:
    """A waitress server, listening; its own kind where waitress has what that relies on."""
    settings: dict[str, Any] = {
        "host": options.host, "port": options.port, "threads": options.threads, "ident": "artefacts",
        "recv_bytes": RECEIVE, "asyncore_use_poll": True, "connection_limit": connection_limit(),
        "max_request_body_size": 1 << 62, "max_request_header_size": MAX_HEADER,
        "clear_untrusted_proxy_headers": False, "log_socket_errors": False,
    }
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # a line per queued request
    required = ((of, name) for of, names in REQUIRED for name in names.split())
    missing = [f"{of.__name__}.{name}" for of, name in required if lacks(of, name)]
    if missing:
        log.warning("this waitress lacks %s: large uploads and small fetches are slower", ", ".join(missing))
        return waitress.server.create_server(app, **settings)
    return Server(app, repository, options.quiet, **settings)


def lacks(of: Any, name: str) -> bool:
    """Whether a module has no such attribute, or the objects of a class, be it by their `__init__`."""
    made = of.__init__.__code__.co_names if isinstance(of, type) else ()  # type: ignore[misc]
    return not hasattr(of, name) and name not in made


def run(server: Any, url: str) -> None:
    """Tells the URL, and serves until SIGTERM or Ctrl-C; then lets requests in flight finish, GRACE
    seconds at most."""

    def stop(number: int, frame: object) -> None:
        if stopping:
            raise SystemExit(1)  # the second signal does not wait
        stopping.append(number)
        server.trigger.pull_trigger()

    stopping: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    print(url, flush=True)
    while not stopping:
        waitress.wasyncore.loop(timeout=30, use_poll=True, map=server._map, count=1)
    waitress.wasyncore.dispatcher.close(server)  # no new connections
    deadline = time.monotonic() + GRACE
    while time.monotonic() < deadline and server.active_channels:
        for channel in server.active_channels.values():
            channel.will_close |= not (channel.requests or channel.request or channel.total_outbufs_len)
        waitress.wasyncore.loop(timeout=0.1, use_poll=True, map=server._map, count=1)
    server.task_dispatcher.shutdown(timeout=max(0.1, deadline - time.monotonic()))
    for channel in list(server.active_channels.values()):
        channel.handle_close()  # which discards what was received of an upload
    waitress.wasyncore.close_all(server._map, ignore_all=True)


# == The program ==================================================================================

CONNECTIONS = 4000  # at once, where the limit on open files admits them


def connection_limit() -> int:
    """How many connections can be held, each with a file, after asking for as many as may be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * CONNECTIONS + 200
    if soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(10, min(CONNECTIONS, (soft - 200) // 2))


def number_between(low: int, high: int) -> Callable[[object], int]:
    def convert(value: object) -> int:
        if not re.fullmatch("[0-9]{1,9}", str(value)) or not low <= int(str(value)) <= high:
            raise ValueError(f"{value!r} is no number from {low} to {high}")
        return int(str(value))

    return convert


def path(text: str) -> str:
    if not text:  # an unset variable, not the working directory
        raise ValueError("no path is given")
    return text


def as_argument(convert: Callable[[str], T]) -> Callable[[str], T]:
    """As argparse wants it, so that it tells the reason."""

    def converted(text: str) -> T:
        try:
            return convert(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return converted


def verify(repository: Reader) -> int:
    """Tells of everything that is not as it was stored; 1 where something is damaged or unreadable. On
    a terminal with a progress bar."""
    counts, read = dict.fromkeys(("whole", "new", "changed", "damaged", "unreadable"), 0), 0
    total = bytes_below(repository.root) if sys.stderr.isatty() else 0
    for artefact, found in repository.verify():
        counts[found] += 1
        read += artefact.size
        if found != "whole":
            sys.stderr.write("\r\033[K" if total else "")  # the bar's line, for this one
            version = artefact.version if artefact.time else ""  # not known of what cannot be read
            print(f"{found}: {artefact.directory}/{artefact.id} {version}".rstrip(), flush=True)
        if total:
            part = min(1, read / total)
            sys.stderr.write(f"\r[{'#' * round(part * 40):40}] {part:4.0%}, {sum(counts.values())} files ")
            sys.stderr.flush()
    sys.stderr.write("\n" if total else "")
    if not counts["unreadable"]:
        del counts["unreadable"]
    print(", ".join(f"{number} {found}" for found, number in counts.items()))
    return 1 if counts["damaged"] or "unreadable" in counts else 0


def bytes_below(path: str) -> int:
    """In all files below; what comes and goes meanwhile may be missing."""
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.lstat(os.path.join(folder, name)).st_size
    return total


class Options(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; --help lists the options\n")


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    options = Options(prog="artefacts.py", description=(__doc__ or "").partition("\n")[0])
    add = options.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    add("--port", type=as_argument(number_between(0, 65535)), default=8080, metavar="N",
        help="port to listen on, 0 for a free one (default: %(default)s)")
    add("--data", type=as_argument(path), default="data", metavar="DIR",
        help="where the artefacts are (default: %(default)s)")
    add("--keep-versions", type=as_argument(number_of_versions), default=0, metavar="N",
        help="versions kept before the current one, or 'all' (default: 0)")
    add("--max-size", type=as_argument(number_of_bytes), metavar="BYTES",
        help="largest artefact accepted, such as 2GiB (default: any)")
    add("--threads", type=as_argument(number_between(1, 1000)), default=8, metavar="N",
        help="requests worked on at once (default: %(default)s)")
    add("--no-fsync", action="store_true", help="do not wait for the disk; a power cut may then lose pushes")
    add("--config", type=as_argument(path), metavar="FILE", help="tokens, and rules for directories (TOML)")
    add("--open", action="store_true", help="without tokens, serve the network all the same")
    add("--allow-host", action="append", default=[], metavar="NAME",
        help="without tokens, a name besides the loopback's that this server is asked by")
    add("--new-token", metavar="NAME", help="print a new token and its lines for --config, and exit")
    add("--verify", action="store_true", help="read everything, tell what is damaged, and exit")
    add("--quiet", action="store_true", help="no line for each request")
    return options.parse_args(arguments)


def new_token(name: str) -> str:
    """A token, and the lines for --config that make it known."""
    if not name or not name.isprintable():
        raise ValueError(f"{name!r} is not a name")
    token = secrets.token_urlsafe(32)
    digest = hashlib.sha256(token.encode()).hexdigest()
    return (
        f"{token}\n\n# the token above is stored nowhere; these lines are for the --config file:\n"
        f"[[token]]\nname = {json.dumps(name, ensure_ascii=False)}\n"
        f'sha256 = "{digest}"\nread = ["*"]\nwrite = ["*"]'
    )


def settings_of(options: argparse.Namespace) -> Settings:
    """OSError, ValueError as `read_config`; ValueError where the network would be let in unasked."""
    settings = read_config(options.config) if options.config is not None else Settings()
    if not settings.tokens and not options.open and not is_loopback(options.host):
        raise ValueError(
            f"without tokens, everyone who reaches {options.host} could do everything: configure tokens "
            "(--new-token, --config), listen on 127.0.0.1, or say --open"
        )
    guarded = is_loopback(options.host) and not settings.tokens
    hosts = frozenset(name.lower() for name in options.allow_host) if guarded else None
    return replace(settings, keep_versions=options.keep_versions, max_size=options.max_size, hosts=hosts)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_options(arguments)
    logging.basicConfig(format="%(name)s: %(message)s")
    try:
        if options.new_token is not None:
            print(new_token(options.new_token))
            return 0
        settings = settings_of(options)
        if options.verify:
            with contextlib.suppress(KeyboardInterrupt):
                return verify(Reader(options.data))
            return 130
        repository = make_repository(options.data, settings, not options.no_fsync)
        server = make_server(application(repository, settings), repository, options)
    except Unavailable as error:
        sys.stderr.write(f"artefacts.py: {options.data}: {error}\n")
        return 2
    except OSError as error:
        where = error.filename or f"{options.host}:{options.port}"
        sys.stderr.write(f"artefacts.py: {where}: {error.strerror}\n")
        return 2
    except ValueError as error:
        sys.stderr.write(f"artefacts.py: {error}\n")
        return 2
    host = options.host.strip("[]")
    host = f"[{host}]" if ":" in host else host
    gc.freeze()  # what is there now stays: it need not be looked through again and again
    gc.set_threshold(50_000, 20, 20)
    run(server, f"http://{host}:{server.effective_port}/artefacts/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
