"""The network, in the order of report section 2. Start reading at `transformer.py`."""

from dsv4.model.state import State
from dsv4.model.transformer import TrainOutput, Transformer

__all__ = ["State", "TrainOutput", "Transformer"]
