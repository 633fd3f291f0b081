"""What a training writes, refuses and survives: kills, full disks, damaged checkpoints."""

from __future__ import annotations

import csv
import errno
import json
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from spikingjelly.activation_based import functional
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tolerance import assert_close, assert_equal
from trainings import TINY, UPDATES, assert_same_training, finished_epochs, tiny, training, weights

from klif_sj import cli, runtime
from klif_sj.models import spiking_layers
from klif_sj.training import checkpoint, run
from klif_sj.training.atomic import replacing
from klif_sj.training.checkpoint import AtomicCheckpointIO
from klif_sj.training.data.batches import load
from klif_sj.training.run import Placement, TrainingRun, load_checkpoint, network_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def finished(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A training that ran to its end."""
    out = tmp_path_factory.mktemp("finished")
    return out, training(out, command="klif-sj train").run()


@pytest.fixture
def unfinished(tmp_path: Path) -> Path:
    """A training whose second epoch was interrupted."""
    interrupt(training(tmp_path), epoch=1)
    return tmp_path


def interrupt(running: TrainingRun, epoch: int) -> None:
    step = running.module.training_step

    def interrupted(batch: Any, batch_idx: int) -> Any:
        if (running.module.current_epoch, batch_idx) == (epoch, 2):
            raise KeyboardInterrupt
        return step(batch, batch_idx)

    running.module.training_step = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        running.run()


# What is written


def test_result_is_that_of_the_checkpoint(finished: tuple[Path, dict[str, Any]]) -> None:
    out, result = finished
    assert json.loads((out / "result.json").read_text()) == result
    recipe, net = load_checkpoint(out / "checkpoints" / "last.ckpt")
    assert recipe == tiny()
    assert result["recipe"] == recipe.as_dict()
    assert result["notation"] == net.notation == "(4C3+4C3+4C3)(enc)-4C3-MP2-64FC-(100FC-AP10)(dec)"
    assert result["parameters"] == sum(parameter.numel() for parameter in net.parameters())
    assert (result["training_inputs"], result["test_inputs"], result["processes"]) == (1437, 360, 1)
    images, labels = load("digits", Path(), "test")
    with torch.no_grad():
        right = (net.eval()(images).argmax(1) == labels).sum().item()
    assert result["test_accuracy"] == pytest.approx(right / 360, rel=1e-6)
    assert result["k"] == {name: node.k.item() for name, node in spiking_layers(net).items()}
    assert all(value != 1 for value in result["k"].values()), "every k has learned"
    assert [row["epoch"] for row in result["history"]] == [1, 2, 3]
    assert result["history"][-1]["train_loss"] < result["history"][0]["train_loss"]
    assert result["seconds"] > 0
    assert (result["backend"], result["precision"], result["command"]) == ("torch", "32-true", "klif-sj train")


def test_a_training_keeps_no_states_and_its_checkpoint_is_any_networks(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    trained = spiking_layers(training(tmp_path).module.net).values()
    assert {node.keep_state for node in trained} == {False}
    recipe, net = load_checkpoint(finished[0] / "checkpoints" / "last.ckpt")
    assert {node.keep_state for node in spiking_layers(net).values()} == {True}
    network_of(recipe, keep_state=False).load_state_dict(net.state_dict())
    frames = torch.rand(4, 2, 1, 8, 8)
    with torch.no_grad():
        whole = net.eval().outputs_by_step(frames)
        functional.reset_net(net)
        in_parts = torch.cat([net.outputs_by_step(part) for part in frames.split((1, 3))])
    assert_equal(in_parts, whole)


def test_without_states_a_training_is_the_same(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    keeping = training(tmp_path)
    for node in spiking_layers(keeping.module.net).values():
        node.keep_state = True
    keeping.run()
    assert_same_training(tmp_path, finished[0])


@pytest.mark.skipif("cpp" not in runtime.supported_backends(), reason="no C++ compiler")
def test_lif_is_trained_on_kernels_as_by_spikingjelly(tmp_path: Path) -> None:
    """Spikes are equal, gradients up to rounding; checkpoints do not say what they were trained on."""
    images, labels = load("digits", Path(), "test")
    modules = {name: training(tmp_path, tiny(neuron="lif", backend=name)).module for name in ("auto", "torch")}
    for module in modules.values():
        with torch.no_grad():
            for weight in module.net.parameters():
                if weight.ndim > 1:
                    weight.abs_()  # enough current for every layer to fire
        torch.manual_seed(0)  # of dropout
        outputs = module(images[:64])
        assert outputs.any()
        module.loss(outputs, labels[:64]).backward()
    fused, expected = (dict(module.net.named_parameters()) for module in modules.values())
    for name, parameter in expected.items():
        assert_close(fused[name].grad, parameter.grad, name)

    result = training(tmp_path, tiny(neuron="lif", backend="auto", epochs=1)).run()
    assert result["backend"] == "cpp"
    _, net = load_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    eager = modules["torch"].net
    functional.reset_net(eager)
    eager.load_state_dict(net.state_dict())
    copied = pickle.loads(pickle.dumps(net))
    assert_equal(net.eval()(images), eager.eval()(images))
    functional.reset_net(net)
    assert_equal(copied.eval()(images), net(images))


def test_logs_hold_the_history(finished: tuple[Path, dict[str, Any]]) -> None:
    out, result = finished
    with (out / "logs" / "csv" / "version_0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    board = EventAccumulator(str(out / "logs" / "tensorboard")).Reload()
    for name in ("train_loss", "test_accuracy", "k/encoder", "firing_rate/fc1"):
        expected = [row[name] for row in result["history"]]
        assert [float(row[name]) for row in rows if row[name]] == pytest.approx(expected, rel=1e-6)
        assert [event.value for event in board.Scalars(name)] == pytest.approx(expected, rel=1e-6)
    rates = [event.value for event in board.Scalars("lr-Adam/weights")]
    assert rates == pytest.approx([2e-3, 1.5e-3, 0.5e-3]), "a cosine over three epochs"


# Going on


@pytest.mark.once
def test_a_training_that_is_killed_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    killed, expected = tmp_path / "killed", tmp_path / "expected"
    recipe = {**TINY, "epochs": 12}
    command = [sys.executable, "-m", "klif_sj", "train", "--recipe=digits", "--accelerator=cpu", f"--out={killed}"]
    command += [f"--set={name}={value}" for name, value in recipe.items()]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not (killed / "checkpoints" / "last.ckpt").exists():
            assert process.poll() is None, "it ended without a checkpoint"
            time.sleep(0.01)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    assert 1 <= finished_epochs(killed) < recipe["epochs"]
    # What a kill in the middle of the next checkpoint leaves behind.
    (killed / "checkpoints" / "last.ckpt.unfinished").write_bytes(b"PK\x03\x04")
    training(killed, tiny(**recipe), resume=True).run()
    training(expected, tiny(**recipe)).run()
    assert_same_training(killed, expected)
    assert [file.name for file in (killed / "checkpoints").iterdir()] == ["last.ckpt"]


def test_only_the_epochs_that_are_missing_are_trained(finished: tuple[Path, dict[str, Any]], unfinished: Path) -> None:
    assert finished_epochs(unfinished) == 1
    resumed = training(unfinished, resume=True)
    trained = []
    step = resumed.module.training_step
    resumed.module.training_step = lambda *batch: trained.append(resumed.module.current_epoch) or step(*batch)  # type: ignore[method-assign]
    resumed.run()
    assert trained == [1] * UPDATES + [2] * UPDATES
    assert_same_training(unfinished, finished[0])


def test_a_finished_training_resumes_to_the_same_result(finished: tuple[Path, dict[str, Any]]) -> None:
    out, result = finished
    again = training(out, resume=True, command="klif-sj train").run()
    changing = ("seconds", "environment")
    assert {name: again[name] for name in again if name not in changing} == {
        name: result[name] for name in result if name not in changing
    }


def test_a_training_that_has_not_begun_begins(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    training(tmp_path, resume=True).run()
    assert_same_training(tmp_path, finished[0])


def test_the_seed_decides(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    training(tmp_path, tiny(seed=2**32 - 1)).run()
    name = "net.fc1.linear.weight"
    assert not torch.equal(weights(tmp_path)[name], weights(finished[0])[name])


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"neuron": "clif"}, "neuron: 'klif' then, 'clif' now"),
        ({"epochs": 5, "seed": 4}, "epochs: 3 then, 5 now; seed: 0 then, 4 now"),
        ({"network": "vgg16"}, "network: 'klif-mnist' then, 'vgg16' now"),
    ],
)
def test_another_training_is_not_gone_on_with(
    finished: tuple[Path, dict[str, Any]], given: dict[str, Any], text: str
) -> None:
    with pytest.raises(ValueError, match=f"last.ckpt is of another training: {text}"):
        training(finished[0], tiny(**given), resume=True)


def test_what_is_there_is_not_overwritten(finished: tuple[Path, dict[str, Any]], unfinished: Path) -> None:
    with pytest.raises(ValueError, match="holds a finished training. Add --resume"):
        training(finished[0])
    with pytest.raises(ValueError, match="holds an unfinished training. Add --resume"):
        training(unfinished)
    with pytest.raises(ValueError, match="out: expected a folder, got the file"):
        training(finished[0] / "result.json")


# A full disk


def test_a_full_disk_leaves_the_last_good_checkpoint(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = torch.save

    def half(content: dict[str, Any], file: Any) -> None:
        if content["epoch"] < 2:
            return save(content, file)
        file.write(b"half a checkpoint")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", half)
    with pytest.raises(OSError, match=r"last\.ckpt could not be saved .*No space left.*; the last good one is still"):
        training(tmp_path).run()
    monkeypatch.undo()
    assert finished_epochs(tmp_path) == 2
    assert [file.name for file in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]
    training(tmp_path, resume=True).run()
    assert_same_training(tmp_path, finished[0])


@pytest.mark.once
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
def test_a_device_that_is_full_keeps_what_was_there(tmp_path: Path) -> None:
    path, writer = tmp_path / "last.ckpt", AtomicCheckpointIO()
    (tmp_path / "first.ckpt.unfinished").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"first\.ckpt could not be saved .*; there was none before it"):
        writer.save_checkpoint({"weights": torch.ones(1000)}, tmp_path / "first.ckpt")
    writer.save_checkpoint({"weights": torch.zeros(1000)}, path)
    (tmp_path / "last.ckpt.unfinished").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"last\.ckpt could not be saved .*; the last good one is still there"):
        writer.save_checkpoint({"weights": torch.ones(1000)}, path)
    assert torch.load(path)["weights"].sum() == 0
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.once
def test_a_file_is_the_old_one_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with replacing(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    with pytest.raises(KeyboardInterrupt), replacing(path) as file:
        raise KeyboardInterrupt
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


# Checkpoints that are not what they should be


@pytest.mark.parametrize("damage", ["truncated", "one bit", "empty", "something else"])
def test_a_damaged_checkpoint_is_named(finished: tuple[Path, dict[str, Any]], tmp_path: Path, damage: str) -> None:
    path = tmp_path / "checkpoints" / "last.ckpt"
    path.parent.mkdir()
    content = bytearray((finished[0] / "checkpoints" / "last.ckpt").read_bytes())
    if damage == "one bit":
        # Within the weights, where torch itself would not notice.
        values = weights(finished[0])["net.fc1.linear.weight"].numpy().tobytes()
        content[content.index(values) + 100] ^= 1
        assert torch.load(_written(path, content), weights_only=True)
    path.write_bytes({"truncated": content[:-1000], "empty": b"", "something else": b"text"}.get(damage, content))
    with pytest.raises(ValueError, match=r"the checkpoint .*last\.ckpt cannot be read"):
        load_checkpoint(path)
    with pytest.raises(ValueError, match=r"the checkpoint .*last\.ckpt cannot be read"):
        training(tmp_path, resume=True)


def by_recipe(saved: dict[str, Any], **given: Any) -> dict[str, Any]:
    """A checkpoint with these values in its recipe."""
    return {**saved, "hyper_parameters": {"recipe": {**saved["hyper_parameters"]["recipe"], **given}}}


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_a_checkpoint_of_something_else_is_refused(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    path = tmp_path / "other.ckpt"
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint .*other\.ckpt"):
        load_checkpoint(path)
    torch.save(torch.zeros(3), path)
    with pytest.raises(ValueError, match=r"other\.ckpt is no checkpoint of a training"):
        load_checkpoint(path)
    saved = torch.load(finished[0] / "checkpoints" / "last.ckpt", weights_only=True)
    torch.save({name: value for name, value in saved.items() if name != "hyper_parameters"}, path)
    with pytest.raises(ValueError, match=r"other\.ckpt is no checkpoint of klif-sj train: it has no recipe"):
        load_checkpoint(path)
    torch.save(by_recipe(saved, epochs=-1), path)
    with pytest.raises(ValueError, match=r"the recipe in .*other\.ckpt cannot be read \(epochs: expected"):
        load_checkpoint(path)
    torch.save(by_recipe(saved, neuron="glif"), path)
    with pytest.raises(ValueError, match=r"other\.ckpt does not hold the network klif-mnist with the neuron glif"):
        load_checkpoint(path)


def test_a_checkpoint_from_a_machine_with_another_backend_is_read(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    path = tmp_path / "other.ckpt"
    saved = torch.load(finished[0] / "checkpoints" / "last.ckpt", weights_only=True)
    torch.save(by_recipe(saved, backend="cupy"), path)
    recipe, net = load_checkpoint(path)
    assert recipe == tiny(backend="cupy")
    assert {node.backend for node in spiking_layers(net).values()} == {"auto"}


# How it trains


def test_evaluation_sees_the_test_images_as_the_training_did(tmp_path: Path) -> None:
    recipe = tiny(augmentations=("crop", "normalise"), epochs=2)
    result = training(tmp_path, recipe).run()
    found = tmp_path / "evaluation.json"
    checkpoint = str(tmp_path / "checkpoints" / "last.ckpt")
    assert cli.main(["evaluate", checkpoint, "--accelerator=cpu", "--counted-inputs=0", f"--json={found}"]) == 0
    assert json.loads(found.read_text())["accuracy"] == pytest.approx(result["test_accuracy"], rel=1e-6)


def test_recipe_reaches_trainer_and_optimizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def fit(trainer: lightning.Trainer, module: Any, data: Any, start: Path | None) -> None:
        seen.update(trainer=trainer, module=module, data=data)
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "_fit", fit)
    recipe = tiny(
        neuron="glif",
        optimizer="sgd",
        learning_rate=0.1,
        momentum=0.8,
        weight_decay=4e-5,
        annealing_epochs=7,
        gradient_clip=0.5,
        precision="bf16-mixed",
    )
    with pytest.raises(KeyboardInterrupt):
        training(tmp_path, recipe).run()
    assert seen["trainer"].gradient_clip_val == 0.5
    assert seen["trainer"].precision == "bf16-mixed"
    assert seen["data"].batch_size == 240
    (optimizer,), (schedule,) = seen["module"].configure_optimizers()
    assert type(optimizer) is torch.optim.SGD
    groups = {
        group["name"]: (group["lr"], group["weight_decay"], group["momentum"]) for group in optimizer.param_groups
    }
    assert groups == {"weights": (0.1, 4e-5, 0.8), "neurons": (0.1, 0.0, 0.8), "gates": (0.1 * 0.1, 0.0, 0.8)}
    assert schedule.T_max == 7
    weight = seen["module"].net.conv1.conv.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()


@pytest.mark.parametrize("shape", [(3, 2, 8, 8), (4, 3, 2, 8, 8)])
def test_channels_last_changes_the_layout_and_no_value(shape: tuple[int, ...]) -> None:
    x = torch.rand(shape)
    found = run.SpikingClassifier(torch.nn.Identity(), tiny())
    found.net.outputs_by_step = lambda images: images  # type: ignore[assignment]
    y = found(x)
    assert torch.equal(y, x)
    assert y.flatten(0, -4).is_contiguous(memory_format=torch.channels_last)


def parameters(running: TrainingRun) -> torch.Tensor:
    return torch.cat([parameter.detach().double().flatten() for parameter in running.module.parameters()])


def test_a_clipped_gradient_has_the_norm_that_is_asked_for(tmp_path: Path) -> None:
    """One update by plain SGD at a rate of 1 moves the parameters by the clipped gradient."""
    options = {"optimizer": "sgd", "learning_rate": 1.0, "momentum": 0.0, "epochs": 1, "batch_size": 1437}
    moved = {}
    for name, clip in (("clipped", 1e-4), ("free", None)):
        running = training(tmp_path / name, tiny(**options, gradient_clip=clip))
        before = parameters(running)
        running.run()
        moved[name] = parameters(running) - before
    assert moved["free"].norm() > 5e-4
    assert moved["clipped"].norm().item() == pytest.approx(1e-4, rel=1e-2)
    cosine = torch.nn.functional.cosine_similarity(moved["free"], moved["clipped"], dim=0)
    assert cosine.item() == pytest.approx(1, abs=1e-4)


def test_mixed_precision_trains_float32_weights_in_bfloat16(tmp_path: Path) -> None:
    seen = set()
    running = training(tmp_path, tiny(precision="bf16-mixed", epochs=1))
    running.module.net.conv1.conv.register_forward_hook(lambda layer, inputs, output: seen.add(output.dtype))
    result = running.run()
    assert seen == {torch.bfloat16}
    assert {parameter.dtype for parameter in running.module.parameters()} == {torch.float32}
    assert result["precision"] == "bf16-mixed"
    assert 0 < result["history"][0]["train_loss"] < 0.11


# Where it runs


def test_a_device_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Placement.find("auto") == Placement("cpu")
    with pytest.raises(ValueError, match="'cuda' is not here for 1 processes; this PyTorch .* sees 0 GPUs"):
        Placement.find("cuda")
    for wrong in ("gpu", "meta", "cuda:x", "cuda:", "cpu:0"):
        with pytest.raises(ValueError, match=f"device: expected auto, cpu, cuda or cuda:N, got '{wrong}'"):
            Placement.find(wrong)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [Placement.find(name) for name in ("auto", "cuda", "cuda:1")] == [
        Placement("cuda", 1),
        Placement("cuda", 1),
        Placement("cuda", [1]),
    ]
    assert Placement.find("cuda:1").device == torch.device("cuda", 1)
    assert Placement.find("cuda", 2).processes == 2
    with pytest.raises(ValueError, match="'cuda:2' is not here"):
        Placement.find("cuda:2")
    with pytest.raises(ValueError, match="'cuda' is not here for 3 processes"):
        Placement.find("cuda", 3)
    with pytest.raises(ValueError, match="devices: 'cuda:1' is one device, got 2 processes"):
        Placement.find("cuda:1", 2)
