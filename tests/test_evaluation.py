"""Before and after: scores of texts against brute force, and what prompts show."""

import copy
import gc
import json
import math
import os
import socket
import sys
import unicodedata
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, TopPLogitsWarper

from partialtune.errors import TextError
from partialtune.metrics import METRICS
from partialtune.scoring.continuations import SAMPLING
from partialtune.scoring.evaluation import (
    METRIC_FILE,
    ScoredText,
    score_text,
    score_tokens,
    scored_text,
    spaced_indices,
)
from partialtune.scoring.prompts import PromptProbe, compare_prompts, format_prompts, probe_prompts
from tiny_models import tiny_config
from trials import letters
from two_processes import on_two_processes

VOCABULARY = 128
BLOCK_SIZE = 12
KEYS = [
    "loss",
    "perplexity",
    "bits_per_byte",
    "next_token_accuracy",
    "top5_accuracy",
    "tokens",
    "bytes",
    "text_tokens",
]


def tiny_gpt2(seed: int = 0, scale: float = 20.0) -> GPT2LMHeadModel:
    """A random GPT-2 whose logits are spread out, as those of a trained model are."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config)
    model.transformer.wte.weight.data *= scale / 4
    return model.eval()


def ascii_tokenizer(**special) -> PreTrainedTokenizerFast:
    """One token a character: id 1 to 127 is its code, id 0 the end of text."""
    vocabulary = {"<|end|>": 0} | {chr(code): code for code in range(1, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def random_text(windows: int = 7, seed: int = 1) -> ScoredText:
    ids = np.random.default_rng(seed).integers(VOCABULARY, size=windows * BLOCK_SIZE + 5).astype(np.int32)
    return replace(scored_text(["x" * 211], [ids], BLOCK_SIZE), text_tokens=len(ids))


def half_predictable_text(model: GPT2LMHeadModel) -> ScoredText:
    """Windows whose next token is now the model's first choice, now its second to fifth, now any other."""
    rng = np.random.default_rng(2)
    windows = []
    for _ in range(7):
        window = [int(rng.integers(VOCABULARY))]
        while len(window) < BLOCK_SIZE:
            with torch.no_grad():
                ranking = model(torch.tensor([window])).logits[0, -1].argsort(descending=True)
            window.append(int(ranking[rng.choice([0, rng.integers(1, 5), rng.integers(5, VOCABULARY)])]))
        windows.append(window)
    return ScoredText(Dataset.from_dict({"input_ids": windows}), text_tokens=89, text_bytes=211)


def brute_force(model: GPT2LMHeadModel, scored: ScoredText) -> dict:
    """The figures token by token, in fp64, with Python's own arithmetic."""
    model = copy.deepcopy(model).double().eval()
    nats, correct, top5 = [], 0, 0
    for window in scored.windows["input_ids"]:
        for end in range(1, len(window)):
            with torch.no_grad():
                logits = model(torch.tensor([window[:end]])).logits[0, -1].tolist()
            highest = max(logits)
            normaliser = highest + math.log(math.fsum(math.exp(logit - highest) for logit in logits))
            nats.append(normaliser - logits[window[end]])
            better = sum(logit > logits[window[end]] for logit in logits)
            correct += better == 0
            top5 += better < 5
    loss = math.fsum(nats) / len(nats)
    return {
        "loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_byte": loss * scored.text_tokens / (math.log(2) * scored.text_bytes),
        "next_token_accuracy": correct / len(nats),
        "top5_accuracy": top5 / len(nats),
        "tokens": len(nats),
        "bytes": scored.text_bytes,
        "text_tokens": scored.text_tokens,
    }


class GivenLogits(torch.nn.Module):
    """A model that always says the same thing about the next token."""

    def __init__(self, logits: torch.Tensor):
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, input_ids, attention_mask, use_cache):
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))


# ---- scores


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_scores_equal_brute_force_whatever_the_batch(batch_size):
    model = tiny_gpt2()
    scored = half_predictable_text(model)
    scores = score_text(model, scored, batch_size=batch_size, description="test")
    assert list(scores) == KEYS
    assert scores == pytest.approx(brute_force(model, scored), abs=1e-6, rel=1e-6)
    assert scores["tokens"] == 7 * (BLOCK_SIZE - 1)
    assert 0.1 < scores["next_token_accuracy"] < scores["top5_accuracy"] - 0.1 < 0.9


def test_logits_in_small_portions_give_the_same_scores(monkeypatch):
    model, scored = tiny_gpt2(), random_text()
    whole = score_text(model, scored, batch_size=3, description="test")
    monkeypatch.setattr("partialtune.scoring.fast_scoring.LOGITS_AT_ONCE", 4 * VOCABULARY)
    assert score_text(model, scored, batch_size=3, description="test") == pytest.approx(whole, rel=1e-12)


