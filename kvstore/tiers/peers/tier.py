"""The other daemons of a pool, as a tier: what they hold is found, asked for, and fetched."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Final

from kvstore.errors import StoreUnavailable
from kvstore.tiers.base import (
    Held,
    InSegment,
    Job,
    JobDone,
    ObjectName,
    State,
    fingerprint,
    plain,
)
from kvstore.tiers.peers.link import Busy, Link, Refused
from kvstore.tiers.peers.policy import ranked, to_ask
from kvstore.tiers.peers.pool import Pool
from kvstore.tiers.remote import Crew, Shared
from kvstore.tiers.tasks import Task

_logger: Final = logging.getLogger("kvstore.peers")

_ASKERS: Final = 8
"""Threads that ask peers; they never wait behind objects."""
_MOST_PROBES: Final = 64
"""At a time; more are answered at once: not known."""
_ANSWER_SECONDS: Final = 1.0
"""To wait for a peer that is asked what it has; the store waits for less, and uses what is late."""
_BUSY_SECONDS, _BUSY_PAUSE = 1.0, 0.01
"""How long peers that serve as much as they may are asked again, and when first."""
_MOST_KNOWN: Final = 1 << 16
_CLOSE_SECONDS: Final = 2.0


class PeersTier(Shared):
    """A `Tier` of what peers hold. It is never written to.

    Counters: `bytes_read`, `read_errors.<reason>`, `probes`, `probes_unanswered`; of questions to
    single peers `asked` and `asked.<reason>`, of objects `fetched` and `fetched.<reason>`.

    Args:
        name: of the tier.
        pool: the peers.
        stall_seconds: a fetch may take so long; see also `Crew`.
    """

    def __init__(self, name: str, pool: Pool, stall_seconds: float) -> None:
        self.name = name
        self._pool = pool
        pool.begin()
        self._seconds = stall_seconds
        self._vitals = pool.vitals
        self._crew = Crew(name, pool.streams, self._run, self._vitals, 2 * stall_seconds)
        self._askers = ThreadPoolExecutor(_ASKERS, f"kvstore-{name}-ask")
        self._probes = threading.Semaphore(_MOST_PROBES)
        self._lock = threading.Lock()
        self._holders: OrderedDict[ObjectName, tuple[str, ...]] = OrderedDict()
        """Who has said that it has an object."""
        self._closed = False

    @property
    def state(self) -> State:
        """See `Tier.state`."""
        state = self._vitals.state(
            readable=not self._closed and not self._crew.stalled,
            writable=False,
            fixed_seconds=self._pool.round_trip,
        )
        return state._replace(problem=state.problem or self._pool.directory.problem)

    @property
    def counters(self) -> Counter[str]:
        """A copy of the counters named above, and those of the directory."""
        told = self._pool.directory.counters
        return self._vitals.counters + Counter({f"directory.{n}": v for n, v in told.items()})

    def put(self, jobs: Sequence[Job], done: JobDone) -> None:
        """See `Tier.put`: a node holds what its own sessions have saved or read, and no more."""
        for job in jobs:
            done(job, "closed" if self._closed else "read_only")

    def get(self, jobs: Sequence[Job], done: JobDone) -> None:
        """See `Tier.get`."""
        self._crew.submit(jobs, done, is_put=False)

    def delete(self, names: Sequence[ObjectName]) -> None:
        """See `Tier.delete`: what peers hold is theirs; it is not taken from them any more."""
        with self._lock:
            for name in names:
                self._holders.pop(name, None)

    def expire(self, held: Sequence[Held]) -> None:
        """See `Tier.expire`: it is for who holds an object to say."""

    def flush(self, seconds: float) -> bool:
        """See `Tier.flush`."""
        return self._crew.flush(seconds)

    def close(self) -> None:
        """See `Tier.close`."""
        if self._closed:
            return
        self._closed = True
        self._askers.shutdown(wait=False, cancel_futures=True)
        if not self._crew.close(_CLOSE_SECONDS, self._pool.cut):
            _logger.error("%s: closed without waiting for threads that hang", self.name)

    # -- who has what -----------------------------------------------------------------------------

    def probe(self, names: Sequence[ObjectName], done: Callable[[list[Held | None]], None]) -> None:
        """See `Tier.probe`."""
        if self._closed or not self._probes.acquire(blocking=False):
            self._vitals.count("probes_unanswered")
            done([])
            return
        self._vitals.count("probes")
        try:
            self._askers.submit(self._probe, list(names), done)
        except RuntimeError:  # It was closed just now.
            self._probes.release()
            done([])

    def _probe(self, names: list[ObjectName], done: Callable[[list[Held | None]], None]) -> None:
        """Find out whom to ask, and have them asked."""
        try:
            groups: defaultdict[int, list[ObjectName]] = defaultdict(list)
            for name in names:
                groups[fingerprint(_head(name))].append(name)
            segments = list(groups)
            holders = self._pool.directory.find(segments, self._pool.probe_seconds)
            links = self._pool.links({node for some in holders for node in some})
            usable = [[node for node in some if node in links] for some in holders]
            order = ranked(usable, lambda node: links[node].load, segments[0])
            asked = to_ask(usable, order)
        except Exception:
            _logger.exception("a probe failed unexpectedly")
            self._probes.release()
            done([])
            return
        answers = _Answers(names, len(asked), order, self._remember, partial(self._told, done))
        if not asked:
            answers.end()
        for node, numbers in asked.items():
            those = [name for number in numbers for name in groups[segments[number]]]
            try:
                self._askers.submit(self._ask, links[node], node, those, answers)
            except RuntimeError:  # It was closed just now.
                answers.add(node, [], [])

    def _told(self, done: Callable[[list[Held | None]], None], answers: _Answers) -> None:
        """So many peers have answered that the question is."""
        self._probes.release()
        found, unknown = answers.found, answers.unsure
        done([
            found[name][0] if name in found
            else Held(name, 0, None, 0, 0) if name in unknown else None
            for name in answers.names
        ])  # fmt: skip

    def _remember(self, answers: _Answers, names: Sequence[ObjectName]) -> None:
        """Who has these, for when they are fetched."""
        with self._lock:
            for name in names:
                self._holders[plain(name)] = tuple(answers.found[name][1])
                self._holders.move_to_end(name)
            while len(self._holders) > _MOST_KNOWN:
                self._holders.popitem(last=False)

    def _ask(self, link: Link, node: str, names: list[ObjectName], answers: _Answers) -> None:
        """Have one peer say which of these it has."""
        namespace = names[0].namespace
        keys = list(dict.fromkeys(name.key for name in names))
        parts = list({name.part.variant: name.part for name in names}.values())
        told: list[Held | None] = []
        started = time.monotonic()
        try:
            there = link.find(namespace, parts, keys, _ANSWER_SECONDS)
            self._pool.took(time.monotonic() - started)
            size = {part.variant: part.nbytes(namespace.block_tokens) for part in parts}
            for name in names:
                variant = name.part.variant
                times = there.get((name.key, variant))
                told.append(Held(name, size[variant], None, *times) if times else None)
            self._vitals.count("asked")
        except (StoreUnavailable, Refused) as e:
            refused = isinstance(e, Refused)
            self._vitals.count(f"asked.{'refused' if refused else 'away'}")
            self._pool.quiet(link.address, e)
            told = [None] * len(names) if refused else []
        except Exception:
            _logger.exception("asking a peer failed unexpectedly")
        answers.add(node, names, told)

    # -- bringing objects here --------------------------------------------------------------------

    def _run(self, number: int, tasks: list[Task]) -> None:
        """Fetch a batch: all that one holder has of one kind at a time, then what others have.

        Those who are all busy are asked again for a while.
        """
        began = time.monotonic()
        until, patient, pause = began + self._seconds, began + _BUSY_SECONDS, _BUSY_PAUSE
        tried: dict[Task, set[str]] = {task: set() for task in tasks}
        busy: defaultdict[Task, set[str]] = defaultdict(set)
        errors: dict[Task, str] = {}
        while tried and time.monotonic() < until:
            groups: defaultdict[tuple[str, bytes, bytes], list[Task]] = defaultdict(list)
            for task in list(tried):
                name = task.job.name
                node = self._holder(name, tried[task])
                if node is None and busy[task] and time.monotonic() < patient:
                    tried[task] -= busy.pop(task)
                    continue
                if node is None:
                    del tried[task]
                    self._crew.finish(task, _told_as(errors.get(task, "absent")))
                    continue
                tried[task].add(node)
                groups[node, name.namespace.digest, name.part.variant].append(task)
            for (node, _, _), group in groups.items():
                for task, error in self._fetch(node, group, until).items():
                    if error is None:
                        del tried[task]
                        self._crew.finish(task, None)
                    else:
                        errors[task] = error
                        if error == "busy":
                            busy[task].add(node)
            if not groups:  # All are busy.
                time.sleep(pause)
                pause *= 2
        for task in tried:
            self._crew.finish(task, _told_as(errors.get(task, "stalled")))

    def _holder(self, name: ObjectName, tried: set[str]) -> str | None:
        """Whom to ask next for an object."""
        with self._lock:
            holders = self._holders.get(name, ())
        left = [node for node in holders if node not in tried]
        links = self._pool.links(left)
        return min(filter(links.__contains__, left), key=lambda n: links[n].load, default=None)

    def _fetch(self, node: str, tasks: list[Task], until: float) -> dict[Task, str | None]:
        """Have one peer send these; of each the reason why it has not come, or None."""
        link = self._pool.links([node]).get(node)
        first = tasks[0].job.name
        seconds = until - time.monotonic()
        outcome: list[int | str]
        try:
            if link is None or seconds <= 0:
                raise StoreUnavailable("it has left the pool")
            outcome = link.fetch(
                first.namespace,
                first.part,
                [task.job.name.key for task in tasks],
                [task.job.address for task in tasks],
                seconds,
            )
        except Busy as e:
            self._others(tasks, e.others)
            outcome = ["busy"] * len(tasks)
        except Refused:
            outcome = ["refused"] * len(tasks)
        except StoreUnavailable as e:
            self._pool.quiet(node, e)
            outcome = ["away"] * len(tasks)
        told: dict[Task, str | None] = {}
        for task, came in zip(tasks, outcome, strict=True):
            job = task.job
            if isinstance(came, int) and job.checksum in (None, came):
                job.checksum = came
                told[task] = None
            else:
                reason = came if isinstance(came, str) else "differs"
                told[task] = reason
                self._vitals.count(f"fetched.{reason}")
                if reason not in ("busy", "away"):
                    self._forget(job.name, node)
        self._vitals.count("fetched", sum(error is None for error in told.values()))
        return told

    def _others(self, tasks: Sequence[Task], addresses: Sequence[str]) -> None:
        """Nodes that have had these from a peer which is busy now may have them, too."""
        nodes = self._pool.named(addresses)
        with self._lock:
            for task in tasks:
                known = self._holders.get(task.job.name, ())
                if known:
                    self._holders[plain(task.job.name)] = tuple(dict.fromkeys((*known, *nodes)))

    def _forget(self, name: ObjectName, node: str) -> None:
        with self._lock:
            left = tuple(one for one in self._holders.get(name, ()) if one != node)
            if left:
                self._holders[plain(name)] = left
            else:
                self._holders.pop(name, None)


_REASONS: Final = {"busy": "away", "damaged": "io_error", "differs": "absent", "refused": "absent"}
"""What the store is told for what only concerns peers."""


def _told_as(reason: str) -> str:
    return _REASONS.get(reason, reason)


class _Answers:
    """What peers say of some objects, put together when the last one has answered, or one has
    found the rest. Thread-safe.
    """

    def __init__(
        self,
        names: list[ObjectName],
        left: int,
        order: Sequence[str],
        found: Callable[[_Answers, Sequence[ObjectName]], None],
        told: Callable[[_Answers], None],
    ) -> None:
        """`found` is told of objects that one has, and `told` once that all is known."""
        self.names = names
        self.found: dict[ObjectName, tuple[Held, list[str]]] = {}
        self.unsure: set[ObjectName] = set()
        """One that was asked for these did not say."""
        self._left, self._wanted, self._ended = left, len(set(names)), False
        self._order = {node: place for place, node in enumerate(order)}
        self._found, self._told = found, told
        self._lock = threading.Lock()

    def add(self, node: str, names: Sequence[ObjectName], told: Sequence[Held | None]) -> None:
        """A node's answer; none at all if it has not said."""
        with self._lock:
            if not told:
                self.unsure.update(names)
            for name, held in zip(names, told, strict=False):
                if held is None:
                    continue
                _, holders = self.found.setdefault(name, (held, []))
                holders.append(node)
                holders.sort(key=lambda one: self._order.get(one, 0))
            self._left -= 1
            # Who has found all need not wait for those who are slow, or gone.
            last = not self._ended and (not self._left or len(self.found) == self._wanted)
            self._ended = self._ended or last
            self._found(self, [name for name, held in zip(names, told, strict=False) if held])
        if last:
            self.end()

    def end(self) -> None:
        """Nobody else will answer."""
        self._told(self)


def _head(name: ObjectName) -> bytes:
    """The key of the first block of its segment, if that is known; else its own."""
    return (isinstance(name, InSegment) and name.keys[0]) or name.key
