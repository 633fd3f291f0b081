"""Folders of data that processes share: made whole or not at all, by one process at a time."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["locked", "made_whole", "require_size"]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes ``folder`` and lets one process at a time work in it; the lock of a process that is killed is gone."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def made_whole(folder: Path) -> Iterator[Path]:
    """A folder beside ``folder`` to fill, which gets its name once all went well: nothing half-made bears it.

    To be used by one process at a time; what one that was killed has left is deleted.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def require_size(file: Path, size: int) -> None:
    """:raises ValueError: for a file of another size, naming it"""
    if file.stat().st_size != size:
        raise ValueError(
            f"{file}: expected {size} bytes, got {file.stat().st_size}; the file is truncated or another's. "
            "Delete it and get it again"
        )
