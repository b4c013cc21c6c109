// Several deltas combined into one on a GPU: trim by magnitude, elect a sign, mean. As on a CPU, bit for bit.
//
// A delta is a matrix, whose last row may be shorter, or the product s B A, of which a tile is made when it is read:
//
//     rows   ┌────────┬────────┬───     a tile is a warp's: 4 rows (2 for a vote) of 128 columns, four of each lane.
//       ↓    │ 0      │ n      │        A segment is a row of a tile. Tiles of a product go down the rows, so that a
//            ├────────┼────────┼───     CTA's eight warps find their columns of A in the L1; those of a matrix go along
//            │ 1      │ n + 1  │        them, so that neighbours in memory are read together.
//
// To trim needs the magnitude that `kept` elements reach, which a radix select finds without a sort:
//
//   begin       a table of the deltas, and zeros for their histograms
//   histogram   for each digit of 11, 10 and 10 bits: counts the elements that agree with the digits before, by atomics
//               of integers, in shared and then in global memory, so that no order can change a bit. Every CTA first
//               finds the digit before in its histogram, which takes less than a launch that would do it once.
//   ties        finds the last digit. Where more elements are as large as the threshold than are to be kept, it counts
//               them in each segment; else they need not be read.
//   scan        says how many of these each segment keeps: the first ones of the delta
//   merge       reads all deltas of a tile, trims, votes, and writes y. Each lane sums what agrees with either sign, so
//               that no value is needed after the vote.
//
// Two floors. Traffic: a matrix is read digits + 1 times, once more where ties are cut, and y is written once: eight
// deltas of fp32 take 33 times the bytes of y. Operations: a product takes `rank` fma an element and reading, 16 (for a
// vote 8) for each load of 16 bytes; a histogram one atomic an element, where lanes of one bin take turns. From ranks
// of 16 on the fma come first, for matrices the traffic, and for small ones the launches: 7, or 2 without a trim.
#pragma once

#include "combine/combine.h"
#include "combine/cuda/plan.h"
#include "common/cuda/fours.cuh"
#include "common/cuda/philox.cuh"
#include "common/cuda/warp.cuh"

namespace peft_kernels::cuda {

constexpr int kCombineThreads = 32 * CombinePlan::kWarps;

struct CombineKernelParams {
    CombineParams problem;
    CombinePlan plan;
    bool of_products;
    int digit;                     // of the histogram
    const Delta* deltas;           // [num_deltas]
    unsigned long long* bins;      // [num_deltas][digits][kBins]
    CombineThreshold* thresholds;  // [num_deltas][digits]
    uint8_t* ties;                 // [num_deltas][all_segments]: how many elements are as large as the threshold; later
                                   // how many of them are kept
    uint32_t drop_threshold;
    float keep_scale;
};

struct CombineBeginParams {
    Delta deltas[CombinePlan::kDeltas];
    Delta* table;              // [kDeltas]
    unsigned long long* bins;  // [kDeltas][bins_of_delta]
    int bins_of_delta;
};

static __global__ void __launch_bounds__(kCombineThreads)
    combine_begin_kernel(const __grid_constant__ CombineBeginParams params) {
    if (threadIdx.x == 0) params.table[blockIdx.x] = params.deltas[blockIdx.x];
    for (int bin = threadIdx.x; bin < params.bins_of_delta; bin += kCombineThreads)
        params.bins[int64_t{blockIdx.x} * params.bins_of_delta + bin] = 0;
}

// Where a lane's elements of a tile are: four neighbours of each row.
template <int kRows>
struct CombineTile {
    int64_t row, segment, column;
    int64_t rows;       // of the delta
    int counts[kRows];  // of those that exist

    __device__ CombineTile(const CombineKernelParams& params, int64_t tile) {
        const CombineParams& p = params.problem;
        const int64_t inner = params.of_products ? ceil_div(params.plan.rows, kRows) : params.plan.segments;
        const int64_t outer_index = tile / inner, inner_index = tile - outer_index * inner;
        segment = params.of_products ? outer_index : inner_index;
        row = (params.of_products ? inner_index : outer_index) * kRows;
        column = segment * CombinePlan::kColumns + 4 * (threadIdx.x % 32);
#pragma unroll
        for (int r = 0; r < kRows; ++r) counts[r] = count_four(column, min(p.columns, p.count - (row + r) * p.columns));
        rows = params.plan.rows;
    }

