// The decoder_layer ops: what a decoder layer of the Llama kind does before and after its attention.
//
//   before   n = norm(x);  q, k, v = n Wᵀ each, with its LoRA;  norms of q's and k's heads;  q and k rotated
//   after    h = x + attended W_oᵀ;  n = norm(h);  y = h + (σ(n W_gateᵀ) ⊙ (n W_upᵀ)) W_downᵀ,  each W with its LoRA
//
// There are no kernels here: those of rms_norm, lora_linear, linear, rotary and glu run one after the other. What is
// saved is Python between them, which takes longer than they do where the model is small: a token of SmolLM2's took
// 17 ms, and takes 10 with them. So that a call has little to look at, projections are packed once.
#include <array>
#include <cstring>
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

// A linear layer and its adapters: plain data, which points into tensors that the caller keeps.
struct Projection {
    int64_t n, k;
    Nf4Weight nf4;      // without codes the weight is dense
    ConstMatrix dense;  // [n, k]
    ConstMatrix bias;   // [1, n]; data may be null
    int64_t first_adapter, total_rank;
    int32_t num_adapters;
};

// Several of them, packed into a tensor of bytes by decoder_layer_projections: checked once, for many calls.
class Projections {
public:
    static Tensor pack(const std::vector<Projection>& projections, const std::vector<LoraAdapter>& adapters,
                       const Tensor& like) {
        const Header header{kMagic, static_cast<int64_t>(projections.size())};
        const size_t size = projections.size() * sizeof(Projection),
                     adapters_size = adapters.size() * sizeof(LoraAdapter);
        const Tensor packed =
            empty(like, {static_cast<int64_t>(sizeof(Header) + size + adapters_size)}, ScalarType::Byte);
        char* bytes = static_cast<char*>(packed.mutable_data_ptr());
        memcpy(bytes, &header, sizeof header);
        memcpy(bytes + sizeof header, projections.data(), size);
        if (adapters_size) memcpy(bytes + sizeof header + size, adapters.data(), adapters_size);
        return packed;
    }

    Projections(const Tensor& packed, int64_t count, const Tensor& x) : x_(x) {
        const auto* header = static_cast<const Header*>(packed.const_data_ptr());
        if (dtype_of(packed) != ScalarType::Byte || packed.numel() < static_cast<int64_t>(sizeof(Header)) ||
            header->magic != kMagic || header->count != count)
            bad_argument("projections", describe(packed), std::to_string(count) + " of decoder_layer_projections");
        list_ = reinterpret_cast<const Projection*>(header + 1);
        adapters_ = reinterpret_cast<const LoraAdapter*>(list_ + count);
    }

    // One of them, for rows [m, k] of x's dtype.
    const Projection& get(int index, int64_t k) const {
        const Projection& w = list_[index];
        if (w.k != k)
            bad_argument("projections", "one of " + std::to_string(w.k) + " features", std::to_string(k) + " features");
        if (!w.nf4.codes && w.dense.dtype != check_float_dtype(x_, "x"))
            bad_argument("projections", "dense weights", describe(dtype_of(x_)) + ", as x");
        return w;
    }

    // y = x Wᵀ + b + add, with the adapters
    void run(const Projection& w, const ConstMatrix& x, int64_t m, ConstMatrix add, const Matrix& y) const {
        if (m == 0 || w.n == 0) return;
        if (w.nf4.codes || w.num_adapters > 0) {
            LoraLinearForwardParams params{};
            params.m = m;
            params.n = w.n;
            params.k = w.k;
            params.weight = w.nf4.codes ? &w.nf4 : nullptr;
            params.compute_dtype = x.dtype;
            params.adapters = adapters_ + w.first_adapter;
            params.num_adapters = w.num_adapters;
            params.total_rank = w.total_rank;
            params.x = x;
            if (w.nf4.codes) params.bias = w.bias;
            params.add = add;
            std::vector<float> s(m * w.total_rank);
            params.s = s.data();
            params.y = y;
            run_cpu(&dispatch::lora_linear_forward, params, x_);
            add = read_only(y);
        }
        if (w.nf4.codes) return;
        LinearParams params{m, w.n, w.k, x, w.dense, w.bias, add, y, 0, nullptr, nullptr};
        run_cpu(&dispatch::linear, params, x_);
    }

private:
    struct Header {
        int64_t magic, count;
    };
    static constexpr int64_t kMagic = 0x6a6f7250'6b6e6570;

