"""The model card: valid for the Hub, true to the run, and deaf to what texts and tokens hold."""

import html
import json
import re

import pytest
import yaml
from huggingface_hub import ModelCard

from partialtune.pages.card import cell_code, code, name_repository, plain, write_card
from run_folder import write_run_folder

WHOLE_RUNS = True  # what `quick_runs` in conftest.py looks for
ATTACK = "<script>alert(1)</script> | `a` *b* [c](http://d) _e_ $f$ \\ \n---\n# g"


@pytest.fixture
def card(tmp_path):
    return ModelCard.load(write_card(write_run_folder(tmp_path / "gulliver")))


def rendered(text):
    """The card's Markdown as HTML, with GitHub's tables."""
    markdown_it = pytest.importorskip("markdown_it")
    return markdown_it.MarkdownIt("commonmark", {"html": True}).enable("table").render(text)


def cells(html):
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S) for row in re.findall(r"<tr>(.*?)</tr>", html, re.S)]


def test_the_metadata_are_those_that_the_hub_knows(card):
    data = card.data
    assert data.base_model == "openai-community/gpt2"
    assert data.to_dict()["base_model_relation"] == "finetune"
    assert data.to_dict()["base_model_revision"] == "607a30d783dfa663caf39e06633721c8d4cfcd7e"
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert {"partialtune", "partial-fine-tuning", "layer-freezing"} <= set(data.tags)
    assert "license" not in data.to_dict()
    assert "language" not in data.to_dict()


def test_the_model_index_holds_perplexity_and_bits_per_byte_after_training(card):
    results = {(result.dataset_config, result.metric_type): result for result in card.data.eval_results}
    assert card.data.model_name == "gulliver"
    assert set(results) == {
        (text, metric) for text in ("validation", "python_docs") for metric in ("perplexity", "bits_per_byte")
    }
    assert results["validation", "perplexity"].metric_value == pytest.approx(99.484316)
    assert results["validation", "bits_per_byte"].metric_value == pytest.approx(1.612645)
    assert "pg829.txt" in results["validation", "perplexity"].dataset_name
    assert results["python_docs", "perplexity"].dataset_name == "python_docs"


