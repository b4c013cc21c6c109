// Decode and middle shapes of lora_linear's forward, in bf16: up to 64 rows of x.
// For sources that are compiled once per instruction set, and only for those.
//
// Vectors run along k, in combed order (lora_linear_comb.h), so the weight is decoded without being transposed: 19
// instructions for 128 weights. (Without vcvtne2ps2bf16 the tables take as long as that saves: 0.8-1.1 of the time with
// fp32 products, on AVX-512 and AVX2.) kQuad rows of W are multiplied with up to kMostRows rows of x at a time; every product
// has a vector of sums, which the LoRA branch is added to before its lanes are:
//
//                     x: kMostRows rows          up to kDirectRows rows of x: W goes from registers into the
//               ┌───┬───┬───┬───┬───┬───┐        products; more: a part of k of the four rows (8 KB) is decoded
//         k     │   │   │   │   │   │   │        into L1, where every group of rows of x reads it
//    W: ┌───┐   ├───┼───┼───┼───┼───┼───┤
//       │   │   │ sums, a vector each   │
//       └───┘   └───┴───┴───┴───┴───┴───┘
#pragma once

#if defined(__AVX512BF16__)

#include "common/parallel_for.h"
#include "lora_linear/lora_linear_scales.h"

namespace peft_kernels {
namespace PEFT_KERNELS_ISA {
namespace {

constexpr int kQuad = 4;
constexpr int kMostRows = 6;    // 24 sums, 4 vectors of W and one of x: 29 of 32 registers
constexpr int kDirectRows = 4;  // 16 sums
constexpr int64_t kComb = 128;  // elements whose codes fill a register
constexpr int kCombVectors = 4;
constexpr int64_t kCombedDepth = 8;  // combs decoded at a time

// 128 elements in natural order -> the comb: vector j has elements j, j + 4, j + 8 ...
inline void comb(const uint32_t* natural, U32* out) {
    const auto every_fourth = [](int first) {
        uint16_t lanes[32];  // of two vectors; what the upper half picks is not used
        for (int i = 0; i < 32; ++i) lanes[i] = (4 * i + first) % 64;
        return _mm512_loadu_si512(lanes);
    };
    const auto part = [&](int i) { return _mm512_loadu_si512(natural + i * kLanes); };
    for (int j = 0; j < kCombVectors; ++j) {
        const __m512i index = every_fourth(j);
        const __m512i low = _mm512_permutex2var_epi16(part(0), index, part(1));
        const __m512i high = _mm512_permutex2var_epi16(part(2), index, part(3));
        out[j] = (U32)_mm512_inserti64x4(low, _mm512_castsi512_si256(high), 1);
    }
}

// A row of x, times `scale` [columns] if there is one, in combed order; zeros fill up the last comb.
template <class T>
inline void comb_row(const T* x, const float* scale, int64_t columns, U32* out) {
    for (int64_t column = 0; column < columns; column += kComb, out += kCombVectors) {
        alignas(64) uint32_t natural[kComb / 2] = {};
        convert_row(x + column, scale ? scale + column : nullptr, min_of(kComb, columns - column), 2, natural);
        comb(natural, out);
    }
}

// The combs of rows of W.
class CombedWeight {
public:
    explicit CombedWeight(const Nf4Weight& w)
        : w_(w),
          values_(_mm512_load_ps(codebook(w.quant_type))),
          runs_(w.k / kBlock),
          combs_(divide_up(w.k, kComb)),
          ahead_(divide_up(int64_t{4096}, max_of<int64_t>(1, kQuad * w.k / 2)) * kQuad * w.k / 2) {}

    int64_t combs() const { return combs_; }
    int64_t runs() const { return runs_; }
    // [row][run], of neighbouring rows
    void absmax(int64_t row, int64_t rows, float* out) const { runs_absmax(w_, row * w_.k, rows * runs_, out); }
    const uint8_t* codes(int64_t row) const { return w_.codes + row * w_.k / 2; }
    void prefetch_absmax(int64_t row, int64_t rows) const {
        const int64_t first = row * runs_, end = min_of(row + rows, w_.n) * runs_;
        for (int64_t run = first; w_.absmax.nested_codes && run < end; run += 64)
            __builtin_prefetch(w_.absmax.nested_codes + run);
    }

