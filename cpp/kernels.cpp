// All kernels for one instruction set, which ISA names and the compiler's flags choose: compiled once for each.

#include "kernels.hpp"

#include "coded.hpp"
#include "lanes.hpp"
#include "linear.hpp"
#include "paged.hpp"
#include "prefill.hpp"

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

}  // namespace

extern const Kernels kernels;
const Kernels kernels{TEXT(ISA), LANES, attend, attend_codes, causal, column_sums, most_alike, linear, exponential_of, widen, read};

}  // namespace kvfold::ISA
