// G1: the base product of some tens to hundreds of rows on the matrix unit, both ways:
//
//   out [m, n] = x · Wᵀ + bias + add + Σᵢ scalingᵢ · sᵢ · lora_Bᵢᵀ
//   out [m, k] = x · W         + add + Σᵢ scalingᵢ · sᵢ · lora_Aᵢ        (kTransposed)
//
// A CTA makes a tile of kTileM x 128 of out, in steps of 64 of the reduction; a warp 64 x 64 (32 x 64 where kTileM is
// 64). Of each step the weight's part, 128 blocks of 64 elements, is decoded once for the whole CTA: forward it is
// 128 rows of one block, transposed 64 rows of two. While the matrix unit works on step i,
//
//     global --cp.async--> x [i + 1], codes [i + 2]
//     codes [i + 1] --planes, PRMT--> weight [i + 1]          a quarter after each 16 of the step
//     x [i], weight [i] --ldmatrix--> mma
//
// so that two buffers of each and one barrier a step are enough: the matrix unit needs 1000 cycles for a step of 128 x 128
// x 64, more than a copy takes. Rows of 128 bytes in shared memory have their 8 units of 16 bytes permuted by the row:
// copies, decoding and ldmatrix all meet 8 different banks.
//
// LoRA terms are more steps of the reduction, [x | s] · [W | B]ᵀ, always in bf16: s and the factor are split into high
// and low halves, s.high · B.high + s.low · B.high + s.high · B.low, to 16 bits. The sums of several CTAs that share
// a tile are added by the last of them to arrive, in the order of the reduction.
#pragma once

#include "lora_linear/lora_linear_gemm_operands.cuh"
#include "lora_linear/lora_linear_gemm_plan.h"
#include "nf4/nf4_decode.cuh"

namespace peft_kernels::cuda {

template <class T_, int kTileM_, bool kTransposed_>
struct GemmTraits {
    using T = T_;
    static constexpr int kTileM = kTileM_;
    static constexpr bool kTransposed = kTransposed_;
    static constexpr int kThreads = kTileM > 128 ? 256 : 128;
    static constexpr bool kFull = kTileM > 128;  // m is at least kTileM: the last tile of rows overlaps the one before
    static constexpr int kWarpM = kTileM == 64 ? 32 : 64, kWarpN = 64;
    static constexpr int kTilesM = kWarpM / 16, kTilesN = kWarpN / 8;  // of the matrix unit, in a warp's tile

    static constexpr int kBlocks = 128;                           // of 64 weights, in a step
    static constexpr int kParts = kThreads / kBlocks;             // threads that share a block
    static constexpr int kWords = 8 / kParts;                     // of 8 codes, that a thread decodes in a step
    static constexpr int kWeightPitch = kTransposed ? 256 : 128;  // bytes of a row of the decoded tile

    // Forward, absmax comes in spans of 16 steps, so that whole sectors are read. 130: writes along the steps of two
    // rows are in 32 banks.
    static constexpr int kSpan = 16, kSpanPitch = kBlocks + 2;

    static constexpr int kSumPitch = kWarpN + 8;  // of the tile that goes out: fragments are written without conflicts

    struct Stage {
        uint4 x[kTileM * 8];        // [kTileM][64]
        uint4 weight[kBlocks * 8];  // T [128][64], transposed [64][128]
        uint4 codes[kBlocks * 2];   // [kBlocks][32]
    };
    struct Shared {
        union {
            Stage stages[2];
            float sums[kThreads / 32][16 * kSumPitch];
        };
        float nested_code[256];
        float absmax[kTransposed ? 1 : 2][kTransposed ? 1 : kSpan][kTransposed ? 1 : kSpanPitch];
        bool is_last;
    };
};

// A CTA's part of the work.
struct GemmPlace {
    int64_t tile;
    int split;
    int64_t first_m, stored_m, first_output;  // the rows before stored_m are another tile's
};

// Tiles of the same weights are neighbours: their codes meet in the L2. It is called before the main loop and again
// after it, so that the loop need not keep the result in registers.
template <class Traits>
__device__ inline GemmPlace find_place(const LoraLinearGemmKernelParams& params) {
    uint32_t block = blockIdx.x;
    keep(block);
    GemmPlace place;
    place.tile = block / params.splits;
    place.split = block % params.splits;
    place.stored_m = place.tile % params.tiles_m * Traits::kTileM;
    place.first_m = Traits::kFull ? min(place.stored_m, params.operands.m - Traits::kTileM) : place.stored_m;
    place.first_output = place.tile / params.tiles_m * kTileN;
    return place;
}

// Copies of x and of codes from global to shared memory, step after step.
template <class Traits>
class GemmLoader {
public:
    using T = typename Traits::T;
    static constexpr int kRowsAtOnce = Traits::kThreads / 8;  // of x, by one copy of each thread

