"""The only table of tolerances: how far two ways to compute the same result may differ."""

from __future__ import annotations

import torch

RELATIVE = {
    torch.float64: 1e-10,
    torch.float32: 2e-5,
    # Arithmetic is float32, so half precision costs one rounding: half a unit in the last place.
    torch.float16: 2.0**-11 * 1.05,
    torch.bfloat16: 2.0**-8 * 1.05,
}
"""For each dtype, the largest difference allowed, relative to the largest absolute value."""
