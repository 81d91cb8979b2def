"""SparseVLM's raters, counts and merged tokens on numbers one can check by hand, and in models."""

import pytest
import torch

from tests.models import IMAGE, LAYOUTS, prompt, shared
from vlm_prune import pruned
from vlm_prune.policies.density_peaks import cluster_means, density_peaks
from vlm_prune.policies.sparsevlm import (
    TABLES,
    SparseVLM,
    choose_raters,
    head_relation,
    rater_scores,
    recycled_counts,
    rotary_of_ones,
    stage_counts,
)
from vlm_prune.versions import cache_of


def test_words_share_what_each_visual_token_gives():
    embeds = torch.tensor([[[9.0, 9.0], [1.0, 0.0], [0.0, 2.0], [1.0, 0.0], [0.0, 1.0]]])
    visual, text = torch.tensor([[0, 1, 1, 0, 0]]).bool(), torch.tensor([[0, 0, 0, 1, 1]]).bool()
    one, two = torch.tensor([1.0, 0.0]).softmax(0), torch.tensor([0.0, 2.0]).softmax(0)
    score = rater_scores(embeds, visual, text)
    torch.testing.assert_close(score[0], torch.cat([torch.zeros(3), (one + two) / 2]))
    assert choose_raters(score, text).tolist() == [[False] * 4 + [True]]
    assert choose_raters(torch.ones_like(score), text).tolist() == text.tolist()  # all alike


def test_raters_of_a_batch_are_those_of_its_rows():
    g = torch.Generator().manual_seed(0)
    embeds = torch.randn(3, 12, 8, generator=g)
    visual = torch.arange(12).expand(3, -1) < torch.tensor([[6], [3], [8]])
    text = torch.arange(12).expand(3, -1) >= torch.tensor([[6], [9], [8]])
    together = rater_scores(embeds, visual, text)
    for b in range(3):
        torch.testing.assert_close(together[[b]], rater_scores(embeds[[b]], visual[[b]], text[[b]]))
    torch.testing.assert_close(together.sum(-1), torch.ones(3))


@pytest.mark.parametrize("plus", [False, True])
def test_counts_are_those_of_the_tables_and_scale(plus):
    for budget, counts in TABLES[plus].items():
        for stage, count in enumerate(counts):
            some = stage_counts(
                torch.tensor([576, 1152]), torch.tensor([budget, 2 * budget]), stage, TABLES[plus]
            )
            assert some.tolist() == [max(count, 1), max(2 * count, 1)]
    all_of_them = torch.tensor([576, 16])
    assert stage_counts(all_of_them, all_of_them, 1, TABLES[plus]).tolist() == [576, 16]
    assert stage_counts(torch.tensor([0]), torch.tensor([0]), 1, TABLES[plus]).tolist() == [0]
    # half way between 64 and 96
    assert stage_counts(torch.tensor([576]), torch.tensor([80]), 0, TABLES[False]).tolist() == [152]


def test_three_in_ten_are_recycled_and_ten_make_one():
    some, clusters = recycled_counts(torch.tensor([0, 1, 24, 276]))
    assert some.tolist() == [0, 1, 8, 83]
    assert clusters.tolist() == [0, 1, 1, 9]


def test_clusters_of_clouds_in_a_padded_batch():
    g = torch.Generator().manual_seed(0)
    middle = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 3.0]])
    cloud = torch.tensor([0, 1, 2] * 4)
    x = torch.stack([middle[cloud] + 0.1 * torch.randn(12, 2, generator=g) for _ in range(2)])
    real = torch.arange(12) < torch.tensor([[12], [9]])
    count, most = torch.tensor([3, 3]), 4  # as if a third row had four clusters
    centre, cluster = density_peaks(x, count, most, real)
    means = cluster_means(x, cluster, most, real)
    for b, tokens in enumerate((12, 9)):
        assert {int(cloud[i]) for i in centre[b, :3]} == {0, 1, 2}
        assert cloud[centre[b, cluster[b, :tokens]]].tolist() == cloud[:tokens].tolist()
        alone = density_peaks(x[[b], :tokens], count[:1], 3)
        assert torch.equal(alone[0][0], centre[b, :3])
        assert torch.equal(alone[1][0], cluster[b, :tokens])
        for number in range(3):
            members = x[b, :tokens][cluster[b, :tokens] == number]
            torch.testing.assert_close(means[b, number], members.mean(0), atol=1e-4, rtol=1e-4)
        assert (means[b, 3] == 0).all()


