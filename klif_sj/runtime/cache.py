"""The user's own folder of compiled kernels. A file in it that is not whole is built again."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

SEAL = hashlib.sha256().digest_size
"""The number of bytes at the end of a file that prove that it is whole."""


class CompilerError(RuntimeError):
    """There is no compiler, the compiler refused a kernel, or there is no folder for compiled kernels."""


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


def file_name(suffix: str, *decides: str) -> str:
    """The name of a file, made from all that decides its content."""
    return hashlib.sha256("\0".join(decides).encode()).hexdigest()[:32] + suffix


def built_file(name: str, build: Callable[[Path], Path]) -> Path:
    """The file of this name in the folder, which is built if it is missing or damaged.

    :param build: makes the file in an empty folder, which it is given, and returns the file's path. The file is then
        sealed and moved into place, so processes that build the same file at the same time do no harm.
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
    """The content of a built file, without its seal."""
    return file.read_bytes()[:-SEAL]


def _seal(content: bytes, name: str) -> bytes:
    """The end of a file that is whole and belongs to its name. A loader of libraries ignores these bytes."""
    return hashlib.sha256(name.encode() + content).digest()


def _is_whole(file: Path) -> bool:
    """Whether a file exists, is complete and was built by this package. Loading any other file could crash."""
    try:
        data = file.read_bytes()
    except OSError:
        return False
    return data[-SEAL:] == _seal(data[:-SEAL], file.name)
