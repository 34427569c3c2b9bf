"""Two checkpoints -> which parameters moved, by how much, and whether only those that may.

What may move is what selectors choose, or else what the `freeze_plan.json` beside the adapted model trains; the plan's
digests of base and result are then checked too. Values are compared widened: a 16-bit base equals its fp32 copy.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from partialtune.errors import ModelError
from partialtune.model.checkpoint_folder import PLAN_FILE, checkpoint_folder, holds_adapters
from partialtune.model.config_keys import config_differences
from partialtune.model.digests import digest, digest_of_other_rows, same_bits
from partialtune.model.parameters import chunks_of
from partialtune.model.rows import Rows, other_runs, rows_within, take_other_rows, take_rows
from partialtune.model.structure import ModelStructure, ParameterInfo
from partialtune.model.weight_files import Weights
from partialtune.progress import progress_bar
from partialtune.proof.distances import ParameterDelta, delta_between, l2_norm
from partialtune.run_folder import is_delta
from partialtune.verify.claims import AdaptedBase, Claim, claim_of_adapters, claim_of_plan, claim_of_selectors
from partialtune.verify.comparison import ComparedParameter, Comparison, notes_on
from partialtune.verify.open_checkpoint import Adapters, open_adapters, open_checkpoint, open_delta
from partialtune.words import counted, joined

SECONDS_WITHOUT_BAR = 1
WITH_ROWS_OF_TOKENS = ("embeddings.tokens", "head")  # the components that new tokens make longer
SHOWN_ROWS = 5
ADAPTERS_NOTE = (
    "{name} holds adapters and none of the base's own weights. What moved is what they make of the base when they are "
    "merged into it."
)
BESIDE_DELTA_NOTE = (
    "{name} holds adapters beside a delta. What moved of a matrix that they adapt is what they make of it when they "
    "are merged into it."
)


def verify(base: str, adapted: str, trainable: Sequence[str] | None = None) -> Comparison:
    """Compare two checkpoints of one model, parameter by parameter.

    Args:
        base: Folder, `builtin:lilliput`, or Hub id, which may end in `@REVISION`. It may be a delta checkpoint, which
            stands for the model that it makes of its own base.
        adapted: Likewise. Where it unties the head, the head is compared with the base's token embedding.
        trainable: Selectors of what may move; an empty list lets nothing move. Without it the adapted folder's freeze
            plan says what may; where there is no plan either, there is no claim and so no verdict.

    Returns:
        What was found; its `raise_if_violated()` makes an error of a broken claim.

    Raises:
        ModelError: If one of the two cannot be read, or they are not the same model.
        RecipeError: If a selector cannot be applied.
    """
    before, after, adapted_base = _open_both(base, adapted)
    adapters = adapted_base.adapters if adapted_base else None
    is_claimed = trainable is not None or (after.folder / PLAN_FILE).is_file()
    structure = _common_structure(before, after, may_be_longer=is_claimed and adapters is None)
    claim, others = _claim(structure, before, after, adapted_base, trainable)
    parameters, rounded, digests_before, digests_after = _compare_all(structure, before, after, claim)
    unclaimed = _unclaimed_rows(before, parameters, claim)
    changed_config = _changed_adapters(adapters, claim) if adapters else []
    if adapters is None or is_delta(adapters.folder):
        changed_config += _changed_config(before, after, claim)
    if not unclaimed and any(parameter.new_rows for parameter in parameters):  # with the rows comes their number
        changed_config = [one for one in changed_config if one.partition(" ")[0].rpartition(".")[2] != "vocab_size"]
    comparison = Comparison(
        base=before.name,
        adapted=after.name,
        parameters=tuple(parameters),
        claim=None if claim is None else claim.text,
        changed_buffers=_changed_buffers(before, after),
        changed_config=tuple(changed_config),
        not_the_base=() if claim is None else _other_than(claim.before, digests_before),
        not_the_result=others if claim is None else (*others, *_other_than(claim.after, digests_after)),
        new_rows_unclaimed=unclaimed,
        faults_of_the_record=() if claim is None else claim.faults,
    )
    notes = notes_on(comparison, before, after, rounded)
    if adapters:
        note = BESIDE_DELTA_NOTE if is_delta(adapters.folder) else ADAPTERS_NOTE
        notes = [note.format(name=after.name), *notes]
    return replace(comparison, notes=tuple(notes))


def _open_both(base: str, adapted: str) -> tuple[Weights, Weights, AdaptedBase | None]:
    """Base and adapted checkpoint, and what makes the second of the first where adapters do."""
    with _as("BASE"):
        before = open_checkpoint(*checkpoint_folder(base))
    with _as("ADAPTED"):
        folder, name = checkpoint_folder(adapted)
        if not holds_adapters(folder):
            return before, open_checkpoint(folder, name, before), None
        under = open_delta(folder, name, before) if is_delta(folder) else before
        adapters = open_adapters(folder, name, under)
        return before, adapters.merged_into(under), AdaptedBase(under, adapters)


def _compare_all(
    structure: ModelStructure, before: Weights, after: Weights, claim: Claim | None
) -> tuple[list[ComparedParameter], list[str], dict[str, str], dict[str, str]]:
    """Each parameter compared, names of those that were only rounded, and digests of both where a claim states any."""
    has_digests = claim is not None and bool(claim.before or claim.after)
    parameters, rounded, digests_before, digests_after = [], [], {}, {}
    for info, old, new in _pairs(structure, before, after):
        rows = claim.rows.get(info.name) if claim is not None else None
        common = new[: len(old)] if old.shape != new.shape else new  # else it has rows of new tokens, too
        allowed = None if claim is None else _may_move(info, old, common, claim)
        parameter = _compare(info, old, common, allowed, None if rows is None else rows_within(rows, len(old)))
        parameter = replace(parameter, rows=rows, new_rows=0 if common is new else len(new) - len(old))
        parameters.append(parameter)
        if has_digests and rows is not None:
            digests_after[parameter.frozen_name] = digest_of_other_rows(new, rows)
            # rows that the base does not have, of tokens that are not the run's new ones, are those of the result
            whole = old if common is new else torch.cat([old.to(new.dtype), new[len(old) :]])
            digests_before[parameter.frozen_name] = digest_of_other_rows(whole, rows)
        if has_digests:
            digests_after[info.name] = digest(new)
            # What is equal once widened has equal digests: what is frozen is hashed once.
            is_same = not (parameter.changed or parameter.new_rows)
            digests_before[info.name] = digests_after[info.name] if is_same else digest(old)
        if parameter.changed and _is_rounded(old, common):
            rounded.append(info.name)
    return parameters, rounded, digests_before, digests_after


def _may_move(info: ParameterInfo, before: torch.Tensor, now: torch.Tensor, claim: Claim) -> bool:
    """Whether the claim lets a parameter move; of one that new tokens changed, and that is frozen, only their rows."""
    if info.name in claim.trainable or info.name not in claim.lengths:
        return info.name in claim.trainable
    taken = [run for run in claim.new_rows if run[1] <= len(before)]
    return bool(taken) and not any(
        changed_values(new, old)
        for old, new in zip(take_other_rows(before, tuple(taken)), take_other_rows(now, tuple(taken)), strict=True)
    )


def _unclaimed_rows(before: Weights, parameters: Sequence[ComparedParameter], claim: Claim | None) -> tuple[str, ...]:
    """Parameters with more rows than the base's of which no plan says so, each as `lm_head.weight (128 -> 130)`."""
    lengths = {} if claim is None else claim.lengths
    rows = {p.name: before.structure.by_name[p.name].shape[0] for p in parameters if p.new_rows}
    found = {p.name: (rows[p.name], rows[p.name] + p.new_rows) for p in parameters if p.new_rows}
    return tuple(
        f"{name} ({one:,} -> {two:,})" for name, (one, two) in found.items() if lengths.get(name) != (one, two)
    )


