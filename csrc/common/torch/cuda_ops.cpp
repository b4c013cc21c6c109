// What Python asks of CUDA itself, before any tensor is given to a kernel.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <vector>

#include "common/torch/registration.h"

#if defined(PEFT_KERNELS_CUDA)
#include "common/cuda/device.h"
#include "common/torch/cuda_check.h"
#endif

namespace peft_kernels {
namespace {

// The versions of the driver and of the linked runtime; zeros in a build without CUDA.
std::vector<int64_t> cuda_versions() {
#if defined(PEFT_KERNELS_CUDA)
    cuda::CudaVersions versions;
    check_cuda(cuda::query_versions(versions), "cudaDriverGetVersion");
    return {versions.driver, versions.runtime};
#else
    return {0, 0};
#endif
}

}  // namespace
}  // namespace peft_kernels

STABLE_TORCH_LIBRARY_FRAGMENT(PEFT_KERNELS_NAMESPACE, m) { m.def("cuda_versions() -> int[]"); }

STABLE_TORCH_LIBRARY_IMPL(PEFT_KERNELS_NAMESPACE, CompositeExplicitAutograd, m) {
    m.impl("cuda_versions", TORCH_BOX(&peft_kernels::cuda_versions));
}
