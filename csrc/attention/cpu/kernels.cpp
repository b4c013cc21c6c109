// The CPU kernels of attention, compiled once per instruction set.
//
// With Q̃ = l_q⊙l_k⊙Q, O′ = softmax(scale Q̃Kᵀ)V and O = l_v⊙O′ the scales cost no pass over K or V. All products are
// of rows and strips (common/cpu/microkernel.h), for blocks of 256 keys and as many queries as a group of strips has
// lanes:
//
//   forward (attention/cpu/forward.h)      rows           strips
//     Sᵀ  = K Q̃ᵀ                           keys           queries are the lanes       ┌──── queries: lanes ────┐
//     O′ᵀ += Vᵀ Pᵀ                         channels       weights, as they come     ┌─┐ ┌──────────────────────┐
//   backward (attention/cpu/backward.h)                                             │K│ │ Sᵀ → Pᵀ: max and sum │
//     Sᵀ, dPᵀ = V dO′ᵀ                     keys           queries are the lanes     │ │ │ run down the columns │
//     dV  += Pᵀ dO′, dK += dSᵀ Q̃           keys           queries are the steps     └─┘ └──────────────────────┘
//     dQ̃ᵀ += Kᵀ dSᵀ                        channels       dS, as it comes           ┌──┐┌──────────────────────┐
//                                                                                   │Vᵀ││ O′ᵀ                  │
//   with dS = P ⊙ (dP - rowsum(dO⊙O)).                                              └──┘└──────────────────────┘
//
// The scores stand transposed, so that a query is a lane: the softmax needs no horizontal sums, and its results are
// operands as they lie. With RoPE l_k cannot move into the queries; keys are scaled and rotated while they are packed.
// A prefix is a second set of keys, for queries without l_k and gradients without l_v; forward, the two results are put
// together by their maxima and sums.
//
// Tasks. Forward: some neighbouring key heads of a sequence and a part of their queries; each packs the keys it needs.
// Backward: a key head, a part of the batch and of the keys; what several of them add to is kept apart and added up in
// one order at the end. The plan (attention/cpu/plan.h) does not ask for the number of threads, so neither do results.
//
// Few queries (attention/cpu/few_queries.h): nothing is packed, keys are read where they lie.
#include "attention/cpu/backward.h"
#include "attention/cpu/few_queries.h"
#include "attention/cpu/forward.h"

namespace peft_kernels {
namespace PEFT_KERNELS_ISA {

void attention_forward(const AttentionForwardParams& params) {
    if (attention_plan(params, kIsa).kernel == AttentionKernel::kFewQueries) return FewQueries(params).run();
    dispatch_multiply(params.q.dtype == DType::kBFloat16,
                      [&](auto multiply) { Forward<decltype(multiply)>(params).run(); });
}

void attention_backward(const AttentionBackwardParams& params) {
    dispatch_multiply(params.q.dtype == DType::kBFloat16,
                      [&](auto multiply) { Backward<decltype(multiply)>(params).run(); });
}

}  // namespace PEFT_KERNELS_ISA
}  // namespace peft_kernels
