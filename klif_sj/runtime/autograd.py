"""Runs a program from eager code: by one autograd function, which bypasses torch's dispatcher where it can."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..codegen.program import Program
from .op import unlisted
from .scan import TARGETS, Gradients, Outputs, scan_of

NO_TRANSFORMS = (
    "fused kernels have no rules for torch.func's transforms (grad, vmap, ...) and for batched gradients; use "
    "torch.autograd one gradient at a time, or backend='torch', whose rules are those of the surrogate"
)


def run(
    program: Program | str, x_seq: Tensor, initial: Sequence[Tensor], initial_value: Sequence[float],
    parameters: Sequence[Tensor], channel_dim: int | None, learns: bool, record: bool, final: bool,
) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]:  # fmt: skip
    """Run a program over a sequence: spikes, final states where they are wanted, and recorded states.

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
    # All that is no tensor is one argument, because torch looks at each argument.
    settings = program, len(initial), initial_value, channel_dim, learns, record, final
    if not learns and forward_ad._current_level < 0:
        spikes, ends, _, sequences = _forward(settings, x_seq, initial, parameters)
        return spikes, ends, sequences
    spikes, *states = _Scan.apply(settings, x_seq, *initial, *parameters)
    split = len(program.states) if final else 0
    return spikes, states[:split], states[split:]


def _segment(device: str, text: str) -> int:
    return TARGETS.get(device, TARGETS["cpu"]).segment(Program.decode(text))


_segment._dynamo_marked_constant = True  # type: ignore[attr-defined]


class _Scan(torch.autograd.Function):
    """Does what ``register_autograd`` does for the forward operator, at a fraction of its cost in every call."""

    @staticmethod
    def forward(ctx: Any, settings: tuple[Any, ...], x_seq: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        n_initial = settings[1]
        spikes, ends, saved, sequences = _forward(settings, x_seq, tensors[:n_initial], tensors[n_initial:])
        ctx.set_materialize_grads(False)
        ctx.settings, ctx.ends = settings, 1 + len(ends)
        # The tensors are saved as torch passed them, because it recognises the graph's inputs by them.
        ctx.save_for_backward(as_it_is_now(x_seq.detach()), saved, *tensors)
        return spikes, *ends, *sequences

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        program, n_initial, *_ = ctx.settings
        try:
            x_seq, checkpoints, *tensors = ctx.saved_tensors  # read once: activation checkpointing recomputes them
        except RuntimeError as error:
            if "inplace" in str(error):
                raise RuntimeError(f"{program.neuron}: its input was changed in place afterwards. {error}") from error
            raise
        grad_x, grad_initial, grad_parameters = _backward(
            ctx.settings, x_seq, tensors[:n_initial], tensors[n_initial:], checkpoints, grads[0], grads[1 : ctx.ends],
            grads[ctx.ends :], ctx.needs_input_grad[1],
        )  # fmt: skip
        unlearned = len(program.parameters) - len(grad_parameters)  # they come after the learned ones
        return None, grad_x, *grad_initial, *grad_parameters, *(None,) * unlearned


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


# The functions below bypass the dispatcher where nothing watches operators: they call the operators' implementations,
# which saves about 130 us in a layer's forward and backward pass on a CPU.

_PLAIN = {Tensor, torch.nn.Parameter}


def _unwatched(x_seq: Tensor, *tensors: Tensor | None) -> bool:
    """Whether an operator's implementation may be called without the dispatcher.

    A mode, a profiler or a trace may watch the dispatcher. A subclass of Tensor may define operators itself, and may
    have no memory. Only the dispatcher gives memory to a tensor that stands for zeros, and negates a negative view.
    """
    if torch._C._len_torch_dispatch_stack() or torch.autograd._profiler_enabled() or torch._C._get_tracing_state():
        return False
    for tensor in (x_seq, *tensors):
        if tensor is not None and (type(tensor) not in _PLAIN or tensor.is_neg() or tensor._is_zerotensor()):
            return False
    return x_seq.device.type in TARGETS


def _forward(
    settings: tuple[Any, ...], x_seq: Tensor, initial: Sequence[Tensor], parameters: Sequence[Tensor]
) -> Outputs:
    """Run the forward operator below autograd."""
    program, _, initial_value, channel_dim, learns, record, final = settings
    if _unwatched(x_seq, *initial, *parameters):
        scan = scan_of(program, x_seq, initial, parameters, channel_dim)
        return scan.forward(x_seq, initial, initial_value, parameters, learns and scan.checkpoints, record, final)
    checkpoints = (x_seq.shape[0] - 1) // TARGETS[x_seq.device.type].segment(program) if learns else 0
    with torch._C._AutoDispatchBelowAutograd():
        outputs = torch.ops.klif_sj.forward(
            program.text, x_seq, initial, initial_value, parameters, channel_dim, checkpoints, record, final
        )
    spikes, ends, saved, sequences = unlisted(outputs, len(program.states) if final else 0)
    # The same is saved as without a watcher: activation checkpointing counts it, and may watch only one of two passes.
    return spikes, ends, saved if checkpoints else None, sequences


def _backward(
    settings: tuple[Any, ...], x_seq: Tensor, initial: Sequence[Tensor], parameters: Sequence[Tensor],
    checkpoints: Tensor | None, grad_spikes: Tensor | None, grad_final: Sequence[Tensor | None],
    grad_sequences: Sequence[Tensor | None], need_x: bool,
) -> Gradients:  # fmt: skip
    """Run the backward operator: below autograd, or, with ``create_graph``, above it, to refuse a derivative."""
    program, _, initial_value, channel_dim, *_ = settings
    watched = torch.is_grad_enabled()
    if not watched and _unwatched(x_seq, *initial, *parameters, grad_spikes, *grad_final, *grad_sequences):
        scan = scan_of(program, x_seq, initial, parameters, channel_dim)
        try:
            return scan.backward(
                x_seq, initial, initial_value, parameters, checkpoints, grad_spikes, grad_final, grad_sequences, need_x
            )
        except NotImplementedError as error:  # a batch of gradients has no memory
            raise RuntimeError(NO_TRANSFORMS) from error
    saved = x_seq.new_empty(0) if checkpoints is None else checkpoints
    with nullcontext() if watched else torch._C._AutoDispatchBelowAutograd():
        grads = iter(
            torch.ops.klif_sj.backward(
                program.text, x_seq, initial, initial_value, parameters, saved, grad_spikes, grad_final,
                grad_sequences, channel_dim, need_x,
            )
        )  # fmt: skip
    return next(grads) if need_x else None, [next(grads) for _ in initial], list(grads)
