// Lines of contiguous elements, a vector at a time: along the classes of a sample, or along the pixels of a class.
#include "gradamp/amplify_simd.h"

#include "gradamp/amplify_lanes.h"

namespace platonic {
namespace PLATONIC_ISA {
namespace {

template <class A>
PLATONIC_INLINE ivec_t<A> lane_numbers() {
    ivec_t<A> v;
    for (int i = 0; i < lanes<A>; ++i) v[i] = i;
    return v;
}

template <class A>
PLATONIC_INLINE ivec_t<A> load_classes(const int_t<A>* p) {
    ivec_t<A> v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

// Where gradients go: nowhere (null), to memory by way of the caches, or past them, which saves reading the lines that
// are overwritten.
template <class S>
struct Output {
    typedef typename S::A A;
    typename S::element* start;
    bool streams;
    A limit;  // where 16-bit gradients saturate

    Output(const AmplifyArgs& a, int64_t offset)
        : start(a.grad == nullptr ? nullptr : static_cast<typename S::element*>(a.grad) + offset),
          streams(a.streams),
          limit(S::largest) {
        if (a.factor != nullptr) limit *= *static_cast<const A*>(a.factor);
        if (limit < 0) limit = -limit;
    }
    PLATONIC_INLINE void put(int64_t i, vec_t<A> v) const {
        if (start == nullptr) return;
        if (streams)
            S::stream(start + i, saturated(v));
        else
            S::store(start + i, saturated(v));
    }
    PLATONIC_INLINE void prefetch(int64_t i) const {
        if (start != nullptr && !streams) __builtin_prefetch(start + i, 1, 2);
    }
    PLATONIC_INLINE void put_first(int64_t i, vec_t<A> v, int64_t count) const {
        if (start != nullptr) store_first<S>(start + i, saturated(v), count);
    }
    PLATONIC_INLINE void put_zeros(int64_t count) const {
        if (start != nullptr) std::memset(start, 0, count * sizeof *start);
    }
    PLATONIC_INLINE void advance(int64_t count) {
        if (start != nullptr) start += count;
    }

private:
    // NaN passes; infinity becomes the limit.
    PLATONIC_INLINE vec_t<A> saturated(vec_t<A> v) const {
        if constexpr (sizeof(typename S::element) == sizeof(A)) return v;
        return max(splat<A>(-limit), min(splat<A>(limit), v));
    }
};

template <class A>
PLATONIC_INLINE AmplifierSettings<A> settings(const AmplifyArgs& a) {
    return {static_cast<A>(a.alpha), static_cast<A>(a.beta), static_cast<A>(__builtin_log(a.alpha)),
            static_cast<A>(a.max_input)};
}

// weight[target] of a sample, 0 where it is ignored.
template <class A>
PLATONIC_INLINE A sample_factor(const AmplifyArgs& a, int64_t target) {
    if (target == a.ignore_index) return A(0);
    return a.weight == nullptr ? A(1) : static_cast<const A*>(a.weight)[target];
}

// total += the lanes of v, in pairs.
PLATONIC_INLINE void add_wide(vdouble& total, vdouble v) { total += v; }
PLATONIC_INLINE void add_wide(vdouble& total, vfloat v) {
    typedef float half __attribute__((vector_size(PLATONIC_VECTOR_BYTES / 2)));
    half halves[2];
    std::memcpy(halves, &v, sizeof v);
    total += __builtin_convertvector(halves[0], vdouble) + __builtin_convertvector(halves[1], vdouble);
}

constexpr int64_t sum_length = 64;  // numbers of A that are added before a sum goes on in float64

// ---- along the classes of a sample ----

template <bool value>
struct Flag {
    static constexpr bool is = value;
};

// One row with one target class, counted from x[0], any number outside of the row where it is elsewhere. Adds the
// losses to `total`, unscaled; the gradient is times `factor`.
template <Amplifier amplifier, class S>
PLATONIC_INLINE void index_row(const AmplifierSettings<typename S::A>& s, const typename S::element* x, Output<S> grad,
                               int64_t count, int64_t class_, typename S::A t_neg, typename S::A t_pos,
                               typename S::A factor, vdouble& total) {
    typedef typename S::A A;
    typedef vec_t<A> vec;
    constexpr int64_t width = lanes<A>;
    constexpr int64_t ahead = 4096 / static_cast<int64_t>(sizeof *x);
    const ivec_t<A> numbers = lane_numbers<A>();
    const vec negative = splat<A>(t_neg), positive = splat<A>(t_pos);
    vec sum = {};
    const auto targets = [&](int64_t c) __attribute__((always_inline)) {
        const int64_t lane = class_ - c;
        return numbers == static_cast<int_t<A>>(lane >= 0 && lane < width ? lane : -1) ? positive : negative;
    };
    // Vectors from c up to end, all their targets t_neg.
    const auto run = [&](auto zero, int64_t c, int64_t end) __attribute__((always_inline)) {
        for (; c < end; c += width) {
            // Rows are about as long as pages, at whose ends the hardware stops prefetching.
            __builtin_prefetch(x + c + ahead, 0, 2);
            grad.prefetch(c + ahead);
            vec loss;
            const vec y =
                amplify_element<VectorMath<A>, amplifier, decltype(zero)::is>(S::load(x + c), negative, s, loss);
            grad.put(c, (y - negative) * factor);
            sum += loss;
        }
    };
    const auto run_negative = [&](int64_t c, int64_t end) __attribute__((always_inline)) {
        t_neg == A(0) ? run(Flag<true>(), c, end) : run(Flag<false>(), c, end);
    };
    const int64_t whole = count - count % width, hit = class_ >= 0 ? class_ / width * width : -1;
    for (int64_t c = 0; c < whole;) {
        const int64_t end = c + sum_length * width < whole ? c + sum_length * width : whole;
        if (c <= hit && hit < end) {
            run_negative(c, hit);
            vec loss;
            const vec t = targets(hit), y = amplify_element<VectorMath<A>, amplifier>(S::load(x + hit), t, s, loss);
            grad.put(hit, (y - t) * factor);
            sum += loss;
            c = hit + width;
        }
        run_negative(c, end);
        add_wide(total, sum);
        sum = vec{};
        c = end;
    }
    if (whole < count) {
        const int64_t rest = count - whole;
        vec loss;
        const vec t = targets(whole);
        const vec y = amplify_element<VectorMath<A>, amplifier>(load_first<S>(x + whole, rest), t, s, loss);
        grad.put_first(whole, (y - t) * factor, rest);
        add_wide(total, numbers < static_cast<int_t<A>>(rest) ? loss : sum);
    }
}

// One row with dense targets; class weights or null.
template <Amplifier amplifier, class S>
PLATONIC_INLINE void dense_row(const AmplifierSettings<typename S::A>& s, const typename S::element* x, Output<S> grad,
                               int64_t count, const typename S::A* dense, const typename S::A* weight,
                               typename S::A factor, vdouble& total) {
    typedef typename S::A A;
    typedef vec_t<A> vec;
    constexpr int64_t width = lanes<A>;
    const vec zero = {}, one = splat<A>(A(1));
    vec sum = {};
    int64_t c = 0;
    for (; c + width <= count; c += width) {
        vec loss;
        const vec t = load(dense + c), w = weight != nullptr ? load(weight + c) : one;
        const vec y = amplify_element<VectorMath<A>, amplifier>(S::load(x + c), t, s, loss);
        grad.put(c, (y - t) * (w * factor));
        sum += w * loss;
        if (c / width % sum_length == sum_length - 1) add_wide(total, sum), sum = zero;
    }
    if (c < count) {
        const int64_t rest = count - c;
        vec loss;
        const vec t = load_some(dense + c, rest), w = weight != nullptr ? load_some(weight + c, rest) : one;
        const vec y = amplify_element<VectorMath<A>, amplifier>(load_first<S>(x + c, rest), t, s, loss);
        grad.put_first(c, (y - t) * (w * factor), rest);
        sum += lane_numbers<A>() < static_cast<int_t<A>>(rest) ? w * loss : zero;
    }
    add_wide(total, sum);
}

template <Amplifier amplifier, class S>
double rows_of(const AmplifyArgs& a, double scale, int64_t first, int64_t rows) {
    typedef typename S::A A;
    typedef typename S::element element;
    const AmplifierSettings<A> s = settings<A>(a);
    const int64_t n = a.classes;
    vdouble total = {};
    for (int64_t i = first; i < first + rows; ++i) {
        const element* x = static_cast<const element*>(a.x) + i * n;
        const Output<S> grad(a, i * n);
        vdouble loss = {};
        if (a.dense != nullptr) {
            dense_row<amplifier, S>(s, x, grad, n, static_cast<const A*>(a.dense) + i * n,
                                    static_cast<const A*>(a.weight), static_cast<A>(scale), loss);
        } else {
            const A f = sample_factor<A>(a, a.target[i]);
            if (f != A(0)) {
                index_row<amplifier, S>(s, x, grad, n, a.target[i] - a.class_offset, static_cast<A>(a.t_neg),
                                        static_cast<A>(a.t_pos), static_cast<A>(f * scale), loss);
                loss *= static_cast<double>(f);
            } else {
                grad.put_zeros(n);
            }
        }
        if (a.per_sample) a.losses[i] = horizontal_sum<double>(loss) + (a.accumulate ? a.losses[i] : 0);
        total += loss;
    }
    return horizontal_sum<double>(total);
}

// ---- along the pixels of a class ----

// What a chunk of pixels keeps from class to class.
template <class A>
struct Chunk {
    alignas(64) int_t<A> class_[amplify_max_pixels];  // counted from x[0], -1 where it is elsewhere
    alignas(64) A factor[amplify_max_pixels];         // of the gradient
    alignas(64) A sum[amplify_max_pixels];            // of losses over at most sum_length classes
    alignas(64) double total[amplify_max_pixels];     // of losses
};

// Fills class_ and factor, zeros after the last pixel. Returns whether some factor is 0.
template <class A>
bool read_targets(Chunk<A>& k, const AmplifyArgs& a, const int64_t* target, double scale, int64_t count,
                  int64_t padded) {
    const A whole = static_cast<A>(scale);
    bool any = false;
    for (int64_t p = 0; p < count; ++p) {
        const int64_t c = target[p] - a.class_offset;
        k.class_[p] = static_cast<uint64_t>(c) < static_cast<uint64_t>(a.classes) ? static_cast<int_t<A>>(c) : -1;
        any |= target[p] == a.ignore_index;
    }
    if (a.weight == nullptr) {
        for (int64_t p = 0; p < count; ++p) k.factor[p] = target[p] == a.ignore_index ? A(0) : whole;
    } else {
        for (int64_t p = 0; p < count; ++p) {
            const A f = sample_factor<A>(a, target[p]);
            k.factor[p] = f == A(0) ? A(0) : static_cast<A>(f * scale);
            any |= f == A(0);
        }
    }
    for (int64_t p = count; p < padded; ++p) k.class_[p] = -1, k.factor[p] = 0;
    return any;
}

template <Amplifier amplifier, class S, bool is_dense>
double chunk_of(const AmplifyArgs& a, double scale, int64_t outer, int64_t first, int64_t count) {
    typedef typename S::A A;
    typedef typename S::element element;
    typedef vec_t<A> vec;
    constexpr int64_t width = lanes<A>;
    const AmplifierSettings<A> s = settings<A>(a);
    const vec t_neg = splat<A>(static_cast<A>(a.t_neg)), t_pos = splat<A>(static_cast<A>(a.t_pos)), none = {};
    Chunk<A> k;
    const int64_t padded = (count + width - 1) / width * width, pixel = outer * a.inner + first;
    const bool any_zero = !is_dense && read_targets<A>(k, a, a.target + pixel, scale, count, padded);
    std::memset(k.sum, 0, padded * sizeof(A));
    std::memset(k.total, 0, padded * sizeof(double));
    const int64_t start = outer * a.classes * a.inner + first;
    const element* x = static_cast<const element*>(a.x) + start;
    Output<S> grad(a, start);
    const A* dense = is_dense ? static_cast<const A*>(a.dense) + start : nullptr;
    for (int64_t c = 0; c < a.classes; ++c) {
        const A w = is_dense && a.weight != nullptr ? static_cast<const A*>(a.weight)[c] : A(1);
        const A class_factor = static_cast<A>(w * scale);
        // Adds the losses of a vector of pixels and returns its gradient.
        const auto step = [&](int64_t p, vec v, vec given) __attribute__((always_inline)) {
            const vec t = is_dense ? given : load_classes<A>(k.class_ + p) == static_cast<int_t<A>>(c) ? t_pos : t_neg;
            vec loss;
            const vec y = amplify_element<VectorMath<A>, amplifier>(v, t, s, loss);
            store(k.sum + p, load(k.sum + p) + (is_dense ? w * loss : loss));
            if constexpr (is_dense) return (y - t) * class_factor;
            const vec f = load(k.factor + p), g = (y - t) * f;
            return any_zero ? (f == none ? none : g) : g;
        };
        int64_t p = 0;
        for (; p + width <= count; p += width) {
            const vec g = step(p, S::load(x + p), is_dense ? load(dense + p) : none);
            grad.put(p, g);
        }
        if (p < count) {
            const vec given = is_dense ? load_some(dense + p, count - p) : none;
            const vec g = step(p, load_first<S>(x + p, count - p), given);
            grad.put_first(p, g, count - p);
        }
        if (c % sum_length == sum_length - 1 || c == a.classes - 1)
            for (p = 0; p < padded; ++p) k.total[p] += k.sum[p], k.sum[p] = 0;
        x += a.inner;
        grad.advance(a.inner);
        if (is_dense) dense += a.inner;
    }
    if (!is_dense && (any_zero || a.weight != nullptr))
        for (int64_t p = 0; p < count; ++p) {
            const A f = sample_factor<A>(a, a.target[pixel + p]);
            k.total[p] = f == A(0) ? 0 : k.total[p] * f;
        }
    if (a.per_sample)
        for (int64_t p = 0; p < count; ++p) a.losses[pixel + p] = k.total[p] + (a.accumulate ? a.losses[pixel + p] : 0);
    vdouble total = {};
    int64_t p = 0;
    for (; p + lanes<double> <= count; p += lanes<double>) total += load(k.total + p);
    if (p < count) total += load_some(k.total + p, count - p);
    return horizontal_sum<double>(total);
}

// ---- from run-time to compile-time choices: task.run<amplifier, S>() ----

template <class S, class Task>
double choose_amplifier(Amplifier amplifier, const Task& task) {
    switch (amplifier) {
        case Amplifier::exp:
            return task.template run<Amplifier::exp, S>();
        case Amplifier::pow3:
            return task.template run<Amplifier::pow3, S>();
        default:
            return task.template run<Amplifier::linear, S>();
    }
}

template <class Task>
double choose(const AmplifyArgs& a, const Task& task) {
    switch (a.type) {
        case ElementType::float16:
            return choose_amplifier<Half>(a.amplifier, task);
        case ElementType::bfloat16:
            return choose_amplifier<Bfloat>(a.amplifier, task);
        case ElementType::float32:
            return choose_amplifier<Plain<float>>(a.amplifier, task);
        default:
            return choose_amplifier<Plain<double>>(a.amplifier, task);
    }
}

struct Rows {
    const AmplifyArgs& args;
    double scale;
    int64_t first, rows;

    template <Amplifier amplifier, class S>
    double run() const {
        return rows_of<amplifier, S>(args, scale, first, rows);
    }
};

struct Pixels {
    const AmplifyArgs& args;
    double scale;
    int64_t outer, first, count;

    template <Amplifier amplifier, class S>
    double run() const {
        return args.dense != nullptr ? chunk_of<amplifier, S, true>(args, scale, outer, first, count)
                                     : chunk_of<amplifier, S, false>(args, scale, outer, first, count);
    }
};

template <class S>
void scale_elements(void* line, int64_t count, const void* factor, bool each) {
    typedef typename S::A A;
    constexpr int64_t width = lanes<A>;
    typename S::element* p = static_cast<typename S::element*>(line);
    const A* f = static_cast<const A*>(factor);
    int64_t i = 0;
    for (; i + width <= count; i += width) S::store(p + i, S::load(p + i) * (each ? load(f + i) : splat<A>(*f)));
    if (i < count) {
        const vec_t<A> last = each ? load_some(f + i, count - i) : splat<A>(*f);
        store_first<S>(p + i, load_first<S>(p + i, count - i) * last, count - i);
    }
}

}  // namespace

double amplify_rows(const AmplifyArgs& args, double scale, int64_t first, int64_t rows) {
    const double total = choose(args, Rows{args, scale, first, rows});
    finish_streams();
    return total;
}

double amplify_pixels(const AmplifyArgs& args, double scale, int64_t outer, int64_t first, int64_t count) {
    const double total = choose(args, Pixels{args, scale, outer, first, count});
    finish_streams();
    return total;
}

void scale_line(ElementType type, void* line, int64_t count, const void* factor, bool each) {
    switch (type) {
        case ElementType::float16:
            return scale_elements<Half>(line, count, factor, each);
        case ElementType::bfloat16:
            return scale_elements<Bfloat>(line, count, factor, each);
        case ElementType::float32:
            return scale_elements<Plain<float>>(line, count, factor, each);
        default:
            return scale_elements<Plain<double>>(line, count, factor, each);
    }
}

}  // namespace PLATONIC_ISA
}  // namespace platonic
