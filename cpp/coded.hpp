// Decode attention over pages of codes, read as they are stored (KIVI, arXiv:2402.02750). A channel of the keys has a scale
// s and a zero z for each page, a run of a value's channels has them for each token:
//     q . k_t = sum_d (q_d s_d) c_td + sum_d q_d z_d     the first product and the second sum once a page
//     out_d  += (p_t s_t) c_td + p_t z_t                 the first product and the sum over t once a block
// So a code is shifted, masked, made a float, and multiplied once for each query head: nothing is restored.
#pragma once

#include "kernels.hpp"
#include "lanes.hpp"
#include "paged.hpp"
#include "products.hpp"
#include "threads.hpp"
#include "units.hpp"

namespace kvfold::ISA {
namespace {

#if LANES == 16
constexpr uvec QUARTERS = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};
#elif LANES == 8
constexpr uvec QUARTERS = {0, 0, 0, 0, 1, 1, 1, 1};
#else
constexpr uvec QUARTERS = {0, 0, 0, 0};
#endif

// Four words of so many bytes each, over and over.
template <int BYTES>
inline uvec four_words(const uint8_t* from) {
    typedef uint32_t words __attribute__((vector_size(16)));
    typedef uint16_t shorts __attribute__((vector_size(8)));
    typedef uint8_t bytes __attribute__((vector_size(4)));
    words four;
    if constexpr (BYTES == 4) {
        __builtin_memcpy(&four, from, 16);
    } else if constexpr (BYTES == 2) {
        shorts two;
        __builtin_memcpy(&two, from, 8);
        four = __builtin_convertvector(two, words);
    } else {
        bytes one;
        __builtin_memcpy(&one, from, 4);
        four = __builtin_convertvector(one, words);
    }
#if LANES == 16
    return (uvec)_mm512_broadcast_i32x4((__m128i)four);
#elif LANES == 8
    return (uvec)_mm256_broadcastsi128_si256((__m128i)four);
#else
    return (uvec)four;
#endif
}

// Bits below each of the codes from number v * LANES on, in half a word. A code is not shifted down by them, since a shift
// that differs by lane is slow: it is masked where it stands, and what multiplies it is so many powers of two smaller.
template <int BITS>
inline uvec below(int v) {
    if constexpr (Unit<BITS>::VECTORS == 1) return uvec{};
    return ((QUARTERS + static_cast<uint32_t>(v * (LANES / 4))) & (Unit<BITS>::HALF - 1u)) * Unit<BITS>::WORD;
}

// 2 to the power of -below.
template <int BITS>
inline vec shrink(int v) {
    return (vec)((127u - below<BITS>(v)) << 23);
}

// LANES codes from number v * LANES of a unit on, times 2^below; WORD is the bytes of the unit's words.
template <int BITS, int WORD>
inline vec codes(const uint8_t* unit, int v) {
    using U = Unit<BITS>;
    constexpr uint32_t MOST = (1u << U::WORD) - 1;
    uvec words = four_words<WORD>(unit);
    if constexpr (U::VECTORS == 1)  // a vector has both halves of a word
        return __builtin_convertvector((ivec)((words >> (QUARTERS * U::WORD)) & MOST), vec);
    const bool upper = v >= U::VECTORS / 2;
    if (upper) words >>= 16;
    uvec code = words & (MOST << below<BITS>(v));
    if constexpr (BITS == 3 && WORD == 4) {  // the third bit of a code in the upper half lies beside that in the lower one
        const uvec third = four_words<2>(unit + 16);
        code |= (upper ? third << 1 : third << 2) & (4u << below<BITS>(v));
    } else if constexpr (BITS == 3) {
        const uvec third = four_words<1>(unit + 4 * WORD) >> (QUARTERS + static_cast<uint32_t>(v * (LANES / 4)));
        code |= (third & 1u) << (below<BITS>(v) + 2u);
    }
    return __builtin_convertvector((ivec)code, vec);
}

// The same address, of which the compiler does not know it: words are cheaper to load again than to keep.
inline const uint8_t* again(const uint8_t* at) {
    asm volatile("" : "+r"(at));
    return at;
}

// acc[h][t] += q[h] . codes[t] over LANES numbers from number v * LANES of a unit on.
template <int BITS, int WORD, int H>
inline __attribute__((always_inline)) void add_dots(const float* q, int64_t d, const uint8_t* keys, int64_t token, int v,
                                                    vec (&acc)[H][4]) {
    const uint8_t* at = again(keys);
    vec x[H];
#pragma GCC unroll 4
    for (int h = 0; h < H; h++) x[h] = load(q + h * d);
#pragma GCC unroll 4
    for (int t = 0; t < 4; t++) {
        const vec code = codes<BITS, WORD>(at + t * token, v);
#pragma GCC unroll 4
        for (int h = 0; h < H; h++) acc[h][t] += x[h] * code;
    }
}

// logits[h * BLOCK + 0..3] += q[h] . codes[0..3] over so many units of which each has `vectors` (0: all that fit). A function
// of its own, for the sake of its registers.
template <int BITS, int WORD, int H>
__attribute__((noinline)) void code_dots(const float* q, int64_t d, const uint8_t* keys, int64_t token, int64_t units,
                                         int64_t vectors, float* logits) {
    using U = Unit<BITS>;
    const int count = vectors ? static_cast<int>(vectors) : U::VECTORS;
    vec acc[H][4];
#pragma GCC unroll 4
    for (int h = 0; h < H; h++)
#pragma GCC unroll 4
        for (int t = 0; t < 4; t++) acc[h][t] = vec{};
    for (int64_t u = 0; u < units; u++, q += U::NUMBERS, keys += U::BYTES) {
        if (WORD == 4 && !vectors) {
#pragma GCC unroll 16
            for (int v = 0; v < U::VECTORS; v++) add_dots<BITS, WORD>(q + v * LANES, d, keys, token, v, acc);
        } else {
#pragma GCC unroll 1
            for (int v = 0; v < count; v++) add_dots<BITS, WORD>(q + v * LANES, d, keys, token, v, acc);
        }
    }
#pragma GCC unroll 4
    for (int h = 0; h < H; h++)
        *reinterpret_cast<loose_quad*>(logits + h * BLOCK) += sums(acc[h][0], acc[h][1], acc[h][2], acc[h][3]);
}

// logits[h * BLOCK + 0..3] = q[h] . codes[0..3] + zeros[h].
template <int BITS, int H>
inline void code_dots(const float* q, const float* zeros, const uint8_t* keys, int64_t d, float* logits) {
    using U = Unit<BITS>;
    const int64_t token = code_bytes(d, BITS), whole = d / U::NUMBERS, rest = d % U::NUMBERS;
    for (int h = 0; h < H; h++)
        for (int t = 0; t < 4; t++) logits[h * BLOCK + t] = zeros[h];
    if (whole) code_dots<BITS, 4, H>(q, d, keys, token, whole, 0, logits);
    if (!rest) return;
    q += whole * U::NUMBERS, keys += whole * U::BYTES;
    const int64_t bits = (rest + 3) / 4 * U::WORD;
    if (bits > 16)
        code_dots<BITS, 4, H>(q, d, keys, token, 1, rest / LANES, logits);
    else if (bits > 8)
        code_dots<BITS, 2, H>(q, d, keys, token, 1, rest / LANES, logits);
    else
        code_dots<BITS, 1, H>(q, d, keys, token, 1, rest / LANES, logits);
}

template <int BITS>
inline void code_dots_of_all(const float* q, const float* zeros, const uint8_t* keys, int64_t g, int64_t d, float* logits) {
    for (int64_t h = 0; h < g;) {
        const int64_t now = rows_of_four(g - h);
        const float* from = q + h * d;
        float* to = logits + h * BLOCK;
        switch (now) {
            case 4: code_dots<BITS, 4>(from, zeros + h, keys, d, to); break;
            case 3: code_dots<BITS, 3>(from, zeros + h, keys, d, to); break;
            case 2: code_dots<BITS, 2>(from, zeros + h, keys, d, to); break;
            default: code_dots<BITS, 1>(from, zeros + h, keys, d, to);
        }
        h += now;
    }
}

// Weights times codes, summed over the runs of a block: where one unit of every value lies, and what multiplies it.
struct Weighed {
    const Run* runs;
    int64_t count;
    const uint8_t* values;  // of all slots, at the unit
    int64_t token;          // bytes
    const float* weights;   // (g, groups, BLOCK), of the first head
    int64_t head;           // floats from a head's weights to the next one's
    float* sums;            // (g, dv), of the first head, at the unit
    int64_t dv;
};

// W vectors from number v * LANES of the unit on, which share their weights; V is v, where it is known beforehand.
template <int BITS, int WORD, int H, int W, int V = -1>
__attribute__((noinline)) void weigh_codes(const Weighed& on, const float* weights, int v = V) {
    if constexpr (V >= 0) v = V;
    vec acc[H][W];
    float* to = on.sums + v * LANES;
#pragma GCC unroll 4
    for (int h = 0; h < H; h++)
#pragma GCC unroll 4
        for (int n = 0; n < W; n++) acc[h][n] = vec{};
    for (int64_t r = 0; r < on.count; r++) {
        const uint8_t* value = on.values + on.runs[r].place * on.token;
        const float* weight = weights + on.runs[r].at;
        for (int64_t i = 0; i < on.runs[r].held; i++, value += on.token) {
            vec x[H];
#pragma GCC unroll 4
            for (int h = 0; h < H; h++) x[h] = everywhere(weight[h * on.head + i]);
#pragma GCC unroll 4
            for (int n = 0; n < W; n++) {
                const vec code = codes<BITS, WORD>(again(value), v + n);
#pragma GCC unroll 4
                for (int h = 0; h < H; h++) acc[h][n] += x[h] * code;
            }
        }
    }
#pragma GCC unroll 4
    for (int h = 0; h < H; h++)
#pragma GCC unroll 4
        for (int n = 0; n < W; n++) {
            float* place = to + h * on.dv + n * LANES;
            store(place, load(place) + acc[h][n] * shrink<BITS>(v + n));
        }
}

// A whole unit, from vector V on.
template <int BITS, int H, int V>
inline void weigh_unit(const Weighed& on, int64_t first, int64_t channels) {
    using U = Unit<BITS>;
    if constexpr (V < U::VECTORS) {
        weigh_codes<BITS, 4, H, U::TOGETHER, V>(on, on.weights + (first + V * LANES) / channels * BLOCK);
        weigh_unit<BITS, H, V + U::TOGETHER>(on, first, channels);
    }
}

// Vectors one by one.
template <int BITS, int WORD, int H>
inline void weigh_vectors(const Weighed& on, int64_t first, int64_t channels, int64_t vectors) {
    for (int v = 0; v < vectors; v++)
        weigh_codes<BITS, WORD, H, 1>(on, on.weights + (first + v * LANES) / channels * BLOCK, v);
}

template <int BITS, int H>
inline void weigh_all_codes(Weighed on, int64_t groups) {
    using U = Unit<BITS>;
    const int64_t channels = on.dv / groups, whole = on.dv / U::NUMBERS, rest = on.dv % U::NUMBERS;
    for (int64_t u = 0; u < whole; u++, on.values += U::BYTES, on.sums += U::NUMBERS) {
        if (channels % (U::TOGETHER * LANES))
            weigh_vectors<BITS, 4, H>(on, u * U::NUMBERS, channels, U::VECTORS);
        else
            weigh_unit<BITS, H, 0>(on, u * U::NUMBERS, channels);
    }
    if (!rest) return;
    const int64_t bits = (rest + 3) / 4 * U::WORD, first = whole * U::NUMBERS;
    if (bits > 16)
        weigh_vectors<BITS, 4, H>(on, first, channels, rest / LANES);
    else if (bits > 8)
        weigh_vectors<BITS, 2, H>(on, first, channels, rest / LANES);
    else
        weigh_vectors<BITS, 1, H>(on, first, channels, rest / LANES);
}

template <class T>
inline void widen_any(const T* from, float* to, int64_t count) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) store(to + i, load(from + i));
    if (i == count) return;
    T rest[LANES] = {};
    __builtin_memcpy(rest, from + i, (count - i) * sizeof(T));
    const vec last = load(rest);
    __builtin_memcpy(to + i, &last, (count - i) * sizeof(float));
}

