"""A tiny random chat model with a byte-level tokenizer, saved to a folder, and a way to run the command on it."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<eos>", "<user>", "<bot>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<user>' if m.role == 'user' else '<bot>' if m.role == 'assistant' else m.role }}"
    "{{ m.content }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)
VOCAB = 256 + len(SPECIAL)


def make_tokenizer(num_extra: int = 0, template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """One token for each byte, so that other letters than ASCII are split over tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    extra = [f"<x{i}>" for i in range(num_extra)]
    inner.add_special_tokens([AddedToken(text, special=True) for text in (*SPECIAL, *extra)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<eos>")
    tokenizer.chat_template = template
    return tokenizer


def make_model(seed: int = 0, vocab: int = VOCAB, eos: int | None = 256, **options: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=options.pop("num_hidden_layers", 2),
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=options.pop("max_position_embeddings", 512),
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=None,
        **options,
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


def save(folder: Path, model: LlamaForCausalLM | None = None, tokenizer: PreTrainedTokenizerFast | None = None) -> str:
    (model or make_model()).save_pretrained(folder)
    (tokenizer or make_tokenizer()).save_pretrained(folder)
    return str(folder)


def write_prompts(path: Path, lines: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


QUESTIONS = [
    {"question_id": 7, "category": "chat", "turns": ["aaa bbb aaa bbb", "and again?"]},
    {"question_id": 8, "category": "code", "turns": ["for i in x: print(i)"]},
    {"question_id": "nine", "category": "chat", "turns": ["hello hello hello"]},
    {"prompt": "é ü 日本"},
]


@dataclass(frozen=True, slots=True)
class Ran:
    """How a command ended and what it said."""

    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of an error: nothing else may be on standard error behind it."""
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.err
        assert "Traceback" not in self.err
        return lines[0]


class Command:
    """``specdec`` in this process, through the function that the console script calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # typer sets its own
        monkeypatch.delenv("SPECDEC_DEBUG", raising=False)

    def __call__(self, *arguments: str) -> Ran:
        from specdec.cli.main import main

        self._monkeypatch.setattr(sys, "argv", ["specdec", *arguments])
        self._capsys.readouterr()
        try:
            main()
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        said = self._capsys.readouterr()
        return Ran(status, said.out, said.err)
