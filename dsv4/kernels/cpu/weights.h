// Weights as a product reads them: rows of float or bf16, FP8 (E4M3) or FP4 (E2M1). The packed ones become bf16 on their way
// into the registers, which is exact: their scales are powers of two. So all of them share one arithmetic.
//
// pack<R>(n, end, out): rows n .. n+R-1 (not beyond end - 1), packed as `pack_rows` does. dots(a, n, end): a . w[n .. n+15].
#pragma once
#include <utility>

#include "lanes.h"

// Fetches what the next 16 rows hold at this place: 16 streams at once are too many for the processor to foresee.
inline void ahead(const void* p, long row) { __builtin_prefetch((const char*)p + 16 * row, 0, 2); }

template <class S>
struct Plain {
    typedef S X;
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
};

// value 2^(s - 127) in bf16, for what the quick ways below cannot do: scales at the ends of their range
inline uint16_t slow_bf16(float value, int s) {
    bf16 b;
    store(&b, 0, std::ldexp(value, s - 127));
    return b.bits;
}

inline std::pair<int, int> extremes(const uint8_t* p, long count) {
    uint8_t least = 255, most = 0;
    for (long i = 0; i < count; i++) least = std::min(least, p[i]), most = std::max(most, p[i]);
    return {least, most};
}

constexpr float E2M1[16] = {0, .5, 1, 1.5, 2, 3, 4, 6, -0.f, -.5, -1, -1.5, -2, -3, -4, -6};
inline float e4m3(uint8_t b) {
    int e = b >> 3 & 15, m = b & 7;
    float v = e ? std::ldexp(8.0f + m, e - 10) : std::ldexp(float(m), -9);
    return b & 128 ? -v : v;
}

// Rows of MXFP4: two elements a byte, the low half first; a scale for every 32.
struct Fp4 {
    typedef bf16 X;
    const uint8_t *w, *scale;
    long K;
    Fp4(const void* elements, const void* scale, long K) : w((const uint8_t*)elements), scale((const uint8_t*)scale), K(K) {}
    static Chunk<bf16> take(const uint8_t* p, int s, bool tame) {
        Chunk<bf16> c;
#ifdef LANES_AVX512
        if (tame) {
            const __m512i table = _mm512_set4_epi64(0xc0c0c080c040c000, 0xbfc0bf80bf008000, 0x40c0408040404000, 0x3fc03f803f000000);
            __m512i lut = _mm512_mask_add_epi16(table, 0xfefefefe, table, _mm512_set1_epi16(short((s - 127) << 7)));
            __m512i b = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));  // words: low half, high half
            b = _mm512_ternarylogic_epi32(b, _mm512_slli_epi32(b, 12), _mm512_set1_epi32(0x000f000f), 0xa8);  // (b | b << 12) & mask
            c.v = (bits)_mm512_permutexvar_epi16(b, lut);
            return c;
        }
#elif defined(LANES_AVX2)
        if (tame) {  // a bf16 is made of two bytes, each from a table of 16
            const __m128i high = _mm_set_epi64x(0xc0c0c0c0bfbfbf80, 0x404040403f3f3f00);
            const __m128i low = _mm_set_epi64x(0xc0804000c0800000, 0xc0804000c0800000);
            __m128i b = _mm_loadu_si128((const __m128i*)p), mask = _mm_set1_epi8(15), even = _mm_and_si128(b, mask);
            __m128i odd = _mm_and_si128(_mm_srli_epi16(b, 4), mask), power = _mm_set1_epi16(short((s - 127) << 7));
            __m128i out[4];
            for (int half = 0; half < 2; half++) {
                __m128i code = half ? _mm_unpackhi_epi8(even, odd) : _mm_unpacklo_epi8(even, odd);
                __m128i l = _mm_shuffle_epi8(low, code), h = _mm_shuffle_epi8(high, code);
                out[2 * half] = _mm_unpacklo_epi8(l, h), out[2 * half + 1] = _mm_unpackhi_epi8(l, h);
            }
            for (__m128i& v : out) {
                __m128i some = _mm_cmpgt_epi16(_mm_and_si128(v, _mm_set1_epi16(0x7fff)), _mm_setzero_si128());
                v = _mm_add_epi16(v, _mm_and_si128(some, power));
            }
            memcpy(&c, out, 64);
            return c;
        }
