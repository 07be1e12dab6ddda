"""A shared tier of segments, but for its medium: a segment is put once, and read block by block."""

from __future__ import annotations

import errno
import logging
import math
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Final

from kvstore._native import xxh3_64
from kvstore.tiers.base import Held, Host, InSegment, Job, JobDone, ObjectName, State
from kvstore.tiers.options import TierOptions
from kvstore.tiers.remote import Breaker, Crew
from kvstore.tiers.segments.format import Block, Segment, decode, encode, path_of, shape_of, whole
from kvstore.tiers.slab.direct import reason_of
from kvstore.tiers.tasks import Task
from kvstore.tiers.vitals import Vitals

_NEW: Final = 0.2
"""What a look weighs among those before."""
_CLOSE_SECONDS: Final = 5.0


class Changed(Exception):
    """Memory does not hold what its checksums say."""


@dataclass(slots=True, eq=False)
class Put(Job):
    """A whole segment on its way to the medium; `made`: there is one more now."""

    name: InSegment
    jobs: Sequence[Job] = ()
    done: JobDone = lambda job, error: None
    sums: Sequence[int] = ()
    damaged: set[int] = field(default_factory=set)
    made: bool = False

    def seal(self, sums: Sequence[int]) -> bytes:
        """The header, given the XXH3 of the blocks as they are written.

        Raises:
            Changed: some of them are `damaged`.
        """
        self.sums, now = sums, int(time.time())
        wrong = (job.checksum not in (None, sums[n]) for n, job in enumerate(self.jobs))
        self.damaged = {number for number, changed in enumerate(wrong) if changed}
        if self.damaged:
            raise Changed
        blocks = tuple(
            Block(job.name.key, checksum, job.created or now, job.expires)
            for job, checksum in zip(self.jobs, sums, strict=True)
        )
        digest, variant = self.name.namespace.digest, self.name.part.variant
        return encode(Segment(digest, variant, self.jobs[0].nbytes, blocks))


@dataclass(slots=True, eq=False)
class _Errand(Job):
    """A small thing to do: `run`; `found` is what it looked up."""

    name: InSegment
    run: Callable[[_Errand], None] = lambda errand: None
    found: Segment | None = None


