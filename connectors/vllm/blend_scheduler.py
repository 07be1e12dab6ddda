"""Selective recompute in the scheduler: the pieces a prompt is promised, and where exactness ends.

From the first approximate token on, a request's KV has no name that anybody else could ask for:
vLLM's hashes of its pages are replaced by chance, and the connector saves none of its blocks.
"""

from __future__ import annotations

import itertools
import os
import time
import zlib
from collections import OrderedDict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from vllm.logger import init_logger
from vllm.tokenizers import cached_tokenizer_from_config

from kvstore.blend.calibration import uncalibrated
from kvstore.blend.pieces import (
    BASE,
    SHORTEST,
    PieceIndex,
    filler,
    named,
    piece_keys,
    piece_namespace,
    search,
)
from kvstore.blend.reuse import Reuse, asked, too_little
from kvstore.blend.selection import SELECTIONS
from kvstore.blocks.spec import Namespace
from kvstore.client.planner import MEMORY
from kvstore.connectors.common.sessions import Sessions
from kvstore.connectors.vllm.blend_refusals import OFF, Refusal, refusal
from kvstore.connectors.vllm.blending import Blending
from kvstore.connectors.vllm.messages import Blend, Blended, Ready, Registered, piece_part
from kvstore.errors import KVStoreError, SpecError
from kvstore.telemetry import QuietLog

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvstore.connectors.common.settings import Settings
    from kvstore.connectors.common.stats import Stats
    from kvstore.connectors.vllm.layout import Pages
    from kvstore.connectors.vllm.requests import Tracked

_log = init_logger("vllm.kvstore.blend")

_OPENING: Final = 1.0
"""Seconds that a request waits for its tenant's session of pieces."""
_POLL: Final = 0.01
"""Seconds between two questions while pieces come up into memory."""
_REST: Final = 1.0
"""Seconds not to ask a store that did not answer."""
_PATIENCE: Final = 0.5
"""Seconds that a step waits for pieces, beyond four times what is expected."""
_TENANTS: Final = 256
"""Of whom pieces are known, to be found in prompts."""
_DONE: Final = ("miss", "pending")


