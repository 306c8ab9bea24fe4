"""nf4.drop_in: the tutorial flow in processes of its own, and what install() does to a process."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

pytest.importorskip("transformers")
pytest.importorskip("peft")

ROOT = Path(__file__).parent
# The tests' own process may have several threads of everything; these run beside each other.
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(ROOT.parent), str(ROOT), os.environ.get("PYTHONPATH", "")]),
    "OMP_NUM_THREADS": "1",
}


def python(*arguments: str, check: bool = True) -> str:
    """Run Python on ``arguments``; its output, after asserting that it succeeded."""
    process = subprocess.run(
        [sys.executable, *arguments],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    output = process.stdout + process.stderr
    assert (process.returncode == 0) is check, output
    return output


def save_tokenizer(folder: Path) -> None:
    """A word tokenizer for the tutorial's sentence."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", "the", "cat", "sat", "on", "mat", "and", "dog"]
    model = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def value(output: str, label: str) -> str:
    found = re.search(rf"^{label} (.*)$", output, re.MULTILINE)
    assert found, output
    return found.group(1)


@pytest.mark.parametrize(
    ("name", "layers", "adapted", "by_line"), [("llama", 14, 8, False), ("opt", 12, 12, True)]
)
def test_the_tutorial_runs_unchanged(
    name: str, layers: int, adapted: int, by_line: bool, tmp_path: Path
) -> None:
    """By ``python -m nf4.drop_in``, and with one line above the script."""
    pytest.importorskip("datasets")
    model, out = tmp_path / name, tmp_path / "out"
    getattr(tiny, name)().save_pretrained(model)
    save_tokenizer(model)
    script = ROOT / "tutorial.py"
    if by_line:
        text = script.read_text()
        script = tmp_path / "tutorial.py"
        script.write_text(f"import nf4.drop_in\n{text}")
    command = [] if by_line else ["-m", "nf4.drop_in"]
    command = [str(ROOT / "without_bitsandbytes.py"), *command, str(script)]

    trained = python(*command, "train", str(model), str(out))
    assert value(trained, "quantized") == f"{layers} 4bit True"
    assert value(trained, "optimizer").startswith("nf4.optim") and "PagedAdamW8bit" in trained
    losses = ast.literal_eval(value(trained, "losses"))
    assert len(losses) == 4 and losses[-1] < losses[0] - 0.1
    # 4 steps of 2 batches each, once more in the backward for checkpointing.
    assert value(trained, "fused calls") == str(4 * 2 * 2 * adapted)
    assert "nf4" in value(trained, "bitsandbytes") and "trainable params: " in trained
    checkpoints = sorted(p.name for p in out.glob("checkpoint-*"))
    assert checkpoints == ["checkpoint-2", "checkpoint-4"]

    used = python(*command, "use", str(model), str(out))
    lengths = re.findall(r"^generated (\d+)$", used, re.MULTILINE)
    assert len(lengths) == 2 and all(1 <= int(length) <= 5 for length in lengths)
    assert int(value(used, "fused calls")) >= 2 * adapted
    assert float(value(used, "merged")) < 0.03  # of the largest logit, in bfloat16

    reload = (
        "import sys, torch; sys.modules['nf4'] = sys.modules['bitsandbytes'] = None\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"merged = {str(out / 'merged')!r}\n"
        "model = AutoModelForCausalLM.from_pretrained(merged, dtype='auto')\n"
        "inputs = AutoTokenizer.from_pretrained(merged)('the cat', return_tensors='pt')\n"
        f"assert torch.equal(model(**inputs).logits, torch.load({str(out / 'logits.pt')!r}))\n"
    )
    python("-c", reload)


ABSENT = """
import sys
from importlib.abc import MetaPathFinder
class Block(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "bitsandbytes":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
"""

