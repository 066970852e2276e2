"""Small models whose every tensor is random: defaults (zero sinks, zero tables) would hide a lost or swapped one."""

from __future__ import annotations

import pytest
import torch

from dsv4.config import Config
from dsv4.model import Transformer

# Every kind of layer, transformers' limits (an HCA ratio, 16 index heads against score ties), one MTP block.
TINY = Config.preset("micro").replace(
    vocab_size=96,
    num_hidden_layers=5,
    compress_ratios=(0, 4, 8, 4, 8, 0),
    num_hash_layers=2,
    index_n_heads=16,
    n_routed_experts=4,
)


@pytest.fixture(scope="session")
def tiny() -> Transformer:
    """fp32, but every value exact in bf16, so that a bf16 folder loses nothing."""
    model = Transformer(TINY)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("tid2eid"):
                tensor.copy_(torch.randint(0, TINY.n_routed_experts, tensor.shape, generator=generator))
            else:
                value = torch.randn(tensor.shape, generator=generator) * 0.3 + ("norm" in name)
                tensor.copy_(value.bfloat16().float())
    return model


@pytest.fixture(scope="session")
def ids() -> torch.Tensor:
    """int64 [1, 40]: several windows, CSA and HCA entries, more entries than index_topk."""
    return torch.randint(0, TINY.vocab_size, (1, 40), generator=torch.Generator().manual_seed(3))
