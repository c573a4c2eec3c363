"""What a person expects who leaves `main.py` running: kills, faults and stops, all of them real."""

import errno
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import LambdaCallback, ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger

from common.callbacks import FiniteLossCallback
from common.classifier import Classifier
from common.data import MNISTDataModule
from common.model import MLP
from common.runs import AtomicCheckpointIO, ResumeCheckpoint, Run, open_run
from main import main
from tests.conftest import DATA, ROOT, assert_one_line_error, read_events
from tests.test_classifier import QUIET

# Small, so that little time is spent on training, and with dropout, which needs the random state.
SMALL = ("--max_epochs", 4, "--hidden_sizes", "[64]", "--dropout", 0.2, "--accelerator", "cpu")


def start(folder: Path, *options: object) -> subprocess.Popen:
    command = [sys.executable, ROOT / "main.py", *SMALL, *options]
    return subprocess.Popen(
        list(map(str, command)), cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(path: Path, process: subprocess.Popen) -> None:
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)


def assert_same(ours: object, theirs: object) -> None:
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs)
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert_same(ours[key], theirs[key])
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_same(one, other)
    else:
        assert ours == theirs


def is_gone(pid: int) -> bool:
    """A process that has ended, though nobody may have asked for its exit status: some containers' init does not."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return state.strip()[:1] in ("", "Z")


def random_state(checkpoint: dict) -> dict:
    [state] = [state for key, state in checkpoint["callbacks"].items() if key.startswith("ResumeCheckpoint")]
    return state["random_state"]


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    events = read_events(run)
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_run_killed_at_any_moment_ends_with_the_same_bits(script, tmp_path: Path):
    whole = script("main.py", *SMALL, "--log_dir", "whole")
    assert whole.returncode == 0, whole.stderr
    moments = random.Random(0)
    run = tmp_path / "killed/main/version_0"
    last = run / "checkpoints/last.ckpt"
    steps = []
    for kill in range(3):
        process = start(tmp_path, "--log_dir", "killed", *(["--ckpt_path", "last"] if kill else []))
        events = len(list(run.glob("events*")))
        while len(list(run.glob("events*"))) == events:  # its training begins
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        if kill:
            time.sleep(moments.uniform(0, 1.5))
        else:
            wait_for(last, process)  # however slow or fast the machine, one kill comes in the middle
        process.kill()
        process.communicate()
        steps.append(torch.load(last)["global_step"] if last.exists() else 0)
    # Resuming from nothing, or from the end, would prove nothing.
    assert any(0 < step < 4 * 108 for step in steps), steps
    resumed = script("main.py", *SMALL, "--log_dir", "killed", "--ckpt_path", "last")
    assert resumed.returncode == 0, resumed.stderr
    assert not list(run.parent.glob("version_1"))

    ours, theirs = (
        torch.load(tmp_path / name / "main/version_0/checkpoints/last.ckpt") for name in ("killed", "whole")
    )
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "loops", "global_step"):
        assert_same(ours[part], theirs[part])
    assert_same(random_state(ours), random_state(theirs))
    assert scalars(run) == scalars(tmp_path / "whole/main/version_0")


# Lightning logs an epoch's training scalars after the hook in which checkpoints are saved.
SIGNALED_WHILE_IT_LOGS = """
import os, sys
from pytorch_lightning.loggers import TensorBoardLogger
from common.cli import run_from_command_line
from main import main

log_metrics, number, at_step = TensorBoardLogger.log_metrics, int(sys.argv[1]), int(sys.argv[2])

def log_metrics_signaled(logger, metrics, step=None):
    if "accuracy/train" in metrics and step == at_step:
        os.kill(os.getpid(), number)
    log_metrics(logger, metrics, step)

