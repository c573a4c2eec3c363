"""Prunes trials that train on two devices: `python -m docs.prune_ddp` from the root of the repository."""

import optuna
import pytorch_lightning as pl

from common.callbacks import MetricsCallback
from common.classifier import Classifier
from common.data import MNISTDataModule


class PruningCallback(pl.Callback):
    def __init__(self, trial):
        self.trial = trial

    def on_validation_end(self, trainer, pl_module):
        if trainer.sanity_checking:
            return
        prune = False
        if trainer.is_global_zero:  # one process reports and decides
            self.trial.report(trainer.callback_metrics["accuracy/val"].item(), step=trainer.current_epoch)
            prune = bool(self.trial.should_prune())
            self.trial.set_user_attr("pruned", prune)
        trainer.should_stop |= trainer.strategy.broadcast(prune)  # all stop, or none


def objective(trial):
    learning_rate = trial.suggest_float("learning_rate", 1e-9, 1e-2, log=True)
    callbacks = [MetricsCallback(), PruningCallback(trial)]
    devices = {"accelerator": "cpu", "devices": 2, "strategy": "ddp_spawn"}
    trainer = pl.Trainer(max_epochs=3, limit_train_batches=5, callbacks=callbacks, **devices)
    trainer.fit(Classifier({"hidden_sizes": [32]}, learning_rate), MNISTDataModule())

    # The processes that trained have ended. What they reported is in the database.
    recorded = trial.study.trials[trial.number]
    if recorded.user_attrs["pruned"]:
        raise optuna.TrialPruned
    return max(recorded.intermediate_values.values())


if __name__ == "__main__":  # the processes import this file, and must not start a search
    pruner = optuna.pruners.MedianPruner(n_startup_trials=1)
    study = optuna.create_study(storage="sqlite:///prune_ddp.db", direction="maximize", pruner=pruner)
    study.enqueue_trial({"learning_rate": 1e-2})
    study.enqueue_trial({"learning_rate": 1e-8})
    study.optimize(objective, n_trials=2)
    assert [(trial.state.name, trial.last_step) for trial in study.trials] == [("COMPLETE", 2), ("PRUNED", 0)]
