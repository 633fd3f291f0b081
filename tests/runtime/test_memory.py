"""The pool that large outputs of the host's kernels come from."""

from __future__ import annotations

import gc
import math
import mmap
import os

import pytest
import torch

from klif_sj import KLIFNode, runtime
from klif_sj.runtime import memory
from klif_sj.runtime.memory import LARGE, PAGE, Pool

pytestmark = pytest.mark.skipif(not hasattr(mmap, "MAP_PRIVATE"), reason="no private mappings here")

SHAPE = (2, LARGE // 8)
STRIDES = (LARGE // 8, 1)


@pytest.fixture
def pool(monkeypatch):
    monkeypatch.setattr(memory, "pool", Pool())
    return memory.pool


def large(shape=SHAPE, strides=STRIDES, dtype=torch.float32):
    return memory.empty(shape, strides, dtype)


def test_memory_is_used_again_only_when_nobody_has_it(pool):
    first = large()
    address = first.data_ptr()
    assert address % PAGE == 0
    row = first[1]
    del first
    second = large()
    assert second.data_ptr() != address
    array = row.numpy()
    del row
    assert large().data_ptr() not in (address, second.data_ptr())
    del array
    assert pool.idle_bytes > 0
    found = {large().data_ptr() for _ in range(3)}
    assert len(found) == 1
    assert second.data_ptr() not in found


@pytest.mark.parametrize(
    "keeper",
    [lambda t: t.untyped_storage(), lambda t: t.storage(), lambda t: memoryview(t.numpy()), lambda t: t.T.detach()],
    ids=["untyped storage", "typed storage", "memory view", "view"],
)
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_whoever_keeps_any_part_of_a_tensor_keeps_its_memory(pool, keeper):
    tensor = large()
    address, kept = tensor.data_ptr(), keeper(tensor)
    del tensor
    other = large()
    assert other.data_ptr() != address
    del other
    assert large().data_ptr() != address
    del kept
    assert address in {tensor.data_ptr() for tensor in [large(), large()]}


def test_tensors_are_ordinary_ones(pool):
    tensor = large((4, 2, LARGE // 16), (LARGE // 8, 1, 2), torch.float16)
    assert tensor.shape == (4, 2, LARGE // 16)
    assert tensor.stride() == (LARGE // 8, 1, 2)
    assert tensor.dtype == torch.float16
    assert not tensor._is_view()
    assert tensor.untyped_storage().nbytes() == tensor.nbytes
    assert not tensor.requires_grad


def test_memory_never_exceeds_what_was_leased_at_one_time(pool):
    small, big = ((1, LARGE // 4), (LARGE // 4, 1)), ((3, LARGE // 4), (LARGE // 4, 1))
    for shape, strides in (big, small, big, small):
        tensor = large(shape, strides)
        leased = math.ceil(tensor.nbytes / PAGE) * PAGE + PAGE
        del tensor
        assert leased <= pool.idle_bytes <= 3 * LARGE + PAGE
    pool.release()
    assert pool.idle_bytes == 0


def test_small_tensors_and_profiled_ones_are_torchs_own(pool):
    assert memory.empty((LARGE // 4 - 1,), (1,), torch.float32).untyped_storage().resizable()
    assert not large().untyped_storage().resizable()
    with torch.profiler.profile(profile_memory=True) as profile:
        assert large().untyped_storage().resizable()
    assert any(event.self_cpu_memory_usage >= LARGE for event in profile.events())


def test_without_memory_torch_is_asked(pool, monkeypatch):
    del [large()][:]

    def refuse(size):
        raise OSError("cannot allocate memory")

    monkeypatch.setattr(memory, "_map", refuse)
    held = [large(), large()]  # the idle one, and torch's
    assert [tensor.untyped_storage().resizable() for tensor in held] == [False, True]


def test_uninitialised_memory_is_filled_where_torch_fills_it(pool):
    large().fill_(1)
    torch.use_deterministic_algorithms(True)
    try:
        assert large().isnan().all()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_has_memory_of_its_own(pool):
    tensor = large().fill_(1)
    child = os.fork()
    if not child:
        try:
            tensor[0, 0] = 2
            other = large()
            os._exit(0 if other.data_ptr() != tensor.data_ptr() else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert tensor[0, 0] == 1


@pytest.mark.skipif("cpp" not in runtime.supported_backends(), reason="no C++ compiler")
@pytest.mark.parametrize("v_reset", [0.0, None])
def test_a_layer_trains_in_reused_memory_as_in_new(pool, v_reset):
    x = torch.randn(4, LARGE // 16, requires_grad=True)
    grad = torch.randn_like(x)
    node, reference = (KLIFNode(v_reset=v_reset, step_mode="m", backend=name) for name in ("cpp", "torch"))
    expected = reference(x)
    (expected_grad,) = torch.autograd.grad(expected, x, grad)
    addresses = set()
    for _ in range(3):
        node.reset()
        spikes = node(x)
        (found,) = torch.autograd.grad(spikes, x, grad)
        assert torch.equal(spikes, expected)
        torch.testing.assert_close(found, expected_grad)
        addresses |= {spikes.data_ptr(), found.data_ptr()}
        spikes.mul_(2)  # as of any tensor that is not a view
        del spikes, found
        gc.collect()
    assert len(addresses) == 2