#endif
        uint16_t out[32];
        for (int i = 0; i < 32; i++) out[i] = slow_bf16(E2M1[p[i >> 1] >> (i & 1) * 4 & 15], s);
        memcpy(&c, out, 64);
        return c;
    }
    template <long R> APART void pack(long n, long end, bf16* out) const {
        for (long b = 0; b < K >> 5; b++)
            for (int r = 0; r < R; r++, out += 32) {
                long row = std::min(n + r, end - 1);
                int s = scale[row * (K >> 5) + b];
                Chunk<bf16> c = take(w + (row * K >> 1) + 16 * b, s, tame(s, s));
                memcpy((void*)out, &c, 64);
            }
    }
    static bool tame(int least, int most) { return least > 1 && most < 252; }
    template <bool quick> APART vec dots16(const bf16* a, const uint8_t* const* p, const uint8_t* const* s) const {
        vec sum[16] = {};
        for (long b = 0; b < K >> 5; b++) {
            Chunk<bf16> x = Chunk<bf16>::take(a + 32 * b);
            if (b % 4 == 0)
                for (int r = 0; r < 16; r++) ahead(p[r] + 16 * b, K / 2);
#pragma GCC unroll 16
            for (int r = 0; r < 16; r++) sum[r] = Chunk<bf16>::mad(sum[r], x, take(p[r] + 16 * b, s[r][b], quick));
        }
        return lane_sums(sum);
    }
    vec dots(const bf16* a, long n, long end) const {
        const uint8_t *p[16], *s[16];
        for (int r = 0; r < 16; r++) {
            long row = std::min(n + r, end - 1);
            p[r] = w + (row * K >> 1), s[r] = scale + row * (K >> 5);
        }
        auto [least, most] = extremes(s[0], std::min(end - n, 16L) * (K >> 5));
        return tame(least, most) ? dots16<true>(a, p, s) : dots16<false>(a, p, s);
    }
};

// Rows of E4M3; a scale for every 128 x 128.
struct Fp8 {
    typedef bf16 X;
    const uint8_t *w, *scale;
    long K, wide;
    Fp8(const void* elements, const void* scale, long K)
        : w((const uint8_t*)elements), scale((const uint8_t*)scale), K(K), wide((K + 127) / 128) {}
    static Chunk<bf16> take(const uint8_t* p, int s, bool tame) {
        Chunk<bf16> c;
#ifdef LANES_AVX512
        if (tame) {
            __m512i b = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)p)), size = _mm512_and_si512(b, _mm512_set1_epi16(0x7f));
            __m512i power = _mm512_set1_epi16(short((s - 127) << 7));
            __m512i v = _mm512_add_epi16(_mm512_slli_epi16(size, 4), _mm512_add_epi16(power, _mm512_set1_epi16(120 << 7)));
            // below the smallest normal: m 2^-9, of which 0 stays 0
            const __m512i tiny = _mm512_castsi128_si512(_mm_set_epi16(0x3c60, 0x3c40, 0x3c20, 0x3c00, 0x3bc0, 0x3b80, 0x3b00, 0));
            __m512i lut = _mm512_mask_add_epi16(tiny, 0xfe, tiny, power);
            v = _mm512_mask_permutexvar_epi16(v, _mm512_cmplt_epu16_mask(size, _mm512_set1_epi16(8)), size, lut);
            c.v = (bits)_mm512_ternarylogic_epi32(v, _mm512_slli_epi16(b, 8), _mm512_set1_epi16(short(0x8000)), 0xf8);  // v | sign
            return c;
        }
