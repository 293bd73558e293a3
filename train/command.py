"""What all console scripts share: paths as options, and errors of the user's as one sentence and an exit code."""

import io
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import click

from .errors import UserError
from .interrupt import Killed, exit_code, raise_killed


class PathType(click.Path):
    """A path with a name: an empty one, as an unset variable of a shell gives, would mean the working directory."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(path_type=Path, **settings)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("'' is no path", param, ctx)
        return super().convert(value, param, ctx)


PATH = PathType()
NO_MEMORY = "can't allocate memory: "  # how PyTorch's allocator of CPUs begins


def run_command(command: click.Command, name: str) -> None:
    """Run a click command as the script `name`: UserError and OSError -> one line on stderr, exit code 1.

    Ctrl-C and `kill` (SIGTERM) end it alike: what is half-written is removed, exit codes 130 and 143.
    """
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:  # closed by who started the program
            setattr(sys, stream, open(os.devnull, "w"))  # noqa: SIM115 - until the end
        elif isinstance(getattr(sys, stream), io.TextIOWrapper):
            getattr(sys, stream).reconfigure(errors="backslashreplace")  # names that the terminal cannot write
    # torch 2.11 says so once of any sparse tensor that is made without a check, as those of row gradients are.
    warnings.filterwarnings("ignore", message="Sparse invariant checks are implicitly disabled")
    before = signal.signal(signal.SIGTERM, raise_killed)
    try:
        code = command.main(prog_name=name, standalone_mode=False)
    except UserError as error:
        sys.exit(_say(name, str(error), 1))
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(_say(name, "interrupted", exit_code(signal.SIGINT)))
    except Killed:
        sys.exit(_say(name, "killed", exit_code(signal.SIGTERM)))
    except MemoryError as error:
        sys.exit(_say(name, f"there is not enough memory: {error}", 1))
    except RuntimeError as error:
        if NO_MEMORY not in str(error):
            raise
        sys.exit(_say(name, f"there is not enough memory: {str(error).split(NO_MEMORY)[1]}", 1))
    except BrokenPipeError:
        sys.exit(1)
    except OSError as error:
        sys.exit(_say(name, f"{error.filename or ''}: {error.strerror or error}".lstrip(": "), 1))
    finally:
        signal.signal(signal.SIGTERM, before)
    sys.exit(code or 0)


def _say(name: str, message: str, code: int) -> int:
    click.echo(f"{name}: {message}", err=True)
    return code
