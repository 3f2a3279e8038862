"""Turn the lines of run.py into a table and a chart for every study, those of resolution.py into one of each.

    python tools/experiments/report.py work_dirs/experiments/*.jsonl --out docs/evidence

Differences are to the study's first contestant, seed by seed, with the p of a paired t test (two-sided, not corrected
for the number of contestants).
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import matplotlib
from scipy.stats import ttest_rel

sys.path.insert(0, str(Path(__file__).parent))
from contestants import STUDIES
from run import SETTINGS

matplotlib.use("Agg")
from matplotlib import pyplot as plt


@dataclass
class Row:
    """One contestant; accuracies in percent."""

    name: str
    finals: dict[int, float]  # by seed
    mean: float
    deviation: float | None  # of the seeds
    difference: float | None  # mean over the seeds that the first contestant has too
    p: float | None
    parameters: int
    minutes: float


def rows(runs: Sequence[SimpleNamespace]) -> Iterator[Row]:
    """In the order in which the contestants appear; the first is what the others are compared with."""
    base: dict[int, float] = {}
    for name in dict.fromkeys(run.contestant for run in runs):
        own = [run for run in runs if run.contestant == name]
        finals = {run.seed: 100 * run.final for run in own}
        shared = sorted(finals.keys() & base.keys())
        pairs = [finals[s] for s in shared], [base[s] for s in shared]
        values = list(finals.values())
        yield Row(
            name,
            finals,
            statistics.mean(values),
            statistics.stdev(values) if len(values) > 1 else None,
            statistics.mean(a - b for a, b in zip(*pairs)) if shared else None,
            float(ttest_rel(*pairs).pvalue) if len(shared) > 1 else None,
            own[0].parameters,
            statistics.mean(run.seconds for run in own) / 60,
        )
        base = base or finals


def table(found: list[Row]) -> str:
    lines = ["| contestant | seeds | top-1, % | sd | difference | p | parameters | CPU minutes |", "|---" * 8 + "|"]
    for r in found:
        cells = [
            r.name,
            len(r.finals),
            f"{r.mean:.2f}",
            "" if r.deviation is None else f"{r.deviation:.2f}",
            "" if r.difference is None else f"{r.difference:+.2f}",
            "" if r.p is None or math.isnan(r.p) else f"{r.p:.3f}",
            f"{r.parameters:,}",
            f"{r.minutes:.1f}",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def draw(found: list[Row], title: str, path: Path) -> None:
    figure, axis = plt.subplots(figsize=(7, 0.8 + 0.32 * len(found)), layout="constrained")
    for i, row in enumerate(reversed(found)):
        axis.plot(list(row.finals.values()), [i] * len(row.finals), "o", color="tab:blue", alpha=0.5)
        axis.plot(row.mean, i, "|", color="black", markersize=14)
    axis.set_yticks(range(len(found)), [row.name for row in reversed(found)])
    axis.axvline(found[0].mean, color="gray", lw=0.8)
    axis.set_xlabel("top-1, %")
    axis.set_title(title, fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def resolution(lines: list[dict]) -> str:
    """Two tables of the lines of resolution.py: accuracies over the size, and what padding changes."""
    sizes = [line for line in lines if not line["pad"]]
    text = f"Top-1, %\n\n{over(sizes, 'scale', 'accuracy', 'x {:g}')}"
    if padded := [line for line in lines if line["pad"]]:
        text += f"\nPredictions that padding changes, %\n\n{over(padded, 'pad', 'changed', 'padded {:.0%}')}"
    return text


def over(lines: list[dict], condition: str, value: str, unit: str) -> str:
    """Of each contestant the mean over seeds of `value`, in percent, over the values of `condition`."""
    columns = sorted({line[condition] for line in lines})
    text = (
        "| contestant | mosaic | zoom | steps | seeds | "
        + " | ".join(unit.format(column) for column in columns)
        + " |\n"
    )
    text += "|---" * (len(columns) + 5) + "|\n"
    for own in by_network(lines):
        found = ([100 * line[value] for line in own if line[condition] == column] for column in columns)
        about = (
            own[0]["contestant"],
            own[0]["mosaic"],
            f"{own[0]['zoom']:g}",
            own[0]["epochs"] * own[0]["steps"],
            len({r["seed"] for r in own}),
        )
        cells = [*map(str, about), *(f"{statistics.mean(tops):.1f}" if tops else "" for tops in found)]
        text += "| " + " | ".join(cells) + " |\n"
    return text


def by_network(lines: list[dict]) -> list[list[dict]]:
    """The lines of one contestant under one budget, tested on the same part of the pictures, together."""
    found: dict[tuple, list[dict]] = {}
    for line in lines:
        found.setdefault(tuple(line[key] for key in ("contestant", *SETTINGS, "part")), []).append(line)
    return list(found.values())


def draw_sizes(lines: list[dict], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    colors: dict[str, str] = {}
    for own in by_network([line for line in lines if not line["pad"]]):
        scales = sorted({line["scale"] for line in own})
        tops = [statistics.mean(100 * line["accuracy"] for line in own if line["scale"] == scale) for scale in scales]
        name, mosaic, zoom = (own[0][key] for key in ("contestant", "mosaic", "zoom"))
        label = f"{name}, mosaic {mosaic}" + f", zoom {zoom:g}" * (zoom > 1)
        color = colors.setdefault(name, f"C{len(colors)}")
        axis.plot(scales, tops, "-" if zoom == 1 else "--", marker=".", label=label, color=color)
    axis.set_xscale("log", base=2)
    ticks = sorted({line["scale"] for line in lines})
    axis.set_xticks(ticks, [f"{scale:g}" for scale in ticks])
    axis.set(xlabel="size of the pictures, in that of training", ylabel="top-1, %")
    axis.legend(fontsize=7)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def comparisons(study: str, runs: Sequence[SimpleNamespace]) -> Iterator[tuple[tuple, list[Row], list[str]]]:
    """Of each budget under which a study's first contestant ran with others: the budget, rows, the code's commits."""
    names = STUDIES[study]
    for budget in dict.fromkeys(tuple(getattr(run, key) for key in SETTINGS) for run in runs):
        chosen = [run for run in runs if tuple(getattr(run, key) for key in SETTINGS) == budget]
        chosen = [run for name in names for run in chosen if run.contestant == name]
        found = list(rows(chosen))
        if len(found) > 1 and found[0].name == names[0]:
            yield budget, found, sorted({run.commit for run in chosen})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=Path("docs/evidence"))
    args = parser.parse_args()
    lines = [json.loads(line) for path in args.results for line in path.read_text().splitlines()]
    runs = [SimpleNamespace(**line) for line in lines if "scale" not in line]
    args.out.mkdir(parents=True, exist_ok=True)
    if tested := [line for line in lines if "scale" in line]:
        text = f"# resolution\n\n{resolution(tested)}"
        (args.out / "resolution.md").write_text(text)
        draw_sizes(tested, args.out / "resolution.png")
        print(text)
    for study in STUDIES:
        text = f"# {study}\n"
        for i, (budget, found, commits) in enumerate(comparisons(study, runs), 1):
            described = ", ".join(f"{key} {value}" for key, value in zip(SETTINGS, budget))
            text += f"\n{described}\n\n{table(found)}\n"
            if len(commits) > 1:
                text += f"\nThe code was that of {', '.join(commits)}.\n"
            draw(found, described, args.out / f"{study}-{i}.png")
        if "|" in text:
            (args.out / f"{study}.md").write_text(text)
            print(text)


if __name__ == "__main__":
    main()
