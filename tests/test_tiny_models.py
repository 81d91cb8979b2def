"""The shipped test models load offline from stock classes and know what they were trained for."""

from __future__ import annotations

import json
import socket

import numpy as np
import pytest
import torch

from vlm_prune.eval.models import MODELS, load_model, model_path
from vlm_prune.eval.scenes import make_scene, make_scenes, pope_questions
from vlm_prune.eval.tiny.configs import build_internvl, build_llava
from vlm_prune.eval.tiny.curves import Subject
from vlm_prune.eval.tiny.features import token_shares
from vlm_prune.eval.tiny.grow import grow_decoder
from vlm_prune.eval.tiny.metrics import chair_counts, chair_figures, pope_counts, pope_figures
from vlm_prune.eval.tiny.pruning import RULES, choose
from vlm_prune.eval.tiny.views import SIZES, views

HONEST = ("tiny-llava", "tiny-internvl")
CAPTION = "Please describe this image in detail."


@pytest.fixture(scope="module")
def models():
    return {name: load_model(name) for name in MODELS}


def sizes_of(name):
    return SIZES if name == "tiny-internvl" else ((128, 128),)


def reply(model, processor, image, text):
    inputs = processor(images=image, text=f"USER: <image>\n{text} ASSISTANT:", return_tensors="pt")
    output = model.generate(**inputs)
    return processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("name", MODELS)
def test_folder_is_complete_and_small(name):
    path = model_path(name)
    files = ("config.json", "generation_config.json", "processor_config.json", "tokenizer.json", "README.md")
    assert all((path / file).exists() for file in files)
    assert (path / "model.safetensors").stat().st_size <= 12 * 2**20
    assert "auto_map" not in json.loads((path / "config.json").read_text())


def test_loading_needs_no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("network access")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    model, _ = load_model("tiny-llava", dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert not model.training


def test_unknown_name_is_explained():
    with pytest.raises(ValueError, match=r"'tinyllava'.*Did you mean 'tiny-llava'.*tiny-internvl"):
        load_model("tinyllava")


@pytest.mark.parametrize("name", HONEST)
def test_honest_models_answer_fresh_scenes(models, name):
    model, processor = models[name]
    scenes = list(make_scenes(6, 31337, sizes_of(name), min_names=3))
    chair = sum(chair_counts(reply(model, processor, scene.image, CAPTION), scene.names) for scene in scenes)
    questions = pope_questions(scenes, "adversarial", 0)
    answers = [reply(model, processor, scenes[q["image"]].image, q["text"]) for q in questions]
    assert set(answers) <= {"yes", "no"}
    assert pope_figures(pope_counts(answers, [q["label"] for q in questions]))["accuracy"] >= 0.94
    assert chair_figures(chair)["recall"] >= 0.85
    assert chair_figures(chair)["chair_i"] <= 0.1


def test_twin_hallucinates_but_sees(models):
    model, processor = models["tiny-llava-halluc"]
    scenes = list(make_scenes(16, 31337, min_names=3))
    chair = sum(chair_counts(reply(model, processor, scene.image, CAPTION), scene.names) for scene in scenes)
    assert 0.05 <= chair_figures(chair)["chair_s"] <= 0.6
    assert chair_figures(chair)["recall"] >= 0.8


@pytest.mark.parametrize("name", MODELS)
def test_chat_template_equals_plain_prompt(models, name):
    _, processor = models[name]
    scene = make_scene(8)
    text = "Is there an arrow in the image?"
    content = [{"type": "image", "image": scene.image}, {"type": "text", "text": text}]
    chat = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    plain = processor(images=scene.image, text=f"USER: <image>\n{text} ASSISTANT:", return_tensors="pt")
    assert torch.equal(chat["input_ids"], plain["input_ids"])
    assert torch.equal(chat["pixel_values"], plain["pixel_values"])
    assert processor.tokenizer.unk_token_id not in plain["input_ids"]


@pytest.mark.parametrize(
    ("size", "tiles"), [((128, 128), 1), ((256, 128), 3), ((384, 128), 4), ((256, 256), 5)]
)
def test_internvl_tiles_are_the_training_views(models, size, tiles):
    _, processor = models["tiny-internvl"]
    scene = make_scene(4, size)
    inputs = processor(
        images=scene.image, text="USER: <image>\nDescribe the image. ASSISTANT:", return_tensors="pt"
    )
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 64 * tiles
    pixels = torch.stack([view.pixels for view in views(scene)]).float() / 127.5 - 1
    torch.testing.assert_close(inputs["pixel_values"], pixels, atol=1e-5, rtol=0)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("size", "cell"), [((128, 128), 8), ((256, 256), 16)])
@pytest.mark.parametrize("ratio", [0.5, 0.25, 0.0625])
def test_reference_rules_keep_exactly_their_budget(rule, size, cell, ratio):
    shares = token_shares(make_scene(12, size), cell)
    total = shares.shape[-1]
    budget = round(total * ratio)
    kept = choose(rule, budget, np.linspace(0, 1, total), shares, 128 // cell, (1,))
    assert len(kept) == budget == len(set(kept.tolist()))
    assert (np.diff(kept) > 0).all()
    if rule == "oracle":
        assert (shares[..., kept].sum((0, -1)) > 0).all()


@pytest.mark.parametrize("name", MODELS)
def test_packed_prompts_equal_separate_prompts(models, name):
    model, processor = models[name]
    scenes = list(make_scenes(3, 6, sizes_of(name)[-1:], min_names=3))
    scene, subject = scenes[0], Subject(model, processor, scenes)
    total = len(subject.encoded[0].features)
    features, kept = subject.encoded[0].features[None], [np.arange(total)]
    answers = subject.answer([0], features, kept, total, packed=True)[0]
    assert answers == [reply(model, processor, scene.image, text) for text in subject.texts[0]]
    assert subject.caption(features, kept, total, packed=False) == [
        reply(model, processor, scene.image, CAPTION)
    ]


def test_grown_decoder_computes_what_its_source_does():
    torch.manual_seed(0)
    (source, _), (target, _) = build_llava(), build_internvl()
    grow_decoder(source, target)
    ids = torch.randint(10, 100, (2, 17))
    with torch.no_grad():
        expected = source.lm_head(source.model.language_model(input_ids=ids).last_hidden_state)
        grown = target.lm_head(target.model.language_model(input_ids=ids).last_hidden_state)
    torch.testing.assert_close(grown, expected, atol=1e-5, rtol=0)