def test_loss_is_the_models_own_loss():
    model, scored = tiny_gpt2(), random_text()
    ids = torch.tensor(scored.windows["input_ids"][:])
    own = model(input_ids=ids, labels=ids).loss.item()
    assert score_text(model, scored, batch_size=4, description="test")["loss"] == pytest.approx(own, abs=1e-6)


def test_uniform_model_has_known_figures():
    scored = ScoredText(random_text().windows, text_tokens=90, text_bytes=360)
    scores = score_text(GivenLogits(torch.zeros(VOCABULARY)), scored, batch_size=4, description="test")
    assert scores["loss"] == pytest.approx(math.log(128), abs=1e-6)
    assert scores["perplexity"] == pytest.approx(128, rel=1e-6)
    assert scores["bits_per_byte"] == pytest.approx(7 * 90 / 360, rel=1e-6)  # 7 bits a token, 4 bytes a token


def test_accuracies_count_the_first_and_the_first_five_choices():
    windows = Dataset.from_dict({"input_ids": [[99, 10, 11, 14, 15], [10, 10, 3, 99, 12]]})
    logits = torch.zeros(VOCABULARY)
    logits[10:15] = torch.tensor([9.0, 8.0, 7.0, 6.0, 5.0])
    scores = score_text(GivenLogits(logits), ScoredText(windows, 10, 10), batch_size=2, description="test")
    assert scores["next_token_accuracy"] == 2 / 8  # the first token of each window is context
    assert scores["top5_accuracy"] == 5 / 8


def test_perplexity_that_overflows_and_losses_that_are_not_finite_become_none():
    scored = random_text()
    logits = torch.zeros(VOCABULARY)
    logits[127] = 4000.0
    huge = score_text(GivenLogits(logits), scored, batch_size=2, description="test")
    assert huge["loss"] > 3000
    assert huge["perplexity"] is None
    assert huge["bits_per_byte"] == pytest.approx(huge["loss"] / math.log(2) * scored.text_tokens / scored.text_bytes)
    broken = score_text(GivenLogits(logits * math.nan), scored, batch_size=2, description="test")
    assert (broken["loss"], broken["perplexity"], broken["bits_per_byte"]) == (None, None, None)
    assert json.loads(json.dumps(broken, allow_nan=False)) == broken


def test_every_module_keeps_its_mode_and_the_random_state_stays():
    model = tiny_gpt2().train()
    model.transformer.h[0].eval()  # a frozen block
    modes = {name: module.training for name, module in model.named_modules()}
    state = torch.get_rng_state()
    score_text(model, random_text(), batch_size=4, description="test")
    probe_prompts(model, ascii_tokenizer(), ["ab"], new_tokens=3)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), state)

    with pytest.raises(IndexError):  # a token that the vocabulary does not have
        score_text(model, ScoredText(Dataset.from_dict({"input_ids": [[1, 999]]}), 2, 2), 1, "test")
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_dropout_does_not_act_while_scoring():
    model, scored = tiny_gpt2(), random_text()
    evaluated = score_text(model, scored, batch_size=4, description="test")
    assert score_text(model.train(), scored, batch_size=4, description="test") == evaluated


@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_bf16_models_and_autocast_give_plain_floats_close_to_fp32(how):
    model, scored = tiny_gpt2(), random_text()
    exact = score_text(model, scored, batch_size=4, description="test")
    if how == "weights":
        scores = score_text(model.bfloat16(), scored, batch_size=4, description="test")
    else:
        scores = score_text(model, scored, batch_size=4, description="test", autocast_dtype=torch.bfloat16)
    assert scores["loss"] == pytest.approx(exact["loss"], rel=0.02)
    assert scores["loss"] != exact["loss"]
    assert {type(scores[key]) for key in METRICS} == {float}
    assert {type(scores[key]) for key in KEYS if key not in METRICS} == {int}


def test_scored_text_counts_all_tokens_and_bytes_and_spaces_a_limit_evenly():
    ids = [np.arange(1000, dtype=np.int32), np.arange(5, dtype=np.int32)]
    scored = scored_text(["ä" * 10, "b"], ids, block_size=10, limit=4)
    assert (scored.text_tokens, scored.text_bytes) == (1005, 21)
    assert [window[0] for window in scored.windows["input_ids"]] == [0, 330, 660, 990]
    assert len(scored_text(["a"], ids, block_size=10, limit=256).windows) == 100


