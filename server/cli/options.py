"""Options that several commands share (groups of them as `grouped` takes them), and how their
values are read.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, cast

import msgspec
import typer

from kvstore.commands import opt, option, size_option
from kvstore.errors import ConfigError, SpecError
from kvstore.server.cli.output import Printing, say
from kvstore.telemetry import shown
from kvstore.transport.credentials import client_token, read_token

if TYPE_CHECKING:
    from kvstore.api.client import Orchestrator
    from kvstore.api.convert import Blocks, Where
    from kvstore.blocks.keys import Media
    from kvstore.config import Config

_UNITS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION: Final = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,12})?)(ms|s|m|h|d)\Z")
_MEDIA: Final = re.compile(r"([^:]*):(.*):([0-9]{1,9}):([0-9]{1,9})", re.DOTALL)
_LONGEST: Final = 36500 * 86400.0

_TIMEOUT: Final = 5.0
_MAX_FILE: Final = 64 << 20
_Token = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]


def parse_duration(text: str) -> float:
    """Seconds from `30s`, `5m`, `2h`, `7d`, `250ms`.

    Raises:
        ValueError: it is none, with the remedy.
    """
    match = _DURATION.match(text.strip())
    seconds = math.inf if match is None else float(match[1]) * _UNITS[match[2]]
    if seconds > _LONGEST:
        raise ValueError(f"{text!r:.60} is no duration; write it like 30s, 5m, 2h or 7d")
    return seconds


class Misuse(typer.BadParameter):
    """A command was given what does not go together, or not what it needs."""

    def format_message(self) -> str:
        """Without "Invalid value" before it."""
        return self.message


def time_option(help: str, *names: str) -> Any:
    """An option that takes a duration."""
    return opt(help, *names, parser=option(parse_duration), metavar="TIME")


def limit_option(text: str) -> float:
    """For typer: a size in bytes; infinite for `none`."""
    return math.inf if text.lower() == "none" else size_option(text)


def agreed(what: str, *, yes: bool = False) -> None:
    """Have the caller agree to what cannot be taken back; ends the command if not.

    Nobody but a terminal is asked: what is piped in may be meant for anything.
    """
    if yes:
        return
    if sys.stdin is None or not sys.stdin.isatty():
        raise Misuse(f"{shown(what)}; without a terminal to ask, give --yes")
    typer.confirm(f"{shown(what)}. Go on?", abort=True, err=True)


ConfigOption = Annotated[
    Path | None, opt("YAML file (default: $KVSTORE_CONFIG).", "--config", "-c")
]
Yes = Annotated[bool, opt("Do not ask.", "--yes", "-y")]
Wait = Annotated[bool, opt("Wait for the end, or only start it.")]


def _read_tokens(text: str, source: str) -> list[int]:
    is_json = text.lstrip().startswith("[")
    listed = text if is_json else f"[{','.join(text.replace(',', ' ').split())}]"
    try:
        # Strictly: 1.5 and true are no ids, and depth costs nothing.
        found = msgspec.json.decode(listed, type=list[_Token])
    except (msgspec.DecodeError, UnicodeError) as e:
        why = f" ({e})" if is_json else ", which are whole numbers below 4294967296"
        raise Misuse(
            f"{source} holds no token ids{why}; write 1,2,3, or a JSON list, or one a line"
        ) from e
    if not found:
        raise Misuse(f"{source} is empty; give the token ids of a prompt")
    return found


def _read_keys(texts: list[str]) -> list[bytes]:
    try:
        return [bytes.fromhex(key) for text in texts for key in text.split(",")]
    except ValueError as e:
        raise Misuse(f"--keys: {e}; give keys of 64 hex digits") from e


def _read_file(path: Path) -> str:
    try:
        with open(0 if str(path) == "-" else path, "rb", closefd=str(path) != "-") as file:
            data = file.read(_MAX_FILE + 1)
        if len(data) > _MAX_FILE:
            raise ValueError(f"it is larger than {_MAX_FILE >> 20} MiB")
        return data.decode()
    except (OSError, ValueError) as e:
        reason = (isinstance(e, OSError) and e.strerror) or e
        raise ConfigError(f"--tokens-file {path}: {reason}; check the path") from e


@dataclasses.dataclass(frozen=True)
class Caller:
    """With what configuration, right and patience a daemon is asked."""

    config: ConfigOption = None
    token_file: Annotated[Path | None, opt("File with the token (default: $KVSTORE_TOKEN).")] = None
    timeout: Annotated[float | None, time_option("For each answer (5s).")] = None

    @functools.cached_property
    def settings(self) -> Config:
        """The configuration. Raises ConfigError: it is unusable."""
        from kvstore.sources import load_config

        return load_config(self.config)

    @property
    def patience(self) -> float:
        """Seconds for each answer."""
        return _TIMEOUT if self.timeout is None else self.timeout

    def token(self) -> str:
        """What to present. Raises ConfigError: a file is unusable."""
        if self.token_file is not None:
            return read_token(self.token_file, "--token-file")
        return client_token(self.settings)


@dataclasses.dataclass(frozen=True)
class Link(Printing, Caller):
    """How to reach the daemon, and how to print what it says."""

    address: Annotated[
        str | None, opt("unix:///path of the daemon, or host:port of its gRPC API.")
    ] = None

    @functools.cached_property
    def api(self) -> Orchestrator:
        """The daemon's API. Raises ConfigError: an address or a file is unusable."""
        from kvstore.api.client import Orchestrator

        settings = self.settings
        api = Orchestrator(self.address, config=settings, token=self.token(), timeout=self.patience)
        if (self.address or settings.address) is None and api.address != str(settings.socket):
            say(f"private store unix://{api.address}", err=True)
        return api

    def close(self) -> None:
        """End the connection, if there is one."""
        if "api" in vars(self):
            self.api.close()


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenOptions:
    """Names blocks from the start of a prompt, as engines and sessions do."""

    tokens: Annotated[str | None, opt("Token ids of the prompt: 1,2,3.")] = None
    tokens_file: Annotated[
        Path | None, opt("File with token ids: a JSON list, or one a line; - is stdin.")
    ] = None
    keys: Annotated[list[str] | None, opt("Block keys in hex, instead of tokens.")] = None
    salt: Annotated[str | None, opt("The request's cache salt.")] = None
    lora: Annotated[str | None, opt("Its LoRA adapter: a folder, or the digest of its files.")] = (
        None
    )
    media: Annotated[
        list[str] | None,
        opt("An image or the like among the tokens.", metavar="KIND:DIGEST:FIRST:TOKENS"),
    ] = None
    extra: Annotated[
        list[str] | None, opt("What else a session names a block by.", metavar="BLOCK:TEXT")
    ] = None

    def given(self) -> Blocks:
        """For the API; empty if there is nothing."""
        blocks: Blocks = {}
        if self.keys:
            blocks["keys"] = _read_keys(self.keys)
        if self.tokens is not None:
            blocks["tokens"] = _read_tokens(self.tokens, "--tokens")
        if self.tokens_file is not None:
            blocks["tokens"] = _read_tokens(_read_file(self.tokens_file), str(self.tokens_file))
        if sum(value not in (None, []) for value in (self.tokens, self.tokens_file, self.keys)) > 1:
            raise Misuse("give one of --tokens, --tokens-file and --keys")
        if self.salt:
            blocks["salt"] = self.salt
        if self.lora is not None:
            blocks["adapter"] = _adapter(self.lora)
        if self.media:
            blocks["media"] = [_media(text) for text in self.media]
        if self.extra:
            blocks["extras"] = _extras(self.extra)
        if blocks and "tokens" not in blocks and blocks.keys() != {"keys"}:
            raise Misuse("--salt, --lora, --media and --extra go with tokens")
        return blocks


