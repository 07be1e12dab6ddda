"""Who may do and see what: every verb of every face, for every role, inside tenants and beyond.

The verbs are taken from the service's descriptor, the unions of messages and the face's own routes:
one that has no row here fails.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple, get_args

import grpc
import pytest
from google.protobuf.json_format import MessageToDict

from kvstore.api.convert import namespace_message
from kvstore.config import Config
from kvstore.server.access.access import Access
from kvstore.server.http.admin import AdminFace
from kvstore.transport import protocol
from kvstore.transport.protocol import Attach, Failure, Get, Put
from tests.control_tools import SERVICE, Api, by_keys, by_tokens, refusal, secret, write_tokens
from tests.http_tools import ON, address, ask
from tests.integration.test_access import Wire
from tests.session_tools import PART, Stores, eventually, namespace, prompt
from tests.tcp_tools import ByHand, Stream

ROLES: Final = ("read", "write", "admin")
MINE, THEIRS = namespace("mine", "my/model"), namespace("theirs", "their/model")
MY_KEYS, THEIR_KEYS = (
    [struct.pack("<I", i) + fill * 28 for i in range(3)] for fill in (b"m", b"t")
)
EVERYTHING: Final = {"everything": True}


class World:
    """A daemon, a token per role, others limited to `mine`, and what both tenants have there."""

    def __init__(self, stores: Stores) -> None:
        entries: list[dict[str, Any]] = [{"name": role, "role": role} for role in ROLES]
        entries += [{"name": f"my-{role}", "role": role, "tenants": ["mine"]} for role in ROLES]
        tokens = write_tokens(stores.folder, *entries)
        server = ON | {"grpc": "127.0.0.1:0", "tcp": "127.0.0.1:0", "tokens": tokens}
        self.served = stores.serve("8MiB", "16MiB", server=server)
        self.apis: dict[str, Api] = {}
        self.all = Api(self.served)
        self.session = self.served.session(tenant="mine")
        self.mine = self.wire("my-write", MINE)
        self.save(self.mine, MY_KEYS)
        self.my_pin = self.pin(MINE, MY_KEYS)
        self.my_operation = self.operation("mine", self.api("my-write"))
        self.theirs: Wire | None = None

    def enter_others(self) -> None:
        """The other tenant does everything that it might be known by."""
        self.theirs = self.wire("write", THEIRS)
        self.save(self.theirs, THEIR_KEYS)
        self.theirs.ask(protocol.Acquire(0, 7, b"".join(THEIR_KEYS), 1.0, 3))
        self.theirs.ask(protocol.Reserve(0, 8, b"u" * 32))
        self.theirs.ask(protocol.Lookup(0, b"v" * 32))
        self.their_pin = self.pin(THEIRS, THEIR_KEYS)
        self.their_operation = self.operation("theirs", self.all)
        self.all.call("SetQuota", tenant="theirs", limits={"memory": 1 << 20})
        self.all.call("SetAdmission", denied={"tenants": ["theirs-denied"]})
        assert isinstance(Wire(self.served.socket, "no-such-token").greeting, Failure)

    def wire(self, name: str, space: Any) -> Wire:
        wire = Wire(self.served.socket, secret(name))
        assert isinstance(wire.ask(protocol.Open(space, (PART,))), protocol.Opened)
        return wire

    def save(self, wire: Wire, keys: list[bytes]) -> None:
        assert isinstance(wire.ask(protocol.Reserve(0, 1, b"".join(keys))), protocol.Reserved)
        assert wire.ask(protocol.Commit(1)) == protocol.Committed(len(keys), "")

    def pin(self, space: Any, keys: list[bytes]) -> str:
        prefix = by_keys(keys, space.digest.hex())
        pin: str = self.all.call("Pin", prefix=prefix, ttl={"seconds": 600}, owner="ops").id
        return pin

    def operation(self, tenant: str, by: Api) -> str:
        started = by.call("Clear", selection={"tenant": tenant}, dry_run=True)
        number: str = by.finished(started).id
        return number

    def api(self, name: str) -> Api:
        if name not in self.apis:
            self.apis[name] = Api(self.served, secret(name), tcp=True)
        return self.apis[name]


@pytest.fixture(scope="module")
def told() -> Iterator[tuple[World, dict[str, Any], dict[str, Any]]]:
    """The world, and what limited callers are told before others enter it, and after."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("KVSTORE_CONFIG", "KVSTORE_TOKEN", "KVSTORE_ADDRESS"):
            patch.delenv(name, raising=False)
        stores = Stores()
        made = World(stores)
        alone = everything_told(made)
        made.enter_others()
        yield made, alone, everything_told(made)
        stores.close()


