"""Draws docs/accuracy.png from the logs of two runs, and takes two pictures of the test out of the first one's log.

python docs/pictures.py logs/main/version_0 logs/usual/main/version_0
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator, PercentFormatter
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

DOCS = Path(__file__).parent
ours, usual = (EventAccumulator(run).Reload() for run in sys.argv[1:])

figure, axis = plt.subplots(figsize=(9, 4), layout="constrained")
for events, name, color in ((ours, "main.py", "tab:blue"), (usual, "usual example", "gray")):
    for tag, kind, style in (("accuracy/val", "validation", "-"), ("accuracy/train", "training", "--")):
        accuracies = [event.value for event in events.Scalars(tag)]
        axis.plot(range(1, len(accuracies) + 1), accuracies, style, color=color, marker=".", label=f"{name}, {kind}")
axis.set(xlabel="epoch", ylabel="accuracy", ylim=(0.94, 1.0))
axis.xaxis.set_major_locator(MaxNLocator(integer=True))
axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
axis.grid(alpha=0.3)
axis.legend(loc="lower right")
figure.savefig(DOCS / "accuracy.png", dpi=110)

for name in ("confusion", "mistakes"):
    [picture] = ours.Images(f"{name}/test")
    (DOCS / f"{name}.png").write_bytes(picture.encoded_image_string)
