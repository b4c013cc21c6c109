// The launch of the dropout kernel.
#include <cuda_runtime.h>

#include "common/arithmetic.h"
#include "common/cuda/launch.cuh"
#include "dropout/cuda/kernel.cuh"

namespace peft_kernels::cuda {

int dropout(const DropoutParams& params, void* stream) {
    const unsigned grid = static_cast<unsigned>(ceil_div(params.count, 8 * kDropoutThreads));
    return dispatch_dtype(params.x.dtype, [&](auto* type) {
        return launch_kernel(&dropout_kernel<std::remove_pointer_t<decltype(type)>>, grid, kDropoutThreads, 0,
                             {params, dropout_threshold(params.p), dropout_keep_scale(params.p)}, stream);
    });
}

}  // namespace peft_kernels::cuda
