"""Find the module of a network where values stop being finite."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn


def first_not_finite(modules: Iterable[tuple[str, nn.Module]], run: Callable[[], Any]) -> tuple[str, str] | None:
    """Call ``run`` to find the first of these modules, in order of execution, whose input is finite and output is not.

    Returns the module's name and its class.
    """
    broken: list[tuple[str, str]] = []

    def hook(name: str) -> Any:
        def check(module: nn.Module, inputs: Any, output: Any) -> None:
            if not broken and is_finite(inputs) and not is_finite(output):
                broken.append((name, type(module).__name__))

        return check

    handles = [module.register_forward_hook(hook(name)) for name, module in modules]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return broken[0] if broken else None


def is_finite(value: Any) -> bool:
    """Whether a tensor, or every tensor in a list or tuple, holds finite values only."""
    if isinstance(value, Tensor):
        return bool(value.isfinite().all())
    return not isinstance(value, list | tuple) or all(map(is_finite, value))
