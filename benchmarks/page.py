"""Write docs/performance.md, and README's figure of fuse, from the results of every machine.

python benchmarks/page.py          # the texts
python benchmarks/page.py --draw   # the pictures as well
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path

from bench.report import LIMIT, NEURONS, OURS, any_of, compared, is_rival, losses, machines, ours
from bench.rows import Row

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
README = ROOT / "README.md"

BEGIN, END = "<!-- figure of fuse: benchmarks/page.py writes it -->", "<!-- end of the figure -->"
SHOWN = {"neuron": "fused-lif", "T": 8, "neurons": 1 << 20, "dtype": "float32", "threads": 2, "pass": "both"}
"""The measurement that README's figure shows: forward and backward of a layer."""

INTRODUCTION = """\
# Performance

`python benchmarks/page.py` generates this page from measurements. Every figure comes from a file
`benchmarks/results/*/results.csv`, which contains all rows with quartiles, errors and versions.

- **Ours** is the backend that `backend="auto"` chooses: `cpp` on the CPU, `cupy` on the GPU. A rival's `3.2x` means
  that it took 3.2 times as long as ours in the same run. A rival below 1 was faster.
- **Limit** is a copy (`Tensor.copy_`) of as many bytes as the pass must move: forward reads the input and writes the
  spikes; backward reads the input and the spikes' gradient and writes the input's gradient. `1.3x` means that ours took
  1.3 times as long as this copy. On a CPU it may be below 1, because our stores bypass the caches and those of `copy_`
  do not.
- Before anything is timed, its spikes and all its gradients are compared with the equations in float64. A provider that
  computes something else is *refused*, and one that raises an error has *failed*.
- Layers are `[T, N, C, H, W]` with up to 64 channels. States start at zero in every call, and `reset` is part of the
  time. Our neurons keep no final states (`keep_state=False`), like those of a training that resets after every batch.
  Inputs are random and give 10 to 40 % spikes. They are results of an operation, as they are in a network. Several
  inputs are used in turn. The gradient of the spikes is dense and random.
- Times are medians. GPU times come from CUDA events, with a cleared L2 cache; *graph* is a CUDA graph that is replayed.
  CPU times come from `torch.utils.benchmark`. On a CPU the providers of a workload take turns, several times, so that a
  slow minute of the machine affects all of them.
"""

NO_GPU = """
**GPU figures are missing**: no run on an NVIDIA GPU is among the results. `benchmarks/gpu.sh` makes one.
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks/page.py", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--out", type=Path, default=PAGE, metavar="FILE")
    parser.add_argument("--readme", type=Path, default=README, metavar="FILE", help="where to write the figure of fuse")
    parser.add_argument("--draw", action="store_true", help="draw the pictures of every machine first")
    options = parser.parse_args()
    if options.draw:
        from plot import draw_all

        for name, rows in machines(options.results).items():
            draw_all(options.results / name, rows)
    options.out.write_text(page(options.results))
    options.readme.write_text(with_figure(options.readme.read_text(), figure(machines(options.results))))
    print(options.out, options.readme)


def with_figure(readme: str, text: str) -> str:
    """README with this text between its marks."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"expected README to have the lines {BEGIN!r} and {END!r}, got one without")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def figure(found: dict[str, list[Row]]) -> str:
    """A text that says what fuse brings to a LIF layer or, if that has not been measured, how to measure it."""
    for rows in found.values():
        shown = [row for row in rows if row["allocator"] == "system" and SHOWN.items() <= row.items()]
        for group in compared(shown):
            own, rivals = ours(group), ("spikingjelly eager", "spikingjelly compiled")
            if own and all(name in group and group[name]["median_us"] for name in rivals):
                eager, compiled = (group[name]["median_us"] / own["median_us"] for name in rivals)
                return (
                    f"A fused `LIFNode` layer (T = 8, 2**20 neurons, float32, {own['device_name']}, two threads, "
                    f"`keep_state=False`) takes\n{duration(own)} forward and backward. "
                    f"SpikingJelly {own['spikingjelly']} itself takes {eager:.1f} times as long, and "
                    f"{compiled:.1f} times\nunder `torch.compile`."
                )
    return "`python benchmarks/run.py --suite cpu --workload fused` measures on your machine what that brings."


