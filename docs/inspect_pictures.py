"""Make the pictures of docs/inspect.md: ``python docs/inspect_pictures.py`` (needs the ``train`` extra and chromium).

It trains the same network with LIF and with CLIF and draws how their gradients fall over time, from what
``klif-sj compare`` writes; and it takes screenshots of the pages, at the width of a desk and of a phone.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import subprocess
import tempfile
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from PIL import Image
from spikingjelly.activation_based.neuron import BaseNode

import klif_sj
from klif_sj import cli
from klif_sj.inspection import Inspection
from klif_sj.inspection.result import load_all
from klif_sj.models import spiking_layers
from klif_sj.training.data import make_data
from klif_sj.training.recipe import load_recipe
from klif_sj.training.run import network_of

COMPARE = "compare --dataset digits --neurons lif,clif --seeds 0 --time-steps 16 --epochs 3 --device cpu"
COLOURS = {"lif": "#8c8c8c", "clif": "#0b6fb8"}
WIDTHS = {"desk": (1200, 1500), "phone": (390, 1700)}
"""Of the screenshots, in pixels."""


def draw_temporal_gradient(inspections: list[Inspection], file: Path) -> None:
    """A line for each layer: the mean magnitude of the derivative of the last potential by an earlier one."""
    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "klif_sj"}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(6.4, 3.4), layout="constrained")
        axes = figure.subplots()
        for inspection in inspections:
            label = inspection.title.upper()
            for layer in inspection.layers.values():
                axes.semilogy(layer.temporal, color=COLOURS[inspection.title], label=label, linewidth=1.4)
                label = "_"
        axes.set_xlabel("lag, time steps")
        axes.set_ylabel("mean |∂u[T] / ∂u[T − lag]|")
        axes.legend(frameon=False, title="the four layers with")
        figure.savefig(file, metadata={"Date": None}, facecolor="white")


def broken_network(folder: Path) -> None:
    """The digits' network with two faults: a layer's threshold is 100, and a k is at its bound."""
    recipe = load_recipe("digits")
    net = network_of(recipe)
    layers: dict[str, BaseNode] = spiking_layers(net)
    layers["fc1"].v_threshold = 100.0
    with torch.no_grad():
        layers["conv1"].k.fill_(5.0)
    data = make_data("digits", folder, 64, 0, time_steps=recipe.time_steps)
    batches = itertools.islice(data.train_dataloader(), 5)
    klif_sj.inspect(net.train(), batches, title="broken on purpose").save(folder / "broken")


def screenshot(page: Path, file: Path, size: tuple[int, int], *, dark: bool = False) -> None:
    """A picture of a page, in few colours so that the file is small."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit("the screenshots need chromium")
    settings = ["--blink-settings=preferredColorScheme=0"] if dark else []
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *settings]
    command += [f"--window-size={size[0]},{size[1]}", f"--screenshot={file}", page.resolve().as_uri()]
    subprocess.run(command, check=True, capture_output=True)
    with Image.open(file) as image:
        image.convert("RGB").quantize(64, dither=Image.Dither.NONE).save(file, optimize=True)


def main() -> None:
    """Train, draw and photograph."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "inspect", help="folder for the pictures")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if cli.main([*COMPARE.split(), "--out", str(folder / "compare")]):
            raise SystemExit("klif-sj compare failed")
        draw_temporal_gradient(load_all(folder / "compare"), out / "temporal-gradient.svg")
        screenshot(folder / "compare" / "inspection.html", out / "side-by-side.png", WIDTHS["desk"])
        broken_network(folder)
        screenshot(folder / "broken" / "inspection.html", out / "phone.png", WIDTHS["phone"])
        screenshot(folder / "broken" / "inspection.html", out / "dark.png", WIDTHS["desk"], dark=True)


if __name__ == "__main__":
    main()
