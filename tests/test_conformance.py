"""What a model is asked when it is loaded: does it read ahead, is its loss the usual one, does it keep its weights?"""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, RwkvConfig, RwkvForCausalLM

from cluster import small_recipe
from conftest import tiny_gpt2
from partialtune.cli import main
from partialtune.errors import ModelError
from partialtune.model.conformance import check_conformance, next_token_loss, probe_windows
from partialtune.model.digests import digests
from partialtune.scoring.evaluation import score_text, scored_text
from partialtune.text.tokenizing import tokenize_text
from partialtune.text.windows import split_text
from tiny_models import tiny_config
from trials import Trial

pytestmark = pytest.mark.usefixtures("undrawn")


def tiny(model_type, **changes):
    torch.manual_seed(0)
    config = tiny_config(model_type)
    for key, value in changes.items():
        setattr(config, key, value)
    return AutoModelForCausalLM.from_config(config).eval()


# ---- reading ahead --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["bert", "electra", "roberta", "big_bird"])
def test_a_model_that_reads_in_both_directions_is_refused_with_the_setting_that_changes_it(model_type):
    sentence = (
        r"reads ahead: changing token 10 changed the logits of token 9, .* mean nothing. "
        r'is_decoder is false in its config.json: with "is_decoder": true there'
    )
    with pytest.raises(ModelError, match=sentence):
        check_conformance(tiny(model_type), block_size=64)
    assert check_conformance(tiny(model_type, is_decoder=True), block_size=64).loss_fault == ""


def test_the_advice_is_the_one_for_the_model():
    with pytest.raises(ModelError, match=r'causal is false in its config.json: with "causal": true there'):
        check_conformance(tiny("xlm"), block_size=64)
    check_conformance(tiny("xlm", causal=True), block_size=64)
    with pytest.raises(ModelError, match=r"no setting for that. Choose a model that was made to predict the next"):
        check_conformance(tiny("xlnet"), block_size=64)


def test_reading_ahead_within_chunks_is_seen():
    model = tiny_gpt2().eval()
    plain = model.transformer.wpe.forward

    def with_chunks(positions):  # each token of a chunk of five sees all of the chunk, and nothing else
        states = model.transformer.wte(model.seen)
        size = 5
        chunks = [piece.mean(1, keepdim=True).expand_as(piece) for piece in states.split(size, dim=1)]
        return plain(positions) + torch.cat(chunks, dim=1)

    model.transformer.wpe.forward = with_chunks
    model.register_forward_pre_hook(
        lambda model, args, kwargs: setattr(model, "seen", kwargs["input_ids"]), with_kwargs=True
    )
    with pytest.raises(ModelError, match=r"changing token 17 changed the logits of token 16"):  # 10 begins a chunk
        check_conformance(model, block_size=64)


def test_rounding_is_not_reading_ahead():
    model = tiny("prophetnet", init_std=0.02)  # its logits hardly depend on its input, and differ by 1e-7
    check_conformance(model, block_size=64)
    model = tiny_gpt2().eval()

    def disturb(_model, _args, outputs):
        outputs.logits.add_(torch.randn_like(outputs.logits) * 1e-6)

    model.register_forward_hook(disturb)
    check_conformance(model, block_size=64)


@pytest.mark.parametrize("block_size", [2, 3, 5, 16])
def test_windows_shorter_than_the_probes_are_enough(block_size):
    check_conformance(tiny_gpt2(n_positions=block_size), block_size)
    with pytest.raises(ModelError, match="reads ahead: changing token 1 changed the logits of token 0"):
        check_conformance(tiny("bert", max_position_embeddings=2), block_size=2)


def test_a_model_that_takes_one_length_alone_is_looked_at_at_that_length():
    local = {"attn_layers": ["local"] * 3}
    check_conformance(tiny("reformer", **local), block_size=64)
    with pytest.raises(ModelError, match="no logits for token ids alone in train mode: If training, make sure"):
        check_conformance(tiny("reformer", **local), block_size=32)


def test_a_model_that_draws_at_random_in_eval_mode_is_refused():
    with pytest.raises(ModelError, match=r"draws at random in eval mode: two passes .* hash_seed in its config.json"):
        check_conformance(tiny("reformer"), block_size=64)


def test_a_model_that_wants_more_than_token_ids_is_refused_with_its_own_reason():
    with pytest.raises(ModelError, match="no logits for token ids alone: inputs_embeds and shared_kv_states cannot be"):
        check_conformance(tiny("gemma4_assistant"), block_size=64)


def test_blocks_that_the_text_does_not_pass_are_refused():
    model = tiny_gpt2().eval()
    # a list of more blocks than the decoder has, which says not what it is
    model.transformer.second = torch.nn.ModuleList(copy.deepcopy(block) for block in [*model.transformer.h] * 2)
    with pytest.raises(ModelError, match=r"transformer.second was taken for its decoder blocks.*does not use it"):
        check_conformance(model, block_size=64)


