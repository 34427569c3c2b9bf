"""Write the folder of a finished run as the contract describes it, with GPT-2's names and shapes, without training."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

NOTEBOOK_POLICY = ("embeddings", "final_norm", "head")


def gpt2_parameters(blocks: int, width: int, vocabulary: int, positions: int, untied: bool) -> Iterator[dict[str, Any]]:
    """name, shape, block and component of every tensor of a GPT-2, in the order of `named_parameters()`."""

    def entry(name: str, shape: list[int], component: str, block: int | None = None) -> dict[str, Any]:
        return {"name": name, "shape": shape, "numel": math.prod(shape), "block": block, "component": component}

    yield entry("transformer.wte.weight", [vocabulary, width], "embeddings.tokens")
    yield entry("transformer.wpe.weight", [positions, width], "embeddings.positions")
    inside = {
        "ln_1": ("norms", None),
        "attn.c_attn": ("attention", [width, 3 * width]),
        "attn.c_proj": ("attention", [width, width]),
        "ln_2": ("norms", None),
        "mlp.c_fc": ("mlp", [width, 4 * width]),
        "mlp.c_proj": ("mlp", [4 * width, width]),
    }
    for block in range(blocks):
        for module, (component, shape) in inside.items():
            yield entry(f"transformer.h.{block}.{module}.weight", shape or [width], component, block)
            yield entry(f"transformer.h.{block}.{module}.bias", [(shape or [width])[-1]], component, block)
    for kind in ("weight", "bias"):
        yield entry(f"transformer.ln_f.{kind}", [width], "final_norm")
    if untied:
        yield entry("lm_head.weight", [vocabulary, width], "head")


def notebook_policy(parameter: Mapping[str, Any]) -> bool:
    """Embeddings, final norm and head train, the blocks are frozen."""
    return parameter["block"] is None


def unit(text: str) -> float:
    """A number in [0, 1) that belongs to `text`: the same in every run."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def delta_at(parameter: Mapping[str, Any], step: int, steps: int) -> tuple[float, float, float]:
    """(L2, relative, largest) change of a trainable parameter: grows with the root of the step."""
    norm = 0.14 * math.sqrt(parameter["numel"])
    scale = {"embeddings.tokens": 0.012, "embeddings.positions": 0.004, "mlp": 0.006, "attention": 0.005}
    depth = 1 + (parameter["block"] or 0) / 12
    final = scale.get(parameter["component"], 0.0009) * depth * (0.7 + 0.6 * unit(parameter["name"]))
    relative = final * math.sqrt(step / steps)
    return norm * relative, relative, 6 * norm * relative / math.sqrt(parameter["numel"])


def scores(loss: float, tokens: int, tokens_per_byte: float, accuracy: float) -> dict[str, Any]:
    return {
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else None,
        "bits_per_byte": loss / math.log(2) * tokens_per_byte,
        "next_token_accuracy": accuracy,
        "top5_accuracy": min(1.0, accuracy * 1.9),
        "tokens": tokens,
        "bytes": round(tokens / tokens_per_byte),
    }


def next_tokens(prompt: str, odd_token: str, after: bool) -> list[dict[str, Any]]:
    words = [" the", " a", " my", "\n", " his", odd_token, " that", ",", " I", " it"]
    order = (
        words if not after else [words[2], words[0], " our", words[8], *words[5:7], words[1], words[4], words[7], '"']
    )
    weights = [0.21 / (rank + 1) * (0.8 + 0.4 * unit(prompt + str(after) + str(rank))) for rank in range(10)]
    return [
        {"token": token, "id": 262 + 7 * rank, "probability": weight}
        for rank, (token, weight) in enumerate(zip(order, sorted(weights, reverse=True), strict=True))
    ]


def prompt_entries(prompts: list[str], odd_token: str) -> list[dict[str, Any]]:
    return [
        {
            "prompt": prompt,
            "before": next_tokens(prompt, odd_token, after=False),
            "after": next_tokens(prompt, odd_token, after=True),
            "kl": 0.2 + 0.5 * unit(prompt),
            "continuation_before": " the first of the year, and the first of the year was the first of the year",
            "continuation_after": " my master, who was pleased to say,\nthat he had never seen a ship of such a size",
        }
        for prompt in prompts
    ]


