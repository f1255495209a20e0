// amplify on CUDA. Sums of losses: threads take `pack` consecutive elements at a time in a grid of fixed size, whatever
// the layout, and blocks write partial sums that one block adds in order. Losses of every sample: a warp takes a sample
// whose classes are contiguous, a thread one pixel otherwise, so that neighbours read neighbours. No atomics: the same
// bits in every run.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cassert>

#include "common/cuda_utils.cuh"
#include "gradamp/amplify.h"

namespace platonic {
namespace {

constexpr int threads = 256, warp = 32;

// ---- elements in memory ----

template <class T>
struct Element {
    typedef T A;
    static constexpr A largest = NumberMath<A>::largest;
    static __device__ A load(T x) { return x; }
    static __device__ T store(A x) { return x; }
    static __device__ A saturate(A x, A) { return x; }  // gradients of 16 bits alone
};
// NaN passes both comparisons.
struct SaturatedElement {
    typedef float A;
    static __device__ float saturate(float x, float limit) { return x > limit ? limit : x < -limit ? -limit : x; }
};
template <>
struct Element<__half> : SaturatedElement {
    static constexpr float largest = 65504.0f;
    static __device__ float load(__half x) { return __half2float(x); }
    static __device__ __half store(float x) { return __float2half_rn(x); }
};
template <>
struct Element<__nv_bfloat16> : SaturatedElement {
    static constexpr float largest = 0x1.fep127f;
    static __device__ float load(__nv_bfloat16 x) { return __bfloat162float(x); }
    static __device__ __nv_bfloat16 store(float x) { return __float2bfloat16_rn(x); }
};

template <class T>
constexpr int pack = 16 / sizeof(T);
template <class T>
struct alignas(16) Pack {
    T at[pack<T>];
};

bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// ---- sums over a block, in a fixed order; the total is in thread 0 ----

__device__ double sum_block(double value) {
    __shared__ double sums[threads / warp];
    for (int step = warp / 2; step > 0; step /= 2) value += __shfl_down_sync(0xffffffffu, value, step);
    if (threadIdx.x % warp == 0) sums[threadIdx.x / warp] = value;
    __syncthreads();
    double total = 0;
    if (threadIdx.x == 0)
        for (int i = 0; i < threads / warp; ++i) total += sums[i];
    return total;
}

// *out (+)= sum of parts / *divide_by, on one block.
__global__ void __launch_bounds__(threads)
    add_parts(const double* parts, int count, const double* divide_by, bool accumulate, double* out) {
    double sum = 0;
    for (int i = threadIdx.x; i < count; i += threads) sum += parts[i];
    sum = sum_block(sum);
    if (threadIdx.x != 0) return;
    if (divide_by != nullptr) sum *= 1 / *divide_by;
    *out = accumulate ? *out + sum : sum;
}

// ---- one element ----

template <class A>
struct Sample {
    int64_t class_;  // counted from x[0]
    A factor;        // 0 where ignored
};

template <class A>
__device__ Sample<A> sample_at(const AmplifyArgs& a, int64_t sample) {
    if (a.target == nullptr) return {0, A(1)};
    const int64_t target = a.target[sample];
    if (target == a.ignore_index) return {-1, A(0)};
    assert(target >= 0 && target < a.all_classes && "Target is out of bounds.");
    if (target < 0 || target >= a.all_classes) return {-1, A(0)};  // where assertions are compiled out
    return {target - a.class_offset, a.weight == nullptr ? A(1) : static_cast<const A*>(a.weight)[target]};
}

template <Amplifier amplifier, class T>
struct Compute {
    typedef typename Element<T>::A A;
    const AmplifyArgs& a;
    AmplifierSettings<A> s;
    A scale, limit;  // of gradients; where those of 16 bits saturate

    __device__ explicit Compute(const AmplifyArgs& args)
        : a(args), s{A(a.alpha), A(a.beta), A(log(a.alpha)), A(a.max_input)} {
        const A factor = a.factor == nullptr ? A(1) : *static_cast<const A*>(a.factor);
        scale = static_cast<A>(a.denominator == nullptr ? double(factor) : 1 / *a.denominator * factor);
        limit = Element<T>::largest * (factor < A(0) ? -factor : factor);
    }

