// The absmax of the kernel of few rows (matmul/cuda/few_rows_kernel.cuh), on its way to shared memory.
#pragma once

#include "common/cuda/nf4_decode.cuh"
#include "matmul/cuda/operands.cuh"

namespace peft_kernels::cuda {

// absmax of all rows for the chunks of a span: lanes take four blocks each along a row, in whole sectors. All loads of
// a thread are under way together. Past the last row, the last row's absmax is read, since the result is not stored.
// Past the last block x is zero, and absmax only has to be finite.
template <class Traits>
class FewRowsAbsmax {
public:
    // From block first_block of the first of `rows` rows on, up to block end_block of each.
    __device__ void load(const FusedMatmulKernelParams& params, int64_t first_row, int rows, int first_block,
                         int end_block) {
        // Lanes: 4 rows, 8 fours of blocks; then all rows, and the next 8 fours.
        const int row = threadIdx.x / 8 % Traits::kRows;
        const int column = threadIdx.x / (8 * Traits::kRows) * 32 + threadIdx.x % 8 * 4;
        const int row_blocks = params.steps;  // of 64; several may share a block of the weight
        const int shift = params.weight.log2_blocksize - 6;
        const int64_t first = first_row * row_blocks + first_block;
        const BlockAbsmax absmax(params.weight.absmax, first >> shift);
        at_ = row * Traits::kAbsmaxPitch + column;
        blocks_left_ = end_block - first_block - column;
        keep(at_);
        keep(blocks_left_);
        const int last_row = rows - 1;
        const auto load_fours = [&](const auto& load_four) {
            each_pass([&](auto pass) {
                const int at = min(row + row_of(pass), last_row) * row_blocks + column + column_of(pass);
                load_four(at, fours_[pass], blocks_left_ - column_of(pass));
            });
        };
        const auto load_ones = [&](const auto& load_one) {
            const int within = static_cast<int>(first) & ((1 << shift) - 1);
            load_fours([&](int at, StoredFour& four, int blocks) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const StoredAbsmax one = i < blocks ? load_one((within + at + i) >> shift) : StoredAbsmax{};
                    four.codes[i] = one.code;
                    four.values[i] = one.value;
                }
            });
        };
        // Each form has loads of its own: in a register that either of two loads fills, one would wait for the other.
        const bool is_plain = params.weight.absmax.absmax;
        if (params.absmax_fours && is_plain)
            load_fours([&](int at, StoredFour& four, int) { absmax.load_plain_four(at, four); });
        else if (params.absmax_fours)
            load_fours([&](int at, StoredFour& four, int) { absmax.load_nested_four(at, four); });
        else if (is_plain)
            load_ones([&](int block) { return absmax.load_plain(block); });
        else
            load_ones([&](int block) { return absmax.load_nested(block); });
    }

    __device__ void store(const FusedMatmulKernelParams& params, typename Traits::Shared& shared,
                          float nested_offset) const {
        float* const to = &shared.absmax[at_];
        const auto store_fours = [&](const auto& absmax_of) {
            each_pass([&](auto pass) {
                const StoredFour& four = fours_[pass];
                *reinterpret_cast<float4*>(to + row_of(pass) * Traits::kAbsmaxPitch + column_of(pass)) =
                    make_float4(absmax_of(four, 0), absmax_of(four, 1), absmax_of(four, 2), absmax_of(four, 3));
            });
        };
        const auto look_up = [&](uint32_t code, float value) {
            return look_up_nested(shared.nested_code, nested_offset, StoredAbsmax{code, value});
        };
        if (params.weight.absmax.absmax)
            store_fours([](const StoredFour& four, int i) { return four.values[i]; });
        else if (params.absmax_fours)
            store_fours([&](const StoredFour& four, int i) {
                return look_up(four.codes[0] >> (8 * i) & 0xFF, four.values[0]);
            });
        else
            store_fours([&](const StoredFour& four, int i) { return look_up(four.codes[i], four.values[i]); });
    }

private:
    static constexpr int kPasses = Traits::kRows * Traits::kSpan / Traits::kThreads, kRowsAtOnce = Traits::kThreads / 8;

    // Passes whose blocks exist, each behind the one before it, so that they share what they can.
    template <int kPass = 0, class Body>
    __device__ void each_pass(const Body& body) const {
        if constexpr (kPass < kPasses) {
            if (blocks_left_ <= column_of(kPass)) return;
            body(Index<kPass>{});
            each_pass<kPass + 1>(body);
        }
    }

    // How far a pass is from the first one.
    __device__ static constexpr int row_of(int pass) { return pass * kRowsAtOnce % Traits::kRows; }
    __device__ static constexpr int column_of(int pass) { return pass * kRowsAtOnce / Traits::kRows * 32; }

    int at_;           // in shared memory
    int blocks_left_;  // from this thread's first one on
    StoredFour fours_[kPasses];
};

}  // namespace peft_kernels::cuda
