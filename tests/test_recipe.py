"""Recipes: YAML and command-line words -> checked arguments, or one message with every mistake."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from partialtune.errors import RecipeError
from partialtune.recipe.parsing import parse_yaml
from partialtune.recipe.recipe import Recipe, read_recipe, recipe_from_values, write_recipe
from partialtune.training.resume_check import recipe_differences

GOOD = {
    "model_name_or_path": "builtin:lilliput",
    "text": ["builtin:python-docs"],
    "trainable": ["blocks[-2:]", "final_norm"],
    "output_dir": "outputs/first",
}


@pytest.fixture
def recipe_file(tmp_path, monkeypatch):
    """Writes a recipe of required keys, less those in `without`, and the YAML lines given; works in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def write(lines: str = "", without: tuple[str, ...] = ()) -> Path:
        file = tmp_path / "recipe.yaml"
        required = {key: value for key, value in GOOD.items() if key not in without}
        file.write_text((yaml.safe_dump(required, sort_keys=False) if required else "") + lines, encoding="utf-8")
        return file

    return write


def problems_of(file: Path, words=()) -> str:
    with pytest.raises(RecipeError) as caught:
        read_recipe(file, words)
    return str(caught.value)


# YAML lines after the required keys (or in place of those that they name), command-line words, what the message says.
BAD = [
    # unknown keys
    ("learning_rte: 5e-5", [], ["learning_rte: unknown key", "Did you mean learning_rate?"]),
    ("learning-rate: 5e-5", [], ["learning-rate", "Did you mean learning_rate?"]),
    ("zzz: 1", [], ["zzz: unknown key", "Take it out"]),
    ("1: 2", [], ["1: unknown key"]),
    ("~: 2", [], ["None: unknown key"]),
    ("yes: 2", [], ["True: unknown key"]),
    ("schedules: []", [], ["schedules: unknown key. Did you mean schedule?"]),
    # names from other versions and programs
    ("warmup_ratio: 0.05", [], ["warmup_ratio: unknown key", "warmup_steps: 0.05", "share"]),
    ("overwrite_output_dir: true", [], ["overwrite_output_dir", "resume_from_checkpoint: auto"]),
    ("logging_dir: logs", [], ["logging_dir", "TENSORBOARD_LOGGING_DIR"]),
    ("evaluation_strategy: steps", [], ["evaluation_strategy", "Write eval_strategy."]),
    ("epochs: 3", [], ["epochs", "Write num_train_epochs."]),
    ("batch_size: 3", [], ["batch_size", "Write per_device_train_batch_size."]),
    ("", ["--lr", "1e-3"], ["command line, lr: unknown key", "Write learning_rate."]),
    ("layers: 2", [], ["layers", "trainable: ['blocks[-2:]', final_norm]"]),
    # refused
    ("hub_token: hf_secret", [], ["hub_token: refused", "training_args.bin", "hf auth login"]),
    ("hub_strategy: end", [], ["hub_strategy: refused", "pushing is always off"]),
    ("ignore_data_skip: true", [], ["ignore_data_skip: refused", "other windows"]),
    ("save_only_model: true", [], ["save_only_model: refused", "cannot be resumed"]),
    ("auto_find_batch_size: true", [], ["auto_find_batch_size: refused", "gradient_accumulation_steps"]),
    ("do_train: true", [], ["do_train: refused", "partialtune train"]),
    ("remove_unused_columns: false", [], ["remove_unused_columns: refused"]),
    ("bf16_full_eval: true", [], ["bf16_full_eval: refused", "lose bits"]),
    ("optim: galore_adamw", [], ["optim: got 'galore_adamw'", "adamw_torch_fused", "parameter name"]),
    ("train_sampling_strategy: group_by_length", [], ["allowed: random or sequential", "one length"]),
    # wrong types
    ("max_steps: ten", [], ["max_steps: got 'ten'", "a whole number", "-1"]),
    ("max_steps: 1.5", [], ["max_steps: got 1.5", "a whole number"]),
    ("max_steps: true", [], ["max_steps: got true", "a whole number"]),
    ("seed: [1, 2]", [], ["seed: got [1, 2]"]),
    ("learning_rate: fast", [], ["learning_rate: got 'fast'", "a number, 0 or more", "default, 5e-05"]),
    ("learning_rate: {a: 1}", [], ["learning_rate: got {'a': 1}"]),
    ("learning_rate:", [], ["learning_rate: got null"]),
    ("bf16: maybe", [], ["bf16: got 'maybe'", "true, false or auto"]),
    ("bf16: 1", [], ["bf16: got 1", "true, false or auto"]),
    ("push_to_hub: 1", [], ["push_to_hub: got 1", "true or false"]),
    ("prompts: [yes, 'no']", [], ["prompts: got true as entry 1", "quotes", "booleans"]),
    ("run_name: 2024", [], ["run_name: got 2024", "quotes"]),
    ("eval_texts: {news: 3}", [], ["eval_texts: got 3 under news"]),
    ("eval_texts: [a.txt]", [], ["eval_texts: got ['a.txt']", "a mapping"]),
    ("text_cleaning: gutenburg", [], ["text_cleaning: got 'gutenburg'", "auto, gutenberg or none", "Did you mean gut"]),
    ("method: lorra", [], ["method: got 'lorra'", "partial, full or lora", "Did you mean lora?"]),
    ("lora_rank: 4", [], ["lora_rank: is for method: lora, and method is partial"]),
    ("method: lora\nlora_rank: 0", [], ["lora_rank: got 0", "1 or more"]),
    ("method: lora\nhead: untied", [], ["head: an adapter stands beside its base"]),
    ("method: lora\nschedule: [{from_step: 2, trainable: mlp}]", [], ["schedule: method lora trains its adapters"]),
    ("eval_strategy: epochs", [], ["eval_strategy: got 'epochs'", "no, steps or epoch", "Did you mean epoch?"]),
    ("lr_scheduler_type: cosin", [], ["lr_scheduler_type: got 'cosin'", "Did you mean cosine?"]),
    ("lr_scheduler_type: warmup_stable_decay", [], ["lr_scheduler_type: warmup_stable_decay needs num_decay_steps"]),
    ("lr_scheduler_type: cosine_with_min_lr", [], ["lr_scheduler_type: cosine_with_min_lr", "min_lr"]),
    (
        "lr_scheduler_type: warmup_stable_decay\nlr_scheduler_kwargs: {num_decay_step: 2}",
        [],
        ["lr_scheduler_kwargs: warmup_stable_decay does not know 'num_decay_step'", "Did you mean num_decay_steps?"],
    ),
    ("lr_scheduler_kwargs: {min_lr: 1e-6}", [], ["lr_scheduler_kwargs: linear does not know 'min_lr'", "takes none"]),
    (
        "lr_scheduler_type: polynomial\nlr_scheduler_kwargs: {lr_end: 1}",
        [],
        ["lr_scheduler_kwargs: polynomial: transformers says: lr_end"],
    ),
    (
        "lr_scheduler_type: reduce_lr_on_plateau\nlr_scheduler_kwargs: {patiens: 2}",
        [],
        ["lr_scheduler_kwargs: reduce_lr_on_plateau: transformers says", "patiens"],
    ),
    (
        "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: low}",
        [],
        ["lr_scheduler_kwargs: cosine_with_min_lr: transformers says"],
    ),
    ("optim_args: betas", [], ["optim_args: refused", "adam_beta1"]),
    ("metric_for_best_model: accuracy", [], ["metric_for_best_model: got 'accuracy'", "bits_per_byte"]),
    ("metric_for_best_model: eval_los", [], ["metric_for_best_model: got 'eval_los'", "Did you mean loss?"]),
    ("metric_for_best_model: loss\ngreater_is_better: true", [], ["greater_is_better: true: of loss, less is better"]),
    ("log_level: loud", [], ["log_level: got 'loud'", "passive"]),
    # impossible values
    ("learning_rate: .nan", [], ["learning_rate: got nan, which is not finite"]),
    ("learning_rate: 'inf'", [], ["learning_rate: got 'inf'"]),
    ("learning_rate: -5e-5", [], ["learning_rate: got -5e-05", "0 or more"]),
    (f"learning_rate: 1{'0' * 400}", [], ["learning_rate: got 1000"]),
    ("weight_decay: -1", [], ["weight_decay: got -1", "0 or more"]),
    ("per_device_train_batch_size: 0", [], ["per_device_train_batch_size: got 0", "1 or more"]),
    ("gradient_accumulation_steps: 0", [], ["gradient_accumulation_steps: got 0", "1 or more"]),
    ("num_train_epochs: 0", [], ["num_train_epochs: got 0", "more than 0"]),
    ("max_steps: 0", [], ["max_steps: got 0", "1 or more; -1"]),
    ("max_grad_norm: -0.5", [], ["max_grad_norm: got -0.5"]),
    ("warmup_steps: 1.5", [], ["warmup_steps: got 1.5", "share of the run below 1"]),
    ("logging_steps: 0", [], ["logging_steps: got 0", "whole steps from 1", "1 in runs of up to 200 steps"]),
    ("save_steps: 2.5", [], ["save_steps: got 2.5"]),
    ("save_total_limit: 0", [], ["save_total_limit: got 0"]),
    ("seed: -1", [], ["seed: got -1", "4,294,967,295"]),
    ("adam_beta2: 1.0", [], ["adam_beta2: got 1.0", "below 1"]),
    ("block_size: 1", [], ["block_size: got 1", "2 or more", "default, 256"]),
    ("window_stride: 0", [], ["window_stride: got 0", "1 or more"]),
    ("validation_share: 1", [], ["validation_share: got 1", "0 or more and below 1"]),
    ("validation_share: -0.1", [], ["validation_share: got -0.1"]),
    ("delta_steps: 0", [], ["delta_steps: got 0", "1 or more"]),
    ("dropout: 1.0", [], ["dropout: got 1.0", "model or a number"]),
    ("dropout: none", [], ["dropout: got 'none'", "model or a number"]),
    ("eval_texts: {validation: a.txt}", [], ["eval_texts: got {'validation': 'a.txt'}", "validation and training"]),
    ("eval_texts: {prompts: a.txt}", [], ["eval_texts: got {'prompts': 'a.txt'}", "prompts"]),
    ("prompts: ['']", [], ["prompts: got ['']", "none empty"]),
    ("text: []", [], ["text: got []", "one or more"]),
    ("text: ['a.txt', '']", [], ["text: got ['a.txt', '']", "none empty"]),
    ("model_name_or_path: ' '", [], ["model_name_or_path: got ' '", "not empty"]),
    ("output_dir: ''", [], ["output_dir: got ''", "not empty"]),
    ("output_dir: null", [], ["output_dir: got null"]),
    ("report_to: tensorbord", [], ["report_to: got 'tensorbord'", "Did you mean tensorboard?"]),
    ("resume_from_checkpoint: nowhere", [], ["resume_from_checkpoint: 'nowhere' does not exist", "auto"]),
    ("resume_from_checkpoint: recipe.yaml", [], ["'recipe.yaml' is a file"]),
    ("resume_from_checkpoint: true", [], ["resume_from_checkpoint: got true", "auto takes the newest"]),
    ("trainable: []", [], ["trainable: missing: nothing would train", "blocks[-2:]"]),
    ("trainable: [final_nrm]", [], ["trainable: entry 1, 'final_nrm'"]),
    ("trainable: ['blocks[']", [], ["trainable: entry 1, 'blocks['"]),
    ("trainable: [final_norm, '/h(/']", [], ["trainable: entry 2, '/h(/'"]),
    # contradictions
    ("max_steps: 5\nnum_train_epochs: 2", [], ["max_steps 5 and num_train_epochs 2", "Keep one"]),
    ("", ["--max_steps", "5", "--num_train_epochs", "2"], ["max_steps 5 and num_train_epochs 2"]),
    ("bf16: true\nfp16: true", [], ["fp16: bf16 is true as well"]),
    ("bf16: auto\nfp16: true", [], ["fp16: bf16 is auto as well"]),
    ("neftune_noise_alpha: 5\nprefix_cache: memory", [], ["prefix_cache: memory does not go with neftune_noise_alpha"]),
    ("method: lora\ncheckpoint_format: delta", [], ["checkpoint_format: delta: adapters are all"]),
    ("label_smoothing_factor: 0.1", [], ["label_smoothing_factor", "bits per byte"]),
    ("save_on_each_node: true", [], ["save_on_each_node", "every node"]),
    ("prefix_cache: tape", [], ["prefix_cache: got 'tape'", "auto, off, memory or disk"]),
    ("fast_paths: [los]", [], ["fast_paths: got 'los'", "loss, gelu or casts"]),
    ("window_sampling: random\nwindow_stride: 64", [], ["window_stride: is for window_sampling: chunked"]),
    ("validation_share: 0\neval_strategy: steps", [], ["eval_strategy: needs held-out text"]),
    ("method: full", [], ["trainable: method full trains everything"]),
    ("gradient_checkpointing: true\nactivation_checkpointing: true", [], ["former name of activation_checkpointing"]),
    ("save_strategy: best", [], ["save_strategy: best needs metric_for_best_model"]),
    ("dataloader_prefetch_factor: 2", [], ["dataloader_prefetch_factor: transformers says"]),
    ("load_best_model_at_end: true\nsave_strategy: epoch", [], ["load_best_model_at_end: transformers says"]),
    ("accelerator_config: {nonsense: 1}", [], ["transformers says", "nonsense"]),
    ('fsdp_config: {a: ["b", {c: "d\\0e"}]}', [], ["fsdp_config: got", "d\\x00e"]),
    ('prompts: ["a\\0b"]', [], ["prompts: got 'a\\x00b' as entry 1"]),
    # YAML 1.1 takes it for 90, base 60
    ("delta_steps: 1:30", [], ["delta_steps: got '1:30'", "a whole number"]),
    # duplicate keys
    ("seed: 1\nblock_size: 64\nseed: 2", [], ["seed: said twice, in lines 8 and 10"]),
    ("eval_texts: {a: x, a: y}", [], ["eval_texts.a: said twice, in line 8"]),
    (
        "lr_scheduler_kwargs:\n  a: 1\n  b: [{c: 1, c: 2}]",
        [],
        ["lr_scheduler_kwargs.b.entry 1.c: said twice, in line 10"],
    ),
    # command line
    ("", ["5"], ["command line, `5`: is no key", "--key value"]),
    ("", ["--"], ["`--`: is no key"]),
    ("", ["--max_steps"], ["max_steps: got no value"]),
    ("", ["--max_steps", "5", "6"], ["max_steps: got 2 words (5 6)"]),
    ("", ["--max_steps", "5", "-lr", "3"], ["max_steps: got 3 words", "two dashes: --lr"]),
    ("", ["--max_steps", "5", "--max-steps=6"], ["max_steps: said twice"]),
    ("", ["--eval_texts", "{a: b: c}"], ["eval_texts: is no valid YAML"]),
    ("", ["--eval_texts", "{a: x, a: y}"], ["eval_texts: a is said twice"]),
    ("", ["--trainable", "[blocks[-1], final_norm]"], ["trainable: is no valid YAML", "single quotes: 'blocks[-1]'"]),
    ("", ["--run", "x"], ["command line, run: unknown key"]),
    ("", ["--run_name", "caf\udce9"], ["run_name: got 'caf\\udce9'"]),
]


