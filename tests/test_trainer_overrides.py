"""What the overrides of an attached Trainer rely on in transformers."""

import inspect

import pytest
from transformers import Trainer

from partialtune.engine.trainer_overrides import TunedTrainer

pytestmark = pytest.mark.contract

# Method -> the parameters that its override uses, or that whoever calls it has to give.
PRIVATE = {
    "_determine_best_metric": {"metrics", "trial"},
    "_get_output_dir": {"trial"},
    "_get_train_sampler": set(),
    "_load_best_model": set(),
    "_load_from_checkpoint": {"resume_from_checkpoint", "model"},
    "_load_optimizer_and_scheduler": {"checkpoint"},
    "_load_rng_state": {"checkpoint"},
    "_run_epoch": {"model", "epoch", "train_dataloader"},
    "_save": {"output_dir", "state_dict"},
    "_save_checkpoint": {"model", "trial"},
    "_save_optimizer_and_scheduler": {"output_dir"},
    "_save_rng_state": {"output_dir"},
}
PUBLIC = {
    "compute_loss": {"model", "inputs", "return_outputs"},
    "create_optimizer": set(),
    "create_scheduler": set(),
    "get_decay_parameter_names": {"model"},
    "evaluation_loop": {"dataloader"},
    "get_batch_samples": set(),
    "log": {"logs"},
    "num_examples": {"dataloader"},
    "prediction_step": {"model", "inputs", "prediction_loss_only"},
    "save_model": {"output_dir", "_internal_call"},
    "save_state": set(),
    "training_step": {"model", "inputs"},
    "train": {"resume_from_checkpoint"},
}


def overridden() -> set[str]:
    return {name for name, value in vars(TunedTrainer).items() if inspect.isfunction(value) and hasattr(Trainer, name)}


@pytest.mark.parametrize(("name", "parameters"), {**PRIVATE, **PUBLIC}.items())
def test_what_is_overridden_is_still_there_with_the_parameters_that_are_used(name, parameters):
    assert callable(getattr(Trainer, name, None)), f"transformers has no Trainer.{name} any more"
    known = inspect.signature(getattr(Trainer, name)).parameters.keys()
    assert parameters <= known, f"Trainer.{name} has lost {sorted(parameters - known)}: its override passes them on"


@pytest.mark.parametrize("name", PRIVATE)
def test_transformers_still_calls_what_is_overridden(name):
    called, handed_on = f"self.{name}(", f"=self.{name},"  # as `sampler_fn=self._get_train_sampler,`
    source = inspect.getsource(Trainer)
    assert called in source or handed_on in source, f"nothing in Trainer calls {name} any more"


def test_every_override_is_known_here_and_the_private_ones_stand_in_the_docstring():
    assert overridden() == {*PRIVATE, *PUBLIC}
    assert all(f"`{name}`" in TunedTrainer.__doc__ for name in PRIVATE)
    assert callable(Trainer._get_learning_rate)


def test_no_other_module_of_the_package_overrides_a_trainer():
    import pkgutil
    from importlib import import_module

    import partialtune

    names = [module.name for module in pkgutil.walk_packages(partialtune.__path__, "partialtune.")]
    modules = [import_module(name) for name in names if not name.endswith("__main__")]
    classes = {one for module in modules for one in vars(module).values() if inspect.isclass(one)}
    assert [one for one in classes if issubclass(one, Trainer) and one.__module__.startswith("partialtune")] == []
