// float and bf16 (ties to even) behind one pair of names. A file is compiled for each of them: `S` is what its rows hold.
#pragma once
#include <cstdint>

struct bf16 { uint16_t bits; };
#ifdef BF16
typedef bf16 S;
#else
typedef float S;
#endif
inline float load(const float* p, long i) { return p[i]; }
inline float load(const bf16* p, long i) {
    uint32_t u = uint32_t(p[i].bits) << 16;
    float f;
    __builtin_memcpy(&f, &u, 4);
    return f;
}
inline void store(float* p, long i, float x) { p[i] = x; }
inline void store(bf16* p, long i, float x) {
    uint32_t u;
    __builtin_memcpy(&u, &x, 4);
    p[i].bits = uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

// exp(x) / 2^k for the whole k next to x / ln 2, of one number or of lanes: a polynomial on [-ln2/2, ln2/2].
template <class T>
inline T exp_rest(T x, T k) {
    T f = x - k * 0.693359375f + k * 2.12194440e-4f;
    T p = f * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    return p * f * f + f + 1.0f;
}
