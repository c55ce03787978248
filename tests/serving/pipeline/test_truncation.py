"""Truncated tokenization equals plain truncation for every text, and costs by the tokens kept."""

from __future__ import annotations

import json
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from serving.pipeline import tokenizer_pool, truncation
from serving.pipeline.scheduler import CancelledError
from serving.pipeline.tokenizer_pool import TokenizerPool, WordCache
from serving.pipeline.truncation import TruncatingTokenizer
from tests.conftest import word_tokenizer

ROOT = Path(__file__).parents[3]
WORDS = ["the", "capital", "of", "France", "is", "Paris,", "1,000", "naïve", "straße"]
CORPUS = [
    *(" ".join(random.Random(seed).choices(WORDS, k=40)) for seed in range(60)),
    *("a" * n for n in range(1, 40)),
    *("ab" * n for n in range(1, 20)),
    "漢字かな交じり文" * 20,
    "الله عليه وسلم صلى " * 20,
]
T5_SPLITS = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")])


def unigram(*, byte_fallback: bool = False, normalizer=None) -> Tokenizer:
    """A tokenizer as SentencePiece trains for T5, with added tokens that T5 has, that users add, and that begin alike."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = (
        normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), "▁")]) if normalizer is None else normalizer
    )
    tokenizer.pre_tokenizer = T5_SPLITS
    trainer = trainers.UnigramTrainer(vocab_size=220, unk_token="<unk>", special_tokens=["<pad>", "</s>", "<unk>"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    if byte_fallback:
        made = json.loads(tokenizer.to_str())
        made["model"]["vocab"] += [[f"<0x{byte:02X}>", -20.0] for byte in range(256)]
        made["model"]["byte_fallback"] = True
        tokenizer = Tokenizer.from_str(json.dumps(made))
    tokenizer.add_special_tokens([AddedToken(f"<extra_id_{i}>", lstrip=True, rstrip=True) for i in (1, 10)])
    tokenizer.add_tokens([AddedToken("naïve is", normalized=True), AddedToken("ab", single_word=True), AddedToken("abc")])
    return tokenizer


def bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "</s>"], show_progress=False))
    return tokenizer


def regex_split() -> Tokenizer:
    """A pre-tokenizer that looks ahead without bound: `truncation` does not know it and must not guess."""
    tokenizer = unigram()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([T5_SPLITS, pre_tokenizers.Split(Regex("a(?=a*b)"), "isolated")])
    return tokenizer


TOKENIZERS = {
    "demo": Tokenizer.from_file(str(ROOT / "checkpoints/fid/tokenizer.json")),
    "unigram": unigram(),
    "byte_fallback": unigram(byte_fallback=True),
    "accents": unigram(normalizer=normalizers.Sequence([normalizers.NFD(), normalizers.Lowercase(), normalizers.StripAccents()])),
    "bpe": bpe(),
    "words": word_tokenizer(),
    "regex_split": regex_split(),
}
# As served: read from JSON, which may round a trained score in its last digit.
SERIALIZED = {name: tokenizer.to_str() for name, tokenizer in TOKENIZERS.items()}
TOKENIZERS = {name: Tokenizer.from_str(serialized) for name, serialized in SERIALIZED.items()}
PIECES = [
    *"ab, .;1漢",
    *(
        "  ",
        "\u00a0",
        "\u3000",
        "▁",
        "</s>",
        "<extra_id_1>",
        "<extra_id_10>",
        "<ext",
        "</",
        "naïve is",
        "naïve ",
        "abc",
        "1,000",
        "the capital",
    ),
    *(
        "ﷺ",
        "㌀",
        "…",
        "é",
        "e\u0301",
        "\u0301",
        "가",
        "\u1100\u1161",
        "\u11a8",
        "😀",
        "👩\u200d👩",
        "\u0600",
        "\u200b",
        "ｶﾞ",
        "ำ",
        "\x00",
        "İ",
    ),
]
TEXTS = st.lists(st.tuples(st.sampled_from(PIECES) | st.text(max_size=4), st.integers(1, 60)), min_size=1, max_size=6).map(
    lambda runs: "".join(piece * times for piece, times in runs)
)


class Counting(TruncatingTokenizer):
    """Counts the characters that the library is given."""

    characters = 0

    def whole(self, texts):
        self.characters += sum(map(len, texts))
        return super().whole(texts)

    def prefix(self, text, characters):
        self.characters += characters
        return super().prefix(text, characters)

    def _inside_long_pre_token(self, prefix, ids, characters_left):
        if self._window * len(prefix) < characters_left:  # it compares so many best paths at most
            self.characters += self._window * len(prefix)
        return super()._inside_long_pre_token(prefix, ids, characters_left)

    def ids(self, text: str) -> list[int]:
        *short, found = self.first_ids(text)
        assert not any(short)
        return found


def plain(tokenizer: Tokenizer, text: str, length: int) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids[:length]


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(text=TEXTS, length=st.integers(1, 12), repeat=st.sampled_from([1, 1, 20]))
def test_ids_are_those_of_the_whole_text_truncated(name, text, length, repeat):
    tokenizer, text = TOKENIZERS[name], text * repeat
    with pytest.MonkeyPatch.context() as patch:  # so that short texts are cut at all places
        patch.setattr(truncation, "FIRST_MARGIN", 3)
        patch.setattr(truncation, "CHARACTERS_PER_TOKEN", 1)
        patch.setattr(truncation, "GROWTH", 2)
        assert Counting(SERIALIZED[name], length).ids(text) == plain(tokenizer, text, length)


@pytest.mark.parametrize("unit", ["a", "ab", "aab"])
def test_a_long_word_whose_first_ids_depend_on_its_end_is_tokenized_whole(unit, monkeypatch):
    """How many letters remain after the longest pieces decides about the first piece."""
    monkeypatch.setattr(truncation, "FIRST_MARGIN", 3)
    firsts = set()
    for end in range(5000, 5040):
        text = (unit * 5040)[:end]
        for length in (2, 3, 5):
            found = Counting(SERIALIZED["unigram"], length).ids(text)
            assert found == plain(TOKENIZERS["unigram"], text, length)
        firsts.add(tuple(found))
    assert len(firsts) > 1 or unit != "a"


@pytest.mark.parametrize("text", ["the capital of France, 1,000 ", "ﷺ", "</s>", "a</s> ", "France"])
@pytest.mark.parametrize("name", ["demo", "unigram", "byte_fallback"])
def test_a_text_ten_times_as_long_gives_the_library_no_more_characters(name, text):
    long, longer = (text * (n // len(text)) for n in (100_000, 1_000_000))
    tokenizer = Counting(SERIALIZED[name], 100)
    counts = []
    for each in (long, longer):
        tokenizer.characters = 0
        found = tokenizer.ids(each)
        counts.append(tokenizer.characters)
    assert len(found) == 100
    assert counts[1] == counts[0] < 40_000


@pytest.mark.parametrize(
    ("character", "plain"),
    [(c, True) for c in "a!~9é中☃Ω"]
    + [(c, False) for c in "\u0301\u200d\u200b \u00a0\u3000\n\x01\u00b4\u1100\u11a8\ufffd\u0600\U0001f1e6\U0001f3fb\U00011000"],
    ids=lambda value: f"U+{ord(value):04X}" if isinstance(value, str) else str(value),
)
def test_a_prefix_ends_between_characters_that_no_normalizer_joins(character, plain):
    assert truncation.is_plain(character) is plain


@pytest.mark.parametrize("token", ["naïve is", "nai\u0308ve is", "<extra_id_10>", "abc", "ab"])
def test_a_prefix_ends_inside_no_added_token(token, monkeypatch):
    """The first prefix ends at every place in turn, also inside the token, whose first word is complete then."""
    monkeypatch.setattr(truncation, "CHARACTERS_PER_TOKEN", 1)
    monkeypatch.setattr(truncation, "GROWTH", 2)
    text = "the " + token + " capital" * 30
    for margin in range(30):
        monkeypatch.setattr(truncation, "FIRST_MARGIN", margin)
        for length in (5, 6, 7):  # "▁the" is spelled by four
            assert Counting(SERIALIZED["unigram"], length).ids(text) == plain(TOKENIZERS["unigram"], text, length)


def test_the_pool_tokenizes_short_and_long_texts_in_order():
    texts = ["a b", "the capital " * 900, "", "ﷺ" * 3000, "c" * 20_000, *(f"w{i}" for i in range(30))]
    for tokenizer in TOKENIZERS.values():
        found = TokenizerPool(tokenizer, 20, threads=2).truncated_ids(texts)
        assert found == [plain(tokenizer, text, 20) for text in texts]


@pytest.mark.parametrize("text", ["w1 w2", "a" * 50_000], ids=["short", "long"])
def test_tokenizing_stops_between_passages_when_the_client_leaves(text, monkeypatch):
    asked, tokenized = [], []
    plain_whole, plain_steps = TruncatingTokenizer.whole, TruncatingTokenizer.first_ids
    monkeypatch.setattr(TruncatingTokenizer, "whole", lambda self, texts: tokenized.extend(texts) or plain_whole(self, texts))
    monkeypatch.setattr(TruncatingTokenizer, "first_ids", lambda self, text: tokenized.append(text) or plain_steps(self, text))

    def cancel_reason():
        asked.append(None)
        return CancelledError("cancelled by the client") if len(asked) > 2 else None

    with pytest.raises(CancelledError):
        TokenizerPool(TOKENIZERS["unigram"], 20, threads=1).truncated_ids([text] * 1000, cancel_reason)
    assert len(tokenized) < 40


def test_another_callers_question_is_not_behind_all_long_passages_of_the_first(monkeypatch):
    """The second caller comes when the first one's first passage is being tokenized; only the next ones may go before."""
    order, first_runs, second_waits = [], threading.Event(), threading.Event()
    plain_steps, plain_whole = TruncatingTokenizer.first_ids, TruncatingTokenizer.whole

    def first_ids(self, text):
        order.append("long" if len(text) > 1000 else "short")
        first_runs.set()
        assert second_waits.wait(10)
        return plain_steps(self, text)

    monkeypatch.setattr(TruncatingTokenizer, "first_ids", first_ids)
    monkeypatch.setattr(TruncatingTokenizer, "whole", lambda self, texts: order.append("short") or plain_whole(self, texts))
    pool = TokenizerPool(TOKENIZERS["unigram"], 20, threads=1)
    with ThreadPoolExecutor(2) as callers:
        first = callers.submit(pool.truncated_ids, ["the capital of " * 2000] * 30)
        assert first_runs.wait(10)
        second = callers.submit(pool.truncated_ids, ["a", "b"])
        while not pool._pool._work_queue.qsize():
            time.sleep(0.001)
        second_waits.set()
        assert len(first.result(10)) == 30 and len(second.result(10)) == 2
    assert order.index("short") <= 2


