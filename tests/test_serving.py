"""Many adapters served on one model: what a batch computes, and what becomes of adapters meanwhile."""

import copy
import gc
import threading
import weakref

import pytest
import torch
from comparison import error
from serving_models import CONFIGS, PROMPT, base_model, decode, logits, save_adapter
from tiny_models import SAME_STEP
from torch import nn

import peft_kernels
from peft_kernels.serving import AdapterPool
from peft_kernels.serving import pool as pool_module

NAMES = ("a", "b", "c")


@pytest.fixture(params=["dense", "4bit"])
def base(request):
    return base_model(request.param)


@pytest.fixture
def served(tmp_path):
    """A pool with three adapters and two pages, on a dense model; the folders; and each adapter's own answer."""
    base = base_model()
    answers = {name: logits(save_adapter(base, tmp_path / name, seed, r=3 + seed)) for seed, name in enumerate(NAMES)}
    with AdapterPool(base, slots=2, max_rank=8, wait=5.0, root=tmp_path) as pool:
        for name in NAMES:
            pool.load(name)
        yield pool, answers | {None: logits(base)}


def answer(pool, *names):
    with pool.batch(names):
        return logits(pool.model, len(names))


def check(pool, answers, *names):
    got = answer(pool, *names)
    for row, name in zip(got, names, strict=True):
        assert error(row, answers[name][0]) <= SAME_STEP, name


# ---- What a batch computes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accelerated", [False, True], ids=["stock", "accelerated"])
def test_each_sample_has_its_own_adapter(base, accelerated, tmp_path):
    """Alone, beside others and beside none; in the prompt and in the tokens after it; of every form of LoRA."""
    wanted = {name: decode(save_adapter(base, tmp_path / name, seed, **config))
              for seed, (name, config) in enumerate(CONFIGS.items())}  # fmt: skip
    wanted[None] = decode(copy.deepcopy(base))
    if accelerated:
        peft_kernels.optimize(base)
    with AdapterPool(base, slots=3, max_rank=8) as pool:
        for name in CONFIGS:
            pool.load(name, tmp_path / name)
        for one in (*CONFIGS, None):
            for other in (one, "plain", None):
                with pool.batch([one, other]):
                    got = decode(base)
                for row, name in enumerate((one, other)):
                    assert error(got[:, row], wanted[name][:, row]) <= SAME_STEP, (one, other, name)
        assert error(decode(base), wanted[None]) <= SAME_STEP


def test_one_adapter_is_as_packed_as_without_a_pool(tmp_path, monkeypatch):
    """What is packed for one adapter is no other's, and is kept while others have the page in turn."""
    base = base_model("4bit")
    for seed, name in enumerate(NAMES):
        save_adapter(base, tmp_path / name, seed)
    peft_kernels.optimize(base)
    plans = []
    layer_class = type(base.model.layers[0])
    original = layer_class._make_plan
    monkeypatch.setattr(layer_class, "_make_plan", lambda self, x: plans.append(self) or original(self, x))
    with AdapterPool(base, slots=1, max_rank=8) as pool:
        for name in NAMES:
            pool.load(name, tmp_path / name)
            with pool.batch([name]):
                decode(base, rows=1)
            assert len(plans) == 2  # one for each layer, as all of them have one layout
        plans.clear()
        decode(base, rows=1)
        decode(base, rows=1)
        assert len(plans) == 2  # the base's own
        with pool.batch(["a", None]):
            decode(base, rows=2)
        with pool.batch(["a"]):
            decode(base, rows=1)
        assert len(plans) == 2


