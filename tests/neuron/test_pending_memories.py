"""A neuron's memories while its states are not computed: every way to read one computes it, nothing else does."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tolerance import assert_equal

from klif_sj.neuron.memories import PendingMemories

READS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "m[name]": lambda m: m["v"],
    "get": lambda m: m.get("v"),
    "values": lambda m: next(iter(m.values())),
    "items": lambda m: next(iter(m.items()))[1],
    "pop": lambda m: m.pop("v"),
    "setdefault": lambda m: m.setdefault("v", 1),
    "copy": lambda m: m.copy()["v"],
    "dict()": lambda m: dict(m)["v"],
    "update of another": lambda m: next(iter([d := {}, d.update(m)]))["v"],
    "**": lambda m: {**m}["v"],
    "keyword arguments": lambda m: (lambda **values: values)(**m)["v"],
    "m | other": lambda m: (m | {})["v"],
    "other | m": lambda m: ({} | m)["v"],
    "copy.copy": lambda m: copy.copy(m)["v"],
    "deepcopy": lambda m: copy.deepcopy(m)["v"],
    "pickle": lambda m: pickle.loads(pickle.dumps(m))["v"],
}


def pending_memories(calls: list[int]) -> PendingMemories:
    state = torch.zeros(1).expand(2)

    def compute() -> None:
        calls.append(1)
        state.data = torch.tensor([1.0, 2.0])

    return PendingMemories({"v": 0.0, "time_step": 3}, {"v": state}, compute)


@pytest.mark.parametrize("read", READS.values(), ids=READS.keys())
def test_every_way_to_read_a_memory_computes_it(read: Callable[[dict[str, Any]], Any]) -> None:
    calls: list[int] = []
    assert_equal(read(pending_memories(calls)), torch.tensor([1.0, 2.0]))
    assert calls == [1]


def test_reading_as_a_whole_computes() -> None:
    for read in (repr, lambda m: m == {}, lambda m: m != {}, lambda m: m.popitem()):
        calls: list[int] = []
        read(pending_memories(calls))
        assert calls == [1]
    memories = pending_memories([])
    for plain in (memories.copy(), copy.copy(memories), memories | {}, {} | memories):
        assert type(plain) is dict
        assert list(plain) == ["v", "time_step"]


def test_names_and_writing_compute_nothing() -> None:
    calls: list[int] = []
    memories = pending_memories(calls)
    assert "v" in memories
    assert list(memories) == list(memories.keys()) == ["v", "time_step"]
    assert len(memories) == 2
    memories["v"] = 0.5
    assert memories["v"] == 0.5  # none of the pending states is left
    assert calls == []
