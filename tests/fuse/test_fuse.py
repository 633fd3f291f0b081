"""fuse: a neuron on kernels is the object that it was, and computes what its own code computes."""

from __future__ import annotations

import copy
import math
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from spikingjelly.activation_based import functional, layer, monitor, neuron, surrogate
from tolerance import assert_close, assert_equal
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import klif_sj
from klif_sj import _compat, check_fused, fuse
from klif_sj.fuse.fused import Fused
from klif_sj.neuron.checkpointing import state_contexts

pytestmark = pytest.mark.usefixtures("one_thread")


def net_of(*neurons: nn.Module) -> nn.Sequential:
    parts = [part for node in neurons for part in (layer.Linear(6, 6), node)]
    net = nn.Sequential(*parts)
    functional.set_step_mode(net, "m")
    return net


def lif(**options: Any) -> neuron.LIFNode:
    return neuron.LIFNode(**options)


def current(steps: int = 4, batch: int = 3) -> Tensor:
    return torch.randn(steps, batch, 6) * 2 + 1


def results(net: nn.Module, x: Tensor) -> list[Tensor]:
    """Spikes, states and all gradients of a call."""
    x = x.clone().requires_grad_()
    net.zero_grad()
    spikes = net(x)
    (spikes * torch.linspace(-1, 1, spikes.numel()).view_as(spikes)).sum().backward()
    states = [m.v.detach() for m in net.modules() if hasattr(m, "neuronal_charge") or isinstance(m, neuron.BaseNode)]
    # In eval mode 0.0.0.0.14's neurons have no gradient.
    gradients = [torch.zeros_like(t) if t.grad is None else t.grad.clone() for t in (x, *net.parameters())]
    return [spikes.detach(), *states, *gradients]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert_equal(found[0], expected[0], "spikes")
    for a, b in zip(found[1:], expected[1:], strict=True):
        assert_close(a, b)


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "IF": neuron.IFNode,
    "LIF soft reset": lambda: lif(v_reset=None, decay_input=False, tau=3.0),
    "LIF detached, another reset": lambda: lif(v_reset=-0.2, detach_reset=True),
    "PLIF": lambda: neuron.ParametricLIFNode(init_tau=1.7, v_reset=None),
    "QIF": neuron.QIFNode,
    "EIF": neuron.EIFNode,
    "Izhikevich": lambda: neuron.IzhikevichNode(a=0.3, b=0.2),
    "KLIF": lambda: neuron.KLIFNode(scale_reset=True),
    "ATan": lambda: lif(surrogate_function=surrogate.ATan()),
    "LearnableATan": lambda: lif(surrogate_function=klif_sj.LearnableATan()),
    "LeakyKReLU": lambda: lif(surrogate_function=surrogate.LeakyKReLU()),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_upstreams_neurons_compute_the_same(make: Callable[[], nn.Module]) -> None:
    check_fused(make())


SURROGATES = [
    cls
    for cls in vars(surrogate).values()
    if isinstance(cls, type)
    and issubclass(cls, surrogate.SurrogateFunctionBase)
    and cls is not surrogate.SurrogateFunctionBase
    and cls.__name__ not in ("MultiLevelSpikeCount", "PoissonPass", "LogTailedReLU")
]
"""All but one that ILIFNode alone takes, one that is random, and one that indexes by a mask."""


@pytest.mark.parametrize("make", SURROGATES, ids=lambda cls: cls.__name__)
def test_every_surrogate_has_its_own_gradient(make: type[nn.Module]) -> None:
    node, plain = (lif(step_mode="m", surrogate_function=make()) for _ in range(2))
    if make.__name__ == "NonzeroSignLogAbs" and not _compat.SPIKINGJELLY_2:
        with pytest.raises(ValueError, match="NonzeroSignLogAbs"):  # its own gradient raises a TypeError there
            fuse(node)
        return
    fuse(node)
    x = current()
    assert_same(results(node, x), results(plain, x))


@pytest.mark.parametrize("training", [True, False])
def test_a_network_computes_the_same_over_two_calls(training: bool) -> None:
    net = net_of(lif(), neuron.IFNode(), neuron.ParametricLIFNode()).train(training)
    plain = copy.deepcopy(net)
    report = fuse(net)
    assert len(report.rows) == 3
    for _ in range(2):
        x = current()
        assert_same(results(net, x), results(plain, x))
        for part in (net, plain):
            functional.detach_net(part)


