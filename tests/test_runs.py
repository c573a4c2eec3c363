"""What a person expects who leaves `main.py` running: kills, faults and stops, all of them real."""

import errno
import inspect
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

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import LambdaCallback, ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from common.callbacks import FiniteLossCallback
from common.classifier import Classifier
from common.data import MNISTDataModule
from common.for_main import MAY_CHANGE, AtomicCheckpointIO, ResumeCheckpoint, open_run, resumable_step
from common.model import MLP
from main import main
from tests.conftest import DATA, ROOT, assert_one_line_error, read_events, run_python
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


def resume_state(checkpoint: dict) -> dict:
    return checkpoint["callbacks"]["ResumeCheckpoint"]


def left_by_a_longer_run(checkpoint: dict, factor: int) -> dict:
    """The checkpoint of a run of one epoch, as a run of more would have left it that was stopped after the first."""
    checkpoint["lr_schedulers"][0]["total_steps"] *= factor
    resume_state(checkpoint)["options"]["max_epochs"] *= factor
    return checkpoint


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
    assert_same(resume_state(ours)["random_states"], resume_state(theirs)["random_states"])
    assert scalars(run) == scalars(tmp_path / "whole/main/version_0")


# Lightning logs an epoch's training scalars after the hook in which checkpoints are saved.
SIGNALED_WHILE_IT_LOGS = """
import os, sys
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities.exceptions import MisconfigurationException
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
    return run_python(folder, "-c", SIGNALED_WHILE_IT_LOGS, int(number), *options)


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


def test_interrupt_before_there_is_a_folder_promises_nothing(call, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(MNISTDataModule, "prepare_data", lambda data: signal.raise_signal(signal.SIGINT))
    interrupted = call(main, *SMALL, "--ckpt_path", "last")
    assert interrupted.returncode == 130
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
        on_train_batch_start=lambda *_: found.append(sorted(path.name for path in folder.iterdir())),
        on_train_epoch_end=lambda *_: found.append(sorted(path.name for path in folder.iterdir())),
    )
    best = ModelCheckpoint(folder, save_top_k=0)
    options = QUIET | {"limit_train_batches": 1, "limit_val_batches": 0}
    trainer = pl.Trainer(max_epochs=2, callbacks=[ResumeCheckpoint({}, best), best, look], **options)
    trainer.fit(Classifier(MLP([16])), MNISTDataModule(DATA))
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
            shutil.copy(Path(trainer.checkpoint_callback.dirpath, "last.ckpt"), self.path)


def fit_with_dropout(folder: Path, seed: int, ckpt_path: str | None = None, **options) -> dict[str, torch.Tensor]:
    pl.seed_everything(seed)
    classifier = Classifier(MLP([16], dropout=0.5))
    best = ModelCheckpoint(folder / f"seed_{seed}")
    callbacks = [best, ResumeCheckpoint({}, best, ckpt_path), KeepMiddle(folder / "middle.ckpt")]
    options = QUIET | {"max_epochs": 2, "limit_train_batches": 3, "limit_val_batches": 0} | options
    trainer = pl.Trainer(callbacks=callbacks, plugins=[AtomicCheckpointIO()], **options)
    trainer.fit(classifier, MNISTDataModule(DATA), ckpt_path=ckpt_path, weights_only=True)
    return classifier.state_dict()


def test_resumed_run_draws_the_dropout_that_it_would_have_drawn(tmp_path: Path):
    whole = fit_with_dropout(tmp_path, seed=0)
    # With another seed only the random state of the checkpoint can bring the same numbers.
    assert_same(fit_with_dropout(tmp_path, seed=1, ckpt_path=str(tmp_path / "middle.ckpt")), whole)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_resumed_run_draws_the_same_dropout_on_a_gpu(tmp_path: Path):
    gpu = {"accelerator": "gpu", "devices": 1}
    fit_with_dropout(tmp_path, seed=0, **gpu)
    whole = torch.cuda.get_rng_state()
    fit_with_dropout(tmp_path, seed=1, ckpt_path=str(tmp_path / "middle.ckpt"), **gpu)
    assert torch.equal(torch.cuda.get_rng_state(), whole)


def test_resumed_run_of_two_processes_ends_with_the_same_bits(script, tmp_path: Path):
    options = (*SMALL, "--max_epochs", 2, "--devices", 2, "--strategy", "ddp")
    assert script("main.py", *options, "--log_dir", "whole").returncode == 0
    process = start(tmp_path, *options, "--log_dir", "killed")
    wait_for(tmp_path / "killed/main/version_0/checkpoints/last.ckpt", process)
    process.kill()
    process.communicate()
    resumed = script("main.py", *options, "--log_dir", "killed", "--ckpt_path", "last")
    assert resumed.returncode == 0, resumed.stderr
    ours, theirs = (
        torch.load(tmp_path / name / "main/version_0/checkpoints/last.ckpt") for name in ("killed", "whole")
    )
    assert_same(ours["state_dict"], theirs["state_dict"])
    assert_same(resume_state(ours)["random_states"], resume_state(theirs)["random_states"])


def test_kill_while_a_checkpoint_is_written_leaves_a_whole_one(tmp_path: Path):
    path = tmp_path / "last.ckpt"
    program = (
        "import sys, torch; from common.for_main import AtomicCheckpointIO\n"
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


SAVE = """
import os, sys, torch
from pathlib import Path
from common.for_main import AtomicCheckpointIO

