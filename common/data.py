"""The data module: MNIST as two tensors, normalized once, indexed by whole batches, augmented on the device."""

import gzip
import zlib
from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.overrides.distributed import UnrepeatedDistributedSampler
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision.datasets import MNIST

# Beside the scripts, wherever they are started from.
DATA_DIR = str(Path(__file__).parent.parent / "data")
# Of the 60,000 training images' pixels scaled to [0, 1].
MEAN, STD = 0.1307, 0.3081
TRAIN_SIZE, VAL_SIZE, TEST_SIZE = 55_000, 5_000, 10_000


def read_idx(path: Path, *shape: int) -> Tensor:
    """Reads a compressed file of bytes in that shape, after a header of 4 bytes and 4 more for each dimension.

    Raises:
        OSError: if it is missing, damaged or has another size.
    """
    try:
        content = bytearray(gzip.decompress(path.read_bytes()))
        return torch.frombuffer(content, dtype=torch.uint8, offset=4 + 4 * len(shape)).view(shape)
    except (gzip.BadGzipFile, zlib.error, EOFError, RuntimeError, ValueError) as error:
        raise OSError(f"{path} is damaged: {error}") from error


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
        # With non_blocking the copy to a GPU does not wait for the GPU's other work. On a Mac's GPU that is not safe.
        return self[torch.tensor(indices).to(self.labels.device, non_blocking=self.labels.is_cuda)]


def random_affine(images: Tensor, distortion: float = 0.15, shift: float = 1.0) -> Tensor:
    """Rotates, stretches, shears and shifts each image by random amounts of its own.

    Where the result has a pixel at (x, y) from the center, the image is read at M (x, y) + s, interpolated between
    four pixels; beyond the edge it goes on as at the edge. M is the identity plus noise in each of its four entries:
    on the diagonal that stretches an axis, off the diagonal it shears, and with opposite signs there it rotates.

    Args:
        images: of any floating-point type, which the result has too.
        distortion: the noise of M is uniform in ±distortion; 0.15 can rotate by 9 degrees or stretch by 15 %.
        shift: s is uniform in ±shift pixels, in both directions.

    Shape:
        images (n, channels, size, size) → (n, channels, size, size)
    """
    n, size = len(images), images.shape[-1]
    # Coordinates in bfloat16 would be too coarse, and float64 is not on every device.
    like = {"dtype": torch.promote_types(images.dtype, torch.float32), "device": images.device}
    matrix = torch.eye(2, **like) + torch.empty(n, 2, 2, **like).uniform_(-distortion, distortion)
    # grid_sample counts from -1 at the center of the first pixel to 1 at that of the last.
    offset = torch.empty(n, 2, 1, 1, **like).uniform_(-shift, shift) * 2 / (size - 1)
    x = torch.linspace(-1, 1, size, **like)
    # M (x, y) + s by broadcasting, several times faster than the matrix products of F.affine_grid.
    by_x, by_y = matrix[..., None, None].unbind(2)  # the columns of M, each (n, 2, 1, 1)
    grid = by_x * x + (by_y * x.unsqueeze(1) + offset)  # (n, 2, size, size)
    # Clamping the grid is padding_mode="border", which Macs lack before PyTorch 2.13.
    grid = grid.clamp_(-1, 1).permute(0, 2, 3, 1)
    return F.grid_sample(images.to(grid.dtype), grid, align_corners=True).to(images.dtype)


class MNISTDataModule(pl.LightningDataModule):
    """MNIST for training (55,000), validation (5,000) and test (10,000), kept in the memory of the training device.

    Args:
        data_dir: holds `MNIST/raw/*.gz`; missing files are downloaded there.
        batch_size: images of a batch, on each process.
        seed: of the order of the training images, which is a function of this seed and the epoch alone.
        augment: training sees each image as `random_affine` transforms it anew, validation and test as it is.
    """

    def __init__(self, data_dir: str = DATA_DIR, batch_size: int = 512, seed: int = 42, augment: bool = True) -> None:
        super().__init__()
        self.save_hyperparameters()  # into the logger's hyperparameters, beside those of the module
        self.raw = Path(data_dir, "MNIST", "raw")
        self.batch_size, self.seed, self.augment = batch_size, seed, augment
        self.train_set = self.val_set = self.test_set = None

    def prepare_data(self) -> None:
        """Downloads what is missing; Lightning calls it on one process of a machine.

        Raises:
            OSError: if that fails.
        """
        if not all((self.raw / name).exists() for name, _ in MNIST.resources):
            try:
                MNIST(self.raw.parents[1], download=True)
            except (OSError, RuntimeError) as error:
                raise OSError(f"MNIST is missing in {self.raw}, and its download failed: {error}") from error

    def setup(self, stage: str) -> None:
        """Normalizes each image once and puts all of them on the device that trains.

        Lightning calls it on every process before each of fit, validate, test and predict.
        """
        if stage in ("fit", "validate") and self.train_set is None:
            images, labels = self._load("train", TRAIN_SIZE + VAL_SIZE)
            # A generator of its own: the same 5,000 images validate whatever the seed of a run.
            order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).to(labels.device)
            train, val = order.split([TRAIN_SIZE, VAL_SIZE])
            self.train_set = TensorBatches(images[train], labels[train])
            self.val_set = TensorBatches(images[val], labels[val])
        if stage in ("test", "predict") and self.test_set is None:
            self.test_set = TensorBatches(*self._load("t10k", TEST_SIZE))

    def _load(self, part: str, size: int) -> tuple[Tensor, Tensor]:
        # Lightning sets self.trainer when the data module is given to one.
        device = self.trainer.strategy.root_device if self.trainer else "cpu"
        images = read_idx(self.raw / f"{part}-images-idx3-ubyte.gz", size, 28, 28).to(device)
        labels = read_idx(self.raw / f"{part}-labels-idx1-ubyte.gz", size).to(device)
        return images.unsqueeze(1).float().div_(255).sub_(MEAN).div_(STD), labels.long()

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Augments a training batch as a whole, on its device; Lightning calls it for the batches of every stage."""
        images, labels = batch
        return (random_affine(images), labels) if self.augment and self.trainer.training else batch

    def train_dataloader(self) -> DataLoader:
        return self._loader(self.train_set, DistributedSampler, shuffle=True, seed=self.seed)

    def val_dataloader(self) -> DataLoader:
        return self._loader(self.val_set, UnrepeatedDistributedSampler, shuffle=False)

    def test_dataloader(self) -> DataLoader:
        return self._loader(self.test_set, UnrepeatedDistributedSampler, shuffle=False)

    predict_dataloader = test_dataloader

    def _loader(self, dataset: TensorBatches, sampler_class: type[DistributedSampler], **sampler_options) -> DataLoader:
        # A DistributedSampler even on one process: its order is a function of seed and epoch, for which Lightning calls
        # set_epoch, and so the same in a resumed run. Lightning keeps a sampler of this kind. For evaluation it would
        # choose one that repeats samples to make the shares of processes equal; the unrepeated one counts each once.
        world_size, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        sampler = sampler_class(dataset, num_replicas=world_size, rank=rank, **sampler_options)
        # A DataLoader draws a seed in each pass, though here nothing needs it. Drawn from torch's own generator, it
        # would shift dropout and augmentation in a resumed run, which skips the passes that are done.
        options = {"batch_size": self.batch_size, "generator": torch.Generator(), "collate_fn": lambda batch: batch}
        return DataLoader(dataset, sampler=sampler, **options)
