"""The boundary to tiers, whose code may be others': what breaks the rules of `Tier` ends here.

It is counted (`tier.faults`), logged, and said in the tier's `problem`; the daemon goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from kvstore.clock import Clock
from kvstore.telemetry import Counters
from kvstore.tiers.base import REASONS, Held, Job, JobDone, ObjectName, State, Tier

_log: Final = logging.getLogger("kvstore.store")

_METHODS: Final = (
    "recover", "probe", "put", "settled", "get", "delete", "touch", "expire", "flush", "close",
)  # fmt: skip
_MOST: Final = 1 << 64
_RAISED: Final = object()


class Guarded:
    """A tier as the store can rely on it: nothing raises, jobs end once, answers are such.

    After a method has raised, the tier counts as failing for `retry_seconds`. After `put` or `get`
    has, nobody knows whether the memory of its jobs is still at work: the tier is `gone`, to be
    closed and opened anew, and these jobs end when it is closed.

    Args:
        tier: the one inside.
        retry_seconds: how long it counts as failing.
        clock: what time it is.
        counters: of the store, on whose loop `post` runs a function; called from any thread.

    Raises:
        AttributeError: it lacks something that tiers have.
    """

    def __init__(
        self,
        tier: Tier,
        retry_seconds: float,
        clock: Clock,
        counters: Counters,
        post: Callable[[Callable[[], None]], None],
    ) -> None:
        self.name, self.shared = tier.name, bool(tier.shared)
        self.segmented = bool(getattr(tier, "segmented", False))
        for method in _METHODS:
            getattr(tier, method)
        self.tier = tier
        """The one inside."""
        self._retry_seconds = retry_seconds
        self._clock = clock.monotonic
        self._counters = counters
        self._post = post
        self._jobs: dict[Job, JobDone] = {}  # under way
        self._unknown: list[Job] = []  # Whether these are is not known.
        self._fault = ""
        self._until = self._failing_until = 0.0
        self.broken = False
        """Whether it has to be opened anew."""

    @property
    def state(self) -> State:
        """See `Tier.state`."""
        if self.broken:
            return State(False, False, self._fault, gone=True)
        if self._until and self._clock() < self._failing_until:
            return State(False, False, self._fault)
        try:
            state = self.tier.state
            if not isinstance(state, State):
                raise TypeError(f"{type(state).__name__} is no State")
        except Exception as e:  # noqa: BLE001 - it is logged, and said
            self._raised("state", e)
            return State(False, False, self._fault)
        if self._until and self._clock() < self._until and not state.problem:
            state = state._replace(problem=self._fault)
        return state

    @property
    def counters(self) -> dict[str, int]:
        """See `Tier.counters`."""
        try:
            counters = self.tier.counters
            return {str(name): int(count) for name, count in counters.items()}
        except Exception as e:  # noqa: BLE001 - it is logged, and said
            self._raised("counters", e)
            return {}

    def recover(self) -> Iterator[Held]:
        """See `Tier.recover`."""
        try:
            for held in self.tier.recover():
                if held is None or not _sound(held):
                    raise TypeError(f"{held!r:.80} is no whole Held")
                yield held
        except Exception as e:  # noqa: BLE001 - it is logged, and said
            self._raised("recover", e)

    def probe(self, names: Sequence[ObjectName], done: Callable[[list[Held | None]], None]) -> None:
        """See `Tier.probe`; an answer that is none is an empty one."""
        waiting = [done]

        def answer(found: list[Held | None]) -> None:
            if not isinstance(found, list) or len(found) not in (0, len(names)):
                self._notice("probe was not answered with as many as it was asked for")
                found = []
            elif not all(map(_sound, found)):
                self._notice("probe was answered with what is no Held")
                found = []
            tell(found)

        def tell(found: list[Held | None]) -> None:
            try:
                waiting.pop()(found)
            except IndexError:
                self._notice("probe was answered twice")

        if self._call("probe", names, answer) is _RAISED:
            tell([])

    def put(self, jobs: Sequence[Job], done: JobDone) -> None:
        """See `Tier.put`."""
        self._begin("put", jobs, done)

    def get(self, jobs: Sequence[Job], done: JobDone) -> None:
        """See `Tier.get`."""
        self._begin("get", jobs, done)

    def _begin(self, what: str, jobs: Sequence[Job], done: JobDone) -> None:
        for job in jobs:
            self._jobs[job] = done
        if self._call(what, jobs, self._ended) is _RAISED:
            self._unknown += jobs
            self.broken = True

    def _ended(self, job: Job, error: str | None) -> None:
        """A job has, on any thread."""
        try:
            done = self._jobs.pop(job)
        except (KeyError, TypeError):
            self._notice("done was called for a job that had ended, or that is none")
            return
        if error is not None and error not in REASONS:
            self._notice(f"jobs fail for a reason that there is not: {error!r:.40}")
            error = "io_error"
        done(job, error)

    def settled(self, job: Job, error: str | None) -> None:
        """See `Tier.settled`."""
        self._call("settled", job, error)

    def delete(self, names: Sequence[ObjectName]) -> None:
        """See `Tier.delete`."""
        self._call("delete", names)

    def touch(self, names: Sequence[ObjectName], *, used: bool = True) -> None:
        """See `Tier.touch`."""
        self._call("touch", names, used=used)

    def cool(self, names: Sequence[ObjectName]) -> None:
        """See `Tier`; not all have it."""
        if hasattr(self.tier, "cool"):
            self._call("cool", names)

    def expire(self, held: Sequence[Held]) -> None:
        """See `Tier.expire`."""
        self._call("expire", held)

    def recodes(self, name: ObjectName, codec: str) -> bool:
        """See `CodedTier.recodes`, which other tiers have not."""
        return hasattr(self.tier, "recodes") and self._call("recodes", name, codec) is True

    def recode(self, name: ObjectName, codec: str | None) -> None:
        """See `CodedTier.recode`; for tiers that answered `recodes`."""
        self._call("recode", name, codec)

    def flush(self, seconds: float) -> bool:
        """See `Tier.flush`."""
        return self._call("flush", seconds) is True

    def close(self) -> None:
        """See `Tier.close`."""
        self._call("close")
        unknown, self._unknown = self._unknown, []
        for job in unknown:
            if job in self._jobs:
                self._ended(job, "closed")

    def _call(self, what: str, *about: Any, **how: bool) -> Any:
        """What a method returns; `_RAISED` if it has raised."""
        try:
            return getattr(self.tier, what)(*about, **how)
        except Exception as e:  # noqa: BLE001 - it is logged, and said
            self._raised(what, e)
            return _RAISED

    def _raised(self, what: str, error: Exception) -> None:
        self._failing_until = self._clock() + self._retry_seconds
        self._notice(f"{what} raised {type(error).__name__}: {str(error)[:100]}", error)

    def _notice(self, what: str, error: Exception | None = None) -> None:
        """A rule was broken; on any thread."""
        fault = f"its {what}; this is a fault of what offers the kind of tier: report it there"
        if fault != self._fault or self._clock() >= self._until:
            _log.error("tier %s: %s", self.name, fault, exc_info=error)
        self._fault, self._until = fault, self._clock() + self._retry_seconds
        self._post(lambda: self._counters.add("tier.faults", self.name))


def _sound(held: object) -> bool:
    """Whether an answer of a tier has what it must have."""
    return held is None or (
        isinstance(held, Held)
        and isinstance(held.name, ObjectName)
        and (held.checksum is None or type(held.checksum) is int)
        and all(
            type(n) is int and 0 <= n < _MOST for n in (held.nbytes, held.created, held.expires)
        )
    )
