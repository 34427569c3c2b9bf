"""Training that starts from kept states of the frozen prefix is the training that computes them at every step."""

import logging
from pathlib import Path

import pytest
import torch
import yaml
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    TrainingArguments,
)

from cluster import small_recipe
from conftest import some_windows, tiny_gpt2
from partialtune.cli import main
from partialtune.engine.audited import audited
from partialtune.engine.broken_off_pass import modules_before_blocks
from partialtune.engine.forward_stack import put_on
from partialtune.engine.prefix import PrefixCache
from partialtune.engine.prefix_choice import (
    PrefixPhase,
    choose_prefix,
    prefix_words,
    try_prefix,
)
from partialtune.engine.row_digests import DigestingCollator, rows_of, words_of
from partialtune.engine.state_store import MemoryStore
from partialtune.errors import RecipeError
from partialtune.freeze.plan import plan_freeze
from partialtune.model.train_mode import set_dropout
from partialtune.training.recipe_trainer import attached_trainer
from partialtune.training.training_data import collate_windows
from test_no_logits import IDS, build

ALL_PATHS = ("loss", "gelu", "casts")


def build_any(name):
    torch.manual_seed(0)
    small = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    if name == "neox":
        return GPTNeoXForCausalLM(GPTNeoXConfig(**small, intermediate_size=48, **ids)).eval()
    if name == "mixtral":
        model = build(name)
        model.config.output_router_logits = False
        return model
    if name == "opt":  # its embeddings pass a projection before the first block, its states one behind the last
        return OPTForCausalLM(OPTConfig(**small, ffn_dim=48, word_embed_proj_dim=16, **ids)).eval()
    return build(name)


def kept_from_start(blocks):
    return [PrefixPhase(0, blocks, "asked for")]


def run(
    folder,
    model,
    trainable,
    prefix=(),
    fast_paths=ALL_PATHS,
    head="tied",
    schedule=(),
    checkpoint=None,
    data=None,
    collator=collate_windows,
    **changes,
):
    """A short run -> its Trainer: losses in its log, weights in its model."""
    plan = plan_freeze(model, trainable, head=head, schedule=schedule)
    settings = {
        "max_steps": 8,
        "learning_rate": 5e-5,
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "eval_strategy": "steps",
        "eval_steps": 3,
        "logging_steps": 1,
        "disable_tqdm": True,
        **changes,
    }
    args = TrainingArguments(output_dir=str(folder), use_cpu=True, remove_unused_columns=False, **settings)
    made = attached_trainer(
        plan=plan,
        delta_steps=100,
        fast_paths=fast_paths,
        prefix=prefix,
        model=model,
        args=args,
        train_dataset=some_windows(20) if data is None else data,
        eval_dataset=some_windows(6, seed=1),
        data_collator=collator,
    )
    torch.manual_seed(7)
    made.train(checkpoint and Path(checkpoint))
    made.trainer.fast = made.tuning.fast
    return made.trainer


def after(module, do):
    """`do(module, output)` at the end of a module's forward, as its own code would: another output, or None."""

    def patch(forward, *args, **kwargs):
        output = forward(*args, **kwargs)
        other = do(module, output)
        return output if other is None else other

    put_on(module, patch)


class Listed(MemoryStore):
    """Shows what is kept, in order."""

    @property
    def states(self):
        return list(self._kept.values())


def losses(trainer):
    return [entry[key] for entry in trainer.state.log_history for key in ("loss", "eval_loss") if key in entry]


def largest_difference(a, b):
    return max((p - q).abs().max().item() for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True))


CASES = {
    "gpt2, untied head": ("gpt2", ["final_norm", "head"], "untied", 3),
    "gpt2, last block": ("gpt2", ["blocks[-1]", "final_norm"], "tied", 2),
    "llama, last mlp": ("llama", ["blocks[-1].mlp"], "tied", 1),
    "mixtral, final norm": ("mixtral", ["final_norm"], "tied", 2),
    "neox, head": ("neox", ["head"], "untied", 3),
    "opt, last block": ("opt", ["blocks[-1]"], "tied", 2),
}


