#include "common/cpu.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace platonic {
namespace {

Isa parse(const char* name) {
    for (Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512})
        if (std::strcmp(name, isa_name(isa)) == 0) return isa;
    throw std::invalid_argument(std::string("instruction set must be scalar, avx2 or avx512, got '") + name + "'");
}

Isa detect() {
    Isa best = Isa::scalar;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        best = Isa::avx2;
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
            __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
            best = Isa::avx512;
    }
#endif
    const char* wanted = std::getenv("PLATONIC_ISA");
    if (wanted != nullptr && *wanted != '\0') {
        const Isa limit = parse(wanted);
        if (limit < best) best = limit;
    }
    return best;
}

std::atomic<int> limit{static_cast<int>(Isa::avx512)};

}  // namespace

Isa isa() {
    static const Isa best = detect();
    const Isa cap = static_cast<Isa>(limit.load(std::memory_order_relaxed));
    return cap < best ? cap : best;
}

void limit_isa(const char* name) { limit = static_cast<int>(*name == '\0' ? Isa::avx512 : parse(name)); }

const char* isa_name(Isa isa) {
    switch (isa) {
        case Isa::avx512:
            return "avx512";
        case Isa::avx2:
            return "avx2";
        default:
            return "scalar";
    }
}

}  // namespace platonic
