"""What a process that was spawned under ``klif-sj run`` executes in place of its parent's script."""

from klif_sj.swap.script import become_child

globals().update(become_child())
