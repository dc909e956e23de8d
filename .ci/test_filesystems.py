"""Check the storage on the file systems that people use, and where they refuse what a commit needs.

Each is a fresh image of its own, mounted for one test. Needs root, loop devices, and the tools to make them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import PATIENCE, PROGRAM, serving

import artefacts as a

SIZE = 512 * 1024 * 1024  # bytes of an image, which is sparse; xfs needs 300 MiB
UNPRIVILEGED = ("setpriv", "--bounding-set=-all", "--inh-caps=-all")  # file permissions apply to it
BODY = bytes(range(256)) * 4 * 1024 * 16  # 16 MiB
MAKE = {
    "ext4": ["mkfs.ext4", "-q"], "xfs": ["mkfs.xfs", "-q"], "btrfs": ["mkfs.btrfs", "-q"],
    "ntfs": ["mkntfs", "--quiet", "--fast", "--force"],
}  # fmt: skip
MOUNT = {"ntfs": ["ntfs-3g", "-o", "windows_names"]}  # names that Windows does not know are EINVAL
SHARES_BYTES = ("xfs", "btrfs")  # a copy of a file needs no space

Mount = Callable[[str], Path]


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Mount]:
    """Return a function that mounts a fresh file system of a kind and returns the folder."""

    def mount(kind: str) -> Path:
        if os.geteuid():
            pytest.skip("only root can mount a file system")
        if shutil.which(MAKE[kind][0]) is None:
            pytest.skip(f"{MAKE[kind][0]} is not installed")
        image, folder = tmp_path / f"{kind}.image", tmp_path / kind
        with image.open("wb") as file:
            file.truncate(SIZE)
        folder.mkdir()
        subprocess.run([*MAKE[kind], image], check=True, capture_output=True)
        subprocess.run([*MOUNT.get(kind, ["mount", "-o", "loop"]), image, folder], check=True)
        folders.append(folder)
        return folder

    folders: list[Path] = []
    try:
        yield mount
    finally:
        for folder in folders:
            subprocess.run(["umount", "--lazy", folder], check=True)


def run_python(code: str, *arguments: object, before: tuple[str, ...] = ()) -> str:
    """Run code in a process of its own, in which `a` is the program and `push` pushes. Return its output."""
    start = f"""
import os, sys
sys.path.insert(0, {str(PROGRAM.parent)!r})
import artefacts as a

def push(repository, directory, id, content):
    with repository.stage() as upload:
        upload.write(content)
        return repository.push(upload, directory, id)[0]

def refusal(operation):
    try:
        operation()
    except a.CannotStore as error:
        return error.detail
"""
    command = [*before, sys.executable, "-W", "error", "-c", start + code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
def test_story_on_a_fresh_file_system(mounted: Mount, kind: str) -> None:
    """Use the root of a file system as the data directory, without the right to read its lost+found."""
    data = mounted(kind)
    (data / "lost+found").mkdir(mode=0o700, exist_ok=True)  # only ext4 has it
    os.chown(data / "lost+found", 65534, 65534)
    code = """
import time
body = bytes(range(256)) * 4 * 1024 * 16
repository = a.Repository(sys.argv[1], keep_versions=a.ALL, keep_days=lambda _: 30)
assert repository.directories() == []
first = push(repository, "staging", "app.zip", body)
assert push(repository, "staging", "app.zip", body) == first
os.sync()
before = os.statvfs(sys.argv[1])
with repository.fetch("staging", "app.zip") as source:
    copy = repository.promote(source, "releases", "1.0/app.zip")[0]
os.sync()
after = os.statvfs(sys.argv[1])
assert (copy.sha256, copy.type) == (first.sha256, first.type)
print("space", (before.f_bavail - after.f_bavail) * before.f_frsize)
path = f"{repository.root}/staging/app.zip"
second = push(repository, "staging", "app.zip", b"second")
for seconds in -315619200, -1, 4291747200:  # 1960, 1969, 2106
    os.utime(path, (seconds, seconds))
    [row] = repository.artefacts("staging", digests=True)
    assert row.time == max(0, min(seconds, int(os.stat(path).st_mtime))) * 10**6, row
    new = push(repository, "staging", "app.zip", str(seconds).encode())
    assert new.version == a.Reader(repository.root).version_names("staging", "app.zip")[0][0]
repository.restore("staging", "app.zip", first.version)
repository.delete("staging", "app.zip")
assert [row.id for row in repository.deleted("staging")] == ["app.zip"]
assert repository.directories() == ["releases", "staging"]
repository.delete_directory("staging")
old = time.time_ns() - 40 * 86400 * 10**9
os.utime(f"{repository.root}/releases/1.0/app.zip", ns=(old, old))
push(repository, "releases", "1.0/app.zip", body)
assert [*repository.expire()] == []
repository.check_health()
"""
    output = run_python(code, data, before=UNPRIVILEGED)
    used = int(output.split()[1])
    assert used < 1024 * 1024 if kind in SHARES_BYTES else used >= len(BODY)
    assert (data / "releases/1.0/app.zip").read_bytes() == BODY
    verify = [*UNPRIVILEGED, sys.executable, str(PROGRAM), "--data", str(data), "--verify"]
    done = subprocess.run(verify, capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("1 whole"), done


def test_directory_on_another_file_system(tmp_path: Path) -> None:
    """Mount a file system at a directory and at a folder: they can be read and deleted from."""
    if os.geteuid():
        pytest.skip("only root can mount a file system")
    code = """
data = sys.argv[1]
repository = a.Repository(data)
repository.check_directories()
for folder in "app", "lib/mounted":
    with open(f"{data}/{folder}/x", "wb") as file:
        file.write(b"by hand")
