import os
from contextlib import contextmanager, nullcontext
from platform import machine

# No test needs the network; without it, a hub that does not answer would cost its time-out.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# What a test calls fused is not decided by how long it took.
os.environ.setdefault("PEFT_KERNELS_TUNE", "0")

import hypothesis
import optional
import ptx_emulator
import pytest
import torch

import peft_kernels
from peft_kernels import cpu

# Fixtures that choose an instruction set last for a whole test on purpose.
hypothesis.settings.register_profile(
    "default",
    deadline=None,
    max_examples=30,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)
# Tests with many examples take their number from the profile: `pytest --hypothesis-profile long`.
hypothesis.settings.register_profile("long", hypothesis.settings.get_profile("default"), max_examples=300)
hypothesis.settings.load_profile("default")


def pytest_addoption(parser):
    parser.addoption(
        "--hardware", action="store_true", help="the emulator's tests of instructions on a CUDA device too"
    )
    parser.addoption(
        "--card", default="sm_80", help="what the emulator plays: sm_80, sm_86, sm_89, sm_90, sm_100 or sm_120"
    )
    parser.addoption("--schedule", type=int, default=0, help="a seed for the order of its warps and blocks")


def pytest_configure():
    optional.require_all()


class Module(pytest.Module):
    def collect(self):
        with optional.skipping(f"{self.path.name} "):
            return super().collect()


def pytest_pycollect_makemodule(module_path, parent):
    return Module.from_parent(parent, path=module_path)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup():
    with optional.skipping():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call():
    with optional.skipping():
        return (yield)


@pytest.fixture(autouse=True)
def seed():
    """Every test starts from the same random numbers, whatever ran before it."""
    torch.manual_seed(0)
    return 0


@pytest.fixture(autouse=True)
def threads():
    """One thread, unless a test asks for more by calling this with a number: waiting threads spin, and on a busy
    machine small problems take much longer with two."""
    torch.set_num_threads(1)
    return torch.set_num_threads


# Those of this machine's architecture: what another has, no test can run here.
ISAS = {
    "aarch64": ["portable", "neon", "neon_bf16"],
    "x86_64": ["portable", "avx2", "avx512", "avx512_bf16", "amx"],
}.get(machine(), ["portable"])


@pytest.fixture(params=ISAS)
def cpu_isa(request):
    """Runs the test once for each instruction set that this processor has."""
    if request.param not in cpu.isas():
        pytest.skip(f"this processor lacks {request.param}")
    with cpu.use_isa(request.param):
        yield request.param


BACKENDS = [*ISAS, "cuda", "emulated"]


@contextmanager
def running_on(request, backend: str):
    """Runs with an instruction set of the CPU; on a GPU; or with the CUDA kernels in the emulator. Yields the device
    that tensors have to be on: the emulator's are on the CPU."""
    if backend == "cuda":
        if not (torch.cuda.is_available() and peft_kernels._extension.build_info["cuda"]):
            pytest.skip("needs a GPU, and a build with CUDA")
        yield "cuda"
    elif backend == "emulated":
        if reason := ptx_emulator.missing():
            pytest.skip(reason)
        from ptx_emulator.ops import emulated

        card, seed = (request.config.getoption(option) for option in ("card", "schedule"))
        with ptx_emulator.profile(card), ptx_emulator.set_checks(seed=seed), emulated() as launches:
            yield "cpu"
            if not request.node.get_closest_marker("may_launch_nothing"):
                assert launches(), "the test launched no kernel"
    elif backend == "cpu":
        yield "cpu"
    elif backend not in cpu.isas():
        pytest.skip(f"this processor lacks {backend}")
    else:
        with cpu.use_isa(backend):
            yield "cpu"


@pytest.fixture(params=BACKENDS)
def device(request):
    """Runs the test on every backend; the device that tensors have to be moved to."""
    with running_on(request, request.param) as device:
        yield device


@contextmanager
def tensors_on(request):
    with running_on(request, request.param) as device, torch.device(device) if device != "cpu" else nullcontext():
        yield device


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Runs the test on every backend, with new tensors there; the type of their device."""
    with tensors_on(request) as device:
        yield device


@pytest.fixture(params=["cpu", "cuda", "emulated"])
def platform(request):
    """As `backend`, but on the CPU only once, with its fastest instruction set."""
    with tensors_on(request) as device:
        yield device


@pytest.fixture(params=["cpu", "cuda"])
def processor(request):
    """As `platform`, without the emulator, which large problems take minutes of."""
    with tensors_on(request) as device:
        yield device


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A random Llama with a tokenizer of its own, in Hugging Face's format."""
    import tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from benchmarks import finetune

    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([finetune.language_reference()[:20000]], vocab_size=300)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
