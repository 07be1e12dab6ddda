"""How commands print what a daemon says: tables for people, JSON for programs.

Tenants, software and the like are what clients say, so nothing of it reaches a terminal raw.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, MutableMapping, MutableSequence, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from kvstore.commands import opt
from kvstore.errors import StoreUnavailable
from kvstore.telemetry import shown
from kvstore.values import format_size

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from kvstore.api import v1
    from kvstore.api.running import Operation

_DIGEST: Final = re.compile("[0-9a-f]{64}")
_FOLDED: Final = 16
"""A column that is wider takes several lines before another one is left out."""


@dataclass(frozen=True)
class Printing:
    """How to print what a daemon says."""

    format: Annotated[Literal["table", "json"], opt("How to print.")] = "table"
    wide: Annotated[bool, opt("All columns, wider than the terminal if need be.", "--wide")] = False


def plain(message: Message) -> dict[str, Any]:
    """A message as JSON has it: keys in hex, times in ISO 8601, durations in seconds.

    All fields are there, except those that may be missing and are.
    """
    return {
        field.name: _plain_value(field, getattr(message, field.name))
        for field in message.DESCRIPTOR.fields
        if not field.has_presence or message.HasField(field.name)
    }


def _plain_value(field: Any, value: Any) -> Any:
    if isinstance(value, MutableMapping):
        return dict(sorted(value.items()))
    if isinstance(value, MutableSequence):
        return [_plain_value(field, item) for item in value]
    if isinstance(value, bytes):
        return value.hex()
    if field.enum_type is not None:
        return _word(field, value)
    if field.message_type is None:
        return value
    match field.message_type.full_name:
        case "google.protobuf.Timestamp":
            moment: datetime = value.ToDatetime(UTC)
            return moment.isoformat(timespec="milliseconds")
        case "google.protobuf.Duration":
            return value.seconds + value.nanos / 1e9
    return plain(value)


def _word(field: Any, value: int) -> str | int:
    """The last word of an enum's value: running, done …; empty if it is not specified.

    A number that only a newer daemon knows stays one.
    """
    known = field.enum_type.values_by_number.get(value)
    word = value if known is None else known.name.rpartition("_")[2].lower()
    return "" if word == "unspecified" else word


def when(message: Any) -> str:
    """A timestamp for people, in local time."""
    if not message.seconds:
        return ""
    moment: datetime = message.ToDatetime(UTC)
    return moment.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def many(count: int, what: str) -> str:
    """So many of something: `1 pin`, `2 pins`."""
    return f"{count} {what}" + "s" * (count != 1)


def say(text: str, *, err: bool = False) -> None:
    """Print a line."""
    typer.echo(shown(text), err=err)


def answer(how: Printing, found: Message, *lines: str) -> None:
    """Print an answer as the caller asked for it: as JSON on one line, or as these lines."""
    if how.format == "json":
        typer.echo(json.dumps(plain(found)))
        return
    for line in lines:
        say(line)


def show(
    how: Printing,
    found: Message,
    rows: Iterable[Any],
    columns: str,
    *lines: str,
    spare: Sequence[str] = (),
    **special: Callable[[Any], object],
) -> None:
    """Print an answer as JSON on one line, or as a table of `rows` and these lines.

    `columns` are fields of a row, `field:title` where the title is another (`_` for a space), or
    titles of what `special` makes of a row. Where they do not fit, those that can be spared are
    left out, from the first on.
    """
    if how.format == "table":
        named = (column.partition(":") for column in columns.split())
        contents = {
            (title or path.rpartition(".")[2].removesuffix("_bytes")).replace("_", " "): (
                special.get(path) or partial(_field, path)
            )
            for path, _, title in named
        }
        _show_table(how, list(rows), contents, list(spare))
    answer(how, found, *lines)


def _field(path: str, row: Any) -> object:
    """A field of a message for people."""
    outer, _, name = path.rpartition(".")
    row = getattr(row, outer) if outer else row
    field, value = row.DESCRIPTOR.fields_by_name[name], getattr(row, name)
    if name.endswith("bytes"):
        missing = field.has_presence and not row.HasField(name)
        return "none" if missing else format_size(value)
    if field.message_type is not None:
        return when(value)
    if field.enum_type is not None:
        return _word(field, value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, MutableSequence):
        return [_cut(item) for item in value]
    return _cut(value)


def _cut(value: object) -> object:
    """A digest by its first digits, as they are enough to name it by."""
    text = value.hex() if isinstance(value, bytes) else value
    return text[:12] if isinstance(text, str) and _DIGEST.fullmatch(text) else text


def _show_table(
    how: Printing, rows: list[Any], columns: dict[str, Callable[[Any], object]], spare: list[str]
) -> None:
    cells = {name: [_cell(content(row)) for row in rows] for name, content in columns.items()}
    console = Console()
    widths = {
        name: max(cell_len(line) for cell in (name, *map(str, column)) for line in cell.split("\n"))
        for name, column in cells.items()
    }
    if how.wide:
        console.width = sum(widths.values()) + 3 * len(cells) + 1
    left_out = []
    while spare and console.width <= 3 * len(cells) + sum(min(widths[n], _FOLDED) for n in cells):
        left_out.append(spare.pop(0))
        del cells[left_out[-1]]
    table = Table()
    for name in cells:
        table.add_column(name, overflow="fold")
    for row in zip(*cells.values(), strict=True):
        table.add_row(*row)
    console.print(table)
    if left_out:
        typer.echo(f"left out: {', '.join(left_out)}; --wide shows all", err=True)


def _cell(content: object) -> Text:
    lines = content if isinstance(content, list) else [content]
    return Text("\n".join(shown(str(line)) for line in lines))


def finish(how: Printing, operation: Operation, *, wait: bool, done: str) -> None:
    """See an operation through, with a progress bar on a terminal, and print how it ended.

    `done` is the word for what has been done to objects.

    Raises:
        OperationFailed: it failed.
    """
    if wait:
        _wait(operation)
    hint = f"`kvstore operations watch {operation.id}` tells when it has ended"
    answer(how, operation.state, told(operation.state, done), *([] if wait else [hint]))


@contextmanager
def progress(title: str, unit: str = "") -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, when that is a terminal, which is told how much of how much is done.

    `unit` is `bytes`, or nothing for things that are counted.
    """
    console = Console(stderr=True)
    in_bytes = (DownloadColumn(binary_units=True), TransferSpeedColumn())
    numbers = in_bytes if unit else (MofNCompleteColumn(),)
    columns = (TextColumn(title, markup=False), BarColumn(), *numbers)
    hidden = not console.is_terminal
    with Progress(*columns, console=console, disable=hidden, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total or None)


def _wait(operation: Operation) -> None:
    try:
        with progress(operation.state.verb.lower()) as bar:
            for state in operation.watch():
                bar(state.done, state.total)
    except KeyboardInterrupt:
        typer.echo(f"it goes on; `kvstore operations cancel {operation.id}` ends it", err=True)
        sys.exit(130)
    except StoreUnavailable as e:
        raise StoreUnavailable(f"the daemon went away during {operation.id}: {e}") from e


def told(state: v1.Operation, done: str) -> str:
    """One line on an operation."""
    objects = many(state.changed, "object")
    text = f"{done} {objects}"
    if state.dry_run:
        text = f"{objects} would be {done}"
    if state.bytes:
        text += f" ({format_size(state.bytes)})"
    left = sorted(state.skipped.items())
    if left:
        text += "; left alone: " + ", ".join(f"{count} {reason}" for reason, count in left)
    if (now := _field("state", state)) != "done":
        text += f"; {now}"
    if state.message:
        text += f"; {state.message}"
    return text
