"""The verbs of the API that ask about a prompt: what is stored of it, and why not more."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Final

from kvstore.api import v1
from kvstore.api.convert import duration, timestamp
from kvstore.blocks.keys import block_keys
from kvstore.blocks.spec import Namespace
from kvstore.server.access.grants import Grant
from kvstore.server.control.requests import (
    Prompt,
    engine_extras,
    known_namespaces,
    numbered,
    prompt,
    slices,
)
from kvstore.server.node import Node
from kvstore.server.pacing import Pace, paced
from kvstore.store.explain import BlockReason, explain, surveying
from kvstore.transport.protocol import TIER_NAMES

_SLICE: Final = 64
"""Blocks looked at before others have their turn."""

_OF_STORED: Final = frozenset({"stored", "writing", "incomplete"})
"""Reasons of blocks that are in the namespace, wholly or in part."""


class PromptVerbs:
    """Answers what is stored of a prompt."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._store = node.store

    async def lookup(self, caller: Grant, request: v1.LookupRequest) -> v1.LookupResponse:
        asked = await prompt(self._node, caller, request.prefix)
        found = await paced(surveying(self._store, asked.namespace, asked.keys))
        tiers, below = found.tiers, found.below
        reason = ""
        if len(tiers) < len(asked.keys):
            reason = self._explained(caller, asked, [asked.keys[len(tiers)]])[0].reason
        reading = self._store.tiering.reading
        runs = []
        for tier, run in groupby(enumerate(tiers), key=lambda item: item[1]):
            first, *rest = (number for number, _ in run)
            runs.append(
                v1.Run(first=first, blocks=1 + len(rest), tier=numbered(tier), node=self._node.name)
            )
        return v1.LookupResponse(
            blocks=len(tiers),
            tokens=len(tiers) * asked.namespace.block_tokens,
            asked_blocks=len(asked.keys),
            runs=runs,
            reason=reason,
            estimate=duration(below and reading.wait + below * reading.each),
            namespace_id=asked.namespace.digest.hex(),
        )

    async def explain(self, caller: Grant, request: v1.ExplainRequest) -> bytes:
        asked = await prompt(self._node, caller, request.prefix)
        pieces: list[bytes] = []
        hits = 0
        ended: BlockReason | None = None
        counts: dict[int, int] = {}
        pace = Pace()
        number = 0
        for keys in slices(asked.keys, _SLICE):
            reply = v1.ExplainResponse()
            for found in self._explained(caller, asked, keys):
                usable = found.usable and ended is None
                if usable:
                    hits += 1
                    counts[found.tier] = counts.get(found.tier, 0) + 1
                elif ended is None:
                    if number == 0:
                        found = await self._elsewhere(caller, asked, found)
                    ended = found
                block = v1.BlockReason(
                    block=number,
                    key=found.key,
                    usable=usable,
                    tier=numbered(found.tier),
                    reason=found.reason,
                    detail=found.detail or ("" if usable else "a block before it is missing"),
                )
                if found.at is not None:
                    block.at.CopyFrom(timestamp(found.at))
                reply.blocks.append(block)
                number += 1
            # In pieces, which joined make one message: a long answer takes long to encode.
            pieces.append(reply.SerializeToString())
            await pace.step()
        head = v1.ExplainResponse(
            namespace_id=asked.namespace.digest.hex(),
            hit_blocks=hits,
            summary=_summary(len(asked.keys), hits, counts, ended),
        )
        return b"".join([head.SerializeToString(), *pieces])

    def _explained(self, caller: Grant, asked: Prompt, keys: Sequence[bytes]) -> list[BlockReason]:
        reasons = explain(self._store, asked.namespace, keys)
        if asked.tokens is not None:
            return reasons
        # Keys that were given may be those of others, which whoever guesses a prompt can compute.
        # Tenants are walls: who is limited to some is not even told that there is such a block.
        for number, found in enumerate(reasons):
            if found.reason in _OF_STORED:
                continue
            reason = "never_stored"
            detail = "not here; what became of it is told to those who give tokens"
            if caller.tenants is None:
                known = self._store.tiering.index.of(found.key)
                if not known:
                    continue
                reason = "other_namespace"
                detail = f"it is a block of namespace {known[0].name.namespace.digest.hex()[:12]}"
            reasons[number] = BlockReason(found.key, False, 0, reason, detail, None)
        return reasons

    async def _elsewhere(self, caller: Grant, asked: Prompt, found: BlockReason) -> BlockReason:
        """Whether a prompt that was never stored here is stored in another namespace."""
        tokens = asked.tokens
        if found.reason != "never_stored" or tokens is None:
            return found
        pace = Pace()
        for other in (await known_namespaces(self._node, caller)).values():
            size = other.block_tokens
            if other.digest == asked.namespace.digest or len(tokens.ids) < size:
                continue
            extras = engine_extras(tokens, size, range(1))
            (key,) = block_keys(other, tokens.ids[:size], extras=extras)
            if self._store.tiering.index.of(key):
                detail = f"the same tokens are stored in {other.digest.hex()[:12]}, which differs"
                differing = ", ".join(_differences(asked.namespace, other))
                return found._replace(reason="other_namespace", detail=f"{detail} in {differing}")
            await pace.step()
        return found


def _differences(one: Namespace, other: Namespace) -> list[str]:
    pairs = {
        "model": (one.model.name, other.model.name),
        "revision": (one.model.revision, other.model.revision),
        "dtype": (one.model.dtype, other.model.dtype),
        "adapter": (one.model.adapter, other.model.adapter),
        "extra": (sorted(one.model.extra), sorted(other.model.extra)),
        "tenant": (one.tenant, other.tenant),
        "block_tokens": (one.block_tokens, other.block_tokens),
    }
    return [field for field, (left, right) in pairs.items() if left != right]


def _summary(asked: int, hits: int, tiers: dict[int, int], ended: BlockReason | None) -> str:
    if not asked:
        return "The prompt has no whole block."
    where = ", ".join(f"{tiers[tier]} in {TIER_NAMES[tier]}" for tier in sorted(tiers))
    text = f"{hits} of {asked} blocks can be loaded" + (f" ({where})" if where else "")
    if ended is None:
        return f"{text}."
    detail = f" ({ended.detail})" if ended.detail else ""
    return f"{text}; block {hits}: {ended.reason}{detail}."
