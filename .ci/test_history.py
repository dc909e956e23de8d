"""Check that two servers on one data directory behave like one sequential server.

A model says what each request does. Sequences of requests, and histories of concurrent clients, are compared
with it.
"""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from support import PATIENCE, Answer, Client, Server, keep, serving, sha256

from artefacts import (
    ALL,
    Artefact,
    Content,
    NotFound,
    PreconditionFailed,
    Repository,
    current_time,
    version_time,
)

__all__ = ["keep"]  # the fixture

T = TypeVar("T")

# == The sequential model of one artefact =========================================================


class Stored(NamedTuple):
    version: str
    digest: str


@dataclass(frozen=True)
class State:
    """The current artefact and its earlier versions, oldest first."""

    current: Stored | None = None
    earlier: tuple[Stored, ...] = ()
    renewed: str = ""  # the version's name for an instant before the last push of bytes that were current

    @property
    def versions(self) -> tuple[Stored, ...]:
        return self.earlier + ((self.current,) if self.current else ())

    def find(self, version: str) -> Stored | None:
        return next((stored for stored in self.versions if stored.version == version), None)

    def replaced(self, new: Stored | None, keep: int) -> State:
        """Return the state after a commit: at most `keep` earlier versions are left."""
        return State(new, self.versions[-keep:] if keep else ())


@dataclass(frozen=True)
class Request:
    """A request for one artefact.

    `kind` is PUT, POST, DELETE or GET; restore, erase or fetch (of `version`); at (the instant of `version`);
    erase all; versions; clear (delete the directory); listed (the artefact's row in the listing); expire
    (what was last pushed before `version`); promote (of an artefact with the bytes of `body`). `version`
    of a PUT and of a promote is an instant before it, if artefacts expire.
    """

    kind: str
    id: str
    body: bytes = b""
    version: str = ""
    condition: tuple[str, str] | None = None  # a field, and "*" or a digest

    def is_allowed(self, current: Stored | None) -> bool:
        """Return whether the precondition holds (RFC 9110 §13.1)."""
        if self.condition is None:
            return True
        field, wanted = self.condition
        matches = current is not None and wanted in ("*", current.digest)
        return matches == (field == "If-Match")


@dataclass(frozen=True)
class Result:
    status: int
    stored: Stored | None = None
    rows: tuple[tuple[Stored, bool], ...] = ()  # of ?versions: (version, is it current?)


def after(state: State, request: Request, got: Result, keep: int) -> State | None:
    """Return the state after this request, or None if it cannot have got this result in this state.

    The server chooses the name of a new version. It must be later than all versions of the artefact.
    """
    current = state.current

    def when(*expected: object, then: State = state) -> State | None:
        return then if (got.status, got.stored, *got.rows)[: len(expected)] == expected else None

    def stores(digest: str, status: int) -> State | None:
        if current is not None and current.digest == digest:
            return when(status, current, then=replace(state, renewed=request.version))
        new = got.stored
        if got.status != status or new is None or new.digest != digest:
            return None
        if any(stored.version >= new.version for stored in state.versions):
            return None
        return state.replaced(new, keep)

    if request.kind in ("PUT", "promote"):
        if not request.is_allowed(current):
            return when(412)
        return stores(sha256(request.body), 200 if current else 201)
    if request.kind == "POST":
        if current is not None:
            return when(409)
        return stores(sha256(request.body), 201) if request.is_allowed(current) else when(412)
    if request.kind == "DELETE":
        if current is None:
            return when(404)
        return when(204, then=state.replaced(None, keep)) if request.is_allowed(current) else when(412)
    if request.kind == "restore":
        version = state.find(request.version)
        if version is None:
            return when(404)
        return stores(version.digest, 201) if request.is_allowed(current) else when(412)
    if request.kind == "erase":
        if state.find(request.version) is None:
            return when(404)
        if current is not None and current.version == request.version:
            return when(409)
        earlier = tuple(stored for stored in state.earlier if stored.version != request.version)
        return when(204, then=replace(state, earlier=earlier))
    if request.kind == "erase all":
        if not state.versions:
            return when(404)
        return when(204, then=State()) if request.is_allowed(current) else when(412)
    if request.kind == "expire":
        pushed = max(state.renewed, *(stored.version for stored in state.versions), "")
        return State() if state.versions and pushed < request.version else None
    if request.kind == "clear":
        return when(404) if got.status == 404 and not state.versions else when(204, then=State())
    if request.kind == "versions":
        rows = tuple((stored, stored == current) for stored in reversed(state.versions))
        return state if got == Result(200 if rows else 404, None, rows) else None
    found = current  # GET and listed
    if request.kind == "fetch":
        found = state.find(request.version)
    elif request.kind == "at":
        found = max((stored for stored in state.versions if stored.version <= request.version), default=None)
    return when(200, found) if found else when(404)