    // The gradient of element i, class c, of a sample, and its loss times the class's weight.
    __device__ T operator()(T value, int64_t i, int64_t c, const Sample<A>& sample, A& loss) const {
        loss = A(0);
        if (sample.factor == A(0)) return Element<T>::store(A(0));
        const bool dense = a.target == nullptr;
        const A t = dense ? static_cast<const A*>(a.dense)[i] : static_cast<A>(sample.class_ == c ? a.t_pos : a.t_neg);
        const A w = dense && a.weight != nullptr ? static_cast<const A*>(a.weight)[c] : A(1);
        const A y = amplify_element<NumberMath<A>, amplifier>(Element<T>::load(value), t, s, loss);
        loss *= w * sample.factor;
        return Element<T>::store(Element<T>::saturate((y - t) * (w * sample.factor * scale), limit));
    }
};

// ---- kernels; Index: 32 bits where they reach, since divisions of 64 are slow ----

// Where element i is.
template <class Index>
struct Position {
    Index sample, c;
    __device__ Position(Index i, Index classes, Index inner) {
        const Index line = i / inner, outer = line / classes;
        c = line - outer * classes;
        sample = outer * inner + (i - line * inner);
    }
};

template <Amplifier amplifier, class T, class Index>
__global__ void __launch_bounds__(threads) amplify_sum(AmplifyArgs a, bool packed) {
    typedef typename Element<T>::A A;
    const Compute<amplifier, T> compute(a);
    const T* x = static_cast<const T*>(a.x);
    T* grad = static_cast<T*>(a.grad);
    const Index size = static_cast<Index>(a.outer * a.classes * a.inner), classes = static_cast<Index>(a.classes),
                inner = static_cast<Index>(a.inner), stride = static_cast<Index>(gridDim.x) * threads;
    const Index packs = packed ? size / pack<T> : 0;
    double total = 0;
    for (Index p = blockIdx.x * Index(threads) + threadIdx.x; p < packs; p += stride) {
        Pack<T> values = reinterpret_cast<const Pack<T>*>(x)[p];
        A sum = A(0);
        Index known = ~Index(0);
        Sample<A> sample{};
#pragma unroll
        for (int k = 0; k < pack<T>; ++k) {
            const Index i = p * pack<T> + k;
            const Position<Index> at(i, classes, inner);
            if (at.sample != known) sample = sample_at<A>(a, at.sample), known = at.sample;
            A loss;
            values.at[k] = compute(values.at[k], i, at.c, sample, loss);
            sum += loss;
        }
        if (grad != nullptr) reinterpret_cast<Pack<T>*>(grad)[p] = values;
        total += sum;
    }
    for (Index i = packs * pack<T> + blockIdx.x * Index(threads) + threadIdx.x; i < size; i += stride) {
        const Position<Index> at(i, classes, inner);
        A loss;
        const T g = compute(x[i], i, at.c, sample_at<A>(a, at.sample), loss);
        if (grad != nullptr) grad[i] = g;
        total += loss;
    }
    total = sum_block(total);
    if (threadIdx.x == 0) a.scratch[blockIdx.x] = total;
}

// A warp a sample, or (inner > 1) a thread a sample.
template <Amplifier amplifier, class T>
__global__ void __launch_bounds__(threads) amplify_samples(AmplifyArgs a) {
    typedef typename Element<T>::A A;
    const Compute<amplifier, T> compute(a);
    const T* x = static_cast<const T*>(a.x);
    T* grad = static_cast<T*>(a.grad);
    const int team = a.inner == 1 ? warp : 1;
    const int64_t samples = a.outer * a.inner, teams = static_cast<int64_t>(gridDim.x) * threads / team;
    const int member = threadIdx.x % team;
    for (int64_t n = (static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x) / team; n < samples; n += teams) {
        const Sample<A> sample = sample_at<A>(a, n);
        const int64_t start = n / a.inner * a.classes * a.inner + n % a.inner;
        double total = 0;
        for (int64_t c = member; c < a.classes; c += team) {
            const int64_t i = start + c * a.inner;
            A loss;
            const T g = compute(x[i], i, c, sample, loss);
            if (grad != nullptr) grad[i] = g;
            total += loss;
        }
        for (int step = team / 2; step > 0; step /= 2) total += __shfl_down_sync(0xffffffffu, total, step);
        if (member == 0) a.losses[n] = a.accumulate ? a.losses[n] + total : total;
    }
}

template <class W>
__global__ void __launch_bounds__(threads) denominator_parts(DenominatorArgs a) {
    double sum = 0;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x; i < a.count;
         i += static_cast<int64_t>(gridDim.x) * threads) {
        const int64_t t = a.target[i];
        if (t == a.ignore_index || t < 0 || t >= a.classes) continue;  // amplify asserts that it is inside
        sum += a.weight == nullptr ? 1.0 : double(static_cast<const W*>(a.weight)[t]);
    }
    sum = sum_block(sum);
    if (threadIdx.x == 0) a.scratch[blockIdx.x] = sum;
}

template <class T>
__global__ void __launch_bounds__(threads) scale_elements(ScaleArgs a, bool packed) {
    typedef typename Element<T>::A A;
    const A* factor = static_cast<const A*>(a.factor);
    T* grad = static_cast<T*>(a.grad);
    if (!a.per_sample && *factor == A(1)) return;
    const int64_t size = a.outer * a.classes * a.inner, stride = static_cast<int64_t>(gridDim.x) * threads;
    const int64_t first = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x;
    const int64_t packs = packed && !a.per_sample ? size / pack<T> : 0;
    for (int64_t p = first; p < packs; p += stride) {
        Pack<T> values = reinterpret_cast<Pack<T>*>(grad)[p];
#pragma unroll
        for (int k = 0; k < pack<T>; ++k) values.at[k] = Element<T>::store(Element<T>::load(values.at[k]) * *factor);
        reinterpret_cast<Pack<T>*>(grad)[p] = values;
    }
    for (int64_t i = packs * pack<T> + first; i < size; i += stride) {
        const Position<int64_t> at(i, a.classes, a.inner);
        grad[i] = Element<T>::store(Element<T>::load(grad[i]) * factor[a.per_sample ? at.sample : 0]);
    }
}

// Blocks for `work` items of a thread, at most as many as there are partial sums, 8 to a multiprocessor.
int blocks_for(int64_t work, int device) {
    const int64_t wanted = (work + threads - 1) / threads;
    const int64_t most =
        amplify_partials < 8 * multiprocessors(device) ? amplify_partials : 8 * multiprocessors(device);
    return static_cast<int>(wanted < 1 ? 1 : wanted < most ? wanted : most);
}

template <Amplifier amplifier, class T>
void launch_amplify(const AmplifyArgs& a, const Launch& on) {
    const int64_t size = a.outer * a.classes * a.inner, samples = a.outer * a.inner;
    if (a.per_sample) {
        if (samples == 0) return;
        const int blocks = blocks_for(samples * (a.inner == 1 ? warp : 1), on.device);
        return launch("amplify: losses of samples", amplify_samples<amplifier, T>, blocks, threads, on, a);
    }
    const bool packed = is_aligned(a.x) && (a.grad == nullptr || is_aligned(a.grad));
    const int blocks = blocks_for(packed ? size / pack<T> : size, on.device);
    const auto kernel =
        size < (int64_t{1} << 31) ? amplify_sum<amplifier, T, uint32_t> : amplify_sum<amplifier, T, uint64_t>;
    launch("amplify: sum of losses", kernel, blocks, threads, on, a, packed);
    launch("amplify: total", add_parts, 1, threads, on, a.scratch, blocks, a.denominator, a.accumulate, a.losses);
}

// run(T()) for the type of `type`.
template <class F>
void with_type(ElementType type, const F& run) {
    switch (type) {
        case ElementType::float16:
            return run(__half());
        case ElementType::bfloat16:
            return run(__nv_bfloat16());
        case ElementType::float32:
            return run(float());
        default:
            return run(double());
    }
}

}  // namespace

