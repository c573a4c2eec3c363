"""The command line of the scripts: the parameters of `main` are the options, its docstring is the help."""

import json
import re
from argparse import Action
from collections.abc import Callable
from typing import NoReturn

from jsonargparse import ArgumentParser
from jsonargparse.typing import restricted_number_type

# Of units to drop or of a target to smooth: none is allowed, all is not.
Share = restricted_number_type("Share", float, [(">=", 0), ("<", 1)])
# NumPy's generator takes no other seeds.
Seed = restricted_number_type("Seed", int, [(">=", 0), ("<", 2**32)])


class OneLineParser(ArgumentParser):
    """jsonargparse's parser, which says in a single line what is wrong and takes a switch without a value."""

    def add_argument(self, *args, **kwargs) -> Action:
        action = super().add_argument(*args, **kwargs)
        if action.default is False:
            action.nargs, action.const = "?", True
        return action

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        message = re.sub(r'Parser key "(\w+)":', r"--\1:", message)
        # Of a union of types, jsonargparse lists what each of them expects.
        expectations = re.findall(r"^\s+- (.+)", message, flags=re.MULTILINE)
        if expectations:
            message = f"{message.splitlines()[0]} {' or '.join(expectations)}"
        message = re.sub(r"a typing\.Literal|a <class '(\w+)'>", lambda match: match[1] or "one of ", message)
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def run(main: Callable[..., object]) -> None:
    """Calls `main` with the options of the command line.

    What the user can mend, bad options or files, ends the program with one line and exit status 2. Any other exception
    is a mistake in the code, whose traceback is wanted.
    """
    parser = OneLineParser(description=main.__doc__.splitlines()[0])
    parser.add_function_arguments(main, as_group=False)
    # Through JSON, because what is left of a PositiveInt then is an int, which a checkpoint may hold.
    options = json.loads(parser.dump(parser.parse_args(), format="json"))

    # Imported only now, because torch and Lightning take seconds to load and --help should not.
    from pytorch_lightning.utilities.exceptions import MisconfigurationException

    try:
        main(**options)
    except (OSError, FloatingPointError, MisconfigurationException) as error:
        parser.error(str(error))
