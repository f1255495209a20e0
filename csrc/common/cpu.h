// Which instruction set the CPU kernels use, chosen once at run time.
//
// A file named *_simd.cpp is compiled once per instruction set (see setup.py), each time with the macro
// PLATONIC_ISA naming the namespace its functions go to: scalar, avx2 or avx512. Such a file includes nothing
// that emits shared inline functions (no <vector>, no <algorithm>): the linker keeps only one copy of those, and
// it could be one that this machine cannot run.
#pragma once

namespace platonic {

enum class Isa { scalar, avx2, avx512 };

// The best set that the machine has and the environment variable PLATONIC_ISA (a name from above) allows,
// lowered by limit_isa. Throws std::invalid_argument if the variable holds another word.
Isa isa();

// Lowers what isa() returns to at most `name`; "" lifts the limit. For tests and benchmarks.
void limit_isa(const char* name);

const char* isa_name(Isa isa);

}  // namespace platonic

// PLATONIC_FOR_EACH_ISA(declaration;) declares functions in the namespace of every compiled instruction set;
// PLATONIC_DISPATCH(function(arguments)) calls the one for isa().
#if defined(__x86_64__)
#define PLATONIC_FOR_EACH_ISA(...) \
    namespace scalar {             \
    __VA_ARGS__                    \
    }                              \
    namespace avx2 {               \
    __VA_ARGS__                    \
    }                              \
    namespace avx512 {             \
    __VA_ARGS__                    \
    }
#define PLATONIC_DISPATCH(...)                                          \
    (::platonic::isa() == ::platonic::Isa::avx512 ? avx512::__VA_ARGS__ \
     : ::platonic::isa() == ::platonic::Isa::avx2 ? avx2::__VA_ARGS__   \
                                                  : scalar::__VA_ARGS__)
#else
#define PLATONIC_FOR_EACH_ISA(...) \
    namespace scalar {             \
    __VA_ARGS__                    \
    }
#define PLATONIC_DISPATCH(...) (scalar::__VA_ARGS__)
#endif
