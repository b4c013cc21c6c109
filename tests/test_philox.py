"""The Philox oracle against Random123's published vectors, and the kernels' dropout masks against the oracle."""

import pytest
import torch

from peft_kernels.testing.reference.philox import dropout_mask, philox4x32

SEEDS = [0, -1, 2**32 + 7, -(2**63)]
ROWS = [1, 3, 8, 9, 100]

ops = torch.ops.peft_kernels


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_known_answers(counter, key, words):
    assert tuple(word.item() for word in philox4x32(tuple(torch.tensor(c) for c in counter), key)) == words


def test_mask_spells_out_the_counters():
    seed, p = 0x0123456789ABCDEF, 0.3
    mask = dropout_mask(seed, 3, 21, p)
    for row in range(3):
        for column in range(21):
            counter = tuple(torch.tensor(c) for c in (column // 8, row, 0, 0))
            word = philox4x32(counter, (0x89ABCDEF, 0x01234567))[column % 8 // 2].item()
            number = word >> 16 if column % 2 else word & 0xFFFF
            assert mask[row, column] == (number >= round(p * 65536))


def forward_s(x, lora_A, p, seed):
    """s = dropout(x) Aᵀ, as the forward saves it."""
    n, rank = 1, lora_A.shape[0]
    add = torch.zeros(x.shape[0], n)
    _, s = ops.lora_linear_forward(
        x, (), (), [lora_A], [torch.zeros(n, rank)], [1.0], dropout=[p], seeds=torch.tensor([seed]), add=add
    )
    return s


def backward(grad_y, x, lora_A, lora_B, p, seed):
    """grad_x (without the base product) and grad_A."""
    rank, k = lora_A.shape
    grad_x, grad_A, _ = ops.lora_linear_backward(
        grad_y, x, None, (), (), [lora_A], [lora_B], [1.0], True, [True], [False],
        dropout=[p], seeds=torch.tensor([seed]), compute_dtype=x.dtype, x_dtype=x.dtype,
    )  # fmt: skip
    return grad_x, grad_A.view(rank, k)


@pytest.mark.parametrize("columns", [1, 63, 257])
@pytest.mark.parametrize("rows", ROWS)
def test_forward_mask(cpu_isa, rows, columns):
    # An A that is the identity shows the dropped x itself.
    for seed in SEEDS:
        s = forward_s(torch.ones(rows, columns), torch.eye(columns), 0.3, seed)
        assert torch.equal(s != 0, dropout_mask(seed, rows, columns, 0.3))
        assert torch.equal(s[s != 0].unique(), torch.tensor([1 / 0.7])) or not s.any()


@pytest.mark.parametrize("columns", [1, 63, 257])
@pytest.mark.parametrize("rows", ROWS)
def test_backward_mask(cpu_isa, rows, columns):
    # One number in each row of dy, and a B that is the identity: row r of grad_A is row r of the dropped x; with an A
    # of ones, grad_x is the mask.
    for seed in SEEDS:
        grad_x, grad_A = backward(
            torch.eye(rows), torch.ones(rows, columns), torch.ones(rows, columns), torch.eye(rows), 0.3, seed
        )
        mask = dropout_mask(seed, rows, columns, 0.3)
        assert torch.equal(grad_A != 0, mask)
        assert torch.equal(grad_x != 0, mask)
        assert torch.equal(grad_x, grad_A)


@pytest.mark.parametrize("rows", [5, 40])
def test_extreme_probabilities(cpu_isa, rows):
    x = torch.randn(rows, 130)
    assert torch.equal(forward_s(x, torch.eye(130), 0.0, 9), x)
    assert torch.equal(forward_s(x, torch.eye(130), 1e-9, 9), x)
    assert not forward_s(x, torch.eye(130), 0.999999, 9).any()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_keep_rate(p):
    keep = (forward_s(torch.ones(1000, 256), torch.eye(256), p, 2024) != 0).double()
    deviation = (p * (1 - p)) ** 0.5
    assert abs(keep.mean() - (1 - p)) < 5 * deviation / keep.numel() ** 0.5
    assert ((keep.mean(0) - (1 - p)).abs() < 6 * deviation / 1000**0.5).all()
    assert ((keep.mean(1) - (1 - p)).abs() < 6 * deviation / 256**0.5).all()
    # Neighbours, in a row, in a column and under the next seed, do not know of each other.
    centred = (keep - (1 - p)) / deviation
    other = (dropout_mask(2025, 1000, 256, p).double() - (1 - p)) / deviation
    for product in (centred[:, 1:] * centred[:, :-1], centred[1:] * centred[:-1], centred * other):
        assert abs(product.mean()) < 5 / product.numel() ** 0.5
