"""What carries a plan out and proves it, in one object: the same for a Trainer (`attach`) and a loop (`audited`)."""

import gc
import weakref
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from markupsafe import Markup
from torch import nn

from partialtune.distributed import decided_by_main, done_together, from_all, rank_and_processes
from partialtune.engine.fast_paths import FAST_PATHS, FastPaths
from partialtune.engine.part_rates import PartRates
from partialtune.engine.prefix_choice import WANTED
from partialtune.errors import RecipeError
from partialtune.freeze.plan import FreezePlan
from partialtune.model.parameters import is_sharded, named_weights, whole_on_main
from partialtune.model.sharded_files import is_sharded_checkpoint
from partialtune.proof.audit import FreezeAuditCallback
from partialtune.proof.audit_result import Audit, SavedDifference
from partialtune.proof.deltas import WeightDeltaCallback
from partialtune.proof.distances import ParameterDelta
from partialtune.proof.saved_files import saved_differences
from partialtune.proof.snapshot import Stopwatch
from partialtune.run_folder import is_delta
from partialtune.tables import html_table

# Weak on both sides: a tuning holds its model, and goes with its Trainer.
_TUNED: "weakref.WeakKeyDictionary[nn.Module, weakref.ref[Tuning]]" = weakref.WeakKeyDictionary()


class Tuning:
    """A plan that is carried out on a model, and what is known of it so far.

    Made by `attach` and `audited`.

    Args:
        model: The model itself, not its DDP or compiled wrapper; the plan is applied to it.
        plan: What trains.
        fast: The fast paths.
        audit_callback: Proves that what is frozen keeps every bit.
        delta_callback: Measures how far each parameter moves.

    Attributes:
        config_as_loaded: Values of the model's config that training changes and that are saved as they were.
        part_rates: The rates of the parts in the newest step.
        reading_back: Time in which saved files were read back and compared with the audit's digests.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: FreezePlan,
        fast: FastPaths,
        audit_callback: FreezeAuditCallback,
        delta_callback: WeightDeltaCallback,
    ) -> None:
        self.model, self.plan, self.fast = model, plan, fast
        self.audit_callback, self.delta_callback = audit_callback, delta_callback
        self.config_as_loaded: dict[str, Any] = {}
        self.reading_back = Stopwatch()
        self.part_rates = PartRates(plan)
        self._going_on = True
        _TUNED[model] = weakref.ref(self)

    def end(self) -> None:
        """Training is over: another tuning of the model may begin."""
        self._going_on = False

    @property
    def audit(self) -> Audit | None:
        """The newest verdict, None before the first."""
        return self.audit_callback.result

    @property
    def deltas(self) -> Mapping[str, ParameterDelta]:
        """How far each parameter has moved from the start, by its name: the newest report, empty before the first.

        Of several processes the main one knows the distances; on the others they are None.
        """
        return self.delta_callback.newest

    @property
    def rates(self) -> Mapping[str, float]:
        """Learning rate of each part in the newest step: {"learning_rate/embeddings": 1e-05}.

        Empty before the first step, and where the plan has neither part_learning_rates nor a layer_decay.
        """
        return self.part_rates.newest

    @property
    def seconds(self) -> float:
        """Time that snapshot, deltas and audit have taken."""
        return self.audit_callback.seconds + self.delta_callback.seconds

    def _repr_html_(self) -> str:
        """The verdict and how far each part has moved, for a notebook."""
        verdict = "not audited yet" if self.audit is None else self.audit.verdict()
        distances = self.delta_callback.group_deltas(dict(self.deltas)) if self.deltas else {}
        rows = [("part", "L2 distance from the start")]
        rows += [(name.removeprefix("delta/"), f"{distance:.6g}") for name, distance in distances.items()]
        reused = f"{self.fast.hits:,} of {self.fast.hits + self.fast.misses:,} rows started from kept states"
        kept = reused if self.fast.keeps_prefix else "no frozen prefix is kept"
        return str(Markup("<div><b>{}</b>; {}{}</div>").format(verdict, kept, html_table(rows)))

    @contextmanager
    def as_loaded(self) -> Iterator[None]:
        """Within it the model's config has the values that it was loaded with: training switches `use_cache` off."""
        config: Any = self.model.config
        in_training = {key: getattr(config, key, None) for key in self.config_as_loaded}
        for key, value in self.config_as_loaded.items():
            setattr(config, key, value)
        try:
            yield
        finally:
            for key, value in in_training.items():
                setattr(config, key, value)

    def read_back(self, folder: Path, digests: Mapping[str, str], buffers: Mapping[str, str]) -> list[SavedDifference]:
        """The tensors of a folder that was just saved which have other digests; the same on every process.

        Args:
            folder: Holds the saved model.
            digests: sha256 by name of the parameters to compare.
            buffers: sha256 by name of the persistent buffers.
        """

        gathered: dict[str, torch.Tensor] = {}

        def read(share: Mapping[str, str]) -> list[SavedDifference]:
            return saved_differences(folder, self.model, share, buffers, self.plan, gathered)

        with self.reading_back, self.as_loaded():
            if bool(self.plan.rows) and decided_by_main(lambda: is_delta(folder)):
                matrices = [(n, p) for n, p in named_weights(self.model) if n in self.plan.rows and is_sharded(p)]
                whole = ((name, whole_on_main(matrix)) for name, matrix in matrices)
                gathered |= {name: values for name, values in whole if values is not None}
            if self.plan.leaves_base_out or not decided_by_main(lambda: is_sharded_checkpoint(folder)):
                return decided_by_main(lambda: read(digests))
            # All processes see the shards of all, and each puts together, and digests, its part of the tensors.
            rank, processes = rank_and_processes()
            share = dict(list(digests.items())[rank::processes])
            found = from_all(done_together(lambda: read(share)))
            return list(dict.fromkeys(difference for of_one in found for difference in of_one))


