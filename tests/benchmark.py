"""Measures what the documentation says of speed and accuracy, and writes its tables.

python -m tests.benchmark           (all of them, two hours on 2 cores)
python -m tests.benchmark speed     (one of speed, time, seeds, long, accuracy, workers, search)

Machines are noisy, so programs that are compared take turns, and what counts is the ratio of medians.
"""

import json
import logging
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint, TQDMProgressBar
from pytorch_lightning.loggers import TensorBoardLogger
from sqlalchemy import URL
from torch import Tensor
from torch.utils.data import DataLoader, random_split
from torchvision.datasets import MNIST
from torchvision.transforms import Compose, Normalize, ToTensor

import common.study
import sweep
from common.callbacks import GradientHistogramCallback, MetricsCallback, TestPicturesCallback
from common.classifier import Classifier
from common.data import DATA_DIR, MEAN, STD, TRAIN_SIZE, VAL_SIZE, MNISTDataModule, random_affine
from common.model import MLP
from common.study import run_trial
from tests.conftest import ROOT, read_events

PAGES = [ROOT / "README.md", ROOT / "docs/speed.md", ROOT / "docs/accuracy.md"]
BATCH_SIZE = 512
WARM_UP = 5
EPOCHS = 10
SEEDS = range(1, 6)
# Seeds whose trials are run once more without pruning and early stopping, which takes long.
FULL_LENGTH = (1, 2)


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
        whole = MNIST(DATA_DIR, transform=transform)
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


def command(*arguments: str, **environment: str) -> float:
    """Seconds of wall time of a Python command."""
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=os.environ | environment, check=True, capture_output=True
    )
    return time.perf_counter() - start


def alternate(rounds: int, programs: dict[str, Callable[[], float]]) -> dict[str, float]:
    """Runs the programs in turns and returns the median of each."""
    times = {name: [] for name in programs}
    for _ in range(rounds):
        for name, program in programs.items():
            times[name].append(program())
    return {name: statistics.median(values) for name, values in times.items()}


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


def lightning_step(classifier: pl.LightningModule, data: pl.LightningDataModule, steps: int = 216, **options) -> float:
    """Seconds of a step under Lightning's Trainer, without logger, bar and checkpoints unless `options` say so."""
    timer = StepTimer()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    options = quiet | {"limit_val_batches": 0, "enable_model_summary": False} | options
    options["callbacks"] = [timer, *options.get("callbacks", [])]
    pl.Trainer(max_steps=steps, accelerator="cpu", **options).fit(classifier, data)
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
    pl.Trainer(max_steps=216, accelerator="cpu", barebones=True).fit(classifier, data)
    return classifier.timer.total / classifier.timer.steps


def our_step(data: MNISTDataModule) -> float:
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
    return lightning_step(Classifier(MLP()), data, callbacks=callbacks, log_every_n_steps=20, **loud)


