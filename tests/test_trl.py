"""An attached TRL trainer does what it does without the engine: the same losses, metrics and weights, and the proof.

Each way to train is run twice from the same weights and seed: by hand, with `requires_grad` set on what trains and
nothing else, and with `attach`. Both with TRL's own defaults but for bf16: activation checkpointing is on.
"""

import inspect
import json
import random

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

import partialtune as pt
from conftest import gpt2_tokenizer
from partialtune.errors import FreezeViolation, RecipeError

pytest.importorskip("trl", reason="needs the integrations extra's trl")

BLOCKS = 3
SELECTORS = ["blocks[-1]", "final_norm"]
CHAT = (
    "{% for message in messages %}<{{ message.role }}>{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message.content }}{% endif %}\n{% endfor %}"
)
WORDS = ["the", "king", "of", "Lilliput", "had", "heard", "my", "arrival", "and", "sent", "carpenters", "to", "build"]
ROWS, BATCH, EPOCHS = 12, 4, 3
STEPS = ROWS // BATCH * EPOCHS


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = gpt2_tokenizer()
    tokenizer.chat_template, tokenizer.pad_token = CHAT, tokenizer.eos_token
    return tokenizer


@pytest.fixture(scope="module")
def base(tokenizer, tmp_path_factory):
    """A tiny Llama in a folder: DPO loads its reference from where the model came from."""
    torch.manual_seed(0)
    ids = {f"{kind}_token_id": tokenizer.eos_token_id for kind in ("bos", "eos", "pad")}
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": BLOCKS, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.1,
        **shape,
        **ids,
    )
    folder = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def load(base):
    return LlamaForCausalLM.from_pretrained(base)


def said(seed, least=2, most=9):
    """A few words, always the same ones for a seed."""
    drawn = random.Random(seed)
    return " ".join(drawn.choices(WORDS, k=drawn.randint(least, most)))


def texts(rows=ROWS):
    return Dataset.from_dict({"text": [said(number, 3, 14) for number in range(rows)]})


def chats():
    turns = [[("user", 0), ("assistant", 100), ("user", 200), ("assistant", 300)][: 2 + row % 3] for row in range(ROWS)]
    return Dataset.from_list(
        [{"messages": [{"role": who, "content": said(row + at)} for who, at in turns[row]]} for row in range(ROWS)]
    )


def completions():
    return Dataset.from_list([{"prompt": said(row) + ":", "completion": " " + said(row + 100)} for row in range(ROWS)])


def pairs():
    return Dataset.from_list(
        [
            {"prompt": said(row), "chosen": " " + said(row + 100), "rejected": " " + said(row + 200)}
            for row in range(ROWS)
        ]
    )


DATA = {"texts": texts, "chats": chats, "completions": completions, "pairs": pairs}
SFT = {
    "text": ("texts", {}),
    "text, accumulated": ("texts", {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}),
    "text, nothing recomputed": ("texts", {"gradient_checkpointing": False}),
    "packed": ("texts", {"packing": True, "max_length": 24}),
    "packed one by one": ("texts", {"packing": True, "max_length": 24, "per_device_train_batch_size": 1}),
    "packed, cut anywhere": ("texts", {"packing": True, "packing_strategy": "wrapped", "max_length": 16}),
    "without padding": ("texts", {"padding_free": True, "max_length": None}),
    "chat, assistant alone": ("chats", {"assistant_only_loss": True}),
    "prompt and completion": ("completions", {}),
    "dft loss": ("texts", {"loss_type": "dft"}),
}
DPO = {
    "dpo": ("pairs", {}),
    "dpo, nothing recomputed": ("pairs", {"gradient_checkpointing": False}),
    "dpo, reference known before": ("pairs", {"precompute_ref_log_probs": True}),
    "dpo, ipo": ("pairs", {"loss_type": "ipo"}),
}
MODES = {**SFT, **DPO}
PLAIN = {
    "num_train_epochs": EPOCHS,
    "per_device_train_batch_size": BATCH,
    "learning_rate": 1e-3,
    "max_length": 32,
    "logging_steps": 1,
    "bf16": False,
    "use_cpu": True,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "seed": 7,
}


