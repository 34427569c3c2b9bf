"""Replay: windows of a second text in every optimizer step, the same on one process, on two, and after a resume."""

import json
import logging
from collections import Counter

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file

from conftest import REPOSITORY, tiny_gpt2
from partialtune.cli import main
from partialtune.compare.compare import compare_runs
from partialtune.errors import InputError, RecipeError, TrainingDiverged
from partialtune.freeze.plan import plan_freeze
from partialtune.net.addresses import same_sources, sources_without_secrets
from partialtune.pages.run_files import read_run
from partialtune.recipe.recipe import read_recipe, recipe_from_values, write_recipe
from partialtune.text.reading import read_texts
from partialtune.training.recipe_trainer import attached_trainer
from partialtune.training.replay import ReplayOrder, replay_order, replayed_a_step
from partialtune.training.run_origin import check_origin, read_origin
from partialtune.training.settings import run_length, steps_an_epoch, training_arguments
from partialtune.training.stopping import BatchWatch
from partialtune.training.training_data import TRAINING_WINDOWS_SCORED, collate_windows
from two_processes import on_two_processes

TEXTS, REPLAYED, BATCH, DRAWN = 20, 7, 8, 2  # 6 windows of the text a step: 4 steps an epoch, the last one filled up


def order_of(**changes):
    return ReplayOrder(**{"texts": TEXTS, "replayed": REPLAYED, "batch": BATCH, "drawn": DRAWN, "seed": 1, **changes})


def epoch_of(order, epoch):
    """The steps of an epoch, each an array of window numbers."""
    order.set_epoch(epoch)
    return np.array(list(order)).reshape(-1, order.batch)


# ---- the order ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_each_step_has_exactly_its_replayed_windows_and_an_epoch_has_each_window_of_the_text(epoch):
    order = order_of()
    steps = epoch_of(order, epoch)
    assert (len(order), steps.shape) == (32, (4, 8))
    assert ((steps >= TEXTS).sum(axis=1) == DRAWN).all()
    own = steps[steps < TEXTS]  # 24: the last step is filled up by the first four of the epoch
    assert sorted(own[:TEXTS]) == list(range(TEXTS))
    assert own[TEXTS:].tolist() == own[:4].tolist()


def test_the_replayed_text_goes_round_in_a_new_order_each_time_and_over_the_border_of_an_epoch():
    order = order_of()
    steps = np.concatenate([epoch_of(order, epoch) for epoch in range(7)])
    again = steps[steps >= TEXTS] - TEXTS  # 7 epochs x 4 steps x 2 = 8 passes of 7
    passes = again.reshape(8, REPLAYED).tolist()
    assert all(sorted(one) == list(range(REPLAYED)) for one in passes)
    assert len({tuple(one) for one in passes}) == 8


def test_the_order_depends_on_seed_and_epoch_alone():
    order, other = order_of(), order_of()
    late = epoch_of(other, 3)  # without the epochs before it
    assert all((epoch_of(order, epoch) == epoch_of(order_of(), epoch)).all() for epoch in range(3))
    assert (epoch_of(order, 3) == late).all()
    assert (epoch_of(order, 0) != epoch_of(order, 1)).any()
    assert (epoch_of(order, 0) != epoch_of(order_of(seed=2), 0)).any()


def test_a_sequential_order_takes_both_texts_as_they_are_and_drop_last_leaves_the_last_step_out():
    order = order_of(shuffled=False, drop_last=True)
    first, second = epoch_of(order, 0), epoch_of(order, 1)
    assert first.tolist()[0] == [0, 1, 2, 3, 4, 5, 20, 21]
    assert first[first < TEXTS].tolist() == second[second < TEXTS].tolist() == list(range(18))
    assert first[first >= TEXTS].tolist() == [20, 21, 22, 23, 24, 25]
    assert second[second >= TEXTS].tolist() == [26, 20, 21, 22, 23, 24]


def arguments(folder, **changes):
    settings = {"output_dir": str(folder), "use_cpu": True, "disable_tqdm": True, "report_to": "none"}
    return training_arguments({**settings, "per_device_train_batch_size": 4, "seed": 1, **changes})


@pytest.mark.parametrize(("share", "drawn"), [(0.01, 1), (0.2, 2), (0.25, 2), (0.5, 4), (0.9, 7), (0.93, 7)])
def test_a_step_replays_the_rounded_share_of_all_its_windows_and_at_least_one(tmp_path, share, drawn):
    args = arguments(tmp_path, gradient_accumulation_steps=2)
    assert replayed_a_step(share, args) == drawn == replay_order(20, 7, share, args).drawn


