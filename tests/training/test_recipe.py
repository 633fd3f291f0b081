"""Recipes: what the files say, what is refused, what the command line overrides."""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from klif_sj import cli
from klif_sj.cli import train
from klif_sj.cli.recipe_options import FLAGS, overrides, parse_setting
from klif_sj.models import NETWORKS, NEURONS
from klif_sj.training.classifier import LOSSES
from klif_sj.training.data.catalogue import DATASETS
from klif_sj.training.recipe import LOSS_NAMES, Recipe, load_recipe, recipe_names

pytestmark = pytest.mark.once


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_names_what_there_is(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.network in NETWORKS
    assert recipe.dataset in DATASETS
    assert recipe.neuron in NEURONS
    assert recipe.width == (0.25 if name == "digits" else 1)
    assert Recipe.from_dict(recipe.as_dict()) == recipe
    if name != "digits":
        assert recipe.published_accuracy is not None


def test_recipes_are_the_papers() -> None:
    """Time steps, epochs, optimizer and loss of the KLIF paper's Table 1 and Sec. 3, of CLIF's authors, of GLIF's."""
    found = {
        name: (recipe.network, recipe.time_steps, recipe.epochs)
        for name, recipe in ((name, load_recipe(name)) for name in recipe_names())
    }
    assert found["klif-mnist"] == found["klif-fashion-mnist"] == ("klif-mnist", 8, 100)
    assert found["klif-n-mnist"] == ("klif-mnist", 10, 100)
    assert found["klif-cifar10"] == ("klif-cifar10", 10, 200)
    assert found["klif-cifar10-dvs"] == ("klif-cifar10-dvs", 15, 100)
    assert found["klif-dvs-gesture"] == ("klif-dvs-gesture", 12, 200)
    for network in ("vgg16", "resnet18"):
        assert found[f"klif-{network}"] == found[f"klif-{network}-coding"] == (network, 6, 100)
        assert (load_recipe(f"klif-{network}").coding, load_recipe(f"klif-{network}-coding").coding) == (False, True)
    for name in recipe_names():
        recipe = load_recipe(name)
        if name.startswith("klif"):
            assert (recipe.optimizer, recipe.learning_rate, recipe.loss) == ("adam", 1e-4, "rate-mse")
            assert (recipe.annealing_epochs or recipe.epochs) == 100
        elif name not in ("digits", "clif-cifar10-dvs", "clif-dvs-gesture"):
            assert (recipe.optimizer, recipe.learning_rate, recipe.momentum, recipe.epochs) == ("sgd", 0.1, 0.9, 200)
    for name, learning_rate, batch_size, dropout in (("cifar10-dvs", 0.05, 128, 0.3), ("dvs-gesture", 0.1, 16, 0.4)):
        recipe = load_recipe(f"clif-{name}")
        assert (recipe.optimizer, recipe.epochs, recipe.loss) == ("sgd", 300, "clif")
        assert (recipe.learning_rate, recipe.batch_size, recipe.dropout) == (learning_rate, batch_size, dropout)
    assert (load_recipe("clif-cifar10").batch_size, load_recipe("clif-cifar10").weight_decay) == (128, 5e-5)
    assert load_recipe("clif-cifar100").weight_decay == 5e-4
    assert {load_recipe(f"clif-{dataset}").loss for dataset in ("cifar10", "cifar100")} == {"clif"}
    glif = load_recipe("glif-resnet19-cifar100")
    assert (glif.batch_size, glif.weight_decay, glif.loss) == (64, 4e-5, "cross-entropy")


@pytest.mark.parametrize(
    ("name", "neuron", "time_steps", "accuracy"),
    [
        ("klif-fashion-mnist", "lif", 8, 94.28),
        ("klif-fashion-mnist", "klif", 8, 94.35),
        ("klif-fashion-mnist", "klif*", 8, 94.31),
        ("klif-vgg16", "klif-leaky-relu", 6, 85.9),
        ("klif-resnet18", "klif-only-k", 6, 87.2),
        ("klif-resnet18-coding", "klif", 6, 89.88),
        ("klif-resnet18-coding", "lif", 6, None),
        ("klif-fashion-mnist", "klif", 4, None),
        ("clif-cifar100", "clif", 8, 78.99),
        ("clif-cifar10", "clif-baseline", 6, 94.51),
        ("glif-resnet19-cifar10", "glif", 2, 94.56),
    ],
)
def test_published_accuracy_is_that_of_neuron_and_time_steps(
    name: str, neuron: str, time_steps: int, accuracy: float | None
) -> None:
    assert load_recipe(name).override(neuron=neuron, time_steps=time_steps).published_accuracy == accuracy


def test_losses_have_the_names_that_recipes_use() -> None:
    assert tuple(LOSSES) == LOSS_NAMES


def test_losses_by_hand() -> None:
    """Two steps, one input, two classes; the label is the second."""
    outputs = torch.tensor([[[0.0, 1.0]], [[1.0, 3.0]]])
    labels = torch.tensor([1])
    cross_entropies = [math.log(1 + math.exp(-1)), math.log(1 + math.exp(-2))]
    expected = {
        "rate-mse": (0.5**2 + 1.0**2) / 2,  # the mean is [0.5, 2]
        "cross-entropy": math.log(1 + math.exp(-1.5)),
        "clif": 0.95 * sum(cross_entropies) / 2 + 0.05 * (1 + 0 + 0 + 4) / 4,
    }
    assert {name: float(loss(outputs, labels)) for name, loss in LOSSES.items()} == pytest.approx(expected)


# What is refused


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"epoch": 3}, r"got 'epoch'; did you mean 'epochs'\?"),
        ({"neuron": "kilf"}, r"got 'kilf'; did you mean 'klif'\?"),
        ({"epochs": 0}, "epochs: expected an integer of at least 1, got 0"),
        ({"seed": -1}, "seed: expected an integer of at least 0, got -1"),
        ({"seed": 2**32}, r"seed: expected an integer below 2\*\*32, got 4294967296"),
        ({"learning_rate": 0}, "learning_rate: expected a positive number, got 0"),
        ({"learning_rate": float("nan")}, "learning_rate: expected a finite number, got nan"),
        ({"weight_decay": -0.1}, "weight_decay: expected a number of at least 0"),
        ({"gradient_clip": 0.0}, "gradient_clip: expected a positive number"),
        ({"validation": -0.1}, "validation: expected a fraction below 1 or a number of samples, got -0.1"),
        ({"validation": -5}, "validation: expected a fraction below 1 or a number of samples, got -5"),
        ({"validation": 1.0}, "validation: expected a fraction below 1 or a number of samples, got 1.0"),
        ({"tuned": ["learning_rat"]}, r"got 'learning_rat'; did you mean 'learning_rate'\?"),
        ({"optimizer": "adamw"}, "optimizer: expected one of 'adam', 'sgd', got 'adamw'"),
        ({"loss": "mse"}, "loss: expected one of 'rate-mse', 'cross-entropy', 'clif', got 'mse'"),
        ({"precision": "fp16"}, "precision: expected one of 'auto', '32-true'"),
        ({"published": {"klif": 94.0}}, "published: expected accuracies by neuron and T"),
    ],
)
def test_values_out_of_range_are_refused_by_field(given: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        load_recipe("digits").override(**given)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"epochs": 2.5}, "epochs: expected an integer, got 2.5"),
        ({"batch_size": True}, "batch_size: expected an integer, got True"),
        ({"width": "small"}, "width: expected a number, got 'small'"),
        ({"coding": "yes"}, "coding: expected True or False, got 'yes'"),
        ({"network": 3}, "network: expected a text, got 3"),
        ({"augmentations": "crop"}, "augmentations: expected a list of names, got 'crop'"),
    ],
)
def test_values_of_another_type_are_refused_by_field(given: dict[str, Any], text: str) -> None:
    with pytest.raises(TypeError, match=text):
        load_recipe("digits").override(**given)


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"got 'klif-fashon-mnist'; did you mean 'klif-fashion-mnist'\?"):
        load_recipe("klif-fashon-mnist")


