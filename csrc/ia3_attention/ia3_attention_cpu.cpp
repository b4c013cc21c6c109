// The CPU kernels of ia3_attention, compiled once per instruction set.
#include "ia3_attention/ia3_attention_backward.h"
#include "ia3_attention/ia3_attention_decode.h"
#include "ia3_attention/ia3_attention_forward.h"

namespace peft_kernels {
namespace PEFT_KERNELS_ISA {

void ia3_attention_forward(const Ia3AttentionForwardParams& params) {
    if (ia3_attention_plan(params).decodes) return Decode(params).run();
    dispatch_products(params.q.dtype, [&](auto products) { Forward<decltype(products)>(params).run(); });
}

void ia3_attention_backward(const Ia3AttentionBackwardParams& params) {
    dispatch_products(params.q.dtype, [&](auto products) { Backward<decltype(products)>(params).run(); });
}

}  // namespace PEFT_KERNELS_ISA
}  // namespace peft_kernels
