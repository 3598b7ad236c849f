// Vectors of floats in the widest registers of an instruction set. Included once for each set, in its own namespace:
// nothing here may come from the standard library, whose functions the linker would share between the sets.
#pragma once

#include <math.h>
#include <stdint.h>

#include "threads.hpp"
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif

namespace kvfold::ISA {
namespace {

constexpr bool MANY = LANES == 16 || LANES == 4;  // registers: 32 in AVX-512 and NEON, 16 in AVX2
constexpr float NEVER = -1e30f;  // the logit of a token that is not seen: its exponential needs no special case

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));
typedef float quad __attribute__((vector_size(16)));
typedef float loose __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float loose_quad __attribute__((vector_size(16), aligned(4), may_alias));
typedef uint32_t pairs __attribute__((vector_size(4 * LANES), aligned(2), may_alias));
typedef uint16_t words __attribute__((vector_size(2 * LANES)));
typedef int16_t int_words __attribute__((vector_size(2 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef uint8_t few_bytes __attribute__((vector_size(LANES), aligned(1), may_alias));

// Memory that goes back at the end of its block.
template <class T>
struct Taken {
    T* at;
    explicit Taken(int64_t count) : at(static_cast<T*>(take(count * sizeof(T)))) {}
    ~Taken() { give_back(at); }
    Taken(const Taken&) = delete;
};

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};
struct e4m3 {  // no infinity, and a NaN where all bits but the sign are set
    uint8_t bits;
};
struct e5m2 {  // the upper half of a float16
    uint8_t bits;
};

inline vec load(const float* p) { return *reinterpret_cast<const loose*>(p); }

inline vec load(const bf16* p) {  // the upper half of a float
#if defined(__AVX512F__)
    const uvec wide = (uvec)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)  // compilers take five instructions for what has one
    const uvec wide = (uvec)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    const uvec wide = __builtin_convertvector(*reinterpret_cast<const halves*>(p), uvec);
#endif
    return (vec)(wide << 16);
}

// Float16 as floats.
inline vec widened(words x) {
#if defined(__AVX512F__)
    return (vec)_mm512_cvtph_ps((__m256i)x);
#elif defined(__AVX2__)
    return (vec)_mm256_cvtph_ps((__m128i)x);
#elif defined(__aarch64__)
    return (vec)vcvt_f32_f16((float16x4_t)x);
#else
    const uvec bits = __builtin_convertvector(x, uvec);
    const vec size = (vec)((bits & 0x7fffu) << 13) * 0x1p112f;  // denormal numbers come out right too
    const uvec endless = (uvec)((bits & 0x7c00u) == 0x7c00u) & 0x7f800000u;
    return (vec)((uvec)size | endless | (bits & 0x8000u) << 16);
#endif
}

inline vec load(const f16* p) { return widened(*reinterpret_cast<const halves*>(p)); }

// Bytes in the upper or the lower halves of words; below, the sign is in all bits of the upper half.
inline words raised(const uint8_t* p) {
#if defined(__AVX512F__)
    return (words)_mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 8);
#elif defined(__AVX2__)
    return (words)_mm_unpacklo_epi8(_mm_setzero_si128(), _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
    return __builtin_convertvector(*reinterpret_cast<const few_bytes*>(p), words) << 8;
#endif
}

inline words signed_words(const uint8_t* p) {
#if defined(__AVX512F__)
    return (words)_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__AVX2__)
    return (words)_mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
    return (words)((int_words)raised(p) >> 8);
#endif
}

inline vec load(const e5m2* p) { return widened(raised(&p->bits)); }

// The 256th part of what they are (UNIT): as float16, whose exponents are 8 more below zero, denormal numbers too.
inline vec load(const e4m3* p) {
    const words x = signed_words(&p->bits), bits = x << 7 & 0xbf80;
    return widened(bits | ((words)((x | 0xff80) == 0xffff) & 0x7e00));
}

// What `load` leaves to be multiplied by.
template <class T>
constexpr float UNIT = 1;
template <>
inline constexpr float UNIT<e4m3> = 256;

// One of two vectors that lie side by side. In bfloat16 it is the numbers at even or at odd places, which a shift or a
// mask takes out of the two: INTERLEAVED tells whether `apart` and `together` have anything to do.
template <int WHICH, class T>
inline vec half(const T* p) {
    return load(p + WHICH * LANES);
}

template <int WHICH>
inline vec half(const bf16* p) {
    const uvec both = (uvec)*reinterpret_cast<const pairs*>(p);
    return (vec)(WHICH ? both & 0xffff0000u : both << 16);
}

template <class T>
constexpr bool INTERLEAVED = false;
template <>
inline constexpr bool INTERLEAVED<bf16> = true;