@pytest.mark.parametrize("case", CASES)
def test_losses_and_weights_are_those_of_computing_the_prefix_at_every_step(tmp_path, case):
    name, trainable, head, blocks = CASES[case]
    plain = run(tmp_path / "a", build_any(name), trainable, fast_paths=(), head=head)
    kept = run(tmp_path / "b", build_any(name), trainable, kept_from_start(blocks), head=head)
    assert kept.fast.keeps_prefix
    assert losses(kept) == pytest.approx(losses(plain), abs=1e-6)
    assert len(losses(kept)) == 8 + 3  # evaluated at 3, 6 and the end
    assert largest_difference(kept, plain) < 1e-6


def test_a_frozen_block_runs_once_a_window_and_never_in_a_step(tmp_path):
    model, windows_seen = tiny_gpt2(), []
    after(model.transformer.h[0].attn, lambda _, output: windows_seen.append(len(output[0])))
    run(tmp_path, model, ["blocks[-1]"], kept_from_start(2), eval_strategy="no", max_steps=12, fast_paths=())
    assert sum(windows_seen) == 20  # in the first epoch of 5 steps
    windows_seen.clear()
    model = tiny_gpt2()
    after(model.transformer.h[0].attn, lambda _, output: windows_seen.append(len(output[0])))
    run(tmp_path, model, ["blocks[-1]"], eval_strategy="no", max_steps=12, fast_paths=())
    assert sum(windows_seen) == 12 * 4


def test_the_prefix_runs_in_eval_mode_its_embedding_dropout_too(tmp_path, monkeypatch):
    """GPT-2's usual dropout of 0.1 is on in what trains, and off below it, whether states are kept or not."""
    modes, forward = [], torch.nn.Dropout.forward

    def watched(module, *args):  # of the class: with a hook below the blocks nothing is kept
        if module is model.transformer.drop:
            modes.append(module.training)
        return forward(module, *args)

    monkeypatch.setattr(torch.nn.Dropout, "forward", watched)
    model = tiny_gpt2()
    run(tmp_path / "a", model, ["blocks[-1]"], fast_paths=())  # `loss` tries the model in train mode, too
    assert modes
    assert not any(modes)
    modes.clear()
    model = tiny_gpt2()
    run(tmp_path / "b", model, ["blocks[0]"], fast_paths=())  # nothing is frozen below it but the embeddings: no prefix
    assert any(modes)


def test_with_a_schedule_the_boundary_moves_down_and_the_states_are_made_again(tmp_path, caplog):
    schedule = [{"from_step": 3, "trainable": ["blocks[-2]"]}, {"from_step": 6, "trainable": ["blocks[0]"]}]
    prefix = [PrefixPhase(0, 2, ""), PrefixPhase(3, 1, ""), PrefixPhase(6, 0, "")]
    plain = run(tmp_path / "a", tiny_gpt2(), ["blocks[-1]"], fast_paths=(), schedule=schedule)
    kept = run(tmp_path / "b", tiny_gpt2(), ["blocks[-1]"], prefix, schedule=schedule)
    assert losses(kept) == pytest.approx(losses(plain), abs=1e-6)
    assert largest_difference(kept, plain) < 1e-6
    assert not any("forward" in vars(module) for module in kept.model.modules())


def test_a_run_that_goes_on_from_a_checkpoint_ends_as_one_that_never_stopped(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 5, "max_steps": 8}
    whole = run(tmp_path / "a", tiny_gpt2(), ["blocks[-1]"], kept_from_start(2), **saving)
    checkpoint = str(tmp_path / "a" / "checkpoint-5")
    again = run(tmp_path / "b", tiny_gpt2(), ["blocks[-1]"], kept_from_start(2), checkpoint=checkpoint, **saving)
    assert largest_difference(whole, again) == 0.0


