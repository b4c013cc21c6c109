// How the CUDA kernel of rotary is launched: a pure function of the shape.
#pragma once

#include <cstdint>

#include "rotary/rotary.h"

namespace peft_kernels {

struct RotaryPlan {
    static constexpr int kThreads = 256;  // of a CTA at most

    int turned, fours;  // of a row: fours of channels that are rotated with those half a row on; these and the others
    int threads;        // of a position
    int positions;      // of a CTA
    int64_t grid;
};

constexpr RotaryPlan plan_rotary(const RotaryParams& p) {
    RotaryPlan plan{};
    plan.turned = static_cast<int>((p.channels / 2 + 3) / 4);
    plan.fours = plan.turned + static_cast<int>((p.head_dim - p.channels + 3) / 4);
    const int64_t items = (p.parts[0].heads + p.parts[1].heads) * plan.fours;
    plan.threads = 32;
    while (plan.threads < RotaryPlan::kThreads && plan.threads < items) plan.threads += 32;
    plan.positions = RotaryPlan::kThreads / plan.threads;
    plan.grid = (p.batch * p.length + plan.positions - 1) / plan.positions;
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
    return plan_rotary(p);
}

// SmolLM2-135M: 96 threads turn eight channels each, of two positions. Llama 3 8B: 640 pairs of fours, in three rounds.
static_assert(plan(1024, 9, 3, 64).threads == 96 && plan(1024, 9, 3, 64).grid == 512);
static_assert(plan(1024, 32, 8, 128).threads == 256 && plan(1024, 32, 8, 128).grid == 1024);

}  // namespace rotary_plan_examples
}  // namespace peft_kernels
