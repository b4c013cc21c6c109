"""All that one wants to know of a CUDA card that the project has never met, within half an hour.

`python -m benchmarks card correctness`, then `timing`, `profile` and `report`; without a phase all of them. Only this
machine's Python, torch and nvcc are needed, and no network. steps.py says what is run, and in what order.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.card.run import FAILED, SKIPPED, Record, Run, read
from benchmarks.card.steps import BUILD, ENVIRONMENT, PHASES, STEPS

RESULTS = Path(__file__).parents[1] / "results"
REPORT = "report"
DEVICES = ("cuda", "emulated", "cpu")
MOST_MINUTES = 9.0  # of a phase


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks card", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("phases", nargs="*", metavar="PHASE", help=f"of {', '.join((*PHASES, REPORT))} (all)")
    add("--device", choices=DEVICES, default="cuda", help="to rehearse without a card: emulated, or cpu (cuda)")
    add("--out", type=Path, metavar="DIR", help="for the files ($OUT, or else benchmarks/results/CARD)")
    add("--minutes", type=float, default=MOST_MINUTES, help="of a phase, at most (%(default)g)")
    add("--only", type=expression, default=re.compile(""), metavar="REGEX", help="only steps whose name has a match")
    add("--list", action="store_true", help="show the steps and their limits")
    given = parser.parse_args(arguments)
    for phase in given.phases:
        if phase not in (*PHASES, REPORT):
            parser.error(f"argument PHASE: got '{phase}', wanted some of {', '.join((*PHASES, REPORT))}")
    if given.minutes <= 0:
        parser.error(f"argument --minutes: got {given.minutes:g}, wanted a number above 0")
    phases = given.phases or (*PHASES, REPORT)
    steps = [step for step in STEPS if step.phase in phases and given.only.search(step.name)]
    if given.list:
        for step in steps:
            print(f"{step.phase:11} {step.limit:4g} s  {step.name}")
        return
    if not steps and REPORT not in phases:
        parser.error(f"argument --only: got '{given.only.pattern}', wanted one that the name of some step matches")

    if given.device == "emulated" and (reason := why_not_emulated()):
        parser.error(f"argument --device: got emulated, but {reason}")

    records: list[Record] = []
    folder = given.out or (Path(os.environ["OUT"]) if os.environ.get("OUT") else None)
    for phase in PHASES:
        chosen = [step for step in steps if step.phase == phase]
        if phase in phases and chosen:
            mode = "a" if given.only.pattern else "w"
            found, folder = run_phase(phase, chosen, given.device, 60 * given.minutes, folder, mode)
            records += found
    shown = records
    if REPORT in phases:
        shown = write_report(folder or find_folder(parser))
    from benchmarks.card.report import summary

    print(summary(shown))
    if any(record.get("status") == FAILED for record in records):
        sys.exit(1)


def why_not_emulated() -> str | None:
    from benchmarks import from_tests

    return from_tests.load("ptx_emulator").missing()


def expression(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"got '{text}', wanted a regular expression: {error}") from None


def run_phase(
    phase: str, steps, device: str, seconds: float, folder: Path | None, mode: str
) -> tuple[list[Record], Path]:
    """Finds out what the machine is, builds the module if there is none for it, and runs the steps."""
    import torch  # here, so that the steps' processes are forked with it; nothing may start CUDA in this one

    if device != "cuda":
        torch.set_num_threads(1)  # tiny problems, on which several would wait for each other
    run = Run(device, seconds, say)
    prelude(run)
    found = next((record for record in reversed(run.records) if record["kind"] == "environment"), {})
    rehearsal = "" if device == "cuda" else "-quick"  # git ignores what is so named, since it has no figures
    folder = folder or RESULTS / (name_of(found.get("card", device)) + rehearsal)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{phase}.jsonl").open(mode) as file:
        run.begin_file(file, phase)
        if refusal := found.get("module", {}).get("refusal", "the machine could not be asked"):
            for step in steps:
                run.skip(step, refusal)
        else:
            import peft_kernels  # noqa: F401  # forked with it, too

            run.steps(steps)
    return run.records, folder


def prelude(run: Run) -> None:
    run.step(ENVIRONMENT)
    environment = next((record for record in run.records if record["kind"] == "environment"), None)
    if not environment:
        return
    module = environment["module"]
    if not module["refusal"] and (module["cuda"] or run.device != "cuda"):
        return
    if run.step(BUILD)["status"] != FAILED:
        run.step(ENVIRONMENT)


def name_of(card: str) -> str:
    """A card's name as that of a folder."""
    return re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")


def find_folder(parser: argparse.ArgumentParser) -> Path:
    """Where the newest records are, for a report that no phase has gone before."""
    files = sorted(RESULTS.glob("*/correctness.jsonl"), key=lambda path: path.stat().st_mtime)
    if not files:
        parser.error("argument --out: got nothing, wanted the folder with the records of the phases")
    return files[-1].parent


def write_report(folder: Path) -> list[Record]:
    """The page and the plot of every phase's records in the folder; returns these."""
    from benchmarks.card import report

    records = [record for phase in PHASES if (path := folder / f"{phase}.jsonl").exists() for record in read(path)]
    page = folder / "card.md"
    page.write_text(report.page(records))
    say(f"saved   {page}")
    try:
        report.plot(records, folder / "card.png")
        say(f"saved   {folder / 'card.png'}")
    except ImportError as missing:
        records.append({"phase": REPORT, "step": "plot", "kind": "step", "status": SKIPPED, "reason": str(missing)})
    return records


def say(text: str) -> None:
    print(text, flush=True)
