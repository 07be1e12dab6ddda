"""A folder that nodes share: who evicts what, what a crash leaves, and what file systems do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvstore.errors import ConfigError, FormatError, TierUnavailable
from kvstore.server.cli.main import app
from kvstore.tiers.base import Held, Host, InSegment, ObjectName, Tier
from kvstore.tiers.conformance import Bench, Objects, segment_of
from kvstore.tiers.files import open_files
from kvstore.tiers.segments import scrub
from kvstore.tiers.segments.format import path_of, shape_of
from tests.session_tools import eventually

MIB = 1 << 20
SEGMENT = shape_of(segment_of(0, 16 << 10)[0]).total  # type: ignore[arg-type]


def names(number: int) -> list[ObjectName]:
    """A segment of 260 KiB."""
    return segment_of(number, 16 << 10)


@contextmanager
def node(folder: Path, **options: Any) -> Iterator[Bench]:
    def make(host: Host, _: Path) -> Tier:
        how = {"path": str(folder), "node": "one", "retry_seconds": 0.1}
        return open_files("far", host, how | options)

    with Bench(make, folder) as bench:
        yield bench


def probe(bench: Bench, *numbers: int) -> list[str]:
    """Whether segments are `there`, `absent`, or that is `unknown`, by their first blocks."""
    asked = [names(number)[0] for number in numbers]
    answers: list[Sequence[Held | None]] = []
    bench.tier.probe(asked, answers.append)
    bench.run_until(lambda: bool(answers), "a probe is answered")
    found = answers[0] or [Held(name, 0, None, 0, 0) for name in asked]
    return ["absent" if h is None else "there" if h.nbytes else "unknown" for h in found]


def healed(bench: Bench) -> None:
    eventually(lambda: bench.tier.state.readable and bench.tier.state.writable)


def settle(bench: Bench) -> None:
    """Run what waits for the loop, and for the tier."""
    for _ in range(3):
        assert bench.tier.flush(20)
        ends = iter(range(4))
        bench.run_until(lambda ends=ends: next(ends) == 3, "the loop runs")  # type: ignore[misc]


def own(folder: Path, node: str = "one") -> list[Path]:
    return sorted((folder / "nodes" / node).iterdir())


@pytest.fixture
def mounts(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts small file systems."""
    mounted: list[Path] = []

    def mount(options: str, name: str = "mounted") -> Path:
        target = tmp_path / name
        target.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(target)]
        if "remount" in options:
            command = ["mount", "-o", options, str(target)]
        run = subprocess.run(command, check=False, capture_output=True, text=True)
        if run.returncode:
            pytest.skip(f"cannot mount a small file system here: {run.stderr.strip()}")
        if "remount" not in options:
            mounted.append(target)
        return target

    yield mount
    for target in mounted:
        subprocess.run(["umount", "-l", str(target)], check=False, capture_output=True)


def test_each_node_evicts_only_what_it_wrote(tmp_path: Path) -> None:
    with (
        node(tmp_path, size=20 * MIB, node="large") as large,
        node(tmp_path, size=4 * MIB) as small,
    ):
        large.put(*names(1))
        for number in range(2, 2 + 20):
            small.put(*names(number))
            assert (small.tier.state.used or 0) <= 4 * MIB
        settle(small)
        most = 4 * MIB // SEGMENT
        assert probe(large, 1, *range(2, 22)) == [
            "there", *["absent"] * (20 - most), *["there"] * most
        ]  # fmt: skip
        assert small.given_up[:16] == names(2)
        assert sum(file.stat().st_size for file in own(tmp_path)) == most * SEGMENT
        assert small.tier.state.used == most * SEGMENT


def test_what_is_held_keeps_nothing_else_from_going(tmp_path: Path) -> None:
    """More segments are pinned, and longest unused, than are looked at for one to go."""
    with node(tmp_path, size=8 * MIB) as bench:
        for number in range(20):
            bench.put(*names(number))
            bench.pinned.update(names(number))
        most = 8 * MIB // SEGMENT
        bench.put(*(name for number in range(20, most) for name in names(number)))
        ends = [Objects(bench, names(number)).put() for number in range(most, most + 4)]
        assert [set(end) for end in ends[-3:]] == [{None}] * 3
        assert bench.given_up[:32] == [*names(20), *names(21)]


def test_what_others_have_put_is_not_ones_own(tmp_path: Path) -> None:
    with node(tmp_path, node="other") as other, node(tmp_path, size=4 * MIB) as bench:
        other.put(*names(1))
        bench.put(*names(1))
        settle(bench)
        assert bench.tier.counters["segments_there"] == 1
        assert (bench.tier.state.used, own(tmp_path)) == (0, [])