namespace cuda {

void amplify(const AmplifyArgs& args, const Launch& on) {
    const DeviceGuard guard(on.device);
    with_type(args.type, [&](auto element) {
        typedef decltype(element) T;
        switch (args.amplifier) {
            case Amplifier::exp:
                return launch_amplify<Amplifier::exp, T>(args, on);
            case Amplifier::pow3:
                return launch_amplify<Amplifier::pow3, T>(args, on);
            default:
                return launch_amplify<Amplifier::linear, T>(args, on);
        }
    });
}

void sum_denominator(const DenominatorArgs& args, const Launch& on) {
    const DeviceGuard guard(on.device);
    const int blocks = blocks_for(args.count, on.device);
    const auto kernel = args.is_double ? denominator_parts<double> : denominator_parts<float>;
    launch("sum_denominator: parts", kernel, blocks, threads, on, args);
    launch("sum_denominator: total", add_parts, 1, threads, on, args.scratch, blocks, nullptr, false, args.denominator);
}

void scale_gradient(const ScaleArgs& args, const Launch& on) {
    const DeviceGuard guard(on.device);
    const int64_t size = args.outer * args.classes * args.inner;
    if (size == 0) return;
    const bool packed = is_aligned(args.grad);
    with_type(args.type, [&](auto element) {
        typedef decltype(element) T;
        const int blocks = blocks_for(packed && !args.per_sample ? size / pack<T> : size, on.device);
        launch("scale_gradient", scale_elements<T>, blocks, threads, on, args, packed);
    });
}

}  // namespace cuda
}  // namespace platonic
