// All kernels for one instruction set, which ISA names and the compiler's flags choose: compiled once for each.

#include "kernels.hpp"

#include "bounds.hpp"
#include "choosing.hpp"
#include "coded.hpp"
#include "lanes.hpp"
#include "linear.hpp"
#include "paged.hpp"
#include "prefill.hpp"
#include "singles.hpp"
#include "sparse.hpp"
#include "tokens.hpp"
#include "turning.hpp"

namespace kvfold::ISA {
namespace {

#define TEXT_OF(x) #x
#define TEXT(x) TEXT_OF(x)

void exponential_of(const float* x, float* out, int64_t count) {
    for (int64_t i = 0; i < count; i++) out[i] = exponential(x[i]);
}

template <class T>
void widen_all(const T* x, float* out, int64_t count) {
    for (int64_t i = 0; i + LANES <= count; i += LANES) store(out + i, load(x + i));
}

void widen(const void* x, Kind kind, float* out, int64_t count) {
    switch (kind) {
        case Kind::f32: return widen_all(static_cast<const float*>(x), out, count);
        case Kind::bf16: return widen_all(static_cast<const bf16*>(x), out, count);
        case Kind::f16: return widen_all(static_cast<const f16*>(x), out, count);
        default: return;
    }
}

constexpr int64_t SPAN = 1 << 14;  // floats that one task of a plain read takes

struct Span {
    const float* x;
    int64_t count;
    double* sums;
};

void read_span(const void* context, int64_t index) {
    const Span& on = *static_cast<const Span*>(context);
    const int64_t end = smaller(on.count, (index + 1) * SPAN);
    vec acc[8] = {};
    int64_t i = index * SPAN;
    for (; i + 8 * LANES <= end; i += 8 * LANES)
        for (int n = 0; n < 8; n++) acc[n] += load(on.x + i + n * LANES);
    double total = 0;
    for (int n = 0; n < 8; n++) total += static_cast<double>(sum(acc[n]));
    for (; i < end; i++) total += static_cast<double>(on.x[i]);
    on.sums[index] = total;
}

double read(const float* x, int64_t count, int threads) {
    const int64_t spans = (count + SPAN - 1) / SPAN;
    const Taken<double> sums(spans);
    const Span on{x, count, sums.at};
    for_each(spans, threads, read_span, &on);
    double total = 0;
    for (int64_t i = 0; i < spans; i++) total += sums.at[i];
    return total;
}

typedef uint32_t loose_words __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t loose_word __attribute__((may_alias));

constexpr int64_t TOGETHER = 16;  // pages that one task of a read takes

struct PageSums {
    const Pages& pages;
    uint32_t* sums;
};

inline void add_words(const char* x, int64_t bytes, uvec (&acc)[8], uint32_t& rest) {
    constexpr int64_t WORDS = sizeof(uvec);
    int64_t i = 0;
    for (; i + 8 * WORDS <= bytes; i += 8 * WORDS)
        for (int n = 0; n < 8; n++) acc[n] += *reinterpret_cast<const loose_words*>(x + i + n * WORDS);
    for (; i < bytes; i += 4) rest += *reinterpret_cast<const loose_word*>(x + i);
}

// Integers: bytes of any floats are added as they are, and none of them is a number that takes longer.
void read_some(const void* context, int64_t index) {
    const PageSums& on = *static_cast<const PageSums*>(context);
    const Pages& all = on.pages;
    uvec acc[8] = {};
    uint32_t total = 0;
    for (int64_t i = index * TOGETHER; i < smaller(all.count, (index + 1) * TOGETHER); i++) {
        add_words(all.keys + all.pages[i] * all.key_bytes, all.key_bytes, acc, total);
        add_words(all.values + all.pages[i] * all.value_bytes, all.value_bytes, acc, total);
    }
    for (int n = 0; n < 8; n++)
        for (int lane = 0; lane < LANES; lane++) total += acc[n][lane];
    on.sums[index] = total;
}

uint32_t read_pages(const Pages& all) {
    const int64_t tasks = (all.count + TOGETHER - 1) / TOGETHER;
    const Taken<uint32_t> sums(tasks);
    const PageSums on{all, sums.at};
    for_each(tasks, all.threads, read_some, &on);
    uint32_t total = 0;
    for (int64_t i = 0; i < tasks; i++) total += sums.at[i];
    return total;
}

struct Passes {
    const MultiplyAdd& on;
    double* sums;
};

// What attention does with a number that it has read: it is widened once, and multiplied for every head of a group.
template <int G, class T>
double multiply_numbers(const MultiplyAdd& on) {
    constexpr int N = G > 6 ? 1 : 12 / G;  // as many sums as hide what one takes
    const T* x = static_cast<const T*>(on.x);
    const vec factor = everywhere(on.factor);  // one for all, so that no sum has to leave its register
    vec acc[N][G];
    for (int n = 0; n < N; n++)
        for (int g = 0; g < G; g++) acc[n][g] = everywhere(static_cast<float>(n * G + g));  // or they would be one sum
    for (int64_t pass = 0; pass < on.passes; pass++)
        for (int64_t i = 0; i < FEW; i += N * LANES)
            for (int n = 0; n < N; n++) {
                const vec number = load(x + i + n * LANES);
                for (int g = 0; g < G; g++) acc[n][g] += number * factor;
            }
    double total = 0;
    for (int n = 0; n < N; n++)
        for (int g = 0; g < G; g++) total += static_cast<double>(sum(acc[n][g])) - LANES * (n * G + g);
    return total;
}

template <class T>
double multiply_group(const MultiplyAdd& on) {
    switch (on.group) {
        case 1: return multiply_numbers<1, T>(on);
        case 2: return multiply_numbers<2, T>(on);
        case 3: return multiply_numbers<3, T>(on);
        case 4: return multiply_numbers<4, T>(on);
        case 5: return multiply_numbers<5, T>(on);
        case 6: return multiply_numbers<6, T>(on);
        case 7: return multiply_numbers<7, T>(on);
        default: return multiply_numbers<8, T>(on);
    }
}

void multiply_some(const void* context, int64_t index) {
    const Passes& all = *static_cast<const Passes*>(context);
    switch (all.on.kind) {
        case Kind::f32: all.sums[index] = multiply_group<float>(all.on); break;
        case Kind::bf16: all.sums[index] = multiply_group<bf16>(all.on); break;
        case Kind::f16: all.sums[index] = multiply_group<f16>(all.on); break;
        default: break;
    }
}

double multiply_add(const MultiplyAdd& on) {
    const Taken<double> sums(on.tasks);
    const Passes all{on, sums.at};
    for_each(on.tasks, on.threads, multiply_some, &all);
    double total = 0;
    for (int64_t i = 0; i < on.tasks; i++) total += sums.at[i];
    return total;
}

}  // namespace

extern const Kernels kernels;
const Kernels kernels{TEXT(ISA),     LANES,      attend,         attend_singles, attend_codes,
                      attend_sparse, attend_tokens, causal,      column_sums,    most_alike,
                      linear,        bound_scores,  choose_units, vote_units,    turn,
                      exponential_of, widen,        read,        read_pages,     multiply_add};

}  // namespace kvfold::ISA
