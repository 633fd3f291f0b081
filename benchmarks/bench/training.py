"""Measure whole training steps of a network that has each provider's neurons in the same places."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional, layer
from spikingjelly.activation_based.model import sew_resnet, spiking_resnet, spiking_vgg
from torch import Tensor, nn

from klif_sj.models import mnist_network

from . import timing
from .correctness import Verdict, judge, train
from .correctness import reference as of_layer
from .layer import failure, free, judged, runner
from .plan import Training, TrainingJob
from .providers import Provider, prepare, providers
from .rows import Row
from .workload import Workload

COMPARED = 32
"""How many training steps are run before anything is timed, to compare their losses."""

TOLERANCE = {"float32": 0.05, "amp": 0.2}
"""The largest allowed relative difference of a loss.

It cannot be small: a single spike that a rounding changes leads to a difference of a percent within these steps. So the
neurons are compared by themselves first.
"""

REFERENCE = "klif_sj torch"
CLASSES = 10
CHANNELS = 1
"""The number of channels for all neurons. The networks do not tell theirs, so parameters are for a whole layer."""

NeuronFactory = Callable[[], nn.Module]


def network(task: Training, neuron: NeuronFactory) -> nn.Module:
    """A network for images ``[N, C, H, W]`` on the task's device. It has no dropout, which would hide differences."""
    if task.network == "fashion-mnist":
        net: nn.Module = mnist_network(lambda: neuron(), task.steps, width=task.width)
    else:
        net = RepeatedImage(for_small_images(task.network, neuron), task.steps)
        functional.set_step_mode(net, "m")
    for module in net.modules():
        if isinstance(module, layer.Dropout):
            module.p = 0.0
    memory_format = torch.channels_last if task.layout == "channels_last" else torch.contiguous_format
    return net.to(task.device).to(memory_format=memory_format)  # type: ignore[call-overload]


def for_small_images(name: str, neuron: NeuronFactory) -> nn.Module:
    """A network of SpikingJelly changed for CIFAR: its first layer is 3x3 without pooling, and it has 10 classes."""

    def spiking_neuron(**_: object) -> nn.Module:
        return neuron()

    if name == "vgg16":
        net = spiking_vgg.spiking_vgg16_bn(num_classes=CLASSES, spiking_neuron=spiking_neuron)
        net.avgpool = layer.AdaptiveAvgPool2d((1, 1))
        net.classifier = layer.Linear(512, CLASSES)
        return net
    if name == "resnet18":
        net = spiking_resnet.spiking_resnet18(num_classes=CLASSES, spiking_neuron=spiking_neuron)
    else:
        net = sew_resnet.sew_resnet18(num_classes=CLASSES, spiking_neuron=spiking_neuron, cnf="ADD")
    net.conv1 = layer.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
    net.maxpool = nn.Identity()
    return net


class RepeatedImage(nn.Module):
    """Shows an image T times to a network, and returns the mean of its outputs over time."""

    def __init__(self, net: nn.Module, steps: int) -> None:
        super().__init__()
        self.net = net
        self.steps = steps

    def forward(self, image: Tensor) -> Tensor:
        return self.net(image.unsqueeze(0).repeat(self.steps, 1, 1, 1, 1)).mean(0)


