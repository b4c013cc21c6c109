// The parts of the main loop for many rows: where its operands lie in shared memory, and who brings, decodes and
// multiplies them.
// See matmul/cuda/many_rows_kernel.cuh.
#pragma once

#include "common/cuda/nf4_decode.cuh"
#include "matmul/cuda/kernel_plan.h"
#include "matmul/cuda/operands.cuh"

namespace peft_kernels::cuda {

template <class T_, int kTileM_, bool kTransposed_>
struct ManyRowsTraits {
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

    // The place of a block of 64 weights in the step's part of the weight: forward 128 rows of one, transposed 64 of
    // two.
    __device__ static constexpr int row_of(int block) { return kTransposed ? block / 2 : block; }
    __device__ static constexpr int column_of(int block) { return kTransposed ? block % 2 : 0; }

    // Forward, absmax comes in spans of 16 steps, so that whole sectors are read. 129: writes along 32 steps of a row,
    // or 16 steps of two rows that are 16 apart, are in 32 banks.
    static constexpr int kSpan = 16, kSpanPitch = kBlocks + 1;

    // By which units of 16 bytes are permuted: 8 rows of one column, and 4 of two, meet different banks.
    __device__ static constexpr int swizzle(int row, int column) { return row % 8 ^ 4 * column; }

    // The word of the decoded tile, transposed, where these 8 columns of a row begin.
    __device__ static constexpr int term_word(int row, int column, int unit) {
        return 64 * row + 32 * column + 4 * (unit ^ swizzle(row, column));
    }

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
        float absmax[kTransposed ? 1 : 2 * kSpan][kTransposed ? 1 : kSpanPitch];
        bool is_last;
    };
};

// A CTA's part of the work.
struct ManyRowsPlace {
    int64_t tile;
    int split;
    int64_t first_m, stored_m, first_output;  // the rows before stored_m are another tile's
    int64_t end_m;                            // of the rows of x that are multiplied with this weight
    int64_t expert, first_row;                // of a stack, and where its matrix begins in the rows of all
};

// Tiles of the same weights are neighbours: their codes meet in the L2. It is called before the main loop and again
// after it, so that the loop need not keep the result in registers.
template <class Traits>
__device__ inline ManyRowsPlace find_place(const FusedMatmulKernelParams& params) {
    uint32_t block = blockIdx.x;
    keep(block);
    ManyRowsPlace place;
    place.tile = block / params.splits;
    place.split = block % params.splits;
    place.stored_m = place.tile % params.tiles_m * Traits::kTileM;
    place.first_m = Traits::kFull ? min(place.stored_m, params.operands.m - Traits::kTileM) : place.stored_m;
    place.first_output = place.tile / params.tiles_m * kTileN;
    place.end_m = params.operands.m;
    place.expert = place.first_row = 0;
    return place;
}

// Copies of x and of codes from global to shared memory, step after step.
template <class Traits>
class ManyRowsLoader {
public:
    using T = typename Traits::T;
    static constexpr int kRowsAtOnce = Traits::kThreads / 8;  // of x, by one copy of each thread

