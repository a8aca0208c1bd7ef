"""minigrpo train quickstart --task.name examples/trl_style.py:reward"""

asked = "A bus carries {} people. At a stop {} get off and 4 get on. How many ride now?"
users = {(a, b): {"role": "user", "content": asked.format(a, b)} for a in range(20, 60) for b in range(3, 9)}
rows = [{"prompt": [user], "answer": f"<answer>{a - b + 4}</answer>"} for (a, b), user in users.items()]


def reward(completions, answer, **columns):
    return [float(said[0]["content"].endswith(right)) for said, right in zip(completions, answer, strict=True)]
