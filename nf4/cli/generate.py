"""``nf4 generate``: complete prompts with a model, quantized, and an adapter."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from nf4.cli.data import instruction_prompt
from nf4.cli.models import (
    add_model_arguments,
    config_of,
    load_model,
    load_tokenizer,
    quiet_transformers,
)
from nf4.cli.parser import Parser


def main(arguments: list[str]) -> int:
    parser = Parser("nf4 generate", __doc__)
    add_model_arguments(parser, adapter=True)
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", help="one prompt; its completion streams to the terminal")
    prompts.add_argument(
        "--prompts", type=Path, help="a file: one prompt a line, or JSONL rows of 'prompt'"
    )
    parser.add_argument("--16bit", dest="plain", action="store_true", help="do not quantize")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--chat", action="store_true", help="apply the chat template")
    form.add_argument(
        "--instruction",
        action="store_true",
        help="wrap each prompt as finetune wraps rows of instruction and output",
    )
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--batch-size", type=int, default=8, help="prompts of a file at once")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args(arguments)
    with quiet_transformers():
        _run(args)
    return 0


def _run(args: argparse.Namespace) -> None:
    import nf4

    tokenizer = load_tokenizer(args.model, args.chat)
    tokenizer.padding_side = "left"
    model = load_model(args.model, args.dtype, None if args.plain else config_of(args))
    if args.adapter:
        if args.plain:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, args.adapter).eval()
        else:
            nf4.load_adapter(model, args.adapter).eval()
    options: dict[str, Any] = {"max_new_tokens": args.max_new_tokens, "do_sample": False}
    if args.temperature > 0:
        options |= {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p}
    texts = _read_prompts(args.prompts) if args.prompts else [args.prompt]
    if args.prompt is not None and not args.json:
        from transformers import TextStreamer

        options["streamer"] = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        _complete(model, tokenizer, _wrapped(texts, tokenizer, args), args.chat, options)
        return
    for start in range(0, len(texts), args.batch_size):
        batch = texts[start : start + args.batch_size]
        wrapped = _wrapped(batch, tokenizer, args)
        completed = _complete(model, tokenizer, wrapped, args.chat, options)
        for prompt, text in zip(batch, completed, strict=True):
            if args.json:
                print(json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False))
            else:
                print(f"{prompt}{text}\n")
            sys.stdout.flush()


def _read_prompts(path: Path) -> list[str]:
    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        if path.suffix == ".jsonl":
            try:
                line = json.loads(line)["prompt"]
            except (ValueError, KeyError, TypeError) as error:
                where = f"{path}, line {number}"
                raise ValueError(f"{where}: must be an object with 'prompt'") from error
        prompts.append(line)
    if not prompts:
        raise ValueError(f"{path} holds no prompt")
    return prompts


def _wrapped(prompts: list[str], tokenizer: Any, args: argparse.Namespace) -> list[str]:
    """The prompts as the model was trained to see them."""
    if args.instruction:
        return [instruction_prompt({"instruction": prompt}) for prompt in prompts]
    if not args.chat:
        return prompts
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        for prompt in prompts
    ]


def _complete(
    model: Any, tokenizer: Any, prompts: list[str], chat: bool, options: dict[str, Any]
) -> list[str]:
    import torch

    inputs = tokenizer(
        prompts,
        return_tensors="pt",
        padding=len(prompts) > 1,
        add_special_tokens=not chat,  # a chat template writes them itself
    ).to(model.device)
    inputs.pop("token_type_ids", None)
    with torch.inference_mode():
        ids = model.generate(**inputs, pad_token_id=tokenizer.pad_token_id, **options)
    return tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
