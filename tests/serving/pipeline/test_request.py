"""What a client may send: every fault is named, with what is allowed."""

from __future__ import annotations

import dataclasses
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from export.graphs.onnx_export import PROMPT_TEMPLATE
from serving.contract.limits import Limits, LimitsError
from serving.contract.manifest import Manifest, ManifestError, Prompt, token_without_embedding
from serving.contract.tensors import EngineSizes
from serving.pipeline.prompt import IncrementalDetokenizer, PromptEncoder, PromptError
from serving.pipeline.request import BeamOptions, Choices, ReaderRequest, RequestError, checked_new_tokens, read_request
from serving.pipeline.tokenizer_pool import TokenizerPool
from tests.conftest import word_tokenizer

LIMITS = Limits(max_passages=3, max_question_characters=20, max_passage_characters=30, max_new_tokens=8, default_max_new_tokens=4)


def texts(*values: str | bytes) -> np.ndarray:
    return np.array([v if isinstance(v, bytes) else v.encode() for v in values], np.object_)


def number(value: int) -> np.ndarray:
    return np.array([value], np.int32)


GOOD = {"question": texts("who?"), "passages": texts("a", "b")}


def test_defaults_fill_what_is_left_out():
    assert read_request(GOOD, LIMITS) == ReaderRequest("who?", ["a", "b"], None, 4, 0)


def test_everything_given_is_taken():
    tensors = {**GOOD, "titles": texts("x", "ÿ"), "max_new_tokens": number(8), "min_new_tokens": number(2)}
    assert read_request(tensors, LIMITS) == ReaderRequest("who?", ["a", "b"], ["x", "ÿ"], 8, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": texts("")}, "question: wanted text, got an empty string"),
        ({"question": texts(" \n")}, "question: wanted text, got an empty string"),
        ({"question": texts("x" * 21)}, "question: wanted at most 20 characters, got 21"),
        ({"question": texts(b"ab\xff")}, "question: wanted UTF-8, got byte 0xff at 2"),
        ({"passages": texts()}, "passages: wanted 1 to 3, got 0"),
        ({"passages": texts("a", "b", "c", "d")}, "passages: wanted 1 to 3, got 4"),
        ({"passages": texts("a", "x" * 31)}, "passages[1]: wanted at most 30 characters, got 31"),
        ({"passages": texts(b"\x80", "b")}, "passages[0]: wanted UTF-8, got byte 0x80 at 0"),
        ({"titles": texts("a")}, "titles: wanted one for each of the 2 passages or none at all, got 1"),
        ({"max_new_tokens": number(0)}, "max_new_tokens: wanted 1 to 8, got 0"),
        ({"max_new_tokens": number(9)}, "max_new_tokens: wanted 1 to 8, got 9"),
        ({"min_new_tokens": number(-1)}, "min_new_tokens: wanted 0 to 8, got -1"),
        ({"min_new_tokens": number(5)}, "min_new_tokens: wanted at most max_new_tokens=4, got 5"),
        ({"num_beams": number(0)}, "num_beams: wanted 1 to 10, got 0"),
        ({"num_beams": number(11)}, "num_beams: wanted 1 to 10, got 11"),
        ({"num_beams": number(2), "num_answers": number(3)}, "num_answers: wanted 1 to num_beams=2, got 3"),
        ({"num_beams": number(2), "num_answers": number(0)}, "num_answers: wanted 1 to num_beams=2, got 0"),
        ({"num_answers": number(2)}, "num_answers: wanted num_beams with it"),
        ({"length_penalty": np.array([1], np.float32)}, "length_penalty: wanted num_beams with it"),
        ({"num_beams": number(2), "length_penalty": np.array([np.nan], np.float32)}, "length_penalty: wanted -10 to 10, got nan"),
    ],
)
def test_each_fault_is_named_alone(change, message):
    with pytest.raises(RequestError) as caught:
        read_request({**GOOD, **change}, LIMITS)
    assert str(caught.value) == message


def test_what_is_as_large_as_it_may_be_is_taken():
    tensors = {"question": texts("x" * 20), "passages": texts("a" * 30, "b", "c"), "titles": texts("t" * 30, "", "")}
    found = read_request({**tensors, "max_new_tokens": number(8), "min_new_tokens": number(8)}, LIMITS, {"timeout": 0})
    assert found == ReaderRequest("x" * 20, ["a" * 30, "b", "c"], ["t" * 30, "", ""], 8, 8)
    least = {"question": texts("x"), "passages": texts("a"), "max_new_tokens": number(1), "min_new_tokens": number(0)}
    assert read_request(least, LIMITS) == ReaderRequest("x", ["a"], None, 1, 0)