def test_an_image_encoder_larger_than_the_decoder_is_not_taken_for_it():
    model = tiny("got_ocr2")
    for block in model.model.vision_tower.layers:
        block.mlp.more = torch.nn.Linear(200, 200)
    check_conformance(model, block_size=64)


def test_logits_of_another_shape_are_refused():
    model = tiny_gpt2().eval()
    model.register_forward_hook(lambda _model, _args, out: setattr(out, "logits", out.logits.repeat(4, 1, 1)))
    with pytest.raises(ModelError, match=r"logits of shape \(12, 24, 128\) for token ids of shape \(3, 24\)"):
        check_conformance(model, block_size=64)


def test_markers_and_padding_are_not_among_the_tokens_of_the_probe():
    model = tiny_gpt2(vocab_size=40, bos_token_id=0, eos_token_id=[1, 2], pad_token_id=3)
    model.config.image_token_id = 17
    windows = probe_windows(model, 24, [10, 17])
    assert not set(windows.flatten().tolist()) & {0, 1, 2, 3, 17}
    assert (windows[1] != windows[0]).nonzero().flatten().tolist() == [10]
    assert (windows[2] != windows[0]).nonzero().flatten().tolist() == [17]


# ---- the loss -------------------------------------------------------------------------------------------------------


def test_models_whose_loss_is_the_next_tokens_keep_it():
    assert check_conformance(tiny_gpt2(), block_size=64).loss_fault == ""
    assert check_conformance(tiny("gemma2"), block_size=64).loss_fault == ""  # caps its logits
    assert check_conformance(tiny("granite"), block_size=64).loss_fault == ""  # scales them
    assert check_conformance(tiny("mixtral", output_router_logits=True), block_size=64).loss_fault == ""


@pytest.mark.parametrize("model_type", ["bart", "marian", "whisper", "trocr", "blenderbot", "pegasus"])
def test_a_loss_on_unshifted_labels_is_found_out(model_type):
    fault = check_conformance(tiny(model_type), block_size=64).loss_fault
    assert "nats a token where the cross entropy of the next token is" in fault


def test_a_loss_that_ignores_the_number_of_targets_is_found_out():
    model = tiny_gpt2().eval()
    plain = model.loss_function
    model.loss_function = lambda *args, num_items_in_batch=None, **kwargs: plain(*args, **kwargs)
    assert "mean of a batch" in check_conformance(model, block_size=64).loss_fault


def test_a_loss_with_an_undeclared_term_in_train_mode_is_found_out():
    model = tiny_gpt2().eval()
    plain = model.loss_function
    model.loss_function = lambda *args, **kwargs: plain(*args, **kwargs) + 0.1 * model.training
    assert "nats a token where the cross entropy" in check_conformance(model, block_size=64).loss_fault


def test_our_loss_is_the_cross_entropy_of_the_next_token():
    model = tiny_gpt2().eval()
    ids = torch.randint(128, (3, 16), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, 0] = -100
    outputs = model(input_ids=ids)
    nats = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    assert float(next_token_loss(outputs, labels)) == pytest.approx(float(nats) / 45, rel=1e-6)
    assert float(next_token_loss(outputs, labels, torch.tensor(90))) == pytest.approx(float(nats) / 90, rel=1e-6)


@pytest.mark.parametrize("model_type", ["bart", "opt", "whisper"])
def test_accumulated_batches_are_one_batch_of_their_size(tmp_path, model_type):
    tiny(model_type).save_pretrained(tmp_path)
    trial = Trial(str(tmp_path), 16, ["all"])
    whole, first = trial.train()
    halves, first_of_halves = trial.train(accumulation=2)
    assert first_of_halves == pytest.approx(first, abs=1e-6)
    assert max(float((halves[name] - whole[name]).abs().max()) for name in whole) < 1e-6
    trial.compare("in one batch", (whole, first))  # as a loop of plain PyTorch has it


# ---- weights --------------------------------------------------------------------------------------------------------


def test_the_look_changes_nothing():
    model = tiny("deepseek_v3").train()
    model.model.layers[0].eval()
    model.model.norm.register_buffer("seen", torch.zeros(()))

    def count(norm, _args, _outputs):
        norm.seen.add_(norm.training)

    model.model.norm.register_forward_hook(count)
    before = digests(model), {name: buffer.clone() for name, buffer in model.named_buffers()}
    modes = [module.training for module in model.modules()]
    torch.manual_seed(3)
    drawn = torch.rand(2)
    torch.manual_seed(3)
    check_conformance(model, block_size=64)
    assert torch.equal(torch.rand(2), drawn)
    assert digests(model) == before[0]
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(buffer, before[1][name]) for name, buffer in model.named_buffers())


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_model_that_changes_its_weights_in_a_forward_pass_is_refused(mode):
    model = tiny_gpt2().eval()

    def halve(module, args):
        if module.training == (mode == "train"):
            module.weight.data.mul_(0.5)

    model.transformer.h[1].mlp.c_fc.register_forward_pre_hook(halve)
    with pytest.raises(ModelError, match=r"changes its own weights in a forward pass \(1 tensors, transformer.h.1.mlp"):
        check_conformance(model, block_size=64)