    __device__ GemmLoader(const LoraLinearGemmKernelParams& params, typename Traits::Shared& shared, int64_t first_m,
                          int64_t first_output, int first_step) {
        const LoraLinearGemmParams& operands = params.operands;
        const int row = threadIdx.x / 8, unit = threadIdx.x % 8;
        x_step_ = kRowsAtOnce * operands.x.stride * sizeof(T);
        x_ = static_cast<const char*>(operands.x.data) +
             ((first_m + row) * operands.x.stride + int64_t{64} * first_step) * sizeof(T) + 16 * unit;
        rows_left_ = static_cast<int>(min(operands.m - first_m, int64_t{Traits::kTileM})) - row;
        columns_left_ = static_cast<int>(params.reduction) - 64 * first_step - 8 * unit;
        write_x_ = shared_address(shared.stages[0].x) + row * 128 + (unit ^ (row % 8)) * 16;

        // Two neighbouring lanes have the two halves of a block's codes, a sector. A row or column that the weight does
        // not have is replaced by its last one: what comes of it is not stored.
        const int block = threadIdx.x / 2, half = threadIdx.x % 2;
        const int64_t pitch = params.weight.k / 2;
        write_codes_ = shared_address(shared.stages[0].codes) + (2 * block + (half ^ (block / 4 % 2))) * 16;
        if constexpr (Traits::kTransposed) {
            const int last_column = params.outputs - first_output > 64 ? 1 : 0;
            const int block_row = block % 64, column = min(block / 64, last_column);
            codes_ = params.weight.codes + (int64_t{64} * first_step + block_row) * pitch +
                     (first_output + 64 * column) / 2 + 16 * half;
            code_step_ = 64 * pitch;
            second_codes_ = 32 * last_column;
            code_rows_left_ = columns_left_ + 8 * unit - block_row;
        } else {
            const int64_t last = params.outputs - 1, upper = min(first_output + block, last);
            codes_ = params.weight.codes + upper * pitch + 32 * first_step + 16 * half;
            code_step_ = 32;
            second_codes_ = (min(first_output + block + 64, last) - upper) * pitch;
        }
        keep(write_x_);
        keep(write_codes_);
        keep(rows_left_);
    }

    // The next step's x, into the stage at this distance from the first; rows and columns that x does not have become
    // zeros.
    __device__ void copy_x(uint32_t stage) {
        const uint32_t to = write_x_ + stage;
        const int rows = !Traits::kTransposed || columns_left_ > 0 ? rows_left_ : 0;
        const char* from = x_;
        unroll<Traits::kTileM / kRowsAtOnce>([&](auto i) {
            constexpr int kRow = decltype(i)::value * kRowsAtOnce;
            copy_async16<kRow * 128>(to, from, Traits::kFull || kRow < rows ? 16 : 0);
            from += x_step_;
            keep(from);  // rather than a multiplication for each row
        });
        x_ += 128;
        if constexpr (Traits::kTransposed) columns_left_ -= 64;
    }