def test_texts_may_come_decoded_and_in_any_shape():
    tensors = {"question": np.array([["who?"]], np.object_), "passages": np.array([["ä"], ["b"]], np.object_)}
    assert read_request(tensors, LIMITS) == ReaderRequest("who?", ["ä", "b"], None, 4, 0)


def test_a_request_without_its_tensors_is_refused_by_their_names():
    with pytest.raises(RequestError, match=r"^question: wanted text, got an empty string; passages: wanted 1 to 3, got 0$"):
        read_request({"question": None}, LIMITS)


def test_every_bad_text_is_named_and_bounds_that_cannot_be_compared_are_not():
    with pytest.raises(RequestError, match=r"^passages\[0\]: wanted UTF-8, .*; passages\[1\]: wanted UTF-8, [^;]*$"):
        read_request({**GOOD, "passages": texts(b"\xff", b"\xff")}, LIMITS)
    with pytest.raises(RequestError, match=r"^max_new_tokens: wanted 1 to 8, got 0; min_new_tokens: wanted 0 to 8, got 9$"):
        read_request({**GOOD, "max_new_tokens": number(0), "min_new_tokens": number(9)}, LIMITS)
    with pytest.raises(RequestError, match=r"^max_new_tokens: wanted 1 to 8, got 0$"):
        read_request({**GOOD, "max_new_tokens": number(0), "min_new_tokens": number(3)}, LIMITS)


def test_all_faults_are_named_at_once():
    with pytest.raises(RequestError) as caught:
        read_request({"question": texts(""), "passages": texts(), "titles": texts("a"), "max_new_tokens": number(0)}, LIMITS)
    assert [part.split(":")[0] for part in str(caught.value).split("; ")] == ["question", "passages", "titles", "max_new_tokens"]


def test_beams_are_taken_and_one_beam_is_a_greedy_answer():
    tensors = {**GOOD, "num_beams": number(4), "num_answers": number(3), "length_penalty": np.array([0.5], np.float32)}
    assert read_request(tensors, LIMITS).beams == BeamOptions(4, 3, 0.5)
    assert read_request({**GOOD, "num_beams": number(4)}, LIMITS).beams == BeamOptions(4, 1, 1.0)
    assert read_request({**GOOD, "num_beams": number(1)}, LIMITS, streams=True).beams is None
    with pytest.raises(RequestError, match="num_beams: wanted none, or 1, in a stream: its text is final"):
        read_request({**GOOD, "num_beams": number(4)}, LIMITS, streams=True)


def test_allowed_answers_are_taken_and_may_be_as_long_as_any_answer():
    tensors = {**GOOD, "allowed_answers": texts("yes", "ñ")}
    found = read_request({**tensors, "num_answers": number(2)}, LIMITS)
    assert (found.choices, found.beams, found.max_new_tokens) == (Choices(["yes", "ñ"], 2), None, LIMITS.max_new_tokens)
    found = read_request({**tensors, "num_beams": number(1), "max_new_tokens": number(3)}, LIMITS)
    assert (found.choices, found.beams, found.max_new_tokens) == (Choices(["yes", "ñ"], 1), BeamOptions(1, 1, 1.0), 3)


