"""Tables and panels for a terminal: verdicts, evaluations, before and after. They take results and return rich."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group as Stack
from rich.console import RenderableType
from rich.panel import Panel
from rich.text import Text

from minigrpo.errors import more_at
from minigrpo.ui.live import duration
from minigrpo.ui.plain_text import printable
from minigrpo.ui.tables import plain_table, titled

if TYPE_CHECKING:
    from minigrpo.evaluation.evaluate import Comparison, Evaluation
    from minigrpo.evaluation.statistics import Scores
    from minigrpo.training.memory.planner import Plan
    from minigrpo.training.preflight import Figures, PreflightResult, PromptLengths
    from minigrpo.training.sft_warmup import WarmupResult

LONGEST_TEXT = 400  # of a model's answer on the screen; the file has all of it


def verdict_table(verdict: PreflightResult) -> RenderableType:
    """Show preflight's samples, figures and verdict."""
    lines: list[RenderableType] = [answer_panel(sample, f"{sample['which']} sample") for sample in verdict.samples]
    lines.append(figures_table(verdict.figures))
    lines += [Text(f"warning: {warning}", style="yellow") for warning in verdict.warnings]
    if verdict.after_warmup:
        lines += [Text(f"the warm-up mends this: {reason.what}", style="yellow") for reason in verdict.reasons]
    else:
        lines += [Text(f"change this: {reason.what} {reason.change}", style="red") for reason in verdict.reasons]
    if verdict.go and not verdict.figures.decided:
        lines.append(Text("verdict: go, but undecided: too little was sampled", style="bold yellow"))
    elif verdict.go:
        lines.append(Text("verdict: go", style="bold green"))
    elif verdict.after_warmup:
        told = "verdict: go, by way of the recipe's warm-up: `minigrpo run` does it first, then looks again"
        lines.append(Text(told, style="bold green"))
    else:
        lines.append(Text("verdict: not yet. Training like this would teach nothing.", style="bold red"))
        lines.append(Text(more_at("preflight-says-not-yet")))
    return Stack(*lines)


