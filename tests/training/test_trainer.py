"""The trainer: phases, learning, checkpoints, resume bit for bit after a kill, exports, clear errors."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import dsv4
from dsv4.cli.app import main
from dsv4.common.metrics import read_metrics
from dsv4.training.checkpoints import list_checkpoints, save_checkpoint
from dsv4.training.feed import Feed
from dsv4.training.losses import Batch, components
from dsv4.training.optimizer import Optimizer, OptimizerSettings, is_indexer
from dsv4.training.schedule import StepPlan
from dsv4.training.trainer import Trainer, bits_per_byte, train_step

Make = Callable[..., Any]
WEIGHTS = {"lm": 1.0, "mtp": 0.3, "balance": 1e-4, "indexer": 1.0}


def snapshot(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def test_each_phase_trains_what_it_should(recipe: Make, tmp_path: Path) -> None:
    short = recipe("schedule.steps=3", "schedule.warmup=1", "schedule.dense_steps=1", "schedule.lengths=[[0, 64]]")
    trainer = Trainer(short, tmp_path)
    changed: list[set[str]] = []
    for _ in range(3):
        before = snapshot(trainer)
        trainer.advance()
        changed.append({name for name, tensor in snapshot(trainer).items() if not torch.equal(tensor, before[name])})
    trained = {name for name in before if not name.endswith("tid2eid")}
    indexer = {name for name in trained if is_indexer(name)}
    assert len(indexer) == 12  # two CSA layers: two projections, and four tensors of the compressor
    assert changed[0] == trained - indexer
    assert changed[1] == indexer
    assert changed[2] == trained


def test_loss_falls_on_a_learnable_stream(recipe: Make) -> None:
    """Counting upwards: every next token, and the one after, is determined."""
    config = recipe().model.config()
    model = dsv4.model.Transformer(config).init_weights(1)
    optimizer = Optimizer(model.named_parameters(), config, OptimizerSettings(matmul="float32"))
    plan = StepPlan(lr=4e-3, phase="sparse", length=40, mtp_weight=0.3, gamma=0.001)
    g = torch.Generator().manual_seed(0)
    seen = []
    for _ in range(40):
        ids = (torch.randint(0, 64, (8, 1), generator=g) + torch.arange(40)) % 64 + 100
        weights = torch.full(ids.shape, 1 / (8 * 39))
        weights[:, 0] = 0
        seen.append(train_step(model, [optimizer], [Batch(ids, torch.zeros_like(ids), weights)], plan, WEIGHTS, 1.0))
    assert seen[0]["lm"] > 6
    assert seen[-1]["lm"] < 1
    assert seen[-1]["mtp"] < 1
    assert seen[-1]["indexer"].isfinite()


def test_gradients_are_clipped_together(recipe: Make) -> None:
    """Scaling the loss beyond the clip leaves AdamW's moments the same; without a clip they would grow with it."""
    config = recipe().model.config()
    ids = torch.randint(3, 500, (2, 64), generator=torch.Generator().manual_seed(2))
    moments = []
    for factor, clip in ((1.0, 1e-3), (50.0, 1e-3), (50.0, 1e9)):
        model = dsv4.model.Transformer(config).init_weights(1)
        optimizer = Optimizer(model.named_parameters(), config, OptimizerSettings())
        plan = StepPlan(1e-3, "off", 64, 0.0, 0.0)
        batch = Batch(ids, torch.zeros_like(ids), torch.full(ids.shape, factor / ids.numel()))
        train_step(model, [optimizer], [batch], plan, {"lm": 1.0, "mtp": 0.0, "balance": 0.0}, clip)
        moments.append(optimizer.adamw.first.clone())  # type: ignore[union-attr]
    torch.testing.assert_close(moments[1], moments[0], rtol=1e-3, atol=1e-9)
    assert moments[2].norm() > 100 * moments[1].norm()


def test_bias_balancing_moves_against_the_load(recipe: Make) -> None:
    config = recipe().model.config()
    model = dsv4.model.Transformer(config).init_weights(1)
    optimizer = Optimizer(model.named_parameters(), config, OptimizerSettings())
    batches = []
    for first in (3, 300):  # two passes with different tokens: their loads count together
        ids = torch.randint(first, first + 30, (2, 64), generator=torch.Generator().manual_seed(first))
        batches.append(Batch(ids, torch.zeros_like(ids), torch.full(ids.shape, 0.5 / ids.numel())))
    parts = [components(model, batch, "sparse", True)[1] for batch in batches]
    loads = [sum(load) for load in zip(*parts)]
    mean = [load.float().mean() for load in loads]
    assert any(not torch.equal(torch.sign(2 * b - m), torch.sign(a + b - m)) for (a, b), m in zip(zip(*parts), mean))
    train_step(model, [optimizer], batches, StepPlan(1e-3, "sparse", 64, 0.3, 0.01), WEIGHTS, 1.0)
    gates = [block.ffn.gate for block in (*model.layers, *model.mtp) if block.layer.router == "learned"]
    assert len(gates) == len(loads) == 4
    for gate, load in zip(gates, loads):
        torch.testing.assert_close(gate.bias, 0.01 * torch.sign(load.float().mean() - load))


