// Decode and middle shapes of lora_linear's forward, in bf16: up to 64 rows of x.
// For sources that are compiled once per instruction set, and only for those.
//
// Vectors run along k, in interleaved order (lora_linear/cpu/interleaving.h), so the weight is decoded without being
// transposed: 13 instructions for 128 weights, beside those for absmax. (Without vcvtne2ps2bf16 the tables take as long
// as that saves: 0.8-1.1 of the time with fp32 products, on AVX-512 and AVX2.) Every product has a vector of sums,
// which the LoRA branch is added to before its lanes are:
//
//                     x: up to kMostRows         up to kDirectRows rows of x: W goes from registers into the
//               ┌───┬───┬───┬───┐                products; more: a part of k of kPanelWeights rows (12 KB) is
//         k     │   │   │   │   │                decoded into L1, where every group of rows of x reads it
//    W: ┌───┐   ├───┼───┼───┼───┤
//       │   │   │ sums, a vector│
//       │   │   │ each          │
//       └───┘   └───┴───┴───┴───┘
//
// What bounds it, on a core of Zen 5 (cycles for 128 weights): one row 6 and 1 for absmax, where its instructions take
// 5.5 from registers; M rows 2 M for the products at two vdpbf16ps a cycle, 8 or 9 for the weight and its way through
// L1, and a tenth for sums and for x from L2. Lookups do not hide among products: 36 of these take 17.8 cycles, three
// decoded groups 13.6, and both of them, however mixed, 31. So decoding the next panel meanwhile gave nothing (M = 8
// and 32: 1.01-1.05 of the time).
#pragma once

#if defined(__AVX512BF16__)

#include "common/cpu/parallel_for.h"
#include "lora/cpu/dropout.h"
#include "lora_linear/lora_linear.h"
#include "matmul/cpu/epilogue.h"
#include "matmul/cpu/interleaving.h"
#include "matmul/cpu/operands.h"
#include "matmul/cpu/plan.h"

namespace peft_kernels {
namespace PEFT_KERNELS_ISA {
namespace {

constexpr int kQuad = 4;  // ranks of A that are multiplied at once

// Most rows of x that W is multiplied with from registers, four rows of it up to kWideRows, else two. Time of panels
// over this: M = 4 1.1, 5 1.13, 6 1.08; 8, whose sums leave too few registers, 0.98.
constexpr int kDirectRows = 6;
constexpr int kWideRows = 4;

// Rows of x and of W whose sums are in registers otherwise. 6 x 4 read more of x from L2: 1.03 of the time.
constexpr int kMostRows = 4;
constexpr int kPanelWeights = 6;
static_assert(kPanelWeights == kLeastInterleavedOutputs);
constexpr int64_t kInterleavedDepth = 8;  // groups of a panel

constexpr int64_t kInterleavedOutputs = 96;  // stored at a time
constexpr int64_t kAbsmaxRows = 16;          // whose absmax is made at a time: few, since memory is idle meanwhile

// 128 elements in natural order -> a group in interleaved order: vector j has elements j, j + 4, j + 8 ...
inline void interleave(const uint32_t* natural, U32* out) {
    const auto every_fourth = [](int first) {
        uint16_t lanes[32];  // of two vectors; what the upper half picks is not used
        for (int i = 0; i < 32; ++i) lanes[i] = (4 * i + first) % 64;
        return _mm512_loadu_si512(lanes);
    };
    const auto part = [&](int i) { return _mm512_loadu_si512(natural + i * kLanes); };
    for (int j = 0; j < kGroupVectors; ++j) {
        const __m512i index = every_fourth(j);
        const __m512i low = _mm512_permutex2var_epi16(part(0), index, part(1));
        const __m512i high = _mm512_permutex2var_epi16(part(2), index, part(3));
        out[j] = (U32)_mm512_inserti64x4(low, _mm512_castsi512_si256(high), 1);
    }
}

// A row of x, times `scale` [columns] if there is one, in interleaved order; zeros fill up the last group.
template <class T>
inline void interleave_row(const T* x, const float* scale, int64_t columns, U32* out) {
    for (int64_t column = 0; column < columns; column += kGroup, out += kGroupVectors) {
        alignas(64) uint32_t natural[kGroup / 2] = {};
        convert_row(x + column, scale ? scale + column : nullptr, min_of(kGroup, columns - column), 2, natural);
        interleave(natural, out);
    }
}

// The sums of four vectors' lanes, side by side. In a fixed order, so that every run gives the same bits.
inline __m128 horizontal_sums(F32 a, F32 b, F32 c, F32 d) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512 abcd = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))),
                                      _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// The same for kCount vectors: 2, 4 or 6.
