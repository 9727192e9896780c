"""Asks an exported folder as a user of `transformers` would, of whatever release this Python has.

    python tests/other_release.py JOB OUT

JOB is JSON: `folders` and `facts`, each with `photo`, `crop` (files) and `question`. OUT is an npz:
of each folder and fact the prompt, its ids, the pixels, their grids and the answer's ids.
"""

import inspect
import json
import logging
import sys

import numpy as np
import torch
import transformers
from PIL import Image


def ask(folder, facts):
    """What a folder makes of the facts: a dict of arrays for each."""
    warned = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warned.append(record.getMessage())
    logging.getLogger("transformers").addHandler(handler)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    # Several releases suspect every large vocabulary, unless the config says which wrote it.
    assert not [text for text in warned if "incorrect" in text], warned
    processor = _processor(folder)
    kind = transformers.Qwen2_5_VLForConditionalGeneration
    model, loading = kind.from_pretrained(folder, output_loading_info=True)
    model = model.eval()
    assert not loading["missing_keys"], loading
    assert not loading["unexpected_keys"], loading
    assert not loading["mismatched_keys"], loading
    assert model.dtype == torch.float32, model.dtype
    assert type(transformers.AutoModelForImageTextToText.from_pretrained(folder)) is kind
    with open(f"{folder}/config.json", encoding="utf-8") as file:
        saved = json.load(file)
    ends = model.lm_head.weight, model.get_input_embeddings().weight
    assert (ends[0].data_ptr() == ends[1].data_ptr()) == saved["tie_word_embeddings"]
    return [_ask(tokenizer, processor, model, fact) for fact in facts]


def _processor(folder):
    """The image processor that goes through Pillow: that of torchvision has pixels of its own."""
    try:
        return transformers.AutoImageProcessor.from_pretrained(folder, use_fast=False)
    except ImportError:  # Some releases of 5 want torchvision to choose one, whichever they choose.
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
            Qwen2VLImageProcessorPil,
        )

        return Qwen2VLImageProcessorPil.from_pretrained(folder)


def _ask(tokenizer, processor, model, fact):
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": fact["question"]}]
    messages = [{"role": "user", "content": content}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    images = [Image.open(fact[key]) for key in ("photo", "crop")]
    pixels = processor(images=images, return_tensors="pt")
    grids = pixels["image_grid_thw"]
    # As `transformers`' own processor of text and images does.
    before, between, after = text.split("<|image_pad|>")
    counts = (grids.prod(1) // processor.merge_size**2).tolist()
    pads = ["<|image_pad|>" * count for count in counts]
    inputs = tokenizer([before + pads[0] + between + pads[1] + after], return_tensors="pt")
    assert {*inputs} == {"input_ids", "attention_mask"}, {*inputs}
    ids = inputs["input_ids"]
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        image = tokenizer.convert_tokens_to_ids("<|image_pad|>")
        inputs["mm_token_type_ids"] = (ids == image).int()
    with torch.no_grad():
        answer = model.generate(**inputs, **pixels)
    return {
        "text": np.array(text),
        "ids": ids[0].numpy(),
        "pixels": pixels["pixel_values"].numpy(),
        "grids": grids.numpy(),
        "answer": answer[0, ids.shape[1] :].numpy(),
    }


def main(job, out):
    torch.set_num_threads(2)
    with open(job, encoding="utf-8") as file:
        job = json.load(file)
    found = {}
    for folder in job["folders"]:
        for number, values in enumerate(ask(folder, job["facts"])):
            found |= {f"{folder}|{number}|{key}": value for key, value in values.items()}
    np.savez(out, release=np.array(transformers.__version__), **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
