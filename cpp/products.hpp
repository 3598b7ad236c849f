// Integer products of codes, where one instruction multiplies and sums four bytes in each lane (AVX-512 VNNI). Codes are
// bytes as they are. What multiplies them, queries times a page's scales or weights times a block's, is rounded to 16 bits,
//     x_i = step v_i + rest_i,  step = max |x| / MOST,  |rest_i| <= step / 2,  v_i = 256 high_i + low_i,
// so that there are two products, of the high and of the low bytes:
//     sum_i x_i c_i = step sum_i v_i c_i + sum_i rest_i c_i,  the last sum with the middle code in place of each c_i.
// What that leaves out, sum_i rest_i (c_i - middle), is at most n middle / MOST of what half a code in each of n places
// may come to, by which the format rounds: 1.5 % for 64 codes of 4 bits. tests/ops/test_products.py has what is found.
#pragma once

#include "kernels.hpp"
#include "lanes.hpp"
#include "units.hpp"

namespace kvfold::ISA {
namespace {

#if !defined(__AVX512VNNI__)
constexpr bool PRODUCTS = false;
template <int BITS>
struct Products {
    static int64_t size(const Codes&) { return 0; }
    Products(const Codes&, float*) {}
};
#else
constexpr bool PRODUCTS = true;
constexpr float MOST = 127 * 256 + 127;
constexpr float LEAST = 1e-30f;  // below it nothing counts, and quotients would be infinite

// Codes of a unit as bytes: byte 4w + b has FIELDS codes, of which code j is number 4 (b FIELDS + j) + w.
template <int BITS>
constexpr int FIELDS = 8 / Unit<BITS>::WORD;
template <int BITS>
constexpr float MIDDLE = ((1 << BITS) - 1) / 2.0f;

// Order of the four bytes of a word, where they have `SHARE` scales: those of a scale lie SHARE apart.
template <int SHARE>
constexpr int ORDER[4] = {0, 1, 2, 3};
template <>
inline constexpr int ORDER<2>[4] = {0, 2, 1, 3};

inline vec transposed(vec x) {  // as four rows of four
    return __builtin_shufflevector(x, x, 0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
}

// Numbers of whole units, field by field in the order of their bytes.
template <int BITS>
inline void by_field(const float* x, float* out, int64_t count) {
    constexpr int F = FIELDS<BITS>;
    for (int64_t i = 0; i < count; i += 16 * F)
        for (int j = 0; j < F; j++) {
            const float* from = x + i + 4 * j;
            __m512 four = _mm512_castps128_ps512(_mm_loadu_ps(from));
            four = _mm512_insertf32x4(four, _mm_loadu_ps(from + 4 * F), 1);
            four = _mm512_insertf32x4(four, _mm_loadu_ps(from + 8 * F), 2);
            four = _mm512_insertf32x4(four, _mm_loadu_ps(from + 12 * F), 3);
            store(out + i + 16 * j, transposed((vec)four));
        }
}

// The way back, of bytes in the order of ORDER; `room` has as many numbers as a unit.
template <int BITS, int SHARE>
inline void by_number(float* x, float* room, int64_t count) {
    constexpr int F = FIELDS<BITS>;
    for (int64_t i = 0; i < count; i += 16 * F, x += 16 * F) {
        for (int j = 0; j < F; j++) store(room + 16 * j, transposed(load(x + 16 * j)));
        for (int j = 0; j < F; j++)
            for (int at = 0; at < 4; at++)
                __builtin_memcpy(x + 4 * (ORDER<SHARE>[at] * F + j), room + 16 * j + 4 * at, 4 * sizeof(float));
    }
}

inline vec size_of(vec x) { return (vec)((uvec)x & 0x7fffffffu); }
inline ivec rounded(vec x) { return (ivec)_mm512_cvtps_epi32((__m512)x); }
inline vec floats(ivec x) { return __builtin_convertvector(x, vec); }
inline ivec dot4(ivec sum, __m512i codes, __m512i bytes) {
    return (ivec)_mm512_dpbusd_epi32((__m512i)sum, codes, bytes);
}

// 16 bytes of each of four tokens; those of three bits have 8 more, of their third bits, which come to lie beside them.
struct Four {
    __m512i words, third;
};

inline __m128i sixteen(const uint8_t* at) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at)); }
inline __m128i eight(const uint8_t* at) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(at)); }

