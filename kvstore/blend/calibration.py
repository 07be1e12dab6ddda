"""Whether a model's answers stay close enough when pieces are reused, as measured beforehand.

Nothing cheap tells of a single answer how far off it is. So each model is measured once, by
`kvstore calibrate`, and what was found is kept in the user's cache folder, in a file named by all
that the model's values depend on.
"""

from __future__ import annotations

import math
import os
import re
import time
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta, structs

from kvstore.blocks.spec import ModelIdentity, Namespace
from kvstore.errors import SpecError
from kvstore.files import cache_folder

USUAL: Final = ("question", 0.2)
"""The selection and share that decide."""
MOST: Final = 0.03
SAME: Final = 0.95
"""Mean divergence, and share of equal likeliest tokens, that are good enough."""
_LARGEST: Final = 1 << 16
_HASH: Final = re.compile("[0-9a-f]{64}")


class Quality(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How far answers were off in one way to choose rows: mean KL divergence, and the share of
    tokens whose likeliest was the same."""

    kl: Annotated[float, Meta(ge=-1e-3)]
    same: Annotated[float, Meta(ge=0, le=1)]


class Verdict(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a calibration measured of a model, by selection and share (`question 0.2`)."""

    format: Literal[1]
    model: str
    tokens: Annotated[int, Meta(ge=1)]
    ways: dict[str, Quality]

    @property
    def problems(self) -> list[str]:
        """Why pieces of the model had better not be reused; empty: they may be."""
        usual = self.ways.get(way(*USUAL))
        return ["the usual selection was not measured"] if usual is None else problems(usual)


def way(selection: str, share: float) -> str:
    """The name of a way to choose rows."""
    return f"{selection} {share}"


def problems(usual: Quality) -> list[str]:
    """What of the usual way's figures is not good enough."""
    found = []
    if not (math.isfinite(usual.kl) and usual.kl <= MOST):
        found.append(f"the mean KL is {usual.kl:.3g}; up to {MOST} is good enough")
    if not usual.same >= SAME:
        found.append(f"{usual.same:.1%} of the likeliest tokens are the same; {SAME:.0%} would do")
    return found


def check_place() -> None:
    """See that verdicts can be kept.

    Raises:
        SpecError: this user has no cache folder, or cannot write there.
    """
    folder = cache_folder("calibrated")
    if folder is None or not os.access(folder, os.W_OK):
        raise SpecError("there is no cache folder that is yours alone; set XDG_CACHE_HOME")


def keep(identity: ModelIdentity, verdict: Verdict) -> Path:
    """Write a model's verdict where engines of this user look for it.

    Raises:
        SpecError: as `check_place`.
        OSError: it cannot be written.
    """
    check_place()
    file = _file(identity)
    assert file is not None
    made = file.with_name(f"{os.getpid()}-{time.monotonic_ns()}")
    made.write_bytes(msgspec.json.format(msgspec.json.encode(verdict)) + b"\n")
    return made.replace(file)


def kept(identity: ModelIdentity) -> Verdict | None:
    """A model's verdict; None: there is none that can be read."""
    file = _file(identity)
    try:
        with (file or Path("/dev/null")).open("rb") as opened:
            return msgspec.json.decode(opened.read(_LARGEST), type=Verdict)
    except (OSError, msgspec.DecodeError, UnicodeError):
        return None


def uncalibrated(identity: ModelIdentity) -> str:
    """Why pieces of a model are not reused, and what to do; empty: its calibration has passed."""
    if (verdict := kept(identity)) is None:
        given = "" if _HASH.fullmatch(identity.revision) else f" --revision {identity.revision}"
        command = f"kvstore calibrate MODEL --dtype {identity.dtype}{given}"
        return f"{identity.name} has not been calibrated: run `{command}`"
    if found := verdict.problems:
        return f"{identity.name} has failed its calibration: {'; '.join(found)}"
    return ""


def _file(identity: ModelIdentity) -> Path | None:
    # How an engine keeps blocks is no matter of the model's.
    extra = tuple(pair for pair in identity.extra if pair[0] != "engine")
    name = Namespace(structs.replace(identity, extra=extra)).digest.hex()
    folder = cache_folder("calibrated")
    return folder and folder / f"{name}.json"
