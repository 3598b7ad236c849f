// Decode attention over vectors of which some numbers are kept, and a bitmap of their channels (Mustafar, arXiv:2505.22913).
// What is stored is read once and spread to whole vectors, a block of tokens at a time: those stay in the core's caches
// for all query heads of a group.
#pragma once

#include "coded.hpp"
#include "kernels.hpp"
#include "lanes.hpp"
#include "paged.hpp"
#include "threads.hpp"

namespace kvfold::ISA {
namespace {

#if LANES == 8
// For each mask of eight places: which of the numbers that follow each other comes to each of them, NONE to the others.
struct Places {
    static constexpr uint64_t NONE = 0x80;
    uint64_t at[256] = {};

    constexpr Places() {
        for (int mask = 0; mask < 256; mask++) {
            uint64_t next = 0;
            for (int i = 0; i < 8; i++) at[mask] |= (mask >> i & 1 ? next++ : NONE) << (8 * i);
        }
    }
};
constexpr Places PLACES;
#endif

// LANES places: those that `mask` marks get the numbers from `from` on, the others 0.
inline vec spread(const float* from, uint32_t mask) {
#if LANES == 16
    return (vec)_mm512_maskz_expand_ps(static_cast<__mmask16>(mask), (__m512)load(from));
#elif LANES == 8
    const __m256i place = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(PLACES.at + mask)));
    const __m256 found = _mm256_permutevar8x32_ps((__m256)load(from), place);
    return (vec)_mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(place, 31)), found);
#else
    vec found{};
    for (int i = 0; i < LANES; i++)
        if (mask >> i & 1) found[i] = *from++;
    return found;
#endif
}

// The bits of channels i to i + LANES.
inline uint32_t bits_of(const uint8_t* map, int64_t i) {
#if LANES == 16
    return map[i / 8] | static_cast<uint32_t>(map[i / 8 + 1]) << 8;
#elif LANES == 8
    return map[i / 8];
#else
    return map[i / 8] >> (i % 8) & 15u;
#endif
}

// One vector of `size` numbers. Whatever the map says, no more than `size + LANES` numbers are read.
inline void spread_all(const float* kept, const uint8_t* map, int64_t size, float* out) {
    for (int64_t i = 0; i < size; i += LANES) {
        const uint32_t mask = bits_of(map, i);
        store(out + i, spread(kept, mask));
        kept += __builtin_popcount(mask);
    }
}

template <class K, class V>
struct SparseReader : Part<Sparse> {
    using Part::Part;

    // `count` whole vectors from a slot of the pool on; `wide` has room for the kept numbers and one vector more.
    template <class T>
    static void whole(const void* kept, const uint8_t* map, int64_t slot, int64_t count, int64_t size, int64_t few,
                      float* wide, float* out) {
        widen_any(static_cast<const T*>(kept) + slot * few, wide, count * few);
        const int64_t bytes = (size + 7) / 8;
        for (int64_t i = 0; i < count; i++) spread_all(wide + i * few, map + (slot + i) * bytes, size, out + i * size);
    }

    // Asks for what is stored of `count` vectors from a slot on.
    template <class T>
    static void soon(const void* kept, const uint8_t* map, int64_t slot, int64_t count, int64_t size, int64_t few) {
        const int64_t token = few * static_cast<int64_t>(sizeof(T)), bytes = (size + 7) / 8;
        for (int64_t byte = 0; byte < count * token; byte += 64)
            __builtin_prefetch(static_cast<const char*>(kept) + slot * token + byte);
        for (int64_t byte = 0; byte < count * bytes; byte += 64) __builtin_prefetch(map + slot * bytes + byte);
    }

    // Logits (g, BLOCK) of the slots from `block`, NEVER where no token is to be seen; false where that is so of all.
    bool look(const float* q, int64_t block, int64_t count, float* wide, float* tile, float* logits, bool* live) const {
        const int64_t size = on.on.page_size, d = on.d, g = on.g;
        bool some = false;
        for (int64_t at = 0; at < count; at += size) {
            if (!(live[at / size] = shows(block, at, count, logits))) continue;
            some = true;
            const int64_t slot = place(block + at);
            if (at + size < count) soon<K>(on.keys, on.key_map, place(block + at + size), size, d, on.kept_keys);
            soon<V>(on.values, on.value_map, slot, size, on.dv, on.kept_values);
            whole<K>(on.keys, on.key_map, slot, size, d, on.kept_keys, wide, tile);
            look_at_all(q, tile, Soon{reinterpret_cast<const char*>(tile), 0}, size, g, d, logits + at);
            add_masses(slot, logits + at);
        }
        if (some) hide(block, count, logits);
        return some;
    }

    // out[h] += weights[h] . values over the pages of a block in which some token is to be seen.
    void add_values(const float* weights, int64_t block, int64_t count, float* wide, float* tile, const bool* live,
                    float* out) const {
        const int64_t size = on.on.page_size, dv = on.dv;
        Page<float> held[BLOCK / 4];
        int64_t used = 0;
        for (int64_t at = 0; at < count; at += size) {
            if (!live[at / size]) continue;
            const int64_t some = smaller(size, count - at);
            whole<V>(on.values, on.value_map, place(block + at), some, dv, on.kept_values, wide, tile + at * dv);
            held[used++] = {tile + at * dv, some, at, Soon{reinterpret_cast<const char*>(tile), 0}};
        }
        weigh_pages(weights, held, used, on.g, dv, out);
    }

    // One row's slots from `start` to `stop` by online softmax.
    void attend(float* out, float* lse) const {
        const int64_t size = on.on.page_size, d = on.d, g = on.g, dv = on.dv, most = d > dv ? d : dv;
        float* q = scratch(g * (d + BLOCK + 2) + size * most + most + LANES + (size * d > BLOCK * dv ? size * d : BLOCK * dv));
        float *logits = q + g * d, *top = logits + g * BLOCK, *total = top + g, *wide = total + g;
        float* tile = wide + size * most + most + LANES;
        for (int64_t i = 0; i < g * d; i++) q[i] = on.q[row * g * d + i] * on.scale;
        for (int64_t h = 0; h < g; h++) top[h] = NEVER, total[h] = 0;
        for (int64_t i = 0; i < g * dv; i++) out[i] = 0;
        bool live[BLOCK / 4];
        for (int64_t block = start; block < stop; block += BLOCK) {
            const int64_t count = smaller(BLOCK, stop - block);
            const bool some = look(q, block, count, wide, tile, logits, live);
            tell(block, count, logits, some);
            if (!some) continue;
            if (block + BLOCK < stop) soon<K>(on.keys, on.key_map, place(block + BLOCK), size, d, on.kept_keys);
            for (int64_t h = 0; h < g; h++) soften(logits + h * BLOCK, top + h, total + h, out + h * dv);
            add_values(logits, block, count, wide, tile, live, out);
        }
        finish(top, total, out, lse);
    }
};

void attend_sparse(const Sparse& on) {
    attend_in_parts(on, task_of<SparseReader>(on.key_kind, on.value_kind));
}

}  // namespace
}  // namespace kvfold::ISA
