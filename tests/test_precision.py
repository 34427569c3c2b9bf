"""bf16 is chosen by time, on the device that is really there."""

import pytest
import torch

from partialtune.training import precision


@pytest.mark.parametrize(
    ("seconds_fp32", "seconds_bf16", "pays"), [(1.0, 0.5, True), (1.0, 0.9, False), (0.5, 1.0, False)]
)
def test_bf16_pays_where_its_product_is_clearly_faster(monkeypatch, caplog, seconds_fp32, seconds_bf16, pays):
    seconds = {torch.float32: seconds_fp32, torch.bfloat16: seconds_bf16}
    monkeypatch.setattr(precision, "_best_time", lambda device, dtype, repeats: seconds[dtype])
    with caplog.at_level("INFO"):
        assert precision.bf16_pays() is pays
    assert f"bf16: auto -> {str(pays).lower()}" in caplog.text


def test_a_cuda_build_without_a_gpu_measures_on_the_cpu(monkeypatch):
    devices = []
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(precision, "_best_time", lambda device, dtype, repeats: devices.append(device.type) or 1.0)
    precision.bf16_pays()
    assert devices == ["cpu", "cpu"]


def test_the_measurement_itself_takes_some_time():
    assert precision._best_time(torch.device("cpu"), torch.float32, repeats=1) > 0
