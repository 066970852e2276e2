// Manifold-constrained hyper-connections of 4 streams, fused: forward and backward of entering and leaving a sub-layer.
// Rows are tokens. A kernel works on rows [begin, end); the caller gives each thread its own range and its own
// accumulators, so results do not depend on timing.
#include <vector>

#include "vec.h"

namespace {

constexpr int n = 4, maps = 24, lanes = 16, group = 4;
constexpr int pad = 48;  // buffers a power of two apart would share cache sets and stall on false store-to-load matches

// c[4 j + k][lane]: row j, column k. Ends on a column pass; sums are kept for the backward pass.
struct Sinkhorn {
    float c[16][lanes];
    std::vector<float> sums;  // [2 iterations - 1][4][lanes]

    APART void forward(const float (*logits)[lanes], int iterations, float eps) {
        sums.resize(size_t(2 * iterations - 1) * 4 * lanes);
        for (int j = 0; j < 4; j++)
            for (int t = 0; t < lanes; t++) {
                float top = logits[4 * j][t], total = 0;
                for (int k = 1; k < 4; k++) top = std::fmax(top, logits[4 * j + k][t]);
                for (int k = 0; k < 4; k++) total += c[4 * j + k][t] = std::exp(logits[4 * j + k][t] - top);
                for (int k = 0; k < 4; k++) c[4 * j + k][t] = c[4 * j + k][t] / total + eps;
            }
        for (int step = 0; step < 2 * iterations - 1; step++)
            for (int i = 0; i < 4; i++) {
                int first = step % 2 ? 4 * i : i, stride = step % 2 ? 1 : 4;
                float* s = &sums[(size_t(step) * 4 + i) * lanes];
                for (int t = 0; t < lanes; t++) {
                    s[t] = c[first][t] + c[first + stride][t] + c[first + 2 * stride][t] + c[first + 3 * stride][t] + eps;
                    float inverse = 1 / s[t];
                    for (int k = 0; k < 4; k++) c[first + k * stride][t] *= inverse;
                }
            }
    }

    // d: gradient of c on entry, of the logits on return. Overwrites c.
    APART void backward(float (*d)[lanes], int iterations, float eps) {
        for (int step = 2 * iterations - 2; step >= 0; step--)
            for (int i = 0; i < 4; i++) {
                int first = step % 2 ? 4 * i : i, stride = step % 2 ? 1 : 4;
                const float* s = &sums[(size_t(step) * 4 + i) * lanes];
                for (int t = 0; t < lanes; t++) {
                    float inner = 0, inverse = 1 / s[t];
                    for (int k = 0; k < 4; k++) inner += d[first + k * stride][t] * c[first + k * stride][t];
                    for (int k = 0; k < 4; k++) {
                        d[first + k * stride][t] = (d[first + k * stride][t] - inner) * inverse;
                        c[first + k * stride][t] *= s[t];
                    }
                }
            }
        for (int j = 0; j < 4; j++)  // softmax + eps
            for (int t = 0; t < lanes; t++) {
                float inner = 0;
                for (int k = 0; k < 4; k++) inner += d[4 * j + k][t] * (c[4 * j + k][t] - eps);
                for (int k = 0; k < 4; k++) d[4 * j + k][t] = (c[4 * j + k][t] - eps) * (d[4 * j + k][t] - inner);
            }
    }
};

APART float total(vec v) {
    float sum = 0;
    for (int i = 0; i < 16; i++) sum += v[i];
    return sum;
}
inline vec some(const float* p, long count) {
    vec v{};
    memcpy(&v, p, count * 4);
    return v;
}

// dots[t] = f . v_t for R tokens, `P` apart. A token's sum has the same order for every R.
template <int R>
APART void map_dots(const float* f, const float* v, long P, long M, float* dots) {
    vec sum[R][2] = {};
    long k = 0;
    for (; k + 32 <= M; k += 32)
        for (int i = 0; i < 2; i++) {
            const vec w = load16(f + k + 16 * i);
            for (int t = 0; t < R; t++) sum[t][i] += w * load16(v + t * P + k + 16 * i);
        }
    for (; k < M; k += 16) {
        const long count = std::min(M - k, 16L);
        for (int t = 0; t < R; t++) sum[t][0] += some(f + k, count) * some(v + t * P + k, count);
    }
    for (int t = 0; t < R; t++) dots[t] = total(sum[t][0] + sum[t][1]);
}

}  // namespace

