"""Run the code blocks of README.md as they are printed.

They run in a network and mount namespace of their own, because they use port 8080 and folders such as /opt.
There is no other network in it: pip gets its packages from a folder. Needs root, and what .ci/run installs.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from readme import block, blocks, line
from test_hostile import PROXIES

ROOT = Path(__file__).resolve().parents[1]
PYTHON = "/usr/bin/python3"  # Debian's, for which its uWSGI and mod_wsgi are made
URL = "http://127.0.0.1:8080/artefacts/"
STAMP = re.compile(r"\d{8}T\d{6}\.\d{6}Z|\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root makes namespaces")

# Enables the loopback interface, which is down in a new namespace. Hides this machine's /opt and /var/lib.
NAMESPACE = """
set -e
ip link set lo up
mount -t tmpfs tmpfs /opt
mount -t tmpfs tmpfs /var/lib
echo ready
exec sleep infinity
"""


class Machine:
    """A namespace with a copy of the program in a folder, and a shell in it."""

    def __init__(self, folder: Path, pid: int, packages: Path) -> None:
        self.folder = folder
        self._enter = ["nsenter", f"--target={pid}", "--net", "--mount", f"--wd={folder}", "--"]
        self._environment = {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": str(folder), "LC_ALL": "C.UTF-8", "USER": "root",
            "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(packages), "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        }  # fmt: skip

    def run(self, script: str, status: int = 0, **environment: str) -> str:
        """Run a script with bash and return what it wrote, its errors included."""
        command = [*self._enter, "bash", "-eo", "pipefail", "-c", script]
        done = subprocess.run(
            command, env=self._environment | environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == status, f"{script}\n{done.stdout}"
        return done.stdout

    @contextlib.contextmanager
    def serving(self, command: str, url: str = URL, name: str = "server") -> Iterator[Path]:
        """Run a server until the end of the block. Give its log. What it stored is removed then."""
        log = self.folder / f"{name}.log"
        with log.open("w") as output:
            process = subprocess.Popen(
                [*self._enter, "bash", "-c", command], env=self._environment, stdin=subprocess.DEVNULL,
                stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
        (self.folder / f"{name}.pid").write_text(str(process.pid))
        try:
            deadline = time.monotonic() + 60
            while subprocess.run([*self._enter, "curl", "-s", "-o", "/dev/null", url]).returncode:
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
            yield log
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 15)
            process.wait(60)
        assert "Traceback" not in log.read_text()
        shutil.rmtree(self.folder / "data", ignore_errors=True)


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Download what the README installs."""
    folder = tmp_path_factory.mktemp("packages")
    subprocess.run([PYTHON, "-m", "venv", folder / "venv"], check=True)
    wanted = ["--requirement", str(ROOT / "requirements.txt"), "gunicorn", "werkzeug"]
    pip = [str(folder / "venv/bin/pip"), "download", "--quiet", "--dest", str(folder / "wheels")]
    subprocess.run([*pip, *wanted], check=True, timeout=300)
    return folder / "wheels"


