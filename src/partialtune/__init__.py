"""Partial fine-tuning of causal language models with layer freezing that is planned, proved and shown.

    from partialtune import load_text, plan_freeze, apply_plan, WeightDeltaCallback, FreezeAuditCallback

Names are imported when they are first used, so that `partialtune --help` does not wait for torch.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "FreezeAuditCallback": "proof.audit",
    "FreezePlan": "freeze.plan",
    "FreezeViolation": "errors",
    "WeightDeltaCallback": "proof.deltas",
    "apply_delta": "rebuild",
    "apply_plan": "freeze.apply",
    "load": "rebuild",
    "load_text": "text.reading",
    "plan_freeze": "freeze.plan",
    "read_recipe": "recipe.reading",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'partialtune' has no attribute {name!r}")
    return getattr(import_module(f"partialtune.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