def test_a_node_knows_what_it_wrote_before(tmp_path: Path) -> None:
    """The oldest goes first after a restart, too, and what is used stays."""
    with node(tmp_path, size=4 * MIB) as bench:
        for number in range(15):
            bench.put(*names(number))
            time.sleep(0.002)
    with node(tmp_path, size=4 * MIB) as bench:
        assert bench.tier.state.used == 15 * SEGMENT
        bench.tier.touch(names(0))
        bench.put(*names(20))
        settle(bench)
        assert probe(bench, 0, 1, 2, 20) == ["there", "absent", "there", "there"]
    with node(tmp_path, size=4 * MIB, node="other") as bench:
        assert bench.tier.state.used == 0


def test_what_a_node_wrote_before_and_is_held_now_stays(tmp_path: Path) -> None:
    """Its blocks are known once they are asked for, maybe not all of them at first."""
    with node(tmp_path, size=4 * MIB) as bench:
        for number in range(15):
            bench.put(*names(number))
            time.sleep(0.002)
    with node(tmp_path, size=4 * MIB) as bench:
        assert probe(bench, 0) == ["there"]
        bench.pinned.update(names(0)[3:4])
        late = names(1)[-1]
        assert isinstance(late, InSegment)
        bench.tier.touch(
            [InSegment(late.namespace, late.key, late.part, (b"",) * 15 + (late.key,))]
        )
        for number in range(20, 35):
            bench.put(*names(number))
        settle(bench)
        assert probe(bench, 0, 1) == ["there", "absent"]
        assert all(name.key for name in bench.given_up)
        assert late in bench.given_up


def test_a_lowered_size_is_kept_with_the_next_put(tmp_path: Path) -> None:
    with node(tmp_path) as bench:
        for number in range(30):
            bench.put(*names(number))
    with node(tmp_path, size=4 * MIB) as bench:
        bench.put(*names(30))
        settle(bench)
        assert len(own(tmp_path)) == 4 * MIB // SEGMENT


def test_what_a_crash_leaves_is_collected(tmp_path: Path) -> None:
    """Files that never got the name that all know go; those that have it are its writer's."""
    with node(tmp_path) as bench:
        bench.put(*names(1))
    (file,) = own(tmp_path)
    file.rename(file.with_name(file.name + "~0badcafe"))
    file.with_name(file.name.replace("-", "0-", 1) + "~12345678").write_bytes(b"half")
    with node(tmp_path, size=4 * MIB) as bench:
        assert own(tmp_path) == [file]
        assert bench.tier.state.used == SEGMENT
        assert bench.tier.counters["leftovers_removed"] == 1
        assert probe(bench, 1) == ["there"]


def test_killed_in_the_middle_of_puts_a_node_leaves_no_torn_segment(tmp_path: Path) -> None:
    program = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from pathlib import Path
from tests.integration.test_files_tier import Objects, names, node
with node(Path({str(tmp_path)!r})) as bench:
    print("go", flush=True)
    for number in range(100):
        Objects(bench, names(number)).put()
