// Linear layers with their adapters, packed: checked once, so that a call has little to look at. For the CPU.
#pragma once

#include <cstring>
#include <string>
#include <vector>

#include "lora_linear/binding.h"

namespace peft_kernels {

inline ConstMatrix read_only(const Matrix& matrix) { return {matrix.data, matrix.dtype, matrix.stride}; }

// A linear layer and its adapters: plain data, which points into tensors that the caller keeps.
struct Projection {
    int64_t n, k;
    Nf4Weight nf4;      // without codes the weight is dense
    ConstMatrix dense;  // [n, k]
    ConstMatrix bias;   // [1, n]; data may be null
    int64_t first_adapter, total_rank;
    int32_t num_adapters;
};

// Several of them, packed into a tensor of bytes by projections_pack: checked once, for many calls.
class Projections {
public:
    static Tensor pack(const std::vector<Projection>& projections, const std::vector<LoraAdapter>& adapters,
                       const Tensor& like) {
        const Header header{kMagic, static_cast<int64_t>(projections.size()), static_cast<int64_t>(adapters.size())};
        const size_t size = projections.size() * sizeof(Projection),
                     adapters_size = adapters.size() * sizeof(LoraAdapter);
        const Tensor packed = empty(like, {header.bytes()}, ScalarType::Byte);
        char* bytes = static_cast<char*>(packed.mutable_data_ptr());
        memcpy(bytes, &header, sizeof header);
        memcpy(bytes + sizeof header, projections.data(), size);
        if (adapters_size) memcpy(bytes + sizeof header + size, adapters.data(), adapters_size);
        return packed;
    }

    Projections(const Tensor& packed, int64_t count, const Tensor& x) : x_(x) {
        const auto* header = static_cast<const Header*>(packed.const_data_ptr());
        if (dtype_of(packed) != ScalarType::Byte || packed.numel() < static_cast<int64_t>(sizeof(Header)) ||
            header->magic != kMagic || header->count != count || packed.numel() != header->bytes() ||
            !packed.is_contiguous())
            bad_argument("projections", describe(packed), std::to_string(count) + " of projections_pack");
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
    void run(const Projection& w, const ConstMatrix& x, int64_t m, const ConstMatrix& add, const Matrix& y) const {
        if (m == 0 || w.n == 0) return;
        LoraLinearForwardParams params{};
        params.m = m;
        params.n = w.n;
        params.k = w.k;
        if (w.nf4.codes)
            params.weight = &w.nf4;
        else
            params.dense = &w.dense;
        params.compute_dtype = x.dtype;
        params.adapters = adapters_ + w.first_adapter;
        params.num_adapters = w.num_adapters;
        params.total_rank = w.total_rank;
        params.x = x;
        params.bias = w.bias;
        params.add = add;
        std::vector<float> s(m * w.total_rank);
        params.s = s.data();
        params.y = y;
        run_forward_cpu(params, x_);
    }

private:
    struct Header {
        int64_t magic, count, num_adapters;

        int64_t bytes() const {
            return sizeof(Header) + count * sizeof(Projection) + num_adapters * sizeof(LoraAdapter);
        }
    };
    static constexpr int64_t kMagic = 0x6a6f7250'6b6e6570;

    const Tensor& x_;
    const Projection* list_;
    const LoraAdapter* adapters_;
};

}  // namespace peft_kernels