// Of tokens that have UNITS units (0: any number; the others are the ones that are usual), unit u.
template <int BITS, int UNITS>
inline __attribute__((always_inline)) Four four_tokens(const uint8_t* at, int64_t token, int64_t u) {
    Four x{};
    if constexpr (BITS != 3 && UNITS == 1) {
        x.words = _mm512_loadu_si512(at);
    } else if constexpr (BITS != 3 && UNITS == 2) {
        const __m512i a = _mm512_loadu_si512(at), b = _mm512_loadu_si512(at + 64);
        x.words = u ? _mm512_shuffle_i32x4(a, b, 0xdd) : _mm512_shuffle_i32x4(a, b, 0x88);
    } else {
        at += u * Unit<BITS>::BYTES;
        x.words = _mm512_castsi128_si512(sixteen(at));
        x.words = _mm512_inserti32x4(x.words, sixteen(at + token), 1);
        x.words = _mm512_inserti32x4(x.words, sixteen(at + 2 * token), 2);
        x.words = _mm512_inserti32x4(x.words, sixteen(at + 3 * token), 3);
    }
    if constexpr (BITS == 3) {
        at += 16;
        const __m128i low = _mm_unpacklo_epi64(eight(at), eight(at + token));
        const __m128i high = _mm_unpacklo_epi64(eight(at + 2 * token), eight(at + 3 * token));
        const uvec both = (uvec)_mm512_cvtepu16_epi32(_mm256_set_m128i(high, low));
        x.third = (__m512i)((both | both << 15) & 0x55555555u);
    }
    return x;
}

// Code j of every byte.
template <int BITS>
inline __attribute__((always_inline)) __m512i field(const Four& x, int j) {
    if constexpr (BITS == 8) return x.words;
    constexpr uint32_t mask = ((1u << Unit<BITS>::WORD) - 1) * 0x01010101u;
    uvec code = ((uvec)x.words >> (j * Unit<BITS>::WORD)) & mask;
    if constexpr (BITS == 3) {
        const uvec third = (uvec)x.third;
        code |= (j ? third >> (2 * j - 2) : third << 2) & 0x04040404u;
    }
    return (__m512i)code;
}

// V vectors of a query's numbers times a page's scales, by field, as bytes: v and v + 128 shifted down by a byte.
template <int V>
inline void bytes_of(const vec (&x)[V], float turn, uint8_t* high, uint8_t* low, ivec& total) {
    ivec v[V];
#pragma GCC unroll 8
    for (int i = 0; i < V; i++) v[i] = rounded(x[i] * turn), total += v[i];
    if constexpr (V == 4) {  // packing takes vectors lane by lane, and a permutation puts them one behind the other
        const __m512i turned = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        const __m512i a = _mm512_packs_epi32((__m512i)v[0], (__m512i)v[1]), b = _mm512_packs_epi32((__m512i)v[2], (__m512i)v[3]);
        const __m512i carry = _mm512_set1_epi16(128), byte = _mm512_set1_epi16(255);
        const __m512i above = _mm512_packs_epi16(_mm512_srai_epi16(_mm512_add_epi16(a, carry), 8),
                                                 _mm512_srai_epi16(_mm512_add_epi16(b, carry), 8));
        const __m512i below = _mm512_packus_epi16(_mm512_and_si512(a, byte), _mm512_and_si512(b, byte));
        _mm512_storeu_si512(high, _mm512_permutexvar_epi32(turned, above));
        _mm512_storeu_si512(low, _mm512_permutexvar_epi32(turned, below));
    } else {
#pragma GCC unroll 8
        for (int i = 0; i < V; i++) {
            _mm_storeu_si128(reinterpret_cast<__m128i*>(high + i * LANES), _mm512_cvtepi32_epi8((__m512i)((v[i] + 128) >> 8)));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(low + i * LANES), _mm512_cvtepi32_epi8((__m512i)v[i]));
        }
    }
}

