"""`kvstore record`, `simulate`, `replay`, `plan`: what requests find in tiers of which size."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, Final

import typer

from kvstore.benchmarks.prices import Prices, lifetime
from kvstore.commands import opt, sized
from kvstore.errors import StoreUnavailable
from kvstore.server.cli.node import HttpOption
from kvstore.server.cli.options import Caller, ConfigOption, Misuse, time_option
from kvstore.server.cli.output import many, progress, say
from kvstore.values import checked_text, format_size, lasting

if TYPE_CHECKING:
    from kvstore.benchmarks.capacity import Load
    from kvstore.benchmarks.policy import Tiers
    from kvstore.config import Config
    from kvstore.server.cli.top import Source

_TIB: Final = 1 << 40
_ASK_SECONDS: Final = 0.5
_MOST_ANSWER: Final = 64 << 20
_SHARED: Final = 64
_DISK: Final = 16
"""Times memory, where no size is given."""

JsonOption = Annotated[bool, opt("Print JSON.", "--json")]


@dataclass(frozen=True, kw_only=True)
class Traffic(Prices):
    """A trace, and what it is about."""

    trace: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, help="Recorded requests: docs/policy.md.")
    ]
    model: Annotated[
        str | None, opt("Folder, config.json, or a name that Hugging Face's cache knows.")
    ] = None
    token_bytes: Annotated[int | None, sized("Of KV per token, without a model.")] = None
    block_tokens: Annotated[
        int | None, opt("Of a block (default: as the trace's lengths say).", min=1, max=1 << 20)
    ] = None

    @cached_property
    def load(self) -> Load:
        """All of it. Raises ConfigError: the model is not known."""
        from kvstore.benchmarks.capacity import Load, block_tokens
        from kvstore.benchmarks.model_size import token_bytes
        from kvstore.traces import TraceError, read_trace

        if (self.model is None) == (self.token_bytes is None):
            raise Misuse("give --model or --token-bytes")
        nbytes = self.token_bytes if self.model is None else token_bytes(self.model)
        if not nbytes:
            raise Misuse("--token-bytes: a token takes some")
        try:
            trace = read_trace(self.trace)
        except TraceError as e:
            raise Misuse(str(e)) from None
        tokens = self.block_tokens or block_tokens(trace)
        if not tokens:
            raise Misuse(f"{self.trace}: no prompt has a length; give --block-tokens")
        return Load(trace, tokens, nbytes, self)

    def fitting(self, size: int, name: str) -> int:
        """A size that holds a block at least."""
        if size < self.load.block_bytes:
            block = format_size(self.load.block_bytes)
            raise Misuse(f"{name}: {format_size(size)} hold no block, which takes {block}")
        return size

    def title(self) -> str:
        """What is replayed."""
        load = self.load
        return (
            f"{self.trace.stem}: {len(load.trace):,} requests in {lasting(load.seconds)}, "
            f"{load.blocks:,} blocks of {load.block_tokens} tokens"
        )


def simulate(
    traffic: Traffic,
    memory: Annotated[list[int] | None, sized("May be repeated (default: five).")] = None,
    disk: Annotated[int | None, sized("Below the second memory (16 times).")] = None,
    shared: Annotated[int | None, sized("For all nodes (64 times).")] = None,
    nodes: Annotated[int, opt("That share it.", min=1, max=1000)] = 4,
    as_json: JsonOption = False,
    png: Annotated[Path | None, opt("Draw a picture (needs matplotlib).", dir_okay=False)] = None,
) -> None:
    """Say what a trace finds in memory, disk and a shared tier of which size, and what that costs.

    The daemon's own policies are replayed. Found is a block only behind all before it.
    """
    from kvstore.benchmarks import capacity, picture
    from kvstore.benchmarks.policy import Tiers

    load = traffic.load
    sizes = sorted({traffic.fitting(size, "--memory") for size in memory or load.sizes()})
    base = sizes[min(1, len(sizes) - 1)]
    below = Tiers(
        base,
        disk=traffic.fitting(_DISK * base if disk is None else disk, "--disk"),
        shared=traffic.fitting(_SHARED * base if shared is None else shared, "--shared"),
        nodes=nodes,
    )
    if png is not None:  # Else what is in its way would be said only after all the work.
        picture.pyplot()
        try:
            Path(checked_text(str(png))).open("ab").close()
        except ValueError as e:
            raise Misuse(f"--png: {e}") from None
    with progress("replaying") as tell:
        told = capacity.simulate(load, sizes, below, tell)
    if png is not None:
        picture.draw(told, traffic.title(), png)
    if as_json:
        typer.echo(json.dumps(told))
        return
    for line in (*_head(traffic), *_by_size(told), "", *_beneath(told), "", *_reuse(told)):
        say(line)


def replay(
    traffic: Traffic,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a trace would find with a configuration: its sizes, policies and rules.

    Of several disks the largest one counts; shared tiers are taken to keep all; peers are left out.
    """
    from kvstore.sources import load_config

    load, tiers = traffic.load, _configured(traffic, load_config(config))
    with progress("replaying") as tell:
        found = load.replays([tiers], tell)[tiers]
    told = load.summary() | {"below": [load.told(tiers, found)]}
    if as_json:
        typer.echo(json.dumps(told))
        return
    for line in (*_head(traffic), "", *_beneath(told), "", *_reuse(told)):
        say(line)


