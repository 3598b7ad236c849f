// kvfold.ops._cpu: the CPU kernels for Python. Arrays are NumPy's, C-contiguous; bfloat16 comes as uint16, float16 as int16.
// Shapes that don't belong together raise ValueError before anything is read; the GIL is free while kernels run.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cxxabi.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "choice.hpp"
#include "kernels.hpp"
#include "threads.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvfold {
namespace {

template <class T, size_t N>
using Array = nb::ndarray<T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;
using Any2 = nb::ndarray<nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Const2 = nb::ndarray<nb::ro, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

// Without the GIL. A daemon thread that wants it back when Python ends is unwound by Python, which a destructor may not
// be: it stands still instead, and the process ends around it.
struct Free {
    PyThreadState* const state = PyEval_SaveThread();
    Free() = default;
    Free(const Free&) = delete;
    ~Free() {
#if defined(__GLIBCXX__)
        try {
            PyEval_RestoreThread(state);
        } catch (abi::__forced_unwind&) {
            for (;;) ::pause();
        }
#else
        PyEval_RestoreThread(state);
#endif
    }
};

// Not every compiler's __builtin_cpu_supports knows of it.
bool has_f16c() {
#if defined(__x86_64__)
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
#else
    return false;
#endif
}

#if defined(__x86_64__)
Kernels with_codes(Kernels set, const char* name, void (*codes)(const Codes&)) {
    set.name = name, set.attend_codes = codes;
    return set;
}

const Kernels avx512vnni_kernels = with_codes(avx512::kernels, "avx512vnni", avx512vnni::codes);
#endif

std::vector<const Kernels*> known() {
    std::vector<const Kernels*> found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
        if (__builtin_cpu_supports("avx512vnni")) found.push_back(&avx512vnni_kernels);
        found.push_back(&avx512::kernels);
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c())
        found.push_back(&avx2::kernels);
#endif
    found.push_back(&baseline::kernels);
    return found;
}

std::vector<const Kernels*> sets = known();  // the widest first

// The widest set whose vectors divide these widths.
const Kernels& kernels_for(std::initializer_list<int64_t> widths) {
    for (const Kernels* each : sets)
        if (std::all_of(widths.begin(), widths.end(), [&](int64_t width) { return width % each->lanes == 0; })) return *each;
    throw nb::value_error("widths of keys and values must be multiples of 4");
}

void check(bool holds, const char* what) {
    if (!holds) throw nb::value_error(what);
}

template <class A>
Kind kind_of(const A& array) {
    if (array.dtype() == nb::dtype<float>()) return Kind::f32;
    if (array.dtype() == nb::dtype<uint16_t>()) return Kind::bf16;
    if (array.dtype() == nb::dtype<int16_t>()) return Kind::f16;
    throw nb::value_error("floats come as float32, uint16 (bfloat16) or int16 (float16)");
}

template <class A>
size_t bytes_of(const A& array) {
    return array.dtype().bits / 8;
}

using Table = Array<const int32_t, 2>;
using Counts = Array<const int32_t, 1>;

Rows rows_of(const Table& table, const Counts& lengths, const Table& holes, const Counts& hole_count, int64_t page_size,
             bool singles = false) {
    const size_t rows = table.shape(0);
    check(lengths.shape(0) == rows && hole_count.shape(0) == rows && holes.shape(0) == rows,
          "table, lengths, holes and hole_count must have the same rows");
    check((page_size > 0 && page_size % 4 == 0) || (singles && page_size == 1), "page_size must be a multiple of 4");
    return {static_cast<int64_t>(rows), page_size, table.data(), static_cast<int64_t>(table.shape(1)), lengths.data(),
            holes.data(), static_cast<int64_t>(holes.shape(1)), hole_count.data()};
}

// Every page that a row reads must be one of the pool's.
void check_pages(const Rows& on, int64_t pages) {
    for (int64_t r = 0; r < on.rows; r++) {
        const int64_t used = (on.lengths[r] + on.page_size - 1) / on.page_size;
        check(on.lengths[r] >= 0 && used <= on.width, "lengths go beyond the table");
        for (int64_t i = 0; i < used; i++) {
            const int32_t page = on.table[r * on.width + i];
            check(page >= 0 && page < pages, "the table names a page that the pool does not have");
        }
    }
}

// What both kernels are asked of: shapes, and the pages that rows hold. `slots` and `width` are those of the values.
void ask(Attend& on, const Array<const float, 3>& q, int64_t slots, int64_t width,
         const std::optional<Array<const float, 2>>& mass, const std::optional<Array<const bool, 2>>& read,
         const Table& table, const Counts& lengths, const Table& holes, const Counts& hole_count, float scale, int threads,
         const Array<float, 3>& out, const Array<float, 2>& lse, const std::optional<Array<float, 3>>& weights) {
    on.g = q.shape(1), on.d = q.shape(2), on.dv = width;
    const size_t rows = table.shape(0);
    check(q.shape(0) == rows && out.shape(0) == rows && lse.shape(0) == rows, "q, out and lse must have the table's rows");
    check(out.shape(1) == q.shape(1) && lse.shape(1) == q.shape(1) && static_cast<int64_t>(out.shape(2)) == width,
          "shapes of q, keys, values, out and lse don't fit");
    check(on.d > 0, "keys must have at least one number");
    check_pages(on.on, slots / on.on.page_size);
    for (size_t r = 0; r < rows; r++)
        check(on.on.hole_count[r] >= 0 && on.on.hole_count[r] <= on.on.most, "hole_count goes beyond holes");
    int64_t longest = 0;
    for (size_t r = 0; r < rows; r++) longest = std::max<int64_t>(longest, on.on.lengths[r]);
    if (mass)
        check(static_cast<int64_t>(mass->shape(0)) == slots && mass->shape(1) == 1, "mass must have one number a slot");
    if (read) {
        check(read->shape(0) == rows && static_cast<int64_t>(read->shape(1)) >= longest, "read must cover every slot");
        on.read_width = read->shape(1);
    }
    if (weights) {
        check(weights->shape(0) == rows && weights->shape(1) == q.shape(1) &&
                  static_cast<int64_t>(weights->shape(2)) >= longest,
              "weights must cover every slot");
        on.weights_width = weights->shape(2);
    }
    on.q = q.data(), on.mass = mass ? mass->data() : nullptr, on.read = read ? read->data() : nullptr;
    on.scale = scale, on.threads = threads, on.out = out.data(), on.lse = lse.data();
    on.weights = weights ? weights->data() : nullptr;
}

void attend(Array<const float, 3> q, Const2 keys, Const2 values, std::optional<Array<const float, 2>> mass,
            std::optional<Array<const bool, 2>> read, Table table, Counts lengths, Table holes, Counts hole_count,
            int64_t page_size, float scale, int threads, Array<float, 3> out, Array<float, 2> lse,
            std::optional<Array<float, 3>> weights) {
    Attend on{};
    on.on = rows_of(table, lengths, holes, hole_count, page_size, true);
    check(page_size <= BLOCK && BLOCK % page_size == 0, "page_size must be 1, 4, 8, 16, 32 or 64");
    check(keys.shape(1) == q.shape(2) && keys.shape(0) == values.shape(0), "shapes of q, keys, values, out and lse don't fit");
    ask(on, q, values.shape(0), values.shape(1), mass, read, table, lengths, holes, hole_count, scale, threads, out, lse, weights);
    on.keys = keys.data(), on.values = values.data();
    on.key_kind = kind_of(keys), on.value_kind = kind_of(values);
    const Kernels& set = kernels_for({on.d, on.dv});
    const Free free;
    (page_size == 1 ? set.attend_singles : set.attend)(on);
}

using Floats = Array<const float, 1>;

// Angles of one step, of channels of vectors of d numbers from `first` on.
Turning turning_of(const Floats& angles, int64_t first, bool neighbours, int64_t d) {
    const Turning by{angles.data(), static_cast<int64_t>(angles.shape(0)), first, neighbours};
    check(by.half > 0 && first >= 0 && first + 2 * by.half <= d, "angles must be of channels that vectors have");
    return by;
}

// Of rows of slots, each of them a page of its own: keys stand at slots 0, 1, 2, ... and not where `places` says, or there but
// no further in front than `least`, (N,), where that is no -1.
void attend_turned(Array<const float, 3> q, Const2 keys, Const2 values, Array<const int32_t, 2> places, Floats angles,
                   int64_t first, bool neighbours, std::optional<Counts> least, std::optional<Array<const float, 2>> mass,
                   Table table, Counts lengths, Table holes, Counts hole_count, float scale, int threads,
                   Array<float, 3> out, Array<float, 2> lse) {
    Attend on{};
    on.on = rows_of(table, lengths, holes, hole_count, 1, true);
    check(keys.shape(1) == q.shape(2) && keys.shape(0) == values.shape(0) && places.shape(0) == keys.shape(0) && places.shape(1) == 1,
          "shapes of q, keys, values, places, out and lse don't fit");
    ask(on, q, values.shape(0), values.shape(1), mass, {}, table, lengths, holes, hole_count, scale, threads, out, lse, {});
    on.keys = keys.data(), on.values = values.data(), on.key_kind = kind_of(keys), on.value_kind = kind_of(values);
    check(!least || least->shape(0) == q.shape(0), "least must have the rows of q");
    on.turning = turning_of(angles, first, neighbours, on.d), on.places = places.data(), on.least = least ? least->data() : nullptr;
    const Kernels& set = kernels_for({on.d, on.dv, on.turning.half, on.turning.first});
    const Free free;
    set.attend_singles(on);
}

