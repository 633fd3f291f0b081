"""The host's generated kernels against eager torch: neurons, options, dtypes, layouts, time steps, shapes, losses.

Every value appears, and every pair that the first test lists; the full product would compile for hours. Memory that
torch does not initialise is filled with NaN throughout, so nothing here passes by what happened to lie there.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from fused_cases import DTYPES, LAYOUTS, LOSSES, NEURONS, SHAPES, STEPS, Case, finite_parts, outcome
from neurons import current, weights_for
from spikingjelly.activation_based import surrogate
from tolerance import assert_close, assert_equal
from torch import Tensor, nn

from klif_sj import KLIFNode, LearnableATan, Rect, runtime
from klif_sj._compat import SPIKINGJELLY_2
from klif_sj.codegen.trace import StepTraceError
from klif_sj.runtime.cpu import SERIAL_LIMIT
from klif_sj.runtime.layout import step_strides, with_layout

pytestmark = [
    pytest.mark.skipif("cpp" not in runtime.supported_backends(), reason="no C++ compiler"),
    pytest.mark.usefixtures("uninitialised_memory_is_nan"),
]

MARGIN = {torch.float64: 1e-12}
"""Distance from the threshold within which a spike may differ where a step calls exp or sigmoid.

The host has its own, within 3 units in the last place; 1e-5, for arithmetic in float32, allows for 40 steps of that.
"""


def grid() -> Iterator[Case]:
    """A neuron for every pair of T and dtype, two for the short T, which compile fast.

    The n-th case of a neuron takes the n-th of everything else.
    """
    counts: Counter[str] = Counter()
    for (t, steps), (d, dtype), turn in itertools.product(enumerate(STEPS), enumerate(DTYPES), range(2)):
        if turn and steps > 4:
            continue
        neuron = list(NEURONS)[(t + d + 2 * turn) % len(NEURONS)]
        n = counts[neuron]
        counts[neuron] += 1
        yield Case(
            neuron, n % len(NEURONS[neuron][1]), dtype, steps, SHAPES[n % len(SHAPES)], list(LAYOUTS)[n % len(LAYOUTS)],
            LOSSES[n % len(LOSSES)], given_states=n % 3 > 0,
        )  # fmt: skip


GRID = list(grid())


def away_from_threshold(case: Case, stored: Tensor) -> Tensor:
    """The neurons that never come within the margin of the threshold, nor of an edge of CLIF's rectangle."""
    node, distances = case.make("torch"), []

    def record(module: nn.Module, inputs: tuple[Tensor]) -> None:
        distances.append(torch.stack([(inputs[0].detach() - edge).abs() for edge in (-0.5, 0.0, 0.5)]).amin(0))

    node.surrogate_function.register_forward_pre_hook(record)
    outcome(case, "torch", stored, torch.tensor(1.0), node)
    return torch.stack(distances).amin(0) > MARGIN.get(case.dtype, 1e-5)


# The grid


def test_the_grid_holds_every_pair() -> None:
    pairs: dict[tuple[str, str], set[Any]] = {}
    names = ("neuron", "dtype", "steps", "layout", "shape", "loss", "option")
    for case, (a, b) in itertools.product(GRID, itertools.combinations(names, 2)):
        pairs.setdefault((a, b), set()).add((getattr(case, a), getattr(case, b)))
    assert len(pairs["dtype", "steps"]) == len(DTYPES) * len(STEPS)
    assert len(pairs["neuron", "steps"]) == len(NEURONS) * len(STEPS)
    assert len(pairs["neuron", "layout"]) == len(NEURONS) * len(LAYOUTS)
    assert len(pairs["neuron", "dtype"]) == len(NEURONS) * len(DTYPES)
    assert len(pairs["neuron", "shape"]) == len(NEURONS) * len(SHAPES)
    assert len(pairs["neuron", "loss"]) == len(NEURONS) * len(LOSSES)
    assert len(pairs["neuron", "option"]) == sum(len(options) for _, options in NEURONS.values())


