// The router after its product: affinities sqrt(softplus(x)), the k best under a bias or the given ones, their normalised weights.
#include <cmath>
#include <cstdint>

extern "C" void route(const float* logits, const float* bias, float* scores, int64_t* experts, float* weights, long M, long E, long K,
                          float factor) {
#pragma omp parallel for if (M * E > 20000)
    for (long m = 0; m < M; m++) {
        float *s = scores + m * E, *w = weights + m * K;
        int64_t* chosen = experts + m * K;
        for (long e = 0; e < E; e++) {
            const double x = logits[m * E + e];
            s[e] = float(std::sqrt(x > 20 ? x : std::log1p(std::exp(x))));
        }
        for (long k = 0; bias && k < K; k++) {  // the lowest number first among equals
            long best = -1;
            for (long e = 0; e < E; e++) {
                bool taken = false;
                for (long i = 0; i < k; i++) taken |= chosen[i] == e;
                if (!taken && (best < 0 || s[e] + bias[e] > s[best] + bias[best])) best = e;
            }
            chosen[k] = best;
        }
        float sum = 0;
        for (long k = 0; k < K; k++) sum += w[k] = s[chosen[k]];
        for (long k = 0; k < K; k++) w[k] = w[k] / sum * factor;
    }
}
