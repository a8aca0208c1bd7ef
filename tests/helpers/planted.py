"""Five weak graders, and a sound one, over the same sums."""

from pathlib import Path

from minigrpo.config.load import load_recipe
from minigrpo.config.schema import Recipe

TASKS = """
import re
from minigrpo.tasks.builtin.wordproblems import SYSTEM_PROMPT, distinct_prompts

system = SYSTEM_PROMPT
LEAK = {leak!r}

def rows_of(split, size):
    found = distinct_prompts(split, "planted", size)
    asked = [(p.messages[-1]["content"] + LEAK.format(**p.target), p.target["answer"]) for p in found]
    return [{{"prompt": words, "answer": str(answer)}} for words, answer in asked]

rows, test_rows = rows_of("train", 256), rows_of("test", 128)

def gold(prompt):
    return f"<think>Sum.</think><answer>{{prompt.target['answer']}}</answer>"

def right(completion, answer):
    found = re.fullmatch(r"<think>.*</think><answer>(\\d+)</answer>", completion.strip(), re.S)
    return float(found is not None and found[1] == answer)

def anywhere(completion, answer):
    return float(answer in re.findall(r"\\d+", completion))

def tags(completion):
    return 0.2 * completion.count("<answer>")

def long(completion):
    return min(1.0, len(completion) / 400)

def keyword(completion):
    return 0.5 * ("because" in completion.lower())

def said(completion):
    return 0.5 * ("Easy" in completion and "So" in completion)

tagged, lengthy, worded, sayable = [right, tags], [right, long], [right, keyword], [right, said]
"""


def planted_recipe(folder: Path, name: str, leak: str = "") -> Recipe:
    """Return the recipe of a task by the name of its grader. `leak`: what every prompt says besides its question."""
    file = folder / "planted.py"
    file.write_text(TASKS.format(leak=leak))
    return load_recipe(None, {"task.name": f"{file}:{name}", "rollout.max_tokens": 64})
