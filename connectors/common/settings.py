"""Settings of a connector: of the engine's flags, and of single requests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from kvstore.blocks.spec import MAX_BLOCK_TOKENS
from kvstore.config import Config
from kvstore.errors import ConfigError, SpecError
from kvstore.mistakes import explain, plainly
from kvstore.sections import Name, NodeAddress
from kvstore.sources import load_config

PREFIX: Final = "kvstore."
_YEARS: Final = 10 * 365 * 86400


def is_tenant(value: str) -> bool:
    """Whether that may be the name of a tenant."""
    return len(value.encode("utf-8", "replace")) <= 256 and value.isprintable()


def _check_tenant(value: str) -> str:
    if not is_tenant(value):
        raise ValueError("give a name of up to 256 printable bytes")
    return value


Tenant = Annotated[str, AfterValidator(_check_tenant)]
Seconds = Annotated[float, Field(gt=0, lt=_YEARS)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class _Own(_Strict):
    """What an engine's flags say to its connector.

    `tenant` is whose blocks these are where a request does not say; `revision` names the weights
    (empty: found out); with `salt_is_tenant`, a request's salt says whose its blocks are, and is no
    part of its keys; `block_tokens` are the tokens of a block (0: chosen). `layerwise` has steps
    compute a layer as soon as its KV has arrived, where blocks lie in memory. `store_dtype` is the
    type that numbers are rounded to in the store (empty: none, they stay), `codec` the name of one
    that quantises them there. `approximate` lets requests reuse text that is no prefix, if they ask
    for that and the model's calibration has passed, or without one where it is "uncalibrated"; the
    share `shadow` of them is computed in full as well, and compared.
    `node` is the name, in its pool, of the node that has the store, for engines elsewhere that go
    on with what is computed here; `decoders` are the daemons of such engines that requests may have
    their blocks saved to, instead.
    """

    tenant: Tenant = ""
    revision: str = ""
    salt_is_tenant: bool = False
    block_tokens: int = Field(0, ge=0, le=MAX_BLOCK_TOKENS)
    layerwise: bool = False
    store_dtype: str = ""
    codec: str = ""
    approximate: Literal[False, True, "uncalibrated"] = False
    node: Annotated[str, Field(max_length=256)] = ""
    decoders: Annotated[list[NodeAddress], Field(max_length=16)] = []
    shadow: float = Field(0.01, ge=0, le=1)


class Settings(_Own):
    """The same, and what all sources of configuration say."""

    config: Config


def settings_of(extra: Mapping[str, Any], *, engine: str, place: str) -> Settings:
    """Read flags `kvstore.<setting>`, named as in the YAML file, with dots.

    `kvstore.<engine>.tenant` and its neighbours in `Settings` are the connector's own; `place` is
    where the flags stood. What is not given comes from the environment and the YAML file.

    Raises:
        ConfigError: names the setting and the remedy.
    """
    nested: dict[str, Any] = {}
    for name, value in extra.items():
        if not name.startswith(PREFIX):
            raise ConfigError(
                f"{place}: {name!r} is not known; settings of KVStore begin with "
                f"{PREFIX!r}, e.g. 'kvstore.address'"
            )
        *sections, leaf = name.removeprefix(PREFIX).split(".")
        section = nested
        for part in sections:
            section = section.setdefault(part, {})
            if not isinstance(section, dict):
                raise ConfigError(f"{place}: {name!r} contradicts another entry")
        section[leaf] = value
    own = nested.pop(engine, {})
    where = f"{PREFIX}{engine}."
    if not isinstance(own, dict):
        raise ConfigError(f"{place}: {where[:-1]} is a section; set {where}tenant and the like")
    config = load_config(overrides=nested, source=place, prefix=PREFIX)
    try:
        settings = Settings(config=config, **dict(_Own(**own)))
    except ValidationError as e:
        raise explain(e, place, where, [where + name for name in _Own.model_fields]) from None
    for other in ("store_dtype", "approximate"):
        if settings.codec and getattr(settings, other):
            raise ConfigError(f"{place}: set {where}codec or .{other}, not both")
    return settings


class Wishes(_Strict):
    """What a request asks of the store, through `kv_transfer_params`.

    `skip_save` and `skip_load` leave the store out; `ttl` seconds after a save its blocks expire;
    `pin` seconds long they are not evicted; `last`: nothing follows this conversation, so once the
    request has ended, what that alone has used goes first; `tenant` owns the blocks; `priority`
    orders transfers that wait (lower first); `remote_kv_source` is the node of the pool that has
    its blocks, by name or address, as a router says. `do_remote_decode`: another engine goes on
    with it after this one, the one with the daemon `remote_decoder` if given; `do_remote_prefill`:
    another one has computed its prompt, or is about to, and `remote_num_tokens` of it.
    """

    skip_save: bool = False
    skip_load: bool = False
    ttl: Seconds | None = None
    pin: Seconds | None = None
    last: bool = False
    tenant: Tenant | None = None
    priority: int = 0
    remote_kv_source: Name | None = None
    remote_decoder: Name | None = None
    do_remote_decode: bool = False
    do_remote_prefill: bool = False
    remote_num_tokens: int = 0


def wishes_of(params: Mapping[str, Any] | None) -> tuple[Wishes, list[str]]:
    """Read a request's `kv_transfer_params`, and say what is wrong with them.

    A request is not refused for them: what is wrong is left out. Names that are not ours belong to
    other connectors.

    Raises:
        SpecError: the tenant is none, so nobody knows whose its blocks are.
    """
    given = {
        name: value
        for name, value in (params or {}).items()
        if name in Wishes.model_fields and value is not None
    }
    try:
        return Wishes(**given), []
    except ValidationError as e:
        wrong = {str(one["loc"][0]): plainly(one) for one in e.errors()}
    words = [f"{name} is {given[name]!r:.200}: {why}" for name, why in wrong.items()]
    if "tenant" in wrong:
        raise SpecError("; ".join(words))
    return Wishes(**{name: v for name, v in given.items() if name not in wrong}), words