class Trainer:
    """A network and its optimizer. ``step`` runs one training step and returns the loss."""

    def __init__(self, task: Training, provider: Provider, weights: dict[str, Tensor] | None) -> None:
        torch.manual_seed(0)
        self.task = task
        self.net = network(task, lambda: provider.node(task.neuron, task.steps, CHANNELS, task.device))
        if weights is not None:
            self.net.load_state_dict(weights)
        self.weights = {name: value.clone() for name, value in self.net.state_dict().items()}
        self._run = prepare(provider, self.net, task.threads)
        self._optimizer = torch.optim.Adam(self.net.parameters(), lr=1e-3, fused=task.device == "cuda" or None)
        self._scaler = torch.amp.GradScaler(task.device, enabled=task.precision == "amp")
        self._batches = itertools.cycle(batches(task))

    def step(self) -> Tensor:
        images, labels = next(self._batches)
        with torch.autocast(self.task.device, torch.float16, enabled=self.task.precision == "amp"):
            loss = F.cross_entropy(self._run(images), labels)
        self._optimizer.zero_grad(set_to_none=True)
        self._scaler.scale(loss).backward()
        self._scaler.step(self._optimizer)
        self._scaler.update()
        functional.reset_net(self.net)
        return loss.detach()

    def losses(self) -> Tensor:
        """The losses of the steps that are compared."""
        return torch.stack([self.step() for _ in range(COMPARED)]).double()


def batches(task: Training) -> list[tuple[Tensor, Tensor]]:
    """Four batches of images. Each class is a random pattern with noise, so there is something to learn."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, 28, 28) if task.network == "fashion-mnist" else (3, 32, 32)
    patterns = torch.rand(CLASSES, *shape, generator=generator)
    memory_format = torch.channels_last if task.layout == "channels_last" else torch.contiguous_format
    found = []
    for _ in range(4):
        labels = torch.randint(CLASSES, (task.batch,), generator=generator)
        images = patterns[labels] + 0.3 * torch.randn(task.batch, *shape, generator=generator)
        found.append((images.to(task.device, memory_format=memory_format), labels.to(task.device)))
    return found


def measure(job: TrainingJob, candidates: list[Provider], min_seconds: float) -> Iterator[Row]:
    """The rows of a task. Before the steps of a provider are timed, its neurons are checked, and then its losses."""
    task = job.workload
    torch.set_num_threads(task.threads)
    reference = Trainer(task, next(provider for provider in providers("main") if provider.name == REFERENCE), None)
    weights, expected = reference.weights, reference.losses()
    del reference
    for provider in candidates:
        row = {"suite": job.suite, "provider": provider.name, "configuration": provider.configuration, "pass": "step"}
        row |= {"launch": "eager", **task.columns()}
        try:
            row |= judged(judge_node(provider, task))
            if row["status"] == "ok":
                row |= cost(Trainer(task, provider, weights), expected, min_seconds)
        except Exception as error:
            row["status"] = failure(error)
        free()
        yield row


def judge_node(provider: Provider, task: Training) -> Verdict:
    """Check the provider's neuron in a layer of its own."""
    dtype = "float16" if task.precision == "amp" else "float32"
    workload = Workload(task.neuron, task.steps, 16, dtype, device=task.device, threads=task.threads)
    inputs = workload.inputs()
    node, run = runner(replace(provider, compiled=False), workload)
    return judge(of_layer(workload, *inputs), train(node, run, *inputs), dtype)


def cost(trainer: Trainer, expected: Tensor, min_seconds: float) -> Row:
    """The cost of a provider's steps, if its losses are as expected."""
    task = trainer.task
    error = ((trainer.losses() - expected).abs() / expected).max().item()
    if not error <= TOLERANCE[task.precision]:
        allowed = f"allowed {TOLERANCE[task.precision]:.0%}"
        return {"error_loss": error, "status": f"refused: a loss of {COMPARED} differs by {error:.2%}, {allowed}"}
    peak = timing.peak_bytes(trainer.step, task.device)
    found = timing.by_the_clock(trainer.step, task.device, *repetitions(trainer, min_seconds), wait=True)
    return {"error_loss": error, "peak_bytes": peak, "images_per_s": task.batch / found.median} | found.columns()


def repetitions(trainer: Trainer, min_seconds: float) -> tuple[int, int]:
    """The number of steps in a sample and the number of samples, which together take about ``min_seconds``."""
    once = timing.by_the_clock(trainer.step, trainer.task.device, 1, 3, wait=True).median
    samples = 10
    return max(round(min_seconds / once / samples), 1), samples
