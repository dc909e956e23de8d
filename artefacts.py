#!/usr/bin/env python3
"""Artefacts: a repository for build outputs, over plain HTTP, in plain files.

    python artefacts.py                               serves data/ at http://127.0.0.1:8080/
    curl -T app.zip http://127.0.0.1:8080/artefacts/nightly/
    create_app("data")                                the same as a WSGI application

URLs (`/artefact/` is the same as `/artefacts/`, with or without a trailing slash):

    /artefacts/                   GET   the directories
    /artefacts/<directory>        GET   its artefacts    POST  a form    DELETE  all of it
    /artefacts/<directory>/<id>   GET   PUT   POST   DELETE   one artefact,
        ?versions ?version=V ?at=TIME ?restore=V ?from=PATH   and its earlier versions

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
    Access           decides who may do what, and which rules hold for a directory.
    The page         renders listings for people.
    Errors           become responses, by one table.
    Resources        parse a request, call the repository, render the response.
    The application  puts these together: `create_app`.
    Connections      serve it over HTTP/1.1 on waitress's listeners and threads.
    The program      reads options, and runs until it is stopped: `main`.
"""

from __future__ import annotations

import argparse
import base64
import bisect
import codecs
import collections
import contextlib
import copy
import ctypes
import datetime
import errno
import fcntl
import fnmatch
import functools
import gc
import hashlib
import heapq
import hmac
import io
import ipaddress
import itertools
import json
import logging
import math
import os
import re
import resource
import secrets
import selectors
import signal
import socket
import stat
import struct
import sys
import tarfile
import threading
import time
import tomllib
import zipfile
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from html import escape
from typing import IO, TYPE_CHECKING, Any, NamedTuple, NoReturn, ParamSpec, Self, TypeVar, cast
from urllib.parse import quote, unquote, unquote_to_bytes, urlencode
from wsgiref.util import FileWrapper

import falcon
import waitress.server
import waitress.task
import waitress.wasyncore
from falcon import HTTPBadRequest, HTTPForbidden, HTTPUnauthorized, HTTPUnsupportedMediaType
from falcon import Request as Req
from falcon import Response as Resp
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
HASH_PIECE = 1024 * 1024  # bytes of an upload that a thread hashes at once, behind its writer
HASH_BEHIND = 4 * HASH_PIECE  # bytes staged and not hashed: from here on the hash limits the upload
MAX_ID = 1024  # bytes of an id; below any usual data directory its path stays within PATH_MAX
SMALL = 64 * 1024  # bytes: an artefact up to this size is read at once, and cached
KNOWN = 32_768  # artefacts whose metadata is cached, names of listings, durable folders: some 20 MB
MEMORY = 8 * 1024 * 1024  # bytes of small artefacts that are cached
NAMES_AT_ONCE = 10_000  # of a folder: some 1 MB
SCANS = 5  # times that a folder is read if it changes meanwhile
LOCK_ATTEMPTS = 20  # to take a lock on the event loop
PAUSES = (0.0, 0.001, 0.002, 0.004)  # seconds between lookups of a name that is missing on NFS or GlusterFS
RETRIES = 20  # lookups of a name that another host keeps replacing, and of versions that commits change
TICK = 20_000_000  # ns: file times are at least this precise (the kernel's clock ticks every 1 to 10 ms)

HAS_ATTRIBUTES = hasattr(os, "getxattr")  # not on macOS

SEGMENT = re.compile(r"(?!\.)[^\x00-\x1f\x7f-\x9f/\\\ufffd\ud800-\udfff]{1,255}")
LISTED = re.compile(SEGMENT.pattern + "/?")  # as `Files.names` returns it
VERSION = re.compile(r"[0-9]{8}T[0-9]{6}\.[0-9]{6}Z")
SHA256 = re.compile(r"[0-9a-f]{64}")
MEDIA_TYPE = re.compile(r"[\w!#$&^.+-]{1,127}/[\w!#$&^.+-]{1,127}(?:[ \t]*;[\x20-\x7e\t]{0,200})?", re.A)
log = logging.getLogger("artefacts")
EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
MICROSECOND = datetime.timedelta(microseconds=1)
DAY = 86_400_000_000  # µs
LAST_TIME = 253402300799_999999  # µs: the end of the year 9999, the last time that a date can express

# Types by the last extension. `mimetypes` differs between interpreters and machines; this table does not.
# Compressed files have the type of the compressed format, and never a Content-Encoding. "image/" begins a
# group; then "png" stands for image/png of *.png, and "jpeg=jpg,jpeg" for image/jpeg of both.
TYPE_TABLE = """
text/ plain=txt,text,log,out,err,ini,cfg,conf,properties,env,nfo,list,sha1,sha224,sha256,sha384,sha512,md5
plain=sum,sfv,c,h,cc,cpp,cxx,hpp,hxx,cs,go,rs,java,kt,scala,swift,rb,lua
plain=r,gradle,cmake,mk,proto,tf,bat,ps1,lock,srt html=html,htm css javascript=js,mjs,cjs markdown=md,markdown
csv tab-separated-values=tsv x-diff=diff,patch x-rst=rst x-python=py x-tex=tex x-shellscript=sh,bash
asciidoc=adoc calendar=ics vcard=vcf vtt x-perl=pl
application/ json=json,map,har,module ld+json=jsonld geo+json=geojson jsonl=jsonl,ndjson x-ipynb+json=ipynb
sarif+json=sarif manifest+json=webmanifest toml yaml=yaml,yml sql xml=xml,xsd,xsl,xslt,pom,rdf,wsdl
xhtml+xml=xhtml rss+xml=rss atom+xml=atom dash+xml=mpd vnd.apple.mpegurl=m3u8 wasm vnd.ms-fontobject=eot pdf
postscript=ps,eps rtf epub+zip=epub msword=doc
vnd.openxmlformats-officedocument.wordprocessingml.document=docx vnd.ms-excel=xls
vnd.openxmlformats-officedocument.spreadsheetml.sheet=xlsx vnd.ms-powerpoint=ppt
vnd.openxmlformats-officedocument.presentationml.presentation=pptx vnd.oasis.opendocument.text=odt
vnd.oasis.opendocument.spreadsheet=ods vnd.oasis.opendocument.presentation=odp x-tar=tar,gem,ova
zip=zip,whl,egg,nupkg gzip=gz,tgz,crate x-bzip2=bz2,tbz,tbz2 x-xz=xz,txz zstd=zst,tzst x-brotli=br x-lz4=lz4
x-lzip=lz x-lzma=lzma vnd.rar=rar x-7z-compressed=7z x-cpio=cpio vnd.ms-cab-compressed=cab
java-archive=jar,war,ear,aar java-vm=class vnd.debian.binary-package=deb,udeb x-rpm=rpm
vnd.android.package-archive=apk,aab x-msi=msi vnd.snap=snap vnd.microsoft.portable-executable=exe,dll
x-apple-diskimage=dmg x-iso9660-image=iso vnd.flatpak=flatpak vnd.appimage=appimage x-qemu-disk=qcow2
x-sharedlib=so x-object=o x-archive=a vnd.apache.parquet=parquet vnd.apache.arrow.file=arrow,feather avro onnx
x-hdf5=h5,hdf5 x-netcdf=nc vnd.sqlite3=sqlite,sqlite3,db pgp-signature=asc,sig x-pem-file=pem
x-x509-ca-cert=crt,cer pkcs10=csr x-pkcs12=p12,pfx
image/ png apng jpeg=jpg,jpeg gif webp avif jxl svg+xml=svg vnd.microsoft.icon=ico bmp tiff=tif,tiff heic heif
vnd.adobe.photoshop=psd x-xcf=xcf x-portable-pixmap=ppm x-portable-graymap=pgm x-portable-bitmap=pbm
x-portable-anymap=pnm
audio/ mpeg=mp3 wav flac ogg=ogg,oga,opus mp4=m4a aac aiff=aif,aiff midi=mid,midi webm=weba
video/ mp4=mp4,m4v webm ogg=ogv quicktime=mov,qt x-msvideo=avi matroska=mkv mpeg=mpg,mpeg 3gpp=3gp
font/ woff woff2 ttf otf collection=ttc
"""
TYPES: dict[str, str] = {}
for _word in TYPE_TABLE.split():
    if _word.endswith("/"):
        _group = _word
    else:
        _subtype, _, _extensions = _word.partition("=")
        TYPES.update(dict.fromkeys((_extensions or _subtype).split(","), _group + _subtype))
UNSPECIFIC_TYPES = ("application/octet-stream", falcon.MEDIA_URLENCODED, falcon.MEDIA_MULTIPART)

K = TypeVar("K")
P = ParamSpec("P")
T = TypeVar("T")


class ArtefactsError(Exception):
    """Base of all errors of the storage. `detail` tells the person what happened and what to do."""

    def __init__(self, detail: str, code: str = "in_the_way") -> None:
        super().__init__(detail)
        self.detail, self.code = detail, code


class InvalidName(ArtefactsError):
    """A name breaks a rule. The detail says which one."""


class Mismatch(ArtefactsError):
    """The bytes that arrived have another length or digest than announced."""


class NotFound(ArtefactsError):
    """The directory, artefact or version does not exist."""


class Conflict(ArtefactsError):
    """Something that exists prevents the change. `code`: "exists", "in_the_way" or "write_once"."""


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
def format_second(format: str, seconds: int) -> str:
    """Return a time in seconds since the epoch in a format of strftime, in UTC."""
    return (EPOCH + datetime.timedelta(seconds=seconds)).strftime(format)


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

    @property
    def version(self) -> str:
        """Return the name of the version, `20261123T014455.123456Z`. Names sort by time."""
        return f"{format_second('%Y%m%dT%H%M%S', self.time // 1_000_000)}.{self.time % 1_000_000:06d}Z"

    @property
    def modified(self) -> str:
        """Return the same time in the format of RFC 3339, in UTC."""
        return f"{format_second('%Y-%m-%dT%H:%M:%S', self.time // 1_000_000)}.{self.time % 1_000_000:06d}Z"


def version_time(version: str) -> int:
    """Return the µs since the epoch that a version is named after. NotFound: it is not a version."""
    if not is_version(version):
        raise NotFound(f"'{version}' is not a version. ?versions lists them.")
    return (datetime.datetime.fromisoformat(version) - EPOCH) // MICROSECOND


def is_version(name: str) -> bool:
    with contextlib.suppress(ValueError):
        return bool(VERSION.fullmatch(name)) and datetime.datetime.fromisoformat(name) >= EPOCH
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


@functools.lru_cache(1024)
def check_names(directory: str, id: str = "-") -> tuple[str, ...]:
    """Return the segments of the id. InvalidName: a name breaks a rule, or the id is too long."""
    if directory == LOST_AND_FOUND:
        raise InvalidName(f"'{directory}' belongs to the file system. Choose another name.")
    check_segment(directory, "directory")
    if len(id) > MAX_ID // 4 and len(id.encode(errors="replace")) > MAX_ID:
        raise InvalidName(f"The id is longer than {MAX_ID} bytes. Choose a shorter one.")
    return tuple(check_segment(segment, "id") for segment in id.split("/"))


@functools.lru_cache(1024)
def specific_type(announced: str | None) -> str | None:
    """Return the media type that a client chose, None if it is missing, malformed or unspecific."""
    announced = (announced or "").strip()
    if not MEDIA_TYPE.fullmatch(announced):
        return None
    return None if announced.partition(";")[0].rstrip().lower() in UNSPECIFIC_TYPES else announced


@functools.lru_cache(1024)
def type_of(id: str, announced: str | None = None) -> str:
    """Return the media type to store: the client's if it is specific, else the type of the name."""
    by_name = TYPES.get(os.path.splitext(id)[1][1:].lower(), "application/octet-stream")
    return specific_type(announced) or by_name


# == Files: folders and files below the data directory, by descriptor =============================

FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # a FIFO must not block the reader
STAGE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
STAGED = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # NFS locks only what can be written
LOCK = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
FS_IOC_GETVERSION = 0x80087601  # linux/fs.h: the generation of an inode
NOT_A_FILE = {errno.ENOTDIR, errno.ELOOP, errno.ENXIO}  # opening a link or a socket, or below a file
MISSING = (FileNotFoundError, NotADirectoryError)
NOTHING = contextlib.nullcontext()  # for `with … or NOTHING as …`


def pauses_of(path: str) -> tuple[float, ...]:
    """Return PAUSES if a folder is on a file system where a name may be missing while a file is replaced."""
    while not os.path.exists(path):
        path = os.path.dirname(path)
    with contextlib.suppress(OSError), open("/proc/self/mountinfo", "rb") as mounts:  # proc(5)
        device = os.stat(path).st_dev
        for fields in map(bytes.split, mounts):
            if fields[2] == b"%d:%d" % (os.major(device), os.minor(device)):
                is_shared = fields[fields.index(b"-") + 1].startswith((b"nfs", b"fuse.glusterfs"))
                return PAUSES if is_shared else ()
    return ()


def retry_on_estale(look_up: Callable[P, T]) -> Callable[P, T]:
    """Retry on ESTALE: on NFS and GlusterFS another host may replace a file between lookup and use."""

    @functools.wraps(look_up)
    def retry(*args: P.args, **kwargs: P.kwargs) -> T:
        for _ in range(RETRIES):
            try:
                return look_up(*args, **kwargs)
            except OSError as error:
                if error.errno != errno.ESTALE:
                    raise
        return look_up(*args, **kwargs)

    return retry


def is_removed(error: OSError) -> bool:
    """Return whether what was in an open folder is missing now. ESTALE: another host removed the folder."""
    return isinstance(error, MISSING) or error.errno == errno.ESTALE


class Descriptor:
    """A file descriptor. It is closed at the end of a `with` block, by `close()`, or when nothing refers to
    it. Code that wrote to a file closes it explicitly: only then an error of the close is raised."""

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def release(self) -> int:
        """Return the descriptor, which the caller closes. This object is then empty."""
        fd, self.fd = self.fd, -1
        return fd

    def close(self, *_: object) -> None:
        if (fd := self.fd) >= 0:
            self.fd = -1
            os.close(fd)

    def __enter__(self) -> int:
        return self.fd

    __exit__ = __del__ = close


NO_FILE = Descriptor(-1)  # for an object that has no open file (yet)


