"""From Python, in a notebook and in a thread: `partialtune.train`, what it gives, and what is shown of it."""

import copy
import io
import json
import pickle
import re
import shutil
import threading

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import partialtune as pt
from cluster import small_recipe
from conftest import REPOSITORY, some_windows, tiny_gpt2
from partialtune.cli import main
from partialtune.errors import InputError, PartialtuneError, RecipeError
from partialtune.proof.audit_result import KEPT_EVERY_BIT, Audit, SavedDifference
from partialtune.recipe.recipe import read_recipe, recipe_from_values
from partialtune.tables import html_table
from test_deltas import make_trainer

WHOLE_RUNS = True  # what `quick_runs` in conftest.py looks for
SHORT = {"max_steps": 3, "schedule": [{"from_step": 2, "trainable": ["embeddings"]}]}


def values_of(folder, **changes):
    """The keys of a recipe for a tiny model of three blocks, whose base and text are written into the folder."""
    words = small_recipe(folder, **SHORT | changes)
    return yaml.safe_load(open(words[1]).read())


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a base, a text, a recipe, and the run that the command line made of it."""
    folder = tmp_path_factory.mktemp("notebook")
    values_of(folder)
    assert main(["train", str(folder / "recipe.yaml")]) == 0
    return folder


def in_thread(work):
    """What `work()` gives, or raises, in a thread that is not the main one."""
    found = []

    def note():
        try:
            found.append(work())
        except BaseException as error:  # noqa: BLE001 - SystemExit too
            found.append(error)

    thread = threading.Thread(target=note)
    thread.start()
    thread.join()
    return found[0]


# ---- a run ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_thread_trains_the_same_weights_and_digests_as_the_command_line(home, tmp_path):
    run = in_thread(lambda: pt.train(home / "recipe.yaml", output_dir=tmp_path / "run"))
    assert isinstance(run, pt.FinishedRun), run
    name = "model.safetensors"
    assert (run.folder / name).read_bytes() == (home / "run" / name).read_bytes()
    assert run.plan == json.loads((home / "run" / "freeze_plan.json").read_text())
    assert run.scores == pt.open_run(home / "run").scores
    assert {path.name for path in (run.folder / "figures").iterdir()} == {f"{name}.png" for name in run.figures}


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_a_mapping_is_a_recipe_and_keywords_win_over_it(home, tmp_path):
    values = yaml.safe_load((home / "recipe.yaml").read_text())
    run = pt.train(values, output_dir=str(tmp_path / "run"), max_steps=1, schedule=[], trainable="blocks[-1]")
    assert run.folder == tmp_path / "run"
    assert run.files.recipe["max_steps"] == 1
    assert {entry["selector"] for entry in run.plan["parameters"]} == {None, "blocks[-1]"}
    assert run.audit.passed
    with pytest.raises(RecipeError, match="holds a run of another recipe"):
        pt.train(values, output_dir=str(tmp_path / "run"))


def test_a_run_that_is_finished_is_opened_and_not_trained_again(home):
    before = (home / "run" / "model.safetensors").stat().st_mtime_ns
    run = pt.train(str(home / "recipe.yaml"))
    assert run.audit.passed
    assert run.folder == home / "run"
    assert (home / "run" / "model.safetensors").stat().st_mtime_ns == before


def test_a_folder_opens_as_scores_prompts_audit_deltas_and_figures(home):
    run = pt.open_run(home / "run")
    evaluation = json.loads((home / "run" / "evaluation.json").read_text())
    assert {**run.scores, "prompts": run.prompts} == evaluation
    assert run.audit.to_json() == json.loads((home / "run" / "audit.json").read_text())
    assert run.deltas.steps[-1] == 3
    assert run.deltas.last["transformer.ln_f.weight"]["l2_delta"] > 0
    assert repr(run) == f"FinishedRun({str(home / 'run')!r}, freeze audit passed)"
    with pytest.raises(InputError, match="is not the folder of a finished run"):
        pt.open_run(home)


def test_figures_are_those_of_the_report_as_objects_that_a_notebook_shows(home):
    import matplotlib.figure
    from matplotlib import _pylab_helpers

    run = pt.open_run(home / "run")
    assert "loss" in run.figures
    for name, figure in run.figures.items():
        assert isinstance(figure, matplotlib.figure.Figure)
        # drawn by the same code: pixel for pixel, the words in the file included
        assert figure._repr_png_() == (home / "run" / "figures" / f"{name}.png").read_bytes()
    assert run.figures is run.figures
    assert not _pylab_helpers.Gcf.figs  # pyplot, whose state is the notebook's own, knows nothing of them


def test_the_model_of_a_run_and_its_tokenizer_load(home):
    model, tokenizer = pt.open_run(home / "run").load()
    saved = AutoModelForCausalLM.from_pretrained(home / "run").state_dict()
    assert all(torch.equal(values, saved[name]) for name, values in model.state_dict().items())
    assert not model.training
    assert tokenizer.decode(tokenizer("It was")["input_ids"]) == "It was"


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("changes", [{"checkpoint_format": "delta"}, {"method": "lora", "trainable": ["attention"]}])
def test_a_delta_and_adapters_load_as_the_model_that_was_scored(home, tmp_path, changes):
    values = yaml.safe_load((home / "recipe.yaml").read_text()) | {"schedule": []} | changes
    run = pt.train(values, output_dir=tmp_path / "run", max_steps=2, learning_rate=0.01)
    model, tokenizer = run.load()
    ids = torch.tensor([tokenizer(run.prompts[0]["prompt"])["input_ids"]])
    with torch.no_grad():
        probabilities = model(ids).logits[0, -1].softmax(-1)
    for entry in run.prompts[0]["after"]:
        assert probabilities[entry["id"]].item() == pytest.approx(entry["probability"], abs=1e-5)


def test_mistakes_raise_all_at_once_and_never_exit(home):
    values = yaml.safe_load((home / "recipe.yaml").read_text())
    with pytest.raises(RecipeError) as of_file:
        pt.train(home / "recipe.yaml", max_stepz=5, learning_rate="fast")
    assert "argument, max_stepz: " in str(of_file.value)
    assert "argument, learning_rate: got 'fast'" in str(of_file.value)
    with pytest.raises(RecipeError, match="The recipe: one problem"):
        pt.train({**values, "max_stepz": 5})
    with pytest.raises(
        RecipeError, match="The recipe is of type int; allowed: a YAML file, builtin:quickstart, or a map"
    ):
        pt.train(3)
    error = in_thread(lambda: pt.train({**values, "text": "absent.txt"}, output_dir=str(home / "none")))
    assert isinstance(error, PartialtuneError)
    assert not (home / "none").exists()


def test_keyword_values_win_as_words_of_the_command_line_do(home):
    words = ["--num_train_epochs", "2", "--trainable", "blocks[0]", "final_norm"]
    keywords = {"num_train_epochs": 2, "trainable": ("blocks[0]", "final_norm")}
    of_words = read_recipe(home / "recipe.yaml", words)
    of_values = recipe_from_values(yaml.safe_load((home / "recipe.yaml").read_text()), keywords)
    assert "max_steps" not in of_words.values  # epochs take its place
    assert read_recipe(home / "recipe.yaml", keywords).values == of_words.values == of_values.values


def test_an_audit_comes_back_from_its_file_with_its_verdict_and_its_reasons():
    audit = Audit(3, 2, buffers=1, changed=["a", "gone"], changed_buffers=["b"], missing=["gone"], new=["c"])
    audit.missing_buffers, audit.stuck, audit.unmoved = ["b"], ["d"], {"e": "why"}
    audit.saved, audit.trainable_l2_delta = [SavedDifference("f", "is absent")], None
    again = Audit.from_json(json.loads(json.dumps(audit.to_json())))
    assert again == audit
    assert again.violations() == audit.violations()
    assert again.to_json()["trainable"]["unmoved"][0] == {"name": "d", "reason": KEPT_EVERY_BIT}
    assert Audit.from_json(Audit(3, 2).to_json()).passed


# ---- what a notebook shows ------------------------------------------------------------------------------------------


def cells(html):
    return [re.findall(r"<t[hd] [^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", html)]


def test_a_plan_shows_the_rows_that_the_terminal_shows():
    from partialtune.freeze.plan_table import plan_table

    schedule = [{"from_step": 20, "trainable": ["blocks[-2]"]}]
    plan = pt.plan_freeze(tiny_gpt2(), ["blocks[-1]", "final_norm"], schedule=schedule)
    html = plan._repr_html_()
    text = plan_table(plan)
    rows = cells(html)
    assert ["selector", "chose"] in rows
    assert ["blocks[-1]", "12,704"] in rows
    assert ["block 1 to 2, each", "12,704", "12,704"] in rows
    assert ["step 20", "25,472", "2"] in rows
    shown = [row.split() for row in text.splitlines()]
    assert all(" ".join(row).split() in shown for row in rows)
    assert "<b>GPT2LMHeadModel</b>: trainable 25,472 of 44,320 (57.5%)" in html
    assert text.splitlines()[-1] in html
    assert "backward reaches transformer.h.1.ln_1.weight and runs through 2 of 3 blocks" in html


def test_what_is_shown_is_escaped_and_has_no_colours_of_its_own():
    model = tiny_gpt2()
    model.config.name_or_path = "<script>alert(1)</script>"
    html = pt.plan_freeze(model, ["/.*(?<!x)ln_f.*/"])._repr_html_()
    assert "<script" not in html
    assert "/.*(?&lt;!x)ln_f.*/" in html
    assert type(html) is str
    assert set(re.findall(r"color:(\w+)", html)) == {"inherit"}
    table = html_table([("a", "b"), ("<i>", 1)], caption="<u>")
    assert cells(table) == [["a", "b"], ["&lt;i&gt;", "1"]]
    assert "&lt;u&gt;</caption>" in table


def test_a_run_shows_its_verdict_its_scores_and_its_folder(home):
    html = pt.open_run(home / "run")._repr_html_()
    assert f"<b>freeze audit passed</b> in {home / 'run'}" in html
    rows = cells(html)
    assert [row[0] for row in rows] == ["text", "validation", "training"]
    pair = pt.open_run(home / "run").scores["validation"]
    before, after = (pair[side]["bits_per_byte"] for side in ("before", "after"))
    assert any(cell.replace("&gt;", ">") == f"{before:.4f} -> {after:.4f}" for cell in rows[1])


@pytest.mark.slow
def test_in_a_jupyter_kernel_plan_run_and_figure_are_shown_and_a_thread_trains(home, tmp_path):
    pytest.importorskip("ipykernel")
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    code = [
        "import threading, partialtune as pt\nfrom transformers import AutoModelForCausalLM",
        f"pt.plan_freeze(AutoModelForCausalLM.from_pretrained({str(home / 'base')!r}), ['blocks[-1]', 'final_norm'])",
        f"run = pt.train({str(home / 'recipe.yaml')!r}, output_dir={str(tmp_path / 'run')!r}, max_steps=2,"
        " schedule=[])\nrun",
        "run.figures['loss']",
        f"again = []\nwork = lambda: again.append(pt.train({str(home / 'recipe.yaml')!r}, max_steps=2, schedule=[],"
        f" output_dir={str(tmp_path / 'again')!r}))\nthread = threading.Thread(target=work); thread.start();"
        " thread.join()\nagain[0].audit.passed, again[0].scores == run.scores",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in code])
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    shown = [
        next((output["data"] for output in cell["outputs"] if output["output_type"] == "execute_result"), {})
        for cell in notebook.cells
    ]
    assert ["blocks[-1]", "12,704"] in cells(shown[1]["text/html"])
    assert f"<b>freeze audit passed</b> in {tmp_path / 'run'}" in shown[2]["text/html"]
    assert shown[3]["image/png"].startswith("iVBOR")
    assert shown[4]["text/plain"] == "(True, True)"


@pytest.mark.slow
def test_the_notebook_among_the_recipes_plans_trains_shows_and_generates(tmp_path):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.read(REPOSITORY / "recipes" / "quickstart.ipynb", as_version=4)
    shutil.copyfile(REPOSITORY / "recipes" / "quickstart.yaml", tmp_path / "quickstart.yaml")
    training = next(cell for cell in notebook.cells if "pt.train(" in cell.source)
    training.source = training.source.replace('"outputs/notebook")', '"outputs/notebook", max_steps=3)')  # of 123
    client = nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3")
    client.execute(cwd=str(tmp_path))
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    shown = [output["data"] for output in outputs if output["output_type"] == "execute_result"]
    assert any("884,736" in one.get("text/html", "") for one in shown)  # the plan
    assert any("freeze audit passed" in one.get("text/html", "") for one in shown)
    assert sum("image/png" in one for one in shown) == 2
    said = "".join(output["text"] for output in outputs if output.get("name") == "stdout")
    assert "freeze audit passed" in said
    assert all(f"{name:8} The function returns" in said for name in ("base", "adapted"))


# ---- copying and pickling -------------------------------------------------------------------------------------------


def tiny_llama():
    torch.manual_seed(0)
    shape = {"num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=2, vocab_size=128, max_position_embeddings=64))


def compiled(model):
    return torch.compile(model, backend="eager")


MODELS = {
    "gpt2": tiny_gpt2,
    "llama": tiny_llama,
    "compiled gpt2": lambda: compiled(tiny_gpt2()),
    "compiled llama": lambda: compiled(tiny_llama()),
}


def through_a_file(model):
    """What `torch.load` makes of what `torch.save` wrote."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def logits(model):
    """In training mode: GPT-2's dropout acts in what trains, and is drawn from one seed."""
    torch.manual_seed(1)
    return model.train()(torch.arange(8)[None]).logits


