// Products with few rows, where a step is one pass over the weights: a linear layer, and the chosen experts of a token.
#include <cmath>
#include <vector>

#include "scalar.h"

namespace {

template <class S>
float dot(const S* __restrict a, const S* __restrict b, long count) {
    float total = 0;
    for (long i = 0; i < count; i++) total += load(a, i) * load(b, i);
    return total;
}

// y[r, o] = x[r] . w[o] for outputs begin..end
template <class S>
void linear(const S* x, const S* w, S* y, long begin, long end, long rows, long in, long out) {
    for (long o = begin; o < end; o++)
        for (long r = 0; r < rows; r++) store(y, r * out + o, dot(x + r * in, w + o * in, in));
}

// Row r of x through expert owner[r]: out = W2 (weight * swiglu(W1 x, W3 x)).
template <class S>
void experts(const S* x, const float* weight, const long long* owner, const S* w1, const S* w2, const S* w3, S* out, long begin, long end,
             long D, long I, float limit) {
    std::vector<S> hidden(I);
    for (long r = begin; r < end; r++) {
        const S *row = x + r * D, *first = w1 + owner[r] * I * D, *second = w2 + owner[r] * I * D, *third = w3 + owner[r] * I * D;
        for (long i = 0; i < I; i++) {
            float gate = dot(row, first + i * D, D), up = dot(row, third + i * D, D);
            gate = gate > limit ? limit : gate;
            up = up > limit ? limit : up < -limit ? -limit : up;
            store(hidden.data(), i, gate / (1 + std::exp(-gate)) * up * weight[r]);
        }
        for (long d = 0; d < D; d++) store(out, r * D + d, dot(hidden.data(), second + d * I, I));
    }
}

}  // namespace

#define EXPORT(S, suffix)                                                                                                             \
    extern "C" void few_linear_##suffix(const S* x, const S* w, S* y, long begin, long end, long rows, long in, long out) {             \
        linear(x, w, y, begin, end, rows, in, out);                                                                                    \
    }                                                                                                                                 \
    extern "C" void few_experts_##suffix(const S* x, const float* weight, const long long* owner, const S* w1, const S* w2,             \
                                         const S* w3, S* out, long begin, long end, long D, long I, float limit) {                     \
        experts(x, weight, owner, w1, w2, w3, out, begin, end, D, I, limit);                                                           \
    }
EXPORT(float, f32)
EXPORT(bf16, bf16)
