"""The data module against torchvision's own way of reading the same files."""

import hashlib
import re
import shutil
from itertools import cycle, islice
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.datasets import MNIST
from torchvision.transforms import Compose, Normalize, ToTensor

from common.classifier import Classifier
from common.data import ELASTIC_NODES, FILE_SIZES, MEAN, STD, MNISTDataModule, random_affine, whole_files
from common.model import MLP
from tests.conftest import DATA, QUIET


def test_committed_files_have_the_md5s_of_their_readme():
    md5s = dict(re.findall(r"`(\S+\.gz)` \| `(\w+)`", Path(DATA, "README.md").read_text()))
    assert len(md5s) == 4
    for name, md5 in md5s.items():
        assert hashlib.md5(Path(DATA, "MNIST/raw", name).read_bytes()).hexdigest() == md5


def test_mean_and_std_are_those_of_the_training_pixels():
    pixels = MNIST(DATA).data.double() / 255
    assert round(pixels.mean().item(), 4) == MEAN
    assert round(pixels.std().item(), 4) == STD


def test_batches_equal_the_usual_transform_of_each_image(data: MNISTDataModule):
    usual = MNIST(DATA, train=False, transform=Compose([ToTensor(), Normalize((MEAN,), (STD,))]))
    images, labels = next(iter(data.test_dataloader()))
    assert images.shape == (512, 1, 28, 28)
    torch.testing.assert_close(images, torch.stack([usual[i][0] for i in range(512)]))
    assert labels.tolist() == [usual[i][1] for i in range(512)]


def test_split_is_disjoint_complete_and_the_same_for_every_seed(data: MNISTDataModule):
    assert (len(data.train_set), len(data.val_set), len(data.test_set)) == (55_000, 5_000, 10_000)
    other = MNISTDataModule(DATA, seed=1)
    other.setup("fit")
    assert torch.equal(data.val_set.images, other.val_set.images)
    # Both parts together hold each image as often as the files do.
    images = MNIST(DATA).data.flatten(1)
    weights = torch.randint(2**40, (28 * 28,), generator=torch.Generator().manual_seed(0))
    split = (
        torch.cat([data.train_set.images, data.val_set.images]).mul(STD).add(MEAN).mul(255).round().long().flatten(1)
    )
    assert torch.equal((split * weights).sum(1).sort()[0], (images.long() * weights).sum(1).sort()[0])


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


