"""Names of weights: digests of every byte of the files that an engine loads.

SHA-256 over pieces of the files, on all cores, and over the pieces' digests; paid once for each
file and machine: the digests are kept in the user's cache folder, by path, inode, size and times of
the file. A folder's own path is no part of its digest.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import stat
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, NamedTuple

from kvstore.errors import SpecError
from kvstore.files import cache_folder, file_system
from kvstore.values import format_size

_log = logging.getLogger("kvstore.weights")

_WEIGHTS: Final = frozenset({".safetensors", ".bin", ".pt", ".pth", ".gguf"})
# Folders that engines do not look into: left over from training, originals of converted ones.
_NOT_ENTERED: Final = re.compile(r"\..*|checkpoint-.*|global_step.*|original")
# Files that they pass over; and JSON that says nothing of weights, since the configuration counts
# as the engine understands it, and the rest shows in tokens.
_NOT_READ: Final = re.compile(
    r"(.*/)?(\.[^/]*|(optimizer|training_args)\.bin|(optimizer|scaler|scheduler)\.pt|rng_state.*\.pth"
    r"|(trainer|training)_\w+\.json)"
    r"|(config|params|generation_config|[^/]*(token|vocab|merges|tekken|template|process)[^/]*)\.json"
)
_DEPTH: Final = 4
_PIECE: Final = 64 << 20
_READ: Final = 4 << 20
_SLOWEST: Final = 100e6
"""Bytes a second that another process is trusted to hash."""
_SETTLED: Final = 2.0
"""Seconds after which a change cannot hide behind the same times of a file."""
_UNTIMED: Final = frozenset({"ramfs", "tmpfs"})
"""File systems on which files written through mapped memory keep their times."""
_MOST_KEPT: Final = 4096
_HEX: Final = re.compile(r"[0-9a-f]{64}")

_known: dict[str, str] = {}
"""Digests of files that this process has seen."""


class _File(NamedTuple):
    path: Path
    size: int
    changed: float
    """When it, or what is known of it, last changed, in seconds since 1970."""
    key: str
    timed: bool
    """Whether another file in its place would have other times: an image that was built to be the
    same wherever it is built gives its files round ones."""

    @classmethod
    def of(cls, path: Path) -> _File:
        s = path.stat()
        place = hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:32]
        numbers = (s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns)
        key = ":".join(map(str, [*numbers, place]))
        timed = bool(s.st_ctime_ns % 10**9)
        return cls(path, s.st_size, max(s.st_mtime_ns, s.st_ctime_ns) / 1e9, key, timed)


def weights_digest(path: Path, *, loaded_at: float | None = None) -> str:
    """64 hex digits that name the weights at `path`, a file or a folder.

    `loaded_at`, in seconds since 1970, is the earliest time at which an engine may have read them.
    Takes half a second for each GB and core the first time, then some 50 µs a file. Thread-safe.

    Raises:
        SpecError: no weights are there, or some changed after `loaded_at` or while they were read.
        OSError: a file cannot be read.
    """
    folder = path if path.is_dir() else path.parent
    found = sorted(_File.of(file) for file in (_in(path) if folder is path else [path]))
    if not any(file.path.suffix in _WEIGHTS for file in found):
        raise SpecError(f"there are no files of weights in {path}")
    for file in found:
        # What an engine downloads it writes once, where the Hugging Face library keeps it.
        downloaded = file.path.is_symlink() and file.path.resolve().parent.name == "blobs"
        if loaded_at is not None and file.changed > loaded_at and not downloaded:
            raise SpecError(f"{file.path} was changed after the engine had started")
    if loaded_at is not None and (moved := _moved(path, loaded_at)):
        raise SpecError(f"{moved} was changed after the engine had started")
    digests = _digests(found)
    h = hashlib.sha256(b"kvstore/weights/1")
    for file in found:
        name = file.path.relative_to(folder).as_posix() if len(found) > 1 else file.path.suffix
        h.update(json.dumps([name, file.size, digests[file.key]]).encode())
    return h.hexdigest()


def _moved(path: Path, since: float) -> Path | None:
    """What of a path now leads elsewhere than before: a link, or a folder that was renamed."""
    for place in (path.absolute(), path.resolve()):
        for part in (place, *place.parents):
            s = part.lstat()
            # What is put into a folder changes both of its times; renaming it, only one.
            moved = stat.S_ISLNK(s.st_mode) or s.st_ctime_ns != s.st_mtime_ns
            if moved and s.st_ctime_ns / 1e9 > since:
                return part
    return None


def code_digest(folders: Iterable[Path], pattern: str = "**/*.py") -> str:
    """64 hex digits that name the Python files in `folders`.

    Raises:
        OSError: a file cannot be read.
    """
    h = hashlib.sha256()
    files = ((file.relative_to(f), file) for f in folders for file in f.glob(pattern))
    for name, text in sorted({(name.as_posix(), file.read_bytes()) for name, file in files}):
        h.update(json.dumps([name, hashlib.sha256(text).hexdigest()]).encode())
    return h.hexdigest()


def _in(folder: Path) -> Iterator[Path]:
    """The files that count in a folder and, where engines look, below it."""
    for here, folders, names in os.walk(folder, followlinks=True):
        inside = Path(here).relative_to(folder)
        deep = len(inside.parts) >= _DEPTH
        folders[:] = [name for name in folders if not (deep or _NOT_ENTERED.fullmatch(name))]
        for name in names:
            counts = Path(name).suffix in _WEIGHTS or name.endswith(".json")
            if counts and not _NOT_READ.fullmatch((inside / name).as_posix()):
                yield Path(here, name)


def _digests(files: list[_File]) -> dict[str, str]:
    """Digests by key."""
    digests = {f.key: known for f in files if f.timed and (known := _known.get(f.key))}
    missing = [file for file in files if file.key not in digests]
    folder = cache_folder("weights") if missing else None
    kept = _kept(folder)
    if any(file.key not in kept for file in missing):
        with _turn(folder, sum(file.size for file in missing) / _SLOWEST):
            kept = _kept(folder)  # Somebody else may have hashed them meanwhile.
            fresh = [file for file in missing if file.key not in kept]
            now = time.time()
            digests |= _hashed(fresh)
            timed = (f for f in fresh if f.timed and f.changed < now - _SETTLED)
            kept |= {f.key: digests[f.key] for f in timed if _shows_writes(f.path)}
            _keep(folder, kept)
    found = {file.key: kept[file.key] for file in missing if file.key in kept}
    if len(_known) > _MOST_KEPT:
        _known.clear()
    _known.update(found)
    return digests | found


def _hashed(files: list[_File]) -> dict[str, str]:
    """The same, made now, by as many threads as there are cores."""
    started, nbytes = time.perf_counter(), sum(file.size for file in files)
    pieces = [(file, start) for file in files for start in range(0, file.size or 1, _PIECE)]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(_settled, files))
        hashes = {file.key: hashlib.sha256(b"kvstore/file/1") for file in files}
        for (file, _), digest in zip(pieces, pool.map(_piece, pieces), strict=True):
            hashes[file.key].update(digest)
    if (seconds := time.perf_counter() - started) > 1.0:
        words = "hashed %s of weights in %.1f s (%.2f GB/s); this machine need not do so again"
        _log.info(words, format_size(nbytes), seconds, nbytes / seconds / 1e9)
    for file in files:
        if _File.of(file.path).key != file.key:
            raise SpecError(f"{file.path} changed while it was read")
    return {key: h.hexdigest() for key, h in hashes.items()}


def _settled(file: _File) -> None:
    """Have the kernel write out what was written through mapped memory, if anything.

    The next such write then shows in the file's times; while a page is to be written, none does.
    """
    with suppress(OSError), file.path.open("rb") as opened:  # of places that nobody writes to
        os.fsync(opened.fileno())


def _shows_writes(path: Path) -> bool:
    with path.open("rb") as opened:
        return file_system(opened.fileno()) not in _UNTIMED


def _piece(piece: tuple[_File, int]) -> bytes:
    file, start = piece
    end = min(start + _PIECE, file.size)
    h, memory = hashlib.sha256(), memoryview(bytearray(min(_READ, end - start)))
    with file.path.open("rb", buffering=0) as opened:
        while count := os.preadv(opened.fileno(), [memory[: end - start]], start):
            h.update(memory[:count])
            start += count
    return h.digest()


# -- what this machine knows already --------------------------------------------------------------


@contextmanager
def _turn(folder: Path | None, patience: float) -> Iterator[None]:
    """Hold the lock by which processes hash one after another, if it comes within `patience` s."""
    lock = None
    if folder is not None:
        with suppress(OSError):
            lock = (folder / "lock").open("w")
    try:
        deadline = time.monotonic() + patience
        while lock is not None and time.monotonic() < deadline:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.02)
            except OSError:  # There are no locks where the cache lies.
                break
        yield
    finally:
        if lock is not None:
            lock.close()


def _kept(folder: Path | None) -> dict[str, str]:
    """The digests in the cache; none if it is damaged."""
    try:
        kept = {} if folder is None else json.loads((folder / "digests.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    whole = isinstance(kept, dict) and all(_HEX.fullmatch(str(value)) for value in kept.values())
    return kept if whole else {}


def _keep(folder: Path | None, digests: dict[str, str]) -> None:
    """Replace the cache; one that cannot be written costs time, nothing more."""
    if folder is not None:
        with suppress(OSError):
            made = folder / f"{os.getpid()}-{time.monotonic_ns()}"
            made.write_text(json.dumps(dict(list(digests.items())[-_MOST_KEPT:])))
            made.replace(folder / "digests.json")
