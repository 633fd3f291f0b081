"""The way to a launch, with a driver that only writes down: contexts, modules, streams, captures."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cuda_driver import FakeDriver
from torch import Tensor

from klif_sj import CLIFNode, KLIFNode
from klif_sj.runtime import cuda, nvrtc

pytestmark = pytest.mark.once


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDriver]:
    monkeypatch.setattr(nvrtc, "image", lambda source, architecture, options: source.encode())
    return FakeDriver(monkeypatch)


def train(node: KLIFNode, x: Tensor) -> None:
    node.reset()
    torch.autograd.grad(node(x).sum(), x)


def test_each_pass_is_compiled_once_and_for_itself(driver: FakeDriver) -> None:
    node, x = KLIFNode(step_mode="m", backend="cpp"), torch.randn(4, 3, 50, requires_grad=True)
    for _ in range(3):
        train(node, x)
    first = ["context", "load", "find forward", "launch forward", "load", "find backward", "launch backward"]
    again = ["launch forward", "launch backward", "launch finish"]
    assert driver.log == [*first, "find finish", "launch finish", *again, *again]
    assert driver.first_arguments == [x.data_ptr()] * 9
    forward, backward = (image.decode() for image in driver.images)
    assert "#define BACKWARD 0" in forward
    assert "#define BACKWARD 1" in backward


def test_a_context_is_made_where_there_is_none_before_anything_is_loaded(driver: FakeDriver) -> None:
    node, x = KLIFNode(step_mode="m", backend="cpp"), torch.randn(4, 3, 50)

    def call() -> None:
        with torch.no_grad():
            node(x)

    call()
    driver.context = False  # as it is in a thread that has just begun
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert driver.log[:2] == ["context", "load"]
    assert driver.log.count("context") == 2
    assert driver.log.count("load") == 1


def test_without_a_context_nothing_can_be_launched(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_make_context", lambda: None)
    with torch.no_grad(), pytest.raises(RuntimeError, match="CUDA_ERROR_INVALID_CONTEXT"):
        KLIFNode(step_mode="m", backend="cpp")(torch.randn(4, 3, 50))


def test_functions_keep_their_modules(driver: FakeDriver) -> None:
    """CuPy unloads a module that nobody holds, as after ``cupy.clear_memo()``, and its functions with it."""
    node, x = KLIFNode(step_mode="m", backend="cpp"), torch.randn(4, 3, 50, requires_grad=True)
    train(node, x)
    pytest.importorskip("cupy").clear_memo()
    gc.collect()
    assert [module() is None for module in driver.modules] == [False, False]


def test_a_pointer_alone_would_not_keep_its_module(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    load = cuda._module.__wrapped__

    def pointer(*arguments: Any) -> SimpleNamespace:
        kernel, vector, name, device = arguments
        return SimpleNamespace(ptr=load(kernel, vector, device).get_function(name).ptr)

    monkeypatch.setattr(cuda, "_function", pointer)
    with torch.no_grad():
        KLIFNode(step_mode="m", backend="cpp")(torch.randn(4, 3, 50))
    gc.collect()
    assert [module() is None for module in driver.modules] == [True]


@pytest.mark.parametrize("name", ["forward", "backward"])
def test_nothing_is_loaded_while_a_graph_is_captured(driver: FakeDriver, name: str) -> None:
    node, x = CLIFNode(step_mode="m", backend="cpp"), torch.randn(4, 3, 50, requires_grad=True)
    spikes = node(x) if name == "backward" else None
    driver.capturing, before = True, len(driver.log)
    message = rf"CLIFNode\(.*: its {name} kernel for 4 steps is not loaded yet, .* before the capture, run once"
    with pytest.raises(RuntimeError, match=message):
        torch.autograd.grad(spikes.sum(), x) if name == "backward" else node(x)
    assert "load" not in driver.log[before:]
    with pytest.MonkeyPatch.context() as unasked:
        unasked.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        torch.autograd.grad(spikes.sum(), x) if name == "backward" else node(x)
        assert "load" in driver.log[before:]  # as it was, in the capture
    driver.capturing = False
    node.reset()
    train(node, x)
    driver.capturing, before = True, len(driver.log)
    train(node, x)
    assert {entry.split()[0] for entry in driver.log[before:]} == {"launch"}


def test_a_width_that_is_new_in_a_capture_is_refused(driver: FakeDriver) -> None:
    """A tensor that begins off the boundary has a kernel of its own."""
    node, stored = KLIFNode(step_mode="m", backend="cpp"), torch.randn(2 * 4 * 64 + 1)
    with torch.no_grad():
        node(stored[:-1].view(2, 4, 64))
        driver.capturing = True
        node.reset()
        with pytest.raises(RuntimeError, match="same shapes, layouts and alignment"):
            node(stored[1:].view(2, 4, 64))