@pytest.mark.parametrize(
    ("lines", "words", "said"), BAD, ids=[lines or " ".join(words)[:40] for lines, words, _ in BAD]
)
def test_a_mistake_is_named_with_what_was_got_and_what_to_write(recipe_file, lines, words, said):
    taken = tuple(key for key in GOOD if lines.startswith(f"{key}:"))
    message = problems_of(recipe_file(lines, without=taken), words)
    for part in said:
        assert part in message
    assert message.startswith(f"{Path.cwd() / 'recipe.yaml'}: one problem. Nothing was loaded or written.\n  ")
    assert len(message.splitlines()) == 2 or "no valid YAML" in message, "one line a problem"


@pytest.mark.parametrize("key", GOOD)
def test_a_required_key_that_is_missing_is_asked_for(recipe_file, key):
    assert f"  {key}: missing" in problems_of(recipe_file("seed: 1", without=(key,)))


def test_all_mistakes_are_reported_at_once_with_their_lines_in_order(recipe_file):
    file = recipe_file("learning_rte: 1\nseed: -1\nhub_token: x\nseed: 3\nbf16: true\nfp16: true\n", without=("text",))
    message = problems_of(file, ["--max_steps", "few", "stray", "--block_size", "0", "--trainable", "nothing"])
    heads = [line.split(":")[0].strip() for line in message.splitlines()[1:]]
    assert heads == [
        "line 6, learning_rte",
        "line 8, hub_token",
        "line 9, seed",
        "line 11, fp16",
        "text",
        "command line, max_steps",
        "command line, block_size",
        "command line, trainable",
    ]
    assert "8 problems" in message


