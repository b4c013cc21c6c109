"""Kernels of cub and cooperative groups, as the toolkit ships them."""

from pathlib import Path

import numpy as np
import pytest

import ptx_emulator
from ptx_emulator.device import Fresh

KERNELS = Path(__file__).parent / "kernels"

pytestmark = pytest.mark.skipif(bool(ptx_emulator.missing()), reason=str(ptx_emulator.missing()))


@pytest.fixture(scope="module", params=["sm_80", "sm_90"])
def toolkit(request):
    with ptx_emulator.profile(request.param):
        yield ptx_emulator.compile_cuda(KERNELS / "toolkit.cu", request.param)


def test_cub_reduce(toolkit):
    values = np.arange(256, dtype=np.float32)
    out = np.empty(2, np.float32)
    toolkit.cub_reduce(2, 128, values, Fresh(out))
    np.testing.assert_array_equal(out, values.reshape(2, 128).sum(1))


def test_cub_scan(toolkit):
    values = np.random.default_rng(0).integers(-100, 100, 512, dtype=np.int32)
    out = np.empty_like(values)
    toolkit.cub_scan(1, 128, values, Fresh(out))
    np.testing.assert_array_equal(out, np.cumsum(values) - values)


def test_cub_sort(toolkit):
    values = np.random.default_rng(0).integers(0, 2**32, 512, dtype=np.uint32)
    out = np.empty_like(values)
    toolkit.cub_sort(1, 128, values, Fresh(out))
    np.testing.assert_array_equal(out, np.sort(values))


def test_cooperative_groups(toolkit):
    values = np.random.default_rng(0).integers(0, 100, 64, dtype=np.int32)
    sums, scans, odd = np.empty((3, 64), np.int32)
    toolkit.groups(1, 64, values, Fresh(sums), Fresh(scans), Fresh(odd))
    tiles = values.reshape(8, 8)
    np.testing.assert_array_equal(sums, np.repeat(tiles.sum(1), 8))
    np.testing.assert_array_equal(scans, tiles.cumsum(1).ravel())
    for warp in range(2):
        lanes = values[32 * warp :][:32] % 2 == 1
        expected = np.where(lanes, lanes.sum() * 100 + np.cumsum(lanes) - 1, -1)
        np.testing.assert_array_equal(odd[32 * warp :][:32], expected)
