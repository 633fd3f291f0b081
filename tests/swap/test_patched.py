"""patched: names mean other neurons within a block, and what they meant before after it, whatever happens."""

from __future__ import annotations

import copy
import inspect
import pickle
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from spikingjelly.activation_based import neuron, surrogate
from spikingjelly.activation_based.model import spiking_resnet
from spikingjelly.activation_based.neuron import LIFNode
from torch import nn

import klif_sj
from klif_sj import CLIFNode, GLIFNode, KLIFNode, patched
from klif_sj.fuse import own_class
from klif_sj.models.neurons import neuron_factory

LIF, IF = neuron.LIFNode, neuron.IFNode
LIFNode_by_another_name = LIFNode


def originals() -> tuple[type, type]:
    """The classes themselves, kept where patched does not look."""
    return ORIGINALS["LIF"], ORIGINALS["IF"]


ORIGINALS = {"LIF": neuron.LIFNode, "IF": neuron.IFNode}


@pytest.fixture(autouse=True)
def _nothing_stays_patched() -> Iterator[None]:
    before = bindings()
    yield
    assert bindings() == before


def bindings() -> dict[str, int]:
    """Every name of a neuron class in every module."""
    return {
        f"{key}.{name}": id(value)
        for key, module in [*sys.modules.items()]
        if isinstance(module, types.ModuleType)
        for name, value in [*vars(module).items()]
        if type(value) is not type(sys) and id(value) in {id(cls) for cls in ORIGINALS.values()}
    }


def test_code_builds_the_new_neuron_under_every_name() -> None:
    with patched(LIFNode=KLIFNode, IFNode=CLIFNode) as patch:
        built = [neuron.LIFNode(), LIFNode(), LIF(), LIFNode_by_another_name(), neuron.IFNode(), IF()]
        assert [type(node) for node in built] == [KLIFNode] * 4 + [CLIFNode] * 2
    assert (neuron.LIFNode, LIFNode, LIF, LIFNode_by_another_name) == (originals()[0],) * 4
    assert type(neuron.LIFNode()) is type(LIFNode()) is originals()[0]
    expected = {f"{__name__}.{name}" for name in ("LIF", "IF", "LIFNode", "LIFNode_by_another_name")}
    assert expected <= set(patch.names)
    assert "spikingjelly.activation_based.neuron.LIFNode" in patch.names
    assert not any(name.startswith("klif_sj.") for name in patch.names)


def test_arguments_are_those_of_the_old_neuron() -> None:
    """By position too, where the new neuron's come in another order, and with the old one's defaults."""
    atan = surrogate.ATan()
    with patched(LIFNode=KLIFNode, ParametricLIFNode=KLIFNode):
        node = LIFNode(3.0, False, 0.5, None, atan, True, "m")
        assert (node.tau, node.decay_input, node.v_threshold, node.v_reset) == (3.0, False, 0.5, None)
        assert (node.surrogate_function, node.detach_reset, node.step_mode) == (atan, True, "m")
        assert type(LIFNode().surrogate_function) is surrogate.Sigmoid
        assert neuron.ParametricLIFNode(init_tau=4.0).tau == pytest.approx(4.0)
        with pytest.raises(TypeError, match="unexpected keyword"):
            LIFNode(taau=3.0)
        with pytest.raises(AssertionError):
            LIFNode(tau=0.5)


def test_overrides_go_to_every_new_neuron() -> None:
    with patched(LIFNode=KLIFNode, IFNode=KLIFNode, overrides={"tau": 4.0, "k": 2.0}) as patch:
        assert [(node.tau, node.k.item()) for node in (LIFNode(tau=3.0), IF())] == [(4.0, 2.0)] * 2
    assert [row.of("overridden")["tau"].new for row in patch.report.rows] == [4.0, 4.0]
    assert patch.report.rows[0].of("overridden")["tau"].old == 3.0


def test_keep_state_is_an_override() -> None:
    with patched(LIFNode=KLIFNode, overrides={"keep_state": False}) as patch:
        assert LIFNode().keep_state is False
    assert "overridden  keep_state=False" in str(patch.report)


def test_a_model_of_the_zoo_and_its_report() -> None:
    with patched(LIFNode=KLIFNode) as patch:
        net = spiking_resnet.spiking_resnet18(spiking_neuron=neuron.LIFNode, tau=3.0)
    nodes = [module for module in net.modules() if isinstance(module, neuron.BaseNode)]
    assert {type(node) for node in nodes} == {KLIFNode}
    assert {node.tau for node in nodes} == {3.0}
    assert len(patch.report.rows) == len(nodes) == 17
    assert str(patch.report).startswith("17 neurons swapped: spikingjelly.LIFNode -> klif_sj.KLIFNode")
    with pytest.raises(RuntimeError, match="expected a swap to undo"):
        patch.report.undo()