def blocks_in_training(model):
    inner = getattr(model, "_orig_mod", model)
    return [block.training for block in (inner.transformer.h if hasattr(inner, "transformer") else inner.model.layers)]


@pytest.mark.parametrize("copied", [through_a_file, copy.deepcopy], ids=lambda f: f.__name__)
@pytest.mark.parametrize("made", MODELS.values(), ids=MODELS)
def test_a_model_under_a_plan_is_saved_whole_and_copied(made, copied):
    model = made()
    plan = pickle.loads(pickle.dumps(pt.plan_freeze(model, ["blocks[-1]", "final_norm"])))
    pt.apply_plan(model, plan)
    other = copied(model)
    assert type(other) is type(model)
    assert torch.equal(logits(other), logits(model))
    assert [(n, p.requires_grad) for n, p in other.named_parameters()] == [
        (n, p.requires_grad) for n, p in model.named_parameters()
    ]
    model.eval()
    assert blocks_in_training(other) == [False, False, True]  # it is no part of the first


def test_a_plan_is_pickled_with_its_schedule():
    schedule = [{"from_step": 4, "trainable": ["embeddings"], "learning_rate": 1e-4}]
    plan = pt.plan_freeze(tiny_gpt2(), ["blocks[-1]"], head="untied", schedule=schedule)
    assert pickle.loads(pickle.dumps(plan)) == plan == copy.deepcopy(plan)


