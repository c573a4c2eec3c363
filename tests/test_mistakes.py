"""The common mistakes of the README and docs/: each is made here, and its message is the one that they quote."""

import re
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from jsonargparse.typing import PositiveInt
from pytorch_lightning.callbacks import EarlyStopping
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import Tensor
from torch.utils.data import DataLoader

from common.callbacks import MetricsCallback
from common.classifier import Classifier
from common.data import MNISTDataModule
from common.model import MLP
from tests.conftest import DATA, ROOT

INDEX = re.findall(r"^- \[(.+)\]\(", (ROOT / "docs/README.md").read_text(), re.MULTILINE)
PAGES = " ".join(" ".join(path.read_text() for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]).split())


def short_trainer(max_epochs: int = 1, **options) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    return pl.Trainer(max_epochs=max_epochs, limit_train_batches=2, limit_val_batches=1, **quiet, **options)


def batch_size_by_position(folder: Path) -> None:
    class PositionalDataModule(MNISTDataModule):
        def predict_dataloader(self) -> DataLoader:
            return DataLoader(self.test_set, 64)

    short_trainer().predict(Classifier(MLP()), PositionalDataModule(DATA))


def library_type_in_checkpoint(folder: Path) -> None:
    torch.save({"hyper_parameters": {"batch_size": PositiveInt(3)}}, folder / "bad.ckpt")
    torch.load(folder / "bad.ckpt", weights_only=True)


def no_super_init(folder: Path) -> None:
    class Forgetful(pl.LightningModule):
        def __init__(self) -> None:
            self.model = MLP()

    Forgetful()


def clipping_with_a_fused_optimizer(folder: Path) -> None:
    class FusedClassifier(Classifier):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), fused=True)

    # 16-mixed as on a GPU, with a scale for the loss, which Lightning by itself has on GPUs only.
    options = {"plugins": [MixedPrecision("16-mixed", "cpu")], "gradient_clip_val": 1.0, "accelerator": "cpu"}
    short_trainer(**options).fit(FusedClassifier(MLP()), MNISTDataModule(DATA))


def shuffled_validation(folder: Path) -> None:
    class ShuffledDataModule(MNISTDataModule):
        def val_dataloader(self) -> DataLoader:
            return DataLoader(self.val_set, batch_size=512, shuffle=True)

    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*shuffling enabled")
        short_trainer().validate(Classifier(MLP()), ShuffledDataModule(DATA))


def dict_without_loss(folder: Path) -> None:
    class LosslessClassifier(Classifier):
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
            return {"y": batch[1]}

    short_trainer().fit(LosslessClassifier(MLP()), MNISTDataModule(DATA))


def metric_that_nobody_logs(folder: Path) -> None:
    short_trainer(callbacks=[EarlyStopping("val/accuracy")]).fit(Classifier(MLP()), MNISTDataModule(DATA))


def longer_run_from_checkpoint(folder: Path) -> None:
    data, trainer = MNISTDataModule(DATA), short_trainer()
    trainer.fit(Classifier(MLP()), data)
    trainer.save_checkpoint(folder / "short.ckpt")
    short_trainer(max_epochs=2).fit(Classifier(MLP()), data, ckpt_path=folder / "short.ckpt")


def fit_after_eval(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*in eval mode")
        short_trainer().fit(Classifier(MLP()).eval(), MNISTDataModule(DATA))


def metrics_left_on_the_cpu(folder: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")

    class UnmovedCallback(MetricsCallback):
        def setup(self, *arguments, **keywords) -> None:
            pass

    short_trainer(accelerator="gpu", callbacks=[UnmovedCallback()]).fit(Classifier(MLP()), MNISTDataModule(DATA))


@pytest.mark.parametrize(
    ("mistake", "quoted"),
    [
        (batch_size_by_position, "more than one `__init__` argument can be passed to its parent's `batch_size=...`"),
        (library_type_in_checkpoint, "Weights only load failed … Unsupported global"),
        (no_super_init, "cannot assign module before Module.__init__() call"),
        (
            clipping_with_a_fused_optimizer,
            "does not allow for gradient clipping because it performs unscaling of gradients internally",
        ),
        (
            shuffled_validation,
            "Your `val_dataloader`'s sampler has shuffling enabled, it is strongly recommended that you turn shuffling"
            " off for val/test dataloaders.",
        ),
        (dict_without_loss, "when `training_step` returns a dict, the 'loss' key needs to be present"),
        (metric_that_nobody_logs, "conditioned on metric `val/accuracy` which is not available"),
        (longer_run_from_checkpoint, "Tried to step … times. The specified number of total steps is …"),
        (fit_after_eval, "Found … module(s) in eval mode at the start of training"),
        (metrics_left_on_the_cpu, "Expected all tensors to be on the same device"),
    ],
)
def test_mistake_says_what_the_readme_quotes(mistake: Callable[[Path], None], quoted: str, tmp_path: Path):
    assert f"*{quoted}*" in PAGES
    assert any(all(part.strip() in quoted for part in message.split("…")) for message in INDEX)
    pattern = ".+".join(re.escape(part.strip()) for part in quoted.split("…"))
    with pytest.raises(Exception, match=f"(?s){pattern}"):
        mistake(tmp_path)
