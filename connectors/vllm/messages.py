"""What the scheduler side of the vLLM connector and its worker sides tell each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

if TYPE_CHECKING:
    from kvstore.blocks.spec import Namespace
    from kvstore.connectors.common.transfers import Job


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

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """Both as one."""
        assert isinstance(other, Report)
        least = {n: min(b, self.loaded.get(n, b)) for n, b in other.loaded.items()}
        saved = dict(self.saved)
        for number, (ranks, blocks) in other.saved.items():
            before = saved.get(number, (0, blocks))
            saved[number] = (ranks + before[0], min(blocks, before[1]))
        return Report(
            self.loaded | least,
            saved,
            self.computed or other.computed,
            self.copied or other.copied,
            self.failures + other.failures,
            self.broken or other.broken,
        )
