"""How commands print what a daemon says: tables for people, JSON for programs."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, MutableMapping, MutableSequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from kvstore.config import format_size
from kvstore.errors import StoreUnavailable

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from kvstore.api import v1
    from kvstore.client import Operation


def plain(message: Message) -> dict[str, Any]:
    """A message as JSON has it: keys in hex, times in ISO 8601, durations in seconds.

    All fields are there, except those that may be missing and are.
    """
    found: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        if field.has_presence and not message.HasField(field.name):
            continue
        value = getattr(message, field.name)
        if isinstance(value, MutableMapping):
            found[field.name] = dict(sorted(value.items()))
        elif isinstance(value, MutableSequence):
            found[field.name] = [_plain_value(field, item) for item in value]
        else:
            found[field.name] = _plain_value(field, value)
    return found


def _plain_value(field: Any, value: Any) -> Any:
    if isinstance(value, bytes):
        return value.hex()
    if field.enum_type is not None:
        known = field.enum_type.values_by_number.get(value)
        return short(known.name) if known is not None else value
    if field.message_type is None:
        return value
    match field.message_type.full_name:
        case "google.protobuf.Timestamp":
            moment: datetime = value.ToDatetime(UTC)
            return moment.isoformat(timespec="milliseconds")
        case "google.protobuf.Duration":
            return value.seconds + value.nanos / 1e9
    return plain(value)


def short(name: str) -> str:
    """The last word of an enum's value: memory, running …; empty if it is not specified."""
    word = name.rpartition("_")[2].lower()
    return "" if word == "unspecified" else word


def tier_name(tier: v1.Tier) -> str:
    """memory, disk, or nothing."""
    from kvstore.api import v1

    return short(v1.Tier.Name(tier))


def when(message: Any) -> str:
    """A timestamp for people, in local time."""
    if not message.seconds:
        return ""
    moment: datetime = message.ToDatetime(UTC)
    return moment.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def lasting(seconds: float) -> str:
    """A time span for people."""
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{math.floor(seconds / size)} {unit}"
    return f"{seconds:.3g} s"


def show_json(message: Message) -> None:
    """Print a message on one line."""
    typer.echo(json.dumps(plain(message), ensure_ascii=False))


def show_table(columns: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Print a table."""
    table = Table(*columns)
    for row in rows:
        table.add_row(*(escaped(str(cell)) for cell in row))
    Console(soft_wrap=False).print(table)


def escaped(text: str) -> str:
    """Text that rich prints as it is."""
    return text.replace("[", r"\[")


def finish(operation: Operation, format: str, *, wait: bool, done: str) -> None:
    """See an operation through, with a progress bar on a terminal, and print how it ended.

    `done` is the word for what has been done to objects.

    Raises:
        OperationFailed: it failed.
    """
    if wait:
        _wait(operation)
    if format == "json":
        show_json(operation.state)
        return
    typer.echo(told(operation.state, done))
    if not wait:
        typer.echo(f"`kvstore operations watch {operation.id}` tells when it has ended")


def _wait(operation: Operation) -> None:
    console = Console(stderr=True)
    columns = (TextColumn(operation.state.verb.lower()), BarColumn(), MofNCompleteColumn())
    try:
        with Progress(
            *columns, console=console, disable=not console.is_terminal, transient=True
        ) as bar:
            task = bar.add_task("", total=None)
            for state in operation.watch():
                bar.update(task, completed=state.done, total=state.total or None)
    except KeyboardInterrupt:
        typer.echo(f"it goes on; `kvstore operations cancel {operation.id}` ends it", err=True)
        sys.exit(130)
    except StoreUnavailable as e:
        raise StoreUnavailable(f"the daemon went away during {operation.id}: {e}") from e


def told(state: v1.Operation, done: str) -> str:
    """One line on an operation."""
    from kvstore.api import v1

    text = f"{done} {state.changed} objects"
    if state.dry_run:
        text = f"{state.changed} objects would be {done}"
    if state.bytes:
        text += f" ({format_size(state.bytes)})"
    left = sorted(state.skipped.items())
    if left:
        text += "; left alone: " + ", ".join(f"{count} {reason}" for reason, count in left)
    if state.state != v1.Operation.STATE_DONE:
        text += f"; {short(v1.Operation.State.Name(state.state))}"
    if state.message:
        text += f"; {state.message}"
    return text
