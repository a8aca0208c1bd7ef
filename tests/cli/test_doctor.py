"""What the doctor says of this machine is true."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minigrpo.cli import doctor
from minigrpo.sandbox.doctor import to_dict

ROOT = Path(__file__).parents[2]


def test_the_report_has_every_topic_and_is_json() -> None:
    findings = doctor.examine()
    assert {f.topic for f in findings} == {"machine", "device", "disk", "version", "optional"}
    report = json.loads(json.dumps(to_dict(findings)))
    assert report["ok"] is True


def test_the_tested_versions_are_those_of_the_constraints() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    assert {name: pinned[name] for name in doctor.TESTED} == doctor.TESTED


def test_another_version_is_noted_with_the_line_that_mends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed", {"torch": "2.13.0+cu130", "peft": "0.1.0"}.get)
    found = {f.name: f for f in doctor.versions()}
    assert found["torch"].level == "ok"
    assert found["peft"].level == "note"
    assert "pip install 'peft==0.21.2'" in found["peft"].advice
    assert found["rich"].level == "bad"


def test_optional_parts_say_what_they_are_for_and_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed", {"trl": "1.0"}.get)
    found = {part.name: part for part in doctor.optional_parts()}
    assert found["trl"].level == "ok"
    monkeypatch.setattr(doctor, "installed", {}.get)
    missing = doctor.optional_parts()
    assert {part.level for part in missing} == {"note"}
    assert all(part.advice.startswith("pip install") for part in missing)


def test_a_gpu_is_asked_for_true_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A T4 says yes to the plain question, and emulates."""
    asked = []

    def is_bf16_supported(including_emulation: bool = True) -> bool:
        asked.append(including_emulation)
        return including_emulation

    class Facts:
        name, major, minor = "Tesla T4", 7, 5

    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Facts)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (14 * doctor.GIB, 15 * doctor.GIB))
    found = doctor._cuda(0)
    assert asked == [False]
    assert "no true bfloat16" in found.value
    assert "14.0 GiB free of 15.0 GiB" in found.value


def test_apples_gpu_is_named_with_the_option_that_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    (line,) = (finding for finding in doctor.devices() if finding.name == "mps")
    assert (line.level, line.value) == ("note", "Apple GPU, float32; bfloat16 if asked for")
    assert "--model.device mps" in line.advice


def test_memory_is_not_more_than_a_container_grants(monkeypatch: pytest.MonkeyPatch) -> None:
    total, free = doctor.memory()
    assert total is not None
    limits = {"/sys/fs/cgroup/memory.max": 2 * doctor.GIB, "/sys/fs/cgroup/memory.current": doctor.GIB}
    monkeypatch.setattr(doctor, "_number", limits.get)
    if free is not None:
        assert doctor.memory() == (2 * doctor.GIB, min(free, doctor.GIB))


def test_the_hub_cache_is_where_its_owner_keeps_it() -> None:
    from huggingface_hub import constants

    assert doctor.hub_cache() == Path(constants.HF_HUB_CACHE)


def test_without_torch_the_doctor_still_speaks() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from minigrpo.cli.doctor import devices\n"
        "found = devices(); print(found); sys.exit(found[-1].level != 'bad')"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr + ended.stdout
