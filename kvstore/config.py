"""One typed configuration: a YAML file, then KVSTORE_* environment variables, then flags.

Later sources win, value by value. Nested names join with two underscores in the environment:
``KVSTORE_MEMORY__SIZE=8GiB`` sets ``memory.size``. Variables that name no setting are not ours:
Kubernetes sets KVSTORE_PORT and more of the kind for a Service named kvstore.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import os
import re
import socket
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from kvstore.errors import ConfigError
from kvstore.values import checked_text, format_size, parse_size, split_host_port

_NOT_CONFIG: Final = frozenset({"KVSTORE_CONFIG", "KVSTORE_CPU", "KVSTORE_TOKEN"})
"""Variables of ours that are no configuration values; the token is a secret."""

_QUOTA: Final = re.compile(r"KVSTORE_QUOTAS__(.*)__([a-z][a-z0-9-]*)", re.I | re.S)
_RULE: Final = re.compile(r"KVSTORE_ADMISSION__([a-z][a-z0-9-]*)", re.I)
"""Settings by the name of a tier."""
_INJECTED: Final = re.compile(r"_SERVICE_HOST\Z|_PORT(_\w+)?\Z")
"""How names end that Kubernetes makes of Services, and Docker of links."""

MAX_BELOW: Final = 6
"""Tiers below memory."""
_MAX_TIER: Final = 1 << 50
_MAX_CHUNKS: Final = 1 << 22
_MAX_YAML: Final = 1 << 20
_WEEK: Final = 7 * 86400.0
"""Of seconds, as much as every kind of waiting takes."""

_suggested: Final[set[str]] = set()
_log = logging.getLogger("kvstore.config")


def _none(value: object) -> object:
    """The environment has no other way to say null."""
    return None if isinstance(value, str) and value.lower() in ("none", "null") else value


def _number(value: object) -> object:
    if isinstance(value, bool):  # YAML makes it of yes and on.
        raise ValueError(f"{value} is no number")
    return value


def _path(value: object) -> object:
    if value == "":
        raise ValueError("is empty; give a path, or leave it out (`none` in the environment)")
    return _none(value)


def _folder(path: Path | None) -> Path | None:
    try:  # An embedded daemon stands in another folder than the engine that starts it.
        return None if path is None else Path(checked_text(str(path.expanduser().absolute())))
    except RuntimeError as e:
        raise ValueError(f"{path}: there is no such user; write the folder out") from e


def _listener(value: object) -> object:
    if isinstance(value, str):
        if value.lower() in ("off", "", "none", "null"):
            return None
        split_host_port(value)
    return value


Seconds = Annotated[float, BeforeValidator(_number), Field(ge=0.001, le=_WEEK)]
Count = Annotated[int, BeforeValidator(_number)]
Part = Annotated[float, BeforeValidator(_number), Field(ge=0, le=1)]
Size = Annotated[int, BeforeValidator(parse_size)]
Limit = Annotated[Size | None, BeforeValidator(_none)]
Folder = Annotated[Path, BeforeValidator(_path), AfterValidator(_folder)]
MaybeFolder = Annotated[Path | None, BeforeValidator(_path), AfterValidator(_folder)]
Listener = Annotated[str | None, BeforeValidator(_listener)]
Name = Annotated[str, AfterValidator(checked_text), Field(min_length=1, max_length=256)]
User = Annotated[
    Name | None, BeforeValidator(lambda v: str(v) if type(v) is int else _none(v))  # YAML has both
]
Tenant = Annotated[str, AfterValidator(checked_text), Field(max_length=4096)]
PolicyName = Literal["lru", "s3fifo"]
_TIER_NAME: Final = r"^[a-z][a-z0-9-]{0,31}$"
TierName = Annotated[str, Field(pattern=_TIER_NAME)]
WriteRule = Literal["all", "reused", "none"]


def default_run_dir() -> Path:
    """`$XDG_RUNTIME_DIR/kvstore`, or a folder of this user under /tmp."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime) / "kvstore" if runtime else Path(f"/tmp/kvstore-{os.getuid()}")


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False
    )