// A query's numbers times the scales of a page, (d,) by field, as two rows of bytes, high and low. Returns their step.
// V vectors are in registers at once.
template <int V>
inline float aim_bytes(const float* q, const float* scale, int64_t d, uint8_t* bytes, ivec& total) {
    vec top{}, x[V];
    for (int64_t i = 0; i < d; i += V * LANES)
#pragma GCC unroll 8
        for (int k = 0; k < V; k++) {
            x[k] = load(q + i + k * LANES) * load(scale + i + k * LANES);
            top = larger(top, size_of(x[k]));
        }
    const float most = highest(top), turn = most > LEAST ? MOST / most : 0;
    for (int64_t i = 0; i < d; i += V * LANES) {
        if (d > V * LANES)
#pragma GCC unroll 8
            for (int k = 0; k < V; k++) x[k] = load(q + i + k * LANES) * load(scale + i + k * LANES);
        bytes_of<V>(x, turn, bytes + i, bytes + d + i, total);
    }
    return most / MOST;
}

// logits[h * BLOCK + t] = step[h] (q[h] . codes[t]) + zeros[h] for `count` tokens, 4 to 16; the bytes of a head are 2d.
template <int BITS, int H, int UNITS>
__attribute__((noinline)) void byte_dots(const uint8_t* q, int64_t d, const float* step, const float* zeros,
                                         const uint8_t* keys, int64_t token, int64_t count, float* logits) {
    constexpr int F = FIELDS<BITS>;
    const int64_t units = UNITS ? UNITS : d / (16 * F);
    ivec found[H][4];
#pragma GCC unroll 2
    for (int n = 0; n < 4; n += 2) {
        ivec acc[2][H][2] = {};
        const uint8_t* first = keys + smaller(4 * n, count - 4) * token;
        const uint8_t* second = keys + smaller(4 * n + 4, count - 4) * token;
        const uint8_t* x = q;
#pragma GCC unroll 2
        for (int64_t u = 0; u < units; u++) {
            const Four a = four_tokens<BITS, UNITS>(first, token, u), b = four_tokens<BITS, UNITS>(second, token, u);
#pragma GCC unroll 4
            for (int j = 0; j < F; j++, x += 16) {
                const __m512i left = field<BITS>(a, j), right = field<BITS>(b, j);
#pragma GCC unroll 4
                for (int h = 0; h < H; h++)
#pragma GCC unroll 2
                    for (int half = 0; half < 2; half++) {
                        const __m512i bytes = _mm512_broadcast_i32x4(sixteen(x + (2 * h + half) * d));
                        acc[half][h][0] = dot4(acc[half][h][0], left, bytes);
                        acc[half][h][1] = dot4(acc[half][h][1], right, bytes);
                    }
            }
        }
#pragma GCC unroll 4
        for (int h = 0; h < H; h++)
#pragma GCC unroll 2
            for (int k = 0; k < 2; k++) found[h][n + k] = (acc[0][h][k] << 8) + acc[1][h][k];
    }
#pragma GCC unroll 4
    for (int h = 0; h < H; h++) {
        const vec sum = quarter(halve(floats(found[h][0]), floats(found[h][1])), halve(floats(found[h][2]), floats(found[h][3])));
        const vec line = transposed(sum) * step[h] + zeros[h];
        if (count == LANES)
            store(logits + h * BLOCK, line);
        else
            __builtin_memcpy(logits + h * BLOCK, &line, count * sizeof(float));
    }
}

template <int BITS, int H>
inline void byte_dots(const uint8_t* q, int64_t d, const float* step, const float* zeros, const uint8_t* keys, int64_t count,
                      float* logits) {
    const int64_t token = code_bytes(d, BITS);
    if constexpr (BITS == 2)
        if (token == 16) return byte_dots<BITS, H, 1>(q, d, step, zeros, keys, token, count, logits);
    if constexpr (BITS == 2 || BITS == 4)
        if (token == 32) return byte_dots<BITS, H, 2>(q, d, step, zeros, keys, token, count, logits);
    byte_dots<BITS, H, 0>(q, d, step, zeros, keys, token, count, logits);
}

// Of a run of a page's tokens, in fours; `rows_of_four` heads at once.
template <int BITS>
inline void byte_dots_of_all(const uint8_t* q, int64_t g, int64_t d, const float* step, const float* zeros,
                             const uint8_t* keys, int64_t count, float* logits) {
    for (int64_t h = 0; h < g;) {
        const int64_t now = rows_of_four(g - h);
        const uint8_t* x = q + 2 * h * d;
        float* to = logits + h * BLOCK;
        switch (now) {
            case 4: byte_dots<BITS, 4>(x, d, step + h, zeros + h, keys, count, to); break;
            case 3: byte_dots<BITS, 3>(x, d, step + h, zeros + h, keys, count, to); break;
            case 2: byte_dots<BITS, 2>(x, d, step + h, zeros + h, keys, count, to); break;
            default: byte_dots<BITS, 1>(x, d, step + h, zeros + h, keys, count, to);
        }
        h += now;
    }
}

