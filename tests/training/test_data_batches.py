"""Batches: their order by seed and epoch, sharing among processes, the validation share, where the data lives."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import lightning
import pytest
import torch
from tolerance import assert_equal
from torch import nn
from torch.utils.data import DistributedSampler

from klif_sj.training.data import batches, make_data
from klif_sj.training.data.augment import AUGMENTATIONS, Augmentation
from klif_sj.training.data.batches import Batches, DataModule, Samples, load
from klif_sj.training.data.catalogue import DATASETS, find_dataset
from klif_sj.training.data.images import Split

pytestmark = pytest.mark.once

CPU = torch.device("cpu")


def digits(**given: object) -> DataModule:
    return make_data("digits", Path(), **{"batch_size": 32, "seed": 0, **given})


def in_process(data: DataModule, rank: int, world_size: int) -> DataModule:
    """The data as a trainer's process meets it."""
    data.trainer = SimpleNamespace(global_rank=rank, world_size=world_size, strategy=SimpleNamespace(root_device=CPU))
    return data


def identities(batches: Batches) -> list[tuple[float, ...]]:
    """Images as tuples, by which they are told apart."""
    return [tuple(image.flatten().tolist()) for x, _ in batches for image in x]


def epoch(data: DataModule, number: int) -> Batches:
    batches = data.train_dataloader()
    batches.sampler.set_epoch(number)
    return batches


def test_order_depends_on_seed_and_epoch() -> None:
    first = identities(epoch(digits(), 0))
    assert identities(epoch(digits(), 0)) == first
    assert len(first) == 1437
    for other in (epoch(digits(), 1), epoch(digits(seed=5), 0)):
        drawn = identities(other)
        assert drawn != first
        assert sorted(drawn) == sorted(first)


def test_augmented_batches_depend_on_seed_and_epoch() -> None:
    def batches(seed: int, number: int) -> torch.Tensor:
        return torch.cat([x for x, _ in epoch(digits(seed=seed, augmentations=("crop", "flip", "cutout")), number)])

    first = batches(0, 3)
    torch.manual_seed(7)
    assert_equal(batches(0, 3), first, "again")
    assert not torch.equal(batches(0, 4), first)
    assert not torch.equal(batches(1, 3), first)


def test_lightning_sets_the_epoch() -> None:
    class Recorder(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(64, 10)
            self.seen: list[tuple[float, ...]] = []
            self.validated = 0

        def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], index: int) -> torch.Tensor:
            self.seen += [tuple(image.flatten().tolist()) for image in batch[0]]
            return self.net(batch[0].flatten(1)).sum()

        def validation_step(self, batch: tuple[torch.Tensor, torch.Tensor], index: int) -> None:
            self.validated += len(batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.0)

    recorder = Recorder()
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(recorder, digits(batch_size=100))
    expected = [identities(epoch(digits(batch_size=100), number)) for number in (0, 1)]
    assert recorder.seen == expected[0] + expected[1]
    assert recorder.validated == 2 * 360


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_out_the_training_set(world_size: int) -> None:
    shards = [epoch(in_process(digits(), rank, world_size), 1) for rank in range(world_size)]
    drawn = [identities(shard) for shard in shards]
    every = [image for shard in drawn for image in shard]
    # As many for each, so up to world_size - 1 images come twice.
    assert len(every) == -(-1437 // world_size) * world_size
    assert set(every) == set(identities(digits().train_dataloader()))
    assert len({len(list(shard)) for shard in shards}) == 1
    assert len(shards[0]) == len(list(shards[0]))
    assert drawn[0] != identities(epoch(in_process(digits(), 0, world_size), 2)), "another epoch, another shard"


def test_processes_augment_independently() -> None:
    x = torch.arange(1, 65).view(1, 1, 8, 8).expand(8, 1, 8, 8).float()
    samples = Samples(x, torch.arange(8))
    order: DistributedSampler = DistributedSampler(range(8), 1, 0, shuffle=False)
    augmentation = Augmentation(("crop",), find_dataset("digits"))
    first, second = (
        next(iter(Batches(samples, 8, augmentation, CPU, sampler=order, rank=rank, world_size=2)))[0] for rank in (0, 1)
    )
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("number", "batch_size", "world_size"), [(360, 32, 3), (10, 3, 4), (7, 2, 2), (9, 100, 2), (3, 1, 2)]
)
def test_processes_share_out_the_test_set_without_repeating_any(number: int, batch_size: int, world_size: int) -> None:
    samples = Samples(torch.arange(number).view(-1, 1, 1, 1).float(), torch.arange(number))
    shards = [
        list(
            Batches(
                samples, batch_size, Augmentation((), find_dataset("digits")), CPU, rank=rank, world_size=world_size
            )
        )
        for rank in range(world_size)
    ]
    assert sorted(int(label) for shard in shards for _, labels in shard for label in labels) == list(range(number))
    assert len({len(shard) for shard in shards}) == 1, "as many batches each, or distributed modules wait for ever"
    assert all(0 < len(labels) <= max(batch_size, 2) for shard in shards for _, labels in shard)


def test_one_process_meets_the_test_set_in_order() -> None:
    data = digits()
    assert_equal(torch.cat([labels for _, labels in data.test_dataloader()]), data.test.labels, "labels")
    assert_equal(torch.cat([x for x, _ in data.test_dataloader()]), data.test.inputs, "images")


