// Of the driver's functions those that host code asks the runtime for: the encoding of tensor maps.
#include <cuda.h>

#include <cstring>

#include "../core/tensor_map.h"
#include "registry.h"

namespace ptx_emulator {
namespace {

int bytes_of(CUtensorMapDataType type) {
    switch (type) {
        case CU_TENSOR_MAP_DATA_TYPE_UINT8: return 1;
        case CU_TENSOR_MAP_DATA_TYPE_UINT16:
        case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
        case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16: return 2;
        case CU_TENSOR_MAP_DATA_TYPE_UINT32:
        case CU_TENSOR_MAP_DATA_TYPE_INT32:
        case CU_TENSOR_MAP_DATA_TYPE_FLOAT32: return 4;
        case CU_TENSOR_MAP_DATA_TYPE_UINT64:
        case CU_TENSOR_MAP_DATA_TYPE_INT64:
        case CU_TENSOR_MAP_DATA_TYPE_FLOAT64: return 8;
        default: throw EmulatorError("tensor map: this type of elements is not supported");
    }
}

}  // namespace
}  // namespace ptx_emulator

using namespace ptx_emulator;

extern "C" {

CUresult cuTensorMapEncodeTiled(CUtensorMap* out, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
    const cudaError_t error = answer(__func__, [&] {
        if (interleave != CU_TENSOR_MAP_INTERLEAVE_NONE || fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE)
            throw EmulatorError("tensor map: interleaving, and fill with NaN, are not supported");
        if (rank < 1 || rank > TensorMap::kMostRank) throw EmulatorError("tensor map: its rank has to be 1 to 5");
        for (cuuint32_t i = 0; i < rank; ++i)
            if (steps[i] != 1) throw EmulatorError("tensor map: steps other than 1 are not supported");
        const TensorMap map =
            make_tensor_map(reinterpret_cast<uint64_t>(address), bytes_of(type), {sizes, sizes + rank},
                            {strides, strides + rank - 1}, {box, box + rank}, static_cast<int>(swizzle));
        *out = {};
        std::memcpy(out, &map, sizeof map);
    });
    return error == cudaSuccess ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* status) {
    return answer(__func__, [&] {
        const bool found = std::strcmp(symbol, "cuTensorMapEncodeTiled") == 0;
        *function = found ? reinterpret_cast<void*>(cuTensorMapEncodeTiled) : nullptr;
        if (status) *status = found ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    });
}

cudaError_t cudaGetDriverEntryPoint(const char* symbol, void** function, unsigned long long flags,
                                    cudaDriverEntryPointQueryResult* status) {
    return cudaGetDriverEntryPointByVersion(symbol, function, CUDART_VERSION, flags, status);
}

}  // extern "C"