def make(mode, base, tokenizer, folder, callbacks=(), model=None, **settings):
    """The trainer of a mode, made as its documentation says."""
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    data, own = MODES[mode]
    kind, config = (DPOTrainer, DPOConfig) if mode in DPO else (SFTTrainer, SFTConfig)
    more = {name: settings.pop(name) for name in ("peft_config", "eval_dataset") if name in settings}
    args = config(str(folder), **{**PLAIN, **own, **settings})
    return kind(
        load(base) if model is None else model,
        args=args,
        train_dataset=DATA[data](),
        processing_class=tokenizer,
        callbacks=list(callbacks),
        **more,
    )


def freeze_by_hand(model):
    model.requires_grad_(False)
    model.model.layers[-1].requires_grad_(True)
    model.model.norm.requires_grad_(True)


def own_log(trainer):
    """What a trainer logged itself, without times."""
    entries = [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]
    timed = ("runtime", "per_second")
    return [{key: value for key, value in entry.items() if not key.endswith(timed)} for entry in entries]


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


class Backward(TrainerCallback):
    """Counts the steps in which backward passes each block."""

    def __init__(self, model):
        self.steps = [0] * BLOCKS
        for number, block in enumerate(model.model.layers):
            block.self_attn.o_proj.register_full_backward_hook(lambda *_, number=number: self.passed(number))

    def passed(self, number):
        self.steps[number] += 1


class Pair:
    """A mode, trained by hand and with the engine."""

    def __init__(self, mode, base, tokenizer, folder):
        self.by_hand = make(mode, base, tokenizer, folder / "by_hand")
        freeze_by_hand(self.by_hand.model)
        self.by_hand.train()
        self.folder = folder / "attached"
        self.attached = make(mode, base, tokenizer, self.folder)
        self.backward = Backward(self.attached.model)
        self.before = weights(self.attached.model)
        self.plan = pt.plan_freeze(self.attached.model, SELECTORS)
        self.tuning = pt.attach(self.attached, self.plan, delta_steps=2)
        self.attached.train()


@pytest.fixture(scope="module")
def pair_of(base, tokenizer, tmp_path_factory):
    trained = {}

    def of(mode):
        if mode not in trained:
            trained[mode] = Pair(mode, base, tokenizer, tmp_path_factory.mktemp("pair"))
        return trained[mode]

    return of


@pytest.mark.parametrize("mode", MODES)
def test_every_logged_value_is_that_of_a_run_without_the_engine(mode, pair_of):
    pair = pair_of(mode)
    plain, ours = own_log(pair.by_hand), own_log(pair.attached)
    assert len(plain) >= STEPS // 2
    assert [entry.keys() for entry in ours] == [entry.keys() for entry in plain]
    for entry, other in zip(plain, ours, strict=True):
        assert other == pytest.approx(entry, abs=1e-5, rel=1e-5), entry["step"]
    assert {"mean_token_accuracy", "num_tokens", "entropy"} <= plain[0].keys()
    assert ("rewards/margins" in plain[0]) == (mode in DPO)


@pytest.mark.parametrize("mode", MODES)
def test_the_weights_are_those_of_a_run_without_the_engine(mode, pair_of):
    pair = pair_of(mode)
    plain, ours = weights(pair.by_hand.model), weights(pair.attached.model)
    for name in plain:
        torch.testing.assert_close(
            ours[name], plain[name], atol=1e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )
    moved = {name for name in ours if not torch.equal(ours[name], pair.before[name])}
    assert moved == set(pair.plan.trainable)


@pytest.mark.parametrize("mode", MODES)
def test_the_audit_passes_and_deltas_are_logged_beside_the_trainers_own_values(mode, pair_of):
    pair = pair_of(mode)
    assert pair.tuning.audit is not None
    assert pair.tuning.audit.passed
    assert json.loads((pair.folder / "audit.json").read_text())["passed"] is True
    last = pair.attached.state.max_steps
    deltas = [entry for entry in pair.attached.state.log_history if "delta/frozen_l2" in entry]
    assert [entry["step"] for entry in deltas] == sorted({*range(2, last + 1, 2), last})
    assert {entry["delta/frozen_l2"] for entry in deltas} == {0.0}
    assert deltas[-1][f"delta/block_{BLOCKS - 1:02}/mlp"] > 0
    assert not {"entropy", "mean_token_accuracy", "rewards/margins"} & deltas[-1].keys(), "the averages of other steps"
    (verdict,) = [entry for entry in pair.attached.state.log_history if "audit/passed" in entry]
    assert verdict["audit/passed"] == 1.0
    assert pair.tuning.deltas["model.norm.weight"].l2_delta > 0
    assert pair.tuning.deltas["model.layers.0.mlp.up_proj.weight"].l2_delta == 0


