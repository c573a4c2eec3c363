"""The parts that `main.py`, `sweep.py` and `initialization.py` share: data → model → Lightning module → callbacks.

To learn, read the files without `for_` in their name: `data.py`, `model.py`, `classifier.py`, `callbacks.py`. `cli.py`
turns a function into a command. What is named `for_` serves one script: open it when that script is in question.

Importing it silences the warnings and messages below: each one by its text and for a reason, so that a new one shows.
"""

import logging
import warnings

# The batches are slices of tensors in memory. Worker processes would only copy them once more.
warnings.filterwarnings("ignore", ".*does not have many workers")
# Whoever passes overfit_batches wants the same batches again and again, and metrics once per epoch.
warnings.filterwarnings("ignore", ".*requested to overfit but enabled .* dataloader shuffling")
warnings.filterwarnings("ignore", ".*is smaller than the logging interval")
# Who asks for the CPU knows it, and initialization.py asks for it, as its layers are small.
warnings.filterwarnings("ignore", "GPU available but not used")
# Lightning calls what PyTorch has deprecated; the next release of Lightning may not.
warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated")
# Optuna calls heartbeats and retries experimental; requirements.txt bounds the version.
warnings.filterwarnings("ignore", ".* is (an )?experimental")
# common/for_sweep/study.py asks for trials outside of study.optimize, and sends the heartbeats as that does.
warnings.filterwarnings("ignore", "Heartbeat of storage is supposed to be used")
# Advertisements for other packages.
logging.getLogger("pytorch_lightning.utilities.rank_zero").addFilter(lambda record: "Tip:" not in str(record.msg))
