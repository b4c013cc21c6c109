// What the bindings that rotate queries and keys share.
#pragma once

#include <string>

#include "common/torch/checks.h"
#include "rotary/rotary.h"

namespace peft_kernels {

inline ConstHeads check_angles(const Tensor& angles, const char* name, const RotaryParams& params,
                               const Tensor& reference) {
    check_device(angles, name, reference);
    if (angles.dim() != 3 || (angles.size(0) != 1 && angles.size(0) != params.batch) ||
        angles.size(1) != params.length || angles.size(2) != params.channels)
        bad_argument(name, describe(angles),
                     "[B or 1, S, R] = [" + std::to_string(params.batch) + " or 1, " + std::to_string(params.length) +
                         ", " + std::to_string(params.channels) + "]");
    if (params.channels > 1 && angles.stride(2) != 1)
        bad_argument(name, "strides " + describe_shape(angles.strides()), "dense rows: an inner stride of 1");
    return {angles.const_data_ptr(), check_float_dtype(angles, name), angles.size(0) == 1 ? 0 : angles.stride(0), 0,
            angles.stride(1)};
}

// Sets the channels and the angles of params, whose other sizes are known.
inline void check_angles(RotaryParams& params, const Tensor& cos, const Tensor& sin, const Tensor& reference) {
    params.channels = cos.dim() == 3 ? cos.size(2) : 0;
    if (params.channels % 2 != 0 || params.channels > params.head_dim)
        bad_argument("cos", describe(cos),
                     "[B or 1, S, R] with an even R of at most " + std::to_string(params.head_dim));
    params.cos = check_angles(cos, "cos", params, reference);
    params.sin = check_angles(sin, "sin", params, reference);
}

}  // namespace peft_kernels