def test_a_refused_token_is_not_repeated(recipe_file):
    assert "hf_secret" not in problems_of(recipe_file("hub_token: hf_secret"))


UNREADABLE = [
    ("trainable:\n  - !head", ["Line 2, column 5", "- !head", "single quotes: '!head'"]),
    ("trainable: [blocks[-2:], final_norm]", ["Line 1, column 19", "single quotes: 'blocks[-2:]'"]),
    ("seed: 1\ntrainable: [/h\\.[0-9]+\\..*/, head]", ["Line 2", r"single quotes: '/h\.[0-9]+\..*/'"]),
    ("trainable: [all, !biases]\nseed: 1", ["line 1: trainable: [all, !biases]", "single quotes: '!biases'"]),
    ("text: *.txt", ["Line 1, column 8", "single quotes: '*.txt'"]),
    ("prompts: Note: this", ["Line 1, column 14", "colon and a blank"]),
    ("prompts:\n\t- a", ["Line 2, column 1", "no tabs"]),
    ("text: 'a.txt", ["Line 1", "quotes"]),
    ("a: 1\n--- \nb: 2", ["another document"]),
    ("a: \x00", ["Line 1", "#x0000"]),
    ("[" * 1200, ["no valid YAML"]),
    ("", ["is empty", "model_name_or_path"]),
    ("# nothing yet\n", ["is empty"]),
    ("- a\n- b", ["holds a list", "mapping"]),
    ("hello", ["holds a single value", "mapping"]),
]


