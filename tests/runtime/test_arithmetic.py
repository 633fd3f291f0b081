"""The prelude's arithmetic on the host: exp and sigmoid against float64, 16-bit storage against torch's."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from klif_sj import runtime
from klif_sj.codegen.kernel import template
from klif_sj.runtime.cpu import function_of

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif("cpp" not in runtime.supported_backends(), reason="no C++ compiler"),
]

TYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float"}
HALF = [torch.float16, torch.bfloat16]
SMALLEST = 2.0**-149


def elementwise(statement: str, source: torch.dtype, target: torch.dtype) -> Callable[[Tensor], Tensor]:
    """A function of the prelude over a tensor; the statement sets ``to[i]`` from ``from[i]``."""
    text = f"""
extern "C" void apply(const void *const *arguments) {{
    const {TYPES[source]} *from = (const {TYPES[source]} *)arguments[0];
    {TYPES[target]} *to = ({TYPES[target]} *)arguments[1];
    const int64 n = (int64)arguments[2];
#pragma omp simd
    for (int64 i = 0; i < n; i++) {{ {statement} }}
}}
"""
    apply = function_of(template("prelude.h") + text, "apply")

    def function(values: Tensor) -> Tensor:
        values = values.contiguous()
        out = torch.empty_like(values, dtype=target)
        apply(struct.pack("@3q", values.data_ptr(), out.data_ptr(), values.numel()))
        return out

    return function


def floats(first: int, last: int, step: int = 1) -> Tensor:
    """The float32 numbers with these bit patterns."""
    return torch.arange(first, last, step, dtype=torch.int64).to(torch.int32).view(torch.float32)


def bits(values: Tensor) -> Tensor:
    return values.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[values.element_size()])


def all_floats() -> Tensor:
    """Every 509th float32, of both signs, infinities and NaN included, and every one where exp goes out of range."""
    edges = [floats(sign | 0x42AE0000, sign | 0x42D20000) for sign in (0, 1 << 31)]  # 87 to 105, -87 to -105
    zeros = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan")])
    return torch.cat([floats(0, 1 << 32, 509), *edges, zeros])


def error_in_last_places(actual: Tensor, expected: Tensor) -> Tensor:
    """In units of the last place of the float32 nearest to the expected float64; at least those of subnormals."""
    _, exponent = torch.frexp(expected)
    unit = torch.ldexp(torch.ones_like(expected), (exponent - 24).clamp(min=-149))
    return (actual.double() - expected).abs() / unit


def test_exp_is_within_two_units_in_the_last_place() -> None:
    x = all_floats()
    actual, expected = elementwise("to[i] = exp_(from[i]);", torch.float32, torch.float32)(x), x.double().exp()
    assert torch.equal(actual.isnan(), x.isnan())
    largest = torch.finfo(torch.float32).max
    representable = ~x.isnan() & (expected <= largest)
    assert representable.sum() > 4_000_000
    assert error_in_last_places(actual[representable], expected[representable]).max() <= 2.0
    assert (actual[expected > largest * (1 + 2.0**-24)] == float("inf")).all()
    assert (actual[expected < SMALLEST / 2] == 0.0).all()


def test_sigmoid_is_within_three_units_in_the_last_place() -> None:
    """One more than exp for the sum and the quotient. What would be subnormal is as small as the smallest normal."""
    x = all_floats()
    actual = elementwise("to[i] = sigmoid_(from[i]);", torch.float32, torch.float32)(x)
    assert torch.equal(actual.isnan(), x.isnan())
    subnormal = x < -87.33
    assert (actual[subnormal] <= 1.2e-38).all()
    compared = ~x.isnan() & ~subnormal
    assert error_in_last_places(actual[compared], x[compared].double().sigmoid()).max() <= 3.0


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_every_stored_pattern_loads_as_in_torch(dtype: torch.dtype) -> None:
    patterns = torch.arange(1 << 16).to(torch.int16).view(dtype)
    loaded = elementwise("to[i] = load_(from[i]);", dtype, torch.float32)(patterns)
    expected = patterns.float()
    assert torch.equal(loaded.isnan(), expected.isnan())
    numbers = ~expected.isnan()
    assert torch.equal(bits(loaded)[numbers], bits(expected)[numbers])


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_stores_round_as_in_torch(dtype: torch.dtype) -> None:
    """To nearest, ties to even: everywhere, and on and beside every tie."""
    stored = torch.arange(1 << 16).to(torch.int16).view(dtype).float()
    stored = stored[stored.isfinite()].sort().values
    ties = (stored[1:] + stored[:-1]) / 2
    beside = [torch.nextafter(ties, torch.full_like(ties, direction)) for direction in (-torch.inf, torch.inf)]
    beyond = torch.tensor([65519.0, 65520.0, 65536.0, 3.4e38, -65519.996, -65520.0])
    x = torch.cat([all_floats(), ties, *beside, beyond])
    actual = elementwise("store_(from[i], to[i]);", torch.float32, dtype)(x)
    expected = x.to(dtype)
    assert torch.equal(actual.isnan(), x.isnan())
    numbers = ~x.isnan()
    assert torch.equal(bits(actual)[numbers], bits(expected)[numbers])


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_what_was_loaded_stores_as_it_was(dtype: torch.dtype) -> None:
    patterns = torch.arange(1 << 16).to(torch.int16).view(dtype)
    patterns = patterns[~patterns.isnan()]
    there_and_back = elementwise("store_(load_(from[i]), to[i]);", dtype, dtype)(patterns)
    assert torch.equal(bits(there_and_back), bits(patterns))