    __device__ bool has_row(int r) const { return row + r < rows; }
    __device__ bool is_whole() const { return counts[kRows - 1] == 4; }  // of all rows the last one has the fewest
};

template <class Body>
__device__ inline float4 map_four(float4 v, const Body& body) {
    return make_float4(body(v.x, 0), body(v.y, 1), body(v.z, 2), body(v.w, 3));
}

// Adds four ranks of B A, or as many as there are. Where the fours are whole (`kWhole`), all loads are under way before
// one is waited for.
template <bool kWhole, int kRows>
__device__ inline void add_ranks(const ConstMatrix& a, const ConstMatrix& b, int first, int rank,
                                 const CombineTile<kRows>& at, float4 (&sums)[kRows]) {
    const bool a_aligned = kWhole || has_aligned_fours(a), b_aligned = kWhole || has_aligned_fours(b);
    float4 x[4], factors[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r)
        factors[r] = load_four(b, at.row + r, first,
                               kWhole          ? 4
                               : at.has_row(r) ? count_four(first, rank)
                                               : 0,
                               b_aligned);
#pragma unroll
    for (int c = 0; c < 4; ++c)
        x[c] = load_four(a, first + c, at.column, kWhole ? 4 : first + c < rank ? at.counts[0] : 0, a_aligned);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
        if (!kWhole && first + c >= rank) break;
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            const float4 w = factors[r];
            const float factor = c == 0 ? w.x : c == 1 ? w.y : c == 2 ? w.z : w.w;
            sums[r] = make_float4(fmaf(factor, x[c].x, sums[r].x), fmaf(factor, x[c].y, sums[r].y),
                                  fmaf(factor, x[c].z, sums[r].z), fmaf(factor, x[c].w, sums[r].w));
        }
    }
}

// scaling · B A, summed in the order of the ranks.
template <int kRows>
__device__ inline void multiply(const CombineParams& p, const Delta& delta, const CombineTile<kRows>& at,
                                float4 (&values)[kRows]) {
    const ConstMatrix a{delta.lora_A, DType::kFloat32, p.columns}, b{delta.lora_B, DType::kFloat32, delta.rank};
    const bool is_whole = at.is_whole() && has_aligned_fours(a) && has_aligned_fours(b);
    const int rank = static_cast<int>(delta.rank);
#pragma unroll
    for (float4& four : values) four = make_float4(0, 0, 0, 0);
    int first = 0;
    if (is_whole)
#pragma unroll 1
        for (; first + 4 <= rank; first += 4) add_ranks<true>(a, b, first, rank, at, values);
#pragma unroll 1
    for (; first < rank; first += 4) add_ranks<false>(a, b, first, rank, at, values);
#pragma unroll
    for (float4& four : values)
        four = map_four(four, [&](float value, int) { return __fmul_rn(value, delta.scaling); });
}

// Where the fours are whole, all loads are under way before one is waited for: the type is the same for all.
template <class T, int kRows>
__device__ inline void load_tile(const ConstMatrix& matrix, const CombineTile<kRows>& at, float4 (&values)[kRows]) {
    const ConstMatrix typed{matrix.data, kDType<T>, matrix.stride};
    const bool aligned = has_aligned_fours(typed);
    if (aligned && at.is_whole()) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) values[r] = load_four(typed, at.row + r, at.column, 4, true);
    } else {
#pragma unroll
        for (int r = 0; r < kRows; ++r) values[r] = load_four(typed, at.row + r, at.column, at.counts[r], aligned);
    }
}

// The mask's bits of a tile are made by two calls of Philox a lane, each for eight neighbours of a row.
template <int kRows>
__device__ inline void drop(const CombineKernelParams& params, const Delta& delta, const CombineTile<kRows>& at,
                            float4 (&values)[kRows]) {
    const int lane = threadIdx.x % 32;
    const uint64_t seed = static_cast<uint64_t>(*delta.seed);
    const uint32_t group = static_cast<uint32_t>(at.segment * (CombinePlan::kColumns / 8)) + lane % 16;
#pragma unroll
    for (int pair = 0; pair < kRows; pair += 2) {
        const uint32_t own = dropout_keep_bits(seed, params.drop_threshold, at.row + pair + lane / 16, group);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const uint32_t bits = __shfl_sync(0xFFFFFFFFu, own, 16 * r + lane / 2) >> 4 * (lane % 2);
            values[pair + r] = map_four(values[pair + r], [&](float value, int i) {
                return bits >> i & 1 ? __fmul_rn(value, params.keep_scale) : 0.0f;
            });
        }
    }
}