def bare_step(data: MNISTDataModule, augment: bool) -> float:
    """Seconds of a step of a loop in plain PyTorch over the same tensors."""
    images, labels = data.train_set.images, data.train_set.labels
    model, steps, step = MLP(), 216, 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    while step < steps:
        for indices in torch.randperm(len(labels)).split(BATCH_SIZE):
            batch = random_affine(images[indices]) if augment else images[indices]
            loss = F.cross_entropy(model(batch), labels[indices], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            step += 1
            if step == WARM_UP:
                start = time.perf_counter()
    return (time.perf_counter() - start) / (step - WARM_UP)


def speed() -> None:
    """A ladder from the usual example to `main.py`, one change at a time."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    plain, augmented = MNISTDataModule(augment=False), MNISTDataModule()
    for data in (plain, augmented):
        data.prepare_data()
        data.setup("fit")
    ms = alternate(
        3,
        {
            "usual example": lambda: lightning_step(UsualClassifier(), UsualDataModule(BATCH_SIZE), 30),
            "usual example, 2 workers": lambda: lightning_step(UsualClassifier(), UsualDataModule(BATCH_SIZE, 2), 60),
            "images as tensors, one index a batch": lambda: lightning_step(UnfusedClassifier(MLP()), plain),
            "fused optimizer": lambda: lightning_step(Classifier(MLP()), plain),
            "augmentation on the device": lambda: lightning_step(Classifier(MLP()), augmented),
            "callbacks, logger and bar: `main.py`": lambda: our_step(augmented),
            "Lightning with `barebones=True`, augmented": lambda: barebones_step(augmented),
            "bare PyTorch loop, augmented": lambda: bare_step(augmented, augment=True),
            "bare PyTorch loop, not augmented": lambda: bare_step(plain, augment=False),
        },
    )
    ours = ms["callbacks, logger and bar: `main.py`"]
    rows = [f"| {name} | {value * 1e3:.1f} ms | {value / ours:.2f} |" for name, value in ms.items()]
    publish("speed", "| a step of 512 images | time | ratio |", rows)


# Accuracy, and the time to it


def reference(name: str, folder: str, epochs: int = EPOCHS) -> None:
    """Trains one rung of the ladder of accuracy; started as a program of its own, so that imports count."""
    pl.seed_everything(1, verbose=False)
    batch_size = 64 if name == "batches of 64" else BATCH_SIZE
    usual = name.startswith("batches")
    classifier = UsualClassifier() if usual else Classifier(MLP())
    in_memory = name in ("images as tensors", "augmentation")
    data = MNISTDataModule(augment=name == "augmentation") if in_memory else UsualDataModule(batch_size)
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=TensorBoardLogger(folder, name="main", version=0),
        callbacks=[MetricsCallback(), ModelCheckpoint(monitor="accuracy/val", mode="max")],
    )
    trainer.fit(classifier, data)
    trainer.test(ckpt_path="best", datamodule=data, weights_only=True)


def curve(*arguments: str, folder: str) -> tuple[dict[float, float], float]:
    """Seconds from the start of a command to each validation accuracy, and its test accuracy."""
    start = time.time()
    command(*arguments)
    events = read_events(Path(folder, "main/version_0"))
    reached = {event.value: event.wall_time - start for event in reversed(events.Scalars("accuracy/val"))}
    return reached, events.Scalars("accuracy/test")[0].value


def to_accuracy() -> None:
    """Test accuracy after ten epochs, and seconds until the validation accuracy is first so high."""
    programs = {
        "usual example, batches of 64": "batches of 64",
        "usual example, batches of 512": "batches of 512",
        "one-cycle schedule, GELU, AdamW, label smoothing": "schedule",
        "images as tensors": "images as tensors",
        "augmentation on the device": "augmentation",
    }
    rows = []
    for shown, name in [*programs.items(), ("`main.py`", None)]:
        folder = tempfile.mkdtemp()
        if name:
            call = f"from tests.benchmark import reference; reference({name!r}, {folder!r})"
            reached, test = curve("-c", call, folder=folder)
        else:
            reached, test = curve("main.py", "--seed", "1", "--log_dir", folder, folder=folder)
        cells = []
        for goal in (0.975, 0.98, 0.985, 0.99):
            seconds = [second for accuracy, second in reached.items() if accuracy >= goal]
            cells.append(f"{min(seconds):.0f} s" if seconds else "never")
        rows.append(f"| {shown} | {test:.2%} | {' | '.join(cells)} |")
    publish("time", "| ten epochs | test accuracy | to 97.5 % | to 98 % | to 98.5 % | to 99 % |", rows)


def run_main(*options: str) -> tuple[float, float]:
    """Test accuracy and seconds of `main.py`."""
    start = time.perf_counter()
    words = [sys.executable, "main.py", "--log_dir", tempfile.mkdtemp(), *options]
    printed = subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return float(re.search(r"test accuracy +([\d.]+)%", printed)[1]), time.perf_counter() - start


def seeds() -> None:
    """Test accuracy of the default run over five seeds, and its time beside three epochs of the usual example."""
    accuracies, remaining = [], iter(SEEDS)

    def ours() -> float:
        accuracy, seconds = run_main("--seed", str(next(remaining)))
        accuracies.append(accuracy)
        return seconds

    def usual(name: str) -> float:
        return command(
            "-c", f"from tests.benchmark import reference; reference({name!r}, {tempfile.mkdtemp()!r}, epochs=3)"
        )

    times = alternate(
        len(SEEDS),
        {
            "`main.py`, 10 epochs, seeds 1 to 5": ours,
            "usual example, batches of 64, 3 epochs": partial(usual, "batches of 64"),
            "usual example, batches of 512, 3 epochs": partial(usual, "batches of 512"),
        },
    )
    reached = [f"{statistics.mean(accuracies):.2f} % ± {statistics.stdev(accuracies):.2f}", "", ""]
    base = next(iter(times.values()))
    rows = [
        f"| {name} | {accuracy} | {seconds:.0f} s | {seconds / base:.2f} |"
        for (name, seconds), accuracy in zip(times.items(), reached, strict=True)
    ]
    publish("seeds", "| program | test accuracy | time | ratio |", rows)


def long() -> None:
    """What `main.py` reaches by options alone within one, three and ten minutes."""
    rows = []
    for shown in (
        '`python main.py --seed 1 --hidden_sizes "[768,384]" --max_epochs 26 --patience 26`',
        '`python main.py --seed 1 --hidden_sizes "[1024,512]" --max_epochs 58 --patience 58`',
        '`python main.py --seed 1 --hidden_sizes "[1024,512]" --max_epochs 190 --patience 190`',
    ):
        accuracy, seconds = run_main(*shlex.split(shown.strip("`"))[2:])
        rows.append(f"| {shown} | {accuracy:.2f} % | {seconds / 60:.1f} minutes |")
    publish("long", "| command | test accuracy | time |", rows)


# The ladder of accuracy

LADDER = {
    "`main.py`": "",
    "26 epochs": "--max_epochs 26 --patience 26",
    "26 epochs, batch normalization": "--max_epochs 26 --patience 26 --batch_norm true",
    "40 epochs, with elastic distortion too": "--max_epochs 40 --patience 40 --batch_norm true --elastic 0.5",
    "100 epochs of the same": "--max_epochs 100 --patience 100 --batch_norm true --elastic 0.5",
}
SHORTER, LONGER = list(LADDER)[-2:]


@torch.no_grad()
def average(networks: list[Classifier], images: Tensor) -> Tensor:
    """Mean of the networks' class probabilities."""
    return torch.stack([network(images).softmax(dim=1) for network in networks]).mean(dim=0)


class DistilledClassifier(Classifier):
    """Learns the average of its teachers instead of the labels."""

    teachers = ()  # in a tuple they are no submodules

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        images, y = batch
        y_pred = self(images)
        loss = F.cross_entropy(y_pred, average(self.teachers, images))
        return {"loss": loss, "y": y, "y_pred": y_pred.detach()}


def distill(teachers: list[Classifier], seed: int) -> tuple[float, float]:
    """Test accuracy and seconds of a network of the same size and training that learns from the teachers."""
    start = time.perf_counter()
    pl.seed_everything(seed, verbose=False)
    student, data = DistilledClassifier(MLP(batch_norm=True)), MNISTDataModule(seed=seed, elastic=0.5)
    student.teachers = tuple(teachers)
    best = ModelCheckpoint(tempfile.mkdtemp(), monitor="accuracy/val", mode="max")
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(max_epochs=40, accelerator="cpu", callbacks=[MetricsCallback(), best], **quiet)
    trainer.fit(student, data)
    [test] = trainer.test(student, data, ckpt_path="best", weights_only=True, verbose=False)
    return 100 * test["accuracy/test"], time.perf_counter() - start


def mean_and_error(values: list[float]) -> str:
    """Mean and standard error."""
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values) / len(values) ** 0.5:.2f}"


