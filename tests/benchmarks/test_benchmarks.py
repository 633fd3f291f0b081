"""The benchmarks' own logic: what is compared, what is counted, what is refused. Nothing here looks at a time."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import run  # noqa: E402
from bench import layer, rows, timing, training  # noqa: E402
from bench.correctness import TOLERANCE, Verdict, judge, reference, train  # noqa: E402
from bench.neurons import ours  # noqa: E402
from bench.plan import SUITES, Job, Training, TrainingJob, jobs  # noqa: E402
from bench.providers import NEURONS, PROCESSES, Provider, of_ours, providers  # noqa: E402
from bench.workload import Workload  # noqa: E402

from klif_sj import KLIFNode, _compat  # noqa: E402

ENVIRONMENT = {"commit": "12e4567890", "device_name": "a machine", "date": "2026-11-22", "torch": "2.11.0"}
SMALL = 14
"""Logarithm of the neuron-steps of a test's workload."""


class DetachedKLIF(KLIFNode):
    """Wrong: the gradient through the reset is cut."""

    def __init__(self) -> None:
        super().__init__(step_mode="m", backend="torch", detach_reset=True)


class SlowerLeak(KLIFNode):
    """Wrong: another time constant, so other spikes."""

    def __init__(self) -> None:
        super().__init__(step_mode="m", backend="torch", tau=2.2)


class FixedSlope(KLIFNode):
    """Wrong: k gets no gradient."""

    def __init__(self) -> None:
        super().__init__(step_mode="m", backend="torch", learn_k=False)


class Raising(nn.Module):
    def load_state_dict(self, *_: Any, **__: Any) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("no kernel image\nfor this device")


def provider(build: Callable[[], nn.Module], name: str = "rival") -> Provider:
    return Provider(name, "as it is", lambda neuron, steps, channels: build())


def measured(job: Job, candidate: Provider) -> list[dict[str, Any]]:
    expected = reference(job.workload, *job.workload.inputs())
    return list(layer.measure(job, [candidate], expected, bandwidth=1e9, min_seconds=0.001))


@pytest.fixture
def no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("what is not correct must not be timed")

    for name in ("on_cpu", "on_gpu", "on_gpu_replayed", "by_the_clock"):
        monkeypatch.setattr(timing, name, refuse)


@pytest.fixture
def _fixed_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "on_cpu", lambda call, *_: (call(), timing.of_samples([0.3, 0.5, 0.7]))[1])


# The floor


def test_the_floor_counts_every_tensor_once() -> None:
    workload = Workload("klif", 4, 20)
    assert workload.floor_bytes("forward") == 8 << 20
    assert workload.floor_bytes("backward") == 12 << 20
    assert workload.floor_bytes("both") == 20 << 20
    half = Workload("klif", 4, 20, "float16")
    assert half.floor_bytes("both") == 10 << 20


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 16, 32, 128])
def test_a_shape_has_the_size_that_it_says(steps: int) -> None:
    for size in range(12, 28):
        workload = Workload("klif", steps, size)
        assert torch.Size(workload.shape).numel() == 1 << size
        assert workload.shape[0] == steps
        assert workload.shape[2] <= 64


def test_channels_last_is_dense_in_every_step() -> None:
    x, grad = Workload("klif", 4, SMALL, layout="channels_last").inputs()
    assert x.shape == Workload("klif", 4, SMALL).inputs()[0].shape
    for tensor in (x, grad):
        assert all(step.is_contiguous(memory_format=torch.channels_last) for step in tensor)
        assert not tensor.is_contiguous()


def test_inputs_outgrow_the_caches_and_differ() -> None:
    workload = Workload("klif", 4, 24)
    assert workload.input_sets() * workload.sequence_bytes >= 1 << 28
    assert Workload("klif", 4, 27).input_sets() == 2
    small = Workload("klif", 4, SMALL)
    assert not torch.equal(small.inputs(0)[0], small.inputs(1)[0])
    assert torch.equal(small.inputs(1)[0], small.inputs(1)[0])


