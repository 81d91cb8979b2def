"""What transformers builds on ``generate``: its pipeline, continuous batching, and a search that crops the cache."""

from __future__ import annotations

import base64
import io
import json
import socket
import time
import urllib.request
from contextlib import suppress

import pytest
import torch
import transformers
from transformers import DynamicCache, GenerationConfig, pipeline

from tests.models import IMAGE, PAD, prompt, shared
from tests.policy_checks import tiny
from tests.policy_table import options
from tests.reference import CASES, budget, expect
from vlm_prune import pruned
from vlm_prune.eval import load_model
from vlm_prune.eval.scenes import make_scene
from vlm_prune.versions import CACHE


@pytest.mark.parametrize("policy", ["flowcut", "fastv", "flowcut+vhr"])
@pytest.mark.parametrize("name", ["tiny-llava", "tiny-internvl"])
def test_pipeline(name, policy):
    """The text is what ``generate`` says to what the processor makes of the same images and prompts."""
    model, processor = load_model(name)
    images = [make_scene(seed).image for seed in (1, 2)]
    sign = processor.image_token
    texts = [
        f"USER: {sign}\nIs there a circle? ASSISTANT:",
        f"USER: {sign}\nWhat is in this image? ASSISTANT:",
    ]
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    settings = {"max_new_tokens": 24, "do_sample": False}

    def ask():
        return [
            pipe(images=image, text=text, generate_kwargs=settings)[0]["generated_text"]
            for image, text in zip(images, texts, strict=True)
        ]

    stock = ask()
    with pruned(model, policy, ratio=0.1):
        said = ask()
        assert model.pruning.receipt.decoder_tokens[-1] < model.pruning.receipt.prompt_tokens
        for image, text, answer in zip(images, texts, said, strict=True):
            inputs = processor(images=image, text=text, return_tensors="pt")
            output = model.generate(**inputs, **settings)
            new = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            assert answer.endswith(new)
    assert ask() == stock


@pytest.mark.skipif(
    not hasattr(transformers.generation.configuration_utils, "ContinuousBatchingConfig"),
    reason="a small paged cache needs a newer version of transformers",
)
@pytest.mark.parametrize("policy", ["random", "fastv", "vhr"])
def test_continuous_batching(policy):
    """transformers batches requests of token ids and knows no images there: a pruned model answers as a stock one."""
    model, batch = tiny("llava"), prompt("llava", [(7,), (9,)])
    texts = [row.ids[0].tolist() for row in batch.rows()]
    settings = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=-1, pad_token_id=PAD)
    small = transformers.generation.configuration_utils.ContinuousBatchingConfig(
        num_blocks=16, max_batch_tokens=64
    )

    def serve():
        out = model.generate_batch(
            texts, generation_config=settings, continuous_batching_config=small, progress_bar=False
        )
        return [(request.generated_tokens, request.error) for request in out.values()]

    stock = serve()
    assert [error for _, error in stock] == [None, None]
    with pruned(model, **options(policy)):
        assert serve() == stock


def contrastive(model, inputs, steps=5, top=3, penalty=0.6):
    """Contrastive search of one sequence (Su et al. 2022): of the likely tokens the one least like what came before."""
    length = inputs.get("input_ids", inputs.get("inputs_embeds")).shape[1]
    out = model(**inputs, **{CACHE: DynamicCache()}, output_hidden_states=True)
    cache, logits, context = getattr(out, CACHE), out.logits[:, -1], out.hidden_states[-1]
    context = context[:, context.any(-1)[0]]  # dropped rows are zero
    position = inputs["position_ids"][:, -1:] if "position_ids" in inputs else torch.tensor([[length - 1]])
    mask, tokens = inputs["attention_mask"], []
    for _ in range(steps):
        logits[:, IMAGE] = -torch.inf
        likely, candidates = logits.softmax(-1).topk(top)
        cache.batch_repeat_interleave(top)
        position, mask = position + 1, torch.nn.functional.pad(mask, (0, 1), value=1)
        tried = model(
            input_ids=candidates[0, :, None],
            attention_mask=mask.expand(top, -1),
            position_ids=position.expand(top, -1),
            **{CACHE: cache},
            output_hidden_states=True,
        )
        new = tried.hidden_states[-1]
        alike = torch.cosine_similarity(new, context.expand(top, -1, -1), dim=-1).max(-1).values
        best = ((1 - penalty) * likely[0] - penalty * alike).argmax()
        cache.crop(-1)  # and once more, with the token that was chosen: stock code does so to save memory
        cache.batch_select_indices(best[None])
        tokens.append(int(candidates[0, best]))
        out = model(
            input_ids=candidates[:, best][None],
            attention_mask=mask,
            position_ids=position,
            **{CACHE: cache},
            output_hidden_states=True,
        )
        logits, context = out.logits[:, -1], torch.cat([context, out.hidden_states[-1]], 1)
    return tokens


@torch.no_grad()
@pytest.mark.parametrize(("policy", "family", "positions"), CASES[:4])
def test_contrastive_search(policy, family, positions):
    model, batch = shared(family), prompt(family, [(3, -1, 5)])
    _, short = expect(model, batch, policy, positions)
    want = contrastive(model, short.inputs)
    with pruned(model, policy, positions=positions, **budget(policy)):
        assert contrastive(model, batch.inputs) == want


@pytest.mark.slow
def test_transformers_serve():
    """A model that ``transformers serve`` has loaded can be pruned, and answers over HTTP as by ``generate``."""
    pytest.importorskip("uvicorn")
    pytest.importorskip("fastapi")
    from transformers.cli.serve import Serve

    from vlm_prune import prune, unprune
    from vlm_prune.eval.models import model_path

    model, processor = load_model("tiny-llava")
    image, question, path = (
        make_scene(1).image,
        "Please describe this image in detail.",
        str(model_path("tiny-llava")),
    )
    data = io.BytesIO()
    image.save(data, "PNG")
    url = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    body = {
        "model": path,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 20,
        "stream": False,
    }
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve = Serve(force_model=path, port=port, non_blocking=True)

    def served():
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["choices"][0]["message"]["content"]

    def generated():
        inputs = processor(images=image, text=f"USER: <image>\n{question} ASSISTANT:", return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=20, do_sample=False)
        return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    try:
        (loaded,) = serve._model_manager.loaded_models.values()
        for _ in range(50):
            with suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            time.sleep(0.2)
        stock = generated()
        assert served().strip() == stock
        prune(loaded.model, "flowcut", tokens=3)
        with pruned(model, "flowcut", tokens=3):
            assert served().strip() == generated() != stock
        unprune(loaded.model)
        assert served().strip() == stock
    finally:
        serve.kill_server()
