"""Give the hooks of a neuron to the neuron that replaces it."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from .translate import CHANGED, DROPPED, KEPT, Entry

HOOKS = tuple(name for name, value in vars(nn.Module()).items() if isinstance(value, dict) and "hooks" in name)
"""The names of the dicts in which torch keeps a module's hooks, and marks of these hooks, by the hook's number."""


def carry_hooks(old: nn.Module, new: nn.Module, *, install: bool) -> tuple[Entry, ...]:
    """Give the new neuron the old one's hooks, and report which.

    Both neurons share a dict of hooks where that is possible. Then the handle of a hook still removes the hook, and a
    hook that is registered later stays after an undo. Sharing is impossible where the new neuron has hooks of its own,
    or where a hook is bound to the old neuron.

    :param install: False only reports
    """
    hooks = {number: hook for name in HOOKS if name.endswith("_hooks") for number, hook in vars(old)[name].items()}
    bound = {number: hook for number, hook in hooks.items() if _is_bound_to(hook, old)}
    copied = []
    for name in HOOKS:
        old_hooks, new_hooks = vars(old)[name], vars(new)[name]
        unbound = {number: value for number, value in old_hooks.items() if number not in bound}
        if len(unbound) == len(old_hooks) and not new_hooks:
            if install:
                vars(new)[name] = old_hooks
        elif unbound:
            copied.append(name.strip("_"))
            if install:
                new_hooks.update(unbound)
    if install:
        new._is_full_backward_hook = old._is_full_backward_hook
    entries = []
    if carried_hooks := len(hooks) - len(bound):
        entries.append(Entry(KEPT, "hooks", carried_hooks, carried_hooks))
    if copied:
        why = "these hooks work, but handles from before the swap no longer remove them"
        entries.append(Entry(CHANGED, "hook handles", copied, copied, why))
    if lost_hooks := sum(not _is_of_a_lazy_module(hook) for hook in bound.values()):
        entries.append(Entry(DROPPED, "bound hooks", lost_hooks, why="they act on the old neuron itself"))
    return tuple(entries)


def _is_bound_to(hook: Any, module: nn.Module) -> bool:
    # A hook that was registered with with_module=True has a wrapper, which refers to the module.
    return getattr(_function(hook), "__self__", None) is module or getattr(hook, "with_module", False)


def _is_of_a_lazy_module(hook: Any) -> bool:
    return getattr(_function(hook), "__name__", "") in vars(LazyModuleMixin)


def _function(hook: Any) -> Any:
    return getattr(hook, "hook", hook)
