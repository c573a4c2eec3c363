"""The script that the questions about Optuna show: pruning with two devices, as a reader would start it."""

from pathlib import Path

from tests.conftest import run_python


def test_second_trial_is_pruned_on_all_devices(tmp_path: Path):
    # It ends with an assertion of its own.
    result = run_python(tmp_path, "-m", "docs.prune_ddp", timeout=600)
    assert result.returncode == 0, result.stderr
