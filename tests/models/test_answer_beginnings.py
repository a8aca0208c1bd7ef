"""What a prompt begins of its answer: assistant messages that are continued, tags that a template opens, and system
messages that a template refuses."""

from types import SimpleNamespace

import pytest

from minigrpo.config.schema import Recipe
from minigrpo.errors import ModelError
from minigrpo.models.chat_template import after_opening, check_tokenizer, opening, render, render_ids
from minigrpo.rollouts.engines.scripted import Scripted
from minigrpo.rollouts.groups import rollout
from minigrpo.tasks.builtin import gsm8k, wordproblems
from minigrpo.tasks.custom.reward_task import reward_task
from minigrpo.training.sft_warmup import WrittenAnswer, tokenize_answers, whole_answers
from minigrpo.types import Prompt, Sampling
from tests.helpers.tiny import TEMPLATE, build_model

QUESTION = {"role": "user", "content": "What is 2 + 2?"}
SYSTEM = {"role": "system", "content": "Be brief."}
R1 = TEMPLATE.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
QWEN_THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
REFUSALS = {
    "raises on the role": "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}",
    "raises on any other role": "{% for m in messages if m.role not in ['user', 'assistant'] %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endfor %}",
    "wants user and assistant in turn": "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}",
    "leaves it out": "{% set messages = messages | rejectattr('role', 'equalto', 'system') | list %}",
}


def conversation(*messages):
    return Prompt("p", tuple(messages))


def begun_with(words):
    return conversation(QUESTION, {"role": "assistant", "content": words})


@pytest.mark.parametrize("words", ["The answer is", "<think>\n", "```python\ndef f(n):", "", 'Sure: {"answer": '])
def test_an_assistant_message_at_the_end_is_continued(tokenizer, words):
    text = tokenizer.decode(render(tokenizer, begun_with(words)).ids)
    assert text == f"<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n{words}"


def test_a_conversation_is_rendered_as_trl_renders_it(make_tokenizer):
    from trl.data_utils import apply_chat_template

    for template in (TEMPLATE, R1, QWEN_THINKING):
        tokenizer = make_tokenizer(template)
        for asked in (begun_with("It is"), begun_with("<think>\nTwo"), conversation(SYSTEM, QUESTION)):
            theirs = apply_chat_template({"prompt": [dict(m) for m in asked.messages]}, tokenizer)["prompt"]
            assert tokenizer.decode(render(tokenizer, asked).ids) == theirs


def test_a_template_that_drops_the_words_to_continue_is_a_sentence(make_tokenizer):
    deaf = TEMPLATE.replace("{{ message['content'] }}", "{{ message['content'] if message.role == 'user' else '' }}")
    with pytest.raises(ModelError, match="Prompt p ends with the assistant's words, which the chat template"):
        render(make_tokenizer(deaf), begun_with("The answer is"))


@pytest.mark.parametrize(
    ("template", "tag"),
    [
        (R1, "<think>"),
        (QWEN_THINKING, "<think>"),
        *((R1.replace("<think>", tag), tag) for tag in ("<reasoning>", "<seed:think>")),
    ],
)
def test_a_tag_that_the_template_opens_begins_the_answer(make_tokenizer, template, tag):
    assert opening(make_tokenizer(template), conversation(SYSTEM, QUESTION)) == f"{tag}\n"


@pytest.mark.parametrize(
    "template",
    [
        TEMPLATE,
        R1.replace("<think>\n{% endif", "<think>\n\n</think>\n\n{% endif"),  # a model told not to think
        TEMPLATE.replace("<|im_start|>{{ message['role'] }}\n", "<{{ message['role'] }}>").replace(
            "<|im_start|>assistant\n", "<assistant>"
        ),
    ],
    ids=["nothing", "a closed block", "a header that looks like a tag"],
)
def test_what_is_no_open_tag_begins_no_answer(make_tokenizer, template):
    assert opening(make_tokenizer(template), conversation(QUESTION)) == ""


def test_words_to_continue_count_where_they_have_a_form(tokenizer):
    said = ["<think>\nTwo and", "```python\n", "<think>a</think>\n<answer>", "The answer is ", "2 < 3 >"]
    assert [opening(tokenizer, begun_with(words)) for words in said] == [*said[:3], "", ""]


