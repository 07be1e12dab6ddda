"""A tier whose objects are coded on their way there, by a codec that loses nothing.

Coded objects lie in the tier inside under names of their own (see `kvstore.codecs.base`), beside
such as are stored as they are: because they would not fit, or the setting was another one.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Final

from msgspec import structs

from kvstore.codecs import AUTO, RAW, find
from kvstore.codecs.base import Codec, coded_part, decode, encode, plain_part
from kvstore.memory.lending import Lent, Room
from kvstore.memory.slots import align
from kvstore.tiers.base import Held, Host, InSegment, Job, JobDone, ObjectName, State, Tier

_logger: Final = logging.getLogger("kvstore.codecs")

_READING: Final = 64 << 20
_WRITING: Final = 32 << 20
"""Bytes of coded objects in memory at a time; of one, or one segment, alone any number."""
_THREADS: Final = 4
_SAVED: Final = 1 / 4
"""Of what a tier reads, so much less of coded objects."""
_STUCK: Final = "it does not answer: what it was asked to read does not come"
_BROKEN: Final = "it raised an error, which the log tells: it is closed and opened again"
_NEW: Final = 0.1
"""What a measurement weighs among those before."""

OpenTier = Callable[[Host], Tier]
_Begin = Callable[[Sequence[Job], JobDone], None]


def coded(codec: str, open_tier: OpenTier, stall_seconds: float = 10.0) -> OpenTier:
    """Opens a tier with a codec of the configuration; with `raw` as it is.

    Reads that find no memory for `stall_seconds` fail: others have it, and do not end.

    Raises:
        ConfigError: the package of the codec is not there.
    """
    if codec == RAW:
        return open_tier
    found, auto = find("e4" if codec == AUTO else codec), codec == AUTO
    return lambda host: CodedTier(found, host, open_tier, stall_seconds, auto=auto)


@dataclass(frozen=True)
class _InnerHost:
    """What the tier inside may ask: of objects by the names that it knows them by."""

    host: Host
    codec: Codec

    def busy(self, name: ObjectName) -> bool:
        return self.host.busy(_plain(self.codec, name))

    def lost(self, name: ObjectName, reason: str) -> None:
        self.host.lost(_plain(self.codec, name), reason)

    def post(self, task: Callable[[], None]) -> None:
        self.host.post(task)

    @property
    def habits(self) -> object:
        return getattr(self.host, "habits", None)


class CodedTier:
    """A `Tier` around another one. Opening it blocks, and is for any thread.

    Counters, beside those of the tier inside: `coded`, `coded_bytes` and `coded_bytes_plain`,
    `not_coded` (too large for their place), `codec_damaged`.

    Args:
        codec: for what is put, and to be found.
        host: the store.
        open_tier: opens the tier inside.
        stall_seconds: as long as a read waits for memory while none is given back.
        auto: code only as long as that brings bytes sooner, as measured.
    """

    def __init__(
        self,
        codec: Codec,
        host: Host,
        open_tier: OpenTier,
        stall_seconds: float,
        *,
        auto: bool,
    ) -> None:
        self._codec, self._auto, self._stall_seconds = codec, auto, stall_seconds
        self._host = host
        self._inner = inner = open_tier(_InnerHost(host, codec))
        self.name, self.shared = inner.name, inner.shared
        self.segmented = bool(getattr(inner, "segmented", False))
        self._threads = ThreadPoolExecutor(
            min(_THREADS, os.cpu_count() or 1), f"kvstore-{self.name}-codec"
        )
        self._reading, self._writing = Room(_READING), Room(_WRITING)
        self._sent: dict[Job, Job] = {}  # puts as the tier inside was given them
        self._wanted: dict[ObjectName, bool] = {}  # whether the next put is to be coded
        self._open: dict[Job, JobDone] = {}  # that are coded, or may be
        self._passing: Sequence[Job] = ()  # that the tier inside is just being given
        self._counts: Counter[str] = Counter()
        self._lock = threading.Condition(threading.Lock())
        self._closed = self._broken = False
        self._decode_seconds = 0.0  # a plain byte
        self._share = 1.0  # of bytes read that lie in the tier, of those brought

    # --- What it is like --------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """See `Tier.state`."""
        state = self._inner.state
        if self._broken:
            return State(False, False, _BROKEN, gone=True)
        if self._reading.stuck(self._stall_seconds):
            state = state._replace(readable=False, problem=state.problem or _STUCK)
        if state.seconds_per_byte:
            seconds = state.seconds_per_byte * self._share + self._decode_seconds
            state = state._replace(seconds_per_byte=seconds)
        return state

    @property
    def counters(self) -> Mapping[str, int]:
        """See `Tier.counters`."""
        with self._lock:
            return {**self._inner.counters, **self._counts}

    def recover(self) -> Iterator[Held]:
        """See `Tier.recover`."""
        for held in self._inner.recover():
            yield self._told(held)

    def _told(self, held: Held) -> Held:
        """The same, of the plain object."""
        name = _plain(self._codec, held.name)
        if name is held.name:
            return held
        whole = held.nbytes == _nbytes(held.name)
        return held._replace(name=name, nbytes=_nbytes(name) if whole else held.nbytes)

    def _coded(self, name: ObjectName) -> ObjectName | None:
        """Its name as a coded one, if it may be one."""
        part = coded_part(self._codec, name.part, name.namespace.block_tokens)
        return None if part is None else structs.replace(name, part=part)

    def _coded_of(self, job: Job) -> ObjectName | None:
        return self._coded(job.name) if job.nbytes == _nbytes(job.name) else None

    def _both(self, names: Sequence[ObjectName]) -> list[ObjectName]:
        return [*names, *filter(None, map(self._coded, names))]

    # --- What the store asks for ------------------------------------------------------------------

    def probe(self, names: Sequence[ObjectName], done: Callable[[list[Held | None]], None]) -> None:
        """See `Tier.probe`."""
        coded = [(number, self._coded(name)) for number, name in enumerate(names)]
        more = [(number, name) for number, name in coded if name is not None]

        def answered(found: list[Held | None]) -> None:
            best = found[: len(names)]
            for (number, _), held in zip(more, found[len(names) :], strict=False):
                if held is not None and (best[number] is None or held.nbytes):
                    best[number] = self._told(held)
            done(best)

        self._inner.probe([*names, *(name for _, name in more)], answered)

    def recodes(self, name: ObjectName, codec: str) -> bool:
        """Whether a put of this object can be by that codec, or `raw`."""
        return codec == RAW or (codec == self._codec.name and self._coded(name) is not None)

    def recode(self, name: ObjectName, codec: str | None) -> None:
        """The next put of this object is by a codec that it can be by; None: as any other."""
        self._wanted.pop(name, None)
        if codec is not None:
            self._wanted[name] = codec != RAW

    def put(self, jobs: Sequence[Job], done: JobDone) -> None:
        """See `Tier.put`."""
        plain, pays = list[Job](), self._pays
        for _, some in groupby(jobs, self._together):
            group = list(some)
            names = [self._coded_of(job) for job in group]
            wanted = [self._wanted.pop(job.name, pays) for job in group]
            if all(wanted) and None not in names and not self._closed:
                self._open.update(dict.fromkeys(group, done))
                self._encode(group, [name for name in names if name is not None])
            else:
                plain += group
        if plain:
            self._put_plain(plain, done)

    def settled(self, job: Job, error: str | None) -> None:
        """See `Tier.settled`."""
        self._inner.settled(self._sent.pop(job, job), error)

    def get(self, jobs: Sequence[Job], done: JobDone) -> None:
        """See `Tier.get`."""
        plain: list[Job] = []
        for job in jobs:
            name = None if self._closed else self._coded_of(job)
            if name is None:
                plain.append(job)
            else:
                self._open[job] = done
                self._get_coded(job, name)
        if plain:
            self._inner.get(plain, done)

    def delete(self, names: Sequence[ObjectName]) -> None:
        """See `Tier.delete`."""
        self._inner.delete(self._both(names))

    def touch(self, names: Sequence[ObjectName], *, used: bool = True) -> None:
        """See `Tier.touch`."""
        self._inner.touch(self._both(names), used=used)

    def cool(self, names: Sequence[ObjectName]) -> None:
        """See `Tier`; not all have it."""
        if cool := getattr(self._inner, "cool", None):
            cool(self._both(names))

    def expire(self, held: Sequence[Held]) -> None:
        """See `Tier.expire`."""
        both = list(held)
        for one in held:
            name = self._coded(one.name)
            if name is not None:
                both.append(one._replace(name=name, nbytes=_nbytes(name)))
        self._inner.expire(both)

    def flush(self, seconds: float) -> bool:
        """See `Tier.flush`."""
        until, before = time.monotonic() + seconds, list(self._open)

        def ended() -> bool:
            while before and before[-1] not in self._open and before[-1] not in self._passing:
                before.pop()  # Each is looked at once.
            return not before

        with self._lock:
            through = self._lock.wait_for(ended, seconds)
        return through and self._inner.flush(max(0.0, until - time.monotonic()))

    def close(self) -> None:
        """See `Tier.close`."""
        self._closed = True
        self._inner.close()
        self._threads.shutdown()
        for job in list(self._open):
            self._end(job, "closed")

    def _end(self, job: Job, error: str | None) -> None:
        """A job has ended, once."""
        done = self._open.pop(job, None)
        if done is not None:
            done(job, error)
            self._fewer_open()

    def _fewer_open(self) -> None:
        with self._lock:
            self._lock.notify_all()

    def _on_loop(self, task: Callable[[], None]) -> None:
        """Call the tier inside; once it has raised nobody knows what it does with its jobs."""

        def safely() -> None:
            try:
                task()
            except Exception:
                _logger.exception("%s: a tier raised, see its kind", self.name)
                self._broken = True

        self._host.post(safely)

    def _as_they_are(self, begin: _Begin, jobs: Sequence[Job], lent: Lent) -> None:
        """Let the tier inside have jobs, and tell of their ends: it is at work on their memory."""

        def work() -> None:
            self._passing = jobs
            ends = [(job, done) for job in jobs if (done := self._open.pop(job, None))]
            lent.back()
            try:
                if ends:
                    begin([job for job, _ in ends], ends[0][1])
            except Exception:
                self._open.update(ends)  # Until it is closed.
                raise
            finally:
                self._passing = ()
                self._fewer_open()

        self._on_loop(work)

    # --- Puts -------------------------------------------------------------------------------------

    def _together(self, job: Job) -> object:
        """Equal for jobs that go as one: those of a segment."""
        if self.segmented and isinstance(job.name, InSegment):
            return job.name.keys, job.name.part.variant
        return id(job)

    @property
    def _pays(self) -> bool:
        """Whether what is coded is brought sooner. A tier that was not measured may be slow."""
        link = self._inner.state.seconds_per_byte
        return not self._auto or not link or link * _SAVED > self._decode_seconds

    def _put_plain(self, jobs: Sequence[Job], done: JobDone) -> None:
        if not self.shared:  # Others may have a coded one that is good.
            self._inner.delete([name for job in jobs if (name := self._coded(job.name))])
        self._inner.put(jobs, done)

    def _encode(self, jobs: list[Job], names: list[ObjectName]) -> None:
        """Code jobs that go as one, and put them; if they cannot be, as they are."""

        def work(lent: Lent) -> None:
            coded, at = list[Job](), lent.address
            for job, name in zip(jobs, names, strict=True):
                tokens, nbytes = name.namespace.block_tokens, _nbytes(name)
                checksum = encode(self._codec, job.name.part, name.part, tokens, job.address, at)
                if checksum is None or job.checksum not in (None, checksum):
                    break  # The tier inside finds out what is wrong, if something is.
                coded.append(replace(job, name=name, address=at, nbytes=nbytes, checksum=checksum))
                at += align(nbytes)
            else:
                self._on_loop(lambda: self._send(jobs, coded, lent))
                return
            self._count("not_coded", len(jobs))
            self._as_they_are(self._put_plain, jobs, lent)

        def safely(lent: Lent) -> None:
            try:
                work(lent)
            except Exception:
                _logger.exception("%s: a codec failed; objects go there as they are", self.name)
                self._as_they_are(self._put_plain, jobs, lent)

        self._run(self._writing, sum(align(_nbytes(name)) for name in names), safely, jobs)

    def _send(self, jobs: list[Job], coded: list[Job], lent: Lent) -> None:
        """Put coded jobs, on the loop."""
        if not self.shared:
            self._inner.delete([job.name for job in jobs])
        plain, under_way = dict(zip(coded, jobs, strict=True)), set(coded)
        self._sent.update(zip(jobs, coded, strict=True))

        def ended(job: Job, error: str | None) -> None:
            one = plain[job]
            one.checksum = job.checksum
            if error is None:
                self._count("coded", 1)
                self._count("coded_bytes", job.nbytes)
                self._count("coded_bytes_plain", one.nbytes)
            with self._lock:
                under_way.discard(job)
            if not under_way:
                lent.back()
            self._end(one, error)

        self._inner.put(coded, ended)

    # --- Gets -------------------------------------------------------------------------------------

    def _get_coded(self, job: Job, name: ObjectName) -> None:
        def work(lent: Lent) -> None:
            coded = replace(job, name=name, address=lent.address, nbytes=_nbytes(name))
            self._on_loop(lambda: self._inner.get([coded], lambda _, error: ended(lent, error)))

        def ended(lent: Lent, error: str | None) -> None:
            if error is None:
                self._on_thread(lambda: self._decode(job, name, lent), [job], lent)
            elif error == "absent":
                self._as_they_are(self._inner.get, [job], lent)
            else:
                lent.back()
                self._end(job, error)

        self._run(self._reading, align(_nbytes(name)), work, [job])

    def _decode(self, job: Job, name: ObjectName, lent: Lent) -> None:
        room, started = _nbytes(name), time.monotonic()
        checksum = decode(self._codec, room, lent.address, job.address, job.nbytes)
        seconds = (time.monotonic() - started) / job.nbytes
        lent.back()
        error = None
        if checksum is None:
            error = "corrupt"
            self._count("codec_damaged", 1)
            _logger.warning("%s: a coded object is not what was written", self.name)
        elif job.checksum not in (None, checksum):  # Others have put another one since.
            error = "absent" if self.shared else "corrupt"
        else:
            job.checksum = checksum
        with self._lock:
            self._decode_seconds += (seconds - self._decode_seconds) * _NEW
            self._share += (room / job.nbytes - self._share) * _NEW
        self._end(job, error)

    # --- Threads ----------------------------------------------------------------------------------

    def _count(self, what: str, count: int) -> None:
        with self._lock:
            self._counts[what] += count

    def _run(self, room: Room, nbytes: int, work: Callable[[Lent], None], jobs: list[Job]) -> None:
        """Do something for jobs, with so much memory, on a thread, once there is room."""

        def go(lent: Lent | None) -> None:
            if lent is not None:
                self._on_thread(lambda: work(lent), jobs, lent)
                return
            for job in jobs:
                self._end(job, "stalled")

        room.enter(nbytes, go)

    def _on_thread(self, work: Callable[[], None], jobs: list[Job], lent: Lent) -> None:
        """The same; where that fails, or is too late, the memory goes back and the jobs end."""

        def safely() -> None:
            try:
                work()
            except Exception:
                _logger.exception("%s: a codec failed unexpectedly", self.name)
                stop("io_error")

        def stop(error: str) -> None:
            lent.back()
            for job in jobs:
                self._end(job, error)

        try:
            self._threads.submit(safely)
        except RuntimeError:  # It was closed.
            stop("closed")


def _nbytes(name: ObjectName) -> int:
    return name.part.nbytes(name.namespace.block_tokens)


def _plain(codec: Codec, name: ObjectName) -> ObjectName:
    """The name of what a coded object stands for; of others theirs."""
    part = plain_part(codec, name.part)
    return name if part is None else structs.replace(name, part=part)
