"""Runs a program from eager code: by one autograd function, which bypasses torch's dispatcher where it can."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..codegen.program import Program
from .form import form_of
from .launch import PLAIN
from .op import unlisted
from .scan import TARGETS, Gradients, Outputs, Scan, scan_of

NO_TRANSFORMS = (
    "fused kernels have no rules for torch.func's transforms (grad, vmap, ...) and for batched gradients; use "
    "torch.autograd one gradient at a time, or backend='torch', whose rules are those of the surrogate"
)


Results = tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]
"""Spikes, final states where they are wanted, and recorded states."""


def run(
    program: Program | str, x_seq: Tensor, initial: Sequence[Tensor], initial_value: Sequence[float],
    parameters: Sequence[Tensor], channel_dim: int | None, learns: bool, record: bool, final: bool,
) -> Results:  # fmt: skip
    """Run a program over a sequence.

    :param program: the program, or its text while torch.compile traces
    :param x_seq: the input current ``[T, N, *]``, in any dense layout
    :param initial: states ``[N, *]`` to start from, in the dtype of states; or empty
    :param initial_value: the number that each state starts from, if ``initial`` is empty
    :param parameters: the program's parameters, in its order: scalars, ``[C]``, ``[T]`` or ``[T, C]``
    :param channel_dim: the dimension of a step along which channels lie
    :param learns: whether a gradient is needed
    :param record: whether the states at every step are wanted
    :param final: whether the final states are wanted
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        text = program if isinstance(program, str) else program.text
        checkpoints = (x_seq.shape[0] - 1) // _segment(x_seq.device.type, text) if learns else 0
        outputs = torch.ops.klif_sj.forward(
            text, x_seq, initial, initial_value, parameters, channel_dim, checkpoints, record, final
        )
        spikes, ends, _, sequences = unlisted(outputs, (len(initial) + len(initial_value)) * final)
        return spikes, ends, sequences
    if isinstance(program, str):
        program = Program.decode(program)
    call = Call(program, initial_value, channel_dim, learns, record, final)
    return call.run(x_seq, *initial, *parameters)


def _segment(device: str, text: str) -> int:
    return TARGETS.get(device, TARGETS["cpu"]).segment(Program.decode(text))


_segment._dynamo_marked_constant = True  # type: ignore[attr-defined]


class Call:
    """What a call runs, without its tensors. It can run again for tensors of the same form.

    If nothing watches operators, it bypasses torch's dispatcher and launches kernels by a :class:`Scan`, as the
    operators' implementations do. That saves about 130 us in a layer's forward and backward pass on a CPU.

    :param initial_value: the numbers that states start from; empty if they start from tensors
    """

    def __init__(
        self, program: Program, initial_value: Sequence[float], channel_dim: int | None, learns: bool, record: bool,
        final: bool,
    ) -> None:  # fmt: skip
        self.program, self.initial_value, self.channel_dim = program, initial_value, channel_dim
        self.learns, self.record, self.final = learns, record, final
        states = len(program.states)
        self._first_parameter = 1 + (0 if initial_value else states)  # x and initial states come before
        self._first_sequence = 1 + (states if final else 0)  # among outputs: spikes and final states come before
        self._scan: Scan | None = None  # None if something watches the dispatcher
        self._fits: Callable[..., bool] | None = None
        self._fits_backward: dict[int, Callable[..., bool]] = {}  # by how many tensors there are

    def run(self, *tensors: Tensor) -> Results:
        """Check x, initial states and parameters, and run the program over them."""
        if _unwatched(*tensors):
            self._scan = self._scan_of(tensors)
        return self._run(_Scan.apply, tensors)

    def may_run_again(self, *tensors: Tensor) -> bool:
        """Remember the form of a call's tensors for :meth:`run_again`; False if something watched that call."""
        self._fits = form_of(*tensors) if self._scan is not None else None
        return self._fits is not None

    def run_again(self, *tensors: Tensor) -> Results | None:
        """Run the program over tensors of the same form; None if these are of another form."""
        if self._fits is None or not self._fits(*tensors) or torch.autograd._profiler_enabled():
            return None
        return self._run(_apply, tensors)

    def _run(self, apply: Callable[..., Any], tensors: Sequence[Tensor]) -> Results:
        if not self.learns and forward_ad._current_level < 0:
            spikes, ends, _, sequences = self.forward(tensors)
            return spikes, ends, sequences
        outputs = apply(self, *tensors)
        return outputs[0], outputs[1 : self._first_sequence], outputs[self._first_sequence :]

    def _scan_of(self, tensors: Sequence[Tensor]) -> Scan:
        first = self._first_parameter
        return scan_of(self.program, tensors[0], tensors[1:first], tensors[first:], self.channel_dim)

    def forward(self, tensors: Sequence[Tensor]) -> Outputs:
        """Run the forward operator below autograd."""
        x_seq, first = tensors[0], self._first_parameter
        given = tensors[1:first], self.initial_value, tensors[first:]
        if self._scan is not None:
            checkpoints = self._scan.checkpoints if self.learns else 0
            return self._scan.forward(x_seq, *given, checkpoints, self.record, self.final)
        checkpoints = (x_seq.shape[0] - 1) // TARGETS[x_seq.device.type].segment(self.program) if self.learns else 0
        with torch._C._AutoDispatchBelowAutograd():
            outputs = torch.ops.klif_sj.forward(
                self.program.text, x_seq, *given, self.channel_dim, checkpoints, self.record, self.final
            )
        spikes, ends, saved, sequences = unlisted(outputs, self._first_sequence - 1)
        # The same is saved as without a watcher: activation checkpointing counts it, and may watch one of two passes.
        return spikes, ends, saved if checkpoints else None, sequences

    def backward(
        self, tensors: Sequence[Tensor], checkpoints: Tensor | None, grads: Sequence[Tensor | None], need_x: bool
    ) -> Gradients:
        """Run the backward operator: below autograd, or, with ``create_graph``, above it, to refuse a derivative.

        :param grads: the gradients of spikes, final states and recorded states
        """
        x_seq, first = tensors[0], self._first_parameter
        given = tensors[1:first], self.initial_value, tensors[first:]
        of_outputs = grads[0], grads[1 : self._first_sequence], grads[self._first_sequence :]
        watched = torch.is_grad_enabled()
        scan = None if watched else self._scan_backward(tensors, checkpoints, grads)
        if scan is not None:
            try:
                return scan.backward(x_seq, *given, checkpoints, *of_outputs, need_x)
            except NotImplementedError as error:  # a batch of gradients has no memory
                raise RuntimeError(NO_TRANSFORMS) from error
        saved = x_seq.new_empty(0) if checkpoints is None else checkpoints
        with nullcontext() if watched else torch._C._AutoDispatchBelowAutograd():
            results = iter(
                torch.ops.klif_sj.backward(
                    self.program.text, x_seq, *given, saved, *of_outputs, self.channel_dim, need_x
                )
            )
        return next(results) if need_x else None, [next(results) for _ in given[0]], list(results)

    def _scan_backward(
        self, tensors: Sequence[Tensor], checkpoints: Tensor | None, grads: Sequence[Tensor | None]
    ) -> Scan | None:
        """The scan for a backward pass; None if something watches the dispatcher.

        A hook on saved tensors may return tensors of another form than those of the forward pass.
        """
        given = [*tensors, *[tensor for tensor in (checkpoints, *grads) if tensor is not None]]
        fits = self._fits_backward.get(len(given))
        if fits is not None and fits(*given) and not torch.autograd._profiler_enabled():
            return self._scan
        if not _unwatched(*given):
            return None
        scan = self._scan_of(tensors)
        if self._fits is not None and scan is self._scan and (fits := form_of(*given)) is not None:
            self._fits_backward[len(given)] = fits
        return scan