@pytest.mark.parametrize(("text", "said"), UNREADABLE, ids=[text[:30] for text, _ in UNREADABLE])
def test_a_file_that_is_no_recipe_says_where_and_which_quotes_are_wanted(tmp_path, text, said):
    file = tmp_path / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    message = problems_of(file)
    for part in (str(file), *said):
        assert part in message


def test_a_missing_recipe_offers_the_nearest_names(tmp_path):
    (tmp_path / "quickstart.yaml").write_text("a: 1")
    assert f"Did you mean {tmp_path / 'quickstart.yaml'}?" in problems_of(tmp_path / "quikstart.yml")
    assert "holds quickstart.yaml" in problems_of(tmp_path / "zzz")
    assert "folder" in problems_of(tmp_path / "gone" / "a.yaml")


def test_a_folder_a_path_through_a_file_and_bytes_that_are_no_utf8_have_messages_of_their_own(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"text: a\nprompts: caf\xe9")
    assert "is a folder" in problems_of(tmp_path)
    assert "cannot be read" in problems_of(tmp_path / "latin.yaml" / "a.yaml")
    assert "not UTF-8 (byte 0xe9 in line 2)" in problems_of(tmp_path / "latin.yaml")


def test_a_recipe_becomes_arguments_for_every_stage(recipe_file):
    recipe = read_recipe(recipe_file("learning_rate: 5e-5\nmax_steps: 5\ndropout: 0.2\nhead: untied\nbf16: auto\n"))
    assert isinstance(recipe, Recipe)
    assert recipe.model.model_name_or_path == "builtin:lilliput"
    assert recipe.model.dropout == 0.2
    assert recipe.text.text == ["builtin:python-docs"]
    assert recipe.text.window_stride == 256
    assert recipe.freeze.trainable == ["blocks[-2:]", "final_norm"]
    assert recipe.freeze.head == "untied"
    assert len(recipe.evaluation.prompts) == 3
    assert recipe.training == {"learning_rate": 5e-5, "max_steps": 5, "bf16": "auto", "output_dir": "outputs/first"}
    assert recipe.resume is None