    // The next step's codes; transposed, those of rows that the weight does not have become zeros.
    __device__ void copy_codes(uint32_t stage, bool has_step = true) {
        const uint32_t to = write_codes_ + stage;
        const bool exists = has_step && (!Traits::kTransposed || code_rows_left_ > 0);
        copy_async16(to, codes_, exists ? 16 : 0);
        if constexpr (Traits::kParts == 1) copy_async16<64 * 32>(to, codes_ + second_codes_, exists ? 16 : 0);
        codes_ += code_step_;
        if constexpr (Traits::kTransposed) code_rows_left_ -= 64;
    }

private:
    const char* x_;
    const uint8_t* codes_;
    int64_t x_step_, code_step_, second_codes_;
    int rows_left_, columns_left_, code_rows_left_;
    uint32_t write_x_, write_codes_;
};

// absmax of a thread's block, step after step. Blocks that the weight does not have get that of another: what comes of
// them is not stored, or meets codes that are not decoded or an x of zeros.
template <class Traits>
class GemmAbsmax {
public:
    __device__ GemmAbsmax(const LoraLinearGemmKernelParams& params, typename Traits::Shared& shared,
                          int64_t first_output, int first_step, int steps)
        : shared_(shared),
          shift_(params.weight.log2_blocksize - 6),
          pitch_(static_cast<int>(params.weight.k / 64)),
          first_(Traits::kTransposed ? int64_t{64} * first_step * pitch_ + first_output / 64
                                     : first_output * pitch_ + first_step),
          absmax_(params.weight.absmax, first_ >> shift_),
          within_(static_cast<int>(first_) & ((1 << shift_) - 1)) {
        // Up to the last span in which a step is the thread's, of the 128 that take part.
        const int last_step = steps - 1 - static_cast<int>(threadIdx.x % Traits::kSpan);
        filled_steps_ = threadIdx.x < 128 ? last_step / Traits::kSpan * Traits::kSpan : -Traits::kSpan;
        const int64_t last = params.weight.n * pitch_ - 1 - first_;
        last_ = static_cast<int>(min(last, int64_t{INT32_MAX}));
        const int block = threadIdx.x / Traits::kParts;
        if constexpr (Traits::kTransposed) {
            at_ = block % 64 * pitch_ + block / 64;
            next_ = load();
            at_ += 64 * pitch_;
        } else {
            const int row = threadIdx.x / Traits::kSpan, place = threadIdx.x % Traits::kSpan;
            at_ = row * pitch_ + place;
            write_ = shared_address(shared.absmax) + (place * Traits::kSpanPitch + row) * 4;
            read_ = shared_address(shared.absmax) + block * 4;
            for (step_ = -Traits::kSpan; step_ < 0; ++step_) fill();
            keep(read_);
        }
        keep(at_);
    }

    // Of the next step, with a barrier between one and the next.
    __device__ float next() {
        float absmax;
        if constexpr (Traits::kTransposed) {
            absmax = next_;
            next_ = load();
            at_ += 64 * pitch_;
        } else {
            fill();
            absmax = load_shared_float(read_ + step_ % (2 * Traits::kSpan) * (Traits::kSpanPitch * 4));
            ++step_;
        }
        return absmax;
    }

private:
    // `at_` counts blocks of 64, of which several may share a block of the weight.
    __device__ float load() const {
        int block = (within_ + min(at_, last_)) >> shift_;
        keep(block);
        return absmax_.load(shared_.nested_code, block);
    }

    // Forward: a sixteenth of the span after the one of this step, 8 rows by 16 lanes each along its steps. The two
    // spans' buffers take turns.
    __device__ void fill() {
        const bool ends = (step_ & (Traits::kSpan - 1)) == Traits::kSpan - 1;
        if (step_ < filled_steps_) store_shared_float(write_, load());
        at_ += ends ? Traits::kSpan - 120 * pitch_ : 8 * pitch_;
        write_ += ends ? turn_ - 15 * 32 : 32;
        if (ends) turn_ = -turn_;
    }

    typename Traits::Shared& shared_;
    const int shift_, pitch_;
    const int64_t first_;
    const BlockAbsmax absmax_;
    const int within_;
    int at_, last_, step_, filled_steps_, turn_ = Traits::kSpan * Traits::kSpanPitch * 4;
    float next_;
    uint32_t write_, read_;
};

// Decodes a thread's block, or its half of one, into the tile of a step.
template <class Traits>
class GemmDecoder {
public:
    using T = typename Traits::T;

