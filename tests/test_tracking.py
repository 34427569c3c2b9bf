"""What TensorBoard's event file holds after a run: the groups' deltas under names that stay, step by step."""

import pytest

from conftest import tiny_gpt2
from partialtune.freeze.apply import apply_plan
from partialtune.freeze.plan import plan_freeze
from partialtune.proof.deltas import WeightDeltaCallback
from test_deltas import make_trainer

pytest.importorskip("tensorboard", reason="needs the test extra's tensorboard")

# A dashboard is built on these: a name that changes is a broken promise.
NAMES = {
    *("delta/frozen_l2", "delta/trainable_l2"),
    *("delta/embeddings.tokens", "delta/embeddings.positions", "delta/final_norm"),
    *(f"delta/block_{block:02}/{part}" for block in range(3) for part in ("attention", "mlp", "norms")),
}


@pytest.fixture(scope="module")
def events(tmp_path_factory):
    """The scalars of a run's event file by tag, (step, value) pairs, and the run's Trainer."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path_factory.mktemp("run")
    model = tiny_gpt2()
    plan = plan_freeze(model, ["blocks[-1].mlp", "final_norm"])
    apply_plan(model, plan)
    callback = WeightDeltaCallback(plan, delta_steps=2)
    trainer = make_trainer(folder, model, [callback], report_to=["tensorboard"], logging_steps=1)
    callback.attach(trainer)
    trainer.train()
    (file,) = folder.glob("runs/*/events.out.tfevents.*")  # deeper down lies that of the hyperparameters
    read = EventAccumulator(str(file)).Reload()
    scalars = {tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}
    return scalars, trainer


def test_the_event_file_has_every_group_under_its_stable_name_and_no_other_delta(events):
    scalars, _ = events
    assert {tag.removeprefix("train/") for tag in scalars if "delta/" in tag} == NAMES


def test_the_event_file_holds_the_values_of_the_log_at_their_steps(events):
    scalars, trainer = events
    entries = [entry for entry in trainer.state.log_history if "delta/frozen_l2" in entry]
    assert [entry["step"] for entry in entries] == [2, 4, 5]
    for name in NAMES:
        written = scalars[f"train/{name}"]
        assert [step for step, _ in written] == [2, 4, 5]
        assert [value for _, value in written] == pytest.approx([entry[name] for entry in entries], rel=1e-6)
    assert {value for _, value in scalars["train/delta/frozen_l2"]} == {0.0}
    assert scalars["train/delta/block_02/mlp"][-1][1] > 0.0


def test_the_trainers_own_loss_is_there_at_every_step(events):
    scalars, _ = events
    assert [step for step, _ in scalars["train/loss"]] == [1, 2, 3, 4, 5]