@pytest.mark.parametrize("case", GRID, ids=str)
def test_grid(case: Case) -> None:
    """Results are torch's bit for bit where a step is plain arithmetic, else for neurons away from the threshold."""
    stored = case.stored_input()
    kept = torch.ones(case.shape, dtype=torch.bool)
    if not case.exact:
        kept = away_from_threshold(case, stored)
        assert kept.float().mean() > 0.98
    expected, actual = (outcome(case, backend, stored, kept) for backend in ("torch", "cpp"))
    assert 0.02 < expected["forward"]["spike"].float().mean() < 0.98
    for name, value in expected["forward"].items():
        if case.exact:
            assert_equal(actual["forward"][name], value, name)
        elif name == "spike":
            assert_equal(actual["forward"][name][..., kept], value[..., kept], name)
        else:
            assert_close(actual["forward"][name][..., kept], value[..., kept], name)
    assert any(gradient.abs().max() > 0 for gradient in expected["gradients"].values())
    for name, value in expected["gradients"].items():
        assert_close(actual["gradients"][name], value, f"gradient of {name}")


# Surrogates

ARGUMENTS = {"MultiLevelSpikeCount": {"max_spike_count": 3}}
REFUSED = {"LogTailedReLU": "log_tailed_relu_backward", "PoissonPass": "bernoulli"}
"""Surrogates that no kernel can be generated for, and what the refusal names. The old line's NonzeroSignLogAbs fails in
eager torch as well: it multiplies by a tuple."""
if not SPIKINGJELLY_2:
    REFUSED["NonzeroSignLogAbs"] = "nonzero_sign_log_abs_backward"


def surrogates() -> dict[str, partial]:
    """Every surrogate of SpikingJelly and of this package, firing, and as the primitive where there is one."""
    bases = [value for name, value in vars(surrogate).items() if name.endswith("SurrogateFunctionBase")]
    classes = [
        c for c in vars(surrogate).values() if isinstance(c, type) and issubclass(c, (*bases,)) and c not in bases
    ]
    found = {}
    for cls in (*classes, LearnableATan, Rect):
        name = cls.__name__ if cls.__module__.startswith("spikingjelly") else f"our {cls.__name__}"
        make = partial(cls, **ARGUMENTS.get(cls.__name__, {}))
        found[name] = make
        try:
            make(spiking=False)(torch.ones(1))
        except (NotImplementedError, TypeError):  # SuperSpike and FakeNumericalGradient only fire
            continue
        found[f"{name}, primitive"] = partial(make, spiking=False)
    return found


SURROGATES = surrogates()


def test_all_surrogates_are_tried() -> None:
    assert len(SURROGATES) >= (35 if SPIKINGJELLY_2 else 30)


@pytest.mark.parametrize("name", [name for name in SURROGATES if name not in REFUSED])
def test_surrogate(name: str) -> None:
    primitive = "primitive" in name
    number = list(SURROGATES).index(name)
    dtype = DTYPES[2 + number % 2 if primitive else number % 4]
    x = current(3, 2, 5, 53, dtype=dtype)
    x[:, 0, 0] = 1.0  # on the threshold at the first step
    runs = {}
    for backend in ("torch", "cpp"):
        node = KLIFNode(surrogate_function=SURROGATES[name](), step_mode="m", backend=backend, decay_input=False)
        leaf = x.clone().requires_grad_()
        spike = node(leaf)
        (spike.sum() + node.v.sum()).backward()
        runs[backend] = (
            {"spike": spike.detach(), "v": node.v.detach()},
            {"x": leaf.grad} | {parameter: p.grad for parameter, p in node.named_parameters()},
        )
    assert 0.02 < runs["torch"][0]["spike"].nanmean() < (4.0 if "Multi" in name or primitive else 0.98)
    for key, value in runs["torch"][0].items():
        # LogTailedReLU's primitive is NaN below the threshold on the old line.
        (assert_close if primitive else assert_equal)(*finite_parts(runs["cpp"][0][key], value, key), key)
    for key, value in runs["torch"][1].items():
        assert_close(*finite_parts(runs["cpp"][1][key], value, key), f"gradient of {key}")


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("backend", ["cpp", "auto"])
def test_refused_surrogate(name: str, backend: str) -> None:
    if name not in SURROGATES:
        pytest.skip("this SpikingJelly does not have it")
    node = KLIFNode(surrogate_function=SURROGATES[name](), step_mode="m", backend=backend)
    with pytest.raises(StepTraceError, match=REFUSED[name]):
        node(current(requires_grad=True))
    assert node.v == 0.0


