"""One typed configuration: a YAML file, then KVSTORE_* environment variables, then flags.

Later sources win, value by value. Nested names join with two underscores in the environment:
``KVSTORE_MEMORY__SIZE=8GiB`` sets ``memory.size``.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
import socket
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
    field_validator,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from kvstore.errors import ConfigError

_UNITS: Final = {
    "": 1,
    "B": 1,
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
_NOT_CONFIG: Final = frozenset({"KVSTORE_CONFIG", "KVSTORE_CPU", "KVSTORE_TOKEN"})
"""Variables of ours that are no configuration values; the token is a secret."""

_SIZE: Final = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*\Z")


def parse_size(value: object) -> int:
    """Bytes from `10GiB`, `1.5 GB`, `4096` …

    Raises:
        ValueError: no number, or a unit that is ambiguous or unknown, with the remedy.
    """
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError(f"{value!r} is no size; write it like 10GiB")
    if isinstance(value, int):
        if value < 0:
            raise ValueError(f"{value} is negative; write a size like 10GiB")
        return value
    match = _SIZE.match(value)
    if match is None:
        raise ValueError(f"{value!r} is no size; write it like 10GiB")
    number, unit = match.groups()
    if unit not in _UNITS:
        hint = f"{number}GiB"
        if len(unit) == 2 and unit[1] == "b":
            hint = f"{number}{unit[0].upper()}B or {number}{unit[0].upper()}iB ('b' means bits)"
        raise ValueError(
            f"{value!r} has the unknown unit {unit!r}; use {hint} (units: "
            f"{', '.join(u for u in _UNITS if u)})"
        )
    return int(float(number) * _UNITS[unit]) if "." in number else int(number) * _UNITS[unit]


def format_size(nbytes: float) -> str:
    """`nbytes` for people, in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(nbytes) < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.4g} {unit}"
        nbytes /= 1024
    return f"{nbytes:.4g} TiB"


Size = Annotated[int, BeforeValidator(parse_size)]
# An embedded daemon stands in another folder than the engine that starts it.
Folder = Annotated[Path, AfterValidator(lambda path: path.expanduser().absolute())]
PolicyName = Literal["lru", "s3fifo"]


def _parse_listener(value: object) -> object:
    return None if isinstance(value, str) and value.lower() in ("none", "off", "") else value


def _check_listener(value: str | None) -> str | None:
    if value is not None:
        split_host_port(value)
    return value


def split_host_port(value: str) -> tuple[str, int]:
    """Host and port of `host:port` or `[v6]:port`.

    Raises:
        ValueError: it is neither, with the remedy.
    """
    host, colon, port = value.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"{value!r} is no address; write host:port, e.g. 127.0.0.1:7420")
    return host, int(port)


Listener = Annotated[str | None, BeforeValidator(_parse_listener), AfterValidator(_check_listener)]


