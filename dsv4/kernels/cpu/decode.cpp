// What surrounds the attention of a few tokens, with FP8 weights: chains of the other kernels in one call each, since between calls
// the interpreter starts from caches that the weights have emptied. Not a sum is added in another order.
#include <cstdint>
#include <vector>

#include "product.h"

extern "C" {
void norm_forward(const bf16* x, const float* w, bf16* y, float* r, long begin, long end, long C, float eps);
void turn(const bf16* x, const float* angles, bf16* y, long begin, long end, long C, long R, long repeat, float sign);

// h [M, D] -> latent [M, rank], q [M, H, d], kv [M, d]; angles as (cos, sin) pairs [M, R].
void attention_inputs(const bf16* h, const void* wq_a, const void* wq_a_scale, const float* q_norm, const void* wq_b,
                      const void* wq_b_scale, const void* wkv, const void* wkv_scale, const float* kv_norm, const float* angles,
                      bf16* latent, bf16* q, bf16* kv, long M, long D, long rank, long H, long d, long R, float eps) {
    std::vector<bf16> room(2 * M * H * d);
    std::vector<float> r(M * H);
    bf16 *first = room.data(), *second = first + M * H * d;
    rounded_linear(h, {8, wq_a, wq_a_scale, D}, first, M, rank);
    norm_forward(first, q_norm, latent, r.data(), 0, M, rank, eps);
    rounded_linear(latent, {8, wq_b, wq_b_scale, rank}, first, M, H * d);
    norm_forward(first, nullptr, second, r.data(), 0, M * H, d, eps);
    turn(second, angles, q, 0, M * H, d, R, H, 1);
    rounded_linear(h, {8, wkv, wkv_scale, D}, first, M, d);
    norm_forward(first, kv_norm, second, r.data(), 0, M, d, eps);
    turn(second, angles, kv, 0, M, d, R, 1, 1);
}

// The indexer's queries of latent [M, rank], turned: q [M, H, d]; and what weighs its heads, of h [M, D]: weights [M, H] times size.
void index_queries(const bf16* h, const bf16* latent, const void* wq_b, const void* wq_b_scale, const bf16* proj, const float* angles,
                   bf16* q, float* weights, long M, long D, long rank, long H, long d, long R, float size) {
    std::vector<bf16> room(M * H * (d + 1));
    bf16 *first = room.data(), *low = first + M * H * d;
    rounded_linear(latent, {8, wq_b, wq_b_scale, rank}, first, M, H * d);
    turn(first, angles, q, 0, M * H, d, R, H, 1);
    linear(h, {16, proj, nullptr, D}, low, M, H, 1);
    for (long i = 0; i < M * H; i++) weights[i] = load(low, i) * size;
}

// o [M, H, d] turned back, through G groups of wo_a [low, H / G d] and wo_b [D, G low] -> out [M, D].
void attention_output(const bf16* o, const float* angles, const void* wo_a, const void* wo_a_scale, const void* wo_b,
                      const void* wo_b_scale, bf16* out, long M, long H, long d, long R, long G, long low, long D) {
    std::vector<bf16> room(M * (H * d + G * low));
    bf16 *turned = room.data(), *middle = turned + M * H * d;
    turn(o, angles, turned, 0, M * H, d, R, H, -1);
    linear(turned, {8, wo_a, wo_a_scale, H / G * d}, middle, M, low, G);
    rounded_linear(middle, {8, wo_b, wo_b_scale, G * low}, out, M, D);
}
}