def test_a_share_that_leaves_no_window_of_the_text_is_refused_with_the_windows_of_a_step(tmp_path):
    with pytest.raises(RecipeError, match=r"share 0\.2 of a step's 1 windows is 1, .* 1 x gradient_acc.* 1 x 1 proc"):
        replayed_a_step(0.2, arguments(tmp_path, per_device_train_batch_size=1))
    with pytest.raises(RecipeError, match="dataloader_drop_last: 2 windows fill no step of 3 beside 1 replayed"):
        replay_order(2, 7, 0.2, arguments(tmp_path, dataloader_drop_last=True))


def test_the_length_of_a_run_counts_epochs_over_the_text(tmp_path):
    args = arguments(tmp_path, gradient_accumulation_steps=2, num_train_epochs=3)
    order = replay_order(TEXTS, REPLAYED, 0.25, args)
    assert (order.steps, steps_an_epoch(args, len(order)), run_length(args, len(order))) == (4, 4, 12)


# ---- the steps of a Trainer -----------------------------------------------------------------------------------------


class Recording:
    """A collator that notes the windows of each batch: each window is its own number, written sixteen times."""

    def __init__(self):
        self.batches = []

    def __call__(self, rows):
        self.batches.append([int(row["input_ids"][0]) for row in rows])
        return collate_windows(rows)


def trained(folder, checkpoint=None, **changes):
    """Train a tiny model for six steps, in epochs of four; the Trainer, and the windows of each batch of this process.

    The Trainer counts 20 windows of a text and 7 replayed ones.
    """
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1, "learning_rate": 0.01}
    args = arguments(folder, **{**settings, **changes})
    order = replay_order(TEXTS, REPLAYED, 0.25, args)
    windows = Dataset.from_dict({"input_ids": [[number] * 16 for number in range(TEXTS + REPLAYED)]})
    torch.manual_seed(1)
    model, record = tiny_gpt2(), Recording()
    plan = plan_freeze(model, ["blocks[-1]", "final_norm"])
    # dropout is on: the random numbers have to be those of a whole run, too
    made_of = {"plan": plan, "model": model, "args": args, "train_dataset": windows}
    run = attached_trainer(**made_of, order=order, data_collator=record)
    run.train(checkpoint)
    return run.trainer, record.batches


def flat(step):
    return sorted(number for batch in step for number in batch)


def global_steps(batches, each):
    """The sorted windows of each optimizer step, of which each process has `each` batches."""
    count = min(map(len, batches)) // each
    return [flat([batch for own in batches for batch in own[at * each : (at + 1) * each]]) for at in range(count)]


def batches_on_this_process(folder, batch, accumulation):
    return trained(folder, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation)[1]


def test_a_step_is_the_same_windows_however_they_are_accumulated(tmp_path):
    whole = global_steps([batches_on_this_process(tmp_path / "whole", 8, 1)], 1)[:6]
    parts = global_steps([batches_on_this_process(tmp_path / "parts", 2, 4)], 4)[:6]
    expected = [sorted(step.tolist()) for epoch in (0, 1) for step in epoch_of(order_of(), epoch)][:6]
    assert whole == parts == expected
    assert all(sum(number >= TEXTS for number in step) == DRAWN for step in whole)


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one_also_where_they_go_on_in_the_middle_of_an_epoch(tmp_path):
    expected = [sorted(step.tolist()) for epoch in (0, 1) for step in epoch_of(order_of(), epoch)][:6]
    found = on_two_processes(batches_on_this_process, tmp_path / "two", 4, 1)
    assert global_steps(found, 1)[:6] == expected
    later = on_two_processes(resumed_batches, tmp_path / "two", tmp_path / "two" / "checkpoint-5", 4, 1)
    assert global_steps(later, 1)[:1] == expected[5:]  # the second step of the second epoch


def resumed_batches(folder, checkpoint, batch, accumulation):
    changes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    return trained(folder, checkpoint, **changes)[1]


