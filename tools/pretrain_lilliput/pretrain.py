"""Pretrain a tiny GPT-2: a folder of Project Gutenberg books -> a model folder that `from_pretrained` loads.

    python tools/pretrain_lilliput/pretrain.py BOOKS_FOLDER OUT --minutes 75 --held_out pg550

`builtin:lilliput` was made with this script; its README.md holds the command and what came out. The folder OUT gets
16-bit weights, configuration, byte-level BPE tokenizer, metrics.json (settings, loss curve, scores) and README.md
(the model card, filled from metrics.json). With --steps the result depends on the seed and the number of threads
alone; with --minutes the learning rate follows the clock, so that the run ends in time on a busy machine too.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel

from books import book_title, read_books, train_tokenizer, window_batches
from model_folder import evaluate_folder, save_model, write_card
from muon import Muon
from partialtune.errors import InputError
from partialtune.text.tokenizing import tokenize_text

TOKENS_AT_ONCE = 4096 + 512  # in one forward pass: activations that stay near the caches are faster than a larger batch
STATE_SECONDS = 120  # between two states kept for --state
WARMUP_STEPS = 100


def build_model(vocab_size: int, width: int, depth: int, heads: int, context: int) -> GPT2LMHeadModel:
    """A GPT-2 with random weights. The fused tanh GELU is GPT-2's own function, computed faster."""
    config = GPT2Config(
        vocab_size=vocab_size,
        n_embd=width,
        n_layer=depth,
        n_head=heads,
        n_positions=context,
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=True,
    )
    return GPT2LMHeadModel(config)


