"""The page: one file that needs nothing else, with every layer, finding and figure, for one network or several."""

from __future__ import annotations

import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from spikingjelly.activation_based import layer
from spikingjelly.activation_based.neuron import IFNode
from torch import nn

import klif_sj
from klif_sj import KLIFNode
from klif_sj.inspection import Inspection

pytest.importorskip("matplotlib")
pytest.importorskip("rich")


def inspected(title: str, threshold: float = 1.0) -> Inspection:
    torch.manual_seed(0)
    net = nn.Sequential(
        layer.Linear(4, 8, step_mode="m"), KLIFNode(v_threshold=threshold, step_mode="m"),
        layer.Linear(8, 3, step_mode="m"), IFNode(step_mode="m"),
    )  # fmt: skip
    with torch.no_grad():
        net[2].weight.mul_(4)
    return klif_sj.inspect(net, [(4 * torch.rand(5, 6, 4), torch.arange(6) % 3)], title=title)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("pages")
    before, after = inspected("before <a swap>"), inspected("after", 100.0)
    return {
        "one": after.save(folder / "one").read_text(),
        "both": before.compare(after).save(folder / "both").read_text(),
    }


class Tags(HTMLParser):
    VOID = ("meta", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name == "id":
                self.ids.append(value or "")
            if name in ("href", "src", "xlink:href", "srcset"):
                self.links.append(value or "")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()


@pytest.mark.parametrize("which", ["one", "both"])
def test_it_is_whole_and_needs_no_network(pages: dict[str, str], which: str) -> None:
    text = pages[which]
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    assert len(tags.ids) == len(set(tags.ids)) > 100
    assert all(link.startswith("#") and link[1:] in tags.ids for link in tags.links)
    outside = set(re.findall(r"https?://[^\s\"'<>]+", text))
    assert outside == {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert not re.search(r"<script|<link|@import|url\((?!#)", text)
    assert "§" not in text


@pytest.mark.parametrize("which", ["one", "both"])
def test_drawings_have_the_pages_colours(pages: dict[str, str], which: str) -> None:
    drawings = re.findall(r"<svg.*?</svg>", pages[which], re.DOTALL)
    assert len(drawings) == 5 + 2 * 6
    for drawing in drawings:
        element = ElementTree.fromstring(drawing)
        assert "width" not in element.attrib
        assert "currentColor" in drawing
        assert not re.search(r"#0{6}\b|#010203|fill: #f{6}|black|font-family", drawing)
    assert "prefers-color-scheme: dark" in pages[which]
    assert '<meta name="viewport"' in pages[which]


def test_findings_and_layers_are_on_it(pages: dict[str, str]) -> None:
    text = pages["one"]
    assert "<b>silent</b><ul><li><b>1</b>: 100 % of its neurons never fire (95 % is the limit)." in text
    assert "What usually helps: A lower threshold" in text
    for name in ("1", "3"):
        assert f"<td class=text>{name}</td>" in text
    assert "Nothing is conspicuous" not in text
    both = pages["both"]
    assert "before &lt;a swap&gt;" in both
    assert "<a swap>" not in both
    assert "Nothing is conspicuous" in both
    assert both.count("<td class=text>after</td>") == 2


def test_the_same_inspection_gives_the_same_page(tmp_path: Path) -> None:
    found = inspected("a net")
    first, second = (found.save(tmp_path / name).read_text() for name in "ab")
    assert first == second


def test_the_text_names_every_layer_finding_and_parameter() -> None:
    text = str(inspected("a net", 100.0))
    assert "a net: 6 inputs in 1 batch" in text
    assert re.search(r"^1 +KLIFNode +5 +0.0000 +100.0", text, re.MULTILINE)
    assert re.search(r"^1 +k +1 +1 +1 +0.5 to 5", text, re.MULTILINE)
    assert re.search(r"^silent\n  1: 100 % of its neurons never fire", text, re.MULTILINE)
    assert "What usually helps: A lower threshold" in text


def test_without_matplotlib_only_the_page_is_missing(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "import klif_sj, torch\n"
        "found = klif_sj.inspect(torch.nn.Sequential(klif_sj.KLIFNode(step_mode='m')), [torch.rand(3, 4, 5)])\n"
        "assert found.to_dict()['layers']; print(found)\n"
        f"found.save({str(tmp_path)!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "KLIFNode" in done.stdout
    assert "ImportError: the page needs matplotlib; type: pip install 'klif_sj[train]'" in done.stderr
    assert list(tmp_path.iterdir()) == []
