"""Sessions over TCP, against bare sockets."""

from __future__ import annotations

import json
import shutil
import subprocess
from functools import partial
from typing import Final

from kvstore.benchmarks import pool
from kvstore.benchmarks.barestream import BareStream
from kvstore.benchmarks.cpu import Used, of_process
from kvstore.benchmarks.engine import Engine
from kvstore.benchmarks.figures import BenchmarkError, Report, Run, Samples
from kvstore.benchmarks.served import free_port, served
from kvstore.benchmarks.shapes import LLAMA_NHD

SHAPE: Final = LLAMA_NHD
_SECONDS: Final = 60.0
_NO_IPERF: Final = "iperf3 is not installed: the figures against it are left out"


def run(report: Report, *, size: int, streams: int) -> None:
    """Measure with `size` bytes of blocks and that many data connections."""
    blocks = max(2, size // SHAPE.block_bytes)
    # Room for all blocks, and for chunks that hold one.
    memory = {"size": max(blocks * 5 // 4, 16) * SHAPE.block_bytes}
    faces = {"tcp": "127.0.0.1:0", "grpc": None, "http": None}
    with served(memory=memory, server=faces, session={"streams": streams}) as daemon:
        config = daemon.config.model_copy(update={"address": f"tcp://{daemon.faces['tcp']}"})
        nbytes = blocks * SHAPE.block_bytes
        with (
            BareStream(nbytes, streams) as bare,
            BareStream(nbytes, streams, sums=True) as summing,
            Engine(SHAPE, blocks, config) as engine,
        ):
            _measure(report, bare, summing, engine, daemon.pid, streams)
    pool.run(report, size=size, streams=streams)


def _measure(
    report: Report,
    bare: BareStream,
    summing: BareStream,
    engine: Engine,
    daemon: int,
    streams: int,
) -> None:
    keys = engine.prompt(0)
    load = partial(engine.load, keys, engine.blocks)

    def copy_and_send() -> None:
        engine.copy_out(engine.blocks)
        bare.save()

    def receive_and_copy() -> None:
        bare.load()
        engine.copy_in(engine.blocks)

    used = {
        name: Used(of_process(summing.pid if name.startswith("hashing") else daemon))
        for name in ("save", "hashing save", "load", "hashing load")
    }
    taken = report.race(
        f"save and load over TCP, {streams} connections",
        {
            "bare save": Run(bare.save),
            "hashing save": used["hashing save"].run(summing.save),
            "bare save, copy": Run(copy_and_send),
            "save": used["save"].run(
                partial(engine.save, keys, engine.blocks),
                partial(engine.session.clear, timeout=_SECONDS),
            ),
            "bare load": Run(bare.load),
            "hashing load": used["hashing load"].run(summing.load),
            "bare load, copy": Run(receive_and_copy),
            "load": used["load"].run(load),
        },
    )
    engine.check(load)
    ways = {
        "a bare socket": "bare {}",
        "a bare socket that hashes at both ends": "hashing {}",
        "a bare socket, and the copy": "bare {}, copy",
    }
    against = {
        what: {name: taken[run.format(name)] for name in ("save", "load")}
        for what, run in ways.items()
    }
    for name in ("save", "load"):
        used[name].report(
            report,
            f"TCP {name}",
            used[f"hashing {name}"],
            engine.nbytes,
            against="a bare socket that hashes at both ends",
            streams=streams,
        )
    one_stream = _iperf3(engine.nbytes, report.samples)
    if one_stream is None:
        report.note(_NO_IPERF)
    else:
        against["iperf3, one stream"] = dict.fromkeys(("save", "load"), one_stream)
    for what, limits in against.items():
        for name, limit in limits.items():
            report.rate(
                f"TCP {name}",
                engine.nbytes,
                taken[name],
                limit,
                shape=SHAPE.name,
                block_bytes=SHAPE.block_bytes,
                streams=streams,
                congestion=bare.congestion,
                against=what,
            )


def _iperf3(nbytes: int, samples: int) -> Samples | None:
    """Seconds that iperf3 takes for as many bytes; None without it."""
    if shutil.which("iperf3") is None:
        return None
    port = str(free_port())
    seconds = []
    server = subprocess.Popen(
        ["iperf3", "-s", "-B", "127.0.0.1", "-p", port, "--forceflush"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        while "listening" not in server.stdout.readline():
            if server.poll() is not None:
                raise BenchmarkError("iperf3 could not listen; try again")
        for _ in range(samples):
            done = subprocess.run(
                ["iperf3", "-c", "127.0.0.1", "-p", port, "-n", str(nbytes), "-J"],
                capture_output=True,
                text=True,
                check=True,
                timeout=_SECONDS,
            )
            received = json.loads(done.stdout)["end"]["sum_received"]
            seconds.append(nbytes / (received["bits_per_second"] / 8))
    finally:
        server.kill()
        server.wait()
        assert server.stdout is not None
        server.stdout.close()
    return Samples(tuple(seconds))
