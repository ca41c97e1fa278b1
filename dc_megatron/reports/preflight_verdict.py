"""What a preflight's findings mean: what stops a run (refused), what to look at (warning), what to know (note).

Refused is what training refuses by the same settings, and texts that are full of a template's words.
"""

from __future__ import annotations

from dc_megatron.config import DataConfig
from dc_megatron.data.index import IndexSummary
from dc_megatron.reports.words import count, one_line, percent, several

REFUSED, WARNING, NOTE = "refused", "warning", "note"
# A few conversations talk about templates; where this share does, they were written out by one.
MOST_MARKED = 0.1
# A lone failure among a random choice says little about the rate.
_FEW_FAILURES = 2
_WORTH_A_WARNING = ("cmyk", "exif_rotated", "one_pixel", "tiny", "huge", "animated", "16_bit")


def findings(report: dict, summary: IndexSummary, config: DataConfig, positions: int | None) -> list[dict]:
    """[{"level": REFUSED, WARNING or NOTE, "text"}], the gravest first. positions: the language model's limit."""
    found = [
        *_dropped(report, summary, config),
        *_ids(summary, config),
        *_decoding(report, config),
        *_marks(report),
        *_lengths(report, config, positions),
        *_duplicates(report),
        *_odd(report),
    ]
    order = (REFUSED, WARNING, NOTE)
    return [{"level": level, "text": text} for level, text in sorted(found, key=lambda one: order.index(one[0]))]


def _dropped(report: dict, summary: IndexSummary, config: DataConfig):
    total, limit = report["total"], config.max_bad_sample_rate
    for source in summary.sources:
        if source.records and not source.kept:
            yield REFUSED, f"nothing of {one_line(source.data_path)} can be trained on"
    if not total["dropped"]:
        return
    share = total["dropped"] / max(total["records"], 1)
    reasons = ", ".join(f"{count(number)} x {reason}" for reason, number in total["dropped_by_reason"].items())
    first = report["dropped_records"][0]
    example = f"record {first['record']} ({one_line(first['id'], 40)}): {one_line(first['detail'])}"
    what = f"{count(total['dropped'])} of {several(total['records'], 'record')} ({percent(share)})"
    if share > limit:
        yield REFUSED, f"{what} cannot be used, more than --max-bad-sample-rate {limit:g}: {reasons}; e.g. {example}"
    else:
        yield WARNING, f"{what} cannot be used and will be dropped: {reasons}; e.g. {example}"


def _ids(summary: IndexSummary, config: DataConfig):
    if 0 < config.vocab_size <= summary.largest_id:
        yield (
            REFUSED,
            f"the tokenizer makes token id {summary.largest_id} of it, and the model's vocab_size is"
            f" {config.vocab_size}: tokenizer and model do not belong together",
        )


def _decoding(report: dict, config: DataConfig):
    done, limit = report["decoding"], config.max_bad_sample_rate
    complete = done["checked"] == done["pictures"]
    if not complete:
        looked = f"{count(done['checked'])} of {several(done['pictures'], 'picture')}"
        advice = "--decode all looks at every one"
        yield NOTE, f"{looked} {'was' if done['checked'] == 1 else 'were'} decoded; {advice}"
    if done["failed"]:
        share = done["failed"] / done["checked"]
        first = done["failures"][0]
        text = (
            f"{count(done['failed'])} of {several(done['checked'], 'picture')} cannot be decoded"
            f" (e.g. {one_line(first['name'], 80)}: {one_line(first['reason'], 120)})"
        )
        surely = complete or done["failed"] >= _FEW_FAILURES
        if share > limit and surely:
            yield REFUSED, f"{text}, more than --max-bad-sample-rate {limit:g}"
        else:
            yield WARNING, f"{text}; training puts a blank picture in such a place and counts it"
    if done["resized"]:
        first = done["other_sizes"][0]
        yield (
            WARNING,
            f"{several(done['resized'], 'picture')} decoded to another size than the index has (e.g."
            f" {one_line(first['name'], 80)} {one_line(first['reason'], 120)}); if it was exchanged since, remove the"
            " index folder",
        )


def _marks(report: dict):
    marks = report["template_marks"]
    if marks["records"]:
        kinds = ", ".join(f"{one_line(mark, 40)} ({count(of['records'])})" for mark, of in marks["marks"].items())
        share = marks["records"] / max(report["total"]["records"], 1)
        text = (
            f"the texts of {several(marks['records'], 'record')} ({percent(share)}) hold words that templates or the"
            f" tokenizer use: {kinds}"
        )
        if share > MOST_MARKED:
            yield REFUSED, f"{text}; more than {percent(MOST_MARKED)}: they have been written out by a template before"
        else:
            yield WARNING, f"{text}; the model would learn to write them"
    if report["answers_with_image"]["records"]:
        yield WARNING, f"{several(report['answers_with_image']['records'], 'record')} with <image> inside an answer"


def _lengths(report: dict, config: DataConfig, positions: int | None):
    total = report["total"]
    if total["truncated"]:
        share = total["truncated"] / total["kept"]
        yield (
            WARNING,
            f"{several(total['truncated'], 'sample')} ({percent(share)}) cut at --model_max_length"
            f" {config.model_max_length}",
        )
    if positions is not None and config.model_max_length > positions:
        yield (
            WARNING,
            f"--model_max_length {config.model_max_length}: the model's max_position_embeddings is {positions}",
        )


def _duplicates(report: dict):
    content, ids = report["duplicates"]["content"], report["duplicates"]["ids"]
    if content["extra"]:
        yield (
            WARNING,
            f"{several(content['extra'], 'record is there', 'records are there')} more than once with the same pictures"
            f" and messages ({several(content['groups'], 'group')})",
        )
    if ids["ids"]:
        yield NOTE, f"{several(ids['ids'], 'id stands', 'ids stand')} for different conversations"


def _odd(report: dict):
    odd = report["odd_pictures"]
    for level, kinds in (
        (WARNING, [kind for kind in odd if kind in _WORTH_A_WARNING]),
        (NOTE, [kind for kind in odd if kind not in _WORTH_A_WARNING]),
    ):
        if kinds:
            words = ", ".join(f"{count(odd[kind]['count'])} x {odd[kind]['what'].split(';')[0]}" for kind in kinds)
            yield level, f"odd pictures, which are trained on: {words}"
