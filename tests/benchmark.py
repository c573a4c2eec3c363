"""Measures what the README says of speed and writes its tables: `python -m tests.benchmark`, 20 minutes on 2 cores.

Machines are noisy, so programs that are compared take turns, and what counts is the ratio of medians.
"""

import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint, TQDMProgressBar
from pytorch_lightning.loggers import TensorBoardLogger
from torch.utils.data import DataLoader
from torchvision.datasets import MNIST
from torchvision.transforms import Compose, Normalize, ToTensor

import common.study
import sweep
from common.callbacks import GradientHistogramCallback, MetricsCallback
from common.classifier import Classifier
from common.data import MEAN, STD, MNISTDataModule
from common.model import MLP
from common.study import run_trial

ROOT = Path(__file__).parent.parent
DATA, README = str(ROOT / "data"), ROOT / "README.md"
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
    """The same model and loss with the optimizer as it is usually written."""

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


def command(*arguments: str, **environment: str) -> float:
    """Seconds of wall time of a Python command."""
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=os.environ | environment, check=True, capture_output=True
    )
    return time.perf_counter() - start


def alternate(rounds: int, **programs: Callable[[], float]) -> dict[str, float]:
    """Runs the programs in turns and returns the median of each."""
    times = {name: [] for name in programs}
    for _ in range(rounds):
        for name, program in programs.items():
            times[name].append(program())
    return {name: statistics.median(values) for name, values in times.items()}


def publish(mark: str, rows: list[str]) -> None:
    """Prints a table and puts it between its marks in the README."""
    print("\n" + "\n".join(rows))
    text = README.read_text()
    start, end = text.index(f"<!-- {mark} -->\n"), text.index(f"<!-- /{mark} -->")
    README.write_text(f"{text[:start]}<!-- {mark} -->\n" + "\n".join(rows) + f"\n{text[end:]}")


def open_study(storage: str, max_epochs: int) -> optuna.Study:
    return common.study.open_study(storage, "mnist", sweep.PRUNER, sweep.suggest_hyperparameters, max_epochs)


