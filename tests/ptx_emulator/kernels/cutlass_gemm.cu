// A GEMM of CUTLASS, D = A B^T + 2 C: a warpgroup that issues bulk copies, two that take turns at wgmma.
#include <cutlass/cutlass.h>
#include <cutlass/gemm/device/gemm_universal_adapter.h>

#include <cute/tensor.hpp>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/collective/default_epilogue.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <cutlass/util/packed_stride.hpp>

using namespace cute;

using Element = cutlass::bfloat16_t;
using TileShape = Shape<_64, _64, _64>;
using Cluster = Shape<_1, _1, _1>;
using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, TileShape, Cluster,
    cutlass::epilogue::collective::EpilogueTileAuto, float, float, float, cutlass::layout::RowMajor, 4, float,
    cutlass::layout::RowMajor, 4, cutlass::epilogue::TmaWarpSpecialized>::CollectiveOp;
using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, cutlass::layout::RowMajor, 8, Element,
    cutlass::layout::ColumnMajor, 8, float, TileShape, Cluster, cutlass::gemm::collective::StageCount<3>,
    cutlass::gemm::KernelTmaWarpSpecializedPingpong>::CollectiveOp;
using Kernel = cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Mainloop, Epilogue>;
using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

// What went wrong: 0 nothing, 1 to 3 the step.
extern "C" int gemm(const void* a, const void* b, const float* c, float* d, int m, int n, int k) {
    auto stride_a = cutlass::make_cute_packed_stride(typename Kernel::StrideA{}, {m, k, 1});
    auto stride_b = cutlass::make_cute_packed_stride(typename Kernel::StrideB{}, {n, k, 1});
    auto stride_c = cutlass::make_cute_packed_stride(typename Kernel::StrideC{}, {m, n, 1});
    typename Gemm::Arguments arguments{cutlass::gemm::GemmUniversalMode::kGemm,
                                       {m, n, k, 1},
                                       {static_cast<const Element*>(a), stride_a, static_cast<const Element*>(b),
                                        stride_b},
                                       {{1.0f, 2.0f}, c, stride_c, d, stride_c}};
    arguments.hw_info.sm_count = 2;  // blocks, each for several tiles
    Gemm gemm;
    if (gemm.can_implement(arguments) != cutlass::Status::kSuccess) return 1;
    if (gemm.initialize(arguments, nullptr) != cutlass::Status::kSuccess) return 2;
    if (gemm.run() != cutlass::Status::kSuccess) return 3;
    return 0;
}
