"""Bytes that a frozen parameter takes while training: held in 16, 8 and 4 bits.

    python tests/benchmarks/frozen_bytes.py [--shape llama-1.1b]

The model has random weights; its last two blocks and the final norm train. Bytes are those of the tensors that hold
what is frozen, scales of packed ones too; embeddings, head and norms count, which are never packed. Needs bitsandbytes.
"""

import argparse
import tempfile
from pathlib import Path

from random_models import SHAPES, write_model_and_text

KINDS = {"16 bits": None, "int8": "int8", "nf4": "nf4"}


def bytes_a_parameter(folder: Path, kind: str | None) -> float:
    """Bytes of what is frozen over the number of its values, once the plan is applied."""
    from partialtune import apply_plan, plan_freeze
    from partialtune.model.loading import load_config, load_model
    from partialtune.model.packed_weights import PackedWeight
    from partialtune.model.parameters import named_weights

    model = load_model(str(folder), load_config(str(folder)), narrow=True)
    plan = plan_freeze(model, ["blocks[-2:]", "final_norm"], frozen_dtype="auto", frozen_quantization=kind)
    apply_plan(model, plan)
    frozen = set(plan.frozen)
    held = [parameter for name, parameter in named_weights(model) if name in frozen]
    stored = sum(one.stored if isinstance(one, PackedWeight) else one.nbytes for one in held)
    return stored / sum(one.numel for one in plan.parameters if not one.trainable)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-1.1b")
    words = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_model_and_text(SHAPES[words.shape], 1024, Path(folder))
        print("| frozen weights | bytes a frozen parameter |\n|---|---|")
        for title, kind in KINDS.items():
            print(f"| {title} | {bytes_a_parameter(Path(folder), kind):.2f} |", flush=True)


if __name__ == "__main__":
    main()
