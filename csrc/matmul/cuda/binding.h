// The product with a frozen weight on a GPU, for the bindings of every family that has one: its launches and memory.
//
// The product of many rows is torch's own: the weight, or a panel of it that stays in the L2, is dequantised and
// multiplied. It is called here, not in Python, so that an op means the same on every device: whoever calls it, traces
// it or compiles it sees one op. The stable ABI passes no Scalar, so addmm cannot be called; linear with a matrix for
// its bias is the same product, with beta = 1.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/cuda/device.h"
#include "common/cuda/sum_parts.h"
#include "common/torch/checks.h"
#include "common/torch/cuda_check.h"
#include "matmul/cuda/plan.h"
#include "matmul/matmul.h"

namespace peft_kernels {

// What was measured of weights [n, k], by the names of devices.
struct TunedCrossovers {
    std::mutex mutex;
    std::map<std::tuple<std::string, int64_t, int64_t>, Crossover> of_weights;
    std::map<std::tuple<int, int, int>, std::string> names;  // of devices; asking the driver is slow

    static TunedCrossovers& instance() {
        static TunedCrossovers tuned;
        return tuned;
    }
};

inline void set_crossover(std::string device_name, int64_t n, int64_t k, int64_t forward, int64_t backward) {
    TunedCrossovers& tuned = TunedCrossovers::instance();
    const std::lock_guard lock(tuned.mutex);
    tuned.of_weights[{device_name, n, k}] = {forward, backward};
}

// That of a weight on the current device.
inline Crossover crossover_of(const DeviceProperties& device, int64_t n, int64_t k) {
    TunedCrossovers& tuned = TunedCrossovers::instance();
    const std::lock_guard lock(tuned.mutex);
    if (tuned.of_weights.empty()) return default_crossover(device);
    int index = 0;
    check_cuda(cudaGetDevice(&index), "cudaGetDevice");
    std::string& name = tuned.names[{index, device.compute_capability, device.multiprocessors}];
    if (name.empty()) {
        cudaDeviceProp properties{};
        check_cuda(cudaGetDeviceProperties(&properties, index), "cudaGetDeviceProperties");
        name = properties.name;
    }
    const auto found = tuned.of_weights.find({name, n, k});
    return found != tuned.of_weights.end() ? found->second : default_crossover(device);
}

// Through the dispatcher: torch::stable::narrow takes a symbol from outside the stable shim. (A function of that name
// would lose to it, which is found by the type of its argument.)
inline Tensor narrowed(const Tensor& tensor, int64_t dim, int64_t start, int64_t length) {
    std::array<StableIValue, 4> stack{torch::stable::detail::from(tensor), torch::stable::detail::from(dim),
                                      torch::stable::detail::from(start), torch::stable::detail::from(length)};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::narrow", "", stack.data(), TORCH_ABI_VERSION));
    return torch::stable::detail::to<Tensor>(stack[0]);
}

class MatmulOnCuda {
protected:
    MatmulOnCuda(const MatmulParams& params, const Tensor& input)
        : params_(params), like_(input), scope_(input.get_device_index()) {
        check_cuda(cuda::query_device(device_), "cudaDeviceGetAttribute");
    }

    // ---- fused ----------------------------------------------------------------------------------------------------

    // The parameters of the product of x, or of the gradient of y. Both are in compute_dtype.
    FusedMatmulParams fused_of(const Tensor& x, bool transposed) const {
        FusedMatmulParams gemm{};
        gemm.weight = params_.weight;
        gemm.transposed = transposed;
        gemm.m = params_.m;
        gemm.x = {x.const_data_ptr(), params_.compute_dtype, x.stride(0)};
        return gemm;
    }

    static const char* refusal_of(const FusedMatmulParams& gemm) {
        if (!gemm.weight) return nullptr;
        return cuda::fused_matmul_refusal(gemm);
    }

    void run_fused(FusedMatmulParams& gemm) {
        const int64_t bytes = cuda::fused_matmul_workspace(gemm);
        const Tensor workspace = floats(ceil_div(bytes, 4));
        gemm.workspace = workspace.mutable_data_ptr();
        run(cuda::fused_matmul(gemm, scope_.stream()), "the base product");
    }

    // ---- torch's --------------------------------------------------------------------------------------------------

    Tensor in_compute_dtype(const Tensor& input) const {
        if (input.scalar_type() == scalar_type(params_.compute_dtype)) return input;
        const auto sizes = input.sizes();
        Tensor converted = empty({sizes.begin(), sizes.end()}, params_.compute_dtype);
        torch::stable::copy_(converted, input);
        return converted;
    }

    // out = add + input · Wᵀ, transposed: input · W, in compute_dtype. add: like out, and may be out; forward also [n].
    void multiply(const MatmulPlan& plan, const Tensor& input, const std::optional<Tensor>& add, Tensor& out,
                  bool transposed) {
        const int64_t n = params_.n, k = params_.k;
        Tensor panel = empty({plan.panel_rows, k}, params_.compute_dtype);
        for (int64_t n0 = 0; n0 < n; n0 += plan.panel_rows) {
            const int64_t count = std::min(plan.panel_rows, n - n0);
            const Tensor weight = narrowed(panel, 0, 0, count);
            Nf4DequantizeParams dequantize{};
            dequantize.weight = *params_.weight;
            dequantize.first = n0 * k;
            dequantize.count = count * k;
            dequantize.out = panel.mutable_data_ptr();
            dequantize.out_dtype = params_.compute_dtype;
            if (k > 0) run(cuda::nf4_dequantize(dequantize, scope_.stream()), "nf4_dequantize");
            if (transposed) {
                linear(narrowed(input, 1, n0, count), torch::stable::transpose(weight, 0, 1), n0 > 0 ? out : add, out);
            } else {
                Tensor part = narrowed(out, 1, n0, count);
                std::optional<Tensor> part_of_add;
                if (add) part_of_add = narrowed(*add, add->dim() - 1, n0, count);
                linear(input, weight, part_of_add, part);
            }
        }
    }

    // out = add + input · weightᵀ
    static void linear(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& add, Tensor& out) {
        std::array<StableIValue, 4> stack{torch::stable::detail::from(input), torch::stable::detail::from(weight),
                                          torch::stable::detail::from(add), torch::stable::detail::from(out)};
        STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "out", stack.data(), TORCH_ABI_VERSION));
        torch::stable::detail::to<Tensor>(stack[0]);
    }

    // ---- memory and errors ----------------------------------------------------------------------------------------

    Tensor empty(std::vector<int64_t> sizes, DType dtype) const {
        return torch::stable::new_empty(like_, sizes, scalar_type(dtype));
    }
    Tensor floats(int64_t count) const { return empty({count}, DType::kFloat32); }

    // Where a kernel leaves `splits` parts of a result, which `segment` adds up; one part is the result itself. Null if
    // the result is not wanted.
    float* parts_of(Tensor& result, int64_t splits, Tensor& parts, SumPartsParams::Segment& segment) const {
        if (result.numel() == 0) return nullptr;
        if (splits == 1) return static_cast<float*>(result.mutable_data_ptr());
        parts = floats(splits * result.numel());
        float* const data = static_cast<float*>(parts.mutable_data_ptr());
        segment = {data, static_cast<float*>(result.mutable_data_ptr()), result.numel(), static_cast<int32_t>(splits)};
        return data;
    }

    static void run(int status, const char* what) { check_cuda(status, what); }

    const MatmulParams& params_;
    const Tensor& like_;
    const CudaScope scope_;
    DeviceProperties device_{};
};

}  // namespace peft_kernels