@pytest.mark.parametrize("watched", [0, 3, 99])
def test_the_scores_of_single_tokens_are_kept_for_evenly_spaced_windows(watched):
    model, scored = tiny_gpt2(), random_text(7)
    figures, nats = score_tokens(model, scored, batch_size=2, description="test", watched=watched)
    assert figures == score_text(model, scored, batch_size=2, description="test")
    chosen = {0: [], 3: [0, 3, 6], 99: list(range(7))}[watched]
    assert spaced_indices(7, watched).tolist() == chosen
    ids = torch.tensor(scored.windows["input_ids"])[chosen].view(-1, BLOCK_SIZE)
    assert len(nats) == len(chosen)
    for window, line in zip(ids, nats, strict=True):
        expected = -model(window[None]).logits[0, :-1].double().log_softmax(-1)[range(BLOCK_SIZE - 1), window[1:]]
        assert torch.allclose(torch.from_numpy(line).double(), expected, atol=1e-5)


def test_metric_module_loads_without_network_and_writes_nothing_into_the_working_folder(tmp_path, monkeypatch):
    import evaluate

    def refuse(*_):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.chdir(tmp_path)
    metric = evaluate.load(str(METRIC_FILE), keep_in_memory=True)
    metric.add_batch(nats=[math.log(2), math.log(8)], tokens=[1, 1], correct=[1, 0], top5_correct=[1, 1])
    metric.add_batch(nats=[math.log(2) * 2], tokens=[2], correct=[1], top5_correct=[2])
    figures = metric.compute(text_tokens=6, text_bytes=24)
    assert figures == pytest.approx(
        {
            "loss": 1.5 * math.log(2),
            "perplexity": 2**1.5,
            "bits_per_byte": 1.5 * 6 / 24,
            "next_token_accuracy": 0.5,
            "top5_accuracy": 1.0,
            "tokens": 4,
            "bytes": 24,
            "text_tokens": 6,
        }
    )
    assert os.listdir(tmp_path) == []


def score_as_one_of_two() -> dict:
    """What each of two processes does; no test ran in it, so it also sees what importing the package imports."""
    light = "evaluate" not in sys.modules
    dist.init_process_group("gloo")
    scores = {count: score_text(tiny_gpt2(), random_text(count), batch_size=2, description="test") for count in COUNTS}
    _, nats = score_tokens(tiny_gpt2(), random_text(5), batch_size=2, description="test", watched=3)
    gc.collect()  # gloo may abort at exit if anything of it is still referred to
    return {"light": light, "scores": scores, "nats": nats.tolist()}


COUNTS = (1, 5, 6)  # windows: fewer than processes, uneven, even


@pytest.fixture(scope="module")
def two_processes() -> list[dict]:
    return on_two_processes(score_as_one_of_two)


@pytest.mark.slow
@pytest.mark.parametrize("count", COUNTS)
def test_two_processes_report_what_one_reports(two_processes, count):
    alone = score_text(tiny_gpt2(), random_text(count), batch_size=2, description="test")
    assert alone["tokens"] == count * (BLOCK_SIZE - 1)
    for process in two_processes:
        assert process["scores"][count] == pytest.approx(alone, rel=1e-6)


@pytest.mark.slow
def test_every_process_gets_the_scores_of_all_watched_windows(two_processes):
    _, alone = score_tokens(tiny_gpt2(), random_text(5), batch_size=2, description="test", watched=3)
    for process in two_processes:
        assert np.array(process["nats"]) == pytest.approx(alone, rel=1e-5, abs=1e-6)


@pytest.mark.slow
def test_importing_the_module_does_not_import_evaluate(two_processes):
    assert [process["light"] for process in two_processes] == [True, True]


# ---- prompts


def test_probe_holds_the_next_token_distribution_and_the_most_probable_continuation():
    model, tokenizer = tiny_gpt2(), ascii_tokenizer()
    (probe,) = probe_prompts(model, tokenizer, ["My father"], top_k=4, new_tokens=6)
    ids = [ord(character) for character in "My father"]
    expected = model(torch.tensor([ids])).logits[0, -1].double().softmax(-1)
    assert torch.allclose(probe.log_probabilities.exp(), expected, atol=1e-7)
    assert probe.log_probabilities.shape == (VOCABULARY,)
    best = sorted(range(VOCABULARY), key=lambda token_id: -expected[token_id])[:4]
    assert [choice["id"] for choice in probe.top] == best
    assert [choice["token"] for choice in probe.top] == [tokenizer.decode([token_id]) for token_id in best]
    assert [choice["probability"] for choice in probe.top] == pytest.approx(expected[best].tolist(), abs=1e-7)
    for _ in range(6):
        ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
    assert probe.continuation == tokenizer.decode(ids[9:])


