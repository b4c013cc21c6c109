#include "tensor_map.h"

#include <string>

#include "ast.h"

namespace ptx_emulator {
namespace {

void want(bool right, const std::string& what, uint64_t got, const std::string& wanted) {
    if (!right) throw EmulatorError("tensor map: " + what + ": got " + std::to_string(got) + ", wanted " + wanted);
}

}  // namespace

uint32_t TensorMap::rows() const {
    uint32_t rows = 1;
    for (int i = 1; i < rank; ++i) rows *= box[i];
    return rows;
}

TensorMap make_tensor_map(uint64_t address, int element_bytes, const std::vector<uint64_t>& sizes,
                          const std::vector<uint64_t>& strides, const std::vector<uint32_t>& box, int swizzle) {
    TensorMap map;
    map.address = address;
    map.rank = static_cast<uint8_t>(sizes.size());
    map.element_bytes = static_cast<uint8_t>(element_bytes);
    map.swizzle = static_cast<uint8_t>(swizzle);
    want(sizes.size() >= 1 && sizes.size() <= TensorMap::kMostRank, "rank", sizes.size(), "1 to 5");
    want(box.size() == sizes.size(), "sizes of the box", box.size(), std::to_string(sizes.size()));
    want(strides.size() + 1 == sizes.size(), "strides", strides.size(), std::to_string(sizes.size() - 1));
    want(swizzle >= 0 && swizzle <= 3, "swizzle", swizzle, "NONE, 32B, 64B or 128B");
    want(address % 16 == 0, "address", address, "a multiple of 16");
    for (size_t i = 0; i < sizes.size(); ++i) {
        want(sizes[i] >= 1 && sizes[i] <= uint64_t{1} << 32, "size", sizes[i], "1 to 2^32");
        want(box[i] >= 1 && box[i] <= 256, "size of the box", box[i], "1 to 256");
        map.last[i] = static_cast<uint32_t>(sizes[i] - 1);
        map.box[i] = static_cast<uint16_t>(box[i]);
        map.strides[i] = i ? strides[i - 1] : static_cast<uint64_t>(element_bytes);
        if (i)
            want(map.strides[i] % 16 == 0 && map.strides[i] < uint64_t{1} << 40, "stride", map.strides[i],
                 "a multiple of 16 below 2^40");
    }
    want(map.row_bytes() % 16 == 0, "bytes of the box's inner dimension", map.row_bytes(), "a multiple of 16");
    const uint32_t span = 16u << swizzle;
    want(!swizzle || map.row_bytes() <= span, "bytes of the box's inner dimension", map.row_bytes(),
         "at most " + std::to_string(span) + ", which the swizzle spans");
    want(!swizzle || map.row_bytes() == span, "bytes of the box's inner dimension, which are supported here",
         map.row_bytes(), std::to_string(span));
    return map;
}

}  // namespace ptx_emulator
