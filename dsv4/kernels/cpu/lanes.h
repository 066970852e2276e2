// 16 float lanes, and dot products of rows that lie along the lanes. One meaning, two spellings: AVX-512 with bf16 products,
// or GCC's vector types, which the compiler lowers to whatever the processor has.
//
// Every sum has one fixed order that depends on the row's length alone: lane l takes elements l, l + 16, ... (pairs of them
// for bf16), and the 16 lanes are added as a tree. So a result never depends on the tile, the batch or the thread that made it.
#pragma once
#include "vec.h"
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512BF16__) && defined(__AVX512VBMI__)
#define LANES_AVX512 1
#ifdef BF16
#include <immintrin.h>
#endif
#define KEEP(x) asm("" : "+v"(x))  // a register is where it stays: the compiler would load it again for every use
#else
#define KEEP(x)
#endif
#if defined(__AVX2__) && !defined(LANES_AVX512)
#define LANES_AVX2 1
#endif

// A row chunk: `step` elements of a row, ready to be multiplied lane by lane with another row's chunk.
struct Chunk {
    static constexpr long step = 64 / sizeof(S);
#ifdef BF16
    bits v;
    static Chunk pair(const S* p) { uint32_t u; memcpy(&u, p, 4); return {u - bits{}}; }  // two elements to every lane
    static vec mad(vec sum, Chunk a, Chunk b) {
#ifdef LANES_AVX512
        return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a.v, (__m512bh)b.v);
#else
        sum += (vec)(a.v & 0xffff0000u) * (vec)(b.v & 0xffff0000u);
        return sum + (vec)(a.v << 16) * (vec)(b.v << 16);
#endif
    }
#else
    vec v;
    static Chunk pair(const S* p) { return {splat(*p)}; }  // one element to every lane
    static vec mad(vec sum, Chunk a, Chunk b) { return sum + a.v * b.v; }
#endif
    static Chunk take(const S* p) { Chunk c; memcpy(&c.v, p, 64); return c; }
    static Chunk take(const S* p, long count) { Chunk c{}; memcpy(&c.v, p, count * sizeof(S)); return c; }
};

#ifdef LANES_AVX2
// Half a chunk: eight of its lanes as float, a bf16 pair as its high and its low one. Sixteen registers hold no sixteen sums of
// sixteen lanes, so loops below take eight sums of eight lanes at a time; a lane's order of addition stays that of `Chunk`.
typedef float vec8 __attribute__((vector_size(32)));
typedef uint32_t bits8 __attribute__((vector_size(32)));
template <class T> inline T take8(const void* p) { T v; memcpy(&v, p, 32); return v; }
struct Half {
#ifdef BF16
    vec8 v[2];
    static Half of(bits8 b) { return {{(vec8)(b & 0xffff0000u), (vec8)(b << 16)}}; }
    static Half take(const S* p) { return of(take8<bits8>(p)); }
    static Half pair(const S* p) {
        uint32_t u;
        memcpy(&u, p, 4);
        bits8 b = u - bits8{};
        asm("" : "+x"(b));  // spread first, then taken apart: the compiler would spread both parts
        return of(b);
    }
#else
    vec8 v[1];
    static Half take(const S* p) { return {{take8<vec8>(p)}}; }
    static Half pair(const S* p) { return {{*p - vec8{}}}; }
#endif
};
inline vec8 mad(vec8 sum, const Half& a, const Half& b) {
    for (unsigned i = 0; i < sizeof(Half) / 32; i++) sum += a.v[i] * b.v[i];
    return sum;
}
inline vec8 half_of(const vec& v, int h) { return take8<vec8>((const float*)&v + 8 * h); }
inline void put_half(vec& v, int h, vec8 x) { memcpy((float*)&v + 8 * h, &x, 32); }
#endif

