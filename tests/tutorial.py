"""A QLoRA script as tutorials have it, written for bitsandbytes: it says nothing of nf4.

``tutorial.py train MODEL OUT`` fine-tunes and saves an adapter; ``tutorial.py use MODEL OUT``
generates with it, merges it and saves the merged model. Run by ``python -m nf4.drop_in``, or with
``import nf4.drop_in`` written above it.
"""

import sys

import bitsandbytes as bnb
import torch
from bitsandbytes import BitsAndBytesConfig  # tutorials import it from here by mistake
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

mode, model_id, output_dir = sys.argv[1:4]
gpu = torch.cuda.is_available()

bnb_config = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_compute_dtype=torch.float16,
    bnb_4bit_use_double_quant=True,
    bnb_4bit_quant_storage=None,
)
model = AutoModelForCausalLM.from_pretrained(
    model_id, quantization_config=bnb_config, device_map="auto" if gpu else None
)
tokenizer = AutoTokenizer.from_pretrained(model_id)
tokenizer.pad_token = tokenizer.eos_token
linear = [name for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)]
print("quantized", len(linear), "4bit", getattr(model, "is_loaded_in_4bit", False))

if mode == "train":
    model = prepare_model_for_kbit_training(model)
    lora_config = LoraConfig(
        r=16,
        lora_alpha=32,
        lora_dropout=0.05,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "fc1", "fc2"],
        bias="none",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, lora_config)
    model.print_trainable_parameters()

    text = {"text": ["the cat sat on the mat and the dog ran after the cat"] * 16}
    data = Dataset.from_dict(text).map(
        lambda row: tokenizer(row["text"], truncation=True, max_length=32),
        batched=True,
        remove_columns=["text"],
    )
    args = TrainingArguments(
        output_dir=output_dir,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=4,
        learning_rate=2e-3,
        logging_steps=1,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=2,
        optim="paged_adamw_8bit",
        fp16=gpu,
        bf16=not gpu,
        use_cpu=not gpu,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=data,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    print("optimizer", type(optimizer).__module__, type(optimizer).__name__)
    print("losses", [row["loss"] for row in trainer.state.log_history if "loss" in row])
    model.save_pretrained(f"{output_dir}/adapter")
else:
    model = PeftModel.from_pretrained(model, f"{output_dir}/adapter")
    inputs = tokenizer("the cat", return_tensors="pt").to(model.device)
    torch.manual_seed(0)
    for sampling in ({}, {"do_sample": True}):
        output = model.generate(**inputs, max_new_tokens=5, temperature=0.7, top_p=0.9, **sampling)
        print("generated", output.shape[1] - inputs["input_ids"].shape[1])
    logits = model(**inputs).logits.float()
    merged = model.merge_and_unload()
    off = (merged(**inputs).logits.float() - logits).abs().max() / logits.abs().max()
    print("merged", off.item())
    merged.save_pretrained(f"{output_dir}/merged")
    torch.save(merged(**inputs).logits, f"{output_dir}/logits.pt")
    tokenizer.save_pretrained(f"{output_dir}/merged")
print("bitsandbytes", bnb.__version__)
