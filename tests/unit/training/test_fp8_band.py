"""The watch over FP8's loss: when it looks, what it says, and that FP8 is on again afterwards."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from dc_megatron.training.forward_step import make_forward_step
from dc_megatron.training.fp8_band import BAND, Fp8Band, verdict, without_fp8

NAN, INFINITY = math.nan, math.inf


def test_inside_the_band_nothing_is_said():
    assert verdict(2.0, 2.0, 1, "delayed") == (0.0, None)
    difference, warning = verdict(2.0 * (1 + 0.9 * BAND), 2.0, 1, "delayed")
    assert difference == pytest.approx(0.9 * BAND)
    assert warning is None


@pytest.mark.parametrize("loss", [2.0 * (1 + 1.1 * BAND), 2.0 * (1 - 1.1 * BAND)], ids=["above", "below"])
def test_outside_the_band_there_is_a_warning(loss):
    difference, warning = verdict(loss, 2.0, 7, "delayed")
    assert difference == pytest.approx(1.1 * BAND)
    assert warning.startswith("warning: step 7: the loss in FP8 (delayed scaling) is ")
    assert f"{loss:.4f}, in bf16 on the same rows 2.0000: 2.2 % apart, more than 2 %" in warning
    assert "\n" not in warning


@pytest.mark.parametrize(
    ("fp8_loss", "bf16_loss"),
    [(NAN, 2.0), (2.0, NAN), (NAN, NAN), (INFINITY, 2.0), (2.0, INFINITY), (INFINITY, INFINITY)],
)
def test_what_is_no_number_is_outside(fp8_loss, bf16_loss):
    assert verdict(fp8_loss, bf16_loss, 1, "delayed")[1] is not None


def test_a_loss_of_zero_does_not_divide_by_it():
    assert verdict(0.0, 0.0, 1, "delayed") == (0.0, None)
    assert verdict(0.1, 0.0, 1, "delayed")[1] is not None


@pytest.mark.parametrize(
    ("recipe", "advice"),
    [
        ("delayed", "try --fp8-recipe tensorwise or --fp8-recipe blockwise, or train in bf16"),
        ("tensorwise", "try --fp8-recipe blockwise, or --first-last-layers-bf16, or train in bf16"),
        ("blockwise", "try --fp8-recipe tensorwise, or --first-last-layers-bf16, or train in bf16"),
    ],
)
def test_the_advice_is_another_recipe(recipe, advice):
    assert verdict(3.0, 2.0, 1, recipe)[1].endswith(advice)


def test_fp8_is_off_inside_and_on_again():
    config = SimpleNamespace(fp8="hybrid")
    with without_fp8(config):
        assert config.fp8 is None
    assert config.fp8 == "hybrid"


def test_fp8_is_on_again_after_an_exception():
    config = SimpleNamespace(fp8="hybrid")
    with pytest.raises(RuntimeError), without_fp8(config):
        raise RuntimeError
    assert config.fp8 == "hybrid"


class Model:
    """Losses of 2 in bf16, and in FP8 what it is told; keeps how each pass went."""

    training = True

    def __init__(self, in_fp8: float = 2.0, targets: int = 3):
        self.config = SimpleNamespace(fp8="hybrid")
        self.in_fp8, self.targets, self.passes = in_fp8, targets, []

    def __call__(self, batch: dict) -> torch.Tensor:
        self.passes.append((self.config.fp8, torch.is_grad_enabled()))
        value = self.in_fp8 if self.config.fp8 else 2.0
        return torch.full((self.targets,), value, requires_grad=True)


def asked_at(band: Fp8Band, calls: int) -> list[int]:
    """Numbers of the micro-batches at which the band compares."""
    model = Model()
    return [n for n in range(calls) if band.loss_in_bf16(model, model.config, {}) is not None]


@pytest.mark.parametrize(
    ("interval", "per_step", "first", "expected"),
    [
        (1, 1, 0, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]),
        (4, 1, 0, [0, 4, 8]),
        (2, 3, 0, [0, 6]),
        # Resumed after three steps: the fourth is the one from which the interval counts on.
        (4, 1, 3, [1, 5, 9]),
        (4, 2, 6, [4]),
    ],
)
def test_it_looks_at_the_first_micro_batch_of_every_interval(interval, per_step, first, expected):
    assert asked_at(Fp8Band(interval, per_step, "delayed", first), 12) == expected


def test_the_pass_in_bf16_keeps_no_graph():
    model, band = Model(in_fp8=9.0), Fp8Band(1, 1, "delayed")
    loss = band.loss_in_bf16(model, model.config, {})
    assert model.passes == [(None, False)]
    assert float(loss) == 2.0
    assert not loss.requires_grad
    assert model.config.fp8 == "hybrid"


class Caster(torch.nn.Module):
    """A layer that casts its weight in the first pass of a step, whatever that pass computes in."""

    def __init__(self, first: bool):
        super().__init__()
        self.is_first_microbatch = first

    def forward(self, batch: dict) -> torch.Tensor:
        self.is_first_microbatch = False
        return torch.ones(3)


@pytest.mark.parametrize("first", [True, False])
def test_the_pass_in_bf16_is_not_the_first_of_its_step(first):
    """Else the real one would find that the casts have been made, and take those of the step before."""
    model = torch.nn.Sequential(Caster(first))
    assert Fp8Band(1, 1, "delayed").loss_in_bf16(model, SimpleNamespace(fp8="hybrid"), {}) is not None
    assert model[0].is_first_microbatch is first


def test_a_micro_batch_without_targets_is_not_compared():
    model = Model(targets=0)
    assert Fp8Band(1, 1, "delayed").loss_in_bf16(model, model.config, {}) is None


def compare(band: Fp8Band, fp8_loss: float) -> None:
    model = Model()
    band.compare(band.loss_in_bf16(model, model.config, {}), torch.full((3,), fp8_loss))


def test_a_step_is_named_as_the_run_counts_it(capsys):
    band = Fp8Band(2, 3, "delayed", first_iteration=4)
    model = Model(in_fp8=3.0)
    for _ in range(7):
        in_bf16 = band.loss_in_bf16(model, model.config, {})
        if in_bf16 is not None:
            band.compare(in_bf16, model({}))
    said = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1] for line in said] == [" step 5", " step 7"]


def test_the_largest_difference_is_given_once(capsys):
    band = Fp8Band(1, 1, "delayed")
    assert band.take() is None
    for loss in (2.01, 2.02, 2.0):
        compare(band, loss)
    assert band.take() == pytest.approx(0.01, rel=1e-4)  # fp32's 2.02 is off in the eighth digit
    assert band.take() is None
    compare(band, 2.0)
    assert band.take() == 0.0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("losses", [(NAN, 2.01), (2.01, NAN), (INFINITY, 2.01)])
def test_no_later_difference_hides_what_was_no_number(losses, capsys):
    band = Fp8Band(1, 1, "delayed")
    for loss in losses:
        compare(band, loss)
    assert band.take() == INFINITY
    assert capsys.readouterr().err.count("warning") == 1


@pytest.mark.parametrize("interval", [1, 2])
def test_the_forward_step_looks_before_the_real_pass(interval, capsys, monkeypatch):
    model, band = Model(in_fp8=3.0), Fp8Band(interval, 1, "delayed")
    monkeypatch.setattr("dc_megatron.training.forward_step.get_model_config", lambda model: model.config)
    forward_step = make_forward_step(torch.device("cpu"), band=band)
    batch = {
        "labels": torch.zeros(1, 3, dtype=torch.int64),
        "image_mask": torch.zeros(1, 3, dtype=torch.bool),
        "pixel_values": None,
    }
    for _ in range(2):
        losses, _ = forward_step(iter([batch]), model)
        assert losses.requires_grad
        assert losses.tolist() == [3.0] * 3
    looked = [(None, False), ("hybrid", True)]
    assert model.passes == (looked * 2 if interval == 1 else [*looked, ("hybrid", True)])
    assert capsys.readouterr().err.count("warning") == 2 // interval
    assert band.take() == pytest.approx(0.5)


class Layer(torch.nn.Module):
    """As Transformer Engine's: weights are cast where FP8 is on and the pass is said to be its step's first."""

    def __init__(self, config: SimpleNamespace):
        super().__init__()
        self.config, self.is_first_microbatch = config, True
        self.weight, self.cast = 2.0, None

    def forward(self, batch: dict) -> torch.Tensor:
        if self.config.fp8 and (self.is_first_microbatch or self.cast is None):
            self.cast = self.weight
        self.is_first_microbatch = False
        return torch.full((3,), self.cast if self.config.fp8 else self.weight)


def test_the_real_pass_casts_the_weights_of_its_own_step(capsys):
    config = SimpleNamespace(fp8="hybrid")
    layer, band = Layer(config), Fp8Band(1, 2, "delayed")
    model = torch.nn.Sequential(layer)
    for step in range(3):
        layer.weight, layer.is_first_microbatch = 2.0 / (1 + step), True
        for place in range(2):
            in_bf16 = band.loss_in_bf16(model, config, {})
            assert (in_bf16 is None) == (place == 1)
            assert layer.is_first_microbatch == (place == 0)
            losses = model({})
            if in_bf16 is not None:
                band.compare(in_bf16, losses)
        assert band.take() == 0.0
    assert capsys.readouterr().err == ""
