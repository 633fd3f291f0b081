"""Final states of a multi-step training call: left out of the kernel, and computed when somebody reads them."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cuda_emulation import emulate
from neurons import BATCH, CASES, CHANNELS, CPU_BACKENDS, STEPS, Case, current, glif, states_of, weights_for
from spikingjelly.activation_based import base, functional
from tolerance import assert_close, assert_equal
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from klif_sj import CLIFNode, FusedNode, GLIFNode, KLIFNode
from klif_sj._compat import SPIKINGJELLY_2
from klif_sj.checkpoint import state_contexts
from klif_sj.neuron.memories import PendingMemories
from klif_sj.runtime import op, pending

pytestmark = pytest.mark.skipif("cpp" not in CPU_BACKENDS, reason="no C++ compiler on this machine")


@pytest.fixture(autouse=True)
def _small_calls_wait_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pending, "WORTHWHILE", 0)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """The forward kernels that ran: whether each wrote final states."""
    found: list[bool] = []
    implementation = op._forward

    def forward(*arguments: Any) -> op.Outputs:
        output = implementation(*arguments)
        final, states = arguments[8], len(op.Program.decode(arguments[0]).states)
        assert len(output[1]) == states * final
        found.append(final)
        return output

    monkeypatch.setattr(op, "_forward", forward)
    return found


def computed(leaf: Tensor) -> Tensor:
    """x as a layer hands it on: a result, not a leaf."""
    return leaf * 1.0


def twins(case: Case = CASES[1]) -> tuple[FusedNode, FusedNode]:
    """Two equal neurons; the second computes its states at once."""
    node = case.make(backend="cpp")
    other = copy.deepcopy(node)
    other._states_read = True
    return node, other


def is_pending(node: FusedNode) -> bool:
    return type(node._memories) is PendingMemories and not node._memories.computed


def test_a_small_call_writes_its_states(monkeypatch: pytest.MonkeyPatch) -> None:
    node = CLIFNode(step_mode="m", backend="cpp")
    x = computed(current().requires_grad_())
    for limit, waits in ((x.numel() + 1, False), (x.numel(), True)):
        monkeypatch.setattr(pending, "WORTHWHILE", limit)
        node.reset()
        node(x)
        assert is_pending(node) is waits


def test_nobody_reads_the_states_of_a_training_step(runs: list[bool]) -> None:
    net = nn.Sequential(
        nn.Linear(CHANNELS, CHANNELS), KLIFNode(step_mode="m", backend="cpp"),
        nn.Linear(CHANNELS, CHANNELS), CLIFNode(step_mode="m", backend="cpp"),
        nn.Linear(CHANNELS, CHANNELS), GLIFNode(T=STEPS, inplane=CHANNELS, step_mode="m", backend="cpp"),
    )  # fmt: skip
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(3):
        net(current()).sum().backward()
        optimizer.step()
        assert all(is_pending(node) for node in net[1::2])
        functional.reset_net(net)
        assert [node.v for node in net[1::2]] == [0.0, 0.0, 0.0]
        assert net[5].time_step == 0
    assert runs == [False] * 9


def test_read_once_computed_once_and_at_once_from_then_on(runs: list[bool]) -> None:
    node, x = KLIFNode(step_mode="m", backend="cpp"), computed(current(requires_grad=True))
    node(x)
    assert "v" in node._memories
    assert list(node._memories) == ["v"]
    assert len(node._memories) == 1
    assert runs == [False]
    first = node.v
    assert node.v is first
    assert runs == [False, True]
    for _ in range(2):
        node.reset()
        node(x)
        assert_equal(node.v, first)
    assert runs == [False, True, True, True]


def test_that_states_were_read_is_remembered(runs: list[bool]) -> None:
    node, x = KLIFNode(step_mode="m", backend="cpp"), computed(current(requires_grad=True))
    names = node.state_dict().keys()
    node(x)
    node(x)
    node.reset()
    for copied in (copy.deepcopy(node), pickle.loads(pickle.dumps(node))):
        runs.clear()
        copied(x)
        assert runs == [True]
        assert copied.state_dict().keys() == names


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_same_bits_as_at_once(case: Case) -> None:
    """Spikes, states, and the gradients of a loss on both, over two calls in a row."""
    found = []
    for node in twins(case):
        torch.manual_seed(1)
        leaves = [current(requires_grad=True) for _ in range(2)]
        spikes = node(computed(leaves[0]))
        assert is_pending(node) == (not node._states_read)
        results = {"first spike": spikes, **{f"first {name}": value for name, value in states_of(node).items()}}
        if not node.time_dependent:
            results["second spike"] = node(computed(leaves[1]))
            results |= {f"second {name}": value for name, value in states_of(node).items()}
        sum((value * weights_for(value)).sum() for value in results.values()).backward()
        results |= {f"gradient of {name}": p.grad for name, p in node.named_parameters()}
        results |= {f"gradient of x {i}": leaf.grad for i, leaf in enumerate(leaves) if leaf.grad is not None}
        found.append(results)
    for name, value in found[1].items():
        assert (value is None) == (found[0][name] is None), name
        if value is not None:
            assert_equal(found[0][name], value, name)


@pytest.mark.parametrize("case", [CASES[1], CASES[5], CASES[7]], ids=lambda case: case.name)
@pytest.mark.parametrize("calls", [1, 2])
def test_gradients_of_read_states_are_those_of_the_equations(case: Case, calls: int) -> None:
    found = []
    for backend in ("torch", "cpp"):
        torch.manual_seed(1)
        node, leaf = case.make(backend=backend), current(requires_grad=True)
        for chunk in computed(leaf).chunk(calls):
            node(chunk)
        sum((value * weights_for(value)).sum() for value in states_of(node).values()).backward()
        found.append({"x": leaf.grad, **{name: p.grad for name, p in node.named_parameters()}})
    assert found[0]["x"].abs().max() > 0
    for name, value in found[0].items():
        assert_close(found[1][name], value, name)


class ReusesMemory(torch.autograd.Function):
    """As a CUDA-graphed part of a network: its output is overwritten by its next call."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


