"""``klif-sj info`` prints the environment report."""

from __future__ import annotations

import argparse

from .._environment import environment


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare ``klif-sj info``."""
    parser = commands.add_parser("info", help="print the environment report that a bug report needs")
    parser.set_defaults(run=info)


def info(options: argparse.Namespace) -> None:
    """Print versions, hardware, and which backends can serve or why not."""
    report = environment()
    width = max(map(len, report))
    for label, text in report.items():
        print(f"{label:{width}}  {text}")