    __device__ explicit GemmDecoder(typename Traits::Shared& shared) {
        const int block = threadIdx.x / Traits::kParts, part = threadIdx.x % Traits::kParts;
        read_ = shared_address(shared.stages[0].codes) + (2 * block + (part ^ (block / 4 % 2))) * 16;
        const int row = Traits::kTransposed ? block % 64 : block, column = Traits::kTransposed ? block / 64 : 0;
        write_ = shared_address(shared.stages[0].weight) + row * Traits::kWeightPitch + column * 128 +
                 (row % 8 ^ part * Traits::kWords) * 16;
        keep(read_);
        keep(write_);
    }

    __device__ void begin(const float (&codebook)[16], float absmax, uint32_t stage) {
        planes_ = make_planes<T>(codebook, absmax);
        from_ = read_ + stage;
        to_ = write_ + stage;
    }

    // A quarter of the thread's words.
    template <int kQuarter>
    __device__ void decode_quarter() {
        constexpr int kCount = Traits::kWords / 4;
        if constexpr (kQuarter * kCount % 4 == 0) load_shared(codes_, from_ ^ (kQuarter * kCount / 4 * 16));
        unroll<kCount>([&](auto i) {
            constexpr int kWord = kQuarter * kCount + decltype(i)::value;
            uint32_t pairs[4];
            decode(planes_, codes_[kWord % 4], pairs);
            store_shared(to_ ^ (kWord * 16), pairs);
        });
    }

private:
    uint32_t read_, write_, from_, to_;
    uint32_t codes_[4];
    Planes planes_;
};

// A warp's part of the tile: sums += x · weight over 16 of a step, from shared memory.
template <class Traits>
class GemmMultiplier {
public:
    using T = typename Traits::T;

    __device__ explicit GemmMultiplier(typename Traits::Shared& shared)
        : first_m(threadIdx.x / 64 * Traits::kWarpM), first_n(threadIdx.x / 32 % 2 * Traits::kWarpN) {
        const int lane = threadIdx.x % 32;
        const int row = first_m + lane % 16;
        x_ = shared_address(shared.stages[0].x) + row * 128 + (lane / 16 ^ row % 8) * 16;
        if constexpr (Traits::kTransposed)
            weight_ = shared_address(shared.stages[0].weight) + lane % 16 * Traits::kWeightPitch + first_n * 2 +
                      (lane / 16 ^ lane % 8) * 16;
        else
            weight_ = shared_address(shared.stages[0].weight) +
                      (first_n + lane / 16 * 8 + lane % 8) * Traits::kWeightPitch + (lane / 8 % 2 ^ lane % 8) * 16;
        keep(x_);
        keep(weight_);
    }

    template <int kSixteen, class Element = T>
    __device__ void multiply_sixteen(uint32_t stage) {
        uint32_t a[Traits::kTilesM][4];
        const uint32_t x = (x_ + stage) ^ (kSixteen * 32);
        unroll<Traits::kTilesM>([&](auto i) { load_matrices<false, decltype(i)::value * 2048>(a[i], x); });
        const uint32_t weight = weight_ + stage;
        unroll<Traits::kTilesN / 2>([&](auto pair) {
            constexpr int kPair = decltype(pair)::value;
            uint32_t b[4];
            if constexpr (Traits::kTransposed)
                load_matrices<true, kSixteen * 16 * Traits::kWeightPitch>(b, weight ^ (kPair * 32));
            else
                load_matrices<false, kPair * 2048>(b, weight ^ (kSixteen * 32));
#pragma unroll
            for (int i = 0; i < Traits::kTilesM; ++i) {
                multiply(sums[i][2 * kPair], a[i], b[0], b[1], Element{});
                multiply(sums[i][2 * kPair + 1], a[i], b[2], b[3], Element{});
            }
        });
    }

