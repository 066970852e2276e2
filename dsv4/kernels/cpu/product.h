// Products of rows with the rows of a weight, in one order of addition whatever the number of rows.
#pragma once
#include <type_traits>
#include <vector>

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

#ifdef LANES_AVX2
// R groups of x and C of the weight, 4 rows each, stretch by stretch, so that those stretches stay in the first-level cache.
constexpr long SIDE = 2;  // at most
template <class W, class S>
inline void groups(const S* a, const S* b, long size, long, long R, long C, vec (*out)[SIDE]) {
    vec sum[SIDE][SIDE][16] = {};
    const long stretch = 4 * 24 * Chunk<S>::step;
    for (long from = 0; from < size; from += stretch)
        for (long r = 0; r < R; r++)
            for (long c = 0; c < C; c++) add4x4(a + r * size + from, b + c * size + from, std::min(stretch, size - from), sum[r][c]);
    for (long r = 0; r < R; r++)
        for (long c = 0; c < C; c++) out[r][c] = lane_sums(sum[r][c]);
}
#else
constexpr long SIDE = 1;
template <class W, class S>
inline void groups(const S* a, const S* b, long, long K, long, long, vec (*out)[SIDE]) { out[0][0] = W::dots4x4(a, b, K); }
#endif

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
    const long K = w.K, wide = 4 * chunks<S>(K) * Chunk<S>::step, size = W::room(K);
    auto seen = [&](long m, long place) {  // a row of x in the weight's order
        if constexpr (W::ordered) {
            S* out = scratch<S>(2, wide) + place * K;
            W::order(row(m), out, K);
            return (const S*)out;
        } else {
            return row(m);
        }
    };
    for (long mb = m0; mb < m1; mb += BLOCK) {
        long top = std::min(mb + BLOCK, m1);
        const S* rows[4];
        if (top - mb < 4) {
            for (long m = mb; m < top; m++) rows[m - mb] = seen(m, m - mb);
            for (long n = n0; n < n1; n += 16)
                for (long m = mb; m < top; m++) {
                    float s[16];
                    store16(s, w.dots(rows[m - mb], n, n1));
                    emit(m, n, s, std::min(n1 - n, 16L));
                }
            continue;
        }
        // A panel of the weight stays in the first-level cache, the block of x in the second.
        const long panel = std::max<long>(SIDE, PANEL / (size * sizeof(S)) / SIDE * SIDE);
        S *a = scratch<S>(0, wide * (BLOCK / 4)), *b = scratch<S>(1, size * panel);
        for (long m = mb; m < top; m += 4) {
            for (int r = 0; r < 4; r++) rows[r] = seen(std::min(m + r, top - 1), r);
            pack_rows<4>(rows, a + (m - mb) / 4 * wide, K);
        }
        for (long np = n0; np < n1; np += 4 * panel) {
            const long end = std::min(np + 4 * panel, n1);
            for (long n = np; n < end; n += 4) w.group(n, n1, b + (n - np) / 4 * size);
            for (long m = mb; m < top; m += 4 * SIDE)
                for (long n = np; n < end; n += 4 * SIDE) {
                    const long R = std::min((top - m + 3) / 4, SIDE), C = std::min((end - n + 3) / 4, SIDE);
                    vec sums[SIDE][SIDE];
                    groups<W>(a + (m - mb) / 4 * wide, b + (n - np) / 4 * size, size, K, R, C, sums);
                    for (long g = 0; g < 4 * R && m + g < top; g++)
                        for (long c = 0; c < C; c++) {
                            float s[16];
                            store16(s, sums[g / 4][c]);
                            emit(m + g, n + 4 * c, s + 4 * (g & 3), std::min(n1 - n - 4 * c, 4L));
                        }
                }
        }
    }
}

}  // namespace
