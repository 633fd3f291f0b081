"""Draw the pictures in docs/pictures: ``python docs/pictures.py`` (needs matplotlib, of the ``train`` extra).

Each neuron's picture shows the input, the membrane potential and the spikes over time, beside a simpler neuron that
gets the same input; ``surrogate.svg`` shows the surrogate derivative for four values of k.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from torch import Tensor

from klif_sj import CLIFNode, FusedNode, GLIFNode, KLIFNode, LearnableATan

STEPS = 50
COLOURS = ("#8c8c8c", "#0b6fb8")
THRESHOLD_COLOUR = "#c0392b"
K_COLOURS = ("#9ecae1", "#4292c6", "#08519c", "#111111")

STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.3,
    "figure.dpi": 150,
    "savefig.facecolor": "white",
    "svg.hashsalt": "klif_sj",
}


def input_current(strength: float) -> Tensor:
    """Nothing, a constant current, nothing, a current that changes in every step; ``[STEPS, 1, 1]``."""
    x = torch.zeros(STEPS)
    x[4:22] = strength
    x[28:48] = 2 * strength * torch.rand(20, generator=torch.Generator().manual_seed(2))
    return x.view(STEPS, 1, 1)


def charged_potentials(node: FusedNode) -> list[Tensor]:
    """The list to which the potential that decides on firing is appended in every step from now on."""
    charged: list[Tensor] = []
    fire = node.neuronal_fire

    def neuronal_fire() -> Tensor:
        charged.append(node.v)
        return fire()

    node.neuronal_fire = neuronal_fire  # type: ignore[method-assign]
    return charged


@torch.no_grad()
def run(node: FusedNode, x_seq: Tensor) -> dict[str, Tensor]:
    """Spikes, potentials before and after the reset, and the other states, of one neuron over time."""
    node.step_mode, node.store_v_seq = "m", True
    charged = charged_potentials(node)
    spike = node(x_seq)
    states = {name: getattr(node, f"{name}_seq") for name in node.states}
    sequences = {**states, "spike": spike, "charged": torch.stack(charged)}
    return {name: value.flatten() for name, value in sequences.items()}


def draw_potential(axes: Axes, result: dict[str, Tensor], colour: str, label: str) -> None:
    """Up to the charged potential at every step, and from there down to what the reset leaves."""
    time = torch.arange(STEPS).repeat_interleave(2)
    axes.plot(time, torch.stack([result["charged"], result["v"]], dim=1).flatten(), color=colour, label=label)


def draw_neuron(
    file: Path, title: str, strength: float, threshold: float, nodes: dict[str, FusedNode], extra: str | None = None
) -> None:
    x_seq = input_current(strength)
    results = {label: run(node, x_seq) for label, node in nodes.items()}
    heights = [1.0, 2.4, *([1.2] if extra else []), 0.35 + 0.25 * len(nodes)]
    figure, panels = plt.subplots(
        len(heights), sharex=True, figsize=(6.4, 1.15 * sum(heights)), height_ratios=heights, layout="constrained"
    )
    figure.suptitle(title, fontsize=10.5, fontweight="bold", x=0.01, ha="left")
    current, potential, *more, raster = panels

    current.set_title("input current X")
    current.fill_between(torch.arange(STEPS), x_seq.flatten(), step="mid", color="#d9b382", linewidth=0)

    potential.set_title("membrane potential")
    potential.axhline(threshold, color=THRESHOLD_COLOUR, linewidth=0.9, linestyle=(0, (4, 3)))
    potential.annotate(
        "threshold",
        (1, threshold),
        xycoords=("axes fraction", "data"),
        xytext=(3, 0),
        textcoords="offset points",
        va="center",
        color=THRESHOLD_COLOUR,
        fontsize=8,
    )
    raster.set_title("spikes S")
    for row, ((label, result), colour) in enumerate(zip(results.items(), COLOURS, strict=True)):
        draw_potential(potential, result, colour, label)
        raster.eventplot(result["spike"].nonzero().flatten(), lineoffsets=-row, linelengths=0.7, color=colour)
        if extra and extra in result:
            more[0].plot(torch.arange(STEPS), result[extra], color=colour)
            more[0].set_title("complementary potential M")
    potential.legend(loc="lower right", bbox_to_anchor=(1, 0.98), ncols=2, fontsize=8, handlelength=1.4, borderpad=0)
    raster.set_yticks(-torch.arange(len(nodes)), list(results), fontsize=8)
    raster.tick_params(axis="y", length=0)
    raster.set_ylim(-len(nodes) + 0.4, 0.6)
    raster.set_xlim(-1, STEPS)
    raster.set_xlabel("time step t")
    for panel in panels[:-1]:
        panel.locator_params(axis="y", nbins=4)
    save(figure, file)


def draw_surrogates(file: Path) -> None:
    """The KLIF paper's Figure 2b, and the same for a learnable-k ATan; the derivatives are what autograd computes."""
    figure, (klif, atan) = plt.subplots(1, 2, figsize=(6.4, 2.9), layout="constrained")
    for k, colour in zip((0.5, 1.0, 2.0, 5.0), K_COLOURS, strict=True):
        potential = torch.linspace(-1, 3, 801)
        node = KLIFNode(decay_input=False, init_k=k, backend="torch")
        charged = charged_potentials(node)
        spike = node(potential)
        (slope,) = torch.autograd.grad(spike.sum(), charged[0])
        klif.plot(potential, slope, color=colour, label=f"k = {k:g}")

        distance = torch.linspace(-2, 2, 801, requires_grad=True)
        (slope,) = torch.autograd.grad(LearnableATan(k=k)(distance).sum(), distance)
        atan.plot(distance.detach(), slope, color=colour, label=f"k = {k:g}")
    klif.set_title("KLIF: surrogate derivative $\\partial S/\\partial F$ (Eq. 9)")
    klif.set_xlabel("potential H  ($V_{th}$ = 1, $\\alpha$ = 2)")
    klif.legend(fontsize=8, handlelength=1.4)
    atan.set_title("LearnableATan: $\\partial S/\\partial x$")
    atan.set_xlabel("distance to the threshold x")
    for panel in (klif, atan):
        panel.set_ylim(bottom=0)
    save(figure, file)