def test_a_neuron_stays_what_it_was() -> None:
    node = lif(tau=3.0)
    keys, text = node.state_dict().keys(), repr(node)
    fuse(node)
    assert isinstance(node, neuron.LIFNode)
    assert type(node).__name__ == "LIFNode"
    assert type(node).__module__ == neuron.LIFNode.__module__
    assert (node.state_dict().keys(), repr(node)) == (keys, text)
    assert node.tau == 3.0


def test_it_runs_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    node = lif(step_mode="m")
    fuse(node)
    called = []
    run = klif_sj.runtime.Call.run
    monkeypatch.setattr(klif_sj.runtime.Call, "run", lambda *args: called.append(args) or run(*args))
    node(current())
    assert len(called) == 1


def test_undo_gives_the_class_back_and_keeps_states() -> None:
    net = net_of(lif())
    report = fuse(net, keep_state=True)
    x = current()
    net(x)
    v = net[1].v
    report.undo()
    assert type(net[1]) is neuron.LIFNode
    assert net[1].v is v
    assert not [name for name in vars(net[1]) if name.startswith("_fused")]
    net(x)
    with pytest.raises(RuntimeError, match="expected a fuse to undo"):
        report.undo()


def test_undo_refuses_a_neuron_that_was_changed_since() -> None:
    node = lif()
    first = fuse(node)
    node.__class__ = neuron.LIFNode
    with pytest.raises(RuntimeError, match="left them"):
        first.undo()


def test_dry_run_changes_nothing() -> None:
    net = net_of(lif())
    report = fuse(net, dry_run=True)
    assert type(net[1]) is neuron.LIFNode
    assert "dry run" in str(report)
    assert report.rows[0].paths == ("1",)


def test_keep_state_false_starts_anew_and_keeps_nothing() -> None:
    node = lif(step_mode="m")
    report = fuse(node, keep_state=False)
    x = current()
    assert_equal(node(x), node(x))
    with pytest.raises(RuntimeError, match="was not kept"):
        _ = node.v
    node.reset()
    report.undo()
    assert node.v == 0.0


def test_keep_state_false_refuses_single_steps() -> None:
    node = lif()
    fuse(node, keep_state=False)
    with pytest.raises(ValueError, match="expected step_mode 'm'"):
        node(current()[0])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_run_kernels_too(copied: Callable[[nn.Module], nn.Module]) -> None:
    net = net_of(neuron.ParametricLIFNode())
    fuse(net)
    twin = copied(net)
    assert type(twin[1]) is type(net[1])
    x = current()
    assert_same(results(twin, x), results(net, x))


def test_a_module_is_saved_and_loaded_in_another_process(tmp_path: Any) -> None:
    net = net_of(lif())
    fuse(net)
    x = current()
    script = (
        "import sys, torch; from spikingjelly.activation_based import functional, neuron\n"
        "saved = torch.load(sys.argv[1], weights_only=False); net = saved['net']; functional.reset_net(net)\n"
        "assert isinstance(net[1], neuron.LIFNode) and type(net[1]) is not neuron.LIFNode\n"
        "assert torch.equal(net(saved['x']), saved['spikes'])"
    )
    spikes = net(x).detach()
    functional.reset_net(net)
    torch.save({"net": net, "x": x, "spikes": spikes}, tmp_path / "net.pt")
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "net.pt")], check=True)


def test_checkpoints_go_both_ways() -> None:
    fused, plain = net_of(neuron.ParametricLIFNode()), net_of(neuron.ParametricLIFNode(init_tau=3.0))
    fuse(fused)
    x = current()
    for source, target in ((plain, fused), (fused, plain)):
        with torch.no_grad():
            source[1].w.add_(0.3)
        target.load_state_dict(source.state_dict())
        assert_same(results(fused, x), results(plain, x))
        functional.reset_net(nn.ModuleList([fused, plain]))


