"""Every option of PEFT's `LoraConfig` on an accelerated model: steps and checkpoints are stock's, and what is not fused
has a reason."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from comparison import error
from decoding_models import decode, layers_of, quantised
from optional import if_installed
from peft_models import randomize
from safetensors.torch import load_file
from tiny_models import SAME_STEP, assert_same, step, tiny, tokens
from torch import nn
from torch.utils.data import DataLoader

import peft_kernels
from peft_kernels.integrations import registry

peft, lora = map(if_installed, ("peft", "peft.tuners.lora"))

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]
EMBEDDING = "its adapter looks rows of A up, for which there is no kernel"
UNKNOWN = "this class has no fused form"


def of(name, **options):
    """A configuration that not every version of PEFT has."""
    kind = getattr(peft, name, None) or getattr(lora.config, name, None)
    return kind and kind(**options)


# The options; and the reasons that the report has for PEFT's layers that keep their forward.
OPTIONS = {
    "lora_bias": ({"lora_bias": True}, set()),
    "dora": ({"use_dora": True}, set()),
    "rslora": ({"use_rslora": True}, set()),
    "patterns": ({"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 32}}, set()),
    "layers": ({"layers_to_transform": [0], "layers_pattern": "layers"}, set()),
    "exclude": ({"exclude_modules": ["v_proj"]}, set()),
    "replication": ({"layer_replication": [(0, 2), (1, 2)]}, set()),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, set()),
    "tokens": ({"trainable_token_indices": [3, 5]}, {UNKNOWN}),
    "embedding": ({"target_modules": ["embed_tokens", "q_proj"]}, {EMBEDDING}),
    "embedding-dora": ({"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}, {EMBEDDING}),
    "tying": ({"target_modules": ["embed_tokens", "lm_head", "q_proj"], "ensure_weight_tying": True}, {EMBEDDING}),
    "gaussian": ({"init_lora_weights": "gaussian"}, set()),
    "orthogonal": ({"init_lora_weights": "orthogonal"}, set()),
    "pissa": ({"init_lora_weights": "pissa"}, set()),
    "pissa-niter": ({"init_lora_weights": "pissa_niter_4"}, set()),
    "olora": ({"init_lora_weights": "olora"}, set()),
    "eva": ({"init_lora_weights": "eva", "eva_config": of("EvaConfig")}, set()),
    "corda": ({"init_lora_weights": "corda", "corda_config": of("CordaConfig", corda_method="kpm")}, set()),
    "lora_ga": ({"init_lora_weights": "lora_ga", "lora_ga_config": of("LoraGAConfig")}, set()),
    "mica": ({"init_lora_weights": "mica"}, set()),
    "kasa": ({"kasa_config": of("KasaConfig")}, set()),
    "alora": ({"alora_invocation_tokens": [7, 8]}, set()),
    "qalora": ({"use_qalora": True, "qalora_group_size": 16}, set()),  # which PEFT has for GPTQ's layers alone
    "velora": ({"velora_config": of("VeloraConfig", num_groups=4)}, {"adapter 'default' is a VeloraLinearVariant"}),
    "monteclora": ({"monteclora_config": of("MontecloraConfig")}, {
        "adapter 'default' is a MontecloraLinearVariant", UNKNOWN,
    }),
    "bdlora": (
        {"use_bdlora": of("BdLoraConfig", target_modules_bd_a=TARGETS[:1], target_modules_bd_b=TARGETS[1:], nblocks=2)},
        {"adapter 'default' is a BdLoraLinearVariant"},
    ),
    "arrow": ({"arrow_config": of("ArrowConfig", top_k=1)}, {
        "adapter 'default' is a ArrowLinearVariant",
    }),
    "bias-all": ({"bias": "all"}, set()),
    "bias-lora_only": ({"bias": "lora_only"}, set()),
}  # fmt: skip
# What PEFT refuses on a weight in 4 bits, or leaves out there.
NOT_ON_4BIT = {
    "pissa",
    "pissa-niter",
    "orthogonal",
    "corda",
    "lora_ga",
    "mica",
    "kasa",
    "velora",
    "monteclora",
    "bdlora",
}
DENSE_ONLY = {"replication", "patterns", "exclude", "gaussian", "eva", "rslora", "qalora", "embedding-dora", "tying"}
WITH_BIAS = {"lora_bias", "bias-all", "bias-lora_only"}  # of a model that has any
CASES = [(name, "dense") for name in OPTIONS]
CASES += [(name, "4bit") for name in OPTIONS if name not in NOT_ON_4BIT | DENSE_ONLY]
DECODING = [(name, "4bit") for name in ("lora_bias", "dora", "alora", "patterns")]
DECODING += [(name, "dense") for name in ("lora_bias", "dora", "kasa", "mica", "bdlora")]


def base_model(name, base):
    torch.manual_seed(1)
    options = {"tie_word_embeddings": True} if name == "tying" else {}
    model = tiny("opt" if name in WITH_BIAS else "llama", hidden=64, intermediate=128, **options)
    return quantised(model) if base == "4bit" else model


def decompose(model, config):
    """Leaves in each layer what PEFT's `preprocess_corda` does, for inputs that are white."""
    for name, layer in model.named_modules():
        if name.split(".")[-1] in config.target_modules:
            u, s, vh = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
            layer.eigens = SimpleNamespace(U_WC=u[:, : config.r], S_WC=s[: config.r], V_WC=vh[: config.r].T)


