"""Compares initialization schemes on a deep MLP: what they do to signals, to gradients and to the training.

python initialization.py
python initialization.py --depth 30 --learning_rate 0.002 --activations "[relu]"

With weights w of mean zero, each layer multiplies the variance of the signal by about fan_in * Var(w) times what the
activation lets through, and that of the gradient by about fan_out * Var(w) times the mean of the activation's squared
slope. Where such a factor is clearly below 1, signal or gradient vanish with depth. Where it is clearly above 1, they
explode; only the outputs of tanh cannot, as they saturate.

Read `run_scheme` first: one training, with callbacks that measure it. Then `main`, which compares all schemes.
The schemes are in common/for_initialization/schemes.py. docs/initialization.md explains the results.
"""

import logging
import math
from copy import deepcopy
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np
import pytorch_lightning as pl
import torch
from jsonargparse.typing import OpenUnitInterval, PositiveInt
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from tqdm import tqdm

from common.callbacks import GradientHistogramCallback, MetricsCallback
from common.classifier import Classifier
from common.cli import Seed, make_version, run_from_command_line
from common.data import DATA_DIR, MNISTDataModule
from common.for_initialization.pictures import draw_depth
from common.for_initialization.recorder import DEFECTS, ActivationHistogramCallback, LossCurveCallback, Result
from common.for_initialization.schemes import INITIALIZATIONS, initialize
from common.for_initialization.theory import predict_stds
from common.model import MLP

Scheme = Literal[tuple(INITIALIZATIONS)]


class SGDClassifier(Classifier):
    """`Classifier` with another optimizer: stochastic gradient descent with momentum, at a constant learning rate.

    AdamW divides each weight's gradient by its usual size. That would hide how small or how large the gradients are.
    """

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.hparams.learning_rate, momentum=0.9)


def run_scheme(
    scheme: str, model: MLP, data: MNISTDataModule, steps: int, learning_rate: float, folder: Path
) -> Result:
    """Gives `model` the weights of one initialization scheme, trains it and returns what was measured on the way."""
    activation = model.arguments["activation"]
    # The batch that training sees at step 0, as the data module's sampler shuffles by seed and epoch alone. The scheme
    # lsuv and the theory's prediction need it.
    images, _ = next(iter(data.train_dataloader()))
    initialize(model, scheme, images)
    untrained = deepcopy(model)  # training changes `model`, and the theory wants the weights of step 0

    recorder, curve = ActivationHistogramCallback(every_n_steps=100), LossCurveCallback()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        # flush_secs: after Ctrl-C, TensorBoard's thread may sleep until it flushes, which is for 120 s by default.
        logger=TensorBoardLogger(folder, name=activation, version=scheme, default_hp_metric=False, flush_secs=1),
        # MetricsCallback gives the accuracy. `recorder` keeps what each layer puts out and the gradient that comes back
        # to it, `curve` keeps the losses. All of them log for TensorBoard.
        callbacks=[MetricsCallback(), GradientHistogramCallback(every_n_steps=100), recorder, curve],
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    classifier = SGDClassifier(model, learning_rate, weight_decay=0.0, label_smoothing=0.0)
    trainer.fit(classifier, data)
    # max_steps may end fit within an epoch, at whose end it would have validated.
    [validation] = trainer.validate(classifier, data, verbose=False)

    preactivations = recorder.at_start("preactivation_std")
    gradients = recorder.at_start("backpropagated_std")  # with respect to pre-activations, not weights
    return Result(
        activation=activation,
        scheme=scheme,
        losses=torch.stack(curve.losses).tolist(),
        accuracy=validation["accuracy/val"],
        activation_stds=recorder.at_start("activation_std"),
        defects=recorder.at_start(f"activation_{DEFECTS[activation]}"),  # dead units, or saturated outputs
        measured_stds={"preactivations": preactivations, "gradients": gradients},
        # The theory of gradients goes from layer to layer, and starts from the measured gradient at the logits.
        predicted_stds=predict_stds(untrained, images, gradients[-1]),
    )


