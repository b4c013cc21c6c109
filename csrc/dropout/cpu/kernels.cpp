// The CPU kernel of dropout, compiled once per instruction set: y = keep(x) / (1 - p).
//
// The floor is its traffic, for 1024 x 768 in bf16 3 MB or 60 us, and what the generator takes, with AVX-512 0.09 ns an
// element or 70 us of one core. The bits of a part are used as soon as they are made, so that one hides the other.
#include "common/cpu/microkernel.h"
#include "common/cpu/parallel_for.h"
#include "common/cpu/workspace.h"
#include "dropout/dropout.h"

namespace peft_kernels {
namespace PEFT_KERNELS_ISA {
namespace {

constexpr int64_t kPart = kPhiloxVectors * 8 * kLanes;

template <class T>
inline void drop(const T* x, const uint8_t* bits, int64_t columns, float scale, T* y) {
    for (int64_t column = 0; column < columns; column += kLanes) {
        const int64_t count = columns - column;
        store_some(y + column, keep_where(load_some(x + column, count) * scale, bits, column), count);
    }
}

}  // namespace

void dropout(const DropoutParams& p) {
    const Dropout mask(static_cast<uint64_t>(*p.seed), p.p);
    dispatch_dtype(p.x.dtype, [&](auto* type) {
        using T = Pointee<decltype(type)>;
        parallel_for_each(ceil_div(p.count, kDropoutColumns), [&](int64_t row, int) {
            const T* const x = static_cast<const T*>(row_of(p.x, row));
            T* const y = static_cast<T*>(row_of(p.y, row));
            const int64_t columns = min_of(kDropoutColumns, p.count - row * kDropoutColumns);
            uint8_t bits[keep_bytes(kPart)];
            for (int64_t column = 0; column < columns; column += kPart) {
                const int64_t count = min_of(kPart, columns - column);
                dropout_keep_bits(mask, row, column, count, bits);
                drop(x + column, bits, count, mask.keep_scale, y + column);
            }
        });
    });
}

}  // namespace PEFT_KERNELS_ISA
}  // namespace peft_kernels
