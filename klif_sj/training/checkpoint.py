"""Write checkpoints that are complete, and refuse to read others."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from .atomic import replacing
from .recipe import Recipe

__all__ = ["AtomicCheckpointIO", "read_checkpoint", "recipe_in"]


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside the last one and renames it: a full disk or a kill leaves the last one as it is.

    Lightning itself first writes to the system's folder of temporary files. Moving a file from there to another file
    system copies it, and the copy may stop halfway.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options: Any | None = None
    ) -> None:
        path = Path(path)
        try:
            with replacing(path) as file:
                torch.save(checkpoint, file)
        # If the disk is full, torch's writer raises a RuntimeError when it closes the archive.
        except (OSError, RuntimeError) as error:
            previous = "the last good one is still there" if path.exists() else "there was none before it"
            raise OSError(f"the checkpoint {path} could not be saved ({error}); {previous}") from error


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The checkpoint in a file, on the CPU.

    :raises FileNotFoundError: if there is no such file
    :raises ValueError: for a file that is truncated, damaged in a single bit, or no checkpoint
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        # torch writes checksums but does not check them.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"{damaged} is damaged")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken archive raises errors of many kinds
        raise ValueError(f"the checkpoint {path} cannot be read ({error})") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"{path} is no checkpoint of a training: it has no state_dict")
    return checkpoint


def recipe_in(checkpoint: dict[str, Any], path: Path) -> Recipe:
    """The recipe of a training, which :class:`.SpikingClassifier` puts into its checkpoints.

    :param path: the path of the checkpoint, for messages
    :raises ValueError: if the checkpoint holds no recipe, or one that this version cannot read
    """
    try:
        return Recipe.from_dict(checkpoint["hyper_parameters"]["recipe"])
    except KeyError:
        raise ValueError(f"{path} is no checkpoint of klif-sj train: it has no recipe") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"the recipe in {path} cannot be read ({error})") from error
