"""Early stopping: where a run ends, whose weights it keeps, what its folder says, and the same after a resume."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, Trainer

from conftest import REPOSITORY, some_windows, tiny_gpt2
from partialtune import attach, plan_freeze
from partialtune.cli import main
from partialtune.compare.compare import compare_runs
from partialtune.errors import InputError, RecipeError
from partialtune.pages.run_files import read_run
from partialtune.proof.audit_result import GONE_BACK, NOT_REACHED
from partialtune.recipe.early_stopping import implied_by_early_stopping
from partialtune.recipe.recipe import recipe_from_values
from partialtune.training.recipe_trainer import attached_trainer
from partialtune.training.resume_check import recipe_differences
from partialtune.training.settings import suit_length, training_arguments, warn_of_patience
from partialtune.training.stopping import EarlyStopping

BASE = {
    "model_name_or_path": "builtin:lilliput",
    "text": "builtin:python-docs",
    "trainable": ["final_norm"],
    "output_dir": "out",
}


# ---- the recipe -----------------------------------------------------------------------------------------------------


def settings_of(windows=400, **changes):
    """Trainer's arguments as a run has them, on 100 steps of four windows."""
    recipe = recipe_from_values({**BASE, "per_device_train_batch_size": 4, "num_train_epochs": 1, **changes})
    given = implied_by_early_stopping(recipe.values) | recipe.training
    args = training_arguments({**given, "use_cpu": True})
    early = recipe.evaluation.early_stopping_patience is not None
    suit_length(args, recipe.training, windows, held_out=True, stops_early=early)
    return args


def shown(args):
    keys = ("eval_strategy", "save_strategy", "eval_steps", "save_steps", "save_total_limit", "load_best_model_at_end")
    return [getattr(getattr(args, key), "value", getattr(args, key)) for key in keys]


def test_patience_alone_evaluates_and_saves_ten_times_and_keeps_the_best_and_the_newest():
    args = settings_of(early_stopping_patience=3)
    assert shown(args) == ["steps", "steps", 10, 10, 2, True]
    assert (args.metric_for_best_model, args.greater_is_better) == ("loss", False)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"eval_steps": 7}, ["steps", "steps", 7, 7, 2, True]),
        ({"save_steps": 20}, ["steps", "steps", 20, 20, 2, True]),
        ({"eval_steps": 5, "save_steps": 20}, ["steps", "steps", 5, 20, 2, True]),
        ({"eval_steps": 0.25}, ["steps", "steps", 0.25, 0.25, 2, True]),
        ({"eval_strategy": "epoch"}, ["epoch", "epoch", None, 500, 2, True]),
        ({"save_strategy": "best"}, ["steps", "best", 10, 10, 2, True]),
        ({"save_total_limit": 5}, ["steps", "steps", 10, 10, 5, True]),
        ({"load_best_model_at_end": False}, ["steps", "steps", 10, 500, None, False]),
        ({"load_best_model_at_end": False, "save_strategy": "no"}, ["steps", "no", 10, 500, None, False]),
    ],
    ids=str,
)
def test_what_the_recipe_says_stays_and_the_rest_follows_from_it(changes, wanted):
    assert shown(settings_of(early_stopping_patience=3, **changes)) == wanted


def test_without_patience_nothing_follows():
    assert implied_by_early_stopping({**BASE, "early_stopping_threshold": 0.0}) == {}
    assert shown(settings_of()) == ["steps", "steps", 10, 500, None, False]


def test_more_is_better_of_no_metric_that_early_stopping_may_follow():
    args = settings_of(early_stopping_patience=3, metric_for_best_model="bits_per_byte")
    assert (args.metric_for_best_model, args.greater_is_better) == ("bits_per_byte", False)


