"""A hook of MkDocs: a page for each machine in benchmarks/results, drawn from the files that benchmarks left there.

The tables of other pages that are made of these files are made anew.
"""

import csv
import json
import tempfile
from pathlib import Path

from mkdocs.structure.files import File

from benchmarks import figures, plot
from benchmarks.records import FUSED, RESULTS, beside, duration

LEGEND = (
    "A point of a plot is how many times as fast the fused operation was as another contender, by their medians. "
    "A bar is what the benchmark wanted of it. A table has the medians, and the same ratio behind them."
)


def table(rows):
    """Of dictionaries with the same keys, as Markdown."""
    return figures.markdown([list(rows[0]), *([str(cell) for cell in row.values()] for row in rows)]).rstrip()


def folded(title, text):
    return f'??? note "{title}"\n\n' + "\n".join(f"    {line}" for line in text.splitlines())


def numbers(row):
    """To four digits, and without flags."""
    cells = {name: cell for name, cell in row.items() if not isinstance(cell, bool)}
    return {name: f"{cell:.4g}" if isinstance(cell, float) else cell for name, cell in cells.items()}


def medians(records):
    """A row for each record of the fused operation."""
    others = dict.fromkeys(record.contender for record in records if record.contender != FUSED)
    rows = []
    for record in (record for record in records if record.contender == FUSED and record.samples):
        found = beside(record, records)
        cells = {name: found[name] for name in others if name in found and found[name].samples}
        ratios = {name: f"{duration(r.median)}, {r.median / record.median:.2f} ×" for name, r in cells.items()}
        row = {"case": record.case, "phase": record.phase, "kernels": record.isa, FUSED: duration(record.median)}
        rows.append(row | {name: ratios.get(name, "") for name in others})
    return table(rows)


def benchmark(path, image):
    """What a benchmark's CSV file has, with its plot drawn into `image`."""
    records, run = plot.read(path)
    plot.draw(records, run, image)
    with path.open(newline="") as file:
        roofline = next(csv.DictReader(file))["roofline"]
    conditions = f"{run['machine']}; {run['versions']}; commit {run['commit']}, {run['date'][:10]}. {roofline}."
    return f"{conditions}\n\n![{path.stem}]({image.name})\n\n{folded('Medians', medians(records))}"


def demo(path):
    """The tables of a demo's JSON file: lists of named numbers, and numbers by two names."""
    results = json.loads(path.read_text())
    parts = [f"{results['machine']}; {results['versions']}."]
    for key, value in results.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            rows = value
        elif isinstance(value, dict) and all(isinstance(item, dict) for item in value.values()):
            rows = [{key: name} | cells for name, cells in value.items()]
        else:
            continue
        parts.append(table([numbers(row) for row in rows]))
    return "\n\n".join(parts)


def machine_page(folder, images):
    """All files of a machine but those of quick runs, whose times mean little."""
    parts = [f"# {folder.name}", LEGEND]
    for path in sorted(path for path in folder.iterdir() if path.suffix in (".csv", ".json")):
        if "-quick" in path.stem:
            continue
        parts.append(f"## {path.stem}")
        if path.suffix == ".json":
            parts.append(demo(path))
        elif "breakdown" in path.stem:
            with path.open(newline="") as file:
                parts.append(folded("Where the time goes", table(list(csv.DictReader(file)))))
        else:
            parts.append(benchmark(path, images / f"{folder.name}-{path.stem}.svg"))
    return "\n\n".join(parts) + "\n"


def on_files(files, config):
    machines = sorted(path for path in RESULTS.glob("*") if path.is_dir())
    with tempfile.TemporaryDirectory() as folder:
        for machine in machines:
            page = machine_page(machine, Path(folder))
            files.append(File.generated(config, f"measurements/{machine.name}.md", content=page))
        for image in Path(folder).iterdir():
            files.append(File.generated(config, f"measurements/{image.name}", content=image.read_bytes()))
    links = [f"- [{machine.name}](measurements/{machine.name}.md)" for machine in machines]
    text = [
        "# All measurements",
        "Each page has the plots and tables of one machine. They are drawn when the documentation is built, from the "
        "files that the benchmarks wrote there. [Figures by machine](figures.md) says what they mean.",
        "\n".join(links) or "This copy of the sources has no measurements.",
    ]
    files.append(File.generated(config, "measurements.md", content="\n\n".join(text) + "\n"))
    return files


def on_page_markdown(markdown, **kwargs):
    return figures.written(markdown)
