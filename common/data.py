"""The data module: MNIST as two tensors, normalized once, indexed by whole batches."""

from pathlib import Path

import pytorch_lightning as pl
import torch
from filelock import FileLock
from pytorch_lightning.overrides.distributed import UnrepeatedDistributedSampler
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision.datasets import MNIST

# Beside the scripts, wherever they are started from.
DATA_DIR = str(Path(__file__).parent.parent / "data")
# Of the 60,000 training images' pixels scaled to [0, 1].
MEAN, STD = 0.1307, 0.3081
TRAIN_SIZE, VAL_SIZE = 55_000, 5_000
# Bytes of the extracted files: a header, then one byte a pixel or a label.
FILE_SIZES = {
    "train-images-idx3-ubyte": 16 + 60_000 * 28 * 28,
    "train-labels-idx1-ubyte": 8 + 60_000,
    "t10k-images-idx3-ubyte": 16 + 10_000 * 28 * 28,
    "t10k-labels-idx1-ubyte": 8 + 10_000,
}


def whole_files(raw: Path) -> set[str]:
    return {name for name, size in FILE_SIZES.items() if (raw / name).exists() and (raw / name).stat().st_size == size}


class TensorBatches(Dataset):
    """Images and labels that are indexed by a whole batch at once.

    PyTorch's fetcher calls `__getitems__` with the list of a batch's indices where a dataset has it. One indexing
    call then replaces a Python call, a transform and a copy for each image.

    Shape:
        images (n, 1, 28, 28), labels (n,)
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return self[torch.tensor(indices, device=self.labels.device)]


class MNISTDataModule(pl.LightningDataModule):
    """MNIST for training (55,000), validation (5,000) and test (10,000), kept in the memory of the training device.

    Args:
        data_dir: holds `MNIST/raw/`; missing files are downloaded there.
        batch_size: images of a batch, on each process.
        seed: of the order of the training images, which is a function of this seed and the epoch alone.
    """

    def __init__(self, data_dir: str = DATA_DIR, batch_size: int = 512, seed: int = 42) -> None:
        super().__init__()
        self.data_dir, self.batch_size, self.seed = data_dir, batch_size, seed
        self.train_set = self.val_set = self.test_set = None

    def prepare_data(self) -> None:
        """Extracts the files, or downloads what is missing; Lightning calls it on one process of a machine.

        Raises:
            OSError: if a file is missing or damaged and cannot be downloaded either.
        """
        raw = Path(self.data_dir, "MNIST", "raw")
        if whole_files(raw) == FILE_SIZES.keys():
            return
        raw.mkdir(parents=True, exist_ok=True)
        # Two first runs at the same time would extract into each other's files.
        with FileLock(f"{raw}.lock"):
            # An interruption has left half a file, which torchvision takes for a whole one.
            for name in FILE_SIZES.keys() - whole_files(raw):
                (raw / name).unlink(missing_ok=True)
            try:
                MNIST(self.data_dir, download=True)
            except RuntimeError as error:
                raise OSError(f"MNIST is missing or damaged in {raw}, and could not be downloaded") from error

    def setup(self, stage: str) -> None:
        """Normalizes each image once and puts all of them on the device that trains.

        Lightning calls it on every process before each of fit, validate, test and predict.
        """
        if stage in ("fit", "validate") and self.train_set is None:
            images, labels = self._load(train=True)
            # A generator of its own: the same 5,000 images validate whatever the seed of a run.
            order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).to(labels.device)
            self.train_set, self.val_set = (
                TensorBatches(images[i], labels[i]) for i in order.split([TRAIN_SIZE, VAL_SIZE])
            )
        if stage in ("test", "predict") and self.test_set is None:
            self.test_set = TensorBatches(*self._load(train=False))

    def _load(self, train: bool) -> tuple[Tensor, Tensor]:
        mnist = MNIST(self.data_dir, train=train)
        device = self.trainer.strategy.root_device if self.trainer else "cpu"
        images = mnist.data.to(device).unsqueeze(1).float().div_(255).sub_(MEAN).div_(STD)
        return images, mnist.targets.to(device)

    def train_dataloader(self) -> DataLoader:
        return self._loader(self.train_set, DistributedSampler, shuffle=True, seed=self.seed)

    def val_dataloader(self) -> DataLoader:
        return self._loader(self.val_set, UnrepeatedDistributedSampler, shuffle=False)

    def test_dataloader(self) -> DataLoader:
        return self._loader(self.test_set, UnrepeatedDistributedSampler, shuffle=False)

    def predict_dataloader(self) -> DataLoader:
        return self.test_dataloader()

    def _loader(self, dataset: TensorBatches, sampler_class: type[DistributedSampler], **sampler_options) -> DataLoader:
        # Lightning would choose a DistributedSampler only on several processes, and for evaluation one that repeats
        # samples to make the shares equal. Chosen here, training has the same order on any number of processes and
        # in a resumed run (Lightning calls set_epoch), and evaluation counts each sample once.
        world_size, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        sampler = sampler_class(dataset, num_replicas=world_size, rank=rank, **sampler_options)
        # A loader draws a seed whenever it is iterated: from a generator of its own, so that a resumed run, which
        # iterates less often, has the same random numbers for dropout.
        generator = torch.Generator()
        return DataLoader(
            dataset, batch_size=self.batch_size, sampler=sampler, generator=generator, collate_fn=lambda batch: batch
        )
