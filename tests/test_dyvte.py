"""DyVTE: what gates see and say, when sequences leave, and training, each against a slow form of itself."""

import random

import pytest
import torch

from tests.models import FAMILIES, IMAGE, LAYOUTS, make, prompt
from vlm_prune import POLICIES, PolicyError, StateError, prune, pruned, unprune
from vlm_prune.contract.views import PrefillView
from vlm_prune.errors import UnsupportedModelError
from vlm_prune.eval.learn.observe_exit import answer_rows, hide_columns, prompt_text
from vlm_prune.eval.learn.train_exit import lr_factor, observe_batch, train_exit
from vlm_prune.policies.dyvte import DyVTE
from vlm_prune.policies.exit_gates import (
    ExitGates,
    exit_features,
    exit_labels,
    gate_logits,
    gate_loss,
    wants_exit,
)
from vlm_prune.registry import find_anatomy


def some_gates(depth: int = 3, channels: int = 32, **sizes) -> ExitGates:
    gates = ExitGates(depth, channels, **{"width": 16, **sizes})
    gates.trained_steps = 1
    return gates


def test_features_by_hand():
    hidden = torch.randn(4, 6, 3)
    hidden[0, 0] = torch.nan  # rows that are not text must not reach the mean
    text = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0], [0, 0, 0, 1, 0, 0], [0] * 6]).bool()
    features = exit_features(hidden, text)
    torch.testing.assert_close(features[0], torch.cat([hidden[0, 2:5].mean(0), hidden[0, 5]]))
    torch.testing.assert_close(features[1], torch.cat([hidden[1, 2:4].mean(0), hidden[1, 4]]))
    torch.testing.assert_close(features[2], torch.cat([hidden[2, 3], hidden[2, 3]]))
    assert not features[3].any()
    assert exit_features(hidden.half(), text).dtype == torch.float32


@pytest.mark.parametrize("rank", [None, 5])
def test_gate_is_two_products_and_a_gelu(rank):
    gates, features = some_gates(rank=rank), torch.randn(7, 64)
    weights = list(gates.gates[1])
    assert [tuple(w.shape) for w in weights] == ([(16, 64)] if rank is None else [(5, 64), (16, 5)]) + [
        (2, 16)
    ]
    first = weights[0] if rank is None else weights[1] @ weights[0]
    x = features.double() @ first.double().T
    x = 0.5 * x * (1 + torch.erf(x / 2**0.5))
    torch.testing.assert_close(gates(1, features).double(), x @ weights[-1].double().T, atol=1e-5, rtol=1e-5)
    assert torch.equal(gates(1, features), gate_logits(features, weights))


def test_official_size_and_what_low_rank_saves():
    def million(**kw):
        return sum(w.numel() for w in ExitGates(1, 4096, **kw).parameters()) / 1e6

    assert million() == pytest.approx(16.8, abs=0.1)
    assert million(rank=16) == pytest.approx(0.17, abs=0.01)


def test_leaving_is_strict_and_nan_stays():
    logits = torch.tensor([[0.0, 0.1], [0.1, 0.1], [0.2, 0.1], [torch.nan, torch.nan]])
    assert wants_exit(logits).tolist() == [True, False, False, False]
    assert wants_exit(logits, margin=0.2).tolist() == [False] * 4


def test_labels_by_hand():
    full, masked = torch.randn(2, 4, 5, 9)
    masked[1] = full[1] + 1e-3 * torch.randn(5, 9)
    masked[2] = full[2] * 0.5  # the same words, less sure
    targets = full.argmax(-1)
    targets[0, 3:] = -100
    targets[3] = -100
    label, numbers = exit_labels(full, masked, targets)
    for b in range(3):
        rows = [i for i in range(5) if targets[b, i] >= 0]
        same = [float(full[b, i].argmax() == masked[b, i].argmax()) for i in rows]
        ce = [
            sum(-torch.log_softmax(x[b, i], -1)[targets[b, i]] for i in rows) / len(rows)
            for x in (full, masked)
        ]
        assert numbers["agreement"][b] == pytest.approx(sum(same) / len(rows))
        assert numbers["loss_full"][b].item() == pytest.approx(ce[0].item(), rel=1e-5)
        assert numbers["loss_masked"][b].item() == pytest.approx(ce[1].item(), rel=1e-5)
    assert label.tolist() == [False, True, False, False]
    assert numbers["agreement"][3].isnan()


