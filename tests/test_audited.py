"""`audited`: the plan, its phases and its proof in loops without a Trainer: PyTorch, accelerate, Lightning."""

import copy
import json

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM

import partialtune as pt
from conftest import tiny_gpt2
from partialtune.engine.fast_modules import CHAINS
from partialtune.errors import FreezeViolation, RecipeError
from partialtune.model.digests import digests
from partialtune.proof.audit_result import INTERRUPTED
from two_processes import on_two_processes


@pytest.fixture(autouse=True)
def no_precision_of_an_earlier_test():
    """accelerate keeps the precision of a process's first Accelerator, a bf16 Trainer's too, for all later ones."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=False)


SCHEDULE = [{"from_step": 2, "trainable": ["blocks[-1].mlp"]}, {"from_step": 4, "trainable": ["blocks[-1].attention"]}]


def tiny_llama():
    torch.manual_seed(0)
    shape = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    return LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, num_key_value_heads=1))


MODELS = {"gpt2": tiny_gpt2, "llama": tiny_llama}
FROZEN = {"gpt2": "transformer.h.0.ln_1.weight", "llama": "model.layers.0.input_layernorm.weight"}
CAUGHT = {name: frozen.replace(".", r"\.") for name, frozen in FROZEN.items()}


def batches(count=6, seed=1):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(0, 96, (2, 12), generator=generator) for _ in range(count)]
    return [{"input_ids": ids, "labels": ids} for ids in rows]


# At 1e-3 AdamW makes steps of 1e-6 of rounding noise where the true gradient is 0, as of an attention's key bias.
RATE = 1e-4


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=RATE)


def plan_of(model, schedule=SCHEDULE):
    return pt.plan_freeze(model, ["final_norm"], schedule=schedule)


# ---- three loops, as their users write them -------------------------------------------------------------------------


def plain_loop(model, plan, optimizer, do=lambda step: None, **options):
    model.train()
    with pt.audited(model, plan, optimizer, **options) as tuning:
        for step, batch in enumerate(batches()):
            do(step)
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            tuning.step()
    return tuning


def accelerate_loop(model, plan, optimizer, do=lambda step: None, accumulation=1, **options):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    loader = torch.utils.data.DataLoader(batches(6 * accumulation), batch_size=None)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    model.train()
    with pt.audited(model, plan, optimizer, **options) as tuning:
        for step, batch in enumerate(loader):
            do(step)
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                optimizer.step()
                optimizer.zero_grad()
            tuning.step()
    return tuning


def lightning_loop(model, plan, optimizer, do=lambda step: None, accumulation=1, **options):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = model.train()

        def training_step(self, batch, index):
            do(index)
            return self.model(**batch).loss

        def configure_optimizers(self):
            return optimizer

    loader = torch.utils.data.DataLoader(batches(6 * accumulation), batch_size=None)
    quiet = {
        "enable_progress_bar": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "logger": False,
    }
    trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", accumulate_grad_batches=accumulation, **quiet)
    with pt.audited(model, plan, optimizer, **options) as tuning:
        trainer.fit(Module(), loader)
    return tuning


LOOPS = {"plain": plain_loop, "accelerate": accelerate_loop, "lightning": lightning_loop}


def by_hand(model, accumulation=1):
    """The same training with `requires_grad` set by hand, and a new optimizer entry for what begins later."""
    plan = plan_of(model)
    begins = {parameter.name: parameter.from_step for parameter in plan.parameters}
    optimizer = None
    model.train()
    for number, batch in enumerate(batches(6 * accumulation)):
        step = number // accumulation
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(begins[name] is not None and begins[name] <= step)
        frozen = [block for block in blocks_of(model) if not any(p.requires_grad for p in block.parameters())]
        for block in frozen:
            block.eval()
        new = [parameter for name, parameter in model.named_parameters() if begins[name] == step]
        if optimizer is None:
            optimizer = torch.optim.AdamW(new, lr=RATE)
        elif number % accumulation == 0 and new:
            optimizer.add_param_group({"params": new})
        (model(**batch).loss / accumulation).backward()
        if number % accumulation == accumulation - 1:
            optimizer.step()
            optimizer.zero_grad()
    return model


def blocks_of(model):
    return getattr(model, "transformer", model.base_model).h if hasattr(model, "transformer") else model.model.layers


def without_dropout(name):
    return tiny_gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0) if name == "gpt2" else tiny_llama()


def assert_nothing_is_left(model, optimizer):
    assert not [name for name, module in model.named_modules() if "forward" in vars(module) and name]
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_state_dict_post_hooks
    assert not optimizer._optimizer_load_state_dict_pre_hooks


# ---- what holds in each ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("loop", LOOPS)
def test_weights_are_those_of_the_loop_with_hand_set_gradients_phases_happen_and_the_audit_passes(loop, name):
    model, learning = without_dropout(name), []
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    plan, optimizer = plan_of(model), adamw(model)

    def watch(step):
        learning.append([key for key, parameter in model.named_parameters() if parameter.requires_grad])

    tuning = LOOPS[loop](model, plan, optimizer, watch, delta_steps=2)
    assert learning == [list(plan.phase_at(step).trainable) for step in range(6)]
    assert tuning.audit.passed
    assert tuning.audit.unmoved == {}
    assert tuning.steps == 6
    expected = by_hand(without_dropout(name))
    for key, parameter in expected.named_parameters():
        torch.testing.assert_close(model.get_parameter(key), parameter, atol=1e-6, rtol=0)
    moved = {key for key, parameter in model.named_parameters() if not torch.equal(parameter, before[key])}
    assert moved == set(plan.trainable) == {key for key, delta in tuning.deltas.items() if delta.l2_delta}
    assert [entry["step"] for entry in tuning.log] == [2, 4, 6, 6]
    assert tuning.log[-1]["audit/passed"] == 1.0
    assert_nothing_is_left(model, optimizer)


@pytest.mark.parametrize("loop", ["accelerate", "lightning"])
def test_accumulated_batches_are_one_step(loop):
    model = without_dropout("gpt2")
    plan, optimizer = plan_of(model), adamw(model)
    tuning = LOOPS[loop](model, plan, optimizer, accumulation=2)
    assert tuning.audit.passed
    assert tuning.steps == 6
    expected = by_hand(without_dropout("gpt2"), accumulation=2)
    for key, parameter in expected.named_parameters():
        torch.testing.assert_close(model.get_parameter(key), parameter, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("loop", LOOPS)
def test_one_flipped_bit_in_a_frozen_weight_is_caught(loop, name):
    model = MODELS[name]()
    optimizer = adamw(model)

    def flip(step):
        if step == 1:
            model.get_parameter(FROZEN[name]).data.view(torch.int32)[5] ^= 1

    with pytest.raises(FreezeViolation, match=f"1 frozen parameters changed: {CAUGHT[name]}"):
        LOOPS[loop](model, plan_of(model, ()), optimizer, flip)
    assert_nothing_is_left(model, optimizer)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_parameter_that_is_missing_from_the_optimizer_is_caught_before_the_first_step(loop):
    model, seen = tiny_gpt2(), []
    optimizer = torch.optim.AdamW([model.transformer.ln_f.weight], lr=1e-2)
    with pytest.raises(FreezeViolation, match=r"step 0: 1 .* missing from the optimizer: transformer\.ln_f\.bias"):
        LOOPS[loop](model, plan_of(model, ()), optimizer, seen.append)
    assert seen == []
    assert_nothing_is_left(model, optimizer)


def test_a_parameter_of_a_later_phase_that_is_missing_is_caught_at_the_start_too():
    model = tiny_gpt2()
    optimizer = torch.optim.AdamW(model.transformer.ln_f.parameters(), lr=1e-2)
    with pytest.raises(FreezeViolation, match=r"step 0: 4 trainable .* missing from the optimizer: transformer\.h\.2"):
        plain_loop(model, plan_of(model, SCHEDULE[:1]), optimizer)


def test_an_update_that_is_lost_is_caught():
    model = tiny_gpt2()
    optimizer, weight = adamw(model), model.transformer.ln_f.weight
    start = weight.detach().clone()
    optimizer.register_step_post_hook(lambda *_: weight.data.copy_(start))  # before ours: it is undone at once
    with pytest.raises(FreezeViolation, match=r"kept every bit: transformer\.ln_f\.weight"):
        plain_loop(model, plan_of(model, ()), optimizer)


@pytest.mark.parametrize("loop", LOOPS)
def test_an_error_within_the_block_goes_on_and_nothing_is_judged_that_has_not_moved(loop, tmp_path):
    model = tiny_gpt2()
    optimizer = adamw(model)
    model.transformer.ln_f.bias.register_hook(torch.zeros_like)

    def fail(step):
        if step == 3:
            raise KeyError("from the loop")

    with pytest.raises(KeyError, match="from the loop"):
        LOOPS[loop](model, plan_of(model, ()), optimizer, fail, output_dir=tmp_path)
    found = json.loads((tmp_path / "audit.json").read_text())
    assert found["passed"] is True
    assert found["trainable"]["unmoved"] == [{"name": "transformer.ln_f.bias", "reason": INTERRUPTED.format(step=3)}]
    assert_nothing_is_left(model, optimizer)


def test_a_violation_does_not_hide_the_error_of_the_loop(caplog):
    model = tiny_gpt2()

    def flip_and_fail(step):
        model.transformer.wte.weight.data[0, 0] += 1
        raise KeyError("from the loop")

    with pytest.raises(KeyError, match="from the loop"):
        plain_loop(model, plan_of(model, ()), adamw(model), flip_and_fail)
    assert "1 frozen parameters changed: transformer.wte.weight" in caplog.text


def test_files_are_written_where_a_folder_is_given_and_nowhere_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny_gpt2()
    plain_loop(model, plan_of(model), adamw(model))
    assert list(tmp_path.iterdir()) == []
    model = tiny_gpt2()
    tuning = plain_loop(model, plan_of(model), adamw(model), output_dir=tmp_path / "run", delta_steps=3)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["audit.json", "weight_deltas.jsonl"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "weight_deltas.jsonl").read_text().splitlines()]
    assert {line["step"] for line in lines} == {3, 6}
    last = {line["name"]: line["l2_delta"] for line in lines if line["step"] == 6}
    assert last == {name: delta.l2_delta for name, delta in tuning.deltas.items()}


# ---- what a loop has of its own -------------------------------------------------------------------------------------


def test_a_scheduler_made_before_goes_on_with_a_plan_that_has_no_rates():
    model = tiny_gpt2()
    optimizer = adamw(model)
    scheduler = LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.register_step_post_hook(lambda *_: scheduler.step())
    assert plain_loop(model, plan_of(model), optimizer).audit.passed
    assert optimizer.param_groups[0]["lr"] == pytest.approx(RATE / 64)


def test_a_closure_makes_the_gradients_within_the_step():
    model = tiny_gpt2()
    optimizer, plan = adamw(model), plan_of(model)
    with pt.audited(model.train(), plan, optimizer) as tuning:
        for batch in batches():

            def closure(batch=batch):
                optimizer.zero_grad()
                loss = model(**batch).loss
                loss.backward()
                return loss

            optimizer.step(closure)
    assert (tuning.steps, tuning.audit.passed, tuning.audit.unmoved) == (6, True, {})


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_of_fp16_leaves_out_is_no_step(fused):
    model = tiny_gpt2()
    optimizer, plan = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused), plan_of(model, ())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with pt.audited(model.train(), plan, optimizer) as tuning:
        for number, batch in enumerate(batches()):
            scaler.scale(model(**batch).loss).backward()
            if number == 2:
                model.transformer.ln_f.weight.grad[0] = torch.inf
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            tuning.step()
    assert (tuning.steps, tuning.audit.passed) == (5, True)


def test_bf16_autocast_uses_the_casts_and_leaves_them_off_afterwards():
    model = tiny_llama()
    plan, optimizer = plan_of(model, ()), adamw(model)
    with pt.audited(model.train(), plan, optimizer) as tuning:
        for batch in batches():
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(**batch).loss
            loss.backward()
            assert "forward" in vars(model.model.layers[0].mlp.up_proj)
            optimizer.step()
            optimizer.zero_grad()
    assert tuning.audit.passed
    assert_nothing_is_left(model, optimizer)


def test_gelu_is_fused_and_logits_are_there_unless_the_loss_without_them_is_asked_for():
    model = without_dropout("gpt2")
    optimizer, batch = adamw(model), batches(1)[0]
    whole = model.train()(**batch)
    with pt.audited(model, plan_of(model, ()), optimizer) as tuning:
        assert not [module for module in model.modules() if type(module) in CHAINS]
        torch.testing.assert_close(model(**batch).logits, whole.logits)
        tuning.step()
    with pt.audited(model, plan_of(model, ()), optimizer, fast_paths=["loss"]):
        out = model(**batch)
        assert out.logits.shape[-1] == model.config.n_embd  # no logits: the head's input
        torch.testing.assert_close(out.loss, whole.loss)
        assert model.eval()(**batch).logits.shape[-1] == model.config.vocab_size
    assert "forward" not in vars(model)


def test_activations_are_recomputed_in_the_blocks_that_backward_passes_and_nowhere_else():
    model = without_dropout("llama")
    model.activation_checkpointing_enable()
    calls = [0] * 3
    for number, block in enumerate(model.model.layers):
        block.input_layernorm.register_forward_hook(
            lambda *_, number=number: calls.__setitem__(number, calls[number] + 1)
        )
    tuning = plain_loop(model, plan_of(model), adamw(model))
    assert tuning.audit.passed
    assert calls == [6, 6, 6 + 4]  # from step 2 on block 2 trains
    expected = by_hand(without_dropout("llama"))
    for key, parameter in expected.named_parameters():
        torch.testing.assert_close(model.get_parameter(key), parameter, atol=1e-6, rtol=0)


@pytest.mark.slow
def test_a_compiled_model_is_looked_through():
    model = without_dropout("llama")
    compiled = torch.compile(model, backend="eager")
    optimizer, plan = adamw(model), plan_of(model)
    tuning = plain_loop(compiled, plan, optimizer)
    assert tuning.audit.passed
    assert tuning.model is model


def test_a_second_block_after_the_first_goes_on_from_the_weights_that_it_left():
    model = tiny_gpt2()
    optimizer, plan = adamw(model), plan_of(model)
    assert plain_loop(model, plan, optimizer).audit.passed
    assert plain_loop(model, plan, optimizer).audit.passed
    assert len(optimizer.param_groups[0]["params"]) == len(plan.trainable)


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_a_second_audited_of_the_same_model_at_the_same_time_is_an_error():
    model = tiny_gpt2()
    optimizer, plan = adamw(model), plan_of(model)
    with pt.audited(model, plan, optimizer) as tuning:
        with pytest.raises(RecipeError, match="attached already"):
            pt.audited(model, plan, optimizer)
        tuning.step()
    with pytest.raises(RecipeError, match="outside its block"):
        tuning.step()


def test_an_optimizer_that_takes_no_step_is_said(caplog):
    model = tiny_gpt2()
    with pt.audited(model, plan_of(model), adamw(model)) as tuning:
        pass
    assert "The optimizer took no step within audited" in caplog.text
    assert tuning.audit.passed


def test_a_misspelt_fast_path_and_a_plan_of_another_model_are_refused():
    model = tiny_gpt2()
    with pytest.raises(RecipeError, match="fast_paths: gelo is none; there are loss, gelu, casts"):
        pt.audited(model, plan_of(model), adamw(model), fast_paths=["gelo"])
    with pytest.raises(RecipeError, match="made for another model"):
        pt.audited(model, plan_of(tiny_llama()), adamw(model))


def test_a_loop_goes_on_from_what_was_saved_within_a_block_with_the_same_bits():
    model, saved = without_dropout("gpt2"), {}
    optimizer, plan = adamw(model), plan_of(model)
    with pt.audited(model.train(), plan, optimizer) as whole:
        for batch in batches():
            a_step(model, optimizer, batch)
            saved[whole.steps] = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    assert saved[3][1]["state"].keys() == set(plan.phase_at(2).trainable)  # by name
    assert optimizer.state_dict()["state"].keys() == set(range(len(plan.trainable)))  # by place, as it was
    for step in (1, 2, 3, 4):
        again = without_dropout("gpt2")
        optimizer = adamw(again)
        with pt.audited(again.train(), plan, optimizer, first_step=step) as tuning:
            again.load_state_dict(saved[step][0])
            optimizer.load_state_dict(saved[step][1])  # exchanges the groups, in which later phases are held
            for batch in batches()[step:]:
                a_step(again, optimizer, batch)
        assert tuning.audit.passed
        assert digests(again) == digests(model)
        assert tuning.deltas == whole.deltas


def a_step(model, optimizer, batch):
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


# ---- two processes --------------------------------------------------------------------------------------------------


def ddp_loop(flip, apply_first=True, find_unused=True):
    from accelerate import Accelerator, DistributedDataParallelKwargs

    model = without_dropout("gpt2")
    optimizer, plan = adamw(model), plan_of(model)
    if apply_first:
        pt.apply_plan(model, plan)
    find = DistributedDataParallelKwargs(find_unused_parameters=find_unused)
    accelerator = Accelerator(cpu=True, kwargs_handlers=[find])
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    wrapped.train()
    try:
        with pt.audited(wrapped, plan, optimizer) as tuning:
            for step, batch in enumerate(batches(12)[accelerator.process_index :: 2]):
                if flip and step == 1 and not accelerator.is_main_process:
                    model.transformer.wte.weight.data.view(torch.int32)[0, 0] ^= 1
                accelerator.backward(wrapped(**batch).loss)
                optimizer.step()
                optimizer.zero_grad()
    except (FreezeViolation, RecipeError) as error:
        return type(wrapped).__name__, f"{type(error).__name__}: {error}", digests(model)
    return type(wrapped).__name__, (tuning.steps, tuning.audit.passed), digests(model)


@pytest.mark.slow
def test_two_processes_of_accelerate_keep_equal_weights_through_all_phases():
    first, second = on_two_processes(ddp_loop, False)
    assert first == second
    assert first[:2] == ("DistributedDataParallel", (6, True))


@pytest.mark.slow
def test_a_bit_that_one_process_alone_flips_is_caught_on_both():
    for _, found, _ in on_two_processes(ddp_loop, True):
        assert "FreezeViolation" in found
        assert "1 frozen parameters changed: transformer.wte.weight" in found


@pytest.mark.slow
def test_a_model_that_was_wrapped_for_other_parameters_is_refused():
    assert "Call apply_plan(model, plan) before accelerator.prepare" in on_two_processes(ddp_loop, False, False)[0][1]
    assert "find_unused_parameters=True" in on_two_processes(ddp_loop, False, True, False)[0][1]


def sharded_loop(schedule):
    torch.distributed.init_process_group("gloo")
    model = without_dropout("gpt2")
    mesh = init_device_mesh("cpu", (2,))
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    plan, optimizer = plan_of(model, schedule), adamw(model)
    with torch.no_grad():
        model(**batches()[0])  # leaves whole parameters in the places of the outermost module's shards
    with pt.audited(model.train(), plan, optimizer) as tuning:
        for batch in batches():
            a_step(model, optimizer, batch)
    return tuning.audit.passed, tuning.fast.in_use, {name for name, delta in tuning.deltas.items() if delta.l2_delta}


@pytest.mark.slow
def test_a_model_sharded_by_fsdp2_is_audited_whole_and_takes_a_schedule():
    for schedule in ((), SCHEDULE):
        for passed, in_use, moved in on_two_processes(sharded_loop, schedule):
            assert (passed, in_use) == (True, ["gelu"])
            assert moved in (set(plan_of(tiny_gpt2(), schedule).trainable), set())  # measured on the main process
