"""The user's folder of compiled kernels: nobody else's, and every file in it is whole or is made again."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

SEAL = hashlib.sha256().digest_size
"""Bytes at the end of a file that say that it is whole."""


class CompilerError(RuntimeError):
    """No compiler, one that refused a kernel, or no folder for what it compiles."""


def folder() -> Path:
    """The user's own folder for compiled kernels; ``$KLIF_SJ_CACHE`` names another.

    :raises CompilerError: if the folder cannot be made, or if somebody else could put a library into it
    """
    root = os.environ.get("KLIF_SJ_CACHE")
    if root:
        folder = Path(root)
    elif sys.platform == "darwin":
        folder = Path.home() / "Library" / "Caches" / "klif_sj"
    else:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "klif_sj"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise CompilerError(f"no folder for compiled kernels: {error}; set $KLIF_SJ_CACHE to one of yours") from error
    state = folder.stat()
    if hasattr(os, "getuid") and (state.st_uid != os.getuid() or state.st_mode & 0o022):
        raise CompilerError(
            f"others can write to the folder of compiled kernels, {folder}: make it yours alone, "
            f"with `chmod 700 {folder}`, or set $KLIF_SJ_CACHE to a folder that is"
        )
    return folder


def name_of(suffix: str, *decides: str) -> str:
    """The name of a file, by all that decides what is in it."""
    return hashlib.sha256("\0".join(decides).encode()).hexdigest()[:32] + suffix


def kept(name: str, build: Callable[[Path], Path]) -> Path:
    """The file of this name in the folder. One that is missing or damaged is built: ``build`` gets a folder of its own
    and returns the file that it made there, which is sealed and moved into place, so that processes doing the same do
    no harm.
    """
    file = folder() / name
    if not _is_whole(file):
        with tempfile.TemporaryDirectory(dir=file.parent) as workplace:
            built = build(Path(workplace))
            with built.open("ab") as appended:
                appended.write(_seal(built.read_bytes(), name))
            os.replace(built, file)
    return file


def content(file: Path) -> bytes:
    """What was built, without the seal."""
    return file.read_bytes()[:-SEAL]


def _seal(content: bytes, name: str) -> bytes:
    """What a file ends with if it is whole and is the one that its name says; a loader of libraries ignores it."""
    return hashlib.sha256(name.encode() + content).digest()


def _is_whole(file: Path) -> bool:
    """Whether a file is there, not cut short, and ours: loading another could crash."""
    try:
        found = file.read_bytes()
    except OSError:
        return False
    return found[-SEAL:] == _seal(found[:-SEAL], file.name)
