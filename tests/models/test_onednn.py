"""Both libraries give the same product, however their operands are laid out."""

from __future__ import annotations

import pytest
import torch

from minigrpo.models import onednn
from minigrpo.models.onednn import add_blocked_linear, blocked, blocked_linear, gains_by_blocks, linear, weight_grad


@pytest.fixture(
    params=[pytest.param(True, marks=pytest.mark.needs("onednn"), id="oneDNN"), pytest.param(False, id="torch")]
)
def by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "uses_onednn", lambda: request.param)


@pytest.mark.usefixtures("by")
@pytest.mark.parametrize("rows", [1, 31, 32, 100])
def test_a_layer_is_its_product(rows: int) -> None:
    stream = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=stream) for shape in ((2, rows, 24), (40, 24), (40,)))
    exact = x.double() @ weight.double().T
    for given, expected in ((None, exact), (bias, exact + bias)):
        torch.testing.assert_close(linear(x, weight, given).double(), expected, rtol=0, atol=1e-4)
    back = linear(exact[0].float(), weight.T)  # a weight that lies the other way
    torch.testing.assert_close(back.double(), exact[0].float().double() @ weight.double(), rtol=0, atol=1e-3)


@pytest.mark.usefixtures("by")
@pytest.mark.parametrize(("outputs", "inputs"), [(40, 64), (64, 40), (48, 48)])
def test_the_gradient_of_a_weight_is_summed_over_the_rows(outputs: int, inputs: int) -> None:
    stream = torch.Generator().manual_seed(0)
    slope, x = torch.randn(100, outputs, generator=stream), torch.randn(100, inputs, generator=stream)
    found = weight_grad(slope, x)
    assert found.shape == (outputs, inputs)
    torch.testing.assert_close(found.double(), slope.double().T @ x.double(), rtol=0, atol=1e-4)


def test_other_types_and_few_rows_stay_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> bool:
        raise AssertionError("not for this product")

    monkeypatch.setattr(onednn, "uses_onednn", refuse)
    for dtype, rows in ((torch.float64, 100), (torch.bfloat16, 100), (torch.float32, 31)):
        assert linear(torch.ones(rows, 8, dtype=dtype), torch.ones(4, 8, dtype=dtype)).shape == (rows, 4)


@pytest.mark.needs("bfloat16")
@pytest.mark.parametrize(("outputs", "inputs"), [(40, 24), (16, 33), (100, 1), (1152, 896), (896, 4864)])
def test_blocks_change_no_bit_of_a_product(outputs: int, inputs: int) -> None:
    stream = torch.Generator().manual_seed(0)
    weight, bias = (torch.randn(*shape, generator=stream).bfloat16() for shape in ((outputs, inputs), (outputs,)))
    for rows in (1, 2, 3, 7, 16, 17, 33, 200):
        x = torch.randn(rows, inputs, generator=stream).bfloat16()
        for given in (None, bias):
            assert torch.equal(blocked_linear(x, blocked(weight), given), torch.nn.functional.linear(x, weight, given))
        y = torch.randn(rows, outputs, generator=stream).bfloat16()
        assert torch.equal(add_blocked_linear(y, x, blocked(weight)), torch.addmm(y, x, weight.T))
        assert torch.equal(blocked_linear(x[None], blocked(weight))[0], blocked_linear(x, blocked(weight)))


def test_only_bfloat16_on_a_cpu_that_has_it_gains_by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not gains_by_blocks(torch.float32, "cpu")
    assert not gains_by_blocks(torch.bfloat16, "cuda")
    monkeypatch.setattr(onednn, "bfloat16_instructions", lambda: ())
    assert not gains_by_blocks(torch.bfloat16, "cpu")
