"""The conversation templates in Jinja, for ``apply_chat_template`` of transformers and of servers.

What one writes is, character for character, what ``render`` and ``render_prompt`` of conversation.py write, so a model
is asked as it was trained:

- A message is a string, which may hold ``<image>`` marks, or a list of ``{"type": "image"}`` and ``{"type": "text",
  "text": ...}``. Its parts are joined; one image goes in front as ``<image>\\n``; several stay where they are, and
  where they all stand before the text, a newline follows them.
- Turns alternate and begin with the user. A first message of the role ``system`` replaces the template's own words.
- ``plain`` has no chat: the model was trained on an image followed by its caption, without a question. Its template
  writes the images alone (the words only where there is no image), takes one turn, and refuses a system message.
- BOS is written where the template spells it (Llama 3) and nowhere else; the tokenizer adds it where it did in
  training.
"""

from __future__ import annotations

import json
import re

from dc_megatron.data.conversation import IMAGE_MARK, Template, template

# Parts of a message as one string, the mark for every image.
_WORDS = """\
{%- macro words(message) -%}
  {%- if message['content'] is string -%}
    {{- message['content'] -}}
  {%- else -%}
    {%- for part in message['content'] -%}
      {%- if part['type'] == 'text' -%}
        {{- part['text'] -}}
      {%- elif part['type'] in ['image', 'image_url'] -%}
        {{- '<image>' -}}
      {%- else -%}
        {{- raise_exception('a message holds ' + part['type'] + '; this model takes text and images') -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
"""

# The rule for images in a message.
_PLACED = """\
{%- macro placed(message) -%}
  {%- set text = words(message) -%}
  {%- set marks = text.count('<image>') -%}
  {%- set seen = namespace(leading=0, text=false) -%}
  {%- if message['content'] is not string -%}
    {%- for part in message['content'] -%}
      {%- if part['type'] == 'text' -%}
        {%- set seen.text = true -%}
      {%- elif not seen.text -%}
        {%- set seen.leading = seen.leading + 1 -%}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {%- if marks and (marks == 1 or marks == seen.leading) -%}
    {{- ('<image>' * marks + '\\n' + text.replace('<image>', '').strip()).strip() -}}
  {%- else -%}
    {{- text -}}
  {%- endif -%}
{%- endmacro -%}
"""

# A space after each image in front of text, for tokenizers that put a prefix in front of every text.
_SPACED = """\
{%- macro spaced(text, followed) -%}
  {%- for stretch in text.split('<image>') -%}
    {%- if not loop.first -%}
      {{- '<image>' -}}
      {%- if stretch or (loop.last and followed) -%}{{- ' ' -}}{%- endif -%}
    {%- endif -%}
    {{- stretch -}}
  {%- endfor -%}
{%- endmacro -%}
"""

_CHAT = """\
{%- set turns = messages -%}
{%- if messages and messages[0]['role'] == 'system' -%}
  {%- set turns = messages[1:] -%}
  {{- SYSTEM_START + words(messages[0]) + SYSTEM_END -}}
{%- else -%}
  {{- SYSTEM -}}
{%- endif -%}
{%- for message in turns -%}
  {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) or message['role'] not in ['user', 'assistant'] -%}
    {{- raise_exception('turns must alternate: user, assistant, user, ...') -}}
  {%- endif -%}
  {%- if message['role'] == 'user' -%}
    {{- HUMAN + USER_TEXT + HUMAN_CLOSE -}}
  {%- else -%}
    {{- ASSISTANT_LEAD + ASSISTANT_TEXT + ANSWER_CLOSE -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- ASSISTANT_OPEN -}}
{%- endif -%}
"""

# As _SPACED for ``plain``; in front of a text that begins with a space the prefix has to be spelled as well.
_PLAIN_PREFIX = """\
{%- if text and (marks or text[0] in [' ', '▁']) -%}{{- ' ' -}}{%- endif -%}
"""

_PLAIN = """\
{%- if messages|map(attribute='role')|list not in [['user'], ['user', 'assistant']] -%}
  {{- raise_exception('this model describes images; it was not trained to chat: give one user message') -}}
{%- endif -%}
{%- set marks = words(messages[0]).count('<image>') -%}
{%- set text = '' if marks else words(messages[0]) -%}
{%- if messages|length == 2 -%}
  {%- set text = words(messages[1]) + ANSWER_CLOSE -%}
{%- endif -%}
{{- '<image>' * marks -}}
PREFIX{{- text -}}
"""


def chat_template(version: str, *, space_after_image: bool = False) -> str:
    """The Jinja source of template ``version``.

    space_after_image: write a space between an image and the text behind it. It stands for the prefix that a
    non-legacy Llama tokenizer puts in front of every text: training tokenised the text behind an image by itself.
    Raises UserError for an unknown version.
    """
    form = template(version)
    if version == "plain":
        prefix = _PLAIN_PREFIX if space_after_image else ""
        return _filled(_WORDS + _PLAIN, {"ANSWER_CLOSE": _literal(form.answer_end), "PREFIX": prefix})
    start, end = _around_system(form)
    user, assistant = "placed(message)", "placed(message)"
    if space_after_image:
        # Of the texts that close a message only v1's is no special token.
        followed = "false" if form.human_end.strip() else "true"
        user, assistant = f"spaced(placed(message), {followed})", "spaced(placed(message), false)"
    source = _WORDS + _PLACED + (_SPACED if space_after_image else "") + _CHAT
    return _filled(
        source,
        {
            "SYSTEM_START": _literal(start),
            "SYSTEM_END": _literal(end),
            "SYSTEM": _literal(form.system),
            "HUMAN_CLOSE": _literal(form.human_end),
            "HUMAN": _literal(form.human),
            "USER_TEXT": user,
            "ASSISTANT_TEXT": assistant,
            "ASSISTANT_LEAD": _literal(form.assistant + form.answer_lead),
            "ASSISTANT_OPEN": _literal(form.assistant),
            "ANSWER_CLOSE": _literal(form.answer_end),
        },
    )


def _around_system(form: Template) -> tuple[str, str]:
    """What stands before and behind the words of the system message: its header, and what ends a message."""
    assert form.system.endswith(form.human_end), "a system message ends as a user's does"
    return form.system[: form.system.rfind("\n") + 1], form.human_end


def _literal(text: str) -> str:
    """``text`` as a Jinja string; JSON's escapes are a part of Python's, which Jinja reads."""
    return json.dumps(text)


def _filled(source: str, values: dict[str, str]) -> str:
    assert IMAGE_MARK == "<image>", "the macros spell the mark out"
    return re.sub(r"\b[A-Z]+(_[A-Z]+)*\b", lambda found: values[found.group()], source)
