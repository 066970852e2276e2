// What surrounds the attention of a few tokens, with FP8 weights: chains of the other kernels in one call each, since between calls
// the interpreter starts from caches that the weights have emptied. Not a sum is added in another order.
#include <cstdint>
#include <vector>

#include "scalar.h"

extern "C" {
void norm_forward_bf16(const bf16* x, const float* w, bf16* y, float* r, long begin, long end, long C, float eps);
void turn_bf16(const bf16* x, const float* angles, bf16* y, long begin, long end, long C, long R, long repeat, float sign);
void rounded_linear_fp8_bf16(const bf16* x, const void* w, const void* scale, bf16* y, long M, long N, long K);
void linear_bf16(const bf16* x, const void* w, const void* scale, bf16* y, long M, long N, long K, long G);
void linear_fp8_bf16(const bf16* x, const void* w, const void* scale, bf16* y, long M, long N, long K, long G);

// h [M, D] -> latent [M, rank], q [M, H, d], kv [M, d]; angles as (cos, sin) pairs [M, R].
void attention_inputs_bf16(const bf16* h, const void* wq_a, const void* wq_a_scale, const float* q_norm, const void* wq_b,
                           const void* wq_b_scale, const void* wkv, const void* wkv_scale, const float* kv_norm, const float* angles,
                           bf16* latent, bf16* q, bf16* kv, long M, long D, long rank, long H, long d, long R, float eps) {
    std::vector<bf16> room(2 * M * H * d);
    std::vector<float> r(M * H);
    bf16 *first = room.data(), *second = first + M * H * d;
    rounded_linear_fp8_bf16(h, wq_a, wq_a_scale, first, M, rank, D);
    norm_forward_bf16(first, q_norm, latent, r.data(), 0, M, rank, eps);
    rounded_linear_fp8_bf16(latent, wq_b, wq_b_scale, first, M, H * d, rank);
    norm_forward_bf16(first, nullptr, second, r.data(), 0, M * H, d, eps);
    turn_bf16(second, angles, q, 0, M * H, d, R, H, 1);
    rounded_linear_fp8_bf16(h, wkv, wkv_scale, first, M, d, D);
    norm_forward_bf16(first, kv_norm, second, r.data(), 0, M, d, eps);
    turn_bf16(second, angles, kv, 0, M, d, R, 1, 1);
}

// The indexer's queries of latent [M, rank], turned: q [M, H, d]; and what weighs its heads, of h [M, D]: weights [M, H] times size.
void index_queries_bf16(const bf16* h, const bf16* latent, const void* wq_b, const void* wq_b_scale, const bf16* proj, const float* angles,
                        bf16* q, float* weights, long M, long D, long rank, long H, long d, long R, float size) {
    std::vector<bf16> room(M * H * (d + 1));
    bf16 *first = room.data(), *low = first + M * H * d;
    rounded_linear_fp8_bf16(latent, wq_b, wq_b_scale, first, M, H * d, rank);
    turn_bf16(first, angles, q, 0, M * H, d, R, H, 1);
    linear_bf16(h, proj, nullptr, low, M, H, D, 1);
    for (long i = 0; i < M * H; i++) weights[i] = load(low, i) * size;
}

// o [M, H, d] turned back, through G groups of wo_a [low, H / G d] and wo_b [D, G low] -> out [M, D].
void attention_output_bf16(const bf16* o, const float* angles, const void* wo_a, const void* wo_a_scale, const void* wo_b,
                           const void* wo_b_scale, bf16* out, long M, long H, long d, long R, long G, long low, long D) {
    std::vector<bf16> room(M * (H * d + G * low));
    bf16 *turned = room.data(), *middle = turned + M * H * d;
    turn_bf16(o, angles, turned, 0, M * H, d, R, H, -1);
    linear_fp8_bf16(turned, wo_a, wo_a_scale, middle, M, low, H / G * d, G);
    rounded_linear_fp8_bf16(middle, wo_b, wo_b_scale, out, M, D, G * low);
}
}