def test_blocks_nest() -> None:
    with patched(LIFNode=KLIFNode) as outer:
        assert type(LIFNode()) is KLIFNode
        with patched(LIFNode=GLIFNode, IFNode=CLIFNode) as inner:
            assert (type(LIFNode()), type(neuron.LIFNode()), type(IF())) == (GLIFNode, GLIFNode, CLIFNode)
        assert (type(LIFNode()), type(neuron.LIFNode()), type(IF())) == (KLIFNode, KLIFNode, originals()[1])
        with pytest.raises(KeyError), patched(LIFNode=CLIFNode):
            raise KeyError
        assert type(LIFNode()) is KLIFNode
    assert (len(outer.report.rows), len(inner.report.rows)) == (4, 3)


def test_exceptions_undo() -> None:
    with pytest.raises(ZeroDivisionError), patched(LIFNode=KLIFNode), patched(IFNode=CLIFNode):
        raise ZeroDivisionError
    assert type(LIFNode()) is originals()[0]


def test_a_module_that_is_imported_within_the_block_is_undone_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "imported_late.py").write_text(
        "from spikingjelly.activation_based.neuron import LIFNode as Neuron\ndef build(): return Neuron()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with patched(LIFNode=KLIFNode):
        import imported_late

        assert type(imported_late.build()) is KLIFNode
    assert type(imported_late.build()) is originals()[0]
    assert imported_late.Neuron is originals()[0]
    del sys.modules["imported_late"]


def test_what_is_held_beyond_the_block_builds_the_old_neuron() -> None:
    with patched(LIFNode=KLIFNode):
        held = {"class": LIFNode}
    assert type(held["class"](tau=3.0)) is originals()[0]
    with patched(LIFNode=CLIFNode):
        assert type(held["class"]()) is originals()[0]


def test_classes_still_serve_as_classes() -> None:
    saved = pickle.dumps(LIFNode(tau=3.0))
    with patched(LIFNode=KLIFNode):
        node, old = LIFNode(), originals()[0]()
        assert isinstance(node, LIFNode)
        assert isinstance(old, LIFNode)
        assert not isinstance(IF(), LIFNode)
        assert issubclass(KLIFNode, LIFNode)
        assert issubclass(LIFNode, neuron.BaseNode)
        assert inspect.isclass(LIFNode)
        assert inspect.signature(LIFNode) == inspect.signature(originals()[0])
        assert LIFNode.__name__ == "LIFNode"
        assert [type(m) for m in nn.Sequential(node, nn.ReLU()).modules() if isinstance(m, LIFNode)] == [KLIFNode]
        assert LIFNode | None == LIFNode | None
        assert type(pickle.loads(pickle.dumps(node))) is KLIFNode
        assert pickle.loads(pickle.dumps(LIFNode)) is LIFNode
        assert type(pickle.loads(saved)) is originals()[0]
        assert type(copy.deepcopy(old)) is originals()[0]


def test_a_derived_class_is_the_old_one_and_that_is_said() -> None:
    with patched(LIFNode=KLIFNode) as patch:

        class Mine(LIFNode):
            def __init__(self) -> None:
                super().__init__(tau=4.0)

            def double(self, x: torch.Tensor) -> torch.Tensor:
                return 2 * self(x)

        assert Mine.__mro__[1] is originals()[0]
        node = Mine()
        assert node.tau == 4.0
        assert node.double(torch.full((2,), 9.0)).tolist() == [2.0, 2.0]
    assert "derived from LIFNode" in patch.report.left_alone[f"{__name__}.Mine"]
    assert "left alone" in str(patch.report)


def test_our_own_package_is_left_as_it_is() -> None:
    """Its baseline is SpikingJelly's LIF."""
    with patched(LIFNode=KLIFNode):
        assert own_class(neuron_factory("lif", 4)()) is originals()[0]


def test_misuse() -> None:
    with pytest.raises(TypeError, match="at least one swap"):
        patched()
    with pytest.raises(ValueError, match="no neuron 'LIFnode' here; did you mean LIFNode"):
        patched(LIFnode=KLIFNode)
    with pytest.raises(ValueError, match="no neuron 'BaseNode'"):
        patched(BaseNode=KLIFNode)
    with pytest.raises(TypeError, match="LIFNode: expected a class of spiking neurons, got <class .*ReLU"):
        patched(LIFNode=nn.ReLU)
    with pytest.raises(TypeError, match="CLIFNode has no parameter 'activation'"):
        patched(LIFNode=CLIFNode, overrides={"activation": "relu"})
    patch = patched(LIFNode=KLIFNode)
    with patch:
        pass
    with pytest.raises(RuntimeError, match="used already"), patch:
        pass


def test_it_is_exported() -> None:
    assert klif_sj.patched is patched