@pytest.mark.parametrize(
    ("options", "prepare", "make_x"),
    [
        ({}, lambda node: node.eval(), computed),
        ({}, lambda node: None, lambda leaf: leaf),
        ({}, lambda node: None, lambda leaf: leaf.view(STEPS, BATCH, CHANNELS)),
        ({}, lambda node: None, lambda leaf: computed(leaf).detach()),
        ({}, lambda node: None, ReusesMemory.apply),
        ({}, lambda node: None, lambda leaf: ReusesMemory.apply(leaf).view(STEPS, BATCH, CHANNELS)),
        ({}, lambda node: setattr(node, "v", torch.zeros(BATCH, CHANNELS)), computed),
        ({"store_v_seq": True}, lambda node: None, computed),
        ({"backend": "torch"}, lambda node: None, computed),
    ],
    ids=["eval", "leaf", "view of a leaf", "data", "Python function", "view of a Python function's", "given state",
         "v_seq", "torch"],
)  # fmt: skip
def test_computed_at_once_where_inputs_may_change_or_states_are_wanted(
    options: dict[str, Any], prepare: Callable[[FusedNode], Any], make_x: Callable[[Tensor], Tensor]
) -> None:
    node = KLIFNode(**({"step_mode": "m", "backend": "cpp"} | options))
    prepare(node)
    node(make_x(current(requires_grad=True)))
    assert type(node._memories) is dict
    assert node.v.shape == (BATCH, CHANNELS)


@pytest.mark.parametrize(
    "context",
    [torch.no_grad, torch.autograd.graph.save_on_cpu, lambda: FlopCounterMode(display=False)],
    ids=["no_grad", "saved elsewhere", "dispatch mode"],
)
def test_computed_at_once_within(context: Callable[[], Any]) -> None:
    node, x = KLIFNode(step_mode="m", backend="cpp"), computed(current(requires_grad=True))
    with context():
        node(x)
    assert type(node._memories) is dict


def test_single_steps_and_explicit_states_are_computed_at_once() -> None:
    node, x = KLIFNode(backend="cpp"), computed(current(requires_grad=True))
    node(x[0])
    assert type(node._memories) is dict
    if SPIKINGJELLY_2:
        node.step_mode = "m"
        node.reset()
        _, (v,) = base.to_functional_forward(node)((x,), (0.0,))
        node(x)
        assert_equal(v, node.v)


def test_a_written_state_is_not_computed(runs: list[bool]) -> None:
    node, x = KLIFNode(step_mode="m", backend="cpp"), computed(current(requires_grad=True))
    for _ in range(2):
        node.v = 0.0
        node(x)
    assert runs == [False, False]


