"""A file that takes the place of another at once: whoever opens the path sees the old one or the new one, whole."""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

try:
    import fcntl
except ImportError:  # Windows, where a file that is open cannot be removed, which serves as a lock
    fcntl = None  # type: ignore[assignment]

# Seconds after which a file that is not open was left there: on Windows one must be closed to take another's place.
STRAY = 60


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Any]:
    """A new file to write to, unbuffered, which takes the place of `path` when the block ends, on the disk.

    It is written beside, under a name of its own, and locked meanwhile: an unlocked one was left by a process that was
    killed, and is removed. The permissions are those that open(path, "wb") would leave; a link is followed.

    Raises:
        OSError: nothing can be written there, or the disk is full; what was at `path` is still there.
    """
    target = os.path.realpath(os.fsdecode(path))
    before = _existing(target)
    folder, name = os.path.split(target)
    prefix = f".{os.fsdecode(os.fsencode(name)[:200])}."  # within the length that a name may have
    _remove_strays(folder, prefix)
    beside, descriptor = _created(folder, prefix, target)
    try:
        with os.fdopen(descriptor, "wb", buffering=0) as file:
            if before is not None and hasattr(os, "fchown"):
                if (before.st_uid, before.st_gid) != (os.geteuid(), os.getegid()):
                    with suppress(PermissionError):
                        os.fchown(descriptor, before.st_uid, before.st_gid)
                os.fchmod(descriptor, stat.S_IMODE(before.st_mode))
            yield file
            _flush(descriptor)
            if fcntl is not None:
                os.replace(beside, target)  # while it is locked
        if fcntl is None:
            os.replace(beside, target)  # while it is closed
    except BaseException:
        with suppress(OSError):
            os.remove(beside)
        raise
    _flush_folder(folder)


def _existing(target: str) -> os.stat_result | None:
    """What is at the place, if anything is: something that may be replaced by a file."""
    try:
        before = os.stat(target)
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(before.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), target)
    if not stat.S_ISREG(before.st_mode):
        raise OSError(errno.EINVAL, "is a device or pipe, must be a file", target)
    if not os.access(target, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), target)
    return before


def _created(folder: str, prefix: str, target: str) -> tuple[str, int]:
    """A new file beside the target, locked."""
    while True:
        beside = os.path.join(folder, f"{prefix}{os.urandom(4).hex()}.tmp")
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        try:
            descriptor = os.open(beside, flags, 0o666)
        except FileExistsError:
            continue
        except OSError as error:  # under the name that the caller knows
            raise OSError(error.errno, error.strerror, target) from None
        if fcntl is None or not _lock(descriptor, wait=True):
            return beside, descriptor
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(beside), os.fstat(descriptor)):
                return beside, descriptor
        os.close(descriptor)  # another process took it for a stray one, before it was locked


def _remove_strays(folder: str, prefix: str) -> None:
    """Remove what killed processes have left beside the target."""
    try:
        names = os.listdir(folder)
    except OSError:
        return
    for name in names:
        if not (name.startswith(prefix) and name.endswith(".tmp") and len(name) == len(prefix) + 12):
            continue
        path = os.path.join(folder, name)
        with suppress(OSError):
            if fcntl is None:
                if time.time() - os.stat(path).st_mtime > STRAY:
                    os.remove(path)
                continue
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
            try:
                if _lock(descriptor, wait=False):
                    os.remove(path)
            finally:
                os.close(descriptor)


def _lock(descriptor: int, wait: bool) -> bool:
    """Whether the lock of an open file was got; False too where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def _flush(descriptor: int) -> None:
    """Onto the disk, which macOS' fsync does not promise."""
    if fcntl is not None and hasattr(fcntl, "F_FULLFSYNC"):
        with suppress(OSError):  # a file system without it
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
    os.fsync(descriptor)


def _flush_folder(folder: str) -> None:
    """The new name onto the disk; Windows has no such call."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that flushes no folders
            raise
    finally:
        os.close(descriptor)