inline void widen_any(const void* from, Kind kind, int64_t first, float* to, int64_t count) {
    switch (kind) {
        case Kind::f32: return widen_any(static_cast<const float*>(from) + first, to, count);
        case Kind::bf16: return widen_any(static_cast<const bf16*>(from) + first, to, count);
        case Kind::f16: return widen_any(static_cast<const f16*>(from) + first, to, count);
        default: return;
    }
}

// What a thread needs besides the answer; each array begins on a cache line.
struct Room {
    float *q, *aimed, *zeros, *logits, *top, *total, *scale, *zero, *weights, *raw, *shrunk, *rest;

    Room(const Codes& on, int64_t more) {
        const int64_t g = on.g, d = on.d, all = on.groups * BLOCK;
        const int64_t sizes[] = {g * d, g * d, g, g * BLOCK, g, g, all, all, g * all, 2 * d > all ? 2 * d : all, d, more};
        float** const arrays[] = {&q, &aimed, &zeros, &logits, &top, &total, &scale, &zero, &weights, &raw, &shrunk, &rest};
        int64_t floats = 0;
        for (const int64_t size : sizes) floats += lines(size);
        float* at = scratch(floats);
        for (int i = 0; i < 12; i++) *arrays[i] = at, at += lines(sizes[i]);
    }
};