    // Comb `index` of a row. The codes of a later row are asked for: each row is a stream of its own, too short for the
    // hardware to get ahead. It is the first one beyond 4 KB, since memory takes longer than the next kQuad rows of a
    // short k (1536 x 576 from memory: 43 us instead of 50).
    void decode(const uint8_t* codes, const float* absmax, int64_t index, U32 (&out)[kCombVectors]) const {
        const __m512i second = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
        const bool whole = 2 * index + 1 < runs_;
        const __m512i table = table_of_two(w_, values_, absmax[2 * index], whole ? absmax[2 * index + 1] : 0);
        const uint8_t* from = codes + index * kComb / 2;
        __builtin_prefetch(from + ahead_);
        const __m512i words = whole ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi64(0xF, from);
        // The first element of a byte is in its high nibble.
        out[0] = (U32)lookup_two(table, _mm512_srli_epi16(words, 4), second);
        out[1] = (U32)lookup_two(table, words, second);
        out[2] = (U32)lookup_two(table, _mm512_srli_epi16(words, 12), second);
        out[3] = (U32)lookup_two(table, _mm512_srli_epi16(words, 8), second);
    }

private:
    const Nf4Weight w_;
    const __m512 values_;
    const int64_t runs_, combs_;
    const int64_t ahead_;  // bytes
};

// The sums of four vectors' lanes, side by side. In a fixed order, so that every run gives the same bits.
inline __m128 horizontal_sums(F32 a, F32 b, F32 c, F32 d) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512 abcd = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))),
                                      _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// Calls body(first, count as a constant) for rows in groups of nearly the same size, at most kMostRows.
template <class Body>
inline void for_each_group(int64_t rows, const Body& body) {
    for (int64_t row = 0, groups = divide_up(rows, kMostRows); groups > 0; --groups) {
        const int64_t count = divide_up(rows - row, groups);
        switch (count) {
            case 1: body(row, Constant<1>{}); break;
            case 2: body(row, Constant<2>{}); break;
            case 3: body(row, Constant<3>{}); break;
            case 4: body(row, Constant<4>{}); break;
            case 5: body(row, Constant<5>{}); break;
            case 6: body(row, Constant<6>{}); break;
        }
        row += count;
    }
}

class CombedForward {
public:
    explicit CombedForward(const LoraLinearForwardParams& params)
        : p_(params), weight_(rounded_once(*params.weight, params.compute_dtype)) {
        for (int a = 0; a < p_.num_adapters; ++a) ranks_ += divide_up(p_.adapters[a].rank, kLanes) * kLanes;
        // Tasks of about half a million products and lookups, some ten microseconds on one core: waking a thread for
        // less takes longer (576 x 576, M = 1: 18.5 us in one task, 20.5 in nine on two threads).
        const int64_t row_cost = max_of<int64_t>(1, p_.k * (kQuad + p_.m) / (kQuad + 1));
        const int64_t most = max_of<int64_t>(1, (int64_t{1} << 19) / row_cost / kLanes) * kLanes;
        const int64_t tasks = max_of<int64_t>(1, divide_up(p_.n, most));  // of the same size
        task_outputs_ = divide_up(divide_up(p_.n, tasks), kLanes) * kLanes;
    }

