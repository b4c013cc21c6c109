// The CPU kernels of lora_linear, compiled once per instruction set: lora_linear/cpu/plan.h chooses one of them.
#include "lora_linear/cpu/kernels.h"

#include "common/cpu/simd.h"
#include "lora_linear/cpu/plan.h"

namespace peft_kernels::PEFT_KERNELS_ISA {

void lora_linear_forward(const LoraLinearForwardParams& params) {
    switch (plan_lora_linear_cpu(problem_of(params, false, kIsa)).kernel) {
#if defined(__AMX_BF16__)
        case LoraLinearKernel::kTiles: return forward_tiles(params);
#endif
#if defined(__AVX512BF16__)
        case LoraLinearKernel::kInterleaved: return forward_interleaved(params);
#endif
        case LoraLinearKernel::kDot: return forward_dot(params);
        default: return forward_many_rows(params);
    }
}

void lora_linear_backward(const LoraLinearBackwardParams& params) {
#if defined(__AMX_BF16__)
    if (plan_lora_linear_cpu(problem_of(params, true, kIsa)).kernel == LoraLinearKernel::kTiles)
        return backward_tiles(params);
#endif
    backward_many_rows(params);
}

}  // namespace peft_kernels::PEFT_KERNELS_ISA