@pytest.fixture
def world(told: tuple[World, dict[str, Any], dict[str, Any]]) -> World:
    return told[0]


# -- the API --------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A verb of the API: the role it needs, how it is asked about a tenant, and its answer to one
    who is limited to another: OK where the answer shows no other; None where nothing can be named.
    """

    role: str
    about: Callable[[World, str], dict[str, Any]]
    beyond: str = ""
    limited: str = "OK"
    """What one who is limited is told of his own."""


def prefix(_: World, tenant: str) -> dict[str, Any]:
    keys, space = (MY_KEYS, MINE) if tenant == "mine" else (THEIR_KEYS, THEIRS)
    return {"prefix": by_keys(keys, space.digest.hex())}


def selected(_: World, tenant: str) -> dict[str, Any]:
    space = MINE if tenant == "mine" else THEIRS
    return {"selection": {"namespace_id": space.digest.hex(), "unused_for": {"seconds": 9999}}}


def named(_: World, tenant: str) -> dict[str, Any]:
    return {"tenant": tenant}


def nothing(_: World, tenant: str) -> dict[str, Any]:
    return {}


def pinned(world: World, tenant: str) -> dict[str, Any]:
    # That of `mine` is only named in a copy, so that it stays.
    return {"id": world.pin(MINE, MY_KEYS) if tenant == "mine" else world.their_pin}


def operation(world: World, tenant: str) -> dict[str, Any]:
    return {"id": world.my_operation if tenant == "mine" else world.their_operation}


def also(more: dict[str, Any], about: Callable[[World, str], dict[str, Any]]) -> Any:
    return lambda world, tenant: about(world, tenant) | more


UNKNOWN: Final = "NAMESPACE_UNKNOWN"
DISK: Final = "disk"
API: Final[dict[str, Row]] = {
    "Lookup": Row("read", prefix, UNKNOWN),
    "Explain": Row("read", prefix, UNKNOWN),
    "Stats": Row("read", nothing),
    "ListNamespaces": Row("read", named, "TENANT"),
    "ListSessions": Row("read", nothing),
    "ListLeases": Row("read", nothing),
    "WatchEvents": Row("read", also({"after": 0}, named), "TENANT"),
    "Pin": Row("write", also({"ttl": {"seconds": 1}, "owner": "me"}, prefix), UNKNOWN),
    "Unpin": Row("write", pinned, "PIN_UNKNOWN"),
    "SetTtl": Row("write", also({"ttl": {"seconds": 9999}}, selected), UNKNOWN),
    "Prefetch": Row("write", prefix, UNKNOWN),
    "Move": Row("write", also({"to": DISK}, selected), UNKNOWN),
    "Copy": Row("write", also({"to": DISK}, selected), UNKNOWN),
    "Compress": Row("write", also({"codec": "raw"}, selected), UNKNOWN),
    "Decompress": Row("write", selected, UNKNOWN),
    "Clear": Row("admin", also({"dry_run": True}, selected), UNKNOWN),
    "CheckFinish": Row("read", operation, "OPERATION_UNKNOWN"),
    "Watch": Row("read", operation, "OPERATION_UNKNOWN"),
    "Cancel": Row("write", operation, "OPERATION_UNKNOWN"),
    "ListOperations": Row("read", nothing),
    "SetQuota": Row("admin", named, "TENANT"),
    "GetQuota": Row("read", named, "TENANT"),
    "GetAdmission": Row("read", nothing),
    "SetAdmission": Row("admin", nothing, limited="TENANT"),
    "Drain": Row("admin", also({"timeout": {"seconds": 1}}, nothing), limited="TENANT"),
}
VERBS: Final = [method.name for method in SERVICE.methods]


def outcome(api: Api, method: str, request: dict[str, Any]) -> str:
    """How a call ends: OK, or the reason of its refusal."""
    try:
        answer = api.call(method, **request)
        if isinstance(answer, Iterator):
            next(answer)
            answer.cancel()  # type: ignore[attr-defined]
    except grpc.RpcError as e:
        return refusal(e).reason
    return "OK"


def test_every_verb_of_the_api_has_its_row() -> None:
    assert set(API) == set(VERBS)


@pytest.mark.parametrize("method", VERBS)
def test_the_api_allows_each_role_and_tenant_what_is_theirs(world: World, method: str) -> None:
    row = API[method]
    with Api(world.served, tcp=True) as nobody, Api(world.served, "x" * 40, tcp=True) as stranger:
        assert outcome(nobody, method, row.about(world, "mine")) == "TOKEN_MISSING"
        assert outcome(stranger, method, row.about(world, "mine")) == "TOKEN_UNKNOWN"
    for role in ROLES:
        allowed = ROLES.index(role) >= ROLES.index(row.role)
        # Who is limited may clear within those limits with the role write.
        mine = allowed or (method == "Clear" and role == "write")
        expected = (row.limited if mine else "ROLE", "OK" if allowed else "ROLE")
        if method != "Drain" or not allowed:  # A test of its own drains.
            told = outcome(world.api(role), method, row.about(world, "mine"))
            assert told == expected[1], role
        assert outcome(world.api(f"my-{role}"), method, row.about(world, "mine")) == expected[0]
        if row.beyond:
            told = outcome(world.api(f"my-{role}"), method, row.about(world, "theirs"))
            assert told == (row.beyond if mine else "ROLE"), role


def test_naming_all_fields_of_a_namespace_of_others_is_refused(world: World) -> None:
    whole = {"namespace": namespace_message(THEIRS), "tokens": {"ids": prompt(1, 2)}}
    for method, request in (
        ("Lookup", {"prefix": whole}),
        ("Explain", {"prefix": whole}),
        ("Prefetch", {"prefix": whole}),
        ("Pin", {"prefix": whole, "ttl": {"seconds": 1}, "owner": "me"}),
        ("Clear", {"selection": {"prefix": whole}}),
        ("Clear", {"selection": {"tenant": "theirs"}}),
    ):
        assert outcome(world.api("my-admin"), method, request) == "TENANT"


# -- sessions -------------------------------------------------------------------------------------

THEIR_JOINED: Final = b"".join(THEIR_KEYS)


class Asked(NamedTuple):
    """A message of a session: the role it needs, and what one who is limited to `mine` is told,
    with the keys, leases and handles of the other tenant.
    """

    role: str
    message: protocol.Message
    told: protocol.Message | str


SESSION: Final[dict[type, Asked | None]] = {
    protocol.Hello: None,  # below: a second one ends the connection
    protocol.Open: Asked("read", protocol.Open(THEIRS, (PART,)), "may not use the tenant 'theirs'"),
    protocol.Close: Asked("read", protocol.Close(0), protocol.Count(0)),
    protocol.Lookup: Asked("read", protocol.Lookup(0, THEIR_JOINED), "absent"),
    protocol.Announce: Asked("write", protocol.Announce(0, 53, THEIR_JOINED), protocol.Count(3)),
    protocol.Reserve: Asked("write", protocol.Reserve(0, 50, THEIR_JOINED), ""),
    protocol.Commit: Asked("read", protocol.Commit(8), protocol.Committed(0, "lease")),
    protocol.Acquire: Asked("read", protocol.Acquire(0, 51, THEIR_JOINED, 1.0, 3), "absent"),
    protocol.Release: Asked("read", protocol.Release(7, (0, 1, 2)), protocol.Count(0)),
    protocol.Prefetch: Asked("read", protocol.Prefetch(0, THEIR_JOINED), protocol.Count(0)),
    protocol.Pin: Asked("write", protocol.Pin(0, 52, THEIR_JOINED, 9.0), protocol.Count(0)),
    protocol.Flush: Asked("read", protocol.Flush(9.0), protocol.Flushed(0)),
    protocol.Clear: Asked("write", protocol.Clear(0), protocol.Count(0)),
    protocol.Remove: Asked("write", protocol.Remove(0, THEIR_JOINED), protocol.Count(0)),
    protocol.Retire: Asked("write", protocol.Retire(0, THEIR_JOINED), protocol.Count(0)),
    protocol.Find: Asked(
        "read", protocol.Find(0, THEIR_JOINED), protocol.Holds(bytes(len(THEIR_KEYS)), b"", b"")
    ),
    protocol.Renew: Asked("read", protocol.Renew(7), protocol.Count(0)),
    protocol.Where: Asked("read", protocol.Where(7), "the role peer for all tenants"),
    protocol.Follow: Asked("read", protocol.Follow(), "this node has no peers"),
    protocol.Stats: Asked("read", protocol.Stats(), ""),
    protocol.Control: Asked("admin", protocol.Control(), ""),
}


def test_every_message_of_a_session_has_its_row() -> None:
    assert set(SESSION) | set(STREAM) == set(get_args(protocol.Request))


@pytest.mark.parametrize("kind", SESSION, ids=lambda kind: kind.__name__)
def test_a_session_allows_each_role_what_is_its_tenants(world: World, kind: type) -> None:
    row = SESSION[kind]
    for role in ROLES:
        # A namespace of its own: what is cleared or saved here is no other test's.
        wire = world.wire(f"my-{role}", namespace("mine", f"scratch/{role}/{kind.__name__}"))
        if row is None:
            reply = wire.ask(protocol.Hello(protocol.VERSION, "again", 1, secret("admin")))
            assert isinstance(reply, Failure)
            assert reply.fatal
            continue
        reply = wire.ask(row.message)
        if ROLES.index(role) < ROLES.index(row.role):
            assert isinstance(reply, Failure)
            assert f"needs the role {row.role}, 'my-{role}' has {role}" in reply.reason
        elif isinstance(row.told, str):
            assert row.told in getattr(reply, "reason", "")
            refused = kind in (protocol.Open, protocol.Where, protocol.Follow)
            assert isinstance(reply, Failure) is refused
        else:
            assert reply == row.told
        wire.close()
    assert world.theirs is not None
    found = world.theirs.ask(protocol.Lookup(0, THEIR_JOINED))
    assert isinstance(found, protocol.Found)
    assert len(found.tiers) == 3, "nothing of theirs was touched"


def test_a_reader_does_not_remove_blocks_by_saying_that_they_are_damaged(world: World) -> None:
    wire = world.wire("my-read", MINE)
    wire.ask(protocol.Acquire(0, 1, b"".join(MY_KEYS), 1.0, 3))
    wire.ask(protocol.Release(1, (0, 1, 2)))
    found = wire.ask(protocol.Lookup(0, b"".join(MY_KEYS)))
    assert isinstance(found, protocol.Found)
    assert len(found.tiers) == 3
    wire.close()


# -- data connections -----------------------------------------------------------------------------

STREAM: Final[dict[type, str]] = {
    Attach: "no session has this ticket",
    Put: "is no lease to save under",
    Get: "is no lease to load under",
}


@pytest.mark.parametrize("kind", STREAM, ids=lambda kind: kind.__name__)
def test_a_data_connection_reaches_its_own_sessions_leases_only(
    world: World, kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVSTORE_TOKEN", secret("write"))
    with ByHand(world.served, tenant="theirs") as theirs:
        slots = theirs.reserve(1, [bytes(32)])
        monkeypatch.setenv("KVSTORE_TOKEN", secret("my-write"))
        with ByHand(world.served, tenant="mine") as mine:
            if kind is Attach:
                number = theirs.channel.welcome.session
                stream = Stream(world.served, number, mine.channel.welcome.ticket)
                told = stream.answer
            else:
                stream = mine.stream()
                put = stream.put if kind is Put else None
                put(1, slots, [0], bytes(4096)) if put else stream.get(1, slots)
                told = stream.reply()
            assert isinstance(told, Failure)
            assert STREAM[kind] in told.reason
            stream.close()


# -- HTTP -----------------------------------------------------------------------------------------


class Path(NamedTuple):
    """A path over HTTP: the role to read it (empty: none), and to change it (empty: nobody).

    `whole`: it is for those alone who see all tenants.
    """

    role: str
    change: str = ""
    whole: bool = False


HTTP: Final[dict[str, Path]] = {
    "/healthz": Path(""),
    "/readyz": Path(""),
    "/metrics": Path("read"),
    "/status": Path("read"),
    "/trace": Path("read", whole=True),
    "/config": Path("read"),
    "/loglevel": Path("read", "admin"),
    "/": Path(""),
    "/charts.js": Path(""),
    "/elements.js": Path(""),
    "/icon.svg": Path(""),
    "/page.css": Path(""),
    "/page.js": Path(""),
    "/words.js": Path(""),
}
ROUTES: Final = AdminFace(Config(), Access(Config().server))._app.app.router.resources()
PATHS: Final = {resource.canonical for resource in ROUTES}
CHANGE: Final = {"level": "info", "logger": "kvstore.http"}


def test_every_path_has_its_row() -> None:
    assert set(HTTP) == PATHS


@pytest.mark.parametrize("path", sorted(PATHS))
def test_http_allows_each_role_what_is_its(world: World, path: str) -> None:
    row, where = HTTP[path], address(world.served)
    assert ask(where, path).status == (401 if row.role else 200)
    assert ask(where, path, token="x" * 40).status == (401 if row.role else 200)
    for role in ROLES:
        for name in (role, f"my-{role}"):
            sees = name == role or not row.whole
            assert ask(where, path, token=secret(name)).status == (200 if sees else 403)
            changed = ask(where, path, "PUT", token=secret(name), send=CHANGE).status
            may = row.change == role and name == role
            assert changed == (200 if may else 403 if row.change else 405), name


# -- what is told ---------------------------------------------------------------------------------

VOLATILE: Final = re.compile(
    r'"(uptime|at|since|started|finished|lastUsed|last_used|expires|now|estimate|sequence|seconds'
    r'|port)": ("[^"]*"|[\d.e+-]+)'
)
"""Times, and numbers of events, which are the daemon's own."""