TensorBoardLogger.log_metrics = log_metrics_signaled
run_from_command_line(main, sys.argv[3:])
"""


def signaled_while_it_logs(folder: Path, number: signal.Signals, *options: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", SIGNALED_WHILE_IT_LOGS, int(number), *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_kill_before_an_epoch_is_logged_leaves_no_gap_in_the_log(script, tmp_path: Path):
    options = (*SMALL, "--max_epochs", 2)
    assert script("main.py", *options, "--log_dir", "whole").returncode == 0
    options = (*options, "--log_dir", "killed", "--ckpt_path", "last")
    for step in (107, 215):
        killed = signaled_while_it_logs(tmp_path, signal.SIGKILL, step, *options)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert script("main.py", *options).returncode == 0
    whole, resumed = (tmp_path / name / "main/version_0" for name in ("whole", "killed"))
    assert scalars(resumed) == scalars(whole)
    assert_same(*(torch.load(run / "checkpoints/last.ckpt")["state_dict"] for run in (resumed, whole)))


def test_stop_at_the_end_of_an_epoch_keeps_the_epoch(tmp_path: Path):
    stopped = signaled_while_it_logs(tmp_path, signal.SIGTERM, 215, *SMALL)
    checkpoints = tmp_path / "logs/main/version_0/checkpoints"
    assert stopped.returncode == 1, stopped.stderr
    assert "goes on from logs/main/version_0/checkpoints/last.ckpt" in stopped.stdout
    assert torch.load(checkpoints / "last.ckpt")["global_step"] == 216
    assert not (checkpoints / "next.ckpt").exists()


def test_interrupt_before_there_is_a_folder_promises_nothing(call, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(MNISTDataModule, "prepare_data", lambda data: signal.raise_signal(signal.SIGINT))
    interrupted = call(main, *SMALL, "--ckpt_path", "last")
    assert interrupted.returncode == 1
    assert "goes on from" not in interrupted.stdout


def test_full_disk_that_the_logger_meets_is_one_line(call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fill(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def log() -> None:
        """Logs a scalar."""
        logger = TensorBoardLogger(tmp_path)
        monkeypatch.setattr(logger.experiment, "add_scalar", fill)
        logger.log_metrics({"loss": 1.0}, step=0)

    assert_one_line_error(call(log), "No space left on device")


def test_checkpoint_that_a_killed_run_left_before_its_epoch_was_logged_is_not_gone_on_from(tmp_path: Path):
    folder, found = tmp_path / "checkpoints", []
    folder.mkdir()
    (folder / "next.ckpt").touch()
    look = LambdaCallback(
        on_train_batch_start=lambda *_: found.append([path.name for path in folder.iterdir()]),
        on_train_epoch_end=lambda *_: found.append([path.name for path in folder.iterdir()]),
    )
    options = QUIET | {"limit_train_batches": 1, "limit_val_batches": 0, "callbacks": [ResumeCheckpoint(), look]}
    pl.Trainer(default_root_dir=tmp_path, max_epochs=2, **options).fit(Classifier(MLP([16])), MNISTDataModule(DATA))
    # Lightning calls the callbacks that save checkpoints after the others.
    assert found == [["next.ckpt"], ["next.ckpt"], ["last.ckpt"], ["last.ckpt"]]
    assert [path.name for path in folder.iterdir()] == ["last.ckpt"]
    assert torch.load(folder / "last.ckpt")["global_step"] == 2


class KeepMiddle(pl.Callback):
    """Keeps the `last.ckpt` of the first epoch."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_start(self, trainer: pl.Trainer, *args: object) -> None:
        if trainer.current_epoch == 1 and not self.path.exists():
            shutil.copy(trainer.checkpoint_callback.last_model_path, self.path)


def fit_with_dropout(folder: Path, seed: int, ckpt_path: Path | None = None, **options) -> dict[str, torch.Tensor]:
    pl.seed_everything(seed)
    classifier = Classifier(MLP([16], dropout=0.5))
    callbacks = [ResumeCheckpoint(ckpt_path), KeepMiddle(folder / "middle.ckpt")]
    options = QUIET | {"max_epochs": 2, "limit_train_batches": 3, "limit_val_batches": 0} | options
    trainer = pl.Trainer(default_root_dir=folder, callbacks=callbacks, plugins=[AtomicCheckpointIO()], **options)
    trainer.fit(classifier, MNISTDataModule(DATA), ckpt_path=ckpt_path, weights_only=True)
    return classifier.state_dict()