@pytest.mark.parametrize(
    ("change", "limits", "message"),
    [
        ({"allowed_answers": texts()}, {}, "allowed_answers: wanted 1 to 3, got 0"),
        ({"allowed_answers": texts("a", "b", "c", "d"), "num_answers": number(4)}, {}, "allowed_answers: wanted 1 to 3, got 4"),
        ({"allowed_answers": texts("a", "x" * 7)}, {}, "allowed_answers[1]: wanted at most 6 characters, got 7"),
        ({"allowed_answers": texts("a", b"\xff")}, {}, "allowed_answers[1]: wanted UTF-8, got byte 0xff at 0"),
        ({"allowed_answers": texts("a", " ")}, {}, "allowed_answers[1]: wanted text, got an empty string"),
        ({"num_answers": number(3)}, {}, "num_answers: wanted 1 to 2, the allowed_answers, got 3"),
        ({"num_answers": number(0)}, {}, "num_answers: wanted 1 to 2, the allowed_answers, got 0"),
        ({"num_answers": number(3), "num_beams": number(4)}, {}, "num_answers: wanted 1 to 2, the allowed_answers, got 3"),
        ({"min_new_tokens": number(2)}, {}, "min_new_tokens: wanted none beside allowed_answers, which have their lengths, got 2"),
        ({"length_penalty": np.array([1], np.float32)}, {}, "length_penalty: wanted num_beams with it"),
        ({}, {"max_allowed_answers": 0}, "allowed_answers: wanted none, as this reader cannot choose among them"),
    ],
)
def test_each_fault_of_allowed_answers_is_named_alone(change, limits, message):
    bounds = dataclasses.replace(LIMITS, **{"max_allowed_answers": 3, "max_allowed_answer_characters": 6, **limits})
    with pytest.raises(RequestError) as caught:
        read_request({**GOOD, "allowed_answers": texts("a", "b"), **change}, bounds)
    assert str(caught.value).split(" (")[0] == message


def test_a_stream_refuses_allowed_answers_by_name():
    with pytest.raises(RequestError, match=r"^allowed_answers: wanted none in a stream: the answer is known once"):
        read_request({**GOOD, "allowed_answers": texts("a", "b")}, LIMITS, streams=True)


def test_the_number_of_passages_is_checked_before_any_is_decoded():
    class Undecodable(bytes):
        def decode(self, *_):
            raise AssertionError("a passage of a request with too many was decoded")

    many = np.empty(1_000_000, np.object_)
    many[:] = Undecodable(b"x")
    with pytest.raises(RequestError) as caught:
        read_request({**GOOD, "passages": many, "titles": many}, LIMITS)
    assert str(caught.value) == "passages: wanted 1 to 3, got 1000000"


def test_a_refusal_lists_a_bounded_number_of_faults():
    limits = Limits(max_passages=1000, max_passage_characters=3)
    with pytest.raises(RequestError) as caught:
        read_request({**GOOD, "passages": texts(*["long"] * 1000)}, limits)
    assert str(caught.value).endswith("passages[9]: wanted at most 3 characters, got 4; and 990 more")
    with pytest.raises(RequestError) as caught:
        read_request({**GOOD, "passages": texts(*["long"] * 10)}, limits)
    assert str(caught.value).endswith("passages[9]: wanted at most 3 characters, got 4")


def test_contradicting_limits_are_refused():
    with pytest.raises(LimitsError, match="default_max_new_tokens: wanted at most max_new_tokens=8, got 9"):
        Limits(max_new_tokens=8, default_max_new_tokens=9)
    with pytest.raises(LimitsError, match="slots: wanted an integer of at least 1, got 0"):
        Limits(slots=0)
    assert Limits(max_new_tokens=8, default_max_new_tokens=8, slots=1, kv_cache_bytes=0) is not None
    with pytest.raises(LimitsError, match=r"slots: .*at least 1, got 1\.5\n  kv_cache_bytes: wanted an integer of at least 0, got -1$"):
        Limits(slots=1.5, kv_cache_bytes=-1)
    with pytest.raises(LimitsError, match=r"parameter slots in config\.pbtxt: wanted a whole number, got 'many'"):
        Limits.from_parameters({"slots": {"string_value": "many"}})


def test_limits_are_read_from_a_configuration_by_their_names_and_by_one_former_name():
    def parameters(**values: int) -> dict[str, dict[str, str]]:
        return {name: {"string_value": str(value)} for name, value in values.items()}

    assert Limits.from_parameters({}) == Limits()
    assert Limits.from_parameters(parameters(slots=3, reader=7)) == Limits(slots=3)
    assert Limits.from_parameters(parameters(max_in_hand=5)) == Limits(max_in_flight=5)
    assert Limits.from_parameters(parameters(max_in_flight=6, max_in_hand=5)) == Limits(max_in_flight=6)
    assert Limits(slots=3).to_parameters(("slots", "log_text")) == {"slots": "3", "log_text": "0"}