# == Requests over HTTP ===========================================================================


def perform(client: Client, directory: str, request: Request) -> Result:
    """Send a request and return its result. Assert that the ETag of each body is its digest."""
    version = request.version
    query = {
        "restore": f"?restore={version}", "erase": f"?version={version}", "erase all": "?versions",
        "fetch": f"?version={version}", "versions": "?versions", "at": f"?at={instant(version)}",
    }.get(request.kind, "")
    method = {"restore": "POST", "erase": "DELETE", "erase all": "DELETE"}.get(request.kind, request.kind)
    method = method if method.isupper() else "GET"
    fields = {}
    if request.condition is not None:
        field, wanted = request.condition
        fields = {field: "*" if wanted == "*" else f'"{wanted}"'}
    body = request.body if request.kind in ("PUT", "POST") else None
    answer = client.ask(method, f"{directory}/{request.id}{query}", body, fields)
    if request.kind == "versions" and answer.status == 200:
        rows = ((Stored(row["version"], row["sha256"]), row["current"]) for row in answer.json["versions"])
        return Result(200, None, tuple(rows))
    return Result(answer.status, stored_of(answer) if answer.status in (200, 201) else None)


def stored_of(answer: Answer) -> Stored:
    """Return the version and the digest that a response names."""
    etag, version = answer.fields["ETag"], answer.fields["Artefact-Version"]
    if "Repr-Digest" in answer.fields:
        assert etag == f'"{sha256(answer.body)}"', "a torn or mixed body"
    else:
        assert (answer.json["version"], f'"{answer.json["sha256"]}"') == (version, etag)
    return Stored(version, etag.strip('"'))


def instant(version: str) -> str:
    return Artefact("", "", 0, version_time(version), "", None).modified if version else ""


def shifted(version: str, by: int) -> str:
    """Return the name of the version that is `by` microseconds later."""
    return Artefact("", "", 0, version_time(version) + by, "", None).version


def listed(client: Client, directory: str) -> dict[str, Stored] | None:
    answer = client.ask("GET", directory)
    if answer.status == 404:
        return None
    assert answer.status == 200
    return {row["id"]: Stored(row["version"], row["sha256"]) for row in answer.json["artefacts"]}


@pytest.fixture(scope="module")
def servers(keep: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Server]]:
    """Run two servers on one data directory, one of them with two processes."""
    data, options = tmp_path_factory.mktemp("data"), ("--keep-versions", keep)
    with serving(data, *options) as one, serving(data, *options, "--processes=2") as other:
        yield one, other


# == One request after the other ==================================================================

IDS = ["x", "lib/x", "lib/y.txt"]
BODIES = [b"", b"one", b"two", b"large" * 30_000, b"larger" * 60_000]
CONDITIONS = [None, None, None, *itertools.product(("If-Match", "If-None-Match"), ("*", "current", "other"))]
numbers = itertools.count()