def test_conv1d(tmp_path):
    base = base_model(name="gpt2")
    wanted = {"a": decode(save_adapter(base, tmp_path / "a", fan_in_fan_out=True)), None: decode(base)}
    with AdapterPool(base, max_rank=4) as pool:
        pool.load("a", tmp_path / "a")
        for names in (["a", "a"], ["a", None]):
            with pool.batch(names):
                got = decode(base)
            for row, name in enumerate(names):
                assert error(got[:, row], wanted[name][:, row]) <= SAME_STEP


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_slab_of_another_dtype(dtype, tmp_path):
    base = base_model()
    wanted = logits(save_adapter(base, tmp_path / "a"))
    with AdapterPool(base, dtype=dtype) as pool:
        pool.load("a", tmp_path / "a")
        assert SAME_STEP < error(answer(pool, "a"), wanted) <= 0.02


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 2}],
    ids=str,
)
def test_generate(options, tmp_path):
    base = base_model("4bit")
    ids = {"input_ids": PROMPT.expand(3, -1).clone(), "attention_mask": torch.ones(3, PROMPT.shape[1])}
    options = {"max_new_tokens": 6, "min_new_tokens": 6} | options
    models = [save_adapter(base, tmp_path / "a"), copy.deepcopy(base), save_adapter(base, tmp_path / "b", 1)]

    def alone(model):
        torch.manual_seed(4)
        return model.generate(**{name: tensor[:1] for name, tensor in ids.items()}, **options)

    with AdapterPool(base) as pool:
        for name in "ab":
            pool.load(name, tmp_path / name)
        if not options.get("do_sample"):
            got = pool.generate(["a", None, "b"], **ids, **options)
            assert torch.equal(got, torch.cat([alone(model) for model in models]))
        else:
            torch.manual_seed(4)
            one = {name: tensor[:1] for name, tensor in ids.items()}
            assert torch.equal(pool.generate(["a"], **one, **options), alone(models[0]))
            assert pool.generate(["a", None, "b"], **ids, **options).shape[0] == 6


def test_threads_have_batches_of_their_own(served):
    pool, answers = served
    inside, done = threading.Event(), threading.Event()

    def other():
        with pool.batch(["b"]):
            inside.set()
            done.wait()

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait()
    try:
        assert torch.equal(logits(pool.model), answers[None])
        check(pool, answers, "a")
    finally:
        done.set()
        thread.join()


def test_batches_of_two_pools_within_each_other(tmp_path):
    """One model's layers are served by two pools: each batch stays its own pool's."""
    base = base_model("4bit")
    peft_kernels.optimize(base)
    up = {seed: save_adapter(base, tmp_path / f"up{seed}", seed, target_modules=["up_proj"]) for seed in (1, 2)}
    save_adapter(base, tmp_path / "q", 3, target_modules=["q_proj"])
    for model in up.values():
        model.load_adapter(tmp_path / "q", "q")
        model.base_model.set_adapter(["default", "q"])
    wanted = {seed: decode(model, rows=1) for seed, model in up.items()}
    with AdapterPool(base, target_modules=["up_proj"]) as ups, AdapterPool(base, target_modules=["q_proj"]) as qs:
        qs.load("q", tmp_path / "q")
        for seed in (1, 2):
            ups.load(f"up{seed}", tmp_path / f"up{seed}")
            for outer, inner in (
                (ups.batch([f"up{seed}"]), qs.batch(["q"])),
                (qs.batch(["q"]), ups.batch([f"up{seed}"])),
            ):
                with outer, inner:
                    assert error(decode(base, rows=1), wanted[seed]) <= SAME_STEP


def test_compiled_model_sees_each_batch(served):
    pool, answers = served
    torch.compiler.reset()
    compiled = torch.compile(pool.model, backend="aot_eager")
    for names in (["a", "b"], ["b", "b"], [None, "c"], ["a", "b"]):
        with pool.batch(names), torch.no_grad():
            got = compiled(PROMPT.expand(2, -1), use_cache=False).logits[:, -1]
        for row, name in zip(got, names, strict=True):
            assert error(row, answers[name][0]) <= SAME_STEP, names


