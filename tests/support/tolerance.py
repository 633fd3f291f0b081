"""The one table of tolerances, by dtype. A tolerance is relative to the largest absolute value expected."""

from __future__ import annotations

import torch
from torch import Tensor

from klif_sj._tolerance import RELATIVE


def assert_close(actual: Tensor, expected: Tensor, what: str = "result", roundings: int = 1) -> None:
    """Same shape and dtype, and every element within the dtype's tolerance of the largest absolute value.

    :param roundings: to the dtype: two where numbers that differ in their last bits were rounded to it
    """
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{what}: dtype {actual.dtype}, expected {expected.dtype}"
    assert torch.isfinite(expected).all(), f"{what}: the expected values are not finite"
    if expected.numel() == 0:
        return
    scale = expected.abs().max().item()
    error = (actual.double() - expected.double()).abs().max().item()
    allowed = RELATIVE[expected.dtype] * scale * roundings
    assert error <= allowed, f"{what}: largest error {error:.3g}, allowed {allowed:.3g} (largest value {scale:.3g})"


def assert_equal(actual: Tensor, expected: Tensor, what: str = "result") -> None:
    """Same dtype, same shape, every element the same."""
    assert actual.dtype == expected.dtype, f"{what}: dtype {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert torch.equal(actual, expected), f"{what}: {(actual != expected).sum()} of {actual.numel()} elements differ"
