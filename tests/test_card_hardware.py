"""What only a card does: the CPU plays one."""

import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from card_runs import context_of

from benchmarks.card import clock, hardware, machine, profile, run, timing
from benchmarks.records import FUSED


class Stub:
    """A stream, or an event by the host's clock."""

    def __init__(self, **options):
        self.at = 0.0

    def wait_stream(self, other):
        pass

    synchronize = record_stream = lambda self: None

    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)


@pytest.fixture
def played_cuda(monkeypatch):
    """The CPU plays a card, so that what only a card runs is run at all; yields what the graphs do at a replay."""
    replays = SimpleNamespace(call=lambda calls: [each() for each in calls])
    properties = SimpleNamespace(L2_cache_size=4096, total_memory=1 << 30)
    capture = lambda calls: SimpleNamespace(replay=(lambda: replays.call(calls)) if [c() for c in calls] else None)  # noqa: E731
    for name, value in {
        "Stream": Stub, "Event": Stub, "current_stream": Stub, "stream": lambda stream: nullcontext(),
        "synchronize": lambda: None, "_sleep": lambda cycles: None, "device_count": lambda: 2,
        "get_device_name": lambda index: "a card", "get_device_properties": lambda index: properties,
        "mem_get_info": lambda: (1 << 40, 1 << 40), "memory_reserved": lambda: 0,
        "set_per_process_memory_fraction": lambda share: None,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(run.Context, "tensors_on", "cpu")
    for module in (clock, hardware):
        monkeypatch.setattr(module, "capture", capture)
    monkeypatch.setattr(clock, "MOST_ROUNDS", 3)
    for name, value in {"N": 48, "K": 128, "ROWS": 200, "WIDTH": 128}.items():
        monkeypatch.setattr(hardware, name, value)
    for name, value in {"FEW": (1,), "SOME": (3,), "MANY": (40,)}.items():
        monkeypatch.setattr(timing, name, value)
    return replays


def ran(function, **options):
    context, sent = context_of("cuda")
    function(context, **options)
    return [record for record in sent if "status" in record]


def test_hardware_s_steps_run(played_cuda):
    for function in (hardware.side_stream, hardware.graphs, hardware.second_device, hardware.large):
        found = ran(function)
        bad = [record for record in found if record["status"] != "ok"]
        # The CPU's masks are drawn in no order that two replays would share, and 200 rows are few to count kept ones.
        assert not [record for record in bad if record["name"] != "dropout"], bad


@pytest.mark.parametrize(
    "function",
    [machine.ceilings, timing.eager, timing.families, profile.backends],
    ids=lambda function: function.__name__,
)
def test_a_card_s_small_steps_run(function, played_cuda, monkeypatch):
    monkeypatch.setattr(run.Context, "is_rehearsal", True)
    found = ran(function)
    assert len(found) >= 5 and not [record for record in found if record["status"] == "failed"]


def test_a_stale_graph_is_found(played_cuda):
    played_cuda.call = lambda calls: None
    found = ran(hardware.graphs)
    assert {record["status"] for record in found} == {"failed"}
    assert "replay 0: " in found[0]["reason"] and "replay 0: " in found[-1]["reason"]
    assert found[-2]["reason"] == "two replays drew the same mask"


@pytest.mark.parametrize(
    ("message", "status"), [("CUDA out of memory", "ok"), ("an error", "failed"), (None, "skipped")]
)
def test_an_allocation_that_fails(message, status, played_cuda, monkeypatch):
    limit, layer = [1.0], hardware.layer

    def limited(*arguments):
        call, *rest = layer(*arguments)

        def maybe():
            if limit[0] < 1 and message:
                raise RuntimeError(message)
            return call()

        return maybe, *rest

    monkeypatch.setattr(hardware, "layer", limited)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share: limit.__setitem__(0, share))
    (found,) = ran(hardware.failed_allocation)
    assert found["status"] == status and limit == [1.0]


def test_a_card_s_layers_are_timed(played_cuda):
    found = ran(timing.linear, n=48, k=128)
    assert [(record["m"], record["direction"]) for record in found if record.get("contender") == FUSED] == [
        (1, timing.FORWARD), (3, timing.FORWARD), (40, timing.FORWARD),
        (3, timing.BOTH), (40, timing.BOTH), (1, timing.BOTH),
    ]  # fmt: skip
    assert all(record["how"] == clock.IN_A_GRAPH and record["rounds"] == 3 for record in found if "how" in record)
    assert len(found) == 6 * len(timing.CONTENDERS)


def test_what_can_not_be_captured_is_timed_call_by_call(played_cuda, monkeypatch):
    def refuses(calls):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(clock, "capture", refuses)
    called = []
    samples, how = clock.seconds_each([lambda: called.append(0), lambda: called.append(1)], "cuda", calls=5)
    assert how == clock.EAGER and len(samples) == 3 and called[:4] == [0, 1, 0, 1] and len(called) == 6 * 6


def test_another_library_s_error_is_no_failure(played_cuda, monkeypatch):
    def broken(self, name):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(timing.Weights, "layers", broken)
    found = {record["name"].split(": ")[1]: record["status"] for record in ran(timing.linear, n=48, k=128)}
    assert [name for name, status in found.items() if status == "failed"] == [FUSED, timing.FUSED_LORA]
    assert set(found.values()) == {"failed", "skipped"}


def test_runs_that_differ_are_found():
    same, other = [torch.ones(3), torch.ones(2)], [torch.ones(3), torch.tensor([1.0, torch.nan])]
    assert hardware.differing(same, same) == "" and hardware.verdict("") == {}
    assert hardware.differing(other, same) == hardware.differing(other, other) == "1 elements of result 1"
    assert hardware.verdict("text")["status"] == "failed"
