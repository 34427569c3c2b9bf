"""The whole run: what it must show, on the bundled model, on GPT-2's shape, and against a plain PyTorch loop."""

import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, Trainer

from conftest import EXCERPTS, REPOSITORY, SOURCES, gpt2_tokenizer, tiny_gpt2
from partialtune.cli import main
from partialtune.engine.trainer_overrides import TunedTrainer
from partialtune.scoring.evaluation import score_text, scored_text
from partialtune.text.reading import read_texts
from partialtune.text.tokenizing import tokenize_text
from partialtune.text.windows import random_windows, split_text
from partialtune.training import recipe_trainer, settings
from partialtune.training.training_data import collate_windows
from test_modeling import rename_to_hub

pytestmark = pytest.mark.contract

WHOLE_RUNS = True  # what `quick_runs` in conftest.py looks for
QUICKSTART = str(REPOSITORY / "recipes" / "quickstart.yaml")


def read(folder, name):
    return json.loads((folder / name).read_text(encoding="utf-8"))


def lines_of(folder):
    return [json.loads(line) for line in (folder / "weight_deltas.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """The quickstart, run to its end through the command line."""
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    assert main(["train", QUICKSTART, "--output_dir", str(folder)]) == 0
    return folder


@pytest.mark.slow
def test_quickstart_lowers_held_out_bits_per_byte_by_at_least_15_percent(quickstart):
    scores = read(quickstart, "evaluation.json")["validation"]
    assert scores["after"]["bits_per_byte"] <= 0.85 * scores["before"]["bits_per_byte"]


@pytest.mark.slow
def test_quickstart_keeps_every_bit_of_the_frozen_part_and_moves_every_trainable_parameter(quickstart):
    audit, plan = read(quickstart, "audit.json"), read(quickstart, "freeze_plan.json")
    assert audit["passed"] is True
    assert audit["frozen"]["l2_delta"] == 0.0
    assert audit["trainable"]["unmoved"] == []
    for entry in plan["parameters"]:
        assert (entry["sha256_before"] != entry["sha256_after"]) == entry["trainable"], entry["name"]
    last = max(line["step"] for line in lines_of(quickstart))
    assert last == 123
    for line in lines_of(quickstart):
        assert (line["l2_delta"] > 0) == line["trainable"], line


@pytest.mark.slow
def test_the_saved_model_reloads_with_the_digests_and_the_loss_of_the_run(quickstart):
    from partialtune.model.digests import digests

    model, tokenizer = AutoModelForCausalLM.from_pretrained(quickstart), AutoTokenizer.from_pretrained(quickstart)
    plan = {entry["name"]: entry["sha256_after"] for entry in read(quickstart, "freeze_plan.json")["parameters"]}
    assert digests(model) == plan
    source = read_texts(["builtin:python-docs"])[0]
    held_out = split_text(source.text, 0.1)[1]
    again = score_text(model, scored_text([held_out], [tokenize_text(held_out, tokenizer)], 256), 8, "reloaded")
    assert again["loss"] == pytest.approx(read(quickstart, "evaluation.json")["validation"]["after"]["loss"], abs=1e-5)


@pytest.mark.slow
def test_the_run_folder_holds_what_the_contract_names(quickstart):
    names = {path.name for path in quickstart.iterdir()}
    assert {
        *(
            "recipe.yaml",
            "freeze_plan.json",
            "audit.json",
            "weight_deltas.jsonl",
            "evaluation.json",
            "insight.json",
            "performance.json",
        ),
        *("trainer_state.json", "train_results.json", "model.safetensors", "config.json", "tokenizer.json"),
        *("figures", "report.html", "README.md", "exit.json"),
    } <= names
    assert "training_args.bin" not in names
    assert {path.name for path in (quickstart / "figures").iterdir()} == {
        *("loss.png", "learning_curves.png", "deltas_heatmap.png", "deltas_over_time.png", "deltas_over_steps.png"),
        *("moved_tokens.png", "next_token_shift.png"),
    }
    assert read(quickstart, "exit.json")["code"] == 0
    performance = read(quickstart, "performance.json")
    assert performance["tokens_per_second"] == pytest.approx(8 * 256 / performance["median_step_seconds"])
    assert performance["flops_per_step"] > 6 * 8 * 256 * 300_000
    assert 0 < performance["utilisation"] < 1.5  # of a rate that is measured for a fraction of a second
    assert sum(performance["time_shares"].values()) == pytest.approx(1)
    at_least_half = 62 * performance["median_step_seconds"]  # of 123 steps 62 took as long as the median or longer
    assert at_least_half <= performance["training_seconds"] < performance["run_seconds"]
    history = read(quickstart, "trainer_state.json")["log_history"]
    assert len([entry for entry in history if "loss" in entry]) == 123
    assert len([entry for entry in history if "eval_loss" in entry]) >= 10
    record = yaml.safe_load((quickstart / "recipe.yaml").read_text())["run"]
    assert record["precision"] == "fp32"
    assert len(record["sources"][0]["sha256"]) == 64


@pytest.mark.slow
def test_the_evaluation_follows_the_contract(quickstart):
    evaluation = read(quickstart, "evaluation.json")
    assert set(evaluation) == {"validation", "training", "prompts"}
    for moment in ("before", "after"):
        s = evaluation["validation"][moment]
        assert s["perplexity"] == pytest.approx(math.exp(s["loss"]))
        assert s["bits_per_byte"] == pytest.approx(s["loss"] / math.log(2) * s["text_tokens"] / s["bytes"])
        assert 0 < s["next_token_accuracy"] < s["top5_accuracy"] < 1
        assert evaluation["training"][moment]["tokens"] <= 256 * 255
    for prompt in evaluation["prompts"]:
        assert prompt["kl"] > 0
        assert len(prompt["before"]) == len(prompt["after"]) == 10
        assert prompt["continuation_before"] != prompt["continuation_after"]


@pytest.mark.slow
def test_insight_agrees_with_the_scores_and_the_deltas(quickstart):
    insight, scores = read(quickstart, "insight.json"), read(quickstart, "evaluation.json")["validation"]
    shift = insight["next_token_shift"]
    assert shift["positions"] == 64 * 255
    fall = (scores["before"]["loss"] - scores["after"]["loss"]) / math.log(2)
    assert shift["mean_bits"] == pytest.approx(fall, rel=0.03)  # 64 of the held-out windows
    assert shift["rose_share"] > 0.6
    (embedding,) = insight["moved_tokens"]["matrices"]
    assert embedding["tokens"] == 4096
    moved = {line["name"]: line for line in lines_of(quickstart) if line["step"] == 123}
    largest = max(token["l2_delta"] for token in embedding["most"])
    assert largest < moved["transformer.wte.weight"]["l2_delta"] < largest * 4096**0.5
    ranks = insight["effective_ranks"]["matrices"]
    assert [entry["name"] for entry in ranks] == ["transformer.wte.weight", "transformer.wpe.weight"]
    assert all(1 < entry["stable_rank"] <= entry["effective_rank"] <= 192 for entry in ranks)
    (before, after) = (insight["sampled_continuations"]["prompts"][0][side] for side in ("before", "after"))
    assert before != after
    curve = [
        entry for entry in read(quickstart, "trainer_state.json")["log_history"] if "bits_per_byte/training" in entry
    ]
    assert curve[0]["step"] == 0
    assert curve[-1]["step"] == 123
    assert curve[-1]["bits_per_byte/validation"] == pytest.approx(scores["after"]["bits_per_byte"], rel=1e-4)


@pytest.mark.slow
def test_report_makes_figures_and_page_again_from_the_files_of_the_run(quickstart, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(quickstart, copy, ignore=shutil.ignore_patterns("*.safetensors", "checkpoint-*", "*.html", "*.png"))
    assert main(["report", str(copy)]) == 0
    assert capsys.readouterr().out.strip() == str(copy / "report.html")
    pages = [(folder / "report.html").read_text(encoding="utf-8") for folder in (quickstart, copy)]
    assert pages[0] == pages[1]
    assert {path.name for path in (copy / "figures").iterdir()} == {p.name for p in (quickstart / "figures").iterdir()}


@pytest.mark.slow
def test_a_finished_run_is_not_repeated_and_a_changed_recipe_is_refused(quickstart, capsys):
    marks = {path: path.stat().st_mtime_ns for path in quickstart.rglob("*")}
    assert main(["train", QUICKSTART, "--output_dir", str(quickstart)]) == 0
    assert main(["train", QUICKSTART, "--output_dir", str(quickstart), "--block_size", "64"]) == 2
    assert "block_size" in capsys.readouterr().err
    assert marks == {path: path.stat().st_mtime_ns for path in quickstart.rglob("*")}


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_the_recipe_that_a_run_recorded_is_one_that_train_accepts(quickstart, tmp_path):
    words = ["--output_dir", str(tmp_path / "again"), "--max_steps", "1", "--validation_share", "0.01"]
    words += ["--block_size", "32", "--prompts", "The"]  # the same number of windows, of fewer tokens to score
    assert main(["train", str(quickstart / "recipe.yaml"), *words]) == 0


# ---- small runs -----------------------------------------------------------------------------------------------------

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness. "


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny GPT-2 with the bundled tokenizer."""
    from partialtune.builtin import builtin_folder

    folder = tmp_path_factory.mktemp("base")
    tokenizer = AutoTokenizer.from_pretrained(builtin_folder("builtin:lilliput"))
    tiny_gpt2(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(tmp_path, base):
    """A small recipe as words of the command line."""
    (tmp_path / "text.txt").write_text(TEXT * 80, encoding="utf-8")
    values = {
        "model_name_or_path": str(base),
        "text": str(tmp_path / "text.txt"),
        "block_size": 32,
        "trainable": ["blocks[-1]", "final_norm"],
        "output_dir": str(tmp_path / "run"),
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "prompts": ["It was"],
        "save_steps": 2,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    return str(tmp_path / "recipe.yaml")


def final_weights(folder):
    return dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())


@pytest.mark.usefixtures("undrawn")
def test_a_base_with_the_hubs_names_gives_the_same_run(recipe, tmp_path, base):
    hub = tmp_path / "hub"
    shutil.copytree(base, hub)
    rename_to_hub(hub)
    assert main(["train", recipe]) == 0
    assert main(["train", recipe, "--model_name_or_path", str(hub), "--output_dir", str(tmp_path / "run-hub")]) == 0
    ours, theirs = final_weights(tmp_path / "run"), final_weights(tmp_path / "run-hub")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert read(tmp_path / "run-hub", "audit.json")["passed"] is True


def test_an_untied_head_is_trained_saved_and_reloaded(recipe, tmp_path):
    assert main(["train", recipe, "--head", "untied", "--trainable", "final_norm", "head"]) == 0
    plan = read(tmp_path / "run", "freeze_plan.json")
    assert plan["backward_from"] == "transformer.ln_f.weight"
    reloaded = final_weights(tmp_path / "run")
    assert not torch.equal(reloaded["lm_head.weight"], reloaded["transformer.wte.weight"])
    assert read(tmp_path / "run", "audit.json")["trainable"]["unmoved"] == []
    insight = read(tmp_path / "run", "insight.json")
    assert [entry["component"] for entry in insight["moved_tokens"]["matrices"]] == ["head"]
    assert [entry["name"] for entry in insight["effective_ranks"]["matrices"]] == ["lm_head.weight"]


def test_a_base_in_fp64_is_refused_before_anything_is_written(recipe, tmp_path, base, capsys):
    wide = shutil.copytree(base, tmp_path / "wide")
    file = wide / "model.safetensors"
    save_file({name: tensor.double() for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    assert main(["train", recipe, "--model_name_or_path", str(wide)]) == 2
    message = capsys.readouterr().err
    assert "tensors in fp64, transformer.h.0.attn.c_attn.bias first" in message
    assert "from_pretrained(" in message
    assert "Traceback" not in message
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("undrawn")
def test_the_saved_config_is_that_of_the_base_and_verify_confirms_the_run(recipe, tmp_path, base, capsys):
    assert main(["train", recipe]) == 0
    config, config_before = read(tmp_path / "run", "config.json"), read(base, "config.json")
    assert {key: config[key] for key in config_before} == config_before
    assert not list((tmp_path / "run").rglob("training_args.bin"))
    assert main(["verify", str(base), str(tmp_path / "run")]) == 0
    assert main(["verify", str(base), str(tmp_path / "run"), "--trainable", "final_norm"]) == 3
    assert "transformer.h.2" in capsys.readouterr().err


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("bf16", "pays", "precision"), [("true", None, "bf16"), ("auto", True, "bf16"), ("auto", False, "fp32")]
)
def test_precision_is_the_recipes_or_measured_and_recorded(recipe, tmp_path, monkeypatch, bf16, pays, precision):
    monkeypatch.setattr(settings, "bf16_pays", lambda: pays)
    assert main(["train", recipe, "--bf16", bf16, "--max_steps", "2"]) == 0
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["run"]["precision"] == precision
    assert read(tmp_path / "run", "audit.json")["passed"] is True
    assert {parameter.dtype for parameter in final_weights(tmp_path / "run").values()} == {torch.float32}


def test_nothing_held_out_gives_no_validation_and_no_evaluation_during_training(recipe, tmp_path):
    assert main(["train", recipe, "--validation_share", "0"]) == 0
    assert "validation" not in read(tmp_path / "run", "evaluation.json")
    history = read(tmp_path / "run", "trainer_state.json")["log_history"]
    assert not any("eval_loss" in entry for entry in history)
    assert [entry["step"] for entry in history if "bits_per_byte/training" in entry] == list(range(9))
    assert read(tmp_path / "run", "insight.json")["next_token_shift"] is None
    assert "No text was held out" in (tmp_path / "run" / "report.html").read_text()


def test_further_texts_are_scored_before_and_after(recipe, tmp_path):
    (tmp_path / "other.txt").write_text("Quite another matter, told in other words. " * 100)
    assert main(["train", recipe, "--eval_texts", f"{{other: {tmp_path / 'other.txt'}}}"]) == 0
    scores = read(tmp_path / "run", "evaluation.json")["other"]
    assert scores["before"]["bytes"] == 4300
    assert scores["before"]["loss"] != scores["after"]["loss"]
    history = read(tmp_path / "run", "trainer_state.json")["log_history"]
    assert [entry["step"] for entry in history if "bits_per_byte/other" in entry] == list(range(9))
    assert read(tmp_path / "run", "insight.json")["learning_curves"]["windows"]["other"] <= 16


@pytest.mark.usefixtures("undrawn")
def test_full_fine_tuning_is_a_method(recipe, tmp_path):
    values = yaml.safe_load(Path(recipe).read_text())
    del values["trainable"]
    (tmp_path / "full.yaml").write_text(yaml.safe_dump({**values, "method": "full"}))
    assert main(["train", str(tmp_path / "full.yaml")]) == 0
    assert read(tmp_path / "run", "audit.json")["frozen"]["parameters"] == 0


def test_a_scheduled_run_from_the_command_line_and_a_checkpoint_of_other_layers_that_is_refused(
    recipe, tmp_path, capsys
):
    schedule = ["--schedule", "[{from_step: 4, trainable: [embeddings], learning_rate: 1e-4}]"]
    assert main(["train", recipe, *schedule]) == 0
    run, other = tmp_path / "run", tmp_path / "other"
    phases = [(p["from_step"], p["backward_from"]) for p in read(run, "freeze_plan.json")["phases"]]
    assert phases == [(0, "transformer.h.2.ln_1.weight"), (4, "transformer.wte.weight")]
    assert read(run, "audit.json")["trainable"]["unmoved"] == []

    go_on = ["--output_dir", str(other), "--resume_from_checkpoint", str(run / "checkpoint-2")]
    assert main(["train", recipe, "--trainable", "blocks[0]", *go_on]) == 2
    assert "checkpoint-2 does not fit: its optimizer holds 14 parameters" in capsys.readouterr().err
    assert not other.exists()
    assert main(["train", recipe, *schedule, *go_on]) == 0
    whole, again = final_weights(run), final_weights(other)
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_run_that_diverges_ends_with_4_and_keeps_its_checkpoints(recipe, tmp_path, capsys):
    assert main(["train", recipe, "--learning_rate", "1e30", "--max_grad_norm", "0"]) == 4
    assert "diverged" in capsys.readouterr().err
    assert read(tmp_path / "run", "exit.json")["code"] == 4


def test_a_launchers_precision_does_not_slip_past_what_was_measured(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(settings, "bf16_pays", lambda: False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert main(["train", recipe, "--bf16", "auto"]) == 2
    assert "The launcher says mixed precision bf16, the recipe no" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_changed_frozen_weight_ends_the_run_with_3_and_no_checkpoint_is_put_in_place(
    recipe, tmp_path, monkeypatch, capsys
):
    step = Trainer.training_step

    def with_fault(self, model, *rest):
        if self.state.global_step == 3:
            with torch.no_grad():
                self.model.transformer.h[0].mlp.c_fc.weight.view(torch.int32)[0, 0] ^= 1
        return step(self, model, *rest)

    monkeypatch.setattr(Trainer, "training_step", with_fault)
    assert main(["train", recipe]) == 3
    assert "transformer.h.0.mlp.c_fc.weight" in capsys.readouterr().err
    assert read(tmp_path / "run", "exit.json")["code"] == 3
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("number", "code", "frozen_changed"),
    [
        (signal.SIGTERM, 143, False),
        (signal.SIGUSR1, 143, False),
        (signal.SIGINT, 130, False),
        (signal.SIGTERM, 3, True),
    ],
)
def test_a_signal_during_warm_up_when_nothing_has_moved_ends_with_its_code_after_a_checkpoint(
    recipe, tmp_path, monkeypatch, number, code, frozen_changed
):
    step = Trainer.training_step

    def with_signal(self, model, *rest):
        if self.state.global_step == 1:
            os.kill(os.getpid(), number)
            if frozen_changed:
                with torch.no_grad():
                    self.model.transformer.wpe.weight.view(torch.int32)[0, 0] ^= 1
        return step(self, model, *rest)

    monkeypatch.setattr(Trainer, "training_step", with_signal)
    warm_up = ["--trainable", "/.*ln_.*weight/", "--learning_rate", "2e-5", "--warmup_steps", "2000"]
    assert main(["train", recipe, *warm_up]) == code
    run = tmp_path / "run"
    assert read(run, "exit.json")["code"] == code
    assert read(run, "audit.json")["passed"] is not frozen_changed
    assert read(run, "audit.json")["trainable"]["unmoved"], "otherwise nothing is tested here"
    assert (run / "checkpoint-2").is_dir() is not frozen_changed
    if number == signal.SIGTERM and not frozen_changed:
        monkeypatch.setattr(Trainer, "training_step", step)
        assert main(["train", recipe, *warm_up, "--resume_from_checkpoint", "auto"]) == 0


def test_a_frozen_weight_that_changed_in_the_last_step_ends_the_run_with_3_and_everything_else_is_written(
    recipe, tmp_path, monkeypatch, capsys
):
    save = TunedTrainer._save_checkpoint

    def with_fault(self, *rest):
        if self.state.global_step == self.state.max_steps:
            with torch.no_grad():
                self.model.transformer.h[0].mlp.c_fc.weight.view(torch.int32)[0, 0] ^= 1
        save(self, *rest)

    monkeypatch.setattr(TunedTrainer, "_save_checkpoint", with_fault)
    assert main(["train", recipe]) == 3
    assert "transformer.h.0.mlp.c_fc.weight" in capsys.readouterr().err
    run = tmp_path / "run"
    assert read(run, "exit.json")["code"] == 3
    assert read(run, "audit.json")["passed"] is False
    assert "validation" in read(run, "evaluation.json")
    assert (run / "report.html").is_file()


@pytest.mark.usefixtures("undrawn")
def test_the_best_model_is_what_is_saved_audited_and_measured(recipe, tmp_path):
    schedule = "[{from_step: 4, trainable: ['blocks[0].mlp'], learning_rate: 100.0}]"  # which spoils it
    assert main(["train", recipe, "--load_best_model_at_end", "true", "--schedule", schedule]) == 0
    run = tmp_path / "run"
    best = Path(read(run, "trainer_state.json")["best_model_checkpoint"])
    assert best.name in ("checkpoint-2", "checkpoint-4")
    kept, whole = final_weights(best), final_weights(run)
    assert all(torch.equal(kept[name], whole[name]) for name in whole)
    mlp = {f"transformer.h.0.mlp.{layer}.{part}" for layer in ("c_fc", "c_proj") for part in ("weight", "bias")}
    unmoved = read(run, "audit.json")["trainable"]["unmoved"]
    assert {entry["name"] for entry in unmoved} == mlp, "what the later phase trained is as in the base again"
    lines = lines_of(run)
    steps = [line["step"] for line in lines if line["name"] == "transformer.ln_f.weight"]
    assert steps == sorted(set(steps))
    assert {line["l2_delta"] for line in lines if line["step"] == steps[-1] and line["name"] in mlp} == {0.0}


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("metric", ["bits_per_byte", "eval_perplexity"])
def test_the_best_model_may_be_chosen_by_bits_per_byte_or_perplexity_of_which_less_is_better(recipe, tmp_path, metric):
    words = ["--load_best_model_at_end", "true", "--metric_for_best_model", metric, "--schedule", "[]"]
    assert main(["train", recipe, *words, "--max_steps", "4"]) == 0
    state = read(tmp_path / "run", "trainer_state.json")
    key = f"eval_{metric.removeprefix('eval_')}"
    found = {entry["step"]: entry[key] for entry in state["log_history"] if key in entry}
    assert state["best_metric"] == min(found.values())
    assert Path(state["best_model_checkpoint"]).name == f"checkpoint-{min(found, key=found.get)}"
    if metric == "bits_per_byte":
        scored = read(tmp_path / "run", "evaluation.json")["validation"]["after"]["bits_per_byte"]
        assert state["best_metric"] == pytest.approx(scored, rel=1e-5)


@pytest.mark.usefixtures("undrawn")
def test_a_learning_rate_that_follows_the_held_out_loss_needs_no_further_key(recipe, tmp_path):
    words = ["--lr_scheduler_type", "reduce_lr_on_plateau", "--schedule", "[]", "--max_steps", "2"]
    assert main(["train", recipe, *words]) == 0
    assert any("eval_loss" in entry for entry in read(tmp_path / "run", "trainer_state.json")["log_history"])


def test_bits_per_byte_of_no_held_out_text_choose_no_best_model(recipe, tmp_path, capfd):
    words = ["--metric_for_best_model", "bits_per_byte", "--validation_share", "0"]
    assert main(["train", recipe, *words]) == 2
    assert "there are none: nothing is held out" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_allowed_violation_is_written_and_the_run_ends_with_0(recipe, tmp_path, monkeypatch):
    step = Trainer.training_step

    def with_fault(self, model, *rest):
        with torch.no_grad():
            self.model.transformer.wpe.weight.add_(1e-3)
        return step(self, model, *rest)

    monkeypatch.setattr(Trainer, "training_step", with_fault)
    assert main(["train", recipe, "--allow_failed_audit", "true"]) == 0
    assert read(tmp_path / "run", "audit.json")["frozen"]["changed"] == ["transformer.wpe.weight"]


@pytest.mark.usefixtures("undrawn")
def test_more_steps_go_on_from_the_last_checkpoint_of_a_finished_run(recipe, tmp_path):
    assert main(["train", recipe, "--lr_scheduler_type", "constant"]) == 0
    more = ["--lr_scheduler_type", "constant", "--max_steps", "12", "--resume_from_checkpoint", "auto"]
    assert main(["train", recipe, *more]) == 0
    assert read(tmp_path / "run", "trainer_state.json")["global_step"] == 12
    assert sorted({line["step"] for line in lines_of(tmp_path / "run")}) == [8, 10, 12]


# ---- GPT-2's shape and the notebook's arithmetic --------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory):
    """GPT-2's 124M shape with random weights and its real tokenizer, in a file with the Hub's names and buffers."""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config())
    tensors = {name.removeprefix("transformer."): p.detach().clone() for name, p in model.named_parameters()}
    tensors |= {f"h.{block}.attn.bias": torch.tril(torch.ones(1, 1, 1024, 1024)) for block in range(12)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(folder)
    gpt2_tokenizer(SOURCES[-1]).save_pretrained(folder)  # the whole one, where it is
    return folder


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_the_main_job_runs_on_gpt2s_shape_with_the_real_book_and_tokenizer(gpt2_folder, tmp_path, monkeypatch):
    # what is scored before and after costs more than the two steps: few windows of it, and one prompt
    monkeypatch.setattr("partialtune.training.training_data.TRAINING_WINDOWS_SCORED", 1)
    gulliver = SOURCES[-1] / "gulliver" / "pg829_2025_utf8bom_crlf.txt"
    small = ["--max_steps", "2", "--per_device_train_batch_size", "1", "--save_strategy", "no", "--eval_strategy", "no"]
    words = ["--model_name_or_path", str(gpt2_folder), "--text", str(gulliver), "--output_dir", str(tmp_path / "run")]
    share = "0.05" if SOURCES[-1] == EXCERPTS else "0.015"
    scored = ["--validation_share", share, "--prompts", "My father had a small estate in Nottinghamshire"]
    recipe = str(REPOSITORY / "recipes" / "gpt2" / "gulliver.yaml")
    assert main(["train", recipe, *words, *small, *scored]) == 0
    plan = read(tmp_path / "run", "freeze_plan.json")
    assert (plan["trainable_parameters"], plan["total_parameters"]) == (39_385_344, 124_439_808)
    assert plan["ties"] == [["transformer.wte.weight", "lm_head.weight"]]
    audit = read(tmp_path / "run", "audit.json")
    assert audit["passed"] is True
    assert audit["frozen"] == {"parameters": 144, "changed": [], "l2_delta": 0.0}
    assert audit["trainable"]["l2_delta"] > 0
    prompt = read(tmp_path / "run", "evaluation.json")["prompts"][0]
    assert prompt["kl"] > 0


def test_raw_gulliver_has_158_345_tokens_and_cleaned_132_881(texts):
    tokenizer = gpt2_tokenizer(texts)
    gulliver = str(texts / "gulliver" / "pg829_2025_utf8bom_crlf.txt")
    counts = [len(tokenize_text(read_texts([gulliver], cleaning)[0].text, tokenizer)) for cleaning in ("none", "auto")]
    assert counts == ([11_445, 9_833] if texts == EXCERPTS else [158_345, 132_881])


@pytest.mark.usefixtures("undrawn")
def test_the_notebooks_recipe_and_a_plain_loop_end_with_the_same_weights(tmp_path, base, monkeypatch):
    """Same windows, same order, fp32: plain AdamW over what trains, model in eval mode, no clipping, constant rate."""
    batches = []

    def recorded(rows):
        batches.append(collate_windows(rows)["input_ids"])
        return collate_windows(rows)

    monkeypatch.setattr(recipe_trainer, "collate_windows", recorded)
    (tmp_path / "text.txt").write_text(TEXT * 300, encoding="utf-8")
    steps, batch, block = 20, 4, 32
    words = [
        "--model_name_or_path",
        str(base),
        "--text",
        str(tmp_path / "text.txt"),
        "--output_dir",
        str(tmp_path / "run"),
    ]
    words += ["--max_steps", str(steps), "--per_device_train_batch_size", str(batch), "--block_size", str(block)]
    words += ["--prompts", "It was", "--save_strategy", "no"]
    assert main(["train", str(REPOSITORY / "recipes" / "gpt2" / "notebook.yaml"), *words]) == 0

    tokenizer = AutoTokenizer.from_pretrained(base)
    text = (tmp_path / "text.txt").read_bytes().decode()
    windows = random_windows([tokenize_text(text, tokenizer)], block, seed=42)
    drawn = {tuple(row) for row in windows["input_ids"]}
    assert all(tuple(row) in drawn for X in batches for row in X.tolist())
    assert len(batches) >= steps
    model = AutoModelForCausalLM.from_pretrained(base)  # eval mode
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith("transformer.h."))
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=5e-5, weight_decay=0.01)
    losses = []
    for X in batches[:steps]:
        loss = model(X, labels=X).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    logged = [entry["loss"] for entry in read(tmp_path / "run", "trainer_state.json")["log_history"] if "loss" in entry]
    assert logged == pytest.approx(losses, abs=1e-5)
    ours, base_weights = final_weights(tmp_path / "run"), final_weights(base)
    for name, parameter in model.named_parameters():
        assert float((ours[name] - parameter).detach().abs().max()) <= 1e-6, name
        moved = float((parameter - base_weights[name]).detach().abs().max())
        assert (moved > 1e-4) == parameter.requires_grad, name  # the comparison is not one of unmoved weights