def test_a_recipe_of_ones_own_is_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        'network = "klif-mnist"\ndataset = "digits"\nneuron = "klif"\n'
        "time_steps = 2\nepochs = 1\nbatch_size = 8\nlearning_rate = 1\n"
    )
    recipe = load_recipe(file)
    assert (recipe.name, recipe.learning_rate, recipe.optimizer) == ("mine", 1.0, "adam")
    assert load_recipe(str(file)) == recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('network = "klif-mnist"\n', "got no dataset, neuron, time_steps, epochs, batch_size, learning_rate"),
        ('netwrk = "klif-mnist"\n', r"got 'netwrk'; did you mean 'network'\?"),
        ("epochs = \n", "Invalid value"),
        ("\xff", "codec can't decode"),
    ],
)
def test_a_file_that_holds_no_recipe_is_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "broken.toml"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=rf"broken\.toml: .*{message}"):
        load_recipe(file)
    with pytest.raises(FileNotFoundError, match=r"there is no file .*missing\.toml"):
        load_recipe(tmp_path / "missing.toml")


def test_differences_name_both_values_and_leave_out_what_no_weight_depends_on() -> None:
    recipe = load_recipe("klif-resnet18")
    other = recipe.override(neuron="lif", width=0.5, source="elsewhere", published={})
    assert recipe.differences(other) == ["neuron: 'lif' then, 'klif' now", "width: 0.5 then, 1.0 now"]


