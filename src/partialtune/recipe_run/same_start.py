"""Do all processes of a run start from the same? Told before anything is written, with the node that differs.

On nodes that share no disk each reads its own copy of recipe, text and base. Gradients are averaged over all of them,
whatever they were computed from: a run of two texts or two learning rates would train, pass its audit, and be no run
of its recipe.

    check_same_recipe    the recipe's values and the launcher's settings, before anything is loaded
    check_run_is_here    that no other node holds more of the run than that of process 0, which goes on with it
    check_same_start     what became of them: base, tokenizer, texts, windows, plan
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from partialtune.distributed import (
    decided_by_main,
    differences_from_main,
    end_where_nodes_differ,
    from_all,
    node_name,
    several_nodes,
)
from partialtune.engine.checkpoint_files import checkpoint_step, checkpoints_in
from partialtune.errors import InputError
from partialtune.net.addresses import SOURCE_KEYS
from partialtune.run_folder import has_taken_a_step
from partialtune.scoring.kept_scores import text_basis, tokenizer_basis
from partialtune.training.run_origin import RunOrigin
from partialtune.training.training_data import RunData

logger = logging.getLogger(__name__)

# Keys that each node may have its own value of: where its files lie. What these hold is compared later.
OF_A_NODE = ("output_dir", "resume_from_checkpoint", "model_name_or_path", *SOURCE_KEYS)
LAUNCHER = ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_", "ACCELERATE_DYNAMO_", "FSDP_")
COMPARED_VERSIONS = ("partialtune", "torch", "transformers", "accelerate", "tokenizers", "numpy")


def check_same_recipe(values: Mapping[str, Any]) -> None:
    """Stop where the processes of a run have other settings than the main process. All have to call this.

    Another version of a package is a warning: another result may come of it, and need not.

    Args:
        values: The recipe, flat.

    Raises:
        InputError: On the main process; EndedElsewhere on the others.
    """
    versions = {name: version(name) for name in COMPARED_VERSIONS}
    launcher = {name: value for name, value in os.environ.items() if name.startswith(LAUNCHER)}
    end_where_nodes_differ(
        _settings(values) | launcher,
        "Start every node with the same recipe, the same words on the command line and the same launcher file.",
    )
    for place, found in differences_from_main(versions):
        logger.warning("Versions differ from those of process 0. %s: %s.", place, "; ".join(found))


def _settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """What has to be equal: of sources their names and shares, of the rest the values."""
    named = {"eval_texts": sorted(values.get("eval_texts") or {})}
    replay = {key: value for key, value in (values.get("replay") or {}).items() if key != "text"}
    return {key: value for key, value in values.items() if key not in OF_A_NODE} | named | {"replay": replay}


def check_run_is_here(folder: Path) -> None:
    """Stop where another node's `output_dir` holds a run that is further than the one of process 0.

    Launchers may number nodes in the order in which they arrive. On nodes that share no disk the run would then begin
    anew where it has nothing, as if it had never been. All have to call this.

    Args:
        folder: The recipe's `output_dir`.

    Raises:
        InputError: On the main process; EndedElsewhere on the others.
    """
    steps = [checkpoint_step(checkpoint) for checkpoint in checkpoints_in(folder)]
    reached = max(steps, default=0) if has_taken_a_step(folder) else -1
    of_all = from_all((reached, node_name(), str(folder.absolute())))

    def end() -> None:
        furthest, node, place = max(of_all, key=lambda one: one[0])
        if furthest > reached:
            raise InputError(
                f"output_dir: {place} on {node} holds a run that has reached step {furthest}, and process 0 is on "
                f"{node_name()}, which does not see it. Start so that process 0 is where the run is (torchrun: "
                f"--node_rank, without --rdzv_backend c10d; accelerate: --machine_rank), or name another output_dir. "
                f"Nothing was touched."
            )

    decided_by_main(end)


def check_same_start(own: RunOrigin | None, data: RunData, tokenizer: PreTrainedTokenizerBase) -> None:
    """Stop where a node has read another base, tokenizer or text than the main process. All have to call this.

    Args:
        own: What this process would begin with; None where it is not the first of its node.
        data: Texts and windows, as this process has them.
        tokenizer: Likewise.

    Raises:
        InputError: On the main process; EndedElsewhere on the others.
    """
    if not several_nodes():  # those of one node have read the same files
        return
    end_where_nodes_differ(
        {} if own is None else _facts(own, data, tokenizer),
        "Give every node the same files: copy those of process 0, or name the base by its Hub id with a commit "
        "(model_revision) and the text by its address.",
    )


def _facts(own: RunOrigin, data: RunData, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What has to be equal, by the words of the message; a digest where the values say nothing to a reader."""
    base = own.base
    return {
        "base": base.sha256,
        "base: config.json": base.config,
        "tokenizer": _digest(tokenizer_basis(tokenizer)),
        "text": {f"source {number}": source.sha256 for number, source in enumerate(own.text, 1)},
        "windows": own.windows,
        "scored texts": {name: _digest(text_basis(text)) for name, text in data.scored.items()},
        "plan": _digest([[asdict(phase) for phase in own.phases], own.rates, own.sampling, own.new_tokens]),
    }


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
