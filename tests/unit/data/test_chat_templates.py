"""What the Jinja templates write is what ``render`` and ``render_prompt`` write."""

import jinja2
import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from dc_megatron.config import TEMPLATES
from dc_megatron.data.chat_templates import chat_template
from dc_megatron.data.conversation import render, render_prompt
from dc_megatron.errors import UserError
from tests.helpers.data_files import conversation

CHATS = [version for version in TEMPLATES if version != "plain"]
IMAGE = {"type": "image"}


def words(text):
    return {"type": "text", "text": text}


def user(*parts):
    return {"role": "user", "content": parts[0] if len(parts) == 1 and isinstance(parts[0], str) else list(parts)}


def assistant(text):
    return {"role": "assistant", "content": [words(text)]}


def written(version, messages, *, prompt=False, **options):
    source = chat_template(version, **options)
    return render_jinja_template(conversations=[messages], chat_template=source, add_generation_prompt=prompt)[0][0]


QUESTIONS = ["What is it?", "  edges \n", "", "one\n\ntwo", "quotes \" ' \\ {{ x }} {% if %} é☃", "</s> and <|eot_id|>"]


@pytest.mark.parametrize("version", CHATS)
@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("images", [0, 1, 2, 3])
def test_a_question_behind_its_images_is_the_prompt(version, question, images):
    expected = render_prompt(version, question, images)
    assert written(version, [user(*[IMAGE] * images, words(question))], prompt=True) == expected
    if not images:
        assert written(version, [user(question)], prompt=True) == expected


@pytest.mark.parametrize("version", CHATS)
@pytest.mark.parametrize(
    "question",
    [
        "<image>\nWhat?",
        "What?\n<image>",
        " a <image> b ",
        "<image>",
        "<image>\n<image>\nCompare.",
        "<image><image>no newline",
        "first <image>, then <image>",
    ],
)
def test_marks_in_the_text_follow_the_rule_of_training(version, question):
    expected = render_prompt(version, question, question.count("<image>"))
    assert written(version, [user(question)], prompt=True) == expected
    # The same as parts, unless all images lead: parts then mean a question without marks.
    stretches = question.split("<image>")
    parts = [words(stretches[0])] if stretches[0] else []
    for stretch in stretches[1:]:
        parts += [IMAGE, words(stretch)] if stretch else [IMAGE]
    if question != "<image><image>no newline":
        assert written(version, [user(*parts)], prompt=True) == expected


@pytest.mark.parametrize("version", CHATS)
def test_a_conversation_with_history(version):
    turns = ["<image>\nWhat is it?", "A red circle.", "And\nthere?", " at the top ", "Why?", "", "So?"]
    messages = [user(IMAGE, words("What is it?")), assistant(turns[1]), user(turns[2]), assistant(turns[3])]
    messages += [user(turns[4]), assistant(turns[5])]
    assert written(version, messages) == render(version, conversation(*turns[:6])).text
    prompt = written(version, [*messages, user(words(turns[6]))], prompt=True)
    answered = render(version, conversation(*turns, "yes")).text
    assert answered.startswith(prompt)
    assert answered[len(prompt) :].strip().startswith("yes")


def test_a_system_message_takes_the_place_of_the_templates_words():
    message = {"role": "system", "content": "Be brief."}
    assert written("v1", [message, user("Hi")], prompt=True) == "Be brief. USER: Hi ASSISTANT:"
    message = {"role": "system", "content": [words("Be brief.")]}
    assert (
        written("mpt", [message, user("Hi")]) == "<|im_start|>system\nBe brief.<|im_end|><|im_start|>user\nHi<|im_end|>"
    )
    llama = written("llama_3", [message, user("Hi")])
    assert llama == render_prompt("llama_3", "Hi").replace(
        "You are a helpful language and vision assistant. You are able to understand the visual content that the user"
        " provides, and assist the user with a variety of tasks using natural language.",
        "Be brief.",
    ).removesuffix("<|start_header_id|>system<|end_header_id|>\n\n")


def test_plain_writes_the_images_alone():
    assert written("plain", [user(IMAGE, words("Describe it."))], prompt=True) == "<image>"
    assert written("plain", [user("<image> and <image>")], prompt=True) == render_prompt("plain", "x", 2)
    assert written("plain", [user("A red")], prompt=True) == render_prompt("plain", "A red")
    pair = [user(IMAGE, words("Describe it.")), assistant("A red circle.")]
    assert written("plain", pair) == render("plain", conversation("<image>\nDescribe it.", "A red circle.")).text


@pytest.mark.parametrize(
    ("version", "messages", "reason"),
    [
        ("v1", [assistant("Hi")], "alternate"),
        ("v1", [user("Hi"), user("Hi")], "alternate"),
        ("mpt", [user("Hi"), {"role": "tool", "content": "x"}], "alternate"),
        ("v1", [user({"type": "video"})], "holds video"),
        ("plain", [user("Hi"), assistant("x"), user("Hi")], "not trained to chat"),
        ("plain", [{"role": "system", "content": "x"}, user("Hi")], "not trained to chat"),
    ],
)
def test_what_training_never_saw_is_refused(version, messages, reason):
    with pytest.raises(jinja2.TemplateError, match=reason):
        written(version, messages)


def test_a_space_after_an_image_stands_for_the_prefix_of_its_text():
    def spaced(version, *messages):
        opening = "" if version == "plain" else written(version, [])
        return written(version, list(messages), space_after_image=True).removeprefix(opening)

    assert spaced("v1", user(IMAGE, words("a"))) == "USER: <image> \na "
    assert spaced("v1", user(IMAGE)) == "USER: <image>  "
    assert spaced("v1", user("<image><image> <image>")) == "USER: <image><image>  <image>  "
    assert spaced("mpt", user("b<image>a<image>")) == "<|im_start|>user\nb<image> a<image><|im_end|>"
    assert spaced("plain", user(IMAGE), assistant("a")) == "<image> a\n"
    assert spaced("plain", user(" a")) == "  a"


def test_an_unknown_template_is_refused():
    with pytest.raises(UserError, match="did you mean 'llama_3'"):
        chat_template("llama3")
