// 16 float lanes, and dot products of rows that lie along the lanes. One meaning, two spellings: AVX-512 with bf16 products,
// or GCC's vector types, which the compiler lowers to whatever the processor has.
//
// Every sum has one fixed order that depends on the row's length alone: lane l takes elements l, l + 16, ... (pairs of them
// for bf16), and the 16 lanes are added as a tree. So a result never depends on the tile, the batch or the thread that made it.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "scalar.h"
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512BF16__) && defined(__AVX512VBMI__)
#include <immintrin.h>
#define LANES_AVX512 1
#define KEEP(x) asm("" : "+v"(x))  // a register is where it stays: the compiler would load it again for every use
#else
#define KEEP(x)
#endif
#if defined(__AVX2__) && !defined(LANES_AVX512)
#include <immintrin.h>
#define LANES_AVX2 1
#endif
#define APART __attribute__((noinline))  // long loops that many callers share: compiled once

typedef float vec __attribute__((vector_size(64)));
typedef uint32_t bits __attribute__((vector_size(64)));
typedef int32_t ints __attribute__((vector_size(64)));

inline vec splat(float x) { return x - vec{}; }
inline vec load16(const float* p) { vec v; memcpy(&v, p, 64); return v; }
inline void store16(float* p, vec v) { memcpy(p, &v, 64); }

// A row chunk: `step` elements of a row, ready to be multiplied lane by lane with another row's chunk.
template <class S> struct Chunk;
template <> struct Chunk<float> {
    static constexpr long step = 16;
    vec v;
    static Chunk take(const float* p) { return {load16(p)}; }
    static Chunk take(const float* p, long count) { Chunk c{}; memcpy(&c.v, p, count * 4); return c; }
    static Chunk pair(const float* p) { return {splat(*p)}; }  // one element to every lane
    static vec mad(vec sum, Chunk a, Chunk b) { return sum + a.v * b.v; }
};
template <> struct Chunk<bf16> {
    static constexpr long step = 32;
    bits v;
    static Chunk take(const bf16* p) { Chunk c; memcpy(&c.v, p, 64); return c; }
    static Chunk take(const bf16* p, long count) { Chunk c{}; memcpy(&c.v, p, count * 2); return c; }
    static Chunk pair(const bf16* p) { uint32_t u; memcpy(&u, p, 4); return {u - bits{}}; }  // two elements to every lane
    static vec mad(vec sum, Chunk a, Chunk b) {
#ifdef LANES_AVX512
        return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a.v, (__m512bh)b.v);
#else
        sum += (vec)(a.v & 0xffff0000u) * (vec)(b.v & 0xffff0000u);
        return sum + (vec)(a.v << 16) * (vec)(b.v << 16);
#endif
    }
};

#ifdef LANES_AVX2
// Half a chunk: eight of its lanes as float, a bf16 pair as its high and its low one. Sixteen registers hold no sixteen sums of
// sixteen lanes, so loops below take eight sums of eight lanes at a time; a lane's order of addition stays that of `Chunk`.
template <class S> struct Half;
template <> struct Half<float> {
    static constexpr int parts = 1;
    __m256 v[1];
    static Half take(const float* p) { return {{_mm256_loadu_ps(p)}}; }
    static Half pair(const float* p) { return {{_mm256_broadcast_ss(p)}}; }
};
template <> struct Half<bf16> {
    static constexpr int parts = 2;
    __m256 v[2];
    static Half of(__m256i b) {
        return {{_mm256_castsi256_ps(_mm256_and_si256(b, _mm256_set1_epi32(int(0xffff0000)))), _mm256_castsi256_ps(_mm256_slli_epi32(b, 16))}};
    }
    static Half take(const bf16* p) { return of(_mm256_loadu_si256((const __m256i*)p)); }
    static Half pair(const bf16* p) { int u; memcpy(&u, p, 4); return of(_mm256_set1_epi32(u)); }
};
template <class S> inline __m256 mad(__m256 sum, const Half<S>& a, const Half<S>& b) {
    for (int i = 0; i < Half<S>::parts; i++) sum = _mm256_fmadd_ps(a.v[i], b.v[i], sum);
    return sum;
}
inline __m256 half_of(const vec& v, int h) { return _mm256_loadu_ps((const float*)&v + 8 * h); }
inline void put_half(vec& v, int h, __m256 x) { _mm256_storeu_ps((float*)&v + 8 * h, x); }
#endif

