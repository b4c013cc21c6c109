#include "common/cpu/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__)
#include <sys/auxv.h>
#endif

namespace peft_kernels {
namespace {

#if defined(PEFT_KERNELS_EMULATE_AMX)
bool has_tiles() { return true; }
#elif defined(__x86_64__)
// The kernel keeps the tile registers of a process only after it has asked for them: ARCH_REQ_XCOMP_PERM for
// XFEATURE_XTILEDATA. Kernels before 5.16 refuse.
bool has_tiles() {
    return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
           syscall(SYS_arch_prctl, 0x1023, 18) == 0;
}
#endif

std::vector<Isa> detect() {
    std::vector<Isa> isas{Isa::kPortable};
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c"))
        return isas;
    isas.push_back(Isa::kAvx2);
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
        return isas;
    isas.push_back(Isa::kAvx512);
    if (!__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("avx512vbmi")) return isas;
    isas.push_back(Isa::kAvx512Bf16);
    if (has_tiles()) isas.push_back(Isa::kAmx);
#elif defined(__aarch64__)
    isas.push_back(Isa::kNeon);               // part of the architecture
    constexpr unsigned long kBf16 = 1 << 14;  // HWCAP2_BF16, which headers before Linux 5.6 lack
    if (getauxval(AT_HWCAP2) & kBf16) isas.push_back(Isa::kNeonBf16);
#endif
    return isas;
}

Isa find(const std::string& name, const char* argument) {
    std::string supported;
    for (Isa isa : supported_isas()) {
        if (name == isa_name(isa)) return isa;
        supported += std::string(supported.empty() ? "" : ", ") + isa_name(isa);
    }
    throw std::invalid_argument(std::string(argument) + ": got '" + name +
                                "', wanted one that this processor supports: " + supported);
}

Isa initial() {
    const char* forced = std::getenv("PEFT_KERNELS_CPU_ISA");
    return forced && *forced ? find(forced, "PEFT_KERNELS_CPU_ISA") : supported_isas().back();
}

Isa& current() {
    static Isa isa = initial();
    return isa;
}

}  // namespace

const char* isa_name(Isa isa) {
    switch (isa) {
        case Isa::kPortable: return "portable";
        case Isa::kNeon: return "neon";
        case Isa::kNeonBf16: return "neon_bf16";
        case Isa::kAvx2: return "avx2";
        case Isa::kAvx512: return "avx512";
        case Isa::kAvx512Bf16: return "avx512_bf16";
        case Isa::kAmx: return "amx";
    }
    return "unknown";
}

const std::vector<Isa>& supported_isas() {
    static const std::vector<Isa> isas = detect();
    return isas;
}

Isa current_isa() { return current(); }

bool is_intel() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    return __builtin_cpu_is("intel");
#else
    return false;
#endif
}

void set_isa(const char* name) { current() = find(name, "cpu_isa"); }

}  // namespace peft_kernels
