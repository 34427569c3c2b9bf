"""What is frozen costs little: a plain loop, TRL's SFTTrainer and `partialtune train`, in turn -> time and memory.

    python tests/benchmarks/yardsticks.py [--shape gpt2 smollm2] [--policy notebook full last_2] [--precision fp32 bf16]
    python tests/benchmarks/yardsticks.py --shape llama-1.1b --policy last_2 --batch 4 --only ours

Three ways to train the same parameters of the same model on as many random or real tokens, each in a process of its
own: the plain loop beside this file; TRL's SFTTrainer, whose parameters are frozen by hand, without checkpointing of
activations, otherwise with its defaults; `partialtune train`. All compute in the same precision on weights in fp32;
`--frozen_dtype` says otherwise for ours. Random weights are written once, tensor by tensor: nothing here holds a model
twice. Seconds a step are medians without the first step. With the frozen prefix kept, the first step fills it.

Peak memory is the largest resident memory (VmHWM) of the whole command and of any process that it starts: of ours that
is imports, loading, scores, training, a checkpoint, the final save, reading back what was saved, and the pages. Plain
saves nothing; TRL saves the model once at its end.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from random_models import SHAPES
from speed import run_process

PLAIN, MODELS = Path(__file__).with_name("plain_loop.py"), Path(__file__).with_name("random_models.py")
WAYS = ("plain", "trl", "ours")


@dataclass(frozen=True)
class Policy:
    """What trains.

    Attributes:
        title: In the table.
        recipe: Its keys in our recipe; by hand, `plain_loop.freeze_by_hand` does the same.
        memory: Largest ratio of peak memory, ours / TRL.
        time: Largest ratio of seconds a step, ours / TRL, by shape; "" is for those that are not named.
    """

    title: str
    recipe: dict[str, Any]
    memory: float
    time: dict[str, float] = field(default_factory=dict)


POLICIES = {
    "notebook": Policy("notebook's policy", {"trainable": ["embeddings", "final_norm", "head"]}, 0.3, {"": 0.55}),
    "full": Policy("full fine-tuning", {"method": "full"}, 0.85, {"": 0.55}),
    "last_2": Policy(
        "last 2 blocks + final norm, cached",
        {"trainable": ["blocks[-2:]", "final_norm"], "prefix_cache": "memory"},
        0.4,
        {"smollm2": 0.3, "gpt2": 0.36},
    ),
}


@dataclass(frozen=True)
class Setting:
    """What one process trains, and how.

    Attributes:
        shape, policy: Names.
        precision: `fp32` or `bf16`.
        batch, block_size: Windows a step, tokens a window.
        steps: Optimizer steps.
        batches: Batches of an epoch.
    """

    shape: str
    policy: str
    precision: str
    batch: int = 16
    block_size: int = 256
    steps: int = 4
    batches: int = 1


@dataclass(frozen=True)
class Measurement:
    """One process.

    Attributes:
        setting: What it trained.
        way: Of `WAYS`.
        step_seconds: Median seconds a step, the first not counted.
        peak_mb: Largest resident memory of the whole command, in 2^20 bytes.
        training_peak_mb: Likewise up to the end of training; None where the way does not say.
        utilisation: As `performance.json` has it; None for the others.
        wall_seconds: From the command to the end of its process.
    """

    setting: Setting
    way: str
    step_seconds: float
    peak_mb: float
    wall_seconds: float
    training_peak_mb: float | None = None
    utilisation: float | None = None


# --- the task of a process of its own


def train_with_trl(setting: Setting, model_folder: Path, folder: Path) -> dict[str, Any]:
    """SFTTrainer, its parameters frozen by hand, on random tokens."""
    import torch
    from datasets import Dataset
    from plain_loop import freeze_by_hand, peak_mb
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Ends(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_step_end(self, args, state, control, **kwargs) -> None:
            self.seconds.append(time.perf_counter())

    args = SFTConfig(
        str(folder),
        max_steps=setting.steps,
        per_device_train_batch_size=setting.batch,
        max_length=setting.block_size,
        bf16=setting.precision == "bf16",
        gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **training_settings(),
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    freeze_by_hand(model, setting.policy)
    rows = torch.randint(model.config.vocab_size, (setting.batches * setting.batch, setting.block_size))
    ends = Ends()
    trainer = SFTTrainer(
        model,
        args,
        train_dataset=Dataset.from_dict({"input_ids": rows.tolist()}),
        processing_class=AutoTokenizer.from_pretrained(model_folder),
        callbacks=[ends],
    )
    trainer.train()
    peak = peak_mb()
    trainer.save_model()
    steps = [after - before for before, after in zip(ends.seconds, ends.seconds[1:], strict=False)]
    return {"step_seconds": statistics.median(steps), "training_peak_mb": peak}


def training_settings() -> dict[str, Any]:
    """What TRL and ours are told alike."""
    return {"learning_rate": 5e-5, "lr_scheduler_type": "constant", "weight_decay": 0.01, "max_grad_norm": 1.0}


# --- measurements


class Bench:
    """Runs settings, each in a process of its own, on models that it makes.

    Args:
        folder: Where models and runs go.
        recipe: Further keys of our recipe.
        more_words: For every command of ours.
    """

    def __init__(self, folder: Path, recipe: dict[str, Any], more_words: Sequence[str]) -> None:
        self.folder, self.recipe, self.more_words = folder, recipe, list(more_words)

    def measure(self, setting: Setting, way: str) -> Measurement:
        model = self.folder / setting.shape
        tokens = (setting.batches * setting.batch) * setting.block_size + setting.block_size // 2
        run_process([str(MODELS), setting.shape, str(model), "--tokens", str(tokens)])
        run = self.folder / "run"
        found, peak, wall = getattr(self, f"_{way}")(setting, model, run)
        shutil.rmtree(run, ignore_errors=True)
        return Measurement(setting, way, peak_mb=peak, wall_seconds=wall, **found)

    def _plain(self, setting: Setting, model: Path, run: Path) -> tuple[dict[str, Any], float, float]:
        words = [str(PLAIN), "--policy", setting.policy, "--steps", str(setting.steps), "--model", str(model)]
        words += ["--batch_size", str(setting.batch), "--block_size", str(setting.block_size)]
        output, peak, wall = run_process([*words, *["--bf16"] * (setting.precision == "bf16")])
        return {"step_seconds": json.loads(output.splitlines()[-1])["median_step_seconds"]}, peak, wall

    def _trl(self, setting: Setting, model: Path, run: Path) -> tuple[dict[str, Any], float, float]:
        words = [__file__, "--setting", json.dumps(asdict(setting)), "--folder", str(model), "--run", str(run)]
        output, peak, wall = run_process(words)
        return json.loads(output.splitlines()[-1]), peak, wall

    def _ours(self, setting: Setting, model: Path, run: Path) -> tuple[dict[str, Any], float, float]:
        recipe = self.folder / "recipe.yaml"  # JSON is YAML
        recipe.write_text(json.dumps(recipe_of(setting, model, run) | self.recipe))
        _, peak, wall = run_process(["-m", "partialtune", "train", str(recipe), *self.more_words])
        performance = json.loads((run / "performance.json").read_text())
        found = {"step_seconds": performance["median_step_seconds"], "utilisation": performance["utilisation"]}
        return {**found, "training_peak_mb": performance["peak_memory_mb"]}, peak, wall


def recipe_of(setting: Setting, model: Path, run: Path) -> dict[str, Any]:
    """What the other ways do, as a recipe, with a checkpoint in the last step."""
    return {
        "model_name_or_path": str(model),
        "text": str(model / "text.txt"),
        "text_cleaning": "none",
        "validation_share": 0,
        "prompts": [],
        "block_size": setting.block_size,
        "per_device_train_batch_size": setting.batch,
        "max_steps": setting.steps,
        "save_steps": setting.steps,
        "delta_steps": setting.steps,
        "bf16": setting.precision == "bf16",
        "output_dir": str(run),
        **training_settings(),
        **POLICIES[setting.policy].recipe,
    }


# --- the table


def rows_of(found: Sequence[Measurement]) -> Iterator[dict[str, Any]]:
    """One row of the table a setting: medians over the rounds by way, ratios of ours to the others, the targets."""
    for setting in dict.fromkeys(one.setting for one in found):
        row: dict[str, Any] = {"setting": setting}
        for way in WAYS:
            taken = [one for one in found if (one.setting, one.way) == (setting, way)]
            for what in ("step_seconds", "peak_mb", "training_peak_mb", "utilisation", "wall_seconds"):
                values = [getattr(one, what) for one in taken if getattr(one, what) is not None]
                row[f"{way}_{what}"] = statistics.median(values) if values else None
        for way in ("plain", "trl"):
            for what in ("step_seconds", "peak_mb"):
                ours, other = row[f"ours_{what}"], row[f"{way}_{what}"]
                row[f"{what}_over_{way}"] = ours / other if ours and other else None
        policy = POLICIES[setting.policy]
        row["time_target"], row["memory_target"] = policy.time.get(setting.shape, policy.time.get("")), policy.memory
        yield row


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| shape | trains | precision | batch | s/step: plain | TRL | ours | ours / TRL | asked | ours / plain "
        "| peak MB: plain | TRL | ours | in training | ours / TRL | asked | ours / plain | utilisation |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        setting = row["setting"]
        cells = [setting.shape, POLICIES[setting.policy].title, setting.precision]
        cells += [f"{setting.batch} x {setting.block_size}"]
        cells += [_cell(row[f"{way}_step_seconds"], ".2f") for way in WAYS]
        cells += [_cell(row["step_seconds_over_trl"], ".3f")]
        cells += [_target(row["step_seconds_over_trl"], row["time_target"])]
        cells += [_cell(row["step_seconds_over_plain"], ".3f")]
        cells += [_cell(row[f"{way}_peak_mb"], ",.0f") for way in WAYS]
        cells += [_cell(row["ours_training_peak_mb"], ",.0f"), _cell(row["peak_mb_over_trl"], ".3f")]
        cells += [_target(row["peak_mb_over_trl"], row["memory_target"])]
        cells += [_cell(row["peak_mb_over_plain"], ".3f"), _cell(row["ours_utilisation"], ".2f")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def _target(ratio: float | None, target: float | None) -> str:
    if ratio is None or target is None:
        return ""
    return f"{target:.2f} {'met' if ratio <= target else 'MISSED'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["gpt2"])
    parser.add_argument("--policy", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--precision", nargs="+", choices=["fp32", "bf16"], default=["fp32"])
    parser.add_argument("--batch", type=int, default=16, help="windows a step")
    parser.add_argument("--block_size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=4, help="of each process; the first is not counted")
    parser.add_argument("--batches", type=int, default=1, help="of an epoch; what is kept is met again after it")
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--frozen_dtype", help="of ours, as the recipe's key; left out if not said")
    parser.add_argument("--repeats", type=int, default=1, help="rounds")
    parser.add_argument("--output", type=Path, help="write measurements and table as JSON")
    parser.add_argument("--folder", type=Path, help="where models are made and found again; default: a temporary one")
    parser.add_argument("--setting", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--ours", nargs=argparse.REMAINDER, default=[], help="words for every command of ours; last")
    words = parser.parse_args()
    if words.setting:
        print("\n" + json.dumps(train_with_trl(Setting(**words.setting), words.folder, words.run)))
        return
    numbers = {name: getattr(words, name) for name in ("batch", "block_size", "steps", "batches")}
    settings = [Setting(s, p, c, **numbers) for s in words.shape for p in words.policy for c in words.precision]
    recipe = {"frozen_dtype": words.frozen_dtype} if words.frozen_dtype else {}
    found: list[Measurement] = []
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(words.folder or Path(temporary), recipe, words.ours)
        for turn in range(words.repeats):
            for setting in settings:
                for way in (one for one in WAYS if one in words.only):
                    found.append(bench.measure(setting, way))
                    print(f"round {turn + 1}: {found[-1]}", file=sys.stderr, flush=True)
    rows = list(rows_of(found))
    added = " ".join([*(f"{key}: {value}" for key, value in recipe.items()), *words.ours])
    print(
        f"{words.steps} steps, epochs of {words.batches} batches, {words.repeats} rounds, ours with [{added}]", end=""
    )
    print(f", load {os.getloadavg()[0]:.1f}\n\n{as_table(rows)}")
    if words.output:
        measured = [asdict(one) for one in found]
        table = [{**row, "setting": asdict(row["setting"])} for row in rows]
        content = {"recipe": recipe, "ours": words.ours, "table": table, "measured": measured}
        words.output.write_text(json.dumps(content, indent=2))


if __name__ == "__main__":
    main()
