"""Measures what the README says of speed: `python -m tests.benchmark`, about ten minutes on 2 cores.

Machines are noisy, so programs that are compared take turns in one process, and what counts is the ratio of medians.
"""

import logging
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import optuna
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint, TQDMProgressBar
from pytorch_lightning.loggers import TensorBoardLogger
from torch.utils.data import DataLoader
from torchvision.datasets import MNIST
from torchvision.transforms import Compose, Normalize, ToTensor

import sweep
from common.callbacks import GradientHistogramCallback, MetricsCallback
from common.classifier import Classifier
from common.data import MEAN, STD, MNISTDataModule
from common.model import MLP

ROOT = Path(__file__).parent.parent
DATA = str(ROOT / "data")
BATCH_SIZE = 512
WARM_UP = 5


class StepTimer(pl.Callback):
    """Seconds of a step: data, training, logging and progress bar, but not what is done once per epoch."""

    def __init__(self) -> None:
        self.total = self.steps = 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        now = time.perf_counter()
        if batch_idx >= WARM_UP:
            self.total += now - self.last
            self.steps += 1
        self.last = now


class UsualClassifier(Classifier):
    """The same model and loss with the optimiser as it is usually written."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.learning_rate)


def usual_loader(train: bool = True) -> DataLoader:
    """The data as nearly every example reads it."""
    dataset = MNIST(DATA, train=train, transform=Compose([ToTensor(), Normalize((MEAN,), (STD,))]))
    return DataLoader(dataset, batch_size=BATCH_SIZE, shuffle=train)


def usual_example(epochs: int) -> None:
    """What a reader would run otherwise: train, then test."""
    classifier = UsualClassifier(MLP())
    trainer = pl.Trainer(max_epochs=epochs, accelerator="cpu", default_root_dir=tempfile.mkdtemp())
    trainer.fit(classifier, usual_loader())
    trainer.test(classifier, usual_loader(train=False))


def lightning_step(classifier: pl.LightningModule, data: object, steps: int, **options) -> float:
    """Seconds of a step under Lightning's Trainer."""
    timer = StepTimer()
    callbacks = [timer, *options.pop("callbacks", [])]
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        callbacks=callbacks,
        enable_model_summary=False,
        limit_val_batches=0,
        **options,
    )
    trainer.fit(classifier, data)
    return timer.total / timer.steps


def usual_step() -> float:
    """Seconds of a step of the usual example, without bar or logger."""
    return lightning_step(
        UsualClassifier(MLP()), usual_loader(), 30, logger=False, enable_progress_bar=False, enable_checkpointing=False
    )


def our_step(data: MNISTDataModule, callbacks: bool) -> float:
    """Seconds of a step as `main.py` takes it, over two epochs, with its bar and logger; callbacks on or off."""
    folder = tempfile.mkdtemp()
    chosen = [TQDMProgressBar(refresh_rate=20)]
    if callbacks:
        chosen += [MetricsCallback(), GradientHistogramCallback(), LearningRateMonitor(logging_interval="step")]
        chosen += [EarlyStopping(monitor="accuracy/train"), ModelCheckpoint(folder, monitor="accuracy/train")]
    return lightning_step(
        Classifier(MLP()),
        data,
        2 * 108,
        callbacks=chosen,
        logger=TensorBoardLogger(folder),
        enable_checkpointing=callbacks,
        log_every_n_steps=20,
    )


