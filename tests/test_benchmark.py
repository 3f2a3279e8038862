"""tools/benchmark.py from its command line, on the smallest inputs; never what it measures."""

import csv

import pytest
from conftest import run


@pytest.mark.heavy
def test_backbones_are_compared_and_drawn(tmp_path):
    command = ["tools/benchmark.py", "--only", "backbone", "--models", "TiC-tiny", "Swin-T", "--sizes", "64", "64x96"]
    status, out, err = run(*command, "--rounds", 1, "--threads", 1, "--out", tmp_path)
    assert status == 0, err
    rows = list(csv.DictReader((tmp_path / "benchmark.csv").open()))
    assert [(r["name"], r["height"], r["width"]) for r in rows] == [
        (name, "64", width) for width in ("64", "96") for name in ("TiC-tiny", "Swin-T")
    ]
    swin = [row for row in rows if row["name"] == "Swin-T"]
    assert all(float(row["to_swin"]) == 1 for row in swin)
    assert float(swin[0]["gmacs"]) == pytest.approx(0.37, abs=0.05)  # 4.5 at 224, a bit more for windows half empty
    assert all(float(row["median"]) > 0 and float(row["peak_mb"]) > 0 for row in rows)
    assert "TiC-tiny" in (tmp_path / "benchmark.md").read_text() and "TiC-tiny" in out
    assert (tmp_path / "benchmark.png").stat().st_size > 5000
