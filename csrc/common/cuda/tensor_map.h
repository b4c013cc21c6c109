// Tensor maps: how a matrix in global memory lies, for copies of boxes of it.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace peft_kernels::cuda {

// Whether the driver encodes tensor maps. Its function is asked for when the program runs, since a program that is
// linked to the driver would not start without one.
bool has_tensor_maps();

// A map of [rows, row_bytes], whose rows begin `stride` bytes apart, in boxes of [box_rows, box_bytes]; the swizzle
// spans these bytes: 32, 64 or 128. Copies put zeros where a box leaves the matrix. Addresses and strides are multiples
// of 16. Returns a cudaError_t.
int encode_tensor_map(CUtensorMap& map, const void* data, int64_t rows, int64_t row_bytes, int64_t stride, int box_rows,
                      int box_bytes);

}  // namespace peft_kernels::cuda