#elif defined(LANES_AVX2)
        if (tame) {
            const __m256i tiny = _mm256_broadcastsi128_si256(_mm_set_epi16(0x3c60, 0x3c40, 0x3c20, 0x3c00, 0x3bc0, 0x3b80, 0x3b00, 0));
            __m256i power = _mm256_set1_epi16(short((s - 127) << 7)), out[2];
            for (int half = 0; half < 2; half++) {
                __m256i b = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)(p + 16 * half)));
                __m256i size = _mm256_and_si256(b, _mm256_set1_epi16(0x7f)), zero = _mm256_cmpeq_epi16(size, _mm256_setzero_si256());
                __m256i v = _mm256_add_epi16(_mm256_slli_epi16(size, 4), _mm256_set1_epi16(120 << 7));
                __m256i at = _mm256_add_epi16(_mm256_mullo_epi16(size, _mm256_set1_epi16(0x0202)), _mm256_set1_epi16(0x0100));
                v = _mm256_blendv_epi8(_mm256_shuffle_epi8(tiny, at), v, _mm256_cmpgt_epi16(size, _mm256_set1_epi16(7)));
                v = _mm256_add_epi16(v, _mm256_andnot_si256(zero, power));
                out[half] = _mm256_or_si256(v, _mm256_and_si256(_mm256_slli_epi16(b, 8), _mm256_set1_epi16(short(0x8000))));
            }
            memcpy(&c, out, 64);
            return c;
        }
#endif
        uint16_t out[32];
        for (int i = 0; i < 32; i++) out[i] = slow_bf16(e4m3(p[i]), s);
        memcpy(&c, out, 64);
        return c;
    }
    static bool tame(int least, int most) { return least > 10 && most < 240; }
    template <long R> APART void pack(long n, long end, bf16* out) const {
        for (long k = 0; k < K; k += 32)
            for (int r = 0; r < R; r++, out += 32) {
                long row = std::min(n + r, end - 1);
                int s = scale[row / 128 * wide + k / 128];
                Chunk<bf16> c = take(w + row * K + k, s, tame(s, s));
                memcpy((void*)out, &c, 64);
            }
    }
    template <bool quick> APART vec dots16(const bf16* a, const uint8_t* const* p, const uint8_t* const* s) const {
        vec sum[16] = {};
        for (long k = 0; k < K; k += 32) {
            Chunk<bf16> x = Chunk<bf16>::take(a + k);
            if (k % 64 == 0)
                for (int r = 0; r < 16; r++) ahead(p[r] + k, K);
#pragma GCC unroll 16
            for (int r = 0; r < 16; r++) sum[r] = Chunk<bf16>::mad(sum[r], x, take(p[r] + k, s[r][k >> 7], quick));
        }
        return lane_sums(sum);
    }
    vec dots(const bf16* a, long n, long end) const {
        const uint8_t *p[16], *s[16];
        int least = 255, most = 0;
        for (int r = 0; r < 16; r++) {
            long row = std::min(n + r, end - 1);
            p[r] = w + row * K, s[r] = scale + row / 128 * wide;
            auto [low, high] = extremes(s[r], wide);
            least = std::min(least, low), most = std::max(most, high);
        }
        return tame(least, most) ? dots16<true>(a, p, s) : dots16<false>(a, p, s);
    }
};

// x rounded to E4M3 in blocks of 128 under scales that are powers of two, as bf16 (exact): what a quantised layer reads.
template <class S>
inline void round_row(const S* x, bf16* out, long K) {
    for (long k = 0; k < K; k += 128) {
        const long count = std::min(K - k, 128L);
        float v[128], most = 1e-4f;
        for (long i = 0; i < count; i++) {
            v[i] = load(x, k + i);
            most = std::max(most, std::fabs(v[i]));
        }
        float ratio = most / 448.0f;
        uint32_t u;
        memcpy(&u, &ratio, 4);
        uint32_t power = (u >> 23) + ((u & 0x7fffff) != 0);  // 2^ceil(log2(ratio)), biased
        uint32_t up = power << 23, down = (254 - power) << 23;
        float scale, inverse;
        memcpy(&scale, &up, 4);
        memcpy(&inverse, &down, 4);
        for (long i = 0; i < count; i++) {
            float y = v[i] * inverse, size = std::fabs(y);
            uint32_t b;
            memcpy(&b, &y, 4);
            b = (b + 0x7ffff + (b >> 20 & 1)) & 0xfff00000u;  // three bits of mantissa, ties to even
            float coarse;
            memcpy(&coarse, &b, 4);
            float fine = std::nearbyint(y * 512.0f) * (1 / 512.0f);  // below the smallest normal, 2^-6, steps of 2^-9
            float q = size < 0.015625f ? fine : coarse;
            q = q > 448.0f ? 448.0f : q < -448.0f ? -448.0f : q;
            store(out, k + i, q * scale);
        }
    }
}
