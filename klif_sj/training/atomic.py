"""Write files and folders so that they are either complete or absent, whatever happens meanwhile."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock

__all__ = ["locked", "made_whole", "replacing", "write_atomically", "write_json"]


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Opens a file for writing, which replaces ``path`` once it is complete and on the disk.

    The file is written beside ``path``, so that it can be renamed. If writing fails, it is deleted, and ``path`` is as
    it was. If the process or the machine dies, the file may remain, under the name of ``path`` with ``.unfinished``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        with unfinished.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    if hasattr(os, "O_DIRECTORY"):  # Windows cannot open a folder
        # The new name must be on the disk as well.
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file by :func:`replacing`."""
    with replacing(path) as file:
        file.write(text.encode())


def write_json(path: Path, value: Any, indent: int = 2) -> None:
    """Write plain values as JSON by :func:`replacing`."""
    write_atomically(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Creates ``folder`` and lets one process at a time work in it. A process that is killed releases its lock."""
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        yield


@contextmanager
def made_whole(folder: Path) -> Iterator[Path]:
    """Creates a folder to fill beside ``folder``, and renames it to ``folder`` if the block succeeds.

    So ``folder`` is never incomplete. Only one process at a time may do this, because it deletes what a killed process
    has left.
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
