"""`vlm-prune ask`: the answer is the model's, its figures are the receipt's, on every family."""

from __future__ import annotations

import re

import pytest
import torch
from typer.testing import CliRunner

from tests.models import shared
from tests.test_processors import PHOTOS, PROCESSORS
from vlm_prune import prune, pruned, unprune
from vlm_prune.cli import app
from vlm_prune.eval import load_model
from vlm_prune.eval.ask import ask, cost_rows
from vlm_prune.eval.scenes import make_scene

QUESTION = "Please describe this image in detail."


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    make_scene(2026).image.save(path)
    return str(path)


def call(*arguments):
    return CliRunner().invoke(app, ["ask", *arguments], terminal_width=200)


def test_an_answer_is_that_of_generate():
    model, processor = load_model("tiny-llava")
    image, pieces = make_scene(2026).image, []
    answer = ask(model, processor, image, QUESTION, "flowcut", {"tokens": 64}, show=pieces.append)
    assert not hasattr(model, "pruning")
    prune(model, "flowcut", tokens=64)
    inputs = processor(images=image, text=f"USER: <image>\n{QUESTION} ASSISTANT:", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=128, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert answer.text == processor.decode(output, skip_special_tokens=True).strip()
    assert answer.new_tokens == len(output)
    assert answer.receipt.kept == model.pruning.receipt.kept
    unprune(model)
    assert "".join(pieces).strip() == answer.text
    assert len(pieces) > 3, "the answer came in one piece"
    assert answer.entered == answer.left == 64
    assert 0 < answer.first_ms < answer.total_ms


@pytest.mark.parametrize("family", PROCESSORS)
@torch.no_grad()
def test_every_family_through_its_stock_processor_and_chat_template(family):
    model, processor = shared(family), PROCESSORS[family]()
    answer = ask(model, processor, PHOTOS[0], "w5 w6", "uniform", {"ratio": 0.3}, max_new_tokens=3)
    content = [{"type": "image", "image": PHOTOS[0]}, {"type": "text", "text": "w5 w6"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    with pruned(model, "uniform", ratio=0.3):
        model(**inputs)
        assert model.pruning.receipt.kept == answer.receipt.kept
    assert answer.new_tokens == 3
    assert 0 < answer.entered < model.config.get_text_config().vocab_size * 10


def test_tokens_dropped_inside_the_decoder_are_told_from_those_that_entered():
    model, processor = load_model("tiny-llava")
    answer = ask(model, processor, make_scene(1).image, QUESTION, "fastv", {"ratio": 0.5}, max_new_tokens=2)
    assert (answer.entered, answer.left) == (256, 128)
    rows = dict(cost_rows({"fastv": answer})[1:])
    assert rows["visual tokens"] == "256"
    assert rows["visual tokens, last layer"] == "128"
    assert rows["KV cache"] == f"{answer.receipt.kv_bytes / 2**20:.1f} MiB"
    assert "peak GPU memory" not in rows or torch.cuda.is_available()


def test_on_the_command_line(photo):
    result = call(photo, QUESTION, "--tokens", "64", "--compare")
    assert result.exit_code == 0, result.output
    assert re.search(r"^unpruned: the image shows", result.output, re.MULTILINE)
    assert re.search(r"^flowcut: the image shows", result.output, re.MULTILINE)
    assert re.search(r"visual tokens +256 +64", result.output)
    assert re.search(r"KV cache +2\.6 MiB +0\.\d MiB", result.output)
    alone = call(photo, QUESTION, "--policy", "none", "--max-new-tokens", "3")
    assert alone.exit_code == 0, alone.output
    assert alone.output.startswith("the image shows")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", "flowcutt"], 'Did you mean "flowcut"?'),
        (["--set", "compat"], "write name=value"),
        (["--tokens", "1000"], "this model has 256 visual tokens"),
        (["--model", "tiny-lava"], 'Did you mean "tiny-llava"?'),
        (["--dtype", "half"], "choose one of float32"),
    ],
)
def test_bad_input_is_one_line(photo, arguments, message):
    result = call(photo, QUESTION, *arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert result.output.startswith("error: ")
    assert result.output.count("\n") == 1


def test_an_image_that_is_not_there(tmp_path):
    result = call(str(tmp_path / "none.jpg"), QUESTION)
    assert result.exit_code == 2
    assert "none.jpg" in result.output


def test_a_known_checkpoint_says_its_size_before_it_is_looked_for(photo):
    result = call(photo, QUESTION, "--model", "llava-hf/llava-1.5-7b-hf")
    assert result.exit_code == 2
    assert "7.06 billion weights; 14.1 GB to download" in result.output
    assert "hf download llava-hf/llava-1.5-7b-hf" in result.output