// The sums over lanes of 16 vectors, as one vector. Each vector's tree is the same whatever its place.
inline vec lane_sums(vec* a) {
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

// sums[c] = a . b[c] for one row and 16 others, all where they lie: a pass over b, which is what decoding is.
template <class S>
APART vec dots(const S* a, const S* const* b, long K) {
    typedef Chunk<S> X;
    vec sum[16] = {};
    long k = 0;
#ifdef LANES_AVX2
    const long half = X::step / 2, whole = K / X::step * X::step;
    for (int c = 0; c < 16; c += 4) {
        __m256 s[8] = {};
        for (k = 0; k < whole; k += X::step) {
            const Half<S> x = Half<S>::take(a + k), y = Half<S>::take(a + k + half);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                s[2 * i] = mad(s[2 * i], x, Half<S>::take(b[c + i] + k));
                s[2 * i + 1] = mad(s[2 * i + 1], y, Half<S>::take(b[c + i] + k + half));
            }
        }
        for (int i = 0; i < 8; i++) put_half(sum[c + i / 2], i & 1, s[i]);
    }
#else
    for (; k + X::step <= K; k += X::step) {
        X x = X::take(a + k);
#pragma GCC unroll 16
        for (int c = 0; c < 16; c++) sum[c] = X::mad(sum[c], x, X::take(b[c] + k));
    }
#endif
    if (k < K) {
        X x = X::take(a + k, K - k);
        for (int c = 0; c < 16; c++) sum[c] = X::mad(sum[c], x, X::take(b[c] + k, K - k));
    }
    return lane_sums(sum);
}

// R rows chunk by chunk side by side, zeros behind their ends: [chunks][R][step]. Rows a power of two apart would fight for
// the same cache lines.
template <long R, class S>
inline void pack_rows(const S* const* rows, S* out, long K) {
    typedef Chunk<S> X;
    long k = 0;
    for (; k + X::step <= K; k += X::step)
        for (int r = 0; r < R; r++, out += X::step) memcpy((void*)out, rows[r] + k, 64);
    if (k < K)
        for (int r = 0; r < R; r++, out += X::step) {
            X x = X::take(rows[r] + k, K - k);
            memcpy((void*)out, &x, 64);
        }
}
template <class S> inline long chunks(long K) { return (K + Chunk<S>::step - 1) / Chunk<S>::step; }

// sums[4 r + c] = a_r . b_c of two packed groups of 4 rows; the same order of addition as `dots`.
template <class S>
APART vec dots4x4(const S* a, const S* b, long size) {
    typedef Chunk<S> X;
    vec sum[16] = {};
    for (long k = 0; k < size; k += 4 * X::step) {
        X x[4];
        for (int r = 0; r < 4; r++) {
            x[r] = X::take(a + k + r * X::step);
            KEEP(x[r].v);
        }
#pragma GCC unroll 4
        for (int c = 0; c < 4; c++) {
            X y = X::take(b + k + c * X::step);
            KEEP(y.v);
#pragma GCC unroll 4
            for (int r = 0; r < 4; r++) sum[4 * r + c] = X::mad(sum[4 * r + c], x[r], y);
        }
    }
    return lane_sums(sum);
}

#ifdef LANES_AVX2
// The same for a stretch of `size` elements of both groups, added to what the sums are so far.
template <class S>
APART void add4x4(const S* a, const S* b, long size, vec* sum) {
    const long row = Chunk<S>::step;
    for (int part = 0; part < 4; part++) {
        const int h = part & 1, r = part & 2;
        __m256 s[8];
        for (int i = 0; i < 8; i++) s[i] = half_of(sum[4 * r + i], h);
        for (long k = h * row / 2; k < size; k += 4 * row) {
            const Half<S> x = Half<S>::take(a + k + r * row), y = Half<S>::take(a + k + (r + 1) * row);
#pragma GCC unroll 4
            for (int c = 0; c < 4; c++) {
                const Half<S> z = Half<S>::take(b + k + c * row);
                s[c] = mad(s[c], x, z), s[4 + c] = mad(s[4 + c], y, z);
            }
        }
        for (int i = 0; i < 8; i++) put_half(sum[4 * r + i], h, s[i]);
    }
}
#endif

// exp for x <= 0, about 2 ulp: 2^k times a polynomial on [-ln2/2, ln2/2].
inline vec exp16(vec x) {
    vec low = splat(-87.0f);
    x = x < low ? low : x;
    vec k = x * 1.44269504f;
    ints n = __builtin_convertvector(k + (k < 0 ? splat(-0.5f) : splat(0.5f)), ints);
    k = __builtin_convertvector(n, vec);
    vec f = x - k * 0.693359375f + k * 2.12194440e-4f;
    vec p = splat(1.9875691500e-4f);
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * f * f + f + 1.0f;
    return p * (vec)((n + 127) << 23);
}

// 16 rows of w words -> [w][16]. The compiler's shuffles are as good as ours here: 16 x 16 words at a time.
inline void turn(const uint32_t* const* rows, long w, uint32_t* out) {
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
