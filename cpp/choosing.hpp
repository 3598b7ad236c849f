// Which units are the best, list by list: scores are looked at some vectors at once, and few of them one by one.
#pragma once

#include <float.h>

#include "choice.hpp"
#include "lanes.hpp"
#include "threads.hpp"

namespace kvfold::ISA {
namespace {

constexpr float HIGH = FLT_MAX;
constexpr int64_t GLANCE = LANES < 8 ? 2 * LANES : LANES;  // scores that are looked at together

inline bool any(ivec x) {
#if LANES == 16
    return _mm512_test_epi32_mask((__m512i)x, (__m512i)x);
#elif LANES == 8
    return _mm256_movemask_ps((__m256)x);
#else
    return x[0] | x[1] | x[2] | x[3];
#endif
}

// What heads make of a unit together; NaN stays NaN.
inline vec reduced(Reduce how, vec a, vec b) {
    if (how == Reduce::sum) return a + b;
    const ivec first = (a > b) | (a != a);
    return (vec)(((ivec)a & first) | ((ivec)b & ~first));
}

// What is not a number is the lowest number, and none is as high as what is always read.
inline vec tamed(vec x) {
    const vec low = x < HIGH / 8 ? x : everywhere(HIGH / 8);
    return x == x ? low : everywhere(-HIGH);
}

inline void fill(float* line, int64_t from, int64_t to, float x) {
    for (int64_t i = from < 0 ? 0 : from; i < to; i++) line[i] = x;
}

// The scores of a list's units, -inf behind them as far as one glances.
void line_of(const UnitChoice& on, int64_t row, int64_t list, int64_t units, int64_t most, float* line) {
    const float* from = on.scores + (row * on.g + list) * on.width;
    const int64_t heads = on.reduce == Reduce::each ? 1 : on.g;
    int64_t u = 0;
    for (; u + LANES <= units; u += LANES) {
        vec x = load(from + u);
        for (int64_t h = 1; h < heads; h++) x = reduced(on.reduce, x, load(from + h * on.width + u));
        store(line + u, tamed(x));
    }
    for (; u < units; u++) {
        vec x = everywhere(from[u]);
        for (int64_t h = 1; h < heads; h++) x = reduced(on.reduce, x, everywhere(from[h * on.width + u]));
        line[u] = tamed(x)[0];
    }
    fill(line, units, units + GLANCE, -INFINITY);
    const int64_t sinks = smaller(on.sinks, most - 1), recent = smaller(on.recent, most - 1 - sinks);  // the nearest
    fill(line, units - 1 - recent, units - 1, HIGH / 4);
    fill(line, 0, smaller(units - 1, sinks), HIGH / 2);
    line[units - 1] = HIGH;
}

// A score that at least `most` units reach, and few others: the one that as many of the largest of some units each do.
inline float bar_of(const float* line, int64_t units, int64_t most, float* largest) {
    const int64_t vectors = (units + LANES - 1) / LANES, each = vectors * LANES / (4 * most) + 1;
    int64_t count = 0;
    for (int64_t v = 0; v < vectors; v += each, count += LANES) {
        vec high = load(line + v * LANES);
        for (int64_t i = v + 1; i < smaller(vectors, v + each); i++) high = larger(high, load(line + i * LANES));
        store(largest + count, high);
    }
    return count < most ? -INFINITY : highest_of(largest, most, count);
}

// Room for a list's choice: the scores of so many units, as far as one glances behind them, and what `best_of` needs.
inline int64_t line_length(int64_t units) { return (units + GLANCE + 15) / 16 * 16; }

// The best `most` (1 or more) units of a line, ascending, and how many there are; behind the line's own is room for three more.
int64_t best_of(const float* line, int64_t units, int64_t most, float* beside, int32_t* out) {
    const int64_t length = line_length(units);
    const float bar = larger(bar_of(line, units, most, beside), -FLT_MAX);  // -inf is never chosen
    Candidate* able = reinterpret_cast<Candidate*>(beside + length);
    int64_t count = 0;
    for (int64_t u = 0; u < units; u += GLANCE) {
        ivec some = load(line + u) >= bar;
        for (int64_t i = LANES; i < GLANCE; i += LANES) some |= load(line + u + i) >= bar;
        if (!any(some)) continue;
        for (int64_t i = u; i < u + GLANCE; i++) {
            able[count] = {line[i], static_cast<int32_t>(i)};
            count += line[i] >= bar;
        }
    }
    float least = -INFINITY;  // that is chosen
    int64_t alike = 0;        // of these the earlier ones, so many
    if (count > most) {
        for (int64_t i = 0; i < count; i++) beside[i] = able[i].score;
        least = highest_of(beside, alike = most, count);
        for (int64_t i = 0; i < count; i++) alike -= able[i].score > least;
    }
    int64_t chosen = 0;
    for (int64_t i = 0; i < count && chosen < most; i++)
        if (able[i].score > least || (able[i].score == least && alike-- > 0)) out[chosen++] = able[i].unit;
    return chosen;
}

void choose_list(const void* context, int64_t index) {
    const UnitChoice& on = *static_cast<const UnitChoice*>(context);
    const int64_t lists = on.reduce == Reduce::each ? on.g : 1, row = index / lists, units = on.units[row];
    const int64_t most = smaller(on.room[row], units);
    int32_t* out = on.numbers + index * on.most;
    int64_t count = 0;
    if (most > 0) {
        const int64_t length = line_length(units);
        float* line = scratch(4 * length);
        line_of(on, row, index % lists, units, most, line);
        count = best_of(line, units, most, line + length, out);
    }
    for (int64_t i = count; i < on.most; i++) out[i] = -1;
    on.counts[index] = static_cast<int32_t>(count);
}

void choose_units(const UnitChoice& on) {
    const int64_t lists = on.rows * (on.reduce == Reduce::each ? on.g : 1);
    for_each(lists, on.rows * on.g * on.width < 4096 ? 1 : on.threads, choose_list, &on);
}

constexpr int64_t VOTED = 4096;  // units of one task: a multiple of LANES

// A vote while it is counted: what each head's softmax is over, and what units are worth to each list.
struct Count {
    const UnitVote& on;
    float *kept, *shares, *worth;  // (lists, heads, width) exponentials, (lists, heads), (lists, length)
    int64_t length, parts;