def test_resumed_run_draws_the_dropout_that_it_would_have_drawn(tmp_path: Path):
    whole = fit_with_dropout(tmp_path, seed=0)
    # With another seed only the random state of the checkpoint can bring the same numbers.
    assert_same(fit_with_dropout(tmp_path, seed=1, ckpt_path=tmp_path / "middle.ckpt"), whole)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_resumed_run_draws_the_same_dropout_on_a_gpu(tmp_path: Path):
    gpu = {"accelerator": "gpu", "devices": 1}
    fit_with_dropout(tmp_path, seed=0, **gpu)
    whole = torch.cuda.get_rng_state()
    fit_with_dropout(tmp_path, seed=1, ckpt_path=tmp_path / "middle.ckpt", **gpu)
    assert torch.equal(torch.cuda.get_rng_state(), whole)


@pytest.mark.parametrize(("gpus", "restored"), [(2, True), (3, False)])
def test_random_states_of_gpus_are_saved_and_go_back_to_as_many(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gpus: int, restored: bool
):
    # No GPU is needed to see what is saved and what is handed to torch.cuda.
    states, given = [torch.tensor([1, 2]), torch.tensor([3, 4])], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: states)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", given.extend)
    torch.save(ResumeCheckpoint().state_dict(), tmp_path / "state.pt")
    resumed = ResumeCheckpoint()
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert_same(resumed.random_state, {"cpu": torch.get_rng_state(), "cuda": states})
    resumed.on_train_start(SimpleNamespace(early_stopping_callback=None), None)
    assert_same(given, states if restored else [])


def test_kill_while_a_checkpoint_is_written_leaves_a_whole_one(tmp_path: Path):
    path = tmp_path / "last.ckpt"
    program = (
        "import sys, torch; from common.runs import AtomicCheckpointIO\n"
        "for i in range(10**6):\n"
        "    checkpoint = {'weights': torch.full((5_000_000,), i)}\n"
        "    AtomicCheckpointIO().save_checkpoint(checkpoint, sys.argv[1])\n"
    )
    moments = random.Random(1)
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(path)], cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        path.unlink(missing_ok=True)
        wait_for(path, process)
        time.sleep(moments.uniform(0, 0.5))
        process.kill()
        process.communicate()
        weights = torch.load(path)["weights"]
        assert weights.min() == weights.max()


def test_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    events, fsync, replace = [], os.fsync, Path.replace

    def recording_fsync(descriptor: int) -> None:
        file = os.fstat(descriptor)
        events.append(("fsync", file.st_ino, file.st_size))
        fsync(descriptor)

    def recording_replace(path: Path, target: object) -> Path:
        file = path.stat()
        events.append(("rename", file.st_ino, file.st_size))
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(Path, "replace", recording_replace)
    path = tmp_path / "last.ckpt"
    # So small that it is still in the file's buffer if nobody flushes it.
    AtomicCheckpointIO().save_checkpoint({"weights": torch.ones(1)}, str(path))
    file = path.stat()
    assert events == [("fsync", file.st_ino, file.st_size), ("rename", file.st_ino, file.st_size)]


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_stopped_run_says_how_to_go_on(tmp_path: Path, stop: signal.Signals):
    process = start(tmp_path, "--max_epochs", 100)
    last = tmp_path / "logs/main/version_0/checkpoints/last.ckpt"
    wait_for(last, process)
    process.send_signal(stop)
    output, errors = process.communicate(timeout=60)
    assert process.returncode not in (0, 2)
    assert "Traceback" not in errors
    assert f"stopped; --ckpt_path last goes on from {last.relative_to(tmp_path)}" in output
    assert torch.load(last)["epoch"] >= 0


INTERRUPTED_DESTRUCTOR = """
import signal, time
from common.cli import run_from_command_line

class Interrupted:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)

def main() -> None:
    '''Waits.'''
    Interrupted()
    time.sleep(60)
    print("never interrupted")

run_from_command_line(main, [])
"""


def test_ctrl_c_in_a_destructor_is_not_lost():
    command = [sys.executable, "-c", INTERRUPTED_DESTRUCTOR]
    # A signal that does not wake the sleeping program would come too late.
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (1, "", "")


