"""The audit names every frozen parameter that changed and every trainable one that could not learn."""

import json

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from conftest import some_windows, tiny_gpt2
from partialtune.errors import FreezeViolation
from partialtune.freeze.apply import apply_plan, untie_head
from partialtune.freeze.plan import plan_freeze
from partialtune.proof.audit import FreezeAuditCallback
from partialtune.proof.audit_result import KEPT_EVERY_BIT, NEVER_A_GRADIENT
from partialtune.proof.deltas import WeightDeltaCallback
from partialtune.training.training_data import collate_windows

pytestmark = pytest.mark.contract


def audited_training(tmp_path, model, selectors, *faults, optimizer=None, stop_on_violation=True, **changes):
    """Train four steps with an audit and planted faults; returns audit.json."""
    plan = plan_freeze(model, selectors)
    apply_plan(model, plan)
    audit = FreezeAuditCallback(plan, stop_on_violation=stop_on_violation)
    trainer_for(tmp_path, model, [*faults, audit], optimizer, **changes).train()
    return json.loads((tmp_path / "audit.json").read_text())


def trainer_for(tmp_path, model, callbacks, optimizer=None, **changes):
    settings = {"max_steps": 4, "learning_rate": 1e-2, "per_device_train_batch_size": 4, "save_strategy": "no"}
    args = TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        remove_unused_columns=False,
        disable_tqdm=True,
        **{**settings, **changes},
    )
    return Trainer(
        model=model,
        args=args,
        train_dataset=some_windows(),
        data_collator=collate_windows,
        callbacks=callbacks,
        optimizers=(optimizer, None),
    )


class Fault(TrainerCallback):
    """Does something to the model at a step."""

    def __init__(self, do, step=2):
        self.do, self.step = do, step

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            with torch.no_grad():
                self.do(model)


def test_a_clean_run_passes_and_frozen_parameters_moved_by_exactly_zero(tmp_path):
    audit = audited_training(tmp_path, tiny_gpt2(), ["blocks[-1]", "final_norm"])
    assert audit["passed"] is True
    assert audit["frozen"] == {"parameters": 26, "changed": [], "l2_delta": 0.0}
    assert audit["trainable"]["l2_delta"] > 0
    assert audit["trainable"]["unmoved"] == []


def test_one_flipped_bit_in_a_frozen_parameter_is_found_and_named(tmp_path):
    def flip(model):
        model.transformer.h[0].ln_1.bias.view(torch.int32)[5] ^= 1

    with pytest.raises(FreezeViolation, match=r"transformer\.h\.0\.ln_1\.bias"):
        audited_training(tmp_path, tiny_gpt2(), ["final_norm"], Fault(flip))
    audit = json.loads((tmp_path / "audit.json").read_text())
    assert audit["passed"] is False
    assert audit["frozen"]["changed"] == ["transformer.h.0.ln_1.bias"]
    assert audit["frozen"]["l2_delta"] is None  # only a digest of it was kept


