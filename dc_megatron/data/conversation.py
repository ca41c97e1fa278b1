"""Conversation templates: messages to one text, with the character spans that the model must learn to say.

Texts and separators are those of the original's ``conversation.py`` (DenseConnector on LLaVA 1.5), because released
weights were trained on exactly these characters. ``llama_3`` keeps the original's assistant header, whose role reads
``system``; ``llama_3_chat`` has the corrected one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dc_megatron.config import TEMPLATES, one_of
from dc_megatron.data.faults import RecordFault
from dc_megatron.errors import UserError

IMAGE_MARK = "<image>"


@dataclass(frozen=True)
class Template:
    """The fixed texts around messages.

    ``answer_lead`` stands between the assistant's header and the answer and belongs to the target: in v1 and phi the
    space after ``ASSISTANT:`` is part of the answer's first token.
    """

    system: str
    human: str
    human_end: str
    assistant: str
    answer_lead: str
    answer_end: str


@dataclass(frozen=True)
class Rendered:
    """A whole conversation as text; ``targets`` are its (start, end) character spans with a label, in order."""

    text: str
    targets: tuple[tuple[int, int], ...]

    @property
    def image_count(self) -> int:
        return self.text.count(IMAGE_MARK)


def _llama_3(assistant_role: str) -> Template:
    def header(role: str) -> str:
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n"

    end = "<|eot_id|>"
    system = (
        "You are a helpful language and vision assistant. You are able to understand the visual content that the user"
        " provides, and assist the user with a variety of tasks using natural language."
    )
    return Template(
        system=f"<|begin_of_text|>{header('system')}{system}{end}",
        human=header("user"),
        human_end=end,
        assistant=header(assistant_role),
        answer_lead="",
        answer_end=end,
    )


def _chatml(system: str) -> Template:
    end = "<|im_end|>"
    return Template(
        system=f"<|im_start|>system\n{system}{end}",
        human="<|im_start|>user\n",
        human_end=end,
        assistant="<|im_start|>assistant\n",
        answer_lead="",
        answer_end=end,
    )


def _two_roles(end: str) -> Template:
    """Vicuna's form; ``end`` closes an answer."""
    return Template(
        system=(
            "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful,"
            " detailed, and polite answers to the user's questions. "
        ),
        human="USER: ",
        human_end=" ",
        assistant="ASSISTANT:",
        answer_lead=" ",
        answer_end=end,
    )


_TEMPLATES = {
    "plain": Template(system="", human="", human_end="", assistant="", answer_lead="", answer_end="\n"),
    "v1": _two_roles("</s>"),
    "phi": _two_roles("<|endoftext|>"),
    "llama_3": _llama_3("system"),
    "llama_3_chat": _llama_3("assistant"),
    "mpt": _chatml(
        "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
    ),
    "chatml_direct": _chatml("Answer the questions."),
}


def template(version: str) -> Template:
    """The template of ``--version``; a UserError names the nearest known one."""
    return _TEMPLATES[one_of(version, TEMPLATES, "--version")]


def stop_text(version: str) -> str:
    """The text that ends an answer: a special token of the tokenizer, a newline for ``plain``."""
    return template(version).answer_end


def place_image(text: str) -> str:
    """A message with exactly one ``<image>`` gets it in front as ``<image>\\n``; others stay as they are."""
    if text.count(IMAGE_MARK) != 1:
        return text
    return f"{IMAGE_MARK}\n{text.replace(IMAGE_MARK, '').strip()}".strip()


def render(version: str, messages: Sequence[dict]) -> Rendered:
    """Render the ``conversations`` of a LLaVA record.

    messages: objects with ``from`` (human or gpt) and ``value``. A first message that is not human is skipped; then
    human and gpt must alternate. Raises RecordFault for messages that cannot be rendered.
    """
    form = template(version)
    if version == "plain":
        return _render_plain(form, messages)
    if messages and isinstance(messages[0], dict) and messages[0].get("from") != "human":
        messages = messages[1:]
    text, targets = form.system, []
    for value, is_human in _alternating(messages):
        if is_human:
            text += form.human + place_image(value) + form.human_end
        else:
            text += form.assistant
            start = len(text)
            text += form.answer_lead + place_image(value) + form.answer_end
            # A blank answer would teach only to stop at once.
            if value.strip():
                targets.append((start, len(text)))
    return _with_targets(text, targets)


def render_prompt(version: str, question: str, image_count: int = 0) -> str:
    """The prompt of one question, ending in an open assistant turn.

    ``<image>`` marks in the question stay where they are and must be ``image_count``; a question without marks gets
    them in front. ``plain`` was trained without the human's words, so with images its prompt is the images alone, and
    the question is used only where there is no image.
    """
    form = template(version)
    marks = question.count(IMAGE_MARK)
    if marks not in (0, image_count):
        raise UserError(f"--prompt has {marks} {IMAGE_MARK} marks and {image_count} images were given; make them equal")
    if version == "plain":
        return IMAGE_MARK * image_count or question
    if marks == 0 and image_count:
        question = f"{IMAGE_MARK * image_count}\n{question.strip()}".strip()
    return form.system + form.human + place_image(question) + form.human_end + form.assistant


def _render_plain(form: Template, messages: Sequence[dict]) -> Rendered:
    if len(messages) != 2:
        raise RecordFault(RecordFault.STRUCTURE, f"plain takes exactly two messages, this record has {len(messages)}")
    (question, _), (caption, _) = _alternating(messages)
    text = IMAGE_MARK * question.count(IMAGE_MARK)
    start = len(text)
    text += caption + form.answer_end
    return _with_targets(text, [(start, len(text))] if caption.strip() else [])


def _alternating(messages: Sequence[dict]) -> list[tuple[str, bool]]:
    """(text, is human) of every message, checked to go human, gpt, human, ..."""
    checked = []
    for number, message in enumerate(messages):
        expected = "human" if number % 2 == 0 else "gpt"
        if not isinstance(message, dict) or not isinstance(message.get("value"), str):
            raise RecordFault(RecordFault.STRUCTURE, f"message {number} is not an object with from and a text value")
        if message.get("from") != expected:
            raise RecordFault(
                RecordFault.STRUCTURE, f"message {number} is from {message.get('from')!r} where {expected!r} is due"
            )
        checked.append((message["value"], number % 2 == 0))
    return checked


def _with_targets(text: str, targets: list[tuple[int, int]]) -> Rendered:
    if not targets:
        raise RecordFault(RecordFault.NO_TARGET, "no answer with text in it")
    return Rendered(text, tuple(targets))