def test_hooks_monitors_and_optimizers_go_on() -> None:
    """Whether they were there before or come later: everything is as without fuse."""
    nets = [net_of(neuron.ParametricLIFNode(store_v_seq=True))]
    nets.append(copy.deepcopy(nets[0]))
    records: list[list[Tensor]] = []
    x = current()
    for net, is_fused in zip(nets, (True, False), strict=True):
        optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
        seen: list[Tensor] = []
        net[1].register_forward_pre_hook(lambda module, inputs: (1.5 * inputs[0],))
        net[1].register_full_backward_hook(lambda module, gradients, of_spikes, seen=seen: seen.append(gradients[0]))
        if is_fused:
            fuse(net)
        net[1].register_forward_hook(lambda module, inputs, spikes: 2.0 * spikes)
        cls = neuron.ParametricLIFNode
        monitors = [
            monitor.OutputMonitor(net, cls),
            monitor.InputMonitor(net, cls),
            monitor.AttributeMonitor("v_seq", False, net, cls),
            monitor.GradInputMonitor(net, cls),
        ]
        for _ in range(3):
            optimizer.zero_grad()
            net(x.clone().requires_grad_()).mean().backward()
            optimizer.step()
            functional.reset_net(net)
        records.append([*seen, *(value for each in monitors for value in each.records), *net.parameters()])
    assert len(records[0]) == 3 * 5 + 3
    for found, expected in zip(*records, strict=True):
        assert_close(found, expected)
    assert nets[1][1].w != neuron.ParametricLIFNode().w


def test_a_shared_neuron_and_one_in_a_plain_list_are_fused_once() -> None:
    net = net_of(lif())
    net.again, net.others = net[1], [neuron.IFNode()]
    report = fuse(net)
    assert sorted(len(row.paths) for row in report.rows) == [1, 2]
    assert type(net.others[0]) is not neuron.IFNode


def test_match_and_skip() -> None:
    net = net_of(lif(), neuron.IFNode(), lif())
    report = fuse(net, match=neuron.LIFNode, skip="5")
    assert [row.paths for row in report.rows] == [("1",)]
    assert report.left_alone == {"3": "IFNode: not in match", "5": "LIFNode: skip asks for it"}


def test_states_carry_over_and_reset_and_batches_change() -> None:
    node, plain = lif(step_mode="m"), lif(step_mode="m")
    fuse(node)
    x = current()
    for _ in range(2):
        assert_equal(node(x), plain(x))
        assert_equal(node.v, plain.v)
    for part in (node, plain):
        functional.reset_net(part)
    assert node.v == 0.0
    if _compat.SPIKINGJELLY_2:  # 0.0.0.0.14 refuses another batch
        assert_equal(node(x), plain(x))
    other = current(batch=5)
    assert_equal(node(other), plain(other))


def test_given_states_are_used() -> None:
    node, plain = lif(step_mode="m", v_reset=-0.1), lif(step_mode="m", v_reset=-0.1)
    fuse(node)
    x = current()
    v = torch.rand(3, 6)
    for part in (node, plain):
        part.v = v.clone()
    assert_equal(node(x), plain(x))


@pytest.mark.parametrize("mode", ["s", "m"])
def test_v_seq_is_upstreams(mode: str) -> None:
    node, plain = (lif(step_mode=mode, store_v_seq=True) for _ in range(2))
    fuse(node)
    x = current()
    for part in (node, plain):
        for step in [x] if mode == "m" else x:
            part(step)
    if plain.v_seq is None:
        assert node.v_seq is None
    else:
        assert_equal(node.v_seq, plain.v_seq)


def test_gradients_flow_through_states_until_they_are_detached() -> None:
    node, plain = lif(step_mode="m"), lif(step_mode="m")
    fuse(node)
    for detach in (False, True):
        found = []
        for part in (node, plain):
            functional.reset_net(part)
            x = torch.full((2, 1, 4), 0.7, requires_grad=True)
            part(x)
            if detach:
                part.detach()
            part(torch.full((2, 1, 4), 0.7, requires_grad=True)).sum().backward()
            found.append(torch.zeros_like(x) if x.grad is None else x.grad)
        assert_close(found[0], found[1])
        assert bool(found[0].any()) is not detach


