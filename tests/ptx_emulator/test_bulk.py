"""Bulk copies between global and shared memory, and tensor maps."""

from pathlib import Path

import numpy as np
import pytest
import torch

import ptx_emulator
from ptx_emulator import EmulatorError, TensorMap
from ptx_emulator.device import Fresh

KERNELS = Path(__file__).parent / "kernels"

pytestmark = pytest.mark.skipif(bool(ptx_emulator.missing()), reason=str(ptx_emulator.missing()))


@pytest.fixture(scope="module")
def bulk():
    with ptx_emulator.profile("sm_90"):
        yield ptx_emulator.compile_cuda(KERNELS / "bulk.cu", "sm_90a", (KERNELS,))


def swizzle(tile: np.ndarray, bits: int) -> np.ndarray:
    """Rows of bytes as they lie in shared memory: 16-byte chunks change places within lines of 128 bytes."""
    chunks = tile.reshape(-1, 16)
    i = np.arange(len(chunks))
    out = np.empty_like(chunks)
    out[i ^ (i >> 3 & ((1 << bits) - 1))] = chunks
    return out


def tile_of(tensor: torch.Tensor, box, at) -> torch.Tensor:
    """`box` elements of a tensor from `at` on, zeros where it has none."""
    tile = torch.zeros(box, dtype=tensor.dtype)
    inside = [slice(max(0, a), max(0, min(size, a + b))) for a, b, size in zip(at, box, tensor.shape, strict=True)]
    there = [slice(s.start - a, max(0, s.stop - a)) for s, a in zip(inside, at, strict=True)]
    if all(s.stop > s.start for s in inside):
        tile[tuple(there)] = tensor[tuple(inside)]
    return tile


def numbers(shape, dtype) -> torch.Tensor:
    return torch.randint(1, 100, shape).to(dtype)


CASES = [  # tensor, dtype, box, swizzle, coordinates: all outermost first
    ((100,), torch.float32, (64,), 0, [(0,), (50,), (-10,), (200,)]),
    ((40, 64), torch.bfloat16, (16, 32), 2, [(0, 0), (8, 32), (33, 48), (-3, -5)]),
    ((40, 64), torch.float16, (24, 64), 3, [(16, 0), (20, 8)]),
    ((5, 7, 48), torch.uint8, (2, 4, 32), 1, [(0, 0, 0), (4, 4, 20), (-1, 6, 47), (9, 0, 0)]),
    ((3, 8, 12), torch.float32, (2, 8, 12), 0, [(0, 0, 0), (2, 3, 5)]),
]
IDS = [f"{str(case[1]).removeprefix('torch.')}-{'x'.join(map(str, case[2]))}-{case[3]}" for case in CASES]


