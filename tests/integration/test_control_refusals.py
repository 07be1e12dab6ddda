"""What the orchestration API refuses: wrong fields, unknown names, too much at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import pytest

from kvstore.api.convert import namespace_message
from tests.control_tools import SERVICE, Api, by_keys
from tests.session_tools import BLOCK_TOKENS, Served, Stores, namespace

DAY: Final = {"seconds": 86400}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    """A daemon for all tests here; it holds nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("KVSTORE_CONFIG", raising=False)
        stores = Stores()
        yield stores.serve("8MiB", "16MiB", server={"max_requests": 8})
        stores.close()


@pytest.fixture
def api(served: Served) -> Iterator[Api]:
    with Api(served) as opened:
        yield opened


def test_who_means_to_show_a_token_shows_it_also_where_none_is_needed(served: Served) -> None:
    for value in ("Basic abc", "Bearer", "nonsense"):
        with Api(served) as opened:
            opened._metadata = (("authorization", value),)
            assert opened.refused("Stats")[:2] == ("UNAUTHENTICATED", "TOKEN_MISSING"), value


MEDIA: Final = {"modality": "image", "digest": "a1", "offset": 0, "length": 4}
KEYS: Final = {"keys": [bytes(32)]}
ID: Final = {"namespace": namespace_message(namespace())}
GOOD: Final = ID | {"keys": KEYS}
LONG: Final = ID | {"tokens": {"ids": [1] * 64}}


def piece(start: int, end: int) -> dict[str, int]:
    return {"start": start, "end": end}


BAD_FIELDS: Final[list[tuple[str, dict[str, Any], str]]] = [
    ("Lookup", {}, "prefix.namespace_id"),
    ("Lookup", {"prefix": {"keys": KEYS}}, "prefix.namespace_id"),
    ("Lookup", {"prefix": ID}, "prefix.tokens"),
    ("Lookup", {"prefix": {"namespace_id": "12345"}}, "prefix.namespace_id"),
    ("Lookup", {"prefix": {"namespace_id": "no hexadecimal"}}, "prefix.namespace_id"),
    ("Lookup", {"prefix": {"namespace_id": "0" * 65}}, "prefix.namespace_id"),
    ("Lookup", {"prefix": {"namespace": {"model": ""}, "keys": KEYS}}, "prefix.namespace"),
    (
        "Lookup",
        {"prefix": {"namespace": {"model": "m", "block_tokens": 0}, "keys": KEYS}},
        "prefix.namespace",
    ),
    (
        "Lookup",
        {"prefix": {"namespace": {"model": "m", "block_tokens": 16, "id": "ab"}, "keys": KEYS}},
        "prefix.namespace",
    ),
    ("Lookup", {"prefix": ID | {"keys": {"keys": [bytes(32), b"x"]}}}, "prefix.keys.keys[1]"),
    ("Lookup", {"prefix": ID | {"keys": {"keys": [bytes(32)] * 65537}}}, "prefix.keys.keys"),
    (
        "Lookup",
        {"prefix": ID | {"tokens": {"ids": [1] * (65537 * BLOCK_TOKENS)}}},
        "prefix.tokens.ids",
    ),
    (
        "Lookup",
        {"prefix": ID | {"tokens": {"ids": [1], "extras": [{"block": 1}, {"block": 1}]}}},
        "prefix.tokens.extras[1].block",
    ),
    *(
        (
            "Lookup",
            {"prefix": ID | {"tokens": {"ids": [1], "media": media}}},
            f"prefix.tokens.{field}",
        )
        for media, field in (
            ([MEDIA] * 1025, "media"),
            ([MEDIA | {"digest": ""}], "media[0].digest"),
            ([MEDIA | {"digest": "x" * 257}], "media[0].digest"),
            ([MEDIA | {"modality": ""}], "media[0].modality"),
            ([MEDIA | {"length": 0}], "media[0].offset"),
            ([MEDIA, MEDIA], "media[1].offset"),
            ([MEDIA | {"length": 0xFFFFFFFF}, MEDIA | {"offset": 9}], "media[1].offset"),
        )
    ),
    ("Explain", {"prefix": ID}, "prefix.tokens"),
    ("WatchEvents", {"namespace_id": "xyz"}, "namespace_id"),
    ("Pin", {"prefix": GOOD, "owner": "me"}, "ttl"),
    ("Pin", {"prefix": GOOD, "owner": "me", "ttl": {"seconds": 0}}, "ttl"),
    ("Pin", {"prefix": GOOD, "owner": "me", "ttl": {"seconds": -1}}, "ttl"),
    ("Pin", {"prefix": GOOD, "owner": "me", "ttl": {"seconds": 31 * 86400}}, "ttl"),
    ("Pin", {"prefix": GOOD, "ttl": DAY}, "owner"),
    ("Pin", {"prefix": GOOD, "ttl": DAY, "owner": "x" * 257}, "owner"),
    ("Pin", {"ttl": DAY, "owner": "me"}, "prefix.namespace_id"),
    ("Unpin", {}, "id"),
    ("Unpin", {"owner": ""}, "owner"),
    ("SetTtl", {"selection": {"everything": True}, "ttl": {"seconds": -5}}, "ttl"),
    ("SetTtl", {}, "selection"),
    ("Prefetch", {"prefix": GOOD, "tier": "far"}, "tier"),
    ("Prefetch", {}, "prefix.namespace_id"),
    ("Move", {"selection": {"everything": True}}, "to"),
    ("Move", {"to": "disk"}, "selection"),
    ("Copy", {"selection": {"everything": True}, "to": "far"}, "to"),
    ("Copy", {"selection": {"tier": "far"}, "to": "disk"}, "selection.tier"),
    ("Lookup", {"prefix": LONG, "pieces": [piece(0, 1)] * 65}, "pieces"),
    ("Lookup", {"prefix": LONG, "pieces": [piece(0, 8), piece(7, 10)]}, "pieces[1]"),
    ("Lookup", {"prefix": LONG, "pieces": [piece(8, 8), piece(8, 9)]}, "pieces[0]"),
    ("Lookup", {"prefix": LONG, "pieces": [piece(0, 8), piece(8, 65)]}, "pieces[1]"),
    ("Lookup", {"prefix": GOOD, "pieces": [piece(0, 8), piece(8, 9)]}, "pieces"),
    ("Compress", {"selection": {"everything": True}, "codec": "zip"}, "codec"),
    ("Compress", {"codec": "raw"}, "selection"),
    ("Decompress", {}, "selection"),
    ("Clear", {}, "selection"),
    ("Clear", {"selection": {"everything": True, "tier": "memory"}}, "selection.everything"),
    ("Clear", {"selection": {"older_than": {"seconds": -1}}}, "selection.older_than"),
    ("Clear", {"selection": {"unused_for": {"seconds": 10**11}}}, "selection.unused_for"),
    ("Clear", {"selection": {"namespace_id": "nonsense"}}, "selection.namespace_id"),
    ("Clear", {"selection": {"prefix": {}}}, "selection.prefix.namespace_id"),
    ("CheckFinish", {}, "id"),
    ("Watch", {}, "id"),
    ("Cancel", {"id": "x" * 300}, "id"),
    ("SetQuota", {"tenant": "x" * 4097}, "tenant"),
    ("SetQuota", {"tenant": "", "limits": {"memory": 2**63}}, "limits.memory"),
    ("SetQuota", {"tenant": "", "limits": {"far": 1}}, "limits"),
    ("GetQuota", {"tenant": "x" * 4097}, "tenant"),
    ("SetAdmission", {"rules": {"memory": "some"}}, "rules.memory"),
    ("SetAdmission", {"rules": {"disk": ""}}, "rules.disk"),
    ("SetAdmission", {"rules": {"far": "all"}}, "rules"),
    ("SetAdmission", {"denied": {"tenants": ["x"] * 1025}}, "denied.tenants"),
    ("Drain", {"timeout": {"seconds": -1}}, "timeout"),
]