def figures_table(figures: Figures) -> RenderableType:
    table = plain_table("")
    planned, held = (
        f"{size:.1f} GB" if size else "unknown" for size in (figures.planned_memory_gb, figures.peak_memory_gb)
    )
    rows = {
        "completions sampled": f"{figures.completions} in {figures.groups} groups",
        "well-formed": f"{figures.formed:.0%}",
        "right": f"{figures.solved:.0%}",
        "reward": rewards(figures),
        "groups that teach": f"{figures.informative_rate}",
        "cut off at the limit": f"{figures.truncated:.0%}",
        "length": f"{figures.mean_tokens:.0f} tokens",
        "longest prompt": longest_prompt(figures.prompts),
        "sampling": "not timed" if figures.tokens_per_second is None else f"{figures.tokens_per_second:,.0f} tokens/s",
        "one step": "not timed" if figures.step_seconds is None else f"{figures.step_seconds:.1f} s",
        "the whole training": "not timed"
        if figures.training_seconds is None
        else f"about {duration(figures.training_seconds)}",
        "peak memory": f"{planned} planned, {held} so far",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return titled("preflight", table)


def rewards(figures: Figures) -> str:
    if figures.reward_mean is None:
        return "could not be told"
    left_out = f" ({figures.unscored:.0%} could not be told)" if figures.unscored else ""
    return f"{figures.reward_mean:.3f}, standard deviation {figures.reward_std:.3f}{left_out}"


def longest_prompt(prompts: PromptLengths) -> str:
    context = f" of a context of {prompts.context}" if prompts.context else ""
    return f"{prompts.longest} tokens{context}"


def warmup_table(warmed: WarmupResult) -> RenderableType:
    """Show what a warm-up changed."""
    table = plain_table("before", "after")
    before, after = warmed.before, warmed.after
    table.add_row("well-formed", f"{before.formed:.0%}", f"{after.formed:.0%}")
    table.add_row("loss on the lessons", f"{before.loss:.3f}", f"{after.loss:.3f}")
    table.add_row("loss on answers held aside", f"{before.held_aside:.3f}", f"{after.held_aside:.3f}")
    title = f"warm-up: {warmed.lessons} written answers, {warmed.held_aside} held aside; losses in nats a token"
    return Stack(titled(title, table), *(Text(f"warning: {warning}", style="yellow") for warning in warmed.warnings))


def evaluation_table(evaluation: Evaluation) -> RenderableType:
    """Show one model's evaluation. In brackets: 95 % intervals."""
    scores = evaluation.scores
    title = f"{evaluation.task}: {scores.accuracy.count} unseen prompts, {evaluation.decoding}"
    table = plain_table(evaluation.name)
    for name, value in score_rows(scores).items():
        table.add_row(name, value)
    return titled(title, table)


def comparison_table(comparisons: Sequence[Comparison]) -> RenderableType:
    """Show before and after side by side, once for each decoding. In brackets: 95 % intervals."""
    first = comparisons[0]
    title = f"{first.before.task}: the same {first.after.scores.accuracy.count} unseen prompts, the same decoding"
    table = plain_table(first.before.name, first.after.name, "change in points")
    notes = []
    for comparison in comparisons:
        table.add_row()
        table.add_row(Text(comparison.after.decoding, style="bold"))
        before, after = score_rows(comparison.before.scores), score_rows(comparison.after.scores)
        changes = {"right": str(comparison.change)}
        for name in before:
            table.add_row(f"  {name}", before[name], after[name], changes.get(name, ""))
        change = comparison.change
        notes.append(
            f"{comparison.after.decoding}: {change.gained} prompts gained, {change.lost} lost; "
            f"by luck alone: p = {change.p:.2g}"
        )
    return titled(title, table, "", *(Text(note, style="dim") for note in notes))


def score_rows(scores: Scores) -> dict[str, str]:
    rows = {
        "right": str(scores.accuracy),
        "well-formed": str(scores.formed),
        "right if formed": str(scores.accuracy_formed),
        "cut off": f"{scores.truncated.value:.1%}",
        "mean reward": f"{scores.mean_reward:.3f}",
        "mean length": f"{scores.mean_tokens:.1f} tokens",
    }
    rows |= {f"pass@{k}": f"{value:.1%}" for k, value in scores.pass_at.items() if k > 1}
    if scores.majority is not None:
        rows["most samples right"] = f"{scores.majority:.1%}"
    return rows


def times_table(seconds: Mapping[str, float]) -> RenderableType:
    table = plain_table("")
    for name, value in seconds.items():
        table.add_row(name, duration(value))
    table.add_row("in all", duration(sum(seconds.values())))
    return titled("how long it took", table)


def answer_panel(answer: Mapping[str, Any], title: str) -> Panel:
    """Show a question, the model's answer and its reward. Texts are shown as they are, never read as markup."""
    question = answer["prompt"] if "messages" not in answer else answer["messages"][-1]["content"]
    answer_text = printable(str(answer["text"]))
    answer_text = answer_text if len(answer_text) <= LONGEST_TEXT else answer_text[:LONGEST_TEXT] + " ..."
    judged = "right" if answer["solved"] else "wrong" if answer["formed"] else "not in the form"
    end = ", cut off at the limit" if answer["finish"] == "length" else ""
    earned = "unknown" if answer["reward"] is None else f"{answer['reward']:g}"
    target = f", target {target_of(answer['target'])}" if answer["target"] not in (None, {}) else ""
    body = Text.assemble(
        (printable(str(question)).strip(), "dim"),
        ("\n→ ", "bold"),
        answer_text.strip() or "(nothing)",
        (f"\n{judged}: reward {earned}{target}{end}", "italic"),
    )
    return Panel(body, title=title, title_align="left", border_style="green" if answer["solved"] else "red", width=100)


def target_of(target: Any) -> Any:
    """Return the right answer of a target; the rest of it (a worked solution, say) is for the grader."""
    return target["answer"] if isinstance(target, Mapping) and "answer" in target else target


def plan_table(plan: Plan) -> RenderableType:
    """Show the lines of a memory plan, the largest marked, and what was chosen, or what to change."""
    table = plain_table("GB", "when", "what it is")
    largest = max(line.bytes for line in plan.lines)
    for line in plan.lines:
        style = "bold" if line.bytes == largest else ""
        table.add_row(line.name, gigabytes(line.bytes), line.when, line.about, style=style)
    for name, value in {"rollout": plan.at("rollout"), "update": plan.at("update")}.items():
        table.add_row(Text(f"in all, {name}"), gigabytes(value), "", "")
    table.add_row("may take", gigabytes(plan.room), "", "nine tenths of what is there for it")
    recompute = "recomputed" if plan.recompute else "kept"
    chosen = (
        f"{plan.tokens_per_pass} tokens per pass (the longest has {plan.pass_tokens}), activations {recompute}, "
        f"{plan.rows} rows sampled side by side; prompts of up to {plan.prompt} tokens"
    )
    if plan.fits:
        ends = [Text(chosen), Text("it fits", style="bold green")]
    else:
        turns = "\n".join(f"  {sentence}" for sentence in plan.advice)
        program = plan.line("program")
        told = (
            f"No knob helps: the program alone takes {program / 1e9:.2f} GB. Take a larger device."
            if program > plan.room
            else f"What to turn, the most helpful first:\n{turns}"
        )
        told += f"\n{more_at('it-does-not-fit-into-memory')}"
        ends = [Text("it does not fit", style="bold red"), Text(told)]
    return titled(f"memory on {plan.device}, {plan.dtype}", table, "", *ends)


def gigabytes(count: int) -> Text:
    return Text(f"{count / 1e9:.2f}", justify="right")
