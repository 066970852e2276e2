// Linear layers: any row count, plain or packed weights.
#include "product.h"
#include "rounding.h"

template <class T>
void linear(const S* x, const Weight& w, T* y, long M, long N, long G) {
    const long rows = (M + BLOCK - 1) / BLOCK, columns = rows < 4 ? pieces_of(N / 64) : 1, K = w.K;
    share(G * columns * rows, M * N * K * G > 2000000, [=](long piece) {
        const long m = piece % rows, c = piece / rows % columns, g = piece / rows / columns;
        const long n0 = N * c / columns & ~15L, n1 = c + 1 == columns ? N : N * (c + 1) / columns & ~15L;
        product([=](long r) { return x + (r * G + g) * K; }, w, m * BLOCK, std::min((m + 1) * BLOCK, M), g * N + n0,
                g * N + n1, [=](long r, long n, const float* s, long count) {
                    for (long i = 0; i < count; i++) store(y, r * G * N + n + i, s[i]);
                });
    });
}

void rounded_linear(const S* x, const Weight& w, S* y, long M, long N) {
    const long K = w.K;
    S* seen = scratch<S>(0, M * K);
#pragma omp parallel for if (M * K > 1000000)
    for (long m = 0; m < M; m++) round_row(x + m * K, seen + m * K, K, 128);
    linear(seen, w, y, M, N, 1);
}

template void linear(const S*, const Weight&, S*, long, long, long);

extern "C" {

void linear(const S* x, long bits, const void* w, const void* scale, S* y, long M, long N, long K, long G) {
    linear<S>(x, {bits, w, scale, K}, y, M, N, G);
}
#ifdef BF16
void linear_wide(const S* x, long bits, const void* w, const void* scale, float* y, long M, long N, long K, long G) {
    linear<float>(x, {bits, w, scale, K}, y, M, N, G);
}
void rounded_linear(const S* x, long bits, const void* w, const void* scale, S* y, long M, long N, long K) {
    rounded_linear(x, {bits, w, scale, K}, y, M, N);
}
#endif

// What a compressor takes from its tokens x [M, K]: values and gates [N = halves * dim] side by side, half by half, as float
// [M, halves, 2, dim]; a gate has its place's row of ape [ratio, N] added.
void project(const S* x, const S* values, const S* gates, const float* ape, const int64_t* position, float* out, long M, long N, long K,
             long dim, long ratio) {
    const long rows = (M + BLOCK - 1) / BLOCK, columns = rows < 4 ? pieces_of(N / 64) : 1;
    share(2 * columns * rows, M * N * K > 1000000, [=](long piece) {
        const long m = piece % rows, c = piece / rows % columns, gate = piece / rows / columns;
        const long n0 = N * c / columns & ~15L, n1 = c + 1 == columns ? N : N * (c + 1) / columns & ~15L;
        product([=](long r) { return x + r * K; }, {8 * sizeof(S), gate ? gates : values, nullptr, K}, m * BLOCK,
                std::min((m + 1) * BLOCK, M), n0, n1, [=](long r, long n, const float* s, long count) {
                    const float* add = ape + position[r] % ratio * N;
                    for (long i = n; i < n + count; i++)
                        out[r * 2 * N + (i / dim * 2 + gate) * dim + i % dim] = gate ? s[i - n] + add[i] : s[i - n];
                });
    });
}

}
