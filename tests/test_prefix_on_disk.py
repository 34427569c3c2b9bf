"""The frozen prefix on disk: a later run computes none of it, and ends with the bits of a run that computes all."""

import hashlib
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn
from transformers import TrainingArguments

import partialtune as pt
from cluster import small_recipe
from conftest import some_windows, tiny_gpt2
from partialtune.cli import main
from partialtune.engine import prefix_facts as facts_module
from partialtune.engine import prefix_place
from partialtune.engine.forward_stack import put_on
from partialtune.engine.prefix_choice import PrefixPhase, choose_prefix, prefix_words
from partialtune.engine.prefix_facts import prefix_facts
from partialtune.engine.prefix_weights import prefix_digest
from partialtune.errors import ModelError, RecipeError
from partialtune.freeze.plan import plan_freeze
from partialtune.model.digests import digests
from partialtune.run_folder import read_json
from test_attach import run as run_attached
from test_no_logits import build
from test_prefix import kept_from_start, losses, padded, run
from two_processes import on_two_processes


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PARTIALTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def on_disk(blocks):
    return [PrefixPhase(0, blocks, "asked for", on_disk=True)]


def same_bits(a, b):
    pairs = zip(a.model.parameters(), b.model.parameters(), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


CASES = {
    "fp32": {},
    "bf16": {"bf16": True},
    "padded": {"collator": padded("right")},
    "tuples, one epoch": {"model": "gpt2", "max_steps": 5},
}


@pytest.mark.parametrize("case", CASES)
def test_a_second_run_computes_no_prefix_and_ends_with_the_same_bits(tmp_path, case):
    settings = {"trainable": ["blocks[-1]", "final_norm"], "max_steps": 7, **CASES[case]}
    name = settings.pop("model", "llama")
    blocks = 2 if name == "gpt2" else 1
    memory = run(tmp_path / "memory", build(name), prefix=kept_from_start(blocks), **settings)
    first = run(tmp_path / "first", build(name), prefix=on_disk(blocks), **settings)
    second = run(tmp_path / "second", build(name), prefix=on_disk(blocks), **settings)
    # the first loss of padded rows is computed from all of them, to see whether padding counts
    anew = 4 if case == "padded" else 0
    assert (first.fast.hits, first.fast.misses) == (memory.fast.hits, memory.fast.misses)
    assert (second.fast.hits, second.fast.misses) == (memory.fast.hits + memory.fast.misses - anew, anew)
    for other in (memory, first):
        assert losses(second) == losses(other)
        assert same_bits(second, other)


def test_another_rate_seed_and_head_start_from_the_same_states_and_all_is_as_without(tmp_path):
    run(tmp_path / "first", build("llama"), prefix=on_disk(1), trainable=["blocks[-1]"])
    changed = {"learning_rate": 1e-4, "seed": 5, "data_seed": 5, "trainable": ["head"], "head": "untied"}
    other = run(tmp_path / "other", build("llama"), prefix=on_disk(1), **changed)
    plain = run(tmp_path / "plain", build("llama"), **changed)
    assert (other.fast.misses, other.fast.kept_bytes) == (0, 0)
    assert losses(other) == losses(plain)
    assert same_bits(other, plain)


def test_auto_takes_the_disk_where_states_cost_much_or_do_not_fit_and_there_is_room(monkeypatch):
    free = {"memory": 2**40, "disk": 2**40, "rate": 2.0**30}
    monkeypatch.setattr(prefix_place, "free_memory", lambda: free["memory"])
    monkeypatch.setattr(prefix_place, "free_on_disk", lambda: free["disk"])
    monkeypatch.setattr(prefix_place, "writing_rate", lambda: free["rate"])
    monkeypatch.setattr(prefix_place, "measure", lambda *_: prefix_place.Cost(2**10, 1e-3))
    model = tiny_gpt2()
    plan = plan_freeze(model, ["blocks[-1]"])

    def chosen(count, come_again=True, wanted="auto"):
        (phase,) = choose_prefix(wanted, plan, model, rows=prefix_place.Rows(count, 2**10, come_again))
        assert phase.blocks == 2
        return phase

    large = chosen(1000)  # 1,024 s to compute, 1 GB
    assert large.on_disk
    assert "later runs start from them, too: about 1.0 GB, 1024 s to compute and 1 s to write" in large.reason
    assert "states behind 2 blocks are kept on disk" in prefix_words([large])
    assert large.to_json()["on_disk"] is True
    small = chosen(20)  # 20 s
    assert small.to_json() == {"from_step": 0, "blocks": 2, "reason": "rows that come again start from them"}
    assert not chosen(1000, come_again=False).on_disk
    assert chosen(20, come_again=False, wanted="disk").on_disk
    free["memory"] = 2**20
    assert "they do not fit the 0.0 GB of memory" in chosen(20).reason
    free["rate"] = 2.0**19  # 39 s to write what takes 20 s to compute
    assert not chosen(20).on_disk
    free["memory"], free["rate"] = 2**40, 2.0**22  # 10 times as fast as to compute would be 6.7 s: it takes 250 s
    assert not chosen(1000).on_disk
    free["rate"], free["disk"] = 2.0**30, 2**30
    assert not chosen(1000).on_disk
    free["disk"] = 2**40
    monkeypatch.setenv("PARTIALTUNE_PREFIX_GB", "0.5")
    assert not chosen(1000).on_disk


def test_what_a_row_costs_is_measured_and_how_many_there_are_is_read_from_the_data(monkeypatch):
    cost = prefix_place.measure(tiny_gpt2(), 2)
    assert cost.size == 32 * 4
    assert 0 < cost.seconds < 1
    assert prefix_place.measure(tiny_gpt2(), 2, bf16=True).size == 32 * 2
    assert prefix_place.writing_rate() > 2**10
    args = TrainingArguments(use_cpu=True, num_train_epochs=1, per_device_train_batch_size=4, eval_strategy="epoch")
    of_run = partial(prefix_place.rows_of_run, args, some_windows(20), some_windows(6))
    assert of_run() == (26, 16, False)
    args.max_steps = 6
    assert of_run() == (26, 16, True)
    assert prefix_place.rows_of_run(args, some_windows(20).to_iterable_dataset()) is None
    monkeypatch.setenv("PARTIALTUNE_PREFIX_GB", "some")
    model = tiny_gpt2()
    with pytest.raises(RecipeError, match="PARTIALTUNE_PREFIX_GB is 'some'"):
        choose_prefix("disk", plan_freeze(model, ["blocks[-1]"]), model)


# ---- all doors ------------------------------------------------------------------------------------------------------


def counted(tuning):
    return tuning.fast.hits, tuning.fast.misses


def test_attach_and_audited_start_from_what_an_earlier_run_kept(tmp_path):
    options = {"attach_options": {"prefix_cache": "disk"}}
    first, tuning = run_attached(tmp_path / "a", True, **options)
    assert counted(tuning) == (24, 12)
    second, tuning = run_attached(tmp_path / "b", True, **options)
    assert counted(tuning) == (36, 0)
    assert same_bits(first, second)
    assert tuning.audit.passed

    def loop(prefix_cache):
        model = build("llama").train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        ids = torch.tensor(some_windows(4)["input_ids"])
        plan = plan_freeze(model, ["blocks[-1]"])
        with pt.audited(model, plan, optimizer, prefix_cache=prefix_cache) as tuning:
            for _ in range(3):
                model(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        return model, tuning

    (plain, none), (kept, some), (again, all_of_them) = loop("off"), loop("disk"), loop("disk")
    assert [counted(one) for one in (none, some, all_of_them)] == [(0, 0), (8, 4), (12, 0)]
    for model in (kept, again):
        assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True))


