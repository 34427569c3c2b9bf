"""A trained model -> the folder that ships: 16-bit weights, tokenizer, scores on held-out books, model card."""

import json
from pathlib import Path

import jinja2
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel, PreTrainedTokenizerFast

from partialtune.scoring.evaluation import score_text, scored_text
from partialtune.text.tokenizing import tokenize_text

PROMPTS = ("It was a dark", "My dear", "“I do not know,” said")


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
            end = {"max_length": min(100, context), "pad_token_id": tokenizer.eos_token_id}
            written = model.generate(**prompt_ids, **end, **style)
            samples.append({"prompt": prompt, "sampled": style["do_sample"], "text": tokenizer.decode(written[0])})
    return {"held_out": scores, "samples": samples}


def write_card(out: Path, metrics: dict) -> None:
    """metrics.json, and README.md from it by the template beside this module."""
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2, ensure_ascii=False) + "\n", "utf-8")
    template = (Path(__file__).parent / "card.md.j2").read_text("utf-8")
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    (out / "README.md").write_text(environment.from_string(template).render(metrics), "utf-8")
