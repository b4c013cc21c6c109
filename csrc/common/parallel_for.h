// Threads for the CPU kernels, without torch in their headers.
// The body lives in parallel_for.cpp and uses torch's own pool: a second OpenMP runtime halves the speed.
#pragma once

#include <cstdint>

namespace peft_kernels {

using ParallelBody = void (*)(int64_t task, int worker, void* context);

// Runs body(task, worker, context) once for every task in [0, tasks). Tasks are handed out one by one, so a
// thread that the machine delays takes fewer of them; a result must not depend on which worker runs a task.
// `worker` is below num_threads() and names the calling thread's share of a workspace.
void parallel_for_each(int64_t tasks, ParallelBody body, void* context);

// How many threads parallel_for_each uses at most.
int num_threads();

template <class Body>
void parallel_for_each(int64_t tasks, const Body& body) {
    parallel_for_each(
        tasks, [](int64_t task, int worker, void* context) { (*static_cast<const Body*>(context))(task, worker); },
        const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace peft_kernels
