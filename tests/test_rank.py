"""`rank`: ratios are those of a plain backward pass, and what it writes is a recipe that trains the first blocks."""

import json
import math
import shutil

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

from conftest import some_windows, tiny_gpt2
from partialtune.builtin import builtin_folder
from partialtune.cli import main
from partialtune.cost.dry_step import dry_step
from partialtune.freeze.plan import plan_freeze
from partialtune.model.digests import digests
from partialtune.model.loading import empty_model
from partialtune.rank.choice_cost import costs_of
from partialtune.rank.probe import draw_windows, probe
from partialtune.rank.ranking import rank, ranking_table
from partialtune.rank.ranking_figure import draw_ranking
from partialtune.rank.signal_to_noise import rank_weights, signal_and_noise, weight_table
from partialtune.recipe.recipe import read_recipe
from test_modeling import rename_to_hub
from test_plan import marian

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom. "


def test_the_norms_are_those_of_a_plain_backward_pass_and_nothing_moves():
    model, windows = tiny_gpt2(), some_windows(10)
    before = digests(model)
    found = probe(model, windows, batch_size=4)  # 4 + 4 + 2: a mean of batch means would be another gradient
    assert digests(model) == before
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    plain = tiny_gpt2().eval()
    ids = torch.tensor(windows["input_ids"])
    loss = plain(ids, labels=ids).loss
    loss.backward()
    assert found.loss == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in plain.named_parameters():
        assert found.gradient_norms[name] == pytest.approx(float(parameter.grad.norm()), rel=1e-3, abs=1e-7), name
        assert found.weight_norms[name] == pytest.approx(float(parameter.norm()), rel=1e-5), name


def test_what_a_model_keeps_fixed_is_ranked_nowhere():
    found = probe(marian(), some_windows(4), batch_size=4)
    parts = {part.selector: part.parameters for part in rank(found).parts}
    assert "embeddings.positions" not in parts  # a sinusoidal table, which no selector adds
    assert parts["embeddings.tokens"] == 128 * 32


def test_blocks_and_parts_are_ordered_by_their_ratio():
    model = tiny_gpt2()
    with torch.no_grad():  # the same function with a smaller weight: its gradient grows, so does its ratio
        model.transformer.h[1].ln_2.weight.mul_(100)
        model.transformer.h[1].ln_2.bias.mul_(100)
        model.transformer.h[1].mlp.c_fc.weight.div_(100)
    found = probe(model, some_windows(8), batch_size=4)
    ranking = rank(found)
    for entries in (ranking.blocks, ranking.parts):
        ratios = [entry.ratio for entry in entries]
        assert ratios == sorted(ratios, reverse=True)
    assert ranking.parts[0].selector == "blocks[1].mlp"
    names = [name for name in found.weight_norms if name.startswith("transformer.h.1.mlp")]
    gradient = math.hypot(*(found.gradient_norms[name] for name in names))
    weights = math.hypot(*(found.weight_norms[name] for name in names))
    assert ranking.parts[0].ratio == pytest.approx(gradient / weights)
    assert ranking.parts[0].parameters == 2 * 4 * 32**2 + 5 * 32


def test_every_selector_of_the_ranking_chooses_as_many_parameters_as_it_says():
    ranking = rank(probe(tiny_gpt2(), some_windows(4), 4, head="untied"))
    entries = [*ranking.blocks, *ranking.parts]
    for entry in entries:
        plan = plan_freeze(tiny_gpt2(), [entry.selector], head="untied")
        # norms and final_norm are parts of their own here
        assert plan.trainable_parameters == entry.parameters, entry.selector
    assert {"head", "final_norm", "embeddings.tokens", "blocks[2].norms"} <= {entry.selector for entry in entries}


def test_a_quarter_of_the_blocks_is_chosen_or_as_many_as_asked_for():
    found = probe(tiny_gpt2(n_layer=8), some_windows(4), 4)
    best = [entry.block for entry in rank(found).blocks]
    assert rank(found).chosen == tuple(sorted(best[:2]))
    assert rank(found, top=3).chosen == tuple(sorted(best[:3]))
    assert rank(found, top=3).selectors == [f"blocks[{','.join(map(str, sorted(best[:3])))}]", "final_norm"]
    assert rank(found, top=99).chosen == tuple(range(8))


def test_experts_without_tokens_count_and_routers_belong_to_the_mlp():
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = MixtralForCausalLM(
        MixtralConfig(**shape, vocab_size=128, num_local_experts=4, num_key_value_heads=2, pad_token_id=None)
    )
    ranking = rank(probe(model, some_windows(4), 4))
    mlp = next(part for part in ranking.parts if part.selector == "blocks[0].mlp")
    assert mlp.parameters == 4 * (2 * 48 * 32 + 48 * 32) + 4 * 32
    assert sum(block.parameters for block in ranking.blocks) == sum(p.numel() for p in model.model.layers.parameters())