def stock_model(name, base, **others):
    options = OPTIONS[name][0] | others
    if any(value is None for value in options.values()):
        pytest.skip("this version of PEFT lacks it")
    targets = ["q_proj", "v_proj", "fc1", "fc2"] if name in WITH_BIAS else TARGETS
    config = peft.LoraConfig(
        **{"r": 4, "lora_alpha": 12, "target_modules": targets, "task_type": "CAUSAL_LM"} | options
    )
    model, ids = base_model(name, base), tokens()[0]
    if name == "corda":
        decompose(model, config)
    if name == "lora_ga":
        if_installed("peft.tuners.lora.loraga").preprocess_loraga(
            model, config, lambda: model(input_ids=ids, labels=ids).loss.backward()
        )
    if name == "arrow":
        config.arrow_config.task_adapter_names = ["task"]  # as `create_arrow_model` does it
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets), adapter_name="task")
        model.add_adapter("default", config)
        model.set_adapter("default")
    else:
        model = peft.get_peft_model(model, config)
    if name == "eva":
        data = DataLoader([{"input_ids": row} for row in ids], batch_size=3)
        peft.initialize_lora_eva_weights(model, data, show_progress_bar=False)
    if not any(word in name for word in ("pissa", "olora", "corda", "lora_ga", "mica")):
        randomize(model)
    for parameter_name, parameter in model.named_parameters():
        if "lora_magnitude" in parameter_name:
            parameter.data.mul_(1.5)
    return model.train()


def a_batch():
    ids, padding = tokens()
    ids[0, 6:8] = ids[1, 2:4] = torch.tensor([7, 8])  # where an aLoRA is invoked
    return ids, padding


def trained(model, steps=2):
    """What a few steps give, and the losses on the way."""
    optimizer, results = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05), []
    for seed in range(steps):
        torch.manual_seed(seed)
        results.append(step(model, *a_batch()))
        optimizer.step()
    return results


def in_order(config):
    return {key: sorted(value) if isinstance(value, list) else value for key, value in config.items()}


def checkpoint(model, folder):
    model.save_pretrained(folder, save_embedding_layers=False)
    files = {path.relative_to(folder): load_file(path) for path in folder.rglob("*.safetensors")}
    configs = {
        path.relative_to(folder): in_order(json.loads(path.read_text())) for path in folder.rglob("adapter_config.json")
    }
    return configs, {f"{file}:{name}": value for file, saved in files.items() for name, value in saved.items()}


