"""What a reader of a comparison should know beside the table and the verdict, a sentence each."""

from collections.abc import Iterator, Sequence

from partialtune.model.weight_files import Weights
from partialtune.verify.comparison import Comparison
from partialtune.words import counted, joined

SAYS_NOTHING_NEW = {"_name_or_path", "architectures", "dtype", "tie_word_embeddings", "transformers_version"}


def comparison_notes(comparison: Comparison, before: Weights, after: Weights, rounded: Sequence[str]) -> list[str]:
    """The notes on a comparison.

    Args:
        comparison: Without its notes.
        before: Weights of the base.
        after: Weights of the adapted checkpoint.
        rounded: Changed parameters that are those of the base, rounded to the fewer bits they are stored in.
    """
    notes = [*_about_heads(before, after), *_about_heads(after, before)]
    unmoved = [parameter.name for parameter in comparison.unmoved]
    if unmoved:
        notes.append(f"{counted(len(unmoved), 'parameter')} may move and kept every bit: {joined(unmoved, 160)}.")
    if rounded:
        notes.append(
            f"{counted(len(rounded), 'parameter')} of {after.name} equal the base rounded to fewer bits: "
            f"{joined(rounded, 160)}. Save the adapted model in fp32, so that storing changes nothing."
        )
    return [
        *notes,
        *_about_buffers(comparison),
        *_about_unused(before),
        *_about_unused(after),
        *_about_configs(before, after, comparison.changed_config if comparison.claim else ()),
    ]


def _about_heads(tied: Weights, untied: Weights) -> Iterator[str]:
    own = {info.name for info in untied.structure.parameters}
    for name, alias in tied.structure.ties:
        if alias in own:
            yield f"{alias} has a tensor of its own in {untied.name}; compared with {name}, which it is in {tied.name}."


def _about_buffers(comparison: Comparison) -> Iterator[str]:
    changed = comparison.changed_buffers
    if changed and comparison.claim is None:
        yield f"{counted(len(changed), 'buffer')} changed, which no selector speaks of: {joined(changed, 160)}."


def _about_unused(weights: Weights) -> Iterator[str]:
    if weights.unused:
        unused = f"{counted(len(weights.unused), 'tensor')} that the model does not use ({joined(weights.unused, 100)})"
        yield f"{weights.name} holds {unused}: not compared."


def _about_configs(before: Weights, after: Weights, told: Sequence[str]) -> Iterator[str]:
    """Differing keys, but for those that are told as a violation."""
    one, other = before.config.to_dict(), after.config.to_dict()
    keys = sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))
    said = [f"{key} ({one.get(key)} -> {other.get(key)})" for key in keys if key not in SAYS_NOTHING_NEW]
    said = [one for one in said if one not in told]
    if said:
        yield f"config.json differs: {joined(said, 200)}."
