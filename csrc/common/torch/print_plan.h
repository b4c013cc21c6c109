// PEFT_KERNELS_PRINT_PLANS=1: which kernels a call runs, and how its work is divided, on the standard error.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <set>
#include <string>

namespace peft_kernels {

inline bool prints_plans() {
    const char* value = std::getenv("PEFT_KERNELS_PRINT_PLANS");
    return value && std::string(value) == "1";
}

// Each plan once; nothing for a family without one.
inline void print_plan(const std::string& plan) {
    if (plan.empty()) return;
    static std::mutex mutex;
    static std::set<std::string> printed;
    const std::lock_guard lock(mutex);
    if (printed.insert(plan).second) fprintf(stderr, "peft_kernels: %s\n", plan.c_str());
}

}  // namespace peft_kernels
