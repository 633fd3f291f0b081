"""klif-sj run: a script runs as python would run it, but for its neurons."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from klif_sj.cli import main

RUN = [sys.executable, "-m", "klif_sj", "run", "--swap", "LIFNode=KLIFNode"]
ROOT = Path(__file__).parents[2]


def execute(*command: object, cwd: Path, status: int = 0, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    result = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env=environment,
        timeout=timeout,
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
            print(type(node).__name__, node.tau, node.v_reset, node.activation, node.k_bounds, node.keep_state)
    """
    script(tmp_path, code)
    more = ["--swap", "IFNode=klif_sj.neuron.klif.KLIFNode", "--set", "v_reset=None", "--set", "activation=celu"]
    more += ["--set", "k_bounds=(0.1, 2.0)", "--set", "keep_state=False"]
    result = execute(*RUN, *more, "script.py", cwd=tmp_path)
    assert result.stdout.splitlines() == [
        "KLIFNode 3.0 None celu (0.1, 2.0) False",
        "KLIFNode 2.0 None celu (0.1, 2.0) False",
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
        (["script.py"], "expected --swap OLD=NEW, --fuse or --inspect OUT"),
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
    waits = "import time\ntry:\n    print('ready', flush=True)\n    time.sleep(60)\nfinally:\n    print('cleaned up')\n"
    script(tmp_path, waits)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    # A shell starts its background jobs with interrupts ignored, and this suite may run in one.
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    command = [*RUN, "script.py"]
    with subprocess.Popen(
        command, cwd=tmp_path, env=env, stdout=-1, stderr=-1, text=True, preexec_fn=listen
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert out == "cleaned up\n"
    assert "KeyboardInterrupt" in err
    assert "klif_sj" not in err.split("Traceback")[1]


EXAMPLE = """
    import argparse, os, sys
    import numpy as np
    import torch
    import torch.nn as nn
    import torch.nn.functional as F
    from spikingjelly.activation_based import neuron, encoding, functional, surrogate, layer

    class SNN(nn.Module):
        def __init__(self, tau, T):
            super().__init__()
            self.T = T
            self.layer = nn.Sequential(
                layer.Flatten(), layer.Linear(16, 4, bias=False),
                neuron.LIFNode(tau=tau, surrogate_function=surrogate.ATan()),
                layer.Linear(4, 2, bias=False), neuron.IFNode(surrogate_function=surrogate.ATan()),
            )

        def forward(self, x):
            return self.layer(x)

    def main():
        parser = argparse.ArgumentParser()
        parser.add_argument("-T", default=100, type=int)
        parser.add_argument("-tau", default=2.0, type=float)
        parser.add_argument("-out-dir", type=str, default="./logs")
        args = parser.parse_args()
        torch.manual_seed(0)
        net, encoder = SNN(args.tau, args.T), encoding.PoissonEncoder()
        optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
        label = torch.arange(64) // 32
        # The left or the right half is bright.
        x = torch.rand(64, 4, 4) * 0.3 + 0.7 * (torch.arange(4) // 2 == label[:, None, None])
        for epoch in range(30):
            optimizer.zero_grad()
            fr = 0.0
            for t in range(args.T):
                fr += net(encoder(x))
            fr = fr / args.T
            loss = F.mse_loss(fr, F.one_hot(label, 2).float())
            loss.backward()
            optimizer.step()
            functional.reset_net(net)
        os.makedirs(args.out_dir)
        checkpoint = {"net": net.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(checkpoint, os.path.join(args.out_dir, "last.pth"))
        net.eval()
        output_layer = net.layer[-1]
        output_layer.v_seq = []
        output_layer.s_seq = []
        def save_hook(m, x, y):
            m.v_seq.append(m.v.unsqueeze(0))
            m.s_seq.append(y.unsqueeze(0))
        output_layer.register_forward_hook(save_hook)
        with torch.no_grad():
            for t in range(args.T):
                net(encoder(x))
        np.save("v_t_array.npy", torch.cat(output_layer.v_seq).numpy())
        np.save("s_t_array.npy", torch.cat(output_layer.s_seq).numpy())
        print(net)
        print("accuracy", (fr.argmax(1) == label).float().mean().item(), "loss", loss.item())

    if __name__ == "__main__":
        main()
"""


def test_a_script_written_as_upstreams_examples_trains(tmp_path: Path) -> None:
    """The constructs of SpikingJelly's lif_fc_mnist, on data that is made up."""
    script(tmp_path, EXAMPLE)
    swap = ["--swap", "IFNode=CLIFNode", "--set", "backend=torch"]
    result = execute(*RUN, *swap, "script.py", "-T", "4", "-tau", "3.0", "-out-dir", "out", cwd=tmp_path)
    assert "KLIFNode(" in result.stdout
    assert "CLIFNode(" in result.stdout
    assert float(re.findall(r"accuracy (\S+)", result.stdout)[0]) > 0.9
    saved = torch.load(tmp_path / "out" / "last.pth", weights_only=True)["net"]
    assert saved["layer.2.k"].item() != 1.0
    assert np.load(tmp_path / "v_t_array.npy").shape == np.load(tmp_path / "s_t_array.npy").shape == (4, 64, 2)
    assert "tau=3.0" in result.stderr


DATA = os.environ.get("KLIF_SJ_DATA", "")


@pytest.mark.parametrize(
    ("example", "data", "swap", "arguments", "accuracy"),
    [
        ("lif_fc_mnist", "MNIST", "LIFNode=KLIFNode", ["-b", "256", "-lr", "0.01"], 0.85),
        (
            "conv_fashion_mnist",
            "FashionMNIST",
            "IFNode=KLIFNode",
            ["-channels", "4", "-opt", "adam", "-lr", "0.002"],
            0.75,
        ),
    ],
)
def test_upstreams_own_examples(
    tmp_path: Path, example: str, data: str, swap: str, arguments: list[str], accuracy: float
) -> None:
    """One epoch on the whole data set, some minutes each; with the least accuracy that it is to reach."""
    if not (DATA and (Path(DATA) / data).is_dir()):
        pytest.skip(f"set KLIF_SJ_DATA to the folder that holds {data}/ to run SpikingJelly's example on it")
    module = f"spikingjelly.activation_based.examples.{example}"
    common = ["-T", "4", "-device", "cpu", "-epochs", "1", "-j", "1", "-data-dir", Path(DATA).resolve()]
    command = [*RUN[:-2], "--swap", swap, "--set", "backend=auto", "-m", module, *common, *arguments]
    result = execute(*command, cwd=tmp_path, timeout=1500)
    assert float(re.findall(r"max_test_acc = ?([\d.]+)", result.stdout)[-1]) > accuracy
    assert "klif_sj.KLIFNode" in result.stderr