// Vectors x (rows, heads, count, d), those of one token turned by the same steps (rows, count).
void turn(nb::ndarray<nb::ro, nb::ndim<4>, nb::c_contig, nb::device::cpu> x, Array<const int32_t, 2> steps, Floats angles,
          int64_t first, bool neighbours, int threads, Array<float, 4> out) {
    const Turning by = turning_of(angles, first, neighbours, x.shape(3));
    check(steps.shape(0) == x.shape(0) && steps.shape(1) == x.shape(2), "steps must be of x's rows and tokens");
    for (size_t i = 0; i < 4; i++) check(out.shape(i) == x.shape(i), "out must have the shape of x");
    const Turn on{static_cast<int64_t>(x.shape(0)), static_cast<int64_t>(x.shape(1)), static_cast<int64_t>(x.shape(2)),
                  static_cast<int64_t>(x.shape(3)), x.data(), kind_of(x), steps.data(), by, threads, out.data()};
    const Kernels& set = kernels_for({on.d, by.half, by.first});
    const Free free;
    set.turn(on);
}

using Bytes = Array<const uint8_t, 2>;

// Keys and values in 8 bits, e5m2 or e4m3, of which each has a number that it is multiplied by.
void attend_float8(Array<const float, 3> q, bool e5m2, Bytes keys, Bytes values, Array<const float, 2> key_factor,
                   Array<const float, 2> value_factor, std::optional<Array<const float, 2>> mass,
                   std::optional<Array<const bool, 2>> read, Table table, Counts lengths, Table holes, Counts hole_count,
                   int64_t page_size, float scale, int threads, Array<float, 3> out, Array<float, 2> lse,
                   std::optional<Array<float, 3>> weights) {
    Attend on{};
    on.on = rows_of(table, lengths, holes, hole_count, page_size);
    check(page_size <= BLOCK && BLOCK % page_size == 0, "page_size must be 4, 8, 16, 32 or 64");
    const size_t slots = values.shape(0);
    check(keys.shape(1) == q.shape(2) && keys.shape(0) == slots, "shapes of q, keys, values, out and lse don't fit");
    for (const Array<const float, 2>* each : {&key_factor, &value_factor})
        check(each->shape(0) == slots && each->shape(1) == 1, "key_factor and value_factor must have one number a slot");
    ask(on, q, slots, values.shape(1), mass, read, table, lengths, holes, hole_count, scale, threads, out, lse, weights);
    on.keys = keys.data(), on.values = values.data(), on.key_factor = key_factor.data(), on.value_factor = value_factor.data();
    on.key_kind = on.value_kind = e5m2 ? Kind::e5m2 : Kind::e4m3;
    const Kernels& set = kernels_for({on.d, on.dv});
    const Free free;
    set.attend(on);
}

void attend_codes(Array<const float, 3> q, int bits, Bytes keys, Const2 key_scale, Const2 key_zero, Bytes values,
                  Const2 value_scale, Const2 value_zero, std::optional<Array<const float, 2>> mass,
                  std::optional<Array<const bool, 2>> read, Table table, Counts lengths, Table holes, Counts hole_count,
                  int64_t page_size, float scale, int threads, Array<float, 3> out, Array<float, 2> lse,
                  std::optional<Array<float, 3>> weights) {
    Codes on{};
    on.on = rows_of(table, lengths, holes, hole_count, page_size);
    check(bits == 2 || bits == 3 || bits == 4 || bits == 8, "bits must be 2, 3, 4 or 8");
    const size_t slots = values.shape(0);
    ask(on, q, slots, out.shape(2), mass, read, table, lengths, holes, hole_count, scale, threads, out, lse, weights);
    on.bits = bits, on.groups = value_scale.shape(1);
    check(keys.shape(0) == slots && static_cast<int64_t>(keys.shape(1)) == code_bytes(on.d, bits) &&
              static_cast<int64_t>(values.shape(1)) == code_bytes(on.dv, bits),
          "keys and values must have a vector of codes for each slot");
    check(static_cast<int64_t>(key_scale.shape(0) * page_size) == static_cast<int64_t>(slots) &&
              key_scale.shape(1) == q.shape(2) && key_zero.shape(0) == key_scale.shape(0) &&
              key_zero.shape(1) == key_scale.shape(1),
          "key_scale and key_zero must have a number for each channel of each page");
    check(value_scale.shape(0) == slots && on.groups > 0 && on.dv % on.groups == 0 && value_zero.shape(0) == slots &&
              value_zero.shape(1) == value_scale.shape(1),
          "value_scale and value_zero must have a number for each group of channels of each slot");
    on.scale_kind = kind_of(key_scale);
    for (const Const2* each : {&key_zero, &value_scale, &value_zero})
        check(each->dtype() == key_scale.dtype(), "scales and zeros must be of one dtype");
    on.keys = keys.data(), on.values = values.data(), on.key_scale = key_scale.data(), on.key_zero = key_zero.data();
    on.value_scale = value_scale.data(), on.value_zero = value_zero.data();
    const Kernels& set = kernels_for({on.d, on.dv, on.dv / on.groups});
    const Free free;
    set.attend_codes(on);
}

void attend_sparse(Array<const float, 3> q, Const2 keys, Bytes key_map, Const2 values, Bytes value_map,
                   std::optional<Array<const float, 2>> mass, std::optional<Array<const bool, 2>> read, Table table,
                   Counts lengths, Table holes, Counts hole_count, int64_t page_size, float scale, int threads,
                   Array<float, 3> out, Array<float, 2> lse, std::optional<Array<float, 3>> weights) {
    Sparse on{};
    on.on = rows_of(table, lengths, holes, hole_count, page_size);
    check(page_size <= BLOCK && BLOCK % page_size == 0, "page_size must be 4, 8, 16, 32 or 64");
    const size_t slots = values.shape(0);
    ask(on, q, slots, out.shape(2), mass, read, table, lengths, holes, hole_count, scale, threads, out, lse, weights);
    on.kept_keys = keys.shape(1), on.kept_values = values.shape(1);
    check(keys.shape(0) == slots && on.kept_keys <= on.d && on.kept_values <= on.dv,
          "keys and values must have a vector for each slot, of no more numbers than there are channels");
    check(key_map.shape(0) == slots && static_cast<int64_t>(key_map.shape(1)) == (on.d + 7) / 8 &&
              value_map.shape(0) == slots && static_cast<int64_t>(value_map.shape(1)) == (on.dv + 7) / 8,
          "key_map and value_map must have a bit for each channel of each slot");
    on.keys = keys.data(), on.values = values.data(), on.key_map = key_map.data(), on.value_map = value_map.data();
    on.key_kind = kind_of(keys), on.value_kind = kind_of(values);
    const Kernels& set = kernels_for({on.d, on.dv});
    const Free free;
    set.attend_sparse(on);
}

Vectors vectors_of(int bits, const Bytes& codes, const std::optional<Floats>& levels, const Const2& scale,
                   const std::optional<Const2>& zero, size_t slots, int64_t size) {
    const int64_t groups = scale.shape(1);
    check(bits == 2 || bits == 3 || bits == 4 || bits == 8, "bits must be 2, 3, 4 or 8");
    check(codes.shape(0) == slots && static_cast<int64_t>(codes.shape(1)) == code_bytes(size, bits),
          "keys and values must have a vector of codes for each slot");
    check(scale.shape(0) == slots && groups > 0 && size % groups == 0, "a slot must have a scale for each group of channels");
    check(levels.has_value() != zero.has_value(), "codes have either levels or zeros");
    check(!levels || (bits <= 4 && levels->shape(0) == size_t{1} << bits && groups == 1),
          "levels must be 2^bits, of at most 4 bits, and a slot then has one scale");
    check(!zero || (zero->shape(0) == slots && zero->shape(1) == scale.shape(1) && zero->dtype() == scale.dtype()),
          "zeros must be as the scales are");
    return {bits, codes.data(), levels ? levels->data() : nullptr, scale.data(), zero ? zero->data() : nullptr, groups};
}

