"""Progress of a long command on stderr: a bar on a terminal, plain lines elsewhere (see linearize.progress)."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from linearize_cli.output import clock_time, console, drawable, figure, label, plural, print_table, say, without_copies

SECONDS_BETWEEN_LINES = 5.0
"""How often progress prints a line where there is no terminal."""

_WIDE = 140
_MATCH_TITLE = "How well each layer is matched (explained: share of the teacher's attention output)"


def make_progress() -> BarProgress | LineProgress:
    """Bars on a terminal, plain lines elsewhere."""
    return BarProgress() if drawable() else LineProgress()


class _Clock:
    """Speed and time left of one stage, counted from the first step that this process makes."""

    def __init__(self, total_steps: int, tokens_per_step: int) -> None:
        self.total_steps = total_steps
        self.tokens_per_step = tokens_per_step
        self.began = time.monotonic()
        self.first: int | None = None

    def update(self, step: int) -> tuple[float, float]:
        """(tokens a second, seconds left) after `step` steps."""
        if self.first is None:
            self.first = step - 1
        seconds_a_step = max(time.monotonic() - self.began, 1e-9) / max(step - self.first, 1)
        return self.tokens_per_step / seconds_a_step, max(self.total_steps - step, 0) * seconds_a_step


class LineProgress:
    """Progress as plain lines: the first and last step of a stage and one every few seconds."""

    def __init__(self) -> None:
        self._clock = _Clock(0, 0)
        self._spoke = 0.0

    def start(self, stage: str, total_steps: int, tokens_per_step: int) -> None:
        """Announce the stage."""
        self._clock = _Clock(total_steps, tokens_per_step)
        self._spoke = 0.0
        say(f"{stage}: {plural(total_steps, 'step')} of {tokens_per_step:,} tokens")

    def step(self, stage: str, step: int, loss: float | None, tokens: int, extra: Mapping[str, Any]) -> None:
        """Say where the stage is, if it is time to."""
        speed, left = self._clock.update(step)
        total = self._clock.total_steps
        now = time.monotonic()
        if step < total and now - self._spoke < SECONDS_BETWEEN_LINES:
            return
        self._spoke = now
        more = "".join(f", {label(name)} {figure(name, value)}" for name, value in extra.items())
        lost = "" if loss is None else f", loss {loss:.4g}"
        say(f"{stage}: step {step:,}/{total:,}{lost}{more}, {speed:,.0f} tokens/s, {clock_time(left)} left")

    def layer_table(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """The match of each layer."""
        if rows:  # none where every step hid the window, as the results say
            print_table(without_copies(rows), title=_MATCH_TITLE)

    def message(self, text: str) -> None:
        """One line."""
        say(text)

    def finish(self, stage: str) -> None:
        """Nothing: the last step has been told."""

    def close(self) -> None:
        """Nothing to give back."""


class BarProgress:
    """Progress as a bar with loss, tokens a second and time left."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._console = console()
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}", markup=False),
            console=self._console,
            transient=False,
            redirect_stdout=False,
            redirect_stderr=True,
        )
        self._task: Any = None
        self._clock = _Clock(0, 0)

    def start(self, stage: str, total_steps: int, tokens_per_step: int) -> None:
        """A new bar."""
        self._clock = _Clock(total_steps, tokens_per_step)
        if self._task is not None:
            self._bar.update(self._task, visible=False)  # it has been left on the screen above
        self._task = self._bar.add_task(stage, total=total_steps, figures="")
        self._bar.start()

    def step(self, stage: str, step: int, loss: float | None, tokens: int, extra: Mapping[str, Any]) -> None:
        """Move the bar."""
        speed, left = self._clock.update(step)
        lost = "" if loss is None else f"loss {loss:.4g}  "
        figures = f"{lost}{speed:,.0f} tokens/s  {clock_time(left)} left"
        if self._console.width >= _WIDE:
            figures += "".join(f"  {label(name)} {figure(name, value)}" for name, value in extra.items())
        self._bar.update(self._task, completed=step, figures=figures)

    def layer_table(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """The match of each layer, above the bar."""
        if rows:
            print_table(without_copies(rows), title=_MATCH_TITLE, to=self._console)

    def message(self, text: str) -> None:
        """One line above the bar."""
        self._console.print(text, soft_wrap=True)

    def finish(self, stage: str) -> None:
        """Leave the bar as it is and give the terminal back."""
        self.close()

    def close(self) -> None:
        """Give the terminal back, also after an error."""
        self._bar.stop()
