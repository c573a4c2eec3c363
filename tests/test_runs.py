"""What a person expects who leaves `main.py` running: kills, faults and stops, all of them real."""

import contextlib
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

from common.callbacks import FiniteLossCallback
from common.classifier import Classifier
from common.data import MNISTDataModule
from common.model import MLP
from common.runs import Run, open_run
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


def random_state(checkpoint: dict) -> dict:
    [state] = [state for key, state in checkpoint["callbacks"].items() if key.startswith("LastCheckpoint")]
    return state["random_state"]


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    events = read_events(run)
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_run_killed_at_any_moment_ends_with_the_same_bits(script, tmp_path: Path):
    whole = script("main.py", *SMALL, "--log_dir", "whole")
    assert whole.returncode == 0, whole.stderr
    moments = random.Random(0)
    run = tmp_path / "killed/main/version_0"
    for kill in range(3):
        process = start(tmp_path, "--log_dir", "killed", *(["--ckpt_path", "last"] if kill else []))
        events = len(list(run.glob("events*")))
        while len(list(run.glob("events*"))) == events:  # its training begins
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        time.sleep(moments.uniform(0, 1.5))
        process.kill()
        process.communicate()
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


def test_random_state_is_needed_for_the_same_bits(data: MNISTDataModule):
    # Dropout draws from torch's random state: without restoring it, the same weights give another step.
    model, images = MLP([64], dropout=0.2), data.val_set.images[:8]
    state = torch.get_rng_state()
    first, other = model(images), model(images)
    torch.set_rng_state(state)
    assert torch.equal(model(images), first)
    assert not torch.equal(other, first)


def test_kill_while_a_checkpoint_is_written_leaves_a_whole_one(tmp_path: Path):
    path = tmp_path / "last.ckpt"
    program = (
        "import sys, torch; from common.runs import CheckpointIO\n"
        "for i in range(10**6):\n"
        "    checkpoint = {'weights': torch.full((5_000_000,), i)}\n"
        "    CheckpointIO().save_checkpoint(checkpoint, sys.argv[1])\n"
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


class Bomb:
    """A pickle that would create a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_bad_checkpoints_are_one_line_and_run_nothing(script, tmp_path: Path):
    trained = script("main.py", *SMALL, "--max_epochs", 1)
    assert trained.returncode == 0, trained.stderr
    last = tmp_path / "logs/main/version_0/checkpoints/last.ckpt"
    before = last.read_bytes()

    (tmp_path / "truncated.ckpt").write_bytes(before[: len(before) // 2])
    torch.save({"hyper_parameters": {}, "bomb": Bomb(tmp_path / "exploded")}, tmp_path / "tampered.ckpt")
    (tmp_path / "pickle.ckpt").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    torch.save({"weights": torch.zeros(3)}, tmp_path / "foreign.ckpt")
    for name in ("truncated", "tampered", "pickle", "foreign"):
        result = script("main.py", *SMALL, "--ckpt_path", f"{name}.ckpt")
        assert_one_line_error(result, f"{name}.ckpt")
    assert not (tmp_path / "exploded").exists()

    other_model = script("main.py", *SMALL, "--hidden_sizes", "[32]", "--ckpt_path", last)
    assert_one_line_error(other_model, "'hidden_sizes': [64]", "'hidden_sizes': [32]")
    other_length = script("main.py", *SMALL, "--max_epochs", 9, "--ckpt_path", last)
    assert_one_line_error(other_length, "108 steps", "972", "max_epochs")
    other_rate = script("main.py", *SMALL, "--max_epochs", 1, "--learning_rate", 0.5, "--ckpt_path", last)
    assert_one_line_error(other_rate, "learning_rate is 0.006, this run's 0.5")
    assert last.read_bytes() == before


def test_loss_that_is_not_finite_ends_the_run_and_names_step_and_checkpoint(
    script, data: MNISTDataModule, tmp_path: Path
):
    trainer = pl.Trainer(max_epochs=1, limit_val_batches=0, callbacks=[FiniteLossCallback()], **QUIET)
    with pytest.raises(FloatingPointError, match=r"loss/train is nan after step 108; last good checkpoint: none"):
        trainer.fit(Classifier(MLP([16]), learning_rate=1e30), data)

    # In the script: a run whose weights are spoilt goes on from its checkpoint, and not far.
    assert script("main.py", *SMALL, "--max_epochs", 1).returncode == 0
    last = tmp_path / "logs/main/version_0/checkpoints/last.ckpt"
    checkpoint = torch.load(last)
    next(iter(checkpoint["state_dict"].values()))[0, 0] = torch.nan
    checkpoint["lr_schedulers"][0]["total_steps"] *= 4
    torch.save(checkpoint, tmp_path / "spoilt.ckpt")
    result = script("main.py", *SMALL, "--ckpt_path", "spoilt.ckpt")
    assert_one_line_error(result, "is nan after step 216")


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


def test_read_only_disk_is_one_line(script, small_disk: Path):
    (small_disk / "MNIST/raw").mkdir(parents=True)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert_one_line_error(script("main.py", "--log_dir", small_disk / "logs"), "Read-only file system", "logs")
    assert_one_line_error(script("main.py", "--data_dir", small_disk), "Read-only file system")


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
    assert open_run(tmp_path / "main", "last", {}) == Run(9, None, 0)


def test_killed_rank_ends_the_others_and_the_run_resumes(script, tmp_path: Path):
    two = ("--accelerator", "cpu", "--devices", 2, "--strategy", "ddp")
    process = start(tmp_path, *two, "--max_epochs", 50)
    wait_for(tmp_path / "logs/main/version_0/checkpoints/last.ckpt", process)
    [rank_1] = subprocess.check_output(["pgrep", "-P", str(process.pid), "-f", "main.py"], text=True).split()
    os.kill(int(rank_1), signal.SIGKILL)
    killed = time.time()
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert time.time() - killed < 60
    with contextlib.suppress(ProcessLookupError):
        os.kill(int(rank_1), 0)

    resumed = script("main.py", *SMALL, *two, "--max_epochs", 50, "--patience", 1, "--ckpt_path", "last")
    assert resumed.returncode == 0, resumed.stderr
    assert [path.name for path in (tmp_path / "logs/main").iterdir()] == ["version_0"]
    epochs = [value for _, value in scalars(tmp_path / "logs/main/version_0")["epoch"]]
    assert epochs == sorted(epochs)