class Bounded(dict[K, T]):
    """A cache with a limit on total cost. When the limit is exceeded, the whole cache is cleared."""

    def __init__(self, limit: int) -> None:
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
    """Folders and files below one root. Follows no symbolic link. Any method may raise OSError. A folder's
    path is a sequence of names; a file is a name in an open folder. The caller closes both."""

    def __init__(self, root: str, fsync: bool) -> None:
        """root: an absolute path without links; fsync: False gives up durability in a power cut."""
        self.root, self.fsync = root, fsync
        self.durable_folders = Bounded[object, bool](KNOWN)  # those whose names are known to be durable
        self.pauses = pauses_of(root)
        self._listed = Bounded[tuple[int, ...], list[str]](KNOWN)
        self._token, self._number = secrets.token_hex(8), itertools.count()

    def sync(self, fd: int) -> None:
        """Fsync. Never retried: the kernel has dropped the pages, and a second call would report success."""
        if self.fsync:
            os.fsync(fd)

    def unique_name(self) -> str:
        """Return a name that no other thread, process or host uses for a staging file."""
        return f"{self._token}-{os.getpid()}-{next(self._number)}"

    def make_root(self, path: str) -> None:
        """Make the root if it is missing, and the folders that it is in, durably."""
        if not os.path.lexists(path):
            self.make_root(parent := os.path.dirname(path))
            with contextlib.suppress(FileExistsError):
                os.mkdir(path)
            with Descriptor(os.open(parent, FOLDER)) as folder:
                self.sync(folder)

    def open_folder(self, *names: str) -> Descriptor:
        """Return an open folder, by default the root. Unavailable: there is no root."""
        try:
            folder = Descriptor(os.open(f"{self.root}/{names[0]}" if names else self.root, FOLDER))
        except FileNotFoundError as error:
            if names:
                self.open_folder().close()
                raise
            raise Unavailable("The data directory does not exist. Tell who runs this server.") from error
        for name in names[1:]:
            with folder as parent:
                folder = Descriptor(os.open(name, FOLDER, dir_fd=parent))
        return folder

    def open_own(self, name: str) -> Descriptor:
        """Return one of the repository's own folders, open, made if it is missing."""
        try:
            return self.open_folder(name)
        except FileNotFoundError:
            with contextlib.suppress(FileExistsError):
                os.mkdir(f"{self.root}/{name}")
            return self.open_folder(name)

    def make_folder(self, *names: str) -> Descriptor:
        """Return an open folder, made if it is missing. Conflict: a file or a link is in the way. All names
        in the path are durable, parents first: the maker of one that exists may have died before."""
        with contextlib.suppress(*MISSING):
            folder = self.open_folder(*names)
            if not self.fsync or unique_inode(folder.fd) in self.durable_folders:
                return folder
        folder = self.open_folder()
        for name in names:
            with folder as parent:
                try:
                    folder = Descriptor(os.open(name, FOLDER, dir_fd=parent))
                except FileNotFoundError:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(name, dir_fd=parent)
                    folder = Descriptor(os.open(name, FOLDER, dir_fd=parent))
                except NotADirectoryError:
                    raise in_the_way("/".join(names[1:])) from None
                if self.fsync and (key := unique_inode(folder.fd)) not in self.durable_folders:
                    self.sync(parent)
                    if key is not None:
                        self.durable_folders.keep(key, True)
        return folder

    def lock(self, name: str, wait: bool = True) -> Descriptor:
        """Take a lock against threads, processes and hosts. BlockingIOError: it is taken, and not `wait`.

        Another process mostly holds it for 0.1 ms: a few attempts cost less than a worker thread."""
        with self.open_own(LOCKS) as locks:
            lock = Descriptor(os.open(name, LOCK, 0o666, dir_fd=locks))
        for _ in range(0 if wait else LOCK_ATTEMPTS):
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return lock
            time.sleep(0.00005)
        fcntl.flock(lock.fd, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        return lock

    def names(self, folder: int, prefix: str = "", after: str = "") -> Iterable[str]:
        """Return the valid names in an open folder, sorted, a folder's with a slash at its end; of a large
        one without most of those that cannot match. A folder that changes meanwhile is read again, and all
        names count: btrfs does not show a name that is replaced after the folder was opened. So is a folder
        in which an NFS client has renamed an open file to `.nfs…`: its name may be missing. The result is
        cached while the folder's times do not change, unless they could hide a change within one tick of the
        clock."""
        texts: list[str] = []  # the names, sorted, NAMES_AT_ONCE in each
        start = 0  # of the texts of the current read
        for scan in range(SCANS):
            now, key = time.time_ns(), identity(status := os.fstat(folder))
            if (cached := self._listed.get(key)) is not None:
                return cached
            with os.scandir(folder) as entries:
                found = (
                    entry.name + "/" if entry.is_dir(follow_symlinks=False) else entry.name
                    for entry in entries
                )
                while names := sorted(itertools.islice(found, NAMES_AT_ONCE)):
                    texts.append("\0".join(names))
            settled = now > status.st_ctime_ns + TICK
            if self.pauses and ".nfs" in "".join(texts[start:]):
                start = len(texts)
                time.sleep(self.pauses[scan % len(self.pauses)])
            elif identity(os.fstat(folder)) == key and (settled or scan):
                break
        if sum(text.count("\0") + 1 for text in texts) > KNOWN:
            return filter(LISTED.fullmatch, in_order(texts, prefix, after))
        names = [*filter(LISTED.fullmatch, in_order(texts))]
        if not scan:
            self._listed.keep(key, names, len(names) + 1)
        return names

    def walk(self, folder: int, inside: str = "", prefix: str = "", after: str = "", longest: int = MAX_ID,
             on_error: Callable[[str, OSError], None] | None = None) -> Iterator[tuple[str, int, str]]:
        """Yield (id, its open folder, its name there) for every file below an open folder whose id begins
        with `prefix` and sorts after `after`, sorted. Enter only folders where an id can match. inside: the
        folder's id, with a slash. longest: bytes of an id. Without `on_error`, raise what it gets."""
        after_here = after[len(inside) :] if after.startswith(inside) else ""
        try:
            names = self.names(folder, prefix[len(inside) :], after_here)
        except OSError as error:
            if not is_removed(error):
                raise
            return
        for name in names:
            id = inside + name
            if len(id) > MAX_ID // 4 and len(id.encode()) > longest:
                continue
            if name[-1] != "/":
                if id.startswith(prefix) and id > after:
                    yield id, folder, name
            elif id.startswith(prefix[: len(id)]) and (id > after or after.startswith(id)):
                try:
                    with Descriptor(os.open(name[:-1], FOLDER, dir_fd=folder)) as child:
                        yield from self.walk(child, id, prefix, after, longest, on_error)
                except OSError as error:
                    if on_error is None:
                        raise
                    on_error(id, error)

    def remove_tree(self, parent: int, name: str) -> None:
        """Remove a folder with everything below it. Folders below are first moved up into it: shutil.rmtree
        fails at 1,000 levels before Python 3.13, and at read-only folders."""
        with Descriptor(os.open(name, FOLDER, dir_fd=parent)) as top:
            folders = ["."]
            while folders:
                moved = folders.pop()
                with Descriptor(os.open(moved, FOLDER, dir_fd=top)) as folder:
                    for entry in [*os.scandir(folder)]:
                        if entry.is_dir(follow_symlinks=False):
                            with Descriptor(os.open(entry.name, FOLDER, dir_fd=folder)) as child:
                                with contextlib.suppress(PermissionError):  # it is not ours
                                    os.fchmod(child, 0o700)  # a read-only folder cannot be moved
                            folders.append(self.unique_name())
                            os.rename(entry.name, folders[-1], src_dir_fd=folder, dst_dir_fd=top)
                        else:
                            os.unlink(entry.name, dir_fd=folder)
                if moved != ".":
                    os.rmdir(moved, dir_fd=top)
        os.rmdir(name, dir_fd=parent)

    def remove_while_empty(self, *names: str) -> None:
        """Remove a folder if it is empty, then those above it, but not the first of the path."""
        parents = [self.open_folder(names[0])]
        for name in names[1:-1]:
            parents.append(Descriptor(os.open(name, FOLDER, dir_fd=parents[-1].fd)))
        try:
            for name in reversed(names[1:]):
                with parents.pop() as parent:
                    os.rmdir(name, dir_fd=parent)
        except OSError as error:
            # ENOENT: it was removed by hand, or is missing on one of GlusterFS's replicas only.
            # EBUSY: something is mounted there.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT, errno.EBUSY):
                raise


def in_order(texts: Iterable[str], prefix: str = "", after: str = "") -> Iterator[str]:
    """Yield the names in sorted texts (NUL is between them) once each, sorted. 1,000,000 take 30 MB."""
    begin, low = (id[: id.find("/") + 1] or id for id in (prefix, after))  # their first segments

    def select(text: str) -> Iterator[str]:
        names = text.split("\0")
        text = "\0".join(names[bisect.bisect_left(names, max(begin, low)) :])
        names.clear()
        for match in re.finditer("[^\0]+", text):
            if not match[0].startswith(begin):
                break
            yield match[0]

    for name, _ in itertools.groupby(heapq.merge(*map(select, texts))):
        yield name


def explain_refusal(directory: str, error: OSError) -> None:
    """Raise CannotStore if the file system of a directory refused a name or a rename."""
    if error.errno in (errno.EXDEV, errno.EBUSY):
        detail = ("is on another file system than the data directory (a mount, an overlay, a project quota): "
                  "nothing can be moved to or from it. Tell who runs this server.")
    elif error.errno in (errno.EINVAL, errno.EILSEQ, errno.ENAMETOOLONG):
        detail = "is on a file system that does not accept this name. Choose another."
    else:
        return  # the caller raises it: with this frame, it would keep itself and its files open
    raise CannotStore(f"The directory '{directory}' {detail}") from error


def report_unreadable(directory: str, unreadable: list[str] | None, id: str, error: OSError) -> None:
    """Log what cannot be read, and add its id to `unreadable`. Skip what is removed."""
    if not is_removed(error):
        log.error("%s/%s cannot be read: %s", directory, id, error)
        if unreadable is not None:
            unreadable.append(id)


def in_the_way(path: str) -> Conflict:
    return Conflict(f"Something that is no artefact (a folder, a file, a link) is in the way of '{path}'.")


def unique_inode(folder: int) -> object:
    """Return a key that no other folder ever has: a new folder may get the inode number of a removed one, but
    not its generation. None: the file system has no generations, as tmpfs, overlayfs, NFS and FUSE."""
    status = os.fstat(folder)
    try:
        return status.st_dev, status.st_ino, fcntl.ioctl(folder, FS_IOC_GETVERSION, bytes(8))
    except OSError:  # the folder is then synced each time
        return None


def identity(status: os.stat_result) -> tuple[int, ...]:
    """Return a value that changes whenever a file's bytes or attributes do."""
    return (status.st_ino, status.st_dev, status.st_ctime_ns, status.st_mtime_ns, status.st_size)


def write_all(fd: int, data: bytes | bytearray | memoryview) -> None:
    written = os.write(fd, data)
    while written < len(data):
        with memoryview(data) as view, view[written:] as rest:
            written += os.write(fd, rest)


# == Metadata: type and digest in extended attributes =============================================

TYPE_ATTRIBUTE = "user.mime_type"  # freedesktop.org's name
DIGEST_ATTRIBUTE = "user.artefacts.sha256"  # "<hex> <size> <mtime in ns>", and " utf-8" for `is_utf8`
PUSHED_ATTRIBUTE = "user.artefacts.pushed"  # µs since the epoch: the last push of bytes that were current
Key = tuple[str, str, tuple[int, ...]]  # directory, id (a file can have two names), `identity` of the file
# Errors of a file system that has no attributes, or none for us. The cache in memory replaces them.
NO_ATTRIBUTES = {
    errno.ENOTSUP, errno.EPERM, errno.EACCES, errno.EROFS, errno.ENOSYS, errno.E2BIG, errno.ENODATA,
}  # fmt: skip


def read_attribute(fd: int, name: str) -> str:
    """Return an extended attribute of an open file, "" if it or the support for it is missing."""
    try:
        return os.getxattr(fd, name).decode("latin-1") if HAS_ATTRIBUTES else ""
    except OSError as error:
        if error.errno not in NO_ATTRIBUTES:
            raise
        return ""


def inherit_access(fd: int, folder: int) -> bool:
    """Give a staging file the group of a setgid folder and its default ACL (acl(5)), as if it were made
    there. Return whether anything changed, which the caller then makes durable."""
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


def write_attribute(fd: int, name: str, value: str) -> bool:
    """Store an extended attribute with an open file. Return False if its file system has none."""
    try:
        if HAS_ATTRIBUTES:
            os.setxattr(fd, name, value.encode())
        return HAS_ATTRIBUTES
    except OSError as error:
        if error.errno not in NO_ATTRIBUTES:
            raise
        return False


def write_digest(fd: int, artefact: Artefact, status: os.stat_result) -> None:
    utf8 = " utf-8" if artefact.is_utf8 else ""
    value = f"{artefact.sha256} {status.st_size} {status.st_mtime_ns}{utf8}"
    write_attribute(fd, DIGEST_ATTRIBUTE, value)


def time_of(status: os.stat_result) -> int:
    """Return a file's modification time in µs since the epoch, cut to what a date can express."""
    return min(max(status.st_mtime_ns // 1000, 0), LAST_TIME)


def pieces_from(read: Callable[[int, int], bytes]) -> Iterator[bytes]:
    """Yield all bytes that a function (of the first byte and the length) reads, PIECE at a time."""
    start = 0
    while piece := read(start, PIECE):
        yield piece
        start += len(piece)


def is_utf8(id: str, type: str, read: Callable[[int, int], bytes]) -> bool:
    """Return whether a file has a text type by its name, and its bytes are UTF-8."""
    if not type.startswith("text/") or type != type_of(id):
        return False
    try:
        for _ in codecs.iterdecode(pieces_from(read), "utf-8"):
            pass
        return True
    except UnicodeDecodeError:
        return False


def sha256_of(fd: int) -> str:
    """Return the SHA-256 of an open file, in hex. Reads the whole file."""
    with io.FileIO(fd, closefd=False) as file:
        file.seek(0)
        return hashlib.file_digest(file, "sha256").hexdigest()


class Metadata:
    """Caches what is known about files; a changed file is read again. Without the attributes, listings take
    three times as long; without the bytes of small artefacts, fetches take 1.12 times as long."""

    def __init__(self) -> None:
        self.known = Bounded[Key, Artefact](KNOWN)
        self.small = Bounded[Key, Content](MEMORY)

    def read(self, directory: str, id: str, fd: int, status: os.stat_result) -> Artefact:
        """Return the artefact with type and digest from the file's attributes. A stale digest is None."""
        known = self.known.get(key := (directory, id, identity(status)))
        if known is None:
            type = type_of(id, read_attribute(fd, TYPE_ATTRIBUTE))
            digest, *stamp = read_attribute(fd, DIGEST_ATTRIBUTE).split(" ")
            is_current = stamp[:2] == [str(status.st_size), str(status.st_mtime_ns)]
            sha256 = digest if is_current and SHA256.fullmatch(digest) else None
            utf8 = sha256 is not None and stamp[2:] == ["utf-8"] and type == type_of(id)
            known = Artefact(directory, id, status.st_size, time_of(status), type, sha256, utf8)
            self.known.keep(key, known)
        return known

    def store_digest(self, fd: int, artefact: Artefact, status: os.stat_result) -> None:
        """Store a digest that was computed from an open file, in its attributes if they can be written, and
        in the cache, unless the file changed since `status`. A failure only costs computing it again."""
        if identity(os.fstat(fd)) == identity(status):
            with contextlib.suppress(OSError):
                write_digest(fd, artefact, status)
            after = os.fstat(fd)
            if (after.st_size, after.st_mtime_ns) == (status.st_size, status.st_mtime_ns):
                key = artefact.directory, artefact.id, identity(after)
                self.known.keep(key, replace(artefact, time=time_of(after)))


class Content:
    """One open file, which stays the same whatever happens to its name. The receiver closes it."""

    def __init__(self, metadata: Metadata, artefact: Artefact, file: Descriptor, status: os.stat_result,
                 whole: bytes | None = None) -> None:
        self.artefact = artefact  # as known without reading the file: the digest may be None
        self.file, self.status = file, status
        self._metadata, self._whole = metadata, whole

    def digested(self) -> Artefact:
        """Return the artefact with its digest. A missing one is computed from the whole file, and stored."""
        if self.artefact.sha256 is None:
            # A change within one tick of the file system's clock would have the same time.
            time.sleep(min(max(0, self.status.st_mtime_ns + TICK - time.time_ns()), TICK) / 1e9)
            utf8 = is_utf8(self.artefact.id, self.artefact.type, self.read)
            self.artefact = replace(self.artefact, sha256=sha256_of(self.file.fd), is_utf8=utf8)
            self._metadata.store_digest(self.file.fd, self.artefact, self.status)
        return self.artefact

    def verified(self) -> tuple[Artefact, str]:
        """Read the whole file. Return the artefact with the digest of its bytes and what they are: "whole",
        "damaged", "changed" (edited in place) or "new" (never hashed); then the digest is stored."""
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
        """Store that these bytes were pushed now; the caller fsyncs. Return False without attributes."""
        return write_attribute(self.file.fd, PUSHED_ATTRIBUTE, str(current_time()))

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
        """Return all bytes of a SMALL artefact, as `pieces` does. Cache them unless that could hide a
        change."""
        if self._whole is None:
            self._whole = b"".join(self.pieces())
            if self.artefact.sha256 is not None and time.time_ns() >= self.status.st_ctime_ns + TICK:
                cached = Content(self._metadata, self.artefact, NO_FILE, self.status, self._whole)
                cost = len(self._whole) + 2048  # with the objects around them
                key = self.artefact.directory, self.artefact.id, identity(self.status)
                self._metadata.small.keep(key, cached, cost)
        return self._whole

    def close(self, *_: object) -> None:
        self.file.close()

    def __enter__(self) -> Self:
        return self

    __exit__ = close


# == Uploads: bytes on their way in ===============================================================


@functools.lru_cache(1)
def hash_threads(process: int) -> ThreadPoolExecutor:
    """Return the threads of a process that compute digests: a fork has none of its parent's threads."""
    return ThreadPoolExecutor(os.cpu_count(), "sha256")


class Upload:
    """A body on its way in: up to PIECE bytes in memory, then a staging file in `.incoming/`. A file for each
    would cost durable pushes of 1 KiB 0.4 of their speed: the event loop would wait for the journal. It has a
    name, because btrfs before Linux 6.15.3 does not fsync files without one. An upload is pushed once; any
    use after that raises ValueError. The caller of `Reader.stage` closes it, which removes a file that was
    not pushed."""

    def __init__(self, files: Files, limit: int | None = None) -> None:
        self.size = 0  # bytes
        self.limit = limit  # bytes
        self.fault: Exception | None = None  # set if a write failed where it could not raise; see `verify`
        self.sealed = False  # whether the file is complete and durable
        self._files, self._memory = files, bytearray()
        self._file, self._name, self._incoming = NO_FILE, "", NO_FILE
        self._sha256, self._hashed, self._position = hashlib.sha256(), 0, 0  # bytes hashed; bytes read
        self._hashing: Future[None] | None = None
        self._ended = False  # pushed or closed
        self._equal: tuple[int, ...] = ()  # the identity of a file with the same bytes

    def write(self, data: bytes | memoryview) -> None:
        """Append to the file. TooLarge: the limit is exceeded."""
        if self.limit is not None and self.size + len(data) > self.limit:
            raise TooLarge(f"The limit is {self.limit} bytes. Send less; PUT the files of a form one by one.")
        if self._file.fd < 0 and self.size + len(data) <= PIECE and not self._ended:
            self._memory += data
        else:
            write_all(self.fd, data)
        self._grow(len(data))

    def copy(self, content: Content) -> None:
        """Append a stored file. The kernel copies or shares the bytes where it can. Damaged. TooLarge."""
        size = content.artefact.size
        if self.limit is not None and size > self.limit:
            raise TooLarge(f"At most {self.limit} bytes are accepted here. The artefact has {size}.")
        file = self.fd
        try:
            while self.size < size:
                copied = os.copy_file_range(content.file.fd, file, COPY_PIECE, self.size)
                if not copied:
                    raise Damaged(f"'{content.artefact.id}' became shorter while it was copied.")
                self._grow(copied)
        except (OSError, AttributeError) as error:  # not on macOS
            if self.size or getattr(error, "errno", 0) in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                raise
            for piece in content.pieces():
                self.write(piece)

    def read_at(self, start: int, length: int) -> bytes:
        """Return at most `length` of the bytes that were written, from byte `start` on."""
        if self._file.fd < 0:
            return bytes(self._memory[start : start + length])
        return os.pread(self._file.fd, length, start)

    def read(self, length: int) -> bytes:
        """Return the next bytes of what was written, from its start: at most `length`."""
        piece = self.read_at(self._position, length)
        self._position += len(piece)
        return piece

    def equals(self, content: Content, type: str | None) -> bool:
        """Return whether a stored file has exactly these bytes. A file that did not change is compared once.
        The digest only tells what was stored: a push of the same bytes repairs a damaged artefact."""
        if content.artefact.size != self.size or content.digested().sha256 != self.digest():
            return False
        if type is not None and HAS_ATTRIBUTES and content.artefact.type != type:
            return False
        if self._equal != identity(content.status):
            pairs = itertools.zip_longest(pieces_from(self.read_at), pieces_from(content.read))
            if any(piece != stored for piece, stored in pairs):
                return False
            self._equal = identity(content.status)
        return True

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
        file = self.fd
        os.utime(file, ns=(artefact.time * 1000, artefact.time * 1000))
        write_attribute(file, TYPE_ATTRIBUTE, artefact.type)
        write_digest(file, artefact, os.fstat(file))
        self.sync()
        self.sealed = True

    def sync(self) -> None:
        """Fsync the file. If that fails the upload is closed, so that nobody tries again."""
        try:
            self._files.sync(self.fd)
        except OSError:
            self.close()
            raise

    def link(self, folder: int, name: str) -> None:
        """Give the file another name, in an open folder. FileExistsError: the name is taken."""
        os.link(self._name, name, src_dir_fd=self._incoming.fd, dst_dir_fd=folder, follow_symlinks=False)

    def move(self, folder: int, name: str) -> os.stat_result:
        """Rename the file to `name` in an open folder: the moment of the commit. Return its status."""
        os.rename(self._name, name, src_dir_fd=self._incoming.fd, dst_dir_fd=folder)
        self._ended, self._name = True, ""
        return os.fstat(self._file.fd)

    @property
    def hashing(self) -> Future[None] | None:
        """Return the running hash job if the hash is HASH_BEHIND bytes behind the writer."""
        return self._hashing if self.size - self._hashed >= HASH_BEHIND else None

    def close(self, *_: object) -> None:
        """Free everything. A file that was not moved is removed."""
        self._ended, name, self._name = True, self._name, ""
        self._end_hashing()
        with self._incoming as incoming, self._file:
            if name:
                with contextlib.suppress(FileNotFoundError):  # removed by a sweep
                    os.unlink(name, dir_fd=incoming)

    @property
    def fd(self) -> int:
        """Return the descriptor of the staging file, which is made from the memory. The upload closes it."""
        if self._ended:
            raise ValueError("this upload is pushed or closed; stage another one")
        while self._file.fd < 0:
            self._incoming, self._name = self._files.open_own(INCOMING), self._files.unique_name()
            self._file = Descriptor(os.open(self._name, STAGE, 0o666, dir_fd=self._incoming.fd))
            try:
                fcntl.flock(self._file.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(self._file.fd).st_nlink:
                    write_all(self._file.fd, self._memory)
                    self._memory.clear()
                    break
            except BlockingIOError:  # a sweep removes what it can lock
                pass
            self._file.close()  # a sweep came between the file and its lock: it removes this one
        return self._file.fd

    def _grow(self, length: int) -> None:
        self.size += length
        if self.size - self._hashed >= HASH_PIECE and (self._hashing is None or self._hashing.done()):
            self._hashing = hash_threads(os.getpid()).submit(self._hash, self.size)

    def _end_hashing(self) -> None:
        """Wait until no thread hashes this upload. A job that has not started is cancelled: it waits for
        others. An error in the job occurs again where the hash is completed."""
        if self._hashing is not None and not self._hashing.cancel():
            self._hashing.exception()

    def _hash(self, end: int) -> None:
        # From the page cache and not from a queue: however far the hash falls behind a fast
        # client, it uses no memory and the receiving thread does not wait for it.
        while self._hashed < end and not self._ended:
            piece = self.read_at(self._hashed, min(HASH_PIECE, end - self._hashed))
            if not piece:
                raise Damaged("The staging file became shorter. Push the artefact again.")
            self._sha256.update(piece)
            self._hashed += len(piece)

    def __enter__(self) -> Self:
        return self

    __exit__ = close


# == Versions: the earlier versions of one artefact ===============================================


class Versions:
    """The earlier versions of one artefact: files named after their times, in `.versions/<id>/`. The folder's
    own modification time is that of the newest. They are changed under the directory's lock."""

    def __init__(self, files: Files, directory: str, id: str) -> None:
        *folders, self._name = segments = check_names(directory, id)
        self._files, self._folder = files, (directory, *folders)
        self._path = (directory, VERSIONS, *segments)

    @retry_on_estale
    def read(self, with_names: bool = True) -> tuple[list[str], int]:
        """Return the names of the versions, oldest first, and the newest time (µs), -1 if there is none.
        Without names, of which there may be thousands, the list is empty."""
        names: list[str] = []
        with contextlib.suppress(*MISSING), self._files.open_folder(*self._path) as folder:
            newest = time_of(os.fstat(folder))
            if with_names:
                with os.scandir(folder) as entries:
                    names = sorted(
                        entry.name for entry in entries
                        if is_version(entry.name) and entry.is_file(follow_symlinks=False)
                    )
            return names, max(newest, version_time(names[-1]) if names else -1)
        return [], -1

    def may_exist(self, folder: int) -> bool:
        """Return False if there is no version for certain. `folder`: the artefact's open folder."""
        try:
            return len(self._folder) > 1 or bool(os.stat(VERSIONS, dir_fd=folder, follow_symlinks=False))
        except FileNotFoundError:
            return False

    def keep(self, current: Content, newest: int) -> str:
        """Hard-link the current file under its version name and fsync. If other bytes have the name, use the
        next microsecond. Return the version. newest: the newest time (µs) after the commit."""
        version = current.artefact
        with self._files.make_folder(*self._path) as versions:
            while not self._link(current, version, versions):
                if version.time == LAST_TIME:
                    raise Conflict(f"No version is later than '{version.id}'. Touch the file.")
                version = replace(version, time=version.time + 1)
            newest = max(newest, version.time)
            os.utime(versions, ns=(newest * 1000, newest * 1000))
            self._files.sync(versions)
        return version.version

    def _link(self, current: Content, version: Artefact, versions: int) -> bool:
        """Link the current file, or a copy of it if its time is another one or it belongs to another user
        (fs.protected_hardlinks). Return whether its bytes have the version's name now."""
        name = version.version
        try:
            if version.time == current.artefact.time:
                with contextlib.suppress(PermissionError), self._files.open_folder(*self._folder) as folder:
                    os.link(self._name, name, src_dir_fd=folder, dst_dir_fd=versions, follow_symlinks=False)
                    return True
            with Upload(self._files) as copy:
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
        """Erase the oldest of the earlier versions until `keep` remain with the added one. That stays however
        old it is: a file put there by hand may have any time."""
        others = [name for name in earlier if name != added]
        self.drop(others[: max(0, len(others) + (added is not None) - keep)])


# == Reading: artefacts and versions, found and opened ============================================


class Reader:
    """Reads the artefacts below one data directory. Takes no lock: one file is opened, and that inode is read
    to its end. Every method checks the names that it is given (InvalidName) and may raise OSError."""

    def __init__(self, data: str | os.PathLike[str] = "data", *, fsync: bool = True) -> None:
        self.files, self.metadata = Files(os.path.realpath(data), fsync), Metadata()
        self.root, self.durable = self.files.root, fsync

    def directories(self) -> list[str]:
        """Return the names of the directories, sorted."""
        with self.files.open_folder() as root, os.scandir(root) as entries:
            return sorted(
                entry.name for entry in entries
                if SEGMENT.fullmatch(entry.name) and entry.name != LOST_AND_FOUND
                and entry.is_dir(follow_symlinks=False)
            )

    def changed(self, directory: str) -> str:
        """Return when the names in a directory last changed (RFC 3339); "" if it was removed meanwhile."""
        with contextlib.suppress(FileNotFoundError):
            check_names(directory)
            time = time_of(os.lstat(f"{self.root}/{directory}"))
            return Artefact(directory, "", 0, time, "", None).modified
        return ""

    def artefacts(self, directory: str, *, prefix: str = "", after: str = "", digests: bool = False,
                  matches: Callable[[str], object] | None = None,
                  unreadable: list[str] | None = None) -> Generator[Artefact, None, None]:
        """Yield the artefacts of a directory by id: those whose id begins with `prefix`, sorts after `after`
        and `matches`. NotFound. digests: compute the missing ones. What cannot be read is logged, and its id
        added to `unreadable`, a folder's with a slash. Close the generator if it is not read to its end."""
        on_error = functools.partial(report_unreadable, directory, unreadable)
        with self.open_directory(directory) as folder:
            for id, inside, name in self.files.walk(folder, "", prefix, after, on_error=on_error):
                if matches is None or matches(id):
                    try:
                        yield self._describe(inside, name, directory, id, digests)
                    except Conflict:  # it is no file
                        pass
                    except OSError as error:
                        on_error(id, error)

    def deleted(self, directory: str, *, prefix: str = "", after: str = "") -> Iterator[Artefact]:
        """Yield the newest version of each deleted artefact of a directory, by id, with the digest if it is
        known. NotFound. What cannot be read is logged."""
        self.open_directory(directory).close()
        newest = dict(self._earlier(directory))  # of one id, the last one is the newest
        stored = ((id, newest[id]) for id in sorted(newest) if id.startswith(prefix) and id > after)
        for artefact in self._read(directory, stored, lambda content: content.artefact):
            with self.look_up(directory, artefact.id) or NOTHING as current:
                if current is None:
                    yield artefact

    def fetch(self, directory: str, id: str, version: str | None = None,
              from_memory: bool = False) -> Content:
        """Open an artefact: the current one or a version. The caller closes it. NotFound. from_memory: a
        SMALL one may come from the cache. It is not open: only its digest and `whole()` can be used."""
        if from_memory and version is None:
            segments = check_names(directory, id)
            try:
                with self.files.open_folder(directory, *segments[:-1]) as folder:
                    status = os.stat(segments[-1], dir_fd=folder, follow_symlinks=False)
                if (cached := self.metadata.small.get((directory, id, identity(status)))) is not None:
                    return cached
            except OSError:  # `look_up` tells why
                pass
        if (current := self.look_up(directory, id)) is not None:
            if version is None or current.artefact.version == version:
                return current
            current.close()
        if version is None:
            raise NotFound(f"'{directory}' has no artefact '{id}'.")
        # The current artefact was looked up first: it becomes a version before it is replaced.
        if (earlier := self.look_up(directory, id, version)) is None:
            raise NotFound(f"'{id}' has no version '{version}'. ?versions lists them.")
        return earlier

    def has_folder(self, directory: str, id: str) -> bool:
        """Return whether a folder has this name below a directory, maybe without an artefact."""
        with contextlib.suppress(NotFound), self.open_directory(directory, *check_names(directory, id)):
            return True
        return False

    def versions(self, directory: str, id: str) -> list[tuple[Artefact, bool]]:
        """Return what `version_names` does, with artefacts for names. Missing digests are computed."""
        for _ in range(SCANS):
            names, found = self.version_names(directory, id), []
            for version, is_current in names:
                with contextlib.suppress(NotFound), self.fetch(directory, id, version) as content:
                    found.append((content.digested(), is_current))
            if len(found) == len(names):
                break  # else one was replaced or erased meanwhile
        return found

    def version_names(self, directory: str, id: str) -> list[tuple[str, bool]]:
        """Return all versions, newest first, each with whether it is the current one. NotFound: none."""
        versions, current = Versions(self.files, directory, id), None
        earlier, _ = versions.read()
        for _ in range(RETRIES):
            with self.look_up(directory, id) or NOTHING as content:
                current = content and content.artefact.version
            before, (earlier, _) = earlier, versions.read()
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
            unreadable: list[str] = []
            current = ((artefact.id, None) for artefact in self.artefacts(directory, unreadable=unreadable))
            for stored in (current, self._earlier(directory, unreadable)):
                try:
                    yield from self._read(directory, stored, Content.verified, unreadable)
                except OSError as error:
                    report_unreadable(directory, unreadable, "", error)
                for id in unreadable:
                    yield Artefact(directory, id, 0, 0, "", None), "unreadable"
                unreadable.clear()

    def _earlier(self, directory: str, unreadable: list[str] | None = None) -> Iterator[tuple[str, str]]:
        """Yield (id, version) for every earlier version in a directory."""
        inside, walk = f"{VERSIONS}/", self.files.walk
        on_error = functools.partial(report_unreadable, directory, unreadable)
        try:
            with self.files.open_folder(directory, VERSIONS) as folder:
                for path, _, version in walk(folder, inside, longest=2 * MAX_ID, on_error=on_error):
                    id = path[len(inside) : -len(version) - 1]
                    if id and is_version(version):
                        yield id, version
        except OSError as error:
            on_error(inside, error)

    def _read(self, directory: str, stored: Iterable[tuple[str, str | None]], read: Callable[[Content], T],
              unreadable: list[str] | None = None) -> Iterator[T]:
        """Yield the results of a function for each (id, version) that can be opened and read."""
        for id, version in stored:
            try:
                with self.fetch(directory, id, version) as content:
                    result = read(content)
            except (NotFound, InvalidName):  # removed meanwhile; put there by hand
                continue
            except OSError as error:
                report_unreadable(directory, unreadable, id, error)
                continue
            yield result

    # -- lookups --

    @retry_on_estale
    def open_directory(self, directory: str, *folders: str) -> Descriptor:
        """Return an open directory, or a folder in it. The caller closes it. NotFound."""
        check_names(directory)
        try:
            return self.files.open_folder(directory, *folders)
        except MISSING:
            detail = f"The directory '{directory}' does not exist. It is created by the first push."
            raise NotFound(detail) from None

    @retry_on_estale
    def find(self, directory: str, id: str, version: str | None = None) -> Content | None:
        """Open the current artefact, or an earlier version. The caller closes it. Return None if it does not
        exist. NotFound: `version` is not the name of a version. Conflict: something else has the name."""
        path, time = check_names(directory, id), None
        if version is not None:
            path, time = (VERSIONS, *path, version), version_time(version)
        try:
            with self.files.open_folder(directory, *path[:-1]) as folder:
                return self._open(folder, path[-1], directory, id, time)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno in NOT_A_FILE:
                raise in_the_way(id) from None
            raise

    def look_up(self, directory: str, id: str, version: str | None = None) -> Content | None:
        """Do the same as `find`, but return None if something else has the name. On NFS and GlusterFS, look
        again: the name is missing for a moment while another host replaces the file."""
        with contextlib.suppress(Conflict):
            for pause in self.files.pauses:
                if (content := self.find(directory, id, version)) is not None:
                    return content
                time.sleep(pause)
            return self.find(directory, id, version)
        return None

    def stage(self, limit: int | None = None) -> Upload:
        """Return a new upload of at most `limit` bytes. The caller closes it."""
        return Upload(self.files, limit)

    def _open(self, folder: int, name: str, directory: str, id: str, time: int | None = None) -> Content:
        """Open a file in an open folder. FileNotFoundError: there is none, or only an empty folder. Conflict:
        something else has the name. `time`: µs, of a version."""
        file = Descriptor(os.open(name, READ, dir_fd=folder))
        status = os.fstat(file.fd)
        if stat.S_ISDIR(status.st_mode) and next(self.files.walk(file.fd), None) is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        if not stat.S_ISREG(status.st_mode):
            raise in_the_way(id)
        artefact = self.metadata.read(directory, id, file.fd, status)
        if time is not None and time != artefact.time:
            artefact = replace(artefact, time=time)
        return Content(self.metadata, artefact, file, status)

    @retry_on_estale
    def _describe(self, folder: int, name: str, directory: str, id: str, digest: bool) -> Artefact:
        """Return the artefact of this name in an open folder, as `_open` does. digest: compute a missing
        one."""
        try:
            status = os.stat(name, dir_fd=folder, follow_symlinks=False)
            known = self.metadata.known.get((directory, id, identity(status)))
            if known is not None and (known.sha256 is not None or not digest):
                return known  # the file need not be opened
            if not stat.S_ISREG(status.st_mode):
                raise in_the_way(id)
            content = self._open(folder, name, directory, id)
        except FileNotFoundError:  # another host may replace it just now
            if (found := self.look_up(directory, id)) is None:
                raise
            content = found
        with content:
            return content.digested() if digest else content.artefact


# == The repository ===============================================================================

Check = Callable[[Content | None], None]  # gets the current artefact before it changes; raises to refuse


def accept_any(current: Content | None) -> None:
    """Accept any current state: the check of an unconditional write."""


class Repository(Reader):
    """Artefacts in directories, as plain files. A change is durable when its method returns. Knows nothing of
    HTTP. Any number of instances, in any number of processes, may work on one data directory: all state is on
    disk, and every decision is made under a lock of the file system."""

    def __init__(self, data: str | os.PathLike[str] = "data", *, fsync: bool = True,
                 keep_versions: int | Callable[[str], int] = 0,
                 keep_days: Callable[[str], int | None] = lambda _: None, sweep: bool = True) -> None:
        """Make the data directory if it is missing, and `sweep`. If it cannot be written, log that: it can
        still be read. keep_versions: how many versions before the current one are kept (ALL: every one), or a
        function of the directory. keep_days: after how many days without a push `expire` deletes an artefact.
        fsync: False gives up durability in a power cut."""
        super().__init__(data, fsync=fsync)
        self.keeps = keep_versions if callable(keep_versions) else lambda _: keep_versions
        self.keep_days = keep_days
        try:
            self.files.make_root(self.root)
            for name in (INCOMING, LOCKS, TRASH):
                self.files.open_own(name).close()
            if sweep:
                self.sweep()
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS) or not os.path.isdir(self.root):
                raise
            log.warning("%s cannot be written: %s. Artefacts can only be read.", self.root, error.strerror)

    def admit(self, directory: str, id: str, size: int, check: Check = accept_any) -> None:
        """Raise what a push of `size` bytes would raise now, as far as it is known without the bytes."""
        with self.find(directory, id) or NOTHING as current:
            check(current)
        self.check_space(size)

    def check_space(self, size: int) -> None:
        """Raise OutOfSpace if fewer than `size` bytes are free."""
        free = os.statvfs(self.root)
        if size > free.f_bavail * free.f_frsize:
            detail = f"{size} bytes are more than the disk has left. Delete something, and its ?versions."
            raise OutOfSpace(detail)

    def push(self, upload: Upload, directory: str, id: str, *, type: str | None = None, by_name: bool = False,
             check: Check = accept_any, wait: bool = True) -> tuple[Artefact, bool]:
        """Commit an upload under its name. Return the current artefact and whether it is new. A push of the
        current bytes, with their type, changes nothing. by_name: the type comes from a name and not from a
        client. `check` gets the current artefact (or None) under the lock; what it raises is passed on.
        Conflict: a folder is in the way of the artefact, or the reverse. BlockingIOError: the directory's
        lock is taken, and not `wait` (on the event loop)."""
        segments = check_names(directory, id)
        # 1. The body is in .incoming/, hashed. Set its time and attributes, and fsync. The same bytes need
        # no fsync, and large ones are not compared under the lock.
        chosen = specific_type(type)
        stored_type = chosen or type_of(id)
        utf8 = (by_name or chosen is None) and is_utf8(id, stored_type, upload.read_at)
        new = Artefact(directory, id, upload.size, current_time(), stored_type, upload.digest(), utf8)
        with (self.find(directory, id) if self.durable else None) or NOTHING as current:
            if current is None or not upload.equals(current, chosen):
                upload.seal(new)
        try:
            # 2. Take the directory's lock.
            with (lock := self.files.lock(directory, wait)), self.find(directory, id) or NOTHING as current:
                # 3. Check the preconditions against the current state.
                check(current)
                # 4. Make missing folders durable.
                with self.files.make_folder(directory, *segments[:-1]) as folder:
                    if current is not None and upload.equals(current, chosen) and (
                        self.keep_days(directory) is None or current.renew()
                    ):
                        new = current.artefact
                        self.files.sync(current.file.fd)  # it was renewed, or put there by hand
                    else:
                        new = self._replace(upload, new, current, folder)
                    # 5. Release the lock, so that fsyncs of many pushes overlap, and fsync the folder.
                    lock.close()
                    self.files.sync(folder)
            return new, current is None
        except OSError as error:
            explain_refusal(directory, error)
            raise

    def _replace(self, upload: Upload, new: Artefact, current: Content | None, folder: int) -> Artefact:
        """Keep the current file as a version, and rename the upload over it. Return the new artefact."""
        versions, keep = Versions(self.files, new.directory, new.id), self.keeps(new.directory)
        earlier, newest = versions.read(keep < ALL) if versions.may_exist(folder) else ([], -1)
        if current is not None:
            newest = max(newest, current.artefact.time)
        if new.time <= newest or not upload.sealed:
            new = replace(new, time=min(max(newest + 1, current_time()), LAST_TIME))
            upload.seal(new)
        kept = versions.keep(current, new.time) if current is not None and keep else None
        if kept is not None and version_time(kept) >= new.time:
            new = replace(new, time=min(version_time(kept) + 1, LAST_TIME))
            upload.seal(new)
        if inherit_access(upload.fd, folder):
            upload.sync()
        name = new.id.rpartition("/")[2]
        if current is not None:
            current.close()  # an NFS client renames an open file away before it replaces it
        try:
            status = upload.move(folder, name)
        except IsADirectoryError:  # below it are only empty folders, or `find` would have raised
            for path, *_ in os.fwalk(name, topdown=False, dir_fd=folder):
                os.rmdir(path, dir_fd=folder)
            status = upload.move(folder, name)
        self._touch(new.directory, new.id)
        self.metadata.known.keep((new.directory, new.id, identity(status)), new)
        if current is not None:
            self.metadata.known.pop((new.directory, new.id, identity(current.status)), None)
        if earlier:
            self.files.sync(folder)  # else a power cut could undo the rename, but not the pruning
            versions.prune(earlier, kept, keep)
        return new

    def restore(self, directory: str, id: str, version: str, *,
                check: Check = accept_any) -> tuple[Artefact, bool]:
        """Push a copy of an earlier version, with its type, as `promote` does. NotFound: it does not
        exist."""

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

    def delete(self, directory: str, id: str, *, check: Check = accept_any,
               versions_too: bool = False) -> None:
        """Delete an artefact. If versions are kept, it becomes one. NotFound. versions_too: erase it with all
        its versions, also if it was deleted before."""
        versions, keep = Versions(self.files, directory, id), 0 if versions_too else self.keeps(directory)
        with self.open_directory(directory), self.files.lock(directory):
            with self.look_up(directory, id) or NOTHING as current:
                earlier, newest = versions.read(keep < ALL)
                if current is None and not (versions_too and earlier):
                    raise NotFound(f"'{directory}' has no artefact '{id}'.")
                check(current)
                kept = None
                if current is not None:
                    if keep:
                        kept = versions.keep(current, max(current.artefact.time, newest))
                    current.close()  # see `_replace`
                    self._unlink(directory, id)
                versions.prune(earlier, kept, keep)

    def erase(self, directory: str, id: str, version: str, *, check: Check = accept_any) -> None:
        """Erase one earlier version. NotFound. Conflict: it is the current one."""
        versions = Versions(self.files, directory, id)
        with self.open_directory(directory), self.files.lock(directory):
            with self.fetch(directory, id, version) as content:
                check(content)
                if version not in versions.read()[0]:
                    raise Conflict(f"'{version}' is the current version. DELETE the artefact itself.")
                versions.drop([version])

    def delete_directory(self, directory: str) -> None:
        """Delete a directory, its artefacts and their versions, in one rename. NotFound."""
        name = self.files.unique_name()
        with self.files.open_folder() as root, self.files.open_own(TRASH) as trash:
            # Without a directory, no lock file is made. It may be deleted while the lock is awaited.
            with self.open_directory(directory), self.files.lock(directory):
                self.open_directory(directory).close()
                try:
                    os.rename(directory, name, src_dir_fd=root, dst_dir_fd=trash)
                except OSError as error:
                    explain_refusal(directory, error)
                    raise
                self.files.sync(root)
            self._discard(trash, TRASH, name)

    def expire(self, dry_run: bool = False) -> Iterator[Artefact]:
        """Delete the artefacts whose last push is older than `keep_days`, with all their versions, also those
        of deleted artefacts, and yield them. What cannot be deleted is logged. dry_run: only yield them."""
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
                report_unreadable(directory, None, "", error)

    def _expire(self, directory: str, id: str, limit: int, dry_run: bool) -> bool:
        """Erase an artefact whose last push is before `limit` (µs). Return whether it was, and can be
        erased."""

        def check_age(current: Content | None) -> None:
            with current or self.fetch(directory, id, self.version_names(directory, id)[0][0]) as content:
                if content.last_push() >= limit:
                    raise PreconditionFailed("It was pushed meanwhile.")

        try:
            check_age(self.look_up(directory, id))
            if not dry_run:
                self.delete(directory, id, check=check_age, versions_too=True)
            return True
        except (NotFound, PreconditionFailed):
            return False
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
        """Remove a trash folder, or a staging file that no writer locks. Log what the next sweep tries
        again."""
        try:
            try:
                with Descriptor(os.open(name, STAGED, dir_fd=folder)) as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(name, dir_fd=folder)
            except IsADirectoryError:
                self.files.remove_tree(folder, name)
        except (FileNotFoundError, BlockingIOError):  # removed by another process; in use
            pass
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:  # another process moves folders into it while it removes them
                log.warning("%s/%s/%s cannot be removed: %s", self.root, own, name, error)

    def check_health(self) -> None:
        """Write, fsync, read and remove a staging file. OSError, Unavailable, OutOfSpace."""
        self.files.open_folder().close()
        self.check_space(1024 * 1024)
        with self.stage() as upload:
            upload.write(b"health")
            self.files.sync(upload.fd)
            if upload.read_at(0, PIECE) != b"health":
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

    def _unlink(self, directory: str, id: str) -> None:
        """Remove an artefact's name, durably, and the folders that are then empty."""
        segments = check_names(directory, id)
        with self.files.open_folder(directory, *segments[:-1]) as folder:
            os.unlink(segments[-1], dir_fd=folder)
            self.files.sync(folder)
        self._touch(directory, id)
        self.files.remove_while_empty(directory, *segments[:-1])

    def _touch(self, directory: str, id: str) -> None:
        """Set a directory's own modification time after a change in a folder of it: `changed` reads it."""
        if "/" in id:
            with contextlib.suppress(*MISSING, PermissionError):  # moved by hand; it is not ours
                os.utime(f"{self.root}/{directory}", follow_symlinks=False)


# == HTTP semantics: pure functions of header text and validators =================================

ENTITY_TAG = re.compile(r'(W/)?"([\x21\x23-\x7e\x80-\xff]*)"')
ENTITY_TAGS = re.compile(rf"[ \t,]*(?:{ENTITY_TAG.pattern}[ \t,]*)*")
BYTE_RANGE = re.compile(r"bytes=[ \t]*(?=[0-9]|-[0-9])([0-9]*)-([0-9]*)[ \t]*", re.I)
SHA256_MEMBER = re.compile(r"(?:^|,)[ \t]*sha-256[ \t]*=([^,;]*)", re.I)
EXTENDED_VALUE = re.compile(r"(utf-8|iso-8859-1)'[\w-]*'(.*)", re.I)  # RFC 8187 §3.2.1
URL_SAFE = re.compile(r"[\w.~/-]*", re.A)
CONDITIONS = ("HTTP_IF_MATCH", "HTTP_IF_NONE_MATCH", "HTTP_IF_MODIFIED_SINCE", "HTTP_IF_UNMODIFIED_SINCE")
FORMATS = ("json", "html", "sha256sums", "tar", "zip")
SETTLED = 60  # seconds without a change after which a date is a strong validator (RFC 9110 §8.8.2.2)
CACHED_ROWS = 16_384  # rows of JSON listings
MAX_TAGS = 16_000  # characters of If-Match and If-None-Match, some 200 digests: 1 ms for each 5,000
MAX_FIELD = 1000  # characters of Accept and of a form's Content-Type: Falcon's parser takes quadratic time
CORP, SAME_ORIGIN = "Cross-Origin-Resource-Policy", "same-origin"  # other sites cannot use any response
NOT_MODIFIED_FIELDS = ("ETag", "Last-Modified", "Cache-Control", "Artefact-Version", CORP)
PAGES_POLICY = "sandbox allow-scripts allow-popups allow-forms allow-modals allow-downloads"
POLICY = (  # an artefact shows its styles, images and media in a browser, and runs no script (CSP 3)
    "sandbox allow-same-origin; default-src 'none'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "media-src 'self'; font-src 'self'"
)
json_string = json.encoder.encode_basestring_ascii


def http_date(seconds: int) -> str:
    """Return a time, in seconds since the epoch, as an IMF-fixdate (RFC 9110 §5.6.7)."""
    return format_second("%a, %d %b %Y %H:%M:%S GMT", seconds)


def http_seconds(field: str | None) -> int | None:
    """Return the seconds since the epoch of a date field, None if it is to be ignored (RFC 9110 §13.1.3)."""
    if field:
        with contextlib.suppress(ValueError, OverflowError):
            return int(falcon.http_date_to_dt(field.strip(), obs_date=True).timestamp())
    return None


def tag_matches(field: str, etag: str | None, *, strong: bool) -> bool | None:
    """Return whether a field lists the entity tag (RFC 9110 §8.8.3.2), None if it is malformed or too long.
    etag: None if there is no representation."""
    if field == etag:  # the usual revalidation
        return True
    if field.strip(" \t") == "*":
        return etag is not None
    if len(field) > MAX_TAGS or not ENTITY_TAGS.fullmatch(field):
        return None
    tags, wanted = ENTITY_TAG.findall(field), (etag or "").strip('"')
    if strong or etag is None:
        return ("", wanted) in tags and etag is not None
    return not {wanted, f"{wanted}-gzip"}.isdisjoint(tag for _, tag in tags)  # Apache appends -gzip


def failed_precondition(method: str, environ: WSGIEnvironment, etag: str | None,
                        modified: int | None) -> int | None:
    """Return 304 or 412 if a condition fails, None if the method is to be performed (RFC 9110 §13.2.2).

    etag and modified (seconds): the validators of the current representation, None if it has none.
    HTTPBadRequest: a write has a malformed If-None-Match; ignored, it would not protect what it should."""
    reading = method in ("GET", "HEAD")
    if "HTTP_IF_MATCH" in environ:
        if not tag_matches(environ["HTTP_IF_MATCH"], etag, strong=True):
            return 412
    elif modified is not None:
        since = http_seconds(environ.get("HTTP_IF_UNMODIFIED_SINCE"))
        if since is not None and modified > since:
            return 412
    if "HTTP_IF_NONE_MATCH" in environ:
        matches = tag_matches(environ["HTTP_IF_NONE_MATCH"], etag, strong=False)
        if matches is None and not reading:
            raise HTTPBadRequest(description='An entity tag must be quoted: "<sha256>". Correct it.')
        if matches:
            return 304 if reading else 412
    elif reading and modified is not None:
        since = http_seconds(environ.get("HTTP_IF_MODIFIED_SINCE"))
        if since is not None and modified <= since:
            return 304
    return None


def byte_range(field: str, if_range: str | None, size: int, etag: str,
               modified: int | None) -> tuple[int, int] | None:
    """Return (first byte, length) of the range that a field asks for; None, the whole, for several ranges,
    another unit, a malformed field (RFC 9110 §14.2), an empty artefact, or another representation in If-Range
    (§13.1.5). modified (seconds): None if it is no strong validator. HTTPRangeNotSatisfiable."""
    match = BYTE_RANGE.fullmatch(field)
    if match is None or not size:
        return None
    if if_range is not None and if_range.strip() != etag:
        if modified is None or http_seconds(if_range) != modified:
            return None
    # `int` refuses numbers of thousands of digits. 19 digits exceed the size of every file.
    first, last = (int(digits.lstrip("0")[:19] or "0") if digits else size for digits in match.groups())
    if not match[1]:  # the last bytes
        first, last = max(0, size - last), size
    elif match[2] and last < first:
        return None
    if first >= size:
        raise falcon.HTTPRangeNotSatisfiable(size, description=f"Ask for some of the {size} bytes it has.")
    return first, min(last, size - 1) - first + 1


def announced_sha256(environ: WSGIEnvironment) -> str | None:
    """Return the SHA-256, in hex, that a field of RFC 9530, Digest (RFC 3230) or X-Checksum-Sha256 announces,
    or None: other algorithms are ignored. HTTPBadRequest: one is malformed, or two differ."""
    found = set()
    for field, colon in (("HTTP_REPR_DIGEST", ":"), ("HTTP_CONTENT_DIGEST", ":"), ("HTTP_DIGEST", "")):
        for value in SHA256_MEMBER.findall(environ.get(field, "")):  # colons: RFC 8941 §3.3.5
            match = re.fullmatch(f"{colon}([A-Za-z0-9+/]{{43}}=){colon}", value.strip(" \t"))
            found.add(base64.b64decode(match[1]).hex() if match else "malformed")
    if "HTTP_X_CHECKSUM_SHA256" in environ:
        found.add(environ["HTTP_X_CHECKSUM_SHA256"].strip().lower())
    if len(found) > 1 or not all(map(SHA256.fullmatch, found)):
        raise HTTPBadRequest(description="Send one SHA-256, as in 'Repr-Digest: sha-256=:<base64>:'.")
    return found.pop() if found else None


def body_length(environ: WSGIEnvironment) -> int | None:
    """Return the announced length of the body in bytes, None: chunked. HTTPError: it must not be stored."""
    if "HTTP_CONTENT_RANGE" in environ:  # RFC 9110 §14.5
        raise HTTPBadRequest(description="A part cannot be stored. Send the whole, without Content-Range.")
    if environ.get("HTTP_CONTENT_ENCODING", "").strip().lower() not in ("", "identity"):
        hint = "Send the artefact without Content-Encoding, which is not stored."
        raise HTTPUnsupportedMediaType(description=hint, headers={"Accept-Encoding": "identity"})
    length = environ.get("CONTENT_LENGTH") or None
    if "HTTP_TRANSFER_ENCODING" in environ and length is None:  # RFC 9112 §6.1
        # A server that decodes the chunks sets wsgi.input_terminated.
        if environ.get("SERVER_PROTOCOL") == "HTTP/1.0" or not environ.get("wsgi.input_terminated"):
            raise HTTPBadRequest(description="A chunked body cannot be read here. Send a Content-Length.")
        return None
    if length is not None and not re.fullmatch("[0-9]{1,18}", length):
        raise HTTPBadRequest(description="Content-Length is not a number of bytes. Correct it.")
    return int(length or 0)


def preferred_format(wanted: str | None, accept: str) -> str:
    """Return the one of FORMATS that is wanted, or what Accept prefers (RFC 9110 §12.5.1). HTTPBadRequest."""
    if wanted in FORMATS:
        return wanted
    if wanted is not None:
        raise HTTPBadRequest(description=f"'{wanted}' is not a format. Choose one of {', '.join(FORMATS)}.")
    accept = ",".join(filter(str.strip, accept.lower().split(",")))  # RFC 9110 §5.6.1.2, §8.3.1
    formats = {"application/json": "json", "text/html": "html", "text/plain": "sha256sums"}
    with contextlib.suppress(ValueError, falcon.HTTPError):
        best = falcon.mediatypes.best_match(formats, accept if len(accept) <= MAX_FIELD else "*/*")
        return formats.get(best, "json")
    return "json"


def instant(text: str) -> int:
    """Return the µs since the epoch of an RFC 3339 time, or of the end of a date in UTC."""
    text = text.strip().upper().replace(" ", "+")  # an unencoded '+' of a query arrives as a space
    if re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", text):
        text += "T23:59:59.999999Z"
    with contextlib.suppress(ValueError):
        at = datetime.datetime.fromisoformat(text)
        if at.tzinfo is not None:
            return (at - EPOCH) // MICROSECOND
    raise HTTPBadRequest(description="Write 'at' as a date or time: 2026-11-23 or 2026-11-23T01:44:55Z.")


def content_disposition(name: str) -> str:
    """Return `inline` with a file name (RFC 6266, RFC 8187). curl reads only `filename`, as raw bytes."""
    raw = re.sub(r'["\\]', r"\\\g<0>", name).encode().decode("latin-1")
    return f"inline; filename=\"{raw}\"; filename*=UTF-8''{quote(name, safe='')}"


def href(base: str, directory: str, id: str = "", version: str = "") -> str:
    """Return the path of a directory, an artefact or a version. `base`: where the application is mounted."""
    path = f"{base}/artefacts/{quoted(directory)}/{quoted(id)}"
    return f"{path}?version={version}" if version else path


def quoted(path: str) -> str:
    """Return a path as it stands in a URL. Most of the thousands of names in a listing need no quoting."""
    return path if URL_SAFE.fullmatch(path) else quote(path)


def last_modified(artefact: Artefact) -> int | None:
    """Return the seconds since the epoch, None if in the future: it would never match (RFC 9110 §8.8.2.1)."""
    seconds = artefact.time // 1_000_000
    return seconds if seconds <= time.time() else None


@functools.lru_cache(1024)
def representation_fields(artefact: Artefact, modified: int | None, base: str, caching: str,
                          policy: str, with_scripts: bool) -> list[tuple[str, str]]:
    """Return the fields of an artefact whose digest is known, besides those of every response. modified:
    `last_modified`. with_scripts: pages of its directory may have no origin, but must load their parts."""
    digest = base64.b64encode(bytes.fromhex(artefact.sha256 or "")).decode()
    fields = [
        ("Content-Type", f"{artefact.type}; charset=utf-8" if artefact.is_utf8 else artefact.type),
        ("ETag", f'"{artefact.sha256}"'),
        ("Last-Modified", "" if modified is None else http_date(modified)),
        ("Cache-Control", caching),
        ("Accept-Ranges", "bytes"),
        ("Repr-Digest", f"sha-256=:{digest}:"),
        ("Digest", f"SHA-256={digest}"),
        ("Link", f'<{href(base, artefact.directory, artefact.id)}?versions>; rel="version-history"'),
        ("Artefact-Version", artefact.version),
        ("Content-Disposition", content_disposition(artefact.id.rpartition("/")[2])),
        ("Content-Security-Policy", policy),
        (CORP, "cross-origin" if with_scripts else ""),
    ]
    return [(name, value) for name, value in fields if value]


def artefact_json(artefact: Artefact, base: str, of_version: bool = False) -> str:
    """Return an artefact as a JSON object, in 0.6 of the time of `json.dumps`. of_version: so is its href."""
    return (
        f'{{"directory": {json_string(artefact.directory)}, "id": {json_string(artefact.id)}, '
        f'"href": "{href(base, artefact.directory, artefact.id, artefact.version if of_version else "")}", '
        f'"version": "{artefact.version}", "size": {artefact.size}, "type": {json_string(artefact.type)}, '
        f'"sha256": {json_string(artefact.sha256) if artefact.sha256 else "null"}, '
        f'"modified": "{artefact.modified}"}}'
    )


# Not of pushes: the cache would be full of them, and pushes of 1 KiB would have 0.97 of their speed.
row_json = functools.lru_cache(CACHED_ROWS)(artefact_json)


def is_navigation(environ: WSGIEnvironment) -> bool:
    """Return whether a person's browser opens the page: no script of a page, and no other program."""
    return "1" in environ.get("HTTP_UPGRADE_INSECURE_REQUESTS", "") or (
        environ.get("HTTP_SEC_FETCH_MODE") == "navigate")


# == Access: who may do what, and which rules hold for a directory ================================

HEALTH = "/healthz"
HOST = re.compile(r"(\[[0-9A-Fa-f:.]{2,45}\]|[\w.~!$&'()*+;=%-]{0,255})(?::[0-9]{0,5})?", re.A)
match_host = functools.lru_cache(256)(HOST.fullmatch)
ORIGIN = re.compile(f"https?://({HOST.pattern})", re.A)  # groups: authority, host
CHALLENGES = ('Basic realm="artefacts", charset="UTF-8"', 'Bearer realm="artefacts"')
READING = ("GET", "HEAD", "OPTIONS", "PROPFIND")
BYTES = re.compile(r"\s*0*([1-9][0-9]{0,14})\s*(?:([KMGT])(i?))?B?\s*", re.I)


def number_of_bytes(value: object) -> int:
    """Return the number of bytes that 1048576, "500MB" or "2GiB" states. Raise ValueError."""
    match = BYTES.fullmatch(str(value))
    if match is None:
        raise ValueError(f"{value!r} is not a number of bytes, such as 1048576, 500MB or 2GiB")
    return int(match[1]) * int((1024 if match[3] else 1000) ** " KMGT".index((match[2] or " ").upper()))


def number_of_versions(value: object) -> int:
    """Return the number of versions that 10 or "all" states. Raise ValueError."""
    if not re.fullmatch("all|[0-9]{1,9}", str(value)):
        raise ValueError(f"{value!r} is neither a number of versions nor 'all'")
    return ALL if value == "all" else int(str(value))


def only(description: str, kind: type, pattern: str = "(?s:.*)") -> Callable[[object], Any]:
    """Return a converter that passes on what has the type and matches. Its error does not show a token."""

    def convert(value: object) -> Any:
        if type(value) is not kind or not re.fullmatch(pattern, str(value)):
            raise ValueError(f"the value is not {description}")
        return value

    return convert


def patterns(value: object) -> list[str]:
    return [PATTERN(pattern) for pattern in only("a list of patterns", list)(value)]


BOOLEAN, NAME = only("true or false", bool), only("a name", str, ".+")
DIGEST = only("the SHA-256 of a token, in hex", str, f"(?!{hashlib.sha256().hexdigest()}){SHA256.pattern}")
DAYS = only("a number of days from 1", int, "[1-9][0-9]{0,5}")
PATTERN = only("a pattern that can match a directory", str, rf"(?!lost\+found\Z){SEGMENT.pattern}")
RIGHTS: dict[str, Callable[[Any], Any]] = {"read": patterns, "write": patterns}
KEYS = {  # of the tables of the configuration file
    "anonymous": RIGHTS, "token": {"name": NAME, "sha256": DIGEST, **RIGHTS},
    "directory": {"name": PATTERN, "write_once": BOOLEAN, "keep_versions": number_of_versions,
                  "keep_days": DAYS, "max_size": number_of_bytes, "pages": BOOLEAN},
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Client:
    """What a client may do, by shell patterns of directories ([anonymous], [[token]])."""

    name: str = "-"  # as the log shows it
    sha256: str = ""  # of its token, which is stored nowhere
    read: Sequence[str] = ()
    write: Sequence[str] = ()

    def may(self, action: str, directory: str | None) -> bool:
        """Return whether the client may "read" or "write" the directory; None: any."""
        if directory is None:
            return bool(self.read or self.write)
        allowed = self.read if action == "read" else self.write
        return "*" in allowed or any(fnmatch.fnmatchcase(directory, pattern) for pattern in allowed)


EVERYONE = Client(read=["*"], write=["*"])


@dataclass(frozen=True)
class Config:
    """The configuration file."""

    anonymous: Client = EVERYONE
    token: Sequence[Client] = ()
    directory: Sequence[Mapping[str, Any]] = ()  # the rules, with those of the KEYS that each states

    def identify(self, authorization: str | None) -> Client:
        """Return the token that Authorization has as Bearer, or as the password of Basic; or `anonymous`."""
        if authorization is None or not self.token:  # a proxy may use it for users of its own
            return self.anonymous
        scheme, _, secret = authorization.strip().partition(" ")
        with contextlib.suppress(ValueError):
            if scheme.lower() == "basic":
                secret = base64.b64decode(secret.strip(), validate=True).decode().partition(":")[2]
            digest = hashlib.sha256(secret.strip().encode()).hexdigest()
            for token in self.token if scheme.lower() in ("basic", "bearer") else ():
                if hmac.compare_digest(token.sha256, digest):
                    return token
        return self.anonymous


@dataclass(slots=True)
class Settings:
    """All settings. Each part asks them at every use: `config` is replaced while the program runs."""

    config: Config = Config()
    keep_versions: int = 0
    max_size: int | None = None  # bytes of one artefact
    hosts: frozenset[str] = frozenset()  # public names of this server, in lower case
    loopback: bool = False  # whether it listens on loopback addresses only
    pages_host: str = ""  # the second name, in lower case, under which pages have an origin of their own
    keep_days: int | None = None  # after a push, until `Repository.expire`
    write_once = pages = None  # only rules state them

    def rule(self, directory: str, key: str) -> Any:
        """Return what the first rule says that matches the directory and states the key; else the setting."""
        for rule in self.config.directory:
            if key in rule and fnmatch.fnmatchcase(directory, rule["name"]):
                return rule[key]
        return getattr(self, key)

    def is_pages_host(self, req: Req) -> bool:
        """Return whether a request came under the name that is for pages only."""
        return self.pages_host != "" and req.host.lower() == self.pages_host

    def cache_control(self, directives: str) -> str:
        """Return a value of Cache-Control. With tokens it is `private` (RFC 9111 §5.2.2.7)."""
        return f"private, {directives}" if self.config.token else directives


def read_table(place: str, table: object, keys: Mapping[str, Callable[[Any], Any]]) -> dict[str, Any]:
    """Return the values of a table of the configuration file. ValueError names the place and the key."""
    values = {}
    if not isinstance(table, dict):
        raise ValueError(f"{place}: this is not a table")
    for key in [*table, *sorted(keys.keys() & {"name", "sha256"})]:
        try:
            if key not in keys:
                raise ValueError(f"the key is unknown; known keys are {', '.join(keys)}")
            values[key] = keys[key](table.get(key))
        except ValueError as error:
            raise ValueError(f"{place}: {key!r}: {error}") from None
    return values


def read_config(path: str | os.PathLike[str]) -> Config:
    """Read a configuration file (TOML), and ignore nothing in it. A token also gets the rights of clients
    without a token. OSError: the file cannot be read. ValueError names the place of a mistake."""
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KEYS}
    with open(path, "rb") as file:
        try:
            for kind, tables in tomllib.load(file).items():
                if kind not in KEYS:
                    raise ValueError(f"{kind!r} is unknown; known are [anonymous], [[token]], [[directory]]")
                if kind != "anonymous" and not isinstance(tables, list):
                    raise ValueError(f"{kind}: write its name in double brackets, [[{kind}]]")
                for number, table in enumerate([tables] if kind == "anonymous" else tables, 1):
                    found[kind].append(read_table(f"{kind}: number {number}", table, KEYS[kind]))
            for key in ("name", "sha256"):
                if len({token[key] for token in found["token"]}) < len(found["token"]):
                    raise ValueError(f"two tokens have the same {key}")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: {error}") from None
    anonymous = Client() if found["token"] else EVERYONE  # if the file does not state it
    if found["anonymous"]:
        anonymous = Client(**found["anonymous"][0])
    for token, right in itertools.product(found["token"], RIGHTS):
        token[right] = [*token.get(right, ()), *getattr(anonymous, right)]
    return Config(anonymous, [Client(**token) for token in found["token"]], found["directory"])


class Gate:
    """Falcon middleware that checks every request before its resource."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def process_resource(self, req: Req, resp: Resp, resource: object, params: dict[str, Any]) -> None:
        """Identify the client, and set the fields of every response. HTTPError: it may not do this."""
        config, directory, reading = self.settings.config, params.get("directory"), req.method in READING
        self.check_host(req.env)
        if not reading:
            self.check_origin(req.env)
        if not req.query_string.isascii():  # other servers pass it on
            raise HTTPBadRequest(description="All but ASCII must be percent-encoded in a query. Encode it.")
        if self.settings.is_pages_host(req):
            is_read = req.method in ("GET", "HEAD") and "directory" in params
            if not is_read or not self.settings.rule(params["directory"], "pages"):
                raise HTTPForbidden(description="This name is for pages only. Use the server's first name.")
        resp.set_header(CORP, SAME_ORIGIN)
        resp.set_header("Cache-Control", self.settings.cache_control("no-cache"))
        resp.set_header("X-Content-Type-Options", "nosniff")
        if req.path == HEALTH:  # needs no token
            return
        req.env["artefacts.who"] = client = config.identify(req.env.get("HTTP_AUTHORIZATION"))
        if client.may("read" if reading else "write", directory):
            return
        if config.token and client is config.anonymous:
            hint = "Send a known token, as Bearer or as the password of Basic. It is required here."
            raise HTTPUnauthorized(description=hint, challenges=CHALLENGES)
        raise HTTPForbidden(description="You may not do this. Ask the administrator of this server.")

    def check_host(self, environ: WSGIEnvironment) -> None:
        """Raise HTTPBadRequest for a missing or malformed Host (RFC 9112 §3.2), HTTPForbidden for a name that
        is not ours: another site may have bound it to this address (DNS rebinding)."""
        host, settings = environ.get("HTTP_HOST"), self.settings
        match = match_host(host or "")
        if match is None or (host is None and environ.get("SERVER_PROTOCOL") == "HTTP/1.1"):
            raise HTTPBadRequest(description="The Host field is missing or malformed. Correct it.")
        name = match[1].lower()
        if host is None or is_loopback(name) or not settings.loopback or settings.config.token:
            return
        if name == "" or name not in (settings.pages_host, *settings.hosts):
            raise HTTPForbidden(description=f"The Host '{name}' is not allowed. --allow-host allows it.")

    def check_origin(self, environ: WSGIEnvironment) -> None:
        """Raise HTTPForbidden for a write that another site's page sends (cross-site request forgery)."""
        site, origin = environ.get("HTTP_SEC_FETCH_SITE"), environ.get("HTTP_ORIGIN")
        if origin is None and "HTTP_REFERER" in environ:
            origin = "/".join(environ["HTTP_REFERER"].split("/", 3)[:3])
        own = site in (None, "same-origin", "none")
        if site is None and origin is not None:
            match, host = ORIGIN.fullmatch(origin.lower()), environ.get("HTTP_HOST", "").lower()
            # a public name is ours with any port: a proxy may have changed the Host
            own = match is not None and (match[2] in self.settings.hosts or match[1] == host != "")
        if not own:
            detail = "Another site's page may not change anything. --allow-host names this server's own."
            raise HTTPForbidden(description=detail)


@functools.lru_cache(256)
def is_loopback(host: str) -> bool:
    """Return whether a name or an address always means this machine."""
    name = host.strip("[]").lower().removesuffix(".")
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(name).is_loopback
    return name == "localhost" or name.endswith(".localhost")


# == The page =====================================================================================
#
# Pages are streamed, and work without their script. The script renders no rows: after a change it fetches
# the page again and takes its rows. For programs (pip, wget, rclone), the only links in a listing are the
# artefacts, the next part of the listing, and the parent. Everything else is a button.

PAGE_ROWS = 1000  # of a browser's navigation, unless it states a limit
PAGE_HEAD = r"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:"><title>@@</title>
<style>
:root { color-scheme: light dark; --soft: light-dark(#59646e, #9aa6b1); --blue: light-dark(#0757a8, #7ab8ff);
  --red: light-dark(#b3261e, #ff938a); --paper: light-dark(#fff, #15191d); --edge: 1px solid #8886;
  font: 1rem/1.5 system-ui, sans-serif; background: var(--paper); accent-color: var(--blue);
  scroll-padding: 4rem 0 7rem; }  /* the sticky head and status bar do not cover the focused element */
body { max-width: 75rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; margin: 0 auto 0 0; } header, details, #uploads { margin-bottom: 1rem; }
a { color: var(--blue); text-decoration: none; &:is(:hover, h1 *, p *) { text-decoration: underline; } }
.skip:not(:focus) { position: absolute; left: -99rem; } [hidden] { display: none !important; }
.bar, li { display: flex; flex-wrap: wrap; gap: .4rem 1rem; align-items: center; }
button, input { font: inherit; color: inherit; background: var(--paper); border: var(--edge);
  border-radius: .4rem; padding: .2rem .7rem; box-sizing: border-box; }
button { cursor: pointer; &:disabled { cursor: auto; } &:hover:enabled { background: #8882; } }
label, input { max-width: 100%; } input[type=file] { width: 14rem; } ::placeholder { opacity: 1; }
:focus-visible, .dragover { outline: 2px solid var(--blue); outline-offset: -1px; }
#upload { border: 2px dashed #8886; border-radius: .6rem; padding: .7rem 1rem; }
ul { padding: 0; margin: 0; content-visibility: auto; contain-intrinsic-height: auto 200rem; }
:is(li, #total) { padding: 2px; :is(bdi, span) { flex: 1 1 12rem; } }
:is(.stored, .failed) progress, :not(.failed) > [name=retry], :not(.open) > [name=cancel],
  .fixed ~ [name=delete], :is(#uploads, tbody + tbody):empty { display: none; }
table, thead, tbody, tfoot { display: block; } table { margin-top: 1rem; }
thead { position: sticky; top: 0; z-index: 1; background: var(--paper); }
tbody { content-visibility: auto; contain-intrinsic-height: 216.5rem; }  /* of 100 rows */
thead + tbody:empty::after { content: "Nothing here."; }
tr { display: grid; grid-template-columns: 1fr 5.5rem 7rem 9.5rem 16rem; border-bottom: var(--edge); }
.directories tr { grid-template-columns: 1fr 9.5rem 16rem; } tbody tr:hover { background: #8881; }
td, th { padding: .3rem .4rem; text-align: left; min-width: 0; } td form { display: contents; }
td:last-child { display: flex; flex-wrap: wrap; align-items: start; } td span { padding-right: .8rem; }
.files :is(td, th):nth-child(2) { text-align: right; button { padding: 0; } } time { white-space: nowrap; }
:is(td, th) button { border: 0; padding: 0 .8rem 0 0; min-height: 1.5rem; background: none; font: inherit; }
[aria-sort=ascending] button::after { content: " ▲"; } [aria-sort=descending] button::after { content: " ▼"; }
time, output, span, td button:not(:hover), ::placeholder { color: var(--soft); }
footer { position: sticky; bottom: 0; z-index: 1; background: var(--paper); max-height: 6rem; overflow: auto;
  &:not(:has(:empty)) { border-top: var(--edge); padding: .4rem 0; } }
dialog { max-width: min(32rem, 80vw); background: var(--paper); border: var(--edge); border-radius: .6rem; }
#question { flex: 1 0 100%; } #status, #search { flex: 1; margin: 0; } .failed span { color: var(--red); }
@media (max-width: 48rem) { td, th { padding: .1rem .4rem; } thead :is(td, th:nth-child(4)) { display: none; }
  tr { display: flex !important; flex-wrap: wrap; padding: .2rem 0; } td:first-child { flex: 1 1 100%; }
  tbody { contain-intrinsic-height: 556.5rem; } }
@media (min-width: 48.01rem) { #fold[open] summary { display: none; } }  /* the script folds it on phones */
@media (scripting: none) { .script { display: none; }
  .files tr { grid-template-columns: 1fr 5.5rem 9.5rem 8.5rem 11rem; } }
@media print { form, details, td:last-child, output, footer, ul, #search, #total { display: none !important; }
  tbody { content-visibility: visible; } tr { break-inside: avoid; } thead { position: static; } }
</style>
"""
PAGE_END = r"""</main><footer class="bar"><p id="status" role="status"></p>
<button name="undo" hidden>Undo</button></footer>
<dialog aria-labelledby="question"><form method="dialog" class="bar"><p id="question"></p>
<button>Cancel</button><button id="yes" value="yes"></button></form></dialog>
<template id="line"><li><bdi></bdi><progress value="0"></progress><span></span>
<button name="cancel">Cancel</button><button name="retry">Retry</button></template>
<script type="module">
const find = (query, within = document) => within.querySelector(query);
const table = find("table"), search = find("#search"), form = find("#upload"), total = find("#total");
const dialog = find("dialog"), undo = find("[name=undo]"), statusText = find("#status");
const natural = new Intl.Collator("en", {numeric: true});
const ages = new Intl.RelativeTimeFormat("en", {style: "short"});
const isolate = (name) => `\u2068${name}\u2069`;  // its writing direction does not change the text around it
const list = (texts) => texts.slice(0, 10).join(", ") + (texts.length > 10 ? " …" : "");
const areNow = (items) => items.length === 1 ? `${isolate(items[0].name)} is` : `${items.length} are`;
function say(text, offerUndo = false) {
  undo.hidden = !offerUndo;
  if (statusText.textContent !== text) statusText.textContent = text;
}
function size(bytes) {
  const power = bytes < 1000 ? 0 : Math.floor(Math.log10(bytes) / 3);
  return `${Number((bytes / 1000 ** power).toPrecision(3))} ${["B", "kB", "MB", "GB", "TB", "PB"][power]}`;
}
function age(time) {
  const minutes = Math.floor(Math.max(0, Date.now() - new Date(time)) / 60000);
  const [unit, length] = minutes < 60 ? ["minute", 1] : minutes < 2880 ? ["hour", 60] : ["day", 1440];
  return minutes < 1 ? "just now" : ages.format(-Math.floor(minutes / length), unit);
}
function nameButtons(row, name) {
  for (const button of row.querySelectorAll("button")) button.ariaLabel = `${button.textContent} ${name}`;
}
// Drop credentials (fetch refuses them, and nobody should copy them). Encode what shells and curl interpret.
const plainUrl = (url, {origin, pathname, search} = new URL(url)) =>
  origin + (pathname + search).replace(/['[\]{}]/g, (sign) => `%${sign.charCodeAt().toString(16)}`);
const explain = (status, body) => body?.detail ?? `The answer was ${status}.`;  // a proxy sends no detail
async function request(method, url, headers) {  // throws the text to show
  const answer = await fetch(plainUrl(url), {method, headers})
    .catch(() => { throw "The server does not answer. Try again later."; });
  if (!answer.ok) throw explain(answer.status, await answer.json().catch(() => null));
  return answer;
}
addEventListener("unhandledrejection", (event) => { event.preventDefault(); say(event.reason); });

// The rows. A complete listing is filtered and sorted here, a cut one (a part of many rows) by the server.
const view = {filter: "", sort: "", descending: false, ...history.state};  // Back restores it
const cut = Boolean(find("[rel=next]")) || /[?&](after|limit)=/.test(location.search);
let rows = [], shown = [], turn = 0, typing = 0, erased = [];
function readRows() {
  rows = [...table.querySelectorAll("tbody tr")].map((row) => {
    const link = find("a", row), name = link.textContent, time = find("time", row);
    const [, size, , digest] = row.cells, sha256 = digest?.title;
    if (sha256) digest.innerHTML = `<button name="sha256" title="Copy">${digest.textContent}</button>`;
    row.lastElementChild.append(find("#buttons").content.cloneNode(true));
    nameButtons(row, name);
    [time.title, time.textContent] = [`${time.textContent} UTC`, age(time.dateTime)];
    return {row, name, sha256, url: plainUrl(link.href), time: time.dateTime, size: parseInt(size.title)};
  });
  arrange();
}
function arrange() {  // shows the rows that the filter leaves, in the chosen order
  const words = cut ? [] : view.filter.toLowerCase().split(/\s+/);
  const [order, sign] = view.descending ? ["descending", -1] : ["ascending", 1];
  shown = rows.filter(({name, sha256}) => words.every((word) => name.toLowerCase().includes(word)
    || word.length >= 12 && sha256?.startsWith(word)));  // the table shows 12 characters of a digest
  if (view.sort && !cut) shown.sort((a, b) => sign * natural.compare(a[view.sort], b[view.sort]));
  [...table.tBodies].forEach((body, at) =>
    body.replaceChildren(...shown.slice(100 * at, 100 * at + 100).map(({row}) => row)));
  for (const button of document.querySelectorAll("[name=sort]")) {
    button.parentElement.ariaSort = button.value === view.sort ? order : "none";
    button.disabled = cut && button.value === "size";
  }
  const {length} = shown, more = find("[rel=next]") ? " and more" : "";
  const part = view.filter ? `${more} found by the server` : " of more; the server filters and sorts";
  find("output").value = length + (cut ? part : ` of ${rows.length}`);
  const several = find("[name=deleteShown]") ?? {};
  [several.hidden, several.textContent] = [!view.filter || !length, `Delete the ${length} shown`];
}
function changeView(change) {
  history.replaceState(Object.assign(view, change), "");
  clearTimeout(typing);
  if (cut) typing = setTimeout(refresh, 200); else arrange();
}
const pattern = (text) => `*${text.trim().replace(/[*?[]|\p{L}|\s+/gu, (sign) =>
  sign.trim() ? `[${sign.toLowerCase()}${sign.toUpperCase()}]` : "*")}*`;  // a shell pattern without case
async function refresh() {
  const mine = ++turn, url = new URL(location), query = url.searchParams;
  if (cut && !query.has("limit")) query.set("limit", 1000);
  if (cut && view.filter) query.set("match", pattern(view.filter));
  if (cut && view.sort === "time") query.set("sort", "newest");
  if (cut && (view.filter || view.sort)) query.delete("after");  // all rows, not this part of them
  const text = await (await request("GET", url, {Accept: "text/html"})).text();
  const fresh = find("table", new DOMParser().parseFromString(text, "text/html"));
  if (!fresh) throw "The answer is no listing. Load the page again.";
  if (mine !== turn) return;  // a newer request is under way
  const focused = document.activeElement, name = rows.find(({row}) => row.contains(focused))?.name;
  table.replaceChildren(table.tHead, ...fresh.tBodies, fresh.tFoot);
  readRows();
  const same = rows.find((row) => row.name === name)?.row;
  (same ? find(focused.name ? `[name=${focused.name}]` : "a", same) : focused)?.focus();
}
let lastQuestion = Promise.resolve();  // each question waits for the answer to the last one
const ask = (question, yes) => lastQuestion = lastQuestion.then(() => new Promise((resolve) => {
  [find("#question").textContent, find("#yes").textContent, dialog.returnValue] = [question, yes, ""];
  dialog.onclose = () => resolve(dialog.returnValue);
  dialog.showModal();
}));
function copy(text, what) {  // navigator.clipboard exists on https and localhost only
  document.oncopy = (event) => [event.preventDefault(), event.clipboardData.setData("text/plain", text)];
  say(document.execCommand("copy") ? `${what} copied.` : `Copy it by hand: ${text}`);
  document.oncopy = null;
}
async function erase(chosen, question) {
  if (!await ask(question, "Delete")) return;
  const kept = Boolean(find("[name=deleted]")), failures = [], at = shown.indexOf(chosen[0]);
  erased = [];
  for (const artefact of chosen) {
    await request("DELETE", artefact.url, artefact.sha256 ? {"If-Match": `"${artefact.sha256}"`} : {})
      .then(() => erased.push(artefact), (why) => failures.push(why));
    if (chosen.length > 1) say(`${erased.length} of ${chosen.length} deleted …`);
  }
  rows = rows.filter((artefact) => !erased.includes(artefact));
  arrange();
  const note = kept ? ` ${erased.length === 1 ? "Its" : "Their"} versions are kept.` : "";
  if (erased.length) failures.unshift(`${areNow(erased)} deleted.${note}`);
  say(list(failures), kept && erased.length);
  const next = shown[at] ?? shown.at(-1);
  (undo.hidden ? next && find("a", next.row) : undo)?.focus();
}
const actions = {  // by the names of the buttons
  link: ({url}) => copy(url, "Link"),
  curl: ({url}) => copy(`curl -fOJ '${url}'`, "curl command"),
  sha256: ({sha256}) => copy(sha256, "SHA-256"),
  sort: (_, {value}) => changeView({  // the server sorts by name, or the newest first
    sort: value, descending: value === view.sort && !cut ? !view.descending : value !== "name"}),
  async restore({name}, {form: {action}}) {
    if (!await ask(`Restore ${isolate(name)}?`, "Restore")) return;
    await request("POST", action);
    await refresh();
    say(`${isolate(name)} is restored.`);
  },
  async undo() {
    for (const {url, time} of erased)
      await request("POST", `${url}?restore=${time.replace(/[-:]/g, "")}`, {"If-None-Match": "*"});
    await refresh();
    say(`${areNow(erased)} restored.`);
  },
  delete(artefact) {
    const {row, name, size, time} = artefact, text = row.cells[1].textContent;
    const what = size >= 0 ? `, ${text}, stored ${age(time)}` : " and everything in it";
    return erase([artefact], `Delete ${isolate(name)}${what}?`);
  },
  deleteShown: (_, {textContent}) =>
    erase(shown, `${textContent}? ${list(shown.map(({name}) => isolate(name)))}`),
  cancel: (upload) => mark(upload, "failed", "cancelled"),
  cancelAll: () => inState("open").forEach(actions.cancel),
  retry: (upload) => pushAll([upload]),
  retryAll: () => pushAll(inState("failed")),
};
document.addEventListener("click", (event) => {
  const button = event.target.closest("button"), action = actions[button?.name];
  if (!action) return;
  event.preventDefault();
  action([...rows, ...uploads].find(({row}) => row.contains(button)), button);
});
addEventListener("keydown", (event) => {
  if (event.key !== "/" || event.target.closest("input, dialog")) return;
  event.preventDefault();
  search.focus();
});

let uploads = [], skipped = 0, totalMeter;  // the class of an upload's line is its state
const isOpen = ({row}) => row.className === "open";
const inState = (state) => uploads.filter(({row}) => row.className === state);  // or "stored", "failed"
function progressMeter() {  // describes progress, with the speed of the last 5 seconds
  const samples = [];
  return (done, all) => {
    const now = performance.now();
    samples.push([now, done]);
    while (now - samples[0][0] > 5000) samples.shift();
    const [[then, before]] = samples, speed = (done - before) / (now - then) * 1000;  // at first NaN
    const left = (all - done) / speed, [time, unit] = left < 90 ? [left, "second"] : [left / 60, "minute"];
    const text = `${size(done)} of ${size(all)}`, moving = speed > 0 && done < all;
    return moving ? `${text}, ${size(speed)}/s, done ${ages.format(Math.ceil(time), unit)}` : text;
  };
}
function report() {
  const [open, stored, failed] = ["open", "stored", "failed"].map((state) => inState(state).length);
  const [sent, all] = ["sent", "size"].map((key) => uploads.reduce((sum, upload) => sum + upload[key], 0));
  const [, bar, note, cancel, retry] = total.children;
  bar.value = sent / all || 0;
  note.textContent = `${stored + failed} of ${uploads.length} files, ${totalMeter(sent, all)}`;
  [total.hidden, cancel.hidden, retry.hidden] = [uploads.length < 2, !open, open || !failed];
  say(`${stored} stored, ${failed} not, ${open} to go.`
    + (skipped ? ` ${skipped} skipped: their names, or their folders' names, begin with a dot.` : ""));
}
function mark(upload, state, text) {
  upload.row.className = state;
  upload.note.textContent = text;
  [upload.sent, upload.etag] = state === "open" ? [0, upload.etag] : [upload.size, null];
  if (state === "failed") upload.request?.abort();
}
function addUpload(file, path, at) {
  const row = find("#line").content.firstElementChild.cloneNode(true), [label, bar, note] = row.children;
  const name = path.join("/"), url = plainUrl(form.action) + path.map(encodeURIComponent).join("/");
  label.textContent = bar.ariaLabel = name;
  nameButtons(row, name);
  if (at % 100 === 0) find("#uploads").append(document.createElement("ul"));  // for fast layout of 5,000
  find("#uploads").lastElementChild.append(row);
  return {file, row, bar, note, name, url, size: file.size};
}
async function look(upload) {  // at what the upload would replace; returns whether there is something
  const {headers} = await fetch(upload.url, {method: "HEAD"}).catch(() => new Response());
  const bytes = headers.get("Content-Length"), stored = headers.get("Last-Modified") ?? Date.now();
  upload.etag = headers.get("ETag");
  upload.note.textContent = "exists already";
  upload.about = `${isolate(upload.name)} (${size(bytes)}, stored ${age(stored)})`;
  return Boolean(upload.etag);
}
async function send(upload) {  // leaves the state at open if a question must be answered first
  const {file, url, bar, note, etag} = upload, meter = progressMeter(), request = new XMLHttpRequest();
  // Chromium reads an answer only after it has sent the body: the 412 for 30 MB at 3 MB/s took 9.6 s.
  const exists = isOpen(upload) && !etag && file.size > 1e6 && await look(upload);
  if (exists || !isOpen(upload)) return;  // it may have been cancelled
  upload.request = request;
  request.open("PUT", url);
  request.setRequestHeader(...(etag ? ["If-Match", etag] : ["If-None-Match", "*"]));
  request.responseType = "json";
  request.upload.onprogress = ({loaded, total}) => {
    upload.sent = loaded;
    bar.value = loaded / total;
    note.textContent = loaded < total ? meter(loaded, total) : "storing…";
  };
  request.send(file);
  await new Promise((resolve) => { request.onloadend = resolve; });
  const {status, response} = request;
  if (status === 412 && !etag && await look(upload)) return;
  if (status >= 200 && status < 300) mark(upload, "stored", "stored");
  else if (status) mark(upload, "failed", explain(status, response));
  else if (isOpen(upload)) {
    mark(upload, "failed", "The connection broke. Try again. If the file was changed, choose it again.");
    find("[name=retry]", upload.row).focus();
  }
}
async function pushAll(chosen) {  // asks one question before it replaces anything
  for (const upload of chosen) mark(upload, "open", "waiting");
  const waiting = chosen.values(), reporting = setInterval(report, 100);
  await Promise.all([1, 2, 3].map(async () => { for (const upload of waiting) await send(upload); }));
  clearInterval(reporting);
  report();
  refresh();
  const existing = chosen.filter(isOpen);
  if (!existing.length) return;
  const which = chosen.length > 1 ? `${existing.length} of ${chosen.length} files? ` : "";
  const question = `Replace ${which}${list(existing.map(({about}) => about))}${which ? "" : "?"}`;
  if (await ask(question, "Replace")) return pushAll(existing);
  for (const upload of existing) mark(upload, "failed", "not replaced");
  report();
  say(`Nothing was changed: ${list(existing.map(({name}) => isolate(name)))} stayed as before.`);
}
async function* filesBelow(entry, folder = []) {  // of a dropped file or folder
  const path = [...folder, entry.name];
  if (entry instanceof File) yield {file: entry, path};
  else if (entry.isFile) yield {file: await new Promise((...done) => entry.file(...done)), path};
  else for (let reader = entry.createReader(), batch; batch?.length !== 0;)
    for (const child of batch = await new Promise((...done) => reader.readEntries(...done)))
      yield* filesBelow(child, path);
}
if (form) {
  let dropped = [];  // kept until the folder's name is valid
  const {into, files, tree} = form, phone = matchMedia("(max-width: 48rem)");
  const fromInput = (file) => ({file, path: (file.webkitRelativePath || file.name).split("/")});
  const fold = find("#fold"), {open} = fold;
  (phone.onchange = () => { fold.open = open && !phone.matches; })();
  files.onchange = tree.onchange = () => form.requestSubmit();
  form.onsubmit = (event) => {
    event.preventDefault();
    const chosen = [...dropped, ...[...files.files, ...tree.files].map(fromInput)];
    const wanted = chosen.filter(({path}) => !path[1] || !path.some((name) => name.startsWith(".")));
    const folder = into.value.split("/").filter(Boolean);
    [dropped, files.value, tree.value] = [[], "", ""];
    if (!chosen.length) return say("Choose files or a folder first.");
    if (!uploads.some(isOpen))  // keep those that can be tried again
      [uploads, skipped, totalMeter] = [inState("failed"), 0, progressMeter()];
    skipped += chosen.length - wanted.length;
    const added = wanted.map(({file, path}, at) => addUpload(file, [...folder, ...path], at));
    uploads.push(...added);
    pushAll(added);
  };
  for (const type of ["dragover", "dragleave", "drop"]) document.addEventListener(type, async (event) => {
    const {items, types} = event.dataTransfer;
    if (!types.includes("Files")) return;
    event.preventDefault();
    form.classList.toggle("dragover", type === "dragover");
    if (type !== "drop") return;
    for (const entry of [...items].map((item) => item.webkitGetAsEntry() ?? item.getAsFile()))
      for await (const file of filesBelow(entry)) dropped.push(file);
    form.requestSubmit();
  });
  addEventListener("beforeunload", (event) => { if (uploads.some(isOpen)) event.preventDefault(); });
}
search.value = view.filter;
search.oninput = () => changeView({filter: search.value});
readRows();
const [{type}] = performance.getEntriesByType("navigation");  // Back may show old rows
addEventListener("pageshow", ({persisted}) => { if (persisted || type !== "navigate") refresh(); });
</script>
"""
PAGE_POLICY = (  # allows only our style and script, by their hashes
    "default-src 'none'; style-src 'sha256-{}'; script-src 'sha256-{}'; connect-src 'self'; img-src data:; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
).format(*(
    base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    for text in re.findall(r"(?s)<(?:style|script)[^>]*>(.*?)</(?:style|script)>", PAGE_HEAD + PAGE_END)
))
UPLOAD_FORM = """<details id="fold" %s><summary>Upload</summary><form id="upload" class="bar" method="post"
 enctype="multipart/form-data" action="%s"><label class="script">%s pattern="(?!/*$|\\.|.*/\\.).*"
 title="Type a name, or names with / between them. A name cannot begin with a dot."></label>
<label>Files <input id="files" type="file" name="file" multiple></label>
<label class="script">or a folder <input id="tree" type="file" webkitdirectory></label><button>Upload</button>
<span class="script">or drop them on this page.</span></form></details>
<div id="total" class="bar" hidden><bdi>All files</bdi><progress value="0" aria-label="All files"></progress>
<span></span><button name="cancelAll">Cancel all</button><button name="retryAll">Retry all</button></div>
<div id="uploads"></div>"""
FILTER = """<div class="bar"><input id="search" class="script" type="search" autocomplete="off"
 aria-label="%s" placeholder="%s"><output class="script" for="search"></output>%s</div>"""
DOWNLOADS = """<form class="bar" action="%s"><span>Download all:</span>
<button name="format" value="zip">zip</button> <button name="format" value="tar">tar</button>
<button name="format" value="sha256sums">checksums</button>%s</form>"""
DIRECTORIES = """<table class="directories"><thead><tr><th><button name="sort" value="name">Name</button>
<th><button name="sort" value="time">Changed</button><td></thead><tbody>"""
FILES = """<table class="files"><thead><tr><th><button name="sort" value="name">Name</button>
<th><button name="sort" value="size">Size</button><th><button name="sort" value="time">Stored</button>
<th>SHA-256<td></thead><tbody>"""
VERSIONS_FORM = '<form action="{}"><button name="versions">Versions</button></form>'
RESTORE_FORM = '<form method="post" action="{}"><button name="restore">Restore</button></form>'
FIXED = '<span class="fixed">{}</span> '  # the row cannot be deleted


@dataclass(frozen=True, slots=True)
class PageView:
    """What a page shows besides its rows."""

    base: str = ""  # the path that the application is mounted under
    link_base: str = ""  # leads from the page's URL to the directory or folder: "" or "app/"
    directory: str = ""
    folder: str = ""  # of a folder's listing, with a slash at its end
    next_url: str | None = None  # leads to the next part of a listing that was cut
    deleted: bool = False  # the listing is of deleted artefacts
    token: str | None = None  # the name of the visitor's token
    may_sign_in: bool = False  # the visitor could see or do more with a token
    may_push: bool = True
    may_erase: bool = True  # replace, delete and restore
    keeps_versions: bool = False
    for_person: bool = True  # the request came from a browser, not from a program such as pip or wget
    with_digests: bool = False  # links end in #sha256= (only for pip and its like; it breaks other programs)


def render_page(resp: Resp, pieces: Iterable[str]) -> None:
    resp.content_type = "text/html; charset=utf-8"
    resp.set_header("Content-Security-Policy", PAGE_POLICY)
    resp.data = "".join(pieces).encode()


def page_start(view: PageView, *names: str) -> str:
    """Return a page up to its content. The heading has the page's name, after links to everything above it.
    For programs it has one link, to the parent: fsspec would take others for artefacts."""
    link, text, heading = f"{view.base}/artefacts/", "Artefacts", ""
    for name in names:
        heading += f'<a href="{link}">{text}</a> / '
        link, text = f"{link}{quote(name, safe='')}/", f"<bdi>{escape(name)}</bdi>"
    if names and not view.for_person:
        heading = f'<a href="{"./" if view.link_base else "../"}">Artefacts</a> / '
        text = escape("/".join(names))
    title = escape(": ".join(filter(None, ("Artefacts", "/".join(names)))))
    skip = '<a class="skip" href="#content">Skip to the list</a>' if view.for_person else ""
    who = f"<span>Signed in as <bdi>{escape(view.token)}</bdi></span>" if view.token else ""
    sign_in = '<button name="login">Sign in</button>' if view.may_sign_in else ""
    form = f'<form class="bar" action="{view.base}/artefacts/">{who}{sign_in}</form>'
    header = f'{skip}<header class="bar"><h1>{heading}{text}</h1>{form}</header>'
    return f'{PAGE_HEAD.replace("@@", title)}{header}\n<main id="content" tabindex="-1">'


def page_rows(view: PageView, columns: str, rows: Iterable[str]) -> Iterator[str]:
    """Generate a table and the end of the page. The script adds the buttons of the template to each row."""
    yield columns
    for at, row in enumerate(rows):  # in groups of 100, for fast layout: a sort of 10,000 rows takes 0.4 s
        yield row if at % 100 or not at else f"<tbody>{row}"
    more = f'<tr><td><a rel="next" href="{escape(view.next_url)}">More</a>' if view.next_url else ""
    copy = '<button name="link">Link</button><button name="curl">curl</button>' if columns == FILES else ""
    delete = '<button name="delete">Delete</button>' if view.may_erase and not view.deleted else ""
    yield f'<tfoot>{more}</tfoot></table><template id="buttons">{copy}{delete}</template>{PAGE_END}'


def artefact_row(view: PageView, artefact: Artefact, is_current: bool | None = None) -> str:
    """Return the table row of an artefact, or of one of its versions: `is_current` is given for these."""
    if is_current is None:
        name = artefact.id.removeprefix(view.folder)
        path = link = view.link_base + quoted(name)
        buttons = VERSIONS_FORM.format(path)
    else:
        name, path, buttons = artefact.version, "", FIXED.format("current") if is_current else ""
    if view.deleted or is_current is not None:
        link = f"{path}?version={artefact.version}"
        if view.may_erase and not is_current:
            buttons += RESTORE_FORM.format(f"{path}?restore={artefact.version}")
    elif view.with_digests and artefact.sha256:
        link += f"#sha256={artefact.sha256}"
    size, unit = float(artefact.size), 0
    while size >= 999.5:
        size, unit = size / 1000, unit + 1
    sha256, time = artefact.sha256 or "", artefact.modified
    return (
        f'<tr><td role="rowheader"><a href="{link}"><bdi>{escape(name)}</bdi></a>'
        f'<td title="{artefact.size} bytes">{size:.3g} {["", *"kMGTPE"][unit]}B'
        f'<td><time datetime="{time}">{time[:16].replace("T", " ")}</time>'
        f'<td title="{sha256}">{sha256[:12]}<td>{buttons}\n'
    )


def directories_page(view: PageView, directories: Iterable[tuple[str, str, bool]]) -> Iterator[str]:
    """Generate the page of all directories. Each comes with the time of its last change (RFC 3339; "": it was
    removed meanwhile), and whether the visitor may delete it."""
    yield page_start(view)
    if view.may_push:
        field = 'Directory <input id="into" required'
        yield UPLOAD_FORM % ('class="script" open', f"{view.base}/artefacts/", field)
    yield FILTER % ("Filter directories", "Directory", "")
    yield from page_rows(view, DIRECTORIES, (
        f'<tr><td role="rowheader"><a href="{href(view.base, name)}"><bdi>{escape(name)}</bdi></a>'
        f'<td><time datetime="{changed}">{changed[:16].replace("T", " ")}</time>'
        f'<td>{"" if may_erase else FIXED.format("")}\n'
        for name, changed, may_erase in directories if changed))


def directory_page(view: PageView, artefacts: Iterable[Artefact]) -> Iterator[str]:
    """Generate the page of a directory or a folder, or of what was deleted there."""
    yield page_start(view, view.directory, *view.folder.split("/")[:-1], *["deleted"][: view.deleted])
    action = view.link_base or "./"
    folded = "open" if view.may_erase else ""  # nothing can be replaced in a write-once directory
    delete = '<button name="deleteShown" hidden></button>' if view.may_erase else ""
    deleted = '<button name="deleted">Show deleted</button>' if view.keeps_versions else ""
    if view.may_push and not view.deleted:
        yield UPLOAD_FORM % (folded, action, 'Folder <input id="into" placeholder="optional"')
    controls = "" if view.deleted else delete + DOWNLOADS % (action, deleted)
    yield FILTER % ("Filter", "Name or SHA-256", controls)
    yield from page_rows(view, FILES, map(artefact_row, itertools.repeat(view), artefacts))


def versions_page(view: PageView, id: str, versions: Iterable[tuple[Artefact, bool]]) -> Iterator[str]:
    """Generate the page of an artefact's versions. Each comes with whether it is the current one."""
    yield page_start(view, view.directory, id) + FILTER % ("Filter", "Time or SHA-256", "")
    yield from page_rows(view, FILES, (artefact_row(view, *version) for version in versions))


def error_page(view: PageView, title: str, detail: str, back: str) -> str:
    """Return the page of a failed navigation. `back` is a URL. After a 401, a browser asks for the token when
    it loads the page again."""
    again = '<p><a href="">Sign in</a></p>' if title.startswith("401") else ""
    return f'{page_start(view, title)}<p>{escape(detail)}</p>{again}<p><a href="{back}">Back</a></p></main>'


# == Errors as responses ==========================================================================

STATUSES: dict[type[ArtefactsError], int] = {
    InvalidName: 400, Mismatch: 400, NotFound: 404, Conflict: 409, PreconditionFailed: 412, TooLarge: 413,
    Damaged: 500, Unavailable: 503, CannotStore: 507, OutOfSpace: 507,
}  # fmt: skip
OS_ERRORS = {  # by the names of their numbers. The first ones: of vfat, ecryptfs and others
    "EINVAL EILSEQ ENAMETOOLONG": (400, "The file system cannot store this name. Choose a simpler one."),
    "ENOSPC EDQUOT": (507, "The disk or its quota is full. Delete something, and its ?versions."),
    "EACCES EPERM": (500, "The server has no permission for this file. Tell this server's administrator."),
    "EFBIG": (413, "The file system cannot store a file of this size. Send less."),
    "ELOOP": (409, "A symbolic link is in the way, and links are not followed. Choose another name."),
    "ENOTDIR": (409, "Something that is not a folder is in the way. Choose another name."),
    "EAGAIN": (503, "Another program holds the file. Try again later."),
    "EMFILE ENFILE": (503, "Too many files are open. Try again later."),
    "EROFS": (500, "The data directory is read-only. Tell this server's administrator."),
    "EIO": (500, "The disk cannot be read or written. Tell this server's administrator."),
}
DETAILS = {  # of errors that Falcon raises itself, and of unexpected ones
    400: "The request is malformed. Correct it.",
    404: "Nothing is served under this path. Artefacts are at /artefacts/<directory>/<id>.",
    405: "This resource does not support the method. Use one of those in 'Allow'.",
    500: "Internal error. Check what is stored before you try again; the server's log has the details.",
}


def problem_of(error: Exception, method: str = "") -> dict[str, Any]:
    """Return the problem document (RFC 9457) of any error. An OSError's own text may contain a path."""
    code, detail = 500, DETAILS[500]
    if isinstance(error, ArtefactsError):
        code, detail = STATUSES[type(error)], error.detail
    elif isinstance(error, falcon.HTTPError):
        code, detail = error.status_code, error.description or DETAILS.get(error.status_code, error.title)
    elif isinstance(error, OSError):
        name = errno.errorcode.get(error.errno or 0)
        known = (answer for names, answer in OS_ERRORS.items() if name in names.split())
        code, detail = next(known, (code, detail))
    if code == 400 and method in READING and not isinstance(error, falcon.HTTPError):
        code = 404  # an invalid name: clients probe for names such as .zarray
    problem = {"title": falcon.code_to_http_status(code)[4:], "status": code, "detail": detail}
    return problem | {"code": getattr(error, "code", "in_the_way")} if code == 409 else problem


def error_response(error: Exception, method: str = "") -> tuple[str, list[tuple[str, str]], bytes]:
    """Return the response to any error: status line, header fields, and the problem document."""
    problem = problem_of(error, method)
    fields = {"retry-after": "10"} if problem["status"] == 503 else {}
    if isinstance(error, falcon.HTTPError) and error.headers:
        fields |= {name.lower(): value for name, value in dict(error.headers).items()}
    fields |= {"content-type": "application/problem+json", "cache-control": "no-store",
               "x-content-type-options": "nosniff", CORP.lower(): SAME_ORIGIN}  # fmt: skip
    status = f"{problem['status']} {problem['title']}"
    return status, list(fields.items()), json.dumps(problem).encode() + b"\n"


def render_problem(req: Req, resp: Resp, error: Exception) -> dict[str, Any]:
    """Render any error as a problem document, and return it. Log it if the server is at fault."""
    problem = problem_of(error, req.method)
    if problem["status"] >= 500 or (isinstance(error, OSError) and problem["status"] in (400, 404)):
        unexpected = problem["detail"] == DETAILS[500]
        log.error("%s %s: %s", req.method, req.path, error, exc_info=error if unexpected else None)
    resp.status, fields, resp.data = error_response(error, req.method)
    resp.set_headers(fields)
    return problem


def handle_error(req: Req, resp: Resp, error: Exception, params: object) -> None:
    """Render any error: a page for a person, else a problem document. It must not raise an HTTPError: Falcon
    would keep it in a reference cycle with its traceback, and what the connection received in memory."""
    problem = render_problem(req, resp, error)
    if is_navigation(req.env):
        base, up = quote(req.root_path), quote(req.path.rstrip("/").rpartition("/")[0])
        back = f"{base}{up}/" if re.match("/artefacts?(/|$)", up) else f"{base}/artefacts/"
        page = error_page(PageView(base=base), str(resp.status), problem["detail"], back)
        render_page(resp, [page])


# == Resources ====================================================================================

MAX_LIMIT, MAX_PATTERN = 10_000, 255  # rows of a listing that was cut, held in memory; characters of `match`
MAX_ZIP32 = 256 * 1024 * 1024  # bytes of a file that certainly needs no ZIP64, with its frames
ZIP_LEVEL = "_compresslevel"  # of a ZipInfo; Python 3.13 has `compress_level`, too
MIN_ZIP_TIME, MAX_ZIP_TIME = 315_532_800, 4_354_819_198  # seconds since the epoch: the years 1980 to 2107
ROWS_AT_ONCE = 200  # of a listing: about 64 KB
LONG, SOON = 4 * 1024 * 1024, 0.25  # bytes of a listing, and seconds of CPU for it, that make it a stream

# Keys of the environ in a header check (the table in "Connections"). HEADERS_ONLY: whether the body has been
# received; ON_WORKER: whether a worker thread checks, which may wait for the disk.
HEADERS_ONLY, ON_WORKER = "artefacts.headers_only", "artefacts.on_worker"


def require_body(req: Req) -> None:
    """End a header check with 100: what follows reads the body, writes, or waits for a lock or the disk."""
    if HEADERS_ONLY in req.env:
        raise falcon.HTTPStatus(falcon.HTTP_100)


def digested(req: Req, content: Content) -> Artefact:
    """Return the artefact with its digest. End a header check with 102 if a worker has to read the file."""
    if content.artefact.sha256 is None and HEADERS_ONLY in req.env and not req.env[ON_WORKER]:
        raise falcon.HTTPStatus(falcon.HTTP_102)
    return content.digested()


class Resource:
    """The base of all resources: what they share."""

    on_get: Callable[..., None]

    def __init__(self, repository: Repository, settings: Settings) -> None:
        self.repository, self.settings = repository, settings

    def on_head(self, req: Req, resp: Resp, **names: str) -> None:
        self.on_get(req, resp, **names)

    def on_propfind(self, req: Req, resp: Resp, **_: str) -> None:
        # sccache asks so before it writes. It takes 404 for "does not exist yet", and gives up at 405.
        raise NotFound("This is not a WebDAV collection. PUT works without one.")

    def expect_deletion(self, req: Req, directory: str) -> None:
        """Raise HTTPForbidden if nothing in the directory may be deleted. Else end a header check."""
        if self.settings.rule(directory, "write_once"):
            raise HTTPForbidden(description=f"'{directory}' is write-once. Push under another name.")
        require_body(req)

    def page_view(self, req: Req, directory: str = "", **more: Any) -> PageView:
        """Return what a page of the directory, or of all directories, shows to this visitor."""
        client, settings = req.env["artefacts.who"], self.settings
        is_second = settings.is_pages_host(req)  # where nothing can be changed
        may_push = not is_second and (client.may("write", directory) if directory else bool(client.write))
        is_anonymous = client is settings.config.anonymous
        return PageView(
            base=base_of(req), directory=directory, may_push=may_push,
            may_erase=may_push and not (directory and settings.rule(directory, "write_once")),
            keeps_versions=bool(directory and settings.rule(directory, "keep_versions")),
            token=None if is_anonymous else client.name,
            may_sign_in=is_anonymous and bool(settings.config.token) and not is_second,
            for_person=is_navigation(req.env),
            with_digests="application/vnd.pypi.simple.v1+html" in req.env.get("HTTP_ACCEPT", ""), **more,
        )

    def write_check(self, req: Req, directory: str, *, creates: bool = False) -> Check:
        """Return what the repository checks before a write: whether it may replace, and the preconditions."""
        write_once = self.settings.rule(directory, "write_once")

        def check(current: Content | None) -> None:
            if current is not None and (creates or write_once):
                hint = "It is written once. Choose another name." if write_once else "PUT replaces it."
                detail = f"'{directory}' has an artefact '{current.artefact.id}' already. {hint}"
                raise Conflict(detail, "write_once" if write_once else "exists")
            evaluate_conditions(req, current)

        return check

    @contextlib.contextmanager
    def receive(self, req: Req, directory: str, admit: Callable[[int], object], *, sha256: str | None = None,
                at_once: bool = False) -> Iterator[Upload]:
        """Yield the body as an upload: that of our own connection, or a new one that the body is read into.
        What the header shows to be refused is refused first; `admit` gets the announced length. at_once: stay
        on the event loop if neither the body nor fsync delays a push. TooLarge, Mismatch."""
        length, limit = body_length(req.env), self.settings.rule(directory, "max_size")
        stream, phase = req.env["wsgi.input"], req.env.get(HEADERS_ONLY)
        is_own = isinstance(stream, Upload)
        if is_own:
            stream.limit = limit
        if limit is not None and (length or 0) > limit:
            raise TooLarge(f"The limit is {limit} bytes. Send less; PUT the files of a form one by one.")
        if not is_own or phase is False:
            admit(length or 0)
        if not (at_once and is_own and phase and not self.repository.durable):
            require_body(req)
        with contextlib.nullcontext(stream) if is_own else self.repository.stage(limit) as upload:
            piece = b"" if is_own else b"-"
            while piece:
                try:
                    piece = (stream if length is None else req.bounded_stream).read(PIECE)
                except Exception:  # cheroot raises ValueError, gunicorn exceptions of its own
                    raise Mismatch("The body broke off. Send it again.") from None
                upload.write(piece)
            upload.verify(length, sha256)
            yield upload

    def push_form(self, req: Req, resp: Resp, directory: str, id: str | None = None) -> None:
        """Push each file of a form (RFC 7578), a commit each, under its own name or under `id`. The first
        refusal ends the form. The response has its status, and lists what was stored before it."""
        if not is_form(req):
            raise HTTPUnsupportedMediaType(description="POST a form (curl -F file=@f), or PUT an artefact.")
        if len(req.content_type or "") > MAX_FIELD:
            raise HTTPBadRequest(description="The form's Content-Type is too long. Shorten it.")
        if announced_sha256(req.env) is not None:
            raise HTTPBadRequest(description="A digest of a form is not checked. PUT the file itself.")
        check_names(directory, "-" if id is None else id)
        check = self.write_check(req, directory, creates=True)
        stored: list[Artefact] = []
        problem: dict[str, Any] = {"refused": []}
        target = None  # the id of the file that is being pushed
        with self.receive(req, directory, self.repository.check_space) as form:
            try:
                for name, type, read in files_of_form(form, req.content_type or ""):
                    target = id or name
                    self.repository.admit(directory, target, 0, check)
                    with self.repository.stage() as upload:
                        while piece := read(PIECE):
                            upload.write(piece)
                        artefact, _ = self.repository.push(upload, directory, target, type=type, check=check)
                    stored.append(artefact)
                    target = None
                if not stored:
                    raise HTTPBadRequest(description="The form has no file. Choose one (curl -F file=@f).")
                resp.status = falcon.HTTP_201
            except (ArtefactsError, falcon.HTTPError, OSError) as error:
                problem = render_problem(req, resp, error)
                refused = {"id": target, "status": problem["status"], "detail": problem["detail"]}
                problem["refused"] = [refused]
                problem["detail"] += f" Files before it that are stored: {len(stored)}." if stored else ""
        self.render_form(req, resp, directory, stored, problem)

    def render_form(self, req: Req, resp: Resp, directory: str, stored: Sequence[Artefact],
                    problem: dict[str, Any]) -> None:
        """Render what a form stored, and the problem that ended it, if any is `refused`."""
        base, back = base_of(req), href(base_of(req), directory)
        if format_of(req) != "html":
            rows = [json.loads(artefact_json(artefact, base)) for artefact in stored]
            render_json(resp, json.dumps(problem | {"directory": directory, "artefacts": rows}))
        elif not problem["refused"]:  # a browser without script
            raise falcon.HTTPSeeOther(back)
        else:
            detail = f"{problem['refused'][0]['id'] or 'The form'}: {problem['detail']}"
            view = self.page_view(req, directory)
            render_page(resp, [error_page(view, "Not everything was stored", detail, back)])

    def list_artefacts(self, req: Req, resp: Resp, directory: str, folder: str = "") -> None:
        """Render the artefacts below a folder ("", or with a slash at its end) that the query selects."""
        require_body(req)
        unreadable: list[str] = []
        format, base, deleted = format_of(req), base_of(req), req.has_param("deleted")
        if deleted and format not in ("json", "html"):
            raise HTTPBadRequest(description="Deleted artefacts are listed as 'json' or 'html' only.")
        rows, following = self._select(req, directory, folder, unreadable)
        if req.has_param("newest"):
            for newest in rows:
                raise falcon.HTTPTemporaryRedirect(href(base, directory, newest.id))
            raise NotFound("No artefact matches. Correct 'match' and 'prefix'.")
        resp.set_header("Vary", "Accept")
        if following is not None:
            resp.set_header("Link", f'<{following}>; rel="next"')
        if format in ("tar", "zip"):
            for _ in rows:  # if anything is unreadable, fail before the first byte
                pass
            if unreadable:
                detail = f"These cannot be read: {', '.join(unreadable[:10])}. Fetch the others without them."
                raise falcon.HTTPInternalServerError(description=detail)
            rows, _ = self._select(req, directory, folder, unreadable)
            name = f"{folder[:-1].rpartition('/')[2] or directory}.{format}"
            resp.set_header("Content-Disposition", content_disposition(name))
            resp.content_type, archive = type_of(name), tar_archive if format == "tar" else zip_archive
            resp.stream = archive(self.repository, rows, folder)
        elif format == "sha256sums":
            resp.content_type = "text/plain; charset=utf-8"
            sums = (f"{artefact.sha256}  {artefact.id.removeprefix(folder)}\n" for artefact in rows)
            send_texts(resp, sums)
        elif format == "html":
            here = "" if req.env["PATH_INFO"].endswith("/") else quote(directory, safe="") + "/"
            view = self.page_view(
                req, directory, link_base=here, next_url=following, folder=folder, deleted=deleted)
            render_page(resp, ())  # its header fields
            send_texts(resp, directory_page(view, rows))
        else:  # the href of a deleted artefact is that of its newest version
            objects = map(row_json, rows, itertools.repeat(base), itertools.repeat(deleted))
            send_texts(resp, json_listing(directory, objects, following, unreadable))

    def _select(self, req: Req, directory: str, folder: str,
                unreadable: list[str]) -> tuple[Iterator[Artefact], str | None]:
        """Return the artefacts that the query selects, and the path of the rest if `limit` cuts them."""
        prefix, after = req.get_param("prefix") or "", req.get_param("after") or ""
        matches = shell_pattern(req.get_param("match"))
        text, limit, format = req.get_param("limit"), None, format_of(req)
        if folder.startswith(prefix):
            prefix = folder
        elif not prefix.startswith(folder):
            raise HTTPBadRequest(description=f"Here, 'prefix' begins with '{folder}'. Correct it.")
        if req.get_param("sort", default="newest") != "newest":
            raise HTTPBadRequest(description="The only order is 'sort=newest'. Correct it.")
        if text is not None:
            if not re.fullmatch("0{0,9}[1-9][0-9]{0,17}", text):
                raise HTTPBadRequest(description="'limit' is a whole number from 1. Correct it.")
            limit = int(text)
        elif format == "html" and is_navigation(req.env) and not req.has_param("format"):
            limit = PAGE_ROWS
        if req.has_param("deleted"):
            deleted = self.repository.deleted(directory, prefix=prefix, after=after)
            found = (artefact for artefact in deleted if matches is None or matches(artefact.id))
        else:
            found = self.repository.artefacts(
                directory, prefix=prefix, after=after, matches=matches, unreadable=unreadable,
                digests=format == "sha256sums")
        if req.has_param("sort") or req.has_param("newest"):
            most = min(limit or PAGE_ROWS, PAGE_ROWS)
            return iter(heapq.nlargest(most, found, key=lambda artefact: artefact.time)), None
        if limit is None:
            return found, None
        with contextlib.closing(found):
            rows = list(itertools.islice(found, min(limit, MAX_LIMIT)))
            if next(found, None) is None:
                return iter(rows), None
        query = urlencode({**req.params, "after": rows[-1].id}, doseq=True)
        return iter(rows), f"{href(base_of(req), directory, folder)}?{query}"


class Root(Resource):
    """`/`"""

    def on_get(self, req: Req, resp: Resp) -> None:
        raise falcon.HTTPSeeOther(base_of(req) + "/artefacts/")


class Health(Resource):
    """`/healthz`: whether the data directory can be read and written, checked at most once a second."""

    def __init__(self, repository: Repository, settings: Settings) -> None:
        super().__init__(repository, settings)
        self.lock, self.checked, self.problem = threading.Lock(), -math.inf, ""

    def on_get(self, req: Req, resp: Resp) -> None:
        require_body(req)
        if not self.lock.acquire(timeout=1):
            raise falcon.HTTPServiceUnavailable(description="The disk does not answer.", retry_after=5)
        try:
            if time.monotonic() >= self.checked + 1:
                self.problem, self.checked = self.check(), time.monotonic()
        finally:
            self.lock.release()
        if self.problem:
            raise falcon.HTTPServiceUnavailable(description=self.problem, retry_after=5)
        render_json(resp, '{"status": "ok"}')

    def check(self) -> str:
        """Return what prevents reading and writing, "" if nothing does."""
        try:
            self.repository.check_health()
        except (ArtefactsError, OSError) as error:
            log.error("the data directory cannot be used: %s", error)
            detail: str = problem_of(error)["detail"]
            return detail if detail != DETAILS[500] else "The disk fails. The server's log has the details."
        return ""


class Directories(Resource):
    """`/artefacts/`"""

    def on_get(self, req: Req, resp: Resp) -> None:
        require_body(req)
        client, config, base = req.env["artefacts.who"], self.settings.config, base_of(req)
        if req.has_param("login") and client is config.anonymous and config.token:
            raise HTTPUnauthorized(description="Sign in with a token as the password.", challenges=CHALLENGES)
        names = [name for name in self.repository.directories() if client.may("read", name)]
        rows = [{"directory": name, "href": href(base, name)} for name in names]
        page = directories_page(self.page_view(req), (
            (name, self.repository.changed(name), self.page_view(req, name).may_erase) for name in names))
        render_list(req, resp, page, {"directories": rows})


class Directory(Resource):
    """`/artefacts/<directory>`"""

    on_get, on_post = Resource.list_artefacts, Resource.push_form

    def on_delete(self, req: Req, resp: Resp, directory: str) -> None:
        self.expect_deletion(req, directory)
        self.repository.delete_directory(directory)
        resp.status = falcon.HTTP_204


class ArtefactResource(Resource):
    """`/artefacts/<directory>/<id>`, and `/artefacts/<directory>/<folder>/`"""

    def on_get(self, req: Req, resp: Resp, directory: str, id: str) -> None:
        version, caching = None, "no-cache, no-transform"
        if self.repository.files.pauses:  # a shared file system, whose lookups wait for the network
            require_body(req)
        if req.query_string:  # mostly there is none: small fetches have 0.97 of the speed without this line
            if req.has_param("versions"):
                self._list_versions(req, resp, directory, id)
                return
            if req.has_param("at"):
                require_body(req)
                version = self.repository.version_at(directory, id, instant(req.get_param("at") or ""))
            elif req.has_param("version"):
                version, caching = req.get_param("version"), "max-age=31536000, immutable"
        try:
            content = self.repository.fetch(directory, id, version, from_memory=True)
        except NotFound:
            is_folder = req.has_param("deleted") or self.repository.has_folder(directory, id)
            if version is not None or not is_folder:
                raise
            self._show_folder(req, resp, directory, id)
        else:
            with content:
                self._respond(req, resp, content, caching)

    def _show_folder(self, req: Req, resp: Resp, directory: str, id: str) -> None:
        """List a folder, or show its index.html with `pages`. Links are relative to the URL with a slash."""
        if not req.env["PATH_INFO"].endswith("/"):
            query = f"?{req.query_string}" if req.query_string else ""
            raise falcon.HTTPPermanentRedirect(f"{href(base_of(req), directory, id)}/{query}")
        if self.settings.rule(directory, "pages") and not req.has_param("format"):
            with contextlib.suppress(NotFound):
                with self.repository.fetch(directory, f"{id}/index.html") as content:
                    self._respond(req, resp, content, "no-cache, no-transform")
                    return
        self.list_artefacts(req, resp, directory, f"{id}/")

    def _policy(self, req: Req, artefact: Artefact) -> str:
        """Return the Content-Security-Policy of an artefact with `pages`. HTML may run scripts: without an
        origin (sandbox), or under the second host name. Redirect a browser there that opens HTML. Players of
        audio and video need the origin, and run no script."""
        if self.settings.is_pages_host(req):
            return ""
        if not artefact.type.startswith("text/html"):
            return POLICY
        host = self.settings.pages_host
        if host and is_navigation(req.env):
            port = "" if req.port in (80, 443) else f":{req.port}"
            query = f"?{req.query_string}" if req.query_string else ""
            path = base_of(req) + quote(req.env["PATH_INFO"].encode("latin-1"))
            raise falcon.HTTPTemporaryRedirect(f"{req.scheme}://{host}{port}{path}{query}")
        return PAGES_POLICY

    def _list_versions(self, req: Req, resp: Resp, directory: str, id: str) -> None:
        require_body(req)
        versions, base = self.repository.versions(directory, id), base_of(req)
        rows = [json.loads(artefact_json(artefact, base, True)) | {"current": current}
                for artefact, current in versions]
        page = versions_page(self.page_view(req, directory), id, versions)
        render_list(req, resp, page, {"directory": directory, "id": id, "versions": rows})

    def _respond(self, req: Req, resp: Resp, content: Content, caching: str) -> None:
        """Send the representation, or the part of it that the request's conditions and range select."""
        artefact = digested(req, content)
        modified, caching = last_modified(artefact), self.settings.cache_control(caching)
        with_scripts = bool(self.settings.rule(artefact.directory, "pages"))
        policy = self._policy(req, artefact) if with_scripts else POLICY
        fields = representation_fields(artefact, modified, base_of(req), caching, policy, with_scripts)
        if evaluate_conditions(req, content) == 304:
            resp.status = falcon.HTTP_304  # RFC 9110 §15.4.5
            resp.set_headers([field for field in fields if field[0] in NOT_MODIFIED_FIELDS])
            return
        start, length = 0, artefact.size
        if "HTTP_RANGE" in req.env and req.method == "GET":  # RFC 9110 §14.2
            is_strong = modified is not None and modified + SETTLED <= time.time()
            part = byte_range(req.env["HTTP_RANGE"], req.env.get("HTTP_IF_RANGE"), artefact.size,
                              f'"{artefact.sha256}"', modified if is_strong else None)
            if part is not None:
                start, length = part
                resp.status = falcon.HTTP_206
                resp.set_header("Content-Range", f"bytes {start}-{start + length - 1}/{artefact.size}")
        resp.set_headers(fields)
        if req.method == "HEAD":
            resp.content_length = length
        else:
            send_content(req, resp, content, start, length)

    def on_put(self, req: Req, resp: Resp, directory: str, id: str) -> None:
        push = self._promote if req.has_param("from") else self._push
        render_stored(req, resp, *push(req, directory, id))

    def on_post(self, req: Req, resp: Resp, directory: str, id: str) -> None:
        if req.has_param("restore"):
            render_stored(req, resp, *self._restore(req, directory, id))
        elif is_form(req) and not req.has_param("from"):
            self.push_form(req, resp, directory, id)
        else:
            self.on_put(req, resp, directory, id)

    def on_delete(self, req: Req, resp: Resp, directory: str, id: str) -> None:
        self.expect_deletion(req, directory)
        check = self.write_check(req, directory)
        if req.has_param("version") and not req.has_param("versions"):
            self.repository.erase(directory, id, req.get_param("version") or "", check=check)
        else:
            self.repository.delete(directory, id, check=check, versions_too=req.has_param("versions"))
        resp.status = falcon.HTTP_204

    def _restore(self, req: Req, directory: str, id: str) -> tuple[Artefact, bool]:
        if isinstance(req.env["wsgi.input"], Upload):
            req.env["wsgi.input"].limit = PIECE  # a body is ignored
        require_body(req)
        version, check = req.get_param("restore") or "", self.write_check(req, directory)
        artefact, _ = self.repository.restore(directory, id, version, check=check)
        if format_of(req) == "html":  # a browser without script
            raise falcon.HTTPSeeOther(href(base_of(req), directory, id) + "?versions")
        return artefact, True

    def _promote(self, req: Req, directory: str, id: str) -> tuple[Artefact, bool]:
        """Push a copy of another artefact. One that the client may not read does not exist for it."""
        if body_length(req.env) != 0:
            raise HTTPBadRequest(description="With 'from', the artefact is copied. Send no body.")
        source_directory, source_id = source_of(req)
        require_body(req)
        if not req.env["artefacts.who"].may("read", source_directory):
            raise NotFound(f"'{source_directory}' has no artefact '{source_id}'.")
        limit = self.settings.rule(directory, "max_size")
        check = self.write_check(req, directory, creates=req.method == "POST")
        with self.repository.fetch(source_directory, source_id, req.get_param("version")) as source:
            return self.repository.promote(source, directory, id, limit=limit, check=check)

    def _push(self, req: Req, directory: str, id: str) -> tuple[Artefact, bool]:
        """Push the body. What the header shows to be refused is refused before the body is received."""
        if is_form(req):
            raise HTTPUnsupportedMediaType(description="POST the form, or PUT the file itself.")
        check = self.write_check(req, directory, creates=req.method == "POST")
        admit = functools.partial(self.repository.admit, directory, id, check=check)
        with self.receive(req, directory, admit, sha256=announced_sha256(req.env), at_once=True) as upload:
            try:
                return self.repository.push(upload, directory, id, type=req.content_type, check=check,
                                            wait=HEADERS_ONLY not in req.env)
            except BlockingIOError:  # the lock is taken, or another program has a lease on the file
                require_body(req)  # a worker thread pushes it
                raise


# -- requests --


def base_of(req: Req) -> str:
    """Return the path at which the application is mounted, as it stands in a URL."""
    return quote(req.root_path) if req.root_path else ""


def format_of(req: Req) -> str:
    """Return the one of FORMATS that the client prefers."""
    return preferred_format(req.get_param("format"), req.get_header("Accept") or "*/*")


def source_of(req: Req) -> tuple[str, str]:
    """Return the directory and the id of the artefact whose path `from` states, as its `href` does."""
    path = (req.get_param("from") or "").removeprefix(base_of(req))
    match = re.fullmatch("/artefacts?/([^/?#]+)/([^?#]+)", path)
    if match is None:
        hint = "Write 'from' as the path of an artefact, encoded once more: /artefacts/staging/app.zip"
        raise HTTPBadRequest(description=f"{hint}. '&version=' chooses an earlier version.")
    return unquote(match[1], errors="replace"), unquote(match[2], errors="replace")


def shell_pattern(pattern: str | None) -> Callable[[str], object] | None:
    """Return a function that matches an id as fnmatch.fnmatchcase does. It does not backtrack from one '*' to
    another: 10 ms to compile, and 0.5 ms to match an id of 1,024 bytes. HTTPBadRequest: it is too long."""
    if pattern is not None and len(pattern) > MAX_PATTERN:
        raise HTTPBadRequest(description=f"'match' has more than {MAX_PATTERN} characters. Shorten it.")
    return None if pattern is None else re.compile(fnmatch.translate(pattern)).match


def evaluate_conditions(req: Req, current: Content | None) -> int | None:
    """Return 304 if the client's copy is current, None to perform the request. PreconditionFailed."""
    if req.env.keys().isdisjoint(CONDITIONS):
        return None
    etag = modified = None
    if current is not None:
        artefact = digested(req, current)
        etag, modified = f'"{artefact.sha256}"', last_modified(artefact)
    status = failed_precondition(req.method, req.env, etag, modified)
    if status == 412:
        raise PreconditionFailed("The artefact is not in the state that the request expects. Fetch it again.")
    return status


def is_form(req: Req) -> bool:
    """Return whether the body is a form with files (RFC 7578)."""
    return (req.content_type or "").partition(";")[0].strip().lower() == falcon.MEDIA_MULTIPART


def files_of_form(form: Upload, content_type: str) -> Iterator[tuple[str, str, Callable[[int], bytes]]]:
    """Yield a form's files: name without folders (not all browsers omit them), media type, and a reader of at
    most so many bytes. HTTPBadRequest, also from the reader: the form is malformed."""
    handler = falcon.media.MultipartFormHandler()
    handler.parse_options.max_body_part_count = 0  # no limit
    handler.parse_options.max_body_part_headers_size = 4096  # parsed in 20 ms at most
    stream = BufferedReader(form.read, form.size)

    def read_part(part: BodyPart, size: int) -> bytes:
        piece: bytes = part.stream.read(size)
        if not piece and not stream.peek(1):  # there is no delimiter
            raise HTTPBadRequest(description="The form ends within this file. Send it again.")
        return piece

    try:
        for part in handler.deserialize(stream, content_type, form.size):
            type = part._headers.get(b"content-type", b"")  # `part.content_type` has a default
            if name := file_name(part):  # else it is a field, or no file was chosen
                yield name.rpartition("/")[2], type.decode("latin-1"), functools.partial(read_part, part)
    except falcon.HTTPError as error:
        detail = f"The form is malformed here: {error.description}. Correct it, or PUT the file itself."
        raise HTTPBadRequest(description=detail) from None


def file_name(part: BodyPart) -> str:
    """Return the file name of a form's part, "" if there is none. What cannot be decoded becomes U+FFFD."""
    disposition = part._headers.get(b"content-disposition", b"").decode(errors="replace")
    parameters = falcon.parse_header(disposition)[1]
    name = parameters.get("filename", "")
    if "filename*" in parameters:
        match = EXTENDED_VALUE.fullmatch(parameters["filename*"])
        if match is None:
            raise HTTPBadRequest(description="the file name is neither in UTF-8 nor in ISO-8859-1")
        name = unquote(match[2], match[1])
    return name.replace("%22", '"').replace("\\", "/")  # HTML encodes quotes so


# -- responses --


def render_json(resp: Resp, text: str) -> None:
    """Render a JSON document: Falcon's media type, unless another one is set."""
    resp.data = text.encode() + b"\n"


def render_list(req: Req, resp: Resp, page: Iterable[str], document: object) -> None:
    """Render a list as a page or as a JSON document, whichever the client prefers."""
    resp.set_header("Vary", "Accept")
    if format_of(req) == "html":
        render_page(resp, page)
    else:
        render_json(resp, json.dumps(document))


def render_stored(req: Req, resp: Resp, artefact: Artefact, created: bool) -> None:
    """Render the artefact that a request made current."""
    base = base_of(req)
    if created:
        resp.status = falcon.HTTP_201
        resp.location = href(base, artefact.directory, artefact.id)
    resp.set_headers({"ETag": f'"{artefact.sha256}"', "Artefact-Version": artefact.version})
    render_json(resp, artefact_json(artefact, base))


def send_texts(resp: Resp, texts: Iterator[str]) -> None:
    """Send a listing: a short one as a whole, which needs 0.95 of the time; a long one as a stream, which is
    made while it is sent. Raise what its first rows raise."""
    deadline, start = time.thread_time() + SOON, bytearray()
    pieces = iter(lambda: "".join(itertools.islice(texts, ROWS_AT_ONCE)).encode(), b"")
    for piece in pieces:
        start += piece
        if len(start) > LONG or time.thread_time() > deadline:
            resp.data, resp.stream = None, itertools.chain((bytes(start),), pieces)
            return
    resp.data = bytes(start)


def json_listing(directory: str, rows: Iterator[str], following: str | None,
                 unreadable: Sequence[str]) -> Iterator[str]:
    """Return the pieces of a directory's listing. following: the path of the rest. unreadable: filled by
    the rows. They are chained, because with a generator around them a listing takes 1.05 times as long."""

    def end() -> Iterator[str]:
        yield f'], "next": {json_string(following)}' if following else "]"
        yield f', "unreadable": {json.dumps(unreadable)}}}\n' if unreadable else "}\n"

    start = f'{{"directory": {json_string(directory)}, "artefacts": ['
    return itertools.chain((start,), itertools.islice(rows, 1), map(", ".__add__, rows), end())


def tar_archive(repository: Repository, artefacts: Iterable[Artefact], folder: str) -> Iterator[bytes]:
    """Yield a POSIX archive (pax) of the artefacts and their times, with names relative to the folder. An
    artefact that was replaced since it was listed is sent as it is now. One that was deleted is left out."""
    for artefact in artefacts:
        with contextlib.suppress(NotFound), repository.fetch(artefact.directory, artefact.id) as content:
            info, current = tarfile.TarInfo(artefact.id.removeprefix(folder)), content.artefact
            info.size, info.mtime = current.size, current.time / 1e6
            yield info.tobuf(tarfile.PAX_FORMAT)
            yield from content.pieces()
            yield bytes(-current.size % tarfile.BLOCKSIZE)
    yield bytes(2 * tarfile.BLOCKSIZE)


class Sink(io.RawIOBase):
    """The file that a zip archive is written to. It cannot seek: what was written is taken and sent."""

    def __init__(self) -> None:
        self.written: list[bytes] = []

    def write(self, data: Any) -> int:
        self.written.append(bytes(data))
        return len(data)


def zip_archive(repository: Repository, artefacts: Iterable[Artefact], folder: str) -> Iterator[bytes]:
    """Yield a zip archive, as `tar_archive` does. Nothing is compressed, but the bytes are in DEFLATE's
    frames: they show where a file ends to programs that read an archive while it comes."""
    sink = Sink()
    with zipfile.ZipFile(sink, "w") as archive:
        for artefact in artefacts:
            with contextlib.suppress(NotFound), repository.fetch(artefact.directory, artefact.id) as content:
                size, seconds = content.artefact.size, content.artefact.time // 1_000_000
                at = time.gmtime(min(max(seconds, MIN_ZIP_TIME), MAX_ZIP_TIME))
                info = zipfile.ZipInfo(artefact.id.removeprefix(folder), at[:6])
                info.compress_type = zipfile.ZIP_DEFLATED
                setattr(info, ZIP_LEVEL, 0)
                info.external_attr = (stat.S_IFREG | 0o644) << 16
                if size > MAX_ZIP32:
                    info.extract_version = zipfile.ZIP64_VERSION  # Python 3.11.2 does not set it
                if 0 <= seconds < 1 << 31:  # the time in UTC, to the second (Info-ZIP's extended timestamp)
                    info.extra = struct.pack("<HHBl", 0x5455, 5, 1, seconds)
                with archive.open(info, "w", force_zip64=size > MAX_ZIP32) as file:
                    for piece in content.pieces():
                        file.write(piece)
                        yield b"".join(sink.written)
                        sink.written.clear()
    yield b"".join(sink.written)


def send_content(req: Req, resp: Resp, content: Content, start: int, length: int) -> None:
    """Send bytes of an artefact: few from memory, many as a stream of the file, which the server closes."""
    if content.artefact.size <= SMALL:
        resp.data = content.whole()[start : start + length]
    elif length <= SMALL:
        resp.data = content.read(start, length)
    else:
        resp.content_length = length
        if "waitress.client_disconnected" in req.env:  # waitress, or our own connection
            resp.stream = file = io.FileIO(content.file.release())
            file.seek(start)
        else:  # some other servers ignore a file's position or Content-Length
            kept, end = Descriptor(content.file.release()), start + length
            resp.stream = (os.pread(kept.fd, min(PIECE, end - at), at) for at in range(start, end, PIECE))


# == The application ==============================================================================


def create_app(data: str | os.PathLike[str] = "data", *, keep_versions: int = 0, max_size: int | None = None,
               fsync: bool = True, config: str | os.PathLike[str] | None = None) -> falcon.App[Any, Any]:
    """Return the repository in `data`, which is created if it is missing, as a WSGI application.

    keep_versions: how many are kept before the current one (ALL: every one). max_size: bytes of one artefact.
    fsync: False gives up durability in a power cut. config: a TOML file of tokens and rules; without it,
    everyone may do everything. OSError: `data` or `config` cannot be used. ValueError: a mistake in it."""
    settings = Settings(read_config(config) if config is not None else Config(), keep_versions, max_size)
    return application(make_repository(data, settings, fsync), settings)


def make_repository(data: str | os.PathLike[str], settings: Settings, fsync: bool, *,
                    sweep: bool = True) -> Repository:
    """Return a repository that keeps what the settings say. sweep: remove what crashes left."""
    rules: Any = {key: functools.partial(settings.rule, key=key) for key in ("keep_versions", "keep_days")}
    return Repository(data, **rules, fsync=fsync, sweep=sweep)


def application(repository: Repository, settings: Settings) -> falcon.App[Any, Any]:
    """Return the WSGI application that serves a repository."""
    app: falcon.App[Any, Any] = falcon.App(middleware=[Gate(settings)])
    app.req_options.strip_url_path_trailing_slash = True
    for kind in (Exception, falcon.HTTPError):  # Falcon has handlers of its own for both
        app.add_error_handler(kind, handle_error)
    app.add_route("/", Root(repository, settings))
    app.add_route(HEALTH, Health(repository, settings))
    for base in ("/artefacts", "/artefact"):
        app.add_route(base, Directories(repository, settings))
        app.add_route(base + "/{directory}", Directory(repository, settings))
        app.add_route(base + "/{directory}/{id:path}", ArtefactResource(repository, settings))
    return app


# == Connections: HTTP/1.1 on sockets (RFC 9112) ==================================================
#
# Stock waitress runs the application, too. Here, its listeners and its worker threads make a file server: a
# body goes straight into a staging file, and the commit is a rename; the kernel sends files. These parts of
# waitress are not documented, so requirements.txt names its exact version. The event loop is `Server.turn`:
# that of waitress asks each connection at each turn what it waits for, which makes a fetch beside 2,000 idle
# connections ten times as slow.
#
# - Only the event loop touches sockets. A worker calls the application, or takes one piece of a streamed
#   response, and leaves the result. Nothing is locked, and no worker waits for a client.
# - A connection handles one request at a time. Those behind it (pipelining) wait in `received`.
# - `Connection.converse` is the whole life of a connection, as a generator. It yields READABLE, WRITABLE or
#   RESULT to wait for the socket or a worker, and the event loop resumes it.
#
# The application is called up to three times for a request. With HEADERS_ONLY in its environ, it checks the
# header: a refusal does not need the body, and a quick answer needs no worker. It returns 100 or 102 if it
# cannot answer yet, otherwise the final response:
#
#   received           called on the  HEADERS_ONLY  ON_WORKER  after 100              after 102
#   the header         event loop     False         False      receive the body       check again on a worker
#   the header         worker         False         True       receive the body       -
#   all, if small (*)  event loop     True          False      answer on a worker     answer on a worker
#   all                worker         absent        absent     -                      -
#
# (*) No body is needed; with --no-fsync also one of at most PIECE bytes: its commit does not wait for the
# disk.

GRACE = 10  # seconds for current requests to finish after SIGTERM or Ctrl-C
HEADER_TIME = 55  # seconds from the first byte of a header to its end; checked every CLEANUP seconds
CLEANUP = 5
LINGER, LINGER_IN_ALL = 30, 300  # seconds of silence, and in all; see `Connection.linger`
HANG_UP = 1  # seconds of waiting, after which a worker drops a request whose client has hung up
WAITING = 250  # requests that wait for a worker; more get 503
CONNECTIONS = 4000  # at once, if the limit on open files admits them
MAX_HEADER = 64 * 1024  # bytes
MAX_LINE = 4096  # bytes of a chunk's size line, of a trailer section
MAX_LOGGED = 3500  # characters of a request line in the log
CACHED_HEADER = 2048  # bytes: longer headers are parsed each time
RECEIVE = 64 * 1024  # bytes received at once
BUFFER = 4 * 1024 * 1024  # bytes received at once of a long body: few large writes cost the least
GATHER = 1024 * 1024  # bytes to wait for in a socket while the hash is far behind
STREAM_PIECE = 512 * 1024  # bytes of a streamed response: each piece is a hand-over between threads
FILE_PIECE = 60 * 1024  # bytes of a file: whole pages that fit into one packet of the loopback (65,483 bytes)
TURN = 8 * 1024 * 1024  # bytes of a file sent to one client before the others get their turn
STOPPING = (signal.SIGTERM, signal.SIGINT)
SIGNALS = (*STOPPING, signal.SIGHUP)
LOG_TIME = "%d/%b/%Y:%H:%M:%S +0000"
MSG_MORE = getattr(socket, "MSG_MORE", 0)  # what follows goes into the same packet; not on macOS
READABLE, WRITABLE, RESULT = selectors.EVENT_READ, selectors.EVENT_WRITE, 0  # what a conversation waits for
Steps = Generator[int, None, T]  # yields what it waits for; returns T

TOKEN, TEXT = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+", rb"[\t\x20-\x7e\x80-\xff]*"
REQUEST_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Z-]+) ([^\x00-\x20\x7f]+) HTTP/([0-9])\.([0-9])")
TARGET = re.compile(rb"(?:https?://([^/?#]+))?(/[^?#]*)?(?:\?([^#]*))?", re.I)
FIELD = re.compile(rb"(%b):(%b)" % (TOKEN, TEXT))
HEADER_END = re.compile(rb"\n\r?\n")
QUOTED = rb'"(?:[\t\x20\x21\x23-\x5b\x5d-\x7e\x80-\xff]|\\[\t\x20-\x7e\x80-\xff])*"'
EXTENSION = rb"[\t ]*;[\t ]*%b(?:[\t ]*=[\t ]*(?:%b|%b))?" % (TOKEN, TOKEN, QUOTED)
FIRST_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,15})(?:%b)*\r\n" % EXTENSION)
NEXT_CHUNK = re.compile(rb"\r\n" + FIRST_CHUNK.pattern)
TRAILER = re.compile(rb"(?:%b\r\n)*\r\n" % FIELD.pattern)
BARE_CR_OR_LF = re.compile(rb"\r(?!\n|\Z)|(?<!\r)\n")


@functools.lru_cache(1024)
def parse_request_line(line: bytes) -> WSGIEnvironment:
    """Return what a request line adds to the environ (RFC 9112 §3). HTTPError if it cannot be served."""
    match = REQUEST_LINE.fullmatch(line)
    if match is None or match[3] == b"0":
        raise HTTPBadRequest(description="The request line is malformed. It is: GET /path HTTP/1.1")
    if match[3] != b"1":
        raise falcon.HTTPVersionNotSupported(description="This server speaks HTTP/1.1. Use it.")
    method = match[1].decode()
    if method not in falcon.COMBINED_METHODS:
        raise falcon.HTTPNotImplemented(description=f"The method {method[:20]} is unknown. Use another one.")
    target = TARGET.fullmatch(b"/" if (method, match[2]) == ("OPTIONS", b"*") else match[2])
    if target is None or not (target[1] or target[2]):
        raise HTTPBadRequest(description="The request target is malformed. It begins with a slash.")
    path = unquote_to_bytes(b"/" + (target[2] or b"").lstrip(b"/"))
    environ = {
        "SERVER_PROTOCOL": "HTTP/1.0" if match[4] == b"0" else "HTTP/1.1", "REQUEST_METHOD": method,
        "REQUEST_URI": match[2].decode("latin-1"), "PATH_INFO": path.decode("latin-1"),
        "QUERY_STRING": (target[3] or b"").decode("latin-1"),
    }  # fmt: skip
    if target[1]:  # it takes precedence over Host (§3.2.2)
        environ["HTTP_HOST"] = target[1].decode("latin-1")
    return environ


@functools.lru_cache(1024)
def parse_fields(fields: bytes) -> WSGIEnvironment:
    """Return header fields as an environ (RFC 9112 §5, §6). HTTPError if they are malformed, or if another
    server could find another end of the body (§11.2). Names with an underscore could pass for others."""
    values: dict[str, list[str]] = {}
    for line in fields.split(b"\r\n") if fields else ():
        match = FIELD.fullmatch(line)
        if match is None:
            raise HTTPBadRequest(description="A header field is malformed. Correct it.")
        key = match[1].decode().upper().replace("-", "_")
        key = key if key in ("CONTENT_TYPE", "CONTENT_LENGTH") else f"HTTP_{key}"
        if b"_" not in match[1]:
            values.setdefault(key, []).append(match[2].strip(b" \t").decode("latin-1"))
    environ = {key: ", ".join(found) for key, found in values.items()}
    length, coding = environ.get("CONTENT_LENGTH", "0"), environ.get("HTTP_TRANSFER_ENCODING")
    if len(values.get("HTTP_HOST", ())) > 1 or not re.fullmatch("[0-9]+", length):
        raise HTTPBadRequest(description="Host or Content-Length is malformed. Send each once.")
    if coding is not None and "CONTENT_LENGTH" in environ:
        raise HTTPBadRequest(description="Content-Length contradicts Transfer-Encoding. Send one of them.")
    if coding is not None and coding.lower() != "chunked":
        detail = "Only the transfer coding 'chunked' is implemented. Use it, or send a Content-Length."
        raise falcon.HTTPNotImplemented(description=detail)
    if len(length) > 18:
        raise falcon.HTTPContentTooLarge(description="No file system holds so many bytes. Send less.")
    return environ


def read_header(raw: bytes, client: WSGIEnvironment) -> WSGIEnvironment:
    """Parse a header, from the caches where possible, and return a new environ. HTTPError.

    Clients send the same fields with ever new request lines, so line and fields are cached apart. Without
    the caches, small fetches have 0.59 of their speed."""
    line, _, fields = raw.removesuffix(b"\r\n\r\n").partition(b"\r\n")
    is_short = len(raw) <= CACHED_HEADER
    of_line = parse_request_line(line) if is_short else parse_request_line.__wrapped__(line)
    of_fields = parse_fields(fields) if is_short else parse_fields.__wrapped__(fields)
    if of_line["SERVER_PROTOCOL"] == "HTTP/1.0":
        if "HTTP_TRANSFER_ENCODING" in of_fields:  # RFC 9112 §6.1
            raise HTTPBadRequest(description="HTTP/1.0 has no Transfer-Encoding. Use HTTP/1.1.")
    elif "HTTP_HOST" not in of_fields:  # §3.2
        raise HTTPBadRequest(description="The Host field is missing. Send it.")
    return {**client, **of_fields, **of_line}


class BodyDecoder:
    """Finds the end of a body as it arrives: by its length, or chunked (RFC 9112 §6.2, §7.1).

    The trailer of a chunked body is dropped, as §7.1.2 allows."""

    def __init__(self, length: int | None) -> None:
        self.complete, self.chunked = length == 0, length is None
        self.missing = length or 0  # bytes of the body, or of the current chunk
        self.expected = FIRST_CHUNK  # behind a chunk

    def decode(self, data: bytes | memoryview) -> tuple[bytes | memoryview, int]:
        """Return the content, and how many bytes are used. The others come again, together with more.

        Raise HTTPBadRequest as soon as the bytes cannot become well-formed."""
        pieces: list[bytes | memoryview] = []
        at = 0
        while at < len(data) and not self.complete:
            if self.missing:
                pieces.append(piece := data[at : at + self.missing])
                at, self.missing = at + len(piece), self.missing - len(piece)
                self.complete = not self.missing and not self.chunked
            elif (line := self.expected.match(data, at)) and line.end() - at <= MAX_LINE:
                at, self.complete = line.end(), self.expected is TRAILER
                self.missing = 0 if self.complete else int(line[1], 16)
                self.expected = NEXT_CHUNK if self.missing else TRAILER
            else:
                rest = bytes(data[at:])
                malformed = (b"\r\n\r\n" if self.expected is TRAILER else b"\n") in rest[2:]
                malformed |= self.expected is NEXT_CHUNK and not b"\r\n".startswith(rest[:2])
                if malformed or BARE_CR_OR_LF.search(rest) or len(rest) > MAX_LINE:
                    raise HTTPBadRequest(description="The chunked body is malformed. Correct the request.")
                break
        return pieces[0] if len(pieces) == 1 else b"".join(pieces), at


class Request:
    """One request while it is received. The body of a push goes into an Upload, which the connection closes;
    that of any other request is dropped, and is not waited for."""

    def __init__(self, environ: WSGIEnvironment, repository: Repository) -> None:
        chunked = "HTTP_TRANSFER_ENCODING" in environ
        self.body = BodyDecoder(None if chunked else int(environ.get("CONTENT_LENGTH", 0)))
        is_push = environ["REQUEST_METHOD"] in ("PUT", "POST") and not self.body.complete
        self.upload = repository.stage() if is_push else None
        self.environ = environ
        environ["wsgi.input"] = self.upload or io.BytesIO()

    @property
    def ended(self) -> bool:
        """Return whether no more bytes are needed: the body is complete, or it is not stored."""
        return self.body.complete or self.upload is None or self.upload.fault is not None

    def receive(self, data: bytes | memoryview) -> int:
        """Store what belongs to the body, and return its length in the data. HTTPBadRequest if malformed.

        If it cannot be stored, the upload keeps the error for the application."""
        content, used = self.body.decode(data)
        if self.upload is not None and content:
            try:
                self.upload.write(content)
            except (ArtefactsError, OSError) as error:
                self.upload.fault = error
        if self.upload is not None and self.body.complete:
            self.environ["CONTENT_LENGTH"] = str(self.upload.size)
        return used


class Response(NamedTuple):
    """A response of the application, whose body has to be closed."""

    status: str
    fields: list[tuple[str, str]]
    body: Iterable[bytes]
    who: str  # the name of the client's token, for the log


def call_application(application: WSGIApplication, environ: WSGIEnvironment) -> Response:
    """Return the application's response (PEP 3333)."""

    def start_response(status: str, fields: list[tuple[str, str]], exc_info: object = None) -> None:
        started[:] = status, fields

    started: list[Any] = []
    body: Iterable[bytes] = application(environ, start_response)  # type: ignore[arg-type]
    return Response(started[0], started[1], body, environ.get("artefacts.who", EVERYONE).name)


def close_body(body: object) -> None:
    """Close an upload, or a response's body if it has close() (PEP 3333)."""
    try:
        if hasattr(body, "close"):
            body.close()
    except OSError as error:  # a staging file that cannot be removed is swept later
        log.error("an upload or a file cannot be closed or removed: %s", error)


def pieces_of(body: Iterable[bytes], chunked: bool) -> Iterator[bytes]:
    """Yield a response's body in pieces of about STREAM_PIECE bytes, in the chunked coding if asked to.

    While a piece is sent, it is in memory once."""
    gathered: list[bytes] = []
    size = 0
    for part in itertools.chain(body, (b"",)):
        gathered.append(part)
        size += len(part)
        if size and (size >= STREAM_PIECE or not part):
            if chunked:
                gathered = [b"%x\r\n" % size, *gathered, b"\r\n"]
            piece = b"".join(gathered)
            gathered.clear()
            size = 0
            yield piece
    if chunked:
        yield b"0\r\n\r\n"


class Connection:
    """The connection of one client. A worker calls `service`, the event loop everything else."""

    def __init__(self, server: Server, sock: socket.socket, address: Any, adj: Any, map: object) -> None:
        sock.setblocking(False)
        self.server, self.socket = server, sock
        self.address: str = address[0]  # of the client, or that which a trusted proxy states
        self.client = server.environ | {"REMOTE_ADDR": address[0]}
        self.received = b""  # and not used yet
        self.request: Request | None = None  # from its header's end until its response was sent
        self.start, self.status, self.who, self.sent = b"", "499", "-", 0  # for the log; see `release`
        self.body: object = None  # of the response
        self.dispatcher = server.task_dispatcher  # whose workers do the request
        self.task: Callable[[], Any] | None = None  # waits for a worker since `queued`, or is done by one
        self.queued = 0.0
        self.result: list[Any] = []  # left by the worker; None: the task failed
        self.gathering: Future[None] | None = None  # the hash that `gather` waits for
        self.last_activity = time.monotonic()
        self.silence: float = adj.channel_timeout  # seconds without a byte, and the time at which
        self.deadline = math.inf  # nothing more is waited for; see `Server.close_overdue`
        self.conversation = self.converse()
        self.waits_for = RESULT
        self.wait_for(next(self.conversation))
        with contextlib.suppress(AttributeError, OSError):  # Linux closes it if its client does not read
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(adj.channel_timeout * 1000))
        server.connections[self] = None

    def resume(self) -> None:
        """Resume the conversation until it waits again. At its end, close the connection."""
        self.last_activity = time.monotonic()
        try:
            self.wait_for(next(self.conversation))
        except (StopIteration, OSError):  # OSError: the client has gone, or a file was truncated
            self.close()
        except Exception as error:
            log.error("a connection broke off: %r %s", error, waitress.wasyncore.compact_traceback()[3])
            self.close()

    def wait_for(self, event: int) -> None:
        """Have the event loop call `resume` when the socket is READABLE or WRITABLE, or there is a RESULT."""
        if event != self.waits_for:
            self.server.watch(self.socket, event, self.resume)
            self.waits_for = event

    def close(self) -> None:
        """Close the connection and what its request holds."""
        if self.task is None or self.result:  # else a worker has the request, while the program ends
            self.conversation.close()
            self.wait_for(RESULT)
            self.server.connections.pop(self, None)
            self.socket.close()

    def cancel(self) -> None:
        """Leave the queue of the workers, when the program ends."""
        self.task = None

    def service(self) -> None:
        """Do the task on a worker thread, unless it has waited long and the client has hung up meanwhile.

        A client that has only ended its sending looks the same, but it rarely waits so long."""
        result = None
        try:
            if time.monotonic() > self.queued + HANG_UP:
                with contextlib.suppress(BlockingIOError):
                    if not self.socket.recv(1, socket.MSG_PEEK):
                        raise ConnectionAbortedError
            result = self.task() if self.task is not None else None
        except ConnectionError:
            pass
        except Exception as error:
            foreseen = isinstance(error, (ArtefactsError, OSError))
            log.error("a response broke off: %s", error, exc_info=not foreseen)
        self.result.append(result)
        self.server.finished.append(self)  # from here on, it belongs to the event loop again
        self.server.pull_trigger()

    def converse(self) -> Steps[None]:
        """Answer requests until one is the last."""
        is_last = False
        while not is_last:
            try:
                try:
                    response = yield from self.answer()
                except (ArtefactsError, falcon.HTTPError) as error:
                    status, fields, content = error_response(error)
                    fields.append(("content-length", str(len(content))))
                    response = Response(status, fields, [content], EVERYONE.name)
                is_last = yield from self.send_response(response)
            finally:
                self.release()
        yield from self.linger()

    def answer(self) -> Steps[Response]:
        """Receive a request, and return its response. The table above explains the calls. HTTPError."""
        environ, application = (yield from self.receive_header()), self.server.application
        if self.server.prefix or self.server.proxies:
            self.server.adjust(environ)
            self.address = environ["REMOTE_ADDR"]
        request = self.request = Request(environ, self.server.repository)
        if self.received and not request.body.complete:
            self.received = self.received[request.receive(self.received) :]
        is_read = environ["REQUEST_METHOD"] in ("GET", "HEAD")
        self.dispatcher = self.server.readers if is_read else self.server.task_dispatcher
        if not request.ended:
            environ[HEADERS_ONLY] = environ[ON_WORKER] = False
            response = call_application(application, environ)
            if response.status.startswith("102"):
                environ[ON_WORKER] = True
                response = yield from self.on_worker(call_application, application, environ)
            if not response.status.startswith("100"):
                return response
            expects = environ.get("HTTP_EXPECT", "").lower() == "100-continue"
            if expects and environ["SERVER_PROTOCOL"] == "HTTP/1.1":
                yield from self.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            yield from self.receive_body(request)
        upload = request.upload
        if upload is None or (upload.size <= PIECE and not self.server.repository.durable):
            environ[HEADERS_ONLY], environ[ON_WORKER] = True, False
            response = call_application(application, environ)
            if not response.status.startswith(("100", "102")):
                return response
        if len(self.dispatcher.queue) >= WAITING:
            detail = "Too many requests wait. Try again later."
            raise falcon.HTTPServiceUnavailable(description=detail, retry_after=5)
        environ.pop(HEADERS_ONLY, None)
        return (yield from self.on_worker(call_application, application, environ))

    def on_worker(self, function: Callable[..., T], *arguments: Any) -> Steps[T]:
        """Return the function's result, called on a worker thread. OSError if it failed, which is logged."""
        self.task, self.queued = functools.partial(function, *arguments), time.monotonic()
        self.dispatcher.add_task(self)
        yield RESULT
        self.task, result = None, self.result.pop()
        if result is None:
            raise OSError(errno.EIO, "the worker failed, or the client has hung up")
        return cast(T, result)

    def release(self) -> None:
        """Log the request. Close its upload, its response's body, and that of a response that is not sent."""
        if self.start and not self.server.quiet:
            line = self.start.partition(b"\n")[0].removesuffix(b"\r").decode("latin-1")
            outcome = f"{self.status} {self.sent if self.sent > 0 else '-'}"
            log_request(self.address, self.who, line, outcome)
        close_body(self.body)
        close_body(self.request and self.request.upload)
        for result in self.result:
            close_body(result.body if isinstance(result, Response) else None)
        self.request = self.body = self.gathering = None
        self.start, self.status, self.who, self.sent = b"", "499", "-", 0  # 499: the client has hung up

    def receive(self, size: int) -> Steps[memoryview]:
        """Return at most `size` bytes, which the next call overwrites. OSError if the client has ended."""
        while True:
            yield READABLE
            view = self.server.buffer[:size]
            try:
                received = self.socket.recv_into(view)
            except BlockingIOError:
                continue
            if not received:
                raise ConnectionAbortedError
            return view[:received]

    def receive_header(self) -> Steps[WSGIEnvironment]:
        """Return the environ of the next header. HTTPError if it cannot be served: at once, also if its lines
        end in a bare LF, or its first line has no version."""
        self.received = self.received.lstrip(b"\r\n")  # RFC 9112 §2.2
        searched = 0
        while (end := HEADER_END.search(self.received, searched)) is None:
            line, newline, _ = self.received.partition(b"\n")
            if len(self.received) > MAX_HEADER or (newline and b" HTTP/" not in line):
                break
            searched = max(0, len(self.received) - 2)
            if self.received and self.deadline == math.inf:
                self.deadline = time.monotonic() + HEADER_TIME
            self.received = (self.received + (yield from self.receive(RECEIVE))).lstrip(b"\r\n")
        self.deadline = math.inf
        size = end.end() if end else len(self.received)
        raw, self.received = self.received[:size], self.received[size:]
        self.start = raw[:MAX_LOGGED]
        if size > MAX_HEADER:
            detail = f"The header has more than {MAX_HEADER} bytes. Send less."
            raise falcon.HTTPRequestHeaderFieldsTooLarge(description=detail)
        return read_header(raw, self.client)

    def receive_body(self, request: Request) -> Steps[None]:
        """Receive the rest of the body through the server's buffer, straight into the upload."""
        while not request.ended:
            data: bytes | memoryview = yield from self.receive(max(request.body.missing, RECEIVE))
            if self.received:  # the part of a line between chunks
                data = self.received + data
            self.received = bytes(data[request.receive(data) :])
            self.gather(request)

    def gather(self, request: Request) -> None:
        """Wait for GATHER bytes while the hash is far behind. Without, large pushes have 0.90 of their speed.

        The hash ends no sooner if bytes are received sooner, and few large pieces cost less. The kernel
        reports fewer bytes only when the client has ended or the hash is done, which always happens."""
        hashing = request.upload.hashing if request.upload and request.body.missing > GATHER else None
        if hashing is not None and hashing is not self.gathering:
            self.gathering = hashing
            self.set_low_water(GATHER)
            hashing.add_done_callback(lambda _: self.set_low_water(1))  # at once if it is done

    def set_low_water(self, size: int) -> None:
        """Let the event loop wait for so many bytes. The thread that hashes calls it, too."""
        with contextlib.suppress(OSError):  # the socket may be closed already
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, size)

    def linger(self) -> Steps[None]:
        """Drop what arrives, until the client has ended, was silent for LINGER seconds, or LINGER_IN_ALL
        seconds are over.

        Closed with unread bytes, the connection is reset, and the client may lose the response (RFC 9112
        §9.6)."""
        self.socket.shutdown(socket.SHUT_WR)
        self.received = b""
        self.silence, self.deadline = LINGER, time.monotonic() + LINGER_IN_ALL
        while True:
            yield from self.receive(BUFFER)

    def send_response(self, response: Response) -> Steps[bool]:
        """Send the final response to the request, or to malformed bytes. Return whether it is the last."""
        status, fields, self.body, self.who = response
        request, environ = self.request, self.request.environ if self.request else {}
        close_body(request and request.upload)  # nothing of a refused upload is left when the client knows
        version: str = environ.get("SERVER_PROTOCOL", "HTTP/1.1")
        length = dict(fields).get("content-length")
        delimited = length is not None or status[:3] in ("204", "304")  # RFC 9112 §6.3
        chunked = not delimited and version == "HTTP/1.1"
        options = environ.get("HTTP_CONNECTION", "").lower()
        is_last = not (delimited or chunked) or request is None or not request.body.complete
        is_last |= version == "HTTP/1.0" and options != "keep-alive"
        is_last |= options != "" and "close" in map(str.strip, options.split(","))
        if is_last:
            fields.append(("connection", "close"))
        elif version == "HTTP/1.0":
            fields.append(("connection", "keep-alive"))
        if chunked:
            fields.append(("transfer-encoding", "chunked"))
        fields += (("date", http_date(int(time.time()))), ("server", "artefacts"))
        lines = [f"{version} {status}", *itertools.starmap(field_line, fields), "\r\n"]
        start, body = "\r\n".join(lines).encode("latin-1"), response.body
        self.status, self.sent = status[:3], -len(start)
        if isinstance(body, list):
            parts = [start, *body]
            for part in [b"".join(parts)] if sum(map(len, parts)) <= SMALL else parts:
                yield from self.send(part)
        elif isinstance(body, FileWrapper):
            yield from self.send(start, MSG_MORE)
            yield from self.send_file(body.filelike, int(length or 0))
        else:
            yield from self.send(start)
            pieces = pieces_of(body, chunked)
            while piece := (yield from self.on_worker(next, pieces, b"")):
                yield from self.send(piece)
        return is_last

    def send(self, data: bytes | memoryview, flags: int = 0) -> Steps[None]:
        while data:
            try:
                sent = self.socket.send(data, flags)
            except BlockingIOError:
                yield WRITABLE
            else:
                self.sent, data = self.sent + sent, memoryview(data)[sent:]

    def send_file(self, file: IO[bytes], size: int) -> Steps[None]:
        """Have the kernel send the file from its position on. OSError if it ends early."""
        at = turn = file.tell()
        end = at + size
        while at < end:
            try:
                sent = os.sendfile(self.socket.fileno(), file.fileno(), at, min(FILE_PIECE, end - at))
                if not sent:
                    raise OSError(errno.EIO, "the file was truncated while it was sent")
                self.sent, at = self.sent + sent, at + sent
            except BlockingIOError:
                yield WRITABLE
            if at - turn >= TURN:
                turn = at
                yield WRITABLE


def log_request(address: str, who: str, line: str, outcome: str) -> None:
    """Write a line in common log format. Everything but printable ASCII is escaped. A long request line is
    cut: several processes may write to one pipe, which takes up to 4,096 bytes as a whole."""
    when = time.strftime(LOG_TIME, time.gmtime())
    who, line = escape_log(who).replace(" ", "\\x20"), escape_log(line)[:MAX_LOGGED]
    # a log that cannot be written costs no response
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(f'{address} - {who} [{when}] "{line}" {outcome}\n')


def escape_log(text: str) -> str:
    return re.sub(r'[^\x20-\x7e]|["\\]', lambda match: f"\\x{ord(match[0]):02x}", text)


@functools.lru_cache(8192)  # the fields of some 1,000 artefacts
def field_line(name: str, value: str) -> str:
    """Return a header field as it is usually spelled. ValueError if it contains a line break."""
    if "\n" in value or "\r" in value:
        raise ValueError(f"the field {name} contains a line break")
    name = {"etag": "ETag", "www-authenticate": "WWW-Authenticate"}.get(name, name.title())
    return f"{name}: {value}"


class Server(waitress.server.TcpWSGIServer):
    """Accepts connections, runs their event loop, and holds what they share."""

    channel_class = Connection

    def __init__(self, app: WSGIApplication, repository: Repository, options: argparse.Namespace,
                 sockets: Sequence[socket.socket]) -> None:
        super().__init__(
            app, _sock=sockets[0], bind_socket=False, threads=options.threads, log_socket_errors=False,
            clear_untrusted_proxy_headers=False)
        logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # it logs each request that waits
        self.repository, self.quiet, self.next_cleanup = repository, options.quiet, 0.0
        self.prefix: str = options.prefix.encode().decode("latin-1")
        self.proxies: list[Any] = options.trusted_proxy
        self.buffer = memoryview(bytearray(BUFFER))  # the event loop receives everything through it
        # Listings have few threads of their own: more would wait for the interpreter, and pushes for them.
        self.readers = waitress.task.ThreadedTaskDispatcher()
        self.readers.set_thread_count(max(1, options.threads // 2))
        self.environ: WSGIEnvironment = {
            "SERVER_NAME": self.server_name, "SERVER_PORT": str(self.effective_port),
            "SCRIPT_NAME": self.prefix, "wsgi.version": (1, 0), "wsgi.url_scheme": "http",
            "wsgi.errors": sys.stderr, "wsgi.multithread": True, "wsgi.multiprocess": options.processes != 1,
            "wsgi.run_once": False, "wsgi.file_wrapper": FileWrapper, "wsgi.input_terminated": True,
            "waitress.client_disconnected": None,
        }  # fmt: skip
        self.connections: dict[Connection, None] = {}  # the oldest first
        self.finished: collections.deque[Connection] = collections.deque()  # whose workers have left a result
        self.selector = selectors.DefaultSelector()
        self.watch(self.trigger.socket, READABLE, self.trigger.handle_read)
        self.listeners = [self]
        for sock in sockets[1:]:
            listener = copy.copy(self)
            listener.set_socket(sock, self._map)
            self.listeners.append(listener)
        self.limit, self.is_full = connection_limit(), True  # `close_overdue` begins to accept
        self.close_overdue()

    def watch(self, sock: Any, event: int, call: Callable[[], None]) -> None:
        """Have `turn` make a call whenever a socket is READABLE or WRITABLE. RESULT: stop watching it."""
        if sock in self.selector.get_map():
            self.selector.unregister(sock)
        if event != RESULT:
            self.selector.register(sock, event, call)

    def handle_accept(self) -> None:
        """Accept a connection. Log what prevents that, such as a limit on the sockets to watch."""
        try:
            super().handle_accept()
        except (OSError, MemoryError) as error:
            log.error("a connection cannot be accepted: %s", error)

    def turn(self, timeout: float) -> None:
        """Wait for sockets and workers, and resume their connections: one turn of the event loop."""
        for key, _ in self.selector.select(timeout):
            key.data()
        while self.finished:
            self.finished.popleft().resume()
        self.close_overdue()

    def adjust(self, environ: WSGIEnvironment) -> None:
        """Take the prefix off the path, and the client's address from trusted proxies."""
        path = environ["PATH_INFO"]
        if self.prefix and f"{path}/".startswith(f"{self.prefix}/"):
            environ["PATH_INFO"] = path[len(self.prefix) :]
        if self.proxies:
            hops = environ.get("HTTP_X_FORWARDED_FOR", "").split(",")
            environ["REMOTE_ADDR"] = client_address(environ["REMOTE_ADDR"], hops, self.proxies)

    def oldest_idle(self) -> Connection | None:
        """Return the oldest connection without a complete header."""
        return next((connection for connection in self.connections if connection.request is None), None)

    def close_overdue(self) -> None:
        """Close connections on which nothing arrives in time, and beyond the limit of connections the oldest
        one without a complete header. At the limit, accept no more if there is none."""
        while len(self.connections) > self.limit and (oldest := self.oldest_idle()) is not None:
            oldest.close()
        is_full = len(self.connections) >= self.limit and self.oldest_idle() is None
        for listener in self.listeners if is_full != self.is_full else ():
            self.watch(listener.socket, RESULT if is_full else READABLE, listener.handle_accept)
        self.is_full = is_full
        now = time.monotonic()
        if now < self.next_cleanup:
            return
        self.next_cleanup = now + min(CLEANUP, self.adj.cleanup_interval)
        for connection in list(self.connections):
            if connection.gathering is not None:
                connection.set_low_water(1)  # else a slow client would seem silent
            is_silent = connection.last_activity < now - connection.silence
            if connection.waits_for == READABLE and (is_silent or connection.deadline < now):
                connection.close()


def client_address(address: str, hops: list[str], proxies: Sequence[Any]) -> str:
    """Return the last of the addresses that is not a trusted proxy's. hops: of X-Forwarded-For."""
    with contextlib.suppress(ValueError):  # the next hop is no address
        while hops and any(ipaddress.ip_address(address) in network for network in proxies):
            address = str(ipaddress.ip_address(hops.pop().strip()))
    return address


def connection_limit() -> int:
    """Return how many connections, each with an open file, fit the limit on open files. Raise that first."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * CONNECTIONS + 200
    if soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(10, min(CONNECTIONS, (soft - 200) // 2))


def say(text: str) -> None:
    """Print a line. OSError if standard output is full or closed."""
    try:
        print(text, flush=True)
        if sys.stdout is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    except OSError as error:
        if sys.stdout is not None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it again at exit
        error.filename = "standard output"
        raise


def run(server: Server, grace: float, reload: Callable[[], object], url: str = "") -> None:
    """Serve until SIGTERM or Ctrl-C. Then give current requests `grace` seconds to finish.

    reload: called after SIGHUP. url: printed as soon as the server serves; without it, this process is one of
    several, and a second signal does not end it: service managers send one to each process."""

    def on_signal(number: int, frame: object) -> None:
        if number != signal.SIGHUP and stopping and url:
            raise SystemExit(1)  # the second signal does not wait
        (hung_up if number == signal.SIGHUP else stopping).append(number)
        server.pull_trigger()

    stopping: list[int] = []
    hung_up: list[int] = []
    for number in SIGNALS:
        signal.signal(number, on_signal)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    if url:
        say(url)
    while not stopping:
        server.turn(CLEANUP)
        if hung_up:
            hung_up.clear()
            reload()
    while server.listeners:
        listener = server.listeners.pop()
        server.watch(listener.socket, RESULT, listener.handle_accept)
        waitress.wasyncore.dispatcher.close(listener)
    deadline = time.monotonic() + grace
    while time.monotonic() < deadline and server.connections:
        for connection in list(server.connections):
            if connection.request is None:
                connection.close()
        server.turn(0.1)
    for dispatcher in (server.task_dispatcher, server.readers):
        dispatcher.shutdown(timeout=max(0.1, deadline - time.monotonic()))
    for connection in list(server.connections):
        connection.close()  # it discards a half-received upload
    waitress.wasyncore.close_all(server._map, ignore_all=True)


# == The program ==================================================================================

SWEEP_EVERY = 3600  # seconds
PR_SET_PDEATHSIG = 1  # of prctl(2)
M_ARENA_MAX = -8  # of mallopt; after 66,000 mixed requests 83 MB instead of 108 MB are resident


def as_argument(convert: Callable[[str], T]) -> Callable[[str], T]:
    """Wrap a converter for argparse, so that the message of its ValueError is shown."""

    def converted(text: str) -> T:
        try:
            return convert(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return converted


def number_between(low: int, high: int) -> Callable[[str], int]:
    """Return a converter for the whole numbers from `low` to `high`."""

    def convert(text: str) -> int:
        if not re.fullmatch("[0-9]{1,9}", text) or not low <= int(text) <= high:
            raise ValueError(f"{text!r} is not a number from {low} to {high}")
        return int(text)

    return as_argument(convert)


class Options(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; --help lists the options\n")


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    options = Options(prog="artefacts.py", description=(__doc__ or "").partition("\n")[0])
    add = options.add_argument
    path = as_argument(only("a path", str, "(?s:.+)"))  # an unset variable must not mean this folder
    prefix = as_argument(only("a path such as /builds", str, "(/[^/?#]+)*"))
    add("--host", action="append", metavar="HOST",
        help="address or name to listen on; several are possible (default: 127.0.0.1)")
    add("--port", type=number_between(0, 65535), default=8080, metavar="N",
        help="port to listen on, 0 for a free one (default: %(default)s)")
    add("--data", type=path, default="data", metavar="DIR",
        help="where the artefacts are (default: %(default)s)")
    add("--keep-versions", type=as_argument(number_of_versions), default=0, metavar="N",
        help="versions kept before the current one, or 'all' (default: 0)")
    add("--keep-days", type=number_between(1, 999_999), metavar="N",
        help="delete artefacts whose last push is older (default: never)")
    add("--max-size", type=as_argument(number_of_bytes), metavar="BYTES",
        help="largest artefact accepted, such as 2GiB (default: any)")
    add("--threads", type=number_between(1, 1000), default=8, metavar="N",
        help="pushes worked on at once (default: %(default)s)")
    add("--processes", type=number_between(0, 256), default=1, metavar="N",
        help="processes that serve, 0 for one for each core (default: %(default)s)")
    add("--no-fsync", action="store_true", help="do not wait for the disk; a power cut may then lose pushes")
    add("--config", type=path, metavar="FILE", help="tokens, and rules for directories (TOML)")
    add("--open", action="store_true", help="without tokens, serve the network all the same")
    add("--allow-host", action="append", default=[], metavar="NAME", help="a public name of this server")
    add("--pages-host", default="", metavar="NAME", help="a second host name of this server, for pages only")
    add("--prefix", type=prefix, default="", metavar="/PATH",
        help="path that a proxy serves this under; it precedes every link")
    add("--trusted-proxy", type=as_argument(ipaddress.ip_network), action="append", default=[],
        metavar="ADDRESS", help="proxy or network whose X-Forwarded-For is believed")
    add("--grace", type=number_between(0, 86400), default=GRACE, metavar="SECONDS",
        help="time for current requests to finish after SIGTERM (default: %(default)s)")
    add("--new-token", metavar="NAME", help="print a new token and its lines for --config, and exit")
    add("--verify", action="store_true", help="read everything, tell what is damaged, and exit")
    add("--sweep", action="store_true", help="delete what keep_days says, and exit")
    add("--dry-run", action="store_true", help="with --sweep, only print it")
    add("--quiet", action="store_true", help="no line for each request")
    parsed = options.parse_args(arguments)
    if parsed.dry_run and not parsed.sweep:
        options.error("--dry-run goes with --sweep")
    return parsed


def new_token(name: str) -> tuple[str, str]:
    """Return a new token, and the lines that make it known to --config. ValueError if unprintable."""
    if not name or not name.isprintable():
        raise ValueError(f"{name!r} is not a name; use printable characters")
    token = secrets.token_urlsafe(32)
    digest = hashlib.sha256(token.encode()).hexdigest()
    quoted_name = json.dumps(name, ensure_ascii=False)
    return token, f'[[token]]\nname = {quoted_name}\nsha256 = "{digest}"\nread = ["*"]\nwrite = ["*"]'


def settings_of(options: argparse.Namespace) -> Settings:
    """Return the settings of the options and the config file.

    OSError and ValueError as `read_config`. ValueError if the network could do everything without --open."""
    config = read_config(options.config) if options.config is not None else Config()
    for host in options.host:
        if re.fullmatch("[0-9.]+", host):
            ipaddress.ip_address(host)
    is_local = all(map(is_loopback, options.host))
    if not config.token and not options.open and not is_local:
        raise ValueError(
            f"without tokens, everyone who reaches {' '.join(options.host)} could do everything: "
            "configure tokens (--new-token, --config), listen on 127.0.0.1, or say --open"
        )
    pages_host = options.pages_host.lower()
    hosts = frozenset(name.lower() for name in options.allow_host) - {pages_host}
    return Settings(config, options.keep_versions, options.max_size, hosts, is_local, pages_host,
                    options.keep_days)


def resolve(host: str) -> list[tuple[int, Any]]:
    """Return the families and addresses of a host. `localhost` and `::` have both. ValueError: unknown."""
    both = {"localhost": ("127.0.0.1", "::1"), "::": ("::", "0.0.0.0")}
    try:
        found = [socket.getaddrinfo(name, 0, type=socket.SOCK_STREAM) for name in both.get(host, (host,))]
    except (socket.gaierror, UnicodeError):
        raise ValueError(f"--host {host} is neither an address nor a known name. Correct it.") from None
    return [(family, address) for family, *_, address in itertools.chain(*found)]


def listen_for_processes(options: argparse.Namespace) -> list[list[socket.socket]]:
    """Return listening sockets for each process, all on one port. OSError, ValueError."""
    sockets = listen(options.host, options.port)
    count = options.processes or os.cpu_count() or 1
    if count == 1:
        return [sockets]
    if not hasattr(socket, "SO_REUSEPORT"):
        raise ValueError("--processes needs SO_REUSEPORT, which this system lacks")
    port = sockets[0].getsockname()[1]  # it is free: another server that reuses ports would not be noticed
    for sock in sockets:
        sock.close()
    return [listen(options.host, port, reuse_port=True) for _ in range(count)]


def listen(hosts: Sequence[str], port: int, reuse_port: bool = False) -> list[socket.socket]:
    """Return listening sockets for all addresses of the hosts, on one port. OSError, ValueError."""
    sockets: list[socket.socket] = []
    addresses = dict.fromkeys(itertools.chain(*map(resolve, hosts)))
    for family, (address, _, *more) in addresses:
        port = port or (sockets[0].getsockname()[1] if sockets else 0)
        try:
            sockets.append(socket.create_server(
                (address, port, *more), family=family, backlog=1024, reuse_port=reuse_port))
        except OSError as error:
            error.filename = f"{address}:{port}"
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT) or len(addresses) == 1:
                raise
            log.warning("%s: %s", error.filename, error.strerror)  # the machine may have no IPv6
    return sockets


def supervise(groups: Sequence[Sequence[socket.socket]], serve: Callable[[int], None],
              reload: Callable[[], bool], grace: float, url: str) -> None:
    """Print the URL, and run `serve` in a process for each group of sockets, until SIGTERM or SIGINT.

    Start a process anew if it ends, at most once a second. This process keeps its sockets open, so that their
    clients wait meanwhile. It has no threads, so it can fork at any time. After SIGHUP, each process reads
    the rules, unless this one finds a mistake in them."""
    signals = {*SIGNALS, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    say(url)
    numbers: dict[int, int] = {}  # of the groups, by process
    deadline = math.inf
    while numbers or deadline == math.inf:
        for number in range(len(groups)) if deadline == math.inf else ():
            if number not in numbers.values():
                numbers[fork(serve, number)] = number
        caught = signal.sigtimedwait(signals, min(max(0, deadline - time.monotonic()), CLEANUP))
        number = caught.si_signo if caught is not None else 0
        is_late = time.monotonic() > deadline or (number in STOPPING and deadline < math.inf)
        if number in STOPPING and not is_late:
            deadline = time.monotonic() + grace + 1
            for sock in itertools.chain(*groups):
                sock.close()
        if is_late or number in STOPPING or (number == signal.SIGHUP and reload()):
            for process in numbers:
                os.kill(process, signal.SIGKILL if is_late else number)
        while numbers and (ended := os.waitpid(-1, os.WNOHANG))[0]:
            del numbers[ended[0]]
            if deadline == math.inf:
                log.error("process %d ended with status %d; another one starts", *ended)
                time.sleep(1)


def fork(serve: Callable[[int], None], number: int) -> int:
    """Return a new process that calls `serve` with a number, and ends with its parent."""
    parent = os.getpid()
    if process := os.fork():
        return process
    try:
        with contextlib.suppress(AttributeError):  # not on macOS
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() == parent:  # else it died before this process asked for the signal
            serve(number)
        os._exit(0)
    except BaseException as error:
        log.error("the process broke off: %s", error, exc_info=error)
    finally:
        os._exit(1)


def verify(repository: Reader) -> int:
    """Print what is not as it was stored, and the counts. Return 1 if something is damaged or unreadable.

    On a terminal, show a progress bar."""
    counts = dict.fromkeys(("whole", "new", "changed", "damaged", "unreadable"), 0)
    total, read = bytes_below(repository.root) if sys.stderr.isatty() else 0, 0
    for artefact, state in repository.verify():
        counts[state] += 1
        read += artefact.size
        if state != "whole":
            sys.stderr.write("\r\033[K" if total else "")  # clear the progress bar
            version = artefact.version if artefact.time else ""  # unreadable: unknown
            say(f"{state}: {artefact.directory}/{artefact.id} {version}".rstrip())
        if total:
            part = min(1, read / total)
            sys.stderr.write(f"\r[{'#' * round(part * 40):40}] {part:4.0%}, {sum(counts.values())} files ")
            sys.stderr.flush()
    sys.stderr.write("\n" if total else "")
    say(", ".join(f"{count} {state}" for state, count in counts.items() if count or state != "unreadable"))
    return 1 if counts["damaged"] or counts["unreadable"] else 0


def bytes_below(path: str) -> int:
    """Return the size of all files below. Files that are added or removed meanwhile may be missing."""
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.lstat(os.path.join(folder, name)).st_size
    return total


def sweep(repository: Repository, dry_run: bool = False) -> int:
    """Delete what is older than keep_days, and print it."""
    for artefact in repository.expire(dry_run):
        say(f"{artefact.directory}/{artefact.id} {artefact.version}")
    return 0


def sweep_hourly(repository: Repository) -> None:
    """Delete what is older than keep_days and what crashes left, for ever, on a thread of its own."""
    while True:
        try:
            for artefact in repository.expire():
                log.warning("keep_days: deleted %s/%s %s", artefact.directory, artefact.id, artefact.version)
            time.sleep(SWEEP_EVERY)
            repository.sweep()
        except (ArtefactsError, OSError) as error:
            log.error("the sweep broke off: %s", error)
            time.sleep(SWEEP_EVERY)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program, and return its exit status: 2 if the options or the data directory cannot be used."""
    options = parse_options(arguments)
    options.host = [host.strip("[]") for host in options.host or ["127.0.0.1"]]
    logging.Formatter.converter = time.gmtime
    logging.basicConfig(format="[%(asctime)s] %(name)s: %(message)s", datefmt=LOG_TIME)
    try:
        return start(options)
    except KeyboardInterrupt:
        return 130
    except Unavailable as error:
        message = f"{options.data}: {error}"
    except OSError as error:
        message = f"{error.filename or options.data}: {error.strerror}"
    except ValueError as error:
        message = str(error)
    sys.stderr.write(f"artefacts.py: {message}\n")
    return 2


def start(options: argparse.Namespace) -> int:
    """Do what the options say, and return the exit status."""
    if sys.getfilesystemencoding() != "utf-8":
        raise ValueError("names are not stored in UTF-8 under this locale: set LC_ALL=C.UTF-8")
    if options.new_token is not None:
        token, lines = new_token(options.new_token)
        say(lines)
        sys.stderr.write(f"{token}\n")
        return 0
    settings = settings_of(options)
    if options.verify:
        return verify(Reader(options.data))
    repository = make_repository(options.data, settings, not options.no_fsync, sweep=not options.dry_run)
    if options.sweep:
        return sweep(repository, options.dry_run)
    groups, app = listen_for_processes(options), application(repository, settings)
    host, port = options.host[0], groups[0][0].getsockname()[1]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}{options.prefix}/artefacts/"
    repository.check_directories()

    def reload() -> bool:
        """Read the rules again. Return False if they are as before."""
        try:
            if options.config is not None:
                settings.config = settings_of(options).config
            return options.config is not None
        except (OSError, ValueError) as error:
            log.error("the old rules stay: %s", error)
            return False

    def serve(number: int) -> None:
        """Serve a group of sockets, in a process of its own if there are several."""
        for sock in itertools.chain(*groups[:number], *groups[number + 1 :]):
            sock.close()
        if number == 0:
            threading.Thread(target=sweep_hourly, args=(repository,), daemon=True).start()
        server = Server(app, repository, options, groups[number])
        run(server, options.grace, reload, url if len(groups) == 1 else "")

    with contextlib.suppress(AttributeError, OSError):  # glibc has an arena for each thread otherwise
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 2)
    gc.freeze()  # what exists now stays, so the collector need not look at it again
    gc.set_threshold(50_000, 20, 20)
    if len(groups) == 1:
        serve(0)
    else:
        supervise(groups, serve, reload, options.grace, url)
    return 0


if __name__ == "__main__":
    sys.exit(main())
