"""Who can run a neuron, and in which configuration: ours, SpikingJelly's of both lines, FlexSN, and torch.compile."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from spikingjelly.activation_based import neuron as spikingjelly_neuron
from torch import Tensor, nn

from klif_sj import _compat, runtime

from .neurons import FUSED, atan, ours, parameters, plain
from .workload import CURRENT

NEURONS = tuple(CURRENT)
OWN = tuple(neuron for neuron in NEURONS if neuron not in FUSED)
UPSTREAM = ("klif", "clif", "glif-layer", "glif-channel", "lif", *FUSED)
FUSED_UPSTREAM = ("clif", "lif", *FUSED)
"""The neurons for which SpikingJelly 2 has kernels of its own on the GPU."""

PROCESSES = {
    "main": {},
    "torch-kernels": {
        f"SJ_{kind}_CUDA_IMPLEMENTATION": "torch" for kind in ("CLIF", "LIF", "PLIF", "QIF", "EIF", "IZHIKEVICH")
    },
}
"""The processes in which providers run, with the environment variables of each.

They are different processes because SpikingJelly chooses its kernels when it is imported. A further process,
``old-line``, has SpikingJelly 0.0.0.0.14 on its path.
"""

ALLOCATORS = {
    "keeping": {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 33)},
    "system": {},
}
"""For each allocator, the environment variables of every process.

With ``keeping``, glibc's malloc keeps memory that was freed. With its defaults it depends on what ran before whether a
large tensor gets new pages in each call, and the time includes the zeroing of new pages.
"""

OLD_LINE = "old-line"

Builder = Callable[[str, int, int], nn.Module]
"""A function that makes the node of a neuron for T steps and C channels."""


@dataclass(frozen=True)
class Provider:
    """One way to run neurons. ``process`` and ``device`` say where it can run, ``configuration`` how it is set up."""

    name: str
    configuration: str
    build: Builder
    neurons: tuple[str, ...] = NEURONS
    device: str | None = None
    process: str = "main"
    compiled: bool = False
    capturable: bool = True
    """Whether a CUDA graph can capture it."""

    @property
    def ours(self) -> bool:
        return self.name.startswith("klif_sj")

    def serves(self, neuron: str, device: str) -> bool:
        return neuron in self.neurons and self.device in (None, device)

    def node(self, neuron: str, steps: int, channels: int, device: str) -> nn.Module:
        """A node with the parameters that every provider gets."""
        node = self.build(neuron, steps, channels)
        node.load_state_dict(parameters(neuron, steps, channels))
        return node.to(device)


def prepare(provider: Provider, module: nn.Module, threads: int) -> Callable[[Tensor], Tensor]:
    """The module with the provider's neurons as it is to be called: itself, or newly compiled for one shape."""
    if not provider.compiled:
        return module
    torch._dynamo.reset()  # else the ninth shape in a process would silently run without the compiler
    torch._inductor.config.cpp.threads = threads  # code that is compiled for a CPU has this number in it
    torch._functorch.config.donated_buffer = False  # a backward that is timed alone runs many times after one forward
    return torch.compile(module, dynamic=False)


def of_ours(backend: str) -> Builder:
    return lambda neuron, steps, channels: ours(neuron, backend, steps, channels)


def upstream(neuron: str, steps: int, channels: int) -> nn.Module:
    """SpikingJelly's own node with the default surrogate of ours."""
    from spikingjelly.activation_based import surrogate

    if neuron in FUSED:
        return plain(neuron)
    if neuron.startswith("glif"):
        inplane = channels if neuron == "glif-channel" else None
        return spikingjelly_neuron.GatedLIFNode(steps, inplane, surrogate_function=surrogate.Rect(alpha=1.0))
    if neuron == "clif":
        return spikingjelly_neuron.ComplementaryLIFNode(surrogate_function=surrogate.Rect(alpha=1.0), step_mode="m")
    kind = {"klif": "KLIFNode", "lif": "LIFNode"}[neuron]
    return getattr(spikingjelly_neuron, kind)(surrogate_function=atan(), step_mode="m")