@pytest.mark.usefixtures("_fixed_time")
def test_a_rate_is_the_floor_by_the_time() -> None:
    job = Job("cpu", 0, Workload("klif", 4, SMALL), passes=("forward", "backward", "both"))
    found = measured(job, provider(lambda: KLIFNode(step_mode="m", backend="torch"), "klif_sj torch"))
    assert [row["pass"] for row in found] == ["forward", "backward", "both"]
    for row, tensors in zip(found, (2, 3, 5), strict=True):
        assert row["status"] == "ok"
        assert row["floor_bytes"] == tensors * 4 << SMALL
        assert row["gb_per_s"] == pytest.approx(row["floor_bytes"] / 0.5 / 1e9)
        assert row["percent_of_copy"] == pytest.approx(100 * row["floor_bytes"] / 0.5 / 1e9)
        assert (row["median_us"], row["quartile1_us"], row["quartile3_us"], row["runs"]) == (5e5, 3e5, 7e5, 9)


def test_contenders_take_turns_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job("cpu", 0, Workload("klif", 4, SMALL), passes=("both",))
    served: list[int] = []

    def on_cpu(call: Callable[[], Any], *_: Any) -> timing.Timing:
        served.append(id(call.__self__._run))
        return timing.of_samples([float(len(served))] * 2)

    monkeypatch.setattr(timing, "on_cpu", on_cpu)
    two = [provider(lambda: KLIFNode(step_mode="m", backend="torch"), name) for name in ("one", "other")]
    expected = reference(job.workload, *job.workload.inputs())
    one, other = layer.measure(job, two, expected, bandwidth=1e9, min_seconds=0.001)
    assert served == [*served[:2]] * layer.ROUNDS
    assert (one["provider"], one["runs"], one["median_us"]) == ("one", 2 * layer.ROUNDS, 3e6)
    assert (other["provider"], other["median_us"]) == ("other", 4e6)


def test_a_turn_that_fails_leaves_no_time() -> None:
    fine = timing.of_samples([1.0, 2.0])
    assert timing.together([fine, "failed: a", fine, "failed: b"]) == "failed: a"
    assert timing.together([fine, timing.of_samples([6.0])]) == timing.of_samples([1.0, 2.0, 6.0])


def test_a_gpu_is_timed_by_events_and_by_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    fixed = timing.Timing(1e-3, 1e-3, 1e-3, 5)
    monkeypatch.setattr(timing, "on_gpu", lambda *_: fixed)
    monkeypatch.setattr(timing, "on_gpu_replayed", lambda *_: fixed)
    workload = Workload("klif", 4, 26, device="cuda")

    def launches(of_pass: str, capturable: bool) -> list[str]:
        return [launch for launch, _ in layer.clocked(workload, of_pass, lambda: None, 0.1, capturable)]

    assert launches("both", True) == ["eager", "graph"]
    assert launches("backward", True) == ["eager"]
    assert launches("forward", False) == ["eager"]


# The gate


@pytest.mark.parametrize("neuron", NEURONS)
def test_every_provider_here_computes_the_neuron(neuron: str) -> None:
    workload = Workload(neuron, 4, SMALL, layout="channels_last")
    x, grad = workload.inputs()
    expected = reference(workload, x, grad)
    candidates = [
        p for p in providers("main") if not p.compiled and (p.serves(neuron, "cpu") or p.serves(neuron, "cuda"))
    ]
    candidates = [p for p in candidates if p.name != "klif_sj cupy" and run.can_serve(p) is None]
    assert {p.name for p in candidates} >= {"klif_sj torch"}
    for candidate in candidates:
        node, call = layer.runner(candidate, workload)
        verdict = judge(expected, train(node, call, x, grad), "float32")
        assert verdict.passed, (candidate.name, verdict)
        assert verdict.error_gradient < 1e-5, candidate.name
        assert 0.1 <= verdict.firing_rate <= 0.4


@pytest.mark.usefixtures("no_clock")
@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (DetachedKLIF, "refused: error of the gradient of x"),
        (SlowerLeak, "of the spikes differ"),
        (FixedSlope, "refused: error of the gradient of k"),
        (Raising, "failed: RuntimeError: no kernel image"),
    ],
)
def test_what_computes_something_else_is_refused_and_not_timed(wrong: Callable[[], nn.Module], reason: str) -> None:
    job = Job("cpu", 0, Workload("klif", 4, SMALL), passes=("forward", "both"))
    found = measured(job, provider(wrong))
    assert [row["pass"] for row in found] == ["forward", "both"]
    for row in found:
        assert reason in row["status"]
        assert "median_us" not in row