def page(results: Path) -> str:
    found = machines(results)
    parts = [INTRODUCTION]
    if not any(row["device"] == "cuda" for rows in found.values() for row in rows):
        parts.append(NO_GPU)
    for name, rows in found.items():
        parts += machine(name, rows, sorted(path.name for path in (results / name).glob("*.svg")))
    return "\n".join(parts)


def machine(name: str, rows: list[Row], pictures: list[str]) -> Iterator[str]:
    first = rows[0]
    suffix = ", freed memory kept by the allocator" if first["allocator"] == "keeping" else ""
    yield f"## {first['device_name']}{suffix}\n"
    versions = [
        f"{tool} {first[tool]}" for tool in ("driver", "cuda", "python", "torch", "cupy", "triton") if first[tool]
    ]
    commits, dates = (sorted({row[name] for row in rows}) for name in ("commit", "date"))
    measured = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    link = f"[All rows](../benchmarks/results/{name}/results.csv)"
    yield f"{', '.join(versions)}; commit {', '.join(commits)}; {measured}. {link}.\n"
    layers = [row for row in rows if row["suite"] in ("kernels", "cpu")]
    for neuron, title in NEURONS.items():
        groups = compared(row for row in layers if row["neuron"] == neuron)
        if groups:
            yield f"### {title}\n"
            yield from layer_table(groups)
            yield from (picture(name, file) for file in pictures if file.endswith(f"-{neuron}.svg"))
    yield from overhead_table(compared(row for row in rows if row["suite"] == "overhead"))
    yield from memory_table(compared(row for row in rows if row["launch"] == "memory"))
    yield from training_table(compared(row for row in rows if row["suite"] == "training"))
    yield from (picture(name, file) for file in pictures if not file.startswith("growth"))
    yield from lost(rows)
    yield from left_out(rows)
    yield from configurations(rows)


def layer_table(groups: list[dict[str, Row]]) -> Iterator[str]:
    rivals = sorted({name for group in groups for name, row in group.items() if is_rival(row)})
    head = ["workload", "pass", "ours", "% of copy bandwidth", "limit", *rivals]
    lines = []
    for group in groups:
        own, row = ours(group), any_of(group)
        limit = group.get(LIMIT)
        graph = ", graph" if row["launch"] == "graph" else ""
        cells = [short(row), row["pass"] + graph]
        cells += [duration(own), f"{own['percent_of_copy']:.0f}"] if own else [state(group), ""]
        ratio = own and limit and limit["median_us"] and own["median_us"] / limit["median_us"]
        cells += [f"{ratio:.3g}x" if ratio else ""]
        cells += [against(group.get(name), own) for name in rivals]
        lines.append(cells)
    yield table(head, lines)


def overhead_table(groups: list[dict[str, Row]]) -> Iterator[str]:
    hosts = [group for group in groups if any_of(group)["launch"].startswith(("host", "first"))]
    if not hosts:
        return
    yield "### Overhead\n"
    yield (
        "The host time of a call that has almost nothing to compute: that of a single layer, and that of each of eight "
        "further layers behind it, which no longer contains what a network pays once. Both are medians of the quietest "
        "of several rounds. *First* is the first training step in a new process: *cold* with empty caches of compiled "
        "kernels, *warm* with the caches that the cold one filled.\n"
    )
    names = sorted({name for group in hosts for name in group})
    lines = []
    for group in hosts:
        row = any_of(group)
        lines.append([short(row), row["pass"], row["launch"], *(duration(group.get(name)) for name in names)])
    yield table(["workload", "pass", "measured", *names], lines)


