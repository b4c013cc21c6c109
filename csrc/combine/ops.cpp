// The combine ops: schemas, checks, allocation. See combine/combine.h for what they compute.
#include <optional>
#include <string>
#include <vector>

#include "combine/combine.h"
#include "combine/cuda/plan.h"
#include "common/torch/checks.h"
#include "common/torch/launch.h"
#include "common/torch/registration.h"
#include "dropout/dropout.h"

#if defined(PEFT_KERNELS_CUDA)
#include "common/torch/cuda_check.h"
#endif

namespace peft_kernels {
namespace {

Election check_election(const std::string& election) {
    if (election == "none") return Election::kNone;
    if (election == "total") return Election::kTotal;
    if (election == "frequency") return Election::kFrequency;
    bad_argument("election", "'" + election + "'", "none, total or frequency");
}

#if defined(PEFT_KERNELS_CUDA)
void run_on_cuda(CombineParams& params, const Tensor& y) {
    if (params.num_deltas > CombinePlan::kMaxDeltas)
        bad_argument("deltas", counted(params.num_deltas),
                     "at most " + std::to_string(CombinePlan::kMaxDeltas) + " on a GPU");
    const CudaScope scope(y.get_device_index());
    DeviceProperties device{};
    check_cuda(cuda::query_device(device), "query_device");
    const CombinePlan plan = plan_combine(params, device.multiprocessors);
    if (prints_plans()) print_plan(describe(params, plan));
    const Tensor workspace = empty(y, {plan.bytes}, ScalarType::Byte);
    params.workspace = workspace.mutable_data_ptr();
    check_cuda(cuda::combine(params, plan, scope.stream()), "combine");
}
#endif

// The deltas are complete but for their weights and seeds; y has params.count elements.
void run(CombineParams& params, std::vector<Delta>& deltas, const std::vector<double>& weights, int64_t kept, double p,
         const std::optional<Tensor>& seeds, const std::string& election, Tensor& y) {
    const auto num_deltas = static_cast<int64_t>(deltas.size());
    if (weights.size() != deltas.size()) bad_argument("weights", counted(weights.size()), counted(deltas.size()));
    if (kept < 0 || kept > params.count)
        bad_argument("kept", std::to_string(kept), "0 to " + std::to_string(params.count));
    if (!(p >= 0 && p < 1)) bad_argument("p", std::to_string(p), "a probability in [0, 1)");
    if (p > 0) {
        if (!seeds) bad_argument("seeds", "none", "an int64 tensor, since elements are dropped");
        check_array(*seeds, "seeds", ScalarType::Long, num_deltas, y);
    }
    for (int64_t i = 0; i < num_deltas; ++i) {
        deltas[i].weight = static_cast<float>(weights[i]);
        if (p > 0) deltas[i].seed = static_cast<const int64_t*>(seeds->const_data_ptr()) + i;
    }
    params.deltas = deltas.data();
    params.num_deltas = num_deltas;
    params.kept = kept;
    params.p = p;
    params.election = check_election(election);
    params.y = {y.mutable_data_ptr(), check_float_dtype(y, "deltas"), params.columns};
    if (params.count == 0) return;
#if defined(PEFT_KERNELS_CUDA)
    if (runs_on_cuda(y)) return run_on_cuda(params, y);
#endif
    run_cpu(&dispatch::combine, params, y);
}

// Dense tensors of one shape and dtype -> y of these
Tensor combine(Tensors given, std::vector<double> weights, int64_t kept, double p, std::optional<Tensor> seeds,
               std::string election) {
    if (given.empty()) bad_argument("deltas", "none", "at least one tensor");
    CombineParams params{};
    params.count = given[0].numel();
    params.columns = kDropoutColumns;
    std::vector<Delta> deltas;
    Tensors dense;
    for (const Tensor& tensor : given) dense.push_back(as_dense(tensor));
    for (const Tensor& tensor : dense) {
        check_array(tensor, "deltas", dtype_of(given[0]), params.count, given[0]);
        Delta delta{};
        delta.values = {tensor.const_data_ptr(), check_float_dtype(tensor, "deltas"), params.columns};
        deltas.push_back(delta);
    }
    Tensor y = empty(given[0], given[0].sizes(), dtype_of(given[0]));
    run(params, deltas, weights, kept, p, seeds, election, y);
    return y;
}

// A [r, columns] and B [rows, r] in fp32 -> y [rows, columns] in fp32
Tensor combine_products(Tensors given_A, Tensors given_B, std::vector<double> scaling, std::vector<double> weights,
                        int64_t kept, double p, std::optional<Tensor> seeds, std::string election) {
    Tensors lora_A, lora_B;
    for (const Tensor& tensor : given_A) lora_A.push_back(as_dense(tensor));
    for (const Tensor& tensor : given_B) lora_B.push_back(as_dense(tensor));
    if (lora_A.empty()) bad_argument("lora_A", "none", "at least one tensor");
    for (const auto& [name, size] : {std::pair{"lora_B", lora_B.size()}, std::pair{"scaling", scaling.size()}}) {
        if (size != lora_A.size()) bad_argument(name, counted(size), counted(lora_A.size()));
    }
    if (lora_A[0].dim() != 2) bad_argument("lora_A", describe(lora_A[0]), "matrices [rank, columns]");
    if (lora_B[0].dim() != 2) bad_argument("lora_B", describe(lora_B[0]), "matrices [rows, rank]");
    const int64_t rows = lora_B[0].size(0), columns = lora_A[0].size(1);
    std::vector<Delta> deltas;
    for (size_t i = 0; i < lora_A.size(); ++i) {
        const Tensor &a = lora_A[i], &b = lora_B[i];
        Delta delta{};
        delta.rank = a.dim() == 2 ? a.size(0) : 0;
        check_shape(a, "lora_A", {delta.rank, columns});
        check_shape(b, "lora_B", {rows, delta.rank});
        check_array(a, "lora_A", ScalarType::Float, delta.rank * columns, lora_A[0]);
        check_array(b, "lora_B", ScalarType::Float, rows * delta.rank, lora_A[0]);
        delta.lora_A = static_cast<const float*>(a.const_data_ptr());
        delta.lora_B = static_cast<const float*>(b.const_data_ptr());
        delta.scaling = static_cast<float>(scaling[i]);
        deltas.push_back(delta);
    }
    CombineParams params{};
    params.count = rows * columns;
    params.columns = columns;
    Tensor y = empty(lora_A[0], {rows, columns}, ScalarType::Float);
    run(params, deltas, weights, kept, p, seeds, election, y);
    return y;
}

}  // namespace
}  // namespace peft_kernels

STABLE_TORCH_LIBRARY_FRAGMENT(PEFT_KERNELS_NAMESPACE, m) {
    m.def("combine(Tensor[] deltas, float[] weights, int kept, float p, Tensor? seeds, str election) -> Tensor y");
    m.def(
        "combine_products(Tensor[] lora_A, Tensor[] lora_B, float[] scaling, float[] weights, int kept, float p, "
        "Tensor? seeds, str election) -> Tensor y");
}

PEFT_KERNELS_IMPLEMENT(m) {
    m.impl("combine", TORCH_BOX(&peft_kernels::combine));
    m.impl("combine_products", TORCH_BOX(&peft_kernels::combine_products));
}
