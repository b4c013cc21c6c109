// The decoder_layer ops: what a decoder layer of the Llama kind does before and after its attention.
//
//   before   n = norm(x);  q, k, v = n Wᵀ each, with its LoRA;  norms of q's and k's heads;  q and k rotated
//   after    h = x + attended W_oᵀ;  n = norm(h);  y = h + (σ(n W_gateᵀ) ⊙ (n W_upᵀ)) W_downᵀ,  each W with its LoRA
//
// There are no kernels here: those of rms_norm, lora_linear, linear, rotary and glu run one after the other. What is
// saved is Python between them, which takes longer than they do where the model is small: a token of SmolLM2's took
// 17 ms, and takes 11 with them.
#include <array>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/registration.h"
#include "glu/glu.h"
#include "linear/linear.h"
#include "lora_linear/lora_linear_binding.h"
#include "rms_norm/rms_norm.h"
#include "rotary/rotary_binding.h"

namespace peft_kernels {
namespace {

using Integers = std::vector<int64_t>;

ConstMatrix read_only(const Matrix& matrix) { return {matrix.data, matrix.dtype, matrix.stride}; }

// [rows, columns] of x's dtype, for the time of a call
class Scratch {
public:
    Scratch(int64_t rows, int64_t columns, DType dtype)
        : bytes_(new char[rows * columns * size_of(dtype)]), matrix_{bytes_.get(), dtype, columns} {}
    operator const Matrix&() const { return matrix_; }
    operator ConstMatrix() const { return read_only(matrix_); }

private:
    std::unique_ptr<char[]> bytes_;
    Matrix matrix_;
};

// Adapted linear layers, as an op takes them: lists with an item for each. The 4-bit weights of a call are all of one
// format; where they are dense there is no absmax, where a bias is missing there is none at all.
struct Projections {
    const Tensors& weights;  // codes, or [n, k]
    const Tensors& absmax;
    const Tensors& nested;  // (code, absmax, offset) for each, or none
    int64_t nested_blocksize;
    int64_t blocksize;
    const std::string& quant_type;
    std::optional<ScalarType> weight_dtype;
    const Integers& out_features;
    const Tensors& biases;
    const Integers& num_adapters;  // of each
    const Tensors& lora_A;         // of all, one after the other
    const Tensors& lora_B;
    const Numbers& scaling;
};

// One of them, checked.
class Projection {
public:
    Projection(const Projections& all, size_t index, int64_t k, const Tensor& x)
        : x_(x), n_(all.out_features[index]), k_(k) {
        const Tensor& weight = all.weights[index];
        const DType dtype = check_float_dtype(x, "x");
        if (all.absmax.empty()) {
            check_dtype(weight, "weights", dtype_of(x));
            dense_ = check_matrix(weight, "weights", n_, k, x);
        } else {
            Tensors nested;
            if (!all.nested.empty()) nested.assign(&all.nested[3 * index], &all.nested[3 * index] + 3);
            nf4_ = check_optional_weight(weight, all.absmax[index], nested, all.nested_blocksize, n_, k, all.blocksize,
                                         all.quant_type, all.weight_dtype, dtype, x);
        }
        if (!all.biases.empty()) bias_ = check_bias(all.biases[index], n_, x);
        if (bias_.data && !nf4_) check_dtype(all.biases[index], "biases", dtype_of(x));
        int64_t first = 0;
        for (size_t i = 0; i < index; ++i) first += all.num_adapters[i];
        const auto part = [&](const auto& list) {
            return std::decay_t<decltype(list)>(list.begin() + first, list.begin() + first + all.num_adapters[index]);
        };
        adapters_ =
            check_adapters(part(all.lora_A), part(all.lora_B), part(all.scaling), std::nullopt, std::nullopt, n_, k, x);
    }