class _Space(_Section):
    """What is cut into chunks."""

    size: Size
    chunk: Size = Field(0, description="bytes given to one size class at a time; 0 picks it")
    policy: PolicyName = Field("lru", description="what to evict first: lru or s3fifo")

    @field_validator("chunk")
    @classmethod
    def _check_chunk(cls, chunk: int, others: ValidationInfo) -> int:
        size = others.data.get("size", chunk)
        least = max(4096, -(size // -_MAX_CHUNKS // 4096 * 4096))
        if chunk and (chunk % 4096 or not least <= chunk <= size):
            raise ValueError(
                f"{chunk} bytes do not fit a size of {format_size(size)}; give a multiple of 4096 "
                f"from {least} to the size, or 0"
            )
        return chunk


class MemoryConfig(_Space):
    """The memory tier: one arena shared with every session."""

    size: Size = Field(2**30, description="bytes of the arena; a hard cap", ge=2**20, le=_MAX_TIER)
    huge_dir: MaybeFolder = Field(None, description="folder on a tmpfs mounted with huge=advise")
    prefault: bool = Field(True, description="touch every page at start, not at first use")
    path: MaybeFolder = Field(None, description="file on a tmpfs, where no descriptors can pass")
    max_pinned: Part = Field(0.5, description="part of the arena that pins may hold")


class SlabConfig(_Space):
    """A slab of objects and its table, in a folder of their own."""

    path: MaybeFolder = Field(None, description="folder for the slab; none: no disk tier")
    size: Size = Field(10 * 2**30, description="bytes on disk, of all", ge=2**22, le=_MAX_TIER)
    threads: Count = Field(2, description="I/O threads", ge=1, le=64)
    sync_seconds: Seconds = Field(5.0, description="longest time a finished write stays unsynced")


class _Below(_Section):
    """How the store works with a tier below memory."""

    queue: Size = Field(256 * 2**20, description="bytes on their way to it at a time", ge=1)
    retry_seconds: Seconds = Field(5.0, description="between attempts while it is broken")
    stall_seconds: Seconds = Field(10.0, description="I/O that takes longer: it is broken")


class DiskConfig(_Below, SlabConfig):
    """The disk tier: short for a slab named `disk`, first of the tiers below memory."""


class TierConfig(_Below):
    """A tier below memory."""

    kind: Name = Field(description="slab, or a kind that an installed package offers")
    name: TierName = Field("disk", description="in metrics, quotas and rules; else as its kind")
    probe_seconds: Seconds = Field(0.02, description="a lookup may wait to be told what it has")
    options: dict[str, Any] = Field(
        default_factory=dict, description="as the kind has them; a slab those of disk"
    )

    @model_validator(mode="before")
    @classmethod
    def _named(cls, values: Any) -> Any:
        if isinstance(values, dict) and "kind" in values and "name" not in values:
            return values | {"name": "disk" if values["kind"] == "slab" else values["kind"]}
        return values

    @field_validator("options")
    @classmethod
    def _check_slab(cls, options: dict[str, Any], others: ValidationInfo) -> dict[str, Any]:
        if others.data.get("kind") != "slab":
            return options
        try:
            slab = SlabConfig.model_validate(options)
        except ValidationError as e:
            known = tuple(SlabConfig.model_fields)
            raise ValueError(str(explain(e, "a slab", "", known))) from None
        if slab.path is None:
            raise ValueError("a slab needs a path: the folder to lie in")
        return slab.model_dump()


class SessionConfig(_Section):
    """How long a client waits, and how it comes back."""

    lookup_timeout: Seconds = Field(0.05, description="seconds a lookup may take")
    load_timeout: Seconds = Field(10.0, description="seconds blocks may take to reach memory")
    save_timeout: Seconds = Field(1.0, description="seconds to get slots for a save")
    connect_timeout: Seconds = Field(2.0, description="seconds to connect and agree")
    start_timeout: Seconds = Field(60.0, description="seconds an embedded daemon may start")
    retry_max: Seconds = Field(5.0, description="longest pause between reconnects")
    copy_threads: Count = Field(2, description="threads that copy blocks", ge=1, le=64)
    gpu_path: Literal["auto", "dma", "kernel", "staged"] = Field(
        "auto", description="how a GPU's pages are copied; auto takes what was measured cheapest"
    )
    gpu_staging: Size = Field(
        64 * 2**20, description="bytes of a GPU that copies may use", ge=0, le=2**33
    )
    checksum: bool = Field(False, description="checksum blocks from save to load, in memory, too")
    token_file: MaybeFolder = Field(None, description="file with the token (or set KVSTORE_TOKEN)")
    daemon_user: User = Field(
        None, description="user whose daemon is trusted, besides one's own and root; name or number"
    )
    tls_ca: MaybeFolder = Field(None, description="certificates to trust, for tls:// addresses")
    tls_cert: MaybeFolder = Field(None, description="own certificate, for mutual TLS")
    tls_key: MaybeFolder = Field(None, description="key of `tls_cert`")
    streams: Count = Field(2, description="TCP connections that carry blocks", ge=1, le=16)
    publish_tokens: bool = Field(False, description="send token ids along, for watchers of events")


class ServerConfig(_Section):
    """Where `kvstore serve` listens besides its socket, and whom it lets in."""

    name: Name = Field(default_factory=socket.gethostname, description="this node's, in answers")
    grpc: Listener = Field("127.0.0.1:7420", description="host:port of the gRPC API; none: off")
    http: Listener = Field("127.0.0.1:7421", description="host:port of HTTP; none: off")
    tcp: Listener = Field(None, description="host:port for sessions from elsewhere; none: off")
    insecure: bool = Field(False, description="listen beyond loopback without TLS and tokens")
    tls_cert: MaybeFolder = Field(None, description="certificate chain of the listeners, PEM")
    tls_key: MaybeFolder = Field(None, description="key of `tls_cert`, PEM")
    tls_client_ca: MaybeFolder = Field(None, description="signs the certificates of clients")
    tokens: MaybeFolder = Field(None, description="YAML file of tokens, roles and tenants")
    group: Annotated[Name | None, BeforeValidator(_none)] = Field(
        None, description="unix group whose members may open sessions on the socket"
    )
    max_token_sessions: Count = Field(
        64, description="open sessions of one token (or one user of the group)", ge=1, le=65536
    )
    max_held: Part = Field(
        0.5,
        description="part of the arena that sessions with a token may keep in use for one tenant",
    )
    max_labels: Count = Field(
        50, description="tenants that metrics name; the others are one sum", ge=0, le=10_000
    )
    stop_timeout: Seconds = Field(30.0, description="seconds to write out and end, once told to")
    max_requests: Count = Field(64, description="of gRPC and of HTTP at a time", ge=1, le=65536)


class QuotaConfig(_Section):
    """What one tenant may hold, by the name of the tier."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Limit]

    memory: Limit = Field(None, description="bytes in memory; none: no limit")
    disk: Limit = Field(None, description="bytes on disk, and so on by tiers' names")

    @property
    def limits(self) -> dict[str, int | None]:
        """Bytes by the name of the tier."""
        return {"memory": self.memory, "disk": self.disk} | self.__pydantic_extra__


class AdmissionConfig(_Section):
    """What is let in, by the name of the tier; the API changes it at run time."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, WriteRule]

    memory: Literal["all", "none"] = Field("all", description="saves: all or none")
    disk: WriteRule = Field(
        "all",
        description="write-behind: all, reused (what a second request asks for) or none; so for "
        "others, by their names",
    )
    denied_tenants: frozenset[Tenant] = Field(frozenset(), description="whose saves are dropped")

    @property
    def below(self) -> dict[str, str]:
        """The rules of tiers below memory, by their names."""
        return {"disk": self.disk, **self.__pydantic_extra__}


class PlannerConfig(_Section):
    """Load or recompute."""

    mode: Literal["auto", "load", "recompute"] = Field(
        "auto", description="auto compares measured times; load and recompute force it"
    )


class Config(_Section):
    """Everything that can be set. See `load_config`."""

    address: Annotated[str | None, BeforeValidator(_none)] = Field(
        None,
        description="unix:///path, tcp://host:port or tls://host:port of a daemon; none: a private "
        "one is started on demand",
    )
    run_dir: Folder = Field(default_factory=default_run_dir, description="of sockets and locks")
    lease_seconds: Seconds = Field(30.0, description="life of a lease that is not renewed")
    linger_seconds: Annotated[float, BeforeValidator(_number)] = Field(
        1.0, description="how long an embedded daemon outlives its last session", ge=0, le=_WEEK
    )
    max_sessions: Count = Field(256, description="open connections", ge=1, le=65536)
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    memory: MemoryConfig = Field(default_factory=MemoryConfig)
    disk: DiskConfig = Field(default_factory=DiskConfig)
    tiers: tuple[TierConfig, ...] = Field(
        (), description="below memory and disk, in the order in which they are read from"
    )
    session: SessionConfig = Field(default_factory=SessionConfig)
    planner: PlannerConfig = Field(default_factory=PlannerConfig)
    server: ServerConfig = Field(default_factory=ServerConfig)
    admission: AdmissionConfig = Field(default_factory=AdmissionConfig)
    quotas: dict[Tenant, QuotaConfig] = Field(default_factory=dict, description="by tenant")

    @property
    def below(self) -> tuple[TierConfig, ...]:
        """The tiers below memory, in their order; `disk` is the first."""
        if self.disk.path is None:
            return self.tiers
        disk = self.disk.model_dump()
        waits = {key: disk.pop(key) for key in _Below.model_fields}
        return (TierConfig(kind="slab", name="disk", options=disk, **waits), *self.tiers)

    @model_validator(mode="after")
    def _check_tiers(self) -> Config:
        names = [tier.name for tier in self.below]
        if len(names) > MAX_BELOW:
            raise ValueError(f"tiers: {len(names)} below memory; give {MAX_BELOW} at most")
        taken = ["memory", *names]
        for number, name in enumerate(names):
            if name in taken[: number + 1]:
                raise ValueError(f"tiers: {name!r} is there twice; give one of them another name")
        folders: dict[Path, str] = {}
        for slab in (tier for tier in self.below if tier.kind == "slab"):
            other = folders.setdefault(slab.options["path"].resolve(), slab.name)
            if other != slab.name:
                text = "lie in one folder; give each a path of its own"
                raise ValueError(f"tiers: {other!r} and {slab.name!r} {text}")
        rules = {f"admission.{name}": name for name in self.admission.__pydantic_extra__}
        for tenant, quota in self.quotas.items():
            rules |= {f"quotas.{tenant}.{name}": name for name in quota.__pydantic_extra__}
        for where, name in rules.items():
            if name not in names:
                known = ", ".join(dict.fromkeys(("memory", "disk", *names)))
                raise ValueError(f"{where}: there is no tier {name!r}; known: {known}")
        return self

    @field_validator("address")
    @classmethod
    def _check_address(cls, value: str | None) -> str | None:
        if value is None or (value.startswith("unix:///") and value != "unix:///"):
            return value if value is None else checked_text(value)
        scheme, separator, rest = value.partition("://")
        if not separator or scheme not in ("tcp", "tls"):
            path = value if value.startswith("/") else "/path/to/socket"
            raise ValueError(
                f"{value!r} is no address of a daemon; write unix://{path}, or "
                "tcp://host:port or tls://host:port for one elsewhere"
            )
        if split_host_port(rest)[1] == 0:
            raise ValueError(f"{value!r} has no port; write the one that the daemon listens on")
        return value

    @property
    def socket(self) -> Path:
        """The socket of the daemon to talk to, or to serve on.

        Raises:
            ConfigError: the address is that of a daemon elsewhere.
        """
        if self.address is None:
            return self.run_dir / "kvstore.sock"
        if not self.address.startswith("unix://"):
            raise ConfigError(
                f"address {self.address} is no socket; give unix:///path/to/socket (or, for the "
                "API, its host:port: --address)"
            )
        return Path(self.address.removeprefix("unix://"))

    @property
    def control_socket(self) -> Path:
        """The socket of the orchestration API, beside that of the sessions."""
        return self.socket.with_name(self.socket.name + ".control")

    @property
    def instance(self) -> str:
        """Names the embedded daemon that serves exactly this configuration."""
        values = self.model_dump(exclude={"session", "planner", "log_level", "address", "server"})
        # Sets come in another order in each process, and tables as they were written.
        text = json.dumps(
            values,
            sort_keys=True,
            default=lambda value: sorted(value) if isinstance(value, frozenset) else str(value),
        )
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _known_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            yield from _known_keys(section, f"{prefix}{name}.")
        else:
            yield prefix + name


_PYDANTIC: Final = {
    "Value error, ": "", "Input should be a valid": "must be a", "Input should be": "must be",
    "a string": "a text (in quotes)", "a integer": "a whole number", "a tuple": "a list",
    "a dictionary": "`key: value` lines",
    "Field required": "is missing",
    f"String should match pattern '{_TIER_NAME}'": "must have a-z, 0-9 and -, at most 32 of them, "
    "a letter first",
    "Extra inputs are not permitted": "is no key of this; take it out",
}  # fmt: skip


def plainly(item: ErrorDetails) -> str:
    """What pydantic says, in words of ours and without the value."""
    told = re.split(r" or instance of|, unable to", item["msg"])[0]
    for theirs, ours in _PYDANTIC.items():
        told = told.replace(theirs, ours)
    for bound in item.get("ctx", {}).values():
        if type(bound) is int and bound >= 4096 and not bound % 4096:
            told = told.replace(str(bound), f"{format_size(bound)} ({bound} bytes)")
    return told


def _in_tier(where: Sequence[int | str]) -> list[str]:
    """The option that a key beside `options` of a tier was meant for, if it is one of a slab's."""
    if len(where) == 3 and where[0] == "tiers" and where[2] in SlabConfig.model_fields:
        return [f"tiers.{where[1]}.options.{where[2]}"]
    return []


def explain(
    error: ValidationError, source: str, prefix: str, known: Sequence[str] = ()
) -> ConfigError:
    """What was wrong in `source`, where names have a `prefix`, in words that name the remedy.

    `known` names what may stand there; without it, all of `Config`.
    """
    known = known or list(_known_keys(Config, prefix))
    lines = []
    for item in error.errors():
        where = prefix + ".".join(str(part) for part in item["loc"])[:200]
        if item["type"] == "extra_forbidden":
            near = _in_tier(item["loc"]) or difflib.get_close_matches(where, known, 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
            lines.append(f"{where}: unknown key; {hint}")
        else:
            lines.append(f"{where}: {plainly(item)}" if item["loc"] else plainly(item))
    return ConfigError(f"{source}: " + "; ".join(lines))


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
    keys = (key.split(".") for key in _known_keys(Config) if key != "quotas")
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
            error = explain(e, place, prefix if place == source else "")
            if any(item["loc"] for item in e.errors()):
                raise error from None
            contradiction = contradiction or error  # A later source may have the tier it names.
    if contradiction is not None:
        raise contradiction
    return config
