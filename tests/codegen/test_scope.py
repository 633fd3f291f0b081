"""What a step reads is seen: a kernel never outlives what it was made from, and nothing of the neuron is touched."""

from __future__ import annotations

import functools
import gc
import os
import random
import threading
import time
import types
import weakref
from collections.abc import Callable
from random import random as shuffled
from typing import Any

import numpy as np
import pytest
import torch
from neurons import BATCH, CHANNELS, CPU_BACKENDS, STEPS, current
from spikingjelly.activation_based import functional, surrogate
from tolerance import assert_close, assert_equal
from torch import Tensor, nn

from klif_sj import GLIFNode, KLIFNode, LearnableATan
from klif_sj.codegen import StepTraceError

pytestmark = pytest.mark.skipif("cpp" not in CPU_BACKENDS, reason="no C++ compiler on this machine")

GAIN = 1.0
CONFIG = types.SimpleNamespace(gain=1.0)
TABLE = {"gain": [1.0]}
SURROGATE = surrogate.ATan()
COUNTER = 0


class Gain(KLIFNode):
    """x times a gain that lies somewhere."""

    def neuronal_charge(self, x: Tensor) -> None:
        super().neuronal_charge(x * self.found_gain())

    def found_gain(self) -> float:
        raise NotImplementedError


class OfClass(Gain):
    gain = 1.0

    def found_gain(self) -> float:
        return self.gain


class OfItsClass(Gain):
    gain = 1.0

    def found_gain(self) -> float:
        return self.__class__.gain


class OfGlobal(Gain):
    def found_gain(self) -> float:
        return GAIN


class OfGlobalObject(Gain):
    def found_gain(self) -> float:
        return CONFIG.gain


class OfGlobalTable(Gain):
    def found_gain(self) -> float:
        return TABLE["gain"][0]


class OfConfig(Gain):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.config = types.SimpleNamespace(deep=types.SimpleNamespace(gain=1.0))

    def found_gain(self) -> float:
        return self.config.deep.gain


class OfArray(Gain):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.gain = np.ones(1)

    def found_gain(self) -> float:
        return float(self.gain[0])


class OfContainer(Gain):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.gains = {"all": [1.0, 2.0]}

    def found_gain(self) -> float:
        return self.gains["all"][0]


class OfProperty(Gain):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.half = 0.5

    @property
    def gain(self) -> float:
        return 2 * self.half

    def found_gain(self) -> float:
        return self.gain


class OfHelpers(Gain):
    factor = 1.0

    @staticmethod
    def doubled(value: float) -> float:
        return 2 * value

    @classmethod
    def halved(cls, value: float) -> float:
        return value / 2

    def found_gain(self) -> float:
        return self.halved(self.doubled(self.factor))


class OfAbsence(Gain):
    def found_gain(self) -> float:
        return getattr(self, "boost", 1.0)