USES: dict[str, Callable[[FusedNode], Any]] = {
    "named_memories": lambda node: dict(node.named_memories()),
    "memories": lambda node: list(node.memories()),
    "detach_net": functional.detach_net,
    "deepcopy": copy.deepcopy,
    "pickle": lambda node: pickle.loads(pickle.dumps(node)),
    "to": lambda node: node.to(torch.float64),
    "replica": lambda node: node._replicate_for_data_parallel(),
    "dir": dir,
    "repr": repr,
    "state_dict": lambda node: node.state_dict(),
    "failed call": lambda node: pytest.raises(TypeError, node, torch.zeros(STEPS, BATCH, CHANNELS, dtype=torch.int64)),
    "contexts": lambda node: state_contexts(node)(),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
@pytest.mark.parametrize("case", [CASES[1], Case("glif", glif)], ids=lambda case: case.name)
def test_tools_find_the_same_states(case: Case, use: Callable[[FusedNode], Any]) -> None:
    x, found = computed(current(requires_grad=True)), []
    for node in twins(case):
        node(x)
        result = use(node)
        found.append([states_of(n) for n in (node, result) if isinstance(n, FusedNode)])
        assert node.time_dependent is False or node.time_step == 0
    for actual, expected in zip(*found, strict=True):
        for name, value in expected.items():
            assert_equal(actual[name], value, name)
            assert actual[name].requires_grad == value.requires_grad


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_states_are_part_of_the_graph_wherever_they_are_read(context: Callable[[], Any]) -> None:
    node, leaf = KLIFNode(step_mode="m", backend="cpp"), current(requires_grad=True)
    node(computed(leaf))
    with context():
        v = node.v
    v.sum().backward()
    assert leaf.grad.abs().max() > 0


def test_the_cuda_kernel_without_final_states(monkeypatch: pytest.MonkeyPatch) -> None:
    emulation, found = emulate(monkeypatch), []
    for node in twins(CASES[5]):
        torch.manual_seed(1)
        leaf = current(requires_grad=True)
        spikes = node(computed(leaf))
        spikes.sum().backward()
        found.append({"spike": spikes, "gradient": leaf.grad, **states_of(node)})
    assert [name for name, _, _ in emulation.launches] == ["forward", "backward", "forward", "forward", "backward"]
    for name, value in found[1].items():
        assert_equal(found[0][name], value, name)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_states_after_the_optimizers_step_are_those_of_the_call(case: Case) -> None:
    found = []
    for node in twins(case):
        torch.manual_seed(1)
        leaf = current(requires_grad=True)
        optimizer = torch.optim.SGD([leaf, *node.parameters()], lr=0.5)
        node(computed(leaf)).sum().backward()
        optimizer.step()
        node.surrogate_function.alpha = 3.0
        found.append(node.v)
    assert_equal(*found)


def test_an_input_changed_in_place_is_noticed() -> None:
    node, x = KLIFNode(step_mode="m", backend="cpp"), computed(current(requires_grad=True))
    node(x)
    with torch.no_grad():
        x.zero_()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="changed in place"):
            _ = node.v
    node.reset()
    assert node.v == 0.0


@pytest.mark.parametrize("end", [FusedNode.reset, FusedNode.detach], ids=["reset", "detach"])
def test_the_input_is_kept_no_longer_than_needed(end: Callable[[FusedNode], None]) -> None:
    node, x = KLIFNode(step_mode="m", backend="cpp"), computed(current(requires_grad=True))
    node(x)
    kept = weakref.ref(x)
    del x
    assert kept() is not None
    end(node)
    assert kept() is None


def test_reset_to_a_tensor() -> None:
    node, x = KLIFNode(step_mode="m", backend="cpp"), computed(current(requires_grad=True))
    node.set_reset_value("v", torch.full((BATCH, CHANNELS), 0.25))
    node(x)
    node.reset()
    assert_equal(node.v, torch.full((BATCH, CHANNELS), 0.25))


@pytest.mark.parametrize("how", ["in contexts", "carried, in contexts", "reset within"])
def test_activation_checkpointing(how: str) -> None:
    found = []
    for node in twins():
        torch.manual_seed(1)
        net, leaf = nn.Sequential(nn.Linear(CHANNELS, CHANNELS), node), current(requires_grad=True)
        if how == "carried, in contexts":
            net(leaf)
        options = {} if how == "reset within" else {"context_fn": state_contexts(net)}

        def run(x: Tensor, net: nn.Module = net) -> Tensor:
            if how == "reset within":
                functional.reset_net(net)
            return net(x)

        spikes = checkpoint(run, leaf, use_reentrant=False, **options)
        assert type(node._memories) is dict
        spikes.sum().backward()
        assert isinstance(node.v, float) == (how == "reset within")  # recomputed as far as it was needed, not further
        found.append({"spike": spikes, "v": torch.as_tensor(node.v), "x": leaf.grad, "k": node.k.grad})
    for name, value in found[1].items():
        assert_equal(found[0][name], value, name)


def test_a_compiled_call_goes_on_from_pending_states() -> None:
    found = []
    for compiled in (False, True):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(CHANNELS, CHANNELS), KLIFNode(step_mode="m", backend="cpp"))
        run = torch.compile(net, backend="aot_eager", fullgraph=True) if compiled else net
        net(current())
        assert is_pending(net[1])
        spikes = run(current())
        (spikes.sum() + net[1].v.sum()).backward()
        found.append({"spike": spikes, "v": net[1].v, "weight": net[0].weight.grad})
    for name, value in found[0].items():
        assert_close(found[1][name], value, name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("case", [CASES[1], CASES[5]], ids=lambda case: case.name)
def test_other_dtypes(case: Case, dtype: torch.dtype) -> None:
    found = []
    for node in twins(case):
        torch.manual_seed(1)
        node(computed(current(dtype=dtype, requires_grad=True)))
        found.append(states_of(node))
    for name, value in found[1].items():
        assert_equal(found[0][name], value, name)
