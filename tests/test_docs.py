"""The documentation: its code and the notebooks run on tiny models, and its reference has every public name."""

import ast
import importlib
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from optional import if_installed

import peft_kernels
from benchmarks import figures
from benchmarks.__main__ import BENCHMARKS
from benchmarks.records import RESULTS
from peft_kernels import cli
from peft_kernels.checkpoints import export_checkpoint

peft, transformers = map(if_installed, ("peft", "transformers"))

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = {path.stem: path.read_text() for path in PAGES}
CODE = {page: re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE) for page, text in TEXT.items()}
BLOCKS = {page: re.findall(r"^```\n(.*?)^```", text, re.DOTALL | re.MULTILINE) for page, text in TEXT.items()}
REFERENCE = {path.stem: path.read_text() for path in sorted((ROOT / "docs/reference").glob("*.md"))}
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))

LLAMA, GPT2, MIXTURE = "HuggingFaceTB/SmolLM2-135M-Instruct", "openai-community/gpt2", "mixture"


# ---- Code that runs -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def folders(tmp_path_factory, tiny_model):
    """Folders of tiny models, by the names that the pages have for larger ones."""
    sizes = {"vocab_size": 300, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
    gpt2, mixture = tmp_path_factory.mktemp("gpt2"), tmp_path_factory.mktemp("mixture")
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).save_pretrained(gpt2)
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
             "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}  # fmt: skip
    config = transformers.Qwen3MoeConfig(vocab_size=300, head_dim=16, **sizes)
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(mixture)
    return {LLAMA: tiny_model, ...: tiny_model, GPT2: gpt2, MIXTURE: mixture}


@pytest.fixture
def tiny_models(folders, monkeypatch, tmp_path):
    """Has transformers load these, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer):

        def load(name, *args, stock=auto.from_pretrained, **options):
            loaded = stock(folders.get(name, name), *args, **options)
            if isinstance(loaded, transformers.PreTrainedTokenizerBase):
                loaded.pad_token = "!"
            return loaded

        monkeypatch.setattr(auto, "from_pretrained", load)


def base(name=LLAMA, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(name, **options)


def in_4_bits():
    return base(quantization_config=transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"))


def with_lora(base, *names):
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config, names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    return model


def with_ia3():
    targets = {"target_modules": ["k_proj", "v_proj"], "feedforward_modules": []}
    model = peft.get_peft_model(in_4_bits(), peft.IA3Config(init_ia3_weights=False, **targets))
    peft_kernels.optimize(model)
    return model


def with_adapters():
    model = base()
    for name in ("news", "code"):
        peft_kernels.insert_adapters(model, "pfeiffer", bottleneck=8, name=name)
    return model


def save_adapters(*folders):
    for folder in folders:
        with_lora(base(), "default").save_pretrained(folder)


# What pages take for granted: a model, or a function that makes all that a page has of its own.
MODELS = {
    "README": in_4_bits,
    "adapters": base,
    "attention": base,
    "combining": lambda: with_lora(base(), "news", "code"),
    "lora_options": lambda: with_lora(in_4_bits(), "default"),
    "merging": lambda: with_lora(in_4_bits(), "news", "code"),
    "mixtures": lambda: base(MIXTURE),
    "other_layers": base,
    "soft_prompts": base,
    "stock_or_fused": base,
    "training": lambda: with_lora(in_4_bits(), "default"),
}


def bases():
    base().save_pretrained("base")
    export_checkpoint("base", "base-nf4", quantize="nf4")


FILES = {
    "README": lambda: save_adapters("adapters/alice"),
    "export": lambda: (save_adapters("adapters/news", "adapters/code"), bases()),
    "lora_options": lambda: base().save_pretrained("."),
    "serving": lambda: save_adapters("adapters/alice", "adapters/bob"),
}
# Statements of the README that are examples for models of their own.
README = {
    "fuse_adapters": with_adapters,
    "attach": base,
    "train_biases_only": lambda: base(GPT2),
    "merge_ia3": with_ia3,
    "add_weighted_adapter": MODELS["combining"],
    "merging": MODELS["merging"],
    "insert_adapters": base,
}


def prepared(page):
    """The names that a page's code uses without making them."""
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(LLAMA)
    texts = ["A fox.", "A dog", "cat"]
    batch = dict(tokenizer(texts, return_tensors="pt", padding=True))
    labelled = {**batch, "labels": batch["input_ids"]}
    names = {name: getattr(library, name) for library, name in (
        (peft, "LoraConfig"), (peft, "get_peft_model"), (transformers, "AutoModelForCausalLM"),
        (peft_kernels, "AdapterSettings"), (peft_kernels, "AdapterTrainer"),
    )}  # fmt: skip
    FILES.get(page, lambda: None)()
    return names | {
        "peft_kernels": peft_kernels, "torch": torch, "tokenizer": tokenizer, "texts": texts, "batch": batch,
        "inputs": batch, "prompts": {name: value[:2] for name, value in batch.items()}, "config": None,
        "batches": [(["news", "code", None], labelled)], "train": lambda model: model(**labelled).loss.backward(),
        "four_bits": transformers.BitsAndBytesConfig(load_in_4bit=True), "SFTTrainer": lambda *_, **options: options,
        "model": MODELS.get(page, lambda: None)(),
    }  # fmt: skip


