"""Distributions of other people's packages, as `pip` would leave them, without what is in them."""

from __future__ import annotations

from pathlib import Path


def install_stub(folder: Path, name: str, version: str, text: str = "") -> None:
    """Lay a package of this name and version into a folder that stands on sys.path; `text`: its module."""
    module, info = folder / name, folder / f"{name}-{version}.dist-info"
    for each in (module, info):
        each.mkdir(parents=True)
    (module / "__init__.py").write_text(text, encoding="utf-8")
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")
