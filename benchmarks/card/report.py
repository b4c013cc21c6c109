"""What the records say: a table that fits on a screen, a page, and a plot."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from benchmarks.card.run import FAILED, OK, SKIPPED, Record

MOST_CHARACTERS = 12_000  # of the summary
ORDER = (
    "fused", "fused + LoRA", "bitsandbytes", "bitsandbytes + LoRA", "dequantise + cuBLAS", "cuBLAS bf16",
    "Unsloth's order + LoRA", "compiled + LoRA",
)  # fmt: skip
SHORT = dict(zip(ORDER, ("fused", "fused+r16", "bnb", "bnb+r16", "deq+cuBLAS", "cuBLAS", "Unsloth+r16", "compiled+r16"),
                 strict=True))  # fmt: skip


IN_SUMMARY = ("Duration", "Compute (SM)", "Memory Throughput", "Achieved Occupancy")  # of ncu's metrics


# ---- Parts ----------------------------------------------------------------------------------------------------------


def of_kind(records: Iterable[Record], *kinds: str) -> list[Record]:
    return [record for record in records if record["kind"] in kinds]


def microseconds(record: Record | None) -> str:
    """Three digits."""
    if record is None or record.get("status") != OK:
        return "–"
    value = record["median"] * 1e6
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}"


def heading(records: Sequence[Record]) -> list[str]:
    """What was measured, and where."""
    found = of_kind(records, "environment")
    if not found:
        return ["nothing is known of the machine"]
    e = found[-1]
    packages = ", ".join(f"{name} {version}" for name, version in e["packages"].items() if version)
    missing = ", ".join(name for name, version in e["packages"].items() if not version)
    tools = ", ".join(name for name, path in e["tools"].items() if path)
    lines = [
        f"{e['card']}" + (f", sm_{e['capability'].replace('.', '')}" if "capability" in e else "")
        + (f", {e['multiprocessors']} multiprocessors, {e['memory_bytes'] / 1e9:.0f} GB, L2 {e['l2_bytes'] >> 20} MiB"
           if "capability" in e else ""),
        f"torch {e['torch']}, CUDA {e['torch_cuda']}, nvcc {e.get('nvcc', 'missing')}, Python {e['python']}, "
        f"commit {e['commit'] or 'unknown'}",
        f"packages: {packages}; without {missing or 'none'}",
        f"tools: {tools}",
    ]  # fmt: skip
    if state := e.get("state"):
        lines.append(f"state: {state}")
    if e["device"] != "cuda":
        lines.append(f"A REHEARSAL on {e['device']}: its times say nothing.")
    return lines


def steps(records: Sequence[Record]) -> Iterator[str]:
    for record in of_kind(records, "step"):
        counts = ", ".join(f"{count} {status}" for status, count in record.get("cases", {}).items())
        reason = f": {record['reason']}" if "reason" in record else ""
        seconds = f"{record['seconds']:6.1f} s" if "seconds" in record else ""
        yield f"{record['status']:7} {seconds}  {record['phase']} / {record['step']} ({counts}){reason}"[:200]


def failures(records: Sequence[Record]) -> Iterator[str]:
    for record in records:
        if record.get("status") == FAILED and record["kind"] != "step":
            sticky = f"; the device then said {record['sticky']}" if "sticky" in record else ""
            yield f"{record['step']} / {record.get('name', '')}: {record.get('reason', '')}{sticky}"[:300]


def skips(records: Sequence[Record]) -> Iterator[str]:
    """Reasons, each with how many cases it is of."""
    counts: dict[tuple[str, str], int] = {}
    for record in records:
        if record.get("status") == SKIPPED and record["kind"] != "step":
            key = record["step"], record.get("reason", "")
            counts[key] = counts.get(key, 0) + 1
    for (step, reason), count in counts.items():
        yield f"{step}: {count} × {reason}"[:300]


def linear_tables(records: Sequence[Record]) -> Iterator[tuple[str, list[list[str]]]]:
    """For each shape and direction a table: a row for each M, the microseconds of each contender, and the share of the
    measured ceilings that the first has."""
    times = [record for record in of_kind(records, "time") if "m" in record]
    groups: dict[tuple[int, int, str], dict[int, dict[str, Record]]] = {}
    for r in times:
        groups.setdefault((r["n"], r["k"], r["direction"]), {}).setdefault(r["m"], {})[r["contender"]] = r
    for (n, k, direction), rows in groups.items():
        names = [name for name in ORDER if any(name in row for row in rows.values())]
        table = [["M", *(SHORT[name] for name in names), "share"]]
        for m, row in sorted(rows.items()):
            share = row.get("fused", {}).get("share_of_ceiling")
            table.append([str(m), *(microseconds(row.get(name)) for name in names), f"{share:.0%}" if share else ""])
        yield f"{n} x {k}, {direction}, µs", table


def family_table(records: Sequence[Record]) -> list[list[str]]:
    pairs: dict[tuple[str, str, str], dict[str, Record]] = {}
    for r in of_kind(records, "time"):
        if "family" in r:
            pairs.setdefault((r["family"], r["case"], r["direction"]), {})[r["contender"]] = r
    table = [["family", "case", "direction", "fused µs", "stock µs", "share"]]
    for (family, case, direction), row in pairs.items():
        share = row.get("fused", {}).get("share_of_ceiling")
        times = microseconds(row.get("fused")), microseconds(row.get("stock"))
        table.append([family, case, direction, *times, f"{share:.0%}" if share else ""])
    return table if len(table) > 1 else []


def model_table(records: Sequence[Record]) -> list[list[str]]:
    table = [["model", "contender", "ms", "tokens/s", "peak GB"]]
    for r in of_kind(records, "model"):
        if r.get("status") == OK and "median" in r:
            peak = f"{r['peak_bytes'] / 1e9:.2f}" if "peak_bytes" in r else ""
            table.append(
                [r["what"], r["contender"], f"{r['median'] * 1e3:.2f}", f"{r['tokens'] / r['median']:.0f}", peak]
            )
    return table if len(table) > 1 else []


def aligned(table: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return [" ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table]


def markdown(table: Sequence[Sequence[str]]) -> list[str]:
    head, *rows = (f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in table)
    return [head, "|" + "---|" * len(table[0]), *rows]


# ---- Summary --------------------------------------------------------------------------------------------------------


def summary(records: Sequence[Record], limit: int = MOST_CHARACTERS) -> str:
    """Failures first, then how the steps went, then figures; what does not fit is said to be in the files."""
    lines = ["", *heading(records)]
    for title, part in (("FAILED", failures(records)), ("Steps", steps(records)), ("Skipped", skips(records))):
        if found := list(part):
            lines += ["", title, *found]
    if found := [f"{r['name']}: {r['text']} ({r['phase']})" for r in of_kind(records, "ceiling") if r["status"] == OK]:
        lines += ["", "Ceilings", *found]
    for title, table in linear_tables(records):
        lines += ["", title, *aligned(table)]
    for table in (family_table(records), model_table(records)):
        lines += ["", *aligned(table)] if table else []
    for r in of_kind(records, "launch"):
        shown = [f"{name} {value:g}" for name, value in r["metrics"].items() if name.startswith(IN_SUMMARY)]
        lines.append(f"ncu, {r['name'][:60]}: {', '.join(shown)}")
    for r in of_kind(records, "backend", "model"):
        if r.get("attention"):
            lines.append(f"attention, {r['name']}: {', '.join(r['attention'])}"[:300])
    return clipped(lines, limit)


def clipped(lines: Sequence[str], limit: int) -> str:
    """As many of the lines as fit, and how many did not."""
    text = "\n".join(lines)
    if len(text) <= limit:
        return text
    kept, size = [], 0
    for line in lines:
        if size + len(line) + 1 > limit - 60:
            break
        kept.append(line)
        size += len(line) + 1
    return "\n".join([*kept, f"… {len(lines) - len(kept)} more lines: see card.md and the records"])


# ---- Page and plot --------------------------------------------------------------------------------------------------


def page(records: Sequence[Record]) -> str:
    """Everything, as Markdown."""
    card = next((r["card"] for r in reversed(records) if r["kind"] == "environment"), "an unknown card")
    lines = [f"# {card}", "", *(f"- {line}" for line in heading(records))]
    for title, part in (("Failures", failures(records)), ("Skipped", skips(records))):
        if found := list(part):
            lines += ["", f"## {title}", "", *(f"- {line}" for line in found)]
    table = [["step", "status", "seconds", "cases", "reason"]]
    for r in of_kind(records, "step"):
        counts = ", ".join(f"{count} {status}" for status, count in r.get("cases", {}).items())
        table.append(
            [f"{r['phase']} / {r['step']}", r["status"], str(r.get("seconds", "")), counts, r.get("reason", "")]
        )
    lines += ["", "## Steps", "", *markdown(table)]
    if ceilings := of_kind(records, "ceiling"):
        table = [["ceiling", "phase", "measured"]]
        table += [[r["name"], r["phase"], r.get("text", r.get("reason", ""))] for r in ceilings]
        lines += ["", "## Ceilings, on random numbers", "", *markdown(table)]
    if checks := [r for r in of_kind(records, "check") if "share" in r]:
        worst: dict[str, Record] = {}
        for r in checks:
            worst[r["step"]] = max(worst.get(r["step"], r), r, key=lambda r: r["share"])
        table = [["family", "case that is nearest to its bound", "result", "error", "bound"]]
        table += [
            [step, r["name"], r.get("what", ""), f"{r['error']:.3g}", f"{r.get('bound', 0):.3g}"]
            for step, r in worst.items()
        ]
        lines += ["", "## Errors against fp64", "", *markdown(table)]
    if tables := list(linear_tables(records)):
        text = "Medians. The share is what the fused layer without LoRA reaches of the measured copy and product."
        lines += ["", "## Linear layers", "", text]
    for title, table in tables:
        lines += ["", f"### {title}", "", *markdown(table)]
    for title, table in (("Other families", family_table(records)), ("A model of four layers", model_table(records))):
        if table:
            lines += ["", f"## {title}", "", *markdown(table)]
    for r in of_kind(records, "tune"):
        lines += ["", f"## {r['name']}: {r['status']}", "", "```", r.get("output", "").strip(), "```"]
    for r in of_kind(records, "launch"):
        table = [["metric", "value"], *([name, f"{value:g}"] for name, value in r["metrics"].items())]
        lines += ["", f"## ncu: {r['name']}", "", *markdown(table)]
    for r in of_kind(records, "backend", "model"):
        if r.get("attention") or r.get("table"):
            lines += ["", f"## Profile: {r['name']}", "", f"Attention: {', '.join(r.get('attention', ())) or 'none'}"]
        if r.get("table"):
            lines += ["", "```", r["table"], "```"]
    return "\n".join(lines) + "\n"


def plot(records: Sequence[Record], path: Path) -> None:
    """For each shape and direction the times by rows, of each contender, with their quartiles.

    Raises:
        ImportError: matplotlib is not here.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    times = [r for r in of_kind(records, "time") if "m" in r and r["status"] == OK]
    groups: dict[str, list[Record]] = {}
    for r in times:
        groups.setdefault(f"{r['n']} x {r['k']}, {r['direction']}", []).append(r)
    count = max(1, len(groups))
    with pyplot.rc_context({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = pyplot.subplots(
            -(-count // 2), min(2, count), figsize=(10, 3 * -(-count // 2)), layout="constrained", squeeze=False
        )
        for axis in axes.flat[len(groups) :]:
            axis.set_axis_off()
        for axis, (title, group) in zip(axes.flat, groups.items(), strict=False):
            for number, name in enumerate(ORDER):
                line = sorted((r for r in group if r["contender"] == name), key=lambda r: r["m"])
                if line:
                    medians, rows = [r["median"] * 1e6 for r in line], [r["m"] for r in line]
                    low, high = ([r[key] * 1e6 for r in line] for key in ("quartile1", "quartile3"))
                    axis.plot(rows, medians, marker="o", markersize=3, color=f"C{number}", label=SHORT[name])
                    axis.fill_between(rows, low, high, color=f"C{number}", alpha=0.2, linewidth=0)
            axis.set(xscale="log", yscale="log", title=title, xlabel="rows", ylabel="µs")
            axis.set_xscale("log", base=2)
            axis.grid(color="#eaeef2", linewidth=0.6)
            axis.legend(frameon=False, fontsize=6)
        figure.suptitle(
            "\n".join(line for line in heading(records) if not line.startswith(("packages", "tools"))),
            x=0.01,
            ha="left",
            fontsize=7,
        )
        figure.savefig(path, dpi=130)
        pyplot.close(figure)