    __device__ ManyRowsLoader(const FusedMatmulKernelParams& params, typename Traits::Shared& shared,
                              const ManyRowsPlace& place, int first_step) {
        const int64_t first_m = place.first_m, first_output = place.first_output;
        const FusedMatmulParams& operands = params.operands;
        const int row = threadIdx.x / 8, unit = threadIdx.x % 8;
        x_step_ = kRowsAtOnce * operands.x.stride * sizeof(T);
        x_ = static_cast<const char*>(operands.x.data) +
             ((first_m + row) * operands.x.stride + int64_t{64} * first_step) * sizeof(T) + 16 * unit;
        rows_left_ = static_cast<int>(min(place.end_m - first_m, int64_t{Traits::kTileM})) - row;
        columns_left_ = static_cast<int>(params.reduction) - 64 * first_step - 8 * unit;
        write_x_ = shared_address(shared.stages[0].x) + row * 128 + (unit ^ (row % 8)) * 16;

        // Two neighbouring lanes have the two halves of a block's codes, a sector; transposed, four have those of a
        // row. A row or column that the weight does not have is replaced by its last one, since the result is not
        // stored.
        const int block = threadIdx.x / 2, half = threadIdx.x % 2;
        const int64_t pitch = params.weight.k / 2;
        write_codes_ = shared_address(shared.stages[0].codes) + (2 * block + (half ^ (block / 4 % 2))) * 16;
        if constexpr (Traits::kTransposed) {
            const int last_column = params.outputs - first_output > 64 ? 1 : 0;
            const int column = min(Traits::column_of(block), last_column);
            codes_ = params.weight.codes +
                     (place.first_row + int64_t{64} * first_step + Traits::row_of(block)) * pitch +
                     (first_output + 64 * column) / 2 + 16 * half;
            code_step_ = 64 * pitch;
            second_codes_ = 32 * pitch;
            code_rows_left_ = columns_left_ + 8 * unit - Traits::row_of(block);
        } else {
            const int64_t last = params.outputs - 1, upper = min(first_output + block, last);
            codes_ = params.weight.codes + (place.first_row + upper) * pitch + 32 * first_step + 16 * half;
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
        const auto exists = [&](int row) { return has_step && (!Traits::kTransposed || row < code_rows_left_); };
        copy_async16(to, codes_, exists(0) ? 16 : 0);
        if constexpr (Traits::kParts == 1) copy_async16<64 * 32>(to, codes_ + second_codes_, exists(32) ? 16 : 0);
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

// absmax of a thread's block, step after step. Where the weight has no row or column, another block's absmax is read,
// since the result is not stored. No load is waited for at once: those of the first steps are under way together, and
// later ones while the matrix unit works.
template <class Traits>
class ManyRowsAbsmax {
public:
    // Has a barrier, behind which the table of nested statistics is there.
    __device__ ManyRowsAbsmax(const FusedMatmulKernelParams& params, typename Traits::Shared& shared,
                              const ManyRowsPlace& place, int first_step, int steps)
        : shared_(shared),
          shift_(params.weight.log2_blocksize - 6),
          pitch_(static_cast<int>(params.weight.k / 64)),
          first_(Traits::kTransposed
                     ? (place.first_row + int64_t{64} * first_step) * pitch_ + place.first_output / 64
                     : (place.first_row + place.first_output) * pitch_ + first_step / Traits::kSpan * Traits::kSpan),
          absmax_(params.weight.absmax, first_ >> shift_),
          within_(static_cast<int>(first_) & ((1 << shift_) - 1)) {
        last_ = static_cast<int>(min(params.weight.n * pitch_ - 1 - first_, int64_t{INT32_MAX}));
        if constexpr (Traits::kTransposed) {
            const int block = threadIdx.x / Traits::kParts;
            at_ = Traits::row_of(block) * pitch_ + Traits::column_of(block);
            last_ = min(last_, at_ + (steps - 1) * 64 * pitch_);
            load_next();
            const NestedCode<Traits::kThreads> table(params.weight.absmax);
            offset_ = table.offset;
            table.store(shared.nested_code);
            __syncthreads();
        } else {
            // Two spans at once, 32 lanes along the steps of a row: those of nested statistics are one or two sectors.
            // If the second one is not this CTA's, 16 lanes along the steps of each of two rows. Spans begin at
            // multiples of 16 steps, of which the first ones may be another CTA's.
            const int before = first_step % Traits::kSpan, end = before + steps;
            const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
            const int place = lane % Traits::kSpan, second_row = lane / Traits::kSpan * 16;
            constexpr int kRows = Traits::kBlocks * 32 / Traits::kThreads;  // of a warp
            const bool is_pair = kRows == 32 && end <= Traits::kSpan;
            const int step = is_pair ? place : lane, row = warp * kRows + (is_pair ? second_row : 0);
            at_ = row * pitch_ + step;
            write_ = shared_address(shared.absmax) + ((step ^ Traits::kSpan) * Traits::kSpanPitch + row) * 4;
            const bool is_ours = step >= before && step < end;
            StoredAbsmax rows[kRows];
            if (is_ours) unroll<16>([&](auto i) { rows[i] = load(i * pitch_); });
            if (is_ours && !is_pair) unroll<kRows - 16>([&](auto i) { rows[16 + i] = load((16 + i) * pitch_); });
            const NestedCode<Traits::kThreads> table(params.weight.absmax);
            offset_ = table.offset;
            table.store(shared.nested_code);
            __syncthreads();
            const auto store = [&](int i) { store_shared_float(write_ + 4 * i, look_up(rows[i])); };
            if (is_ours) unroll<16>([&](auto i) { store(i); });
            if (is_ours && !is_pair) unroll<kRows - 16>([&](auto i) { store(16 + i); });
            // Then one after the other, by four warps and in pairs of rows.
            const int first_row = warp * 32 + second_row + before;
            step_ = before - Traits::kSpan;
            filled_steps_ = warp < 4 ? max((end - 1 - place) / Traits::kSpan - 1, 0) * Traits::kSpan : 0;
            at_ = first_row * pitch_ + Traits::kSpan + place;
            write_ = shared_address(shared.absmax) + (place * Traits::kSpanPitch + first_row) * 4;
            read_ = shared_address(shared.absmax) + threadIdx.x / Traits::kParts * 4;
            keep(read_);
        }
        keep(at_);
    }

    // absmax of the next step. There has to be a barrier between one call and the next, and a call of fill().
    __device__ float next() {
        float absmax;
        if constexpr (Traits::kTransposed) {
            absmax = look_up(ahead_);
            load_next();
        } else {
            if (fills()) ahead_ = load();
            at_ += ends_span() ? Traits::kSpan - 15 * pitch_ : pitch_;
            absmax = load_shared_float(read_ + (step_ & (kTwoSpans - 1)) * (Traits::kSpanPitch * 4));
        }
        return absmax;
    }

    // Stores what next() has asked for, a sixteenth of the span after the one of this step: a row for each 16 lanes;
    // nothing in the first span, as the second one is there. The two spans' buffers take turns.
    __device__ void fill() {
        if constexpr (!Traits::kTransposed) {
            if (fills()) store_shared_float(write_, look_up(ahead_));
            write_ += ends_span() ? turn_ - 15 * 4 : 4;
            if (ends_span()) turn_ = -turn_;
            ++step_;
        }
    }

private:
    // Of the block `further` on. `at_` counts blocks of 64, of which several may share a block of the weight.
    __device__ StoredAbsmax load(int further = 0) const {
        int block = (within_ + min(at_ + further, last_)) >> shift_;
        keep(block);
        return absmax_.load(block);
    }
    __device__ float look_up(StoredAbsmax stored) const {
        return absmax_.look_up(shared_.nested_code, offset_, stored);
    }

    // Transposed: absmax of the block 64 rows further down. Below the last row x is zero, and absmax only has to be
    // finite.
    __device__ void load_next() {
        ahead_ = at_ <= last_ ? load() : StoredAbsmax{};
        at_ += 64 * pitch_;
    }

    __device__ bool fills() const { return static_cast<uint32_t>(step_) < filled_steps_; }
    __device__ bool ends_span() const { return (step_ & (Traits::kSpan - 1)) == Traits::kSpan - 1; }

    static constexpr int kTwoSpans = 2 * Traits::kSpan;

    typename Traits::Shared& shared_;
    const int shift_, pitch_;
    const int64_t first_;
    const BlockAbsmax absmax_;
    const int within_;
    int at_, last_, turn_ = Traits::kSpan * Traits::kSpanPitch * 4;
    int step_;  // from the second span on
    uint32_t filled_steps_;
    StoredAbsmax ahead_;
    float offset_;
    uint32_t write_, read_;
};

// Decodes a thread's block, or its half of one, into the tile of a step.
template <class Traits>
class ManyRowsDecoder {
public:
    using T = typename Traits::T;

    __device__ explicit ManyRowsDecoder(typename Traits::Shared& shared) {
        const int block = threadIdx.x / Traits::kParts, part = threadIdx.x % Traits::kParts;
        read_ = shared_address(shared.stages[0].codes) + (2 * block + (part ^ (block / 4 % 2))) * 16;
        const int row = Traits::row_of(block), column = Traits::column_of(block);
        write_ = shared_address(shared.stages[0].weight) + row * Traits::kWeightPitch + column * 128 +
                 (Traits::swizzle(row, column) ^ part * Traits::kWords) * 16;
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
class ManyRowsMultiplier {
public:
    using T = typename Traits::T;

    __device__ explicit ManyRowsMultiplier(typename Traits::Shared& shared)
        : first_m(threadIdx.x / 64 * Traits::kWarpM), first_n(threadIdx.x / 32 % 2 * Traits::kWarpN) {
        const int lane = threadIdx.x % 32;
        const int row = first_m + lane % 16;
        x_ = shared_address(shared.stages[0].x) + row * 128 + (lane / 16 ^ row % 8) * 16;
        if constexpr (Traits::kTransposed)
            weight_ = shared_address(shared.stages[0].weight) + lane % 16 * Traits::kWeightPitch + first_n * 2 +
                      (lane / 16 ^ Traits::swizzle(lane, first_n / 64)) * 16;
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

}  // namespace peft_kernels::cuda
