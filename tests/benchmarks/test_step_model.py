"""The model of a step's time: it gives back the rates that it was made with, and says where ranks stop helping."""

import json
import struct
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from benchmarks.step_model import (
    RANKS,
    Rates,
    draw,
    fit_two,
    growing_batch,
    half_efficient,
    main,
    quickest,
    rates_of,
    read_rates,
    same_batch,
    step_time,
)
from minigrpo.config.load import dump_recipe, load_recipe
from minigrpo.errors import ArtifactError
from minigrpo.runs.rundir import RunDir

RATES = Rates(
    pass_s=1e-3,
    sample_s=5e-5,
    update_s=5e-5,
    host_s=0.0,
    sync_s=0.0,
    tokens=200.0,
    longest=32.0,
    groups=16,
    trained=250_000,
    limit=64,
    link=1e9,
    latency_s=0.0,
)


def test_what_is_shared_is_divided_and_what_is_not_stays() -> None:
    one, two, many = (step_time(RATES, ranks, 16) for ranks in (1, 2, 64))
    assert one.exchange == 0
    assert two.update == one.update / 2
    assert two.rollout == pytest.approx(32 * 1e-3 + (one.rollout - 32 * 1e-3) / 2)
    assert many.update == one.update / 16, "a group is not cut, so 64 ranks are no quicker than 16"
    assert two.exchange == pytest.approx((4 * 250_000 + 16 * 200 * 30 / 2) / 1e9)


def test_latency_and_what_every_rank_reads_end_the_growth() -> None:
    assert quickest(same_batch(RATES)).ranks == 16
    slow = replace(RATES, latency_s=1e-3)
    assert quickest(same_batch(slow)).ranks < 16
    assert half_efficient(growing_batch(replace(RATES, link=1e12))) is None
    reading = half_efficient(growing_batch(replace(RATES, link=1e12, host_s=3e-6)))
    assert reading is not None
    assert reading.ranks < RANKS[-1]


def test_two_rates_are_found_in_the_sum_of_both() -> None:
    rows = [(x, y, 0.25 * x + 0.5 * y) for x, y in ((1.0, 5.0), (2.0, 3.0), (7.0, 11.0))]
    assert fit_two(rows) == pytest.approx((0.25, 0.5))
    assert fit_two([(x, y, 2 * y) for x, y, _ in rows]) == pytest.approx((0.0, 2.0), abs=1e-9)
    assert min(fit_two([(1.0, 1.0, 1.0), (2.0, 1.0, 0.5), (1.0, 2.0, 2.5)])) >= 0, "no work takes less than no time"


def logged_run(folder: Path, steps: int = 20) -> RunDir:
    """A run's folder with a log whose steps take exactly what RATES say, and an adapter's head."""
    run = RunDir(folder)
    run.adapter.mkdir(parents=True)
    run.recipe.write_text(dump_recipe(load_recipe("quickstart")))
    rows = []
    for step in range(1, steps + 1):
        longest, tokens = 20 + step % 7, 3000 + 40 * (step % 5)
        rows.append(
            {
                "step": step,
                "completions/max_length": longest,
                "completions/mean_length": tokens / 128,
                "num_tokens": tokens,
                "seconds/rollout": RATES.pass_s * longest + RATES.sample_s * tokens,
                "seconds/update": RATES.update_s * tokens,
                "seconds/sync": 0.002,
            }
        )
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    head = json.dumps({"__metadata__": {}, "a": {"shape": [3, 5]}, "b": {"shape": [7]}}).encode()
    (run.adapter / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head)
    return run


def test_the_rates_of_a_run_are_read_from_its_own_log(tmp_path: Path) -> None:
    found = rates_of(logged_run(tmp_path / "run"), 1e9, 1e-5)
    assert (found.pass_s, found.sample_s) == pytest.approx((RATES.pass_s, RATES.sample_s))
    assert (found.update_s, found.sync_s, found.trained) == pytest.approx((RATES.update_s, 0.002, 22))
    assert 0 < found.host_s < 1e-3
    with pytest.raises(ArtifactError, match="nothing to fit"):
        rates_of(logged_run(tmp_path / "short", steps=3), 1e9, 1e-5)
    with pytest.raises(ArtifactError, match="These are no rates"):
        read_rates({"pass_s": 1})


def test_the_command_prints_rates_tables_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["rates", str(logged_run(tmp_path / "run").path)])
    rates = tmp_path / "rates.json"
    rates.write_text(capsys.readouterr().out)
    main(["show", str(rates), str(tmp_path / "picture.svg")])
    out = capsys.readouterr().out
    assert out.count(" ranks, ") == 2 * len(RANKS)
    assert "The same batch is quickest on " in out
    picture = ElementTree.fromstring((tmp_path / "picture.svg").read_text())
    assert len(picture.findall(".//{*}polyline")) == 8
    assert asdict(read_rates(json.loads(rates.read_text())))["groups"] == 16
    assert draw(RATES) != draw(replace(RATES, latency_s=1e-3))
