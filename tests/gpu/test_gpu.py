"""The kernels on a GPU: `pytest -m gpu`. Skipped where there is none; the emulation proves the same source there."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from cuda_cases import EXECUTED, ChannelLeak, ran
from tolerance import assert_close, assert_equal
from torch import Tensor, nn

from klif_sj import CLIFNode, FusedNode, GLIFNode, KLIFNode, runtime

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif("cupy" not in runtime.supported_backends(), reason=f"no GPU: {runtime.unavailable('cupy')}"),
]

STEPS = (1, 2, 3, 4, 8, 16, 17, 40)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def neurons(steps: int, channels: int) -> dict[str, FusedNode]:
    return {
        "klif": KLIFNode(),
        "klif-star-soft": KLIFNode(scale_reset=True, v_reset=None, init_k=1.3),
        "clif": CLIFNode(),
        "glif": GLIFNode(T=steps, inplane=channels),
        "glif-layer-wise": GLIFNode(T=steps, inplane=None),
        "glif-time-wise": GLIFNode(T=steps, inplane=channels, time_wise=True),
        "user-defined": ChannelLeak(channels),
    }


def both(node: FusedNode, x: Tensor, grad: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    node.step_mode = "m"
    results = []
    for backend in ("cupy", "torch"):
        node.backend = backend
        results.append(ran(node, x, grad))
    return results[0], results[1]


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", list(neurons(1, 5)))
def test_equals_torch(name: str, dtype: torch.dtype, steps: int) -> None:
    """Spikes and states equal eager torch on the GPU; every gradient is within the dtype's tolerance. In 16 bits a
    gradient may be rounded to the next number, as its fused multiply-adds differ from torch's in the last bit.

    CLIF's and GLIF's potentials may differ in the last bit (sigmoid, the order of sums), so a spike at the threshold
    may too: at most one in ten thousand.
    """
    node = neurons(steps, 5)[name].cuda()
    x, grad = (torch.randn(steps, 7, 5, 6, 6, device="cuda").mul(2).to(dtype) for _ in range(2))
    actual, expected = both(node, x, grad)
    if name == "klif":
        assert_equal(actual["spikes"], expected["spikes"])
    assert (actual["spikes"] != expected["spikes"]).float().mean() <= 1e-4
    if torch.equal(actual["spikes"], expected["spikes"]):
        for key, value in expected.items():
            assert_close(actual[key], value, key, roundings=2)


@pytest.mark.parametrize("case", EXECUTED, ids=lambda c: f"{c[0].__name__}-T{c[1]}-{'x'.join(map(str, c[2]))}-{c[3]}")
def test_equals_the_host(case: tuple[Any, ...]) -> None:
    """The same neuron, on the GPU and by the host's kernel."""
    make, steps, shape, dtype, channels_last, _ = case
    node = make(steps, shape[1] if len(shape) > 1 else 1)
    node.step_mode = "m"
    x, grad = (torch.randn(steps, *shape).mul(2).to(dtype) for _ in range(2))
    if channels_last:
        x = x.flatten(0, 1).to(memory_format=torch.channels_last).unflatten(0, (steps, shape[0]))
    node.backend = "cpp"
    expected = ran(node, x, grad)
    node.cuda().backend = "cupy"
    actual = ran(node, x.cuda(), grad.cuda())
    if "klif" in make.__name__:
        assert_equal(actual["spikes"].cpu(), expected["spikes"])
    if torch.equal(actual["spikes"].cpu(), expected["spikes"]):
        for key, value in expected.items():
            assert_close(actual[key].cpu(), value, key, roundings=2)


def test_the_same_bits_over_100_runs() -> None:
    node = GLIFNode(T=4, inplane=16, step_mode="m", backend="cupy").cuda()
    x, grad = (torch.randn(4, 32, 16, 24, 24, device="cuda") for _ in range(2))
    first = ran(node, x, grad)
    for _ in range(99):
        for name, value in ran(node, x, grad).items():
            assert_equal(value, first[name], name)


def test_follows_torchs_current_stream() -> None:
    """Work queued on a side stream is ordered with torch's own there, without a synchronisation."""
    node = KLIFNode(step_mode="m", backend="cupy").cuda()
    x = torch.randn(8, 1 << 20, device="cuda")
    expected = node(x * 3.0)
    node.reset()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        actual = node(x * 3.0)
    torch.cuda.current_stream().wait_stream(side)
    assert_equal(actual, expected)


def test_without_final_states() -> None:
    node, keeps = (CLIFNode(step_mode="m", backend="cupy", keep_state=keep).cuda() for keep in (False, True))
    x, grad = torch.randn(4, 1000, device="cuda"), torch.randn(4, 1000, device="cuda")
    found = []
    for each in (node, keeps):
        leaf = x.clone().requires_grad_()
        spikes = each(leaf * 2.0)
        found.append((spikes, *torch.autograd.grad(spikes, leaf, grad)))
    for actual, expected in zip(*found, strict=True):
        assert_equal(actual, expected)


def test_captured_in_a_cuda_graph() -> None:
    node = KLIFNode(step_mode="m", backend="cupy").cuda()
    x = torch.randn(4, 1000, device="cuda", requires_grad=True)
    grad = torch.randn_like(x)

    def step() -> tuple[Tensor, Tensor, Tensor]:
        node.reset()
        spikes = node(x)
        return spikes, *torch.autograd.grad(spikes, [x, node.k], grad)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        with torch.no_grad():
            x.copy_(torch.randn_like(x) * 2)
        graph.replay()
        replayed = [t.detach().clone() for t in captured]
        for actual, expected in zip(replayed, step(), strict=True):
            assert_equal(actual, expected)


