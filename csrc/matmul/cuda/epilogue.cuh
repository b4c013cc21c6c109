// What the product of many rows does after its main loop: adds the sums of CTAs that share a tile, adds the LoRA terms,
// and stores.
#pragma once

#include "matmul/cuda/tile.cuh"

namespace peft_kernels::cuda {

// A pair of numbers as bf16: the high halves, the low halves (what the high ones lack), and the high halves that are
// finite. An infinity has no low half, and must not meet the other factor's low half, whose sign may differ.
struct SplitPair {
    uint32_t high, low, finite_high;
};

__device__ inline SplitPair split(float first, float second) {
    const float high[2] = {__bfloat162float(__float2bfloat16_rn(first)), __bfloat162float(__float2bfloat16_rn(second))};
    const bool finite[2] = {isfinite(high[0]), isfinite(high[1])};
    return {pack(high[0], high[1], __nv_bfloat16{}),
            pack(finite[0] ? first - high[0] : 0, finite[1] ? second - high[1] : 0, __nv_bfloat16{}),
            pack(finite[0] ? high[0] : 0, finite[1] ? high[1] : 0, __nv_bfloat16{})};
}

// A LoRA term of one weight, in a tile of out.
template <bool kTransposed>
struct WeightTerm {
    static constexpr int kTogether = 1;  // passes whose loads are under way together: more would cost the main loop

    const FusedMatmulKernelParams& params;
    const LoraTerm& term;
    const float* s;
    int64_t first_output;
    int rows, outputs;  // that the tile has

    __device__ WeightTerm(const FusedMatmulKernelParams& params, const LoraTerm& term, int64_t column,
                          const ManyRowsPlace& place)
        : params(params),
          term(term),
          s(params.operands.s.data + place.first_m * params.operands.total_rank + column),
          first_output(place.first_output),
          rows(static_cast<int>(min(place.end_m - place.first_m, int64_t{INT32_MAX}))),
          outputs(static_cast<int>(params.outputs - place.first_output)) {}

    __device__ int parts() const { return 1; }
    __device__ float s_at(int, int row, int64_t rank) const { return s[row * params.operands.total_rank + rank]; }
    __device__ void keep(int, int64_t, float) const {}
    __device__ uint32_t factor_bits(int output, int64_t rank) const {
        return kTransposed ? load_bits(term.factor, rank, first_output + output)
                           : load_bits(term.factor, first_output + output, rank);
    }
};

// Stages 16 ranks of a term, as 48 steps of the reduction, in the places of x and of the weight.
template <class Traits, class Term>
__device__ void stage_term(typename Traits::Stage& stage, const Term& of, int first_rank) {
    const auto at = [](int row, int unit) { return 32 * row + 4 * (unit ^ row % 8); };  // words, in rows of 128 bytes
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    constexpr int kWarps = Traits::kThreads / 32;
    constexpr int kTogether = Term::kTogether;
    const int ranks = static_cast<int>(of.term.rank) - first_rank;
    {  // Lanes: 8 rows, 4 pairs of ranks.
        uint32_t* const left = reinterpret_cast<uint32_t*>(stage.x);
        constexpr int kPasses = Traits::kTileM / 4 / kWarps;
        const auto row_of = [&](int pass) { return (warp + pass * kWarps) / 2 * 8 + lane / 4; };
        const int unit = warp % 2, rank = 8 * unit + lane % 4 * 2;
        static_assert(kWarps % 2 == 0 && kPasses % kTogether == 0);
#pragma unroll 1
        for (int first = 0; first < kPasses; first += kTogether) {
            float s[kTogether][2] = {};
            for (int part = 0; part < of.parts(); ++part)
#pragma unroll
                for (int i = 0; i < kTogether; ++i)
#pragma unroll
                    for (int j = 0; j < 2; ++j)
                        if (row_of(first + i) < of.rows && rank + j < ranks)
                            s[i][j] += of.s_at(part, row_of(first + i), first_rank + rank + j);
#pragma unroll
            for (int i = 0; i < kTogether; ++i) {
                const int row = row_of(first + i);
#pragma unroll
                for (int j = 0; j < 2; ++j)
                    if (row < of.rows && rank + j < ranks) of.keep(row, first_rank + rank + j, s[i][j]);
                const SplitPair pair = split(of.term.scaling * s[i][0], of.term.scaling * s[i][1]);
                left[at(row, unit) + lane % 4] = pair.high;
                left[at(row, 2 + unit) + lane % 4] = pair.low;
                left[at(row, 4 + unit) + lane % 4] = pair.finite_high;
            }
        }
    }
    uint32_t* const right = reinterpret_cast<uint32_t*>(stage.weight);
    constexpr int kPasses = 32 / kWarps;
    // Transposed, lanes are 32 pairs of outputs of a rank; else 8 outputs, 4 pairs of ranks.
    const auto output_of = [&](int i) { return Traits::kTransposed ? 64 * (i % 2) + 2 * lane : i / 2 * 8 + lane / 4; };
    const auto rank_of = [&](int i) { return Traits::kTransposed ? i / 2 : 8 * (i % 2) + lane % 4 * 2; };
#pragma unroll 1
    for (int first = 0; first < kPasses; first += kTogether) {
        uint32_t bits[kTogether][2];
#pragma unroll
        for (int pass = 0; pass < kTogether; ++pass)
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const int i = warp + (first + pass) * kWarps;
                const int output = output_of(i) + (Traits::kTransposed ? j : 0);
                const int rank = rank_of(i) + (Traits::kTransposed ? 0 : j);
                bits[pass][j] = output < of.outputs && rank < ranks ? of.factor_bits(output, first_rank + rank) : 0;
            }
#pragma unroll
        for (int pass = 0; pass < kTogether; ++pass) {
            const DType dtype = of.term.factor.dtype;
            const SplitPair pair = split(widen_bits(bits[pass][0], dtype), widen_bits(bits[pass][1], dtype));
            const int i = warp + (first + pass) * kWarps, row = i / 2;
            if constexpr (Traits::kTransposed) {
                const auto word_of = [&](int at) { return Traits::term_word(at, i % 2, lane / 4) + lane % 4; };
                right[word_of(row)] = pair.high;
                right[word_of(row + 16)] = pair.finite_high;
                right[word_of(row + 32)] = pair.low;
            } else {
                const int output = output_of(i), unit = i % 2;
                right[at(output, unit) + lane % 4] = pair.high;
                right[at(output, 2 + unit) + lane % 4] = pair.finite_high;
                right[at(output, 4 + unit) + lane % 4] = pair.low;
            }
        }
    }
}

