"""ia3_attention and torch's machinery: what is saved and computed, checkpointing, compilation, threads."""

import pytest
import tolerances
import torch
from attention_cases import Case, angles, expected, make_case, run
from comparison import assert_close, same_results, saved_for_backward, short
from torch.utils.checkpoint import checkpoint

from peft_kernels.ops import ia3_attention

pytestmark = pytest.mark.kernels

ops = torch.ops.peft_kernels
SHAPE = (2, 4, 2, 37, 70, 24)


def everything(dtype=torch.float32, shape=SHAPE) -> Case:
    """A call with all that is optional."""
    batch, heads, _, num_queries, num_keys, _ = shape
    return make_case(
        *shape, dtype=dtype, prefix=5, causal=True, window=60, key_padding_mask=torch.rand(batch, num_keys) > 0.2,
        attn_mask=torch.randn(1, heads, num_queries, num_keys), rope=angles(num_keys, 16), dropout=0.1,
        seed=torch.tensor([7]),
    )  # fmt: skip


# ---- what is saved, what is computed -----------------------------------------------------------------------------


def saved_bytes(case: Case) -> int:
    """Of the storages that autograd holds after a call, without those of the case's tensors."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in case.tensors.items()}
    _, saved = saved_for_backward(lambda: ia3_attention(**leaves, **case.options), leaves.values())
    return sum(saved.values())


@pytest.mark.parametrize("scales", [(), ("l_q", "l_k", "l_v")], ids=["plain", "scaled"])
@pytest.mark.parametrize("prefix", [0, 5])
def test_saves_output_and_sums(prefix, scales):
    case = make_case(*SHAPE, dtype=torch.bfloat16, prefix=prefix, scales=scales, causal=True)
    outputs = 2 if prefix and scales else 1  # with both, the total and the real keys' share before l_v
    lse = case.grad_out.shape[:3].numel() * 4
    assert saved_bytes(case) == outputs * case.grad_out.nbytes + lse


def test_does_not_expand():
    """Neither heads nor prefix are repeated, nor are rows of a transposed layout copied: autograd keeps what it got."""
    case = make_case(3, 8, 1, 20, 30, 16, torch.bfloat16, scales=(), prefix=50)
    tensors = {name: tensor.requires_grad_() for name, tensor in case.tensors.items()}
    seen = set()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: seen.add((x.data_ptr(), x.shape, x.stride())) or x, id):
        ia3_attention(**tensors)
    for name, tensor in tensors.items():
        assert (tensor.data_ptr(), tensor.shape, tensor.stride()) in seen, name


NAMES = ("q", "k", "v", "l_q", "l_k", "l_v", "prefix_k", "prefix_v")


@pytest.mark.parametrize("rope", [False, True], ids=["plain", "rope"])
@pytest.mark.parametrize("wanted", [*NAMES, "k v", "q l_v", "l_k prefix_v", "prefix_k prefix_v"])
def test_computes_what_is_asked_for(cpu_isa, wanted, rope):
    case = everything()
    if not rope:
        del case.options["rope"]
    full = run(case)
    leaves = {name: tensor.requires_grad_(name in wanted.split()) for name, tensor in case.tensors.items()}
    ia3_attention(**leaves, **case.options).backward(case.grad_out)
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == (name in wanted.split())
        assert leaf.grad is None or torch.equal(leaf.grad, full[name]), name


def test_nothing_asked_for():
    case = everything()
    wanted = run(case)["out"]
    out = ia3_attention(**case.tensors, **case.options)
    assert not out.requires_grad and torch.equal(out, wanted)
    with torch.no_grad():
        case.tensors["l_v"].requires_grad_()
        assert not ia3_attention(**case.tensors, **case.options).requires_grad


def test_double_backward_is_refused():
    case = make_case(*SHAPE)
    q = case.tensors["q"].requires_grad_()
    (grad,) = torch.autograd.grad(ia3_attention(**case.tensors).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


def test_gradient_of_a_sum():
    """Its rows all have one address, with strides of 0."""
    case = make_case(*SHAPE)
    q = case.tensors["q"].requires_grad_()
    ia3_attention(**case.tensors).sum().backward()
    case.grad_out = torch.ones_like(case.grad_out)
    assert_close(q.grad, expected(case)["q"], tolerances.attention(torch.float32))


# ---- autocast, checkpointing, compilation ------------------------------------------------------------------------


def test_autocast():
    case = everything()
    with torch.autocast("cpu", torch.bfloat16):
        actual = run(case)
    assert actual["out"].dtype == torch.bfloat16 and actual["q"].dtype == torch.float32
    in_bf16 = everything()
    in_bf16.tensors = {n: x.bfloat16() if n in "qkv" else x for n, x in case.tensors.items()}
    in_bf16.options, in_bf16.grad_out = case.options, case.grad_out
    for name, value in run(in_bf16).items():
        assert torch.equal(actual[name].to(value.dtype), value), name


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpointing(reentrant):
    case = everything()

    def checkpointed(q, **others):
        return checkpoint(lambda q: ia3_attention(q, **others), q, use_reentrant=reentrant)

    same_results(run(case, checkpointed), run(case))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(dynamic):
    torch.compiler.reset()
    compiled = torch.compile(ia3_attention, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for num_queries in (37, 6, 50):
        case = everything(torch.bfloat16, (2, 4, 2, num_queries, 70, 24))
        same_results(run(case, compiled), run(case))


def op_arguments(case: Case) -> tuple:
    tensors, options = case.tensors, case.options
    q, k = tensors["q"], tensors["k"]
    cos, sin = (part[None] for part in options["rope"])
    scales = tensors["l_q"], tensors["l_k"], tensors["l_v"]
    return (
        q, k, tensors["v"], *scales, 0.2, True, 60, options["key_padding_mask"],
        options["attn_mask"].expand(*q.shape[:3], k.shape[2]), tensors["prefix_k"], tensors["prefix_v"], cos, sin,
        options["dropout"], options["seed"],
    )  # fmt: skip


@pytest.mark.parametrize("shape", [SHAPE, (0, 4, 2, 37, 70, 24)], ids=["some", "empty"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_opcheck(shape, dtype):
    case = everything(dtype, shape)
    arguments = op_arguments(case)
    for training in (True, False):
        torch.library.opcheck(ops.attention_forward.default, (*arguments, training))
    out, out_real, lse = ops.attention_forward(*arguments, True)
    for wants in ([True] * 8, [True, False] * 4):
        torch.library.opcheck(ops.attention_backward.default, (case.grad_out, *arguments, out, out_real, lse, wants))


def test_meta_shapes():
    case = everything(torch.bfloat16)
    wanted = run(case)
    case.tensors = {name: tensor.to("meta") for name, tensor in case.tensors.items()}
    case.grad_out = case.grad_out.to("meta")
    for name in ("key_padding_mask", "attn_mask", "seed"):
        case.options[name] = case.options[name].to("meta")
    case.options["rope"] = tuple(part.to("meta") for part in case.options["rope"])
    for name, value in run(case).items():
        assert value.is_meta and (value.shape, value.dtype) == (wanted[name].shape, wanted[name].dtype), name


# ---- threads -----------------------------------------------------------------------------------------------------

# A prefix and splits of the keys; several parts of the queries; several heads in a task.
THREADED = [(2, 4, 1, 150, 1100, 16), (1, 2, 2, 1100, 40, 16), (2, 32, 32, 30, 30, 8)]


@pytest.mark.parametrize("shape", THREADED, ids=["splits", "parts", "heads"])
def test_thread_count_changes_no_bit(cpu_isa, threads, shape):
    case = make_case(*shape, dtype=torch.bfloat16, prefix=9, causal=shape[3] <= shape[4])
    threads(2)
    wanted = run(case)
    for count in (1, 3, 8, 2):
        threads(count)
        same_results(run(case), wanted)