def test_weight_decay_on_a_frozen_parameter_is_found(tmp_path):
    model = tiny_gpt2()
    frozen = model.transformer.h[0].mlp.c_fc.weight
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)

    class GiveGradient(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            frozen.grad = torch.zeros_like(frozen)  # decay alone moves it now

    with pytest.raises(FreezeViolation, match=r"h\.0\.mlp\.c_fc\.weight"):
        audited_training(tmp_path, model, ["final_norm"], GiveGradient(), optimizer=optimizer)


def test_a_trainable_parameter_missing_from_the_optimizer_stops_the_run_before_its_first_step(tmp_path):
    model = tiny_gpt2()
    optimizer = torch.optim.AdamW([model.transformer.ln_f.weight], lr=1e-2)
    steps = []
    with pytest.raises(FreezeViolation, match=r"missing from the optimizer: transformer\.ln_f\.bias"):
        audited_training(tmp_path, model, ["final_norm"], Fault(lambda _: steps.append(1), 1), optimizer=optimizer)
    assert steps == []


def test_a_trainable_parameter_that_had_a_gradient_and_kept_every_bit_is_a_violation(tmp_path):
    model = tiny_gpt2()
    start = model.transformer.ln_f.weight.detach().clone()
    undo = Fault(lambda m: m.transformer.ln_f.weight.copy_(start), step=4)
    with pytest.raises(FreezeViolation, match=r"kept every bit: transformer\.ln_f\.weight"):
        audited_training(tmp_path, model, ["final_norm"], undo)
    audit = json.loads((tmp_path / "audit.json").read_text())
    assert audit["trainable"]["unmoved"] == [{"name": "transformer.ln_f.weight", "reason": KEPT_EVERY_BIT}]


def test_a_parameter_that_never_had_a_gradient_is_listed_with_its_reason_and_passes(tmp_path, caplog):
    audit = audited_training(tmp_path, tiny_gpt2(), ["final_norm"], learning_rate=0.0)
    assert audit["passed"] is True
    assert audit["trainable"]["unmoved"] == [
        {"name": name, "reason": NEVER_A_GRADIENT} for name in ("transformer.ln_f.weight", "transformer.ln_f.bias")
    ]
    assert "never had a gradient" in caplog.text


def test_16_bit_weights_whose_updates_round_away_are_listed(tmp_path, caplog):
    model = tiny_gpt2().to(torch.bfloat16)  # around 1 the spacing of bf16 is 4e-3 below and 8e-3 above
    audit = audited_training(tmp_path, model, ["final_norm"], learning_rate=5e-5, stop_on_violation=False)
    assert audit["trainable"]["below_precision"] == ["transformer.ln_f.weight"]
    (unmoved,) = audit["trainable"]["unmoved"]
    assert unmoved["name"] == "transformer.ln_f.weight"
    assert "at most 5e-05, and half the spacing of floating-point numbers there is 0.002" in unmoved["reason"]
    assert audit["passed"] is True
    assert "round away" in caplog.text


def test_a_violation_is_found_at_the_next_save(tmp_path):
    fault = Fault(lambda m: m.transformer.wpe.weight.add_(1e-3), step=1)
    ran_to = []
    with pytest.raises(FreezeViolation, match="step 2"):
        audited_training(
            tmp_path,
            tiny_gpt2(),
            ["final_norm"],
            fault,
            Fault(lambda _: ran_to.append(3), 3),
            save_strategy="steps",
            save_steps=2,
        )
    assert ran_to == []


def test_a_violation_may_be_allowed_and_is_written_all_the_same(tmp_path, caplog):
    fault = Fault(lambda m: m.transformer.wpe.weight.add_(1e-3), step=1)
    audit = audited_training(tmp_path, tiny_gpt2(), ["final_norm"], fault, stop_on_violation=False)
    assert audit["passed"] is False
    assert "Freeze audit failed" in caplog.text


# ---- names that go or come ------------------------------------------------------------------------------------------


def untied_gpt2():
    model = tiny_gpt2()
    untie_head(model)
    return model


def tie_again(model):
    model.lm_head.weight = model.transformer.wte.weight


def remove_the_first_block(model):
    del model.transformer.h[0]


def remove_a_frozen_norm(model):
    model.transformer.h[2].ln_1 = nn.Identity()


def make_a_bias_a_buffer(model):
    norm = model.transformer.h[0].ln_1
    bias = norm.bias.detach()
    del norm.bias
    norm.register_buffer("bias", bias)


def drop_a_buffer(model):
    del model.transformer.h[1].ln_2.running_mean


def add_a_parameter(model):
    model.transformer.h[0].extra = nn.Linear(2, 2, bias=False)


def add_a_buffer(model):
    model.transformer.h[0].register_buffer("extra", torch.zeros(2))


@pytest.mark.parametrize(
    ("build", "change", "missing", "new"),
    [
        (untied_gpt2, tie_again, ["lm_head.weight"], []),
        (tiny_gpt2, remove_the_first_block, [f"transformer.h.2.{name}" for name in ("ln_1.weight", "ln_1.bias")], []),
        (tiny_gpt2, remove_a_frozen_norm, [f"transformer.h.2.ln_1.{name}" for name in ("weight", "bias")], []),
        (tiny_gpt2, make_a_bias_a_buffer, ["transformer.h.0.ln_1.bias"], ["transformer.h.0.ln_1.bias"]),
        (lambda: with_buffers(), drop_a_buffer, ["transformer.h.1.ln_2.running_mean"], []),
        (tiny_gpt2, add_a_parameter, [], ["transformer.h.0.extra.weight"]),
        (tiny_gpt2, add_a_buffer, [], ["transformer.h.0.extra"]),
    ],
)
@pytest.mark.parametrize("saving", ["no", "steps"])
def test_a_name_that_goes_or_comes_is_a_violation(tmp_path, build, change, missing, new, saving):
    faults = [WeightDeltaCallback(plan_freeze(build(), ["final_norm"]), delta_steps=1), Fault(change)]
    with pytest.raises(FreezeViolation, match="step 2" if saving == "steps" else "step 4") as violation:
        audited_training(tmp_path, build(), ["final_norm"], *faults, save_strategy=saving, save_steps=2)
    audit = json.loads((tmp_path / "audit.json").read_text())
    assert audit["passed"] is False
    assert set(missing) <= set(audit["names"]["missing"])
    assert audit["names"]["new"] == new
    assert all(name in str(violation.value) for name in [*missing, *new][:1])
    frozen = [parameter.name for parameter in plan_freeze(build(), ["final_norm"]).parameters]
    assert set(audit["frozen"]["changed"]) >= set(missing) & set(frozen)
    assert "plan_freeze" in str(violation.value)


def test_a_plan_made_before_peft_wraps_the_model_is_refused_before_the_first_step_with_what_to_do(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = tiny_gpt2()
    plan = plan_freeze(model, ["final_norm"])
    apply_plan(model, plan)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    steps = []
    callbacks = [WeightDeltaCallback(plan), FreezeAuditCallback(plan), Fault(lambda _: steps.append(1), 1)]
    with pytest.raises(FreezeViolation, match=r"6 parameters .* new: transformer\.h\.0.*lora_A") as violation:
        trainer_for(tmp_path, wrapped, callbacks).train()
    assert "get_peft_model" in str(violation.value)
    assert "only then call plan_freeze and apply_plan" in str(violation.value)
    assert steps == []


def test_a_trainable_parameter_that_another_took_the_place_of_is_missing_from_the_optimizer(tmp_path):
    def replace(model):
        model.transformer.ln_f.weight = nn.Parameter(model.transformer.ln_f.weight.detach() + 1)

    with pytest.raises(FreezeViolation, match=r"missing from the optimizer: transformer\.ln_f\.weight"):
        audited_training(tmp_path, tiny_gpt2(), ["final_norm"], Fault(replace))


# ---- interrupted ----------------------------------------------------------------------------------------------------


def interrupted_training(tmp_path, model, *faults):
    """A run of four steps that a signal stops in its second; what it raised, and audit.json."""
    audited = FreezeAuditCallback(plan := plan_freeze(model, ["final_norm"]))
    apply_plan(model, plan)
    stop = Fault(lambda _: None)
    audited.interrupted = lambda: True
    stop.on_step_end = lambda args, state, control, **_: setattr(control, "should_training_stop", True)
    trainer_for(tmp_path, model, [*faults, stop, audited]).train()
    return json.loads((tmp_path / "audit.json").read_text())


def test_an_interrupted_run_gets_no_verdict_on_what_did_not_move(tmp_path):
    model = tiny_gpt2()
    start = model.transformer.ln_f.weight.detach().clone()
    audit = interrupted_training(tmp_path, model, Fault(lambda m: m.transformer.ln_f.weight.copy_(start), step=1))
    assert audit["passed"] is True
    reason = "the run was interrupted after step 1: no verdict on what has not moved so far"
    assert audit["trainable"]["unmoved"] == [{"name": "transformer.ln_f.weight", "reason": reason}]


def test_a_frozen_parameter_that_changed_is_a_violation_in_an_interrupted_run_too(tmp_path):
    fault = Fault(lambda m: m.transformer.wpe.weight.add_(1e-3), step=1)
    with pytest.raises(FreezeViolation, match=r"frozen parameters changed: transformer\.wpe\.weight"):
        interrupted_training(tmp_path, tiny_gpt2(), fault)


# ---- buffers --------------------------------------------------------------------------------------------------------


def with_buffers():
    """A model with statistics that its file keeps, whole numbers among them, and a table that it computes."""
    model = tiny_gpt2()
    norm = model.transformer.h[1].ln_2
    norm.register_buffer("running_mean", torch.zeros(32))
    norm.register_buffer("batches", torch.tensor(2**53, dtype=torch.int64))
    norm.register_buffer("table", torch.ones(8), persistent=False)
    return model


def test_a_persistent_buffer_that_changed_is_a_violation_and_named(tmp_path):
    fault = Fault(lambda m: m.transformer.h[1].ln_2.batches.add_(1))  # one that fp32 could not tell
    with pytest.raises(FreezeViolation, match=r"1 persistent buffers changed: transformer\.h\.1\.ln_2\.batches"):
        audited_training(tmp_path, with_buffers(), ["final_norm"], fault)
    audit = json.loads((tmp_path / "audit.json").read_text())
    assert audit["passed"] is False
    assert audit["buffers"] == {"persistent": 2, "changed": ["transformer.h.1.ln_2.batches"]}
    assert audit["frozen"]["changed"] == []


def test_a_changed_buffer_is_found_at_the_next_save(tmp_path):
    fault = Fault(lambda m: m.transformer.h[1].ln_2.running_mean.add_(1), step=1)
    with pytest.raises(FreezeViolation, match=r"step 2: .*running_mean"):
        audited_training(tmp_path, with_buffers(), ["final_norm"], fault, save_strategy="steps", save_steps=2)


def test_a_table_that_the_model_computes_for_itself_may_change(tmp_path):
    fault = Fault(lambda m: m.transformer.h[1].ln_2.table.add_(1))
    audit = audited_training(tmp_path, with_buffers(), ["final_norm"], fault)
    assert audit["passed"] is True
    assert audit["buffers"] == {"persistent": 2, "changed": []}


def test_digests_are_made_at_the_start_at_saves_and_at_the_end_only(tmp_path, monkeypatch):
    from partialtune.model import digests as weights

    made, digest = [], weights._digest_of_whole
    monkeypatch.setattr(weights, "_digest_of_whole", lambda values: made.append(1) or digest(values))
    plan = plan_freeze(tiny_gpt2(), ["final_norm"])
    deltas = WeightDeltaCallback(plan, delta_steps=1, output_dir=tmp_path)
    audited_training(tmp_path, tiny_gpt2(), ["final_norm"], deltas, save_strategy="steps", save_steps=2)
    tensors, frozen = len(plan.parameters), len(plan.frozen)
    assert len(made) == tensors + 2 * frozen + tensors  # start (one for both callbacks), saves at 2 and 4, end


def test_the_callbacks_count_their_seconds(tmp_path):
    model = tiny_gpt2()
    plan = plan_freeze(model, ["final_norm"])
    audit = FreezeAuditCallback(plan)
    assert audit.seconds == 0.0
    audited_training(tmp_path, model, ["final_norm"], audit)
    assert 0.0 < audit.seconds < 60.0
