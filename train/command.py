"""What all console scripts share: errors of the user's become one sentence and an exit code."""

import sys

import click

from .errors import UserError

INTERRUPTED = 130  # the shell's convention for Ctrl-C


def run_command(command: click.Command, name: str) -> None:
    """Run a click command as the script `name`: UserError and OSError -> one line on stderr, exit code 1."""
    try:
        code = command.main(prog_name=name, standalone_mode=False)
    except UserError as error:
        sys.exit(_say(name, str(error), 1))
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(_say(name, "interrupted", INTERRUPTED))
    except BrokenPipeError:
        sys.exit(1)
    except OSError as error:
        sys.exit(_say(name, f"{error.filename or ''}: {error.strerror or error}".lstrip(": "), 1))
    sys.exit(code or 0)


def _say(name: str, message: str, code: int) -> int:
    click.echo(f"{name}: {message}", err=True)
    return code
