// The launch of the combine kernels, in their order.
#include <cuda_runtime.h>

#include <algorithm>

#include "combine/cuda/kernel.cuh"
#include "common/cuda/launch.cuh"
#include "common/dropout.h"

namespace peft_kernels::cuda {
namespace {

int begin(const CombineKernelParams& params, char* workspace, void* stream) {
    const CombineParams& p = params.problem;
    CombineBeginParams some{};
    some.bins_of_delta = params.plan.digits * CombinePlan::kBins;
    for (int64_t first = 0; first < p.num_deltas; first += CombinePlan::kDeltas) {
        const int64_t count = std::min<int64_t>(CombinePlan::kDeltas, p.num_deltas - first);
        std::copy(p.deltas + first, p.deltas + first + count, some.deltas);
        some.table = reinterpret_cast<Delta*>(workspace) + first;
        some.bins = params.bins + first * some.bins_of_delta;
        const int error =
            launch_kernel(&combine_begin_kernel, static_cast<unsigned>(count), kCombineThreads, 0, some, stream);
        if (error) return error;
    }
    return cudaSuccess;
}

}  // namespace

int combine(const CombineParams& problem, const CombinePlan& plan, void* stream) {
    char* const workspace = static_cast<char*>(problem.workspace);
    CombineKernelParams params{};
    params.problem = problem;
    params.plan = plan;
    params.of_products = !problem.deltas[0].values.data;
    params.deltas = reinterpret_cast<const Delta*>(workspace);
    params.bins = reinterpret_cast<unsigned long long*>(workspace + plan.bins_at);
    params.thresholds = reinterpret_cast<CombineThreshold*>(workspace + plan.thresholds_at);
    params.ties = reinterpret_cast<uint8_t*>(workspace + plan.ties_at);
    params.drop_threshold = dropout_threshold(problem.p);
    params.keep_scale = dropout_keep_scale(problem.p);
    if (const int error = begin(params, workspace, stream)) return error;
    const auto launch = [&](auto kernel, int64_t x, int64_t y, int threads) {
        const dim3 grid(static_cast<unsigned>(x), static_cast<unsigned>(y));
        return launch_kernel(kernel, grid, threads, 0, params, stream);
    };
    for (params.digit = 0; params.digit < plan.digits; ++params.digit)
        if (const int error = launch(&combine_histogram_kernel, plan.ctas, problem.num_deltas, kCombineThreads))
            return error;
    if (plan.trims) {
        if (const int error = launch(&combine_ties_kernel, plan.ctas, problem.num_deltas, kCombineThreads))
            return error;
        if (const int error = launch(&combine_scan_kernel, problem.num_deltas, 1, CombinePlan::kScanThreads))
            return error;
    }
    const bool elects = problem.election != Election::kNone;
    const int64_t tiles = count_tiles(plan, elects ? CombinePlan::kRowsOfVote : CombinePlan::kRowsOfSum);
    return launch(elects ? &combine_merge_kernel<true> : &combine_merge_kernel<false>,
                  ceil_div(tiles, CombinePlan::kWarps), 1, kCombineThreads);
}

}  // namespace peft_kernels::cuda
