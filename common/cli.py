"""The command line of the scripts: the parameters of `main` are the options, its docstring is the help."""

import json
import os
import signal
import sys
import threading
from argparse import Action
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch.distributed as dist
from jsonargparse import ArgumentParser
from jsonargparse.typing import restricted_number_type
from pytorch_lightning.utilities.exceptions import MisconfigurationException, SIGTERMException

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
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def interrupt_again(unraisable: Any) -> None:
    """Python drops an exception that leaves a destructor or another callback of the memory management.

    If that is Ctrl-C's KeyboardInterrupt, this raises it once more, a moment later.
    """
    if unraisable.exc_type is not KeyboardInterrupt:
        sys.__unraisablehook__(unraisable)
    elif hasattr(signal, "pthread_kill"):  # wakes the main thread if it waits; Windows has none
        threading.Timer(0.1, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT]).start()
    else:
        threading.Timer(0.1, signal.raise_signal, [signal.SIGINT]).start()


def run_from_command_line(main: Callable[..., object], arguments: Sequence[str] | None = None) -> None:
    """Calls `main` with the options of the command line.

    An error that the user can mend, in options or files, ends the program with one line and exit status 2. Any other
    exception is a mistake in the code, whose traceback is wanted.
    """
    sys.unraisablehook = interrupt_again
    parser = OneLineParser(description=main.__doc__.splitlines()[0])
    parser.add_function_arguments(main, as_group=False)
    # JSON turns jsonargparse's PositiveInt into a plain int. Options get into checkpoints, and torch.load's safe mode
    # refuses other classes there.
    options = json.loads(parser.dump(parser.parse_args(arguments), format="json"))
    try:
        main(**options)
    except (OSError, FloatingPointError, MisconfigurationException, ValueError) as error:
        if isinstance(error, ValueError):
            # TensorBoardLogger makes a ValueError of the OSError of a full disk.
            if not isinstance(error.__cause__, OSError):
                raise
            error = error.__cause__
        if os.environ.get("LOCAL_RANK", "0") != "0":
            sys.exit(2)  # the first process of this host says it, as it has the same error
        parser.error(str(error))
    except (KeyboardInterrupt, SIGTERMException):
        sys.exit(1)
    finally:
        # Lightning ends a process group of GPUs, but not one of CPUs, whose threads may abort the exit of the program.
        if dist.is_available() and dist.is_initialized() and dist.get_backend() == "gloo":
            dist.destroy_process_group()
