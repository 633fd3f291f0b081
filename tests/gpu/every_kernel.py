"""Launches every kind of kernel once, small, for compute-sanitizer's memcheck and racecheck on a machine with a GPU.

compute-sanitizer --tool memcheck python tests/gpu/every_kernel.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1] / "support"))

from cuda_cases import EXECUTED, ran


def main() -> None:
    for make, steps, shape, dtype, channels_last, _ in EXECUTED:
        node = make(steps, shape[1] if len(shape) > 1 else 1).cuda()
        node.step_mode, node.backend = "m", "cupy"
        x, grad = (torch.randn(steps, *shape, device="cuda").to(dtype) for _ in range(2))
        if channels_last:
            x = x.flatten(0, 1).to(memory_format=torch.channels_last).unflatten(0, (steps, shape[0]))
        for store in (False, True):
            node.store_v_seq = store
            ran(node, x, grad)
        node.store_v_seq = False
        node.reset()
        node.keep_state = False
        node(x.requires_grad_())
    torch.cuda.synchronize()
    print(f"{len(EXECUTED)} kinds launched")


if __name__ == "__main__":
    main()
