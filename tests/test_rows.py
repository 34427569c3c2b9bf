"""Rows of a matrix train through every door: as if all of it did, while the others keep every bit."""

import copy

import pytest
import torch
import yaml
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments, default_data_collator

import partialtune as pt
from conftest import REPOSITORY, some_windows, tiny_gpt2
from partialtune.cli import main
from partialtune.errors import InputError, ModelError, RecipeError
from partialtune.model.loading import model_location
from partialtune.model.parameters import named_learners, named_weights
from partialtune.model.rows import put_rows, take_rows
from two_processes import on_two_processes

TOKENS, POSITIONS = "transformer.wte.weight", "transformer.wpe.weight"
ROWS = ((3, 4), (100, 128))
SELECTOR = "embeddings.tokens[3,100:]"
STEPS = 6
CLOSE = 1e-6


def model_of(seed=0):
    return tiny_gpt2(seed, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)


def trainer_of(model, folder, *callbacks, **options):
    """Its AdamW is the fused one, whose steps no count of versions shows; weight decay would move every row."""
    settings = {"max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "weight_decay": 0.1}
    settings |= {"max_grad_norm": 0.0, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", **options}
    data = some_windows(24, 16)
    data = data.add_column("labels", data["input_ids"])
    return Trainer(
        model,
        TrainingArguments(str(folder), **settings),
        train_dataset=data,
        eval_dataset=data.select(range(4)),
        data_collator=default_data_collator,
        callbacks=list(callbacks),
    )


class PutBack(TrainerCallback):
    """After each step what is not to train is as it was: all but these rows of some matrices, and some parameters."""

    def __init__(self, model, rows, others=()):
        self.rows, self.others = rows, set(others)
        self.start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in self.rows:
                    kept = take_rows(parameter, self.rows[name])
                    parameter.copy_(self.start[name])
                    put_rows(parameter, self.rows[name], kept)
                elif name not in self.others:
                    parameter.copy_(self.start[name])


def by_hand(folder, rows, others=(), untied=False, **options):
    """The weights of a stock Trainer in which whole matrices train, and what is not to move is put back."""
    model = model_of()
    if untied:
        pt.apply_plan(model, pt.plan_freeze(model, ["head"], head="untied"))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in rows or name in others)
    trainer_of(model, folder, PutBack(model, rows, others), **options).train()
    return dict(model.named_parameters())


def attached(
    folder, selectors, head="tied", schedule=(), callbacks=(), fast_paths=("loss", "gelu", "casts"), **options
):
    trainer = trainer_of(model_of(), folder, *callbacks, **options)
    plan = pt.plan_freeze(trainer.model, selectors, head=head, schedule=schedule)
    tuning = pt.attach(trainer, plan, fast_paths=fast_paths)
    trainer.train(resume_from_checkpoint=options.get("resume_from_checkpoint"))
    return trainer, tuning


def assert_rows_alone_moved(model, start, rows, others=()):
    for name, parameter in named_weights(model):
        if name in rows:
            assert torch.equal(
                parameter[_outside(rows[name], len(parameter))], start[name][_outside(rows[name], len(parameter))]
            )
            assert not torch.equal(take_rows(parameter, rows[name]), take_rows(start[name], rows[name]))
        elif name not in others:
            assert torch.equal(parameter, start[name]), name


def _outside(rows, length):
    inside = {number for start, stop in rows for number in range(start, stop)}
    return [number for number in range(length) if number not in inside]


def start_of(untied=False):
    model = model_of()
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return start | ({"lm_head.weight": start[TOKENS]} if untied else {})


NORM = ["transformer.ln_f.weight", "transformer.ln_f.bias"]
POLICIES = {
    "tied": ([SELECTOR], "tied", {TOKENS: ROWS}, []),
    "untied embeddings": ([SELECTOR], "untied", {TOKENS: ROWS}, []),
    "untied head, and a norm": (["head[3,100:]", "final_norm"], "untied", {"lm_head.weight": ROWS}, NORM),
    "positions": (["embeddings.positions[2:5]"], "tied", {POSITIONS: ((2, 5),)}, []),
    "both, and a block's norms": (
        [SELECTOR, "embeddings.positions[2:5]", "blocks[0].norms"],
        "tied",
        {TOKENS: ROWS, POSITIONS: ((2, 5),)},
        [name for name, _ in tiny_gpt2().named_parameters() if ".h.0.ln" in name],
    ),
    "all but rows": (["all", "!embeddings.tokens[:90]"], "tied", {TOKENS: ((90, 128),)}, ...),
}


@pytest.mark.parametrize("policy", POLICIES)
def test_rows_end_where_they_do_if_the_whole_matrix_trains_and_the_rest_is_put_back(policy, tmp_path):
    selectors, head, rows, others = POLICIES[policy]
    others = [name for name in start_of() if name not in rows] if others is ... else others
    trainer, tuning = attached(tmp_path / "rows", selectors, head)
    assert tuning.audit.passed
    assert "loss" in tuning.fast.in_use
    assert_rows_alone_moved(trainer.model, start_of(head == "untied"), rows, others)
    reference = by_hand(tmp_path / "whole", rows, others, untied=head == "untied")
    # Of the key biases, which train with all, the gradient is rounding noise, of which AdamW makes whole steps.
    atol = 1e-4 if policy == "all but rows" else CLOSE
    for name, parameter in named_weights(trainer.model):
        torch.testing.assert_close(parameter, reference[name], rtol=0, atol=atol)
    for name, learner in named_learners(trainer.model):
        if name in rows:
            count = sum(stop - start for start, stop in rows[name])
            state = trainer.optimizer.state[learner]
            assert learner.shape == state["exp_avg"].shape == state["exp_avg_sq"].shape == (count, 32)
    assert trainer.model.get_parameter(next(iter(rows))).grad is None
    if policy == "untied head, and a norm":
        assert tuning.fast.keeps_prefix
        assert tuning.fast.hits == 0  # one epoch: 24 windows in 6 steps of 4


class LooksOn(TrainerCallback):
    """Generates, saves, scores and copies the model between steps: nothing of it changes the training."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        values = model.state_dict()[TOKENS]
        assert torch.equal(take_rows(values, ROWS), model.transformer.wte.weight_rows)
        twin = copy.deepcopy(model)
        ids = torch.tensor([[3, 101, 127, 4]])
        with torch.no_grad():
            model.eval()
            assert torch.equal(twin.eval()(ids).logits, model(ids).logits)
            model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0)
            twin.transformer.wte.weight_rows.zero_()
            assert not twin(ids).logits[..., 3].any()  # a copy's rows are its own, and those of its tied head
        model.train()


OPTIONS = {
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "recomputed": {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
    "plain AdamW": {"optim": "adamw_torch"},
    "Adafactor": {"optim": "adafactor"},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 2},
}


@pytest.mark.parametrize("option", [*OPTIONS, "looks on"])
def test_options_of_a_trainer_and_looks_in_between_leave_the_rows_what_they_are(option, tmp_path):
    options = OPTIONS.get(option, {})
    callbacks = [LooksOn()] if option == "looks on" else []
    trainer, tuning = attached(tmp_path / "rows", [SELECTOR], callbacks=callbacks, **options)
    assert tuning.audit.passed
    assert_rows_alone_moved(trainer.model, start_of(), {TOKENS: ROWS})
    if option == "Adafactor":  # its update is scaled by the whole matrix' root mean square
        return
    reference = by_hand(tmp_path / "whole", {TOKENS: ROWS}, **options)
    torch.testing.assert_close(dict(named_weights(trainer.model))[TOKENS], reference[TOKENS], rtol=0, atol=CLOSE)


def test_noise_on_embeddings_is_the_same_for_rows(tmp_path):
    """NEFTune's hook adds it to what the embedding gives, in train mode."""
    trainer, _ = attached(tmp_path / "rows", [SELECTOR], fast_paths=(), neftune_noise_alpha=5.0)
    reference = by_hand(tmp_path / "whole", {TOKENS: ROWS}, neftune_noise_alpha=5.0)
    quiet, _ = attached(tmp_path / "quiet", [SELECTOR])
    values = dict(named_weights(trainer.model))[TOKENS]
    torch.testing.assert_close(values, reference[TOKENS], rtol=0, atol=CLOSE)
    assert (values - dict(named_weights(quiet.model))[TOKENS]).abs().max() > 1e-5


def test_in_bf16_autocast_rows_and_others_are_what_they_are_in_a_stock_trainer(tmp_path):
    for head, rows in (("tied", {TOKENS: ROWS}), ("untied", {"lm_head.weight": ROWS})):
        selector = [SELECTOR if head == "tied" else "head[3,100:]"]
        trainer, tuning = attached(tmp_path / "rows", selector, head, bf16=True, use_cpu=True)
        assert {"loss", "casts"} <= set(tuning.fast.in_use)
        assert_rows_alone_moved(trainer.model, start_of(head == "untied"), rows)
        reference = by_hand(tmp_path / "whole", rows, untied=head == "untied", bf16=True, use_cpu=True)
        name = next(iter(rows))
        ours, theirs = dict(named_weights(trainer.model))[name], reference[name]
        # AdamW's step is 1e-3 for each value: rounding of 16 bits turns the sign of few
        assert ((ours - theirs).abs() > 1e-3).float().mean() < 0.01


def test_rows_that_begin_in_a_later_phase_wait_and_have_a_rate_of_their_own(tmp_path):
    rates = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
            held = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
            rates.append(held.get(id(model.transformer.wte.weight_rows)))

    schedule = [{"from_step": 3, "trainable": [SELECTOR], "learning_rate": 5e-4}]
    trainer, tuning = attached(
        tmp_path, ["final_norm"], schedule=schedule, callbacks=[Watch()], lr_scheduler_type="constant"
    )
    assert tuning.audit.passed
    assert rates == [None, None, None, 5e-4, 5e-4, 5e-4]
    assert_rows_alone_moved(trainer.model, start_of(), {TOKENS: ROWS}, NORM)


# ---- saved and loaded again ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("door", ["attach", "apply_plan alone"])
@pytest.mark.parametrize("step", [2, 5])
def test_a_training_that_goes_on_from_a_checkpoint_ends_with_the_bits_of_one_that_was_never_stopped(
    door, step, tmp_path
):
    def train(folder, resume=None, **options):
        trainer = trainer_of(model_of(), folder, save_strategy="steps", save_steps=1, logging_steps=1, **options)
        plan = pt.plan_freeze(trainer.model, [SELECTOR, "final_norm"])
        if door == "attach":
            pt.attach(trainer, plan)
        else:
            pt.apply_plan(trainer.model, plan)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = train(tmp_path / "whole")
    gone_on = train(tmp_path / "on", str(tmp_path / "whole" / f"checkpoint-{step}"))
    assert_rows_alone_moved(gone_on.model, start_of(), {TOKENS: ROWS}, NORM)
    ends = [dict(named_weights(trainer.model)) for trainer in (whole, gone_on)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    moments = [
        next(s for p, s in t.optimizer.state.items() if p.shape == (29, 32))["exp_avg"] for t in (whole, gone_on)
    ]
    assert torch.equal(*moments)
    loaded = model_of().from_pretrained(tmp_path / "whole" / "checkpoint-6")
    assert all(torch.equal(parameter, ends[0][name]) for name, parameter in loaded.named_parameters())


def test_the_best_model_is_loaded_with_its_rows(tmp_path):
    trainer = trainer_of(
        model_of(),
        tmp_path,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        learning_rate=0.3,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # an early one, since it learns
    )
    pt.attach(trainer, pt.plan_freeze(trainer.model, [SELECTOR]))
    trainer.train()
    best = model_of().from_pretrained(trainer.state.best_model_checkpoint)
    assert trainer.state.best_global_step < STEPS
    assert torch.equal(best.transformer.wte.weight, trainer.model.state_dict()[TOKENS])
    assert torch.equal(take_rows(best.transformer.wte.weight, ROWS), trainer.model.transformer.wte.weight_rows)


def test_moments_of_other_rows_though_as_many_do_not_load(tmp_path):
    attached(tmp_path / "rows", ["embeddings.tokens[95:99]"], save_strategy="steps", save_steps=2)
    saved = torch.load(tmp_path / "rows" / "checkpoint-2" / "optimizer.pt", weights_only=True)
    assert [name for group in saved["param_groups"] for name in group["params"]] == [f"{TOKENS}[95:99]"]
    other = trainer_of(model_of(), tmp_path / "other")
    pt.attach(other, pt.plan_freeze(other.model, ["embeddings.tokens[90:94]"]))
    with pytest.raises(InputError, match="the rows that train differ"):
        other.train(resume_from_checkpoint=str(tmp_path / "rows" / "checkpoint-2"))


# ---- a loop of one's own ---------------------------------------------------------------------------------------------


def batches():
    ids = torch.tensor(some_windows(24, 16)["input_ids"])
    return ids.view(STEPS, 4, 16)


def loop(model, optimizer, start=0, stop=STEPS):
    model.train()
    for ids in batches()[start:stop]:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def optimizer_of(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.1)


def test_a_loop_goes_on_from_model_and_optimizer_saved_in_its_midst():
    def audited_loop(saved=None, first=0, stop=STEPS):
        model = model_of()
        plan = pt.plan_freeze(model, [SELECTOR])
        pt.apply_plan(model, plan)
        optimizer = optimizer_of(model)
        with pt.audited(model, plan, optimizer, fast_paths=("gelu", "casts", "loss"), first_step=first) as tuning:
            if saved:
                model.load_state_dict(saved[0])
                optimizer.load_state_dict(saved[1])
            loop(model, optimizer, first, stop)
            state = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
        assert tuning.audit.passed
        assert_rows_alone_moved(model, start_of(), {TOKENS: ROWS})
        return state

    whole, half = audited_loop(), audited_loop(stop=3)
    assert list(half[1]["state"]) == [f"{TOKENS}[3,100:128]"]
    gone_on = audited_loop(half, 3)
    assert all(torch.equal(values, gone_on[0][name]) for name, values in whole[0].items())


def test_a_backward_after_the_rows_have_moved_is_an_error_and_no_wrong_gradient():
    """As with a whole matrix that trains. Two forward passes before their backward passes are none."""
    model = model_of()
    pt.apply_plan(model, pt.plan_freeze(model, [SELECTOR]))
    optimizer = torch.optim.AdamW([model.transformer.wte.weight_rows], lr=1e-3, foreach=True)
    ids = batches()
    first, second = (model(input_ids=one, labels=one).loss for one in ids[:2])
    model.state_dict()
    first.backward()
    second.backward()
    together = model.transformer.wte.weight_rows.grad.clone()
    late = model(input_ids=ids[2], labels=ids[2]).loss
    optimizer.step()
    model(input_ids=ids[0])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        late.backward()
    model = model_of()
    pt.apply_plan(model, pt.plan_freeze(model, [SELECTOR]))
    sum(model(input_ids=one, labels=one).loss for one in ids[:2]).backward()
    torch.testing.assert_close(model.transformer.wte.weight_rows.grad, together)


def test_the_snippet_of_the_page_trains_rows_alone():
    page = (REPOSITORY / "docs" / "what-may-learn.md").read_text(encoding="utf-8")
    section = page.split("## Rows\n")[1].split("\n## ")[0]
    code = section.split("```python\n")[1].split("```")[0]
    data = some_windows(8, 16)
    data = data.add_column("labels", data["input_ids"]).with_format("torch")
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    names = {"loader": loader}
    location = model_location("builtin:lilliput")
    exec(compile(code.replace("openai-community/gpt2", location), "docs/what-may-learn.md, Rows", "exec"), names)
    assert names["tuning"].audit.passed
    assert names["state"]["exp_avg"].shape == names["rows"].shape == (4, names["model"].config.n_embd)


COMPILED = {"torch_compile": True, "torch_compile_backend": "eager"}  # the graphs without a C++ compiler


@pytest.mark.slow
def test_a_compiled_model_trains_its_rows(tmp_path):
    """With inductor too, which takes a minute: 1e-8 apart."""
    trainer, tuning = attached(tmp_path / "rows", [SELECTOR], **COMPILED)
    assert tuning.audit.passed
    assert_rows_alone_moved(trainer.model, start_of(), {TOKENS: ROWS})
    reference = by_hand(tmp_path / "whole", {TOKENS: ROWS})
    torch.testing.assert_close(dict(named_weights(trainer.model))[TOKENS], reference[TOKENS], rtol=0, atol=CLOSE)


@pytest.mark.slow
def test_a_recipe_trains_rows_and_saves_the_matrix_whole(tmp_path):
    def recipe(name, **more):
        values = {"model_name_or_path": "builtin:lilliput", "text": "builtin:python-docs", "block_size": 32}
        values |= {"trainable": ["embeddings.tokens[-4:]"], "output_dir": str(tmp_path / name), "max_steps": 4}
        values |= {"per_device_train_batch_size": 2, "learning_rate": 1e-3, "weight_decay": 0.1, "save_steps": 2}
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump({**values, "prompts": ["It was"], "validation_share": 0.01, **more}))
        return ["train", str(file)]

    assert main(recipe("whole")) == 0
    saved, base = tmp_path / "whole", AutoModelForCausalLM.from_pretrained(model_location("builtin:lilliput"))
    values = AutoModelForCausalLM.from_pretrained(saved).state_dict()
    for name, start in base.state_dict().items():
        moved = (values[name] != start).flatten(1).any(1) if start.dim() > 1 else values[name] != start
        last = name in (TOKENS, "lm_head.weight")
        assert moved.nonzero().flatten().tolist() == ([*range(len(start) - 4, len(start))] if last else []), name
    state = torch.load(saved / "checkpoint-2" / "optimizer.pt", weights_only=True)
    ((name, moments),) = state["state"].items()
    length, width = base.transformer.wte.weight.shape
    assert name == f"{TOKENS}[{length - 4}:{length}]"
    assert moments["exp_avg"].shape == moments["exp_avg_sq"].shape == (4, width)


# ---- several processes -----------------------------------------------------------------------------------------------


def train_on_processes(folder, batch):
    trainer = trainer_of(
        model_of(), folder, per_device_train_batch_size=batch, train_sampling_strategy="sequential", use_cpu=True
    )
    tuning = pt.attach(trainer, pt.plan_freeze(trainer.model, [SELECTOR, "final_norm"]))
    trainer.train()
    wrapped = isinstance(trainer.model_wrapped, DistributedDataParallel)
    return wrapped, tuning.audit.passed, {name: p.detach().clone() for name, p in named_weights(trainer.model)}


@pytest.mark.slow
def test_two_processes_train_the_rows_of_one(tmp_path):
    _, _, alone = train_on_processes(tmp_path / "one", 4)
    (wrapped, passed, main), (_, _, other) = on_two_processes(train_on_processes, tmp_path / "two", 2)
    assert wrapped
    assert passed
    start = start_of()
    for name, values in main.items():
        assert torch.equal(values, other[name]), name
        torch.testing.assert_close(values, alone[name], rtol=0, atol=CLOSE)
    outside = _outside(ROWS, 128)
    assert torch.equal(main[TOKENS][outside], start[TOKENS][outside])
    assert not torch.equal(take_rows(main[TOKENS], ROWS), take_rows(start[TOKENS], ROWS))


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_an_optimizer_that_was_made_before_the_rows_is_refused_and_the_model_stays_as_it_was(tmp_path):
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    plan = pt.plan_freeze(model, [SELECTOR])
    trainer = trainer_of(model, tmp_path)
    trainer.optimizer = optimizer
    for door in (lambda: pt.attach(trainer, plan), lambda: pt.audited(model, plan, optimizer)):
        with pytest.raises(RecipeError, match=r"wte\.weight\[3,100:128\] is to learn.*make the optimizer after it"):
            door()
    assert type(model.transformer.wte) is nn.Embedding
    assert all(parameter.requires_grad for parameter in model.parameters())
    pt.apply_plan(model, plan)
    with pytest.raises(RecipeError, match=r"holds the whole of transformer\.wte\.weight"):
        pt.audited(model, plan, optimizer)


def test_a_plan_takes_the_place_of_another_one():
    model = model_of()
    pt.apply_plan(model, pt.plan_freeze(model, [SELECTOR]))
    with torch.no_grad():
        model.transformer.wte.weight_rows += 1
    newest = model.state_dict()[TOKENS].clone()
    pt.apply_plan(model, pt.plan_freeze(model, ["embeddings.tokens[5:7]"]))
    assert model.transformer.wte.weight_rows.shape == (2, 32)
    pt.apply_plan(model, pt.plan_freeze(model, ["embeddings.tokens"]))
    assert type(model.transformer.wte) is nn.Embedding
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.transformer.wte.weight.requires_grad
    assert torch.equal(model.transformer.wte.weight, newest)
    assert [name for name, _ in model.named_parameters()] == list(start_of())


class ReadsPast(torch.nn.Module):
    """A head made by hand: the embedding's matrix, past the module that holds it."""

    def __init__(self, embedding, operation):
        super().__init__()
        self.held = [embedding]
        self.operation = operation

    def forward(self, hidden):
        return self.operation(hidden, self.held[0])


@pytest.mark.parametrize(
    ("operation", "words"),
    [
        (
            lambda hidden, embedding: hidden @ embedding.weight.T,
            "GPT2LMHeadModel: Rows of a matrix.* cannot be followed",
        ),
        (lambda hidden, embedding: hidden @ embedding.weight.detach().T, None),  # its own wish
    ],
)
def test_a_model_that_uses_the_matrix_in_another_operation_is_refused_before_it_trains(operation, words, tmp_path):
    model = model_of()
    model.lm_head = ReadsPast(model.transformer.wte, operation)
    trainer = trainer_of(model, tmp_path)
    plan = pt.plan_freeze(model, [SELECTOR])
    if words is None:
        pt.attach(trainer, plan)
    else:
        with pytest.raises(ModelError, match=words) as refused:
            pt.attach(trainer, plan)
        assert refused.value.exit_code == 2


def test_a_matrix_that_gets_no_gradient_at_all_is_refused(tmp_path):
    model = model_of()
    plan = pt.plan_freeze(model, ["embeddings.positions[2:4]"])
    trainer = trainer_of(model, tmp_path)
    model.transformer.wpe.forward = lambda ids: nn.functional.embedding(ids, model.state_dict()[POSITIONS])
    with pytest.raises(
        ModelError, match=r"wpe\.weight\[2:4\] trains, and its forward pass gives these rows no gradient"
    ):
        pt.attach(trainer, plan)


def test_a_way_of_launching_that_copies_whole_matrices_is_refused():
    from partialtune.engine.row_checks import check_rows_fit_launch

    model = model_of()
    plan = pt.plan_freeze(model, [SELECTOR])
    with pytest.raises(RecipeError, match=r"wte\.weight\[3,100:128\] trains, and DataParallel copies"):
        check_rows_fit_launch(plan, model, replicated=True)
    check_rows_fit_launch(plan, model, replicated=False)
    check_rows_fit_launch(pt.plan_freeze(model_of(), ["final_norm"]), model, replicated=True)


def test_data_parallel_is_refused_in_a_loop():
    model = model_of()
    plan = pt.plan_freeze(model, [SELECTOR])
    with pytest.raises(RecipeError, match="DataParallel copies"):
        pt.audited(nn.DataParallel(model), plan, optimizer_of(model))


def test_a_parameter_that_another_library_has_replaced_is_refused():
    model = model_of()
    pt.apply_plan(model, pt.plan_freeze(model, [SELECTOR]))
    embedding = model.transformer.wte
    embedding.weight_rows = nn.Parameter(embedding.weight_rows.detach().clone())
    with pytest.raises(ModelError, match="Rows of a Embedding train, and their parameter was replaced"):
        model(input_ids=torch.tensor([[1, 2]]))
