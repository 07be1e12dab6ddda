"""Options that several commands share, and how their values are read.

A command takes a group of options as one parameter, annotated with one of the dataclasses here;
`grouped` spreads their fields out for the command line.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, get_type_hints

import typer

from kvstore.config import load_config, parse_size
from kvstore.errors import ConfigError

if TYPE_CHECKING:
    from kvstore.api.requests import Blocks, Where
    from kvstore.client import Orchestrator

_UNITS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION: Final = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)\Z")

_TIMEOUT: Final = 5.0

TierChoice = Literal["memory", "disk"]


def parse_duration(text: str) -> float:
    """Seconds from `30s`, `5m`, `2h`, `7d`, `250ms`.

    Raises:
        ValueError: it is none, with the remedy.
    """
    match = _DURATION.match(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no duration; write it like 30s, 5m, 2h or 7d")
    return float(match[1]) * _UNITS[match[2]]


def duration_option(text: str) -> float:
    """For typer: a duration."""
    try:
        return parse_duration(text)
    except ValueError as e:
        raise typer.BadParameter(str(e)) from e


def limit_option(text: str) -> float:
    """For typer: a size in bytes; infinite for `none`."""
    if text.lower() == "none":
        return math.inf
    try:
        return parse_size(text)
    except ValueError as e:
        raise typer.BadParameter(f"{e}; or none for no limit") from e


def _read_tokens(text: str, source: str) -> list[int]:
    try:
        found = (
            json.loads(text) if text.lstrip().startswith("[") else text.replace(",", " ").split()
        )
        return [int(token) for token in found]
    except (TypeError, ValueError) as e:
        raise typer.BadParameter(
            f"{source} holds no token ids; write 1,2,3, or a JSON list, or one a line"
        ) from e


def _read_keys(texts: list[str]) -> list[bytes]:
    try:
        return [bytes.fromhex(key) for text in texts for key in text.split(",")]
    except ValueError as e:
        raise typer.BadParameter(f"--keys: {e}; give keys of 64 hex digits") from e


def _read_file(path: Path) -> str:
    try:
        return sys.stdin.read() if str(path) == "-" else path.read_text()
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else "it is no text"
        raise ConfigError(f"--tokens-file {path}: {reason}; check the path") from e


@dataclasses.dataclass(frozen=True)
class Link:
    """How to reach the daemon, and how to print what it says."""

    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="YAML file (default: $KVSTORE_CONFIG).")
    ] = None
    address: Annotated[
        str | None,
        typer.Option(help="unix:///path of the daemon, or host:port of its gRPC API."),
    ] = None
    token_file: Annotated[
        Path | None, typer.Option(help="File with the token (default: $KVSTORE_TOKEN).")
    ] = None
    timeout: Annotated[
        float | None,
        typer.Option(parser=duration_option, metavar="TIME", help="For each answer (5s)."),
    ] = None
    format: Annotated[Literal["table", "json"], typer.Option(help="How to print.")] = "table"

    def open(self) -> Orchestrator:
        """The daemon's API.

        Raises:
            ConfigError: an address or a file is unusable.
        """
        from kvstore.client import Orchestrator

        token: str | None = None
        if self.token_file is not None:
            try:
                token = self.token_file.read_text().strip()
            except (OSError, UnicodeDecodeError) as e:
                raise ConfigError(f"--token-file {self.token_file}: {e}; check the path") from e
        settings = load_config(self.config)
        timeout = self.timeout or _TIMEOUT
        return Orchestrator(self.address, config=settings, token=token, timeout=timeout)


_Namespace = Annotated[
    str, typer.Argument(metavar="NAMESPACE", help="Its id, or the first digits of it.")
]
_Tokens = Annotated[str | None, typer.Option(help="Token ids of the prompt: 1,2,3.")]
_TokensFile = Annotated[
    Path | None, typer.Option(help="File with token ids: a JSON list, or one a line; - is stdin.")
]
_Keys = Annotated[list[str] | None, typer.Option(help="Block keys in hex, instead of tokens.")]


def _blocks(tokens: str | None, tokens_file: Path | None, keys: list[str] | None) -> Blocks:
    given: Blocks = {}
    if tokens is not None:
        given["tokens"] = _read_tokens(tokens, "--tokens")
    if tokens_file is not None:
        if given:
            raise typer.BadParameter("give one of --tokens, --tokens-file and --keys")
        given["tokens"] = _read_tokens(_read_file(tokens_file), str(tokens_file))
    if keys:
        given["keys"] = _read_keys(keys)
    if len(given) > 1:
        raise typer.BadParameter("give one of --tokens, --tokens-file and --keys")
    return given


@dataclasses.dataclass(frozen=True)
class PromptOptions:
    """Names blocks of a prompt."""

    namespace: _Namespace
    tokens: _Tokens = None
    tokens_file: _TokensFile = None
    keys: _Keys = None

    def blocks(self) -> Blocks:
        """For the API."""
        given = _blocks(self.tokens, self.tokens_file, self.keys)
        if not given:
            raise typer.BadParameter("give --tokens, --tokens-file or --keys")
        return given


@dataclasses.dataclass(frozen=True)
class WhereOptions:
    """Chooses stored blocks; conditions add up."""

    namespace: Annotated[
        str | None, typer.Option("--namespace", "-n", help="Only of this namespace (id).")
    ] = None
    tenant: Annotated[str | None, typer.Option(help="Only of this tenant.")] = None
    tokens: _Tokens = None
    tokens_file: _TokensFile = None
    keys: _Keys = None
    tier: Annotated[TierChoice | None, typer.Option(help="Only with a copy there.")] = None
    older_than: Annotated[
        float | None,
        typer.Option(parser=duration_option, metavar="TIME", help="Only stored so long ago: 2h."),
    ] = None
    unused_for: Annotated[
        float | None,
        typer.Option(parser=duration_option, metavar="TIME", help="Only unused so long: 7d."),
    ] = None
    everything: Annotated[bool, typer.Option("--all", help="All there is.")] = False

    def where(self) -> Where:
        """For the API."""
        blocks = _blocks(self.tokens, self.tokens_file, self.keys)
        given: Where = {}
        if "tokens" in blocks:
            given["tokens"] = blocks["tokens"]
        if "keys" in blocks:
            given["keys"] = blocks["keys"]
        if self.namespace is not None:
            given["namespace"] = self.namespace
        if self.tenant is not None:
            given["tenant"] = self.tenant
        if self.tier is not None:
            given["tier"] = self.tier
        if self.older_than is not None:
            given["older_than"] = self.older_than
        if self.unused_for is not None:
            given["unused_for"] = self.unused_for
        if self.everything:
            given["everything"] = True
        if not given:
            raise typer.BadParameter("choose blocks by an option, or take --all")
        return given


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the fields of its option groups as parameters of their own."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {
        n: kind for n, kind in hints.items() if dataclasses.is_dataclass(kind)
    }
    own = [p for p in inspect.signature(command).parameters.values() if p.name not in groups]
    parameters = [
        p.replace(annotation=hints[p.name], kind=inspect.Parameter.KEYWORD_ONLY) for p in own
    ]
    for kind in groups.values():
        of_field = get_type_hints(kind, include_extras=True)
        for field in dataclasses.fields(kind):
            default = field.default
            if default is dataclasses.MISSING:
                default = inspect.Parameter.empty
            parameters.append(
                inspect.Parameter(
                    field.name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=default,
                    annotation=of_field[field.name],
                )
            )

    @functools.wraps(command)
    def spread(**values: Any) -> None:
        gathered = {
            name: kind(**{field.name: values.pop(field.name) for field in dataclasses.fields(kind)})
            for name, kind in groups.items()
        }
        command(**values, **gathered)

    spread.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    spread.__annotations__ = {p.name: p.annotation for p in parameters}
    del spread.__wrapped__
    return spread
