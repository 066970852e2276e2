// Values rounded to E4M3 in blocks under scales that are powers of two, as `numerics.rounded` does: to the bit.
#pragma once
#include "scalar.h"

// K channels in E4M3 blocks of B <= 128, a block's largest counting at least 1e-4.
void round_row(const S* x, S* out, long K, long B);