def test_continuation_is_greedy_whatever_the_models_generation_settings_say(capfd):
    model, tokenizer = tiny_gpt2(), ascii_tokenizer()
    (plain,) = probe_prompts(model, tokenizer, ["ab"], new_tokens=12)
    model.generation_config.update(
        do_sample=True, temperature=0.5, top_p=0.9, repetition_penalty=9.0, no_repeat_ngram_size=1, max_length=5
    )
    settings = model.generation_config.to_dict()
    (probe,) = probe_prompts(model, tokenizer, ["ab"], new_tokens=12)
    assert probe.continuation == plain.continuation
    assert len(plain.continuation) == 12
    assert model.generation_config.to_dict() == settings
    assert capfd.readouterr() == ("", "")  # no warnings


def test_the_sampled_continuation_is_the_same_each_time_and_draws_nothing_from_the_trainings_random_numbers(capfd):
    model, tokenizer = tiny_gpt2(scale=4.0), ascii_tokenizer()
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first, second = (probe_prompts(model, tokenizer, ["ab", "ab"], new_tokens=20) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert [probe.sample for probe in first] == [probe.sample for probe in second]
    assert first[0].sample == first[1].sample  # one seed for every prompt
    assert first[0].sample != first[0].continuation
    assert len(first[0].sample) == 20
    model.generation_config.update(temperature=0.01, top_k=1, repetition_penalty=9.0)
    (probe,) = probe_prompts(model, tokenizer, ["ab"], new_tokens=20)
    assert probe.sample == first[0].sample
    assert capfd.readouterr() == ("", "")


def test_continuation_ends_where_the_models_context_ends():
    (probe,) = probe_prompts(tiny_gpt2(), ascii_tokenizer(), ["a" * 60], new_tokens=30)
    assert len(probe.continuation) == 4
    (probe,) = probe_prompts(tiny_gpt2(), ascii_tokenizer(), ["a" * 64], new_tokens=30)
    assert probe.continuation == ""
    with pytest.raises(TextError, match="65 tokens, the model takes 64"):
        probe_prompts(tiny_gpt2(), ascii_tokenizer(), ["a" * 65])


def test_empty_prompt_starts_from_the_bos_or_is_refused():
    model = tiny_gpt2()
    (probe,) = probe_prompts(model, ascii_tokenizer(bos_token="<|end|>"), [""], new_tokens=2)
    expected = model(torch.tensor([[0]])).logits[0, -1].double().log_softmax(-1)
    assert torch.allclose(probe.log_probabilities, expected, atol=1e-6)
    with pytest.raises(TextError, match="no token and this tokenizer no BOS"):
        probe_prompts(model, ascii_tokenizer(), [""])


def probe_with(probabilities: list[float], **changes) -> PromptProbe:
    values = torch.tensor(probabilities, dtype=torch.float64).log()
    top = [{"token": str(token_id), "id": token_id, "probability": p} for token_id, p in enumerate(probabilities)]
    return replace(PromptProbe("p", values, top, "c"), **changes)


def test_kl_is_taken_from_before_to_after_in_nats():
    before, after = [0.5, 0.25, 0.25, 0.0], [0.125, 0.25, 0.5, 0.125]
    (entry,) = compare_prompts([probe_with(before)], [probe_with(after)])
    assert entry["kl"] == pytest.approx(0.5 * math.log(4) - 0.25 * math.log(2), abs=1e-12)
    (reverse,) = compare_prompts([probe_with(after)], [probe_with(before)])
    assert reverse["kl"] is None  # what was impossible became possible: infinite
    (broken,) = compare_prompts([probe_with(before)], [probe_with([math.nan] * 4)])
    assert broken["kl"] is None


def test_an_unchanged_model_has_kl_zero_and_a_changed_one_the_brute_force_value():
    tokenizer, prompts = ascii_tokenizer(), ["ab", "Once upon"]
    before = probe_prompts(tiny_gpt2(0), tokenizer, prompts, new_tokens=3)
    assert [entry["kl"] for entry in compare_prompts(before, before)] == [0.0, 0.0]
    after = probe_prompts(tiny_gpt2(1), tokenizer, prompts, new_tokens=3)
    for entry, old, new in zip(compare_prompts(before, after), before, after, strict=True):
        pairs = zip(old.log_probabilities.tolist(), new.log_probabilities.tolist(), strict=True)
        assert entry["kl"] == pytest.approx(math.fsum(math.exp(p) * (p - q) for p, q in pairs), rel=1e-9)
        assert list(entry) == ["prompt", "before", "after", "kl", "continuation_before", "continuation_after"]
        assert json.loads(json.dumps(entry, allow_nan=False)) == entry
        assert list(entry["before"][0]) == ["token", "id", "probability"]
        assert len(entry["before"]) == len(entry["after"]) == 10


def test_table_shows_both_sides_within_100_columns_and_no_control_characters():
    def choice(token, probability):
        return {"token": token, "id": 1, "probability": probability}

    entry = {
        "prompt": "第一\n句 " * 30,
        "before": [choice("\n", 0.5), choice("\x1b[31m", 0.25), choice("字" * 60, 0.1), choice(" a", None)] * 2,
        "after": [choice("\u202e", 0.5), choice(" the", 0.25), choice("'", 0.1), choice("", 0.05)] * 2,
        "kl": 1.25,
        "continuation_before": "a small\r\nestate \t in 字" * 12,
        "continuation_after": "",
    }
    table = format_prompts([entry, entry | {"kl": None}])
    assert all(line.isprintable() for line in table.split("\n"))
    widths = [sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in line) for line in table.split("\n")]
    assert max(widths) <= 100
    lines = table.split("\n")
    header = next(number for number, line in enumerate(lines) if line.split() == ["before", "after"])
    assert lines[header + 1].split() == ["50.00%", "'\\n'", "50.00%", "'\\u202e'"]
    assert lines[header + 2].split() == ["25.00%", "'\\x1b[31m'", "25.00%", "'", "the'"]
    assert "KL(before to after) 1.2500 nats" in table
    assert "not finite" in table
    left = "".join(line[2:48] for line in lines[header + 6 :])
    assert left.startswith("'a small\\r\\nestate \\t in 字")


