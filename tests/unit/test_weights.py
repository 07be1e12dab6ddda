"""Names of weights: every byte counts, no path does, and a file is read once."""

from __future__ import annotations

import errno
import fcntl
import itertools
import logging
import mmap
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvstore.blocks import weights
from kvstore.blocks.weights import code_digest, weights_digest
from kvstore.errors import SpecError

MIB = 1 << 20


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own, in which files are never too young to be kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(weights, "_SETTLED", -60.0)
    weights._known.clear()
    return tmp_path / "cache" / "kvstore" / "weights"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for number in (1, 2):
        (folder / f"model-0000{number}-of-00002.safetensors").write_bytes(b"%d" % number * 1000)
    (folder / "model.safetensors.index.json").write_text("{}")
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on, no file may be read again."""

    def read(piece: object) -> bytes:
        raise AssertionError(f"{piece} is read again")

    def forbid() -> None:
        weights._known.clear()
        monkeypatch.setattr(weights, "_piece", read)

    return forbid


def test_every_byte_counts(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    size = 130 * MIB + 17
    with file.open("wb") as opened:
        opened.truncate(size)
    found = {weights_digest(file)}
    places = [0, 4096, 64 * MIB - 1, 64 * MIB, size - 1, *random.Random(0).sample(range(size), 3)]
    for number, place in enumerate(places, start=2):
        with file.open("r+b") as opened:
            opened.seek(place)
            opened.write(b"\1")
        found.add(weights_digest(file))
        assert len(found) == number, place
    with file.open("ab") as opened:
        opened.write(b"\0")
    assert weights_digest(file) not in found


def test_a_path_does_not_count(model: Path, tmp_path: Path) -> None:
    first = weights_digest(model)
    assert weights_digest(model.rename(tmp_path / "renamed")) == first
    assert weights_digest(Path(shutil.copytree(tmp_path / "renamed", tmp_path / "copy"))) == first
    # As the Hugging Face library keeps it.
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, file in enumerate((tmp_path / "copy").iterdir()):
        (snapshot / file.name).symlink_to(file.rename(blobs / str(number)))
    assert weights_digest(snapshot) == first


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("model-00003-of-00002.safetensors", True),
        ("pytorch_model.bin", True),
        ("consolidated.00.pth", True),
        ("vision.pt", True),
        ("model.gguf", True),
        ("whisper/model.safetensors", True),
        ("whisper/config.json", True),
        ("quantize_config.json", True),
        ("adapter_config.json", True),
        ("config.json", False),
        ("README.md", False),
        ("tokenizer.json", False),
        ("special_tokens_map.json", False),
        ("preprocessor_config.json", False),
        ("generation_config.json", False),
        ("optimizer.pt", False),
        ("below/optimizer.pt", False),
        ("chat_template.json", False),
        ("training_args.bin", False),
        ("training_args.safetensors", True),
        ("optimizer.safetensors", True),
        ("checkpoint-2.safetensors", True),
        ("checkpoint-100/model.safetensors", False),
        ("original/consolidated.00.pth", False),
        (".cache/model.safetensors", False),
    ],
)
def test_files_count_that_engines_load(model: Path, name: str, counts: bool) -> None:
    first = weights_digest(model)
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).write_text("something")
    assert (weights_digest(model) != first) is counts


def test_names_of_files_count(model: Path) -> None:
    first = weights_digest(model)
    one, two = sorted(model.glob("*.safetensors"))
    one.rename(model / "other")
    two.rename(one)
    (model / "other").rename(two)
    assert weights_digest(model) != first


def test_a_file_alone_has_no_name_but_its_bytes(tmp_path: Path) -> None:
    file = tmp_path / "q8.gguf"
    file.write_text("bytes")
    first = weights_digest(file)
    file = file.rename(tmp_path / "renamed.gguf")
    assert weights_digest(file) == first
    file.write_text("other")
    assert weights_digest(file) != first


def test_a_folder_without_weights_has_no_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(SpecError, match="no files of weights"):
        weights_digest(tmp_path)


def test_weights_that_changed_after_they_were_loaded_have_no_name(model: Path) -> None:
    changed = max(file.stat().st_ctime for file in model.glob("*.safetensors"))
    weights_digest(model, loaded_at=changed + 1)
    with pytest.raises(SpecError, match=r"safetensors was changed after the engine had started"):
        weights_digest(model, loaded_at=changed - 1)


@pytest.mark.parametrize("kind", ["a folder", "a folder around it", "a link"])
def test_a_path_that_leads_elsewhere_since_weights_were_loaded_has_no_name(
    model: Path, tmp_path: Path, kind: str
) -> None:
    around, link = tmp_path / "around", tmp_path / "link"
    around.mkdir()
    link.symlink_to(model)
    loaded_at = time.time() + 0.1
    asked = {"a folder": model, "a folder around it": around / "model", "a link": link}[kind]
    shutil.copytree(model, around / "model")
    shutil.copytree(model, tmp_path / "other")
    for file in (*(around / "model").iterdir(), *(tmp_path / "other").iterdir()):
        os.utime(file, ns=(1, 1))
    while time.time() < loaded_at:  # all so far was before
        time.sleep(0.01)
    weights_digest(asked, loaded_at=loaded_at)
    (tmp_path / "new").symlink_to(tmp_path / "other")
    if kind == "a link":
        (tmp_path / "new").replace(link)
    else:
        old = model if kind == "a folder" else around
        new = tmp_path / "other" if kind == "a folder" else tmp_path / "another"
        if kind == "a folder around it":
            shutil.copytree(around, tmp_path / "another")
        old.rename(tmp_path / "old")
        new.rename(old)
    with pytest.raises(SpecError, match="was changed after the engine had started"):
        weights_digest(asked, loaded_at=loaded_at)


def test_bytes_written_through_mapped_memory_count(model: Path) -> None:
    file = min(model.glob("*.safetensors"))
    with file.open("r+b") as opened, mmap.mmap(opened.fileno(), 0) as memory:
        memory[0] ^= 1  # From here on the page is to be written, and no write shows in times.
        first = weights_digest(model)
        memory[1] ^= 1
        weights._known.clear()
        assert weights_digest(model) != first


def test_files_of_an_image_that_gives_all_the_same_times_are_not_remembered(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.stat

    def stat(path: Path, **how: bool) -> Any:
        found = real(path, **how)
        if path.suffix != ".safetensors":
            return found
        fields = ("st_mode", "st_dev", "st_ino", "st_size")
        same = {name: getattr(found, name) for name in fields}
        return SimpleNamespace(**same, st_mtime_ns=10**18, st_ctime_ns=10**18)

    monkeypatch.setattr(Path, "stat", stat)
    first = weights_digest(model)
    for _ in range(2):
        assert weights_digest(model) == first
    file = min(model.glob("*.safetensors"))
    with file.open("r+b") as opened:
        opened.write(b"x")
    assert weights_digest(model) != first


def test_a_cache_where_there_are_no_locks_is_used_without(
    model: Path, unread: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    first = weights_digest(model)
    unread()
    assert weights_digest(model) == first


def test_a_file_is_read_once_for_a_machine(
    model: Path, cache: Path, unread: Callable[[], None]
) -> None:
    first = weights_digest(model)
    assert cache.stat().st_mode & 0o777 == 0o700
    unread()
    assert weights_digest(model) == first
    weights._known.clear()
    file = next(model.glob("*.safetensors"))
    times = file.stat()
    with file.open("r+b") as opened:
        opened.write(b"x")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # Only ctime tells now.
    with pytest.raises(AssertionError, match="read again"):
        weights_digest(model)


def test_what_changed_just_now_is_not_kept(
    model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "_SETTLED", 60.0)
    weights_digest(model)
    assert (cache / "digests.json").read_text() == "{}"
    assert not weights._known


def _damage(cache: Path) -> None:
    (cache / "digests.json").write_bytes((cache / "digests.json").read_bytes()[:-5])


def _other_values(cache: Path) -> None:
    kept = (cache / "digests.json").read_text()
    (cache / "digests.json").write_text(kept[:-3] + 'g"}')


def _nested(cache: Path) -> None:
    (cache / "digests.json").write_text("[" * 100_000)


def _for_all(cache: Path) -> None:
    cache.chmod(0o777)


def _no_folder(cache: Path) -> None:
    shutil.rmtree(cache)
    cache.write_text("a file")


def _of_another(cache: Path) -> None:
    if os.geteuid():
        pytest.skip("only root can give files away")
    os.chown(cache, 4242, -1)


@pytest.mark.parametrize(
    "spoil",
    [_damage, _other_values, _nested, _for_all, _no_folder, _of_another],
)
def test_a_cache_that_is_not_to_be_trusted_costs_time_only(
    model: Path, cache: Path, unread: Callable[[], None], spoil: Callable[[Path], None]
) -> None:
    first = weights_digest(model)
    spoil(cache)
    weights._known.clear()
    assert weights_digest(model) == first
    if cache.is_dir():
        shutil.rmtree(cache)
    else:
        cache.unlink()
    weights._known.clear()
    weights_digest(model)
    spoil(cache)
    unread()
    with pytest.raises(AssertionError, match="read again"):
        weights_digest(model)


def test_hashing_goes_on_beside_one_that_hangs(model: Path, cache: Path) -> None:
    cache.mkdir(parents=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert len(weights_digest(model)) == 64


def test_what_took_long_is_told(
    model: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count(0.0, 4.0)
    monkeypatch.setattr(weights.time, "perf_counter", lambda: next(clock))
    with caplog.at_level(logging.INFO, logger="kvstore.weights"):
        weights_digest(model)
    assert "hashed 1.955 KiB of weights in 4.0 s (0.00 GB/s)" in caplog.text


def test_code_is_named_by_its_text(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "modeling.py").write_text("pass")
    first = code_digest([tmp_path / "one"])
    assert code_digest([tmp_path / "one", tmp_path / "one"]) == first
    assert code_digest([]) != first
    (tmp_path / "one" / "modeling.py").write_text("...")
    assert code_digest([tmp_path / "one"]) != first