// A delta's elements of a tile, in fp32. All lanes of a warp take part.
template <int kRows>
__device__ inline void read_tile(const CombineKernelParams& params, const Delta& delta, const CombineTile<kRows>& at,
                                 float4 (&values)[kRows]) {
    if (!delta.values.data)
        multiply(params.problem, delta, at, values);
    else if (delta.values.dtype == DType::kFloat32)
        load_tile<float>(delta.values, at, values);
    else if (delta.values.dtype == DType::kBFloat16)
        load_tile<__nv_bfloat16>(delta.values, at, values);
    else
        load_tile<__half>(delta.values, at, values);
    if (delta.seed) drop(params, delta, at, values);
}

// The bits of an absolute value order as the numbers do, with infinity and what is no number above them.
__device__ inline uint32_t magnitude_of(float value) { return __float_as_uint(value) & 0x7FFFFFFFu; }

// Of the 31 bits, the digits have 11, 10 and 10.
__device__ constexpr int shift_of_digit(int digit) { return 20 - 10 * digit; }

// Calls body(segment of the delta, magnitudes, count) for this lane's fours of each tile of the CTA; with count = 0
// where there are none, because all lanes take part.
template <class Body>
__device__ inline void for_each_four(const CombineKernelParams& params, const Body& body) {
    constexpr int kRows = CombinePlan::kRowsOfRead;
    const Delta& delta = params.deltas[blockIdx.y];
    const int64_t first = blockIdx.x * params.plan.tiles_of_cta;
    const int64_t end = min(count_tiles(params.plan, kRows), first + params.plan.tiles_of_cta);
#pragma unroll 1
    for (int64_t tile = first + threadIdx.x / 32; tile < end; tile += CombinePlan::kWarps) {
        const CombineTile<kRows> at(params, tile);
        float4 values[kRows];
        read_tile(params, delta, at, values);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            const uint32_t magnitudes[4] = {magnitude_of(values[r].x), magnitude_of(values[r].y),
                                            magnitude_of(values[r].z), magnitude_of(values[r].w)};
            body((at.row + r) * params.plan.segments + at.segment, magnitudes, at.counts[r]);
        }
    }
}

// The threshold of the CTA's delta as far as the first `digits` of its digits say: the last of these is found in its
// histogram, by all threads. One CTA writes it down for the next kernel.
__device__ inline CombineThreshold find_threshold(const CombineKernelParams& params, int digits) {
    constexpr int kOwn = CombinePlan::kBins / kCombineThreads;
    __shared__ int64_t of_warp[CombinePlan::kWarps];
    __shared__ CombineThreshold found;
    const int64_t delta = blockIdx.y;
    if (digits == 0) return {0, params.problem.kept, 0};
    CombineThreshold* const known = params.thresholds + delta * params.plan.digits;
    const CombineThreshold before = digits == 1 ? CombineThreshold{0, params.problem.kept, 0} : known[digits - 2];
    // From the largest bin down, with eight a thread.
    const int thread = threadIdx.x, first = CombinePlan::kBins - kOwn * (thread + 1);
    const auto* const bins = reinterpret_cast<const ulonglong2*>(
        params.bins + (delta * params.plan.digits + digits - 1) * CombinePlan::kBins + first);
    int64_t counts[kOwn], sum = 0;
#pragma unroll
    for (int i = 0; i < kOwn; i += 2) {
        const ulonglong2 two = bins[i / 2];
        counts[i] = static_cast<int64_t>(two.x), counts[i + 1] = static_cast<int64_t>(two.y);
    }
#pragma unroll
    for (int i = 0; i < kOwn; ++i) sum += counts[i];
    const int64_t of_lanes = sum_up_to_lane(sum);
    if (thread % 32 == 31) of_warp[thread / 32] = of_lanes;
    // If nothing is to be kept, no bin is found: no magnitude is as large as this.
    if (thread == 0) found = {0x80000000u, 0, 0};
    __syncthreads();
    int64_t above = of_lanes - sum;
    for (int warp = 0; warp < thread / 32; ++warp) above += of_warp[warp];
    if (above < before.left && before.left <= above + sum) {
        bool is_found = false;
#pragma unroll
        for (int i = kOwn - 1; i >= 0; --i) {
            if (!is_found && before.left <= above + counts[i]) {
                const uint32_t digit = static_cast<uint32_t>(first + i) << shift_of_digit(digits - 1);
                found = {before.magnitude | digit, before.left - above, counts[i]};
                is_found = true;
            }
            above += counts[i];
        }
    }
    __syncthreads();
    const CombineThreshold threshold = found;
    if (blockIdx.x == 0 && thread == 0) known[digits - 1] = threshold;
    return threshold;
}

