#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in BUDGET_SECONDS: the GPU's tests, then the suites, the most important first.
#   benchmarks/gpu.sh BUDGET_SECONDS [OUT]
# Rows are written as they are measured, so a run that is cut off loses nothing, and goes on where it was when it is
# started again with the same OUT. $PYTHON is the Python to use; SpikingJelly 0.0.0.0.14 is looked for in .sj14.
set -euo pipefail
cd "$(dirname "$0")/.."

if [[ ! ${1:-} =~ ^[0-9]+$ ]]; then
    echo "usage: benchmarks/gpu.sh BUDGET_SECONDS [OUT]: expected a number of seconds, got '${1:-}'" >&2
    exit 2
fi
budget=$1
out=${2:-}
if [[ -z ${PYTHON:-} ]]; then
    [[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python || PYTHON=python3
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
"$PYTHON" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "no NVIDIA GPU that torch can use")'
out=${out:-benchmarks/results/$("$PYTHON" benchmarks/run.py --name)}
mkdir -p "$out"

started=$SECONDS
tests=0
timeout "$budget" "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider >"$out/tests.log" 2>&1 || tests=$?
tail -n 15 "$out/tests.log"
[[ $tests == 0 ]] || echo "the GPU's tests did not pass (status $tests, log in $out/tests.log): the figures below are of code that is wrong" >&2

left=$((budget - (SECONDS - started)))
suites=0
if ((left > 0)); then
    # A measurement that has begun ends; what hangs is stopped a minute after the time is up.
    timeout $((left + 60)) "$PYTHON" benchmarks/run.py --device cuda --suite all --gpu-only --budget "$left" --out "$out" || suites=$?
fi
"$PYTHON" benchmarks/plot.py "$out"
exit $((tests ? tests : suites))
