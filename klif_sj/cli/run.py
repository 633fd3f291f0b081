"""``klif-sj run`` runs an unmodified script with other neurons in place of SpikingJelly's."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from contextlib import ExitStack
from pathlib import Path

from ..fuse import fusing
from ..inspection.result import as_text, save_side_by_side
from ..inspection.running import inspecting
from ..swap import patched
from ..swap.script import patch_for, run_as_main, swapping_children


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare ``klif-sj run``."""
    parser = commands.add_parser(
        "run",
        help="run an unmodified SpikingJelly script with other neurons",
        description="Run a script as 'python script.py ARGS...' would, with other neurons in place of SpikingJelly's "
        "(--swap), or with SpikingJelly's own on generated kernels (--fuse), and print at its end, to stderr, what was "
        "done, or what its spiking layers did (--inspect). Under torchrun: torchrun ... -m klif_sj run --swap ...",
        usage="klif-sj run [--swap OLD=NEW] [--set NAME=VALUE] [--fuse] [--inspect OUT] (SCRIPT | -m MODULE) [ARGS...]",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--swap",
        action="append",
        default=[],
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
    add("--fuse", action="store_true", help="run the script's other neurons on generated kernels, as klif_sj.fuse does")
    add(
        "--inspect",
        type=Path,
        metavar="OUT",
        help="watch the script's spiking layers, as klif_sj.inspect does; the folder OUT gets inspection.html and "
        "inspection.json",
    )
    add("-m", dest="module", nargs=argparse.REMAINDER, metavar="MODULE", help="a module instead of a script")
    add("script", nargs=argparse.REMAINDER, metavar="SCRIPT", help="the script, then its arguments")
    parser.set_defaults(run=run, parser=parser, passes_interrupts=True)


def run(options: argparse.Namespace) -> None:
    """Run the script. Its exit status and its exceptions leave this function as they leave the script."""
    # The option -m does not take the arguments after a "--".
    command = [*(options.module or ()), *options.script]
    if not command:
        options.parser.error("expected a script, or -m and a module")
    if not options.module and not Path(command[0]).exists():
        options.parser.error(f"there is no script {command[0]!r}")
    if not options.swap and not options.fuse and not options.inspect:
        options.parser.error("expected --swap OLD=NEW, --fuse or --inspect OUT")
    if options.inspect and importlib.util.find_spec("matplotlib") is None:
        options.parser.error("--inspect needs matplotlib; type: pip install 'klif_sj[train]'")
    if options.set and not options.swap:
        options.parser.error("expected --swap OLD=NEW with --set, which is about the new neurons")
    try:
        patch = patch_for(options.swap, options.set) if options.swap else None
    except (TypeError, ValueError) as error:
        options.parser.error(str(error))
    fused = fusing() if options.fuse else None
    watched = inspecting(Path(command[0]).name) if options.inspect else None
    process = os.getpid()
    try:
        with ExitStack() as stack:
            if patch is not None:
                stack.enter_context(patch)
            if fused is not None:
                stack.enter_context(fused)
            if watched is not None:
                stack.enter_context(watched)
            stack.enter_context(swapping_children(options.swap, options.set, options.fuse))
            run_as_main(command, is_module=bool(options.module))
    finally:
        # A forked process that ends here must not report, and of torchrun's processes only the first one reports.
        if os.getpid() == process and os.environ.get("RANK", "0") == "0":
            _print_reports(patch, fused)
            if watched is not None:
                _write_inspections(watched, options.inspect)


def _write_inspections(watched: inspecting, out: Path) -> None:
    inspections = watched.inspections()
    if not inspections:
        print("klif-sj run: the script has run no spiking layer, so there is nothing to inspect", file=sys.stderr)
        return
    page = save_side_by_side(inspections, out)
    print(f"\nklif-sj run: {as_text(inspections)}\nPage: {page}", file=sys.stderr)


def _print_reports(patch: patched | None, fused: fusing | None) -> None:
    for block in (patch, fused):
        if block is not None:
            print(f"\nklif-sj run: {block.report}", file=sys.stderr)
    if patch is not None and not patch.rows:
        print("klif-sj run: the script has built none of the neurons named in --swap", file=sys.stderr)