template <int kCount>
inline void add_lanes(const F32* sums, float* out) {
    if constexpr (kCount >= 4) _mm_storeu_ps(out, horizontal_sums(sums[0], sums[1], sums[2], sums[3]));
    if constexpr (kCount % 4 == 2) {
        const F32 &a = sums[kCount - 2], &b = sums[kCount - 1];
        _mm_storel_pi(reinterpret_cast<__m64*>(out + kCount - 2), horizontal_sums(a, b, a, b));
    }
}

// Calls body(first, count as a constant) for rows in groups of nearly the same size, at most kMostRows.
template <class Body>
inline void for_each_group(int64_t rows, const Body& body) {
    for (int64_t row = 0, groups = ceil_div(rows, int64_t{kMostRows}); groups > 0; --groups) {
        const int64_t count = ceil_div(rows - row, groups);
        dispatch_range<1, kMostRows>(count, [&](auto constant) { body(row, constant); });
        row += count;
    }
}

class InterleavedForward {
public:
    explicit InterleavedForward(const LoraLinearForwardParams& params)
        : p_(params), weight_(rounded_once(*params.weight, params.compute_dtype), weights()) {
        for (int a = 0; a < p_.num_adapters; ++a) ranks_ += ceil_div(p_.adapters[a].rank, kLanes) * kLanes;
        // Tasks of at most a quarter of a million products and lookups, some five microseconds on one core; the first
        // lines of each come late. (The 210 layers of SmolLM2-135M, M = 1, from memory, two threads: 2.1 ms; with tasks
        // of half or twice the size 1.1 of that.) Decoding takes as long as four rows.
        const int64_t row_cost = max_of<int64_t>(1, p_.k * (4 + p_.m) / 5);
        const int64_t most = max_of(kInterleavedOutputs, (int64_t{1} << 18) / row_cost / kLanes * kLanes);
        const int64_t tasks = max_of<int64_t>(1, ceil_div(p_.n, most));  // of the same size
        task_outputs_ = ceil_div(ceil_div(p_.n, tasks), kLanes) * kLanes;
        const int64_t most_groups = direct() ? weight_.groups() : kInterleavedDepth;
        depth_ = ceil_div(weight_.groups(), max_of<int64_t>(1, ceil_div(weight_.groups(), most_groups)));
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
        const int64_t tasks = ceil_div(p_.n, task_outputs_);
        int64_t shrinks = prepare_s();
        if (tasks == 1)  // Waking a thread takes 3-5 us: 192 x 576, M = 1, from memory, 16.6 us instead of 18.8.
            while (shrinks > 0) make_s(--shrinks);
        Gate shrunk(shrinks);
        parallel_for_each(shrinks + tasks, [&](int64_t task, int worker) {
            if (task < shrinks) {
                make_s(task);
                return shrunk.arrive();
            }
            const Scratch scratch(workers + worker * worker_bytes, *this);
            const int64_t first = (task - shrinks) * task_outputs_, end = min_of(first + task_outputs_, p_.n);
            prefetch_codes(*p_.weight, first * p_.k, weight_.ahead());
            for (int64_t n = 0; n < rows_ahead(); ++n) prefetch_B(first + n);
            for (int64_t n = first; n < end; n += kInterleavedOutputs) {
                const int64_t outputs = min_of(kInterleavedOutputs, end - n);
                if (weight_.dtype() == DType::kFloat16)
                    make_y<DType::kFloat16>(n, outputs, scratch, shrunk);
                else
                    make_y<DType::kBFloat16>(n, outputs, scratch, shrunk);
            }
        });
    }

private:
    struct Scratch {  // of one worker
        Scratch(char* base, const InterleavedForward& f) {
            Arena arena(base);
            absmax = arena.take<float>(kInterleavedOutputs * f.weight_.runs());
            panel = arena.take<U32>(kInterleavedDepth * kGroupVectors * kPanelWeights);
            sums = arena.take<F32>(f.p_.m * kPanelWeights);
            tile = arena.take<float>(f.p_.m * kInterleavedOutputs);
            bias = arena.take<float>(kInterleavedOutputs);
            bytes = arena.used();
        }
        float* absmax;
        U32* panel;  // [group][vector][row of W]
        F32* sums;   // [row of x][row of W]
        float* tile;
        float* bias;
        int64_t bytes;
    };

