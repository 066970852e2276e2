"""How much memory loading and streaming take, measured in a process of its own: one layer above what stays."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsv4.checkpoint.synthetic import synthesise
from dsv4.config import Config

LAYERS, EXPERTS = 6, 24
CONFIG = Config.preset("flash").replace(
    vocab_size=4096, hidden_size=1024, moe_intermediate_size=1024, num_attention_heads=16, head_dim=128,
    qk_rope_head_dim=64, q_lora_rank=256, o_groups=2, o_lora_rank=256, index_n_heads=16, n_routed_experts=EXPERTS,
)  # fmt: skip
EXPERT = 3 * (1024 * 1024 // 2 + 1024 * 1024 // 32)
LAYER = EXPERTS * EXPERT + (8 << 20)  # bytes: 39 MiB of experts, less than 8 MiB of everything else

# Peaks are resident memory as the kernel counts it; writing 5 there makes the highest value start anew.
SCRIPT = """
import json, sys
import torch
import dsv4
from dsv4.kernels.cpu.library import library
torch.set_num_threads(1)
library(), library(torch.float32), library(torch.bfloat16)
ids = torch.arange(40)[None] % 4096

def status(key):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(key))

def highest():
    value = status("VmHWM")
    open("/proc/self/clear_refs", "w").write("5")
    return value

warm = dsv4.load(sys.argv[2], dtype="native")  # what any model needs once: scratch, code, thread stacks
with torch.no_grad():
    warm(ids)
del warm
highest()
before = status("VmRSS")
model = dsv4.load(sys.argv[1], dtype="native", expert_memory=int(sys.argv[3]) or None)
loading, resident = highest(), status("VmRSS")
with torch.no_grad():
    state = model.new_state()
    model(ids, state)
    for token in range(3):
        model(ids[:, :1] + token, state)
print(json.dumps({"before": before, "loading": loading, "resident": resident, "running": highest()}))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("memory")
    synthesise(CONFIG, list(range(LAYERS)), root / "model")
    synthesise(CONFIG, [0, 2, 3], root / "small", experts=6)
    return root / "model", root / "small"


def measure(folders: tuple[Path, Path], budget: int) -> dict[str, int]:
    command = [sys.executable, "-c", SCRIPT, *map(str, folders), str(budget)]
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "65536"}
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's account of memory")
def test_loading_peaks_at_most_a_layer_above_what_stays(folders: tuple[Path, Path]) -> None:
    seen = measure(folders, 0)
    stays = seen["resident"] - seen["before"]
    assert LAYERS * EXPERTS * EXPERT < stays < LAYERS * LAYER + (32 << 20), seen  # it really is the model
    assert seen["loading"] - seen["resident"] < LAYER, seen
    assert seen["running"] - seen["resident"] < LAYER, seen


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's account of memory")
def test_streaming_peaks_at_most_a_layer_above_its_budget(folders: tuple[Path, Path]) -> None:
    budget = 10 * EXPERT  # of 144
    seen = measure(folders, budget)
    stays = seen["resident"] - seen["before"]
    assert stays < LAYERS * (8 << 20) + (32 << 20), seen
    assert seen["running"] - seen["resident"] < budget + LAYER, seen
