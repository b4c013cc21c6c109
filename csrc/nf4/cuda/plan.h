// How the CUDA dequantisation is launched, as a pure function of the problem and the device.
#pragma once

#include <cstdint>

#include "common/cuda/device.h"

namespace peft_kernels {

// As many as a multiprocessor takes (CUDA C++ Programming Guide, technical specifications by compute capability). What
// is not known has the fewer: a launch bound beyond the architecture's limit is ignored.
constexpr int resident_threads(int compute_capability) {
    switch (compute_capability) {
        case 80:
        case 90:
        case 100:
        case 103: return 2048;
        default: return 1536;
    }
}

struct Nf4DequantizePlan {
    // 8 warps: enough to hide the latency of global memory, few enough for any register budget.
    static constexpr int kThreads = 256;
    // Vectors that a thread loads before it stores the first, to have that many requests in flight.
    static constexpr int kUnroll = 4;

    int vector;     // elements a thread decodes at a time: they fill one 16-byte store
    bool aligned;   // whether the codes of a vector can be loaded at once
    int64_t tiles;  // tiles of kThreads * kUnroll * vector elements
    uint32_t grid;  // CTAs; each takes every grid-th tile
};

// `codes_address` decides the alignment: the codes may be a part of a larger buffer. The output is torch's own
// allocation and always aligned.
constexpr Nf4DequantizePlan plan_nf4_dequantize(int64_t count, int64_t out_size, uint64_t codes_address,
                                                const DeviceProperties& device) {
    Nf4DequantizePlan plan{};
    plan.vector = static_cast<int>(16 / out_size);
    plan.aligned = codes_address % static_cast<uint64_t>(plan.vector / 2) == 0;
    const int64_t tile = int64_t{plan.vector} * Nf4DequantizePlan::kThreads * Nf4DequantizePlan::kUnroll;
    plan.tiles = count / tile + (count % tile != 0);
    // CTAs beyond those that are resident would wait, and leave multiprocessors idle in the end.
    const int64_t resident =
        int64_t{device.multiprocessors} * (resident_threads(device.compute_capability) / Nf4DequantizePlan::kThreads);
    plan.grid = static_cast<uint32_t>(plan.tiles < resident ? plan.tiles : resident);
    return plan;
}

// A 4096 x 4096 weight to bf16: 2048 tiles, for 864 CTAs on an A100, and for 1020 on a card with 170 multiprocessors of
// sm_120.
static_assert(plan_nf4_dequantize(4096 * 4096, 2, 0, kA100).tiles == 2048);
static_assert(plan_nf4_dequantize(4096 * 4096, 2, 0, kA100).grid == 864);
static_assert(plan_nf4_dequantize(4096 * 4096, 2, 0, {120, 170, 99 << 10, 96 << 20}).grid == 1020);
static_assert(plan_nf4_dequantize(1, 4, 1, kA100).grid == 1 && !plan_nf4_dequantize(1, 4, 1, kA100).aligned);
static_assert(plan_nf4_dequantize(int64_t{1} << 40, 2, 6, kA100).aligned == false);
static_assert(resident_threads(87) == 1536 && resident_threads(110) == 1536 && resident_threads(121) == 1536);

}  // namespace peft_kernels
