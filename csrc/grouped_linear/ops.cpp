// The grouped_linear ops: y[t] = x[t] Wₑᵀ + biasₑ + Σᵢ scalingᵢ · x[t] Aₑᵢᵀ Bₑᵢᵀ with the expert e of each row, and its
// gradients; schemas, checks, allocation.
//
// Each expert's rows are a lora_linear: its kernels decode a panel of a 4-bit weight for all of them, and add the
// branch to the product's sums. The parameters of an expert are its parts of the stacks:
//
//   x, y, s      rows offsets[e - 1] to offsets[e] - 1
//   W            [E, n, k]: the e-th of them, or of the codes and statistics of a 4-bit stack
//   lora_A       [E · rank, k]: rows e · rank to (e + 1) · rank - 1
//   lora_B       [n, rank · E]: columns e, E + e, ..., which are first brought together, as [n, rank] for each expert
//
// Products that torch's library makes faster are the caller's: they stand in y, or in grad_x, when an op begins.
#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "common/torch/registration.h"
#include "grouped_linear/cpu/plan.h"
#include "lora_linear/binding.h"

namespace peft_kernels {
namespace {

// An expert with rows.
struct Expert {
    int64_t index, begin, rows;
    bool is_given;  // its product is the caller's
};

std::vector<Expert> check_experts(const Integers& offsets, const std::vector<bool>& given, int64_t rows) {
    if (given.size() != offsets.size()) bad_argument("given", counted(given.size()), counted(offsets.size()));
    std::vector<Expert> experts;
    int64_t begin = 0;
    for (size_t e = 0; e < offsets.size(); ++e) {
        if (offsets[e] < begin || offsets[e] > rows)
            bad_argument("offsets", std::to_string(offsets[e]) + " after " + std::to_string(begin),
                         "ends of experts' rows that ascend to " + std::to_string(rows) + " at most");
        if (offsets[e] > begin)
            experts.push_back({static_cast<int64_t>(e), begin, offsets[e] - begin, static_cast<bool>(given[e])});
        begin = offsets[e];
    }
    return experts;
}

ConstMatrix rows_from(const ConstMatrix& matrix, int64_t row) {
    return {static_cast<const char*>(matrix.data) + row * matrix.stride * size_of(matrix.dtype), matrix.dtype,
            matrix.stride};
}
Matrix rows_from(const Matrix& matrix, int64_t row) {
    return {static_cast<char*>(matrix.data) + row * matrix.stride * size_of(matrix.dtype), matrix.dtype, matrix.stride};
}

// ---- The weights of all experts -------------------------------------------------------------------------------------

// What the parameters of one expert point to; a worker has one.
struct ExpertWeight {
    Nf4Weight nf4;
    ConstMatrix dense;
    std::vector<float> absmax;
    std::vector<LoraAdapter> adapters;
};

struct Stack {
    std::vector<Nf4Weight> nf4;  // one of all experts, or one of each
    ConstMatrix dense{};         // of the first expert
    int64_t expert_stride = 0;   // of a dense one, in elements
    bool is_transposed = false;  // the matrix of an expert lies as [k, n]
    int64_t n = 0, k = 0;

    bool is_4bit() const { return !nf4.empty(); }

