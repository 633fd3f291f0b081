"""The statistics of one spiking layer that are kept between passes: sums of the shape of a step, and a few numbers."""

from __future__ import annotations

import torch
from torch import Tensor

MOST_STEPS = 4096
"""If a network is never reset, single steps beyond this number are counted with the last one."""


class LayerStatistics:
    """Running sums over the calls of one layer. Nothing here grows with the number of batches."""

    def __init__(self) -> None:
        self.inputs = 0
        """The number of inputs that were seen: the sum of the batch sizes of all passes."""
        self.neurons: tuple[int, ...] = ()
        """The shape of a step without its batch dimension."""
        self.unlike = 0
        """The number of calls with steps of another shape. They count for the mean rate and the rates by step only."""
        self.input_changes = False
        self._by_neuron = torch.zeros(0)
        self._observations = 0
        self._by_step = torch.zeros(0, dtype=torch.float64)
        self._step_observations = torch.zeros(0, dtype=torch.float64)
        self._signed: bool | None = None
        self._first: Tensor | None = None

    def add(self, x_seq: Tensor, spikes: Tensor, first_step: int) -> Tensor:
        """Add one call, which starts at time step ``first_step``. Input and spikes are ``[T, N, *]``.

        :return: whether all values were finite; a tensor, so that the CPU does not wait for a GPU here
        """
        if self._signed is None:
            self._signed = bool(spikes.amin() < 0)
        fired = (spikes.abs() if self._signed else spikes).sum(1, dtype=_sum_dtype(spikes))
        by_step = fired.flatten(1).sum(1, dtype=torch.float64)
        # A current that is repeated without a copy, such as that of a static image, is checked once.
        current = x_seq[:1] if _is_repeated(x_seq) else x_seq
        finite = (current.sum(dtype=_sum_dtype(x_seq)) + by_step.sum()).isfinite()
        self._count(fired, spikes.shape[1])
        self._count_steps(by_step.nan_to_num(0.0, 0.0, 0.0), fired[0].numel() * spikes.shape[1], first_step)
        if first_step == 0:
            self.inputs += spikes.shape[1]
        if not self.input_changes:
            self._look_for_change(x_seq, first_step)
        return finite

    def _count(self, fired: Tensor, batch: int) -> None:
        shape = tuple(fired.shape[1:])
        if not self._observations:
            self.neurons = shape
            self._by_neuron = torch.zeros(shape, dtype=torch.float64, device=fired.device)
        if shape != self.neurons:
            self.unlike += 1
            return
        self._by_neuron += fired.sum(0).nan_to_num(0.0, 0.0, 0.0)
        self._observations += len(fired) * batch

    def _count_steps(self, by_step: Tensor, observations: int, first_step: int) -> None:
        first_step = min(first_step, MOST_STEPS - 1)
        missing = first_step + len(by_step) - len(self._by_step)
        if missing > 0:
            self._by_step, self._step_observations = (
                torch.cat([sums.to(by_step.device), torch.zeros(missing, dtype=torch.float64, device=by_step.device)])
                for sums in (self._by_step, self._step_observations)
            )
        steps = slice(first_step, first_step + len(by_step))
        self._by_step[steps] += by_step
        self._step_observations[steps] += observations

    def _look_for_change(self, x_seq: Tensor, first_step: int) -> None:
        """Find out whether the input of any step differs from the input of the first step of the pass."""
        if first_step == 0:
            first = x_seq[0]
            self.input_changes = not _is_repeated(x_seq) and any(not torch.equal(first, x) for x in x_seq[1:])
            # In single-step mode the other steps of the pass are still to come. One input of the batch is compared.
            self._first = first[:1].clone() if len(x_seq) == 1 else None
        elif self._first is not None and self._first.shape == x_seq[0, :1].shape:
            self.input_changes = not torch.equal(self._first, x_seq[0, :1])

    @property
    def steps(self) -> int:
        """T: the most time steps of a pass."""
        return len(self._by_step)

    def rate_by_neuron(self) -> Tensor:
        """Spikes per time step of each neuron, of the step's shape, on the CPU."""
        return (self._by_neuron / max(self._observations, 1)).cpu()

    def rate_by_step(self) -> list[float]:
        """Spikes per neuron at each time step."""
        return (self._by_step / self._step_observations).tolist()

    def rate(self) -> float:
        """Spikes per neuron and time step."""
        return float(self._by_step.sum() / self._step_observations.sum())

    def bytes_held(self) -> int:
        """The memory that the statistics take, in bytes."""
        tensors = (self._by_neuron, self._by_step, self._step_observations, self._first)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def _sum_dtype(values: Tensor) -> torch.dtype:
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def _is_repeated(x_seq: Tensor) -> bool:
    return len(x_seq) > 1 and x_seq.stride(0) == 0
