"""``klif-sj run`` uses this module to run an unmodified script with other neurons in place of SpikingJelly's."""

from __future__ import annotations

import ast
import builtins
import importlib
import importlib.machinery
import io
import json
import os
import runpy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import spawn
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import klif_sj

from .._checks import name_and_value
from ..fuse import fusing
from .patch import patched

CHILD = str(Path(__file__).with_name("child.py"))
CHILD_VARIABLE = "KLIF_SJ_RUN"
"""The environment variable that tells a spawned process what to run with which swaps. Only this module uses it."""


def patch_for(swaps: Sequence[str], settings: Sequence[str]) -> patched:
    """The patch that ``OLD=NEW`` and ``NAME=VALUE`` describe.

    :raises TypeError, ValueError: for texts that describe no patch
    """
    classes = {old: _class_named(new) for old, new in (name_and_value("--swap", text) for text in swaps)}
    return patched(
        overrides={name: _value(text) for name, text in (name_and_value("--set", text) for text in settings)}, **classes
    )


def run_as_main(command: Sequence[str], *, is_module: bool) -> None:
    """Run a script or module as the interpreter would: as ``__main__``, with its arguments and its import path."""
    name = command[0]
    sys.argv = list(command)
    sys.excepthook = _without_own_frames
    if not getattr(sys.flags, "safe_path", sys.flags.isolated):  # Python 3.10 has no -P
        sys.path[0] = os.getcwd() if is_module else str(Path(name).resolve().parent)
    if is_module:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    elif Path(name).is_dir():
        runpy.run_path(name, run_name="__main__")
    else:
        path = str(Path.cwd() / name)
        with io.open_code(path) as file:
            code = compile(file.read(), path, "exec", dont_inherit=True)
        main = ModuleType("__main__")
        loader = importlib.machinery.SourceFileLoader("__main__", path)
        vars(main).update(__file__=path, __builtins__=builtins, __loader__=loader, __cached__=None)
        # The module stays there after the script has ended, for the script's threads and exit handlers.
        sys.modules["__main__"] = main
        exec(code, vars(main))


@contextmanager
def swapping_children(swaps: Sequence[str], settings: Sequence[str], fuse: bool = False) -> Iterator[None]:
    """Let the processes that multiprocessing spawns swap and fuse too.

    They run child.py in place of the script, and child.py runs the script. A forked process inherits the patch anyway.
    """
    original = spawn.get_preparation_data

    def preparation_data(name: str) -> dict[str, Any]:
        data = original(name)
        main = {key: data.pop(key) for key in ("init_main_from_path", "init_main_from_name") if key in data}
        if main:
            os.environ[CHILD_VARIABLE] = json.dumps({"swap": list(swaps), "set": list(settings), "fuse": fuse, **main})
            data["init_main_from_path"] = CHILD
        return data

    spawn.get_preparation_data = preparation_data
    try:
        yield
    finally:
        spawn.get_preparation_data = original


def become_child() -> dict[str, Any]:
    """Swap and fuse in a spawned process, and run the script as ``__mp_main__``; returns the script's global names."""
    instructions = json.loads(os.environ[CHILD_VARIABLE])
    # These blocks last as long as the process does.
    if instructions["swap"]:
        patch_for(instructions["swap"], instructions["set"]).__enter__()
    if instructions["fuse"]:
        fusing().__enter__()
    swapping_children(instructions["swap"], instructions["set"], instructions["fuse"]).__enter__()
    if "init_main_from_name" in instructions:
        return runpy.run_module(instructions["init_main_from_name"], run_name="__mp_main__", alter_sys=True)
    return runpy.run_path(instructions["init_main_from_path"], run_name="__mp_main__")


def _class_named(name: str) -> type:
    module, _, attribute = name.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module) if module else klif_sj, attribute)
    except (ImportError, AttributeError) as error:
        our_names = ", ".join(n for n in klif_sj.__all__ if n.endswith("Node") and n != "FusedNode")
        raise ValueError(f"--swap: expected {our_names} or package.module.Class, got {name!r} ({error})") from error
    return cls


def _value(text: str) -> Any:
    """The value of a Python literal, or else the text itself, so that activation=identity needs no quotes."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _without_own_frames(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Print an uncaught exception as the interpreter prints it when it runs the script itself."""
    frame = traceback
    while frame is not None and frame.tb_frame.f_code is not run_as_main.__code__:
        frame = frame.tb_next
    inner = frame.tb_next if frame is not None else None
    sys.__excepthook__(kind, error.with_traceback(inner or traceback), inner or traceback)