// Every lane becomes what `join` makes of all lanes that lie C apart.
template <int C, class Join>
inline vec of_all(vec x, Join join) {
    if constexpr (C <= 8) x = join(x, __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
    if constexpr (C <= 4) x = join(x, __builtin_shufflevector(x, x, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3));
    if constexpr (C <= 2) x = join(x, __builtin_shufflevector(x, x, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1));
    if constexpr (C <= 1) x = join(x, __builtin_shufflevector(x, x, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0));
    return x;
}

// What the values of a block share, token by token and group by group as it is stored.
struct Shared {
    float *scale, *zero;  // (BLOCK, groups): over the largest of its group; with the middle code counted in
    float* top;           // (groups,) the largest of each group; over again up to LANES
};

// The largest of each of C groups, and numbers over it; C is a divisor of LANES.
template <int C>
inline void share(const Shared& on, float middle) {
    vec top{};
    for (int64_t i = 0; i < C * BLOCK; i += LANES) {
        const vec scale = load(on.scale + i);
        store(on.zero + i, load(on.zero + i) + scale * middle);
        top = larger(top, size_of(scale));
    }
    top = of_all<C>(top, [](vec a, vec b) { return larger(a, b); });
    const vec turn = top > LEAST ? 1 / top : vec{};
    for (int64_t i = 0; i < C * BLOCK; i += LANES) store(on.scale + i, load(on.scale + i) * turn);
    store(on.top, top);
}

// Words as their bytes, high ones with what low ones, which have a sign, take away.
inline __m128i bytes_of(__m128i v) {
    const __m128i high = _mm_and_si128(_mm_add_epi16(v, _mm_set1_epi16(128)), _mm_set1_epi16(-256));
    return _mm_or_si128(high, _mm_and_si128(v, _mm_set1_epi16(255)));
}

// Words (BLOCK, C) as bytes: of four tokens that follow each other the high ones, then the low ones, (BLOCK / 4, 2, C, 4).
template <int C>
inline void by_four(const int16_t* words, uint8_t* bytes) {
    const auto eight_bytes = [](const int16_t* at) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(at)); };
    const auto to = [](uint8_t* at) { return reinterpret_cast<__m128i*>(at); };
    if constexpr (C <= 2) {
        const __m128i order = C == 1 ? _mm_setr_epi8(1, 3, 5, 7, 0, 2, 4, 6, 9, 11, 13, 15, 8, 10, 12, 14)
                                     : _mm_setr_epi8(1, 5, 9, 13, 3, 7, 11, 15, 0, 4, 8, 12, 2, 6, 10, 14);
        for (int64_t i = 0; i < C * BLOCK; i += 8) {
            const __m128i v = bytes_of(_mm_loadu_si128(reinterpret_cast<const __m128i*>(words + i)));
            _mm_storeu_si128(to(bytes + 2 * i), _mm_shuffle_epi8(v, order));
        }
    } else {
        const __m128i order = _mm_setr_epi8(1, 9, 3, 11, 5, 13, 7, 15, 0, 8, 2, 10, 4, 12, 6, 14);
        for (int64_t t = 0; t < BLOCK; t += 4)
            for (int64_t c = 0; c < C; c += 4) {
                const int16_t* v = words + t * C + c;
                const __m128i a = bytes_of(_mm_unpacklo_epi64(eight_bytes(v), eight_bytes(v + C)));
                const __m128i b = bytes_of(_mm_unpacklo_epi64(eight_bytes(v + 2 * C), eight_bytes(v + 3 * C)));
                const __m128i left = _mm_shuffle_epi8(a, order), right = _mm_shuffle_epi8(b, order);
                _mm_storeu_si128(to(bytes + (2 * t * C + 4 * c)), _mm_unpacklo_epi16(left, right));
                _mm_storeu_si128(to(bytes + (2 * t * C + 4 * C + 4 * c)), _mm_unpackhi_epi16(left, right));
            }
    }
}

