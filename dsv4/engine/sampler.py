"""One logits row in, one token id out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dsv4 import kernels


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens, and when to stop.

    temperature  0 = greedy (the lowest id of equal logits); DeepSeek accepts [0, 2].
    top_p        keep the most probable tokens whose mass reaches top_p; (0, 1].
    max_tokens   None = up to the end of the context.
    seed         None = another answer each time. With a seed the answer depends on nothing but prompt, parameters and
                 weights: the draw at position t is a function of (seed, t), whoever else is being served.
    stop_ids     tokens that end the answer besides end-of-sentence and the user token.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int | None = None
    seed: int | None = None
    stop_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 2:
            raise ValueError(f"temperature {self.temperature} is outside [0, 2]")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} is outside (0, 1]")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens {self.max_tokens} is below 1")


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on (seed, position) only: Philox, a generator without a past."""
    key = np.array([seed % 2**64, position], dtype=np.uint64)
    return float(np.random.Generator(np.random.Philox(key=key)).random())


def sample(logits_V: Tensor, temperature: float, top_p: float, draw: float) -> int:
    """The id that `draw` in [0, 1) selects from softmax(logits / temperature) cut at `top_p`. Logits float32 [V]."""
    one = (torch.tensor([value], dtype=torch.float64) for value in (temperature, top_p, draw))
    return int(kernels.sample(logits_V[None], *one))