def test_another_number_of_samples(served):
    pool, _ = served
    with pool.batch(["a", "b"]), pytest.raises(ValueError, match=r"those of 2 samples, wanted one for each .*q_proj"):
        logits(pool.model, 3)
    with pool.batch(["a", "b"], expand=2):
        assert error(logits(pool.model, 4)[::2], logits(pool.model, 2)) <= SAME_STEP


def test_layers_that_no_adapter_of_the_batch_has(tmp_path):
    """They may see their rows in any form, as the router of a mixture of experts does."""
    base = base_model("4bit")
    for seed, name in enumerate("ab"):
        save_adapter(base, tmp_path / name, seed, target_modules=["q_proj"])
    layer, x = base.model.layers[0].mlp.up_proj, torch.randn(7, 64)
    with AdapterPool(base, root=tmp_path) as pool, torch.no_grad():
        wanted = layer(x)
        for name in "ab":
            pool.load(name)
        for names in (["a", "a"], ["a", "b"], [None, "b"]):
            with pool.batch(names):
                assert torch.equal(layer(x), wanted)
                with pytest.raises(ValueError, match=r"one for each sample of model.layers.0.*q_proj's x, \[7, 64\]"):
                    base.model.layers[0].self_attn.q_proj(x)


# ---- Adapters come and go -------------------------------------------------------------------------------------------


def test_pages_go_to_those_that_are_used(served):
    pool, answers = served
    assert pool.memory.in_slab == ("b", "c")
    check(pool, answers, "b")
    check(pool, answers, "a", None)
    assert pool.memory.in_slab == ("b", "a")
    pool.pin("b")
    check(pool, answers, "c")
    check(pool, answers, "a")
    assert pool.memory.in_slab == ("b", "a")
    with pytest.raises(ValueError, match="2 adapters, wanted at most 1: the pool has 2 pages, 1 of them pinned"):
        answer(pool, "a", "c")
    with pytest.raises(ValueError, match="'b', which is pinned"):
        pool.evict("b")
    pool.unpin("b")
    check(pool, answers, "a", "c")


@pytest.mark.parametrize("change", ["swap", "evict", "remove", "swap pinned"])
def test_adapter_in_use_stays_what_it_is(served, change):
    pool, answers = served
    if "pinned" in change:
        pool.pin("a")
    with pool.batch(["a", None]):
        before = logits(pool.model, 2)
        if "swap" in change:
            pool.swap("a", "c")
        else:
            getattr(pool, change)("a")
        if "pinned" not in change:  # which has the other page at once
            check(pool, answers, "b")
        assert torch.equal(logits(pool.model, 2), before)
        if change == "remove":
            with pytest.raises(ValueError, match="name: got 'a', wanted one that was loaded: 'c', 'b'"):
                answer(pool, "a")
        else:
            check(pool, answers | {"a": answers["c"]} if "swap" in change else answers, "a")
            assert torch.equal(logits(pool.model, 2), before)
    assert not any(page.users for page in pool._pages)


def test_swap_is_in_place_and_moves_nothing_of_the_base(served):
    pool, answers = served
    pointers = {name: tensor.data_ptr() for name, tensor in pool.model.named_parameters()}
    check(pool, answers, "a")
    (page,) = (page for page in pool._pages if page.adapter is pool._adapters["a"])
    read, views, numbers = pool.read("a"), page.views, page.numbers.data_ptr()
    pool.swap("a", "b")
    check(pool, answers | {"a": answers["b"]}, "a")
    pool.swap("a", read)
    check(pool, answers, "a")
    assert page.adapter is pool._adapters["a"] and page.numbers.data_ptr() == numbers
    assert page.views.layers.keys() == views.layers.keys()
    assert pointers == {name: tensor.data_ptr() for name, tensor in pool.model.named_parameters()}


def test_kernels_read_the_pages(served):
    """Without a copy: every matrix is a dense view of the slab."""
    pool, _ = served
    storage = pool._slab.untyped_storage().data_ptr()
    with pool.batch(["a", "b"]) as batch:
        for layer in pool._layers:
            lora_A, lora_B, *_ = batch.grouped(layer, 1)
            for tensor in (*lora_A, *lora_B):
                assert tensor.is_contiguous() and tensor.untyped_storage().data_ptr() == storage


