"""The tokenizer of a checkpoint, as JSON of the `tokenizers` library; SentencePiece's spiece.model becomes one with the same token ids.

Comes in: the bytes of a unigram model. Goes out: a `Tokenizer`. Needs neither the sentencepiece package nor protobuf: the generated code of
sentencepiece's releases and the protobuf of Triton's client do not agree on a version, so the few fields are read here.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram

from export.errors import CheckpointError
from serving.contract.manifest import token_without_embedding

from .source_files import one_line, read_json, read_text, require_file

SPACE = "\u2581"  # SentencePiece's mark of a space
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # ModelProto.SentencePiece.Type
UNIGRAM = 1  # TrainerSpec.ModelType
T5_EXTRA_IDS = 100


@dataclasses.dataclass(frozen=True)
class PieceModel:
    """The fields of a ModelProto that decide token ids.

    Attributes:
        pieces: (text, score, type) of each id.
        charsmap: of the normalizer, compiled; empty for none.
        dummy_prefix: a space is put before every text.
        trims_spaces: spaces at both ends are dropped, and runs of spaces are one space.
        byte_fallback: unknown characters are spelt in byte pieces.
    """

    pieces: tuple[tuple[str, float, int], ...]
    charsmap: bytes
    dummy_prefix: bool
    trims_spaces: bool
    byte_fallback: bool


def parse_model(content: bytes, path: str) -> PieceModel:
    """Read a serialized ModelProto.

    Args:
        content: of the file.
        path: its name, for errors.

    Raises:
        CheckpointError: if it is none, or has an algorithm or a setting that the `tokenizers` library lacks.
    """
    try:
        fields = list(_fields(content))
        pieces = tuple(_piece(value) for number, value in fields if number == 1)
        trainer = {number: value for message, spec in fields if message == 2 for number, value in _fields(spec)}
        normalizer = {number: value for message, spec in fields if message == 3 for number, value in _fields(spec)}
    except (ValueError, IndexError, TypeError, struct.error) as error:
        raise CheckpointError(f"{path}: wanted a SentencePiece model, got a truncated or other file ({error})") from error
    if not pieces:
        raise CheckpointError(f"{path}: wanted a SentencePiece model, got a file without pieces")
    algorithm = trainer.get(3, UNIGRAM)
    if algorithm != UNIGRAM:
        name = {2: "BPE", 3: "word", 4: "char"}.get(algorithm, algorithm)
        raise CheckpointError(f"{path}: model_type: wanted unigram, as T5 has, got {name}; pass a tokenizer.json")
    if trainer.get(24) or not normalizer.get(5, 1):
        name = "treat_whitespace_as_suffix" if trainer.get(24) else "escape_whitespaces=false"
        raise CheckpointError(f"{path}: {name} is not supported; pass a tokenizer.json with --tokenizer")
    if sum(kind == UNKNOWN for _, _, kind in pieces) != 1:
        raise CheckpointError(f"{path}: wanted one unknown piece, got {sum(kind == UNKNOWN for _, _, kind in pieces)}")
    return PieceModel(
        pieces, bytes(normalizer.get(2, b"")), bool(normalizer.get(3, 1)), bool(normalizer.get(4, 1)), bool(trainer.get(35, 0))
    )


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) of a protobuf message: an int for varints, bytes for everything else."""
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == 0:
            value, position = _varint(message, position)
            yield number, value
            continue
        if wire_type == 2:
            length, position = _varint(message, position)
        elif wire_type in (1, 5):
            length = 8 if wire_type == 1 else 4
        else:
            raise ValueError(f"wire type {wire_type} at byte {position}")
        if position + length > len(message) or number == 0:
            raise ValueError(f"field {number} ends after the file, at byte {position + length}")
        yield number, message[position : position + length]
        position += length


def _varint(message: bytes, position: int) -> tuple[int, int]:
    """The varint at `position`, and the position after it."""
    value = shift = 0
    while shift < 64:
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise ValueError(f"no varint before byte {position}")


def _piece(message: bytes) -> tuple[str, float, int]:
    fields = dict(_fields(message))
    (score,) = struct.unpack("<f", fields.get(2, bytes(4)))
    return fields[1].decode() if 1 in fields else "", score, fields.get(3, NORMAL)


def tokenizer_from_model(model: PieceModel, extra_ids: int) -> Tokenizer:
    """The tokenizer that yields SentencePiece's ids, and T5's for the text of special tokens.

    Ids differ in one known case: rare orders of several combining marks on one letter.

    Args:
        model: of a spiece.model.
        extra_ids: T5's sentinels `<extra_id_N>` that follow the pieces, the last one first, unless they are pieces already.
    """
    texts = [text for text, _, _ in model.pieces]
    unknown = next(i for i, (_, _, kind) in enumerate(model.pieces) if kind == UNKNOWN)
    sentinels = [] if "<extra_id_0>" in texts else [f"<extra_id_{i}>" for i in reversed(range(extra_ids))]
    vocab = _scores(model) + [(text, 0.0) for text in sentinels]
    tokenizer = Tokenizer(Unigram(vocab, unk_id=unknown, byte_fallback=model.byte_fallback))
    tokenizer.normalizer = _normalizer(model)

    # Words are tokenized one by one, which is faster, unless a piece spans words or the space itself is unknown.
    by_word = SPACE in texts and not any(SPACE in text[1:] for text, _, kind in model.pieces if kind in (NORMAL, USER_DEFINED))
    if by_word:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, "never", split=True)
    if by_word and not model.byte_fallback:
        tokenizer.decoder = decoders.Metaspace(SPACE, "always" if model.dummy_prefix else "never")
    else:
        spell: list[Any] = [decoders.ByteFallback()] if model.byte_fallback else []
        strip = [decoders.Strip(" ", 1, 0)] if model.dummy_prefix else []
        tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), *spell, decoders.Fuse(), *strip])

    special = [text for text, _, kind in model.pieces if kind in (UNKNOWN, CONTROL) or text.startswith("<extra_id_")]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in special + sentinels])
    if "</s>" in texts:
        end = ("</s>", texts.index("</s>"))
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", pair="$A </s> $B </s>", special_tokens=[end])
    return tokenizer


