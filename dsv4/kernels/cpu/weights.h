// Weights as a product reads them: rows of float or bf16, FP8 (E4M3) or FP4 (E2M1). The packed ones become bf16 on their way
// into the registers, which is exact: their scales are powers of two. So all of them share one arithmetic.
//
// pack<R>(n, end, out): rows n .. n+R-1 (not beyond end - 1), packed as `pack_rows` does. dots(a, n, end): a . w[n .. n+15].
// Where many rows of x meet the weight: group(n, end, out) packs 4 rows into `room(K)` elements, dots4x4(a, b, K) multiplies.
// seen(x, room, K): a row of x in the order that the weight wants, `x` itself or written to `room`.
#pragma once
#include "lanes.h"

struct Plain {
    const S* w;
    long K;
    Plain(const void* elements, const void*, long K) : w((const S*)elements), K(K) {}
    template <long R> APART void pack(long n, long end, S* out) const {
        const S* rows[R];
        for (int c = 0; c < R; c++) rows[c] = w + std::min(n + c, end - 1) * K;
        pack_rows<R>(rows, out, K);
    }
    vec dots(const S* a, long n, long end) const {
        const S* rows[16];
        for (int c = 0; c < 16; c++) rows[c] = w + std::min(n + c, end - 1) * K;
        return ::dots(a, rows, K);
    }
    static const S* seen(const S* x, S*, long) { return x; }
    static long room(long K) { return 4 * chunks(K) * Chunk::step; }
    void group(long n, long end, S* out) const { pack<4>(n, end, out); }
    static vec dots4x4(const S* a, const S* b, long K) { return ::dots4x4(a, b, room(K)); }
};

#ifdef BF16
#if defined(LANES_AVX512) || defined(LANES_AVX2)
#include <immintrin.h>
#endif

#ifdef LANES_AVX2
// 32 packed elements as float: the high and the low ones of lanes 0 to 7, then of lanes 8 to 15 (`Half<bf16>`).
struct Wide {
    __m256 v[4];
    static Wide of(const Chunk& c) {
        Wide w;
        for (int h = 0; h < 2; h++) {
            const Half x = Half::take((const bf16*)&c + 16 * h);
            w.v[2 * h] = x.v[0], w.v[2 * h + 1] = x.v[1];
        }
        return w;
    }
    Chunk chunk() const {  // its numbers are exact in bf16
        Chunk c;
        for (int h = 0; h < 2; h++) {
            const __m256i low = _mm256_srli_epi32(_mm256_castps_si256(v[2 * h + 1]), 16);
            _mm256_storeu_si256((__m256i*)&c + h, _mm256_or_si256(_mm256_castps_si256(v[2 * h]), low));
        }
        return c;
    }
};

// a . rows p[0 .. 15] of K elements, `bytes` for 32 of them; take(p, r, block) makes those `Wide`. Four rows are read at a time.
template <class Take>
APART vec wide_dots(const bf16* a, const uint8_t* const* p, long K, long bytes, Take take) {
    vec sum[16];
    for (int c = 0; c < 16; c += 4) {
        __m256 s[8] = {};
        for (long b = 0; b < K >> 5; b++) {
            const Wide x = Wide::of(Chunk::take(a + 32 * b));
            if ((b * bytes & 63) == 0)  // a row is too short for the processor to foresee the next four
                for (int r = 0; r < 4; r++) __builtin_prefetch(p[c + r] + bytes * (b + (K >> 3)), 0, 2);
#pragma GCC unroll 4
            for (int r = 0; r < 4; r++) {
                const Wide w = take(p[c + r] + bytes * b, c + r, b);
                s[2 * r] = _mm256_fmadd_ps(x.v[1], w.v[1], _mm256_fmadd_ps(x.v[0], w.v[0], s[2 * r]));
                s[2 * r + 1] = _mm256_fmadd_ps(x.v[3], w.v[3], _mm256_fmadd_ps(x.v[2], w.v[2], s[2 * r + 1]));
            }
        }
        for (int i = 0; i < 8; i++) put_half(sum[c + i / 2], i & 1, s[i]);
    }
    return lane_sums(sum);
}
// Whether all scales of 16 rows are so far from the ends of float that products with them are what `tables` says.
inline bool moderate(const uint8_t* const* s, long count, int least, int most) {
    uint8_t low = 255, high = 0;
    for (int r = 0; r < 16; r++)
        for (long i = 0; i < count; i++) low = std::min(low, s[r][i]), high = std::max(high, s[r][i]);
    return low >= least && high <= most;
}
inline __m256 power(int exponent) { return _mm256_castsi256_ps(_mm256_set1_epi32(exponent << 23)); }  // biased
#endif

