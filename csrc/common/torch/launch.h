// What the bindings share beside their checks: results, and workspaces of the size that a launcher asks for.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#if __has_include(<sys/mman.h>)
#include <sys/mman.h>
#endif

#include "common/cpu/parallel_for.h"
#include "common/torch/checks.h"
#include "common/torch/print_plan.h"

namespace peft_kernels {

// Asks for pages of 2 MB for the memory of a large tensor, as far as it has none yet: there are 512 times fewer page
// faults then, and faults are a large part of what it takes to touch new memory.
inline void advise_huge_pages(const Tensor& tensor, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
    constexpr int64_t kLarge = int64_t{4} << 20;
    constexpr uintptr_t kPage = uintptr_t{2} << 20;
    if (bytes < kLarge || !tensor.is_cpu()) return;
    const auto data = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
    const uintptr_t begin = (data + kPage - 1) / kPage * kPage, end = (data + bytes) / kPage * kPage;
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a refusal changes nothing
#endif
}

inline Tensor new_tensor(const Tensor& like, Sizes sizes, ScalarType dtype) {
#if defined(PEFT_KERNELS_EMULATED)
    return torch::stable::new_empty(like, sizes, dtype);  // which the emulator sees
#else
    // new_empty is slower: it finds its operator by name and boxes its arguments.
    std::vector<int64_t> strides(sizes.size());
    int64_t count = 1;
    for (size_t i = sizes.size(); i-- > 0;) {
        strides[i] = count;
        count *= std::max<int64_t>(1, sizes[i]);
    }
    AtenTensorHandle handle;
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                 torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
                                 device_type_of(like), like.get_device_index(), &handle));
    return Tensor(handle);
#endif
}

inline Tensor empty(const Tensor& like, Sizes sizes, ScalarType dtype) {
    Tensor tensor = new_tensor(like, sizes, dtype);
    advise_huge_pages(tensor, tensor.numel() * static_cast<int64_t>(tensor.element_size()));
    return tensor;
}

// The memory of a tensor as one of other sizes.
inline Tensor reinterpreted(const Tensor& tensor, Sizes sizes, Sizes strides) {
    AtenTensorHandle handle;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(tensor.get(), static_cast<int64_t>(sizes.size()),
                                                                 sizes.data(), strides.data(), 0, &handle));
    return Tensor(handle);
}

// The tensor, or a copy where it has gaps or lies in another order.
inline Tensor as_dense(const Tensor& tensor) {
    if (tensor.is_contiguous()) return tensor;
    Tensor dense = empty(tensor, tensor.sizes(), dtype_of(tensor));
    torch::stable::copy_(dense, tensor);
    return dense;
}

// A tensor [..., columns] as a matrix with dense rows: itself or a view where it has them, else a copy.
inline Tensor as_rows(const Tensor& tensor, const char* name) {
    const int64_t dimensions = tensor.dim();
    if (dimensions == 0) bad_argument(name, describe(tensor), "a tensor of one dimension at least");
    const int64_t columns = tensor.size(dimensions - 1);
    if (dimensions == 2 && (columns <= 1 || tensor.stride(1) == 1)) return tensor;
    const Tensor dense = as_dense(tensor);
    if (dimensions == 2) return dense;
    int64_t rows = 1;
    for (int64_t i = 0; i < dimensions - 1; ++i) rows *= tensor.size(i);
    return reinterpreted(dense, {rows, columns}, {std::max<int64_t>(1, columns), 1});
}

// The sizes of a result [..., columns] for a tensor [..., k].
inline std::vector<int64_t> sizes_of_rows(const Tensor& tensor, int64_t columns) {
    const Sizes sizes = tensor.sizes();
    std::vector<int64_t> result(sizes.begin(), sizes.end());
    result.back() = columns;
    return result;
}

// Runs a CPU launcher with a workspace of the size that it asks for. Params has threads, workspace, workspace_bytes.
// `describe` makes the line for PEFT_KERNELS_PRINT_PLANS.
template <class Params, class Describe>
void run_cpu(void (*launch)(const Params&), Params& params, const Tensor& like, const Describe& describe) {
    int64_t bytes = 0;
    params.threads = num_threads();
    if (prints_plans()) print_plan(describe());
    params.workspace = nullptr;
    params.workspace_bytes = &bytes;
    launch(params);
    alignas(64) char small[16384];  // enough for decode shapes, where an allocation would cost as much as 10 rows of W
    if (bytes <= static_cast<int64_t>(sizeof small)) {
        params.workspace = small;
        launch(params);
        return;
    }
    const Tensor workspace = empty(like, {bytes}, ScalarType::Byte);
    params.workspace = workspace.mutable_data_ptr();
    launch(params);
}

// The same for a family that has one kernel for every shape.
template <class Params>
void run_cpu(void (*launch)(const Params&), Params& params, const Tensor& like) {
    run_cpu(launch, params, like, [] { return std::string(); });
}

}  // namespace peft_kernels