"""
    for wait in (0.02, 0.06):
        with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            child.stdout.readline()
            time.sleep(wait)
            child.kill()
    with node(tmp_path) as bench:
        there = [n for n in range(100) if probe(bench, n) == ["there"]]
        for number in there:
            objects = Objects(bench, names(number))
            assert objects.put() == [None] * 16
            assert objects.get() == [None] * 16
        files = [file for file in (tmp_path / "v1").rglob("*") if file.is_file()]
        assert len(files) == len(there) == len(own(tmp_path))


def test_deletes_take_the_bytes_along_whoever_wrote_them(tmp_path: Path) -> None:
    with node(tmp_path) as one, node(tmp_path, node="other") as other:
        one.put(*names(1))
        assert probe(other, 1) == ["there"]
        other.tier.delete(names(1)[:1])
        assert other.tier.flush(20)
        assert probe(one, 1) == ["absent"]
        assert [file.stat().st_size for file in own(tmp_path)] == [0]
        one.put(*names(1))
        assert probe(other, 1) == ["there"]
        assert [file.stat().st_size for file in own(tmp_path)] == [SEGMENT]


def test_a_full_file_system_is_recycled_by_what_is_ones_own(mounts: Callable[..., Path]) -> None:
    folder = mounts("size=3m")
    with node(folder, node="other") as other, node(folder) as bench:
        other.put(*names(100))
        results = []
        for number in range(20):
            results.append(Objects(bench, names(number)).put()[0])
            settle(bench)
            healed(bench)
        assert set(results) == {None, "full"}
        assert results[-4:].count(None) >= 2, "it goes on"
        assert probe(other, 100) == ["there"]
        assert bench.tier.state.readable


def test_a_file_system_that_becomes_read_only_is_read(mounts: Callable[..., Path]) -> None:
    folder = mounts("size=8m")
    with node(folder) as bench:
        objects = bench.put(*names(1))
        mounts("remount,ro")
        assert Objects(bench, names(2)).put() == ["read_only"] * 16
        assert "read_only" in (bench.tier.state.problem or "")
        assert not bench.tier.state.writable
        assert objects.get() == [None] * 16
    with node(folder) as bench:
        assert probe(bench, 1) == ["there"], "it opens so, too"
        mounts("remount,rw")
        healed(bench)
        bench.put(*names(2))
        assert bench.tier.state.problem is None


def test_a_folder_that_is_not_mounted_denies_nothing(mounts: Callable[..., Path]) -> None:
    """Nothing is written to the folder below the mount, and what is there is found again."""
    folder = mounts("size=8m")
    with node(folder) as bench:
        objects = bench.put(*names(1))
        kept = folder.with_name("kept")
        kept.mkdir()
        subprocess.run(["mount", "--bind", str(folder), str(kept)], check=True)
        subprocess.run(["umount", "-l", str(folder)], check=True)
        eventually(lambda: not bench.tier.state.readable)
        assert probe(bench, 1) == ["unknown"]
        assert objects.get() == ["io_error"] * 16
        assert Objects(bench, names(2)).put() == ["io_error"] * 16
        assert "mount" in (bench.tier.state.problem or "")
        assert not list(folder.iterdir())
        subprocess.run(["mount", "--bind", str(kept), str(folder)], check=True)
        subprocess.run(["umount", str(kept)], check=True)
        healed(bench)
        assert objects.get() == [None] * 16
        bench.put(*names(2))
        assert bench.tier.state.problem is None


def test_a_folder_that_is_removed_is_no_answer(tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    with node(folder) as bench:
        bench.put(*names(1))
        subprocess.run(["rm", "-rf", str(folder)], check=True)
        assert probe(bench, 1) == ["unknown"]
        eventually(lambda: "gone" in (bench.tier.state.problem or ""))
        assert Objects(bench, names(2)).put() == ["io_error"] * 16
        assert not folder.exists()


def test_folders_and_options_that_will_not_do_are_named(tmp_path: Path) -> None:
    with pytest.raises(TierUnavailable, match="No such file"), node(tmp_path / "none"):
        pass
    (tmp_path / "others").write_text("mine")
    with (
        pytest.raises(FormatError, match="is no folder of a files tier"),
        node(tmp_path),
    ):
        pass
    for options, text in (
        ({"size": "1MiB"}, r"options.size: .*4 MiB"),
        ({"node": "a/b"}, "options.node: must match"),
        ({"pth": "/x"}, "options.pth: unknown key; did you mean options.path?"),
    ):
        with pytest.raises(ConfigError, match=text), node(tmp_path, **options):
            pass


def test_fsck_finds_and_removes_what_is_damaged(tmp_path: Path) -> None:
    with node(tmp_path) as bench:
        bench.put(*(name for number in range(8) for name in names(number)))
        bench.put(*names(9), expires=1000)
    files = [tmp_path / path_of(names(number)[0]) for number in range(8)]  # type: ignore[arg-type]
    for file, at, byte in ((files[0], 50, b"?"), (files[1], SEGMENT - 1, b"?")):
        with file.open("r+b") as opened:
            opened.seek(at)
            opened.write(byte)
    os.truncate(files[2], SEGMENT // 2)
    files[3].write_bytes(files[4].read_bytes())
    left = own(tmp_path)[0].with_name("left~0")
    left.write_bytes(b"half")
    os.utime(left, (1, 1))
    left.with_name("new~0").write_bytes(b"half")

    def fsck(*arguments: str) -> tuple[int, dict[str, Any]]:
        run = CliRunner().invoke(app, ["fsck", str(tmp_path), *arguments])
        return run.exit_code, json.loads(run.stdout)

    code, report = fsck()
    assert code == 2
    wrong = {"header": 1, "data_checksum": 2, "name": 1, "leftover": 1}
    assert (report["damaged"], report["repaired"]) == (wrong, 0)
    assert report["objects"] == 4 * 16 + 15 + 7
    code, report = fsck("--repair")
    assert (code, report["damaged"], report["repaired"]) == (0, wrong, 5)
    code, report = fsck()
    assert (code, report["damaged"], report["objects"]) == (0, {}, 4 * 16)
    with node(tmp_path) as bench:
        bench.put(*names(20), *names(21))

        def others(done: int, _: int) -> None:
            """A node in use deletes what was listed, and is to be verified yet."""
            if done < 2 * SEGMENT:
                bench.tier.delete([names(number)[0] for number in (4, 5, 6, 7, 20, 21)])
                settle(bench)

        report = scrub.fsck(tmp_path, progress=others)
        assert (report.clean, report.objects) == (True, 16)
        bench.put(*names(4))
        assert probe(bench, 0, 1, 2, 3, 4, 9) == [*["absent"] * 4, "there", "absent"]
        bench.put(*names(0))
