"""The same launches on a real card, through the CUDA driver: for pytest's option --hardware."""

import ctypes
import functools
import re
import struct


class Driver:
    """libcuda and the context of its first device.

    Raises:
        OSError: there is no driver, or no device.
    """

    def __init__(self):
        self._library = ctypes.CDLL("libcuda.so.1")
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self.call("cuInit", 0)
        self.call("cuDeviceGet", ctypes.byref(device), 0)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self.call("cuCtxSetCurrent", context)
        parts = []
        for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
            value = ctypes.c_int()
            self.call("cuDeviceGetAttribute", ctypes.byref(value), attribute, device)
            parts.append(value.value)
        self.architecture = 10 * parts[0] + parts[1]

    def call(self, name: str, *arguments) -> None:
        if error := getattr(self._library, name)(*arguments):
            raise OSError(f"{name}: CUDA error {error}")

    @functools.cache  # noqa: B019, the driver lives as long as the process
    def load(self, ptx: str) -> ctypes.c_void_p:
        module = ctypes.c_void_p()
        self.call("cuModuleLoadData", ctypes.byref(module), ptx.encode())
        return module

    def launch(self, ptx: str, kernel: str, grid, block, shared: int, packed, memory: dict[int, bytes]):
        """Runs a kernel on copies of the memory, by address; the result is what it then holds."""
        function, copies = ctypes.c_void_p(), {}
        self.call("cuModuleGetFunction", ctypes.byref(function), self.load(ptx), kernel.encode())
        self.call("cuFuncSetAttribute", function, 8, shared)  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        for address, data in memory.items():
            copies[address] = ctypes.c_uint64()
            self.call("cuMemAlloc_v2", ctypes.byref(copies[address]), ctypes.c_size_t(len(data)))
            self.call("cuMemcpyHtoD_v2", copies[address], data, ctypes.c_size_t(len(data)))
        ranges = [(address, len(data), copies[address].value) for address, data in memory.items()]
        values = [ctypes.create_string_buffer(relocate(value, ranges), len(value)) for value in packed]
        params = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        sizes = [*grid, 1, 1][:3] + [*block, 1, 1][:3]
        self.call("cuLaunchKernel", function, *sizes, shared, None, params, None)
        self.call("cuCtxSynchronize")
        results = {}
        for address, data in memory.items():
            result = ctypes.create_string_buffer(len(data))
            self.call("cuMemcpyDtoH_v2", result, copies[address], ctypes.c_size_t(len(data)))
            self.call("cuMemFree_v2", copies[address])
            results[address] = result.raw
        return results


def relocate(value: bytes, ranges: list[tuple[int, int, int]]) -> bytes:
    """An argument, in which addresses within (address, size, copy) point into the copy instead."""
    words = list(struct.unpack(f"<{len(value) // 8}Q", value[: len(value) // 8 * 8]))
    for i, word in enumerate(words):
        for address, size, copy in ranges:
            if address <= word < address + size:
                words[i] = word - address + copy
    return struct.pack(f"<{len(words)}Q", *words) + value[8 * len(words) :]


@functools.cache
def find_driver() -> Driver | None:
    try:
        return Driver()
    except OSError:
        return None


def architecture_of(ptx: str) -> int:
    return int(re.search(r"^\s*\.target\s+sm_(\d+)", ptx, re.MULTILINE)[1])
