// RMS norm and interleaved rotation over rows, forward and backward, one pass each.
#include <cmath>
#include <cstdint>

#include "scalar.h"

extern "C" {

void norm_forward(const S* __restrict x, const float* __restrict w, S* __restrict y, float* __restrict r, long begin, long end, long C, float eps) {
    for (long row = begin; row < end; row++) {
        const S* xr = x + row * C;
        S* yr = y + row * C;
        float square = 0;
        for (long i = 0; i < C; i++) square += load(xr, i) * load(xr, i);
        float scale = 1 / std::sqrt(square / C + eps);
        r[row] = scale;
        if (w)
            for (long i = 0; i < C; i++) store(yr, i, load(xr, i) * scale * w[i]);
        else
            for (long i = 0; i < C; i++) store(yr, i, load(xr, i) * scale);
    }
}

// dx = r (dy w) - x r^3 / C sum(dy w x); dw += dy x r
void norm_backward(const S* __restrict dy, const S* __restrict x, const float* __restrict w, const float* __restrict r, S* __restrict dx,
                   float* __restrict dw, long begin, long end, long C) {
    for (long row = begin; row < end; row++) {
        const S *xr = x + row * C, *gr = dy + row * C;
        S* out = dx + row * C;
        float scale = r[row], along = 0;
        if (w) {
            for (long i = 0; i < C; i++) {
                float share = load(gr, i) * load(xr, i);
                along += share * w[i];
                dw[i] += share * scale;
            }
            along *= scale * scale / C;
            for (long i = 0; i < C; i++) store(out, i, scale * (load(gr, i) * w[i] - along * load(xr, i)));
        } else {
            for (long i = 0; i < C; i++) along += load(gr, i) * load(xr, i);
            along *= scale * scale / C;
            for (long i = 0; i < C; i++) store(out, i, scale * (load(gr, i) - along * load(xr, i)));
        }
    }
}

// angles [rows / repeat, R] as (cos, sin) pairs; sign -1 turns back. The last 2 R of C channels turn, the others are copied.
void turn(const S* __restrict x, const float* __restrict angles, S* __restrict y, long begin, long end, long C, long R, long repeat, float sign) {
    for (long row = begin; row < end; row++) {
        const S* xr = x + row * C;
        S* yr = y + row * C;
        const float* a = angles + row / repeat * 2 * R;
        for (long i = 0; i < C - 2 * R; i++) yr[i] = xr[i];
        xr += C - 2 * R;
        yr += C - 2 * R;
        for (long i = 0; i < R; i++) {
            float c = a[2 * i], s = a[2 * i + 1] * sign, even = load(xr, 2 * i), odd = load(xr, 2 * i + 1);
            store(yr, 2 * i, even * c - odd * s);
            store(yr, 2 * i + 1, even * s + odd * c);
        }
    }
}

}