void attend_tokens(Array<const float, 3> q, int key_bits, Bytes keys, std::optional<Floats> key_levels, Const2 key_scale,
                   std::optional<Const2> key_zero, int value_bits, Bytes values, std::optional<Floats> value_levels,
                   Const2 value_scale, std::optional<Const2> value_zero, std::optional<Array<const float, 2>> mass,
                   std::optional<Array<const bool, 2>> read, Table table, Counts lengths, Table holes, Counts hole_count,
                   int64_t page_size, float scale, int threads, Array<float, 3> out, Array<float, 2> lse,
                   std::optional<Array<float, 3>> weights) {
    Tokens on{};
    on.on = rows_of(table, lengths, holes, hole_count, page_size);
    check(page_size <= BLOCK && BLOCK % page_size == 0, "page_size must be 4, 8, 16, 32 or 64");
    const size_t slots = values.shape(0);
    ask(on, q, slots, out.shape(2), mass, read, table, lengths, holes, hole_count, scale, threads, out, lse, weights);
    on.of_keys = vectors_of(key_bits, keys, key_levels, key_scale, key_zero, slots, on.d);
    on.of_values = vectors_of(value_bits, values, value_levels, value_scale, value_zero, slots, on.dv);
    check(value_scale.dtype() == key_scale.dtype(), "scales must be of one dtype");
    on.scale_kind = kind_of(key_scale);
    const Kernels& set = kernels_for({on.d, on.dv, on.d / on.of_keys.groups, on.dv / on.of_values.groups});
    const Free free;
    set.attend_tokens(on);
}

// Slots first[r] to stop[r] of each row become new[r, 0:]; plane (pages * page_size, W), new (R, T, W), of one dtype.
void write(Any2 plane, nb::ndarray<nb::ro, nb::ndim<3>, nb::c_contig, nb::device::cpu> fresh, Table table, Counts first,
           Counts stop, int64_t page_size) {
    const size_t rows = table.shape(0), width = plane.shape(1) * bytes_of(plane);
    check(plane.dtype() == fresh.dtype() && plane.shape(1) == fresh.shape(2), "plane and new must have one dtype and width");
    check(fresh.shape(0) == rows && first.shape(0) == rows && stop.shape(0) == rows, "new must have the table's rows");
    for (size_t r = 0; r < rows; r++) {
        const int64_t low = first.data()[r], high = stop.data()[r];
        if (low >= high) continue;
        check(low >= 0 && high - low <= static_cast<int64_t>(fresh.shape(1)) &&
                  high <= static_cast<int64_t>(table.shape(1)) * page_size,
              "slots go beyond the table or the new tokens");
        for (int64_t i = low / page_size; i <= (high - 1) / page_size; i++) {
            const int64_t page = table.data()[r * table.shape(1) + i];
            check(page >= 0 && (page + 1) * page_size <= static_cast<int64_t>(plane.shape(0)),
                  "the table names a page that the pool does not have");
        }
    }
    char* to = static_cast<char*>(plane.data());
    const char* from = static_cast<const char*>(fresh.data());
    const Free free;
    for (size_t r = 0; r < rows; r++)
        for (int64_t slot = first.data()[r]; slot < stop.data()[r];) {
            // As many as lie side by side.
            const int64_t page = table.data()[r * table.shape(1) + slot / page_size], at = slot % page_size;
            const int64_t run = std::min<int64_t>(page_size - at, stop.data()[r] - slot);
            std::memcpy(to + (page * page_size + at) * width,
                        from + (r * fresh.shape(1) + slot - first.data()[r]) * width, run * width);
            slot += run;
        }
}

struct Gaps {
    char* plane;
    const bool* mask;
    const int32_t* table;
    const int32_t* lengths;
    int64_t mask_width, table_width, page_size, width;
};

void close_row(const void* context, int64_t r) {
    const Gaps& on = *static_cast<const Gaps*>(context);
    auto place = [&](int64_t slot) {
        return on.plane + (int64_t{on.table[r * on.table_width + slot / on.page_size]} * on.page_size + slot % on.page_size) * on.width;
    };
    int64_t target = 0;
    for (int64_t slot = 0; slot < on.lengths[r]; slot++) {
        if (!on.mask[r * on.mask_width + slot]) continue;
        if (target != slot) {
            if (on.width == 4)
                std::memcpy(place(target), place(slot), 4);
            else
                std::memcpy(place(target), place(slot), on.width);
        }
        target++;
    }
}

// The slots that mask (R, T) marks move to the front of each row, in order.
void close_gaps(Any2 plane, Array<const bool, 2> mask, Table table, Counts lengths, int64_t page_size, int threads) {
    const size_t rows = table.shape(0);
    check(mask.shape(0) == rows && lengths.shape(0) == rows, "mask and lengths must have the table's rows");
    Rows on{static_cast<int64_t>(rows), page_size, table.data(), static_cast<int64_t>(table.shape(1)), lengths.data(),
            nullptr, 0, nullptr};
    check(page_size > 0, "page_size must be at least 1");
    check_pages(on, plane.shape(0) / page_size);
    for (size_t r = 0; r < rows; r++)
        check(lengths.data()[r] <= static_cast<int64_t>(mask.shape(1)), "mask must cover every slot");
    const Gaps gaps{static_cast<char*>(plane.data()), mask.data(), table.data(), lengths.data(),
                    static_cast<int64_t>(mask.shape(1)), static_cast<int64_t>(table.shape(1)), page_size,
                    static_cast<int64_t>(plane.shape(1) * bytes_of(plane))};
    const Free free;
    for_each(rows, threads, close_row, &gaps);
}

// Slots that mask (R, T) does not mark become holes, where every row has room for its own; else nothing changes.
bool punch_holes(Array<const bool, 2> mask, Counts lengths, Array<int32_t, 2> holes, Array<int32_t, 1> hole_count) {
    const size_t rows = lengths.shape(0);
    check(mask.shape(0) == rows && holes.shape(0) == rows && hole_count.shape(0) == rows, "all must have the same rows");
    const Free free;
    std::vector<size_t> gone(rows, 0);
    for (size_t r = 0; r < rows; r++) {
        if (lengths.data()[r] > static_cast<int64_t>(mask.shape(1))) return false;
        for (int64_t slot = 0; slot < lengths.data()[r]; slot++) gone[r] += !mask.data()[r * mask.shape(1) + slot];
        if (gone[r] > holes.shape(1)) return false;
    }
    for (size_t r = 0; r < rows; r++) {
        if (static_cast<int64_t>(gone[r]) == hole_count.data()[r]) continue;
        int32_t* at = holes.data() + r * holes.shape(1);
        for (int32_t slot = 0; slot < lengths.data()[r]; slot++)
            if (!mask.data()[r * mask.shape(1) + slot]) *at++ = slot;
        hole_count.data()[r] = static_cast<int32_t>(gone[r]);
    }
    return true;
}

struct Top {
    const float* scores;
    const int64_t* count;
    bool* chosen;
    int64_t t;
};

void top_row(const void* context, int64_t r) {
    const Top& on = *static_cast<const Top*>(context);
    const float* line = on.scores + r * on.t;
    bool* chosen = on.chosen + r * on.t;
    int64_t able = 0;
    for (int64_t i = 0; i < on.t; i++) able += line[i] > -INFINITY;
    const int64_t k = std::min(on.count[r], able);
    if (k <= 0) {
        std::fill(chosen, chosen + on.t, false);
        return;
    }
    float* copy = scratch(on.t);
    for (int64_t i = 0; i < on.t; i++) copy[i] = line[i] > -INFINITY ? line[i] : -INFINITY;  // NaN has no place in an order
    std::nth_element(copy, copy + on.t - k, copy + on.t);
    const float bar = copy[on.t - k];  // the lowest that is chosen
    int64_t room = k;
    for (int64_t i = 0; i < on.t; i++) room -= chosen[i] = line[i] > bar;
    for (int64_t i = 0; i < on.t && room > 0; i++)
        if (line[i] == bar) chosen[i] = true, room--;
}

// chosen[r] marks the count[r] highest of scores[r]; ties go to the earlier one, -inf is never chosen. No NaN.
void top_mask(Array<const float, 2> scores, Array<const int64_t, 1> count, Array<bool, 2> chosen, int threads) {
    check(count.shape(0) == scores.shape(0) && chosen.shape(0) == scores.shape(0) && chosen.shape(1) == scores.shape(1),
          "scores, count and chosen must have the same rows");
    const Top on{scores.data(), count.data(), chosen.data(), static_cast<int64_t>(scores.shape(1))};
    const Free free;
    for_each(scores.shape(0), scores.size() < 4096 ? 1 : threads, top_row, &on);
}

