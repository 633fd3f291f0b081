"""A process that multiprocessing spawns under ``klif-sj run`` executes this file in place of its parent's script."""

from klif_sj.swap.script import become_child

globals().update(become_child())
