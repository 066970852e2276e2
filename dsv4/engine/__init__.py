"""Answers from a model: the sampler, and the loop that runs several answers side by side."""

from __future__ import annotations

from dsv4.engine.engine import Engine, Generation
from dsv4.engine.sampler import SamplingParams

__all__ = ["Engine", "Generation", "SamplingParams"]
