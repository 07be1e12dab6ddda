"""Sections of the configuration, and what their values are made of."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Annotated, Any, Final, Literal

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

from kvstore.mistakes import TIER_NAME, explain
from kvstore.values import checked_text, format_size, parse_size, split_host_port

_MAX_TIER: Final = 1 << 50
_MAX_CHUNKS: Final = 1 << 22
_WEEK: Final = 7 * 86400.0
"""Of seconds, as much as every kind of waiting takes."""


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


def elsewhere(value: str) -> str:
    scheme, separator, rest = value.partition("://")
    if not separator or scheme not in ("tcp", "tls"):
        path = value if value.startswith("/") else "/path/to/socket"
        raise ValueError(
            f"{value!r} is no address of a daemon; write unix://{path} (in `address`), or "
            "tcp://host:port or tls://host:port for one elsewhere"
        )
    if split_host_port(rest)[1] == 0:
        raise ValueError(f"{value!r} has no port; write the one that the daemon listens on")
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
PolicyName = Literal["lru", "s3fifo", "forecast"]
TierName = Annotated[str, Field(pattern=TIER_NAME)]
WriteRule = Literal["all", "reused", "none"]
Pause = Annotated[float, BeforeValidator(_number), Field(ge=0, le=_WEEK)]
OptionalText = Annotated[str | None, BeforeValidator(_none)]
NodeAddress = Annotated[str, AfterValidator(elsewhere)]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False
    )


class _Space(Section):
    """What is cut into chunks."""

    size: Size
    chunk: Size = Field(0, description="bytes given to one size class at a time; 0 picks it")
    policy: PolicyName = Field("forecast", description="what to evict first: forecast, lru, s3fifo")

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


class BelowMemory(Section):
    """How the store works with a tier below memory."""

    queue: Size = Field(256 * 2**20, description="bytes on their way to it at a time", ge=1)
    retry_seconds: Seconds = Field(5.0, description="between attempts while it is broken")
    stall_seconds: Seconds = Field(10.0, description="I/O that takes longer: it is broken")
    write_rate: Size = Field(0, description="bytes a second at most; 0: no limit", le=_MAX_TIER)
    read_rate: Size = Field(0, description="bytes a second at most; 0: no limit", le=_MAX_TIER)


class Stored(BelowMemory):
    """A tier below memory that this daemon writes to."""

    codec: Literal["raw", "e4", "zstd", "lz4", "auto"] = Field(
        "raw", description="how objects are coded there, without loss: docs/codecs.md"
    )


class DiskConfig(Stored, SlabConfig):
    """The disk tier: short for a slab named `disk`, first of the tiers below memory."""


class TierConfig(Stored):
    """A tier below memory."""

    kind: Name = Field(description="slab, or a kind that an installed package offers")
    name: TierName = Field("disk", description="in metrics, quotas and rules; else as its kind")
    probe_seconds: Seconds = Field(0.02, description="a lookup may wait to be told what it has")
    write: WriteRule | None = Field(None, description="as under admission, which is meant if none")
    promote: Literal["memory", "disk"] = Field(
        "memory", description="where what a shared one has goes: memory, or own tiers below it, too"
    )
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


class PeersConfig(BelowMemory):
    """The pool that this daemon joins: what others of it hold is a tier named `peers`."""

    nodes: tuple[NodeAddress, ...] = Field(
        (), description="tcp://host:port or tls://host:port of all daemons; this one may be among"
    )
    dns: Listener = Field(None, description="host:port of a name with an address for each daemon")
    directory: Annotated[Name | None, BeforeValidator(_none)] = Field(
        None, description="redis:// URL of what knows them and what they hold, or a kind of its own"
    )
    address: Annotated[NodeAddress | None, BeforeValidator(_none)] = Field(
        None,
        description="where others reach this one; none: server.name, port of server.tcp",
    )
    token_file: MaybeFolder = Field(
        None, description="file with the token for the others (or set KVSTORE_PEER_TOKEN)"
    )
    tls_ca: MaybeFolder = Field(None, description="certificates to trust, for tls:// addresses")
    tls_cert: MaybeFolder = Field(None, description="own certificate, for mutual TLS")
    tls_key: MaybeFolder = Field(None, description="key of `tls_cert`")
    tls_name: Annotated[Name | None, BeforeValidator(_none)] = Field(
        None, description="that certificates of peers show; none: that of dns, or of the address"
    )
    streams: Count = Field(4, description="connections to one peer that carry blocks", ge=1, le=16)
    probe_seconds: Seconds = Field(0.02, description="a lookup may wait to be told what they have")
    max_serving: Size = Field(
        256 * 2**20,
        description="bytes on their way to peers at a time; more are sent elsewhere",
        ge=1,
    )
    copies: Literal["one", "many"] = Field(
        "one", description="one: what came from a peer is given up first; many: as if saved here"
    )
    transport: Literal["tcp", "nixl"] = Field(
        "tcp", description="nixl: RDMA, as far as NIXL finds it; tcp where that fails"
    )

    @property
    def certified(self) -> str | None:
        """The name that certificates of peers must show, if not that of their address."""
        return self.tls_name or (None if self.dns is None else split_host_port(self.dns)[0])

    @property
    def on(self) -> bool:
        """Whether this daemon is in a pool."""
        return bool(self.nodes or self.dns or self.directory)


class SessionConfig(Section):
    """How long a client waits, and how it comes back."""

    lookup_timeout: Seconds = Field(0.05, description="seconds a lookup may take")
    load_timeout: Seconds = Field(10.0, description="seconds blocks may take to reach memory")
    save_timeout: Seconds = Field(1.0, description="seconds to get slots for a save")
    connect_timeout: Seconds = Field(2.0, description="seconds to connect and agree")
    start_timeout: Seconds = Field(60.0, description="seconds an embedded daemon may start")
    retry_max: Seconds = Field(5.0, description="longest pause between reconnects")
    copy_threads: Count = Field(2, description="threads that copy blocks", ge=1, le=64)
    head_shards: Count = Field(
        0, description="shards in which KV heads are stored; 0: one per rank", ge=0, le=256
    )
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
    congestion: Annotated[Name | None, BeforeValidator(_none)] = Field(
        None, description="control of it over TCP, e.g. cubic, bbr; none: the system's"
    )
    publish_tokens: bool = Field(False, description="send token ids along, for watchers of events")


class ServerConfig(Section):
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
    congestion: Annotated[Name | None, BeforeValidator(_none)] = Field(
        None, description="control of it on server.tcp, and to peers; none: the system's"
    )
    max_requests: Count = Field(64, description="of gRPC and of HTTP at a time", ge=1, le=65536)
    trace_file: MaybeFolder = Field(
        None, description="file for keys and times of requests, never text: docs/planning.md"
    )
    trace_size: Size = Field(
        2**30, description="bytes of trace_file and the one before it", ge=2**20, le=_MAX_TIER
    )


class QuotaConfig(Section):
    """What one tenant may hold, by the name of the tier."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Limit]

    memory: Limit = Field(None, description="bytes in memory; none: no limit")
    disk: Limit = Field(None, description="bytes on disk, and so on by tiers' names")

    @property
    def limits(self) -> dict[str, int | None]:
        """Bytes by the name of the tier."""
        return {"memory": self.memory, "disk": self.disk} | self.__pydantic_extra__


class AdmissionConfig(Section):
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


class PlannerConfig(Section):
    """Load or recompute."""

    mode: Literal["auto", "load", "recompute"] = Field(
        "auto", description="auto compares measured times; load and recompute force it"
    )
