// Decode attention over pages. Keys are read as they lie, four tokens at a time for some heads of a group, while the
// next page comes into the first cache; values likewise. A row is cut into parts of PART tokens, which whoever has time
// works out; parts are merged by their log-sum-exp.
#pragma once

#include "kernels.hpp"
#include "lanes.hpp"
#include "threads.hpp"

namespace kvfold::ISA {
namespace {

// A page that is wanted soon. Its lines are asked for one after another, while others are worked on: memory must have
// something to do all the time, and a burst of requests would only stand in line.
struct Soon {
    const char* at;
    int64_t token;  // bytes

    void line(int64_t slot, int64_t byte) const { __builtin_prefetch(at + slot * token + byte); }
};

// logits[h * BLOCK + t] = q[h] . key[t] for a page of `size` tokens, four at a time; meanwhile those of `soon` come in.
// A function of its own, for which registers are enough.
template <int H, class T>
[[gnu::noinline]] void look_at(const float* q, const T* keys, const Soon& soon, int64_t size, int64_t d, float* logits) {
    constexpr int64_t LINE = 64 / sizeof(T), STEP = 2 * LANES;  // numbers
    for (int64_t first = 0; first < size; first += 4) {
        quad found[H];
        dots<H>(q, d, keys + first * d, d, d, found, [&](int64_t i) {
            for (int64_t n = i; n < i + STEP; n += LINE)
                if (STEP >= LINE || i % LINE == 0)
#pragma GCC unroll 4
                    for (int t = 0; t < 4; t++) soon.line(first + t, n * static_cast<int64_t>(sizeof(T)));
        });
#pragma GCC unroll 4
        for (int h = 0; h < H; h++) *reinterpret_cast<loose_quad*>(logits + h * BLOCK + first) = found[h];
    }
}

template <class T>
inline void look_at_all(const float* q, const T* keys, const Soon& soon, int64_t size, int64_t g, int64_t d,
                        float* logits) {
    for (int64_t h = 0; h < g;) {
        const int64_t now = rows_of_four(g - h);
        const float* from = q + h * d;
        float* to = logits + h * BLOCK;
        switch (now) {
            case 4: look_at<4>(from, keys, soon, size, d, to); break;
            case 3: look_at<3>(from, keys, soon, size, d, to); break;
            case 2: look_at<2>(from, keys, soon, size, d, to); break;
            default: look_at<1>(from, keys, soon, size, d, to);
        }
        h += now;
    }
}

// A page of values, how many of its tokens count, and the page that is wanted soon.
template <class T>
struct Page {
    const T* values;
    int64_t held, at;  // its first token in the block
    Soon soon;
};

// sums[h] += weights[h] . values from column `first` on, over the pages of a block; sums stay in registers.
template <int H, int W, class T>
inline void weigh(const float* weights, const Page<T>* pages, int64_t count, int64_t first, int64_t dv, float* sums) {
    constexpr int LINE = 64 / sizeof(T);
    vec acc[H][W];
#pragma GCC unroll 4
    for (int h = 0; h < H; h++)
#pragma GCC unroll 4
        for (int n = 0; n < W; n++) acc[h][n] = load(sums + h * dv + first + n * LANES);
    for (int64_t p = 0; p < count; p++) {
        const T* value = pages[p].values + first;
        const float* weight = weights + pages[p].at;
        const Soon soon = pages[p].soon;
        for (int64_t i = 0; i < pages[p].held; i++, value += dv) {
            for (int n = 0; n < W * LANES; n += LINE) soon.line(i, (first + n) * static_cast<int64_t>(sizeof(T)));
            vec w[H];
#pragma GCC unroll 4
            for (int h = 0; h < H; h++) w[h] = everywhere(weight[h * BLOCK + i]);
#pragma GCC unroll 4
            for (int n = 0; n < W; n++) {
                const T* pair = value + (n - n % 2) * LANES;
                const vec x = W == 1 ? load(value) : n % 2 ? half<1>(pair) : half<0>(pair);
#pragma GCC unroll 4
                for (int h = 0; h < H; h++) acc[h][n] += w[h] * x;
            }
        }
    }
#pragma GCC unroll 4
    for (int h = 0; h < H; h++)
#pragma GCC unroll 4
        for (int n = 0; n < W; n++) store(sums + h * dv + first + n * LANES, acc[h][n]);
}

constexpr int64_t STRETCH = 4 * LANES;  // numbers whose sums are in registers at once: in the order of `half`

template <int H, class T>
inline void weigh_all(const float* weights, const Page<T>* pages, int64_t count, int64_t dv, float* sums) {
    int64_t i = 0;
    for (; i + STRETCH <= dv; i += STRETCH) weigh<H, 4>(weights, pages, count, i, dv, sums);
    for (; i < dv; i += LANES) weigh<H, 1>(weights, pages, count, i, dv, sums);
}

// out[h] += weights[h] . values over the pages of a block, for all heads of a group.
template <class T>
inline void weigh_pages(const float* weights, const Page<T>* pages, int64_t count, int64_t g, int64_t dv, float* out) {
    for (int64_t h = 0; h < g;) {
        const int64_t now = rows_of_four(g - h);
        const float* from = weights + h * BLOCK;
        float* to = out + h * dv;
        switch (now) {
            case 4: weigh_all<4>(from, pages, count, dv, to); break;
            case 3: weigh_all<3>(from, pages, count, dv, to); break;
            case 2: weigh_all<2>(from, pages, count, dv, to); break;
            default: weigh_all<1>(from, pages, count, dv, to);
        }
        h += now;
    }
}

// One part of a row, whatever its tokens lie in: `A` is what was asked.
template <class A>
struct Part {
    const A& on;
    int64_t row, start, stop;  // slots

