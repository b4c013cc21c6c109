// What the bindings of lora_linear, ia3_linear and decoder_layer share: they launch the same kernels.
#pragma once

#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "common/checks.h"
#include "common/launch.h"
#include "lora_linear/lora_linear.h"
#include "nf4/nf4_binding.h"

namespace peft_kernels {

using Tensors = std::vector<Tensor>;
using Numbers = std::vector<double>;

// The 4-bit weight [n, k] of an op, or nothing where it was not given one. Its dtype is compute_dtype by default.
inline std::optional<Nf4Weight> check_optional_weight(
    const std::optional<Tensor>& codes, const std::optional<Tensor>& absmax, const std::vector<Tensor>& nested,
    int64_t nested_blocksize, int64_t n, int64_t k, int64_t blocksize, const std::string& quant_type,
    const std::optional<ScalarType>& dtype, DType compute_dtype, const Tensor& reference) {
    if (!codes) return std::nullopt;
    if (!absmax) bad_argument("absmax", "none", "the statistics of the 4-bit weight");
    check_device(*codes, "codes", reference);
    return check_nf4_weight(*codes, *absmax, {n, k}, check_float_dtype(dtype, "weight dtype", compute_dtype), blocksize,
                            quant_type, nested, nested_blocksize);
}

// A weight [n, k] of either kind, or none.
struct LinearWeight {
    std::optional<Nf4Weight> nf4;
    std::optional<ConstMatrix> dense;
    bool is_transposed = false;  // the dense one lies as [k, n]

    void give(LoraLinearParams& params) const {
        params.weight = nf4 ? &*nf4 : nullptr;
        params.dense = dense ? &*dense : nullptr;
        params.dense_is_transposed = is_transposed;
    }
};

inline LinearWeight check_weight(const std::optional<Tensor>& dense, const std::optional<Tensor>& codes,
                                 const std::optional<Tensor>& absmax, const Tensors& nested, int64_t nested_blocksize,
                                 int64_t n, int64_t k, int64_t blocksize, const std::string& quant_type,
                                 const std::optional<ScalarType>& dtype, DType compute_dtype, const Tensor& reference) {
    const std::optional<Nf4Weight> nf4 = check_optional_weight(codes, absmax, nested, nested_blocksize, n, k, blocksize,
                                                               quant_type, dtype, compute_dtype, reference);
    if (!dense) return {nf4, std::nullopt};
    if (nf4) bad_argument("dense", "a dense and a 4-bit weight", "a dense or a 4-bit weight");
    check_shape(*dense, "dense", {n, k});
    if (dense->stride(1) == 1 || k <= 1) return {std::nullopt, check_matrix(*dense, "dense", n, k, reference)};
    return {std::nullopt, check_matrix(torch::stable::transpose(*dense, 0, 1), "dense", k, n, reference), true};
}

inline ConstMatrix check_bias(const Tensor& bias, int64_t n, const Tensor& reference) {
    const ScalarType dtype = bias.scalar_type();
    check_shape(bias, "bias", {n});
    check_array(bias, "bias", dtype, n, reference);
    return {bias.const_data_ptr(), check_float_dtype(dtype, "bias"), n};
}

inline std::string counted(size_t count) { return std::to_string(count) + (count == 1 ? " item" : " items"); }

struct CheckedAdapters {
    std::vector<LoraAdapter> list;
    int64_t total_rank = 0;
    Tensors matrices;  // the list's: copies where rows are not dense, as in PEFT's adapters that combine others
};

// A list with an item for each adapter.
template <class List>
void check_list(const List& list, const char* name, size_t count) {
    if (list.size() != count) bad_argument(name, counted(list.size()), counted(count) + ", one for each lora_A");
}

inline CheckedAdapters check_adapters(const Tensors& lora_A, const Tensors& lora_B, const Numbers& scaling,
                                      const std::optional<Numbers>& dropout, const std::optional<Tensor>& seeds,
                                      int64_t n, int64_t k, const Tensor& reference) {
    const size_t count = lora_A.size();
    check_list(lora_B, "lora_B", count);
    check_list(scaling, "scaling", count);
    bool drops = false;
    if (dropout && !dropout->empty()) {
        check_list(*dropout, "dropout", count);
        for (double p : *dropout) {
            if (!(p >= 0 && p < 1)) bad_argument("dropout", std::to_string(p), "a probability in [0, 1)");
            drops |= p > 0;
        }
    }
    const int64_t* seed_values = nullptr;
    if (drops) {
        if (!seeds) bad_argument("seeds", "none", "an int64 tensor, since there is dropout");
        check_array(*seeds, "seeds", ScalarType::Long, static_cast<int64_t>(count), reference);
        seed_values = static_cast<const int64_t*>(seeds->const_data_ptr());
    }
    CheckedAdapters adapters;
    for (size_t i = 0; i < count; ++i) {
        if (lora_A[i].dim() != 2 || lora_A[i].size(0) == 0)
            bad_argument("lora_A", describe(lora_A[i]),
                         "a matrix [rank, " + std::to_string(k) + "] of rank 1 at least");
        if (!std::isfinite(static_cast<float>(scaling[i])))
            bad_argument("scaling", std::to_string(scaling[i]), "a finite float32 number");
        LoraAdapter adapter{};
        adapter.rank = lora_A[i].size(0);
        const auto check = [&](const Tensor& matrix, const char* name, int64_t rows, int64_t columns) {
            check_shape(matrix, name, {rows, columns});
            adapters.matrices.push_back(as_rows(matrix, name));
            return check_matrix(adapters.matrices.back(), name, rows, columns, reference);
        };
        adapter.lora_A = check(lora_A[i], "lora_A", adapter.rank, k);
        adapter.lora_B = check(lora_B[i], "lora_B", n, adapter.rank);
        adapter.scaling = static_cast<float>(scaling[i]);
        if (drops) {
            adapter.dropout = (*dropout)[i];
            adapter.seed = seed_values + i;
        }
        adapters.list.push_back(adapter);
        adapters.total_rank += adapter.rank;
    }
    return adapters;
}

}  // namespace peft_kernels
