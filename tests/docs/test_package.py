"""The package as a whole: what it needs, what it exports, what is shipped, and who knows SpikingJelly's lines."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections import Counter
from importlib import metadata
from pathlib import Path

import pytest

import klif_sj
from klif_sj import neuron

ROOT = Path(__file__).parents[2]
PACKAGE = Path(klif_sj.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

OPTIONAL = ("cupy", "lightning", "matplotlib", "rich", "sklearn", "torchaudio", "torchvision", "triton")


def python(code: str) -> str:
    """What a fresh interpreter prints when it runs this code."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_needs_no_optional_package() -> None:
    blocked = "; ".join(f"sys.modules[{name!r}] = None" for name in OPTIONAL)
    code = (
        f"import sys; {blocked}; import klif_sj, torch; print(klif_sj.KLIFNode()(torch.full((2, 3), 4.0)).sum().item())"
    )
    assert float(python(code)) == 6.0


def test_import_loads_nothing_but_itself_beyond_torch_and_spikingjelly() -> None:
    """What makes an import slow is what it imports: nothing here beyond the package and the standard library."""
    code = (
        "import json, sys\n"
        "from spikingjelly.activation_based import base, functional, neuron, surrogate\n"
        "before = set(sys.modules)\n"
        "import klif_sj\n"
        "print(json.dumps(sorted(set(sys.modules) - before)))\n"
    )
    loaded = json.loads(python(code))
    assert "klif_sj.neuron.klif" in loaded
    top_level = {name.partition(".")[0] for name in loaded}
    assert top_level - sys.stdlib_module_names == {"klif_sj"}
    assert not {"klif_sj.cli", "klif_sj.training", "klif_sj.models"} & set(loaded)


@pytest.mark.parametrize("module", [klif_sj, neuron], ids=lambda module: module.__name__)
def test_all_is_the_public_interface(module: object) -> None:
    public = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and not isinstance(value, type(sys)) and name != "annotations"
    }
    assert public == set(module.__all__)
    assert list(module.__all__) == sorted(module.__all__)
    assert all(getattr(module, name).__doc__ for name in public)


def test_version_is_the_installed_one() -> None:
    assert metadata.version("klif_sj") == klif_sj.__version__
    assert f"## [{klif_sj.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
    assert f"\nversion: {klif_sj.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_files_that_a_repository_host_reads_are_yaml() -> None:
    """A host ignores a form that it cannot parse, without a word."""
    load = pytest.importorskip("yaml").safe_load
    forms = {path.stem: load(path.read_text()) for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")}
    assert set(forms) == {"bug_report", "feature_request"}
    for form in forms.values():
        assert {"name", "description", "body"} <= set(form)
        assert all(field["attributes"]["label"] for field in form["body"])
    (info,) = (field for field in forms["bug_report"]["body"] if "klif-sj info" in field["attributes"]["label"])
    assert info["validations"]["required"]
    papers = load((ROOT / "CITATION.cff").read_text())["references"]
    assert [paper["title"].partition(":")[0] for paper in papers] == ["KLIF", "CLIF", "GLIF"]
    assert load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]


