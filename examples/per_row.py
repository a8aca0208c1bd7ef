"""minigrpo train quickstart --task.name examples/per_row.py:score"""

system = "Reason in <think></think>, then answer in <answer></answer>."
story = "Mia has {} apples, buys {} and gives 2 away. How many apples are left?"
rows = [{"prompt": story.format(a, b), "answer": str(a + b - 2)} for a in range(11, 60) for b in range(3, 10)]


def score(completion, answer):
    return completion.split("<answer>")[-1].removesuffix("</answer>") == answer
