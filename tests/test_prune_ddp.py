"""The script that the questions about Optuna show: pruning with two devices, as a reader would start it."""

import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT


def test_second_trial_is_pruned_on_all_devices(tmp_path: Path):
    command = [sys.executable, "-m", "docs.prune_ddp"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    # It ends with an assertion of its own.
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert result.returncode == 0, result.stderr
