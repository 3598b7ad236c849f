// Decode attention over tokens in codes, each of which has all that it takes to be read: scales of its own, and no page's.
//     x_d = s level[c_d]      a table of levels that all tokens share, and the token's scale
//     x_d = s_r c_d + z_r     scale and zero of each run r of channels
// Memory gives codes; what they stand for is worked out once for all heads of a group, a page at a time, in the first cache.
#pragma once

#include "coded.hpp"
#include "kernels.hpp"
#include "lanes.hpp"
#include "paged.hpp"
#include "threads.hpp"

namespace kvfold::ISA {
namespace {

constexpr int MOST_LEVELS = 16;

// A table of levels in registers, over and over where it is shorter: of an index only the lowest bits count.
struct Levels {
#if LANES == 16
    vec all;
    explicit Levels(const float* from) : all(load(from)) {}
    vec at(uvec index) const { return (vec)_mm512_permutexvar_ps((__m512i)index, (__m512)all); }
#elif LANES == 8
    vec low, high;
    explicit Levels(const float* from) : low(load(from)), high(load(from + 8)) {}
    vec at(uvec index) const {
        const __m256i here = (__m256i)index;
        return (vec)_mm256_blendv_ps(_mm256_permutevar8x32_ps((__m256)low, here), _mm256_permutevar8x32_ps((__m256)high, here),
                                     (__m256)(index << 28));
    }
#else
    const float* from;
    explicit Levels(const float* from) : from(from) {}
    vec at(uvec index) const {
        vec found;
        for (int i = 0; i < LANES; i++) found[i] = from[index[i] % MOST_LEVELS];
        return found;
    }
#endif
};

// The codes of LANES numbers from number v * LANES of a unit on, in the lowest bits; what is above them is anything, but for
// three bits. WORD is the bytes of the unit's words.
template <int BITS, int WORD>
inline uvec indices(const uint8_t* unit, int v) {
    using U = Unit<BITS>;
    const uvec place = QUARTERS + static_cast<uint32_t>(v * (LANES / 4));
    const uvec index = four_words<WORD>(unit) >> (place * U::WORD);
    if constexpr (BITS == 3) {  // see ops/codes/packing.py: the third bits of a word of 32 bits lie by turns
        const uvec at = WORD == 4 ? (place & 7u) * 2u + (place >> 3) : place;
        const uvec third = four_words<WORD == 4 ? 2 : 1>(unit + 4 * WORD) >> at;
        return (index & 3u) | (third & 1u) << 2;
    }
    return index;
}

template <int BITS, bool TABLE, int WORD>
inline vec number(const uint8_t* unit, int v, const Levels& levels) {
    const uvec index = indices<BITS, WORD>(unit, v);
    if constexpr (TABLE) return levels.at(index);
    return __builtin_convertvector((ivec)(index & ((1u << BITS) - 1)), vec);
}

template <int BITS, bool TABLE, int WORD>
inline void rest_of(const uint8_t* unit, int64_t numbers, const Levels& levels, float* out) {
    for (int v = 0; v * LANES < numbers; v++) store(out + v * LANES, number<BITS, TABLE, WORD>(unit, v, levels));
}

// The levels, or the codes as they are, of so many vectors of `size` numbers that lie one after the other.
template <int BITS, bool TABLE>
__attribute__((noinline)) void decode(const uint8_t* from, int64_t count, int64_t size, const float* table, float* out) {
    using U = Unit<BITS>;
    const int64_t whole = size / U::NUMBERS, rest = size % U::NUMBERS, token = code_bytes(size, BITS);
    const int64_t word = (rest + 3) / 4 * U::WORD;  // bits
    const Levels levels(table);
    for (int64_t i = 0; i < count; i++, from += token, out += size) {
        for (int64_t u = 0; u < whole; u++)
#pragma GCC unroll 16
            for (int v = 0; v < U::VECTORS; v++)
                store(out + u * U::NUMBERS + v * LANES, number<BITS, TABLE, 4>(from + u * U::BYTES, v, levels));
        if (!rest) continue;
        const uint8_t* last = from + whole * U::BYTES;
        float* to = out + whole * U::NUMBERS;
        if (word > 16)
            rest_of<BITS, TABLE, 4>(last, rest, levels, to);
        else if (word > 8)
            rest_of<BITS, TABLE, 2>(last, rest, levels, to);
        else
            rest_of<BITS, TABLE, 1>(last, rest, levels, to);
    }
}

using Decode = void (*)(const uint8_t*, int64_t, int64_t, const float*, float*);

inline Decode decode_for(int bits, bool table) {
    switch (bits) {
        case 2: return table ? decode<2, true> : decode<2, false>;
        case 3: return table ? decode<3, true> : decode<3, false>;
        case 4: return table ? decode<4, true> : decode<4, false>;
        default: return decode<8, false>;
    }
}

// How the vectors of one kind lie: codes, what multiplies them, and how they are read.
struct Side {
    const uint8_t* codes;
    const void *scale, *zero;  // (slots, groups); zero is null where there is a table
    int64_t size, groups, token;
    Decode decode;
    float table[MOST_LEVELS];

