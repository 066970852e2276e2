// Inference: the indexer's choice and attention over exactly what a query may read, without any array of size tokens x entries.
//
// Scores go 16 keys to a vector: keys are turned into blocks [dim / step][16 keys][step] (step = 1 float or 2 bf16), a query's
// elements are broadcast. A score's order of addition is that of its dimensions, whatever block it falls into.
#include "lanes.h"
#include "share.h"

namespace {

constexpr int HEADS = 8;  // heads that share one pass over the keys
constexpr long words(long dim) { return dim * long(sizeof(S)) / 4; }  // 32-bit words of a row (dim even)

// dot[2 h], dot[2 h + 1] = the scores of HEADS queries (rows of `stride` elements, w words used) with two blocks of 16 keys.
APART void block_dots(const S* q, long stride, const uint32_t* keys, const uint32_t* more, long w, vec* dot) {
    constexpr long step = 4 / sizeof(S);
#ifdef LANES_AVX2
    for (int part = 0; part < 4; part++) {  // four heads with one of the blocks
        const S *from = q + (part & 2) * 2 * stride, *at = (const S*)(part & 1 ? more : keys);
        vec8 s[8] = {};
        for (long k = 0; k < w; k++) {
            const Half x = Half::take(at + k * 16 * step), y = Half::take(at + k * 16 * step + 8 * step);
#pragma GCC unroll 4
            for (int h = 0; h < 4; h++) {
                const Half one = Half::pair(from + h * stride + k * step);
                s[2 * h] = mad(s[2 * h], one, x), s[2 * h + 1] = mad(s[2 * h + 1], one, y);
            }
        }
        for (int i = 0; i < 8; i++) put_half(dot[(part & 2) * 4 + i / 2 * 2 + (part & 1)], i & 1, s[i]);
    }
    return;
#endif
    vec sum[2 * HEADS] = {};
    for (long k = 0; k < w; k++) {
        Chunk key[2];
        memcpy(&key[0], keys + k * 16, 64);
        memcpy(&key[1], more + k * 16, 64);
        KEEP(key[0].v);
        KEEP(key[1].v);
#pragma GCC unroll 8
        for (int h = 0; h < HEADS; h++) {
            Chunk one = Chunk::pair(q + h * stride + k * step);
            KEEP(one.v);
            sum[2 * h] = Chunk::mad(sum[2 * h], one, key[0]);
            sum[2 * h + 1] = Chunk::mad(sum[2 * h + 1], one, key[1]);
        }
    }
    for (int i = 0; i < 2 * HEADS; i++) dot[i] = sum[i];
}

// A bit pattern whose unsigned order is the order of the floats.
inline bits order_of(vec v) {
    bits u = (bits)v;
    return u ^ ((bits)((ints)u >> 31) | 0x80000000u);
}

// out[0..k): the positions of the k largest of scores[0..n), ascending; among equal scores the lowest position. n > k.
void top(const float* scores, long n, long k, int32_t* out, uint32_t* order) {
    for (long i = 0; i < n; i += 16) {
        bits u{};
        if (i + 16 <= n) u = order_of(load16(scores + i));
        else
            for (long j = i; j < n; j++) {
                uint32_t x;
                memcpy(&x, scores + j, 4);
                u[j - i] = x ^ (uint32_t(int32_t(x) >> 31) | 0x80000000u);
            }
        memcpy(order + i, &u, 64);
    }
    const long blocks = (n + 15) / 16;  // the padding is 0, below every float
    auto count = [&](uint32_t least) {
        ints c{};
        for (long i = 0; i < blocks; i++) {
            bits u;
            memcpy(&u, order + i * 16, 64);
            c -= u >= least;
        }
        long total = 0;
        for (int i = 0; i < 16; i++) total += c[i];
        return total;
    };
    uint32_t threshold = 0;  // the k-th largest, found bit by bit
    for (uint32_t bit = 1u << 31; bit; bit >>= 1)
        if (count(threshold | bit) >= k) threshold |= bit;
    long tied = threshold == 0xffffffffu ? k : k - count(threshold + 1), found = 0;
    for (long i = 0; found < k; i++) {
        bool take = order[i] > threshold || (order[i] == threshold && tied-- > 0);
        out[found] = int32_t(i);
        found += take;
    }
}

// Scores of one query for 32 turned keys: out[lane] = sum_h weight[h] relu(q[h] . key).
APART void index_scores(const S* q, const float* weight, const uint32_t* turned, long H, long dim, float* out) {
    const long w = words(dim);
    vec total[2] = {};
    for (long h = 0; h < H; h += HEADS) {
        vec dot[2 * HEADS];
        block_dots(q + h * dim, dim, turned, turned + w * 16, w, dot);
        for (int i = 0; i < HEADS; i++)
            for (int j = 0; j < 2; j++) total[j] += splat(weight[h + i]) * (dot[2 * i + j] > 0 ? dot[2 * i + j] : vec{});
    }
    store16(out, total[0]);
    store16(out + 16, total[1]);
}

}  // namespace

