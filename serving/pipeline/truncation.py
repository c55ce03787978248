"""Truncated tokenization whose cost depends on the tokens kept: a text goes in, the first token ids of it come out.

The ids are those of the whole text, truncated. The library tokenizes a text before it truncates it, so this module gives it prefixes that
grow, and keeps the ids that the rest of the text cannot change:

- A prefix ends where normalization cannot join two characters, and inside no added token.
- The pre-tokenizer splits from left to right. The last pre-tokens of a prefix may be incomplete; those before them are final.
- Inside one long pre-token, Unigram's best path to a character depends on the characters before it only. The best path of the whole
  pre-token has a boundary in every window as long as the longest piece. If the best paths to all characters of a window agree on the first
  ids, the rest of the text cannot change these ids.

A tokenizer with other parts than those named here gets the whole text. Knows neither prompts nor threads.
"""

from __future__ import annotations

import json
import unicodedata
from typing import Any

from tokenizers import Tokenizer

CHARACTERS_PER_TOKEN = 6  # of the first prefix; English text has 4 to 5, so most texts need no second prefix
FIRST_MARGIN = 64  # characters on top: a short length needs a prefix of some words too
GROWTH = 4  # of a prefix that was too short; the prefixes together cost a third of the last one more
BOUNDARY_SEARCH = 512  # characters in which a place to end the prefix is looked for

# Parts that treat each character by itself and its neighbours only (see is_plain for the neighbours).
LOCAL_NORMALIZERS = {"NFC", "NFD", "NFKC", "NFKD", "Nmt", "Precompiled", "Lowercase", "StripAccents", "Strip", "Prepend"}
LOCAL_REPLACEMENTS = ({"String": " "}, {"Regex": r"\s+"}, {"Regex": " {2,}"})
# Parts that split between two characters by these two alone: only the last pre-token of a prefix can be incomplete.
LOCAL_PRE_TOKENIZERS = {"Metaspace", "WhitespaceSplit", "Whitespace", "BertPreTokenizer", "Punctuation", "Digits"}
SPLIT_AT_SPACES = {"Metaspace", "WhitespaceSplit", "Whitespace", "BertPreTokenizer"}
# The pattern of this project's own tokenizers (training/corpus/tokenizer.py). It looks at one character more.
LOOKAHEAD_PATTERN = {"Regex": r'[;:)\]"“”/%]|,(?!\d)'}

PREPENDED = set("\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2\u0d4e")  # join the character after them
HANGUL_JAMO = (range(0x1100, 0x1200), range(0xA960, 0xA980), range(0xD7B0, 0xD800))  # compose with each other


