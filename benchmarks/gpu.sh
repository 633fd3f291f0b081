#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU.
#   benchmarks/gpu.sh --first OUT             the first ten minutes: what is right, what is not, and how fast it is
#   benchmarks/gpu.sh BUDGET_SECONDS [OUT]    the GPU's tests in a third of the time, then the suites, the most important
#                                             first
# Rows are written as they are measured, so a run that is cut off loses nothing, and goes on where it was when it is
# started again with the same OUT. $PYTHON is the Python to use; SpikingJelly 0.0.0.0.14 is looked for in .sj14. Where
# there is no .git, $COMMIT names what is measured.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
    echo "usage: benchmarks/gpu.sh --first OUT, or benchmarks/gpu.sh BUDGET_SECONDS [OUT]: $1" >&2
    exit 2
}
if [[ -z ${PYTHON:-} ]]; then
    [[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python || PYTHON=python3
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
if [[ ${1:-} == --first ]]; then
    [[ -n ${2:-} ]] || usage "expected a folder for the results"
    exec "$PYTHON" benchmarks/first.py "$2"
fi
[[ ${1:-} =~ ^[0-9]+$ ]] || usage "expected a number of seconds, got '${1:-}'"
budget=$1
out=${2:-}
"$PYTHON" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "no NVIDIA GPU that torch can use")'
out=${out:-benchmarks/results/$("$PYTHON" benchmarks/run.py --name)}
mkdir -p "$out"

started=$SECONDS
tests=0
timeout "$((budget / 3))" "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider --continue-on-collection-errors \
    tests/gpu tests/neuron/test_glif_lazy.py >"$out/tests.log" 2>&1 || tests=$?
tail -n 15 "$out/tests.log"
case $tests in
0) ;;
124) echo "the GPU's tests did not end in time (log in $out/tests.log)" >&2 ;;
*) echo "the GPU's tests did not pass (status $tests, log in $out/tests.log): the figures below are of code that is wrong" >&2 ;;
esac

suites=0
for tiers in 0 3; do
    left=$((budget - (SECONDS - started)))
    ((left > 0)) || break
    # A measurement that has begun ends; what hangs is stopped a minute after the time is up.
    timeout $((left + 60)) "$PYTHON" benchmarks/run.py --device cuda --suite all --gpu-only --tiers "$tiers" \
        --budget "$left" --out "$out" ${COMMIT:+--commit "$COMMIT"} || suites=$?
done
"$PYTHON" benchmarks/plot.py "$out"
exit $((tests ? tests : suites))