class OneByOne(RuleBasedStateMachine):
    """Send one request after the other to either server, and compare each result with the model."""

    clients: tuple[Client, Client]
    keep: int

    def __init__(self) -> None:
        super().__init__()
        self.directory, self.exists = f"directory{next(numbers)}", False
        self.states = dict.fromkeys(IDS, State())
        self.touched: set[str] = set()
        self.seen: dict[str, list[str]] = defaultdict(lambda: ["20200101T000000.000000Z"])

    def check(self, server: int, request: Request) -> None:
        """Send a request and assert that the model allows its result."""
        state = self.states[request.id]
        if request.condition is not None and request.condition[1] != "*":
            digest = state.current.digest if state.current else "0" * 64
            wanted = digest if request.condition[1] == "current" else sha256(b"other")
            request = replace(request, condition=(request.condition[0], wanted))
        got = perform(self.clients[server], self.directory, request)
        then = after(state, request, got, self.keep)
        assert then is not None, f"{request} in {state} got {got}"
        self.states[request.id] = then
        self.touched.add(request.id)
        self.exists |= bool(then.current)
        if got.stored and got.stored.version not in self.seen[request.id]:
            self.seen[request.id].append(got.stored.version)

    server = st.integers(0, 1)
    id = st.sampled_from(IDS)
    condition = st.sampled_from(CONDITIONS)
    nth = st.integers(0, 9)

    @rule(server=server, id=id, body=st.sampled_from(BODIES))
    def put(self, server: int, id: str, body: bytes) -> None:
        self.check(server, Request("PUT", id, body))

    @rule(server=server, kind=st.sampled_from(["PUT", "POST"]), id=id, body=st.sampled_from(BODIES),
          condition=condition)
    def push(self, server: int, kind: str, id: str, body: bytes, condition: tuple[str, str] | None) -> None:
        self.check(server, Request(kind, id, body, condition=condition))

    @rule(server=server, kind=st.sampled_from(["DELETE", "DELETE", "erase all"]), id=id, condition=condition)
    def delete(self, server: int, kind: str, id: str, condition: tuple[str, str] | None) -> None:
        self.check(server, Request(kind, id, condition=condition))

    @rule(server=server, id=id, nth=nth, condition=condition)
    def restore(self, server: int, id: str, nth: int, condition: tuple[str, str] | None) -> None:
        self.check(server, Request("restore", id, version=self.version(id, nth), condition=condition))

    @rule(server=server, kind=st.sampled_from(["erase", "fetch", "at"]), id=id, nth=nth,
          by=st.integers(-1, 1))
    def one_version(self, server: int, kind: str, id: str, nth: int, by: int) -> None:
        self.check(server, Request(kind, id, version=shifted(self.version(id, nth), by * (kind == "at"))))

    @rule(server=server, really=st.integers(0, 4))
    def delete_directory(self, server: int, really: int) -> None:
        if really == 4:
            status = self.clients[server].ask("DELETE", self.directory).status
            assert status == (204 if self.exists else 404)
            self.exists, self.states, self.touched = False, dict.fromkeys(IDS, State()), set(IDS)

    @rule(server=server, limit=st.integers(1, 3), prefix=st.sampled_from(["", "l", "lib/", "x", "z"]))
    def list_in_pages(self, server: int, limit: int, prefix: str) -> None:
        expected = [id for id in sorted(IDS) if id.startswith(prefix) and self.states[id].current]
        found: list[str] = []
        path = f"{self.directory}?limit={limit}&prefix={prefix}"
        while path:
            answer = self.clients[server].ask("GET", path)
            assert answer.status == (200 if self.exists else 404)
            page = [row["id"] for row in answer.json.get("artefacts", [])]
            found += page
            path = answer.json.get("next", "").removeprefix("/artefacts/")
            assert len(page) == limit or not path
        assert found == expected

    @invariant()
    def both_servers_show_the_state(self) -> None:
        touched = sorted(self.touched)
        for server, client in enumerate(self.clients):
            expected = {id: state.current for id, state in self.states.items() if state.current}
            assert listed(client, self.directory) == (expected if self.exists else None)
            for id in touched:
                self.check(server, Request("GET", id))
                self.check(server, Request("versions", id))
        self.touched.clear()

    def version(self, id: str, nth: int) -> str:
        """Return a version that was stored, or, rarely, one that never existed."""
        return self.seen[id][-1 - nth % len(self.seen[id])]


def test_one_request_after_the_other(servers: tuple[Server, Server], keep: str) -> None:
    with servers[0].client() as one, servers[1].client() as other:
        machine = type("Machine", (OneByOne,), {"clients": (one, other), "keep": number_of(keep)})
        run_state_machine_as_test(
            machine,
            settings=settings(max_examples=40, stateful_step_count=30, deadline=None,
                              database=None, print_blob=True, suppress_health_check=list(HealthCheck)),
        )


def number_of(keep: str) -> int:
    return ALL if keep == "all" else int(keep)


# == Concurrent ===================================================================================


class Event(NamedTuple):
    """A request and its result. It took effect at one instant between the two times, in ns."""

    start: int
    end: int
    request: Request
    result: Result

    def __str__(self) -> str:
        request, result, times = self.request, self.result, f"{self.start / 1e6:.3f}-{self.end / 1e6:.3f} ms"
        sent = f"{sha256(request.body)[:8]} {request.version} {request.condition or ''}"
        return f"{times} {request.kind} {request.id} {sent} -> {result.status} {result.stored or result.rows}"

    def prunes(self) -> bool:
        return self.result.status < 300 and self.request.kind in ("PUT", "POST", "DELETE", "restore")


