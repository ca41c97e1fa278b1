"""Which ids a folder's tokenizer uses, from its files alone: a picture's placeholder needs one that it does not."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from dc_megatron.config import read_json_file
from dc_megatron.errors import UserError

IMAGE_TOKEN = "<image>"

# Tokens that vocabularies keep for later: <|reserved_special_token_0|>, <|unused12|>, <reserved_106>, [unused3].
_SPARE = re.compile(r"^[<\[|]+(reserved|unused|dummy|placeholder|spare)[a-z_\- ]*\d*[>\]|]+$", re.IGNORECASE)


def image_token_id(ids: Mapping[str, int], rows: int) -> int:
    """The id for ``<image>`` with a tokenizer of ``ids`` and an embedding of ``rows`` rows.

    The token's own where the tokenizer has it; else the last reserved token's (models that use reserved tokens begin
    with the first); else the one behind the last token, which may be a spare row or a new one.
    """
    if IMAGE_TOKEN in ids:
        return ids[IMAGE_TOKEN]
    spare = [number for token, number in ids.items() if number < rows and _SPARE.match(token)]
    return max(spare) if spare else max(ids.values(), default=rows - 1) + 1


def tokenizer_ids(folder: str) -> dict[str, int] | None:
    """Token -> id of everything the tokenizer files in ``folder`` name; None where there are no such files.

    A sentencepiece file gives its number of pieces under names of no meaning. UserError: files that cannot be read.
    """
    found: dict[str, int] = {}
    what = f"the tokenizer in {folder}"
    present = set(os.listdir(folder))
    if "tokenizer.json" in present:
        content = read_json_file(folder, "tokenizer.json", what)
        vocabulary = (content.get("model") or {}).get("vocab") or {}
        # A unigram model has a list of [piece, score], everything else a table.
        if isinstance(vocabulary, list):
            vocabulary = {str(piece): number for number, (piece, _) in enumerate(vocabulary)}
        found |= vocabulary
        found |= {token["content"]: token["id"] for token in content.get("added_tokens") or []}
    elif "vocab.json" in present:
        found |= read_json_file(folder, "vocab.json", what)
    elif "tokenizer.model" in present:
        count = _sentencepieces(os.path.join(folder, "tokenizer.model"), what)
        found |= {f"piece {number}": number for number in range(count)}
    if "added_tokens.json" in present:
        found |= read_json_file(folder, "added_tokens.json", what)
    if "tokenizer_config.json" in present:
        decoder = read_json_file(folder, "tokenizer_config.json", what).get("added_tokens_decoder") or {}
        found |= {token["content"]: int(number) for number, token in decoder.items()}
    return found or None


def _sentencepieces(path: str, what: str) -> int:
    """Pieces in a sentencepiece model: a protobuf message whose first field is repeated once a piece."""
    with open(path, "rb") as file:
        data = file.read()
    place = count = 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = data[place]
            place += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    try:
        while place < len(data):
            field, kind = divmod(varint(), 8)
            if kind == 2:
                length = varint()
                place += length
            elif kind == 0:
                varint()
            elif kind in (1, 5):
                place += 8 if kind == 1 else 4
            else:
                raise ValueError(f"wire type {kind}")
            count += field == 1
        if place != len(data):
            raise ValueError("ends early")
    except (IndexError, ValueError) as error:
        raise UserError(f"{what}: {path} is no sentencepiece model ({error}); fetch it again") from None
    return count