def test_nothing_is_written_and_no_process_state_is_made(recipe_file):
    from accelerate.state import PartialState

    before = dict(PartialState._shared_state)
    read_recipe(recipe_file("fsdp: true\nfsdp_config: {min_num_params: 3}"))
    assert PartialState._shared_state == before
    assert [entry.name for entry in Path.cwd().iterdir()] == ["recipe.yaml"]


def test_mappings_are_not_rewritten_by_the_check(recipe_file):
    recipe = read_recipe(recipe_file("fsdp: true\nfsdp_config: {fsdp_min_num_params: 3}"))
    assert recipe.training["fsdp_config"] == {"fsdp_min_num_params": 3}


QUIRKS = [
    ("learning_rate: 5e-5", "learning_rate", 5e-5),
    ("learning_rate: 1.0e5", "learning_rate", 1e5),
    ("learning_rate: '5e-5'", "learning_rate", 5e-5),
    ("learning_rate: 1", "learning_rate", 1.0),
    ("max_steps: 1e3", "max_steps", 1000),
    ("max_steps: 100.0", "max_steps", 100),
    ("logging_steps: 10", "logging_steps", 10),
    ("warmup_steps: 0.05", "warmup_steps", 0.05),
    ("eval_strategy: no", "eval_strategy", "no"),
    ("save_strategy: no", "save_strategy", "no"),
    ("prefix_cache: off", "prefix_cache", "off"),
    ("fast_paths: []", "fast_paths", []),
    ("fast_paths: gelu", "fast_paths", ["gelu"]),
    ("text_cleaning: none", "text_cleaning", "none"),
    ("bf16: no", "bf16", False),
    ("bf16: 'yes'", "bf16", True),
    ("bf16: auto", "bf16", "auto"),
    ("run_name: 2024-13-45", "run_name", "2024-13-45"),
    ("prompts: Hello", "prompts", ["Hello"]),
    ("prompts: ['no', '5']", "prompts", ["no", "5"]),
    ("prompts: []", "prompts", []),
    ("report_to: none", "report_to", "none"),
    ("save_total_limit: null", "save_total_limit", None),
    ("gradient_checkpointing: true", "activation_checkpointing", True),
    (
        "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 1e-6}",
        "lr_scheduler_kwargs",
        {"min_lr": 1e-6},
    ),
    (
        "lr_scheduler_type: warmup_stable_decay\nlr_scheduler_kwargs: {num_decay_steps: 2}",
        "lr_scheduler_kwargs",
        {"num_decay_steps": 2},
    ),
    ("metric_for_best_model: eval_bits_per_byte", "metric_for_best_model", "eval_bits_per_byte"),
    ("max_steps: -1\nnum_train_epochs: 2", "num_train_epochs", 2.0),
    ("optim: sgd", "optim", "sgd"),
    ("load_best_model_at_end: true\nlogging_steps: 30", "load_best_model_at_end", True),
    ("eval_texts: {news: a.txt}", "eval_texts", {"news": "a.txt"}),
]


