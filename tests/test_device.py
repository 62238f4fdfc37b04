"""Where and how precisely to compute."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import REPOSITORY

from pipeline.errors import ConfigError
from stages.core import device


@pytest.fixture
def no_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.mark.usefixtures("no_accelerator")
@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_refused_with_a_remedy(name: str) -> None:
    with pytest.raises(ConfigError, match=f"`{name}` is not available") as caught:
        device.choose(name, "float32")
    assert "device=cpu" in caught.value.hint


@pytest.mark.usefixtures("no_accelerator")
def test_without_an_accelerator_auto_is_the_processor() -> None:
    assert device.choose("auto", "float32").device.type == "cpu"


@pytest.mark.parametrize(("cuda", "mps", "expected"), [
    (True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"), (False, False, "cpu"),
])  # fmt: skip
def test_auto_takes_the_best_device_there_is(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, mps: bool, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert device.choose("auto", "float32").device.type == expected
    for name in ("cuda", "mps", "cpu"):
        if name == "cpu" or {"cuda": cuda, "mps": mps}[name]:
            assert device.choose(name, "float32").device.type == name


@pytest.mark.parametrize(("name", "taken"), [("cuda", False), ("cpu", True)])
def test_on_cuda_attention_keeps_away_from_kernels_whose_gradients_are_nan(
    monkeypatch: pytest.MonkeyPatch, name: str, taken: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        device.choose(name, "float32")
        assert torch.backends.cuda.cudnn_sdp_enabled() == taken
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_a_precision_asked_for_is_the_one_used(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_bfloat16_pays", lambda chosen: name == "float32")
    assert device.choose("cpu", name).dtype == getattr(torch, name)


@pytest.mark.parametrize(("gain", "expected"), [(4.0, torch.bfloat16), (1.0, torch.float32), (0.3, torch.float32)])
def test_the_processor_uses_bfloat16_only_where_it_is_measured_to_pay(
    gain: float, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "_bfloat16_gain", lambda size: gain)
    assert device.choose("cpu", "auto").dtype == expected


def test_a_processor_that_emulates_bfloat16_is_found_out_without_a_large_product(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(device, "_bfloat16_gain", lambda size: asked.append(size) or 0.02)
    assert device.choose("cpu", "auto").dtype == torch.float32
    assert asked == [device.SMALL]


@pytest.mark.parametrize(("dtype", "gain", "warned"), [
    ("bfloat16", 0.02, True), ("bfloat16", 0.5, False), ("bfloat16", 2.0, False), ("float32", 0.02, False),
    ("auto", 0.02, False),
])  # fmt: skip
def test_a_stage_warns_of_a_precision_that_the_processor_emulates(
    dtype: str, gain: float, warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "_bfloat16_gain", lambda size: gain)
    said: list[str] = []
    asked = SimpleNamespace(device="cpu", dtype=dtype, say=said.append)
    assert device.for_stage(asked).device.type == "cpu"
    assert [line for line in said if "50 times as long" in line and "dtype=float32" in line] == said
    assert bool(said) == warned


def test_the_gain_of_bfloat16_is_the_ratio_of_what_products_take(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {torch.float32: 3.0, torch.bfloat16: 2.0}
    monkeypatch.setattr(device, "_matmul_seconds", lambda dtype, size: seconds[dtype] * size)
    assert device._bfloat16_gain.__wrapped__(8) == 1.5


@pytest.mark.parametrize("supported", [True, False])
def test_a_graphics_card_is_asked_for_bfloat16(supported: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    assert device.choose("cuda", "auto").dtype == (torch.bfloat16 if supported else torch.float32)


def test_the_measurement_takes_time() -> None:
    assert device._matmul_seconds(torch.float32, size=8, repeats=3) > 0


def test_the_record_names_device_and_precision() -> None:
    assert device.choose("cpu", "bfloat16").record == {"device": "cpu", "dtype": "bfloat16"}


def test_autocast_lowers_products_of_float32_weights_and_is_off_in_float32() -> None:
    layer, states = torch.nn.Linear(4, 4), torch.randn(2, 4)
    with device.choose("cpu", "bfloat16").autocast():
        assert layer(states).dtype == torch.bfloat16
    with device.choose("cpu", "float32").autocast():
        assert layer(states).dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [("cpu", torch.bfloat16, True), ("cpu", torch.float32, False), ("cuda", torch.bfloat16, False)],
)
def test_kernels_by_shape_are_made_for_bfloat16_on_processors(name: str, dtype: torch.dtype, expected: bool) -> None:
    assert device.Compute(torch.device(name), dtype).makes_kernels_by_shape == expected


@pytest.mark.slow
@pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()),
    reason="products in bfloat16 do not go through oneDNN here",
)
@pytest.mark.parametrize(("told", "times"), [({}, 2), ({"DNNL_PRIMITIVE_CACHE_CAPACITY": "1024"}, 1)])
def test_no_more_kernels_are_kept_than_the_limit_or_the_user_says(told: dict[str, str], times: int) -> None:
    shapes = device.KERNELS + 1
    products = f"""
import torch
from stages.core import device

device.choose("cpu", "bfloat16")
square = torch.ones(64, 64, dtype=torch.bfloat16)
for rows in [*range(2, {shapes + 2})] * 2:
    torch.ones(rows, 64, dtype=torch.bfloat16) @ square
"""
    unlimited = {name: value for name, value in os.environ.items() if name not in device.KERNELS_KEPT}
    said = subprocess.run(
        [sys.executable, "-c", products],
        cwd=REPOSITORY,
        env={**unlimited, **told, "ONEDNN_VERBOSE": "profile_create", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    made = [line for line in said.splitlines() if "create:cache_miss,cpu,matmul" in line]
    assert len(made) == times * shapes