def test_validation_share_comes_out_of_the_training_set() -> None:
    whole, data = digits(), digits(validation=0.1)
    assert (len(data.train), len(data.validation), len(data.test)) == (1293, 144, 360)
    parts = [identities(data.train_dataloader()), identities(data.val_dataloader())]
    assert sorted(parts[0] + parts[1]) == sorted(identities(whole.train_dataloader()))
    assert identities(data.test_dataloader()) == identities(whole.test_dataloader())
    assert not set(parts[1]) & set(identities(data.test_dataloader()))
    # A tenth of each class.
    labels = torch.cat([labels for _, labels in data.val_dataloader()])
    tenths = whole.train.labels.bincount() / 10
    assert (labels.bincount() - tenths).abs().max() < 1
    assert identities(digits(validation=0.1).val_dataloader()) == parts[1]
    other = digits(validation=144, seed=3)
    assert len(other.validation) == 144
    assert identities(other.val_dataloader()) != parts[1], "another seed, other samples"


def test_the_test_set_is_read_only_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    read = []

    def recorded(name: str, root: Path, split: str, time_steps: int | None) -> Split:
        read.append(split)
        return load(name, root, split, time_steps)

    monkeypatch.setattr(batches, "load", recorded)
    data = digits(validation=0.1)
    list(data.train_dataloader()), list(data.val_dataloader())
    assert read == ["train"]
    assert len(data.test) == 360
    assert read == ["train", "test"]
    shared = data.splits
    assert digits(splits=shared).test.inputs is data.test.inputs
    assert read == ["train", "test"]


def test_validation_loader_is_the_test_set_where_nothing_was_put_aside() -> None:
    data = digits()
    assert data.validation is None
    assert identities(data.val_dataloader()) == identities(data.test_dataloader())


def test_validation_images_are_not_augmented() -> None:
    data = digits(validation=0.1, augmentations=("crop", "flip", "cutout"))
    assert identities(data.val_dataloader()) == identities(digits(validation=0.1).val_dataloader())


def test_parts_share_one_copy_a_device() -> None:
    data = digits(validation=0.5)
    device = torch.device("meta")
    assert data.train.stored(device)[0] is data.validation.stored(device)[0]
    assert data.train.stored(device)[0].device == device


def test_data_larger_than_the_gpu_stays_on_the_host(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    samples = digits().train
    gpu = torch.device("cuda", 0)
    moved: list[torch.device] = []

    def to(self: torch.Tensor, device: torch.device) -> torch.Tensor:
        moved.append(device)
        return self

    monkeypatch.setattr(torch.Tensor, "to", to)
    for free, place in ((2 * samples.inputs.nbytes - 1, CPU), (2 * samples.inputs.nbytes, gpu)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10**12))
        samples._stored.clear()
        moved.clear()
        samples.stored(gpu)
        assert moved == [place, place]
        assert ("does not fit" in caplog.text) == (place == CPU)
        caplog.clear()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batch_size": 1438}, "batch_size: expected at most the 1437 training images of digits, got 1438"),
        ({"batch_size": 1294, "validation": 0.1}, "at most the 1293 training images of digits, got 1294"),
        ({"batch_size": 0}, "batch_size: expected a positive integer, got 0"),
        ({"validation": 1.0}, "validation: expected a fraction or a number of the 1437 training samples.* got 1.0"),
        ({"validation": -0.1}, "validation: expected a fraction or a number of the 1437 training samples.* got -0.1"),
        ({"validation": 0.001}, "that leaves some of each class on either side, got 0.001"),
        ({"validation": 1437}, "that leaves some of each class on either side, got 1437"),
        ({"validation": 1430}, "that leaves some of each class on either side, got 1430"),
        ({"augmentations": ("flop",)}, "got 'flop'; did you mean 'flip'"),
    ],
)
def test_refusals(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        digits(**given)


def test_batches_of_all_processes_together_are_within_the_data() -> None:
    data = in_process(digits(batch_size=500), 0, 3)
    with pytest.raises(ValueError, match="at most the 1437 training images of digits in each of 3 processes, got 500"):
        data.train_dataloader()


def test_unknown_data_set_is_refused() -> None:
    with pytest.raises(
        ValueError, match="expected one of digits, .*dvs-gesture, got 'cifar-10'; did you mean 'cifar10'"
    ):
        make_data("cifar-10", Path(), 1, 0)


def test_what_there_is_is_light_to_import() -> None:
    heavy = ("torchvision", "sklearn", "lightning", "spikingjelly.datasets")
    program = f"import sys, klif_sj.training.data.catalogue; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


def test_every_data_set_is_described() -> None:
    assert set(DATASETS) == {
        "digits",
        "mnist",
        "fashion-mnist",
        "cifar10",
        "cifar100",
        "n-mnist",
        "cifar10-dvs",
        "dvs-gesture",
    }
    for name, info in DATASETS.items():
        assert info.home.startswith("http"), name
        assert set(info.splits) == {"train", "test"}
        assert (info.in_channels == 2) == (info.kind == "events")
        assert len(info.mean) == len(info.std) == (0 if info.kind == "events" else info.in_channels)


def test_page_describes_every_data_set() -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    for name, info in DATASETS.items():
        shape = f"{'Tx' if info.kind == 'events' else ''}{info.in_channels}x{info.image_size}x{info.image_size}"
        row = f"| `{name}` | {info.title} | {shape} | {info.splits['train']} | {info.splits['test']} | "
        assert row + (f"`{info.folder}`" if info.folder else "comes with") in page
    for name, description in AUGMENTATIONS.items():
        assert f"| `{name}` | {description.removesuffix('; of the test set too')} |" in page


def test_program_on_the_page_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    program, printed = re.search(r"```python\n(.*?)```\n\n```text\n(.*?)```", page, re.DOTALL).groups()
    exec(program, {})
    assert capsys.readouterr().out == printed
