"""What several tests need: running a script as a user would, and reading back what TensorBoard would show."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import psycopg
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchvision.datasets import MNIST

from common.cli import run_from_command_line
from common.data import DATA_DIR as DATA
from common.data import MNISTDataModule

ROOT = Path(__file__).parent.parent
# They begin, so that in the end no process waits for the other one.
LONG_FILES = ["test_readme.py", "test_sweep.py", "test_for_main.py", "test_your_project.py", "test_study.py"]
QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG_FILES.index(item.path.name) if item.path.name in LONG_FILES else len(LONG_FILES))


def pytest_configure(config: pytest.Config) -> None:
    """Extracts the files for torchvision, before the processes of pytest-xdist start that all read them."""
    if not hasattr(config, "workerinput"):
        MNIST(DATA, download=True)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Two files of tests run at the same time, and threads that wait for each other would take many times as long."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # for the scripts that tests start
    os.environ["OMP_WAIT_POLICY"] = "passive"  # for those that ask for more
    os.environ["PYTHONIOENCODING"] = "cp1252"  # Windows has no other letters, and whatever a script prints must do


@pytest.fixture(autouse=True)
def _exact_products() -> Iterator[None]:
    """Scripts and blocks set this for the whole process, and other tests compare to the last digits."""
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.fixture(scope="session", autouse=True)
def _interruptible() -> None:
    """A shell script's background jobs ignore SIGINT, and so would all that they start: the scripts of the tests.

    A handler of our own is not inherited, it becomes the default in a started program.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def data() -> MNISTDataModule:
    """The data module with all splits loaded, as without a Trainer."""
    data = MNISTDataModule(DATA)
    data.setup("fit")
    data.setup("test")
    return data


def start(folder: Path, *words: object, **environment: str) -> subprocess.Popen:
    """Starts Python in a folder, with the modules of this repository, as the first process of a group of its own."""
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": paths} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen, timeout: float = 600) -> subprocess.CompletedProcess:
    """Waits for what `start` has started, and ends its whole group if that takes too long."""
    try:
        output, errors = process.communicate(timeout=timeout)
    except BaseException:  # Ctrl-C too
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def run_python(folder: Path, *words: object, timeout: float = 600, **environment: str) -> subprocess.CompletedProcess:
    return finish(start(folder, *words, **environment), timeout)


def start_script(folder: Path, name: str, *options: object) -> subprocess.Popen:
    return start(folder, ROOT / name, *options)


@pytest.fixture
def script(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """Runs a script of this repository in an empty folder, as a user would."""
    return lambda name, *options: run_python(tmp_path, ROOT / name, *options)


@pytest.fixture
def call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> Callable[..., subprocess.CompletedProcess]:
    """Calls the `main` of a script with options in the test's own process, which saves the seconds of the imports."""

    def run(main: Callable[..., object], *options: object, folder: Path = tmp_path) -> subprocess.CompletedProcess:
        monkeypatch.chdir(folder)
        capsys.readouterr()
        code = 0
        try:
            run_from_command_line(main, list(map(str, options)))
        except SystemExit as ended:
            code = ended.code
        finally:
            # After Ctrl-C, Lightning ignores any further one until the program ends, which here goes on.
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return subprocess.CompletedProcess(options, code, *capsys.readouterr())

    return run


def is_gone(pid: int) -> bool:
    """A process that has ended, though nobody may have asked for its exit status: some containers' init does not."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return state.strip()[:1] in ("", "Z")


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


def read_scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """The steps and values of each curve of a run."""
    events = read_events(run)
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.fixture(scope="session")
def server() -> Iterator[SimpleNamespace]:
    """A PostgreSQL server of our own on loopback: its address, and `stop`, `start` and `execute`."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not programs or not shutil.which("runuser"):
        pytest.skip("no PostgreSQL server is installed (Debian: apt-get install postgresql)")
    folder = Path("/tmp") / f"pg-{os.getpid()}"  # a short path: a socket's may have 107 characters
    folder.mkdir()
    # The server refuses to run as root.
    become = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    if become:
        shutil.chown(folder, "postgres")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def run(program: str, *options: str) -> None:
        # Not into pipes: the server would keep them open.
        command = [*become, programs[-1] / program, "-D", f"{folder}/data", *options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/")

    def start() -> None:
        run("pg_ctl", "-w", "-l", f"{folder}/log", "-o", f"-p {port} -h 127.0.0.1 -k {folder}", "start")

    def stop() -> None:
        run("pg_ctl", "-w", "-m", "immediate", "stop")

    def execute(statement: str) -> None:
        with psycopg.connect(f"postgresql://sweep@127.0.0.1:{port}/postgres", autocommit=True) as connection:
            connection.execute(statement)

    run("initdb", "-A", "trust", "-U", "sweep", "--no-sync")
    start()
    try:
        yield SimpleNamespace(address=f"127.0.0.1:{port}", start=start, stop=stop, execute=execute)
    finally:
        stop()
        shutil.rmtree(folder)


@pytest.fixture
def postgresql(server: SimpleNamespace, tmp_path: Path) -> str:
    """The URL of an empty database on that server."""
    name = "".join(filter(str.isalnum, tmp_path.name)).lower()
    server.execute(f"CREATE DATABASE {name}")
    return f"postgresql+psycopg://sweep@{server.address}/{name}"
