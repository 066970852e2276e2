// AMX: products of bf16 in tile registers, 16 x 16 sums of 32 products an instruction. Sixteen rows of a weight lie in tile rows
// as they are; sixteen rows of x are turned so that a tile row holds one pair of their channels. Every sum goes through the
// channels in rising order, whatever stands beside it, so here too a result does not depend on the batch or the thread.
//
// DSV4_TILES_EMULATED spells the five instructions in plain C++ after their definition, for processors without them.
#pragma once
#include "weights.h"

#if !defined(BF16)
// float has no tiles
#elif defined(__AMX_BF16__) && defined(__AMX_TILE__)
#include <immintrin.h>
#define TILES 1
#define TILE_ZERO(t) _tile_zero(t)
#define TILE_LOAD(t, from) _tile_loadd(t, from, 64)
#define TILE_MAD(c, a, b) _tile_dpbf16ps(c, a, b)
#define TILE_STORE(t, to) _tile_stored(t, to, 64)
#elif defined(DSV4_TILES_EMULATED)
#define TILES 1
namespace emulated {
static thread_local float tile[8][16][16];
inline float half(uint32_t pair, int which) {  // denormals count as zero
    uint32_t u = which ? pair & 0xffff0000u : pair << 16;
    float f;
    if ((u & 0x7f800000u) == 0) u &= 0x80000000u;
    memcpy(&f, &u, 4);
    return f;
}
inline void mad(float (*c)[16], const float (*a)[16], const float (*b)[16]) {
    for (int m = 0; m < 16; m++)
        for (int n = 0; n < 16; n++) {
            float sum[2] = {0, 0};
            for (int k = 0; k < 16; k++)
                for (int which = 0; which < 2; which++) {
                    uint32_t x, y;
                    memcpy(&x, &a[m][k], 4), memcpy(&y, &b[k][n], 4);
                    sum[which] += half(x, which) * half(y, which);
                }
            c[m][n] += sum[0] + sum[1];
        }
}
}  // namespace emulated
#define TILE_ZERO(t) memset(emulated::tile[t], 0, 1024)
#define TILE_LOAD(t, from) memcpy(emulated::tile[t], from, 1024)
#define TILE_MAD(c, a, b) emulated::mad(emulated::tile[c], emulated::tile[a], emulated::tile[b])
#define TILE_STORE(t, to) memcpy(to, emulated::tile[t], 1024)
#endif

#ifdef TILES
// Eight tiles of 16 rows of 64 bytes while it lives. Whoever else multiplies in this thread finds its own shapes again.
class TileShapes {
#ifdef __AMX_TILE__
    struct alignas(64) Shapes {
        uint8_t palette, start, unused[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } before{};

   public:
    TileShapes() {
        _tile_storeconfig(&before);
        Shapes ours{};
        ours.palette = 1;
        for (int t = 0; t < 8; t++) ours.bytes[t] = 64, ours.rows[t] = 16;
        _tile_loadconfig(&ours);
    }
    ~TileShapes() {
        if (before.palette) _tile_loadconfig(&before);
        else _tile_release();
    }
#else
   public:
    TileShapes() {}
    ~TileShapes() {}
#endif
};

// 16 rows, zeros behind their ends, as pairs of channels: [chunks][16 pairs][16 rows].
inline void pack_pairs(const bf16* const* rows, uint32_t* out, long K) {
    const uint32_t* words[16];
    for (int r = 0; r < 16; r++) words[r] = (const uint32_t*)rows[r];
    const long whole = K & ~31L;
    turn(words, whole / 2, out);
    if (whole == K) return;
    uint32_t rest[16][16] = {};
    for (int r = 0; r < 16; r++) memcpy(rest[r], rows[r] + whole, (K - whole) * 2), words[r] = rest[r];
    turn(words, 16, out + whole * 8);
}

// c[n][m] = w_n . x_m for 32 rows of a weight (a, b: 16 each, packed) and 32 rows of x (p, q: 16 each, as pairs).
inline void tiles2x2(const bf16* a, const bf16* b, const uint32_t* p, const uint32_t* q, long chunks, float (*c)[16][16]) {
    TILE_ZERO(0); TILE_ZERO(1); TILE_ZERO(2); TILE_ZERO(3);
    for (long k = 0; k < chunks; k++) {
        TILE_LOAD(4, a + 512 * k); TILE_LOAD(5, b + 512 * k);
        TILE_LOAD(6, p + 256 * k); TILE_LOAD(7, q + 256 * k);
        TILE_MAD(0, 4, 6); TILE_MAD(1, 4, 7); TILE_MAD(2, 5, 6); TILE_MAD(3, 5, 7);
    }
    TILE_STORE(0, c[0]); TILE_STORE(1, c[1]); TILE_STORE(2, c[2]); TILE_STORE(3, c[3]);
}
inline void tiles2x1(const bf16* a, const bf16* b, const uint32_t* p, long chunks, float (*c)[16][16]) {
    TILE_ZERO(0); TILE_ZERO(2);
    for (long k = 0; k < chunks; k++) {
        TILE_LOAD(4, a + 512 * k); TILE_LOAD(5, b + 512 * k);
        TILE_LOAD(6, p + 256 * k);
        TILE_MAD(0, 4, 6); TILE_MAD(2, 5, 6);
    }
    TILE_STORE(0, c[0]); TILE_STORE(2, c[2]);
}
#endif
