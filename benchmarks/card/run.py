"""Runs steps one after another, each in a process of its own, and keeps what they record.

A step may end its process or spoil the device for it, as an illegal address does for every later call of CUDA: that is
recorded, and what is left of the step is tried in a fresh process. Every record is written as soon as it is made.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NoReturn

Record = dict[str, Any]
OK, FAILED, SKIPPED = "ok", "failed", "skipped"
LEAST = 3.0  # seconds: a step that has less is not begun
TAIL = 2000  # characters of what a failed step has printed that are kept
RAISED, SPOILED = 1, 75  # exit statuses of a step's process: it raised an error; the device answers it no more
MOST_PROCESSES = 20  # of one step


class NotHereError(Exception):
    """Raised by a step, or by a case of one, that this machine can't run; the text is the reason."""


class DeviceLostError(Exception):
    """The device answers this process no more."""


@dataclass(frozen=True)
class Step:
    """What runs in a process of its own.

    Attributes:
        limit: seconds.
        function: "module:name" in this package; it is called with a `Context`.
        needs: "cuda" for what only hardware can do.
        options: keyword arguments of the function.
        variables: of its environment.
    """

    phase: str
    name: str
    limit: float
    function: str
    needs: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)

    def __call__(self, context: Context) -> None:
        os.environ.update(self.variables)
        module, _, name = self.function.partition(":")
        getattr(importlib.import_module(f"benchmarks.card.{module}"), name)(context, **self.options)


@dataclass
class Context:
    """What a step knows, and how it tells what it finds.

    Attributes:
        device: "cuda", "emulated" or "cpu".
        records: of the steps before it.
        done: names of cases that an earlier process of the same step has tried.
        deadline: when the step should be ready, by `time.monotonic`; somewhat before its process is ended.
        send: takes what is found.
    """

    device: str
    records: Sequence[Record]
    deadline: float
    send: Callable[[Record], None]
    done: Collection[str] = ()

    @property
    def tensors_on(self) -> str:
        """The type of the device that tensors have to be on."""
        return "cuda" if self.device == "cuda" else "cpu"

    @property
    def is_rehearsal(self) -> bool:
        """Whether nothing is measured, so that the smallest problems do."""
        return self.device != "cuda"

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def record(self, kind: str, **fields: Any) -> None:
        self.send({"kind": kind, **fields})

    def run(self, kind: str, cases: Iterable[tuple[str, Callable[[], Record | None]]]) -> None:
        """Calls the cases by their names, and records how each ends and what it returns.

        Raises:
            DeviceLostError: the device answers no more; the cases behind are for another process.
        """
        for name, call in cases:
            if name in self.done:
                continue
            if self.left() <= 0:
                self.record(kind, name=name, status=SKIPPED, reason="the step's time was up")
                continue
            self.send({"begin": name})
            begin = time.monotonic()
            try:
                fields = {"status": OK} | (call() or {})
            except NotHereError as reason:
                fields = {"status": SKIPPED, "reason": str(reason)}
            except Exception as error:
                # A card may be too small for the numbers that are compared; that says nothing of the kernels.
                status = SKIPPED if "out of memory" in str(error) else FAILED
                fields = {"status": status, "reason": describe(error)}
                traceback.print_exc()
            if fields["status"] != OK and self.device == "cuda" and (reason := why_spoiled()):
                fields["sticky"] = reason
            self.record(kind, name=name, seconds=round(time.monotonic() - begin, 3), **fields)
            if "sticky" in fields:
                raise DeviceLostError


