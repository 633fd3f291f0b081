"""Run benchmarks and add their rows to DIR/results.csv. See ``python benchmarks/run.py --help``."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from bench import layer, timing
from bench import training as networks
from bench.correctness import reference
from bench.environment import environment, machine_name
from bench.plan import SUITES, Job, TrainingJob, jobs
from bench.providers import ALLOCATORS, OLD_LINE, Provider, can_serve, processes, providers
from bench.rows import Results, Row

RESULTS = Path(__file__).parent / "results"


def main() -> int:
    options = parse_arguments()
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.name:
        print(default_folder(device, options.allocator).name)
        return 0
    suites = SUITES if options.suite == "all" else (options.suite,)
    plan = [job for job in jobs(suites, device, options.quick) if job.tier <= options.tiers]
    plan = [job for job in plan if options.workload in job.workload.name]
    if options.gpu_only:
        plan = [job for job in plan if job.workload.device == "cuda"]
    if not plan:
        of_names = f" whose name has {options.workload!r}" if options.workload else "; it needs a GPU"
        print(f"{options.suite}: has nothing to measure on {device!r}{of_names}", file=sys.stderr)
        return 2
    if options.dry_run:
        print_plan(plan, options)
        return 0
    if options.process:
        return run_process(plan, options, options.process)
    return run_processes(plan, options)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks/run.py", description=__doc__)
    add = parser.add_argument
    add("--suite", choices=(*SUITES, "all"), default="all")
    add("--quick", action="store_true", help="small sizes and little of torch.compile: a few minutes on two cores")
    add(
        "--tiers",
        type=int,
        default=9,
        metavar="N",
        help="leave out what has a lower priority: 0 is what the targets are about",
    )
    add("--workload", default="", metavar="TEXT", help="only those whose name has TEXT, as 'klif, T 4'")
    add("--provider", default="", metavar="TEXT", help="only those whose name has TEXT, as 'klif_sj'")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    add(
        "--out",
        type=Path,
        metavar="DIR",
        help="default: benchmarks/results/ and the machine's name. Rows that DIR has "
        "of this commit are not measured again.",
    )
    add("--budget", type=float, default=float("inf"), metavar="SECONDS", help="begin no measurement after this time")
    add(
        "--old-line",
        type=Path,
        default=Path(".sj14"),
        metavar="DIR",
        help="folder with SpikingJelly 0.0.0.0.14, installed "
        "by pip install --target (default: .sj14, where make test puts it)",
    )
    add(
        "--allocator",
        choices=ALLOCATORS,
        default="system",
        help="of the CPU's memory: the system's as it is (default), or one that keeps what was freed",
    )
    add("--gpu-only", action="store_true", help="leave out what runs on the CPU")
    add("--name", action="store_true", help="print the machine's name, that of its folder of results, and end")
    add("--commit", help="what is measured, where git cannot tell")
    add("--dry-run", action="store_true", help="list what would be measured, on a machine with that device or without")
    add("--process", help=argparse.SUPPRESS)
    add("--deadline", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.deadline is None:
        options.deadline = time.time() + options.budget
    return options


def default_folder(device: str, allocator: str) -> Path:
    """The folder for the results. Each machine has one, and another one for each allocator but the system's."""
    suffix = "" if allocator == "system" else f"-{allocator}-allocator"
    return RESULTS / f"{machine_name(device)}{suffix}"


def run_processes(plan: list[Job | TrainingJob], options: argparse.Namespace) -> int:
    """Run every tier in one process after the other. Each process has another SpikingJelly or other kernels of it."""
    found = processes(options.old_line, options.allocator)
    if OLD_LINE not in found:
        print(f"SpikingJelly 0.0.0.0.14 is not in {options.old_line}: its providers are left out", file=sys.stderr)
    failed = 0
    for tier in sorted({job.tier for job in plan}):
        for process, variables in found.items():
            if not any(serving(job, process, options) for job in plan if job.tier == tier):
                continue
            command = [sys.executable, __file__, *sys.argv[1:], "--process", f"{process}:{tier}"]
            command += ["--deadline", str(options.deadline)]
            failed |= subprocess.run(command, env=os.environ | variables, check=False).returncode
    return failed


