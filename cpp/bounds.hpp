// What units of tokens are worth to queries by the bounds of their keys, or by those themselves: the index is read once
// for all heads of a group.
#pragma once

#include <math.h>

#include "kernels.hpp"
#include "lanes.hpp"
#include "threads.hpp"

namespace kvfold::ISA {
namespace {

constexpr int64_t UNITS = 256;  // of one task; a multiple of 4
constexpr int64_t AHEAD = 16384;  // bytes: past pages of memory, across which no processor looks by itself

// What heads ask (g, 2 d), in the order of `half`: what of q is positive, then what of -q is. NaN stays.
template <class T>
inline void asked_of(const float* q, int64_t g, int64_t d, float* asked, float* line) {
    for (int64_t h = 0; h < g; h++) {
        for (int64_t i = 0; i < d; i++) {
            const float x = q[h * d + i];
            line[i] = x < 0 ? 0 : x, line[d + i] = x > 0 ? 0 : -x;
        }
        apart<T>(line, asked + h * 2 * d, 2 * d);
    }
}

// scores[h * width + 0..3] for H heads and four units that lie side by side; meanwhile units further on come in.
template <int H, class T>
[[gnu::noinline]] void worth(const float* asked, const T* bounds, int64_t e, float* scores, int64_t width) {
    constexpr int64_t LINE = 64 / sizeof(T), STEP = 2 * LANES;  // numbers
    quad found[H];
    dots<H>(asked, e, bounds, e, e, found, [&](int64_t i) {
        for (int64_t n = i; n < i + STEP; n += LINE)
            if (STEP >= LINE || i % LINE == 0)
#pragma GCC unroll 4
                for (int t = 0; t < 4; t++) __builtin_prefetch(reinterpret_cast<const char*>(bounds + t * e + n) + AHEAD);
    });
#pragma GCC unroll 4
    for (int h = 0; h < H; h++) *reinterpret_cast<loose_quad*>(scores + h * width) = found[h];
}

// The same for all heads of a group.
template <class T>
inline void four_units(const float* asked, const T* bounds, int64_t g, int64_t e, float* scores, int64_t width) {
    for (int64_t h = 0; h < g;) {
        const int64_t now = rows_of_four(g - h);
        const float* x = asked + h * e;
        float* out = scores + h * width;
        switch (now) {
            case 4: worth<4>(x, bounds, e, out, width); break;
            case 3: worth<3>(x, bounds, e, out, width); break;
            case 2: worth<2>(x, bounds, e, out, width); break;
            default: worth<1>(x, bounds, e, out, width);
        }
        h += now;
    }
}

template <class T>
void bound_task(const void* context, int64_t task) {
    const BoundScores& on = *static_cast<const BoundScores*>(context);
    const int64_t parts = (on.width + UNITS - 1) / UNITS, row = task / parts, first = task % parts * UNITS;
    const int64_t e = on.plain ? on.d : 2 * on.d, g = on.g, stop = smaller(on.units[row], first + UNITS);
    float* scores = on.scores + row * g * on.width;
    for (int64_t h = 0; h < g; h++)
        for (int64_t u = stop > first ? stop : first; u < smaller(on.width, first + UNITS); u++)
            scores[h * on.width + u] = -INFINITY;
    if (stop <= first) return;
    float* asked = scratch(g * (e + 4) + 5 * e);
    float *some = asked + g * e, *rest = some + g * 4;
    const float* q = on.q + row * g * on.d;
    if (on.plain)
        for (int64_t h = 0; h < g; h++) apart<T>(q + h * e, asked + h * e, e);
    else
        asked_of<T>(q, g, on.d, asked, rest);
    const T* held = static_cast<const T*>(on.held) + row * on.room * e;
    int64_t u = first;
    for (; u + 4 <= stop; u += 4) four_units(asked, held + u * e, g, e, scores + u, on.width);
    if (u < stop) {
        T* last = reinterpret_cast<T*>(rest);  // what lies behind the last unit may be anything
        for (int64_t i = 0; i < 4 * e; i++) last[i] = i < (stop - u) * e ? held[u * e + i] : T{};
        four_units(asked, last, g, e, some, 4);
        for (int64_t h = 0; h < g; h++)
            for (int64_t i = u; i < stop; i++) scores[h * on.width + i] = some[h * 4 + i - u];
    }
    if (on.steps > 0)
        for (int64_t h = 0; h < g; h++)
            for (int64_t i = first; i < stop; i++) {
                float* score = scores + h * on.width + i;
                *score = rintf(*score * on.steps) / on.steps;
            }
}

void bound_scores(const BoundScores& on) {
    const int64_t tasks = on.rows * ((on.width + UNITS - 1) / UNITS);
    const Task task = on.kind == Kind::f32 ? bound_task<float> : on.kind == Kind::bf16 ? bound_task<bf16> : bound_task<f16>;
    for_each(tasks, on.rows * on.width * on.d < 16384 ? 1 : on.threads, task, &on);
}

}  // namespace
}  // namespace kvfold::ISA
