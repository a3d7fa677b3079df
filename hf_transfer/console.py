"""How a program of ours behaves in a terminal: says what was decided, and of bad input one sentence."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable

from .errors import TransferError


def is_first_process() -> bool:
    """Whether this is the process that speaks, as torchrun and accelerate launch number them."""
    return os.environ.get("RANK", "0") == "0"


def run(main: Callable[[], None]) -> None:
    """Runs a recipe's main function as a program.

    The library's decisions (parameters trained, learning rates, where each value came from) are logged to stderr by
    the first process. Bad input ends the program with one message and exit code 2, not with a traceback.

    Args:
        main: The program.
    """
    logging.basicConfig(format="%(message)s")
    if is_first_process():
        logging.getLogger("hf_transfer").setLevel(logging.INFO)
    try:
        main()
    except TransferError as error:
        if is_first_process():
            sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
