"""swap_neurons: what is kept, wherever a neuron sits, and that it can be undone."""

from __future__ import annotations

import math
from collections import OrderedDict, namedtuple
from typing import Any

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from tolerance import assert_equal
from torch import Tensor, nn

from klif_sj import CLIFNode, FusedNode, GLIFNode, KLIFNode, LearnableATan, swap_neurons
from klif_sj.swap.neuron_settings import SPIKING_NEURONS

BOTH_LINES = ("IFNode", "LIFNode", "ParametricLIFNode", "KLIFNode")
NEW = (KLIFNode, CLIFNode, GLIFNode)
Pair = namedtuple("Pair", ["neuron", "name"])


def upstream(name: str, **options: Any) -> nn.Module:
    return SPIKING_NEURONS[name](**options)


class Net(nn.Module):
    """Neurons in every kind of place."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(layer.Linear(6, 5), neuron.LIFNode(tau=3.0))
        self.container = layer.SeqToANNContainer(nn.Linear(5, 5), nn.ReLU())
        self.multi = layer.MultiStepContainer(nn.Linear(5, 5), neuron.LIFNode())
        self.attribute = neuron.LIFNode(v_threshold=0.5)
        self.listed = nn.ModuleList([neuron.IFNode(), nn.Identity()])
        self.named = nn.ModuleDict({"a": neuron.ParametricLIFNode(init_tau=4.0)})
        self.shared = self.attribute
        self.plain_list = [self.attribute, neuron.LIFNode()]
        self.plain_dict = {"deep": [{"deeper": self.first[1]}]}
        self.plain_tuple = (1, (self.attribute, None))
        self.pair = Pair(self.attribute, "x")

    def neurons(self) -> list[nn.Module]:
        return [
            self.first[1], self.multi[1], self.attribute, self.listed[0], self.named["a"], self.shared,
            self.plain_list[0], self.plain_list[1], self.plain_dict["deep"][0]["deeper"], self.plain_tuple[1][0],
            self.pair.neuron,
        ]  # fmt: skip


@pytest.mark.parametrize("new", NEW)
def test_a_neuron_is_swapped_wherever_it_sits_and_stays_shared(new: type) -> None:
    net = Net()
    old = net.neurons()
    report = swap_neurons(net, new)
    now = net.neurons()
    assert {type(node) for node in now} == {new}
    assert len({id(node) for node in now}) == len({id(node) for node in old}) == len(report.rows) == 6
    groups = {}
    for before, after in zip(old, now, strict=True):
        assert groups.setdefault(id(before), after) is after
    assert isinstance(net.pair, Pair)
    assert net.pair.name == "x"
    assert isinstance(net.plain_tuple, tuple)
    paths = {path for row in report.rows for path in row.paths}
    assert {"first.1", "multi.1", "attribute", "shared", "listed.0", "named.a", "plain_list[1]"} <= paths
    assert {"plain_dict['deep'][0]['deeper']", "plain_tuple[1][0]", "pair[0]", "plain_list[0]"} <= paths
    (shared,) = [row for row in report.rows if "attribute" in row.paths]
    assert set(shared.paths) == {"attribute", "shared", "plain_list[0]", "plain_tuple[1][0]", "pair[0]"}


@pytest.mark.parametrize("new", NEW)
def test_undo_puts_back_the_very_same_objects(new: type) -> None:
    net = Net()
    old, containers = net.neurons(), (net.plain_tuple, net.pair, net.plain_list)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    attributes = [{name: value for name, value in vars(node).items() if name != "_modules"} for node in old]
    report = swap_neurons(net, new)
    functional.set_step_mode(net.first, "m")
    net.first(torch.randn(2, 3, 6)).sum().backward()
    report.undo()
    assert all(now is before for now, before in zip(net.neurons(), old, strict=True))
    assert (net.plain_tuple, net.pair, net.plain_list) == containers
    assert net.plain_tuple is containers[0]
    assert net.pair is containers[1]
    assert net.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert [{name: value for name, value in vars(node).items() if name != "_modules"} for node in old] == attributes
    with pytest.raises(RuntimeError, match="undone already"):
        report.undo()


def test_undo_refuses_a_network_that_has_changed_since() -> None:
    net = nn.Sequential(neuron.LIFNode(), neuron.LIFNode())
    first = swap_neurons(net, KLIFNode)
    second = swap_neurons(net, CLIFNode, match="1")
    with pytest.raises(RuntimeError, match="others at 1"):
        first.undo()
    assert [type(node) for node in net] == [KLIFNode, CLIFNode]
    second.undo()
    first.undo()
    assert [type(node) for node in net] == [neuron.LIFNode] * 2


def test_dry_run_changes_nothing() -> None:
    net = Net()
    old, state = net.neurons(), torch.random.get_rng_state()
    attributes = [dict(vars(node)) for node in old]
    report = swap_neurons(net, GLIFNode, dry_run=True, T=4, inplane=5)
    assert report.dry_run
    assert all(now is before for now, before in zip(net.neurons(), old, strict=True))
    assert [dict(vars(node)) for node in old] == attributes
    assert torch.equal(torch.random.get_rng_state(), state)
    assert "dry run" in str(report)
    with pytest.raises(RuntimeError, match="dry run"):
        report.undo()
    done = swap_neurons(net, GLIFNode, T=4, inplane=5)
    assert done.to_dict()["neurons"][0]["paths"] == report.to_dict()["neurons"][0]["paths"]


SETTINGS = {
    "v_threshold": 0.7, "v_reset": None, "detach_reset": True, "step_mode": "m", "store_v_seq": True,
}  # fmt: skip


@pytest.mark.parametrize("name", BOTH_LINES)
@pytest.mark.parametrize("new", [KLIFNode, CLIFNode])
def test_settings_are_kept(name: str, new: type) -> None:
    options = dict(SETTINGS, surrogate_function=surrogate.Erf(alpha=3.0))
    if name != "IFNode":
        options |= {"init_tau" if name == "ParametricLIFNode" else "tau": 5.0, "decay_input": False}
    old = upstream(name, **options)
    net = nn.Sequential(old).eval()
    (row,) = swap_neurons(net, new).rows
    node = net[0]
    assert type(node) is new
    for setting, value in SETTINGS.items():
        assert getattr(node, setting) == value
        assert row.of("kept")[setting].new == value
    assert node.surrogate_function is old.surrogate_function
    assert not node.training
    assert node.decay_input is False
    assert node.tau == (2.0 if name == "IFNode" else pytest.approx(5.0, rel=1e-6))
    assert not row.of("overridden")


@pytest.mark.parametrize("name", BOTH_LINES)
def test_backend_is_kept_where_there_is_one(name: str) -> None:
    old = upstream(name)
    net = nn.Sequential(old)
    (row,) = swap_neurons(net, KLIFNode).rows
    if hasattr(old, "backend"):
        assert net[0].backend == old.backend == "torch"
        assert "auto" in row.of("kept")["backend"].why
    else:
        assert net[0].backend == "auto"
        assert "backend" in row.of("added")
    swap_neurons(net, CLIFNode, backend="torch")
    assert net[0].backend == "torch"
    swap_neurons(net, neuron.LIFNode)
    assert type(net[0]) is neuron.LIFNode


def test_a_learned_tau_is_kept_and_said_to_be_fixed() -> None:
    net = nn.Sequential(neuron.ParametricLIFNode(init_tau=2.0))
    with torch.no_grad():
        net[0].w.fill_(-1.3)
    (row,) = swap_neurons(net, KLIFNode).rows
    assert net[0].tau == pytest.approx(1 + math.exp(1.3), rel=1e-7)
    change = row.of("changed")["learn_tau"]
    assert (change.old, change.new) == (True, False)
    assert row.removed_keys == ("0.w",)
    assert row.added_keys == ("0.k",)
    swap_neurons(net, neuron.ParametricLIFNode)
    assert net[0].w.item() == pytest.approx(-1.3, rel=1e-6)


def test_what_changes_its_meaning_is_a_row_of_its_own() -> None:
    net = nn.Sequential(neuron.LIFNode(v_reset=-0.1), neuron.IFNode(), neuron.LIFNode(v_reset=0.2))
    below, leaky, _ = swap_neurons(net, KLIFNode).rows
    assert {"activation", "v_reset"} == below.of("changed").keys()
    assert "below 0" in below.of("changed")["v_reset"].why
    assert leaky.of("changed")["tau"].old == math.inf
    assert leaky.of("changed")["tau"].new == 2.0
    assert leaky.of("kept")["decay_input"].new is False
    identity, _, _ = swap_neurons(net, KLIFNode, activation="identity").rows
    assert not identity.of("dropped")
    swap_neurons(net, neuron.LIFNode)
    *_, clif = swap_neurons(net, CLIFNode).rows
    assert clif.of("kept")["v_reset"].new == 0.2
    swap_neurons(net, neuron.LIFNode)
    *_, glif = swap_neurons(net, GLIFNode).rows
    assert "learns its reset" in glif.of("dropped")["v_reset"].why
    assert glif.of("changed")["v_threshold"].old == 1.0


def test_lif_without_leak_is_no_change_for_if() -> None:
    net = nn.Sequential(neuron.IFNode())
    (row,) = swap_neurons(net, KLIFNode, activation="identity", tau=2.0**100).rows
    assert not row.of("changed")
    assert row.of("overridden")["tau"].new == 2.0**100


def test_glif_starts_from_the_leak_and_the_threshold_where_it_can() -> None:
    net = nn.Sequential(neuron.LIFNode(tau=4.0, v_threshold=0.3), neuron.LIFNode(tau=4.0, v_threshold=1.5))
    swap_neurons(net, GLIFNode, T=3, inplane=None)
    assert net[0].tau.sigmoid().item() == pytest.approx(0.75, rel=1e-6)
    assert [node.v_threshold.sigmoid().item() for node in net] == pytest.approx([0.3, 0.5], rel=1e-6)


def test_surrogates_are_kept_and_copied_where_they_learn() -> None:
    fixed, learned = surrogate.ATan(alpha=3.0), LearnableATan(k=1.5)
    net = nn.Sequential(*(neuron.LIFNode(surrogate_function=f) for f in (fixed, fixed, learned, learned)))
    state = {name: value.clone() for name, value in net.state_dict().items()}
    swap_neurons(net, KLIFNode)
    assert net[0].surrogate_function is net[1].surrogate_function is fixed
    assert len({id(f) for f in (net[2].surrogate_function, net[3].surrogate_function, learned)}) == 3
    assert net[2].surrogate_function.k.item() == 1.5
    assert {name for name in net.state_dict() if name in state} == state.keys()
    given = LearnableATan(k=2.0)
    swap_neurons(net, KLIFNode, surrogate_function=given)
    assert len({id(node.surrogate_function) for node in net} | {id(given)}) == 5
    assert all(node.surrogate_function.k.item() == 2.0 for node in net)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("new", NEW)
def test_dtype_follows_the_network(new: type, dtype: torch.dtype) -> None:
    net = nn.Sequential(layer.Linear(4, 4), neuron.ParametricLIFNode(), neuron.LIFNode()).to(dtype)
    functional.set_step_mode(net, "m")
    swap_neurons(net, new, backend="torch")
    assert net(torch.randn(2, 3, 4, dtype=dtype)).dtype == dtype
    assert {parameter.dtype for parameter in net.parameters()} == {dtype}


def test_dtype_is_that_of_the_layer_before() -> None:
    net = nn.Sequential(layer.Linear(2, 2).double(), neuron.LIFNode(), layer.Linear(2, 2), neuron.LIFNode())
    swap_neurons(net, KLIFNode)
    assert [net[i].k.dtype for i in (1, 3)] == [torch.float64, torch.float32]


def test_hooks_go_on_working_and_their_handles_remove_them() -> None:
    net = nn.Sequential(neuron.LIFNode(step_mode="m"))
    calls: list[str] = []
    handles = [
        net[0].register_forward_pre_hook(lambda module, args: calls.append("pre")),
        net[0].register_forward_hook(lambda module, args, kwargs, out: calls.append("post"), with_kwargs=True),
        net[0].register_full_backward_hook(lambda module, grad_in, grad_out: calls.append("backward")),
        net[0].register_state_dict_pre_hook(lambda module, prefix, keep: calls.append("save")),
    ]
    (row,) = swap_neurons(net, KLIFNode).rows
    assert row.of("kept")["hooks"].new == 4
    net(torch.randn(2, 3, requires_grad=True)).sum().backward()
    net.state_dict()
    assert calls == ["pre", "post", "backward", "save"]
    for handle in handles:
        handle.remove()
    functional.reset_net(net)
    net(torch.randn(2, 3, requires_grad=True)).sum().backward()
    net.state_dict()
    assert len(calls) == 4


def test_hooks_that_cannot_be_shared_or_kept_are_reported() -> None:
    class Watcher(neuron.LIFNode):
        seen = 0

        def look(self, module: nn.Module, args: Any) -> None:
            self.seen += 1

    node = Watcher(step_mode="m")
    node.register_forward_pre_hook(node.look)
    calls = []
    node.register_forward_pre_hook(lambda module, args: calls.append(type(module)))
    net = nn.Sequential(node)
    (row,) = swap_neurons(net, GLIFNode, match=neuron.LIFNode, inplane=None).rows
    assert "act on the old neuron" in row.of("dropped")["bound hooks"].why
    assert "no longer remove" in row.of("changed")["hook handles"].why
    net(torch.randn(2, 3))
    assert calls == [GLIFNode]
    assert node.seen == 0


def test_selectors() -> None:
    class Mine(neuron.LIFNode):
        pass

    def build() -> nn.Sequential:
        return nn.Sequential(
            OrderedDict(a=neuron.LIFNode(), b=neuron.IFNode(), inner=nn.Sequential(Mine(), neuron.LIFNode()), q=Mine())
        )

    def swapped(**selectors: Any) -> list[str]:
        return [path for row in swap_neurons(build(), KLIFNode, **selectors).rows for path in row.paths]

    assert swapped() == ["a", "b", "inner.1"]
    assert swapped(match=neuron.LIFNode) == ["a", "inner.0", "inner.1", "q"]
    assert swapped(match="inner.*") == ["inner.0", "inner.1"]
    assert swapped(match=["b", Mine]) == ["b", "inner.0", "q"]
    assert swapped(match=lambda path, node: path.endswith("0")) == ["inner.0"]
    assert swapped(skip="inner.1") == ["a", "b"]
    assert swapped(match=neuron.BaseNode, skip=[Mine, "a"]) == ["b", "inner.1"]
    report = swap_neurons(build(), KLIFNode, skip="a")
    assert report.left_alone.keys() == {"a", "inner.0", "q"}
    assert "skip" in report.left_alone["a"]
    assert "name it in match" in report.left_alone["q"]


def test_what_is_out_of_sight_is_said() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.neuron = neuron.LIFNode()
            self.hidden = [nn.Sequential(neuron.LIFNode())]
            self.seen = [neuron.LIFNode()]

    net = Holder()
    report = swap_neurons(net, KLIFNode)
    assert "no registered sub-module" in report.left_alone["hidden[0]"]
    assert type(net.hidden[0][0]) is neuron.LIFNode
    assert "parameters()" in report.rows[1].of("changed")["registered"].why
    assert report.added_keys == ["neuron.k"]


def test_own_neurons_and_user_neurons_can_be_swapped() -> None:
    class Plain(FusedNode):
        def neuronal_charge(self, x: Tensor) -> None:
            self.v = self.v + x

    net = nn.Sequential(KLIFNode(tau=3.0, init_k=1.5, k_bounds=(1.0, 2.0), learn_k=False, scale_reset=True), Plain())
    swap_neurons(net, KLIFNode, backend="torch")
    assert net[0].k.item() == 1.5
    assert not net[0].k.requires_grad
    assert (net[0].k_bounds, net[0].tau, net[0].scale_reset, net[0].backend) == ((1.0, 2.0), 3.0, True, "torch")
    (row,) = swap_neurons(net, Plain, match="0").rows
    assert row.of("dropped").keys() >= {"k", "tau", "scale_reset"}
    swap_neurons(net, CLIFNode, match=Plain)
    assert [type(node) for node in net] == [CLIFNode] * 2


def test_keep_false_takes_the_new_neurons_defaults() -> None:
    net = nn.Sequential(neuron.LIFNode(tau=7.0, v_threshold=0.3, step_mode="m", store_v_seq=True)).eval()
    (row,) = swap_neurons(net, CLIFNode, keep=False).rows
    assert (net[0].tau, net[0].v_threshold, net[0].v_reset) == (2.0, 1.0, None)
    assert (net[0].step_mode, net[0].store_v_seq, net[0].training) == ("m", True, False)
    assert "keep=False" in row.of("changed")["tau"].why


@pytest.mark.parametrize("new", NEW)
def test_without_states_a_swapped_network_computes_what_it_does_when_it_is_reset(new: type) -> None:
    def outcome(net: nn.Module, reset: bool) -> list[Tensor]:
        spikes = []
        for _ in range(2):
            spikes.append(net(x))
            if reset:
                functional.reset_net(net)
        torch.stack(spikes).square().sum().backward()
        return [*spikes, *(p.grad for p in net.parameters() if p.grad is not None)]

    x, weight = torch.rand(3, 2, 6) + 0.5, torch.rand(5, 6)
    found = []
    for keep in (True, False):
        net = nn.Sequential(layer.Linear(6, 5, bias=False), neuron.LIFNode())
        net[0].load_state_dict({"weight": weight})
        functional.set_step_mode(net, "m")
        (row,) = swap_neurons(net, new, keep_state=keep).rows
        assert str(row.of("overridden")["keep_state"]) == f"keep_state={keep}"
        torch.manual_seed(0)  # GLIF draws its parameters in the first call
        found.append(outcome(net, reset=keep))
    assert found[0][0].any()
    for actual, expected in zip(found[1], found[0], strict=True):
        assert_equal(actual, expected)


def test_keep_state_belongs_to_how_a_neuron_runs() -> None:
    net = nn.Sequential(KLIFNode(step_mode="m", keep_state=False))
    (row,) = swap_neurons(net, CLIFNode, keep=False).rows
    assert row.of("kept")["keep_state"].new is net[0].keep_state is False
    (row,) = swap_neurons(net, neuron.LIFNode).rows
    assert str(row.of("changed")["keep_state"]) == "keep_state: False -> True: LIFNode cannot take it"
    with pytest.raises(TypeError, match="LIFNode has no parameter 'keep_state'"):
        swap_neurons(net, neuron.LIFNode, keep_state=False)
    with pytest.raises(TypeError, match="keep_state: expected True or False, got 1"):
        swap_neurons(net, CLIFNode, keep_state=1)


@pytest.mark.parametrize("within", ["whole", "outer", "part"])
def test_reset_net_resets_the_new_neurons(within: str) -> None:
    part = nn.Sequential(neuron.LIFNode(step_mode="m"))
    net = nn.Sequential(part)
    outer = nn.Sequential(net)
    reset = {"whole": net, "outer": outer, "part": part}[within]
    functional.reset_net(reset)
    report = swap_neurons(net, KLIFNode)
    net(torch.ones(3, 2))
    assert isinstance(part[0].v, Tensor)
    functional.reset_net(reset)
    assert part[0].v == 0.0
    report.undo()
    net(torch.ones(3, 2) * 0.1)
    functional.reset_net(reset)
    assert part[0].v == 0.0


def test_states_are_not_carried_over_and_that_is_said() -> None:
    net = nn.Sequential(neuron.LIFNode())
    net(torch.ones(2, 3))
    (row,) = swap_neurons(net, KLIFNode).rows
    assert row.of("dropped")["state"].old == "v"
    assert net[0].v == 0.0


def test_what_was_set_from_outside_is_reported() -> None:
    net = nn.Sequential(neuron.LIFNode())
    net[0].nickname = "left"
    net[0].register_buffer("mask", torch.ones(2))
    (row,) = swap_neurons(net, KLIFNode).rows
    assert {"nickname", "mask"} <= row.of("dropped").keys()


def test_precision_conversion_is_reported_as_dropped() -> None:
    net = nn.Sequential(neuron.LIFNode(step_mode="m"))
    net[0]._neuron_precision = ("fp16", "fp32", "fp32")
    (row,) = swap_neurons(net, KLIFNode).rows
    assert row.of("dropped")["precision"].old == ("fp16", "fp32", "fp32")