@pytest.mark.usefixtures("tiny_models")
@pytest.mark.parametrize("page", [page for page, code in CODE.items() if code and page != "README"])
def test_code_of_a_page(page):
    names = prepared(page)
    for code in CODE[page]:
        exec(compile(code, page, "exec"), names)


@pytest.mark.usefixtures("tiny_models")
def test_code_of_the_readme():
    page = "README"
    names = prepared(page)
    whole, examples, pool = CODE[page]
    exec(compile(whole, page, "exec"), names)
    assert any(layer.fused for layer in peft_kernels.optimize(names["model"]))
    for statement in ast.parse(examples).body:
        text = ast.unparse(statement)
        names["model"] = next((make for name, make in README.items() if name in text), base)()
        exec(compile(ast.Module([statement], []), page, "exec"), names)
    exec(compile(pool, page, "exec"), names | {"model": in_4_bits().eval()})


@pytest.mark.usefixtures("tiny_models")
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(notebook):
    """Its cells in their order, with other parameters after the cell that has this tag, as papermill has it."""
    small = {"steps": 3, "length": 16, "rank": 4}
    names = {}
    for cell in json.loads(notebook.read_text())["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"] and cell["execution_count"] is None
            exec(compile("".join(cell["source"]), notebook.name, "exec"), names)
        if "parameters" in cell["metadata"].get("tags", ()):
            names |= {name: value for name, value in small.items() if name in names}


# ---- What pages name ------------------------------------------------------------------------------------------------


def test_commands_are_understood(monkeypatch):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    ran = []
    for page, blocks in BLOCKS.items():
        for line in "".join(blocks).splitlines():
            command, *words = line.partition("  #")[0].split() or [""]
            if command == "make":
                assert words[0] in targets, f"{page}: {line}"
            if command == "peft-kernels" and page != "command_line":  # which test_cli.py reads
                module = importlib.import_module(f"peft_kernels.cli.{words[0]}")
                monkeypatch.setattr(module, "run", lambda options: ran.append(options) or {})
                assert cli.main(words) == 0, f"{page}: {line}"
    assert len(ran) > 3


def test_what_is_named_exists():
    for page, text in TEXT.items():
        for name in re.findall(r"`(tests/[\w/.]+)`", text):
            assert (ROOT / name).exists(), f"{page}: {name}"
        for name in re.findall(r"python -m benchmarks ([a-z]\w+)", text):
            assert name in BENCHMARKS, f"{page}: {name}"


# ---- Figures --------------------------------------------------------------------------------------------------------

needs_results = pytest.mark.skipif(not RESULTS.is_dir(), reason="this copy of the sources has no measurements")


@pytest.mark.parametrize("page", figures.PAGES, ids=lambda path: path.stem)
def test_tables_have_what_was_measured(page):
    text = page.read_text()
    assert figures.written(text) == text, "`python -m benchmarks figures` writes them anew"


@needs_results
def test_a_figure_that_is_not_its_files_is_found():
    for page in figures.PAGES:
        for table in figures.TABLE.finditer(page.read_text()):
            rows = table[0].rstrip("\n")
            assert figures.written(f"{rows[:-3]}0{rows[-3:]}\n") == table[0], table[2]


def test_every_table_of_figures_is_shown():
    shown = {table[2] for page in figures.PAGES for table in figures.TABLE.finditer(page.read_text())}
    assert {name.partition("/")[2] for name in shown} == set(figures.TABLES)


@needs_results
def test_a_case_that_no_file_has():
    with pytest.raises(LookupError, match=r"results/epyc-zen5/model\.csv: got no train of no such case"):
        figures.number(("epyc-zen5/model", "no such case", "train"), "fused", "median_ms")


# ---- Reference ------------------------------------------------------------------------------------------------------


def exported():
    """Every name in an `__all__` of the package, and what it stands for."""
    for path in (ROOT / "peft_kernels").rglob("__init__.py"):
        if "\n__all__ = " in path.read_text():
            module = importlib.import_module(".".join(path.parent.relative_to(ROOT).parts))
            yield from ((f"{module.__name__}.{name}", getattr(module, name)) for name in module.__all__)


def test_the_reference_has_every_public_name():
    """By any of the paths that lead to it."""
    paths = [path for text in REFERENCE.values() for path in re.findall(r"^::: (\S+)$", text, re.MULTILINE)]
    assert len(paths) == len(set(paths))
    owners = [path.rpartition(".") for path in paths]
    described = [getattr(importlib.import_module(owner), name) for owner, _, name in owners]
    for path, value in exported():
        if isinstance(value, ModuleType):
            assert path.rpartition(".")[2] in REFERENCE
        else:
            assert any(value is other for other in described), path
