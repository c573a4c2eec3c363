"""The README and every other page: code runs or stands in the repository, commands run, what is named is there."""

import functools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import optuna
import pytest
import pytorch_lightning as pl

from common.classifier import Classifier
from common.data import MNISTDataModule
from common.model import MLP
from tests.conftest import QUIET, ROOT, run_python

README = (ROOT / "README.md").read_text()
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("d*/*.md")))
}
# Of each block: the comment above it, its language, its text, and what follows "prints" after it.
BLOCK = re.compile(
    r"(?:<!-- (?P<mark>.+?) -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$"
    r"(?:\n\nprints\n\n```text\n(?P<output>.*?)```)?",
    re.MULTILINE | re.DOTALL,
)
BLOCKS = [
    match.groupdict() | {"page": page, "line": text[: match.start()].count("\n") + 1}
    for page, text in PAGES.items()
    for match in BLOCK.finditer(text)
]
# The files of the README's small program, by the name in their first line.
PROGRAMS = {block["text"].split()[1]: block["text"] for block in BLOCKS if block["text"].startswith("# digits_")}
# tests/test_your_project.py runs those beside starter.py.
PYTHON = [
    block
    for block in BLOCKS
    if block["language"] == "python" and block["mark"] != "beside starter.py" and block["text"] not in PROGRAMS.values()
]
COMMANDS = [line for block in BLOCKS if block["language"] == "sh" for line in block["text"].splitlines()]
PROSE = {page: re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL) for page, text in PAGES.items()}
INLINE = [words for text in PROSE.values() for words in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)]
# What some blocks need beside requirements.txt.
FURTHER = [
    name.replace("-", "_") for name in re.findall(r"^[\w-]+", (ROOT / "docs/requirements.txt").read_text(), re.M)
]
# Started with these settings at the end, of which the last one of a name counts.
SMALL = {
    "main.py": "--max_epochs 1 --hidden_sizes [32]",
    "sweep.py": "--max_epochs 1 --n_trials 2",
    "initialization.py": "--depth 2 --width 8 --steps 2",
}
# What is not run, and why.
LEFT_OUT = {
    "git clone": "this is the clone",
    "cd lightning": "the same",
    "venv": "the tests have their environment",
    "pip install": "the tests' environment is complete, and tests need no network",
    "tensorboard": "a server, which does not end",
    "chromium": "needs a browser",
    "cp logs": "would replace the pictures by those of the small settings",
    "optuna-dashboard": "a server, which does not end",
    "starter.py": "tests/test_your_project.py runs it beside a folder of images",
    "tune.py": "tests/test_tasks.py runs it beside a folder of images",
    "docs/pictures.py": "needs the logs of whole runs",
    "OMP_NUM_THREADS": "tests/test_sweep.py starts two at the same moment",
    "torchrun": "needs four GPUs or several machines",
    "--accelerator gpu": "needs a GPU",
    "--storage postgresql": "tests/test_sweep.py starts a server and runs it",
    "-m pytest": "would start itself",
    "-m docs.benchmark": "takes minutes; run by hand",
    "ruff": ".ci/run calls it",
    "uv ": "makes another environment",
}


def by_line(block: dict) -> str:
    return f"{block['page']} line {block['line']}"