def _scores(model: PieceModel) -> list[tuple[str, float]]:
    """(text, score) of each piece, as SentencePiece's search uses them."""
    highest = max((score for _, score, kind in model.pieces if kind == NORMAL), default=0.0)
    found = []
    for i, (text, score, kind) in enumerate(model.pieces):
        if kind == USER_DEFINED:  # SentencePiece's bonus, with which such a piece always wins
            score = len(text.encode()) * highest - 0.1
        found.append((f"\0unused {i}" if kind == UNUSED else text, score))
    return found


def _normalizer(model: PieceModel) -> normalizers.Normalizer:
    steps: list[Any] = []
    if model.charsmap:
        mapped = normalizers.Precompiled(model.charsmap)
        if mapped.normalize_str("e\u0301\uff0c") == "\u00e9,":  # NFKC is among its rules
            # The library looks up the first combining mark of a letter only and may drop the others. SentencePiece looks up all.
            steps.append(normalizers.NFKC())
        steps.append(mapped)
    if model.trims_spaces:
        steps += [normalizers.Replace(Regex(f"^ +|[ {SPACE}]+$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    steps.append(normalizers.Replace(" ", SPACE))
    if model.dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    return normalizers.Sequence(steps)


# The tokenizer of a checkpoint, as JSON of the `tokenizers` library.
#
# Comes in: a directory or a file. Goes out: the text of a tokenizer.json; a lone spiece.model is converted. Tokenizes no prompts;
# serving/pipeline does.

TOKENIZER_FILE = "tokenizer.json"
SPIECE_FILE = "spiece.model"


def read_tokenizer(place: Path, vocab_size: int | None = None) -> str:
    """The tokenizer in a directory or file.

    Args:
        place: a directory with tokenizer.json or spiece.model, or one of the two, whatever its name.
        vocab_size: rows of the embedding; a spiece.model gets T5's 100 sentinels only if they have rows.

    Raises:
        CheckpointError: if there is none, or it is damaged.
    """
    path = place
    if place.is_dir():
        path = next((place / name for name in (TOKENIZER_FILE, SPIECE_FILE) if (place / name).exists()), place / TOKENIZER_FILE)
    hint = f"no {TOKENIZER_FILE} or {SPIECE_FILE}; pass one with --tokenizer (t5-base's for FiD's readers)"
    if not path.exists() and not path.is_symlink():
        raise CheckpointError(f"{place}: {hint}")
    require_file(path)
    if path.suffix == ".json":
        text = read_text(path)
        _parsed(text, path)
        return text
    model = parse_model(path.read_bytes(), str(path))
    extra_ids = _extra_ids(path.parent)
    if extra_ids is None:
        fits = vocab_size is None or len(model.pieces) + T5_EXTRA_IDS <= vocab_size
        extra_ids = T5_EXTRA_IDS if fits else 0
    return str(tokenizer_from_model(model, extra_ids).to_str())


def require_embeddings(tokenizer_json: str, vocab_size: int, source: str) -> None:
    """Raise CheckpointError unless every token of the tokenizer has a row in an embedding of `vocab_size` rows."""
    token = token_without_embedding(Tokenizer.from_str(tokenizer_json), vocab_size)
    if token is not None:
        raise CheckpointError(
            f"{source}: the tokenizer has token id {token}, but the embedding has {vocab_size} rows; "
            "pass the checkpoint's own tokenizer with --tokenizer"
        )


def end_token_id(tokenizer_json: str) -> int | None:
    """The token that the tokenizer ends its texts with, or the id of `</s>`; None if it has neither."""
    tokenizer = Tokenizer.from_str(tokenizer_json)
    bare, whole = (tokenizer.encode("", add_special_tokens=added).ids for added in (False, True))
    if len(whole) == len(bare) + 1:
        return int(whole[-1])
    found = tokenizer.token_to_id("</s>")
    return None if found is None else int(found)


def _parsed(text: str, path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_str(text)
    except BaseException as error:  # the library raises Exception, and pyo3's PanicException, which is none
        if isinstance(error, (KeyboardInterrupt, SystemExit)) or type(error).__module__.startswith("export"):
            raise
        raise CheckpointError(f"{path}: not a tokenizer of the tokenizers library; download it again ({one_line(error)})") from error


def _extra_ids(directory: Path) -> int | None:
    """The number of sentinels that tokenizer_config.json states, if any."""
    path = directory / "tokenizer_config.json"
    if not path.exists():
        return None
    number = read_json(path).get("extra_ids")
    if number is None:
        return None
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise CheckpointError(f"{path}: extra_ids: wanted a number of tokens, got {number!r}")
    return number
