"""The summary, the page and the plot of what a card's phases found."""

import pytest

from benchmarks.card import report, steps, timing


def many_records(failed=0):
    records = [
        {"kind": "check", "phase": "correctness", "step": "kernels", "name": f"case {i}", "status": "failed",
         "reason": "wrong"}
        for i in range(failed)
    ]  # fmt: skip
    for n, k in steps.SHAPES:
        for m in (*timing.FEW, *timing.SOME, *timing.MANY):
            for direction in (timing.FORWARD, timing.BOTH):
                for contender in timing.CONTENDERS:
                    records.append({
                        "kind": "time", "phase": "timing", "step": "linear", "name": "", "status": "ok", "m": m, "n": n,
                        "k": k, "direction": direction, "contender": contender, "median": 123.4e-6, "quartile1": 1e-4,
                        "quartile3": 2e-4, "share_of_ceiling": 0.5,
                    })  # fmt: skip
    return records


def test_the_summary_fits_on_a_screen():
    text = report.summary(many_records(failed=20))
    assert len(text) <= report.MOST_CHARACTERS and text.index("case 19: wrong") < text.index("4096 x 4096, forward, µs")
    assert text.rstrip().splitlines()[-1].startswith("… ") or "8192 x 28672, forward and backward" in text
    assert len(report.summary(many_records(failed=2000))) <= report.MOST_CHARACTERS


def test_page_and_plot(tmp_path):
    pytest.importorskip("matplotlib")
    records = many_records(failed=1)
    text = report.page(records)
    assert "### 8192 x 28672, forward and backward, µs" in text and "| 8192 | 123 |" in text and "case 0: wrong" in text
    report.plot(records, tmp_path / "card.png")
    assert (tmp_path / "card.png").stat().st_size > 10_000
