#include "common/cpu/parallel_for.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <thread>

namespace peft_kernels {

int num_threads() { return static_cast<int>(torch::stable::get_num_threads()); }

void Gate::spin() const {
    // A thread that is late has most likely been descheduled, perhaps in favour of this one: so this one yields.
    constexpr int kTries = 1 << 12;
    for (int tries = 0; !is_open(); ++tries)
        if (tries >= kTries) std::this_thread::yield();
}

void parallel_for_each(int64_t tasks, ParallelBody body, void* context) {
    const int64_t threads = std::min<int64_t>(num_threads(), tasks);
    if (threads <= 1) {
        for (int64_t task = 0; task < tasks; ++task) body(task, 0, context);
        return;
    }
    std::atomic<int64_t> next{0};
    // Each thread gets one index of the outer range, which is its number.
    torch::stable::parallel_for(0, threads, 1, [&](int64_t worker, int64_t) {
        for (int64_t task = next++; task < tasks; task = next++) body(task, static_cast<int>(worker), context);
    });
}

}  // namespace peft_kernels
