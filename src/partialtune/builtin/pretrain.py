"""Pretrain a tiny GPT-2: a folder of Project Gutenberg books -> a model folder that `from_pretrained` loads.

    python -m partialtune.builtin.pretrain BOOKS_FOLDER OUT --minutes 65

`builtin:lilliput` was made with this script; its README.md holds the command and what came out. The folder OUT gets
16-bit weights, configuration, byte-level BPE tokenizer, metrics.json (settings, loss curve, scores) and README.md
(the model card, filled from metrics.json). With --steps the result depends on the seed and the number of threads
alone; with --minutes the learning rate follows the clock, so that the run ends in time on a busy machine too.
"""

import argparse
import itertools
import json
import math
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jinja2
import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from partialtune.cleaning import clean_gutenberg
from partialtune.errors import TextError
from partialtune.evaluation import score_text, scored_text
from partialtune.windows import tokenize_text

END_OF_TEXT = "<|endoftext|>"
TOKENS_AT_ONCE = 4096 + 512  # in one forward pass: activations that stay near the caches are faster than a larger batch
STATE_SECONDS = 120  # between two states kept for --state
PROMPTS = ("It was a dark", "My dear", "“I do not know,” said")

# What BPE may merge: a contraction, a word, up to three digits, a run of punctuation (each with one space before it),
# a run of line breaks, other white space. No piece goes on into white space, so a text cut before white space gives
# the same tokens as the whole.
PIECES = r"['’](?:s|t|re|ve|m|ll|d)(?!\p{L})| ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\n+|\s+(?!\S)|\s+"


# ------------------------------------------------------------------------------------------------------- books


