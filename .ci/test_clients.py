"""Use real clients against the running program, each as its users call it.

`.ci/run` installs the clients. What a client requested, and the status that it got, is read from the
program's log.
"""

from __future__ import annotations

import base64
import hashlib
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
from urllib.parse import quote

import pytest
from readme import line
from support import Client, Server, serving, sha256, until

LARGE_BODY = random.Random(1).randbytes(8 * 1024 * 1024 + 5)  # enough for aria2 to fetch it in segments
YESTERDAY = time.time() - 24 * 3600
LOG_LINE = re.compile(r'\S+ - \S+ \[[^]]+\] "(\w+) /artefacts/([^/]+)/(\S+) HTTP/1\.[01]" ([0-9]{3}) \S+')


class Requests(Client):
    """Send requests over one connection, which the program must keep open."""

    def __init__(self, port: int) -> None:
        super().__init__(port)
        self.connection.timeout = 10
        self.connection.connect()
        self.connection.auto_open = 0

    def status_and_body(self, method: str, path: str, body: bytes | None = None,
                        **headers: str) -> tuple[int, bytes]:
        fields = {name.replace("_", "-"): value for name, value in headers.items()}
        answer = self.ask(method, path, body, fields)
        return answer.status, answer.body


class Program:
    """The running program: its URL, its data directory, its log."""

    def __init__(self, server: Server, data: Path) -> None:
        self.server, self.url, self.data = server, server.url, data

    def requests(self) -> Requests:
        return Requests(self.server.port)

    def put(self, path: str, content: bytes) -> None:
        with self.requests() as requests:
            assert requests.ask("PUT", quote(path), content).status in (200, 201)

    def ids(self, directory: str) -> list[str]:
        with self.requests() as requests:
            return [artefact["id"] for artefact in requests.ask("GET", directory).json["artefacts"]]

    def add_file(self, path: str, content: bytes) -> None:
        """Write a file into the data directory by hand, with yesterday's modification time."""
        file = self.data / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        os.utime(file, (YESTERDAY, YESTERDAY))

    def damage(self, path: str) -> None:
        """Change a byte on disk, as a failing disk does: size and modification time stay."""
        file = self.data / path
        before, content = file.stat(), bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        with open(file, "r+b") as opened:
            opened.write(content)
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))

    def logged(self, directory: str) -> list[str]:
        """Return `GET 200 <id>` for each request in the directory so far."""
        lines = LOG_LINE.findall(self.server.log())
        return [f"{method} {status} {id}" for method, below, id, status in lines if below == directory]

    def wait_for(self, directory: str, *lines: str) -> None:
        """Wait until the log has at least these lines: a client may end before its line is written."""
        until(lambda: not Counter(lines) - Counter(self.logged(directory)), 10)


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    data = tmp_path_factory.mktemp("program") / "data"
    with serving(data, requests_logged=True, stop_within=15) as server:
        yield Program(server, data)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Return a function that runs a command in the test's folder, without the settings of this machine."""

    def run(command: str, status: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
        environment |= {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "LC_ALL": "C.UTF-8"}
        done = subprocess.run(
            shlex.split(command), cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=50,
        )
        assert done.returncode == status, (command, done.stdout[-2000:], done.stderr[-2000:])
        return done

    return run


@pytest.fixture
def run_line(program: Program, run: Run) -> Run:
    """Return a function that runs the README's only line that contains a text."""

    def run_line(part: str, status: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
        script = f"A={program.url.rstrip('/')}; {line(part)}"
        return run(f"bash -ec {shlex.quote(script)}", status, **environment)

    return run_line


def test_clients_are_installed() -> None:
    """Fail, instead of skipping tests, if a client is missing."""
    wanted = ("curl", "wget", "aria2c", "rclone", "ccache", "gcc", "mvn", "dpkg-deb", "apt-get",
              "busybox", "bsdtar", "7z", "unzip", "lftp", "zsync", "ostree", "debuginfod-find", "nix", "go",
              "cargo", "npm", "git", "uv", "ansible", "dvc", "readelf")
    assert [name for name in wanted if shutil.which(name) is None] == []


# -- curl, wget, aria2 --


@pytest.mark.parametrize("command", ["curl -sS -C - -O", "wget -q -c"])
def test_download_is_resumed_and_then_not_repeated(
    program: Program, run: Run, tmp_path: Path, command: str
) -> None:
    directory = f"resumed-{command.split()[0]}"
    program.put(f"{directory}/file", LARGE_BODY)
    (tmp_path / "file").write_bytes(LARGE_BODY[:1_000_000])
    for _ in range(2):
        run(f"{command} {program.url}{directory}/file")
        assert (tmp_path / "file").read_bytes() == LARGE_BODY
    program.wait_for(directory, "GET 206 file", "GET 416 file")


def test_curl_keeps_a_copy_current_by_etag(program: Program, run: Run, tmp_path: Path) -> None:
    command = f"curl -fsS --etag-save tag --etag-compare tag -o out -w %{{http_code}} {program.url}etag/file"
    program.put("etag/file", b"one")
    assert run(command).stdout == "200"
    assert run(command).stdout == "304"
    assert (tmp_path / "out").read_bytes() == b"one"
    program.put("etag/file", b"two")  # within the second of the first push
    assert run(command).stdout == "200"
    assert (tmp_path / "out").read_bytes() == b"two"


def test_curl_keeps_a_copy_current_by_time(program: Program, run: Run, tmp_path: Path) -> None:
    command = f"curl -fsS -R -z out -o out -w %{{http_code}} {program.url}curl-z/file"
    program.add_file("curl-z/file", b"one")
    assert run(command).stdout == "200"
    assert (tmp_path / "out").stat().st_mtime == int(YESTERDAY)
    assert run(command).stdout == "304"
    program.put("curl-z/file", b"two")
    assert run(command).stdout == "200"
    assert (tmp_path / "out").read_bytes() == b"two"


@pytest.mark.parametrize("name", ["plain.tar.gz", "ünïcode ☃.txt", "semi;colon, 'quote'.txt"])
def test_curl_saves_under_the_announced_name(
    program: Program, run: Run, tmp_path: Path, name: str
) -> None:
    program.put(f"curl-oj/1.0/{name}", b"content")
    run(f"curl -fsS -OJ {program.url}curl-oj/1.0/{quote(name)}?no=name")
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_wget_fetches_only_what_is_newer(program: Program, run: Run, tmp_path: Path) -> None:
    command = f"wget -q -N {program.url}wget-n/file"
    program.add_file("wget-n/file", b"one")
    run(command)
    run(command)
    assert (tmp_path / "file").read_bytes() == b"one"
    program.put("wget-n/file", b"two")
    run(command)
    assert (tmp_path / "file").read_bytes() == b"two"
    program.wait_for("wget-n", "GET 200 file", "GET 304 file", "GET 200 file")


def test_aria2_fetches_in_segments_and_verifies(program: Program, run: Run, tmp_path: Path) -> None:
    command = f"aria2c --no-conf -q -x4 -s4 -k1M --allow-overwrite=true {program.url}aria2/file"
    program.put("aria2/file", LARGE_BODY)
    run(command)
    assert (tmp_path / "file").read_bytes() == LARGE_BODY
    program.wait_for("aria2", *["GET 206 file"] * 3)
    program.damage("aria2/file")
    run(command, status=32)


# -- clients that read the HTML listing --


def test_wget_mirrors_only_the_directory(program: Program, run: Run, tmp_path: Path) -> None:
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
    files = {"a.txt": b"a", "b c.bin": LARGE_BODY, "ü%20#?&.txt": b"c"}
    for name, content in files.items():
        program.put(f"rclone/{name}", content)
    options = f"--http-url {program.url}rclone/ --http-headers Accept,text/html"
    run(f"rclone copy :http: copy {options}", RCLONE_CONFIG="")
    assert {file.name: file.read_bytes() for file in (tmp_path / "copy").iterdir()} == files
    stored = (program.data / "rclone/a.txt").stat().st_mtime
    assert (tmp_path / "copy/a.txt").stat().st_mtime == int(stored)


def wheel(path: Path) -> bytes:
    """Write a wheel with one module, `tiny`, and return its bytes."""
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
    run(f"{command} installed", PIP_CONFIG_FILE=os.devnull)
    assert (tmp_path / "installed/tiny.py").read_text() == "ANSWER = 42\n"
    program.damage("wheels/tiny-1.0-py3-none-any.whl")
    refused = run(f"{command} refused", status=1, PIP_CONFIG_FILE=os.devnull)
    assert "DO NOT MATCH THE HASHES" in refused.stderr
    assert not (tmp_path / "refused").exists()


def test_lftp_mirrors_a_directory(program: Program, run_line: Run, tmp_path: Path) -> None:
    program.put("nightly/app.zip", b"zip")
    program.put("nightly/1.0/b c.bin", b"b")
    run_line("lftp -c")
    assert (tmp_path / "copy/app.zip").read_bytes() == b"zip"
    assert (tmp_path / "copy/1.0/b c.bin").read_bytes() == b"b"


def test_fsspec_lists_a_directory(program: Program, run: Run, run_line: Run) -> None:
    program.put("nightly/app.zip", b"zip")
    assert f"'{program.url}nightly/app.zip'" in run_line("fsspec.filesystem").stdout
    script = f"import fsspec; print(fsspec.open('{program.url}nightly/app.zip').open().read())"
    assert run(f"{sys.executable} -c {shlex.quote(script)}").stdout == "b'zip'\n"


def test_zsync_fetches_what_changed(program: Program, run: Run, run_line: Run, tmp_path: Path) -> None:
    (tmp_path / "app.img").write_bytes(LARGE_BODY)
    run("zsyncmake -u app.img app.img")
    program.put("nightly/app.img", LARGE_BODY)
    program.put("nightly/app.img.zsync", (tmp_path / "app.img.zsync").read_bytes())
    (tmp_path / "app.img").write_bytes(b"old" + LARGE_BODY[: len(LARGE_BODY) // 2])
    run_line("zsync $A")
    assert (tmp_path / "app.img").read_bytes() == LARGE_BODY
    program.wait_for("nightly", "GET 200 app.img.zsync", "GET 206 app.img")


def test_ansible_compares_the_checksum(program: Program, run_line: Run, tmp_path: Path) -> None:
    program.put("nightly/app.zip", b"zip")
    settings = {"ANSIBLE_PYTHON_INTERPRETER": sys.executable, "ANSIBLE_HOME": str(tmp_path / "ansible")}
    assert '"status_code": 200' in run_line("ansible localhost", **settings).stdout
    assert (tmp_path / "app.zip").read_bytes() == b"zip"
    (tmp_path / "app.zip").unlink()
    program.damage("nightly/app.zip")
    assert "did not match" in run_line("ansible localhost", status=2, **settings).stdout


# -- registries of packages --


@pytest.mark.parametrize("part", ["pip install --index-url", "uv pip install"])
def test_projects_as_folders(
    program: Program, run: Run, run_line: Run, tmp_path: Path, part: str
) -> None:
    content = wheel(tmp_path / "tiny-1.0-py3-none-any.whl")
    run_line("curl -T tiny-1.0-py3-none-any.whl")
    assert (program.data / "wheels/tiny/tiny-1.0-py3-none-any.whl").read_bytes() == content
    run(f"{sys.executable} -m venv .venv")
    path = f"{tmp_path}/.venv/bin:{os.environ['PATH']}"
    script = f"PATH={shlex.quote(path)}; A={program.url.rstrip('/')}; {line(part)}"
    run(f"bash -ec {shlex.quote(script)}", PIP_CONFIG_FILE=os.devnull, UV_NO_CACHE="1", UV_NO_CONFIG="1")
    assert run(".venv/bin/python -c 'import tiny; print(tiny.ANSWER)'").stdout == "42\n"


def test_npm_installs_a_package(program: Program, run: Run, run_line: Run, tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made/package.json").write_text('{"name": "tiny", "version": "1.0.0"}')
    (tmp_path / "package.json").write_text("{}")
    run("npm pack --silent ./made")
    run_line("npm install")
    assert (tmp_path / "node_modules/tiny/package.json").exists()
    assert f"{program.url}npm/tiny-1.0.0.tgz" in (tmp_path / "package-lock.json").read_text()


def test_go_gets_a_module(program: Program, run: Run, run_line: Run, tmp_path: Path) -> None:
    module, folder = "module example.org/tiny\n\ngo 1.19\n", "go/example.org/tiny/@v/"
    with zipfile.ZipFile(tmp_path / "made.zip", "w") as archive:
        archive.writestr("example.org/tiny@v1.0.0/go.mod", module)
        archive.writestr("example.org/tiny@v1.0.0/tiny.go", "package tiny\n\nconst Answer = 42\n")
    program.put(f"{folder}v1.0.0.zip", (tmp_path / "made.zip").read_bytes())
    program.put(f"{folder}v1.0.0.mod", module.encode())
    program.put(f"{folder}v1.0.0.info", b'{"Version": "v1.0.0"}')
    run("go mod init example.org/user")
    run_line("GOPROXY=", GOFLAGS="-modcacherw", GOTOOLCHAIN="local")
    assert "example.org/tiny v1.0.0" in (tmp_path / "go.mod").read_text()


def test_cargo_builds_with_a_crate(program: Program, run: Run, run_line: Run, tmp_path: Path) -> None:
    package = '[package]\nname = "{}"\nversion = "1.0.0"\nedition = "2021"\n'
    for name, source in (("tiny/src/lib.rs", "pub const ANSWER: i32 = 42;"),
                         ("src/main.rs", 'fn main() { println!("{}", tiny::ANSWER) }')):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(source)
    (tmp_path / "tiny/Cargo.toml").write_text(package.format("tiny"))
    cargo = {"RUSTUP_HOME": os.environ.get("RUSTUP_HOME", os.path.expanduser("~/.rustup"))}
    run("cargo package -q --manifest-path tiny/Cargo.toml --allow-dirty --no-verify --offline", **cargo)
    crate = (tmp_path / "tiny/target/package/tiny-1.0.0.crate").read_bytes()
    row = {"name": "tiny", "vers": "1.0.0", "deps": [], "features": {}, "yanked": False}
    row["cksum"] = sha256(crate)
    config = {"dl": f"{program.url}cargo/{{crate}}-{{version}}.crate"}
    program.put("cargo/config.json", json.dumps(config).encode())
    program.put("cargo/ti/ny/tiny", json.dumps(row).encode())
    program.put("cargo/tiny-1.0.0.crate", crate)
    needed = '[dependencies]\ntiny = { version = "1", registry = "artefacts" }\n'
    (tmp_path / "Cargo.toml").write_text(package.format("user") + needed)
    run_line("CARGO_REGISTRIES", **cargo)
    assert run("target/debug/user").stdout == "42\n"


def test_nix_copies_a_path(program: Program, run: Run, run_line: Run, tmp_path: Path) -> None:
    (tmp_path / "hello").write_text("hello\n")
    settings = {"NIX_CONFIG": "build-users-group =\nexperimental-features = nix-command"}
    stores = [settings | {"NIX_REMOTE": str(tmp_path / name)} for name in ("first", "second")]
    path = run("nix-store --add hello", **stores[0]).stdout.strip()
    push, pull = line("nix copy --to").replace("/nix/store/...-hello", path).split(" && ")
    for command, store in zip((push, pull), stores, strict=True):
        run(f"bash -ec {shlex.quote(f'A={program.url[:-1]}; {command}')}", **store)
    assert (tmp_path / f"second{path}").read_text() == "hello\n"


def test_dvc_pushes_and_pulls(program: Program, run: Run, run_line: Run, tmp_path: Path) -> None:
    (tmp_path / "data.bin").write_bytes(LARGE_BODY)
    settings = {"DVC_NO_ANALYTICS": "1", "DVC_SITE_CACHE_DIR": str(tmp_path / "site")}
    for command in ("git init -q", "dvc init -q", "dvc add -q data.bin"):
        run(command, **settings)
    run_line("dvc remote add", **settings)
    (tmp_path / "data.bin").unlink()
    shutil.rmtree(tmp_path / ".dvc/cache")
    run("dvc pull -q", **settings)
    assert (tmp_path / "data.bin").read_bytes() == LARGE_BODY


def test_ostree_pulls_a_commit(program: Program, run: Run, run_line: Run, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/file").write_text("content\n")
    for command in ("init --mode=archive", "commit --branch=main tree", "summary -u"):
        run(f"ostree --repo=made {command}")
    for file in (tmp_path / "made").rglob("*"):
        if file.is_file() and not file.name.startswith("."):
            program.put(f"ostree/{file.relative_to(tmp_path / 'made')}", file.read_bytes())
    run("ostree --repo=copy init")
    run_line("ostree remote add", OSTREE_REPO="copy")
    assert run("ostree --repo=copy cat artefacts:main /file").stdout == "content\n"


def test_debuginfod_finds_debugging_information(
    program: Program, run: Run, run_line: Run, tmp_path: Path
) -> None:
    (tmp_path / "tiny.c").write_text("int main(void) { return 0; }\n")
    run("gcc -g -Wl,--build-id=sha1 tiny.c -o tiny")
    build_id = run("readelf -n tiny").stdout.partition("Build ID: ")[2].split()[0]
    program.put(f"debuginfod/buildid/{build_id}/debuginfo", (tmp_path / "tiny").read_bytes())
    found = run_line("DEBUGINFOD_URLS", BUILD_ID=build_id, DEBUGINFOD_CACHE_PATH=str(tmp_path / "cache"))
    assert Path(found.stdout.strip()).read_bytes() == (tmp_path / "tiny").read_bytes()


# -- compiler caches --


@pytest.mark.parametrize(
    ("layout", "ids"),
    [("flat", "[0-9a-z]{30,}"), ("subdirs", "[0-9a-z]{2}/[0-9a-z]{28,}"), ("bazel", "ac/[0-9a-f]{64}")],
)
def test_ccache_shares_compiled_objects(
    program: Program, run: Run, tmp_path: Path, layout: str, ids: str
) -> None:
    (tmp_path / "tiny.c").write_text("int answer(void) { return 42; }\n")
    objects = []
    for cache in ("first", "second"):  # the caches of two machines
        settings = {
            "CCACHE_DIR": str(tmp_path / cache),
            "CCACHE_REMOTE_STORAGE": f"{program.url}ccache-{layout}|layout={layout}",
        }
        run("ccache gcc -c tiny.c -o tiny.o", **settings)
        objects.append((tmp_path / "tiny.o").read_bytes())
        (tmp_path / "tiny.o").unlink()
        printed = run("ccache --print-stats", **settings).stdout
        stats = dict(line.split("\t") for line in printed.splitlines())
        assert stats["remote_storage_error"] == "0"
        assert (int(stats["remote_storage_hit"]) > 0) == (cache == "second")
    assert objects[0] == objects[1]
    stored = program.ids(f"ccache-{layout}")
    assert stored
    assert all(re.fullmatch(ids, id) for id in stored), stored


def test_requests_of_sccache_over_webdav(program: Program) -> None:
    folders = ("webdav/1/d/e/", "webdav/1/d/", "webdav/1/", "webdav/", "")
    with program.requests() as requests:
        assert requests.status_and_body("GET", "webdav/1/d/e/1dea")[0] == 404
        for folder in folders:  # up to the first folder that exists
            assert requests.status_and_body("PROPFIND", folder, Depth="0")[0] == 404
        for folder in reversed(folders):
            assert requests.status_and_body("MKCOL", folder)[0] in (201, 405)
        assert requests.status_and_body("PUT", "webdav/1/d/e/1dea", b"object")[0] == 201
        assert requests.status_and_body("GET", "webdav/1/d/e/1dea") == (200, b"object")


# -- build tools --


def test_requests_of_a_gradle_build_cache(program: Program) -> None:
    path, kind = "gradle/f469a6102a77d2c806fb1191c0a82b26", "application/vnd.gradle.build-cache-artifact.v1"
    with program.requests() as requests:
        assert requests.status_and_body("GET", path, Accept=f"{kind}, */*")[0] == 404
        assert requests.status_and_body("PUT", path, LARGE_BODY, Content_Type=kind)[0] == 201
        assert requests.status_and_body("GET", path, Accept=f"{kind}, */*") == (200, LARGE_BODY)
        assert requests.status_and_body("PUT", path, b"of another build", Content_Type=kind)[0] == 200


def test_requests_of_a_bazel_remote_cache(program: Program) -> None:
    action, output = f"bazel/ac/{'a' * 64}", f"bazel/cas/{sha256(LARGE_BODY)}"
    with program.requests() as requests:
        assert requests.status_and_body("GET", action)[0] == 404
        assert requests.status_and_body("PUT", output, LARGE_BODY)[0] == 201
        assert requests.status_and_body("PUT", action, b"result")[0] == 201
        before = requests.status_and_body("GET", f"{output}?versions")
        assert requests.status_and_body("PUT", output, LARGE_BODY)[0] == 200
        assert requests.status_and_body("GET", f"{output}?versions") == before
        assert requests.status_and_body("GET", action) == (200, b"result")
        assert requests.status_and_body("GET", output) == (200, LARGE_BODY)


def test_requests_of_a_terraform_state(program: Program) -> None:
    """Send what Terraform sends with `update_method = "PUT"`."""
    path = "terraform/app.tfstate"
    with program.requests() as requests:
        assert requests.status_and_body("GET", path)[0] == 404  # no state yet
        for serial, status in ((1, 201), (2, 200)):
            state = json.dumps({"version": 4, "serial": serial}).encode()
            fields = {"Content_MD5": base64.b64encode(hashlib.md5(state).digest()).decode()}
            fields |= {"Content_Type": "application/json"}
            answer = requests.status_and_body("PUT", f"{path}?ID=6d1c", state, **fields)
            assert answer[0] == status
            assert requests.status_and_body("GET", path) == (200, state)
        assert requests.status_and_body("DELETE", path)[0] in (200, 204)


def test_maven_deploys_and_resolves(program: Program, run: Run, tmp_path: Path) -> None:
    """Deploy a snapshot twice, then build a project that needs it, with the plugins that Debian packages."""
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
    settings = {"MAVEN_OPTS": "-XX:TieredStopAtLevel=1"}  # a faster start
    maven = "mvn -B -q -s settings.xml -Dmaven.repo.local="
    for _ in range(2):
        run(f"{maven}m2 deploy -DaltDeploymentRepository=artefacts::{url}", **settings)
    run(f"{maven}other -f child.xml validate", **settings)
    stored = [id for id in program.ids("maven") if id.endswith(".pom")]
    assert len(stored) == 2
    assert all((program.data / "maven" / id).read_text() == project.format(base) for id in stored)
    program.wait_for("maven", *(f"PUT 201 {id}" for id in stored), f"GET 200 {stored[1]}")


# -- archives --

ARCHIVED = {
    "plain.txt": b"plain", "empty": b"", "block": b"x" * 512, "1.0/space and 'quote'.txt": b"1",
    "-dash": b"2", "ünïcode ☃ 🎈/日本語.bin": b"\0\xff", "long/" * 30 + "n" * 120: b"3", "ü" * 120: b"4",
    "large": bytes(3_000_000),
}  # fmt: skip
READ_TAR = [
    "tar --extract --file=../archive", "busybox tar x -f ../archive", "bsdtar -x -f ../archive",
    f"{sys.executable} -m tarfile -e ../archive", "7z x -ttar ../archive",
]
READ_ZIP = [
    "unzip -q ../archive", "busybox unzip -q ../archive", "bsdtar -x -f ../archive",
    f"{sys.executable} -m zipfile -e ../archive .", "7z x -tzip ../archive",
    "cat ../archive | bsdtar -x -f -",
]


@pytest.mark.parametrize(("format", "command"), [
    *(("tar", command) for command in READ_TAR), *(("zip", command) for command in READ_ZIP),
])  # fmt: skip
def test_archives_are_read(program: Program, run: Run, tmp_path: Path, format: str, command: str) -> None:
    for id, content in ARCHIVED.items():
        program.add_file(f"archived/top/{id}", content)
    run(f"curl -f -o archive {program.url}archived/top/?format={format}")
    (tmp_path / "out").mkdir()
    run(f"sh -c {shlex.quote(f'cd out && {command}')}")
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {str(path.relative_to(tmp_path / "out")): path.read_bytes() for path in files} == ARCHIVED
    if "zipfile" not in command and "busybox unzip" not in command:  # these ignore times
        assert all(abs(path.stat().st_mtime - YESTERDAY) < 2 for path in files)


# -- Debian --


def test_apt_reads_a_flat_repository(program: Program, run: Run, tmp_path: Path) -> None:
    """Give apt a root directory of its own, so that it reads and changes nothing of this machine."""
    control = (
        "Package: tiny-artefact\nVersion: 1.0\nArchitecture: all\n"
        "Maintainer: Nobody <nobody@example.org>\nDescription: tiny\n"
    )
    (tmp_path / "tiny/DEBIAN").mkdir(parents=True)
    (tmp_path / "tiny/DEBIAN/control").write_text(control)
    run("dpkg-deb --build --root-owner-group tiny tiny.deb")
    package = (tmp_path / "tiny.deb").read_bytes()
    digest = sha256(package)
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