def test_torch_compile_takes_a_fused_network() -> None:
    net = net_of(lif(), neuron.ParametricLIFNode())
    fuse(net)
    x = current()
    expected = results(net, x)
    functional.reset_net(net)
    assert_same(results(torch.compile(net, backend="aot_eager", fullgraph=True), x), expected)


def test_the_torch_backend_is_the_neurons_own_code() -> None:
    node, plain = lif(step_mode="m"), lif(step_mode="m")
    fuse(node, backend="torch")
    x = current()
    assert_equal(node(x), plain(x))
    assert_equal(node.v, plain.v)


def test_step_mode_may_change() -> None:
    net = net_of(lif())
    fuse(net)
    x = current()
    whole = net(x)
    functional.reset_net(net)
    functional.set_step_mode(net, "s")
    assert_equal(torch.stack([net(step) for step in x]), whole)


def test_half_precision_has_float32_states() -> None:
    node = lif(step_mode="m")
    fuse(node)
    spikes = node(current().bfloat16())
    assert spikes.dtype == torch.bfloat16
    assert node.v.dtype == torch.float32
    node(current().bfloat16())


def test_a_changed_setting_counts_from_the_next_call() -> None:
    node = lif(step_mode="m")
    fuse(node)
    x = current()
    node(x)
    node.reset()
    node.v_threshold = math.inf
    assert not node(x).any()


class Halved(neuron.LIFNode):
    def single_step_forward(self, x: Tensor) -> Tensor:
        return 0.5 * super().single_step_forward(x)


class Written(neuron.LIFNode):
    def single_step_forward(self, x: Tensor) -> Tensor:
        self.v = self.v + x
        spike = self.surrogate_function(self.v - self.v_threshold)
        self.v = self.v * (1.0 - spike)
        return 0.5 * spike


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("cls", [Halved, Written])
def test_a_single_step_of_ones_own_is_run_in_every_mode(cls: type[neuron.LIFNode], training: bool) -> None:
    """SpikingJelly leaves it out in multi-step mode, on 2.x always and on 0.0.0.0.14 in eval mode."""
    node, plain = cls(step_mode="m").train(training), cls()
    (row,) = fuse(node, verify=True).rows
    assert "multi-step" in row.note if _compat.SPIKINGJELLY_2 else "eval" in row.note
    x = current()
    expected = torch.stack([plain(step) for step in x])
    assert set(expected.unique().tolist()) == {0.0, 0.5}
    assert_equal(node(x), expected)


# What cannot be fused.


class Cell(neuron.BaseNode):
    """A neuron with a charge of its own, for those that cannot be fused."""

    def neuronal_charge(self, x: Tensor) -> None:
        self.v = self.charge(x)

    def charge(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Random(Cell):
    def charge(self, x: Tensor) -> Tensor:
        return self.v + x + torch.rand_like(x)


class Mixed(Cell):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(6, 6)

    def charge(self, x: Tensor) -> Tensor:
        return self.v + self.mix(x)


class Normed(Cell):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)

    def charge(self, x: Tensor) -> Tensor:
        return self.norm(self.v + x)


class Counting(Cell):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def charge(self, x: Tensor) -> Tensor:
        self.count.add_(1.0)
        return self.v + x


class Rebinding(Counting):
    def charge(self, x: Tensor) -> Tensor:
        self.count = self.count + 1.0
        return self.v + x


class Branching(Cell):
    def charge(self, x: Tensor) -> Tensor:
        return self.v + x if self.v.sum() > 0 else x


@pytest.mark.parametrize(
    ("cls", "words"),
    [
        (Random, ["rand_like", "random numbers", "test_fuse.py", "in charge"]),
        (Mixed, ["mix", "test_fuse.py", "elementwise"]),
        (Normed, ["test_fuse.py", "self.norm"]),
        (Counting, ["count", "in place"]),
        (Rebinding, ["count", "no state", "test_fuse.py"]),
        (Branching, ["test_fuse.py", "torch.where"]),
    ],
)
def test_what_no_kernel_can_do_is_refused_by_name(cls: type[Cell], words: list[str]) -> None:
    net = net_of(cls(), lif())
    report = fuse(net)
    assert type(net[1]) is cls
    why = report.left_alone["1"]
    for word in words:
        assert word in why
    assert len(report.rows) == 1
    assert why in " ".join(str(report).split()) or "left alone" in str(report)