class SegmentTier(ABC):
    """A `Tier` of segments on a medium that others write to, too. Opening it may block.

    What is there under a segment's name stays: it is never overwritten. `what` names the medium for
    people, `threads` is how many read, write, and run errands; a put may take `upload_seconds`. A
    medium raises OSError, of which FileNotFoundError alone means that a segment is not there.
    """

    shared = True
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
        self._look_seconds = 1e-3
        self._changed = threading.Condition()
        self._going: set[str] = set()
        """Paths of segments that are to be deleted, or just being so."""
        self._going_on: list[InSegment] = []  # when the medium is well again
        (readers, writers, runners), stall = threads, options.stall_seconds
        long, apart = (
            max(stall, upload_seconds),
            Vitals(what, self._logger),
        )  # Errands move nothing.
        self._gets = Crew(name, readers, self._run_gets, self._vitals, stall)
        self._puts = Crew(f"{name}-put", writers, self._run_puts, self._vitals, long)
        self._errands = Crew(f"{name}-ask", runners, self._run_errands, apart, stall)
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

    # --- What it is like --------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """See `Tier.state`."""
        now, alive = time.monotonic(), not self._closed
        well = alive and self._breaker.reason is None
        if alive and (self._breaker.may_try() if not well else now >= self._check_at):
            self._check_at = now + (self._retry_seconds if self.watched else math.inf)
            self._run(lambda _: self._check())
        seconds, backlog = self._vitals.cost
        return State(
            readable=well and not (self._gets.stalled or self._errands.stalled),
            writable=well and now >= self._no_writes_until and not self._puts.stalled,
            problem=self._vitals.problem,
            seconds_per_byte=seconds,
            backlog=backlog,
            fixed_seconds=self._look_seconds,
        )

    @property
    def counters(self) -> Counter[str]:
        """`bytes_read`, `bytes_written`, `read_errors.<reason>`, `write_errors.<reason>`,
        `segments_written`, `segments_there`, `segments_removed`, `segments_invalid`.
        """
        return self._vitals.counters

    def recover(self) -> Iterator[Held]:
        """See `Tier.recover`; this one is shared."""
        return iter(())

    # --- What the store asks for ------------------------------------------------------------------

    def probe(self, names: Sequence[ObjectName], done: Callable[[list[Held | None]], None]) -> None:
        """See `Tier.probe`."""
        answers: list[Held | None] = [None] * len(names)
        asked: defaultdict[object, list[int]] = defaultdict(list)
        for number, name in enumerate(names):
            if isinstance(name, InSegment):
                asked[name.keys[-1], name.part.variant, name.namespace.digest].append(number)
        left, lock = len(asked), threading.Lock()

        def ended(numbers: list[int], job: Job, error: str | None) -> None:
            nonlocal left
            found = job.found if isinstance(job, _Errand) else None
            for number in numbers:
                name = names[number]
                if error is not None:
                    answers[number] = Held(name, 0, None, 0, 0)  # Not known.
                elif found is not None and isinstance(name, InSegment):
                    answers[number] = _held(name, found)
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
            for numbers in asked.values():
                name = names[numbers[0]]
                assert isinstance(name, InSegment)
                self._run(self._look, name, partial(ended, numbers))

    def put(self, jobs: Sequence[Job], done: JobDone) -> None:
        """See `Tier.put`."""
        for _, some in groupby(jobs, lambda job: (getattr(job.name, "keys", job), job.name.part)):
            segment = list(some)
            error = self._unwritable() if _is_whole(segment) else "refused"
            first = segment[0].name
            if error is None and isinstance(first, InSegment):
                nbytes = shape_of(first).total
                error = self._admit(first, nbytes)
                put = Put(first, 0, nbytes, jobs=segment, done=done)
                if error is None:
                    self._puts.submit([put], self._put_over, is_put=True)
            for job in segment if error is not None else ():
                done(job, error)

    def settled(self, job: Job, error: str | None) -> None:  # noqa: B027 - nothing is owed
        """See `Tier.settled`."""

    def get(self, jobs: Sequence[Job], done: JobDone) -> None:
        """See `Tier.get`."""
        error = "closed" if self._closed else self._breaker.reason
        good: list[Job] = []
        for job in jobs:
            name, why = job.name, error
            if not isinstance(name, InSegment) or (self._going and path_of(name) in self._going):
                why = why or "absent"
            elif job.checksum is None or job.nbytes != _nbytes(name):
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

    def touch(self, names: Sequence[ObjectName], *, used: bool = True) -> None:  # noqa: B027
        """See `Tier.touch`; not all media want to know."""

    def expire(self, held: Sequence[Held]) -> None:
        """See `Tier.expire`. A segment never changes: what is to end sooner is deleted."""
        for one in held:
            if isinstance(one.name, InSegment) and one.expires and not self._closed:
                self._run(partial(self._end_sooner, one.expires), one.name)

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
        ends = [crew.close(max(0.0, until - time.monotonic())) for crew in self._crews]
        self._ended = all(ends)
        if not self._ended:
            self._logger.error("%s: closed without waiting for what does not answer", self.name)

    # --- Errands ----------------------------------------------------------------------------------

    def _run(
        self,
        run: Callable[[_Errand], None],
        name: InSegment | None = None,
        done: JobDone = lambda job, error: None,
    ) -> None:
        errand = _Errand(name, 0, 0, run=run)  # type: ignore[arg-type]
        self._errands.submit([errand], done, is_put=False)

    def _run_errands(self, _: int, tasks: list[Task]) -> None:
        for task in tasks:
            errand, started = task.job, time.monotonic()
            assert isinstance(errand, _Errand)
            error = None
            try:
                errand.run(errand)
                self._worked(started)
            except OSError as e:
                error = self._failed(e, writes=False)
            self._errands.finish(task, error)

    def _look(self, errand: _Errand) -> None:
        errand.found = self._find(errand.name)

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
        self._run(partial(self._remove_now, path), name, partial(self._removed, path))

    def _remove_now(self, path: str, _: _Errand) -> None:
        self._remove(path)
        self._vitals.count("segments_removed")

    def _removed(self, path: str, job: Job, error: str | None) -> None:
        with self._changed:
            if error is None or self._closed:
                self._going.discard(path)
                self._changed.notify_all()
            elif isinstance(job, _Errand):
                self._going_on.append(job.name)

    def _end_sooner(self, expires: int, errand: _Errand) -> None:
        found = self._find(errand.name)
        held = found and _held(errand.name, found)
        if held and not 0 < held.expires <= expires:
            self._host.post(partial(self.delete, [errand.name]))

    # --- Puts and gets ----------------------------------------------------------------------------

    def _run_puts(self, _: int, tasks: list[Task]) -> None:
        for task in tasks:
            put, started = task.job, time.monotonic()
            assert isinstance(put, Put)
            try:
                error = self._put(put)
                self._worked(started, wrote=put.made)
            except Changed:
                error = "partial"
            except OSError as e:
                error = self._failed(e, writes=True)
            self._puts.finish(task, error)

    def _put_over(self, put: Job, error: str | None) -> None:
        assert isinstance(put, Put)
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
                put.made = True
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
            sums = self._load(path, sizes.header + first.index * sizes.stride, jobs)
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

    def _worked(self, started: float, *, wrote: bool = False) -> None:
        if wrote and self._fault:
            self._fault = ""
            self._vitals.notice("writes", None)
        if self._breaker.worked(started):
            self._vitals.notice("medium", None)
            with self._changed:
                again, self._going_on = self._going_on, []
                self._going.difference_update(map(path_of, again))
            for name in again:
                self._delete(name)


def _nbytes(name: ObjectName) -> int:
    return name.part.nbytes(name.namespace.block_tokens)


def _is_whole(jobs: Sequence[Job]) -> bool:
    """Whether these are all blocks of a segment, in their order."""
    first = jobs[0].name
    if not isinstance(first, InSegment) or not whole(first.keys, first.namespace.block_tokens):
        return False
    return first.keys == tuple(job.name.key for job in jobs) and all(
        job.nbytes == _nbytes(first) and job.name.namespace == first.namespace for job in jobs
    )


def _held(name: InSegment, found: Segment) -> Held | None:
    block = found.blocks[name.index]
    if block.key != name.key:
        return None
    return Held(name, found.nbytes, block.checksum, block.created, block.expires)
