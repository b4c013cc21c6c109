"""A pool under many threads: requests, while adapters come, change, go and turn out to be broken."""

import gc
import itertools
import json
import random
import threading

import pytest
import torch
from comparison import error
from concurrency import run_all
from safetensors.torch import load_file, save_file
from serving_models import base_model, logits, save_adapter
from tiny_models import SAME_STEP

import peft_kernels
from peft_kernels.checkpoints.peft_folder import CONFIG, WEIGHTS
from peft_kernels.serving import AdapterPool, LoRACheckpoint
from peft_kernels.serving.batch import Batch, Views
from peft_kernels.serving.pool import _Adapter

SERVERS, CHANGERS = 5, 2  # and one that brings what is broken
FIXED, CHANGING = ("f0", "f1", "f2"), ("c0", "c1")  # the second are each one changer's
PAUSE = 0.01  # seconds between two changes
RANKS = {"v0": 2, "v1": 3, "v2": 3, "v3": 5, "v4": 8}


def broken_folders(good, folder):
    """What can be wrong with a folder, by what the error says."""
    found = {}
    whole, config = (good / WEIGHTS).read_bytes(), (good / CONFIG).read_text()

    def make(match, weights=whole, entries=None):
        path = folder / f"broken{len(found)}"
        path.mkdir()
        if isinstance(weights, dict):
            save_file(weights, path / WEIGHTS)
        else:
            (path / WEIGHTS).write_bytes(weights)
        (path / CONFIG).write_text(json.dumps(json.loads(config) | (entries or {})))
        found[path] = match

    make("no whole safetensors", whole[:-100])
    make("no whole safetensors", b"GIF89a" + whole)
    tensors = load_file(good / WEIGHTS)
    key = next(key for key in tensors if "layers.0" in key)
    make("not finite", tensors | {key: torch.full_like(tensors[key], torch.nan)})
    make("got rank 9, wanted at most max_rank, 8", entries={"r": 9})
    make("use_dora=True", entries={"use_dora": True})
    make("of layers that are not served", tensors | {key.replace("layers.0", "layers.5"): tensors[key].clone()})
    return found


@pytest.mark.parametrize("count", [150, pytest.param(2_000, marks=pytest.mark.slow)])
def test_requests_while_adapters_come_and_go(count, tmp_path):
    """Every answer is that of one version of the adapter alone, the same throughout a batch, and the one that was
    swapped in where the batch began after the swap. Nothing is left over."""
    base = base_model("4bit")
    for seed, (version, rank) in enumerate(RANKS.items()):
        save_adapter(base, tmp_path / version, seed, r=rank)
    broken = broken_folders(tmp_path / "v0", tmp_path)
    peft_kernels.optimize(base, tune=False)
    pool = AdapterPool(base, slots=6, max_rank=8, wait=60.0)
    alone = {None: logits(base)}
    for version in RANKS:
        pool.load(version, tmp_path / version)
        with pool.batch([version]):
            alone[version] = logits(base)
        pool.remove(version)
    assert min(error(a, b) for a, b in itertools.combinations(alone.values(), 2)) > 100 * SAME_STEP
    versions = dict.fromkeys((*FIXED, *CHANGING), None)
    for name, version in zip(versions, RANKS, strict=True):
        pool.load(name, tmp_path / version)
        versions[name] = version
    pool.host_bytes = 2 * pool._adapters["f1"].nbytes  # the others are read again from their folders
    requests, failures, refusals, stopped = itertools.count(), [], [], threading.Event()

    known, answers = list(alone), torch.cat(list(alone.values()))

    def versions_of(rows):
        distances = torch.cdist(rows, answers) / answers.norm(dim=1)
        assert (distances.min(1).values <= SAME_STEP).all()
        return [known[place] for place in distances.argmin(1).tolist()]

    def serve(number):
        chance = random.Random(number)
        while next(requests) < count:
            names = chance.choices((*FIXED, *CHANGING, None), k=chance.choice((1, 1, 2, 3)))
            with pool.batch(names):
                first, second = logits(base, len(names)), logits(base, len(names))
            assert torch.equal(first, second)
            found = versions_of(first)
            for name, version in zip(names, found, strict=True):
                assert (version is None) == (name is None), name
                assert name not in FIXED or version == versions[name], name
            assert len(set(zip(names, found, strict=True))) == len(set(names))  # one version of each

    def change(number):
        chance, name = random.Random(100 + number), CHANGING[number]
        ready = {version: pool.read(tmp_path / version) for version in RANKS}
        while not stopped.wait(PAUSE):
            version = chance.choice(list(RANKS))
            how = chance.randrange(4)
            if how == 0:
                pool.evict(name)
                continue
            pool.swap(name, ready[version] if how == 1 else tmp_path / version)
            if how == 3:
                other = f"passing{number}"
                pool.load(other, tmp_path / version)
                with pool.batch([other, name]):
                    assert versions_of(logits(base, 2)) == [version, version]
                pool.remove(other)
            with pool.batch([name, None]):
                assert versions_of(logits(base, 2)) == [version, None]

    def spoil(number):
        for path, match in itertools.cycle(broken.items()):
            if stopped.wait(PAUSE):
                return
            with pytest.raises(ValueError, match=match):
                pool.swap(random.choice(FIXED), path)
            with pytest.raises(ValueError, match=match):
                pool.load("broken", path)
            refusals.append(match)

    def run(work, number):
        try:
            work(number)
        except BaseException as failure:
            failures.append(failure)
            next(itertools.islice(requests, count, count), None)  # the others end as well
        finally:
            if work is serve:
                stopped.set()

    works = [(serve, n) for n in range(SERVERS)] + [(change, n) for n in range(CHANGERS)] + [(spoil, 0)]
    run_all([threading.Thread(target=run, args=work) for work in works])
    if failures:
        raise failures[0]
    assert refusals
    assert not any(page.users for page in pool._pages)
    assert pool.memory.host <= pool.host_bytes and pool.names and set(pool.names) == {*FIXED, *CHANGING}
    gc.collect()
    alive = gc.get_objects()
    assert sum(type(thing) is _Adapter for thing in alive) == len(pool.names)
    assert sum(type(thing) is LoRACheckpoint for thing in alive) == len(pool.memory.in_host)
    assert sum(type(thing) is Views for thing in alive) == len(pool._pages)
    assert not any(type(thing) is Batch for thing in alive)
    del alive
    pool.close()
    assert error(logits(base), alone[None]) <= SAME_STEP
