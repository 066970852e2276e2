"""An independent implementation of the formats: ml_dtypes' number types, exact fractions, plain loops."""

from __future__ import annotations

from fractions import Fraction

import ml_dtypes
import numpy as np

LARGEST = {"F8_E4M3": 448, "I8": 6}
TYPES = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "I8": ml_dtypes.float4_e2m1fn}


def exponent(amax: float, largest: int, floor: float) -> int:
    """ceil(log2(max(amax, floor) / largest)), by search in exact arithmetic."""
    ratio, e = Fraction(max(amax, floor)) / largest, -149
    while Fraction(2) ** e < ratio:
        e += 1
    return e


def quantise(x: np.ndarray, dtype: str, block: tuple[int, int], floor: float) -> tuple[np.ndarray, np.ndarray]:
    """float32 [R, C] -> (rounded values, scale exponents), block by block."""
    rows, columns = x.shape
    values = np.zeros(x.shape, np.float64)
    scales = np.zeros((-(-rows // block[0]), -(-columns // block[1])), np.int64)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            here = np.s_[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
            e = exponent(float(np.abs(x[here]).max()), LARGEST[dtype], floor)
            values[here] = (x[here] * 2.0**-e).astype(TYPES[dtype]).astype(np.float64) * 2.0**e
            scales[i, j] = e
    return values, scales


def hadamard_matrix(n: int) -> np.ndarray:
    """Sylvester's construction, orthonormal."""
    matrix = np.ones((1, 1))
    while len(matrix) < n:
        matrix = np.kron(np.array([[1, 1], [1, -1]]), matrix)
    return matrix / np.sqrt(n)


def linear(x: np.ndarray, weight: np.ndarray, block: int = 128) -> np.ndarray:
    """x [N, C] (rounded per row and block to E4M3) times weight [R, C]^T in float64, block by block with scales."""
    out = np.zeros((len(x), len(weight)))
    for start in range(0, x.shape[1], block):
        part = np.s_[:, start : start + block]
        rounded, _ = quantise(x[part], "F8_E4M3", (1, block), 1e-4)
        out += rounded @ weight[part].T.astype(np.float64)
    return out


def rounded(x: np.ndarray, dtype: str, block: int, floor: float) -> np.ndarray:
    """float32 [..., C] rounded along the last axis in blocks, power-of-two scales; vectorised."""
    columns = x.shape[-1]
    rows = np.pad(x.reshape(-1, columns), ((0, 0), (0, -columns % block))).reshape(-1, block).astype(np.float64)
    ratio = np.maximum(np.abs(rows).max(1, keepdims=True), floor) / LARGEST[dtype]
    mantissa, e = np.frexp(ratio)
    scale = np.ldexp(1.0, e - (mantissa == 0.5))
    out = (rows / scale).astype(np.float32).astype(TYPES[dtype]).astype(np.float64) * scale
    return out.reshape(-1, columns + -columns % block)[:, :columns].reshape(x.shape).astype(np.float32)