def test_the_gate_lets_nothing_pass_that_is_not_a_number() -> None:
    workload = Workload("klif", 2, SMALL)
    x, grad = workload.inputs()
    expected = reference(workload, x, grad)
    node = ours("klif", "torch", 2, 64)
    node.load_state_dict({"k": torch.tensor(1.2)})
    right = train(node, node, x, grad)
    assert judge(expected, right, "float32").passed
    right.grad_x[0, 0, 0] = float("nan")
    assert judge(expected, right, "float32").status.startswith("refused: error of the gradient of x nan")


def test_the_reference_does_not_depend_on_how_the_batch_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    workload = Workload("glif-channel", 4, 18)
    x, grad = workload.inputs()
    whole = reference(workload, x, grad)
    monkeypatch.setattr("bench.correctness.CHUNK", 1 << 14)
    parts = reference(workload, x, grad)
    assert torch.equal(whole.spikes, parts.spikes)
    assert torch.equal(whole.grad_x, parts.grad_x)
    for name, value in whole.grad_parameters.items():
        torch.testing.assert_close(parts.grad_parameters[name], value, rtol=1e-10, atol=0)


def test_a_looser_dtype_has_a_looser_gate() -> None:
    assert TOLERANCE["float32"] < TOLERANCE["float16"] < TOLERANCE["bfloat16"]


# Memory


def test_a_layer_of_ours_keeps_its_input_and_no_more() -> None:
    workload = Workload("clif", 8, SMALL)
    x, _ = workload.inputs()
    candidate = provider(lambda: ours("clif", "auto", 8, 64), "klif_sj auto")
    assert timing.saved_bytes(*layer.runner(candidate, workload), x) == workload.sequence_bytes
    squared = nn.Sequential(nn.Sigmoid(), nn.Tanh())
    assert timing.saved_bytes(squared, squared, x) == 2 * workload.sequence_bytes


# The plan


def test_the_plan_for_a_gpu_covers_the_kernels() -> None:
    plan = [job.workload for job in jobs(("kernels",), "cuda", quick=False)]
    for neuron in ("klif", "clif", "glif-channel"):
        of_neuron = [workload for workload in plan if workload.neuron == neuron]
        assert {w.steps for w in of_neuron} == {1, 2, 4, 8, 16, 32, 128}
        assert {w.dtype for w in of_neuron} == {"float32", "float16", "bfloat16"}
        assert {w.layout for w in of_neuron} == {"contiguous", "channels_last"}
        assert {w.log2_size for w in of_neuron} >= {12, 27}
    assert {w.neuron for w in plan} == set(NEURONS)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_plan_is_in_order_of_priority(device: str) -> None:
    plan = jobs(SUITES, device, quick=False)
    assert [job.tier for job in plan] == sorted(job.tier for job in plan)
    assert len(set(plan)) == len(plan)
    assert len(jobs(SUITES, device, quick=True)) < len(plan)
    assert {job.suite for job in plan} == set(SUITES) - ({"kernels"} if device == "cpu" else set())


def test_the_targets_of_the_cpu_come_first() -> None:
    first = [job for job in jobs(("cpu",), "cpu", quick=False) if job.tier == 0]
    assert {(job.workload.steps, job.workload.neurons, job.workload.dtype) for job in first} == {
        (8, 1 << 20, "float32")
    }
    assert {job.workload.neuron for job in first} == {"klif", "clif", "glif-channel"}


@pytest.mark.skipif(not _compat.SPIKINGJELLY_2, reason="the providers of SpikingJelly 2")
def test_every_rival_takes_part_on_a_gpu() -> None:
    def names(neuron: str) -> set[str]:
        return {p.name for process in PROCESSES for p in providers(process) if p.serves(neuron, "cuda")}

    always = {"klif_sj cupy", "klif_sj torch", "klif_sj torch compiled", "klif_sj cupy compiled"}
    upstream = always | {"spikingjelly eager", "spikingjelly compiled"}
    assert names("klif") == upstream | {"flexsn"}
    assert names("clif") == upstream | {"flexsn", "spikingjelly triton", "spikingjelly compiled, torch kernels"}
    assert names("glif-channel") == upstream
    assert names("user") == always | {"flexsn"}


# Rows