def test_released_code_overlooks_id_zero():
    full = torch.randn(1, 2, 4)
    masked = full.clone()
    masked[0, 1] = full[0, 1].roll(1)
    targets = torch.tensor([[3, 0]])
    assert not exit_labels(full, masked, targets)[0].item()
    assert exit_labels(full, masked, targets, first_id=1)[0].item()


def test_files_come_back_as_they_were(tmp_path):
    gates = some_gates(rank=4)
    gates.trained_steps = 7
    gates.save(tmp_path / "gates.safetensors", model="tiny")
    again = ExitGates.load(tmp_path / "gates.safetensors")
    assert (again.depth, again.channels, again.width, again.rank, again.trained_steps) == (3, 32, 16, 4, 7)
    assert all(torch.equal(a, b) for a, b in zip(gates.parameters(), again.parameters(), strict=True))
    assert DyVTE(gates=str(tmp_path / "gates.safetensors")).trained.rank == 4
    (tmp_path / "other.safetensors").write_bytes((8).to_bytes(8, "little") + b"{}      ")
    with pytest.raises(ValueError, match="is not a file of exit gates"):
        ExitGates.load(tmp_path / "other.safetensors")
    with pytest.raises(FileNotFoundError, match="no such file"):
        DyVTE(gates=tmp_path / "none.safetensors")


def test_released_checkpoints_are_read():
    state = {
        f"model.visual_gates_router.{layer}.w{i}.weight": torch.randn(*size)
        for layer in range(3)
        for i, size in ((1, (16, 64)), (2, (2, 16)))
    }
    gates = ExitGates.from_released({**state, "model.norm.weight": torch.ones(32)})
    assert (gates.depth, gates.channels, gates.width) == (3, 32, 16)
    assert torch.equal(list(gates.gates[2])[1], state["model.visual_gates_router.2.w2.weight"])
    with pytest.raises(ValueError, match="no visual_gates_router"):
        ExitGates.from_released({})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "neither gates nor exit_layer was given.*train-exit"),
        ({"gates": some_gates(), "exit_layer": 1}, "both gates and exit_layer were given"),
        ({"gates": ExitGates(3, 32, 16)}, "untrained"),
        ({"exit_layer": -1}, "0-based layer number"),
        ({"exit_layer": 1.5}, "0-based layer number"),
        ({"exit_layer": 1, "min_exit_layer": True}, "0-based layer number"),
        ({"exit_layer": 1, "compat": "paper"}, 'choose "official" or None'),
    ],
)
def test_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        DyVTE(**settings)


def test_layers():
    gates = some_gates(depth=8)
    assert list(DyVTE(exit_layer=7).prefill_layers(8)) == [7]
    assert list(DyVTE(gates=gates).prefill_layers(8)) == [0, 1, 2, 3, 4, 5, 6]
    assert list(DyVTE(gates=gates, min_exit_layer=5).prefill_layers(8)) == [5, 6]
    assert list(DyVTE(gates=gates, compat="official").prefill_layers(8)) == list(range(8))
    for policy in (DyVTE(exit_layer=8), DyVTE(gates=gates, min_exit_layer=7)):
        with pytest.raises(ValueError, match="this decoder has 8 layers"):
            policy.prefill_layers(8)
    with pytest.raises(ValueError, match="for a decoder of 8 layers, this one has 6"):
        DyVTE(gates=gates).prefill_layers(6)


def decided(policy: DyVTE, hidden: torch.Tensor, text_rows: list[int]) -> list[bool]:
    """Which of some sequences of 2 + 4 visual + some text rows leave."""
    batch, rows, _ = hidden.shape
    visual = torch.zeros(batch, rows, dtype=torch.bool)
    visual[:, 2:6] = True
    valid = torch.arange(rows) < 6 + torch.tensor(text_rows)[:, None]
    view = PrefillView(0, 3, hidden, visual, valid, visual.sum(-1), torch.ones(batch).long(), None, {})
    keep = policy.prefill(view)
    assert (keep | visual).all()
    gone = ~keep[:, 2:6]
    assert torch.equal(gone.any(-1), gone.all(-1))
    return gone.all(-1).tolist()


