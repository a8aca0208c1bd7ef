"""PEFT wraps layers beside packages that it refuses, such as Colab's torchao, and each is told once."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model, import_utils

from minigrpo.cli import doctor
from minigrpo.config.schema import AdapterConfig
from minigrpo.errors import ModelError
from minigrpo.models import peft_compat
from minigrpo.models.lora import add_lora, attach_adapter, save_adapter
from tests.helpers.stubs import install_stub
from tests.helpers.tiny import build_model

OLD = [("torchao", "0.10.0"), ("gptqmodel", "4.0.0")]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder on sys.path, and a PEFT that has not looked around yet, before and after."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(peft_compat, "_refused", {})
    forget()
    yield folder
    forget()


def forget() -> None:
    for check in peft_compat.CHECKED.values():
        getattr(import_utils, check).cache_clear()


@pytest.mark.parametrize(("package", "version"), OLD)
def test_a_package_that_peft_refuses_is_gone_without_and_told_once(site: Path, package: str, version: str) -> None:
    install_stub(site, package, version, "raise RuntimeError('nobody may import it')")
    with pytest.raises(ImportError, match=f"incompatible version of {package}"):
        get_peft_model(build_model(), LoraConfig(target_modules="all-linear"))
    with pytest.warns(UserWarning, match=f"Going on without {package}.*{version}"):
        wrapped, _ = add_lora(build_model(), AdapterConfig(rank=4), seed=0)
    folder = site.parent / "adapter"
    save_adapter(wrapped, folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        attach_adapter(build_model(), folder)


@pytest.mark.parametrize(("package", "version"), OLD)
def test_the_doctor_names_it_before_and_after(site: Path, package: str, version: str) -> None:
    assert not doctor.refused_parts()
    install_stub(site, package, version)
    for _ in range(2):
        (found,) = doctor.refused_parts()
        assert (found.name, found.level) == (package, "note")
        assert version in found.value
        assert f"pip install -U {package}" in found.advice


def test_a_package_that_peft_takes_stays(site: Path) -> None:
    install_stub(site, "torchao", "0.17.0")
    assert not peft_compat.refused_packages()
    assert import_utils.is_torchao_available()


def test_where_peft_insists_the_way_out_is_named(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_stub(site, "torchao", "0.10.0")
    monkeypatch.setattr(import_utils, "is_torchao_available", insist)
    with pytest.raises(ModelError, match="pip uninstall torchao"):
        add_lora(build_model(), AdapterConfig(rank=4), seed=0)


@cache
def insist() -> bool:
    raise ImportError("Too old.")
