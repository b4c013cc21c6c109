"""`peft-kernels plan`: what is counted without weights, beside what a real model takes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import peft_kernels
from peft_kernels.cli import main
from peft_kernels.planning import memory
from peft_kernels.planning.model import Recipe, build, read_model_config

transformers = pytest.importorskip("transformers")

SMALL = {
    "model_type": "llama", "vocab_size": 300, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip
MIXTURE = {**SMALL, "model_type": "qwen3_moe", "num_hidden_layers": 2, "head_dim": 16, "moe_intermediate_size": 64,
           "num_experts": 6, "num_experts_per_tok": 2}  # fmt: skip
LLAMA_8B = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
}  # fmt: skip
QWEN_30B_A3B = {
    "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144,
    "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
    "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8,
}  # fmt: skip
TOLERANCE = 0.1  # of a peak; what kernels have for themselves is not counted
OWN_PAGES = 8 << 20  # of a process in a step: code that runs for the first time, and buffers that no tensor has


@pytest.fixture
def plan(tmp_path, capsys):
    def run(config, *arguments):
        path = config
        if isinstance(config, dict):
            path = tmp_path / "config.json"
            path.write_text(json.dumps(config))
        assert main(["plan", str(path), *map(str, arguments), "--json"]) == 0, capsys.readouterr().err
        found = json.loads(capsys.readouterr().out)
        found["memory"] = {row.pop("part"): row for row in found["memory"]}
        return found

    return run


def allocated(step):
    """The most bytes that a step has of torch's allocator at a time, beyond those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def real_model(method, rank, config):
    """A small model with weights, in fp32, as a plan has it without."""
    import peft

    config = transformers.AutoConfig.for_model(**config, use_cache=False)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    task = {"task_type": "CAUSAL_LM"}
    if method in ("houlsby", "pfeiffer"):
        peft_kernels.insert_adapters(model, method, bottleneck=rank)
        return model
    if method == "full":
        return model
    configs = {
        "lora": lambda: peft.LoraConfig(r=rank, target_modules="all-linear", **task),
        "dora": lambda: peft.LoraConfig(r=rank, target_modules="all-linear", use_dora=True, **task),
        "ia3": lambda: peft.IA3Config(**task),
        "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=rank, **task),
        "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=rank, **task),
    }
    return peft.get_peft_model(model, configs[method]())


@pytest.mark.parametrize(
    ("method", "config", "more"),
    [
        *((method, SMALL, []) for method in ("lora", "dora", "ia3", "prefix", "prompt", "houlsby", "pfeiffer", "full")),
        ("lora", SMALL, ["--checkpointing"]),
        ("lora", MIXTURE, []),
    ],
    ids=["lora", "dora", "ia3", "prefix", "prompt", "houlsby", "pfeiffer", "full", "checkpointing", "mixture"],
)
def test_parameters_and_memory_of_a_small_model(plan, method, config, more):
    rank, rows, tokens = 4, 2, 96
    options = ["--rank", rank, "--batch", rows, "--tokens", tokens, "--dtype", "fp32", *more]
    found = plan(config, "--method", method, *options)
    model = real_model(method, rank, config).train()
    if more:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [p for p in model.parameters() if p.requires_grad]
    assert found["parameters"] == sum(t.numel() for t in [*model.parameters(), *model.buffers()])
    assert found["trainable_parameters"] == sum(p.numel() for p in trained)
    assert found["file"] == 4 * found["trainable_parameters"]
    assert found["memory"]["optimizer"]["fused"] == 8 * found["trainable_parameters"]

    ids = torch.randint(0, 300, (rows, tokens))

    def step():
        model(input_ids=ids, labels=ids).loss.backward()

    for name in ("stock", "fused"):
        if name == "fused":
            peft_kernels.optimize(model, tune=False)
        step()
        model.zero_grad(set_to_none=True)
        wanted = allocated(step)
        model.zero_grad(set_to_none=True)
        planned = found["memory"]["activations and gradients at their peak"][name]
        assert abs(planned - wanted) <= TOLERANCE * wanted, (name, planned, wanted)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("fuses", [False, True], ids=["stock", "fused"])