template <int BITS>
struct CodeReader : Part<Codes> {
    Room room;
    Products<BITS> products;

    CodeReader(const Attend& all, int64_t row, int64_t start, int64_t stop)
        : Part(all, row, start, stop), room(on, Products<BITS>::size(on)), products(on, room.rest) {}

    // Asks for numbers of scales or zeros that are wanted soon.
    void soon(const void* from, int64_t first, int64_t count) const {
        const int64_t size = on.scale_kind == Kind::f32 ? 4 : 2;
        for (int64_t byte = 0; byte < count * size; byte += 64)
            __builtin_prefetch(static_cast<const char*>(from) + first * size + byte);
    }

    // The runs of a block in which some token is to be seen.
    int64_t runs_of(int64_t block, int64_t count, Run* runs) const {
        const int64_t size = on.on.page_size;
        int64_t used = 0;
        for (int64_t at = 0; at < count;) {
            const int64_t index = (block + at) / size, offset = (block + at) % size;
            const int64_t held = smaller(size - offset, count - at), page = pages()[index];
            if (any(block + at, block + at + held)) runs[used++] = {page, page * size + offset, at, held};
            at += held;
        }
        return used;
    }

    // Queries times a page's scales, and their products with its zeros.
    void aim(int64_t page) const {
        float *scale = room.raw, *zero = room.raw + on.d;
        widen_any(on.key_scale, on.scale_kind, page * on.d, scale, on.d);
        widen_any(on.key_zero, on.scale_kind, page * on.d, zero, on.d);
        if constexpr (PRODUCTS)
            if (products.keys) return products.aim(room.q, scale, zero, room.zeros);
        for (int64_t i = 0; i < on.d; i += LANES) store(scale + i, load(scale + i) * load(room.shrunk + i));
        for (int64_t h = 0; h < on.g; h++) {
            const float* q = room.q + h * on.d;
            vec found{};
            for (int64_t i = 0; i < on.d; i += LANES) {
                const vec x = load(q + i);
                store(room.aimed + h * on.d + i, x * load(scale + i));
                found += x * load(zero + i);
            }
            room.zeros[h] = sum(found);
        }
    }