    Part(const Attend& all, int64_t row, int64_t start, int64_t stop)
        : on(static_cast<const A&>(all)), row(row), start(start), stop(stop) {}

    const int32_t* pages() const { return on.on.table + row * on.on.width; }
    // Where a slot's page begins, among all slots of the pool.
    int64_t place(int64_t slot) const { return int64_t{pages()[slot / on.on.page_size]} * on.on.page_size; }
    bool seen(int64_t slot) const { return !on.read || on.read[row * on.read_width + slot]; }
    bool any(int64_t first, int64_t end) const {
        if (!on.read) return true;
        for (int64_t i = first; i < end; i++)
            if (seen(i)) return true;
        return false;
    }

    // NEVER where the logits of a block are of no token: behind the last, in holes, and where none is to be read.
    void hide(int64_t block, int64_t count, float* logits) const {
        const int64_t g = on.g;
        for (int64_t i = count; i < BLOCK; i++)  // the slack of the last page
            for (int64_t h = 0; h < g; h++) logits[h * BLOCK + i] = NEVER;
        for (int64_t k = 0; k < on.on.hole_count[row]; k++) {
            const int64_t slot = on.on.holes[row * on.on.most + k] - block;
            if (0 <= slot && slot < count)
                for (int64_t h = 0; h < g; h++) logits[h * BLOCK + slot] = NEVER;
        }
        if (on.read)
            for (int64_t i = 0; i < count; i++)
                if (!seen(block + i))
                    for (int64_t h = 0; h < g; h++) logits[h * BLOCK + i] = NEVER;
    }

    // A block's logits, where weights are wanted; `some`: whether there are any.
    void tell(int64_t block, int64_t count, const float* logits, bool some) const {
        if (!on.weights) return;
        for (int64_t h = 0; h < on.g; h++) {
            float* line = on.weights + (row * on.g + h) * on.weights_width + block;
            for (int64_t i = 0; i < count; i++) line[i] = some ? logits[h * BLOCK + i] : NEVER;
        }
    }