static __global__ void __launch_bounds__(kCombineThreads, CombinePlan::kResident)
    combine_histogram_kernel(const __grid_constant__ CombineKernelParams params) {
    __shared__ uint32_t bins[CombinePlan::kBins];
    for (int bin = threadIdx.x; bin < CombinePlan::kBins; bin += kCombineThreads) bins[bin] = 0;
    const CombineThreshold threshold = find_threshold(params, params.digit);
    __syncthreads();
    const int shift = shift_of_digit(params.digit), above = params.digit == 0 ? 31 : shift_of_digit(params.digit - 1);
    const uint32_t last = (1u << (above - shift)) - 1;
    for_each_four(params, [&](int64_t, const uint32_t (&magnitudes)[4], int count) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (i < count && magnitudes[i] >> above == threshold.magnitude >> above)
                atomicAdd(&bins[magnitudes[i] >> shift & last], 1u);
    });
    __syncthreads();
    unsigned long long* const all =
        params.bins + (int64_t{blockIdx.y} * params.plan.digits + params.digit) * CombinePlan::kBins;
    for (int bin = threadIdx.x; bin < CombinePlan::kBins; bin += kCombineThreads)
        if (bins[bin] > 0) atomicAdd(&all[bin], static_cast<unsigned long long>(bins[bin]));
}

static __global__ void __launch_bounds__(kCombineThreads, CombinePlan::kResident)
    combine_ties_kernel(const __grid_constant__ CombineKernelParams params) {
    const CombineThreshold threshold = find_threshold(params, params.plan.digits);
    if (threshold.ties <= threshold.left) return;
    uint8_t* const ties = params.ties + blockIdx.y * params.plan.all_segments;
    for_each_four(params, [&](int64_t segment, const uint32_t (&magnitudes)[4], int count) {
        uint32_t own = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) own += (i < count) & (magnitudes[i] == threshold.magnitude);
        const uint32_t sum = __reduce_add_sync(0xFFFFFFFFu, own);
        if (threadIdx.x % 32 == 0 && segment < params.plan.all_segments) ties[segment] = static_cast<uint8_t>(sum);
    });
}

// A CTA has a delta, and a thread neighbouring segments of it.
static __global__ void __launch_bounds__(CombinePlan::kScanThreads)
    combine_scan_kernel(const __grid_constant__ CombineKernelParams params) {
    __shared__ int64_t of_warp[CombinePlan::kScanThreads / 32];
    const int64_t delta = blockIdx.x, segments = params.plan.all_segments;
    const CombineThreshold threshold = params.thresholds[(delta + 1) * params.plan.digits - 1];
    if (threshold.ties <= threshold.left) return;
    const int64_t share = ceil_div(segments, CombinePlan::kScanThreads);
    const int64_t first = min(segments, threadIdx.x * share), end = min(segments, first + share);
    uint8_t* const ties = params.ties + delta * segments;
    int64_t sum = 0;
    for (int64_t segment = first; segment < end; ++segment) sum += ties[segment];
    const int64_t of_lanes = sum_up_to_lane(sum);
    if (threadIdx.x % 32 == 31) of_warp[threadIdx.x / 32] = of_lanes;
    __syncthreads();
    int64_t left = threshold.left - (of_lanes - sum);
    for (int warp = 0; warp < threadIdx.x / 32; ++warp) left -= of_warp[warp];
    for (int64_t segment = first; segment < end; ++segment) {
        const int64_t own = ties[segment];
        ties[segment] = static_cast<uint8_t>(max(int64_t{0}, min(own, left)));
        left -= own;
    }
}