    // Logits (g, BLOCK) of a block, NEVER where no token is to be seen.
    void look(int64_t block, int64_t count, const Run* runs, int64_t used) const {
        const int64_t g = on.g, token = code_bytes(on.d, BITS), value = code_bytes(on.dv, BITS);
        const uint8_t *keys = static_cast<const uint8_t*>(on.keys), *values = static_cast<const uint8_t*>(on.values);
        float* logits = room.logits;
        if (count < BLOCK || on.read)
            for (int64_t i = 0; i < g * BLOCK; i++) logits[i] = NEVER;
        for (int64_t r = 0; r < used; r++) {
            const Run& run = runs[r];
            soon(on.value_scale, run.place * on.groups, run.held * on.groups);
            soon(on.value_zero, run.place * on.groups, run.held * on.groups);
            aim(run.page);
            bool done = false;
            if constexpr (PRODUCTS)
                if ((done = products.keys)) {
                    for (int64_t byte = 0; byte < run.held * value; byte += 64)
                        __builtin_prefetch(values + run.place * value + byte);
                    products.look(keys + run.place * token, run.held, room.zeros, logits + run.at);
                }
            for (int64_t t = 0; t < run.held && !done; t += 4) {
                for (int64_t byte = 0; byte < 4 * value; byte += 64)  // what is wanted next
                    __builtin_prefetch(values + (run.place + t) * value + byte);
                code_dots_of_all<BITS>(room.aimed, room.zeros, keys + (run.place + t) * token, g, on.d, logits + run.at + t);
            }
            if (on.mass)
                for (int64_t h = 0; h < g; h++)
                    for (int64_t i = 0; i < run.held; i++) logits[h * BLOCK + run.at + i] += on.mass[run.place + i];
        }
        hide(block, count, logits);
    }