class Bomb:
    """A pickle that would create a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_bad_checkpoints_are_one_line_and_run_nothing(call, tmp_path: Path):
    trained = call(main, *SMALL, "--max_epochs", 1)
    assert trained.returncode == 0, trained.stderr
    last = tmp_path / "logs/main/version_0/checkpoints/last.ckpt"
    before = last.read_bytes()

    (tmp_path / "truncated.ckpt").write_bytes(before[: len(before) // 2])
    torch.save({"hyper_parameters": {}, "bomb": Bomb(tmp_path / "exploded")}, tmp_path / "tampered.ckpt")
    (tmp_path / "pickle.ckpt").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    torch.save({"weights": torch.zeros(3)}, tmp_path / "foreign.ckpt")
    for name in ("truncated", "tampered", "pickle", "foreign"):
        result = call(main, *SMALL, "--ckpt_path", f"{name}.ckpt")
        assert_one_line_error(result, f"{name}.ckpt")
    assert not (tmp_path / "exploded").exists()

    other_model = call(main, *SMALL, "--hidden_sizes", "[32]", "--ckpt_path", last)
    assert_one_line_error(other_model, "'hidden_sizes': [64]", "'hidden_sizes': [32]")
    other_length = call(main, *SMALL, "--max_epochs", 9, "--ckpt_path", last)
    assert_one_line_error(other_length, "108 steps", "972", "max_epochs")
    other_rate = call(main, *SMALL, "--max_epochs", 1, "--learning_rate", 0.5, "--ckpt_path", last)
    assert_one_line_error(other_rate, "learning_rate is 0.004, this run's 0.5")
    assert last.read_bytes() == before


def test_checkpoints_of_other_programs_are_one_line_and_leave_nothing(call, tmp_path: Path):
    data = MNISTDataModule(DATA)
    short = QUIET | {"max_steps": 1, "limit_val_batches": 0, "enable_checkpointing": False}
    # As main.py would have it but for what a training goes on with: ModelCheckpoint of sweep.py leaves that out.
    trainer = pl.Trainer(**short)
    trainer.fit(Classifier(MLP([64], dropout=0.2)), data)
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    trainer = pl.Trainer(**short)
    trainer.fit(Stranger(), torch.utils.data.DataLoader(torch.ones(4, 2)))
    trainer.save_checkpoint(tmp_path / "stranger.ckpt")
    for name, hyper_parameters in (("list", [1, 2]), ("namespace", None), ("empty", {})):
        torch.save({"hyper_parameters": hyper_parameters, "state_dict": {}}, tmp_path / f"{name}.ckpt")
    torch.save(torch.ones(3), tmp_path / "tensor.ckpt")

    words = {"weights": "to use the weights: Classifier.load_from_checkpoint"}
    before = sorted(tmp_path.rglob("*"))
    for path in sorted(tmp_path.glob("*.ckpt")):
        result = call(main, *SMALL, "--ckpt_path", path.name)
        assert_one_line_error(result, path.name, words.get(path.stem, "is no checkpoint of main.py"))
    assert sorted(tmp_path.rglob("*")) == before


class Stranger(pl.LightningModule):
    """Another Lightning program's module."""

    def __init__(self, width: int = 2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(width, 1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.layer(batch).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_loss_that_is_not_finite_ends_the_run_and_names_step_and_checkpoint(
    script, data: MNISTDataModule, tmp_path: Path
):
    trainer = pl.Trainer(max_epochs=1, limit_val_batches=0, callbacks=[FiniteLossCallback()], **QUIET)
    with pytest.raises(FloatingPointError, match=r"loss/train is nan after step 108; last good checkpoint: none"):
        trainer.fit(Classifier(MLP([16]), learning_rate=1e30), data)

    # With Lightning's own ModelCheckpoint, and weights that are spoilt after the first epoch.
    spoil = LambdaCallback(
        on_train_epoch_start=lambda trainer, module: module.model.layers[1].weight.data.fill_(
            torch.nan if trainer.current_epoch else 0.0
        )
    )
    callbacks = [spoil, FiniteLossCallback(), ModelCheckpoint(tmp_path / "best", filename="best")]
    few = QUIET | {"limit_train_batches": 1, "limit_val_batches": 0}
    trainer = pl.Trainer(max_epochs=2, callbacks=callbacks, **few)
    with pytest.raises(FloatingPointError, match=r"nan after step 2; last good checkpoint: \S+best\.ckpt"):
        trainer.fit(Classifier(MLP([16])), data)

    # In the script: a run whose weights are spoilt goes on from its checkpoint, and not far.
    assert script("main.py", *SMALL, "--max_epochs", 1).returncode == 0
    last = tmp_path / "logs/main/version_0/checkpoints/last.ckpt"
    checkpoint = torch.load(last)
    next(iter(checkpoint["state_dict"].values()))[0, 0] = torch.nan
    checkpoint["lr_schedulers"][0]["total_steps"] *= 4
    torch.save(checkpoint, tmp_path / "spoilt.ckpt")
    result = script("main.py", *SMALL, "--ckpt_path", "spoilt.ckpt")
    assert_one_line_error(result, "is nan after step 216; last good checkpoint: spoilt.ckpt")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 3 MB, which the logs of one run fill."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], check=False, capture_output=True
    ).returncode:
        pytest.skip("mounting a small disk needs root")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_full_disk_is_one_line(script, small_disk: Path):
    result = script("main.py", "--max_epochs", 2, "--hidden_sizes", "[512,256]", "--log_dir", small_disk)
    assert_one_line_error(result, "No space left on device")
    assert not list(small_disk.rglob("*.partial"))


def test_read_only_disk_is_one_line(call, small_disk: Path):
    (small_disk / "MNIST/raw").mkdir(parents=True)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert_one_line_error(call(main, "--log_dir", small_disk / "logs"), "Read-only file system", "logs")
    assert_one_line_error(call(main, "--data_dir", small_disk), "Read-only file system")


def test_two_first_runs_at_once(tmp_path: Path):
    shutil.copytree(Path(DATA, "MNIST/raw"), tmp_path / "data/MNIST/raw", ignore=shutil.ignore_patterns("*-ubyte"))
    runs = [start(tmp_path, "--max_epochs", 1, "--data_dir", "data") for _ in range(2)]
    for run in runs:
        _, errors = run.communicate(timeout=300)
        assert run.returncode == 0, errors
    assert sorted(path.name for path in (tmp_path / "logs/main").iterdir()) == ["version_0", "version_1"]
    for version in (0, 1):
        assert (tmp_path / f"logs/main/version_{version}/checkpoints/last.ckpt").exists()


def test_open_run_numbers_new_runs_and_finds_the_newest(tmp_path: Path):
    assert open_run(tmp_path / "main", "last", {}) == Run(0, None, 0)
    assert [open_run(tmp_path / "main", None, {}).version for _ in range(1, 12)] == list(range(1, 12))
    # Only one of them was more than a failed start.
    (tmp_path / "main/version_9/hparams.yaml").touch()
    # A copy that someone keeps beside the runs is none.
    shutil.copytree(tmp_path / "main/version_9", tmp_path / "main/version_9_backup")
    assert open_run(tmp_path / "main", "last", {}) == Run(9, None, 0)
    assert open_run(tmp_path / "main", None, {}) == Run(12, None, 0)


def test_killed_rank_ends_the_others_and_the_run_resumes(script, tmp_path: Path):
    two = ("--accelerator", "cpu", "--devices", 2, "--strategy", "ddp")
    process = start(tmp_path, *two, "--max_epochs", 12)
    wait_for(tmp_path / "logs/main/version_0/checkpoints/last.ckpt", process)
    [rank_1] = subprocess.check_output(["pgrep", "-P", str(process.pid), "-f", "main.py"], text=True).split()
    os.kill(int(rank_1), signal.SIGKILL)
    killed = time.time()
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert time.time() - killed < 60
    assert is_gone(int(rank_1))

    resumed = script("main.py", *SMALL, *two, "--max_epochs", 12, "--patience", 1, "--ckpt_path", "last")
    assert resumed.returncode == 0, resumed.stderr
    assert [path.name for path in (tmp_path / "logs/main").iterdir()] == ["version_0"]
    epochs = [value for _, value in scalars(tmp_path / "logs/main/version_0")["epoch"]]
    assert epochs == sorted(epochs)


def printed(result: subprocess.CompletedProcess, label: str) -> str:
    return re.search(rf"^{label} +(.+)$", result.stdout, flags=re.MULTILINE)[1]


@pytest.mark.parametrize("case", ["path", "elsewhere", "moved", "without the best"])
def test_resumed_run_remembers_the_best_checkpoint(call, tmp_path: Path, case: str):
    options = ("--hidden_sizes", "[16]", "--accelerator", "cpu")
    first = call(main, *options, "--max_epochs", 1)
    checkpoints = tmp_path / "logs/main/version_0/checkpoints"
    [best] = checkpoints.glob("epoch=0*.ckpt")
    # Left as a run of two epochs leaves it that was stopped after the first, which no later epoch can beat.
    checkpoint = torch.load(checkpoints / "last.ckpt")
    checkpoint["lr_schedulers"][0]["total_steps"] *= 2
    [state] = [
        state for name, state in checkpoint["callbacks"].items() if "accuracy/val" in name and "dirpath" in state
    ]
    for score in ("best_model_score", "kth_value"):
        state[score] = torch.tensor(1.0)
    state["best_k_models"] = {path: torch.tensor(1.0) for path in state["best_k_models"]}
    torch.save(checkpoint, checkpoints / "last.ckpt")

    folder, logs, ckpt_path = tmp_path / "elsewhere", tmp_path / "logs", "last"
    folder.mkdir()
    if case == "path":
        folder, logs, ckpt_path = tmp_path, "logs", "logs/main/version_0/checkpoints/last.ckpt"
    elif case == "moved":
        logs = logs.rename(folder / "moved")
        best = logs / best.relative_to(tmp_path / "logs")
    elif case == "without the best":
        best.unlink()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resumed = call(main, *options, "--max_epochs", 2, "--log_dir", logs, "--ckpt_path", ckpt_path, folder=folder)
    assert resumed.returncode == 0, resumed.stderr
    assert not [warning for warning in caught if "dirpath has changed" in str(warning.message)]
    tested = folder / printed(resumed, "best checkpoint")
    if case == "without the best":
        assert tested.name.startswith("epoch=1")
    else:
        assert tested.samefile(best)
        assert printed(resumed, "test accuracy") == printed(first, "test accuracy")


def test_resuming_a_run_that_had_stopped_early_only_tests(call, tmp_path: Path):
    # With this learning rate no epoch is better than the first.
    options = (*SMALL, "--max_epochs", 9, "--patience", 1, "--learning_rate", 1e-30)
    stopped = call(main, *options)
    assert stopped.returncode == 0, stopped.stderr
    assert "accuracy/val did not improve in the last 1 records" in printed(stopped, "stopped early")
    last = tmp_path / "logs/main/version_0/checkpoints/last.ckpt"
    assert torch.load(last)["global_step"] == 2 * 108
    written = last.stat().st_mtime_ns
    resumed = call(main, *options, "--ckpt_path", "last")
    assert resumed.returncode == 0, resumed.stderr
    assert printed(resumed, "test accuracy") == printed(stopped, "test accuracy")
    assert last.stat().st_mtime_ns == written
    assert max(step for step, _ in scalars(last.parents[1])["lr-AdamW"]) < 2 * 108


POISONED = """
import main
from common.cli import run_from_command_line

class Poisoned(main.MNISTDataModule):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        if self.trainer.training and self.trainer.global_step == 80 and self.trainer.global_rank == 1:
            batch[0].fill_(float("nan"))
        return batch

main.MNISTDataModule = Poisoned
run_from_command_line(main.main)
"""


def test_loss_that_is_not_finite_on_one_process_ends_all(tmp_path: Path):
    (tmp_path / "poisoned.py").write_text(POISONED)
    two = ("--devices", 2, "--strategy", "ddp")
    command = [sys.executable, "poisoned.py", *SMALL, *two]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        list(map(str, command)), cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    # One batch of the second epoch was bad, and only one of the processes had it.
    last = tmp_path / "logs/main/version_0/checkpoints/last.ckpt"
    assert_one_line_error(result, f"is nan after step 108; last good checkpoint: {last.relative_to(tmp_path)}")
    saved = [torch.load(path) for path in last.parent.iterdir()]
    assert [checkpoint["global_step"] for checkpoint in saved] == [54, 54]
    assert all(weights.isfinite().all() for checkpoint in saved for weights in checkpoint["state_dict"].values())
