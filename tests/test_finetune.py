"""What ``nf4 finetune`` learns from its data, and what it leaves on disk when it is stopped."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

from checkpoint_folder import write_checkpoint  # noqa: E402 needs transformers

from nf4.cli import data, finetune  # noqa: E402
from nf4.cli.models import load_tokenizer  # noqa: E402
from nf4.integrations.trainer import why_broken  # noqa: E402

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finetune")
    write_checkpoint(folder, "base")
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    tokenizer = load_tokenizer(str(folder / "base"))
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def rows_of(tmp_path: Path, rows: list[dict[str, Any]]) -> Any:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return data.load_rows(str(path))


def learned(row: dict[str, list[int]], tokenizer: Any) -> list[str]:
    """The stretches of a row that have labels, as text."""
    stretches: list[list[int]] = [[]]
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        assert label in (token, data.IGNORED)
        if label != data.IGNORED:
            stretches[-1].append(token)
        elif stretches[-1]:
            stretches.append([])
    return [tokenizer.decode(ids) for ids in stretches if ids]


def test_of_instructions_only_the_output_is_learned(tmp_path: Path, tokenizer: Any) -> None:
    rows = rows_of(
        tmp_path,
        [
            {"instruction": "say 1", "output": "fox 1"},
            {"instruction": "say", "input": "what is extra", "output": "fox 2", "id": 7},
        ],
    )
    done = data.tokenize(rows, tokenizer, 64)
    end = tokenizer.eos_token
    assert [learned(row, tokenizer) for row in done] == [[f"fox 1{end}"], [f"fox 2{end}"]]
    # The second row has a column that the first has not.
    assert "what is extra" in tokenizer.decode(done[1]["input_ids"])
    everything = data.tokenize(rows, tokenizer, 64, completion_only=False)
    assert everything[0]["labels"] == everything[0]["input_ids"] == done[0]["input_ids"]


def test_of_messages_every_answer_is_learned(tmp_path: Path, tokenizer: Any) -> None:
    turns = [("system", "be brief"), ("user", "one"), ("assistant", "fox"), ("user", "two")]
    messages = [{"role": r, "content": c} for r, c in [*turns, ("assistant", "dogs")]]
    (row,) = data.tokenize(rows_of(tmp_path, [{"messages": messages}]), tokenizer, 256)
    end = tokenizer.eos_token
    assert learned(row, tokenizer) == [f"fox{end}", f"dogs{end}"]
    whole = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert row["input_ids"] == whole


def test_none_of_a_long_text_is_lost(tmp_path: Path, folder: Path, tokenizer: Any) -> None:
    rows = data.load_rows(str(folder / "text.txt"))
    done = data.tokenize(rows, tokenizer, 32)
    assert len(done) > 4 and max(map(len, done["input_ids"])) == 32
    ids = [token for row in done["input_ids"] for token in row]
    text = (folder / "text.txt").read_text()
    assert tokenizer.decode(ids) == text + tokenizer.eos_token
    assert done["labels"] == done["input_ids"]


def test_what_leaves_nothing_to_learn_is_left_out(tmp_path: Path, tokenizer: Any) -> None:
    long = {"instruction": "quick brown " * 50, "output": "fox"}
    short = {"instruction": "say", "output": "fox"}
    assert len(data.tokenize(rows_of(tmp_path, [long, short]), tokenizer, 40)) == 1
    with pytest.raises(ValueError, match="no row has anything to learn in its first 40 tokens"):
        data.tokenize(rows_of(tmp_path, [long]), tokenizer, 40)


def test_data_comes_in_many_forms(tmp_path: Path) -> None:
    rows = [{"instruction": f"say {i}", "output": f"fox {i}", "id": i} for i in range(3)]
    columns = ["instruction", "output"]
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1))
    assert data.load_rows(str(tmp_path / "list.json"))[2]["output"] == "fox 2"
    table = datasets.Dataset.from_list(rows)
    table.save_to_disk(tmp_path / "saved")
    assert data.load_rows(str(tmp_path / "saved")).column_names == columns
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(tmp_path / "all")
    assert len(data.load_rows(str(tmp_path / "all"), "test")) == 1
    with pytest.raises(ValueError, match="no split 'dev'; it has train, test"):
        data.load_rows(str(tmp_path / "all"), "dev")
    (tmp_path / "notes.md").write_text("# one document")
    assert data.load_rows(str(tmp_path / "notes.md"))["text"] == ["# one document"]
    (tmp_path / "odd.xml").write_text("<x/>")
    with pytest.raises(ValueError, match=r"odd.xml: data must be a .txt"):
        data.load_rows(str(tmp_path / "odd.xml"))
    mixed = [{"text": "a"}, {"instruction": "b", "output": "c"}]
    with pytest.raises(ValueError, match="line 2: every row must have the form of the first"):
        rows_of(tmp_path, mixed)


@pytest.fixture
def train(folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """Run the command in this process; its output folder."""

    def run(*words: object, name: str = "run") -> Path:
        model = ("--model", folder / "base", "--data", folder / "pairs.jsonl")
        arguments = (*model, f"--output={tmp_path / name}", "--save_steps", 2, *words)
        assert finetune.main([str(word) for word in arguments]) == 0
        return tmp_path / name

    return run


def losses(output: Path) -> dict[int, float]:
    log = json.loads((output / "log.json").read_text())
    return {row["step"]: row["loss"] for row in log if "loss" in row}


class Killed(BaseException):
    """Ends the process as far as files go."""


def test_a_stop_at_any_moment_loses_no_checkpoint(
    train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the writing of a checkpoint stops, what has a checkpoint's name is whole, and the
    run that resumes goes on to the same losses as one that was never stopped."""
    straight = losses(train("--max_steps", 6, name="straight"))
    output = tmp_path / "run"
    steps = ("_save_optimizer_and_scheduler", "_save_rng_state", "save_model")
    for number in (1, 2, 3):
        with monkeypatch.context() as patch:
            left, name = [number], random.choice(steps)
            original = getattr(finetune.AtomicCheckpoints, name)

            def stop(self: Any, *args: Any, left: Any = left, original: Any = original) -> None:
                left[0] -= 1
                if left[0] == 0:
                    raise Killed
                original(self, *args)

            def stop_save(self: Any, *args: Any, stop: Any = stop, **kwargs: Any) -> None:
                stop(self, *args)

            patch.setattr(
                finetune.AtomicCheckpoints, name, stop_save if name == "save_model" else stop
            )
            # A killed process cleans nothing up.
            patch.setattr(finetune.shutil, "rmtree", lambda *args, **kwargs: None)
            with pytest.raises(Killed):
                train("--max_steps", 6)
        kept = list(output.glob("checkpoint-*"))
        assert all(why_broken(path) is None for path in kept), [why_broken(p) for p in kept]
        assert not (output / "adapter_model.safetensors").exists()
    assert losses(train("--max_steps", 6)) == straight
    assert not list(output.glob(".partial*"))