def default_run_dir() -> Path:
    """`$XDG_RUNTIME_DIR/kvstore`, or a folder of this user under /tmp."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime) / "kvstore" if runtime else Path(f"/tmp/kvstore-{os.getuid()}")


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False
    )


class MemoryConfig(_Section):
    """The memory tier: one arena shared with every session."""

    size: Size = Field(2**30, description="bytes of the arena; a hard cap", ge=2**20)
    chunk: Size = Field(0, description="bytes given to one size class at a time; 0 picks it")
    policy: PolicyName = Field("lru", description="what to evict first: lru or s3fifo")
    huge_dir: Folder | None = Field(
        None, description="folder on a tmpfs mounted with huge=always or huge=advise"
    )
    prefault: bool = Field(True, description="touch every page at start, not at first use")
    path: Folder | None = Field(
        None,
        description="file on a tmpfs for the arena, for containers that cannot pass descriptors",
    )
    max_pinned: float = Field(0.5, description="part of the arena that pins may hold", ge=0, le=1)


class DiskConfig(_Section):
    """The disk tier: a slab of objects and its table, in a folder of their own."""

    path: Folder | None = Field(None, description="folder for the slab; none: no disk tier")
    size: Size = Field(10 * 2**30, description="bytes on disk, everything included", ge=2**22)
    chunk: Size = Field(0, description="bytes given to one size class at a time; 0 picks it")
    policy: PolicyName = Field("lru", description="what to evict first: lru or s3fifo")
    threads: int = Field(2, description="I/O threads", ge=1, le=64)
    queue: Size = Field(
        256 * 2**20, description="bytes waiting to be written; what comes on top is dropped"
    )
    sync_seconds: float = Field(
        5.0, description="longest time a finished write stays unsynced", gt=0
    )
    retry_seconds: float = Field(
        5.0, description="time between attempts while the disk is full or broken", gt=0
    )


class SessionConfig(_Section):
    """How long a client waits, and how it comes back."""

    lookup_timeout: float = Field(0.05, description="seconds a lookup may take", gt=0)
    load_timeout: float = Field(10.0, description="seconds blocks may take to reach memory", gt=0)
    save_timeout: float = Field(1.0, description="seconds to get slots for a save", gt=0)
    connect_timeout: float = Field(2.0, description="seconds to connect and agree", gt=0)
    start_timeout: float = Field(60.0, description="seconds an embedded daemon may start", gt=0)
    retry_max: float = Field(5.0, description="longest pause between reconnects", gt=0)
    copy_threads: int = Field(2, description="threads that copy blocks", ge=1, le=64)
    gpu_path: Literal["auto", "dma", "kernel", "staged"] = Field(
        "auto", description="how a GPU's pages are copied; auto takes what was measured cheapest"
    )
    gpu_staging: Size = Field(
        64 * 2**20, description="bytes of a GPU that copies may use", ge=0, le=2**33
    )
    checksum: bool = Field(
        False, description="checksum blocks from save to load, also while they stay in memory"
    )

    token_file: Folder | None = Field(
        None, description="file with the token to present (or set KVSTORE_TOKEN)"
    )
    tls_ca: Folder | None = Field(None, description="certificates to trust, for tls:// addresses")
    tls_cert: Folder | None = Field(None, description="own certificate, for mutual TLS")
    tls_key: Folder | None = Field(None, description="key of `tls_cert`")
    streams: int = Field(2, description="TCP connections that carry blocks", ge=1, le=16)
    publish_tokens: bool = Field(
        False, description="send token ids along with saves, for watchers of KV events"
    )


class ServerConfig(_Section):
    """Where `kvstore serve` listens besides its socket, and whom it lets in."""

    name: str = Field(
        default_factory=socket.gethostname, description="name of this node in answers"
    )
    grpc: Listener = Field("127.0.0.1:7420", description="host:port of the gRPC API; none: off")
    http: Listener = Field(
        "127.0.0.1:7421", description="host:port of metrics, health and the page; none: off"
    )
    tcp: Listener = Field(None, description="host:port for sessions from elsewhere; none: off")
    insecure: bool = Field(
        False, description="allow listeners beyond loopback without TLS and tokens"
    )
    tls_cert: Folder | None = Field(None, description="certificate chain of the listeners, PEM")
    tls_key: Folder | None = Field(None, description="key of `tls_cert`, PEM")
    tls_client_ca: Folder | None = Field(
        None, description="clients must show a certificate signed by this one (mutual TLS)"
    )
    tokens: Folder | None = Field(None, description="YAML file of tokens, roles and tenants")
    group: str | None = Field(
        None, description="unix group whose members may open sessions on the socket"
    )
    max_requests: int = Field(
        64, description="requests that the gRPC and the HTTP face each serve at a time", ge=1
    )


class QuotaConfig(_Section):
    """What one tenant may hold."""

    memory: Size | None = Field(None, description="bytes in memory; none: no limit")
    disk: Size | None = Field(None, description="bytes on disk; none: no limit")


class AdmissionConfig(_Section):
    """What is let in; the API changes it at run time."""

    memory: Literal["all", "none"] = Field("all", description="saves: all or none")
    disk: Literal["all", "reused", "none"] = Field(
        "all", description="write-behind: all, reused (blocks used a second time) or none"
    )
    denied_tenants: frozenset[str] = Field(
        frozenset(), description="tenants whose saves are dropped"
    )


class PlannerConfig(_Section):
    """Load or recompute."""

    mode: Literal["auto", "load", "recompute"] = Field(
        "auto", description="auto compares measured times; load and recompute force it"
    )


class Config(BaseSettings):
    """Everything that can be set. See `load_config`."""

    model_config = SettingsConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        env_prefix="KVSTORE_",
        env_nested_delimiter="__",
        validate_default=True,
    )

    address: str | None = Field(
        None,
        description="unix:///path, tcp://host:port or tls://host:port of a daemon; none: a private "
        "one is started on demand",
    )
    run_dir: Folder = Field(
        default_factory=default_run_dir, description="folder for sockets and locks"
    )
    lease_seconds: float = Field(30.0, description="life of a lease that is not renewed", gt=0)
    linger_seconds: float = Field(
        1.0, description="how long an embedded daemon outlives its last session", ge=0
    )
    max_sessions: int = Field(256, description="open connections", ge=1, le=65536)
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    memory: MemoryConfig = Field(default_factory=MemoryConfig)
    disk: DiskConfig = Field(default_factory=DiskConfig)
    session: SessionConfig = Field(default_factory=SessionConfig)
    planner: PlannerConfig = Field(default_factory=PlannerConfig)
    server: ServerConfig = Field(default_factory=ServerConfig)
    admission: AdmissionConfig = Field(default_factory=AdmissionConfig)
    quotas: dict[str, QuotaConfig] = Field(
        default_factory=dict, description="tenant → what it may hold"
    )

    @field_validator("address")
    @classmethod
    def _check_address(cls, value: str | None) -> str | None:
        if value is None or (value.startswith("unix:///") and value != "unix:///"):
            return value
        scheme, separator, rest = value.partition("://")
        if not separator or scheme not in ("tcp", "tls"):
            raise ValueError(
                f"{value!r} is no address of a daemon; write unix:///path/to/socket, or "
                "tcp://host:port or tls://host:port for one elsewhere"
            )
        split_host_port(rest)
        return value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)

    @property
    def socket(self) -> Path:
        """The socket of the daemon to talk to, or to serve on.

        Raises:
            ConfigError: the address is that of a daemon elsewhere.
        """
        if self.address is None:
            return self.run_dir / "kvstore.sock"
        if not self.address.startswith("unix://"):
            raise ConfigError(f"address {self.address} is no socket; give unix:///path/to/socket")
        return Path(self.address.removeprefix("unix://"))

    @property
    def control_socket(self) -> Path:
        """The socket of the orchestration API, beside that of the sessions."""
        return self.socket.with_name(self.socket.name + ".control")

    @property
    def instance(self) -> str:
        """Names the embedded daemon that serves exactly this configuration."""
        text = self.model_dump_json(
            exclude={"session", "planner", "log_level", "address", "server"}
        )
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _known_keys() -> list[str]:
    keys: list[str] = []
    for name, field in Config.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            keys += [f"{name}.{inner}" for inner in section.model_fields]
        keys.append(name)
    return keys


def _explain(error: ValidationError, source: str) -> ConfigError:
    lines = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            near = difflib.get_close_matches(where, _known_keys(), n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(_known_keys())}"
            lines.append(f"{where}: unknown key; {hint}")
        else:
            lines.append(f"{where}: {item['msg'].removeprefix('Value error, ')}")
    return ConfigError(f"{source}: " + "; ".join(lines))


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = (
            _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
        )
    return merged


def _from_file(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as e:
        raise ConfigError(f"config file {path}: {e.strerror}; check the path") from e
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise ConfigError(f"config file {path} is no valid YAML: {e}") from e
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"config file {path} must hold `key: value` lines, not {content!r}")
    return {str(key): value for key, value in content.items()}


def _from_environment() -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, text in os.environ.items():
        if not name.startswith("KVSTORE_") or name in _NOT_CONFIG:
            continue
        *sections, leaf = name.removeprefix("KVSTORE_").lower().split("__")
        place = values
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                break
        if not isinstance(place, dict) or isinstance(place.get(leaf), dict):
            raise ConfigError(
                f"environment KVSTORE_*: {name} contradicts another variable; one sets a whole "
                "section, one a value in it: unset one"
            )
        place[leaf] = text
    return values


def load_config(path: Path | str | None = None, overrides: dict[str, Any] | None = None) -> Config:
    """The configuration from `path` (or `$KVSTORE_CONFIG`), the environment and `overrides`.

    `overrides` is nested like the file, e.g. `{"memory": {"size": "8GiB"}}`.

    Raises:
        ConfigError: names the source, the field and the remedy.
    """
    chosen = path or os.environ.get("KVSTORE_CONFIG")
    merged: dict[str, Any] = {}
    sources: list[tuple[str, dict[str, Any]]] = []
    if chosen:
        sources.append((f"config file {chosen}", _from_file(Path(chosen))))
    sources.append(("environment KVSTORE_*", _from_environment()))
    sources.append(("settings", overrides or {}))
    config = Config()
    for source, values in sources:
        merged = _merge(merged, values)
        try:
            config = Config(**merged)
        except ValidationError as e:
            raise _explain(e, source) from None
    return config
