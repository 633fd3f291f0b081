"""What generated kernels refuse, and what they say: the operation, the line, the cause, and what to do about it."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from neurons import assert_memories, current, snapshot
from torch import Tensor, nn

from klif_sj import CLIFNode, FusedNode, KLIFNode, runtime
from klif_sj.codegen import kernel
from klif_sj.codegen.trace import StepTraceError
from klif_sj.runtime import backend as backends
from klif_sj.runtime import cpu
from klif_sj.runtime.cpu import CompilerError

pytestmark = pytest.mark.skipif("cpp" not in runtime.supported_backends(), reason="no C++ compiler")


@pytest.fixture
def refused() -> Iterator[Callable[..., pytest.ExceptionInfo]]:
    """Call a node that refuses the call, and check that its states are as they were."""

    def call(node: FusedNode, x: Tensor, error: type[Exception], match: str) -> pytest.ExceptionInfo:
        node.v = torch.full(x.shape[1:], 0.25)
        before = snapshot(node)
        with pytest.raises(error, match=match) as caught:
            node(x)
        assert_memories(node, before)
        return caught

    return call


@pytest.fixture
def _forget_which_backends_serve() -> Iterator[None]:
    backends.unavailable.cache_clear()
    yield
    backends.unavailable.cache_clear()


# Steps that no kernel can be generated for. The offending line is the one after the signature.


class Charge(FusedNode):
    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        self.mix = nn.Linear(5, 5)
        self.table = torch.tensor([0.5, 0.25])
        self.scalar = torch.tensor(0.5)


class MatrixProduct(Charge):
    def neuronal_charge(self, x: Tensor) -> None:
        self.v = self.v + x @ x


class Layer(Charge):
    def neuronal_charge(self, x: Tensor) -> None:
        self.v = self.v + self.mix(x)


class Bernoulli(Charge):
    def neuronal_charge(self, x: Tensor) -> None:
        self.v = self.v + torch.bernoulli(x.sigmoid())


class Noise(Charge):
    def neuronal_charge(self, x: Tensor) -> None:
        self.v = self.v + x + torch.rand_like(x)


class Dropout(Charge):
    def neuronal_charge(self, x: Tensor) -> None:
        self.v = self.v + F.dropout(x)


class Branch(Charge):
    def neuronal_charge(self, x: Tensor) -> None:
        if self.v > 0:
            self.v = self.v + x


class Item(Charge):
    def neuronal_charge(self, x: Tensor) -> None:
        self.v = self.v + x * x.item()


class PlainTensor(Charge):
    def neuronal_charge(self, x: Tensor) -> None:
        self.v = self.v + x * self.table[0]


class PlainScalar(Charge):
    def neuronal_charge(self, x: Tensor) -> None:
        self.v = self.v + x * self.scalar


class Half(Charge):
    def neuronal_charge(self, x: Tensor) -> None:
        self.v = self.v + x.half()


class Mean(Charge):
    def neuronal_charge(self, x: Tensor) -> None:
        self.v = self.v + x - x.mean()


class Sum(Charge):
    def neuronal_charge(self, x: Tensor) -> None:
        self.v = self.v + x / x.sum()


class Softmax(Charge):
    def neuronal_charge(self, x: Tensor) -> None:
        self.v = self.v + x.softmax(-1)


class Indexed(Charge):
    def neuronal_charge(self, x: Tensor) -> None:
        self.v = self.v + x[0]


class Stacked(Charge):
    def neuronal_charge(self, x: Tensor) -> None:
        self.v = torch.stack([self.v, x]).amax(0)


class Transposed(Charge):
    def neuronal_charge(self, x: Tensor) -> None:
        self.v = self.v + x.T


class MatrixTransposed(Charge):
    def neuronal_charge(self, x: Tensor) -> None:
        self.v = self.v + x.mT


class Squeezed(Charge):
    def neuronal_charge(self, x: Tensor) -> None:
        self.v = self.v.squeeze() + x


class Strided(Charge):
    def neuronal_charge(self, x: Tensor) -> None:
        self.v = self.v + x * len(x.stride())


class Own(Charge):
    def neuronal_charge(self, x: Tensor) -> None:
        raise KeyError("no such table")


REFUSED: dict[type[FusedNode], str] = {
    MatrixProduct: "matmul",
    Layer: "linear|matmul|mat1|tensor that is neither",
    Bernoulli: "aten::bernoulli draws random numbers",
    Noise: "aten::rand_like draws random numbers",
    Dropout: r"aten::(native_dropout|bernoulli_) draws random numbers",
    Branch: r"reads a tensor's value in Python .* torch\.where",
    Item: r"reads a tensor's value in Python .* torch\.where",
    PlainTensor: "neither input, state nor parameter .* Register it on the neuron",
    PlainScalar: "neither input, state nor parameter .* Register it on the neuron",
    Half: r"torch\.float16, which kernels do not compute in",
    Mean: "aten::mean",
    Sum: "aten::sum",
    Softmax: "aten::_?softmax",
    Indexed: "IndexError",
    Stacked: r"shape \(1,\)|aten::(unsqueeze|stack)",
    Transposed: "aten::permute moves elements",
    MatrixTransposed: "reads the shape of its input",
    Squeezed: "aten::squeeze moves elements",
    Strided: "reads the shape of its input",
    Own: "KeyError: 'no such table'",
}


@pytest.mark.parametrize("backend", ["cpp", "auto"])
@pytest.mark.parametrize("cls", REFUSED, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("gradients", [True, False], ids=["training", "inference"])
def test_a_step_that_cannot_be_traced(
    cls: type[FusedNode], backend: str, gradients: bool, refused: Callable[..., pytest.ExceptionInfo]
) -> None:
    """The operation, the place, and the way out are named; 'auto' does not hide it."""
    with torch.set_grad_enabled(gradients):
        caught = refused(cls(step_mode="m", backend=backend), current(requires_grad=True), StepTraceError, REFUSED[cls])
    lines, first = inspect.getsourcelines(cls.neuronal_charge)
    message = str(caught.value)
    assert f"{cls.__name__}(" in message
    assert f"at {Path(__file__).name}:{first + 1} in neuronal_charge: {lines[1].strip()}" in message
    assert "use backend='torch'" in message


@pytest.mark.parametrize("name", ["x", "output", "grad_v", "v"])
def test_a_name_that_is_taken(name: str, refused: Callable[..., pytest.ExceptionInfo]) -> None:
    class Named(FusedNode):
        def effective_parameters(self) -> dict[str, Tensor]:
            return {name: torch.tensor(0.5)}

        def neuronal_charge(self, x: Tensor) -> None:
            self.v = self.v + x * getattr(self.effective, name)

    refused(Named(step_mode="m", backend="cpp"), current(), StepTraceError, f"{name!r} is the name of more than one")


# Backends that cannot serve


@pytest.mark.usefixtures("_forget_which_backends_serve")
def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cupy")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="'cupy' cannot serve here: CuPy .* no CUDA GPU") as caught:
        KLIFNode(backend="cupy")
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.usefixtures("_forget_which_backends_serve")
def test_no_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    node = KLIFNode(backend="auto")
    assert "cupy" not in node.supported_backends
    with pytest.raises(RuntimeError, match=r"pip install cupy-cuda1\dx") as caught:
        node.backend = "cupy"
    assert node.backend == "auto"
    assert isinstance(caught.value.__cause__, ImportError)
    assert isinstance(caught.value.__cause__.__cause__, ImportError)


@pytest.mark.usefixtures("_forget_which_backends_serve")
@pytest.mark.parametrize("named", ["no-such-compiler", None])
def test_no_compiler(named: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A named backend is refused, and says what to install; 'auto' then runs in plain torch, as documented."""
    if named:
        monkeypatch.setenv("CXX", named)
    else:
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setenv("PATH", str(tmp_path))
    expected = "CXX names 'no-such-compiler'" if named else r"none of g\+\+, clang\+\+, c\+\+ .*apt install g\+\+"
    with pytest.raises(RuntimeError, match=f"'cpp' cannot serve here: .*{expected}") as caught:
        CLIFNode(backend="cpp")
    assert isinstance(caught.value.__cause__, CompilerError)
    assert "cpp" not in runtime.supported_backends()
    x = current()
    assert torch.equal(KLIFNode(step_mode="m")(x), KLIFNode(step_mode="m", backend="torch")(x))