def test_a_run_that_goes_on_at_any_step_ends_with_the_same_bits(tmp_path):
    changes = {"gradient_accumulation_steps": 2}
    whole, batches = trained(tmp_path / "whole", **changes)
    wanted = {name: value.clone() for name, value in whole.model.state_dict().items()}
    for step in range(1, 7):  # 4 is the border of an epoch, 6 the end
        again, later = trained(tmp_path / f"from {step}", tmp_path / "whole" / f"checkpoint-{step}", **changes)
        assert again.state.global_step == 6
        assert all(torch.equal(value, wanted[name]) for name, value in again.model.state_dict().items()), step
        seen = global_steps([later], 2)
        assert seen[: 6 - step] == global_steps([batches], 2)[step:6], step


def test_samples_a_second_count_the_windows_of_the_epochs_and_not_the_data_set(tmp_path):
    trainer, _ = trained(tmp_path, max_steps=-1, num_train_epochs=2, gradient_accumulation_steps=2, save_strategy="no")
    assert trainer.state.max_steps == 8
    assert trainer.num_examples(trainer.get_train_dataloader()) == 32


def test_a_replayed_window_that_diverges_is_named_as_one(tmp_path):
    windows = Dataset.from_dict({"input_ids": [[number] * 4 for number in range(6)]})
    watch = BatchWatch(windows, texts=4)
    with pytest.raises(TrainingDiverged, match="in training windows 3, replay 1"):
        watch._stop([(torch.tensor([[3] * 4, [5] * 4]), torch.tensor(float("nan")))], 1, 0.1)


# ---- the recipe -----------------------------------------------------------------------------------------------------

BASE = {
    "model_name_or_path": "builtin:lilliput",
    "text": "builtin:python-docs",
    "trainable": ["final_norm"],
    "output_dir": "out",
}


def recipe_with(replay, **changes):
    return recipe_from_values({**BASE, "replay": replay, **changes})


def test_replay_is_converted_and_recorded_so_that_it_reads_again(tmp_path):
    recipe = recipe_with({"text": "old.txt", "share": "0.2"})
    assert recipe.text.replay == {"text": ["old.txt"], "share": 0.2}
    write_recipe(tmp_path / "recorded.yaml", recipe.values, {})
    assert read_recipe(tmp_path / "recorded.yaml").values == recipe.values
    words = ["--replay", "{text: [a.txt, b.jsonl], share: 0.5, text_column: body, text_cleaning: none}"]
    assert read_recipe(tmp_path / "recorded.yaml", words).text.replay == {
        "text": ["a.txt", "b.jsonl"],
        "share": 0.5,
        "text_column": "body",
        "text_cleaning": "none",
    }
    assert recipe_with({}).text.replay == {} == recipe_from_values(BASE).text.replay


