"""Templates against hand-written texts, and what the model must learn to say in each."""

import pytest

from dc_megatron.data.conversation import place_image, render, render_prompt, stop_text
from dc_megatron.data.faults import RecordFault
from dc_megatron.errors import UserError
from tests.helpers.data_files import conversation

VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed,"
    " and polite answers to the user's questions. "
)
LLAMA = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nYou are a helpful language and vision assistant."
    " You are able to understand the visual content that the user provides, and assist the user with a variety of"
    " tasks using natural language.<|eot_id|>"
)
TWO_TURNS = conversation("What is it?\n<image>", "A dog.", "Colour?", "Brown.")


def targets(version, messages):
    rendered = render(version, messages)
    return [rendered.text[start:end] for start, end in rendered.targets]


@pytest.mark.parametrize(("version", "end"), [("v1", "</s>"), ("phi", "<|endoftext|>")])
def test_two_roles(version, end):
    text = VICUNA + f"USER: <image>\nWhat is it? ASSISTANT: A dog.{end}USER: Colour? ASSISTANT: Brown.{end}"
    assert render(version, TWO_TURNS).text == text
    assert targets(version, TWO_TURNS) == [f" A dog.{end}", f" Brown.{end}"]


@pytest.mark.parametrize(("version", "role"), [("llama_3", "system"), ("llama_3_chat", "assistant")])
def test_llama_3(version, role):
    user = "<|start_header_id|>user<|end_header_id|>\n\n"
    answer = f"<|start_header_id|>{role}<|end_header_id|>\n\n"
    text = (
        f"{LLAMA}{user}<image>\nWhat is it?<|eot_id|>{answer}A dog.<|eot_id|>"
        f"{user}Colour?<|eot_id|>{answer}Brown.<|eot_id|>"
    )
    assert render(version, TWO_TURNS).text == text
    assert targets(version, TWO_TURNS) == ["A dog.<|eot_id|>", "Brown.<|eot_id|>"]


@pytest.mark.parametrize(
    ("version", "system"),
    [
        ("chatml_direct", "Answer the questions."),
        (
            "mpt",
            "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest"
            " answers.",
        ),
    ],
)
def test_chatml(version, system):
    text = (
        f"<|im_start|>system\n{system}<|im_end|><|im_start|>user\n<image>\nWhat is it?<|im_end|>"
        "<|im_start|>assistant\nA dog.<|im_end|><|im_start|>user\nColour?<|im_end|>"
        "<|im_start|>assistant\nBrown.<|im_end|>"
    )
    assert render(version, TWO_TURNS).text == text
    assert targets(version, TWO_TURNS) == ["A dog.<|im_end|>", "Brown.<|im_end|>"]


def test_plain_drops_the_question_and_ends_in_a_newline():
    messages = conversation("Describe it.\n<image>", "a dog on grass")
    assert render("plain", messages).text == "<image>a dog on grass\n"
    assert targets("plain", messages) == ["a dog on grass\n"]


def test_plain_wants_exactly_two_messages():
    with pytest.raises(RecordFault, match="exactly two messages") as caught:
        render("plain", TWO_TURNS)
    assert caught.value.reason == RecordFault.STRUCTURE


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("What is it?\n<image>", "<image>\nWhat is it?"),
        ("  see <image> there ", "<image>\nsee  there"),
        ("<image>", "<image>"),
        ("<image> or <image>?", "<image> or <image>?"),
        ("  no picture ", "  no picture "),
    ],
)
def test_a_single_image_moves_to_the_front(before, after):
    assert place_image(before) == after


def test_a_first_message_that_is_not_human_is_skipped():
    messages = [{"from": "gpt", "value": "Hello, I am here."}, *conversation("Hi", "Hello")]
    assert render("v1", messages).text == render("v1", conversation("Hi", "Hello")).text


def test_blank_answers_are_no_targets():
    assert targets("v1", conversation("a", " ", "b", "yes")) == [" yes</s>"]
    with pytest.raises(RecordFault) as caught:
        render("v1", conversation("a", ""))
    assert caught.value.reason == RecordFault.NO_TARGET


@pytest.mark.parametrize(
    "messages",
    [
        [{"from": "human", "value": "a"}, {"from": "human", "value": "b"}],
        [{"from": "human", "value": "a"}, {"from": "gpt", "value": 3}],
        [{"from": "human", "value": "a"}, "b"],
    ],
)
def test_messages_that_do_not_alternate_are_faults(messages):
    with pytest.raises(RecordFault) as caught:
        render("v1", messages)
    assert caught.value.reason == RecordFault.STRUCTURE


@pytest.mark.parametrize("version", ["v1", "phi", "llama_3", "llama_3_chat", "mpt", "chatml_direct"])
def test_a_prompt_is_the_beginning_of_the_training_text(version):
    text = render(version, conversation("<image>\nWhat is it?", "A dog.")).text
    prompt = render_prompt(version, "What is it?", 1)
    assert text.startswith(prompt)
    assert text[len(prompt) :].strip() == "A dog." + stop_text(version)


def test_prompts_with_marks_of_their_own_and_plain():
    assert render_prompt("plain", "ignored", 2) == "<image><image>"
    assert render_prompt("plain", "Once upon", 0) == "Once upon"
    assert "USER: <image> or <image>? ASSISTANT:" in render_prompt("v1", "<image> or <image>?", 2)
    with pytest.raises(UserError, match="1 <image> marks and 2 images"):
        render_prompt("v1", "<image> what?", 2)


def test_an_unknown_version_is_refused_with_the_nearest():
    with pytest.raises(UserError, match="llama_3"):
        render("llama3", TWO_TURNS)