def test_a_continuation_is_shown_whole():
    entry = {"prompt": "p", "before": [], "after": [], "kl": 0.0, "continuation_before": "", "continuation_after": ""}
    words = " ".join(f"word{number}" for number in range(40))
    table = format_prompts([entry | {"continuation_before": words}])
    shown = "".join(line[2:50].rstrip() + " " for line in table.splitlines()[2:])
    assert shown.replace("''", "").split() == f"'{words}'".split()


@pytest.mark.parametrize("model_type", ["bart", "camembert", "gpt2"])
@pytest.mark.parametrize("sampled", [False, True])
def test_a_continuation_is_that_of_whole_passes_whatever_the_models_cache_does(model_type, sampled):
    """BART's tiny cache has as many layers as its encoder, one of three; CamemBERT's positions differ by one."""
    torch.manual_seed(0)
    config = tiny_config(model_type)
    config.is_decoder = True
    model, tokenizer = AutoModelForCausalLM.from_config(config).eval(), letters(99)
    ids = list(range(20, 28))
    (probe,) = probe_prompts(model, tokenizer, [tokenizer.decode(ids)], new_tokens=6)
    torch.manual_seed(SAMPLING["seed"])
    for _ in range(6):
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([ids]), use_cache=False).logits[:, -1]
        kept = TopPLogitsWarper(SAMPLING["top_p"])(None, scores)
        ids.append(int(torch.multinomial(kept.softmax(-1), 1)) if sampled else int(scores.argmax()))
        if ids[-1] == config.eos_token_id:
            break
    assert (probe.sample if sampled else probe.continuation) == tokenizer.decode(ids[8:])


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "bloom", "opt", "mamba"])
def test_prompts_of_several_lengths_together_are_continued_as_each_alone(model_type, caplog):
    torch.manual_seed(0)
    model, tokenizer = AutoModelForCausalLM.from_config(tiny_config(model_type)).eval(), letters(99)
    prompts = [tokenizer.decode(list(range(20, 20 + length))) for length in (3, 9, 5, 61)]  # the last one has no room
    together = probe_prompts(model, tokenizer, prompts, new_tokens=6)
    alone = [probe_prompts(model, tokenizer, [prompt], new_tokens=6)[0] for prompt in prompts]
    for one, other in zip(together, alone, strict=True):
        assert (one.continuation, one.sample) == (other.continuation, other.sample)
        assert torch.equal(one.log_probabilities, other.log_probabilities)


def test_several_prompts_take_the_passes_of_one():
    model, passes = tiny_gpt2(), []
    model.transformer.register_forward_pre_hook(lambda *_: passes.append(1))
    probe_prompts(model, ascii_tokenizer(pad_token="<|end|>"), ["ab", "My father", "c"], new_tokens=20)
    assert len(passes) <= 20 + 3 + 3  # a token each; what comes next after each prompt; what was generated, once more
