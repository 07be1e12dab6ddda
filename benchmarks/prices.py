"""What it costs to compute tokens, and to keep them: options of commands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import typer

from kvstore.commands import option
from kvstore.values import lasting


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 1e-12 < number < 1e12:
        raise ValueError(f"{text!r:.60} is no number above 0")
    return number


def _price(help: str) -> Any:
    return typer.Option(parser=option(_number), metavar="NUMBER", help=help)


@dataclass(frozen=True)
class Prices:
    """Of a GPU that computes prompts, and of what keeps them."""

    gpu_hour: Annotated[float, _price("$ an hour of the GPUs that compute prompts.")] = 2.5
    prefill: Annotated[float, _price("Tokens of prompts that they compute a second.")] = 30_000.0
    memory_price: Annotated[float, _price("$ a GiB and hour of memory.")] = 0.004
    disk_price: Annotated[float, _price("$ a GiB and hour of disk.")] = 0.00012
    shared_price: Annotated[float, _price("$ a GiB and hour of a shared tier.")] = 0.004
    drive_tbw: Annotated[
        float, _price("TB that a node's drives take before they are worn out.")
    ] = 14_000.0
    drive_price: Annotated[float, _price("$ of these drives, for what is written.")] = 1000.0

    @property
    def computing(self) -> float:
        """$ for a token of a prompt."""
        return self.gpu_hour / 3600 / self.prefill

    def years(self, written: float | None) -> float | None:
        """That drives last if so many bytes a day are written; None: not known, or for ever."""
        return self.drive_tbw * 1e12 / written / 365 if written else None


def lifetime(years: float | None) -> str:
    """Of drives, for people."""
    if years is None:
        return "–"
    return f"{years:.3g} y" if years >= 2 else lasting(years * 365 * 86400)
