// The CPU kernels of lora_linear, compiled once per instruction set.
//
// Training shapes. With Wᵀ, A, B as panels and x, dy as strips (common/microkernel.h) every product is the same loop:
//
//   forward    s    = drop(x) Aᵀ                 strips of x         panel of A
//              y    = x Wᵀ + b + scaling s Bᵀ    strips of x, s      panels of W (decoded) and B, one set of sums
//   backward   ds   = scaling/(1-p) dy B         strips of dy        panel of Bᵀ
//              dx   = dy W + mask ⊙ (ds A)       strips of dy, ds    panels of Wᵀ (decoded) and Aᵀ
//              dA   = dsᵀ drop(x)                columns of x        panel of ds
//              dB   = scaling dyᵀ s              columns of dy       panel of s
//
// The base product runs in bf16 pairs where compute_dtype is bf16 and the processor multiplies them, else in fp32;
// the LoRA branch runs in fp32. Dropout's mask is made again in each of the three places that need it.
//
// Decode shapes (a few rows): vectors run along k, rows of W are decoded into L1 and multiplied with all rows of x.
#include "common/microkernel.h"
#include "common/parallel_for.h"
#include "lora_linear/lora_linear.h"
#include "lora_linear/lora_linear_plan.h"
#include "nf4/nf4_decode.h"

namespace peft_kernels {
namespace PEFT_KERNELS_ISA {
namespace {

// Hands out aligned parts of a workspace; with a null base it only counts.
class Arena {
public:
    explicit Arena(void* base) : base_(static_cast<char*>(base)) {}

