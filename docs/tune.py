"""Searches hyperparameters of starter.py with Optuna, then trains and tests the best ones with other seeds.

python tune.py --n_trials 20    a worker of the search; start it several times at once if you like
python tune.py --test           when the search has ended, and only once
"""

import argparse
import logging
import random
import time

import optuna
import pytorch_lightning as pl
import torch
from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState
from sqlalchemy.exc import SQLAlchemyError
from starter import ImageClassifier, ImageData


def open_study():
    """Makes the database and the study, unless they exist."""
    pruner = optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=1)
    options = {"study_name": "starter", "direction": "maximize", "pruner": pruner, "load_if_exists": True}
    for wait in (1, 2, 4, 8, 0):
        try:
            # One writes at a time. The others wait for a minute, where 5 seconds are the default.
            storage = optuna.storages.RDBStorage("sqlite:///tune.db", {"connect_args": {"timeout": 60}})
            return optuna.create_study(storage=storage, **options)
        except (StorageInternalError, SQLAlchemyError):  # another worker makes the tables at the same moment
            if not wait:
                raise
            time.sleep(random.uniform(0, wait))


class PruningCallback(pl.Callback):
    def __init__(self, trial):
        self.trial = trial

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.trial.report(trainer.callback_metrics["accuracy/val"].item(), step=trainer.current_epoch)
            if self.trial.should_prune():
                raise optuna.TrialPruned


def train(args, params, seed, name, callbacks=()):
    pl.seed_everything(seed, workers=True, verbose=False)
    data = ImageData(args.data_dir, params["batch_size"], num_workers=0)  # other cores have trials of their own
    classifier = ImageClassifier(data.train_set.classes, params["learning_rate"])
    logger = pl.loggers.TensorBoardLogger(".", name="tune", version=name)  # numbers are not safe with several workers
    best = pl.callbacks.ModelCheckpoint(filename="best", monitor="accuracy/val", mode="max")
    options = {"logger": logger, "callbacks": [best, *callbacks], "enable_progress_bar": False}
    trainer = pl.Trainer(max_epochs=args.max_epochs, devices=1, enable_model_summary=False, **options)
    trainer.fit(classifier, data)
    return trainer


def objective(trial, args):
    params = {
        "learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-1, log=True),
        "batch_size": trial.suggest_categorical("batch_size", [8, 16, 32, 64]),
    }
    trainer = train(args, params, 0, f"trial_{trial.number}", [PruningCallback(trial)])
    return trainer.checkpoint_callback.best_model_score.item()


def search(study, args):
    def counted():
        trials = study.get_trials(deepcopy=False)
        return [trial.number for trial in trials if trial.state != TrialState.FAIL]

    while len(counted()) < args.n_trials:
        trial, value, state = study.ask(), None, TrialState.FAIL
        try:
            # Two workers may both open the last trial. Then the later one steps back.
            if trial.number in counted()[: args.n_trials]:
                value, state = objective(trial, args), TrialState.COMPLETE
        except optuna.TrialPruned:
            state = TrialState.PRUNED
        finally:  # after Ctrl-C and mistakes too, or the trial would run for ever
            study.tell(trial, value, state)
        print(f"trial {trial.number}: {state.name} {value} {trial.params}")


def test(study, args):
    # The best of many accuracies was lucky as well. Those of other seeds say what to expect.
    trainers = [train(args, study.best_params, seed, f"seed_{seed}") for seed in (1, 2, 3)]
    print(study.best_params, f"accuracy/val {study.best_value:.3f} in the search")
    for trainer in trainers:
        best = trainer.checkpoint_callback
        classifier = ImageClassifier.load_from_checkpoint(best.best_model_path, weights_only=True)
        [tested] = trainer.test(classifier, trainer.datamodule, verbose=False)
        val, accuracy = best.best_model_score, tested["accuracy/test"]
        print(f"{trainer.log_dir}: accuracy/val {val:.3f}, accuracy/test {accuracy:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", default="data", help="as for starter.py (%(default)s)")
    parser.add_argument("--max_epochs", type=int, default=10, help="of each training (%(default)s)")
    parser.add_argument("--n_trials", type=int, default=20, help="of all workers together (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="that share this processor (%(default)s)")
    parser.add_argument("--test", action="store_true", help="train the best trial again, and test it")
    args = parser.parse_args()
    torch.set_num_threads(max(1, torch.get_num_threads() // args.workers))
    torch.set_float32_matmul_precision("medium")
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)  # no lines on devices for each trial
    try:
        ImageData(args.data_dir)
    except FileNotFoundError as error:
        parser.error(str(error))
    study = open_study()
    if args.test and not study.get_trials(deepcopy=False, states=[TrialState.COMPLETE]):
        parser.error("no trial is complete yet")
    (test if args.test else search)(study, args)
