"""Put other neurons into an existing network (:func:`swap_neurons`) or into code that builds one (:class:`patched`)."""

from .in_place import swap_neurons
from .patch import patched
from .swap_report import SwapReport, SwapRow

__all__ = ["SwapReport", "SwapRow", "patched", "swap_neurons"]
