// The dropout op: schema, checks, allocation. See dropout.h for what it computes.
#include <string>

#include "common/torch/checks.h"
#include "common/torch/launch.h"
#include "common/torch/registration.h"
#include "dropout/dropout.h"

#if defined(PEFT_KERNELS_CUDA)
#include "common/torch/cuda_check.h"
#endif

namespace peft_kernels {
namespace {

// x of any shape -> y, dense
Tensor run(Tensor given_x, Tensor seed, double p) {
    const Tensor x = as_dense(given_x);
    DropoutParams params{};
    params.count = x.numel();
    params.x = {x.const_data_ptr(), check_float_dtype(x, "x"), kDropoutColumns};
    if (!(p >= 0 && p < 1)) bad_argument("p", std::to_string(p), "a probability in [0, 1)");
    params.p = p;
    check_array(seed, "seed", ScalarType::Long, 1, x);
    params.seed = static_cast<const int64_t*>(seed.const_data_ptr());
    Tensor y = empty(x, x.sizes(), dtype_of(x));
    if (params.count == 0) return y;
    params.y = {y.mutable_data_ptr(), params.x.dtype, kDropoutColumns};
#if defined(PEFT_KERNELS_CUDA)
    if (runs_on_cuda(x)) {
        const CudaScope scope(x.get_device_index());
        check_cuda(cuda::dropout(params, scope.stream()), "dropout");
        return y;
    }
#endif
    dispatch::dropout(params);
    return y;
}

}  // namespace
}  // namespace peft_kernels

STABLE_TORCH_LIBRARY_FRAGMENT(PEFT_KERNELS_NAMESPACE, m) {
    m.def("dropout(Tensor x, Tensor seed, float p) -> Tensor y");
}

PEFT_KERNELS_IMPLEMENT(m) { m.impl("dropout", TORCH_BOX(&peft_kernels::run)); }