void causal(Array<const float, 4> q, Array<const float, 3> k, Array<const float, 3> v, float scale, int64_t window,
            Array<const float, 1> shares, int threads, Array<float, 4> out, Array<float, 3> lse,
            std::optional<Array<float, 3>> sums) {
    Causal on{};
    on.n = q.shape(0), on.g = q.shape(1), on.count = q.shape(2), on.t = k.shape(1), on.d = q.shape(3), on.dv = v.shape(2);
    check(k.shape(0) == q.shape(0) && v.shape(0) == q.shape(0) && k.shape(1) >= q.shape(2) && v.shape(1) == k.shape(1) &&
              k.shape(2) == q.shape(3) && shares.shape(0) == q.shape(2) && window >= 0,
          "shapes of q, k, v and shares don't fit");
    check(out.shape(0) == q.shape(0) && out.shape(1) == q.shape(1) && out.shape(2) == q.shape(2) &&
              out.shape(3) == v.shape(2) && lse.shape(0) == q.shape(0) && lse.shape(1) == q.shape(1) &&
              lse.shape(2) == q.shape(2),
          "shapes of out and lse don't fit");
    if (sums)
        check(sums->shape(0) == q.shape(0) && sums->shape(1) == SHARES && sums->shape(2) == k.shape(1), "sums must be (N, SHARES, T)");
    on.q = q.data(), on.k = k.data(), on.v = v.data(), on.shares = shares.data(), on.window = window, on.scale = scale;
    on.threads = threads, on.out = out.data(), on.lse = lse.data(), on.sums = sums ? sums->data() : nullptr;
    const Kernels& set = kernels_for({on.d, on.dv});
    const Free free;
    set.causal(on);
}

void column_sums(Array<const float, 4> q, Array<const float, 3> k, Array<const float, 3> lse,
                 std::optional<Array<const float, 2>> bias, Array<const int64_t, 1> first, float scale, int threads,
                 Array<float, 3> sums) {
    ColumnSums on{};
    on.n = q.shape(0), on.g = q.shape(1), on.count = q.shape(2), on.t = k.shape(1), on.d = q.shape(3);
    check(k.shape(0) == q.shape(0) && k.shape(2) == q.shape(3) && lse.shape(0) == q.shape(0) &&
              lse.shape(1) == q.shape(1) && lse.shape(2) == q.shape(2) && first.shape(0) == q.shape(0) &&
              sums.shape(0) == q.shape(0) && sums.shape(1) == SHARES && sums.shape(2) == k.shape(1),
          "shapes of q, k, lse, first and sums don't fit");
    if (bias) check(bias->shape(0) == q.shape(0) && bias->shape(1) == k.shape(1), "bias must be (N, T)");
    for (size_t i = 0; i < first.shape(0); i++) check(first.data()[i] >= 0, "first must be at least 0");
    on.q = q.data(), on.k = k.data(), on.lse = lse.data(), on.bias = bias ? bias->data() : nullptr;
    on.first = first.data(), on.scale = scale, on.threads = threads, on.sums = sums.data();
    const Kernels& set = kernels_for({on.d});
    const Free free;
    set.column_sums(on);
}

void most_alike(Array<const float, 3> left, Array<const float, 3> right, std::optional<Array<const float, 3>> left2,
                std::optional<Array<const float, 3>> right2, Array<const int64_t, 1> asks,
                Array<const int64_t, 1> there, int threads, Array<float, 2> best, Array<int64_t, 2> first) {
    Alike on{};
    on.n = left.shape(0), on.asking = left.shape(1), on.others = right.shape(1), on.d = left.shape(2);
    check(right.shape(0) == left.shape(0) && right.shape(2) == left.shape(2) && asks.shape(0) == left.shape(0) &&
              there.shape(0) == left.shape(0) && best.shape(0) == left.shape(0) && best.shape(1) == left.shape(1) &&
              first.shape(0) == left.shape(0) && first.shape(1) == left.shape(1) && left2.has_value() == right2.has_value(),
          "shapes don't fit");
    for (int64_t i = 0; i < on.n; i++)
        check(asks.data()[i] >= 0 && asks.data()[i] <= on.asking && there.data()[i] >= 0 && there.data()[i] <= on.others,
              "asks and there must lie within the vectors");
    if (left2) {
        on.also = left2->shape(2);
        check(left2->shape(0) == left.shape(0) && left2->shape(1) == left.shape(1) && right2->shape(0) == left.shape(0) &&
                  right2->shape(1) == right.shape(1) && right2->shape(2) == left2->shape(2),
              "shapes don't fit");
        on.left2 = left2->data(), on.right2 = right2->data();
    }
    on.left = left.data(), on.right = right.data(), on.asks = asks.data(), on.there = there.data(), on.threads = threads;
    on.best = best.data(), on.first = first.data();
    const Kernels& set = *sets.front();  // a panel's columns are padded, and a sum along any width will do
    const Free free;
    set.most_alike(on);
}

void linear(Array<const float, 2> x, Const2 weight, std::optional<Array<const float, 1>> bias, int threads,
            Array<float, 2> out) {
    Linear on{};
    on.rows = x.shape(0), on.k = x.shape(1), on.n = weight.shape(0);
    check(weight.shape(1) == x.shape(1) && out.shape(0) == x.shape(0) && out.shape(1) == weight.shape(0) &&
              on.k > 0 && on.n % 4 == 0 && (!bias || bias->shape(0) == weight.shape(0)),
          "shapes of x, weight, bias and out don't fit, or outputs are no multiple of 4");
    on.x = x.data(), on.weight = weight.data(), on.kind = kind_of(weight), on.bias = bias ? bias->data() : nullptr;
    on.threads = threads, on.out = out.data();
    const Kernels& set = kernels_for({on.k});
    const Free free;
    set.linear(on);
}

using Const3 = nb::ndarray<nb::ro, nb::ndim<3>, nb::c_contig, nb::device::cpu>;

// scores (N, G, width): what each unit is worth by its bounds, held (N, room, 2 D), or `plain` by its key, (N, room, D),
// in whole steps of 1 / steps (0: as it is); -inf behind a row's units.
void bound_scores(Array<const float, 3> q, const Const3 held, Array<const int64_t, 1> units, bool plain, float steps,
                  int threads, Array<float, 3> scores) {
    BoundScores on{};
    on.rows = q.shape(0), on.g = q.shape(1), on.d = q.shape(2), on.room = held.shape(1), on.width = scores.shape(2);
    const int64_t e = plain ? on.d : 2 * on.d;
    check(held.shape(0) == q.shape(0) && static_cast<int64_t>(held.shape(2)) == e && units.shape(0) == q.shape(0) &&
              scores.shape(0) == q.shape(0) && scores.shape(1) == q.shape(1) && on.d > 0,
          "shapes of q, held, units and scores don't fit");
    for (int64_t r = 0; r < on.rows; r++)
        check(units.data()[r] >= 0 && units.data()[r] <= std::min(on.width, on.room), "units go beyond held or scores");
    on.q = q.data(), on.held = held.data(), on.kind = kind_of(held), on.units = units.data(), on.threads = threads;
    on.scores = scores.data(), on.plain = plain, on.steps = steps;
    const Kernels& set = kernels_for({e});
    const Free free;
    set.bound_scores(on);
}

Reduce reduce_of(const std::string& heads) {
    check(heads == "each" || heads == "sum" || heads == "max", "heads must be each, sum or max");
    return heads == "each" ? Reduce::each : heads == "sum" ? Reduce::sum : Reduce::max;
}

// The best units of each list: see `UnitChoice`. `heads`: "each", "sum" or "max".
void chosen_units(Array<const float, 3> scores, Array<const int64_t, 1> units, Array<const int64_t, 1> room,
                  const std::string& heads, int64_t sinks, int64_t recent, int threads, Array<int32_t, 2> numbers,
                  Array<int32_t, 1> counts) {
    UnitChoice on{};
    on.rows = scores.shape(0), on.g = scores.shape(1), on.width = scores.shape(2), on.most = numbers.shape(1);
    on.reduce = reduce_of(heads);
    const int64_t lists = on.rows * (on.reduce == Reduce::each ? on.g : 1);
    check(units.shape(0) == scores.shape(0) && room.shape(0) == scores.shape(0) && on.g > 0 &&
              static_cast<int64_t>(numbers.shape(0)) == lists && static_cast<int64_t>(counts.shape(0)) == lists,
          "shapes of scores, units, room, numbers and counts don't fit");
    check(sinks >= 0 && recent >= 0 && on.width <= INT32_MAX, "sinks and recent must be at least 0");
    for (int64_t r = 0; r < on.rows; r++)
        check(units.data()[r] >= 0 && units.data()[r] <= on.width && std::min(units.data()[r], room.data()[r]) <= on.most,
              "units go beyond scores, or what is chosen beyond numbers");
    on.scores = scores.data(), on.units = units.data(), on.room = room.data(), on.sinks = sinks, on.recent = recent;
    on.threads = threads, on.numbers = numbers.data(), on.counts = counts.data();
    const Free free;
    sets.front()->choose_units(on);
}

