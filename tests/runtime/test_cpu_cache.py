"""The folder of compiled kernels: private, atomic, mended, and shared by processes, forks and threads."""

from __future__ import annotations

import os
import shlex
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tolerance import assert_equal
from torch import Tensor

import klif_sj
from klif_sj import KLIFNode, runtime
from klif_sj.runtime import cpu
from klif_sj.runtime.cpu import CompilerError

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif("cpp" not in runtime.supported_backends(), reason="no C++ compiler"),
    pytest.mark.skipif(sys.platform == "win32", reason="modes and forks are POSIX's"),
]

TAU = 2.0456
X = torch.linspace(-2.0, 4.0, 60).view(3, 4, 5)


@pytest.fixture
def use_folder(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Keep kernels in a folder from now on. One that was loaded is known by its path: a new folder is a fresh start."""

    def use(folder: Path) -> None:
        monkeypatch.setenv("KLIF_SJ_CACHE", str(folder))
        cpu.load.cache_clear()
        cpu.prepared.cache_clear()

    return use


@torch.no_grad()
def run(backend: str = "cpp", tau: float = TAU) -> Tensor:
    return KLIFNode(tau=tau, step_mode="m", backend=backend)(X)


def libraries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.so"))


# The folder


def test_the_folder_is_private_and_holds_nothing_but_kernels(
    use_folder: Callable[[Path], None], tmp_path: Path
) -> None:
    folder, mask = tmp_path / "new" / "kernels", os.umask(0)
    try:
        use_folder(folder)
        assert_equal(run(), run("torch"))
    finally:
        os.umask(mask)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert len(libraries(folder)) == 1
    assert list(folder.iterdir()) == libraries(folder)


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o1777])
def test_a_folder_that_others_can_write_to_is_refused(
    use_folder: Callable[[Path], None], tmp_path: Path, mode: int
) -> None:
    tmp_path.chmod(mode)
    use_folder(tmp_path)
    with pytest.raises(CompilerError, match=rf"others can write .*{tmp_path}.* \$KLIF_SJ_CACHE"):
        run()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_somebody_else_is_refused(
    use_folder: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_folder(tmp_path)
    monkeypatch.setattr(os, "getuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(CompilerError, match="others can write"):
        run()


def test_a_folder_that_cannot_be_made(use_folder: Callable[[Path], None], tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    use_folder(file / "kernels")
    with pytest.raises(CompilerError, match=r"no folder for compiled kernels: .*file.*; set \$KLIF_SJ_CACHE") as caught:
        run()
    assert isinstance(caught.value.__cause__, OSError)


# Artefacts


CORRUPTIONS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda whole: b"",
    "cut short": lambda whole: whole[: len(whole) // 2],
    "without its last byte": lambda whole: whole[:-1],
    "one bit changed": lambda whole: whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:],
    "foreign": lambda whole: b"\x7fELF" + bytes(4096),
}


@pytest.mark.parametrize("corrupt", CORRUPTIONS.values(), ids=CORRUPTIONS)
def test_a_damaged_artefact_is_built_again(
    corrupt: Callable[[bytes], bytes], use_folder: Callable[[Path], None], tmp_path: Path
) -> None:
    use_folder(tmp_path / "whole")
    run()
    (whole,) = libraries(tmp_path / "whole")
    damaged = tmp_path / "damaged" / whole.name
    damaged.parent.mkdir(mode=0o700)
    damaged.write_bytes(corrupt(whole.read_bytes()))
    before = damaged.stat().st_ino
    use_folder(damaged.parent)
    assert_equal(run(), run("torch"))
    assert libraries(damaged.parent) == [damaged]
    assert damaged.stat().st_ino != before
    assert abs(damaged.stat().st_size - whole.stat().st_size) < 64


def test_another_kernels_artefact_is_not_taken(use_folder: Callable[[Path], None], tmp_path: Path) -> None:
    use_folder(tmp_path / "whole")
    run()
    (whole,) = libraries(tmp_path / "whole")
    run(tau=3.0)
    (other,) = set(libraries(tmp_path / "whole")) - {whole}
    swapped = tmp_path / "swapped" / whole.name
    swapped.parent.mkdir(mode=0o700)
    swapped.write_bytes(other.read_bytes())
    use_folder(swapped.parent)
    assert_equal(run(), run("torch"))


def test_a_whole_artefact_is_used_as_it_is(
    use_folder: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_folder(tmp_path)
    expected = run()
    cpu.load.cache_clear()
    cpu.prepared.cache_clear()
    monkeypatch.setattr(cpu, "_compile", None)
    assert_equal(run(), expected)


def test_an_interrupted_build_leaves_nothing(
    use_folder: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_folder(tmp_path)

    def interrupt(source: Path, target: Path) -> None:
        assert source.exists()
        raise KeyboardInterrupt

    with monkeypatch.context() as interrupted, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        interrupted.setattr(cpu.os, "replace", interrupt)
        run()
    assert list(tmp_path.iterdir()) == []
    assert_equal(run(), run("torch"))


def test_a_library_that_does_not_load_says_why(
    use_folder: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_folder(tmp_path)

    def refuse(path: str) -> None:
        raise OSError("libgomp.so.1: cannot open shared object file")

    monkeypatch.setattr(cpu.ctypes, "CDLL", refuse)
    with pytest.raises(CompilerError, match=r"cannot be loaded: libgomp\.so\.1") as caught:
        run()
    assert isinstance(caught.value.__cause__, OSError)


# Processes, forks, threads


SCRIPT = f"""
import torch
from klif_sj import KLIFNode
x = torch.linspace(-2.0, 4.0, 60).view(3, 4, 5)
with torch.no_grad():
    print(KLIFNode(tau={TAU}, step_mode="m", backend="cpp")(x).flatten().int().tolist())
"""


def start(script: str, **environment: str) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(Path(klif_sj.__file__).parents[1]), *sys.path])
    return subprocess.Popen(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "2", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def output_of(process: subprocess.Popen[str]) -> str:
    try:
        output, errors = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == 0, errors
    return output


def test_processes_share_kernels(tmp_path: Path) -> None:
    """Two that compile the same kernel at once both succeed; a third finds it, and compiles nothing."""
    log, wrapper = tmp_path / "log", tmp_path / "compiler"
    log.write_text("")
    # Every compilation of a kernel waits until there are two, so that they overlap for certain.
    wrapper.write_text(
        textwrap.dedent(f"""\
            #!/bin/sh
            case "$*" in *kernel.cpp*)
                echo "$*" >> {log}
                for i in $(seq 600); do [ $(wc -l < {log}) -ge 2 ] && break; sleep 0.1; done
            esac
            exec {shlex.join(cpu.compiler())} "$@"
        """)
    )
    wrapper.chmod(0o700)
    environment = {"CXX": str(wrapper), "KLIF_SJ_CACHE": str(tmp_path / "kernels")}
    expected = f"{run('torch').flatten().int().tolist()}\n"
    processes = [start(SCRIPT, **environment) for _ in range(2)]
    assert [output_of(process) for process in processes] == [expected] * 2
    assert len(log.read_text().splitlines()) == 2
    assert list((tmp_path / "kernels").iterdir()) == libraries(tmp_path / "kernels")
    assert len(libraries(tmp_path / "kernels")) == 1
    assert output_of(start(SCRIPT, **environment)) == expected
    assert len(log.read_text().splitlines()) == 2


FORKING = """
import os, time
import torch
from klif_sj import KLIFNode
from klif_sj.runtime.cpu import SERIAL_LIMIT