@pytest.mark.parametrize("mode", MODES)
def test_backward_passes_no_frozen_block(mode, pair_of):
    passed = pair_of(mode).backward.steps
    assert passed[:-1] == [0] * (BLOCKS - 1)
    assert passed[-1] > 0


@pytest.mark.parametrize("mode", MODES)
def test_from_the_second_epoch_on_rows_start_from_the_states_of_the_frozen_blocks(mode, pair_of):
    fast = pair_of(mode).tuning.fast
    assert fast.passed_by == {}
    assert fast.hits == fast.misses * (EPOCHS - 1)


# ---- phases ---------------------------------------------------------------------------------------------------------


class Requiring(TrainerCallback):
    """Which blocks require gradients, and which have moved, at the end of each step."""

    def __init__(self, model):
        self.before, self.learning, self.moved = weights(model), [], []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        blocks = [f"model.layers.{number}." for number in range(BLOCKS)]
        named = dict(model.named_parameters())
        self.learning.append([any(p.requires_grad for n, p in named.items() if n.startswith(b)) for b in blocks])
        moved = {name for name in named if not torch.equal(named[name], self.before[name])}
        self.moved.append([any(name.startswith(block) for name in moved) for block in blocks])


@pytest.mark.parametrize("mode", ["text", "packed", "chat, assistant alone", "dpo"])
def test_each_phase_begins_at_its_step(mode, pair_of, base, tokenizer, tmp_path):
    trainer = make(mode, base, tokenizer, tmp_path, max_steps=6)
    schedule = [{"from_step": 3, "trainable": ["blocks[-2]"], "learning_rate": 5e-4}]
    plan = pt.plan_freeze(trainer.model, SELECTORS, schedule=schedule)
    seen = Requiring(trainer.model)
    tuning = pt.attach(trainer, plan, delta_steps=1)
    trainer.add_callback(seen)
    trainer.train()
    assert seen.learning == [[False, False, True]] * 3 + [[False, True, True]] * 3
    assert seen.moved == [[False, False, True]] * 3 + [[False, True, True]] * 3
    assert tuning.audit.passed
    by_hand = make(mode, base, tokenizer, tmp_path / "by_hand", max_steps=6)
    freeze_by_hand(by_hand.model)
    by_hand.train()
    ours, plain = ([entry["loss"] for entry in own_log(one)] for one in (trainer, by_hand))
    assert ours[:4] == pytest.approx(plain[:4], abs=1e-5)  # the fourth step's loss is that of the third one's weights
    assert abs(ours[5] - plain[5]) > 1e-5


# ---- what goes wrong ------------------------------------------------------------------------------------------------


class OneBit(TrainerCallback):
    """Changes one bit of a weight after a step."""

    def __init__(self, name, step):
        self.name, self.step = name, step

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            with torch.no_grad():
                dict(model.named_parameters())[self.name].view(torch.int32).view(-1)[0] ^= 1


@pytest.mark.parametrize("mode", ["text", "dpo"])
def test_one_bit_of_a_frozen_weight_is_a_violation_at_the_next_save(mode, base, tokenizer, tmp_path):
    name = "model.layers.0.self_attn.q_proj.weight"
    trainer = make(mode, base, tokenizer, tmp_path, [OneBit(name, 2)], save_strategy="steps", save_steps=1)
    tuning = pt.attach(trainer, pt.plan_freeze(trainer.model, SELECTORS))
    with pytest.raises(FreezeViolation, match=name):
        trainer.train()
    assert trainer.state.global_step == 2
    assert tuning.audit.changed == [name]
    assert json.loads((tmp_path / "audit.json").read_text())["passed"] is False
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]


def test_a_plan_made_before_peft_wraps_the_model_says_so(base, tokenizer, tmp_path):
    peft = pytest.importorskip("peft")
    model = load(base)
    plan = pt.plan_freeze(model, SELECTORS)
    trainer = make(
        "text", base, tokenizer, tmp_path, model=model, peft_config=peft.LoraConfig(target_modules=["q_proj"])
    )
    with pytest.raises(RecipeError, match="peft"):
        pt.attach(trainer, plan)


