"""What a release needs agrees: versions in every place, and the files that other programs read are well-formed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path, PurePosixPath

import pytest
import yaml

import minigrpo
from tests.helpers.release import FOR_THE_SDIST, compare_contents, shipped

ROOT = Path(__file__).parents[2]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PAGES = sorted((ROOT / "docs").glob("*.md"))
AT_THE_TOP = sorted(ROOT.glob("*.md"))


def test_every_place_names_the_same_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    newest = re.search(r"^## (\d\S*)", changelog, re.MULTILINE)
    assert newest is not None
    assert {VERSION, newest[1], citation["version"], minigrpo.__version__} == {VERSION}


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_every_workflow_has_jobs_whose_steps_do_one_thing_each(file: Path) -> None:
    workflow = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert True in workflow, "YAML 1.1 reads the key `on` as true: it must be there"
    for job in workflow["jobs"].values():
        assert job["runs-on"]
        assert all(("run" in step) != ("uses" in step) for step in job["steps"])
    needed = {name for job in workflow["jobs"].values() for name in [job.get("needs")] if name}
    assert needed <= workflow["jobs"].keys()


@pytest.mark.needs("linux")
@pytest.mark.parametrize(
    ("tag", "heading", "passes"),
    [
        (f"v{VERSION}", f"## {VERSION} (2026-12-01)", True),
        (f"v{VERSION}", f"## {VERSION} (unreleased)", False),
        (f"v{VERSION}", "## 9.9.9 (2026-12-01)", False),
        ("v9.9.9", f"## {VERSION} (2026-12-01)", False),
    ],
)
def test_a_tag_is_published_where_package_and_changelog_name_its_version_with_a_date(
    tmp_path: Path, tag: str, heading: str, passes: bool
) -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "publish.yml").read_text(encoding="utf-8"))
    (step,) = [step for step in workflow["jobs"]["build"]["steps"] if "GITHUB_REF_NAME" in step.get("run", "")]
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n{heading}\n")
    environment = {"GITHUB_REF_NAME": tag, "PATH": os.environ["PATH"]}
    ended = subprocess.run(["bash", "-e", "-c", step["run"]], cwd=tmp_path, env=environment, timeout=30)
    assert (ended.returncode == 0) is passes


def test_the_wheel_is_told_to_hold_every_file_of_the_package() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    patterns = [f"minigrpo/{pattern}" for pattern in setuptools["package-data"]["minigrpo"]]
    for name in map(PurePosixPath, shipped()):
        if name.suffix == ".py":
            assert (ROOT / "src" / name.parent / "__init__.py").is_file(), f"{name} lies in no package"
        else:
            assert any(name.match(pattern) for pattern in patterns), f"{name} is in no pattern of package-data"


def test_files_that_a_release_lacks_or_has_too_many_of_are_named(tmp_path: Path) -> None:
    files = sorted(shipped())
    with zipfile.ZipFile(tmp_path / "minigrpo-1-py3-none-any.whl", "w") as wheel:
        for name in (*files[1:], "minigrpo/notes.txt", "minigrpo-1.dist-info/METADATA"):
            wheel.writestr(name, "")
    with tarfile.open(tmp_path / "minigrpo-1.tar.gz", "w:gz") as sdist:
        for name in (*FOR_THE_SDIST, *(f"src/{name}" for name in files[:-1])):
            sdist.addfile(tarfile.TarInfo(f"minigrpo-1/{name}"))
    assert compare_contents(tmp_path) == [
        f"minigrpo-1-py3-none-any.whl lacks {files[0]}",
        "minigrpo-1-py3-none-any.whl should not hold minigrpo/notes.txt",
        f"minigrpo-1.tar.gz lacks src/{files[-1]}",
    ]


@pytest.mark.parametrize("page", [*PAGES, *AT_THE_TOP], ids=lambda page: page.stem)
def test_every_link_of_a_page_leads_to_a_file_and_a_heading(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)\)", page.read_text(encoding="utf-8")):
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors_of(file), target


def anchors_of(file: Path) -> set[str]:
    """Return the anchors that a page's headings get: small letters, hyphens for spaces, other marks left out."""
    headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_is_reached_from_the_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES if page.name != "index.md" and f"({page.name})" not in index] == []


def test_the_pages_that_follow_from_the_code_are_what_it_says() -> None:
    command = [sys.executable, str(ROOT / "docs" / "generate.py"), "--check"]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stderr