// One head's weights (BLOCK,) times scales, as bytes. Writes the step of each group, and what zeros and middle codes come to.
template <int C>
inline void weigh_scales(const float* weights, const Shared& on, float middle, int16_t* words, uint8_t* bytes, float* step,
                         float* zero) {
    vec top{}, zeros{};
    for (int64_t i = 0; i < BLOCK; i += LANES) top = larger(top, load(weights + i));
    const float most = highest(top), turn = most > LEAST ? MOST / most : 0, back = most / MOST;
    ivec total{};
    const uvec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (int64_t i = 0; i < BLOCK; i += LANES) {
        const vec turned = load(weights + i) * turn;
#pragma GCC unroll 8
        for (int k = 0; k < C; k++) {
            const uvec from = lane / static_cast<uint32_t>(C) + static_cast<uint32_t>(k * (LANES / C));
            const vec each = C == 1 ? turned : (vec)_mm512_permutexvar_ps((__m512i)from, (__m512)turned);
            const ivec v = rounded(each * load(on.scale + i * C + k * LANES));
            total += v;
            zeros += each * load(on.zero + i * C + k * LANES);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(words + i * C + k * LANES), _mm512_cvtepi32_epi16((__m512i)v));
        }
    }
    const auto add = [](vec a, vec b) { return a + b; };
    const vec steps = load(on.top) * back;
    zeros = of_all<C>(zeros, add) * back - of_all<C>(floats(total), add) * steps * middle;
    __builtin_memcpy(step, &steps, C * sizeof(float));
    __builtin_memcpy(zero, &zeros, C * sizeof(float));
    by_four<C>(words, bytes);
}

// Bytes of weights times codes, summed over the runs of a block.
struct ByteWeighed {
    const Run* runs;
    int64_t count;
    const uint8_t* values;      // of all slots
    int64_t token, groups, dv;  // bytes of a value, its groups, its numbers
    const uint8_t* weights;     // (g, BLOCK / 4, 2, groups, 4), of the first head
    const float *step, *zero;   // (g, groups), likewise
    float* sums;                // (g, dv) by field, likewise
};

// What groups that follow each other share, for the bytes of a word in the order of ORDER<SHARE>.
template <int SHARE>
inline __m512i of_groups(const void* at) {
    if constexpr (SHARE == 1) {
        int32_t one;
        __builtin_memcpy(&one, at, 4);
        return _mm512_set1_epi32(one);
    } else if constexpr (SHARE == 2) {
        int64_t two;
        __builtin_memcpy(&two, at, 8);
        return _mm512_set1_epi64(two);
    } else {
        return _mm512_broadcast_i32x4(sixteen(static_cast<const uint8_t*>(at)));
    }
}

// Four tokens' words, w by w: in each four lanes a byte of all four, in the order of ORDER<SHARE>.
template <int SHARE>
inline __m512i by_byte(__m512i words) {
    constexpr int a = ORDER<SHARE>[1], b = ORDER<SHARE>[2];
    const __m128i order = _mm_setr_epi8(0, 4, 8, 12, a, 4 + a, 8 + a, 12 + a, b, 4 + b, 8 + b, 12 + b, 3, 7, 11, 15);
    return _mm512_shuffle_epi8(words, _mm512_broadcast_i32x4(order));
}

template <int BITS, int UNITS, int SHARE>
inline __attribute__((always_inline)) Four four_values(const uint8_t* at, int64_t token, int64_t u) {
    const __m512i turn = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    if constexpr (BITS != 3 && UNITS == 2) {  // (token, unit, word) of the two vectors
        const __m512i both = _mm512_setr_epi32(0, 8, 16, 24, 1, 9, 17, 25, 2, 10, 18, 26, 3, 11, 19, 27);
        const __m512i from = _mm512_add_epi32(both, _mm512_set1_epi32(static_cast<int>(4 * u)));
        return {by_byte<SHARE>(_mm512_permutex2var_epi32(_mm512_loadu_si512(at), from, _mm512_loadu_si512(at + 64))), from};
    }
    Four x = four_tokens<BITS, UNITS>(at, token, u);
    x.words = by_byte<SHARE>(_mm512_permutexvar_epi32(turn, x.words));
    if constexpr (BITS == 3) x.third = by_byte<SHARE>(_mm512_permutexvar_epi32(turn, x.third));
    return x;
}