    // The matrix of an expert as it lies, [n, k] or for a 4-bit one that is transposed [k, n].
    void give(LoraLinearParams& params, int64_t e, ExpertWeight& own) const {
        params.n = n;
        params.k = k;
        if (!is_4bit()) {
            own.dense = {static_cast<const char*>(dense.data) + e * expert_stride * size_of(dense.dtype), dense.dtype,
                         dense.stride};
            params.dense = &own.dense;
            params.dense_is_transposed = is_transposed;
            return;
        }
        own.nf4 = nf4.size() > 1 ? nf4[e] : nf4[0];
        own.nf4.n = is_transposed ? k : n;
        own.nf4.k = is_transposed ? n : k;
        if (nf4.size() == 1) give_part(e, own);
        params.weight = &own.nf4;
    }

private:
    void give_part(int64_t e, ExpertWeight& own) const {
        const int64_t size = n * k, blocks = size >> own.nf4.log2_blocksize, first = e * blocks;
        own.nf4.codes += e * size / 2;
        Absmax& a = own.nf4.absmax;
        if (a.absmax) {
            a.absmax += first;
            return;
        }
        a.nested_codes += first;
        const int log2 = a.log2_nested_blocksize;
        if (first % (int64_t{1} << log2) == 0) {
            a.nested_absmax += first >> log2;
            return;
        }
        own.absmax.resize(blocks);  // an expert begins within one of the statistics' blocks
        for (int64_t i = 0; i < blocks; ++i) {
            volatile float scaled = a.nested_code[a.nested_codes[i]] * a.nested_absmax[(first + i) >> log2];
            own.absmax[i] = scaled + a.nested_offset[0];  // rounded twice, as the format has it
        }
        a.absmax = own.absmax.data();
    }
};

// `weight` and `format` are a dense stack [E, n, k] or [E, k, n] and an empty list; or a 4-bit stack of such a shape
// (nf4/binding.h); or, for a `format` of two sizes, the tensors of E weights one after the other.
Stack check_stack(const Tensors& weight, const Integers& format, bool transposed, size_t experts,
                  const Tensor& reference) {
    Stack stack;
    if (weight.empty()) bad_argument("weight", "none", "a stack [E, N, K]");
    const char* wanted = "a stack of a matrix for each of the offsets";
    stack.is_transposed = transposed;
    int64_t rows = 0, columns = 0;
    if (format.empty()) {
        const Tensor& dense = weight[0];
        if (dense.dim() != 3 || dense.size(0) != static_cast<int64_t>(experts))
            bad_argument("weight", describe(dense), wanted);
        check_device(dense, "weight", reference);
        rows = dense.size(1);
        columns = dense.size(2);
        if (columns > 1 && dense.stride(2) != 1)
            bad_argument("weight", "strides " + describe_shape(dense.strides()), "dense rows: an inner stride of 1");
        stack.dense = {dense.const_data_ptr(), check_float_dtype(dense, "weight"), dense.stride(1)};
        stack.expert_stride = dense.stride(0);
    } else {
        const Sizes shape = shape_of(format);
        const size_t count = shape.size() == 2 ? experts : 1, parts = weight.size() / std::max<size_t>(1, count);
        if (shape.size() != 2 && (shape.size() != 3 || shape[0] != static_cast<int64_t>(experts)))
            bad_argument("shape", describe_shape(shape), wanted);
        rows = shape[shape.size() - 2];
        columns = shape[shape.size() - 1];
        for (size_t e = 0; e < count; ++e) {
            stack.nf4.push_back(
                check_nf4_weight({weight.begin() + e * parts, weight.begin() + (e + 1) * parts}, format));
            check_device(weight[e * parts], "codes", reference);
        }
        if (count == 1 && experts > 1 && rows * columns % (int64_t{1} << stack.nf4[0].log2_blocksize))
            bad_argument("weight", describe_shape(shape), "experts of whole blocks");
    }
    stack.n = transposed ? columns : rows;
    stack.k = transposed ? rows : columns;
    return stack;
}

// ---- The adapters of all experts ------------------------------------------------------------------------------------

// Elements of B that a task brings together: a line of each expert.
constexpr int64_t kTaskElements = 64;

// of_expert[slot][i] = matrix[i][index of the slot's expert], where i counts n · rank.
template <class T>
void split_experts(const T* matrix, int64_t num_experts, int64_t elements, const std::vector<Expert>& experts,
                   T* of_expert) {
    parallel_for_each((elements + kTaskElements - 1) / kTaskElements, [&](int64_t task, int) {
        const int64_t first = task * kTaskElements, end = std::min(elements, first + kTaskElements);
        for (size_t slot = 0; slot < experts.size(); ++slot)
            for (int64_t i = first; i < end; ++i)
                of_expert[slot * elements + i] = matrix[i * num_experts + experts[slot].index];
    });
}

// And back; zero for experts without rows.
void join_experts(const float* of_expert, int64_t num_experts, int64_t elements, const std::vector<Expert>& experts,
                  float* matrix) {
    parallel_for_each((elements + kTaskElements - 1) / kTaskElements, [&](int64_t task, int) {
        const int64_t first = task * kTaskElements, end = std::min(elements, first + kTaskElements);
        if (static_cast<int64_t>(experts.size()) < num_experts)
            std::fill(matrix + first * num_experts, matrix + end * num_experts, 0.0f);
        for (size_t slot = 0; slot < experts.size(); ++slot)
            for (int64_t i = first; i < end; ++i)
                matrix[i * num_experts + experts[slot].index] = of_expert[slot * elements + i];
    });
}

// The adapters of a stack, and of each expert with rows its [n, rank] of every lora_B.
struct StackAdapters {
    StackAdapters(const Tensors& lora_A, const Tensors& lora_B, const Numbers& scaling, size_t num_experts,
                  const std::vector<Expert>& experts, int64_t n, int64_t k, const Tensor& reference)
        : checked(check_adapters(lora_A, lora_B, scaling, std::nullopt, std::nullopt, n, k, reference)) {
        total_rank = checked.total_rank / static_cast<int64_t>(num_experts);
        for (size_t i = 0; i < checked.list.size(); ++i) {
            LoraAdapter& adapter = checked.list[i];
            if (adapter.rank % static_cast<int64_t>(num_experts))
                bad_argument("lora_A", describe(lora_A[i]), "as many rows for each of the experts");
            adapter.rank /= static_cast<int64_t>(num_experts);
            const Tensor matrix = as_dense(lora_B[i]);
            const int64_t elements = n * adapter.rank;
            of_experts.push_back(empty(reference, {static_cast<int64_t>(experts.size()), elements}, dtype_of(matrix)));
            void* out = of_experts.back().mutable_data_ptr();
            const auto split = [&](auto* type) {
                using T = std::remove_pointer_t<decltype(type)>;
                split_experts(static_cast<const T*>(matrix.const_data_ptr()), static_cast<int64_t>(num_experts),
                              elements, experts, static_cast<T*>(out));
            };
            if (adapter.lora_B.dtype == DType::kFloat32)
                split(static_cast<float*>(nullptr));
            else
                split(static_cast<uint16_t*>(nullptr));
            adapter.lora_B = {out, adapter.lora_B.dtype, adapter.rank};
        }
    }

