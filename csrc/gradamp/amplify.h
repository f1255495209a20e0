// amplify: loss and gradient of gradient-amplification losses in one pass over the logits.
//
// Logits x [outer, classes, inner], a target t for each, an activation y(x) without a normaliser (amplify_math.h):
//
//   loss_s = f_s sum_c w_c term(x_sc, t_sc)        grad_sc = scale f_s w_c (y(x_sc) - t_sc)
//
// for every sample s = (outer, inner), so that no element needs another one: one read, one write, no one-hot tensor.
// Class indices: t is t_pos at the sample's class and t_neg elsewhere, f_s = weight[class] (1 without) or 0 where the
// class is ignore_index, w = 1. Dense targets: t as given, f = 1, w = weight.
// scale = *factor / *denominator, 1 for what is null. A sample with f_s = 0 has loss 0 and gradient 0, whatever x
// holds.
//
// Arithmetic is float32 for float16, bfloat16 and float32, float64 for float64. Gradients of 16 bits saturate at the
// largest finite number before they are multiplied by the factor, whose overflow (a GradScaler's) has to be seen. Sums
// of losses run over at most 64 vectors in that type and in float64 beyond, in an order that depends on the shape
// alone: the same bits for any number of threads and in every run on one CUDA device.
#pragma once

#include <cstdint>

#include "common/launch.h"
#include "gradamp/amplify_math.h"

namespace platonic {

enum class ElementType { float16, bfloat16, float32, float64 };

struct AmplifyArgs {
    Amplifier amplifier;
    ElementType type;  // of x and grad; A below is the type of arithmetic
    int64_t outer, classes, inner;
    const void* x;          // [outer, classes, inner]
    void* grad;             // like x, x itself to work in place, or null for the loss alone
    const int64_t* target;  // [outer, inner], or null with dense targets
    const void* dense;      // A [outer, classes, inner], or null
    const void* weight;     // A, or null: [classes in all] with indices, [classes] with dense targets
    int64_t ignore_index;   // no effect on dense targets
    int64_t class_offset;   // the class of x[:, 0]: x may hold a part of the classes
    int64_t all_classes;    // class indices lie in [0, all_classes) or are ignored
    double alpha, beta, max_input, t_neg, t_pos;
    bool streams;               // CPU: write grad past the caches, for one that does not fit them
    const double* denominator;  // [1] or null
    const void* factor;  // A [1] or null: what the loss is multiplied by before its backward pass; not in `losses`
    bool per_sample;     // losses [outer, inner], unscaled, instead of their scaled sum
    bool accumulate;     // add to `losses` instead of overwriting it
    double* losses;      // [outer, inner] or [1]
    double* scratch;     // CUDA: [amplify_partials]; CPU: null
};

// Partial sums that a CUDA launch writes, at most.
constexpr int64_t amplify_partials = 4096;

// The denominator of a mean over samples: the sum of weight[target], or their count, over samples that are not ignored.
struct DenominatorArgs {
    const int64_t* target;  // [count]
    int64_t count, ignore_index;
    int64_t classes;     // CPU: throws std::out_of_range for a target that is neither ignored nor in [0, classes)
    const void* weight;  // [classes] or null
    bool is_double;      // weight is float64 rather than float32
    double* denominator;
    double* scratch;  // CUDA: [amplify_partials]; CPU: null
};

// grad [outer, classes, inner] *= factor, [outer, inner] where per_sample and [1] otherwise. Where the one factor is 1
// nothing is read or written; on CUDA the device finds out, the host does not wait.
struct ScaleArgs {
    ElementType type;
    int64_t outer, classes, inner;
    void* grad;
    const void* factor;  // A
    bool per_sample;
};

namespace cpu {
void amplify(const AmplifyArgs& args, const Launch& on);
void sum_denominator(const DenominatorArgs& args, const Launch& on);
void scale_gradient(const ScaleArgs& args, const Launch& on);
}  // namespace cpu
namespace cuda {
void amplify(const AmplifyArgs& args, const Launch& on);
void sum_denominator(const DenominatorArgs& args, const Launch& on);
void scale_gradient(const ScaleArgs& args, const Launch& on);
}  // namespace cuda

}  // namespace platonic
