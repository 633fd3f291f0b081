"""The data sets. :mod:`.catalogue` describes them; the modules that read them are imported when they are needed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .batches import DataModule

__all__ = ["make_data"]


def make_data(*arguments: Any, **options: Any) -> DataModule:
    """Make a :class:`klif_sj.training.data.batches.DataModule`, whose module needs the ``train`` extra."""
    from .batches import DataModule

    return DataModule(*arguments, **options)
