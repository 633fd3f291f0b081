"""Print the seconds that the first training step of a provider's layer takes in this process."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.correctness import train
from bench.layer import runner
from bench.providers import providers
from bench.timing import synchronize
from bench.workload import Workload


def main(request: str) -> None:
    process, name, neuron, steps, log2_size, device = json.loads(request)
    workload = Workload(neuron, steps, log2_size, device=device)
    provider = next(p for p in providers(process) if p.name == name and p.serves(neuron, device))
    x, grad = workload.inputs()
    (x * 2).backward(grad)  # This uses torch before the clock starts, but not the neuron.
    synchronize(device)
    start = time.perf_counter()
    train(*runner(provider, workload), x, grad)
    synchronize(device)
    print(time.perf_counter() - start)


if __name__ == "__main__":
    main(sys.argv[1])