FACE = (
    ABSENT
    + """
import importlib.metadata, importlib.util, torch
import nf4
assert "nf4.drop_in" not in sys.modules and "bitsandbytes" not in sys.modules
import nf4.drop_in
assert nf4.drop_in.status() == nf4.drop_in.Status(active=True, bitsandbytes="nf4")
nf4.drop_in.install()  # a second time changes nothing
import bitsandbytes as bnb
from bitsandbytes.functional import QuantState, quantize_4bit
from bitsandbytes.nn.modules import Params4bit
from bitsandbytes.optim import AdamW8bit, GlobalOptimManager, Lion, PagedAdamW32bit
assert importlib.util.find_spec("bitsandbytes") is bnb.__spec__
assert importlib.metadata.version("bitsandbytes") == bnb.__version__
assert bnb.nn.Params4bit is Params4bit and bnb.optim.AdamW8bit is nf4.optim.AdamW8bit
assert bnb.matmul_4bit is bnb.functional.matmul_4bit
assert "transformers" not in sys.modules  # nothing heavy came along
p = torch.nn.Parameter(torch.zeros(4))
assert bnb.optim.Adam8bit([p]).param_groups[0]["weight_decay"] == 0
assert bnb.optim.AdamW8bit([p]).param_groups[0]["weight_decay"] == 1e-2
for refuse in (lambda: Lion([p]), lambda: bnb.nn.Linear8bitLt(4, 4),
               lambda: GlobalOptimManager.get_instance().override_config(p, "optim_bits", 32)):
    try:
        refuse()
    except NotImplementedError as error:
        assert "nf4.drop_in" in str(error)
    else:
        raise AssertionError(refuse)
assert not hasattr(bnb, "research") and not hasattr(bnb.functional, "lib")
from transformers import BitsAndBytesConfig
assert bnb.BitsAndBytesConfig is BitsAndBytesConfig
from transformers.utils import is_bitsandbytes_available
from accelerate.utils import is_bnb_available
assert is_bitsandbytes_available() and is_bnb_available(min_version="0.43.2")
nf4.drop_in.uninstall()
assert nf4.drop_in.status() == nf4.drop_in.Status(active=False, bitsandbytes="nothing")
try:
    import bitsandbytes
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("bitsandbytes is still there")
try:
    nf4.drop_in.install()
except RuntimeError as error:
    assert "before transformers" in str(error), error
else:
    raise AssertionError("installed too late")
"""
)


def test_the_face_of_bitsandbytes() -> None:
    python("-c", FACE)


def test_called_too_late_it_raises() -> None:
    output = python("-c", "import transformers, nf4.drop_in", check=False)
    assert "RuntimeError: nf4.drop_in: must be imported before transformers" in output
    assert "python -m nf4.drop_in script.py" in output


PRESENT = """
import sys, nf4.drop_in, torch
assert nf4.drop_in.status() == nf4.drop_in.Status(active=True, bitsandbytes="real")
assert "bitsandbytes" not in sys.modules
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments
from peft import LoraConfig, get_peft_model
config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=config)
assert sum(type(m) is nf4.NF4Linear for m in model.modules()) == 14
model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
assert type(model.base_model.model.model.layers[0].self_attn.q_proj).__name__ == "LoraNF4"
for name, kind in (("paged_adamw_8bit", "PagedAdamW8bit"), ("adamw_bnb_8bit", "AdamW8bit")):
    args = TrainingArguments("out", optim=name, use_cpu=True)
    found, _ = Trainer.get_optimizer_cls_and_kwargs(args)
    assert found is getattr(nf4.optim, kind), found
import bitsandbytes
assert not hasattr(bitsandbytes, "_nf4") and hasattr(bitsandbytes.nn, "Linear8bitLt")
nf4.drop_in.uninstall()
found, _ = Trainer.get_optimizer_cls_and_kwargs(args)
assert found.__module__.startswith("bitsandbytes"), found
"""


def test_beside_an_installed_bitsandbytes(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    tiny.llama().save_pretrained(tmp_path)
    python("-c", PRESENT, str(tmp_path))


METHODS = (
    ABSENT
    + """
import nf4.drop_in
import sys
import peft, tiny, torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
targets = {"target_modules": ["q_proj", "down_proj"]}
configs = [
    peft.AdaLoraConfig(total_step=9, **targets),
    peft.IA3Config(feedforward_modules=["down_proj"], **targets),
    peft.OFTConfig(r=0, oft_block_size=8, **targets),
    peft.RandLoraConfig(r=4, **targets),
    peft.RoadConfig(group_size=16, **targets),
    peft.VeraConfig(r=4, **targets),
]
ids = tiny.token_ids(2)
for config in configs:
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(
        sys.argv[1], quantization_config=settings, dtype=torch.bfloat16
    )
    model = peft.get_peft_model(peft.prepare_model_for_kbit_training(model), config).train()
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    merged = model.merge_and_unload()
    assert type(merged.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    assert not hasattr(merged, "is_loaded_in_4bit")
print("methods", len(configs))
"""
)


def test_other_methods_than_lora(tmp_path: Path) -> None:
    tiny.llama().save_pretrained(tmp_path)
    assert value(python("-c", METHODS, str(tmp_path)), "methods") == "6"


def test_the_launcher_explains_itself(tmp_path: Path) -> None:
    assert "usage: python -m nf4.drop_in SCRIPT" in python("-m", "nf4.drop_in", check=False)
    assert "must be a file" in python("-m", "nf4.drop_in", "absent.py", check=False)
    script = tmp_path / "script.py"
    script.write_text("import sys, helper; print(__name__, sys.argv[1:], helper.value)")
    (tmp_path / "helper.py").write_text("value = 7")
    output = python("-m", "nf4.drop_in", str(script), "--lr", "1")
    assert "__main__ ['--lr', '1'] 7" in output
