"""Several processes give the answer of one: same losses, weights, deltas, audit, and one set of files."""

import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate import PartialState
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import partialtune as pt
from cluster import small_recipe, wait_for
from conftest import REPOSITORY, tiny_gpt2
from partialtune.cli import main
from partialtune.distributed import decided_by_main, done_together, first_on_each_node, peers_watched
from partialtune.engine.checkpoint_files import ASIDE, checkpoints_in, damage_of
from partialtune.errors import EndedElsewhere, InputError, Interrupted, RecipeError, code_of, disk_words, is_disk_fault
from partialtune.text.reading import read_texts
from partialtune.training.launch import check_engine
from test_download import Server
from two_processes import on_two_processes

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom. "


def recipe(folder: Path, name: str, batch: int, text: str) -> tuple[Path, Path]:
    """The file of a small recipe, and the folder of its run."""
    values = {
        "model_name_or_path": "builtin:lilliput",
        "text": text,
        "block_size": 32,
        "trainable": ["blocks[-1]", "final_norm"],
        "output_dir": str(folder / name),
        "max_steps": 4,
        "per_device_train_batch_size": batch,
        "learning_rate": 5e-5,
        "dataloader_drop_last": True,
        "save_steps": 2,
        "delta_steps": 2,
        "prompts": ["It was"],
        "prefix_cache": "memory",
    }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(values))
    return file, folder / name


