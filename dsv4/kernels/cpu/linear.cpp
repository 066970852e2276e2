// Products of rows with the rows of a weight: linear layers and experts, any row count, plain or packed weights.
#include <type_traits>
#include <vector>

#include "rounding.h"
#include "tiles.h"

namespace {

constexpr long PANEL = 20 << 10;  // bytes
constexpr long BLOCK = 64;        // rows of x that stay in the second-level cache while the weight passes by

// Scratch of a thread: 64-byte aligned, grown and never given back.
template <class S>
S* scratch(int which, long count) {
    static thread_local std::vector<float> hold[4];
    size_t need = count * sizeof(S) / 4 + 32;
    if (hold[which].size() < need) hold[which].resize(need);
    return (S*)((uintptr_t(hold[which].data()) + 63) & ~uintptr_t(63));
}

#ifdef TILES
template <class W, class Row, class Emit>
inline void tile_product(Row row, const W& w, long m0, long m1, long n0, long n1, Emit emit) {
    const long K = w.K, depth = chunks<bf16>(K), groups = BLOCK / 16;
    uint32_t* x = scratch<uint32_t>(0, 256 * depth * groups);
    bf16* rows32 = scratch<bf16>(1, 1024 * depth);
    TileShapes shapes;
    for (long mb = m0; mb < m1; mb += BLOCK) {
        const long top = std::min(mb + BLOCK, m1), used = (top - mb + 15) / 16;
        for (long g = 0; g < used; g++) {
            const bf16* rows[16];
            for (int r = 0; r < 16; r++) rows[r] = row(std::min(mb + 16 * g + r, top - 1));
            pack_pairs(rows, x + 256 * depth * g, K);
        }
        for (long n = n0; n < n1; n += 32) {
            for (long h = 0; h < 2; h++) w.template pack<16>(std::min(n + 16 * h, n1 - 1), n1, rows32 + 512 * depth * h);
            for (long g = 0; g < used; g += 2) {
                float c[4][16][16];
                const uint32_t* p = x + 256 * depth * g;
                if (g + 1 < used) tiles2x2(rows32, rows32 + 512 * depth, p, p + 256 * depth, depth, c);
                else tiles2x1(rows32, rows32 + 512 * depth, p, depth, c);
                for (long m = mb + 16 * g; m < std::min(mb + 16 * g + 32, top); m++)
                    for (long h = 0; h < 2 && n + 16 * h < n1; h++) {
                        float s[16];
                        const long at = m - mb - 16 * g;
                        for (int i = 0; i < 16; i++) s[i] = c[2 * h + at / 16][i][at % 16];
                        emit(m, n + 16 * h, s, std::min(n1 - n - 16 * h, 16L));
                    }
            }
        }
    }
}
#endif

// x[m] . w[n] for m in [m0, m1), n in [n0, n1); `row(m)` says where x[m] lies, `emit(m, n, sums, count)` takes `count` results
// of one row from column n on.
template <class W, class Row, class Emit>
inline void product(Row row, const W& w, long m0, long m1, long n0, long n1, Emit emit) {
    typedef typename W::X S;
#ifdef TILES
    if constexpr (std::is_same<S, bf16>::value) return tile_product(row, w, m0, m1, n0, n1, emit);
#endif
    const long K = w.K, size = 4 * chunks<S>(K) * Chunk<S>::step;
    for (long mb = m0; mb < m1; mb += BLOCK) {
        long top = std::min(mb + BLOCK, m1);
        if (top - mb < 4) {
            for (long n = n0; n < n1; n += 16)
                for (long m = mb; m < top; m++) {
                    float s[16];
                    store16(s, w.dots(row(m), n, n1));
                    emit(m, n, s, std::min(n1 - n, 16L));
                }
            continue;
        }
        // A panel of the weight stays in the first-level cache, the block of x in the second.
        const long panel = std::max<long>(1, PANEL / (size * sizeof(S)));
        S *a = scratch<S>(0, size * BLOCK / 4), *b = scratch<S>(1, size * panel);
        for (long m = mb; m < top; m += 4) {
            const S* rows[4];
            for (int r = 0; r < 4; r++) rows[r] = row(std::min(m + r, top - 1));
            pack_rows<4>(rows, a + (m - mb) / 4 * size, K);
        }
        for (long np = n0; np < n1; np += 4 * panel) {
            long end = std::min(np + 4 * panel, n1);
            for (long n = np; n < end; n += 4) w.template pack<4>(n, n1, b + (n - np) / 4 * size);
            for (long m = mb; m < top; m += 4)
                for (long n = np; n < end; n += 4) {
                    float s[16];
                    store16(s, dots4x4(a + (m - mb) / 4 * size, b + (n - np) / 4 * size, size));
                    for (int r = 0; r < 4 && m + r < top; r++) emit(m + r, n, s + 4 * r, std::min(n1 - n, 4L));
                }
        }
    }
}

// x [M, G, K], G weights [N, K] one behind the other -> y [M, G, N] (G = 1: a plain linear layer).
template <class W, class T>
void linear(const typename W::X* x, const void* elements, const void* scale, T* y, long M, long N, long K, long G) {
    long work = M * N * K * G, columns = N >= 64 && M < 4 * BLOCK ? std::max<long>(1, N / 64) : 1, rows = (M + BLOCK - 1) / BLOCK;
#pragma omp parallel for collapse(3) schedule(dynamic) if (work > 2000000)
    for (long g = 0; g < G; g++)
        for (long c = 0; c < columns; c++)
            for (long m = 0; m < rows; m++) {
                long n0 = N * c / columns & ~15L, n1 = c + 1 == columns ? N : N * (c + 1) / columns & ~15L;
                product([=](long r) { return x + (r * G + g) * K; }, W(elements, scale, K), m * BLOCK, std::min((m + 1) * BLOCK, M),
                        g * N + n0, g * N + n1, [=](long r, long n, const float* s, long count) {
                            for (long i = 0; i < count; i++) store(y, r * G * N + n + i, s[i]);
                        });
            }
}

// out [M, D] += sum over a token's experts of W2 (weight * swiglu(W1 x, W3 x)); owner, weight [M, K]. at[6 e ...]: where expert e has
// the elements of w1, w2, w3 and their scales, or null: then the expert is not here, and its pairs wait for another call. Each token adds its experts in ascending order of their number, in float32.
template <class W>
void experts(const typename W::X* x, const float* weight, const int64_t* owner, const void* const* at, float* out, long M, long K, long E,
             long D, long I, float limit) {
    typedef typename W::X S;
    constexpr bool packed = !std::is_same<W, Plain<S>>::value;
    std::vector<long> start(E + 1), place(M * K);
    for (long i = 0; i < M * K; i++) start[owner[i] + 1]++;
    for (long e = 0; e < E; e++) start[e + 1] += start[e];
    std::vector<long> next(start.begin(), start.end() - 1);
    for (long i = 0; i < M * K; i++) place[next[owner[i]]++] = i;  // pairs (token, choice) sorted by expert
    struct Part { long e, m0, m1, n0, n1; };
    std::vector<Part> parts;
    const long columns = M * K < 4 * BLOCK ? std::max<long>(1, I / 64) : 1;  // few rows: threads share an expert
    for (long e = 0; e < E; e++)
        for (long m = start[e]; m < start[e + 1] && at[6 * e]; m += BLOCK)
            for (long c = 0; c < columns; c++)
                parts.push_back({e, m, std::min(m + BLOCK, start[e + 1]), I * c / columns & ~15L,
                                 c + 1 == columns ? I : I * (c + 1) / columns & ~15L});
    std::vector<S> hidden(M * K * I), rounded(packed ? M * K * I : 0);
    const long* pair = place.data();
    S *h = hidden.data(), *second = packed ? rounded.data() : h;
#pragma omp parallel if (M * K * D * I > 700000)
    {
        std::vector<S> gate(BLOCK * I);
        S* g = gate.data();
#pragma omp for schedule(dynamic)
        for (size_t p = 0; p < parts.size(); p++) {
            auto [e, m0, m1, n0, n1] = parts[p];
            auto row = [=](long m) { return x + pair[m] / K * D; };
            product(row, W(at[6 * e], at[6 * e + 3], D), m0, m1, n0, n1, [=](long m, long n, const float* s, long count) {
                for (long i = 0; i < count; i++) store(g, (m - m0) * I + n + i, s[i]);
            });
            product(row, W(at[6 * e + 2], at[6 * e + 5], D), m0, m1, n0, n1, [=](long m, long n, const float* s, long count) {
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
        }
        if constexpr (packed) {
#pragma omp for schedule(static)
            for (long m = 0; m < M * K; m++) round_row<128>(h + m * I, second + m * I, I);
        }
        // Threads own columns of the result, so that no two ever add to one number.
        const long wide = std::max<long>(1, D / 64);
#pragma omp for schedule(dynamic)
        for (long c = 0; c < wide; c++) {
            long n0 = D * c / wide & ~15L, n1 = c + 1 == wide ? D : D * (c + 1) / wide & ~15L;
            for (long e = 0; e < E; e++) {
                if (start[e] == start[e + 1] || !at[6 * e]) continue;
                product([=](long m) { return second + m * I; }, W(at[6 * e + 1], at[6 * e + 4], I), start[e], start[e + 1], n0, n1,
                        [=](long m, long n, const float* s, long count) {
                            for (long i = 0; i < count; i++) out[pair[m] / K * D + n + i] += s[i];
                        });
            }
        }
    }
}

}  // namespace

#define LINEAR(W, T, suffix)                                                                                                              \
    extern "C" void linear_##suffix(const W::X* x, const void* w, const void* scale, T* y, long M, long N, long K, long G) {              \
        linear<W, T>(x, w, scale, y, M, N, K, G);                                                             \
    }
#define EXPERTS(W, suffix)                                                                                                                \
    extern "C" void experts_##suffix(const W::X* x, const float* weight, const int64_t* owner, const void* const* at, float* out, long M, \
                                     long K, long E, long D, long I, float limit) {                                                      \
        experts<W>(x, weight, owner, at, out, M, K, E, D, I, limit);                                                                      \
    }
LINEAR(Plain<float>, float, f32)
LINEAR(Plain<bf16>, bf16, bf16)
LINEAR(Plain<bf16>, float, wide_bf16)
LINEAR(Fp4, bf16, fp4_bf16)
LINEAR(Fp8, bf16, fp8_bf16)
LINEAR(Fp4, float, fp4_f32)
LINEAR(Fp8, float, fp8_f32)
EXPERTS(Plain<float>, f32)
EXPERTS(Plain<bf16>, bf16)
EXPERTS(Fp4, fp4_bf16)
EXPERTS(Fp8, fp8_bf16)

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
