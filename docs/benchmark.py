"""Measures what the documentation says of speed and accuracy, and writes its tables.

python -m docs.benchmark           (all of them, some hours on 2 cores)
python -m docs.benchmark speed     (one of speed, ladder, workers, search)
python -m docs.benchmark gpu       (what needs a GPU, six minutes at most; it only prints)
python -m docs.benchmark reference usual-64 --seed 1 --log_dir logs    (one program of the ladder)

Machines are noisy, so programs that are compared take turns. What counts is the ratio.
"""

import argparse
import gc
import logging
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import optuna
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, PercentFormatter
from optuna.trial import FrozenTrial, TrialState
from optuna.visualization import matplotlib as plots
from pytorch_lightning.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint, TQDMProgressBar
from pytorch_lightning.loggers import TensorBoardLogger
from sqlalchemy import URL
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator, ScalarEvent
from torch import nn
from torch.utils.data import DataLoader, random_split
from torchvision.datasets import MNIST
from torchvision.transforms import Compose, Normalize, ToTensor

import sweep
from common.callbacks import GradientHistogramCallback, MetricsCallback, TestPicturesCallback
from common.classifier import Classifier
from common.data import DATA_DIR, MEAN, STD, TRAIN_SIZE, VAL_SIZE, MNISTDataModule, random_affine
from common.for_initialization.recorder import LossCurveCallback
from common.for_sweep.report import at_an_end, command_line
from common.for_sweep.study import open_study
from common.model import MLP

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / f"docs/{name}.md" for name in ("speed", "tuning")]
BATCH_SIZE = 512
STEPS, WARM_UP = 108, 5
OURS = "`medium` matrix products: `main.py`"
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
EPOCHS = 10
SEEDS = range(1, 6)
FRESH_SEEDS = range(11, 16)  # which have not selected anything
EPOCHS_OF_A_TRIAL = 5


class UsualClassifier(Classifier):
    """The same model as it is usually trained: Adam, ReLU, no schedule, no label smoothing."""

    def __init__(self, activation: str = "relu", label_smoothing: float = 0.0) -> None:
        super().__init__(MLP(activation=activation), 1e-3, 0.0, label_smoothing)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.hparams.learning_rate)


class UnfusedClassifier(Classifier):
    """The Lightning module of `main.py`, with the optimizer as it is usually written."""

    def configure_optimizers(self) -> dict[str, Any]:
        chosen = super().configure_optimizers()
        for group in chosen["optimizer"].param_groups:
            group["fused"] = False
        return chosen


class UsualDataModule(pl.LightningDataModule):
    """The data as nearly every example reads it: torchvision's transforms for each image."""

    def __init__(self, batch_size: int, num_workers: int = 0) -> None:
        super().__init__()
        self.options = {"batch_size": batch_size, "num_workers": num_workers, "persistent_workers": num_workers > 0}

    def setup(self, stage: str) -> None:
        transform = Compose([ToTensor(), Normalize((MEAN,), (STD,))])
        whole = MNIST(DATA_DIR, download=True, transform=transform)
        split = torch.Generator().manual_seed(0)
        self.train_set, self.val_set = random_split(whole, [TRAIN_SIZE, VAL_SIZE], generator=split)
        self.test_set = MNIST(DATA_DIR, train=False, transform=transform)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_set, shuffle=True, **self.options)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val_set, **self.options)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test_set, **self.options)


# What runs


