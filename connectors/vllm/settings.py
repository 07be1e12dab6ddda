"""Settings of the vLLM connector: of the engine's flag, and of single requests."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from kvstore.blocks.spec import MAX_BLOCK_TOKENS
from kvstore.config import Config, load_config
from kvstore.errors import ConfigError

PLACE: Final = "kv_connector_extra_config"
PREFIX: Final = "kvstore."


@dataclass(frozen=True, slots=True)
class Settings:
    """What `kv_connector_extra_config` and the usual sources of configuration say.

    `tenant` is whose blocks these are where a request does not say; `revision` names the weights
    (empty: found out); with `salt_is_tenant`, a request's `cache_salt` says whose its blocks are,
    and is no part of its keys; `block_tokens` are the tokens of a block (0: chosen). `layerwise`
    has steps compute a layer as soon as its KV has arrived, where blocks lie in memory.
    `store_dtype` is the type that numbers are rounded to in the store (empty: none, they stay).
    """

    config: Config
    tenant: str = ""
    revision: str = ""
    salt_is_tenant: bool = False
    block_tokens: int = 0
    layerwise: bool = False
    store_dtype: str = ""


_OWN: Final = {
    "tenant": str,
    "revision": str,
    "salt_is_tenant": bool,
    "block_tokens": int,
    "layerwise": bool,
    "store_dtype": str,
}


def settings_of(extra: Mapping[str, Any]) -> Settings:
    """Read `kv_connector_extra_config`: `kvstore.<setting>` as in the YAML file, with dots.

    `kvstore.vllm.tenant` and its neighbours in `Settings` are the connector's own. What is not
    given comes from the environment and the YAML file.

    Raises:
        ConfigError: names the setting and the remedy.
    """
    nested: dict[str, Any] = {}
    for name, value in extra.items():
        if not name.startswith(PREFIX):
            raise ConfigError(
                f"{PLACE}: {name!r} is not known; settings of KVStore begin with "
                f"{PREFIX!r}, e.g. 'kvstore.address'"
            )
        *sections, leaf = name.removeprefix(PREFIX).split(".")
        place = nested
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise ConfigError(f"{PLACE}: {name!r} contradicts another entry")
        place[leaf] = value
    own = _own(nested.pop("vllm", {}))
    return Settings(load_config(overrides=nested, source=PLACE, prefix=PREFIX), **own)


def _own(values: Any) -> dict[str, Any]:
    where = f"{PLACE}: {PREFIX}vllm"
    if not isinstance(values, dict):
        raise ConfigError(f"{where} is a section; set kvstore.vllm.tenant and the like")
    for name, value in values.items():
        if name not in _OWN:
            near = difflib.get_close_matches(name, _OWN, n=1) or sorted(_OWN)
            others = " or ".join(f"{PREFIX}vllm.{other}" for other in near)
            raise ConfigError(f"{where}.{name}: unknown key; did you mean {others}?")
        wanted = _OWN[name]
        if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
            raise ConfigError(f"{where}.{name} is {value!r}; give a {wanted.__name__}")
    if not 0 <= values.get("block_tokens", 0) <= MAX_BLOCK_TOKENS:
        raise ConfigError(f"{where}.block_tokens must lie between 1 and {MAX_BLOCK_TOKENS}")
    return values


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a request asks of the store, through `kv_transfer_params`.

    `skip_save` and `skip_load` leave the store out; `ttl` seconds after a save its blocks expire;
    `pin` seconds long they are not evicted; `tenant` owns the blocks; `priority` orders transfers
    that wait (lower first).
    """

    skip_save: bool = False
    skip_load: bool = False
    ttl: float | None = None
    pin: float | None = None
    tenant: str | None = None
    priority: int = 0


def wishes_of(params: Mapping[str, Any] | None) -> tuple[Wishes, list[str]]:
    """Read a request's `kv_transfer_params`, and say what is wrong with them.

    A request is not refused for them: what is wrong is left out. Names that are not ours belong to
    other connectors.
    """
    values: dict[str, Any] = {}
    wrong: list[str] = []
    for name, value in (params or {}).items():
        if name not in _CHECKS:
            continue
        if value is None:
            continue
        kind, check, words = _CHECKS[name]
        plain_bool = isinstance(value, bool) and kind is not bool
        if isinstance(value, kind) and not plain_bool and check(value):
            values[name] = value
        else:
            wrong.append(f"{name} is {value!r}; give {words}")
    return Wishes(**values), wrong


def is_tenant(value: str) -> bool:
    """Whether that may be the name of a tenant."""
    return len(value.encode("utf-8", "replace")) <= 256 and value.isprintable()


def _any(value: Any) -> bool:
    return True


def _seconds(value: Any) -> bool:
    return bool(0 < value < 10 * 365 * 86400)


_CHECKS: Final[dict[str, tuple[Any, Any, str]]] = {
    "skip_save": (bool, _any, "true or false"),
    "skip_load": (bool, _any, "true or false"),
    "ttl": ((int, float), _seconds, "seconds"),
    "pin": ((int, float), _seconds, "seconds"),
    "tenant": (str, is_tenant, "a name of up to 256 bytes"),
    "priority": (int, _any, "a whole number"),
}