def save(figure: plt.Figure, file: Path) -> None:
    # No date in the file: the same numbers give the same file.
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
    plt.close(figure)


def draw_all(folder: Path, suffix: str = ".svg") -> list[Path]:
    """Draw every picture into folder and return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / f"{name}{suffix}" for name in ("klif", "clif", "glif", "surrogate")}
    with matplotlib.rc_context(STYLE):
        draw_neuron(
            files["klif"], "KLIF: k scales the potential", 1.15, 1.0,
            {f"k = {k:g}": KLIFNode(init_k=k, backend="torch") for k in (1.0, 1.6)},
        )  # fmt: skip
        draw_neuron(
            files["clif"], "CLIF: recent spikes deepen the reset", 0.9, 1.0,
            {
                "without M": KLIFNode(
                    activation="identity", decay_input=False, v_reset=None, learn_k=False, backend="torch"
                ),
                "CLIF": CLIFNode(backend="torch"),
            },
            extra="m",
        )  # fmt: skip
        torch.manual_seed(0)
        draw_neuron(
            files["glif"], "GLIF: gates between two ways to leak, integrate and reset", 0.9, 0.5,
            {
                "without gates": GLIFNode(T=STEPS, inplane=None, gates="none", backend="torch"),
                "half-open gates": GLIFNode(T=STEPS, inplane=None, backend="torch"),
            },
        )  # fmt: skip
        draw_surrogates(files["surrogate"])
    return list(files.values())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "pictures", help="folder for the pictures")
    parser.add_argument("--suffix", default=".svg", choices=(".svg", ".png"), help="file format")
    options = parser.parse_args()
    for drawn in draw_all(options.out, options.suffix):
        print(drawn)