template <int BITS, int H, int UNITS, int SHARE>
__attribute__((noinline)) void weigh_bytes(const ByteWeighed& on, int64_t u) {
    constexpr int F = FIELDS<BITS>;
    const int64_t group = SHARE > 1 ? u * SHARE : u * 16 * F / (on.dv / on.groups), head = 2 * on.groups * BLOCK;
    ivec acc[2][H][F] = {};
    for (int64_t r = 0; r < on.count; r++) {
        const uint8_t* value = on.values + on.runs[r].place * on.token;
        const uint8_t* weight = on.weights + (on.runs[r].at / 4 * 2 * on.groups + group) * 4;
        for (int64_t i = 0; i < on.runs[r].held; i += 4, value += 4 * on.token, weight += 8 * on.groups) {
            const Four x = four_values<BITS, UNITS, SHARE>(value, on.token, u);
#pragma GCC unroll 4
            for (int j = 0; j < F; j++) {
                const __m512i code = field<BITS>(x, j);
#pragma GCC unroll 4
                for (int h = 0; h < H; h++)
#pragma GCC unroll 2
                    for (int half = 0; half < 2; half++)
                        acc[half][h][j] = dot4(acc[half][h][j], code,
                                               of_groups<SHARE>(weight + h * head + half * 4 * on.groups));
            }
        }
    }
#pragma GCC unroll 4
    for (int h = 0; h < H; h++) {
        const vec step = (vec)of_groups<SHARE>(on.step + h * on.groups + group);
        const vec zero = (vec)of_groups<SHARE>(on.zero + h * on.groups + group);
#pragma GCC unroll 4
        for (int j = 0; j < F; j++) {
            float* to = on.sums + h * on.dv + (u * F + j) * 16;
            store(to, load(to) + zero + step * floats((acc[0][h][j] << 8) + acc[1][h][j]));
        }
    }
}

template <int BITS, int H, int SHARE>
inline void weigh_bytes_of_units(const ByteWeighed& on) {
    constexpr bool one = BITS == 2 && SHARE < 4, two = (BITS == 2 || BITS == 4) && SHARE < 4;
    const int64_t units = on.dv / (16 * FIELDS<BITS>);
    for (int64_t u = 0; u < units; u++)
        if (one && units == 1)
            weigh_bytes<BITS, H, one ? 1 : 0, SHARE>(on, u);
        else if (two && units == 2)
            weigh_bytes<BITS, H, two ? 2 : 0, SHARE>(on, u);
        else
            weigh_bytes<BITS, H, 0, SHARE>(on, u);
}

template <int BITS, int H>
inline void weigh_all_bytes(const ByteWeighed& on) {
    switch (16 * FIELDS<BITS> * on.groups / on.dv) {
        case 2: return weigh_bytes_of_units<BITS, H, 2>(on);
        case 4: return weigh_bytes_of_units<BITS, H, 4>(on);
        default: return weigh_bytes_of_units<BITS, H, 1>(on);
    }
}

// Whole units, of whose bytes those of a word have 1, 2 or 4 scales; and whole vectors of all tokens' scales.
template <int BITS>
inline bool values_are_whole(int64_t dv, int64_t groups) {
    constexpr int64_t numbers = 16 * FIELDS<BITS>;
    const int64_t channels = dv / groups;
    if (groups != 1 && groups != 2 && groups != 4 && groups != 8) return false;
    return dv % numbers == 0 && (channels % numbers == 0 || channels * 2 == numbers || channels * 4 == numbers);
}

// Whole units, whose sums 32 bits hold.
template <int BITS>
inline bool keys_are_whole(int64_t d) {
    return d % (16 * FIELDS<BITS>) == 0 && d * static_cast<int64_t>(MOST) < (int64_t{1} << 31 >> BITS);
}

// What one part of a row needs for its products, in `room`.
template <int BITS>
struct Products {
    const Codes& on;
    const bool keys, values;  // whether they are multiplied as bytes
    float *q, *scale, *step, *top, *steps, *zeros;
    uint8_t* bytes;

    static int64_t size(const Codes& on) {
        const int64_t g = on.g, d = on.d;
        return lines(g * d) + lines(d) + lines(g * d / 2) + lines(on.groups) + lines(g) + 2 * lines(g * on.groups);
    }
    Products(const Codes& on, float* room)
        : on(on), keys(keys_are_whole<BITS>(on.d)), values(values_are_whole<BITS>(on.dv, on.groups)) {
        const int64_t g = on.g, d = on.d;
        const int64_t sizes[] = {g * d, d, g * d / 2, on.groups, g, g * on.groups, g * on.groups};
        float* parts;
        float** const arrays[] = {&q, &scale, &parts, &top, &step, &steps, &zeros};
        for (int i = 0; i < 7; i++) *arrays[i] = room, room += lines(sizes[i]);
        bytes = reinterpret_cast<uint8_t*>(parts);
    }

