"""Checks of arguments. Their errors say what was expected and what was given."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from numbers import Real

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_number(name: str, value: object) -> float:
    """``value`` as a float.

    :raises TypeError: for a value that is no number
    :raises ValueError: for a number that is not finite
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value!r}")
    return float(value)


def check_threshold(value: object) -> float:
    """``v_threshold`` as a float, finite or ``inf``, with which a neuron never fires."""
    never = isinstance(value, Real) and value == math.inf
    return math.inf if never else check_number("v_threshold", value)


def check_positive(name: str, value: object) -> float:
    number = check_number(name, value)
    if not number > 0.0:
        raise ValueError(f"{name}: expected a positive number, got {value!r}")
    return number


def check_tau(tau: object) -> float:
    """``tau`` as a float above 1, the range in which a membrane leaks and does not oscillate."""
    number = check_number("tau", tau)
    if not number > 1.0:
        raise ValueError(f"tau: expected a membrane time constant above 1, got {tau!r}")
    return number


def check_bool(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r}")
    return value


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")
    return str(value)


def name_and_value(option: str, text: str, expected: str = "NAME=VALUE") -> tuple[str, str]:
    """The name and the value that are given to a command-line option as ``NAME=VALUE``.

    :raises ValueError: for a text without a name or a value
    """
    name, _, value = (part.strip() for part in text.partition("="))
    if not (name and value):
        raise ValueError(f"{option}: expected {expected}, got {text!r}")
    return name, value


def nearest(name: str, names: Iterable[str]) -> str:
    """The text ``; did you mean ...?`` if one of the names is similar, else an empty text."""
    close = difflib.get_close_matches(name.lower(), list(names), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def check_input(x: object, step_mode: str, neuron: str) -> None:
    """Refuse an input that no step can use: one of a wrong type or dtype, or without a batch dimension or time step."""
    layout = "[T, N, *]" if step_mode == "m" else "[N, *]"
    if not isinstance(x, Tensor):
        if isinstance(x, torch.fx.Proxy):
            raise TypeError(
                f"{neuron}: expected a tensor {layout}, got a torch.fx.Proxy: no symbolic trace goes through a spiking "
                "neuron, so make its class a leaf of the tracer. For NIR, whose nodes do not have these equations, put "
                "neurons that it knows in its place first, where they compute the same: klif_sj.swap_neurons(net, "
                "LIFNode)"
            )
        raise TypeError(f"{neuron}: expected a tensor {layout}, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(
            f"{neuron}: expected a floating-point input (float16, bfloat16, float32 or float64), got {x.dtype}; "
            "convert it, for example with x.float()"
        )
    if x.layout is not torch.strided or x.is_nested:
        layout_name = "nested" if x.is_nested else x.layout
        raise TypeError(
            f"{neuron}: expected a dense tensor, got one of layout {layout_name}; convert it with x.to_dense(), a "
            "nested one with torch.nested.to_padded_tensor(x, 0.0)"
        )
    if x.ndim < (2 if step_mode == "m" else 1):
        raise ValueError(f"{neuron}: expected an input {layout} in step_mode={step_mode!r}, got shape {tuple(x.shape)}")
    if step_mode == "m" and x.shape[0] == 0:
        raise ValueError(f"{neuron}: expected at least one time step in dimension 0, got shape {tuple(x.shape)}")
