"""The verbs of the orchestration API against a running daemon: what they do, what they refuse."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import pytest
from msgspec import structs

from kvstore.api import v1
from kvstore.api.convert import namespace_message
from kvstore.blend.pieces import piece_keys, piece_namespace
from kvstore.blocks.keys import Media, prompt_extras
from kvstore.client.session import Session
from tests.control_tools import NAMESPACE_ID, Api, by_keys, by_tokens
from tests.session_tools import (
    BLOCK_TOKENS,
    Served,
    Stores,
    eventually,
    namespace,
    prompt,
    save,
)

DAY: Final = {"seconds": 86400}
PROMPT: Final = prompt(1, 6)
KEYS_SAVED: Final = 4


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    """A daemon with memory and disk for all tests here; `session` cleans up."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("KVSTORE_CONFIG", raising=False)
        stores = Stores()
        yield stores.serve("8MiB", "16MiB", server={"name": "node-1", "max_requests": 8})
        stores.close()


@pytest.fixture
def session(served: Served) -> Iterator[Session]:
    """A session; what it saves is cleared in the end."""
    with served.session() as opened:
        yield opened
    with Api(served) as api:
        api.finished(api.call("Clear", selection={"everything": True}))


@pytest.fixture
def api(served: Served) -> Iterator[Api]:
    with Api(served) as opened:
        yield opened


@pytest.fixture
def saved(session: Session) -> list[bytes]:
    """The keys of PROMPT, of which the first four are stored in memory and on disk."""
    keys = session.keys(PROMPT)
    save(session, keys[:KEYS_SAVED])
    assert session.flush() == 0
    return keys


def done(api: Api, method: str, **request: Any) -> v1.Operation:
    """A long operation at its successful end."""
    ended = api.finished(api.call(method, **request))
    assert ended.state == v1.Operation.STATE_DONE, ended
    assert ended.done == ended.total == ended.changed + sum(ended.skipped.values())
    return ended


@pytest.mark.parametrize("named", ["id", "beginning", "in full"])
@pytest.mark.parametrize("by", ["tokens", "keys"])
def test_lookup_finds_the_longest_prefix(api: Api, saved: list[bytes], named: str, by: str) -> None:
    prefix = by_tokens(PROMPT) if by == "tokens" else by_keys(saved)
    if named == "beginning":
        prefix["namespace_id"] = NAMESPACE_ID[:6].upper()
    if named == "in full":
        del prefix["namespace_id"]
        prefix["namespace"] = namespace_message(namespace())
    found = api.call("Lookup", prefix=prefix)
    assert (found.blocks, found.tokens, found.asked_blocks) == (4, 4 * BLOCK_TOKENS, 6)
    assert [(r.first, r.blocks, r.tier, r.node) for r in found.runs] == [(0, 4, "memory", "node-1")]
    assert found.reason == "never_stored"
    assert found.namespace_id == NAMESPACE_ID
    whole = api.call("Lookup", prefix=by_keys(saved[:4]))
    assert (whole.blocks, whole.reason) == (4, "")


def test_lookup_tells_tiers_and_the_time_to_bring_blocks_up(api: Api, saved: list[bytes]) -> None:
    done(api, "Move", selection={"prefix": by_keys(saved[1:3])}, to="disk")
    found = api.call("Lookup", prefix=by_tokens(PROMPT))
    assert [(r.first, r.blocks, r.tier) for r in found.runs] == [
        (0, 1, "memory"),
        (1, 2, "disk"),
        (3, 1, "memory"),
    ]
    assert found.estimate.ToNanoseconds() > 0


