"""Partial fine-tuning of causal language models with layer freezing that is planned, proved and shown.

    from partialtune import load_text, plan_freeze, apply_plan, WeightDeltaCallback, FreezeAuditCallback

Names are imported when they are first used, so that `partialtune --help` does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what `__getattr__` gives while the program runs, for editors and type checkers
    from partialtune.engine.attach import attach as attach
    from partialtune.engine.audited import audited as audited
    from partialtune.engine.tuning import Tuning as Tuning
    from partialtune.errors import FreezeViolation as FreezeViolation
    from partialtune.freeze.apply import apply_plan as apply_plan
    from partialtune.freeze.plan import FreezePlan as FreezePlan
    from partialtune.freeze.plan import plan_freeze as plan_freeze
    from partialtune.model.new_tokens import add_tokens as add_tokens
    from partialtune.proof.audit import FreezeAuditCallback as FreezeAuditCallback
    from partialtune.proof.deltas import WeightDeltaCallback as WeightDeltaCallback
    from partialtune.rebuild import apply_delta as apply_delta
    from partialtune.rebuild import load as load
    from partialtune.recipe.recipe import read_recipe as read_recipe
    from partialtune.recipe_run.finished_run import FinishedRun as FinishedRun
    from partialtune.recipe_run.finished_run import open_run as open_run
    from partialtune.recipe_run.run_recipe import train as train
    from partialtune.text.reading import load_text as load_text

__version__ = "0.1.0"

_HOME = {
    "FinishedRun": "recipe_run.finished_run",
    "FreezeAuditCallback": "proof.audit",
    "FreezePlan": "freeze.plan",
    "FreezeViolation": "errors",
    "Tuning": "engine.tuning",
    "WeightDeltaCallback": "proof.deltas",
    "add_tokens": "model.new_tokens",
    "apply_delta": "rebuild",
    "apply_plan": "freeze.apply",
    "attach": "engine.attach",
    "audited": "engine.audited",
    "load": "rebuild",
    "load_text": "text.reading",
    "open_run": "recipe_run.finished_run",
    "plan_freeze": "freeze.plan",
    "read_recipe": "recipe.recipe",
    "train": "recipe_run.run_recipe",
}

__all__ = sorted(_HOME)


if not TYPE_CHECKING:  # a type checker that saw it would take every misspelt name for Any

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module 'partialtune' has no attribute {name!r}")
        return getattr(import_module(f"partialtune.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