    // y = x Wᵀ + b + add, with the adapters
    void run(const ConstMatrix& x, int64_t m, ConstMatrix add, const Matrix& y) const {
        if (m == 0 || n_ == 0) return;
        if (nf4_ || !adapters_.list.empty()) {
            LoraLinearForwardParams params{};
            params.m = m;
            params.n = n_;
            params.k = k_;
            params.weight = nf4_ ? &*nf4_ : nullptr;
            params.compute_dtype = x.dtype;
            params.adapters = adapters_.list.data();
            params.num_adapters = static_cast<int32_t>(adapters_.list.size());
            params.total_rank = adapters_.total_rank;
            params.x = x;
            if (nf4_) params.bias = bias_;
            params.add = add;
            std::vector<float> s(m * adapters_.total_rank);
            params.s = s.data();
            params.y = y;
            run_cpu(&dispatch::lora_linear_forward, params, x_);
            add = read_only(y);
        }
        if (nf4_) return;
        LinearParams params{m, n_, k_, x, dense_, bias_, add, y, 0, nullptr, nullptr};
        run_cpu(&dispatch::linear, params, x_);
    }

private:
    const Tensor& x_;
    int64_t n_, k_;
    std::optional<Nf4Weight> nf4_;
    ConstMatrix dense_{}, bias_{};
    CheckedAdapters adapters_;
};

void check_counts(const Projections& all, size_t count) {
    const auto check = [](const auto& list, const char* name, size_t wanted, bool optional = false) {
        if (list.size() != wanted && !(optional && list.empty()))
            bad_argument(name, counted(list.size()), counted(wanted) + (optional ? ", or none" : ""));
    };
    check(all.weights, "weights", count);
    check(all.absmax, "absmax", count, true);
    check(all.nested, "nested", 3 * count, true);
    check(all.out_features, "out_features", count);
    check(all.biases, "biases", count, true);
    check(all.num_adapters, "num_adapters", count);
    int64_t adapters = 0;
    for (int64_t some : all.num_adapters) {
        if (some < 0) bad_argument("num_adapters", std::to_string(some), "a number of at least 0");
        adapters += some;
    }
    check(all.lora_A, "lora_A", adapters);
    check(all.lora_B, "lora_B", adapters);
    check(all.scaling, "scaling", adapters);
}

struct Norm {
    double eps, offset;
    const Tensor& x_;

