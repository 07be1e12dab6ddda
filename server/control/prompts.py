"""The verbs of the API that ask about a prompt: what is stored of it, and why not more."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, Final

from kvstore.api import v1
from kvstore.api.convert import duration, namespace_message, timestamp
from kvstore.blend.pieces import LONGEST, SHORTEST, has_pieces_of, piece_keys
from kvstore.blocks.keys import block_keys, token_array
from kvstore.blocks.spec import Namespace
from kvstore.server.control.errors import bad_field
from kvstore.server.control.requests import Answers, Prompt, engine_extras, slices
from kvstore.server.loop import paced
from kvstore.store.explain import BlockReason, explain, surveying
from kvstore.store.ordering import MOST_PIECES, ordering

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_SLICE: Final = 64
"""Blocks looked at before others have their turn."""

_OF_STORED: Final = frozenset({"stored", "writing", "incomplete"})
"""Reasons of blocks that are in the namespace, wholly or in part."""


class PromptVerbs(Answers):
    """Answers what is stored of a prompt."""

    async def lookup(self, request: v1.LookupRequest) -> v1.LookupResponse:
        asked = await self._prompt(request.prefix)
        found = await paced(surveying(self._store, asked.namespace, asked.keys))
        tiers, lowers = found.tiers, self._store.movement.lowers
        reason = ""
        if len(tiers) < len(asked.keys):
            reason = self._explained(asked, [asked.keys[len(tiers)]])[0].reason
        runs = []
        for tier, run in groupby(enumerate(tiers), key=lambda item: item[1]):
            first, *rest = (number for number, _ in run)
            runs.append(
                v1.Run(
                    first=first, blocks=1 + len(rest), tier=self._name(tier), node=self._node.name
                )
            )
        return v1.LookupResponse(
            blocks=len(tiers),
            tokens=len(tiers) * asked.namespace.block_tokens,
            asked_blocks=len(asked.keys),
            runs=runs,
            reason=reason,
            estimate=duration(
                sum(lowers[n].cost.seconds(b) for n, b in found.nbytes.items() if n in lowers)
            ),
            namespace_id=asked.namespace.digest.hex(),
            **await self._pieces(asked, request.pieces),
        )

    async def _pieces(self, asked: Prompt, pieces: Sequence[v1.Piece]) -> dict[str, Any]:
        """The best order of pieces, and what is stored of them, if there are any."""
        if not pieces:
            return {}
        tokens, size = asked.tokens, asked.namespace.block_tokens
        if tokens is None or tokens.media or tokens.extras:
            raise bad_field("pieces", "are of prompts of tokens alone, without media and extras")
        if len(pieces) > MOST_PIECES:
            raise bad_field("pieces", f"are {len(pieces)}; give up to {MOST_PIECES}")
        end, close = pieces[0].start, len(pieces) > 1
        for number, piece in enumerate(pieces):
            if not end <= piece.start < piece.end <= len(tokens.ids):
                what = f"is {piece.start} to {piece.end} of {len(tokens.ids)} tokens"
                raise bad_field(f"pieces[{number}]", f"{what}; give them in order, none in another")
            close, end = close and piece.start == end, piece.end
        spans = [(piece.start, piece.end) for piece in pieces]
        found = await self._by_themselves(asked.namespace, token_array(tokens.ids), spans)
        if not close:
            return found
        extras = engine_extras(tokens, size, range(len(tokens.ids) // size))
        order, blocks = await paced(
            ordering(self._store, asked.namespace, tokens.ids, spans, extras)
        )
        return found | {"order": order, "order_tokens": blocks * size}

    async def _by_themselves(
        self, exact: Namespace, ids: NDArray[np.uint32], spans: Sequence[tuple[int, int]]
    ) -> dict[str, Any]:
        """What of pieces is stored to be reused behind other text, where most of them is."""
        best: list[v1.StoredPiece] = []
        most = 0
        async for space in self._pace.over((await self._namespaces()).values()):
            if has_pieces_of(space, exact):
                found = [await self._by_itself(space, ids[start:end]) for start, end in spans]
                each = zip(found, spans, strict=True)
                whole = sum(end - start for one, (start, end) in each if not one.reason)
                if not best or whole > most:
                    best, most = found, whole
        return {"pieces": best, "piece_tokens": most}

    async def _by_itself(self, space: Namespace, ids: NDArray[np.uint32]) -> v1.StoredPiece:
        if not SHORTEST <= len(ids) <= LONGEST:
            reason = "short" if len(ids) < SHORTEST else "long"
            detail = f"pieces have {SHORTEST} to {LONGEST} tokens"
            return v1.StoredPiece(namespace_id=space.digest.hex(), reason=reason, detail=detail)
        keys = piece_keys(space, ids)
        tiers = (await paced(surveying(self._store, space, keys))).tiers
        piece = v1.StoredPiece(
            namespace_id=space.digest.hex(),
            blocks=len(tiers),
            asked_blocks=len(keys),
            tier=self._name(tiers[0]) if tiers else "",
        )
        if len(tiers) < len(keys):
            (why,) = explain(self._store, space, [keys[len(tiers)]])
            piece.reason, piece.detail = why.reason, why.detail
        return piece

    async def explain(self, request: v1.ExplainRequest) -> bytes:
        asked = await self._prompt(request.prefix)
        pieces: list[bytes] = []
        hits = Counter[int]()
        ended: BlockReason | None = None
        number = 0
        async for keys in self._pace.over(slices(asked.keys, _SLICE)):
            reply = v1.ExplainResponse()
            for found in self._explained(asked, keys):
                usable = found.usable and ended is None
                if usable:
                    hits[found.tier] += 1
                elif ended is None:
                    if number == 0:
                        found = await self._elsewhere(asked, found)
                    ended = found
                reply.blocks.add(
                    block=number,
                    key=found.key,
                    usable=usable,
                    tier=self._name(found.tier),
                    reason=found.reason,
                    detail=found.detail or ("" if usable else "a block before it is missing"),
                    at=None if found.at is None else timestamp(found.at),
                )
                number += 1
            # In pieces, which joined make one message: a long answer takes long to encode.
            pieces.append(reply.SerializeToString())
        head = v1.ExplainResponse(
            namespace_id=asked.namespace.digest.hex(),
            hit_blocks=sum(hits.values()),
            summary=_summary(len(asked.keys), self._by_name(hits), ended),
        )
        return b"".join([head.SerializeToString(), *pieces])

    def _explained(self, asked: Prompt, keys: Sequence[bytes]) -> list[BlockReason]:
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
            if self._caller.tenants is None:
                known = self._store.index.of(found.key)
                if not known:
                    continue
                reason = "other_namespace"
                detail = f"it is a block of namespace {known[0].name.namespace.digest.hex()[:12]}"
            reasons[number] = BlockReason(found.key, False, 0, reason, detail, None)
        return reasons

    async def _elsewhere(self, asked: Prompt, found: BlockReason) -> BlockReason:
        """Whether a prompt that was never stored here is stored in another namespace."""
        tokens = asked.tokens
        if found.reason != "never_stored" or tokens is None:
            return found
        async for other in self._pace.over((await self._namespaces()).values()):
            size = other.block_tokens
            if other.digest == asked.namespace.digest or len(tokens.ids) < size:
                continue
            extras = engine_extras(tokens, size, range(1))
            (key,) = block_keys(other, tokens.ids[:size], extras=extras)
            if self._store.index.of(key):
                detail = f"the same tokens are stored in {other.digest.hex()[:12]}, which differs"
                differing = ", ".join(_differences(asked.namespace, other))
                return found._replace(reason="other_namespace", detail=f"{detail} in {differing}")
        return found


def _differences(one: Namespace, other: Namespace) -> list[str]:
    left, right = namespace_message(one), namespace_message(other)
    names = (field.name for field in v1.Namespace.DESCRIPTOR.fields if field.name != "id")
    return [name for name in names if getattr(left, name) != getattr(right, name)]


def _summary(asked: int, hits: dict[str, int], ended: BlockReason | None) -> str:
    if not asked:
        return "The prompt has no whole block."
    where = ", ".join(f"{blocks} in {tier}" for tier, blocks in hits.items())
    text = f"{sum(hits.values())} of {asked} blocks can be loaded" + (
        f" ({where})" if where else ""
    )
    if ended is None:
        return f"{text}."
    detail = f" ({ended.detail})" if ended.detail else ""
    return f"{text}; block {sum(hits.values())}: {ended.reason}{detail}."