@pytest.mark.parametrize("head", ["tied", "untied"])
def test_a_model_that_is_compiled_before_the_plan_gets_the_plan_of_the_model(head):
    plain, wrapped = tiny_gpt2(), compiled(tiny_gpt2())
    plan = pt.plan_freeze(plain, ["blocks[-1]", "final_norm"], head=head)
    assert pt.plan_freeze(wrapped, ["blocks[-1]", "final_norm"], head=head) == plan
    pt.apply_plan(plain, plan)
    pt.apply_plan(wrapped, plan)
    assert [p.requires_grad for p in wrapped.parameters()] == [p.requires_grad for p in plain.parameters()]
    wrapped.train()
    assert blocks_in_training(wrapped) == [False, False, True]
    wrapped.eval()
    assert blocks_in_training(wrapped) == [False, False, False]
    assert wrapped.train(False) is wrapped


def copied_while_it_trains():
    """A callback that copies and saves the model after each step; `seen` holds whether the copies are the model."""
    from transformers import TrainerCallback

    class Copies(TrainerCallback):
        seen: list[bool] = []  # noqa: RUF012

        def on_step_end(self, args, state, control, model=None, **kwargs):
            present = dict(model.named_parameters())
            for other in (copy.deepcopy(model), through_a_file(model)):
                self.seen.append(all(torch.equal(p, present[name]) for name, p in other.named_parameters()))
                other.train()
                assert blocks_in_training(other) == [False, False, True]

    return Copies()


