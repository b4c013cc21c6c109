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
    return {adapter.seed, adapter.dropout};
}

const void* row_of(const ConstMatrix& matrix, int64_t row, int64_t column = 0) {
    return static_cast<const char*>(matrix.data) + (row * matrix.stride + column) * size_of(matrix.dtype);
}

// The weight with the roundings to its own dtype and to compute_dtype made one where that changes nothing.
Nf4Weight rounded_once(const Nf4Weight& weight, DType compute_dtype) {
    Nf4Weight result = weight;
    if (weight.dtype == DType::kFloat32) result.dtype = compute_dtype;
    return result;
}

// Calls body(type, multiply) with the element type that weights are decoded to and with how they are multiplied.
template <class Body>
void dispatch_compute(DType compute_dtype, DType weight_dtype, const Body& body) {
#if defined(__AVX512BF16__)
    if (compute_dtype == DType::kBFloat16) return body(static_cast<BFloat16*>(nullptr), MultiplyBf16Pairs{});
#endif
    const bool rounds_twice = weight_dtype != DType::kFloat32 && compute_dtype != DType::kFloat32 &&
                              weight_dtype != compute_dtype;
    dispatch_dtype(rounds_twice ? compute_dtype : DType::kFloat32, [&](auto* type) { body(type, MultiplyF32{}); });
}

template <class Multiply>
constexpr int kStepElements = 1;
#if defined(__AVX512BF16__)
template <>
constexpr int kStepElements<MultiplyBf16Pairs> = 2;
#endif

int64_t step_elements(DType compute_dtype) {
    int64_t elements = 1;
    dispatch_compute(compute_dtype, DType::kFloat32,
                     [&](auto*, auto multiply) { elements = kStepElements<decltype(multiply)>; });
    return elements;
}

// ---- Panels of the weight -----------------------------------------------------------------------------------------

using WeightPanel = RowPanel<kPanelSteps>;

