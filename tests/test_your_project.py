"""docs/starter.py and docs/your_project.md: a reader follows them in a folder of his own, and makes the mistakes there.

The digits 0, 1 and 7 of MNIST are his images, as PNG files, and the table is made here.
"""

import math
import pickle
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image
from pytorch_lightning.callbacks import LearningRateMonitor
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score
from torchmetrics.functional.classification import binary_f1_score, multiclass_f1_score
from torchvision.datasets import MNIST
from torchvision.datasets.folder import default_loader
from torchvision.models import ResNet18_Weights

from common.data import MEAN, STD, MNISTDataModule
from common.model import MLP
from tests.conftest import DATA, QUIET, ROOT, assert_one_line_error, read_events, run_python

STARTER = ROOT / "docs/starter.py"
PAGE = (ROOT / "docs/your_project.md").read_text()
# Each Python block of the page by the heading above it.
BLOCKS = {
    re.findall(r"^##+ (.+)$", PAGE[: match.start()], re.MULTILINE)[-1]: match[1]
    for match in re.finditer(r"^```python\n(.+?)^```$", PAGE, re.MULTILINE | re.DOTALL)
}
CHECKPOINTS = Path("lightning_logs/version_0/checkpoints")


# The reader's folder


def write_images(folder: Path) -> None:
    mnist = MNIST(DATA)
    for digit, name in ((0, "zero"), (1, "one"), (7, "seven")):
        indices = iter((mnist.targets == digit).nonzero().flatten().tolist())
        for split, count in {"train": 24, "val": 12, "test": 12}.items():
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                image = mnist[next(indices)][0].convert("L" if number else "RGBA")
                image.save(folder / split / name / f"{number}.png")


def write_table(path: Path) -> None:
    draw = np.random.default_rng(0)
    area, rooms, age = draw.uniform(30, 200, 600), draw.integers(1, 8, 600), draw.uniform(0, 90, 600)
    price = 2500 * area + 8000 * rooms - 900 * age + draw.normal(0, 10_000, 600)
    house = draw.random(600) < 0.4
    lines = ["area,rooms,kind,age,tax,price"]
    for i, (size, count, years, cost) in enumerate(zip(area, rooms, age, price + 50_000 * house, strict=True)):
        kind = "" if i % 20 == 3 else "house" if house[i] else "flat"
        years = ["nan", "NA", "", *6 * [f"{years:.0f}"]][i % 9]
        lines.append(f"{size:.0f},{count},{kind},{years},0.1,{cost if i % 50 else 'nan'}")
    path.write_text("\n".join([*lines, "100,3,castle,800,0.1,900000", ""]))


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    words = [sys.executable, *arguments]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=600, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Has the file, the images and the table, and what the page's first command has left."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "starter.py").write_bytes(STARTER.read_bytes())
    write_images(folder / "data")
    write_table(folder / "houses.csv")
    result = python(folder, "starter.py", "--data_dir", "data", "--max_epochs", "2")
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture
def run_block(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> Callable[..., tuple[dict, str]]:
    """Runs the block under a heading in the reader's folder, and returns its names and what it has printed."""

    def run(heading: str, *changes: tuple[str, str]) -> tuple[dict, str]:
        monkeypatch.chdir(folder)
        monkeypatch.syspath_prepend(folder)
        code = BLOCKS[heading]
        for old, new in changes:
            assert old in code
            code = code.replace(old, new)
        names = {"__name__": "__main__"}
        capsys.readouterr()
        exec(compile(code, heading, "exec"), names)
        return names, capsys.readouterr().out

    return run


# The file


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--data_dir", "nowhere"], ["No such file or directory", "nowhere"]),
        (["--data_dir", "data/val"], ["No such file or directory", "train"]),
        (["--data_dir", "incomplete"], ["val has ['one'], train has ['one', 'seven', 'zero']"]),
        (["--data_dir", "broken"], ["broken/train/one/1.png: ", "broken/test/zero/2.png: its 16 bits"]),
        (["--ckpt_path", "nothing.ckpt"], ["No such file or directory", "nothing.ckpt"]),
        (["--ckpt_path", "moved.ckpt"], ["No such file or directory", "best.ckpt"]),
        (["--max_epochs", "ten"], ["invalid int value: 'ten'"]),
    ],
)
def test_starter_says_in_one_line_what_is_wrong(
    options: list[str],
    words: list[str],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    if not (folder / "incomplete").exists():
        shutil.copytree(folder / "data", folder / "broken")
        (folder / "broken/train/one/1.png").write_bytes((folder / "data/train/one/1.png").read_bytes()[:-40])
        Image.fromarray(np.full((9, 9), 400, np.uint16)).save(folder / "broken/test/zero/2.png")
        shutil.copy(folder / CHECKPOINTS / "newest.ckpt", folder / "moved.ckpt")
        (folder / "incomplete/val/one").mkdir(parents=True)
        (folder / "incomplete/val/one/0.png").write_bytes((folder / "data/val/one/0.png").read_bytes())
        for split in ("train", "test"):
            (folder / "incomplete" / split).symlink_to(folder / "data" / split)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["starter.py", *options])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path("starter.py", run_name="__main__")
    assert_one_line_error(subprocess.CompletedProcess(options, ended.value.code, *capsys.readouterr()), *words)


