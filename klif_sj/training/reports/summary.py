"""Summarise several runs: means over seeds and paired differences, in numbers and in a sentence."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from scipy.stats import ttest_rel

__all__ = ["Difference", "conclusion", "markdown_table", "mean_and_deviation", "paired_difference"]

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """The mean difference between the accuracies of two neurons, over pairs of runs with the same seed.

    ``low`` and ``high`` are the ends of its 95 % confidence interval by Student's t, which assumes that the differences
    of the seeds are normally distributed. They are None for fewer than two pairs, and if all differences are equal.
    """

    mean: float
    low: float | None
    high: float | None
    pairs: int

    def __str__(self) -> str:
        if self.low is None:
            return f"{self.mean:+.2f}" + (" in each pair" if self.pairs > 1 else "")
        return f"{self.mean:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"

    @property
    def interval(self) -> tuple[float, float]:
        """``low`` and ``high``; where there is no interval, the mean twice."""
        return (self.mean, self.mean) if self.low is None or self.high is None else (self.low, self.high)

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


def mean_and_deviation(values: Sequence[float]) -> str:
    """The mean and, from two values on, the sample standard deviation."""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{deviation}"


def paired_difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference | None:
    """How much higher ``ours`` are than ``theirs``, paired by seed; None if they have no seed in common."""
    seeds = [seed for seed in ours if seed in theirs]
    if not seeds:
        return None
    differences = [ours[seed] - theirs[seed] for seed in seeds]
    mean = statistics.fmean(differences)
    # If all differences are equal, for example 0, the test would divide by zero.
    if max(differences) - min(differences) < 1e-9:
        return Difference(mean, None, None, len(seeds))
    test = ttest_rel([ours[seed] for seed in seeds], [theirs[seed] for seed in seeds])
    interval = test.confidence_interval(CONFIDENCE)
    return Difference(mean, float(interval.low), float(interval.high), len(seeds))


def conclusion(first: str, differences: Mapping[str, Difference | None]) -> str:
    """What the differences of some neurons from the ``first`` support and what they do not, in one sentence."""
    known = {name: difference for name, difference in differences.items() if difference is not None}
    if not known:
        return f"There is nothing to compare {first} with."
    seeds = max(difference.pairs for difference in known.values())
    if seeds < 2:
        return "One seed cannot tell a difference between neurons from chance."
    clear = [
        f"that {name} is {abs(difference.mean):.2f} points {'above' if difference.mean > 0 else 'below'} {first} "
        f"(95 % interval {difference.low:+.2f} to {difference.high:+.2f})"
        for name, difference in known.items()
        if difference.is_clear
    ]
    equal = [name for name, difference in known.items() if difference.pairs > 1 and difference.interval == (0, 0)]
    unclear = [name for name, difference in known.items() if not (difference.is_clear or name in equal)]
    statements = [f"support {', '.join(clear)}"] * bool(clear)
    statements += [f"give {' and '.join(equal)} the accuracy of {first} with every seed"] * bool(equal)
    statements += [f"do not say whether {' or '.join(unclear)} is better or worse than {first}"] * bool(unclear)
    return f"Over {seeds} seeds, at this size and after this many epochs, the data {', and '.join(statements)}."


def markdown_table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table in Markdown, which ends with a line break."""
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, ["---"] * len(head), *lines))