def test_a_cache_that_cannot_be_written_is_a_warning_and_memory_does(tmp_path, cache, caplog):
    cache.mkdir()
    (cache / "prefix").write_text("a file where a folder belongs")
    kept = run(tmp_path / "run", build("llama"), ["blocks[-1]"], on_disk(1))
    assert "are kept in memory, and not on disk" in caplog.text
    assert (kept.fast.hits, kept.fast.misses) == (3 * 4 + 3 * 6 - 6, 20 + 6)


def as_one_of_two(folder, cache, name):
    os.environ["PARTIALTUNE_CACHE"] = cache
    changes = {"per_device_train_batch_size": 2, "attach_options": {"prefix_cache": "disk"}}
    trainer, tuning = run_attached(folder / name, True, **changes)
    return counted(tuning), [values.tolist() for values in trainer.model.parameters()]


@pytest.mark.slow
def test_two_processes_share_what_they_fill_and_find_it_in_the_next_run(tmp_path, cache):
    first, second = (on_two_processes(as_one_of_two, tmp_path, str(cache), name) for name in "ab")
    assert [sum(numbers) for numbers in zip(*(one[0] for one in first), strict=True)] == [24, 12]
    assert [one[0] for one in second] == [(18, 0), (18, 0)]
    assert first[0][1] == first[1][1] == second[0][1] == second[1][1]


