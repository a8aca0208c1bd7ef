"""What the page has from elsewhere is what was recorded, and what it says of figures is what docs/metrics.md says."""

from __future__ import annotations

import json

from minigrpo.runs.rundir import digest
from minigrpo.view.renew import DOCS, LIBRARIES, PAGE, RECORD, VENDOR, sentences


def test_every_vendored_file_has_its_recorded_hash_version_and_licence() -> None:
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    files = {name: about["sha256"] for library in record for name, about in library["files"].items()}
    assert {path.name for path in VENDOR.iterdir()} == {*files, RECORD.name}
    assert {name: digest(VENDOR / name) for name in files} == files
    assert [library["package"] for library in record] == [library.package for library in LIBRARIES]
    assert all(library["version"] and library["license"] and library["integrity"] for library in record)
    for library in LIBRARIES:
        assert any("LICENSE" in name for name in library.files)


def test_the_pages_sentences_are_those_of_the_docs() -> None:
    """python -m minigrpo.view.renew --sentences"""
    told = json.loads((PAGE / "metrics.json").read_text(encoding="utf-8"))
    assert told == sentences(DOCS.read_text(encoding="utf-8"))


def test_names_that_leave_out_what_they_share_are_completed() -> None:
    told = sentences(DOCS.read_text(encoding="utf-8"))
    for name in ("rewards/NAME/std", "completions/max_length", "clip_ratio/high_mean", "seconds/sync", "format"):
        assert told[name]["means"]
    assert told["entropy"] == {
        "means": "mean entropy of the next-token distribution at the sampled positions, nats",
        "when": "falls to 0 early: exploration has ended",
    }


def test_the_page_names_no_other_host() -> None:
    own = [path for path in PAGE.rglob("*") if path.suffix in (".html", ".js", ".css") and path.parent != VENDOR]
    assert len(own) > 5
    for path in own:
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in text.replace("http://127.0.0.1", ""), path
        assert "https://" not in text, path
        assert "innerHTML" not in text, path
        assert "dangerouslySetInnerHTML" not in text, path
