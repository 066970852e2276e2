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
