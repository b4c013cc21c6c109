// What the bindings share beside their checks: results, and workspaces of the size that a launcher asks for.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <vector>

#include "common/checks.h"
#include "common/parallel_for.h"

namespace peft_kernels {

inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
    return torch::stable::new_empty(like, std::vector<int64_t>(sizes), dtype);
}

// Runs a CPU launcher with a workspace of the size that it asks for. Params has threads, workspace, workspace_bytes.
template <class Params>
void run_cpu(void (*launch)(const Params&), Params& params, const Tensor& like) {
    int64_t bytes = 0;
    params.threads = num_threads();
    params.workspace = nullptr;
    params.workspace_bytes = &bytes;
    launch(params);
    alignas(64) char small[16384];  // enough for decode shapes, where an allocation would cost as much as 10 rows of W
    if (bytes <= static_cast<int64_t>(sizeof small)) {
        params.workspace = small;
        launch(params);
        return;
    }
    const Tensor workspace = torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
    params.workspace = workspace.mutable_data_ptr();
    launch(params);
}

}  // namespace peft_kernels
