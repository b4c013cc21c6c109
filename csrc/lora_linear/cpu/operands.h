// What the CPU kernels of lora_linear multiply: strips of the 4-bit weight, of A and of B, and rows of x and dy.
// For sources that are compiled once per instruction set, and only for those.
#pragma once

#include "common/cpu/microkernel.h"
#include "common/cpu/nf4_decode.h"
#include "common/cpu/workspace.h"
#include "lora_linear/cpu/interleaving.h"
#include "lora_linear/cpu/plan.h"
#include "lora_linear/lora_linear.h"

namespace peft_kernels {
namespace PEFT_KERNELS_ISA {
namespace {

inline Dropout dropout_of(const LoraAdapter& adapter) {
    return {adapter.seed ? static_cast<uint64_t>(*adapter.seed) : 0, adapter.dropout};
}

// The dropout masks of a backward, made once of each row and read by dx and dA.
class KeptBits {
public:
    explicit KeptBits(const LoraLinearParams& params) : p_(params) {}

    void lay_out(Arena& arena) {
        int64_t dropping = 0;
        for (int a = 0; a < p_.num_adapters; ++a) dropping += drops(a);
        if (dropping > 0) bits_ = arena.take<uint8_t>(dropping * p_.m * stride());
    }
    bool any() const { return bits_ != nullptr; }
    int64_t stride() const { return keep_bytes(p_.k); }  // bytes from row to row

    // The bits of an adapter, from a row and a column (a multiple of 8) on; null where it drops nothing.
    uint8_t* at(int adapter, int64_t row, int64_t column) const {
        if (!drops(adapter)) return nullptr;
        int64_t index = 0;
        for (int a = 0; a < adapter; ++a) index += drops(a);
        return bits_ + (index * p_.m + row) * stride() + column / 8;
    }
    void make(int adapter, int64_t row, int64_t rows) const {
        if (!drops(adapter)) return;
        const Dropout dropout = dropout_of(p_.adapters[adapter]);
        for (int64_t i = 0; i < rows; ++i) dropout_keep_bits(dropout, row + i, 0, p_.k, at(adapter, row + i, 0));
    }

private:
    bool drops(int adapter) const { return dropout_of(p_.adapters[adapter]).threshold > 0; }