def main(
    depth: PositiveInt = 20,
    width: PositiveInt = 100,
    activations: list[Literal["tanh", "relu"]] = ["tanh", "relu"],  # noqa: B006 - never changed
    schemes: list[Scheme] = list(INITIALIZATIONS),  # noqa: B006
    steps: PositiveInt = 300,
    learning_rate: OpenUnitInterval = 0.01,
    batch_size: PositiveInt = 128,
    seed: Seed = 42,
    data_dir: str = DATA_DIR,
    log_dir: str = "logs",
) -> list[Result]:
    """Compare initialization schemes by what they do to signals, gradients and training.

    Args:
        depth: Hidden layers.
        width: Units of each hidden layer.
        activations: Nonlinearities to try every scheme with.
        schemes: Initializations to compare.
        steps: Training steps of each run.
        learning_rate: Of stochastic gradient descent with momentum 0.9.
        batch_size: Images of a batch.
        seed: Seed of the initial weights and of the order of the images; every run sees the same batches.
        data_dir: Folder of the MNIST files.
        log_dir: Logs, pictures and these options go to its subfolder initialization/version_N.

    Returns:
        What each run has measured.
    """
    options = dict(locals())  # all of the above by their names, for config.yaml
    if not schemes or not activations:
        raise MisconfigurationException("there is nothing to compare: schemes or activations is empty")
    # Each Trainer would say which devices there are and why it has stopped.
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)
    torch.set_float32_matmul_precision("highest")  # the theory is compared to the digit
    torch.set_num_threads(1)  # in layers this small, threads mostly wait for each other

    # Not augmented, as that happens in a Trainer and not for the theory's batch.
    data = MNISTDataModule(data_dir, batch_size, seed, augment=False)
    data.prepare_data()  # by hand, as a batch is wanted before there is a Trainer
    data.setup("fit")

    # A folder for each call: TensorBoard would mix runs of another depth with these.
    folder = make_version(Path(log_dir, "initialization"), options)
    results = []
    progress = tqdm(list(product(dict.fromkeys(activations), dict.fromkeys(schemes))), unit="run")
    try:
        for activation, scheme in progress:
            progress.set_description(f"{activation} {scheme}")
            pl.seed_everything(seed, verbose=False)
            model = MLP([width] * depth, activation)
            results.append(run_scheme(scheme, model, data, steps, learning_rate, folder))
    except (KeyboardInterrupt, SystemExit):  # Lightning turns Ctrl-C in a training into SystemExit
        print("\ninterrupted; the results so far:")
        raise  # run_from_command_line makes an exit status of it
    finally:
        if results:
            print_table(results)
            draw_depth(results).savefig(folder / "depth.png", dpi=150)
            print(f"\n{folder / 'depth.png'}\ntensorboard --logdir {folder}")
    return results


def print_table(results: list[Result]) -> None:
    """Prints a table for each activation; the share of dead units or saturated outputs is of all hidden layers."""
    for activation in dict.fromkeys(result.activation for result in results):
        print(
            f"\n{activation:16} {'loss at step 0':>14}  {'activation std':^20}  {'gradient std':^20}"
            f"  {DEFECTS[activation]:>9}  {'validation':>10}\n"
            f"{'':16} {f'(ln 10 = {math.log(10):.3f})':>14}  {'first -> last layer':^20}  {'last -> first layer':^20}"
            f"  {'share':>9}  {'accuracy':>10}"
        )
        for result in (result for result in results if result.activation == activation):
            stds = result.activation_stds
            gradients = result.measured_stds["gradients"][:-1]  # the last one is of the logits
            print(
                f"{result.scheme:16} {result.losses[0]:14.5g}  {stds[0]:8.2g} -> {stds[-1]:<8.2g}"
                f"  {gradients[-1]:8.2g} -> {gradients[0]:<8.2g}  {np.mean(result.defects):9.1%}"
                f"  {result.accuracy:10.1%}"
            )


if __name__ == "__main__":
    run_from_command_line(main)
