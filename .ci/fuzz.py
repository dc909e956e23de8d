"""Send random bytes and random requests to a running server. Not part of CI:

    PYTHONPATH=. python .ci/fuzz.py [seconds] [seed]

Each client sends valid, nearly valid and invalid requests over raw sockets, in pieces and pipelined, and
truncates some of them. The server must not answer with a 500, must answer each complete request, and must not
grow in memory or descriptors. Prints the counts. Exits with 1 if the server failed.
"""

from __future__ import annotations

import random
import re
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from urllib.parse import quote

from support import Server, serving

CLIENTS = 4
GROWTH = 16 * 1024  # KiB by which memory may grow once all caches are warm
WAIT = 60  # seconds for the response to a complete request; longer is a hang
STATUS = re.compile(rb"HTTP/1\.[01] ([0-9]{3}) [^\r\n]*\r\n")

METHODS = ["GET", "HEAD", "PUT", "POST", "DELETE"]
OTHERS = ["OPTIONS", "PATCH", "TRACE", "CONNECT", "PROPFIND", "MKCOL", "get", "X-Y"]
NAMES = [
    "a", "b", "x.txt", "a.tar.gz", "é", "%ff", "%00", "..", ".", "", ".versions", ".incoming", "a%2fb",
    "%2e%2e", "\\", "a b", "%20", "n" * 255, "n" * 256, "ü" * 128, "+", ";", "*", "%", "%zz", "&",
    "=", "'", '"', "<script>", "%ef%bf%bd",
]
STARTS = ["/artefacts/", "/artefacts/", "/artefact/", "/", "", "//", "http://localhost/artefacts/"]
VERSIONS = ["20261123T014455.123456Z", "20260101T000000.000000Z", "99999999T999999.999999Z", "x", "", "../a"]
QUERIES = [
    "versions", "versions=1", "restore={v}", "version={v}", "at={v}", "version={v}&versions", "at=2026-11-23",
    "at=2026-11-23T00:00:00Z", "at=9999-12-31T23:59:59.999999Z", "at=0001-01-01T00:00:00%2b23:59",
    "format=tar", "format=sha256sums", "format=json", "format=html", "format=", "limit=1", "limit=0",
    "limit=-1", "limit=99999999999999999999", "prefix=a", "prefix=%ff", "after=a",
    "after=%00", "a&b=c&&=", "%", "?", "limit=1&limit=2",
]
TAGS = [
    '"a"', '"' + "0" * 64 + '"', "*", 'W/"a"', '"a", "b"', "", '"', "a", ",", '"\xff"', "*, *", '"a" ' * 100,
]
DATES = [
    "Sun, 06 Nov 1994 08:49:37 GMT", "Sunday, 06-Nov-94 08:49:37 GMT", "Thu, 01 Jan 99999 00:00:00 GMT",
    "0", "", "now",
]
FIELDS: dict[str, list[str]] = {
    "If-Match": TAGS, "If-None-Match": TAGS, "If-Range": [*TAGS, *DATES],
    "If-Modified-Since": DATES, "If-Unmodified-Since": DATES,
    "Range": [
        "bytes=0-0", "bytes=-1", "bytes=0-", "bytes=5-1", "bytes=0-0,2-3", "lines=1-2", "bytes=", "bytes=-0",
        "bytes=99999999999999999999-", "bytes = 0-1", "bytes=a-b", "BYTES=0-1", "bytes=0-" + "9" * 5000,
    ],
    "Content-Range": ["bytes 0-1/2", "x"],
    "Content-Type": [
        "text/plain", "multipart/form-data; boundary=b", "multipart/form-data",
        "multipart/form-data; boundary=", "application/x-www-form-urlencoded", "a", "",
        "text/" + "x" * 300, "text/plain; charset=\xff", "/",
    ],
    "Content-Encoding": ["gzip", "identity", "", "br, gzip"],
    "Accept": [
        "*/*", "text/html", "text/plain", "application/json;q=0", "x", "", ";", "text/html;q=nan",
        "a/b;q=1" * 200,
    ],
    "Repr-Digest": [
        "sha-256=:AAAA:", "sha-256=:" + "A" * 43 + "=:", "sha-512=:AA==:", "x", "", "sha-256=::",
        "sha-256=a, sha-256=b",
    ],
    "Digest": ["SHA-256=", "SHA-256=AAAA", "MD5=AA=="],
    "X-Checksum-Sha256": ["0" * 64, "", "x", "F" * 64],
    "Authorization": ["Basic !!", "Basic Og==", "Bearer x", "x", "", "Basic /w=="],
    "Origin": ["null", "http://example.com", "http://localhost", ""],
    "Sec-Fetch-Site": ["cross-site", "same-origin", "", "x"],
    "Host": ["localhost", "127.0.0.1:1", "example.com", "", "[::1]", "a b", "\xff", "localhost:99999999"],
    "Expect": ["100-continue", "x", ""], "Connection": ["close", "keep-alive", "x", "upgrade"],
    "Upgrade": ["h2c", "websocket"], "X-Forwarded-For": ["1.2.3.4", "\xff"], "Cookie": ["a=b; " * 500],
    "A" * 5000: ["b"],
}
FRAMING: dict[str, list[str]] = {  # with these, the end of the request is unclear
    "Transfer-Encoding": ["chunked", "gzip, chunked", "identity", "chunked, chunked", "x", ""],
    "Content-Length": ["0", "1", "-1", "+1", "1, 1", "x", "", "99999999999999999999", "1 "],
    "a b": ["c"], "": ["x"],
}
FORM = (
    b'--b\r\nContent-Disposition: form-data; name="file"; filename="%s"\r\n'
    b"Content-Type: text/plain\r\n\r\n%s\r\n--b--\r\n"
)