def check_untuned(model: nn.Module) -> None:
    """Raises RecipeError where a tuning of the model goes on: two would count, hold back and patch twice."""
    gc.collect()  # of a Trainer that nobody has any more, as when a cell of a notebook is run again
    known = _TUNED.get(model)
    tuning = known() if known is not None else None
    if tuning is not None and tuning._going_on:
        raise RecipeError(
            "This model is attached already: one attach(trainer, plan) or audited(model, plan, optimizer) carries out "
            "the whole plan. Put all that may train into one plan (schedule=[...] for what begins later)."
        )


def check_settings(plan: Any, enabled: Any, prefix_cache: Any, delta_steps: Any) -> None:
    """Stop where `attach` or `audited` was given something of another kind than it takes.

    Args:
        plan: A plan.
        enabled: Fast paths.
        prefix_cache: `auto`, `off`, `memory`, `disk`, or what was chosen before.
        delta_steps: Steps, at least 1.

    Raises:
        RecipeError: In words.
    """
    if not isinstance(plan, FreezePlan):
        raise RecipeError(
            f"The plan is of type {type(plan).__name__}. Give what plan_freeze(model, ['blocks[-2:]', 'final_norm']) "
            f"returns."
        )
    if isinstance(enabled, str) or not isinstance(enabled, Collection):
        raise RecipeError(
            f"fast_paths is {enabled!r}; it takes a list, of {', '.join(FAST_PATHS)}; () switches all off."
        )
    if unknown := sorted(set(map(str, enabled)) - set(FAST_PATHS)):
        raise RecipeError(f"fast_paths: {', '.join(unknown)} is none; there are {', '.join(FAST_PATHS)}.")
    if not isinstance(prefix_cache, (str, list, tuple)):
        raise RecipeError(f"prefix_cache is {prefix_cache!r}; allowed are {', '.join(WANTED)}.")
    if isinstance(delta_steps, bool) or not isinstance(delta_steps, int) or delta_steps < 1:
        raise RecipeError(f"delta_steps is {delta_steps!r}; allowed is a whole number of steps, at least 1.")