// chosen [B, T, K] int32, count [B, T] int32: the entries low <= e < high each query reads, its top K by index score.
// q [B, T, H, dim], weight [B, T, H], keys: row b begins at keys + b * key_stride; H a multiple of HEADS. turned: room for E keys in
// blocks of 32, scores for 8 queries.
extern "C" void choose(const S* q, const float* weight, const S* keys, const int64_t* low, const int64_t* high, int32_t* chosen,
                       int32_t* count, long B, long T, long E, long key_stride, long H, long dim, long K, uint32_t* turned,
                       float* scores) {
    const long w = words(dim), blocks = (E + 31) / 32, wide = blocks * 32;
    const bool worth = E * H * dim * B * T > 2000000, few = B * T < 8;  // few queries: threads share the keys
    for (long b = 0; b < B; b++) {
        const S *first = keys + b * key_stride, *mine = q + b * T * H * dim;
        const float* heads = weight + b * T * H;
        auto turn_block = [=](long i, uint32_t* out) {
            const uint32_t* rows[32];
            for (long j = 0; j < 32; j++) rows[j] = (const uint32_t*)(first + std::min(32 * i + j, E - 1) * dim);
            turn(rows, w, out);
            turn(rows + 16, w, out + 16 * w);
        };
        share((blocks + 7) / 8, worth, [&](long piece) {
            for (long i = 8 * piece; i < std::min(8 * piece + 8, blocks); i++) {
                uint32_t* block = few ? scratch<uint32_t>(0, 32 * w) : turned + i * 32 * w;
                turn_block(i, block);
                for (long t = 0; few && t < T; t++) index_scores(mine + t * H * dim, heads + t * H, block, H, dim, scores + t * wide + 32 * i);
            }
        });
#pragma omp parallel for schedule(dynamic, 4) if (worth && !few)
        for (long t = 0; t < T; t++) {
            const long at = b * T + t, from = low[at], n = high[at] - from;
            int32_t* out = chosen + at * K;
            count[at] = int32_t(std::min(n, K));
            if (n <= K) {
                for (long i = 0; i < n; i++) out[i] = int32_t(from + i);
                continue;
            }
            float* s = few ? scores + t * wide : scratch<float>(1, wide);
            for (long i = from / 32; !few && i < (high[at] + 31) / 32; i++)
                index_scores(mine + t * H * dim, heads + t * H, turned + i * 32 * w, H, dim, s + 32 * i);
            top(s + from, n, K, out, scratch<uint32_t>(2, wide));
            for (long i = 0; i < K; i++) out[i] += int32_t(from);
        }
    }
}

namespace {

// One query: its heads q [groups * HEADS, d] against n rows. z and p hold a head's scores and shares in rows of `wide`, which
// covers n in blocks of 32; rows behind n repeat the last.
struct Reader {
    const S* q;
    const S* const* rows;
    const float* sink;
    float* z;
    S* p;
    S* out;
    long n, wide, d, H;
    float scale;
    static constexpr long step = 4 / sizeof(S), columns = 16 * step;