def test_the_timeout_is_read_and_every_other_parameter_is_refused_by_name():
    assert read_request(GOOD, LIMITS, {"timeout": 7, "id": "a", "triton_enable_empty_final_response": True}) == ReaderRequest(
        "who?", ["a", "b"], None, 4, 0, 7, "a"
    )
    for parameters, fault in (
        ({"max_tokens": 3}, r"^max_tokens: unknown; did you mean max_new_tokens\? known are question, .*, timeout \(microseconds\)$"),
        ({"zzz": 3}, "^zzz: unknown; known are question"),
        ({"triton_own": 1, "titles": "a", "zzz": 3}, "^titles: .*; zzz: unknown"),
        ({"titles": "a"}, "^titles: wanted an input tensor, got a request parameter$"),
        ({"timeout": -1}, "^timeout: wanted a whole number of microseconds, got -1$"),
        ({"timeout": True}, "^timeout: wanted a whole number of microseconds, got True$"),
    ):
        with pytest.raises(RequestError, match=fault):
            read_request(GOOD, LIMITS, parameters)


def test_bounds_of_new_tokens_hold_without_triton_too():
    limits = Limits(max_new_tokens=9, default_max_new_tokens=4)
    assert checked_new_tokens(None, None, limits) == (4, 0)
    for maximum, minimum, fault in (
        (10, 0, "max_new_tokens: wanted 1 to 9, got 10"),
        (0, 0, "max_new_tokens: wanted 1 to 9, got 0"),
        (2, 3, "min_new_tokens: wanted at most max_new_tokens=2, got 3"),
    ):
        with pytest.raises(RequestError, match=fault):
            checked_new_tokens(maximum, minimum, limits)


# FiD's prompt, truncation that spares the question, positions, and text that comes in pieces.

MANIFEST = Manifest(
    reader="fid",
    engine="onnxruntime",
    precision="float32",
    sizes=EngineSizes(12, 12, 3, (0, 1, 2), 4, 4, 5, 97),
    prompt=Prompt(PROMPT_TEMPLATE, 16, True),
    pad_token_id=0,
    eos_token_id=1,
    decoder_start_token_id=0,
    files={},
    weights_sha256="",
    provenance={},
)


def encoder(**prompt) -> PromptEncoder:
    manifest = dataclasses.replace(MANIFEST, prompt=dataclasses.replace(MANIFEST.prompt, **prompt))
    return PromptEncoder(word_tokenizer(), manifest)


def ids(text: str) -> list[int]:
    return word_tokenizer().encode(text, add_special_tokens=False).ids


def test_prompt_is_exactly_fids():
    assert encoder().encode("w1 w2", ["w3"], ["w4"]).input_ids[0, :9].tolist() == [*ids("question: w1 w2 title: w4 context: w3"), 1, 0]


def test_missing_titles_are_empty_ones():
    without, empty = encoder().encode("w1", ["w3", "w4"]), encoder().encode("w1", ["w3", "w4"], ["", ""])
    assert np.array_equal(without.input_ids, empty.input_ids)


def test_long_passages_are_cut_on_the_right_and_still_end():
    found = encoder().encode("w1", ["w3 " * 50], ["w4"])
    assert found.input_ids.shape == (1, 16) and found.input_ids[0, -1] == 1
    assert found.input_ids[0, :15].tolist() == ids("question: w1 title: w4 context: " + "w3 " * 50)[:15]


def test_many_passages_are_tokenized_on_several_threads_and_stay_in_order():
    passages = [" ".join(f"w{(i * j) % 90}" for j in range(i % 13 + 1)) for i in range(67)]
    together = encoder().encode("w1 w2", passages)
    for row, passage in enumerate(passages):
        alone = encoder().encode("w1 w2", [passage])
        length = int(alone.attention_mask.sum())
        assert together.input_ids[row, :length].tolist() == alone.input_ids[0, :length].tolist()
        assert together.attention_mask[row].sum() == length


def test_pieces_are_the_whole_in_turn():
    passages = [" ".join(f"w{(i * j) % 90}" for j in range(i % 13 + 1)) for i in range(11)]
    whole, pieces = encoder().encode("w1 w2", passages), list(encoder().encode_in_chunks("w1 w2", passages, None, 4))
    assert [len(piece.input_ids) for piece in pieces] == [4, 4, 3]
    assert np.array_equal(np.concatenate([piece.encoder_positions for piece in pieces]), whole.encoder_positions)
    tokens = [piece.input_ids[piece.attention_mask.astype(bool)] for piece in pieces]
    assert np.array_equal(np.concatenate(tokens), whole.input_ids[whole.attention_mask.astype(bool)])


