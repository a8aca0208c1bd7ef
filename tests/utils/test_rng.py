"""Draws are functions of their names."""

import pytest
import torch

from minigrpo.rollouts.engines.sampling import draw
from minigrpo.utils import rng
from minigrpo.utils.rng import keep_mask, mix, name_key, uniform


def test_the_mixer_is_splitmix64() -> None:
    # The first outputs of the reference generator seeded with 0 are mix(0), mix(golden), ...
    golden = 0x9E3779B97F4A7C15 - (1 << 64)
    outputs = [int(mix(torch.tensor(start))) % (1 << 64) for start in (0, golden)]
    assert outputs == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


def test_uniform_draws_are_even_and_neighbouring_keys_unrelated() -> None:
    draws = uniform(torch.arange(200_000))
    assert float(draws.min()) >= 0
    assert float(draws.max()) < 1
    counts = torch.histc(draws.float(), bins=20, min=0, max=1)
    assert float(((counts - 10_000) ** 2 / 10_000).sum()) < 45  # chi-square, 19 degrees of freedom, p = 0.0007
    both = torch.stack([draws[:-1], draws[1:]])
    assert abs(float(torch.corrcoef(both)[0, 1])) < 0.01


def test_a_device_without_float64_leaves_its_draws_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A meta tensor stands for one on an Apple GPU: it cannot be copied to the CPU, so the attempt shows."""
    monkeypatch.setattr(rng, "WITHOUT_FLOAT64", frozenset({"meta"}))
    logits_nV = torch.zeros(2, 5000, device="meta")
    for make in (lambda: uniform(torch.arange(2, device="meta")), lambda: draw(logits_nV, torch.zeros(2), 1.0)):
        with pytest.raises(NotImplementedError, match="Cannot copy out of meta"):
            make()
    assert rng.with_float64(torch.arange(2)).device.type == "cpu"


def test_a_name_has_one_key_and_other_names_have_others() -> None:
    assert name_key(1, "rollout", 2) == name_key(1, "rollout", 2)
    assert len({name_key(a, b) for a in range(50) for b in range(50)}) == 2500
    assert name_key(1, 23) != name_key(12, 3)


def test_a_mask_keeps_its_share_in_every_row_and_column() -> None:
    keep = keep_mask(mix(torch.arange(2000)), name_key("layer", 7), channels=256, drop=0.1).double()
    assert abs(float(keep.mean()) - 0.9) < 0.002
    assert float((keep.mean(0) - 0.9).abs().max()) < 0.03
    assert float((keep.mean(1) - 0.9).abs().max()) < 0.1
    # Rows are unrelated: any two agree as often as independent ones would.
    agree = (keep[:-1] == keep[1:]).double().mean()
    assert abs(float(agree) - 0.82) < 0.005
