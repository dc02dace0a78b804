"""metrics.jsonl for TensorBoard: event files beside it, told line by line while training goes on.

    with event_files(output, config.tracking, earlier) as tell:
        tell({"step": 10, "loss": 2.3, …})          # OUTPUT/tensorboard/events.out.tfevents.…

The files are made from metrics.jsonl and from nothing else: a training that goes on writes them anew, from the lines
that it goes on from, so that no step is told twice. They are no artefact of a run, as they hold the time of the day.
"""

import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lib.files import EVENTS

Line = dict[str, float]


@contextmanager
def event_files(
    output: Path, tracking: Iterable[str], earlier: list[Line], last: float | None = None
) -> Iterator[Callable[[Line], None]]:
    """What tells a line, after those told earlier; where TensorBoard is not among the trackers, it does nothing.

    `last` is when the last of them was logged, in seconds since 1970; by default now.
    """
    if "tensorboard" not in tracking:
        yield lambda line: None
        return
    from tensorboardX import SummaryWriter

    shutil.rmtree(output / EVENTS, ignore_errors=True)
    # Whoever has the former files open drops their points from this step on.
    with SummaryWriter(str(output / EVENTS), purge_step=0, flush_secs=5) as writer:
        began = (last or time.time()) - (earlier[-1]["seconds"] if earlier else 0.0)

        def tell(line: Line) -> None:
            for name, value in line.items():
                if name not in ("step", "seconds"):
                    writer.add_scalar(f"training/{name}", value, int(line["step"]), began + line["seconds"])

        for line in earlier:
            tell(line)
        yield tell


def write_events(output: Path, lines: list[Line]) -> Path:
    """The event files of a training that is over, from its logged lines. Returns their folder."""
    with event_files(output, ["tensorboard"], lines, last=(output / "metrics.jsonl").stat().st_mtime):
        return output / EVENTS
