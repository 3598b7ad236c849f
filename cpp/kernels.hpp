// What every instruction set has: its kernels, and what they are asked. Arrays are C-contiguous; N = (row, KV head).
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvfold {

constexpr int64_t BLOCK = 64;   // tokens between two looks at the running maximum
constexpr int64_t PART = 256;   // tokens of a row that one task reads: fixed, so that threads don't change results
constexpr int64_t FEW = 1920;   // numbers that stay in a core's first cache, in whole rounds of every unrolled loop
constexpr int64_t GROUP = 8;    // query heads that one pass over them multiplies for at most
constexpr int64_t SHARES = 16;  // of a row's queries, each with column sums of its own: fixed for the same reason

enum class Kind { f32, bf16, f16, e4m3, e5m2 };  // those of 8 bits for attention alone

// Rows of tokens on pages.
struct Rows {
    int64_t rows, page_size;
    const int32_t* table;  // (rows, width) page numbers
    int64_t width;
    const int32_t* lengths;  // (rows,)
    const int32_t* holes;    // (rows, most) slots below a row's length that hold no token
    int64_t most;
    const int32_t* hole_count;  // (rows,)
};

// How vectors turn with positions (RoPE): channels i and i + half, or 2 i and 2 i + 1 where those are `neighbours`, counted
// from `first` on, by angles[i] (radians) for each step.
struct Turning {
    const float* angles;  // (half,)
    int64_t half, first;  // half 0: not at all
    bool neighbours;
};

struct Attend {
    Rows on;
    int64_t g, d, dv;
    const float* q;  // (rows, g, d)
    const void *keys, *values;
    Kind key_kind, value_kind;
    const float *key_factor, *value_factor;  // (pages * page_size,) what 8-bit vectors are multiplied by, else null
    const float* mass;  // (pages * page_size,) added to the logits, or null
    const bool* read;   // (rows, read_width) or null
    int64_t read_width;
    float scale;
    int threads;
    float *out, *lse;  // (rows, g, dv), (rows, g)
    float* weights;    // (rows, g, weights_width) or null
    int64_t weights_width;
    // Pages of one token alone: keys stand at the numbers of their slots in the row, and not where `places` says; or there,
    // but no further in front than `least`, in rows where that is no -1.
    Turning turning;
    const int32_t* places;  // (pages,)
    const int32_t* least;   // (rows,) or null
};

// Bytes of a vector of codes: units of 16 bytes, and the last one as short as it may be (see ops/codes/packing.py).
static constexpr int64_t code_bytes(int64_t size, int bits) {
    const int64_t unit = bits == 3 ? 64 : 128 / bits, rest = size % unit;
    const int64_t each = (rest + 3) / 4 * (bits == 3 ? 2 : bits), word = !rest ? 0 : each <= 8 ? 1 : each <= 16 ? 2 : 4;
    return size / unit * (bits == 3 ? 24 : 16) + 4 * word + (bits == 3 && rest ? (word == 4 ? 8 : 4) : 0);
}

// Attention over codes: keys (slots, code_bytes(d, bits)), values (slots, code_bytes(dv, bits)).
struct Codes : Attend {
    int bits;                              // 2, 3, 4 or 8
    const void *key_scale, *key_zero;      // (pages, d)
    const void *value_scale, *value_zero;  // (slots, groups), of dv / groups channels each
    Kind scale_kind;
    int64_t groups;
};

// Attention over vectors of which some numbers are kept: keys (slots, kept_keys), values (slots, kept_values), each in the
// order of their channels, which are the bits that are set in the maps (slots, (size + 7) / 8), the lowest bit first.
struct Sparse : Attend {
    int64_t kept_keys, kept_values;
    const uint8_t *key_map, *value_map;
};

// Codes of keys or of values, each token with scales of its own: levels[c] * scale, or c * scale + zero.
struct Vectors {
    int bits;             // 2, 3, 4 or 8
    const void* codes;    // (slots, code_bytes(size, bits))
    const float* levels;  // (2^bits,) of at most 4 bits, or null
    const void *scale, *zero;  // (slots, groups); with levels there is one group, and no zero
    int64_t groups;
};

struct Tokens : Attend {
    Vectors of_keys, of_values;
    Kind scale_kind;
};

struct Causal {
    int64_t n, g, count, t, d, dv;  // `count` queries, those of the last keys of `t`
    const float *q, *k, *v;         // (n, g, count, d), (n, t, d), (n, t, dv)
    const float* shares;            // (count,) what a query counts in the sums
    int64_t window;          // tokens that a query sees, its own too; 0: all before it
    float scale;
    int threads;
    float *out, *lse, *sums;  // (n, g, count, dv), (n, g, count), (n, SHARES, t) or null
};

struct ColumnSums {
    int64_t n, g, count, t, d;
    const float *q, *k, *lse;  // (n, g, count, d), (n, t, d), (n, g, count)
    const float* bias;         // (n, t) or null
    const int64_t* first;      // (n,) the key of a row's first query
    float scale;
    int threads;
    float* sums;  // (n, SHARES, t)
};

struct Alike {
    int64_t n, asking, others, d, also;          // `also` is the width of the second kind of vectors, 0 for none
    const float *left, *right, *left2, *right2;  // (n, asking, d), (n, others, d), (n, asking, also) ...
    const int64_t *asks, *there;                 // (n,)
    int threads;
    float* best;  // (n, asking)
    int64_t* first;
};

struct Linear {
    int64_t rows, n, k;  // out (rows, n) = x (rows, k) weight (n, k)' + bias (n,); n a multiple of 4
    const float* x;
    const void* weight;
    Kind kind;
    const float* bias;  // or null
    int threads;
    float* out;
};

// What units are worth by the bounds of their keys: held (rows, room, 2 d) has the largest of k, then of -k. `plain`: by
// their keys themselves, (rows, room, d), and what comes of that in whole `steps` of 1 / steps (0: as it is).
struct BoundScores {
    int64_t rows, g, d, room, width;
    const float* q;  // (rows, g, d)
    const void* held;
    Kind kind;
    const int64_t* units;  // (rows,)
    int threads;
    float* scores;  // (rows, g, width), -inf behind a row's units
    bool plain;
    float steps;
};

// Vectors (rows, heads, count, d), those of one token by the same steps (rows, count), as floats.
struct Turn {
    int64_t rows, heads, count, d;
    const void* x;
    Kind kind;
    const int32_t* steps;
    Turning by;
    int threads;
    float* out;
};

// Pages in the order in which rows hold them, to be read and nothing else.
struct Pages {
    const char *keys, *values;
    int64_t key_bytes, value_bytes;  // of a page, multiples of 4
    const int32_t* pages;
    int64_t count;
    int threads;
};

struct MultiplyAdd {
    const void* x;  // FEW numbers
    Kind kind;
    float factor;
    int64_t group, passes, tasks;
    int threads;
};

struct UnitChoice;  // choice.hpp
struct UnitVote;

struct Kernels {
    const char* name;
    int lanes;
    void (*attend)(const Attend&);
    void (*attend_singles)(const Attend&);  // pages of one token
    void (*attend_codes)(const Codes&);
    void (*attend_sparse)(const Sparse&);
    void (*attend_tokens)(const Tokens&);
    void (*causal)(const Causal&);
    void (*column_sums)(const ColumnSums&);
    void (*most_alike)(const Alike&);
    void (*linear)(const Linear&);
    void (*bound_scores)(const BoundScores&);
    void (*choose_units)(const UnitChoice&);
    void (*vote_units)(const UnitVote&);
    void (*turn)(const Turn&);
    void (*exponential)(const float* x, float* out, int64_t count);         // for tests
    void (*widen)(const void* x, Kind kind, float* out, int64_t count);     // for tests
    double (*read)(const float* x, int64_t count, int threads);             // a plain read, for benchmarks
    uint32_t (*read_pages)(const Pages&);                                   // likewise
    double (*multiply_add)(const MultiplyAdd&);                             // arithmetic without memory, likewise
};

#if defined(__x86_64__)
namespace avx512vnni {  // as avx512, but for codes
extern void (*const codes)(const Codes&);
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
#endif
namespace baseline {
extern const Kernels kernels;
}

}  // namespace kvfold