@pytest.mark.usefixtures("_forget_which_backends_serve")
def test_a_compiler_that_is_no_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "g++ 'half quoted")
    with pytest.raises(RuntimeError, match=r"'cpp' cannot serve here: \$CXX is no command \(No closing quotation\)"):
        KLIFNode(backend="cpp")
    monkeypatch.setenv("CXX", "  ")
    assert cpu.compiler()


def test_the_compiler_went_away(monkeypatch: pytest.MonkeyPatch, refused: Callable[..., pytest.ExceptionInfo]) -> None:
    """What serves is decided once in a process: from then on 'auto' does not change what it runs."""
    node = KLIFNode(tau=2.0123, step_mode="m", backend="auto")
    assert "cpp" in node.supported_backends
    monkeypatch.setenv("CXX", "no-such-compiler")
    refused(node, current(), CompilerError, "CXX names 'no-such-compiler'")


def test_a_compile_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, refused: Callable[..., pytest.ExceptionInfo]
) -> None:
    """The compiler's log is shown and the source is kept. Nothing is left that a later call would take for a kernel."""
    monkeypatch.setenv("KLIF_SJ_CACHE", str(tmp_path))
    node, x, template = KLIFNode(tau=2.0321, step_mode="m", backend="cpp"), current(), kernel.template
    with monkeypatch.context() as broken:
        broken.setattr(kernel, "template", lambda name: template(name) + "\nthis is no C++;\n")
        caught = refused(node, x, CompilerError, "refused a generated kernel")
    message = str(caught.value)
    assert re.search(r"error: .*\n.*this is no C\+\+", message)
    kept = Path(re.search(r"source: (.*)", message)[1])
    assert kept.parent == tmp_path
    assert "this is no C++" in kept.read_text()
    assert "INLINE void step(" in kept.read_text()
    assert list(tmp_path.glob("*.so")) == []
    node.reset()
    assert torch.equal(node(x), KLIFNode(tau=2.0321, step_mode="m", backend="torch")(x))
    assert len(list(tmp_path.glob("*.so"))) == 1