@pytest.mark.parametrize(("lines", "key", "value"), QUIRKS, ids=[lines for lines, _, _ in QUIRKS])
def test_yaml_is_read_as_people_mean_it(recipe_file, lines, key, value):
    got = read_recipe(recipe_file(lines)).values[key]
    assert got == value
    assert type(got) is type(value)


WORDS = [
    (["--max_steps", "5"], "max_steps", 5),
    (["--max-steps=5"], "max_steps", 5),
    (["--max_steps", "-1"], "max_steps", -1),
    (["--learning_rate=5e-4"], "learning_rate", 5e-4),
    (["--trainable", "blocks[-1]", "!biases"], "trainable", ["blocks[-1]", "!biases"]),
    (["--trainable", "['blocks[-1]', final_norm]"], "trainable", ["blocks[-1]", "final_norm"]),
    (["--trainable", "head"], "trainable", ["head"]),
    (["--trainable=head", "final_norm"], "trainable", ["head", "final_norm"]),
    (["--text", "[ab]*.txt"], "text", ["[ab]*.txt"]),
    (["--prompts=--help", "yes", "5"], "prompts", ["--help", "yes", "5"]),
    (["--eval_texts", "{news: a.txt, old: 'b: c'}"], "eval_texts", {"news": "a.txt", "old": "b: c"}),
    (["--eval_texts", "news: a.txt"], "eval_texts", {"news": "a.txt"}),
    (["--bf16"], "bf16", True),
    (["--bf16", "auto"], "bf16", "auto"),
    (["--push_to_hub", "False"], "push_to_hub", False),
    (["--gradient-checkpointing"], "activation_checkpointing", True),
    (["--run_name", "2024"], "run_name", "2024"),
    (["--run_name", "no"], "run_name", "no"),
    (["--dropout", "0.1"], "dropout", 0.1),
    (["--window_stride", "null"], "window_stride", None),
    (["--save_steps", "0.25"], "save_steps", 0.25),
    (["--resume_from_checkpoint", "auto"], "resume_from_checkpoint", "auto"),
]


@pytest.mark.parametrize(("words", "key", "value"), WORDS, ids=[" ".join(words) for words, _, _ in WORDS])
def test_command_line_words_win_over_the_file(recipe_file, words, key, value):
    lines = "seed: 7\nwindow_stride: 64\nbf16: false\ndropout: 0.3\nprompts: [a]\nsave_steps: 50\nrun_name: file\n"
    values = read_recipe(recipe_file(lines), words).values
    assert values[key] == value
    assert type(values[key]) is type(value)
    assert values["seed"] == 7


def test_a_value_that_is_wrong_in_the_file_alone_does_not_matter_where_the_command_line_gives_another(recipe_file):
    assert read_recipe(recipe_file("max_steps: ten"), ["--max_steps", "5"]).training["max_steps"] == 5


def test_steps_on_the_command_line_take_the_place_of_epochs_in_the_file_and_the_other_way_round(recipe_file):
    by_epochs = recipe_file("num_train_epochs: 3")
    assert "num_train_epochs" not in read_recipe(by_epochs, ["--max_steps", "5"]).values
    assert read_recipe(by_epochs, ["--max_steps", "-1"]).training["num_train_epochs"] == 3
    by_steps = recipe_file("max_steps: 50")
    assert "max_steps" not in read_recipe(by_steps, ["--num_train_epochs", "1"]).values