def everything_told(world: World) -> dict[str, Any]:
    """What callers limited to `mine` are told by whatever has no effect, on all faces."""
    told: dict[str, Any] = {}
    for role in ("read", "admin"):
        api, name = world.api(f"my-{role}"), f"my-{role}"
        for method in VERBS:
            row = API[method]
            if row.role != "read" or method == "WatchEvents":
                continue
            answer = api.call(method, **row.about(world, "mine"))
            told[f"{name} {method}"] = (
                [MessageToDict(state) for state in answer]
                if isinstance(answer, Iterator)
                else MessageToDict(answer)
            )
        # Keys of the others, under an own namespace: guessed from a prompt, say.
        for method in ("Lookup", "Explain"):
            asked = api.call(method, prefix=by_keys(THEIR_KEYS, MINE.digest.hex()))
            told[f"{name} {method} of their keys"] = MessageToDict(asked)
            asked = api.call(method, prefix=by_tokens(prompt(1, 3), MINE.digest.hex()))
            told[f"{name} {method} of a prompt"] = MessageToDict(asked)
        for method, request in (("ListNamespaces", {}), ("GetQuota", {}), ("ListLeases", {})):
            told[f"{name} {method}"] = MessageToDict(api.call(method, **request))
        for method in ("Lookup", "Clear"):
            for space in (THEIRS.digest.hex(), "f" * 64):
                request = {"prefix": by_keys(THEIR_KEYS, space)}
                if method == "Clear":
                    request = {"selection": {"namespace_id": space}}
                if role == "admin" or method == "Lookup":
                    refused = api.refused(method, **request)
                    told[f"{name} {method} {space}"] = refused
        wire = Wire(world.served.socket, secret(name))
        wire.ask(protocol.Open(MINE, (PART,)))
        for message in (
            protocol.Lookup(0, THEIR_JOINED + b"".join(MY_KEYS)),
            protocol.Lookup(0, b"".join(MY_KEYS)),
            protocol.Prefetch(0, THEIR_JOINED),
            protocol.Flush(9.0),
        ):
            told[f"{name} {message}"] = repr(wire.ask(message))
        stats = wire.ask(protocol.Stats())
        assert isinstance(stats, protocol.StatsReply)
        told[f"{name} session stats"] = json.loads(stats.text)
        wire.close()
        eventually(lambda a=api: len(a.call("ListSessions").sessions) == 2)
        for path in ("/metrics", "/status", "/config", "/loglevel"):
            answer = ask(address(world.served), path, token=secret(name))
            told[f"{name} {path}"] = answer.body.decode() if path == "/metrics" else answer.json
        recent = told[f"{name} /status"].pop("recent")  # What was just asked is in it.
        assert {request["tenant"] for request in recent} == {"mine"}
    return {what: VOLATILE.sub(r'"\1": _', json.dumps(answer)) for what, answer in told.items()}


def test_what_a_limited_caller_is_told_does_not_depend_on_others(
    told: tuple[World, dict[str, Any], dict[str, Any]],
) -> None:
    """No number, no list, no reason and no refusal is another because others are there."""
    _, alone, together = told
    assert together == alone
    assert len(alone) > 50
