"""The sets of event recordings. SpikingJelly reads them; they are integrated once, and the frames are kept."""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision.datasets.utils import check_integrity

from ... import _compat
from ..atomic import locked, made_whole
from .catalogue import DatasetInfo, find_dataset
from .images import Split

__all__ = ["load_events"]

log = logging.getLogger(__name__)

TRAIN_SHARE = 0.9
"""The share of each class of CIFAR10-DVS that is the training set, as there is no official split."""

AEDAT3_PACKET = np.dtype(
    [("type", "<u2"), ("source", "<u2"), ("size", "<u4"), ("offset", "<u4"), ("overflow", "<u4"), ("capacity", "<u4")]
    + [("number", "<u4"), ("valid", "<u4")]
)
"""The header of a packet of events; ``capacity`` events of ``size`` bytes follow it."""


def load_events(name: str, root: Path, split: str, time_steps: int) -> Split:
    """The training or the test set called ``name``, each recording integrated to ``time_steps`` frames.

    A recording's events are divided into ``time_steps`` runs with the same number of events. A frame counts the events
    of a run by polarity and pixel. The counts of both sets are kept in ``root/FOLDER/frames_T``, in the smallest
    integer type that holds them, and are mapped into memory from there.

    :raises ValueError: for a broken file, naming it
    :raises FileNotFoundError: for a data set that is not there, saying what to put where
    """
    info, recordings = find_dataset(name), RECORDINGS[name]
    folder = root / info.folder
    frames = folder / f"frames_{time_steps}"
    if not frames.is_dir():
        events = folder / "events_np"
        if not (events.is_dir() or (folder / "extract").is_dir()):
            _check_archives(info, recordings.reader(), folder / "download")
        # Logging shows a warning by default. Without one, the integration looks like a standstill.
        log.warning("%s: its recordings are integrated into %s, once; this takes minutes", info.title, frames)
        with locked(folder):
            if not events.is_dir():
                _convert(recordings, folder)
            if not frames.is_dir():
                _integrate(info, _splits(info, events), frames, time_steps)
    return _read_frames(info, frames, split)


def _check_archives(info: DatasetInfo, reader: Any, folder: Path) -> None:
    archives = {
        folder / file: (url, md5) for file, url, md5 in reader.resource_url_md5() if file.endswith((".zip", ".tar.gz"))
    }
    missing = {file: url for file, (url, _) in archives.items() if not file.is_file()}
    if missing:
        if reader.downloadable():
            how = "Type\n" + "\n".join(f"  curl -L --create-dirs -o {file} {url}" for file, url in missing.items())
        else:
            pages = ", ".join(sorted(set(missing.values())))
            how = f"Type mkdir -p {folder}, and put {', '.join(file.name for file in missing)} there, from {pages}"
        raise FileNotFoundError(f"{info.title} is not in {folder}. Its home is {info.home}. {how}")
    for file, (_, md5) in archives.items():
        if not check_integrity(str(file), md5):
            raise ValueError(
                f"{file}: expected the archive of {info.title} whose MD5 is {md5}; this one is truncated or corrupt. "
                "Delete it and get it again"
            )


def _convert(recordings: Recordings, folder: Path) -> None:
    """Make SpikingJelly's folders ``extract`` and ``events_np`` from ``download``, as its own class does."""
    reader, extracted = recordings.reader(), folder / "extract"
    if extracted.is_dir():
        # These files do not come out of an archive whose MD5 was just checked.
        for file in sorted(extracted.rglob(recordings.files)):
            recordings.check(file)
    else:
        with made_whole(extracted) as partial:
            _compat.extract_recordings(reader, folder / "download", partial)
    with made_whole(folder / "events_np") as partial:
        _compat.convert_recordings(reader, extracted, partial)


def _check_n_mnist(file: Path) -> None:
    if not file.stat().st_size or file.stat().st_size % 5:
        raise _broken(file, f"whole events of 5 bytes, got {file.stat().st_size} bytes")


def _check_cifar10_dvs(file: Path) -> None:
    data = file.read_bytes()
    header = 0
    # Events are big-endian addresses below 2**15, so no event begins with the header's '#'.
    while data[header : header + 1] == b"#":
        header = data.find(b"\n", header) + 1 or len(data)
    if header == len(data) or (len(data) - header) % 8:
        raise _broken(file, f"whole events of 8 bytes after the header, got {len(data) - header} bytes")


def _check_gesture(file: Path) -> None:
    labels = file.with_name(f"{file.stem}_labels.csv")
    if not labels.is_file():
        raise FileNotFoundError(f"{labels} is missing. Delete the folder extract and run again")
    data = file.read_bytes()
    end = b"#!END-HEADER\r\n"
    position = data.find(end) + len(end) if end in data else 0
    while 0 < position < len(data):
        if position + AEDAT3_PACKET.itemsize > len(data):
            raise _broken(file, "whole packets of events, got a part of one at its end")
        packet = np.frombuffer(data, AEDAT3_PACKET, count=1, offset=position)[0]
        position += AEDAT3_PACKET.itemsize + int(packet["capacity"]) * int(packet["size"])
    if position != len(data) or not data:
        raise _broken(file, "an AEDAT 3.1 header and whole packets of events, got something else")