@pytest.mark.parametrize("build", [wordproblems.wordproblems_task, gsm8k.gsm8k_task])
def test_a_right_answer_in_a_think_block_that_the_template_opened_is_solved(make_tokenizer, build):
    task = build(Recipe.model_validate({"task": {"size": 20, "data": "wordproblems:"}}))
    tokenizer, asked = make_tokenizer(R1), task.prompts("train")[:1]
    said = after_opening("<think>\n", task.gold(asked[0]))
    assert not said.startswith("<think>")
    engine = Scripted([said], tokenizer)
    (group,) = rollout(engine, task, asked, n=1, sampling=Sampling(), tokenizer=tokenizer)
    assert group.grades[0].solved
    assert group.grades[0].formed
    assert group.completions[0].text == said


def test_functions_of_one_completion_read_its_form_and_those_of_trl_what_was_generated(make_tokenizer):
    seen = {}

    def row(completion):
        seen["row"] = completion
        return float(completion.startswith("<think>"))

    def batch(completions, **columns):
        seen["batch"] = completions
        return [0.0 for _ in completions]

    task = reward_task(row, batch, rows=[{"prompt": "a"}, {"prompt": "b"}])
    asked = task.prompts("train")
    tokenizer = make_tokenizer(R1)
    engine = Scripted(["x</think>4"], tokenizer)
    (group,) = rollout(engine, task, asked, n=1, sampling=Sampling(), tokenizer=tokenizer)
    assert seen == {"row": "<think>\nx</think>4", "batch": ["x</think>4"]}
    assert group.grades[0].solved


def test_a_written_answer_is_taught_without_what_the_prompt_began():
    assert after_opening("<think>\n", "<think>1+1") == "1+1"
    assert after_opening("<think>\n", "<think>\n1+1") == "1+1"
    assert after_opening("<think>\n", "1+1") == "1+1"
    assert after_opening("", "<think>1+1") == "<think>1+1"


@pytest.mark.parametrize("refusal", REFUSALS.values(), ids=REFUSALS)
def test_a_refused_system_message_goes_before_the_first_question(make_tokenizer, refusal):
    tokenizer = make_tokenizer(refusal + TEMPLATE)
    joined = {"role": "user", "content": "Be brief.\n\nWhat is 2 + 2?"}
    more = ({"role": "assistant", "content": "4"}, {"role": "user", "content": "And 3?"})
    assert render_ids(tokenizer, [SYSTEM, QUESTION]) == render_ids(tokenizer, [joined])
    assert render_ids(tokenizer, [SYSTEM, QUESTION, *more]) == render_ids(tokenizer, [joined, *more])
    assert render_ids(tokenizer, [{**SYSTEM, "content": ""}, QUESTION]) == render_ids(tokenizer, [QUESTION])
    (warning,) = check_tokenizer(tokenizer)
    assert "refuses the system role" in warning


def test_a_template_that_needs_a_system_message_names_the_prompt_that_has_none(make_tokenizer):
    needs = "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}"
    tokenizer = make_tokenizer(needs + TEMPLATE)
    assert check_tokenizer(tokenizer) == ()
    assert render(tokenizer, conversation(SYSTEM, QUESTION)).ids
    with pytest.raises(ModelError, match=r"refuses prompt p \(system first\)"):
        render(tokenizer, conversation(QUESTION))


@pytest.mark.parametrize("broken", ["{{ raise_exception('never') }}", "{% if %}", "{{ messages.none.at.all }}"])
def test_a_template_that_renders_no_question_is_refused(make_tokenizer, broken):
    with pytest.raises(ModelError, match="cannot be used"):
        check_tokenizer(make_tokenizer(broken + TEMPLATE))


def test_a_system_message_that_is_taken_stays_where_it_is(make_tokenizer):
    wants_alternation = "{% if messages[-1].role == 'tool' %}{{ raise_exception('no') }}{% endif %}"
    tokenizer = make_tokenizer(wants_alternation + TEMPLATE)
    assert "system\nBe brief.<|im_end|>" in tokenizer.decode(render_ids(tokenizer, [SYSTEM, QUESTION]))
    assert check_tokenizer(tokenizer) == ()


@pytest.mark.parametrize("written", ["<think>1+1</think>2", "<think>\n1+1</think>2", "1+1</think>2"])
def test_a_warm_up_teaches_what_follows_the_beginning_and_judges_the_whole(make_tokenizer, written):
    tokenizer = make_tokenizer(R1)
    policy = SimpleNamespace(tokenizer=tokenizer, model=build_model("qwen2"))
    answers = [WrittenAnswer(conversation(QUESTION), written, "here", known=True)]
    (lesson,) = tokenize_answers(answers, policy)
    assert tokenizer.decode(lesson.prompt_ids + lesson.answer_ids).endswith("<think>\n1+1</think>2<|im_end|>")
    (whole,) = whole_answers(answers, policy)
    assert whole.answer.startswith("<think>")
    assert whole.answer.count("<think>") == 1