def insight(parameters: list[dict[str, Any]], prompts: list[str], odd_token: str, held_out: bool) -> dict[str, Any]:
    """`insight.json` of a run: everything that trains has a rank, and the odd token is among those that moved."""
    trained = [parameter for parameter in parameters if parameter["trainable"]]
    words = [" ship", odd_token, " my", "\n", " Majesty", " the"]
    matrices = [
        {
            **{key: parameter[key] for key in ("name", "block", "component", "shape")},
            "matrices": 1,
            "largest_possible": min(parameter["shape"]),
            "effective_rank": min(parameter["shape"]) * (0.3 + 0.4 * unit(parameter["name"])),
            "stable_rank": 1 + 9 * unit(parameter["name"] + " stable"),
        }
        for parameter in trained
        if len(parameter["shape"]) == 2
    ]
    rows = [
        {
            "name": parameter["name"],
            "component": parameter["component"],
            "tokens": parameter["shape"][0],
            "moved": parameter["shape"][0],
            "occurring": 9000,
            "moved_absent": parameter["shape"][0] - 9000,
            "rank_correlation": 0.62,
            "most": [
                {"token": word, "id": 500 + at, "count": 3**at, "l2_delta": 1 / (at + 1), "relative_delta": 0.3 / 2**at}
                for at, word in enumerate(words)
            ],
            "by_count": [
                {"from": 2**at // 2, "to": 2**at - 1, "tokens": 5000 // (at + 1)}
                | {"p10": 0.01, "median": 0.02 + at / 100, "p90": 0.2}
                for at in range(12)
            ],
        }
        for parameter in trained
        if parameter["component"] in ("embeddings.tokens", "head")
    ]  # fmt: skip
    return {
        "effective_ranks": {"matrices": matrices, "left_out": [], "seconds": 2.5},
        "moved_tokens": {"matrices": rows, "seconds": 0.3},
        "learning_curves": {"windows": {"training": 16, "python_docs": 16}, "seconds": 12.0},
        "next_token_shift": next_token_shift(words) if held_out else None,
        "sampled_continuations": {
            "temperature": 1.0,
            "top_p": 0.95,
            "seed": 0,
            "prompts": [
                {"prompt": prompt, "before": f" and {odd_token} the", "after": f" of {odd_token} Blefuscu,\nwho"}
                for prompt in prompts
            ],
        },
    }


def next_token_shift(words: list[str]) -> dict[str, Any]:
    def places(low: float, high: float) -> list[dict[str, Any]]:
        around = {"text_before": "I had the honour\nto be a ", "text_after": " unto his Majesty,"}
        return [
            {
                "window": at,
                "position": 7 * at + 1,
                "before": low / (at + 1),
                "after": high / (at + 1),
                "token": word,
                "id": at,
            }
            | around
            for at, word in enumerate(words)
        ]

    def totals(sign: int) -> list[dict[str, Any]]:
        return [
            {
                "token": word,
                "id": at,
                "occurrences": 9 - at,
                "bits": sign * 900 / (at + 1),
                "before": 0.01,
                "after": 0.05,
            }
            for at, word in enumerate(words)
        ]

    edges = [-12 + step / 2 for step in range(49)]
    counts = [round(900 * math.exp(-(((edge - 0.5) / 2) ** 2))) for edge in edges[:-1]]
    return {
        "windows": 62,
        "positions": sum(counts),
        "rose_share": 0.58,
        "mean_bits": 1.13,
        "histogram": {"edges": edges, "counts": counts},
        "rose": places(0.02, 0.9),
        "fell": places(0.7, 0.1),
        "gained": totals(1),
        "lost": totals(-1),
    }


def log_history(steps: int, held_out: bool, losses: Mapping[int, float]) -> list[dict[str, Any]]:
    """Entries as Trainer writes them; `losses` replaces the loss of some steps."""
    entries = []
    for step in range(1, steps + 1):
        fall = 5.38 - 0.85 * (1 - math.exp(-3 * step / steps))
        loss = losses.get(step, fall + 0.3 * (unit(f"loss {step}") - 0.5))
        epoch = step / steps
        entries.append(
            {"epoch": epoch, "grad_norm": 1.2, "learning_rate": 5e-5 * (1 - epoch), "loss": loss, "step": step}
        )
        if step % max(1, steps // 10) == 0:
            curves = {"training": fall * 0.35, "python_docs": 1.744 + 0.05 * epoch}
            if held_out:
                entries.append({"epoch": epoch, "eval_loss": fall + 0.05, "eval_runtime": 1.0, "step": step})
                curves["validation"] = (fall + 0.05) * 0.35
            entries.append(
                {"epoch": epoch, **{f"bits_per_byte/{k}": value for k, value in curves.items()}, "step": step}
            )
    return [*entries, {"epoch": 1.0, "step": steps, "total_flos": 1.0e15, "train_loss": 4.8, "train_runtime": 900.0}]


def write_run_folder(
    folder: Path,
    *,
    blocks: int = 12,
    width: int = 768,
    steps: int = 123,
    selectors: tuple[str, ...] | None = NOTEBOOK_POLICY,
    trains: Callable[[Mapping[str, Any]], bool] = notebook_policy,
    untied: bool = False,
    held_out: bool = True,
    changed: tuple[str, ...] = (),
    unmoved: tuple[str, ...] = (),
    losses: Mapping[int, float] | None = None,
    odd_token: str = " of",
    source: str = "https://www.gutenberg.org/cache/epub/829/pg829.txt",
    prompts: tuple[str, ...] = ("I was surgeon to a ship", "The Emperor of", "Once upon a time"),
    recipe: Mapping[str, Any] | None = None,
    record: Mapping[str, Any] | None = None,
) -> Path:
    """Write a run's folder (without weights) and return it.

    Args:
        folder: Made where it is missing.
        blocks, width: Shape of the GPT-2; the default is the 124M one.
        steps: Optimizer steps of the run; deltas are reported every 10 and at the end.
        selectors, trains: What the recipe says that trains, and which parameters that is.
        untied: The head has a matrix of its own.
        held_out: The run scored held-out text; False is `validation_share: 0`.
        changed: Frozen parameters which changed all the same: the audit has failed.
        unmoved: Trainable parameters which never moved: a warning.
        losses: step -> training loss, where it is to be another than the usual one.
        odd_token, source, prompts: What comes from texts and tokens.
        recipe, record: Further keys of `recipe.yaml`, and of the mapping under its key `run`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parameters = list(gpt2_parameters(blocks, width, vocabulary=50257, positions=1024, untied=untied))
    for parameter in parameters:
        parameter["trainable"] = trains(parameter)
        parameter["selector"] = (selectors or ("all",))[0] if parameter["trainable"] else None
        moved = parameter["name"] in changed or (parameter["trainable"] and parameter["name"] not in unmoved)
        parameter["sha256_before"] = digest(parameter["name"])
        parameter["sha256_after"] = digest(parameter["name"] + " after") if moved else parameter["sha256_before"]
    trainable = [parameter["name"] for parameter in parameters if parameter["trainable"]]
    lines = list(delta_lines(parameters, steps, changed, unmoved))
    at_the_end = [line["l2_delta"] for line in lines if line["step"] == steps and line["trainable"]]
    held_out_scores = {"before": scores(5.385, 12750, 0.243, 0.241), "after": scores(4.6, 12750, 0.243, 0.291)}
    files = {
        "freeze_plan.json": {
            "total_parameters": sum(parameter["numel"] for parameter in parameters),
            "trainable_parameters": sum(parameter["numel"] for parameter in parameters if parameter["trainable"]),
            "backward_from": trainable[0],
            "head": "untied" if untied else "tied",
            "selectors": list(selectors or ("all",)),
            "ties": [] if untied else [["transformer.wte.weight", "lm_head.weight"]],
            "phases": [{"from_step": 0, "backward_from": trainable[0], "trainable": trainable}],
            "parameters": parameters,
        },
        "audit.json": {
            "passed": not changed,
            "frozen": {
                "parameters": len(parameters) - len(trainable),
                "changed": list(changed),
                "l2_delta": None if changed else 0.0,
            },
            "trainable": {
                "parameters": len(trainable),
                "unmoved": [{"name": name, "reason": "never had a gradient"} for name in unmoved],
                "below_precision": [],
                "not_in_optimizer": [],
                "l2_delta": math.hypot(*at_the_end),
            },
        },
        "evaluation.json": {
            **({"validation": held_out_scores} if held_out else {}),
            "training": {"before": scores(5.31, 65280, 0.243, 0.243), "after": scores(4.43, 65280, 0.243, 0.304)},
            "python_docs": {"before": scores(3.9, 50000, 0.31, 0.4), "after": scores(4.01, 50000, 0.31, 0.391)},
            "prompts": prompt_entries(list(prompts), odd_token),
        },
        "insight.json": insight(parameters, list(prompts), odd_token, held_out),
        "performance.json": {
            "median_step_seconds": 24.2,
            "tokens_per_second": 169.3,
            "peak_memory_mb": 8033.4,
            "flops_per_step": 2.35e12,
            "utilisation": None,
            "time_shares": {"data": 0.001, "forward": 0.391, "backward": 0.57, "optimizer": 0.03, "callbacks": 0.008},
            "prefix_cache": "off",
        },
        "trainer_state.json": {"global_step": steps, "log_history": log_history(steps, held_out, losses or {})},
    }  # fmt: skip
    for name, content in files.items():
        allow_nan = name == "trainer_state.json"  # Trainer's own file may hold NaN, ours never do
        (folder / name).write_text(json.dumps(content, indent=2, allow_nan=allow_nan), encoding="utf-8")
    (folder / "weight_deltas.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    read_as = {"encoding": "utf-8-sig", "cleaning": "gutenberg"}
    values = {
        "model_name_or_path": "openai-community/gpt2",
        "text": [source],
        "block_size": 256,
        **({"trainable": list(selectors)} if selectors else {"method": "full"}),
        "output_dir": "outputs/gpt2-gulliver",
        "max_steps": steps,
        "per_device_train_batch_size": 16,
        "learning_rate": 5e-5,
        "weight_decay": 0.01,
        **(recipe or {}),
        "run": {
            "versions": {"partialtune": "0.1.0", "python": "3.11.7", "torch": "2.13.0", "transformers": "5.23.0"},
            "precision": "fp32",
            "processes": 1,
            "device": "cpu",
            "windows": {"training": 560, "held_out": 62},
            "base_commit": "607a30d783dfa663caf39e06633721c8d4cfcd7e",
            "sources": [{"name": source, "sha256": digest(source), "bytes": 606_137, **read_as}],
            **(record or {}),
        },
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")
    (folder / "exit.json").write_text('{"code": 0, "reason": "done"}', encoding="utf-8")
    return folder


def delta_lines(
    parameters: list[dict[str, Any]], steps: int, changed: tuple[str, ...], unmoved: tuple[str, ...]
) -> Iterator[dict[str, Any]]:
    """Lines of `weight_deltas.jsonl`. How far a frozen parameter moved is unknown: only its digest is kept."""
    for step in sorted({*range(10, steps + 1, 10), steps}):
        for parameter in parameters:
            place = {key: parameter[key] for key in ("name", "block", "component", "trainable")}
            l2, relative, largest = 0.0, 0.0, 0.0
            if parameter["name"] in changed:
                l2 = relative = largest = None
            elif parameter["trainable"] and parameter["name"] not in unmoved:
                l2, relative, largest = delta_at(parameter, step, steps)
            yield {"step": step, **place, "l2_delta": l2, "relative_delta": relative, "max_abs_delta": largest}
