// Which kernels a lora_linear runs on a GPU, and how they are cut: a pure function of the problem and the device.
#pragma once

#include <cstdint>

#include "common/cuda_device.h"
#include "lora_linear/lora_linear_branch_plan.h"

namespace peft_kernels {

struct LoraLinearProblem {
    int64_t m, n, k;
    RankGroups ranks;
    int64_t x_size, dy_size;  // of an element
    bool has_base;         // the weight is in 4 bits; else the caller made the base product
    bool transposed;       // backward
};

struct LoraLinearCudaPlan {
    ShrinkPlan shrink;
    ExpandPlan expand;
    DyPassPlan dy_pass;
    XPassPlan x_pass;
    int64_t panel_rows;  // of the weight, dequantised at a time
};

constexpr LoraLinearCudaPlan plan_lora_linear_cuda(const LoraLinearProblem& p, const DeviceProperties& device) {
    LoraLinearCudaPlan plan{};
    const int sms = device.multiprocessors;
    plan.shrink = plan_shrink(p.m, p.k, p.x_size, p.ranks, sms);
    plan.dy_pass = plan_dy_pass(p.m, p.n, p.dy_size, p.ranks, sms);
    plan.x_pass = plan_x_pass(p.m, p.k, p.x_size, p.ranks, sms);
    plan.expand = plan_expand(p.m, p.transposed ? p.k : p.n, p.ranks, sms);
    plan.panel_rows = p.n;
    return plan;
}

}  // namespace peft_kernels