// As `chosen_units` of scores (L, heads, N), by each head's softmax of `scale` times them: see `UnitVote`.
void voted_units(Array<const float, 3> scores, Array<const int64_t, 1> units, Array<const int64_t, 1> room,
                 Array<const int64_t, 1> first, Array<const int64_t, 1> before, const std::string& heads, float scale,
                 int threads, Array<int32_t, 2> numbers, Array<int32_t, 1> counts) {
    UnitVote on{};
    on.lists = scores.shape(0), on.heads = scores.shape(1), on.width = scores.shape(2), on.most = numbers.shape(1);
    on.reduce = reduce_of(heads);
    check(on.reduce != Reduce::each, "heads must be sum or max");
    for (const Array<const int64_t, 1>* each : {&units, &room, &first, &before})
        check(each->shape(0) == scores.shape(0), "units, room, first and before must have the scores' lists");
    check(numbers.shape(0) == scores.shape(0) && counts.shape(0) == scores.shape(0) && on.heads > 0 && on.width <= INT32_MAX,
          "shapes of scores, numbers and counts don't fit");
    for (int64_t r = 0; r < on.lists; r++)
        check(units.data()[r] >= 0 && units.data()[r] <= on.width && std::min(units.data()[r], room.data()[r]) <= on.most &&
                  first.data()[r] >= 0 && before.data()[r] >= 0,
              "units go beyond scores, what is chosen beyond numbers, or first and before are below 0");
    on.scores = scores.data(), on.units = units.data(), on.room = room.data(), on.first = first.data();
    on.before = before.data(), on.scale = scale, on.threads = threads, on.numbers = numbers.data(), on.counts = counts.data();
    const Free free;
    sets.front()->vote_units(on);
}

// The pages, or slots, of units of each row's lists: see `PageLists`.
void listed_pages(Table numbers, Table table, Counts lengths, int64_t page_size, bool slots, int64_t each,
                  Array<const int64_t, 1> before, Array<int32_t, 2> listed, Array<int32_t, 1> list_lengths) {
    PageLists on{};
    on.on.rows = table.shape(0), on.on.page_size = page_size, on.on.table = table.data(), on.on.width = table.shape(1);
    on.on.lengths = lengths.data(), on.lists = numbers.shape(0), on.most = numbers.shape(1), on.each = each, on.slots = slots;
    check(page_size > 0 && each > 0, "page_size and each must be at least 1");
    check(lengths.shape(0) == table.shape(0) && before.shape(0) == table.shape(0) &&
              (on.on.rows ? on.lists % on.on.rows == 0 : on.lists == 0),
          "numbers must have lists for each of the table's rows");
    check(listed.shape(0) == numbers.shape(0) && static_cast<int64_t>(listed.shape(1)) == on.most * each &&
              list_lengths.shape(0) == numbers.shape(0),
          "shapes of numbers, listed and their lengths don't fit");
    for (int64_t r = 0; r < on.on.rows; r++)
        check(before.data()[r] >= 0 && lengths.data()[r] >= 0 &&
                  (lengths.data()[r] + page_size - 1) / page_size <= on.on.width,
              "lengths go beyond the table");
    on.numbers = numbers.data(), on.before = before.data(), on.listed = listed.data(), on.lengths = list_lengths.data();
    const Free free;
    list_pages(on);
}

// One token's whole reading of few units: what bounds say of them, the best, their pages, and attention over those. A
// unit is `each` pages, and what is read of a row at most room[r] of its units. A step asks once a layer, so that what
// lies between the kernels counts: here it is nothing.
void attend_units(Array<const float, 3> q, const Const3 held, Array<const int64_t, 1> room, const std::string& heads,
                  int64_t sinks, int64_t recent, Const2 keys, Const2 values, std::optional<Array<const float, 2>> mass,
                  Table table, Counts lengths, int64_t page_size, int64_t each, float scale, int threads,
                  Array<float, 3> out, Array<float, 2> lse) {
    const int64_t rows = q.shape(0), g = q.shape(1), d = q.shape(2), slots = keys.shape(0);
    const Reduce reduce = reduce_of(heads);
    check(page_size > 0 && page_size % 4 == 0 && page_size <= BLOCK && BLOCK % page_size == 0 && each > 0 &&
              sinks >= 0 && recent >= 0,
          "page_size must be 4, 8, 16, 32 or 64, each at least 1, sinks and recent at least 0");
    check(static_cast<int64_t>(table.shape(0)) == rows && static_cast<int64_t>(lengths.shape(0)) == rows &&
              static_cast<int64_t>(held.shape(0)) == rows && static_cast<int64_t>(room.shape(0)) == rows && g > 0,
          "q, held, room, table and lengths must have the same rows");
    check(static_cast<int64_t>(held.shape(2)) == 2 * d && static_cast<int64_t>(keys.shape(1)) == d && d > 0 &&
              static_cast<int64_t>(values.shape(0)) == slots && out.shape(0) == q.shape(0) && out.shape(1) == q.shape(1) &&
              out.shape(2) == values.shape(1) && lse.shape(0) == q.shape(0) && lse.shape(1) == q.shape(1),
          "shapes of q, held, keys, values, out and lse don't fit");
    check(!mass || (static_cast<int64_t>(mass->shape(0)) == slots && mass->shape(1) == 1), "mass must have one number a slot");
    const Kernels& set = kernels_for({d, static_cast<int64_t>(values.shape(1))});
    std::vector<int64_t> units(rows), able(rows), before(rows, 0);
    int64_t width = 0, most = 0;
    for (int64_t r = 0; r < rows; r++) {
        const int64_t length = lengths.data()[r];
        check(length >= 0 && (length + page_size - 1) / page_size <= static_cast<int64_t>(table.shape(1)),
              "lengths go beyond the table");
        units[r] = (length + each * page_size - 1) / (each * page_size);
        able[r] = std::max<int64_t>(0, std::min(units[r], room.data()[r]));
        width = std::max(width, units[r]), most = std::max(most, able[r]);
    }
    check(width <= static_cast<int64_t>(held.shape(1)), "lengths go beyond held");
    const int64_t lists = rows * (reduce == Reduce::each ? g : 1);
    const std::unique_ptr<float[]> scores(new float[rows * g * width]);
    const std::unique_ptr<int32_t[]> room_for(new int32_t[lists * (3 + most + most * each)]);
    int32_t *counts = room_for.get(), *read = counts + lists, *hole_count = read + lists, *numbers = hole_count + lists;
    int32_t* pages = numbers + lists * most;
    std::fill(hole_count, hole_count + lists, 0);
    {
        const Free free;
        set.bound_scores({rows, g, d, static_cast<int64_t>(held.shape(1)), width, q.data(), held.data(), kind_of(held),
                          units.data(), threads, scores.get(), false, 0});
        set.choose_units({rows, g, width, scores.get(), units.data(), able.data(), reduce, sinks, recent, most, threads,
                          numbers, counts});
        const Rows all{rows, page_size, table.data(), static_cast<int64_t>(table.shape(1)), lengths.data(), nullptr, 0, nullptr};
        list_pages({all, false, lists, most, each, numbers, before.data(), pages, read});
    }
    Attend on{};
    on.on = {lists, page_size, pages, most * each, read, nullptr, 0, hole_count};
    check_pages(on.on, slots / page_size);
    on.g = rows * g / std::max<int64_t>(lists, 1), on.d = d, on.dv = values.shape(1), on.q = q.data();
    on.keys = keys.data(), on.values = values.data(), on.key_kind = kind_of(keys), on.value_kind = kind_of(values);
    on.mass = mass ? mass->data() : nullptr, on.scale = scale, on.threads = threads;
    on.out = out.data(), on.lse = lse.data();
    const Free free;
    set.attend(on);
}

// Whether bounds of this kind can hold such keys.
bool rises(Kind held, Kind keys) { return held == keys || (held == Kind::bf16 && keys == Kind::f32); }

using Held = nb::ndarray<nb::ndim<3>, nb::c_contig, nb::device::cpu>;