class OfNestedModule(Gain):
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = 1.0
            self.shift = nn.Parameter(torch.tensor(0.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.factor * x + self.shift

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.scales = nn.ModuleList([self.Scale()])

    def neuronal_charge(self, x: Tensor) -> None:
        KLIFNode.neuronal_charge(self, self.scales[0](x))


class OfSurrogate(KLIFNode):
    def neuronal_fire(self) -> Tensor:
        return SURROGATE(self.v - self.v_threshold)


class Slope:
    """A surrogate may be any callable."""

    def __init__(self) -> None:
        self.alpha = 2.0

    def __call__(self, x: Tensor) -> Tensor:
        return surrogate.ATan.spiking_function(x, self.alpha)


def of_slope(**options: Any) -> KLIFNode:
    return KLIFNode(surrogate_function=Slope(), **options)


def of_closure(**options: Any) -> KLIFNode:
    gain = [1.0]

    class Closed(Gain):
        def found_gain(self) -> float:
            return gain[0]

        def halve(self) -> None:
            gain[0] = 0.5

    return Closed(**options)


class OfDefaults(Gain):
    def found_gain(self, gains: list[float] = [1.0], *, factor: float = 1.0) -> float:  # noqa: B006
        return factor * gains[0]


def other_charge(self: KLIFNode, x: Tensor) -> None:
    KLIFNode.neuronal_charge(self, 0.5 * x)


def set_global(name: str, value: Any) -> Callable[[Any], None]:
    return lambda node: globals().__setitem__(name, value)


CHANGES: dict[str, tuple[Callable[..., KLIFNode], Callable[[Any], Any]]] = {
    "an attribute of a class": (OfClass, lambda node: setattr(OfClass, "gain", 0.5)),
    "an attribute of the class asked for": (OfItsClass, lambda node: setattr(OfItsClass, "gain", 0.5)),
    "an attribute that hides the class's": (OfClass, lambda node: setattr(node, "gain", 0.25)),
    "a global": (OfGlobal, set_global("GAIN", 0.5)),
    "a global object": (OfGlobalObject, lambda node: setattr(CONFIG, "gain", 0.5)),
    "a global container": (OfGlobalTable, lambda node: TABLE.__setitem__("gain", [0.5])),
    "a configuration": (OfConfig, lambda node: setattr(node.config.deep, "gain", 0.5)),
    "an array in place": (OfArray, lambda node: node.gain.__setitem__(0, 0.5)),
    "a container in place": (OfContainer, lambda node: node.gains["all"].__setitem__(0, 0.5)),
    "what a property reads": (OfProperty, lambda node: setattr(node, "half", 0.25)),
    "what helper methods read": (OfHelpers, lambda node: setattr(node, "factor", 0.5)),
    "a helper method": (OfHelpers, lambda node: setattr(OfHelpers, "doubled", staticmethod(lambda value: value))),
    "an attribute that was not there": (OfAbsence, lambda node: setattr(node, "boost", 0.5)),
    "a setting of a nested module": (OfNestedModule, lambda node: setattr(node.scales[0], "factor", 0.5)),
    "a parameter of a nested module": (OfNestedModule, lambda node: node.scales[0].shift.data.fill_(0.3)),
    "the slope of a callable": (of_slope, lambda node: setattr(node.surrogate_function, "alpha", 8.0)),
    "the slope of a global surrogate": (OfSurrogate, lambda node: setattr(SURROGATE, "alpha", 8.0)),
    "a closed-over list": (of_closure, lambda node: node.halve()),
    "a method": (OfClass, lambda node: setattr(OfClass, "neuronal_charge", other_charge)),
    "a base's method": (OfGlobal, lambda node: setattr(Gain, "neuronal_charge", other_charge)),
    "a default": (OfDefaults, lambda node: OfDefaults.found_gain.__defaults__[0].__setitem__(0, 0.5)),
    "a default by name": (OfDefaults, lambda node: OfDefaults.found_gain.__kwdefaults__.__setitem__("factor", 0.5)),
    "a function in the place of a method": (OfConfig, lambda node: setattr(node, "found_gain", lambda: 0.5)),
    "a method of its own": (
        OfConfig,
        lambda node: setattr(node, "neuronal_charge", types.MethodType(other_charge, node)),
    ),
    "the type of a number": (OfConfig, lambda node: setattr(node.config.deep, "gain", np.float32(0.5))),
}


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, name in ((OfClass, "gain"), (OfItsClass, "gain"), (Gain, "neuronal_charge"), (CONFIG, "gain")):
        monkeypatch.setattr(owner, name, owner.__dict__[name])
    monkeypatch.setattr(OfHelpers, "doubled", OfHelpers.__dict__["doubled"])
    monkeypatch.setattr(SURROGATE, "alpha", SURROGATE.alpha)
    monkeypatch.setitem(TABLE, "gain", [1.0])
    monkeypatch.setitem(globals(), "GAIN", 1.0)
    monkeypatch.setattr(OfClass, "neuronal_charge", Gain.neuronal_charge)
    monkeypatch.delattr(OfClass, "neuronal_charge")
    monkeypatch.setattr(OfDefaults.found_gain, "__defaults__", ([1.0],))
    monkeypatch.setattr(OfDefaults.found_gain, "__kwdefaults__", {"factor": 1.0})


def ran(node: KLIFNode, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    spikes = node(x)
    (spikes * torch.arange(CHANNELS)).sum().backward()
    node.reset()
    return spikes.detach(), x.grad


@pytest.mark.parametrize(("make", "change"), CHANGES.values(), ids=CHANGES.keys())
def test_a_change_of_what_the_step_reads_counts(make: Callable[..., KLIFNode], change: Callable[[Any], Any]) -> None:
    x, before, after = current(), [], []
    nodes = [make(step_mode="m", backend=backend) for backend in ("torch", "cpp")]
    for node in nodes:
        before.append(ran(node, x))
    for node in nodes:
        change(node)
    for node in nodes:
        after.append(ran(node, x))
    for (spikes, gradient), (expected, expected_gradient) in ((before[1], before[0]), (after[1], after[0])):
        assert_equal(spikes, expected)
        assert_close(gradient, expected_gradient)
    assert not torch.equal(before[0][1], after[0][1]), "the change makes no difference"


def test_what_is_unchanged_is_not_traced_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from klif_sj.codegen import step

    traced: list[str] = []
    trace = step._trace
    monkeypatch.setattr(step, "_trace", lambda node, *rest: (traced.append(type(node).__name__), trace(node, *rest))[1])
    x = current()
    for make in (OfConfig, OfNestedModule, of_slope):
        nodes = [make(step_mode="m", backend="cpp", tau=3.1) for _ in range(2)]
        for _ in range(3):
            for node in nodes:
                ran(node, x)
    assert traced == ["OfConfig", "OfNestedModule", "KLIFNode"]


# Side effects


class Counts(KLIFNode):
    count = 0

    def neuronal_charge(self, x: Tensor) -> None:
        self.count = self.count + 1
        super().neuronal_charge(x)


class Keeps(KLIFNode):
    def neuronal_charge(self, x: Tensor) -> None:
        self.last = x
        super().neuronal_charge(x)


class Logs(KLIFNode):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.log: list[int] = []

    def neuronal_charge(self, x: Tensor) -> None:
        self.log.append(1)
        super().neuronal_charge(x)


class CountsGlobally(KLIFNode):
    def neuronal_charge(self, x: Tensor) -> None:
        global COUNTER
        COUNTER += 1
        super().neuronal_charge(x)


class CountsElsewhere(KLIFNode):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.clock = types.SimpleNamespace(time=0)

    def neuronal_charge(self, x: Tensor) -> None:
        self.clock.time += 1
        super().neuronal_charge(x)


class Deletes(KLIFNode):
    def neuronal_charge(self, x: Tensor) -> None:
        del self.tau
        self.v = x


CLOCK, LOG = types.SimpleNamespace(time=0), list[int]()
NUMBERS, RANDOM = iter(range(10**6)), np.random.default_rng(0)


def of_charge(found_gain: Callable[[Any], float]) -> Callable[..., KLIFNode]:
    return type("OfCharge", (Gain,), {"found_gain": found_gain})


def counts_on_an_object(node: Any) -> float:
    CLOCK.time += 1
    return 1.0


def counts_in_a_container(node: Any) -> float:
    TABLE["gain"][0] += 1.0
    return 1.0


def logs(node: Any) -> float:
    LOG.append(1)
    return 1.0


class CountsOnItsClass(Gain):
    gain = 1.0

    def found_gain(self) -> float:
        self.__class__.gain += 1.0
        return 1.0


def imports_random(node: Any) -> float:
    import random

    return random.random()


CHANGED_OR_CHANGING: dict[Callable[[Any], float], str] = {
    counts_on_an_object: "CLOCK",
    counts_in_a_container: "TABLE",
    logs: "LOG",
    lambda node: float(next(NUMBERS)): "NUMBERS",
    lambda node: random.random(): "random",
    lambda node: shuffled(): "shuffled",
    lambda node: float(np.random.rand()): "np.random",
    lambda node: float(RANDOM.random()): "RANDOM",
    imports_random: "random",
    lambda node: time.time(): "time",
    lambda node: float(os.environ.get("GAIN", "1")): "os",
}
"""Steps that change what is not the neuron's, or that compute with other values in every call."""


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (
            Counts,
            r"sets .count., which is no state; .*at test_scope.py:\d+ in neuronal_charge: self.count = self.count",
        ),
        (Keeps, r"sets 'last', which is no state; .* `states`\) if the next step reads it"),
        (Logs, r"changes 'log', which a kernel would do once"),
        (CountsGlobally, r"neuronal_charge sets the global 'COUNTER'"),
        (CountsElsewhere, r"sets 'clock.time', which is no state"),
        (Deletes, r"deletes 'tau'"),
        (CountsOnItsClass, r"changes 'CountsOnItsClass.gain', which"),
        *((of_charge(charge), f"it (changes|uses) '{name}', which") for charge, name in CHANGED_OR_CHANGING.items()),
    ],
)
def test_a_step_that_changes_something_else_is_refused(make: Callable[..., KLIFNode], match: str) -> None:
    node = make(step_mode="m", backend="cpp")
    before = {name: value for name, value in vars(node).items() if name != "_sequence"}
    with pytest.raises(StepTraceError, match=match):
        node(current())
    assert {name: value for name, value in vars(node).items() if name != "_sequence"} == before
    assert node.v == 0.0
    assert not getattr(node, "log", [])


class ReadsOpaque(KLIFNode):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.lock = threading.Lock()

    def neuronal_charge(self, x: Tensor) -> None:
        with self.lock:
            super().neuronal_charge(x)


class ReadsModulesInAList(KLIFNode):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.functions = [surrogate.ATan()]

    def neuronal_fire(self) -> Tensor:
        return self.functions[0](self.v - self.v_threshold)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (ReadsOpaque, "reads 'lock', of type lock, whose changes cannot be seen"),
        (ReadsModulesInAList, r"reads functions\[0\], a ATan in a container.*register modules in an nn.ModuleList"),
    ],
)
def test_what_cannot_be_seen_is_refused(make: Callable[..., KLIFNode], match: str) -> None:
    with pytest.raises(StepTraceError, match=match):
        make(step_mode="m", backend="cpp")(current())


