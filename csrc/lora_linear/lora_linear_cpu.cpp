// The CPU kernels of lora_linear, compiled once per instruction set.
//
// Training shapes (lora_linear_strips.h). Every product is the same loop over rows and strips (common/microkernel.h):
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
// Decode shapes (lora_linear_dot.h): a few rows; vectors run along k, and nothing is transposed at all.
//
// Where AMX computes in bf16, all shapes of more than one row are products of tiles instead (lora_linear_tiles.h).
#include "lora_linear/lora_linear_combed.h"
#include "lora_linear/lora_linear_dot.h"
#include "lora_linear/lora_linear_strips.h"
#if defined(__AMX_BF16__)
#include "lora_linear/lora_linear_tiles_backward.h"
#include "lora_linear/lora_linear_tiles_forward.h"
#endif

namespace peft_kernels {
namespace PEFT_KERNELS_ISA {

void lora_linear_forward(const LoraLinearForwardParams& params) {
#if defined(__AMX_BF16__)
    // One row: tiles take as long on 4096 x 4096, but 104 instead of 62 us on 576 x 576, where packing counts.
    if (suits_tiles(params) && (params.m != 1 || !suits_dot(params))) return TileForward(params).run();
#endif
#if defined(__AVX512BF16__)
    if (suits_combs(params)) return CombedForward(params).run();
#endif
    if (!suits_dot(params)) return StripForward(params).run();
    if (params.m == 1) return forward_dot<1>(params);
    if (params.m == 2) return forward_dot<2>(params);
    if (params.m <= 4) return forward_dot<4>(params);
    if (params.m <= kDotRows) return forward_dot<kDotRows>(params);
    forward_dot<16>(params);
}

void lora_linear_backward(const LoraLinearBackwardParams& params) {
#if defined(__AMX_BF16__)
    if (suits_tiles(params)) return TileBackward(params).run();
#endif
    StripBackward(params).run();
}

}  // namespace PEFT_KERNELS_ISA
}  // namespace peft_kernels
