"""What the papers claim of their neurons, beside what our runs say of it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from ..classifier import by_layer
from ..recipe import load_recipe
from .paper_tables import size_name
from .summary import Difference, markdown_table, paired_difference

if TYPE_CHECKING:
    from .reproduction_page import Result

__all__ = ["Claim", "claims", "claims_table", "verdicts"]

CLIF = ("clif", "clif-baseline")
"""CLIF, and the LIF with which its authors compare it. With one time step they are one neuron."""

KLIF_HIGHER = (
    ("KLIF is above LIF", "klif", "lif"),
    ("k alone helps: above LIF", "klif-only-k", "lif"),
    ("ReLU alone helps: above LIF", "klif-only-relu", "lif"),
    ("ReLU helps beside k: KLIF is above k alone", "klif", "klif-only-k"),
    ("k helps beside ReLU: KLIF is above ReLU alone", "klif", "klif-only-relu"),
    ("KLIF with CELU is above LIF", "klif-celu", "lif"),
    ("KLIF with leaky ReLU is above LIF", "klif-leaky-relu", "lif"),
)
"""Claims of the KLIF paper about the test accuracy: the first neuron's is higher than the second's."""

OTHERS_HIGHER = (
    ("GLIF is above KLIF's LIF", "glif", "lif"),
    ("CLIF is above KLIF's LIF", "clif", "lif"),
    ("CLIF is above its authors' LIF", *CLIF),
)
"""The same of the other papers."""

NEAR = 1.0
"""Our reading of "does not change a lot", which the KLIF paper says of KLIF* beside KLIF: by less than a point. The
largest difference in its Table 4 is 0.59."""

HALF = 50.0
"""More than this per cent of the layers are most layers."""


@dataclass(frozen=True)
class Claim:
    """A paper's claim about a figure, and what our runs of one size gave.

    :param runs: one of the runs, for what they share
    :param paper: the paper's own figure, or where it says so
    :param found: the mean over seeds, with its interval
    :param least: the claim is that the figure is above this
    :param most: and below this
    :param equal: whether the claim is instead that the figure is 0 with every seed
    """

    text: str
    runs: Result
    paper: str
    found: Difference
    unit: str = "points"
    least: float = 0.0
    most: float = math.inf
    equal: bool = False

    @property
    def ours(self) -> str:
        """The figure with its interval."""
        figure, in_each_pair, _ = str(self.found).partition(" in each pair")
        return f"{figure} {self.unit}{in_each_pair}"

    @property
    def verdict(self) -> str:
        """*holds* or *does not hold*, if the interval, or one figure that three or more seeds gave, decides it."""
        low, high = self.found.interval
        decided = low < high or self.found.pairs > 2
        if self.equal:
            holds, refuted = decided and low == 0 == high, not low == 0 == high
        else:
            holds = decided and self.least < low and high < self.most
            refuted = decided and (high < self.least or self.most < low)
        if holds or refuted:
            return "**holds**" if holds else "**does not hold**"
        return "cannot say, by one seed" if self.found.pairs < 2 else "cannot say"


@dataclass(frozen=True)
class Share(Claim):
    """A claim about a share of the layers, in per cent: it is above half."""

    unit: str = "% of the layers"
    least: float = HALF

    @property
    def ours(self) -> str:
        low, high = (min(max(bound, 0.0), 100.0) for bound in self.found.interval)
        return f"{self.found.mean:.0f}{f' [{low:.0f}, {high:.0f}]' if low < high else ''} {self.unit}"


Runs = Mapping[str, Mapping[int, "Result"]]
"""The runs of one size, by neuron and seed."""


def claims(results: Sequence[Result]) -> list[Claim]:
    """Every claim that the results say something about: one claim after the other, each at every size."""
    sizes: dict[str, dict[str, dict[int, Result]]] = {}
    for result in results:
        sizes.setdefault(result.size, {}).setdefault(result.recipe.neuron, {})[result.recipe.seed] = result
    judges: list[Callable[[Runs], Claim | None]] = [
        *(partial(_higher, *claim) for claim in KLIF_HIGHER),
        _scaled_reset_changes_little,
        _k_above_one,
        _fires_more,
        *(partial(_higher, *claim) for claim in OTHERS_HIGHER),
        _equal_at_one_step,
    ]
    judged = [claim for judge in judges for runs in sizes.values() if (claim := judge(runs))]
    return judged + list(_of_growing_steps(results))


def verdicts(judged: Sequence[Claim]) -> str:
    """How often the table says that a claim holds, that it does not, and that the runs cannot say, in a sentence."""
    counted = Counter(each.verdict.strip("*").partition(",")[0] for each in judged)
    parts = (f"*{verdict}* {counted[verdict]} times" for verdict in ("holds", "does not hold", "cannot say"))
    return f"The table says {', '.join(parts)}."


def claims_table(judged: Iterable[Claim]) -> str:
    """In Markdown, a row for each claim."""
    return markdown_table(
        ["claim", "paper", "ours, with its 95 % interval", "seeds", "in these runs it", "runs"],
        [
            [
                each.text,
                each.paper,
                each.ours,
                str(each.found.pairs),
                each.verdict,
                f"[{each.runs.title}](#{_anchor(each.runs.title)})",
            ]
            for each in judged
        ],
    )


def _anchor(heading: str) -> str:
    """Where a heading's link leads, as GitHub and MyST make it."""
    return "".join(c for c in heading.lower().replace(" ", "-") if c.isalnum() or c in "-_")


