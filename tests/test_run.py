"""klif-sj run: a script runs as python would run it, but for its neurons."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from klif_sj.cli import main

RUN = [sys.executable, "-m", "klif_sj", "run", "--swap", "LIFNode=KLIFNode"]
ROOT = Path(__file__).parents[1]


def execute(
    *command: object, cwd: Path, status: int = 0, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **(env or {})}
    result = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env=environment,
        timeout=240,
    )
    assert result.returncode == status, result.stdout + result.stderr
    return result


def script(folder: Path, code: str, name: str = "script.py") -> Path:
    file = folder / name
    file.write_text(textwrap.dedent(code))
    return file


LOOK = """
    '''What a script can see of how it is run.'''
    import sys, json, types
    import helper
    from spikingjelly.activation_based import neuron
    seen = {
        "name": __name__, "file": __file__, "spec": __spec__ is None, "package": __package__, "doc": __doc__,
        "argv": sys.argv, "path": sys.path[0], "main": sys.modules["__main__"].seen_here,
        "annotations": isinstance(x, int), "globals": sorted(k for k in globals() if k.startswith("__")),
    }
    print(json.dumps(seen, sort_keys=True))
    print(type(neuron.LIFNode()).__name__)
"""


def test_a_script_sees_what_it_sees_under_python(tmp_path: Path) -> None:
    code = LOOK.replace("import helper", "import helper\n    x: int = 3\n    seen_here = True")
    script(tmp_path, code)
    script(tmp_path, "", "helper.py")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    arguments = ["../script.py", "-T", "4", "--swap", "x", "--", "--set=y", "-m"]
    expected = execute(sys.executable, *arguments, cwd=elsewhere).stdout.splitlines()
    result = execute(*RUN, *arguments, cwd=elsewhere)
    actual = result.stdout.splitlines()
    assert actual[0] == expected[0]
    assert (actual[1], expected[1]) == ("KLIFNode", "LIFNode")
    assert result.stderr.count("1 neuron swapped: spikingjelly.LIFNode -> klif_sj.KLIFNode") == 1


def test_a_module_with_arguments(tmp_path: Path) -> None:
    package = tmp_path / "pack"
    package.mkdir()
    script(package, "", "__init__.py")
    code = """
        import sys
        from . import __name__ as package
        from spikingjelly.activation_based.neuron import LIFNode
        print(__name__, __spec__.name, package, sys.argv, sys.path[0], type(LIFNode()).__name__)
    """
    script(package, code, "tool.py")
    arguments = ["-m", "pack.tool", "-T", "4", "--", "x"]
    expected = execute(sys.executable, *arguments, cwd=tmp_path).stdout
    assert execute(*RUN, *arguments, cwd=tmp_path).stdout == expected.replace("LIFNode", "KLIFNode")


@pytest.mark.parametrize(
    ("ending", "status"),
    [("sys.exit(3)", 3), ("raise ValueError('oops')", 1), ("os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM)],
)
def test_exit_status_signals_and_tracebacks(tmp_path: Path, ending: str, status: int) -> None:
    script(
        tmp_path, f"import os, signal, sys, atexit\natexit.register(print, 'bye')\ndef end():\n    {ending}\nend()\n"
    )
    expected = execute(sys.executable, "script.py", cwd=tmp_path, status=status)
    result = execute(*RUN, "script.py", cwd=tmp_path, status=status)
    assert result.stdout == expected.stdout
    assert expected.stderr in result.stderr
    if status > 0:
        assert "built none of the neurons named in --swap" in result.stderr


def test_settings_and_several_swaps(tmp_path: Path) -> None:
    code = """
        from spikingjelly.activation_based import neuron
        for node in (neuron.LIFNode(tau=3.0), neuron.IFNode()):
            print(type(node).__name__, node.tau, node.v_reset, node.activation, node.k_bounds)
    """
    script(tmp_path, code)
    more = ["--swap", "IFNode=klif_sj.neuron.klif.KLIFNode", "--set", "v_reset=None", "--set", "activation=celu"]
    result = execute(*RUN, *more, "--set", "k_bounds=(0.1, 2.0)", "script.py", cwd=tmp_path)
    assert result.stdout.splitlines() == [
        "KLIFNode 3.0 None celu (0.1, 2.0)",
        "KLIFNode 2.0 None celu (0.1, 2.0)",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--swap", "LIFnode=KLIFNode", "script.py"], "no neuron 'LIFnode' here; did you mean LIFNode"),
        (["--swap", "LIFNode=KLIF", "script.py"], "expected CLIFNode, GLIFNode, KLIFNode or package.module.Class"),
        (["--swap", "LIFNode", "script.py"], "--swap: expected NAME=VALUE, got 'LIFNode'"),
        (["--swap", "LIFNode=KLIFNode", "--set", "tua=2.0", "script.py"], "no parameter 'tua'; did you mean 'tau'"),
        (["--swap", "LIFNode=KLIFNode", "nowhere.py"], "there is no script 'nowhere.py'"),
        (["--swap", "LIFNode=KLIFNode"], "expected a script, or -m and a module"),
        (["script.py"], "the following arguments are required: --swap"),
    ],
)
def test_mistakes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    script(tmp_path, "print('ran')")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["run", *arguments])
    output = capsys.readouterr()
    assert stopped.value.code == 2
    assert message in output.err
    assert output.out == ""


def test_data_loaders_with_forked_and_spawned_workers(tmp_path: Path) -> None:
    """Workers are given the script's own classes, and what they build is swapped too, however they were started."""
    code = """
        import torch
        from spikingjelly.activation_based import neuron

        class Data(torch.utils.data.Dataset):
            def __len__(self): return 3
            def __getitem__(self, i): return type(neuron.LIFNode()).__name__, i

        if __name__ == "__main__":
            for how in ("fork", "spawn"):
                loader = torch.utils.data.DataLoader(Data(), num_workers=1, multiprocessing_context=how)
                print(how, [(name, i.item()) for (name,), i in loader])
            neuron.LIFNode()
    """
    script(tmp_path, code)
    result = execute(*RUN, "script.py", cwd=tmp_path)
    items = [("KLIFNode", i) for i in range(3)]
    assert result.stdout.splitlines() == [f"fork {items}", f"spawn {items}"]
    assert result.stderr.count("klif-sj run:") == 1
    assert "1 neuron swapped" in result.stderr


def test_torchrun(tmp_path: Path) -> None:
    code = """
        import os, torch
        from spikingjelly.activation_based import neuron
        torch.distributed.init_process_group("gloo")
        rank = torch.tensor(float(os.environ["RANK"]))
        torch.distributed.all_reduce(rank)
        print(f"{type(neuron.LIFNode()).__name__} {rank.item()}\\n", end="", flush=True)
        torch.distributed.destroy_process_group()
    """
    script(tmp_path, code)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    result = execute(*launch, *RUN[1:], "script.py", cwd=tmp_path)
    assert sorted(re.findall(r"KLIFNode [\d.]+", result.stdout)) == ["KLIFNode 1.0"] * 2
    assert result.stderr.count("klif-sj run:") == 1


def test_interrupt_from_outside(tmp_path: Path) -> None:
    script(tmp_path, "import time\nprint('ready', flush=True)\ntry: time.sleep(60)\nfinally: print('cleaned up')\n")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    with subprocess.Popen([*RUN, "script.py"], cwd=tmp_path, env=env, stdout=-1, stderr=-1, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert out == "cleaned up\n"
    assert "KeyboardInterrupt" in err
    assert "klif_sj" not in err.split("Traceback")[1]