WORD_TEXTS = st.lists(st.sampled_from([*WORDS, *PIECES]) | st.text(max_size=6), max_size=12).map(" ".join)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(st.lists(WORD_TEXTS | TEXTS, min_size=1, max_size=3))
def test_the_ids_of_a_text_s_words_are_the_text_s(name: str, texts: list[str]):
    cache = WordCache(SERIALIZED[name], 20)
    for text in [*texts, *texts]:  # the second time from the table
        found = cache.ids(text)
        assert found is None or found.tolist() == TOKENIZERS[name].encode(text, add_special_tokens=False).ids[:20]


def demo_cache(length: int = 20) -> WordCache:
    return WordCache(SERIALIZED["demo"], length)


@pytest.mark.parametrize("text", ["", "the capital of France", "a  b\nc", "the capital " * 5_000, "naïve straße, 漢字 (1,000)"])
def test_usual_texts_come_from_the_table(text: str):
    cache = demo_cache()
    assert cache.works
    found = cache.ids(text)
    assert found is not None and found.tolist() == TOKENIZERS["demo"].encode(text, add_special_tokens=False).ids[:20]


@pytest.mark.parametrize("text", ["a</s>b", "x \u0301y", "a ▁b", "a" * 100, " " * 10_000 + "a"])
def test_a_text_whose_words_are_not_certain_is_left_to_the_tokenizer(text: str):
    assert demo_cache().ids(f"the capital {text} of") is None