SHAPE_READERS: dict[str, Callable[[Tensor], Any]] = {
    "numel": lambda x: x / x.numel(),
    "dim": lambda x: 2.0 * x if x.dim() == 2 else x,
    "ndim": lambda x: 2.0 * x if x.ndim == 2 else x,
    "len of shape": lambda x: x * len(x.shape),
    "len of size": lambda x: x * len(x.size()),
    "size": lambda x: x / x.size(-1),
    "shape": lambda x: x / x.shape[-1],
    "rest of shape": lambda x: x + torch.zeros(*x.shape),
    "compared with numbers": lambda x: x if x.shape == (3, 6) else 2.0 * x,
}


@pytest.mark.skipif(torch.__version__ < "2.11", reason="an older torch crashes on a shape that refuses to be read")
@pytest.mark.parametrize("charge", SHAPE_READERS.values(), ids=SHAPE_READERS.keys())
def test_a_shape_that_is_read_in_python_is_refused(charge: Callable[[Tensor], Any]) -> None:
    """A traced step stands for inputs of all shapes."""

    class Reading(Cell):
        def charge(self, x: Tensor) -> Tensor:
            return self.v + charge(x)

    with pytest.raises(ValueError, match=r"reads the shape of its input.*\[C, 1, 1\], at test_fuse.py:\d+ in <lambda>"):
        fuse(Reading())


def test_a_shape_may_be_passed_on_and_compared_with_a_states() -> None:
    class Passing(Cell):
        def charge(self, x: Tensor) -> Tensor:
            if self.v.shape != x.shape:
                raise LookupError
            return 0.5 * self.v + x * torch.full(x.shape, 2.0) + torch.ones(x.size())

    assert check_fused(Passing())["spikes (m)"] == 0


@pytest.mark.parametrize("reduced", [lambda x: x.mean(-1, keepdim=True), lambda x: x.sum(0), lambda x: x.softmax(-1)])
def test_a_reduction_is_refused_by_its_line(reduced: Callable[[Tensor], Tensor]) -> None:
    class Inhibited(Cell):
        def charge(self, x: Tensor) -> Tensor:
            return self.v + x - reduced(x)

    with pytest.raises(ValueError, match=r"aten::\w+ of torch.float32 is no elementwise operation.* at test_fuse.py:"):
        fuse(Inhibited())


def test_a_mask_and_an_index_as_buffers() -> None:
    class Masked(Cell):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.tensor([True, False, True, True, False, False]))
            self.register_buffer("kind", torch.arange(6))
            self.register_buffer("on", torch.tensor(True))

        def charge(self, x: Tensor) -> Tensor:
            chosen = torch.where(self.mask & self.on, 0.5 * self.v + x, -x)
            return torch.where(self.kind == 3, 3.0 * x, chosen)

    assert check_fused(Masked())["spikes (m)"] == 0


def test_a_network_without_neurons_is_refused() -> None:
    with pytest.raises(ValueError, match="expected neurons to fuse, got none"):
        fuse(nn.Sequential(nn.Linear(2, 2)))


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="'x.*' matches no neuron"):
        fuse(net_of(lif()), match="x.*")


def test_a_network_on_the_meta_device_is_refused() -> None:
    with torch.device("meta"):
        net = net_of(lif())
    with pytest.raises(ValueError, match="fuse after to_empty"):
        fuse(net)


def test_what_is_no_network_is_refused() -> None:
    with pytest.raises(TypeError, match="expected a network"):
        fuse("net")


def test_our_own_and_fused_neurons_are_left_alone() -> None:
    net = net_of(klif_sj.KLIFNode(), lif(), lif())
    fuse(net, match="3")
    report = fuse(net)
    assert [row.paths for row in report.rows] == [("5",)]
    assert set(report.left_alone) == {"1", "3"}


def test_a_class_that_forbids_subclasses_is_left_alone() -> None:
    class Final(neuron.IFNode):
        def __init_subclass__(cls) -> None:
            raise TypeError("Final has no subclasses")

    net = net_of(Final(), lif())
    assert "Final has no subclasses" in fuse(net).left_alone["1"]


