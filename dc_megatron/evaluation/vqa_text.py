"""Answers made comparable as the VQA challenge does it: the processing behind TextVQA's accuracy.

The steps are those of the evaluator that the original uses (``EvalAIAnswerProcessor`` of MMF's ``m4c_evaluators``), its
oddities with them: scores are only comparable if everybody counts alike.
"""

from __future__ import annotations

import re

_NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6"}
_NUMBERS |= {"seven": "7", "eight": "8", "nine": "9", "ten": "10"}
_ARTICLES = ("a", "an", "the")
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"(?<=\d),+(?=\d)")
_PERIOD = re.compile(r"\.(?!\d)")
# The evaluator hands a flag to the place of ``count``: so many periods are taken away, and no more.
_PERIODS = 32

# Words that get their apostrophe back. The evaluator's table lists their spellings without it one by one.
_ONE_APOSTROPHE = (
    "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't"
    " it'd it'll ma'am might've mightn't must've mustn't needn't not've o'clock oughtn't shan't should've shouldn't"
    " somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's"
    " they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's"
    " where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've"
)
_TWO_APOSTROPHES = (
    "couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've something'd've"
    " there'd've they'd've we'd've who'd've wouldn't've y'all'll you'd've"
)


def _contractions() -> dict[str, str]:
    table = {word.replace("'", ""): word for word in _ONE_APOSTROPHE.split()}
    for word in _TWO_APOSTROPHES.split():
        start, middle, end = word.split("'")
        table |= {f"{start}{middle}'{end}": word, f"{start}'{middle}{end}": word}
    table |= dict.fromkeys(("yall'd've", "y'alld've", "y'all'dve"), "y'all'd've")
    table |= dict.fromkeys(("ow's'at", "'ows'at", "'ow'sat"), "'ow's'at")
    # The one entry that takes an apostrophe away.
    return {**table, "somebody'd": "somebodyd"}


_CONTRACTIONS = _contractions()


def processed(answer: str) -> str:
    """``answer`` in lower case without articles and most punctuation, numbers up to ten as digits."""
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    words = (_NUMBERS.get(word, word) for word in _without_punctuation(text).lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _without_punctuation(text: str) -> str:
    """Each mark is dropped where it stands beside a space anywhere in the text, and becomes a space elsewhere."""
    numbers = _COMMA_IN_NUMBER.search(text) is not None
    result = text
    for mark in _PUNCTUATION:
        drops = f"{mark} " in text or f" {mark}" in text or numbers
        result = result.replace(mark, "" if drops else " ")
    return _PERIOD.sub("", result, count=_PERIODS)


def vqa_accuracy(prediction: str, answers: list[str]) -> float:
    """Between 0 and 1: a third for every other person who gave this answer, averaged over leaving one person out.

    prediction, answers: as given; both are processed.
    """
    given = [processed(answer) for answer in answers]
    wanted = processed(prediction)
    if wanted not in given:
        return 0.0
    same = given.count(wanted)
    # Those who said it are compared with same - 1 others, the rest with same.
    scores = [min(1.0, (same - (answer == wanted)) / 3) for answer in given]
    return sum(scores) / len(scores)
