"""The parts of the server that need no HTTP: text, sampling, decoding."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nps_compress.serve.decoding import Sequences
from nps_compress.serve.sampling import Sampling, choose, generator_of, log_probabilities
from nps_compress.serve.texts import TextStream


def by_bytes(tokens):
    """A decoder whose tokens are bytes."""
    return bytes(tokens).decode("utf-8", "replace")


def by_words(tokens):
    """A decoder that puts a space between words, as that of WordPiece does."""
    return " ".join(("red", "green", "the", "cat")[token] for token in tokens)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=12), st.lists(st.text(min_size=1, max_size=3), max_size=3))
def test_pieces_are_the_text_up_to_the_first_stop(text, stop):
    stream = TextStream(by_bytes, stop)
    pieces = []
    for token in text.encode():
        pieces.append(stream.push(token))
        if stream.stopped:
            break
        assert text.startswith("".join(pieces))
    pieces.append(stream.finish())
    assert stream.finish() == ""
    places = [at for at in (text.find(each) for each in stop) if at >= 0]
    assert stream.stopped == bool(places)
    if places:
        assert "".join(pieces) == text[: min(places)]
    else:
        assert "".join(pieces) == text


@given(st.lists(st.integers(0, 3), min_size=1, max_size=8))
def test_pieces_have_the_spaces_of_the_whole(tokens):
    stream = TextStream(by_words)
    text = "".join(stream.push(token) for token in tokens) + stream.finish()
    assert text == by_words(tokens)


def test_half_a_character_is_held_back():
    first, *rest = "é!".encode()
    stream = TextStream(by_bytes)
    assert stream.push(first) == ""
    assert [stream.push(each) for each in rest] == ["é", "!"]
    cut = TextStream(by_bytes)
    cut.push(first)
    assert cut.finish() == "�"  # as decoding the whole gives it


def test_what_may_begin_a_stop_string_is_held_back():
    stream = TextStream(by_bytes, ["\n\nQ"])
    assert [stream.push(each) for each in b"a\n\nb"] == ["a", "", "", "\n\nb"]
    assert [stream.push(each) for each in b"\n\nQ"] == ["", "", ""]
    assert stream.stopped


def sampling(**options):
    return Sampling(**{"max_tokens": 1, **options})


def test_no_temperature_takes_the_likeliest():
    assert choose(torch.tensor([0.0, 2.0, 1.0]), sampling(temperature=0.0), 0.99) == 1
    assert generator_of(sampling(temperature=0.0)) is None


def test_draws_by_hand():
    """Probabilities 1/2, 1/3, 1/6, the middle token the likeliest."""
    logits = torch.tensor([1 / 3, 1 / 2, 1 / 6]).log()
    drawn = [choose(logits, sampling(), draw) for draw in (0.0, 0.3, 0.4, 0.8, 0.9, 0.999)]
    assert drawn == [0, 0, 1, 1, 2, 2]
    # the likeliest first; half of the probability is reached by it alone
    assert [choose(logits, sampling(top_p=0.5), draw) for draw in (0.0, 0.999)] == [1, 1]
    assert [choose(logits, sampling(top_p=0.6), d) for d in (0.0, 0.59, 0.61)] == [1, 1, 0]
    # squared and normalised: 9/14, 4/14, 1/14
    cold = sampling(temperature=0.5)
    assert [choose(logits, cold, d / 14) for d in (3.9, 4.1, 12.9, 13.1)] == [0, 1, 1, 2]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=8),
    st.floats(0, 1, exclude_max=True),
    st.floats(0.01, 1),
    st.floats(1e-6, 2),
)
def test_draws_are_in_the_nucleus(logits, draw, top_p, temperature):
    values = torch.tensor(logits)
    token = choose(values, sampling(top_p=top_p, temperature=temperature), draw)
    likelier = (values.double() / temperature).softmax(-1)
    assert float(likelier[likelier > likelier[token]].sum()) <= top_p + 1e-9


def test_impossible_tokens_are_never_drawn():
    logits = torch.tensor([-math.inf, 0.0, -math.inf, 0.0, -math.inf])
    for draw in (0.0, 0.4999, 0.5, 0.99999999):
        for top_p in (1.0, 0.9):
            assert choose(logits, sampling(top_p=top_p), draw) in (1, 3)


def test_seeds_decide_the_draws():
    def draws(seed):
        generator = generator_of(sampling(seed=seed))
        return [float(torch.rand((), generator=generator)) for _ in range(3)]

    assert draws(3) == draws(3) != draws(4)
    assert draws(-(2**63)) != draws(2**63 - 1)
    assert draws(None) != draws(None)


def test_log_probabilities_by_hand():
    found, likeliest = log_probabilities(torch.tensor([0.2, 0.5, 0.3]).log(), 0, 2)
    assert found == pytest.approx(math.log(0.2))
    assert [token for token, _ in likeliest] == [1, 2]
    assert [value for _, value in likeliest] == pytest.approx([math.log(0.5), math.log(0.3)])
    assert log_probabilities(torch.zeros(2), 1, 5)[1][1][0] in (0, 1)  # there are no more


def _model(kind):
    import transformers as hf

    torch.manual_seed(0)
    size = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    if kind == "llama":
        return hf.LlamaForCausalLM(hf.LlamaConfig(**size, **heads))
    if kind == "mistral":
        return hf.MistralForCausalLM(hf.MistralConfig(**size, **heads, sliding_window=4))
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=64)
    )


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
def test_rows_that_come_and_go_are_as_if_alone(kind):
    """Prompts of unequal length together; a row ends; others join; all against generate."""
    model = _model(kind).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 5
    prompts = [[1, 2, 3, 4, 5, 6, 7], [8], [9, 10, 11], [12, 13]]
    wanted = {}
    for number, prompt in enumerate(prompts):
        tokens = torch.tensor([prompt])
        out = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=9,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        wanted[number] = out[0, len(prompt) :].tolist()
    said = {number: [] for number in range(4)}

    def say(rows, logits):
        for row, scores in zip(rows, logits, strict=True):
            said[row].append(int(scores.argmax()))

    first, logits = Sequences.start(model, prompts[:3])
    rows = [0, 1, 2]
    say(rows, logits)
    for _ in range(3):
        say(rows, first.advance(model, [said[row][-1] for row in rows]))
    first.keep([1, 2])  # the longest one goes
    rows = [1, 2]
    say(rows, first.advance(model, [said[row][-1] for row in rows]))
    second, logits = Sequences.start(model, [prompts[3]])
    say([3], logits)
    is_plain = kind != "mistral"
    assert first.join(second) == is_plain
    groups = [(first, [1, 2, 3])] if is_plain else [(first, [1, 2]), (second, [3])]
    for _ in range(4):
        for sequences, members in groups:
            assert sequences.rows == len(members)
            say(members, sequences.advance(model, [said[row][-1] for row in members]))
    assert {row: len(tokens) for row, tokens in said.items()} == {0: 4, 1: 9, 2: 9, 3: 5}
    for row, tokens in said.items():
        assert tokens == wanted[row][: len(tokens)]
