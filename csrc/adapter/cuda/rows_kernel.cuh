// The adapter's work that is not a product with d: what happens to rows of the bottleneck, and LayerNorms.
#pragma once

#include "adapter/cuda/tile.cuh"
#include "common/cuda/activation.cuh"

namespace peft_kernels::cuda {

// ---- the bottleneck ------------------------------------------------------------------------------------------------

constexpr int kWarpsOfRows = kAdapterThreads / 32;

// A warp takes a row.
static __global__ void __launch_bounds__(kAdapterThreads)
    adapter_bottleneck_kernel(const __grid_constant__ AdapterBottleneckParams params) {
    const CudaAdapters& all = params.adapters;
    const BottleneckParts& parts = params.parts;
    const RowBlock block = find_rows(all, blockIdx.x, kWarpsOfRows);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (warp >= block.rows) return;
    const int64_t row = block.row0 + warp;
    if (!block.adapter) {
        if (lane == 0 && params.grad_gate) params.grad_gate[row] = 0;
        return;
    }
    const CudaAdapter& adapter = *block.adapter;
    if (!params.backward) {
        // A pivot is the median of the means of 8 vectors. Four vectors have means at least as far from μ, so that it
        // is at most √(d / 16) deviations away, 32 of 16384 fp32 numbers: what cancels is a few bits of fp32. An
        // outlier among them, as models have, does not move it.
        const float pivot = all.normalizes ? parts.pivots[row] : 0;
        float from_pivot = 0, rstd = 1;
        if (all.normalizes) {
            float squares = 0;
            for (int part = 0; part < parts.splits; ++part) {
                const float2 sums = reinterpret_cast<const float2*>(parts.row_sums)[part * all.m + row];
                const float columns = static_cast<float>(min(parts.split_columns, all.d - part * parts.split_columns));
                const float apart = parts.pivots[part * all.m + row] - pivot;
                from_pivot += fmaf(columns, apart, sums.x);
                squares += fmaf(apart, fmaf(columns, apart, 2 * sums.x), sums.y);
            }
            from_pivot /= static_cast<float>(all.d);
            const float variance = squares / static_cast<float>(all.d) - from_pivot * from_pivot;
            rstd = 1 / sqrtf((variance < 0 ? 0 : variance) + adapter.eps);  // a NaN stays one
            if (params.stats && lane == 0) store_global8(params.stats + 2 * row, pivot + from_pivot, rstd);
        }
        for (int rank = lane; rank < all.stride; rank += 32) {
            float h = 0;
            if (rank < adapter.rank) {
                float z = 0;
                for (int part = 0; part < parts.splits; ++part) {
                    z += parts.sums[(part * all.m + row) * all.max_rank + rank];
                    if (all.normalizes) {
                        const float apart = from_pivot + (pivot - parts.pivots[part * all.m + row]);
                        z = fmaf(-apart, adapter.mean_weight[part * all.max_rank + rank], z);
                    }
                }
                if (all.normalizes)
                    z = fmaf(rstd, z, adapter.offset[rank]);
                else if (adapter.down_bias.data)
                    z += load_element(adapter.down_bias, 0, rank);
                if (params.pre.data) store_element(params.pre, row, rank, z);
                h = activate(params.activation, z).value;
            }
            store_element(params.h, row, rank, h);
        }
        return;
    }

    const float gated = params.keep_scale * (params.gate ? params.gate[row] : 1.0f), scale = *adapter.scale;
    float of_gate = 0, mean = 0, correlation = 0;
    for (int rank = lane; rank < all.stride; rank += 32) {
        float dz = 0, h = 0;
        if (rank < adapter.rank) {
            float t = 0;
            for (int part = 0; part < parts.splits; ++part) t += parts.sums[(part * all.m + row) * all.max_rank + rank];
            const float z = load_element({params.pre.data, params.pre.dtype, params.pre.stride}, row, rank);
            const Activated at = activate(params.activation, z);
            of_gate = fmaf(at.value, t, of_gate);
            dz = t * at.slope * (gated * scale);
            h = at.value * gated;
            if (all.normalizes) {
                mean = fmaf(dz, adapter.mean_weight[rank], mean);
                correlation = fmaf(dz, z - adapter.offset[rank], correlation);
            }
        }
        store_element(params.h, row, rank, h);
        store_element(params.dz, row, rank, dz);
    }
    if (params.grad_gate) {
        of_gate = sum_of_warp(of_gate);
        for (int part = 0; parts.row_sums && part < parts.splits; ++part)
            of_gate += parts.row_sums[(part * all.m + row) * 2];
        if (lane == 0) params.grad_gate[row] = of_gate * params.keep_scale * scale;
    }
    if (all.normalizes) {
        mean = sum_of_warp(mean) / static_cast<float>(all.d);
        correlation = sum_of_warp(correlation) / static_cast<float>(all.d);
        if (lane < 2) params.row_norms[2 * row + lane] = lane == 0 ? mean : correlation;
    }
}

// ---- LayerNorms ----------------------------------------------------------------------------------------------------

// A warp takes a rank of an adapter.
static __global__ void __launch_bounds__(kAdapterThreads)
    adapter_prepare_kernel(const __grid_constant__ AdapterPrepareParams params) {
    const CudaAdapters& all = params.adapters;
    const CudaAdapter& adapter = all.adapters[blockIdx.y];
    const int rank = blockIdx.x * kWarpsOfRows + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (rank >= adapter.rank) return;
    float of_beta = 0;
    for (int split = 0; split < params.splits; ++split) {
        const int64_t first = split * params.split_columns, end = min(first + params.split_columns, all.d);
        float of_gamma = 0;
        for (int64_t column = first + 4 * lane; column < end; column += 128) {
            float w[4], g[4] = {1, 1, 1, 1}, b[4] = {};
            load_floats(adapter.down_weight, rank, column, end, w);
            if (adapter.gamma.data) load_floats(adapter.gamma, 0, column, end, g);
            if (adapter.beta.data) load_floats(adapter.beta, 0, column, end, b);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                of_gamma = fmaf(w[i], g[i], of_gamma);
                of_beta = fmaf(w[i], b[i], of_beta);
            }
        }
        of_gamma = sum_of_warp(of_gamma);
        if (lane == 0) params.mean_weight[(blockIdx.y * params.splits + split) * all.max_rank + rank] = of_gamma;
    }
    of_beta = sum_of_warp(of_beta);
    if (lane == 0)
        params.offset[blockIdx.y * all.max_rank + rank] =
            of_beta + (adapter.down_bias.data ? load_element(adapter.down_bias, 0, rank) : 0);
}

