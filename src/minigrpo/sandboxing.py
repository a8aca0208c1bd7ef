"""The command that looks at the sandbox."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console

from minigrpo.door import AsJson, Command, print_json, result_alone


def sandbox(
    doctor: Annotated[bool, typer.Option("--doctor", help="Look at this machine; also the default.")] = True,
    as_json: AsJson = False,
) -> None:
    """Which locks hold for model-written programs here.

    Starts a worker, makes the system calls that must fail, and runs a few programs. Exit code 0 where programs are run
    on this machine, 1 where they are refused. What the lines mean stands in docs/sandbox.md.
    """
    from minigrpo.sandbox.report import examine, to_dict

    with result_alone(as_json):
        findings = examine()
    report = to_dict(findings)
    if as_json:
        print_json(report)
    else:
        from minigrpo.doctor import Finding, doctor_table

        Console().print(doctor_table([Finding(**asdict(finding)) for finding in findings]))
    raise typer.Exit(0 if report["ok"] else 1)


def add_to(app: typer.Typer) -> None:
    app.command(cls=Command)(sandbox)
