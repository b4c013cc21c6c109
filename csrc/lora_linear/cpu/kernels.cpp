// The CPU kernels of lora_linear, compiled once per instruction set: lora_linear/cpu/plan.h chooses one of them.
#include "lora_linear/cpu/kernels.h"

#include "common/cpu/simd.h"
#include "lora_linear/cpu/dot.h"
#include "lora_linear/cpu/interleaved.h"
#include "lora_linear/cpu/plan.h"
#if defined(__AMX_BF16__)
#include "lora_linear/cpu/tiles_backward.h"
#include "lora_linear/cpu/tiles_forward.h"
#endif

namespace peft_kernels {
namespace PEFT_KERNELS_ISA {

void lora_linear_forward(const LoraLinearForwardParams& params) {
    switch (plan_lora_linear_cpu(problem_of(params, false, kIsa)).kernel) {
#if defined(__AMX_BF16__)
        case LoraLinearKernel::kTiles: return TileForward(params).run();
#endif
#if defined(__AVX512BF16__)
        case LoraLinearKernel::kInterleaved: return InterleavedForward(params).run();
#endif
        case LoraLinearKernel::kDot:
            if (params.m == 1) return forward_dot_rows<1>(params);
            if (params.m == 2) return forward_dot_rows<2>(params);
            if (params.m <= 4) return forward_dot_rows<4>(params);
            if (params.m <= kDotRows) return forward_dot_rows<kDotRows>(params);
            return forward_dot_rows<16>(params);
        default: return forward_many_rows(params);
    }
}

void lora_linear_backward(const LoraLinearBackwardParams& params) {
#if defined(__AMX_BF16__)
    if (plan_lora_linear_cpu(problem_of(params, true, kIsa)).kernel == LoraLinearKernel::kTiles)
        return TileBackward(params).run();
#endif
    backward_many_rows(params);
}

}  // namespace PEFT_KERNELS_ISA
}  // namespace peft_kernels