def test_each_sequence_decides_for_itself():
    policy, hidden, text = DyVTE(gates=some_gates()), torch.randn(8, 10, 32), [4, 3, 2, 1, 4, 3, 2, 0]
    together = decided(policy, hidden, text)
    alone = [decided(policy, hidden[b : b + 1], text[b : b + 1])[0] for b in range(8)]
    assert together == alone
    assert len(set(together[:7])) == 2, "both answers must occur for this to be a test"
    assert not together[7], "without text nobody leaves"
    official = DyVTE(gates=policy.gates, compat="official")
    first = decided(official, hidden, text)
    assert first == [first[0]] * 8
    assert not any(decided(official, hidden[3:4], [1]))


def test_gates_of_another_width_are_refused():
    with pytest.raises(ValueError, match="of 16 channels, this one has 32"):
        decided(DyVTE(gates=some_gates(channels=16)), torch.randn(1, 10, 32), [4])


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_in_a_model_leaving_equals_taking_the_tokens_out(family):
    """The stock model, with the image's columns masked in the layers after the exit, gives the same logits."""
    model, batch = make(family), prompt(family, LAYOUTS["ragged"])
    anatomy = find_anatomy(model)
    visual = batch.ids == IMAGE

    def masked(module, args, kwargs):
        return args, {**kwargs, "attention_mask": hide_columns(kwargs["attention_mask"], visual)}

    handles = [
        layer.register_forward_pre_hook(masked, with_kwargs=True) for layer in anatomy.decoder_layers[1:]
    ]
    want = model(**batch.inputs, use_cache=False).logits
    for handle in handles:
        handle.remove()
    with pruned(model, DyVTE(exit_layer=0)):
        logits = model(**batch.inputs).logits
        text = batch.mask.bool() & ~visual
        torch.testing.assert_close(logits[text], want[text], atol=2e-4, rtol=1e-4)
        assert not logits[visual].any()
        assert model.pruning.receipt.decoder_tokens[1:] == [int(text.sum(-1).max())] * 2


@torch.no_grad()
def test_in_a_model_a_batch_equals_its_rows():
    model, batch = make("llava"), prompt("llava", [(2, -1, 4), (1, -1, 2, -2, 3), (-1, 9), (3, -1, 1), (20,)])
    torch.manual_seed(5)
    with pruned(model, DyVTE(gates=some_gates())):
        together = model(**batch.inputs).logits
        left = set()
        for b, row in enumerate(batch.rows()):
            logits = model(**row.inputs).logits[0]
            torch.testing.assert_close(together[b, batch.mask[b].bool()], logits, atol=2e-4, rtol=1e-4)
            left.add((row.ids[0] == IMAGE).any().item() and not logits[row.ids[0] == IMAGE].any().item())
    assert left == {True, False}, "both answers must occur for this to be a test"


def test_prune_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(POLICIES, "dyvte", DyVTE)
    with pytest.raises(PolicyError, match="train-exit"):
        prune(make("llava"), "dyvte")


# --- training ---


def test_text_and_answer_rows():
    visual = torch.tensor([[0, 1, 1, 0, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0, 0, 0], [0] * 8]).bool()
    valid = torch.tensor([[1] * 8, [0] + [1] * 6 + [0], [1] * 8]).bool()
    labels = torch.full((3, 8), -100)
    labels[0, 6:], labels[1, 6], labels[2, 5:] = torch.tensor([4, 5]), 0, torch.tensor([7, 8, 9])
    assert prompt_text(visual, valid, labels).nonzero().tolist() == [[0, 3], [0, 4], [0, 5], [1, 4], [1, 5]]
    index, targets = answer_rows(labels)
    assert targets.tolist() == [[4, 5, -100], [0, -100, -100], [7, 8, 9]]
    assert index[0, :2].tolist() == [5, 6]
    assert index[1, 0] == 5
    assert index[2].tolist() == [4, 5, 6]


def test_masks_hide_the_image_from_text_only():
    visual = torch.tensor([[0, 1, 1, 0]]).bool()
    causal = hide_columns(None, visual)
    assert causal[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 1]]
    stock = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    assert torch.equal(hide_columns(stock, visual), causal)
    added = torch.zeros(1, 1, 4, 4).masked_fill(~stock, torch.finfo(torch.float32).min)
    assert torch.equal(hide_columns(added, visual) == 0, causal)
    with pytest.raises(UnsupportedModelError, match="sdpa"):
        hide_columns(torch.ones(1, 4), visual)


def training_batch(family: str = "llava", seed: int = 1) -> dict[str, torch.Tensor]:
    batch = prompt(family, [(2, -1, 6), (1, -1, 2, -1, 5), (-1, 4)], seed=seed)
    labels = batch.ids.masked_fill(batch.mask == 0, -100)
    labels[:, :-2] = -100
    return {**batch.inputs, "labels": labels}


