"""docs/fuse.md: its programs run as they are printed, and its tables say of each neuron what fuse says."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
from spikingjelly.activation_based import neuron

from klif_sj import _compat, fuse

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "fuse.md").read_text()

MUST_BE_FUSED = {
    "0.0.0.0.14": "IF LIF ParametricLIF QIF EIF Izhikevich LIAF KLIF",
    "2.x": "IF LIF ParametricLIF QIF EIF Izhikevich KLIF ComplementaryLIF CUBALIF ILIF LIAF RAF TernaryIF TernaryLIF "
    "HalfThresholdIF ActivationAwareIF SimpleIF SimpleLIF GatedLIF",
}


def rows(line: str) -> dict[str, str]:
    """What the page's table for a SpikingJelly line says of each neuron."""
    table = PAGE.partition(f"<!-- neurons of SpikingJelly {line} -->")[2].partition("<!-- end")[0]
    return dict(re.findall(r"^\| (\w+) \| ([^|]*?) \|", table, re.MULTILINE)[1:])


def test_the_programs_run(one_thread: None, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    names: dict[str, object] = {"__name__": "page"}
    exec("\n".join(blocks), names)
    assert "2 neurons fused" in capsys.readouterr().out
    assert names["spikes"].shape == (8, 4, 16, 10, 10)


@pytest.mark.parametrize("line", MUST_BE_FUSED)
def test_the_tables_have_what_must_be_fused(line: str) -> None:
    found = rows(line)
    for name in MUST_BE_FUSED[line].split():
        assert found[f"{name}Node"].startswith("yes"), name


def test_the_table_of_this_line_has_every_neuron_and_is_true() -> None:
    script = _script()
    found, neurons = rows(_compat.LINE), script.neurons()
    assert set(found) == set(neurons)
    for name, cls in neurons.items():
        node, _ = script.build(name, cls)
        try:
            fuse(node)
        except ValueError:
            assert found[name].startswith("no: "), name
        else:
            assert found[name].startswith("yes"), name
    assert issubclass(neuron.LIFNode, neurons["LIFNode"])


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuse_table", DOCS / "fuse_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
