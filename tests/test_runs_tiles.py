"""Records of models that cut images of any resolution into tiles: each says which part of the image a tile shows."""

from __future__ import annotations

import io
import json

import pytest
import transformers
from PIL import Image
from rich.console import Console

from tests.arranged import GRIDS, SIDE
from tests.models import make
from vlm_prune.eval.models import model_path
from vlm_prune.eval.runs import RunFolder, run
from vlm_prune.eval.runs.yaml_file import parse_config

TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] %}"
    "{{ '<image>' if c['type'] == 'image' else c['text'] }}{% endfor %}{% endfor %}"
)


def processor(family: str):
    """One that fits the tiny models, with the tokeniser of a shipped one."""
    words = transformers.AutoTokenizer.from_pretrained(model_path("tiny-llava"))
    sizes = [[h * 4 * SIDE, w * 4 * SIDE] for h, w in GRIDS]
    if family == "llava_next":
        images = transformers.LlavaNextImageProcessor(
            size={"shortest_edge": 4 * SIDE}, crop_size=4 * SIDE, image_grid_pinpoints=sizes
        )
        return transformers.LlavaNextProcessor(
            images, words, patch_size=4, vision_feature_select_strategy="default", chat_template=TEMPLATE,
            num_additional_image_tokens=1,
        )  # fmt: skip
    images = transformers.LlavaOnevisionImageProcessor(
        size={"height": 4 * SIDE, "width": 4 * SIDE}, image_grid_pinpoints=sizes
    )
    return transformers.LlavaOnevisionProcessor(
        images, words, transformers.LlavaOnevisionVideoProcessor(), num_image_tokens=SIDE * SIDE,
        vision_feature_select_strategy="full", vision_aspect_ratio="anyres_max_2", chat_template=TEMPLATE,
    )  # fmt: skip


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_tiles_of_images_of_several_sizes_in_one_batch(family, tmp_path):
    made, model = processor(family), make(family)
    model.resize_token_embeddings(len(made.tokenizer))
    model.config.image_token_id = made.tokenizer.convert_tokens_to_ids("<image>")
    made.save_pretrained(tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    rows = []
    for number, size in enumerate([(24, 24), (50, 30), (48, 48), (20, 60)]):
        Image.new("RGB", size, (200, 90, 40)).save(tmp_path / f"{number}.png")
        rows.append({"id": number, "image": f"{number}.png", "question": "is there a star ?", "answer": "no"})
    (tmp_path / "q.json").write_text(json.dumps(rows))
    text = f"""\
models: [{{model: {tmp_path / "model"}, label: m}}]
policies: [none, flowcut, {{policy: flowcut, label: whole, per: image}}]
tokens: [9]
tasks:
  - {{task: vqa, data: {{jsonl: {tmp_path / "q.json"}, images: {tmp_path}}}, max_new_tokens: 1}}
output: {tmp_path / "run"}
"""
    done = run.execute(parse_config(text, "run.yaml"), Console(file=io.StringIO()))
    assert not done.failed, list(done.failed.values())
    folder = RunFolder(tmp_path / "run")
    none, flowcut, whole = (folder.samples(row["cell"]) for row in folder.rows())
    for record in none:
        width, height = record["image"]["size"]
        assert record["tiles"][0]["box"] == [0, 0, width, height]
        shown = [tile["box"] for tile in record["tiles"][1:]]
        assert min(left for left, _, _, _ in shown) <= 0 <= width <= max(right for _, _, right, _ in shown)
        assert min(top for _, top, _, _ in shown) <= 0 <= height <= max(bottom for _, _, _, bottom in shown)
    for record in flowcut:
        assert all(tile["kept"] is not None and len(tile["kept"]) <= 9 * 4 for tile in record["tiles"])
    assert [record["tokens"] for record in whole] == [9] * 4
    assert folder.rows()[2]["budget"] == {"tokens": 9, "per": "image"}
