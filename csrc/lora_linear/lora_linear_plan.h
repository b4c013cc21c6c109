// How a product with a frozen weight is cut into tasks on a CPU: a pure function of the shape.
#pragma once

#include <cstdint>
#include <cstdio>

namespace peft_kernels {

// Rows of the weight (or, for grad_x, columns) that one task decodes, and the most steps: 64 x 320 x 4 bytes = 80 KB,
// which stays in a 1 MB L2 cache beside the strips of the activation (48 rows x 320 steps x 4 bytes = 60 KB).
constexpr int64_t kPanelRows = 64;
constexpr int64_t kPanelSteps = 320;

// Blocks of equal length: a short last one would load and store its sums for little work.
inline int64_t panel_steps(int64_t steps) {
    const int64_t blocks = (steps + kPanelSteps - 1) / kPanelSteps;
    return blocks == 0 ? kPanelSteps : (steps + blocks - 1) / blocks;
}

struct LoraLinearPlan {
    bool dot;             // few rows: vectors run along the reduction, and nothing is packed
    int64_t chunk_rows;   // rows of the activation packed at a time
    int64_t task_strips;  // strips (of `lanes` rows) one task multiplies with one panel
};

// A product [m, reduction] x [reduction, outputs] on `threads` threads with vectors of `lanes` numbers.
inline LoraLinearPlan lora_linear_plan(int64_t m, int64_t outputs, int64_t reduction, int threads, int lanes) {
    LoraLinearPlan plan;
    plan.dot = m <= 8;
    // Bounds the packed activation to 64 MB.
    const int64_t fitting = (int64_t{16} << 20) / (reduction > 0 ? reduction : 1) / 64 * 64;
    plan.chunk_rows = fitting < 256 ? 256 : fitting > 4096 ? 4096 : fitting;
    // A task's accumulators ([strips][64][lanes] fp32) stay in L2 up to 528 rows; the more rows, the fewer times a
    // panel is decoded. Smaller tasks where there would be too few of them to keep every thread busy to the end.
    const int64_t rows = m < plan.chunk_rows ? m : plan.chunk_rows;
    const int64_t strips = (rows + lanes - 1) / lanes;
    const int64_t panels = (outputs + kPanelRows - 1) / kPanelRows;
    const int64_t blocks = (6 * threads + panels - 1) / (panels > 0 ? panels : 1);
    int64_t task_strips = (strips + blocks - 1) / (blocks > 0 ? blocks : 1);
    const int64_t least = 96 / lanes, most = 528 / lanes;
    task_strips = task_strips < least ? least : task_strips > most ? most : task_strips;
    plan.task_strips = (task_strips + 2) / 3 * 3;  // whole register tiles
    return plan;
}

inline int print(const LoraLinearPlan& plan, char* text, size_t size) {
    return plan.dot ? snprintf(text, size, "dot")
                    : snprintf(text, size, "panels chunk_rows=%lld task_strips=%lld",
                               static_cast<long long>(plan.chunk_rows), static_cast<long long>(plan.task_strips));
}

}  // namespace peft_kernels
