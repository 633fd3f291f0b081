"""An inspection as one HTML file, which loads nothing from a network and suits light and dark screens and phones."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from itertools import count

from .charts import COLOURS, MARK, Chart, layer_charts, overview_charts
from .findings import Finding, grouped
from .learned import LearnedParameter
from .result import Inspection, LayerInspection
from .tables import TEXTS, bounds_of, counted, layer_table, operations_text

STYLE = """
:root { color-scheme: light dark; --ink: #1c2127; --dim: #5c6570; --paper: #fff; --card: #f5f6f8; --line: #d9dde2;
  --warn: #9a3b00; --warn-card: #fff4ec; --good: #00694c; --good-card: #eaf6f1; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --dim: #9aa4b0; --paper: #14181d; --card: #1d232a;
  --line: #333c46; --warn: #ffb27d; --warn-card: #33221a; --good: #6fd3b0; --good-card: #16302a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p { margin: .4rem 0; max-width: 46rem; } .dim { color: var(--dim); }
.finding { border-left: .3rem solid var(--warn); background: var(--warn-card); padding: .6rem .9rem; margin: .6rem 0;
  border-radius: .3rem; }
.finding ul { margin: .2rem 0; padding-left: 1.2rem; }
.finding b { color: var(--warn); } .good { border-color: var(--good); background: var(--good-card); }
.good b { color: var(--good); }
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: .3rem; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .65rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { color: var(--dim); font-weight: 600; } tr:last-child td { border-bottom: 0; }
th:first-child, td:first-child, .text, .parameters td, .parameters th { text-align: left; }
td:first-child { font-weight: 600; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); gap: .75rem; }
figure { margin: 0; padding: .5rem .6rem; background: var(--card); border-radius: .3rem; }
figcaption { font-size: .875rem; font-weight: 600; } svg { width: 100%; height: auto; display: block; }
svg text { font-family: inherit; }
details { margin: .6rem 0; border: 1px solid var(--line); border-radius: .3rem; padding: .2rem .8rem; }
summary { cursor: pointer; padding: .4rem 0; font-weight: 600; overflow-wrap: anywhere; }
details[open] { padding-bottom: .8rem; }
.swatch { display: inline-block; width: .8rem; height: .8rem; border-radius: .15rem; margin-right: .4rem; }
dl { max-width: 46rem; } dt { font-weight: 600; margin-top: .5rem; } dd { margin: 0; color: var(--dim); }
code { font-size: .9em; }
"""

MEANINGS = {
    "rate": "Spikes per neuron and time step, over all inputs. Channels are sorted by their rate.",
    "never, always": "The share of neurons that fire at no time step of any input, or at every one.",
    "potential before firing": "Of a sample of inputs, the membrane potential on which firing is decided, less the "
    "threshold, in thresholds. The dashed line is the threshold.",
    "coverage": "The share of these potentials where the surrogate's gradient is above 1 % of its peak.",
    "temporal gradient": "The mean magnitude of ∂u[T] / ∂u[T−lag], the derivative of a neuron's last potential by its "
    "own earlier one, over the neurons that fire. <i>Fall a step</i> is the factor by which it falls with every time "
    "step back, the geometric mean over all lags.",
    "gradient": "The mean magnitude of ∂L / ∂u[t], of the loss by the potential at each time step, for one backward "
    "pass; in the table its mean over time.",
    "synaptic operations": "One for every spike and outgoing synapse of a convolution or fully connected layer whose "
    "input is all spikes.",
}


def page(inspections: Sequence[Inspection]) -> str:
    """The text of the HTML file."""
    title = html.escape(" and ".join(inspection.title for inspection in inspections))
    parts = [
        f"<h1>{title}</h1>",
        *_heads(inspections),
        *(part for inspection in inspections for part in _findings(inspection, len(inspections) > 1)),
        "<h2>Layers</h2>",
        _table(inspections),
        _figures(overview_charts(inspections)),
        "<h2>Each layer</h2>",
        *_layers(inspections),
        *_operations(inspections),
        "<h2>What the figures are</h2>",
        "<dl>" + "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in MEANINGS.items()) + "</dl>",
    ]
    body = "\n".join(parts)
    for number in count():
        if f"{MARK}" not in body:
            break
        # Each drawing is one element, so all names up to its end belong to it.
        end = body.index("</svg>", body.index(MARK)) + len("</svg>")
        body = body[:end].replace(MARK, f"p{number}-") + body[end:]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _swatch(position: int) -> str:
    return f'<span class="swatch" style="background: {COLOURS[position % len(COLOURS)]}"></span>'


def _heads(inspections: Sequence[Inspection]) -> Iterable[str]:
    for position, inspection in enumerate(inspections):
        mark = _swatch(position) if len(inspections) > 1 else ""
        yield (
            f'<p class="dim">{mark}{html.escape(inspection.title)}: <code>{html.escape(inspection.network)}</code>, '
            f"{counted(inspection.inputs, 'input')} in {counted(inspection.batches, 'batch', 'batches')}.</p>"
        )
        yield from (f'<p class="dim">{html.escape(note)}</p>' for note in inspection.notes)


def _findings(inspection: Inspection, named: bool) -> Iterable[str]:
    of_title = f" of {html.escape(inspection.title)}" if named else ""
    yield f"<h2>{counted(len(inspection.findings), 'finding').capitalize()}{of_title}</h2>"
    if not inspection.findings:
        yield '<div class="finding good"><b>Nothing is conspicuous.</b> Every figure is within its limits.</div>'
    yield from map(_finding, grouped(inspection.findings))


def _finding(group: Sequence[Finding]) -> str:
    """A box with the findings of one name."""
    layers = (f"<li><b>{html.escape(finding.layer)}</b>: {html.escape(finding.text)}</li>" for finding in group)
    meaning, help = html.escape(group[0].meaning), html.escape(group[0].help)
    return (
        f'<div class="finding"><b>{group[0].name}</b><ul>{"".join(layers)}</ul><p>{meaning}</p>'
        f'<p class="dim">What usually helps: {help}</p></div>'
    )


def _table(inspections: Sequence[Inspection]) -> str:
    columns, *rows = layer_table(inspections)
    kinds = [" class=text" if column in TEXTS else "" for column in columns]
    head = "".join(f"<th{kind}>{column}</th>" for column, kind in zip(columns, kinds, strict=True))
    lines = [
        "".join(f"<td{kind}>{html.escape(cell)}</td>" for cell, kind in zip(row, kinds, strict=True)) for row in rows
    ]
    body = "".join(f"<tr>{line}</tr>\n" for line in lines)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _figures(charts: Iterable[Chart]) -> str:
    figures = (f"<figure><figcaption>{html.escape(c.title)}</figcaption>{c.svg}</figure>" for c in charts)
    return f'<div class="charts" style="margin-top: .75rem">{"".join(figures)}</div>'


def _layers(inspections: Sequence[Inspection]) -> Iterable[str]:
    names = dict.fromkeys(name for inspection in inspections for name in inspection.layers)
    with_findings = {finding.layer for inspection in inspections for finding in inspection.findings}
    for position, name in enumerate(names):
        with_layer = [inspection for inspection in inspections if name in inspection.layers]
        layers = [(inspection.title, inspection.layers[name]) for inspection in with_layer]
        neurons = ", ".join(dict.fromkeys(layer.neuron for _, layer in layers))
        is_open = " open" if name in with_findings or position == 0 or len(names) <= 4 else ""
        yield f"<details{is_open}><summary>{html.escape(name)} <span class=dim>{html.escape(neurons)}</span></summary>"
        for title, layer in layers:
            yield f'<p class="dim">{html.escape(_in_words(layer, title if len(inspections) > 1 else ""))}</p>'
        yield _figures(layer_charts(layers))
        for title, layer in layers:
            yield _parameters(layer, title if len(inspections) > 1 else "")
        yield "</details>"


def _in_words(layer: LayerInspection, title: str) -> str:
    shape = " × ".join(map(str, layer.shape))
    text = f"{title + ': ' if title else ''}{shape} neurons, T = {layer.steps}."
    if layer.potential:
        text += f" Potentials: {layer.potential.values:,} of {counted(layer.potential.inputs, 'input')}."
    return " ".join([text, *(f"{note}." for note in layer.notes)])


def _parameters(layer: LayerInspection, title: str) -> str:
    if not layer.parameters:
        return ""
    head = "".join(f"<th>{c}</th>" for c in ("parameter", "values", "mean", "least", "most", "bounds", "at a bound"))
    body = "".join(f"<tr>{_parameter(name, parameter)}</tr>" for name, parameter in layer.parameters.items())
    caption = f'<p class="dim">{html.escape(title)}</p>' if title else ""
    return (
        f'{caption}<div class="wide" style="margin-top: .75rem"><table class="parameters">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _parameter(name: str, parameter: LearnedParameter) -> str:
    name = name if parameter.learned else f"{name} (fixed)"
    at_bound = "–" if parameter.bounds is None else f"{100 * parameter.at_bound:.1f} %"
    cells = (
        name,
        str(parameter.values),
        *(f"{v:.4g}" for v in (parameter.mean, parameter.low, parameter.high)),
        bounds_of(parameter),
        at_bound,
    )
    return "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)


def _operations(inspections: Sequence[Inspection]) -> Iterable[str]:
    known = [inspection for inspection in inspections if inspection.operations is not None]
    if not known:
        return
    yield "<h2>Operations and energy</h2>"
    for inspection in known:
        title = f"{html.escape(inspection.title)}. " if len(inspections) > 1 else ""
        yield f"<p>{title}{operations_text(inspection)}</p>"
    layers: dict[str, list[str]] = {}
    for inspection in known:
        for name, number in inspection.operations.synaptic_operations_by_layer.items():  # type: ignore[union-attr]
            layers.setdefault(name, []).append(f"{number:,.0f}")
    head = "".join(f"<th>{html.escape(i.title) if len(known) > 1 else 'synaptic operations'}</th>" for i in known)
    body = "".join(
        f"<tr><td>{html.escape(name)}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        for name, cells in layers.items()
    )
    yield (
        f'<div class="wide"><table class="operations"><thead><tr><th>synapses</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
