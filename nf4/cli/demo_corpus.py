"""The demo's data: text that every Python installation has, and ten instruction/answer pairs."""

from __future__ import annotations

import json
import sysconfig
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

END = "<|end|>"
IGNORED = -100  # the label that transformers leaves out of the loss


def corpus_text(max_chars: int = 4_000_000) -> str:
    """Python's language reference (pydoc_data) and the sources of its standard library."""
    from pydoc_data.topics import topics

    parts = [topics[name] for name in sorted(topics)]
    size = sum(map(len, parts))
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.glob("*.py")):
        if size >= max_chars:
            break
        text = path.read_text(encoding="utf-8", errors="ignore")
        parts.append(text)
        size += len(text)
    return f"\n{END}\n".join(parts)[:max_chars]


def pairs() -> list[dict[str, str]]:
    """The instruction/answer pairs, English and Chinese."""
    lines = resources.files("nf4.cli").joinpath("demo_pairs.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in lines.splitlines()]


def prompt(instruction: str) -> str:
    """The prompt of an instruction, in the language it is written in."""
    chinese = any("\u4e00" <= c <= "\u9fff" for c in instruction)
    ask, answer = ("指令", "回答") if chinese else ("Instruction", "Answer")
    return f"### {ask}\n{instruction}\n### {answer}\n"


def train_tokenizer(text: str, vocab_size: int) -> Any:
    """A byte-level BPE tokenizer for the corpus and the pairs."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = ByteLevelBPETokenizer()
    # The pairs count as often as it takes for their (mostly Chinese) words to get tokens.
    extra = [prompt(p["instruction"]) + p["output"] for p in pairs()] * 50
    chunks = [text[i : i + 10_000] for i in range(0, len(text), 10_000)]
    tokenizer.train_from_iterator(
        chunks + extra, vocab_size=vocab_size, special_tokens=[END], show_progress=False
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer, eos_token=END, pad_token=END
    )


class TextWindows(Dataset):
    """Windows of ``length`` tokens of a long text, for next-token training."""

    def __init__(self, tokenizer: Any, text: str, length: int) -> None:
        ids = torch.tensor(tokenizer(text)["input_ids"])
        self.windows = ids[: ids.numel() // length * length].view(-1, length)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.windows[index], "labels": self.windows[index]}


class Pairs(Dataset):
    """The pairs as prompt and answer, with the loss on the answer only."""

    def __init__(self, tokenizer: Any) -> None:
        self.rows = []
        for pair in pairs():
            asked = tokenizer(prompt(pair["instruction"]))["input_ids"]
            answered = tokenizer(pair["output"] + END)["input_ids"]
            labels = [IGNORED] * len(asked) + answered
            self.rows.append({"input_ids": asked + answered, "labels": labels})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.rows[index]
