"""Trains, validates and tests an MLP on MNIST, with each facility of Lightning's Trainer one option away.

python main.py
python main.py --help

Read `main` from top to bottom: data, model, Lightning module, callbacks, Trainer. The README's parts 1 to 5 explain
them in this order, "Trainer facilities" the options.
"""

from pathlib import Path
from typing import Literal

import pytorch_lightning as pl
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, OpenUnitInterval, PositiveInt
from pytorch_lightning.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint, TQDMProgressBar
from pytorch_lightning.loggers import TensorBoardLogger

from common.activations import ActivationHistogramCallback
from common.callbacks import FiniteLossCallback, GradientHistogramCallback, MetricsCallback, TestPicturesCallback
from common.classifier import Classifier
from common.cli import Seed, Share, run_from_command_line
from common.data import DATA_DIR, MNISTDataModule
from common.model import MLP
from common.runs import CheckpointIO, LastCheckpoint, open_run


def main(
    hidden_sizes: list[PositiveInt] = [512, 256],  # noqa: B006 - nobody mutates it, and --help can show it
    activation: Literal["relu", "gelu", "silu", "tanh"] = "gelu",
    dropout: Share = 0.0,
    learning_rate: OpenUnitInterval = 6e-3,
    weight_decay: NonNegativeFloat = 0.05,
    label_smoothing: Share = 0.1,
    batch_size: PositiveInt = 512,
    max_epochs: PositiveInt = 10,
    patience: PositiveInt = 5,
    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"] = "auto",
    devices: PositiveInt | Literal["auto"] = "auto",
    num_nodes: PositiveInt = 1,
    strategy: Literal["auto", "ddp"] = "auto",
    precision: Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true"] = "32-true",
    fast_dev_run: NonNegativeInt | bool = False,
    overfit_batches: NonNegativeInt = 0,
    profiler: Literal["simple", "advanced", "pytorch"] | None = None,
    activation_histograms: bool = False,
    seed: Seed = 42,
    data_dir: str = DATA_DIR,
    log_dir: str = "logs",
    ckpt_path: str | None = None,
) -> float:
    """Train, validate and test an MLP on MNIST.

    Args:
        hidden_sizes: Units of each hidden layer.
        activation: Nonlinearity after each hidden layer.
        dropout: Share of hidden units that a training step drops.
        learning_rate: Peak of the one-cycle schedule.
        weight_decay: Decoupled weight decay of AdamW.
        label_smoothing: Share of the target that training spreads over all classes.
        batch_size: Images of a batch, on each device.
        max_epochs: Passes over the training images.
        patience: Epochs without a better validation accuracy after which to stop early.
        accelerator: Kind of device to train on.
        devices: How many of them.
        num_nodes: Machines with that many devices each.
        strategy: How several devices work together.
        precision: Of the calculation; "mixed" keeps the weights in 32 bits.
        fast_dev_run: Run this many batches of each stage, or true for one, without logs and checkpoints.
        overfit_batches: Train on this many batches only, to see whether the model can memorize them.
        profiler: Report where the time goes.
        activation_histograms: Record what each layer puts out, and the gradients that come back to it.
        seed: Of the initial weights, the order of the images and dropout.
        data_dir: Folder of the MNIST files.
        log_dir: Folder for logs and checkpoints.
        ckpt_path: Checkpoint to go on from, or last for that of the newest run in log_dir.

    Returns:
        Test accuracy of the checkpoint with the best validation accuracy, in [0, 1].
    """
    pl.seed_everything(seed)
    data = MNISTDataModule(data_dir, batch_size, seed)
    model = MLP(hidden_sizes, activation, dropout)
    classifier = Classifier(model, learning_rate, weight_decay, label_smoothing)

    run = open_run(Path(log_dir, "main"), ckpt_path, classifier.hparams, fast_dev_run)
    # purge_step: what TensorBoard has seen of the steps after the checkpoint, a resumed run does again.
    logger = TensorBoardLogger(log_dir, name="main", version=run.version, purge_step=run.step, default_hp_metric=False)

    best = ModelCheckpoint(monitor="accuracy/val", mode="max", save_on_train_epoch_end=True)
    callbacks = [
        MetricsCallback(),
        TestPicturesCallback(),
        GradientHistogramCallback(),
        LearningRateMonitor(logging_interval="step"),
        # A batch that is memorized is meant to ruin validation, so that must not stop it.
        EarlyStopping(monitor="accuracy/val", mode="max", patience=max_epochs if overfit_batches else patience),
        FiniteLossCallback(),
        best,
        LastCheckpoint(),
        TQDMProgressBar(refresh_rate=20),
    ]
    if activation_histograms:
        callbacks.append(ActivationHistogramCallback())

    trainer = pl.Trainer(
        max_epochs=max_epochs,
        accelerator=accelerator,
        devices=devices,
        num_nodes=num_nodes,
        strategy=strategy,
        precision=precision,
        fast_dev_run=fast_dev_run,
        overfit_batches=overfit_batches,
        profiler=profiler,
        logger=logger,
        log_every_n_steps=20,
        callbacks=callbacks,
        plugins=[CheckpointIO()],
    )
    trainer.fit(classifier, data, ckpt_path=run.ckpt_path, weights_only=True)
    [test] = trainer.test(classifier, data, ckpt_path=best.best_model_path or None, weights_only=True, verbose=False)

    if trainer.is_global_zero:
        print_summary(test["accuracy/test"], best.best_model_path, logger.log_dir)
    return test["accuracy/test"]


def print_summary(accuracy: float, best_model_path: str, log_dir: str) -> None:
    print(f"\ntest accuracy    {accuracy:.2%}")
    if best_model_path:  # a fast_dev_run saves nothing
        print(f"best checkpoint  {best_model_path}")
        print(f"logs             {log_dir}")
        print(f"to look at them  tensorboard --logdir {Path(log_dir).parents[1]}")


if __name__ == "__main__":
    run_from_command_line(main)
