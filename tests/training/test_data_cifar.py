"""CIFAR-10 and CIFAR-100 from files in the formats of both of their versions, and what is refused."""

from __future__ import annotations

import hashlib
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tolerance import assert_equal
from torchvision import datasets
from trainings import load_both

from klif_sj.training.data.catalogue import DATASETS

pytestmark = pytest.mark.once

READERS = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}
SPLITS = {"train": 50, "test": 10}


@pytest.fixture(params=READERS)
def name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A data set of which there are 50 and 10 images."""
    monkeypatch.setitem(DATASETS, request.param, replace(DATASETS[request.param], splits=SPLITS))
    return request.param


@pytest.fixture
def samples(name: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images ``[N, 3, 32, 32]`` and classes by split."""
    rng = np.random.default_rng(0)
    classes = DATASETS[name].classes
    return {
        split: (rng.integers(0, 256, (number, 3, 32, 32), dtype=np.uint8), rng.integers(0, classes, number))
        for split, number in SPLITS.items()
    }


def write_binary(name: str, root: Path, samples: dict[str, tuple[np.ndarray, np.ndarray]]) -> list[Path]:
    """The official binary version: a record is the class, after the coarse class in CIFAR-100, and three planes."""
    folder = root / DATASETS[name].folder
    folder.mkdir(parents=True)
    files = {"train": [f"data_batch_{number}.bin" for number in range(1, 6)], "test": ["test_batch.bin"]}
    if name == "cifar100":
        files = {"train": ["train.bin"], "test": ["test.bin"]}
    written = []
    for split, (images, labels) in samples.items():
        columns = [labels % 20, labels] if name == "cifar100" else [labels]
        records = np.concatenate([np.stack(columns, 1).astype(np.uint8), images.reshape(len(images), -1)], 1)
        for file, part in zip(files[split], np.split(records, len(files[split])), strict=True):
            written.append(folder / file)
            written[-1].write_bytes(part.tobytes())
    return written


def write_python(
    name: str, root: Path, samples: dict[str, tuple[np.ndarray, np.ndarray]], monkeypatch: pytest.MonkeyPatch
) -> list[Path]:
    """Torchvision's files: pickled dictionaries, whose MD5 it is made to expect."""
    reader = READERS[name]
    folder = root / reader.base_folder
    folder.mkdir(parents=True)
    written = []

    def write(file: str, content: dict[str, Any]) -> list[str]:
        written.append(folder / file)
        written[-1].write_bytes(pickle.dumps(content))
        return [file, hashlib.md5(written[-1].read_bytes()).hexdigest()]

    for split, files in (("train", reader.train_list), ("test", reader.test_list)):
        images, labels = (np.array_split(part, len(files)) for part in samples[split])
        key = "fine_labels" if name == "cifar100" else "labels"
        listed = [
            write(file, {"data": x.reshape(len(x), -1), key: y.tolist()})
            for (file, _), x, y in zip(files, images, labels, strict=True)
        ]
        monkeypatch.setattr(reader, f"{split}_list", listed)
    file, md5 = write(reader.meta["filename"], {reader.meta["key"]: [str(n) for n in range(DATASETS[name].classes)]})
    monkeypatch.setattr(reader, "meta", {**reader.meta, "md5": md5})
    return written


def assert_read(name: str, root: Path, samples: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    for split, (images, labels) in zip(("train", "test"), load_both(name, root), strict=True):
        assert images.dtype == torch.uint8
        assert_equal(images, torch.from_numpy(samples[split][0]), f"{split} images")
        assert labels.tolist() == samples[split][1].tolist()


def test_binary_version_is_read(name: str, samples: dict, tmp_path: Path) -> None:
    write_binary(name, tmp_path, samples)
    assert_read(name, tmp_path, samples)


def test_python_version_is_read(name: str, samples: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_python(name, tmp_path, samples, monkeypatch)
    assert_read(name, tmp_path, samples)


@pytest.mark.parametrize("change", [-1, 1])
def test_binary_file_of_another_size_is_named(name: str, samples: dict, tmp_path: Path, change: int) -> None:
    for file in write_binary(name, tmp_path, samples):
        content = file.read_bytes()
        file.write_bytes(content[:-1] if change < 0 else content + b"0")
        with pytest.raises(ValueError, match=f"{file}: expected {len(content)} bytes, got {len(content) + change}"):
            load_both(name, tmp_path)
        file.write_bytes(content)


def test_class_that_there_is_not_is_named(name: str, samples: dict, tmp_path: Path) -> None:
    file = write_binary(name, tmp_path, samples)[-1]
    classes = DATASETS[name].classes
    content = bytearray(file.read_bytes())
    content[0 if name == "cifar10" else 1] = classes
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"{file}: expected classes below {classes}, got {classes}; the file is cor"):
        load_both(name, tmp_path)


def test_missing_binary_file_is_named(name: str, samples: dict, tmp_path: Path) -> None:
    file = write_binary(name, tmp_path, samples)[-1]
    file.unlink()
    with pytest.raises(FileNotFoundError, match=f"{file} is missing from .*binary version"):
        load_both(name, tmp_path)


def test_pickle_that_is_not_the_official_one_is_never_opened(
    name: str, samples: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("it was opened")

    for file in write_python(name, tmp_path, samples, monkeypatch):
        content = file.read_bytes()
        file.write_bytes(content[:-1])
        with monkeypatch.context() as patched:
            patched.setattr("pickle.load", opened)
            with pytest.raises(ValueError, match=f"{file}: expected the file .* truncated or corrupt"):
                load_both(name, tmp_path)
        file.write_bytes(content)


def test_missing_data_set_says_where_it_comes_from(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(self: Any) -> None:
        raise RuntimeError("no route to host")

    monkeypatch.setattr(datasets.CIFAR10, "download", unreachable)
    with pytest.raises(FileNotFoundError) as raised:
        load_both(name, tmp_path)
    told, reader = str(raised.value), READERS[name]
    assert told.startswith(f"{DATASETS[name].title} is not in {tmp_path}")
    for part in (
        "no route to host",
        reader.url,
        reader.base_folder,
        DATASETS[name].folder,
        "https://www.cs.toronto.edu/~kriz/cifar.html",
        f"{reader.__name__}('{tmp_path}', download=True)",
    ):
        assert part in told
