"""Folders of data that processes share: made whole or not at all, by one process at a time."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
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
    """A folder beside ``folder`` to fill, which gets its name once all went well: nothing half-made bears it."""
    partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.partial-", dir=folder.parent))
    try:
        yield partial
        partial.chmod(0o755)
        os.rename(partial, folder)
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
