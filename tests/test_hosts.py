"""Two hosts that share no disk: a network namespace and a folder for each, and one process on each."""

import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT, assert_one_line_error
from tests.test_runs import left_by_a_longer_run, scalars

TINY = ("--hidden_sizes", "[32]", "--accelerator", "cpu", "--devices", 1, "--num_nodes", 2, "--strategy", "ddp")
# Each namespace has a network of its own, so these names and addresses cannot meet those of another test.
ADDRESSES = ("10.77.0.1", "10.77.0.2")
INTERFACES = ("host0", "host1")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def namespaces() -> Iterator[tuple[str, ...]]:
    if shutil.which("ip") is None:
        pytest.skip("there is no ip command to make network namespaces with")
    unique = f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
    names = (f"host0-{unique}", f"host1-{unique}")
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            pair = [["name", interface, "netns", name] for interface, name in zip(INTERFACES, names, strict=True)]
            ip("link", "add", *pair[0], "type", "veth", "peer", *pair[1])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces need root: {error.stderr.strip()}")
        for name, interface, address in zip(names, INTERFACES, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", interface)
            ip("-n", name, "link", "set", interface, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def as_torchrun(rank: int) -> dict[str, str]:
    """The environment that torchrun gives to the process of a host, without the seconds of its own start."""
    of_this_host = {"RANK": rank, "GROUP_RANK": rank, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "WORLD_SIZE": 2}
    of_all = {"MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": 29500, "TORCHELASTIC_RUN_ID": "test"}
    return {name: str(value) for name, value in (of_this_host | of_all).items()}


@pytest.fixture
def launch(namespaces: tuple[str, ...], tmp_path: Path) -> Iterator[Callable[..., list[subprocess.CompletedProcess]]]:
    """Runs `main.py` on both hosts, each in its own folder `host0` or `host1`."""
    started: list[subprocess.Popen] = []

    def run(*options: object, torchrun: bool = False) -> list[subprocess.CompletedProcess]:
        hosts = []
        for rank, (name, interface) in enumerate(zip(namespaces, INTERFACES, strict=True)):
            folder = tmp_path / f"host{rank}"
            folder.mkdir(exist_ok=True)
            python, environment = [sys.executable], os.environ | {"GLOO_SOCKET_IFNAME": interface}
            if torchrun:
                python += ["-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", f"--node_rank={rank}"]
                python += [f"--master_addr={ADDRESSES[0]}", "--master_port=29500"]
            else:
                environment |= as_torchrun(rank)
            command = ["ip", "netns", "exec", name, *python, ROOT / "main.py", *TINY, *options]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            hosts.append(subprocess.Popen(list(map(str, command)), cwd=folder, env=environment, **pipes))
            started.append(hosts[-1])
        outputs = [host.communicate(timeout=150) for host in hosts]
        return [
            subprocess.CompletedProcess(host.args, host.returncode, *output)
            for host, output in zip(hosts, outputs, strict=True)
        ]

    yield run
    for host in started:
        if host.poll() is None:
            host.terminate()  # torchrun then ends what it has started
            host.wait()


def test_no_process_group_is_left_at_the_end(call, tmp_path: Path):
    """Threads of gloo that were still running at the exit have turned status 2 into an abort, once in many runs."""

    def fails_together() -> None:
        """Stands for a run of several processes."""
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        raise OSError("nothing to read")

    assert_one_line_error(call(fails_together), "nothing to read")
    assert not torch.distributed.is_initialized()


def assert_second_epoch(run: Path, process: subprocess.CompletedProcess) -> None:
    """The run has taken the steps of its second epoch, and no others."""
    assert process.stdout.count("test accuracy") == 1
    assert [step for step, _ in scalars(run)["lr-AdamW"] if step >= 54] == [59, 79, 99]
    assert torch.load(run / "checkpoints/last.ckpt")["global_step"] == 108


def test_two_hosts_train_and_resume_without_a_shared_disk(launch, tmp_path: Path):
    first, second = launch("--max_epochs", 1, torchrun=True)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert first.stdout.count("test accuracy") == 1
    assert "test accuracy" not in second.stdout
    assert not list((tmp_path / "host1").iterdir())
    run = tmp_path / "host0/logs/main/version_0"

    last = run / "checkpoints/last.ckpt"
    checkpoint = torch.load(last)
    assert checkpoint["global_step"] == 54
    torch.save(left_by_a_longer_run(checkpoint, 2), last)

    # The second host has no run to go on with.
    for host in launch("--max_epochs", 2, "--ckpt_path", "last"):
        assert_one_line_error(host, "give --ckpt_path the path that it has on the first one")
    assert torch.load(last)["global_step"] == 54
    assert not list((tmp_path / "host1").iterdir())

    shutil.copytree(tmp_path / "host0/logs", tmp_path / "shared")
    first, second = launch("--max_epochs", 2, "--ckpt_path", "logs/main/version_0/checkpoints/last.ckpt")
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    run = tmp_path / "host0/logs/main/version_1"
    assert_second_epoch(run, first)
    assert min(step for step, _ in scalars(run)["lr-AdamW"]) == 59

    first, second = launch("--max_epochs", 2, "--ckpt_path", "last", "--log_dir", tmp_path / "shared")
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert_second_epoch(tmp_path / "shared/main/version_0", first)
