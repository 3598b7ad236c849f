// Dense causal attention: a tile of queries against all its keys at once, in a core's own cache.
//
// A fused kernel with an online softmax knows a query's sum only at its end, and so can't say what each key got. A tile
// of a few queries keeps its whole rows instead: the same products and exponentials, and the column sums cost one more
// look. Keys come in panels of STRIP, transposed.
#pragma once

#include "kernels.hpp"
#include "lanes.hpp"
#include "threads.hpp"

namespace kvfold::ISA {
namespace {

// Logits of a tile. They leave the second cache where keys are many: 48 queries of 25,600 keys at once take 266 ms, 24
// take 340 and 6 take 560 (96 queries of 4 heads, D 256, one core of an AMD EPYC with 1 MB of it), for the keys are
// read once for each tile.
constexpr int64_t TILE_BYTES = 8 << 20;
constexpr int64_t MOST = 48;    // queries of a tile
constexpr int64_t CHUNK = 256;  // keys whose values are multiplied at once

inline int64_t panels(int64_t t) { return (t + STRIP - 1) / STRIP; }

// Queries that are worked out together: a multiple of 6, which is what the product takes at once.
inline int64_t tile_of(int64_t keys) {
    const int64_t fit = TILE_BYTES / (4 * (keys > 0 ? keys : 1)) / 6 * 6;
    return fit < 6 ? 6 : smaller(fit, MOST);
}

struct Pack {
    const float* k;
    float* to;
    int64_t t, d;
};

void pack_panel(const void* context, int64_t index) {
    const Pack& on = *static_cast<const Pack*>(context);
    const int64_t row = index / panels(on.t), first = index % panels(on.t) * STRIP;
    const float* from = on.k + (row * on.t + first) * on.d;
    float* to = on.to + index * STRIP * on.d;
    const int64_t held = smaller(STRIP, on.t - first);
    for (int64_t i = 0; i < on.d; i++)
        for (int64_t j = 0; j < STRIP; j++) to[i * STRIP + j] = j < held ? from[j * on.d + i] : 0.0f;
}

// Keys (n, t, d) as panels (n, panels, d, STRIP).
struct Panels {
    const Taken<float> own;
    Panels(const float* k, int64_t n, int64_t t, int64_t d, int threads) : own(n * panels(t) * STRIP * d) {
        const Pack on{k, own.at, t, d};
        for_each(n * panels(t), n * t * d < 65536 ? 1 : threads, pack_panel, &on);
    }
};

inline void copy_scaled(const float* from, float scale, float* to, int64_t count) {
    for (int64_t i = 0; i < count; i++) to[i] = from[i] * scale;
}

// logits (rows, width) over keys `from` to `stop`, `from` a multiple of STRIP; `keys` the panels of the row.
inline void products(const float* queries, const float* keys, float* logits, int64_t rows, int64_t width, int64_t from,
                     int64_t stop, int64_t d) {
    const int64_t far = panels(stop) * STRIP;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t j = from; j < far; j++) logits[r * width + j] = 0;
    for (int64_t j = from; j < stop; j += STRIP)
        multiply(queries, d, keys + j * d, STRIP, logits + j, width, rows, STRIP, d);
}

// sums[j] += sum over rows of weights[r] * logits[r, j], for j from `from` (a multiple of LANES) to `stop`.
inline void add_columns(const float* logits, const float* weights, int64_t rows, int64_t width, int64_t from,
                        int64_t stop, float* sums) {
    int64_t j = from;
    for (; j + LANES <= stop; j += LANES) {
        vec acc = load(sums + j);
        for (int64_t r = 0; r < rows; r++) acc += weights[r] * load(logits + r * width + j);
        store(sums + j, acc);
    }
    for (; j < stop; j++)
        for (int64_t r = 0; r < rows; r++) sums[j] += weights[r] * logits[r * width + j];
}

// line[j] = exp(line[j] - shift) for j from `from` (a multiple of LANES) to `stop`; their sum.
inline float exponentials(float* line, int64_t from, int64_t stop, float shift) {
    vec total{};
    int64_t j = from;
    for (; j + LANES <= stop; j += LANES) {
        const vec weight = exponential(load(line + j) - shift);
        store(line + j, weight);
        total += weight;
    }
    float rest = 0;
    if (j < stop) {  // lines are padded to whole vectors
        const vec weight = exponential(load(line + j) - shift);
        for (int64_t i = 0; j + i < stop; i++) rest += line[j + i] = weight[i];
    }
    return sum(total) + rest;
}

inline float highest_of(const float* line, int64_t from, int64_t stop) {
    float top = NEVER;
    int64_t j = from;
    if (j + LANES <= stop) {
        vec high = load(line + j);
        for (j += LANES; j + LANES <= stop; j += LANES) high = larger(high, load(line + j));
        top = highest(high);
    }
    for (; j < stop; j++) top = larger(line[j], top);
    return top;
}

struct Prompt {
    const Causal* on;
    const float* keys;
    int64_t tile, width;  // `width`: logits of a query that are kept at once
};

// One share of a row's queries.
void causal_share(const void* context, int64_t task) {
    const Prompt& all = *static_cast<const Prompt*>(context);
    const Causal& on = *all.on;
    const int64_t here = task / SHARES, share = task % SHARES, t = on.t, d = on.d, dv = on.dv, tile = all.tile;
    const int64_t width = all.width, tiles = (on.count + tile - 1) / tile, behind = t - on.count;
    const float* keys = all.keys + here * panels(t) * STRIP * d;
    float* kept = scratch(tile * (width + d + dv + 2));
    float *queries = kept + tile * width, *acc = queries + tile * d, *weights = acc + tile * dv;
    float* counted = weights + tile;
    for (int64_t index = share; index < tiles * on.g; index += SHARES) {
        const int64_t h = index % on.g, start = index / on.g * tile, rows = smaller(on.count, start + tile) - start;
        const int64_t first = (here * on.g + h) * on.count + start, own = behind + start, stop = own + rows;
        const int64_t from = on.window && own + 1 > on.window ? (own + 1 - on.window) / STRIP * STRIP : 0;
        float* logits = kept - from;  // a query's line begins with key `from`
        copy_scaled(on.q + first * d, on.scale, queries, rows * d);
        products(queries, keys, logits, rows, width, from, stop, d);
        for (int64_t r = 0; r < rows; r++) {
            float* line = logits + r * width;
            const int64_t seen = own + r + 1, oldest = on.window && seen > on.window ? seen - on.window : 0;
            for (int64_t j = from; j < oldest; j++) line[j] = NEVER;
            const float top = highest_of(line, from, seen);
            const float total = exponentials(line, from, seen, top);
            for (int64_t j = from; j < oldest; j++) line[j] = 0;  // where all that is seen is -inf they were not
            for (int64_t j = seen; j < stop; j++) line[j] = 0;
            weights[r] = 1 / total;
            counted[r] = weights[r] * on.shares[start + r];
            on.lse[first + r] = top + logf(total);
        }
        if (on.sums) add_columns(logits, counted, rows, width, from, stop, on.sums + (here * SHARES + share) * t);
        for (int64_t i = 0; i < rows * dv; i++) acc[i] = 0;
        for (int64_t j = from; j < stop; j += CHUNK)
            multiply(logits + j, width, on.v + (here * t + j) * dv, dv, acc, dv, rows, dv, smaller(CHUNK, stop - j));
        for (int64_t r = 0; r < rows; r++)
            for (int64_t i = 0; i < dv; i += LANES)
                store(on.out + (first + r) * dv + i, load(acc + r * dv + i) * weights[r]);
    }
}

void causal(const Causal& on) {
    const Panels keys(on.k, on.n, on.t, on.d, on.threads);
    // Between the first key that a tile's first query sees and its last query's own lie window + tile - 1, in panels.
    const int64_t span = on.window ? smaller(on.t, on.window + MOST + 2 * STRIP) : on.t, tile = tile_of(span);
    const Prompt all{&on, keys.own.at, tile, panels(span) * STRIP};
    for_each(on.n * SHARES, on.threads, causal_share, &all);
}

struct Asked {
    const ColumnSums* on;
    const float* keys;
    int64_t tile;
};

void sums_share(const void* context, int64_t task) {
    const Asked& all = *static_cast<const Asked*>(context);
    const ColumnSums& on = *all.on;
    const int64_t here = task / SHARES, share = task % SHARES, t = on.t, d = on.d, tile = all.tile;
    const int64_t width = panels(t) * STRIP, tiles = (on.count + tile - 1) / tile;
    float* logits = scratch(tile * (width + d + 1));
    float *queries = logits + tile * width, *ones = queries + tile * d;
    for (int64_t r = 0; r < tile; r++) ones[r] = 1;
    for (int64_t index = share; index < tiles * on.g; index += SHARES) {
        const int64_t h = index % on.g, start = index / on.g * tile, stop = smaller(on.count, start + tile);
        const int64_t rows = stop - start, first = (here * on.g + h) * on.count + start;
        const int64_t far = smaller(t, on.first[here] + stop);
        copy_scaled(on.q + first * d, on.scale, queries, rows * d);
        products(queries, all.keys + here * width * d, logits, rows, width, 0, far, d);
        for (int64_t r = 0; r < rows; r++) {
            float* line = logits + r * width;
            const float shift = on.lse[first + r];
            // A query whose shift is infinite may hold anything, NaN too.
            const int64_t seen = isinf(shift) ? 0 : smaller(t, on.first[here] + start + r + 1);
            if (on.bias)
                for (int64_t j = 0; j < seen; j++) line[j] += on.bias[here * t + j];
            exponentials(line, 0, seen, shift);
            for (int64_t j = seen; j < far; j++) line[j] = 0;
        }
        add_columns(logits, ones, rows, width, 0, far, on.sums + (here * SHARES + share) * t);
    }
}

void column_sums(const ColumnSums& on) {
    const Panels keys(on.k, on.n, on.t, on.d, on.threads);
    const Asked all{&on, keys.own.at, tile_of(on.t)};
    for_each(on.n * SHARES, on.threads, sums_share, &all);
}

struct Likeness {
    const Alike* on;
    const float *right, *right2;
    int64_t tile;
};

void alike_tile(const void* context, int64_t task) {
    const Likeness& all = *static_cast<const Likeness*>(context);
    const Alike& on = *all.on;
    const int64_t tile = all.tile, n = on.asking, d = on.d, also = on.also, width = panels(on.others) * STRIP;
    const int64_t tiles = (n + tile - 1) / tile, here = task / tiles, start = task % tiles * tile;
    const int64_t stop = smaller(n, start + tile), count = on.there[here];
    const int64_t end = count ? smaller(stop, on.asks[here]) : 0, rows = end > start ? end - start : 0;
    for (int64_t i = start + rows; i < stop; i++) on.best[here * n + i] = -INFINITY, on.first[here * n + i] = 0;
    if (!rows) return;
    float* found = scratch(rows * (2 * width + (d > also ? d : also)));
    float *second = found + rows * width, *vectors = second + rows * width;
    copy_scaled(on.left + (here * n + start) * d, 1, vectors, rows * d);
    products(vectors, all.right + here * width * d, found, rows, width, 0, count, d);
    if (also) {
        copy_scaled(on.left2 + (here * n + start) * also, 1, vectors, rows * also);
        products(vectors, all.right2 + here * width * also, second, rows, width, 0, count, also);
    }
    for (int64_t r = 0; r < rows; r++) {
        float *line = found + r * width, *other = second + r * width;
        float top = -INFINITY;
        int64_t place = 0;
        for (int64_t j = 0; j < count; j++) {
            const float x = also ? larger(line[j], 0.0f) * larger(other[j], 0.0f) : line[j];
            if (x > top) top = x, place = j;
        }
        on.best[here * n + start + r] = top, on.first[here * n + start + r] = place;
    }
}

void most_alike(const Alike& on) {
    const Panels right(on.right, on.n, on.others, on.d, on.threads);
    const Panels right2(on.right2, on.n, on.also ? on.others : 0, on.also, on.threads);
    const int64_t tile = tile_of(on.others);
    const Likeness all{&on, right.own.at, right2.own.at, tile};
    for_each(on.n * ((on.asking + tile - 1) / tile), on.threads, alike_tile, &all);
}

}  // namespace
}  // namespace kvfold::ISA