    const LoraLinearParams& p_;
    uint8_t* bits_ = nullptr;  // [dropping adapter][m][stride]
};

inline int64_t strips_for(int64_t outputs) { return ceil_div(outputs, kLanes); }

// ---- The base product's arithmetic --------------------------------------------------------------------------------

template <class Multiply>
constexpr int kStepElements = 1;
#if defined(__AVX512BF16__)
template <>
constexpr int kStepElements<MultiplyBf16Pairs> = 2;
#endif

// Calls body(type, multiply) with the element type that weights are decoded to and with how they are multiplied.
template <class Body>
void dispatch_compute(DType compute_dtype, DType weight_dtype, const Body& body) {
#if defined(__AVX512BF16__)
    if (compute_dtype == DType::kBFloat16) return body(static_cast<BFloat16*>(nullptr), MultiplyBf16Pairs{});
#endif
    const bool rounds_twice =
        weight_dtype != DType::kFloat32 && compute_dtype != DType::kFloat32 && weight_dtype != compute_dtype;
    dispatch_dtype(rounds_twice ? compute_dtype : DType::kFloat32, [&](auto* type) { body(type, MultiplyF32{}); });
}

// How many elements of the reduction are in a step.
inline int64_t step_elements(DType compute_dtype) {
    int64_t elements = 1;
    dispatch_compute(compute_dtype, DType::kFloat32,
                     [&](auto*, auto multiply) { elements = kStepElements<decltype(multiply)>; });
    return elements;
}

// The weight with the roundings to its own dtype and to compute_dtype made one where that changes nothing.
inline Nf4Weight rounded_once(const Nf4Weight& weight, DType compute_dtype) {
    Nf4Weight result = weight;
    if (weight.dtype == DType::kFloat32) result.dtype = compute_dtype;
    return result;
}

// Whether there is a weight to multiply with, 4-bit or dense.
inline bool has_weight(const LoraLinearParams& params) { return params.weight || params.dense; }

inline DType weight_dtype(const LoraLinearParams& params) {
    return params.weight ? params.weight->dtype : params.dense->dtype;
}

// Calls body with the weight as decode_strips takes it.
template <class Body>
void dispatch_weight(const LoraLinearParams& params, const Body& body) {
    if (params.weight)
        body(rounded_once(*params.weight, params.compute_dtype));
    else
        body(*params.dense);
}

// ---- Strips of the weight -----------------------------------------------------------------------------------------

// Elements [column, column + count) of a row of the weight.
template <class T>
void decode(const Nf4Weight& w, int64_t row, int64_t column, int64_t count, T* out) {
    decode_range<T, make_product_table<T>>(w, row * w.k + column, count, out);
}
template <class T>
void decode(const ConstMatrix& w, int64_t row, int64_t column, int64_t count, T* out) {
    dispatch_dtype(w.dtype, [&](auto* type) {
        const auto* from = static_cast<const Pointee<decltype(type)>*>(row_of(w, row, column));
        for (int64_t i = 0; i < count; i += kLanes) store_some(out + i, load_some(from + i, count - i), count - i);
    });
}

// The strips are decoded a cache line a row, and the rows are far apart: the hardware does not get ahead of that by
// itself (M = 32, 4096 x 4096: a third of the decoding was waiting).
inline void prefetch_codes(const Nf4Weight& w, int64_t element, int64_t bytes = 1) {
    for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(w.codes + element / 2 + byte);
}
inline void prefetch_weight(const Nf4Weight& w, int64_t row, int64_t column) { prefetch_codes(w, row * w.k + column); }
inline void prefetch_weight(const ConstMatrix& w, int64_t row, int64_t column) {
    __builtin_prefetch(row_of(w, row, column));
}

#if defined(__AVX512BF16__)
// decode_strips where a row is whole blocks. What is transposed is codes, eight to a word, and not elements, which take
// four times the room; these are looked up in fp32 then, so that 16 rows can share a table. A core of Zen 5 takes 4.9
// ns for 128 elements instead of 9.1, of which 1 for absmax.
template <DType kDtype>
inline void decode_strips_of_blocks(const Nf4Weight& w, int64_t n0, int64_t outputs, int64_t k0, int64_t count,
                                    uint32_t* strips) {
    const int64_t num_strips = strips_for(outputs), steps = count / 2, runs = count / kBlock;
    const __m512 values = _mm512_load_ps(codebook(w.quant_type));
    // Rows 0 to 7 twice, and rows 8 to 15: for both elements of a pair, of which the first is in the high nibble.
    const __m512i low_rows = _mm512_srli_epi32((__m512i)lane_index(), 1);
    const __m512i twice[2] = {low_rows, _mm512_add_epi32(low_rows, _mm512_set1_epi32(kLanes / 2))};
    const __m512i first_pair = _mm512_set1_epi64(4);
    alignas(64) float absmax[kLanes * 2 * kStripSteps / kBlock];  // [run][row]
    for (int64_t strip = 0; strip < num_strips; ++strip) {
        const auto row_at = [&](int64_t row) { return (n0 + min_of(strip * kLanes + row, outputs - 1)) * w.k + k0; };
        for (int64_t run = 0; run < runs; run += kLanes) {
            U32 of_rows[kLanes];
            for (int64_t row = 0; row < kLanes; ++row)
                runs_absmax(w, row_at(row) + run * kBlock, min_of<int64_t>(kLanes, runs - run),
                            (float*)(of_rows + row));
            transpose(of_rows);
            for (int i = 0; i < kLanes; ++i) store_vector(absmax + (run + i) * kLanes, of_rows[i]);
        }
        uint32_t* to = strip_at(strips, num_strips, steps, 0, strip);
        const int64_t stride = strip_at(strips, num_strips, steps, 1, strip) - to;
        for (int64_t run = 0; run < runs; run += 2) {
            const int64_t some = min_of<int64_t>(2, runs - run);
            U32 words[kLanes];
            for (int64_t row = 0; row < kLanes; ++row) {
                const uint8_t* codes = w.codes + (row_at(row) + run * kBlock) / 2;
                __builtin_prefetch(codes + kBlock);
                words[row] = (U32)_mm512_maskz_loadu_epi64(some == 2 ? 0xFF : 0xF, codes);
            }
            transpose(words);
            for (int64_t block = 0; block < some; ++block) {
                const __m512 of_rows = _mm512_load_ps(absmax + (run + block) * kLanes);
                const __m512 scales[2] = {_mm512_permutexvar_ps(twice[0], of_rows),
                                          _mm512_permutexvar_ps(twice[1], of_rows)};
                for (int64_t word = 0; word < kBlock / 8; ++word) {
                    const __m512i codes = (__m512i)words[block * kBlock / 8 + word];
                    const __m512i halves[2] = {_mm512_permutexvar_epi32(twice[0], codes),
                                               _mm512_permutexvar_epi32(twice[1], codes)};
#pragma GCC unroll 4
                    for (int pair = 0; pair < 4; ++pair, to += stride) {
                        const __m512i shift = _mm512_add_epi32(first_pair, _mm512_set1_epi32(8 * pair));
                        const auto half = [&](int i) {
                            const __m512i indices = _mm512_srlv_epi32(halves[i], shift);
                            return _mm512_mul_ps(_mm512_permutexvar_ps(indices, values), scales[i]);
                        };
                        store_vector(to, elements_of(kDtype, half(0), half(1)));
                    }
                }
            }
        }
    }
}
#endif

// Outputs are rows [n0, n0 + outputs) of W, the reduction runs over elements [k0, k0 + count) of each: the vectors
// that are decoded run along k, so they are transposed, kLanes rows at a time.
template <class T, int kElements, class Weight>
void decode_strips(const Weight& w, int64_t n0, int64_t outputs, int64_t k0, int64_t count, uint32_t* strips) {
#if defined(__AVX512BF16__)
    if constexpr (kElements == 2 && kSame<Weight, Nf4Weight>)
        if (has_aligned_blocks(w) && k0 % kBlock == 0 && count % kBlock == 0) {
            if (w.dtype == DType::kFloat16)
                return decode_strips_of_blocks<DType::kFloat16>(w, n0, outputs, k0, count, strips);
            return decode_strips_of_blocks<DType::kBFloat16>(w, n0, outputs, k0, count, strips);
        }
#endif
    constexpr int64_t kSpan = 2 * 64;  // elements decoded before they are transposed: the rows stay in L1
    const int64_t num_strips = strips_for(outputs), steps = ceil_div(count, kElements);
    T rows[kLanes][kSpan + 32];  // + 32: rows a power of two apart would share their cache sets
    for (int64_t strip = 0; strip < num_strips; ++strip) {
        const int64_t first = n0 + strip * kLanes, valid = min_of<int64_t>(kLanes, outputs - strip * kLanes);
        if (valid < kLanes) memset(rows, 0, sizeof rows);
        for (int64_t k = 0; k < count; k += kSpan) {
            const int64_t some = min_of(kSpan, count - k);
            for (int64_t row = 0; row < valid; ++row) {
                prefetch_weight(w, first + row, k0 + k + kSpan);
                decode(w, first + row, k0 + k, some, rows[row]);
                if (some % kElements) rows[row][some] = {};
            }
            for (int64_t element = 0; element < some; element += kLanes * kElements) {
                U32 square[kLanes];
                for (int row = 0; row < kLanes; ++row)
                    square[row] =
                        kElements == 2 ? load_vector<U32>(rows[row] + element) : (U32)load(rows[row] + element);
                transpose(square);
                const int64_t step = (k + element) / kElements;
                for (int i = 0; i < min_of<int64_t>(kLanes, steps - step); ++i)
                    store_vector(strip_at(strips, num_strips, steps, step + i, strip), square[i]);
            }
        }
    }
}

#if defined(__AVX512BF16__)
// The first steps of decode_strips_transposed, where pairs of rows can be looked up at once; returns their number.
inline int64_t decode_pairs_of_rows(const Nf4Weight& w, int64_t k0, int64_t outputs, int64_t n0, int64_t count,
                                    uint32_t* strips) {
    constexpr int64_t kAhead = 32;
    if (!has_aligned_blocks(w) || k0 % kBlock != 0 || outputs != kBlock) return 0;
    const __m512 values = _mm512_load_ps(codebook(w.quant_type));
    const __m512i odd_row = _mm512_set1_epi32(16 << 16);
    const auto absmax = [&](int64_t element) { return block_absmax(w.absmax, element >> w.log2_blocksize); };
    for (int64_t step = 0; step < count / 2; ++step, strips += kBlock) {
        const int64_t begin = (n0 + 2 * step) * w.k + k0;
        prefetch_codes(w, begin + kAhead * w.k);
        prefetch_codes(w, begin + (kAhead + 1) * w.k);
        const __m512i table = table_of_two(w.dtype, values, absmax(begin), absmax(begin + w.k));
        const uint8_t* first = w.codes + begin / 2;
        for (int64_t k = 0; k < kBlock; k += 32, first += 16) {
            __m512i low, high;
            lookup_pairs(table, odd_row, first, first + w.k / 2, low, high);
            store_vector(strips + k, low);
            store_vector(strips + k + kLanes, high);
        }
    }
    return count / 2;
}
inline int64_t decode_pairs_of_rows(const ConstMatrix&, int64_t, int64_t, int64_t, int64_t, uint32_t*) { return 0; }
#endif

// Outputs are columns [k0, k0 + outputs) of W, the reduction runs over its rows [n0, n0 + count).
template <class T, int kElements, class Weight>
void decode_strips_transposed(const Weight& w, int64_t k0, int64_t outputs, int64_t n0, int64_t count,
                              uint32_t* strips) {
    const int64_t num_strips = strips_for(outputs), steps = ceil_div(count, kElements);
    constexpr int64_t kAhead = 16;
    int64_t step = 0;
#if defined(__AVX512BF16__)
    if constexpr (kElements == 2) step = decode_pairs_of_rows(w, k0, outputs, n0, count, strips);
#endif
    T rows[kElements][kTaskOutputs] = {};
    for (; step < steps; ++step) {
        for (int e = 0; e < kElements; ++e) {
            const int64_t row = step * kElements + e;
            prefetch_weight(w, n0 + row + kAhead, k0);
            if (row < count)
                decode(w, n0 + row, k0, outputs, rows[e]);
            else
                memset(rows[e], 0, sizeof rows[e]);
        }
        for (int64_t strip = 0; strip < num_strips; ++strip) {
            U32 v;
            if constexpr (kElements == 2)
                v = __builtin_convertvector(load_vector<U16>(rows[0] + strip * kLanes), U32) |
                    __builtin_convertvector(load_vector<U16>(rows[1] + strip * kLanes), U32) << 16;
            else
                v = (U32)load(rows[0] + strip * kLanes);
            store_vector(strip_at(strips, num_strips, steps, step, strip), v);
        }
    }
}

// ---- Rows of the activation ---------------------------------------------------------------------------------------

// Whether the base product can read a matrix where it lies. An odd number of columns would leave half a pair.
inline bool reads_in_place(const ConstMatrix& matrix, int64_t columns, int64_t elements) {
    return elements == 2 ? matrix.dtype == DType::kBFloat16 && columns % 2 == 0 : matrix.dtype == DType::kFloat32;
}

inline Rows rows_of(const ConstMatrix& matrix, int64_t first_row) {
    return {row_of(matrix, first_row), matrix.stride * size_of(matrix.dtype), 4};
}

// One row, times `scale` [columns] if there is one, in 32-bit steps, padded with zeros to whole steps.
template <class T>
void convert_row(const T* x, const float* scale, int64_t columns, int64_t elements, uint32_t* out) {
    const auto convert = [&](auto* to) {
        for (int64_t column = 0; column < columns; column += kLanes) {
            const int64_t count = columns - column;
            F32 value = load_some(x + column, count);
            if (scale) value *= load_some(scale + column, count);
            store_some(to + column, value, count);
        }
    };
    if (elements == 1) return convert(reinterpret_cast<float*>(out));
    BFloat16* pairs = reinterpret_cast<BFloat16*>(out);
    convert(pairs);
    if (columns % 2) pairs[columns] = {};
}

// ---- Strips of A and B --------------------------------------------------------------------------------------------

// Strips of a part of A or B, times `scale`. Outputs are the matrix's rows, or its columns.
inline void adapter_strips(const ConstMatrix& matrix, int64_t rows, int64_t columns, bool outputs_are_rows, float scale,
                           uint32_t* strips) {
    dispatch_dtype(matrix.dtype, [&](auto* type) {
        const auto* data = static_cast<const Pointee<decltype(type)>*>(matrix.data);
        if (outputs_are_rows)
            strips_of_columns(data, matrix.stride, rows, columns, scale, strips);
        else
            strips_of_rows(data, matrix.stride, rows, columns, nullptr, 0, scale, strips);
    });
}

}  // namespace
}  // namespace PEFT_KERNELS_ISA
}  // namespace peft_kernels
