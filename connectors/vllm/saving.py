"""What is saved of requests: when, under which keys, and out of which of their pages."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from kvstore.connectors.common.settings import Settings
from kvstore.connectors.common.transfers import NO_PAGES, Job, page_rows
from kvstore.connectors.vllm.inputs import Inputs
from kvstore.connectors.vllm.layout import Pages
from kvstore.connectors.vllm.requests import Saving, Tracked, stored_events
from kvstore.connectors.vllm.tails import TAIL_SECONDS, filled
from kvstore.connectors.vllm.windows import Rows, Windows


class Saves:
    """Jobs that save. Used by the scheduler's thread.

    `groups` look back on all tokens, `windows` knows of those that do not; `numbers` counts all
    jobs. `events` are those of what is new, None: nobody wants them. The KV of the last `unsettled`
    tokens is written again.
    """

    def __init__(
        self, settings: Settings, block_tokens: int, page_tokens: int, ranks: int, inputs: Inputs,
        groups: Sequence[Pages], windows: Windows | None, numbers: Iterator[int], *, events: bool,
        unsettled: int = 0,
    ) -> None:  # fmt: skip
        self._published = settings.config.session.publish_tokens
        self._block_tokens, self._page_tokens = block_tokens, page_tokens
        self._ranks = ranks
        self._inputs = inputs
        self._groups, self._windows = groups, windows
        self._numbers, self._unsettled = numbers, unsettled
        self.events: list[Any] | None = [] if events else None
        self._running: dict[int, Saving] = {}
        self._new: list[Job] = []

    def save(
        self, tracked: Tracked, computed: int, state: Any, ids: Sequence[list[int]] | None
    ) -> None:
        """Have workers save the blocks that are whole after `computed` tokens.

        Drafts and tokens that are still on their way back are computed before they are known; a
        block that has some is not whole yet.
        """
        size = self._block_tokens
        settled = min(computed, len(tracked.tokens)) - self._unsettled
        known = max(0, min(settled, tracked.exact, tracked.drafted)) // size
        hands_on = tracked.wishes.do_remote_decode and tracked.handoff.partial
        # Not later: what lies behind it then is the request's own. Nor without the draft's part.
        tail = hands_on and computed == tracked.request.num_prompt_tokens <= tracked.drafted
        if (known <= tracked.asked and not tail) or tracked.wishes.skip_save:
            return
        if tracked.tainted or not self._is_sure(tracked):
            return
        if ids is None:
            ids = state.get_block_ids(tracked.request.request_id)
        for first, last in tracked.to_save(known):
            # Windows go first: their pages may leave the request.
            for start, rows in self._windows.to_save(ids, first, last) if self._windows else ():
                number = self._put(tracked, start, start + len(rows[0]), (), rows)
                assert self._windows is not None
                self._windows.saving(number, tracked.request.request_id, start, rows)
            if full := rows_of(self._groups, size, ids, first, last, last * size):
                self._put(tracked, first, last, full)
        if tail:
            rows = rows_of(self._groups, size, ids, known, known + 1, computed)
            self._put(tracked, known, known + 1, tuple(map(filled, rows)), tail=True)
            tracked.handoff.partial = False  # It is saved once.

    def _put(
        self, tracked: Tracked, first: int, last: int, full: Rows, windows: Rows = (),
        *, tail: bool = False,
    ) -> int:  # fmt: skip
        request, size, keys = tracked.request, self._block_tokens, tracked.extend_keys()
        ttl = tracked.wishes.ttl
        job = Job(
            next(self._numbers),
            request.request_id,
            tracked.namespace.tenant,
            [tracked.handoff.tail] if tail else keys[first:last],
            full[0] if full else NO_PAGES,
            tracked.wishes.priority,
            ttl=min(ttl or TAIL_SECONDS, TAIL_SECONDS) if tail else ttl,
            parent=keys[first - 1] if first else b"",
            tokens=request.all_token_ids[first * size : last * size]
            if self._published and not tail
            else None,
            position=first,
            beside=full[1:],
            windows=windows,
            lacks=tracked.handoff.lacks if tail else 0,
            decoder=tracked.handoff.decoder,
        )
        tracked.saving.add(job.number)
        told = not (job.windows and self._groups) and not tail and not job.decoder
        self._running[job.number] = Saving(tracked, first, last - first, self._ranks, told=told)
        self._new.append(job)
        return job.number

    def _is_sure(self, tracked: Tracked) -> bool:
        """Whether vLLM has loaded the adapter that the keys name; once there is a token, it has.

        While the request waited, the adapter's files may have been replaced.
        """
        request = tracked.request
        if request.lora_request is None or tracked.sure:
            return True
        if request.num_tokens > request.num_prompt_tokens:
            tracked.sure = self._inputs.still(request)
            tracked.tainted |= not tracked.sure
        return tracked.sure

    def saved(self, number: int, ranks: int, blocks: int, new: frozenset[int]) -> Tracked | None:
        """So many ranks are done with a job. Of whom it was, once all are."""
        saving = self._running.get(number)
        if saving is None:
            return None
        saving.ranks -= ranks
        saving.blocks = min(saving.blocks, blocks)
        saving.new |= new
        if saving.ranks > 0:
            return None
        del self._running[number]
        saving.tracked.saving.discard(number)
        if self._windows is not None:
            self._windows.saved(number)
        if self.events is not None and saving.told:
            self.events += stored_events(saving, self._block_tokens, self._page_tokens)
        return saving.tracked

    def take(self) -> list[Job]:
        """Those that workers have not been told of."""
        new, self._new = self._new, []
        return new

    def drop(self, requests: Collection[str]) -> list[Job]:
        """The same of these requests: workers are not told of them."""
        dropped = [job for job in self._new if job.request in requests]
        self._new = [job for job in self._new if job.request not in requests]
        return dropped


def rows_of(
    groups: Sequence[Pages], size: int, ids: Sequence[list[int]], first: int, last: int, end: int
) -> Rows:
    """Pages of blocks `first` to `last`, up to token `end`, of groups that keep all."""
    return tuple(
        page_rows(ids[g.number][: -(-end // g.page_tokens)], g.page_tokens, size, first, last)
        for g in groups
    )
