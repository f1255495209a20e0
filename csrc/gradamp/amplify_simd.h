// The parts of amplify that are compiled per instruction set.
#pragma once

#include "common/cpu.h"
#include "gradamp/amplify.h"

namespace platonic {

// Pixels of one chunk: what a chunk keeps beside the logits stays in the first-level cache.
constexpr int64_t amplify_max_pixels = 1024;

// Rows [first, first + rows) of logits whose classes are contiguous (inner = 1), gradients times `scale`. Returns the
// sum of their losses, without it.
PLATONIC_FOR_EACH_ISA(double amplify_rows(const AmplifyArgs&, double scale, int64_t first, int64_t rows);)

// Pixels [first, first + count) of one element of outer, all classes; count <= amplify_max_pixels.
PLATONIC_FOR_EACH_ISA(double amplify_pixels(const AmplifyArgs&, double scale, int64_t outer, int64_t first,
                                            int64_t count);)

// line [count] *= factor, [count] of A where `each`, else one number.
PLATONIC_FOR_EACH_ISA(void scale_line(ElementType, void* line, int64_t count, const void* factor, bool each);)

}  // namespace platonic