    void run() {
        Arena arena(p_.workspace);
        x_ = arena.take<U32>(p_.m * row_vectors());
        s_ = arena.take<float>(p_.m * ranks_);
        kept_.lay_out(arena);
        const int64_t worker_bytes = Scratch(nullptr, *this).bytes;
        char* workers = arena.take<char>(p_.threads * worker_bytes);
        if (!p_.workspace) {
            *p_.workspace_bytes = arena.used();
            return;
        }
        make_x();
        make_s();
        parallel_for_each(divide_up(p_.n, task_outputs_), [&](int64_t task, int worker) {
            const Scratch scratch(workers + worker * worker_bytes, *this);
            const int64_t end = min_of((task + 1) * task_outputs_, p_.n);
            for (int64_t n = task * task_outputs_; n < end; n += kTaskOutputs)
                make_y(n, min_of(kTaskOutputs, end - n), scratch);
        });
    }

private:
    struct Scratch {  // of one worker
        Scratch(char* base, const CombedForward& f) {
            Arena arena(base);
            absmax = arena.take<float>(kTaskOutputs * f.weight_.runs());
            panel = arena.take<U32>(kCombedDepth * kCombVectors * kQuad);
            sums = arena.take<F32>(f.p_.m * kQuad);
            tile = arena.take<float>(f.p_.m * kTaskOutputs);
            bias = arena.take<float>(kTaskOutputs);
            bytes = arena.used();
        }
        float* absmax;
        U32* panel;  // [comb][vector][row of W]
        F32* sums;   // [row of x][row of W]
        float* tile;
        float* bias;
        int64_t bytes;
    };

    int64_t row_vectors() const { return weight_.combs() * kCombVectors; }
    void make_x() const {
        constexpr int64_t kRows = 8;  // a task's; waking a thread for fewer takes longer
        parallel_for_each(divide_up(p_.m, kRows), [&](int64_t task, int) {
            dispatch_dtype(p_.x.dtype, [&](auto* type) {
                using T = Pointee<decltype(type)>;
                for (int64_t row = task * kRows; row < min_of((task + 1) * kRows, p_.m); ++row)
                    comb_row(static_cast<const T*>(row_of(p_.x, row)), p_.scale_k, p_.k, x_ + row * row_vectors());
            });
        });
    }

    // s = drop(x) Aᵀ / (1 - p), and what the branch multiplies with B.
    void make_s() const {
        int64_t offset = 0, rank = 0;
        for (int a = 0; a < p_.num_adapters; ++a) {
            const LoraAdapter& adapter = p_.adapters[a];
            kept_.make(a, 0, p_.m);
            const uint8_t* keep = kept_.at(a, 0, 0);
            // Tasks of at least 32k products, for the same reason.
            const int64_t quads = max_of<int64_t>(1, (int64_t{1} << 15) / max_of<int64_t>(1, p_.k * p_.m * kQuad));
            const int64_t task_ranks = quads * kQuad;
            parallel_for_each(divide_up(adapter.rank, task_ranks), [&](int64_t task, int) {
                dispatch_dtype(p_.x.dtype, [&](auto* x_type) {
                    dispatch_dtype(adapter.lora_A.dtype, [&](auto* a_type) {
                        for (int64_t r = task * task_ranks; r < min_of((task + 1) * task_ranks, adapter.rank);
                             r += kQuad)
                            for (int64_t i = 0; i < p_.m;) {
                                const auto shrink = [&](auto rows) {
                                    shrink_quad<Pointee<decltype(x_type)>, Pointee<decltype(a_type)>,
                                                decltype(rows)::kValue>(adapter, keep, i, r, rank, offset);
                                    i += decltype(rows)::kValue;
                                };
                                p_.m - i >= kQuad ? shrink(Constant<kQuad>{}) : shrink(Constant<1>{});
                            }
                    });
                });
            });
            for (int64_t i = 0; i < p_.m; ++i)
                for (int64_t r = adapter.rank; r % kLanes; ++r) s_[i * ranks_ + offset + r] = 0;
            offset += divide_up(adapter.rank, kLanes) * kLanes;
            rank += adapter.rank;
        }
    }