    const int first_m, first_n;  // within the tile
    float sums[Traits::kTilesM][Traits::kTilesN][4] = {};

private:
    uint32_t x_, weight_;
};

// A pair of numbers as bf16: high halves, what they lack, and the high halves that are finite. An infinity has no low
// half, and may not meet the other's, which has any sign.
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

// 16 ranks of a term, as 48 steps of the reduction: to the places of x and of the weight.
template <class Traits>
__device__ void stage_term(const LoraLinearGemmKernelParams& params, typename Traits::Shared& shared,
                           const LoraTerm& term, int64_t s_column, int64_t rank, int64_t first_m,
                           int64_t first_output) {
    const auto at = [](int row, int unit) { return 32 * row + 4 * (unit ^ row % 8); };  // words, in rows of 128 bytes
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    constexpr int kWarps = Traits::kThreads / 32;
    // Lanes: 8 rows, 4 pairs of ranks.
    uint32_t* const left = reinterpret_cast<uint32_t*>(shared.stages[0].x);
    for (int i = warp; i < Traits::kTileM / 4; i += kWarps) {
        const int row = i / 2 * 8 + lane / 4, unit = i % 2;
        const int64_t m = first_m + row, r = rank + 8 * unit + lane % 4 * 2;
        const float first =
            m < params.operands.m && r < term.rank ? load_element(params.operands.s, m, s_column + r) : 0;
        const float second =
            m < params.operands.m && r + 1 < term.rank ? load_element(params.operands.s, m, s_column + r + 1) : 0;
        const SplitPair pair = split(term.scaling * first, term.scaling * second);
        left[at(row, unit) + lane % 4] = pair.high;
        left[at(row, 2 + unit) + lane % 4] = pair.low;
        left[at(row, 4 + unit) + lane % 4] = pair.finite_high;
    }
    uint32_t* const right = reinterpret_cast<uint32_t*>(shared.stages[0].weight);
    if constexpr (Traits::kTransposed) {
        // Lanes: 32 pairs of columns.
        for (int i = warp; i < 32; i += kWarps) {
            const int row = i / 2, column = 64 * (i % 2) + 2 * lane;
            const int64_t r = rank + row, k = first_output + column;
            const float first = r < term.rank && k < params.outputs ? load_element(term.factor, r, k) : 0;
            const float second = r < term.rank && k + 1 < params.outputs ? load_element(term.factor, r, k + 1) : 0;
            const SplitPair pair = split(first, second);
            const int word = 64 * row + 32 * (i % 2) + 4 * (lane / 4 ^ row % 8) + lane % 4;
            right[word] = pair.high;
            right[word + 16 * 64] = pair.finite_high;
            right[word + 32 * 64] = pair.low;
        }
    } else {
        for (int i = warp; i < kTileN / 4; i += kWarps) {
            const int row = i / 2 * 8 + lane / 4, unit = i % 2;
            const int64_t n = first_output + row, r = rank + 8 * unit + lane % 4 * 2;
            const float first = n < params.outputs && r < term.rank ? load_element(term.factor, n, r) : 0;
            const float second = n < params.outputs && r + 1 < term.rank ? load_element(term.factor, n, r + 1) : 0;
            const SplitPair pair = split(first, second);
            right[at(row, unit) + lane % 4] = pair.high;
            right[at(row, 2 + unit) + lane % 4] = pair.finite_high;
            right[at(row, 4 + unit) + lane % 4] = pair.low;
        }
    }
}

// Adds the sums of all CTAs that share a tile, in the order of the reduction; false for those that are not the last to
// arrive. The last one waits only for CTAs that are already writing theirs.
template <class Traits>
__device__ bool gather_sums(const LoraLinearGemmKernelParams& params, typename Traits::Shared& shared, int64_t tile,
                            int split, float (&sums)[Traits::kTilesM][Traits::kTilesN][4]) {
    constexpr int64_t kVectors = int64_t{Traits::kTileM} * kTileN / 4;
    float4* const tile_sums =
        reinterpret_cast<float4*>(params.partial_sums) + tile * params.splits * kVectors + threadIdx.x;
    uint32_t* const arrived = params.arrivals + 2 * tile;
    uint32_t* const written = arrived + 1;
    const uint32_t others = params.splits - 1;
    const auto place = [](int i, int j) { return (i * Traits::kTilesN + j) * Traits::kThreads; };
    if (threadIdx.x == 0) shared.is_last = atomicAdd(arrived, 1) == others;
    __syncthreads();
    if (!shared.is_last) {
#pragma unroll
        for (int i = 0; i < Traits::kTilesM; ++i)
#pragma unroll
            for (int j = 0; j < Traits::kTilesN; ++j)
                tile_sums[split * kVectors + place(i, j)] =
                    make_float4(sums[i][j][0], sums[i][j][1], sums[i][j][2], sums[i][j][3]);
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) atomicAdd(written, 1);
        return false;
    }
    if (threadIdx.x == 0)
        while (atomicAdd(written, 0) != others) __nanosleep(100);
    __syncthreads();
    __threadfence();
    // A few vectors of each part at a time: as many loads under way as registers are free.
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

// Four neighbours of a row, of which the first `count` exist.
__device__ inline float4 load_four(const ConstMatrix& matrix, int64_t i, int64_t j, int count, bool aligned) {
    if (!matrix.data) return make_float4(0, 0, 0, 0);
    if (aligned && count >= 4) {
        const char* const from =
            static_cast<const char*>(matrix.data) + (i * matrix.stride + j) * bytes_of(matrix.dtype);
        if (matrix.dtype == DType::kFloat32) return *reinterpret_cast<const float4*>(from);
        const uint2 words = *reinterpret_cast<const uint2*>(from);
        float2 low, high;
        if (matrix.dtype == DType::kBFloat16) {
            low = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&words.x));
            high = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&words.y));
        } else {
            low = __half22float2(*reinterpret_cast<const __half2*>(&words.x));
            high = __half22float2(*reinterpret_cast<const __half2*>(&words.y));
        }
        return make_float4(low.x, low.y, high.x, high.y);
    }
    return make_float4(count > 0 ? load_element(matrix, i, j) : 0, count > 1 ? load_element(matrix, i, j + 1) : 0,
                       count > 2 ? load_element(matrix, i, j + 2) : 0, count > 3 ? load_element(matrix, i, j + 3) : 0);
}

