"""Measured beside published: measurements and the matrix in; a table, JSON or a picture out.

A ratio is given only between equals: another precision, length or batch gets a reason instead.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from berth.errors import ConfigError
from berth.files import atomic_path
from berth.launch.estimate import implied_time_to_train
from berth.launch.matrix import Matrix, Published
from berth.launch.measure import WARM_UP_STEPS, Measurement, Settings, measured

__all__ = ["Line", "PublishedCheck", "as_json", "as_table", "check_published", "compare", "draw", "measured"]

AGREES_WITHIN = 0.10  # printed hours and those implied by printed throughput, relative
DOUBT = "; contradicts the hours to train printed beside it"


@dataclasses.dataclass(frozen=True)
class Line:
    """One measurement beside what was published for it. ``why`` says why there is no ``ratio``, else it is empty.

    ``scaling`` is the factor over the fewest GPUs measured with the same platform, phase, precision and batch; ``efficiency`` that factor
    by the factor in GPUs. ``tflops_per_gpu`` counts what the model needs, not what the GPU did (recomputed activations).
    """

    measurement: Measurement
    platform: str | None
    nodes: int | None
    per_gpu: float
    published: float | None
    source: str
    ratio: float | None
    why: str
    scaling: float | None = None
    efficiency: float | None = None
    tflops_per_gpu: float | None = None


def compare(measurements: Sequence[Measurement], matrix: Matrix) -> list[Line]:
    """A line for every measurement, in order: what was published, the ratio or why there is none, and strong scaling."""
    doubtful = {
        (check.source, check.hardware, check.nodes, check.precision, speed)
        for check in check_published(matrix)
        if not check.consistent
        for speed in check.sequences_per_second
    }
    lines = [_beside(measurement, matrix, doubtful) for measurement in measurements]
    fewest: dict[tuple[object, ...], Line] = {}
    for line in lines:
        before = fewest.get(_kind(line))
        if line.measurement.steps and line.platform and (before is None or _scale_base(line) < _scale_base(before)):
            fewest[_kind(line)] = line
    return [_scaled(line, fewest.get(_kind(line))) for line in lines]


def _beside(measurement: Measurement, matrix: Matrix, doubtful: Collection[tuple[object, ...]]) -> Line:
    row, settings = measurement.row, measurement.settings
    platform, nodes = (row["platform"], row["nodes"]) if row else (None, None)
    per_gpu = measurement.sequences_per_second / settings.world_size
    flops = measurement.flops_per_sequence
    tflops = per_gpu * flops / 1e12 if flops and measurement.steps else None
    known = Line(measurement, platform, nodes, per_gpu, None, "", None, "", tflops_per_gpu=tflops)
    if not measurement.steps:
        return dataclasses.replace(known, why=f"no step after the first {WARM_UP_STEPS} of an attempt was logged")
    if row is None:
        return dataclasses.replace(
            known, why=f"hardware unknown: no run.json of a phase {settings.phase} job with {settings.world_size} ranks beside the log"
        )
    if platform not in matrix.platforms:
        return dataclasses.replace(known, why=f"platform {platform} is not in the matrix")
    best, why = _published(settings, row, matrix)
    if best is None:
        return dataclasses.replace(known, why=why)
    speed = best.sequences_per_second
    doubt = (best.source, best.hardware, best.nodes, best.precision, speed) in doubtful
    source = best.source + (DOUBT if doubt else "")
    return dataclasses.replace(known, published=speed, source=source, ratio=measurement.sequences_per_second / speed)


def _published(settings: Settings, row: Mapping[str, Any], matrix: Matrix) -> tuple[Published | None, str]:
    """The newest publication of the very same, or why there is none: the first thing in which all that comes close differ.

    The rule is that of :meth:`Matrix.published_for`, step by step, and the global batch where the source prints it.
    """
    hardware = matrix.platforms[row["platform"]].published_as
    place = (row["nodes"], row["ranks_per_node"])
    left = [
        one
        for one in matrix.published
        if one.hardware in hardware and (one.nodes, one.gpus_per_node, one.phase) == (*place, settings.phase)
    ]
    if not left:
        return None, f"nothing published for phase {settings.phase} on {place[0]} x {row['platform']} with {place[1]} GPUs each"
    for attribute, name in (
        ("seq_len", "length"), ("precision", "precision"), ("micro_batch", "micro-batch"), ("global_batch", "global batch"),
    ):  # fmt: skip
        mine = getattr(settings, attribute)
        theirs = [getattr(one, attribute) for one in left]
        left = [one for one, value in zip(left, theirs, strict=True) if value == mine or (value is None and attribute == "global_batch")]
        if not left:
            other = " or ".join(str(value) for value in dict.fromkeys(theirs))
            return None, f"not comparable: {name} {mine}, published with {other}"
    return left[0], ""


def _kind(line: Line) -> tuple[object, ...]:
    """Lines of one kind differ in the number of GPUs alone."""
    settings = line.measurement.settings
    return (line.platform, settings.phase, settings.precision, settings.seq_len, settings.global_batch)


def _scale_base(line: Line) -> tuple[int, float]:
    return (line.measurement.settings.world_size, -line.measurement.sequences_per_second)


def _scaled(line: Line, base: Line | None) -> Line:
    if base is None or not line.measurement.steps:
        return line
    factor = line.measurement.sequences_per_second / base.measurement.sequences_per_second
    gpus = line.measurement.settings.world_size / base.measurement.settings.world_size
    return dataclasses.replace(line, scaling=factor, efficiency=factor / gpus)


@dataclasses.dataclass(frozen=True)
class PublishedCheck:
    """Printed hours to train beside those that the printed throughput of both phases implies. ``ratio`` = printed / implied."""

    hardware: str
    nodes: int
    precision: str
    source: str
    sequences_per_second: tuple[float, float]
    implied_hours: float
    printed_hours: float
    ratio: float
    consistent: bool


# hours to train both phases that the same READMEs print, by commit, hardware, nodes and precision
PRINTED_HOURS: dict[tuple[str, str, int, str], float] = {
    ("78ec6802", "DGX-1 16G", 1, "fp16"): 153.16,
    ("78ec6802", "DGX-1 16G", 4, "fp16"): 39.27,
    ("78ec6802", "DGX-1 16G", 16, "fp16"): 10.36,
    ("78ec6802", "DGX-2H 32G", 1, "fp16"): 58.4,
    ("78ec6802", "DGX-2H 32G", 4, "fp16"): 15.35,
    ("78ec6802", "DGX-2H 32G", 16, "fp16"): 3.94,
    ("78ec6802", "DGX-2H 32G", 64, "fp16"): 1.124,
    ("78ec6802", "DGX-2H 32G", 64, "fp32"): 4.338,
    ("a07d20a1", "DGX A100 (8x A100 80GB)", 32, "fp16"): 1.2,
    ("a07d20a1", "DGX A100 (8x A100 80GB)", 32, "tf32"): 2.4,
}


def check_published(matrix: Matrix, recipe: str = "lamb") -> list[PublishedCheck]:
    """Do the published numbers agree with one another? Throughput that contradicts its own README's hours is no target.

    Throughput of both phases is paired where one table prints it for the same machine. Ideal hours = sequences of the phase / throughput.
    """
    tables: dict[tuple[Any, ...], dict[int, list[float]]] = {}
    full = {name: platform.ranks_per_node for platform in matrix.platforms.values() for name in platform.published_as}
    for one in matrix.published:
        if one.gpus_per_node == full.get(one.hardware):
            key = (one.source, one.hardware, one.nodes, one.precision, one.accumulation is None)
            tables.setdefault(key, {1: [], 2: []})[one.phase].append(one.sequences_per_second)
    checks = []
    for (source, hardware, nodes, precision, _), speeds in tables.items():
        hours = next((value for key, value in PRINTED_HOURS.items() if key[0] in source and key[1:] == (hardware, nodes, precision)), None)
        for pair in zip(speeds[1], speeds[2], strict=False) if hours else ():
            implied = implied_time_to_train(matrix.recipes[recipe].phases, dict(enumerate(pair, 1)))
            ratio = hours / implied if hours else 0.0
            checks.append(
                PublishedCheck(hardware, nodes, precision, source, pair, implied, hours or 0.0, ratio, abs(ratio - 1) <= AGREES_WITHIN)
            )
    return checks


# -- showing ------------------------------------------------------------------------------------------------------------------

COLUMNS = (
    "run", "platform", "phase", "seq", "nodes x GPUs", "precision", "micro x acc", "global batch", "seq/s", "10 % - 90 %", "seq/s/GPU",
    "TFLOPS/GPU", "published", "ratio", "scaling", "efficiency", "source, or why no ratio",
)  # fmt: skip
LEFT = ("run", "platform", "precision", COLUMNS[-1])


def as_table(lines: Sequence[Line]) -> str:
    """An aligned table that is Markdown as well; a line break or bar in a name is shown escaped."""
    cells = [COLUMNS, *(tuple(_plain(cell) for cell in _cells(line)) for line in lines)]
    widths = [max(len(row[at]) for row in cells) for at in range(len(COLUMNS))]

    def text(row: Sequence[str]) -> str:
        padded = (cell.ljust(width) if name in LEFT else cell.rjust(width) for name, cell, width in zip(COLUMNS, row, widths, strict=True))
        return f"| {' | '.join(padded)} |"

    rule = "|".join(
        f":{'-' * (width + 1)}" if name in LEFT else f"{'-' * (width + 1)}:" for name, width in zip(COLUMNS, widths, strict=True)
    )
    return "\n".join([text(cells[0]), f"|{rule}|", *(text(row) for row in cells[1:])])


def _plain(text: str) -> str:
    return text.encode("unicode_escape").decode().replace("|", "\\x7c") if not text.isprintable() or "|" in text else text


def _cells(line: Line) -> tuple[str, ...]:
    measurement, settings = line.measurement, line.measurement.settings
    ranks = settings.world_size // line.nodes if line.nodes else settings.world_size
    done = measurement.steps > 0
    return (
        Path(measurement.run).name,
        line.platform or "?",
        str(settings.phase),
        str(settings.seq_len or "?"),
        f"{line.nodes or '?'} x {ranks}",
        settings.precision,
        f"{settings.micro_batch} x {settings.accumulation}",
        str(settings.global_batch),
        f"{measurement.sequences_per_second:.1f}" if done else "",
        f"{measurement.low:.1f} - {measurement.high:.1f}" if done else "",
        f"{line.per_gpu:.2f}" if done else "",
        "" if line.tflops_per_gpu is None else f"{line.tflops_per_gpu:.3g}",
        "" if line.published is None else f"{line.published:g}",
        "" if line.ratio is None else f"{line.ratio:.2f}",
        "" if line.scaling is None else f"{line.scaling:.2f}",
        "" if line.efficiency is None else f"{100 * line.efficiency:.0f} %",
        line.why or line.source,
    )


def as_json(lines: Sequence[Line]) -> str:
    """The lines as a JSON list; every field of :class:`Line` and of its measurement."""
    return json.dumps([dataclasses.asdict(line) for line in lines], indent=2, ensure_ascii=False)


def draw(lines: Sequence[Line], path: Path, matrix: Matrix | None = None) -> None:
    """A PNG of sequences/s over GPUs, a panel a phase: measured, published (all sizes of the platform with ``matrix``), and ideal scaling.

    Raises :class:`ConfigError` without matplotlib, or when no line has both a measurement and a platform.
    """
    shown = [line for line in lines if line.measurement.steps and line.platform]
    if not shown:
        raise ConfigError("there is nothing to draw: no run has both measured steps and a known platform")
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError("a picture needs matplotlib: pip install 'matplotlib>=3.7'; or leave --png out") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import ScalarFormatter

    phases = sorted({line.measurement.settings.phase for line in shown})
    figure, panels = pyplot.subplots(1, len(phases), figsize=(6 * len(phases), 4.5), squeeze=False, layout="constrained")
    for panel, phase in zip(panels[0], phases, strict=True):
        here = [line for line in shown if line.measurement.settings.phase == phase]
        kinds = {(line.platform, line.measurement.settings.precision): f"C{number}" for number, line in enumerate(here)}
        for (platform, precision), color in kinds.items():
            mine = [line for line in here if (line.platform, line.measurement.settings.precision) == (platform, precision)]
            _curves(panel, mine, color, f"{platform} {precision}", [] if matrix is None else _curve(matrix, mine[0]))
        panel.set(title=f"phase {phase}", xlabel="GPUs", ylabel="sequences/s", xscale="log", yscale="log")
        panel.set_xticks(sorted({line.measurement.settings.world_size for line in here}))
        panel.xaxis.set_major_formatter(ScalarFormatter())
        panel.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        panel.grid(True, which="major", alpha=0.3)
        panel.legend(fontsize="small")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    pyplot.close(figure)


def _curve(matrix: Matrix, line: Line) -> list[tuple[int, float]]:
    """GPUs and sequences/s published for the platform of ``line``, its phase and precision; the best of each size, full nodes only."""
    platform, settings = matrix.platforms.get(line.platform or ""), line.measurement.settings
    best: dict[int, float] = {}
    for one in matrix.published:
        if platform is None or one.hardware not in platform.published_as:
            continue
        if (one.phase, one.precision, one.gpus_per_node) == (settings.phase, settings.precision, platform.ranks_per_node):
            best[one.gpus] = max(best.get(one.gpus, 0.0), one.sequences_per_second)
    return sorted(best.items())


def _curves(panel: Any, lines: Sequence[Line], color: str, label: str, published: Sequence[tuple[int, float]]) -> None:
    points = sorted((line.measurement.settings.world_size, line.measurement.sequences_per_second) for line in lines)
    panel.plot(*zip(*points, strict=True), "o-", color=color, label=f"{label}, measured")
    least, most = points[0], points[-1]
    if most[0] > least[0]:
        panel.plot((least[0], most[0]), (least[1], least[1] * most[0] / least[0]), ":", color=color, alpha=0.6, label="ideal")
    beside = published or sorted((line.measurement.settings.world_size, line.published) for line in lines if line.published is not None)
    if beside:
        panel.plot(*zip(*beside, strict=True), "x--", color=color, alpha=0.6, label=f"{label}, published")