def test_host_tier(served, tmp_path):
    pool, answers = served
    one = pool._adapters["c"].nbytes
    assert len(pool.memory.in_host) == 3
    pool.host_bytes = one  # room for the largest
    check(pool, answers, "a")
    assert pool.memory.host <= one
    pool.host_bytes = 0
    for name in (*NAMES, *NAMES):
        check(pool, answers, name)
    assert pool.memory.host == 0
    (tmp_path / "a" / "adapter_model.safetensors").touch()
    with pytest.raises(ValueError, match=r"a.adapter_model.safetensors: got a file that has changed"):
        answer(pool, "a")
    pool.swap("a")
    check(pool, answers, "a", "c")
    (tmp_path / "b" / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"b, which has no adapter_model.safetensors"):
        answer(pool, "b")
    check(pool, answers, "a", "c")


def test_root_may_be_relative(tmp_path, monkeypatch):
    """Also to a folder that the process has left by the time that an adapter is read again."""
    base = base_model()
    wanted = logits(save_adapter(base, tmp_path / "adapters" / "a"))
    monkeypatch.chdir(tmp_path)
    with AdapterPool(base, slots=1, root="adapters", host_bytes=0) as pool, AdapterPool(base_model()) as other:
        pool.load("a")
        other.load("a", "adapters/a")
        pool.evict("a")
        monkeypatch.chdir("/")
        assert error(answer(pool, "a"), wanted) <= SAME_STEP
        other.swap("a", other._adapters["a"].folder)


def test_a_batch_waits_for_a_page(served):
    pool, answers = served
    pool._wait = 0.05
    with pool.batch(["a", "b"]):
        with pytest.raises(TimeoutError, match=r"the pages for \('c',\) are in use, still after 0.05 s"):
            answer(pool, "c")
        pool.load("d", "c")  # waits in host memory
        assert "d" not in pool.memory.in_slab
    check(pool, answers | {"d": answers["c"]}, "c", "d")
    pool._wait = 10
    got = []
    with pool.batch(["a", "b"]):
        thread = threading.Thread(target=lambda: got.append(answer(pool, "c")))
        thread.start()
        thread.join(0.05)
        assert not got
    thread.join()
    assert error(got[0], answers["c"]) <= SAME_STEP


def test_an_error_within_a_batch_leaves_no_lease(served):
    pool, answers = served
    with pytest.raises(KeyError), pool.batch(["a", "b"]):
        raise KeyError
    assert not any(page.users for page in pool._pages)
    check(pool, answers, "c", "b")


# ---- Open and close -------------------------------------------------------------------------------------------------


def test_close_leaves_the_model_as_it_was(base, tmp_path):
    save_adapter(base, tmp_path / "a")
    types = [type(module) for module in base.modules()]
    tensors = {name: tensor.data_ptr() for name, tensor in base.named_parameters()}
    before = decode(copy.deepcopy(base))
    pool = AdapterPool(base)
    pool.load("a", tmp_path / "a")
    assert {name: tensor.data_ptr() for name, tensor in base.named_parameters()} == tensors
    with pool.batch(["a", None]):
        decode(base)
    copied = copy.deepcopy(base)  # of a served model: it is the base, whatever batches there are
    with pool.batch(["a", "a"]):
        assert error(decode(copied), before) <= SAME_STEP
    pool.close()
    pool.close()
    assert types == [type(module) for module in base.modules()]
    assert {name: tensor.data_ptr() for name, tensor in base.named_parameters()} == tensors
    assert not any(key in vars(module) for module in base.modules() for key in ("_packed", "_plan"))
    with pytest.raises(RuntimeError, match="the pool was closed"), pool.batch(["a"]):
        pass
    dead = weakref.ref(pool)
    del pool, copied
    gc.collect()
    assert dead() is None


