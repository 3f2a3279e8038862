"""tools/benchmark.py from its command line, on the smallest inputs; never what it measures."""

import csv

import pytest
from conftest import run


def swin_macs(side):
    """Of Swin-T by hand, for a square image; maps are padded to whole windows of 7 around the attention."""
    total = 48 * 96 * (side // 4) ** 2
    for channels, stride, depth in ((96, 4, 2), (192, 8, 2), (384, 16, 6), (768, 32, 2)):
        tokens, padded = (side // stride) ** 2, (-(-side // stride // 7) * 7) ** 2
        total += depth * (padded * (4 * channels**2 + 2 * 49 * channels) + tokens * 8 * channels**2)
        total += tokens * 2 * channels**2 * (stride > 4)  # merging: 2 C inputs of four tokens' C / 2
    return total


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
    assert float(swin[0]["gmacs"]) == pytest.approx(swin_macs(64) / 1e9, rel=0.01)
    assert all(float(row["median"]) > 0 and float(row["peak_mb"]) > 0 for row in rows)
    assert "TiC-tiny" in (tmp_path / "benchmark.md").read_text() and "TiC-tiny" in out
    assert (tmp_path / "benchmark.png").stat().st_size > 5000
