// The one loop nest of every product: rows of x with the rows of a weight, packed or plain.
#include "product.h"

#include "tiles.h"

namespace {

constexpr long PANEL = 20 << 10;  // bytes

#ifdef LANES_AVX2
// R groups of x and C of the weight, 4 rows each, stretch by stretch, so that those stretches stay in the first-level cache.
constexpr long SIDE = 2;  // at most
template <class W>
inline void groups(const S* a, const S* b, long size, long, long R, long C, vec (*out)[SIDE]) {
    vec sum[SIDE][SIDE][16] = {};
    const long stretch = 4 * 24 * Chunk::step;
    for (long from = 0; from < size; from += stretch)
        for (long r = 0; r < R; r++)
            for (long c = 0; c < C; c++) add4x4(a + r * size + from, b + c * size + from, std::min(stretch, size - from), sum[r][c]);
    for (long r = 0; r < R; r++)
        for (long c = 0; c < C; c++) out[r][c] = lane_sums(sum[r][c]);
}
#else
constexpr long SIDE = 1;
template <class W>
inline void groups(const S* a, const S* b, long, long K, long, long, vec (*out)[SIDE]) { out[0][0] = W::dots4x4(a, b, K); }
#endif

#ifdef TILES
template <class W>
void tile_product(Row row, const W& w, long m0, long m1, long n0, long n1, Emit emit) {
    const long K = w.K, depth = chunks(K), groups = BLOCK / 16;
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

template <class W>
void product_with(Row row, const W& w, long m0, long m1, long n0, long n1, Emit emit) {
    const long K = w.K, wide = 4 * chunks(K) * Chunk::step, size = W::room(K);
    S* room = scratch<S>(2, wide);
    auto seen = [&](long m, long place) { return W::seen(row(m), room + place * K, K); };
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

#ifdef BF16
template <class W>
void expand_with(const W& w, bf16* out, long N) {
    const long K = w.K;
#pragma omp parallel for
    for (long n = 0; n < N; n += 4) {
        bf16* four = scratch<bf16>(0, 4 * K);
        w.template pack<4>(n, N, four);
        for (long k = 0; k < K; k += 32)
            for (long r = 0; r < 4 && n + r < N; r++) memcpy((void*)(out + (n + r) * K + k), four + 4 * k + 32 * r, 64);
    }
}
#endif

}  // namespace

void product(Row row, const Weight& w, long m0, long m1, long n0, long n1, Emit emit) {
    const void *e = w.elements, *s = w.scale;
#ifdef TILES
#define PRODUCT tile_product
#else
#define PRODUCT product_with
#endif
#ifdef BF16
    if (w.bits == 8) return PRODUCT(row, Fp8(e, s, w.K), m0, m1, n0, n1, emit);
    if (w.bits == 4) return PRODUCT(row, Fp4(e, s, w.K), m0, m1, n0, n1, emit);
#endif
    PRODUCT(row, Plain(e, s, w.K), m0, m1, n0, n1, emit);
}

#ifdef BF16
// The exact values of rows [0, N) of a packed weight, for torch's product when there are many rows of x.
extern "C" void expand(long bits, const void* elements, const void* scale, bf16* out, long N, long K) {
    if (bits == 8) expand_with(Fp8(elements, scale, K), out, N);
    else expand_with(Fp4(elements, scale, K), out, N);
}
#endif
