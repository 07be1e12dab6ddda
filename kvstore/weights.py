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
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, NamedTuple

from kvstore.config import format_size
from kvstore.errors import SpecError

_log = logging.getLogger(__name__)

_WEIGHTS: Final = frozenset({".safetensors", ".bin", ".pt", ".pth", ".gguf"})
_OF_TRAINING: Final = re.compile(r"(optimizer|rng_state.*|scaler|scheduler|training_args)\.\w+")
# JSON files that say nothing of weights: the configuration counts as the engine understands it, and
# what makes tokens and pixels shows in those.
_NOT_OF_WEIGHTS: Final = re.compile(
    r"(config|params|.*token.*|vocab.*|merges.*|tekken.*|generation_config|.*chat_template.*"
    r"|.*processor.*|trainer_state|.*results)\.json"
)
# Engines read neither copies from within a training nor the original of a converted model.
_NOT_READ: Final = re.compile(r"\..*|checkpoint-.*|global_step.*|original")
_DEPTH: Final = 4
_MOST_FILES: Final = 10_000
_PIECE: Final = 64 << 20
_READ: Final = 4 << 20
_SLOWEST: Final = 100e6
"""Bytes a second that another process is trusted to hash."""
_SETTLED: Final = 2.0
"""Seconds after which a change cannot hide behind the same times of a file."""
_MOST_KEPT: Final = 4096
_MAX_CACHE: Final = 1 << 20
_HEX: Final = re.compile(r"[0-9a-f]{64}")

_known: dict[str, str] = {}
"""Digests of files that this process has seen."""


class _File(NamedTuple):
    path: Path
    size: int
    changed: float
    """When it, or what is known of it, last changed, in seconds since 1970."""
    key: str

    @classmethod
    def of(cls, path: Path) -> _File:
        s = path.stat()
        place = hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:32]
        numbers = (s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns)
        key = ":".join(map(str, [*numbers, place]))
        return cls(path, s.st_size, max(s.st_mtime_ns, s.st_ctime_ns) / 1e9, key)


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
    h = hashlib.sha256(b"kvstore/weights/1")
    for file, digest in zip(found, _digests(found), strict=True):
        name = file.path.relative_to(folder).as_posix() if len(found) > 1 else file.path.suffix
        h.update(json.dumps([name, file.size, digest]).encode())
    return h.hexdigest()


def code_digest(folders: Iterable[Path]) -> str:
    """64 hex digits that name the Python files in `folders`.

    Raises:
        OSError: a file cannot be read.
    """
    h = hashlib.sha256()
    files = ((file.relative_to(f), file) for f in folders for file in f.rglob("*.py"))
    for name, text in sorted({(name.as_posix(), file.read_bytes()) for name, file in files}):
        h.update(json.dumps([name, hashlib.sha256(text).hexdigest()]).encode())
    return h.hexdigest()


def _in(folder: Path) -> list[Path]:
    """The files that count in a folder and, where engines look, below it."""
    found: list[Path] = []
    for here, folders, names in os.walk(folder, followlinks=True):
        depth = len(Path(here).relative_to(folder).parts)
        folders[:] = [n for n in folders if depth < _DEPTH and not _NOT_READ.fullmatch(n)]
        for name in names:
            kind = Path(name).suffix
            weights = kind in _WEIGHTS and not _OF_TRAINING.fullmatch(name)
            if weights or (kind == ".json" and not depth and not _NOT_OF_WEIGHTS.fullmatch(name)):
                found.append(Path(here, name))
        if len(found) > _MOST_FILES:
            raise SpecError(f"{folder} holds more than {_MOST_FILES} files: is it one model's?")
    return found


def _digests(files: list[_File]) -> list[str]:
    digests = {file.key: _known.get(file.key, "") for file in files}
    missing = [file for file in files if not digests[file.key]]
    if missing:
        folder = _cache_folder()
        kept = _kept(folder)
        if any(file.key not in kept for file in missing):
            with _turn(folder, sum(file.size for file in missing) / _SLOWEST):
                kept = _kept(folder)  # Somebody else may have hashed them meanwhile.
                fresh = [file for file in missing if file.key not in kept]
                now = time.time()
                made = _hashed(fresh)
                kept |= {f.key: made[f.key] for f in fresh if f.changed < now - _SETTLED}
                _keep(folder, kept)
            digests |= made
        found = {file.key: kept[file.key] for file in missing if file.key in kept}
        if len(_known) > _MOST_KEPT:
            _known.clear()
        _known.update(found)
        digests |= found
    return [digests[file.key] for file in files]


def _hashed(files: list[_File]) -> dict[str, str]:
    """Digests of files by key, made now, by as many threads as there are cores."""
    started, nbytes = time.perf_counter(), sum(file.size for file in files)
    pieces = [(file, start) for file in files for start in range(0, file.size or 1, _PIECE)]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
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


def _piece(piece: tuple[_File, int]) -> bytes:
    file, start = piece
    end = min(start + _PIECE, file.size)
    h, memory = hashlib.sha256(), memoryview(bytearray(min(_READ, end - start)))
    with file.path.open("rb", buffering=0) as opened:
        while start < end:
            count = os.preadv(opened.fileno(), [memory[: end - start]], start)
            if not count:
                break  # It was cut off: its size tells.
            h.update(memory[:count])
            start += count
    return h.digest()


# -- what this machine knows already --------------------------------------------------------------


def _cache_folder() -> Path | None:
    """This user's own folder for digests; None: there is none, and hashing is paid each time."""
    try:
        chosen = Path(os.environ.get("XDG_CACHE_HOME", ""))
        folder = (chosen if chosen.is_absolute() else Path.home() / ".cache") / "kvstore/weights"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
    except (OSError, RuntimeError):  # The latter: nobody knows where the home is.
        return None
    own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
    return folder if own and not found.st_mode & 0o022 else None


@contextmanager
def _turn(folder: Path | None, patience: float) -> Iterator[None]:
    """Hold the lock by which processes hash one after another, if it comes within `patience` s."""
    lock = None
    if folder is not None:
        with suppress(OSError):
            lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        deadline = time.monotonic() + patience
        while lock is not None and time.monotonic() < deadline:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.02)
        yield
    finally:
        if lock is not None:
            os.close(lock)


def _kept(folder: Path | None) -> dict[str, str]:
    """The digests in the cache; none if it is damaged or not this user's."""
    if folder is None:
        return {}
    try:
        fd = os.open(folder / "digests.json", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(fd, "rb") as file:
            own = os.fstat(fd).st_uid == os.geteuid()
            kept = json.loads(file.read(_MAX_CACHE)) if own else {}
    except (OSError, ValueError, RecursionError):
        return {}
    whole = isinstance(kept, dict) and all(_HEX.fullmatch(str(value)) for value in kept.values())
    return kept if whole else {}


def _keep(folder: Path | None, digests: dict[str, str]) -> None:
    """Replace the cache; one that cannot be written costs time, nothing more."""
    if folder is None:
        return
    with suppress(OSError):
        fd, path = tempfile.mkstemp(dir=folder)
        try:
            with open(fd, "w") as file:
                json.dump(dict(list(digests.items())[-_MOST_KEPT:]), file)
            os.replace(path, folder / "digests.json")
        except OSError:
            os.unlink(path)