// Adds a term to a warp's tile. Nobody needs the first stage before, nor after.
template <class Traits, class Term>
__device__ __forceinline__ void add_term(typename Traits::Stage& stage, const Term& of,
                                         ManyRowsMultiplier<Traits>& multiplier) {
    for (int rank = 0; rank < of.term.rank; rank += 16) {
        stage_term<Traits>(stage, of, rank);
        __syncthreads();
        unroll<3>(
            [&](auto sixteen) { multiplier.template multiply_sixteen<decltype(sixteen)::value, __nv_bfloat16>(0); });
        __syncthreads();
    }
}

// Adds the sums of all CTAs that share a tile, in the order of the reduction; false for those that are not the last to
// arrive. `synchronize`: see is_last_to_arrive.
template <class Traits, class Synchronize = WholeCta>
__device__ bool gather_sums(const FusedMatmulKernelParams& params, typename Traits::Shared& shared, int64_t tile,
                            int split, float (&sums)[Traits::kTilesM][Traits::kTilesN][4],
                            const Synchronize& synchronize = {}) {
    constexpr int64_t kVectors = int64_t{Traits::kTileM} * kTileN / 4;
    float4* const tile_sums =
        reinterpret_cast<float4*>(params.partial_sums) + tile * params.splits * kVectors + threadIdx.x;
    const auto place = [](int i, int j) { return (i * Traits::kTilesN + j) * Traits::kThreads; };
    const auto store = [&] {
#pragma unroll
        for (int i = 0; i < Traits::kTilesM; ++i)
#pragma unroll
            for (int j = 0; j < Traits::kTilesN; ++j)
                tile_sums[split * kVectors + place(i, j)] =
                    make_float4(sums[i][j][0], sums[i][j][1], sums[i][j][2], sums[i][j][3]);
    };
    if (!is_last_to_arrive(params, shared.is_last, tile, store, synchronize)) return false;
    // A few vectors of each part at a time: as many loads are under way as there are free registers.
    constexpr int kAtOnce = Traits::kTransposed ? 4 : 8;
    static_assert(Traits::kTilesN % kAtOnce == 0);
#pragma unroll
    for (int i = 0; i < Traits::kTilesM; ++i)
#pragma unroll
        for (int first = 0; first < Traits::kTilesN; first += kAtOnce) {
            const auto add_part = [&](float (&to)[kAtOnce][4], int s) {
                float4 part[kAtOnce];
#pragma unroll
                for (int j = 0; j < kAtOnce; ++j) part[j] = tile_sums[s * kVectors + place(i, first + j)];
#pragma unroll
                for (int j = 0; j < kAtOnce; ++j)
                    to[j][0] += part[j].x, to[j][1] += part[j].y, to[j][2] += part[j].z, to[j][3] += part[j].w;
            };
            float total[kAtOnce][4] = {};
#pragma unroll 1
            for (int s = 0; s < split; ++s) add_part(total, s);
#pragma unroll
            for (int j = 0; j < kAtOnce; ++j)
#pragma unroll
                for (int e = 0; e < 4; ++e) total[j][e] += sums[i][first + j][e];
#pragma unroll 1
            for (int s = split + 1; s < params.splits; ++s) add_part(total, s);
#pragma unroll
            for (int j = 0; j < kAtOnce; ++j)
#pragma unroll
                for (int e = 0; e < 4; ++e) sums[i][first + j][e] = total[j][e];
        }
    return true;
}