def test_lookup_tells_the_order_of_pieces_that_is_stored(api: Api, session: Session) -> None:
    head, tail = prompt(7, 1), prompt(8, 2)
    a, b, c = prompt(9, 2), prompt(10, 3)[:-5], prompt(11, 2)[:-3]  # Two end within blocks.

    def asked(*pieces: list[int]) -> Any:
        ids, spans = list(head), []
        for piece in pieces:
            spans.append({"start": len(ids), "end": len(ids) + len(piece)})
            ids += piece
        prefix = {"namespace_id": NAMESPACE_ID, "tokens": {"ids": ids + tail}}
        return api.call("Lookup", prefix=prefix, pieces=spans)

    save(session, session.keys(head + b + c + a + tail))
    whole = (len(head + b + c + a + tail)) // BLOCK_TOKENS * BLOCK_TOKENS
    for pieces, order in (((a, b, c), [1, 2, 0]), ((c, b, a), [1, 0, 2]), ((b, c, a), [0, 1, 2])):
        found = asked(*pieces)
        assert (list(found.order), found.order_tokens) == (order, whole)
    partly = asked(prompt(12, 2), c, b)
    assert (list(partly.order), partly.order_tokens) == ([2, 1, 0], len(head + b + c) // 16 * 16)
    none = asked(prompt(13, 1), prompt(14, 1))
    assert (list(none.order), none.order_tokens) == ([0, 1], BLOCK_TOKENS)
    assert not api.call("Lookup", prefix=by_tokens(PROMPT)).order


def test_lookup_tells_which_pieces_are_stored_by_themselves(api: Api, session: Session) -> None:
    ids = [*prompt(20, 1), *prompt(21, 5)[:-3], *prompt(22, 5), 3, *prompt(23, 6), *range(40)]
    spans = [(16, 93), (93, 173), (174, 270), (270, 310)]
    asks = {
        "prefix": {"namespace_id": NAMESPACE_ID, "tokens": {"ids": ids}},
        "pieces": [{"start": start, "end": end} for start, end in spans],
    }
    assert not api.call("Lookup", **asks).pieces
    with session.beside(piece_namespace(session.namespace, range(512))) as pieces:
        keys = [piece_keys(pieces.namespace, ids[start:end]) for start, end in spans]
        save(pieces, keys[0])
        save(pieces, keys[1][:2])
        found = api.call("Lookup", **asks)
        name = pieces.namespace.digest.hex()
        assert [one.namespace_id for one in found.pieces] == [name] * 4
        assert [(one.blocks, one.asked_blocks, one.reason) for one in found.pieces] == [
            (5, 5, ""),
            (2, 5, "never_stored"),
            (0, 6, "never_stored"),
            (0, 0, "short"),
        ]
        assert (found.pieces[0].tier, found.piece_tokens) == ("memory", 77)
        assert not found.order  # They do not follow each other.
        # Of another tenant it is told nothing, nor where the model is another one.
        others = (structs.replace(session.namespace, tenant="other"), namespace(model="another"))
        for other in others:
            prefix = {"namespace": namespace_message(other), "tokens": {"ids": ids}}
            assert not api.call("Lookup", **(asks | {"prefix": prefix})).pieces
        # In a namespace behind another filler there are more of them: that is told of.
        with session.beside(piece_namespace(session.namespace, range(1, 513))) as more:
            for start, end in spans[:2]:
                save(more, piece_keys(more.namespace, ids[start:end]))
            assert api.call("Lookup", **asks).piece_tokens == 77 + 80


def test_many_short_pieces_take_no_time(api: Api, session: Session) -> None:
    """All their orders are as good as each other, as far as whole blocks can tell."""
    ids = list(range(64))
    pieces = [{"start": n, "end": n + 1} for n in range(64)]
    prefix = {"namespace_id": NAMESPACE_ID, "tokens": {"ids": ids}}
    save(session, session.keys(ids))
    found = api.call("Lookup", prefix=prefix, pieces=pieces)
    assert sorted(found.order) == ids
    assert found.order_tokens == 64


def test_extras_name_other_blocks(api: Api, session: Session) -> None:
    keys = session.keys(PROMPT, extras={1: [b"image"]})
    save(session, keys[:2])
    tokens = {"ids": PROMPT, "extras": [{"block": 1, "values": [b"image"]}]}
    prefix = {"namespace_id": NAMESPACE_ID, "tokens": tokens}
    assert api.call("Lookup", prefix=prefix).blocks == 2
    assert api.call("Lookup", prefix=by_tokens(PROMPT)).blocks == 1


def test_prompts_of_engines_are_named_by_salt_adapter_and_media_too(
    api: Api, session: Session
) -> None:
    """As the vLLM connector names them, over more blocks than are hashed at a time."""
    ids = [i % 50_000 for i in range(30_000)]
    media = [
        Media("image", "a1", 5, 40),
        Media("audio", "b2", 8180, 30),
        Media("x", "c", 29_000, 9),
    ]
    extras = prompt_extras(
        BLOCK_TOKENS, range(len(ids) // BLOCK_TOKENS), salt="s", adapter="f" * 64, media=media
    )
    extras[0].append(b"mine")
    extras[700] = [b"mine", b"too"]
    keys = session.keys(ids, extras=extras)
    save(session, keys[:3])
    given: dict[str, Any] = {
        "ids": ids,
        "salt": "s",
        "adapter": "f" * 64,
        "media": [item._asdict() for item in media],
        "extras": [{"block": 0, "values": [b"mine"]}, {"block": 700, "values": [b"mine", b"too"]}],
    }
    found = api.call("Explain", prefix={"namespace_id": NAMESPACE_ID, "tokens": given})
    assert [block.key for block in found.blocks] == keys
    assert found.hit_blocks == 3
    for field in ("salt", "adapter", "media", "extras"):
        other = {name: value for name, value in given.items() if name != field}
        prefix = {"namespace_id": NAMESPACE_ID, "tokens": other}
        assert api.call("Lookup", prefix=prefix).blocks == 0, field


def test_explain_finds_salted_prompts_in_another_namespace(
    api: Api, served: Served, session: Session
) -> None:
    extras = prompt_extras(BLOCK_TOKENS, range(6), salt="s")
    save(session, session.keys(PROMPT, extras=extras))
    with served.session(tenant="t"):
        other = namespace("t").digest.hex()
        salted = {"namespace_id": other, "tokens": {"ids": PROMPT, "salt": "s"}}
        reason = api.call("Explain", prefix=salted).blocks[0]
        assert (reason.reason, reason.detail.count("differs in tenant")) == ("other_namespace", 1)
        assert (
            api.call("Explain", prefix=by_tokens(PROMPT, other)).blocks[0].reason == "never_stored"
        )


def test_a_long_prompt_is_hashed_like_in_a_session(api: Api, session: Session) -> None:
    tokens = [i % 50_000 for i in range(200_000)]
    keys = session.keys(tokens)
    found = api.call("Explain", prefix=by_tokens(tokens))
    assert [block.key for block in found.blocks] == list(keys)
    assert [block.block for block in found.blocks] == list(range(len(keys)))


def test_explain_says_why_block_by_block(api: Api, saved: list[bytes]) -> None:
    done(api, "Clear", selection={"prefix": by_keys([saved[2]])})
    found = api.call("Explain", prefix=by_tokens(PROMPT))
    told = [(b.usable, b.tier, b.reason) for b in found.blocks]
    assert told == [
        (True, "memory", "stored"),
        (True, "memory", "stored"),
        (False, "", "cleared"),
        (False, "memory", "stored"),
        (False, "", "never_stored"),
        (False, "", "never_stored"),
    ]
    assert found.blocks[2].at.seconds > 0
    assert found.hit_blocks == 2
    assert found.summary.startswith("2 of 6 blocks can be loaded (2 in memory); block 2: cleared")


def test_explain_finds_the_prompt_in_another_namespace(
    api: Api, served: Served, saved: list[bytes]
) -> None:
    other = served.session(tenant="other")
    with other:
        prefix = {"namespace": namespace_message(namespace("other")), "tokens": {"ids": PROMPT}}
        first = api.call("Explain", prefix=prefix).blocks[0]
    assert first.reason == "other_namespace"
    assert NAMESPACE_ID[:12] in first.detail
    assert "tenant" in first.detail
    prefix = {"namespace": namespace_message(namespace("other")), "keys": {"keys": saved}}
    strange = api.call("Lookup", prefix=prefix)
    assert (strange.blocks, strange.reason) == (0, "other_namespace")


def test_stats(api: Api, session: Session, saved: list[bytes]) -> None:
    found = api.call("Stats")
    assert found.node == "node-1"
    assert found.objects == 4
    assert found.sessions >= 1
    memory, disk = found.tiers
    assert (memory.name, disk.name) == ("memory", "disk")
    assert memory.used_bytes == disk.used_bytes == 4 * 4096
    assert memory.capacity_bytes == 8 << 20
    assert memory.problem == disk.problem == ""
    assert found.counters["save.blocks"] >= 4
    assert not found.draining


def test_lists(api: Api, session: Session, saved: list[bytes]) -> None:
    (info,) = api.call("ListNamespaces").namespaces
    assert info.namespace == namespace_message(namespace())
    assert (info.objects, info.blocks, info.sessions) == (4, 4, 1)
    assert dict(info.bytes) == {"memory": 4 * 4096, "disk": 4 * 4096}
    assert list(info.parts) == ["full 2×2×(8, 8) float32 LPNHC shard 0/1"]
    assert not api.call("ListNamespaces", tenant="nobody").namespaces
    (known,) = api.call("ListSessions").sessions
    assert (known.peer, known.token) == ("unix", "local")
    assert list(known.namespace_ids) == [NAMESPACE_ID]
    assert known.requests > 0
    session.pin(saved[:2], ttl=60)
    (lease,) = api.call("ListLeases").leases
    assert (lease.kind, lease.session, lease.blocks) == ("pin", known.id, 2)
    assert [held.id for held in api.call("ListLeases", session=known.id).leases] == [lease.id]
    assert not api.call("ListLeases", session=known.id + 1).leases
    assert api.call("ListSessions").sessions[0].leases == 1


def test_pins_keep_blocks_until_they_end(api: Api, saved: list[bytes]) -> None:
    pinned = api.call("Pin", prefix=by_tokens(PROMPT), ttl=DAY, owner="ops")
    assert (pinned.blocks, pinned.bytes, pinned.reason) == (4, 4 * 4096, "never_stored")
    second = api.call("Pin", prefix=by_keys(saved[:1]), ttl=DAY, owner="ops")
    listed = api.call("ListLeases", owner="ops").leases
    assert [(p.id, p.kind, p.owner, p.blocks) for p in listed] == [
        (pinned.id, "pin", "ops", 4),
        (second.id, "pin", "ops", 1),
    ]
    everything = {"everything": True}
    assert dict(done(api, "Clear", selection=everything).skipped) == {"pinned": 4}
    assert api.call("Unpin", id=pinned.id).pins == 1
    assert api.refused("Unpin", id=pinned.id)[:2] == ("NOT_FOUND", "PIN_UNKNOWN")
    assert dict(done(api, "Clear", selection=everything).skipped) == {"pinned": 1}
    assert api.call("Unpin", owner="ops").pins == 1
    assert api.call("Unpin", owner="ops").pins == 0
    assert done(api, "Clear", selection=everything).changed == 1
    none = api.call("Pin", prefix=by_tokens(PROMPT), ttl=DAY, owner="ops")
    assert (none.id, none.blocks, none.reason) == ("", 0, "cleared")


def test_blocks_move_between_tiers(api: Api, saved: list[bytes]) -> None:
    def tiers() -> list[int]:
        return [b.tier for b in api.call("Explain", prefix=by_tokens(PROMPT)).blocks[:4]]

    moved = done(api, "Move", selection={"namespace_id": NAMESPACE_ID}, to="disk")
    assert (moved.changed, moved.bytes, moved.verb) == (4, 4 * 4096, "Move")
    assert tiers() == ["disk"] * 4
    copied = done(api, "Copy", selection={"prefix": by_keys(saved[:2])}, to="memory")
    assert copied.changed == 2
    assert tiers() == ["memory"] * 2 + ["disk"] * 2
    in_memory = {"tier": "memory"}
    again = done(api, "Copy", selection=in_memory, to="disk")
    assert (again.changed, dict(again.skipped)) == (0, {"already": 2})
    fetched = done(api, "Prefetch", prefix=by_tokens(PROMPT))
    assert (fetched.total, fetched.changed, dict(fetched.skipped)) == (4, 2, {"already": 2})
    assert tiers() == ["memory"] * 4
    done(api, "Move", selection={"prefix": by_keys(saved)}, to="memory")
    assert api.call("Stats").tiers[1].used_bytes == 0
    below = done(api, "Prefetch", prefix=by_tokens(PROMPT), tier="disk")
    assert below.changed == 4


def test_codecs(api: Api, saved: list[bytes]) -> None:
    everything = {"everything": True}
    packed = done(api, "Compress", selection=everything, codec="raw")
    assert dict(packed.skipped) == {"already": 4}
    assert dict(done(api, "Decompress", selection=everything).skipped) == {"already": 4}
    assert dict(done(api, "Compress", selection=everything, codec="e4").skipped) == {"no_codec": 4}


def test_clear_counts_first_and_then_removes(
    api: Api, session: Session, saved: list[bytes]
) -> None:
    choice = {"prefix": by_keys(saved[2:]), "older_than": {"seconds": 0}}
    would = done(api, "Clear", selection=choice, dry_run=True)
    assert (would.changed, would.bytes, would.dry_run) == (2, 2 * 4096, True)
    assert session.lookup(saved).blocks == 4
    assert done(api, "Clear", selection=choice).changed == 2
    assert session.lookup(saved).blocks == 2
    assert done(api, "Clear", selection={"unused_for": DAY}).total == 0
    assert done(api, "Clear", selection={"older_than": DAY}).total == 0
    assert done(api, "Clear", selection={"tenant": "nobody"}).total == 0
    assert done(api, "Clear", selection={"tenant": ""}).changed == 2


def test_time_to_live(api: Api, session: Session, saved: list[bytes]) -> None:
    choice = {"namespace_id": NAMESPACE_ID}
    assert api.call("SetTtl", selection=choice, ttl=DAY).objects == 4
    assert api.call("SetTtl", selection=choice).objects == 4
    short = {"prefix": by_keys(saved[3:])}
    assert api.call("SetTtl", selection=short, ttl={"nanos": 1_000_000}).objects == 1
    eventually(lambda: session.lookup(saved).blocks == 3)
    assert api.call("Explain", prefix=by_tokens(PROMPT)).blocks[3].reason == "expired"


def test_quotas(api: Api, session: Session, saved: list[bytes]) -> None:
    before = api.call("GetQuota", tenant="").quotas[0]
    assert not before.limits
    assert dict(before.used) == {"memory": 4 * 4096, "disk": 4 * 4096}
    limited = api.call("SetQuota", tenant="", limits={"memory": 2 * 4096})
    assert dict(limited.limits) == {"memory": 2 * 4096}
    assert limited.used["memory"] <= 2 * 4096
    api.call("SetQuota", tenant="other", limits={"disk": 0})
    quotas = {q.tenant: q for q in api.call("GetQuota").quotas}
    assert quotas[""] == api.call("GetQuota", tenant="").quotas[0]
    assert dict(quotas["other"].limits) == {"disk": 0}
    for tenant in ("", "other"):
        assert not api.call("SetQuota", tenant=tenant).limits
    assert [q.tenant for q in api.call("GetQuota").quotas] == [""]


def test_admission(api: Api, session: Session) -> None:
    start = api.call("GetAdmission")
    assert (dict(start.rules), start.denied_tenants) == ({"memory": "all", "disk": "all"}, [])
    denied = {"tenants": ["b", "a", ""]}
    changed = api.call("SetAdmission", rules={"disk": "reused"}, denied=denied)
    assert dict(changed.rules) == {"memory": "all", "disk": "reused"}
    assert list(changed.denied_tenants) == ["", "a", "b"]
    keys = session.keys(prompt(77, 2))
    assert save(session, keys).stored == 0
    assert api.call("SetAdmission", rules={"memory": "none"}).rules["disk"] == "reused"
    assert api.call("Lookup", prefix=by_keys(keys)).reason == "admission"
    assert api.call("SetAdmission", rules=start.rules, denied={}) == start
    assert save(session, keys).stored == 2


def test_operations_are_remembered(api: Api, session: Session) -> None:
    ended = done(api, "Clear", selection={"everything": True}, dry_run=True)
    assert ended.requested_by == "local"
    assert ended.finished.ToNanoseconds() >= ended.started.ToNanoseconds() > 0
    assert api.call("CheckFinish", id=ended.id) == ended
    assert api.call("Cancel", id=ended.id) == ended, "it has ended: nothing to cancel"
    assert [o for o in api.call("ListOperations").operations if o.id == ended.id] == [ended]