def test_questions_tokenized_at_the_same_time_do_not_mix():
    shared, questions = encoder(), [f"w{i} w{i + 1}" for i in range(40)]
    wanted = [shared.encode(question, [f"w{i}"] * 20).input_ids for i, question in enumerate(questions)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: shared.encode(questions[i], [f"w{i}"] * 20).input_ids, range(40)))
    assert all(np.array_equal(w, f) for w, f in zip(wanted, found, strict=True))


def test_readers_without_end_token_get_none():
    found = encoder(append_eos=False).encode("w1", ["w3"], ["w4"])
    assert found.input_ids[0][found.attention_mask[0].astype(bool)].tolist() == ids("question: w1 title: w4 context: w3")


def test_a_question_that_fills_the_prompt_is_refused_not_cut():
    question = " ".join(f"w{i}" for i in range(13))
    assert encoder().encode(question, ["w3"]).input_ids[0, :15].tolist() == [*ids(f"question: {question}"), *ids("title:")]
    with pytest.raises(PromptError, match="question: 16 tokens with its prompt, but a passage holds 15"):
        encoder().encode(question + " w1", ["w3"])


def test_rows_are_padded_to_the_longest_and_positions_count_full_passages():
    found = encoder(passage_length=100).encode("w1", ["w2", "w3 " * 20], ["", ""])
    assert found.input_ids.shape == (2, 32)
    lengths = found.attention_mask.sum(1)
    assert lengths.tolist() == [6, 25]
    assert found.encoder_positions.tolist() == [*range(6), *range(100, 125)]


def test_a_tokenizer_with_more_tokens_than_the_reader_is_refused():
    with pytest.raises(ManifestError, match="wanted token ids below the reader's vocab_size=97, got 261"):
        PromptEncoder(byte_tokenizer(), MANIFEST)
    one_too_few = dataclasses.replace(MANIFEST, sizes=dataclasses.replace(MANIFEST.sizes, vocab_size=96))
    with pytest.raises(ManifestError, match="below the reader's vocab_size=96, got 96"):
        PromptEncoder(word_tokenizer(), one_too_few)


def byte_tokenizer() -> Tokenizer:
    """A byte a token, after the letters a to c: what is not one of these comes in as many tokens as it has bytes."""
    vocab = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {f"<0x{b:02X}>": 3 + b for b in range(256)} | {"a": 259, "b": 260, "c": 261}
    tokenizer = Tokenizer(models.Unigram([(t, 0.0) for t in vocab], unk_id=2, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    return tokenizer


BYTE_PROMPT = PromptEncoder(byte_tokenizer(), dataclasses.replace(MANIFEST, sizes=dataclasses.replace(MANIFEST.sizes, vocab_size=262)))


@given(
    st.lists(
        st.one_of(st.text(max_size=3).map(lambda t: [3 + b for b in t.encode()]), st.lists(st.integers(0, 261), max_size=3)), max_size=8
    )
)
def test_pieces_join_to_exactly_the_text_whatever_the_tokens(chunks):
    tokens = [token for chunk in chunks for token in chunk]
    pieces = IncrementalDetokenizer(BYTE_PROMPT)
    sent = [pieces.add(token) for token in tokens]
    assert "".join([*sent, pieces.flush()]) == BYTE_PROMPT.text(tokens)


def test_a_character_of_three_bytes_comes_whole():
    pieces = IncrementalDetokenizer(BYTE_PROMPT)
    assert [pieces.add(token) for token in [259, *(3 + b for b in "€".encode()), 260]] == ["a", "", "", "", "€b"]


def test_a_tokenizer_that_cannot_be_copied_fails_the_load_and_hangs_nothing(monkeypatch):
    def broken(serialized):
        raise ValueError("no memory for another vocabulary")

    stand_in = types.SimpleNamespace(from_str=broken)
    monkeypatch.setattr("serving.pipeline.truncation.Tokenizer", stand_in)
    with pytest.raises(ValueError, match="no memory for another vocabulary"):
        TokenizerPool(word_tokenizer(), 16, threads=3)


def test_added_tokens_need_an_embedding_too():
    tokenizer = word_tokenizer()
    assert token_without_embedding(tokenizer, 97) is None
    assert token_without_embedding(tokenizer, 96) == 96
    tokenizer.add_tokens(["<new>"])
    assert token_without_embedding(tokenizer, 97) == 97 and token_without_embedding(tokenizer, 98) is None
    with pytest.raises(ManifestError, match="vocab_size=97, got 97"):
        PromptEncoder(tokenizer, MANIFEST)