def runnable(command: str) -> bool:
    return not any(words in command for words in LEFT_OUT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the reader's commands run one after the other, as some go on from what earlier ones have left."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "data").symlink_to(ROOT / "data")  # as in the root of the repository
    return folder


@cache
def outputs() -> dict[str, str]:
    """What each command has printed, filled by the tests in the README's order."""
    return {}


@pytest.mark.parametrize("command", dict.fromkeys(filter(runnable, COMMANDS)))
def test_command_runs(command: str, folder: Path):
    python, name, *options = shlex.split(command, comments=True)
    assert python == "python"
    words = [sys.executable, str(ROOT / name), *options, *SMALL[name].split()]
    result = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stderr
    assert "Warning" not in result.stderr
    outputs()[command] = result.stdout + result.stderr


def shape(line: str) -> str:
    """What must be the same in each run of a command: all up to the second number, whose value may differ."""
    line = re.sub(r"-?\d[\d.]*(e[+-]\d+)?%?", "#", " ".join(line.split()))
    return " ".join("#".join(line.split("#")[:2]).strip(" ,").split())


def has_lines(output: str, excerpt: str) -> bool:
    """Whether the lines of the excerpt stand in the output, in their order and perhaps with others between (…)."""
    lines = iter([shape(line) for line in output.splitlines()])
    return all(shape(line) in lines for line in excerpt.splitlines() if line != "…")


@pytest.mark.parametrize(
    "block", [block for block in BLOCKS if (block["mark"] or "").startswith("output")], ids=by_line
)
def test_excerpt_has_the_lines_of_the_output_in_their_order(block: dict):
    call = block["mark"].removeprefix("output of ")
    printed = [text for command, text in outputs().items() if all(word in command for word in call.split())]
    if not printed:
        pytest.skip("its command has not run")
    assert any(has_lines(text, block["text"]) for text in printed), printed[-1]


def test_files_of_the_parts_run_one_after_the_other_in_an_empty_folder(tmp_path: Path):
    (tmp_path / "data").symlink_to(ROOT / "data")
    printed = {}
    for name, text in PROGRAMS.items():
        (tmp_path / name).write_text(text)
        result = run_python(tmp_path, name, PYTHONPATH="")  # without the modules of this repository
        assert result.returncode == 0, result.stderr
        printed[name] = result.stdout
        promised = re.findall(r"print\(.*\)  # ([^…\n]+)", text)  # what a comment says that this line prints
        assert promised, name
        for line in promised:
            assert line in result.stdout if "Size" in line else has_lines(result.stdout, line), result.stdout
    assert 85 < float(re.search(r"test accuracy ([\d.]+)%", printed["digits_train.py"])[1]) < 99


@pytest.mark.parametrize("block", PYTHON, ids=by_line)
def test_python_block_runs(
    block: dict, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.chdir(folder)
    missing = [name for name in FURTHER if name in block["text"].lower() and not find_spec(name)]
    if missing and "CI" not in os.environ:
        pytest.skip(f"{missing} of docs/requirements.txt")
    if re.search(r"ddp_(fork|notebook)|num_workers=(?!0)|SIGUSR1", block["text"]):
        # On its own, as the reader would: where the tests have used a GPU, this process can no longer be forked, and
        # since Python 3.14 workers are not forked but import the program.
        (tmp_path / "block.py").write_text(block["text"])
        result = run_python(folder, tmp_path / "block.py")
        assert result.returncode == 0, result.stderr
        return
    exec(compile(block["text"], by_line(block), "exec"), {"__name__": "__main__"})
    if block["output"]:
        assert block["output"].strip() in capsys.readouterr().out


@cache
def options_of(script: str) -> set[str]:
    shown = subprocess.run([sys.executable, str(ROOT / script), "--help"], capture_output=True, text=True, check=True)
    return set(re.findall(r"--\w+", shown.stdout))


@pytest.mark.parametrize("command", dict.fromkeys([*COMMANDS, *(text for text in INLINE if " " in text)]))
def test_options_of_commands_exist(command: str):
    match = re.search(r"(\w+\.py)( .*)?$", command)
    if match and match[1] in SMALL:
        assert set(re.findall(r"--\w+", match[2] or "")) <= options_of(match[1])


def test_every_other_option_named_exists():
    named = {
        option
        for text in INLINE
        if not text.startswith(("python", "tensorboard", "uv "))
        for option in re.findall(r"--\w+", text)
    }
    assert named <= set.union(*(options_of(script) for script in SMALL))


def anchor_of(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-")


def anchors(page: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", PROSE[page], flags=re.MULTILINE)
    return set(map(anchor_of, headings))


def test_files_named_exist():
    files = {text for text in INLINE if re.fullmatch(r"(common|tests|docs|data)/[\w./]*|\w+\.py", text)}
    assert {name for name in files - set(PROGRAMS) if not (ROOT / name).exists()} == set()


def test_map_has_a_line_for_each_file_and_an_order():
    rows = re.findall(r"^\| `([\w/]+\.py)` \| .+ \| (?:\*\*read\*\* (\d)|\*skip at first\*)", README, re.MULTILINE)
    paths = [*ROOT.glob("*.py"), *ROOT.glob("common/**/*.py")]
    files = {str(path.relative_to(ROOT)) for path in paths if path.name != "__init__.py"} - set(PROGRAMS)
    assert sorted(name for name, _ in rows) == sorted(files)
    places = [int(place) for _, place in rows if place]
    assert places == list(range(1, len(places) + 1))


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_exist(page: str):
    for name, anchor in re.findall(r"\]\((?!http)([^#)\s]*)(?:#([^)]+))?\)", PROSE[page]):
        target = ((ROOT / page).parent / name).resolve() if name else ROOT / page
        assert target.exists(), name
        assert not anchor or anchor in anchors(str(target.relative_to(ROOT))), anchor


def test_every_picture_is_shown_and_drawn_by_a_command():
    pictures = {path.name for path in (ROOT / "docs").glob("*.png")}
    shown = {Path(name).name for text in PROSE.values() for name in re.findall(r"\]\(([^)]+\.png)\)", text)}
    assert pictures == shown
    assert {name for name in pictures if name not in PAGES["CONTRIBUTING.md"]} == set()


def test_every_page_is_linked():
    readme, index = (set(re.findall(r"\]\(([\w/]+\.md)", PAGES[page])) for page in ("README.md", "docs/README.md"))
    assert {"docs/README.md", *(page for page in PAGES if not page.startswith("docs/"))} <= readme | {"README.md"}
    assert {path.name for path in (ROOT / "docs").glob("*.md")} == index | {"README.md"}


def test_index_has_every_question_and_the_words_of_each_message():
    messages, questions = PAGES["docs/README.md"].split("## Error messages")[1].split("## Questions")
    sections = {page: re.split(r"^#{2,3} (.+)$", text, flags=re.MULTILINE)[1:] for page, text in PROSE.items()}
    answers = {
        f"{os.path.relpath(page, 'docs')}#{anchor_of(heading)}": " ".join(f"{heading} {text}".split())
        for page, parts in sections.items()
        for heading, text in zip(parts[::2], parts[1::2], strict=True)
    }
    listed = re.findall(r"^- \[(.+)\]\((.+)\)$", messages, re.MULTILINE)
    for message, link in listed:
        assert all(part.strip() in answers[link] for part in message.split("…")), message
    letters = [re.sub(r"[^a-z0-9 ]", "", message.lower()) for message, _ in listed]
    assert letters == sorted(letters)
    pages = {f"docs/{name}" for name in re.findall(r"^\*\*\[.+\]\((\w+\.md)\)\*\*$", questions, re.MULTILINE)}
    headings = [heading for page in PAGES if page in pages for heading in re.findall(r"^### (.+)$", PROSE[page], re.M)]
    assert sorted(text for text, _ in re.findall(r"^- \[(.+)\]\((.+)\)$", questions, re.M)) == sorted(headings)


def test_optunas_faq_is_answered():
    """Each of the 24 questions in the documentation of Optuna 5.0 has a link, or a few words why it has none."""
    faq = PAGES["docs/optuna_studies.md"].split("## Optuna's FAQ")[1]
    rows = re.findall(r"^\| (.+\?.*) \| (.+) \|$", faq, re.MULTILINE)
    assert len(dict(rows)) == len(rows) == 24
    assert sum("](" not in answer for _, answer in rows) <= 4


def test_classes_and_functions_named_exist():
    source = "\n".join(
        path.read_text() for path in [*ROOT.glob("*.py"), *ROOT.glob("common/**/*.py"), *ROOT.glob("tests/*.py")]
    )
    ours = {text for text in INLINE if re.fullmatch(r"[A-Z]\w*(Callback|Classifier|DataModule)|MLP|[A-Z]{6,}", text)}
    # "`name` in `file`" is said in prose.
    for name, file in re.findall(r"`(\w+)`(?: \w+)? in\s+`([\w./]+\.py)`", "\n".join(PROSE.values())):
        assert re.search(rf"^\s*(def|class) {name}\b|^{name}\b", (ROOT / file).read_text(), re.MULTILINE), name
    elsewhere = {name for name in ours if hasattr(optuna.study, name)}
    assert {name for name in ours - elsewhere if not re.search(rf"\b{name}\b", source)} == set()


def test_python_versions_of_the_readme_are_those_that_ci_resolves():
    first, last = map(int, re.search(r"installs on Python 3\.(\d+) to 3\.(\d+)\.", README).groups())
    resolved = re.search(r"for python in (.+); do", (ROOT / ".ci/run").read_text())[1]
    assert resolved.split() == [f"3.{minor}" for minor in range(first, last + 1)]
    assert f'python-version: ["3.{first}", "3.{last}"]' in (ROOT / ".github/workflows/ci.yml").read_text()
    assert f'target-version = "py3{first}"' in (ROOT / "pyproject.toml").read_text()
    assert f"Python 3.{first} to 3.{last}," in PAGES["CONTRIBUTING.md"]


def table_line(page: str, row: str) -> str:
    """The line of a table or of a printed one that begins with the word of its row."""
    [line] = [line for line in PAGES[page].splitlines() if line.removeprefix("| ").startswith(row)]
    return line


def figures_of(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+\.?\d*", text)]


def last_digit(text: str) -> float:
    """What the last digit of the first figure counts: 0.1 in 3.5."""
    return 10.0 ** -len(re.search(r"\d+\.?(\d*)", text)[1])


def in_sentence(page: str, sentence: str) -> list[float]:
    return [float(number) for number in re.search(sentence, " ".join(PAGES[page].split())).groups()]


DEFAULT = ("docs/speed.md", "`medium`, the default")  # the row of main.py as it is


@pytest.mark.parametrize(
    ("page", "sentence", "table", "row"),
    [
        ("README.md", r"Over five seeds that is ([\d.]+) % ± ([\d.]+)", *DEFAULT),
        ("docs/speed.md", r"products alone are ([\d.]+) of a step", "docs/speed.md", "its matrix products alone"),
        ("docs/initialization.md", r"`xavier_normal` reaches ([\d.]+) %", "docs/initialization.md", "xavier_normal"),
        ("docs/initialization.md", r"takes away, and reaches ([\d.]+) %", "docs/initialization.md", "kaiming_normal"),
        ("docs/initialization.md", r"stays at ([\d.]+) %: it answers", "docs/initialization.md", "pytorch_default"),
        ("README.md", r"\[([\d.]+) times\]\S+ as many trials a minute", "docs/tuning.md", "2 workers of 1 thread"),
        ("docs/tuning.md", r"TPE is ahead by ([\d.]+) ± ([\d.]+) points", "docs/tuning.md", "TPE, pruned"),
        ("docs/tuning.md", r"and is ahead by ([\d.]+) ± ([\d.]+) points", "docs/tuning.md", "GP |"),
        ("docs/tuning.md", r"it took (\d+) epochs", "docs/tuning.md", "GP |"),
        ("docs/tuning.md", r"epochs instead of (\d+)", "docs/tuning.md", "TPE, pruned"),
        ("docs/tuning.md", r"in each, these are (\d+)", "docs/tuning.md", "hyperparameter | searched"),
        ("docs/tuning.md", r"worse by ([\d.]+) points at most", "docs/tuning.md", "top third"),
    ],
)
def test_figure_of_a_sentence_stands_in_its_table(page: str, sentence: str, table: str, row: str):
    assert set(in_sentence(page, sentence)) <= set(figures_of(table_line(table, row)))


@pytest.mark.parametrize(
    ("page", "sentence", "column", "row", "base"),
    [
        ("speed", r"adds ([\d.]+) ms", 2, "`medium` matrix products: `main.py` | 1", "bare PyTorch loop, augmented"),
        ("speed", r"hooks take ([\d.]+) of", 2, "Lightning with", "bare PyTorch loop, augmented"),
        ("speed", r"They bring ([\d.]+) points", 6, "one-cycle schedule", "batches of 512"),
        ("speed", r"augmentation brings ([\d.]+) points", 6, "augmentation on the device | `", "images as tensors | `"),
        ("speed", r"epochs\*\* bring ([\d.]+) points", 6, "26 epochs", "`medium` matrix products: `main.py` | `"),
        ("speed", r"normalization\*\* ([\d.]+) more", 6, "batch normalization", "26 epochs"),
        ("tuning", r"costs random search ([\d.]+) points", 4, "random | 1", "random, pruned"),
        ("tuning", r"best five are better by ([\d.]+) points", 4, "True", "False"),
        ("tuning", r"seed 1 is ahead by ([\d.]+) points", 5, "winner of seed 1", "defaults"),
        ("tuning", r"it is ([\d.]+) points behind", 6, "defaults", "winner of seed 1"),
        ("tuning", r"the last by ([\d.]+) points", 6, "defaults", "winner of seed 5"),
    ],
)
def test_difference_in_a_sentence_is_that_of_two_rows(page: str, sentence: str, column: int, row: str, base: str):
    page = f"docs/{page}.md"
    high, low = (figures_of(table_line(page, name).split("|")[column])[0] for name in (row, base))
    assert in_sentence(page, sentence) == [pytest.approx(high - low)]


def table(mark: str) -> dict[str, list[str]]:
    """The columns of a marked table by the first cell of each row, header included."""
    [text] = re.findall(rf"<!-- {mark} -->\n(.+?)<!-- /{mark} -->", "".join(PAGES.values()), re.DOTALL)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    return {cells[0]: cells for cells in rows if not cells[0].startswith("---")}


@pytest.mark.parametrize(
    ("mark", "base"),
    [
        ("speed", "`medium` matrix products: `main.py`"),
        ("products", "`--matmul_precision highest`"),
        ("ladder", "`medium` matrix products: `main.py`"),
        ("workers", "1 worker of 2 threads"),
    ],
)
def test_ratios_in_a_table_are_those_of_its_figures(mark: str, base: str):
    """A figure that was changed by hand, or comes from another run than its neighbors, breaks them."""
    header, *rows = table(mark).values()
    for column in [number for number, name in enumerate(header) if name == "ratio"]:
        whole = figures_of(table(mark)[base][column - 1])[0]
        for cells in rows:
            figure, ratio = (figures_of(cell)[0] for cell in cells[column - 1 : column + 1])
            # All three are rounded.
            error = 0.5 * last_digit(cells[column - 1]) * (1 + ratio) / whole + 0.51 * last_digit(cells[column])
            assert ratio == pytest.approx(figure / whole, abs=error)


def test_hooks_are_called_in_the_order_of_the_readme():
    listed = re.search(r"<!-- hooks -->\n```text\n(.+?)```", README, re.DOTALL)[1]
    named = re.findall(r"prepare_data|configure_optimizers|\w+_step|setup|teardown|backward|on_\w+", listed)
    calls = {}

    def noted(name: str, hook: Callable) -> Callable:
        @functools.wraps(hook)
        def wrapper(*arguments, **options):
            if not trainer.sanity_checking:
                calls.setdefault(name)
            return hook(*arguments, **options)

        return wrapper

    trainer = pl.Trainer(max_epochs=1, limit_train_batches=1, limit_val_batches=1, enable_checkpointing=False, **QUIET)
    data, classifier = MNISTDataModule(), Classifier(MLP([16]))
    for name in named:
        owner = data if name in ("prepare_data", "on_after_batch_transfer") else classifier
        setattr(owner, name, noted(name, getattr(owner, name)))
    trainer.fit(classifier, data)
    assert list(calls) == named
