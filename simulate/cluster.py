"""What a pool of nodes is worth: a trace of requests replayed over 1 to 1,000 of them.

    python -m simulate.cluster                               a made trace, a table
    python -m simulate.cluster --trace conversation.jsonl    one of your own (docs/policy.md)
    python -m simulate.cluster --json | --png scale.png

Each node has a memory of so many blocks, evicted as the daemon does (`kvstore.memory.eviction`);
what it fetches from a peer is lent (`Lru.cool`). Who has what is found in the daemon's own table
(`kvstore.tiers.peers.table`, up to 64 nodes; beyond that in a plain one with the same answers, as
in a Valkey), and who is asked is decided by `kvstore.tiers.peers.policy`. Time is the trace's:
nothing here is fast or slow. Blocks are those of the trace, 512 tokens each in Mooncake's.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from kvstore import traces
from kvstore.benchmarks.made import made_trace
from kvstore.memory.eviction import Lru, Node
from kvstore.slices import finish
from kvstore.tiers.base import SEGMENT_TOKENS
from kvstore.tiers.peers.policy import ranked, to_ask
from kvstore.tiers.peers.table import MAX_NODES, Table

BLOCK_TOKENS: Final = 512
SEGMENT: Final = SEGMENT_TOKENS // BLOCK_TOKENS
KV_BYTES_PER_TOKEN: Final = 131_072
"""Of Llama-3.1-8B in bfloat16."""
WINDOW_SECONDS: Final = 60.0
"""Over which a router counts the requests that it gave to a node."""
MOST_LOAD: Final = 1.25
"""Times the mean load that a router gives to a node for the sake of a prefix."""
DIRECTORY_BYTES: Final = 6.0 * 16
"""That a segment takes in a Valkey for each node that has it (docs/peers.md)."""

CACHES: Final = ("private", "pool", "shared")
ROUTERS: Final = ("random", "robin", "prefix")


class Request(NamedTuple):
    """When it comes, in seconds, and its blocks, each named by all before it."""

    at: float
    blocks: tuple[int, ...]


def numbered(trace: Iterable[traces.Request]) -> list[Request]:
    """A trace with numbers for its keys."""
    numbers: dict[bytes, int] = {}
    return [
        Request(one.at, tuple(numbers.setdefault(key, len(numbers)) for key in one.keys))
        for one in trace
    ]


class Block(Node, eq=False):
    """A block in a node's memory. `lent`: it came from a peer, and was used once."""

    key: int
    lent: bool = False


class Directory:
    """Which nodes may have which segments, by their first block; counts what is told to it."""

    def __init__(self, nodes: int) -> None:
        self.updates = 0
        self._table = Table() if nodes <= MAX_NODES else None
        self._plain: dict[int, set[int]] = {}
        self._news: dict[int, dict[int, bool]] = {}

    def tell(self, node: int, segment: int, *, there: bool) -> None:
        """A segment has come to a node, or is gone from it; others hear of it with the next one."""
        self.updates += 1
        self._news.setdefault(node, {})[segment] = there

    def _hear(self) -> None:
        for node, news in self._news.items():
            for there in (True, False):
                segments = [segment for segment, is_there in news.items() if is_there is there]
                if self._table is not None and segments:
                    change = self._table.adding if there else self._table.removing
                    finish(change(node, np.array(segments, np.uint64) + np.uint64(1)))
                for segment in segments if self._table is None else ():
                    holders = self._plain.setdefault(segment, set())
                    (holders.add if there else holders.discard)(node)
        self._news.clear()

    def find(self, segments: Sequence[int]) -> list[list[int]]:
        """The nodes of each."""
        self._hear()
        if self._table is None:
            return [list(self._plain.get(segment, ())) for segment in segments]
        bits = self._table.find([segment + 1 for segment in segments])
        return [[n for n in range(MAX_NODES) if one >> n & 1] if one else [] for one in bits]

    def forget(self, node: int) -> None:
        """A node is gone."""
        self._hear()
        if self._table is not None:
            finish(self._table.dropping(node))
        for holders in self._plain.values():
            holders.discard(node)

    @property
    def nbytes(self) -> float:
        """What it takes; beyond 64 nodes, in a Valkey."""
        if self._table is not None:
            return float(self._table.nbytes)
        return DIRECTORY_BYTES * sum(map(len, self._plain.values()))


