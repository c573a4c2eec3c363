"""The data module against torchvision's own way of reading the same files."""

import gzip
import hashlib
import re
import shutil
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.datasets import MNIST
from torchvision.transforms import Compose, Normalize, ToTensor

from common.classifier import Classifier
from common.data import MEAN, STD, MNISTDataModule, random_affine, read_idx
from common.model import MLP
from main import main
from tests.conftest import DATA, QUIET, assert_one_line_error

RAW = Path(DATA, "MNIST/raw")


def test_committed_files_have_the_md5s_of_their_readme():
    md5s = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in RAW.glob("*.gz")}
    assert md5s == dict(re.findall(r"`(\S+\.gz)` \| `(\w+)`", Path(DATA, "README.md").read_text()))


@pytest.mark.parametrize("part", ["train", "t10k"])
def test_files_are_read_as_torchvision_reads_them(part: str):
    mnist = MNIST(DATA, train=part == "train")
    for kind, values in (("images-idx3", mnist.data), ("labels-idx1", mnist.targets)):
        assert torch.equal(read_idx(RAW / f"{part}-{kind}-ubyte.gz", *values.shape), values.byte())


def test_mean_and_std_are_those_of_the_training_pixels():
    pixels = MNIST(DATA).data.double() / 255
    assert round(pixels.mean().item(), 4) == MEAN
    assert round(pixels.std().item(), 4) == STD


def test_batches_equal_the_usual_transform_of_each_image(data: MNISTDataModule):
    usual = MNIST(DATA, train=False, transform=Compose([ToTensor(), Normalize((MEAN,), (STD,))]))
    images, labels = next(iter(data.test_dataloader()))
    assert (images.shape, labels.dtype) == ((512, 1, 28, 28), torch.int64)
    torch.testing.assert_close(images, torch.stack([usual[i][0] for i in range(512)]))
    assert labels.tolist() == [usual[i][1] for i in range(512)]


def sorted_pairs(images: Tensor, labels: Tensor) -> list[tuple[bytes, int]]:
    return sorted(zip(map(bytes, images.flatten(1).numpy()), labels.tolist(), strict=True))


def test_split_is_disjoint_complete_and_the_same_for_every_seed(data: MNISTDataModule):
    assert (len(data.train_set), len(data.val_set), len(data.test_set)) == (55_000, 5_000, 10_000)
    other = MNISTDataModule(DATA, seed=1)
    other.setup("fit")
    assert torch.equal(data.val_set.images, other.val_set.images)
    # Both parts together hold each image, with its label, as often as the files do.
    images, labels = (torch.cat(parts) for parts in zip(data.train_set[:], data.val_set[:], strict=True))
    pixels = images.mul(STD).add(MEAN).mul(255).round().byte()
    assert sorted_pairs(pixels, labels) == sorted_pairs(MNIST(DATA).data, MNIST(DATA).targets)


def test_training_order_is_a_function_of_seed_and_epoch(data: MNISTDataModule):
    def order(seed: int, epoch: int) -> list[int]:
        data.seed = seed
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        return list(loader.sampler)

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)
    assert sorted(order(1, 0)) == list(range(55_000))


