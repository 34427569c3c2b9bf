"""bf16 is chosen by time, on the device that is really there."""

import json

import pytest
import torch

from cluster import small_recipe
from partialtune.cli import main
from partialtune.training import settings as precision
from partialtune.training.settings import training_arguments


@pytest.mark.parametrize(("rate_fp32", "rate_bf16", "pays"), [(1e9, 2e9, True), (1e9, 1.1e9, False), (2e9, 1e9, False)])
def test_bf16_pays_where_its_product_is_clearly_faster(monkeypatch, caplog, rate_fp32, rate_bf16, pays):
    rates = {torch.float32: rate_fp32, torch.bfloat16: rate_bf16}
    monkeypatch.setattr(precision, "product_rate", lambda device, dtype: rates[dtype])
    with caplog.at_level("INFO"):
        assert precision.bf16_pays() is pays
    assert f"bf16: auto -> {str(pays).lower()}" in caplog.text
    assert f"is {rate_bf16 / rate_fp32:.2f} times as fast in bf16 as in fp32" in caplog.text
    assert "pays from 1.2 times on" in caplog.text


def test_a_recipe_that_says_auto_is_trained_in_what_was_measured_and_the_log_says_why(monkeypatch, caplog, tmp_path):
    for rate_bf16, pays in ((3e9, True), (1e9, False)):
        rates = {torch.float32: 1e9, torch.bfloat16: rate_bf16}
        monkeypatch.setattr(precision, "product_rate", lambda device, dtype, rates=rates: rates[dtype])
        with caplog.at_level("INFO"):
            args = training_arguments({"output_dir": str(tmp_path), "bf16": "auto"})
        assert args.bf16 is pays
        assert precision.compute_dtype(args) is (torch.bfloat16 if pays else torch.float32)
        assert f"bf16: auto -> {str(pays).lower()}: a product of 1024 x 768 x 3072" in caplog.text


def test_a_cuda_build_without_a_gpu_measures_on_the_cpu(monkeypatch):
    devices = []
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(precision, "product_rate", lambda device, dtype: devices.append(device.type) or 1.0)
    precision.bf16_pays()
    assert devices == ["cpu", "cpu"]


def test_the_rate_is_that_of_the_fastest_product_after_the_first(monkeypatch):
    moments = iter([0.0, 0.1, 1.0, 1.5, 2.0, 2.25, 3.0, 4.0])  # of four products: 0.1 s, 0.5 s, 0.25 s, 1 s
    monkeypatch.setattr(precision, "_now", lambda device: next(moments))
    rate = precision.product_rate(torch.device("cpu"), torch.float32, repeats=3)
    assert rate == 2 * 1024 * 768 * 3072 / 0.25


def test_what_is_timed_fills_the_device():
    assert precision.shape_for(torch.device("cpu")) == (1024, 768, 3072)
    assert precision.shape_for(torch.device("cuda")) == (8192, 4096, 4096)


@pytest.mark.parametrize("trainable", ["embeddings", "blocks[-1]"])
def test_what_did_not_move_scores_the_same_before_and_after_in_bf16_too(tmp_path, trainable):
    """accelerate has the model compute in bf16 only once it has prepared it: the base was scored in fp32 before."""
    words = small_recipe(tmp_path, schedule=[], trainable=trainable, max_steps=2, learning_rate=0.0, bf16=True)
    assert main([*words, "--weight_decay", "0", "--allow_failed_audit", "true"]) in (0, 3)  # 3: nothing has moved
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert [entry["kl"] for entry in found.pop("prompts")] == [0.0]
    assert {name: scores["before"]["loss"] for name, scores in found.items()} == {
        name: scores["after"]["loss"] for name, scores in found.items()
    }
    assert set(found) == {"validation", "training"}
