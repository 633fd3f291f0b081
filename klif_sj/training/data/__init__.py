"""The data sets. Light to import: :mod:`.catalogue` says what there is; what reads it loads when it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .batches import DataModule

__all__ = ["make_data"]


def make_data(*arguments: Any, **options: Any) -> DataModule:
    """A :class:`klif_sj.training.data.batches.DataModule`, whose module needs the ``train`` extra."""
    from .batches import DataModule

    return DataModule(*arguments, **options)