// Fetches what the next 16 rows hold at this place: 16 streams at once are too many for the processor to foresee.
inline void ahead(const void* p, long row) { __builtin_prefetch((const char*)p + 16 * row, 0, 2); }

// value 2^(s - 127) in bf16, rounded where that is too small for it
inline uint16_t slow_bf16(float value, int s) {
    bf16 b;
    store(&b, 0, std::ldexp(value, s - 127));
    return b.bits;
}

constexpr float E2M1[16] = {0, .5, 1, 1.5, 2, 3, 4, 6, -0.f, -.5, -1, -1.5, -2, -3, -4, -6};
inline float e4m3(uint8_t b) {
    int e = b >> 3 & 15, m = b & 7;
    float v = e ? std::ldexp(8.0f + m, e - 10) : std::ldexp(float(m), -9);
    return b & 128 ? -v : v;
}

// What every code is in bf16 under every scale. FP4: 16 codes. FP8: the high bytes of 128 magnitudes, then the low ones.
struct Tables {
    alignas(64) uint16_t fp4[256][32];
    alignas(64) uint8_t fp8[256][4][64];
    Tables() {
        for (int s = 0; s < 256; s++) {
            for (int c = 0; c < 32; c++) fp4[s][c] = slow_bf16(E2M1[c & 15], s);
            for (int c = 0; c < 128; c++) {
                uint16_t v = slow_bf16(e4m3(uint8_t(c)), s);
                fp8[s][c >> 6][c & 63] = uint8_t(v >> 8), fp8[s][2 + (c >> 6)][c & 63] = uint8_t(v);
            }
        }
    }
};
static const Tables tables;

// Rows of MXFP4: two elements a byte, the low half first; a scale for every 32.
struct Fp4 {
    const uint8_t *w, *scale;
    long K;
    Fp4(const void* elements, const void* scale, long K) : w((const uint8_t*)elements), scale((const uint8_t*)scale), K(K) {}
#ifdef LANES_AVX2
    static constexpr int LEAST = 2, MOST = 251;
    static Wide wide(const uint8_t* p, int s) {
        // The high byte of a code's float16, whose low one is zero.
        const __m128i codes = _mm_set_epi8(-58, -60, -62, -64, -66, -68, -72, -128, 0x46, 0x44, 0x42, 0x40, 0x3e, 0x3c, 0x38, 0);
        const __m128i b = _mm_loadu_si128((const __m128i*)p), mask = _mm_set1_epi8(15), zero = _mm_setzero_si128();
        const __m128i even = _mm_shuffle_epi8(codes, _mm_and_si128(b, mask));
        const __m128i odd = _mm_shuffle_epi8(codes, _mm_and_si128(_mm_srli_epi16(b, 4), mask));
        const __m256 size = power(s);
        return {{_mm256_mul_ps(_mm256_cvtph_ps(_mm_unpacklo_epi8(zero, odd)), size), _mm256_mul_ps(_mm256_cvtph_ps(_mm_unpacklo_epi8(zero, even)), size),
                 _mm256_mul_ps(_mm256_cvtph_ps(_mm_unpackhi_epi8(zero, odd)), size), _mm256_mul_ps(_mm256_cvtph_ps(_mm_unpackhi_epi8(zero, even)), size)}};
    }
#endif
    static Chunk take(const uint8_t* p, int s) {
        Chunk c;
#ifdef LANES_AVX512
        // A byte in every four; its low half to the first word, its high half to the second. The table looks at five bits of a
        // word and holds the codes twice, so the neighbour's bit that comes along does not matter.
        __m512i b = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
        b = _mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x2424202004040000), b);
        c.v = (bits)_mm512_permutexvar_epi16(b, _mm512_load_si512(tables.fp4[s]));
