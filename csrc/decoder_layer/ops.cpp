// The decoder_layer ops: what a decoder layer of the Llama kind does before and after its attention.
//
//   before   n = norm(x);  q, k, v = n Wᵀ each, with its LoRA;  norms of q's and k's heads;  q and k rotated
//   after    h = x + attended W_oᵀ;  n = norm(h);  y = h + (σ(n W_gateᵀ) ⊙ (n W_upᵀ)) W_downᵀ,  each W with its LoRA
//
// There are no kernels here: those of rms_norm, lora_linear, rotary and glu run one after the other. The op saves the
// Python between them, which takes longer than they do where the model is small (`python -m benchmarks model`).
#include <array>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/torch/registration.h"
#include "glu/glu.h"
#include "projections/binding.h"
#include "rms_norm/rms_norm.h"
#include "rotary/binding.h"

namespace peft_kernels {
namespace {

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
        "decoder_layer_before(Tensor x, Tensor norm, float eps, float offset, Tensor projections, int[] out_features, "
        "int head_dim, Tensor? q_norm, Tensor? k_norm, Tensor cos, Tensor sin) -> (Tensor q, Tensor k, Tensor v)");
    m.def(
        "decoder_layer_after(Tensor x, Tensor attended, Tensor norm, float eps, float offset, Tensor projections, "
        "str activation) -> Tensor y");
}

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CPU, m) {
    m.impl("decoder_layer_before", TORCH_BOX(&peft_kernels::before));
    m.impl("decoder_layer_after", TORCH_BOX(&peft_kernels::after));
}
