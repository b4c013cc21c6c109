"""What ncu says of a card's kernels."""

import pytest
from card_runs import context_of

from benchmarks.card import profile, run

NCU = """==PROF== Connected to process 1
"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"0","1","void few_rows<8>(Params)","GPU Speed Of Light Throughput","Duration","us","1,234.5"
"0","1","void few_rows<8>(Params)","GPU Speed Of Light Throughput","Memory Throughput","%","61.5"
"0","1","void few_rows<8>(Params)","Launch Statistics","No such metric","%","1"
"1","1","glu_kernel","GPU Speed Of Light Throughput","Duration","us","n/a"
==PROF== Disconnected
"""


def test_what_ncu_says():
    assert profile.read_counters(NCU) == [
        {"name": "void few_rows<8>(Params)", "metrics": {"Duration (us)": 1234.5, "Memory Throughput (%)": 61.5}},
        {"name": "glu_kernel", "metrics": {}},
    ]
    assert profile.read_counters("==ERROR== ERR_NVGPUCTRPERM") == []


@pytest.mark.parametrize(("output", "status"), [(NCU, "ok"), ("ERR_NVGPUCTRPERM", "skipped"), ("crash", "failed")])
def test_a_machine_with_ncu(output, status, monkeypatch):
    monkeypatch.setattr(profile, "find_tool", lambda name: name)
    monkeypatch.setattr(profile, "program_within", lambda *_: (1, output))
    monkeypatch.setattr(run, "why_spoiled", lambda: None)
    context, sent = context_of("cuda")
    profile.counters(context)
    assert sent[-1]["status"] == status
    assert [record["name"] for record in sent if record.get("kind") == "launch"] == (
        ["void few_rows<8>(Params)", "glu_kernel"] if status == "ok" else []
    )
