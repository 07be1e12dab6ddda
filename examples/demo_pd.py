"""Prefill and decode apart: two vLLM servers on a core each, beside one on both cores.

While one answer is being written, a request with a long prompt comes. Where one server does both,
each token of the answer waits for a part of the prompt; apart, the other core computes that.

    python examples/demo_pd.py --python .venv-vllm/bin/python

Exit code 1: the answers differ, or the decode server had to compute the prompt.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from aiohttp import ClientError, ClientSession, ClientTimeout
from demo import (
    DOCUMENT,
    READER_ENVIRONMENT,
    DemoError,
    begin,
    last_words,
    progress_on,
    running_store,
    tell,
)
from model import ModelUnavailable, prepare
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

PROXY: Final = Path(__file__).with_name("pd_proxy.py")
START_SECONDS: Final = 300.0
ANSWER: Final = 160
"""Tokens of the answer that is being written."""
BEFORE: Final = 24
"""Of them, before the long prompt comes."""
MODEL: Final = "model"


@dataclass(frozen=True, slots=True)
class Measured:
    """What came of one way to use the two cores."""

    way: str
    first_token: float
    gaps: list[float]
    """Seconds between tokens of the other answer until the long prompt's first token."""
    text: str
    loaded: int


def free_port() -> int:
    """A port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@contextmanager
def process(command: list[str], environment: dict[str, str], log: Path) -> Iterator[None]:
    """A process with all its children."""
    with log.open("a") as words:
        started = subprocess.Popen(
            command, stdout=words, stderr=words, env=os.environ | environment,
            start_new_session=True,
        )  # fmt: skip
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            started.wait(30)
        with suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
        started.wait()


def server(
    python: str, model: Path, port: int, cores: str, log: Path, role: str, address: str
) -> Any:
    """A vLLM server on some cores, with a store if there is an address."""
    command = [
        python, "-m", "vllm.entrypoints.openai.api_server",
        "--model", str(model), "--served-model-name", MODEL, "--port", str(port),
        "--dtype", "float32", "--max-model-len", "4096", "--max-num-seqs", "4",
        "--enforce-eager", "--max-num-batched-tokens", "512",
    ]  # fmt: skip
    if address:
        connector = {
            "kv_connector": "KVStoreConnector",
            "kv_connector_module_path": "kvstore.connectors.vllm",
            "kv_role": role,
            "kv_connector_extra_config": {"kvstore.address": address},
        }
        command += ["--kv-transfer-config", json.dumps(connector)]
    variables = READER_ENVIRONMENT | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_CPU_OMP_THREADS_BIND": cores,
        "VLLM_NO_USAGE_STATS": "1",
    }
    return process(command, variables, log)


async def ready(client: ClientSession, port: int, log: Path) -> None:
    """Wait for a server."""
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        with suppress(ClientError, TimeoutError):
            async with client.get(f"http://127.0.0.1:{port}/health") as answer:
                if answer.status == 200:
                    return
        await asyncio.sleep(0.5)
    raise DemoError(f"a server did not start:\n{last_words(log)}")


async def tokens(client: ClientSession, port: int, prompt: str, count: int) -> AsyncIterator[str]:
    """The tokens of an answer as they come."""
    body = {
        "model": MODEL, "prompt": prompt, "max_tokens": count, "temperature": 0,
        "ignore_eos": True, "stream": True,
    }  # fmt: skip
    async with client.post(f"http://127.0.0.1:{port}/v1/completions", json=body) as answer:
        if answer.status != 200:
            raise DemoError(f"a server answered {answer.status}: {await answer.text()}")
        async for line in answer.content:
            if line.startswith(b"data: {"):
                yield json.loads(line[6:])["choices"][0]["text"]


async def measure(client: ClientSession, way: str, port: int, counts: int | None) -> Measured:
    """Have one answer written, and ask with a long prompt meanwhile."""
    document = DOCUMENT.read_text()
    times: list[float] = []
    enough = asyncio.Event()

    async def write() -> str:
        text = ""
        async for token in tokens(client, port, "Once upon a time", ANSWER):
            text += token
            times.append(time.perf_counter())
            if len(times) == BEFORE:
                enough.set()
        return text

    async for _ in tokens(client, port, document[-400:], 4):
        pass  # The first steps of a server are slow.
    writing = asyncio.create_task(write())
    await enough.wait()
    asked, answer, first = time.perf_counter(), "", 0.0
    async for token in tokens(client, port, document + "\nIn short:", 16):
        first = first or time.perf_counter()
        answer += token
    text = await writing
    during = [t for t in times if t <= first]
    gaps = [b - a for a, b in itertools.pairwise(times) if b > asked and a < first]
    if len(during) == len(times):
        raise DemoError("the answer had ended before the long prompt's did; raise ANSWER")
    loaded = 0
    if counts is not None:
        async with client.get(f"http://127.0.0.1:{counts}/metrics") as metrics:
            lines = (await metrics.text()).splitlines()
        found = [line for line in lines if line.startswith("kvstore_loaded_tokens_total")]
        loaded = sum(int(float(line.rsplit(" ", 1)[1])) for line in found)
    return Measured(way, first - asked, gaps, text + answer, loaded)


async def both(python: str, model: Path, folder: Path, progress: Progress) -> list[Measured]:
    """One way after the other."""
    log = folder / "log"
    measured = []
    async with ClientSession(timeout=ClientTimeout(total=None)) as client:
        task = begin(progress, "apart: starting two servers and the store")
        with ExitStack() as stack:
            address = stack.enter_context(running_store(folder, log))
            prefill, decode, port = free_port(), free_port(), free_port()
            roles = ("0", prefill, "kv_producer"), ("1", decode, "kv_consumer")
            for cores, at, role in roles:
                started = server(python, model, at, cores, log, role, address)
                stack.enter_context(started)
            names = [
                f"--{what}=http://127.0.0.1:{at}"
                for what, at in (("prefill", prefill), ("decode", decode))
            ]
            command = [sys.executable, str(PROXY), *names, "--port", str(port)]
            stack.enter_context(process(command, {}, log))
            for at in (prefill, decode, port):
                await ready(client, at, log)
            tell(progress, task, "apart: measuring")
            measured.append(await measure(client, "prefill and decode apart", port, decode))
        tell(progress, task, "apart: done", total=1, completed=1)
        task = begin(progress, "together: starting one server on both cores")
        port = free_port()
        with server(python, model, port, "0-1", log, "", ""):
            await ready(client, port, log)
            tell(progress, task, "together: measuring")
            measured.append(await measure(client, "one server on both cores", port, None))
        tell(progress, task, "together: done", total=1, completed=1)
    return measured


def show(measured: list[Measured], console: Console) -> None:
    """Print the table."""
    table = Table(
        "the same two cores",
        title="A long prompt comes while another answer is being written",
        caption="until the long prompt's first token; then, between tokens of the other answer",
        box=box.SIMPLE_HEAD,
    )
    for heading in ("first token", "gap, median", "gap, longest", "tokens handed over"):
        table.add_column(heading, justify="right")
    for one in measured:
        table.add_row(
            one.way,
            f"{one.first_token:.2f} s",
            f"{1000 * statistics.median(one.gaps):.0f} ms",
            f"{1000 * max(one.gaps):.0f} ms",
            str(one.loaded or "–"),
        )
    console.print(table)


def main() -> int:
    """Measure both ways, and print what came out."""
    parser = argparse.ArgumentParser(description="Prefill and decode apart, with vLLM.")
    parser.add_argument("--python", default=sys.executable, help="of vLLM's environment")
    parser.add_argument("--json", action="store_true", help="print the facts as one JSON object")
    given = parser.parse_args()
    console = Console(stderr=given.json)
    progress = progress_on(console)
    try:
        model = prepare(console)
        with tempfile.TemporaryDirectory(prefix="kvstore-pd-") as name, progress:
            measured = asyncio.run(both(given.python, model, Path(name), progress))
    except (DemoError, ModelUnavailable) as e:
        console.print(f"[red]error:[/] {escape(str(e))}", highlight=False)
        return 1
    problems = []
    if measured[0].text != measured[1].text:
        problems.append("the answers differ")
    if not measured[0].loaded:
        problems.append("the decode server computed the prompt")
    if given.json:
        facts = [
            {"way": m.way, "first_token": m.first_token, "gaps": m.gaps, "loaded": m.loaded}
            for m in measured
        ]
        print(json.dumps({"measured": facts, "problems": problems}, indent=2))
    else:
        show(measured, console)
    for problem in problems:
        console.print(f"[red]wrong:[/] {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
