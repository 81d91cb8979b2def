"""SparseVLM and SparseVLM+ against their released code: raters, scores, clusters, every cut, caches, decoding.

Where a cut makes two clusters, densities tie, and noise decides in the released code: such cases are compared up to
there.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from tests.parity._files import Golden, npz_cases
from tests.parity._given import recorded_model
from vlm_prune import pruned
from vlm_prune.policies.density_peaks import cluster_means, density_peaks
from vlm_prune.policies.scores import top_mask
from vlm_prune.policies.sparsevlm import RATER, SparseVLM, head_relation, rater_scores
from vlm_prune.versions import CACHE, cache_of

cases = npz_cases
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


@torch.no_grad()
def check(case: Path) -> None:
    golden = Golden(case)
    {"llm": check_llm, "cluster": check_cluster, "score": check_score}[golden.meta["kind"]](golden)


def check_cluster(golden: Golden) -> None:
    dtype = getattr(torch, golden.meta["dtype"])
    x, count = golden["x"].to(dtype), golden.meta["cluster_num"]
    centres, cluster = density_peaks(x, torch.tensor([count]), count, dtype=dtype)
    if count != 2:
        assert torch.equal(centres[0], golden["centers"])
        assert torch.equal(cluster[0], golden["cluster_of"])
    close = CLOSE if dtype == torch.float32 else {"atol": 1e-2, "rtol": 1e-2}
    torch.testing.assert_close(
        cluster_means(x, golden["cluster_of"][None], count), golden["merged"].float(), **close
    )


def check_score(golden: Golden) -> None:
    """What raters pay, averaged over heads and raters, and the cut that follows."""
    dtype = getattr(torch, golden.meta["dtype"])
    attention = golden["rater_attn"].to(dtype)
    everyone = torch.ones(1, attention.shape[2], dtype=torch.bool)
    visual = torch.ones(1, attention.shape[3], dtype=torch.bool)
    relation, _ = head_relation(attention.float(), everyone, visual, attention.shape[1])
    half = dtype != torch.float32
    torch.testing.assert_close(
        relation, golden["relation"].view(1, -1).float(), atol=0, rtol=1e-2 if half else 1e-4
    )
    kept = top_mask(relation, torch.tensor([len(golden["kept_rel"])]), visual)
    assert torch.equal(kept[0].nonzero()[:, 0], golden["kept_rel"].sort().values)


@dataclass(frozen=True)
class Watched(SparseVLM):
    """SparseVLM that notes, at every cut, what the visual rows score, which stay, and what goes on in which places."""

    def prefill(self, view):
        answer = super().prefill(view)
        if view.layer not in self.cuts(view.depth):
            return answer
        keep, hidden = answer if isinstance(answer, tuple) else (answer, view.hidden)
        relation, visual = self.relation(view), view.visual[0]
        left = view.visual.sum(-1)
        kept = top_mask(relation, self._count(view).minimum(left), view.visual)
        SEEN.append(
            (
                relation[0][visual],
                kept[0][visual].nonzero()[:, 0],
                hidden[0][visual & keep[0]],
                view.carry[RATER][0],
            )
        )
        return answer


SEEN: list[tuple[torch.Tensor, ...]] = []


def check_llm(golden: Golden) -> None:
    meta = golden.meta
    start, count, words = meta["v_token_start"], meta["n_visual"], meta["n_text"]
    plus, layers = meta["version"] == "2_0", tuple(meta["pruning_layers"])
    model, inputs = recorded_model(golden, [start])
    full = model.model(**inputs).last_hidden_state
    torch.testing.assert_close(full[:, -4:], golden["full_last_hidden_tail"], **CLOSE)
    embeds = golden["inputs_embeds"].float()
    place = torch.arange(embeds.shape[1])[None]
    visual, text = (place >= start) & (place < start + count), place >= start + count
    torch.testing.assert_close(rater_scores(embeds, visual, text)[0, -words:], golden["rater_score"], **CLOSE)

    policy = Watched(plus=plus, layers=layers, counts=tuple(meta["table"][: len(layers)]), compat="official")
    SEEN.clear()
    with pruned(model, policy):
        output = model.model(**inputs)
        raters = SEEN[0][3][-words:].nonzero()[:, 0]
        assert torch.equal(raters, golden["text_raters"])
        if check_stages(golden):
            check_prefill(golden, model, output)
            check_decode(golden, model, output)


def check_stages(golden: Golden) -> bool:
    """Scores, choices and merged rows at each cut; whether all of them could be compared."""
    for number, (relation, kept, rows, _) in enumerate(SEEN):
        stage = f"stage{number}_"
        torch.testing.assert_close(relation, golden[stage + "relation"], **CLOSE)
        assert torch.equal(kept, golden[stage + "kept_rel"]), stage
        if stage + "recycled" not in golden:
            assert len(rows) == len(kept)
            continue
        recycled = golden[stage + "recycled"]
        assert len(rows) == len(kept) + len(recycled)
        x, clusters = golden[stage + "recycle_in"], len(recycled)
        if clusters == 2:
            return False
        centres, cluster = density_peaks(x, torch.tensor([clusters]), clusters)
        if clusters > 1:  # of a single one any token is the centre
            assert torch.equal(centres[0], golden[stage + "cluster_centers"])
        assert torch.equal(cluster[0], golden[stage + "cluster_of"])
        torch.testing.assert_close(rows[len(kept) :], recycled, **CLOSE)
    assert f"stage{len(SEEN)}_relation" not in golden
    return True


def check_prefill(golden: Golden, model, output) -> None:
    start, count = golden.meta["v_token_start"], golden.meta["n_visual"]
    hidden = output.last_hidden_state[0]
    # merged rows stand in places of dropped ones: what is left in the order of the rows is what the release has
    left = hidden[hidden.abs().sum(-1) > 0]
    torch.testing.assert_close(left[None], golden["last_hidden"], **CLOSE)
    torch.testing.assert_close(left[None] @ golden["lm_head"].float().T, golden["logits"], **CLOSE)
    assert model.pruning.receipt.decoder_tokens == golden["rows_per_layer"].tolist()
    layers = cache_of(output).layers
    assert [layer.keys.shape[2] for layer in layers] == golden["cache_len_prefill"].tolist()
    if golden.meta["version"] == "2_0":
        rows = (hidden.abs().sum(-1) > 0).nonzero()[:, 0]
        images = rows[(rows >= start) & (rows < start + count)] - start
        assert torch.equal(images, golden["final_visual_abs"])


def check_decode(golden: Golden, model, output) -> None:
    for step, wanted in zip(golden["decode_embeds"], golden["decode_hidden"], strict=True):
        output = model.model(inputs_embeds=step.float()[None, None], **{CACHE: cache_of(output)})
        torch.testing.assert_close(output.last_hidden_state[0, 0], wanted, **CLOSE)
    lengths = [layer.keys.shape[2] for layer in cache_of(output).layers]
    assert lengths == golden["cache_len_after_decode"].tolist()