def test_close_waits_for_batches(served):
    pool, _ = served
    pool._wait = 0.05
    with pool.batch(["a"]):
        with pytest.raises(TimeoutError, match="batches are under way"):
            pool.close()
        logits(pool.model)
    pool.close()


def test_accelerate_and_restore_of_a_served_model(tmp_path):
    base = base_model("4bit")
    wanted = decode(save_adapter(base, tmp_path / "a"))
    pool = AdapterPool(base)
    pool.load("a", tmp_path / "a")
    peft_kernels.optimize(base)
    with pool.batch(["a", "a"]):
        assert error(decode(base), wanted) <= SAME_STEP
    before = [type(module) for module in base.modules()]
    with pytest.raises(RuntimeError, match="one that an AdapterPool serves, wanted it after the pool"):
        peft_kernels.restore(base)
    assert [type(module) for module in base.modules()] == before
    with pool.batch(["a", "a"]):
        assert error(decode(base), wanted) <= SAME_STEP
    pool.close()
    peft_kernels.restore(base)
    assert all(type(module).__module__.partition(".")[0] != "peft_kernels" for module in base.modules())


def test_refused_models(tmp_path):
    with pytest.raises(TypeError, match="model: got int"):
        AdapterPool(3)
    base = base_model()
    with pytest.raises(ValueError, match=r"a Linear on a base layer, '.*_proj', wanted the model without adapters"):
        AdapterPool(save_adapter(base, tmp_path))
    with pytest.raises(ValueError, match="target_modules: got 'nothing', wanted what names some linear"):
        AdapterPool(base, target_modules="nothing")
    with pytest.raises(ValueError, match="target_modules: got 3, wanted a text or a list of texts"):
        AdapterPool(base, target_modules=3)
    with pytest.raises(ValueError, match="root: got 3, a int, wanted a path"):
        AdapterPool(base, root=3)
    with pytest.raises(ValueError, match=r"slots: got 0"):
        AdapterPool(base, slots=0)
    with pytest.raises(ValueError, match=r"dtype: got torch.float64"):
        AdapterPool(base, dtype=torch.float64)
    with AdapterPool(base), pytest.raises(ValueError, match="q_proj with another AdapterPool, which serves it"):
        AdapterPool(base)
    layer = base.model.layers[0].mlp.up_proj
    layer.forward = nn.Linear.forward.__get__(layer)
    with pytest.raises(ValueError, match=r"layers.0.mlp.up_proj with a forward that was replaced"):
        AdapterPool(base)


def test_names(served, tmp_path):
    pool, answers = served
    for name in ("../elsewhere", "/", str(tmp_path / "..")):
        with pytest.raises(ValueError, match=r"folder: got .*, wanted one inside of"):
            pool.load(name)
    with pytest.raises(ValueError, match="folder: got 3, a int, wanted a path"):
        pool.load("d", 3)
    with pytest.raises(ValueError, match="name: got 'a', which is taken"):
        pool.load("a")
    for method in (pool.swap, pool.evict, pool.remove, pool.pin, pool.unpin):
        with pytest.raises(ValueError, match="name: got 'x', wanted one that was loaded: 'a', 'b', 'c'"):
            method("x")
    for names in ("abc", [1], None):
        with pytest.raises(ValueError, match=r"names: got .*, wanted a list"), pool.batch(names):
            pass
    with pytest.raises(ValueError, match="source: got None, wanted a folder"):
        AdapterPool(base_model()).load("a")
    with pytest.raises(ValueError, match="source: got what another pool's read returned"):
        pool.load("d", AdapterPool(base_model(), dtype=torch.float16).read(tmp_path / "a"))
    assert pool.names == NAMES
    check(pool, answers, "a", "b")
    assert pool_module.AdapterPool is AdapterPool and "3 adapters on 14 layers" in repr(pool)