__device__ inline void store_four(const Matrix& matrix, int64_t i, int64_t j, int count, bool aligned, float4 value) {
    if (aligned && count >= 4) {
        char* const to = static_cast<char*>(matrix.data) + (i * matrix.stride + j) * bytes_of(matrix.dtype);
        if (matrix.dtype == DType::kFloat32)
            *reinterpret_cast<float4*>(to) = value;
        else if (matrix.dtype == DType::kBFloat16)
            *reinterpret_cast<uint2*>(to) =
                make_uint2(pack(value.x, value.y, __nv_bfloat16{}), pack(value.z, value.w, __nv_bfloat16{}));
        else
            *reinterpret_cast<uint2*>(to) =
                make_uint2(pack(value.x, value.y, __half{}), pack(value.z, value.w, __half{}));
        return;
    }
    if (count > 0) store_element(matrix, i, j, value.x);
    if (count > 1) store_element(matrix, i, j + 1, value.y);
    if (count > 2) store_element(matrix, i, j + 2, value.z);
    if (count > 3) store_element(matrix, i, j + 3, value.w);
}

template <class Matrix>
__device__ inline bool has_aligned_fours(const Matrix& matrix) {
    const int64_t bytes = 4 * bytes_of(matrix.dtype);
    return reinterpret_cast<uint64_t>(matrix.data) % bytes == 0 && matrix.stride % 4 == 0;
}

