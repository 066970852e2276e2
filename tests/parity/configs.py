"""Small networks with every part switched on, and two with the published ratios and window."""

from __future__ import annotations

from typing import Any

from dsv4.config import Config, RopeScaling


def tiny(**changes: Any) -> Config:
    """Model card F.1: enough index heads that no two scores tie at zero, clamps that bite, a short YaRN range."""
    base: dict[str, Any] = {
        "vocab_size": 256,
        "hidden_size": 64,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "head_dim": 32,
        "qk_rope_head_dim": 8,
        "q_lora_rank": 48,
        "o_lora_rank": 24,
        "o_groups": 2,
        "compress_ratios": (0, 4, 8, 4, 8, 0),
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "num_hash_layers": 2,
        "index_n_heads": 16,
        "index_head_dim": 16,
        "index_topk": 4,
        "sliding_window": 16,
        "max_position_embeddings": 1024,
        "rope_scaling": RopeScaling(original_max_position_embeddings=64),
    }
    return Config(**(base | changes))


FLASH_PATTERN = {"num_hidden_layers": 6, "compress_ratios": (0, 0, 4, 128, 4, 128, 0)}
PRO_PATTERN = {"num_hidden_layers": 6, "compress_ratios": (128, 128, 4, 128, 4, 128, 0)}
REAL = {"sliding_window": 128, "index_topk": 32, "max_position_embeddings": 65536, "rope_scaling": RopeScaling()}

# name -> (config, batch, tokens)
CASES: dict[str, tuple[Config, int, int]] = {
    "all-parts": (tiny(), 2, 150),
    "clamps": (tiny(swiglu_limit=0.5), 2, 90),
    "window-only": (tiny(num_hidden_layers=2, compress_ratios=(0, 0, 0)), 2, 70),
    "csa-only": (tiny(num_hidden_layers=2, compress_ratios=(4, 4, 0), index_topk=8), 1, 200),
    "hca-only": (tiny(num_hidden_layers=3, compress_ratios=(16, 16, 16, 0)), 2, 133),
    "no-yarn": (tiny(rope_scaling=None), 1, 100),
    "wide": (
        tiny(hidden_size=96, num_attention_heads=8, o_groups=4, num_experts_per_tok=3, routed_scaling_factor=2.5),
        1,
        120,
    ),
    "gathered": (tiny(index_topk=2, compress_ratios=(4, 4, 4, 8, 4, 0)), 1, 300),
    "flash-pattern": (tiny(**FLASH_PATTERN, **REAL), 1, 720, 2),  # seed 1 has two router scores that tie in float32
    "pro-pattern": (tiny(**PRO_PATTERN, **REAL), 1, 720),
}
