// Tensor maps: what cuTensorMapEncodeTiled makes, in the 128 bytes of a CUtensorMap. The hardware's own encoding is not
// published; this one is only for kernels that run here.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

namespace ptx_emulator {

constexpr int kTensorMapBytes = 128;

struct TensorMap {
    static constexpr uint64_t kMagic = 0x70'74'78'6D'61'70'30'31;
    static constexpr int kMostRank = 5;

    uint64_t magic = kMagic;
    uint64_t address = 0;
    std::array<uint64_t, kMostRank> strides{};  // bytes; that of the first dimension is an element's
    std::array<uint32_t, kMostRank> last{};     // coordinate in each dimension: the size less 1
    std::array<uint16_t, kMostRank> box{};
    uint8_t rank = 0;
    uint8_t element_bytes = 0;
    uint8_t swizzle = 0;  // 16-byte chunks of 2^swizzle change places

    uint32_t row_bytes() const { return uint32_t{box[0]} * element_bytes; }
    uint32_t rows() const;
};
static_assert(sizeof(TensorMap) <= kTensorMapBytes);

// Sizes and boxes have the innermost dimension first; strides leave it out. What the driver refuses is an EmulatorError,
// and so is what it knows and the emulator does not.
TensorMap make_tensor_map(uint64_t address, int element_bytes, const std::vector<uint64_t>& sizes,
                          const std::vector<uint64_t>& strides, const std::vector<uint32_t>& box, int swizzle);

// How shared memory is swizzled, for tensor maps and wgmma: by the offset itself, of which bits above 128 bytes are
// added to those of the 16-byte chunk.
inline uint32_t swizzled(uint32_t offset, int swizzle) { return offset ^ (offset >> 7 & ((1u << swizzle) - 1)) << 4; }

}  // namespace ptx_emulator
