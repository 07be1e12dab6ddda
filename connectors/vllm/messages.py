"""What the scheduler side of the vLLM connector and its worker sides tell each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

    from kvstore.blocks.spec import Namespace


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """Blocks of one request to load into, or to save out of, the engine's pages.

    `pages` has shape (blocks, pages per block); -1 leaves a page out. `number` counts all jobs,
    `priority` orders those that wait (lower first). `parent` is the key before the first, `tokens`
    the blocks' token ids where the store is to publish them. `prefetched` counts the blocks to load
    that were in other tiers than memory when the request came. A load that is `layered` takes part
    in the step it comes with: each layer is computed once it has arrived.
    """

    number: int
    request: str
    tenant: str
    keys: list[bytes]
    pages: NDArray[np.int64]
    priority: int = 0
    timeout: float | None = None
    ttl: float | None = None
    parent: bytes = b""
    tokens: list[int] | None = None
    prefetched: Mapping[str, int] = field(default_factory=dict)
    layered: bool = False


@dataclass(slots=True)
class Step(KVConnectorMetadata):  # type: ignore[misc]
    """Scheduler to workers, with every engine step.

    `preempted` are requests that lost their pages, `held` finished ones whose pages stay until
    each worker has named them once. `idle`: this step computes nothing. `asked` is true while a
    request waits for the store in the queue. `namespace` is the default one.
    `failures` counts the layered loads of which the scheduler knows that they failed.
    """

    namespace: Namespace
    loads: list[Job] = field(default_factory=list)
    saves: list[Job] = field(default_factory=list)
    preempted: frozenset[str] = frozenset()
    held: frozenset[str] = frozenset()
    prompt_tokens: int = 0
    idle: bool = False
    asked: bool = False
    failures: int = 0


@dataclass(slots=True)
class Report(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """Workers to scheduler: what has come of jobs, by number, since the last step.

    `loaded` counts blocks that arrived; of several ranks the least counts. `saved` holds, per job,
    how many ranks are done with it and the least number of blocks that the store now has.
    `computed` is (prompt tokens, seconds) of a step that computed nothing else, `copied` (blocks,
    seconds) of a load from memory. `failures` counts layered loads that failed, and steps that did;
    `broken` is true of the latter.
    """

    loaded: dict[int, int] = field(default_factory=dict)
    saved: dict[int, tuple[int, int]] = field(default_factory=dict)
    computed: tuple[int, float] | None = None
    copied: tuple[int, float] | None = None
    failures: int = 0
    broken: bool = False

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to tell."""
        said = self.loaded or self.saved or self.computed or self.copied or self.failures
        return not said

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """Both as one."""
        assert isinstance(other, Report)
        loaded = dict(self.loaded)
        for number, blocks in other.loaded.items():
            loaded[number] = min(blocks, loaded.get(number, blocks))
        saved = dict(self.saved)
        for number, (ranks, blocks) in other.saved.items():
            before = saved.get(number, (0, blocks))
            saved[number] = (ranks + before[0], min(blocks, before[1]))
        return Report(
            loaded,
            saved,
            self.computed or other.computed,
            self.copied or other.copied,
            self.failures + other.failures,
            self.broken or other.broken,
        )
