"""Trains an image classifier on folders of images with PyTorch Lightning, and tests its best epoch.

The images are in data/train/CLASS, data/val/CLASS and data/test/CLASS.

python starter.py --data_dir data --max_epochs 10
python starter.py --data_dir data --max_epochs 20 --ckpt_path lightning_logs/version_0/checkpoints/newest.ckpt
"""

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytorch_lightning as pl
import torch
from PIL import Image, ImageOps
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

SIZE = 64  # images of any size are resized, and cut to squares of so many pixels
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of photographs: ImageNet's red, green and blue
TO_TENSOR = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
UPRIGHT = ImageOps.exif_transpose  # a phone only notes in the file how it was held
PLAIN = v2.Compose([UPRIGHT, v2.Resize(SIZE), v2.CenterCrop(SIZE), *TO_TENSOR])
# Not for text: the flip mirrors letters.
AUGMENTED = v2.Compose([UPRIGHT, v2.RandomResizedCrop(SIZE, scale=(0.5, 1.0)), v2.RandomHorizontalFlip(), *TO_TENSOR])


def fault(path):
    try:
        image = UPRIGHT(Image.open(path))  # reads all of it: the beginning may be whole
        return f"{path}: its 16 bits would turn white" if image.mode.startswith("I") else None
    except Exception as error:  # PIL raises nearly any
        return f"{path}: {error}"


class ImageData(pl.LightningDataModule):
    def __init__(self, data_dir, batch_size=32, num_workers=2):
        super().__init__()
        self.loading = {"batch_size": batch_size, "num_workers": num_workers, "persistent_workers": num_workers > 0}
        # Here and not in `setup`: it only lists the files, and the module needs to know the classes.
        self.train_set = ImageFolder(Path(data_dir, "train"), AUGMENTED)
        self.val_set, self.test_set = (ImageFolder(Path(data_dir, name), PLAIN) for name in ("val", "test"))
        for images in (self.val_set, self.test_set):
            if images.classes != self.train_set.classes:  # a label is a position in this list
                raise FileNotFoundError(f"{images.root} has {images.classes}, train has {self.train_set.classes}")
        paths = [path for images in (self.train_set, self.val_set, self.test_set) for path, _ in images.samples]
        if faults := list(filter(None, ThreadPoolExecutor().map(fault, paths))):
            raise OSError("; ".join(faults))

    def train_dataloader(self):
        return DataLoader(self.train_set, shuffle=True, **self.loading)

    def val_dataloader(self):
        return DataLoader(self.val_set, **self.loading)

    def test_dataloader(self):
        return DataLoader(self.test_set, **self.loading)


class ImageClassifier(pl.LightningModule):
    def __init__(self, classes, learning_rate=1e-3):
        super().__init__()
        self.save_hyperparameters()  # into each checkpoint, where load_from_checkpoint finds them: plain values only

        def block(inputs, outputs):
            return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())

        # Its mean over all pixels makes images of any size fit.
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, len(classes)))
        self.model = nn.Sequential(block(3, 16), nn.MaxPool2d(2), block(16, 32), nn.MaxPool2d(2), block(32, 64), head)
        # "micro": each image counts the same. By default each class does.
        metrics = (MulticlassAccuracy(len(classes), average="micro") for _ in range(3))
        self.train_accuracy, self.val_accuracy, self.test_accuracy = metrics

    def forward(self, images):
        return self.model(images)  # logits (batch, classes)

    def training_step(self, batch, batch_idx):
        return self._step(batch, "train", self.train_accuracy)

    def validation_step(self, batch, batch_idx):
        self._step(batch, "val", self.val_accuracy)

    def test_step(self, batch, batch_idx):
        self._step(batch, "test", self.test_accuracy)

    def _step(self, batch, stage, accuracy):
        images, labels = batch
        logits = self(images)
        loss = nn.functional.cross_entropy(logits, labels)
        accuracy.update(logits, labels)
        # A metric adds up over all processes by itself; a plain number needs sync_dist.
        self.log(f"loss/{stage}", loss, on_step=False, on_epoch=True, sync_dist=True)
        self.log(f"accuracy/{stage}", accuracy, on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def predict_step(self, batch, batch_idx):
        return self(batch[0]).softmax(dim=1)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.learning_rate)


if __name__ == "__main__":  # worker processes import this file
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", default="data", help="has train/CLASS, val/CLASS and test/CLASS (%(default)s)")
    parser.add_argument("--max_epochs", type=int, default=10, help="passes over the training images (%(default)s)")
    parser.add_argument("--devices", type=int, default=1, help="number of GPUs (%(default)s)")
    parser.add_argument("--ckpt_path", help="checkpoint to go on from")
    args = parser.parse_args()
    pl.seed_everything(42, workers=True)
    torch.set_float32_matmul_precision("medium")  # GPUs with Tensor Cores multiply faster, and some CPUs do
    try:
        data = ImageData(args.data_dir)
        # A resumed run goes on in its folder version_N, where its best epoch is.
        beside = Path(args.ckpt_path).resolve(strict=True).with_name("best.ckpt") if args.ckpt_path else None
        version = beside and beside.resolve(strict=True).parts[-3]
    except OSError as error:
        parser.error(str(error))
    logger = pl.loggers.TensorBoardLogger(".", version=version)
    best = pl.callbacks.ModelCheckpoint(filename="best", monitor="accuracy/val", mode="max")
    newest = pl.callbacks.ModelCheckpoint(filename="newest", enable_version_counter=False)
    trainer = pl.Trainer(max_epochs=args.max_epochs, devices=args.devices, logger=logger, callbacks=[best, newest])
    trainer.fit(ImageClassifier(data.train_set.classes), data, ckpt_path=args.ckpt_path, weights_only=True)
    classifier = ImageClassifier.load_from_checkpoint(best.best_model_path, weights_only=True)
    trainer.test(classifier, data)  # with ckpt_path instead, EMAWeightAveraging would put back the raw weights