def command(*arguments: str, **environment: str) -> tuple[str, float]:
    """What a Python command prints, and its seconds of wall time, on the CPU: the tables are about one."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "DISABLE_MPS": "1"} | environment
    start, words = time.perf_counter(), [sys.executable, *arguments]
    ended = subprocess.run(words, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    return ended.stdout, time.perf_counter() - start


def alternate(turns: int, programs: dict[str, Callable[[], float]], warm_up: int = 0) -> dict[str, list[float]]:
    """Runs the programs in turns, each turn in the other direction, and returns the figures of each after `warm_up`.

    So a machine that gets slower or faster meanwhile does so for all of them.
    """
    figures = {name: [] for name in programs}
    for turn in range(warm_up + turns):
        for name in list(programs)[:: 1 if turn % 2 else -1]:
            figures[name].append(programs[name]())
    return {name: values[warm_up:] for name, values in figures.items()}


def ratio(figures: list[float], base: list[float]) -> str:
    """The ratio of the medians, and in brackets between what the ratios of the middle half of the turns lie."""
    low, _, high = statistics.quantiles([ours / theirs for ours, theirs in zip(figures, base, strict=True)], n=4)
    return f"{statistics.median(figures) / statistics.median(base):.2f} ({low:.2f} to {high:.2f})"


def publish(mark: str, header: str, rows: list[str]) -> None:
    """Prints a table and puts it between its marks in the page that has them."""
    columns = header.count("|") - 1
    lines = [header, "|" + " --- |" * columns, *rows]
    print("\n" + "\n".join(lines))
    for page in PAGES:
        text = page.read_text()
        if f"<!-- {mark} -->\n" in text:
            start, end = text.index(f"<!-- {mark} -->\n"), text.index(f"<!-- /{mark} -->")
            page.write_text(f"{text[:start]}<!-- {mark} -->\n" + "\n".join(lines) + f"\n{text[end:]}")


# Speed: milliseconds of a step


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


def lightning_step(
    classifier: pl.LightningModule, data: pl.LightningDataModule, steps: int = STEPS, **options
) -> float:
    """Seconds of a step under Lightning's Trainer, without logger, bar and checkpoints unless `options` say so."""
    timer = StepTimer()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    quiet |= {"accelerator": "cpu", "limit_val_batches": 0, "enable_model_summary": False}
    options = quiet | options
    options["callbacks"] = [timer, *options.get("callbacks", [])]
    pl.Trainer(max_steps=steps, devices=1, **options).fit(classifier, data)
    return timer.total / timer.steps


class BarebonesClassifier(Classifier):
    """Times itself, because `barebones=True` allows neither callbacks nor self.log."""

    timer = None

    def log(self, *arguments, **options) -> None:
        pass

    def on_train_batch_end(self, outputs, batch, batch_idx: int) -> None:
        self.timer.on_train_batch_end(None, self, outputs, batch, batch_idx)


def barebones_step(data: MNISTDataModule) -> float:
    classifier = BarebonesClassifier(MLP())
    classifier.timer = StepTimer()
    pl.Trainer(max_steps=STEPS, accelerator="cpu", barebones=True).fit(classifier, data)
    return classifier.timer.total / classifier.timer.steps


def our_step(data: MNISTDataModule, accelerator: str = "cpu") -> float:
    """Seconds of a step as `main.py` takes it, with its callbacks, bar and logger."""
    folder = tempfile.mkdtemp()
    callbacks = [
        MetricsCallback(),
        TestPicturesCallback(),
        GradientHistogramCallback(),
        LearningRateMonitor(logging_interval="step"),
        EarlyStopping(monitor="accuracy/train"),
        ModelCheckpoint(folder, monitor="accuracy/train"),
        TQDMProgressBar(refresh_rate=20),
    ]
    loud = {"logger": TensorBoardLogger(folder), "enable_progress_bar": True, "enable_checkpointing": True}
    loud |= {"accelerator": accelerator, "log_every_n_steps": 20}
    return lightning_step(Classifier(MLP()), data, callbacks=callbacks, **loud)


