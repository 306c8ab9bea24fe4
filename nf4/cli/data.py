"""Training and evaluation data: text files, JSONL and ``datasets`` names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FIELDS = "'text', 'instruction' and 'output', or 'messages'"


def load_rows(data: str, split: str = "train") -> Any:
    """A ``datasets.Dataset`` of a .txt file (one document), a .jsonl file, or a dataset's name."""
    from datasets import Dataset, load_dataset

    path = Path(data)
    if path.suffix == ".txt":
        return Dataset.from_list([{"text": path.read_text(encoding="utf-8")}])
    if path.suffix in (".jsonl", ".json"):
        return Dataset.from_list(_jsonl(path))
    return load_dataset(data, split=split)


def _jsonl(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON: {error}") from error
        kind(row, f"{path}, line {number}")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} holds no rows")
    return rows


def kind(row: dict[str, Any], where: str) -> str:
    """Which of the accepted forms a row has; ValueError for none."""
    if "messages" in row:
        return "messages"
    if "instruction" in row and "output" in row:
        return "instruction"
    if "text" in row:
        return "text"
    raise ValueError(f"{where}: a row must have {FIELDS}, got {', '.join(row) or 'nothing'}")


def training_form(row: dict[str, Any]) -> dict[str, Any]:
    """A row in TRL's form: ``text``, or ``prompt`` and ``completion``, which alone is learned."""
    form = kind(row, "dataset")
    if form == "messages":
        return {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}
    if form == "instruction":
        return {"prompt": instruction_prompt(row), "completion": row["output"]}
    return {"text": row["text"]}


def instruction_prompt(row: dict[str, Any]) -> str:
    """The prompt of an instruction row, with its ``input`` if it has one."""
    extra = f"\n{row['input']}" if row.get("input") else ""
    return f"### Instruction\n{row['instruction']}{extra}\n### Response\n"


def read_texts(data: str, split: str) -> list[str]:
    """The documents of ``data`` as plain text."""
    texts = []
    for row in load_rows(data, split):
        form = kind(row, data)
        if form == "messages":
            texts.append("\n".join(m["content"] for m in row["messages"]))
        elif form == "instruction":
            texts.append(instruction_prompt(row) + row["output"])
        else:
            texts.append(row["text"])
    return texts
