"""Options, errors in one line, and the folders of runs."""

import errno
import importlib
import inspect
import os
import re
import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from common.cli import make_version, versions
from common.data import MNISTDataModule
from main import main
from tests.conftest import DATA, ROOT, assert_one_line_error, run_python


@pytest.mark.parametrize("name", ["main", "sweep", "initialization"])
def test_help_explains_every_option(call, name: str):
    function = importlib.import_module(name).main
    result = call(function, "--help")
    assert result.returncode == 0
    explained = re.findall(r"^    (\w+): (.+)$", inspect.getdoc(function), flags=re.MULTILINE)
    assert [option for option, _ in explained] == list(inspect.signature(function).parameters)
    shown = " ".join(result.stdout.split())
    for option, words in explained:
        assert f"--{option}" in shown
        assert " ".join(words.split()[:4]).rstrip(".") in shown


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--hidden_sizes", "[512,-1]"], ["hidden_sizes", "v>0"]),
        (["--learning_rate", "1.5"], ["learning_rate", "v<1"]),
        (["--dropout", "1"], ["dropout", "v<1"]),
        (["--label_smoothing", "-0.1"], ["label_smoothing", "v>=0"]),
        (["--seed", "4294967296"], ["seed", "4294967296"]),
        (["--activation", "step"], ["activation", "'relu', 'gelu'"]),
        (["--epochs", "3"], ["nrecognized arguments", "--epochs"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml"]),
        (["--ckpt_path", "nowhere.ckpt"], ["No such file", "nowhere.ckpt"]),
        (["--log_dir", "/proc/logs"], ["/proc/logs"]),
        (["--data_dir", "/proc/data"], ["/proc/data"]),
    ],
    ids=lambda value: value[0],
)
def test_bad_input_is_one_line(call, tmp_path: Path, options: list[str], words: list[str]):
    assert_one_line_error(call(main, *options), *words)
    # What is wrong with the data is found out after the folder was made.
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} <= {"config.yaml"}


def test_link_that_leads_nowhere_is_one_line(tmp_path: Path):
    (tmp_path / "logs").symlink_to(tmp_path / "not_mounted")
    assert_one_line_error(run_python(tmp_path, ROOT / "main.py", timeout=120), "logs")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # in the logger's thread
@pytest.mark.parametrize("size", [4_000, 300_000], ids=["the logger meets it", "a checkpoint meets it"])
def test_file_that_cannot_be_written_is_one_line(call, size: int):
    """As on a full disk: no file may grow beyond so many bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        result = call(main, "--max_epochs", 1, "--hidden_sizes", "[512]", "--accelerator", "cpu")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_one_line_error(result, os.strerror(errno.EFBIG))


def test_mistake_in_the_code_shows_its_traceback(call, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(MNISTDataModule, "setup", lambda data, stage: {}["mistake"])
    with pytest.raises(KeyError, match="mistake"):
        call(main, "--fast_dev_run")


def test_no_process_group_is_left_at_the_end(call, tmp_path: Path):
    """Threads of gloo that were still running at the exit have turned status 2 into an abort, once in many runs."""

    def fails_together() -> None:
        """Stands for a run of several processes."""
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        raise OSError("nothing to read")

    assert_one_line_error(call(fails_together), "nothing to read")
    assert not torch.distributed.is_initialized()


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


def test_runs_that_start_at_once_get_folders_of_their_own(tmp_path: Path):
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(make_version, [tmp_path / "logs/main"] * 40, [{}] * 40))
    assert versions(tmp_path / "logs/main") == {int(path.name.removeprefix("version_")): path for path in folders}
    assert sorted(versions(tmp_path / "logs/main")) == list(range(40))