// out = sums + bias + add from row stored_m on, through shared memory, so that rows go out in whole sectors.
template <class Traits>
__device__ void store_tile(const LoraLinearGemmKernelParams& params, typename Traits::Shared& shared,
                           const GemmPlace& place, const GemmMultiplier<Traits>& warp_tile) {
    const LoraLinearGemmParams& operands = params.operands;
    const int lane = threadIdx.x % 32;
    float* const sums = shared.sums[threadIdx.x / 32];
    const bool aligned = has_aligned_fours(operands.out), add_aligned = has_aligned_fours(operands.add);
    // Lanes: 4 rows, 8 vectors of 4 columns; then the 32 columns beyond. Rolled loops, for there are many cases inside.
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
#pragma unroll 1
        for (int half = 0; half < 2; ++half) {
            const int64_t column = place.first_output + warp_tile.first_n + lane % 8 * 4 + 32 * half;
            const int count = static_cast<int>(max(int64_t{0}, min(int64_t{4}, params.outputs - column)));
            const float4 bias = load_four(operands.bias, 0, column, count, false);
#pragma unroll 1
            for (int row = lane / 8; row < 16; row += 4) {
                const int64_t m = place.first_m + warp_tile.first_m + 16 * i + row;
                if (m < place.stored_m || m >= operands.m) continue;
                const float4 sum =
                    *reinterpret_cast<const float4*>(&sums[row * Traits::kSumPitch + lane % 8 * 4 + 32 * half]);
                const float4 add = load_four(operands.add, m, column, count, add_aligned);
                store_four(operands.out, m, column, count, aligned,
                           make_float4(sum.x + bias.x + add.x, sum.y + bias.y + add.y, sum.z + bias.z + add.z,
                                       sum.w + bias.w + add.w));
            }
        }
    }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kTileM > 128 ? 1 : 2)
    lora_linear_gemm_kernel(const __grid_constant__ LoraLinearGemmKernelParams params) {
#if __CUDA_ARCH__ >= 800
    constexpr uint32_t kStage = sizeof(typename Traits::Stage);
    extern __shared__ __align__(128) unsigned char memory[];
    typename Traits::Shared& shared = *reinterpret_cast<typename Traits::Shared*>(memory);
    const GemmPlace start = find_place<Traits>(params);
    const int first_step = start.split * params.split_steps;
    const int steps = min(params.steps - first_step, params.split_steps);

    // load
    GemmLoader<Traits> loader(params, shared, start.first_m, start.first_output, first_step);
    loader.copy_codes(0);
    loader.copy_x(0);
    if (steps > 1) loader.copy_codes(kStage);
    commit_copies();
    load_nested_code(params.weight.absmax, shared.nested_code);
    __syncthreads();
    GemmAbsmax<Traits> absmax(params, shared, start.first_output, first_step, steps);
    GemmDecoder<Traits> decoder(shared);
    GemmMultiplier<Traits> multiplier(shared);
    wait_for_copies<0>();
    __syncthreads();
    decoder.begin(params.codebook, absmax.next(), 0);
    unroll<4>([&](auto quarter) { decoder.template decode_quarter<decltype(quarter)::value>(); });

    // compute
    uint32_t stage = 0, other = kStage;
    for (int step = 0; step < steps - 1; ++step) {
        wait_for_copies<0>();
        __syncthreads();
        loader.copy_x(other);
        loader.copy_codes(stage, step < steps - 2);
        commit_copies();
        decoder.begin(params.codebook, absmax.next(), other);
        unroll<4>([&](auto sixteen) {
            multiplier.template multiply_sixteen<decltype(sixteen)::value>(stage);
            decoder.template decode_quarter<decltype(sixteen)::value>();
        });
        other = stage;
        stage ^= kStage;
    }
    wait_for_copies<0>();
    __syncthreads();
    unroll<4>([&](auto sixteen) { multiplier.template multiply_sixteen<decltype(sixteen)::value>(stage); });
    __syncthreads();

    // reduce
    const GemmPlace place = find_place<Traits>(params);
    if (params.splits > 1 && !gather_sums<Traits>(params, shared, place.tile, place.split, multiplier.sums)) return;
    int64_t s_column = 0;
    for (int term = 0; term < params.operands.num_terms; ++term) {
        const int64_t rank = params.operands.terms[term].rank;
        for (int64_t r = 0; r < rank; r += 16) {
            stage_term<Traits>(params, shared, params.operands.terms[term], s_column, r, place.first_m,
                               place.first_output);
            __syncthreads();
            unroll<3>([&](auto sixteen) {
                multiplier.template multiply_sixteen<decltype(sixteen)::value, __nv_bfloat16>(0);
            });
            __syncthreads();
        }
        s_column += rank;
    }

    // store
    store_tile<Traits>(params, shared, place, multiplier);
#endif
}

}  // namespace peft_kernels::cuda
