// Vectors that turn with positions (RoPE), and what turns them.
#pragma once

#include "kernels.hpp"
#include "lanes.hpp"
#include "threads.hpp"

namespace kvfold::ISA {
namespace {

// cos, then sin, of `steps` times each angle; of neighbours for each of the two, -sin and sin. That product is a float, as it
// is in models; whole turns of it go in double.
inline void cos_sin(float steps, const Turning& by, float* out) {
    constexpr double WHOLE = 6755399441055744.0;  // 1.5 * 2^52: what is added to it becomes an integer
    for (int64_t i = 0; i < by.half; i += LANES) {
        float angle[LANES], quarters[LANES];
        store(angle, load(by.angles + i) * steps);
        for (int j = 0; j < LANES; j++) {
            const double turns = angle[j] * 0.15915494309189533577;
            quarters[j] = static_cast<float>(4 * (turns - ((turns + WHOLE) - WHOLE)));
        }
        const vec part = load(quarters), turned = part + 12582912.0f;  // 1.5 * 2^23: the integer lies in the low bits
        const ivec quarter = (ivec)turned;
        const vec r = (part - (turned - 12582912.0f)) * 1.57079632679489662f, square = r * r;
        const vec sine = ((square * -1.9515295891e-4f + 8.3321608736e-3f) * square - 1.6666654611e-1f) * square * r + r;
        const vec curve = (square * 2.443315711809948e-5f - 1.388731625493765e-3f) * square + 4.166664568298827e-2f;
        const vec cosine = curve * square * square - square * 0.5f + 1.0f;
        const ivec odd = (quarter & 1) != 0;
        const ivec c = ((ivec)sine & odd) | ((ivec)cosine & ~odd), s = ((ivec)cosine & odd) | ((ivec)sine & ~odd);
        const vec found = (vec)(c ^ ((quarter + 1) & 2) << 30), other = (vec)(s ^ (quarter & 2) << 30);
        if (!by.neighbours) {
            store(out + i, found);
            store(out + by.half + i, other);
            continue;
        }
        float *both = out + 2 * i, *across = both + 2 * by.half;
        for (int j = 0; j < LANES; j++) {
            both[2 * j] = both[2 * j + 1] = found[j];
            across[2 * j] = -other[j], across[2 * j + 1] = other[j];
        }
    }
}

// Room for what `cos_sin` gives.
inline int64_t turns_of(const Turning& by) { return (by.neighbours ? 4 : 2) * by.half; }

// Neighbours change places.
inline vec swapped(vec x) {
    ivec other;
    for (int j = 0; j < LANES; j++) other[j] = j ^ 1;
#if defined(__clang__)
    vec out;
    for (int j = 0; j < LANES; j++) out[j] = x[j ^ 1];
    return out;
#else
    return __builtin_shuffle(x, other);
#endif
}

// One vector of d numbers, by what `cos_sin` gave.
template <class T>
inline void turn_one(const T* x, const float* turned, const Turning& by, int64_t d, float* out) {
    for (int64_t i = 0; i < by.first; i += LANES) store(out + i, load(x + i));
    const T *one = x + by.first, *other = one + by.half;
    float* to = out + by.first;
    for (int64_t i = 0; by.neighbours && i < 2 * by.half; i += LANES) {
        const vec a = load(one + i);
        store(to + i, a * load(turned + i) + swapped(a) * load(turned + 2 * by.half + i));
    }
    for (int64_t i = 0; !by.neighbours && i < by.half; i += LANES) {
        const vec a = load(one + i), b = load(other + i), c = load(turned + i), s = load(turned + by.half + i);
        store(to + i, a * c - b * s);
        store(to + by.half + i, b * c + a * s);
    }
    for (int64_t i = by.first + 2 * by.half; i < d; i += LANES) store(out + i, load(x + i));
}

constexpr int64_t TURNED = 64;  // tokens of one task

template <class T>
void turn_some(const void* context, int64_t task) {
    const Turn& on = *static_cast<const Turn*>(context);
    const int64_t parts = (on.count + TURNED - 1) / TURNED, row = task / parts, begin = task % parts * TURNED;
    float* turned = scratch(turns_of(on.by));
    for (int64_t t = begin; t < smaller(on.count, begin + TURNED); t++) {
        cos_sin(static_cast<float>(on.steps[row * on.count + t]), on.by, turned);
        for (int64_t h = 0; h < on.heads; h++) {
            const int64_t at = ((row * on.heads + h) * on.count + t) * on.d;
            turn_one(static_cast<const T*>(on.x) + at, turned, on.by, on.d, on.out + at);
        }
    }
}

void turn(const Turn& on) {
    const Task task = on.kind == Kind::f32 ? turn_some<float> : on.kind == Kind::bf16 ? turn_some<bf16> : turn_some<f16>;
    const int64_t tasks = on.rows * ((on.count + TURNED - 1) / TURNED);
    for_each(tasks, on.rows * on.heads * on.count * on.d < 16384 ? 1 : on.threads, task, &on);
}

}  // namespace
}  // namespace kvfold::ISA
