"""What --hardware does short of a card."""

import struct

import numpy as np

from ptx_emulator.hardware import architecture_of, relocate


def test_relocate():
    ranges = [(0x1000, 16, 0xA000), (0x1010, 8, 0xB000)]
    addresses = [0x1000, 0x100F, 0x1010, 0x1018, 0]
    moved = struct.unpack("<5Qi", relocate(struct.pack("<5Qi", *addresses, 7), ranges))
    assert moved == (0xA000, 0xA00F, 0xB000, 0x1018, 0, 7)
    assert relocate(np.int32(0x1000).tobytes(), ranges) == np.int32(0x1000).tobytes()


def test_architecture():
    assert architecture_of(".version 9.0\n.target sm_90a\n") == 90
