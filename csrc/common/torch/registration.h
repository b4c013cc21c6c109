// How a family registers its ops: a schema in PEFT_KERNELS_NAMESPACE, and one function for the tensors of either
// device,
//
//   STABLE_TORCH_LIBRARY_FRAGMENT(PEFT_KERNELS_NAMESPACE, m) { m.def("family_forward(Tensor x) -> Tensor"); }
//   PEFT_KERNELS_IMPLEMENT(m) { m.impl("family_forward", TORCH_BOX(&peft_kernels::forward)); }
//
// The tests compile the bindings a second time, with PEFT_KERNELS_EMULATED and for a CUDA runtime in software: their
// ops then have a namespace of their own and run the CUDA kernels on CPU tensors.
#pragma once

#include <torch/csrc/stable/library.h>

#if defined(PEFT_KERNELS_EMULATED)
#define PEFT_KERNELS_NAMESPACE peft_kernels_emulated
#else
#define PEFT_KERNELS_NAMESPACE peft_kernels
#endif

#define PEFT_KERNELS_IMPLEMENT_FOR_(key) \
    STABLE_TORCH_LIBRARY_IMPL(PEFT_KERNELS_NAMESPACE, key, library) { implement_ops(library); }

#if defined(PEFT_KERNELS_CUDA) && !defined(PEFT_KERNELS_EMULATED)
#define PEFT_KERNELS_IMPLEMENT_FOR_EACH_ PEFT_KERNELS_IMPLEMENT_FOR_(CPU) PEFT_KERNELS_IMPLEMENT_FOR_(CUDA)
#else
#define PEFT_KERNELS_IMPLEMENT_FOR_EACH_ PEFT_KERNELS_IMPLEMENT_FOR_(CPU)
#endif

#define PEFT_KERNELS_IMPLEMENT(m)                                       \
    static void implement_ops(torch::stable::detail::StableLibrary& m); \
    PEFT_KERNELS_IMPLEMENT_FOR_EACH_                                    \
    static void implement_ops(torch::stable::detail::StableLibrary& m)
