// The softmax of joint attention: two sets of scores and a sink under one denominator, in place, forward and backward.
// A row is one (token, head); near [rows, near_n] and far [rows, far_n] hold scores on entry and probabilities on return.
#include <cmath>
#include <cstdint>

#include "scalar.h"

namespace {

// exp for x <= 0, about 2 ulp. Branch-free, so that it fills vector lanes.
inline float fast_exp(float x) {
    x = x < -87.0f ? -87.0f : x;
    float k = std::nearbyint(x * 1.44269504f);
    int32_t bits = (int32_t(k) + 127) << 23;
    float scale;
    __builtin_memcpy(&scale, &bits, 4);
    return exp_rest(x, k) * scale;
}

float top_of(const S* __restrict z, const uint8_t* __restrict mask, float* __restrict buffer, long count, float scale, float top) {
    for (long i = 0; i < count; i++) {
        float value = mask[i] ? load(z, i) * scale : -INFINITY;
        buffer[i] = value;
        top = value > top ? value : top;
    }
    return top;
}

inline float exp_sum(float* __restrict buffer, const uint8_t* __restrict mask, long count, float top) {
    float total = 0;
    for (long i = 0; i < count; i++) {
        float value = mask[i] ? fast_exp(buffer[i] - top) : 0.0f;
        buffer[i] = value;
        total += value;
    }
    return total;
}

void write(S* __restrict z, const float* __restrict buffer, long count, float inverse) {
    for (long i = 0; i < count; i++) store(z, i, buffer[i] * inverse);
}

float inner(const S* __restrict p, const S* __restrict d, long count) {
    float total = 0;
    for (long i = 0; i < count; i++) total += load(p, i) * load(d, i);
    return total;
}

void slope(const S* __restrict p, S* __restrict d, long count, float shared, float scale) {
    for (long i = 0; i < count; i++) store(d, i, load(p, i) * (load(d, i) - shared) * scale);
}

}  // namespace

extern "C" {

// Masks have one row per token, shared by its heads; they repeat after ``period`` tokens (one batch row's masks may serve all).
void softmax_forward(S* near, S* far, const uint8_t* near_mask, const uint8_t* far_mask, const float* sink, float* p_sink, float* buffer, long begin,
             long end, long heads, long near_n, long far_n, long near_period, long far_period, float scale) {
    for (long row = begin; row < end; row++) {
        long token = row / heads;
        const uint8_t* nm = near_mask + (token % near_period) * near_n;
        const uint8_t* fm = far_mask + (far_n ? (token % far_period) * far_n : 0);
        S *zn = near + row * near_n, *zf = far + row * far_n;
        float bias = sink[row % heads];
        float top = top_of(zn, nm, buffer, near_n, scale, bias);
        top = top_of(zf, fm, buffer + near_n, far_n, scale, top);
        float own = std::exp(bias - top);
        float inverse = 1 / (own + exp_sum(buffer, nm, near_n, top) + exp_sum(buffer + near_n, fm, far_n, top));
        write(zn, buffer, near_n, inverse);
        write(zf, buffer + near_n, far_n, inverse);
        p_sink[row] = own * inverse;
    }
}

// d_near, d_far: gradients of the probabilities on entry, of the unscaled scores on return.
void softmax_backward(const S* near, const S* far, S* d_near, S* d_far, const float* p_sink, float* d_sink, long begin, long end, long heads,
              long near_n, long far_n, float scale) {
    for (long row = begin; row < end; row++) {
        const S *pn = near + row * near_n, *pf = far + row * far_n;
        S *dn = d_near + row * near_n, *df = d_far + row * far_n;
        float shared = inner(pn, dn, near_n) + inner(pf, df, far_n);
        slope(pn, dn, near_n, shared, scale);
        slope(pf, df, far_n, shared, scale);
        d_sink[row % heads] -= p_sink[row] * shared;
    }
}

}