# The command line


def recipe_of(*arguments: str) -> Recipe:
    """The recipe that ``klif-sj train`` with these arguments trains by."""
    parser = argparse.ArgumentParser()
    train.add(parser.add_subparsers())
    options = parser.parse_args(["train", *arguments])
    return load_recipe(options.recipe).override(**overrides(options))


def test_options_override_the_recipe() -> None:
    recipe = recipe_of(
        *("--recipe", "klif-fashion-mnist", "--neuron", "klif*", "--epochs", "3", "--learning-rate", "1e-3"),
        *("--set", "momentum=0.5", "--set", "gradient_clip=none", "--set", 'augmentations=["flip"]'),
        *("--set", "channels-last=false", "--set", "loss=cross-entropy", "--set", "precision=32-true"),
    )
    expected = load_recipe("klif-fashion-mnist").override(
        neuron="klif-star",
        epochs=3,
        learning_rate=1e-3,
        momentum=0.5,
        augmentations=("flip",),
        channels_last=False,
        loss="cross-entropy",
        precision="32-true",
    )
    assert recipe == expected


def test_every_option_is_a_field_of_its_name() -> None:
    values = load_recipe("digits").as_dict()
    values["gradient_clip"] = 1.0
    given = recipe_of("--recipe=digits", *(f"--{name.replace('_', '-')}={values[name]}" for name in FLAGS))
    assert given.as_dict() == values


@pytest.mark.parametrize("text", ["momentum", "=3", " = 3", "momentum= "])
def test_a_setting_without_a_name_or_value_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--set: expected NAME=VALUE, such as momentum=0.9, got"):
        parse_setting("--set", text, "momentum=0.9")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--recipe", "klif-minst"], "did you mean 'klif-mnist'?"),
        (["--recipe", "digits", "--set", "epoch=1"], "did you mean 'epochs'?"),
        (["--recipe", "digits", "--neuron", "clf"], "did you mean 'clif'?"),
        (["--recipe", "digits", "--set", "network=resnt19"], "did you mean 'resnet19'?"),
        (["--recipe", "digits", "--set", "dataset=minst"], "did you mean 'mnist'?"),
        (["--recipe", "digits", "--set", 'augmentations=["corp"]'], "crop"),
        (["--recipe", "digits", "--batch-size", "1438"], "expected at most the 1437 training"),
        (["--recipe", "digits", "--validation", "1437"], "leaves some of each class on either side, got 1437"),
        (["--recipe", "digits", "--accelerator", "tpu"], "device: expected auto, cpu, cuda or cuda:N, got 'tpu'"),
        (["--recipe", "digits", "--devices", "0"], "devices: expected a positive integer, got 0"),
        (["--recipe", "digits", "--accelerator=cpu", "--precision=16-mixed"], "16-mixed needs a GPU"),
        (["--recipe", "digits", "--accelerator=cpu", "--devices=3"], "expected a multiple of the 3 processes, got 32"),
        (["--recipe", "digits", "--backend", "cup"], "cupy"),
    ],
)
def test_mistakes_are_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], text: str
) -> None:
    out = tmp_path / "out"
    assert cli.main(["train", *arguments, "--width=0.03125", "--out", str(out)]) == 2
    assert text in capsys.readouterr().err
    assert not out.exists()


def test_recipes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in lines] == recipe_names()
    row = next(line for line in lines if line.startswith("klif-fashion-mnist "))
    assert "lif 94.28 (T = 8); klif 94.35 (T = 8); klif-star 94.31 (T = 8)" in row


def test_recipes_load_without_the_train_extra() -> None:
    program = (
        "import sys; sys.modules.update(dict.fromkeys(['lightning', 'sklearn', 'torchvision', 'rich']));"
        "from klif_sj.training.recipe import load_recipe; print(load_recipe('digits').neuron)"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.stdout.strip() == "klif", ran.stderr
