"""What a person expects who leaves `main.py` running: kills, faults and stops, all of them real."""

import pickle
import random
import re
import shutil
import signal
import socket
import subprocess
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

from common.callbacks import MetricsCallback
from common.classifier import Classifier
from common.data import MNISTDataModule
from common.for_main import open_run
from common.model import MLP
from main import main
from tests.conftest import (
    DATA,
    QUIET,
    ROOT,
    assert_one_line_error,
    finish,
    is_gone,
    read_events,
    read_scalars,
    run_python,
    start,
    start_script,
)

# Small, so that little time is spent on training, and with dropout, which needs the random state.
SMALL = ("--hidden_sizes", "[16]", "--dropout", 0.2, "--accelerator", "cpu", "--max_epochs")
STEPS = 108  # of an epoch


def assert_same(ours: object, theirs: object) -> None:
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs)
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        assert_same(list(ours.values()), [theirs[key] for key in ours])
    elif isinstance(ours, list | tuple):
        for one, other in zip(ours, theirs, strict=True):
            assert_same(one, other)
    else:
        assert ours == theirs


def assert_same_ends(ours: Path, theirs: Path) -> None:
    """Two runs have ended with the same bits of all that a training changes."""
    last = [torch.load(run / "checkpoints/last.ckpt") for run in (ours, theirs)]
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "loops", "global_step", "random_states"):
        assert_same(*(checkpoint[part] for checkpoint in last))
    assert read_scalars(ours) == read_scalars(theirs)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    while not condition():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)


# Lightning logs an epoch's training scalars after the hook in which checkpoints are saved.
KILLED_WHILE_IT_LOGS = """
import os, signal, sys
from pytorch_lightning.loggers import TensorBoardLogger
from common.cli import run_from_command_line
from main import main

log_metrics, tag, at_step = TensorBoardLogger.log_metrics, sys.argv[1], int(sys.argv[2])

def log_metrics_or_die(logger, metrics, step=None):
    if tag in metrics and step == at_step:
        os.kill(os.getpid(), signal.SIGKILL)
    log_metrics(logger, metrics, step)

TensorBoardLogger.log_metrics = log_metrics_or_die
run_from_command_line(main, sys.argv[3:])
"""


def test_run_killed_at_any_moment_ends_with_the_same_bits(call, tmp_path: Path):
    options = (*SMALL, 3, "--patience", 1)
    assert call(main, *options, "--log_dir", "whole").returncode == 0
    whole = tmp_path / "whole/main/version_0"
    accuracies = [value for _, value in read_scalars(whole)["accuracy/val"]]
    assert len(accuracies) == 3  # of which the last is the best
    assert [path.name for path in whole.glob("checkpoints/epoch*")] == [f"epoch=2-step={3 * STEPS}.ckpt"]

    run, options = tmp_path / "killed/main/version_2", (*options, "--log_dir", "killed", "--ckpt_path", "last")
    # Before the first epoch is in the log, in the same epoch again, and before the second epoch is. Without a
    # checkpoint the next one starts in a new folder.
    for tag, step in (("accuracy/train", STEPS - 1), ("lr-AdamW", 59), ("accuracy/train", 2 * STEPS - 1)):
        killed = run_python(tmp_path, "-c", KILLED_WHILE_IT_LOGS, tag, step, *options)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert torch.load(run / "checkpoints/last.ckpt")["global_step"] == STEPS
    process = start_script(tmp_path, "main.py", *options)
    wait_for(lambda: len(list(run.glob("events*"))) == 2, process)
    time.sleep(random.uniform(0, 2))
    process.kill()
    finish(process)
    resumed = call(main, *options)
    assert resumed.returncode == 0, resumed.stderr
    assert len(list(run.parent.iterdir())) == 3
    assert_same_ends(run, whole)


