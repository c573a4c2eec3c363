"""`main.py`, run as a user would run it."""

import importlib
import inspect
import re
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

from common.callbacks import MetricsCallback
from common.classifier import Classifier
from common.data import MNISTDataModule
from main import main
from tests.conftest import DATA, assert_one_line_error, read_events
from tests.test_classifier import QUIET


def test_short_training_logs_what_the_readme_promises(script, tmp_path: Path):
    result = script("main.py", "--max_epochs", 1)
    assert result.returncode == 0, result.stderr
    assert "Warning" not in result.stderr
    accuracy = float(re.search(r"test accuracy +([\d.]+)%", result.stdout)[1])
    assert accuracy > 90
    checkpoint = tmp_path / re.search(r"best checkpoint +(.+)", result.stdout)[1]
    assert Classifier.load_from_checkpoint(checkpoint, "cpu")(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    assert "tensorboard --logdir logs" in result.stdout

    events = read_events(tmp_path / "logs/main/version_0")
    tags = events.Tags()
    promised = {f"{metric}/{stage}" for metric in ("loss", "accuracy") for stage in ("train", "val", "test")}
    assert promised | {"f1/val", "f1/test", "lr-AdamW", "gradient_norm/model.layers.1.weight"} <= set(tags["scalars"])
    assert {"gradient/model.layers.1.weight", "gradient/model.layers.7.bias"} <= set(tags["histograms"])
    assert set(tags["images"]) == {"confusion/test", "mistakes/test"}
    assert events.Scalars("accuracy/test")[0].value == pytest.approx(accuracy / 100, abs=1e-4)
    # One-cycle: the learning rate rises to its peak and falls to almost nothing.
    rates = [event.value for event in events.Scalars("lr-AdamW")]
    assert rates[0] < max(rates) > 10 * rates[-1]


def test_tilde_is_expanded_where_a_shell_leaves_it(call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mnist").symlink_to(DATA)
    options = ("--max_epochs", 1, "--hidden_sizes", "[8]", "--data_dir=~/mnist", "--log_dir=~/runs")
    result = call(main, *options)
    assert result.returncode == 0, result.stderr
    assert len(list(tmp_path.glob("runs/main/version_0/checkpoints/*.ckpt"))) == 2  # the best and the last
    made_by_cuda = {".cache", ".nv"}
    assert {path.name for path in tmp_path.iterdir()} - made_by_cuda == {"mnist", "runs"}
    again = call(main, *options, "--ckpt_path=~/runs/main/version_0/checkpoints/last.ckpt")
    assert again.returncode == 0, again.stderr


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
    events = read_events(tmp_path / "logs/main/version_0")
    accuracies = [event.value for event in events.Scalars("accuracy/train")]
    assert len(accuracies) == 60
    assert accuracies[0] < 0.5
    assert accuracies[-1] == 1.0


@pytest.mark.parametrize(
    ("profiler", "words"), [("simple", "run_training_epoch"), ("advanced", "cumtime"), ("pytorch", "aten::addmm")]
)
def test_profiler_reports(script, profiler: str, words: str):
    result = script("main.py", "--profiler", profiler, "--fast_dev_run", 3)
    assert result.returncode == 0, result.stderr
    assert words in result.stdout + result.stderr


def test_two_processes_agree_with_one_on_the_same_weights(script, tmp_path: Path):
    two = script(
        "main.py", "--max_epochs", 1, "--accelerator", "cpu", "--devices", 2, "--strategy", "ddp", "--log_dir", "two"
    )
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("test accuracy") == 1
    [run] = (tmp_path / "two/main").iterdir()
    assert len(list((run / "checkpoints").iterdir())) == 2  # the best and the last, written once
    of_two = read_events(run)
    # 55,000 images for 2 processes in batches of 512.
    assert of_two.Scalars("accuracy/train")[0].step == 54 - 1

    [best] = (run / "checkpoints").glob("epoch=*.ckpt")
    classifier = Classifier.load_from_checkpoint(best)
    [of_one] = pl.Trainer(callbacks=[MetricsCallback()], **QUIET).test(classifier, MNISTDataModule(DATA), verbose=False)
    for name in ("accuracy/test", "f1/test", "loss/test"):
        assert of_two.Scalars(name)[0].value == pytest.approx(of_one[name], rel=1e-6)
    assert len(of_two.Images("confusion/test")) == len(of_two.Images("mistakes/test")) == 1


@pytest.mark.parametrize("name", ["main", "sweep", "initialization"])
def test_help_explains_every_option(script, name: str):
    result = script(f"{name}.py", "--help")
    assert result.returncode == 0
    function = importlib.import_module(name).main
    explained = re.findall(r"^    (\w+): (.+)$", inspect.getdoc(function), flags=re.MULTILINE)
    assert [option for option, _ in explained] == list(inspect.signature(function).parameters)
    shown = " ".join(result.stdout.split())
    for option, words in explained:
        assert f"--{option}" in shown
        assert " ".join(words.split()[:4]).rstrip(".") in shown


@pytest.mark.parametrize("name", ["main", "sweep", "initialization"])
def test_script_refuses_bad_input_as_its_main_does(script, tmp_path: Path, name: str):
    assert_one_line_error(script(f"{name}.py", "--seed", -1), "seed", "v>=0")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--max_epochs", "many"], ["max_epochs", "PositiveInt"]),
        (["--batch_size", "0"], ["batch_size", "v>0"]),
        (["--hidden_sizes", "[512,-1]"], ["hidden_sizes", "v>0"]),
        (["--learning_rate", "1.5"], ["learning_rate", "v<1"]),
        (["--dropout", "1"], ["dropout", "v<1"]),
        (["--weight_decay", "-1"], ["weight_decay", "v>=0"]),
        (["--accelerator", "abacus"], ["accelerator", "'cpu', 'gpu'"]),
        (["--activation", "step"], ["activation", "'relu', 'gelu'"]),
        (["--profiler", "slow"], ["profiler", "'simple'"]),
        (["--max_epochs", "0"], ["max_epochs", "v>0"]),
        (["--max_epochs", "2.5"], ["max_epochs", "PositiveInt"]),
        (["--batch_size", "-5"], ["batch_size", "v>0"]),
        (["--hidden_sizes", "512"], ["hidden_sizes", "list"]),
        (["--hidden_sizes", "[a]"], ["hidden_sizes", "PositiveInt"]),
        (["--learning_rate", "0"], ["learning_rate", "v>0"]),
        (["--learning_rate", "nan"], ["learning_rate", "v>0"]),
        (["--dropout", "-0.1"], ["dropout", "v>=0"]),
        (["--label_smoothing", "1"], ["label_smoothing", "v<1"]),
        (["--patience", "0"], ["patience", "v>0"]),
        (["--num_nodes", "0"], ["num_nodes", "v>0"]),
        (["--strategy", "prayer"], ["strategy", "'ddp'"]),
        (["--precision", "8"], ["precision", "'32-true'"]),
        (["--fast_dev_run", "-1"], ["fast_dev_run", "v>=0"]),
        (["--overfit_batches", "-1"], ["overfit_batches", "v>=0"]),
        (["--seed", "-1"], ["seed", "v>=0"]),
        (["10"], ["nrecognized arguments", "10"]),
        (["--devices", "none"], ["devices", "PositiveInt", "'auto'"]),
        (["--epochs", "3"], ["nrecognized arguments", "--epochs"]),
        (["--seed"], ["seed"]),
        (["--ckpt_path", "nowhere.ckpt"], ["nowhere.ckpt"]),
        (["--log_dir", "/proc/logs"], ["/proc/logs"]),
        (["--data_dir", "/proc/data"], ["/proc/data"]),
    ],
    ids=lambda value: value[0].removeprefix("--") if value[0].startswith("--") else "",
)
def test_bad_input_is_one_line(call, tmp_path: Path, options: list[str], words: list[str]):
    assert_one_line_error(call(main, *options), *words)
    # What is wrong with the data is found out after the folder was made.
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} <= {"config.yaml", "lock"}