@pytest.mark.parametrize("name", ["regex_split", "unigram"])  # a split that looks ahead; an added token with a space
def test_tokenizers_that_do_not_treat_words_alone_have_no_table(name: str):
    cache = WordCache(SERIALIZED[name], 20)
    assert not cache.works and cache.ids("the capital") is None


def test_known_words_are_not_tokenized_again(monkeypatch: pytest.MonkeyPatch):
    cache, asked = demo_cache(), []
    encode = cache._tokenizer.encode_batch_fast

    class Counting:
        def encode_batch_fast(self, words: list[str], **more: bool) -> list:
            asked.extend(words)
            return encode(words, **more)

        normalizer = cache._tokenizer.normalizer

    monkeypatch.setattr(cache, "_tokenizer", Counting())
    for text in ("the capital of the", "of France the"):
        cache.ids(text)
    assert asked == ["the", "capital", "of", "France"]


def test_a_full_table_starts_anew(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tokenizer_pool, "MAX_WORDS", 8)
    cache = demo_cache()
    for n in range(50):
        text = f"word{n} the capital w{n}"
        found = cache.ids(text)
        assert found is not None and found.tolist() == TOKENIZERS["demo"].encode(text, add_special_tokens=False).ids[:20]
        assert len(cache._table) <= 8 + 4


