// What is remembered of units of tokens, and what of the choice among them no vector helps with.

#include "choice.hpp"

#include <algorithm>

#include "threads.hpp"

namespace kvfold {
namespace {

// The larger of two floats by their bits, NaN if one is: `ENDLESS` is infinity, and the sign is the highest bit.
template <class U, U ENDLESS>
inline U larger(U a, U b) {
    constexpr U SIGN = U(1) << (8 * sizeof(U) - 1);
    const U left = a & SIGN ? U(~a) : U(a | SIGN), right = b & SIGN ? U(~b) : U(b | SIGN);
    const bool whole = U(a & ~SIGN) <= ENDLESS, other = U(b & ~SIGN) <= ENDLESS;
    return whole & (!other | (right > left)) ? b : a;
}

// A float by its bits as bfloat16: no less, and NaN as NaN.
inline uint16_t upward(uint32_t x) {
    if ((x & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(x >> 16 | 0x40u);
    return static_cast<uint16_t>((x & 0x80000000u ? x : x + 0xffffu) >> 16);  // below zero what is cut off is above
}

template <class U, U ENDLESS, class K>
void raise_row(const void* context, int64_t row) {
    constexpr K SIGN = K(1) << (8 * sizeof(K) - 1);
    const RaiseBounds& on = *static_cast<const RaiseBounds*>(context);
    const int64_t d = on.d;
    U* held = static_cast<U*>(on.held) + row * on.room * 2 * d;
    const K* key = static_cast<const K*>(on.keys) + row * on.count * d;
    const auto as = [](K x) {
        if constexpr (sizeof(U) < sizeof(K)) return upward(x);
        else return x;
    };
    int64_t number = on.start[row];
    for (int64_t t = 0; t < on.count; t++, key += d) {
        if (!on.valid[row * on.count + t]) continue;
        U* high = held + number++ / on.unit * 2 * d;
        for (int64_t i = 0; i < d; i++) high[i] = larger<U, ENDLESS>(high[i], as(key[i]));
        for (int64_t i = 0; i < d; i++) high[d + i] = larger<U, ENDLESS>(high[d + i], as(K(key[i] ^ SIGN)));
    }
}

}  // namespace

float highest_of(float* numbers, int64_t most, int64_t count) {
    std::nth_element(numbers, numbers + most - 1, numbers + count, [](float a, float b) { return a > b; });
    return numbers[most - 1];
}

void list_pages(const PageLists& on) {
    const int64_t lists = on.on.rows ? on.lists / on.on.rows : 0, most = on.most * on.each, size = on.on.page_size;
    for (int64_t list = 0; list < on.lists; list++) {
        const int64_t row = list / lists, length = on.on.lengths[row];
        const int64_t held = on.slots ? length : (length + size - 1) / size;
        const int32_t *number = on.numbers + list * on.most, *pages = on.on.table + row * on.on.width;
        int32_t* out = on.listed + list * most;
        int64_t count = 0, slack = 0;
        for (int64_t k = 0; k < on.most && number[k] >= 0; k++) {
            const int64_t first = number[k] * on.each - on.before[row];
            for (int64_t i = std::max<int64_t>(first, 0); i < std::min(first + on.each, held); i++) {
                out[count++] = static_cast<int32_t>(on.slots ? pages[i / size] * size + i % size : pages[i]);
                if (!on.slots && i == held - 1) slack = held * size - length;
            }
        }
        std::fill(out + count, out + most, -1);
        on.lengths[list] = static_cast<int32_t>(on.slots ? count : count * size - slack);
    }
}

void raise_bounds(const RaiseBounds& on) {
    const Task task = on.kind == Kind::f16    ? raise_row<uint16_t, 0x7c00, uint16_t>
                      : on.kind == Kind::bf16 ? raise_row<uint16_t, 0x7f80, uint16_t>
                      : on.held_kind == Kind::bf16 ? raise_row<uint16_t, 0x7f80, uint32_t>
                                                   : raise_row<uint32_t, 0x7f800000u, uint32_t>;
    for_each(on.rows, on.rows * on.count * on.d < 32768 ? 1 : on.threads, task, &on);
}

}  // namespace kvfold