def _broken(file: Path, expected: str) -> ValueError:
    return ValueError(
        f"{file}: expected {expected}; the recording is truncated or corrupt. "
        "Delete the folder extract and run again to unpack it anew"
    )


@dataclass(frozen=True)
class Recordings:
    """How the raw recordings of a data set are found, checked and read."""

    module: str
    class_name: str
    files: str
    check: Callable[[Path], None]
    """Raises an error for a file that SpikingJelly would read in part, or fail to read without naming it."""

    def reader(self) -> Any:
        """SpikingJelly's class for them. It is imported when it is needed, as its package takes seconds to load."""
        return getattr(importlib.import_module(f"spikingjelly.datasets.{self.module}"), self.class_name)


RECORDINGS = {
    "n-mnist": Recordings("n_mnist", "NMNIST", "*.bin", _check_n_mnist),
    "cifar10-dvs": Recordings("cifar10_dvs", "CIFAR10DVS", "*.aedat", _check_cifar10_dvs),
    "dvs-gesture": Recordings("dvs128_gesture", "DVS128Gesture", "*.aedat", _check_gesture),
}


def _splits(info: DatasetInfo, events: Path) -> dict[str, list[tuple[Path, int]]]:
    """The files of both splits, each with its class, sorted by class and name.

    :raises ValueError: if there are more or fewer files than the data set has
    """
    if (events / "train").is_dir():
        splits = {split: [file for files in _by_class(events / split) for file in files] for split in info.splits}
    else:
        splits = {"train": [], "test": []}
        for files in _by_class(events):
            first = math.ceil(TRAIN_SHARE * len(files))
            splits["train"] += files[:first]
            splits["test"] += files[first:]
    for split, expected in info.splits.items():
        if len(splits[split]) != expected:
            raise ValueError(
                f"{events}: expected {expected} {split} recordings of {info.title}, got {len(splits[split])}. "
                "Delete this folder, and extract beside it, and run again"
            )
    return splits


def _by_class(folder: Path) -> Iterator[list[tuple[Path, int]]]:
    """The recordings of each class, in SpikingJelly's order. If a folder's name is a number, this is its class."""
    for place, path in enumerate(sorted(path for path in folder.iterdir() if path.is_dir())):
        label = int(path.name) if path.name.isdigit() else place
        yield [(file, label) for file in sorted(path.glob("*.npz"))]


def _integrate(info: DatasetInfo, splits: dict[str, list[tuple[Path, int]]], folder: Path, time_steps: int) -> None:
    with made_whole(folder) as partial:
        for split, recordings in splits.items():
            files, labels = zip(*recordings, strict=True)
            for dtype in (np.uint8, np.int16, np.int32):
                if _write_frames(info, files, partial / f"{split}_frames.npy", time_steps, dtype):
                    break
            np.save(partial / f"{split}_labels.npy", np.array(labels, dtype=np.int64))


def _write_frames(info: DatasetInfo, files: Sequence[Path], out: Path, time_steps: int, dtype: type) -> bool:
    """Write all frames in this integer type; returns False if a count is too large for it."""
    shape = (len(files), time_steps, info.in_channels, info.image_size, info.image_size)
    stored = np.lib.format.open_memmap(out, mode="w+", dtype=dtype, shape=shape)

    def write(position: int) -> bool:
        counts = _frames(info, files[position], time_steps)
        if counts.max() > np.iinfo(dtype).max:
            return False
        stored[position] = counts
        return True

    with ThreadPoolExecutor() as pool:
        fits = all(pool.map(write, range(len(files))))
    stored.flush()
    return fits


def _frames(info: DatasetInfo, file: Path, time_steps: int) -> np.ndarray:
    from spikingjelly.datasets import integrate_events_by_fixed_frames_number

    size = info.image_size
    try:
        with np.load(file) as archive:
            events = {key: archive[key] for key in ("t", "x", "y", "p")}
        if not len(events["t"]):
            raise ValueError("it holds no events")
        if max(events["x"].max(), events["y"].max()) >= size:
            raise ValueError(f"events beyond the sensor's {size}x{size} pixels")
        return integrate_events_by_fixed_frames_number(events, "number", time_steps, size, size)
    except Exception as error:  # a broken archive raises errors of many kinds
        raise ValueError(
            f"{file}: the recording cannot be read ({error}). Delete the folder events_np and run again"
        ) from error


def _read_frames(info: DatasetInfo, folder: Path, split: str) -> Split:
    try:
        # The file is mapped copy-on-write: nothing is read before it is needed, and nothing is ever written.
        frames = np.load(folder / f"{split}_frames.npy", mmap_mode="c")
        labels = np.load(folder / f"{split}_labels.npy")
        if not len(frames) == len(labels) == info.splits[split]:
            raise ValueError(f"{len(frames)} recordings and {len(labels)} labels")
    except Exception as error:
        raise ValueError(
            f"{folder}: the {split} frames cannot be read ({error}). Delete this folder and run again"
        ) from error
    return torch.from_numpy(frames), torch.from_numpy(labels)