@dataclass
class Cache:
    """A node's memory of at most `capacity` blocks."""

    number: int
    capacity: int
    directory: Directory
    blocks: dict[int, Block] = field(default_factory=dict)
    order: Lru[Block] = field(default_factory=Lru)
    heads: set[int] = field(default_factory=set)

    def use(self, key: int) -> None:
        """A block that is here was used; one that was lent stays now."""
        block = self.blocks[key]
        block.lent = False
        self.order.touch(block)

    def put(self, key: int, *, lent: bool, head: bool) -> None:
        """Take in a block, and give up others for it; `head`: a segment begins with it."""
        while len(self.blocks) >= self.capacity:
            self.evict(next(self.order.candidates()))
        block = self.blocks[key] = Block(key=key, lent=lent)
        self.order.add(block)
        if head:
            self.heads.add(key)
            self.directory.tell(self.number, key, there=True)

    def evict(self, block: Block) -> None:
        """Give one up."""
        self.order.remove(block)
        del self.blocks[block.key]
        if block.key in self.heads:
            self.heads.discard(block.key)
            self.directory.tell(self.number, block.key, there=False)

    def cool(self, keys: Sequence[int]) -> None:
        """Blocks that were lent have been used: they go first, the last one before the others."""
        for key in keys:
            block = self.blocks.get(key)
            if block is not None and block.lent:
                self.order.cool(block)


@dataclass
class Result:
    """What came of a trace: tokens asked for, and by where they came from."""

    nodes: int
    cache: str
    router: str
    tokens: int = 0
    local: int = 0
    peers: int = 0
    shared: int = 0
    wire_bytes: int = 0
    wire_bytes_per_second: float = 0.0
    directory_updates_per_second: float = 0.0
    directory_bytes: float = 0.0
    busiest: float = 0.0
    before_death: float | None = None
    after_death: float | None = None
    seconds_to_recover: float | None = None

    @property
    def hit_rate(self) -> float:
        """Part of the tokens that need not be computed."""
        return (self.local + self.peers + self.shared) / max(1, self.tokens)


def simulate(
    trace: Sequence[Request],
    nodes: int,
    capacity: int,
    cache: str,
    router: str,
    *,
    death: bool = False,
    seed: int = 0,
) -> Result:
    """Replay a trace over `nodes` of `capacity` blocks each.

    `cache` is one of `CACHES`: each node its own, a pool, or beside them one shared tier that keeps
    everything for ever; `router` one of `ROUTERS`. With `death` the busiest node dies half-way, and
    comes back empty.
    """
    chance, directory = random.Random(seed), Directory(nodes)
    caches = [Cache(number, capacity, directory) for number in range(nodes)]
    result, everything = Result(nodes, cache, router), set[int]()
    given, recent = Counter[int](), deque[tuple[float, int]]()
    hits: list[float] = []
    for number, (at, blocks) in enumerate(trace):
        if death and number == len(trace) // 2:
            _die(caches, max(range(nodes), key=lambda node: given[node]), directory)
        while recent and recent[0][0] < at - WINDOW_SECONDS:
            given[recent.popleft()[1]] -= 1
        heads = blocks[::SEGMENT]
        holders = directory.find(heads) if cache == "pool" or router == "prefix" else []
        node = _routed(router, number, holders, given, nodes, chance)
        given[node] += 1
        recent.append((at, node))
        place = caches[node]
        local, fetched = _prefix(place, blocks), list[int]()
        if cache == "pool" and local < len(blocks):
            fetched = _from_peers(caches, node, blocks, local, holders, given)
        elif cache == "shared":
            fetched = list(_while_in(everything, blocks[local:]))
            everything.update(blocks)
        _take(place, blocks, local, fetched, lend=cache == "pool")
        found = local + len(fetched)
        result.tokens += len(blocks) * BLOCK_TOKENS
        result.local += local * BLOCK_TOKENS
        if cache == "pool":
            result.peers += len(fetched) * BLOCK_TOKENS
        else:
            result.shared += len(fetched) * BLOCK_TOKENS
            saved = len(blocks) - found if cache == "shared" else 0
            result.wire_bytes += saved * BLOCK_TOKENS * KV_BYTES_PER_TOKEN
        result.wire_bytes += len(fetched) * BLOCK_TOKENS * KV_BYTES_PER_TOKEN
        hits.append(found / max(1, len(blocks)))
    seconds = max(1.0, trace[-1].at - trace[0].at)
    result.wire_bytes_per_second = result.wire_bytes / seconds
    result.directory_updates_per_second = directory.updates / seconds
    result.directory_bytes = directory.nbytes
    if death:
        _recovery(result, hits, [request.at for request in trace])
    return result


