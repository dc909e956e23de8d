"""Check properties of all requests and of all artefacts, with any names and bytes (Hypothesis)."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import PATIENCE, Server, serving, sha256

EVERY = settings(max_examples=250, deadline=None, database=None, print_blob=True,
                 suppress_health_check=list(HealthCheck))  # fmt: skip
FINAL = re.compile(rb"HTTP/1\.[01] ([2-5][0-9]{2}) [^\r\n]+\r\n")

tokens = st.from_regex(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,12}", fullmatch=True)
values = st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=40)
methods = st.sampled_from(["GET", "HEAD", "PUT", "POST", "DELETE", "OPTIONS", "PATCH", "PROPFIND"]) | tokens
parts = st.sampled_from(["artefacts", "artefact", "app", "x", "..", ".versions", ""]) | st.text(max_size=12)
targets = st.lists(parts, max_size=5).map(lambda names: "/" + "/".join(quote(name, "") for name in names))
queries = st.sampled_from(["versions", "version=x", "restore=x", "at=2026-11-23", "format=html", "limit=1"])
known = st.sampled_from([
    "If-Match", "If-None-Match", "If-Modified-Since", "If-Unmodified-Since", "If-Range", "Range", "Accept",
    "Content-Type", "Content-Encoding", "Content-Range", "Repr-Digest", "Digest", "X-Checksum-Sha256",
    "Authorization", "Expect", "Origin", "Sec-Fetch-Site",
])  # fmt: skip
fields = st.lists(st.tuples(known | tokens, values), max_size=5)
FIXED = {"content-length", "transfer-encoding", "connection", "host"}
names = st.from_regex(r"(?!\.)[^\x00-\x1f\x7f-\x9f/\\\ufffd]{1,20}", fullmatch=True)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("data"), "--keep-versions", "1") as running:
        assert running.ask("PUT", "app/x", b"there").status == 201
        yield running


@EVERY
@given(methods, targets, st.none() | queries, fields, st.binary(max_size=300))
def test_no_request_causes_a_server_error(server: Server, method: str, target: str, query: str | None,
                                          fields: list[tuple[str, str]], body: bytes) -> None:
    target += f"?{query}" if query else ""
    lines = [f"{method} {target} HTTP/1.1", "Host: localhost", "Connection: close"]
    lines += (f"{name}: {value}" for name, value in fields if name.lower() not in FIXED)
    sent = "\r\n".join([*lines, f"Content-Length: {len(body)}", "\r\n"]).encode("latin-1") + body
    received = b""
    with socket.create_connection(("127.0.0.1", server.port), PATIENCE) as connection:
        connection.sendall(sent)
        while piece := connection.recv(1 << 16):
            received += piece
    match = FINAL.search(received)
    assert match is not None, received
    assert int(match[1]) < 500 or match[1] == b"501", received


@EVERY
@given(names, st.lists(names, min_size=1, max_size=3), st.binary(max_size=2000))
def test_pushed_bytes_are_fetched(server: Server, directory: str, segments: list[str], body: bytes) -> None:
    """Push under any valid name. 409 is allowed: an artefact and a folder may need the same name."""
    path = "/".join(quote(name, "") for name in [directory, *segments])
    pushed = server.ask("PUT", path, body)
    assert pushed.status in (200, 201, 409), pushed.body
    if pushed.status != 409:
        fetched = server.ask("GET", path)
        assert (fetched.status, fetched.body) == (200, body)
        assert fetched.fields["ETag"] == pushed.fields["ETag"] == f'"{sha256(body)}"'
        assert pushed.json["id"] == "/".join(segments)
