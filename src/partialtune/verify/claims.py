"""Selectors, or a run's freeze plan -> the claim of what may have moved between a base and an adapted checkpoint."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from partialtune.errors import ModelError
from partialtune.freeze.adapter_plan import FACTOR, adapted_matrix
from partialtune.model.digests import digest, digests_of
from partialtune.model.rows import Rows, as_rows, as_runs, other_rows_name
from partialtune.model.selectors import choose
from partialtune.model.structure import ModelStructure
from partialtune.model.weight_files import Weights
from partialtune.run_folder import read_json
from partialtune.verify.draws import read_draws
from partialtune.verify.open_checkpoint import Adapters


@dataclass(frozen=True)
class Claim:
    """Which parameters may move, and what says so.

    Attributes:
        text: The claim in words.
        trainable: Names of the parameters that may move.
        rows: Of those of which some rows alone may move, which ones.
        before: sha256 of parameters of the base by name, as far as the claim states them, and of the rows that may not
            move by the name that `rows.other_rows_name` gives.
        after: The same for the adapted checkpoint.
        head: `untied` where the run gave the head a matrix of its own, `tied` where it did not; None if unknown.
        scale: For LoRA, alpha / rank of the run; None if unknown.
        lengths: Of each tensor that new tokens changed, by name: how long it is in the base, and in the result.
        new_rows: Rows of the new tokens.
        faults: Sentences on what the run's own record says against itself.
    """

    text: str
    trainable: frozenset[str]
    rows: Mapping[str, Rows] = field(default_factory=dict)
    before: Mapping[str, str] = field(default_factory=dict)
    after: Mapping[str, str] = field(default_factory=dict)
    head: str | None = None
    scale: float | None = None
    lengths: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    new_rows: Rows = ()
    faults: tuple[str, ...] = ()


def claim_of_selectors(structure: ModelStructure, trainable: Sequence[str]) -> Claim:
    """That only what these selectors choose may move; nothing where there are none.

    Raises:
        RecipeError: If a selector cannot be applied.
    """
    selectors = [trainable] if isinstance(trainable, str) else list(trainable)
    chosen = choose(structure, selectors, allow_empty=True)
    return Claim(
        text=f"only {', '.join(selectors) or 'nothing'} may move",
        trainable=frozenset(chosen),
        rows={name: what.rows for name, what in chosen.items() if what.rows is not None},
    )


def claim_of_plan(structure: ModelStructure, file: Path, adapted: str) -> Claim:
    """That only what a run's `freeze_plan.json` trains moved, from its digests before to its digests after.

    Parameters that the plan does not list are frozen. Where blocks learnt in turn, so are those that were never drawn.

    Args:
        structure: Of both checkpoints.
        file: The plan.
        adapted: What messages call the checkpoint beside it.

    Raises:
        ModelError: If the file is no freeze plan, or one of another model.
    """
    entries = _entries(file, adapted)
    strangers = [name for name in entries if name not in structure.by_name]
    if strangers:
        raise ModelError(
            f"{adapted}: its {file.name} is of another model; {strangers[0]} is no parameter of this one. "
            f"Say with --trainable what may move."
        )
    # a plan may list a tied parameter under another of its names
    named = {structure.by_name[name].name: entry for name, entry in entries.items()}
    # what new tokens changed began with other values than the base's: of these the plan has the base's digest, too
    begun = {name: entry.get("sha256_base") or entry["sha256_before"] for name, entry in named.items()}
    before = {name: sha256 for name, sha256 in begun.items() if sha256}
    after = {name: entry["sha256_after"] for name, entry in named.items() if entry["sha256_after"]}
    rows = _rows(structure, named, file, adapted)
    for name, trained in rows.items():
        for found, key in ((before, "sha256_other_rows_before"), (after, "sha256_other_rows_after")):
            if named[name].get(key):
                found[other_rows_name(name, trained)] = named[name][key]
    content = read_json(file)
    try:
        lengths = {
            name: (entry["base_shape"][0], entry["shape"][0]) for name, entry in named.items() if "base_shape" in entry
        }
        new_rows = as_runs(token["row"] for token in content.get("new_tokens", []))
    except (KeyError, TypeError, IndexError) as error:
        raise ModelError(f"{adapted}: its {file.name} is damaged, in what it says of new tokens ({error}).") from error
    digests = f"{len(before):,} digests before and {len(after):,} after"
    draws = read_draws(file.parent, content, adapted)
    never = {structure.by_name[name].name for name in draws.never}
    return Claim(
        text=f"only what {file.name} of {adapted} trains may move; {digests} have to be as it says{draws.words}",
        # `is True`: a damaged plan's "false" is a text, and must not let a parameter move
        trainable=frozenset(name for name, entry in named.items() if entry["trainable"] is True) - never,
        rows=rows,
        before=before,
        after=after,
        head=content.get("head"),
        faults=draws.faults,
        lengths=lengths,
        new_rows=new_rows,
    )


def _rows(
    structure: ModelStructure, entries: Mapping[str, Mapping[str, Any]], file: Path, adapted: str
) -> dict[str, Rows]:
    """Which rows alone train, by name of the matrix."""
    with_rows = {name: entry["rows"] for name, entry in entries.items() if entry.get("rows") is not None}
    try:
        return {name: as_rows(runs, structure.by_name[name].shape[0]) for name, runs in with_rows.items()}
    except (ValueError, TypeError, IndexError) as error:
        raise ModelError(
            f"{adapted}: its {file.name} cannot be read as a freeze plan ({error}). Say with --trainable what may move."
        ) from error


def _entries(file: Path, adapted: str) -> dict[str, dict[str, Any]]:
    try:
        entries = {entry["name"]: entry for entry in read_json(file)["parameters"]}
        keys = {"trainable", "sha256_before", "sha256_after"}
        if not all(keys <= entry.keys() for entry in entries.values()):
            raise KeyError(*sorted(keys))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{adapted}: its {file.name} cannot be read as a freeze plan ({error}). Say with --trainable what may move."
        ) from error
    return entries


@dataclass(frozen=True)
class AdaptedBase:
    """A checkpoint of adapters, not merged.

    Attributes:
        under: What they stand on: the base, or the base with the values of the delta that lies beside them.
        adapters: They themselves.
    """

    under: Weights
    adapters: Adapters


def claim_of_adapters(
    structure: ModelStructure, base: Weights, adapted: AdaptedBase, plan: Path, trainable: Sequence[str] | None
) -> tuple[Claim | None, tuple[str, ...]]:
    """What may move, by selectors or by the run's plan; and names of what is not what the run ended with.

    These are adapters, and parameters under them: what a delta holds, which in the merged model cannot be told from
    what adapters make of it.

    Raises:
        ModelError: If the plan cannot be read.
        RecipeError: If a selector cannot be applied.
    """
    adapters, name = adapted.adapters, adapted.adapters.name
    if trainable is not None:
        return claim_of_selectors(structure, trainable), ()
    if not plan.is_file():
        return None, ()
    try:
        content = read_json(plan)
        entries = {entry["name"]: entry for entry in content["parameters"]}
        adapter = content.get("adapter")
        scale = adapter["alpha"] / adapter["rank"] if adapter else None
        trains = {name for name, entry in entries.items() if entry["trainable"] is True}
        planned = {name: entries[name]["sha256_after"] for name in trains if FACTOR.fullmatch(name)}
        own = {
            structure.by_name[name].name: (entry["sha256_before"], entry["sha256_after"])
            for name, entry in entries.items()
            if name in structure.by_name
        }
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise ModelError(f"{name}: its {plan.name} cannot be read as a freeze plan ({error}).") from error
    before = {name: sha256 for name, (sha256, _) in own.items() if sha256}
    # of a matrix that is adapted too all of it moves when they are merged
    in_part = {structure.by_name[n].name: e for n, e in entries.items() if n in structure.by_name}
    rows = {n: r for n, r in _rows(structure, in_part, plan, name).items() if n not in adapters.adapted}
    others = {one for one in planned.keys() | adapters.tensors.keys() if not _is_as_planned(one, planned, adapters)}
    others |= _others_under_adapters(base, adapted, own, trains) if adapted.under is not base else set()
    verb = "adapts" if trains == planned.keys() else "trains or adapts"
    return (
        Claim(
            text=f"only what {plan.name} of {name} {verb} may move; base and adapters have to be as it "
            f"says ({len(before):,} and {len(planned):,} digests)",
            trainable=frozenset(map(adapted_matrix, trains)),  # the plan names adapters; what moves is their matrix
            rows=rows,
            before=before,
            head=content.get("head") if adapted.under is not base else None,
            scale=scale,
        ),
        tuple(sorted(others)),
    )


def _others_under_adapters(
    base: Weights, adapted: AdaptedBase, own: Mapping[str, tuple[str, str]], trains: Set[str]
) -> set[str]:
    """Parameters of a delta that are not what its run ended with; frozen ones have to be the base's own bits."""
    under = adapted.under
    found = digests_of((name, under.read(name)) for name in own)
    others = {name for name, (_, after) in own.items() if after and found[name] != after}
    frozen = [name for name in adapted.adapters.adapted if name not in trains]  # merged they may move
    of_base = digests_of((name, base.read(name)) for name in frozen)
    return others | {name for name in frozen if found.get(name, of_base[name]) != of_base[name]}


def _is_as_planned(name: str, planned: dict[str, str], adapters: Adapters) -> bool:
    return name in planned and name in adapters.tensors and digest(adapters.tensors[name]) == planned[name]