@pytest.mark.parametrize(("name", "base"), CASES, ids=map("-".join, CASES))
def test_trains_and_saves_what_stock_does(name, base, tmp_path, caplog):
    stock = stock_model(name, base)
    fused = stock_model(name, base)  # of a tied layer there is no copy
    report = peft_kernels.optimize(fused)
    reasons = {layer.reason for layer in report if layer.kind.startswith("peft.") and not layer.fused}
    assert reasons == OPTIONS[name][1]
    registry._logged.clear()
    for got, want in zip(trained(fused), trained(stock), strict=True):
        got, want = ({k: v for k, v in of.items() if "k_proj.bias" not in k} for of in (got, want))  # which are zero
        assert_same(got, want)
    assert {message.split(": ")[1] for message in caplog.messages} == reasons - {EMBEDDING, UNKNOWN}
    (configs, got), (stock_configs, want) = (checkpoint(m, tmp_path / n) for m, n in ((fused, "a"), (stock, "b")))
    assert configs == stock_configs and want
    assert_same(got, want)


@pytest.mark.parametrize(("name", "base"), DECODING, ids=map("-".join, DECODING))
def test_decodes_what_stock_does(name, base):
    stock = stock_model(name, base).eval()
    fused = copy.deepcopy(stock)
    peft_kernels.optimize(fused)
    assert error(decode(fused), decode(stock)) <= SAME_STEP


def test_a_dora_decodes_by_whole_layers():
    model = stock_model("dora", "4bit", target_modules="all-linear").eval()
    peft_kernels.optimize(model)
    decode(model)
    for layer in layers_of(model):
        assert layer._plan is not None


@pytest.mark.parametrize("base", ["dense", "4bit"])
@pytest.mark.parametrize("kind", ["lora_fa", "lora_plus"])
def test_optimizers(kind, base):
    """PEFT's LoRA-FA and LoRA+ find the parameters of an accelerated model by their names."""
    optimizers = if_installed("peft.optimizers")
    stock = stock_model("dora" if kind == "lora_plus" else "patterns", base)
    models = stock, copy.deepcopy(stock)
    peft_kernels.optimize(models[1])
    batch, results = a_batch(), []
    for model in models:
        if kind == "lora_fa":
            optimizer = optimizers.create_lorafa_optimizer(model, r=4, lora_alpha=12, lr=0.01)
        else:
            optimizer = optimizers.create_loraplus_optimizer(model, torch.optim.SGD, lr=0.01, loraplus_lr_ratio=16)
        results.append([])
        for _ in range(2):
            results[-1].append(step(model, *batch))
            optimizer.step()
    for want, got in zip(*results, strict=True):
        assert_same(got, want)


class Plain(nn.Module):
    """The other layers that PEFT has LoRA for."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.conv3 = nn.Conv1d(4, 4, 3), nn.Conv2d(2, 4, 3), nn.Conv3d(1, 4, 2)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.linear = nn.Linear(16, 8)

    def forward(self, x):
        attended, _ = self.attention(x, x, x)
        convolved = [self.conv1(x[:, :4]), self.conv2(x.view(-1, 2, 8, 4)), self.conv3(x.view(-1, 1, 4, 4, 4))]
        return torch.cat([y.flatten(1) for y in (self.linear(attended), *convolved)], 1)


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_other_layers_keep_their_forward(use_dora):
    targets = ["conv1", "conv2", "conv3", "linear"] + ([] if use_dora else ["attention"])
    stock = peft.get_peft_model(Plain(), peft.LoraConfig(r=2, target_modules=targets, use_dora=use_dora))
    randomize(stock)
    fused = copy.deepcopy(stock)
    report = peft_kernels.optimize(fused)
    kinds = {layer.kind for layer in report if layer.kind.startswith("peft.") and layer.reason == UNKNOWN}
    assert kinds == {f"peft.Conv{n}d" for n in (1, 2, 3)} | (set() if use_dora else {"peft.MultiheadAttention"})
    x, results = torch.randn(3, 4, 16), []
    for model in (stock, fused):
        y = model(x)
        y.square().sum().backward()
        results.append({"y": y.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}})
    assert_same(results[1], results[0])