def cells(first: str) -> dict[str, list[str]]:
    """Of the table whose header begins with that word, the code in each row by the row's first cell."""
    rows = re.search(rf"^\| {first} \|.+\n\|.+\n((?:\|.+\n)+)", PAGE, re.MULTILINE)[1]
    return {row.split(" | ")[0].strip("| "): re.findall(r"`([^`]+)`", row) for row in rows.splitlines()}


def test_starter_goes_on_with_all_that_people_change_first(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    code, rows = STARTER.read_text(), cells("to change")
    buffer, _, weighted = rows["the weights of classes"][:3]
    for old, new in (
        ("self.save_hyperparameters()", f"self.save_hyperparameters(); {buffer} #"),
        ("cross_entropy(logits, labels)", weighted),
        ("callbacks=[best, newest])", f"callbacks=[best, newest, {rows['an average of the weights (EMA)'][0]}])"),
        ("logger=logger,", f"{rows['another logger beside'][0]}, {rows['to limit the length of gradients'][0]},"),
    ):
        assert old in code
        code = code.replace(old, new)
    (tmp_path / "starter.py").write_text(code)
    (tmp_path / "data").symlink_to(folder / "data")
    monkeypatch.chdir(tmp_path)
    for options in (["--max_epochs", "2"], ["--max_epochs", "3", "--ckpt_path", f"{CHECKPOINTS}/newest.ckpt"]):
        monkeypatch.setattr(sys, "argv", ["starter.py", *options])
        names = runpy.run_path("starter.py", run_name="__main__")
        assert {path.name for path in CHECKPOINTS.iterdir()} == {"best.ckpt", "newest.ckpt"}
    assert len(list(Path("lightning_logs").iterdir())) == 1
    tables = [path.read_text() for path in Path("csv").rglob("metrics.csv")]
    assert sorted(table.count("\n") for table in tables) == [4, 6]  # a header, and three lines an epoch
    # One curve of all three epochs, whose highest point is the best checkpoint, whichever of the two runs saved it.
    curve = [event.value for event in read_events(CHECKPOINTS.parent).Scalars("accuracy/val")]
    state = torch.load(CHECKPOINTS / "best.ckpt", weights_only=True)
    assert (len(curve), state["epoch"]) == (3, curve.index(max(curve)))
    assert state["hyper_parameters"]["classes"] == ["one", "seven", "zero"]
    assert state["state_dict"]["weights"].tolist() == [1, 1, 5]
    assert names["trainer"].gradient_clip_val == 1
    # What was tested is what was saved and validated: the average.
    classifier, name = names["classifier"].cpu(), "model.0.0.weight"
    assert torch.equal(classifier.state_dict()[name], state["state_dict"][name])
    assert not torch.equal(state["state_dict"][name], state["current_model_state"][name])
    [val] = pl.Trainer(**QUIET).validate(classifier, names["data"], verbose=False)
    assert val["accuracy/val"] == pytest.approx(max(curve))
    # One that depends on no batch: the weights of classes are for training.
    images, labels = zip(*names["data"].val_set, strict=True)
    with torch.no_grad():
        loss = F.cross_entropy(classifier.eval()(torch.stack(images)), torch.tensor(labels))
    assert val["loss/val"] == pytest.approx(loss.item(), rel=1e-3)


# The page's blocks


def test_training_images_alone_are_changed_at_random(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(folder)
    from starter import AUGMENTED, PLAIN, SIZE, ImageData

    data = ImageData(folder / "data")
    assert data.train_set.transform is AUGMENTED
    for images, same in ((data.train_set, False), (data.val_set, True), (data.test_set, True)):
        image, label = pickle.loads(pickle.dumps(images))[0]  # what Windows and Mac do for worker processes
        assert torch.equal(image, images[0][0]) == same
        assert (image.shape, label) == ((3, SIZE, SIZE), 0)
    # A phone's photo stands upright: it is stored on its side, and its EXIF data says so.
    exif, upright = Image.Exif(), Image.open(data.train_set.samples[0][0]).crop((0, 0, 28, 20)).convert("RGB")
    exif[ExifTags.Base.Orientation] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "phone.png", exif=exif)
    for transform in (PLAIN, AUGMENTED):
        stored, wanted = default_loader(tmp_path / "phone.png"), upright
        assert torch.equal(*(pl.seed_everything(1) and transform(image) for image in (stored, wanted)))


def test_images_are_split(run_block: Callable, folder: Path):
    for split in ("train", "val", "test"):
        for path in (folder / "data" / split).glob("*/*"):
            copy = folder / "images" / path.parent.name / f"{split}-{path.name}"
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    run_block("Start with one file", ('"data"', '"split"'))
    for split, count in {"train": 38, "val": 5, "test": 5}.items():  # of 48 images of each class
        counts = {path.name: len(list(path.iterdir())) for path in (folder / "split" / split).iterdir()}
        assert counts == {"zero": count, "one": count, "seven": count}
    copied = {path.read_bytes() for path in (folder / "split").glob("*/*/*")}
    assert copied == {path.read_bytes() for path in (folder / "images").glob("*/*")}
    with pytest.raises(FileExistsError, match="split"):  # a second draw would mix training and test
        run_block("Start with one file", ('"data"', '"split"'))
    for number in range(2):
        (folder / "images/few").mkdir(exist_ok=True)
        (folder / f"images/few/{number}.png").write_bytes(b"")
    with pytest.raises(SystemExit, match="three images: few"):
        run_block("Start with one file", ('"data"', '"again"'))
    assert not (folder / "again").exists()


def test_prediction_has_names(run_block: Callable):
    names, printed = run_block("Use what it has learned")
    assert len(names["probabilities"]) == 36
    assert torch.allclose(names["probabilities"].sum(dim=1), torch.ones(36))
    assert re.search(r"0\.png (zero|one|seven) \d+%", printed)


def test_table_with_gaps_is_learned_in_its_own_units(run_block: Callable):
    names, printed = run_block("A table")
    assert "tax: 0 missing, and always the same: not used\n" in printed
    assert "kind castle: 0 missing, and always the same: not used\n" in printed
    assert re.search(r"^age: [1-9]\d+ missing$", printed, re.MULTILINE)
    train, test = (names["data"].train_dataloader().dataset.tensors, names["data"].test_dataloader().dataset.tensors)
    assert (len(train[1]), len(test[1])) == (471, 59)  # 80 and 10 % of those that have a price
    assert names["test"]["r2/test"] > 0.8
    # The checkpoint gives what was tested; the mean stands for what is missing, and the constant column for nothing.
    regressor = names["regressor"]
    with torch.no_grad():
        assert (regressor(test[0]) - test[1]).abs().mean().item() == pytest.approx(names["test"]["mae/test"], rel=1e-4)
        mean = train[0].nanmean(dim=0)[5].item()
        rows = [names["house"] | change for change in ({}, {"age": str(mean)}, {"age": "NaN", "tax": "7"})]
        same = regressor(names["encode"](rows, regressor.hparams.columns))
    assert same.tolist() == pytest.approx(3 * [same[0].item()], rel=1e-4)
    assert same[0].item() == pytest.approx(2500 * 120 + 8000 * 4 - 900 * mean, rel=0.2)


def without_numbers(text: str) -> str:
    return re.sub(r"[\d,]+", "", text)


def test_images_in_memory_are_the_same(run_block: Callable, folder: Path):
    names, printed = run_block("Images that fit into memory")
    shown = re.search(r"```text\n(files .+?)```", PAGE, re.DOTALL)[1]
    assert without_numbers(shown).startswith(without_numbers(printed))  # then those of photographs; times differ
    memory, files = names["ImagesInMemory"]("data"), names["ImageData"]("data", 64, num_workers=0)
    assert memory.train_set.classes == files.train_set.classes  # starter.py asks for them
    for ours, usual in zip(memory.val_dataloader(), files.val_dataloader(), strict=True):
        assert torch.equal(ours[0], usual[0])
        assert torch.equal(ours[1], usual[1])
    pl.Trainer(fast_dev_run=True, **QUIET).fit(sys.modules["starter"].ImageClassifier(["one", "seven", "zero"]), memory)


def test_backbone_is_frozen_then_trained(run_block: Callable, monkeypatch: pytest.MonkeyPatch):
    kept = []
    fit = pl.Trainer.fit

    def fit_and_keep(trainer: pl.Trainer, module: pl.LightningModule, data: pl.LightningDataModule) -> None:
        kept.append({name: value.clone() for name, value in module.state_dict().items()})
        fit(trainer, module, data)
        kept.append({name: value.clone() for name, value in module.state_dict().items()})

    monkeypatch.setattr(pl.Trainer, "fit", fit_and_keep)
    # The tests need no network, and few epochs.
    changes = ('weights="DEFAULT"', "weights=None"), ("max_epochs=3", "max_epochs=1"), ("max_epochs=10", "max_epochs=1")
    names, _ = run_block("A pretrained backbone", *changes)
    stored = torch.load(names["best"].best_model_path, weights_only=True)["hyper_parameters"]
    assert stored == {"classes": ["one", "seven", "zero"], "learning_rate": 1e-4, "weights": None}

    def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
        return {name for name in before if not torch.equal(before[name], after[name])}

    assert changed(*kept[:2]) == {"model.fc.weight", "model.fc.bias"}  # nor the batch norms' running means
    assert {"model.conv1.weight", "model.bn1.running_mean", "model.fc.weight"} <= changed(*kept[2:])
    # What the page says of the weights.
    weights, starter = ResNet18_Weights.DEFAULT, sys.modules["starter"]
    assert (weights.transforms().mean, weights.transforms().std) == (starter.MEAN, starter.STD)
    assert f"`SIZE = {weights.transforms().crop_size[0]}`" in PAGE
    assert f"downloads {weights.meta['_file_size']:.0f} MB" in PAGE


def test_mapped_file_is_read_by_started_worker_processes(folder: Path):
    """As on Windows and Mac, where they are not forks."""
    spawn = 'import multiprocessing\n\nif __name__ == "__main__":\n    multiprocessing.set_start_method("spawn")\n'
    one_worker = BLOCKS["More data than memory"].replace("num_workers=2", "num_workers=1")
    (folder / "mapped.py").write_text(spawn + one_worker)
    result = python(folder, "mapped.py")
    assert result.returncode == 0, result.stderr
    written = np.load(folder / "train.npy", mmap_mode="r")
    assert written.shape == (72, 3, 64, 64)
    assert len(np.unique(written[:, 0].reshape(72, -1), axis=0)) == 72  # each image is there
    assert len(pickle.dumps(written)) > written.nbytes  # why the block opens the file in __getitems__


def test_tests_of_the_module_pass(folder: Path):
    (folder / "test_starter.py").write_text(BLOCKS["A test of your module"])
    result = python(folder, "-m", "pytest")
    assert result.returncode == 0, result.stdout
    assert "4 passed" in result.stdout


def test_tests_of_the_module_find_mistakes(folder: Path, tmp_path: Path):
    code = STARTER.read_text()
    for old, new in (
        ("self.save_hyperparameters()", "self.hparams.learning_rate = learning_rate"),
        ("cross_entropy(logits,", "cross_entropy(logits.softmax(dim=1),"),
        ('self._step(batch, "test", self.test_accuracy)', 'self._step(batch, "test")'),
    ):
        assert old in code
        code = code.replace(old, new)
    (tmp_path / "starter.py").write_text(code)
    (tmp_path / "test_starter.py").write_text(BLOCKS["A test of your module"])
    result = python(tmp_path, "-m", "pytest")
    assert "3 failed, 1 passed" in result.stdout


def test_checks_pass_where_all_is_right(run_block: Callable, folder: Path):
    names, printed = run_block("When it does not learn")
    assert names["before"]["loss/val"] == pytest.approx(math.log(3), abs=0.2)
    assert names["trainer"].callback_metrics["loss/train"] < 0.3
    shown = re.search(r"```text\n(inputs from .+?)```", PAGE, re.DOTALL)[1]
    for line, ours in zip(shown.splitlines(), printed.splitlines()[-5:], strict=True):
        assert set(re.findall(r"[a-z]+ ", line)) == set(re.findall(r"[a-z]+ ", ours))
    assert printed.splitlines()[-1] == shown.splitlines()[-1] == "in two folders: 0"
    assert (folder / "batch.png").exists()


@pytest.mark.parametrize("launcher", ["python", "srun", "torchrun"])
def test_who_starts_the_processes_and_that_the_trainer_must_agree(monkeypatch: pytest.MonkeyPatch, launcher: str):
    page = (ROOT / "docs/devices.md").read_text()
    [(nodes, tasks)] = re.findall(r"^#SBATCH --nodes=(\d) --ntasks-per-node=(\d) .+$", page, re.MULTILINE)
    assert f"num_nodes={nodes}, devices={tasks}" in page
    assert f"torchrun --nnodes {nodes} --nproc_per_node {tasks} " in page
    slurm = {"NTASKS": 8, "NTASKS_PER_NODE": tasks, "NNODES": nodes, "PROCID": 0, "LOCALID": 0, "NODEID": 0}
    torchrun = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": 8, "RANK": 0, "LOCAL_RANK": 0}
    variables = {"srun": {f"SLURM_{name}": value for name, value in slurm.items()}, "torchrun": torchrun, "python": {}}
    for name, value in variables[launcher].items():
        monkeypatch.setenv(name, str(value))
    strategy = pl.Trainer(num_nodes=2, devices=4, strategy="ddp", **QUIET).strategy
    started = strategy.cluster_environment.creates_processes_externally
    assert (strategy.world_size, started) == (8, launcher != "python")
    for wrong in ({"num_nodes": 2, "devices": 1}, {"num_nodes": 1, "devices": 4}) if started else ():
        with pytest.raises(ValueError, match="does not match"):
            pl.Trainer(**wrong, strategy="ddp", **QUIET).fit(Digits(), [])


# The clone


def test_rows_that_are_deleted_leave_what_runs(tmp_path: Path):
    shutil.copytree(ROOT, tmp_path, ignore=shutil.ignore_patterns("*.gz", ".*"), dirs_exist_ok=True)
    for row in reversed(cells("delete")):  # from the bottom
        for path in (tmp_path / name for name in re.findall(r"`([^`]+)`", row)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path in tmp_path.rglob("*.py"):
            for module in re.findall(r"^from ((?:common|docs|tests)\S*|initialization|sweep) ", path.read_text(), re.M):
                assert list(tmp_path.glob(f"{module.replace('.', '/')}*")), f"{path} without {row}"
        if "sweep.py" in row:
            assert python(tmp_path, "main.py", "--fast_dev_run", "true", "--data_dir", DATA).returncode == 0
    assert {path.stem for path in tmp_path.rglob("*.py")} == {"data", "model", "classifier"}
    assert "1 passed" in python(tmp_path, "-m", "pytest", "--doctest-modules").stdout  # imports all three


COLORED = """
import torch.nn.functional as F
from common.data import TensorBatches
class YourDataModule(MNISTDataModule):
    def setup(self, stage):
        images, labels = self._load("t10k", 10_000)
        images = F.interpolate(images[labels < 3], size=32) * torch.tensor([1.0, 0.5, -1.0]).view(3, 1, 1)
        self.train_set = self.val_set = self.test_set = TensorBatches(images[:300], labels[labels < 3][:300])
"""


def test_clone_learns_colored_images_of_three_classes(tmp_path: Path):
    code = (ROOT / "main.py").read_text().replace("\ndef main", f"{COLORED}\ndef main", 1)
    for old, [_, new, *_] in cells("in `main.py`").items():
        assert code.count(old.strip("`")) == 1
        code = code.replace(old.strip("`"), new.replace("(…)", "(data_dir, batch_size, seed, False)"))
    (tmp_path / "main.py").write_text(code)
    for options in (["--fast_dev_run", "true"], ["--max_epochs", "2", "--batch_size", "32"]):
        result = run_python(tmp_path, "main.py", "--data_dir", DATA, "--hidden_sizes", "[32]", *options)
        assert result.returncode == 0, result.stderr
        assert "Clipping" not in result.stderr  # what matplotlib says of colors beyond 0 to 1
    events = read_events(tmp_path / "logs/main/version_0")
    assert set(events.Tags()["images"]) == {"confusion/test", "mistakes/test"}
    assert float(re.search(r"test accuracy +([\d.]+)%", result.stdout)[1]) > 80


# The mistakes


class Digits(pl.LightningModule):
    """All is right here, on MNIST. Each mistake changes one thing."""

    def __init__(self) -> None:
        super().__init__()
        self.model = MLP([64], "relu")
        self.train_accuracy, self.val_accuracy = (MulticlassAccuracy(10, average="micro") for _ in range(2))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self._step(batch, "train", self.train_accuracy)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._step(batch, "val", self.val_accuracy)

    def _step(self, batch: tuple[Tensor, Tensor], stage: str, accuracy: MulticlassAccuracy) -> Tensor:
        images, y = batch
        logits = self.model(images)
        loss = self.loss(logits, y)
        accuracy(logits, y)
        self.log(f"loss/{stage}", loss, on_step=False, on_epoch=True)
        self.log(f"accuracy/{stage}", accuracy, on_step=False, on_epoch=True)
        return loss

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits, y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


@pytest.fixture(scope="module")
def digits() -> dict[str, tuple[Tensor, Tensor]]:
    """1,000 images each."""
    data = MNISTDataModule(DATA)
    data.setup("fit")
    data.setup("test")
    sets = {"train": data.train_set, "val": data.val_set, "test": data.test_set}
    return {name: (images.images[:1000], images.labels[:1000]) for name, images in sets.items()}


def loader(images_and_labels: tuple[Tensor, Tensor], batch_size: int, shuffle: bool = False) -> DataLoader:
    return DataLoader(TensorDataset(*images_and_labels), batch_size=batch_size, shuffle=shuffle)


def fit(module: pl.LightningModule, train: tuple, val: tuple, max_epochs: int, **options) -> dict[str, float]:
    trainer = pl.Trainer(max_epochs=max_epochs, enable_checkpointing=False, **QUIET | options)
    trainer.fit(module, loader(train, batch_size=100, shuffle=True), loader(val, batch_size=500))
    return {name: value.item() for name, value in trainer.callback_metrics.items()}


def first_loss(module: pl.LightningModule, val: tuple[Tensor, Tensor]) -> float:
    """The second check of the page."""
    [metrics] = pl.Trainer(**QUIET).validate(module, loader(val, batch_size=500), verbose=False)
    return metrics["loss/val"]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    pl.seed_everything(1)


def test_softmax_before_cross_entropy(digits: dict):
    class Wrong(Digits):
        def loss(self, logits: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(logits.softmax(dim=1), y)

    floor = math.log(1 + 9 / math.e)
    assert f"ln(1 + 9/e) = {floor:.2f}" in PAGE
    right, wrong = (
        fit(module, digits["train"], digits["val"], 40, overfit_batches=1) for module in (Digits(), Wrong())
    )
    assert right["loss/train"] < 0.1 < floor < wrong["loss/train"] < floor + 0.3
    assert wrong["accuracy/train"] > 0.7
    # Not even the most certain logits are better.
    assert Wrong().loss(1e6 * torch.eye(10), torch.arange(10)).item() == pytest.approx(floor)


def test_softmax_over_the_batch(digits: dict):
    class Wrong(Digits):
        def loss(self, logits: Tensor, y: Tensor) -> Tensor:
            return F.nll_loss(logits.log_softmax(dim=0), y)

    assert first_loss(Digits(), digits["val"]) == pytest.approx(math.log(10), abs=0.3)
    assert first_loss(Wrong(), digits["val"]) == pytest.approx(math.log(500), abs=0.3)  # batches of 500
    right = fit(Digits(), digits["train"], digits["val"], 5)
    wrong = fit(Wrong(), digits["train"], digits["val"], 5)
    assert wrong["accuracy/val"] < right["accuracy/val"] - 0.1
    with torch.no_grad():
        logits = Digits().model(digits["val"][0])
    assert torch.allclose(logits.softmax(dim=1).sum(dim=1), torch.ones(1000))
    assert (logits.softmax(dim=0).sum(dim=1) - 1).abs().min() > 0.5
    assert torch.equal(logits[:1].softmax(dim=0), torch.ones(1, 10))


def test_labels_that_do_not_belong_to_the_images(digits: dict):
    images, y = digits["train"]
    right = fit(Digits(), (images, y), digits["val"], 15)
    wrong = fit(Digits(), (images, y[torch.randperm(len(y))]), digits["val"], 15)
    assert right["accuracy/val"] > 0.8
    assert wrong["accuracy/val"] < 0.25
    assert wrong["loss/train"] > right["loss/train"] + 0.5
    assert wrong["loss/train"] < math.log(10)  # it falls all the same
    # By heart it is learned all the same.
    by_heart = fit(Digits(), (images[:100], y[torch.randperm(100)]), digits["val"], 60, overfit_batches=1)
    assert by_heart["loss/train"] < 0.1


def test_inputs_that_are_not_normalized(digits: dict):
    def as_bytes(images: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return (images * STD + MEAN) * 255, y

    assert first_loss(Digits(), as_bytes(*digits["val"])) > 4 * math.log(10)
    right = fit(Digits(), digits["train"], digits["val"], 5)
    wrong = fit(Digits(), as_bytes(*digits["train"]), as_bytes(*digits["val"]), 5)
    assert wrong["accuracy/val"] < right["accuracy/val"] - 0.1
    only_in_training = fit(Digits(), digits["train"], as_bytes(*digits["val"]), 5)
    assert only_in_training["loss/val"] > 4 * right["loss/val"]
    assert only_in_training["loss/train"] < 0.5


def test_eval_is_forgotten(digits: dict, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.syspath_prepend(folder)
    from starter import ImageClassifier

    classifier = ImageClassifier.load_from_checkpoint(folder / CHECKPOINTS / "best.ckpt", weights_only=True).cpu()
    assert classifier.training
    images = digits["val"][0][:8].expand(-1, 3, -1, -1)
    with torch.no_grad():
        assert not torch.allclose(classifier(images[:1]), classifier(images)[:1], atol=0.05)
        classifier.eval()
        assert torch.allclose(classifier(images[:1]), classifier(images)[:1], atol=1e-4)
        dropout = MLP([64], dropout=0.5)
        assert not torch.allclose(dropout(images[:, :1]), dropout(images[:, :1]), atol=0.01)
        assert torch.equal(dropout.eval()(images[:, :1]), dropout(images[:, :1]))


def test_schedule_for_steps_goes_by_epochs(digits: dict, tmp_path: Path):
    class Right(Digits):
        def configure_optimizers(self) -> dict:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            steps = int(self.trainer.estimated_stepping_batches)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=steps)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    class Wrong(Right):
        def configure_optimizers(self) -> dict:
            chosen = super().configure_optimizers()
            return chosen | {"lr_scheduler": chosen["lr_scheduler"]["scheduler"]}

    rates = []
    for module in (Right(), Wrong()):
        monitor = LearningRateMonitor(logging_interval="step")
        options = {"callbacks": [monitor], "logger": CSVLogger(tmp_path), "log_every_n_steps": 1}
        fit(module, digits["train"], digits["val"], 2, **options)
        rates.append(monitor.lrs["lr-SGD"])
    right, wrong = rates
    assert max(right) == pytest.approx(0.5, rel=0.05)
    assert right[-1] < 0.1 * right[0]
    assert max(wrong) < 0.2 * max(right)
    assert wrong[-1] >= wrong[0]


class WithF1(Digits):
    def __init__(self) -> None:
        super().__init__()
        self.f1 = MulticlassF1Score(10, average="macro")

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.f1(self.model(batch[0]), batch[1])
        self.log("f1/val", self.f1)


def test_metric_depends_on_the_batches(digits: dict):
    module = WithF1()
    fit(module, digits["train"], digits["val"], 3)
    small, whole = (
        pl.Trainer(**QUIET).validate(module, loader(digits["val"], size), verbose=False)[0]["f1/val"]
        for size in (50, 1000)
    )
    assert small == pytest.approx(whole, abs=1e-6)
    batches = loader(digits["val"], 50)
    with torch.no_grad():
        of_each = torch.stack([multiclass_f1_score(module.model(x), y, 10, average="macro") for x, y in batches])
    assert abs(of_each.mean() - whole) > 0.005
    assert abs(of_each[-1] - whole) > 0.001
    # Logits between 0 and 1 pass for probabilities.
    logits, ones = torch.full((8,), 0.3), torch.ones(8, dtype=torch.long)
    assert [binary_f1_score(values, ones) for values in (logits, logits.sigmoid())] == [0, 1]


def test_running_averages_lag_on_few_steps(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(folder)
    from starter import ImageClassifier, ImageData

    data, trainer = ImageData(folder / "data", batch_size=72, num_workers=0), pl.Trainer(max_epochs=5, **QUIET)
    classifier = ImageClassifier(data.train_set.classes, learning_rate=0.03)
    trainer.fit(classifier, data)
    lagging = trainer.callback_metrics["loss/val"].item()
    torch.optim.swa_utils.update_bn(data.train_dataloader(), classifier)
    assert lagging > 1.5 * trainer.validate(classifier, data, verbose=False)[0]["loss/val"]


def test_cosine_beyond_its_total_rises_again(digits: dict, tmp_path: Path):
    class Cosine(Digits):
        def configure_optimizers(self) -> tuple:
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.max_epochs)]

    path, rates = None, []
    for epochs in (4, 8):
        trainer = pl.Trainer(max_epochs=epochs, enable_checkpointing=False, **QUIET)
        trainer.fit(Cosine(), loader(digits["train"], 500), ckpt_path=path, weights_only=True)
        rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        path = tmp_path / "newest.ckpt"
        trainer.save_checkpoint(path, weights_only=False)
    assert rates == pytest.approx([0, 1e-2], abs=1e-6)


def test_same_images_in_training_and_validation(digits: dict, folder: Path, run_block: Callable):
    few = tuple(values[:500] for values in digits["train"])
    for val, leaks in ((digits["val"], False), (few, True)):
        module = Digits()
        metrics = fit(module, few, val, 15)
        [test] = pl.Trainer(**QUIET).validate(module, loader(digits["test"], 500), verbose=False)
        assert (metrics["accuracy/val"] > test["accuracy/val"] + 0.07) == leaks
        assert (metrics["accuracy/val"] > 0.98) == leaks
        common = {x.numpy().tobytes() for x in few[0]} & {x.numpy().tobytes() for x in val[0]}
        assert bool(common) == leaks
    # The page's check finds one file that is in two of its folders.
    copy = folder / "data/val/zero/copy.png"
    copy.write_bytes((folder / "data/train/zero/0.png").read_bytes())
    assert "in two folders: 1" in run_block("When it does not learn", ("max_epochs=60", "max_epochs=1"))[1]
    copy.unlink()
