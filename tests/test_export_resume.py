"""Exports that are killed, run out of disk, or meet another one; and how much memory they take."""

import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from export_models import contents, save_adapter, save_base

from peft_kernels.checkpoints import export_checkpoint, staging
from peft_kernels.checkpoints.staging import FOLDER, REPLACED, Staging

TESTS = Path(__file__).parent
SHARD = 32 << 20


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    base = save_base(folder / "base", shards=8)
    for name, seed in (("one", 1), ("other", 2)):
        save_adapter(base, folder / name, seed=seed)
    return folder


def export(inputs, out, adapter="one", **options):
    options = {"max_shard_size": 3000} | options
    return export_checkpoint(inputs / "base", out, [inputs / adapter], **options)


def stopped_after(files):
    """A progress that fails as a full disk does, when some files have been written; and how many of the tensors."""

    @contextmanager
    def shown(what, total):
        def advance():
            (staging,) = Path.cwd().glob(".*.partial")
            if len(list((staging / FOLDER).iterdir())) >= files:
                raise OSError("stopped")

        yield advance

    return shown


@pytest.fixture
def half(inputs, tmp_path, monkeypatch):
    """What an export of which 5 files were written leaves."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match="stopped"):
        export(inputs, tmp_path / "out", progress=stopped_after(5))
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    return tmp_path


def test_resumed(inputs, half):
    wanted = export(inputs, half / "whole")
    report = export(inputs, half / "out")
    assert (wanted.resumed, report.resumed) == (0, 5)
    assert contents(half / "out") == contents(half / "whole")
    assert {path.name for path in half.iterdir()} == {"out", "whole"}


@pytest.mark.parametrize(
    "options",
    [{"adapter": "other"}, {"weights": [0.5]}, {"dtype": torch.float16}, {"quantize": "nf4"}, {"max_shard_size": 4000}],
    ids=lambda options: next(iter(options)),
)
def test_other_inputs_start_anew(inputs, half, options):
    report = export(inputs, half / "out", **options)
    assert report.resumed == 0
    export(inputs, half / "whole", **options)
    assert contents(half / "out") == contents(half / "whole")


def test_another_base_starts_anew(inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(inputs / "base", tmp_path / "base")
    with pytest.raises(OSError, match="stopped"):
        export_checkpoint("base", "new", max_shard_size=3000, progress=stopped_after(5))
    path = tmp_path / "base/config.json"
    path.write_text(path.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    assert export_checkpoint("base", "new", max_shard_size=3000).resumed == 0


def test_a_half_file_is_written_again(inputs, half):
    path = sorted((half / ".out.partial" / FOLDER).iterdir())[2]
    path.write_bytes(path.read_bytes()[:-1])
    assert export(inputs, half / "out").resumed == 4
    export(inputs, half / "whole")
    assert contents(half / "out") == contents(half / "whole")


def test_overwritten(inputs, tmp_path):
    """The old checkpoint stays until the new one is whole."""
    export(inputs, tmp_path / "out", "other")
    old = contents(tmp_path / "out")
    with pytest.raises(ValueError, match="fp4"):
        export(inputs, tmp_path / "out", quantize="int4", overwrite=True)
    assert contents(tmp_path / "out") == old
    export(inputs, tmp_path / "out", overwrite=True)
    export(inputs, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole") != old
    assert {path.name for path in tmp_path.iterdir()} == {"out", "whole"}


def test_a_kill_while_its_folder_is_removed(inputs, tmp_path):
    """What is in it goes first, and says what it is of."""
    export(inputs, tmp_path / "out")
    (tmp_path / ".out.partial").mkdir()
    with pytest.raises(FileExistsError):
        export(inputs, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_is_removed_while_it_is_locked(inputs, tmp_path, monkeypatch):
    """By another process, to which it was empty."""
    lock, turns = staging._lock, iter(("before", "after"))

    def removing(partial):
        turn = next(turns, None)
        if turn == "before":
            partial.rmdir()
        descriptor = lock(partial)
        if turn == "after":
            partial.rmdir()
        return descriptor

    monkeypatch.setattr(staging, "_lock", removing)
    export(inputs, tmp_path / "out")
    assert next(turns, None) is None and [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("moved", [False, True])
def test_a_kill_while_the_old_one_is_replaced(inputs, tmp_path, monkeypatch, moved):
    """After the first of two moves the old one comes back, and after the second one it is removed."""
    export(inputs, tmp_path / "out", "other")
    old, partial = contents(tmp_path / "out"), tmp_path / ".out.partial"
    with monkeypatch.context() as patch:
        patch.setattr(Staging, "commit", lambda self: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            export(inputs, tmp_path / "out", overwrite=True)
    (tmp_path / "out").rename(partial / REPLACED)
    if moved:
        (partial / FOLDER).rename(tmp_path / "out")
        with pytest.raises(FileExistsError):
            export(inputs, tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["out"] and contents(tmp_path / "out") != old
        return
    with pytest.raises(OSError, match="stopped"):
        monkeypatch.chdir(tmp_path)
        export(inputs, tmp_path / "out", "one", dtype=torch.float16, progress=stopped_after(0))
    assert contents(tmp_path / "out") == old


def test_two_at_once(inputs, tmp_path):
    @contextmanager
    def other(what, total):
        with pytest.raises(BlockingIOError, match="out, to which another process writes"):
            export(inputs, tmp_path / "out", "other")
        yield lambda: None

    export(inputs, tmp_path / "out", progress=other)
    export(inputs, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def in_child(call):
    """Starts a process that ends with 0 when the call has returned; the parent may have no threads of OpenMP."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)
            call()
            status = 0
        finally:
            os._exit(status)
    return child