#else
#ifdef LANES_AVX2
        if (s >= LEAST && s <= MOST) return wide(p, s).chunk();
#endif
        uint16_t out[32];
        for (int i = 0; i < 32; i++) out[i] = tables.fp4[s][p[i >> 1] >> (i & 1) * 4 & 15];
        memcpy(&c, out, 64);
#endif
        return c;
    }
    template <long R> APART void pack(long n, long end, bf16* out) const {
        for (long b = 0; b < K >> 5; b++)
            for (int r = 0; r < R; r++, out += 32) {
                long row = std::min(n + r, end - 1);
                Chunk c = take(w + (row * K >> 1) + 16 * b, scale[row * (K >> 5) + b]);
                memcpy((void*)out, &c, 64);
            }
    }
#ifdef LANES_AVX512
    // 128 elements, a cache line of a row, at a time: four looks into one table of 16 codes give the elements 4 w, 4 w + 1, 4 w + 2
    // and 4 w + 3 of w = 0 .. 31. A lane then holds elements of one block of 32, whose scale multiplies the lane's sum of eight
    // products. x comes in the same order. What is left beyond 128s goes block by block.
    static Chunk quarter(__m512i bytes, __m512i codes, int i) {
        return {(bits)_mm512_permutexvar_epi16(i ? _mm512_srli_epi16(bytes, 4 * i) : bytes, codes)};  // five bits: codes lie there twice
    }
    static vec scales(const uint8_t* s) {  // four powers of two, each to four lanes
        uint32_t four;
        memcpy(&four, s, 4);
        const __m512i spread = _mm512_set_epi64(0x0380808003808080, 0x0380808003808080, 0x0280808002808080, 0x0280808002808080,
                                                0x0180808001808080, 0x0180808001808080, 0x0080808000808080, 0x0080808000808080);
        return (vec)_mm512_srli_epi32(_mm512_shuffle_epi8(_mm512_set1_epi32(int(four)), spread), 1);
    }
    static const bf16* seen(const bf16* x, bf16* out, long K) {
        const __m512i quarters = _mm512_set_epi16(31, 27, 23, 19, 15, 11, 7, 3, 30, 26, 22, 18, 14, 10, 6, 2, 29, 25, 21, 17, 13, 9, 5, 1,
                                                  28, 24, 20, 16, 12, 8, 4, 0);
        long k = 0;
        for (; k + 128 <= K; k += 128) {
            __m512i v[4], u[4];
            for (int i = 0; i < 4; i++) v[i] = _mm512_permutexvar_epi16(quarters, _mm512_loadu_si512(x + k + 32 * i));
            for (int i = 0; i < 4; i += 2) {  // 128 bits are a cell: 4 x 4 of them are turned
                u[i] = _mm512_shuffle_i64x2(v[i], v[i + 1], 0x44);
                u[i + 1] = _mm512_shuffle_i64x2(v[i], v[i + 1], 0xee);
            }
            for (int i = 0; i < 2; i++) {
                _mm512_storeu_si512(out + k + 64 * i, _mm512_shuffle_i64x2(u[i], u[i + 2], 0x88));
                _mm512_storeu_si512(out + k + 64 * i + 32, _mm512_shuffle_i64x2(u[i], u[i + 2], 0xdd));
            }
        }
        memcpy((void*)(out + k), x + k, (K - k) * 2);
        return out;
    }
    APART vec dots(const bf16* a, long n, long end) const {
        const uint8_t *p[16], *s[16];
        for (int r = 0; r < 16; r++) {
            long row = std::min(n + r, end - 1);
            p[r] = w + (row * K >> 1), s[r] = scale + row * (K >> 5);
        }
        const __m512i codes = _mm512_load_si512(tables.fp4[127]);
        vec sum[16] = {};
        long b = 0;
        for (; b + 4 <= K >> 5; b += 4) {
            Chunk x[4];
            for (int i = 0; i < 4; i++) {
                x[i] = Chunk::take(a + 32 * (b + i));
                KEEP(x[i].v);
            }
#pragma GCC unroll 16
            for (int r = 0; r < 16; r++) {
                ahead(p[r] + 16 * b, K / 2);
                const __m512i bytes = _mm512_loadu_si512(p[r] + 16 * b);
                vec part{};
#pragma GCC unroll 4
                for (int i = 0; i < 4; i++) part = Chunk::mad(part, x[i], quarter(bytes, codes, i));
                sum[r] = (vec)_mm512_fmadd_ps((__m512)part, (__m512)scales(s[r] + b), (__m512)sum[r]);
            }
        }
        for (; b < K >> 5; b++) {
            Chunk x = Chunk::take(a + 32 * b);
            for (int r = 0; r < 16; r++) sum[r] = Chunk::mad(sum[r], x, take(p[r] + 16 * b, s[r][b]));
        }
        return lane_sums(sum);
    }
    // 128 elements: [4 quarters][4 rows][32], then the lanes' scales as float [4 rows][16]. The rest: [blocks][4 rows][32].
    static long room(long K) { return (K >> 7) * 640 + (K & 127) * 4; }
    APART void group(long n, long end, bf16* out) const {
        const __m512i codes = _mm512_load_si512(tables.fp4[127]);
        for (long b = 0; b < K >> 5;) {
            const bool whole = b + 4 <= K >> 5;
            for (int r = 0; r < 4; r++) {
                const long row = std::min(n + r, end - 1);
                const uint8_t *p = w + (row * K >> 1) + 16 * b, *s = scale + row * (K >> 5) + b;
                if (whole) {
                    const __m512i bytes = _mm512_loadu_si512(p);
                    for (int i = 0; i < 4; i++) _mm512_storeu_si512(out + 128 * i + 32 * r, (__m512i)quarter(bytes, codes, i).v);
                    store16((float*)(out + 512) + 16 * r, scales(s));
                } else {
                    _mm512_storeu_si512(out + 32 * r, (__m512i)take(p, *s).v);
                }
            }
            b += whole ? 4 : 1, out += whole ? 640 : 128;
        }
    }
    static APART vec dots4x4(const bf16* a, const bf16* b, long K) {
        vec sum[16] = {};
        for (long k = 0; k + 128 <= K; k += 128, a += 512, b += 640)
#pragma GCC unroll 2
            for (int half = 0; half < 2; half++) {
                vec part[8] = {};
                for (int i = 0; i < 4; i++) {
                    Chunk x[2];
                    for (int r = 0; r < 2; r++) {
                        x[r] = Chunk::take(a + 128 * i + 32 * (2 * half + r));
                        KEEP(x[r].v);
                    }
#pragma GCC unroll 4
                    for (int c = 0; c < 4; c++) {
                        Chunk y = Chunk::take(b + 128 * i + 32 * c);
                        KEEP(y.v);
                        for (int r = 0; r < 2; r++) part[4 * r + c] = Chunk::mad(part[4 * r + c], x[r], y);
                    }
                }
#pragma GCC unroll 8
                for (int i = 0; i < 8; i++) {
                    const vec s = load16((const float*)(b + 512) + 16 * (i & 3));
                    sum[8 * half + i] = (vec)_mm512_fmadd_ps((__m512)part[i], (__m512)s, (__m512)sum[8 * half + i]);
                }
            }
        for (long k = 0; k < (K & 127); k += 32, a += 128, b += 128)
            for (int r = 0; r < 4; r++)
                for (int c = 0; c < 4; c++)
                    sum[4 * r + c] = Chunk::mad(sum[4 * r + c], Chunk::take(a + 32 * r), Chunk::take(b + 32 * c));
        return lane_sums(sum);
    }