@pytest.mark.slow
def test_a_fresh_process_goes_on_from_the_disk_by_the_command_line(tmp_path, undrawn):
    words = small_recipe(tmp_path, schedule=[], max_steps=20, save_strategy="no", prefix_cache="disk")
    outputs = {name: ["--output_dir", str(tmp_path / name)] for name in ("memory", "first", "second")}
    assert main([*words, *outputs["memory"], "--prefix_cache", "memory"]) == 0
    assert main([*words, *outputs["first"]]) == 0
    command = [sys.executable, "-m", "partialtune", *words, *outputs["second"]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "states behind 2 blocks are kept on disk" in done.stderr
    digests_of = {name: file_digest(tmp_path / name / "model.safetensors") for name in outputs}
    assert len(set(digests_of.values())) == 1
    assert [read_json(tmp_path / name / "performance.json")["prefix_cache"] for name in outputs] == [
        "memory",
        "disk",
        "disk",
    ]
    record = yaml.safe_load((tmp_path / "second" / "recipe.yaml").read_text())["run"]["prefix_cache"]
    assert [(phase["blocks"], phase["on_disk"]) for phase in record] == [(2, True)]
    assert "on_disk" not in (tmp_path / "memory" / "recipe.yaml").read_text()


def file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ---- what states depend on ------------------------------------------------------------------------------------------


def facts_of(model, blocks=1, **changes):
    return prefix_facts(model, blocks, prefix_digest(model, blocks, digests(model)), **changes)


def another_norm(model):
    model.config.rms_norm_eps = 1e-3


def another_rotation(model):
    model.model.rotary_emb.inv_freq *= 1.5  # a buffer that is not saved


def a_patch(model):
    put_on(model.model.layers[0].mlp, lambda forward, x: 1.25 * forward(x))


def other_code(model):
    class Mlp(type(model.model.layers[0].mlp)):
        def forward(self, x):
            return super().forward(x)

    model.model.layers[0].mlp.__class__ = Mlp


def eager(model):
    model.set_attn_implementation("eager")


def weights_of_the_prefix(model):
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-3


CHANGES = [another_norm, another_rotation, a_patch, other_code, eager, weights_of_the_prefix]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_whatever_changes_the_states_has_a_folder_of_its_own(change):
    model = build("llama").requires_grad_(False)
    before = facts_of(model)
    assert facts_of(build("llama").requires_grad_(False)) == before
    change(model)
    assert facts_of(model) != before


def test_machine_and_libraries_are_among_the_facts_and_what_lies_behind_is_not(monkeypatch):
    model = build("llama").requires_grad_(False)
    before = facts_of(model)
    assert facts_of(model, compiled=True) != before
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 7)
        assert facts_of(model) == {**before, "threads": 7}
    with monkeypatch.context() as patch:
        patch.setattr(facts_module, "_version", lambda _: "9.9")
        assert facts_of(model)["versions"]["torch"] == "9.9"
    with torch.no_grad():
        model.model.norm.weight += 1
        model.lm_head.weight += 1
        model.model.layers[1].mlp.up_proj.weight += 1
    assert facts_of(model) == before


def test_a_forward_of_another_library_and_code_without_a_source_keep_the_states_off_the_disk(tmp_path, caplog):
    model = build("llama").requires_grad_(False)
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda x, own=mlp.forward: own(x)
    with pytest.raises(ModelError, match=r"another library has put a forward of its own on model\.layers\.0\.mlp"):
        facts_of(model)
    del mlp.forward
    space = {"nn": nn}
    exec("class Made(nn.Identity):\n    def forward(self, x):\n        return x", space)
    model.model.layers[0].mlp.act_fn = space["Made"]()
    with pytest.raises(ModelError, match="the source of Made cannot be read"):
        facts_of(model)
    kept = run(tmp_path, model, ["blocks[-1]"], on_disk(1))
    assert "are kept in memory, and not on disk: the source of Made cannot be read" in caplog.text
    assert kept.fast.hits > 0
