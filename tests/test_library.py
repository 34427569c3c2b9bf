"""The package as a library: the callbacks in anybody's Trainer, with nothing else of the package around them."""

import copy
import io
import json
import subprocess
import sys

import pytest
import torch
from transformers import GPT2LMHeadModel, Trainer, TrainingArguments, default_data_collator

from conftest import some_windows, tiny_gpt2
from test_deltas import make_trainer


def through_a_file(model):
    """What `torch.load` makes of what `torch.save` wrote."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_the_callbacks_work_in_a_plain_trainer(tmp_path):
    from partialtune import FreezeAuditCallback, WeightDeltaCallback, apply_plan, load_text, plan_freeze

    (tmp_path / "text.txt").write_text("A short text.", encoding="utf-8")
    text = load_text(str(tmp_path / "text.txt"), cleaning="auto")
    assert text == "A short text."

    model = tiny_gpt2()
    windows = some_windows().map(lambda row: {"labels": row["input_ids"]})
    args = TrainingArguments(
        output_dir=str(tmp_path / "run"), use_cpu=True, max_steps=3, learning_rate=1e-3, disable_tqdm=True
    )
    plan = plan_freeze(model, ["blocks[-2:]", "final_norm"], head="untied")
    apply_plan(model, plan)
    trainer = Trainer(
        model,
        args,
        data_collator=default_data_collator,
        train_dataset=windows,
        callbacks=[WeightDeltaCallback(plan), FreezeAuditCallback(plan)],
    )
    trainer.train()

    audit = json.loads((tmp_path / "run" / "audit.json").read_text())
    assert audit["passed"] is True
    assert audit["frozen"]["l2_delta"] == 0.0
    lines = (tmp_path / "run" / "weight_deltas.jsonl").read_text().splitlines()
    assert len(lines) == len(plan.parameters)
    assert any("delta/trainable_l2" in entry for entry in trainer.state.log_history)
    assert trainer.state.log_history[-1]["audit/passed"] == 1.0


def stays_in_eval(model) -> list[bool]:
    return [block.training for block in model.train().transformer.h]


@pytest.mark.parametrize(
    "copied",
    [through_a_file, copy.deepcopy, lambda model: copy.deepcopy(through_a_file(model))],
    ids=lambda f: f.__name__,
)
def test_a_model_under_a_plan_can_be_pickled_and_copied_and_stays_under_it(copied):
    from partialtune import apply_plan, plan_freeze

    model = tiny_gpt2()
    apply_plan(model, plan_freeze(model, ["blocks[-1]"]))
    other = copied(model)
    assert type(other) is GPT2LMHeadModel
    assert stays_in_eval(other) == [False, False, True]
    assert [p.requires_grad for p in other.parameters()] == [p.requires_grad for p in model.parameters()]
    model.eval()
    assert [block.training for block in other.transformer.h] == [False, False, True]  # it is no part of the first
    other.eval()
    assert stays_in_eval(model) == [False, False, True]
    assert not other.training


def test_a_model_under_a_plan_is_saved_with_the_name_of_its_own_class(tmp_path):
    from partialtune import apply_plan, plan_freeze

    model = tiny_gpt2()
    apply_plan(model, plan_freeze(model, ["blocks[-1]"]))
    through_a_file(model).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["GPT2LMHeadModel"]
    compiled = torch.compile(model, backend="eager")
    compiled.train()
    assert [block.training for block in model.transformer.h] == [False, False, True]


def test_a_plan_is_made_after_peft_has_wrapped_the_model(tmp_path):
    from peft import LoraConfig, get_peft_model

    from partialtune import FreezeAuditCallback, apply_plan, plan_freeze
    from partialtune.errors import RecipeError

    early = plan_freeze(tiny_gpt2(), ["final_norm"])
    model = get_peft_model(tiny_gpt2(), LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    with pytest.raises(RecipeError, match=r"after all that changes its parameters \(get_peft_model"):
        apply_plan(model, early)
    plan = plan_freeze(model, ["/.*lora_.*/", "final_norm"])
    apply_plan(model, plan)
    trainer = make_trainer(tmp_path, through_a_file(model), [FreezeAuditCallback(plan)])
    trainer.train()
    audit = json.loads((tmp_path / "audit.json").read_text())
    assert (audit["passed"], audit["trainable"]["parameters"]) == (True, 3 * 2 + 2)


def test_importing_the_package_imports_no_heavy_library():
    code = "import sys, partialtune; print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_every_public_name_can_be_imported():
    import partialtune

    assert all(getattr(partialtune, name) is not None for name in partialtune.__all__)
    assert set(partialtune.__all__) <= set(dir(partialtune))
