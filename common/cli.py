"""The command line of the scripts: the parameters of `main` are the options, its docstring is the help."""

import json
import os
import signal
import sys
from argparse import Action
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist
from jsonargparse import ArgumentParser
from jsonargparse.typing import restricted_number_type
from pytorch_lightning.core.saving import save_hparams_to_yaml
from pytorch_lightning.utilities.exceptions import MisconfigurationException

# In [0, 1): dropout or smoothing may be 0, but not 1.
Fraction = restricted_number_type("Fraction", float, [(">=", 0), ("<", 1)])
# NumPy's generator takes no other seeds.
Seed = restricted_number_type("Seed", int, [(">=", 0), ("<", 2**32)])


class OneLineParser(ArgumentParser):
    """jsonargparse's parser, which says in a single line what is wrong and takes a switch without a value."""

    def add_argument(self, *args, **kwargs) -> Action:
        action = super().add_argument(*args, **kwargs)
        if action.default is False:
            action.nargs, action.const = "?", True  # --flag alone means true
        return action

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        exit_with_one_line(self.prog, message)


def exit_with_one_line(program: str, message: object) -> NoReturn:
    print(f"{program}: error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(2)


@contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Ends the program with one line and status 2 at an error that the user can mend, in options or files.

    Any other exception is a mistake in the code, whose traceback is wanted. Ctrl-C ends with the usual status 130.
    """
    try:
        yield
    except (OSError, FloatingPointError, MisconfigurationException) as error:
        exit_with_one_line(program, error)
    except (KeyboardInterrupt, SystemExit) as stop:
        # In a training, Lightning turns Ctrl-C into SystemExit.
        if isinstance(stop, KeyboardInterrupt) or isinstance(stop.__context__, KeyboardInterrupt):
            sys.exit(128 + signal.SIGINT)
        raise
    finally:
        # Lightning ends a process group of GPUs, but not one of CPUs, whose threads may abort the exit of the program.
        if dist.is_available() and dist.is_initialized() and dist.get_backend() == "gloo":
            dist.destroy_process_group()


def run_from_command_line(main: Callable[..., object], arguments: Sequence[str] | None = None) -> None:
    """Calls `main` with the options of the command line, or of a file that `--config` names."""
    parser = OneLineParser(description=main.__doc__.splitlines()[0])
    parser.add_argument("--config", action="config", help="File of options, such as the config.yaml of a run.")
    parser.add_function_arguments(main, as_group=False)
    # JSON turns jsonargparse's PositiveInt into a plain int. Options get into checkpoints, and torch.load's safe mode
    # refuses other classes there.
    options = json.loads(parser.dump(parser.parse_args(arguments), format="json"))
    # A shell expands no ~ after "=", as in --log_dir=~/runs.
    options = {name: os.path.expanduser(value) if isinstance(value, str) else value for name, value in options.items()}
    with one_line_errors(parser.prog):
        main(**options)


def versions(parent: Path) -> dict[int, Path]:
    """Finds the folders `version_N` by their number."""
    numbers = {path: path.name.removeprefix("version_") for path in parent.glob("version_*")}
    return {int(number): path for path, number in numbers.items() if number.isdecimal()}


def make_version(parent: Path, options: dict[str, Any]) -> Path:
    """Makes the folder `version_N` of the next free number, and in it the `config.yaml` of a run, for `--config`."""
    parent.mkdir(parents=True, exist_ok=True)  # raises where a link leads nowhere, which below would look like a folder
    for version in count(max(versions(parent), default=-1) + 1):
        try:
            (folder := parent / f"version_{version}").mkdir()
        except FileExistsError:  # another run has taken it at the same moment
            continue
        save_hparams_to_yaml(folder / "config.yaml", options)
        return folder
