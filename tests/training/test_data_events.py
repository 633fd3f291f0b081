"""Event data sets: files in their true format, read by SpikingJelly, integrated to frames; and what is refused."""

from __future__ import annotations

import csv
import hashlib
import importlib
import shutil
import struct
import tarfile
import threading
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from spikingjelly.datasets import split_to_train_test_set
from tolerance import assert_equal
from trainings import load_both

from klif_sj.training.atomic import locked
from klif_sj.training.data import make_data
from klif_sj.training.data.catalogue import DATASETS

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

Event = tuple[int, int, int, int]
"""Time in microseconds, x, y and polarity, as SpikingJelly reads them."""


def recording(seed: int, size: int, number: int) -> list[Event]:
    """Events at increasing times, the first of which tells the recordings apart."""
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.integers(1, 200, number))
    places = rng.integers(0, (size, size, 2), (number, 3))
    places[0] = seed % size, seed // size, 1
    return [(int(time), *map(int, place)) for time, place in zip(times, places, strict=True)]


def expected_frames(events: Sequence[Event], time_steps: int, size: int) -> torch.Tensor:
    """Counted one by one: as many events to every frame, the rest to the last."""
    frames = np.zeros((time_steps, 2, size, size), dtype=np.uint8)
    for position, (_, x, y, polarity) in enumerate(events):
        frames[min(position // (len(events) // time_steps), time_steps - 1), polarity, y, x] += 1
    return torch.from_numpy(frames)


def n_mnist_file(events: Sequence[Event]) -> bytes:
    """Five bytes an event: x, y, polarity in the highest bit, 23 bits of time."""
    return b"".join(bytes([x, y]) + (polarity << 23 | time).to_bytes(3, "big") for time, x, y, polarity in events)


def aedat2_file(events: Sequence[Event]) -> bytes:
    """CIFAR10-DVS's: big-endian address and time. The sensor stood such that SpikingJelly mirrors the address."""
    addresses = [(127 - x) << 8 | (127 - y) << 1 | 1 - polarity for _, x, y, polarity in events]
    times = [time for time, *_ in events]
    header = b"#!AER-DAT2.0\r\n# This is a raw AE data file\r\n# Timestamps are in microseconds\r\n"
    return header + b"".join(struct.pack(">II", *pair) for pair in zip(addresses, times, strict=True))


def aedat3_file(events: Sequence[Event], packet: int = 50) -> bytes:
    """DVS128 Gesture's: packets of polarity events after a header of their own, and a packet of another kind."""

    def packed(kind: int, data: Sequence[tuple[int, int]]) -> bytes:
        header = struct.pack("<HHIIIIII", kind, 1, 8, 4, 0, len(data), len(data), len(data))
        return header + b"".join(struct.pack("<II", *event) for event in data)

    data = [(x << 17 | y << 2 | polarity << 1 | 1, time) for time, x, y, polarity in events]
    packets = [packed(1, data[start : start + packet]) for start in range(0, len(data), packet)]
    return b"#!AER-DAT3.1\r\n#Format: RAW\r\n#!END-HEADER\r\n" + packed(0, [(7, 7)]) + b"".join(packets)


def n_mnist(extract: Path) -> dict[str, list[tuple[list[Event], int]]]:
    """Three recordings of each digit to train on and one to test; returns the events and classes, as they are split."""
    splits: dict[str, list[tuple[list[Event], int]]] = {"train": [], "test": []}
    for split, number in (("train", 3), ("test", 1)):
        for label in range(10):
            folder = extract / split.capitalize() / str(label)
            folder.mkdir(parents=True)
            for position in range(number):
                events = recording(40 * (split == "test") + 10 * position + label, 34, 95)
                (folder / f"{10 * position + label + 1:05}.bin").write_bytes(n_mnist_file(events))
                splits[split].append((events, label))
    return splits


def cifar10_dvs(extract: Path) -> dict[str, list[tuple[list[Event], int]]]:
    """Eleven recordings of each class, as their names, not their numbers, are ordered: 0, 1, 10, 2 ..."""
    splits: dict[str, list[tuple[list[Event], int]]] = {"train": [], "test": []}
    for label, name in enumerate(CIFAR10):
        (extract / name).mkdir(parents=True)
        for position, number in enumerate(sorted(range(11), key=str)):
            events = recording(11 * label + number, 128, 64)
            (extract / name / f"cifar10_{name}_{number}.aedat").write_bytes(aedat2_file(events))
            splits["train" if position < 10 else "test"].append((events, label))
    return splits


def gesture(extract: Path) -> dict[str, list[tuple[list[Event], int]]]:
    """One recording of a user for either split, with each of the eleven gestures once, and rests between them."""
    folder = extract / "DvsGesture"
    folder.mkdir(parents=True)
    splits: dict[str, list[tuple[list[Event], int]]] = {}
    for number, (split, name) in enumerate((("train", "user01_led"), ("test", "user24_led"))):
        events = recording(number, 128, 11 * 40)
        times = [time for time, *_ in events]
        with (folder / f"{name}_labels.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["class", "startTime_usec", "endTime_usec"])
            rows.writerows([label + 1, times[40 * label], times[40 * label + 35]] for label in range(11))
        (folder / f"{name}.aedat").write_bytes(aedat3_file(events))
        (folder / f"trials_to_{split}.txt").write_text(f"{name}.aedat\n")
        # As folders are ordered by name, the classes come as 0, 1, 10, 2 ...; their numbers are the folders'.
        splits[split] = [(events[40 * label : 40 * label + 35], label) for label in sorted(range(11), key=str)]
    return splits


Write = Callable[[Path], dict[str, list[tuple[list[Event], int]]]]
SETS: dict[str, tuple[Write, int]] = {
    "n-mnist": (n_mnist, 3),
    "cifar10-dvs": (cifar10_dvs, 4),
    "dvs-gesture": (gesture, 5),
}


@pytest.fixture(params=SETS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def written(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[tuple[list[Event], int]]]:
    """Unpacked recordings under ``tmp_path``, of which the data set then has as many."""
    info = DATASETS[name]
    splits = SETS[name][0](tmp_path / info.folder / "extract")
    numbers = {split: len(recordings) for split, recordings in splits.items()}
    monkeypatch.setitem(DATASETS, name, replace(info, splits=numbers))
    return splits


def reader_of(name: str) -> Any:
    """SpikingJelly's class."""
    module, reader = {
        "n-mnist": ("n_mnist", "NMNIST"),
        "cifar10-dvs": ("cifar10_dvs", "CIFAR10DVS"),
        "dvs-gesture": ("dvs128_gesture", "DVS128Gesture"),
    }[name]
    return getattr(importlib.import_module(f"spikingjelly.datasets.{module}"), reader)


def pack(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Turns the unpacked recordings into the archives that are downloaded, and has SpikingJelly expect their MD5."""
    (folder / "download").mkdir()
    archives = []
    for part in sorted((folder / "extract").iterdir()):
        if name == "dvs-gesture":
            archives.append(folder / "download" / "DvsGesture.tar.gz")
            with tarfile.open(archives[-1], "w:gz") as archive:
                archive.add(part, part.name)
        else:
            archives.append(folder / "download" / f"{part.name}.zip")
            with zipfile.ZipFile(archives[-1], "w") as archive:
                for file in sorted(part.rglob("*.*")):
                    archive.write(file, file.relative_to(folder / "extract"))
    shutil.rmtree(folder / "extract")
    resources = [
        (file.name, "https://example.org", hashlib.md5(file.read_bytes()).hexdigest()) for file in archives
    ] + [("README.txt", "https://example.org", "0" * 32)]
    monkeypatch.setattr(reader_of(name), "resource_url_md5", staticmethod(lambda: resources))
    return archives


def assert_frames(name: str, root: Path, written: dict[str, list[tuple[list[Event], int]]]) -> None:
    time_steps, size = SETS[name][1], DATASETS[name].image_size
    for split, (frames, labels) in zip(("train", "test"), load_both(name, root, time_steps), strict=True):
        assert labels.tolist() == [label for _, label in written[split]]
        expected = torch.stack([expected_frames(events, time_steps, size) for events, _ in written[split]])
        assert frames.dtype == torch.uint8
        assert_equal(frames, expected, f"{split} frames")


def test_frames_are_the_events_counted(
    name: str, written: dict, tmp_path: Path, capfd: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    assert_frames(name, tmp_path, written)
    told = capfd.readouterr()
    assert told.out == told.err == "", "0.0.0.0.14 prints a line a file"
    assert f"{DATASETS[name].title}: its recordings are integrated" in caplog.text
    caplog.clear()
    assert_frames(name, tmp_path, written)
    assert not caplog.text, "once"


def test_archives_are_unpacked(name: str, written: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / DATASETS[name].folder
    pack(name, folder, monkeypatch)
    assert_frames(name, tmp_path, written)
    made = {path.name for path in folder.iterdir()}
    assert made == {".lock", "download", "extract", "events_np", f"frames_{SETS[name][1]}"}


def test_spikingjelly_itself_makes_the_same_of_them(name: str, written: dict, tmp_path: Path) -> None:
    """Its frames and, of CIFAR10-DVS, its split of nine to one, out of the recordings that were converted for ours."""
    time_steps, folder = SETS[name][1], tmp_path / DATASETS[name].folder
    ours = load_both(name, tmp_path, time_steps)
    options = {"data_type": "frame", "frames_number": time_steps, "split_by": "number"}
    if name == "cifar10-dvs":
        whole = reader_of(name)(str(folder), **options)
        theirs = split_to_train_test_set(0.9, whole, 10)
    else:
        theirs = [reader_of(name)(str(folder), train=train, **options) for train in (True, False)]
    for (frames, labels), split in zip(ours, theirs, strict=True):
        assert len(frames) == len(split)
        for (expected, their_label), found, label in zip(split, frames, labels, strict=True):
            assert_equal(found.float(), torch.from_numpy(expected), "frames")
            if name == "dvs-gesture":
                assert split.classes[their_label] == str(int(label)), "they number folders, which are ordered as text"
            else:
                assert their_label == label


@pytest.mark.parametrize("name", ["n-mnist"])
def test_what_a_killed_process_left_is_made_anew(name: str, written: dict, tmp_path: Path) -> None:
    for part in ("events_np", "frames_3"):
        (tmp_path / "NMNIST" / f"{part}.partial" / "train").mkdir(parents=True)
    assert_frames(name, tmp_path, written)
    assert not list((tmp_path / "NMNIST").glob("*partial*"))


def test_one_process_at_a_time_makes_them(tmp_path: Path) -> None:
    entered = threading.Event()

    def enter() -> None:
        with locked(tmp_path):
            entered.set()

    with locked(tmp_path):
        # A lock is an open file's, so a thread that opens its own is kept out like a process.
        other = threading.Thread(target=enter)
        other.start()
        assert not entered.wait(0.2)
    assert entered.wait(10)
    other.join()


def test_frames_are_made_once(name: str, written: dict, tmp_path: Path) -> None:
    assert_frames(name, tmp_path, written)
    folder = tmp_path / DATASETS[name].folder
    shutil.rmtree(folder / "extract")
    shutil.rmtree(folder / "events_np")
    assert_frames(name, tmp_path, written)


def test_batches_have_time_first_and_counts(name: str, written: dict, tmp_path: Path) -> None:
    time_steps, size = SETS[name][1], DATASETS[name].image_size
    data = make_data(name, tmp_path, 4, 0, time_steps=time_steps, augmentations=("crop", "flip"))
    x, labels = next(iter(data.test_dataloader()))
    assert (x.shape, x.dtype) == ((time_steps, len(labels), 2, size, size), torch.float32)
    for sample, (events, label) in enumerate(written["test"][: len(labels)]):
        assert labels[sample] == label
        assert_equal(x[:, sample], expected_frames(events, time_steps, size).float(), "counts, not scaled")
    assert next(iter(data.train_dataloader()))[0].shape == (time_steps, 4, 2, size, size)


def test_missing_data_set_says_what_to_put_where(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as raised:
        load_both(name, tmp_path, 4)
    folder, info, told = tmp_path / DATASETS[name].folder / "download", DATASETS[name], str(raised.value)
    assert told.startswith(f"{info.title} is not in {folder}. Its home is {info.home}. Type")
    assert {
        "n-mnist": f"Type mkdir -p {folder}, and put Train.zip, Test.zip there, from https://www.garrickorchard.com/",
        "cifar10-dvs": f"curl -L --create-dirs -o {folder / 'truck.zip'} https://ndownloader.figshare.com/files/7712839",
        "dvs-gesture": f"Type mkdir -p {folder}, and put DvsGesture.tar.gz there, from https://ibm.ent.box.com/",
    }[name] in told
    assert not any(tmp_path.iterdir()), "nothing half-made is left"


def test_truncated_archive_is_named_and_kept(
    name: str, written: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = pack(name, tmp_path / DATASETS[name].folder, monkeypatch)[-1]
    archive.write_bytes(archive.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{archive}: expected the archive .* truncated or corrupt"):
        load_both(name, tmp_path, 4)
    assert archive.exists()


@pytest.mark.parametrize("kept", ["most", "nothing"])
def test_truncated_recording_is_named(name: str, written: dict, tmp_path: Path, kept: str) -> None:
    extract = tmp_path / DATASETS[name].folder / "extract"
    file = sorted(path for path in extract.rglob("*.*") if path.suffix in (".bin", ".aedat"))[-1]
    # Of DVS128 Gesture whole events go, which SpikingJelly itself would not miss.
    lost = 16 if name == "dvs-gesture" else 3
    file.write_bytes(file.read_bytes()[:-lost] if kept == "most" else b"")
    with pytest.raises(ValueError, match=f"{file}: expected whole|{file}: expected an AEDAT 3.1 header"):
        load_both(name, tmp_path, 4)
    assert not (extract.parent / "events_np").exists()


def test_missing_recording_is_noticed(name: str, written: dict, tmp_path: Path) -> None:
    folder = tmp_path / DATASETS[name].folder
    assert_frames(name, tmp_path, written)
    file = sorted((folder / "events_np").rglob("*.npz"))[0]
    content = file.read_bytes()
    file.unlink()
    expected = DATASETS[name].splits
    with pytest.raises(ValueError, match=rf"events_np: expected ({expected['train']} train|{expected['test']} test)"):
        load_both(name, tmp_path, 2)
    file.write_bytes(content[:-30])
    with pytest.raises(ValueError, match=f"{file}: the recording cannot be read"):
        load_both(name, tmp_path, 2)
    np.savez(file, t=[1, 2], x=[0, DATASETS[name].image_size], y=[0, 0], p=[0, 1])
    with pytest.raises(ValueError, match=f"{file}: the recording cannot be read .events beyond the sensor"):
        load_both(name, tmp_path, 2)
    np.savez(file, t=[], x=[], y=[], p=[])
    with pytest.raises(ValueError, match=f"{file}: the recording cannot be read .it holds no events"):
        load_both(name, tmp_path, 2)
    assert not (folder / "frames_2").exists()
    assert not list(folder.glob("*partial*"))


@pytest.mark.parametrize("name", ["n-mnist"])
def test_damaged_frames_are_named(name: str, written: dict, tmp_path: Path) -> None:
    assert_frames(name, tmp_path, written)
    file = tmp_path / "NMNIST" / "frames_3" / "train_frames.npy"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="frames_3: the train frames cannot be read .* Delete this folder"):
        load_both(name, tmp_path, 3)


@pytest.mark.parametrize("name", ["n-mnist"])
def test_counts_beyond_a_byte_are_kept(name: str, written: dict, tmp_path: Path) -> None:
    assert_frames(name, tmp_path, written)
    file = sorted((tmp_path / "NMNIST" / "events_np" / "train").rglob("*.npz"))[3]
    np.savez(file, t=np.arange(700), x=np.full(700, 33), y=np.full(700, 7), p=np.ones(700, dtype=int))
    (train, _), (test, _) = load_both(name, tmp_path, 2)
    assert (train.dtype, test.dtype) == (torch.int16, torch.uint8)
    assert train[3].sum() == 700
    assert train[3, :, 1, 7, 33].tolist() == [350, 350]


def test_frames_need_a_number_of_time_steps(name: str, tmp_path: Path) -> None:
    for wrong in (None, 0):
        with pytest.raises(ValueError, match=f"time_steps: expected the number of frames .* {name}, got {wrong}"):
            make_data(name, tmp_path, 4, 0, time_steps=wrong)
    with pytest.raises(ValueError, match="'normalise' is for images"):
        make_data(name, tmp_path, 4, 0, time_steps=2, augmentations=("normalise",))