def run_process(plan: list[Job | TrainingJob], options: argparse.Namespace, request: str) -> int:
    """Measure the jobs of one tier with the providers of one process; returns 1 if a job could not be measured."""
    process, tier = request.split(":")
    failed = 0
    of_device: dict[str, Results] = {}
    bandwidths: dict[tuple[str, int], float] = {}
    for job in plan:
        if job.tier != int(tier):
            continue
        device = job.workload.device
        if device not in of_device:
            found = environment(device) | ({"commit": options.commit} if options.commit else {})
            found["allocator"] = options.allocator
            of_device[device] = Results(options.out or default_folder(device, options.allocator), found)
        try:
            for row in measure(job, process, of_device[device], bandwidths, options):
                of_device[device].add(row)
                print(summary(row), flush=True)
        except Exception as error:  # the other jobs must still be measured
            print(f"{job.suite}: {job.workload.name}: {layer.failure(error)}", file=sys.stderr, flush=True)
            failed = 1
    return failed


def measure(
    job: Job | TrainingJob, process: str, results: Results, bandwidths: dict[tuple[str, int], float],
    options: argparse.Namespace,
) -> Iterator[Row]:  # fmt: skip
    """Measure the rows of a job that are missing, until the time is up."""
    min_seconds = 0.1 if options.quick else 0.2 if job.workload.device == "cuda" else 0.5
    missing = [p for p in serving(job, process, options) if not done(job, p.name, results)]
    wants_copy = process == "main" and job.measure == "time" and options.provider in layer.COPY
    wants_copy = wants_copy and not done(job, layer.COPY, results)
    if (not missing and not wants_copy) or time.time() > options.deadline:
        return
    if isinstance(job, TrainingJob):
        yield from networks.measure(job, missing, min_seconds)
        return
    workload = job.workload
    key = workload.device, workload.threads
    if job.measure == "time" and key not in bandwidths:
        torch.set_num_threads(workload.threads)
        bandwidths[key] = timing.copy_bandwidth(*key)
    bandwidth = bandwidths.get(key, float("nan"))
    if wants_copy:
        yield from layer.measure_copy(job, bandwidth, min_seconds)
    expected = reference(workload, *workload.inputs())
    yield from layer.measure(job, missing, expected, bandwidth, min_seconds, options.deadline)


def serving(job: Job | TrainingJob, process: str, options: argparse.Namespace) -> list[Provider]:
    """The providers of a process that take part in a job. A rival that cannot run gets a row that says so."""
    workload = job.workload
    return [
        provider
        for provider in providers(process)
        if options.provider in provider.name
        and provider.serves(workload.neuron, workload.device)
        and (job.compiled or not provider.compiled)
        and (workload.device == "cuda" or can_serve(provider) is None)
    ]


def done(job: Job | TrainingJob, provider: str, results: Results) -> bool:
    launches = {
        "time": ("eager",),
        "host": ("host",),
        "first call": ("first, cold caches", "first, warm caches"),
        "memory": ("memory",),
        "training": ("eager",),
    }[job.measure]
    measurements = (
        {"suite": job.suite, "workload": job.workload.name, "provider": provider, "pass": of_pass, "launch": launch}
        for of_pass in job.passes
        for launch in launches
    )
    return all(results.has(measurement) for measurement in measurements)


def summary(row: Row) -> str:
    where = f"{row['suite']:9} {row['workload']} | {row['provider']} | {row['pass']}, {row['launch']}"
    if row["status"] != "ok":
        return f"{where}: {row['status']}"
    if "images_per_s" in row:
        return f"{where}: {row['images_per_s']:.1f} images/s"
    if "saved_bytes" in row:
        return f"{where}: saves {row['saved_bytes'] / row['input_bytes']:.2f} times its input"
    share = f", {row['percent_of_copy']:.0f} % of copy bandwidth" if "percent_of_copy" in row else ""
    return f"{where}: {row['median_us']:.1f} us{share}"


def print_plan(plan: list[Job | TrainingJob], options: argparse.Namespace) -> None:
    for job in plan:
        print(f"tier {job.tier}  {job.suite:9} {job.measure:10} {job.workload.name}  ({', '.join(job.passes)})")
        for process in processes(options.old_line, options.allocator):
            for provider in serving(job, process, options):
                print(f"{'':8}{provider.name}: {provider.configuration}")
    print(f"{len(plan)} workloads")


if __name__ == "__main__":
    sys.exit(main())