// out = scale ⊙ (sums + bias + add) from row stored_m on.
class TileStore {
public:
    __device__ TileStore(const FusedMatmulKernelParams& params, const ManyRowsPlace& place)
        : params_(params),
          place_(place),
          aligned_(has_aligned_fours(params.operands.out)),
          add_aligned_(has_aligned_fours(params.operands.add)),
          unscaled_aligned_(has_aligned_fours(params.operands.unscaled)) {}

    // A warp's 16 x 64, from this row and column of the tile on, whose sums lie in rows of kPitch. Lanes: 4 rows, 8
    // vectors of 4 columns; then the 32 columns beyond. The loops are not unrolled: there are many cases inside.
    template <int kPitch>
    __device__ void store(const float* sums, int first_m, int first_n) const {
        const FusedMatmulParams& operands = params_.operands;
        const int lane = threadIdx.x % 32;
#pragma unroll 1
        for (int half = 0; half < 2; ++half) {
            const int64_t column = place_.first_output + first_n + lane % 8 * 4 + 32 * half;
            const int count = count_four(column, params_.outputs);
            const float4 bias = load_four(operands.bias, place_.expert, column, count, false);
            const float4 scale = load_scales(operands.scale, column, count);
#pragma unroll 1
            for (int row = lane / 8; row < 16; row += 4) {
                const int64_t m = place_.first_m + first_m + row;
                if (m < place_.stored_m || m >= place_.end_m) continue;
                float4 sum = *reinterpret_cast<const float4*>(&sums[row * kPitch + lane % 8 * 4 + 32 * half]);
                const float4 add = load_four(operands.add, m, column, count, add_aligned_);
                sum = make_float4(sum.x + bias.x + add.x, sum.y + bias.y + add.y, sum.z + bias.z + add.z,
                                  sum.w + bias.w + add.w);
                if (operands.unscaled.data) store_four(operands.unscaled, m, column, count, unscaled_aligned_, sum);
                store_four(operands.out, m, column, count, aligned_,
                           make_float4(scale.x * sum.x, scale.y * sum.y, scale.z * sum.z, scale.w * sum.w));
            }
        }
    }

private:
    const FusedMatmulKernelParams& params_;
    const ManyRowsPlace& place_;
    const bool aligned_, add_aligned_, unscaled_aligned_;
};

// Stores a tile through shared memory, so that rows go out in whole sectors.
template <class Traits>
__device__ void store_tile(const FusedMatmulKernelParams& params, typename Traits::Shared& shared,
                           const ManyRowsPlace& place, const ManyRowsMultiplier<Traits>& warp_tile) {
    const int lane = threadIdx.x % 32;
    float* const sums = shared.sums[threadIdx.x / 32];
    const TileStore out(params, place);
#pragma unroll
    for (int i = 0; i < Traits::kTilesM; ++i) {
        __syncwarp();
#pragma unroll
        for (int j = 0; j < Traits::kTilesN; ++j)
#pragma unroll
            for (int upper = 0; upper < 2; ++upper)
                *reinterpret_cast<float2*>(&sums[(lane / 4 + 8 * upper) * Traits::kSumPitch + 8 * j + lane % 4 * 2]) =
                    make_float2(warp_tile.sums[i][j][2 * upper], warp_tile.sums[i][j][2 * upper + 1]);
        __syncwarp();
        out.store<Traits::kSumPitch>(sums, warp_tile.first_m + 16 * i, warp_tile.first_n);
    }
}

}  // namespace peft_kernels::cuda