def test_every_file_of_the_package_is_installed(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)],
        check=True,
        capture_output=True,
        cwd=ROOT,
    )
    written = {path.relative_to(PACKAGE) for path in PACKAGE.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    shipped = {path.relative_to(tmp_path / "klif_sj") for path in tmp_path.rglob("*") if path.is_file()}
    assert shipped == written
    assert Path("py.typed") in shipped


def test_console_script_and_extras_are_declared() -> None:
    (script,) = metadata.distribution("klif_sj").entry_points.select(group="console_scripts")
    assert (script.name, script.value) == ("klif-sj", "klif_sj.cli:main")
    assert set(metadata.metadata("klif_sj").get_all("Provides-Extra")) == {"cuda12", "cuda13", "docs", "test", "train"}


@pytest.mark.parametrize(
    ("file", "python", "extras"),
    [
        ("constraints.txt", "3.11", ("cuda13", "docs", "test", "train")),
        ("constraints.txt", "3.12", ("cuda13", "docs", "test", "train")),
        *((f"constraints/python{version}.txt", version, ("test", "train")) for version in ("3.10", "3.12", "3.13")),
    ],
)
def test_constraints_satisfy_the_requirements(file: str, python: str, extras: tuple[str, ...]) -> None:
    """Every requirement of a set-up has a pinned version, which it accepts."""
    requirement = pytest.importorskip("packaging.requirements").Requirement
    lines = (line.partition("#")[0].strip() for line in (ROOT / file).read_text().splitlines())
    pinned = dict(re.fullmatch(r"([\w.-]+)==(\S+)", line).groups() for line in lines if line)
    needed_here = [
        needed
        for needed in map(requirement, metadata.requires("klif_sj"))
        if needed.name != "setuptools"
        and (not needed.marker or any(needed.marker.evaluate({"python_version": python, "extra": e}) for e in extras))
    ]
    assert len(needed_here) >= 12
    for needed in needed_here:
        assert needed.name in pinned, f"{needed.name} is not pinned in {file}"
        assert needed.specifier.contains(pinned[needed.name]), f"{needed} excludes {pinned[needed.name]}"


def test_every_python_of_the_matrix_is_declared() -> None:
    declared = re.findall(r"Python :: (3\.\d+)\n", (ROOT / "setup.cfg").read_text())
    assert declared == ["3.10", "3.11", "3.12", "3.13"]
    (matrix,) = re.findall(r"^MATRIX := (.*)", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert set(matrix.split()) <= set(declared)
    assert {path.name for path in (ROOT / "constraints").iterdir()} == {f"python{v}.txt" for v in matrix.split()}


def test_only_compat_asks_which_spikingjelly_is_installed() -> None:
    """Elsewhere: no flag of the line, no probing of SpikingJelly's modules, no import of it that may fail."""

    def upstream_names(tree: ast.AST) -> set[str]:
        return {
            alias.asname or alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("spikingjelly")
            for alias in node.names
        }

    for path in MODULES:
        if path.parent == PACKAGE / "_compat":
            continue
        tree = ast.parse(path.read_text())
        upstream = upstream_names(tree)
        for node in ast.walk(tree):
            where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Name | ast.Attribute):
                assert ast.unparse(node).rpartition(".")[2] != "SPIKINGJELLY_2", f"{where} asks for the line"
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in {"hasattr", "getattr"}:
                probed = ast.unparse(node.args[0]).partition(".")[0]
                assert probed not in upstream, f"{where} probes SpikingJelly's {probed}"
            elif isinstance(node, ast.Try):
                tried = upstream_names(ast.Module(node.body, []))
                assert not tried, f"{where} tries to import {tried}"


def test_generator_and_runtime_know_no_neuron_by_name() -> None:
    neurons = {name for name in neuron.__all__ if name != "FusedNode"}
    assert "KLIFNode" in neurons
    for path in [*(PACKAGE / "codegen").rglob("*.py"), *(PACKAGE / "runtime").rglob("*.py")]:
        names = {
            node.id if isinstance(node, ast.Name) else node.value
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Name) or (isinstance(node, ast.Constant) and isinstance(node.value, str))
        }
        assert not names & neurons, f"{path.relative_to(ROOT)} names {names & neurons}"


def test_modules_share_no_name_but_commands_with_what_they_run() -> None:
    names = Counter(path.stem for path in MODULES if path.stem != "__init__")
    commands = {path.stem for path in (PACKAGE / "cli").glob("*.py")}
    assert {name for name, number in names.items() if number > 1} <= commands


def test_the_readme_example_trains_k() -> None:
    """The first Python block of the README runs as it stands, and the k that it prints have been learned."""
    example, *_ = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    learned = [float(k) for k in re.findall(r"k = ([\d.]+)", python("import torch; torch.manual_seed(0)\n" + example))]
    assert len(learned) == 2
    assert all(0.5 <= k <= 5.0 and k != 1.0 for k in learned)