def accuracy_ladder() -> None:
    """Test accuracy over five seeds from the default run on, of averages of five, and of a network that one teaches."""
    folder, runs, data = Path(tempfile.mkdtemp()), {name: [] for name in LADDER}, MNISTDataModule()
    for seed in SEEDS:  # the programs take turns
        for name, options in LADDER.items():
            runs[name].append(run_main("--seed", str(seed), "--log_dir", f"{folder}/{seed}", *options.split()))
    data.setup("test")
    fives = {}
    for version, name in enumerate(LADDER):  # the number of the run in its folder
        paths = folder.glob(f"*/main/version_{version}/checkpoints/epoch*.ckpt")
        fives[name] = [Classifier.load_from_checkpoint(path, "cpu", weights_only=True).eval() for path in paths]
    runs["40 epochs, taught by the average of five of 40"] = [distill(fives[SHORTER], seed) for seed in SEEDS]

    rows, before, base = [], None, statistics.median(seconds for _, seconds in runs["`main.py`"])
    for name, found in runs.items():
        accuracies, times = zip(*found, strict=True)
        gain = mean_and_error([b - a for a, b in zip(before, accuracies, strict=True)]) if before else ""
        seconds, before = statistics.median(times), accuracies
        row = f"| {name} | {mean_and_error(accuracies)} | {gain} |"
        rows.append(f"{row} {seconds / 60:.1f} minutes | {seconds / base:.1f} |")
    for name, shown in {SHORTER: "average of five of 40 epochs", LONGER: "average of five of 100 epochs"}.items():
        images, labels = data.test_set.images, data.test_set.labels
        right = average(fives[name], images).argmax(dim=1) == labels
        all_wrong = sum(average([network], images).argmax(dim=1) != labels for network in fives[name]) == len(SEEDS)
        seconds = sum(seconds for _, seconds in runs[name])
        row = f"| {shown} | {100 * right.float().mean():.2f} | all five are wrong on {all_wrong.sum()} images |"
        rows.append(f"{row} {seconds / 60:.1f} minutes | {seconds / base:.1f} |")
    header = "| 768-384, seeds 1 to 5 | test accuracy in % | gain on the row above | time | ratio |"
    publish("accuracy", header, rows)


