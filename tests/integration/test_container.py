"""A daemon where a control group limits memory: it refuses, shrinks, and goes before the engine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from kvstore.values import format_size
from tests.integration.test_embedded import daemon_pid
from tests.session_tools import (
    MIB,
    ROOT,
    Child,
    Stores,
    eventually,
)

LIMIT = 320 * MIB


@pytest.fixture
def container() -> Iterator[Path]:
    """A control group of `LIMIT` bytes."""
    group = limited()
    if group is None:
        pytest.skip("making a control group needs root, and one that may have children")
    yield group
    for pid in (group / "cgroup.procs").read_text().split():
        os.kill(int(pid), signal.SIGKILL)
    eventually(lambda: not (group / "cgroup.procs").read_text())
    group.rmdir()


def limited() -> Path | None:
    """Make it below ours, in whichever version of control groups that works."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if controllers == "memory" or (number == "0" and not controllers):
            base = Path("/sys/fs/cgroup", controllers, path.lstrip("/"))
            group, file = base / f"kvstore-test-{os.getpid()}", "memory.limit_in_bytes"
            try:
                group.mkdir()
                (group / (file if controllers else "memory.max")).write_text(str(LIMIT))
            except OSError:
                if group.exists():
                    group.rmdir()
                continue
            return group
    return None


INSIDE = """
import contextlib
from pathlib import Path
Path(sys.argv[1], "cgroup.procs").write_text(str(os.getpid()))
config = Config.model_validate_json(sys.argv[2])
session = Session.open(namespace(), [BIG], config)
keys = session.keys(prompt(1, 8))
save(session, keys)
print(session.stats()["tiers"]["memory"]["capacity"], load(session, keys).blocks, flush=True)
daemon, grown = psutil.Process(int(input())), []
counts = [Path(sys.argv[1], name) for name in ("memory.oom_control", "memory.events")]
counts = next(path for path in counts if path.exists())
kills = lambda: [line for line in counts.read_text().splitlines() if "oom_kill " in line]
before = kills()
while kills() == before and len(grown) < 512:
    grown.append(b"x" * (1 << 20))  # What the engine needs grows.
    time.sleep(0.003)
assert len(grown) < 512
grown.clear()  # At once: the next daemon, which is started soon, shall find room.
with contextlib.suppress(psutil.NoSuchProcess):
    while daemon.status() != psutil.STATUS_ZOMBIE:  # One that is killed takes a while to end.
        time.sleep(0.01)
print(load(session, keys).reason, flush=True)
os._exit(0)
"""


def test_serve_refuses_what_cannot_fit(stores: Stores, container: Path) -> None:
    command = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(container / "cgroup.procs")]
    command += [sys.executable, "-m", "kvstore.server.cli", "serve", "--memory", "1GiB"]
    command += ["--socket", f"{stores.folder}/s", "--grpc", "none", "--http", "none"]
    ended = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 1
    assert "memory.size is 1 GiB" in ended.stderr
    assert f"of the {format_size(LIMIT)} of {container}" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_private_daemon_shrinks_and_goes_before_the_engine(
    stores: Stores, container: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = stores.embedded(memory={"size": "1GiB"})
    for _ in range(3):
        with Child(INSIDE, container, config.model_dump_json()) as engine:
            capacity, loaded = map(int, engine.says(60).split())
            assert loaded == 8
            assert 16 * MIB < capacity < LIMIT // 2
            daemon = psutil.Process(daemon_pid(config))
            assert Path(f"/proc/{daemon.pid}/oom_score_adj").read_text().strip() == "1000"
            engine.tell(str(daemon.pid))
            said = engine.says(60)
            code = engine.wait()
            eventually(lambda daemon=daemon: _gone(daemon))
        # On a busy machine the kernel may take a second one before the first has let go of its own.
        if code != -signal.SIGKILL:
            break
        for pid in stores.embedded_pids():
            os.kill(pid, signal.SIGKILL)
        eventually(lambda: not stores.embedded_pids())
    assert code == 0
    assert said not in ("", "None"), "a load tells why nothing came"
    assert "memory.size: little was free" in capfd.readouterr().err


def _gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
