// Products of rows with the rows of a weight (both contiguous along the reduction): linear layers and experts, any row count.
#include <vector>

#include "lanes.h"

namespace {

constexpr long PANEL = 20 << 10;  // bytes
constexpr long BLOCK = 64;  // rows of x that stay in the second-level cache while the weight passes by

// Scratch of a thread: 64-byte aligned, grown and never given back.
template <class S>
S* scratch(int which, long count) {
    static thread_local std::vector<float> hold[4];
    size_t need = count * sizeof(S) / 4 + 32;
    if (hold[which].size() < need) hold[which].resize(need);
    return (S*)((uintptr_t(hold[which].data()) + 63) & ~uintptr_t(63));
}

// x[m] . w[n] for m in [m0, m1), n in [n0, n1); `row(m)` says where x[m] lies, `emit(m, n, sums, count)` takes `count` results
// of one row from column n on.
template <class S, class Row, class Emit>
inline void product(Row row, const S* w, long m0, long m1, long n0, long n1, long K, Emit emit) {
    const long size = packed4<S>(K);
    for (long mb = m0; mb < m1; mb += BLOCK) {
        long top = std::min(mb + BLOCK, m1);
        if (top - mb < 4) {
            for (long n = n0; n < n1; n += 16) {
                const S* b[16];
                for (int c = 0; c < 16; c++) b[c] = w + std::min(n + c, n1 - 1) * K;
                for (long m = mb; m < top; m++) {
                    float s[16];
                    store16(s, dots(row(m), b, K));
                    emit(m, n, s, std::min(n1 - n, 16L));
                }
            }
            continue;
        }
        // A panel of the weight stays in the first-level cache, the block of x in the second.
        const long panel = std::max<long>(1, PANEL / (size * sizeof(S)));
        S *a = scratch<S>(0, size * BLOCK / 4), *b = scratch<S>(1, size * panel);
        for (long m = mb; m < top; m += 4) {
            const S* rows[4];
            for (int r = 0; r < 4; r++) rows[r] = row(std::min(m + r, top - 1));
            pack4(rows, a + (m - mb) / 4 * size, K);
        }
        for (long np = n0; np < n1; np += 4 * panel) {
            long end = std::min(np + 4 * panel, n1);
            for (long n = np; n < end; n += 4) {
                const S* rows[4];
                for (int c = 0; c < 4; c++) rows[c] = w + std::min(n + c, n1 - 1) * K;
                pack4(rows, b + (n - np) / 4 * size, K);
            }
            for (long m = mb; m < top; m += 4)
                for (long n = np; n < end; n += 4) {
                    float s[16];
                    store16(s, dots4x4(a + (m - mb) / 4 * size, b + (n - np) / 4 * size, size));
                    for (int r = 0; r < 4 && m + r < top; r++) emit(m + r, n, s + 4 * r, std::min(n1 - n, 4L));
                }
        }
    }
}

// x [M, G, K], w [G, N, K] -> y [M, G, N]: G groups side by side (1 for a plain linear layer).
template <class S, class T>
void linear(const S* x, const S* w, T* y, long M, long N, long K, long G) {
    long work = M * N * K * G, columns = N >= 64 && M < 4 * BLOCK ? std::max<long>(1, N / 64) : 1, rows = (M + BLOCK - 1) / BLOCK;
#pragma omp parallel for collapse(3) schedule(dynamic) if (work > 100000)
    for (long g = 0; g < G; g++)
        for (long c = 0; c < columns; c++)
            for (long m = 0; m < rows; m++) {
                long n0 = N * c / columns & ~15L, n1 = c + 1 == columns ? N : N * (c + 1) / columns & ~15L;
                product(
                    [=](long r) { return x + (r * G + g) * K; }, w + g * N * K, m * BLOCK, std::min((m + 1) * BLOCK, M), n0, n1, K,
                    [=](long r, long n, const float* s, long count) {
                        for (long i = 0; i < count; i++) store(y, (r * G + g) * N + n + i, s[i]);
                    });
            }
}

// out [M, D] += sum over a token's experts of W2 (weight * swiglu(W1 x, W3 x)); owner, weight [M, K]; w1, w3 [E, I, D]; w2 [E, D, I].
// Each token adds its experts in ascending order of their number, in float32.
template <class S>
void experts(const S* x, const float* weight, const long long* owner, const S* w1, const S* w2, const S* w3, float* out, long M, long K,
             long E, long D, long I, float limit) {
    std::vector<long> start(E + 1), place(M * K);
    for (long i = 0; i < M * K; i++) start[owner[i] + 1]++;
    for (long e = 0; e < E; e++) start[e + 1] += start[e];
    std::vector<long> next(start.begin(), start.end() - 1);
    for (long i = 0; i < M * K; i++) place[next[owner[i]]++] = i;  // pairs (token, choice) sorted by expert
    struct Part { long e, m0, m1, n0, n1; };
    std::vector<Part> parts;
    const long columns = M * K < 4 * BLOCK ? 4 : 1;  // few rows: split the inner width instead, so that threads share an expert
    for (long e = 0; e < E; e++)
        for (long m = start[e]; m < start[e + 1]; m += BLOCK)
            for (long c = 0; c < columns; c++)
                parts.push_back({e, m, std::min(m + BLOCK, start[e + 1]), I * c / columns & ~15L,
                                 c + 1 == columns ? I : I * (c + 1) / columns & ~15L});
    std::vector<S> hidden(M * K * I);
    const long* at = place.data();
    S* h = hidden.data();
#pragma omp parallel if (M * K * D * I > 30000)
    {
        std::vector<float> gate(BLOCK * I);
        float* g = gate.data();
#pragma omp for schedule(dynamic)
        for (size_t p = 0; p < parts.size(); p++) {
            auto [e, m0, m1, n0, n1] = parts[p];
            auto row = [=](long m) { return x + at[m] / K * D; };
            product(row, w1 + e * I * D, m0, m1, n0, n1, D, [=](long m, long n, const float* s, long count) {
                for (long i = 0; i < count; i++) g[(m - m0) * I + n + i] = s[i];
            });
            product(row, w3 + e * I * D, m0, m1, n0, n1, D, [=](long m, long n, const float* s, long count) {
                for (long i = 0; i < count; i++) store(h, m * I + n + i, s[i]);
            });
            for (long m = m0; m < m1; m++)
                for (long n = n0; n < n1; n += 16) {
                    long count = std::min(n1 - n, 16L);
                    float a[16] = {}, b[16];
                    for (long i = 0; i < count; i++) a[i] = std::min(g[(m - m0) * I + n + i], limit);
                    vec v = load16(a), s = v / (1.0f + exp16(-(v > 0 ? v : -v)));  // silu: v sigmoid(v), by |v|
                    s = v > 0 ? s : s * exp16(v < 0 ? v : -v);
                    store16(b, s);
                    for (long i = 0; i < count; i++) {
                        float up = load(h, m * I + n + i);
                        up = up > limit ? limit : up < -limit ? -limit : up;
                        store(h, m * I + n + i, b[i] * up * weight[at[m]]);
                    }
                }
        }
        // Threads own columns of the result, so that no two ever add to one number.
        const long wide = std::max<long>(1, D / 64);
#pragma omp for schedule(dynamic)
        for (long c = 0; c < wide; c++) {
            long n0 = D * c / wide & ~15L, n1 = c + 1 == wide ? D : D * (c + 1) / wide & ~15L;
            for (long e = 0; e < E; e++)
                product([=](long m) { return h + m * I; }, w2 + e * D * I, start[e], start[e + 1], n0, n1, I,
                        [=](long m, long n, const float* s, long count) {
                            for (long i = 0; i < count; i++) out[at[m] / K * D + n + i] += s[i];
                        });
        }
    }
}

}  // namespace

#define LINEAR(S, T, suffix)                                                                                    \
    extern "C" void linear_##suffix(const S* x, const S* w, T* y, long M, long N, long K, long G) { linear(x, w, y, M, N, K, G); }
LINEAR(float, float, f32)
LINEAR(bf16, bf16, bf16)
LINEAR(bf16, float, wide_bf16)
#define EXPERTS(S, suffix)                                                                                                           \
    extern "C" void experts_##suffix(const S* x, const float* weight, const long long* owner, const S* w1, const S* w2, const S* w3, \
                                     float* out, long M, long K, long E, long D, long I, float limit) {                             \
        experts(x, weight, owner, w1, w2, w3, out, M, K, E, D, I, limit);                                                            \
    }
EXPERTS(float, f32)
EXPERTS(bf16, bf16)