# What may be used in a step


@torch.jit.script
def scripted(v: Tensor, x: Tensor, tau: float) -> Tensor:
    return v + (x - v) / tau


class Scripted(KLIFNode):
    def neuronal_charge(self, x: Tensor) -> None:
        self.v = scripted(self.v, x, self.tau)


class Partial(KLIFNode):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.squash = functools.partial(torch.clamp, min=-0.5, max=2.0)

    def neuronal_charge(self, x: Tensor) -> None:
        super().neuronal_charge(self.squash(x))


class Callables(KLIFNode):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.order = ("relu", "tanh")
        self.functions = {"relu": torch.relu, "tanh": torch.tanh}

    def neuronal_charge(self, x: Tensor) -> None:
        for name in self.order:
            x = self.functions[name](x)
        super().neuronal_charge(2 * x)


@pytest.mark.parametrize("make", [Scripted, Partial, Callables])
def test_what_steps_are_written_with(make: Callable[..., KLIFNode]) -> None:
    x = current()
    (spikes, gradient), (expected, expected_gradient) = (
        ran(make(step_mode="m", backend=backend), x) for backend in ("cpp", "torch")
    )
    assert_equal(spikes, expected)
    assert_close(gradient, expected_gradient)


# Threads


def together(jobs: list[Callable[[], None]]) -> None:
    """Run them in threads that start at once; the first error of any is raised."""
    gate, errors = threading.Barrier(len(jobs)), []

    def run(job: Callable[[], None]) -> None:
        gate.wait()
        try:
            job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("share", ["node", "surrogate"])