@pytest.mark.parametrize(("shape", "dtype", "box", "bits", "places"), CASES, ids=IDS)
def test_tiles(bulk, shape, dtype, box, bits, places):
    rank, tensor = len(shape), numbers(shape, dtype)
    size = int(np.prod(box)) * tensor.element_size()
    for at in places:
        coordinates = [np.int32(x) for x in reversed(at)]
        out = np.empty((size // 16, 16), np.uint8)
        tensor_map = TensorMap(tensor, box, bits)
        record = bulk.launch(f"load_{rank}d", 1, 64, tensor_map, Fresh(out), np.int32(size), *coordinates, shared=size)
        tile = tile_of(tensor, box, at).view(torch.uint8).numpy()
        np.testing.assert_array_equal(out, swizzle(tile, bits))
        assert record["bulk_copies"] == 1

        written, new = torch.zeros(shape, dtype=dtype), numbers(box, dtype)
        data = swizzle(new.view(torch.uint8).numpy(), bits)
        tensor_map = TensorMap(written, box, bits)
        bulk.launch(f"store_{rank}d", 1, 64, tensor_map, data, np.int32(size), *coordinates, shared=size)
        # What a load of the same tile sees is what of it lies inside.
        expected = tile_of(torch.ones(shape, dtype=dtype), box, at) * new
        assert torch.equal(tile_of(written, box, at), expected)
        assert written.double().sum() == expected.double().sum()


@pytest.mark.parametrize("checks", [{"seed": 0}, {"seed": 1}, {"random_order": False}], ids=["0", "1", "in order"])
def test_there_and_back(bulk, checks):
    data = np.random.default_rng(0).standard_normal((5, 256), dtype=np.float32)
    out = np.empty_like(data)
    with ptx_emulator.set_checks(**checks):
        record = bulk.right(1, 64, data, Fresh(out), np.int32(5))
    np.testing.assert_array_equal(out, 2 * data)
    assert record["bulk_copies"] == 10
    assert record["unique_bytes_read"] == record["global_load"]["bytes"] == record["global_store"]["bytes"] == 5 * 1024


MISTAKES = {
    "unknown_barrier": "the async proxy does not know this mbarrier",
    "no_wait": r"into which a cp\.async is under way that no wait has covered|uninitialised read of shared",
    "no_wait_by_one_warp": r"into which a cp\.async is under way|(race in|uninitialised read of) shared memory",
    "too_few_expected": "a bulk copy of 1024 bytes: 512 bytes came to an mbarrier that it was not told to expect",
    "too_many_expected": r"deadlock: .*The mbarrier at 0x\w+ waits for 0 arrivals and 16 bytes",
    "two_for_one": r"into which a cp\.async is under way|bytes came to an mbarrier that it was not told",
    "misaligned": "misaligned bulk copy",
    "no_fence": "which warp . wrote with no fence.proxy.async between",
    "fence_before_write": "which warp . wrote with no fence.proxy.async between",
    "no_barrier": "race in shared memory|cp.async is under way",
    "no_store_wait": "which a bulk copy or a wgmma reads that no wait has covered",
    "no_commit": "which a bulk copy or a wgmma reads that no wait has covered",
    "read_too_early": "nobody wrote global memory",
    "nobody_waits": "the block ends with a bulk copy to its shared memory for which nobody has waited",
    "filled_before": "which warp . wrote with no fence.proxy.async between",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(bulk, mistake):
    data = np.zeros((5, 256), np.float32)
    for seed in range(3):
        with ptx_emulator.set_checks(seed=seed), pytest.raises(EmulatorError, match=f"(?s){MISTAKES[mistake]}"):
            bulk.launch(mistake, 1, 64, data, Fresh(np.empty_like(data)), np.int32(5))


def test_tensors_larger_than_their_memory(bulk):
    tensor = torch.zeros(16, 64, dtype=torch.bfloat16)
    too_large = TensorMap(tensor, (16, 32), 2)
    too_large.array = tensor[:8]
    with pytest.raises(EmulatorError, match="out of bounds in global memory"):
        bulk.load_2d(1, 64, too_large, np.empty(1024, np.uint8), np.int32(1024), np.int32(0), np.int32(0), shared=1024)


@pytest.mark.parametrize(
    ("shape", "box", "bits", "message"),
    [
        ((8, 60), (8, 32), 0, "stride: got 120, wanted a multiple of 16"),
        ((8, 64), (8, 4), 0, "bytes of the box's inner dimension: got 8, wanted a multiple of 16"),
        ((8, 64), (8, 64), 1, "got 128, wanted at most 32"),
        ((8, 64), (300, 64), 0, "size of the box: got 300, wanted 1 to 256"),
        ((1, 1, 1, 1, 1, 8), (1, 1, 1, 1, 1, 8), 0, "rank: got 6, wanted 1 to 5"),
    ],
    ids=["stride", "inner", "swizzle", "box", "rank"],
)
def test_maps_that_cannot_be(shape, box, bits, message):
    with pytest.raises(EmulatorError, match=message):
        TensorMap(torch.zeros(shape, dtype=torch.bfloat16), box, bits)


def test_no_tensor_map(bulk):
    with pytest.raises(EmulatorError, match="no tensor map is there"):
        bulk.load_1d(1, 64, bytes(128), np.empty(256, np.uint8), np.int32(256), np.int32(0), shared=256)
