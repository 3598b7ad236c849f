// A linear layer for a few rows: the weights are read once, as they lie, four outputs at a time for some rows.
#pragma once

#include "kernels.hpp"
#include "lanes.hpp"
#include "threads.hpp"

namespace kvfold::ISA {
namespace {

constexpr int64_t OUTPUTS = 128;  // of one task

// out[r][o..o+3] = x[r] . weight[o..o+3] for R rows.
template <int R, class T>
[[gnu::noinline]] void outputs(const float* x, const T* weight, int64_t k, float* out, int64_t n, const float* bias) {
    quad found[R];
    // What is wanted next, as the streams of four rows are too short for the processor to see where they lead.
    dots<R>(x, k, weight, k, k, found, [&](int64_t i) {
        for (int t = 0; t < 4; t++) __builtin_prefetch(weight + (8 + t) * k + i);
        if constexpr (2 * LANES * sizeof(T) > 64)
            for (int t = 0; t < 4; t++) __builtin_prefetch(weight + (8 + t) * k + i + LANES);
    });
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
        if (bias) found[r] += *reinterpret_cast<const loose_quad*>(bias);
        *reinterpret_cast<loose_quad*>(out + r * n) = found[r];
    }
}

template <class T>
void linear_task(const void* context, int64_t task) {
    const Linear& on = *static_cast<const Linear*>(context);
    const T* weight = static_cast<const T*>(on.weight);
    const int64_t stop = smaller(on.n, (task + 1) * OUTPUTS);
    for (int64_t o = task * OUTPUTS; o < stop; o += 4)
        for (int64_t r = 0; r < on.rows;) {
            const int64_t now = rows_of_four(on.rows - r);
            const float* x = on.x + r * on.k;
            const float* bias = on.bias ? on.bias + o : nullptr;
            float* out = on.out + r * on.n + o;
            switch (now) {
                case 4: outputs<4>(x, weight + o * on.k, on.k, out, on.n, bias); break;
                case 3: outputs<3>(x, weight + o * on.k, on.k, out, on.n, bias); break;
                case 2: outputs<2>(x, weight + o * on.k, on.k, out, on.n, bias); break;
                default: outputs<1>(x, weight + o * on.k, on.k, out, on.n, bias);
            }
            r += now;
        }
}

void linear(const Linear& asked) {
    Linear on = asked;
    const Taken<float> x(on.kind == Kind::bf16 ? on.rows * on.k : 0);
    if (on.kind == Kind::bf16) {
        for (int64_t r = 0; r < on.rows; r++) apart<bf16>(on.x + r * on.k, x.at + r * on.k, on.k);
        on.x = x.at;
    }
    const Task task = on.kind == Kind::f32 ? linear_task<float> : on.kind == Kind::bf16 ? linear_task<bf16> : linear_task<f16>;
    for_each((on.n + OUTPUTS - 1) / OUTPUTS, on.n * on.k < 65536 ? 1 : on.threads, task, &on);
}

}  // namespace
}  // namespace kvfold::ISA
