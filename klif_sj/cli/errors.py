"""The errors that the user can correct, and the packages that the ``train`` extra must install."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["UserError", "require_train_extra", "user_errors"]

TRAIN_EXTRA = {"lightning": "lightning", "sklearn": "scikit-learn", "torchvision": "torchvision"} | {
    name: name for name in ("matplotlib", "rich", "scipy", "tensorboard")
}
"""The modules of the ``train`` extra and the packages that they come from."""

MISTAKES = (ValueError, TypeError, OSError, ImportError, RuntimeError)


class UserError(Exception):
    """A mistake that the user can correct; the text says how."""


@contextmanager
def user_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Turns errors of these kinds, by default all that a wrong argument or file raises, into a :class:`UserError`."""
    mistakes = kinds or MISTAKES
    try:
        yield
    except mistakes as error:
        raise UserError(error) from error


def require_train_extra() -> None:
    """Check that the packages of the ``train`` extra are installed.

    :raises UserError: if a package is missing
    """
    missing = []
    for module, package in TRAIN_EXTRA.items():
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module:
                raise
            missing.append(package)
    if missing:
        raise UserError(f"training needs {', '.join(missing)}; type: pip install 'klif_sj[train]'")