def test_activation_checkpointing_and_accumulation_go_with_kept_states(tmp_path):
    changes = {"activation_checkpointing": True, "gradient_accumulation_steps": 2, "max_steps": 4}
    changes["activation_checkpointing_kwargs"] = {"use_reentrant": False}
    plain = run(tmp_path / "a", tiny_gpt2(), ["blocks[-2:]"], fast_paths=(), **changes)
    kept = run(tmp_path / "b", tiny_gpt2(), ["blocks[-2:]"], kept_from_start(1), **changes)
    assert losses(kept) == pytest.approx(losses(plain), abs=1e-6)
    assert largest_difference(kept, plain) < 1e-6


def test_in_bf16_states_are_kept_in_bf16_and_losses_stay_near(tmp_path):
    plain = run(tmp_path / "a", tiny_gpt2(), ["blocks[-1]"], fast_paths=(), bf16=True)
    kept = run(tmp_path / "b", tiny_gpt2(), ["blocks[-1]"], kept_from_start(2), bf16=True)
    assert losses(kept) == pytest.approx(losses(plain), abs=2e-3)
    assert all(parameter.dtype == torch.float32 for parameter in kept.model.parameters())
    assert kept.fast.kept_bytes == (20 + 6) * 16 * 32 * 2


def test_kept_states_are_those_of_the_block():
    model, store = tiny_gpt2().eval(), Listed(2**30, torch.uint8)
    ids = torch.tensor(some_windows(5)["input_ids"])
    cache = PrefixCache(model, 2, store)
    cache.put_on()
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
        wanted = model(input_ids=ids, output_hidden_states=True).hidden_states[2]
    assert torch.allclose(
        torch.stack([states.view(torch.float32) for states in store.states]), wanted, rtol=0, atol=1e-6
    )
    cache.take_off()


def test_what_comes_before_the_blocks_is_found_and_nothing_that_comes_after():
    assert modules_before_blocks(tiny_gpt2(), IDS[:1]) == ["transformer.drop"]


def test_a_model_whose_later_blocks_look_back_is_found_out():
    model = tiny_gpt2().eval()
    assert try_prefix(model, 2, IDS[:1]) < 1e-6
    shortcut = {}
    after(model.transformer.h[0], lambda module, output: shortcut.update(first=output))
    after(model.transformer.h[2], lambda module, output: output + shortcut["first"])
    assert try_prefix(model, 2, IDS[:1]) > 1e-2


def test_dropout_that_a_model_applies_by_itself_below_the_blocks_is_found_out():
    class Noisy(torch.nn.Module):
        def __init__(self, inner, owner):
            super().__init__()
            self.inner, self.owner = inner, [owner]

        def forward(self, ids):
            return torch.nn.functional.dropout(self.inner(ids), 0.5, training=self.owner[0].training)

    model = tiny_gpt2().eval()
    model.transformer.wte = Noisy(model.transformer.wte, model)
    assert try_prefix(model, 2, IDS[:1]) > 1e-2


# --- blocks that are left out at random ---

