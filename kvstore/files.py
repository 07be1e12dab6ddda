"""Files and sockets at paths where others may have put something else."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


def open_own(path: Path, flags: int) -> int:
    """Open a file of this user's, or make it with mode 0600. A link is not followed.

    It is emptied, where `flags` say so, only once it is known whose it is.

    Raises:
        OSError: it cannot be opened or made, or is something else.
    """
    safe = flags & ~os.O_TRUNC | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    fd = os.open(path, safe, 0o600)
    found = os.fstat(fd)
    # A second name (hard link) would be somebody else's way to a file of ours.
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_nlink != 1:
        os.close(fd)
        text = f"what is there is no file of user {os.geteuid()} alone; remove it"
        raise OSError(errno.ELOOP, text, str(path))
    if flags & os.O_TRUNC:
        os.ftruncate(fd, 0)
    return fd


def cache_folder(name: str) -> Path | None:
    """The folder of the user's cache for things of that name; others cannot write there.

    None: there is none to be had.
    """
    try:
        chosen = Path(os.environ.get("XDG_CACHE_HOME", ""))
        folder = (chosen if chosen.is_absolute() else Path.home() / ".cache") / "kvstore" / name
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
    except (OSError, RuntimeError):  # The latter: nobody knows where the home is.
        return None
    return folder if found.st_uid == os.geteuid() and not found.st_mode & 0o022 else None


def make_way(path: Path) -> None:
    """Remove the socket that one before us has left at `path`, if there is one.

    Raises:
        OSError: something else is there, or it cannot be removed.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise FileExistsError(errno.EEXIST, "what is there is no socket", str(path))
    path.unlink()


def file_system(fd: int) -> str:
    """Type of the file system that a file is on; empty if it cannot be found out."""
    device = os.fstat(fd).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount, _, source = line.partition(" - ")
        if mount.split()[2] == wanted:
            return source.split()[0]
    return ""
