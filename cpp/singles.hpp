// Decode attention over tokens of which each is a page of its own: lists of some tokens of a row, read where they lie.
#pragma once

#include "kernels.hpp"
#include "lanes.hpp"
#include "paged.hpp"
#include "turning.hpp"

namespace kvfold::ISA {
namespace {

constexpr int64_t SOON = 8;  // tokens between the one that is worked on and the one that is asked for

// logits[h * BLOCK + 0..3] = q[h] . key[0..3] for H heads, and four keys that are wanted soon.
template <int H, class T>
[[gnu::noinline]] void look_at_four(const float* q, const T* const (&keys)[4], const T* const (&soon)[4], int64_t d,
                                    float* logits) {
    constexpr int64_t LINE = 64 / sizeof(T), STEP = 2 * LANES;  // numbers
    quad found[H];
    dots_at<H>(q, d, [&](int t) { return keys[t]; }, d, found, [&](int64_t i) {
        for (int64_t n = i; n < i + STEP; n += LINE)
            if (STEP >= LINE || i % LINE == 0)
#pragma GCC unroll 4
                for (int t = 0; t < 4; t++) __builtin_prefetch(soon[t] + n);
    });
#pragma GCC unroll 4
    for (int h = 0; h < H; h++) *reinterpret_cast<loose_quad*>(logits + h * BLOCK) = found[h];
}

template <class K, class V>
struct SingleReader : Part<Attend> {
    using Part::Part;

    const K* key(int64_t slot) const { return static_cast<const K*>(on.keys) + pages()[slot] * on.d; }
    const V* value(int64_t slot) const { return static_cast<const V*>(on.values) + pages()[slot] * on.dv; }

    // Logits of four keys, for all heads of a group.
    template <class T>
    void look_at_keys(const float* q, const T* const (&keys)[4], const T* const (&soon)[4], float* logits) const {
        for (int64_t h = 0; h < on.g;) {
            const int64_t now = rows_of_four(on.g - h);
            const float* from = q + h * on.d;
            float* to = logits + h * BLOCK;
            switch (now) {
                case 4: look_at_four<4>(from, keys, soon, on.d, to); break;
                case 3: look_at_four<3>(from, keys, soon, on.d, to); break;
                case 2: look_at_four<2>(from, keys, soon, on.d, to); break;
                default: look_at_four<1>(from, keys, soon, on.d, to);
            }
            h += now;
        }
    }

    // A slot's key where it is to stand; `turned` is what turned the last one, by `steps`.
    void turn_key(int64_t slot, float& steps, float* turned, float* out) const {
        const int64_t place = on.places[pages()[slot]], least = on.least ? on.least[row] : -1;
        const float more = static_cast<float>(least < 0 ? slot - place : least < place ? 0 : least - place);
        if (more != steps) cos_sin(steps = more, on.turning, turned);  // what lay side by side turns alike
        turn_one(key(slot), turned, on.turning, on.d, out);
    }

    // Logits (g, BLOCK) of the slots from `block`, NEVER where no token is to be seen. `beside`: four keys, and what turns one.
    void look(const float* q, int64_t block, int64_t count, float* beside, float* logits) const {
        const int64_t d = on.d, last = block + count - 1;
        float steps = NAN;
        for (int64_t at = 0; at < count; at += 4) {
            const K *keys[4], *soon[4];
            for (int t = 0; t < 4; t++) {
                keys[t] = key(smaller(block + at + t, last));  // those behind the last are hidden
                soon[t] = key(smaller(block + at + t + SOON, on.on.lengths[row] - 1));
            }
            if (on.turning.half) {
                const float* const turned[4] = {beside, beside + d, beside + 2 * d, beside + 3 * d};
                for (int t = 0; t < 4; t++) {
                    for (int64_t i = 0; i < d; i += 64 / static_cast<int64_t>(sizeof(K))) __builtin_prefetch(soon[t] + i);
                    turn_key(smaller(block + at + t, last), steps, beside + 4 * d, beside + t * d);
                }
                look_at_keys(q, turned, turned, logits + at);
            } else {
                look_at_keys(q, keys, soon, logits + at);
            }
        }
        if (on.mass)
            for (int64_t h = 0; h < on.g; h++)
                for (int64_t i = 0; i < count; i++) logits[h * BLOCK + i] += on.mass[pages()[block + i]];
        hide(block, count, logits);
    }

    // One row's slots from `start` to `stop` by online softmax.
    void attend(float* out, float* lse) const {
        const int64_t d = on.d, g = on.g, dv = on.dv, bytes = dv * static_cast<int64_t>(sizeof(V));
        float* q = scratch(g * (d + BLOCK + 2) + 6 * d);
        float *logits = q + g * d, *top = logits + g * BLOCK, *total = top + g, *beside = total + g;
        for (int64_t h = 0; h < g; h++) {
            const float* from = on.q + (row * g + h) * d;
            on.turning.half ? apart<float>(from, q + h * d, d) : apart<K>(from, q + h * d, d);
            for (int64_t i = 0; i < d; i++) q[h * d + i] *= on.scale;
        }
        for (int64_t h = 0; h < g; h++) top[h] = NEVER, total[h] = 0;
        for (int64_t i = 0; i < g * dv; i++) out[i] = 0;
        for (int64_t block = start; block < stop; block += BLOCK) {
            const int64_t count = smaller(BLOCK, stop - block);
            look(q, block, count, beside, logits);
            tell(block, count, logits, true);
            Page<V> held[BLOCK];
            int64_t used = 0;
            for (int64_t i = 0; i < count; i++) {
                if (logits[i] == NEVER) continue;  // so it is for all heads
                const V* soon = value(smaller(block + i + SOON, on.on.lengths[row] - 1));
                held[used++] = {value(block + i), 1, i, Soon{reinterpret_cast<const char*>(soon), bytes}};
            }
            for (int64_t i = 0; i < smaller(SOON, used); i++)
                for (int64_t byte = 0; byte < bytes; byte += 64)
                    __builtin_prefetch(reinterpret_cast<const char*>(held[i].values) + byte);
            for (int64_t h = 0; h < g; h++) soften(logits + h * BLOCK, top + h, total + h, out + h * dv);
            weigh_pages(logits, held, used, g, dv, out);
        }
        for (int64_t h = 0; h < g; h++) together<V>(out + h * dv, dv / STRETCH * STRETCH);
        finish(top, total, out, lse);
    }
};

void attend_singles(const Attend& on) {
    attend_in_parts(on, task_of<SingleReader>(on.key_kind, on.value_kind));
}

}  // namespace
}  // namespace kvfold::ISA
