"""One typed configuration: all that can be set, its defaults, and what is no value."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, Field, field_validator, model_validator

from kvstore.errors import ConfigError
from kvstore.sections import (
    AdmissionConfig,
    BelowMemory,
    Count,
    DiskConfig,
    Folder,
    MemoryConfig,
    OptionalText,
    Pause,
    PeersConfig,
    PlannerConfig,
    QuotaConfig,
    Seconds,
    Section,
    ServerConfig,
    SessionConfig,
    Stored,
    Tenant,
    TierConfig,
    elsewhere,
)
from kvstore.values import checked_text, split_host_port

PEERS: Final = "peers"
"""The kind and name of the tier that others are."""
MAX_BELOW: Final = 6
"""Tiers below memory."""


def default_run_dir() -> Path:
    """`$XDG_RUNTIME_DIR/kvstore`, or a folder of this user under /tmp."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime) / "kvstore" if runtime else Path(f"/tmp/kvstore-{os.getuid()}")


class Config(Section):
    """Everything that can be set. See `load_config`."""

    address: OptionalText = Field(
        None,
        description="unix:///path, tcp://host:port or tls://host:port of a daemon; none: a private "
        "one is started on demand",
    )
    run_dir: Folder = Field(default_factory=default_run_dir, description="of sockets and locks")
    lease_seconds: Seconds = Field(30.0, description="life of a lease that is not renewed")
    linger_seconds: Pause = Field(
        1.0, description="how long an embedded daemon outlives its last session"
    )
    max_sessions: Count = Field(256, description="open connections", ge=1, le=65536)
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    memory: MemoryConfig = Field(default_factory=MemoryConfig)
    disk: DiskConfig = Field(default_factory=DiskConfig)
    tiers: tuple[TierConfig, ...] = Field(
        (), description="below memory and disk, in the order in which they are read from"
    )
    peers: PeersConfig = Field(default_factory=PeersConfig)
    session: SessionConfig = Field(default_factory=SessionConfig)
    planner: PlannerConfig = Field(default_factory=PlannerConfig)
    server: ServerConfig = Field(default_factory=ServerConfig)
    admission: AdmissionConfig = Field(default_factory=AdmissionConfig)
    quotas: dict[Tenant, QuotaConfig] = Field(default_factory=dict, description="by tenant")

    @property
    def reached_at(self) -> str:
        """Where peers reach this daemon."""
        if self.peers.address is not None or self.server.tcp is None:
            return self.peers.address or ""
        scheme = "tcp" if self.server.tls_cert is None else "tls"
        host, port = split_host_port(self.server.tcp)
        if host in ("", "0.0.0.0", "::"):
            host = self.server.name
        return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"

    @property
    def write_rules(self) -> dict[str, str]:
        """What is written to the tiers below memory, by their names."""
        own = {tier.name: tier.write for tier in self.below if tier.write is not None}
        return {**self.admission.below, **own}

    @property
    def below(self) -> tuple[TierConfig, ...]:
        """The tiers below memory, in their order; `disk` is the first."""
        tiers = list(self.tiers)
        if self.peers.on:
            own = {**BelowMemory.model_fields, "probe_seconds": None}
            said = {key: getattr(self.peers, key) for key in own}
            tiers.insert(0, TierConfig(kind=PEERS, name=PEERS, write="none", **said))
        if self.disk.path is not None:
            disk = self.disk.model_dump()
            waits = {key: disk.pop(key) for key in Stored.model_fields}
            tiers.insert(0, TierConfig(kind="slab", name="disk", options=disk, **waits))
        return tuple(tiers)

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
        said = self.admission.below
        if self.peers.on and not self.reached_at:
            text = "others of the pool must reach this daemon: set server.tcp (or peers.address)"
            raise ValueError(f"peers: {text}")
        for number, tier in enumerate(self.tiers):
            if tier.kind == PEERS:
                raise ValueError(f"tiers.{number}.kind: peers have a section of their own, `peers`")
            twice = tier.write is not None and tier.name in self.admission.model_fields_set
            if twice and said[tier.name] != tier.write:
                text = f"and admission.{tier.name} {said[tier.name]!r}; say it in one place"
                raise ValueError(f"tiers.{number}.write is {tier.write!r} {text}")
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
        return elsewhere(value)

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


def known_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Names of all settings, as they are written in one line: `memory.size`."""
    for name, field in model.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            yield from known_keys(section, f"{prefix}{name}.")
        else:
            yield prefix + name