def read(folder, name):
    return json.loads((folder / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One process with batch 8, two with batch 4 each, of a text on a server; the folders, and what was asked of it."""
    folder, server = tmp_path_factory.mktemp("distributed"), Server()
    url = server.serve("/text.txt", (TEXT * 150).encode())
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1")
        for name, batch in (("one", 8), ("two", 4)):
            patch.setenv("PARTIALTUNE_CACHE", str(folder / f"cache of {name}"))
            file, _ = recipe(folder, name, batch, url)
            if name == "one":
                assert main(["train", str(file)]) == 0
            else:
                config = REPOSITORY / "recipes" / "launch" / "cpu_two_processes.yaml"
                command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
                words = [*command, "-m", "partialtune", "train", str(file)]
                run = subprocess.run(words, capture_output=True, text=True, timeout=400)
                assert run.returncode == 0, run.stderr
            asked.append(len(server.requests) - sum(asked))
    server.http.shutdown()
    server.http.server_close()
    return SimpleNamespace(folder=folder, both=(folder / "one", folder / "two"), asked=asked)


@pytest.mark.slow
def test_two_processes_really_ran_and_found_each_other(runs):
    records = [yaml.safe_load((run / "recipe.yaml").read_text())["run"] for run in runs.both]
    assert [(record["processes"], record["distributed"]) for record in records] == [(1, "NO"), (2, "MULTI_CPU")]


@pytest.mark.slow
def test_both_started_from_kept_states_and_two_processes_shared_one_memory_of_them(runs):
    assert [read(run, "performance.json")["prefix_cache"] for run in runs.both] == ["memory", "memory"]
    assert not list(Path("/dev/shm").glob("partialtune-prefix-*"))


@pytest.mark.slow
def test_losses_weights_scores_and_audit_agree(runs):
    histories = [read(run, "trainer_state.json")["log_history"] for run in runs.both]
    losses = [[entry["loss"] for entry in history if "loss" in entry] for history in histories]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert len(losses[0]) == 4
    one, two = (dict(AutoModelForCausalLM.from_pretrained(run).named_parameters()) for run in runs.both)
    for name in one:
        difference = (one[name] - two[name]).detach().abs()
        if name.endswith("attn.c_attn.bias"):  # the keys' third: their gradient is zero, and AdamW scales its rounding
            difference = torch.cat([difference.chunk(3)[0], difference.chunk(3)[2]])
        assert float(difference.max()) <= 1e-5, name
    audits = [read(run, "audit.json") for run in runs.both]
    assert audits[0]["passed"] is audits[1]["passed"] is True
    assert audits[0]["frozen"] == audits[1]["frozen"]
    scores = [read(run, "evaluation.json")["validation"]["after"]["loss"] for run in runs.both]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)


@pytest.mark.slow
def test_deltas_agree_line_by_line(runs):
    one, two = ([json.loads(line) for line in (run / "weight_deltas.jsonl").open()] for run in runs.both)
    assert [(line["step"], line["name"]) for line in one] == [(line["step"], line["name"]) for line in two]
    for ours, theirs in zip(one, two, strict=True):
        assert theirs["l2_delta"] == pytest.approx(ours["l2_delta"], abs=1e-5), ours["name"]
    assert max(line["l2_delta"] for line in one) > 1e-3


@pytest.mark.slow
def test_insight_agrees(runs):
    one, two = (read(run, "insight.json") for run in runs.both)
    assert one["sampled_continuations"] == two["sampled_continuations"]
    assert one["next_token_shift"]["positions"] == two["next_token_shift"]["positions"] > 0
    assert one["next_token_shift"]["mean_bits"] == pytest.approx(two["next_token_shift"]["mean_bits"], abs=1e-4)
    ranks = [{e["name"]: e["effective_rank"] for e in insight["effective_ranks"]["matrices"]} for insight in (one, two)]
    assert len(ranks[0]) == 4
    assert ranks[0] == pytest.approx(ranks[1], rel=0.05)
    curves = [
        [
            entry["bits_per_byte/training"]
            for entry in read(run, "trainer_state.json")["log_history"]
            if "bits_per_byte/training" in entry
        ]
        for run in runs.both
    ]
    assert curves[0] == pytest.approx(curves[1], abs=1e-5)
    assert len(curves[0]) == 5


@pytest.mark.slow
def test_there_is_one_set_of_files(runs):
    names = [
        sorted(str(path.relative_to(run)) for path in run.rglob("*") if "rng_state" not in path.name)
        for run in runs.both
    ]
    assert names[0] == names[1]
    random_states = [sorted(path.name for path in run.rglob("checkpoint-4/rng_state*")) for run in runs.both]
    assert random_states == [["rng_state.pth"], ["rng_state_0.pth", "rng_state_1.pth"]]


@pytest.mark.slow
def test_the_text_was_fetched_once_and_lies_prepared_on_disk_for_the_others(runs):
    assert runs.asked == [1, 1]
    prepared = {name: (runs.folder / f"cache of {name}" / "prepared").rglob("*.json") for name in ("one", "two")}
    kinds = {name: {path.parent.name for path in paths} for name, paths in prepared.items()}
    assert kinds["one"] == {"scores"}  # one process keeps the text in memory
    assert kinds["two"] == {"scores", "texts", "tokens", "windows"}


@pytest.mark.slow
def test_two_processes_train_the_adapters_of_one(warm, tmp_path):
    adapters, text = {}, tmp_path / "text.txt"
    text.write_text(read_texts(["builtin:python-docs"])[0].text[:10_000])  # the rest would be scored, no more
    for processes, batch in ((1, 8), (2, 4)):
        file, run = recipe(tmp_path, f"lora on {processes}", batch, str(text))
        words = ["train", str(file), "--method", "lora", "--trainable", "blocks[-1].attention", "--prompts", "[]"]
        warm.start_all(words, processes)
        assert warm.end_all() == [0] * processes, warm.log.read_text()
        assert yaml.safe_load((run / "recipe.yaml").read_text())["run"]["processes"] == processes
        assert read(run, "audit.json")["passed"] is True
        adapters[processes] = load_file(run / "adapter_model.safetensors")
    assert adapters[1].keys() == adapters[2].keys()
    for name, one in adapters[1].items():
        assert float((one - adapters[2][name]).abs().max()) <= 1e-5, name


@pytest.mark.slow
def test_two_processes_train_adapters_beside_parts_as_one_does(warm, tmp_path):
    trained, text = {}, tmp_path / "text.txt"
    text.write_text(read_texts(["builtin:python-docs"])[0].text[:10_000])
    for processes, batch in ((1, 8), (2, 4)):
        file, run = recipe(tmp_path, f"lora and parts on {processes}", batch, str(text))
        words = ["train", str(file), "--lora", '{target: ["blocks[-1].attention"]}', "--prompts", "[]"]
        words += ["--trainable", "final_norm", "embeddings.tokens", "--prefix_cache", "off"]  # tied to the head
        warm.start_all(words, processes)
        assert warm.end_all() == [0] * processes, warm.log.read_text()
        assert yaml.safe_load((run / "recipe.yaml").read_text())["run"]["processes"] == processes
        assert read(run, "audit.json")["passed"] is True
        trained[processes] = load_file(run / "adapter_model.safetensors") | load_file(run / "delta.safetensors")
    assert trained[1].keys() == trained[2].keys()
    assert len(trained[1]) == 2 * 2 + 2 + 1
    for name, one in trained[1].items():
        assert float((one - trained[2][name]).abs().max()) <= 1e-5, name


# ---- when one of them fails -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_text_that_one_process_cannot_read_ends_all_of_them_in_seconds_with_its_message_once(warm, tmp_path):
    words = [*small_recipe(tmp_path), "--text", str(tmp_path / "missing.txt")]
    started, before = time.monotonic(), len(warm.log.read_text())
    warm.start_all(words, 2)
    assert warm.end_all() == [2, 2]
    assert time.monotonic() - started < 60
    said = warm.log.read_text()[before:]
    assert said.count("partialtune: There is no file") == 1
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


BEFORE = {"MULTI_CPU": [], "FSDP": ["fsdp_on_cpu:let_accelerate_shard"]}  # engine -> what its processes call first


@pytest.mark.slow
@pytest.mark.parametrize("engine", BEFORE)
def test_a_signal_to_one_process_lets_all_save_and_end_with_143(warm, tmp_path, engine):
    words = small_recipe(tmp_path, max_steps=3000, logging_steps=100, eval_strategy="no", save_steps=5)
    run = tmp_path / "run"
    processes = warm.start_all(words, 2, BEFORE[engine])
    wait_for((run / "checkpoint-5").is_dir, warm.parent)
    assert yaml.safe_load((run / "recipe.yaml").read_text())["run"]["distributed"] == engine
    os.kill(processes[1], signal.SIGTERM)
    assert warm.end_all() == [143, 143]
    assert read(run, "exit.json")["code"] == 143
    newest = checkpoints_in(run)[-1]
    assert damage_of(newest) == []
    assert len(list(newest.glob("rng_state_*.pth"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("killed", "engine"), [(0, "MULTI_CPU"), (1, "MULTI_CPU"), (1, "FSDP")])
def test_when_one_process_is_killed_the_other_ends_within_a_minute_in_words(warm, tmp_path, killed, engine):
    words = small_recipe(tmp_path, max_steps=3000, logging_steps=100, eval_strategy="no", save_steps=5, schedule=[])
    run, before = tmp_path / "run", len(warm.log.read_text())
    processes = warm.start_all(words, 2, BEFORE[engine])
    wait_for((run / "checkpoint-5").is_dir, warm.parent)
    assert yaml.safe_load((run / "recipe.yaml").read_text())["run"]["processes"] == 2
    assert yaml.safe_load((run / "recipe.yaml").read_text())["run"]["distributed"] == engine
    os.kill(processes[killed], signal.SIGKILL)
    sent = time.monotonic()
    codes = warm.end_all()
    assert time.monotonic() - sent < 60
    assert (codes[killed], codes[1 - killed]) == (-signal.SIGKILL, 1)
    said = warm.log.read_text()[before:]
    assert "Another process of this run ended" in said
    assert "Traceback" not in said
    if killed == 1:  # the main process writes the reason down
        assert "Another process" in read(run, "exit.json")["reason"]


def how_all_end() -> dict[str, list]:
    """Errors of one of two processes: what this one raises, its words and its exit code."""
    rank = PartialState(cpu=True).process_index

    def fail(on: int, error: Exception) -> None:
        if rank == on:
            raise error

    no_room = OSError(errno.ENOSPC, "No space left on device", "a.json")
    return {
        "the main one's disk": ended(decided_by_main, lambda: fail(0, no_room)),
        "the main one's own": ended(decided_by_main, lambda: fail(0, OSError(errno.ESTALE, "Stale file handle"))),
        "a bug of the main one": ended(decided_by_main, lambda: fail(0, KeyError("x"))),
        "a bug of the first of a node": ended(first_on_each_node, lambda: fail(0, KeyError("x"))),
        "the other one's disk": ended(done_together, lambda: fail(1, no_room)),
        "words of the other one": ended(done_together, lambda: fail(1, Interrupted("stopped", 143))),
        "a bug of the other one": ended(done_together, lambda: fail(1, ZeroDivisionError("by 0"))),
        "nothing": ended(done_together, lambda: fail(2, KeyError("x"))),
    }


def ended(together, make) -> list:
    try:
        together(make)
    except Exception as error:  # noqa: BLE001  (whatever it is, it is looked at)
        return [type(error).__name__, disk_words(error) if is_disk_fault(error) else str(error), code_of(error)]
    return []


@pytest.mark.slow
def test_an_error_of_one_process_whatever_it_is_ends_both_with_one_code_and_its_words_once():
    main_one, other = on_two_processes(how_all_end)
    full = "No space left on device: a.json. Make room on the disk, or name another folder."
    assert main_one["the main one's disk"] == ["OSError", full, 2]
    assert other["the main one's disk"] == ["EndedElsewhere", "", 2]
    assert main_one["the main one's own"][2] == other["the main one's own"][2] == 2
    for case in ("a bug of the main one", "a bug of the first of a node"):
        assert main_one[case] == ["KeyError", "'x'", 1]
        assert other[case] == ["EndedElsewhere", "", 1]
    assert main_one["the other one's disk"] == ["EndedElsewhere", full, 2]
    assert other["the other one's disk"] == ["EndedElsewhere", "", 2]
    assert main_one["words of the other one"] == ["EndedElsewhere", "stopped", 143]
    assert other["words of the other one"] == ["EndedElsewhere", "", 143]
    assert "failed, and says more: ZeroDivisionError: by 0" in main_one["a bug of the other one"][1]
    assert other["a bug of the other one"] == ["ZeroDivisionError", "by 0", 1]
    assert main_one["nothing"] == other["nothing"] == []


@pytest.mark.slow
def test_a_disk_that_is_full_for_one_process_ends_both_with_2_and_leaves_whole_checkpoints(warm, tmp_path):
    words = small_recipe(tmp_path, max_steps=3000, schedule=[], logging_steps=100, eval_strategy="no", save_steps=5)
    run, before = tmp_path / "run", len(warm.log.read_text())
    processes = warm.start_all(words, 2)
    wait_for((run / "checkpoint-5").is_dir, warm.parent)
    resource.prlimit(processes[0], resource.RLIMIT_FSIZE, (200_000, 200_000))  # the model has more
    assert warm.end_all() == [2, 2]
    said = warm.log.read_text()[before:]
    assert said.count("could not be saved") == 1
    assert "Traceback" not in said
    assert read(run, "exit.json")["code"] == 2
    assert not (run / ASIDE).exists()
    assert checkpoints_in(run)
    assert [damage_of(checkpoint) for checkpoint in checkpoints_in(run)] == [[]] * len(checkpoints_in(run))


@pytest.mark.slow
@pytest.mark.parametrize("engine", BEFORE)
def test_a_process_that_was_stopped_is_waited_for_as_long_as_ddp_timeout_and_the_other_ends_in_words(
    warm, tmp_path, engine
):
    words = small_recipe(
        tmp_path, max_steps=3000, logging_steps=100, eval_strategy="no", save_steps=5, ddp_timeout=10, schedule=[]
    )
    run, before = tmp_path / "run", len(warm.log.read_text())
    processes = warm.start_all(words, 2, BEFORE[engine])
    wait_for((run / "checkpoint-5").is_dir, warm.parent)
    assert yaml.safe_load((run / "recipe.yaml").read_text())["run"]["distributed"] == engine
    os.kill(processes[1], signal.SIGSTOP)
    wait_for((run / "exit.json").is_file, warm.parent, seconds=90)
    os.kill(processes[1], signal.SIGCONT)
    assert warm.end_all() == [1, 1]
    said = warm.log.read_text()[before:]
    assert "Another process of this run did not answer for 10 seconds (ddp_timeout)" in said
    # The one that woke up says it too: it hears of the closed connection, or that its own wait is over as well.
    assert len(re.findall("partialtune: Another process of this run (?:ended|did not answer)", said)) == 2
    assert "Traceback" not in said
    assert "did not answer for 10 seconds" in read(run, "exit.json")["reason"]


@pytest.mark.parametrize(
    "said",
    [
        "[gloo/transport/tcp/unbound_buffer.cc:129] Timed out waiting 20000ms for send operation to complete",
        "Application timeout caused pair closure",
        "Socket Timeout",
        "wait timeout after 20000ms, keys: /default_pg/0//cpu//0",
    ],
)
def test_whatever_way_a_wait_ends_in_it_is_said_in_the_same_words(said, monkeypatch):
    monkeypatch.setattr("partialtune.distributed._several", lambda: True)
    with pytest.raises(EndedElsewhere, match="did not answer for 20 seconds"), peers_watched(20):
        raise RuntimeError(said)


def test_an_error_that_is_no_lost_process_stays_what_it_is():
    with pytest.raises(RuntimeError, match="a bug"), peers_watched():
        raise RuntimeError("a bug")
    with pytest.raises(RuntimeError, match="Connection closed by peer"), peers_watched():
        raise RuntimeError("Connection closed by peer")  # one process has no peers
    assert EndedElsewhere("", 2).exit_code == 2


# ---- engines that are refused ---------------------------------------------------------------------------------------

CPU, GPU = torch.device("cpu"), torch.device("cuda")
ENGINES = {
    "plain": ({}, SimpleNamespace(device=CPU, fsdp=None), None),
    "FSDP1 by the launcher": (
        {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"},
        SimpleNamespace(device=GPU, fsdp=None),
        "FSDP version 1",
    ),
    "FSDP of no version": ({"ACCELERATE_USE_FSDP": "true"}, SimpleNamespace(device=GPU, fsdp=None), "FSDP version 1"),
    "FSDP2 by the launcher": (
        {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"},
        SimpleNamespace(device=GPU, fsdp=None),
        None,
    ),
    "FSDP2 that saves shards by default": (
        {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
        SimpleNamespace(device=GPU, fsdp=None),
        None,
    ),
    "FSDP2 that saves shards": (
        {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"},
        SimpleNamespace(device=GPU, fsdp=None),
        None,
    ),
    "FSDP2 that would save flat parameters": (
        {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "LOCAL_STATE_DICT"},
        SimpleNamespace(device=GPU, fsdp=None),
        "fsdp_state_dict_type is LOCAL_STATE_DICT. Allowed are SHARDED_STATE_DICT and FULL_STATE_DICT",
    ),
    "FSDP1 by the recipe": (
        {},
        SimpleNamespace(device=GPU, fsdp=True, fsdp_plugin_args={"fsdp_version": 1}),
        "FSDP version 1",
    ),
    "FSDP2 on a CPU": (
        {},
        SimpleNamespace(device=CPU, fsdp=True, fsdp_plugin_args={"fsdp_version": 2}),
        "FSDP needs GPUs",
    ),
}


@pytest.mark.parametrize("name", ENGINES)
def test_engines_that_hide_whole_parameters_are_refused(name, monkeypatch):
    environment, args, refusal = ENGINES[name]
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    if refusal is None:
        check_engine(args)
    else:
        with pytest.raises(InputError, match=refusal):
            check_engine(args)


def test_deepspeed_is_refused_by_attach_and_audited_too_also_where_accelerate_would_run_ddp_in_its_place(
    tmp_path, monkeypatch
):
    model = tiny_gpt2()
    plan = pt.plan_freeze(model, ["final_norm"])
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    trainer = Trainer(model=model, args=args)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")  # now: accelerate itself ends where DeepSpeed is not there
    with pytest.raises(RecipeError, match=r"attach: DeepSpeed .* Launch with recipes/launch/fsdp2\.yaml"):
        pt.attach(trainer, plan)
    engine = type("DeepSpeedEngine", (torch.nn.Sequential,), {})(model)
    with pytest.raises(RecipeError, match=r"audited: DeepSpeed is not supported at any stage"):
        pt.audited(engine, plan, torch.optim.AdamW(model.parameters()))
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, []),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, []),
        ({}, ["--fsdp", "full_shard", "--prefix_cache", "off"]),
    ],
)
def test_a_run_under_them_is_refused_before_anything_is_loaded(environment, words, tmp_path, monkeypatch, capfd):
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr("partialtune.recipe_run.prepare.load_tokenizer", lambda *args: pytest.fail("it was loaded"))
    file, run = recipe(tmp_path, "run", 4, "builtin:python-docs")
    assert main(["train", str(file), *words]) == 2
    assert not run.exists()
    err = capfd.readouterr().err
    assert "recipes/launch" in err or "FSDP" in err
