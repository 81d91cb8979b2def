"""Every policy in half precision: sane choices, finite answers, as close to fp32 as the stock model is."""

from __future__ import annotations

import pytest
import torch

from tests.models import IMAGE, LAYOUTS, make, prompt, shared
from tests.policy_table import ENCODE, TABLE, options
from tests.test_training import text
from vlm_prune import pruned

DTYPES = [torch.bfloat16, torch.float16]
STEPS = 3


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def call(model, batch, dtype):
    """Logits; visual tokens kept of each tile, rows left in the decoder, tokens computed by each tower layer."""
    inputs = {**batch.inputs, "pixel_values": batch.pixels.to(dtype)}
    out, receipt = model(**inputs), getattr(model, "pruning", None) and model.pruning.receipt
    if receipt is None:
        return (out.logits,)
    return out.logits, receipt.kept, receipt.decoder_tokens, receipt.tower_units


def error(ours, exact):
    """How far logits are from those of fp32, relative to the spread of these."""
    return ((ours.float() - exact).std() / exact.std()).item()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).split(".")[1])
@pytest.mark.parametrize("family", ["llava", pytest.param("internvl", marks=pytest.mark.slow)])
@pytest.mark.parametrize("policy", [*TABLE, "flowcut+vhr"])
def test_half_precision(policy, family, dtype):
    batch, model = prompt(family, LAYOUTS["ragged"]), make(family)
    stock = call(model, batch, torch.float32)[0]
    with pruned(model, **options(policy)):
        exact, kept, rows, computed = call(model, batch, torch.float32)
    model.to(dtype)
    own = error(call(model, batch, dtype)[0], stock)
    with pruned(model, **options(policy)):
        logits, ours, left, tower = call(model, batch, dtype)
        inputs = {**batch.inputs, "pixel_values": batch.pixels.to(dtype)}
        loss = model(**inputs, labels=text(batch)).loss
        new = model.generate(**inputs, max_new_tokens=STEPS)
    assert logits.dtype == dtype
    assert logits.isfinite().all()
    assert loss.isfinite()
    assert new.shape[1] == batch.ids.shape[1] + STEPS
    live = logits.any(-1)
    assert live[batch.mask.bool() & (batch.ids != IMAGE)].all()  # text is never dropped
    if TABLE[policy.split("+")[0]].holds in ("tile", "prompt", "exit", "all"):
        assert [len(units) for units in ours] == [len(units) for units in kept]
        assert left == rows
    overlap = [len({*a} & {*b}) / len(a) for a, b in zip(ours, kept, strict=True)]
    assert min(overlap) >= 0.5 or policy == "random"  # which draws by the bits of the pixels
    # FlowCut may drop the same token a layer earlier
    if ours == kept and tower == computed and torch.equal(live, exact.any(-1)) and policy in ENCODE:
        assert error(logits[live], exact[live]) <= 3 * own


@pytest.mark.parametrize("policy", ["vcd", "mustdrop", "zooprune", "prumerge"])
def test_whatever_dtype_new_tensors_have_by_default(policy):
    """Code that loads a model in half precision often leaves torch's default dtype at that."""
    model, batch = shared("llava"), prompt("llava", LAYOUTS["ragged"])
    with pruned(model, **options(policy)):
        want = model(**batch.inputs).logits
    torch.set_default_dtype(torch.bfloat16)  # set back by the fixture of all tests
    with pruned(model, **options(policy)):
        assert torch.equal(model(**batch.inputs).logits, want)
