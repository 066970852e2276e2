"""The two frequency sets of partial RoPE (report 2.3.3; YaRN as released: magnitudes are not scaled)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dsv4.config import Config


def frequencies(config: Config) -> dict[str, Tensor]:
    """float32 [qk_rope_head_dim / 2] each: "main" (window layers, MTP) and "compress" (every part of a CSA or HCA
    layer)."""
    r = config.qk_rope_head_dim
    exponent = torch.arange(0, r, 2, dtype=torch.float32) / r
    main = 1.0 / config.rope_theta**exponent
    compress = 1.0 / config.compress_rope_theta**exponent
    yarn = config.rope_scaling
    if yarn is not None:

        def turns(rotations: float) -> float:
            """The channel pair that turns ``rotations`` times over the original context."""
            length = yarn.original_max_position_embeddings / (rotations * 2 * math.pi)
            return r * math.log(length) / (2 * math.log(config.compress_rope_theta))

        low, high = max(math.floor(turns(yarn.beta_fast)), 0), min(math.ceil(turns(yarn.beta_slow)), r - 1)
        ramp = ((torch.arange(r // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
        compress = compress * (1 - ramp) + compress / yarn.factor * ramp
    return {"main": main, "compress": compress}