class _Scan(torch.autograd.Function):
    """Does what ``register_autograd`` does for the forward operator, at a fraction of its cost in every call."""

    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        spikes, ends, saved, sequences = call.forward(tensors)
        ctx.set_materialize_grads(False)
        ctx.call = call
        # The tensors are saved as torch passed them, because it recognises the graph's inputs by them.
        ctx.save_for_backward(as_it_is_now(tensors[0]), *tensors[1:], saved)
        return spikes, *ends, *sequences

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        call = ctx.call
        try:
            *tensors, checkpoints = ctx.saved_tensors  # read once: activation checkpointing recomputes them
        except RuntimeError as error:
            if "inplace" in str(error):
                raise RuntimeError(
                    f"{call.program.neuron}: its input, a state or a parameter was changed in place afterwards. {error}"
                ) from error
            raise
        grad_x, grad_initial, grad_parameters = call.backward(tensors, checkpoints, grads, ctx.needs_input_grad[1])
        unlearned = len(call.program.parameters) - len(grad_parameters)  # they come after the learned ones
        return None, grad_x, *grad_initial, *grad_parameters, *(None,) * unlearned


_apply = super(torch.autograd.Function, _Scan).apply
"""``_Scan.apply``, but it does not look for a transform on each tensor: tensors of a known form have none."""


def as_it_is_now(x_seq: Tensor) -> Tensor:
    """x as the neuron reads it now, to be saved for backward. A later change in place makes a copy first.

    Until then the memory is shared, by torch's copy-on-write storages. Where torch cannot share it, a later change in
    place is an error in the backward pass.
    """
    if torch.compiler.is_compiling() or type(x_seq) is not Tensor:
        return x_seq
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return x_seq  # a mode that watches every operation, such as a counter, does not know this one
    if x_seq.is_cuda and torch.cuda.is_current_stream_capturing():
        return x_seq
    try:
        return torch._lazy_clone(x_seq)
    except (AttributeError, RuntimeError):
        return x_seq


def _unwatched(x_seq: Tensor, *tensors: Tensor | None) -> bool:
    """Whether an operator's implementation may be called without the dispatcher.

    A mode, a profiler or a trace may watch the dispatcher. A subclass of Tensor may define operators itself, and may
    have no memory. Only the dispatcher gives memory to a tensor that stands for zeros, and negates a negative view.
    """
    if torch._C._len_torch_dispatch_stack() or torch.autograd._profiler_enabled() or torch._C._get_tracing_state():
        return False
    for tensor in (x_seq, *tensors):
        if tensor is not None and (type(tensor) not in PLAIN or tensor.is_neg() or tensor._is_zerotensor()):
            return False
    return x_seq.device.type in TARGETS
