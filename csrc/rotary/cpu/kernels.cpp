// The CPU kernel of rotary, compiled once per instruction set. A task takes some positions with all of their heads, so
// that the angles of a position are converted once, and signed as its direction wants them:
//
//   out[i]     = x[i] cos[i] + x[h + i] signed[i]               forwards    signed = [-sin[: h], sin[h :]]
//   out[h + i] = x[h + i] cos[h + i] + x[i] signed[h + i]       backwards   signed = [sin[h :], -sin[: h]]
#include "common/cpu/parallel_for.h"
#include "common/cpu/rows.h"
#include "rotary/rotary.h"

namespace peft_kernels {
namespace PEFT_KERNELS_ISA {
namespace {

// Elements of a task, so many that a step of decoding is one, for which no thread has to be woken.
constexpr int64_t kTaskElements = 1 << 15;

template <class Pointer>
inline auto* row_at(Pointer* data, const auto& heads, int64_t batch, int64_t head, int64_t position) {
    return data + batch * heads.batch_stride + head * heads.head_stride + position * heads.row_stride;
}

struct Angles {  // of one position, in a worker's scratch
    Angles(char* base, int64_t channels) {
        Arena arena(base);
        cos = arena.take<float>(channels + kLanes);  // whole vectors are read from anywhere
        sin = arena.take<float>(channels + kLanes);
        bytes = arena.used();
    }

    void read(const RotaryParams& p, int64_t batch, int64_t position) const {
        const int64_t half = p.channels / 2;
        const auto read = [&](const ConstHeads& from, int64_t first, int64_t count, float* to) {
            read_row({from.data, from.dtype, 1}, batch * from.batch_stride + position * from.row_stride + first, 0,
                     count, to);
        };
        read(p.cos, 0, p.channels, cos);
        float* negated = p.backwards ? sin + half : sin;
        // In this order: whole vectors are written.
        read(p.sin, p.backwards ? half : 0, half, sin);
        read(p.sin, p.backwards ? 0 : half, half, sin + half);
        for (int64_t i = 0; i < half; ++i) negated[i] = -negated[i];
    }

    float *cos, *sin;
    int64_t bytes;
};

template <class In, class Out>
inline void rotate_row(const In* x, const Angles& angles, int64_t half, int64_t head_dim, Out* out) {
    const auto rotate = [&](int64_t i, int64_t count) {
        const int64_t j = half + i;
        const F32 a = load_some(x + i, count), b = load_some(x + j, count);
        store_some(out + i, fma(a, load(angles.cos + i), b * load(angles.sin + i)), count);
        store_some(out + j, fma(b, load(angles.cos + j), a * load(angles.sin + j)), count);
    };
    if (half < kLanes)
        rotate(0, half);
    else  // the last vectors overlap those before them
        for (int64_t i = 0; i < half; i += kLanes) rotate(min_of(i, half - kLanes), kLanes);
    for (int64_t i = 2 * half; i < head_dim; i += kLanes)
        store_some(out + i, load_some(x + i, head_dim - i), head_dim - i);
}

}  // namespace

void rotary(const RotaryParams& p) {
    const int64_t bytes = Angles(nullptr, p.channels).bytes;
    if (!p.workspace) {
        *p.workspace_bytes = bytes * p.threads;
        return;
    }
    const int64_t positions = p.batch * p.length;
    const int64_t elements = max_of<int64_t>(1, (p.parts[0].heads + p.parts[1].heads) * p.head_dim);
    const int64_t task_positions = max_of<int64_t>(1, kTaskElements / elements);
    parallel_for_each(ceil_div(positions, task_positions), [&](int64_t task, int worker) {
        const Angles angles(static_cast<char*>(p.workspace) + worker * bytes, p.channels);
        const int64_t end = min_of((task + 1) * task_positions, positions);
        dispatch_dtype(p.parts[0].in.dtype, [&](auto* in_type) {
            dispatch_dtype(p.parts[0].out.dtype, [&](auto* out_type) {
                using In = Pointee<decltype(in_type)>;
                using Out = Pointee<decltype(out_type)>;
                for (int64_t i = task * task_positions; i < end; ++i) {
                    const int64_t batch = i / p.length, position = i % p.length;
                    angles.read(p, batch, position);
                    for (const RotatedHeads& part : p.parts)
                        for (int64_t head = 0; head < part.heads; ++head)
                            rotate_row(row_at(static_cast<const In*>(part.in.data), part.in, batch, head, position),
                                       angles, p.channels / 2, p.head_dim,
                                       row_at(static_cast<Out*>(part.out.data), part.out, batch, head, position));
                }
            });
        });
    });
}

}  // namespace PEFT_KERNELS_ISA
}  // namespace peft_kernels
