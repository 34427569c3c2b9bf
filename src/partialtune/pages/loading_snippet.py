"""A finished run -> the lines of Python that load its model and let it write: for the card and the report.

loading_snippet(run, "me/gulliver") -> from transformers import AutoModelForCausalLM, AutoTokenizer ...

A reader pastes them as they are. What transformers loads by itself is loaded by transformers; a delta, and adapters of
a bundled model, which only this package finds, by `partialtune.load`.
"""

import json
from typing import Any

from partialtune.pages.run_files import RunFiles
from partialtune.run_folder import is_delta, read_json

PROMPT = "Once upon a time"  # of a run that compared none
# As `partialtune generate` draws where nothing else is said; `test_generate` compares them.
NEW_TOKENS, SETTINGS = 100, "do_sample=True, temperature=0.8, top_p=0.95"


def loading_snippet(run: RunFiles, place: str, revision: Any = None, variable: str = "repository") -> str:
    """Load the model and its tokenizer, and continue a prompt.

    Args:
        run: Finished.
        place: Where its files are: a Hub id or a folder.
        revision: On the Hub, where it is not main.
        variable: What the place is called in it.
    """
    ours = needs_partialtune(run)
    auto = auto_class(run)
    where = f", revision={_literal(revision)}" if revision else ""
    code = ", trust_remote_code=True" if run.recipe.get("trust_remote_code") else ""
    at = f" + {_literal(f'@{revision}')}" if revision else ""
    imports = (
        ["import partialtune", "from transformers import AutoTokenizer"]
        if ours
        else [f"from transformers import {auto}, AutoTokenizer"]
    )
    model = f"partialtune.load({variable}{at})" if ours else f"{auto}.from_pretrained({variable}{where}{code})"
    return "\n".join(
        [
            *imports,
            "",
            f"{variable} = {_literal(place)}",
            f"model = {model}",
            f"tokenizer = AutoTokenizer.from_pretrained({variable}{where}{code})",
            "",
            f"prompt = {_literal(prompt_of(run))}",
            # an encoder's habit that causal models refuse, and that plain `tokenizers` files keep
            'tokens = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)',
            f"written = model.generate(**tokens, max_new_tokens={new_tokens_of(run)}, {SETTINGS})",
            "print(tokenizer.decode(written[0], skip_special_tokens=True))",
        ]
    )


def needs_partialtune(run: RunFiles) -> bool:
    """Whether transformers alone cannot load the run: a delta, or adapters of a bundled model."""
    return is_delta(run.folder) or (run.adapts and base_is_bundled(run))


def base_is_bundled(run: RunFiles) -> bool:
    """Whether the base came with this package: its folder is another one on each machine."""
    return str(run.recipe.get("model_name_or_path", "")).startswith("builtin:")


def auto_class(run: RunFiles) -> str:
    """The class of transformers' that loads the model."""
    return str(run.record.get("auto_class", "AutoModelForCausalLM"))


def prompt_of(run: RunFiles) -> str:
    """The first prompt that the run compared."""
    prompts = run.evaluation.get("prompts", [])
    return str(prompts[0]["prompt"]) if prompts else PROMPT


def new_tokens_of(run: RunFiles) -> int:
    """How many tokens to write: fewer where a model takes only few, since positions past its last one are an error."""
    try:
        config = read_json(run.folder / "config.json")
    except (OSError, ValueError):  # of adapters
        return NEW_TOKENS
    lengths = [config.get(key) for key in ("max_position_embeddings", "n_positions")]
    context = next((length for length in lengths if isinstance(length, int)), 2 * NEW_TOKENS)
    return min(NEW_TOKENS, max(1, context // 2))


def _literal(value: Any) -> str:
    """A string as Python reads it, in ASCII but for letters: a token may hold half a surrogate pair."""
    text = str(value)
    return json.dumps(text, ensure_ascii=not text.isprintable())
