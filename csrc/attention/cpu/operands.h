// The operands of attention's products: rows of a head are read as fp32, scaled and rotated on the way, and packed
// into the layouts of common/cpu/microkernel.h.
// For sources that are compiled once per instruction set, and only for those.
#pragma once

#include "attention/attention.h"
#include "common/cpu/multiply.h"
#include "common/cpu/vector_math.h"
#include "common/cpu/workspace.h"

namespace peft_kernels {
namespace PEFT_KERNELS_ISA {
namespace {

// Queries whose scores are made together: one group of strips, whose lanes they are.
constexpr int kQueries = kTileStrips * kLanes;

// ---- Arithmetic ---------------------------------------------------------------------------------------------------

// Every dimension of an operand is padded to a multiple of so many elements: of the vectors, and of two tiles. So many
// rows are packed at a time.
template <class Multiply>
constexpr int64_t kMultiple = kLanes * Multiply::kStepElements;
static_assert(kQueries % kMultiple<MultiplyF32> == 0);
#if defined(PEFT_KERNELS_BF16_PAIRS)
static_assert(kQueries % kMultiple<MultiplyBf16Pairs> == 0);
#endif

// Rows to be multiplied before work for the vector units takes its turn, where products are not such work themselves.
template <class Multiply>
constexpr int64_t kTurn = INT32_MAX;
#if defined(__AMX_BF16__)
template <>
constexpr int64_t kTurn<MultiplyTiles> = 2 * kTileSide;
#endif

// 2^x, as exact as the products are.
template <class Multiply>
inline F32 exp2_of(F32 x) {
    return exp2<Multiply::kStepElements == 1 ? 6 : 4>(x);
}

// sums [row][lane of a strip] (+)= rows · strips; a step of fp32 is one element, one of bf16 two.
//
// A sum of fewer fp32 products errs less: where at most 32 are added to one, results err no more than torch's.
template <class Multiply>
inline void multiply_block(const typename Multiply::Element* rows, int64_t row_stride, int64_t num_rows,
                           const uint32_t* strips, int64_t num_strips, int64_t steps, float* sums, int64_t stride,
                           bool accumulate) {
    constexpr int64_t kSize = sizeof(typename Multiply::Element), kPartSteps = kSize == 4 ? 32 : INT64_MAX;
    multiply<Multiply>({rows, row_stride * kSize, 4}, num_rows, strips, num_strips, steps, sums, stride, accumulate,
                       kPartSteps);
}

// ---- Rows of a head -----------------------------------------------------------------------------------------------

template <class View>
inline const char* head_of(const View& view, int64_t batch, int64_t head) {
    return static_cast<const char*>(view.data) +
           (batch * view.batch_stride + head * view.head_stride) * size_of(view.dtype);
}

// The angles of consecutive rows: cos and sin, [row][channels].
struct Angles {
    const float *cos = nullptr, *sin = nullptr;
    int64_t channels = 0;
};

inline Angles angles_of(const Rope& rope, int64_t batch, int64_t first_row) {
    if (!rope.cos) return {};
    const int64_t offset = batch * rope.batch_stride + first_row * rope.channels;
    return {rope.cos + offset, rope.sin + offset, rope.channels};
}

// Rotates a row by its angles; backwards, which is also the gradient's way, if wanted.
inline void rotate(const Angles& angles, int64_t row, bool backwards, float* x) {
    const int64_t half = angles.channels / 2;
    const float *cos = angles.cos + row * angles.channels, *sin = angles.sin + row * angles.channels;
    for (int64_t i = 0; i < half; ++i) {
        const float a = x[i], b = x[i + half];
        x[i] = a * cos[i] + (backwards ? b * sin[i + half] : -b * sin[i]);
        x[i + half] = b * cos[i + half] + (backwards ? -a * sin[i] : a * sin[i + half]);
    }
}

// How the rows of a head are read.
struct HeadRows {
    const char* data;
    DType dtype;
    int64_t row_stride, count, head_dim;
    const float *scale, *other_scale;  // [dim] each, or null
    Angles angles;