def test_heads_that_look_at_the_image_decide():
    attention = torch.tensor([[[[0.1, 0.2, 0.7]], [[0.5, 0.4, 0.1]]]])  # one rater, two heads, three rows
    visual = torch.tensor([[True, True, False]])
    relation, total = head_relation(attention, torch.ones(1, 1, dtype=torch.bool), visual, 1)
    torch.testing.assert_close(total, torch.tensor([[0.3, 0.9]]))
    torch.testing.assert_close(relation, attention[:, 1, 0])


def test_rotated_ones_are_as_long_as_they_are_at_no_distance():
    place = torch.tensor([[0, 3, 700]])
    logit = rotary_of_ones(place, place, 64, 10000.0)
    torch.testing.assert_close(logit.diagonal(dim1=1, dim2=2), torch.full((1, 3), 64 / 64**0.5))
    assert (logit <= 8).all()


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "llava-gqa", "internvl", "qwen2_5_vl"])
@pytest.mark.parametrize("fields", [{}, {"plus": True}])
def test_a_batch_gives_what_its_rows_give_alone(family, fields):
    model, batch = shared(family), prompt(family, LAYOUTS["ragged"])
    with pruned(model, SparseVLM(**fields), ratio=0.3):
        together = model(**batch.inputs).logits
        for b, row in enumerate(batch.rows()):
            logits = model(**row.inputs).logits[0]
            torch.testing.assert_close(together[b, batch.mask[b].bool()], logits, atol=3e-4, rtol=1e-3)


@torch.no_grad()
def test_merged_tokens_come_on_top_and_change_what_follows():
    model, row = shared("llava"), prompt("llava", LAYOUTS["single"])
    visual = int((row.ids == IMAGE).sum())
    text, said = row.ids.shape[1] - visual, {}
    for plus in (False, True):
        with pruned(model, SparseVLM(plus=plus, layers=(0, 1), counts=(6, 3), positions="compact")):
            output = model(**row.inputs)
            said[plus] = [layer.keys.shape[2] - text for layer in cache_of(output).layers]
    dropped = visual - 6
    merged = (int(0.3 * dropped) + 1) // 10 + 1
    assert said[True] == [visual, 6, 3]
    assert said[False] == [visual, 6 + merged, 3 + (int(0.3 * (3 + merged)) + 1) // 10 + 1]


def test_layers():
    assert SparseVLM().prefill_layers(32) == [0, 2, 6, 15]
    assert SparseVLM().cuts(28) == {2: 0, 5: 1, 13: 2}
    assert SparseVLM().cuts(3) == {0: 0, 1: 2}
    assert SparseVLM(layers=[1, 4], counts=[8, 4]).prefill_layers(6) == [0, 1, 4]
    assert SparseVLM(plus=True).for_family("llava", False).positions == "original"
    assert SparseVLM().for_family("llava", False).positions == "compact"


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"layers": (2, 1, 3)}, "ascending"),
        ({"layers": (2, 3)}, "give as many layers, or counts"),
        ({"counts": (2, 3)}, "one number of tokens for each layer"),
        ({"compat": "paper"}, "official"),
    ],
)
def test_settings(fields, match):
    with pytest.raises(ValueError, match=match):
        SparseVLM(**fields)
    with pytest.raises(ValueError, match="0 to 5"):
        SparseVLM(layers=(1, 2, 6)).prefill_layers(6)
