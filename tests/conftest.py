"""What several tests need: running a script as a user would, and reading back what TensorBoard would show."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.cli import run_from_command_line
from common.data import DATA_DIR as DATA
from common.data import MNISTDataModule

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session", autouse=True)
def _extracted() -> None:
    MNISTDataModule(DATA).prepare_data()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Two files of tests run at the same time, and threads that wait for each other would take many times as long."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # for the scripts that tests start
    os.environ["OMP_WAIT_POLICY"] = "passive"  # for those that ask for more


@pytest.fixture
def data() -> MNISTDataModule:
    """The data module with all splits loaded, as without a Trainer."""
    data = MNISTDataModule(DATA)
    data.setup("fit")
    data.setup("test")
    return data


@pytest.fixture
def script(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """Runs a script of this repository in an empty folder, as a user would."""

    def run(name: str, *options: object) -> subprocess.CompletedProcess:
        command = [sys.executable, str(ROOT / name), *map(str, options)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)

    return run


@pytest.fixture
def call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> Callable[..., subprocess.CompletedProcess]:
    """Calls the `main` of a script with options in the test's own process, which saves the seconds of the imports."""

    def run(main: Callable[..., object], *options: object) -> subprocess.CompletedProcess:
        monkeypatch.chdir(tmp_path)
        capsys.readouterr()
        code = 0
        try:
            run_from_command_line(main, list(map(str, options)))
        except SystemExit as ended:
            code = ended.code
        return subprocess.CompletedProcess(options, code, *capsys.readouterr())

    return run


def assert_one_line_error(result: subprocess.CompletedProcess, *words: str) -> None:
    """The program ended with status 2 and a single line on stderr that has the words in it."""
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if "error:" in line]
    assert len(errors) == 1, result.stderr
    assert result.stderr.rstrip().endswith(errors[0])
    for word in words:
        assert word in errors[0]


def read_events(run: Path) -> EventAccumulator:
    """All that TensorBoard would show of a run."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0, "histograms": 0, "images": 0})
    events.Reload()
    return events