def test_a_part_of_zeros_has_no_ratio_and_comes_last(tmp_path):
    model = tiny_gpt2()
    with torch.no_grad():
        model.transformer.wpe.weight.zero_()
    ranking = rank(probe(model, some_windows(4), 4))
    assert ranking.parts[-1].selector == "embeddings.positions"
    assert ranking.parts[-1].ratio is None
    assert "embeddings.positions" in ranking_table(ranking, most_parts=99)
    draw_ranking(ranking, tmp_path / "rank.png")
    assert (tmp_path / "rank.png").read_bytes().startswith(b"\x89PNG")


def test_windows_are_drawn_by_the_seed_and_none_twice():
    windows = some_windows(24)
    one, same, other = (draw_windows(windows, 8, seed)["input_ids"][:] for seed in (1, 1, 2))
    assert one == same != other
    assert len({tuple(row) for row in one}) == 8
    assert len(draw_windows(windows, 99, 0)) == 24


# ---- what a choice costs ---------------------------------------------------------------------------------------------


def test_each_choice_has_its_cost_beside_its_score():
    model = tiny_gpt2()
    costs = costs_of(empty_model(model.config), ["blocks[0]", "blocks[2]", "final_norm", "embeddings", "all"], 32)
    passed = {selector: cost.backward_blocks for selector, cost in costs.items()}
    assert passed == {"blocks[0]": 3, "blocks[2]": 1, "final_norm": 0, "embeddings": 3, "all": 3}
    assert costs["all"].of_full == 1.0 == costs["all"].of_full_kept
    assert 1 > costs["blocks[0]"].of_full > costs["blocks[2]"].of_full > costs["final_norm"].of_full
    products = dry_step(empty_model(model.config), plan_freeze(model, ["blocks[2]"]), 1, 32).products
    full = dry_step(empty_model(model.config), plan_freeze(model, ["all"]), 1, 32).products
    kept = costs["blocks[2]"].of_full - costs["blocks[2]"].of_full_kept
    assert kept == pytest.approx(products.prefix / (full.total + full.attention))


# ---- by the weights alone --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(300, 300), (200, 600), (600, 200)])
@pytest.mark.parametrize("spread", [0.02, 3.0])
def test_noise_has_no_signal_and_what_is_added_to_it_is_counted(shape, spread):
    random = torch.Generator().manual_seed(1)
    noise = spread * torch.randn(shape, generator=random)
    signal, rest, above = signal_and_noise(noise)
    assert above <= 1  # the largest one lies on the edge
    values = torch.linalg.svdvals(noise.double())
    assert signal + rest == pytest.approx(float(values.sum()), rel=1e-6)
    directions = torch.randn(shape[0], 3, generator=random) @ torch.randn(3, shape[1], generator=random)
    learnt = noise + spread * directions
    signal, rest, above = signal_and_noise(learnt)
    assert above - 3 in (0, 1)
    assert signal == pytest.approx(float(torch.linalg.svdvals(learnt.double())[:above].sum()))
    assert signal_and_noise(learnt.T) == pytest.approx((signal, rest, above))  # Conv1D's way


def test_the_weights_are_ranked_kind_by_kind_without_a_text_or_a_model_in_memory(folder, capsys, monkeypatch):
    monkeypatch.setattr("transformers.modeling_utils.PreTrainedModel.from_pretrained", None)
    found = json.loads(ranked(folder, capsys, "--by", "snr", "--json", "--text", "/nowhere"))
    kinds = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert set(found["kinds"]) == {f"{kind}.weight" for kind in kinds}
    for kind, matrices in found["kinds"].items():
        assert sorted(matrix["block"] for matrix in matrices) == [0, 1, 2], kind
        ratios = [matrix["ratio"] for matrix in matrices]
        assert ratios == sorted(ratios, reverse=True)
    chosen = set(plan_freeze(tiny_gpt2(), found["trainable"]).trainable)
    assert chosen == {matrices[0]["name"] for matrices in found["kinds"].values()}
    assert found["lowest_block"] == min(matrices[0]["block"] for matrices in found["kinds"].values())


