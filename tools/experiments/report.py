"""Turn the lines of run.py into a table and a chart for every study.

    python tools/experiments/report.py work_dirs/experiments/results.jsonl --out docs/evidence

Differences are to the study's first contestant, seed by seed, with the p of a paired t test (two-sided, not corrected
for the number of contestants).
"""

import argparse
import json
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
    lines = ["| contestant | seeds | top-1, % | sd | difference | p | parameters | minutes |", "|---" * 8 + "|"]
    for r in found:
        cells = [
            r.name,
            len(r.finals),
            f"{r.mean:.2f}",
            "" if r.deviation is None else f"{r.deviation:.2f}",
            "" if r.difference is None else f"{r.difference:+.2f}",
            "" if r.p is None else f"{r.p:.3f}",
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
    axis.set(xlabel="top-1, %", title=title)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/evidence"))
    args = parser.parse_args()
    runs = [SimpleNamespace(**json.loads(line)) for line in args.results.read_text().splitlines()]
    args.out.mkdir(parents=True, exist_ok=True)
    budgets = dict.fromkeys(tuple(getattr(run, key) for key in SETTINGS) for run in runs)
    for study, names in STUDIES.items():
        text = f"# {study}\n"
        for i, budget in enumerate(budgets):
            chosen = [run for run in runs if tuple(getattr(run, key) for key in SETTINGS) == budget]
            found = list(rows([run for name in names for run in chosen if run.contestant == name]))
            if len(found) < 2:
                continue
            described = ", ".join(f"{key} {value}" for key, value in zip(SETTINGS, budget))
            text += f"\n{described}\n\n{table(found)}\n"
            draw(found, described, args.out / f"{study}-{i + 1}.png")
        (args.out / f"{study}.md").write_text(text)
        print(text)


if __name__ == "__main__":
    main()
