"""Writes the table of SpikingJelly's neurons in fuse.md, for the SpikingJelly line that it runs on.

python docs/fuse_table.py           # the other line's rows stay as they are: run it once on each line
python docs/fuse_table.py --times   # the times of the page's own neurons
"""

from __future__ import annotations

import re
import sys
import time
import warnings
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from spikingjelly.activation_based import neuron
from torch import nn

from klif_sj import _compat, fuse

PAGE = Path(__file__).with_name("fuse.md")
HEADER = "| neuron | fused | states | parameters | spikes | gradients differ by |"
BEGIN, END = "<!-- neurons of SpikingJelly {} -->", "<!-- end of SpikingJelly {} -->"

ARGUMENTS: dict[str, dict[str, Any]] = {
    "LIAFNode": {"act": torch.sigmoid, "threshold_related": True},
    "SimpleLIFNode": {"tau": 2.0, "decay_input": True},
    "GatedLIFNode": {"T": 5, "inplane": 4},
    "PSN": {"T": 4},
    "MaskedPSN": {"k": 2, "T": 4},
    "SlidingPSN": {"k": 2},
    "STBIFNode": {"q_threshold": torch.tensor(1.0), "level": 4},
    "MPBNLIFNode": {"out_features": 8},
    "NoisyCUBALIFNode": {"num_node": 8},
    "NoisyILCCUBALIFNode": {"act_dim": 2, "dec_pop_dim": 4},
    "NoisyNonSpikingIFNode": {"num_node": 8},
    "ILCIFNode": {"act_dim": 2, "dec_pop_dim": 4},
    "ILCLIFNode": {"act_dim": 2, "dec_pop_dim": 4},
    "ILCCUBALIFNode": {"act_dim": 2, "dec_pop_dim": 4},
    "FlexSN": {"core": lambda x, v: ((v + x >= 1.0).to(x), v + x), "num_states": 1},
}
"""What the constructors of some neurons need."""

if _compat.SPIKINGJELLY_2:
    codes = neuron.FewSpikeTable([1.0, 0.5], [1.0, 0.5], [1.0, 0.5])
    ARGUMENTS |= {
        "FewSpikeNode": {"table": codes},
        "OutlierAwareThresholdNode": {"table": codes, "outlier_table": codes, "split_threshold": 1.0},
        "HGNode": {"tables": [codes, codes], "gate_thresholds": [0.5]},
    }

MISSING = {"0.0.0.0.14": {"LIAFNode": {"single_step_cupy_fp32_inference": False}}}
"""By line and neuron, attributes of the class without which its constructor raises an error, whatever its arguments."""


def build(name: str, cls: type[nn.Module]) -> tuple[nn.Module, str]:
    """A neuron, and what had to be done to build it."""
    missing = MISSING.get(_compat.LINE, {}).get(name)
    if missing is None:
        return cls(**ARGUMENTS.get(name, {})), ""
    settings = ", ".join(f"{attribute} = {value}" for attribute, value in missing.items())
    try:
        cls(**ARGUMENTS.get(name, {}))
    except AttributeError as error:
        why = f"built from a subclass with `{settings}`, without which its constructor raises: {text(error)}"
        return type(name, (cls,), missing)(**ARGUMENTS.get(name, {})), why
    raise RuntimeError(f"{name} can be built as it is; take it out of MISSING")


def neurons() -> dict[str, type[nn.Module]]:
    """SpikingJelly's neurons by name, without the bases of them."""
    found = {name: value for name, value in vars(neuron).items() if isinstance(value, type)}
    return {
        name: cls
        for name, cls in sorted(found.items())
        if issubclass(cls, nn.Module) and cls.__module__.startswith(neuron.__name__) and "Base" not in name
    }


def row(name: str, cls: type[nn.Module]) -> str:
    """A neuron's line of the table."""
    node, built = build(name, cls)
    try:
        (found,) = fuse(node, verify=True).rows
    except (ValueError, AssertionError) as error:
        return line(name, f"no: {text(error).partition('(neuron: ' + name + ': ')[2].rstrip(')') or text(error)}")
    differences = dict(found.differences or {})
    spikes = max(value for key, value in differences.items() if key.startswith("spikes"))
    gradients = max((value for key, value in differences.items() if key.startswith("gradient")), default=0.0)
    return line(
        name,
        "; ".join(part for part in ("yes", found.note, built) if part),
        ", ".join(found.states),
        ", ".join(found.parameters),
        "equal" if not spikes else f"differ by {spikes:.0e}",
        f"{gradients:.0e}" if gradients else "equal",
    )


def line(*cells: str) -> str:
    return "| " + " | ".join((*cells, *[""] * (6 - len(cells)))).replace("|  ", "| ") + " |"


def text(error: Exception) -> str:
    """What a reader of a table needs of an error: its first sentence."""
    words = " ".join(str(error).split()).replace("|", "\\|")
    reason = words.partition("time step of ")
    if reason[1]:
        words = reason[2].partition("): ")[2] or reason[2]
    return words.partition(". ")[0].partition("; ")[0][:160].rstrip(".")


def table() -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return "\n".join([HEADER, "|---|---|---|---|---|---|", *(row(name, cls) for name, cls in neurons().items())])


TIMED = {
    "TCLIFNode": ((), (8, 256, 1024)),
    "ChannelLIFNode": ((16,), (8, 64, 16, 16, 16)),
}
"""Of the page's neurons: the constructor's arguments, and the shape of the sequence."""

ROUNDS = 8


def times() -> str:
    """The page's neurons, forward and backward, by their own eager code and fused: the best of several rounds."""
    names: dict[str, Any] = {}
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    with redirect_stdout(StringIO()):
        exec("\n".join(blocks), names)
    threads = torch.get_num_threads()
    lines = [f"| forward and backward, {threads} CPU threads | T, N, * | eager, ms | fused, ms | times faster |"]
    lines.append("|---|---|---|---|---|")
    for name, (arguments, shape) in TIMED.items():
        nodes = [names[name](*arguments, step_mode="m") for _ in range(2)]
        fuse(nodes[0], backend="torch")
        fuse(nodes[1])
        x = torch.randn(shape) * 1.5 + 0.5
        best = [float("inf")] * 2
        for _ in range(ROUNDS):
            for i, node in enumerate(nodes):
                best[i] = min(best[i], seconds(node, x))
        eager, fused = (1e3 * value for value in best)
        size = ", ".join(map(str, shape))
        lines.append(f"| `{name}` | {size} | {eager:.1f} | {fused:.1f} | {eager / fused:.1f} |")
    return "\n".join(lines)


def seconds(node: Any, x: torch.Tensor) -> float:
    node.reset()
    leaf = x.clone().requires_grad_()
    start = time.perf_counter()
    node(leaf).sum().backward()
    return time.perf_counter() - start


def main() -> None:
    torch.manual_seed(0)
    timed = "--times" in sys.argv
    begin, end = ("<!-- times -->", "<!-- end of times -->")
    if not timed:
        begin, end = (mark.format(_compat.LINE) for mark in (BEGIN, END))
    page = PAGE.read_text()
    before, _, rest = page.partition(begin)
    after = rest.partition(end)[2]
    PAGE.write_text(f"{before}{begin}\n\n{times() if timed else table()}\n\n{end}{after}")


if __name__ == "__main__":
    main()