def describe(error: BaseException) -> str:
    """Its type and its first line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:500]


def why_spoiled() -> str | None:
    """What the device says when it is asked to finish its work, if that is an error."""
    import torch

    try:
        torch.cuda.synchronize()
    except Exception as error:
        return describe(error)
    return None


class Run:
    """The steps of one phase.

    Attributes:
        records: everything that was recorded.
    """

    def __init__(self, device: str, seconds: float, say: Callable[[str], None], file: IO[str] | None = None) -> None:
        """With the seconds that all steps have; records go to the file as lines of JSON."""
        self.device, self.say, self.file = device, say, file
        self.deadline = time.monotonic() + seconds
        self.records: list[Record] = []

    def steps(self, steps: Iterable[Step]) -> None:
        for step in steps:
            self.step(step)

    def begin_file(self, file: IO[str], phase: str) -> None:
        """From here on records go to a file, after those that there are; they are all of that phase."""
        before, self.records, self.file = self.records, [], file
        for record in before:
            self._write(record | {"phase": phase})

    def skip(self, step: Step, reason: str) -> None:
        self._keep(step, {"kind": "step", "status": SKIPPED, "reason": reason, "cases": {}, "seconds": 0.0})

    def step(self, step: Step) -> Record:
        """Runs one, and records how it went; returns that record."""
        begin, first = time.monotonic(), len(self.records)
        left = self.deadline - begin
        if step.needs == "cuda" and self.device != "cuda":
            outcome = {"status": SKIPPED, "reason": f"it needs a CUDA device, and this is {self.device}"}
        elif left < LEAST:
            outcome = {"status": SKIPPED, "reason": "the phase's time was up"}
        else:
            outcome = self._processes(step, begin + min(step.limit, left), left < step.limit)
        found = [record.get("status") for record in self.records[first:]]
        counts = {status: found.count(status) for status in (OK, FAILED, SKIPPED) if status in found}
        if outcome["status"] == OK and FAILED in counts:
            outcome |= {"status": FAILED, "reason": f"{counts[FAILED]} of {len(found)} cases"}
        elif outcome["status"] == OK and set(counts) == {SKIPPED}:
            outcome |= {"status": SKIPPED, "reason": self.records[-1]["reason"]}
        summary = {"kind": "step", **outcome, "cases": counts, "seconds": round(time.monotonic() - begin, 1)}
        if summary["status"] != FAILED:
            summary.pop("output", None)
        self._keep(step, summary)
        reason = f": {outcome['reason']}" if "reason" in outcome else ""
        self.say(f"{outcome['status']:7} {summary['seconds']:6.1f} s  {step.phase} / {step.name}{reason}"[:300])
        return self.records[-1]

    def _keep(self, step: Step, record: Record) -> None:
        self._write({"phase": step.phase, "step": step.name, **record})

    def _write(self, record: Record) -> None:
        self.records.append(record)
        if self.file:
            self.file.write(json.dumps(self.records[-1], default=str) + "\n")
            self.file.flush()

    def _processes(self, step: Step, end: float, is_cut: bool) -> Record:
        """One process after another until the step is through; how it went.

        Args:
            end: when the last of them is ended.
            is_cut: whether that is sooner than the step's own limit, as the phase ends then.
        """
        done: set[str] = set()
        for _ in range(MOST_PROCESSES):
            ending = self._process(step, end, done)
            if ending.status == 0:
                return {"status": OK, "output": ending.output}
            if ending.status == RAISED:
                return {"status": FAILED, "reason": ending.reason, "output": ending.output}
            if ending.status != SPOILED:
                verdict, reason = FAILED, f"its process ended with {_name(ending.status)}"
                if ending.status is None and is_cut:
                    verdict, reason = SKIPPED, "the phase's time was up while it ran"
                elif ending.status is None:
                    reason = f"it took longer than {step.limit:g} s"
                if ending.case:
                    self._keep(step, {"kind": "check", "name": ending.case, "status": verdict, "reason": reason})
                    done.add(ending.case)
                if not ending.case or ending.status is None:
                    return {"status": verdict, "reason": reason, "output": ending.output}
            if end - time.monotonic() < LEAST:
                break
        return {"status": FAILED, "reason": "what came behind a case that ended its process was not tried",
                "output": ending.output}  # fmt: skip

    def _process(self, step: Step, end: float, done: set[str]) -> Ending:
        """Forks for a step, and takes its records until its process ends or its time is up."""
        receive, send = os.pipe()
        with tempfile.TemporaryFile() as output:
            sys.stdout.flush()
            sys.stderr.flush()
            child = os.fork()
            if not child:
                os.close(receive)
                _be_step(step, Context(self.device, self.records, _own_end(end), _Sender(send), done), output.fileno())
            os.close(send)
            ending = Ending()
            try:
                self._listen(step, child, receive, end, done, ending)
            finally:
                end_session(child)  # what it has started, and itself if its time is up
                if ending.status is None:
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                os.close(receive)
            size = output.seek(0, os.SEEK_END)
            output.seek(max(0, size - TAIL))
            ending.output = output.read().decode(errors="replace")
        return ending

    def _listen(self, step: Step, child: int, receive: int, end: float, done: set[str], ending: Ending) -> None:
        rest = b""
        while True:
            ready, _, _ = select.select([receive], [], [], 0.05 if ending.status is None else 0)
            block = os.read(receive, 1 << 16) if ready else b""
            *lines, rest = (rest + block).split(b"\n")
            for line in lines:
                self._take(step, json.loads(line), done, ending)
            if block:
                continue
            if ending.status is not None:
                return
            pid, code = os.waitpid(child, os.WNOHANG)
            if pid:
                ending.status = os.waitstatus_to_exitcode(code)  # and once more round for its last lines
            elif time.monotonic() > end:
                return
            elif ready:  # it has closed its end of the pipe, and is about to exit
                time.sleep(0.01)

    def _take(self, step: Step, found: Record, done: set[str], ending: Ending) -> None:
        """One thing that a step's process has sent."""
        if "begin" in found:
            ending.case = found["begin"]
            return
        if found["kind"] == "raised":
            ending.reason = found["reason"]
            return
        self._keep(step, found)
        if ending.case and found.get("name") == ending.case:
            done.add(ending.case)
            ending.case = None


