"""What the papers claim of their neurons, beside what our runs say of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..classifier import by_layer
from ..recipe import load_recipe
from .paper_tables import size_name
from .summary import Difference, markdown_table, paired_difference

if TYPE_CHECKING:
    from .reproduction_page import Result

__all__ = ["Claim", "claims", "claims_table"]

CLIF = ("clif", "clif-baseline")
"""CLIF, and the LIF with which its authors compare it. With one time step they are one neuron."""

HIGHER = (
    ("KLIF is above LIF", "klif", "lif"),
    ("k alone helps: above LIF", "klif-only-k", "lif"),
    ("ReLU alone helps: above LIF", "klif-only-relu", "lif"),
    ("ReLU helps beside k: KLIF is above k alone", "klif", "klif-only-k"),
    ("k helps beside ReLU: KLIF is above ReLU alone", "klif", "klif-only-relu"),
    ("CLIF is above its authors' LIF", *CLIF),
    ("CLIF is above KLIF's LIF", "clif", "lif"),
    ("GLIF is above KLIF's LIF", "glif", "lif"),
)
"""Claims about the test accuracy: the first neuron's is higher than the second's."""

HALF = 50.0
"""More than this per cent of the layers are most layers."""


@dataclass(frozen=True)
class Claim:
    """A paper's claim that something is positive, and how large it was in our runs of one size.

    :param paper: the paper's own figure, or where it says so
    :param found: the mean over seeds, with its interval; the claim is that it is above 0
    :param above: what is added to ``found`` to print it: a share of layers is judged by how far it is above half
    :param equal: whether the claim is instead that ``found`` is 0 with every seed
    """

    text: str
    size: str
    paper: str
    found: Difference
    unit: str = "points"
    above: float = 0.0
    equal: bool = False

    @property
    def ours(self) -> str:
        """The figure with its interval."""
        if not self.above:
            figure, in_each_pair, _ = str(self.found).partition(" in each pair")
            return f"{figure} {self.unit}{in_each_pair}"
        interval = ""
        if self.found.low is not None and self.found.high is not None:
            low, high = (min(max(bound + self.above, 0.0), 100.0) for bound in (self.found.low, self.found.high))
            interval = f" [{low:.0f}, {high:.0f}]"
        return f"{self.found.mean + self.above:.0f}{interval} {self.unit}"

    @property
    def verdict(self) -> str:
        """*holds* or *does not hold* if the interval leaves out 0, or if three or more seeds give the same figure."""
        if self.equal and (self.found.mean != 0 or self.found.low is not None):
            return "**does not hold**"
        agree = self.found.pairs > 2 and self.found.low is None and (self.found.mean != 0 or self.equal)
        if not (self.found.is_clear or agree):
            return "cannot say, by one seed" if self.found.pairs < 2 else "cannot say"
        return "**holds**" if self.equal or self.found.mean > 0 else "**does not hold**"


def claims(results: Sequence[Result]) -> list[Claim]:
    """Every claim that the results say something about, those about one size after the other."""
    sizes: dict[str, dict[str, dict[int, Result]]] = {}
    for result in results:
        sizes.setdefault(result.size, {}).setdefault(result.recipe.neuron, {})[result.recipe.seed] = result
    judged = [claim for size, neurons in sizes.items() for claim in _of_size(size, neurons)]
    return judged + list(_of_growing_steps(results))


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
                f"[{each.size}](#{_anchor(each.size)})",
            ]
            for each in judged
        ],
    )


def _anchor(heading: str) -> str:
    """Where a heading's link leads, as GitHub and MyST make it."""
    return "".join(c for c in heading.lower() if c.isalnum() or c in "-_")


def _of_size(size: str, neurons: Mapping[str, Mapping[int, Result]]) -> Iterator[Claim]:
    for text, higher, lower in HIGHER:
        if difference := paired_difference(_accuracies(neurons, higher), _accuracies(neurons, lower)):
            if (higher, lower) == CLIF and next(iter(neurons[higher].values())).recipe.time_steps == 1:
                yield Claim("CLIF and its authors' LIF are equal at T = 1", size, "equal", difference, equal=True)
            else:
                yield Claim(text, size, _published_difference(neurons, higher, lower), difference)
    klif, lif = neurons.get("klif", {}), neurons.get("lif", {})
    above_one = {seed: _share(k > 1 for k in _last(result, "k").values()) for seed, result in klif.items()}
    if difference := _over_half(above_one):
        yield Claim("k ends above 1 in most layers", size, "Fig. 5", difference, "% of the layers", HALF)
    more_active = {
        seed: _share(
            rate > _last(lif[seed], "firing_rate")[layer] for layer, rate in _last(result, "firing_rate").items()
        )
        for seed, result in klif.items()
        if seed in lif
    }
    if difference := _over_half(more_active):
        yield Claim("KLIF fires more than LIF in most layers", size, "Fig. 6", difference, "% of the layers", HALF)


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
                yield Claim(text, by_steps[most][0].size, "", difference)


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


def _accuracies(neurons: Mapping[str, Mapping[int, Result]], neuron: str) -> dict[int, float]:
    return {seed: 100 * result.found["test_accuracy"] for seed, result in neurons.get(neuron, {}).items()}


def _published_difference(neurons: Mapping[str, Mapping[int, Result]], higher: str, lower: str) -> str:
    """The difference that the recipe's source prints, where it prints both."""
    recipe = load_recipe(next(iter(neurons[higher].values())).recipe.name)
    figures = [recipe.published.get(neuron, {}).get(recipe.time_steps) for neuron in (higher, lower)]
    return f"{figures[0] - figures[1]:+.2f}" if figures[0] is not None and figures[1] is not None else ""


def _share(layers: Iterable[bool]) -> float:
    """In per cent."""
    listed = list(layers)
    return 100 * sum(listed) / len(listed)


def _over_half(shares: Mapping[int, float]) -> Difference | None:
    return paired_difference(shares, dict.fromkeys(shares, HALF))