def old_cupy_lif(neuron: str, steps: int, channels: int) -> nn.Module:
    """The LIFNode of 0.0.0.0.14 on CuPy. It uses ``numpy.int``, which NumPy has dropped in version 1.24."""
    if not hasattr(numpy, "int"):
        numpy.int = int  # type: ignore[attr-defined]
    return spikingjelly_neuron.LIFNode(surrogate_function=atan(), step_mode="m", backend="cupy")


def flexsn(neuron: str, steps: int, channels: int) -> nn.Module:
    from .flexsn import FlexNode

    return FlexNode(neuron, steps)


def providers(process: str) -> Iterator[Provider]:
    """The providers of a process, without those that cannot run on this machine."""
    if process == OLD_LINE:
        name = "spikingjelly 0.0.0.0.14"
        yield Provider(f"{name} eager", "as published, backend='torch'", upstream, ("klif", "lif"), process=process)
        yield Provider(
            f"{name} cupy", "backend='cupy', with numpy.int put back", old_cupy_lif, ("lif",), "cuda", process,
            capturable=False,
        )  # fmt: skip
        return
    if process == "torch-kernels":
        variables = ", ".join(PROCESSES[process])
        yield Provider(
            "spikingjelly eager", f"2.0.0 with {variables} = torch", upstream, FUSED_UPSTREAM, "cuda", process
        )
        yield Provider(
            "spikingjelly compiled, torch kernels", f"2.0.0 with {variables} = torch, torch.compile of the node",
            upstream, FUSED_UPSTREAM, "cuda", process, compiled=True,
        )  # fmt: skip
        return
    for backend, device in (("cupy", "cuda"), ("cpp", "cpu"), ("torch", None)):
        neurons = OWN if backend == "torch" else NEURONS  # fuse's backend 'torch' is SpikingJelly's own code
        about = f"backend={backend!r}, keep_state=False"
        yield Provider(f"klif_sj {backend}", about, of_ours(backend), neurons, device)
    yield Provider(
        "klif_sj cupy compiled", "torch.compile of a node with backend='cupy', static shapes", of_ours("cupy"),
        device="cuda", compiled=True,
    )  # fmt: skip
    yield Provider(
        "klif_sj torch compiled", "torch.compile of a node with backend='torch', static shapes", of_ours("torch"),
        neurons=OWN, compiled=True,
    )  # fmt: skip
    if not _compat.SPIKINGJELLY_2:
        return
    unfused = tuple(neuron for neuron in UPSTREAM if neuron not in FUSED_UPSTREAM)
    yield Provider("spikingjelly eager", "2.0.0 as published", upstream, UPSTREAM, "cpu")
    yield Provider("spikingjelly eager", "2.0.0 as published, which has no kernel for it", upstream, unfused, "cuda")
    yield Provider(
        "spikingjelly triton", "2.0.0 as published, its own Triton kernels", upstream, FUSED_UPSTREAM, "cuda"
    )
    yield Provider(
        "spikingjelly compiled", "2.0.0, torch.compile of the node, static shapes", upstream, UPSTREAM, compiled=True
    )
    yield Provider(
        "flexsn", "2.0.0's FlexSN over the same step, Triton scan; a step's conductance as a second input sequence",
        flexsn, ("klif", "clif", "glif-layer", "lif", "user"), "cuda",
    )  # fmt: skip


def processes(old_line: Path | None, allocator: str) -> dict[str, dict[str, str]]:
    """The processes in which providers are to run, with the environment variables of each."""
    found = {name: ALLOCATORS[allocator] | variables for name, variables in PROCESSES.items()}
    if old_line and (old_line / "spikingjelly").is_dir():
        path = [str(old_line.resolve()), os.environ.get("PYTHONPATH", "")]
        found[OLD_LINE] = ALLOCATORS[allocator] | {"PYTHONPATH": os.pathsep.join(filter(None, path))}
    return found


def can_serve(provider: Provider) -> Exception | None:
    """Why one of our backends cannot serve on this machine. It is None for rivals, which show it when they run."""
    backend = provider.name.split()[1] if provider.ours else "torch"
    return runtime.unavailable(backend)
