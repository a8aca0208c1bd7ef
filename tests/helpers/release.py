"""Build what a release hands out, and try it as a stranger would: make release-check.

    python -m tests.helpers.release                  # build, check, install and run; needs a package registry
    python -m tests.helpers.release --contents DIST  # only compare what is in the built files with the source

The clean environment is made by `make setup`, which knows how to get a torch; then the wheel, and after it the source
distribution, takes the place of the checkout there, and its commands run in an empty folder.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "minigrpo"
FOR_THE_SDIST = ("pyproject.toml", "README.md", "LICENSE")


def shipped() -> set[str]:
    """Return the files of the package, those that Python and its tools leave behind aside."""
    files = (path for path in SOURCE.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(SOURCE.parent).as_posix() for path in files}


def compare_contents(dist: Path) -> list[str]:
    """Return what the wheel and the source distribution in a folder lack, or hold too much, as sentences."""
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    in_wheel = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    needed = {*FOR_THE_SDIST, *(f"src/{name}" for name in shipped())}
    return [
        *(f"{wheel.name} lacks {name}" for name in sorted(shipped() - in_wheel)),
        *(f"{wheel.name} should not hold {name}" for name in sorted(in_wheel - shipped())),
        *(f"{sdist.name} lacks {name}" for name in sorted(needed - in_sdist)),
    ]


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    """Run a command and return what it prints. Raises CalledProcessError where it fails."""
    print("+", *command, flush=True)
    done = subprocess.run([str(word) for word in command], cwd=cwd, check=False, capture_output=True, text=True)
    if done.returncode:
        print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
    done.check_returncode()
    return done.stdout


def build(place: Path) -> Path:
    """Build wheel and source distribution with tools of their own, and let twine read what an index would show."""
    tools, dist = place / "tools", place / "dist"
    run(sys.executable, "-m", "venv", tools)
    run(tools / "bin" / "python", "-m", "pip", "install", "--quiet", "build", "twine")
    run(tools / "bin" / "python", "-m", "build", "--outdir", dist, ROOT)
    print(run(tools / "bin" / "python", "-m", "twine", "check", "--strict", *sorted(dist.iterdir())))
    return dist


def try_out(dist: Path, place: Path) -> None:
    """Install each file of a release in a clean environment and run its commands in an empty folder."""
    environment, home = place / "clean", place / "home"
    home.mkdir()
    run("make", "setup", f"VENV={environment}", f"PYTHON={sys.executable}")
    python, minigrpo = environment / "bin" / "python", environment / "bin" / "minigrpo"
    for file in sorted(dist.iterdir()):
        run(python, "-m", "pip", "uninstall", "--quiet", "--yes", "minigrpo")
        run(python, "-m", "pip", "install", "--quiet", "--no-deps", file)
        run(python, "-m", "pip", "check")
        told = run(minigrpo, "--version", cwd=home).strip()
        version = file.name.removeprefix("minigrpo-").removesuffix(".tar.gz").partition("-")[0]
        if told != f"minigrpo {version}":
            raise SystemExit(f"{file.name} says that it is {told}")
        run(minigrpo, "--help", cwd=home)
        run(minigrpo, "recipes", "quickstart", cwd=home)
        report = json.loads(run(minigrpo, "doctor", "--json", cwd=home))
        where = run(python, "-c", "import minigrpo; print(minigrpo.__file__)", cwd=home).strip()
        print(f"{file.name}: {told}, doctor ok: {report['ok']}, from {where}")


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--contents"]:
        faults = compare_contents(Path(arguments[1]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            dist = build(Path(folder))
            faults = compare_contents(dist)
            if not faults:
                try_out(dist, Path(folder))
    print(*faults, sep="\n", file=sys.stderr)
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
