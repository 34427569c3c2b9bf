"""Kept states are those of the weights and rows that there are: after weights change, in part, when memory is full."""

import copy
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from conftest import some_windows
from partialtune.engine import prefix as prefix_module
from partialtune.engine.fast_modules import CastOnce
from partialtune.engine.forward_stack import put_on
from partialtune.engine.prefix import PrefixCache
from partialtune.engine.prefix_weights import PrefixWeights
from partialtune.engine.recomputation import recompute_from
from partialtune.engine.row_digests import DigestingCollator
from partialtune.engine.state_store import MemoryStore, make_store
from partialtune.model.parameters import named_weights
from partialtune.training.training_data import collate_windows
from test_no_logits import build
from test_prefix import kept_from_start, largest_difference, losses, run
from two_processes import on_two_processes

IDS = torch.tensor(some_windows(4)["input_ids"])


def cached(model, blocks=1, limit=2**30):
    model.requires_grad_(False)
    cache = PrefixCache(model, blocks, MemoryStore(limit, torch.uint8))
    cache.put_on()
    return cache


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def plain_logits(model, ids=IDS):
    """Of a copy, on which no patch is."""
    return logits(copy.deepcopy(model), ids)


# ---- weights that change --------------------------------------------------------------------------------------------


def loads_others(model):
    model.load_state_dict({name: value * 1.5 for name, value in model.state_dict().items()})


def loads_others_in_their_place(model):
    model.load_state_dict({name: value * 1.5 for name, value in model.state_dict().items()}, assign=True)


def flips_one_value(model):
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[3, 5] += 0.5


def gets_another_parameter(model):
    attention = model.model.layers[0].self_attn
    attention.v_proj.weight = torch.nn.Parameter(attention.v_proj.weight * 2, requires_grad=False)


def is_cast(model):
    model.bfloat16()


def changes_an_embedding(model):
    with torch.no_grad():
        model.model.embed_tokens.weight[IDS[0, 0]] += 1.0


@pytest.mark.parametrize(
    "change",
    [
        loads_others,
        loads_others_in_their_place,
        flips_one_value,
        gets_another_parameter,
        is_cast,
        changes_an_embedding,
    ],
)
def test_states_of_weights_that_have_changed_since_are_dropped_and_computed_anew(change, caplog):
    model = build("llama")
    cache = cached(model)
    first = logits(model)
    assert torch.allclose(logits(model), first, atol=1e-6)
    assert (cache.hits, cache.misses, cache.store.size) == (4, 4, 4 * 16 * 32 * 4)
    change(model)
    wanted = plain_logits(model)
    assert not torch.allclose(wanted.float(), first, atol=1e-6)
    for _ in range(2):
        assert torch.allclose(logits(model), wanted, atol=1e-6)
    assert (cache.hits, cache.misses) == (8, 8)
    assert cache.store.size == 4 * 16 * 32 * wanted.element_size()  # the old ones are gone
    assert "Weights of the frozen prefix changed" in caplog.text
    cache.take_off()


def test_what_lies_behind_the_prefix_may_change_and_buffers_may_be_written_with_the_same_values():
    model = build("llama")
    cache = cached(model)
    logits(model)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight += 1.0
        for buffer in model.buffers():  # as DDP does in each forward pass
            buffer.copy_(buffer.clone())
    wanted = plain_logits(model)
    assert torch.allclose(logits(model), wanted, atol=1e-6)
    assert (cache.hits, cache.misses) == (4, 4)
    cache.take_off()


def test_weights_that_train_are_not_watched_and_those_of_the_prefix_all_are():
    model = build("llama").requires_grad_(False)
    model.model.norm.requires_grad_(True)
    weights = PrefixWeights(model, 1, b"digest")
    before = weights.digest
    with torch.no_grad():
        model.model.norm.weight += 1
    assert not weights.have_changed()
    digests = [before]
    prefix = [p for name, p in named_weights(model) if name.startswith(("model.embed_tokens.", "model.layers.0."))]
    for parameter in prefix:
        with torch.no_grad():
            parameter.view(-1)[0] += 1
        assert weights.have_changed()
        assert not weights.have_changed()
        digests.append(weights.digest)
    assert len(prefix) == 10
    assert len(set(digests)) == 11