class Sender:
    """A client that sends random requests and counts the responses."""

    def __init__(self, port: int, chance: random.Random) -> None:
        self.port, self.chance = port, chance
        self.statuses: Counter[str] = Counter()
        self.failures: list[str] = []

    def path(self) -> str:
        chance = self.chance
        usual, depth = chance.random() < 0.7, chance.choice([0, 1, 2, 2, 2, 2, 2, 3, 4])
        names = (chance.choice("abc" if usual or chance.random() < 0.5 else NAMES) for _ in range(depth))
        path = (STARTS[0] if usual else chance.choice(STARTS)) + "/".join(names)
        if chance.random() < 0.1:
            path += quote(chance.randbytes(9))
        if chance.random() < 0.4:
            path += "?" + chance.choice(QUERIES).format(v=chance.choice(VERSIONS))
        return path

    def body(self) -> bytes:
        chance = self.chance
        content = chance.randbytes(chance.choice([0, 1, 10, 1000, 300_000]))
        kind = chance.random()
        if kind < 0.2:
            return FORM % (chance.choice(NAMES).encode(), content)
        return FORM[: chance.randint(0, len(FORM))] if kind < 0.25 else content

    def request(self) -> tuple[bytes, bool]:
        """Return the bytes, and whether they are one complete request, which must get a response."""
        chance = self.chance
        method = chance.choice(METHODS if chance.random() < 0.8 else OTHERS)
        fields = [("Host", "localhost")]
        body = self.body() if method in ("PUT", "POST") or chance.random() < 0.1 else b""
        if body and chance.random() < 0.3:
            fields.append(("Transfer-Encoding", "chunked"))
            at = chance.randint(0, len(body))
            pieces = (b"%x\r\n%b\r\n" % (len(piece), piece) for piece in (body[:at], body[at:]) if piece)
            body = b"".join([*pieces, b"0\r\n\r\n"])
        elif body or method in ("PUT", "POST"):
            fields.append(("Content-Length", str(len(body))))
        if chance.random() < 0.2:
            fields.append(("Content-Type", "multipart/form-data; boundary=b"))
        more = chance.sample(sorted(FIELDS), chance.choice([0, 0, 1, 1, 2, 3]))
        fields += [(name, chance.choice(FIELDS[name])) for name in more]
        whole = method != "CONNECT"
        if chance.random() < 0.1:
            name, whole = chance.choice(sorted(FRAMING)), False
            fields.append((name, chance.choice(FRAMING[name])))
        head = f"{method} {self.path()} HTTP/{chance.choice(['1.1', '1.1', '1.1', '1.0'])}\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in fields) + "\r\n"
        sent = bytearray(head.encode() if chance.random() < 0.9 else head.encode("latin-1", "replace")) + body
        mangled = chance.random()
        if mangled < 0.05:
            del sent[chance.randint(0, len(sent)) :]
        elif mangled < 0.1:
            sent[chance.randrange(len(sent))] = chance.randrange(256)
        elif mangled < 0.12:
            sent = bytearray(chance.randbytes(chance.randint(1, 5000)))
        return bytes(sent), whole and mangled >= 0.12

    def converse(self) -> None:
        """Open a connection, send one or several requests, and check the responses."""
        chance = self.chance
        requests = [self.request() for _ in range(chance.choice([1, 1, 1, 2, 5]))]
        sent = b"".join(request for request, _ in requests)
        expected = requests[0][1]  # the requests after the first may break the framing
        received, began = b"", time.monotonic()
        with socket.create_connection(("127.0.0.1", self.port), WAIT) as connection:
            try:
                at = chance.choice([0, chance.randint(0, len(sent))])
                connection.sendall(sent[:at])
                connection.sendall(sent[at:])
                if chance.random() < 0.1:
                    self.statuses["not awaited"] += 1
                    return
                if not expected:
                    connection.shutdown(socket.SHUT_WR)
                while piece := connection.recv(1 << 20):
                    if expected and statuses_in(received + piece):
                        break
                    received += piece
                received += piece
            except TimeoutError:
                self.failures.append(f"no end after {time.monotonic() - began:.0f} s: {sent[:300]!r}")
            except (ConnectionError, OSError):  # the server has refused and closed
                self.statuses["reset"] += 1
                expected = False
        found = statuses_in(received)
        self.statuses.update(found or ["none"])
        if expected and not found:
            self.failures.append(f"no answer: {sent[:500]!r}")
        for status in found:
            if status[0] == "5" and status not in ("501", "505", "507"):
                self.failures.append(f"{status}: {sent[:500]!r} -> {received[:300]!r}")