    template <class T = uint32_t>
    T* take(int64_t count) {
        char* p = base_ ? base_ + used_ : nullptr;
        used_ += divide_up(count * static_cast<int64_t>(sizeof(T)), 64) * 64;
        return reinterpret_cast<T*>(p);
    }
    int64_t used() const { return used_; }

private:
    char* base_;
    int64_t used_ = 0;
};

int64_t padded_rank(const LoraAdapter& adapter) { return divide_up(adapter.rank, kGroup) * kGroup; }

int64_t padded_rank(const LoraLinearParams& p) {
    int64_t total = 0;
    for (int i = 0; i < p.num_adapters; ++i) total += padded_rank(p.adapters[i]);
    return total;
}

Dropout dropout_of(const LoraAdapter& adapter) {
    return {adapter.seed, static_cast<uint32_t>(adapter.dropout * 65536 + 0.5f), 1 / (1 - adapter.dropout)};
}

const void* row_of(const ConstMatrix& matrix, int64_t row, int64_t column = 0) {
    return static_cast<const char*>(matrix.data) + (row * matrix.stride + column) * size_of(matrix.dtype);
}

// Calls body(type, step type) with the element type that weights are decoded to and with how they are multiplied.
template <class Body>
void dispatch_compute(DType compute_dtype, const Body& body) {
#if defined(__AVX512BF16__)
    if (compute_dtype == DType::kBFloat16) return body(static_cast<BFloat16*>(nullptr), MultiplyBf16Pairs{});
#endif
    dispatch_dtype(compute_dtype, [&](auto* type) { body(type, MultiplyF32{}); });
}

template <class Multiply>
constexpr int kStepElements = 1;
#if defined(__AVX512BF16__)
template <>
constexpr int kStepElements<MultiplyBf16Pairs> = 2;
#endif

int64_t step_elements(DType compute_dtype) {
    int64_t elements = 1;
    dispatch_compute(compute_dtype, [&](auto*, auto multiply) { elements = kStepElements<decltype(multiply)>; });
    return elements;
}

// ---- Panels of the weight -----------------------------------------------------------------------------------------

// Rows [first_row, first_row + rows) of W, elements [first, first + count) of each, as a panel whose steps run along k.
template <class T, int kElements>
void decode_panel(const Nf4Weight& w, int64_t first_row, int64_t rows, int64_t first, int64_t count, uint32_t* panel) {
    const int64_t steps = divide_up(count, kElements);
    T buffer[kLanes][kPanelSteps * kElements + kLanes * kElements];
    for (int64_t row0 = 0; row0 < divide_up(rows, kGroup) * kGroup; row0 += kLanes) {
        for (int64_t i = 0; i < kLanes; ++i) {
            const int64_t row = row0 + i;
            if (row < rows) {
                decode_range(w, (first_row + row) * w.k + first, count, buffer[i]);
                memset(buffer[i] + count, 0, kLanes * kElements * sizeof(T));
            } else {
                memset(buffer[i], 0, sizeof buffer[i]);
            }
        }
        for (int64_t step = 0; step < steps; step += kLanes) {
            U32 block[kLanes];
            for (int i = 0; i < kLanes; ++i) {
                const T* p = buffer[i] + step * kElements;
                if constexpr (kElements == 2)
                    block[i] = load_pairs(p);
                else
                    block[i] = (U32)load(p);
            }
            transpose(block);
            for (int64_t j = 0; j < min_of<int64_t>(kLanes, steps - step); ++j)
                for (int part = 0; part < kLanes; part += kGroup) {
                    const int64_t row = row0 + part;
                    if (row < rows)
                        memcpy(panel + (row / kGroup * steps + step + j) * kGroup + row % kGroup,
                               reinterpret_cast<const uint32_t*>(&block[j]) + part,
                               4 * min_of(kGroup, kLanes));
                }
        }
    }
}

// Columns [first_column, first_column + columns) of W, rows [first, first + count), as a panel whose steps run along n.
template <class T, int kElements>
void decode_panel_transposed(const Nf4Weight& w, int64_t first_column, int64_t columns, int64_t first, int64_t count,
                             uint32_t* panel) {
    const int64_t steps = divide_up(count, kElements);
    T buffer[kElements][kPanelRows + kLanes] = {};
    for (int64_t step = 0; step < steps; ++step) {
        for (int e = 0; e < kElements; ++e) {
            const int64_t row = step * kElements + e;
            if (row < count)
                decode_range(w, (first + row) * w.k + first_column, columns, buffer[e]);
            else
                memset(buffer[e], 0, sizeof buffer[e]);
        }
        for (int64_t column = 0; column < columns; column += kLanes) {
            U32 v;
            if constexpr (kElements == 2)
                v = __builtin_convertvector(load_vector<U16>(buffer[0] + column), U32) |
                    __builtin_convertvector(load_vector<U16>(buffer[1] + column), U32) << 16;
            else
                v = (U32)load(buffer[0] + column);
            for (int part = 0; part < kLanes && column + part < columns; part += kGroup)
                memcpy(panel + ((column + part) / kGroup * steps + step) * kGroup + (column + part) % kGroup,
                       reinterpret_cast<const uint32_t*>(&v) + part, 4 * min_of(kGroup, kLanes));
        }
    }
}

// ---- The pieces of the branch -------------------------------------------------------------------------------------

// A panel of every adapter, side by side, with steps along the reduction of the shrink: Aᵢ [rank, k] or Bᵢᵀ [rank, n].
void shrink_panels(const LoraLinearParams& p, bool backward, uint32_t* panels) {
    const int64_t steps = backward ? p.n : p.k;
    for (int i = 0; i < p.num_adapters; ++i) {
        const LoraAdapter& adapter = p.adapters[i];
        if (backward)
            panel_of_transposed(adapter.lora_B, adapter.rank, steps, panels);
        else
            panel_of(adapter.lora_A, adapter.rank, steps, panels);
        panels += padded_rank(adapter) * steps;
    }
}

// tile[strip][padded rank][lane] = rows of x (dropped, not yet scaled) times the panels; `strips` is scratch.
template <class T>
void shrink(const LoraLinearParams& p, const ConstMatrix& x, int64_t columns, bool drop, int64_t first_row,
            int64_t num_strips, const uint32_t* panels, uint32_t* scratch, float* tile) {
    const int64_t ranks = padded_rank(p);
    for (int64_t column = 0; column < columns; column += kPanelSteps) {
        const int64_t steps = min_of(kPanelSteps, columns - column);
        const uint32_t* panel = panels;
        bool packed = false, dropped = false;
        int64_t offset = 0;
        for (int i = 0; i < p.num_adapters; ++i) {
            const LoraAdapter& adapter = p.adapters[i];
            const Dropout dropout = dropout_of(adapter);
            const bool drops = drop && dropout.threshold > 0;
            for (int64_t strip = 0; strip < num_strips; ++strip) {
                const int64_t row = first_row + strip * kLanes;
                uint32_t* out = scratch + strip * kPanelSteps * kLanes;
                if (!packed || dropped)
                    pack_strip<1>(static_cast<const T*>(row_of(x, row)), x.stride, p.m - row, column, column + steps,
                                  out);
                if (drops) drop_strip(dropout, row, column, steps, out);
            }
            packed = true;
            dropped = drops;
            // A panel holds all `columns` steps of a group, of which this block multiplies a part.
            for (int64_t row = 0; row < padded_rank(adapter); row += kGroup, panel += columns * kGroup)
                multiply_panel<MultiplyF32>(panel + column * kGroup, kGroup, scratch, kPanelSteps * kLanes, num_strips,
                                            steps, tile + (offset + row) * kLanes, ranks * kLanes, column > 0);
            offset += padded_rank(adapter);
        }
    }
}

void scale_tile(float* tile, int64_t rows, float factor) {
    for (int64_t row = 0; row < rows; ++row) store(tile + row * kLanes, load(tile + row * kLanes) * factor);
}

// gradᵢ [rank, columns] (transposed: [columns, rank]) = factor · Σ over rows of coefficients[row][rank] · x[row][column]
// for the columns [first, first + kColumns) and one adapter; coefficients come as a panel whose steps are rows.
constexpr int64_t kReduceRows = 256;

template <class T>
void reduce_rows(const ConstMatrix& x, int64_t m, int64_t total_columns, int64_t first, const uint32_t* coefficients,
                 int64_t rank, const Dropout* dropout, float factor, bool transposed, float* grad, uint32_t* scratch,
                 float* tile) {
    const int64_t columns = min_of<int64_t>(kColumns, total_columns - first);
    const int64_t num_strips = divide_up(columns, kLanes);
    const int64_t ranks = divide_up(rank, kGroup) * kGroup;
    for (int64_t row = 0; row < m; row += kReduceRows) {
        const int64_t rows = min_of(kReduceRows, m - row);
        pack_columns(static_cast<const T*>(row_of(x, row, first)), x.stride, row, rows, first, columns, dropout,
                     scratch);
        for (int64_t r = 0; r < ranks; r += kGroup)
            multiply_panel<MultiplyF32>(coefficients + (r * m) + row * kGroup, kGroup, scratch, rows * kLanes,
                                        num_strips, rows, tile + r * kLanes, ranks * kLanes, row > 0);
    }
    for (int64_t strip = 0; strip < num_strips; ++strip) {
        const int64_t column = first + strip * kLanes;
        const int64_t count = min_of<int64_t>(kLanes, total_columns - column);
        float* part = tile + strip * ranks * kLanes;
        if (transposed)
            store_tile<float>(part, rank, count, factor, nullptr, nullptr, 0, grad + column * rank, rank);
        else
            for (int64_t r = 0; r < rank; ++r)
                store_partial(grad + r * total_columns + column, load(part + r * kLanes) * factor, count);
    }
}

// ---- Training shapes ----------------------------------------------------------------------------------------------

void forward_panels(const LoraLinearForwardParams& p, const LoraLinearPlan& plan) {
    const int64_t elements = step_elements(p.compute_dtype);
    const int64_t steps = divide_up(p.k, elements);
    const int64_t ranks = padded_rank(p);
    const int64_t chunk = min_of(plan.chunk_rows, divide_up(p.m, kLanes) * kLanes);
    const int64_t chunk_strips = chunk / kLanes;

    Arena arena(p.workspace);
    uint32_t* panel_A = arena.take(ranks * p.k);
    uint32_t* strips = arena.take(p.weight ? chunk_strips * steps * kLanes : 0);
    float* strips_s = arena.take<float>(chunk_strips * ranks * kLanes);
    const int64_t worker_panel = max_of(kPanelRows * kPanelSteps, kTileStrips * kPanelSteps * kLanes);
    const int64_t worker_words = worker_panel + kPanelRows * (ranks + 1) + plan.task_strips * kPanelRows * kLanes;
    uint32_t* workers = arena.take(p.threads * worker_words);
    if (!p.workspace) {
        *p.workspace_bytes = arena.used();
        return;
    }

    shrink_panels(p, false, panel_A);
    for (int64_t first = 0; first < p.m; first += chunk) {
        const int64_t rows = min_of(chunk, p.m - first);
        const int64_t num_strips = divide_up(rows, kLanes);

        // x is read here alone: into the strips of the base product, and into s.
        parallel_for_each(divide_up(num_strips, kTileStrips), [&](int64_t task, int worker) {
            const int64_t strip0 = task * kTileStrips;
            const int64_t count = min_of<int64_t>(kTileStrips, num_strips - strip0);
            dispatch_dtype(p.x.dtype, [&](auto* type) {
                using T = Pointee<decltype(type)>;
                const int64_t row0 = first + strip0 * kLanes;
                if (p.weight)
                    for (int64_t i = 0; i < count; ++i) {
                        const int64_t row = row0 + i * kLanes;
                        const T* source = static_cast<const T*>(row_of(p.x, row));
                        uint32_t* out = strips + (strip0 + i) * steps * kLanes;
                        if (elements == 2)
                            pack_strip<2>(source, p.x.stride, p.m - row, 0, p.k, out);
                        else
                            pack_strip<1>(source, p.x.stride, p.m - row, 0, p.k, out);
                    }
                if (ranks == 0) return;
                float* tile = strips_s + strip0 * ranks * kLanes;
                shrink<T>(p, p.x, p.k, true, row0, count, panel_A, workers + worker * worker_words, tile);
                for (int64_t i = 0; i < count; ++i) {
                    const int64_t row = row0 + i * kLanes;
                    float* part = tile + i * ranks * kLanes;
                    float* s = p.s + row * p.total_rank;
                    for (int a = 0; a < p.num_adapters; ++a) {
                        const LoraAdapter& adapter = p.adapters[a];
                        scale_tile(part, adapter.rank, dropout_of(adapter).keep_scale);
                        store_tile<float>(part, adapter.rank, min_of<int64_t>(kLanes, p.m - row), 1.0f, nullptr,
                                          nullptr, 0, s, p.total_rank);
                        scale_tile(part, adapter.rank, adapter.scaling);
                        part += padded_rank(adapter) * kLanes;
                        s += adapter.rank;
                    }
                }
            });
        });

        const int64_t panels = divide_up(p.n, kPanelRows);
        const int64_t blocks = divide_up(num_strips, plan.task_strips);
        parallel_for_each(panels * blocks, [&](int64_t task, int worker) {
            const int64_t n0 = task / blocks * kPanelRows;
            const int64_t outputs = min_of(kPanelRows, p.n - n0);
            const int64_t strip0 = task % blocks * plan.task_strips;
            const int64_t count = min_of(plan.task_strips, num_strips - strip0);
            uint32_t* panel = workers + worker * worker_words;
            uint32_t* panel_B = panel + worker_panel;
            float* bias = reinterpret_cast<float*>(panel_B + kPanelRows * ranks);
            float* tile = bias + kPanelRows;
            const int64_t tile_stride = kPanelRows * kLanes;

            if (p.weight)
                dispatch_compute(p.compute_dtype, [&](auto* type, auto multiply) {
                    using T = Pointee<decltype(type)>;
                    using Multiply = decltype(multiply);
                    constexpr int kElements = kStepElements<Multiply>;
                    for (int64_t step = 0; step < steps; step += kPanelSteps) {
                        const int64_t block = min_of(kPanelSteps, steps - step);
                        const int64_t k0 = step * kElements;
                        decode_panel<T, kElements>(*p.weight, n0, outputs, k0,
                                                   min_of(kPanelSteps * kElements, p.k - k0), panel);
                        multiply_panel<Multiply>(panel, outputs, strips + (strip0 * steps + step) * kLanes,
                                                 steps * kLanes, count, block, tile, tile_stride, step > 0);
                    }
                });
            int64_t offset = 0;
            for (int a = 0; a < p.num_adapters; ++a) {
                const LoraAdapter& adapter = p.adapters[a];
                const ConstMatrix part = {row_of(adapter.lora_B, n0), adapter.lora_B.dtype, adapter.lora_B.stride};
                panel_of(part, outputs, adapter.rank, panel_B);
                multiply_panel<MultiplyF32>(panel_B, outputs, reinterpret_cast<uint32_t*>(strips_s) +
                                                (strip0 * ranks + offset) * kLanes,
                                            ranks * kLanes, count, adapter.rank, tile, tile_stride,
                                            p.weight || a > 0);
                offset += padded_rank(adapter);
            }
            if (p.bias.data)
                dispatch_dtype(p.bias.dtype, [&](auto* type) {
                    const auto* b = static_cast<const Pointee<decltype(type)>*>(p.bias.data);
                    for (int64_t i = 0; i < outputs; ++i) bias[i] = to_float(b[n0 + i]);
                });
            dispatch_dtype(p.y.dtype, [&](auto* type) {
                using T = Pointee<decltype(type)>;
                for (int64_t i = 0; i < count; ++i) {
                    const int64_t row = first + (strip0 + i) * kLanes;
                    const T* add = p.add.data ? static_cast<const T*>(row_of(p.add, row, n0)) : nullptr;
                    store_tile<T>(tile + i * tile_stride, outputs, min_of<int64_t>(kLanes, p.m - row), 1.0f,
                                  p.bias.data ? bias : nullptr, add, p.add.stride,
                                  static_cast<T*>(p.y.data) + row * p.y.stride + n0, p.y.stride);
                }
            });
        });
    }
}

void backward_panels(const LoraLinearBackwardParams& p, const LoraLinearPlan& plan) {
    const int64_t elements = step_elements(p.compute_dtype);
    const int64_t steps = divide_up(p.n, elements);
    const int64_t ranks = padded_rank(p);
    const int64_t total_strips = divide_up(p.m, kLanes);
    const int64_t chunk = min_of(plan.chunk_rows, total_strips * kLanes);
    const int64_t chunk_strips = chunk / kLanes;
    bool wants_A = false, wants_B = false;
    for (int a = 0; a < p.num_adapters; ++a) {
        wants_A |= p.adapters[a].grad_A != nullptr;
        wants_B |= p.adapters[a].grad_B != nullptr;
    }
    const bool wants_x = p.grad_x.data != nullptr;
    const bool wants_ds = ranks > 0 && (wants_A || wants_x);

    Arena arena(p.workspace);
    uint32_t* panel_B = arena.take(wants_ds ? ranks * p.n : 0);
    uint32_t* strips = arena.take(p.weight && wants_x ? chunk_strips * steps * kLanes : 0);
    float* strips_ds = arena.take<float>(wants_ds ? total_strips * ranks * kLanes : 0);
    uint32_t* panel_ds = arena.take(wants_A ? ranks * p.m : 0);
    uint32_t* panel_s = arena.take(wants_B ? ranks * p.m : 0);
    const int64_t worker_panel = max_of(max_of(kPanelRows * kPanelSteps, kTileStrips * kPanelSteps * kLanes),
                                        kReduceRows * kColumns);
    const int64_t worker_tile = max_of(plan.task_strips * kPanelRows * kLanes, ranks * kColumns);
    const int64_t worker_words = worker_panel + kPanelRows * ranks + worker_tile + kPanelRows * kTileStrips * kLanes;
    uint32_t* workers = arena.take(p.threads * worker_words);
    if (!p.workspace) {
        *p.workspace_bytes = arena.used();
        return;
    }

    if (wants_ds) shrink_panels(p, true, panel_B);
    for (int64_t first = 0; first < p.m && (wants_x || wants_ds); first += chunk) {
        const int64_t rows = min_of(chunk, p.m - first);
        const int64_t num_strips = divide_up(rows, kLanes);
        const int64_t first_strip = first / kLanes;

        parallel_for_each(divide_up(num_strips, kTileStrips), [&](int64_t task, int worker) {
            const int64_t strip0 = task * kTileStrips;
            const int64_t count = min_of<int64_t>(kTileStrips, num_strips - strip0);
            dispatch_dtype(p.grad_y.dtype, [&](auto* type) {
                using T = Pointee<decltype(type)>;
                const int64_t row0 = first + strip0 * kLanes;
                if (p.weight && wants_x)
                    for (int64_t i = 0; i < count; ++i) {
                        const int64_t row = row0 + i * kLanes;
                        const T* source = static_cast<const T*>(row_of(p.grad_y, row));
                        uint32_t* out = strips + (strip0 + i) * steps * kLanes;
                        if (elements == 2)
                            pack_strip<2>(source, p.grad_y.stride, p.m - row, 0, p.n, out);
                        else
                            pack_strip<1>(source, p.grad_y.stride, p.m - row, 0, p.n, out);
                    }
                if (!wants_ds) return;
                float* tile = strips_ds + (first_strip + strip0) * ranks * kLanes;
                shrink<T>(p, p.grad_y, p.n, false, row0, count, panel_B, workers + worker * worker_words, tile);
                for (int64_t i = 0; i < count; ++i) {
                    float* part = tile + i * ranks * kLanes;
                    const int64_t row = row0 + i * kLanes;
                    int64_t offset = 0;
                    for (int a = 0; a < p.num_adapters; ++a) {
                        const LoraAdapter& adapter = p.adapters[a];
                        const int64_t padded = padded_rank(adapter);
                        scale_tile(part, padded, adapter.scaling * dropout_of(adapter).keep_scale);
                        // ds once more, as coefficients of dA: [group][row of x][8].
                        for (int64_t r = 0; wants_A && r < padded; r += kGroup)
                            store_tile<float>(part + r * kLanes, kGroup, min_of<int64_t>(kLanes, p.m - row), 1.0f,
                                              nullptr, nullptr, 0,
                                              reinterpret_cast<float*>(panel_ds) + (offset + r) * p.m + row * kGroup,
                                              kGroup);
                        part += padded * kLanes;
                        offset += padded;
                    }
                }
            });
        });

        if (!wants_x) continue;
        const int64_t panels = divide_up(p.k, kPanelRows);
        const int64_t blocks = divide_up(num_strips, plan.task_strips);
        parallel_for_each(panels * blocks, [&](int64_t task, int worker) {
            const int64_t k0 = task / blocks * kPanelRows;
            const int64_t outputs = min_of(kPanelRows, p.k - k0);
            const int64_t strip0 = task % blocks * plan.task_strips;
            const int64_t count = min_of(plan.task_strips, num_strips - strip0);
            uint32_t* panel = workers + worker * worker_words;
            uint32_t* panel_A = panel + worker_panel;
            float* tile = reinterpret_cast<float*>(panel_A + kPanelRows * ranks);
            float* branch = tile + worker_tile;
            const int64_t tile_stride = kPanelRows * kLanes;

            if (p.weight)
                dispatch_compute(p.compute_dtype, [&](auto* type, auto multiply) {
                    using T = Pointee<decltype(type)>;
                    using Multiply = decltype(multiply);
                    constexpr int kElements = kStepElements<Multiply>;
                    for (int64_t step = 0; step < steps; step += kPanelSteps) {
                        const int64_t block = min_of(kPanelSteps, steps - step);
                        const int64_t n0 = step * kElements;
                        decode_panel_transposed<T, kElements>(*p.weight, k0, outputs, n0,
                                                              min_of(kPanelSteps * kElements, p.n - n0), panel);
                        multiply_panel<Multiply>(panel, outputs, strips + (strip0 * steps + step) * kLanes,
                                                 steps * kLanes, count, block, tile, tile_stride, step > 0);
                    }
                });
            bool started = p.weight != nullptr;
            int64_t offset = 0;
            for (int a = 0; a < p.num_adapters; ++a) {
                const LoraAdapter& adapter = p.adapters[a];
                const Dropout dropout = dropout_of(adapter);
                const ConstMatrix part = {row_of(adapter.lora_A, 0, k0), adapter.lora_A.dtype, adapter.lora_A.stride};
                panel_of_transposed(part, outputs, adapter.rank, panel_A);
                const uint32_t* ds = reinterpret_cast<uint32_t*>(strips_ds) +
                                     ((first_strip + strip0) * ranks + offset) * kLanes;
                offset += padded_rank(adapter);
                if (dropout.threshold == 0) {
                    multiply_panel<MultiplyF32>(panel_A, outputs, ds, ranks * kLanes, count, adapter.rank, tile,
                                                tile_stride, started);
                    started = true;
                    continue;
                }
                for (int64_t strip = 0; strip < count; strip += kTileStrips) {
                    const int64_t some = min_of<int64_t>(kTileStrips, count - strip);
                    multiply_panel<MultiplyF32>(panel_A, outputs, ds + strip * ranks * kLanes, ranks * kLanes, some,
                                                adapter.rank, branch, tile_stride, false);
                    for (int64_t i = 0; i < some; ++i) {
                        float* sum = tile + (strip + i) * tile_stride;
                        const float* dropped = branch + i * tile_stride;
                        for (int64_t column = 0; column < outputs; column += kGroup) {
                            I32 keep[8];
                            dropout_keep_rows(dropout, first + (strip0 + strip + i) * kLanes, (k0 + column) / 8, keep);
                            for (int j = 0; j < kGroup; ++j) {
                                const F32 kept = (F32)(load_vector<U32>(dropped + (column + j) * kLanes) & (U32)keep[j]);
                                float* at = sum + (column + j) * kLanes;
                                store(at, started ? load(at) + kept : kept);
                            }
                        }
                    }
                }
                started = true;
            }
            dispatch_dtype(p.grad_x.dtype, [&](auto* type) {
                using T = Pointee<decltype(type)>;
                for (int64_t i = 0; i < count; ++i) {
                    const int64_t row = first + (strip0 + i) * kLanes;
                    const T* add = p.add.data ? static_cast<const T*>(row_of(p.add, row, k0)) : nullptr;
                    store_tile<T>(tile + i * tile_stride, outputs, min_of<int64_t>(kLanes, p.m - row), 1.0f, nullptr,
                                  add, p.add.stride, static_cast<T*>(p.grad_x.data) + row * p.grad_x.stride + k0,
                                  p.grad_x.stride);
                }
            });
        });
    }

    // dA reads x once, dB reads dy once; each task owns kColumns of their columns.
    if (wants_B) {
        int64_t offset = 0, rank = 0;
        for (int a = 0; a < p.num_adapters; ++a) {
            const LoraAdapter& adapter = p.adapters[a];
            panel_of_transposed({p.s + rank, DType::kFloat32, p.total_rank}, adapter.rank, p.m,
                                panel_s + offset * p.m);
            offset += padded_rank(adapter);
            rank += adapter.rank;
        }
    }
    const int64_t tasks_A = wants_A ? divide_up(p.k, kColumns) : 0;
    const int64_t tasks_B = wants_B ? divide_up(p.n, kColumns) : 0;
    parallel_for_each(tasks_A + tasks_B, [&](int64_t task, int worker) {
        const bool of_A = task < tasks_A;
        const ConstMatrix& matrix = of_A ? p.x : p.grad_y;
        const int64_t first = (of_A ? task : task - tasks_A) * kColumns;
        uint32_t* scratch = workers + worker * worker_words;
        float* tile = reinterpret_cast<float*>(scratch + worker_panel + kPanelRows * ranks);
        int64_t offset = 0;
        for (int a = 0; a < p.num_adapters; ++a) {
            const LoraAdapter& adapter = p.adapters[a];
            const Dropout dropout = dropout_of(adapter);
            const uint32_t* coefficients = (of_A ? panel_ds : panel_s) + offset * p.m;
            offset += padded_rank(adapter);
            float* grad = of_A ? adapter.grad_A : adapter.grad_B;
            if (!grad) continue;
            dispatch_dtype(matrix.dtype, [&](auto* type) {
                using T = Pointee<decltype(type)>;
                reduce_rows<T>(matrix, p.m, of_A ? p.k : p.n, first, coefficients, adapter.rank,
                               of_A && dropout.threshold > 0 ? &dropout : nullptr, of_A ? 1.0f : adapter.scaling,
                               !of_A, grad, scratch, tile);
            });
        }
    });
}

}  // namespace

void lora_linear_forward(const LoraLinearForwardParams& params) {
    forward_panels(params, lora_linear_plan(params.m, params.n, params.k, params.threads, kLanes));
}

void lora_linear_backward(const LoraLinearBackwardParams& params) {
    backward_panels(params, lora_linear_plan(params.m, params.k, params.n, params.threads, kLanes));
}

}  // namespace PEFT_KERNELS_ISA
}  // namespace peft_kernels
