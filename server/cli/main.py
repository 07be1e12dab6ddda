"""The `kvstore` command."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from kvstore import __version__
from kvstore.benchmarks.command import bench_app
from kvstore.commands import grouped, opt
from kvstore.errors import KVStoreError
from kvstore.server.cli import blocks, node, planning
from kvstore.server.cli.doctor import doctor
from kvstore.server.cli.options import ConfigOption
from kvstore.server.cli.output import progress
from kvstore.server.cli.pieces import calibrate, pieces_app
from kvstore.telemetry import shown

_log = logging.getLogger("kvstore.cli")

_MAX_NAME: Final = 256


class _Commands(TyperGroup):
    """Tells wrong values in plain words."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except typer.BadParameter as e:
            e.message = e.message.removeprefix("Value error, ")
            raise


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    add_completion=False,
    help="KV-cache storage and transfer for LLM inference.",
    pretty_exceptions_enable=False,
)
token_app = typer.Typer(no_args_is_help=True, help="Tokens that let callers in.")
app.add_typer(bench_app, name="bench")
app.add_typer(token_app, name="token")
for _command in (*blocks.COMMANDS, *node.COMMANDS, doctor, *planning.COMMANDS):
    app.command()(grouped(_command))
app.add_typer(node.operations_app, name="operations")
app.add_typer(pieces_app, name="pieces")
app.command()(calibrate)


def main() -> None:
    """Run the command; our own errors, and files that fail, become one line and exit code 1."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # Whatever the terminal cannot show.
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except (KVStoreError, OSError, MemoryError) as e:
        _log.debug("the error came from", exc_info=True)
        text = shown(str(e) or "out of memory")
        Console(stderr=True, soft_wrap=True).print(Text.assemble(("error:", "red"), f" {text}"))
        sys.exit(1)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def _given(values: dict[str, Any]) -> dict[str, Any]:
    """Without flags that were not given."""
    kept = {k: _given(v) if isinstance(v, dict) else v for k, v in values.items()}
    return {name: value for name, value in kept.items() if value not in (None, {})}


@app.command()
def serve(
    config: ConfigOption = None,
    socket: Annotated[str | None, opt("Unix socket to listen on.")] = None,
    memory: Annotated[str | None, opt("Size of the memory tier, e.g. 8GiB.")] = None,
    disk: Annotated[str | None, opt("Folder of the disk tier.")] = None,
    disk_size: Annotated[str | None, opt("Size of the disk tier.")] = None,
    grpc: Annotated[str | None, opt("host:port of the gRPC API, or none.")] = None,
    http: Annotated[str | None, opt("host:port of HTTP, or none.")] = None,
    tcp: Annotated[str | None, opt("host:port for sessions over TCP.")] = None,
    tokens: Annotated[str | None, opt("YAML file of tokens.")] = None,
    insecure: Annotated[
        bool, opt("Listen beyond loopback without TLS and tokens.", "--insecure")
    ] = False,
    log_level: Annotated[str | None, opt("debug, info, warning or error.")] = None,
) -> None:
    """Serve a store to the engines of this machine until stopped (SIGTERM or Ctrl-C).

    Prints one line once sessions may come: `ready: unix:///path (...)`.
    """
    # Here and below, what takes long to import is imported where it is needed.
    from kvstore.client.embedded import prepare_run_dir
    from kvstore.server.daemon import describe, start_logging
    from kvstore.server.daemon import serve as run
    from kvstore.sources import load_config

    overrides = {
        "address": socket and f"unix://{Path(socket).absolute()}",
        "memory": {"size": memory},
        "disk": {"path": disk, "size": disk_size},
        "server": {
            "grpc": grpc, "http": http, "tcp": tcp, "tokens": tokens, "insecure": insecure or None
        },
        "log_level": log_level,
    }  # fmt: skip
    settings = load_config(config, _given(overrides))
    start_logging(settings.log_level)
    path = settings.socket
    if settings.address is None:
        prepare_run_dir(settings)
    with progress("touching memory", "bytes") as touched:

        def ready(addresses: list[str], away: Mapping[str, str]) -> None:
            head = f"ready: unix://{path} ({describe(settings, away)}, pid {os.getpid()})"
            # All at once: who waits for the first line may not read on.
            typer.echo("\n  ".join([head, *addresses]))
            sys.stdout.flush()

        run(settings, path, ready=ready, progress=touched)


def _token_name(text: str) -> str:
    if not text or not text.isprintable() or len(text) > _MAX_NAME:
        raise typer.BadParameter(
            f"{text[:_MAX_NAME]!r} is no name; give one of up to {_MAX_NAME} printable characters"
        )
    return text


def _name_option(help: str) -> Any:
    return typer.Option(parser=_token_name, metavar="NAME", help=help)


@token_app.command()
def new(
    name: Annotated[str, _name_option("Who will use it; unique in the file.")],
    role: Annotated[Literal["peer", "read", "write", "admin"], opt("What it allows.")],
    tenant: Annotated[
        list[str] | None, _name_option("Limit it to this one; may be repeated.")
    ] = None,
) -> None:
    """Make a random token.

    The token goes to stdout, and is not kept anywhere; the entry for the daemon's token file, which
    holds only its SHA-256, goes to stderr.
    """
    import yaml

    token = secrets.token_urlsafe(32)
    entry: dict[str, Any] = {"name": name, "role": role}
    entry["sha256"] = hashlib.sha256(token.encode()).hexdigest()
    if tenant:
        entry["tenants"] = tenant
    typer.echo(token)
    typer.echo("# add to the list `tokens:` in the file that server.tokens names:", err=True)
    typer.echo(yaml.safe_dump([entry], sort_keys=False, allow_unicode=True).rstrip(), err=True)


@app.command()
def fsck(
    folder: Annotated[
        Path,
        typer.Argument(help="Folder of a disk tier that no daemon serves, or of a files tier."),
    ],
    repair: Annotated[bool, opt("Drop what is damaged.")] = False,
) -> None:
    """Verify every object of a disk or files tier; exit code 2 when something is damaged."""
    from kvstore.tiers.segments import scrub
    from kvstore.tiers.slab import fsck as slabcheck

    with progress("verifying", "bytes") as verified:
        check = scrub.fsck if scrub.is_ours(folder) else slabcheck.fsck
        report = check(folder, repair=repair, progress=verified)
    _print_struct(report)
    if report.in_use_by is not None:
        typer.echo(
            f"a daemon (pid {report.in_use_by or '?'}) serves it: what changed meanwhile was left"
            " out; stop the daemon for a full check",
            err=True,
        )
    if not report.clean:
        raise typer.Exit(2)


@app.command()
def inspect(folder: Annotated[Path, typer.Argument(help="Folder of a disk tier.")]) -> None:
    """Show what a disk tier holds, without reading the data."""
    from kvstore.tiers.slab import fsck as slabcheck

    _print_struct(slabcheck.inspect(folder))


def _print_struct(value: object) -> None:
    import msgspec

    Console().print_json(msgspec.json.encode(value).decode(), ensure_ascii=True)


if __name__ == "__main__":
    main()
