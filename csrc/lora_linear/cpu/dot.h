// Decode shapes of lora_linear: up to 8 rows of x, in fp32 up to 15. Vectors run along k; rows of W are decoded into
// registers, or a dense W is loaded into them (dense_dot.h), and multiplied with all rows of x at once, so the speed is
// that of reading W.
// For sources that are compiled once per instruction set, and only for those.
#pragma once

#include "common/cpu/parallel_for.h"
#include "common/cpu/partial_sums.h"
#include "lora/cpu/dropout.h"
#include "lora_linear/lora_linear.h"
#include "matmul/cpu/dense_dot.h"

namespace peft_kernels {
namespace PEFT_KERNELS_ISA {
namespace {

// Rows of W that are multiplied at once: 16 sums at most, and 4 at least, since each multiplication waits for the one
// before it in its sum. More rows of x than 8 do not stay in L1, and are read once for four of W.
template <int kM>
constexpr int kDotWeights = kM <= 2 || kM > kDotRows ? 4 : 2;

// total[row][i] = W[first_row + row] . x[i], lane by lane, for rows whose blocks begin with them. Of `part` elements,
// sums are apart.
template <class T, class Multiply, int kWeights, int kM>
void dot_rows(const Nf4Weight& w, int64_t first_row, const uint32_t* x, int64_t x_stride, int64_t part,
              F32 (&total)[kWeights][kM]) {
    constexpr int kElements = kStepElements<Multiply>;
    F32 sum[kWeights][kM] = {};
    int64_t left = part;
    constexpr int kUnit = max_of(Table<T>::kGroup, kLanes * kElements);  // elements decoded at a time
    constexpr int64_t kBlocks = 64;  // blocks whose statistics are decoded at a time
    const float* values = codebook(w.quant_type);
    const int64_t blocksize = int64_t{1} << w.log2_blocksize;
    const int64_t row_blocks = w.k >> w.log2_blocksize;
    const uint8_t* codes = w.codes + first_row * w.k / 2;
    for (int64_t block0 = 0; block0 < row_blocks; block0 += kBlocks) {
        const int64_t blocks = min_of(kBlocks, row_blocks - block0);
        float absmax[kWeights][kBlocks];
        for (int row = 0; row < kWeights; ++row)
            for (int64_t block = 0; block < blocks; ++block)
                absmax[row][block] = block_absmax(w.absmax, (first_row + row) * row_blocks + block0 + block);
        for (int64_t block = 0; block < blocks; ++block) {
            Table<T> table[kWeights];
#pragma GCC unroll 4
            for (int row = 0; row < kWeights; ++row) {
                // The next rows to come: each row is a stream of its own, too short for the hardware to get ahead.
                __builtin_prefetch(codes + (kWeights + row) * w.k / 2);
                table[row] = make_product_table<T>(values, absmax[row][block], w.dtype);
            }
            for (int64_t unit = 0; unit < blocksize; unit += kUnit, codes += kUnit / 2, x += kUnit / kElements) {
#pragma GCC unroll 4
                for (int row = 0; row < kWeights; ++row) {
                    T decoded[kUnit];
#pragma GCC unroll 16
                    for (int i = 0; i < kUnit; i += Table<T>::kGroup)
                        decode_group(table[row], codes + (row * w.k + i) / 2, decoded + i);
#pragma GCC unroll 4
                    for (int i = 0; i < kUnit; i += kLanes * kElements) {
                        U32 weights;
                        if constexpr (kElements == 2)
                            weights = load_vector<U32>(decoded + i);
                        else
                            weights = (U32)load(decoded + i);
#pragma GCC unroll 8
                        for (int m = 0; m < kM; ++m)
                            sum[row][m] = Multiply::add_product(sum[row][m], weights,
                                                                load_vector<U32>(x + m * x_stride + i / kElements));
                    }
                }
                if constexpr (kFewLanes)
                    if ((left -= kUnit) <= 0) {
                        add_part(sum, total);
                        left = part;
                    }
            }
        }
    }
    if constexpr (kFewLanes)
        add_part(sum, total);
    else
        memcpy(total, sum, sizeof sum);
}

// The same for any weight, in fp32: parts of its rows are decoded to a cache, and multiplied with a few of the `m` rows
// of x at a time.
template <int kWeights, int kM, class Weight>
void dot_parts(const Weight& w, int64_t first_row, int64_t k, const float* x, int64_t x_stride, int64_t m,
               F32 (&total)[kWeights][kM]) {
    constexpr int64_t kMost = 512;
    constexpr int kRowsOfX = min_of(kFewLanes ? 2 : 4, kM);  // with four rows of W as many sums as there are registers
    float decoded[kWeights][kMost];
    const int64_t part = min_of(dot_part(k), kMost);
    for (int64_t begin = 0; begin < k; begin += part) {
        const int64_t count = min_of(part, k - begin), whole = ceil_div(count, kLanes) * kLanes;
        for (int row = 0; row < kWeights; ++row) {
            prefetch_weight(w, first_row + kWeights + row, begin);
            decode(w, first_row + row, begin, count, decoded[row]);
            for (int64_t i = count; i < whole; ++i) decoded[row][i] = 0;
        }
        for (int64_t first = 0; first < m; first += kRowsOfX)
            dispatch_range<1, kRowsOfX>(min_of<int64_t>(kRowsOfX, m - first), [&](auto rows) {
                constexpr int kRows = decltype(rows)::kValue;
                F32 sum[kWeights][kRows] = {};
                const float* at = x + first * x_stride + begin;
                for (int64_t i = 0; i < whole; i += kLanes)
#pragma GCC unroll 4
                    for (int row = 0; row < kWeights; ++row) {
                        const F32 weights = load(decoded[row] + i);
#pragma GCC unroll 4
                        for (int j = 0; j < kRows; ++j)
                            sum[row][j] = fma(weights, load(at + j * x_stride + i), sum[row][j]);
                    }
                for (int row = 0; row < kWeights; ++row)
                    for (int j = 0; j < kRows; ++j) total[row][first + j] += sum[row][j];
            });
    }
}

// Whether the rows of W begin blocks of a 4-bit weight.
inline bool has_whole_blocks(const LoraLinearParams& params) {
    return params.weight && params.k % (int64_t{1} << params.weight->log2_blocksize) == 0;
}

template <int kM>
void forward_dot_rows(const LoraLinearForwardParams& p) {
    const bool is_dense = is_few_rows_of_dense(p);
    const int64_t elements = is_dense && !multiplies_dense_pairs(p) ? 1 : step_elements(p.compute_dtype);
    const int64_t steps = ceil_div(p.k, kLanes * elements) * kLanes;
    const int64_t padded_k = ceil_div(p.k, kLanes) * kLanes;
    int64_t ranks = 0;
    for (int a = 0; a < p.num_adapters; ++a) ranks += ceil_div(p.adapters[a].rank, kLanes) * kLanes;

    Arena arena(p.workspace);
    uint32_t* x_steps = arena.take<uint32_t>(kM * steps);
    float* x_wide = arena.take<float>(ranks > 0 ? kM * padded_k : 0);
    uint8_t* keep = arena.take<uint8_t>(kM * keep_bytes(p.k));
    float* s = arena.take<float>(kM * ranks);  // scaled, each adapter's part padded to whole vectors with zeros
    float* wide_B = arena.take<float>(p.threads * kDenseWeights * ranks);  // rows of B, padded as s is
    if (!p.workspace) {
        *p.workspace_bytes = arena.used();
        return;
    }

    // Zero where rows are shorter than whole vectors, and in rows that only fill up kM.
    memset(x_steps, 0, kM * steps * 4);
    if (ranks > 0) memset(x_wide, 0, kM * padded_k * 4);
    dispatch_dtype(p.x.dtype, [&](auto* type) {
        using T = Pointee<decltype(type)>;
        for (int64_t i = 0; i < p.m; ++i)
            convert_row(static_cast<const T*>(row_of(p.x, i)), p.scale_k, p.k, elements, x_steps + i * steps);
    });

    int64_t offset = 0, rank = 0;
    bool reusable = false;  // what x_wide holds suits an adapter without dropout
    for (int a = 0; a < p.num_adapters; ++a) {
        const LoraAdapter& adapter = p.adapters[a];
        const Dropout dropout = dropout_of(adapter);
        const bool drops = dropout.threshold > 0;
        for (int64_t i = 0; drops && i < p.m; ++i) dropout_keep_bits(dropout, i, 0, p.k, keep + i * keep_bytes(p.k));
        if (drops || !reusable)
            dispatch_dtype(p.x.dtype, [&](auto* type) {
                widen_rows(static_cast<const Pointee<decltype(type)>*>(p.x.data), p.x.stride, p.m, p.k,
                           drops ? keep : nullptr, keep_bytes(p.k), x_wide, padded_k);
            });
        reusable = !drops;
        // Tasks of about 32k products: waking a thread costs microseconds.
        const int64_t task_ranks = max_of<int64_t>(4, (int64_t{1} << 15) / max_of<int64_t>(1, p.k));
        parallel_for_each(ceil_div(adapter.rank, task_ranks), [&](int64_t task, int) {
            dispatch_dtype(adapter.lora_A.dtype, [&](auto* type) {
                using T = Pointee<decltype(type)>;
                for (int64_t r = task * task_ranks; r < min_of((task + 1) * task_ranks, adapter.rank); ++r) {
                    const T* row = static_cast<const T*>(row_of(adapter.lora_A, r));
                    F32 sum[kM] = {};
                    for (int64_t column = 0; column < p.k; column += kLanes) {
                        const int64_t count = p.k - column;
                        const F32 v = count >= kLanes ? load(row + column) : load_partial(row + column, count);
                        for (int i = 0; i < kM; ++i) sum[i] = fma(v, load(x_wide + i * padded_k + column), sum[i]);
                    }
                    for (int64_t i = 0; i < p.m; ++i) {
                        const float value = horizontal_sum(sum[i]) * dropout.keep_scale;
                        p.s[i * p.total_rank + rank + r] = value;
                        s[i * ranks + offset + r] = value * adapter.scaling;
                    }
                }
            });
        });
        const int64_t padded = ceil_div(adapter.rank, kLanes) * kLanes;
        for (int64_t i = 0; i < p.m; ++i)
            for (int64_t r = adapter.rank; r < padded; ++r) s[i * ranks + offset + r] = 0;
        offset += padded;
        rank += adapter.rank;
    }

    // Tasks of about 64k weights of 4 bits, or 128k dense ones: ten microseconds or more, well above what handing one
    // out costs.
    constexpr int kWeights = kDotWeights<kM>;
    const int64_t task_weights = int64_t{1} << (is_dense ? 17 : 16), least = task_weights / max_of<int64_t>(1, p.k);
    const int64_t task_rows = is_dense ? ceil_div(max_of<int64_t>(1, least), kDenseWeights) * kDenseWeights
                                       : max_of<int64_t>(1, least / kWeights) * kWeights;
    parallel_for_each(ceil_div(p.n, task_rows), [&](int64_t task, int worker) {
        const int64_t end = min_of(p.n, (task + 1) * task_rows);
        float* of_B = wide_B + worker * kDenseWeights * ranks;
        const auto widen_B = [&](int64_t n, int count) {
            float* out = of_B;
            for (int64_t row = n; row < n + count; ++row)
                for (int a = 0; a < p.num_adapters; ++a)
                    dispatch_dtype(p.adapters[a].lora_B.dtype, [&](auto* type) {
                        const auto* from =
                            static_cast<const Pointee<decltype(type)>*>(row_of(p.adapters[a].lora_B, row));
                        for (int64_t r = 0; r < p.adapters[a].rank; r += kLanes, out += kLanes)
                            store(out, load_some(from + r, p.adapters[a].rank - r));
                    });
        };
        // y of row i of x and of kCount outputs, from their sums
        const auto finish = [&](int64_t n, int64_t i, auto& sums) {
            constexpr int kCount = sizeof sums / sizeof sums[0];
            for (int64_t r = 0; r < ranks; r += kLanes) {
                const F32 of_s = load(s + i * ranks + r);
#pragma GCC unroll 4
                for (int j = 0; j < kCount; ++j) sums[j] = fma(load(of_B + j * ranks + r), of_s, sums[j]);
            }
            float y[kLanes] = {};
#pragma GCC unroll 4
            for (int j = 0; j < kCount; ++j) y[j] = horizontal_sum(sums[j]);
            F32 values = load(y);
            if (p.bias.data)
                dispatch_dtype(p.bias.dtype, [&](auto* type) {
                    values += load_partial(static_cast<const Pointee<decltype(type)>*>(p.bias.data) + n, kCount);
                });
            dispatch_dtype(p.y.dtype, [&](auto* type) {
                using T = Pointee<decltype(type)>;
                if (p.add.data) values += load_partial(static_cast<const T*>(row_of(p.add, i, n)), kCount);
                if (p.unscaled.data) store_partial(static_cast<T*>(row_of(p.unscaled, i, n)), values, kCount);
                if (p.scale_n) values *= load_partial(p.scale_n + n, kCount);
                store_partial(static_cast<T*>(row_of(p.y, i, n)), values, kCount);
            });
        };
        // kCount outputs at a time; the last ones one by one.
        const auto multiply = [&](auto outputs, const auto& dot) {
            constexpr int kCount = decltype(outputs)::kValue;
            int64_t n = task * task_rows;
            for (; n + kCount <= end; n += kCount) {
                widen_B(n, kCount);
                dot(n, outputs);
            }
            for (; n < end; ++n) {
                widen_B(n, 1);
                dot(n, Constant<1>{});
            }
        };
        // add(n, sums) adds to sums[output][row of x].
        const auto multiply_all_rows = [&](const auto& add) {
            multiply(Constant<kWeights>{}, [&](int64_t n, auto outputs) {
                constexpr int kCount = decltype(outputs)::kValue;
                F32 sums[kCount][kM] = {};
                add(n, sums);
                for (int64_t i = 0; i < p.m; ++i) {
                    F32 of_row[kCount];
                    for (int j = 0; j < kCount; ++j) of_row[j] = sums[j][i];
                    finish(n, i, of_row);
                }
            });
        };
        if (!has_weight(p)) return multiply_all_rows([](int64_t, auto&) {});
        if constexpr (kM <= kDotRows)
            if (is_dense)
                return dispatch_dense_arithmetic(p, [&](auto arithmetic) {
                    multiply(Constant<kDenseWeights>{}, [&](int64_t n, auto outputs) {
                        dot_dense<decltype(arithmetic), decltype(outputs)::kValue, kM>(*p.dense, n, p.k, x_steps, steps,
                                                                                       p.m, [&](int64_t i, auto& sums) {
                                                                                           finish(n, i, sums);
                                                                                       });
                    });
                });
        if (kM > kDotRows || !has_whole_blocks(p))
            return dispatch_weight(p, [&](const auto& weight) {
                multiply_all_rows([&](int64_t n, auto& sums) {
                    dot_parts(weight, n, p.k, reinterpret_cast<const float*>(x_steps), steps, p.m, sums);
                });
            });
        if constexpr (kM <= kDotRows)
            dispatch_compute(p.compute_dtype, p.weight->dtype, [&](auto* type, auto arithmetic) {
                const Nf4Weight weight = rounded_once(*p.weight, p.compute_dtype);
                const int64_t part = p.compute_dtype == DType::kFloat32 ? dot_part(p.k) : p.k;
                multiply_all_rows([&](int64_t n, auto& sums) {
                    dot_rows<Pointee<decltype(type)>, decltype(arithmetic)>(weight, n, x_steps, steps, part, sums);
                });
            });
    });
}

}  // namespace
}  // namespace PEFT_KERNELS_ISA
}  // namespace peft_kernels
