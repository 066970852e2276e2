// Inference: the indexer's choice and attention over exactly what a query may read, without any array of size tokens x entries.
//
// Scores go 16 keys to a vector: keys are turned into blocks [dim / step][16 keys][step] (step = 1 float or 2 bf16), a query's
// elements are broadcast. A score's order of addition is that of its dimensions, whatever block it falls into.
#include <vector>

#include "lanes.h"

namespace {

template <class S>
S* room(int which, long count) {
    static thread_local std::vector<float> hold[6];
    size_t need = count * sizeof(S) / 4 + 32;
    if (hold[which].size() < need) hold[which].resize(need);
    return (S*)((uintptr_t(hold[which].data()) + 63) & ~uintptr_t(63));
}

constexpr int HEADS = 8;  // heads that share one pass over the keys
template <class S> constexpr long words(long dim) { return dim * long(sizeof(S)) / 4; }  // 32-bit words of a row (dim even)

// dot[h] = the scores of HEADS queries (rows of `stride` elements, w words used) with a block of 16 keys.
template <class S>
inline void block_dots(const S* q, long stride, const uint32_t* keys, long w, vec* dot) {
    typedef Chunk<S> X;
    constexpr long step = 4 / sizeof(S);
    vec sum[HEADS] = {};
    for (long k = 0; k < w; k++) {
        X key;
        memcpy(&key, keys + k * 16, 64);
#pragma GCC unroll 8
        for (int h = 0; h < HEADS; h++) sum[h] = X::mad(sum[h], X::pair(q + h * stride + k * step), key);
    }
    for (int h = 0; h < HEADS; h++) dot[h] = sum[h];
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

// Scores of one query for key blocks [b0, b1): out[16 b + lane] = sum_h weight[h] relu(q[h] . key).
template <class S>
void index_scores(const S* q, const float* weight, const uint32_t* turned, long H, long dim, long b0, long b1, float* out) {
    const long w = words<S>(dim);
    for (long b = b0; b < b1; b++) {
        vec total{};
        for (long h = 0; h < H; h += HEADS) {
            vec dot[HEADS];
            block_dots(q + h * dim, dim, turned + b * w * 16, w, dot);
            for (int i = 0; i < HEADS; i++) total += splat(weight[h + i]) * (dot[i] > 0 ? dot[i] : vec{});
        }
        store16(out + 16 * b, total);
    }
}

// chosen [B, T, K] int32, count [B, T] int32: the entries low <= e < high each query reads, its top K by index score.
// q [B, T, H, dim], weight [B, T, H], keys: row b begins at keys + b * key_stride; H a multiple of HEADS.
template <class S>
void choose(const S* q, const float* weight, const S* keys, const int64_t* low, const int64_t* high, int32_t* chosen, int32_t* count, long B,
            long T, long E, long key_stride, long H, long dim, long K, uint32_t* turned, float* scores) {
    const long w = words<S>(dim), blocks = (E + 15) / 16, wide = blocks * 16;
    // Many queries: a thread takes whole queries. Few: threads share the entries of each.
    const bool shared = B * T < 8;
#pragma omp parallel if (E * H * dim * B * T > 2000000)
    {
        for (long b = 0; b < B; b++) {
            const S* first = keys + b * key_stride;
#pragma omp for schedule(static)
            for (long i = 0; i < blocks; i++) {
                const uint32_t* rows[16];
                for (long j = 0; j < 16; j++) rows[j] = (const uint32_t*)(first + std::min(16 * i + j, E - 1) * dim);
                turn(rows, w, turned + i * w * 16);
            }
            for (long t = 0; shared && t < T; t++) {
#pragma omp for schedule(static)
                for (long i = 0; i < blocks; i++)
                    index_scores(q + (b * T + t) * H * dim, weight + (b * T + t) * H, turned, H, dim, i, i + 1, scores + t * wide);
            }
#pragma omp for schedule(dynamic, 4)
            for (long t = 0; t < T; t++) {
                const long at = b * T + t, from = low[at], n = high[at] - from;
                int32_t* out = chosen + at * K;
                count[at] = int32_t(std::min(n, K));
                if (n <= K) {
                    for (long i = 0; i < n; i++) out[i] = int32_t(from + i);
                    continue;
                }
                float* mine = shared ? scores + t * wide : room<float>(0, wide);
                if (!shared) index_scores(q + at * H * dim, weight + at * H, turned, H, dim, from / 16, (high[at] + 15) / 16, mine);
                top(mine + from, n, K, out, room<uint32_t>(1, wide));
                for (long i = 0; i < K; i++) out[i] += int32_t(from);
            }
        }
    }
}

// One query's attention for HEADS heads over n rows: q [HEADS, d] (stride d), out likewise; sink [HEADS].
template <class S>
void attend_rows(const S* q, const S* const* rows, const uint32_t* turned, const long* offset, long blocks, long n, const float* sink,
                 float scale, S* out, long d, long heads) {
    const long w = words<S>(d);
    float* z = room<float>(2, HEADS * blocks * 16);
    for (long b = 0; b < blocks; b++) {
        vec dot[HEADS];
        block_dots(q, d, turned + offset[b], w, dot);
        for (int h = 0; h < HEADS; h++) store16(z + h * blocks * 16 + b * 16, dot[h] * scale);
    }
    float inverse[HEADS];
    for (int h = 0; h < HEADS; h++) {
        float *row = z + h * blocks * 16, peak = h < heads ? sink[h] : 0;
        for (long i = n; i < blocks * 16; i++) row[i] = -INFINITY;
        vec top16 = splat(peak);
        for (long i = 0; i < blocks; i++) {
            vec v = load16(row + 16 * i);
            top16 = v > top16 ? v : top16;
        }
        for (int i = 0; i < 16; i++) peak = std::max(peak, top16[i]);
        vec total{};
        for (long i = 0; i < blocks; i++) {
            vec v = load16(row + 16 * i), e = exp16(v - peak);
            e = v > splat(-1e30f) ? e : vec{};
            store16(row + 16 * i, e);
            total += e;
        }
        float sum = h < heads ? std::exp(sink[h] - peak) : 1;
        for (int i = 0; i < 16; i++) sum += total[i];
        inverse[h] = 1 / sum;
    }
    // Values: the same rows. Two keys at a time for bf16, whose products come in pairs.
    constexpr long step = 4 / sizeof(S);
    S* p = room<S>(3, HEADS * blocks * 16);
    for (long i = 0; i < HEADS * blocks * 16; i++) store(p, i, z[i] * inverse[i / (blocks * 16)]);
    long c = 0;
    for (; c + 16 * step <= d; c += 16 * step) {
        vec sum[HEADS][step] = {};
        for (long i = 0; i < n; i += step) {
            Chunk<S> v[step];
            if constexpr (step == 1) v[0] = Chunk<S>::take(rows[i] + c);
            else {
                typedef uint16_t half __attribute__((vector_size(64)));
                half x, y;
                memcpy(&x, rows[i] + c, 64);
                memcpy(&y, rows[i + 1 < n ? i + 1 : i] + c, 64);  // a missing partner has p = 0
                half lo = __builtin_shuffle(x, y, half{0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47});
                half hi = __builtin_shuffle(x, y, half{16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63});
                memcpy(&v[0], &lo, 64);
                memcpy(&v[1], &hi, 64);
            }
#pragma GCC unroll 8
            for (int h = 0; h < HEADS; h++) {
                Chunk<S> share = Chunk<S>::pair(p + h * blocks * 16 + i);
#pragma GCC unroll 2
                for (int s = 0; s < step; s++) sum[h][s] = Chunk<S>::mad(sum[h][s], v[s], share);
            }
        }
        for (int h = 0; h < heads; h++)
            for (int s = 0; s < step; s++)
                for (int i = 0; i < 16; i++) store(out, h * d + c + s * 16 + i, sum[h][s][i]);
    }
    for (; c < d; c++)
        for (int h = 0; h < heads; h++) {
            float sum = 0;
            for (long i = 0; i < n; i++) sum += load(p, h * blocks * 16 + i) * load(rows[i], c);
            store(out, h * d + c, sum);
        }
}

// out [B, T, H, d]. Near rows near_from <= r < near_to of near [B, N, d]; far rows: chosen [B, T, K] with count, or (K = 0) all of
// far_low <= e < far_high. far: row b begins at far + b * far_stride.
template <class S>
void attend(const S* q, const S* near, const int32_t* near_from, const int32_t* near_to, const S* far, const int32_t* chosen,
            const int32_t* count, const int64_t* far_low, const int64_t* far_high, const float* sink, S* out, long B, long T, long H, long d,
            long N, long far_stride, long K, float scale) {
    const long groups = (H + HEADS - 1) / HEADS, w = words<S>(d);
    const bool split = B * T < 16;  // few queries: threads share the heads of each
    const long tasks = B * T * (split ? groups : 1);
#pragma omp parallel for schedule(dynamic, split ? 1 : 8) if (B * T * H * d > 16384)
    for (long task = 0; task < tasks; task++) {
        const long at = split ? task / groups : task, b = at / T;
        long n = near_to[at] - near_from[at];
        const long near_n = n, many = far ? (K ? count[at] : far_high[at] - far_low[at]) : 0;
        n += many;
        const long blocks = (n + 15) / 16;
        std::vector<const S*> rows(blocks * 16);
        std::vector<long> offset(blocks);
        for (long i = 0; i < near_n; i++) rows[i] = near + (b * N + near_from[at] + i) * d;
        for (long i = 0; i < many; i++) rows[near_n + i] = far + b * far_stride + (K ? chosen[at * K + i] : far_low[at] + i) * d;
        for (long i = n; i < blocks * 16; i++) rows[i] = rows[n - 1];
        uint32_t* turned = room<uint32_t>(4, blocks * 16 * w);
        for (long i = 0; i < blocks; i++) {
            turn((const uint32_t* const*)(rows.data() + 16 * i), w, turned + i * 16 * w);
            offset[i] = i * 16 * w;
        }
        for (long g = split ? task % groups : 0; g < (split ? task % groups + 1 : groups); g++) {
            const long heads = std::min<long>(HEADS, H - g * HEADS);
            const S* mine = q + (at * H + g * HEADS) * d;
            if (heads < HEADS) {  // fill up with zeros
                S* padded = room<S>(5, HEADS * d);
                memset((void*)padded, 0, HEADS * d * sizeof(S));
                memcpy((void*)padded, mine, heads * d * sizeof(S));
                mine = padded;
            }
            attend_rows(mine, rows.data(), turned, offset.data(), blocks, n, sink + g * HEADS, scale, out + (at * H + g * HEADS) * d, d, heads);
        }
    }
}

}  // namespace

#define EXPORT(S, suffix)                                                                                                               \
    extern "C" void choose_##suffix(const S* q, const float* weight, const S* keys, const int64_t* low, const int64_t* high,            \
                                    int32_t* chosen, int32_t* count, long B, long T, long E, long key_stride, long H, long dim, long K, \
                                    uint32_t* turned, float* scores) {                                                                  \
        choose(q, weight, keys, low, high, chosen, count, B, T, E, key_stride, H, dim, K, turned, scores);                              \
    }                                                                                                                                   \
    extern "C" void attend_##suffix(const S* q, const S* near, const int32_t* near_from, const int32_t* near_to, const S* far,          \
                                    const int32_t* chosen, const int32_t* count, const int64_t* far_low, const int64_t* far_high,       \
                                    const float* sink, S* out, long B, long T, long H, long d, long N, long far_stride, long K,         \
                                    float scale) {                                                                                      \
        attend(q, near, near_from, near_to, far, chosen, count, far_low, far_high, sink, out, B, T, H, d, N, far_stride, K, scale);     \
    }
EXPORT(float, f32)
EXPORT(bf16, bf16)
