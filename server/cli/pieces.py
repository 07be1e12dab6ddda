"""Pieces of prompts: texts for a running vLLM to compute, and whether a model bears their reuse."""

from __future__ import annotations

import importlib
import importlib.util
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.progress import Progress

from kvstore.commands import opt
from kvstore.errors import KVStoreError
from kvstore.server.cli.options import Misuse
from kvstore.server.cli.output import many

pieces_app = typer.Typer(no_args_is_help=True, help="Texts that prompts reuse wherever they stand.")

_SECONDS: Final = 600.0
_LARGEST: Final = 16 << 20
"""Bytes of a text, and of an answer."""
_CUT: Final = (128, 8192)
"""Tokens that pieces may be cut at: so none that is cut is too short."""


class EngineError(KVStoreError):
    """The server of an engine did not do what it was asked for."""


class _Engine:
    """The OpenAI API of a vLLM server."""

    def __init__(self, url: str, key: str | None) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        self._headers = {"Content-Type": "application/json"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"

    def ask(self, path: str, **body: Any) -> dict[str, Any]:
        """What it answers, to a POST if there is a body.

        Raises:
            EngineError: nothing of use; says why.
        """
        data = json.dumps(body).encode() if body else None
        where = f"{self._url}{path}"
        try:
            request = urllib.request.Request(where, data, self._headers)
            with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
                found = json.loads(answer.read(_LARGEST))
        except urllib.error.HTTPError as e:
            said = e.read(2000).decode(errors="replace")
            raise EngineError(f"{where} answered {e.code}: {said[:300]}") from e
        except (OSError, ValueError) as e:
            raise EngineError(f"{where}: {e}; --url must be that of a vLLM server") from e
        if not isinstance(found, dict):
            raise EngineError(f"{where} answered with no object; is it a vLLM server?")
        return found

    def tokens(self, model: str, text: str, *, begins: bool) -> list[int]:
        """A text's tokens, with what stands before a prompt (BOS) if it `begins` one."""
        found = self.ask("/tokenize", model=model, prompt=text, add_special_tokens=begins)
        tokens = found.get("tokens")
        if not isinstance(tokens, list):
            raise EngineError(f"{self._url}/tokenize answered without tokens")
        return tokens


def _cut(tokens: list[int], most: int) -> Iterator[list[int]]:
    """Runs of `most` tokens at most, about as long as each other."""
    parts = -(-len(tokens) // most)
    for part in range(parts):
        yield tokens[part * len(tokens) // parts : (part + 1) * len(tokens) // parts]


@pieces_app.command()
def add(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE…", exists=True, dir_okay=False, help="Of text.")
    ],
    url: Annotated[str, opt("Of the vLLM server.")] = "http://localhost:8000",
    model: Annotated[str | None, opt("As it calls it (default: its first).")] = None,
    tokens: Annotated[int, opt("Of a piece at most.", min=_CUT[0], max=_CUT[1])] = 1024,
    key_file: Annotated[Path | None, opt("Its API key.", exists=True, dir_okay=False)] = None,
) -> None:
    """Have a vLLM server compute texts once, and store them for prompts that contain them.

    It needs `kvstore.vllm.approximate`; prompts ask for it by `kv_transfer_params`. Exit code 1 if
    some were not taken.
    """
    from kvstore.blend.pieces import BASE, SHORTEST, filler

    engine = _Engine(url, key_file.read_text().strip() if key_file else None)
    chosen = model or _first(engine.ask("/v1/models"))
    before = filler(lambda text: engine.tokens(chosen, text, begins=True), 0).tolist()
    pieces: list[list[int]] = []
    for file in files:
        if file.stat().st_size > _LARGEST:
            raise Misuse(f"{file} has more than {_LARGEST >> 20} MiB; cut it")
        found = engine.tokens(chosen, file.read_text("utf-8"), begins=False)
        if len(found) < SHORTEST:
            raise Misuse(f"{file} has {len(found)} tokens; a piece has {SHORTEST} at least")
        pieces += _cut(found, tokens)
    reasons: dict[str, int] = {}
    with Progress(transient=True, console=Console(stderr=True)) as progress:
        for piece in progress.track(pieces, description="computing"):
            answer = engine.ask(
                "/v1/completions",
                model=chosen,
                prompt=before + piece,
                max_tokens=1,
                kv_transfer_params={"piece": {"start": BASE, "end": BASE + len(piece)}},
            )
            told = (answer.get("kv_transfer_params") or {}).get("piece")
            reason = "no_connector" if told is None else told.get("reason", "")
            if reason:
                reasons[reason] = reasons.get(reason, 0) + 1
    taken = len(pieces) - sum(reasons.values())
    typer.echo(f"{many(taken, 'piece')}, {sum(map(len, pieces))} tokens, for {chosen}")
    for reason, count in reasons.items():
        what = _WHY.get(reason, "docs/recompute.md lists reasons")
        typer.echo(f"{count} not taken: {reason}; {what}", err=True)
    if reasons:
        raise typer.Exit(1)


_WHY: Final = {
    "no_connector": "the server must run with KVStore's connector (docs/vllm.md)",
    "off": "set kvstore.vllm.approximate to true in its kv_connector_extra_config",
    "unavailable": "the server's store does not answer: look at its log, and `kvstore doctor`",
    "uncalibrated": "its model has passed no `kvstore calibrate` on the server's machine",
}


def _first(models: dict[str, Any]) -> str:
    try:
        return str(models["data"][0]["id"])
    except (KeyError, IndexError, TypeError) as e:
        raise EngineError("the server names no model; give --model") from e


def calibrate(
    model: Annotated[str, typer.Argument(help="Its folder, or its name on a hub.")],
    dtype: Annotated[str, opt("Of its numbers, as the engine has them.")] = "auto",
    revision: Annotated[
        str | None, opt("The name of its weights, where an engine is given one.")
    ] = None,
) -> None:
    """Measure how far a model's answers are off when pieces are reused, and keep the verdict.

    Engines of this user reuse pieces of a model once that is good. Exit code 1 if it is not.
    """
    if any(importlib.util.find_spec(name) is None for name in ("torch", "transformers")):
        typer.echo("error: it needs more: pip install 'kvstore[transformers]'", err=True)
        raise typer.Exit(2)
    from kvstore.blend.calibration import check_place

    # By name: it needs a connector, which nothing of a daemon's command may.
    bench = importlib.import_module("kvstore.benchmarks.calibrate")
    check_place()
    measured = bench.Calibration(model, dtype, revision)
    with Progress(transient=True, console=Console(stderr=True)) as progress:
        count = len(measured.prompts)
        for _ in progress.track(measured.run(), total=count, description="answering"):
            pass
    verdict, file = measured.verdict()
    for way, found in verdict.ways.items():
        typer.echo(f"{way}: mean KL {found.kl:.3g}, same likeliest token {found.same:.1%}")
    for problem in verdict.problems:
        typer.echo(f"problem: {problem}", err=True)
    typer.echo(f"{'failed' if verdict.problems else 'passed'}, as {file} says")
    if verdict.problems:
        raise typer.Exit(1)