def statuses_in(received: bytes) -> list[str]:
    """Return the final statuses in received bytes."""
    return [status.decode() for status in STATUS.findall(received) if not status.startswith(b"1")]


def size_of(server: Server) -> tuple[int, int]:
    """Return the resident memory in KiB and the number of open files, sockets aside."""
    return server.memory("VmRSS") // 1024, server.open_files().total()


def main(seconds: int, seed: int) -> int:
    options = ("--keep-versions", "3")
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder), *options, tracebacks=True) as server:
        senders = [Sender(server.port, random.Random(f"{seed} {number}")) for number in range(CLIENTS)]
        end = time.monotonic() + seconds

        def work(sender: Sender) -> None:
            while time.monotonic() < end and len(sender.failures) < 20:
                sender.converse()

        threads = [threading.Thread(target=work, args=(sender,)) for sender in senders]
        for thread in threads:
            thread.start()
        samples = []
        for thread in threads:
            while thread.is_alive():
                samples.append(size_of(server))
                thread.join(seconds / 20)
        final = server.ask("PUT", "afterwards/x", b"x").status
        samples.append(size_of(server))
        log = server.log()
    statuses = sum((sender.statuses for sender in senders), Counter[str]())
    failures = [failure for sender in senders for failure in sender.failures]
    growth = samples[-1][0] - samples[len(samples) // 4][0]
    failures += [f"traceback:{end[-500:]}" for end in log.split("Traceback (most recent call last):")[1:]]
    failures += [line for line in log.splitlines() if "uncaptured" in line]  # waitress logs "uncaptured ..."
    for failure in failures[:20]:
        print(failure)
    print(f"seed {seed}, {seconds} s, {statuses.total()} responses, {len(failures)} failures; by status:")
    print(*(f"{count} {status}" for status, count in sorted(statuses.items())), sep=", ")
    print("memory (MiB):", *(kib // 1024 for kib, _ in samples))
    print("descriptors:", *(number for _, number in samples))
    print(f"a PUT afterwards: {final}; memory grew by {growth} KiB after the first quarter")
    steady = growth < GROWTH and samples[-1][1] <= samples[0][1] + 4
    return 0 if not failures and final == 201 and steady else 1


if __name__ == "__main__":
    wanted = [*map(int, sys.argv[1:]), *(60, random.randrange(1 << 32))[len(sys.argv) - 1 :]]
    sys.exit(main(*wanted))