def changed_values(now: torch.Tensor, before: torch.Tensor) -> int:
    """How many values differ in a bit, both in a dtype that holds them all: fp32, where none of them is wider.

    A zero that changed its sign differs, a NaN equals itself.
    """
    dtype = _common_dtype(now.dtype, before.dtype)
    equal = (
        same_bits(new.to(dtype), old.to(dtype)) for new, old in zip(chunks_of(now), chunks_of(before), strict=True)
    )
    # of complex values (..., 2), real and imaginary part: both have to be equal
    return sum(int(torch.count_nonzero(~(both.all(-1) if dtype.is_complex else both))) for both in equal)


def _common_dtype(one: torch.dtype, other: torch.dtype) -> torch.dtype:
    # bf16 and fp16 do not hold each other's values; fp32 holds those of both
    if one.is_floating_point and other.is_floating_point:
        return torch.promote_types(torch.promote_types(one, other), torch.float32)
    if one.is_complex or other.is_complex:
        return torch.promote_types(torch.promote_types(one, other), torch.complex64)
    # an integer beside a float: fp64 holds whole numbers up to 2^53
    return torch.float64 if one.is_floating_point or other.is_floating_point else torch.promote_types(one, other)


@contextmanager
def _as(role: str) -> Iterator[None]:
    """Begin the message of an error with the checkpoint that it is about: BASE or ADAPTED."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"{role}: {str(error).removeprefix('model_name_or_path: ')}") from error


def _common_structure(before: Weights, after: Weights, may_be_longer: bool) -> ModelStructure:
    """The parameters of both. Where one side unties its head, head and token embedding are two, on both sides.

    `may_be_longer`: whether the second may have more rows of tokens, for a claim to judge.
    """
    problem = _why_not_comparable(before, after, may_be_longer)
    if problem:
        raise ModelError(f"{problem}. Compare a model with the one that it was adapted from.")
    # an untied head is one parameter more: the longer list has it; and of two as long the one with further rows
    structure = max(before.structure, after.structure, key=lambda one: (len(one.parameters), one.total))
    return replace(structure, model_name=before.name)


def _why_not_comparable(before: Weights, after: Weights, may_be_longer: bool) -> str | None:
    ours, theirs = before.structure, after.structure
    kinds = [weights.config.get_text_config().model_type for weights in (before, after)]  # some are saved as text part
    if kinds[0] != kinds[1]:
        return f"{before.name} is a {before.config.model_type} model, {after.name} a {after.config.model_type} model"
    if ours.block_count != theirs.block_count:
        return f"{before.name} has {counted(ours.block_count, 'block')}, {after.name} {theirs.block_count:,}"
    for one, other in ((before, after), (after, before)):
        missing = [name for name in one.structure.by_name if name not in other.structure.by_name]
        if missing:
            return f"{other.name} lacks {counted(len(missing), 'parameter')} of {one.name}: {joined(missing, 160)}"
    for name, info in ours.by_name.items():
        shape = theirs.by_name[name].shape
        longer = shape[1:] == info.shape[1:] and shape[:1] > info.shape[:1]
        if shape != info.shape and not (may_be_longer and longer and info.component in WITH_ROWS_OF_TOKENS):
            return f"{name} is {info.shape} in {before.name} and {shape} in {after.name}"
    return None


def _claim(
    structure: ModelStructure,
    before: Weights,
    after: Weights,
    adapted: AdaptedBase | None,
    trainable: Sequence[str] | None,
) -> tuple[Claim | None, tuple[str, ...]]:
    """What may have moved, and names of what under an adapter, or in it, is not what the run ended with."""
    plan = after.folder / PLAN_FILE
    if adapted:
        return claim_of_adapters(structure, before, adapted, plan, trainable)
    if trainable is not None:
        return claim_of_selectors(structure, trainable), ()
    return claim_of_plan(structure, plan, after.name) if plan.is_file() else None, ()


def _pairs(
    structure: ModelStructure, before: Weights, after: Weights
) -> Iterator[tuple[ParameterInfo, torch.Tensor, torch.Tensor]]:
    """Every parameter with its values in both, one at a time."""
    settings = {"unit_scale": True, "delay": SECONDS_WITHOUT_BAR, "leave": False}
    with progress_bar(structure.total, "comparing", "values", **settings) as bar:
        for info in structure.parameters:
            yield info, before.read(info.name), after.read(info.name)
            bar.update(info.numel)


def _compare(
    info: ParameterInfo, before: torch.Tensor, now: torch.Tensor, allowed: bool | None, rows: Rows | None
) -> ComparedParameter:
    changed = changed_values(now, before)
    of_others, other_rows = _changed_other_rows(now, before, rows) if changed and rows is not None else (0, ())
    if rows and not of_others:
        before, now = take_rows(before, rows), take_rows(now, rows)
    norm = l2_norm(before)
    kept = ParameterDelta(info.name, 0.0, 0.0 if norm else None, 0.0)
    delta = delta_between(info.name, now, before, norm) if changed else kept
    return ComparedParameter(
        name=info.name,
        block=info.block,
        component=info.component,
        numel=info.numel,
        changed_values=changed,
        norm_before=norm if math.isfinite(norm) else None,
        l2_delta=delta.l2_delta,
        relative_delta=delta.relative_delta,
        max_abs_delta=delta.max_abs_delta,
        allowed=allowed,
        rows=rows,
        changed_other_values=of_others,
        changed_other_rows=other_rows,
    )


def _changed_other_rows(now: torch.Tensor, before: torch.Tensor, rows: Rows) -> tuple[int, tuple[int, ...]]:
    """How many values differ outside of these rows, and the first rows there that do."""
    values, numbers = 0, list[int]()
    for start, stop in other_runs(rows, len(now)):
        values += changed_values(now[start:stop], before[start:stop])
        for number in range(start, stop):
            if len(numbers) == SHOWN_ROWS:
                break
            if changed_values(now[number], before[number]):
                numbers.append(number)
    return values, tuple(numbers)


def _changed_buffers(before: Weights, after: Weights) -> tuple[str, ...]:
    common = sorted(before.buffers & after.buffers)
    pairs = ((name, before.read(name), after.read(name)) for name in common)
    return tuple(name for name, old, new in pairs if old.shape != new.shape or changed_values(new, old))


def _changed_config(before: Weights, after: Weights, claim: Claim | None) -> list[str]:
    """The keys in which the configs stand for other functions; of ties one that is not what the run ended with."""
    changes = config_differences(before.config, after.config)
    base, adapted = (getattr(w.config.get_text_config(), "tie_word_embeddings", None) for w in (before, after))
    if claim is not None and claim.head is not None and bool(adapted) != (bool(base) and claim.head != "untied"):
        changes.append(f"tie_word_embeddings ({base} -> {adapted}, and the run left its head {claim.head})")
    return changes


def _changed_adapters(adapters: Adapters, claim: Claim | None) -> list[str]:
    if claim is None or claim.scale in (None, adapters.scale):
        return []
    return [f"lora_alpha / r ({claim.scale:g} -> {adapters.scale:g})"]


def _other_than(claimed: Mapping[str, str], found: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(name for name, sha256 in claimed.items() if found[name] != sha256)


def _is_rounded(before: torch.Tensor, now: torch.Tensor) -> bool:
    """Whether the values are those before, stored in fewer bits."""
    return now.element_size() < before.element_size() and changed_values(now, before.to(now.dtype)) == 0
