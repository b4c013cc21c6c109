// The activations σ, and their slopes.
#pragma once

#include "common/activation.h"

namespace peft_kernels::cuda {

struct Activated {
    float value, slope;
};

// The logistic function s, and 1 - s, without cancellation in either.
struct Sigmoid {
    float value, complement;
};

__device__ inline Sigmoid sigmoid(float z) {
    const float e = expf(-fabsf(z)), larger = 1.0f / (1.0f + e), smaller = e * larger;
    return {z < 0 ? smaller : larger, z < 0 ? larger : smaller};
}

__device__ inline Activated activate(Activation activation, float z) {
    switch (activation) {
        case Activation::kRelu: return {z < 0 ? 0.0f : z, z > 0 ? 1.0f : 0.0f};  // a NaN stays one, as torch's does
        case Activation::kLeakyRelu: return {z > 0 ? z : z * 0.01f, z > 0 ? 1.0f : 0.01f};
        case Activation::kGelu: {
            const float integral = 0.5f * erfcf(-0.707106781f * z);  // of the normal density, up to z
            return {z * integral, fmaf(z, 0.398942280f * expf(-0.5f * z * z), integral)};
        }
        case Activation::kGeluTanh: {
            // z (1 + tanh u) / 2 = z sigmoid(2u), with u = √(2/π) (z + 0.044715 z³)
            constexpr float kScale = 1.59576912f, kCubic = 0.044715f;
            const float square = z * z;
            const Sigmoid s = sigmoid(kScale * z * fmaf(square, kCubic, 1.0f));
            const float inner = kScale * fmaf(square, 3 * kCubic, 1.0f);
            return {z * s.value, fmaf(z * inner, s.value * s.complement, s.value)};
        }
        case Activation::kSilu: {
            const Sigmoid s = sigmoid(z);
            return {z * s.value, s.value * fmaf(z, s.complement, 1.0f)};
        }
        case Activation::kTanh: {
            const float t = tanhf(z);
            return {t, 1 - t * t};
        }
        case Activation::kNone: break;
    }
    return {z, 1.0f};
}

}  // namespace peft_kernels::cuda
