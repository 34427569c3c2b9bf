"""DDP looks for parameters without a gradient where there may be some, and nowhere else."""

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

import partialtune as pt
from cluster import small_recipe
from conftest import some_windows, tiny_gpt2
from partialtune.engine.unused_parameters import uses_all_that_trains
from partialtune.errors import RecipeError
from two_processes import on_two_processes

SMALL = {"vocab_size": 64, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}


def tiny_llama():
    return LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=16))


def test_a_decoder_uses_all_that_trains_and_is_left_as_it_was():
    for model in (tiny_gpt2(), tiny_llama()):
        pt.apply_plan(model, pt.plan_freeze(model.train(), ["all"]))
        torch.manual_seed(3)
        wanted = torch.rand(4)
        torch.manual_seed(3)
        assert uses_all_that_trains(model)
        assert torch.equal(torch.rand(4), wanted)
        assert model.training
        assert all(parameter.grad is None for parameter in model.parameters())


def test_rows_that_train_are_found_too():
    model = tiny_llama()
    pt.apply_plan(model, pt.plan_freeze(model, ["embeddings.tokens[3,5]", "blocks[-1]"]))
    assert uses_all_that_trains(model)


class Counting(GPT2LMHeadModel):
    """Counts its passes in a buffer."""

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, *args, **kwargs):
        self.passes += 1
        return super().forward(*args, **kwargs)


def test_buffers_that_a_pass_changes_are_as_before():
    model = Counting(GPT2Config(vocab_size=64, n_embd=16, n_head=2, n_layer=2))
    assert uses_all_that_trains(model)
    assert float(model.passes) == 0


def with_a_spare_matrix():
    model = tiny_gpt2()
    model.transformer.spare = nn.Linear(4, 4)
    return model


def skipping_by_chance():
    return OPTForCausalLM(OPTConfig(**SMALL, ffn_dim=16, max_position_embeddings=32, layerdrop=0.1))


class OneOf(nn.Module):
    """Two experts, each a module; a token goes to one of them."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))

    def forward(self, hidden):
        return self.experts[0 if float(hidden.sum()) > 0 else 1](hidden)


def with_experts_apart():
    model = tiny_gpt2()
    model.transformer.h[0].mlp = OneOf()
    return model


@pytest.mark.parametrize("make", [with_a_spare_matrix, skipping_by_chance, with_experts_apart])
def test_it_is_not_claimed_of_a_model_that_may_leave_some_out(make):
    assert not uses_all_that_trains(make().train())


def test_fused_experts_have_a_gradient_of_zeros_and_count_as_used():
    sizes = {"intermediate_size": 16, "num_key_value_heads": 1, "num_local_experts": 4}
    assert uses_all_that_trains(MixtralForCausalLM(MixtralConfig(**SMALL, **sizes)))


def test_a_model_that_takes_no_token_alone_is_none():
    assert not uses_all_that_trains(nn.Linear(4, 4))


# ---- two processes --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_of_two_processes_says_nothing_of_unused_parameters(warm, tmp_path):
    words = small_recipe(tmp_path, schedule=[], max_steps=2, prompts=[])
    before = warm.log.read_text() if warm.log.exists() else ""
    warm.start_all([*words, "--output_dir", str(tmp_path / "run")], 2)
    assert warm.end_all() == [0, 0], warm.log.read_text()
    said = warm.log.read_text().removeprefix(before)
    assert "Verdict: freeze audit passed." in said
    assert "find_unused_parameters" not in said


class SkipsLater(TrainerCallback):
    """Leaves the last block out from the fourth step on."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 3:
            model.transformer.h[-1].forward = lambda hidden, *_, **__: hidden


def train(folder, make, search=None, callbacks=(), trainable=("all",)):
    """Six steps as one of two processes -> what DDP was told, and how it ended."""
    torch.manual_seed(0)
    model = make()
    settings = {"max_steps": 6, "per_device_train_batch_size": 2, "report_to": "none", "disable_tqdm": True}
    settings |= {
        "save_strategy": "no",
        "use_cpu": True,
        "remove_unused_columns": False,
        "ddp_find_unused_parameters": search,
    }
    trainer = Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **settings),
        train_dataset=some_windows(24).map(lambda row: {"labels": row["input_ids"]}),
        data_collator=default_data_collator,
        callbacks=list(callbacks),
    )
    tuning = pt.attach(trainer, pt.plan_freeze(model, list(trainable)), prefix_cache="off")
    try:
        trainer.train()
    except RecipeError as error:
        return trainer.model_wrapped.find_unused_parameters, trainer.state.global_step, str(error)
    named = [one["name"] for one in tuning.audit.to_json()["trainable"]["unmoved"]]
    return trainer.model_wrapped.find_unused_parameters, tuning.audit.passed, named


@pytest.mark.slow
def test_the_search_stays_where_a_parameter_is_never_used_and_the_audit_names_it(tmp_path):
    spare = ["transformer.spare.weight", "transformer.spare.bias"]
    for found in on_two_processes(train, tmp_path, with_a_spare_matrix):
        assert found == (True, True, spare)


@pytest.mark.slow
def test_the_search_is_left_out_of_a_plain_model_unless_it_was_asked_for(tmp_path):
    for asked in (None, True):
        for found in on_two_processes(train, tmp_path, tiny_gpt2, asked):
            assert found == (bool(asked), True, [])


@pytest.mark.slow
def test_rows_that_train_beside_a_block_have_their_gradients_without_the_search(tmp_path):
    for found in on_two_processes(train, tmp_path, tiny_gpt2, None, (), ("embeddings.tokens[:64]", "blocks[-1]")):
        assert found == (False, True, [])


@pytest.mark.slow
def test_a_model_that_stops_using_a_block_is_stopped_before_the_step(tmp_path):
    for search, steps, said in on_two_processes(train, tmp_path, tiny_gpt2, None, [SkipsLater()]):
        assert (search, steps) == (False, 3)
        assert "Step 4: 12 parameters that train got no gradient, such as transformer.h.2." in said
        assert "ddp_find_unused_parameters: true" in said
