"""A shared tier of segments, but for its medium: a segment is put once, and read block by block."""

from __future__ import annotations

import errno
import logging
import math
import threading
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Final

from kvstore._native import xxh3_64
from kvstore.tiers.base import (
    Held,
    Host,
    InSegment,
    Job,
    JobDone,
    ObjectName,
    State,
    kept_sum,
)  # fmt: skip
from kvstore.tiers.options import TierOptions
from kvstore.tiers.remote import Breaker, Crew, Shared
from kvstore.tiers.segments.format import Segment, decode, nbytes_of, path_of, shape_of
from kvstore.tiers.segments.put import Changed, Put, segment_of
from kvstore.tiers.slab.direct import reason_of
from kvstore.tiers.tasks import Task
from kvstore.tiers.vitals import Vitals

_NEW: Final = 0.2
"""What a look weighs among those before."""
_CLOSE_SECONDS: Final = 5.0


@dataclass(slots=True, eq=False)
class _Work(Job):
    """A put, or an errand: `run` does it, and says why it could not, or raises."""

    run: Callable[[], str | None] = lambda: None


class SegmentTier(Shared, ABC):
    """A `Tier` of segments on a medium that others write to, too. Opening it may block.

    What is there under a segment's name stays: it is never overwritten. `what` names the medium for
    people, `threads` is how many read, write, and run errands; a put may take `upload_seconds`. A
    medium raises OSError, of which FileNotFoundError alone means that a segment is not there.
    """

    segmented = True
    watched = False
    """It is looked after also where nothing failed."""

    def __init__(
        self,
        name: str,
        host: Host,
        what: str,
        options: TierOptions,
        threads: tuple[int, int, int],
        upload_seconds: float = 0.0,
    ) -> None:
        self.name = name
        self._host = host
        self._logger = logging.getLogger(f"kvstore.{name}")
        self._vitals = Vitals(what, self._logger)
        self._breaker = Breaker(options.retry_seconds)
        self._retry_seconds = options.retry_seconds
        self._closed = self._ended = False
        self._fault, self._no_writes_until, self._check_at = "", 0.0, 0.0
        self._look_seconds, self._changed = 1e-3, threading.Condition()
        self._going: set[str] = set()
        """Paths of segments that are to be deleted, or just being so."""
        self._going_on: list[InSegment] = []  # when the medium is well again
        (readers, writers, runners), stall = threads, options.stall_seconds
        long, apart = max(stall, upload_seconds), Vitals(what, self._logger)
        self._gets = Crew(name, readers, self._run_gets, self._vitals, stall)
        self._puts = Crew(f"{name}-put", writers, self._run_each, self._vitals, long)
        self._errands = Crew(f"{name}-ask", runners, self._run_each, apart, stall)
        self._crews = self._gets, self._puts, self._errands

    # --- The medium; in its threads ---------------------------------------------------------------

    @abstractmethod
    def _check(self) -> None:
        """Raise OSError unless the medium can be used."""

    @abstractmethod
    def _head(self, path: str, nbytes: int) -> bytes:
        """So many bytes from the start of a segment, or fewer if it is shorter."""

    @abstractmethod
    def _store(self, path: str, put: Put) -> bool:
        """Put a segment, sealed; False: there is one already."""

    @abstractmethod
    def _load(self, path: str, offset: int, jobs: Sequence[Job]) -> Sequence[int | None]:
        """Bring blocks that follow each other, from the offset of the first; the XXH3 of each.

        None for those that are not there as a whole.
        """

    @abstractmethod
    def _remove(self, path: str) -> None:
        """Delete a segment; it may be gone already."""

    def _admit(self, name: InSegment, nbytes: int) -> str | None:
        """Make room for a segment; why there is none. On the loop."""
        return None

    def _learn(self, name: InSegment) -> object:
        """A segment is asked for, and may become busy. On the loop."""

    # --- What it is like --------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """See `Tier.state`."""
        now, alive = time.monotonic(), not self._closed
        well = alive and self._breaker.reason is None
        if alive and (self._breaker.may_try() if not well else now >= self._check_at):
            self._check_at = now + (self._retry_seconds if self.watched else math.inf)
            self._run(self._check)
        return self._vitals.state(
            readable=well and not (self._gets.stalled or self._errands.stalled),
            writable=well and now >= self._no_writes_until and not self._puts.stalled,
            fixed_seconds=self._look_seconds,
        )

    # --- What the store asks for ------------------------------------------------------------------

    def probe(self, names: Sequence[ObjectName], done: Callable[[list[Held | None]], None]) -> None:
        """See `Tier.probe`."""
        answers: list[Held | None] = [None] * len(names)
        asked: dict[object, tuple[InSegment, list[int]]] = {}
        for number, name in enumerate(names):
            if isinstance(name, InSegment):
                segment = name.keys[-1], name.part.variant, name.namespace.digest
                asked.setdefault(segment, (name, []))[1].append(number)
        left, lock = len(asked), threading.Lock()

        def look(name: InSegment, numbers: list[int]) -> None:
            found = self._find(name)
            for number in numbers if found is not None else ():
                answers[number] = _held(names[number], found)

        def ended(numbers: list[int], error: str | None) -> None:
            nonlocal left
            for number in numbers if error is not None else ():
                answers[number] = Held(names[number], 0, None, 0, 0)  # Not known.
            with lock:
                left -= 1
                if left:
                    return
            done(answers)

        if not asked:
            done(answers)
        elif self._closed or self._breaker.reason is not None:
            done([])
        else:
            for name, numbers in asked.values():
                self._learn(name)
                self._run(partial(look, name, numbers), partial(ended, numbers))

    def put(self, jobs: Sequence[Job], done: JobDone) -> None:
        """See `Tier.put`."""
        for _, some in groupby(jobs, lambda job: (getattr(job.name, "keys", job), job.name.part)):
            segment = list(some)
            name = segment_of(segment)
            error = "refused" if name is None else self._unwritable()
            if name is not None and error is None:
                put, nbytes = Put(name, segment, done), shape_of(name).total
                error = self._admit(name, nbytes)
                if error is None:
                    self._run(partial(self._put, put), partial(self._put_over, put), nbytes)
            for job in segment if error is not None else ():
                done(job, error)

    def get(self, jobs: Sequence[Job], done: JobDone) -> None:
        """See `Tier.get`."""
        error = "closed" if self._closed else self._breaker.reason
        good: list[Job] = []
        for job in jobs:
            name, why = job.name, error
            if not isinstance(name, InSegment) or (self._going and path_of(name) in self._going):
                why = why or "absent"
            elif job.checksum is None or job.nbytes != nbytes_of(name):
                why = why or "refused"
            if why is None:
                good.append(job)
            else:
                done(job, why)
        self._gets.submit(good, done, is_put=False)

    def delete(self, names: Sequence[ObjectName]) -> None:
        """See `Tier.delete`; whole segments go."""
        for name in names:
            if isinstance(name, InSegment) and not self._closed:
                self._delete(name)

    def expire(self, held: Sequence[Held]) -> None:
        """See `Tier.expire`. A segment never changes: what is to end sooner is deleted."""
        for one in held:
            if isinstance(one.name, InSegment) and one.expires and not self._closed:
                self._run(partial(self._end_sooner, one.name, one.expires))

    def flush(self, seconds: float) -> bool:
        """See `Tier.flush`."""
        until = time.monotonic() + seconds
        return all(crew.flush(until - time.monotonic()) for crew in self._crews)

    def close(self) -> None:
        """See `Tier.close`."""
        if self._closed:
            return
        self._closed = True
        until = time.monotonic() + _CLOSE_SECONDS
        self._ended = all([crew.close(max(0.0, until - time.monotonic())) for crew in self._crews])
        if not self._ended:
            self._logger.error("%s: closed without waiting for what does not answer", self.name)

    # --- Errands ----------------------------------------------------------------------------------

    def _run(
        self,
        run: Callable[[], str | None],
        done: Callable[[str | None], None] = lambda error: None,
        put_bytes: int = 0,
    ) -> None:
        """Have an errand run, or a put of so many bytes."""
        work = _Work(None, 0, put_bytes, run=run)  # type: ignore[arg-type]  # It has no name.
        crew = self._puts if put_bytes else self._errands
        crew.submit([work], lambda _, error: done(error), is_put=put_bytes > 0)

    def _run_each(self, _: int, tasks: list[Task]) -> None:
        for task in tasks:
            work, started = task.job, time.monotonic()
            assert isinstance(work, _Work)
            try:
                error = work.run()
                self._worked(started)
            except Changed:
                error = "partial"
            except OSError as e:
                error = self._failed(e, writes=task.is_put)
            (self._puts if task.is_put else self._errands).finish(task, error)

    def _find(self, name: InSegment) -> Segment | None:
        """The header of a segment, if there is one that can be used."""
        path, started = path_of(name), time.monotonic()
        if path in self._going:
            return None
        try:
            data = self._head(path, shape_of(name).header)
        except FileNotFoundError:
            return None
        except PermissionError as e:  # Who may not read is not one who may only read.
            raise OSError(errno.EIO, e.strerror) from e
        finally:
            self._look_seconds += (time.monotonic() - started - self._look_seconds) * _NEW
        found = decode(data)
        if found is None or not found.is_of(name):
            self._vitals.count("segments_invalid")
            return None
        return found

    def _delete(self, name: InSegment) -> None:
        path = path_of(name)
        with self._changed:
            if path in self._going:
                return
            self._going.add(path)
        self._run(partial(self._remove_now, path), partial(self._removed, name, path))

    def _remove_now(self, path: str) -> None:
        self._remove(path)
        self._vitals.count("segments_removed")

    def _removed(self, name: InSegment, path: str, error: str | None) -> None:
        with self._changed:
            if error is None or self._closed:
                self._going.discard(path)
                self._changed.notify_all()
            else:
                self._going_on.append(name)

    def _end_sooner(self, name: InSegment, expires: int) -> None:
        found = self._find(name)
        held = found and _held(name, found)
        if held and not 0 < held.expires <= expires:
            self._host.post(partial(self.delete, [name]))

    # --- Puts and gets ----------------------------------------------------------------------------

    def _put_over(self, put: Put, error: str | None) -> None:
        for number, job in enumerate(put.jobs):
            put.done(job, "corrupt" if number in put.damaged else error)

    def _put(self, put: Put) -> str | None:
        """See to it that a segment is there; why it is not."""
        name, path, now = put.name, path_of(put.name), time.time()
        with self._changed:
            if not self._changed.wait_for(lambda: path not in self._going, self._retry_seconds):
                return "io_error"
        for _ in range(2):
            found = self._find(name)
            if found is not None and all(b.expires == 0 or b.expires > now for b in found.blocks):
                put.seal([xxh3_64(job.address, job.nbytes) for job in put.jobs])
                if [block.checksum for block in found.blocks] != put.sums:
                    return "exists"
                self._vitals.count("segments_there")
                break
            if found is not None:
                self._remove(path)
            if self._store(path, put):
                self._vitals.count("segments_written")
                put.made, self._fault = True, ""
                self._vitals.notice("writes", None)
                break
            if self._find(name) is None:  # What lies there is of no use to anybody.
                self._remove(path)
        else:
            return "exists"
        for job, checksum in zip(put.jobs, put.sums, strict=True):
            job.checksum = checksum
        return None

    def _run_gets(self, _: int, tasks: list[Task]) -> None:
        paths: defaultdict[str, list[tuple[int, Task]]] = defaultdict(list)
        for task in tasks:
            assert isinstance(task.job.name, InSegment)
            paths[path_of(task.job.name)].append((task.job.name.index, task))
        for path, some in paths.items():
            some.sort(key=lambda one: one[0])
            # Those that follow each other come in one piece.
            for _, run in groupby(enumerate(some), lambda one: one[1][0] - one[0]):
                self._get(path, [task for _, (_, task) in run])

    def _get(self, path: str, tasks: list[Task]) -> None:
        jobs, started = [task.job for task in tasks], time.monotonic()
        first = jobs[0].name
        assert isinstance(first, InSegment)
        sizes = shape_of(first)
        error: str | None = None
        sums: Sequence[int | None] = ()
        found: Segment | None = None
        try:
            loaded = self._load(path, sizes.header + first.index * sizes.stride, jobs)
            both = zip(jobs, loaded, strict=True)
            sums = [n if n is None else kept_sum(job, n) for job, n in both]
            if [job.checksum for job in jobs] != sums:
                found = self._find(first)
            self._worked(started)
        except FileNotFoundError:
            error = "absent"
        except OSError as e:
            error = self._failed(e, writes=False)
        for number, task in enumerate(tasks):
            why = error
            if error is None and sums[number] != task.job.checksum:
                others = found and found.blocks[first.index + number].checksum == sums[number]
                why = "absent" if others else "corrupt"
            self._gets.finish(task, why)

    # --- How the medium does; in any thread -------------------------------------------------------

    def _unwritable(self) -> str | None:
        if self._closed:
            return "closed"
        paused = time.monotonic() < self._no_writes_until
        return self._breaker.reason or (self._fault if paused else None)

    def _failed(self, error: OSError, *, writes: bool) -> str:
        """Leave the medium alone for a while; the reason."""
        reason = reason_of(error)
        what = str(error.strerror or error).partition("\n")[0][:300]
        if writes and reason in ("full", "read_only"):
            self._fault, self._no_writes_until = reason, time.monotonic() + self._retry_seconds
            each = f"{self._retry_seconds:g} s each time"
            self._vitals.notice("writes", f"writing pauses ({reason}), {each}: {what}")
            return reason
        self._breaker.failed("io_error")
        self._vitals.notice("medium", f"it cannot be used, and is tried again: {what}")
        return "io_error"

    def _worked(self, started: float) -> None:
        if self._breaker.worked(started):
            self._vitals.notice("medium", None)
            with self._changed:
                again, self._going_on = self._going_on, []
                self._going.difference_update(map(path_of, again))
            for name in again:
                self._delete(name)


def _held(name: ObjectName, found: Segment | None) -> Held | None:
    if found is None or not isinstance(name, InSegment):
        return None
    block = found.blocks[name.index]
    if block.key != name.key:
        return None
    return Held(name, found.nbytes, block.checksum, block.created, block.expires)