    // Scores of 32 rows with every head.
    void scores(long block) const {
        const long w = words(d);
        uint32_t* turned = scratch<uint32_t>(0, 32 * w);
        for (int i = 0; i < 2; i++) turn((const uint32_t* const*)(rows + 32 * block + 16 * i), w, turned + 16 * i * w);
        for (long h = 0; h < H; h += HEADS) {
            vec dot[2 * HEADS];
            block_dots(q + h * d, d, turned, turned + 16 * w, w, dot);
            for (int i = 0; i < 2 * HEADS; i++) store16(z + (h + i / 2) * wide + 32 * block + 16 * (i & 1), dot[i] * scale);
        }
    }
    // The softmax of one head, with its sink.
    void weigh(long h) const {
        float *row = z + h * wide, peak = sink[h];
        for (long i = n; i < wide; i++) row[i] = -INFINITY;
        vec top = splat(peak);
        for (long i = 0; i < wide; i += 16) {
            vec v = load16(row + i);
            top = v > top ? v : top;
        }
        for (int i = 0; i < 16; i++) peak = std::max(peak, top[i]);
        vec total{};
        for (long i = 0; i < wide; i += 16) {
            vec v = load16(row + i), e = exp16(v - peak);
            e = v > splat(-1e30f) ? e : vec{};
            store16(row + i, e);
            total += e;
        }
        float sum = std::exp(sink[h] - peak);
        for (int i = 0; i < 16; i++) sum += total[i];
        const float inverse = 1 / sum;
        for (long i = 0; i < wide; i++) store(p + h * wide, i, row[i] * inverse);
    }
    // Channels c .. c + columns - 1 of every head. Two rows at a time for bf16, whose products come in pairs.
    void values(long c) const {
        Chunk* v = scratch<Chunk>(1, wide);
        for (long i = 0; i < n; i += step) {
            if (step == 1) v[i] = Chunk::take(rows[i] + c);
            else {
                typedef uint16_t half __attribute__((vector_size(64)));
                half x, y;
                memcpy(&x, rows[i] + c, 64);
                memcpy(&y, rows[i + 1] + c, 64);  // behind the last row it counts nothing
                half lo = __builtin_shuffle(x, y, half{0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47});
                half hi = __builtin_shuffle(x, y, half{16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63});
                memcpy((void*)&v[i], &lo, 64);
                memcpy((void*)&v[i + 1], &hi, 64);
            }
        }
        for (long h = 0; h < H; h += HEADS) {
            vec sum[HEADS][step] = {};
#ifdef LANES_AVX2
            for (int part = 0; part < 2 * step; part++) {  // four heads with one of the chunks
                const int from = part / step * 4, s = part % step;
                vec8 t[8] = {};
                for (long i = 0; i < n; i += step) {
                    const S* at = (const S*)&v[i + s];
                    const Half x = Half::take(at), y = Half::take(at + 8 * step);
#pragma GCC unroll 4
                    for (int j = 0; j < 4; j++) {
                        const Half share = Half::pair(p + (h + from + j) * wide + i);
                        t[2 * j] = mad(t[2 * j], x, share), t[2 * j + 1] = mad(t[2 * j + 1], y, share);
                    }
                }
                for (int i = 0; i < 8; i++) put_half(sum[from + i / 2][s], i & 1, t[i]);
            }
#else
            for (long i = 0; i < n; i += step)
#pragma GCC unroll 8
                for (int j = 0; j < HEADS; j++) {
                    Chunk share = Chunk::pair(p + (h + j) * wide + i);
#pragma GCC unroll 2
                    for (int s = 0; s < step; s++) sum[j][s] = Chunk::mad(sum[j][s], v[i + s], share);
                }
#endif
            for (int j = 0; j < HEADS; j++)
                for (int s = 0; s < step; s++) {
                    float lanes[16];
                    store16(lanes, sum[j][s]);
                    for (int i = 0; i < 16; i++) store(out + (h + j) * d + c, s * 16 + i, lanes[i]);
                }
        }
    }
    void rest(long c) const {  // channels that fill no columns
        for (; c < d; c++)
            for (long h = 0; h < H; h++) {
                float sum = 0;
                for (long i = 0; i < n; i++) sum += load(p, h * wide + i) * load(rows[i], c);
                store(out, h * d + c, sum);
            }
    }
};

}  // namespace

// out [B, T, H, d], H a multiple of HEADS. Near rows near_from <= r < near_to of near [B, N, d]; far rows: chosen [B, T, K] with
// count, or (K = 0) all of far_low <= e < far_high. far: row b begins at far + b * far_stride.
extern "C" void attend(const S* q, const S* near, const int32_t* near_from, const int32_t* near_to, const S* far, const int32_t* chosen,
                       const int32_t* count, const int64_t* far_low, const int64_t* far_high, const float* sink, S* out, long B, long T,
                       long H, long d, long N, long far_stride, long K, float scale) {
    auto read = [=](long at, bool together) APART {  // one query, by this thread or by all
        const long b = at / T, near_n = near_to[at] - near_from[at];
        const long n = near_n + (far ? (K ? count[at] : far_high[at] - far_low[at]) : 0), wide = (n + 31) / 32 * 32;
        const S** rows = scratch<const S*>(2, wide);
        for (long i = 0; i < near_n; i++) rows[i] = near + (b * N + near_from[at] + i) * d;
        for (long i = near_n; i < n; i++) rows[i] = far + b * far_stride + (K ? chosen[at * K + i - near_n] : far_low[at] + i - near_n) * d;
        for (long i = n; i < wide; i++) rows[i] = rows[n - 1];
        const Reader r{q + at * H * d, rows, sink, scratch<float>(3, H * wide), scratch<S>(4, H * wide), out + at * H * d, n, wide, d, H, scale};
        share(wide / 32, together, [&](long i) { r.scores(i); });
        share(H, together, [&](long h) { r.weigh(h); });
        share(d / r.columns, together, [&](long i) { r.values(i * r.columns); });
        r.rest(d / r.columns * r.columns);
    };
    if (B * T < 16)  // few queries: threads share each
        for (long at = 0; at < B * T; at++) read(at, (near_to[at] - near_from[at]) * H * d > 100000);
    else
#pragma omp parallel for schedule(dynamic, 8)
        for (long at = 0; at < B * T; at++) read(at, false);
}