extern "C" void enter_forward(const S* X, const float* fn, const float* base, const float* scale, S* x, float* pre, float* post,
                              float* comb, float* u, float* r, long begin, long end, long D, int iterations, float rms_eps, float eps) {
    long M = n * D, P = M + pad;
    std::vector<float> buffer(size_t(end - begin > 1 ? group : 1) * P);
    Sinkhorn sinkhorn;
    float logits[16][lanes] = {};
    for (long block = begin; block < end; block += lanes) {
        long stop = block + lanes < end ? block + lanes : end;
        for (long first = block; first < stop; first += group) {
            float* v = buffer.data();
            int rows = stop - first < group ? stop - first : group;
            for (int t = 0; t < rows; t++) {
                float square = 0;
                const S* source = X + (first + t) * M;
                for (long i = 0; i < M; i++) {
                    float value = load(source, i);
                    v[t * P + i] = value;
                    square += value * value;
                }
                r[first + t] = 1 / std::sqrt(square / M + rms_eps);
            }
            for (int i = 0; i < maps; i++) {
                float dots[group];
                (rows > 1 ? map_dots<group> : map_dots<1>)(fn + i * M, v, P, M, dots);  // missing ones are computed and left
                for (int t = 0; t < rows; t++) u[(first + t) * maps + i] = dots[t] * r[first + t];
            }
            for (int t = 0; t < rows; t++) {
                const float* ut = u + (first + t) * maps;
                float* p = pre + (first + t) * n;
                for (int j = 0; j < n; j++) {
                    p[j] = 1 / (1 + std::exp(-(ut[j] * scale[0] + base[j]))) + eps;
                    post[(first + t) * n + j] = 2 / (1 + std::exp(-(ut[n + j] * scale[1] + base[n + j])));
                }
                for (int k = 0; k < 16; k++) logits[k][first + t - block] = ut[2 * n + k] * scale[2] + base[2 * n + k];
                S* out = x + (first + t) * D;
                const float* vt = v + t * P;
                for (long i = 0; i < D; i++)
                    store(out, i, p[0] * vt[i] + p[1] * vt[D + i] + p[2] * vt[2 * D + i] + p[3] * vt[3 * D + i]);
            }
        }
        sinkhorn.forward(logits, iterations, eps);
        for (long t = block; t < stop; t++)
            for (int k = 0; k < 16; k++) comb[t * 16 + k] = sinkhorn.c[k][t - block];
    }
}

namespace {

// One row of fn against four tokens: their share of the input's gradient, and the row's own gradient.
void row_backward(const float* __restrict f, float* __restrict df, float* __restrict d0, float* __restrict d1, float* __restrict d2,
                  float* __restrict d3, const float* __restrict v0, const float* __restrict v1, const float* __restrict v2,
                  const float* __restrict v3, const float* share, long M) {
    float a = share[0], b = share[1], c = share[2], d = share[3];
    for (long k = 0; k < M; k++) {
        float w = f[k];
        d0[k] += a * w;
        d1[k] += b * w;
        d2[k] += c * w;
        d3[k] += d * w;
        df[k] += a * v0[k] + b * v1[k] + c * v2[k] + d * v3[k];
    }
}

}  // namespace