@pytest.mark.parametrize(
    ("method", "request_", "field"),
    BAD_FIELDS,
    ids=[f"{method}-{number}" for number, (method, _, _) in enumerate(BAD_FIELDS)],
)
def test_a_wrong_field_is_named(
    api: Api, method: str, request_: dict[str, Any], field: str
) -> None:
    told = api.refused(method, **request_)
    assert (told.code, told.reason, told.field) == ("INVALID_ARGUMENT", "BAD_FIELD", field)
    assert told.message.startswith(f"{field}: ")


def test_what_is_named_must_be_there(api: Api) -> None:
    stranger = "f" * 64
    for method, request in (
        ("Lookup", {"prefix": by_keys([bytes(32)], stranger)}),
        ("Clear", {"selection": {"namespace_id": stranger}}),
        ("WatchEvents", {"namespace_id": stranger[:10]}),
    ):
        told = api.refused(method, **request)
        assert told[:2] == ("NOT_FOUND", "NAMESPACE_UNKNOWN")
        assert "ListNamespaces" in told.remedy
    for method in ("CheckFinish", "Watch", "Cancel"):
        assert api.refused(method, id="0-1")[:2] == ("NOT_FOUND", "OPERATION_UNKNOWN")


def test_an_ambiguous_beginning_is_refused(api: Api, served: Served) -> None:
    names: dict[str, str] = {}
    number = 0
    while True:  # Two namespaces that share six digits: a few thousand tries.
        digest = namespace(f"tenant-{number}").digest.hex()
        if digest[:6] in names:
            break
        names[digest[:6]] = f"tenant-{number}"
        number += 1
    with served.session(tenant=names[digest[:6]]), served.session(tenant=f"tenant-{number}"):
        told = api.refused("Lookup", prefix=by_keys([bytes(32)], digest[:6]))
        assert (told.code, told.field) == ("INVALID_ARGUMENT", "prefix.namespace_id")
        assert "2 namespaces" in told.message
        assert api.call("Lookup", prefix=by_keys([bytes(32)], digest)).blocks == 0


@pytest.mark.parametrize("method", [m.name for m in SERVICE.methods])
def test_what_is_no_request_is_refused(api: Api, method: str) -> None:
    told = api.refused_message(method, b"\xff\xff\xff")
    assert told[:2] == ("INVALID_ARGUMENT", "UNREADABLE")


def test_large_messages_are_refused(api: Api) -> None:
    told = api.refused_message("Stats", bytes(9 << 20))
    assert told.code == "RESOURCE_EXHAUSTED"
    assert api.call("Stats").objects == 0


def test_a_daemon_without_a_disk_says_so(stores: Stores) -> None:
    with Api(stores.serve("2MiB")) as api:
        for method in ("Move", "Copy"):
            told = api.refused(method, selection={"everything": True}, to="disk")
            assert told[:2] == ("FAILED_PRECONDITION", "NO_TIER")
            assert "--disk" in told.remedy
        assert [tier.name for tier in api.call("Stats").tiers] == ["memory"]


def test_calls_at_a_time_are_bounded(served: Served) -> None:
    with Api(served) as api:
        streams = [api.call("WatchEvents") for _ in range(4)]
        for stream in streams:
            stream.initial_metadata()
        told = api.refused("WatchEvents")
        assert told[:2] == ("RESOURCE_EXHAUSTED", "TOO_MANY_WATCHERS")
        assert api.call("Stats").objects == 0
        for stream in streams:
            stream.cancel()