    bool direct() const { return p_.m <= kDirectRows; }
    int weights() const { return p_.m <= kWideRows ? 4 : direct() ? 2 : kPanelWeights; }  // rows of W at a time

    // B is read as far ahead as the codes are.
    int64_t rows_ahead() const { return ceil_div(weight_.ahead(), p_.k / 2); }
    void prefetch_B(int64_t n) const {
        for (int a = 0; a < p_.num_adapters; ++a)
            __builtin_prefetch(row_of(p_.adapters[a].lora_B, min_of(n, p_.n - 1)));
    }

    int64_t row_vectors() const { return weight_.groups() * kGroupVectors; }
    void make_x() const {
        constexpr int64_t kRows = 8;  // a task's; waking a thread for fewer takes longer
        parallel_for_each(ceil_div(p_.m, kRows), [&](int64_t task, int) {
            dispatch_dtype(p_.x.dtype, [&](auto* type) {
                using T = Pointee<decltype(type)>;
                for (int64_t row = task * kRows; row < min_of((task + 1) * kRows, p_.m); ++row)
                    interleave_row(static_cast<const T*>(row_of(p_.x, row)), p_.scale_k, p_.k,
                                   x_ + row * row_vectors());
            });
        });
    }

    // What make_s needs; returns the number of its tasks.
    int64_t prepare_s() const {
        int64_t offset = 0, tasks = 0;
        for (int a = 0; a < p_.num_adapters; ++a) {
            const int64_t rank = p_.adapters[a].rank, padded = ceil_div(rank, int64_t{kLanes}) * kLanes;
            kept_.make(a, 0, p_.m);
            for (int64_t i = 0; i < p_.m; ++i)
                for (int64_t r = rank; r < padded; ++r) s_[i * ranks_ + offset + r] = 0;
            offset += padded;
            tasks += ceil_div(rank, task_ranks());
        }
        return tasks;
    }

    // Ranks of an adapter that make a task of at least 8k products.
    int64_t task_ranks() const {
        return max_of<int64_t>(1, (int64_t{1} << 13) / max_of<int64_t>(1, p_.k * p_.m * kQuad)) * kQuad;
    }