def bare_step(data: MNISTDataModule, augment: bool, device: str = "cpu") -> float:
    """Seconds of a step of a loop in plain PyTorch over the same tensors."""
    images, labels = data.train_set.images.to(device), data.train_set.labels.to(device)
    model = MLP().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=STEPS)
    for step, indices in enumerate(torch.randperm(len(labels)).to(device).split(BATCH_SIZE), start=1):
        batch = random_affine(images[indices]) if augment else images[indices]
        loss = F.cross_entropy(model(batch), labels[indices], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step == WARM_UP:
            loss.item()  # waits for the device
            start = time.perf_counter()
    loss.item()
    return (time.perf_counter() - start) / (step - WARM_UP)


@torch.no_grad()
def products_step() -> float:
    """Seconds of a step's matrix products alone. The images need no gradient: the first layer has one less."""
    layers = [layer for layer in MLP().layers if isinstance(layer, nn.Linear)]
    batches = [
        (layer, torch.randn(BATCH_SIZE, layer.in_features), torch.randn(BATCH_SIZE, layer.out_features))
        for layer in layers
    ]
    for step in range(1, STEPS + 1):
        for layer, inputs, gradient in batches:
            _ = inputs @ layer.weight.T  # forward
            _ = gradient.T @ inputs  # the gradient of the weights
            if layer is not layers[0]:
                _ = gradient @ layer.weight  # the gradient of the inputs
        if step == WARM_UP:
            start = time.perf_counter()
    return (time.perf_counter() - start) / (STEPS - WARM_UP)


def at(matmul_precision: str, program: Callable[[], float]) -> float:
    torch.set_float32_matmul_precision(matmul_precision)
    return program()


def step_times() -> dict[str, list[float]]:
    """Seconds of a step in each turn, on a ladder from the usual example to `main.py`, one change at a time."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    plain, augmented = MNISTDataModule(augment=False), MNISTDataModule()
    for data in (plain, augmented):
        data.prepare_data()
        data.setup("fit")
    highest = {
        "usual example": lambda: lightning_step(UsualClassifier(), UsualDataModule(BATCH_SIZE), 30),
        "usual example, 2 workers": lambda: lightning_step(UsualClassifier(), UsualDataModule(BATCH_SIZE, 2), 60),
        "images as tensors, one index a batch": lambda: lightning_step(UnfusedClassifier(MLP()), plain),
        "fused optimizer": lambda: lightning_step(Classifier(MLP()), plain),
        "augmentation on the device": lambda: lightning_step(Classifier(MLP()), augmented),
        "callbacks, logger and bar": lambda: our_step(augmented),
    }
    medium = {
        OURS: lambda: our_step(augmented),
        "Lightning with `barebones=True`, augmented": lambda: barebones_step(augmented),
        "bare PyTorch loop, augmented": lambda: bare_step(augmented, augment=True),
        "bare PyTorch loop, not augmented": lambda: bare_step(plain, augment=False),
        "its matrix products alone": products_step,
    }
    programs = {name: partial(at, "highest", program) for name, program in highest.items()}
    programs |= {name: partial(at, "medium", program) for name, program in medium.items()}
    return alternate(7, programs, warm_up=1)


def speed() -> None:
    """A step on this processor, and on the same one when the arithmetic may use only AVX2."""
    columns = []
    for variables in ({}, AVX2):
        os.environ.update(variables)  # PyTorch reads them when it is imported, so each in a new process
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            columns.append(pool.submit(step_times).result())
        for name in variables:
            del os.environ[name]
    rows = []
    for name in columns[0]:
        cells = [
            f"{1e3 * statistics.median(times[name]):.1f} ms | {ratio(times[name], times[OURS])}" for times in columns
        ]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    publish("speed", "| a step of 512 images | as it is | ratio | with AVX2 | ratio |", rows)


# The ladder: seconds to an accuracy

# What each row adds to the one above, and its command.
LADDER = {
    "the usual example, batches of 64": "-m docs.benchmark reference usual-64",
    "batches of 512": "-m docs.benchmark reference usual-512",
    "one-cycle schedule, GELU, AdamW, label smoothing": "-m docs.benchmark reference schedule",
    "images as tensors": "-m docs.benchmark reference tensors",
    "augmentation on the device": "-m docs.benchmark reference augmentation",
    "callbacks": "main.py --matmul_precision highest",
    OURS: "main.py",
    "26 epochs": "main.py --max_epochs 26 --patience 26",
    "batch normalization": "main.py --batch_norm true --max_epochs 26 --patience 26",
    "16 epochs, learning rate 0.012": "main.py --batch_norm true --max_epochs 16 --patience 16 --learning_rate 0.012",
}
# The same training with matrix products of other kinds.
PRODUCTS = {
    "`--matmul_precision highest`": LADDER["callbacks"],
    "`medium`, the default": LADDER[OURS],
    "`--precision bf16-mixed`": "main.py --precision bf16-mixed",
}
GOALS = (0.98, 0.99, 0.993)


def reference(arguments: Sequence[str]) -> None:
    """Trains a rung of the ladder that is not `main.py`, started as a program of its own, so that imports count."""
    parser = argparse.ArgumentParser(prog="python -m docs.benchmark reference")
    parser.add_argument("name", choices=["usual-64", "usual-512", "schedule", "tensors", "augmentation"])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--log_dir", default="logs")
    chosen = parser.parse_args(arguments)
    pl.seed_everything(chosen.seed, verbose=False)
    in_memory = chosen.name in ("tensors", "augmentation")
    if in_memory:
        data = MNISTDataModule(seed=chosen.seed, augment=chosen.name == "augmentation")
    else:
        data = UsualDataModule(64 if chosen.name == "usual-64" else BATCH_SIZE)
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=TensorBoardLogger(chosen.log_dir, name="main"),
        callbacks=[MetricsCallback(), ModelCheckpoint(monitor="accuracy/val", mode="max")],
    )
    trainer.fit(UsualClassifier() if chosen.name.startswith("usual") else Classifier(MLP()), data)
    [test] = trainer.test(ckpt_path="best", datamodule=data, weights_only=True, verbose=False)
    print(f"test accuracy    {test['accuracy/test']:.2%}")


class Climb(NamedTuple):
    """Seconds from the start of a command to each goal that it reached, its test accuracy, and all its seconds."""

    reached: dict[float, float]
    test: float
    seconds: float


def climb(words: str, remaining: Iterator[int]) -> Climb:
    """Runs a Python command with the next seed."""
    folder, start = tempfile.mkdtemp(), time.time()
    test, seconds = trained(*words.split(), "--seed", str(next(remaining)), "--log_dir", folder)
    epochs = scalars(folder, "accuracy/val")
    reached = {
        goal: min(event.wall_time - start for event in epochs if event.value >= goal)
        for goal in GOALS
        if any(event.value >= goal for event in epochs)
    }
    return Climb(reached, test, seconds)


def to_goal(climbs: list[Climb], goal: float) -> str:
    """Median and range of the seconds, and how many got there, if not all did."""
    seconds = [each.reached[goal] for each in climbs if goal in each.reached]
    if not seconds:
        return "never"
    some = "" if len(seconds) == len(climbs) else f", {len(seconds)} of {len(climbs)}"
    return f"{statistics.median(seconds):.0f} s ({min(seconds):.0f} to {max(seconds):.0f}){some}"


def ladder() -> None:
    """Seconds to each goal, test accuracy and time of all rows, over five seeds."""
    programs = {words: partial(climb, words, iter(SEEDS)) for words in [*LADDER.values(), *PRODUCTS.values()]}
    climbs = alternate(len(SEEDS), programs)
    seconds = {words: [each.seconds for each in runs] for words, runs in climbs.items()}
    tests = {words: [each.test for each in runs] for words, runs in climbs.items()}

    def cells(words: str, base: str) -> str:
        accuracy = f"{statistics.mean(tests[words]):.2f} ± {statistics.stdev(tests[words]):.2f}"
        return f"{accuracy} | {statistics.median(seconds[words]):.0f} s | {ratio(seconds[words], seconds[base])}"

    rows = []
    for row, words in LADDER.items():
        goals = " | ".join(to_goal(climbs[words], goal) for goal in GOALS)
        rows.append(f"| {row} | `python {words}` | {goals} | {cells(words, LADDER[OURS])} |")
    goals = " | ".join(f"to {100 * goal:.3g} %" for goal in GOALS)
    publish("ladder", f"| the row adds | command | {goals} | test, in % | whole run | ratio |", rows)

    rows, base = [], next(iter(PRODUCTS.values()))
    for row, words in PRODUCTS.items():
        gains = [ours - theirs for ours, theirs in zip(tests[words], tests[base], strict=True)]
        rows.append(f"| {row} | {cells(words, base)} | {mean_and_error(gains)} |")
    publish("products", "| `main.py` with | test, in % | whole run | ratio | ahead of `highest` |", rows)


def scalars(folder: str, tag: str) -> list[ScalarEvent]:
    """All values of the run that is logged there."""
    events = EventAccumulator(f"{folder}/main/version_0", size_guidance={"scalars": 0})
    return events.Reload().Scalars(tag)


def trained(*words: str, **environment: str) -> tuple[float, float]:
    """Test accuracy in percent, which the Python command prints, and its seconds."""
    printed, seconds = command(*words, **environment)
    return float(re.search(r"test accuracy +([\d.]+)%", printed)[1]), seconds


def best_validation(folder: str) -> float:
    """Best validation accuracy in percent of the run that is logged there."""
    return 100 * max(event.value for event in scalars(folder, "accuracy/val"))


def mean_and_error(values: list[float]) -> str:
    """Mean and standard error."""
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values) / len(values) ** 0.5:.2f}"


# A GPU


class NoWaitCallback(pl.Callback):
    """Makes each step of an epoch but the first fail that waits for the GPU."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx: int) -> None:
        if batch_idx == 1:
            torch.cuda.set_sync_debug_mode("error")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx: int) -> None:
        if batch_idx == trainer.num_training_batches - 1:
            torch.cuda.set_sync_debug_mode("default")