def as_hosts(folder: Path, *options: object) -> list[subprocess.Popen]:
    """Starts a process on each of two hosts with a shared folder, with the environment that torchrun would give."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    all_hosts = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "test"}
    all_hosts |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    words = (ROOT / "main.py", *options, "--strategy", "ddp", "--num_nodes", 2)
    return [start(folder, *words, **all_hosts, RANK=rank, GROUP_RANK=rank) for rank in "01"]


def test_two_processes_or_hosts_are_killed_and_resume_and_agree_with_one(script, tmp_path: Path):
    options, two = (*SMALL, 2), ("--strategy", "ddp", "--devices", 2)
    whole = script("main.py", *options, *two, "--log_dir", "whole")
    assert whole.returncode == 0, whole.stderr
    assert whole.stdout.count("test accuracy") == 1
    options = (*options, "--log_dir", "killed", "--ckpt_path", "last")
    run, whole = tmp_path / "killed/main/version_0", tmp_path / "whole/main/version_0"

    first, second = as_hosts(tmp_path, *options)
    wait_for((run / "checkpoints/last.ckpt").exists, first)
    second.kill()
    finish(second)
    assert finish(first, timeout=60).returncode != 0
    process = start_script(tmp_path, "main.py", *options, *two)
    wait_for(lambda: len(list(run.glob("events*"))) == 2, process)
    [child] = subprocess.check_output(["pgrep", "-P", str(process.pid), "-f", "main.py"], text=True).split()
    process.kill()
    finish(process, timeout=60)
    for host in as_hosts(tmp_path, *options):
        resumed = finish(host)
        assert resumed.returncode == 0, resumed.stderr
    assert is_gone(int(child))
    assert [path.name for path in run.parent.iterdir()] == ["version_0"]
    assert_same_ends(run, whole)

    scores = read_scalars(whole)
    # 55,000 images for 2 processes in batches of 512.
    assert [step for step, _ in scores["accuracy/train"]] == [54 - 1, 2 * 54 - 1]
    [best] = (whole / "checkpoints").glob("epoch=*.ckpt")
    classifier = Classifier.load_from_checkpoint(best)
    [of_one] = pl.Trainer(callbacks=[MetricsCallback()], **QUIET).test(classifier, MNISTDataModule(DATA), verbose=False)
    for name in ("accuracy/test", "f1/test", "loss/test"):
        assert scores[name][0][1] == pytest.approx(of_one[name], rel=1e-6)
    images = read_events(whole).Images
    assert len(images("confusion/test")) == len(images("mistakes/test")) == 1


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
    result = run_python(tmp_path, "poisoned.py", *SMALL, 4, "--devices", 2, "--strategy", "ddp")
    # One batch of the second epoch was bad, and only one of the processes had it.
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if "error:" in line]
    # Each process says it, unless the other one has ended it before.
    assert 1 <= len(errors) <= 2
    assert all("is nan after step 108; best checkpoint so far: logs/main/version_0" in error for error in errors)
    saved = [torch.load(path) for path in (tmp_path / "logs/main/version_0/checkpoints").iterdir()]
    assert [checkpoint["global_step"] for checkpoint in saved] == [54, 54]
    assert all(weights.isfinite().all() for checkpoint in saved for weights in checkpoint["state_dict"].values())


def test_processes_that_cannot_reach_each_other_say_why(tmp_path: Path):
    options = ("--accelerator", "cpu", "--devices", 2, "--strategy", "ddp")
    result = run_python(tmp_path, ROOT / "main.py", *options, GLOO_SOCKET_IFNAME="nope0")
    assert result.returncode != 0
    assert "nope0" in result.stderr


def interrupt(monkeypatch: pytest.MonkeyPatch, hook: str, at_step: int) -> None:
    """Ctrl-C in a hook of the data module."""
    original = getattr(MNISTDataModule, hook)

    def interrupted(data: MNISTDataModule, *args: object) -> object:
        if data.trainer.global_step == at_step:
            signal.raise_signal(signal.SIGINT)
        return original(data, *args)

    monkeypatch.setattr(MNISTDataModule, hook, interrupted)


@pytest.mark.parametrize(
    ("hook", "at_step", "options", "promise"),
    [
        ("on_after_batch_transfer", STEPS + 9, [], "goes on from logs/main/version_0/checkpoints/last.ckpt"),
        ("on_after_batch_transfer", 9, [], "goes on from the start"),
        ("on_after_batch_transfer", 9, ["--fast_dev_run", 50], None),
        ("prepare_data", 0, [], None),
    ],
)
def test_interrupted_run_says_how_to_go_on_if_one_can(call, monkeypatch, hook, at_step, options, promise):
    interrupt(monkeypatch, hook, at_step)
    stopped = call(main, *SMALL, 2, *options)
    assert stopped.returncode == 130
    assert promise in stopped.stdout if promise else "--ckpt_path" not in stopped.stdout


@pytest.fixture
def stopped(call, tmp_path: Path) -> Path:
    """A folder with `logs` of a run of two epochs that stopped in the second; no later one beats the first."""
    (folder := tmp_path / "stopped").mkdir()
    with pytest.MonkeyPatch.context() as monkeypatch:
        interrupt(monkeypatch, "on_after_batch_transfer", STEPS + 9)
        assert call(main, *SMALL, 2, "--learning_rate", 1e-30, folder=folder).returncode == 130
    return folder


def printed(result: subprocess.CompletedProcess, label: str) -> str:
    return re.search(rf"^{label} +(.+)$", result.stdout, flags=re.MULTILINE)[1]


def test_resumed_run_remembers_the_best_checkpoint(call, stopped: Path, tmp_path: Path):
    (elsewhere := tmp_path / "another folder").mkdir()
    for case in ("path", "elsewhere", "moved", "without the best"):
        folder = shutil.copytree(stopped, tmp_path / case)
        logs, ckpt_paths = folder / "logs", ["last"]
        [best] = logs.glob("main/version_0/checkpoints/epoch=0*.ckpt")
        if case == "path":  # and from the last checkpoint of the run that has gone on from there
            ckpt_paths = ["logs/main/version_0/checkpoints/last.ckpt", "last"]
        elif case == "elsewhere":
            folder = elsewhere
        elif case == "moved":
            logs = logs.rename(elsewhere / "moved")
            best = logs / best.relative_to(folder / "logs")
        else:
            best.unlink()
        for ckpt_path in ckpt_paths:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                options = ("--learning_rate", 1e-30, "--log_dir", logs, "--ckpt_path", ckpt_path)
                resumed = call(main, *SMALL, 2, *options, folder=folder)
            assert resumed.returncode == 0, resumed.stderr
            assert not [warning for warning in caught if "dirpath has changed" in str(warning.message)], case
            tested = folder / printed(resumed, "best checkpoint")
            assert tested.name.startswith("epoch=1") if case == "without the best" else tested.samefile(best)
        assert len(list((logs / "main").iterdir())) == len(ckpt_paths)


def test_run_goes_on_with_the_same_hyperparameters_and_schedule_alone(call, stopped: Path):
    last = stopped / "logs/main/version_0/checkpoints/last.ckpt"
    config = stopped / "logs/main/version_0/config.yaml"
    before = (last.read_bytes(), config.read_bytes())
    options = (*SMALL, 2, "--learning_rate", 1e-30, "--ckpt_path", last)
    for name, value, words in [
        ("hidden_sizes", "[32]", "'hidden_sizes': [16]"),
        ("weight_decay", 0.1, "weight_decay 0.05, and this one has 0.1"),
        ("batch_size", 500, "batch_size 512, and this one has 500"),
        ("augment", "false", "augment True, and this one has False"),
    ]:
        assert_one_line_error(call(main, *options, f"--{name}", value, folder=stopped), words)
    assert len(list((stopped / "logs/main").iterdir())) == 1
    for name, value, steps in (("max_epochs", 3, 3 * STEPS), ("accumulate_grad_batches", 2, STEPS)):
        result = call(main, *options, f"--{name}", value, folder=stopped)
        assert_one_line_error(result, f"schedule has {2 * STEPS} steps, and this run's has {steps}")
    assert last.read_bytes() == before[0]
    # The newest run is still the one that has begun to train. What may change:
    options = (*options, "--ckpt_path", "last", "--precision", "bf16-mixed", "--gradient_clip_val", 1, "--patience", 1)
    resumed = call(main, *options, "--data_dir", f"{DATA}/../data", folder=stopped)
    assert resumed.returncode == 0, resumed.stderr
    assert "did not improve in the last 1 records" in printed(resumed, "stopped early")
    assert printed(resumed, "logs") == "logs/main/version_0"
    assert config.read_bytes() == before[1]


def test_resuming_a_run_that_had_stopped_early_only_tests(call, tmp_path: Path):
    # With this learning rate no epoch is better than the first.
    options = (*SMALL, 9, "--patience", 1, "--learning_rate", 1e-30)
    stopped = call(main, *options)
    assert "accuracy/val did not improve in the last 1 records" in printed(stopped, "stopped early")
    last = tmp_path / "logs/main/version_0/checkpoints/last.ckpt"
    assert torch.load(last)["global_step"] == 2 * STEPS
    written = last.stat().st_mtime_ns
    resumed = call(main, *options, "--ckpt_path", "last")
    assert resumed.returncode == 0, resumed.stderr
    assert printed(resumed, "test accuracy") == printed(stopped, "test accuracy")
    assert last.stat().st_mtime_ns == written
    assert max(step for step, _ in read_scalars(last.parents[1])["lr-AdamW"]) < 2 * STEPS


class Bomb:
    """A pickle that would create a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_files_that_are_no_whole_checkpoints_are_one_line_and_run_and_leave_nothing(call, tmp_path: Path):
    trainer = pl.Trainer(max_steps=1, limit_val_batches=0, enable_checkpointing=False, **QUIET)
    trainer.fit(Classifier(MLP([16], dropout=0.2)), MNISTDataModule(DATA))
    # As main.py would have it but for what a training goes on with, as ModelCheckpoint of sweep.py saves it.
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    trainer.save_checkpoint(tmp_path / "stranger.ckpt", weights_only=False)
    whole = (tmp_path / "stranger.ckpt").read_bytes()
    texts = {"empty": b"", "text": b"hello world", "pickle": pickle.dumps(Bomb(tmp_path / "exploded"))}
    texts |= {f"truncated_{tenths}": whole[: len(whole) * tenths // 10] for tenths in (1, 5, 9)}
    texts |= {"like_a_pickle": b"\x80\x02" + bytes(range(50))}
    for name, text in texts.items():
        (tmp_path / f"{name}.ckpt").write_bytes(text)
    torch.save({"hyper_parameters": {}, "bomb": Bomb(tmp_path / "exploded")}, tmp_path / "tampered.ckpt")
    torch.save({"global_step": 1, "random_states": {}, "hyper_parameters": [1]}, tmp_path / "list.ckpt")
    torch.save(torch.ones(3), tmp_path / "tensor.ckpt")
    before = sorted(tmp_path.rglob("*"))
    for path in [*tmp_path.glob("*.ckpt")]:
        result = call(main, *SMALL, 2, "--ckpt_path", path.name)
        assert_one_line_error(result, path.name, "no whole checkpoint of main.py")
    assert sorted(tmp_path.rglob("*")) == before


def test_config_of_a_run_makes_it_again_with_the_same_bits(call, tmp_path: Path):
    assert call(main, *SMALL, 1, "--seed", 3).returncode == 0
    zero, one, two = (tmp_path / f"logs/main/version_{number}" for number in range(3))
    again = call(main, "--config", zero / "config.yaml")
    assert again.returncode == 0, again.stderr
    assert (zero / "config.yaml").read_text() == (one / "config.yaml").read_text()
    assert_same_ends(zero, one)
    assert call(main, "--config", zero / "config.yaml", "--seed", 4).returncode == 0
    assert "seed: 4" in (two / "config.yaml").read_text()


def test_open_run_numbers_new_runs_and_finds_the_newest(tmp_path: Path):
    runs, new, last = tmp_path / "main", {"ckpt_path": None, "fast_dev_run": False}, {"ckpt_path": "last"}
    assert open_run(runs, new | last, {}).version == 0
    assert [open_run(runs, new, {}).version for _ in range(1, 12)] == list(range(1, 12))
    # A copy that someone keeps beside the runs is none.
    shutil.copytree(runs / "version_10", runs / "version_99_backup")
    # A run that was killed before its first checkpoint.
    (runs / "version_10/hparams.yaml").touch()
    assert open_run(runs, new | last, {}) == (12, None, 0)