# ---- precision, checkpoints, adapters, generation -------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["text", "packed", "dpo"])
def test_in_bf16_which_is_trls_default_losses_agree_to_its_rounding(mode, base, tokenizer, tmp_path):
    losses = {}
    for attached in (False, True):
        trainer = make(mode, base, tokenizer, tmp_path / str(attached), bf16=None)
        assert trainer.args.bf16 is True
        if attached:
            tuning = pt.attach(trainer, pt.plan_freeze(trainer.model, SELECTORS))
            assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
        else:
            freeze_by_hand(trainer.model)
        trainer.train()
        losses[attached] = [entry["loss"] for entry in own_log(trainer)]
    assert losses[True] == pytest.approx(losses[False], rel=2e-3)
    assert tuning.audit.passed


@pytest.mark.parametrize("mode", ["text", "dpo"])
def test_a_run_that_goes_on_from_a_checkpoint_ends_as_one_that_was_never_stopped(
    mode, pair_of, base, tokenizer, tmp_path
):
    settings = {"save_strategy": "steps", "save_steps": 4}
    first = make(mode, base, tokenizer, tmp_path, **settings)
    pt.attach(first, pt.plan_freeze(first.model, SELECTORS), delta_steps=2)
    first.train()
    second = make(mode, base, tokenizer, tmp_path, **settings)
    tuning = pt.attach(second, pt.plan_freeze(second.model, SELECTORS), delta_steps=2)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert tuning.audit.passed
    whole, resumed = weights(first.model), weights(second.model)
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []
    moved = {name: delta.l2_delta for name, delta in tuning.deltas.items()}
    assert moved == pytest.approx({name: d.l2_delta for name, d in pair_of(mode).tuning.deltas.items()}, rel=1e-4)


def lora():
    from peft import LoraConfig

    return LoraConfig(r=2, target_modules=["q_proj", "v_proj"], layers_to_transform=[BLOCKS - 1])


@pytest.mark.parametrize("mode", ["text", "packed", "dpo", "dpo, reference known before"])
def test_adapters_in_the_last_block_train_and_all_else_is_proved(mode, base, tokenizer, tmp_path):
    pytest.importorskip("peft")
    logs = {}
    for attached in (False, True):
        trainer = make(mode, base, tokenizer, tmp_path / str(attached), peft_config=lora())
        if attached:
            plan = pt.plan_freeze(trainer.model, ["/.*lora_[AB].*/"])
            tuning = pt.attach(trainer, plan, delta_steps=2)
        trainer.train()
        logs[attached] = own_log(trainer)
    for entry, other in zip(logs[False], logs[True], strict=True):
        assert other == pytest.approx(entry, abs=1e-5, rel=1e-5), entry["step"]
    assert tuning.audit.passed
    assert len(plan.trainable) == 4
    assert all(tuning.deltas[name].l2_delta > 0 for name in plan.trainable if "lora_B" in name)
    saved = tmp_path / "saved"
    trainer.save_model(str(saved))
    assert (saved / "adapter_model.safetensors").is_file()


def test_gradients_end_above_the_frozen_blocks_also_where_peft_has_asked_for_those_of_the_input(
    base, tokenizer, tmp_path
):
    pytest.importorskip("peft")
    trainer = make("text", base, tokenizer, tmp_path, peft_config=lora())
    assert trainer.args.gradient_checkpointing
    backward = Backward(trainer.model.get_base_model())
    tuning = pt.attach(trainer, pt.plan_freeze(trainer.model, ["/.*lora_[AB].*/"]), prefix_cache="off")
    trainer.train()
    assert backward.steps[:-1] == [0] * (BLOCKS - 1)
    assert backward.steps[-1] > 0
    assert tuning.fast.misses == 0


def test_what_scores_the_reference_beforehand_gets_the_batches_of_the_trainers_own_collator(base, tokenizer, tmp_path):
    trainer = make("dpo, reference known before", base, tokenizer, tmp_path)
    own, asked = trainer.data_collator, []
    pt.attach(trainer, pt.plan_freeze(trainer.model, SELECTORS))
    assert trainer.data_collator is own
    trainer.model.model.register_forward_pre_hook(lambda _, args, kwargs: asked.append(kwargs.keys()), with_kwargs=True)
    assert trainer.evaluate(pairs().select(range(5)))["eval_loss"] == pytest.approx(0.693, abs=1e-3)
    assert asked
    assert set().union(*asked) == {"input_ids", "attention_mask", "use_cache"}


