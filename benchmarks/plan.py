"""The sizes and rules that cost least for a trace, as a configuration with its reasons."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from kvstore.benchmarks.capacity import Load, Tell
from kvstore.benchmarks.policy import Found, Tiers
from kvstore.benchmarks.prices import lifetime
from kvstore.values import format_size, lasting

_SMALLEST: Final = 1 << 22
"""Bytes that a disk has at least."""
_RULES: Final = "all", "reused"
_FORECAST: Final = 0.005
"""The part of all blocks that `forecast` must find more than `lru`, which costs less."""
_FOLDER: Final = Path("/var/lib/kvstore")


class Plan:
    """Chooses, one value after the other, what costs least an hour: kept, and computed.

    Args:
        load: the trace.
        now: the present configuration, in bytes.
        memory, disk: the most bytes of each that may be chosen.
        tell: progress.
    """

    def __init__(self, load: Load, now: Tiers, memory: float, disk: float, tell: Tell) -> None:
        self._load = load
        self._now = now
        self._tell = tell
        self._done: dict[Tiers, Found] = {}
        sizes = [size for size in load.sizes() if size >= _SMALLEST] or [_SMALLEST]
        # What is on its way between engines and a disk: two of the longest prompts at least.
        self._longest = max(len(one.keys) for one in load.trace) * load.block_bytes
        fitting = [size for size in sizes if size <= memory] or [int(memory)]
        least = next((size for size in fitting if size >= 2 * self._longest), fitting[0])
        alone = [Tiers(size) for size in fitting]
        disks = [size for size in sizes if least < size <= disk]
        below = [Tiers(least, disk=size, write=rule) for size in disks for rule in _RULES]
        self._candidates = [*alone, *below]
        self._replay(now, *self._candidates)
        self.chosen = min(self._candidates, key=self._hourly)
        self._replay(learned := self._learned(self.chosen))
        if self._found(learned) > self._found(self.chosen) + _FORECAST:
            self.chosen = learned

    def _learned(self, tiers: Tiers) -> Tiers:
        """The same with the other policy where most is kept."""
        if tiers.disk:
            return tiers._replace(below="forecast")
        return tiers._replace(policy="forecast")

    def _replay(self, *tiers: Tiers) -> None:
        self._done |= self._load.replays(tiers, self._tell)

    def _found(self, tiers: Tiers) -> float:
        return self._done[tiers].rate

    def _computing(self, rate: float) -> float:
        """$ an hour for so much of what is asked for."""
        return self._load.saved(rate) * self._load.prices.computing

    def _hourly(self, tiers: Tiers) -> float:
        """$ for what is kept, and for computing what is not found."""
        return self._keeping(tiers) + self._computing(1 - self._found(tiers))

    def _keeping(self, tiers: Tiers) -> float:
        return self._load.hourly(tiers, self._done[tiers])

    def _wear(self, tiers: Tiers) -> str:
        told = self._load.told(tiers, self._done[tiers])
        if told["drive_years"] is None:
            return "nothing written"
        written = format_size(told["written_daily"])
        return f"{written} written a day, drives last {lifetime(told['drive_years'])}"

    def _share(self, tiers: Tiers) -> str:
        return f"{100 * self._found(tiers):.1f} % found"

    def lines(self, folder: Path | None) -> Iterator[str]:
        """YAML, with the reason beside each value; the disk lies in that folder."""
        load, chosen = self._load, self.chosen
        kept, everything = self._keeping(chosen), self._computing(1.0)
        rest = self._hourly(chosen) - kept
        yield f"# now {self._share(self._now)}, so {self._share(chosen)}"
        costs = f"{kept:.3g} to keep it, {rest:.3g} to compute the rest; all: {everything:.3g}"
        yield f"# $ an hour: {costs}"
        if self._hourly(chosen) >= everything:
            yield "# at these prices keeping does not pay; this loses least"
        yield "memory:"
        size = f"  size: {_size(chosen.memory)}"
        if chosen.disk:
            longest = format_size(self._longest)
            yield f"{size}  # prompts on their way to disk and back; the longest takes {longest}"
            yield "  policy: lru  # what goes here is on disk"
            yield "disk:"
            where = "as it is" if folder else "a folder on a local NVMe drive"
            yield f"  path: {json.dumps(str(folder or _FOLDER))}  # {where}"
            size = f"  size: {_size(chosen.disk)}"
        yield f"{size}  # {self._others(chosen)}"
        lru = chosen._replace(policy="lru", below="")
        learned = self._learned(lru)
        policy = "forecast" if chosen == learned else "lru"
        yield f"  policy: {policy}  # lru {self._share(lru)}, forecast {self._share(learned)}"
        if chosen.disk:
            yield "admission:"
            yield f"  disk: {chosen.write}"
            for rule in (chosen._replace(below="", write=one) for one in _RULES):
                cost = f"${self._hourly(rule):.3g} an hour"
                yield f"  # {rule.write}: {self._share(rule)}, {cost}, {self._wear(rule)}"
        summary = load.summary()
        if (ttl := summary["ttl"]) is not None:
            part = f"{100 * summary['reuse'][ttl]:.0f} %"
            yield f"# ttl: {ttl} with requests, if any: {lasting(ttl)} keep {part} of all reuse"

    def _others(self, chosen: Tiers) -> str:
        """The sizes beside the chosen one, by what they find and cost."""
        place = "disk" if chosen.disk else "memory"
        wanted = bool(chosen.disk), chosen.write
        same = [one for one in self._candidates if (bool(one.disk), one.write) == wanted]
        told = {getattr(one, place): one for one in same}
        sizes = sorted(told)
        at = sizes.index(getattr(chosen, place))
        return "; ".join(
            f"{_size(size)}: {self._share(told[size])}, ${self._hourly(told[size]):.3g} an hour"
            for size in sizes[max(0, at - 1) : at + 2]
        )


def _size(nbytes: int) -> str:
    return format_size(nbytes).replace(" ", "")