def _adapter(text: str) -> str:
    from kvstore.blocks.weights import weights_digest

    if re.fullmatch(r"[0-9a-f]{64}( \w+)?", text, re.ASCII):
        return text
    try:
        return weights_digest(Path(text))
    except (OSError, SpecError, ValueError) as e:
        raise ConfigError(f"--lora {text!r:.200}: {e}; give a folder, or 64 hex digits") from e


def _media(text: str) -> Media:
    from kvstore.blocks.keys import Media

    match = _MEDIA.fullmatch(text)
    if match is None:
        raise Misuse(f"--media {text!r:.200}: write image:DIGEST:OFFSET:LENGTH")
    return Media(match[1], match[2], int(match[3]), int(match[4]))


def _extras(texts: list[str]) -> dict[int, list[bytes]]:
    extras: dict[int, list[bytes]] = {}
    for text in texts:
        block, colon, value = text.partition(":")
        if not colon or not re.fullmatch(r"[0-9]{1,9}", block):
            raise Misuse(f"--extra {text!r:.200}: write BLOCK:TEXT, e.g. 0:mine")
        extras.setdefault(int(block), []).append(os.fsencode(value))
    return extras


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptOptions(TokenOptions):
    """Names blocks of a prompt in a namespace."""

    namespace: Annotated[
        str,
        typer.Argument(
            metavar="NAMESPACE", help="Its id, or the first digits of it, six at least."
        ),
    ]

    def blocks(self) -> Blocks:
        """For the API."""
        given = self.given()
        if not given:
            raise Misuse("give --tokens, --tokens-file or --keys")
        return given


@dataclasses.dataclass(frozen=True, kw_only=True)
class WhereOptions(TokenOptions):
    """Chooses stored blocks; conditions add up."""

    namespace: Annotated[str | None, opt("Only of this namespace (id).", "--namespace", "-n")] = (
        None
    )
    tenant: Annotated[str | None, opt("Only of this tenant.")] = None
    tier: Annotated[str | None, opt("Only with a copy there.")] = None
    older_than: Annotated[float | None, time_option("Only stored so long ago: 2h.")] = None
    unused_for: Annotated[float | None, time_option("Only unused so long: 7d.")] = None
    everything: Annotated[bool, opt("All there is.", "--all")] = False

    def where(self) -> Where:
        """For the API."""
        where: dict[str, Any] = {**self.given()}
        for name in ("namespace", "tenant", "tier", "older_than", "unused_for", "everything"):
            value = getattr(self, name)
            if value is not None and value is not False:
                where[name] = value
        if not where:
            raise Misuse("choose blocks by an option, or take --all")
        return cast("Where", where)
