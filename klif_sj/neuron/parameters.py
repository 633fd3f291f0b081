"""How a raw parameter becomes the effective one that a neuron's equations use."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..codegen import Kind, PerStep, StepTraceError, is_tracing


class _Bounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, raw: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(raw)
        ctx.low, ctx.high = low, high
        return raw.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (raw,) = ctx.saved_tensors
        # Gradient descent moves against the gradient: a negative one raises the value, which must be below its upper
        # bound, and a positive one lowers it.
        return grad * torch.where(grad < 0, raw < ctx.high, raw > ctx.low), None, None


class _ClampedThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, raw: Tensor, low: float, high: float) -> Tensor:
        return raw.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None


def bounded(raw: Tensor, low: float, high: float) -> Tensor:
    """``raw`` clamped to [low, high], so that a value that has reached a bound can still come back.

    The gradient is that of the identity, except that a gradient whose descent step would move the value further out
    is zero. (A plain clamp has no gradient outside its bounds, so a parameter that once left them never returns.)
    """
    # A value within its bounds is returned as it is. It is only read where that waits for no GPU.
    readable = type(raw) is nn.Parameter and raw.is_cpu and not torch.compiler.is_compiling()
    if readable and raw.numel() == 1 and low < raw.item() < high:
        return raw
    if is_tracing():
        raise StepTraceError("the rule for a value at its bound judges the gradient of a whole sequence")
    value = _Bounded.apply(raw, low, high)
    if not torch.compiler.is_compiling() and type(raw) in (Tensor, nn.Parameter):
        value.bounded_from = raw, raw._version, raw.data_ptr()
    return value


def unless_changed(before: Tensor | PerStep | None, now: Tensor | PerStep) -> Tensor | PerStep:
    """The :func:`bounded` parameter of an earlier call if its raw value has not changed, else that of this call."""
    if not isinstance(now, Tensor) or not isinstance(before, Tensor):
        return now
    source, earlier = (getattr(value, "bounded_from", None) for value in (now, before))
    if source is None or earlier is None or source[0] is not earlier[0] or source[1:] != earlier[1:]:
        return now
    # Only the value shows a change by ``.data``. It is not compared on a GPU, because that would wait for the GPU.
    return now if now.is_cpu and not torch.equal(now, before) else before


def clamped_through(raw: Tensor, low: float, high: float) -> Tensor:
    """``raw`` clamped to [low, high], with the gradient of the identity (straight-through).

    It suits a parameter that is used once for every step or element. :func:`bounded` decides by the sign of a gradient,
    which is only right for the whole gradient. The gradient here adds up to the same, whatever its parts are. Nothing
    keeps the raw value near its bounds, so it may take a while to come back.
    """
    return _ClampedThrough.apply(raw, low, high)


def fit_to_input(
    neuron: str, effective: Mapping[str, Tensor | PerStep], x_seq: Tensor, first_step: int, channel_dim: int,
    dtype: torch.dtype, prepared: bool = False,
) -> tuple[dict[str, Tensor], tuple[Kind, ...]]:  # fmt: skip
    """Effective parameters in the arithmetic's dtype, cut to the steps at hand, and the kind of each.

    :raises ValueError: if there are more steps than values, or if the input has another number of channels
    """
    step, gradients = x_seq.shape[1:], torch.is_grad_enabled() or torch.jit.is_tracing()
    fitted, kinds = {}, []
    for name, value in effective.items():
        per_step = isinstance(value, PerStep)
        tensor = value.values if isinstance(value, PerStep) else value
        if per_step and not tensor.ndim:
            raise ValueError(f"{neuron}: {name!r}: expected PerStep values of shape [T] or [T, C], got a single one")
        if per_step and (first_step, x_seq.shape[0]) != (0, tensor.shape[0]):
            end = first_step + x_seq.shape[0]
            if end > tensor.shape[0]:
                raise ValueError(
                    f"{neuron}: {name!r}: expected at most T = {tensor.shape[0]} time steps, its length, got {end}; "
                    "reset the neuron between sequences, or build it with a larger T"
                )
            tensor = tensor[first_step:end]
        channels = tensor.shape[per_step:]
        if channels and (len(channels) > 1 or channel_dim >= len(step) or step[channel_dim] != channels[0]):
            raise ValueError(
                f"{neuron}: {name!r} has shape {tuple(channels)}, so dimension {channel_dim} of a step's input is "
                f"expected to have {channels[0]} channels, got an input of shape {tuple(step)}"
            )
        fitted[name] = tensor = tensor if tensor.dtype == dtype else tensor.to(dtype)
        kinds.append((name, per_step, bool(channels), gradients and tensor.requires_grad, prepared))
    return fitted, tuple(kinds)


def channel_view(value: Tensor, x: Tensor, channel_dim: int) -> Tensor:
    """A scalar as it is, ``[C]`` shaped to broadcast along ``channel_dim`` of x."""
    if value.ndim == 0:
        return value
    return value.view([-1 if dim == channel_dim else 1 for dim in range(x.ndim)])


def soft_reset_depth(v_threshold: float | Tensor) -> float | Tensor:
    """How much a soft reset subtracts from the potential for a spike: the threshold.

    It is 0 if the threshold is infinite, because there are no spikes then, and 0 times infinity is not a number.
    """
    return 0.0 if isinstance(v_threshold, float) and math.isinf(v_threshold) else v_threshold


def check_bounds(name: str, bounds: tuple[float, float]) -> tuple[float, float]:
    """Return ``bounds`` as two floats, 0 < low < high; anything else is a ValueError."""
    try:
        low, high = (float(bound) for bound in bounds)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: expected two numbers (low, high), got {bounds!r}") from None
    if not 0 < low < high or math.isinf(low):
        raise ValueError(f"{name}: expected 0 < low < high, got {bounds!r}")
    return low, high