def test_the_key_run_is_ignored(recipe_file):
    recipe = read_recipe(recipe_file("run:\n  versions: {a: 1, a: 2}\n  nonsense: true"))
    assert recipe.values == GOOD


def test_full_fine_tuning_needs_no_selectors(recipe_file):
    absent = read_recipe(recipe_file("method: full", without=("trainable",)))
    said = read_recipe(recipe_file("method: full"), ["--trainable", "all"])
    assert absent.freeze.trainable == said.freeze.trainable == ["all"]


def test_a_checkpoint_that_is_there_can_be_resumed_from(recipe_file):
    file = recipe_file()
    (file.parent / "checkpoint-10").mkdir()
    recipe = read_recipe(file, ["--resume_from_checkpoint", "checkpoint-10"])
    assert recipe.resume == "checkpoint-10"
    assert "resume_from_checkpoint" not in recipe.training


def test_values_from_python_are_checked_in_the_same_way(tmp_path):
    recipe = recipe_from_values({**GOOD, "output_dir": tmp_path / "run", "text": ("a.txt", "b.txt"), "run": {"x": 1}})
    assert recipe.path is None
    assert recipe.training == {"output_dir": str(tmp_path / "run")}
    assert recipe.text.text == ["a.txt", "b.txt"]
    with pytest.raises(RecipeError, match="The recipe: 2 problems"):
        recipe_from_values({**GOOD, "block_size": "x", "learning_rte": 1})


