"""Blocks of one daemon that an engine loads through another one, against bare sockets."""

from __future__ import annotations

import itertools
import time
from typing import Any, Final

from kvstore.benchmarks.barestream import BareStream
from kvstore.benchmarks.engine import Engine
from kvstore.benchmarks.figures import BenchmarkError, Report, Run
from kvstore.benchmarks.served import free_port, served
from kvstore.benchmarks.shapes import LLAMA_NHD

SHAPE: Final = LLAMA_NHD
_SECONDS: Final = 30.0


def run(report: Report, *, size: int, streams: int) -> None:
    """Measure with `size` bytes of blocks and that many data connections between the daemons."""
    blocks = max(2, size // SHAPE.block_bytes)
    ports = [free_port() for _ in range(2)]
    nodes = [f"tcp://127.0.0.1:{port}" for port in ports]
    settings: list[dict[str, Any]] = [
        {
            "memory": {"size": max(blocks * 3, 16) * SHAPE.block_bytes},
            "server": {"tcp": f"127.0.0.1:{port}", "name": f"n{port}", "grpc": None, "http": None},
            "peers": {"nodes": nodes, "streams": streams, "probe_seconds": _SECONDS},
        }
        for port in ports
    ]
    with (
        served(**settings[0]) as first,
        served(**settings[1]) as second,
        BareStream(blocks * SHAPE.block_bytes, streams, sums=True) as bare,
        Engine(SHAPE, blocks, first.config) as there,
        Engine(SHAPE, blocks, second.config) as here,
    ):
        seeds, keys = itertools.count(1), list[bytes]()

        def compute() -> None:
            """Other blocks, which the first daemon alone has, and the second one knows of."""
            keys[:] = there.prompt(next(seeds))
            there.save(keys, blocks)
            until = time.monotonic() + _SECONDS
            while here.session.lookup(keys, wait=_SECONDS).blocks < blocks:
                if time.monotonic() > until:
                    raise BenchmarkError("the second daemon does not find the blocks of the first")
                time.sleep(0.05)

        def receive_and_copy() -> None:
            bare.load()
            here.copy_in(blocks)

        def load() -> None:
            here.load(keys, blocks)

        taken = report.race(
            "load through a peer",
            {
                "bare": Run(bare.load),
                "bare, copy": Run(receive_and_copy),
                "load": Run(load, compute),
            },
        )
        for limit, what in (
            ("bare", "a bare socket that hashes at both ends"),
            ("bare, copy", "a bare socket that hashes at both ends, and the copy"),
        ):
            report.rate(
                "load from a peer",
                here.nbytes,
                taken["load"],
                taken[limit],
                shape=SHAPE.name,
                block_bytes=SHAPE.block_bytes,
                streams=streams,
                congestion=bare.congestion,
                against=what,
            )