class BlendScheduler:
    """Used by the scheduler's thread."""

    def __init__(
        self, settings: Settings, namespace: Namespace, pages: Pages, config: Any, stats: Stats
    ) -> None:
        """`namespace` is that of exact blocks.

        Raises:
            KVStoreError: the store refused the session.
        """
        self._stats, self._page_tokens = stats, pages.page_tokens
        self._shadow = settings.shadow
        self._refused: Refusal | None = OFF
        self._sessions: Sessions | None = None
        self._known: OrderedDict[str, PieceIndex] = OrderedDict()
        self._numbers = itertools.count(1)
        self._promised: dict[int, Blending] = {}
        self._rest_until = 0.0
        self._quiet = QuietLog(_log)
        if not settings.approximate:
            return
        self._refused = refusal(config, pages)
        missing = settings.approximate != "uncalibrated" and uncalibrated(namespace.model)
        if self._refused is None and missing:
            self._refused = Refusal("uncalibrated", missing)
        if self._refused is None:
            self._before = _filler(config.model_config)
            self._namespace = piece_namespace(namespace, self._before)
            parts = [piece_part(part) for part in pages.parts]
            self._sessions = Sessions(settings.config, self._namespace, parts)
            self._sessions.open(settings.tenant)
            self._refused = Refusal("engine", "its workers have not said that they can")
        else:
            self._say()

    def ready(self, workers: Iterable[Ready]) -> None:
        """Take the workers' word; one that cannot speaks for all."""
        if self._sessions is not None:
            problem = next((one.problem for one in workers if one.problem), "")
            self._refused = Refusal("engine", problem) if problem else None
            self._say()

    def _say(self) -> None:
        if self._refused is not None:
            words = "KVStore: no approximate reuse, every request is exact: %s: %s"
            _log.warning(words, self._refused.name, self._refused.words)

    # -- before a request runs --------------------------------------------------------------------

    def arrived(self, request: Any) -> Blending | None:
        """What a new request asks of pieces; None: nothing."""
        try:
            reuse = asked(request.kv_transfer_params, request.num_tokens)
        except SpecError as e:
            self._quiet.warning("wish", "kv_transfer_params: %s; the request is exact", e)
            self._stats.approximate("malformed")
            registers = "piece" in request.kv_transfer_params
            return Blending(Reuse(approximate=not registers), reason="malformed")
        return Blending(reuse) if reuse.approximate or reuse.piece else None

    def promise(self, tracked: Tracked, start: int, manager: Any) -> int | None:
        """How many tokens beyond exact `start` come of pieces; None: ask again later.

        Asked again, it promises the same pieces beyond another start. vLLM's `manager` of pages
        knows by how many tokens it hashes them.
        """
        blending = tracked.blending
        if blending is None or not blending.reuse.approximate or blending.reason:
            return 0
        try:
            return self._promise(tracked, blending, start, manager)
        except Exception:  # noqa: BLE001 - the request is exact then
            _log.exception("pieces of a request could not be promised")
            blending.drop("failed")
            return 0

    def _promise(
        self, tracked: Tracked, blending: Blending, start: int, manager: Any
    ) -> int | None:
        request = tracked.request
        if blending.placed is None:
            blending.reason = self._reason(tracked, blending)
            if not blending.reason and not self._ask(tracked, blending):
                return None
            if blending.reason:
                self._stats.approximate(blending.reason)
                return 0
        blending.allocated = False
        # The last token is left to compute: its logits start the answer.
        last, blending.start = request.num_prompt_tokens - 1, start
        blending.end = min(last, max((one.end for one, _ in blending.placed or ()), default=0))
        pieces = blending.pieces()
        reason, reuse = "", blending.reuse
        if pieces and blending.first is None:
            spans = [(piece.start, piece.end) for piece in pieces]
            reason = too_little(spans, reuse, request.num_prompt_tokens - start)
        elif blending.first is None:
            reason = "prefix"
        if reason:
            blending.reason = reason
            self._stats.approximate(reason)
        if reason or not pieces:
            blending.end = start
            return 0
        blending.end = pieces[-1].end
        if blending.first is None or pieces[0].start < blending.first:
            blending.first = pieces[0].start
            _unname(request, blending.first, manager.block_pool.hash_block_size)
        return blending.end - start

    def _reason(self, tracked: Tracked, blending: Blending) -> str:
        """Why a request must be exact; empty: it need not."""
        if self._refused is not None:
            return self._refused.name
        if SELECTIONS[blending.reuse.selection].needs == "deviation":
            return "selection"
        if blending.reuse.repair:
            return "repair"
        return next((name for name, value in tracked.extras.items() if value), "")

    def _ask(self, tracked: Tracked, blending: Blending) -> bool:
        """Ask the store for a prompt's pieces; False: not all of them are there yet."""
        assert self._sessions is not None
        now, tenant = time.monotonic(), tracked.namespace.tenant
        if now - blending.asked < _POLL:
            return False
        blending.until = blending.until or now + _OPENING
        session = "resting" if now < self._rest_until else self._sessions.get(tenant)
        if isinstance(session, str):
            if session == "opening" and now < blending.until:
                return False
            blending.reason = session
            return True
        if blending.found is None:
            prompt, spans = tracked.request.prompt_token_ids, blending.reuse.pieces
            blending.found = (
                search(prompt, self._index(tenant), session.namespace, session.known)
                if spans is None
                else named(prompt, spans)
            )
        found = blending.found
        if found and all(one.end - one.start < SHORTEST for one in found):
            blending.reason = "short"
            return True
        keys = [piece_keys(session.namespace, one.piece) for one in found]
        wanted = [key for each in keys for key in each]
        answer = session.lookup(wanted, holes=True, again=blending.asked > 0)
        if answer.reason == "unavailable":
            self._rest_until, blending.reason = now + _REST, answer.reason
            return True
        placed, at, below = [], 0, False
        for one, each in zip(found, keys, strict=True):
            tiers = answer.tiers[at : at + len(each)]
            at += len(each)
            if len(tiers) < len(each) or not set(tiers).isdisjoint(_DONE):
                continue
            placed.append((one, each))
            if set(tiers) != {MEMORY}:
                below = True
                if not blending.asked:
                    session.prefetch(each)
        if below and not blending.asked:
            blending.until = now + 1.0 + 4 * answer.seconds
        blending.asked = now
        if below and now < blending.until:
            return False
        blending.placed, blending.missed = placed, len(found) - len(placed)
        blending.seconds = answer.seconds
        blending.reason = "" if placed else "missed" if found else "no_pieces"
        for one, _ in placed:
            self._index(tenant).add(one.piece)
        return True

    def _index(self, tenant: str) -> PieceIndex:
        """The pieces of a tenant that are known here."""
        index = self._known.pop(tenant, None) or PieceIndex(1 << 20)
        self._known[tenant] = index
        if len(self._known) > _TENANTS:
            self._known.popitem(last=False)
        return index

    # -- with its step ----------------------------------------------------------------------------

    def step(
        self, tracked: Tracked, computed: int, page_ids: list[int]
    ) -> tuple[Blend | None, Registered | None]:
        """What workers do around the step after which `computed` tokens of a request are."""
        blending, request = tracked.blending, tracked.request
        if blending is None or self._sessions is None:
            return None, None
        tokens, tenant = request.prompt_token_ids, tracked.namespace.tenant
        namespace = Namespace(self._namespace.model, tenant, self._namespace.block_tokens)
        if blending.allocated:
            self._promised.pop(blending.number, None)
            pieces = blending.send(next(self._numbers))
            self._promised[blending.number] = blending
            known = min(computed, len(tokens))
            reuse, timeout = blending.reuse, _PATIENCE + 4 * blending.seconds
            job = Blend(
                blending.number, namespace, page_ids, tokens[:known], blending.start, blending.end,
                pieces, reuse.selection, reuse.recompute, timeout, self._shadowed(request),
            )  # fmt: skip
            return job, None
        if blending.reuse.piece is None or blending.registered or tracked.wishes.skip_save:
            return None, None
        start, end = blending.reuse.piece
        if computed < end or tracked.tainted:
            return None, None
        blending.registered = True
        blending.reason = self._reason(tracked, blending)
        filled = start == BASE and np.array_equal(tokens[:BASE], self._before)
        piece = np.array(tokens[start:end], dtype=np.uint32)
        keys = piece_keys(namespace, piece)
        if not blending.reason:
            blending.reason = self._unheld(tenant, keys) if filled else "no_filler"
        if not blending.reason:
            try:
                self._index(tenant).add(piece)
            except SpecError as e:
                self._quiet.warning("piece", "%s", e)
                blending.reason = "length"
        if blending.reason:
            self._stats.approximate(blending.reason)
            return None, None
        return None, Registered(namespace, page_ids, start, end, keys, tracked.wishes.ttl)

    def _unheld(self, tenant: str, keys: list[bytes]) -> str:
        """Why nobody would keep a piece, as far as is known now; empty: it goes to the store."""
        assert self._sessions is not None
        session = self._sessions.get(tenant)
        if isinstance(session, str):
            return session if session == "refused" else ""
        now = time.monotonic()
        if now >= self._rest_until and session.lookup(keys[:1], again=True).reason == "unavailable":
            self._rest_until = now + _REST
        return "unavailable" if now < self._rest_until else ""

    def done(self, blended: dict[int, Blended]) -> None:
        """Take in what came of requests."""
        for number, came in blended.items():
            if blending := self._promised.pop(number, None):
                blending.came = came
                if came.kl is not None:
                    self._stats.shadowed(came.kl)

    def _shadowed(self, request: Any) -> bool:
        """Whether a request is computed in full as well."""
        return zlib.crc32(request.request_id.encode()) < self._shadow * (1 << 32)

    def finished(self, blending: Blending | None) -> dict[str, Any] | None:
        """What the response to a request says of it."""
        if blending is None:
            return None
        if not blending.reuse.approximate:
            reason = blending.reason
            if not (reason or blending.registered):
                reason = self._refused.name if self._refused is not None else "not_computed"
            return {"piece": {"reason": reason} if reason else {}}
        told = blending.account()
        self._promised.pop(blending.number, None)
        if blending.number:
            self._stats.approximate(
                told.get("reason", "blended"), told["reused"], told["recomputed"]
            )
        return {"approximate": told}

    def close(self) -> None:
        """End the sessions."""
        if self._sessions is not None:
            self._sessions.close()


def _unname(request: Any, first: int, hashed: int) -> None:
    """Have nobody find what the request has from token `first` on.

    A number of its own stands in place of the hash of the run with that token, also while the run
    is not whole; those of later ones are chained to it.
    """
    del request.block_hashes[first // hashed :]
    request.block_hashes.append(os.urandom(32))
    request.update_block_hashes()


def _filler(model: Any) -> NDArray[np.uint32]:
    """What pieces of this engine's model stand behind."""
    tokenizer = cached_tokenizer_from_config(model)
    try:
        return filler(None if tokenizer is None else tokenizer.encode, model.get_vocab_size())
    except KVStoreError:
        return filler(None, model.get_vocab_size())
