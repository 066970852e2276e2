"""Model folders: official and transformers names, streamed in and out. See `load`, `save`, `inventory`."""

from __future__ import annotations

from dsv4.checkpoint.inventory import TensorSpec, inventory
from dsv4.checkpoint.reader import load
from dsv4.checkpoint.writer import save

__all__ = ["TensorSpec", "inventory", "load", "save"]
