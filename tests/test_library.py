"""The package as a library: the callbacks in anybody's Trainer, with nothing else of the package around them."""

import json
import subprocess
import sys

from transformers import Trainer, TrainingArguments, default_data_collator

from conftest import some_windows, tiny_gpt2


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


def test_importing_the_package_imports_no_heavy_library():
    code = "import sys, partialtune; print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_every_public_name_can_be_imported():
    import partialtune

    assert all(getattr(partialtune, name) is not None for name in partialtune.__all__)
    assert set(partialtune.__all__) <= set(dir(partialtune))