def read_books(folder: Path, held_out: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Read every .txt file of a folder (UTF-8), cleaned: ({file stem: text} to train on, {file stem: text} held out).

    Raises:
        TextError: If the folder has no book to train on, or a held-out book is not there.
    """
    books = {path.stem: clean_gutenberg(path.read_text("utf-8-sig")).text for path in sorted(folder.glob("*.txt"))}
    absent = [name for name in held_out if name not in books]
    if absent:
        raise TextError(f"Held-out book {absent[0]!r} is not among the .txt files of {folder}. Name one without .txt.")
    training = {name: tidy(text) for name, text in books.items() if name not in held_out}
    if not training:
        raise TextError(f"{folder} has no .txt file to train on. Give a folder of Project Gutenberg books.")
    return training, {name: books[name] for name in held_out}


def tidy(text: str) -> str:
    """Drop what teaches a small model nothing: table-like lines (two gaps of 3+ spaces or dots) and runs of spaces."""
    lines = [line for line in text.split("\n") if len(re.findall(r"\S(?: {3,}|(?: ?\.){4,} ?)(?=\S)", line)) < 2]
    text = "\n".join(re.sub(r"(?<=\S)[ \t]{2,}", " ", line).rstrip() for line in lines)
    return re.sub(r"\n{4,}", "\n\n\n", text).strip() + "\n"


def book_title(path: Path) -> str:
    """`Title, by Author` from a Project Gutenberg header, or the file's name."""
    head = path.read_text(encoding="utf-8-sig", errors="replace")[:4000]
    found = [re.search(rf"^{key}:\s*(.+)$", head, re.MULTILINE) for key in ("Title", "Author")]
    return ", by ".join(match.group(1).strip() for match in found if match) or path.stem


# --------------------------------------------------------------------------------------------------- tokenizer


def train_tokenizer(texts: Sequence[str], vocab_size: int, context: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over `texts`: any Unicode text encodes, and decodes to itself."""
    bpe = Tokenizer(models.BPE())
    pieces = pre_tokenizers.Split(Regex(PIECES), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pieces, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet)
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


# ------------------------------------------------------------------------------------------ model and optimizer


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


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal, for the weight matrices of the blocks.

    Jordan et al. 2024, https://kellerjordan.github.io/posts/muon, with the step size of Liu et al. 2025
    (arXiv:2502.16982). `torch.optim.Muon` iterates in bfloat16, which is tens of times slower on a CPU without it.
    """

    def __init__(self, params: list[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                buffer = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                buffer.lerp_(weight.grad, 1 - group["momentum"])
                update = weight.grad.lerp(buffer, group["momentum"])  # Nesterov
                parts = 3 if weight.shape[1] == 3 * weight.shape[0] else 1  # query, key and value are three matrices
                update = torch.cat([orthogonal(part) for part in update.chunk(parts, dim=1)], dim=1)
                scale = 0.2 * math.sqrt(max(weight.shape[0], weight.shape[1] // parts))  # RMS of an AdamW update
                weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)


def orthogonal(matrix: Tensor) -> Tensor:
    """Nearest orthogonal matrix, roughly: five quintic Newton-Schulz iterations (coefficients of Jordan et al.)."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = wide / (wide.norm() + 1e-7)
    for _ in range(5):
        gram = wide @ wide.T
        wide = 3.4445 * wide + (-4.7750 * gram + 2.0315 * gram @ gram) @ wide
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.T


def build_optimizers(model: nn.Module, learning_rate: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices; AdamW for embeddings (with the tied head), norms and biases."""
    matrices = [weight for name, weight in model.named_parameters() if ".h." in name and weight.ndim == 2]
    embeddings = [weight for name, weight in model.named_parameters() if ".h." not in name and weight.ndim == 2]
    vectors = [weight for weight in model.parameters() if weight.ndim < 2]
    groups = [{"params": embeddings, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)
    return [Muon(matrices, learning_rate, weight_decay), adamw]


# ---------------------------------------------------------------------------------------------------- training


def window_batches(stream: Tensor, context: int, batch: int, seed: int, first: int) -> Iterator[Tensor]:
    """Batches (batch, context + 1) for ever, from batch number `first` on; every epoch cuts and shuffles anew.

    Raises:
        TextError: If the stream, shape (n,), is shorter than a batch.
    """
    per_epoch = (len(stream) - 1 - context) // context // batch
    if per_epoch < 1:
        raise TextError(
            f"The books have {len(stream):,} tokens, a batch needs {(batch + 1) * context + 1:,}. "
            f"Add books or lower --batch_tokens."
        )
    for number in itertools.count(first):
        epoch, position = divmod(number, per_epoch)
        if position == 0 or number == first:
            random = np.random.default_rng((seed, epoch))
            starts = random.integers(context) + context * random.permutation(per_epoch * batch)
        rows = starts[position * batch : (position + 1) * batch]
        yield torch.stack([stream[row : row + context + 1] for row in rows])


def rate_at(progress: float, step: int, warmup: int = 100) -> float:
    """Share of the peak learning rate: linear warm-up over `warmup` steps, then linear to 0 at progress 1."""
    return min(1.0, (step + 1) / warmup) * max(0.0, 1.0 - progress)


def training_step(model: nn.Module, batch: Tensor) -> float:
    """Accumulate the gradient of the mean loss over a batch (B, T + 1); the loss in nats."""
    total = 0.0
    for part in batch.split(max(1, TOKENS_AT_ONCE // batch.shape[1])):
        logits = model(input_ids=part[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum") / batch[:, 1:].numel()
        loss.backward()
        total += loss.item()
    return total


def train(model: nn.Module, stream: Tensor, options: argparse.Namespace) -> dict:
    """Train until --steps or --minutes is used up; goes on from --state where that file exists.

    Returns:
        steps, tokens, minutes, and curve: [step, tokens, mean training loss in nats since the entry before].
    """
    optimizers = build_optimizers(model, options.learning_rate, options.weight_decay)
    done = {"step": 0, "seconds": 0.0, "curve": []}
    if options.state and options.state.exists():
        done = load_state(options.state, model, optimizers)
    step, curve, losses, saved = done["step"], done["curve"], [], time.monotonic()
    began = time.monotonic() - done["seconds"]
    batch = options.batch_tokens // options.context
    bar = tqdm(total=options.steps, initial=step, unit="step", mininterval=1)
    for windows in window_batches(stream, options.context, batch, options.seed, step):
        elapsed = time.monotonic() - began
        progress = step / options.steps if options.steps else elapsed / (60 * options.minutes)
        if progress >= 1:
            break
        losses.append(training_step(model, windows))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = options.learning_rate * rate_at(progress, step)
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        bar.update()
        bar.set_postfix(loss=f"{np.mean(losses[-50:]):.3f}", done=f"{progress:.1%}")
        if step % 100 == 0:
            curve.append([step, step * windows[:, 1:].numel(), round(float(np.mean(losses)), 4)])
            losses = []
        if options.state and time.monotonic() - saved > STATE_SECONDS:
            saved = time.monotonic()
            save_state(options.state, model, optimizers, step, saved - began, curve)
    bar.close()
    return {
        "steps": step,
        "tokens": step * batch * options.context,
        "minutes": round((time.monotonic() - began) / 60, 2),
        "curve": curve,
    }


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


# ------------------------------------------------------------------------------------- evaluation and model folder


def save_model(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, out: Path) -> str:
    """Write weights in the 16-bit format that loses less, configuration and tokenizer; return the format's name."""
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    lost = {
        kind: sum((weight - weight.to(kind)).double().square().sum().item() for weight in weights.values())
        for kind in (torch.float16, torch.bfloat16)
    }
    kind = min(lost, key=lost.get)
    model.to(kind).save_pretrained(out)
    tokenizer.save_pretrained(out)
    config = json.loads((out / "config.json").read_text())
    config["dtype"] = "float32"  # what to compute in: `from_pretrained` widens the 16-bit file, which is exact
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return str(kind).removeprefix("torch.")


def evaluate_folder(out: Path, held_out: dict[str, str], titles: dict[str, str], context: int) -> dict:
    """Bits per byte of the stored (rounded) model on the held-out books, by block_size, and what it writes."""
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(out)
    scores = []
    for name, text in held_out.items():
        ids, bits = tokenize_text(text, tokenizer), {}
        for block_size in sorted({min(256, context), context}):
            scored = scored_text([text], [ids], block_size)
            bits[str(block_size)] = round(score_text(model, scored, 16, titles[name])["bits_per_byte"], 4)
        scores.append({"book": titles[name], "bytes": len(text.encode()), "bits_per_byte": bits})
    samples = []
    for prompt in PROMPTS:
        for style in ({"do_sample": False}, {"do_sample": True, "temperature": 0.8, "top_k": 40}):
            torch.manual_seed(0)
            prompt_ids = tokenizer(prompt, return_tensors="pt")
            written = model.generate(**prompt_ids, max_new_tokens=80, pad_token_id=tokenizer.eos_token_id, **style)
            samples.append({"prompt": prompt, "sampled": style["do_sample"], "text": tokenizer.decode(written[0])})
    return {"held_out": scores, "samples": samples}


def write_card(out: Path) -> None:
    """README.md from metrics.json and the template beside this module."""
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    template = (Path(__file__).parent / "card.md.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    card = environment.from_string(template).render(metrics)
    (out / "README.md").write_text(card, encoding="utf-8")


# ---------------------------------------------------------------------------------------------------- command


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m partialtune.builtin.pretrain", description=__doc__.split("\n")[0])
    parser.add_argument("books", type=Path, help="folder of .txt files as Project Gutenberg serves them")
    parser.add_argument("out", type=Path, help="folder for the model; files of an earlier model there are replaced")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--steps", type=int, help="optimizer steps (repeatable to the bit)")
    length.add_argument("--minutes", type=float, help="time for training, on the clock")
    parser.add_argument("--held_out", nargs="*", default=[], help="books to keep out and score, without .txt")
    parser.add_argument("--vocab_size", type=int, default=4096)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--context", type=int, default=512, help="tokens per window and positions of the model")
    parser.add_argument("--batch_tokens", type=int, default=4096, help="tokens per optimizer step")
    parser.add_argument("--learning_rate", type=float, default=5e-3, help="peak")
    parser.add_argument("--weight_decay", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--state", type=Path, help="file that keeps the state of training; an existing one is resumed")
    return parser


def main(words: Sequence[str] | None = None) -> None:
    parser = command_line()
    options = parser.parse_args(words)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)

    training, held_out = read_books(options.books, options.held_out)
    tokenizer = train_tokenizer(list(training.values()), options.vocab_size, options.context)
    books = [np.append(tokenize_text(text, tokenizer), tokenizer.eos_token_id) for text in training.values()]
    stream = torch.from_numpy(np.concatenate(books)).long()
    model = build_model(len(tokenizer), options.width, options.depth, options.heads, options.context)
    print(f"{len(training)} books, {len(stream):,} tokens; {model.num_parameters():,} parameters")

    run = train(model, stream, options)
    stored_as = save_model(model, tokenizer, options.out)

    settings = {name: value for name, value in vars(options).items() if name not in ("books", "out", "state")}
    said = {name: value for name, value in settings.items() if value != parser.get_default(name)}
    titles = {name: book_title(options.books / f"{name}.txt") for name in [*training, *held_out]}
    metrics = {
        "command": " ".join(
            f"--{name} {' '.join(value) if name == 'held_out' else value}" for name, value in said.items()
        ),
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
    (options.out / "metrics.json").write_text(json.dumps(metrics, indent=2, ensure_ascii=False) + "\n", "utf-8")
    write_card(options.out)
    for score in metrics["held_out"]:
        print(score["book"], score["bits_per_byte"])


if __name__ == "__main__":
    main()
