"""Where the configuration comes from: a YAML file, then KVSTORE_* variables, then flags.

Later sources win, value by value. Nested names join with two underscores in the environment:
``KVSTORE_MEMORY__SIZE=8GiB`` sets ``memory.size``. Variables that name no setting are not ours:
Kubernetes sets KVSTORE_PORT and more of the kind for a Service named kvstore.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import yaml
from pydantic import ValidationError

from kvstore.config import Config, known_keys
from kvstore.errors import ConfigError
from kvstore.mistakes import explain
from kvstore.values import format_size

_NOT_CONFIG: Final = frozenset({"KVSTORE_CONFIG", "KVSTORE_CPU", "KVSTORE_TOKEN"})
"""Variables of ours that are no configuration values; the token is a secret."""

_QUOTA: Final = re.compile(r"KVSTORE_QUOTAS__(.*)__([a-z][a-z0-9-]*)", re.I | re.S)
_RULE: Final = re.compile(r"KVSTORE_ADMISSION__([a-z][a-z0-9-]*)", re.I)
"""Settings by the name of a tier."""
_INJECTED: Final = re.compile(r"_SERVICE_HOST\Z|_PORT(_\w+)?\Z")
"""How names end that Kubernetes makes of Services, and Docker of links."""

_MAX_YAML: Final = 1 << 20

_suggested: Final[set[str]] = set()
_log = logging.getLogger("kvstore.config")


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = (
            _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
        )
    return merged


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[object] = set()
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else key
            if name in seen and name != "<<":
                raise yaml.MarkedYAMLError(
                    problem=f"{name!r:.60} is given twice", problem_mark=key.start_mark
                )
            seen.add(name)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, what: str) -> object:
    """What a YAML file of ours holds.

    Raises:
        ConfigError: it cannot be read or understood; names `what` it is, and the path.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_YAML + 1)
    except (OSError, ValueError) as e:
        reason = (isinstance(e, OSError) and e.strerror) or e
        raise ConfigError(f"{what} {path}: {reason}; check the path") from e
    if len(data) > _MAX_YAML:
        raise ConfigError(f"{what} {path} is larger than {format_size(_MAX_YAML)}; check the path")
    try:
        return yaml.load(data.decode(), _Loader)
    except RecursionError:
        raise ConfigError(f"{what} {path} is no valid YAML: it is nested too deeply") from None
    except (yaml.YAMLError, ValueError) as e:
        mark, told = getattr(e, "problem_mark", None), getattr(e, "problem", None) or e
        told = " ".join(str(told).split())
        if mark is not None:
            told = f"line {mark.line + 1}, column {mark.column + 1}: {told}"
        if "'\\t'" in told:
            told += "; indent with spaces"
        raise ConfigError(f"{what} {path} is no valid YAML: {told}") from e


def _from_file(path: Path) -> dict[str, Any]:
    content = read_yaml(path, "config file")
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"config file {path} must hold `key: value` lines, not {content!r:.200}")
    return {str(key): value for key, value in content.items()}


def _from_environment() -> dict[str, Any]:
    keys = (key.split(".") for key in known_keys(Config) if key != "quotas")
    known = {"KVSTORE_" + "__".join(key).upper(): key for key in keys}
    values: dict[str, Any] = {}
    for name, text in os.environ.items():
        if quota := _QUOTA.fullmatch(name):  # The tenant stays as it is written.
            found = ["quotas", quota[1], quota[2].lower()]
        elif rule := _RULE.fullmatch(name):
            found = ["admission", rule[1].lower()]
        elif (found := known.get(name.upper(), [])) == []:
            _suggest(name, known)
            continue
        place = values
        for section in found[:-1]:
            place = place.setdefault(section, {})
        place[found[-1]] = text
    return values


def _suggest(name: str, known: Iterable[str]) -> None:
    """Say once what a variable that is no setting may have been meant for."""
    if name in _NOT_CONFIG or name in _suggested or not name.startswith("KVSTORE_"):
        return
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    if near and not _INJECTED.search(name):
        _suggested.add(name)
        _log.warning("%s is no setting and counts for nothing; did you mean %s?", name, near[0])


def load_config(
    path: Path | str | None = None,
    overrides: dict[str, Any] | None = None,
    *,
    source: str = "settings",
    prefix: str = "",
) -> Config:
    """The configuration from `path` (or `$KVSTORE_CONFIG`), the environment and `overrides`.

    `overrides` is nested like the file, e.g. `{"memory": {"size": "8GiB"}}`; `source` is where they
    stood, and `prefix` what stood before their names there.

    Raises:
        ConfigError: names the source, the field and the remedy.
    """
    chosen = path or os.environ.get("KVSTORE_CONFIG")
    merged: dict[str, Any] = {}
    sources: list[tuple[str, dict[str, Any]]] = []
    if chosen:
        sources.append((f"config file {chosen}", _from_file(Path(chosen))))
    sources.append(("environment KVSTORE_*", _from_environment()))
    sources.append((source, overrides or {}))
    config, contradiction = Config(), None
    for place, values in sources:
        merged = _merge(merged, values)
        try:
            config, contradiction = Config(**merged), None
        except ValidationError as e:
            before = prefix if place == source else ""
            error = explain(e, place, before, list(known_keys(Config, before)))
            if any(item["loc"] for item in e.errors()):
                raise error from None
            contradiction = contradiction or error  # A later source may have the tier it names.
    if contradiction is not None:
        raise contradiction
    return config