// Numbers in the order of `half`, as far as whole pairs of vectors go.
template <class T>
inline void apart(const float* x, float* out, int64_t count) {
    int64_t i = 0;
    if (INTERLEAVED<T>)
        for (; i + 2 * LANES <= count; i += 2 * LANES)
            for (int j = 0; j < LANES; j++) out[i + j] = x[i + 2 * j], out[i + LANES + j] = x[i + 2 * j + 1];
    for (; i < count; i++) out[i] = x[i];
}

// The way back, in place.
template <class T>
inline void together(float* x, int64_t count) {
    if (!INTERLEAVED<T>) return;
    for (int64_t i = 0; i + 2 * LANES <= count; i += 2 * LANES) {
        const vec even = *reinterpret_cast<const loose*>(x + i), odd = *reinterpret_cast<const loose*>(x + i + LANES);
        for (int j = 0; j < LANES; j++) x[i + 2 * j] = even[j], x[i + 2 * j + 1] = odd[j];
    }
}

inline void store(float* p, vec x) { *reinterpret_cast<loose*>(p) = x; }
inline vec everywhere(float x) { return x - vec{}; }
inline vec larger(vec a, vec b) { return a > b ? a : b; }
inline float larger(float a, float b) { return a > b ? a : b; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

inline quad fold(vec x) {
#if LANES == 16
    typedef float eight __attribute__((vector_size(32)));
    const eight y = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) +
                    __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
    return __builtin_shufflevector(y, y, 0, 1, 2, 3) + __builtin_shufflevector(y, y, 4, 5, 6, 7);
#elif LANES == 8
    return __builtin_shufflevector(x, x, 0, 1, 2, 3) + __builtin_shufflevector(x, x, 4, 5, 6, 7);
#else
    return x;
#endif
}

// Within each four lanes (a0 + a2, b0 + b2, a1 + a3, b1 + b3): shuffles that never leave their four are one instruction.
inline vec halve(vec a, vec b) {
#if LANES == 16
    return __builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
           __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
#elif LANES == 8
    return __builtin_shufflevector(a, b, 0, 8, 1, 9, 4, 12, 5, 13) +
           __builtin_shufflevector(a, b, 2, 10, 3, 11, 6, 14, 7, 15);
#else
    return __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
#endif
}

// Within each four lanes (a0 + a2, a1 + a3, b0 + b2, b1 + b3).
inline vec quarter(vec a, vec b) {
#if LANES == 16
    return __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
           __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
#elif LANES == 8
    return __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13) +
           __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
#else
    return __builtin_shufflevector(a, b, 0, 1, 4, 5) + __builtin_shufflevector(a, b, 2, 3, 6, 7);
#endif
}

// The sums of four vectors, side by side: a tree over the registers.
inline quad sums(vec a, vec b, vec c, vec d) { return fold(quarter(halve(a, b), halve(c, d))); }

// In a register from here on, and not before: compilers load too much too early, and spill sums.
inline vec held(vec x) {
#if LANES == 16
    asm volatile("" : "+v"(x));
#elif defined(__x86_64__)
    asm volatile("" : "+x"(x));
#endif
    return x;
}

// acc[r][t] += x[r] * y(t): for three rows as many registers as AVX2 has. AVX-512 has some left, for what is else loaded again.
template <int R, class Four>
inline void outer(const float* x, int64_t ldx, vec (&acc)[R][4], Four y) {
#if LANES == 16
    vec row[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) row[r] = held(load(x + r * ldx));
    const auto of = [&](int r) { return row[r]; };
#else
    const auto of = [&](int r) { return load(x + r * ldx); };
#endif
#pragma GCC unroll 4
    for (int t = 0; t < 4; t++) {
        const vec now = held(y(t));
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) acc[r][t] += of(r) * now;
    }
}

// x[r] . y[t] for R rows and four vectors, wherever those are (`at(t)`), whose numbers lie in the order of `half`; `each(i)`
// comes before those from i on.
template <int R, class At, class Each>
inline void dots_at(const float* x, int64_t ldx, At at, int64_t count, quad (&out)[R], Each each) {
    vec acc[R][4];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int t = 0; t < 4; t++) acc[r][t] = vec{};
    int64_t i = 0;
    for (; i + 2 * LANES <= count; i += 2 * LANES) {
        each(i);
        outer<R>(x + i, ldx, acc, [&](int t) { return half<0>(at(t) + i); });
        outer<R>(x + i + LANES, ldx, acc, [&](int t) { return half<1>(at(t) + i); });
    }
    if (i < count) outer<R>(x + i, ldx, acc, [&](int t) { return load(at(t) + i); });
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) out[r] = sums(acc[r][0], acc[r][1], acc[r][2], acc[r][3]);
}

// The same for vectors that lie side by side.
template <int R, class T, class Each>
inline void dots(const float* x, int64_t ldx, const T* y, int64_t ldy, int64_t count, quad (&out)[R], Each each) {
    dots_at<R>(x, ldx, [&](int t) { return y + t * ldy; }, count, out, each);
}