    // Rows [m, d] of x's dtype; y may be x.
    void run(const ConstMatrix& x, int64_t m, int64_t d, const Tensor& weight, const char* name,
             const Matrix& y) const {
        check_array(weight, name, dtype_of(weight), d, x_);
        if (m == 0) return;
        RmsNormForwardParams params{};
        params.m = m;
        params.d = d;
        params.x = x;
        params.weight = {weight.const_data_ptr(), check_float_dtype(weight, name), d};
        params.offset = static_cast<float>(offset);
        params.eps = static_cast<float>(eps);
        params.y = y;
        std::vector<float> rstd(m);
        params.rstd = rstd.data();
        run_cpu(&dispatch::rms_norm_forward, params, x_);
    }
};

// x [B, S, K] -> q [B, H, S, D], k and v [B, H_kv, S, D], each stored as [B, S, H, D]
std::tuple<Tensor, Tensor, Tensor> before(const Tensor& given_x, const Tensor& norm, double eps, double offset,
                                          const Tensors& weights, const Tensors& absmax, const Tensors& nested,
                                          int64_t nested_blocksize, int64_t blocksize, const std::string& quant_type,
                                          std::optional<ScalarType> weight_dtype, const Integers& out_features,
                                          const Tensors& biases, const Integers& num_adapters, const Tensors& lora_A,
                                          const Tensors& lora_B, const Numbers& scaling, int64_t head_dim,
                                          const std::optional<Tensor>& q_norm, const std::optional<Tensor>& k_norm,
                                          const Tensor& cos, const Tensor& sin) {
    if (given_x.dim() != 3) bad_argument("x", describe(given_x), "a tensor [B, S, K]");
    const Tensor x = as_rows(given_x, "x");
    const int64_t m = x.size(0), width = x.size(1), batch = given_x.size(0), length = given_x.size(1);
    const ConstMatrix rows = check_matrix(x, "x", m, width, x);
    const Projections all{weights,      absmax, nested,       nested_blocksize, blocksize, quant_type, weight_dtype,
                          out_features, biases, num_adapters, lora_A,           lora_B,    scaling};
    check_counts(all, 3);
    for (int64_t features : out_features)
        if (head_dim < 1 || features % head_dim != 0)
            bad_argument("out_features", describe_shape(out_features),
                         "multiples of head_dim, " + std::to_string(head_dim));
    const Norm normalise{eps, offset, x};
    const Scratch normed(m, width, rows.dtype);
    normalise.run(rows, m, width, norm, "norm", normed);

    std::array<Tensor, 3> outs{x, x, x};
    RotaryParams rotation{};
    rotation.batch = batch;
    rotation.length = length;
    rotation.head_dim = head_dim;
    std::vector<Scratch> unrotated;
    for (size_t i = 0; i < 3; ++i) {
        const int64_t n = out_features[i], heads = n / head_dim;
        const Tensor out = empty(x, {m, n}, dtype_of(x));
        const Matrix stored{out.mutable_data_ptr(), rows.dtype, n};
        const std::array<int64_t, 4> sizes{batch, heads, length, head_dim},
            strides{length * n, head_dim, n, int64_t{1}};
        AtenTensorHandle handle;
        STABLE_TORCH_ERROR_CODE_CHECK(
            aoti_torch__reinterpret_tensor(out.get(), 4, sizes.data(), strides.data(), 0, &handle));
        outs[i] = Tensor(handle);
        const Projection projection(all, i, width, x);
        if (i == 2) {
            projection.run(normed, m, {}, stored);
            break;
        }
        const Matrix& y = unrotated.emplace_back(m, n, rows.dtype);
        projection.run(normed, m, {}, y);
        if (const auto& of_heads = i == 0 ? q_norm : k_norm) {
            const Matrix each{y.data, y.dtype, head_dim};
            normalise.run(read_only(each), m * heads, head_dim, *of_heads, i == 0 ? "q_norm" : "k_norm", each);
        }
        rotation.parts[i] = {heads,
                             {y.data, y.dtype, length * n, head_dim, n},
                             {stored.data, stored.dtype, length * n, head_dim, n}};
    }
    check_angles(rotation, cos, sin, x);
    if (m > 0) run_cpu(&dispatch::rotary, rotation, x);
    return {outs[0], outs[1], outs[2]};
}

// x [B, S, K], attended [B, S, H D] -> y [B, S, K]
Tensor after(const Tensor& given_x, const Tensor& given_attended, const Tensor& norm, double eps, double offset,
             const Tensors& weights, const Tensors& absmax, const Tensors& nested, int64_t nested_blocksize,
             int64_t blocksize, const std::string& quant_type, std::optional<ScalarType> weight_dtype,
             const Integers& out_features, const Tensors& biases, const Integers& num_adapters, const Tensors& lora_A,
             const Tensors& lora_B, const Numbers& scaling, const std::string& activation) {
    const Tensor x = as_rows(given_x, "x"), attended = as_rows(given_attended, "attended");
    const int64_t m = x.size(0), width = x.size(1);
    const ConstMatrix rows = check_matrix(x, "x", m, width, x);
    check_dtype(attended, "attended", dtype_of(x));
    const Projections all{weights,      absmax, nested,       nested_blocksize, blocksize, quant_type, weight_dtype,
                          out_features, biases, num_adapters, lora_A,           lora_B,    scaling};
    check_counts(all, 4);
    const int64_t inner = out_features[1];
    if (out_features[0] != width || out_features[2] != inner || out_features[3] != width)
        bad_argument("out_features", describe_shape(out_features), "K, N, N, K with x's K = " + std::to_string(width));
    const Projection o(all, 0, attended.size(1), x), gate(all, 1, width, x), up(all, 2, width, x),
        down(all, 3, inner, x);

    const Scratch summed(m, width, rows.dtype), normed(m, width, rows.dtype);
    o.run(check_matrix(attended, "attended", m, attended.size(1), x), m, rows, summed);
    Norm{eps, offset, x}.run(summed, m, width, norm, "norm", normed);
    const Scratch gated(m, inner, rows.dtype), other(m, inner, rows.dtype);
    gate.run(normed, m, {}, gated);
    up.run(normed, m, {}, other);
    GluForwardParams glu{};
    glu.m = m;
    glu.n = inner;
    glu.gate = gated;
    glu.up = other;
    glu.activation = check_activation(activation);
    glu.y = gated;
    if (m > 0 && inner > 0) dispatch::glu_forward(glu);
    Tensor y = empty(x, given_x.sizes(), dtype_of(x));
    down.run(gated, m, summed, {y.mutable_data_ptr(), rows.dtype, width});
    return y;
}

}  // namespace
}  // namespace peft_kernels

#define PEFT_KERNELS_PROJECTIONS_                                                                               \
    "Tensor[] weights, Tensor[] absmax, Tensor[] nested, int nested_blocksize, int blocksize, str quant_type, " \
    "ScalarType? weight_dtype, int[] out_features, Tensor[] biases, int[] num_adapters, Tensor[] lora_A, "      \
    "Tensor[] lora_B, float[] scaling, "

STABLE_TORCH_LIBRARY_FRAGMENT(peft_kernels, m) {
    m.def("decoder_layer_before(Tensor x, Tensor norm, float eps, float offset, " PEFT_KERNELS_PROJECTIONS_
          "int head_dim, Tensor? q_norm, Tensor? k_norm, Tensor cos, Tensor sin) -> (Tensor q, Tensor k, Tensor v)");
    m.def(
        "decoder_layer_after(Tensor x, Tensor attended, Tensor norm, float eps, float "
        "offset, " PEFT_KERNELS_PROJECTIONS_ "str activation) -> Tensor y");
}

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CPU, m) {
    m.impl("decoder_layer_before", TORCH_BOX(&peft_kernels::before));
    m.impl("decoder_layer_after", TORCH_BOX(&peft_kernels::after));
}
