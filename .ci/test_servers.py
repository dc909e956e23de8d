"""Run the application in common WSGI servers, at the root and mounted under a prefix."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support import sha256, until

MODULE = Path(__file__).resolve().parents[1] / "artefacts.py"

# The application is created before gunicorn and uWSGI fork, so that it must also survive a fork.
APPLICATION = """
import sys
sys.path.insert(0, {folder!r})
import artefacts

inner = artefacts.create_app({data!r})

class Chunks:
    # uWSGI hands over a chunked body by its own interface; the others have a stream.
    rest = b""
    ended = False
    def read(self, size):
        import uwsgi
        while not self.rest and not self.ended:
            self.rest = uwsgi.chunked_read()
            self.ended = not self.rest
        piece, self.rest = self.rest[:size], self.rest[size:]
        return piece

def application(environ, start_response):
    if {manage_chunks} and environ.get("HTTP_TRANSFER_ENCODING"):
        environ["wsgi.input"] = Chunks()
        environ["wsgi.input_terminated"] = True
    if environ["PATH_INFO"].startswith("/mounted here/"):
        environ["SCRIPT_NAME"] = environ.get("SCRIPT_NAME", "") + "/mounted here"
        environ["PATH_INFO"] = environ["PATH_INFO"].removeprefix("/mounted here")
    return inner(environ, start_response)

def serve(kind, port):
    if kind == "waitress":
        import waitress
        waitress.create_server(application, host="127.0.0.1", port=port).run()
    elif kind == "cheroot":
        from cheroot.wsgi import Server
        Server(("127.0.0.1", port), application).start()
    else:
        from wsgiref.simple_server import make_server
        from wsgiref.validate import validator
        app = validator(application) if kind == "validator" else application
        make_server("127.0.0.1", port, app).serve_forever()

if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
"""


@dataclass(frozen=True)
class Kind:
    name: str
    command: str  # with {python}, {bin} and {port}; runs in a folder with application.py
    chunked: bool = True  # whether it hands chunked bodies to the application
    manage_chunks: bool = False  # whether it uses its own interface for that
    blind: tuple[str, ...] = ()  # the bodies of BROKEN that it hands over as complete ones


GUNICORN = (
    "{python} -m gunicorn --bind 127.0.0.1:{port} --workers 2 --preload --no-control-socket "
    "application:application"
)
UWSGI = (
    "{bin}/uwsgi --wsgi-file application.py --master --die-on-term --need-app --enable-threads --processes 2 "
    "--threads 2 --disable-logging"
)
KINDS = [
    Kind("gunicorn-sync", GUNICORN),
    Kind("gunicorn-gthread", GUNICORN + " --worker-class gthread --threads 4"),
    Kind("uwsgi", UWSGI + " --http-socket 127.0.0.1:{port}", manage_chunks=True, blind=("no chunk",)),
    Kind(
        "uwsgi-router",
        UWSGI + " --http 127.0.0.1:{port} --http-chunked-input",
        manage_chunks=True,
        blind=("no chunk",),
    ),
    Kind("uwsgi-plain", UWSGI + " --http-socket 127.0.0.1:{port}", chunked=False),
    Kind(
        "granian",
        "{bin}/granian --interface wsgi --host 127.0.0.1 --port {port} --no-ws application:application",
        # granian 2.8 just ends the stream. Only a digest shows that a part is missing.
        blind=("chunk", "between chunks", "no chunk"),
    ),
    Kind("cheroot", "{python} application.py cheroot {port}"),
    Kind("waitress", "{python} application.py waitress {port}"),
    Kind("wsgiref", "{python} application.py wsgiref {port}", chunked=False),
    Kind("wsgiref-validator", "{python} application.py validator {port}", chunked=False),
]


@dataclass
class Server:
    kind: Kind
    port: int
    base: str  # the prefix of the application in a URL
    data: Path

    def request(
        self, method: str, path: str, body: bytes | Iterable[bytes] | None = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        """Return the status, the header fields by lower-case name, and the body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        with contextlib.closing(connection):
            fields = {name.replace("_", "-"): value for name, value in headers.items()}
            chunked = "Transfer-Encoding" in fields
            connection.request(method, self.base + path, body, fields, encode_chunked=chunked)
            answer = connection.getresponse()
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.name)
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    kind: Kind = request.param
    folder = tmp_path_factory.mktemp(kind.name)
    data = folder / "data"
    (folder / "application.py").write_text(
        APPLICATION.format(folder=str(MODULE.parent), data=str(data), manage_chunks=kind.manage_chunks)
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    python = Path(sys.executable)
    command = kind.command.format(python=python, bin=python.parent, port=port).split()
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env=environment)
    try:
        server, deadline, up = Server(kind, port, "", data), time.monotonic() + 20, False
        while not up:
            assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
            with contextlib.suppress(OSError, http.client.HTTPException):
                up = server.request("GET", "/artefacts/")[0] == 200
            time.sleep(0.02)
        yield server
        assert process.poll() is None, (folder / "log").read_text()
    finally:
        process.terminate()
        try:
            process.wait(20)
        finally:
            process.kill()
            process.wait()
    assert "Traceback" not in (folder / "log").read_text()


