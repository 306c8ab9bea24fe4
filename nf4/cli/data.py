"""Training and evaluation data: text, JSON lines and ``datasets``, as rows and as tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

FIELDS = "'text', 'instruction' and 'output', or 'messages'"
DATA_HELP = (
    "a .txt or .md file, a .jsonl or .json file of rows with text, instruction and output, or "
    "messages, a folder that datasets saved, or a dataset's name on the hub (NAME:CONFIG)"
)
_COLUMNS = {
    "text": ("text",),
    "instruction": ("instruction", "input", "output"),
    "messages": ("messages",),
}
IGNORED = -100  # the label of a token that is not learned


def load_rows(data: str, split: str = "train") -> Any:
    """A ``datasets.Dataset`` whose rows all have one of the accepted forms."""
    from datasets import Dataset

    path = Path(data)
    if path.suffix in (".txt", ".md"):
        return Dataset.from_list([{"text": path.read_text(encoding="utf-8")}])
    if path.suffix in (".jsonl", ".json"):
        return Dataset.from_list(_json_rows(path))
    if path.is_file():
        raise ValueError(f"{path}: data must be {DATA_HELP}")
    rows = _saved(path, split) if path.is_dir() else _named(data, split)
    form = kind(dict.fromkeys(rows.column_names, ""), data)
    return rows.select_columns([c for c in _COLUMNS[form] if c in rows.column_names])


def _saved(folder: Path, split: str) -> Any:
    """What ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk`` wrote."""
    from datasets import load_dataset, load_from_disk

    if not (folder / "state.json").exists() and not (folder / "dataset_dict.json").exists():
        return load_dataset(str(folder), split=split)
    loaded: Any = load_from_disk(str(folder))
    if not isinstance(loaded, dict):
        return loaded
    if split not in loaded:
        raise ValueError(f"{folder} has no split {split!r}; it has {', '.join(loaded)}")
    return loaded[split]


def _named(data: str, split: str) -> Any:
    from datasets import load_dataset

    name, _, config = data.partition(":")
    try:
        return load_dataset(name, config or None, split=split)
    except (ConnectionError, FileNotFoundError) as error:
        raise FileNotFoundError(f"{data}: no such file, and the hub did not give it") from error


def _json_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines, or of one JSON list, with the columns of their form.

    Every row has all columns of the form: ``datasets`` would take those of the first row alone.
    """
    text = path.read_text(encoding="utf-8")
    if text.lstrip().startswith("["):
        found = [(f"{path}, row {i}", row) for i, row in enumerate(json.loads(text), start=1)]
    else:
        found = [
            (f"{path}, line {i}", _json(line, f"{path}, line {i}"))
            for i, line in enumerate(text.splitlines(), start=1)
            if line.strip()
        ]
    if not found:
        raise ValueError(f"{path} holds no rows")
    first = kind(found[0][1], found[0][0])
    rows = []
    for where, row in found:
        form = kind(row, where)
        if form != first:
            raise ValueError(f"{where}: every row must have the form of the first, {first!r}")
        rows.append({name: row.get(name) for name in _COLUMNS[form]})
    return rows


def _json(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error}") from error


def kind(row: Any, where: str) -> str:
    """Which of the accepted forms a row has: a key of ``_COLUMNS``; ValueError for none."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a row must be an object, got {type(row).__name__}")
    if "messages" in row:
        return "messages"
    if "instruction" in row and "output" in row:
        return "instruction"
    if "text" in row:
        return "text"
    raise ValueError(f"{where}: a row must have {FIELDS}, got {', '.join(row) or 'nothing'}")


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


def tokenize(
    rows: Any,
    tokenizer: Any,
    max_length: int | None,
    completion_only: bool = True,
    processes: int | None = None,
) -> Any:
    """``input_ids`` and ``labels`` of rows, ready for a Trainer.

    Of instruction rows only the output is learned, of messages every answer of the assistant (the
    labels of the rest are ``IGNORED``), unless ``completion_only`` is False. Text becomes windows
    of ``max_length`` tokens, so that none of a long document is lost; a longer conversation is cut
    at its end, and dropped where nothing to learn is left.
    """
    form = kind(dict.fromkeys(rows.column_names, ""), "data")
    encode: Callable[..., list[tuple[list[int], list[int]]]] = {
        "text": _encode_text,
        "instruction": _encode_instruction,
        "messages": _encode_messages,
    }[form]

    def encode_batch(batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        ids, labels = [], []
        for values in zip(*batch.values(), strict=True):
            row = dict(zip(batch, values, strict=True))
            for one, learned in encode(row, tokenizer, max_length):
                one, learned = one[:max_length], learned[:max_length]
                learned = learned if completion_only else list(one)
                if any(label != IGNORED for label in learned[1:]):
                    ids.append(one)
                    labels.append(learned)
        return {"input_ids": ids, "labels": labels}

    done = rows.map(
        encode_batch,
        batched=True,
        remove_columns=rows.column_names,
        num_proc=processes,
        desc="Tokenizing",
    )
    if len(done) == 0:
        raise ValueError(f"no row has anything to learn in its first {max_length} tokens")
    return done


def _encode_text(
    row: dict[str, Any], tokenizer: Any, max_length: int | None
) -> list[tuple[list[int], list[int]]]:
    ids = _with_eos(tokenizer(row["text"], verbose=False)["input_ids"], tokenizer)
    size = max_length or len(ids)
    windows = [ids[i : i + size] for i in range(0, len(ids), size)]
    return [(window, list(window)) for window in windows]


def _encode_instruction(
    row: dict[str, Any], tokenizer: Any, max_length: int | None
) -> list[tuple[list[int], list[int]]]:
    prompt = instruction_prompt(row)
    before = tokenizer(prompt)["input_ids"]
    # Together, because a tokenizer may merge what meets at the boundary.
    ids = _with_eos(tokenizer(prompt + row["output"], verbose=False)["input_ids"], tokenizer)
    start = _common(before, ids)
    return [(ids, [IGNORED] * start + ids[start:])]


def _encode_messages(
    row: dict[str, Any], tokenizer: Any, max_length: int | None
) -> list[tuple[list[int], list[int]]]:
    """An answer is what the template adds for it after the prompt that asks for it.

    Templates that render an answer differently once another follows it (those that drop what the
    model thought) leave the earlier answers unlearned.
    """
    messages = row["messages"]
    ids = _chat_ids(tokenizer, messages)
    labels = [IGNORED] * len(ids)
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked = _chat_ids(tokenizer, messages[:number], add_generation_prompt=True)
        last = number == len(messages) - 1
        answered = ids if last else _chat_ids(tokenizer, messages[: number + 1])
        start, end = _common(asked, ids), _common(answered, ids)
        labels[start:end] = ids[start:end]
    return [(ids, labels)]


def _chat_ids(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> list[int]:
    if not messages:
        return []
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options)


def _with_eos(ids: list[int], tokenizer: Any) -> list[int]:
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def _common(one: list[int], other: list[int]) -> int:
    """Length of the common prefix."""
    for i, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return i
    return min(len(one), len(other))