// Rows [first_row, first_row + rows) of W, elements [first, first + count) of each, as a panel whose steps run along k.
template <class T, int kElements>
void decode_panel(const Nf4Weight& w, int64_t first_row, int64_t rows, int64_t first, int64_t count, uint32_t* panel) {
    for (int64_t row = 0; row < rows; ++row, panel += WeightPanel::kRowStride) {
        const int64_t begin = (first_row + row) * w.k + first;
        if constexpr (kElements == 2 || sizeof(T) == 4) {
            T* out = reinterpret_cast<T*>(panel);
            decode_range(w, begin, count, out);
            if (count % kElements) out[count] = {};
        } else {
            T values[kPanelSteps];
            decode_range(w, begin, count, values);
            for (int64_t step = 0; step < count; step += kLanes)
                store(reinterpret_cast<float*>(panel) + step, load(values + step));
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
    for (int64_t column = 0; column == 0 || column < columns; column += kPanelSteps) {
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
    const int64_t worker_panel = max_of(kPanelRows * WeightPanel::kRowStride, kTileStrips * kPanelSteps * kLanes);
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
                dispatch_compute(p.compute_dtype, p.weight->dtype, [&](auto* type, auto multiply) {
                    using T = Pointee<decltype(type)>;
                    using Multiply = decltype(multiply);
                    constexpr int kElements = kStepElements<Multiply>;
                    const Nf4Weight weight = rounded_once(*p.weight, p.compute_dtype);
                    for (int64_t step = 0; step == 0 || step < steps; step += panel_steps(steps)) {
                        const int64_t block = min_of(panel_steps(steps), steps - step);
                        const int64_t k0 = step * kElements;
                        decode_panel<T, kElements>(weight, n0, outputs, k0,
                                                   min_of(block * kElements, p.k - k0), panel);
                        multiply_panel<Multiply, WeightPanel>(panel, outputs,
                                                              strips + (strip0 * steps + step) * kLanes,
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
                dispatch_compute(p.compute_dtype, p.weight->dtype, [&](auto* type, auto multiply) {
                    using T = Pointee<decltype(type)>;
                    using Multiply = decltype(multiply);
                    constexpr int kElements = kStepElements<Multiply>;
                    const Nf4Weight weight = rounded_once(*p.weight, p.compute_dtype);
                    for (int64_t step = 0; step == 0 || step < steps; step += panel_steps(steps)) {
                        const int64_t block = min_of(panel_steps(steps), steps - step);
                        const int64_t n0 = step * kElements;
                        decode_panel_transposed<T, kElements>(weight, k0, outputs, n0,
                                                              min_of(block * kElements, p.n - n0), panel);
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

// ---- Decode shapes ------------------------------------------------------------------------------------------------

// The most rows of x, and the rows of W that are multiplied at once: 16 sums at most, and 4 at least, since each
// multiplication waits for the one before it in its sum.
constexpr int kDotRows = 8;
template <int kM>
constexpr int kDotWeights = kM <= 2 ? 4 : 2;

// The values of a block, rounded through kRounding. The multiplication of bf16 pairs takes subnormals for zero, so
// they may be flushed here, which saves five instructions a block.
template <class T, class Multiply, DType kRounding>
Table<T> dot_table(const float* values, float absmax) {
#if defined(__AVX512BF16__)
    if constexpr (kStepElements<Multiply> == 2 && kRounding == DType::kFloat32) {
        const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(_mm512_load_ps(values), _mm512_set1_ps(absmax)));
        return {{_mm512_broadcast_i64x4(rounded)}};
    }
#endif
    return make_table<T>(values, absmax, kRounding);
}

// sum[row][i] += W[first_row + row] . x[i], lane by lane, for rows whose blocks begin with them.
template <class T, class Multiply, DType kRounding, int kWeights, int kM>
void dot_rows(const Nf4Weight& w, int64_t first_row, const uint32_t* x, int64_t x_stride, F32 (&sum)[kWeights][kM]) {
    constexpr int kElements = kStepElements<Multiply>;
    constexpr int kUnit = max_of(Table<T>::kGroup, kLanes * kElements);  // elements decoded at a time
    constexpr int64_t kBlocks = 64;                                      // blocks whose statistics are decoded at a time
    const float* values = codebook(w.quant_type);
    const int64_t blocksize = int64_t{1} << w.log2_blocksize;
    const int64_t row_blocks = w.k >> w.log2_blocksize;
    const uint8_t* codes = w.codes + first_row * w.k / 2;
    for (int64_t block0 = 0; block0 < row_blocks; block0 += kBlocks) {
        const int64_t blocks = min_of(kBlocks, row_blocks - block0);
        float absmax[kWeights][kBlocks];
        for (int row = 0; row < kWeights; ++row)
            for (int64_t block = 0; block < blocks; ++block)
                absmax[row][block] = block_absmax(w.absmax, (first_row + row) * row_blocks + block0 + block);
        for (int64_t block = 0; block < blocks; ++block) {
            Table<T> table[kWeights];
#pragma GCC unroll 4
            for (int row = 0; row < kWeights; ++row) {
                // The next rows to come: each row is a stream of its own, too short for the hardware to get ahead.
                __builtin_prefetch(codes + (kWeights + row) * w.k / 2);
                table[row] = dot_table<T, Multiply, kRounding>(values, absmax[row][block]);
            }
            for (int64_t unit = 0; unit < blocksize; unit += kUnit, codes += kUnit / 2, x += kUnit / kElements)
#pragma GCC unroll 4
                for (int row = 0; row < kWeights; ++row) {
                    T decoded[kUnit];
#pragma GCC unroll 16
                    for (int i = 0; i < kUnit; i += Table<T>::kGroup)
                        decode_group(table[row], codes + (row * w.k + i) / 2, decoded + i);
#pragma GCC unroll 4
                    for (int part = 0; part < kUnit; part += kLanes * kElements) {
                        U32 weights;
                        if constexpr (kElements == 2)
                            weights = load_pairs(decoded + part);
                        else
                            weights = (U32)load(decoded + part);
#pragma GCC unroll 8
                        for (int i = 0; i < kM; ++i)
                            sum[row][i] = Multiply::add_product(
                                sum[row][i], weights, load_vector<U32>(x + i * x_stride + part / kElements));
                    }
                }
        }
    }
}

template <DType kValue>
struct Rounding {
    static constexpr DType kDType = kValue;
};

template <int kM>
void forward_dot(const LoraLinearForwardParams& p) {
    const int64_t elements = step_elements(p.compute_dtype);
    const int64_t steps = divide_up(p.k, kLanes * elements) * kLanes;
    const int64_t padded_k = divide_up(p.k, kLanes) * kLanes;
    int64_t ranks = 0;
    for (int a = 0; a < p.num_adapters; ++a) ranks += divide_up(p.adapters[a].rank, kLanes) * kLanes;

    Arena arena(p.workspace);
    uint32_t* x_steps = arena.take(kM * steps);
    float* x_wide = arena.take<float>(ranks > 0 ? kM * padded_k : 0);
    float* s = arena.take<float>(kM * ranks);  // scaled, each adapter's part padded to whole vectors with zeros
    if (!p.workspace) {
        *p.workspace_bytes = arena.used();
        return;
    }

    const auto widen_x = [&](float* out) {
        dispatch_dtype(p.x.dtype, [&](auto* type) {
            using T = Pointee<decltype(type)>;
            for (int64_t i = 0; i < p.m; ++i)
                for (int64_t column = 0; column < padded_k; column += kLanes)
                    store(out + i * padded_k + column,
                          load_partial(static_cast<const T*>(row_of(p.x, i, column)),
                                       min_of<int64_t>(kLanes, p.k - column)));
        });
    };
    // Rows that only fill up kM are zero.
    memset(x_steps + p.m * steps, 0, (kM - p.m) * steps * 4);
    if (ranks > 0) {
        memset(x_wide + p.m * padded_k, 0, (kM - p.m) * padded_k * 4);
        widen_x(x_wide);
    }
    dispatch_dtype(p.x.dtype, [&](auto* type) {
        using T = Pointee<decltype(type)>;
        for (int64_t i = 0; i < p.m; ++i)
            for (int64_t step = 0; step < steps; step += kLanes) {
                T row[2 * kLanes] = {};
                memcpy(row, row_of(p.x, i, step * elements),
                       max_of<int64_t>(0, min_of(kLanes * elements, p.k - step * elements)) * sizeof(T));
                store_vector(x_steps + i * steps + step, elements == 2 ? load_pairs(row) : (U32)load(row));
            }
    });

    int64_t offset = 0, rank = 0;
    bool dropped = false;  // x_wide lacks what the adapter before has dropped
    for (int a = 0; a < p.num_adapters; ++a) {
        const LoraAdapter& adapter = p.adapters[a];
        const Dropout dropout = dropout_of(adapter);
        const bool drops = dropout.threshold > 0;
        if (drops || dropped) widen_x(x_wide);
        dropped = drops;
        if (drops) {
            for (int64_t column = 0; column < p.k; column += kColumns) {
                uint8_t keep[kDotRows][8];
                dropout_keep_bits(dropout, 0, kDotRows, column / 8, keep);
                for (int64_t i = 0; i < p.m; ++i)
                    for (int64_t j = 0; j < min_of<int64_t>(kColumns, p.k - column); ++j)
                        if (!(keep[i][j / 8] >> (j % 8) & 1)) x_wide[i * padded_k + column + j] = 0;
            }
        }
        parallel_for_each(divide_up(adapter.rank, 4), [&](int64_t task, int) {
            dispatch_dtype(adapter.lora_A.dtype, [&](auto* type) {
                using T = Pointee<decltype(type)>;
                for (int64_t r = task * 4; r < min_of(task * 4 + 4, adapter.rank); ++r) {
                    const T* row = static_cast<const T*>(row_of(adapter.lora_A, r));
                    F32 sum[kM] = {};
                    for (int64_t column = 0; column < p.k; column += kLanes) {
                        const int64_t count = p.k - column;
                        const F32 v = count >= kLanes ? load(row + column) : load_partial(row + column, count);
                        for (int i = 0; i < kM; ++i) sum[i] = fma(v, load(x_wide + i * padded_k + column), sum[i]);
                    }
                    for (int64_t i = 0; i < p.m; ++i) {
                        const float value = horizontal_sum(sum[i]) * dropout.keep_scale;
                        p.s[i * p.total_rank + rank + r] = value;
                        s[i * ranks + offset + r] = value * adapter.scaling;
                    }
                }
            });
        });
        const int64_t padded = divide_up(adapter.rank, kLanes) * kLanes;
        for (int64_t i = 0; i < p.m; ++i)
            for (int64_t r = adapter.rank; r < padded; ++r) s[i * ranks + offset + r] = 0;
        offset += padded;
        rank += adapter.rank;
    }

    // Tasks of about 64k weights: some ten microseconds, well above what handing one out costs.
    constexpr int kWeights = kDotWeights<kM>;
    const int64_t task_rows = max_of<int64_t>(1, (int64_t{1} << 16) / max_of<int64_t>(1, p.k) / kWeights) * kWeights;
    parallel_for_each(divide_up(p.n, task_rows), [&](int64_t task, int) {
        const int64_t end = min_of(p.n, (task + 1) * task_rows);
        const auto finish = [&](int64_t n, const F32* sums) {
            for (int64_t i = 0; i < p.m; ++i) {
                F32 sum = sums[i];
                int64_t at = 0;
                for (int a = 0; a < p.num_adapters; ++a) {
                    const LoraAdapter& adapter = p.adapters[a];
                    dispatch_dtype(adapter.lora_B.dtype, [&](auto* type) {
                        const auto* row = static_cast<const Pointee<decltype(type)>*>(row_of(adapter.lora_B, n));
                        for (int64_t r = 0; r < adapter.rank; r += kLanes, at += kLanes) {
                            const int64_t count = adapter.rank - r;
                            const F32 b = count >= kLanes ? load(row + r) : load_partial(row + r, count);
                            sum = fma(b, load(s + i * ranks + at), sum);
                        }
                    });
                }
                float value = horizontal_sum(sum);
                if (p.bias.data)
                    dispatch_dtype(p.bias.dtype, [&](auto* type) {
                        value += to_float(static_cast<const Pointee<decltype(type)>*>(p.bias.data)[n]);
                    });
                dispatch_dtype(p.y.dtype, [&](auto* type) {
                    using T = Pointee<decltype(type)>;
                    if (p.add.data) value += to_float(static_cast<const T*>(row_of(p.add, i))[n]);
                    store_rounded(value, static_cast<T*>(p.y.data) + i * p.y.stride + n);
                });
            }
        };
        if (!p.weight) {
            const F32 zeros[kM] = {};
            for (int64_t n = task * task_rows; n < end; ++n) finish(n, zeros);
            return;
        }
        dispatch_compute(p.compute_dtype, p.weight->dtype, [&](auto* type, auto multiply) {
            using T = Pointee<decltype(type)>;
            using Multiply = decltype(multiply);
            const Nf4Weight weight = rounded_once(*p.weight, p.compute_dtype);
            const auto rows = [&](auto rounding) {
                int64_t n = task * task_rows;
                for (; n + kWeights <= end; n += kWeights) {
                    F32 sums[kWeights][kM] = {};
                    dot_rows<T, Multiply, decltype(rounding)::kDType>(weight, n, x_steps, steps, sums);
                    for (int row = 0; row < kWeights; ++row) finish(n + row, sums[row]);
                }
                for (; n < end; ++n) {
                    F32 sums[1][kM] = {};
                    dot_rows<T, Multiply, decltype(rounding)::kDType>(weight, n, x_steps, steps, sums);
                    finish(n, sums[0]);
                }
            };
            // Rounding twice to the type that is decoded to is rounding once.
            const bool same = (kStepElements<Multiply> == 2 && weight.dtype == DType::kBFloat16);
            if (weight.dtype == DType::kFloat32 || same) return rows(Rounding<DType::kFloat32>{});
            if (weight.dtype == DType::kBFloat16) return rows(Rounding<DType::kBFloat16>{});
            rows(Rounding<DType::kFloat16>{});
        });
    });
}

bool blocks_begin_with_rows(const Nf4Weight* weight) {
    return !weight || weight->k % (int64_t{1} << weight->log2_blocksize) == 0;
}

}  // namespace

void lora_linear_forward(const LoraLinearForwardParams& params) {
    const LoraLinearPlan plan = lora_linear_plan(params.m, params.n, params.k, params.threads, kLanes);
    if (!plan.dot || !blocks_begin_with_rows(params.weight)) return forward_panels(params, plan);
    if (params.m == 1) return forward_dot<1>(params);
    if (params.m == 2) return forward_dot<2>(params);
    if (params.m <= 4) return forward_dot<4>(params);
    forward_dot<8>(params);
}

void lora_linear_backward(const LoraLinearBackwardParams& params) {
    backward_panels(params, lora_linear_plan(params.m, params.k, params.n, params.threads, kLanes));
}

}  // namespace PEFT_KERNELS_ISA
}  // namespace peft_kernels