    // Units that are voted on: from the first on, and behind the last.
    int64_t from(int64_t list) const { return smaller(on.first[list], on.units[list] > 0 ? on.units[list] - 1 : 0); }
    int64_t to(int64_t list) const {
        const int64_t first = from(list), behind = on.units[list] - 1 - on.before[list];
        return behind > first ? behind : first;
    }
    bool chooses(int64_t list) const { return smaller(on.room[list], on.units[list]) > 0; }
};

// A head's exponentials, and one over their sum.
void sum_votes(const void* context, int64_t index) {
    const Count& all = *static_cast<const Count*>(context);
    const UnitVote& on = all.on;
    const int64_t list = index / on.heads;
    if (!all.chooses(list)) return;
    const float* scores = on.scores + index * on.width;
    float* kept = all.kept + index * on.width;
    const int64_t from = all.from(list), to = all.to(list);
    vec high = everywhere(-INFINITY), total{};
    int64_t u = from;
    for (; u + LANES <= to; u += LANES) high = larger(high, load(scores + u));
    float top = highest(high), rest = 0;
    for (; u < to; u++) top = larger(top, scores[u]);
    for (u = from; u + LANES <= to; u += LANES) {
        const vec x = exponential((load(scores + u) - top) * on.scale);
        store(kept + u, x);
        total += x;
    }
    for (; u < to; u++) rest += kept[u] = exponential((scores[u] - top) * on.scale);
    all.shares[index] = 1 / (sum(total) + rest);
}

// What some units are worth to all heads of a list together.
void count_votes(const void* context, int64_t task) {
    const Count& all = *static_cast<const Count*>(context);
    const UnitVote& on = all.on;
    const int64_t list = task / all.parts, from = all.from(list) + task % all.parts * VOTED, to = smaller(all.to(list), from + VOTED);
    if (!all.chooses(list)) return;
    const float *kept = all.kept + list * on.heads * on.width, *shares = all.shares + list * on.heads;
    float* worth = all.worth + list * all.length;
    int64_t u = from;
    for (; u + LANES <= to; u += LANES) {
        vec x = load(kept + u) * shares[0];
        for (int64_t h = 1; h < on.heads; h++) x = reduced(on.reduce, x, load(kept + h * on.width + u) * shares[h]);
        store(worth + u, tamed(x));
    }
    for (; u < to; u++) {
        vec x = everywhere(kept[u] * shares[0]);
        for (int64_t h = 1; h < on.heads; h++) x = reduced(on.reduce, x, everywhere(kept[h * on.width + u] * shares[h]));
        worth[u] = tamed(x)[0];
    }
}

void vote_list(const void* context, int64_t list) {
    const Count& all = *static_cast<const Count*>(context);
    const UnitVote& on = all.on;
    const int64_t units = on.units[list];
    int32_t* out = on.numbers + list * on.most;
    int64_t count = 0;
    if (all.chooses(list)) {
        const int64_t from = all.from(list), to = all.to(list);
        float* line = all.worth + list * all.length;
        fill(line, units, units + GLANCE, -INFINITY);
        fill(line, to, units - 1, HIGH / 4);
        fill(line, 0, from, HIGH / 2);
        line[units - 1] = HIGH;
        count = best_of(line, units, smaller(on.room[list], units), scratch(3 * all.length), out);
    }
    for (int64_t i = count; i < on.most; i++) out[i] = -1;
    on.counts[list] = static_cast<int32_t>(count);
}

void vote_units(const UnitVote& on) {
    const int64_t length = line_length(on.width), heads = on.lists * on.heads;
    const Taken<float> room(on.lists * length + heads * (on.width + 1));
    float *kept = room.at + on.lists * length, *shares = kept + heads * on.width;
    const Count all{on, kept, shares, room.at, length, (on.width + VOTED - 1) / VOTED};
    const int threads = heads * on.width < 4096 ? 1 : on.threads;
    for_each(heads, threads, sum_votes, &all);
    for_each(on.lists * all.parts, threads, count_votes, &all);
    for_each(on.lists, threads, vote_list, &all);
}

}  // namespace
}  // namespace kvfold::ISA