def test_first_calls_in_eight_threads(share: str) -> None:
    x = current()
    for trial in range(20):
        function = LearnableATan(alpha=2.0 + trial / 64)
        nodes = [KLIFNode(step_mode="m", backend="torch", surrogate_function=function) for _ in range(8)]
        if share == "node":
            nodes = nodes[:1] * 8
        raw = [(node.k, node.surrogate_function.k) for node in nodes]
        together([lambda node=node: node.program() for node in nodes])
        for node, (k, slope) in zip(nodes, raw, strict=True):
            assert node.k is k
            assert node.surrogate_function.k is slope
            assert (k.item(), slope.item()) == (1.0, 1.0)
    nodes[0].backend = "cpp"
    nodes[0](x)


def test_no_reader_ever_sees_a_stand_in() -> None:
    """One thread traces, again and again, while eight others read and run the same node."""
    node, x = GLIFNode(T=STEPS, inplane=None, backend="torch"), current()
    k_node = KLIFNode(step_mode="m", backend="torch", surrogate_function=LearnableATan())
    done = threading.Event()

    def trace() -> None:
        try:
            for trial in range(60):
                k_node.tau = 2.0 + trial / 16
                k_node.program()
                node.program()
        finally:
            done.set()

    def read() -> None:
        while not done.is_set():
            for each in (node, k_node, k_node.surrogate_function):
                for name, value in each.named_parameters(recurse=False):
                    assert type(getattr(each, name)) is type(value) is nn.Parameter
            assert type(k_node.v) in (float, Tensor)
            assert "effective" not in vars(k_node)
            with torch.no_grad():
                assert torch.sigmoid(node.tau).item() == pytest.approx(0.25)
                assert x.shape == (STEPS, BATCH, CHANNELS)

    together([trace, *[read] * 8])


