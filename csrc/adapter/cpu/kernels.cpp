// The CPU kernels of adapter, compiled once per instruction set.
//
// A task takes a block of rows all the way (adapter/cpu/forward.h, adapter/cpu/backward.h), so that x is read from
// memory once and y written once, for any d; the block's x and the adapter's two matrices stay in the L2 cache.
// Products are those of adapter/cpu/products.h:
//
//   forward    z  = LN?(x) W_downᵀ + b_down       block of x, as it is or normalised       r outputs
//              y  = residual + s (h W_upᵀ + b_up)   h = σ(z)                                d outputs, 64 at a time
//   backward   dz = s (g W_up) ⊙ σ'(z)            g = dropout(grad_y)                      r outputs
//              dx = dz W_down (+ grad_y)                                                   d outputs, 64 at a time
//   then       gᵀ h, dzᵀ n                        64 columns of all rows of grad_y or x    r x 64 sums
//
//                 d                     r            d
//            ┌─────────┐             ┌───┐     ┌──┬──┬──┬─
//    block   │    x    │ · W_downᵀ → │ z │ → h │ y│  │  │ …       The backward is the same picture with W_up first.
//            └─────────┘             └───┘     └──┴──┴──┴─
//
// A LayerNorm of bf16 x that is multiplied in bf16 takes no pass but that of its statistics (not on tiles): x stands as
// it is, and z = rstd (x (W_down γ)ᵀ - μ Σ W_down γ) + b_down + W_down β.
//
// The gradient of a LayerNorm takes no pass of its own: with n = (x - μ) rstd, dn = dz (W_down γ) and z = W_down (γ n +
// β) + b_down, the two means over d that it needs are sums over r: of dn, dz · mean(W_down γ); of dn n, dz · (z -
// W_down β - b_down) / d. Its μ and rstd come from rows in the cache, in two passes where one would cancel.
//
// Numbers may be rounded to bf16 where x and the weights are bf16 or under autocast; otherwise products keep fp32.
#include "adapter/cpu/backward.h"
#include "adapter/cpu/forward.h"

namespace peft_kernels {
namespace PEFT_KERNELS_ISA {

void adapter_forward(const AdapterForwardParams& params) {
    dispatch_product(params.rounds(), [&](auto product) { AdapterForward<decltype(product)>(params).run(); });
}

void adapter_backward(const AdapterBackwardParams& params) {
    dispatch_product(params.rounds(), [&](auto product) { AdapterBackward<decltype(product)>(params).run(); });
}

}  // namespace PEFT_KERNELS_ISA
}  // namespace peft_kernels