def bare_step(data: MNISTDataModule) -> float:
    """Seconds of a step of a loop in plain PyTorch over the same tensors."""
    images, labels = data.train_set.images, data.train_set.labels
    model, steps, step = MLP(), 2 * 108, 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=6e-3, total_steps=steps)
    while step < steps:
        for indices in torch.randperm(len(labels)).split(BATCH_SIZE):
            loss = F.cross_entropy(model(images[indices]), labels[indices], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            step += 1
            if step == WARM_UP:
                start = time.perf_counter()
    return (time.perf_counter() - start) / (step - WARM_UP)


def command(*arguments: str) -> float:
    """Seconds of wall time of a Python command."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, capture_output=True)
    return time.perf_counter() - start


def alternate(rounds: int, **programs: Callable[[], float]) -> dict[str, float]:
    """Runs the programs in turns and returns the median of each."""
    times = {name: [] for name in programs}
    for _ in range(rounds):
        for name, program in programs.items():
            times[name].append(program())
    return {name: statistics.median(values) for name, values in times.items()}


def trials_a_minute(workers: int) -> float:
    """Trials a minute of a sweep, from the start of its first to the end of its last."""
    folder = tempfile.mkdtemp()
    command("sweep.py", "--n_trials", "8", "--max_epochs", "3", "--workers", str(workers), "--log_dir", folder)
    study = optuna.load_study(study_name="mnist", storage=f"sqlite:///{folder}/sweep/optuna.db")
    trials = [trial for trial in study.trials if trial.state.is_finished()]
    start, end = min(trial.datetime_start for trial in trials), max(trial.datetime_complete for trial in trials)
    return 60 * len(trials) / (end - start).total_seconds()


class TimedDataModule(MNISTDataModule):
    """Adds up the seconds that loading takes."""

    loading = 0.0

    def setup(self, stage: str) -> None:
        start = time.perf_counter()
        super().setup(stage)
        self.loading += time.perf_counter() - start


def sweep_steps(stop_early: bool) -> tuple[int, float, float]:
    """Training steps and best accuracy of 20 trials, and the largest share of its time that a trial spent loading."""
    study = sweep.open_study(f"sqlite:///{tempfile.mkdtemp()}/optuna.db", "mnist", max_epochs=5)
    if not stop_early:
        study.pruner = optuna.pruners.NopPruner()
    data, shares = TimedDataModule(DATA), []
    data.setup("fit")  # a worker's first trial pays for this

    def objective(trial: optuna.Trial) -> float:
        study.sampler = optuna.samplers.TPESampler(seed=trial.number)
        start, loaded = time.perf_counter(), data.loading
        try:
            options = {"max_epochs": 5, "patience": 3 if stop_early else 5, "seed": 0, "accelerator": "cpu"}
            return sweep.objective(trial, data, tempfile.mkdtemp(), **options)
        finally:
            shares.append((data.loading - loaded) / (time.perf_counter() - start))

    study.optimize(objective, n_trials=20)
    return sum(trial.user_attrs["steps"] for trial in study.trials), study.best_value, max(shares)


def sweeps() -> None:
    """Prints what workers, pruning and shared data do for a sweep."""
    rate = alternate(2, one=lambda: trials_a_minute(1), two=lambda: trials_a_minute(2))
    (steps, best, share), (all_steps, all_best, _) = sweep_steps(True), sweep_steps(False)
    print("\n| sweep | | ratio |\n| --- | --- | --- |")
    print(f"| 1 worker of 2 threads | {rate['one']:.1f} trials a minute | 1.00 |")
    print(f"| 2 workers of 1 thread | {rate['two']:.1f} trials a minute | {rate['two'] / rate['one']:.2f} |")
    print(f"| 20 trials at full length | {all_steps} steps, best {all_best:.2%} | 1.00 |")
    print(f"| pruned and stopped early | {steps} steps, best {best:.2%} | {steps / all_steps:.2f} |")
    print(f"| loading, of a trial's time at most | {share:.1%} | |")


def steps() -> None:
    """Prints what a training step and a whole run take, ours and others'."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    data = MNISTDataModule(DATA, BATCH_SIZE)
    data.prepare_data()
    data.setup("fit")

    step = alternate(
        5,
        usual=usual_step,
        bare=lambda: bare_step(data),
        ours=lambda: our_step(data, callbacks=True),
        without=lambda: our_step(data, callbacks=False),
    )
    logs = tempfile.mkdtemp()
    whole = alternate(
        3,
        usual=lambda: command("-c", "from tests.benchmark import usual_example; usual_example(3)"),
        ours=lambda: command("main.py", "--log_dir", logs),
        help=lambda: command("main.py", "--help"),
    )
    print("\n| program | time | ratio |\n| --- | --- | --- |")
    for name, seconds in {
        "usual example, a step": step["usual"],
        "bare PyTorch loop, a step": step["bare"],
        "`main.py` without our callbacks, a step": step["without"],
        "`main.py`, a step": step["ours"],
    }.items():
        print(f"| {name} | {seconds * 1e3:.1f} ms | {seconds / step['ours']:.2f} |")
    for name, seconds in {
        "usual example, 3 epochs and test": whole["usual"],
        "`main.py`, 10 epochs and test": whole["ours"],
        "`main.py --help`": whole["help"],
    }.items():
        print(f"| {name} | {seconds:.1f} s | {seconds / whole['ours']:.2f} |")


if __name__ == "__main__":
    steps()
    sweeps()