def test_a_model_whose_loading_changes_what_the_file_holds_is_refused():
    with pytest.raises(ModelError, match=r"it sets the embedding of the padding token \(0\) to zero"):
        check_conformance(tiny("youtu"), block_size=64)
    check_conformance(tiny("opt"), block_size=64)  # has a padding token too


# ---- whole runs -----------------------------------------------------------------------------------------------------


def recipe_on(folder, model, **changes):
    """Words of a small recipe on this model with the bundled tokenizer."""
    words = small_recipe(folder, schedule=[], max_steps=4, eval_strategy="no", save_strategy="no", **changes)
    for file in (folder / "base").glob("*.safetensors"):
        file.unlink()
    model.save_pretrained(folder / "base")
    return words


def test_a_bidirectional_model_ends_with_2_before_anything_is_written(tmp_path, capsys):
    words = recipe_on(tmp_path, tiny("bert", vocab_size=4096), trainable=["blocks[-1]"])  # BERT has no final norm
    assert main(words) == 2
    assert "reads ahead: changing token 10 changed the logits of token 9" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main(["rank", words[1]]) == 2
    assert "reads ahead" in capsys.readouterr().err


def test_a_run_on_bart_learns_the_next_token_and_says_whose_loss_it_is(tmp_path, capsys):
    words = recipe_on(tmp_path, tiny("bart", vocab_size=4096), trainable=["all"], learning_rate=1e-3)
    assert main([*words, "--eval_strategy", "steps", "--eval_steps", "2", "--max_steps", "8"]) == 0
    scores = json.loads((tmp_path / "run" / "evaluation.json").read_text())["validation"]
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    evaluated = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert evaluated[-1] == pytest.approx(scores["after"]["loss"], abs=1e-3)
    assert scores["after"]["loss"] < scores["before"]["loss"]
    recorded = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["run"]["loss"]
    assert recorded.startswith("cross entropy of the next token over the model's logits, not its own loss: it is ")


def test_a_model_that_takes_its_loss_by_itself_is_forecast(tmp_path, capsys):
    words = recipe_on(tmp_path, tiny("bart", vocab_size=4096), trainable=["blocks[-1]"])
    assert main(["plan", words[1]]) == 0
    assert "a step takes" in capsys.readouterr().out


def test_a_config_of_which_transformers_makes_no_model_ends_with_2(tmp_path, capsys):
    words = recipe_on(tmp_path, tiny("bart", vocab_size=4096))
    tiny_config("musicgen").save_pretrained(tmp_path / "base")
    for command in ("plan", "train"):
        assert main([command, words[1]]) == 2
        assert "cannot be loaded: Multiple valid text configs were found" in capsys.readouterr().err


@pytest.mark.slow
def test_rwkv_is_saved_as_it_is_proved_and_scores_as_it_was_scored(tmp_path):
    config = RwkvConfig(
        hidden_size=32,
        num_hidden_layers=4,
        attention_hidden_size=32,
        intermediate_size=64,
        context_length=64,
        rescale_every=2,
        vocab_size=4096,
    )
    torch.manual_seed(0)
    words = recipe_on(tmp_path, RwkvForCausalLM(config))
    assert main(words) == 0
    run, base = tmp_path / "run", tmp_path / "base"
    assert main(["verify", str(base), str(run)]) == 0
    assert json.loads((run / "config.json").read_text())["rescale_every"] == 2
    plan = json.loads((run / "freeze_plan.json").read_text())["parameters"]
    again = digests(AutoModelForCausalLM.from_pretrained(run))
    assert {entry["name"]: entry["sha256_after"] for entry in plan} == again
    scores = json.loads((run / "evaluation.json").read_text())["validation"]
    held_out = split_text((tmp_path / "text.txt").read_text(), 0.1)[1]
    tokens = tokenize_text(held_out, AutoTokenizer.from_pretrained(run))
    reloaded = AutoModelForCausalLM.from_pretrained(run)  # which halves its matrices and its states: what layer norms
    again = score_text(reloaded, scored_text([held_out], [tokens], 32), 8, None)  # add to a variance weighs more then
    assert again["loss"] == pytest.approx(scores["after"]["loss"], abs=5e-5)
    reloaded = AutoModelForCausalLM.from_pretrained(run, rescale_every=0)
    again = score_text(reloaded, scored_text([held_out], [tokens], 32), 8, None)
    assert again["loss"] == pytest.approx(scores["after"]["loss"], abs=1e-6)