def gpu() -> None:
    """What can be seen on a GPU only; where there is none, it does on the CPU what it can."""
    on_gpu = torch.cuda.is_available()
    print(torch.cuda.get_device_name() if on_gpu else "no GPU")
    if on_gpu:
        # The bar and the logger read numbers now and then, which waits. The last callback sees all others work.
        callbacks = [MetricsCallback(), GradientHistogramCallback(10**6), LossCurveCallback(), NoWaitCallback()]
        quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
        pl.Trainer(max_epochs=1, devices=1, callbacks=callbacks, **quiet).fit(Classifier(MLP()), MNISTDataModule())
        print("no step of an epoch has waited for the GPU")
    data = MNISTDataModule()
    data.setup("fit")
    for matmul_precision in ("highest", "medium"):
        bare = partial(bare_step, data, augment=True, device="cuda" if on_gpu else "cpu")
        programs = {"main.py": lambda: our_step(MNISTDataModule(), "auto"), "bare loop": bare}
        times = alternate(5, {name: partial(at, matmul_precision, program) for name, program in programs.items()}, 1)
        for name, seconds in times.items():
            print(f"a step of {name}, {matmul_precision}: {1e3 * statistics.median(seconds):.2f} ms")
    for options in ("--matmul_precision highest", "--matmul_precision medium", "--precision bf16-mixed"):
        words = ("main.py", "--seed", "1", "--log_dir", tempfile.mkdtemp(), *options.split())
        accuracy, seconds = trained(*words, CUDA_VISIBLE_DEVICES=os.environ.get("CUDA_VISIBLE_DEVICES", "0"))
        print(f"main.py {options}: {accuracy:.2f} %, {seconds:.0f} s")
    quick = [f"tests/test_{name}.py" for name in ("callbacks", "classifier", "data", "main", "model", "mistakes")]
    subprocess.run([sys.executable, "-m", "pytest", "-q", "-n", "4", *quick], cwd=ROOT, check=False)


