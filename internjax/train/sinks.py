"""Where records go beside the log's file: TensorBoard event files and Weights & Biases.

Both are extras; each sink is a context manager that yields `write(record)`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from internjax.errors import Missing
from internjax.telemetry import Record

type Write = Callable[[Record], None]


@contextmanager
def tensorboard(folder: Path, *, start: int) -> Iterator[Write]:
    """Writes every number of a record as a scalar; steps after `start` in older files are hidden.

    Raises: Missing when tensorboardX is not installed.
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise Missing("run.tensorboard=true needs: pip install 'internjax[tensorboard]'") from error
    writer = SummaryWriter(str(folder), purge_step=start + 1 if start else None)

    def write(record: Record) -> None:
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float):
                writer.add_scalar(name, float(value), record["step"])

    try:
        yield write
    finally:
        writer.close()


@contextmanager
def wandb(folder: Path, *, project: str, name: str) -> Iterator[Write]:
    """Sends records to Weights & Biases; a resumed run goes on in the same run there.

    Raises: Missing when wandb is not installed.
    """
    try:
        import wandb as client
    except ImportError as error:
        raise Missing("run.wandb=PROJECT needs: pip install 'internjax[wandb]'") from error
    note = folder / "wandb_id"
    known = note.read_text(encoding="utf-8").strip() if note.is_file() else None
    run = client.init(project=project, name=name, dir=str(folder), id=known, resume="allow")
    note.write_text(run.id, encoding="utf-8")
    try:
        yield lambda record: run.log(dict(record), step=record["step"])
    finally:
        run.finish()