# Inputs


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("backend", ["cpp", "auto"])
def test_an_unsupported_dtype(dtype: torch.dtype, backend: str, refused: Callable[..., pytest.ExceptionInfo]) -> None:
    x = torch.ones(4, 3, 5).to(dtype)
    refused(KLIFNode(step_mode="m", backend=backend), x, TypeError, f"expected a floating-point input .*, got {dtype}")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_an_input_that_is_not_dense(backend: str) -> None:
    node, x = KLIFNode(step_mode="m", backend=backend), torch.ones(4, 3, 5)
    expected = node(x)
    left = node.v
    nested = [torch.nested.nested_tensor(list(x), layout=layout) for layout in (torch.strided, torch.jagged)]
    for other in (x.to_sparse(), x[0].to_sparse_csr(), x.to_mkldnn(), *nested):
        with pytest.raises(TypeError, match=r"KLIFNode: expected a dense tensor, got one of layout .*to_dense"):
            node(other)
    assert node.v is left
    node.reset()
    assert torch.equal(node(x), expected)


def test_another_device_than_the_backends(refused: Callable[..., pytest.ExceptionInfo]) -> None:
    x = torch.ones(4, 3, 5, device="meta")
    refused(KLIFNode(step_mode="m", backend="cpp"), x, ValueError, "'cpp': expected a tensor on 'cpu', got .* 'meta'")


@pytest.mark.parametrize("backend", ["cpp", "auto"])
def test_a_parameter_on_another_device(backend: str, refused: Callable[..., pytest.ExceptionInfo]) -> None:
    node = KLIFNode(step_mode="m", backend=backend).to("meta")
    refused(node, current(), ValueError, r"'k': expected it on the input's device cpu, got meta; .*\.to\('cpu'\)")


def test_a_float64_step_forced_to_half(refused: Callable[..., pytest.ExceptionInfo]) -> None:
    node = Half(step_mode="m", backend="cpp")
    refused(node, current(dtype=torch.float64), StepTraceError, r"torch\.float16, which kernels do not compute in")


def test_unknown_backend() -> None:
    node = KLIFNode()
    with pytest.raises(ValueError, match="expected one of 'auto', 'torch', 'cpp', 'cupy', got 'triton'"):
        node.backend = "triton"
    assert node.backend == "auto"


def test_transforms_of_torch_func_are_refused() -> None:
    """Also by a neuron whose program is known: its gradient would be lost."""
    node, x = KLIFNode(step_mode="m", backend="cpp"), torch.randn(3, 2, 4)
    node(x)

    def loss(x: Tensor) -> Tensor:
        node.reset()
        return node(x).sum()

    with pytest.raises(
        RuntimeError,
        match=r"no rules for torch\.func's transforms .*, or backend='torch'",
    ):
        torch.func.grad(loss)(x)
    with pytest.raises(RuntimeError, match="no rules for"), torch.no_grad():
        torch.func.vmap(loss)(torch.randn(2, 3, 2, 4))


@pytest.mark.parametrize("learn_k", [True, False])
def test_forward_mode_derivatives_are_refused(learn_k: bool) -> None:
    node, x = KLIFNode(step_mode="m", backend="cpp", learn_k=learn_k), torch.randn(3, 2, 4)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward mode AD"):
        node(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
