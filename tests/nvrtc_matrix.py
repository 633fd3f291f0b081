"""Runs the compile tests with several versions of NVRTC and of CuPy, which are fetched into a folder: no GPU is needed.

python tests/nvrtc_matrix.py [FOLDER]     (make nvrtc-matrix; FOLDER is .nvrtc)
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
NVRTC = {
    "12.4": "nvidia-cuda-nvrtc-cu12==12.4.*",
    "12.6": "nvidia-cuda-nvrtc-cu12==12.6.*",
    "12.8": "nvidia-cuda-nvrtc-cu12==12.8.*",
    "12.9": "nvidia-cuda-nvrtc-cu12==12.9.*",
    "13.0": "nvidia-cuda-nvrtc==13.0.*",
}
CUPY = ("13.6", "14.2")

# NVRTC is loaded, and found by CuPy, before torch is imported and loads its own. CuPy warns that there is another one.
CHILD = """
import ctypes, sys, warnings
library, expected, *arguments = sys.argv[1:]
ctypes.CDLL(library)
with warnings.catch_warnings(action="ignore"):
    import cupy
    from cupy_backends.cuda.libs import nvrtc
found = cupy.__version__, ".".join(map(str, nvrtc.getVersion()))
if found[1] != expected:
    sys.exit(f"expected NVRTC {expected}, CuPy uses {found[1]}")
print(f"CuPy {found[0]}, NVRTC {found[1]}: {nvrtc.getSupportedArchs()}", flush=True)
import pytest
sys.exit(pytest.main(arguments))
"""


def fetched(requirement: str, folder: Path, *more: str) -> Path:
    if not folder.exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", f"{folder}.part"]
        subprocess.run([*command, requirement, *more], check=True)
        os.replace(f"{folder}.part", folder)
    return folder


def main(folder: Path) -> int:
    results = {}
    for version, requirement in NVRTC.items():
        (library,) = fetched(requirement, folder / f"nvrtc-{version}").glob("nvidia/*/lib/libnvrtc.so.1?")
        toolkit = version.partition(".")[0]
        for cupy in CUPY:
            name = f"cupy-cuda{toolkit}x=={cupy}.*"
            packages = fetched(name, folder / f"cupy-{cupy}-cuda{toolkit}", "fastrlock", "cuda-pathfinder")
            path = os.pathsep.join([str(packages), str(ROOT), os.environ.get("PYTHONPATH", "")])
            tests = ["-q", "-p", "no:cacheprovider", str(ROOT / "tests" / "runtime" / "test_nvrtc.py")]
            command = [sys.executable, "-c", CHILD, str(library), version, *tests]
            status = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, check=False).returncode
            results[f"NVRTC {version}, CuPy {cupy}"] = status
    for name, status in results.items():
        print(f"{name}: {'passed' if status == 0 else f'failed (status {status})'}")
    return max(results.values())


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / ".nvrtc").resolve()))