def test_what_was_learnt_comes_first(tmp_path):
    model = tiny_gpt2()
    with torch.no_grad():
        one = model.transformer.h[1].mlp.c_fc.weight
        one += 0.5 * torch.outer(torch.randn(len(one)), torch.randn(one.shape[1]))
    model.save_pretrained(tmp_path)
    ranking = rank_weights(str(tmp_path), top=2)
    assert ranking.kinds["mlp.c_fc.weight"][0].block == 1
    assert len(plan_freeze(model, ranking.selectors).trainable) == 4 * 2
    assert "To train the first 2 of each kind" in weight_table(ranking)


def test_each_expert_of_a_fused_tensor_is_a_matrix_by_itself(tmp_path):
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = MixtralForCausalLM(
        MixtralConfig(**shape, vocab_size=128, num_local_experts=4, num_key_value_heads=2, pad_token_id=None)
    )
    model.save_pretrained(tmp_path)
    kinds = rank_weights(str(tmp_path)).kinds
    matrix = next(matrix for matrix in kinds["mlp.experts.down_proj"] if matrix.block == 0)
    experts = [signal_and_noise(expert) for expert in model.model.layers[0].mlp.experts.down_proj.detach()]
    assert matrix.signal == pytest.approx(sum(expert[0] for expert in experts))
    assert matrix.noise == pytest.approx(sum(expert[1] for expert in experts))


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base, the same with the Hub's file names, a text and a recipe."""
    folder = tmp_path_factory.mktemp("rank")
    tokenizer = AutoTokenizer.from_pretrained(builtin_folder("builtin:lilliput"))
    tiny_gpt2(vocab_size=len(tokenizer)).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    shutil.copytree(folder / "base", folder / "hub")
    rename_to_hub(folder / "hub")
    (folder / "text.txt").write_text(TEXT * 100, encoding="utf-8")
    values = {
        "model_name_or_path": str(folder / "base"),
        "text": str(folder / "text.txt"),
        "block_size": 32,
        "method": "lora",
        "trainable": ["attention"],
        "output_dir": str(folder / "run"),
        "max_steps": 2,
        "prompts": ["It was"],
        "save_strategy": "no",
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    return folder


def ranked(folder, capsys, *words):
    assert main(["rank", str(folder / "recipe.yaml"), *words]) == 0
    return capsys.readouterr().out


def test_a_base_with_the_hubs_file_names_is_ranked_the_same(folder, capsys):
    ours = json.loads(ranked(folder, capsys, "--json"))
    theirs = json.loads(ranked(folder, capsys, "--json", "--model_name_or_path", str(folder / "hub")))
    assert ours.pop("model_name") != theirs.pop("model_name")
    assert ours.pop("full_step_seconds") > 0 < theirs.pop("full_step_seconds")  # as long as the probe took
    assert ours == theirs
    assert ours["windows"] == 4 * 8
    assert ours["trainable"] == [f"blocks[{ours['blocks'][0]['block']}]", "final_norm"]


@pytest.mark.usefixtures("undrawn")
def test_what_it_writes_is_a_recipe_that_train_accepts_and_runs(folder, capsys, tmp_path):
    file = tmp_path / "new.yaml"
    shown = ranked(folder, capsys, "--batches", "1", "--top", "2", "--write", str(file))
    recipe = read_recipe(file)
    assert len(recipe.freeze.trainable) == 2
    assert f"trainable: ['{recipe.freeze.trainable[0]}', final_norm]" in shown
    assert recipe.freeze.method == "partial"
    assert recipe.training["output_dir"] == str(folder / "run-ranked")
    assert (tmp_path / "new.png").read_bytes().startswith(b"\x89PNG")
    assert main(["train", str(file)]) == 0
    plan = json.loads((folder / "run-ranked" / "freeze_plan.json").read_text())
    assert plan["selectors"] == recipe.freeze.trainable
    trained = {entry["block"] for entry in plan["parameters"] if entry["trainable"]} - {None}
    assert len(trained) == 2
    assert AutoModelForCausalLM.from_pretrained(folder / "run-ranked").config.n_layer == 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--write", "{taken}"], "exists already"),
        (["--figure", "/nowhere/x.png"], "there is no folder /nowhere"),
        (["--by", "snr", "--figure", "{taken}.png"], "--figure draws the ranking by gradient"),
        (["--batches", "0"], "--batches is 0; allowed: a whole number, 1 or more"),
        (["--text", "/nowhere/x.txt"], "/nowhere/x.txt"),
    ],
)
def test_bad_input_ends_with_2_before_any_work_and_overwrites_nothing(folder, capsys, tmp_path, words, said):
    taken = tmp_path / "taken.yaml"
    taken.write_text("mine")
    assert main(["rank", str(folder / "recipe.yaml"), *(word.format(taken=taken) for word in words)]) == 2
    assert said in capsys.readouterr().err
    assert taken.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken.yaml"]