#else
    APART vec dots(const bf16* a, long n, long end) const {
        const uint8_t *p[16], *s[16];
        for (int r = 0; r < 16; r++) {
            long row = std::min(n + r, end - 1);
            p[r] = w + (row * K >> 1), s[r] = scale + row * (K >> 5);
        }
#ifdef LANES_AVX2
        if (moderate(s, K >> 5, LEAST, MOST)) return wide_dots(a, p, K, 16, [&](const uint8_t* at, int r, long b) { return wide(at, s[r][b]); });
#endif
        vec sum[16] = {};
        for (long b = 0; b < K >> 5; b++) {
            Chunk x = Chunk::take(a + 32 * b);
            for (int r = 0; r < 16; r++) sum[r] = Chunk::mad(sum[r], x, take(p[r] + 16 * b, s[r][b]));
        }
        return lane_sums(sum);
    }
    static const bf16* seen(const bf16* x, bf16*, long) { return x; }
    static long room(long K) { return 4 * K; }
    void group(long n, long end, bf16* out) const { pack<4>(n, end, out); }
    static vec dots4x4(const bf16* a, const bf16* b, long K) { return ::dots4x4(a, b, room(K)); }
#endif
};

// Rows of E4M3; a scale for every 128 x 128.
struct Fp8 {
    const uint8_t *w, *scale;
    long K, across;  // across: scales of a row
    Fp8(const void* elements, const void* scale, long K)
        : w((const uint8_t*)elements), scale((const uint8_t*)scale), K(K), across((K + 127) / 128) {}
#ifdef LANES_AVX512
    struct Scale {  // the table of one scale, in registers
        __m512i high[2], low[2];
        explicit Scale(int s) {
            for (int i = 0; i < 2; i++) high[i] = _mm512_load_si512(tables.fp8[s][i]), low[i] = _mm512_load_si512(tables.fp8[s][2 + i]);
        }
    };
    static void both(__m512i b, const Scale& s, Chunk* c) {
        b = _mm512_permutexvar_epi64(_mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0), b);  // so that the two halves come out in order
        __m512i low = _mm512_permutex2var_epi8(s.low[0], b, s.low[1]), high = _mm512_permutex2var_epi8(s.high[0], b, s.high[1]);
        high = _mm512_ternarylogic_epi32(high, b, _mm512_set1_epi8(-128), 0xf8);  // high | sign
        c[0].v = (bits)_mm512_unpacklo_epi8(low, high), c[1].v = (bits)_mm512_unpackhi_epi8(low, high);
    }
    static void take2(const uint8_t* p, const Scale& s, Chunk* c) { both(_mm512_loadu_si512(p), s, c); }
    static Chunk take(const uint8_t* p, const Scale& s) {
        Chunk c[2];
        both(_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)p)), s, c);
        return c[0];
    }