def test_what_is_wrong_with_the_file_is_said_before_transformers_is_imported(tmp_path):
    (tmp_path / "broken.yaml").write_text("trainable: [blocks[-1]]")
    code = (
        "import sys\nfrom partialtune.recipe.recipe import read_recipe\nfrom partialtune.errors import RecipeError\n"
        f"for name in ('gone.yaml', 'broken.yaml', ''):\n"
        f"    try: read_recipe({str(tmp_path)!r} + '/' + name)\n"
        "    except RecipeError: print('refused', 'transformers' in sys.modules or 'torch' in sys.modules)\n"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert output.stdout.splitlines() == ["refused False"] * 3


RICH = {
    **GOOD,
    "dropout": 0.1,
    "text_cleaning": "none",
    "validation_share": 0.05,
    "trainable": ["!biases", "/transformer\\.h\\.1\\..*/", "blocks[0,3:6,-1].mlp", "blocks[-2:]"],
    "eval_texts": {"python: docs": "builtin:python-docs", "no": "*.txt"},
    "prompts": ["yes", "5e-5", "2024-01-01", "Two\nlines: 'and' \"quotes\" – €", "#x", "12", "a " * 200 + "end"],
    "learning_rate": 5e-05,
    "adam_epsilon": 1e-08,
    "weight_decay": 0.0,
    "max_steps": 123,
    "bf16": "auto",
    "eval_strategy": "no",
    "run_name": "1e5",
    "save_total_limit": None,
    "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": {"min_lr": 1e-06},
}


def test_a_written_recipe_reads_back_as_the_same_recipe(tmp_path):
    first = recipe_from_values(RICH)
    run = {"versions": {"torch": "2.13.0"}, "text": [{"sha256": "12e4567", "bytes": 5}], "seconds": 1e-7}
    write_recipe(tmp_path / "recipe.yaml", first.values, run)
    again = read_recipe(tmp_path / "recipe.yaml")
    assert again.values == first.values
    assert (again.model, again.text, again.freeze, again.evaluation) == (
        first.model,
        first.text,
        first.freeze,
        first.evaluation,
    )
    assert again.training == first.training
    plain = yaml.safe_load((tmp_path / "recipe.yaml").read_text(encoding="utf-8"))
    assert plain == {**first.values, "run": run}, "another YAML 1.1 reader sees the same values and types"
    assert [entry.name for entry in tmp_path.iterdir()] == ["recipe.yaml"]


def test_a_written_recipe_is_readable_and_keeps_the_order_of_the_dataclasses(tmp_path):
    shared = ["a.txt"]
    values = {"max_steps": 5, "learning_rate": 5e-5, **GOOD, "text": shared, "prompts": shared}
    write_recipe(tmp_path / "recipe.yaml", values, {"precision": "fp32"})
    text = (tmp_path / "recipe.yaml").read_text(encoding="utf-8")
    assert text.splitlines()[1:] == [
        "model_name_or_path: builtin:lilliput",
        "text:",
        "  - a.txt",
        "trainable:",
        "  - blocks[-2:]",
        "  - final_norm",
        "prompts:",
        "  - a.txt",
        "output_dir: outputs/first",
        "max_steps: 5",
        "learning_rate: 5.0e-05",
        "run:",
        "  precision: fp32",
    ]
    assert text.startswith("# ")


SAME = [
    ({}, {}),
    ({}, {"output_dir": "elsewhere", "logging_steps": 3, "report_to": "tensorboard", "run_name": "x"}),
    ({}, {"push_to_hub": True, "hub_model_id": "a/b", "hub_private_repo": True, "resume_from_checkpoint": "auto"}),
    ({}, {"disable_tqdm": True, "log_level": "info", "run": {"x": 1}}),
    ({"max_steps": 10}, {"max_steps": 20}),
    ({}, {"block_size": 256, "window_stride": 256, "head": "tied", "learning_rate": 5e-5, "seed": 42, "data_seed": 42}),
    ({}, {"eval_strategy": "steps", "activation_checkpointing": False, "save_total_limit": None}),
    ({"method": "full", "trainable": ["all"]}, {"method": "full", "trainable": None}),
]


@pytest.mark.parametrize(("first", "second"), SAME)
def test_logging_pushing_resuming_more_steps_and_defaults_make_no_other_run(first, second):
    assert recipe_differences({**GOOD, **first}, {**GOOD, **second}) == []


OTHER = [
    ({"max_steps": 10}, {"max_steps": 5}, ["max_steps"]),
    ({"num_train_epochs": 2.0}, {"max_steps": 5}, ["num_train_epochs", "max_steps"]),
    ({}, {"learning_rate": 1e-3, "block_size": 128}, ["block_size", "window_stride", "learning_rate"]),
    ({}, {"trainable": ["final_norm"]}, ["trainable"]),
    ({}, {"text": ["other.txt"], "delta_steps": 5}, ["text", "delta_steps"]),
    ({"prompts": ["a"]}, {}, ["prompts"]),
    ({}, {"validation_share": 0.0}, ["validation_share", "eval_strategy"]),
    ({}, {"seed": 1}, ["data_seed", "seed"]),
    ({}, {"bf16": True}, ["bf16"]),
]


@pytest.mark.parametrize(("first", "second", "keys"), OTHER)
def test_what_changes_the_training_makes_another_run(first, second, keys):
    assert sorted(recipe_differences({**GOOD, **first}, {**GOOD, **second})) == sorted(keys)


def test_every_rule_is_about_a_field_that_trainingarguments_has():
    from partialtune.recipe.key_rules import (
        ALIASES,
        FORMER_NAMES,
        OTHER_DEFAULTS,
        REFUSED,
        TRAINING_BOUNDS,
        TRAINING_TYPES,
        recipe_types,
        training_defaults,
    )

    fields = set(training_defaults())
    ruled = {*TRAINING_BOUNDS, *TRAINING_TYPES, *REFUSED, *ALIASES, *ALIASES.values(), *OTHER_DEFAULTS}
    assert ruled <= fields
    assert not set(FORMER_NAMES) & set(recipe_types()), "a present key is called a former name"
    assert not set(TRAINING_BOUNDS) & set(REFUSED)


def test_every_default_of_trainingarguments_passes_the_checks(recipe_file):
    from partialtune.recipe.key_rules import ALIASES, REFUSED, training_defaults

    own = {*REFUSED, *ALIASES, "output_dir", "max_steps", "eval_steps"}
    defaults = {key: value for key, value in training_defaults().items() if key not in own}
    assert recipe_from_values({**GOOD, **defaults}).training.keys() == {*defaults, "output_dir"} - {
        "resume_from_checkpoint"
    }


def test_aliases_that_stand_for_billions_of_values_are_refused_at_once(tmp_path):
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join(['*' + chr(97 + n)] * 9)}]" for n in range(9)]
    (tmp_path / "recipe.yaml").write_text("\n".join(lines))
    with pytest.raises(RecipeError, match=r"aliases .* stand for 4,412,961,\d+ values; allowed are 100,000"):
        read_recipe(tmp_path / "recipe.yaml")


def test_a_whole_number_is_read_as_it_is_written_and_not_as_an_octal_one():
    values, _, _ = parse_yaml("a: 010\nb: 1_000\nc: 5e-5\nd: 0x10")
    assert values == {"a": "010", "b": 1000, "c": 5e-5, "d": "0x10"}