// A whole decode step: k, v (N, 1, D) and place (N, 1, 1) become the last token of each row, which `lengths` count
// already, the bounds of their unit rise, and `attend_units`.
void step_units(Array<const float, 3> q, const Const3 k, const Const3 v, Array<const int32_t, 3> place, Held held,
                Array<const int64_t, 1> room, const std::string& heads, int64_t sinks, int64_t recent, Any2 keys,
                Any2 values, Any2 places, Table table, Counts lengths, int64_t page_size, int64_t each, float scale,
                int threads, Array<float, 3> out, Array<float, 2> lse) {
    const size_t rows = table.shape(0), slots = keys.shape(0);
    check(k.shape(0) == rows && v.shape(0) == rows && place.shape(0) == rows && k.shape(1) == 1 && v.shape(1) == 1 &&
              place.shape(1) == 1 && place.shape(2) == 1 && lengths.shape(0) == rows && held.shape(0) == rows,
          "k, v, place, held and lengths must have the table's rows, and one token each");
    check(k.shape(2) == keys.shape(1) && v.shape(2) == values.shape(1) && places.shape(1) == 1 &&
              values.shape(0) == slots && places.shape(0) == slots && held.shape(2) == 2 * k.shape(2) &&
              k.dtype() == keys.dtype() && v.dtype() == values.dtype() && rises(kind_of(held), kind_of(k)) &&
              places.dtype() == nb::dtype<int32_t>(),
          "shapes or dtypes of k, v, held and the planes don't fit");
    check(page_size > 0 && each > 0, "page_size and each must be at least 1");
    std::vector<int64_t> start(rows), at(rows);
    for (size_t r = 0; r < rows; r++) {
        start[r] = lengths.data()[r] - 1;
        check(start[r] >= 0 && start[r] / page_size < static_cast<int64_t>(table.shape(1)) &&
                  start[r] / (page_size * each) < static_cast<int64_t>(held.shape(1)),
              "lengths go beyond the table or held");
        const int64_t page = table.data()[r * table.shape(1) + start[r] / page_size];
        check(page >= 0 && (page + 1) * page_size <= static_cast<int64_t>(slots), "the table names a page that the pool does not have");
        at[r] = page * page_size + start[r] % page_size;
    }
    const size_t key = k.shape(2) * bytes_of(k), value = v.shape(2) * bytes_of(v);
    for (size_t r = 0; r < rows; r++) {
        std::memcpy(static_cast<char*>(keys.data()) + at[r] * key, static_cast<const char*>(k.data()) + r * key, key);
        std::memcpy(static_cast<char*>(values.data()) + at[r] * value, static_cast<const char*>(v.data()) + r * value, value);
        static_cast<int32_t*>(places.data())[at[r]] = place.data()[r];
    }
    const std::unique_ptr<bool[]> valid(new bool[rows]);
    std::fill(valid.get(), valid.get() + rows, true);
    raise_bounds({static_cast<int64_t>(rows), 1, static_cast<int64_t>(k.shape(2)), static_cast<int64_t>(held.shape(1)),
                  each * page_size, held.data(), k.data(), kind_of(held), kind_of(k), valid.get(), start.data(), 1});
    attend_units(q, Const3(held), room, heads, sinks, recent, Const2(keys), Const2(values), {}, table, lengths, page_size,
                 each, scale, threads, out, lse);
}

// A float as bfloat16, to the nearest, ties to even; NaN stays NaN.
uint16_t nearest(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

// Floats as bfloat16 has them.
void round_all(std::vector<float>& x) {
    for (float& each : x) {
        const uint32_t bits = uint32_t{nearest(each)} << 16;
        std::memcpy(&each, &bits, sizeof each);
    }
}

// A whole decode step that every key is asked for: k, v (N, 1, D) and place (N, 1, 1) become the last token of each row,
// which `lengths` count already; `held` (N, room, D), bfloat16, gets its key as it is before it turns. Then heads, those of
// all N / B rows of a batch row together where `layer`, vote, as queries `distance` behind all keys (see `voted_units`), and
// the tokens of their lists are read. `slots`: at places 0, 1, 2, ..., the query at the last of them, in rows that choose.
// `rounds`: what is turned of a query is bfloat16. `seen`: the query is token seen[b] - 1 of its text.
void step_keys(Array<const float, 3> q, bool rounds, const Const3 k, const Const3 v, Array<const int32_t, 3> place,
               Array<uint16_t, 3> held, float steps, int64_t distance, Array<const int64_t, 1> seen,
               Array<const int64_t, 1> room, Array<const int64_t, 1> first, Array<const int64_t, 1> before,
               Array<const bool, 1> chooses, const std::string& heads, bool layer, float vote_scale, bool slots, Floats angles, int64_t channel, bool neighbours,
               Any2 keys, Any2 values, Array<int32_t, 2> places, Table table, Counts lengths, int64_t page_size, float scale, int threads,
               Array<float, 3> out, Array<float, 2> lse) {
    const int64_t rows = q.shape(0), g = q.shape(1), d = q.shape(2), batch = room.shape(0), known = keys.shape(0);
    check(batch > 0 && rows % batch == 0 && g > 0, "q must have KV heads of each row");
    check(reduce_of(heads) != Reduce::each && distance >= 0, "heads must be sum or max, and distance at least 0");
    for (const Array<const int64_t, 1>* each : {&seen, &first, &before})
        check(static_cast<int64_t>(each->shape(0)) == batch, "seen, room, first and before must have the batch's rows");
    check(static_cast<int64_t>(chooses.shape(0)) == batch, "chooses must have the batch's rows");
    for (const Const3* each : {&k, &v})
        check(static_cast<int64_t>(each->shape(0)) == rows && each->shape(1) == 1, "k and v must have one token of each row");
    check(static_cast<int64_t>(place.shape(0)) == rows && place.shape(1) == 1 && place.shape(2) == 1 &&
              static_cast<int64_t>(table.shape(0)) == rows && static_cast<int64_t>(lengths.shape(0)) == rows &&
              static_cast<int64_t>(held.shape(0)) == rows && static_cast<int64_t>(held.shape(2)) == d,
          "place, held, table and lengths must have the rows of q");
    check(static_cast<int64_t>(k.shape(2)) == d && keys.shape(1) == k.shape(2) && v.shape(2) == values.shape(1) &&
              values.shape(0) == keys.shape(0) && places.shape(0) == keys.shape(0) && places.shape(1) == 1 &&
              k.dtype() == keys.dtype() && v.dtype() == values.dtype() && page_size > 0,
          "shapes or dtypes of k, v and the planes don't fit");
    check(out.shape(0) == q.shape(0) && out.shape(1) == q.shape(1) && out.shape(2) == values.shape(1) &&
              lse.shape(0) == q.shape(0) && lse.shape(1) == q.shape(1),
          "shapes of q, out and lse don't fit");
    const Turning by = turning_of(angles, channel, neighbours, d);
    const int64_t dv = values.shape(1);  // each part by the kernels that it has by itself
    const Kernels &turns = kernels_for({d, by.half, by.first}), &asking = kernels_for({d});
    const Kernels& reading = slots ? kernels_for({d, dv, by.half, by.first}) : kernels_for({d, dv});
    const int64_t of = rows / batch, lists = layer ? batch : rows;
    std::vector<int64_t> units(rows);
    std::vector<int64_t> at(rows);
    std::vector<int32_t> back(rows), asked(batch);
    int64_t width = 0;
    for (int64_t r = 0; r < rows; r++) {
        const int64_t length = units[r] = lengths.data()[r], index = (length - 1) / page_size;
        check(length > 0 && index < static_cast<int64_t>(table.shape(1)) && length <= static_cast<int64_t>(held.shape(1)),
              "lengths go beyond the table or held");
        check(!layer || length == units[r / of * of], "the heads of a row must have as many tokens where they vote together");
        const int64_t page = table.data()[r * table.shape(1) + index];
        check(page >= 0 && (page + 1) * page_size <= known, "the table names a page that the pool does not have");
        at[r] = page * page_size + (length - 1) % page_size;
        back[r] = -place.data()[r];
        width = std::max(width, length);
    }
    std::vector<int64_t> many(lists), able(lists), begin(lists), end(lists), none(rows, 0);
    int64_t most = 0;
    for (int64_t l = 0; l < lists; l++) {
        const int64_t b = layer ? l : l / of;
        many[l] = units[layer ? l * of : l], begin[l] = first.data()[b], end[l] = before.data()[b];
        able[l] = std::max<int64_t>(0, std::min(many[l], room.data()[b]));
        check(begin[l] >= 0 && end[l] >= 0, "first and before must be at least 0");
        most = std::max(most, able[l]);
    }
    // The token, and what is remembered of it.
    const size_t key = d * bytes_of(k), value = v.shape(2) * bytes_of(v);
    std::vector<float> plain(rows * d), asks(rows * g * d), turned(slots ? rows * g * d : 0);
    turns.turn({rows, 1, 1, d, k.data(), kind_of(k), back.data(), by, 1, plain.data()});
    for (int64_t r = 0; r < rows; r++) {
        std::memcpy(static_cast<char*>(keys.data()) + at[r] * key, static_cast<const char*>(k.data()) + r * key, key);
        std::memcpy(static_cast<char*>(values.data()) + at[r] * value, static_cast<const char*>(v.data()) + r * value, value);
        places.data()[at[r]] = place.data()[r];
        uint16_t* line = held.data() + (r * held.shape(1) + units[r] - 1) * d;
        for (int64_t i = 0; i < d; i++) line[i] = nearest(plain[r * d + i]);
    }
    // What heads say, and what is read by that.
    for (int64_t b = 0; b < batch; b++) asked[b] = static_cast<int32_t>(distance - (seen.data()[b] - 1));
    turns.turn({batch, of * g, 1, d, q.data(), Kind::f32, asked.data(), by, 1, asks.data()});
    if (rounds) round_all(asks);
    const std::unique_ptr<float[]> scores(new float[rows * g * width]);
    const std::unique_ptr<int32_t[]> ints(new int32_t[lists * (most + 1) + rows * (2 * most + 3)]);
    int32_t *numbers = ints.get(), *counts = numbers + lists * most, *wide = counts + lists, *listed = wide + rows * most;
    int32_t *read = listed + rows * most, *holes = read + rows, *least = holes + rows;
    std::fill(holes, holes + rows, 0);
    {
        const Free free;
        asking.bound_scores({rows, g, d, static_cast<int64_t>(held.shape(1)), width, asks.data(), held.data(), Kind::bf16,
                          units.data(), threads, scores.get(), true, steps});
        sets.front()->vote_units({lists, rows / lists * g, width, scores.get(), many.data(), able.data(), begin.data(), end.data(),
                        reduce_of(heads), vote_scale, most, threads, numbers, counts});
        for (int64_t r = 0; r < rows; r++) std::copy_n(numbers + (layer ? r / of : r) * most, most, wide + r * most);
        const Rows all{rows, page_size, table.data(), static_cast<int64_t>(table.shape(1)), lengths.data(), nullptr, 0, nullptr};
        list_pages({all, true, rows, most, 1, wide, none.data(), listed, read});
    }
    Attend on{};
    on.on = {rows, 1, listed, most, read, nullptr, 0, holes};
    check_pages(on.on, known);
    on.g = g, on.d = d, on.dv = dv, on.q = q.data(), on.keys = keys.data(), on.values = values.data();
    on.key_kind = kind_of(keys), on.value_kind = kind_of(values), on.scale = scale, on.threads = threads;
    on.out = out.data(), on.lse = lse.data();
    if (slots) {
        for (int64_t r = 0; r < rows; r++) {
            const bool some = chooses.data()[r / of];
            back[r] = some ? static_cast<int32_t>(read[r] - seen.data()[r / of]) : 0, least[r] = some ? -1 : 0;
        }
        turns.turn({rows, g, 1, d, q.data(), Kind::f32, back.data(), by, 1, turned.data()});
        if (rounds) round_all(turned);
        on.q = turned.data(), on.turning = by, on.places = places.data(), on.least = least;
    }
    const Free free;
    reading.attend_singles(on);
}

// Bounds of units (N, room, 2 D) rise to hold keys (N, T, D) too; token i of those that are valid is number start + i.
void raised(Held held, Const3 keys, Array<const bool, 2> valid,
            Array<const int64_t, 1> start, int64_t unit, int threads) {
    RaiseBounds on{};
    on.rows = keys.shape(0), on.count = keys.shape(1), on.d = keys.shape(2), on.room = held.shape(1), on.unit = unit;
    check(held.shape(0) == keys.shape(0) && held.shape(2) == 2 * keys.shape(2) && rises(kind_of(held), kind_of(keys)) &&
              valid.shape(0) == keys.shape(0) && valid.shape(1) == keys.shape(1) && start.shape(0) == keys.shape(0),
          "shapes or dtypes of held, keys, valid and start don't fit");
    check(unit > 0, "unit must be at least 1");
    for (int64_t r = 0; r < on.rows; r++) {
        const bool* some = valid.data() + r * on.count;
        const int64_t after = start.data()[r] + std::count(some, some + on.count, true);
        check(start.data()[r] >= 0 && (after + unit - 1) / unit <= on.room, "tokens go beyond held");
    }
    on.held = held.data(), on.keys = keys.data(), on.held_kind = kind_of(held), on.kind = kind_of(keys), on.valid = valid.data();
    on.start = start.data(), on.threads = threads;
    const Free free;
    raise_bounds(on);
}

uint32_t read_pages(Const2 keys, Const2 values, Table table, Counts lengths, int64_t page_size, int threads) {
    check(lengths.shape(0) == table.shape(0) && page_size > 0 && keys.shape(0) == values.shape(0) &&
              keys.shape(0) % page_size == 0,
          "table and lengths must have the same rows, keys and values the same pages");
    const Rows on{static_cast<int64_t>(table.shape(0)), page_size, table.data(), static_cast<int64_t>(table.shape(1)),
                  lengths.data(), nullptr, 0, nullptr};
    check_pages(on, keys.shape(0) / page_size);
    const int64_t key_bytes = page_size * keys.shape(1) * bytes_of(keys);
    const int64_t value_bytes = page_size * values.shape(1) * bytes_of(values);
    check(key_bytes % 4 == 0 && value_bytes % 4 == 0, "pages must have a multiple of 4 bytes");
    std::vector<int32_t> pages;
    for (int64_t r = 0; r < on.rows; r++)
        pages.insert(pages.end(), on.table + r * on.width,
                     on.table + r * on.width + (on.lengths[r] + page_size - 1) / page_size);
    const Pages all{static_cast<const char*>(keys.data()), static_cast<const char*>(values.data()), key_bytes,
                    value_bytes, pages.data(), static_cast<int64_t>(pages.size()), threads};
    const Free free;
    return sets.front()->read_pages(all);
}

double multiply_add(nb::ndarray<nb::ro, nb::ndim<1>, nb::c_contig, nb::device::cpu> x, float factor, int64_t group,
                    int64_t passes, int64_t tasks, int threads) {
    check(x.shape(0) == FEW && group > 0 && group <= GROUP && tasks >= 0,
          "x must have FEW numbers, and group lie between 1 and GROUP");
    const MultiplyAdd on{x.data(), kind_of(x), factor, group, passes, tasks, threads};
    const Free free;
    return sets.front()->multiply_add(on);
}

// Each operation waits for the one before: one a cycle. The compiler sees none of them.
uint64_t chain(int64_t count) {
    const Free free;
    uint64_t x = 1;
    const uint64_t y = static_cast<uint64_t>(count) | 1;
    for (int64_t i = 0; i < count; i += 8)
        for (int n = 0; n < 8; n++) {
            x ^= y;
            asm volatile("" : "+r"(x));
        }
    return x;
}

std::vector<std::string> names() {
    std::vector<std::string> found;
    for (const Kernels* each : sets) found.emplace_back(each->name);
    return found;
}

void use(const std::string& name) {
    std::vector<const Kernels*> all = known();
    const auto at = std::find_if(all.begin(), all.end(), [&](const Kernels* each) { return name == each->name; });
    if (at == all.end()) {
        std::string have;
        for (const Kernels* each : all) have += std::string(have.empty() ? "" : ", ") + each->name;
        throw nb::value_error(("instruction set " + name + " (KVFOLD_ISA, or use()) must be one of: " + have).c_str());
    }
    sets.assign(at, all.end());
}

}  // namespace

