// Rows are taken in small groups that stay in the first-level cache: their dot products with all vectors first, then
// the sum of the rows weighted by those. So memory is read once a pass, whatever the number of vectors.
#include "platonic/sorted_pca_simd.h"

#include "common/simd.h"

namespace platonic {
namespace PLATONIC_ISA {
namespace {

// group_rows x 4 accumulators, group_rows rows and a vector fit the registers.
constexpr int group_rows = vector_registers >= 32 ? 4 : 2;

// Sum of 2^k numbers by halving, in the same order for every vector.
template <class T, int count>
PLATONIC_INLINE T sum_halves(const T* v) {
    if constexpr (count == 2) {
        return v[0] + v[1];
    } else {
        typedef T half __attribute__((vector_size(count / 2 * sizeof(T))));
        half low, high;
        std::memcpy(&low, v, sizeof low);
        std::memcpy(&high, v + count / 2, sizeof high);
        low += high;
        T sums[count / 2];
        std::memcpy(sums, &low, sizeof low);
        return sum_halves<T, count / 2>(sums);
    }
}
template <class T>
PLATONIC_INLINE T sum_lanes(vec_t<T> v) {
    T parts[lanes<T>];
    std::memcpy(parts, &v, sizeof v);
    return sum_halves<T, lanes<T>>(parts);
}

// A group of rows of x or y; rows past the end repeat the last one.
template <class T>
struct Group {
    const T* row[group_rows];
    int64_t columns, start;  // start: of its columns in padded vectors

