// Scales the columns of a matrix, and sums its product with another over the rows:
//
//   out [m, columns] = scale ⊙ in        sums [part of the rows, columns] = Σₘ row_scaleₘ in ⊙ other
//
//     rows  ┌──────┬──────┬───     a CTA: 128 columns, 4 of each lane; its 8 warps take turns at the rows
//       ↓   │ 0  0 │ 1  0 │        and add their sums in shared memory, in order
//           ├──────┼──────┼───
//           │ 0  1 │ 1  1 │        (column block, row block)
//
// The limit is the traffic: 8 bytes a lane and row of each 16-bit matrix, in whole sectors. Dtypes are told apart at
// run time, by branches that a warp takes together: there is one instance for 27 combinations.
#pragma once

#include "common/cuda/fours.cuh"
#include "common/cuda/scale_columns.h"

namespace peft_kernels::cuda {

static __global__ void __launch_bounds__(32 * ScaleColumnsPlan::kWarps, ScaleColumnsPlan::kResident)
    scale_columns_kernel(const __grid_constant__ ScaleColumnsParams params) {
    constexpr int kWarps = ScaleColumnsPlan::kWarps, kColumns = ScaleColumnsPlan::kColumns;
    __shared__ float4 warp_sums[kWarps][32];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int64_t column = (int64_t{blockIdx.x} * 32 + lane) * kColumns;
    const int count = count_four(column, params.plan.columns);
    const int64_t first_row = blockIdx.y * params.plan.rows;
    const int64_t end = min(params.m, first_row + params.plan.rows);
    const bool in_aligned = has_aligned_fours(params.in), out_aligned = has_aligned_fours(params.out);
    const bool other_aligned = has_aligned_fours(params.other);

    const float4 scale = load_scales(params.scale, column, count);
    float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 1
    for (int64_t row = first_row + warp; row < end; row += kWarps) {
        const float4 in = load_four(params.in, row, column, count, in_aligned);
        if (params.sums) {
            const float4 other = load_four(params.other, row, column, count, other_aligned);
            const float r = params.row_scale ? params.row_scale[row] : 1.0f;
            sum.x += r * in.x * other.x, sum.y += r * in.y * other.y;
            sum.z += r * in.z * other.z, sum.w += r * in.w * other.w;
        }
        if (params.out.data)  // in turn, as ptxas would spill on sm_100 and sm_120
            store_four<true>(params.out, row, column, count, out_aligned,
                             make_float4(scale.x * in.x, scale.y * in.y, scale.z * in.z, scale.w * in.w));
    }
    if (!params.sums) return;
    warp_sums[warp][lane] = sum;
    __syncthreads();
    if (warp > 0) return;
#pragma unroll
    for (int w = 1; w < kWarps; ++w) {
        const float4 part = warp_sums[w][lane];
        sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
    }
    const Matrix sums{params.sums, DType::kFloat32, params.plan.columns};
    store_four(sums, blockIdx.y, column, count, has_aligned_fours(sums), sum);
}

}  // namespace peft_kernels::cuda