def kills(inputs, folder, count):
    """Kills exports at random moments, each time the one that the one before left; a program of its own calls this."""
    inputs, folder = Path(inputs), Path(folder)
    begin = time.monotonic()
    assert os.waitpid(in_child(lambda: export(inputs, folder / "whole")), 0)[1] == 0
    seconds, killed, wanted = time.monotonic() - begin, 0, contents(folder / "whole")
    moment = random.Random(0)
    for number in itertools.count():
        out = folder / f"{number}"
        while not out.exists():
            child = in_child(partial(export, inputs, out))
            time.sleep(moment.uniform(0, seconds))
            os.kill(child, signal.SIGKILL)
            if os.waitpid(child, 0)[1]:
                killed += 1
                seconds *= 1.05
            else:  # it had come to its end
                seconds *= 0.8
        assert contents(out) == wanted, number
        with pytest.raises(FileExistsError):  # which removes what is left of one that was killed after the move
            export(inputs, out)
        if killed >= count:
            break
    left = {path.name for path in folder.iterdir()} - {"whole", *map(str, range(number + 1))}
    print(json.dumps({"killed": killed, "left": sorted(left)}))


def program(call, *arguments, **options):
    code = f"import sys; sys.path[:0] = {[str(TESTS), str(TESTS.parent)]}; from test_export_resume import *; {call}"
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, **options
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.slow
def test_killed_at_random_moments(inputs, tmp_path):
    found = program("kills(*sys.argv[1:], count=20)", inputs, tmp_path)
    assert found["killed"] >= 20 and not found["left"]


def test_full_disk(inputs, tmp_path):
    """No file may become larger than a part of the shard, which is how a quota looks."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large.*model\.safetensors"):
            export(inputs, tmp_path / "out", max_shard_size=10**9)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    for name in ("out", "whole"):
        export(inputs, tmp_path / name, max_shard_size=10**9)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_disk_that_is_too_small_is_noticed_before(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 100, 100))
    with pytest.raises(OSError, match=r"No space left on device: got 100 bytes, wanted \d"):
        export(inputs, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def resident(entry):
    return 1024 * int(re.search(rf"{entry}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def peaks(base, out, adapter):
    """How much the resident memory grew by exports, in bytes."""
    small = Path(base).parent / "small"
    found = {}
    for quantize in (None, "nf4"):
        export_checkpoint(small / "base", small / f"{quantize}", [small / "adapter"], quantize=quantize)
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        report = export_checkpoint(base, f"{out}-{quantize}", [adapter], quantize=quantize, max_shard_size=SHARD)
        found[str(quantize)] = report.files, resident("VmHWM") - before
    print(json.dumps(found))


@pytest.mark.slow
def test_memory(tmp_path):
    """At most two files of 32 MiB, of a checkpoint of 134 MB."""
    config = {"num_hidden_layers": 16, "num_key_value_heads": 4}
    base = save_base(tmp_path / "base", hidden=512, intermediate=2048, shards=8, **config)
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    save_adapter(save_base(tmp_path / "small/base"), tmp_path / "small/adapter")
    found = program("peaks(*sys.argv[1:])", base, tmp_path / "out", adapter)
    assert found["None"][0] == 5 and found["nf4"][0] == 2
    assert max(grown for _, grown in found.values()) <= 2 * SHARD, found
