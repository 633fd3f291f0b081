"""The options that training commands share: the fields of a recipe, and where it is trained."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .._checks import name_and_value
from ..models.neurons import NEURONS
from ..training import toml

WIDTHS = {"small": 1 / 8, "medium": 1 / 4, "paper": 1.0}
"""Factors on the published layer sizes, by name."""


def width(text: str) -> float:
    """The factor that a name or number on the command line means."""
    try:
        return WIDTHS[text] if text in WIDTHS else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected {', '.join(WIDTHS)} or a number, got {text!r}") from None


def validation(text: str) -> float:
    """The number of samples, or the fraction, that a text means."""
    return int(text) if text.isdigit() else float(text)


def seeds(text: str) -> tuple[int, ...]:
    """The integers in a list with commas, such as ``0,1,2``."""
    try:
        return tuple(int(seed) for seed in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected integers such as 0,1,2, got {text!r}") from None


FLAGS: dict[str, tuple[Any, str]] = {
    "neuron": (str, f"of {', '.join(NEURONS)}"),
    "epochs": (int, "default: the recipe's, here and below"),
    "time_steps": (int, "T, how often an image is shown or how many frames events become"),
    "batch_size": (int, "of one update, on all devices together"),
    "width": (width, f"{', '.join(WIDTHS)}, or a factor on the published layer sizes"),
    "learning_rate": (float, "at the start"),
    "validation": (validation, "fraction or number of training samples to evaluate in place of the test set"),
    "precision": (str, "auto, 32-true, 16-mixed, bf16-mixed or 64-true"),
    "gradient_clip": (float, "largest norm of the gradient"),
    "backend": (str, "of our neurons: auto, torch, cpp or cupy"),
    "threads": (int, "CPU threads of each process"),
    "seed": (int, "of initial weights, order, augmentation and dropout"),
}
"""The fields of a recipe that have an option of their own."""


def add_overrides(parser: argparse.ArgumentParser, fields: Iterable[str]) -> None:
    """Add options for these fields of a recipe, and ``--set`` for any field."""
    for name in fields:
        kind, text = FLAGS[name]
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="VALUE", help=text)
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any value of a recipe, as TOML writes it, or none; may be given repeatedly",
    )


def add_data_root(parser: argparse.ArgumentParser) -> None:
    """Add ``--data-root``, the folder of the data sets."""
    parser.add_argument(
        "--data-root", type=Path, default=Path("data"), metavar="DIR", help="folder of the data sets (default: data)"
    )


def add_device(parser: argparse.ArgumentParser, *, processes: bool = False) -> None:
    """Add ``--accelerator``, which is also called ``--device``, and ``--devices``, the number of processes."""
    parser.add_argument(
        "--accelerator",
        "--device",
        default="auto",
        metavar="NAME",
        help="auto, cpu, cuda or cuda:N (default: auto)",
    )
    if processes:
        parser.add_argument(
            "--devices", type=int, metavar="N", help="processes with a device each (default: 1, or those of torchrun)"
        )


def add_out(parser: argparse.ArgumentParser, activity: str, default: str) -> None:
    """Add ``--out`` and ``--resume``, and a text that says how to go on after an interrupt."""
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"default: {default}")
    parser.add_argument(
        "--resume", action="store_true", help=f"go on with the {activity} that was interrupted in --out"
    )
    parser.set_defaults(
        when_interrupted="The epochs that were finished are saved; the same command with --resume goes on."
    )


def overrides(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of the recipe that the command line gives.

    :raises ValueError: for a ``--set`` without a name or a value
    """
    given_fields = {name: value for name in FLAGS if (value := getattr(options, name, None)) is not None}
    return dict(parse_setting("--set", text, "momentum=0.9") for text in options.set) | given_fields


def parse_setting(option: str, text: str, example: str) -> tuple[str, Any]:
    """The name and the value in ``NAME=VALUE``; the error shows the example.

    :raises ValueError: for a text without a name or a value
    """
    name, value = name_and_value(option, text, f"NAME=VALUE, such as {example}")
    return name.replace("-", "_"), parse_value(value)


def parse_value(text: str) -> Any:
    """The value that a text means as TOML, None for ``none``, or else the text itself."""
    text = text.strip()
    if text.lower() == "none":
        return None
    try:
        return toml.loads(f"value = {text}")["value"]
    except toml.TOMLDecodeError:
        return text


def names(text: str) -> tuple[str, ...]:
    """The names in a list with commas, such as ``lif,klif``."""
    return tuple(name.strip() for name in text.split(",") if name.strip())
