"""Loads that SGLang's batches follow layer by layer."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvstore.client.held import Held
from kvstore.client.session import Loaded
from kvstore.connectors.common.device import Device
from kvstore.copier.base import PagedMemory
from kvstore.copier.gate import LayerGate
from kvstore.errors import StoreUnavailable

_log = logging.getLogger("sglang.srt.kvstore.loading")


@dataclass(frozen=True, slots=True, eq=False)
class Load:
    """Blocks that are held in the store's memory, and the pages that they are to be copied to.

    `pages` has shape (blocks, pages per block); -1 leaves a page out. `done` is told what came.
    """

    held: Held
    pages: NDArray[np.int64]
    done: Callable[[Loaded], None]

    def run(
        self,
        memory: Sequence[PagedMemory],
        timeout: float,
        after: LayerGate | None,
        then: LayerGate | None,
    ) -> bool:
        """Copy, and let the blocks go; whether all have come. Raises nothing."""
        loaded = Loaded(reason="failed")
        try:
            pages = [self.pages] * len(memory)
            loaded = self.held.load(memory, pages, timeout=timeout, after=after, then=then)
        except Exception:  # noqa: BLE001 - whoever follows is told
            _log.exception("a load failed")
            if then is not None:
                then.fail("the load failed")
        finally:
            self.held.release()
            self.done(loaded)
        return loaded.blocks == len(self.pages)


class LayerCounter:
    """What the KV pool asks before it hands out a layer: SGLang's `layer_done_counter`.

    A batch that loads has a number; while it is computed it waits, on a GPU by an event on its
    stream, for each layer of its loads. `load` runs in a thread of ours.
    """

    def __init__(
        self, layers: int, device: Device, memory: Sequence[PagedMemory], timeout: float
    ) -> None:
        self.num_layers = layers
        self._device = device
        self._memory = memory
        self._timeout = timeout
        self._number = 0
        self._consumer = -1
        self._batches: dict[int, list[tuple[LayerGate, Future[bool]]]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kvstore-layers")

    @property
    def consumer_index(self) -> int:
        """The batch that is being computed; -1: one that loads nothing."""
        return self._consumer

    def start(self, loads: list[Load], settled: Callable[[], LayerGate | None]) -> int:
        """Start the loads of a batch, and return its number, whatever goes wrong: `finish` tells.

        They write no page before the gate that `settled` gives.
        """
        self._number += 1
        batch = self._batches[self._number] = []
        for load in loads:
            gate, run = LayerGate(self.num_layers), Future[bool]()
            try:
                run = self._thread.submit(load.run, self._memory, self._timeout, settled(), gate)
            except Exception:  # noqa: BLE001 - the batch must not be computed as if it had come
                _log.exception("a load was not started")
                gate.fail("the load was not started")
                run.set_result(False)
                load.held.release()
            batch.append((gate, run))
        return self._number

    def set_consumer(self, index: int) -> None:
        """A batch is computed next."""
        self._consumer = index

    def wait_until(self, threshold: int) -> None:
        """Layer `threshold` is needed."""
        for gate, _ in self._batches.get(self._consumer, ()):
            with suppress(StoreUnavailable):  # `finish` tells.
                # Whoever loads has a deadline, and opens the gate or fails it in the end.
                self._device.follow(gate.wait(threshold, math.inf))

    def finish(self, index: int) -> bool:
        """Wait for all loads of a batch; whether they came whole."""
        runs = [run for _, run in self._batches.pop(index, ())]
        wait(runs)
        return all(run.exception() is None and run.result() for run in runs)

    def reset(self) -> None:
        """Wait for all loads that run, and forget them."""
        for index in list(self._batches):
            self.finish(index)
        self._consumer = -1

    def close(self) -> None:
        """End."""
        self.reset()
        self._thread.shutdown()