    // Rows [first, first + rows) as fp32, [row][dim]: zero behind head_dim and behind the last row.
    void fetch(int64_t first, int64_t rows, int64_t dim, float* out) const {
        const int64_t present = max_of<int64_t>(0, min_of(rows, count - first));
        dispatch_dtype(dtype, [&](auto* type) {
            using T = Pointee<decltype(type)>;
            // Rows are often far apart, as are the heads' in [B, S, H, D], and then not fetched ahead by the hardware.
            constexpr int64_t kAhead = 16;
            const T* from = reinterpret_cast<const T*>(data) + first * row_stride;
            for (int64_t row = 0; row < present; ++row, from += row_stride) {
                prefetch_row<false>(from + kAhead * row_stride, head_dim);
                fetch_row(from, first + row, dim, out + row * dim);
            }
        });
        if (present < rows) memset(out + present * dim, 0, (rows - present) * dim * sizeof(float));
    }

private:
    template <class T>
    void fetch_row(const T* from, int64_t row, int64_t dim, float* out) const {
        for (int64_t channel = 0; channel < dim; channel += kLanes) {
            const int64_t left = head_dim - channel;
            F32 v = left >= kLanes ? load(from + channel) : load_partial(from + channel, max_of<int64_t>(0, left));
            if (scale) v *= load(scale + channel);
            if (other_scale) v *= load(other_scale + channel);
            store(out + channel, v);
        }
        if (angles.cos) rotate(angles, row, false, out);
    }
};

// ---- Packing ------------------------------------------------------------------------------------------------------
// From kMultiple rows of fp32, [row][dim], at a time.

// Rows as they are: out [row][dim].
template <class Multiply>
inline void pack_rows(const float* x, int64_t dim, typename Multiply::Element* out) {
    constexpr int64_t kStep = kLanes * Multiply::kStepElements;
    for (int64_t i = 0; i < kMultiple<Multiply> * dim; i += kStep) store_vector(out + i, Multiply::steps_along(x + i));
}

// Strips whose lanes are the rows and whose steps run along them: one group of kTileStrips strips, of which these rows
// are the ones from first_row on.
template <class Multiply>
inline void pack_lanes(const float* x, int64_t dim, int64_t first_row, uint32_t* strips) {
    constexpr int64_t kStep = kLanes * Multiply::kStepElements;
    for (int64_t row = 0; row < kMultiple<Multiply>; row += kLanes)
        for (int64_t channel = 0; channel < dim; channel += kStep) {
            U32 square[kLanes];
            for (int lane = 0; lane < kLanes; ++lane)
                square[lane] = Multiply::steps_along(x + (row + lane) * dim + channel);
            transpose(square);
            const int64_t strip = (first_row + row) / kLanes;
            for (int64_t i = 0; i < kLanes; ++i) {
                const int64_t step = channel / Multiply::kStepElements + i;
                store_vector(strips + (step * kTileStrips + strip) * kLanes, square[i]);
            }
        }
}

// Strips whose steps are the rows and whose lanes run along them; there are `steps` in all, these from first_step on.
template <class Multiply>
inline void pack_steps(const float* x, int64_t dim, int64_t first_step, int64_t steps, uint32_t* strips) {
    for (int64_t step = 0; step < kMultiple<Multiply> / Multiply::kStepElements; ++step)
        for (int64_t strip = 0; strip < dim / kLanes; ++strip)
            store_vector(strip_at(strips, dim / kLanes, steps, first_step + step, strip),
                         Multiply::step_across(x + step * Multiply::kStepElements * dim + strip * kLanes, dim));
}

// The transpose of the rows: out [dim][stride].
template <class Multiply>
inline void pack_columns(const float* x, int64_t dim, typename Multiply::Element* out, int64_t stride) {
    for (int64_t channel = 0; channel < dim; channel += kLanes) {
        U32 square[kLanes];
        for (int64_t step = 0; step < kLanes; ++step)
            square[step] = Multiply::step_across(x + step * Multiply::kStepElements * dim + channel, dim);
        transpose(square);
        for (int64_t i = 0; i < kLanes; ++i) store_vector(out + (channel + i) * stride, square[i]);
    }
}

// ---- Results ------------------------------------------------------------------------------------------------------

// out [columns][out_stride] = the transpose of sums [rows][stride]; both are multiples of kLanes.
inline void transpose_sums(const float* sums, int64_t rows, int64_t columns, int64_t stride, float* out,
                           int64_t out_stride) {
    for (int64_t row = 0; row < rows; row += kLanes)
        for (int64_t column = 0; column < columns; column += kLanes) {
            U32 square[kLanes];
            for (int64_t i = 0; i < kLanes; ++i) square[i] = load_vector<U32>(sums + (row + i) * stride + column);
            transpose(square);
            for (int64_t i = 0; i < kLanes; ++i) store_vector(out + (column + i) * out_stride + row, square[i]);
        }
}

// Rounds rows [row][dim] into those of a head from first_row on.
inline void store_head_rows(const float* x, int64_t rows, int64_t dim, int64_t head_dim, const Heads& view,
                            int64_t batch, int64_t head, int64_t first_row) {
    dispatch_dtype(view.dtype, [&](auto* type) {
        using T = Pointee<decltype(type)>;
        T* out = reinterpret_cast<T*>(const_cast<char*>(head_of(view, batch, head))) + first_row * view.row_stride;
        store_rows<T>(x, dim, rows, head_dim, nullptr, nullptr, 0, out, view.row_stride);
    });
}

}  // namespace
}  // namespace PEFT_KERNELS_ISA
}  // namespace peft_kernels