def _prefix(place: Cache, blocks: Sequence[int]) -> int:
    """How many blocks from the start are here."""
    return next((i for i, key in enumerate(blocks) if key not in place.blocks), len(blocks))


def _while_in(known: set[int], blocks: Sequence[int]) -> Iterator[int]:
    for key in blocks:
        if key not in known:
            return
        yield key


def _from_peers(
    caches: Sequence[Cache],
    node: int,
    blocks: Sequence[int],
    local: int,
    holders: Sequence[Sequence[int]],
    load: Counter[int],
) -> list[int]:
    """What others have of a request's blocks after the first `local`, as the daemon asks them."""
    names = [[str(n) for n in some if n != node] for some in holders[local // SEGMENT :]]
    order = ranked(names, lambda name: load[int(name)], blocks[0])
    asked = to_ask(names, order)
    found = []
    for number, key in enumerate(blocks[local:], local):
        segment = number // SEGMENT - local // SEGMENT
        if not any(
            segment in segments and key in caches[int(name)].blocks
            for name, segments in asked.items()
        ):
            break
        found.append(key)
    return found


def _take(
    place: Cache, blocks: Sequence[int], local: int, fetched: Sequence[int], *, lend: bool
) -> None:
    """A request has used all its blocks: those it found, and those it computed and saved."""
    lent = set(fetched) if lend else set[int]()
    kept = blocks[: place.capacity]
    for number in range(len(kept) - 1, -1, -1):  # The first one is to be the last to go.
        key = kept[number]
        if key in place.blocks:
            place.use(key)
    for number, key in enumerate(kept):
        if key not in place.blocks:
            place.put(key, lent=key in lent, head=number % SEGMENT == 0)
    place.cool(fetched)


def _routed(
    router: str,
    number: int,
    holders: Sequence[Sequence[int]],
    given: Counter[int],
    nodes: int,
    chance: random.Random,
) -> int:
    if router == "random":
        return chance.randrange(nodes)
    if router == "robin":
        return number % nodes
    least = min(range(nodes), key=lambda node: (given[node], (node - number) % nodes))
    most = MOST_LOAD * (sum(given.values()) + 1) / nodes + 1
    has = Counter[int]()
    for some in holders:
        going = [node for node in some if not has or node in has]
        if not going:
            break
        has.update(going)
    allowed = [node for node, _ in has.most_common() if given[node] < most]
    return allowed[0] if allowed else least


def _die(caches: list[Cache], node: int, directory: Directory) -> None:
    directory.forget(node)
    caches[node] = Cache(node, caches[node].capacity, directory)


def _recovery(result: Result, hits: Sequence[float], times: Sequence[float]) -> None:
    """Hit rates of the 200 requests before the death and after it, and when it is as before.

    That is the middle of the first 200 requests that hit as often, in seconds after the death.
    """
    middle, window = len(hits) // 2, min(200, len(hits) // 4)
    mean: Callable[[Sequence[float]], float] = lambda some: sum(some) / max(1, len(some))  # noqa: E731
    result.before_death = mean(hits[middle - window : middle])
    result.after_death = mean(hits[middle : middle + window])
    for first in range(middle, len(hits) - window + 1, 10):
        if mean(hits[first : first + window]) >= 0.98 * result.before_death:
            began = first == middle  # It was never worse.
            result.seconds_to_recover = 0.0 if began else times[first + window // 2] - times[middle]
            return


def everything(
    trace: Sequence[Request], sizes: Sequence[int], capacity: int, tell: Callable[[str], None]
) -> list[Result]:
    """All caches and routers at all sizes, and the same with a node's death."""
    results = []
    for nodes in sizes:
        for cache in CACHES:
            for router in ROUTERS:
                tell(f"{nodes} nodes, {cache}, {router}")
                results.append(simulate(trace, nodes, capacity, cache, router))
            if nodes > 1:
                tell(f"{nodes} nodes, {cache}, one of which dies")
                results.append(simulate(trace, nodes, capacity, cache, "prefix", death=True))
    return results


def show(results: Sequence[Result]) -> None:
    """Print a table."""
    from rich.console import Console
    from rich.table import Table as Printed

    table = Printed(
        "nodes", "cache", "router", "hit", "local", "peers or tier", "wire", "directory"
    )
    for one in results:
        if one.before_death is not None:
            continue
        table.add_row(
            str(one.nodes), one.cache, one.router, f"{one.hit_rate:.1%}",
            f"{one.local / one.tokens:.1%}", f"{(one.peers + one.shared) / one.tokens:.1%}",
            f"{one.wire_bytes_per_second / 1e9:.2f} GB/s",
            f"{one.directory_updates_per_second:.1f}/s, {one.directory_bytes / 1e6:.2f} MB",
        )  # fmt: skip
    Console().print(table)
    for one in results:
        if one.before_death is not None and one.after_death is not None:
            again = one.seconds_to_recover
            print(
                f"{one.nodes} nodes, {one.cache}: a node dies: {one.before_death:.1%} before, "
                f"{one.after_death:.1%} after, as before "
                + ("not within the trace" if again is None else f"after {again:.0f} s")
            )


def draw(results: Sequence[Result], path: Path) -> None:
    """A picture of hit rates by number of nodes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for cache, style in zip(CACHES, ("--", "-", ":"), strict=True):
        for router, colour in zip(ROUTERS, ("tab:red", "tab:orange", "tab:blue"), strict=True):
            some = [
                one
                for one in results
                if (one.cache, one.router) == (cache, router) and one.before_death is None
            ]
            rates = [100 * one.hit_rate for one in some]
            axes.plot(
                [one.nodes for one in some], rates, style, color=colour, label=f"{cache}, {router}"
            )
    axes.set(xscale="log", xlabel="nodes", ylabel="tokens not computed, %", ylim=(0, None))
    axes.legend(fontsize=7, ncols=3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> int:
    """Simulate, and print what came out."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--trace", type=Path, help="see docs/policy.md (default: a made one)")
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 4, 16, 64, 250, 1000])
    parser.add_argument("--blocks", type=int, default=1000, help="of memory per node")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--png", type=Path, help="draw a picture (needs matplotlib)")
    given = parser.parse_args()
    if min(given.nodes) < 1 or given.blocks < 1:
        parser.error("give at least one node, and one block")
    try:
        read = made_trace() if given.trace is None else traces.read_trace(given.trace)
    except (OSError, ValueError) as e:
        parser.error(str(e))
    trace = numbered(read)

    def tell(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    results = everything(trace, given.nodes, given.blocks, tell)
    if given.json:
        said: list[dict[str, Any]] = [asdict(one) | {"hit_rate": one.hit_rate} for one in results]
        print(json.dumps(said, indent=2))
    else:
        show(results)
    if given.png is not None:
        draw(results, given.png)
    return 0


if __name__ == "__main__":
    sys.exit(main())
