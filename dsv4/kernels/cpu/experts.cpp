// Routed experts: any row count, plain or packed weights.
#include "product.h"
#include "rounding.h"
#include "vec.h"

// out [M, D] += sum over a token's experts of W2 (weight * swiglu(W1 x, W3 x)); owner, weight [M, K]. Packed weights have both of
// their inputs rounded to E4M3 in blocks of 128 channels. at[6 e ...]: where expert e has the elements of w1, w2, w3 and their scales, or
// null: then the expert is not here, and its pairs wait for another call. Each token adds its experts in ascending order of their
// number, in float32.
extern "C" void experts(const S* x, long bits, const float* weight, const int64_t* owner, const void* const* at, float* out, long M, long K,
                        long E, long D, long I, float limit) {
    const bool packed = bits < 16;
    std::vector<long> start(E + 1), place(M * K);
    for (long i = 0; i < M * K; i++) start[owner[i] + 1]++;
    for (long e = 0; e < E; e++) start[e + 1] += start[e];
    std::vector<long> next(start.begin(), start.end() - 1);
    for (long i = 0; i < M * K; i++) place[next[owner[i]]++] = i;  // pairs (token, choice) sorted by expert
    struct Part { long e, m0, m1, n0, n1; };
    std::vector<Part> parts;
    const long columns = M * K < 4 * BLOCK ? pieces_of(I / 64) : 1;  // few rows: threads share an expert
    for (long e = 0; e < E; e++)
        for (long m = start[e]; m < start[e + 1] && at[6 * e]; m += BLOCK)
            for (long c = 0; c < columns; c++)
                parts.push_back({e, m, std::min(m + BLOCK, start[e + 1]), I * c / columns & ~15L,
                                 c + 1 == columns ? I : I * (c + 1) / columns & ~15L});
    std::vector<S> hidden(M * K * I), rounded(packed ? M * K * I + M * D : 0);
    const long* pair = place.data();
    S *h = hidden.data(), *second = packed ? rounded.data() : h;
    const bool worth = M * K * D * I > 700000;
    if (packed) {
        S* first = second + M * K * I;
#pragma omp parallel for schedule(static) if (M > 64)
        for (long m = 0; m < M; m++) round_row(x + m * D, first + m * D, D, 128);
        x = first;
    }
    share(parts.size(), worth, [&](long p) {
        const long e = parts[p].e, m0 = parts[p].m0, m1 = parts[p].m1, n0 = parts[p].n0, n1 = parts[p].n1;
        S* g = scratch<S>(0, BLOCK * I);
        auto row = [=](long m) { return x + pair[m] / K * D; };
        product(row, {bits, at[6 * e], at[6 * e + 3], D}, m0, m1, n0, n1, [=](long m, long n, const float* s, long count) {
            for (long i = 0; i < count; i++) store(g, (m - m0) * I + n + i, s[i]);
        });
        product(row, {bits, at[6 * e + 2], at[6 * e + 5], D}, m0, m1, n0, n1, [=](long m, long n, const float* s, long count) {
            for (long i = 0; i < count; i++) store(h, m * I + n + i, s[i]);
        });
        for (long m = m0; m < m1; m++)
            for (long n = n0; n < n1; n += 16) {
                long count = std::min(n1 - n, 16L);
                float a[16] = {}, b[16];
                for (long i = 0; i < count; i++) a[i] = std::min(load(g, (m - m0) * I + n + i), limit);
                vec v = load16(a), decay = exp16(v > 0 ? -v : v);  // silu(v) = v sigmoid(v), by |v|
                store16(b, (v > 0 ? v : v * decay) / (1.0f + decay));
                for (long i = 0; i < count; i++) {
                    float up = load(h, m * I + n + i);
                    up = up > limit ? limit : up < -limit ? -limit : up;
                    store(h, m * I + n + i, b[i] * up * weight[pair[m]]);
                }
            }
    });
    if (packed) {
#pragma omp parallel for schedule(static) if (worth && M * K > 16)
        for (long m = 0; m < M * K; m++) round_row(h + m * I, second + m * I, I, 128);
    }
    // Threads own columns of the result, so that no two ever add to one number.
    const long wide = pieces_of(D / 64);
    share(wide, worth, [&](long c) {
        const long n0 = D * c / wide & ~15L, n1 = c + 1 == wide ? D : D * (c + 1) / wide & ~15L;
        for (long e = 0; e < E; e++) {
            if (start[e] == start[e + 1] || !at[6 * e]) continue;
            product([=](long m) { return second + m * I; }, {bits, at[6 * e + 1], at[6 * e + 4], I}, start[e], start[e + 1], n0, n1,
                    [=](long m, long n, const float* s, long count) {
                        for (long i = 0; i < count; i++) out[pair[m] / K * D + n + i] += s[i];
                    });
        }
    });
}

#ifdef BF16
// A whole layer's mixture for packed weights: routed experts in FP4 or FP8, then the shared one (at: one entry, weight 1) in FP8.
extern "C" void mixture(const bf16* x, long bits, const float* weight, const int64_t* owner, const void* const* at,
                        const void* const* shared, bf16* out, long M, long K, long E, long D, long I, long J, float limit) {
    std::vector<float> sum(M * D), ones(M, 1);
    const std::vector<int64_t> everyone(M);
    experts(x, bits, weight, owner, at, sum.data(), M, K, E, D, I, limit);
    experts(x, 8, ones.data(), everyone.data(), shared, sum.data(), M, 1, 1, D, J, limit);
    for (long i = 0; i < M * D; i++) store(out, i, sum[i]);
}
#endif