    // Whether some token of the page at `at` of a block is to be seen; else its logits are NEVER.
    bool shows(int64_t block, int64_t at, int64_t count, float* logits) const {
        const int64_t size = on.on.page_size;
        if (any(block + at, block + smaller(count, at + size))) return true;
        for (int64_t h = 0; h < on.g; h++)
            for (int64_t i = 0; i < size; i++) logits[h * BLOCK + at + i] = NEVER;
        return false;
    }

    // Logits of a page plus the masses of its tokens, if those count.
    void add_masses(int64_t place, float* logits) const {
        if (!on.mass) return;
        for (int64_t h = 0; h < on.g; h++)
            for (int64_t i = 0; i < on.on.page_size; i++) logits[h * BLOCK + i] += on.mass[place + i];
    }

    // A head's logits become weights; what it has summed (dv,) fades as its maximum rises.
    void soften(float* line, float* top, float* total, float* sums) const {
        vec high = load(line), here{};
        for (int64_t i = LANES; i < BLOCK; i += LANES) high = larger(high, load(line + i));
        const float best = larger(highest(high), *top);
        if (best <= NEVER) {  // nothing seen so far: an exponential of 0 would count what is not there
            for (int64_t i = 0; i < BLOCK; i += LANES) {
                const vec x = load(line + i), broken = (vec)((ivec)x & (x != x));  // NaN is to be seen
                store(line + i, broken);
                here += broken;
            }
            *total += sum(here);
            return;
        }
        for (int64_t i = 0; i < BLOCK; i += LANES) {
            const vec weight = exponential(load(line + i) - best);
            store(line + i, weight);
            here += weight;
        }
        if (*top != best) {
            const float fade = exponential(*top - best);
            *total *= fade;
            for (int64_t i = 0; i < on.dv; i += LANES) store(sums + i, load(sums + i) * fade);
            *top = best;
        }
        *total += sum(here);
    }

    void finish(const float* top, const float* total, float* out, float* lse) const {
        for (int64_t h = 0; h < on.g; h++) {
            lse[h] = total[h] == 0 ? -INFINITY : top[h] + logf(total[h]);
            if (total[h] != 0)
                for (int64_t i = 0; i < on.dv; i += LANES)
                    store(out + h * on.dv + i, load(out + h * on.dv + i) / total[h]);
        }
    }
};

template <class K, class V>
struct Reader : Part<Attend> {
    using Part::Part;

    Soon of_keys(int64_t index) const {
        const int64_t token = on.d * static_cast<int64_t>(sizeof(K));
        return {static_cast<const char*>(on.keys) + pages()[index] * on.on.page_size * token, token};
    }
    Soon of_values(int64_t index) const {
        const int64_t token = on.dv * static_cast<int64_t>(sizeof(V));
        return {static_cast<const char*>(on.values) + pages()[index] * on.on.page_size * token, token};
    }

    // What a page's vectors are multiplied by, on their logits or weights.
    void multiply_by(const float* factors, float unit, int64_t count, float* line) const {
        for (int64_t h = 0; h < on.g; h++)
            for (int64_t i = 0; i < count; i++) line[h * BLOCK + i] *= factors[i] * unit;
    }

    // Logits (g, BLOCK) of the slots from `block`, NEVER where no token is to be seen; false where that is so of all.
    bool look(const float* q, int64_t block, int64_t count, float* logits, bool* live) const {
        const int64_t size = on.on.page_size, d = on.d, g = on.g;
        const K* keys = static_cast<const K*>(on.keys);
        bool some = false;
        for (int64_t at = 0; at < count; at += size) {
            if (!(live[at / size] = shows(block, at, count, logits))) continue;
            some = true;
            const int64_t index = (block + at) / size, place = int64_t{pages()[index]} * size;
            const Soon soon = at + size < count ? of_keys(index + 1) : of_values(block / size);
            look_at_all(q, keys + place * d, soon, size, g, d, logits + at);
            if (on.key_factor) multiply_by(on.key_factor + place, UNIT<K>, size, logits + at);
            add_masses(place, logits + at);
        }
        if (some) hide(block, count, logits);
        return some;
    }

