"""Publishing safely: which token is used, no secret anywhere, any folder as it is; and a process that is killed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minigrpo.cli.options import EXAMPLES
from minigrpo.config.load import dump_recipe, load_recipe
from minigrpo.delivery.hub.client import find_token, read_dotenv_token
from minigrpo.delivery.hub.publish import publish_folder
from minigrpo.errors import ArtifactError, MinigrpoError
from minigrpo.runs.chain import KEYS, append_link
from minigrpo.runs.rundir import RunDir
from tests.helpers.hub_server import standing
from tests.helpers.hub_storage import TOKEN, Repo, StandIn
from tests.helpers.published import REPOS, command, hub_here, large, run_copy, send, whole_run  # noqa: F401

# The token


def test_the_token_is_that_of_the_environment_then_of_env_then_of_the_login(
    hub: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    login = tmp_path / "login" / "token"
    login.parent.mkdir()
    login.write_text("hf_login\n")
    (tmp_path / ".env").write_text("OTHER=1\nexport HF_TOKEN='hf_file'\n")
    assert find_token() == (TOKEN, "the environment's HF_TOKEN")
    monkeypatch.delenv("HF_TOKEN")
    assert find_token() == ("hf_file", "HF_TOKEN in .env")
    (tmp_path / ".env").unlink()
    assert find_token() == ("hf_login", "the login of huggingface_hub")
    login.unlink()
    with pytest.raises(MinigrpoError, match=r"There is no token.*export HF_TOKEN.*\.env.*hf auth login"):
        find_token()


@pytest.mark.parametrize(
    "line",
    [
        "HF_TOKEN=hf_x",
        ' HF_TOKEN = "hf_x" ',
        "export HF_TOKEN='hf_x'",
        "HF_TOKEN=hf_x # mine",
        "HF_TOKEN=no\nHF_TOKEN=hf_x",
        "HF_TOKEN=hf_x\t# mine",
        "HF_TOKEN='hf_x'\t# mine",
        "HF_TOKEN=“hf_x”",
        "HF_TOKEN=`hf_x`",
        "NOTE=it's mine\r\nHF_TOKEN=hf_x\r",
        "AGE=1$x\nHF_TOKEN=hf_x\nEMPTY",
    ],
)
def test_env_files_are_read_as_people_write_them(tmp_path: Path, line: str) -> None:
    (tmp_path / ".env").write_text(f"# HF_TOKEN=old\nMY_HF_TOKEN=other\n{line}\n")
    assert read_dotenv_token(tmp_path / ".env") == "hf_x"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_a_token_is_read_as_editors_and_shells_save_it(tmp_path: Path, encoding: str) -> None:
    (tmp_path / ".env").write_bytes("HF_TOKEN=hf_x\r\nOTHER=é\r\n".encode(encoding))
    assert read_dotenv_token(tmp_path / ".env") == "hf_x"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_login_in_another_encoding_is_read_or_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    (tmp_path / "token").write_bytes("hf_x".encode(encoding))
    if encoding == "utf-8-sig":
        assert find_token()[0] == "hf_x"
    else:
        with pytest.raises(MinigrpoError, match="hf auth login"):
            find_token()


@pytest.mark.parametrize("token", ["hf_a b", "hf_\u00e4", "hf_a\nX-Evil: 1"])
def test_a_token_that_cannot_be_one_is_refused_without_being_shown(token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(MinigrpoError, match="holds characters that no token has") as fault:
        find_token()
    assert token not in str(fault.value)


def test_the_token_is_in_no_byte_that_is_written_or_sent(
    run: RunDir,
    hub: StandIn,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    hub.refuse = [("POST", "/commit/", 400, f"an error that repeats Bearer {TOKEN}")]
    with pytest.raises(MinigrpoError) as fault:
        send(run)
    hub.refuse = []
    send(run, fetch=True)
    send(run)
    printed = capfd.readouterr()
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    stored = [data for repo in hub.repos.values() for data, _ in repo.files.values()]
    words = [text.encode() for text in (str(fault.value), printed.out, printed.err)]
    assert "repeats Bearer ***" in str(fault.value)
    assert len(written) > 20
    assert len(hub.seen) > 50
    assert not [data[:200] for data in (*written, *stored, *words, *hub.seen) if TOKEN.encode() in data]
    assert not hub.stray


def test_a_run_that_holds_a_token_is_refused(run: RunDir, hub: StandIn) -> None:
    recipe = load_recipe(str(run.path))
    run.recipe.write_text(dump_recipe(recipe.model_copy(update={"about": f"my key is {TOKEN}"})))
    with pytest.raises(MinigrpoError, match=r"README\.md .*holds an access token.*Nothing was sent") as fault:
        send(run)
    assert TOKEN not in str(fault.value)
    assert hub.asked == [("GET", "/api/models/me/tiny-run")]  # whether pages are to link to it


# Any folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    (path / "deep").mkdir(parents=True)
    (path / "README.md").write_text("as I wrote it")
    (path / "deep" / "weights.safetensors").write_bytes(os.urandom(200_000))
    (path / "empty.txt").write_text("")
    return path


def test_any_folder_is_published_as_it_is(folder: Path, hub: StandIn) -> None:
    found = publish_folder(folder, "me/mine", fetch=True, quiet=True).sent[0]
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    there = {name: data for name, (data, _) in hub.repos["me/mine"].files.items() if name != ".gitattributes"}
    assert there == files
    assert found.files == {name: len(data) for name, data in files.items()}
    assert publish_folder(folder, "me/mine", quiet=True).sent[0].verdict == "there already"


@pytest.mark.parametrize("name", [".env", "deep/token", ".netrc", "id_rsa", "key.pem", ".git-credentials"])
def test_files_that_look_like_secrets_stop_publishing(folder: Path, hub: StandIn, name: str) -> None:
    (folder / name).write_text("x")
    with pytest.raises(MinigrpoError, match=r"looks like a secret\. Nothing was sent"):
        publish_folder(folder, "me/mine", quiet=True)


@pytest.mark.parametrize("words", [TOKEN, "hf_" + "a1B2" * 9, "-----BEGIN RSA PRIVATE KEY-----"])
def test_secrets_inside_files_stop_publishing(folder: Path, hub: StandIn, words: str) -> None:
    (folder / "notes.txt").write_text(f"and then {words}")
    with pytest.raises(MinigrpoError, match=r"notes\.txt holds an access token or a private key") as fault:
        publish_folder(folder, "me/mine", quiet=True)
    assert words not in str(fault.value)
    assert not hub.asked


def test_folders_of_git_and_caches_are_left_out_and_reported(folder: Path, hub: StandIn) -> None:
    for name in (".git/config", "deep/.cache/huggingface/x"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("x")
    found = publish_folder(folder, "me/mine", dry_run=True).sent[0]
    assert len(found.files) == 3
    assert "2 files" in found.remarks[0]


def test_a_folder_that_changed_is_not_put_over_the_other_without_force(folder: Path, hub: StandIn) -> None:
    hub.repos["me/mine"] = Repo(True, {"README.md": (b"somebody else's", False)})
    with pytest.raises(MinigrpoError, match=r"To replace README\.md.*--folder .*model --repo me/mine --force"):
        publish_folder(folder, "me/mine", quiet=True)
    assert publish_folder(folder, "me/mine", force=True, quiet=True).sent[0].verdict == "published"


def test_a_path_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is no folder"):
        publish_folder(tmp_path / "no", "me/mine", dry_run=True)
    with pytest.raises(ArtifactError, match="holds no files"):
        publish_folder(tmp_path, "me/mine", dry_run=True)


def test_a_gitignore_that_hides_files_is_noticed(folder: Path, hub: StandIn) -> None:
    hub.forget = {"deep/weights.safetensors"}
    with pytest.raises(MinigrpoError, match=r"weights\.safetensors .* did not arrive.*\.gitignore"):
        publish_folder(folder, "me/mine", quiet=True)


# The command line


def test_publish_requires_a_run_or_a_folder(run: RunDir, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ((), (str(run.path), "--folder", str(folder))):
        code, printed = command(*words, "--repo", "me/x", capsys=capsys)
        assert (code, "Name a run's folder, or any folder" in printed) == (2, True)
    code, printed = command(str(run.path), "--repo", "me/x", "--what", "zip", capsys=capsys)
    assert (code, "--what zip is not known. There are: merged, adapter, gguf" in printed) == (2, True)


@pytest.mark.long
def test_a_publication_that_is_killed_goes_on_with_the_same_command(run: RunDir, tmp_path: Path) -> None:
    total = sum(large(run).values())
    with standing(cut_after=total // 2) as server:
        settings = {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        own = {**os.environ, **settings, "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN}
        words = [sys.executable, "-m", "minigrpo.cli.main", "publish", str(run.path), "--repo", "me/tiny", "--fetch"]
        first = subprocess.Popen(words, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        while not server.broken and first.poll() is None:
            time.sleep(0.05)
        first.kill()
        first.communicate()
        assert server.broken
        kept, before = set(server.objects), server.uploaded
        server.mend()
        second = subprocess.run(words, env=own, capture_output=True, text=True)
        assert second.returncode == 0, second.stderr
        assert server.uploaded - before == sum(size for oid, size in large(run).items() if oid not in kept)
        assert server.repos.keys() == set(REPOS)
        assert TOKEN not in second.stdout + second.stderr
        assert all(f"{server.endpoint}/{repo}" in second.stdout for repo in REPOS)


def test_every_example_of_the_help_is_a_command_that_parses(
    run: RunDir, tmp_path: Path, hub: StandIn, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs").mkdir()
    run.path.rename(tmp_path / "runs" / "my")
    append_link(RunDir(tmp_path / "runs" / "my"), "begin", dict.fromkeys(KEYS["begin"]))
    lines = [line.partition("#")[0].split()[2:] for line in EXAMPLES["publish"].splitlines() if line.strip()]
    assert len(lines) >= 4
    for words in lines:
        code, printed = command(*words, "--dry-run", capsys=capsys)
        # The base lies on this machine, so what goes byte for byte needs its owner's word.
        assert code == 0 or ("--with-run" in words and "--with-paths" in printed), words
