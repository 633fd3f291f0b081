"""Memories whose states are computed when somebody reads them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor


class PendingMemories(dict[str, Any]):
    """A neuron's memories while its states are not computed: whoever reads a value first has them computed.

    Names, their number, and writing ask for no value. Copies are plain dicts.

    :param memories: what was there before the states
    :param states: tensors without values, which ``compute`` gives them
    """

    __slots__ = ("_compute", "_states", "computed")

    def __init__(self, memories: Mapping[str, Any], states: Mapping[str, Tensor], compute: Callable[[], None]) -> None:
        super().__init__(memories)
        self.update(states)
        self._states: tuple[Tensor, ...] = tuple(states.values())
        self._compute = compute
        self.computed = False

    def compute(self) -> None:
        """Compute the states, unless they are already, or none of them is here any more."""
        if any(value is state for value in dict.values(self) for state in self._states):
            self._compute()
            self.computed = True
            self._states = ()
            del self._compute  # and with it the input of the call

    def unread(self) -> dict[str, Any]:
        """A plain dict of what is here, computed or not."""
        return dict(dict.items(self))

    def __iter__(self) -> Iterator[str]:
        """As a dict's; but C code that copies a dict (``dict(m)``, ``{**m}``) goes past the methods of one without."""
        return super().__iter__()

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (self.copy(),)


def _computing(name: str) -> Callable[..., Any]:
    read = getattr(dict, name)

    @functools.wraps(read)
    def method(self: PendingMemories, *arguments: Any) -> Any:
        self.compute()
        return read(self, *arguments)

    return method


for _name in (
    "__getitem__", "get", "values", "items", "copy", "pop", "popitem", "setdefault",
    "__eq__", "__ne__", "__or__", "__ror__", "__repr__",
):  # fmt: skip
    setattr(PendingMemories, _name, _computing(_name))
