"""Trains, validates and tests an MLP on MNIST, with the main facilities of Lightning's Trainer one option away.

python main.py
python main.py --help
python main.py --config logs/main/version_0/config.yaml    (the same run again)

Read the body of `main` from top to bottom: data, model, Lightning module, folder and logger, callbacks, Trainer. The
README explains them. The parameters of `main` are the options of the command line, and its docstring is the help.
"Ours" marks what this repository adds to Lightning, and "without ours" the line that one would write instead.
"""

from pathlib import Path
from typing import Literal

import pytorch_lightning as pl
import torch
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, OpenUnitInterval, PositiveFloat, PositiveInt
from pytorch_lightning.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint, TQDMProgressBar
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only

from common.callbacks import FiniteLossCallback, GradientHistogramCallback, MetricsCallback, TestPicturesCallback
from common.classifier import Classifier
from common.cli import Fraction, Seed, run_from_command_line
from common.data import DATA_DIR, MNISTDataModule
from common.for_main import ResumeCheckpoint, open_run
from common.model import MLP


def main(
    hidden_sizes: list[PositiveInt] = [768, 384],  # noqa: B006 - never changed, and --help shows it
    activation: Literal["relu", "gelu", "silu", "tanh"] = "gelu",
    dropout: Fraction = 0.0,
    batch_norm: bool = False,
    learning_rate: OpenUnitInterval = 4e-3,
    weight_decay: NonNegativeFloat = 0.05,
    label_smoothing: Fraction = 0.1,
    augment: bool = True,
    batch_size: PositiveInt = 512,
    max_epochs: PositiveInt = 10,
    patience: PositiveInt = 5,
    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"] = "auto",
    devices: PositiveInt | Literal["auto"] = 1,
    num_nodes: PositiveInt = 1,
    strategy: Literal["auto", "ddp"] = "auto",
    precision: Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true"] = "32-true",
    matmul_precision: Literal["highest", "high", "medium"] = "medium",
    gradient_clip_val: PositiveFloat | None = None,
    accumulate_grad_batches: PositiveInt = 1,
    fast_dev_run: NonNegativeInt | bool = False,
    overfit_batches: NonNegativeInt = 0,
    profiler: Literal["simple", "advanced", "pytorch"] | None = None,
    seed: Seed = 42,
    data_dir: str = DATA_DIR,
    log_dir: str = "logs",
    ckpt_path: str | None = None,
) -> float:
    """Train, validate and test an MLP on MNIST.

    Args:
        hidden_sizes: Units of each hidden layer.
        activation: Nonlinearity after each hidden layer.
        dropout: Fraction of hidden units that a training step drops.
        batch_norm: Normalize the inputs of each activation over the batch.
        learning_rate: Peak of the one-cycle schedule.
        weight_decay: Decoupled weight decay of AdamW.
        label_smoothing: Fraction of the target that training spreads over all classes.
        augment: Rotate, stretch, shear and shift each training image a little.
        batch_size: Images of a batch, on each device.
        max_epochs: Passes over the training images.
        patience: Epochs without a better validation accuracy after which to stop early; not with overfit_batches.
        accelerator: Kind of device to train on.
        devices: How many of them, or auto for all; the batch grows with them, and the learning rate does not.
        num_nodes: Machines with that many devices each.
        strategy: How several devices work together.
        precision: Number format of the calculation; "mixed" keeps the weights in 32 bits.
        matmul_precision: How exact float32 matrix products are; below highest another, faster method may compute them.
        gradient_clip_val: Norm to which longer gradients are shortened.
        accumulate_grad_batches: Batches whose gradients are averaged for one step.
        fast_dev_run: Run this many batches of each stage, or true for one, without logs and checkpoints.
        overfit_batches: Train on this many batches only, unaugmented, to see whether the model can memorize them;
            validation is as short.
        profiler: Report where the time goes.
        seed: Seed of the initial weights, the order of the images, augmentation and dropout.
        data_dir: Folder of the MNIST files.
        log_dir: Folder for logs and checkpoints.
        ckpt_path: Checkpoint to go on from in a new folder, with the same max_epochs; or the word last, to go on with
            the newest run of log_dir in its own folder, or to start a new one if that has no checkpoint yet.

    Returns:
        Test accuracy of the checkpoint with the best validation accuracy, in [0, 1].
    """
    options = dict(locals())  # all of the above by their names, for config.yaml
    pl.seed_everything(seed)
    torch.set_float32_matmul_precision(matmul_precision)
    data = MNISTDataModule(data_dir, batch_size, seed, augment and not overfit_batches)
    model = MLP(hidden_sizes, activation, dropout, batch_norm)
    classifier = Classifier(model, learning_rate, weight_decay, label_smoothing)
    # Ours: makes the folder logs/main/version_N with config.yaml, finds the checkpoint of --ckpt_path last, and refuses
    # one with other hyperparameters. Without ours: TensorBoardLogger(log_dir, name="main") numbers its folders.
    run = open_run(Path(log_dir, "main"), options, {**classifier.hparams, **data.hparams})
    # purge_step: in a resumed run, TensorBoard drops what was logged after the checkpoint, as that is done again.
    logger = TensorBoardLogger(log_dir, name="main", version=run.version, purge_step=run.step, default_hp_metric=False)
    best = ModelCheckpoint(monitor="accuracy/val", mode="max")  # keeps the epoch that is tested
    callbacks = [
        # Ours: logs accuracy/val, which others monitor. Without ours: metrics in the module, see part 3 of the README.
        MetricsCallback(),
        TestPicturesCallback(),  # ours: confusion matrix and worst mistakes
        GradientHistogramCallback(),  # ours
        LearningRateMonitor(logging_interval="step"),
        EarlyStopping(monitor="accuracy/val", mode="max", patience=max_epochs if overfit_batches else patience),
        # Ours: ends a run whose loss is NaN or infinite. Without ours: EarlyStopping("loss/val", patience=max_epochs).
        FiniteLossCallback(),
        best,
        # Ours: saves last.ckpt each epoch, with the random state. Without ours: ModelCheckpoint(filename="newest",
        # enable_version_counter=False); ModelCheckpoint(save_last=True) would save only at a new best.
        ResumeCheckpoint(best),
        TQDMProgressBar(refresh_rate=20),
    ]
    trainer = pl.Trainer(
        max_epochs=max_epochs,
        accelerator=accelerator,
        devices=devices,
        num_nodes=num_nodes,
        strategy=strategy,
        precision=precision,
        gradient_clip_val=gradient_clip_val,
        accumulate_grad_batches=accumulate_grad_batches,
        fast_dev_run=fast_dev_run,
        overfit_batches=overfit_batches,
        profiler=profiler,
        logger=logger,
        default_root_dir=logger.log_dir,  # or under SLURM, a new run goes on from the working folder's hpc_ckpt_N.ckpt
        log_every_n_steps=20,
        callbacks=callbacks,
    )
    # weights_only is the name of torch.load's safe mode: optimizer, schedule and epoch are restored all the same.
    trainer.fit(classifier, data, ckpt_path=run.ckpt_path, weights_only=True)
    # The best epoch, or after a fast_dev_run, which saves none, the weights as they are.
    [test] = trainer.test(classifier, data, ckpt_path=best.best_model_path or None, weights_only=True, verbose=False)
    print_summary(trainer, test["accuracy/test"], best.best_model_path)
    return test["accuracy/test"]


@rank_zero_only
def print_summary(trainer: pl.Trainer, accuracy: float, best_model_path: str) -> None:
    if reason := trainer.early_stopping_callback.stopping_reason_message:
        print(f"\nstopped early    {' '.join(reason.split())}")  # it may span lines
    print(f"\ntest accuracy    {accuracy:.2%}")
    if best_model_path:  # a fast_dev_run saves nothing
        print(f"best checkpoint  {best_model_path}")
        print(f"logs             {trainer.logger.log_dir}")
        print(f"to look at them  tensorboard --logdir {trainer.logger.save_dir}")


if __name__ == "__main__":
    run_from_command_line(main)