    Side(const Vectors& from, int64_t size)
        : codes(static_cast<const uint8_t*>(from.codes)), scale(from.scale), zero(from.zero), size(size), groups(from.groups),
          token(code_bytes(size, from.bits)), decode(decode_for(from.bits, from.levels)) {
        for (int i = 0; i < MOST_LEVELS; i++) table[i] = from.levels ? from.levels[i % (1 << from.bits)] : 0;
    }

    void soon(int64_t slot, int64_t count) const {
        for (int64_t byte = 0; byte < count * token; byte += 64) __builtin_prefetch(codes + slot * token + byte);
    }
};

struct TokenReader : Part<Tokens> {
    Side keys, values;
    float *q, *logits, *top, *total, *numbers, *scales, *zeros;

    TokenReader(const Attend& all, int64_t row, int64_t start, int64_t stop)
        : Part(all, row, start, stop), keys(on.of_keys, on.d), values(on.of_values, on.dv) {
        const int64_t g = on.g, size = on.on.page_size, groups = keys.groups > values.groups ? keys.groups : values.groups;
        q = scratch(g * (on.d + BLOCK + 2) + size * (on.d > on.dv ? on.d : on.dv) + 2 * size * groups);
        logits = q + g * on.d, top = logits + g * BLOCK, total = top + g, numbers = total + g;
        scales = numbers + size * (on.d > on.dv ? on.d : on.dv), zeros = scales + size * groups;
    }

    // What the codes of some slots stand for, in `numbers`; where there is a table it is to be multiplied by `scales`.
    void fetch(const Side& side, int64_t place, int64_t count) const {
        side.decode(side.codes + place * side.token, count, side.size, side.table, numbers);
        widen_any(side.scale, on.scale_kind, place * side.groups, scales, count * side.groups);
        if (!side.zero) return;
        widen_any(side.zero, on.scale_kind, place * side.groups, zeros, count * side.groups);
        const int64_t channels = side.size / side.groups;
        float* x = numbers;
        for (int64_t r = 0; r < count * side.groups; r++)
            for (const float* end = x + channels; x < end; x += LANES) store(x, load(x) * scales[r] + zeros[r]);
    }

    // The same address, of what is there already: nothing is asked for.
    Soon nothing() const { return {reinterpret_cast<const char*>(numbers), 0}; }

    // Logits (g, BLOCK) of a block, NEVER where no token is to be seen; false where that is so of all.
    bool look(int64_t block, int64_t count, bool* live) const {
        const int64_t size = on.on.page_size, g = on.g, d = on.d;
        bool some = false;
        for (int64_t at = 0; at < count; at += size) {
            if (!(live[at / size] = shows(block, at, count, logits))) continue;
            some = true;
            const int64_t place = this->place(block + at);
            float* line = logits + at;
            if (block + at + size < stop) keys.soon(this->place(block + at + size), size);
            values.soon(place, size);
            fetch(keys, place, size);
            look_at_all(q, numbers, nothing(), size, g, d, line);
            for (int64_t h = 0; h < g && !keys.zero; h++)
                for (int64_t i = 0; i < size; i++) line[h * BLOCK + i] *= scales[i];
            add_masses(place, line);
        }
        if (some) hide(block, count, logits);
        return some;
    }

    // out += weights times values, over the pages of a block in which some token is to be seen.
    void add_values(int64_t block, int64_t count, const bool* live, float* out) const {
        const int64_t size = on.on.page_size, g = on.g, dv = on.dv;
        for (int64_t at = 0; at < count; at += size) {
            if (!live[at / size]) continue;
            const int64_t held = smaller(size, count - at);
            fetch(values, place(block + at), held);
            for (int64_t h = 0; h < g && !values.zero; h++)
                for (int64_t i = 0; i < held; i++) logits[h * BLOCK + at + i] *= scales[i];
            const Page<float> page{numbers, held, at, nothing()};
            weigh_pages(logits, &page, 1, g, dv, out);
        }
    }

    // One row's slots from `start` to `stop` by online softmax.
    void attend(float* out, float* lse) const {
        const int64_t g = on.g, dv = on.dv;
        for (int64_t i = 0; i < g * on.d; i++) q[i] = on.q[row * g * on.d + i] * on.scale;
        for (int64_t h = 0; h < g; h++) top[h] = NEVER, total[h] = 0;
        for (int64_t i = 0; i < g * dv; i++) out[i] = 0;
        bool live[BLOCK / 4];
        for (int64_t block = start; block < stop; block += BLOCK) {
            const int64_t count = smaller(BLOCK, stop - block);
            const bool some = look(block, count, live);
            tell(block, count, logits, some);
            if (!some) continue;
            for (int64_t h = 0; h < g; h++) soften(logits + h * BLOCK, top + h, total + h, out + h * dv);
            add_values(block, count, live, out);
        }
        finish(top, total, out, lse);
    }
};

void attend_tokens(const Tokens& on) { attend_in_parts(on, attend_part<TokenReader>); }

}  // namespace
}  // namespace kvfold::ISA
