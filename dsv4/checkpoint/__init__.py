"""Model folders: official and transformers names, streamed in and out. See `load`, `save`, `inventory`."""

from __future__ import annotations

from dsv4.checkpoint.inventory import TensorSpec, inventory

__all__ = ["TensorSpec", "inventory"]