@pytest.mark.slow
@pytest.mark.parametrize("made", MODELS.values(), ids=MODELS)
def test_audit_and_deltas_know_the_model_by_plain_names_while_it_is_copied(made, tmp_path):
    model = made()
    plan = pt.plan_freeze(model, ["blocks[-1]", "final_norm"])
    pt.apply_plan(model, plan)
    audit, copies = pt.FreezeAuditCallback(plan), copied_while_it_trains()
    make_trainer(tmp_path, model, [audit, pt.WeightDeltaCallback(plan), copies]).train()
    assert audit.result.passed
    assert audit.result.unmoved == {}
    assert copies.seen
    assert all(copies.seen)
    names = {json.loads(line)["name"] for line in (tmp_path / "weight_deltas.jsonl").read_text().splitlines()}
    assert names == {parameter.name for parameter in plan.parameters}
    assert not any("_orig_mod" in name for name in names)


@pytest.mark.slow  # torch.compile, the first time in a process
@pytest.mark.parametrize("made", [tiny_gpt2, lambda: compiled(tiny_gpt2())], ids=["plain", "compiled"])
def test_an_attached_model_is_copied_without_its_fast_paths_and_passes_its_audit(made, tmp_path):
    model, copies = made(), copied_while_it_trains()
    plan = pt.plan_freeze(model, ["blocks[-1]", "final_norm"])
    trainer = make_trainer(tmp_path, model, [copies])
    tuning = pt.attach(trainer, plan)
    trainer.train()
    assert tuning.audit.passed
    assert len(tuning.deltas) == len(plan.parameters)
    assert len(copies.seen) == 2 * trainer.state.global_step
    assert all(copies.seen)