class TruncatingTokenizer:
    """Tokenizes texts without special tokens and keeps the first ids. For one thread at a time.

    Args:
        serialized: a tokenizer.json; its truncation and padding settings are not used.
        length: ids kept of each text.
    """

    def __init__(self, serialized: str, length: int):
        settings = json.loads(serialized)
        self._length = length
        self._tokenizer = Tokenizer.from_str(serialized)
        self._tokenizer.no_padding()
        # The library truncates before it builds Python objects: a long text would otherwise hold Python's lock for its whole length.
        self._tokenizer.enable_truncation(length)
        self._first = CHARACTERS_PER_TOKEN * length + FIRST_MARGIN
        self._incomplete = _incomplete_pre_tokens(settings)  # at a prefix's end; 0 = unknown
        if not self._incomplete:
            return
        self._prefixes = Tokenizer.from_str(serialized)
        self._prefixes.no_padding()
        self._prefixes.no_truncation()
        added = settings["added_tokens"]
        normalizer = self._prefixes.normalizer
        self._added = [(token["content"], token["single_word"]) for token in added]
        normalized = [token["content"] for token in added if token["normalized"]]
        self._normalized_added = [content if normalizer is None else normalizer.normalize_str(content) for content in normalized]
        self._added_ids = {token["id"] for token in added}
        model = settings["model"]
        self._window = 0  # characters of the longest piece; 0 = this model's best paths cannot be compared
        if _has_prefix_paths(model):
            self._window = max(len(piece) for piece, _ in model["vocab"])
            bare = {**settings, "normalizer": None, "pre_tokenizer": None, "post_processor": None, "decoder": None, "added_tokens": []}
            self._model = Tokenizer.from_str(json.dumps(bare))
            self._model.no_padding()
            self._model.no_truncation()

    def is_short(self, text: str) -> bool:
        """Whether `steps` would tokenize the text whole and at once."""
        return not self._incomplete or len(text) <= 2 * self._first

    def whole(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text, from its whole."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def prefix(self, text: str, characters: int) -> list[int] | None:
        """The ids of `text`, from about as many characters of it; None if these do not determine them."""
        end = self._boundary(text, characters)
        if end is None:
            return None
        (encoding,) = self._prefixes.encode_batch([text[:end]], add_special_tokens=False)
        ids, words = encoding.ids, encoding.word_ids
        final = len(ids)
        for _ in range(self._incomplete):
            if not final:
                break
            word, last = words[final - 1], final - 1
            while last and words[last - 1] == word:
                last -= 1
            final = last
        if final >= self._length:
            return ids[: self._length]
        return self._inside_long_pre_token(text[:end], ids, len(text) - end)

    def first_ids(self, text: str) -> Any:
        """Yield None after each prefix that was too short, then the ids. The caller may stop in between."""
        characters = self._first
        while self._incomplete and 2 * characters < len(text):
            if (ids := self.prefix(text, characters)) is not None:
                yield ids
                return
            yield None
            characters *= GROWTH
        yield self.whole([text])[0]

    def _boundary(self, text: str, characters: int) -> int | None:
        """Where to end a prefix of about `characters` characters; None if there is no place near."""
        for end in range(characters, max(characters - BOUNDARY_SEARCH, 0), -1):
            if is_plain(text[end - 1]) and is_plain(text[end]) and not self._ends_in_added_token(text, end):
                return end
        return None

    def _ends_in_added_token(self, text: str, end: int) -> bool:
        """Whether an added token reaches over `end`, or ends there and must be a single word, which the next character decides."""
        if any(
            text.find(token, max(end - len(token) + (not single_word), 0), end + len(token) - 1) >= 0 for token, single_word in self._added
        ):
            return True
        if not self._normalized_added:
            return False
        reach = 2 * max(map(len, self._normalized_added))
        around, normalizer = text[max(end - reach, 0) : end + reach], self._prefixes.normalizer
        normalized = normalizer.normalize_str(around) if normalizer is not None else around
        return any(token in normalized for token in self._normalized_added)

    def _inside_long_pre_token(self, prefix: str, ids: list[int], characters_left: int) -> list[int] | None:
        """The first ids of a text that begins with `prefix` and has a pre-token longer than it; None if they are not certain.

        Args:
            ids: of the prefix.
            characters_left: of the text after the prefix; a comparison that costs more than these is not made.
        """
        if not self._window or len(ids) < self._length or not self._added_ids.isdisjoint(ids):
            return None
        normalizer, pre_tokenizer = self._prefixes.normalizer, self._prefixes.pre_tokenizer
        normalized = normalizer.normalize_str(prefix) if normalizer is not None else prefix
        pre_tokens = [piece for piece, _ in pre_tokenizer.pre_tokenize_str(normalized)]
        *complete, last = pre_tokens
        last = last[: len(last) - (self._incomplete - 1)]  # characters after which the pattern's look-ahead is unknown
        if len(last) <= self._window + self._incomplete or self._window * len(last) > characters_left:
            return None
        before = [i for encoding in self._model.encode_batch_fast(complete, add_special_tokens=False) for i in encoding.ids]
        wanted = self._length - len(before)
        agreed: list[int] | None = None
        for end in range(len(last), len(last) - self._window, -1):
            (encoding,) = self._model.encode_batch_fast([last[:end]], add_special_tokens=False)
            path = encoding.ids[:wanted]
            if len(path) < wanted or path != (agreed or path):
                return None
            agreed = path
        found = before + (agreed or [])
        return found if found == ids[: self._length] else None


def _incomplete_pre_tokens(settings: dict[str, Any]) -> int:
    """How many pre-tokens at a prefix's end the rest of the text may change; 0 if the tokenizer has parts that are not known here."""
    pre_tokenizers = _parts(settings["pre_tokenizer"], "pretokenizers")
    for part in _parts(settings["normalizer"], "normalizers"):
        replaces_space = part["type"] == "Replace" and part["pattern"] in LOCAL_REPLACEMENTS
        if part["type"] not in LOCAL_NORMALIZERS and not replaces_space:
            return 0
    incomplete = 1
    for part in pre_tokenizers:
        looks_ahead = part["type"] == "Split" and part["pattern"] == LOOKAHEAD_PATTERN and part["behavior"] == "Isolated"
        if looks_ahead:
            incomplete = 2
        elif part["type"] not in LOCAL_PRE_TOKENIZERS or not part.get("split", True):
            return 0
    if settings["model"].get("dropout") or not pre_tokenizers:
        return 0
    return incomplete


def _has_prefix_paths(model: dict[str, Any]) -> bool:
    """Whether the ids of the best path to a character are a prefix of the ids of every path that continues it."""
    if model["type"] != "Unigram" or not model["vocab"]:
        return False
    # Without a token for every byte, a run of unknown characters is spelled in bytes or is unknown as a whole.
    return not model.get("byte_fallback") or {f"<0x{byte:02X}>" for byte in range(256)} <= {piece for piece, _ in model["vocab"]}


def splits_locally(settings: dict[str, Any]) -> bool:
    """Whether each word between two spaces is tokenized by itself, as far as a tokenizer.json's parts tell."""
    parts = _parts(settings["pre_tokenizer"], "pretokenizers")
    splits = any(part["type"] in SPLIT_AT_SPACES and part.get("split", True) for part in parts)
    return splits and _incomplete_pre_tokens(settings) > 0


def _parts(setting: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    if setting is None:
        return []
    return [part for inner in setting[name] for part in _parts(inner, name)] if setting["type"] == "Sequence" else [setting]


def is_plain(character: str) -> bool:
    """Whether normalization treats the character alike before and after any other such character, and makes no space at its edges."""
    if "!" <= character <= "~":
        return True
    if character in PREPENDED or character == "\ufffd" or (character > "\U0001f1e5" and character < "\U0001f200"):
        return False
    normalized = unicodedata.normalize("NFKC", character)
    first = normalized[:1]
    return (
        unicodedata.category(character)[0] in "LNPS"
        and normalized == normalized.strip() != ""
        and unicodedata.category(first)[0] != "M"
        and not any(ord(first) in jamo for jamo in HANGUL_JAMO)
        and not 0x1F3FB <= ord(character) <= 0x1F3FF
        and not 0x10FFF < ord(character) < 0x12000  # further scripts with characters that join the next one
    )
