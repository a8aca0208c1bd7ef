"""Verify: a sound run passes, and what was changed, stale or too far from the trained policy is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from minigrpo.cli import main
from minigrpo.delivery.gguf import writer
from minigrpo.delivery.gguf.export import export
from minigrpo.delivery.parity.kl import OTHER_TEXTS
from minigrpo.delivery.parity.table import parity_table, read_parity
from minigrpo.delivery.serve.server import serve_gguf
from minigrpo.delivery.verify import verified_table, verify
from minigrpo.errors import ArtifactError, MinigrpoError
from minigrpo.runs.manifest import read_sealed, write_sealed
from minigrpo.runs.rundir import RunDir, digest, read_json, write_json
from tests.helpers.exported import merged_run

pytestmark = pytest.mark.extra("gguf")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """Return an exported run. Read only."""
    run = merged_run(tmp_path_factory.mktemp("verify") / "mine", "qwen3")
    export(run, ["F16", "Q8_0"], writer="own", quiet=True)
    return run


@pytest.fixture
def run(made: RunDir, tmp_path: Path) -> RunDir:
    return RunDir(shutil.copytree(made.path, tmp_path / "mine"))


def text_of(renderable: Any) -> str:
    from rich.console import Console

    console = Console(width=120)
    with console.capture() as captured:
        console.print(renderable)
    return captured.get()


def test_a_sound_run_is_verified_stage_by_stage_up_to_its_server(run: RunDir) -> None:
    write_json(run.parity, {"made": {"verb": "merge"}, "stages": [{"name": "gguf F32", "mean_kl": 0.0}]})
    found = verify(run, serve=True, quiet=True)
    assert (found.ok, found.faults) == (True, ())
    stages = ("base", "merged", "gguf F16", "gguf Q8_0")
    names = [*(name + texts for name in stages for texts in ("", OTHER_TEXTS)), "served Q8_0"]
    assert [row["name"] for row in found.rows] == names
    assert [row["name"] for row in read_parity(run)] == names  # rows of stages that are gone are removed
    assert read_json(run.parity)["made"] == {"verb": "merge"}
    rows = {row["name"]: row for row in found.rows}
    assert rows["served Q8_0"]["mean_kl"] == pytest.approx(rows["gguf Q8_0"]["mean_kl"], rel=0.2)
    told = text_of(verified_table(found))
    assert "what training did" in told
    assert told.count("proved") == 7
    assert "verified:" in told


def test_a_server_that_runs_elsewhere_is_asked_by_its_url(run: RunDir) -> None:
    with serve_gguf(run.gguf / "mine-Q8_0.gguf", context=512) as server:
        found = verify(run, served=server.url, quiet=True)
    assert found.ok
    assert found.rows[-1]["name"].startswith("served 127.0.0.1:")
    with pytest.raises(MinigrpoError, match="does not answer"):
        verify(run, served=server.url, quiet=True)


def test_a_server_of_the_base_is_distinguished_from_that_of_the_trained_model(
    run: RunDir, made: RunDir, tmp_path: Path
) -> None:
    writer.write_gguf(made.path.with_name("mine-base"), tmp_path / "base.gguf", "F16", "base")
    with serve_gguf(tmp_path / "base.gguf", context=512) as server:
        found = verify(run, served=server.url, quiet=True)
    assert not found.ok
    assert found.rows[-1]["relative_kl"] == pytest.approx(1, rel=0.2)
    assert "Is it this run's model?" in found.faults[0]


def test_a_merged_folder_edited_by_hand_is_named_with_the_file(run: RunDir) -> None:
    with (run.merged / "config.json").open("a") as stream:
        stream.write(" ")
    found = verify(run, quiet=True)
    assert not found.ok
    assert f"{run.merged / 'config.json'} was changed" in found.faults[0]
    assert f"minigrpo merge {run.path} --force" in found.faults[0]
    assert [row["name"] for row in found.rows] == ["base", f"base{OTHER_TEXTS}"]


def test_a_changed_gguf_file_is_named(run: RunDir) -> None:
    file = run.gguf / "mine-F16.gguf"
    raw = file.read_bytes()
    file.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    found = verify(run, quiet=True)
    assert not found.ok
    assert f"{file} was put there or changed" in found.faults[0]
    assert "--format F16 --force" in found.faults[0]


def test_a_sealed_file_of_the_untouched_base_does_not_pass(
    run: RunDir, made: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    """The seal is valid, but weights and distributions decide."""
    file = run.gguf / "mine-F16.gguf"
    writer.write_gguf(made.path.with_name("mine-base"), file, "F16", "mine")
    seal = read_sealed(run.gguf / "made.json")
    seal["files"][file.name]["sha256"] = digest(file)
    write_sealed(run.gguf / "made.json", {name: seal[name] for name in ("made", "files")})
    with pytest.raises(SystemExit) as ended:
        main.main(["verify", str(run.path), "--json"])
    told = json.loads(capsys.readouterr().out)
    assert (ended.value.code, told["ok"]) == (1, False)
    row = {row["name"]: row for row in told["rows"]}["gguf F16"]
    assert row["relative_kl"] == pytest.approx(1, rel=0.1)
    assert "does not hold the merged model's weights" in told["faults"][0]
    assert "Export again" in told["faults"][0]
    assert {row["name"]: row["ok"] for row in read_parity(run)}["gguf F16"] is False


def test_what_is_not_there_is_not_measured_and_what_is_no_run_is_refused(run: RunDir, tmp_path: Path) -> None:
    for file in run.gguf.iterdir():
        file.unlink()
    rows = verify(run.path, quiet=True).rows
    assert [row["name"] for row in rows] == [name + texts for name in ("base", "merged") for texts in ("", OTHER_TEXTS)]
    with pytest.raises(ArtifactError, match="no run's folder"):
        verify(run.adapter.rename(tmp_path / "adapter"), quiet=True)


def test_a_damaged_parity_file_is_reported_with_the_command_that_measures_again(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert read_parity(run) == []
    write_json(run.parity, {"stages": ["?"]})
    with pytest.raises(ArtifactError, match=r"damaged.*minigrpo verify"):
        read_parity(run)


def test_rows_are_in_the_order_of_the_stages_and_failures_are_marked(tmp_path: Path) -> None:
    figures = {"mean_kl": 0.1, "max_kl": None, "relative_kl": 0.5, "top1": 0.9, "greedy": 1.0, "greedy_of": 2.0}
    rows = [{"name": name, "limit": 0.1, "ok": name != "merged"} | figures for name in ("served", "gguf F16", "merged")]
    write_json(tmp_path / "parity.json", {"stages": [*rows, {"name": "base", "limit": None, "ok": True} | figures]})
    found = read_parity(RunDir(tmp_path))
    assert [row["name"] for row in found] == ["base", "merged", "gguf F16", "served"]
    lines = [line.rstrip() for line in text_of(parity_table(found)).splitlines()]
    assert next(line for line in lines if line.startswith("merged")).endswith("failed")
    assert all(len(line) <= 80 for line in lines)


def test_the_table_fits_into_eighty_columns() -> None:
    figures = {"mean_kl": 2.3e-14, "max_kl": 1.3e-12, "relative_kl": 6.3e-14, "top1": 1.0, "ok": True, "limit": 0.1}
    figures |= {"greedy": 96.0, "greedy_of": 96.0}
    rows = [{"name": name + texts} | figures for name in ("base", "gguf Q4_K_M") for texts in ("", OTHER_TEXTS)]
    told = text_of(parity_table(rows))
    assert told.count("  other texts ") == 2
    assert max(len(line.rstrip()) for line in told.splitlines()) <= 80