def test_a_run_whose_frozen_weights_are_exchanged_midway_goes_on_as_the_plain_path_does(tmp_path):
    class Exchange(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step == 9:
                with torch.no_grad():
                    model.model.layers[0].mlp.up_proj.weight.mul_(1.5)

    def trained(folder, **changes):
        from transformers import Trainer, TrainingArguments, default_data_collator

        from partialtune import attach, plan_freeze
        from test_attach import LAST, model_of, windows

        model = model_of("llama")
        plan = plan_freeze(model, LAST)
        args = TrainingArguments(
            output_dir=str(folder),
            num_train_epochs=4,
            per_device_train_batch_size=4,
            learning_rate=2e-5,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
        )
        trainer = Trainer(model, args, default_data_collator, windows(), callbacks=[Exchange()])
        tuning = attach(trainer, plan, stop_on_violation=False, **changes)
        trainer.train()
        return trainer, tuning

    plain, _ = trained(tmp_path / "a", fast_paths=(), prefix_cache="off")
    kept, tuning = trained(tmp_path / "b")
    assert largest_difference(plain, kept) < 1e-6
    assert (tuning.fast.hits, tuning.fast.misses) == (2 * 12, 2 * 12)  # the fourth epoch computes all anew
    assert not tuning.audit.passed


# ---- rows -----------------------------------------------------------------------------------------------------------


def test_a_batch_of_which_some_rows_are_known_is_computed_and_then_all_are():
    model = build("llama")
    cache = cached(model)
    logits(model, IDS[:2])
    assert torch.allclose(logits(model), plain_logits(model), atol=1e-6)
    assert (cache.hits, cache.misses) == (0, 6)
    assert cache.store.size == 4 * 16 * 32 * 4
    mixed = IDS[[3, 0, 2]]
    assert torch.allclose(logits(model, mixed), plain_logits(model, mixed), atol=1e-6)
    assert cache.hits == 3
    cache.take_off()


def test_a_store_that_is_full_goes_on_with_what_it_has():
    model = build("llama")
    cache = cached(model, limit=2 * 16 * 32 * 4)
    for _ in range(2):
        assert torch.allclose(logits(model), plain_logits(model), atol=1e-6)
    assert cache.hits == 0
    assert cache.store.size == 2 * 16 * 32 * 4
    assert torch.allclose(logits(model, IDS[:2]), plain_logits(model, IDS[:2]), atol=1e-6)
    assert cache.hits == 2
    cache.take_off()


@pytest.mark.parametrize("settings", [{}, {"dataloader_num_workers": 1}, {"dataloader_pin_memory": True}], ids=str)
def test_rows_are_digested_by_the_loader_and_never_within_a_pass(tmp_path, settings, monkeypatch):
    within = []
    own = prefix_module.rows_of
    monkeypatch.setattr(prefix_module, "rows_of", lambda inputs: within.append(inputs) or own(inputs))
    kept = run(tmp_path, build("llama"), ["blocks[-1]"], kept_from_start(1), max_steps=10, **settings)
    assert (kept.fast.hits, kept.fast.misses) == (20 + 3 * 6, 20 + 6)  # evaluated at 3, 6, 9 and the end
    assert within == []


def test_rows_travel_through_a_loader_with_workers_and_pinned_memory():
    loader = DataLoader(
        some_windows(4), 2, collate_fn=DigestingCollator(collate_windows), num_workers=1, pin_memory=True
    )
    batches = list(loader)
    assert [len(batch["partialtune_rows"]) for batch in batches] == [2, 2]
    assert all(isinstance(row[0], bytes) for batch in batches for row in batch["partialtune_rows"])


def test_a_stream_whose_batches_one_process_dispatches_hits(tmp_path):
    settings = {
        "data": some_windows(20).to_iterable_dataset(),
        "accelerator_config": {"dispatch_batches": True},
        "max_steps": 10,
        "eval_strategy": "no",
    }
    plain = run(tmp_path / "a", build("llama"), ["blocks[-1]"], fast_paths=(), **settings)
    kept = run(tmp_path / "b", build("llama"), ["blocks[-1]"], kept_from_start(1), **settings)
    assert (kept.fast.hits, kept.fast.misses) == (20, 20)
    assert losses(kept) == pytest.approx(losses(plain), abs=1e-6)
    assert largest_difference(kept, plain) < 1e-6


# ---- other passes, other patches ------------------------------------------------------------------------------------


def test_generating_while_states_are_kept_gives_what_it_gives_without():
    model = build("llama").eval()
    wanted = model.generate(IDS[:2], max_new_tokens=5, do_sample=False)
    cache = cached(model)
    for _ in range(2):
        logits(model)
        assert torch.equal(model.generate(IDS[:2], max_new_tokens=5, do_sample=False), wanted)
    assert (cache.hits, cache.misses) == (4, 4)
    cache.take_off()


def test_a_second_pass_with_adapters_switched_off_has_states_of_its_own():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build("llama"), peft.LoraConfig(target_modules=["q_proj", "up_proj"]))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    cache = cached(model.eval())
    on = logits(model)
    with model.disable_adapter():
        off = logits(model)
    assert not torch.allclose(on, off, atol=1e-2)
    assert (cache.hits, cache.misses) == (0, 8)
    assert torch.allclose(logits(model), on, atol=1e-6)
    with model.disable_adapter():
        assert torch.allclose(logits(model), off, atol=1e-6)
    assert (cache.hits, cache.misses) == (8, 8)
    cache.take_off()