    // What lies token by token, group by group; C is the number of groups, or 0.
    template <int C>
    void split(int64_t held, float* to) const {
        const int64_t groups = C ? C : on.groups;
        const float* __restrict from = room.raw;
        for (int64_t c = 0; c < groups; c++)
            for (int64_t i = 0; i < held; i++) to[c * BLOCK + i] = from[i * groups + c];
    }

    // Scales or zeros of a block's values, (BLOCK, groups); 0 where there is no token.
    void by_token(const void* from, const Run* runs, int64_t used, int64_t count, float* to) const {
        const int64_t groups = on.groups;
        if (count < BLOCK || on.read)
            for (int64_t i = 0; i < groups * BLOCK; i++) to[i] = 0;
        for (int64_t r = 0; r < used; r++)
            widen_any(from, on.scale_kind, runs[r].place * groups, to + runs[r].at * groups, runs[r].held * groups);
    }

    // Scales or zeros of a block's values, (groups, BLOCK); 0 where there is no token.
    void by_group(const void* from, const Run* runs, int64_t used, int64_t count, float* to) const {
        const int64_t groups = on.groups;
        if (count < BLOCK || on.read)
            for (int64_t i = 0; i < groups * BLOCK; i++) to[i] = 0;
        for (int64_t r = 0; r < used; r++) {
            const Run& run = runs[r];
            widen_any(from, on.scale_kind, run.place * groups, room.raw, run.held * groups);
            switch (groups) {
                case 1: split<1>(run.held, to + run.at); break;
                case 2: split<2>(run.held, to + run.at); break;
                case 4: split<4>(run.held, to + run.at); break;
                default: split<0>(run.held, to + run.at);
            }
        }
    }