AtomicCheckpointIO().save_checkpoint({"weights": torch.ones(1000)}, sys.argv[1])
# Any program that syncs a file of its own brings the new name to the disk, though perhaps not what is behind it.
with Path(sys.argv[1]).with_name("other").open("w") as other:
    other.write("x")
    other.flush()
    os.fsync(other.fileno())
"""


def test_checkpoint_is_whole_after_a_power_cut(tmp_path: Path):
    """What has reached the disk is what the file behind a loop device has: a copy of it is the disk after the cut."""
    image, copy, disk = tmp_path / "image", tmp_path / "copy", tmp_path / "disk"
    image.write_bytes(bytes(32 * 2**20))
    disk.mkdir()
    # Without noauto_da_alloc, ext4 makes up for programs that do not sync.
    mount = ["mount", "-o", "loop,noauto_da_alloc"]
    if (
        shutil.which("mkfs.ext4") is None
        or subprocess.run(["mkfs.ext4", "-q", image], check=False).returncode
        or subprocess.run([*mount, image, disk], check=False, capture_output=True).returncode
    ):
        pytest.skip("a disk of one's own needs root and loop devices")
    try:
        run_python(tmp_path, "-c", SAVE, disk / "last.ckpt").check_returncode()
        shutil.copy(image, copy)
    finally:
        subprocess.run(["umount", disk], check=True)
    subprocess.run([*mount, copy, disk], check=True)
    try:
        assert (disk / "other").exists()
        assert torch.equal(torch.load(disk / "last.ckpt")["weights"], torch.ones(1000))
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize(("stop", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_run_says_how_to_go_on(tmp_path: Path, stop: signal.Signals, status: int):
    process = start(tmp_path, "--max_epochs", 100)
    last = tmp_path / "logs/main/version_0/checkpoints/last.ckpt"
    wait_for(last, process)
    process.send_signal(stop)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == status
    assert "Traceback" not in errors
    assert f"stopped; --ckpt_path last goes on from {last.relative_to(tmp_path)}" in output
    assert torch.load(last)["epoch"] >= 0


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
    assert_one_line_error(other_model, "hidden_sizes [64], and this one has [32]")
    other_length = call(main, *SMALL, "--max_epochs", 9, "--ckpt_path", last)
    assert_one_line_error(other_length, "max_epochs 1, and this one has 9")
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

    words = {"weights": "Classifier.load_from_checkpoint"}
    before = sorted(tmp_path.rglob("*"))
    for path in sorted(tmp_path.glob("*.ckpt")):
        result = call(main, *SMALL, "--ckpt_path", path.name)
        assert_one_line_error(result, path.name, "no whole checkpoint of main.py", words.get(path.stem, ""))
    assert sorted(tmp_path.rglob("*")) == before


OPTIONS = {name: parameter.default for name, parameter in inspect.signature(main).parameters.items()}


def save_resumable(path: Path) -> None:
    best = ModelCheckpoint(path.parent)
    callbacks = [best, ResumeCheckpoint(OPTIONS, best)]
    trainer = pl.Trainer(
        max_epochs=1, **QUIET | {"limit_train_batches": 1, "limit_val_batches": 0}, callbacks=callbacks
    )
    trainer.fit(Classifier(MLP([4])), MNISTDataModule(DATA))
    (path.parent / "last.ckpt").replace(path)


def test_whatever_the_file_holds_the_error_is_one_that_becomes_a_line(tmp_path: Path):
    good, bad, numbers = tmp_path / "good.ckpt", tmp_path / "bad.ckpt", random.Random(0)
    save_resumable(good)
    assert resumable_step(str(good), OPTIONS) == 1
    whole = good.read_bytes()
    texts = [b"", b"hello world", (ROOT / "requirements.txt").read_bytes(), pickle.dumps({"a": 1}), bytes(100)]
    texts += [numbers.randbytes(numbers.randrange(300)) for _ in range(100)]
    texts += [b"\x80\x02" + numbers.randbytes(50) for _ in range(100)]  # begins as a pickle does
    texts += [whole[: numbers.randrange(len(whole))] for _ in range(20)]
    pickled = whole.index(b"data.pkl")  # where the names and the numbers are
    for _ in range(150):
        changed = bytearray(whole)
        for place in (numbers.randrange(pickled, pickled + 8000), numbers.randrange(len(whole) - 3000, len(whole))):
            changed[place] = numbers.randrange(256)
        texts.append(bytes(changed))
    refused = 0
    for text in texts:
        bad.write_bytes(text)
        try:
            resumable_step(str(bad), OPTIONS)
        except (OSError, MisconfigurationException):
            refused += 1
    assert refused > 250


def other(value: object) -> object:
    """Another value of an option."""
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int | float) else "another"


def test_run_goes_on_with_all_options_that_count_and_with_devices_for_the_same_batch(tmp_path: Path):
    saved = tmp_path / "saved.ckpt"
    save_resumable(saved)
    for name, value in OPTIONS.items():
        options = OPTIONS | {name: other(value)}
        if name in MAY_CHANGE:
            assert resumable_step(str(saved), options) == 1
        else:
            with pytest.raises(MisconfigurationException, match=name):
                resumable_step(str(saved), options)
    assert resumable_step(str(saved), OPTIONS | {"devices": 2, "num_nodes": 2, "batch_size": 128}) == 1


def test_run_that_has_not_ended_is_not_resumed_by_a_second_one(call, tmp_path: Path):
    process = start(tmp_path, "--max_epochs", 100)
    last = tmp_path / "logs/main/version_0/checkpoints/last.ckpt"
    wait_for(last, process)
    options = (*SMALL, "--max_epochs", 100, "--ckpt_path", "last")
    assert_one_line_error(call(main, *options), "logs/main/version_0 has not ended yet")
    assert process.poll() is None
    process.kill()
    process.communicate()
    # Nothing has to be cleaned up after a kill.
    run = open_run(tmp_path / "logs/main", resume_state(torch.load(last))["options"] | {"ckpt_path": "last"})
    assert (run.version, run.ckpt_path) == (0, str(last))


def test_config_of_a_run_makes_it_again_with_the_same_bits(call, tmp_path: Path):
    options = ("--max_epochs", 1, "--hidden_sizes", "[16]", "--dropout", 0.1, "--seed", 3, "--accelerator", "cpu")
    assert call(main, *options).returncode == 0
    runs = tmp_path / "logs/main"
    again = call(main, "--config", runs / "version_0/config.yaml")
    assert again.returncode == 0, again.stderr
    assert (runs / "version_0/config.yaml").read_text() == (runs / "version_1/config.yaml").read_text()
    one, two = (torch.load(runs / f"version_{number}/checkpoints/last.ckpt") for number in (0, 1))
    assert_same(one["state_dict"], two["state_dict"])
    changed = call(main, "--config", runs / "version_0/config.yaml", "--seed", 4)
    assert changed.returncode == 0, changed.stderr
    assert "seed: 4" in (runs / "version_2/config.yaml").read_text()
    # The data module's arguments stand beside the module's in what the logger keeps.
    assert {"seed: 3", "augment: true", "learning_rate: 0.004"} <= set(
        (runs / "version_0/hparams.yaml").read_text().splitlines()
    )


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
    with pytest.raises(FloatingPointError, match=r"loss/train is nan after step 108; best checkpoint so far: none"):
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
    with pytest.raises(FloatingPointError, match=r"nan after step 2; best checkpoint so far: \S+best\.ckpt"):
        trainer.fit(Classifier(MLP([16])), data)

    # In the script: a run whose weights are spoilt goes on from its checkpoint, and not far.
    assert script("main.py", *SMALL, "--max_epochs", 1).returncode == 0
    last = tmp_path / "logs/main/version_0/checkpoints/last.ckpt"
    checkpoint = left_by_a_longer_run(torch.load(last), 4)
    next(iter(checkpoint["state_dict"].values()))[0, 0] = torch.nan
    torch.save(checkpoint, tmp_path / "spoilt.ckpt")
    result = script("main.py", *SMALL, "--ckpt_path", "spoilt.ckpt")
    assert_one_line_error(result, "is nan after step 216; best checkpoint so far: ", "epoch=0-step=108.ckpt")


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
    runs, new, last = tmp_path / "main", OPTIONS, OPTIONS | {"ckpt_path": "last"}
    assert open_run(runs, last).version == 0
    assert [open_run(runs, new).version for _ in range(1, 12)] == list(range(1, 12))
    # Only one of them was more than a failed start.
    (runs / "version_9/events.out.tfevents.0").touch()
    # A copy that someone keeps beside the runs is none.
    shutil.copytree(runs / "version_9", runs / "version_9_backup")
    run = open_run(runs, last)
    assert (run.version, run.ckpt_path, run.step) == (9, None, 0)
    assert open_run(runs, new).version == 12


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
    checkpoint = left_by_a_longer_run(torch.load(checkpoints / "last.ckpt"), 2)
    # No later epoch can beat the first.
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
    result = run_python(tmp_path, "poisoned.py", *SMALL, *two)
    # One batch of the second epoch was bad, and only one of the processes had it.
    last = tmp_path / "logs/main/version_0/checkpoints/last.ckpt"
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if "error:" in line]
    # Each process says it, unless the other one has ended it before.
    assert 1 <= len(errors) <= 2
    assert all("is nan after step 108; best checkpoint so far: logs/main/version_0" in error for error in errors)
    assert sum("rank 1: " in error for error in errors) <= 1
    saved = [torch.load(path) for path in last.parent.iterdir()]
    assert [checkpoint["global_step"] for checkpoint in saved] == [54, 54]
    assert all(weights.isfinite().all() for checkpoint in saved for weights in checkpoint["state_dict"].values())


FAILS_ON_RANK_1 = """
import main
from common.cli import run_from_command_line

class Failing(main.MNISTDataModule):
    def setup(self, stage):
        super().setup(stage)
        if self.trainer.global_rank == 1:
            raise OSError("the disk of this machine is gone")

main.MNISTDataModule = Failing
run_from_command_line(main.main)
"""


def test_error_of_one_process_is_said_by_that_one(tmp_path: Path):
    (tmp_path / "failing.py").write_text(FAILS_ON_RANK_1)
    result = run_python(tmp_path, "failing.py", *SMALL, "--devices", 2, "--strategy", "ddp")
    assert result.returncode != 0
    assert "error: rank 1: the disk of this machine is gone" in result.stderr
    assert "Traceback" not in result.stderr