@pytest.mark.parametrize("order", ["0123", "3210", "2031", "1302"])
def test_casts_prefix_checkpointing_and_a_users_patch_leave_in_any_order(order):
    model = build("llama").train()
    model.requires_grad_(False)
    model.model.layers[-1].requires_grad_(True)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    user = put_on(model.model.layers[0], lambda forward, *args, **kwargs: 1.25 * forward(*args, **kwargs))
    casts = CastOnce(model)
    casts.begin()
    recomputed = recompute_from(model, 1)
    cache = PrefixCache(model, 1, MemoryStore(2**30, torch.uint8))
    cache.put_on()
    for _ in range(2):
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    assert (cache.hits, cache.misses) == (4, 4)
    leave = [
        user.take_off,
        casts.end,
        lambda: [worn.take_off() for worn in recomputed],
        cache.take_off,
    ]
    for number in order:
        leave[int(number)]()
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.allclose(logits(model.eval()), logits(build("llama")), atol=1e-6)


# ---- several processes ----------------------------------------------------------------------------------------------


def keeps_for_the_other():
    dist.init_process_group("gloo")
    store = make_store(2**24, torch.float32)
    rank = dist.get_rank()
    store.put(bytes([rank]) * 16, torch.full((3, 2), float(rank)))
    store.forget()  # the other one may be reading
    dist.barrier()
    other = store.get(bytes([1 - rank]) * 16)
    names = [path.name for path in Path("/dev/shm").glob("partialtune-prefix-*")]
    dist.barrier()
    return type(store).__name__, other.tolist(), names


@pytest.mark.slow
def test_two_processes_find_what_the_other_one_kept_and_their_memory_has_no_name():
    found = on_two_processes(keeps_for_the_other)
    assert [one[0] for one in found] == ["SharedStore", "SharedStore"]
    assert [one[1] for one in found] == [[[1.0, 1.0]] * 3, [[0.0, 0.0]] * 3]
    assert [one[2] for one in found] == [[], []]


KILLED = """
import os, time, torch, torch.distributed as dist
from partialtune.engine.state_store import make_store
dist.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
os.environ["LOCAL_WORLD_SIZE"] = "2"
store = make_store(2**24, torch.float32)
store.put(b"0" * 16, torch.ones(3, 2))
print(type(store).__name__, flush=True)
time.sleep(60)
"""


@pytest.mark.slow
def test_a_process_that_is_killed_leaves_no_memory_behind():
    before = set(Path("/dev/shm").glob("partialtune-prefix-*"))
    process = subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True, env=os.environ)
    assert process.stdout.readline().strip() == "SharedStore"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert set(Path("/dev/shm").glob("partialtune-prefix-*")) == before
