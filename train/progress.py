"""Progress of a training run: a bar on a terminal, otherwise a plain line now and then."""

import sys
import time

import click
from tqdm import tqdm

LINE_SHARE = 0.05  # without a terminal: a line for every twentieth of the run,
LINE_SECONDS = 30.0  # and at least one in so many seconds


class TrainingProgress:
    """Loss, rows/s, time left and the share of time that the loop waits for data, on stderr.

    Args:
        total_steps: steps of the whole run.
        step: steps done before this process began.
    """

    def __init__(self, total_steps: int, step: int) -> None:
        self._total, self._begun_at = total_steps, step
        self._started = self._line_time = time.monotonic()
        self._line_step = step
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total_steps, initial=step, dynamic_ncols=True,
                             bar_format="{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} {elapsed}<{remaining}{postfix}")

    def update(self, step: int, loss: float, rows_per_s: float, wait_share: float) -> None:
        """Show the state after `step` steps; wait_share in [0, 1]."""
        figures = f"loss {loss:.4f}, {rows_per_s:,.0f} rows/s, waiting for data {wait_share:.0%}"
        if self._bar is not None:
            self._bar.set_postfix_str(figures, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        now = time.monotonic()
        if step - self._line_step >= LINE_SHARE * self._total or now - self._line_time >= LINE_SECONDS:
            left = (now - self._started) / (step - self._begun_at) * (self._total - step)
            click.echo(f"step {step:,}/{self._total:,}: {figures}, {left:,.0f} s left", err=True)
            self._line_step, self._line_time = step, now

    def message(self, text: str) -> None:
        """A line of its own, above the bar if there is one."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            click.echo(text, err=True)

    def close(self) -> None:
        """Leave the bar as it is and go to the next line."""
        if self._bar is not None:
            self._bar.close()