// Puts zeros where a delta's elements are not kept.
template <int kRows>
__device__ inline void trim(const CombineKernelParams& params, int64_t delta, const CombineTile<kRows>& at,
                            float4 (&values)[kRows]) {
    const CombineThreshold threshold = params.thresholds[(delta + 1) * params.plan.digits - 1];
    const bool cuts_ties = threshold.ties > threshold.left;
    const uint32_t lanes_before = (1u << threadIdx.x % 32) - 1;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        int left = 4;  // of the lane's four
        if (cuts_ties) {
            const int64_t segment = (at.row + r) * params.plan.segments + at.segment;
            left = segment < params.plan.all_segments ? params.ties[delta * params.plan.all_segments + segment] : 0;
            map_four(values[r], [&](float value, int) {
                left -= __popc(__ballot_sync(0xFFFFFFFFu, magnitude_of(value) == threshold.magnitude) & lanes_before);
                return 0.0f;
            });
        }
        values[r] = map_four(values[r], [&](float value, int) {
            const uint32_t magnitude = magnitude_of(value);
            const bool is_tie = magnitude == threshold.magnitude;
            const bool is_kept = (magnitude > threshold.magnitude) | (is_tie & (left > 0));
            left -= is_tie;
            return is_kept ? value : 0.0f;
        });
    }
}

// One element of y: a sum, or the votes and the sums of both outcomes.
template <bool kElects>
struct CombineElement;

template <>
struct CombineElement<false> {
    float sum = 0;

    __device__ void add(float value, float weight, Election) { sum = __fadd_rn(sum, __fmul_rn(value, weight)); }
    __device__ float result(Election) const { return sum; }
};

// What is no number agrees with either sign, so that it is not lost.
template <>
struct CombineElement<true> {
    float votes = 0, positive = 0, negative = 0;
    uint32_t counts = 0;  // 16 bits each, the negative one's above

    __device__ void add(float value, float weight, Election) {
        const float weighted = __fmul_rn(value, weight);
        votes = __fadd_rn(votes, value);
        positive = __fadd_rn(positive, value <= 0 ? 0.0f : weighted);
        negative = __fadd_rn(negative, value >= 0 ? 0.0f : weighted);
        counts += (value <= 0 ? 0u : 1u) + (value >= 0 ? 0u : 1u << 16);
    }
    __device__ float result(Election election) const {
        const uint32_t of_positive = counts & 0xFFFF, of_negative = counts >> 16;
        const bool is_negative = election == Election::kTotal ? votes < 0 : of_positive < of_negative;
        const uint32_t count = is_negative ? of_negative : of_positive;
        return __fdiv_rn(is_negative ? negative : positive, static_cast<float>(max(count, 1u)));
    }
};

template <bool kElects>
static __global__ void __launch_bounds__(kCombineThreads, CombinePlan::kResident)
    combine_merge_kernel(const __grid_constant__ CombineKernelParams params) {
    constexpr int kRows = kElects ? CombinePlan::kRowsOfVote : CombinePlan::kRowsOfSum;
    const CombineParams& p = params.problem;
    const int64_t tile = int64_t{blockIdx.x} * CombinePlan::kWarps + threadIdx.x / 32;
    if (tile >= count_tiles(params.plan, kRows)) return;
    const CombineTile<kRows> at(params, tile);
    CombineElement<kElects> elements[kRows][4];
#pragma unroll 1
    for (int64_t i = 0; i < p.num_deltas; ++i) {
        const Delta& delta = params.deltas[i];
        float4 values[kRows];
        read_tile(params, delta, at, values);
        if (params.plan.trims) trim(params, i, at, values);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            elements[r][0].add(values[r].x, delta.weight, p.election);
            elements[r][1].add(values[r].y, delta.weight, p.election);
            elements[r][2].add(values[r].z, delta.weight, p.election);
            elements[r][3].add(values[r].w, delta.weight, p.election);
        }
    }
    const bool aligned = has_aligned_fours(p.y);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        const auto& four = elements[r];
        store_four(p.y, at.row + r, at.column, at.counts[r], aligned,
                   make_float4(four[0].result(p.election), four[1].result(p.election), four[2].result(p.election),
                               four[3].result(p.election)));
    }
}

}  // namespace peft_kernels::cuda