    void ask(const float* queries) const { by_field<BITS>(queries, q, on.g * on.d); }

    // Queries times a page's scales, and what they come to with its zeros, which are changed, and middle
    // codes.
    void aim(const float* queries, const float* scales, float* zero, float* to) const {
        by_field<BITS>(scales, scale, on.d);
        for (int64_t i = 0; i < on.d; i += LANES) store(zero + i, load(zero + i) + load(scales + i) * MIDDLE<BITS>);
        for (int64_t h = 0; h < on.g; h++) {
            ivec total{};
            const float* x = q + h * on.d;
            uint8_t* to_bytes = bytes + 2 * h * on.d;
            step[h] = on.d % (4 * LANES) ? aim_bytes<1>(x, scale, on.d, to_bytes, total)
                                         : aim_bytes<4>(x, scale, on.d, to_bytes, total);
            vec found{};
            for (int64_t i = 0; i < on.d; i += LANES) found += load(queries + h * on.d + i) * load(zero + i);
            to[h] = sum(found - floats(total) * (step[h] * MIDDLE<BITS>));
        }
    }

    void look(const uint8_t* tokens, int64_t held, const float* zero, float* logits) const {
        const int64_t token = code_bytes(on.d, BITS);
        for (int64_t t = 0; t < held; t += LANES)
            byte_dots_of_all<BITS>(bytes, on.g, on.d, step, zero, tokens + t * token, smaller((held - t + 3) / 4 * 4, LANES),
                                   logits + t);
    }

    // sums (g, dv), by field, += weights (g, BLOCK) times values, whose scales and zeros lie token by token.
    void weigh(const Run* runs, int64_t used, const float* weights, float* scales, float* zero, int16_t* words,
               uint8_t* parts, float* sums) const {
        switch (on.groups) {
            case 1: return weigh<1>(runs, used, weights, {scales, zero, top}, words, parts, sums);
            case 2: return weigh<2>(runs, used, weights, {scales, zero, top}, words, parts, sums);
            case 4: return weigh<4>(runs, used, weights, {scales, zero, top}, words, parts, sums);
            default: return weigh<8>(runs, used, weights, {scales, zero, top}, words, parts, sums);
        }
    }

    template <int C>
    void weigh(const Run* runs, int64_t used, const float* weights, const Shared& shared, int16_t* words, uint8_t* parts,
               float* sums) const {
        const int64_t g = on.g, head = 2 * C * BLOCK;
        share<C>(shared, MIDDLE<BITS>);
        for (int64_t h = 0; h < g; h++)
            weigh_scales<C>(weights + h * BLOCK, shared, MIDDLE<BITS>, words, parts + h * head, steps + h * C, zeros + h * C);
        ByteWeighed all{runs, used, static_cast<const uint8_t*>(on.values), code_bytes(on.dv, BITS), C, on.dv,
                        parts, steps, zeros, sums};
        for (int64_t h = 0; h < g;) {
            const int64_t now = FIELDS<BITS> < 4 ? rows_of_four(g - h) : g - h == 4 ? 2 : smaller(g - h, 3);
            all.weights = parts + h * head, all.step = steps + h * C, all.zero = zeros + h * C;
            all.sums = sums + h * on.dv;
            switch (now) {
                case 4: weigh_all_bytes<BITS, FIELDS<BITS> < 4 ? 4 : 1>(all); break;
                case 3: weigh_all_bytes<BITS, 3>(all); break;
                case 2: weigh_all_bytes<BITS, 2>(all); break;
                default: weigh_all_bytes<BITS, 1>(all);
            }
            h += now;
        }
    }

    // Sums as they were asked for; `room` is of a unit.
    void end(float* sums, float* room) const {
        switch (16 * FIELDS<BITS> * on.groups / on.dv) {
            case 2: return by_number<BITS, 2>(sums, room, on.g * on.dv);
            default: return by_number<BITS, 1>(sums, room, on.g * on.dv);
        }
    }
};
#endif

}  // namespace
}  // namespace kvfold::ISA
