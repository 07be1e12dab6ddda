"""One peer: a connection that is made when it is needed, and what is asked and fetched over it."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

import numpy as np

from kvstore.blocks.spec import Namespace, Part
from kvstore.config import Config
from kvstore.errors import KVStoreError, ProtocolError, StoreUnavailable
from kvstore.telemetry import QuietLog, shown
from kvstore.tiers.peers.nixl import Helpers
from kvstore.tiers.peers.receive import Slots, by_nixl, over_tcp
from kvstore.tiers.remote import Breaker
from kvstore.transport import protocol
from kvstore.transport.channel import Channel
from kvstore.transport.protocol import split_numbers
from kvstore.transport.tcp import connect

_quiet: Final = QuietLog(logging.getLogger("kvstore.peers"))

_MOST_OPEN: Final = 256
_MISS: Final = 0
_IDLE_SECONDS: Final = 60.0

R = TypeVar("R")


There = dict[tuple[bytes, bytes], tuple[int, int]]
"""Objects by key and part's variant: when they were made and expire (Unix seconds, 0: never)."""


class Busy(KVStoreError):
    """The peer serves as much as it may; `others` had the same from it lately, by address."""

    def __init__(self, others: tuple[str, ...]) -> None:
        super().__init__("it serves as much as it may")
        self.others = others


class Refused(KVStoreError):
    """The peer does not want to: a tenant that is out of our reach, say."""


