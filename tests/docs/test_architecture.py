"""docs/architecture.md: every file of the package imports only what the page's tables allow."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import klif_sj

pytestmark = pytest.mark.once

PACKAGE = Path(klif_sj.__file__).parent
ROOT = PACKAGE.name
PAGE = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text()


def module_name(path: Path) -> str:
    """The name of a file's module as the page writes it: below the package, and ``klif_sj`` for the package itself."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".") or ROOT


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def table(header: str, column: int) -> dict[str, tuple[str, ...]]:
    """Of the page's table with that header: the name in the first column, and the names in another one."""
    text = PAGE.split(f"| {header} |", 1)[1].split("\n\n", 1)[0]
    rows = [line.strip("|").split("|") for line in text.splitlines()[2:]]
    return {row[0].strip(" `"): tuple(re.findall(r"`([^`]+)`", row[column])) for row in rows}


ALLOWED = table("part | what it is for | may import", 2)


def part_of(module: str) -> str:
    return module.partition(".")[0]


def permits(entry: str, module: str) -> bool:
    package = entry.removesuffix(".*")
    return entry in ("*", module) or (entry != package and f"{module}.".startswith(f"{package}."))


def imported_modules(source: str, package: tuple[str, ...]) -> Iterator[str]:
    """The modules of the package that a source file in ``package`` imports, at any place in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            names = [".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names]
        else:
            continue
        for name in names:
            if part_of(name) == ROOT:
                below = name.removeprefix(ROOT).strip(".")
                while below and below not in MODULES:  # what remains may be a name in a module
                    below = below.rpartition(".")[0]
                yield below or ROOT


def imports_of_other_parts(module: str) -> set[str]:
    path = MODULES[module]
    found = set(imported_modules(path.read_text(), path.parent.relative_to(PACKAGE.parent).parts))
    return {name for name in found if part_of(name) != part_of(module)}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_the_page_allows(module: str) -> None:
    part = part_of(module)
    assert part in ALLOWED, f"docs/architecture.md has no row for `{part}`"
    entries = ALLOWED[part]
    refused = {name for name in imports_of_other_parts(module) if not any(permits(entry, name) for entry in entries)}
    assert not refused, (
        f"`{module}` imports {refused}, which the row of `{part}` in docs/architecture.md does not allow"
    )


def test_every_row_of_the_page_is_a_part() -> None:
    assert sorted(ALLOWED) == sorted({part_of(module) for module in MODULES})


def test_the_rules_that_the_page_states_in_words_are_in_its_table() -> None:
    """A wider row must not undo what the page says above it."""
    assert ALLOWED["codegen"] == ()
    assert ALLOWED["runtime"] == ("_compat", "codegen.*")
    assert not {"*", "runtime.*", "codegen.*"} & set(ALLOWED["neuron"])
    may_import_cli = {
        part for part, entries in ALLOWED.items() if any(permits(entry, "cli") for entry in ALLOWED[part])
    }
    assert may_import_cli == {"cli", "__main__"}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from .. import _compat, runtime", {"_compat", "runtime"}),
        ("from ..runtime import serving_backend", {"runtime"}),
        ("from ..runtime import cpu", {"runtime.cpu"}),
        ("def f():\n    from ..neuron.klif import KLIFNode", {"neuron.klif"}),
        ("import klif_sj.runtime.cpu, torch", {"runtime.cpu"}),
        ("from klif_sj import KLIFNode", {"klif_sj"}),
        ("from torch import nn", set()),
    ],
)
def test_imports_are_found(source: str, expected: set[str]) -> None:
    assert set(imported_modules(source, (ROOT, "models"))) == expected