@pytest.mark.parametrize(
    ("family", "attention"), [("llava-gqa", "sdpa"), ("llava-gqa", "eager"), ("internvl", "sdpa")]
)
def test_observation_equals_a_pruned_model(family, attention):
    """Labels come from masking; the same numbers come from a model whose image leaves at that layer."""
    model, batch = make(family, attention), training_batch(family)
    seen = observe_batch(model, find_anatomy(model), batch, [0, 1, 2])
    inputs = {n: x for n, x in batch.items() if n != "labels"}
    index, targets = answer_rows(batch["labels"])
    rows = index[..., None].expand(-1, -1, 64)
    with torch.no_grad():
        full = model(**inputs).logits
        for layer in (0, 1):
            with pruned(model, DyVTE(exit_layer=layer)):
                without = model(**inputs).logits
            labels, numbers = exit_labels(full.gather(1, rows), without.gather(1, rows), targets)
            assert torch.equal(labels, seen[layer].labels)
            for name, x in numbers.items():
                torch.testing.assert_close(seen[layer].numbers[name], x, atol=1e-4, rtol=1e-4)
    assert seen[2].labels.all(), "after the last layer nothing changes"
    assert seen[0].usable.all()
    hidden = model(**inputs, output_hidden_states=True).hidden_states[1]
    text = prompt_text(inputs["input_ids"] == IMAGE, inputs["attention_mask"].bool(), batch["labels"])
    torch.testing.assert_close(seen[0].features, exit_features(hidden, text).detach())


def test_learning_rate_warms_up_and_falls():
    rates = [lr_factor(step, 100, 0.03) for step in range(100)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert rates[3] == 1.0
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[-1] < 0.001
    assert lr_factor(0, 1, 0.03) == 1.0


def test_training_learns_its_labels_and_leaves_the_model_alone(tmp_path):
    model = make("llava").train()
    before = {n: p.clone() for n, p in model.named_parameters()}
    batches = [training_batch(seed=seed) for seed in range(2)]
    stream = (random.Random(step).choice(batches) for step in range(1000))
    gates, log = train_exit(
        model, stream, steps=40, width=32, rank=8, lr=1e-2, layers_per_step=3, progress=False
    )
    assert model.training
    assert all(torch.equal(before[n], p) and p.grad is None for n, p in model.named_parameters())
    assert gates.trained_steps == len(log) == 40
    assert sum(s.loss for s in log[-5:]) < 0.5 * sum(s.loss for s in log[:5])
    assert log[-1].accuracy == 1.0
    gates.save(tmp_path / "gates.safetensors")
    prune(model.eval(), DyVTE(gates=tmp_path / "gates.safetensors"))
    with pytest.raises(StateError, match="call unprune"):
        train_exit(model, [], steps=1)
    unprune(model)


def test_training_is_repeatable_and_leaves_the_random_numbers_alone():
    model, state = make("llava"), torch.get_rng_state()
    runs = [
        train_exit(model, [training_batch()] * 2, steps=5, width=8, seed=3, progress=False) for _ in range(2)
    ]
    assert torch.equal(state, torch.get_rng_state())
    assert runs[0][1] == runs[1][1]
    assert runs[0][0].trained_steps == 2, "it ends with the batches"


def test_training_refuses():
    model, batch = make("llava"), training_batch()
    with pytest.raises(ValueError, match="steps=0"):
        train_exit(model, [batch], steps=0)
    with pytest.raises(ValueError, match="choose 1 to 3"):
        train_exit(model, [batch], steps=1, layers_per_step=4)
    with pytest.raises(ValueError, match="of 5 layers, this one has 3"):
        train_exit(model, [batch], steps=1, gates=some_gates(depth=5))
    with pytest.raises(ValueError, match="needs input_ids and labels"):
        train_exit(model, [{"input_ids": batch["input_ids"]}], steps=1, progress=False)


def test_loss_is_plain_cross_entropy():
    logits, labels = torch.randn(6, 2), torch.tensor([1, 0, 0, 1, 1, 1]).bool()
    by_hand = -torch.stack([logits[i].log_softmax(-1)[int(labels[i])] for i in range(6)]).mean()
    torch.testing.assert_close(gate_loss(logits, labels), by_hand)