class Link:
    """A peer's daemon. Thread-safe; all calls block, and raise StoreUnavailable where it fails.

    Args:
        config: its address, and how it is connected to.
        token: shown to it, read anew for each connection.
        node: where it reaches this node.
        retry_seconds: the longest pause between trials while it fails.
        name: that its certificate must show, if not that of its address.
        count: adds to a counter.
        helpers: to fetch by NIXL, as far as that works.
    """

    def __init__(
        self,
        config: Config,
        token: Callable[[], str],
        node: str,
        retry_seconds: float,
        name: str | None,
        count: Callable[[str, int], None],
        helpers: Helpers | None = None,
    ) -> None:
        self.address = config.address or ""
        self.breaker = Breaker(retry_seconds)
        self._name = name
        self._count = count
        self._helpers = helpers
        self._nixl = Breaker(retry_seconds)
        self.serving = 0
        """Bytes that it was on its way to give to peers, when it last said so."""
        self.fetching = 0
        """Bytes that are being fetched from it."""
        self._config = config
        self._token = token
        self._node = node
        self._dialling = threading.Lock()
        self._lock = threading.Lock()
        self._leases = itertools.count(1)
        self._channel: Channel | None = None
        self._handles: OrderedDict[tuple[bytes, ...], int] = OrderedDict()
        self._used = time.monotonic()
        self._closed = False

    @property
    def load(self) -> float:
        """How busy it is, in bytes."""
        return self.serving + self.fetching

    def find(
        self, namespace: Namespace, parts: Sequence[Part], keys: Sequence[bytes], seconds: float
    ) -> There:
        """What it has itself of these.

        Raises:
            Refused: it does not say.
        """

        def ask(channel: Channel, handle: int, until: float) -> There:
            find = protocol.Find(handle, b"".join(keys))
            answer = self._call(channel, find, until, protocol.Holds)
            asked = list(itertools.product(keys, (part.variant for part in parts)))
            there = list(itertools.compress(asked, answer.held))
            times = split_numbers("q", answer.created), split_numbers("q", answer.expires)
            if len(answer.held) != len(asked) or {len(there)} != set(map(len, times)):
                raise ProtocolError("an answer does not fit its question")
            self.serving = max(0, answer.serving)
            return dict(zip(there, zip(*times, strict=True), strict=True))

        return self._within(namespace, parts, seconds, ask)

    def fetch(
        self,
        namespace: Namespace,
        part: Part,
        keys: Sequence[bytes],
        addresses: Sequence[int],
        seconds: float,
    ) -> list[int | str]:
        """Bring objects to memory; of each its XXH3, or the reason why it has not come.

        Nothing touches the memory any more when this returns or raises.

        Raises:
            Busy: it serves as much as it may.
            Refused: it does not say why.
        """
        nbytes = part.nbytes(namespace.block_tokens)

        def bring(channel: Channel, handle: int, until: float) -> list[int | str]:
            lease = next(self._leases)
            wait = min(protocol.MAX_WAIT, max(0.0, (until - time.monotonic()) / 2))
            acquire = protocol.Acquire(
                handle, lease, b"".join(keys), wait, len(keys), holes=True, own=True
            )
            try:
                held = self._call(channel, acquire, until, protocol.Held, lease)
                if held.reason == "busy":
                    raise Busy(held.others)
                come: list[int | str] = ["absent"] * len(keys)
                here = [number for number, tier in enumerate(held.tiers) if tier != _MISS]
                slots = np.frombuffer(held.slots, "<i8").astype(np.int64)
                if not here:
                    return come
                if len(held.tiers) != len(keys) or len(slots) != len(here):
                    raise ProtocolError("an answer does not fit its question")
                wanted = [at for at in range(len(here)) if at not in held.other]
                sums = self._receive(
                    channel, lease, slots[wanted], [addresses[here[at]] for at in wanted],
                    nbytes, until,
                )  # fmt: skip
                for at, checksum in zip(wanted, sums, strict=True):
                    come[here[at]] = "damaged" if checksum is None else checksum
                return come
            finally:
                channel.notify(protocol.Release(lease))

        with self._lock:
            self.fetching += nbytes * len(keys)
        try:
            return self._within(namespace, (part,), seconds, bring)
        finally:
            with self._lock:
                self.fetching -= nbytes * len(keys)

    def prefetch(
        self, namespace: Namespace, parts: Sequence[Part], keys: Sequence[bytes], seconds: float
    ) -> int:
        """Have it fetch blocks, which begin a segment, from this node; how many it has then.

        Raises:
            Refused: it does not want to.
        """

        def ask(channel: Channel, handle: int, until: float) -> int:
            request = protocol.Prefetch(handle, b"".join(keys), 0, source=self._node)
            return self._call(channel, request, until, protocol.Count).blocks

        return self._within(namespace, parts, seconds, ask)

    def _receive(
        self,
        channel: Channel,
        lease: int,
        slots: Slots,
        addresses: Sequence[int],
        nbytes: int,
        until: float,
    ) -> list[int | None]:
        if self._helpers is not None and (self._nixl.reason is None or self._nixl.may_try()):
            begun = time.monotonic()
            half = (begun + until) / 2  # The rest is left for another way.
            try:
                placed = self._call(channel, protocol.Where(lease), half, protocol.Placed)
                came = by_nixl(self._helpers, placed, slots, addresses, nbytes, half)
            except (StoreUnavailable, Refused) as e:
                self._nixl.failed(str(e))
                _quiet.warning(self.address, "%s gives nothing by NIXL: %s", self.address, e)
            else:
                self._nixl.worked(begun)
                self._count("fetched.by_nixl", len(came))
                return came
        return over_tcp(channel.carrier, lease, slots, addresses, nbytes, until)

    # -- the connection ---------------------------------------------------------------------------

    def _within(
        self,
        namespace: Namespace,
        parts: Sequence[Part],
        seconds: float,
        do: Callable[[Channel, int, float], R],
    ) -> R:
        """Do something with a handle; what goes wrong, other than by refusal, opens the breaker."""
        started = time.monotonic()
        until = started + seconds
        if self.breaker.reason is not None and not self.breaker.may_try():
            raise StoreUnavailable(self.breaker.reason)
        try:
            channel = self._connected(until)
            with channel.use() as usable:
                if not usable:
                    raise StoreUnavailable("the connection was closed")
                result = do(channel, self._handle(channel, namespace, parts, until), until)
        except (Busy, Refused):
            self.breaker.worked(started)
            raise
        except (KVStoreError, OSError, ValueError) as e:
            reason = f"{self.address}: {shown(str(e))}"
            self.breaker.failed(reason)
            if isinstance(e, ProtocolError):
                self.close_if_idle(0.0)
            raise StoreUnavailable(reason) from e
        self.breaker.worked(started)
        self._used = time.monotonic()
        return result

    def _connected(self, until: float) -> Channel:
        channel = self._channel
        if channel is not None and channel.broken is None:
            return channel
        if not self._dialling.acquire(timeout=max(0.0, until - time.monotonic())):
            raise StoreUnavailable("it is being connected to")
        try:
            channel = self._channel
            if channel is None or channel.broken is not None:
                if channel is not None:
                    channel.retire()
                if self._closed:
                    raise StoreUnavailable("closed")
                connection = connect(self._config, self._token(), self._node, self._name, until)
                channel = Channel(connection)
                with self._lock:
                    closed = self._closed
                    self._channel = None if closed else channel
                    self._handles.clear()
                if closed:
                    channel.retire()
                    raise StoreUnavailable("closed")
            return channel
        finally:
            self._dialling.release()

    def _handle(
        self, channel: Channel, namespace: Namespace, parts: Sequence[Part], until: float
    ) -> int:
        name = namespace.digest, *(part.variant for part in parts)
        with self._lock:
            if name in self._handles and self._channel is channel:
                self._handles.move_to_end(name)
                return self._handles[name]
        opened = self._call(channel, protocol.Open(namespace, tuple(parts)), until, protocol.Opened)
        with self._lock:
            if self._channel is channel:
                old = self._handles.get(name)
                self._handles[name] = opened.handle
                if len(self._handles) > _MOST_OPEN:
                    _, old = self._handles.popitem(last=False)
                if old is not None:
                    channel.notify(protocol.Close(old))
        return opened.handle

    def _call(
        self,
        channel: Channel,
        request: protocol.Message,
        until: float,
        kind: type[R],
        lease: int | None = None,
    ) -> R:
        answer = channel.call(request, max(0.0, until - time.monotonic()), lease=lease)
        if isinstance(answer, protocol.Failure):
            raise Refused(answer.reason)
        if not isinstance(answer, kind):
            raise ProtocolError(f"{type(request).__name__} was answered by something else")
        return answer

    def close_if_idle(self, seconds: float = _IDLE_SECONDS) -> None:
        """Give the connection up that was not used for so long, and what is open over it."""
        with self._lock:
            channel = self._channel
            if channel is None or self.fetching or time.monotonic() < self._used + seconds:
                return
            self._channel = None
            self._handles.clear()
        channel.retire()

    def close(self) -> None:
        """End; who is waiting, or receiving, gets StoreUnavailable."""
        with self._lock:
            self._closed = True
            channel, self._channel = self._channel, None
        if channel is not None:
            channel.cut()
