"""The training loop: a short step, and around it metrics, evaluation, checkpoints and the finished model."""

from __future__ import annotations

import json
import math
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dsv4
from dsv4.checkpoint import load, save
from dsv4.common.console import Progress
from dsv4.common.files import atomic_write
from dsv4.common.memory import keep_freed_memory
from dsv4.common.metrics import MetricsLog, read_metrics
from dsv4.common.runconfig import load as read_recipe
from dsv4.common.runconfig import resolved
from dsv4.common.seeds import derive
from dsv4.model import Transformer
from dsv4.numerics import quantisation_aware
from dsv4.training.checkpoints import list_checkpoints, load_checkpoint, save_checkpoint
from dsv4.training.feed import Feed
from dsv4.training.losses import Batch, components
from dsv4.training.optimizer import Optimizer, is_indexer
from dsv4.training.plots import plot_losses
from dsv4.training.recipe import Recipe
from dsv4.training.schedule import StepPlan


def train_step(
    model: Transformer,
    optimizers: list[Optimizer],
    batches: list[Batch],
    plan: StepPlan,
    weights: dict[str, float],
    clip: float,
) -> dict[str, Any]:
    """One optimiser step over all its forward passes -> component losses, gradient norm, expert loads (tensors).

    Only `optimizers` train; whatever else received gradients is left as it was. Components "lm" and "mtp" arrive as
    sums over tokens whose weights sum to 1 over the step, the others as means of their pass.
    """
    sums: dict[str, Tensor] = {}
    loads: list[Tensor] = []
    for batch in batches:
        losses, load = components(model, batch, plan.phase, weights["mtp"] > 0)
        shares = {name: 1.0 if name in ("lm", "mtp") else 1 / len(batches) for name in losses}
        torch.stack([losses[name] * (weights[name] * shares[name]) for name in losses]).sum().backward()
        sums = {name: sums.get(name, 0) + loss.detach() * shares[name] for name, loss in losses.items()}
        loads = [a + b for a, b in zip(loads, load)] if loads else load
        for optimizer in optimizers:
            optimizer.accumulate()
    norm = torch.stack([optimizer.grad_norm() for optimizer in optimizers]).norm()
    scale = float((clip / norm.clamp_min(1e-12)).clamp_max(1))
    for optimizer in optimizers:
        optimizer.step(plan.lr, scale)
    model.zero_grad(set_to_none=True)
    model.update_bias(loads, plan.gamma)
    return {**sums, "grad_norm": norm, "loads": loads}


@torch.no_grad()
def bits_per_byte(model: Transformer, texts: list[tuple[list[int], int]], rows: int, indexer: str) -> float:
    """Bits the model needs per byte of `texts` [(ids from BOS, bytes)], each text by itself; `rows` texts at a time.
    `indexer` "off" attends densely, as the model does before its sparse phase."""
    nats = 0.0
    for start in range(0, len(texts), rows):
        part = [ids for ids, _ in texts[start : start + rows]]
        ids = torch.zeros(len(part), max(map(len, part)), dtype=torch.int64)
        for row, text in zip(ids, part):
            row[: len(text)] = torch.tensor(text)
        ids = ids.to(model.device)
        hidden = model.train_forward(ids, torch.zeros_like(ids), indexer=indexer, mtp=False).hidden
        log_p = model.logits(hidden).log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
        nats -= sum(float(row[: len(text) - 1].sum()) for row, text in zip(log_p, part))
    return nats / math.log(2) / sum(size for _, size in texts)


def cpu_name() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


