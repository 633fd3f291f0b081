"""FSDP2: two processes that shard a network as docs/swap.md says train it as one process does."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

from klif_sj import GLIFNode, KLIFNode, LearnableATan, swap_neurons

try:
    from torch.distributed.fsdp import fully_shard

    ignores = "ignored_params" in inspect.signature(fully_shard).parameters
except ImportError:
    ignores = False
pytestmark = [
    pytest.mark.skipif(not ignores, reason="this torch's fully_shard shards all or nothing"),
    pytest.mark.skipif(torch.__version__ < "2.9", reason="torch 2.8 averages no gradients over gloo"),
    pytest.mark.once,
]

PAGE = Path(__file__).parents[2] / "docs" / "swap.md"


def network() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        layer.Linear(6, 8), neuron.ParametricLIFNode(), layer.Linear(8, 8), neuron.LIFNode(), layer.Linear(8, 4)
    )
    swap_neurons(net, KLIFNode, match="1", surrogate_function=LearnableATan())
    swap_neurons(net, GLIFNode, match="3", T=4, inplane=8)
    functional.set_step_mode(net, "m")
    return net


def trained(net: nn.Module, part: slice) -> dict[str, list[float]]:
    """The parameters after three steps on this part of each batch."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    for step in range(3):
        x = 3 * torch.rand(4, 4, 6, generator=torch.Generator().manual_seed(step))
        net(x[:, part]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        functional.reset_net(net)
    whole = {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in net.named_parameters()}
    return {name: value.detach().flatten().tolist() for name, value in whole.items()}


def as_one_of_two() -> None:
    """What each of the two processes does."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    names: dict[str, object] = {}
    (block,) = re.findall(r"^  ```python\n((?:(?!```)[\s\S])*?fully_shard[\s\S]*?)^  ```$", PAGE.read_text(), re.M)
    exec(re.sub(r"^  ", "", block, flags=re.M), names)
    net = network()
    parameters = trained(names["shard"](net), slice(2 * rank, 2 * rank + 2))
    if rank == 0:
        print(json.dumps(parameters))
    dist.barrier()
    dist.destroy_process_group()
    # The interpreter's own end is left out: torch 2.11 sometimes aborts there ("terminate called without an active
    # exception"), also after sharding nothing but Linear and ReLU over gloo.
    sys.stdout.flush()
    os._exit(0)


def test_two_processes_train_as_one() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    search = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    together = json.loads(done.stdout.splitlines()[-1])  # gloo may have written before
    alone = trained(network(), slice(None))
    assert together.keys() == alone.keys()
    for name, values in alone.items():
        assert together[name] == pytest.approx(values, rel=1e-4, abs=1e-5), name
    assert alone["1.k"] != [1.0]


if __name__ == "__main__":
    as_one_of_two()