    // Ranks [r, r + kQuad) of some rows.
    template <class X, class A, int kRows>
    void shrink_quad(const LoraAdapter& adapter, const uint8_t* keep, int64_t row, int64_t r, int64_t rank,
                     int64_t offset) const {
        const A* a[kQuad];
        for (int j = 0; j < kQuad; ++j)  // those past the last one repeat it
            a[j] = static_cast<const A*>(row_of(adapter.lora_A, min_of(r + j, adapter.rank - 1)));
        F32 sums[kRows][kQuad] = {};
        for (int64_t column = 0; column < p_.k; column += kLanes) {
            const int64_t count = p_.k - column;
            F32 v[kQuad];
#pragma GCC unroll 4
            for (int j = 0; j < kQuad; ++j) v[j] = load_some(a[j] + column, count);
#pragma GCC unroll 4
            for (int i = 0; i < kRows; ++i) {
                F32 x = load_some(static_cast<const X*>(row_of(p_.x, row + i)) + column, count);
                if (keep) x = keep_where(x, keep + (row + i) * kept_.stride(), column);
#pragma GCC unroll 4
                for (int j = 0; j < kQuad; ++j) sums[i][j] = fma(v[j], x, sums[i][j]);
            }
        }
        const float keep_scale = dropout_of(adapter).keep_scale;
        for (int i = 0; i < kRows; ++i) {
            const __m128 values = horizontal_sums(sums[i][0], sums[i][1], sums[i][2], sums[i][3]);
            for (int j = 0; j < min_of<int64_t>(kQuad, adapter.rank - r); ++j) {
                const float value = values[j] * keep_scale;
                p_.s[(row + i) * p_.total_rank + rank + r + j] = value;
                s_[(row + i) * ranks_ + offset + r + j] = value * adapter.scaling;
            }
        }
    }

    // y = x Wᵀ + b + scaling s Bᵀ, or y = scale_n ⊙ (x Wᵀ + b), for some outputs of all rows
    void make_y(int64_t n0, int64_t outputs, const Scratch& scratch) const {
        weight_.absmax(n0, outputs, scratch.absmax);
        weight_.prefetch_absmax(n0 + outputs, kTaskOutputs);
        for (int64_t n = 0; n < outputs; n += kQuad) {
            int64_t rows[kQuad];
            const uint8_t* codes[kQuad];
            const float* absmax[kQuad];
            for (int j = 0; j < kQuad; ++j) {
                const int64_t row = min_of(n + j, outputs - 1);  // as above
                rows[j] = n0 + row;
                codes[j] = weight_.codes(n0 + row);
                absmax[j] = scratch.absmax + row * weight_.runs();
                for (int a = 0; a < p_.num_adapters; ++a) __builtin_prefetch(row_of(p_.adapters[a].lora_B, n0 + row));
            }
            if (p_.m <= kDirectRows)
                for_each_group(p_.m, [&](int64_t, auto count) {
                    if constexpr (decltype(count)::kValue <= kDirectRows)
                        multiply_direct<decltype(count)::kValue>(codes, absmax, scratch.sums);
                });
            else
                multiply_panels(codes, absmax, scratch);
            add_branch(rows, scratch.sums);
            for (int64_t i = 0; i < p_.m; ++i) {
                const F32* sums = scratch.sums + i * kQuad;
                _mm_storeu_ps(scratch.tile + i * kTaskOutputs + n, horizontal_sums(sums[0], sums[1], sums[2], sums[3]));
            }
        }
        if (p_.bias.data)
            dispatch_dtype(p_.bias.dtype, [&](auto* type) {
                const auto* bias = static_cast<const Pointee<decltype(type)>*>(p_.bias.data);
                widen_rows(bias + n0, 0, 1, outputs, nullptr, 0, scratch.bias, 0);
            });
        store_y(p_, scratch.tile, kTaskOutputs, 0, p_.m, n0, outputs, p_.bias.data ? scratch.bias : nullptr);
    }

    // sums[row of x][row of W] of all rows of x, of which there are kRows.
    template <int kRows>
    void multiply_direct(const uint8_t* const (&codes)[kQuad], const float* const (&absmax)[kQuad], F32* out) const {
        // A product waits for the one before it onto the same sums: the fewer sums, the more often they are split.
        constexpr int kTurns = kRows == 1 ? 2 : 1;
        F32 sums[kTurns][kRows][kQuad] = {};
        for (int64_t index = 0; index < weight_.combs(); ++index) {
            const U32* x = x_ + index * kCombVectors;
#pragma GCC unroll 4
            for (int j = 0; j < kQuad; ++j) {
                U32 decoded[kCombVectors];
                weight_.decode(codes[j], absmax[j], index, decoded);
#pragma GCC unroll 4
                for (int v = 0; v < kCombVectors; ++v)
#pragma GCC unroll 4
                    for (int i = 0; i < kRows; ++i) {
                        F32& sum = sums[v % kTurns][i][j];
                        sum = MultiplyBf16Pairs::add_product(sum, decoded[v], x[i * row_vectors() + v]);
                    }
            }
        }
        for (int i = 0; i < kRows; ++i)
            for (int j = 0; j < kQuad; ++j)
                out[i * kQuad + j] = kTurns == 1 ? sums[0][i][j] : sums[0][i][j] + sums[kTurns - 1][i][j];
    }