def memory_table(groups: list[dict[str, Row]]) -> Iterator[str]:
    if not groups:
        return
    yield "### Memory\n"
    yield (
        "*Kept* is the memory that a layer keeps for its backward, without its parameters. *Peak* is the most memory "
        "that its forward and backward use at one time. Both are multiples of the input's bytes.\n"
    )
    names = sorted({name for group in groups for name in group})
    lines = [[short(any_of(group)), *(memory(group.get(name)) for name in names)] for group in groups]
    yield table(["workload", *(f"{name}: kept, peak" for name in names)], lines)


def training_table(groups: list[dict[str, Row]]) -> Iterator[str]:
    if not groups:
        return
    yield "### Training\n"
    yield (
        "Images a second in whole training steps: forward, backward and Adam. Before they were timed, the neurons by "
        "themselves and then the losses of 32 steps from the same weights were compared with those of plain torch. "
        "Dropout is off.\n"
    )
    names = sorted({name for group in groups for name in group})
    lines = []
    for group in groups:
        cells = [
            f"{row['images_per_s']:.4g}" if (row := group.get(n)) and row["images_per_s"] else status(row)
            for n in names
        ]
        lines.append([any_of(group)["workload"], *cells])
    yield table(["task", *names], lines)


def lost(rows: Iterable[Row]) -> Iterator[str]:
    yield "### Where we lose\n"
    found = sorted(losses(rows), key=lambda loss: -loss[0])
    if not found:
        yield "No rival was faster than ours in any measurement of this run.\n"
        return
    lines = []
    for factor, row, own in found:
        measured = f"{row['pass']}, {row['launch']}"
        cells = [row["workload"], measured, row["provider"], duration(row), duration(own), f"{factor:.2f}x"]
        lines.append(cells)
    yield "These are all measurements in which a rival took less time than ours, the worst first.\n"
    yield table(["workload", "measured", "rival", "its time", "ours", "faster by"], lines)


def left_out(rows: Iterable[Row]) -> Iterator[str]:
    lines = [
        [row["workload"], row["provider"], f"{row['pass']}, {row['launch']}", row["status"].replace("|", "\\|")]
        for row in rows
        if row["status"] != "ok"
    ]
    if lines:
        yield "### Not timed\n"
        yield table(["workload", "provider", "pass", "why"], lines)


def configurations(rows: Iterable[Row]) -> Iterator[str]:
    yield "### Configurations\n"
    found = sorted({(row["provider"], row["configuration"], row["device"]) for row in rows})
    yield table(["provider", "configuration", "on"], [list(line) for line in found])


def short(row: Row) -> str:
    threads = f", {row['threads']} thread{'s' if row['threads'] > 1 else ''}" if row["threads"] else ""
    layout = "" if row["layout"] == "contiguous" else f", {row['layout']}"
    neuron = f"{row['neuron']}, " if row["suite"] in ("overhead", "memory") else ""
    return f"{neuron}T {row['T']}, {row['neurons']} neurons, {row['dtype']}{layout}{threads}"


def against(row: Row | None, own: Row | None) -> str:
    if row is None or not row["median_us"]:
        return status(row)
    return f"{row['median_us'] / own['median_us']:.3g}x" if own else duration(row)


def duration(row: Row | None) -> str:
    """The time of a row in a unit that fits it."""
    if row is None or not row["median_us"]:
        return status(row)
    factor, unit = next(pair for pair in ((1e6, "s"), (1e3, "ms"), (0, "µs")) if row["median_us"] >= pair[0])
    return f"{row['median_us'] / (factor or 1):.3g} {unit}"


def memory(row: Row | None) -> str:
    if row is None or row["saved_bytes"] is None:
        return status(row)
    return f"{row['saved_bytes'] / row['input_bytes']:.3f}, {row['peak_bytes'] / row['input_bytes']:.2f}"


def status(row: Row | None) -> str:
    return "" if row is None else row["status"].split(":")[0]


def state(group: dict[str, Row]) -> str:
    return status(group.get(OURS[any_of(group)["device"]])) or "not measured"


def picture(machine_name: str, file: str) -> str:
    return f"![{file.removesuffix('.svg')}](../benchmarks/results/{machine_name}/{file})\n"


def table(head: list[str], lines: list[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


if __name__ == "__main__":
    main()