def unexplained(history: list[Event], keep: int) -> str:
    """Search for an order of the requests in which the model gives these results.

    Each request takes effect at one instant between its start and its end (the search of Wing and Gong; tried
    states are remembered, after Lowe). Return "" if there is such an order. Otherwise return a state that can
    be reached, and the pending requests, none of which the model allows next.

    The pruning of a commit takes effect at an instant of its own, after the commit but before its response:
    readers take no lock and may find a pruned version until then.
    """
    events: list[tuple[Event, int]] = []  # a pruning has the place of its commit, a request has -1
    for event in sorted(history):
        events.append((event, -1))
        if 0 < keep < ALL and event.prunes():
            events.append((event, len(events) - 1))
    everything = (1 << len(events)) - 1
    tried = {(0, State())}
    stack = [(0, State())]  # events that have taken effect (bits), and the state after them
    best = 0, State()
    while stack:
        done, state = stack.pop()
        if done == everything:
            return ""
        if done.bit_count() > best[0].bit_count():
            best = done, state
        ends = 1 << 63
        for place in range((~done & (done + 1)).bit_length() - 1, len(events)):
            event, commit = events[place]
            if done >> place & 1:
                continue
            if event.start > ends:  # a pending event ended before this one began
                break
            ends = min(ends, event.end)
            if commit < 0:
                then = after(state, event.request, event.result, ALL if keep else 0)
            else:
                then = replace(state, earlier=state.earlier[-keep:]) if done >> commit & 1 else None
            if then is not None and (step := (done | 1 << place, then)) not in tried:
                tried.add(step)
                stack.append(step)
    pending = [str(event) for place, (event, _) in enumerate(events) if not best[0] >> place & 1]
    return "\n".join([str(best[1]), *pending[:9]])


ONE, TWO = (Stored(f"2026010{day}T000000.000000Z", sha256(b"%d" % day)) for day in (1, 2))
ONE_PUT = Event(0, 1, Request("PUT", "x", b"1"), Result(201, ONE))
TWO_PUT = Event(3, 6, Request("PUT", "x", b"2", condition=("If-Match", ONE.digest)), Result(200, TWO))


@pytest.mark.parametrize(
    ("more", "explained"),
    [
        (Event(4, 5, Request("GET", "x"), Result(200, ONE)), True),
        (Event(4, 5, Request("GET", "x"), Result(200, TWO)), True),
        (Event(7, 8, Request("GET", "x"), Result(200, ONE)), False),  # it had been replaced
        (Event(4, 5, Request("GET", "x"), Result(404)), False),  # it was never missing
        (Event(4, 5, Request("GET", "x"), Result(200, Stored(TWO.version, ONE.digest))), False),
        (Event(4, 5, TWO_PUT.request, Result(412)), True),
        (Event(4, 5, TWO_PUT.request, Result(200, TWO)), False),  # only one can win
        (Event(4, 5, Request("DELETE", "x"), Result(204)), True),
        (Event(2, 2, Request("DELETE", "x"), Result(204)), False),  # then If-Match had nothing to match
        (Event(4, 9, Request("versions", "x"), Result(200, None, ((TWO, True), (ONE, False)))), True),
        (Event(4, 9, Request("versions", "x"), Result(200, None, ((TWO, True),))), False),
    ],
)
def test_search_for_an_order(more: Event, explained: bool) -> None:
    assert (unexplained([ONE_PUT, TWO_PUT, more], 9) == "") == explained


CLIENTS, REQUESTS = 6, 50