    // Those of one expert, which is experts[slot].
    void give(LoraLinearParams& params, const Expert& expert, int64_t slot, ExpertWeight& own) const {
        own.adapters = checked.list;
        for (LoraAdapter& adapter : own.adapters) {
            adapter.lora_A = rows_from(adapter.lora_A, expert.index * adapter.rank);
            adapter.lora_B = rows_from(adapter.lora_B, slot * params.n);
            if (adapter.grad_A) adapter.grad_A += expert.index * adapter.rank * params.k;
            if (adapter.grad_B) adapter.grad_B += slot * params.n * adapter.rank;
        }
        params.adapters = own.adapters.data();
        params.num_adapters = static_cast<int32_t>(own.adapters.size());
        params.total_rank = total_rank;
    }

    CheckedAdapters checked;
    int64_t total_rank = 0;
    Tensors of_experts;
};

// ---- The launches ---------------------------------------------------------------------------------------------------

// Launches once for each expert. fill(params, expert, slot, own) returns whether there is something to do.
template <class Params, class Fill>
void run_experts(void (*launch)(const Params&), const std::vector<Expert>& experts, const Tensor& like,
                 const Fill& fill) {
    GroupedLinearCpuProblem problem{static_cast<int64_t>(experts.size()), 0, 0, num_threads()};
    for (const Expert& expert : experts) {
        problem.most_rows = std::max(problem.most_rows, expert.rows);
        problem.rows += expert.rows;
    }
    const bool has_thread = has_thread_for_each_expert(problem);
    if (prints_plans()) print_plan(describe(problem, has_thread));
    const auto make = [&](int64_t slot, ExpertWeight& own, Params& params) {
        params.threads = has_thread ? 1 : problem.threads;
        params.m = experts[slot].rows;
        return fill(params, experts[slot], slot, own);
    };
    int64_t bytes = 0;
    {
        ExpertWeight own{};
        for (int64_t slot = 0; slot < problem.experts; ++slot) {
            Params params{};
            int64_t wanted = 0;
            params.workspace_bytes = &wanted;
            if (!make(slot, own, params)) continue;
            launch(params);
            bytes = std::max(bytes, wanted);
        }
    }
    bytes = (bytes + 63) / 64 * 64 + 64;
    const int64_t workers = has_thread ? problem.threads : 1;
    const Tensor workspace = empty(like, {bytes * workers}, ScalarType::Byte);
    char* memory = static_cast<char*>(workspace.mutable_data_ptr());
    std::vector<ExpertWeight> own(workers);
    const auto run = [&](int64_t slot, int worker) {
        Params params{};
        if (!make(slot, own[worker], params)) return;
        params.workspace = memory + worker * bytes;
        launch(params);
    };
    if (!has_thread) {
        for (int64_t slot = 0; slot < problem.experts; ++slot) run(slot, 0);
        return;
    }
    Integers order(experts.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int64_t>(i);
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return experts[a].rows > experts[b].rows; });
    parallel_for_each(problem.experts, [&](int64_t task, int worker) { run(order[task], worker); });
}

void give_matrices(LoraLinearForwardParams& params, const ConstMatrix& in, const Matrix& out) {
    params.x = in;
    params.y = out;
}
void give_matrices(LoraLinearBackwardParams& params, const ConstMatrix& in, const Matrix& out) {
    params.grad_y = in;
    params.grad_x = out;
}

// The product alone, with a 4-bit stack whose matrices lie transposed: the launcher of a forward multiplies along the
// rows of the codes, that of a backward across them.
template <class Params>
void multiply(void (*launch)(const Params&), const Stack& stack, const std::vector<Expert>& experts,
              const ConstMatrix& in, const Matrix& out, DType compute_dtype, const Tensor& like) {
    run_experts(launch, experts, like, [&](Params& params, const Expert& expert, int64_t, ExpertWeight& own) {
        stack.give(params, expert.index, own);
        params.n = own.nf4.n;
        params.k = own.nf4.k;
        params.compute_dtype = compute_dtype;
        give_matrices(params, rows_from(in, expert.begin), rows_from(out, expert.begin));
        return true;
    });
}

void give_all(std::vector<Expert>& experts) {
    for (Expert& expert : experts) expert.is_given = true;
}

// x [S, k] -> y [S, n], of which the rows of experts are written, and s [S, Σ rank].
Tensor forward(Tensor y, const Tensor& given_x, const Tensors& given_weight, const Integers& format, bool transposed,
               const Integers& offsets, const std::vector<bool>& given, const Tensors& lora_A, const Tensors& lora_B,
               const Numbers& scaling, const OptionalTensor& bias, OptionalDtype compute_dtype) {
    const Tensor x = as_rows(given_x, "x");
    std::vector<Expert> experts = check_experts(offsets, given, x.size(0));
    const Stack stack = check_stack(given_weight, format, transposed, offsets.size(), x);
    const int64_t rows = x.size(0);
    const ConstMatrix of_x = check_matrix(x, "x", rows, stack.k, x);
    const ConstMatrix of_y = check_matrix(y, "y", rows, stack.n, x);
    const Matrix out{y.mutable_data_ptr(), of_y.dtype, of_y.stride};
    const DType dtype = check_float_dtype(compute_dtype, "compute_dtype", of_x.dtype);
    ConstMatrix of_bias{};
    if (bias) {
        const ScalarType type = bias->scalar_type();
        check_shape(*bias, "bias", {static_cast<int64_t>(offsets.size()), stack.n});
        check_array(*bias, "bias", type, bias->numel(), x);
        of_bias = {bias->const_data_ptr(), check_float_dtype(type, "bias"), stack.n};
    }
    const StackAdapters adapters(lora_A, lora_B, scaling, offsets.size(), experts, stack.n, stack.k, x);
    Tensor s = empty(x, {rows, adapters.total_rank}, ScalarType::Float);
    float* of_s = static_cast<float*>(s.mutable_data_ptr());
    const int64_t end = experts.empty() ? 0 : experts.back().begin + experts.back().rows;
    std::fill(of_s + end * adapters.total_rank, of_s + rows * adapters.total_rank, 0.0f);  // rows of no expert
    if (experts.empty() || stack.n == 0) return s;
    const bool is_across = stack.is_4bit() && transposed;
    if (is_across) {
        multiply(&dispatch::lora_linear_backward, stack, experts, of_x, out, dtype, x);
        give_all(experts);
    }
    run_experts(&dispatch::lora_linear_forward, experts, x,
                [&](LoraLinearForwardParams& params, const Expert& expert, int64_t slot, ExpertWeight& own) {
                    params.n = stack.n;
                    params.k = stack.k;
                    if (expert.is_given) {
                        if (lora_A.empty() && !(is_across && bias)) return false;
                        params.add = rows_from(of_y, expert.begin);
                    } else {
                        stack.give(params, expert.index, own);
                    }
                    if (bias && (is_across || !expert.is_given)) params.bias = rows_from(of_bias, expert.index);
                    params.compute_dtype = dtype;
                    params.x = rows_from(of_x, expert.begin);
                    params.y = rows_from(out, expert.begin);
                    params.s = lora_A.empty() ? nullptr : of_s + expert.begin * adapters.total_rank;
                    adapters.give(params, expert, slot, own);
                    return true;
                });
    return s;
}

// grad_y [S, n] -> grad_x [S, k], of which the rows of experts are written; grad_A (flat, adapter after adapter, each
// as lora_A lies), grad_B (the same as lora_B); what is not wanted has no elements.
std::tuple<Tensor, Tensor> backward(OptionalTensor grad_x, const Tensor& given_grad_y, const OptionalTensor& given_x,
                                    const OptionalTensor& s, const Tensors& given_weight, const Integers& format,
                                    bool transposed, const Integers& offsets, const std::vector<bool>& given,
                                    const Tensors& lora_A, const Tensors& lora_B, const Numbers& scaling,
                                    const std::vector<bool>& wants_A, const std::vector<bool>& wants_B,
                                    OptionalDtype compute_dtype) {
    const Tensor grad_y = as_rows(given_grad_y, "grad_y");
    const int64_t rows = grad_y.size(0), num_experts = static_cast<int64_t>(offsets.size());
    std::vector<Expert> experts = check_experts(offsets, given, rows);
    const Stack stack = check_stack(given_weight, format, transposed, offsets.size(), grad_y);
    const ConstMatrix of_grad_y = check_matrix(grad_y, "grad_y", rows, stack.n, grad_y);
    const DType dtype = check_float_dtype(compute_dtype, "compute_dtype", of_grad_y.dtype);
    StackAdapters adapters(lora_A, lora_B, scaling, offsets.size(), experts, stack.n, stack.k, grad_y);
    Tensor grad_A, grad_B, parts_B;
    std::vector<LoraAdapter>& list = adapters.checked.list;
    {
        // A's gradients lie as A does; those of B first as [n, rank] of each expert with rows.
        const auto sizes_of = [&](const std::vector<bool>& wants, int64_t other, int64_t count) {
            int64_t size = 0;
            for (size_t i = 0; i < list.size(); ++i) size += wants[i] ? list[i].rank * other * count : 0;
            return size;
        };
        check_list(wants_A, "wants_A", list.size());
        check_list(wants_B, "wants_B", list.size());
        grad_A = empty(grad_y, {sizes_of(wants_A, stack.k, num_experts)}, ScalarType::Float);
        grad_B = empty(grad_y, {sizes_of(wants_B, stack.n, num_experts)}, ScalarType::Float);
        parts_B = empty(grad_y, {sizes_of(wants_B, stack.n, static_cast<int64_t>(experts.size()))}, ScalarType::Float);
        float *next_A = static_cast<float*>(grad_A.mutable_data_ptr()),
              *next_B = static_cast<float*>(parts_B.mutable_data_ptr());
        for (size_t i = 0; i < list.size(); ++i) {
            if (wants_A[i] && stack.k > 0) {
                list[i].grad_A = next_A;
                const int64_t size = list[i].rank * stack.k;
                int64_t after = 0;  // the first expert after those that have been seen
                for (const Expert& expert : experts) {
                    std::fill(next_A + after * size, next_A + expert.index * size, 0.0f);
                    after = expert.index + 1;
                }
                std::fill(next_A + after * size, next_A + num_experts * size, 0.0f);
                next_A += num_experts * size;
            }
            if (wants_B[i] && stack.n > 0) {
                list[i].grad_B = next_B;
                next_B += static_cast<int64_t>(experts.size()) * list[i].rank * stack.n;
            }
        }
    }
    const bool has_A = grad_A.numel() > 0, has_B = grad_B.numel() > 0;
    OptionalTensor x;
    ConstMatrix of_x{}, of_grad_x{};
    Matrix out{};
    if (has_A) {
        if (!given_x) bad_argument("x", "none", "the forward's x, since lora_A's gradient is wanted");
        x = as_rows(*given_x, "x");
        of_x = check_matrix(*x, "x", rows, stack.k, grad_y);
    }
    if (has_B) {
        if (!s) bad_argument("s", "none", "the forward's s, since lora_B's gradient is wanted");
        check_shape(*s, "s", {rows, adapters.total_rank});
        check_array(*s, "s", ScalarType::Float, rows * adapters.total_rank, grad_y);
    }
    if (grad_x) {
        of_grad_x = check_matrix(*grad_x, "grad_x", rows, stack.k, grad_y);
        out = {grad_x->mutable_data_ptr(), of_grad_x.dtype, of_grad_x.stride};
    }
    const bool wants_x = grad_x && stack.k > 0;
    if (!experts.empty() && (wants_x || has_A || has_B)) {
        if (stack.is_4bit() && transposed && wants_x) {
            multiply(&dispatch::lora_linear_forward, stack, experts, of_grad_y, out, dtype, grad_y);
            give_all(experts);
        }
        run_experts(&dispatch::lora_linear_backward, experts, grad_y,
                    [&](LoraLinearBackwardParams& params, const Expert& expert, int64_t slot, ExpertWeight& own) {
                        params.n = stack.n;
                        params.k = stack.k;
                        const bool changes_x = wants_x && (!expert.is_given || !lora_A.empty());
                        if (!(changes_x || has_A || has_B)) return false;
                        if (changes_x) {
                            if (expert.is_given)
                                params.add = rows_from(of_grad_x, expert.begin);
                            else
                                stack.give(params, expert.index, own);
                            params.grad_x = rows_from(out, expert.begin);
                        }
                        params.compute_dtype = dtype;
                        params.grad_y = rows_from(of_grad_y, expert.begin);
                        if (has_A) params.x = rows_from(of_x, expert.begin);
                        if (has_B)
                            params.s =
                                static_cast<const float*>(s->const_data_ptr()) + expert.begin * adapters.total_rank;
                        adapters.give(params, expert, slot, own);
                        return true;
                    });
    }
    float* next = has_B ? static_cast<float*>(grad_B.mutable_data_ptr()) : nullptr;
    for (size_t i = 0; has_B && i < list.size(); ++i) {
        if (!wants_B[i]) continue;
        const int64_t elements = stack.n * list[i].rank;
        join_experts(list[i].grad_B, num_experts, elements, experts, next);
        next += elements * num_experts;
    }
    return {grad_A, grad_B};
}

}  // namespace
}  // namespace peft_kernels

STABLE_TORCH_LIBRARY_FRAGMENT(peft_kernels, m) {
    m.def(
        "grouped_linear_forward(Tensor(a!) y, Tensor x, Tensor[] weight, int[] format, bool transposed, int[] offsets, "
        "bool[] given, Tensor[] lora_A, Tensor[] lora_B, float[] scaling, *, Tensor? bias=None, "
        "ScalarType? compute_dtype=None) -> Tensor s");
    m.def(
        "grouped_linear_backward(Tensor(a!)? grad_x, Tensor grad_y, Tensor? x, Tensor? s, Tensor[] weight, "
        "int[] format, bool transposed, int[] offsets, bool[] given, Tensor[] lora_A, Tensor[] lora_B, "
        "float[] scaling, bool[] wants_A, bool[] wants_B, *, ScalarType? compute_dtype=None) "
        "-> (Tensor grad_A, Tensor grad_B)");
}

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CPU, m) {
    m.impl("grouped_linear_forward", TORCH_BOX(&peft_kernels::forward));
    m.impl("grouped_linear_backward", TORCH_BOX(&peft_kernels::backward));
}
