// Python's way into the kernels of this room. Pointers arrive as integers from weight_compression/_ops.py, which has
// checked dtypes, devices and layouts; nothing is checked again here. Whatever takes longer than a few microseconds
// releases the GIL.
#include "common/bindings.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "weight_compression/code_lengths.h"
#include "weight_compression/codec.h"
#include "weight_compression/crc32c.h"
#include "weight_compression/levels.h"
#include "weight_compression/payload_layout.h"

namespace py = pybind11;

namespace platonic {

void bind_device_codec(py::module_& m);  // bindings_device.cpp

namespace {

Values values(int dtype, int64_t n, uintptr_t x) { return {static_cast<DType>(dtype), pointer<const void>(x), n}; }

Launch on_cpu(int threads) { return {-1, threads, nullptr}; }

// (levels, lo, hi, group_size, address of the groups' ranges or 0, clamp), or of a plane (256, width, shift, rotate).
Scheme scheme(const py::tuple& fields) {
    Scheme s{};
    s.levels = fields[0].cast<int64_t>();
    if (fields.size() == 4) {
        s.plane = {fields[1].cast<int>(), fields[2].cast<int>(), fields[3].cast<bool>()};
        return s;
    }
    s.lo = fields[1].cast<double>();
    s.hi = fields[2].cast<double>();
    s.group_size = fields[3].cast<int64_t>();
    s.ranges = pointer<const void>(fields[4].cast<uintptr_t>());
    s.clamp = fields[5].cast<bool>();
    return s;
}

Blocks blocks(uintptr_t data, int64_t size, uintptr_t table, uintptr_t escapes) {
    return {pointer<const uint8_t>(data), size, pointer<const BlockEntry>(table), pointer<const uint32_t>(escapes)};
}

Shape shape_of(const std::vector<int64_t>& sizes) {
    if (sizes.size() > max_dimensions) throw std::invalid_argument("expected at most 64 dimensions");
    Shape shape{static_cast<int>(sizes.size()), {}};
    std::copy(sizes.begin(), sizes.end(), shape.sizes);
    return shape;
}

// (entropy_bits, floor_bits, fraction, sampled_from).
cpu::ByEntropy by_entropy(const py::tuple& fields) {
    return {fields[0].cast<int>(), fields[1].cast<double>(), fields[2].cast<double>(), fields[3].cast<int64_t>()};
}

std::tuple<int, int64_t> result_of(const DecodeResult& result) {
    return std::make_tuple(static_cast<int>(result.status), result.block);
}

}  // namespace

void bind_weight_compression(py::module_& m) {
    bind_device_codec(m);
    m.attr("block_symbols") = block_symbols;
    m.attr("max_levels") = max_levels;
    m.attr("max_coded_levels") = max_coded_levels;
    m.attr("max_block_bytes") = max_block_bytes;
    m.attr("sample_everything") = sample_everything;
    m.def("coded_bytes_bound", &coded_bytes_bound, py::arg("n"), py::arg("bits"));
    m.def("fixed_bits", &fixed_bits, py::arg("levels"));
    m.def("fixed_bytes", &fixed_bytes, py::arg("n"), py::arg("bits"));
    m.def("length_limit", &length_limit, py::arg("levels"));
    m.def("levels_of_bits", &levels_of_bits, py::arg("bits"));
    m.def("sample_size", &cpu::sample_size, py::arg("n"), py::arg("fraction"));
    m.def("sample_runs", &sample_runs, py::arg("n"), py::arg("fraction"));
    m.def("exact_log2", &exact_log2, py::arg("x"));
    m.def("exact_exp2", &exact_exp2, py::arg("x"));
    m.def(
        "histogram_entropy",
        [](const std::vector<int64_t>& counts) {
            return histogram_entropy(counts.data(), static_cast<int64_t>(counts.size()));
        },
        py::arg("counts"));
    m.def(
        "value_range",
        [](int dtype, int64_t n, uintptr_t x, double fraction, uintptr_t sample, int threads) {
            py::gil_scoped_release release;
            const Range range = cpu::value_range(values(dtype, n, x), fraction, pointer<void>(sample), on_cpu(threads));
            return std::make_tuple(range.lo, range.hi, range.finite);
        },
        "(lo, hi, whether all are finite) of n >= 1 values, and their sample unless its address is 0.");
    m.def(
        "group_ranges",
        [](int dtype, int64_t n, uintptr_t x, int64_t size, uintptr_t ranges, int threads) {
            py::gil_scoped_release release;
            cpu::group_ranges(values(dtype, n, x), size, pointer<void>(ranges), on_cpu(threads));
        },
        "ranges[groups][2] of every run of `size` values.");
    m.def(
        "levels_of_error",
        [](int dtype, int64_t n, const py::tuple& fields, double max_error) {
            return cpu::levels_of_error(scheme(fields), static_cast<DType>(dtype), n, max_error);
        },
        "The fewest levels that keep to an error, or 0.");
    m.def(
        "error_bound",
        [](int dtype, int64_t n, const py::tuple& fields) {
            return cpu::error_bound(scheme(fields), static_cast<DType>(dtype), n);
        },
        "Half a bin of the widest range.");
    m.def(
        "add_values",
        [](int dtype, int64_t n, uintptr_t values, uintptr_t out, double scale, int threads) {
            py::gil_scoped_release release;
            cpu::add_values(pointer<const void>(values), n,
                            {static_cast<DType>(dtype), pointer<void>(out), true, scale}, on_cpu(threads));
        },
        "out += scale * values.");
    m.def(
        "count_outside",
        [](int dtype, int64_t n, uintptr_t x, double lo, double hi, uintptr_t counts, int threads) {
            py::gil_scoped_release release;
            cpu::count_outside(values(dtype, n, x), lo, hi, pointer<uint32_t>(counts), on_cpu(threads));
        },
        "counts[blocks] of values beyond lo and hi.");
    m.def(
        "sample_counts",
        [](int dtype, int64_t n, uintptr_t x, const py::tuple& fields, double fraction, uintptr_t counts) {
            const Scheme s = scheme(fields);
            py::gil_scoped_release release;
            cpu::sample_counts(values(dtype, n, x), s, fraction, pointer<int64_t>(counts));
        },
        "counts[levels] of the sample's symbols.");
    m.def(
        "symbol_counts",
        [](int dtype, int64_t n, uintptr_t x, const py::tuple& fields, uintptr_t counts, int threads) {
            const Scheme s = scheme(fields);
            py::gil_scoped_release release;
            cpu::symbol_counts(values(dtype, n, x), s, pointer<int64_t>(counts), on_cpu(threads));
        },
        "counts[levels] of all symbols.");
    m.def(
        "code_lengths",
        [](int64_t levels, uintptr_t counts, uintptr_t lengths) {
            py::gil_scoped_release release;
            code_lengths(pointer<const int64_t>(counts), levels, pointer<uint8_t>(lengths));
        },
        "lengths[levels] of the optimal code, none longer than length_limit(levels).");
    m.attr("sample_coded_from") = sample_coded_from;
    m.attr("sample_weight") = sample_weight;
    m.def(
        "is_complete_code",
        [](int64_t levels, uintptr_t lengths) {
            CanonicalCode code;
            return make_canonical(pointer<const uint8_t>(lengths), levels, &code);
        },
        "Whether the sum of 2^-length is 1 and no length is over 14.");
    m.def(
        "pack_lengths",
        [](int64_t levels, uintptr_t lengths) {
            std::string bytes(levels / 2 + 1, '\0');
            bytes.resize(pack_lengths(pointer<const uint8_t>(lengths), levels, reinterpret_cast<uint8_t*>(&bytes[0])));
            return py::bytes(bytes);
        },
        "Code lengths as bytes of the payload.");
    m.def(
        "unpack_lengths",
        [](const std::string& bytes, int64_t levels, uintptr_t lengths) {
            return unpack_lengths(reinterpret_cast<const uint8_t*>(bytes.data()), static_cast<int64_t>(bytes.size()),
                                  levels, pointer<uint8_t>(lengths));
        },
        "The inverse of pack_lengths; False if the bytes are not those of `levels` lengths.");
    m.def(
        "encode_blocks",
        [](int dtype, int64_t n, uintptr_t x, const py::tuple& fields, uintptr_t lengths, int bits, uintptr_t escapes,
           uintptr_t out, int64_t room, uintptr_t table, int threads) {
            const Scheme s = scheme(fields);
            py::gil_scoped_release release;
            return cpu::encode_blocks(values(dtype, n, x), s, {pointer<const uint8_t>(lengths), bits},
                                      pointer<const uint32_t>(escapes), pointer<uint8_t>(out), room,
                                      pointer<BlockEntry>(table), on_cpu(threads));
        },
        "Writes blocks and their table; returns the blocks' bytes.");
    py::class_<cpu::PayloadPlan>(m, "PayloadPlan")
        .def_readonly("mode", &cpu::PayloadPlan::mode)
        .def_readonly("room", &cpu::PayloadPlan::room)
        .def(
            "write",
            [](const cpu::PayloadPlan& plan, uintptr_t out, int threads) {
                py::gil_scoped_release release;
                return cpu::write_payload(plan, pointer<uint8_t>(out), on_cpu(threads));
            },
            "Writes the payload to memory of at least `room` bytes; returns its bytes, or -1 if it takes more.");
    m.def(
        "plan_payload",
        [](int dtype, int64_t n, uintptr_t x, const std::vector<int64_t>& sizes, const py::tuple& fields,
           double entropy, uintptr_t escapes, int64_t escape_bytes, uintptr_t sample, int64_t sampled, double fraction,
           int threads) {
            const Scheme s = scheme(fields);
            const Shape shape = shape_of(sizes);
            py::gil_scoped_release release;
            return cpu::plan_payload(values(dtype, n, x), shape, s, entropy, pointer<const uint32_t>(escapes),
                                     escape_bytes, values(dtype, sampled, sample), fraction, on_cpu(threads));
        },
        "How a tensor whose quantiser has been chosen is stored; addresses have to outlive the plan.");
    m.def(
        "plan_by_entropy",
        [](int dtype, int64_t n, uintptr_t x, const std::vector<int64_t>& sizes, const py::tuple& by, int threads) {
            const Shape shape = shape_of(sizes);
            const cpu::ByEntropy rule = by_entropy(by);
            py::gil_scoped_release release;
            return cpu::plan_by_entropy(values(dtype, n, x), shape, rule, on_cpu(threads));
        },
        "The same from the values to the plan, for what is made by default.");
    m.def(
        "write_payloads",
        [](const std::vector<std::tuple<int, int64_t, uintptr_t>>& tensors, const py::tuple& by, uintptr_t out,
           int64_t room, int threads) {
            std::vector<Values> all;
            for (const auto& [dtype, n, x] : tensors) all.push_back(values(dtype, n, x));
            const cpu::ByEntropy rule = by_entropy(by);
            py::gil_scoped_release release;
            return cpu::write_payloads(all, rule, pointer<uint8_t>(out), room, on_cpu(threads));
        },
        "Payloads of flat tensors up to the first that is not made by default; their bytes.");
    m.def(
        "decode_blocks",
        [](uintptr_t data, int64_t size, uintptr_t table, uintptr_t escapes, int64_t n, const py::tuple& fields,
           uintptr_t lengths, int bits, int dtype, uintptr_t out, bool accumulate, double scale, bool check,
           int threads) {
            const Scheme s = scheme(fields);
            py::gil_scoped_release release;
            const Target target{static_cast<DType>(dtype), pointer<void>(out), accumulate, scale};
            return result_of(cpu::decode_blocks(blocks(data, size, table, escapes), n, s,
                                                {pointer<const uint8_t>(lengths), bits}, target, check,
                                                on_cpu(threads)));
        },
        "(0 ok, 1 checksum, 2 malformed; block).");
    m.def(
        "decode_payload",
        [](uintptr_t data, int64_t size, const std::vector<int64_t>& sizes, int64_t n, int dtype, uintptr_t out,
           bool accumulate, double scale, bool check, int threads) {
            const Shape shape = shape_of(sizes);
            py::gil_scoped_release release;
            const Target target{static_cast<DType>(dtype), pointer<void>(out), accumulate, scale};
            return cpu::decode_payload(pointer<const uint8_t>(data), size, shape, n, target, check, on_cpu(threads));
        },
        "Whether a whole payload was one of the usual kinds, and right.");
    m.def(
        "decode_payloads",
        [](uintptr_t data, const std::vector<int64_t>& bytes,
           const std::vector<std::tuple<int, int64_t, uintptr_t>>& outs, bool accumulate, double scale, bool check,
           int threads) {
            std::vector<cpu::FlatTarget> targets;
            for (size_t i = 0; i < outs.size(); ++i) {
                const auto& [dtype, n, out] = outs[i];
                targets.push_back({{static_cast<DType>(dtype), pointer<void>(out), accumulate, scale}, n, bytes.at(i)});
            }
            py::gil_scoped_release release;
            return cpu::decode_payloads(pointer<const uint8_t>(data), targets, check, on_cpu(threads));
        },
        "How many of flat tensors' payloads were of the usual kinds, and right, up to the first that was not.");
    m.def(
        "copy_plane",
        [](int64_t n, uintptr_t x, const py::tuple& fields, uintptr_t out, uintptr_t table, int threads) {
            const Scheme s = scheme(fields);
            py::gil_scoped_release release;
            cpu::copy_plane(values(0, n, x), s.plane, pointer<uint8_t>(out), pointer<BlockEntry>(table),
                            on_cpu(threads));
        },
        "Writes a plane's bytes as they are, and their table.");
    m.def(
        "decode_planes",
        [](const std::vector<std::tuple<uintptr_t, int64_t, uintptr_t, uintptr_t, int>>& planes, int64_t n, bool rotate,
           uintptr_t out, bool check, int threads) {
            std::vector<PlaneBlocks> all;
            for (const auto& [data, size, table, lengths, value] : planes)
                all.push_back(
                    {blocks(data, size, table, 0), pointer<const uint8_t>(lengths), static_cast<uint8_t>(value)});
            py::gil_scoped_release release;
            return result_of(cpu::decode_planes(all.data(), n, static_cast<int>(all.size()), rotate, pointer<void>(out),
                                                check, on_cpu(threads)));
        },
        "Units from planes (data, size, table, lengths, value); (0 ok, 1 checksum, 2 malformed; block).");
    m.def(
        "checksum_blocks",
        [](uintptr_t data, int64_t size, int64_t block, uintptr_t table, int threads) {
            py::gil_scoped_release release;
            cpu::checksum_blocks(pointer<const uint8_t>(data), size, block, pointer<BlockEntry>(table),
                                 on_cpu(threads));
        },
        "Block table of plain bytes.");
    m.def(
        "crc32c", [](uintptr_t data, int64_t size) { return crc32c(0, pointer<const uint8_t>(data), size); },
        "CRC32C of bytes.");
}

}  // namespace platonic