def send_at_random(client: Client, directory: str, name: str, chance: random.Random) -> Iterator[Event]:
    """Send random requests that refer to what this client saw last."""
    seen: dict[str, list[Stored]] = defaultdict(lambda: [Stored("20200101T000000.000000Z", "0" * 64)])
    kinds = ["PUT"] * 5 + ["GET"] * 3 + ["POST", "DELETE", "restore", "versions", "listing", "fetch", "erase"]
    for number in range(REQUESTS):
        kind, id = chance.choice(kinds), chance.choice(IDS[:2])
        last = seen[id][-1].digest
        condition = chance.choice([None, ("If-Match", last), ("If-None-Match", chance.choice(["*", last]))])
        if kind in ("POST", "GET", "versions", "fetch", "erase") or (kind == "DELETE" and number % 2):
            condition = None
        body = f"{name}-{number} ".encode() * chance.choice([1, 1, 20_000, 60_000])
        start = time.monotonic_ns()
        if kind == "listing":
            rows = listed(client, directory) or {}
            end = time.monotonic_ns()
            for id in IDS[:2]:
                found = rows.get(id)
                yield Event(start, end, Request("listed", id), Result(200 if found else 404, found))
            continue
        if kind == "erase" and number % 3 == 0:
            result = Result(client.ask("DELETE", directory).status)
            end = time.monotonic_ns()
            yield from (Event(start, end, Request("clear", id), result) for id in IDS[:2])
            continue
        request = Request(kind, id, body, chance.choice(seen[id][-4:]).version, condition)
        result = perform(client, directory, request)
        yield Event(start, time.monotonic_ns(), request, result)
        if result.stored:
            seen[id].append(result.stored)


def at_once(servers: tuple[Server, Server], work: Callable[[Client, int], T]) -> list[T]:
    """Let CLIENTS clients work, half of them at each server, from the same moment. Return the results."""

    def run(number: int) -> T:
        with servers[number % 2].client() as client:
            together.wait(PATIENCE)
            return work(client, number)

    together = threading.Barrier(CLIENTS)
    with ThreadPoolExecutor(CLIENTS) as threads:
        return list(threads.map(run, range(CLIENTS)))


@pytest.mark.parametrize("seed", range(3))
def test_many_at_once(servers: tuple[Server, Server], keep: str, seed: int) -> None:
    """Find an order of all requests, within their times, in which the model gives each result."""

    def work(client: Client, number: int) -> list[Event]:
        return list(send_at_random(client, directory, f"{seed}-{number}", random.Random(f"{seed} {number}")))

    directory = f"many{seed}"
    events = list(itertools.chain(*at_once(servers, work)))
    with servers[0].client() as one, servers[1].client() as other:
        for client, id, kind in itertools.product((one, other), IDS[:2], ("GET", "versions")):
            request, start = Request(kind, id), time.monotonic_ns()
            events.append(Event(start, time.monotonic_ns(), request, perform(client, directory, request)))
    for id in IDS[:2]:
        history = [event for event in events if event.request.id == id]
        explanation = unexplained(history, number_of(keep))
        assert not explanation, explanation
        contents = defaultdict(set)
        for stored in {event.result.stored for event in history if event.result.stored}:
            contents[stored.version].add(stored.digest)
        assert all(len(digests) == 1 for digests in contents.values()), "two contents had one version name"


def test_increments_are_not_lost(servers: tuple[Server, Server], keep: str) -> None:
    """Fetch a counter and put it back increased, with If-Match."""

    def work(client: Client, number: int) -> int:
        for _ in range(increments):
            while True:
                got = client.ask("GET", "counters/c")
                body = str(int(got.body) + 1).encode()
                answer = client.ask("PUT", "counters/c", body, {"If-Match": got.fields["ETag"]})
                if answer.status == 200:
                    break
                assert answer.status == 412
        return increments

    increments = 12
    assert servers[0].ask("PUT", "counters/c", b"0").status == 201
    total = sum(at_once(servers, work))
    assert total == CLIENTS * increments
    for server in servers:
        assert int(server.ask("GET", "counters/c").body) == total
        digests = [row["sha256"] for row in server.ask("GET", "counters/c?versions").json["versions"]]
        assert digests == [sha256(str(n).encode()) for n in range(total, -1, -1)][: number_of(keep) + 1]


@pytest.mark.parametrize(
    ("method", "field", "winner", "losers"),
    [
        ("PUT", "If-None-Match", 201, {412}), ("POST", "", 201, {409}), ("PUT", "If-Match", 200, {412}),
        ("DELETE", "If-Match", 204, {404, 412}), ("restore", "If-Match", 201, {412}),
    ],
)
def test_of_many_exactly_one_wins(servers: tuple[Server, Server], keep: str, method: str, field: str,
                                  winner: int, losers: set[int]) -> None:
    def work(client: Client, number: int) -> int:
        fields = {field: "*" if field == "If-None-Match" else etag} if field else {}
        if method == "restore":
            return client.ask("POST", f"{path}?restore={version}", None, fields).status
        return client.ask(method, path, None if method == "DELETE" else b"%d" % number, fields).status

    for number in range(8):
        path = f"winners/{method}-{field}-{number}"
        if field != "If-None-Match" and method != "POST":
            version = servers[0].ask("PUT", path, b"first").fields["Artefact-Version"]
            etag = servers[1].ask("PUT", path, b"second").fields["ETag"]
        statuses = at_once(servers, work)
        if method == "restore" and keep == "0":
            assert set(statuses) == {404}  # no version is kept
            continue
        assert statuses.count(winner) == 1 and set(statuses) - {winner} <= losers, statuses