    // s = drop(x) Aᵀ / (1 - p), and what the branch multiplies with B, of some ranks.
    void make_s(int64_t task) const {
        int64_t offset = 0, rank = 0;
        int a = 0;
        for (; task >= ceil_div(p_.adapters[a].rank, task_ranks()); ++a) {
            task -= ceil_div(p_.adapters[a].rank, task_ranks());
            offset += ceil_div(p_.adapters[a].rank, int64_t{kLanes}) * kLanes;
            rank += p_.adapters[a].rank;
        }
        const LoraAdapter& adapter = p_.adapters[a];
        const uint8_t* keep = kept_.at(a, 0, 0);
        const int64_t end = min_of((task + 1) * task_ranks(), adapter.rank);
        dispatch_dtype(p_.x.dtype, [&](auto* x_type) {
            dispatch_dtype(adapter.lora_A.dtype, [&](auto* a_type) {
                for (int64_t r = task * task_ranks(); r < end; r += kQuad)
                    for (int64_t i = 0; i < p_.m;) {
                        const auto shrink = [&](auto rows) {
                            shrink_quad<Pointee<decltype(x_type)>, Pointee<decltype(a_type)>, decltype(rows)::kValue>(
                                adapter, keep, i, r, rank, offset);
                            i += decltype(rows)::kValue;
                        };
                        p_.m - i >= kQuad ? shrink(Constant<kQuad>{}) : shrink(Constant<1>{});
                    }
            });
        });
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
            for (int j = 0; j < kQuad; ++j) {
                // As with the codes, the quad is one run of memory.
                __builtin_prefetch(a[0] + kQuad * column + j * kLanes + InterleavedWeight::kAhead / sizeof(A));
                v[j] = load_some(a[j] + column, count);
            }
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

    // kDtype: float16 where W is rounded to it first.
    template <DType kDtype>
    void make_y(int64_t n, int64_t outputs, const Scratch& scratch, const Gate& shrunk) const {
        switch (weights()) {
            case 4: return make_y<kDtype, 4>(n, outputs, scratch, shrunk);
            case 2: return make_y<kDtype, 2>(n, outputs, scratch, shrunk);
            default: return make_y<kDtype, kPanelWeights>(n, outputs, scratch, shrunk);
        }
    }

    // y = x Wᵀ + b + scaling s Bᵀ, or y = scale_n ⊙ (x Wᵀ + b), for some outputs of all rows
    template <DType kDtype, int kWeights>
    void make_y(int64_t n0, int64_t outputs, const Scratch& scratch, const Gate& shrunk) const {
        // kWeights rows of W at a time, of which the last may begin with some that were multiplied before.
        const int64_t begin = min_of(n0, p_.n - kWeights), rows = n0 + outputs - begin;
        int64_t ready = 0;
        const auto make_absmax = [&](int64_t end) {
            for (; ready < min_of(end, rows); ready += kAbsmaxRows)
                weight_.absmax(begin + ready, min_of(kAbsmaxRows, rows - ready),
                               scratch.absmax + ready * weight_.runs());
        };
        const auto part_at = [&](int64_t row, int64_t first) {
            return Part{weight_.codes(begin + row), scratch.absmax + row * weight_.runs(), first,
                        min_of(first + depth_, weight_.groups()), min_of(first + depth_, weight_.whole_groups())};
        };
        make_absmax(kWeights);
        weight_.prefetch_absmax(begin + rows, kInterleavedOutputs);
        for (int64_t n = 0; n < rows; n += kWeights) {
            const int64_t row = min_of(n, rows - kWeights);
            make_absmax(n + 2 * kWeights);
            for (int64_t j = 0; j < kWeights; ++j) prefetch_B(begin + row + j + rows_ahead());
            if constexpr (kWeights == kPanelWeights)
                for (int64_t first = 0; first < weight_.groups(); first += depth_) {
                    const Part part = part_at(row, first);
                    decode_part<kDtype>(part, scratch.panel);
                    for_each_group(p_.m, [&](int64_t i, auto count) {
                        multiply_part<count.kValue>(x_ + i * row_vectors() + first * kGroupVectors, part, scratch.panel,
                                                    scratch.sums + i * kWeights);
                    });
                }
            else
                dispatch_range<kWeights == 4 ? 1 : kWideRows + 1, kWeights == 4 ? kWideRows : kDirectRows>(
                    p_.m, [&](auto count) {
                        multiply_direct<count.kValue, kWeights, kDtype>(part_at(row, 0), scratch.sums);
                    });
            shrunk.wait();
            add_branch<kWeights>(begin + row, scratch.sums);
            for (int64_t i = 0; i < p_.m; ++i)
                add_lanes<kWeights>(scratch.sums + i * kWeights, scratch.tile + i * kInterleavedOutputs + row);
        }
        store_y(p_, p_.scale_n, scratch.tile + n0 - begin, kInterleavedOutputs, 0, p_.m, n0, outputs,
                widen_bias(p_.bias, n0, outputs, scratch.bias));
    }

    // Groups [begin, end) of some rows of W, of which those before whole_end have both their runs.
    struct Part {
        const uint8_t* codes;
        const float* absmax;
        int64_t begin, end, whole_end;
    };

    // To panel[group][vector][row of W].
    template <DType kDtype>
    [[gnu::noinline]] void decode_part(const Part& part, U32* panel) const {
        const InterleavedWeight weight = weight_;
        const auto decode = [&](int64_t index, bool half) {
#pragma GCC unroll 6
            for (int j = 0; j < kPanelWeights; ++j) {
                weight.prefetch<kPanelWeights>(part.codes, index, j);
                const __m512i table = weight.table<kDtype>(part.absmax, index, j, half);
                const __m512i codes = weight.group(part.codes, index, j, half);
                U32* to = panel + (index - part.begin) * kGroupVectors * kPanelWeights + j;
#pragma GCC unroll 4
                for (int v = 0; v < kGroupVectors; ++v) to[v * kPanelWeights] = lookup_group(table, codes, v);
            }
        };
        for (int64_t index = part.begin; index < part.whole_end; ++index) decode(index, false);
        if (part.whole_end < part.end) decode(part.whole_end, true);
    }

    // sums[row of x][row of W] of all rows of x, of which there are kRows, and of all groups.
    template <int kRows, int kWeights, DType kDtype>
    [[gnu::noinline]] void multiply_direct(const Part& part, F32* out) const {
        // A product waits for the one before it onto the same sums: the fewer sums, the more often they are split.
        constexpr int kTurns = kRows == 1 ? 2 : 1;
        F32 sums[kTurns][kRows][kWeights] = {};
        const InterleavedWeight weight = weight_;
        const int64_t stride = row_vectors();
        const U32* x = x_ + part.begin * kGroupVectors;
        const uint8_t* codes = part.codes;
        const float* absmax = part.absmax;
        const auto multiply = [&](int64_t index, bool half) {
            __m512i tables[kWeights], groups[kWeights];
#pragma GCC unroll 4
            for (int j = 0; j < kWeights; ++j) {
                weight.prefetch<kWeights>(codes, index, j);
                tables[j] = weight.table<kDtype>(absmax, index, j, half);
                groups[j] = weight.group(codes, index, j, half);
            }
#pragma GCC unroll 4
            for (int v = 0; v < kGroupVectors; ++v, ++x) {
                U32 decoded[kWeights];
#pragma GCC unroll 4
                for (int j = 0; j < kWeights; ++j) decoded[j] = lookup_group(tables[j], groups[j], v);
#pragma GCC unroll 8
                for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
                    for (int j = 0; j < kWeights; ++j) {
                        F32& sum = sums[v % kTurns][i][j];
                        sum = MultiplyBf16Pairs::add_product(sum, decoded[j], x[i * stride]);
                    }
            }
        };
        int64_t index = part.begin;
        for (; index < part.whole_end; ++index) multiply(index, false);
        if (index < part.end) multiply(index, true);
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
            for (int j = 0; j < kWeights; ++j)
                out[i * kWeights + j] = kTurns == 1 ? sums[0][i][j] : sums[0][i][j] + sums[kTurns - 1][i][j];
    }

    // The sums of kRows rows of x and a part, whose panel is given.
    template <int kRows>
    [[gnu::noinline]] void multiply_part(const U32* x, const Part& part, const U32* panel, F32* out) const {
        F32 sums[kRows][kPanelWeights] = {};
        const int64_t stride = row_vectors(), steps = (part.end - part.begin) * kGroupVectors;
        for (int64_t step = 0; step < steps; ++step, ++x, panel += kPanelWeights)
#pragma GCC unroll 4
            for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 6
                for (int j = 0; j < kPanelWeights; ++j)
                    sums[i][j] = MultiplyBf16Pairs::add_product(sums[i][j], panel[j], x[i * stride]);
        const bool accumulate = part.begin > 0;
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 6
            for (int j = 0; j < kPanelWeights; ++j, ++out) *out = accumulate ? *out + sums[i][j] : sums[i][j];
    }

    template <int kWeights>
    void add_branch(int64_t n, F32* sums) const {
        const float* s = s_;
        for (int a = 0; a < p_.num_adapters; ++a) {
            const LoraAdapter& adapter = p_.adapters[a];
            dispatch_dtype(adapter.lora_B.dtype, [&](auto* type) {
                using T = Pointee<decltype(type)>;
                for (int64_t r = 0; r < adapter.rank; r += kLanes, s += kLanes) {
                    F32 b[kWeights];
                    for (int j = 0; j < kWeights; ++j)
                        b[j] = load_some(static_cast<const T*>(row_of(adapter.lora_B, n + j, r)), adapter.rank - r);
                    for (int64_t i = 0; i < p_.m; ++i)
                        for (int j = 0; j < kWeights; ++j)
                            sums[i * kWeights + j] = fma(b[j], load(s + i * ranks_), sums[i * kWeights + j]);
                }
            });
        }
    }

    const LoraLinearForwardParams& p_;
    const InterleavedWeight weight_;
    int64_t ranks_ = 0;  // each adapter's padded to whole vectors with zeros
    int64_t task_outputs_;
    int64_t depth_;       // groups decoded at a time
    U32* x_ = nullptr;    // [m][groups][kGroupVectors]
    float* s_ = nullptr;  // [m][ranks], scaled
    KeptBits kept_{p_, p_.m, p_.k};
};

}  // namespace
}  // namespace PEFT_KERNELS_ISA
}  // namespace peft_kernels

#endif