def test_the_card_says_at_which_rates_and_in_which_order_parts_trained(tmp_path, card):
    folder = write_run_folder(tmp_path / "rates")
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe |= {
        "part_learning_rates": {"embeddings": 1e-5, "/a|b/": 2e-5},
        "schedule": [{"from_step": 4, "trainable": ["head"]}],
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    text = write_card(folder).read_text()
    rows = {row[0]: row[1] for row in cells(rendered(text)) if len(row) == 2}
    said = {
        key: json.loads(html.unescape(re.sub("</?code>", "", rows[f"<code>{key}</code>"])))
        for key in ("part_learning_rates", "schedule")
    }
    assert said == {key: recipe[key] for key in said}
    assert "layer_decay" not in text
    assert "part_learning_rates" not in str(card)


@pytest.mark.parametrize(
    ("model", "commit", "base"),
    [
        ("builtin:lilliput", None, None),
        ("models/mine", None, None),
        ("gpt2", "607a30d783dfa663caf39e06633721c8d4cfcd7e", "gpt2"),
        ("../base", "607a30d783dfa663caf39e06633721c8d4cfcd7e", None),
    ],
)
def test_only_a_hub_repository_is_named_as_base_model(tmp_path, model, commit, base):
    run = write_run_folder(
        tmp_path / "run",
        blocks=1,
        width=8,
        steps=1,
        recipe={"model_name_or_path": model},
        record={"base_commit": commit},
    )
    data = ModelCard.load(write_card(run)).data.to_dict()
    assert data.get("base_model") == base
    assert data.get("base_model_relation") == (base and "finetune")


def test_language_and_licence_are_taken_from_the_record_where_it_has_them(tmp_path):
    stated = {"language": ["en", "de"], "license": "other", "license_name": "gulliver", "license_link": "LICENSE"}
    run = write_run_folder(tmp_path / "run", blocks=1, width=8, steps=1, record=stated)
    data = ModelCard.load(write_card(run)).data.to_dict()
    assert {key: data[key] for key in stated} == stated


def test_an_adapter_is_called_one(tmp_path):
    run = write_run_folder(tmp_path / "run", blocks=1, width=8, steps=1, recipe={"method": "lora"})
    assert ModelCard.load(write_card(run)).data.to_dict()["base_model_relation"] == "adapter"


@pytest.mark.parametrize(
    ("recipe", "target"),
    [
        ({}, "NAMESPACE/NAME"),
        ({"hub_model_id": "me/gulliver"}, "me/gulliver"),
        ({"hub_model_id": "me/gulliver", "hub_revision": "v2"}, "me/gulliver@v2"),
    ],
)
def test_the_card_gives_the_command_that_checks_the_repository(tmp_path, recipe, target):
    run = write_run_folder(tmp_path / "run", blocks=1, width=8, steps=1, recipe=recipe)
    text = ModelCard.load(write_card(run)).text
    base = "openai-community/gpt2@607a30d783dfa663caf39e06633721c8d4cfcd7e"
    assert f"\npartialtune verify {base} {target}\n" in text
    assert ('from_pretrained(repository, revision="v2")' in text) is ("hub_revision" in recipe)


def test_a_base_that_nobody_else_has_gives_no_command_to_fetch_it(tmp_path):
    run = write_run_folder(
        tmp_path / "run",
        blocks=1,
        width=8,
        steps=1,
        recipe={"model_name_or_path": "models/mine"},
        record={"base_commit": None},
    )
    assert "partialtune verify" not in ModelCard.load(write_card(run)).text


def test_a_card_without_a_repository_is_given_its_name_and_keeps_the_rest(tmp_path):
    run = write_run_folder(tmp_path / "run", blocks=1, width=8, steps=1)
    card = write_card(run)
    card.write_text(card.read_text(encoding="utf-8") + "Written by hand.\n", encoding="utf-8")
    before = card.read_text(encoding="utf-8")
    name_repository(run, "me/gulliver")
    assert card.read_text(encoding="utf-8") == before.replace("NAMESPACE/NAME", "me/gulliver") != before


def test_a_card_that_is_pushed_again_names_the_place_where_it_lies(tmp_path):
    run = write_run_folder(tmp_path / "run", blocks=1, width=8, steps=1)
    card = write_card(run)
    name_repository(run, "me/gulliver")
    on_main = card.read_text(encoding="utf-8")
    name_repository(run, "me/gulliver-2", "v2")
    there = card.read_text(encoding="utf-8")
    assert 'repository = "me/gulliver-2"' in there
    assert 'from_pretrained(repository, revision="v2")' in there
    assert there.count("me/gulliver-2@v2\n") == 1
    assert there.count("me/gulliver") == there.count("me/gulliver-2")
    name_repository(run, "me/gulliver")
    assert card.read_text(encoding="utf-8") == on_main


def test_the_lines_that_load_a_delta_follow_the_branch(tmp_path):
    run = write_run_folder(tmp_path / "run", blocks=1, width=8, steps=1)
    (run / "delta.json").write_text("{}")
    card = write_card(run)
    name_repository(run, "me/gulliver")
    on_main = card.read_text(encoding="utf-8")
    assert "partialtune.load(repository)" in on_main
    name_repository(run, "me/gulliver", "v2")
    there = card.read_text(encoding="utf-8")
    assert 'partialtune.load(repository + "@v2")' in there
    assert 'AutoTokenizer.from_pretrained(repository, revision="v2")' in there
    name_repository(run, "me/gulliver")
    assert card.read_text(encoding="utf-8") == on_main


def test_a_name_without_a_namespace_is_no_word_to_replace(tmp_path):
    run = write_run_folder(tmp_path / "run", blocks=1, width=8, steps=1, recipe={"hub_model_id": "gpt2"})
    card = write_card(run)
    before = card.read_text(encoding="utf-8")
    name_repository(run, "me/gpt2")
    there = card.read_text(encoding="utf-8")
    assert 'repository = "me/gpt2"' in there
    assert there.count("openai-community/gpt2") == before.count("openai-community/gpt2")
    assert there.count("me/gpt2") == 1


def test_the_card_says_what_trained_and_what_it_brought(card):
    assert "85,054,464 frozen parameters in 144 tensors kept every bit" in card.text
    assert "| Selectors | `embeddings`, `final_norm`, `head` |" in card.text
    assert "39,385,344 of 124,439,808 parameters (31.7%)" in card.text
    assert "| Tied | `transformer.wte.weight` = `lm_head.weight` |" in card.text
    assert "|  | bits per byte | 1.888 | 1.613 | −14.6% |" in card.text
    assert "`607a30d783dfa663caf39e06633721c8d4cfcd7e`" in card.text
    for figure in ("loss", "deltas_heatmap", "deltas_over_steps"):
        assert re.search(rf"!\[[^\]]{{40,}}\]\(figures/{figure}\.png\)", card.text)


def test_a_card_names_no_command_but_those_that_exist(card):
    assert set(re.findall(r"partialtune (?!\d)(\w+)", card.text)) <= {"train", "plan", "verify"}


def test_tables_are_tables_and_have_as_many_cells_as_headers(card):
    html = rendered(card.text)
    assert html.count("<table>") == 4  # before and after, what trained, prompts, text sources
    for table in re.findall(r"<table>.*?</table>", html, re.S):
        assert len({len(row) for row in cells(table)}) == 1
    assert html.count("<img ") == 7  # the figures that this run has


def test_a_failed_audit_is_said_on_top(tmp_path):
    run = write_run_folder(tmp_path / "run", blocks=2, width=8, steps=1, changed=("transformer.h.0.ln_1.weight",))
    text = ModelCard.load(write_card(run)).text
    assert "❌ **Freeze audit failed. Do not rely on this model.**" in text.split("##")[0]
    assert "`transformer.h.0.ln_1.weight` is frozen, but changed" in text.split("##")[0]
    assert "passed" not in text


def test_without_held_out_text_the_card_says_so_and_has_no_score_of_the_training_text(tmp_path):
    run = write_run_folder(tmp_path / "run", blocks=1, width=8, steps=1, held_out=False)
    card = ModelCard.load(write_card(run))
    assert {result.dataset_config for result in card.data.eval_results} == {"python_docs"}
    assert "No text was held out" in card.text


def test_without_any_score_there_is_no_model_index(tmp_path):
    run = write_run_folder(tmp_path / "run", blocks=1, width=8, steps=1)
    (run / "evaluation.json").unlink()
    card = ModelCard.load(write_card(run))
    assert card.data.eval_results is None
    assert "Before and after" not in card.text


def test_markup_in_texts_prompts_and_names_stays_text(tmp_path):
    run = write_run_folder(
        tmp_path / "run", blocks=1, width=8, steps=1, prompts=(ATTACK, "x"), source=ATTACK, selectors=(f"/{ATTACK}/",)
    )
    card = ModelCard.load(write_card(run))
    assert card.data.eval_results[0].dataset_name.endswith("# g")  # whole, through YAML and back
    html = rendered(card.text)
    assert "<script" not in html
    assert "<em>" not in html
    assert 'http://d"' not in html
    assert [heading for heading in re.findall(r"<h\d>(.*?)</h\d>", html) if heading.strip() == "g"] == []
    assert html.count("<table>") == 4
    for table in re.findall(r"<table>.*?</table>", html, re.S):
        assert len({len(row) for row in cells(table)}) == 1


def test_filters_keep_every_character_to_be_read():
    assert rendered(plain("a|b <i> `c` **d** ~e~ [f](g) &amp; final_norm _h_")).strip() == (
        "<p>a|b &lt;i&gt; `c` **d** ~e~ [f](g) &amp;amp; final_norm _h_</p>"
    )
    assert plain("a\nb\x00") == "a ↵ b&#92;x00"
    assert code("a `` b") == "```a `` b```"
    assert code("`a`") == "`` `a` ``"
    assert cell_code("a|b") == "`a\\|b`"


@pytest.mark.slow
def test_the_check_that_the_card_offers_finds_a_changed_frozen_parameter(tmp_path, capsys, monkeypatch):
    torch = pytest.importorskip("torch")
    from transformers import GPT2Config, GPT2LMHeadModel

    from partialtune.model.digests import digests

    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, n_positions=16, vocab_size=32))
    run = write_run_folder(tmp_path / "run", blocks=2, width=8, steps=1)
    record_digests(run, digests(model))
    snippet = re.search(r"```python\n(import hashlib.*?)```", ModelCard.load(write_card(run)).text, re.S)[1]
    monkeypatch.chdir(run)

    model.save_pretrained(run)
    exec(compile(snippet, "card", "exec"), {})
    assert "changed although frozen: nothing" in capsys.readouterr().out

    with torch.no_grad():
        model.transformer.h[1].ln_1.bias[3] += 1e-7
    model.save_pretrained(run)
    exec(compile(snippet, "card", "exec"), {})
    assert "changed although frozen: ['transformer.h.1.ln_1.bias']" in capsys.readouterr().out


def record_digests(run, digests):
    plan = json.loads((run / "freeze_plan.json").read_text())
    for parameter in plan["parameters"]:
        parameter["sha256_before"] = digests[parameter["name"]]
    (run / "freeze_plan.json").write_text(json.dumps(plan))
