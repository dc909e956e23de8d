"""Real clients against the running program, each as its users call it.

Needs what stands in packages.txt (Debian) and requirements-clients.txt (PyPI). Starts `python artefacts.py`
of the folder above this one. What a client asked, and got, is read from the program's log.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote, urlsplit

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOME = random.Random(1).randbytes(8 * 1024 * 1024 + 5)  # enough for aria2 to fetch it in segments
YESTERDAY = time.time() - 24 * 3600
LOG_LINE = re.compile(r'\S+ - \S+ \[[^]]+\] "(\w+) /artefacts/([^/]+)/(\S+) HTTP/1\.[01]" ([0-9]{3}) \S+')


class Requests:
    """One connection, which the program must keep open."""

    def __init__(self, url: str) -> None:
        self.connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=10)
        self.connection.connect()
        self.connection.auto_open = 0

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
        fields = {name.replace("_", "-"): value for name, value in headers.items()}
        self.connection.request(method, "/artefacts/" + path, body, fields)
        with self.connection.getresponse() as answer:
            return answer.status, answer.read()

    def __enter__(self) -> Requests:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()


class Program:
    """The running program: its URL, its data directory, its log."""

    def __init__(self, url: str, data: Path, log: Path) -> None:
        self.url, self.data, self.log = url, data, log

    def put(self, path: str, content: bytes) -> None:
        with Requests(self.url) as requests:
            assert requests.ask("PUT", quote(path), content)[0] in (200, 201)

    def ids(self, directory: str) -> list[str]:
        with Requests(self.url) as requests:
            return [artefact["id"] for artefact in json.loads(requests.ask("GET", directory)[1])["artefacts"]]

    def drop(self, path: str, content: bytes) -> None:
        """Puts it into the data directory by hand, as a file of yesterday."""
        file = self.data / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        os.utime(file, (YESTERDAY, YESTERDAY))

    def damage(self, path: str) -> None:
        """Changes a byte on disk, as a failing disk does: size and time stay."""
        file = self.data / path
        before, content = file.stat(), bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        with open(file, "r+b") as opened:
            opened.write(content)
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))

    def answered(self, directory: str) -> list[str]:
        """`GET 200 <id>` for each request below the directory so far."""
        lines = LOG_LINE.findall(self.log.read_text())
        return [f"{method} {status} {id}" for method, below, id, status in lines if below == directory]

    def wait_for(self, directory: str, *answers: str) -> None:
        """Until the log tells of at least these: a client may be done before its line is written."""
        deadline = time.monotonic() + 10
        while Counter(answers) - Counter(self.answered(directory)):
            assert time.monotonic() < deadline, self.answered(directory)
            time.sleep(0.01)


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    folder = tmp_path_factory.mktemp("program")
    command = [sys.executable, "artefacts.py", "--port", "0", "--data", str(folder / "data")]
    with (
        open(folder / "log", "a") as log,
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        assert process.stdout is not None
        try:
            yield Program(process.stdout.readline().strip(), folder / "data", folder / "log")
        finally:
            process.terminate()
            assert process.wait(15) == 0
    assert "Traceback" not in (folder / "log").read_text()


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs a command line in a folder of the test's own, without this machine's settings for it."""

    def run(command: str, status: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
        environment |= {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "LC_ALL": "C.UTF-8"}
        done = subprocess.run(
            shlex.split(command), cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=50,
        )
        assert done.returncode == status, (command, done.stdout[-2000:], done.stderr[-2000:])
        return done

    return run


def test_the_clients_are_there() -> None:
    """What is missing is to be installed, not passed over."""
    wanted = ("curl", "wget", "aria2c", "rclone", "ccache", "gcc", "mvn", "dpkg-deb", "apt-get")
    assert [name for name in wanted if shutil.which(name) is None] == []


# -- curl, wget, aria2 --


@pytest.mark.parametrize("command", ["curl -sS -C - -O", "wget -q -c"])
def test_a_download_is_resumed_and_then_left_alone(
    program: Program, run: Run, tmp_path: Path, command: str
) -> None:
    directory = f"resumed-{command.split()[0]}"
    program.put(f"{directory}/file", SOME)
    (tmp_path / "file").write_bytes(SOME[:1_000_000])
    for _ in range(2):
        run(f"{command} {program.url}{directory}/file")
        assert (tmp_path / "file").read_bytes() == SOME
    program.wait_for(directory, "GET 206 file", "GET 416 file")


def test_curl_keeps_a_copy_current_by_etag(program: Program, run: Run, tmp_path: Path) -> None:
    command = f"curl -fsS --etag-save tag --etag-compare tag -o out -w %{{http_code}} {program.url}etag/file"
    program.put("etag/file", b"one")
    assert run(command).stdout == "200"
    assert run(command).stdout == "304"
    assert (tmp_path / "out").read_bytes() == b"one"
    program.put("etag/file", b"two")  # within the same second
    assert run(command).stdout == "200"
    assert (tmp_path / "out").read_bytes() == b"two"


def test_curl_keeps_a_copy_current_by_time(program: Program, run: Run, tmp_path: Path) -> None:
    command = f"curl -fsS -R -z out -o out -w %{{http_code}} {program.url}curl-z/file"
    program.drop("curl-z/file", b"one")
    assert run(command).stdout == "200"
    assert (tmp_path / "out").stat().st_mtime == int(YESTERDAY)
    assert run(command).stdout == "304"
    program.put("curl-z/file", b"two")
    assert run(command).stdout == "200"
    assert (tmp_path / "out").read_bytes() == b"two"


@pytest.mark.parametrize("name", ["plain.tar.gz", "ünïcode ☃.txt", "semi;colon, 'quote'.txt"])
def test_curl_saves_under_the_name_it_is_told(program: Program, run: Run, tmp_path: Path, name: str) -> None:
    program.put(f"curl-oj/1.0/{name}", b"content")
    run(f"curl -fsS -OJ {program.url}curl-oj/1.0/{quote(name)}?no=name")
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_wget_fetches_only_what_is_newer(program: Program, run: Run, tmp_path: Path) -> None:
    command = f"wget -q -N {program.url}wget-n/file"
    program.drop("wget-n/file", b"one")
    run(command)
    run(command)
    assert (tmp_path / "file").read_bytes() == b"one"
    program.put("wget-n/file", b"two")
    run(command)
    assert (tmp_path / "file").read_bytes() == b"two"
    program.wait_for("wget-n", "GET 200 file", "GET 304 file", "GET 200 file")


def test_aria2_fetches_in_segments_and_verifies(program: Program, run: Run, tmp_path: Path) -> None:
    command = f"aria2c --no-conf -q -x4 -s4 -k1M --allow-overwrite=true {program.url}aria2/file"
    program.put("aria2/file", SOME)
    run(command)
    assert (tmp_path / "file").read_bytes() == SOME
    program.wait_for("aria2", *["GET 206 file"] * 3)
    program.damage("aria2/file")
    run(command, status=32)


# -- those that read the HTML listing --


def test_wget_mirrors_a_directory_and_nothing_else(program: Program, run: Run, tmp_path: Path) -> None:
    files = {"a.txt": b"a", "1.0/b c.bin": b"b", "1.0/deep/ü 100%#?&.txt": b"c", "empty": b""}
    for name, content in files.items():
        program.put(f"wget-r/{name}", content)
    program.put("wget-r-not/other.txt", b"other")
    options = "-nH --cut-dirs=2 --restrict-file-names=nocontrol -P mirror --header='Accept: text/html'"
    run(f"wget -q -r -np {options} {program.url}wget-r/")
    (tmp_path / "mirror/index.html").unlink()
    found = [file for file in (tmp_path / "mirror").rglob("*") if file.is_file()]
    assert {str(file.relative_to(tmp_path / "mirror")): file.read_bytes() for file in found} == files


def test_rclone_copies_a_directory(program: Program, run: Run, tmp_path: Path) -> None:
    files = {"a.txt": b"a", "b c.bin": SOME, "ü%20#?&.txt": b"c"}
    for name, content in files.items():
        program.put(f"rclone/{name}", content)
    options = f"--http-url {program.url}rclone/ --http-headers Accept,text/html"
    run(f"rclone copy :http: copy {options}", RCLONE_CONFIG="")
    assert {file.name: file.read_bytes() for file in (tmp_path / "copy").iterdir()} == files
    stored = (program.data / "rclone/a.txt").stat().st_mtime
    assert (tmp_path / "copy/a.txt").stat().st_mtime == int(stored)


def wheel(path: Path) -> bytes:
    """A wheel of one module, `tiny`."""
    files = {
        "tiny.py": "ANSWER = 42\n",
        "tiny-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n",
        "tiny-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    rows = ["tiny-1.0.dist-info/RECORD,,"]
    for name, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        rows.append(f"{name},sha256={digest},{len(text)}")
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in (files | {"tiny-1.0.dist-info/RECORD": "\n".join(rows)}).items():
            archive.writestr(name, text)
    return path.read_bytes()


def test_pip_installs_from_the_listing_and_enforces_its_hashes(
    program: Program, run: Run, tmp_path: Path
) -> None:
    program.put("wheels/tiny-1.0-py3-none-any.whl", wheel(tmp_path / "made.whl"))
    pip = f"{shlex.quote(sys.executable)} -m pip install -q --disable-pip-version-check --no-cache-dir"
    command = f"{pip} --no-index --find-links {program.url}wheels/ tiny --target"
    run(f"{command} there", PIP_CONFIG_FILE=os.devnull)
    assert (tmp_path / "there/tiny.py").read_text() == "ANSWER = 42\n"
    program.damage("wheels/tiny-1.0-py3-none-any.whl")
    refused = run(f"{command} not-there", status=1, PIP_CONFIG_FILE=os.devnull)
    assert "DO NOT MATCH THE HASHES" in refused.stderr
    assert not (tmp_path / "not-there").exists()


# -- compiler caches --


@pytest.mark.parametrize(
    ("layout", "ids"),
    [("flat", "[0-9a-z]{30,}"), ("subdirs", "[0-9a-z]{2}/[0-9a-z]{28,}"), ("bazel", "ac/[0-9a-f]{64}")],
)
def test_ccache_shares_what_was_compiled(
    program: Program, run: Run, tmp_path: Path, layout: str, ids: str
) -> None:
    (tmp_path / "tiny.c").write_text("int answer(void) { return 42; }\n")
    objects = []
    for cache in ("first", "second"):  # two machines, as it were
        settings = {
            "CCACHE_DIR": str(tmp_path / cache),
            "CCACHE_REMOTE_STORAGE": f"{program.url}ccache-{layout}|layout={layout}",
        }
        run("ccache gcc -c tiny.c -o tiny.o", **settings)
        objects.append((tmp_path / "tiny.o").read_bytes())
        (tmp_path / "tiny.o").unlink()
        told = run("ccache --print-stats", **settings).stdout
        stats = dict(line.split("\t") for line in told.splitlines())
        assert stats["remote_storage_error"] == "0"
        assert (int(stats["remote_storage_hit"]) > 0) == (cache == "second")
    assert objects[0] == objects[1]
    stored = program.ids(f"ccache-{layout}")
    assert stored
    assert all(re.fullmatch(ids, id) for id in stored), stored


def test_requests_of_sccache_over_webdav(program: Program) -> None:
    folders = ("webdav/1/d/e/", "webdav/1/d/", "webdav/1/", "webdav/", "")
    with Requests(program.url) as requests:
        assert requests.ask("GET", "webdav/1/d/e/1dea")[0] == 404
        for folder in folders:  # up to the first that is there
            assert requests.ask("PROPFIND", folder, Depth="0")[0] == 404
        for folder in reversed(folders):
            assert requests.ask("MKCOL", folder)[0] in (201, 405)
        assert requests.ask("PUT", "webdav/1/d/e/1dea", b"object")[0] == 201
        assert requests.ask("GET", "webdav/1/d/e/1dea") == (200, b"object")


# -- build tools --


def test_requests_of_a_gradle_build_cache(program: Program) -> None:
    path, kind = "gradle/f469a6102a77d2c806fb1191c0a82b26", "application/vnd.gradle.build-cache-artifact.v1"
    with Requests(program.url) as requests:
        assert requests.ask("GET", path, Accept=f"{kind}, */*")[0] == 404
        assert requests.ask("PUT", path, SOME, Content_Type=kind)[0] == 201
        assert requests.ask("GET", path, Accept=f"{kind}, */*") == (200, SOME)
        assert requests.ask("PUT", path, b"of another build", Content_Type=kind)[0] == 200


def test_requests_of_a_bazel_remote_cache(program: Program) -> None:
    action, output = f"bazel/ac/{'a' * 64}", f"bazel/cas/{hashlib.sha256(SOME).hexdigest()}"
    with Requests(program.url) as requests:
        assert requests.ask("GET", action)[0] == 404
        assert requests.ask("PUT", output, SOME)[0] == 201
        assert requests.ask("PUT", action, b"result")[0] == 201
        before = requests.ask("GET", f"{output}?versions")
        assert requests.ask("PUT", output, SOME)[0] == 200
        assert requests.ask("GET", f"{output}?versions") == before
        assert requests.ask("GET", action) == (200, b"result")
        assert requests.ask("GET", output) == (200, SOME)


def test_requests_of_a_terraform_state(program: Program) -> None:
    """With `update_method = "PUT"`."""
    path = "terraform/app.tfstate"
    with Requests(program.url) as requests:
        assert requests.ask("GET", path)[0] == 404  # no state yet
        for serial, status in ((1, 201), (2, 200)):
            state = json.dumps({"version": 4, "serial": serial}).encode()
            fields = {"Content_MD5": base64.b64encode(hashlib.md5(state).digest()).decode()}
            answer = requests.ask("PUT", f"{path}?ID=6d1c", state, Content_Type="application/json", **fields)
            assert answer[0] == status
            assert requests.ask("GET", path) == (200, state)
        assert requests.ask("DELETE", path)[0] in (200, 204)


def test_maven_deploys_and_resolves(program: Program, run: Run, tmp_path: Path) -> None:
    """Two builds of a snapshot, then one that needs it; with the plugins that Debian packages."""
    url = f"{program.url}maven"
    project = "<project><modelVersion>4.0.0</modelVersion>{}<packaging>pom</packaging></project>"
    base = "<groupId>org.example</groupId><artifactId>base</artifactId><version>1-SNAPSHOT</version>"
    child = (
        f"<parent>{base}<relativePath/></parent><artifactId>child</artifactId>"
        f"<repositories><repository><id>artefacts</id><url>{url}</url>"
        "<snapshots><checksumPolicy>fail</checksumPolicy></snapshots></repository></repositories>"
    )
    (tmp_path / "pom.xml").write_text(project.format(base))
    (tmp_path / "child.xml").write_text(project.format(child))
    (tmp_path / "settings.xml").write_text(
        "<settings><mirrors><mirror><id>debian</id><mirrorOf>central</mirrorOf>"
        "<url>file:///usr/share/maven-repo</url></mirror></mirrors></settings>"
    )
    settings = {"MAVEN_OPTS": "-XX:TieredStopAtLevel=1"}  # starts faster
    maven = "mvn -B -q -s settings.xml -Dmaven.repo.local="
    for _ in range(2):
        run(f"{maven}m2 deploy -DaltDeploymentRepository=artefacts::{url}", **settings)
    run(f"{maven}other -f child.xml validate", **settings)
    stored = [id for id in program.ids("maven") if id.endswith(".pom")]
    assert len(stored) == 2
    assert all((program.data / "maven" / id).read_text() == project.format(base) for id in stored)
    program.wait_for("maven", *(f"PUT 201 {id}" for id in stored), f"GET 200 {stored[1]}")


# -- Debian --


def test_apt_reads_a_flat_repository(program: Program, run: Run, tmp_path: Path) -> None:
    """Below a root of its own: nothing of this machine's is read or changed."""
    control = (
        "Package: tiny-artefact\nVersion: 1.0\nArchitecture: all\n"
        "Maintainer: Nobody <nobody@example.org>\nDescription: tiny\n"
    )
    (tmp_path / "tiny/DEBIAN").mkdir(parents=True)
    (tmp_path / "tiny/DEBIAN/control").write_text(control)
    run("dpkg-deb --build --root-owner-group tiny tiny.deb")
    package = (tmp_path / "tiny.deb").read_bytes()
    digest = hashlib.sha256(package).hexdigest()
    index = f"{control}Filename: pool/tiny.deb\nSize: {len(package)}\nSHA256: {digest}\n"
    program.put("apt/pool/tiny.deb", package)
    program.put("apt/Packages", index.encode())

    for folder in ("etc/apt", "var/lib/apt/lists/partial", "var/cache/apt/archives/partial"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "etc/apt/sources.list").write_text(f"deb [trusted=yes] {program.url}apt /\n")
    (tmp_path / "status").write_text("")
    (tmp_path / "apt.conf").write_text(
        f'Dir "{tmp_path}"; Dir::State::status "{tmp_path}/status"; Dir::Log "/dev/null";'
        'APT::Sandbox::User ""; Acquire::http::Proxy "DIRECT"; Acquire::Languages "none";\n'
    )
    settings = {"APT_CONFIG": str(tmp_path / "apt.conf")}
    run("apt-get update", **settings)
    run("apt-get download tiny-artefact", **settings)
    (downloaded,) = tmp_path.glob("tiny-artefact_*.deb")
    assert downloaded.read_bytes() == package
    downloaded.unlink()
    program.damage("apt/pool/tiny.deb")
    assert "Hash Sum mismatch" in run("apt-get download tiny-artefact", status=100, **settings).stderr
