// A compressor's pooling: per channel a softmax over the slots of an entry times their values, forward and backward. Sixteen
// channels stay in registers while the slots pass by.
#include "share.h"
#include "vec.h"

namespace {

inline vec take(const float* p, long count) {
    vec v{};
    memcpy(&v, p, count * 4);
    return v;
}
inline void put(float* p, vec v, long count) { memcpy(p, &v, count * 4); }

// For channels c .. c + count of one entry: e[s] = exp(gate - the largest gate). Returns their sum.
inline vec odds(const float* gate, long slots, long C, long c, long count, vec* e) {
    vec top = splat(-INFINITY), total{};
    for (long s = 0; s < slots; s++) {
        e[s] = take(gate + s * C + c, count);
        top = e[s] > top ? e[s] : top;
    }
    for (long s = 0; s < slots; s++) total += e[s] = exp16(e[s] - top);
    return total;
}

}  // namespace

extern "C" void pool_forward(const float* kv, const float* gate, float* out, long rows, long slots, long C) {
#pragma omp parallel for if (rows * slots * C > 100000)
    for (long row = 0; row < rows; row++) {
        vec* e = scratch<vec>(0, slots);
        for (long c = 0; c < C; c += 16) {
            const long count = std::min(C - c, 16L), at = row * slots * C;
            vec total = odds(gate + at, slots, C, c, count, e), value{};
            for (long s = 0; s < slots; s++) value += e[s] * take(kv + at + s * C + c, count);
            put(out + row * C + c, value / total, count);
        }
    }
}

// d value = p d, d gate = p (value - out) d
extern "C" void pool_backward(const float* d, const float* kv, const float* gate, float* dkv, float* dgate, long rows, long slots, long C) {
#pragma omp parallel for if (rows * slots * C > 100000)
    for (long row = 0; row < rows; row++) {
        vec* e = scratch<vec>(0, slots);
        for (long c = 0; c < C; c += 16) {
            const long count = std::min(C - c, 16L), first = row * slots * C;
            vec total = odds(gate + first, slots, C, c, count, e), value{};
            for (long s = 0; s < slots; s++) value += e[s] * take(kv + first + s * C + c, count);
            value /= total;
            vec share = take(d + row * C + c, count) / total;
            for (long s = 0, at = first + c; s < slots; s++, at += C) {
                put(dkv + at, e[s] * share, count);
                put(dgate + at, e[s] * share * (take(kv + at, count) - value), count);
            }
        }
    }
}