MISTAKES = {
    "no share": ({"text": "a.txt"}, {}, ["replay: share is missing: give a number such as 0.2"]),
    "no text": ({"share": 0.2}, {}, ["replay: text is missing: give a text source"]),
    "share of 0": ({"text": "a", "share": 0}, {}, ["share: got 0; allowed: a number, more than 0 and below 1"]),
    "share of 1": ({"text": "a", "share": 1}, {}, ["share: got 1; allowed: a number, more than 0 and below 1"]),
    "share in words": ({"text": "a", "share": "some"}, {}, ["share: got 'some'"]),
    "empty text": ({"text": [], "share": 0.2}, {}, ["text: got []; allowed: a list, each entry text, one or more"]),
    "unknown key": (
        {"text": "a", "shares": 0.2},
        {},
        ["replay: unknown key shares; allowed are text, share, text_column, text_cleaning. Did you mean share?"],
    ),
    "unknown cleaning": ({"text": "a", "share": 0.2, "text_cleaning": "all"}, {}, ["text_cleaning: got 'all'"]),
    "no mapping": ("old.txt", {}, ["replay: got 'old.txt'; allowed: a mapping"]),
    "its name is taken": (
        {"text": "a", "share": 0.2},
        {"eval_texts": {"replay": "b.txt"}},
        ["eval_texts: the name replay is taken by the text that is replayed"],
    ),
    "split batches": (
        {"text": "a", "share": 0.2},
        {"accelerator_config": {"split_batches": True}},
        ["accelerator_config: split_batches does not go with replay"],
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_replay_is_named_with_what_is_allowed(name):
    replay, changes, words = MISTAKES[name]
    with pytest.raises(RecipeError) as caught:
        recipe_with(replay, **changes)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_further_text_may_be_called_replay_where_none_is_replayed():
    assert recipe_from_values({**BASE, "eval_texts": {"replay": "b.txt"}}).evaluation.eval_texts == {"replay": "b.txt"}


def test_the_address_of_a_replayed_text_is_written_down_without_its_secrets(tmp_path):
    whole = {"text": ["https://me:pw@host/a.txt?token=abc"], "share": 0.2}
    recipe = recipe_with(whole)
    write_recipe(tmp_path / "recorded.yaml", recipe.values, {})
    written = (tmp_path / "recorded.yaml").read_text()
    assert "pw" not in written
    assert "abc" not in written
    shown = sources_without_secrets(recipe.values)["replay"]
    assert shown == {"text": ["https://***@host/a.txt?token=***"], "share": 0.2}
    assert same_sources(shown, whole)
    assert not same_sources({**shown, "share": 0.3}, whole)
    with pytest.raises(InputError, match="Give the whole address again"):
        read_texts(shown["text"])


def test_the_recipes_of_the_repository_replay_their_share():
    for name, drawn in (("gpt2/replay", 3), ("frontier/replay", 1)):
        recipe = read_recipe(REPOSITORY / "recipes" / f"{name}.yaml")
        args = training_arguments({**recipe.training, "use_cpu": True})
        assert replayed_a_step(recipe.text.replay["share"], args) == drawn, name


# ---- a whole run ----------------------------------------------------------------------------------------------------

STORY = (REPOSITORY / "recipes" / "frontier" / "voyage_to_lilliput.txt").read_text(encoding="utf-8")
WORDS = ("times", "wisdom", "belief", "light", "hope", "despair", "winter", "spring")
TEXT = " ".join(f"It was the age of {WORDS[n % 8]} {n}, it was the season of {WORDS[n * 5 % 7]}." for n in range(120))


def write_recipe_of(folder, name, **changes):
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    if not (folder / "old.txt").exists():
        (folder / "old.txt").write_text(STORY[:6000], encoding="utf-8")
    values = {
        "model_name_or_path": "builtin:lilliput",
        "text": str(folder / "text.txt"),
        "block_size": 32,
        "trainable": ["blocks[-1]", "final_norm"],
        "replay": {"text": str(folder / "old.txt"), "share": 0.25},
        "output_dir": str(folder / name),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "prompts": ["It was"],
        "save_steps": 2,
        "eval_steps": 3,
    }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump({key: value for key, value in {**values, **changes}.items() if value is not None}))
    return str(file)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two runs: `with`, which replays, and `without`."""
    folder = tmp_path_factory.mktemp("replay")
    with pytest.MonkeyPatch.context() as patch:
        for module in ("figures", "report"):  # as in the fixture `undrawn`
            patch.setattr(f"partialtune.pages.{module}.render_figure", lambda *_, **__: b"not drawn")
        assert main(["train", write_recipe_of(folder, "with")]) == 0
        assert main(["train", write_recipe_of(folder, "without", replay=None)]) == 0
    return folder


def test_a_run_records_what_it_replayed_and_scores_it_before_and_after(folder):
    run = read_run(folder / "with")
    record = run.record["replay"]
    (source,) = record.pop("sources")
    assert (source["name"], source["bytes"]) == (str(folder / "old.txt"), len(STORY[:6000].encode()))
    training = run.record["windows"]["training"]
    assert record == {
        "windows": run.record["replay"]["windows"],
        "windows_a_step": 1,
        "of_a_step": 4,
        "steps_an_epoch": -(-training // 3),
    }
    assert list(run.texts) == ["validation", "training", "replay"]
    scored = run.texts["replay"]["before"]["tokens"]
    assert scored == min(record["windows"], TRAINING_WINDOWS_SCORED) * 31  # evenly spaced, each but for its first token
    assert any("bits_per_byte/replay" in entry for entry in run.log)
    assert run.audit["passed"]


def test_report_and_card_say_what_was_replayed_and_how_it_fared(folder):
    page, card = ((folder / "with" / name).read_text(encoding="utf-8") for name in ("report.html", "README.md"))
    for text in (page, card):
        assert "1 of the 4 windows of each step" in text
        assert "old.txt" in text
    assert "Bits per byte, replayed text" in page
    assert "Replayed text" in page
    assert "Replayed, so that less is forgotten: 1 of the 4 windows of each step were of" in card
    without = (folder / "without" / "report.html").read_text(encoding="utf-8")
    assert "eplayed" not in without


def test_a_run_without_replay_writes_no_word_of_it(folder):
    for name in ("recipe.yaml", "evaluation.json", "checkpoint-6/origin.json", "freeze_plan.json", "audit.json"):
        text = (folder / "without" / name).read_text(encoding="utf-8")
        assert "replay" not in text.replace(str(folder), ""), name  # the folder is called so


def test_a_finished_run_is_finished_until_its_replayed_text_changes(folder, capsys, caplog):
    file = str(folder / "with.yaml")
    caplog.set_level(logging.INFO)
    assert main(["train", file]) == 0
    assert "finished: nothing to do" in caplog.text
    (folder / "old.txt").write_text(STORY[:5999], encoding="utf-8")
    try:
        assert main(["train", file]) == 2
    finally:
        (folder / "old.txt").write_text(STORY[:6000], encoding="utf-8")
    assert "its text is not what it was" in capsys.readouterr().err


def test_a_checkpoint_of_another_replay_is_refused_with_what_differs(folder):
    checkpoint = folder / "with" / "checkpoint-2"
    saved, without = read_origin(checkpoint), read_origin(folder / "without" / "checkpoint-2")
    with pytest.raises(InputError) as caught:
        check_origin(checkpoint, saved, without)
    assert "replay: windows a step: 1 then, None now" in str(caught.value)
    with pytest.raises(InputError, match="replay: windows a step: None then, 1 now"):
        check_origin(checkpoint, without, saved)
    check_origin(checkpoint, saved, read_origin(folder / "with" / "checkpoint-6"))


@pytest.mark.usefixtures("undrawn")
@pytest.mark.slow
def test_a_resumed_run_ends_with_the_weights_of_the_whole_one(folder, tmp_path):
    words = ["train", str(folder / "with.yaml"), "--output_dir", str(tmp_path / "again")]
    assert main([*words, "--resume_from_checkpoint", str(folder / "with" / "checkpoint-4")]) == 0
    whole, again = (load_file(run / "model.safetensors") for run in (folder / "with", tmp_path / "again"))
    assert all(torch.equal(again[name], value) for name, value in whole.items())
    scores = [json.loads((run / "evaluation.json").read_text()) for run in (folder / "with", tmp_path / "again")]
    assert scores[0] == scores[1]


def test_runs_with_and_without_replay_are_compared(folder, tmp_path):
    rows = {row.name: row for row in compare_runs([str(folder / "with"), str(folder / "without")], tmp_path / "both")}
    assert rows["with"].change("replay") is not None
    assert rows["without"].change("replay") is None
    assert "Change on replay" in (tmp_path / "both" / "comparison.html").read_text(encoding="utf-8")


@pytest.mark.usefixtures("undrawn")
@pytest.mark.slow
@pytest.mark.parametrize("sampling", ["random", "chunked"])
def test_random_windows_and_a_text_that_is_replayed_beside_itself_train_and_the_latter_is_warned_of(
    tmp_path, caplog, sampling
):
    replay = {"text": str(tmp_path / "text.txt"), "share": 0.5}
    assert main(["train", write_recipe_of(tmp_path, "run", replay=replay, window_sampling=sampling)]) == 0
    assert "is the run's own text. Its held-out end is trained on as well" in caplog.text
    run = read_run(tmp_path / "run")
    assert run.record["replay"]["windows_a_step"] == 2


def test_a_step_of_one_window_has_no_room_and_nothing_is_written(tmp_path, capsys):
    file = write_recipe_of(tmp_path, "run", per_device_train_batch_size=1)
    assert main(["train", file]) == 2
    assert "none of the text is left" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_tokens_of_the_replayed_text_count_as_seen(tmp_path):
    from partialtune.model.loading import load_tokenizer
    from partialtune.training.training_data import data_of_recipe

    file = write_recipe_of(tmp_path, "run")
    recipe, tokenizer = read_recipe(file), load_tokenizer("builtin:lilliput")
    data = data_of_recipe(recipe, arguments(tmp_path), tokenizer)
    alone = data_of_recipe(read_recipe(write_recipe_of(tmp_path, "run", replay=None)), arguments(tmp_path), tokenizer)
    ids = Counter(tokenizer(STORY[:6000])["input_ids"])
    assert all(data.token_counts[token] - count == at(alone.token_counts, token) for token, count in ids.items())
    assert data.rows[len(data.train)]["input_ids"] == data.replay.windows[0]["input_ids"]
    assert alone.rows is alone.train


def at(counts, token):
    return counts[token] if token < len(counts) else 0
