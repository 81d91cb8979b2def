"""What a Qwen2.5-VL engine does not start with."""

from __future__ import annotations

import pytest

from tests.serving.engines import engine
from tests.serving.qwen_prompts import PLAN
from vlm_prune.policies.flowcut import FlowCut


def test_engines_that_would_be_wrong_do_not_start(folder, monkeypatch):
    refused = [
        ({"policy": "flowcut", "compat": "official"}, {}, "released code"),
        ({"policy": "flowcut", "positions": "compact"}, {}, "place in the image"),
        (PLAN, {"mm_encoder_tp_mode": "data"}, "mm_encoder_tp_mode"),
    ]
    for plan, options, word in refused:
        with pytest.raises(Exception, match=word), engine(folder, plan, **options):
            pass
    with monkeypatch.context() as patch:
        patch.setattr(FlowCut, "encode", lambda *args: None)
        with pytest.raises(Exception, match="room for 4"), engine(folder, PLAN):
            pass
