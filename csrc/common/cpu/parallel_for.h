// Threads for the CPU kernels, without torch in their headers.
// The body lives in common/cpu/parallel_for.cpp and uses torch's own pool: a second OpenMP runtime halves the speed.
#pragma once

#include <cstdint>

namespace peft_kernels {

using ParallelBody = void (*)(int64_t task, int worker, void* context);

// Runs body(task, worker, context) once for every task in [0, tasks). Tasks are handed out one by one, so a
// thread that the machine delays takes fewer of them; a result must not depend on which worker runs a task.
// `worker` is below num_threads() and names the calling thread's share of a workspace.
void parallel_for_each(int64_t tasks, ParallelBody body, void* context);

// Lets tasks of a parallel_for_each wait for earlier ones of it. These are running or done, as tasks are handed out in
// order. A second parallel_for_each instead would take a microsecond, and leave threads idle at the first one's end.
class Gate {
public:
    explicit Gate(int64_t arrivals) : left_(arrivals) {}
    void arrive() { __atomic_sub_fetch(&left_, 1, __ATOMIC_RELEASE); }
    void wait() const {
        if (!is_open()) spin();
    }

private:
    bool is_open() const { return __atomic_load_n(&left_, __ATOMIC_ACQUIRE) <= 0; }
    void spin() const;

    int64_t left_;
};

// How many threads parallel_for_each uses at most.
int num_threads();

template <class Body>
void parallel_for_each(int64_t tasks, const Body& body) {
    parallel_for_each(
        tasks, [](int64_t task, int worker, void* context) { (*static_cast<const Body*>(context))(task, worker); },
        const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace peft_kernels
