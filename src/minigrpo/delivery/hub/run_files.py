"""Collect what an audit of a run needs, for a repository of its own: USER/NAME-run.

    recipe.yaml made.json base.json machine.json chain.jsonl    from what it began, and the chain of its hashes
    metrics.jsonl groups.jsonl                                  every prompt, answer and figure
    checkpoints/ warmup/ adapter/ (or model/)                   where steps can be done again, and how it ended
    evals/ preflight.json check.json parity.json                what was measured
    task/                                                       the files that the recipe names: reward, data, rates
    seals/                                                      hashes of the merged model and the GGUF files

Every file goes byte for byte, because the chain has its hash. So a file that names a place of this machine cannot be
rewritten: it is refused unless its owner lets everybody see it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from minigrpo.config.load import load_recipe, task_files
from minigrpo.delivery.hub.client import RepoFile, format_bytes, repo_file
from minigrpo.errors import ArtifactError, command_line
from minigrpo.runs.chain import read_chain
from minigrpo.runs.manifest import existing_result
from minigrpo.runs.rundir import RunDir

MOST_PARTS = 5
"""Parts of a run's repository whose sizes are named."""


def audit_files(run: RunDir) -> tuple[RepoFile, ...]:
    """Return every file that an audit reads. Raises ArtifactError where the run has no chain, or a broken one."""
    if not run.chain.is_file():
        raise ArtifactError(
            f"{run.path} has no chain of hashes, so nobody could audit it. Publish it without --with-run"
        )
    audit = command_line("minigrpo", "audit", run.path)
    if not any(link.kind == "begin" for link in read_chain(run)):
        raise ArtifactError(f"{run.chain} is empty, so nobody could audit the run. What is wrong: {audit}")
    return tuple(repo_file(name, file) for name, file in sorted(_named(run)))


def _named(run: RunDir) -> Iterator[tuple[str, Path]]:
    """Yield each file with its name in the repository."""
    files = [run.recipe, run.made, run.base, run.machine, run.chain, run.metrics, run.groups]
    files += [run.preflight, run.check, run.parity, *run.evals.glob("*.json")]
    for folder in (run.checkpoints, run.warmup, existing_result(run)):
        files += (file for file in folder.rglob("*") if file.is_file())
    for file in files:
        name = file.relative_to(run.path)
        if file.is_file() and not any(part.startswith(".") for part in name.parts):
            yield name.as_posix(), file
    for file in carried_files(run):
        yield f"{run.task_files.name}/{file.name}", file
    for made in (run.merged, run.gguf):
        if (made / "made.json").is_file():
            yield f"{run.seals.name}/{made.name}.json", made / "made.json"


def carried_files(run: RunDir) -> list[Path]:
    return [path for path in task_files(load_recipe(str(run.path)).task) if path.is_file()]


def remarks_on(run: RunDir) -> tuple[str, ...]:
    """Say what strangers will read, and what they will have to have themselves."""
    said = ["The run goes with every prompt of its logs, its right answer and each answer of the model."]
    recipe = load_recipe(str(run.path))
    left = [path for path in task_files(recipe.task) if path.is_dir()]
    said += [f"{path} is a folder and stays here: who does steps again must have it." for path in left]
    return tuple(said)


def sizes_by_part(items: Sequence[RepoFile]) -> str:
    """Say how large each part of a run's repository is, the largest first."""
    parts: dict[str, int] = {}
    for each in items:
        parts[each.name.partition("/")[0]] = parts.get(each.name.partition("/")[0], 0) + each.size
    largest = sorted(parts.items(), key=lambda part: -part[1])
    shown = [f"{name} {format_bytes(size)}" for name, size in largest[:MOST_PARTS]]
    rest = sum(size for _, size in largest[MOST_PARTS:])
    return ", ".join([*shown, *([f"the rest {format_bytes(rest)}"] if rest else [])])


def how_to_audit(repos: Mapping[str, str], base: str | None, *, embedded: bool) -> str:
    """Write the commands by which a stranger audits the run, and holds the published models to it. `embedded`: the
    base is built where it is missing."""
    folder = repos["run"].partition("/")[2]
    own = () if base or embedded else ("--base", "PATH-OF-THE-BASE")
    lines = [command_line("hf", "download", repos["run"], "--local-dir", folder)]
    lines += [command_line("minigrpo", "audit", folder, *own)]
    for kind in ("merged", "gguf"):
        if kind in repos:
            place = repos[kind].partition("/")[2]
            lines += [command_line("hf", "download", repos[kind], "--local-dir", place)]
            lines += [command_line("minigrpo", "audit", folder, *own, "--model", place)]
    return "\n".join(lines)
