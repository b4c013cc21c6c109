// The CPU kernels that a lora_linear is made by; each is a source of its own, which joins a product of matmul/cpu/ and
// the branch of lora/cpu/ in one set of sums. Compiled once per instruction set.
#pragma once

#include "lora_linear/lora_linear.h"

namespace peft_kernels::PEFT_KERNELS_ISA {

void forward_tiles(const LoraLinearForwardParams& params);        // with AMX
void forward_interleaved(const LoraLinearForwardParams& params);  // with AVX-512 and bf16
void forward_dot(const LoraLinearForwardParams& params);
void forward_many_rows(const LoraLinearForwardParams& params);

void backward_tiles(const LoraLinearBackwardParams& params);  // with AMX
void backward_many_rows(const LoraLinearBackwardParams& params);

}  // namespace peft_kernels::PEFT_KERNELS_ISA