@pytest.fixture(params=["", "/mounted%20here"], ids=["root", "mounted"])
def server(running: Server, request: pytest.FixtureRequest) -> Server:
    return Server(running.kind, running.port, request.param, running.data)


def send_all(server: Server, request: bytes) -> bytes:
    """Send the request and close the sending side. Return what arrives before the server closes."""
    received = b""
    connection = socket.create_connection(("127.0.0.1", server.port), 20)
    with connection as client, contextlib.suppress(ConnectionError):
        client.sendall(request)
        with contextlib.suppress(OSError):  # already disconnected
            client.shutdown(socket.SHUT_WR)
        while piece := client.recv(65536):
            received += piece
    return received


def is_problem(answer: tuple[int, dict[str, str], bytes], status: int) -> bool:
    assert (answer[0], answer[1]["content-type"]) == (status, "application/problem+json"), answer
    return bool(json.loads(answer[2])["status"] == status)


def test_push_and_fetch(server: Server) -> None:
    path = f"/artefacts/push{len(server.base)}/1.4.0/ünï.txt".replace("ünï", "%C3%BCn%C3%AF")
    status, headers, body = server.request("PUT", path, b"hello")
    stored: dict[str, Any] = json.loads(body)
    assert (status, headers["location"], stored["href"]) == (201, server.base + path, server.base + path)
    assert (stored["id"], stored["size"]) == ("1.4.0/ünï.txt", 5)
    etag = f'"{sha256(b"hello")}"'
    assert headers["etag"] == etag

    assert server.request("PUT", path, b"hello")[0] == 200
    status, headers, body = server.request("GET", path)
    assert (status, headers["etag"], headers["content-length"], body) == (200, etag, "5", b"hello")
    assert server.request("PUT", path, b"other", If_None_Match="*")[0] == 412
    assert server.request("POST", path, b"other")[0] == 409
    assert server.request("PUT", path, b"", If_Match=etag)[0] == 200
    assert server.request("GET", path)[2] == b""
    assert server.request("PUT", path)[0] == 200


def test_read(server: Server) -> None:
    path = "/artefacts/read/x.bin"
    body = os.urandom(300_000)
    etag = server.request("PUT", path, body)[1]["etag"]
    status, headers, part = server.request("GET", path, Range="bytes=100000-299998")
    assert (status, headers["content-range"]) == (206, "bytes 100000-299998/300000")
    assert part == body[100_000:299_999]
    status, headers, part = server.request("GET", path, Range="bytes=300000-")
    assert (status, headers["content-range"]) == (416, "bytes */300000")
    status, headers, empty = server.request("GET", path, If_None_Match=etag)
    assert (status, headers["etag"], empty) == (304, etag, b"")
    status, headers, empty = server.request("HEAD", path)
    assert (status, headers["content-length"], headers["etag"], empty) == (200, "300000", etag, b"")
    listed = json.loads(server.request("GET", "/artefacts/read")[2])["artefacts"]
    assert [(artefact["id"], artefact["href"]) for artefact in listed] == [("x.bin", server.base + path)]
    assert server.request("GET", "/")[1]["location"].endswith(server.base + "/artefacts/")


