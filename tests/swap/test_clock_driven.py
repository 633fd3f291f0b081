"""Code for SpikingJelly 0.0.0.0.12, whose names are ``clock_driven`` and ``MultiStepLIFNode``, within ``patched``."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import spikingjelly
import torch
from spikingjelly.activation_based import functional, layer, neuron
from tolerance import assert_close, assert_equal
from torch import nn

from klif_sj import CLIFNode, KLIFNode, _compat, patched, swap_neurons
from klif_sj.runtime import unavailable

SPIKFORMER = """
import torch
import torch.nn as nn
from spikingjelly.clock_driven.neuron import MultiStepLIFNode
from functools import partial


class MLP(nn.Module):
    def __init__(self, in_features, hidden_features):
        super().__init__()
        self.fc1_linear = nn.Linear(in_features, hidden_features)
        self.fc1_bn = nn.BatchNorm1d(hidden_features)
        self.fc1_lif = MultiStepLIFNode(tau=2.0, detach_reset=True, backend='cupy')
        self.fc2_linear = nn.Linear(hidden_features, in_features)
        self.fc2_bn = nn.BatchNorm1d(in_features)
        self.fc2_lif = MultiStepLIFNode(tau=2.0, detach_reset=True, backend='cupy')

    def forward(self, x):
        T, B, N, C = x.shape
        x = self.fc1_linear(x.flatten(0, 1))
        x = self.fc1_bn(x.transpose(-1, -2)).transpose(-1, -2).reshape(T, B, N, -1).contiguous()
        x = self.fc1_lif(x)
        x = self.fc2_linear(x.flatten(0, 1))
        x = self.fc2_bn(x.transpose(-1, -2)).transpose(-1, -2).reshape(T, B, N, C).contiguous()
        return self.fc2_lif(x)