def test_nothing_is_loaded_in_a_capture() -> None:
    """The refused call leaves the neuron as it was, and the capture can be made anew after a call."""
    node, x = KLIFNode(tau=2.375, step_mode="m", backend="cupy").cuda(), torch.randn(4, 1000, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="before the capture, run once"), torch.cuda.graph(graph):
            node(x)
        expected = node(x)
        node.reset()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = node(x)
        graph.replay()
        assert_equal(captured, expected)


def test_in_a_thread_that_never_used_the_gpu() -> None:
    """A kernel that was loaded by another thread, and one that the thread loads itself; after CuPy forgot its own."""
    node, x = KLIFNode(tau=2.4375, step_mode="m", backend="cupy").cuda(), torch.randn(4, 1000, device="cuda")
    found: list[Tensor] = []

    @torch.no_grad()
    def call() -> None:
        for tau in (2.4375, 2.5625):
            node.tau = tau
            node.reset()
            found.append(node(x))

    node(x.requires_grad_()).sum().backward()
    pytest.importorskip("cupy").clear_memo()
    for run in (lambda: ThreadPoolExecutor(1).submit(call).result(), call):
        run()
    assert_equal(found[0], found[2])
    assert_equal(found[1], found[3])


def test_subnormal_numbers_are_kept() -> None:
    node, x = KLIFNode(step_mode="m", backend="cupy").cuda(), torch.full((4, 1000), 1e-40, device="cuda")
    with torch.no_grad():
        node(x)
    smallest_normal = torch.finfo(torch.float32).tiny
    assert ((node.v > 0) & (node.v < smallest_normal)).all()


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled(mode: str) -> None:
    body, node = nn.Conv2d(3, 8, 3).cuda(), GLIFNode(T=4, inplane=8, step_mode="m", backend="cupy").cuda()
    x = torch.randn(4, 2, 3, 9, 9, device="cuda")

    def network(x: Tensor) -> Tensor:
        return node(body(x.flatten(0, 1)).unflatten(0, (4, 2)))

    def gradients(forward: Any) -> list[Tensor]:
        node.reset()
        out = forward(x)
        return [g.clone() for g in torch.autograd.grad((out * 1.5).sum(), [body.weight, *node.parameters()])]

    expected = gradients(network)
    compiled = torch.compile(network, fullgraph=True, mode=mode)
    for _ in range(3):
        for actual, value in zip(gradients(compiled), expected, strict=True):
            assert_close(actual, value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    body, node = nn.Linear(64, 64).cuda(), KLIFNode(step_mode="m").cuda()
    x = torch.randn(4, 32, 64, device="cuda")
    spikes = []
    for backend in ("cupy", "torch"):
        node.backend = backend
        node.reset()
        with torch.autocast("cuda", dtype=dtype):
            out = node(body(x) * 3)
        out.float().sum().backward()
        assert out.dtype == dtype
        assert node.v.dtype == torch.float32
        spikes.append(out)
    assert_equal(spikes[0], spikes[1])


def test_distributed_data_parallel() -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29577")
    torch.distributed.init_process_group("nccl", rank=0, world_size=1)
    try:
        net = nn.Sequential(nn.Linear(32, 32), KLIFNode(step_mode="m", backend="cupy")).cuda()
        x = torch.randn(4, 8, 32, device="cuda")
        net(x).sum().backward()
        expected = [p.grad.clone() for p in net.parameters()]
        net.zero_grad()
        net[1].reset()
        nn.parallel.DistributedDataParallel(net, device_ids=[0])(x).sum().backward()
        for p, value in zip(net.parameters(), expected, strict=True):
            assert_close(p.grad, value)
    finally:
        torch.distributed.destroy_process_group()


def test_more_than_two_to_the_31_elements() -> None:
    """64-bit indices: the last neurons of a tensor beyond 2**31 elements are computed as any others."""
    neurons_, steps = (1 << 30) + 9, 2
    if torch.cuda.mem_get_info()[0] < 40 * (1 << 30):
        pytest.skip("needs 40 GiB of free GPU memory")
    node = KLIFNode(step_mode="m", backend="cupy").cuda()
    x = torch.full((steps, neurons_), 0.5, device="cuda", dtype=torch.float16)
    x[:, -1000:] = torch.randn(steps, 1000, device="cuda").mul(3).half()
    with torch.no_grad():
        actual = node(x)[:, -1000:].clone()
        node.reset()
        assert_equal(actual, node(x[:, -1000:].clone()))
        assert actual.any()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_second_device() -> None:
    node = KLIFNode(step_mode="m", backend="cupy")
    x = torch.randn(4, 1000)
    results = []
    for device in ("cuda:0", "cuda:1"):
        node.reset()
        results.append(node.to(device)(x.to(device)).cpu())
    assert_equal(results[0], results[1])


def test_the_other_device_is_refused() -> None:
    node = KLIFNode(step_mode="m", backend="cupy").cuda()
    with pytest.raises(ValueError, match="backend 'cupy': expected a tensor on 'cuda', got one on 'cpu'"):
        node(torch.randn(4, 3))
    with pytest.raises(ValueError, match="expected parameter 'k' on the input's device cuda:0, got cpu"):
        KLIFNode(step_mode="m", backend="cupy")(torch.randn(4, 3, device="cuda"))