# ---- peft wraps the model too late ----------------------------------------------------------------------------------


def wrapped_by_peft(model):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))


def test_a_plan_from_before_peft_wrapped_the_model_says_plan_after_wrapping():
    plan = pt.plan_freeze(tiny_gpt2(), ["final_norm"])
    with pytest.raises(RecipeError, match=r"plan after wrapping\. Make a plan for this model with plan_freeze"):
        pt.apply_plan(wrapped_by_peft(tiny_gpt2()), plan)


def test_a_model_that_peft_wraps_after_apply_plan_says_plan_after_wrapping_before_the_first_step(tmp_path):
    model = tiny_gpt2()
    plan = pt.plan_freeze(model, ["final_norm"])
    pt.apply_plan(model, plan)
    trainer = make_trainer(tmp_path, wrapped_by_peft(model), [pt.FreezeAuditCallback(plan)])
    with pytest.raises(pt.FreezeViolation, match=r"plan after wrapping.*get_peft_model.*only then call plan_freeze"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_tuning_shows_its_verdict_and_how_far_each_part_has_moved(tmp_path):
    from transformers import Trainer, TrainingArguments, default_data_collator

    model = tiny_gpt2()
    windows = some_windows(8).map(lambda row: {"labels": row["input_ids"]})
    args = TrainingArguments(str(tmp_path), max_steps=3, use_cpu=True, disable_tqdm=True, report_to="none")
    trainer = Trainer(model, args, train_dataset=windows, data_collator=default_data_collator)
    tuning = pt.attach(trainer, pt.plan_freeze(model, ["blocks[-1]"]))
    assert "not audited yet" in tuning._repr_html_()
    trainer.train()
    shown = tuning._repr_html_()
    assert "<b>freeze audit passed</b>; 16 of 24 rows started from kept states" in shown
    assert all(f">{part}<" in shown for part in ("block_02/mlp", "frozen_l2", "trainable_l2"))
    assert type(shown) is str  # what a notebook adds to it must not be escaped
