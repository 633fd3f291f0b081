"""Memory for large outputs on the CPU. It is kept for the next call, because the system needs longer to map pages than
a kernel needs to fill them."""

from __future__ import annotations

import collections
import contextlib
import ctypes
import math
import mmap
import os
import threading
import weakref
from typing import NamedTuple

import torch
from torch import Tensor

LARGE = 1 << 24
"""From this number of bytes on, an output comes from the pool and is stored around the caches."""

PAGE = 1 << 21
"""Bytes in a large page. The pool maps whole large pages."""


class Block(NamedTuple):
    """Mapped memory, and where in it the first large page begins."""

    memory: mmap.mmap
    start: int


class Pool:
    """Blocks of memory that tensors lease. A block comes back when the last tensor that shares it is gone.

    An idle block waits for a tensor of the same size. All blocks together never take more than tensors had leased at
    one time: beyond that, the blocks that were idle longest go back to the system.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[Block] = []  # the longest idle first
        self._leases: dict[int, tuple[weakref.ref[memoryview], Block]] = {}
        self._returned: collections.deque[Block] = collections.deque()
        self._leased = self._peak = 0
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._renew_lock)

    def _renew_lock(self) -> None:
        self._lock = threading.Lock()

    def lease(self, size: int) -> memoryview:
        """Lease ``size`` uninitialised bytes from the start of a large page, until nothing refers to them any more.

        :raises OSError: if the system has no memory
        """
        mapped = math.ceil(size / PAGE) * PAGE + PAGE  # one page more, to start where a page starts
        with self._lock:
            self._take_back()
            position = next((i for i in reversed(range(len(self._idle))) if len(self._idle[i].memory) == mapped), None)
            if position is None:
                self._drop(max(self._peak - self._leased - mapped, 0))
            block = _map(mapped) if position is None else self._idle.pop(position)
            self._leased += mapped
            self._peak = max(self._peak, self._leased)
        lent = memoryview(block.memory)[block.start : block.start + size]
        reference = weakref.ref(lent, self._note_return)
        self._leases[id(reference)] = reference, block
        return lent

    def _note_return(self, reference: weakref.ref[memoryview]) -> None:
        """Note a returned block, and no more: Python may call this in a garbage collection while the lock is held."""
        self._returned.append(self._leases.pop(id(reference))[1])

    def release(self) -> None:
        """Give all idle memory back to the system."""
        with self._lock:
            self._take_back()
            self._drop(0)

    @property
    def idle_bytes(self) -> int:
        """Bytes that wait for a tensor."""
        with self._lock:
            self._take_back()
            return _bytes(self._idle)

    def _take_back(self) -> None:
        while self._returned:
            block = self._returned.popleft()
            self._leased -= len(block.memory)
            self._idle.append(block)

    def _drop(self, limit: int) -> None:
        """Unmap the longest idle blocks until the others take no more than ``limit`` bytes."""
        while _bytes(self._idle) > limit:
            self._idle.pop(0)


def _bytes(blocks: list[Block]) -> int:
    return sum(len(block.memory) for block in blocks)


def _map(size: int) -> Block:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # private: a fork has its own copy
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # the system may have no large pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return Block(memory, -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % PAGE)


pool = Pool()


def empty(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised dense tensor on the CPU. A large one lies in the pool, except while a profiler counts memory."""
    size = math.prod(shape) * dtype.itemsize
    if size < LARGE or not hasattr(mmap, "MAP_PRIVATE") or torch.autograd._profiler_enabled():
        return torch.empty_strided(shape, strides, dtype=dtype)
    try:
        lent = pool.lease(size)
    except OSError:
        pool.release()
        return torch.empty_strided(shape, strides, dtype=dtype)  # torch raises its own error if this fails
    whole = torch.frombuffer(lent, dtype=dtype)
    fills: bool = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    if fills and torch.are_deterministic_algorithms_enabled():
        whole.fill_(math.nan)
    # The result is no view, because writing into a view that a torch.autograd.Function returns is an error.
    return torch.empty(0, dtype=dtype).set_(whole.untyped_storage(), 0, shape, strides)