def test_evaluation_order_is_that_of_the_files(data: MNISTDataModule):
    for loader, dataset in ((data.val_dataloader(), data.val_set), (data.predict_dataloader(), data.test_set)):
        assert torch.equal(torch.cat([labels for _, labels in loader]), dataset.labels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_augmentation_is_that_of_grid_sample_in_all_precisions(data: MNISTDataModule, dtype: torch.dtype):
    images = data.train_set.images[:512].to(dtype)
    before = images.clone()
    torch.manual_seed(0)
    augmented = random_affine(images, distortion=0.2, shift=3)
    assert (augmented.shape, augmented.dtype) == (images.shape, dtype)
    assert torch.equal(images, before)

    torch.manual_seed(0)
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    matrices = torch.eye(2) + torch.empty(512, 2, 2, dtype=kind).uniform_(-0.2, 0.2)
    offsets = torch.empty(512, 2, 1, dtype=kind).uniform_(-3, 3) / 13.5  # pixels from the center to the edge's center
    grid = F.affine_grid(torch.cat([matrices, offsets], dim=2), list(images.shape), align_corners=True)
    expected = F.grid_sample(images.to(kind), grid, padding_mode="border", align_corners=True)
    # Nothing is lost but what the type itself cannot hold.
    torch.testing.assert_close(augmented, expected.to(dtype), atol=1e-4 if kind == dtype else 1e-2, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_elastic_distortion_is_coarse_noise_between_whose_nodes_is_interpolated(
    data: MNISTDataModule, dtype: torch.dtype
):
    images = data.train_set.images[:512].to(dtype)
    torch.manual_seed(0)
    bent = random_affine(images, distortion=0, shift=0, elastic=1.5)

    torch.manual_seed(0)
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    for shape in ((512, 2, 2), (512, 2, 1, 1)):
        torch.empty(shape, dtype=kind).uniform_(0, 0)  # the draws of distortion and shift
    noise = 1.5 * torch.randn(512, 2, ELASTIC_NODES, ELASTIC_NODES, dtype=kind)  # in pixels
    flow = F.interpolate(noise, 28, mode="bilinear", align_corners=True).permute(0, 2, 3, 1)
    grid = F.affine_grid(torch.eye(2, 3, dtype=kind).repeat(512, 1, 1), list(images.shape), align_corners=True)
    expected = F.grid_sample(images.to(kind), grid + flow / 13.5, padding_mode="border", align_corners=True)
    torch.testing.assert_close(bent, expected.to(dtype), atol=1e-4 if kind == dtype else 1e-2, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_augmentation_of_no_strength_changes_nothing(data: MNISTDataModule, dtype: torch.dtype):
    images = data.train_set.images[:512].to(dtype)
    torch.testing.assert_close(random_affine(images, distortion=0, shift=0), images, atol=1e-4, rtol=0)


def test_augmentation_differs_for_each_image_and_is_a_function_of_torchs_seed(data: MNISTDataModule):
    images = data.train_set.images[:1].repeat(512, 1, 1, 1)
    torch.manual_seed(0)
    first, second = random_affine(images), random_affine(images)
    assert len(torch.cat([first, second]).flatten(1).unique(dim=0)) == 1024
    torch.manual_seed(0)
    assert torch.equal(random_affine(images), first)


class Recorder(Classifier):
    """Keeps the images and labels of each step, and copies none of them."""

    def __init__(self) -> None:
        super().__init__(MLP([16]))
        self.batches = {"train": [], "val": [], "test": []}

    def _step(self, batch: tuple[Tensor, Tensor], stage: str) -> dict[str, Tensor]:
        self.batches[stage].append(batch)
        return super()._step(batch, stage)


@pytest.mark.parametrize("augment", [True, False])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "64-true"])
def test_training_alone_is_augmented(precision: str, augment: bool):
    data, classifier = MNISTDataModule(DATA, augment=augment), Recorder()
    limits = {"max_epochs": 1, "limit_train_batches": 2, "limit_val_batches": 2, "limit_test_batches": 2}
    trainer = pl.Trainer(precision=precision, enable_checkpointing=False, **limits, **QUIET)
    trainer.fit(classifier, data)
    trainer.test(classifier, data, verbose=False)
    assert [len(batches) for batches in classifier.batches.values()] == [2, 2 + 2, 2]  # the sanity check validates too
    dtype = {"32-true": torch.float32, "bf16-true": torch.bfloat16, "64-true": torch.float64}[precision]
    loaders = {"train": data.train_dataloader(), "val": data.val_dataloader(), "test": data.test_dataloader()}
    for stage, loader in loaders.items():
        for (images, labels), (originals, theirs) in zip(
            classifier.batches[stage], cycle(islice(loader, 2)), strict=False
        ):
            assert images.dtype == dtype
            assert torch.equal(labels, theirs)
            unchanged = (images == originals.to(dtype)).flatten(1).all(dim=1)
            assert not unchanged.any() if stage == "train" and augment else unchanged.all()


def test_training_images_are_bent_as_far_as_the_data_module_was_told():
    bent = {}
    for elastic in (0.0, 1.0):
        data, classifier = MNISTDataModule(DATA, elastic=elastic), Recorder()
        trainer = pl.Trainer(max_steps=1, limit_val_batches=0, enable_checkpointing=False, **QUIET)
        torch.manual_seed(0)
        trainer.fit(classifier, data)
        bent[elastic] = classifier.batches["train"][0][0]
    torch.manual_seed(0)
    originals = data.train_set.images[list(islice(data.train_dataloader().sampler, 512))]
    assert torch.equal(bent[1.0], random_affine(originals, elastic=1.0))
    assert not torch.equal(bent[0.0], bent[1.0])


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A folder that holds the four original files only."""
    shutil.copytree(Path(DATA, "MNIST/raw"), tmp_path / "MNIST/raw", ignore=lambda _, names: FILE_SIZES.keys() & names)
    return tmp_path


def test_prepare_data_mends_an_interrupted_extraction(copy: Path):
    half = copy / "MNIST/raw/train-images-idx3-ubyte"
    half.write_bytes(b"half a file")
    MNISTDataModule(str(copy)).prepare_data()
    assert {name: (half.parent / name).stat().st_size for name in FILE_SIZES} == FILE_SIZES
    assert len(list(half.parent.iterdir())) == 8


def test_damaged_file_is_reported_and_kept(copy: Path, monkeypatch: pytest.MonkeyPatch):
    for proxy in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")  # discard: whatever the network, the download fails
    damaged = copy / "MNIST/raw/t10k-labels-idx1-ubyte.gz"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    with pytest.raises(OSError, match="missing or damaged"):
        MNISTDataModule(str(copy)).prepare_data()
    assert damaged.stat().st_size == 1000
    extracted = {path.name for path in damaged.parent.iterdir() if path.suffix != ".gz"}
    assert extracted == whole_files(damaged.parent)