def test_run_folder_metrics_export(recipe: Make, tmp_path: Path) -> None:
    export = tmp_path / "model"
    Trainer(recipe(f"export={export}"), tmp_path / "run").run()
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"recipe.toml", "metrics.jsonl", "checkpoints", "loss.png", "run.json"}
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["tokens"] for row in rows] == [512 * n for n in range(1, 7)]
    phases = {row["step"]: row["phase_began"] for row in rows if "phase_began" in row}
    assert phases == {1: "dense", 3: "indexer warm-up", 4: "sparse"}
    assert [row["step"] for row in rows if "bits_per_byte" in row] == [3, 6]
    assert all(0 < row["bits_per_byte"] < 12 for row in rows if "bits_per_byte" in row)
    kept = [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")]
    assert kept == ["step-00000004", "step-00000006"]
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["tokens"] == 3072
    assert len(facts["data"]["manifest_sha256"]) == 64
    model, tokenizer = dsv4.load(export), dsv4.load_tokenizer(export)
    logits = model(torch.tensor([tokenizer.encode("import os")]))
    assert logits.shape[-1] == 512
    assert logits.isfinite().all()


def test_evaluation_counts_every_byte_once(recipe: Make, tmp_path: Path) -> None:
    """A model that knows nothing needs log2(vocabulary) bits per token, however the texts are batched."""
    trainer = Trainer(recipe(), tmp_path)
    texts = trainer.feed.heldout()
    with torch.no_grad():
        trainer.model.head.weight.zero_()
    tokens, size = sum(len(ids) - 1 for ids, _ in texts), sum(size for _, size in texts)
    for rows in (1, 2):
        assert bits_per_byte(trainer.model, texts, rows, "sparse") == pytest.approx(9 * tokens / size, rel=1e-5)


def test_evaluation_is_the_next_token_loss(recipe: Make, tmp_path: Path) -> None:
    """Against a plain loop, with a model that knows something."""
    trainer = Trainer(recipe("schedule.lengths=[[0, 64]]"), tmp_path)
    for _ in range(6):
        trainer.advance()
    texts = trainer.feed.heldout()
    nats = 0.0
    for text, _ in texts:
        ids = torch.tensor([text])
        with torch.no_grad():
            nats += float(F.cross_entropy(trainer.model(ids)[0, :-1], ids[0, 1:], reduction="sum"))
    expected = nats / math.log(2) / sum(size for _, size in texts)
    assert bits_per_byte(trainer.model, texts, 2, "sparse") == pytest.approx(expected, rel=1e-5)


def test_a_length_stage_begins_at_its_first_row(recipe: Make) -> None:
    feed = Feed(recipe())
    for stage, length in ((0, 64), (4, 128)):
        ids, documents, mask = feed._packing(stage, length).batch(1)
        batches = feed.batches(stage + 1)
        assert torch.equal(torch.cat([b.ids for b in batches]), torch.from_numpy(ids))
        assert torch.equal(torch.cat([b.documents for b in batches]), torch.from_numpy(documents))
        assert torch.equal(torch.cat([b.weights for b in batches]) > 0, torch.from_numpy(mask))
        assert sum(float(b.weights.sum()) for b in batches) == pytest.approx(1)


def test_resume_in_process_is_bit_exact(recipe: Make, tmp_path: Path) -> None:
    straight = Trainer(recipe(), tmp_path / "a")
    straight.run()
    for stop in (1, 2, 3, 5, None):  # in every phase, and once per process
        again = Trainer(recipe(), tmp_path / "b")
        again.run(stop)
    a, b = (load_file(tmp_path / run / "checkpoints" / "step-00000006" / "tensors.safetensors") for run in "ab")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "dsv4.cli", *map(str, arguments)]