def test_trls_head_is_called_as_ours_is():
    """The contract with TRL: a name in its module, the arguments of that function, and the order of what it gives."""
    from trl.kernels import chunked_logprob
    from trl.trainer import utils

    from partialtune.engine import trl_head

    own = getattr(utils, trl_head.FUNCTION)
    theirs = [*inspect.signature(own.forward).parameters.values()][1:]
    ours = [*inspect.signature(trl_head._InPlaceOf(own).apply).parameters.values()]
    assert [one.default for one in ours][5:8] == [one.default for one in theirs][5:8]
    assert [one.name for one in ours] == [one.name for one in theirs]
    assert trl_head.ORDER[1:] == chunked_logprob.OPTIONAL_OUTPUTS
    assert f"{trl_head.FUNCTION}.apply(" in inspect.getsource(utils.add_fused_lm_head)
    with trl_head.fast_trl_head():
        assert getattr(utils, trl_head.FUNCTION) is not own
    assert getattr(utils, trl_head.FUNCTION) is own


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_frozen_head_gives_what_trls_own_function_gives(dtype, with_bias):
    from trl.kernels import ChunkedLogProbFunction

    from partialtune.engine.trl_head import ORDER, _InPlaceOf

    draw = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(300, 64, generator=draw), torch.randn(1000, 64, generator=draw) * 0.3
    bias = torch.randn(1000, generator=draw) if with_bias else None
    targets, wanted = torch.randint(1000, (300,), generator=draw), torch.randn(2, 300, generator=draw)
    targets[:90] = 0  # as TRL gives positions that it ignores, of which some may count
    wanted[:, :60] = 0
    given = []
    for function in (ChunkedLogProbFunction, _InPlaceOf(ChunkedLogProbFunction)):
        states = hidden.clone().requires_grad_()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            outputs = function.apply(states, weight, bias, targets, 0.7, 128, None, 1.5, ORDER)
        (outputs[0] * wanted[0] + outputs[1] * wanted[1]).sum().backward()
        given.append([*outputs, states.grad])
    for own, ours in zip(*given, strict=True):
        low = own is given[0][-1] and dtype == torch.bfloat16  # its gradients are sums of products rounded to 16 bits
        torch.testing.assert_close(ours, own, atol=0.05 if low else 5e-5, rtol=1e-5)


@pytest.mark.parametrize("capped", [None, 5.0])
def test_a_frozen_head_in_16_bits_gives_what_it_gives_widened(capped, monkeypatch):
    """Also where TRL's own function has to do it, which multiplies matrices of one dtype."""
    from trl.kernels import ChunkedLogProbFunction

    from partialtune.engine import head_loss
    from partialtune.engine.trl_head import ORDER, _InPlaceOf

    monkeypatch.setattr(head_loss, "WIDENED_AT_ONCE", 300 * 64)
    draw = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(300, 64, generator=draw), (torch.randn(1000, 64, generator=draw) * 0.3).bfloat16()
    targets, wanted = torch.randint(1000, (300,), generator=draw), torch.randn(2, 300, generator=draw)
    given = []
    for held in (weight.float(), weight):
        states = hidden.clone().requires_grad_()
        function = _InPlaceOf(ChunkedLogProbFunction)
        outputs = function.apply(states, held, None, targets, 0.7, 128, capped, 1.5, ORDER)
        (outputs[0] * wanted[0] + outputs[1] * wanted[1]).sum().backward()
        given.append([*outputs, states.grad])
    for wide, narrow in zip(*given, strict=True):
        torch.testing.assert_close(narrow, wide, rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_a_head_get_the_gradient_that_trls_own_function_gives_them(dtype):
    from trl.kernels import ChunkedLogProbFunction

    from partialtune.engine.trl_head import ORDER, _InPlaceOf
    from partialtune.model.row_parameters import train_rows

    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, 64, generator=draw)
    targets, wanted = torch.randint(50, (300,), generator=draw), torch.randn(2, 300, generator=draw)
    heads = [torch.nn.Linear(64, 1000, bias=False) for _ in range(2)]
    heads[1].load_state_dict(heads[0].state_dict())
    train_rows(heads[1], {"weight": ((0, 3), (40, 42))}, dict(heads[1].named_parameters()))
    given = []
    for head, function in zip(heads, (ChunkedLogProbFunction, _InPlaceOf(ChunkedLogProbFunction)), strict=True):
        states = hidden.clone().requires_grad_()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            outputs = function.apply(states, head.weight, None, targets, 0.7, 128, None, 1.5, ORDER)
        (outputs[0] * wanted[0] + outputs[1] * wanted[1]).sum().backward()
        given.append([*outputs, states.grad])
    rows = heads[1].weight_rows.grad
    assert rows.shape == (5, 64)
    given[0].append(heads[0].weight.grad[[0, 1, 2, 40, 41]])
    given[1].append(rows)
    for number, (own, ours) in enumerate(zip(*given, strict=True)):
        low = dtype == torch.bfloat16 and number >= len(ORDER)  # sums of products rounded to 16 bits
        torch.testing.assert_close(ours, own, atol=0.05 if low else 5e-5, rtol=1e-5)


