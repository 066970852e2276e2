// Rows rounded as a cache or a quantised layer sees them: activations, KV rows, index rows.
#include "rounding.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace {

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

}  // namespace

void round_row(const S* x, S* out, long K, long B) {
    for (long k = 0; k < K; k += B) {
        const long count = std::min(K - k, B);
        float v[128], most = 1e-4f;
        for (long i = 0; i < count; i++) {
            v[i] = load(x, k + i);
            most = std::max(most, std::fabs(v[i]));
        }
        const Power p(most, 448.0f);
        for (long i = 0; i < count; i++) store(out, k + i, to_e4m3(v[i] * p.inverse) * p.scale);
    }
}

namespace {

// Walsh-Hadamard transform of n channels, a power of two, in the order of `numerics.hadamard`; then FP4 in blocks of 32.
void index_row(const S* x, S* out, long n, float* v, float* w) {
    for (long i = 0; i < n; i++) v[i] = load(x, i);
    for (long half = n / 2; half; half /= 2) {
        for (long base = 0; base < n; base += 2 * half)
            for (long i = base; i < base + half; i++) w[i] = v[i] + v[i + half], w[i + half] = v[i] - v[i + half];
        asm volatile("" ::: "memory");  // stages are not merged: sums keep their order
        std::swap(v, w);
    }
    const float size = float(std::pow(double(n), -0.5));
    for (long i = 0; i < n; i++) store(out, i, v[i] * size);
    for (long k = 0; k < n; k += 32) {
        float most = 6 * 1.17549435e-38f;
        for (long i = k; i < k + 32; i++) most = std::max(most, std::fabs(load(out, i)));
        const Power p(most, 6.0f);
        for (long i = k; i < k + 32; i++) {
            float y = load(out, i) * p.inverse, a = std::fabs(y), up = a < 2 ? 2.0f : a < 4 ? 1.0f : 0.5f;
            store(out, i, std::nearbyint(y * up) / up * p.scale);
        }
    }
}

}  // namespace

extern "C" void round_rows(const S* x, S* out, long M, long K) {
#pragma omp parallel for if (M * K > 1000000)
    for (long m = 0; m < M; m++) round_row(x + m * K, out + m * K, K, 128);
}
extern "C" void kv_rows(const S* x, S* out, long M, long d, long rope) {
#pragma omp parallel for if (M * d > 1000000)
    for (long m = 0; m < M; m++) {
        round_row(x + m * d, out + m * d, d - rope, 64);
        memcpy((void*)(out + (m + 1) * d - rope), x + (m + 1) * d - rope, rope * sizeof(S));
    }
}
extern "C" void index_rows(const S* x, S* out, long M, long d) {
#pragma omp parallel if (M * d > 200000)
    {
        std::vector<float> room(2 * d);
#pragma omp for
        for (long m = 0; m < M; m++) index_row(x + m * d, out + m * d, d, room.data(), room.data() + d);
    }
}
