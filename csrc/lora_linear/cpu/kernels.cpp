// The CPU kernels of lora_linear, compiled once per instruction set.
//
// Many rows (lora_linear/cpu/many_rows.h). Every product is the same loop over rows and strips
// (common/cpu/microkernel.h):
//
//   forward    s    = drop(x) Aᵀ                 rows of x           strips of A
//              y    = x Wᵀ + b + scaling s Bᵀ    rows of x, s        strips of W (decoded) and B, one set of sums
//   backward   ds   = scaling/(1-p) dy B         rows of dy          strips of Bᵀ
//              dx   = dy W + mask ⊙ (ds A)       rows of dy, ds      strips of Wᵀ (decoded) and Aᵀ
//              dA   = dsᵀ drop(x)                columns of ds       strips of x
//              dB   = scaling dyᵀ s              columns of s        strips of dy
//
// The base product runs in bf16 pairs where compute_dtype is bf16 and the processor multiplies them, else in fp32;
// the LoRA branch runs in fp32. The forward's dropout mask is made again in the backward, once.
//
// The plan (lora_linear/cpu/plan.h) chooses among this and three others: dot.h and interleaved.h for few rows, whose
// vectors run along k and transpose nothing, and tiles.h for AMX.
#include "lora_linear/cpu/dot.h"
#include "lora_linear/cpu/interleaved.h"
#include "lora_linear/cpu/many_rows.h"
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
            if (params.m == 1) return forward_dot<1>(params);
            if (params.m == 2) return forward_dot<2>(params);
            if (params.m <= 4) return forward_dot<4>(params);
            if (params.m <= kDotRows) return forward_dot<kDotRows>(params);
            return forward_dot<16>(params);
        default: return ManyRowsForward(params).run();
    }
}

void lora_linear_backward(const LoraLinearBackwardParams& params) {
#if defined(__AMX_BF16__)
    if (plan_lora_linear_cpu(problem_of(params, true, kIsa)).kernel == LoraLinearKernel::kTiles)
        return TileBackward(params).run();
#endif
    ManyRowsBackward(params).run();
}

}  // namespace PEFT_KERNELS_ISA
}  // namespace peft_kernels