refused = [refusal(lambda: repository.delete_directory("app"))]
for directory, id in ("app", "new"), ("app", "x"), ("lib", "mounted/x"):
    refused.append(refusal(lambda: push(repository, directory, id, b"1")))
assert all("another file system" in detail and data not in detail for detail in refused), refused
assert os.listdir(f"{data}/.incoming") == []
for directory, id in ("app", "x"), ("lib", "mounted/x"):
    with repository.fetch(directory, id) as content:
        assert content.whole() == b"by hand"
    assert [row.id for row in repository.artefacts(directory)] == [id]
    repository.delete(directory, id)
    assert [*repository.artefacts(directory)] == []
push(repository, "lib", "x", b"1")
repository.check_health()
"""
    for folder in "app", "lib/mounted":
        (tmp_path / folder).mkdir(parents=True)
    mount = 'mount -t tmpfs none "$1/app" && mount -t tmpfs none "$1/lib/mounted" && shift && exec "$@"'
    before = ("unshare", "--mount", "sh", "-ec", mount, "sh", str(tmp_path))
    output = run_python(code, tmp_path, before=before)
    assert output == "'app' is on another file system: nothing can be pushed to it\n"
    assert (tmp_path / "lib/x").read_bytes() == b"1"


def test_project_quota(mounted: Mount) -> None:
    """Give a directory a project, as for a quota: nothing can be renamed into it, and the answer says so."""
    data = mounted("xfs")  # whose projects need no support for quotas
    repository = a.Repository(data)
    (data / "app").mkdir()
    subprocess.run(["chattr", "-p", "5", "+P", data / "app"], check=True)
    with repository.stage() as upload, pytest.raises(a.CannotStore, match="project quota"):
        repository.push(upload, "app", "x")
    assert os.listdir(data / ".incoming") == [] and os.listdir(data / "app") == []
    subprocess.run(["chattr", "-p", "0", data / "app"], check=True)
    with repository.stage() as upload:
        repository.push(upload, "app", "x")


def test_overlay(tmp_path: Path) -> None:
    """Serve from a container's image: a directory of the image cannot be renamed, and so not deleted."""
    if os.geteuid():
        pytest.skip("only root can mount a file system")
    code = """
repository = a.Repository(sys.argv[1])
push(repository, "app", "x", b"new")
push(repository, "app", "y", b"new")
detail = refusal(lambda: repository.delete_directory("app"))
assert "overlay" in detail, detail
assert [row.id for row in repository.artefacts("app")] == ["x", "y"]
repository.delete("app", "x")
push(repository, "new", "x", b"new")
repository.delete_directory("new")
"""
    (tmp_path / "lower/app").mkdir(parents=True)
    (tmp_path / "lower/app/x").write_bytes(b"of the image")
    for name in "disk", "merged":
        (tmp_path / name).mkdir()
    mount = """
cd "$1"; shift
mount -t tmpfs none disk
mkdir disk/upper disk/work
mount -t overlay -o redirect_dir=off,lowerdir=lower,upperdir=disk/upper,workdir=disk/work none merged
exec "$@"
"""
    before = ("unshare", "--mount", "sh", "-ec", mount, "sh", str(tmp_path))
    assert run_python(code, tmp_path / "merged", before=before) == ""


def test_names_that_the_file_system_does_not_accept(mounted: Mount) -> None:
    """Use NTFS, which refuses names that Windows does not know, has no owners, and cuts times to 100 ns."""
    if not Path("/dev/fuse").exists():
        pytest.skip("there is no FUSE here")
    data = mounted("ntfs")
    with serving(data, "--keep-versions", "1") as server:
        for body in b"1", b"2", b"3":
            assert server.ask("PUT", "app/x", body).status in (200, 201)
        assert [row["id"] for row in server.ask("GET", "app").json["artefacts"]] == ["x"]
        assert len(server.ask("GET", "app/x?versions").json["versions"]) == 2
    repository = a.Repository(data)
    for directory, id in ("app", "a:b"), ("app", "a:b/x"), ("a:b", "x"):
        with repository.stage() as upload, pytest.raises(a.CannotStore, match="does not accept this name"):
            repository.push(upload, directory, id)
    assert os.listdir(data / ".incoming") == []


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
@pytest.mark.parametrize("acl", ["u:1234:rwx,g:5678:r-x", "u:1234:rw-,m::r--,o::---", "u::rw-,g::r--,o::---"])
def test_default_acl_and_group_are_inherited(mounted: Mount, kind: str, acl: str) -> None:
    """Compare what a push makes with what other programs make in the same folder."""

    def access(path: Path) -> str:
        """Return owner, group, flags and the effective rights of the ACL."""
        command = ["getfacl", "--absolute-names", "--all-effective", str(path)]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return re.sub(r"...\t+#effective:", "", shown.partition("\n")[2])

    if shutil.which("setfacl") is None:
        pytest.skip("setfacl is not installed")
    data = mounted(kind)
    repository, app = a.Repository(data, keep_versions=1), data / "app"
    app.mkdir()
    os.chown(app, -1, 4321)
    app.chmod(0o2775)
    subprocess.run(["setfacl", "--default", "--modify", acl, app], check=True)
    (app / "folder").mkdir()
    (app / "folder/file").touch()
    for content in b"1", b"2":
        with repository.stage() as upload:
            upload.write(content)
            repository.push(upload, "app", "d/x")
    [version] = (app / ".versions/d/x").iterdir()
    assert access(app / "d/x") == access(version) == access(app / "folder/file")
    assert access(app / "d") == access(app / ".versions/d/x") == access(app / "folder")
    assert {path.stat().st_gid for path in app.rglob("*")} == {4321}
