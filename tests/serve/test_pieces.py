"""Tokens alone: their bytes and texts, penalties on them, and validation errors of the server's own options."""

from __future__ import annotations

import pytest
import torch
from tinychat import make_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from specdec.serve.bodies import ChatBody
from specdec.serve.errors import ApiError
from specdec.serve.limits import Limits
from specdec.serve.penalties import TokenBias, TokenPenalty, processors_of
from specdec.serve.pieces import Pieces, Vocabulary

TEXT = "é ü 日本 🎉!"


def sentencepiece() -> PreTrainedTokenizerFast:
    """As Llama 2's: a mark for spaces, and bytes for what is not in the vocabulary."""
    words = ["<unk>", "▁hello", "▁", "world", *(f"<0x{byte:02X}>" for byte in range(256))]
    inner = Tokenizer(models.Unigram([(word, -float(i)) for i, word in enumerate(words)], unk_id=0, byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Sequence([decoders.Metaspace(), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


@pytest.mark.parametrize("make", [make_tokenizer, sentencepiece])
def test_the_bytes_of_all_tokens_are_the_bytes_of_the_text(make: type[PreTrainedTokenizerFast]) -> None:
    """A byte of a character that is split over tokens must not become a replacement character."""
    tokenizer = make()
    words = Vocabulary(tokenizer)
    ids = tokenizer(TEXT)["input_ids"]
    assert b"".join(words.bytes(each) for each in ids).decode().strip() == TEXT


def test_pieces_add_up_to_the_text_however_it_is_cut() -> None:
    tokenizer = make_tokenizer()
    words = Vocabulary(tokenizer)
    ids = [*tokenizer(TEXT)["input_ids"], tokenizer.eos_token_id]
    for size in (1, 2, 3, 7):
        pieces = Pieces(words)
        found = [piece for i in range(0, len(ids), size) for piece in pieces.split(ids[i : i + size])]
        assert len(found) == len(ids)
        assert "".join(found) == tokenizer.decode(ids, skip_special_tokens=True) == TEXT
    assert words.text(tokenizer.eos_token_id) == "<eos>"


def test_a_model_without_a_tokenizer_has_numbers_for_words() -> None:
    assert Vocabulary(None).text(7) == "<7>"


def test_penalties_are_openais_formula() -> None:
    """mu[j] - c[j] * frequency - (c[j] > 0) * presence, where c counts the generated tokens only."""
    logits = torch.randn(1, 10)
    ids = torch.tensor([[3, 3, 4, 5, 3, 5, 5]])  # the first three are the prompt
    got = TokenPenalty(3, 0.5, 0.25)(ids, logits)
    expected = logits.clone()
    expected[0, 5] -= 3 * 0.5 + 0.25
    expected[0, 3] -= 1 * 0.5 + 0.25
    torch.testing.assert_close(got, expected)
    assert torch.equal(TokenPenalty(7, 0.5, 0.25)(ids, logits), logits)
    for broken in (TokenPenalty(0, 0.5, 0.25), TokenPenalty(3, 0.25, 0.5), TokenPenalty(4, 0.5, 0.25)):
        assert not torch.allclose(broken(ids, logits), expected), "a penalty that counts otherwise must be noticed"


def test_biases_are_added_and_the_least_bans() -> None:
    logits = torch.zeros(1, 5)
    got = TokenBias({1: 2.5, 3: -100.0})(torch.tensor([[0]]), logits)
    assert got.tolist() == [[0, 2.5, 0, -float("inf"), 0]]
    assert logits.tolist() == [[0] * 5]


def test_only_what_is_asked_for_costs_a_processor() -> None:
    def made(**fields: object) -> list[str]:
        body = ChatBody.model_validate({"messages": [{"role": "user", "content": "x"}], **fields})
        return [type(each).__name__ for each in processors_of(body, 1.0, 1, 10)]

    assert made() == made(frequency_penalty=0.0, presence_penalty=0.0, logit_bias={}) == []
    assert made(presence_penalty=1.0, logit_bias={"3": 1.0}) == ["TokenPenalty", "TokenBias"]
    with pytest.raises(ApiError, match="not a token id"):
        made(logit_bias={"10": 1.0})


@pytest.mark.parametrize("wrong", [{"max_prompt_tokens": 0}, {"max_body_bytes": 0}, {"request_timeout_s": 0.0}, {"grace_s": -1.0},
                                   {"stall_timeout_s": float("nan")}])  # fmt: skip
def test_limits_that_refuse_everything_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Limits(**wrong)  # type: ignore[arg-type]