inline float sum(vec x) {
    const quad y = fold(x);
    return (y[0] + y[1]) + (y[2] + y[3]);
}

inline float highest(vec x) {
    typedef float two __attribute__((vector_size(8)));
#if LANES == 16
    typedef float eight __attribute__((vector_size(32)));
    const eight a = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7), b = __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
    const eight y = a > b ? a : b;
#else
    const vec y = x;
#endif
#if LANES >= 8
    const quad c = __builtin_shufflevector(y, y, 0, 1, 2, 3), d = __builtin_shufflevector(y, y, 4, 5, 6, 7);
    const quad z = c > d ? c : d;
#else
    const quad z = y;
#endif
    const two e = __builtin_shufflevector(z, z, 0, 1), f = __builtin_shufflevector(z, z, 2, 3), last = e > f ? e : f;
    return larger(last[0], last[1]);
}

// exp(x) for x <= 88, within 2 units in the last place; 0 below -87, exp(88) above 88, NaN for NaN. Range reduction by a two-part ln 2
// and the minimax polynomial of the Cephes library (expf).
inline vec exponential(vec x) {
    const vec least = x < -87.0f ? everywhere(-87.0f) : x, y = least > 88.0f ? everywhere(88.0f) : least;
    const vec turned = y * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: the integer lies in the low bits
    const vec n = turned - 12582912.0f;
    const vec r = y - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const ivec power = ((ivec)turned << 23) + (127 << 23);
    return (vec)((ivec)(p * (vec)power) & ~(x < -87.0f));
}

inline float exponential(float x) { return exponential(everywhere(x))[0]; }

constexpr int AT_ONCE = MANY ? 4 : 3;  // rows whose sums for four others are in registers at once

// Rows that are worked out together of `left` ones: two pairs rather than three and one.
inline int64_t rows_of_four(int64_t left) { return left == AT_ONCE + 1 ? (left + 1) / 2 : smaller(left, AT_ONCE); }

// C[ROWS, WIDE * LANES] += A[ROWS, k] B[k, WIDE * LANES], with C in registers meanwhile.
template <int ROWS, int WIDE, class T>
inline void tile(const float* a, int64_t lda, const T* b, int64_t ldb, float* c, int64_t ldc, int64_t k) {
    vec acc[ROWS][WIDE];
    for (int r = 0; r < ROWS; r++)
        for (int n = 0; n < WIDE; n++) acc[r][n] = load(c + r * ldc + n * LANES);
    for (int64_t i = 0; i < k; i++) {
        vec across[WIDE];
        for (int n = 0; n < WIDE; n++) across[n] = load(b + i * ldb + n * LANES);
        for (int r = 0; r < ROWS; r++)
            for (int n = 0; n < WIDE; n++) acc[r][n] += a[r * lda + i] * across[n];
    }
    for (int r = 0; r < ROWS; r++)
        for (int n = 0; n < WIDE; n++) store(c + r * ldc + n * LANES, acc[r][n]);
}

template <int WIDE, class T>
inline void tiles(const float* a, int64_t lda, const T* b, int64_t ldb, float* c, int64_t ldc, int64_t m, int64_t k) {
    int64_t r = 0;
    for (; r + 6 <= m; r += 6) tile<6, WIDE>(a + r * lda, lda, b, ldb, c + r * ldc, ldc, k);
    a += r * lda, c += r * ldc;
    switch (m - r) {
        case 5: tile<5, WIDE>(a, lda, b, ldb, c, ldc, k); break;
        case 4: tile<4, WIDE>(a, lda, b, ldb, c, ldc, k); break;
        case 3: tile<3, WIDE>(a, lda, b, ldb, c, ldc, k); break;
        case 2: tile<2, WIDE>(a, lda, b, ldb, c, ldc, k); break;
        case 1: tile<1, WIDE>(a, lda, b, ldb, c, ldc, k); break;
    }
}

constexpr int WIDE = MANY ? 4 : 2;
constexpr int64_t STRIP = WIDE * LANES;  // columns of a product that are in registers at once

// C[m, n] += A[m, k] B[k, n]; n is a multiple of LANES. Each sum runs along k, whatever the tile.
template <class T>
inline void multiply(const float* a, int64_t lda, const T* b, int64_t ldb, float* c, int64_t ldc, int64_t m, int64_t n,
                     int64_t k) {
    int64_t j = 0;
    for (; j + STRIP <= n; j += STRIP) tiles<WIDE>(a, lda, b + j, ldb, c + j, ldc, m, k);
    for (; j < n; j += LANES) tiles<1>(a, lda, b + j, ldb, c + j, ldc, m, k);
}

}  // namespace
}  // namespace kvfold::ISA
