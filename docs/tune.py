"""Searches hyperparameters of starter.py with Optuna, then trains and tests the best ones with other seeds.

python tune.py --n_trials 20    a worker of the search; start it several times at once if you like
python tune.py --test           when the search has ended, and only once
"""

import argparse
import logging

import optuna
import pytorch_lightning as pl
import torch
from filelock import FileLock
from optuna.trial import TrialState
from starter import ImageClassifier, ImageData

LOCK = FileLock("tune.lock")  # of a package that comes with PyTorch


def train(data, max_epochs, params, seed, name, callbacks=()):
    pl.seed_everything(seed, workers=True, verbose=False)
    data.loading["batch_size"] = params["batch_size"]
    logger = pl.loggers.TensorBoardLogger(".", name="tune", version=name)  # numbers are not safe with several workers
    best = pl.callbacks.ModelCheckpoint(filename="best", monitor="accuracy/val", mode="max")
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    trainer = pl.Trainer(max_epochs=max_epochs, devices=1, logger=logger, callbacks=[best, *callbacks], **quiet)
    trainer.fit(ImageClassifier(data.train_set.classes, params["learning_rate"]), data)
    return trainer


def objective(trial, data, max_epochs):
    def report(trainer, classifier):
        trial.report(trainer.callback_metrics["accuracy/val"].item(), step=trainer.current_epoch)
        if trial.should_prune():
            raise optuna.TrialPruned

    params = {
        "learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-1, log=True),
        "batch_size": trial.suggest_categorical("batch_size", [8, 16, 32, 64]),
    }
    pruning = pl.callbacks.LambdaCallback(on_validation_end=report)
    trainer = train(data, max_epochs, params, 0, f"trial_{trial.number}", [pruning])
    return trainer.checkpoint_callback.best_model_score.item()


def search(study, data, args):
    torch.set_num_threads(1)  # other cores have workers of their own
    while True:
        with LOCK:  # or two workers would both begin the last trial
            states = [trial.state for trial in study.get_trials(deepcopy=False)]
            if len(states) - states.count(TrialState.FAIL) >= args.n_trials:
                return
            trial, value, state = study.ask(), None, TrialState.FAIL
        try:
            value, state = objective(trial, data, args.max_epochs), TrialState.COMPLETE
        except optuna.TrialPruned:
            state = TrialState.PRUNED
        finally:  # after Ctrl-C and mistakes too, or the trial would run for ever
            study.tell(trial, value, state)
        print(f"trial {trial.number}: {state.name} {value} {trial.params}")


def test(study, data, args):
    print(study.best_params, f"accuracy/val {study.best_value:.3f} in the search")
    for seed in (1, 2, 3):  # the best of many accuracies was lucky as well: those of other seeds say what to expect
        trainer = train(data, args.max_epochs, study.best_params, seed, f"seed_{seed}")
        best = trainer.checkpoint_callback
        classifier = ImageClassifier.load_from_checkpoint(best.best_model_path, weights_only=True)
        [tested] = trainer.test(classifier, data, verbose=False)
        val, accuracy = best.best_model_score, tested["accuracy/test"]
        print(f"{trainer.log_dir}: accuracy/val {val:.3f}, accuracy/test {accuracy:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", default="data", help="as for starter.py (%(default)s)")
    parser.add_argument("--max_epochs", type=int, default=10, help="of each training (%(default)s)")
    parser.add_argument("--n_trials", type=int, default=20, help="of all workers together (%(default)s)")
    parser.add_argument("--test", action="store_true", help="train the best trial again, and test it")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("medium")
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)  # no lines on devices for each trial
    try:
        data = ImageData(args.data_dir, num_workers=0)
    except OSError as error:
        parser.error(str(error))
    with LOCK:  # two workers that make its tables at the same moment would clash
        options = {"study_name": "starter", "direction": "maximize", "load_if_exists": True}
        pruner = optuna.pruners.MedianPruner(n_warmup_steps=1)  # not in the first epoch
        study = optuna.create_study(storage="sqlite:///tune.db?timeout=60", pruner=pruner, **options)
    if args.test and not study.get_trials(deepcopy=False, states=[TrialState.COMPLETE]):
        parser.error("no trial is complete yet")
    (test if args.test else search)(study, data, args)
