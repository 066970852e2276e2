// Products of rows with the rows of a weight, in one order of addition whatever the number of rows. What differs between callers,
// where a row lies and where sums go, is called and not compiled in: the loops exist once for each kind of weight.
#pragma once
#include "scalar.h"
#include "share.h"

typedef Ref<const S*(long)> Row;                         // where x[m] lies
typedef Ref<void(long, long, const float*, long)> Emit;  // (m, n, sums, count): results of row m from column n on

// N rows of K elements: as plain as x, or (where x is bf16) packed: `bits` is 8 for E4M3 with a scale for 128 x 128, 4 for E2M1 with one
// for 32.
struct Weight {
    long bits;
    const void *elements, *scale;  // scale: biased exponents
    long K;
};

constexpr long BLOCK = 64;  // rows of x that stay in the second-level cache while the weight passes by

// x[m] . w[n] for m in [m0, m1), n in [n0, n1).
void product(Row row, const Weight& w, long m0, long m1, long n0, long n1, Emit emit);

// x [M, G, K], G weights [N, K] one behind the other -> y [M, G, N] (G = 1: a plain linear layer).
template <class T> void linear(const S* x, const Weight& w, T* y, long M, long N, long G);
// The same with one group and x in the release's arithmetic: first rounded to E4M3 in blocks of 128 channels.
void rounded_linear(const S* x, const Weight& w, S* y, long M, long N);