def build_optimizers(model: nn.Module, learning_rate: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices; AdamW for embeddings (with the tied head), norms and biases."""
    matrices = [weight for name, weight in model.named_parameters() if ".h." in name and weight.ndim == 2]
    embeddings = [weight for name, weight in model.named_parameters() if ".h." not in name and weight.ndim == 2]
    vectors = [weight for weight in model.parameters() if weight.ndim < 2]
    groups = [{"params": embeddings, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)
    return [Muon(matrices, learning_rate, weight_decay), adamw]


# ---------------------------------------------------------------------------------------------------- training


def rate_at(progress: float, step: int) -> float:
    """Share of the peak learning rate: linear warm-up over WARMUP_STEPS, then linear to 0 at progress 1."""
    return min(1.0, (step + 1) / WARMUP_STEPS) * max(0.0, 1.0 - progress)


def training_step(model: nn.Module, batch: Tensor) -> float:
    """Accumulate the gradient of the mean loss over a batch (B, T + 1); the loss in nats."""
    total = 0.0
    for part in batch.split(max(1, TOKENS_AT_ONCE // batch.shape[1])):
        logits = model(input_ids=part[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum") / batch[:, 1:].numel()
        loss.backward()
        total += loss.item()
    return total


def apply_gradients(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], learning_rate: float) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        optimizer.zero_grad()


def train(
    model: nn.Module,
    stream: Tensor,
    context: int,
    batch_tokens: int,
    learning_rate: float,
    weight_decay: float,
    seed: int,
    steps: int | None = None,
    minutes: float | None = None,
    state: Path | None = None,
) -> dict:
    """Train until `steps` or `minutes` is used up (one of them is given); go on from `state` where that file exists.

    Args:
        model: Trained in place.
        stream: Token ids of all books, shape (n,).
        context: Tokens per window.
        batch_tokens: Tokens per step.
        learning_rate: Peak rate of both optimizers.
        weight_decay: On matrices and embeddings.
        seed: Of the windows' order.
        steps: Length of the run in steps, or
        minutes: on the clock, those before an interruption included.
        state: File for all that is needed to go on, written every STATE_SECONDS.

    Returns:
        `steps`, `tokens`, `minutes` of the whole run; `curve`: [step, tokens, mean loss in nats since the last entry].
    """
    optimizers = build_optimizers(model, learning_rate, weight_decay)
    done = (
        load_state(state, model, optimizers) if state and state.exists() else {"step": 0, "seconds": 0.0, "curve": []}
    )
    step, curve, losses, saved = done["step"], done["curve"], [], time.monotonic()
    began = saved - done["seconds"]
    bar = tqdm(total=steps, initial=step, unit="step", mininterval=1)
    for windows in window_batches(stream, context, batch_tokens // context, seed, step):
        progress = step / steps if steps else (time.monotonic() - began) / (60 * minutes)
        if progress >= 1:
            break
        losses.append(training_step(model, windows))
        apply_gradients(model, optimizers, learning_rate * rate_at(progress, step))
        step += 1
        bar.update()
        bar.set_postfix(loss=f"{np.mean(losses[-50:]):.3f}", done=f"{progress:.1%}", refresh=False)
        if step % 100 == 0:
            curve.append([step, step * windows[:, 1:].numel(), round(float(np.mean(losses)), 4)])
            losses = []
        if state and time.monotonic() - saved > STATE_SECONDS:
            saved = time.monotonic()
            save_state(state, model, optimizers, step, saved - began, curve)
    bar.close()
    spent = (time.monotonic() - began) / 60
    return {"steps": step, "tokens": step * windows[:, 1:].numel(), "minutes": round(spent, 2), "curve": curve}


def save_state(path: Path, model: nn.Module, optimizers: list, step: int, seconds: float, curve: list) -> None:
    """Write what `train` needs to go on: aside first, so that a kill leaves the last one whole."""
    state = {"model": model.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in optimizers]}
    aside = path.with_suffix(".tmp")
    torch.save(state | {"step": step, "seconds": seconds, "curve": curve}, aside)
    aside.replace(path)


def load_state(path: Path, model: nn.Module, optimizers: list) -> dict:
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    for optimizer, values in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(values)
    return state


# ---------------------------------------------------------------------------------------------------- command


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python tools/pretrain_lilliput/pretrain.py", description=__doc__.split("\n")[0]
    )
    parser.add_argument("books", type=Path, help="folder of .txt files as Project Gutenberg serves them")
    parser.add_argument("out", type=Path, help="folder for the model; files of an earlier model there are replaced")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--steps", type=int, help="optimizer steps (repeatable to the bit)")
    length.add_argument("--minutes", type=float, help="time for training, on the clock")
    parser.add_argument("--held_out", nargs="*", default=[], help="books to keep out and score, without .txt")
    parser.add_argument("--vocab_size", type=int, default=4096)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--context", type=int, default=512, help="tokens per window and positions of the model")
    parser.add_argument("--batch_tokens", type=int, default=4096, help="tokens per optimizer step")
    parser.add_argument("--learning_rate", type=float, default=5e-3, help="peak")
    parser.add_argument("--weight_decay", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--state", type=Path, help="file that keeps the state of training; an existing one is resumed")
    return parser


def said_on_the_command_line(parser: argparse.ArgumentParser, settings: dict) -> str:
    """The options that differ from their defaults, as they are typed."""
    said = {name: value for name, value in settings.items() if value != parser.get_default(name)}
    return " ".join(f"--{name} {' '.join(value) if name == 'held_out' else value}" for name, value in said.items())


def main(words: Sequence[str] | None = None) -> None:
    parser = command_line()
    options = parser.parse_args(words)
    options.out.mkdir(parents=True, exist_ok=True)  # what cannot be written shows now, not after an hour
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)

    training, held_out = read_books(options.books, options.held_out)
    tokenizer = train_tokenizer(list(training.values()), options.vocab_size, options.context)
    books = [np.append(tokenize_text(text, tokenizer), tokenizer.eos_token_id) for text in training.values()]
    stream = torch.from_numpy(np.concatenate(books)).long()
    model = build_model(len(tokenizer), options.width, options.depth, options.heads, options.context)
    print(f"{len(training)} books, {len(stream):,} tokens; {model.num_parameters():,} parameters")

    schedule = {"steps": options.steps, "minutes": options.minutes, "state": options.state}
    optimization = {"learning_rate": options.learning_rate, "weight_decay": options.weight_decay, "seed": options.seed}
    run = train(model, stream, options.context, options.batch_tokens, **optimization, **schedule)
    stored_as = save_model(model, tokenizer, options.out)

    settings = {name: value for name, value in vars(options).items() if name not in ("books", "out", "state")}
    titles = {name: book_title(options.books / f"{name}.txt") for name in [*training, *held_out]}
    metrics = {
        "command": said_on_the_command_line(parser, settings),
        "settings": settings,
        "parameters": model.num_parameters(),
        "stored_as": stored_as,
        "model_bytes": (options.out / "model.safetensors").stat().st_size,
        "training_books": [titles[name] for name in training],
        "training_bytes": sum(len(text.encode()) for text in training.values()),
        "training_tokens": len(stream),
        "run": run,
        **evaluate_folder(options.out, held_out, titles, options.context),
    }
    write_card(options.out, metrics)
    for score in metrics["held_out"]:
        print(score["book"], score["bits_per_byte"])


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
