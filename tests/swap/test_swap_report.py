"""The report of a swap: as a table, as a dict, and the keys of checkpoints."""

from __future__ import annotations

import json

import torch
from spikingjelly.activation_based import layer, neuron, surrogate
from torch import nn

from klif_sj import CLIFNode, GLIFNode, KLIFNode, swap_neurons
from klif_sj.swap import SwapRow


def network() -> nn.Sequential:
    return nn.Sequential(
        layer.Linear(3, 3),
        neuron.LIFNode(surrogate_function=surrogate.ATan()),
        neuron.LIFNode(surrogate_function=surrogate.ATan()),
        neuron.ParametricLIFNode(v_reset=-0.1),
    )


def test_the_table_says_everything_once() -> None:
    text = str(swap_neurons(network(), KLIFNode, match=neuron.BaseNode, skip="2", activation="celu"))
    lines = text.splitlines()
    assert lines[0] == "1 neuron swapped: spikingjelly.LIFNode -> klif_sj.KLIFNode"
    assert lines[1] == "1 neuron swapped: spikingjelly.ParametricLIFNode -> klif_sj.KLIFNode"
    starts = [line.split()[:2] for line in lines[4:] if line]
    assert ["1", "swapped"] in starts
    assert ["3", "swapped"] in starts
    assert ["2", "left"] in starts
    assert text.count("overridden  activation='celu'") == 2
    assert text.count("changed     v_reset=-0.1: a reset to below 0") == 1
    assert text.count("changed     learn_tau: True -> False") == 1
    assert all(len(line) <= 120 for line in lines)


def test_neurons_with_the_same_fate_share_their_lines() -> None:
    net = nn.Sequential(*(neuron.LIFNode() for _ in range(20)))
    text = str(swap_neurons(net, CLIFNode))
    assert text.count("kept") == 1
    assert all(any(line.split()[:1] == [str(path)] for line in text.splitlines()) for path in range(20))


def test_the_dict_is_json_and_complete() -> None:
    net = network()
    report = swap_neurons(net, KLIFNode, k_bounds=(0.1, 9.0), init_k=2)
    told = json.loads(json.dumps(report.to_dict()))
    first, _, last = told["neurons"]
    assert first["paths"] == ["1"]
    assert first["old"].startswith("spikingjelly.activation_based.neuron")
    assert first["new"] == "klif_sj.neuron.klif.KLIFNode"
    assert first["kept"]["tau"] == 2.0
    assert first["kept"]["training"] is True
    assert first["overridden"] == {"k": {"new": "2 (learned)"}, "k_bounds": {"new": [0.1, 9.0]}}
    assert first["changed"]["activation"]["new"] == "relu"
    assert first["added_keys"] == ["1.k"]
    assert last["removed_keys"] == ["3.w"]
    assert told["dry_run"] is False
    # Every setting of the old neuron is somewhere.
    mentioned = set().union(*(first[what] for what in ("kept", "overridden", "dropped", "changed")))
    assert {"tau", "decay_input", "v_threshold", "v_reset", "detach_reset", "surrogate_function"} <= mentioned
    assert {"step_mode", "store_v_seq"} <= mentioned


def test_the_keys_that_a_swap_adds_and_removes() -> None:
    for new in (KLIFNode, CLIFNode, GLIFNode):
        net = network()
        before = set(net.state_dict())
        report = swap_neurons(net, new)
        after = set(net.state_dict())
        assert set(report.added_keys) == after - before
        assert set(report.removed_keys) == before - after == {"3.w"}
        assert len(report.added_keys) == len(set(report.added_keys)) == {KLIFNode: 3, CLIFNode: 0, GLIFNode: 24}[new]


def test_a_shared_neuron_has_its_keys_under_every_path() -> None:
    shared = neuron.LIFNode()
    net = nn.Sequential(shared, nn.Sequential(shared))
    report = swap_neurons(net, KLIFNode)
    assert report.added_keys == ["0.k", "1.0.k"] == list(net.state_dict())
    assert len(list(net.parameters())) == 1


def test_settings_are_compared_not_assumed() -> None:
    """The report reads the new neuron; what its class does to an argument is seen."""

    class Stubborn(KLIFNode):
        def __init__(self, **options: object) -> None:
            super().__init__(**(options | {"tau": 9.0}))

    net = nn.Sequential(neuron.LIFNode(tau=3.0))
    (row,) = swap_neurons(net, Stubborn).rows
    assert (row.of("changed")["tau"].old, row.of("changed")["tau"].new) == (3.0, 9.0)
    assert "tau" not in row.of("kept")


def test_a_k_outside_the_new_bounds_is_said() -> None:
    net = nn.Sequential(KLIFNode(k_bounds=None, init_k=7.0))
    (row,) = swap_neurons(net, KLIFNode, k_bounds=(0.5, 5.0)).rows
    assert net[0].k.item() == 7.0
    assert "nearer of its bounds" in row.of("changed")["k"].why
    x = torch.rand(4, 3)
    assert torch.equal(net(x), nn.Sequential(KLIFNode(init_k=5.0))(x))


def test_a_report_is_of_the_moment_of_the_swap() -> None:
    net = nn.Sequential(KLIFNode(), GLIFNode(step_mode="m"))
    klif, glif = swap_neurons(net, KLIFNode, match="0").rows + swap_neurons(net, GLIFNode, match="1").rows
    with torch.no_grad():
        net[0].k.fill_(3.0)
    net[1](torch.rand(2, 3, 4))
    assert klif.of("kept")["k"].new.item() == 1.0
    assert "shape by the first input" in text_of(glif)


def text_of(row: SwapRow) -> str:
    return " ".join(str(entry) for entry in row.entries)
