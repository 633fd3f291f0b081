"""Running a program from eager code: one autograd function, and the direct way round torch's dispatcher."""

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

    :param program: the program; its text while torch.compile traces
    :param x_seq: the input current ``[T, N, *]``, in any dense layout
    :param initial: states ``[N, *]`` to start from, in the dtype of states; or empty
    :param initial_value: where ``initial`` is empty, the number that each state starts from
    :param parameters: of the program, in its order: scalars, ``[C]``, ``[T]`` or ``[T, C]``
    :param channel_dim: the dimension of a step that channels lie along
    :param learns: whether anything asks for a gradient
    :param record: whether the states at every step are wanted
    :param final: whether the final states are wanted

    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        text = program if isinstance(program, str) else program.text
        checkpoints = (x_seq.shape[0] - 1) // _segment(x_seq.device.type, text) if learns else 0
        found = torch.ops.klif_sj.forward(
            text, x_seq, initial, initial_value, parameters, channel_dim, checkpoints, record, final
        )
        spikes, ends, _, sequences = unlisted(found, (len(initial) + len(initial_value)) * final)
        return spikes, ends, sequences
    if isinstance(program, str):
        program = Program.decode(program)
    # One argument for all that is no tensor, as torch looks at each.
    settings = program, len(initial), initial_value, channel_dim, learns, record, final
    if not learns and forward_ad._current_level < 0:
        spikes, ends, _, sequences = _forward(settings, x_seq, initial, parameters)
        return spikes, ends, sequences
    spikes, *others = _Scan.apply(settings, x_seq, *initial, *parameters)
    split = len(program.states) if final else 0
    return spikes, others[:split], others[split:]


def _segment(device: str, text: str) -> int:
    return TARGETS.get(device, TARGETS["cpu"]).segment(Program.decode(text))


_segment._dynamo_marked_constant = True  # type: ignore[attr-defined]


class _Scan(torch.autograd.Function):
    """What ``register_autograd`` does for the forward operator, at a fraction of its cost a call."""

    @staticmethod
    def forward(ctx: Any, settings: tuple[Any, ...], x_seq: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        n_initial = settings[1]
        spikes, ends, saved, sequences = _forward(settings, x_seq, tensors[:n_initial], tensors[n_initial:])
        ctx.set_materialize_grads(False)
        ctx.settings, ctx.ends = settings, 1 + len(ends)
        # The tensors that torch hands on: it tells the graph's inputs by them.
        ctx.save_for_backward(as_it_is_now(x_seq.detach()), saved, *tensors)
        return spikes, *ends, *sequences

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        program, n_initial, *_ = ctx.settings
        try:
            x_seq, checkpoints, *tensors = ctx.saved_tensors  # once: activation checkpointing computes them again
        except RuntimeError as error:
            if "inplace" in str(error):
                raise RuntimeError(f"{program.neuron}: its input was changed in place afterwards. {error}") from error
            raise
        grad_x, grad_initial, found = _backward(
            ctx.settings, x_seq, tensors[:n_initial], tensors[n_initial:], checkpoints, grads[0], grads[1 : ctx.ends],
            grads[ctx.ends :], ctx.needs_input_grad[1],
        )  # fmt: skip
        unlearned = len(program.parameters) - len(found)  # they come after the learned ones
        return None, grad_x, *grad_initial, *found, *(None,) * unlearned


def as_it_is_now(x_seq: Tensor) -> Tensor:
    """x as it is when the neuron reads it, for the gradient: a change in place afterwards makes a copy.

    Memory is shared until then (torch's copy-on-write storages). Where torch cannot share it, a change in place is
    an error in the backward pass.
    """
    if torch.compiler.is_compiling() or type(x_seq) is not Tensor:
        return x_seq
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return x_seq  # who watches every operation, as a counter does, knows no such one
    if x_seq.is_cuda and torch.cuda.is_current_stream_capturing():
        return x_seq
    try:
        return torch._lazy_clone(x_seq)
    except (AttributeError, RuntimeError):
        return x_seq


# The direct way round the dispatcher. A layer's forward and backward pass take about 130 us less on a CPU when the
# operators' implementations are called themselves, so that is done where nobody watches operators.

_PLAIN = {Tensor, torch.nn.Parameter}


def _unwatched(x_seq: Tensor, *others: Tensor | None) -> bool:
    """Whether nobody minds that an operator's implementation is called itself.

    A subclass of Tensor has its own idea of an operator, and perhaps no memory. The dispatcher gives memory to a tensor
    that stands for zeros, and negates one that is a negative view.
    """
    if torch._C._len_torch_dispatch_stack() or torch.autograd._profiler_enabled() or torch._C._get_tracing_state():
        return False
    for tensor in (x_seq, *others):
        if tensor is not None and (type(tensor) not in _PLAIN or tensor.is_neg() or tensor._is_zerotensor()):
            return False
    return x_seq.device.type in TARGETS


def _forward(
    settings: tuple[Any, ...], x_seq: Tensor, initial: Sequence[Tensor], parameters: Sequence[Tensor]
) -> Outputs:
    """The forward operator, below autograd."""
    program, _, initial_value, channel_dim, learns, record, final = settings
    if _unwatched(x_seq, *initial, *parameters):
        scan = scan_of(program, x_seq, initial, parameters, channel_dim)
        return scan.forward(x_seq, initial, initial_value, parameters, learns and scan.checkpoints, record, final)
    checkpoints = (x_seq.shape[0] - 1) // TARGETS[x_seq.device.type].segment(program) if learns else 0
    with torch._C._AutoDispatchBelowAutograd():
        found = torch.ops.klif_sj.forward(
            program.text, x_seq, initial, initial_value, parameters, channel_dim, checkpoints, record, final
        )
    spikes, ends, saved, sequences = unlisted(found, len(program.states) if final else 0)
    # As without a watcher: activation checkpointing counts what is saved, and may watch but one of two passes.
    return spikes, ends, saved if checkpoints else None, sequences


def _backward(
    settings: tuple[Any, ...], x_seq: Tensor, initial: Sequence[Tensor], parameters: Sequence[Tensor],
    checkpoints: Tensor | None, grad_spikes: Tensor | None, grad_final: Sequence[Tensor | None],
    grad_sequences: Sequence[Tensor | None], need_x: bool,
) -> Gradients:  # fmt: skip
    """The backward operator: below autograd, except with ``create_graph``, where its own refuses a derivative."""
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
        found = iter(
            torch.ops.klif_sj.backward(
                program.text, x_seq, initial, initial_value, parameters, saved, grad_spikes, grad_final,
                grad_sequences, channel_dim, need_x,
            )
        )  # fmt: skip
    return next(found) if need_x else None, [next(found) for _ in initial], list(found)