#else
    typedef int Scale;
    static Chunk looked_up(const uint8_t* p, int s) {
        uint16_t out[32];
        for (int i = 0; i < 32; i++) {
            int at = p[i] & 127;
            out[i] = uint16_t(tables.fp8[s][at >> 6][at & 63] << 8 | tables.fp8[s][2 + (at >> 6)][at & 63] | (p[i] & 128) << 8);
        }
        Chunk c;
        memcpy(&c, out, 64);
        return c;
    }
#ifdef LANES_AVX2
    // An E4M3 in a float16's place, 2^-8 of itself; the conversion to float knows its smallest numbers too.
    static constexpr int LEAST = 11, MOST = 239;
    static Wide wide(const uint8_t* p, int s) {
        const __m256i b = _mm256_loadu_si256((const __m256i*)p), mask = _mm256_set1_epi16(short(0xbf80));
        const __m256i odd = _mm256_and_si256(_mm256_srai_epi16(b, 1), mask);
        const __m256i even = _mm256_and_si256(_mm256_srai_epi16(_mm256_slli_epi16(b, 8), 1), mask);
        const __m256 size = power(s + 8);
        return {{_mm256_mul_ps(_mm256_cvtph_ps(_mm256_castsi256_si128(odd)), size), _mm256_mul_ps(_mm256_cvtph_ps(_mm256_castsi256_si128(even)), size),
                 _mm256_mul_ps(_mm256_cvtph_ps(_mm256_extracti128_si256(odd, 1)), size), _mm256_mul_ps(_mm256_cvtph_ps(_mm256_extracti128_si256(even, 1)), size)}};
    }
    static Chunk take(const uint8_t* p, int s) { return s >= LEAST && s <= MOST ? wide(p, s).chunk() : looked_up(p, s); }
