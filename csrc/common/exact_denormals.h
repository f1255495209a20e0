// Denormals as they are for as long as the object lives, whatever the thread does with them elsewhere
// (torch.set_flush_denormal): results must not depend on who asks for them, nor on which thread computes them.
#pragma once

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace platonic {

class ExactDenormals {
public:
#if defined(__SSE2__)
    ExactDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ & ~0x8040u); }
    ~ExactDenormals() { _mm_setcsr(saved_); }

private:
    unsigned saved_;
#else
    ExactDenormals() {}
    ~ExactDenormals() {}
#endif
};

}  // namespace platonic
