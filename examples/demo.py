"""Three processes and a restart: what one of them has read, the next ones need not compute.

Each reader is a process of its own with SmolLM2-135M-Instruct, under Hugging Face transformers,
vLLM or SGLang. The first reads a long document and saves its KV to a store; the second finds it in
memory; then the store is restarted, and the third is served from disk. With all engines, one reads
the document, and both others find it in memory.

    python examples/demo.py           a table for people
    python examples/demo.py --json    the same facts as one JSON object
    python examples/demo.py --engine vllm --python vllm=.venv-vllm/bin/python    with vLLM engines
    python examples/demo.py --engine all --python vllm=… --python sglang=…       with one of each

Exit code 1: an answer is not the one given without the store, or nothing was loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

from model import ModelUnavailable, prepare
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

HERE: Final = Path(__file__).resolve().parent
DOCUMENT: Final = HERE.parent / "LICENSE"
READERS: Final = {
    "transformers": "demo_reader.py",
    "vllm": "demo_vllm_reader.py",
    "sglang": "demo_sglang_reader.py",
}
# Threads that spin while another program has their core would make every time meaningless.
READER_ENVIRONMENT: Final = {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
START_SECONDS: Final = 60.0
STOP_SECONDS: Final = 60.0
SILENT_SECONDS: Final = 10.0


@dataclass(frozen=True, slots=True)
class Reader:
    """One reading process, and the tier that its document should come from (None: computed)."""

    name: str
    question: str
    tier: str | None


QUESTIONS: Final = (
    "Which rights does section 3 grant?",
    "What must a redistribution include?",
    "May trade names be used?",
)
# Each line is one run of the store; between two lines it is restarted.
RUNS: Final = (
    (Reader("first", QUESTIONS[0], None), Reader("second", QUESTIONS[1], "memory")),
    (Reader("third", QUESTIONS[2], "disk"),),
)
# Named by their engines: the first computes, the others find it.
EVERY_ENGINE: Final = (
    tuple(
        Reader(name, question, "memory" if number else None)
        for number, (name, question) in enumerate(zip(READERS, QUESTIONS, strict=True))
    ),
)


class DemoError(RuntimeError):
    """A process of the demo failed; the message holds its last words."""


@contextmanager
def running_store(folder: Path, log: Path) -> Iterator[str]:
    """`kvstore serve` with memory and disk in `folder`; yields its address, stops it at the end."""
    socket = folder / "kvstore.sock"
    command = [
        sys.executable, "-m", "kvstore.server.cli", "serve",
        "--socket", str(socket),
        "--memory", "512MiB",
        "--disk", str(folder / "disk"),
        "--disk-size", "1GiB",
        "--grpc", "none", "--http", "none",
    ]  # fmt: skip
    with log.open("a") as errors:
        store = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors)
    assert store.stdout is not None
    try:
        readable, _, _ = select.select([store.stdout], [], [], START_SECONDS)
        if not readable or not store.stdout.readline().startswith(b"ready"):
            raise DemoError(f"the store did not start:\n{last_words(log)}")
        yield f"unix://{socket}"
    finally:
        store.send_signal(signal.SIGTERM)
        try:
            store.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            store.kill()
            store.wait()
        store.stdout.close()
    if store.returncode != 0:
        raise DemoError(f"the store ended with code {store.returncode}:\n{last_words(log)}")


def run_reader(
    reader: Reader,
    program: list[str],
    model: Path,
    address: str,
    log: Path,
    tokens: int,
    progress: Progress,
) -> dict[str, Any]:
    """Run one reader to its end, showing its steps; returns its result."""
    command = [
        *program,
        "--model", str(model),
        "--address", address,
        "--document", str(DOCUMENT),
        "--question", reader.question,
        "--new-tokens", str(tokens),
    ]  # fmt: skip
    task = begin(progress, f"{reader.name}: starting")
    result: dict[str, Any] | None = None
    with (
        log.open("a") as errors,
        subprocess.Popen(
            command,
            bufsize=0,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=READER_ENVIRONMENT | os.environ,
        ) as process,
    ):
        assert process.stdout is not None
        for line in spoken(process.stdout, progress, reader.name):
            event = json.loads(line)
            result = event.get("result", result)
            if "step" in event:
                tell(progress, task, f"{reader.name}: {event['step']}")
    if process.returncode != 0 or result is None:
        raise DemoError(f"{reader.name}: ended with code {process.returncode}:\n{last_words(log)}")
    tell(progress, task, f"{reader.name}: done", total=1, completed=1)
    return {"reader": reader.name, "expected_tier": reader.tier} | result


def spoken(pipe: IO[bytes], progress: Progress, whose: str) -> Iterator[bytes]:
    """The lines of an unbuffered pipe. Without a terminal, a long silence is told."""
    while True:
        if progress.disable and not select.select([pipe], [], [], SILENT_SECONDS)[0]:
            note(progress, f"{whose}: …")
        elif line := pipe.readline():
            yield line
        else:
            return


def begin(progress: Progress, text: str) -> TaskID:
    """Show that something begins."""
    task = progress.add_task("")
    tell(progress, task, text)
    return task


def tell(progress: Progress, task: TaskID, text: str, **change: Any) -> None:
    """Show what a task does now; in a line with the time since the start, without a terminal."""
    progress.update(task, description=text, **change)
    if progress.disable:
        note(progress, text)


def note(progress: Progress, text: str) -> None:
    """Print a line with the time since the start."""
    passed = progress.get_time() - (progress.tasks[0].start_time or 0.0)
    progress.console.print(f"{passed:5.1f} s  {text}", markup=False, highlight=False)


def last_words(log: Path) -> str:
    """The end of a log."""
    return log.read_text(errors="replace").strip()[-2000:] or "(it said nothing)"


def progress_on(console: Console) -> Progress:
    """Steps with their seconds, for who watches a terminal."""
    return Progress(
        SpinnerColumn(finished_text="✓"),
        TextColumn("{task.description}", markup=False),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    )


def run(
    engine: str, pythons: dict[str, str], model: Path, tokens: int, console: Console
) -> list[dict[str, Any]]:
    """The whole demo in a temporary folder; one result per reader.

    `engine` may be all; `pythons` are the interpreters of engines' environments, if not ours.

    Raises:
        DemoError: the store or a reader failed.
    """
    progress = progress_on(console)
    results = []
    with tempfile.TemporaryDirectory(prefix="kvstore-demo-") as name, progress:
        folder = Path(name)
        log = folder / "log"
        for readers in EVERY_ENGINE if engine == "all" else RUNS:
            task = begin(progress, "store: restarting" if results else "store: starting")
            with running_store(folder, log) as address:
                tell(progress, task, "store: ready", total=1, completed=1)
                for reader in readers:
                    which = reader.name if engine == "all" else engine
                    program = [pythons.get(which, sys.executable), str(HERE / READERS[which])]
                    results.append(
                        run_reader(reader, program, model, address, log, tokens, progress)
                    )
    return results


def problems(results: list[dict[str, Any]]) -> list[str]:
    """What a result should not be."""
    found = []
    for result in results:
        name, tier, loaded = result["reader"], result["expected_tier"], result["loaded_tokens"]
        if not result["identical"]:
            found.append(f"{name}: the answer differs from the one without the store")
        if tier is None and not result["blocks_saved"]:
            found.append(f"{name}: nothing was saved")
        if tier is not None and not loaded.get(tier):
            found.append(f"{name}: nothing was loaded from {tier} ({result['reason']})")
    return found


def show(results: list[dict[str, Any]], console: Console) -> None:
    """Print the table, and what was asked and answered."""
    every = results[0]["reader"] in READERS
    table = Table(
        "engine" if every else "reader",
        title="One document, computed by one engine, answered by the two others"
        if every
        else "One document, three processes; the store was restarted before the third",
        caption="tokens of the prompt; time to the first token without and with the store",
        box=box.SIMPLE_HEAD,
    )
    for heading in ("computed", "loaded", "from", "without", "with", "speed-up", "same answer"):
        table.add_column(heading, justify="right")
    for result in results:
        alone, stored = result["first_token_seconds_alone"], result["first_token_seconds"]
        loaded = result["loaded_tokens"]
        table.add_row(
            result["reader"],
            str(result["computed_tokens"]),
            str(sum(loaded.values())),
            ", ".join(loaded) or "–",
            f"{alone:.2f} s",
            f"{stored:.2f} s",
            f"{alone / stored:.1f}×",
            "yes" if result["identical"] else "[red]NO[/]",
        )
    console.print(table)
    took = results[0].get("save_seconds")
    console.print(
        "The first reader finds nothing to load, and saves what it computes"
        + (f" in {took:.2f} s" if took is not None else "")
        + ": what it takes longer is its save, or chance.",
        highlight=False,
    )
    for result in results:
        console.print(f"[bold]{result['question']}[/]", highlight=False)
        console.print(f"  {result['answer']}", markup=False, highlight=False)


def conclude(
    run: Callable[[Path, Console], list[dict[str, Any]]],
    show: Callable[[list[dict[str, Any]], Console], None],
    *,
    as_json: bool,
) -> int:
    """Prepare the model, run a demo with it, print what came out; the exit code."""
    console = Console(stderr=as_json)
    try:
        results = run(prepare(console), console)
    except (DemoError, ModelUnavailable) as e:
        console.print(f"[red]error:[/] {escape(str(e))}", highlight=False)
        return 1
    wrong = problems(results)
    if as_json:
        print(json.dumps({"readers": results, "problems": wrong}, indent=2))
    else:
        show(results, console)
    for problem in wrong:
        console.print(f"[red]wrong:[/] {escape(problem)}", highlight=False)
    return 1 if wrong else 0


def main() -> int:
    """Ask three readers, and print what came out."""
    parser = argparse.ArgumentParser(description="Three processes share a document's KV.")
    parser.add_argument("--json", action="store_true", help="print the facts as one JSON object")
    parser.add_argument("--engine", choices=[*READERS, "all"], default="transformers")
    parser.add_argument("--new-tokens", type=int, default=32, help="length of each answer")
    parser.add_argument(
        "--python",
        action="append",
        default=[],
        metavar="ENGINE=PATH",
        type=lambda text: tuple(text.split("=", 1)),
        help="interpreter of an engine's environment (default: this one); may be repeated",
    )
    given = parser.parse_args()

    def asked(model: Path, console: Console) -> list[dict[str, Any]]:
        return run(given.engine, dict(given.python), model, given.new_tokens, console)

    return conclude(asked, show, as_json=given.json)


if __name__ == "__main__":
    sys.exit(main())