# Studies


def open_sweep(folder: str, max_epochs: int) -> optuna.Study:
    url = URL.create("sqlite", database=f"{folder}/optuna.db")
    return open_study(url, "mnist", sweep.PRUNER, max_epochs)


def random_trials(count: int) -> list[dict[str, Any]]:
    """Parameters of trials from all over the search space."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    trials = [study.ask() for _ in range(count)]
    for trial in trials:
        sweep.suggest_hyperparameters(trial)
    return [trial.params for trial in trials]


def parallel_sweep(workers: int, threads: int) -> float:
    """Trials a minute while all workers are busy, of a sweep of 24 given trials of one epoch.

    The workers share the threads. The pruner shortens no trial of one epoch, so they are the same for all.
    """
    folder = tempfile.mkdtemp()
    Path(folder, "sweep").mkdir()
    study = open_sweep(f"{folder}/sweep", max_epochs=1)
    for params in random_trials(24):
        study.enqueue_trial(params)
    options = ("--n_trials", "24", "--max_epochs", "1", "--log_dir", folder)
    work = partial(command, "sweep.py", *options, OMP_NUM_THREADS=str(threads // workers))
    with ThreadPoolExecutor(workers) as pool:
        for worker in [pool.submit(work) for _ in range(workers)]:
            worker.result()
    # A worker's first trial pays for imports and loading, and after the last start the others run out of work.
    starts = sorted(trial.datetime_start for trial in study.trials)[4:]
    return 60 * (len(starts) - 1) / (starts[-1] - starts[0]).total_seconds()


def workers() -> None:
    """Measures what a second worker does for a sweep, and what a second thread does."""
    names = {(1, 1): "1 worker of 1 thread", (1, 2): "1 worker of 2 threads", (2, 2): "2 workers of 1 thread"}
    rates = alternate(4, {name: partial(parallel_sweep, *chosen) for chosen, name in names.items()})
    base = rates["1 worker of 2 threads"]
    rows = [
        f"| {name} | {statistics.median(rate):.1f} trials a minute | {ratio(rate, base)} |"
        for name, rate in rates.items()
    ]
    publish("workers", "| sweep of 24 trials | speed | ratio |", rows)


def seeded_objective(seed: int, patience: int = EPOCHS_OF_A_TRIAL) -> Callable[[optuna.Trial], float]:
    """The objective of `sweep.py`; without early stopping where the patience is not shorter."""
    options = {"data_dir": DATA_DIR, "folder": Path(tempfile.mkdtemp()), "accelerator": "cpu"}
    return partial(sweep.objective, max_epochs=EPOCHS_OF_A_TRIAL, patience=patience, seed=seed, **options)


def run_search(sampler: str, seed: int) -> optuna.Study:
    """A study of 20 trials with the baseline, search space and objective of `sweep.py`.

    TPE prunes as `sweep.py` does. GP learns from complete trials only, and what random search would do under a pruner
    can be told from its complete trials. So these two do not prune.
    """
    pruner, patience = (sweep.PRUNER, 3) if sampler == "TPE" else (optuna.pruners.NopPruner(), EPOCHS_OF_A_TRIAL)
    chosen = {
        "random": optuna.samplers.RandomSampler,
        "TPE": optuna.samplers.TPESampler,
        "GP": optuna.samplers.GPSampler,
    }
    study = optuna.create_study(direction="maximize", sampler=chosen[sampler](seed=seed), pruner=pruner)
    for number in range(sweep.BASELINE_TRIALS):
        study.enqueue_trial(sweep.BASELINE, user_attrs={"seed": seed + number})
    study.optimize(seeded_objective(seed, patience), n_trials=20, catch=FloatingPointError, gc_after_trial=True)
    return study


def train_again(params: dict[str, Any], seed: int) -> float:
    """Best validation accuracy of the same training from another seed."""
    accuracy = seeded_objective(seed)(optuna.trial.FixedTrial(params))
    gc.collect()  # as in run_trial
    return accuracy


def full_length(options: dict[str, Any], seed: int) -> tuple[float, float]:
    """Best validation accuracy and test accuracy, in percent, of `main.py` with its own epochs."""
    folder = tempfile.mkdtemp()
    words = shlex.split(command_line(options | {"seed": seed, "log_dir": folder}))
    test, _ = trained("main.py", *words, OMP_NUM_THREADS="1")
    return best_validation(folder), test


def complete_trials(study: optuna.Study) -> list[FrozenTrial]:
    """The best first."""
    return sorted(study.get_trials(states=[TrialState.COMPLETE]), key=lambda trial: -trial.value)


def epochs_of(study: optuna.Study) -> int:
    """Epochs of all trials but those that failed."""
    ended = study.get_trials(states=[TrialState.COMPLETE, TrialState.PRUNED])
    return sum(len(trial.intermediate_values) for trial in ended)


def replay(study: optuna.Study, pruner: optuna.pruners.BasePruner) -> optuna.Study:
    """The trials of a study that did not prune, as this pruner would have ended them."""
    # Hyperband draws from the name.
    replayed = optuna.create_study(study_name="replay", direction="maximize", pruner=pruner)
    for done in study.get_trials(states=[TrialState.COMPLETE]):
        trial = replayed.ask()
        for epoch, accuracy in done.intermediate_values.items():
            trial.report(accuracy, epoch)
            if trial.should_prune():
                replayed.tell(trial, state=TrialState.PRUNED)
                break
        else:
            replayed.tell(trial, done.value)
    return replayed


def publish_samplers(studies: dict[tuple[str, int], optuna.Study]) -> None:
    """What random search, TPE and GP find, and how many epochs they train for it."""
    random = {seed: studies["random", seed] for seed in SEEDS}
    searches = {
        "random": random,
        "random, pruned": {seed: replay(study, sweep.PRUNER) for seed, study in random.items()},
        "TPE, pruned: `sweep.py`": {seed: studies["TPE", seed] for seed in SEEDS},
        "GP": {seed: studies["GP", seed] for seed in SEEDS},
    }
    rows = []
    for name, found in searches.items():
        best = {seed: 100 * study.best_value for seed, study in found.items()}
        gain = mean_and_error([value - 100 * random[seed].best_value for seed, value in best.items()])
        epochs = statistics.mean(map(epochs_of, found.values()))
        each = ", ".join(f"{value:.2f}" for value in best.values())
        rows.append(f"| {name} | {epochs:.0f} | {each} | {mean_and_error([*best.values()])} | {gain} |")
    header = "| 20 trials | epochs | best of each seed, in % | mean | ahead of random |"
    publish("samplers", header, rows)


def publish_pruners(studies: list[optuna.Study]) -> None:
    """What pruners save and lose on the same random trials."""
    startup = {"n_startup_trials": sweep.BASELINE_TRIALS}
    pruners = {
        "none": optuna.pruners.NopPruner(),
        "top third: `sweep.py`": sweep.PRUNER,
        "top half: `MedianPruner`, after 3 trials": optuna.pruners.MedianPruner(**startup),
        "top half, not before the third epoch": optuna.pruners.MedianPruner(**startup, n_warmup_steps=2),
        "`SuccessiveHalvingPruner`": optuna.pruners.SuccessiveHalvingPruner(),
        "`HyperbandPruner`": optuna.pruners.HyperbandPruner(max_resource=EPOCHS_OF_A_TRIAL),
    }
    rows, all_epochs = [], sum(map(epochs_of, studies))
    for name, pruner in pruners.items():
        replayed = [replay(study, pruner) for study in studies]
        lost = [100 * (study.best_value - other.best_value) for study, other in zip(studies, replayed, strict=True)]
        saved = 1 - sum(map(epochs_of, replayed)) / all_epochs
        rows.append(f"| {name} | {saved:.0%} | {sum(loss > 0 for loss in lost)} of {len(lost)} | {max(lost):.2f} |")
    publish("pruners", "| pruner | epochs saved | best trial lost | at most, in points |", rows)


def publish_region(trials: list[FrozenTrial]) -> None:
    """Where the best random trials lie, and pictures of all: one parameter at a time, and accuracy against size."""
    study = optuna.create_study(direction="maximize")
    study.add_trials(trials)
    trials, rows = sorted(trials, key=lambda trial: -trial.value), []
    for chosen in (False, True):
        accuracies = [100 * trial.value for trial in trials if trial.params["batch_norm"] == chosen]
        rows.append(f"| {chosen} | {len(accuracies)} | {accuracies[0]:.2f} | {statistics.mean(accuracies[:5]):.2f} |")
    publish("question", "| `batch_norm` | trials | best, in % | mean of the best five |", rows)

    rows = []
    shown = (0.96, study.best_value + 0.001)  # worse ones leave the picture
    figure = Figure(figsize=(9, 5), layout="constrained")
    space = optuna.search_space.intersection_search_space(trials)
    for axis, (name, distribution) in zip(figure.subplots(2, 4, sharey=True).flat, space.items(), strict=True):
        values = [trial.params[name] for trial in trials]
        chosen = values[:10]
        if isinstance(distribution, optuna.distributions.CategoricalDistribution):
            searched = ", ".join(map(str, distribution.choices))
            found = ", ".join(f"{chosen.count(choice)} {choice}" for choice in distribution.choices)
            values = [distribution.choices.index(value) for value in values]
            axis.set_xticks(range(len(distribution.choices)), distribution.choices)
        else:
            searched = f"{distribution.low:g} to {distribution.high:g}"
            found = f"{min(chosen):.4g} to {max(chosen):.4g}"
            axis.set_xscale("log" if distribution.log else "linear")
        rows.append(f"| `{name}` | {searched} | {found} |")
        axis.scatter(values, [trial.value for trial in trials], s=12)
        axis.set(xlabel=name, ylim=shown)
        axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axis.grid(alpha=0.3)
    figure.supylabel("validation accuracy")
    figure.savefig(ROOT / "docs/slice.png", dpi=100)
    publish("region", f"| hyperparameter | searched | the best ten of {len(trials)} |", rows)

    both = optuna.create_study(directions=["maximize", "minimize"])
    for trial in trials:
        chosen = sweep.suggest_hyperparameters(trial)
        model = MLP(chosen["hidden_sizes"], batch_norm=chosen["batch_norm"])
        weights = sum(parameter.numel() for parameter in model.parameters())
        both.add_trial(optuna.trial.create_trial(values=[trial.value, weights]))
    axis = plots.plot_pareto_front(both, target_names=["validation accuracy", "weights"])
    axis.set(xlim=shown, title="")
    axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
    axis.yaxis.set_major_formatter(EngFormatter())
    axis.legend(["other trials", "Pareto front"])  # Optuna's "Best Trial" is each of several
    axis.figure.set_size_inches(9, 4.5)
    axis.figure.savefig(ROOT / "docs/pareto.png", dpi=100, bbox_inches="tight")


def publish_noise(trials: list[FrozenTrial], again: list[list[float]]) -> None:
    """The best trials of a search beside the same trainings from fresh seeds."""
    rows = []
    for trial, accuracies in zip(trials, again, strict=True):
        percent = [100 * accuracy for accuracy in accuracies]
        repeated = f"{statistics.mean(percent):.2f} | {statistics.stdev(percent):.2f}"
        rows.append(f"| {trial.number} | {100 * trial.value:.2f} | {repeated} |")
    publish("noise", "| trial | in the search, in % | mean of five fresh seeds | standard deviation |", rows)


def publish_winners(studies: list[optuna.Study], full: list[list[tuple[float, float]]]) -> None:
    """The defaults of `main.py` and the winners of the searches, all at full length."""
    rows, names = [], ["defaults of `main.py`", *(f"winner of seed {seed}" for seed in SEEDS)]
    for name, study, results in zip(names, [None, *studies], full, strict=True):
        validation, test = map(mean_and_error, zip(*results, strict=True))
        layers, in_search, ends = "768-384, no", "", ""
        if study:
            chosen = sweep.suggest_hyperparameters(study.best_trial)
            layers = "-".join(map(str, chosen["hidden_sizes"])) + (", yes" if chosen["batch_norm"] else ", no")
            in_search = f"{100 * study.best_value:.2f}"
            ends = ", ".join(f"{key} {end}" for key, end in at_an_end(complete_trials(study)).items())
        rows.append(f"| {name} | {layers} | {ends} | {in_search} | {validation} | {test} |")
    header = "| network | layers, normalized | at an end | in the search, in % | validation, full length | test |"
    publish("winners", header, rows)


def search() -> None:
    """Measures what searches find from the baseline on, what of it is noise, and what the winners are worth."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    # Two programs of one thread each, as no time counts here.
    options = {"mp_context": get_context("spawn"), "initializer": torch.set_num_threads, "initargs": (1,)}
    with ProcessPoolExecutor(2, **options) as pool:
        searches = product(("TPE", "random", "GP"), SEEDS)
        calls = {(name, seed): pool.submit(run_search, name, seed) for name, seed in searches}
        found = [calls["TPE", seed].result() for seed in SEEDS]
        best = complete_trials(found[0])[:5]
        again = [[pool.submit(train_again, trial.params, seed) for seed in FRESH_SEEDS] for trial in best]
        settings = [{}, *(sweep.suggest_hyperparameters(study.best_trial) for study in found)]
        full = [[pool.submit(full_length, chosen, seed) for seed in FRESH_SEEDS] for chosen in settings]

        studies = {key: call.result() for key, call in calls.items()}
        publish_samplers(studies)
        unpruned = [studies["random", seed] for seed in SEEDS]
        publish_pruners(unpruned)
        publish_region(
            [trial for study in unpruned for trial in complete_trials(study) if "seed" not in trial.user_attrs]
        )
        publish_noise(best, [[call.result() for call in row] for row in again])
        publish_winners(found, [[call.result() for call in row] for row in full])


if __name__ == "__main__":
    if sys.argv[1:2] == ["reference"]:
        reference(sys.argv[2:])
    elif sys.argv[1:] == ["gpu"]:
        gpu()
    else:
        tables = {"speed": speed, "ladder": ladder, "workers": workers, "search": search}
        for name in sys.argv[1:] or tables:
            tables[name]()