LAYER_DROP = {  # model type -> (what its config says beyond the usual words, the key of its LayerDrop)
    "opt": ({"ffn_dim": 48, "word_embed_proj_dim": 32}, "layerdrop"),
    "xglm": ({"d_model": 32, "num_layers": 3, "attention_heads": 2, "ffn_dim": 48}, "layerdrop"),
    "bart": (
        {"d_model": 32, "decoder_layers": 3, "decoder_attention_heads": 2, "decoder_ffn_dim": 48},
        "decoder_layerdrop",
    ),
    "biogpt": ({"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}, "layerdrop"),
}


def with_layer_drop(kind, share, dropout=0.0):
    says, key = LAYER_DROP[kind]
    config = AutoConfig.for_model(
        kind,
        vocab_size=128,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        pad_token_id=1,
        bos_token_id=0,
        **{"eos_token_id": 2, key: share, **says},
    )
    set_dropout(config, dropout)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("kind", LAYER_DROP)
def test_no_block_is_left_out_under_a_plan_and_the_saved_config_keeps_the_share(tmp_path, kind, caplog):
    """At a share of 1 every block is left out of every step: without a gradient where one block alone trains."""
    kept = run(tmp_path / "kept", with_layer_drop(kind, 1.0), ["blocks[-1]"], kept_from_start(2), max_steps=4)
    assert "LayerDrop is off" in caplog.text
    assert "layerdrop 1)" in caplog.text
    plain = run(tmp_path / "plain", with_layer_drop(kind, 1.0), ["blocks[-1]"], fast_paths=(), max_steps=4)
    assert losses(kept) == pytest.approx(losses(plain), abs=1e-6)
    assert largest_difference(kept, plain) < 1e-6
    kept.save_model(str(tmp_path / "saved"))
    assert getattr(AutoConfig.from_pretrained(tmp_path / "saved"), LAYER_DROP[kind][1]) == 1.0


def test_dropout_leaves_layer_drop_alone_so_that_a_prefix_can_be_kept(tmp_path):
    model = with_layer_drop("opt", 0.0, dropout=0.05)
    assert (model.config.dropout, model.config.layerdrop) == (0.05, 0.0)
    kept = run(tmp_path / "kept", with_layer_drop("opt", 0.5, 0.05), ["blocks[-1]"], kept_from_start(2))
    plain = run(tmp_path / "plain", model, ["blocks[-1]"], fast_paths=())
    assert losses(kept) == pytest.approx(losses(plain), abs=1e-6)


def test_a_trial_leaves_out_no_block_and_the_model_as_it_was():
    model = with_layer_drop("opt", 0.9)
    assert try_prefix(model, 2, IDS[:1]) < 1e-6
    assert model.model.decoder.layerdrop == 0.9


# --- whether to keep them ---


def plan_of(*trainable, schedule=()):
    return plan_freeze(tiny_gpt2(), list(trainable), schedule=schedule)


def test_auto_keeps_states_of_a_frozen_prefix():
    (chosen,) = choose_prefix("auto", plan_of("blocks[-1]"), tiny_gpt2())
    assert chosen == PrefixPhase(0, 2, "rows that come again start from them")
    assert "states behind 2 blocks are kept" in prefix_words([chosen])


@pytest.mark.parametrize(
    ("trainable", "words"),
    [
        ("embeddings", "transformer.wte.weight trains, and no block before it is frozen"),
        ("blocks[0]", "transformer.h.0.ln_1.weight trains"),
    ],
)
def test_auto_declines_and_says_why(trainable, words):
    (chosen,) = choose_prefix("auto", plan_of(trainable), tiny_gpt2())
    assert chosen.blocks == 0
    assert words in chosen.reason
    assert f"not kept: {chosen.reason}" in prefix_words([chosen])


def test_memory_is_an_error_where_it_cannot_be_had():
    with pytest.raises(RecipeError, match=r"memory is impossible here: transformer\.wte\.weight trains"):
        choose_prefix("memory", plan_of("embeddings"), tiny_gpt2())
    with pytest.raises(RecipeError, match="prefix_cache is 'tape'; allowed are auto, off, memory, disk"):
        choose_prefix("tape", plan_of("blocks[-1]"), tiny_gpt2())
    assert choose_prefix("off", plan_of("blocks[-1]"), tiny_gpt2())[0].blocks == 0


def test_each_phase_is_decided_for_itself():
    schedule = [{"from_step": 45, "trainable": ["blocks[0]"]}]
    first, second = choose_prefix("auto", plan_of("blocks[-1]", schedule=schedule), tiny_gpt2())
    assert (first.blocks, second.blocks) == (2, 0)


def test_an_obstacle_is_named_before_training(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, neftune_noise_alpha=5.0)
    model, plan = tiny_gpt2().eval(), plan_of("blocks[-1]")
    assert "neftune" in choose_prefix("auto", plan, model, args)[0].reason
    args.neftune_noise_alpha = None
    assert choose_prefix("auto", plan, model, args)[0].blocks == 2
    routed = build("mixtral")
    assert "router" in choose_prefix("auto", plan_freeze(routed, ["final_norm"]), routed)[0].reason
    hook = model.transformer.h[0].register_forward_hook(lambda *_: None)
    assert "a forward hook on a frozen GPT2Block" in choose_prefix("auto", plan, model)[0].reason
    hook.remove()
    original, seen = model.transformer.h[0].forward, {}

    def remembering(*args, **kwargs):
        seen["first"] = original(*args, **kwargs)
        return seen["first"]

    model.transformer.h[0].forward = remembering
    model.transformer.h[2].register_forward_hook(lambda module, args, output: output + seen["first"])
    assert "later blocks use more" in choose_prefix("auto", plan, model)[0].reason


# --- models whose later blocks want more of the early ones than their states ---


def gemma(kind, shared, vocab_size=128, **changes):
    """A Gemma 3n or 4 of 5 blocks, of which the last `shared` use keys and values of earlier ones."""
    layer_types = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    config = AutoConfig.for_model(
        kind,
        vocab_size=vocab_size,
        vocab_size_per_layer_input=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=5,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=shared,
        layer_types=layer_types,
        max_position_embeddings=64,
        sliding_window=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **changes,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def gemma4(shared=2, **changes):
    return gemma("gemma4_text", shared, global_head_dim=16, **changes)


def gemma3n(shared=2, **changes):
    return gemma("gemma3n_text", shared, laurel_rank=4, activation_sparsity_pattern=None, **changes)


def reasons(model, trainable, schedule=()):
    """Why each phase keeps nothing, in words."""
    chosen = choose_prefix("auto", plan_freeze(model, trainable, schedule=schedule), model)
    return [phase.reason for phase in chosen if not phase.blocks]


def test_shared_keys_and_values_are_an_obstacle_in_words():
    (reason,) = reasons(gemma4(), ["blocks[-1]"])
    assert "Gemma4ForCausalLM: a pass that starts from the states behind 4 blocks fails (KeyError" in reason
    assert reasons(gemma4(shared=0), ["blocks[-1]"]) == []


@pytest.mark.parametrize("shared", [0, 2])
def test_states_of_another_shape_are_an_obstacle_in_words(shared):
    (reason,) = reasons(gemma3n(shared), ["blocks[-1]"])
    assert "its blocks give float32 (4, 2, 32, 32), where states (2, 32, width) are kept" in reason


LATER = [{"from_step": 4, "trainable": ["blocks[-1]"]}]


def test_every_length_of_prefix_is_tried_and_each_phase_keeps_what_agrees(tmp_path):
    """Behind all blocks nothing is looked up; behind 4 of 5 the last block looks for keys of a block left out."""
    model = gemma4()
    plan = plan_freeze(model, ["final_norm"], schedule=LATER)
    first, second = choose_prefix("memory", plan, model)
    assert (first.blocks, second.blocks) == (5, 0)
    assert "from step 4: not kept: Gemma4ForCausalLM" in prefix_words([first, second])
    kept = run(tmp_path / "kept", gemma4(), ["final_norm"], [first, second], schedule=LATER, fast_paths=())
    plain = run(tmp_path / "plain", gemma4(), ["final_norm"], schedule=LATER, fast_paths=())
    assert losses(kept) == pytest.approx(losses(plain), abs=1e-6)
    assert largest_difference(kept, plain) < 1e-6


def test_memory_is_an_error_in_words_where_the_models_pass_fails():
    model = gemma4()
    with pytest.raises(RecipeError, match="memory is impossible here: Gemma4ForCausalLM: a pass that starts from"):
        choose_prefix("memory", plan_freeze(model, ["blocks[-1]"]), model)


@pytest.mark.slow
def test_the_run_goes_on_by_the_command_line_and_says_which_phase_keeps_what(tmp_path, capsys):
    schedule = [{"from_step": 2, "trainable": ["blocks[-1]"]}]
    words = small_recipe(
        tmp_path, trainable=["final_norm"], schedule=schedule, max_steps=4, prefix_cache="memory", save_strategy="no"
    )
    vocabulary = AutoConfig.from_pretrained(tmp_path / "base").vocab_size
    gemma4(vocab_size=vocabulary).save_pretrained(tmp_path / "base")
    assert main(words) == 0
    first, second = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["run"]["prefix_cache"]
    assert (first["blocks"], second["blocks"]) == (5, 0)
    assert "KeyError" in second["reason"]
    gemma3n(vocab_size=vocabulary).save_pretrained(tmp_path / "base")
    capsys.readouterr()
    assert main([*words, "--output_dir", str(tmp_path / "other")]) == 2
    assert "prefix_cache: memory is impossible here: Gemma3nForCausalLM: its blocks give" in capsys.readouterr().err


def test_what_a_model_keeps_of_its_last_pass_does_not_pass_for_states():
    """Its last block uses what its first one saw: of the same tokens in a trial, of other ones in training."""
    model = tiny_gpt2(embd_pdrop=0, resid_pdrop=0, attn_pdrop=0).eval()
    seen = {}
    after(model.transformer.h[0].ln_1, lambda module, output: seen.update(first=output))
    after(model.transformer.h[2].ln_1, lambda module, output: output + seen["first"])
    assert try_prefix(model, 2, IDS[:1]) > 1e-2


def test_a_model_that_looks_back_in_evaluations_alone_is_found_out():
    model = tiny_gpt2().eval()
    seen = {}
    after(model.transformer.h[0], lambda module, output: seen.update(first=output))
    after(model.transformer.h[2], lambda module, output: None if module.training else output + seen["first"])
    assert try_prefix(model, 2, IDS[:1]) > 1e-2


@pytest.mark.parametrize("error", [KeyError("keys"), IndexError("list index"), AssertionError(), ValueError("shape")])
def test_whatever_the_models_own_code_raises_is_an_obstacle(error):
    model = tiny_gpt2().eval()
    original, calls = model.transformer.h[2].forward, []

    def forward(*args, **kwargs):
        calls.append(1)
        if len(calls) > 3:  # the passes that are whole
            raise error
        return original(*args, **kwargs)

    model.transformer.h[2].forward = forward
    (reason,) = reasons(model, ["blocks[-1]"])
    assert f"fails ({type(error).__name__}" in reason


def test_a_mistake_of_our_own_is_no_obstacle(monkeypatch):
    monkeypatch.delattr(PrefixCache, "_as_block_gives")  # what the stand-ins of the blocks call
    with pytest.raises(AttributeError, match="_as_block_gives"):
        reasons(tiny_gpt2().eval(), ["blocks[-1]"])


def test_fast_paths_are_off_where_the_recipe_says_so(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        trainer = run(tmp_path, tiny_gpt2(), ["blocks[-1]"], fast_paths=(), max_steps=1)
    assert trainer.fast.in_use == []
    trainer = run(tmp_path / "b", tiny_gpt2(), ["blocks[-1]"], bf16=True, max_steps=1)
    assert trainer.fast.in_use == ["gelu", "loss", "casts"]


# --- whatever the data are ---


def padded(side, label_of_first=-100):
    """A collator of rows cut to different lengths."""

    def collate(rows):
        lengths = [6 + sum(row["input_ids"]) % 11 for row in rows]
        width = max(lengths)
        batch = {"input_ids": [], "attention_mask": [], "labels": []}
        for row, length in zip(rows, lengths, strict=True):
            ids, gap = list(row["input_ids"][:length]), width - length
            labels = [label_of_first if label_of_first == -100 else ids[0], *ids[1:]]
            for key, values, fill in (
                ("input_ids", ids, 0),
                ("attention_mask", [1] * length, 0),
                ("labels", labels, -100),
            ):
                batch[key].append(values + [fill] * gap if side == "right" else [fill] * gap + values)
        return {key: torch.tensor(values) for key, values in batch.items()}

    return collate


@pytest.mark.parametrize("case", ["right", "left", "left, first token a target"])
def test_padded_batches_give_the_weights_of_the_plain_path(tmp_path, case):
    collator = padded(case.split(",")[0], label_of_first=0 if "target" in case else -100)
    settings = {"collator": collator, "max_steps": 20, "eval_strategy": "no", "learning_rate": 1e-4}
    plain = run(tmp_path / "a", build_any("llama"), ["blocks[-1]"], fast_paths=(), **settings)
    kept = run(tmp_path / "b", build_any("llama"), ["blocks[-1]"], kept_from_start(1), **settings)
    assert losses(kept) == pytest.approx(losses(plain), abs=1e-5)
    assert largest_difference(kept, plain) < 1e-6
    if case == "right":
        assert kept.fast.hits == 60


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_label_that_is_predicted_from_padding_is_predicted_from_its_states(side):
    """Labels that are the whole input_ids, or the first token of a row padded on the left."""
    model = build_any("llama").eval()
    cache = PrefixCache(model, 1, MemoryStore(2**30, torch.uint8))
    cache.put_on()
    batch = padded(side, label_of_first=0)(some_windows(4))
    if side == "right":
        batch["labels"] = batch["input_ids"].clone()
    for _ in range(2):
        with cache.padding.of(batch, False), torch.no_grad():
            loss = model(**batch, use_cache=False).loss.item()
    cache.take_off()
    assert loss == pytest.approx(model(**batch).loss.item(), abs=1e-6)
    assert (cache.hits, cache.misses) == (4, 4)
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_mask_of_other_numbers_than_0_and_1_belongs_to_its_row():
    """BLOOM and OPT take the sum of the mask for positions."""
    ids, ones = torch.tensor([[5, 6, 7]]), torch.ones(1, 3, dtype=torch.int64)
    plain, other = (rows_of({"input_ids": ids, "attention_mask": mask}) for mask in (ones, ones * 2))
    assert plain == rows_of({"input_ids": ids})
    assert plain[0].digest != other[0].digest


def test_padding_on_the_left_belongs_to_its_row():
    """A recurrent block carries it on."""
    batch = {"input_ids": torch.tensor([[0, 5, 6]]), "attention_mask": torch.tensor([[0, 1, 1]])}
    other = batch | {"input_ids": torch.tensor([[9, 5, 6]])}
    assert rows_of(batch)[0][1:3] == (0, 3)
    assert rows_of(batch)[0].digest != rows_of(other)[0].digest


def test_a_hook_that_is_put_on_a_frozen_block_while_it_trains_sees_what_the_block_gives():
    model, seen = build_any("llama").eval(), []
    cache = PrefixCache(model, 2, MemoryStore(2**30, torch.uint8))
    cache.put_on()
    batch = {"input_ids": torch.tensor(some_windows(4)["input_ids"]), "use_cache": False}
    with torch.no_grad():
        model(**batch)
        handle = cache.blocks[0].mlp.register_forward_hook(lambda *call: seen.append(call[2]))
        model(**batch)
        handle.remove()
        model(**batch)
    cache.take_off()
    assert len(seen) == 1
    assert dict(cache.passed_by) == {"a forward hook on a frozen LlamaMLP would not see what it gives": 1}
    assert (cache.hits, cache.misses) == (4, 4)


def test_in_bf16_a_resumed_run_ends_as_one_that_never_stopped(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 6, "max_steps": 9, "bf16": True}
    whole = run(tmp_path / "a", tiny_gpt2(), ["blocks[-1]"], kept_from_start(2), **saving)
    checkpoint = str(tmp_path / "a" / "checkpoint-6")
    again = run(tmp_path / "b", tiny_gpt2(), ["blocks[-1]"], kept_from_start(2), checkpoint=checkpoint, **saving)
    assert largest_difference(whole, again) == 0.0


def test_a_loop_of_ones_own_starts_from_states_though_the_config_says_use_cache():
    model = build_any("llama").train()
    model.config.use_cache = True
    plan = plan_freeze(model, ["blocks[-1]"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.tensor(some_windows(4)["input_ids"])
    with audited(model, plan, optimizer) as tuning:
        for _ in range(3):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert (tuning.fast.hits, tuning.fast.misses) == (8, 4)


def digests_of(**inputs):
    return [row.digest for row in rows_of(inputs)]


def test_a_row_is_known_by_tokens_positions_and_mask():
    ids = torch.tensor([[5, 6, 7, 8]])
    (row,) = digests_of(input_ids=ids)
    wider, mask = torch.tensor([[5, 6, 7, 8, 0, 0]]), torch.tensor([[1, 1, 1, 1, 0, 0]])
    assert digests_of(input_ids=wider, attention_mask=mask) == [row]
    assert digests_of(input_ids=wider, attention_mask=mask, labels=wider) == [row]
    assert digests_of(input_ids=wider.roll(2), attention_mask=mask.roll(2)) != [row]  # its positions begin at 2
    assert digests_of(input_ids=ids, position_ids=torch.tensor([[0, 1, 0, 1]])) != [row]
    assert digests_of(input_ids=ids, attention_mask=torch.tensor([[1, 0, 1, 1]])) != [row]
    assert DigestingCollator(lambda rows: {"input_ids": rows})(ids)["partialtune_rows"] == [(row, 0, 4, 0)]


def joined_documents(*documents, **others):
    """What a collator without padding makes of documents."""
    bounds = torch.tensor([0, *(len(ids) for ids in documents)]).cumsum(0).to(torch.int32)
    numbers = [number for number, ids in enumerate(documents) for _ in ids]
    inputs = {
        "input_ids": torch.tensor([[token for ids in documents for token in ids]]),
        "position_ids": torch.cat([torch.arange(len(ids)) for ids in documents])[None],
        "seq_idx": torch.tensor([numbers], dtype=torch.int32),
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": max(map(len, documents)),
    }
    return {**inputs, **others}


def test_documents_joined_to_one_row_are_known_each_by_itself_in_any_order_and_company():
    found = rows_of(joined_documents([5, 6, 7], [8, 9], [5, 6]))
    first, second, third = (row.digest for row in found)
    assert [(row.start, row.end, row.number) for row in found] == [(0, 3, 0), (3, 5, 0), (5, 7, 0)]
    assert digests_of(**joined_documents([5, 6], [1, 2, 3, 4], [5, 6, 7])) == [
        third,
        digests_of(**joined_documents([1, 2, 3, 4]))[0],
        first,
    ]
    assert digests_of(**joined_documents([8, 9])) == [second]
    assert words_of(joined_documents([5, 6, 7])) == words_of(joined_documents([8, 9]))


def test_a_row_whose_tensors_disagree_on_its_documents_is_known_as_a_whole():
    found = rows_of(joined_documents([5, 6, 7], [8, 9], seq_idx=torch.tensor([[0, 0, 0, 0, 1]])))
    assert [(row.start, row.end) for row in found] == [(0, 5)]
    assert len(rows_of(joined_documents([5, 6, 7], [8, 9], position_ids=torch.tensor([[0, 1, 2, 5, 6]])))) == 1
    assert len(rows_of(joined_documents([5, 6, 7], [8, 9], attention_mask=torch.ones(1, 5)))) == 1
