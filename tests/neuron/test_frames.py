"""How many of the package's functions a call goes through: a small layer takes longer for them than for its kernel."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType

import pytest
import torch
from neurons import CPU_BACKENDS

import klif_sj
from klif_sj import CLIFNode, FusedNode, GLIFNode, KLIFNode

PACKAGE = str(Path(klif_sj.__file__).parent)
MOST = 25


def own_functions(node: FusedNode, x_seq: torch.Tensor) -> list[str]:
    """The package's functions that one call enters, in order, comprehensions included."""
    entered: list[str] = []

    def note(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            entered.append(f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}")

    sys.setprofile(note)
    try:
        node.multi_step_forward(x_seq)
    finally:
        sys.setprofile(None)
    return entered


@pytest.mark.skipif("cpp" not in CPU_BACKENDS, reason="no C++ compiler")
@pytest.mark.parametrize("node", [KLIFNode(), CLIFNode(), GLIFNode(4, 3)], ids=lambda node: type(node).__name__)
def test_a_call_goes_through_few_functions(node: FusedNode) -> None:
    node.backend, node.step_mode = "cpp", "m"
    x_seq = torch.rand(4, 2, 3, 5, requires_grad=True)
    node(x_seq)  # traced and compiled
    node.reset()

    entered = own_functions(node, x_seq)

    assert entered[0] == "base.multi_step_forward"
    assert "cpu.launch" in entered
    assert len(entered) <= MOST, entered