    // One row's slots from `start` to `stop` by online softmax.
    void attend(float* out, float* lse) const {
        const int64_t size = on.on.page_size, d = on.d, g = on.g, dv = on.dv;
        const V* values = static_cast<const V*>(on.values);
        float* q = scratch(g * (d + BLOCK + 2));
        float *logits = q + g * d, *top = logits + g * BLOCK, *total = top + g;
        for (int64_t h = 0; h < g; h++) {
            const float* from = on.q + (row * g + h) * d;
            apart<K>(from, q + h * d, d);
            for (int64_t i = 0; i < d; i++) q[h * d + i] *= on.scale;
        }
        for (int64_t h = 0; h < g; h++) top[h] = NEVER, total[h] = 0;
        for (int64_t i = 0; i < g * dv; i++) out[i] = 0;
        bool live[BLOCK / 4];
        for (int64_t block = start; block < stop; block += BLOCK) {
            const int64_t count = smaller(BLOCK, stop - block);
            const bool some = look(q, block, count, logits, live);
            tell(block, count, logits, some);
            if (!some) continue;
            const Soon second = of_values(block / size + (count > size));
            const int64_t lines = (size * second.token + 64 * g - 1) / (64 * g);
            for (int64_t h = 0; h < g; h++) {
                for (int64_t i = 0; i < lines; i++) second.line(0, (h * lines + i) * 64);
                soften(logits + h * BLOCK, top + h, total + h, out + h * dv);
            }
            Page<V> held[BLOCK / 4];
            int64_t used = 0;
            for (int64_t at = 0; at < count; at += size) {
                if (!live[at / size]) continue;
                const int64_t index = (block + at) / size;
                // The next page was asked for already, with the keys or the exponentials.
                const Soon soon = at + 2 * size < count ? of_values(index + 2)
                                  : block + BLOCK < stop ? of_keys((block + BLOCK) / size)
                                                         : of_values(index);
                if (on.value_factor)
                    multiply_by(on.value_factor + int64_t{pages()[index]} * size, UNIT<V>, smaller(size, count - at), logits + at);
                held[used++] = {values + int64_t{pages()[index]} * size * dv, smaller(size, count - at), at, soon};
            }
            weigh_pages(logits, held, used, g, dv, out);
        }
        for (int64_t h = 0; h < g; h++) together<V>(out + h * dv, dv / STRETCH * STRETCH);
        finish(top, total, out, lse);
    }
};

struct Parts {
    const Attend* on;
    int64_t* begin;     // (rows + 1,) the first part of each row
    float *outs, *lses; // of the parts of rows that have several
};

// One part of a row, by a reader of what the row holds.
template <class Read>
void attend_part(const void* context, int64_t part) {
    const Parts& all = *static_cast<const Parts*>(context);
    const Attend& on = *all.on;
    int64_t low = 0, high = on.on.rows;  // the last row that begins no later than this part
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        (all.begin[middle] <= part ? low : high) = middle;
    }
    const int64_t row = low, start = (part - all.begin[row]) * PART;
    const bool alone = all.begin[row + 1] - all.begin[row] == 1;
    const Read reader{on, row, start, smaller(on.on.lengths[row], start + PART)};
    if (alone)
        reader.attend(on.out + row * on.g * on.dv, on.lse + row * on.g);
    else
        reader.attend(all.outs + part * on.g * on.dv, all.lses + part * on.g);
}

// Rows that have several parts, and those that have none.
void merge(const Parts& all) {
    const Attend& on = *all.on;
    for (int64_t row = 0; row < on.on.rows; row++) {
        const int64_t begin = all.begin[row], end = all.begin[row + 1];
        if (end - begin == 1) continue;
        for (int64_t h = 0; h < on.g; h++) {
            float* out = on.out + (row * on.g + h) * on.dv;
            float top = NEVER, total = 0;
            for (int64_t p = begin; p < end; p++) top = larger(all.lses[p * on.g + h], top);
            for (int64_t i = 0; i < on.dv; i++) out[i] = 0;
            for (int64_t p = begin; p < end; p++) {
                if (all.lses[p * on.g + h] == -INFINITY) continue;
                const float weight = expf(all.lses[p * on.g + h] - top);
                const float* part = all.outs + (p * on.g + h) * on.dv;
                total += weight;
                for (int64_t i = 0; i < on.dv; i += LANES) store(out + i, load(out + i) + weight * load(part + i));
            }
            on.lse[row * on.g + h] = total == 0 ? -INFINITY : top + logf(total);
            if (total != 0)
                for (int64_t i = 0; i < on.dv; i++) out[i] /= total;
        }
    }
}

// Logits become probabilities, 0 where no token is.
void normalise(const void* context, int64_t row) {
    const Attend& on = *static_cast<const Attend*>(context);
    for (int64_t h = 0; h < on.g; h++) {
        float* line = on.weights + (row * on.g + h) * on.weights_width;
        const float lse = on.lse[row * on.g + h];
        const int64_t length = on.on.lengths[row];
        int64_t i = 0;
        for (; i < length; i += LANES) {  // no token seen: lse is -inf, and so every logit NEVER
            if (i + LANES <= length) {
                const vec x = load(line + i);
                store(line + i, (vec)((ivec)exponential(x - lse) & (x > NEVER | x != x)));
            } else {
                for (int64_t j = i; j < length; j++)
                    line[j] = line[j] > NEVER || line[j] != line[j] ? exponential(line[j] - lse) : 0;
            }
        }
        for (i = length; i < on.weights_width; i++) line[i] = 0;
    }
}

template <template <class, class> class R, class K>
Task task_of(Kind value) {
    switch (value) {
        case Kind::f32: return attend_part<R<K, float>>;
        case Kind::bf16: return attend_part<R<K, bf16>>;
        default: return attend_part<R<K, f16>>;
    }
}

// What a reader of numbers of 16 or 32 bits does for one part of a row.
template <template <class, class> class R>
Task task_of(Kind key, Kind value) {
    switch (key) {
        case Kind::f32: return task_of<R, float>(value);
        case Kind::bf16: return task_of<R, bf16>(value);
        default: return task_of<R, f16>(value);
    }
}

void attend_in_parts(const Attend& on, Task task) {
    if (!on.g) return;
    const int64_t rows = on.on.rows;
    const Taken<int64_t> begin(rows + 1);
    begin.at[0] = 0;
    bool several = false;
    int64_t tokens = 0;
    for (int64_t r = 0; r < rows; r++) {
        const int64_t parts = (on.on.lengths[r] + PART - 1) / PART;
        begin.at[r + 1] = begin.at[r] + parts;
        several |= parts > 1;
        tokens += on.on.lengths[r];
    }
    const int64_t parts = begin.at[rows], apart = several ? parts : 0;
    const Taken<float> outs(apart * on.g * (on.dv + 1));
    const Parts all{&on, begin.at, outs.at, outs.at + apart * on.g * on.dv};
    // Waking a worker takes some microseconds: what is read in that time, one thread reads.
    const int threads = tokens * (on.d + on.dv) < 32768 ? 1 : on.threads;
    for_each(parts, threads, task, &all);
    merge(all);
    if (on.weights) for_each(rows, threads, normalise, &on);
}

void attend(const Attend& on) {
    attend_in_parts(on, on.key_kind == Kind::e4m3   ? attend_part<Reader<e4m3, e4m3>>
                        : on.key_kind == Kind::e5m2 ? attend_part<Reader<e5m2, e5m2>>
                                                    : task_of<Reader>(on.key_kind, on.value_kind));
}

}  // namespace
}  // namespace kvfold::ISA
