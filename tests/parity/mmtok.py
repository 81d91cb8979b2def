"""MMTok against its released code: how words spread over tokens, and the tokens kept."""

from pathlib import Path

import torch

from tests.parity._files import Golden, npz_cases
from vlm_prune.policies.mmtok import multimodal_cover, spread

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}

cases = npz_cases


def check(case: Path) -> None:
    golden = Golden(case)
    meta, dtype = golden.meta, DTYPES[golden.meta.get("dtype", "f32")]
    text, projected, tower = (golden[name].to(dtype)[None] for name in ("text", "vision", "vision_clip"))
    of_text = spread(text, projected, meta["tv_temp"], official=True)
    torch.testing.assert_close(of_text[0], golden["P"], rtol=1e-4, atol=1e-7)
    candidates = torch.ones(tower.shape[:2], dtype=torch.bool)
    candidates[:, golden["padding"]] = False
    keep = min(meta["K"], tower.shape[1])
    # in half precision the released code rounds unit vectors, which is not ours to repeat
    for official in (True, False) if dtype == torch.float32 else (True,):
        order = multimodal_cover(
            tower,
            keep,
            text,
            projected,
            candidates=candidates,
            alpha=meta["alpha"],
            text_temperature=meta["tv_temp"],
            image_temperature=meta["vv_temp"],
            official=official,
        )
        assert order[0].sort().values.tolist() == golden["keep"].tolist()
