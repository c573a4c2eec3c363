"""The README and every other page: code runs or stands in the repository, commands run, what is named is there."""

import functools
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import optuna
import pytest
import pytorch_lightning as pl

from common.classifier import Classifier
from common.data import MNISTDataModule
from common.model import MLP
from tests.conftest import ROOT
from tests.test_classifier import QUIET

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
PYTHON = [block for block in BLOCKS if block["language"] == "python"]
COMMANDS = [line for block in BLOCKS if block["language"] == "sh" for line in block["text"].splitlines()]
PROSE = {page: re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL) for page, text in PAGES.items()}
INLINE = [words for text in PROSE.values() for words in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)]
# Started with these settings at the end, of which the last one of a name counts.
SMALL = {
    "main.py": "--max_epochs 1 --hidden_sizes [32]",
    "sweep.py": "--max_epochs 1 --n_trials 2",
    "initialization.py": "--depth 2 --width 8 --steps 2",
}
# What is not run, and why.
LEFT_OUT = {
    "pip install": "the tests' environment is complete, and tests need no network",
    "tensorboard": "a server, which does not end",
    "chromium": "needs a browser",
    "cp logs": "would replace the pictures by those of the small settings",
    "optuna-dashboard": "a server, which does not end",
    "torchrun": "needs four GPUs or several machines",
    "--accelerator gpu": "needs a GPU",
    "--storage postgresql": "tests/test_sweep.py starts a server and runs it",
    "-m pytest": "would start itself",
    "-m tests.benchmark": "takes minutes; run by hand",
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
    return tmp_path_factory.mktemp("reader")


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


@pytest.mark.parametrize(
    "block", [block for block in BLOCKS if (block["mark"] or "").startswith("output")], ids=by_line
)
def test_excerpt_has_the_words_of_the_output(block: dict):
    """Numbers differ with machine and settings, words must not."""
    call = block["mark"].removeprefix("output of ")
    printed = [text for command, text in outputs().items() if all(word in command for word in call.split())]
    if not printed:
        pytest.skip("its command has not run")
    words = set(re.findall(r"[A-Za-z_]{4,}", re.sub(r"\S+/\S+|'.*?'|--\S+", "", block["text"])))
    # With few trials and small settings some counts and names do not occur.
    missing = {word for word in words if not any(word in text for text in printed)} - {"pruned", "gelu", "relu", "tanh"}
    assert not missing


@pytest.mark.parametrize("block", [block for block in PYTHON if not block["mark"]], ids=by_line)
def test_python_block_runs(block: dict, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.chdir(folder)
    exec(compile(block["text"], by_line(block), "exec"), {"__name__": "__main__"})
    if block["output"]:
        assert block["output"].strip() in capsys.readouterr().out


@pytest.mark.parametrize("block", [block for block in PYTHON if block["mark"]], ids=by_line)
def test_marked_python_block_stands_in_its_file(block: dict):
    assert block["text"] in (ROOT / block["mark"].removeprefix("from ")).read_text()


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
        if not text.startswith(("python", "tensorboard"))
        for option in re.findall(r"--\w+", text)
    }
    assert named <= set.union(*(options_of(script) for script in SMALL))


def anchors(page: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", PROSE[page], flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_files_named_exist():
    files = {text for text in INLINE if re.fullmatch(r"(common|tests|docs|data)/[\w./]*|\w+\.py", text)}
    assert {name for name in files if not (ROOT / name).exists()} == set()


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_exist(page: str):
    for name, anchor in re.findall(r"\]\((?!http)([^#)\s]*)(?:#([^)]+))?\)", PROSE[page]):
        target = ((ROOT / page).parent / name).resolve() if name else ROOT / page
        assert target.exists(), name
        assert not anchor or anchor in anchors(str(target.relative_to(ROOT))), anchor


def test_every_picture_is_shown_and_drawn_by_a_command():
    pictures = {path.name for path in (ROOT / "docs").glob("*.png")}
    shown = {Path(name).name for text in PROSE.values() for name in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)}
    assert pictures == shown
    assert {name for name in pictures if name not in PAGES["docs/README.md"]} == set()


def test_every_page_is_linked():
    linked = set(re.findall(r"\]\(([^#)\s]+\.md)", README))
    assert {page for page in PAGES if page not in linked} == {"README.md"}


def test_classes_and_functions_named_exist():
    source = "\n".join(
        path.read_text() for path in [*ROOT.glob("*.py"), *ROOT.glob("common/*.py"), *ROOT.glob("tests/*.py")]
    )
    ours = {text for text in INLINE if re.fullmatch(r"[A-Z]\w*(Callback|Classifier|DataModule)|MLP|[A-Z]{6,}", text)}
    # "`name` in `file`" is said in prose.
    for name, file in re.findall(r"`(\w+)`(?: \w+)? in\s+`([\w./]+\.py)`", "\n".join(PROSE.values())):
        assert re.search(rf"^\s*(def|class) {name}\b|^{name}\b", (ROOT / file).read_text(), re.MULTILINE), name
    elsewhere = {name for name in ours if hasattr(optuna.study, name)}
    assert {name for name in ours - elsewhere if not re.search(rf"\b{name}\b", source)} == set()


@pytest.mark.parametrize("mark", dict.fromkeys(re.findall(r"<!-- /(\w+) -->", "".join(PAGES.values()))))
def test_table_is_what_the_benchmark_writes(mark: str):
    """Its numbers are the benchmark's; its rows and their words must be too, or it is an old one."""
    if mark == "claims":
        pytest.skip("tests/test_initialization.py compares it with what it measures")
    tables = re.findall(rf"<!-- {mark} -->\n(.+?)<!-- /{mark} -->", "".join(PAGES.values()), re.DOTALL)
    program = (ROOT / "tests/benchmark.py").read_text()
    assert tables
    for row in "".join(tables).splitlines():
        for cell in row.strip("|").split(" | "):
            for words in re.split(r"-?[\d.%]+", cell):
                assert words.strip(" |") in program


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
        owner = data if name == "prepare_data" else classifier
        setattr(owner, name, noted(name, getattr(owner, name)))
    trainer.fit(classifier, data)
    assert list(calls) == named