MISTAKES = {
    "nothing held out": (
        {"early_stopping_patience": 3, "validation_share": 0},
        "early_stopping_patience: needs held-out text, and validation_share is 0",
    ),
    "nothing evaluated": (
        {"early_stopping_patience": 3, "eval_strategy": "no"},
        "early_stopping_patience: looks at the held-out loss during training, and eval_strategy is no",
    ),
    "nothing saved": (
        {"early_stopping_patience": 3, "save_strategy": "no"},
        "save_strategy: no leaves no checkpoint to go back to",
    ),
    "threshold alone": (
        {"early_stopping_threshold": 0.1},
        "early_stopping_threshold: does nothing without early_stopping_patience",
    ),
    "patience of 0": (
        {"early_stopping_patience": 0},
        "early_stopping_patience: got 0; allowed: a whole number or null",
    ),
    "negative threshold": (
        {"early_stopping_patience": 3, "early_stopping_threshold": -1},
        "early_stopping_threshold: got -1; allowed: a number, 0 or more",
    ),
    "saves that fall between evaluations": (
        {"early_stopping_patience": 3, "eval_steps": 3, "save_steps": 4},
        "transformers says: --load_best_model_at_end requires the saving steps to be a round multiple",
    ),
    "the wrong way": (
        {"early_stopping_patience": 3, "greater_is_better": True, "metric_for_best_model": "loss"},
        "greater_is_better: true: of loss, less is better",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_contradicts_early_stopping_is_refused_in_words(name):
    changes, words = MISTAKES[name]
    with pytest.raises(RecipeError) as caught:
        recipe_from_values({**BASE, **changes})
    assert words in str(caught.value)


def test_what_follows_from_patience_is_the_same_recipe_whether_it_is_said_or_not():
    values = {**BASE, "early_stopping_patience": 3}
    assert recipe_differences(values, {**values, "load_best_model_at_end": True, "save_total_limit": 2}) == []
    assert "load_best_model_at_end" in recipe_differences(values, {**values, "load_best_model_at_end": False})
    assert recipe_differences(values, {**BASE, "early_stopping_patience": 4})[0] == "early_stopping_patience"


def test_a_patience_that_no_run_of_this_length_wears_out_is_warned_of(caplog):
    args = settings_of(early_stopping_patience=10)
    warn_of_patience(args, 10, 400)
    assert "early_stopping_patience is 10, and the run evaluates 10 times, every 10 steps" in caplog.text
    caplog.clear()
    warn_of_patience(args, 9, 400)
    warn_of_patience(args, None, 400)
    assert caplog.text == ""


# ---- a Trainer ------------------------------------------------------------------------------------------------------

RATE = 0.3  # at which random windows are learnt, and what is held out is not


def runner(folder: Path, patience: int = 2, schedule=(), **changes):
    """A tiny model whose held-out loss rises soon: each run of it is the same."""
    settings = {
        "output_dir": str(folder),
        "max_steps": 12,
        "per_device_train_batch_size": 4,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "metric_for_best_model": "loss",
        "load_best_model_at_end": True,
    }
    torch.manual_seed(1)
    model = tiny_gpt2()
    return attached_trainer(
        plan=plan_freeze(model, ["blocks[-1]", "final_norm"], schedule=list(schedule)),
        model=model,
        args=training_arguments({**settings, **changes}),
        train_dataset=some_windows(),
        eval_dataset=some_windows(4, seed=1),
        early_stopping=EarlyStopping(patience),
    )


def losses_of(trainer):
    """Step -> held-out loss."""
    return {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}


def end_of(losses, patience):
    """(step at which patience is at an end, step of the last improvement), counted anew from the losses."""
    best, best_step, waited = float("inf"), 0, 0
    for step, loss in losses.items():
        best, best_step, waited = (loss, step, 0) if loss < best else (best, best_step, waited + 1)
        if waited == patience:
            return step, best_step
    return max(losses), best_step


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that early stopping has ended, with all its checkpoints."""
    run = runner(tmp_path_factory.mktemp("stopped"))
    run.train()
    return run


def test_a_run_ends_where_patience_is_at_an_end_with_the_weights_of_the_best_checkpoint(stopped):
    trainer, found = stopped.trainer, stopped.early_stopping.stopped
    step, best = end_of(losses_of(trainer), 2)
    assert 1 <= best < step < 12, losses_of(trainer)
    assert found == {"step": step, "of": 12, "best_step": best, "weights_of_step": best}
    assert trainer.state.global_step == step
    saved = load_file(Path(trainer.args.output_dir) / f"checkpoint-{best}" / "model.safetensors")
    present = weights(trainer)
    assert all(torch.equal(present[name], value) for name, value in saved.items())


def test_the_audit_of_a_run_that_stopped_early_has_a_verdict(stopped):
    audit = stopped.tuning.audit
    assert (audit.passed, audit.stuck, audit.unmoved) == (True, [], {})
    assert stopped.tuning.audit_callback.ended


def test_without_load_best_model_at_end_the_last_weights_stay(stopped, tmp_path):
    run = runner(tmp_path, load_best_model_at_end=False)
    run.train()
    step = stopped.early_stopping.stopped["step"]
    assert run.early_stopping.stopped == {**stopped.early_stopping.stopped, "weights_of_step": step}
    saved = load_file(Path(stopped.trainer.args.output_dir) / f"checkpoint-{step}" / "model.safetensors")
    present = weights(run.trainer)
    assert all(torch.equal(present[name], value) for name, value in saved.items())


@pytest.mark.slow
def test_a_run_that_goes_on_at_any_step_stops_at_the_same_one_with_the_same_bits(stopped, tmp_path):
    whole, wanted = stopped.trainer, weights(stopped.trainer)
    for step in range(1, stopped.early_stopping.stopped["step"] + 1):
        run = runner(tmp_path / str(step))
        shutil.copytree(whole.args.output_dir, tmp_path / str(step), dirs_exist_ok=True)
        for later in (tmp_path / str(step)).glob("checkpoint-*"):
            if int(later.name.removeprefix("checkpoint-")) > step:
                shutil.rmtree(later)
        run.train(tmp_path / str(step) / f"checkpoint-{step}")
        assert run.early_stopping.stopped == stopped.early_stopping.stopped, step
        assert losses_of(run.trainer) == losses_of(whole), step
        assert same(weights(run.trainer), wanted), step


def test_a_run_that_goes_on_in_another_folder_goes_back_to_the_best_checkpoint_of_the_first(stopped, tmp_path):
    best, step = (stopped.early_stopping.stopped[key] for key in ("best_step", "step"))
    assert best < step - 1
    run = runner(tmp_path)
    run.train(Path(stopped.trainer.args.output_dir) / f"checkpoint-{step - 1}")
    assert run.early_stopping.stopped == stopped.early_stopping.stopped
    assert same(weights(run.trainer), weights(stopped.trainer))


def test_a_damaged_count_in_a_checkpoint_is_said_in_words(stopped, tmp_path):
    checkpoint = tmp_path / "checkpoint-1"
    shutil.copytree(Path(stopped.trainer.args.output_dir) / "checkpoint-1", checkpoint)
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    state["stateful_callbacks"]["EarlyStopping"]["attributes"]["best_step"] = "one"
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    with pytest.raises(InputError, match="its early stopping"):
        runner(tmp_path / "run").train(checkpoint)


def test_a_checkpoint_of_a_run_without_early_stopping_can_be_gone_on_from(tmp_path):
    first = runner(tmp_path / "first", patience=100, max_steps=2)
    first.trainer.remove_callback(first.early_stopping)
    first.train()
    assert "EarlyStopping" not in first.trainer.state.stateful_callbacks
    run = runner(tmp_path / "run")
    run.train(tmp_path / "first" / "checkpoint-2")
    assert run.early_stopping.stopped["step"] > 2


def test_phases_that_were_not_reached_or_were_gone_back_behind_are_no_fault(stopped, tmp_path):
    found = stopped.early_stopping.stopped
    best, step = found["best_step"], found["step"]
    schedule = [
        {"from_step": best, "trainable": ["blocks[0].norms"]},  # learns after the best step, and is gone back behind
        {"from_step": 11, "trainable": ["blocks[1].norms"]},
    ]
    run = runner(tmp_path, schedule=schedule)
    run.train()
    again = run.early_stopping.stopped
    assert again["best_step"] == best  # up to there nothing differs
    audit = run.tuning.audit
    assert audit.passed
    reasons = {name.split(".")[2]: reason for name, reason in audit.unmoved.items()}
    assert reasons == {"0": GONE_BACK.format(back=best, step=best), "1": NOT_REACHED.format(step=11)}, (step, again)


def test_the_audit_of_anybodys_early_stopping_has_a_verdict_too(tmp_path):
    args = runner(tmp_path).trainer.args
    torch.manual_seed(1)
    model = tiny_gpt2()
    trainer = Trainer(model, args, train_dataset=with_labels(24), eval_dataset=with_labels(4, seed=1))
    trainer.add_callback(EarlyStoppingCallback(2))
    tuning = attach(trainer, plan_freeze(model, ["blocks[-1]", "final_norm"]))
    trainer.train()
    assert trainer.state.global_step < 12
    assert tuning.audit.passed
    assert tuning.audit_callback.ended


def with_labels(count, seed=0):
    windows = some_windows(count, seed=seed)
    return windows.add_column("labels", windows["input_ids"])


# ---- a whole run ----------------------------------------------------------------------------------------------------

WORDS = ("times", "wisdom", "belief", "light", "hope", "despair", "winter", "spring")
LISTS = " ".join(f"It was the age of {WORDS[n % 8]} {n}, it was the season of {WORDS[n * 5 % 7]}." for n in range(80))
STORY = (REPOSITORY / "recipes" / "frontier" / "voyage_to_lilliput.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`run`, which early stopping has ended, and its recipe."""
    folder = tmp_path_factory.mktemp("early")
    # what is held out is of another kind than what is learnt, so that it is soon predicted worse
    (folder / "text.txt").write_text(f"{LISTS}\n{STORY[: len(LISTS)]}", encoding="utf-8")
    values = {
        "model_name_or_path": "builtin:lilliput",
        "text": str(folder / "text.txt"),
        "block_size": 32,
        "trainable": ["blocks[-1]", "final_norm"],
        "output_dir": str(folder / "run"),
        "max_steps": 20,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "validation_share": 0.5,
        "prompts": ["It was"],
        "early_stopping_patience": 2,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    with pytest.MonkeyPatch.context() as patch:
        for module in ("figures", "report"):  # as in the fixture `undrawn`
            patch.setattr(f"partialtune.pages.{module}.render_figure", lambda *_, **__: b"not drawn")
        assert main(["train", str(folder / "recipe.yaml")]) == 0
    return folder


def test_a_run_that_stopped_early_is_finished_and_its_folder_says_where_it_stopped(folder, caplog):
    run = read_run(folder / "run")
    state = json.loads((folder / "run" / "trainer_state.json").read_text())
    losses = {entry["step"]: entry["eval_loss"] for entry in run.log if "eval_loss" in entry}
    step, best = end_of(losses, 2)
    assert step < 20, losses
    assert run.record["stopped_early"] == {"step": step, "of": 20, "best_step": best, "weights_of_step": best}
    assert (state["global_step"], state["max_steps"]) == (step, 20)
    assert json.loads((folder / "run" / "exit.json").read_text()) == {"code": 0, "reason": "done"}
    assert run.audit["passed"]
    caplog.set_level(logging.INFO)
    assert main(["train", str(folder / "recipe.yaml")]) == 0
    assert "holds this run, finished: nothing to do" in caplog.text


def test_the_best_and_the_newest_checkpoint_are_kept_and_the_best_one_is_what_is_saved(folder):
    found = read_run(folder / "run").record["stopped_early"]
    kept = {path.name for path in (folder / "run").glob("checkpoint-*")}
    assert kept == {f"checkpoint-{found['best_step']}", f"checkpoint-{found['step']}"}
    best = load_file(folder / "run" / f"checkpoint-{found['best_step']}" / "model.safetensors")
    saved = load_file(folder / "run" / "model.safetensors")
    assert same(saved, best)


def test_report_card_and_comparison_say_where_it_stopped(folder, tmp_path):
    found = read_run(folder / "run").record["stopped_early"]
    where, since = f"stopped at step {found['step']} of 20", f"had not improved since step {found['best_step']}"
    for name in ("report.html", "README.md"):
        text = (folder / "run" / name).read_text(encoding="utf-8")
        assert where in text, name
        assert since in text, name
    compare_runs([str(folder / "run")], tmp_path / "comparison")
    notes = json.loads((tmp_path / "comparison" / "comparison.json").read_text())["notes"]
    assert f"run, seed 42: stopped early at step {found['step']} of 20." in notes


@pytest.mark.usefixtures("undrawn")
@pytest.mark.slow
def test_a_run_that_was_killed_after_it_had_stopped_writes_the_same_results_without_a_further_step(folder, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(folder / "run", run)
    for name in ("exit.json", "model.safetensors", "evaluation.json", "report.html"):
        (run / name).unlink()
    words = ["train", str(folder / "recipe.yaml"), "--output_dir", str(run), "--resume_from_checkpoint", "auto"]
    assert main(words) == 0
    assert same(load_file(run / "model.safetensors"), load_file(folder / "run" / "model.safetensors"))
    assert (run / "evaluation.json").read_bytes() == (folder / "run" / "evaluation.json").read_bytes()
    assert read_run(run).record["stopped_early"] == read_run(folder / "run").record["stopped_early"]
