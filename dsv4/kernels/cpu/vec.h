// 16 float lanes in GCC's vector types, which the compiler lowers to whatever the processor has: without the headers of its
// instructions, which cost a second of compiling in every file.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "scalar.h"

#define APART __attribute__((noinline))  // what many callers share: compiled once

typedef float vec __attribute__((vector_size(64)));
typedef uint32_t bits __attribute__((vector_size(64)));
typedef int32_t ints __attribute__((vector_size(64)));

inline vec splat(float x) { return x - vec{}; }
inline vec load16(const float* p) { vec v; memcpy(&v, p, 64); return v; }
inline void store16(float* p, vec v) { memcpy(p, &v, 64); }

// The sums over lanes of 16 vectors, as one vector. Each vector's tree is the same whatever its place.
APART inline vec lane_sums(vec* a) {
    typedef int32_t m __attribute__((vector_size(64)));
#define SHUFFLE(x, y, ...) __builtin_shuffle(x, y, m{__VA_ARGS__})
    for (int n = 0; n < 8; n++)
        a[n] = SHUFFLE(a[2 * n], a[2 * n + 1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
               SHUFFLE(a[2 * n], a[2 * n + 1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
    for (int n = 0; n < 4; n++)
        a[n] = SHUFFLE(a[2 * n], a[2 * n + 1], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
               SHUFFLE(a[2 * n], a[2 * n + 1], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    for (int n = 0; n < 2; n++)
        a[n] = SHUFFLE(a[2 * n], a[2 * n + 1], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
               SHUFFLE(a[2 * n], a[2 * n + 1], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
    return SHUFFLE(a[0], a[1], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           SHUFFLE(a[0], a[1], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
#undef SHUFFLE
}

// exp for x <= 0, about 2 ulp.
inline vec exp16(vec x) {
    vec low = splat(-87.0f);
    x = x < low ? low : x;
    vec k = x * 1.44269504f;
    ints n = __builtin_convertvector(k + (k < 0 ? splat(-0.5f) : splat(0.5f)), ints);
    k = __builtin_convertvector(n, vec);
    return exp_rest(x, k) * (vec)((n + 127) << 23);
}

// 16 rows of w words -> [w][16]. The compiler's shuffles are as good as ours here: 16 x 16 words at a time.
APART inline void turn(const uint32_t* const* rows, long w, uint32_t* out) {
    long k = 0;
    for (; k + 16 <= w; k += 16) {
        bits a[16], b[16];
        for (int i = 0; i < 16; i++) memcpy(&a[i], rows[i] + k, 64);
        typedef uint32_t m __attribute__((vector_size(64)));
        for (int i = 0; i < 16; i += 2) {  // 1 x 1 cells
            b[i] = __builtin_shuffle(a[i], a[i + 1], m{0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30});
            b[i + 1] = __builtin_shuffle(a[i], a[i + 1], m{1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31});
        }
        for (int i = 0; i < 16; i += 4)  // 2 x 2
            for (int j = i; j < i + 2; j++) {
                a[j] = __builtin_shuffle(b[j], b[j + 2], m{0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29});
                a[j + 2] = __builtin_shuffle(b[j], b[j + 2], m{2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31});
            }
        for (int i = 0; i < 16; i += 8)  // 4 x 4
            for (int j = i; j < i + 4; j++) {
                b[j] = __builtin_shuffle(a[j], a[j + 4], m{0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27});
                b[j + 4] = __builtin_shuffle(a[j], a[j + 4], m{4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31});
            }
        for (int j = 0; j < 8; j++) {  // 8 x 8
            a[j] = __builtin_shuffle(b[j], b[j + 8], m{0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23});
            a[j + 8] = __builtin_shuffle(b[j], b[j + 8], m{8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31});
        }
        for (int i = 0; i < 16; i++) memcpy(out + (k + i) * 16, &a[i], 64);
    }
    for (; k < w; k++)
        for (int i = 0; i < 16; i++) out[k * 16 + i] = rows[i][k];
}