def test_killed_run_continues_bit_for_bit(recipe_file: Path, tmp_path: Path) -> None:
    """Through the real command: kill -9 in the middle, start it again, compare with a run that nobody disturbed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    long = ["--set", "schedule.steps=9", "--set", "checkpoint_every=2"]
    straight = subprocess.Popen(command("train", recipe_file, "--runs", tmp_path / "a", *long), env=environment)
    metrics = tmp_path / "b" / "small" / "metrics.jsonl"
    for _ in range(5):  # a busy machine may look again only when all nine steps are over
        killed = subprocess.Popen(command("train", recipe_file, "--runs", tmp_path / "b", *long), env=environment)
        while len(read_metrics(metrics)) < 3 and killed.poll() is None:
            time.sleep(0.005)
        killed.send_signal(signal.SIGKILL)
        if killed.wait() == -signal.SIGKILL and 3 <= len(read_metrics(metrics)) < 9:
            break
        shutil.rmtree(tmp_path / "b")
    else:
        raise AssertionError("it was too fast to be killed")
    subprocess.run(command("train", recipe_file, "--runs", tmp_path / "b", *long), env=environment, check=True)
    assert straight.wait(120) == 0

    def final(run: str) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
        folder = tmp_path / run / "small"
        rows = [{k: v for k, v in row.items() if k != "tokens_per_s"} for row in read_metrics(folder / "metrics.jsonl")]
        return load_file(folder / "checkpoints" / "step-00000009" / "tensors.safetensors"), rows

    (a, rows_a), (b, rows_b) = final("a"), final("b")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert rows_a == rows_b
    assert len(rows_a) == 9


def test_a_checkpoint_is_complete_or_invisible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"x": torch.ones(3)}
    save_checkpoint(tmp_path, 1, tensors, {}, keep=2)
    (tmp_path / ".step-00000009.abc.tmp").mkdir()  # a writer that was killed

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="disk full while writing"):
        patched.setattr(Path, "write_text", full)
        save_checkpoint(tmp_path, 2, tensors, {}, keep=2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    for step in (2, 3, 4):
        save_checkpoint(tmp_path, step, tensors, {}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


def test_mistakes_are_one_clear_error(recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    Trainer(recipe(), run).run(stop=2)
    with pytest.raises(ValueError, match="begun with another recipe"):
        Trainer(recipe("optimizer.lr=1e-3"), run)
    with pytest.raises(ValueError, match="holds a run at step-00000002"):
        Trainer(recipe(), run, resume=False)
    (run / "checkpoints" / "step-00000002" / "tensors.safetensors").write_bytes(b"cut short")
    with pytest.raises(ValueError, match=r"step-00000002 is corrupt"):
        Trainer(recipe(), run)
    with pytest.raises(ValueError, match="nope"):
        recipe("model.preset=nope").model.config()
    with pytest.raises(ValueError, match="hiden_size"):
        recipe("model.changes.hiden_size=32").model.config()
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no CUDA device"):
            Trainer(recipe("device=cuda"), tmp_path / "cuda")
    shutil.rmtree(run)
    trainer = Trainer(recipe(), run)
    with torch.no_grad():
        trainer.model.embed.weight[:] = torch.nan
    with pytest.raises(ValueError, match="step 0: lm"):
        trainer.advance()


def test_command_line_errors_and_dry_run(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: object) -> tuple[int | str | None, str, str]:
        monkeypatch.setattr(sys, "argv", ["dsv4", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return (ended.value.code, *capsys.readouterr())

    monkeypatch.chdir(tmp_path)
    code, out, _ = run("train", recipe_file, "--dry-run", "--set", "optimizer.lr=0.5")
    assert code == 0
    assert "lr = 0.5" in out
    code, _, error = run("train", recipe_file, "--set", "optimizer.beta=1")
    assert code == 2
    assert error.strip().endswith("optimizer: unknown key 'beta'; did you mean 'betas'?")
    assert len(error.splitlines()) == 1
    code, _, error = run("sft", recipe_file)
    assert code == 2
    assert "use dsv4 train" in error
    assert not (tmp_path / "runs").exists()


def test_fine_tuning_starts_from_a_model(recipe: Make, tmp_path: Path) -> None:
    model = tmp_path / "model"
    Trainer(recipe(f"export={model}", "schedule.steps=4", "schedule.lengths=[[0, 64]]"), tmp_path / "pre").run()
    tuned = recipe(
        f"model.start={model}", "data.kind=tasks", "data.samples=40", "data.replay=0.1", "schedule.dense_steps=0",
        "schedule.indexer_steps=0", "schedule.steps=2", "schedule.warmup=0", "batch.tokens=2048",
        "batch.micro_tokens=1024", "schedule.lengths=[[0, 1024]]", f"export={tmp_path / 'tuned'}",
    )  # fmt: skip
    trainer = Trainer(tuned, tmp_path / "post")
    start = dsv4.load(model)
    assert all(torch.equal(p, dict(start.named_parameters())[n]) for n, p in trainer.model.named_parameters())
    batches = trainer.feed.batches(0)
    learned = sum(int((b.weights > 0).sum()) for b in batches)
    assert 0 < learned < 0.8 * sum(b.ids.numel() for b in batches), "prompts must not be learned"
    trainer.run()
    assert len(read_metrics(tmp_path / "post" / "metrics.jsonl")) == 2
    dsv4.load(tmp_path / "tuned")