def random_trials(count: int) -> list[dict[str, Any]]:
    """Parameters of trials from all over the search space."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    trials = [study.ask() for _ in range(count)]
    for trial in trials:
        sweep.suggest_hyperparameters(trial)
    return [trial.params for trial in trials]


def parallel_sweep(workers: int, threads: int) -> tuple[float, float]:
    """Trials a minute while all workers are busy, and seconds of the whole command, of a sweep of 24 given trials.

    The workers share the threads. Each trial has one epoch: so the pruner shortens none, and whoever runs them, they
    are the same trials.
    """
    folder = tempfile.mkdtemp()
    Path(folder, "sweep").mkdir()
    study = open_study(f"sqlite:///{folder}/sweep/optuna.db", max_epochs=1)
    for params in random_trials(24):
        study.enqueue_trial(params)
    options = ("--n_trials", "24", "--max_epochs", "1", "--workers", str(workers), "--log_dir", folder)
    seconds = command("sweep.py", *options, OMP_NUM_THREADS=str(threads))
    # A worker's first trial pays for imports and loading, and after the last start the others run out of work.
    starts = sorted(trial.datetime_start for trial in study.trials)[4:]
    return 60 * (len(starts) - 1) / (starts[-1] - starts[0]).total_seconds(), seconds


class TimedDataModule(MNISTDataModule):
    """Adds up the seconds that loading takes, and notes what share of each trial they are."""

    def __init__(self, data_dir: str) -> None:
        super().__init__(data_dir)
        self.loading, self.shares = 0.0, []

    def setup(self, stage: str) -> None:
        start = time.perf_counter()
        super().setup(stage)
        self.loading += time.perf_counter() - start

    def note_share(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        self.shares.append(self.loading / trial.duration.total_seconds())
        self.loading = 0.0


def search(data: TimedDataModule, seed: int, at_full_length: list[dict[str, Any]] | None = None) -> optuna.Study:
    """A study of 20 trials as `sweep.py --seed` runs it, or of given trials without pruning and early stopping."""
    folder = tempfile.mkdtemp()
    study = open_study(f"sqlite:///{folder}/optuna.db", max_epochs=5)
    options = {"folder": folder, "max_epochs": 5, "patience": 3, "seed": seed, "accelerator": "cpu"}
    if at_full_length:
        study.pruner = optuna.pruners.NopPruner()
        options["patience"] = options["max_epochs"]
    for params in at_full_length or []:
        study.enqueue_trial(params)
    objective = partial(sweep.objective, data=data, **options)
    run_next = partial(run_trial, objective=objective, n_trials=20, seed=seed, baseline=sweep.BASELINE)
    study.optimize(run_next, n_trials=20, catch=Exception, callbacks=[data.note_share])
    return study


def workers() -> None:
    """Measures what a second worker does for a sweep, and what a second thread does."""
    runs = {(1, 1): [], (1, 2): [], (2, 2): []}
    for chosen in list(runs) * 3:
        runs[chosen].append(parallel_sweep(*chosen))
    rate, wall = ({chosen: statistics.median(run[i] for run in runs[chosen]) for chosen in runs} for i in (0, 1))
    names = {(1, 1): "1 worker of 1 thread", (1, 2): "1 worker of 2 threads", (2, 2): "2 workers of 1 thread"}
    publish(
        "workers",
        [
            "| sweep of 24 trials | all at work | ratio | with start and end | ratio |",
            "| --- | --- | --- | --- | --- |",
            *(
                f"| {name} | {rate[chosen]:.1f} trials a minute | {rate[chosen] / rate[1, 2]:.2f}"
                f" | {wall[chosen]:.0f} s | {wall[chosen] / wall[1, 2]:.2f} |"
                for chosen, name in names.items()
            ),
        ],
    )


def pruning() -> None:
    """Measures what pruning, early stopping and shared data do for a sweep."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    data = TimedDataModule(DATA)
    data.prepare_data()
    data.setup("fit")  # a worker's first trial pays for this
    data.loading = 0.0
    pruned, full = [], []
    for seed in (42, 43):
        pruned.append(search(data, seed))
        full.append(search(data, seed, at_full_length=[trial.params for trial in pruned[-1].trials]))
    steps, all_steps = (
        sum(trial.user_attrs.get("steps", 0) for study in studies for trial in study.trials)
        for studies in (pruned, full)
    )
    best, all_best = (statistics.mean(study.best_value for study in studies) for studies in (pruned, full))
    publish(
        "pruning",
        [
            "| two studies of 20 trials | training steps | ratio | best validation accuracy, mean |",
            "| --- | --- | --- | --- |",
            f"| at full length | {all_steps} | 1.00 | {all_best:.2%} |",
            f"| pruned and stopped early | {steps} | {steps / all_steps:.2f} | {best:.2%} |",
        ],
    )
    print(f"loading takes at most {max(data.shares):.1%} of a trial")


def steps() -> None:
    """Measures what a training step and a whole run take, ours and others'."""
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
    )
    of_step = {
        "usual example, a step": step["usual"],
        "bare PyTorch loop, a step": step["bare"],
        "`main.py` without our callbacks, a step": step["without"],
        "`main.py`, a step": step["ours"],
    }
    of_run = {
        "usual example, 3 epochs and test": whole["usual"],
        "`main.py`, 10 epochs and test": whole["ours"],
    }
    publish(
        "steps",
        [
            "| program | time | ratio |",
            "| --- | --- | --- |",
            *(f"| {name} | {time * 1e3:.1f} ms | {time / step['ours']:.2f} |" for name, time in of_step.items()),
            *(f"| {name} | {time:.1f} s | {time / whole['ours']:.2f} |" for name, time in of_run.items()),
        ],
    )


if __name__ == "__main__":
    steps()
    workers()
    pruning()
