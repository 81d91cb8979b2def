"""What a Qwen2.5-VL engine does not start with."""

from __future__ import annotations

import pytest

from tests.serving.engines import ask, engine, expect, same
from tests.serving.qwen_prompts import ASKS, PLAN, mended
from vlm_prune.policies.flowcut import FlowCut


def test_engines_that_would_be_wrong_do_not_start(folder, monkeypatch):
    refused = [
        ({"policy": "flowcut", "compat": "official"}, {}, "released code"),
        ({"policy": "flowcut", "positions": "compact"}, {}, "place in the image"),
        (PLAN, {"mm_encoder_tp_mode": "data"}, "mm_encoder_tp_mode"),
    ]
    for plan, options, word in refused:
        with pytest.raises(Exception, match=word), mended(folder, plan, **options):
            pass
    with monkeypatch.context() as patch:
        patch.setattr(FlowCut, "encode", lambda *args: None)
        with pytest.raises(Exception, match="room for 4"), mended(folder, PLAN):
            pass


def test_an_engine_on_cpu_says_what_has_to_be_mended(folder, monkeypatch):
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    stock = CPUModelRunner.load_model
    monkeypatch.setattr(CPUModelRunner, "load_model", getattr(stock, "stock", stock))
    with pytest.raises(Exception, match=r"serving\.cpu\.Mended"), engine(folder, PLAN):
        pass
    with engine(folder, None) as llm:
        same(ask(llm, ASKS[:1]), expect(folder, ASKS[:1], None))