# Nothing is kept


def wrapped() -> tuple[nn.Module, KLIFNode]:
    node = KLIFNode(step_mode="m")
    forward = node.forward
    node.forward = functools.partial(lambda module, *inputs: forward(*inputs), node)
    return node, node


def owned() -> tuple[nn.Module, KLIFNode]:
    node = KLIFNode(step_mode="m")
    node.owner = [nn.Sequential(node, nn.Linear(CHANNELS, CHANNELS))]
    return node.owner[0], node


def of_itself() -> tuple[nn.Module, KLIFNode]:
    node = OfClass(step_mode="m")
    node.found_gain = lambda: node.gain
    return node, node


@pytest.mark.parametrize("make", [wrapped, owned, of_itself])
def test_a_node_is_freed_with_whatever_leads_back_to_it(make: Callable[[], tuple[nn.Module, KLIFNode]]) -> None:
    references = []
    for _ in range(5):
        net, node = make()
        net(current())
        references.append(weakref.ref(node))
        del net, node
    gc.collect()
    assert [reference() for reference in references] == [None] * 5


def test_steps_of_settings_that_are_past_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    from klif_sj.codegen import step

    monkeypatch.setattr(step, "REMEMBERED", 3)
    node, traced = KLIFNode(), []
    for trial in range(6):
        node.surrogate_function.alpha = 3.0 + trial / 64
        node.program()
        traced.append(weakref.ref(step._of_class[KLIFNode][-1]))
    gc.collect()
    assert len(step._of_class[KLIFNode]) == 3
    assert [reference() is None for reference in traced] == [True] * 3 + [False] * 3


def test_an_output_that_a_hook_stores_is_freed() -> None:
    body, node, references = nn.Linear(CHANNELS, CHANNELS), KLIFNode(step_mode="m"), []
    node.register_forward_hook(lambda module, inputs, output: setattr(module, "spikes", output))
    for _ in range(20):
        (node(body(current())).mean() + node.spikes.mean()).backward()
        references.append(weakref.ref(node.spikes))
        functional.reset_net(node)
    gc.collect()
    assert sum(reference() is not None for reference in references) == 1


def test_the_number_of_objects_does_not_grow() -> None:
    node, x = KLIFNode(step_mode="m", surrogate_function=LearnableATan()), current()
    counts = []
    for step in range(60):
        ran(node, x)
        if step in (19, 59):
            gc.collect()
            counts.append(len(gc.get_objects()))
    assert counts[1] - counts[0] < 40