class Trainer:
    """One run in one folder: ``recipe.toml`` (resolved), ``metrics.jsonl``, ``checkpoints/``, ``loss.png``,
    ``run.json``."""

    def __init__(self, recipe: Recipe, folder: Path, resume: bool = True) -> None:
        self.recipe, self.folder = recipe, folder
        keep_freed_memory()
        if recipe.threads:
            torch.set_num_threads(recipe.threads)
        chosen = recipe.device if recipe.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        if chosen == "cuda" and not torch.cuda.is_available():
            raise ValueError("device = 'cuda', but torch sees no CUDA device")
        self.device = torch.device(chosen)
        self.checkpoints = folder / "checkpoints"
        found = list_checkpoints(self.checkpoints)
        if found and not resume:
            raise ValueError(f"{folder} holds a run at {found[-1].name}; resume it, or choose another name")
        if found and not recipe.agrees(read_recipe(Recipe, folder / "recipe.toml"), int(found[-1].name[-8:])):
            raise ValueError(f"{folder} was begun with another recipe (its recipe.toml); choose another name")
        self.feed = Feed(recipe)
        self.model = self._new_model()
        named = list(self.model.named_parameters())
        self.optimizers = {
            "model": Optimizer([(n, p) for n, p in named if not is_indexer(n)], self.model.config, recipe.optimizer)
        }
        if indexer := [(n, p) for n, p in named if is_indexer(n)]:
            self.optimizers["indexer"] = Optimizer(indexer, self.model.config, recipe.optimizer)
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        if found:
            self._restore(found[-1])
        atomic_write(folder / "recipe.toml", resolved(recipe))
        self.log = MetricsLog(folder / "metrics.jsonl", self.step)

    def _new_model(self) -> Transformer:
        settings = self.recipe.model
        if settings.start:
            model = load(settings.start, settings.dtype, self.device)
        else:
            model = Transformer(settings.config(), dtype=getattr(torch, settings.dtype))
            model.init_weights(derive(self.recipe.seed, "weights")).to(self.device)
        return quantisation_aware(model) if settings.qat else model

    def advance(self) -> dict[str, Any]:
        """Trains one step and returns its metrics."""
        recipe, plan = self.recipe, self.recipe.plan(self.step)
        parts = {"off": ["model"], "warmup": ["indexer"], "sparse": ["model", "indexer"]}[plan.phase]
        weights = {"lm": 1.0, "mtp": plan.mtp_weight}
        weights |= {"balance": recipe.balance_weight, "indexer": recipe.indexer_weight}
        batches = [batch.to(self.device) for batch in self.feed.batches(self.step)]
        started = time.monotonic()
        optimizers = [self.optimizers[part] for part in parts if part in self.optimizers]
        result = train_step(self.model, optimizers, batches, plan, weights, recipe.optimizer.grad_clip)
        loads = result.pop("loads")
        row: dict[str, Any] = {name: float(value) for name, value in result.items()}
        seconds = time.monotonic() - started
        if bad := [name for name, value in row.items() if not math.isfinite(value)]:
            raise ValueError(f"step {self.step}: {', '.join(bad)} is not finite; lower optimizer.lr and resume")
        tokens = sum(batch.ids.numel() for batch in batches)
        rows, passes = recipe.batch.rows(plan.length)
        assert tokens == rows * passes * plan.length == recipe.batch.tokens, f"{tokens}, not {recipe.batch.tokens}"
        self.step, self.tokens, self.seconds = self.step + 1, self.tokens + tokens, self.seconds + seconds
        assert self.tokens == self.step * recipe.batch.tokens
        row |= {"step": self.step, "tokens": self.tokens, "lr": plan.lr, "tokens_per_s": tokens / seconds}
        if loads:
            row["load_max_mean"] = max(float(load.max() / load.float().mean()) for load in loads)
        if self.step == 1 or plan.phase != self.recipe.plan(self.step - 2).phase:
            row["phase_began"] = {"off": "dense", "warmup": "indexer warm-up", "sparse": "sparse"}[plan.phase]
        return row

    def run(self, stop: int | None = None) -> None:
        """Trains to the end of the schedule (or to step `stop`), then exports the model."""
        recipe, steps = self.recipe, self.recipe.schedule.steps
        last = min(steps, stop or steps)
        heldout = self.feed.heldout()
        total = steps * recipe.batch.tokens
        with Progress(total, recipe.name, "tokens", done=self.tokens) as progress:
            while self.step < last:
                row = self.advance()
                if self.step % recipe.evaluate.every == 0 or self.step == steps:
                    mode = "sparse" if self.recipe.plan(self.step - 1).phase == "sparse" else "off"
                    row["bits_per_byte"] = bits_per_byte(self.model, heldout, recipe.evaluate.rows, mode)
                    progress.note(f"step {self.step}: held-out {row['bits_per_byte']:.4f} bits per byte")
                if self.step % recipe.log_every == 0 or len(row.keys() & {"bits_per_byte", "phase_began"}):
                    self.log.write(**row)
                shown = {k: row[k] for k in ("lm", "indexer", "bits_per_byte") if k in row}
                progress.update(recipe.batch.tokens, step=self.step, **shown)
                if self.step % recipe.checkpoint_every == 0 or self.step == last:
                    self.save()
        if self.step == steps and recipe.export:
            save(self.model, recipe.export, "official", dtype="bfloat16", tokenizer=self.feed.tokenizer)

    def save(self) -> None:
        """Checkpoint, loss curve and facts of the run so far."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for part, optimizer in self.optimizers.items():
            tensors |= {f"optimizer.{part}.{name}": tensor for name, tensor in optimizer.state_dict().items()}
        facts = {"tokens": self.tokens, "seconds": self.seconds}
        save_checkpoint(self.checkpoints, self.step, tensors, facts, self.recipe.keep)
        plot_losses(read_metrics(self.log.path), self.folder / "loss.png", self.recipe.name)
        atomic_write(self.folder / "run.json", json.dumps(self.facts(), indent=1) + "\n")

    def _restore(self, path: Path) -> None:
        tensors, facts = load_checkpoint(path, self.device)
        self.model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
        for part, optimizer in self.optimizers.items():
            prefix = f"optimizer.{part}."
            optimizer.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        self.step, self.tokens, self.seconds = facts["step"], facts["tokens"], facts["seconds"]

    def facts(self) -> dict[str, Any]:
        """What the run was: steps, tokens, hours of training steps, hardware, data and versions."""
        hardware = torch.cuda.get_device_name() if self.device.type == "cuda" else cpu_name()
        return {
            "name": self.recipe.name,
            "step": self.step,
            "tokens": self.tokens,
            "hours": round(self.seconds / 3600, 3),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "hardware": hardware,
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "dtype": self.recipe.model.dtype,
            "qat": self.recipe.model.qat,
            "data": self.feed.facts(),
            "versions": {"dsv4": dsv4.__version__, "torch": torch.__version__, "python": platform.python_version()},
        }
