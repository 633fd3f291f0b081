"""GLIFNode before its first input, and checkpoints: its own, one of another shape, the authors'."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from tolerance import assert_close, assert_equal
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter, is_lazy
from versions import needs_compile

from klif_sj import GLIFNode
from klif_sj.neuron.glif import GATES, MEMBRANE, from_authors

T, N, C, F = 5, 2, 3, 4

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


# Before the first input


CLONES: dict[str, Callable] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
}


@pytest.mark.parametrize("given", [{}, {"T": T}, {"inplane": C}, {"T": T, "inplane": C}], ids=str)
def test_shapes_are_read_from_the_first_input(given: dict) -> None:
    lazy = GLIFNode(**given)
    assert lazy.has_uninitialized_params() == (len(given) < 2)
    torch.manual_seed(0)
    full = GLIFNode(T, C)
    x = torch.randn(T, N, C, F)
    torch.manual_seed(0)
    if len(given) == 2:
        lazy.load_state_dict(full.state_dict())
    assert_equal(lazy(x), full(x))
    assert (lazy.T, lazy.inplane) == (T, C)
    assert type(lazy) is GLIFNode
    for name, parameter in full.named_parameters():
        assert type(getattr(lazy, name)) is nn.Parameter
        assert_equal(getattr(lazy, name), parameter, name)


def test_a_single_step_tells_the_channels() -> None:
    node = GLIFNode(T, step_mode="s", channel_dim=2)
    node(torch.randn(N, F, C))
    assert (node.T, node.inplane) == (T, C)


@pytest.mark.parametrize("clone", CLONES.values(), ids=CLONES)
def test_copies_before_and_after_the_first_input(clone: Callable) -> None:
    node, x = GLIFNode(), torch.randn(T, N, C)
    twin = clone(node)
    assert all(type(parameter) is UninitializedParameter for parameter in twin.parameters())
    node(x)
    assert twin.has_uninitialized_params()
    twin(torch.randn(T + 1, N, C + 1))
    assert (twin.T, twin.inplane, node.T, node.inplane) == (T + 1, C + 1, T, C)
    after = clone(node)
    node.reset()
    after.reset()
    assert_equal(after(x), node(x))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])])
def test_moving_and_casting_before_the_first_input(device: str) -> None:
    node = GLIFNode().to(device, torch.float64)
    assert node.has_uninitialized_params()
    node(torch.randn(T, N, C, device=device, dtype=torch.float64))
    assert {(p.dtype, p.device.type) for p in node.parameters()} == {(torch.float64, device)}


def saved_and_loaded(state_dict: dict) -> dict:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_a_checkpoint_gives_a_lazy_node_its_shapes_and_values() -> None:
    source, x = nn.Sequential(GLIFNode(T, C, init_tau=0.4, init_conduct=0.7)), torch.randn(T, N, C)
    net = nn.Sequential(GLIFNode())
    net.load_state_dict(saved_and_loaded(source.state_dict()), strict=True)
    assert (net[0].T, net[0].inplane) == (T, C)
    assert_equal(net(x), source(x))
    for name, parameter in source[0].named_parameters():
        assert_equal(getattr(net[0], name), parameter, name)


def test_a_checkpoint_of_a_lazy_node_leaves_another_lazy() -> None:
    node = GLIFNode()
    node.load_state_dict(saved_and_loaded(GLIFNode().state_dict()), strict=True)
    assert node.has_uninitialized_params()
    node(torch.randn(T, N, C))
    with pytest.raises(RuntimeError, match="uninitialized parameter"):
        node.load_state_dict(GLIFNode().state_dict())


def test_a_partial_checkpoint_keeps_what_it_gave() -> None:
    node, conduct = GLIFNode(), torch.rand(T, C)
    node.load_state_dict({"conduct": conduct}, strict=False)
    node(torch.randn(T, N, C))
    assert_equal(node.conduct.detach(), conduct)
    assert_close(torch.sigmoid(node.tau), torch.full((C,), 0.25))


def test_an_optimizer_before_the_first_input_works_as_with_torchs_own_lazy_modules() -> None:
    net = nn.Sequential(nn.LazyLinear(C), GLIFNode())
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    net(torch.randn(T, N, F)).sum().backward()
    before = [parameter.detach().clone() for parameter in net.parameters()]
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_what_an_uninitialised_node_cannot_do_says_so() -> None:
    node = GLIFNode()
    with pytest.raises(RuntimeError, match=r"uninitialized parameters can't be used with `DataParallel`"):
        node._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match="uninitialized parameter"):
        node.multi_step_forward(torch.randn(T, N, C))
    node(torch.randn(T, N, C))
    assert node._replicate_for_data_parallel().T == T


@needs_compile
@pytest.mark.parametrize("options", [{}, {"T": T, "inplane": C}], ids=["lazy", "known"])
def test_compile_from_the_first_call(options: dict) -> None:
    torch._dynamo.reset()
    net, x = nn.Sequential(nn.Identity(), GLIFNode(**options, backend="torch")), torch.randn(T, N, C)
    spike = torch.compile(net, fullgraph=True, backend="aot_eager")(x)
    spike.sum().backward()
    assert net[1].conduct.grad.shape == (T, C)
    net[1].reset()
    assert_equal(spike, net(x))


def test_first_inputs_that_tell_too_little_are_refused() -> None:
    for node, x, message in [
        (GLIFNode(step_mode="s"), torch.randn(N, C), r"number of time steps.*build the neuron with T="),
        (GLIFNode(T), torch.randn(T, N), r"channels in dimension 1 of a step's input, got a step of shape \(2,\)"),
        (GLIFNode(), torch.randn(T), r"expected an input \[T, N, \*\].*got shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            node(x)
        assert node.has_uninitialized_params()
        assert (node.v, node.spike, node.time_step) == (0.0, 0.0, 0)


# Checkpoints that do not fit


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"T": T + 1}, rf"'1': expected a checkpoint of T = {T + 1} time steps, got one of T = {T}"),
        ({"T": T + 1, "inplane": C}, rf"expected a checkpoint of T = {T + 1} time steps, got one of T = {T}"),
        ({"T": T, "inplane": C + 1}, rf"expected a checkpoint of inplane = {C + 1}, got one of inplane = {C}"),
        ({"T": T, "inplane": None}, rf"expected a checkpoint of inplane = None, got one of inplane = {C}"),
        ({"time_wise": True}, rf"expected 'tau' of shape \({T}, {C}\) for T = {T}.*got \({C},\)"),
        ({"gates": "none"}, r'Unexpected key\(s\) in state_dict: "1.alpha"'),
    ],
    ids=str,
)
def test_checkpoints_that_do_not_fit_are_refused(target: dict, message: str) -> None:
    source = nn.Sequential(nn.Identity(), GLIFNode(T, C))
    node = GLIFNode(**target)
    before = {name: None if is_lazy(p) else p.clone() for name, p in node.named_parameters()}
    with pytest.raises(RuntimeError, match=message):
        nn.Sequential(nn.Identity(), node).load_state_dict(source.state_dict())
    if "gates" in target:
        return  # torch loads the keys that it knows before it complains of the others
    for name, parameter in node.named_parameters():
        assert is_lazy(parameter) if before[name] is None else torch.equal(parameter, before[name])


def test_a_layer_wise_checkpoint_is_no_channel_wise_one() -> None:
    with pytest.raises(RuntimeError, match="expected a checkpoint of inplane = 'lazy', got one of inplane = None"):
        GLIFNode().load_state_dict(GLIFNode(T, None).state_dict())


# The authors' checkpoints


def authors_neuron(prefix: str, *names: str) -> dict[str, Tensor]:
    return {prefix + name: torch.randn((T, C) if name == "conduct" else C) for name in names}


AUTHORS = ("alpha", "beta", "gamma", "tau", "Vth", "leak", "reVth", "conduct")


def test_a_network_of_the_authors_loads() -> None:
    net = nn.Sequential()
    net.append(nn.Linear(F, C))
    net.append(nn.Sequential(GLIFNode(), nn.Linear(C, C)))
    theirs = {f"0.{k}": v for k, v in nn.Linear(F, C).state_dict().items()} | authors_neuron("1.0.", *AUTHORS)
    theirs |= {f"1.1.{k}": v for k, v in nn.Linear(C, C).state_dict().items()}
    state_dict, unmapped = from_authors(theirs)
    assert unmapped == {}
    net.load_state_dict(state_dict, strict=True)
    for ours, name in zip(
        (*GATES, *MEMBRANE), ("alpha", "beta", "gamma", "tau", "Vth", "leak", "reVth", "conduct"), strict=True
    ):
        assert_equal(getattr(net[1][0], ours).detach(), theirs[f"1.0.{name}"], ours)
    assert_equal(net[1][1].weight.detach(), theirs["1.1.weight"])


def test_what_cannot_be_mapped_is_reported() -> None:
    state_dict, unmapped = from_authors(
        authors_neuron("gateless.", "gamma", "tau", "Vth", "leak", "reVth", "conduct")
        | authors_neuron("static.", "alpha", "beta", "gamma")
        | authors_neuron("odd.", *AUTHORS, "mask")
    )
    assert set(state_dict) == {
        *(f"gateless.{name}" for name in MEMBRANE),
        *(f"static.{name}" for name in GATES),
        *(f"odd.{name}" for name in (*GATES, *MEMBRANE)),
    }
    assert set(unmapped) == {"gateless.gamma", "odd.mask", *(f"static.{name}" for name in MEMBRANE)}
    assert "GLIF_f" in unmapped["gateless.gamma"]
    assert "no parameter of GLIFNode" in unmapped["odd.mask"]
    assert "'Vth'" in unmapped["static.v_threshold"]
    GLIFNode(gates="none").load_state_dict(from_authors(authors_neuron("", *AUTHORS[2:])).state_dict, strict=True)


def test_a_state_dict_without_glif_neurons_is_refused() -> None:
    with pytest.raises(ValueError, match=r"GLIF parameters.*reVth.*got keys \['weight', 'bias'\]"):
        from_authors(nn.Linear(2, 2).state_dict())