def test_delete_and_errors(server: Server) -> None:
    path = "/artefacts/errors/x"
    assert server.request("PUT", path, b"1")[0] in (200, 201)
    assert server.request("DELETE", path)[0] == 204
    assert is_problem(server.request("GET", path), 404)
    assert is_problem(server.request("DELETE", path), 404)
    assert is_problem(server.request("PUT", "/artefacts/errors/.hidden", b"1"), 400)
    assert is_problem(server.request("PUT", path, b"1", Content_Range="bytes 0-0/2"), 400)
    assert is_problem(server.request("PUT", path, b"1", X_Checksum_Sha256="0" * 64), 400)
    assert is_problem(server.request("PATCH", path, b"1"), 405)
    status, _, empty = server.request("HEAD", path)
    assert (status, empty) == (404, b"")


def test_large_artefact(server: Server) -> None:
    path, body = "/artefacts/large/x", os.urandom(20_000_000)
    assert server.request("PUT", path, body)[0] in (200, 201)
    assert server.request("GET", path)[2] == body
    assert os.listdir(server.data / ".incoming") == []


def test_chunked_body(server: Server) -> None:
    """Store the body if the server streams it. Otherwise the refusal must say what to do."""
    path = f"/artefacts/chunked/x{len(server.base)}"
    body = os.urandom(3_000_000)
    pieces = [body[start : start + 70_000] for start in range(0, len(body), 70_000)]
    if server.kind.chunked:
        assert server.request("PUT", path, pieces, Transfer_Encoding="chunked")[0] == 201
        assert server.request("GET", path)[2] == body
        assert server.request("PUT", path, iter([]), Transfer_Encoding="chunked")[0] == 200
        assert server.request("GET", path)[2] == b""
        return
    # Use one send, because these servers close the connection without reading the rest of the request.
    header = f"PUT {server.base}{path} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    received = send_all(server, header.encode() + b"5\r\nsmall\r\n0\r\n\r\n")
    assert received.split()[1] == b"400"
    assert b"application/problem+json" in received
    assert b"Send a Content-Length" in received
    assert server.request("GET", path)[0] == 404


BROKEN = {
    "length": ("Content-Length: 600000", bytes(500_000)),
    "chunk": ("Transfer-Encoding: chunked", b"927c0\r\n" + bytes(500_000)),
    "between chunks": ("Transfer-Encoding: chunked", b"3\r\nabc\r\n"),
    "no chunk": ("Transfer-Encoding: chunked", b"xyz\r\nabc\r\n0\r\n\r\n"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_truncated_body_is_not_stored(server: Server, broken: str) -> None:
    if broken in server.kind.blind:
        pytest.skip("this server hides the truncation from the application")
    path = "/artefacts/broken/x"
    announced, body = BROKEN[broken]
    header = f"PUT {server.base}{path} HTTP/1.1\r\nHost: localhost\r\n{announced}\r\n\r\n"
    received = send_all(server, header.encode() + body)
    assert not received or received.split()[1].startswith(b"4"), received
    assert server.request("GET", path)[0] == 404
    until(lambda: not os.listdir(server.data / ".incoming"), 10)


@pytest.mark.parametrize("broken", BROKEN)
def test_truncated_form_stores_only_whole_files(server: Server, broken: str) -> None:
    directory, announced = f"/artefacts/form{len(broken)}", BROKEN[broken][0]
    part = b'--X\r\nContent-Disposition: form-data; name="f"; filename="%s"\r\n\r\n%s\r\n'
    form = part % (b"whole", bytes(1000)) + part % (b"half", bytes(9000))
    if "chunked" in announced:
        form = b"%x\r\n%b\r\n" % (len(form), form) + (b"xyz\r\n\r\n" if broken == "no chunk" else b"")
    fields = f"Host: localhost\r\n{announced}\r\nContent-Type: multipart/form-data; boundary=X"
    header = f"POST {server.base}{directory} HTTP/1.1\r\n{fields}\r\n\r\n"
    received = send_all(server, header.encode() + form)
    assert not received or received.split()[1].startswith(b"4"), received
    assert server.request("GET", f"{directory}/half")[0] == 404