def test_a_finished_run_is_not_trained_further(train: Callable[..., Path], capsys: Any) -> None:
    output = train("--max_steps", 3)
    before = (output / "adapter_model.safetensors").read_bytes()
    (output / "adapter_model.safetensors").unlink()  # as if killed after the last checkpoint
    train("--max_steps", 3)
    assert "All 3 steps are done" in capsys.readouterr().out
    assert (output / "adapter_model.safetensors").read_bytes() == before
    assert max(losses(output)) == 3
    assert max(losses(train("--max_steps", 4))) == 4
    epochs = train("--num_train_epochs", 1, name="epochs")  # two batches of eight
    assert max(losses(epochs)) == 2
    train("--num_train_epochs", 1, name="epochs")
    assert max(losses(epochs)) == 2


def test_old_checkpoints_go_and_the_best_stays(train: Callable[..., Path], folder: Path) -> None:
    words = ("--eval_data", folder / "pairs.jsonl", "--eval_strategy", "steps", "--eval_steps", 2)
    best = ("--metric_for_best_model", "loss", "--load_best_model_at_end", True)
    # A rate that ruins the model: the first checkpoint is the best.
    output = train(*words, *best, "--max_steps", 8, "--learning_rate", 30, "--logging_steps", 99)
    names = sorted(path.name for path in output.glob("checkpoint-*"))
    state = json.loads((output / names[-1] / "trainer_state.json").read_text())
    assert Path(state["best_model_checkpoint"]).parent == output
    assert Path(state["best_model_checkpoint"]).name in names
    assert len(names) == 2 and "checkpoint-8" in names


def test_help_is_a_page_and_errors_are_a_line(folder: Path, capsys: Any) -> None:
    assert finetune.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) < 80 and "--help-all" in text
    assert "--max_steps" in text and "(default: paged_adamw_8bit)" in text
    assert finetune.main(["--help-all"]) == 0
    assert "--dataloader_num_workers" in capsys.readouterr().out
    model = ["--model", str(folder / "base"), "--data", str(folder / "pairs.jsonl")]
    with pytest.raises(ValueError, match="--output is needed"):
        finetune.main(model)
    for words, message in (
        (["--output", "o", "--max_step", "3"], "no option --max_step; did you mean --max_steps?"),
        (["--output", "o", "--format", "int3"], "invalid choice: 'int3'"),
        (["--config"], "--config needs a YAML file"),
    ):
        with pytest.raises(SystemExit) as stopped:
            finetune.main([*model, *words])
        assert stopped.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line and line.startswith("nf4 finetune: ")
