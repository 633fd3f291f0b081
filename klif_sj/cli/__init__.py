"""The command line ``klif-sj``. Each command is a module, whose ``add`` declares it."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence

from .. import __version__
from . import compare, evaluate, info, inspect, reproduce, run, source, train, tune
from .errors import UserError

__all__ = ["main"]

COMMANDS = (compare, evaluate, info, inspect, reproduce, run, source, train, tune)

USER_ERROR = 2
INTERRUPTED = 130
PIPE_CLOSED = 141


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``klif-sj`` with these arguments, or the process's own; returns the exit status."""
    parser = argparse.ArgumentParser(prog="klif-sj", description="Published spiking neurons for SpikingJelly.")
    parser.add_argument("--version", action="version", version=f"klif_sj {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    options = parser.parse_args(arguments)
    options.command = shlex.join(["klif-sj", *(sys.argv[1:] if arguments is None else arguments)])
    try:
        options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output, such as head, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter would complain at exit
        return PIPE_CLOSED
    except UserError as error:
        print(f"klif-sj: error: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        if getattr(options, "passes_interrupts", False):
            raise
        print(f"\nklif-sj: interrupted. {getattr(options, 'when_interrupted', '')}".rstrip(), file=sys.stderr)
        return INTERRUPTED
    return 0
