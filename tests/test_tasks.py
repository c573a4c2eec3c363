"""docs/tune.py, and the block of docs/tasks.md beside starter.py. tests/test_readme.py runs the others."""

import csv
import re
import signal
import time
from pathlib import Path

import optuna
import pytest
import torch
from torchvision.datasets import MNIST
from torchvision.utils import save_image

from tests.conftest import DATA, ROOT, assert_one_line_error, finish, run_python, start
from tests.test_your_project import write_images

# They wait for each other at the start, and long where another one must not come in between: after it was looked which
# tables there are, and after the trials were counted.
WORKER = """
import optuna, os, pathlib, runpy, sqlalchemy, starter, time
sqlalchemy.event.listen(sqlalchemy.MetaData, "before_create", lambda *_, **options: time.sleep(1))
ask = optuna.Study.ask
optuna.Study.ask = lambda study: time.sleep(1) or ask(study)
pathlib.Path(f"{os.getpid()}.ready").touch()
while len(list(pathlib.Path().glob("*.ready"))) < 3:
    time.sleep(0.001)
runpy.run_path("tune.py", run_name="__main__")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("starter.py", "tune.py"):
        (tmp_path / name).write_bytes((ROOT / "docs" / name).read_bytes())
    return tmp_path


def test_three_workers_share_a_search_that_starts_at_the_same_moment(folder: Path):
    write_images(folder / "data")
    (folder / "worker.py").write_text(WORKER)
    workers = [start(folder, "worker.py", "--n_trials", 4, "--max_epochs", 2) for _ in range(3)]
    for worker in map(finish, workers):
        assert worker.returncode == 0, worker.stderr
    study = optuna.load_study(study_name="starter", storage=f"sqlite:///{folder}/tune.db")
    assert [trial.state.name in ("COMPLETE", "PRUNED") for trial in study.trials] == 4 * [True]
    for trial in study.trials:
        assert trial.value == max(trial.intermediate_values.values())

    result = run_python(folder, "tune.py", "--max_epochs", 2, "--test")
    assert result.returncode == 0, result.stderr
    assert len(re.findall(r"seed_\d: accuracy/val \d.\d+, accuracy/test \d.\d+", result.stdout)) == 3
    assert len(list(folder.glob("tune/seed_?/checkpoints/best.ckpt"))) == 3


def test_trial_that_ctrl_c_has_ended_is_replaced(folder: Path):
    write_images(folder / "data")
    worker = start(folder, "tune.py", "--n_trials", 1, "--max_epochs", 1000)
    while not (folder / "tune/trial_0/checkpoints/best.ckpt").exists():
        assert worker.poll() is None
        time.sleep(0.1)
    worker.send_signal(signal.SIGINT)
    finish(worker)
    (folder / "data/test/one/1.png").write_bytes(b"")  # named before a worker begins
    assert_one_line_error(run_python(folder, "tune.py", "--n_trials", 1), "test/one/1.png: cannot identify")
    (folder / "data/test/one/1.png").unlink()
    assert_one_line_error(run_python(folder, "tune.py", "--test"), "no trial is complete")
    assert run_python(folder, "tune.py", "--n_trials", 1, "--max_epochs", 1).returncode == 0
    study = optuna.load_study(study_name="starter", storage=f"sqlite:///{folder}/tune.db")
    assert [trial.state.name for trial in study.trials] == ["FAIL", "COMPLETE"]


def test_each_image_may_have_several_labels(folder: Path):
    torch.manual_seed(0)
    (folder / "photos").mkdir()
    mnist, present = MNIST(DATA), torch.rand(240, 3) < 0.5
    rows = [[f"{number}.png", *labels] for number, labels in enumerate(present.int().tolist())]
    with open(folder / "photos/labels.csv", "w", newline="") as file:
        csv.writer(file).writerows([["file", "zero", "one", "seven"], *rows])
    digits = torch.stack([mnist.data[mnist.targets == digit][:240] / 255 for digit in (0, 1, 7)], dim=1)
    for row, three in zip(rows, digits * present[..., None, None], strict=True):  # side by side, in any order
        save_image(torch.cat(list(three[torch.randperm(3)]), dim=1), folder / "photos" / row[0])
    page = (ROOT / "docs/tasks.md").read_text()
    [block] = re.findall(r"<!-- beside starter.py -->\n```python\n(.+?)^```$", page, re.MULTILINE | re.DOTALL)
    (folder / "tags.py").write_text(block)
    result = run_python(folder, "tags.py")
    assert result.returncode == 0, result.stderr
    # Yes to everything has 0.67, and where the edges are cut off there is little more.
    assert float(re.search(r"f1/val +(\d.\d+)", result.stdout)[1]) > 0.74