    // out += weights times values.
    void add_values(const Run* runs, int64_t used, int64_t count, float* out) const {
        const int64_t g = on.g, dv = on.dv, groups = on.groups, channels = dv / groups;
        if constexpr (PRODUCTS)
            if (products.values) {
                by_token(on.value_scale, runs, used, count, room.scale);
                by_token(on.value_zero, runs, used, count, room.zero);
                return products.weigh(runs, used, room.logits, room.scale, room.zero, reinterpret_cast<int16_t*>(room.raw),
                                      reinterpret_cast<uint8_t*>(room.weights), out);
            }
        by_group(on.value_scale, runs, used, count, room.scale);
        by_group(on.value_zero, runs, used, count, room.zero);
        for (int64_t h = 0; h < g; h++)
            for (int64_t c = 0; c < groups; c++) {
                vec found{};
                for (int64_t i = 0; i < BLOCK; i += LANES) {
                    const vec weight = load(room.logits + h * BLOCK + i);
                    store(room.weights + (h * groups + c) * BLOCK + i, weight * load(room.scale + c * BLOCK + i));
                    found += weight * load(room.zero + c * BLOCK + i);
                }
                const vec zeros = everywhere(sum(found));
                float* to = out + h * dv + c * channels;
                for (int64_t i = 0; i < channels; i += LANES) store(to + i, load(to + i) + zeros);
            }
        Weighed all{runs, used, static_cast<const uint8_t*>(on.values), code_bytes(dv, BITS), room.weights, groups * BLOCK, out, dv};
        for (int64_t h = 0; h < g;) {
            const int64_t now = rows_of_four(g - h);
            all.weights = room.weights + h * groups * BLOCK, all.sums = out + h * dv;
            switch (now) {
                case 4: weigh_all_codes<BITS, 4>(all, groups); break;
                case 3: weigh_all_codes<BITS, 3>(all, groups); break;
                case 2: weigh_all_codes<BITS, 2>(all, groups); break;
                default: weigh_all_codes<BITS, 1>(all, groups);
            }
            h += now;
        }
    }

    // One row's slots from `start` to `stop` by online softmax.
    void attend(float* out, float* lse) const {
        const int64_t g = on.g, dv = on.dv, size = on.on.page_size, token = code_bytes(on.d, BITS);
        for (int64_t i = 0; i < g * on.d; i++) room.q[i] = on.q[row * g * on.d + i] * on.scale;
        if constexpr (PRODUCTS)
            if (products.keys) products.ask(room.q);
        for (int64_t i = 0; i < on.d; i += LANES)
            store(room.shrunk + i, shrink<BITS>(static_cast<int>(i % Unit<BITS>::NUMBERS / LANES)));
        for (int64_t h = 0; h < g; h++) room.top[h] = NEVER, room.total[h] = 0;
        for (int64_t i = 0; i < g * dv; i++) out[i] = 0;
        Run runs[BLOCK / 4 + 1];
        for (int64_t block = start; block < stop; block += BLOCK) {
            const int64_t count = smaller(BLOCK, stop - block), used = runs_of(block, count, runs);
            if (used) look(block, count, runs, used);
            tell(block, count, room.logits, used > 0);
            if (!used) continue;
            // The next block's keys come in meanwhile.
            for (int64_t at = block + BLOCK; at < smaller(stop, block + 2 * BLOCK);) {
                const int64_t held = smaller(size - at % size, block + 2 * BLOCK - at);
                const int64_t page = pages()[at / size], place = page * size + at % size;
                soon(on.key_scale, page * on.d, on.d);
                soon(on.key_zero, page * on.d, on.d);
                for (int64_t byte = 0; byte < held * token; byte += 64)
                    __builtin_prefetch(static_cast<const uint8_t*>(on.keys) + place * token + byte);
                at += held;
            }
            for (int64_t h = 0; h < g; h++)
                soften(room.logits + h * BLOCK, room.top + h, room.total + h, out + h * dv);
            add_values(runs, used, count, out);
        }
        if constexpr (PRODUCTS)
            if (products.values) products.end(out, room.raw);
        finish(room.top, room.total, out, lse);
    }
};

void attend_codes(const Codes& on) {
    switch (on.bits) {
        case 2: return attend_in_parts(on, attend_part<CodeReader<2>>);
        case 3: return attend_in_parts(on, attend_part<CodeReader<3>>);
        case 4: return attend_in_parts(on, attend_part<CodeReader<4>>);
        default: return attend_in_parts(on, attend_part<CodeReader<8>>);
    }
}

}  // namespace
}  // namespace kvfold::ISA