// A CTA reads its row three times; the second and third time it comes from the L1. Rows without an adapter are not
// normalised.
static __global__ void __launch_bounds__(kAdapterThreads)
    adapter_post_norm_kernel(const __grid_constant__ AdapterPostNormParams params) {
    __shared__ float partial[2][kWarpsOfRows];
    const int64_t d = params.adapters.d;
    const RowBlock block = find_rows(params.adapters, blockIdx.x, 1);
    if (!block.adapter) return pass_on<kAdapterThreads>(params.input, params.y, block, d, 0, d);
    const int64_t row = block.row0;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const auto sum = [&](int which, const auto& term) {
        float value = 0;
        for (int64_t column = 4 * threadIdx.x; column < d; column += 4 * kAdapterThreads) {
            float v[4];
            load_floats(params.input, row, column, d, v);
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (column + i < d) value += term(v[i]);
        }
        value = sum_of_warp(value);
        if (lane == 0) partial[which][warp] = value;
        __syncthreads();
        value = 0;
#pragma unroll
        for (int i = 0; i < kWarpsOfRows; ++i) value += partial[which][i];
        return value / static_cast<float>(d);
    };
    const float mean = sum(0, [](float v) { return v; });
    const float rstd = 1 / sqrtf(sum(1, [=](float v) { return (v - mean) * (v - mean); }) + params.norm.eps);
    for (int64_t column = 4 * threadIdx.x; column < d; column += 4 * kAdapterThreads) {
        float v[4], gamma[4] = {1, 1, 1, 1}, beta[4] = {};
        load_floats(params.input, row, column, d, v);
        if (params.norm.weight.data) load_floats(params.norm.weight, 0, column, d, gamma);
        if (params.norm.bias.data) load_floats(params.norm.bias, 0, column, d, beta);
#pragma unroll
        for (int i = 0; i < 4; ++i) v[i] = fmaf((v[i] - mean) * rstd, gamma[i], beta[i]);
        store_floats(v, params.y, row, column, d);
    }
}

}  // namespace peft_kernels::cuda
