"""A reward model from a folder, in batches."""

import json
import math

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from minigrpo.config.schema import Recipe, TaskConfig
from minigrpo.errors import TaskError
from minigrpo.rollouts.async_grader import Grader
from minigrpo.tasks.custom.classifier import Classifier
from minigrpo.tasks.custom.reward_task import reward_task
from minigrpo.tasks.registry import open_task
from minigrpo.types import Completion
from tests.helpers.tiny import TEMPLATE, build_tokenizer, tiny_config

ROWS = [{"prompt": f"say {i}"} for i in range(12)]
TEXTS = ("a", "a longer answer", "", "b" * 40, "middle")


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    def make(template=TEMPLATE, **overrides):
        folder = tmp_path_factory.mktemp("models") / "liked"
        torch.manual_seed(0)
        config = tiny_config("qwen2", num_labels=1, **overrides)
        model = AutoModelForSequenceClassification.from_config(config)
        with torch.no_grad():
            model.score.weight.normal_(0.0, 1.0)
        model.save_pretrained(folder)
        build_tokenizer(template).save_pretrained(folder)
        return folder

    return make


def graded(function, rows=ROWS, groups=2, workers=2):
    task = reward_task(function, rows=rows, test_rows=rows)
    with Grader(task, workers=workers) as grader:
        group = tuple(Completion(text, (1,), (0.0,), "stop") for text in TEXTS)
        grades = grader.open_batch(task.prompts("train")[:groups]).collect([group] * groups)
    return task, [[grade.reward for grade in group] for group in grades]


def alone(folder, words):
    """Return what transformers gives for one text, without padding."""
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        return model(build_tokenizer()(*words, return_tensors="pt").input_ids).logits.item()


@pytest.mark.parametrize("batch", [1, 2, 16])
def test_batches_give_what_each_text_gives_alone(reward_model, batch):
    folder = reward_model()
    task, rewards = graded(Classifier(folder, batch=batch))
    for prompt, own in zip(task.prompts("train"), rewards, strict=False):
        for text, reward in zip(TEXTS, own, strict=True):
            turns = [*prompt.messages, {"role": "assistant", "content": text}]
            written = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in turns)
            assert reward == pytest.approx(alone(folder, [written]), abs=1e-5)
    assert len({round(reward, 4) for reward in rewards[0]}) == len(TEXTS)


def test_conversations_and_models_without_a_template_are_read(reward_model):
    chats = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in ROWS]
    assert graded(Classifier(reward_model()), rows=chats)[1] == graded(Classifier(reward_model()))[1]
    folder = reward_model(template=None)
    task, rewards = graded(Classifier(folder), groups=1)
    asked = task.prompts("train")[0].messages[-1]["content"]
    assert rewards[0][1] == pytest.approx(alone(folder, [asked, TEXTS[1]]), abs=1e-5)


def test_texts_beyond_its_context_are_left_out(reward_model):
    _, rewards = graded(Classifier(reward_model(max_position_embeddings=60)), groups=1)
    assert [math.isnan(reward) for reward in rewards[0]] == [len(text) == 40 for text in TEXTS]
    _, rewards = graded(Classifier(reward_model(), max_tokens=40), groups=1)
    assert [math.isnan(reward) for reward in rewards[0]] == [len(text) >= 15 for text in TEXTS]


def test_a_folder_that_is_no_reward_model_is_refused(reward_model, tiny_folder, tmp_path):
    with pytest.raises(TaskError, match=r"holds no config\.json"):
        Classifier(tmp_path)
    with pytest.raises(TaskError, match=r"no weights for score.weight: it was not trained as a classifier"):
        graded(Classifier(tiny_folder("qwen2")))
    several = AutoModelForSequenceClassification.from_config(tiny_config("qwen2", num_labels=3))
    several.save_pretrained(tmp_path / "several")
    build_tokenizer().save_pretrained(tmp_path / "several")
    with pytest.raises(TaskError, match=r"has 3 outputs. A reward needs one"):
        graded(Classifier(tmp_path / "several"))
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    with pytest.raises(TaskError, match="broken cannot be loaded"):
        graded(Classifier(broken))
    with pytest.raises(TaskError, match="batch=1 or more"):
        Classifier(reward_model(), batch=0)


def test_a_recipe_and_a_file_of_functions_name_it(reward_model, tmp_path):
    folder = reward_model()
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    (tmp_path / "mine.py").write_text(
        f"def short(completion):\n    return 1\n\nboth = [short, 'classifier:{folder}']\n"
    )
    data = f"{tmp_path}/rows.json"
    one = open_task(Recipe(task=TaskConfig(name=f"classifier:{folder}", data=data)))
    two = open_task(Recipe(task=TaskConfig(name=f"{tmp_path}/mine.py:both", data=data, weights={"liked": 2.0})))
    prompt = one.prompts("train")[0]
    worth = one.grade(prompt, "a").reward
    assert two.grade(prompt, "a").parts == {"short": 1.0, "liked": worth}
    assert two.grade(prompt, "a").reward == 1.0 + 2 * worth