def _configured(traffic: Traffic, settings: Config) -> Tiers:
    """The tiers of a configuration, in bytes."""
    from kvstore.benchmarks.policy import Tiers

    memory = settings.memory
    tiers = Tiers(traffic.fitting(memory.size, "memory.size"), memory.policy)
    slabs = [tier for tier in settings.below if tier.kind == "slab"]
    if slabs:
        slab = max(slabs, key=lambda tier: tier.options["size"])
        rule = settings.write_rules.get(slab.name, "all")
        tiers = tiers._replace(
            disk=slab.options["size"] if rule != "none" else 0,
            below=slab.options["policy"], write=rule,
        )  # fmt: skip
    if any(tier.kind not in ("slab", "peers") for tier in settings.below):
        tiers = tiers._replace(shared=traffic.load.everything)
    return tiers


@dataclass(frozen=True, kw_only=True)
class Planned(Traffic):
    """A trace to plan for."""

    trace: Annotated[Path, opt("Recorded requests: docs/policy.md.", exists=True, dir_okay=False)]


def plan(
    traffic: Planned,
    config: ConfigOption = None,
    max_memory: Annotated[int | None, sized("Of memory, at most.")] = None,
    max_disk: Annotated[int | None, sized("Of disk, at most.")] = None,
) -> None:
    """Print the sizes, policies and rules that cost least for a trace, as YAML to paste.

    The reason stands beside each value; the configuration is the one of today.
    """
    from kvstore.benchmarks.plan import Plan
    from kvstore.sources import load_config

    settings, load = load_config(config), traffic.load
    if not load.seconds:
        raise Misuse(f"{traffic.trace}: all of it comes at once; what costs least cannot be told")
    memory, disk = (
        math.inf if most is None else traffic.fitting(most, name)
        for most, name in ((max_memory, "--max-memory"), (max_disk, "--max-disk"))
    )
    now = _configured(traffic, settings)
    with progress("replaying") as tell:
        planned = Plan(load, now, memory, disk, tell)
    for line in (*(f"# {line}" for line in _head(traffic)), *planned.lines(settings.disk.path)):
        say(line)


def record(
    caller: Caller,
    file: Annotated[Path, typer.Argument(help="To write; it must not be there yet.")],
    lasts: Annotated[float | None, time_option("How long (until Ctrl-C).", "--for")] = None,
    http: HttpOption = None,
) -> None:
    """Write down what a daemon is asked for as a trace: keys, times and tenants, never text."""
    from kvstore.server.cli.top import Source

    source = Source(http, caller.settings, caller.token(), caller.patience)
    number, _, _ = _noted(source, "/trace")
    until = time.monotonic() + (math.inf if lasts is None else lasts)
    count = missed = 0
    well = True
    with _new(file) as out:
        try:
            while (left := until - time.monotonic()) > 0:
                time.sleep(min(left, _ASK_SECONDS))
                try:
                    number, body, lost = _noted(source, f"/trace?after={number}")
                except StoreUnavailable as e:  # It may come back.
                    if well:
                        say(str(e), err=True)
                    well = False
                    continue
                well, missed, count = True, missed + lost, count + body.count(b"\n")
                out.write(body)
                out.flush()
        except KeyboardInterrupt:
            pass
    say(f"{many(count, 'request')} in {file}" + f"; {missed} were missed" * bool(missed), err=True)


def _noted(source: Source, path: str) -> tuple[int, bytes, int]:
    """The number of the last request that was noted, lines, and how many are missing."""
    headers, body = source.get(path, _MOST_ANSWER)
    try:
        return int(headers["Kvstore-Number"]), body, int(headers["Kvstore-Missed"])
    except (TypeError, ValueError):
        raise StoreUnavailable(f"{source.shown} tells no traces; see server.http") from None


def _new(file: Path) -> BinaryIO:
    try:
        return Path(checked_text(str(file))).open("xb")
    except ValueError as e:
        raise Misuse(f"file: {e}") from None


def _head(traffic: Traffic) -> Iterator[str]:
    load = traffic.load
    token, block = format_size(load.token_bytes), format_size(load.block_bytes)
    yield traffic.title()
    yield f"{token} a token, {block} a block; at best {100 * load.ceiling:.1f} % are found"


def _money(dollars: float | None) -> str:
    return "–" if dollars is None else f"{dollars:.3g}"


def _by_size(told: dict[str, Any]) -> Iterator[str]:
    names = list(told["sizes"][0]["found"])
    yield ""
    yield (
        f"{'% found':>12}"
        + "".join(f"{name:>10}" for name in names)
        + (f"{'who knows the future':>22}   $ a million saved")
    )
    for row in told["sizes"]:
        found = "".join(f"{100 * row['found'][name]:10.1f}" for name in names)
        dollars = ", ".join(_money(row["dollars"][name]) for name in names)
        bound = 100 * row["clairvoyant"]
        yield f"{format_size(row['memory']):>12}{found}{bound:22.1f}   {dollars}"
    yield f"computing a million tokens: ${_money(told['computing_dollars'])}"


def _beneath(told: dict[str, Any]) -> Iterator[str]:
    from kvstore.benchmarks.picture import scene

    yield f"{'memory and below it':45}% found  TiB a day drives  $ a M"
    for row in told["below"]:
        written, life = row["written_daily"], lifetime(row["drive_years"])
        a_day = "–" if written is None else f"{written / _TIB:.3g}"
        numbers = f"{100 * row['found']:7.1f}{a_day:>11}{life:>7}"
        yield f"{scene(row):45}{numbers}  {_money(row['dollars'])}"


def _reuse(told: dict[str, Any]) -> Iterator[str]:
    parts: list[str] = []
    for life, part in told["reuse"].items():
        parts.append(f"{lasting(life)} {100 * part:.0f} %")
        if part >= 1:
            break
    yield "reuse within " + ", ".join(parts)
    if (ttl := told["ttl"]) is not None:
        yield f"a ttl of {lasting(ttl)} keeps {100 * told['reuse'][ttl]:.0f} % of it"


COMMANDS: Final = (simulate, replay, plan, record)
