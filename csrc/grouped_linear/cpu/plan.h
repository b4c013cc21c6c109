// How the experts of a mixture share the threads of a CPU: a pure function of their rows. lora_linear/cpu/plan.h then
// chooses the kernel of each expert.
//
//   experts at a time   one after the other, each on all threads       thread 0  ▏e0▕▏e1▕▏e2  ▕
//                       or each on one thread, in order of their rows   thread 1  ▏e0▕▏e1▕▏e2  ▕
//
// A product on all threads waits for its slowest one in each of its three steps, which takes as long as some rows do;
// so where there are many experts of nearly equal rows, each has a thread for itself.
#pragma once

#include <cstdint>
#include <string>

namespace peft_kernels {

struct GroupedLinearCpuProblem {
    int64_t experts;    // that have rows
    int64_t most_rows;  // of an expert
    int64_t rows;       // of all
    int threads;
};

// Whether each expert is multiplied by one thread. Experts are handed out one by one, the largest first: the last one
// to end is late by one expert's time at most.
static constexpr bool has_thread_for_each_expert(const GroupedLinearCpuProblem& p) {
    return p.threads > 1 && p.experts >= 4 * p.threads && p.most_rows * p.threads * 4 <= p.rows * 3;
}
static_assert(has_thread_for_each_expert({128, 30, 2048, 2}));
static_assert(!has_thread_for_each_expert({4, 512, 2048, 2}) && !has_thread_for_each_expert({8, 2041, 2048, 2}));

// One line, for PEFT_KERNELS_PRINT_PLANS.
inline std::string describe(const GroupedLinearCpuProblem& p, bool has_thread) {
    return "grouped_linear of " + std::to_string(p.experts) + " experts and " + std::to_string(p.rows) + " rows, " +
           std::to_string(p.most_rows) + " of one at most, on the CPU with " + std::to_string(p.threads) +
           (p.threads == 1 ? " thread: " : " threads: ") +
           (has_thread ? "a thread for each expert" : "one expert after the other");
}

}  // namespace peft_kernels