#else
    static Chunk take(const uint8_t* p, int s) { return looked_up(p, s); }
#endif
    static void take2(const uint8_t* p, int s, Chunk* c) { c[0] = take(p, s), c[1] = take(p + 32, s); }
#endif
    template <long R> APART void pack(long n, long end, bf16* out) const {
        for (long k = 0; k < K; k += 64)
            for (int r = 0; r < R; r++) {
                long row = std::min(n + r, end - 1);
                Scale s(scale[row / 128 * across + k / 128]);
                Chunk c[2];
                if (k + 64 <= K) take2(w + row * K + k, s, c), memcpy((void*)(out + 32 * (R + r)), &c[1], 64);
                else c[0] = take(w + row * K + k, s);
                memcpy((void*)(out + 32 * r), &c[0], 64);
                if (r + 1 == R) out += 64 * R;
            }
    }
    // Two cache lines of a row at a time, under one scale.
    template <bool one> APART vec dots16(const bf16* a, const uint8_t* const* p, const uint8_t* const* s) const {
        vec sum[16] = {};
        long k = 0;
        for (; k + 128 <= K; k += 128) {
            Chunk x[4];
            for (int i = 0; i < 4; i++) {
                x[i] = Chunk::take(a + k + 32 * i);
                KEEP(x[i].v);
            }
            const Scale first(s[0][k >> 7]);
#ifdef LANES_AVX512
#pragma GCC unroll 16
#endif
            for (int r = 0; r < 16; r++) {
                const Scale mine = one ? first : Scale(s[r][k >> 7]);
                for (int i = 0; i < 4; i += 2) {
                    ahead(p[r] + k + 32 * i, K);
                    Chunk c[2];
                    take2(p[r] + k + 32 * i, mine, c);
                    sum[r] = Chunk::mad(Chunk::mad(sum[r], x[i], c[0]), x[i + 1], c[1]);
                }
            }
        }
        for (; k < K; k += 32) {
            Chunk x = Chunk::take(a + k);
            for (int r = 0; r < 16; r++) sum[r] = Chunk::mad(sum[r], x, take(p[r] + k, Scale(s[r][k >> 7])));
        }
        return lane_sums(sum);
    }
    vec dots(const bf16* a, long n, long end) const {
        const uint8_t *p[16], *s[16];
        for (int r = 0; r < 16; r++) {
            long row = std::min(n + r, end - 1);
            p[r] = w + row * K, s[r] = scale + row / 128 * across;
        }
#ifdef LANES_AVX2
        if (moderate(s, across, LEAST, MOST)) return wide_dots(a, p, K, 32, [&](const uint8_t* at, int r, long b) { return wide(at, s[r][b >> 2]); });
#endif
#ifdef LANES_AVX512
        if (s[0] == s[15]) return dots16<true>(a, p, s);
#endif
        return dots16<false>(a, p, s);
    }
    static const bf16* seen(const bf16* x, bf16*, long) { return x; }
    static long room(long K) { return 4 * K; }
    void group(long n, long end, bf16* out) const { pack<4>(n, end, out); }
    static vec dots4x4(const bf16* a, const bf16* b, long K) { return ::dots4x4(a, b, room(K)); }
};
#endif
