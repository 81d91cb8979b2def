"""Images pruned by the client: embeddings of any length, many in one batch, answered as the Hugging Face model does."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from tests.serving.engines import Ask, ask, engine, expect, hugging_face, same, scene
from vlm_prune import Keep, Policy, pruned
from vlm_prune.policies.scores import global_attention
from vlm_prune.serving import image_embeds


@dataclass(frozen=True)
class Mass(Policy):
    """Keeps as many tokens as it takes to hold a share of the CLS attention: a budget that depends on the image."""

    name = "mass"
    stages = ("encode",)
    share: float = 0.6

    def tower_layers(self, feature_layer):
        return (feature_layer,)

    def encode(self, view):
        view.carry["mass"] = view.per_unit(global_attention(view.attention))

    def encode_final(self, view):
        mass = view.carry["mass"]
        ranked = mass.sort(-1, descending=True).values
        counts = (ranked.cumsum(-1) < self.share * ranked.sum(-1, keepdim=True)).sum(-1) + 1
        return Keep.top(mass, counts.tolist())


@pytest.mark.parametrize("plan", [None, {"policy": "flowcut", "ratio": 0.25}], ids=["unpruned", "pruned"])
@pytest.mark.parametrize("name", ["tiny-llava", "tiny-internvl"])
def test_embeddings_of_different_lengths_in_one_batch(name, plan):
    model, processor = hugging_face(name)
    images = [scene(seed) for seed in range(4)] + [scene(5, (256, 128))]
    policy = {"policy": Mass(), "ratio": 0.5}
    with pruned(model, **policy):
        embeds = image_embeds(model, processor, images)
    assert len({len(rows) for rows in embeds}) > 2
    asks = [Ask((image,)) for image in images] + [Ask((images[0], images[2]))]
    sent = [[rows] for rows in embeds] + [[embeds[0], embeds[2]]]
    requests = [
        {"prompt": one.prompt, "multi_modal_data": {"image": rows}}
        for one, rows in zip(asks, sent, strict=True)
    ]
    with engine(name, plan, enable_mm_embeds=True) as llm:
        same(ask(llm, asks, requests=requests), expect(name, asks, policy))
        # images themselves, beside them, are pruned as the engine was told
        both = [*requests[:2], asks[1].request()]
        expected = [*expect(name, asks[:2], policy), *expect(name, asks[1:2], plan)]
        same(ask(llm, asks[:3], requests=both), expected)