    const Tensor& x_;
    const Projection* list_;
    const LoraAdapter* adapters_;
};

// Lists with an item for each projection; adapters of all, one after the other. Where weights are dense there is no
// absmax, where biases are missing there is none at all.
Tensor pack(const Tensors& weights, const Tensors& absmax, const Tensors& nested, int64_t nested_blocksize,
            int64_t blocksize, const std::string& quant_type, ScalarType weight_dtype, const Integers& in_features,
            const Integers& out_features, const Tensors& biases, const Integers& num_adapters, const Tensors& lora_A,
            const Tensors& lora_B, const Numbers& scaling) {
    const size_t count = weights.size();
    if (count == 0) bad_argument("weights", "none", "one at least");
    const auto check = [](const auto& list, const char* name, size_t wanted, bool optional = false) {
        if (list.size() != wanted && !(optional && list.empty()))
            bad_argument(name, counted(list.size()), counted(wanted) + (optional ? ", or none" : ""));
    };
    check(absmax, "absmax", count, true);
    check(nested, "nested", 3 * count, true);
    check(in_features, "in_features", count);
    check(out_features, "out_features", count);
    check(biases, "biases", count, true);
    check(num_adapters, "num_adapters", count);
    size_t total = 0;
    for (int64_t some : num_adapters) {
        if (some < 0) bad_argument("num_adapters", std::to_string(some), "a number of at least 0");
        total += some;
    }
    check(lora_A, "lora_A", total);
    check(lora_B, "lora_B", total);
    check(scaling, "scaling", total);

    std::vector<Projection> projections(count);
    std::vector<LoraAdapter> adapters;
    const Tensor& reference = weights[0];
    const DType dtype = check_float_dtype(weight_dtype, "weight_dtype");
    for (size_t i = 0; i < count; ++i) {
        Projection& w = projections[i];
        w.n = out_features[i];
        w.k = in_features[i];
        if (absmax.empty()) {
            check_dtype(weights[i], "weights", weight_dtype);
            w.dense = check_matrix(weights[i], "weights", w.n, w.k, reference);
        } else {
            Tensors statistics;
            if (!nested.empty()) statistics.assign(&nested[3 * i], &nested[3 * i] + 3);
            w.nf4 = check_nf4_weight(weights[i], absmax[i], {w.n, w.k}, dtype, blocksize, quant_type, statistics,
                                     nested_blocksize);
        }
        if (!biases.empty()) w.bias = check_bias(biases[i], w.n, reference);
        if (w.bias.data && !w.nf4.codes) check_dtype(biases[i], "biases", weight_dtype);
        w.first_adapter = static_cast<int64_t>(adapters.size());
        w.num_adapters = static_cast<int32_t>(num_adapters[i]);
        const auto part = [&](const auto& list) {
            const auto begin = list.begin() + w.first_adapter;
            return std::decay_t<decltype(list)>(begin, begin + w.num_adapters);
        };
        // check_adapters would make a copy of other matrices, which would not outlive this call.
        for (const Tensors* matrices : {&lora_A, &lora_B})
            for (const Tensor& matrix : part(*matrices))
                if (matrix.dim() == 2 && matrix.size(1) > 1 && matrix.stride(1) != 1)
                    bad_argument(matrices == &lora_A ? "lora_A" : "lora_B",
                                 "strides " + describe_shape(matrix.strides()), "dense rows: an inner stride of 1");
        const CheckedAdapters checked =
            check_adapters(part(lora_A), part(lora_B), part(scaling), std::nullopt, std::nullopt, w.n, w.k, reference);
        w.total_rank = checked.total_rank;
        adapters.insert(adapters.end(), checked.list.begin(), checked.list.end());
    }
    return Projections::pack(projections, adapters, reference);
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
                                          const Tensor& projections, const Integers& out_features, int64_t head_dim,
                                          const std::optional<Tensor>& q_norm, const std::optional<Tensor>& k_norm,
                                          const Tensor& cos, const Tensor& sin) {
    if (given_x.dim() != 3) bad_argument("x", describe(given_x), "a tensor [B, S, K]");
    const Tensor x = as_rows(given_x, "x");
    const int64_t m = x.size(0), width = x.size(1), batch = given_x.size(0), length = given_x.size(1);
    const ConstMatrix rows = check_matrix(x, "x", m, width, x);
    const Projections all(projections, 3, x);
    const Norm normalise{eps, offset, x};
    const Scratch normed(m, width, rows.dtype);
    normalise.run(rows, m, width, norm, "norm", normed);

    std::array<Tensor, 3> outs{x, x, x};
    RotaryParams rotation{};
    rotation.batch = batch;
    rotation.length = length;
    rotation.head_dim = head_dim;
    std::vector<Scratch> unrotated;
    for (int i = 0; i < 3; ++i) {
        const Projection& w = all.get(i, width);
        if (head_dim < 1 || w.n % head_dim != 0 || out_features.size() != 3 || out_features[i] != w.n)
            bad_argument("projections", std::to_string(w.n) + " features",
                         "as out_features says, and a multiple of head_dim, " + std::to_string(head_dim));
        const int64_t n = w.n, heads = n / head_dim;
        const Tensor out = empty(x, {m, n}, dtype_of(x));
        const Matrix stored{out.mutable_data_ptr(), rows.dtype, n};
        outs[i] = reinterpreted(out, {batch, heads, length, head_dim}, {length * n, head_dim, n, 1});
        if (i == 2) {
            all.run(w, normed, m, {}, stored);
            break;
        }
        const Matrix& y = unrotated.emplace_back(m, n, rows.dtype);
        all.run(w, normed, m, {}, y);
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
             const Tensor& projections, const std::string& activation) {
    const Tensor x = as_rows(given_x, "x"), attended = as_rows(given_attended, "attended");
    const int64_t m = x.size(0), width = x.size(1);
    const ConstMatrix rows = check_matrix(x, "x", m, width, x);
    check_dtype(attended, "attended", dtype_of(x));
    const Projections all(projections, 4, x);
    const Projection& o = all.get(0, attended.size(1));
    const Projection& gate = all.get(1, width);
    const Projection& up = all.get(2, width);
    const Projection& down = all.get(3, gate.n);
    if (o.n != width || up.n != gate.n || down.n != width) {
        const Integers sizes{o.n, gate.n, up.n, down.n};
        bad_argument("projections", describe_shape(sizes) + " features",
                     "K, N, N, K with x's K = " + std::to_string(width));
    }
    const Scratch summed(m, width, rows.dtype), normed(m, width, rows.dtype);
    all.run(o, check_matrix(attended, "attended", m, o.k, x), m, rows, summed);
    Norm{eps, offset, x}.run(summed, m, width, norm, "norm", normed);
    const Scratch gated(m, gate.n, rows.dtype), other(m, gate.n, rows.dtype);
    all.run(gate, normed, m, {}, gated);
    all.run(up, normed, m, {}, other);
    GluForwardParams glu{};
    glu.m = m;
    glu.n = gate.n;
    glu.gate = gated;
    glu.up = other;
    glu.activation = check_activation(activation);
    glu.y = gated;
    if (m > 0 && gate.n > 0) dispatch::glu_forward(glu);
    Tensor y = empty(x, given_x.sizes(), dtype_of(x));
    all.run(down, gated, m, summed, {y.mutable_data_ptr(), rows.dtype, width});
    return y;
}

}  // namespace
}  // namespace peft_kernels

STABLE_TORCH_LIBRARY_FRAGMENT(peft_kernels, m) {
    m.def(
        "decoder_layer_projections(Tensor[] weights, Tensor[] absmax, Tensor[] nested, int nested_blocksize, "
        "int blocksize, str quant_type, ScalarType weight_dtype, int[] in_features, int[] out_features, "
        "Tensor[] biases, int[] num_adapters, Tensor[] lora_A, Tensor[] lora_B, float[] scaling) -> Tensor");
    m.def(
        "decoder_layer_before(Tensor x, Tensor norm, float eps, float offset, Tensor projections, int[] out_features, "
        "int head_dim, Tensor? q_norm, Tensor? k_norm, Tensor cos, Tensor sin) -> (Tensor q, Tensor k, Tensor v)");
    m.def(
        "decoder_layer_after(Tensor x, Tensor attended, Tensor norm, float eps, float offset, Tensor projections, "
        "str activation) -> Tensor y");
}

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CPU, m) {
    m.impl("decoder_layer_projections", TORCH_BOX(&peft_kernels::pack));
    m.impl("decoder_layer_before", TORCH_BOX(&peft_kernels::before));
    m.impl("decoder_layer_after", TORCH_BOX(&peft_kernels::after));
}