def test_a_class_with_a_forward_of_its_own_is_left_alone() -> None:
    class Twice(neuron.IFNode):
        def multi_step_forward(self, x_seq: Tensor) -> Tensor:
            return super().multi_step_forward(2 * x_seq)

    net = net_of(Twice(), lif())
    assert "multi_step_forward" in fuse(net).left_alone["1"]


def test_a_state_that_starts_as_none_is_named() -> None:
    class Late(Cell):
        def __init__(self) -> None:
            super().__init__()
            self.register_memory("u", None)

    assert "'u' starts as None" in fuse(net_of(Late(), lif())).left_alone["1"]


def test_an_input_of_a_wrong_type_leaves_the_states() -> None:
    node = lif(step_mode="m")
    fuse(node)
    node(current())
    v = node.v
    with pytest.raises(TypeError, match="expected a floating-point input"):
        node(current().long())
    assert node.v is v


def test_verify_refuses_a_neuron_whose_kernels_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    net = net_of(lif())
    monkeypatch.setattr(Fused, "_fused_run", lambda self, x, x_seq, mode, backend: 0.5 * x_seq)
    with pytest.raises(AssertionError, match="LIFNode: expected its kernels"):
        fuse(net, verify=True)
    assert type(net[1]) is neuron.LIFNode


def test_a_neuron_that_runs_away_is_verified_by_its_finite_values() -> None:
    class Doubling(Cell):
        def charge(self, x: Tensor) -> Tensor:
            return 1e30 * self.v * x + x

    differences = check_fused(Doubling(v_threshold=math.inf))
    assert max(differences.values()) <= 2e-5


def test_verify_is_in_the_report() -> None:
    report = fuse(net_of(neuron.ParametricLIFNode()), verify=True)
    assert set(report.rows[0].differences) >= {"spikes (m)", "v (m)", "gradient of x (m)", "gradient of w (m)"}
    assert "spikes (m) equal" in " ".join(str(report).split())
    assert report.to_dict()["neurons"][0]["parameters"] == ["w"]


def test_a_scripted_neuron_is_refused() -> None:
    net = nn.Sequential(torch.jit.trace(nn.Sequential(nn.Linear(6, 6), lif()), torch.rand(2, 6), check_trace=False))
    with pytest.raises(ValueError, match="within a TorchScript module, which is compiled as it is; fuse first"):
        fuse(net)


def test_a_neuron_in_the_middle_of_a_sequence_goes_on() -> None:
    node, plain = lif(step_mode="m"), lif(step_mode="m")
    first, second = current(), current()
    node(first)
    fuse(node)
    plain(first)
    assert_equal(node(second), plain(second))


def test_a_fused_network_trains_under_ddp(tmp_path: Any) -> None:
    net = net_of(neuron.ParametricLIFNode())
    plain, x = copy.deepcopy(net), current()
    fuse(net)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        torch.nn.parallel.DistributedDataParallel(net)(x).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    plain(x).sum().backward()
    assert bool(plain[1].w.grad)
    for found, expected in zip(net.parameters(), plain.parameters(), strict=True):
        assert_close(found.grad, expected.grad)


def test_activation_checkpointing_recomputes_from_the_same_states() -> None:
    net = net_of(lif(), neuron.ParametricLIFNode())
    fuse(net)
    first, second = current(), current()
    gradients = []
    for checkpointed in (False, True):
        functional.reset_net(net)
        net.zero_grad()
        with torch.no_grad():
            net(first)
        x = second.clone().requires_grad_()
        contexts = state_contexts(net)
        spikes = checkpoint(net, x, use_reentrant=False, context_fn=contexts) if checkpointed else net(x)
        spikes.sum().backward()
        gradients.append([x.grad, net[3].w.grad.clone(), net[3].v])
    assert bool(gradients[0][0].any())
    for found, expected in zip(*gradients, strict=True):
        assert_equal(found, expected)


def test_fused_neurons_can_be_swapped() -> None:
    net = net_of(lif(tau=3.0))
    fuse(net)
    report = klif_sj.swap_neurons(net, klif_sj.KLIFNode)
    assert type(net[1]) is klif_sj.KLIFNode
    assert net[1].tau == 3.0
    report.undo()
    assert isinstance(net[1], Fused)