    void multiply_panels(const uint8_t* const (&codes)[kQuad], const float* const (&absmax)[kQuad],
                         const Scratch& scratch) const {
        for (int64_t first = 0; first < weight_.combs(); first += kCombedDepth) {
            const int64_t combs = min_of(kCombedDepth, weight_.combs() - first);
            for (int64_t index = 0; index < combs; ++index)
#pragma GCC unroll 4
                for (int j = 0; j < kQuad; ++j) {
                    U32 decoded[kCombVectors];
                    weight_.decode(codes[j], absmax[j], first + index, decoded);
#pragma GCC unroll 4
                    for (int v = 0; v < kCombVectors; ++v)
                        scratch.panel[(index * kCombVectors + v) * kQuad + j] = decoded[v];
                }
            for_each_group(p_.m, [&](int64_t row, auto count) {
                multiply_panel<decltype(count)::kValue>(x_ + row * row_vectors() + first * kCombVectors, scratch.panel,
                                                        combs * kCombVectors, first > 0, scratch.sums + row * kQuad);
            });
        }
    }

    template <int kRows>
    void multiply_panel(const U32* x, const U32* panel, int64_t steps, bool accumulate, F32* out) const {
        F32 sums[kRows][kQuad] = {};
        const U32* rows[kRows];
        for (int i = 0; i < kRows; ++i) rows[i] = x + i * row_vectors();
        for (int64_t step = 0; step < steps; ++step, panel += kQuad)
#pragma GCC unroll 6
            for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
                for (int j = 0; j < kQuad; ++j)
                    sums[i][j] = MultiplyBf16Pairs::add_product(sums[i][j], panel[j], rows[i][step]);
        for (int i = 0; i < kRows; ++i)
            for (int j = 0; j < kQuad; ++j, ++out) *out = accumulate ? *out + sums[i][j] : sums[i][j];
    }

    void add_branch(const int64_t (&rows)[kQuad], F32* sums) const {
        const float* s = s_;
        for (int a = 0; a < p_.num_adapters; ++a) {
            const LoraAdapter& adapter = p_.adapters[a];
            dispatch_dtype(adapter.lora_B.dtype, [&](auto* type) {
                using T = Pointee<decltype(type)>;
                for (int64_t r = 0; r < adapter.rank; r += kLanes, s += kLanes) {
                    F32 b[kQuad];
                    for (int j = 0; j < kQuad; ++j)
                        b[j] = load_some(static_cast<const T*>(row_of(adapter.lora_B, rows[j], r)), adapter.rank - r);
                    for (int64_t i = 0; i < p_.m; ++i)
                        for (int j = 0; j < kQuad; ++j)
                            sums[i * kQuad + j] = fma(b[j], load(s + i * ranks_), sums[i * kQuad + j]);
                }
            });
        }
    }

    const LoraLinearForwardParams& p_;
    const CombedWeight weight_;
    int64_t ranks_ = 0;  // each adapter's padded to whole vectors with zeros
    int64_t task_outputs_;
    U32* x_ = nullptr;    // [m][combs][kCombVectors]
    float* s_ = nullptr;  // [m][ranks], scaled
    KeptBits kept_{p_};
};

// Whether the calls' weight has blocks that combs are made of, and their rows are few.
inline bool suits_combs(const LoraLinearParams& params) {
    return params.m <= most_combed_rows(params.k) && params.compute_dtype == DType::kBFloat16 && params.weight &&
           has_aligned_blocks(*params.weight);
}

}  // namespace
}  // namespace PEFT_KERNELS_ISA
}  // namespace peft_kernels

#endif