def test_evaluation_keeps_the_order_of_the_files_and_takes_each_image_on_one_process(data: MNISTDataModule):
    for rank in range(3):
        data.trainer = SimpleNamespace(world_size=3, global_rank=rank)
        assert list(data.val_dataloader().sampler) == list(range(rank, 5_000, 3))
        assert list(data.predict_dataloader().sampler) == list(range(rank, 10_000, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_augmentation_is_that_of_grid_sample_in_all_precisions(data: MNISTDataModule, dtype: torch.dtype):
    images = data.train_set.images[:512].to(dtype)
    torch.manual_seed(0)
    augmented = random_affine(images, distortion=0.2, shift=3)
    assert (augmented.shape, augmented.dtype) == (images.shape, dtype)

    torch.manual_seed(0)
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    matrices = torch.eye(2) + torch.empty(512, 2, 2, dtype=kind).uniform_(-0.2, 0.2)
    offsets = torch.empty(512, 2, 1, dtype=kind).uniform_(-3, 3) / 13.5  # pixels from the center to the edge's center
    grid = F.affine_grid(torch.cat([matrices, offsets], dim=2), list(images.shape), align_corners=True)
    expected = F.grid_sample(images.to(kind), grid, padding_mode="border", align_corners=True)
    # Nothing is lost but what the type itself cannot hold.
    torch.testing.assert_close(augmented, expected.to(dtype), atol=1e-4 if kind == dtype else 1e-2, rtol=0)


def test_default_augmentation_goes_as_far_as_its_docstring_says():
    y, x = torch.meshgrid(torch.arange(-5.0, 6), torch.arange(-5.0, 6), indexing="ij")
    torch.manual_seed(0)
    # The value of each pixel is its place, so the result holds the places that were read.
    places = random_affine(torch.stack([x, y]).repeat(20_000, 1, 1, 1))
    center, right, below = places[:, :, 5, 5], places[:, :, 5, 6], places[:, :, 6, 5]
    noise = torch.stack([right - center, below - center], dim=2) - torch.eye(2)
    for values, end in ((center, 1.0), (noise.flatten(1), 0.15)):
        quarters = values.quantile(torch.linspace(0, 1, 5), dim=0).T
        uniform = torch.linspace(-end, end, 5).expand_as(quarters)
        torch.testing.assert_close(quarters, uniform, atol=0.05 * end, rtol=0)


class KeepBatches(pl.Callback):
    """Keeps the last batch of each stage, as the Lightning module gets it."""

    def __init__(self) -> None:
        self.batches: dict[str, tuple[Tensor, Tensor]] = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0) -> None:
        self.batches[trainer.state.stage.dataloader_prefix] = batch

    on_validation_batch_start = on_test_batch_start = on_train_batch_start


@pytest.mark.parametrize("augment", [True, False])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "64-true"])
def test_training_alone_is_augmented(precision: str, augment: bool):
    data, classifier, keep = MNISTDataModule(DATA, augment=augment), Classifier(MLP([16])), KeepBatches()
    trainer = pl.Trainer(fast_dev_run=True, precision=precision, callbacks=[keep], **QUIET)
    trainer.fit(classifier, data)
    trainer.test(classifier, data, verbose=False)
    for stage in ("train", "val", "test"):
        images, labels = keep.batches[stage]
        originals, theirs = next(iter(getattr(data, f"{stage}_dataloader")()))
        assert images.dtype == next(classifier.parameters()).dtype
        assert torch.equal(labels, theirs)
        unchanged = (images == originals.to(images.dtype)).flatten(1).all(dim=1)
        assert not unchanged.any() if stage == "train" and augment else unchanged.all()


DAMAGES = {
    "empty": lambda content: b"",
    "another kind": lambda content: b"<html>Not found</html>",
    "half": lambda content: content[: len(content) // 2],
    "ten bytes": lambda content: content[:2000] + bytes(10) + content[2010:],
    "a label less": lambda content: gzip.compress(gzip.decompress(content)[:-1]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_file_is_named_in_one_line(damage: str, tmp_path: Path, call: Callable):
    shutil.copytree(RAW, tmp_path / "MNIST/raw", ignore=shutil.ignore_patterns("*ubyte"))
    damaged = tmp_path / "MNIST/raw/train-labels-idx1-ubyte.gz"
    damaged.write_bytes(DAMAGES[damage](damaged.read_bytes()))
    assert_one_line_error(call(main, "--data_dir", tmp_path, "--fast_dev_run", 1), f"{damaged} is damaged")


def test_missing_files_are_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=RAW)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        MNISTDataModule(str(tmp_path)).prepare_data()
        server.shutdown()
    downloaded = {path.name: path.read_bytes() for path in (tmp_path / "MNIST/raw").glob("*.gz")}
    assert downloaded == {path.name: path.read_bytes() for path in RAW.glob("*.gz")}


def test_failed_download_is_one_line_and_leaves_nothing(
    tmp_path: Path, call: Callable, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])  # discard, where nobody listens
    assert_one_line_error(call(main, "--data_dir", tmp_path), f"MNIST is missing in {tmp_path}")
    assert not any((tmp_path / "MNIST/raw").iterdir())
