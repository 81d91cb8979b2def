"""From what lmms-eval asks to what a model takes: messages, images, padded batches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import BatchFeature, ProcessorMixin
from transformers.image_utils import load_image as fetch_image

from vlm_prune.errors import UnsupportedCallError
from vlm_prune.eval.images import load_image, upright_rgb

PLACEHOLDER = "<image>"
"""Where tasks mark the place of an image in plain text."""


@dataclass(frozen=True)
class Prompt:
    """A conversation as chat templates take it, ``{"type": "image"}`` in the places of its images, in order."""

    messages: list[dict[str, Any]]
    images: list[Image.Image]

    def text(self, processor: ProcessorMixin) -> str:
        """The rendered prompt, up to where the answer begins. Each image is one placeholder still."""
        text: str = processor.apply_chat_template(self.messages, add_generation_prompt=True, tokenize=False)
        return text

    @property
    def size(self) -> tuple[int, int, int]:
        """What grows with the length of the prompt, to put similar ones together."""
        pixels = sum(image.width * image.height for image in self.images)
        words = sum(len(part.get("text", "")) for message in self.messages for part in message["content"])
        return len(self.images), pixels, words


def from_text(
    text: str, visuals: Sequence[Any] | None, image_token: str = PLACEHOLDER, system: str = ""
) -> Prompt:
    """One user turn. Images stand where the text has their placeholders; if these do not fit, before the text."""
    images = [open_image(visual) for visual in visuals or ()]
    pieces = text.split(PLACEHOLDER)
    if len(pieces) != len(images) + 1 or not images:
        pieces = [*[""] * len(images), "".join(pieces)]
    content: list[dict[str, Any]] = []
    for number, piece in enumerate(pieces):
        if number:
            content.append({"type": "image"})
        if piece:
            content.append({"type": "text", "text": piece.replace(image_token, "")})
    return Prompt([*_system(system), {"role": "user", "content": content}], images)


def from_messages(messages: Iterable[Any], image_token: str = PLACEHOLDER, system: str = "") -> Prompt:
    """From the messages of a chat task: ``role`` and ``content``, whose images are under ``url``."""
    images: list[Image.Image] = []
    plain: list[dict[str, Any]] = []
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        kept: list[dict[str, Any]] = []
        for part in parts:
            if part["type"] == "text":
                # a literal placeholder would be taken for an image
                kept.append({"type": "text", "text": part["text"].replace(image_token, "")})
            elif part["type"] == "image":
                images.append(open_image(part.get("url", part.get("image"))))
                kept.append({"type": "image"})
            else:
                raise _not_an_image(part["type"])
        plain.append({"role": message["role"], "content": kept})
    return Prompt([*([] if plain and plain[0]["role"] == "system" else _system(system)), *plain], images)


def open_image(visual: Any) -> Image.Image:
    """An upright RGB image from an image, a path, a URL, or the bytes of a file as datasets store them."""
    if isinstance(visual, dict) and isinstance(visual.get("bytes"), bytes):
        return load_image(visual["bytes"], str(visual.get("path") or ""))
    elif isinstance(visual, dict) and isinstance(visual.get("path"), str):
        visual = visual["path"]
    if isinstance(visual, str):
        if visual.rpartition(".")[2].lower() in {"mp4", "avi", "mov", "mkv", "webm", "wav", "mp3", "flac"}:
            raise _not_an_image(visual)
        if Path(visual).is_file():
            return load_image(visual)
        visual = fetch_image(visual)
    if not isinstance(visual, Image.Image):
        raise _not_an_image(type(visual).__name__)
    return upright_rgb(visual)


def collate(processor: ProcessorMixin, prompts: Sequence[Prompt]) -> BatchFeature:
    """Inputs of a batch, padded on the left. Rows may have any number of images of any size, also none."""
    texts = [prompt.text(processor) for prompt in prompts]
    images = [prompt.images for prompt in prompts]
    return processor(
        text=texts,
        images=images if any(images) else None,
        padding=True,
        padding_side="left",
        add_special_tokens=special_tokens_wanted(processor, texts[0]),
        return_tensors="pt",
    )


def special_tokens_wanted(processor: ProcessorMixin, text: str) -> bool:
    """Whether the tokenizer has still to add its special tokens: not if the chat template has done so."""
    bos = processor.tokenizer.bos_token
    return bos is None or not text.startswith(bos)


def _system(text: str) -> list[dict[str, Any]]:
    return [{"role": "system", "content": [{"type": "text", "text": text}]}] if text else []


def _not_an_image(what: str) -> UnsupportedCallError:
    return UnsupportedCallError(
        f"The task shows {what!r} to the model. vlm_prune takes images and text: no video, no audio."
    )