# Shapes, values, threads


@pytest.mark.parametrize("neuron", NEURONS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 1, 1, 1), (0, 3), (2, 3, 0, 4)], ids=str)
def test_one_neuron_or_none(neuron: str, shape: tuple[int, ...]) -> None:
    case = Case(neuron, 0, torch.float32, 2, shape, "contiguous", ("spike", "states", "sequences"))
    stored = case.stored_input()
    expected, actual = (outcome(case, backend, stored, torch.tensor(1.0)) for backend in ("torch", "cpp"))
    for kind in ("forward", "gradients"):
        assert expected[kind].keys() == actual[kind].keys()
        for name, value in expected[kind].items():
            assert_close(actual[kind][name], value, name)


@pytest.mark.parametrize("neuron", NEURONS)
def test_nan_and_infinity(neuron: str) -> None:
    """They spread as in eager torch, to the same neurons and through the same gradients."""
    case = Case(neuron, 0, torch.float32, 4, (2, 3, 40), "contiguous")
    stored = case.stored_input()
    for i, value in enumerate((float("nan"), float("inf"), -float("inf"), 3e38, -3e38)):
        stored[1 + i % 2, :, :, i::9] = value
    expected, actual = (outcome(case, backend, stored, torch.tensor(1.0)) for backend in ("torch", "cpp"))
    assert not expected["forward"]["v"].isfinite().all()
    for kind, check in (("forward", assert_equal if case.exact else assert_close), ("gradients", assert_close)):
        for name, value in expected[kind].items():
            check(*finite_parts(actual[kind][name], value, name), name)


def test_layouts_are_kept() -> None:
    """A dense layout is taken as it is, and everything that comes out has it; only gaps within a step cost a copy."""
    for layout in LAYOUTS:
        case = Case("klif", 0, torch.float32, 3, (3, 5, 7, 11), layout, ("spike", "states", "sequences"), False)
        x = case.cut(case.stored_input())
        dense = layout not in ("slice of a row", "time last")
        assert (with_layout(x, step_strides(x.shape, x.stride())) is x) == dense
        strides = x.stride()[1:] if dense else torch.empty(case.shape).stride()
        x, node = x.detach().requires_grad_(), case.make("cpp")
        spike = node(x)
        spike.sum().backward()
        assert node.v.stride() == strides, layout
        assert all(t.stride()[1:] == strides for t in (spike, node.v_seq)), layout


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_every_run_gives_the_same_bits(layout: str, threads: Callable[[int], None]) -> None:
    """Parameter gradients too: sums are made in an order that the shape alone decides."""
    case = Case("user", 0, torch.float32, 4, (41, 5, 7, 11), layout)
    stored = case.stored_input()
    assert stored.numel() > SERIAL_LIMIT
    runs = []
    for count in (1, *[2] * 20):
        threads(count)
        runs.append(outcome(case, "cpp", stored, torch.tensor(1.0)))
    for run in runs[1:]:
        for kind in run:
            for name, value in run[kind].items():
                assert_equal(value, runs[0][kind][name], name)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("wanted", ["x", "k", "v", "gain"])
def test_one_gradient_alone(wanted: str) -> None:
    """What needs no gradient gets none, and does not change the gradient of what does."""
    case = Case("user" if wanted == "gain" else "klif", 0, torch.float32, 3, (3, 5, 7, 11), "contiguous")
    runs = {}
    for backend in ("torch", "cpp"):
        node, x = case.make(backend).requires_grad_(False), case.stored_input()
        node.v = torch.full(case.shape, 0.3)
        leaf = {"x": x, "v": node.v}.get(wanted)
        leaf = getattr(node, wanted) if leaf is None else leaf
        leaf.requires_grad_()
        spike = node(x)
        (weights_for(spike) * spike + node.v).sum().backward()
        runs[backend] = leaf.grad
        assert x.grad is None or wanted == "x"
    assert runs["torch"].abs().max() > 0
    assert_close(runs["cpp"], runs["torch"])
