"""The parts of `main.py`, `sweep.py` and `initialization.py`: data → model → Lightning module → callbacks.

To learn, read `data.py`, `model.py`, `classifier.py` and `callbacks.py`. Skip `cli.py`, which turns a function into a
command. What has `for_` in its name serves one script: open it when that script is in question.

Importing `common` silences the warnings and messages below, each for a reason.
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