def ids(text: str) -> list[int]:
    return word_tokenizer().encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("before", [0, 1, 3])
def test_a_question_alone_is_tokenized_on_every_thread_whoever_came_before(before: int, monkeypatch):
    """Each call waits until as many calls as there are threads have begun."""
    pool = TokenizerPool(word_tokenizer(), 16, threads=3)
    texts = [f"w{i}" for i in range(6)]
    for _ in range(before):
        pool.truncated_ids(texts)
    all_threads, whole = threading.Barrier(3, timeout=20), TruncatingTokenizer.whole

    def together(self, texts):
        all_threads.wait()
        return whole(self, texts)

    monkeypatch.setattr(TruncatingTokenizer, "whole", together)
    assert pool.truncated_ids(texts) == [ids(text) for text in texts]


def test_a_question_beside_another_is_one_task_and_leaves_the_other_threads_free(monkeypatch):
    """Each task takes turns of Python's lock, so that a question in many tasks would slow the other."""
    pool = TokenizerPool(word_tokenizer(), 16, threads=3)
    first_is_in, second_is_done, whole = threading.Event(), threading.Event(), TruncatingTokenizer.whole
    tokenizers: list[TruncatingTokenizer] = []

    def recorded(self, texts):
        if "w0" in texts:
            first_is_in.set()
            assert second_is_done.wait(20)
        else:
            tokenizers.append(self)
            time.sleep(0.02)  # long enough for another thread to take the next task, if there is one
        return whole(self, texts)

    monkeypatch.setattr(TruncatingTokenizer, "whole", recorded)
    with ThreadPoolExecutor(1) as other:
        first = other.submit(pool.truncated_ids, ["w0", "w0"])
        assert first_is_in.wait(20)
        texts = [f"w{i}" for i in range(10, 30)]
        assert pool.truncated_ids(texts) == [ids(text) for text in texts]
        second_is_done.set()
        assert first.result() == [ids("w0")] * 2
    assert len(set(map(id, tokenizers))) == 1


@pytest.mark.parametrize(
    "texts", [["w1"], ["w1", "w2"], ["w3 " * 5000], ["w1 "] * 30 + ["w3 " * 5000] * 5], ids=["one", "two", "long", "many"]
)
def test_a_question_that_is_given_up_is_not_tokenized_further_and_frees_its_tokenizer(texts):
    pool = TokenizerPool(word_tokenizer(), 16, threads=2)
    for _ in range(5):
        with pytest.raises(TimeoutError, match="left"):
            pool.truncated_ids(texts, lambda: TimeoutError("left"))
    assert pool.truncated_ids(texts) == [ids(text)[:16] for text in texts]
