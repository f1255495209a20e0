// The CUDA entry points of csrc/gradamp for ctypes, with the parameters of its bindings.cpp.
#include "exports.h"
#include "gradamp/amplify.h"

using namespace platonic;

namespace {

constexpr Launch device{0, 0, nullptr};

}  // namespace

extern "C" {

int amplify(int amplifier, int type, const int64_t* shape, const void* x, void* grad, const int64_t* target,
            const void* dense, const void* weight, int64_t ignore_index, int64_t class_offset, int64_t all_classes,
            const double* settings, const double* denominator, const void* factor, int per_sample, int accumulate,
            double* losses, double* scratch) {
    return emulation::guarded([&] {
        const AmplifyArgs args{static_cast<Amplifier>(amplifier),
                               static_cast<ElementType>(type),
                               shape[0],
                               shape[1],
                               shape[2],
                               x,
                               grad,
                               target,
                               dense,
                               weight,
                               ignore_index,
                               class_offset,
                               all_classes,
                               settings[0],
                               settings[1],
                               settings[2],
                               settings[3],
                               settings[4],
                               false,
                               denominator,
                               factor,
                               per_sample != 0,
                               accumulate != 0,
                               losses,
                               scratch};
        cuda::amplify(args, device);
    });
}

int sum_denominator(const int64_t* target, int64_t count, int64_t ignore_index, int64_t classes, const void* weight,
                    int is_double, double* denominator, double* scratch) {
    return emulation::guarded([&] {
        cuda::sum_denominator({target, count, ignore_index, classes, weight, is_double != 0, denominator, scratch},
                              device);
    });
}

int scale_gradient(int type, const int64_t* shape, void* grad, const void* factor, int per_sample) {
    return emulation::guarded([&] {
        cuda::scale_gradient(
            {static_cast<ElementType>(type), shape[0], shape[1], shape[2], grad, factor, per_sample != 0}, device);
    });
}

}  // extern "C"
