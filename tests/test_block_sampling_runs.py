"""Blocks in turn from the command line: `train`, its files, `verify`, `apply`, `plan`, and what is refused."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from conftest import REPOSITORY, tiny_gpt2
from partialtune.builtin import builtin_folder
from partialtune.cli import main
from partialtune.cost.draw_costs import cost_of_draws, in_draw
from partialtune.cost.dry_step import dry_step
from partialtune.cost.forecast import forecast
from partialtune.engine.prefix_choice import choose_prefix
from partialtune.errors import RecipeError
from partialtune.freeze.plan import plan_freeze
from partialtune.freeze.recipe_plan import plan_before_text
from partialtune.recipe.recipe import read_recipe, recipe_from_values
from partialtune.recipe_run import train as stages
from test_recipes import model_of

LISA = {"blocks": 1, "every": 3, "order": "random", "keep_state": False}


def read(folder, name):
    return json.loads((folder / name).read_text(encoding="utf-8"))


def weights(folder):
    return dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())


def write_recipe(folder, **changes):
    """A small recipe of 5 blocks, of which one learns at a time."""
    tokenizer = AutoTokenizer.from_pretrained(builtin_folder("builtin:lilliput"))
    tiny_gpt2(n_layer=5, vocab_size=len(tokenizer)).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    text = " ".join(f"It was the age of wisdom {n}, it was the season of light {n * 5 % 7}." for n in range(150))
    (folder / "text.txt").write_text(text)
    values = {
        "model_name_or_path": str(folder / "base"),
        "text": str(folder / "text.txt"),
        "block_size": 32,
        "trainable": ["final_norm"],
        "block_sampling": LISA,
        "output_dir": str(folder / "run"),
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "prompts": [],
        "save_steps": 2,
        "seed": 1,
        **changes,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    return str(folder / "recipe.yaml")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lisa")
    assert main(["train", write_recipe(folder)]) == 0
    return folder / "run"


@pytest.fixture
def copied(run, tmp_path):
    """A copy of the run that may be changed."""
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run"


def drawn_in(run):
    return [json.loads(line) for line in (run / "block_draws.jsonl").read_text().splitlines()]


def test_a_run_writes_its_draws_and_its_plan_says_what_they_were_drawn_from(run):
    plan = read(run, "freeze_plan.json")
    assert plan["sampling"] == {**LISA, "candidates": [0, 1, 2, 3, 4], "seed": 1}
    draws = drawn_in(run)
    assert [draw["from_step"] for draw in draws] == [0, 3, 6]
    moved = {e["block"] for e in plan["parameters"] if e["sha256_before"] != e["sha256_after"]}
    assert moved == {None, *(block for draw in draws for block in draw["blocks"])}
    assert {entry["block"] for entry in plan["parameters"] if entry.get("in_turn")} == {0, 1, 2, 3, 4}
    audit = read(run, "audit.json")
    assert (audit["passed"], audit["resting"]) == (True, {"changed": []})
    origin = read(run / "checkpoint-2", "origin.json")
    assert origin["sampling"] == plan["sampling"]


def test_the_page_and_the_card_say_what_was_drawn(run):
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "Blocks in turn" in page
    assert "3 draws" in page
    assert "1 of 5 blocks (0 to 4) in turn, drawn at random from seed 1 every 3 steps" in page
    assert "final_norm, 1 blocks in turn" in page or "final_norm" in (run / "README.md").read_text(encoding="utf-8")


def test_verify_knows_the_draws_and_finds_a_block_that_was_never_drawn_and_moved(run, copied, capsys):
    base = str(run.parent / "base")
    assert main(["verify", base, str(run)]) == 0
    assert "3 draws of block" in capsys.readouterr().out
    never = min(set(range(5)) - {block for draw in drawn_in(run) for block in draw["blocks"]})
    model = AutoModelForCausalLM.from_pretrained(copied)
    name = f"transformer.h.{never}.mlp.c_fc.weight"
    with torch.no_grad():
        model.get_parameter(name).view(-1).view(torch.int32)[0] ^= 1
    model.save_pretrained(copied)
    plan = read(copied, "freeze_plan.json")
    for entry in plan["parameters"]:
        entry["sha256_after"] = None  # so that nothing but the draws tells
    (copied / "freeze_plan.json").write_text(json.dumps(plan))
    assert main(["verify", base, str(copied)]) == 3
    assert f"1 frozen parameter changed: {name} (1 of 4,096 values)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda lines: [lines[0].replace("[", "[9, "), *lines[1:]], "block_draws.jsonl, line 1, says"),
        (lambda lines: lines[:-1], "block_draws.jsonl has 2 draws, and the run's steps make 3"),
        (lambda lines: ["no json\n", *lines[1:]], "line 1, says"),
    ],
)
def test_a_record_that_disagrees_with_the_draws_of_the_plan_is_a_finding(run, copied, capsys, change, words):
    file = copied / "block_draws.jsonl"
    file.write_text("".join(change(file.read_text().splitlines(keepends=True))))
    assert main(["verify", str(run.parent / "base"), str(copied)]) == 3
    assert words in capsys.readouterr().err


def test_without_a_record_the_draws_follow_from_the_steps_and_without_both_every_candidate_may_have_moved(
    run, copied, capsys
):
    base = str(run.parent / "base")
    (copied / "block_draws.jsonl").unlink()
    assert main(["verify", base, str(copied)]) == 0
    assert "3 draws of block" in capsys.readouterr().out
    (copied / "trainer_state.json").unlink()
    assert main(["verify", base, str(copied)]) == 0
    assert "how many draws there were is not known" in capsys.readouterr().out


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("step", [2, 6])  # within a draw, and where one ends
def test_train_goes_on_from_a_checkpoint_with_the_same_bits_and_no_line_twice(run, tmp_path, step):
    recipe, other = str(run.parent / "recipe.yaml"), tmp_path / "other"
    go_on = ["--output_dir", str(other), "--resume_from_checkpoint", str(run / f"checkpoint-{step}")]
    assert main(["train", recipe, *go_on]) == 0
    whole, again = weights(run), weights(other)
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert drawn_in(other) == drawn_in(run)


def test_a_checkpoint_of_another_sampling_is_refused(run, tmp_path, capsys):
    recipe = str(run.parent / "recipe.yaml")
    go_on = ["--output_dir", str(tmp_path / "other"), "--resume_from_checkpoint", str(run / "checkpoint-2")]
    changed = yaml.safe_dump({**LISA, "every": 4}, default_flow_style=True).strip()
    assert main(["train", recipe, "--block_sampling", changed, *go_on]) == 2
    assert "block_sampling" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


@pytest.mark.usefixtures("undrawn")
def test_a_bit_that_changes_at_rest_ends_train_with_3(tmp_path, monkeypatch, capsys):
    class Flip(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 7:
                drawn = read_draws(tmp_path / "run")
                with torch.no_grad():
                    block = min(drawn[0] - drawn[2])
                    model.transformer.h[block].ln_1.bias.view(torch.int32)[0] ^= 1

    def read_draws(folder):
        return [set(draw["blocks"]) for draw in drawn_in(folder)]

    def make(*args, **kwargs):
        made = stages_make(*args, **kwargs)
        made.trainer.add_callback(Flip())
        return made

    stages_make = stages.make_trainer
    monkeypatch.setattr(stages, "make_trainer", make)
    assert main(["train", write_recipe(tmp_path)]) == 3
    assert "1 parameters changed while their block rested" in capsys.readouterr().err
    assert read(tmp_path / "run", "exit.json")["code"] == 3


@pytest.mark.usefixtures("undrawn")
def test_a_delta_holds_what_was_drawn_and_reads_back_in_a_fresh_process(tmp_path):
    recipe = write_recipe(tmp_path, checkpoint_format="delta")
    assert main(["train", recipe, "--output_dir", str(tmp_path / "delta")]) == 0
    assert main(["train", recipe, "--output_dir", str(tmp_path / "full"), "--checkpoint_format", "full"]) == 0
    code = (
        "import sys, torch, partialtune\n"
        "from transformers import AutoModelForCausalLM\n"
        "delta = dict(partialtune.load(sys.argv[1]).named_parameters())\n"
        "full = dict(AutoModelForCausalLM.from_pretrained(sys.argv[2]).named_parameters())\n"
        "assert all(torch.equal(delta[name], full[name]) for name in full)\n"
    )
    where = [str(tmp_path / "delta"), str(tmp_path / "full")]
    done = subprocess.run([sys.executable, "-c", code, *where], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert main(["verify", str(tmp_path / "base"), str(tmp_path / "delta")]) == 0


REFUSED = {
    "schedule": (
        {"schedule": [{"from_step": 2, "trainable": ["head"]}]},
        "block_sampling: does not go with a schedule",
    ),
    "full": ({"method": "full", "trainable": ["all"]}, "block_sampling: method full trains everything"),
    "lora": ({"method": "lora", "trainable": ["mlp"]}, "block_sampling: method lora trains its adapters"),
    "ddp": ({"ddp_find_unused_parameters": False}, "ddp_find_unused_parameters: false does not go with block_sampling"),
    "prefix": ({"prefix_cache": "memory"}, "prefix_cache: memory does not go with block_sampling"),
    "no number": ({"block_sampling": {"blocks": "two", "every": 3}}, "blocks: got 'two'; allowed: a whole number"),
    "no key": ({"block_sampling": {"block": 2, "every": 3}}, "unknown key block; .* Did you mean blocks?"),
    "too many": ({"block_sampling": {"blocks": 6, "every": 3}}, "blocks is 6, and .* has 5 candidates to draw from"),
    "no mapping": ({"block_sampling": 2}, "block_sampling: got 2; allowed: a mapping"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_does_not_go_with_is_exit_2_in_words(tmp_path, capsys, name):
    changes, words = REFUSED[name]
    assert main(["train", write_recipe(tmp_path, **changes)]) == 2
    assert re.search(words, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_block_sampling_may_stand_without_trainable(tmp_path):
    file = tmp_path / "recipe.yaml"
    given = {"model_name_or_path": "builtin:lilliput", "text": "a.txt", "output_dir": "out", "block_sampling": LISA}
    file.write_text(yaml.safe_dump(given))
    assert read_recipe(file).freeze.block_sampling == LISA
    file.write_text(yaml.safe_dump({**given, "block_sampling": {}}))
    with pytest.raises(RecipeError, match="trainable: missing"):
        read_recipe(file)


def test_no_prefix_is_kept_since_it_changes_from_draw_to_draw():
    model = tiny_gpt2(n_layer=5)
    plan = plan_freeze(model, [], block_sampling={**LISA, "candidates": ["blocks[3:]"]})
    (phase,) = choose_prefix("auto", plan, model)
    assert (phase.blocks, "change from draw to draw" in phase.reason) == (0, True)
    with pytest.raises(RecipeError, match="memory is impossible here: blocks learn in turn"):
        choose_prefix("memory", plan, model)


# ---- the forecast ---------------------------------------------------------------------------------------------------


def test_the_forecast_is_that_of_the_draw_that_costs_most_and_says_the_average():
    model = tiny_gpt2(n_layer=5)
    plan = plan_freeze(model, ["final_norm"], block_sampling={**LISA, "order": "ascending"})
    found = forecast(model, plan, 2, 16)
    lowest = dry_step(model, plan_freeze(model, ["blocks[0]", "final_norm"]), 2, 16)
    assert found.cost == lowest
    each = [dry_step(model, plan_freeze(model, [f"blocks[{n}]", "final_norm"]), 2, 16).products.total for n in range(5)]
    assert found.average_draw == sum(each) // 5
    assert "The figures are those of the draw that costs most, of block 0." in found.advice[0]
    assert found.to_json()["flops"]["average_draw"] == found.average_draw
    assert "average_draw" not in forecast(model, plan_freeze(model, ["final_norm"]), 2, 16).to_json()["flops"]


def test_the_forecast_counts_the_state_of_all_candidates_where_it_is_kept():
    model = tiny_gpt2(n_layer=5)

    def memory(keep_state):
        plan = plan_freeze(model, ["final_norm"], block_sampling={**LISA, "keep_state": keep_state})
        draws = cost_of_draws(plan, lambda one: dry_step(model, one, 2, 16))
        assert in_draw(plan, plan.phase_at(0)).trainable == list(plan.phase_at(0).trainable)
        return draws.largest.memory

    lost, kept = memory(False), memory(True)
    assert kept.optimizer - lost.optimizer == kept.peak - lost.peak
    assert kept.optimizer - lost.optimizer >= 4 * 12_704 * 8  # four blocks more, two numbers of 4 bytes a value
    assert (kept.gradients, kept.activations) == (lost.gradients, lost.activations)


def test_plan_shows_the_draws(tmp_path, capsys):
    assert main(["plan", write_recipe(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "1 of 5 blocks (0 to 4) in turn, drawn at random from seed 1 every 3 steps" in shown
    assert "the draw that costs most" in shown
    assert main(["plan", str(tmp_path / "recipe.yaml"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sampling"]["seed"] == 1


# ---- the page -------------------------------------------------------------------------------------------------------

PAGE = (REPOSITORY / "docs" / "what-may-learn.md").read_text(encoding="utf-8")
SECTION = PAGE[PAGE.index("\n## Blocks in turn\n") :].partition("\n## Blocks in turn\n")[2].partition("\n## ")[0]


def snippet(language):
    (found,) = re.findall(rf"```{language}\n(.*?)```", SECTION, re.DOTALL)
    return found


def test_the_recipe_of_the_page_draws_what_it_tells():
    given = {"model_name_or_path": "builtin:lilliput", "text": "a.txt", "output_dir": "out"}
    recipe = recipe_from_values({**given, **yaml.safe_load(snippet("yaml"))})
    plan = plan_before_text(tiny_gpt2(n_layer=12), recipe.freeze, recipe.seed)
    assert plan.always == ["transformer.ln_f.weight", "transformer.ln_f.bias"]
    assert (plan.sampling.blocks, plan.sampling.every, plan.sampling.order) == (2, 20, "random")
    assert not plan.sampling.keep_state


def test_the_code_of_the_page_runs_as_it_stands():
    ids = torch.randint(0, 96, (6, 2, 12), generator=torch.Generator().manual_seed(0))
    names = {"loader": [{"input_ids": one, "labels": one} for one in ids]}
    code = snippet("python").replace("openai-community/gpt2", str(builtin_folder("builtin:lilliput")))
    exec(compile(code, "docs/what-may-learn.md, Blocks in turn", "exec"), names)
    assert names["tuning"].steps == 6
    assert [names["plan"].sampling.draw(number) for number in (0, 1)] == [(0, 1), (2, 3)]


def test_the_recipes_say_how_much_learns_at_one_time():
    for name, at_one_time in (("gpt2/lisa.yaml", 14_177_280), ("frontier/lisa.yaml", 890_112)):
        path = REPOSITORY / "recipes" / name
        recipe = read_recipe(path)
        plan = plan_before_text(model_of(recipe.model.model_name_or_path), recipe.freeze, recipe.seed)
        sizes = {parameter.name: parameter.numel for parameter in plan.parameters}
        assert {sum(sizes[n] for n in plan.phase_at(step).trainable) for step in range(0, 80, 8)} == {at_one_time}
        assert f"{at_one_time:,}" in path.read_text(encoding="utf-8")