// sums[c] = a . b[c] for one row and 16 others, all where they lie: a pass over b, which is what decoding is.
APART inline vec dots(const S* a, const S* const* b, long K) {
    vec sum[16] = {};
    long k = 0;
#ifdef LANES_AVX2
    const long half = Chunk::step / 2, whole = K / Chunk::step * Chunk::step;
    for (int c = 0; c < 16; c += 4) {
        vec8 s[8] = {};
        for (k = 0; k < whole; k += Chunk::step) {
            const Half x = Half::take(a + k), y = Half::take(a + k + half);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                s[2 * i] = mad(s[2 * i], x, Half::take(b[c + i] + k));
                s[2 * i + 1] = mad(s[2 * i + 1], y, Half::take(b[c + i] + k + half));
            }
        }
        for (int i = 0; i < 8; i++) put_half(sum[c + i / 2], i & 1, s[i]);
    }
#else
    for (; k + Chunk::step <= K; k += Chunk::step) {
        Chunk x = Chunk::take(a + k);
#pragma GCC unroll 16
        for (int c = 0; c < 16; c++) sum[c] = Chunk::mad(sum[c], x, Chunk::take(b[c] + k));
    }
#endif
    if (k < K) {
        Chunk x = Chunk::take(a + k, K - k);
        for (int c = 0; c < 16; c++) sum[c] = Chunk::mad(sum[c], x, Chunk::take(b[c] + k, K - k));
    }
    return lane_sums(sum);
}

// R rows chunk by chunk side by side, zeros behind their ends: [chunks][R][step]. Rows a power of two apart would fight for
// the same cache lines.
template <long R, class S>
inline void pack_rows(const S* const* rows, S* out, long K) {
    long k = 0;
    for (; k + Chunk::step <= K; k += Chunk::step)
        for (int r = 0; r < R; r++, out += Chunk::step) memcpy((void*)out, rows[r] + k, 64);
    if (k < K)
        for (int r = 0; r < R; r++, out += Chunk::step) {
            Chunk x = Chunk::take(rows[r] + k, K - k);
            memcpy((void*)out, &x, 64);
        }
}
inline long chunks(long K) { return (K + Chunk::step - 1) / Chunk::step; }

// sums[4 r + c] = a_r . b_c of two packed groups of 4 rows; the same order of addition as `dots`.
APART inline vec dots4x4(const S* a, const S* b, long size) {
    vec sum[16] = {};
    for (long k = 0; k < size; k += 4 * Chunk::step) {
        Chunk x[4];
        for (int r = 0; r < 4; r++) {
            x[r] = Chunk::take(a + k + r * Chunk::step);
            KEEP(x[r].v);
        }
#pragma GCC unroll 4
        for (int c = 0; c < 4; c++) {
            Chunk y = Chunk::take(b + k + c * Chunk::step);
            KEEP(y.v);
#pragma GCC unroll 4
            for (int r = 0; r < 4; r++) sum[4 * r + c] = Chunk::mad(sum[4 * r + c], x[r], y);
        }
    }
    return lane_sums(sum);
}

#ifdef LANES_AVX2
// The same for a stretch of `size` elements of both groups, added to what the sums are so far.
APART inline void add4x4(const S* a, const S* b, long size, vec* sum) {
    const long row = Chunk::step;
    for (int part = 0; part < 4; part++) {
        const int h = part & 1, r = part & 2;
        vec8 s[8];
        for (int i = 0; i < 8; i++) s[i] = half_of(sum[4 * r + i], h);
        for (long k = h * row / 2; k < size; k += 4 * row) {
            const Half x = Half::take(a + k + r * row), y = Half::take(a + k + (r + 1) * row);
#pragma GCC unroll 4
            for (int c = 0; c < 4; c++) {
                const Half z = Half::take(b + k + c * row);
                s[c] = mad(s[c], x, z), s[4 + c] = mad(s[4 + c], y, z);
            }
        }
        for (int i = 0; i < 8; i++) put_half(sum[4 * r + i], h, s[i]);
    }
}
#endif
