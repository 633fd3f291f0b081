"""klif-sj run: an unmodified script, with other neurons in place of SpikingJelly's."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from ..swap import patched
from ..swap.script import patch_for, run_as_main, swapping_children


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare ``klif-sj run``."""
    parser = commands.add_parser(
        "run",
        help="run an unmodified SpikingJelly script with other neurons",
        description="Run a script as 'python script.py ARGS...' would, with other neurons in place of SpikingJelly's, "
        "and print at its end, to stderr, what was swapped. Under torchrun: torchrun ... -m klif_sj run --swap ...",
        usage="klif-sj run --swap OLD=NEW [--set NAME=VALUE] (SCRIPT | -m MODULE) [ARGS...]",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--swap",
        action="append",
        required=True,
        metavar="OLD=NEW",
        help="LIFNode=KLIFNode: SpikingJelly's class, and ours or any as package.module.Class; may be given repeatedly",
    )
    add(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting of every new neuron, such as tau=2.0; may be given repeatedly",
    )
    add("-m", dest="module", nargs=argparse.REMAINDER, metavar="MODULE", help="a module instead of a script")
    add("script", nargs=argparse.REMAINDER, metavar="SCRIPT", help="the script, then its arguments")
    parser.set_defaults(run=run, parser=parser, passes_interrupts=True)


def run(options: argparse.Namespace) -> None:
    """Run the script; its exit status, and whatever it raises, leaves this function as it leaves the script."""
    # What follows a "--" is not taken by -m.
    command = [*(options.module or ()), *options.script]
    if not command:
        options.parser.error("expected a script, or -m and a module")
    if not options.module and not Path(command[0]).exists():
        options.parser.error(f"there is no script {command[0]!r}")
    try:
        patch = patch_for(options.swap, options.set)
    except (TypeError, ValueError) as error:
        options.parser.error(str(error))
    process = os.getpid()
    try:
        with patch, swapping_children(options.swap, options.set):
            run_as_main(command, is_module=bool(options.module))
    finally:
        # A forked process that leaves through here has nothing to say, nor has any but the first of torchrun's.
        if os.getpid() == process and os.environ.get("RANK", "0") == "0":
            _print_report(patch)


def _print_report(patch: patched) -> None:
    print(f"\nklif-sj run: {patch.report}", file=sys.stderr)
    if not patch.rows:
        print("klif-sj run: the script has built none of the neurons named in --swap", file=sys.stderr)