// No array is ever converted: a copy would get what the caller waits for.
NB_MODULE(_cpu, m) {
    if (const char* name = std::getenv("KVFOLD_ISA"); name && *name) use(name);
    m.doc() = "CPU kernels, compiled: see cpp/ in the sources.";
    m.attr("SHARES") = SHARES;
    m.attr("BLOCK") = BLOCK;
    m.attr("PART") = PART;
    m.attr("FEW") = FEW;
    m.attr("GROUP") = GROUP;
    m.def("names", names, "The instruction sets in use, the widest first.");
    m.def("use", use, "name"_a, "Use none that is wider than this one. Raises ValueError where the processor has it not.");
    m.def("workers", workers, "Threads that were started in this process, beside its own.");
    m.def("attend", attend, "q"_a.noconvert(), "keys"_a.noconvert(), "values"_a.noconvert(), "mass"_a.noconvert().none(), "read"_a.noconvert().none(), "table"_a.noconvert(), "lengths"_a.noconvert(),
          "holes"_a.noconvert(), "hole_count"_a.noconvert(), "page_size"_a, "scale"_a, "threads"_a, "out"_a.noconvert(), "lse"_a.noconvert(), "weights"_a.noconvert().none());
    m.def("attend_float8", attend_float8, "q"_a.noconvert(), "e5m2"_a, "keys"_a.noconvert(), "values"_a.noconvert(), "key_factor"_a.noconvert(), "value_factor"_a.noconvert(), "mass"_a.noconvert().none(),
          "read"_a.noconvert().none(), "table"_a.noconvert(), "lengths"_a.noconvert(), "holes"_a.noconvert(), "hole_count"_a.noconvert(), "page_size"_a, "scale"_a, "threads"_a,
          "out"_a.noconvert(), "lse"_a.noconvert(), "weights"_a.noconvert().none());
    m.def("attend_codes", attend_codes, "q"_a.noconvert(), "bits"_a, "keys"_a.noconvert(), "key_scale"_a.noconvert(), "key_zero"_a.noconvert(), "values"_a.noconvert(),
          "value_scale"_a.noconvert(), "value_zero"_a.noconvert(), "mass"_a.noconvert().none(), "read"_a.noconvert().none(), "table"_a.noconvert(), "lengths"_a.noconvert(),
          "holes"_a.noconvert(), "hole_count"_a.noconvert(), "page_size"_a, "scale"_a, "threads"_a, "out"_a.noconvert(), "lse"_a.noconvert(), "weights"_a.noconvert().none());
    m.def("attend_sparse", attend_sparse, "q"_a.noconvert(), "keys"_a.noconvert(), "key_map"_a.noconvert(), "values"_a.noconvert(), "value_map"_a.noconvert(), "mass"_a.noconvert().none(),
          "read"_a.noconvert().none(), "table"_a.noconvert(), "lengths"_a.noconvert(), "holes"_a.noconvert(), "hole_count"_a.noconvert(), "page_size"_a, "scale"_a, "threads"_a,
          "out"_a.noconvert(), "lse"_a.noconvert(), "weights"_a.noconvert().none());
    m.def("attend_tokens", attend_tokens, "q"_a.noconvert(), "key_bits"_a, "keys"_a.noconvert(), "key_levels"_a.noconvert().none(), "key_scale"_a.noconvert(), "key_zero"_a.noconvert().none(),
          "value_bits"_a, "values"_a.noconvert(), "value_levels"_a.noconvert().none(), "value_scale"_a.noconvert(), "value_zero"_a.noconvert().none(), "mass"_a.noconvert().none(), "read"_a.noconvert().none(),
          "table"_a.noconvert(), "lengths"_a.noconvert(), "holes"_a.noconvert(), "hole_count"_a.noconvert(), "page_size"_a, "scale"_a, "threads"_a, "out"_a.noconvert(), "lse"_a.noconvert(), "weights"_a.noconvert().none());
    m.def("write", write, "plane"_a.noconvert(), "new"_a.noconvert(), "table"_a.noconvert(), "first"_a.noconvert(), "stop"_a.noconvert(), "page_size"_a);
    m.def("close_gaps", close_gaps, "plane"_a.noconvert(), "mask"_a.noconvert(), "table"_a.noconvert(), "lengths"_a.noconvert(), "page_size"_a, "threads"_a);
    m.def("punch_holes", punch_holes, "mask"_a.noconvert(), "lengths"_a.noconvert(), "holes"_a.noconvert(), "hole_count"_a.noconvert());
    m.def("top_mask", top_mask, "scores"_a.noconvert(), "count"_a.noconvert(), "chosen"_a.noconvert(), "threads"_a);
    m.def("causal", causal, "q"_a.noconvert(), "k"_a.noconvert(), "v"_a.noconvert(), "scale"_a, "window"_a, "shares"_a.noconvert(), "threads"_a, "out"_a.noconvert(), "lse"_a.noconvert(),
          "sums"_a.noconvert().none());
    m.def("column_sums", column_sums, "q"_a.noconvert(), "k"_a.noconvert(), "lse"_a.noconvert(), "bias"_a.noconvert().none(), "first"_a.noconvert(), "scale"_a, "threads"_a, "sums"_a.noconvert());
    m.def("most_alike", most_alike, "left"_a.noconvert(), "right"_a.noconvert(), "left2"_a.noconvert().none(), "right2"_a.noconvert().none(), "asks"_a.noconvert(), "there"_a.noconvert(),
          "threads"_a, "best"_a.noconvert(), "first"_a.noconvert());
    m.def("linear", linear, "x"_a.noconvert(), "weight"_a.noconvert(), "bias"_a.noconvert().none(), "threads"_a,
          "out"_a.noconvert());
    m.def("attend_turned", attend_turned, "q"_a.noconvert(), "keys"_a.noconvert(), "values"_a.noconvert(), "places"_a.noconvert(), "angles"_a.noconvert(), "first"_a, "neighbours"_a, "least"_a.noconvert().none(), "mass"_a.noconvert().none(), "table"_a.noconvert(), "lengths"_a.noconvert(), "holes"_a.noconvert(), "hole_count"_a.noconvert(), "scale"_a, "threads"_a, "out"_a.noconvert(), "lse"_a.noconvert());
    m.def("turn", turn, "x"_a.noconvert(), "steps"_a.noconvert(), "angles"_a.noconvert(), "first"_a, "neighbours"_a, "threads"_a, "out"_a.noconvert());
    m.def("bound_scores", bound_scores, "q"_a.noconvert(), "held"_a.noconvert(), "units"_a.noconvert(), "plain"_a, "steps"_a, "threads"_a, "scores"_a.noconvert());
    m.def("vote_units", voted_units, "scores"_a.noconvert(), "units"_a.noconvert(), "room"_a.noconvert(), "first"_a.noconvert(), "before"_a.noconvert(), "heads"_a, "scale"_a, "threads"_a, "numbers"_a.noconvert(), "counts"_a.noconvert());
    m.def("choose_units", chosen_units, "scores"_a.noconvert(), "units"_a.noconvert(), "room"_a.noconvert(), "heads"_a, "sinks"_a, "recent"_a, "threads"_a, "numbers"_a.noconvert(), "counts"_a.noconvert());
    m.def("list_pages", listed_pages, "numbers"_a.noconvert(), "table"_a.noconvert(), "lengths"_a.noconvert(), "page_size"_a, "slots"_a, "each"_a, "before"_a.noconvert(), "listed"_a.noconvert(), "list_lengths"_a.noconvert());
    m.def("attend_units", attend_units, "q"_a.noconvert(), "held"_a.noconvert(), "room"_a.noconvert(), "heads"_a, "sinks"_a, "recent"_a, "keys"_a.noconvert(), "values"_a.noconvert(), "mass"_a.noconvert().none(), "table"_a.noconvert(), "lengths"_a.noconvert(), "page_size"_a, "each"_a, "scale"_a, "threads"_a, "out"_a.noconvert(), "lse"_a.noconvert());
    m.def("step_keys", step_keys, "q"_a.noconvert(), "rounds"_a, "k"_a.noconvert(), "v"_a.noconvert(), "place"_a.noconvert(), "held"_a.noconvert(), "steps"_a, "distance"_a, "seen"_a.noconvert(), "room"_a.noconvert(), "first"_a.noconvert(), "before"_a.noconvert(), "chooses"_a.noconvert(), "heads"_a, "layer"_a, "vote_scale"_a, "slots"_a, "angles"_a.noconvert(), "channel"_a, "neighbours"_a, "keys"_a.noconvert(), "values"_a.noconvert(), "places"_a.noconvert(), "table"_a.noconvert(), "lengths"_a.noconvert(), "page_size"_a, "scale"_a, "threads"_a, "out"_a.noconvert(), "lse"_a.noconvert());
    m.def("step_units", step_units, "q"_a.noconvert(), "k"_a.noconvert(), "v"_a.noconvert(), "place"_a.noconvert(), "held"_a.noconvert(), "room"_a.noconvert(), "heads"_a, "sinks"_a, "recent"_a, "keys"_a.noconvert(), "values"_a.noconvert(), "places"_a.noconvert(), "table"_a.noconvert(), "lengths"_a.noconvert(), "page_size"_a, "each"_a, "scale"_a, "threads"_a, "out"_a.noconvert(), "lse"_a.noconvert());
    m.def("raise_bounds", raised, "held"_a.noconvert(), "keys"_a.noconvert(), "valid"_a.noconvert(), "start"_a.noconvert(), "unit"_a, "threads"_a);
    m.def("read", [](Array<const float, 1> x, int threads) {
        const Free free;
        return sets.front()->read(x.data(), static_cast<int64_t>(x.shape(0)), threads);
    }, "x"_a.noconvert(), "threads"_a, "The sum of an array: as fast as memory can be read.");
    m.def("read_pages", read_pages, "keys"_a.noconvert(), "values"_a.noconvert(), "table"_a.noconvert(), "lengths"_a.noconvert(),
          "page_size"_a, "threads"_a, "The sum of the words of rows' pages, in their order: as fast as those can be read.");
    m.def("multiply_add", multiply_add, "x"_a.noconvert(), "factor"_a, "group"_a, "passes"_a, "tasks"_a, "threads"_a,
          "tasks x passes x group times the sum of x times a factor: as fast as cores can widen, multiply and add.");
    m.def("chain", chain, "count"_a, "As many operations (in eights), each of which waits for the one before: one a cycle.");
    m.def("exponential", [](Array<const float, 1> x, Array<float, 1> out) {
        check(out.shape(0) == x.shape(0), "out must be as long as x");
        sets.front()->exponential(x.data(), out.data(), static_cast<int64_t>(x.shape(0)));
    }, "x"_a.noconvert(), "out"_a.noconvert());
    m.def("widen", [](nb::ndarray<nb::ro, nb::ndim<1>, nb::c_contig, nb::device::cpu> x, Array<float, 1> out) {
        check(out.shape(0) == x.shape(0) && x.shape(0) % 16 == 0, "x and out must be as long, a multiple of 16");
        sets.front()->widen(x.data(), kind_of(x), out.data(), static_cast<int64_t>(x.shape(0)));
    }, "x"_a.noconvert(), "out"_a.noconvert());
}

}  // namespace kvfold