    Group(const void* data, int64_t stride, int64_t columns, int64_t start, int64_t first, int64_t rows)
        : columns(columns), start(start) {
        for (int r = 0; r < group_rows; ++r)
            row[r] = static_cast<const T*>(data) + (first + (r < rows ? r : rows - 1)) * stride;
    }
};

template <class T, bool whole>
PLATONIC_INLINE vec_t<T> load_columns(const T* p, int64_t count) {
    return whole ? load(p) : load_some(p, count);
}

// The rows of a group less the shift, over one vector of columns. Of the group that follows, `ahead` elements further,
// every other row is fetched: half in add_dots, half in add_rows, so that memory is never idle. Past the end of the
// data a fetch does nothing.
template <class T, bool whole, int fetched>
PLATONIC_INLINE void load_rows(const Group<T>& g, int64_t c, int64_t ahead, const T* shift, vec_t<T> (&v)[group_rows]) {
    const vec_t<T> s = load(shift + g.start + c);
#pragma GCC unroll 4
    for (int r = 0; r < group_rows; ++r) {
        if (r % 2 == fetched) __builtin_prefetch(g.row[r] + ahead + c, 0, 2);
        v[r] = load_columns<T, whole>(g.row[r] + c, g.columns - c) - s;
    }
}

// dots[r][b] += (row[r] - shift) . vectors[b] over one vector of columns.
template <class T, int B, bool whole>
PLATONIC_INLINE void add_dots(const Group<T>& g, int64_t c, int64_t ahead, const T* shift, const T* vectors,
                              int64_t size, vec_t<T> (&dots)[group_rows][B]) {
    vec_t<T> v[group_rows];
    load_rows<T, whole, 0>(g, c, ahead, shift, v);
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) {
        const vec_t<T> w = load(vectors + b * size + g.start + c);
#pragma GCC unroll 4
        for (int r = 0; r < group_rows; ++r) dots[r][b] += v[r] * w;
    }
}

// acc[b] += sum_r factors[r][b] (row[r] - shift) over one vector of columns.
template <class T, int F, bool whole>
PLATONIC_INLINE void add_rows(const Group<T>& g, int64_t c, int64_t ahead, const T* shift, int64_t size,
                              const vec_t<T> (&factors)[group_rows][F], T* acc) {
    vec_t<T> v[group_rows];
    load_rows<T, whole, 1>(g, c, ahead, shift, v);
#pragma GCC unroll 5
    for (int b = 0; b < F; ++b) {
        T* out = acc + b * size + g.start + c;
        vec_t<T> sum = load(out);
#pragma GCC unroll 4
        for (int r = 0; r < group_rows; ++r) sum += v[r] * factors[r][b];
        store(out, sum);
    }
}

template <class T, int B>
PLATONIC_INLINE void dots_of(const Group<T>& g, int64_t ahead, const T* shift, const T* vectors, int64_t size,
                             vec_t<T> (&dots)[group_rows][B]) {
    int64_t c = 0;
    for (; c + lanes<T> <= g.columns; c += lanes<T>) add_dots<T, B, true>(g, c, ahead, shift, vectors, size, dots);
    if (c < g.columns) add_dots<T, B, false>(g, c, ahead, shift, vectors, size, dots);
}

template <class T, int F>
PLATONIC_INLINE void rows_of(const Group<T>& g, int64_t ahead, const T* shift, int64_t size,
                             const vec_t<T> (&factors)[group_rows][F], T* acc) {
    int64_t c = 0;
    for (; c + lanes<T> <= g.columns; c += lanes<T>) add_rows<T, F, true>(g, c, ahead, shift, size, factors, acc);
    if (c < g.columns) add_rows<T, F, false>(g, c, ahead, shift, size, factors, acc);
}

// F = B, or B + 1 with the sums: the last factor is the row's weight.
template <class T, int B, int F>
void run_product(const CentredProductArgs& a, const PaddedColumns& padded, const T* shift, const T* vectors,
                 int64_t first, int64_t rows, T* acc) {
    const JoinedRows& d = a.data;
    const T* weight = static_cast<const T*>(a.row_weight);
    T* out = static_cast<T*>(a.dots);
    for (int64_t done = 0; done < rows; done += group_rows) {
        const int64_t row = first + done, here = rows - done < group_rows ? rows - done : group_rows;
        const int64_t x_ahead = group_rows * d.row_stride, y_ahead = group_rows * d.targets;
        const Group<T> x(d.x, d.row_stride, d.columns, 0, row, here);
        const Group<T> y(d.y, d.targets, d.targets, padded.y_start, row, here);
        vec_t<T> dots[group_rows][B] = {};
        dots_of<T, B>(x, x_ahead, shift, vectors, padded.size, dots);
        dots_of<T, B>(y, y_ahead, shift, vectors, padded.size, dots);
        vec_t<T> factors[group_rows][F];
        for (int r = 0; r < group_rows; ++r) {
            const T w = r >= here ? T(0) : weight == nullptr ? T(1) : weight[row + r];
            for (int b = 0; b < B; ++b) {
                const T dot = sum_lanes<T>(dots[r][b]);
                factors[r][b] = splat<T>(w * dot);
                if (out != nullptr && r < here) out[(row + r) * B + b] = dot;
            }
            if (F > B) factors[r][F - 1] = splat<T>(w);
        }
        rows_of<T, F>(x, x_ahead, shift, padded.size, factors, acc);
        rows_of<T, F>(y, y_ahead, shift, padded.size, factors, acc);
    }
}

template <class T, int B>
void choose_sums(const CentredProductArgs& a, const PaddedColumns& padded, const void* shift, const void* vectors,
                 int64_t first, int64_t rows, void* acc) {
    const T *s = static_cast<const T*>(shift), *v = static_cast<const T*>(vectors);
    T* out = static_cast<T*>(acc);
    if (a.sums == nullptr)
        run_product<T, B, B>(a, padded, s, v, first, rows, out);
    else
        run_product<T, B, B + 1>(a, padded, s, v, first, rows, out);
}

template <class T>
void choose_product(const CentredProductArgs& a, const PaddedColumns& padded, const void* shift, const void* vectors,
                    int64_t first, int64_t rows, void* acc) {
    switch (a.count) {
        case 1:
            return choose_sums<T, 1>(a, padded, shift, vectors, first, rows, acc);
        case 2:
            return choose_sums<T, 2>(a, padded, shift, vectors, first, rows, acc);
        case 3:
            return choose_sums<T, 3>(a, padded, shift, vectors, first, rows, acc);
        default:
            return choose_sums<T, 4>(a, padded, shift, vectors, first, rows, acc);
    }
}

typedef float vhalf __attribute__((vector_size(PLATONIC_VECTOR_BYTES / 2)));

PLATONIC_INLINE vdouble load_double(const double* p) { return load(p); }
PLATONIC_INLINE vdouble load_double(const float* p) {
    vhalf v;
    std::memcpy(&v, p, sizeof v);
    return __builtin_convertvector(v, vdouble);
}

template <class T>
PLATONIC_INLINE void add_projection(const Group<T>& g, const double* shift, const double* direction,
                                    vdouble (&sum)[group_rows]) {
    constexpr int64_t L = lanes<double>;
    for (int64_t c = 0; c < g.columns; c += L) {
        const vdouble s = load(shift + g.start + c), d = load(direction + g.start + c);
        const bool whole = c + L <= g.columns;
#pragma GCC unroll 4
        for (int r = 0; r < group_rows; ++r) {
            T tail[L] = {};
            if (!whole) std::memcpy(tail, g.row[r] + c, (g.columns - c) * sizeof(T));
            sum[r] += (load_double(whole ? g.row[r] + c : tail) - s) * d;
        }
    }
}

template <class T>
void run_projection(const ProjectRowsArgs& a, const PaddedColumns& padded, const double* shift, const double* direction,
                    int64_t first, int64_t rows) {
    const JoinedRows& d = a.data;
    for (int64_t done = 0; done < rows; done += group_rows) {
        const int64_t row = first + done, here = rows - done < group_rows ? rows - done : group_rows;
        vdouble sum[group_rows] = {};
        add_projection(Group<T>(d.x, d.row_stride, d.columns, 0, row, here), shift, direction, sum);
        add_projection(Group<T>(d.y, d.targets, d.targets, padded.y_start, row, here), shift, direction, sum);
        for (int r = 0; r < here; ++r) a.out[row + r] = sum_lanes<double>(sum[r]);
    }
}

}  // namespace

void product_chunk(const CentredProductArgs& args, const PaddedColumns& padded, const void* shift, const void* vectors,
                   int64_t first, int64_t rows, void* acc) {
    if (args.data.is_double)
        choose_product<double>(args, padded, shift, vectors, first, rows, acc);
    else
        choose_product<float>(args, padded, shift, vectors, first, rows, acc);
}

void project_chunk(const ProjectRowsArgs& args, const PaddedColumns& padded, const double* shift,
                   const double* direction, int64_t first, int64_t rows) {
    if (args.data.is_double)
        run_projection<double>(args, padded, shift, direction, first, rows);
    else
        run_projection<float>(args, padded, shift, direction, first, rows);
}

}  // namespace PLATONIC_ISA
}  // namespace platonic