torch.set_num_threads(2)
node, x = KLIFNode(step_mode="m", backend="cpp"), torch.linspace(-2.0, 4.0, 8 * SERIAL_LIMIT).view(4, 2, -1)
with torch.no_grad():
    expected = node(x)  # by two threads
    node.reset()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # torch's own pool does not survive the fork either
        os._exit(0 if torch.equal(node(x), expected) else 1)
    for _ in range(1200):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        time.sleep(0.05)
    else:
        os.kill(child, 9)
        raise SystemExit("the child hangs")
    node.reset()
    print(os.waitstatus_to_exitcode(status), torch.equal(node(x), expected))
"""


def test_a_forked_child_computes_the_same() -> None:
    """OpenMP's threads do not follow into a child: a parallel loop there would wait for them without end."""
    assert output_of(start(FORKING)) == "0 True\n"


def test_threads_call_at_once(use_folder: Callable[[Path], None], tmp_path: Path) -> None:
    """Kernels that nobody compiled before, each called by several threads."""
    use_folder(tmp_path)
    taus = [2.5, 3.5] * 4
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda tau: run(tau=tau), taus))
    for tau, result in zip(taus, results, strict=True):
        assert_equal(result, run("torch", tau))
    assert len(libraries(tmp_path)) == 2
    assert sorted(tmp_path.iterdir()) == libraries(tmp_path)


def test_a_compiler_of_several_words(tmp_path: Path) -> None:
    """As ``ccache g++``: a program that gets the compiler as its first argument."""
    log, launcher = tmp_path / "log", tmp_path / "launcher"
    launcher.write_text(f'#!/bin/sh\necho "$1" >> {log}\nexec "$@"\n')
    launcher.chmod(0o700)
    (path,) = cpu.compiler()
    environment = {"CXX": f"{launcher} {path}", "KLIF_SJ_CACHE": str(tmp_path / "kernels")}
    assert output_of(start(SCRIPT, **environment)) == f"{run('torch').flatten().int().tolist()}\n"
    assert path in log.read_text().splitlines()
