"""What commands are made of, for typer: a group of options is one parameter of a command, annotated
with a dataclass whose fields `grouped` spreads out for the command line.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, get_type_hints

import typer

from kvstore.values import parse_size

N = TypeVar("N", int, float)


def option(read: Callable[[str], N]) -> Callable[[str], N]:
    """What `read` makes of a text, and its ValueError as a usage error."""

    def parser(text: str) -> N:
        try:
            return read(text)
        except ValueError as e:
            raise typer.BadParameter(str(e)) from e

    return parser


size_option = option(parse_size)


def opt(help: str, *names: str, **how: Any) -> Any:
    """An option of a command, of these names if not of its parameter's; `how` is typer's."""
    return typer.Option(*names, help=help, **how)


def sized(help: str) -> Any:
    """One that takes a size."""
    return opt(help, parser=size_option, metavar="SIZE")


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the fields of its option groups as parameters of their own; groups that can
    be closed are, after it.
    """
    hints = get_type_hints(command)
    groups: dict[str, Any] = {
        n: kind for n, kind in hints.items() if dataclasses.is_dataclass(kind)
    }
    parameters: list[inspect.Parameter] = []
    for source in (command, *groups.values()):
        of = get_type_hints(source, include_extras=True)
        parameters += [
            p.replace(annotation=of[p.name], kind=inspect.Parameter.KEYWORD_ONLY)
            for p in inspect.signature(source).parameters.values()
            if p.name not in groups
        ]

    @functools.wraps(command)
    def spread(**values: Any) -> None:
        gathered = {
            name: kind(**{field.name: values.pop(field.name) for field in dataclasses.fields(kind)})
            for name, kind in groups.items()
        }
        try:
            command(**values, **gathered)
        finally:
            for group in gathered.values():
                if hasattr(group, "close"):
                    group.close()

    spread.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    spread.__annotations__ = {p.name: p.annotation for p in parameters}
    del spread.__wrapped__
    return spread
