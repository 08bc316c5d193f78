"""Published pretraining throughput (``slurm/published.yml``): the numbers a measurement is held against.

Read only when asked for, since listing the matrix does not need them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from berth.errors import ConfigError
from berth.launch.recipes import PRECISIONS
from berth.launch.yamlfile import Table, raise_problems, read_yaml

COLUMNS = ("nodes", "gpus_per_node", "phase", "seq_len", "precision", "micro_batch", "accumulation", "sequences_per_second", "scaling")


@dataclass(frozen=True)
class Published:
    """One throughput somebody printed. ``micro_batch`` is sequences a GPU and forward pass.

    ``accumulation`` and ``scaling`` (factor over the table's smallest entry) are ``None`` where the source prints none; ``note``
    tells what was corrected.
    """

    source: str
    hardware: str
    nodes: int
    gpus_per_node: int
    phase: int
    seq_len: int
    precision: str
    micro_batch: int
    accumulation: int | None
    sequences_per_second: float
    scaling: float | None
    note: str

    @property
    def gpus(self) -> int:
        """GPUs of all nodes."""
        return self.nodes * self.gpus_per_node

    @property
    def accumulated_batch_per_gpu(self) -> int | None:
        """What the public scripts call ``train_batch_size``; ``None`` where accumulation is not printed."""
        return self.accumulation * self.micro_batch if self.accumulation else None

    @property
    def global_batch(self) -> int | None:
        """Sequences a step over all GPUs; ``None`` where accumulation is not printed."""
        return self.accumulated_batch_per_gpu * self.gpus if self.accumulated_batch_per_gpu else None


def load_published(path: Path) -> tuple[Published, ...]:
    """Every row of the file, newest source first as it stands there. Raises :class:`ConfigError` listing what is wrong."""
    problems: list[str] = []
    top = Table(read_yaml(path), str(path), problems)
    columns = top.take("columns", tuple)
    tables = top.take("tables", list)
    top.close()
    if columns != COLUMNS:
        problems.append(f"{path}: columns must be {', '.join(COLUMNS)}")
    rows = []
    for number, body in enumerate(tables, 1):
        table = Table(body, f"{path}: table {number}", problems)
        source, hardware = table.take("source", str), table.take("hardware", str)
        lines, note = table.take("rows", list), table.take("note", str, "")
        table.close()
        for at, line in enumerate(lines, 1):
            try:
                rows.append(_row(source, hardware, line, note))
            except ConfigError as error:
                problems.append(f"{path}: table {number} ({hardware}), row {at}: {error}")
    raise_problems(problems)
    return tuple(rows)


def _row(source: str, hardware: str, line: object, note: str) -> Published:
    if not isinstance(line, list) or not len(COLUMNS) <= len(line) <= len(COLUMNS) + 1:
        raise ConfigError(f"must be a list of {len(COLUMNS)} values ({', '.join(COLUMNS)}) and perhaps a note")
    nodes, gpus, phase, seq_len, precision, micro, accumulation, speed, scaling, *own = line
    counts = (nodes, gpus, seq_len, micro, *([] if accumulation is None else [accumulation]))
    if phase not in (1, 2) or precision not in PRECISIONS or not all(isinstance(count, int) and count > 0 for count in counts):
        raise ConfigError(f"phase is 1 or 2, precision one of {', '.join(PRECISIONS)}, counts are whole and positive; not {line}")
    if not all(isinstance(number, (int, float)) and number > 0 for number in (speed, *([] if scaling is None else [scaling]))):
        raise ConfigError(f"sequences_per_second and scaling are positive numbers, not {speed!r} and {scaling!r}")
    text = "; ".join(str(part) for part in (note, *own) if part)
    scaled = None if scaling is None else float(scaling)
    return Published(source, hardware, nodes, gpus, phase, seq_len, precision, micro, accumulation, float(speed), scaled, text)
