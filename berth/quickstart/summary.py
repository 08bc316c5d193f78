"""What ``make pretrain`` shows at its end: held-out scores beside their baselines, curves as a PNG, where everything lies."""

from __future__ import annotations

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

from berth.errors import DataError
from berth.files import atomic_path, write_json
from berth.quickstart.plan import Demo, Phase
from berth.quickstart.stages import Runner
from berth.runlog import read_records, read_steps

MARGIN_NATS = 0.5  # held-out MLM loss must be this far below the unigram entropy to call it learning
MARGIN_ACCURACY = 2.0  # and accuracy this many times the most frequent token's share


@dataclasses.dataclass(frozen=True)
class PhaseResult:
    """Read from one phase's run log: held-out scores (by global step; those of its start and end), training curve, sequences/s (median over the
    steps)."""

    phase: Phase
    start: dict[str, Any]
    end: dict[str, Any]
    scores: dict[int, dict[str, Any]]
    steps: dict[int, dict[str, Any]]
    sequences_per_second: float


def read_phase(demo: Demo, phase: Phase) -> PhaseResult:
    """Collect one phase from its run log. Raises :class:`DataError` when the log lacks an evaluation."""
    path = demo.results(phase) / "dllogger.json"
    scores: dict[str, dict[str, Any]] = {}
    by_step: dict[int, dict[str, Any]] = {}
    for record in read_records(path):
        data = record.get("data", {})
        if "evaluation" in data:
            scores[data["evaluation"]] = by_step[record["step"][1]] = data
    if not {"start", "end"} <= scores.keys():
        raise DataError(f"{path} lacks the held-out scores of the phase's start or end; remove {demo.results(phase)} and run again")
    steps = read_steps(path)
    rates = [float(row["training_sequences_per_second"]) for row in steps.values()]
    return PhaseResult(phase, scores["start"], scores["end"], by_step, steps, statistics.median(rates))


def learned(result: PhaseResult) -> bool:
    """Whether the end of the phase beats both baselines by the margins."""
    base = result.end["baselines"]
    return (
        result.end["mlm_loss"] <= base["unigram_entropy"] - MARGIN_NATS
        and result.end["mlm_accuracy"] >= MARGIN_ACCURACY * base["most_frequent_token_accuracy"]
    )


def score_table(results: list[PhaseResult]) -> str:
    """The held-out scores as text."""
    head = f"{'held-out records':<22}{'MLM loss':>10}{'unigram':>10}{'MLM acc.':>10}{'top token':>11}{'NSP acc.':>10}{'majority':>10}"
    lines = [head, "-" * len(head)]
    for result in results:
        for when, row in (("start", result.start), ("end", result.end)):
            base = row["baselines"]
            lines.append(
                f"phase {result.phase.number} {when:<5} (seq {result.phase.seq_length:>3})"
                f"{row['mlm_loss']:>10.3f}{base['unigram_entropy']:>10.3f}{100 * row['mlm_accuracy']:>8.1f} %"
                f"{100 * base['most_frequent_token_accuracy']:>9.1f} %{100 * row['nsp_accuracy']:>8.1f} %"
                f"{100 * base['most_frequent_nsp_accuracy']:>8.1f} %"
            )
    return "\n".join(lines)


def draw_curves(results: list[PhaseResult], path: Path) -> None:
    """PNG of the loss (training and held-out, with the unigram baseline) and the learning rate over global steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, figsize=(9, 7), sharex=True, height_ratios=(2, 1), layout="constrained")
    boundary = 0
    for result, colour in zip(results, ("tab:blue", "tab:orange"), strict=False):
        label = f"phase {result.phase.number} (seq {result.phase.seq_length})"
        steps = list(result.steps)
        training = [row["mlm_loss"] for row in result.steps.values()]
        above.plot(steps, training, color=colour, linewidth=1, label=f"{label}: training MLM loss")
        held = [row["mlm_loss"] for row in result.scores.values()]
        above.plot(list(result.scores), held, "o", color=colour, markeredgecolor="black", label=f"{label}: held-out MLM loss")
        above.plot(
            [boundary, boundary + result.phase.steps], [result.end["baselines"]["unigram_entropy"]] * 2, ":", color="tab:gray",
            label="unigram entropy of the held-out shard" if boundary == 0 else None,
        )  # fmt: skip
        below.plot(steps, [row["learning_rate"] for row in result.steps.values()], color=colour, linewidth=1, label=label)
        boundary += result.phase.steps
    for axis in (above, below):
        axis.axvline(results[0].phase.steps, color="tab:gray", linewidth=0.8)
        axis.grid(alpha=0.3)
    above.set_ylabel("MLM loss [nat per masked token]")
    above.legend(fontsize="small")
    above.set_title("Pretraining: loss and learning rate")
    below.set_ylabel("learning rate")
    below.set_xlabel("optimizer step")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)


def write_summary(demo: Demo, runner: Runner, results: list[PhaseResult], predictions: list[str], curves: Path) -> str:
    """Write ``summary.json`` and return the text to print."""
    last = results[-1]
    verdict = (
        f"The model has learned: held-out MLM loss {last.end['mlm_loss']:.3f} nat is "
        f"{last.end['baselines']['unigram_entropy'] - last.end['mlm_loss']:.2f} below the unigram entropy, accuracy "
        f"{last.end['mlm_accuracy'] / max(last.end['baselines']['most_frequent_token_accuracy'], 1e-9):.1f} times the most frequent token's."
        if learned(last)
        else "The model has NOT learned enough to be told from word counts (wanted: MLM loss "
        f"{MARGIN_NATS} nat below the unigram entropy and accuracy {MARGIN_ACCURACY:g} times the most frequent token's). Give it more text "
        "or more steps."
    )
    places = {
        "sentences": demo.sentences,
        "shards": demo.shards,
        "vocabulary": demo.vocab,
        "model config": demo.model_config,
        **{f"records, seq {phase.seq_length}": demo.records(phase) for phase in demo.phases},
        **{f"checkpoints, phase {phase.number}": demo.results(phase) for phase in demo.phases},
        "Hugging Face model": demo.huggingface,
        "loss curves": curves,
        "this summary": demo.workdir / "summary.json",
    }
    write_json(
        demo.workdir / "summary.json",
        {
            "learned": learned(last),
            "phases": [
                {
                    **dataclasses.asdict(result.phase),
                    "held_out_start": result.start,
                    "held_out_end": result.end,
                    "sequences_per_second": result.sequences_per_second,
                }
                for result in results
            ],
            "seconds": {name: round(value, 1) for name, value in runner.seconds.items()},
            "fill_mask": predictions,
            "artefacts": {name: str(path) for name, path in places.items()},
        },
    )
    parts = [
        "",
        "=" * 83,
        score_table(results),
        "",
        "sequences/s:  " + ",  ".join(f"phase {r.phase.number}: {r.sequences_per_second:.1f} (seq {r.phase.seq_length})" for r in results),
        "seconds:  " + ", ".join(f"{name} {value:.0f}" for name, value in runner.seconds.items()),
        "",
        "fill-mask:",
        *(f"  {line}" for line in predictions),
        "",
        *(f"{name + ':':<24}{path}" for name, path in places.items()),
        "",
        verdict,
    ]
    return "\n".join(parts)


def load_cached_predictions(path: Path, key: str) -> list[str] | None:
    """Fill-mask lines of an earlier run of the same export, or ``None``."""
    try:
        cached = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return cached["lines"] if cached.get("key") == key else None
