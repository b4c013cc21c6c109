// The instruction sets that the CPU kernels are compiled for, and the one in use.
//
// Each kernel source is compiled once per instruction set, inside a namespace of that name
// (PEFT_KERNELS_ISA, set by CMake). Such a source must not call function templates or inline functions
// of the standard library: the linker would keep one copy of them for the whole binary, perhaps the
// one compiled with AVX-512.
#pragma once

#include <vector>

namespace peft_kernels {

enum class Isa : int { kPortable, kNeon, kNeonBf16, kAvx2, kAvx512, kAvx512Bf16, kAmx };

const char* isa_name(Isa isa);

// What this processor can run, slowest first; always holds kPortable.
const std::vector<Isa>& supported_isas();

// The fastest supported one, unless PEFT_KERNELS_CPU_ISA or set_isa named another.
Isa current_isa();

bool is_intel();  // who made the processor

// Throws std::invalid_argument when the name is unknown or this processor lacks it.
void set_isa(const char* name);

}  // namespace peft_kernels

// Declares `void name(const Params&)` in every instruction set's namespace, and defines
// peft_kernels::dispatch::name, which calls the current one.
#define PEFT_KERNELS_CPU_KERNEL(name, Params)                    \
    PEFT_KERNELS_DECLARE_EACH_(name, Params)                     \
    namespace dispatch {                                         \
    inline void name(const Params& params) {                     \
        switch (current_isa()) { PEFT_KERNELS_CALL_EACH_(name) } \
    }                                                            \
    }

#define PEFT_KERNELS_DECLARE_(isa, name, Params) \
    namespace isa {                              \
    void name(const Params& params);             \
    }

#if defined(__x86_64__)
#define PEFT_KERNELS_DECLARE_EACH_(name, Params)     \
    PEFT_KERNELS_DECLARE_(portable, name, Params)    \
    PEFT_KERNELS_DECLARE_(avx2, name, Params)        \
    PEFT_KERNELS_DECLARE_(avx512, name, Params)      \
    PEFT_KERNELS_DECLARE_(avx512_bf16, name, Params) \
    PEFT_KERNELS_DECLARE_(amx, name, Params)
#define PEFT_KERNELS_CALL_EACH_(name)                        \
    case Isa::kAvx2: return avx2::name(params);              \
    case Isa::kAvx512: return avx512::name(params);          \
    case Isa::kAvx512Bf16: return avx512_bf16::name(params); \
    case Isa::kAmx: return amx::name(params);                \
    default: return portable::name(params);
#elif defined(__aarch64__)
#define PEFT_KERNELS_DECLARE_EACH_(name, Params)  \
    PEFT_KERNELS_DECLARE_(portable, name, Params) \
    PEFT_KERNELS_DECLARE_(neon, name, Params)     \
    PEFT_KERNELS_DECLARE_(neon_bf16, name, Params)
#define PEFT_KERNELS_CALL_EACH_(name)                    \
    case Isa::kNeon: return neon::name(params);          \
    case Isa::kNeonBf16: return neon_bf16::name(params); \
    default: return portable::name(params);
#else
#define PEFT_KERNELS_DECLARE_EACH_(name, Params) PEFT_KERNELS_DECLARE_(portable, name, Params)
#define PEFT_KERNELS_CALL_EACH_(name) \
    default: return portable::name(params);
#endif