def _higher(text: str, higher: str, lower: str, runs: Runs) -> Claim | None:
    found = _difference(runs, higher, lower)
    if found is None or ((higher, lower) == CLIF and _steps(runs) == 1):
        return None
    return Claim(text, _any(runs), _published_difference(runs, higher, lower), found)


def _equal_at_one_step(runs: Runs) -> Claim | None:
    found = _difference(runs, *CLIF)
    if found is None or _steps(runs) != 1:
        return None
    return Claim("CLIF and its authors' LIF are equal at T = 1", _any(runs), "equal", found, equal=True)


def _scaled_reset_changes_little(runs: Runs) -> Claim | None:
    pair = ("klif-star", "klif")
    found = _difference(runs, *pair)
    if found is None:
        return None
    text = f"KLIF* changes KLIF's accuracy by less than {NEAR:g} point"
    return Claim(text, _any(runs), _published_difference(runs, *pair), found, least=-NEAR, most=NEAR)


def _k_above_one(runs: Runs) -> Claim | None:
    shares = {seed: _share(k > 1 for k in _last(result, "k").values()) for seed, result in runs.get("klif", {}).items()}
    return _most_layers("k ends above 1 in most layers", runs, "Fig. 5, CIFAR-10 and DVS-Gesture", shares)


def _fires_more(runs: Runs) -> Claim | None:
    klif, lif = (
        {seed: _last(result, "firing_rate") for seed, result in runs.get(neuron, {}).items()}
        for neuron in ("klif", "lif")
    )
    shares = {
        seed: _share(rate > lif[seed][layer] for layer, rate in rates.items())
        for seed, rates in klif.items()
        if seed in lif
    }
    return _most_layers("KLIF fires more than LIF in most layers", runs, "Fig. 6, CIFAR-10", shares)


def _most_layers(text: str, runs: Runs, paper: str, shares: Mapping[int, float]) -> Claim | None:
    found = paired_difference(shares, dict.fromkeys(shares, 0.0))
    return None if found is None else Share(text, _any(runs), paper, found)


def _of_growing_steps(results: Sequence[Result]) -> Iterator[Claim]:
    """CLIF's lead over its authors' LIF with the most time steps, less that with the fewest, if all else is equal."""
    runs: dict[str, dict[int, list[Result]]] = {}
    for result in results:
        published = load_recipe(result.recipe.name)
        rest = size_name(result.recipe.override(time_steps=published.time_steps))
        runs.setdefault(rest, {}).setdefault(result.recipe.time_steps, []).append(result)
    for by_steps in runs.values():
        leads = {steps: lead for steps, group in by_steps.items() if (lead := _clif_lead(group))}
        if len(leads) > 1:
            fewest, most = min(leads), max(leads)
            if difference := paired_difference(leads[most], leads[fewest]):
                text = f"CLIF's lead over its authors' LIF grows from T = {fewest} to T = {most}"
                yield Claim(text, by_steps[most][0], "", difference)


def _clif_lead(group: Sequence[Result]) -> dict[int, float]:
    clif, baseline = CLIF
    accuracies = {(r.recipe.neuron, r.recipe.seed): 100 * r.found["test_accuracy"] for r in group}
    return {
        seed: accuracy - accuracies[baseline, seed]
        for (neuron, seed), accuracy in accuracies.items()
        if neuron == clif and (baseline, seed) in accuracies
    }


def _last(result: Result, name: str) -> dict[str, float]:
    """A figure of every layer after the last epoch."""
    return by_layer(result.found["history"][-1], name)


def _accuracies(runs: Runs, neuron: str) -> dict[int, float]:
    return {seed: 100 * result.found["test_accuracy"] for seed, result in runs.get(neuron, {}).items()}


def _difference(runs: Runs, neuron: str, other: str) -> Difference | None:
    return paired_difference(_accuracies(runs, neuron), _accuracies(runs, other))


def _published_difference(runs: Runs, higher: str, lower: str) -> str:
    """The difference that the recipe's source prints, where it prints both."""
    recipe = load_recipe(_any(runs).recipe.name)
    figures = [recipe.published.get(neuron, {}).get(recipe.time_steps) for neuron in (higher, lower)]
    return f"{figures[0] - figures[1]:+.2f}" if figures[0] is not None and figures[1] is not None else ""


def _any(runs: Runs) -> Result:
    """One of the runs, for what they all share."""
    return next(iter(next(iter(runs.values())).values()))


def _steps(runs: Runs) -> int:
    return _any(runs).recipe.time_steps


def _share(layers: Iterable[bool]) -> float:
    """In per cent."""
    listed = list(layers)
    return 100 * sum(listed) / len(listed)