def test_two_depths_tell_of_all(tmp_path, method, fuses):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SMALL | {"num_hidden_layers": 9}))
    config, recipe = read_model_config(path), Recipe(method, 4, 1, 32)
    depths = memory.depths_of(config, build(config, recipe))
    assert depths == (2, 3)
    extended, whole = (memory.measure(config, recipe, each, fuses) for each in (depths, (9,)))
    assert extended.kept == whole.kept and abs(extended.peak - whole.peak) <= 0.01 * whole.peak
    assert (extended.fused, extended.left) == (whole.fused, whole.left)


def test_weights_in_4_bits(plan):
    """Half a byte an element, a byte for 64, four bytes for 256 of these, and both code books and the offset."""
    config = SMALL | {"num_hidden_layers": 1}
    dense, four_bit = (plan(config, "--method", method) for method in ("lora", "qlora"))
    shapes = [(64, 64), (32, 64), (32, 64), (64, 64), (192, 64), (192, 64), (64, 192)]
    saved = 0
    for n, k in shapes:
        blocks = n * k // 64
        saved += 2 * n * k - (n * k // 2 + blocks + 4 * -(-blocks // 256) + 4 * (16 + 256 + 1))
    weights = [found["memory"]["frozen weights"]["stock"] for found in (dense, four_bit)]
    assert weights[0] - weights[1] == saved
    assert dense["parameters"] == four_bit["parameters"]


@pytest.mark.slow
def test_llama_8b(plan):
    found = plan(LLAMA_8B, "--method", "qlora", "--tokens", 4096, "--memory", 32)
    d, kv, ff, r = 4096, 1024, 14336, 16
    assert found["trainable_parameters"] == 32 * r * (2 * (d + d) + 2 * (d + kv) + 3 * (d + ff))
    assert found["parameters"] - found["trainable_parameters"] == pytest.approx(8.03e9, rel=1e-3)
    total = found["memory"]["in all, at the peak of a step"]
    assert total["fused"] < 0.6 * total["stock"] and found["fits"] == {"stock": False, "fused": True}
    checkpointing = plan(LLAMA_8B, "--method", "qlora", "--tokens", 4096, "--checkpointing")
    assert (
        checkpointing["memory"]["kept for the backward"]["fused"]
        < 0.2 * found["memory"]["kept for the backward"]["fused"]
    )


@pytest.mark.slow
def test_qwen_30b_a3b(plan):
    found = plan(QWEN_30B_A3B, "--method", "qlora", "--tokens", 512)
    assert found["parameters"] - found["trainable_parameters"] == pytest.approx(30.5e9, rel=2e-3)
    attention = 2 * (2048 + 4096) + 2 * (2048 + 512)
    experts = 128 * (2 * (2048 + 2 * 768) + 768 + 2048)  # PEFT gives the fused gate and up twice the rank
    router = 2048 + 128
    assert found["trainable_parameters"] == 48 * 16 * (attention + experts + router)
    kept = found["memory"]["kept for the backward"]
    assert kept["fused"] < 0.5 * kept["stock"] and any(
        "replace_parameter_4bit" in line for line in found["not_counted"]
    )
    attention_only = plan(QWEN_30B_A3B, "--targets", "q_proj,v_proj", "--tokens", 512)
    assert attention_only["trainable_parameters"] == 48 * 16 * (2048 + 4096 + 2048 + 512)


def test_lora_fa_and_optimizers(plan):
    small = {**SMALL, "num_hidden_layers": 1}
    lora, fa = (plan(small, "--method", method, "--dtype", "fp32") for method in ("lora", "lora-fa"))
    assert fa["trainable_parameters"] < lora["trainable_parameters"]
    assert fa["memory"]["kept for the backward"]["fused"] < lora["memory"]["kept for the backward"]["fused"]
    count = lora["trainable_parameters"]
    assert lora["memory"]["optimizer"]["stock"] == 8 * count
    for name, size in (("momentum", 4 * count), ("sgd", 0)):
        assert plan(small, "--optimizer", name)["memory"]["optimizer"]["stock"] == size
    assert plan(small, "--optimizer", "adamw8bit", "--rank", 64)["memory"]["optimizer"]["stock"] < 8 * 4 * count / 3


@pytest.mark.parametrize("task", ["classification", "entities", "summarization"])
def test_heads(plan, task):
    config = SMALL if task != "summarization" else {
        "model_type": "t5", "vocab_size": 300, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4,
        "decoder_start_token_id": 0,
    }  # fmt: skip
    found = plan(config, "--task", task, "--rank", 8)
    assert found["memory"]["in all, at the peak of a step"]["fused"] > 0
    assert any(f"For {task}: a LoRA of rank" in line for line in found["advice"])


def test_makes_of_layers_in_4_bits(plan):
    """GPT-2's Conv1D has its weight the other way round; T5 keeps a layer as it is."""
    gpt2 = {"model_type": "gpt2", "vocab_size": 300, "n_embd": 64, "n_layer": 2, "n_head": 4}
    t5 = {"model_type": "t5", "vocab_size": 300, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2,
          "num_heads": 4, "decoder_start_token_id": 0}  # fmt: skip
    for config in (gpt2, t5):
        dense, four_bit = (plan(config, "--method", method, "--tokens", 32) for method in ("lora", "qlora"))
        weights = [found["memory"]["frozen weights"]["stock"] for found in (dense, four_bit)]
        assert weights[1] < 0.7 * weights[0] and four_bit["parameters"] == dense["parameters"]


def test_a_step_that_fails_is_said(tmp_path, capsys):
    """PEFT's prefixes have other shapes than this attention."""
    latent = {**SMALL, "model_type": "deepseek_v3", "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8,
              "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4, "first_k_dense_replace": 3}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(latent))
    assert main(["plan", str(tmp_path), "--method", "prefix", "--tokens", "32"]) == 1
    assert "plan: model: a step fails with prefix: RuntimeError: Sizes of tensors" in capsys.readouterr().err


def test_bitfit(plan):
    bert = {"model_type": "bert", "vocab_size": 300, "hidden_size": 64, "intermediate_size": 128,
            "num_hidden_layers": 2, "num_attention_heads": 4}  # fmt: skip
    found = plan(bert, "--method", "bitfit", "--task", "classification", "--tokens", 64)
    model = transformers.AutoModelForSequenceClassification.from_config(transformers.AutoConfig.for_model(**bert))
    assert found["trainable_parameters"] == sum(p.numel() for n, p in model.named_parameters() if n.endswith("bias"))


def test_advice(plan):
    found = plan(SMALL, "--memory", 0.001, "--task", "code", "--goal", "research", "--batch", 2)
    text = "\n".join(found["advice"])
    for part in ("It does not fit into 1.0 MiB: try --method qlora", "rank 32 to 64", "Rank 16 is below", "LoRA+"):
        assert part in text
    assert plan(SMALL, "--memory", 100)["advice"] == []


def test_layers_that_differ_are_run_with_all(tmp_path):
    path = tmp_path / "config.json"
    kinds = ["sliding_attention", "full_attention"] * 3
    path.write_text(json.dumps(SMALL | {
        "model_type": "qwen2", "num_hidden_layers": 6, "layer_types": kinds, "use_sliding_window": True,
        "sliding_window": 8,
    }))  # fmt: skip
    config = read_model_config(path)
    assert memory.depths_of(config, build(config, Recipe("lora", 4, 1, 16))) == (6,)


def test_as_tables(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    assert main(["plan", str(tmp_path), "--memory", "1"]) == 0
    out = capsys.readouterr().out
    assert "trainable parameters" in out and "kept for the backward" in out and "KiB" in out


def test_weights_are_not_made(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    model = build(read_model_config(tmp_path), Recipe("qlora", 16, 1, 16, four_bit=True))
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize(
    ("text", "arguments", "said"),
    [
        (json.dumps(SMALL), ["--tokens", "4096"], "tokens: got 4096, wanted at most the model's 2048"),
        ("{", [], "got no JSON"),
        ('{"model_type": "no_such"}', [], "got model_type 'no_such'"),
        ("{}", [], "got model_type None"),
        (json.dumps(SMALL | {"hidden_size": "x"}), [], "that transformers refuses"),
        (json.dumps(SMALL | {"num_attention_heads": 0}), [], "transformers"),
        (json.dumps(SMALL), ["--method", "bitfit"], "bitfit does not fit this model: ValueError: it has no biases"),
        (json.dumps(SMALL), ["--targets", "nothing"], "lora does not fit this model"),
        (json.dumps(SMALL), ["--method", "full", "--four-bit"], "got full with weights in 4 bits"),
        (json.dumps(SMALL), ["--dropout", "1"], "dropout: got 1.0"),
    ],
    ids=["tokens", "json", "type", "no type", "size", "heads", "bitfit", "targets", "full", "dropout"],
)
def test_refused(tmp_path, capsys, text, arguments, said):
    (tmp_path / "config.json").write_text(text)
    assert main(["plan", str(tmp_path), *arguments]) == 1
    out, err = capsys.readouterr()
    assert out == "" and said in err and err.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--rank", "0"], ["--tokens", "x"], ["--memory", "-1"], ["--method", "magic"]])
def test_options_that_are_not_understood(arguments, capsys):
    with pytest.raises(SystemExit) as left:
        main(["plan", "model", *arguments])
    assert left.value.code == 2 and f"argument {arguments[0]}" in capsys.readouterr().err


def test_no_model(tmp_path, capsys):
    assert main(["plan", str(tmp_path)]) == 1
    assert "wanted a folder with a config.json" in capsys.readouterr().err


REAL = """
import ctypes, gc, json, sys
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
import peft_kernels
from test_cli_plan import allocated

folder, four_bit, rows, tokens = sys.argv[1], sys.argv[2] == "1", int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(1)
libc = ctypes.CDLL(None)
libc.mallopt(-3, 1 << 16), libc.mallopt(-1, 1 << 16)  # what is freed goes back at once: M_MMAP_ and M_TRIM_THRESHOLD
quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                  bnb_4bit_compute_dtype=torch.bfloat16)
options = {"quantization_config": quantization} if four_bit else {}
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="cpu", **options)
model = get_peft_model(model, LoraConfig(r=16, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM"))
model.train()
ids = torch.randint(0, 1000, (rows, tokens))

def step():
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

def resident(name):
    with open("/proc/self/status") as status:
        return 1024 * int(next(line for line in status if line.startswith(name)).split()[1])

found = {}
for name in ("stock", "fused"):
    if name == "fused":
        peft_kernels.optimize(model, tune=False)
    step()
    model.zero_grad(set_to_none=True)
    gc.collect(), libc.malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")  # the peak begins anew
    before = resident("VmRSS")
    step()
    found[name] = {"resident": resident("VmHWM") - before}
    model.zero_grad(set_to_none=True)
    found[name]["allocated"] = allocated(step)
    model.zero_grad(set_to_none=True)
weights = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in [*model.parameters(), *model.buffers()]}
found["weights"] = sum(weights.values())
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    finetune = pytest.importorskip("benchmarks.finetune")
    try:
        return finetune.base_model(None, tmp_path_factory.mktemp("base"))
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.mark.slow
@pytest.mark.parametrize("four_bit", [False, True], ids=["dense", "4bit"])
@pytest.mark.parametrize(("rows", "tokens"), [(1, 64), (2, 192)], ids=["1x64", "2x192"])
def test_a_step_of_smollm2_takes_what_was_planned(plan, smollm2, four_bit, rows, tokens):
    tests = Path(__file__).parent
    command = [sys.executable, "-c", REAL, str(smollm2), str(int(four_bit)), str(rows), str(tokens)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)])}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    measured = json.loads(result.stdout.splitlines()[-1])
    options = ["--method", "qlora" if four_bit else "lora", "--batch", rows, "--tokens", tokens, "--dropout", 0.05]
    planned = plan(smollm2, *options)["memory"]
    for name in ("stock", "fused"):
        peak = planned["activations and gradients at their peak"][name]
        for kind in ("allocated", "resident"):
            wanted = measured[name][kind]
            own = OWN_PAGES * (kind == "resident")
            assert abs(peak - wanted) <= TOLERANCE * wanted + own, (name, kind, peak, wanted)
    if not four_bit:
        weights = planned["frozen weights"]["stock"] + planned["trained weights"]["stock"]
        assert weights == pytest.approx(measured["weights"], rel=1e-3)
