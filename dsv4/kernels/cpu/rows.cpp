// Rows rounded as a cache or a quantised layer sees them: activations, KV rows, index rows.
#include <vector>

#include "rounding.h"

namespace {

// Walsh-Hadamard transform of n channels, a power of two, in the order of `numerics.hadamard`; then FP4 in blocks of 32.
template <class S>
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

#define EXPORT(S, suffix)                                                                       \
    extern "C" void round_rows_##suffix(const S* x, bf16* out, long M, long K) {                \
        _Pragma("omp parallel for if (M * K > 1000000)")                                        \
        for (long m = 0; m < M; m++) round_row<128>(x + m * K, out + m * K, K);                 \
    }                                                                                           \
    extern "C" void kv_rows_##suffix(const S* x, S* out, long M, long d, long rope) {           \
        _Pragma("omp parallel for if (M * d > 1000000)")                                        \
        for (long m = 0; m < M; m++) {                                                          \
            round_row<64>(x + m * d, out + m * d, d - rope);                                    \
            memcpy((void*)(out + (m + 1) * d - rope), x + (m + 1) * d - rope, rope * sizeof(S)); \
        }                                                                                       \
    }                                                                                           \
    extern "C" void index_rows_##suffix(const S* x, S* out, long M, long d) {                   \
        _Pragma("omp parallel if (M * d > 200000)") {                                           \
            std::vector<float> room(2 * d);                                                     \
            _Pragma("omp for")                                                                  \
            for (long m = 0; m < M; m++) index_row(x + m * d, out + m * d, d, room.data(), room.data() + d); \
        }                                                                                       \
    }
EXPORT(float, f32)
EXPORT(bf16, bf16)