extern "C" void enter_backward(const S* dx, const float* dpost, const float* dcomb, const S* X, const float* fn, const float* base,
                               const float* scale, const float* pre, const float* post, const float* u, const float* r, S* dX, float* dfn,
                               float* dbase, float* dscale, long begin, long end, long D, int iterations, float eps) {
    long M = n * D, P = M + pad;
    std::vector<float> buffer(size_t(2 * group) * P);
    Sinkhorn sinkhorn;
    float logits[16][lanes] = {}, d[16][lanes] = {};
    for (long block = begin; block < end; block += lanes) {
        long stop = block + lanes < end ? block + lanes : end;
        for (long t = block; t < stop; t++)
            for (int k = 0; k < 16; k++) {
                logits[k][t - block] = u[t * maps + 2 * n + k] * scale[2] + base[2 * n + k];
                d[k][t - block] = dcomb[t * 16 + k];
            }
        sinkhorn.forward(logits, iterations, eps);
        sinkhorn.backward(d, iterations, eps);
        for (long first = block; first < stop; first += group) {
            float *v = buffer.data(), *dv = v + group * P;
            int rows = stop - first < group ? stop - first : group;
            float forward[group][maps] = {}, radial[group] = {};  // r du_i, and the share along v
            for (int t = 0; t < group; t++) {
                if (t >= rows) {
                    for (long i = 0; i < M; i++) v[t * P + i] = dv[t * P + i] = 0;
                    continue;
                }
                long row = first + t;
                float dot[n] = {};
                for (int j = 0; j < n; j++) {
                    float sum = 0;
                    for (long i = 0; i < D; i++) {
                        float value = load(X + row * M, j * D + i);
                        v[t * P + j * D + i] = value;
                        sum += value * load(dx + row * D, i);
                    }
                    dot[j] = sum;
                }
                float dz[maps], along = 0;
                for (int j = 0; j < n; j++) {
                    float s = pre[row * n + j] - eps, p = post[row * n + j];
                    dz[j] = dot[j] * s * (1 - s);
                    dz[n + j] = dpost[row * n + j] * p * (1 - p / 2);
                }
                for (int k = 0; k < 16; k++) dz[2 * n + k] = d[k][row - block];
                for (int i = 0; i < maps; i++) {
                    int g = i < n ? 0 : i < 2 * n ? 1 : 2;
                    float ui = u[row * maps + i], du = dz[i] * scale[g];
                    dbase[i] += dz[i];
                    dscale[g] += dz[i] * ui;
                    forward[t][i] = du * r[row];
                    along += du * ui;
                }
                radial[t] = along * r[row] * r[row] / M;
                for (int j = 0; j < n; j++)
                    for (long i = 0; i < D; i++)
                        dv[t * P + j * D + i] = pre[row * n + j] * load(dx + row * D, i) - radial[t] * v[t * P + j * D + i];
            }
            for (int i = 0; i < maps; i++) {
                const float share[group] = {forward[0][i], forward[1][i], forward[2][i], forward[3][i]};
                row_backward(fn + i * M, dfn + i * M, dv, dv + P, dv + 2 * P, dv + 3 * P, v, v + P, v + 2 * P, v + 3 * P, share, M);
            }
            for (int t = 0; t < rows; t++)
                for (long i = 0; i < M; i++) store(dX + (first + t) * M, i, dv[t * P + i]);
        }
    }
}

extern "C" void leave_forward(const S* X, const S* y, const float* post, const float* comb, S* out, long begin, long end, long D) {
    for (long t = begin; t < end; t++) {
        const S *x = X + t * n * D, *yt = y + t * D;
        const float *p = post + t * n, *c = comb + t * 16;
        for (int k = 0; k < n; k++) {
            S* o = out + (t * n + k) * D;
            for (long i = 0; i < D; i++)
                store(o, i, p[k] * load(yt, i) + c[k] * load(x, i) + c[4 + k] * load(x, D + i) + c[8 + k] * load(x, 2 * D + i) +
                                c[12 + k] * load(x, 3 * D + i));
        }
    }
}

extern "C" void leave_backward(const S* dout, const S* X, const S* y, const float* post, const float* comb, S* dX, S* dy, float* dpost,
                               float* dcomb, long begin, long end, long D) {
    for (long t = begin; t < end; t++) {
        const S *x = X + t * n * D, *yt = y + t * D, *g = dout + t * n * D;
        const float *p = post + t * n, *c = comb + t * 16;
        for (long i = 0; i < D; i++)
            store(dy + t * D, i, p[0] * load(g, i) + p[1] * load(g, D + i) + p[2] * load(g, 2 * D + i) + p[3] * load(g, 3 * D + i));
        for (int j = 0; j < n; j++)
            for (long i = 0; i < D; i++)
                store(dX + (t * n + j) * D, i, c[4 * j] * load(g, i) + c[4 * j + 1] * load(g, D + i) + c[4 * j + 2] * load(g, 2 * D + i) +
                                                   c[4 * j + 3] * load(g, 3 * D + i));
        for (int k = 0; k < n; k++) {
            float s = 0, s0 = 0, s1 = 0, s2 = 0, s3 = 0;
            for (long i = 0; i < D; i++) {
                float gi = load(g, k * D + i);
                s += gi * load(yt, i);
                s0 += gi * load(x, i);
                s1 += gi * load(x, D + i);
                s2 += gi * load(x, 2 * D + i);
                s3 += gi * load(x, 3 * D + i);
            }
            dpost[t * n + k] = s;
            dcomb[t * 16 + k] = s0;
            dcomb[t * 16 + 4 + k] = s1;
            dcomb[t * 16 + 8 + k] = s2;
            dcomb[t * 16 + 12 + k] = s3;
        }
    }
}
