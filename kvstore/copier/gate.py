"""Where two parties meet layer by layer: one computes or copies, the other follows."""

from __future__ import annotations

import threading
import time
from typing import Protocol

from kvstore.errors import StoreUnavailable


class Event(Protocol):
    """A point in the work of a device, such as a CUDA event."""

    @property
    def handle(self) -> int:
        """What the device's driver knows it by."""


class LayerGate:
    """Opens layer after layer; whoever follows passes those that are open. Thread-safe.

    A layer is opened with the event that must have happened on the device before its bytes may be
    touched; None: it has happened. On a CPU there are no events, so an open layer is ready.
    """

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self._events: list[Event | None] = []
        self.failed: str | None = None
        """Why nothing more will be opened; None: it will, or all is open."""
        self.opened_at = 0.0
        """When a layer was opened last, in monotonic seconds."""
        self._changed = threading.Condition()

    @classmethod
    def opened(cls, layers: int, event: Event | None) -> LayerGate:
        """A gate whose layers all wait for the same event."""
        gate = cls(layers)
        gate.open(layers, event)
        return gate

    def open(self, layers: int, event: Event | None = None) -> None:
        """Open all layers below `layers` that are not; those that are stay as they are."""
        with self._changed:
            self._events += [event] * (min(layers, self.layers) - len(self._events))
            self.opened_at = time.monotonic()
            self._changed.notify_all()

    def fail(self, reason: str) -> None:
        """Nothing more will be opened."""
        with self._changed:
            if len(self._events) < self.layers and self.failed is None:
                self.failed = reason
                self._changed.notify_all()

    @property
    def open_layers(self) -> int:
        """Layers that are open, from the first on."""
        return len(self._events)

    def wait(self, layer: int, deadline: float) -> Event | None:
        """The event of `layer`, once it is open; `deadline` in monotonic seconds.

        Raises:
            StoreUnavailable: it did not open in time, or never will.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: len(self._events) > layer or self.failed is not None,
                min(max(0.0, deadline - time.monotonic()), threading.TIMEOUT_MAX),
            )
            if len(self._events) > layer:
                return self._events[layer]
        raise StoreUnavailable(self.failed or f"layer {layer} was not there in time")