@pytest.fixture(scope="module")
def machine(packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    folder = tmp_path_factory.mktemp("readme")
    for above in (folder, folder.parent):
        above.chmod(0o755)
    for name in ("artefacts.py", "requirements.txt"):
        shutil.copy(ROOT / name, folder)
    command = ["unshare", "--net", "--mount", "bash", "-c", NAMESPACE]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        try:
            assert holder.stdout.readline() == "ready\n"
            machine = Machine(folder, holder.pid, packages)
            set_up, _, _ = line("requirements.txt && .venv/bin/python artefacts.py").rpartition(" && ")
            machine.run(set_up)
            yield machine
        finally:
            holder.kill()


def masked(text: str) -> str:
    return STAMP.sub("TIME", text)


def test_first_steps(machine: Machine) -> None:
    """Each command prints what stands below it, times aside; times of one version are equal."""
    steps = re.findall(r"^\$ (.*)\n((?:[^$].*\n)*)", block("$ echo one"), re.MULTILINE)
    assert len(steps) > 8
    actual: dict[str, str] = {}  # for each time in the README, the time of this run
    with machine.serving(line("--keep-versions 10")):
        for command, expected in steps:
            for printed, now in actual.items():
                command = command.replace(printed, now)
            written = machine.run(command.replace("curl ", "curl -sS "))
            if written and not written.endswith("\n"):
                written += "\n"
            rows, wanted = written.splitlines(), expected.splitlines()
            if command.startswith("find "):
                rows, wanted = sorted(map(masked, rows)), sorted(map(masked, wanted))
            assert [*map(masked, rows)] == [*map(masked, wanted)], command
            for printed_row, row in zip(wanted, rows, strict=True):
                for printed, now in zip(STAMP.findall(printed_row), STAMP.findall(row), strict=True):
                    assert printed == "TIME" or actual.setdefault(printed, now) == now, command


def test_requests(machine: Machine) -> None:
    """Preconditions, promotion, listings, archives, deleted artefacts and health."""
    machine.run("echo one > app.zip")
    with machine.serving(".venv/bin/python artefacts.py --keep-versions 10") as log:
        machine.run(f"curl -fsS -T app.zip {URL}app/1.4.0/")
        written = machine.run(block("If-None-Match: *").replace("curl ", "curl -sS "))
        machine.run("until grep -q 'GET /healthz' server.log; do sleep 0.1; done")
        answers = re.findall(r'"(\w+) /artefacts/app/app.zip HTTP/1.1" (\d+)', log.read_text())
        assert '"id": "app.zip.rc"' in written and '"type": "application/zip"' in written
        digest = written.partition('"sha256": "')[2][:64]
        assert f"}}\n{digest}  app.zip\n{{" in written  # the folder 1.4.0
        assert written.endswith('"artefacts": []}\n{"status": "ok"}\n')
        assert (machine.folder / "app.zip.rc").read_text() == "one\n"
        with zipfile.ZipFile(machine.folder / "app-all.zip") as archive:
            assert archive.namelist() == ["1.4.0/app.zip", "app.zip", "app.zip.rc"]
        machine.run(f"curl -fsS -X DELETE {URL}app/app.zip")
        assert '"id": "app.zip"' in machine.run(f"URL={URL}app/app.zip; {line('?deleted')}")
    assert answers == [("PUT", "201"), ("HEAD", "200"), ("PUT", "200"), ("PUT", "412"), ("PUT", "200")]


def test_sweep(machine: Machine) -> None:
    machine.run("mkdir -p data/app; touch data/app/new; touch -d '40 days ago' data/app/old")
    command = line("--sweep --dry-run")
    assert masked(machine.run(command)) == masked(machine.run(command)) == "app/old TIME\n"
    assert masked(machine.run(command.replace(" --dry-run", ""))) == "app/old TIME\n"
    assert machine.run("ls data/app; rm -r data") == "new\n"


def test_reports(machine: Machine) -> None:
    """Show a report under the second host name, and redirect a browser to it."""
    serve, push = block("--pages-host localhost").splitlines()
    machine.run("mkdir -p report/static; echo '<p>report' > report/index.html; echo 1 > report/static/x.js")
    (machine.folder / "pages.toml").write_text('[[directory]]\nname = "reports"\npages = true\n')
    with machine.serving(serve):
        machine.run(push)
        second = "http://localhost:8080/artefacts/reports/main/"
        assert machine.run(f"curl -fsS {second}") == "<p>report\n"
        assert machine.run(f"curl -fsS {second}static/x.js") == "1\n"
        assert "sandbox" not in machine.run(f"curl -fsSI {second}")
        assert "sandbox allow-scripts" in machine.run(f"curl -fsSI {URL}reports/main/")
        browser = "curl -fsSL -w '%{url_effective}' -H 'Upgrade-Insecure-Requests: 1'"
        seen = machine.run(f"{browser} {URL}reports/main")
        assert seen == f"<p>report\n{second}"
        assert '"status": 403' in machine.run("curl -sS http://localhost:8080/artefacts/other/")


def test_tokens_and_rules(machine: Machine) -> None:
    commands = block("--new-token ci").splitlines()
    token = machine.run(line("--new-token ci")).removesuffix("\n")
    lines = (machine.folder / "artefacts.toml").read_text()
    digest = re.findall('^sha256 = "(.*)"', lines, re.MULTILINE)[0]
    rules = re.sub('"[0-9a-f]{64}"', f'"{digest}"', block("[anonymous]"))
    (machine.folder / "artefacts.toml").write_text(rules)
    with machine.serving(line("--host 0.0.0.0 --config")) as log:
        for command in commands[2:]:
            answer = machine.run(command.replace("HOST", "127.0.0.1"), TOKEN=token)
            assert '"id": "app.zip"' in answer
        assert '"status": 401' in machine.run("curl -T app.zip http://127.0.0.1:8080/artefacts/nightly/")
        assert '"status": 403' in machine.run(f"curl -T app.zip -u ci:$TOKEN {URL}other/", TOKEN=token)
        assert " - ci [" in log.read_text()
        rules = rules.replace('read = ["public"]', 'read = ["nightly"]')
        (machine.folder / "artefacts.toml").write_text(rules)
        fetch = f"curl -fsS -o fetched {URL}nightly/app.zip"
        machine.run(fetch, status=22)
        machine.run(f"kill -HUP $(cat server.pid); until {fetch}; do sleep 0.1; done")
        (machine.folder / "artefacts.toml").write_text("mistake")
        machine.run("kill -HUP $(cat server.pid); until grep 'old rules stay' server.log; do sleep 0.1; done")
        machine.run(fetch)


def make_wheel(path: Path) -> None:
    """Write a wheel of one module, `tiny`."""
    files = {
        "tiny.py": "ANSWER = 42\n",
        "tiny-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n",
        "tiny-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "tiny-1.0.dist-info/RECORD": "tiny.py,,\n",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)


def test_tools(machine: Machine) -> None:
    """Run the clients that need no set-up. test_clients.py runs the others, except Bazel and Terraform."""
    commands = block("A=http://").splitlines()
    folder = machine.folder / "tools"
    folder.mkdir()
    (folder / "hello.c").write_text("int main(void) { return 0; }\n")
    (folder / "app.zip").write_bytes(os.urandom(3_000_000))
    make_wheel(folder / "tiny-1.0-py3-none-any.whl")
    with machine.serving(".venv/bin/python artefacts.py") as log:
        for command in commands[1:]:
            downloads = command.startswith(("wget", "aria2c", "rclone", "lftp"))
            if not downloads and (not command.startswith(("curl", "CCACHE")) or "npm" in command):
                continue
            where = folder / command.split()[0] if downloads else folder
            where.mkdir(exist_ok=True)
            machine.run(f"cd {where}; {commands[0]}; {command}")
        for copy in ("wget/app.zip", "wget/nightly/app.zip", "rclone/copy/app.zip", "lftp/copy/app.zip",
                     "aria2c/app.zip"):
            assert (folder / copy).read_bytes() == (folder / "app.zip").read_bytes()
        pip = line("pip install --index-url").replace("pip", ".venv/bin/pip", 1)
        machine.run(f"{commands[0]}; {pip}", PIP_NO_INDEX="0", PIP_FIND_LINKS="")
        assert machine.run(".venv/bin/python -c 'import tiny; print(tiny.ANSWER)'") == "42\n"
        assert "/artefacts/ccache/" in log.read_text()


PATHS = {  # of the README's proxies: what it says for a server under a path
    "nginx": ("location / {", "location /builds/ {"),
    "caddy": ("reverse_proxy 127", "reverse_proxy /builds/* 127"),
    "apache": ("ProxyPass / http://127.0.0.1:8080/ ", "ProxyPass /builds/ http://127.0.0.1:8080/builds/ "),
}


@pytest.mark.parametrize("name", PATHS)
def test_under_a_path_of_a_proxy(machine: Machine, name: str) -> None:
    text = " ".join((ROOT / "README.md").read_text().split())
    start, frame, command = PROXIES[name]
    old, new = PATHS[name]
    assert new.strip(" {") in text
    server = block(start).replace("/etc/ssl/artefacts.example", str(machine.folder / "tls")).replace(old, new)
    folder = machine.folder / name
    folder.mkdir()
    folder.chmod(0o755)
    (folder / "config").write_text(frame.format(folder=folder, port=443, server=server))
    machine.run(
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=artefacts.example "
        "-addext subjectAltName=DNS:artefacts.example -keyout tls.key -out tls.pem"
    )
    options = "--allow-host artefacts.example --trusted-proxy 127.0.0.1 --prefix /builds"
    assert all(f"`{option}`" in text for option in re.findall(r"--\S+ \S+", options))
    curl = "curl -fsS --cacert tls.pem --resolve artefacts.example:443:127.0.0.1 --interface 127.0.0.9"
    url = "https://artefacts.example/builds/artefacts/app/"
    with (
        machine.serving(f".venv/bin/python artefacts.py {options}"),
        machine.serving(f"exec {command.format(folder=folder)}", name="proxy"),
    ):
        machine.run("echo one > one")
        options = "--retry 60 --retry-connrefused -H 'Origin: https://artefacts.example'"
        pushed = machine.run(f"{curl} {options} -T one {url}")
        assert '"href": "/builds/artefacts/app/one"' in pushed
        assert machine.run(f"{curl} {url}one") == "one\n"
        machine.run("until grep -q '^127.0.0.9 .*GET /builds/' server.log; do sleep 0.1; done")


@pytest.mark.parametrize("command", [
    line("gunicorn --bind"), line("waitress-serve --listen 127.0.0.1:8080 --max"), line("uwsgi --plugins"),
])  # fmt: skip
def test_other_servers(machine: Machine, command: str) -> None:
    with machine.serving(command):
        answer = machine.run(f"echo one > one; curl -fsS -T one {URL}app/; curl -fsS {URL}app/one")
        assert answer.endswith(("}one\n", "}\none\n"))
        chunked = machine.run(f"echo two | curl -sS -T - {URL}app/two")
        assert ('"id": "two"' in chunked) == ("uwsgi" not in command)
        if "uwsgi" in command:
            assert '"status": 400' in chunked and "Content-Length" in chunked


def test_beside_another_application(machine: Machine) -> None:
    machine.run(".venv/bin/pip install -q werkzeug")
    text = (ROOT / "README.md").read_text().replace("\n", " ")
    application = 'DispatcherMiddleware(other_application, {"/builds": artefacts.create_app("data")})'
    assert f"`{application}` of `werkzeug.middleware.dispatcher`" in text
    (machine.folder / "site_app.py").write_text(
        "import artefacts\nfrom werkzeug.middleware.dispatcher import DispatcherMiddleware\n"
        "from werkzeug.wrappers import Response\nother_application = Response('the front page')\n"
        f"application = {application}\n"
    )
    serve = ".venv/bin/waitress-serve --listen 127.0.0.1:8080 site_app:application"
    with machine.serving(serve, "http://127.0.0.1:8080/"):
        assert machine.run("curl -fsS http://127.0.0.1:8080/") == "the front page"
        answer = machine.run("echo one > one; curl -fsS -T one http://127.0.0.1:8080/builds/artefacts/app/")
        assert '"href": "/builds/artefacts/app/one"' in answer


APACHE = """
ServerRoot {folder}
PidFile {folder}/apache.pid
ServerName localhost
Listen 127.0.0.1:8080
User www-data
Group www-data
ErrorLog /dev/stderr
WSGISocketPrefix /opt/artefacts/
LoadModule mpm_event_module /usr/lib/apache2/modules/mod_mpm_event.so
LoadModule authz_core_module /usr/lib/apache2/modules/mod_authz_core.so
LoadModule wsgi_module /usr/lib/apache2/modules/mod_wsgi.so
"""


@pytest.fixture(scope="module")
def in_opt(machine: Machine) -> Machine:
    """Install the program as the README does for a service."""
    machine.run(block("install -d /opt/artefacts"))
    return machine


def test_mod_wsgi(in_opt: Machine) -> None:
    machine, text = in_opt, (ROOT / "README.md").read_text().replace("\n", " ")
    lines = "import artefacts", 'application = artefacts.create_app("/var/lib/artefacts")'
    assert all(f"`{row}`" in text for row in lines)
    machine.run("printf '%s\\n' \"$A\" \"$B\" > /opt/artefacts/artefacts.wsgi", A=lines[0], B=lines[1])
    machine.run("install -d -o www-data /var/lib/artefacts")
    config = machine.folder / "apache.conf"
    config.write_text(APACHE.format(folder=machine.folder) + block("WSGIDaemonProcess"))
    url = "http://127.0.0.1:8080/builds/artefacts/"
    with machine.serving(f"exec apache2 -f {config} -DFOREGROUND", url):
        answer = machine.run(f"echo one > one; curl -fsS -T one {url}app/; curl -fsS {url}app/one")
        assert '"href": "/builds/artefacts/app/one"' in answer and answer.endswith("one\n")
        assert '"size": 4' in machine.run(f"echo two | curl -fsS -T - {url}app/two")  # chunked
    machine.run("rm -r /var/lib/artefacts")


def test_systemd_accepts_the_unit(in_opt: Machine) -> None:
    unit = in_opt.folder / "artefacts.service"
    unit.write_text(block("[Service]"))
    assert in_opt.run(f"systemd-analyze verify --man=no {unit}") == ""


def test_backup_and_restore(machine: Machine) -> None:
    """A copy of a copy still has the versions, their times, and the types that clients chose."""
    back_up, copy = block("cp -al"), block("NEWHOST")
    # The other host is this one: rsync calls this instead of ssh.
    (machine.folder / "remote").write_text('#!/bin/bash\nshift\ncd "${0%/*}/elsewhere" && exec "$@"\n')
    (machine.folder / "remote").chmod(0o755)
    with machine.serving(".venv/bin/python artefacts.py --keep-versions 10"):
        for text in ("one", "two"):
            machine.run(f"echo {text} | curl -fsS -T - -H 'Content-Type: x/chosen' {URL}app/1.0/notes")
        before = machine.run(f"curl -fsS '{URL}app/1.0/notes?versions'")
        assert "2 whole" in machine.run(back_up)
        machine.run(f"curl -fsS -X DELETE '{URL}app'")
        machine.run("mkdir elsewhere elsewhere/artefacts")
        restore, move = copy.splitlines()
        machine.run(restore)
        machine.run(move, RSYNC_RSH=str(machine.folder / "remote"))
        assert machine.run(f"curl -fsS '{URL}app/1.0/notes?versions'") == before
    for folder in ("restored", "elsewhere/artefacts/data"):
        with machine.serving(f".venv/bin/python artefacts.py --data {folder}"):
            assert machine.run(f"curl -fsS '{URL}app/1.0/notes?versions'") == before


# Blocks that are not run here, each by the text that it begins with, and where they are run.
ELSEWHERE = {
    "python3 -m venv .venv": ".ci/bare",
    "usage:": "test_artefacts.py",
    "server {": "test_hostile.py",
    "artefacts.example {": "test_hostile.py",
    "<VirtualHost": "test_hostile.py",
    "buildCache": "test_clients.py: the requests of Gradle and Terraform; Maven; apt",
    "FROM ": ".ci/bare",
    "services:": "by hand",
}
HERE = (
    ".venv/bin/python artefacts.py --keep", "$ echo one", "URL=", ".venv/bin/python artefacts.py --new-token",
    "[anonymous]", "A=http", "mkdir snapshot", "rsync -aHX backup/", "install -d /opt",
    "[Service]", ".venv/bin/pip install -q gunicorn", "WSGIDaemonProcess",
    ".venv/bin/python artefacts.py --keep-days", ".venv/bin/python artefacts.py --config pages",
)  # fmt: skip


def test_no_block_is_forgotten() -> None:
    for text in blocks():
        assert text.startswith((*ELSEWHERE, *HERE)), text
