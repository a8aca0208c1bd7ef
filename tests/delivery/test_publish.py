"""Publishing, with the Hub's real client against a stand-in on this machine: complete, resumable, compared."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from minigrpo.delivery.hub import client
from minigrpo.delivery.hub.publish import publish
from minigrpo.errors import ArtifactError, MinigrpoError
from minigrpo.runs.manifest import hash_files, read_sealed, write_sealed
from minigrpo.runs.rundir import RunDir, digest
from tests.helpers.hub_storage import READER, Repo, StandIn
from tests.helpers.published import REPOS, add_gguf, command, hub_here, large, run_copy, send, whole_run  # noqa: F401


def test_three_repositories_cut_after_half_of_the_bytes_and_run_again_end_complete(run: RunDir, hub: StandIn) -> None:
    total = sum(large(run).values())
    assert len(large(run)) >= 5
    assert max(large(run).values()) > 3 * hub.part_size
    hub.cut_after = total // 2
    with pytest.raises(MinigrpoError, match=r"broke.*the same command goes on: minigrpo publish .*tiny --repo me/tiny"):
        send(run)
    kept, before = set(hub.objects), hub.uploaded
    assert kept
    assert before < 0.6 * total
    hub.mend()
    found = send(run, fetch=True)
    assert hub.uploaded - before == sum(size for oid, size in large(run).items() if oid not in kept)
    for sent, folder in zip(found.sent, (run.merged, run.adapter, run.gguf), strict=True):
        assert sent.fetched is not None
        anew = {"README.md", *(("adapter_config.json", "tokenizer_config.json") if folder == run.adapter else ())}
        own = {file.name for file in folder.iterdir()} - {"made.json", *anew}
        assert own | {"README.md", "minigrpo.json"} <= sent.files.keys()
        for name in own:
            there = hub.repos[sent.repo].files[name][0]
            assert there == (folder / name).read_bytes() == (sent.fetched / name).read_bytes(), name
        for name in anew:
            assert hub.repos[sent.repo].files[name][0] == (sent.fetched / name).read_bytes()
    assert found.sent[-1].verdict == "published"
    assert not hub.stray, "the storage saw the token"


def test_a_cut_leaves_no_half_of_a_repository(run: RunDir, hub: StandIn) -> None:
    hub.cut_after = large(run)[digest(next(run.gguf.glob("*.gguf")))] // 2
    with pytest.raises(MinigrpoError):
        send(run, what=["gguf"])
    assert hub.repos["me/tiny-GGUF"].files.keys() == {".gitattributes"}


def test_publishing_again_sends_nothing(run: RunDir, hub: StandIn) -> None:
    send(run)
    before, commits = hub.uploaded, [hub.repos[repo].head for repo in REPOS]
    assert [sent.verdict for sent in send(run).sent] == ["there already"] * 3
    assert (hub.uploaded, [hub.repos[repo].head for repo in REPOS]) == (before, commits)


def test_cards_link_to_repositories_that_were_published_before(run: RunDir, hub: StandIn) -> None:
    send(run)
    page = hub.repos["me/tiny-GGUF"].files["README.md"]
    assert send(run, what=["gguf"]).sent[0].verdict == "there already"
    assert hub.repos["me/tiny-GGUF"].files["README.md"] == page
    assert b"base_model:\n- me/tiny\n" in page[0]
    other = publish(run, "me/alone", what=["gguf"], quiet=True).sent[0]
    assert b"me/alone-lora" not in hub.repos[other.repo].files["README.md"][0]


def test_another_export_is_added_and_one_that_is_gone_is_removed(run: RunDir, hub: StandIn) -> None:
    send(run, what=["gguf"])
    new = add_gguf(run, "F16", 90_000)
    next(run.gguf.glob("*Q8_0.gguf")).unlink()
    hub.repos["me/tiny-GGUF"].files["picture.png"] = (b"theirs", False)
    send(run, what=["gguf"])
    names = hub.repos["me/tiny-GGUF"].files.keys()
    assert new.name in names
    assert "tiny-Q8_0.gguf" not in names
    assert "picture.png" in names, "it was never ours"


def test_repositories_are_private_unless_asked_otherwise(run: RunDir, hub: StandIn) -> None:
    send(run, what=["adapter"])
    publish(run, "me/open", what=["adapter"], private=False, quiet=True)
    assert hub.repos["me/tiny-lora"].private
    assert not hub.repos["me/open-lora"].private


def test_private_content_is_not_sent_to_a_public_repository(run: RunDir, hub: StandIn) -> None:
    hub.repos["me/tiny-lora"] = Repo(private=False)
    with pytest.raises(MinigrpoError, match=r"is there and public.*--public"):
        send(run, what=["adapter"])


def test_a_repository_with_other_content_is_refused_until_force(run: RunDir, hub: StandIn) -> None:
    hub.repos["me/tiny"] = Repo(True, {"model.safetensors": (b"theirs", True), "config.json": (b"{}", False)})
    with pytest.raises(
        MinigrpoError, match=r"other content.*replace config\.json and remove model\.safetensors.*--force"
    ):
        send(run)
    assert hub.uploaded == 0, "nothing is sent before every repository was looked at"
    send(run, force=True)
    assert "model.safetensors" not in hub.repos["me/tiny"].files


def test_another_run_does_not_replace_a_repository(run: RunDir, hub: StandIn, tmp_path: Path) -> None:
    send(run, what=["adapter"])
    other = RunDir(shutil.copytree(run.path, tmp_path / "other"))
    with pytest.raises(MinigrpoError, match="not published from here"):
        send(other, what=["adapter"])


@pytest.mark.parametrize(
    ("refusal", "sentence"),
    [
        (
            ("GET", "whoami", 401, "Invalid user token"),
            r"does not know the token from the environment's HF_TOKEN \(401\)",
        ),
        (
            ("POST", "repos/create", 403, "You don't have the rights"),
            r"may not write to me/tiny \(403\): You don't have",
        ),
        (("POST", "repos/create", 402, "Payment required"), r"has no room for me/tiny \(402\)"),
        (("POST", "objects/batch", 403, "Private repository storage limit reached"), "has no room.*billing"),
        (("POST", "/commit/", 503, "down"), "trouble of its own.*the same command goes on"),
        (("POST", "/preupload/", 500, "down"), "trouble of its own.*the same command goes on"),
        (("GET", "whoami", 429, "slow down"), "asks for a pause.*the same command goes on"),
        (("POST", "/commit/", 400, "bad thing"), r"refused me/tiny \(400\): bad thing"),
        (("PUT", "/p", 403, "signature expired"), r"\(403\): signature expired"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence_with_the_next_command(
    run: RunDir, hub: StandIn, refusal: tuple[str, str, int, str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.refuse = [refusal]
    code, printed = command(str(run.path), "--repo", "me/tiny", "--what", "merged", capsys=capsys)
    assert code == 2
    assert re.search(sentence, " ".join(printed.split()))
    hub.refuse = []
    assert command(str(run.path), "--repo", "me/tiny", "--what", "merged", capsys=capsys)[0] == 0


def test_a_read_only_token_is_reported(run: RunDir, hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", READER)
    with pytest.raises(MinigrpoError, match=r"may not write to me/tiny \(403\).*--repo USER/NAME"):
        send(run)


def test_an_unreachable_hub_is_reported(run: RunDir, hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(MinigrpoError, match=r"connection to http://127.0.0.1:9 broke or never was.*goes on"):
        send(run)


def test_a_hub_that_never_answers_is_given_up(run: RunDir, hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import close_session

    close_session()
    monkeypatch.setattr(client, "READ_TIMEOUT_S", 0.2)
    hub.silent = "whoami"
    try:
        with pytest.raises(MinigrpoError, match="broke or never was"):
            send(run)
    finally:
        close_session()


def test_offline_mode_is_reported(run: RunDir, hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(MinigrpoError, match="unset HF_HUB_OFFLINE"):
        send(run)


def test_a_temporary_server_error_is_retried(run: RunDir, hub: StandIn) -> None:
    class Once(list[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter([self.pop()] if len(self) else [])

    hub.refuse = Once([("GET", "whoami", 503, "a moment")])
    assert send(run, what=["adapter"]).sent[0].verdict == "published"


@pytest.mark.parametrize("name", ["tiny", "me/", "me/a b", "me/a--b", "me/" + "n" * 97, "me/x/y", "../me"])
def test_names_that_no_repository_can_have_are_refused_first(run: RunDir, name: str) -> None:
    with pytest.raises(MinigrpoError, match="cannot be a repository's name"):
        publish(run, name, dry_run=True)


def test_files_that_did_not_arrive_are_named(run: RunDir, hub: StandIn) -> None:
    hub.forget = {"config.json"}
    with pytest.raises(MinigrpoError, match=r"committed, but config\.json .* did not arrive.*minigrpo publish"):
        send(run, what=["merged"])


def test_a_copy_that_differs_is_named(run: RunDir, hub: StandIn) -> None:
    hub.spoil = {"adapter_model.safetensors"}
    with pytest.raises(MinigrpoError, match=r"is not what was published.*--fetch"):
        send(run, what=["adapter"], fetch=True)


def test_a_dry_run_tells_what_would_go_where_and_asks_nobody(
    run: RunDir, hub: StandIn, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    code, printed = command(str(run.path), "--repo", "me/tiny", "--dry-run", "--json", capsys=capsys)
    told = json.loads(printed[printed.index("{") : printed.rindex("}") + 1])["repositories"]
    assert (code, [each["repo"] for each in told]) == (0, list(REPOS))
    assert told[2]["files"]["tiny-Q8_0.gguf"] == 150_004
    assert all(each["private"] and each["verdict"] == "would be published" for each in told)
    assert not hub.asked
    assert "me/tiny-GGUF (gguf, private" in command(str(run.path), "--repo", "me/tiny", "--dry-run", capsys=capsys)[1]


# Only what is proved


def test_a_merged_folder_that_was_edited_is_refused(run: RunDir) -> None:
    (run.merged / "config.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"config\.json was changed.*minigrpo merge"):
        send(run, dry_run=True)


def test_an_adapter_that_is_not_what_was_merged_is_refused(run: RunDir) -> None:
    (run.adapter / "adapter_config.json").write_text((run.adapter / "adapter_config.json").read_text() + " ")
    with pytest.raises(ArtifactError, match="minigrpo check"):
        send(run, what=["adapter"], dry_run=True)


def test_gguf_files_that_were_changed_or_are_of_another_model_are_refused(run: RunDir) -> None:
    file = next(run.gguf.glob("*.gguf"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(ArtifactError, match=r"Q8_0\.gguf was changed after it was proved.*--format Q8_0 --force"):
        send(run, what=["gguf"], dry_run=True)
    file.write_bytes(whole)
    made = read_sealed(run.gguf / "made.json")
    made["files"][file.name]["from"]["model"] = {"config.json": "0"}
    write_sealed(run.gguf / "made.json", {name: made[name] for name in ("made", "files")})
    with pytest.raises(ArtifactError, match="made from another merged model"):
        send(run, what=["gguf"], dry_run=True)


def test_rejected_and_foreign_files_are_not_published(run: RunDir) -> None:
    for name in ("tiny-Q4_K_M.gguf.rejected", "mine.gguf"):
        (run.gguf / name).write_bytes(b"GGUF")
    assert send(run, what=["gguf"], dry_run=True).sent[0].files.keys() == {
        *("tiny-Q8_0.gguf", "tiny-Q8_0.Modelfile", "README.md", "minigrpo.json")
    }


def test_the_licence_goes_wherever_the_weights_go(run: RunDir) -> None:
    (run.merged / "LICENSE").write_text("MIT License")
    seal = read_sealed(run.merged / "made.json")
    kept = {name: value for name, value in seal.items() if name not in ("format", "minigrpo")}
    write_sealed(run.merged / "made.json", {**kept, "sha256": hash_files(run.merged)})
    assert all("LICENSE" in sent.files for sent in send(run, what=["merged", "adapter"], dry_run=True).sent)


def test_what_is_not_there_yet_names_the_command_that_makes_it(run: RunDir) -> None:
    shutil.rmtree(run.gguf)
    with pytest.raises(ArtifactError, match="minigrpo export"):
        send(run, what=["gguf"], dry_run=True)
    shutil.rmtree(run.merged)
    with pytest.raises(ArtifactError, match="minigrpo merge"):
        send(run, what=["merged"], dry_run=True)