@dataclass
class Ending:
    """How a step's process ended.

    Attributes:
        case: that it was in.
        status: of its exit; minus a signal's number; None if its time was up.
        reason: the error that it raised.
        output: the last that it printed.
    """

    case: str | None = None
    status: int | None = None
    reason: str = ""
    output: str = ""


def end_session(session: int) -> None:
    """Ends every process of a session: a step makes one, in which what it starts may be in other groups."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it may have ended meanwhile
            fields = path.read_text().rpartition(")")[2].split()  # state, parent, group, session
            if int(fields[3]) == session:
                os.kill(int(path.parent.name), signal.SIGKILL)


def _own_end(end: float) -> float:
    """When a step should end by itself: its last case needs time as well."""
    return end - min(5.0, 0.1 * (end - time.monotonic()))


class _Sender:
    def __init__(self, end: int) -> None:
        self.end = end

    def __call__(self, record: Record) -> None:
        data = (json.dumps(record, default=str) + "\n").encode()
        while data:
            data = data[os.write(self.end, data) :]


def _be_step(step: Step, context: Context, output: int) -> NoReturn:
    """What the forked process does; it never returns."""
    status = 0
    try:
        os.setsid()  # so that it can be ended with all that it starts
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = sys.stderr = os.fdopen(os.dup(output), "w", buffering=1, errors="replace")
        faulthandler.enable(sys.stderr)
        try:
            step(context)
        except NotHereError as reason:
            context.record("check", name=step.name, status=SKIPPED, reason=str(reason))
        except DeviceLostError:
            status = SPOILED
        except BaseException as error:
            traceback.print_exc()
            context.record("raised", reason=describe(error))
            status = RAISED
        sys.stdout.flush()
    finally:
        os._exit(status)


def _name(status: int | None) -> str:
    with suppress(ValueError):
        return signal.Signals(-(status or 0)).name
    return f"status {status}"


def read(path: Path) -> list[Record]:
    """The records of a file; a line that was cut off is left out."""
    records = []
    for line in path.read_text().splitlines():
        with suppress(ValueError):
            records.append(json.loads(line))
    return records
