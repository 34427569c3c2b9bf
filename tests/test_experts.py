"""Single experts learn: slices of fused tensors, gradients and optimizer of their size; the others keep each bit."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import partialtune as pt
from partialtune.builtin import builtin_folder
from partialtune.cli import main
from partialtune.errors import FreezeViolation, ModelError
from partialtune.model.parameters import named_learners
from partialtune.model.rows import row_numbers
from tiny_models import VOCABULARY, tiny_config
from two_processes import on_two_processes

STEPS, LENGTH, RATE, DECAY = 4, 16, 1e-3, 0.1
WHOLE_RUNS = True  # what `quick_runs` in conftest.py looks for
SELECTORS = ["blocks[-1].experts[3,0]", "blocks[0].experts[1]"]


def model_of(kind="mixtral", implementation="grouped_mm"):
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(tiny_config(kind))
    model.set_experts_implementation(implementation)
    return model.eval()


def batches(count=STEPS, rows=2):
    return torch.randint(3, VOCABULARY, (count, rows, LENGTH), generator=torch.Generator().manual_seed(1))


def step(model, optimizer, ids):
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def weights(model):
    pt.model.row_parameters.write_rows(model)
    return {name: p.detach().clone() for name, p in model.named_parameters() if not name.endswith("_rows")}


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_experts_learn_as_where_the_whole_tensor_trains_and_the_others_are_restored(kind, implementation):
    plan = pt.plan_freeze(model_of(kind), SELECTORS)
    rows = {one.name: row_numbers(one.rows) for one in plan.parameters if one.rows}
    assert set(rows) == set(plan.trainable)
    before = weights(model_of(kind))

    whole = model_of(kind, implementation)
    for name, parameter in whole.named_parameters():
        parameter.requires_grad_(name in rows)
    known = dict(whole.named_parameters())
    adamw = torch.optim.AdamW([known[name] for name in rows], lr=RATE, weight_decay=DECAY)
    wanted_losses = []
    for ids in batches():
        wanted_losses.append(step(whole, adamw, ids))
        with torch.no_grad():
            for name, numbers in rows.items():
                others = [n for n in range(len(before[name])) if n not in numbers]
                known[name][others] = before[name][others]

    model = model_of(kind, implementation)
    pt.apply_plan(model, plan)
    learners = {name: one for name, one in named_learners(model) if name in rows}
    adamw = torch.optim.AdamW(learners.values(), lr=RATE, weight_decay=DECAY)
    losses = [step(model, adamw, ids) for ids in batches()]

    assert losses == pytest.approx(wanted_losses, abs=1e-6)
    found = weights(model)
    for name, values in found.items():
        assert torch.allclose(values, known[name], rtol=0, atol=1e-6), name
        others = [n for n in range(len(values)) if n not in rows.get(name, [])]
        assert torch.equal(values[others], before[name][others]), name
        assert all(not torch.equal(values[n], before[name][n]) for n in rows.get(name, [])), name
    for name, learner in learners.items():
        expected = (len(rows[name]), *before[name].shape[1:])
        state = adamw.state[learner]
        assert tuple(learner.shape) == tuple(state["exp_avg"].shape) == tuple(state["exp_avg_sq"].shape) == expected
    assert len(adamw.state) == len(rows)
    assert all(p.grad is None for name, p in model.named_parameters() if not name.endswith("_rows"))


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_what_is_computed_is_bit_for_bit_what_the_model_computes(implementation):
    ids = batches()[0]
    model = model_of(implementation=implementation)
    wanted = model(input_ids=ids, use_cache=False).logits
    pt.apply_plan(model, pt.plan_freeze(model, SELECTORS))
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, wanted)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_an_expert_to_which_no_token_comes_has_a_gradient_of_zeros(implementation):
    model = model_of(implementation=implementation)
    ids = batches(rows=1)[0][:, :2]
    chosen = set()
    gate = model.model.layers[0].mlp.gate
    handle = gate.register_forward_hook(lambda _module, _args, output: chosen.update(output[-1].flatten().tolist()))
    model(input_ids=ids)
    handle.remove()
    unused = min(set(range(4)) - chosen) if len(chosen) < 4 else None
    assert unused is not None
    plan = pt.plan_freeze(model, [f"blocks[0].experts[{unused}]"])
    pt.apply_plan(model, plan)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    learners = dict(named_learners(model))
    for name in plan.trainable:
        assert learners[name].grad is not None
        assert not learners[name].grad.any()


class Windows(Dataset):
    def __init__(self, count=8):
        self.ids = batches(1, count)[0]

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, number):
        return {"input_ids": self.ids[number], "labels": self.ids[number]}


def trained(folder, model, resume=None, steps=STEPS, **options):
    settings = {"max_steps": steps, "per_device_train_batch_size": 2, "learning_rate": RATE, "weight_decay": DECAY}
    settings |= {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "logging_steps": 1, "save_steps": 2}
    settings |= {"lr_scheduler_type": "constant", "optim": "adamw_torch"}
    plan = pt.plan_freeze(model, SELECTORS)
    args = TrainingArguments(output_dir=str(folder), **{**settings, **options})
    trainer = Trainer(model=model, args=args, train_dataset=Windows())
    tuning = pt.attach(trainer, plan)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, tuning


def test_a_trainer_proves_it_saves_it_and_resumes_it_to_the_bit(tmp_path):
    before = weights(model_of())
    trainer, tuning = trained(tmp_path / "whole", model_of())
    assert tuning.audit.passed
    assert json.loads((tmp_path / "whole" / "audit.json").read_text())["passed"] is True
    trainer.save_model(str(tmp_path / "saved"))
    saved = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "saved").named_parameters())
    after = weights(trainer.model)
    assert saved.keys() == after.keys()
    rows = {one.name: row_numbers(one.rows) for one in tuning.plan.parameters if one.rows}
    for name, values in after.items():
        assert torch.equal(saved[name], values), name
        others = [n for n in range(len(values)) if n not in rows.get(name, [])]
        assert torch.equal(values[others], before[name][others]), name
    assert any(not torch.equal(after[name], before[name]) for name in rows)

    # The checkpoint has names of Mixtral's origin, which transformers' own Trainer passes over as it resumes.
    resumed, _ = trained(tmp_path / "again", model_of(), resume=str(tmp_path / "whole" / "checkpoint-2"))
    for name, values in weights(resumed.model).items():
        assert torch.equal(values, after[name]), name


def test_one_bit_in_another_expert_fails_the_audit(tmp_path):
    model = model_of()
    plan = pt.plan_freeze(model, SELECTORS)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(tmp_path), max_steps=1, report_to="none", use_cpu=True),
        train_dataset=Windows(),
    )
    pt.attach(trainer, plan)
    tensor = model.model.layers[-1].mlp.experts._parameters["down_proj"]
    inner = trainer.training_step

    def spoil(*args, **kwargs):
        tensor.data[2].view(torch.int32).view(-1)[5] ^= 1  # expert 2 is frozen
        return inner(*args, **kwargs)

    trainer.training_step = spoil
    with pytest.raises(FreezeViolation, match=r"layers\.2\.mlp\.experts\.down_proj"):
        trainer.train()


def on_one_of_two(folder):
    trainer, tuning = trained(folder, model_of(), per_device_train_batch_size=1, save_strategy="no")
    return tuning.audit.passed if tuning.audit else None, weights(trainer.model)


@pytest.mark.slow
def test_two_processes_end_as_one(tmp_path):
    trainer, _ = trained(tmp_path / "one", model_of(), save_strategy="no")
    expected = weights(trainer.model)
    for passed, found in on_two_processes(on_one_of_two, tmp_path / "two"):
        assert passed in (True, None)
        for name, values in found.items():
            assert torch.allclose(values, expected[name], rtol=0, atol=1e-5), name


def test_experts_that_are_multiplied_all_at_once_are_refused_in_words():
    model = AutoModelForCausalLM.from_config(tiny_config("llama4_text"))
    pt.apply_plan(model, pt.plan_freeze(model, ["experts[1]"]))
    with pytest.raises(ModelError, match=r"it is used in bmm, .* Train the whole matrix"):
        model(input_ids=batches()[0])


def test_a_kernel_that_reads_memory_past_autograd_is_refused_in_words():
    model = model_of()
    plan = pt.plan_freeze(model, ["experts[1]"])
    model.config._experts_implementation_internal = "sonicmoe"
    with pytest.raises(ModelError, match="this model has sonicmoe"):
        pt.apply_plan(model, plan)
    pt.apply_plan(model, pt.plan_freeze(model, ["experts", "embeddings.tokens[-2:]"]))  # all of them, and other rows


# ---- by a recipe -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_train_saves_single_experts_whole_or_as_a_delta_and_verify_knows_them(tmp_path):
    base = tmp_path / "base"
    tokenizer = AutoTokenizer.from_pretrained(builtin_folder("builtin:lilliput"))
    config = tiny_config("mixtral")
    config.vocab_size = len(tokenizer)
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    tokenizer.save_pretrained(base)
    (tmp_path / "text.txt").write_text("It was the best of times, it was the worst of times. " * 60, encoding="utf-8")
    values = {"model_name_or_path": str(base), "text": str(tmp_path / "text.txt"), "block_size": 16, "max_steps": 4}
    values |= {"trainable": ["blocks[-1].experts[3]", "blocks[-1].router"], "output_dir": str(tmp_path / "run")}
    values |= {"per_device_train_batch_size": 4, "learning_rate": 1e-3, "weight_decay": 0.1, "prompts": ["It was"]}
    values |= {"eval_strategy": "no"}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values))

    assert main(["train", str(recipe)]) == 0
    claim = ["--trainable", "blocks[-1].experts[3]", "blocks[-1].router"]
    assert main(["verify", str(base), str(tmp_path / "run"), *claim]) == 0
    assert main(["verify", str(base), str(tmp_path / "run"), "--trainable", "blocks[-1].experts[2]", "router"]) == 3

    as_delta = ["--checkpoint_format", "delta", "--output_dir", str(tmp_path / "delta")]
    assert main(["train", str(recipe), *as_delta]) == 0
    stored = load_file(tmp_path / "delta" / "delta.safetensors")
    assert sum(values.numel() for values in stored.values()) == 96 * 32 + 32 * 48 + 4 * 32  # one expert, one router
    assert main(["apply", str(tmp_path / "delta"), str(tmp_path / "whole")]) == 0
    expected, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "whole"))
    assert all(torch.equal(whole[name], expected[name]) for name in expected)
    before = load_file(base / "model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], expected[name])}
    assert moved == {
        f"model.layers.2.block_sparse_moe.{name}.weight"
        for name in ("experts.3.w1", "experts.3.w2", "experts.3.w3", "gate")
    }
