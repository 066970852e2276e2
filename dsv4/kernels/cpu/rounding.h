// Values rounded to E4M3 or E2M1 in blocks under scales that are powers of two, as `numerics.rounded` does: to the bit.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>

#include "scalar.h"

// 2^ceil(log2(most / largest)) and its inverse. Both operands are normal numbers.
struct Power {
    float scale, inverse;
    Power(float most, float largest) {
        float ratio = most / largest;
        uint32_t u;
        memcpy(&u, &ratio, 4);
        uint32_t power = (u >> 23) + ((u & 0x7fffff) != 0), up = power << 23, down = (254 - power) << 23;
        memcpy(&scale, &up, 4);
        memcpy(&inverse, &down, 4);
    }
};

inline float to_e4m3(float y) {
    uint32_t b;
    memcpy(&b, &y, 4);
    b = (b + 0x7ffff + (b >> 20 & 1)) & 0xfff00000u;  // three bits of mantissa, ties to even
    float coarse;
    memcpy(&coarse, &b, 4);
    float fine = std::nearbyint(y * 512.0f) * (1 / 512.0f);  // below the smallest normal, 2^-6, steps of 2^-9
    float q = std::fabs(y) < 0.015625f ? fine : coarse;
    return q > 448.0f ? 448.0f : q < -448.0f ? -448.0f : q;
}

// K channels in E4M3 blocks of B, a block's largest counting at least 1e-4.
template <long B, class S, class T>
inline void round_row(const S* x, T* out, long K) {
    for (long k = 0; k < K; k += B) {
        const long count = std::min(K - k, B);
        float v[B], most = 1e-4f;
        for (long i = 0; i < count; i++) {
            v[i] = load(x, k + i);
            most = std::max(most, std::fabs(v[i]));
        }
        const Power p(most, 448.0f);
        for (long i = 0; i < count; i++) store(out, k + i, to_e4m3(v[i] * p.inverse) * p.scale);
    }
}
