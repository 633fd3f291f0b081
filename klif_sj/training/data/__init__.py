"""The data sets. Light to import: :mod:`.info` says what there is; what reads it loads when it is asked for."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["load", "make_data"]

NAMES = {"load": "load", "make_data": "DataModule"}


def __getattr__(name: str) -> Any:
    if name not in NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.module"), NAMES[name])