def test_rows_learn_in_trls_trainer_as_if_the_whole_matrices_did(base, tokenizer, tmp_path):
    """One step of SGD: the rows move by their gradient, which is that of the whole matrix."""
    moved = {}
    for rows in ("", "[10:60]"):
        trainer = make("text", base, tokenizer, tmp_path, max_steps=1, optim="sgd", learning_rate=1.0, max_grad_norm=0)
        model = trainer.model
        start = {name: values.clone() for name, values in model.state_dict().items()}
        tuning = pt.attach(trainer, pt.plan_freeze(model, [f"embeddings.tokens{rows}", f"head{rows}"]))
        trainer.train()
        assert tuning.audit.passed
        assert ("loss" in tuning.fast.in_use) == bool(rows)
        moved[rows] = {name: values - start[name] for name, values in model.state_dict().items()}
    for name, whole in moved[""].items():
        rows = moved["[10:60]"][name]
        assert rows.any() == (name in ("model.embed_tokens.weight", "lm_head.weight")), name
        if rows.any():
            assert rows[10:60].abs().max() > 1e-3
            assert not rows[:10].any()
            assert not rows[60:].any()
            torch.testing.assert_close(rows[10:60], whole[10:60], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(("selectors", "taken"), [(SELECTORS, ["loss"]), (["head"], [])])
def test_the_fast_head_is_taken_where_the_head_is_frozen(selectors, taken, base, tokenizer, tmp_path):
    from trl.trainer import utils

    own = utils._ChunkedLogProbFunction
    trainer = make("text", base, tokenizer, tmp_path, max_steps=1)
    tuning = pt.attach(trainer, pt.plan_freeze(trainer.model, selectors))
    trainer.train()
    assert tuning.fast.in_use == taken
    assert utils._ChunkedLogProbFunction is own


def test_evaluations_in_between_give_the_same_scores(base, tokenizer, tmp_path):
    logs = {}
    settings = {"eval_strategy": "epoch", "per_device_eval_batch_size": 3}
    for attached in (False, True):
        trainer = make("text", base, tokenizer, tmp_path, eval_dataset=texts(5), **settings)
        if attached:
            pt.attach(trainer, pt.plan_freeze(trainer.model, SELECTORS), delta_steps=1)
        else:
            freeze_by_hand(trainer.model)
        trainer.train()
        logs[attached] = own_log(trainer)
    assert sum("eval_mean_token_accuracy" in entry for entry in logs[False]) == EPOCHS
    for entry, other in zip(logs[False], logs[True], strict=True):
        assert other == pytest.approx(entry, abs=1e-5, rel=1e-5), entry["step"]


def test_grpo_generates_and_trains_as_without_the_engine(base, tokenizer, tmp_path):
    from trl import GRPOConfig, GRPOTrainer

    logs = {}
    for attached in (False, True):
        own = {"max_steps": 4, "num_generations": 4, "max_completion_length": 6, "beta": 0.1, "num_iterations": 2}
        plain = {name: value for name, value in PLAIN.items() if name != "max_length"}
        args = GRPOConfig(str(tmp_path), **{**plain, **own})
        trainer = GRPOTrainer(
            load(base),
            reward_funcs=lambda completions, **_: [float(len(set(text)) % 5) for text in completions],
            args=args,
            train_dataset=Dataset.from_dict({"prompt": [said(row) for row in range(4)]}),
            processing_class=tokenizer,
        )
        if attached:
            tuning = pt.attach(trainer, pt.plan_freeze(trainer.model, SELECTORS), delta_steps=2)
        else:
            freeze_by_hand(trainer.model)
        trainer.train()
        logs[attached] = [
            {key: value for key, value in entry.items() if "time" not in key} for entry in own_log(trainer)
        ]
    assert len(logs[False]) == 4
    for entry, other in zip(logs[False], logs[True], strict=True):
        assert other == pytest.approx(entry, abs=1e-5, rel=1e-5), entry["step"]
    assert tuning.audit.passed
