"""From photographs of any size to answers: the stock processor of each family, mixed resolutions, chats."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.models import IMAGE, PAD, VOCAB, shared
from vlm_prune import pruned

VIDEO, START, END = 61, 62, 63
SPECIAL = {
    "image_token": "<image>",
    "context_image_token": "<image>",
    "video_token": "<video>",
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "vision_start_token": "<img>",
    "vision_end_token": "</img>",
}
TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image> {% elif c['type'] == 'video' %}<video> {% else %}{{ c['text'] }} {% endif %}"
    "{% endfor %}{% endfor %}"
)


def tokenizer():
    names = {PAD: "<pad>", IMAGE: "<image>", VIDEO: "<video>", START: "<img>", END: "</img>"}
    words = {names.get(i, f"w{i}"): i for i in range(VOCAB)}
    core = Tokenizer(models.WordLevel(words, unk_token="w3"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        unk_token="w3",
        padding_side="left",
        extra_special_tokens=SPECIAL,
    )


def clip(**more):
    return hf.CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}, **more)


def llava():
    return hf.LlavaProcessor(
        clip(),
        tokenizer(),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def pinpoints(family):
    return shared(family).config.image_grid_pinpoints


def llava_next():
    images = hf.LlavaNextImageProcessor(
        size={"shortest_edge": 24},
        crop_size={"height": 24, "width": 24},
        image_grid_pinpoints=pinpoints("llava_next"),
    )
    return hf.LlavaNextProcessor(
        images,
        tokenizer(),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def llava_next_video():
    images = hf.LlavaNextImageProcessor(
        size={"shortest_edge": 24},
        crop_size={"height": 24, "width": 24},
        image_grid_pinpoints=pinpoints("llava_next"),
    )
    videos = hf.LlavaNextVideoVideoProcessor(size={"height": 24, "width": 24}, do_center_crop=False)
    return hf.LlavaNextVideoProcessor(
        video_processor=videos,
        image_processor=images,
        tokenizer=tokenizer(),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def llava_onevision():
    images = hf.LlavaOnevisionImageProcessor(
        size={"height": 24, "width": 24}, image_grid_pinpoints=pinpoints("llava_onevision")
    )
    videos = hf.LlavaOnevisionVideoProcessor(size={"height": 24, "width": 24})
    return hf.LlavaOnevisionProcessor(
        images,
        tokenizer(),
        videos,
        num_image_tokens=36,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_2",
        chat_template=TEMPLATE,
    )


def internvl():
    images = hf.GotOcr2ImageProcessor(
        size={"height": 32, "width": 32}, crop_to_patches=True, min_patches=1, max_patches=4
    )
    videos = hf.InternVLVideoProcessor(size={"height": 32, "width": 32})
    return hf.InternVLProcessor(images, tokenizer(), videos, image_seq_length=16, chat_template=TEMPLATE)


def qwen(processor, video):
    def make():
        sizes = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
        images = hf.Qwen2VLImageProcessor(**sizes, size={"shortest_edge": 64, "longest_edge": 2000})
        videos = video(**sizes, size={"shortest_edge": 64, "longest_edge": 4000})
        return processor(images, tokenizer(), videos, chat_template=TEMPLATE)

    return make


PROCESSORS = {
    "llava": llava,
    "vipllava": llava,
    "llava_next": llava_next,
    "llava_next_video": llava_next_video,
    "llava_onevision": llava_onevision,
    "internvl": internvl,
    "qwen2_vl": qwen(hf.Qwen2VLProcessor, hf.Qwen2VLVideoProcessor),
    "qwen2_5_vl": qwen(hf.Qwen2_5_VLProcessor, hf.Qwen2VLVideoProcessor),
    "qwen3_vl": qwen(hf.Qwen3VLProcessor, hf.Qwen3VLVideoProcessor),
}
families = pytest.mark.parametrize("family", PROCESSORS)


def photo(width, height, seed):
    values = np.random.default_rng(seed).integers(0, 255, (height // 4, width // 4, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


PHOTOS = [photo(64, 44, 0), photo(30, 90, 1), photo(100, 40, 2), photo(40, 40, 3)]
ROWS = [
    ("w5 <image> w7 w8", PHOTOS[:1]),
    ("<image> w9 <image> w10 w11", PHOTOS[1:3]),
    ("w12 w13", []),
    ("<image> w14", PHOTOS[3:]),
]


def inputs(processor, rows):
    pictures = [picture for _, row in rows for picture in row]
    given = {"images": pictures} if pictures else {}
    return processor(text=[text for text, _ in rows], **given, padding=True, return_tensors="pt")


def generate(model, given, **more):
    fixed = {"max_new_tokens": 4, "suppress_tokens": [PAD, IMAGE, VIDEO, START, END], "do_sample": False}
    return model.generate(**given, **fixed, pad_token_id=PAD, **more)[:, given["input_ids"].shape[1] :]


@families
@pytest.mark.parametrize("policy", ["flowcut", "uniform"])
@torch.no_grad()
def test_photographs_of_mixed_sizes(policy, family):
    model, processor = shared(family), PROCESSORS[family]()
    together = inputs(processor, ROWS)
    with pruned(model, policy, ratio=0.3):
        logits, kept = model(**together).logits, model.pruning.receipt.kept
        tokens, alone = generate(model, together), []
        assert logits.shape[:2] == together["input_ids"].shape
        for b, row in enumerate(ROWS):
            if family == "llava_onevision" and len(row[1]) > 1:
                continue  # its processor cuts several images of a lone prompt into tiles as if each had one of its own
            single = inputs(processor, [row])
            real = together["attention_mask"][b].bool()
            assert torch.equal(together["input_ids"][b, real], single["input_ids"][0])
            torch.testing.assert_close(logits[b, real], model(**single).logits[0], atol=3e-4, rtol=1e-3)
            alone += model.pruning.receipt.kept if row[1] else []
            assert generate(model, single)[0].tolist() == tokens[b].tolist()
        assert family == "llava_onevision" or alone == kept
    assert sum(map(len, kept)) < (together["input_ids"] == IMAGE).sum()


@families
@torch.no_grad()
def test_a_chat_that_adds_an_image(family):
    """Each turn is a prompt of its own, made by the processor's chat template."""
    model, processor = shared(family), PROCESSORS[family]()
    chat = [
        {
            "role": "user",
            "content": [{"type": "image", "image": PHOTOS[0]}, {"type": "text", "text": "w5 w6"}],
        }
    ]
    with pruned(model, "uniform", ratio=0.3):
        tiles = []
        for turn in range(2):
            given = processor.apply_chat_template(
                chat, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
            )
            answer = generate(model, given)
            assert answer.shape == (1, 4)
            tiles.append(len(model.pruning.receipt.kept))
            said = {"type": "text", "text": processor.decode(answer[0])}
            more = [{"type": "text", "text": "w20"}, {"type": "image", "image": PHOTOS[2 + turn]}]
            chat += [{"role": "assistant", "content": [said]}, {"role": "user", "content": more}]
    assert tiles[0] >= 1
    # OneVision shows several images of a prompt as one tile each, and a lone one as many
    assert tiles[1] > tiles[0] or family == "llava_onevision"
