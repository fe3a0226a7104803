"""What a person sees of a run: a progress bar on a terminal, plain lines in a log."""

from __future__ import annotations

import io
import sys
from collections import deque
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from framework.training.metrics import EvalRecord, TrainRecord

KEPT_LINES = 20


class Reporter:
    """Prints messages and steps; `last_lines` keeps the newest for the end marker. A quiet one only keeps them."""

    def __init__(self, console: Console | None = None, *, quiet: bool = False) -> None:
        self._console = console or Console(file=sys.stdout, highlight=False, soft_wrap=True, quiet=quiet)
        self._bar: Progress | None = None
        self.last_lines: deque[str] = deque(maxlen=KEPT_LINES)

    def line(self, message: str) -> None:
        """Print a message, above the progress bar if there is one."""
        self.last_lines.extend(message.splitlines())
        self._console.print(message, markup=False)
        self._console.file.flush()

    def drawing(self, draw: Callable[[Console], None]) -> None:
        """Print what a function prints on a console, such as a table."""
        text = io.StringIO()
        draw(Console(file=text, width=self._console.width, highlight=False))
        self.line(text.getvalue().rstrip())

    def start(self, step: int, max_steps: int) -> None:
        """Show the bar, on a terminal."""
        if self._console.is_terminal and not self._console.quiet:
            columns = (
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=self._console)
            self._task = self._bar.add_task("", total=max_steps, completed=step)
            self._bar.start()

    def record(self, record: TrainRecord | EvalRecord, max_steps: int) -> None:
        """Show one optimiser step or one evaluation."""
        if isinstance(record, EvalRecord):
            over = f"over {record.tokens:,} tokens"
            if record.accuracy is not None:
                over = f"accuracy {record.accuracy:.2%}  over {record.tokens:,} samples"
            self.line(f"step {record.step}  evaluation loss {record.loss:.4f}  {over}")
            return
        text = f"loss {record.loss:.4f}  grad {record.grad_norm:.3g}  {record.tokens_per_second:,.0f} tokens/s"
        if record.mfu is not None:
            text += f"  mfu {record.mfu:.1%}"
        elif record.model_flops is not None:
            text += f"  {format_flops(record.model_flops / record.step_seconds)}/s"
        if record.peak_memory_bytes is not None:
            text += f"  peak {format_bytes(record.peak_memory_bytes)}"
        if record.skipped:
            text += "  (skipped)"
        line = f"step {record.step}/{max_steps}  {text}  lr {record.learning_rate:.2e}  {record.step_seconds:.2f} s"
        if self._bar is None:
            self.line(line)
        else:
            self.last_lines.append(line)
            self._bar.update(self._task, completed=record.step, description=text)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __enter__(self) -> Reporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def format_bytes(count: float) -> str:
    """Bytes with a binary unit, such as `1.50 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"


def format_flops(count: float) -> str:
    """Floating-point operations with a decimal unit, such as `1.5 TFLOP`."""
    for unit in ("", "k", "M", "G", "T"):
        if count < 1000:
            return f"{count:.3g} {unit}FLOP"
        count /= 1000
    return f"{count:.3g} PFLOP"
