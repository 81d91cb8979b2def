"""One Qwen2.5-VL engine and what it is sent: prompts again, embeddings, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.serving.engines import ask, engine, expect, hugging_face, same, scene
from tests.serving.qwen_prompts import ASKS, PLAN, TALL, WIDE, See


@pytest.fixture(scope="module")
def served(folder):
    with engine(folder, PLAN, enable_mm_embeds=True) as llm:
        yield llm


def test_prompts_that_are_cached(folder, served):
    expected = expect(folder, ASKS, PLAN)
    for one, answer in zip(ASKS, expected, strict=True):
        same(ask(served, [one]), [answer])
        same(ask(served, [one]), [answer])
    again = [See(one.images, "Where is it?", one.budget) for one in ASKS]
    same(ask(served, again), expect(folder, again, PLAN))


def test_images_that_come_as_embeddings_are_whole(folder, served):
    one = See((scene(1, WIDE), scene(2, TALL)))
    model, processor = hugging_face(folder)
    inputs = processor.image_processor(list(one.images), return_tensors="pt")
    with torch.no_grad():
        features = model.get_image_features(**inputs)
    # what goes to the decoder's first layers stands after each row
    layers = [features.pooler_output, *(getattr(features, "deepstack_features", None) or ())]
    rows = [layer if isinstance(layer, torch.Tensor) else torch.cat([*layer]) for layer in layers]
    images = {"image_embeds": torch.cat(rows, 1), "image_grid_thw": inputs["image_grid_thw"]}
    request = {"prompt": one.prompt, "multi_modal_data": {"image": images}}
    same(ask(served, [one], requests=[request]), expect(folder, [one], None))


def test_what_is_refused_leaves_the_engine_going(folder, served):
    video = np.zeros((4, 112, 112, 3), np.uint8)
    request = {
        "prompt": "<|vision_start|><video><|vision_end|>",
        "multi_modal_data": {"video": [(video, {"fps": 2.0, "frames_indices": [0, 1, 2, 3]})]},
    }
    with pytest.raises(Exception, match="video"):
        ask(served, [See(())], requests=[request])
    ends = {"prompt": "USER: <image>", "multi_modal_data": {"image": [scene(1)]}}
    with pytest.raises(Exception, match="ends with an image"):
        ask(served, [See(())], requests=[ends])
    with pytest.raises(Exception, match="at least one token"):
        ask(served, [See((scene(1),), budget={"tokens": 0})])
    same(ask(served, ASKS[:1]), expect(folder, ASKS[:1], PLAN))