# == Concurrent, without HTTP =====================================================================


def version_of_now() -> str:
    return Artefact("", "", 0, current_time(), "", None).version


class Expiring(Repository):
    """A repository in which every artefact expires that was pushed before the sweep.

    `limit` is an instant at or after the one that decides what the running sweep deletes.
    """

    limit = ""

    def artefacts(self, *args: Any, **options: Any) -> Generator[Artefact, None, None]:
        self.limit = version_of_now()
        return super().artefacts(*args, **options)


def run_repository(repository: Repository, request: Request) -> Result:
    """Carry out a request for an artefact of `app`. A promote copies the source that has its `body`."""

    def check(current: Content | None) -> None:
        if not request.is_allowed(stored(current.digested()) if current else None):
            raise PreconditionFailed("")

    def stored(artefact: Artefact) -> Stored:
        return Stored(artefact.version, artefact.sha256 or "")

    try:
        if request.kind == "GET":
            with repository.fetch("app", request.id) as content:
                return Result(200, stored(content.digested()))
        if request.kind == "DELETE":
            repository.delete("app", request.id, check=check)
            return Result(204)
        if request.kind == "promote":
            with repository.fetch("sources", sha256(request.body)) as source:
                artefact, created = repository.promote(source, "app", request.id, check=check)
        else:
            with repository.stage() as upload:
                upload.write(request.body)
                artefact, created = repository.push(upload, "app", request.id, check=check)
        return Result(201 if created else 200, stored(artefact))
    except NotFound:
        return Result(404)
    except PreconditionFailed:
        return Result(412)


@pytest.mark.parametrize("seed", range(3))
def test_expire_and_promote(tmp_path: Path, keep: str, seed: int) -> None:
    """Push, promote, fetch and delete while sweeps expire: no push is lost, not even of the same bytes.

    Each thread has its own repository, as if it were a process. The sweeps delete what was last pushed before
    they began, so that each push races with one.
    """

    def open_repository() -> Expiring:
        return Expiring(tmp_path, keep_versions=number_of(keep), fsync=False,
                        keep_days=lambda directory: 0 if directory == "app" else None)

    def work(number: int) -> list[Event]:
        repository, chance = open_repository(), random.Random(f"{seed} {number}")
        events, last = [], Stored("", "0" * 64)
        together.wait(PATIENCE)
        for _ in range(REQUESTS):
            kind = chance.choice(["PUT", "PUT", "promote", "promote", "GET", "DELETE"])
            field = (chance.choice(["If-Match", "If-None-Match"]), last.digest)
            condition = chance.choice([None, None, field]) if kind in ("PUT", "promote") else None
            id, body = chance.choice(IDS[:2]), chance.choice(BODIES)
            request = Request(kind, id, body, version_of_now(), condition)
            start = time.monotonic_ns()
            result = run_repository(repository, request)
            events.append(Event(start, time.monotonic_ns(), request, result))
            last = result.stored or last
        finished.append(number)
        return events

    def sweep() -> list[Event]:
        repository, events = open_repository(), []
        together.wait(PATIENCE)
        while len(finished) < CLIENTS:
            start = time.monotonic_ns()
            for artefact in repository.expire():
                request = Request("expire", artefact.id, version=repository.limit)
                events.append(Event(start, time.monotonic_ns(), request, Result(204)))
            time.sleep(0.002)
        return events

    for body in BODIES:
        repository = open_repository()
        with repository.stage() as upload:
            upload.write(body)
            repository.push(upload, "sources", sha256(body))
    together, finished = threading.Barrier(CLIENTS + 1), list[int]()
    with ThreadPoolExecutor(CLIENTS + 1) as threads:
        sweeping = threads.submit(sweep)
        events = list(itertools.chain(*threads.map(work, range(CLIENTS)), sweeping.result()))
    assert {event.request.kind for event in events} >= {"expire", "promote"}
    for id in IDS[:2]:
        explanation = unexplained([event for event in events if event.request.id == id], number_of(keep))
        assert not explanation, explanation
