// The projections ops: packing linear layers with their adapters, and calling one. What runs is lora_linear.
//
// A call of lora_linear hands over a dozen arguments, which are looked at and checked each time. For one row of a small
// layer that takes as long as the kernel. A call of this op hands over three.
#include <string>
#include <type_traits>
#include <vector>

#include "common/torch/registration.h"
#include "projections/binding.h"

namespace peft_kernels {
namespace {

// The lists have an item for each projection. Weights and formats are those of matmul/binding.h, one projection after
// the other, and all of one kind; biases are given for all or none; the adapters of all follow one another.
Tensor pack(const Tensors& weights, const Integers& formats, const Tensors& biases, const Integers& num_adapters,
            const Tensors& lora_A, const Tensors& lora_B, const Numbers& scaling) {
    const size_t count = num_adapters.size();
    if (count == 0) bad_argument("num_adapters", "none", "one at least");
    const auto check = [](const auto& list, const char* name, size_t wanted, bool optional = false) {
        if (list.size() != wanted && !(optional && list.empty()))
            bad_argument(name, counted(list.size()), counted(wanted) + (optional ? ", or none" : ""));
    };
    const size_t each_weight = weights.size() / count, each_format = formats.size() / count;
    check(weights, "weights", each_weight > 0 ? each_weight * count : count);
    check(formats, "formats", each_format * count);
    check(biases, "biases", count, true);
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
    const auto part = [](const auto& list, size_t begin, size_t count) {
        return std::decay_t<decltype(list)>(list.begin() + begin, list.begin() + begin + count);
    };
    for (size_t i = 0; i < count; ++i) {
        Projection& w = projections[i];
        const LinearWeight weight = check_weight(part(weights, i * each_weight, each_weight),
                                                 part(formats, i * each_format, each_format), reference);
        if (weight.is_transposed) bad_argument("weight", "a transposed one", "dense rows: an inner stride of 1");
        w.n = weight.n;
        w.k = weight.k;
        if (weight.nf4) w.nf4 = *weight.nf4;
        if (weight.dense) w.dense = *weight.dense;
        if (!biases.empty()) w.bias = check_bias(biases[i], w.n, reference);
        w.first_adapter = static_cast<int64_t>(adapters.size());
        w.num_adapters = static_cast<int32_t>(num_adapters[i]);
        const auto of_this = [&](const auto& list) { return part(list, w.first_adapter, w.num_adapters); };
        // check_adapters would make a copy of other matrices, which would not outlive this call.
        for (const Tensors* matrices : {&lora_A, &lora_B})
            for (const Tensor& matrix : of_this(*matrices))
                if (matrix.dim() == 2 && matrix.size(1) > 1 && matrix.stride(1) != 1)
                    bad_argument(matrices == &lora_A ? "lora_A" : "lora_B",
                                 "strides " + describe_shape(matrix.strides()), "dense rows: an inner stride of 1");
        const CheckedAdapters checked = check_adapters(of_this(lora_A), of_this(lora_B), of_this(scaling), std::nullopt,
                                                       std::nullopt, w.n, w.k, reference);
        w.total_rank = checked.total_rank;
        adapters.insert(adapters.end(), checked.list.begin(), checked.list.end());
    }
    return Projections::pack(projections, adapters, reference);
}

// x [..., K] -> y [..., N] of the only projection
Tensor project(const Tensor& given_x, const Tensor& projections, int64_t out_features) {
    const Tensor x = as_rows(given_x, "x");
    const int64_t m = x.size(0), k = x.size(1);
    const ConstMatrix rows = check_matrix(x, "x", m, k, x);
    const Projections all(projections, 1, x);
    const Projection& w = all.get(0, k);
    if (w.n != out_features)
        bad_argument("out_features", std::to_string(out_features), std::to_string(w.n) + ", the projection's");
    Tensor y = empty(x, sizes_of_rows(given_x, w.n), dtype_of(x));
    all.run(w, rows, m, {}, {y.mutable_data_ptr(), rows.dtype, w.n});
    return y;
}

}  // namespace
}  // namespace peft_kernels

STABLE_TORCH_LIBRARY_FRAGMENT(peft_kernels, m) {
    m.def(
        "projections_pack(Tensor[] weights, int[] formats, Tensor[] biases, int[] num_adapters, Tensor[] lora_A, "
        "Tensor[] lora_B, float[] scaling) -> Tensor");
    m.def("projections_forward(Tensor x, Tensor projections, int out_features) -> Tensor y");
}

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CPU, m) {
    m.impl("projections_pack", TORCH_BOX(&peft_kernels::pack));
    m.impl("projections_forward", TORCH_BOX(&peft_kernels::project));
}