class SSA(nn.Module):
    def __init__(self, dim, num_heads=2):
        super().__init__()
        self.num_heads, self.scale = num_heads, 0.125
        for name in ('q', 'k', 'v'):
            setattr(self, f'{name}_linear', nn.Linear(dim, dim))
            setattr(self, f'{name}_bn', nn.BatchNorm1d(dim))
            setattr(self, f'{name}_lif', MultiStepLIFNode(tau=2.0, detach_reset=True, backend='cupy'))
        self.attn_lif = MultiStepLIFNode(tau=2.0, v_threshold=0.5, detach_reset=True, backend='cupy')

    def forward(self, x):
        T, B, N, C = x.shape
        heads = []
        for name in ('q', 'k', 'v'):
            h = getattr(self, f'{name}_linear')(x.flatten(0, 1))
            h = getattr(self, f'{name}_bn')(h.transpose(-1, -2)).transpose(-1, -2).reshape(T, B, N, C).contiguous()
            h = getattr(self, f'{name}_lif')(h)
            heads.append(h.reshape(T, B, N, self.num_heads, C // self.num_heads).permute(0, 1, 3, 2, 4).contiguous())
        q, k, v = heads
        x = ((q @ k.transpose(-2, -1)) @ v) * self.scale
        return self.attn_lif(x.transpose(2, 3).reshape(T, B, N, C).contiguous())


class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.attn, self.mlp = SSA(dim), MLP(dim, 2 * dim)

    def forward(self, x):
        x = x + self.attn(x)
        return x + self.mlp(x)
"""

PLIF_NET = """
import torch.nn as nn
from spikingjelly.clock_driven import neuron, functional, surrogate, layer


def create_conv_sequential(in_channels, out_channels):
    return nn.Sequential(
        layer.SeqToANNContainer(
            nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False), nn.BatchNorm2d(out_channels)
        ),
        neuron.MultiStepParametricLIFNode(
            init_tau=2.0, v_threshold=0.5, v_reset=None, surrogate_function=surrogate.ATan(), detach_reset=True
        ),
        layer.SeqToANNContainer(nn.MaxPool2d(2, 2)),
    )


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(create_conv_sequential(2, 4), create_conv_sequential(4, 4))
        self.fc = nn.Sequential(
            nn.Flatten(2), layer.MultiStepDropout(0.5),
            layer.SeqToANNContainer(nn.Linear(16, 10)),
            neuron.MultiStepIFNode(surrogate_function=surrogate.Sigmoid(), backend='torch'),
        )

    def forward(self, x):
        return self.fc(self.conv(x)).mean(0)


def train(net, x):
    for m in net.modules():
        if isinstance(m, neuron.BaseNode):
            assert isinstance(m, (neuron.MultiStepIFNode, neuron.MultiStepParametricLIFNode))
    loss = net(x).square().mean()
    loss.backward()
    functional.reset_net(net)
    return loss.item()
"""


def old_package() -> dict[str, ModuleType]:
    return {name: module for name, module in sys.modules.items() if name.startswith("spikingjelly.clock_driven")}


def run(source: str, name: str) -> dict[str, Any]:
    module = ModuleType(name)
    sys.modules[name] = module
    exec(compile(source, f"{name}.py", "exec"), vars(module))
    return vars(module)


@pytest.fixture(autouse=True)
def _no_leftovers() -> Iterator[None]:
    before = old_package()
    known = vars(spikingjelly).get("clock_driven"), getattr(functional, "set_backend", None)
    yield
    for name in ("spikformer", "plif_net", "published"):
        sys.modules.pop(name, None)
    assert old_package() == before
    assert (vars(spikingjelly).get("clock_driven"), getattr(functional, "set_backend", None)) == known


def test_a_spikformer_block() -> None:
    with patched(LIFNode=KLIFNode) as patch:
        block = run(SPIKFORMER, "spikformer")["Block"](8)
    nodes = [module for module in block.modules() if isinstance(module, KLIFNode)]
    assert len(nodes) == len(patch.rows) == 6
    assert {(node.step_mode, node.tau, node.detach_reset) for node in nodes} == {("m", 2.0, True)}
    assert [node.v_threshold for node in nodes] == [1.0, 1.0, 1.0, 0.5, 1.0, 1.0]
    if unavailable("cupy"):
        assert {node.backend for node in nodes} == {"auto"}
        change = patch.rows[0].of("changed")["backend"]
        assert (change.old, change.new, change.why) == ("cupy", "auto", "'cupy' cannot serve here")
    x = torch.rand(4, 2, 3, 8)
    y = block(x)
    y.sum().backward()
    assert all(p.grad is not None for p in block.parameters() if p.requires_grad)
    functional.reset_net(block)
    block(x)
    assert nodes[0].v.shape == (2, 3, 8)


def test_a_plif_net() -> None:
    with patched(ParametricLIFNode=CLIFNode, IFNode=KLIFNode):
        names = run(PLIF_NET, "plif_net")
        net = names["Net"]()
        assert names["train"](net, torch.rand(4, 2, 2, 8, 8)) > 0
    assert [type(m).__name__ for m in net.modules() if isinstance(m, neuron.BaseNode)] == ["CLIFNode"] * 2 + [
        "KLIFNode"
    ]
    assert type(net.fc[1]) is layer.Dropout
    assert net.fc[1].step_mode == "m"


def test_what_is_not_swapped_is_spikingjellys_new_class() -> None:
    with patched(IFNode=KLIFNode):
        from spikingjelly.clock_driven import layer as old_layer
        from spikingjelly.clock_driven import neuron as old_neuron

        plain = old_neuron.MultiStepLIFNode(tau=3.0, backend="torch", lava_s_cale=64)
        assert type(plain) is neuron.LIFNode
        assert (plain.tau, plain.step_mode) == (3.0, "m")
        assert isinstance(plain, old_neuron.MultiStepLIFNode)
        assert [old_layer.MultiStepDropout2d(*p).p for p in ((), (0.3,))] == [0.5, 0.3]
        assert old_layer.Dropout2d is layer.Dropout2d

        class Mine(old_neuron.MultiStepLIFNode):
            def __init__(self) -> None:
                super().__init__(tau=4.0, lava_s_cale=64)

        mine = Mine()
    assert (type(mine), mine.tau, mine.step_mode) == (Mine, 4.0, "m")
    assert isinstance(mine, neuron.LIFNode)
    x = torch.rand(4, 3) * 2
    assert_equal(mine(x), neuron.LIFNode(tau=4.0, step_mode="m")(x))


def test_a_name_that_was_not_only_renamed_says_what_to_do() -> None:
    with patched(LIFNode=KLIFNode):
        with pytest.raises(ImportError, match=r"layer\.ChannelsPool .* was not only renamed.*Port"):
            from spikingjelly.clock_driven.layer import ChannelsPool  # noqa: F401
        from spikingjelly.clock_driven import layer as old_layer

        with pytest.raises(ImportError, match=r"ConvBatchNorm2d .* was not only renamed"):
            old_layer.ConvBatchNorm2d(3, 3, 3)
        if _compat.SPIKINGJELLY_2:
            with pytest.raises(ImportError, match=r"clock_driven\.model\.train_classify .* was not only renamed"):
                from spikingjelly.clock_driven.model import train_classify  # noqa: F401
        else:
            from spikingjelly.clock_driven import model

            assert Path(model.__file__).parts[-3:-1] == ("clock_driven", "model")
    assert not hasattr(neuron, "MultiStepLIFNode")


@pytest.mark.skipif(_compat.SPIKINGJELLY_2, reason="2.x has no clock_driven of its own")
def test_the_old_package_that_was_imported_before_means_the_new_one_within_the_block() -> None:
    source = "from spikingjelly.clock_driven import neuron, layer\nfrom spikingjelly.clock_driven.neuron import *\n"
    names = run(source, "published")
    old = dict(names)
    for _ in range(2):
        with patched(LIFNode=KLIFNode):
            nodes = [names["MultiStepLIFNode"](), names["neuron"].MultiStepLIFNode(), names["LIFNode"]()]
            assert [type(node) for node in nodes] == [KLIFNode] * 3
            assert [node.step_mode for node in nodes] == ["m", "m", "s"]
            assert names["layer"].Dropout is layer.Dropout
        assert all(names[name] is value for name, value in old.items())
    net = nn.Sequential(old["MultiStepLIFNode"]())
    with pytest.raises(ValueError, match=r"0 is a MultiStepLIFNode of spikingjelly\.clock_driven.*klif_sj\.patched"):
        swap_neurons(net, KLIFNode)
    for name in old_package():
        del sys.modules[name]
    del spikingjelly.clock_driven


def test_blocks_nest() -> None:
    with patched(LIFNode=KLIFNode):
        from spikingjelly.clock_driven.neuron import MultiStepIFNode, MultiStepLIFNode

        with patched(LIFNode=CLIFNode, IFNode=KLIFNode):
            assert [type(cls()) for cls in (MultiStepLIFNode, MultiStepIFNode)] == [CLIFNode, KLIFNode]
        assert [type(cls()) for cls in (MultiStepLIFNode, MultiStepIFNode)] == [KLIFNode, neuron.IFNode]


def test_set_backend_of_0_0_0_0_14() -> None:
    with patched(LIFNode=KLIFNode):
        net = nn.Sequential(neuron.LIFNode(step_mode="m", backend="torch"), neuron.IFNode(step_mode="m"))
        assert net[0].backend == "torch"
        functional.set_backend(net, "auto", neuron.LIFNode)
        assert net[0].backend == "auto"
        if unavailable("cupy"):
            functional.set_backend(net, "cupy", neuron.LIFNode)
            assert net[0].backend == "auto"


def test_the_potential_is_the_one_that_the_old_class_had() -> None:
    x = torch.rand(4, 3, 5) * 2
    with patched(LIFNode=KLIFNode, overrides={"activation": "identity", "store_v_seq": True}):
        from spikingjelly.clock_driven.neuron import MultiStepLIFNode

        node = MultiStepLIFNode(tau=3.0, v_reset=None)
    lif = neuron.LIFNode(tau=3.0, v_reset=None, step_mode="m", store_v_seq=True)
    assert_equal(node(x), lif(x))
    assert_close(node.v_seq, lif.v_seq)


def test_an_old_script_runs_unchanged(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        PLIF_NET + "\nimport torch\nnet = Net()\nprint('loss', train(net, torch.rand(4, 2, 2, 8, 8)) > 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "klif_sj", "run", "--swap", "ParametricLIFNode=KLIFNode", str(script)],
        capture_output=True, text=True, timeout=300, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "loss True\n"
    assert "2 neurons swapped: spikingjelly.ParametricLIFNode -> klif_sj.KLIFNode" in done.stderr
