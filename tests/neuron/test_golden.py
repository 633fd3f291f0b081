"""The vectors in golden/: made with the CLIF and GLIF authors' own modules and the KLIF paper's equations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from neurons import CPU_BACKENDS
from tolerance import assert_close, assert_equal
from torch import Tensor

import klif_sj
from klif_sj import FusedNode

FILES = sorted((Path(__file__).parent / "golden").glob("*.pt"))

# The GLIF authors' parameter names, and SpikingJelly's.
GLIF_NAMES = {"Vth": "v_threshold", "leak": "linear_decay", "reVth": "v_subreset"} | {
    name: name for name in ("alpha", "beta", "gamma", "tau", "conduct")
}


def klif(meta: dict, data: dict[str, Tensor]) -> FusedNode:
    return klif_sj.KLIFNode(
        scale_reset=meta["star"],
        tau=meta["tau"],
        decay_input=meta["decay_input"],
        v_threshold=meta["v_threshold"],
        v_reset=meta["v_reset"],
        detach_reset=meta["detach_reset"],
        activation=meta["act"],
    )


def clif(meta: dict, data: dict[str, Tensor]) -> FusedNode:
    return klif_sj.CLIFNode(
        tau=meta["tau"], decay_input=meta["decay_input"], v_threshold=meta["v_threshold"], v_reset=meta["v_reset"]
    )


def glif(meta: dict, data: dict[str, Tensor]) -> FusedNode:
    gateless = meta["variant"].endswith("softsimple")
    steps, _, channels, *_ = meta["shape"]
    return klif_sj.GLIFNode(
        T=steps,
        inplane=channels if data["p_tau"].ndim else None,
        gates="none" if gateless else "soft" if meta["soft_mode"] else "hard",
        surrogate_function=klif_sj.Rect(alpha=1.0),
    )


FAMILIES = {"KLIF": klif, "CLIF": clif, "GLIF": glif}


def load(file: Path) -> tuple[dict, dict[str, Tensor]]:
    data = torch.load(file, weights_only=True)
    return json.loads(data.pop("meta")), data


def build(meta: dict, data: dict[str, Tensor], backend: str) -> tuple[FusedNode, dict[str, torch.nn.Parameter]]:
    """The node with the file's raw parameters, and these by the names that the file gives their gradients."""
    node = FAMILIES[meta["family"]](meta, data).to(data["x"].dtype)
    node.step_mode, node.backend, node.store_v_seq = "m", backend, True
    raw = {"k": data["k"]} if "k" in data else {}
    raw |= {name.removeprefix("p_"): value for name, value in data.items() if name.startswith("p_")}
    parameters = dict(node.named_parameters())
    learned = {name: parameters[GLIF_NAMES.get(name, name)] for name in raw if f"grad_{name}" in data}
    with torch.no_grad():
        for name, parameter in learned.items():
            parameter.copy_(raw[name])
    return node, learned


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_golden(file: Path, backend: str) -> None:
    meta, data = load(file)
    node, parameters = build(meta, data, backend)
    x = data["x"].clone().requires_grad_()
    initial = {name: data[f"{name}0"].clone().requires_grad_() for name in node.states if f"{name}0" in data}
    for name, value in initial.items():
        setattr(node, name, value)

    spike = node(x)
    loss = (spike * data["grad_spike"]).sum()
    for name in node.states:
        if f"grad_{name}_final" in data:
            loss = loss + (getattr(node, name) * data[f"grad_{name}_final"]).sum()
    loss.backward()

    assert_equal(spike, data["spike"], "spike")
    trajectories = {"v": "u_seq", "spike": "spike"} if meta["family"] == "GLIF" else {"v": "v_seq", "m": "m_seq"}
    for name in node.states:
        sequence = data[trajectories[name]]
        assert_close(getattr(node, f"{name}_seq"), sequence, f"{name}_seq")
        assert_close(getattr(node, name), sequence[-1], f"final {name}")
    assert_close(x.grad, data["grad_x"], "grad_x")
    for name, value in initial.items():
        assert_close(value.grad, data[f"grad_{name}0"], f"grad_{name}0")
    for name, parameter in parameters.items():
        assert_close(parameter.grad, data[f"grad_{name}"], f"grad_{name}")


@pytest.mark.parametrize("file", [f for f in FILES if "glif" not in f.name], ids=lambda file: file.stem)
def test_charged_potential(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meta, data = load(file)
    node, _ = build(meta, data, "torch")
    for name in node.states:
        if f"{name}0" in data:
            setattr(node, name, data[f"{name}0"])
    charged, fire = [], node.neuronal_fire
    monkeypatch.setattr(node, "neuronal_fire", lambda: (charged.append(node.v), fire())[1])
    node(data["x"])
    assert_close(torch.stack(charged), data["f_seq" if meta["family"] == "KLIF" else "h_seq"], "charged potential")


def test_every_file_and_every_gradient_is_used() -> None:
    assert len(FILES) == 34
    seen = set()
    for file in FILES:
        meta, data = load(file)
        node, parameters = build(meta, data, "torch")
        seen.add(type(node))
        upstream = {f"grad_{name}_final" for name in node.states} | {"grad_spike"}
        inputs = {"grad_x"} | {f"grad_{name}0" for name in node.states}
        checked = upstream | inputs | {f"grad_{name}" for name in parameters}
        assert {name for name in data if name.startswith("grad_")} <= checked, file.name
    assert seen == {klif_sj.KLIFNode, klif_sj.CLIFNode, klif_sj.GLIFNode}