def test_rows_are_written_at_once_and_read_back(tmp_path: Path) -> None:
    results = rows.Results(tmp_path, ENVIRONMENT)
    row = {"suite": "cpu", "workload": "w", "provider": "p", "pass": "both", "launch": "eager", "status": "ok"}
    results.add(row | {"median_us": 12.5, "T": 8, "error_gradient": float("nan")})
    (read,) = rows.read_rows(results.path)
    assert (read["median_us"], read["T"], read["commit"], read["torch"]) == (12.5, 8, "12e4567890", "2.11.0")
    assert read["peak_bytes"] is None
    again = rows.Results(tmp_path, ENVIRONMENT)
    assert again.has(row)
    assert not again.has(row | {"pass": "forward"})
    assert not rows.Results(tmp_path, ENVIRONMENT | {"commit": "other"}).has(row)


def test_a_csv_of_another_harness_is_refused(tmp_path: Path) -> None:
    (tmp_path / rows.FILE).write_text("suite,seconds\ncpu,1\n")
    with pytest.raises(ValueError, match="expected the columns suite, workload"):
        rows.Results(tmp_path, ENVIRONMENT)


@pytest.mark.usefixtures("_fixed_time")
def test_a_run_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job("cpu", 0, Workload("klif", 4, SMALL), compiled=False)
    options = argparse.Namespace(quick=True, deadline=float("inf"), provider="")
    results = rows.Results(tmp_path, ENVIRONMENT)
    bandwidths = {("cpu", 1): 1e9}
    found = list(run.measure(job, "main", results, bandwidths, options))
    assert found[0]["provider"] == "copy"
    names = [p.name for p in providers("main") if p.serves("klif", "cpu") and not p.compiled and not run.can_serve(p)]
    assert [row["provider"] for row in found[1:]] == names
    for row in found[:-1]:
        results.add(row)
    rest = list(run.measure(job, "main", rows.Results(tmp_path, ENVIRONMENT), bandwidths, options))
    assert [row["provider"] for row in rest] == names[-1:]
    options.provider = "torch"
    named = list(run.measure(job, "main", rows.Results(tmp_path / "new", ENVIRONMENT), bandwidths, options))
    assert [row["provider"] for row in named] == [name for name in names if "torch" in name] != []
    options.deadline = 0.0
    assert list(run.measure(job, "main", rows.Results(tmp_path / "new", ENVIRONMENT), bandwidths, options)) == []


def test_training_is_not_timed_with_other_neurons_or_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "COMPARED", 10)
    monkeypatch.setattr(timing, "peak_bytes", lambda *_: 1)
    task = Training("fashion-mnist", "klif", 4, 8, device="cpu", width=0.1)
    same = Provider("same", "", of_ours("torch"))
    job = TrainingJob("training", 0, task)
    good, bad = training.measure(job, [same, provider(DetachedKLIF)], 0.001)
    assert good["status"] == "ok"
    assert good["error_loss"] == 0.0
    assert good["images_per_s"] == pytest.approx(8e6 / good["median_us"])
    assert bad["status"].startswith("refused: error of the gradient of x")
    monkeypatch.setattr(training, "judge_node", lambda *_: Verdict(0.0, 0.0, 0.2, "ok"))
    monkeypatch.setitem(training.TOLERANCE, "float32", 1e-6)
    (drifted,) = training.measure(job, [provider(SlowerLeak)], 0.001)
    assert drifted["status"].startswith("refused: a loss of 10 differs by")
    assert "images_per_s" not in bad.keys() | drifted.keys()


def test_a_job_that_cannot_be_measured_leaves_the_others_their_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = [job for job in jobs(("cpu",), "cpu", quick=True) if job.tier == 0][:2]

    def measure(job: Any, *_: Any) -> Any:
        if job is plan[0]:
            raise ValueError("no reference")
        yield {"suite": "cpu", "workload": job.workload.name, "status": "ok", "median_us": 1.0}

    monkeypatch.setattr(run, "measure", measure)
    options = argparse.Namespace(out=tmp_path, commit="12e4567890", allocator="keeping")
    assert run.run_process(plan, options, "main:0") == 1
    assert "ValueError: no reference" in capsys.readouterr().err
    assert [row["workload"] for row in rows.read_rows(tmp_path / rows.FILE)] == [plan[1].workload.name]