# Studies


def open_study(folder: str, max_epochs: int) -> optuna.Study:
    url = URL.create("sqlite", database=f"{folder}/optuna.db")
    return common.study.open_study(url, "mnist", sweep.PRUNER, sweep.suggest_hyperparameters, max_epochs)


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
    study = open_study(f"{folder}/sweep", max_epochs=1)
    for params in random_trials(24):
        study.enqueue_trial(params)
    options = ("--n_trials", "24", "--max_epochs", "1", "--workers", str(workers), "--log_dir", folder)
    command("sweep.py", *options, OMP_NUM_THREADS=str(threads))
    # A worker's first trial pays for imports and loading, and after the last start the others run out of work.
    starts = sorted(trial.datetime_start for trial in study.trials)[4:]
    return 60 * (len(starts) - 1) / (starts[-1] - starts[0]).total_seconds()


def workers() -> None:
    """Measures what a second worker does for a sweep, and what a second thread does."""
    names = {(1, 1): "1 worker of 1 thread", (1, 2): "1 worker of 2 threads", (2, 2): "2 workers of 1 thread"}
    rates = alternate(2, {name: partial(parallel_sweep, *chosen) for chosen, name in names.items()})
    base = rates["1 worker of 2 threads"]
    rows = [f"| {name} | {rate:.1f} trials a minute | {rate / base:.2f} |" for name, rate in rates.items()]
    publish("workers", "| sweep of 24 trials | speed | ratio |", rows)


def run_study(seed: int, at_full_length: list[dict[str, Any]] | None = None) -> optuna.Study:
    """A study of 20 trials as `sweep.py --seed` runs it, or of given trials without pruning and early stopping."""
    folder = tempfile.mkdtemp()
    study = open_study(folder, max_epochs=5)
    options = {"folder": Path(folder), "max_epochs": 5, "patience": 3, "seed": seed, "accelerator": "cpu", "devices": 1}
    if at_full_length:
        study.pruner = optuna.pruners.NopPruner()
        options["patience"] = options["max_epochs"]
    for params in at_full_length or [sweep.BASELINE]:
        study.enqueue_trial(params)
    objective = partial(sweep.objective, data_dir=DATA_DIR, **options)
    for _ in range(20):
        run_trial(study, objective, 20, seed)
    return study


def one_search(seed: int) -> dict[str, float]:
    """Accuracies of a study, and its steps beside those of the same trials at full length."""
    pruned = run_study(seed)
    found = {"baseline": pruned.trials[0].value, "best": pruned.best_value}
    if seed in FULL_LENGTH:
        full = run_study(seed, at_full_length=[trial.params for trial in pruned.trials])
        steps, all_steps = (sum(trial.user_attrs.get("steps", 0) for trial in study.trials) for study in (pruned, full))
        found |= {"best at full length": full.best_value, "ratio": steps / all_steps}
    return found


def search() -> None:
    """Measures what a search finds from the baseline on, and what pruning and early stopping save."""
    code = "import sys, json, torch; torch.set_num_threads(1); from tests.benchmark import one_search;"
    code += "print('result', json.dumps(one_search(int(sys.argv[1]))))"

    def run(seed: int) -> dict[str, float]:
        words = [sys.executable, "-c", code, str(seed)]
        printed = subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        return json.loads(re.search(r"result (.+)", printed)[1])

    with ThreadPoolExecutor(2) as pool:  # only accuracies and steps count here, and no time
        results = dict(zip(SEEDS, pool.map(run, SEEDS), strict=True))
    rows = []
    for seed, found in results.items():
        compared = f"{found['best at full length']:.2%} | {found['ratio']:.2f}" if "ratio" in found else " | "
        rows.append(f"| {seed} | {found['baseline']:.2%} | {found['best']:.2%} | {compared} |")
    header = "| seed | baseline | best of 20 trials | best at full length | steps, ratio to full length |"
    publish("search", header, rows)


if __name__ == "__main__":
    tables = {"speed": speed, "time": to_accuracy, "seeds": seeds, "long": long, "accuracy": accuracy_ladder}
    tables |= {"workers": workers, "search": search}
    for name in sys.argv[1:] or tables:
        tables[name]()
