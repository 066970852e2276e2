// Linear layers: any row count, plain or packed weights.
#include "product.h"
#include "rounding.h"
#include "share.h"

namespace {

// x [M, G, K], G weights [N, K] one behind the other -> y [M, G, N] (G = 1: a plain linear layer).
template <class W, class T>
void linear(const typename W::X* x, const void* elements, const void* scale, T* y, long M, long N, long K, long G) {
    const long rows = (M + BLOCK - 1) / BLOCK, columns = rows < 4 ? pieces_of(N / 64) : 1;
    share(G * columns * rows, M * N * K * G > 2000000, [=](long piece) {
        const long m = piece % rows, c = piece / rows % columns, g = piece / rows / columns;
        const long n0 = N * c / columns & ~15L, n1 = c + 1 == columns ? N : N * (c + 1) / columns & ~15L;
        product([=](long r) { return x + (r * G + g) * K; }, W(elements, scale, K), m * BLOCK, std::min((m + 1) * BLOCK, M), g * N + n0,
                g * N + n1, [=](long r, long n, const float* s, long count) {
                    for (long i = 0; i < count; i++) store(y, r * G * N + n + i, s[i]);
                });
    });
}

// The same with one group and x in the release's arithmetic: first rounded to E4M3 in blocks of 128 channels.
template <class W, class T>
void rounded_linear(const T* x, const void* elements, const void* scale, T* y, long M, long N, long K) {
    bf16* seen = scratch<bf16>(3, M * K);
#pragma omp parallel for if (M * K > 1000000)
    for (long m = 0; m < M; m++) round_row<128>(x + m * K, seen + m * K, K);
    linear<W>(seen, elements, scale, y, M, N, K, 1);
}

// What a compressor takes from its tokens x [M, K]: values and gates [N = halves * dim] side by side, half by half, as float
// [M, halves, 2, dim]; a gate has its place's row of ape [ratio, N] added.
template <class S>
void project(const S* x, const S* values, const S* gates, const float* ape, const int64_t* position, float* out, long M, long N, long K,
             long dim, long ratio) {
    const long rows = (M + BLOCK - 1) / BLOCK, columns = rows < 4 ? pieces_of(N / 64) : 1;
    share(2 * columns * rows, M * N * K > 1000000, [=](long piece) {
        const long m = piece % rows, c = piece / rows % columns, gate = piece / rows / columns;
        const long n0 = N * c / columns & ~15L, n1 = c + 1 == columns ? N : N * (c + 1) / columns & ~15L;
        product([=](long r) { return x + r * K; }, Plain<S>(gate ? gates : values, nullptr, K), m * BLOCK, std::min((m + 1) * BLOCK, M), n0,
                n1, [=](long r, long n, const float* s, long count) {
                    const float* add = ape + position[r] % ratio * N;
                    for (long i = n; i < n + count; i++)
                        out[r * 2 * N + (i / dim * 2 + gate) * dim + i % dim] = gate ? s[i - n] + add[i] : s[i - n];
                });
    });
}

}  // namespace

#define LINEAR(W, T, suffix)                                                                                                              \
    extern "C" void linear_##suffix(const W::X* x, const void* w, const void* scale, T* y, long M, long N, long K, long G) {              \
        linear<W, T>(x, w, scale, y, M, N, K, G);                                                             \
    }
LINEAR(Plain<float>, float, f32)
LINEAR(Plain<bf16>, bf16, bf16)
LINEAR(Plain<bf16>, float, wide_bf16)
LINEAR(Fp4, bf16, fp4_bf16)
LINEAR(Fp8, bf16, fp8_bf16)
LINEAR(Fp4, float, fp4_f32)
LINEAR(Fp8, float, fp8_f32)

#define ROUNDED(W, T, suffix)                                                                                                  \
    extern "C" void rounded_linear_##suffix(const T* x, const void* w, const void* scale, T* y, long M, long N, long K) {      \
        rounded_linear<W>(x, w, scale, y, M, N, K);                                                                           \
    }
ROUNDED(Fp4, bf16, fp4_bf16)
ROUNDED(Fp8, bf16, fp8_bf16)
ROUNDED(Fp4, float, fp4_f32)
ROUNDED(Fp8, float, fp8_f32)

#define PROJECT(S, suffix)                                                                                                             \
    extern "C" void project_##suffix(const S* x, const S* values, const S* gates, const float* ape, const int64_t* position, float* out, \
                                     long M, long N, long K, long dim, long ratio) {                                                   \
        project(x, values, gates, ape, position, out, M, N, K, dim, ratio);                                                            \
    }
PROJECT(float, f32)
PROJECT(bf16, bf16)

// The exact values of rows [0, N) in bf16, for torch's product when there are many rows of x.
template <class W>
void expand(const void* elements, const void* scale, bf16* out, long N, long K) {
    W w(elements, scale, K);
#pragma omp parallel for
    for (long n = 0; n < N; n += 4) {
        bf16* four = scratch<bf16>(0, 4 * K);
        w.template pack<4>(n, N, four);
        for (long k = 0; k < K; k += 32)
            for (long r = 0; r < 4 && n + r < N; r++) memcpy((void*)(out + (n + r) * K + k), four + 4 * k + 32 * r, 64);
    }
}
extern "C" void expand_fp4_bf16(const void* w, const void* scale, bf16* out, long N, long K) { expand<Fp4>(w, scale, out, N, K); }
extern "C" void expand_fp8_bf16(const void* w, const void* scale, bf16* out, long N, long K) { expand<Fp8>(w, scale, out, N, K); }
