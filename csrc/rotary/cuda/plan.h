// How the CUDA kernel of rotary is launched: a pure function of the shape.
#pragma once

#include <cstdint>

#include "common/arithmetic.h"
#include "rotary/rotary.h"

namespace peft_kernels {

struct RotaryPlan {
    static constexpr int kThreads = 256;   // of a CTA at most
    static constexpr int kPositions = 64;  // the same: the limit of a block's third dimension

    int turned, vectors;  // of a row: vectors of channels that are rotated with those half a row on; and all
    int vectors_together, heads, positions;  // of a CTA's threads; each goes through further vectors and heads
    int64_t grid;

    // Channels of a vector, which has 16 bytes.
    static constexpr int vector_of(int64_t element_bytes) { return static_cast<int>(16 / element_bytes); }
};

constexpr RotaryPlan plan_rotary(const RotaryParams& p) {
    const auto least = [](int64_t a, int64_t b) { return static_cast<int>(a < b ? a : b); };
    RotaryPlan plan{};
    const int vector = RotaryPlan::vector_of(size_of(p.parts[0].in.dtype));
    plan.turned = static_cast<int>(ceil_div(p.channels / 2, vector));
    plan.vectors = plan.turned + static_cast<int>(ceil_div(p.head_dim - p.channels, vector));
    plan.vectors_together = least(plan.vectors, RotaryPlan::kThreads);
    plan.heads = least(p.parts[0].heads + p.parts[1].heads, RotaryPlan::kThreads / plan.vectors_together);
    plan.positions = least(RotaryPlan::kPositions, RotaryPlan::kThreads / (plan.vectors_together * plan.heads));
    plan.grid = ceil_div(p.batch * p.length, plan.positions);
    return plan;
}

namespace rotary_plan_examples {

constexpr RotaryPlan plan(int64_t positions, int64_t heads, int64_t kv_heads, int64_t head_dim) {
    RotaryParams p{};
    p.batch = 1;
    p.length = positions;
    p.head_dim = p.channels = head_dim;
    p.parts[0].heads = heads;
    p.parts[1].heads = kv_heads;
    p.parts[0].in.dtype = DType::kBFloat16;
    return plan_rotary(p);
}

// SmolLM2-135M: all 12 heads of five positions. Llama 3 8B: 32 of 40 heads at a time.
static_assert(plan(1024, 9, 3, 64).heads == 12 && plan(1024, 9, 3, 64).grid == 205);
static_assert(plan(1024, 32, 8, 128).heads == 32 && plan(1024, 32, 8, 128).grid == 1024);
static_assert(plan(1024, 1, 1, 2).positions == 64);

}  // namespace rotary_plan_examples
}  // namespace peft_kernels
