"""`main.py`, run as a user would run it."""

import re
from itertools import chain
from pathlib import Path

import pytest
import torch

from common.callbacks import MetricsCallback
from common.classifier import Classifier
from main import main
from tests.conftest import read_events


def test_short_training_logs_what_the_readme_promises(script, tmp_path: Path):
    result = script("main.py", "--max_epochs", 1)
    assert result.returncode == 0, result.stderr
    assert "Warning" not in result.stderr
    assert "defaulting to" not in result.stderr  # which Lightning says of weights_only
    accuracy = float(re.search(r"test accuracy +([\d.]+)%", result.stdout)[1])
    assert accuracy > 90
    checkpoint = tmp_path / re.search(r"best checkpoint +(.+)", result.stdout)[1]
    assert Classifier.load_from_checkpoint(checkpoint, "cpu")(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    assert f"Loaded model weights from the checkpoint at {checkpoint.relative_to(tmp_path)}" in result.stderr
    assert "tensorboard --logdir logs" in result.stdout

    events = read_events(tmp_path / "logs/main/version_0")
    tags = events.Tags()
    promised = {f"{metric}/{stage}" for metric in ("loss", "accuracy") for stage in ("train", "val", "test")}
    assert promised | {"f1/val", "f1/test", "lr-AdamW", "gradient_norm/model.layers.1.weight"} <= set(tags["scalars"])
    assert "hp_metric" not in tags["scalars"]
    assert {"gradient/model.layers.1.weight", "gradient/model.layers.7.bias"} <= set(tags["histograms"])
    assert set(tags["images"]) == {"confusion/test", "mistakes/test"}
    assert events.Scalars("accuracy/test")[0].value == pytest.approx(accuracy / 100, abs=1e-4)
    # One-cycle: the learning rate rises to its peak and falls to almost nothing, along a curve that one can see.
    rates = [event.value for event in events.Scalars("lr-AdamW")]
    assert rates[0] < max(rates) > 10 * rates[-1]
    assert len(rates) >= 5


def test_run_under_slurm_is_a_new_one(call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Lightning goes on from any file of this name in the Trainer's folder."""
    for name, value in {"JOB_ID": "1", "NTASKS": "1", "PROCID": "0", "LOCALID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    (tmp_path / "hpc_ckpt_1.ckpt").touch()
    result = call(main, "--fast_dev_run", 1, "--accelerator", "cpu")
    assert result.returncode == 0, result.stderr


def test_every_option_reaches_what_it_names(call, monkeypatch: pytest.MonkeyPatch):
    trainers = []
    monkeypatch.setattr(MetricsCallback, "on_fit_start", lambda self, trainer, module: trainers.append(trainer))
    model = {"hidden_sizes": [8, 4], "activation": "tanh", "dropout": 0.25, "batch_norm": True}
    module = {"learning_rate": 0.01, "weight_decay": 0.3, "label_smoothing": 0.2}
    data = {"batch_size": 100, "seed": 7, "augment": False}
    trainer = {"precision": "64-true", "gradient_clip_val": 0.5, "accumulate_grad_batches": 2, "fast_dev_run": 3}
    others = {"patience": 2, "profiler": "simple", "accelerator": "cpu", "matmul_precision": "high"}
    options = model | module | data | trainer | others
    result = call(main, *chain(*((f"--{name}", value) for name, value in options.items())))
    assert result.returncode == 0, result.stderr
    assert torch.get_float32_matmul_precision() == "high"
    [seen] = trainers
    classifier = seen.lightning_module
    assert {name: classifier.model.arguments[name] for name in model} == model
    assert {name: classifier.hparams[name] for name in module} == module
    assert {name: seen.datamodule.hparams[name] for name in data} == data
    assert {name: getattr(seen, name) for name in trainer} == trainer
    assert seen.early_stopping_callback.patience == 2
    assert type(seen.profiler).__name__ == "SimpleProfiler"
    assert seen.strategy.root_device.type == "cpu"


def test_fast_dev_run_touches_every_stage_and_leaves_no_file(script, tmp_path: Path):
    result = script("main.py", "--fast_dev_run")
    assert result.returncode == 0, result.stderr
    assert "test accuracy" in result.stdout
    assert "Warning" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_overfit_batches_learns_its_batch_by_heart(script, tmp_path: Path):
    result = script("main.py", "--overfit_batches", 1, "--max_epochs", 60, "--hidden_sizes", "[64]")
    assert result.returncode == 0, result.stderr
    assert "Warning" not in result.stderr
    run = tmp_path / "logs/main/version_0"
    assert "augment: false" in (run / "hparams.yaml").read_text().splitlines()
    accuracies = [event.value for event in read_events(run).Scalars("accuracy/train")]
    assert len(accuracies) == 60
    assert accuracies[0] < 0.5
    assert accuracies[-1] == 1.0
