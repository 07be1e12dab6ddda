"""What the scheduler side of the vLLM connector and its worker sides tell each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from kvstore.blocks.spec import Described, Part

if TYPE_CHECKING:
    from kvstore.blocks.spec import Namespace
    from kvstore.connectors.common.transfers import Job


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens `start` to `end` of a prompt, held by stored blocks of `keys`.

    When they were stored, the first stood at `base`; it is `skip` tokens into the blocks.
    """

    start: int
    end: int
    base: int
    skip: int
    keys: list[bytes]


@dataclass(frozen=True, slots=True)
class Blend:
    """Tokens `start` to `end` of a request are put together of pieces before this step computes.

    `tokens` are those that the step computes up to, for which there are pages. With `shadow` all is
    computed as well, and compared.
    """

    number: int
    namespace: Namespace
    pages: list[int]
    tokens: list[int]
    start: int
    end: int
    pieces: list[Piece]
    selection: str
    ratio: float
    timeout: float
    shadow: bool


@dataclass(frozen=True, slots=True)
class Blended:
    """What came of it: so many rows were computed, all of them for a `reason` that is not empty.

    `kl` is how far off the token behind the step's last one is, where that was compared.
    """

    rows: int
    reason: str
    kl: float | None = None


@dataclass(frozen=True, slots=True)
class Registered:
    """A piece that this step completes: tokens `start` to `end` of the request that has `pages`."""

    namespace: Namespace
    pages: list[int]
    start: int
    end: int
    keys: list[bytes]
    ttl: float | None


@dataclass(slots=True)
class Ready(KVConnectorHandshakeMetadata):  # type: ignore[misc]
    """Workers to scheduler, once: why this one cannot recompute selectively (empty: it can)."""

    problem: str


@dataclass(slots=True)
class Step(KVConnectorMetadata):  # type: ignore[misc]
    """Scheduler to workers, with every engine step.

    `preempted` are requests that lost their pages, `held` finished ones whose pages stay until
    each worker has named them once. `idle`: this step computes nothing. `asked` is true while a
    request waits for the store in the queue. `namespace` is the default one.
    `failures` counts the layered loads of which the scheduler knows that they failed.
    `blends` are requests whose KV is put together before this step computes, `pieces` are to be
    saved after it. `taken` are saves, by number, whose pages vLLM has taken from requests that run:
    no layer looks back on them any more.
    """

    namespace: Namespace
    loads: list[Job] = field(default_factory=list)
    saves: list[Job] = field(default_factory=list)
    preempted: frozenset[str] = frozenset()
    held: frozenset[str] = frozenset()
    prompt_tokens: int = 0
    looked_back: float = 0.0
    idle: bool = False
    asked: bool = False
    failures: int = 0
    blends: list[Blend] = field(default_factory=list)
    pieces: list[Registered] = field(default_factory=list)
    taken: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Report(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """Workers to scheduler: what has come of jobs, by number, since the last step.

    `loaded` counts blocks that arrived; of several ranks the least counts. `saved` holds, per job,
    how many ranks are done with it, the least number of blocks that the store now has, and which
    of them any rank has newly stored.
    `computed` is of a step what `report_prefill` takes, `copied` (blocks, seconds) of a load from
    memory. `failures` counts layered loads that failed, and steps that did;
    `broken` is true of the latter. `blended` says what came of requests with pieces.
    """

    loaded: dict[int, int] = field(default_factory=dict)
    saved: dict[int, tuple[int, int, frozenset[int]]] = field(default_factory=dict)
    computed: tuple[int, float, float] | None = None
    copied: tuple[int, float] | None = None
    failures: int = 0
    broken: bool = False
    blended: dict[int, Blended] = field(default_factory=dict)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """Both as one."""
        assert isinstance(other, Report)
        least = {n: min(b, self.loaded.get(n, b)) for n, b in other.loaded.items()}
        saved = dict(self.saved)
        for number, (ranks, blocks, new) in other.saved.items():
            before = saved.get(number, (0, blocks, frozenset()))
            saved[number] = (ranks + before[0], min(blocks, before[1]), new | before[2])
        return Report(
            self.loaded | least,
            saved,
            self.computed or other.computed,
            self.copied or other.copied,
            self.failures + other.failures,
            self.broken or other.broken,
            # One rank alone may have compared.
            self.blended
            | {n: b for n, b in other.blended.items() if n not in self.blended or b.kl is not None},
        )


def piece_part(part: Part) -> Part:
    """How the store has a rank's share of pieces: token by token."""
    return Part(part.group, Described("NLPHC"), part.shard)
