"""DyVTE against its released code: the gate alone, prompts that leave, and the labels that gates are trained on."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.parity._files import Golden, npz_cases
from tests.parity._given import VISUAL, embeds_model
from vlm_prune import prune
from vlm_prune.eval.learn.observe_exit import observe
from vlm_prune.policies.dyvte import DyVTE
from vlm_prune.policies.exit_gates import ExitGates, exit_features, gate_logits, gate_loss, wants_exit
from vlm_prune.versions import CACHE, cache_of

cases = npz_cases
CLOSE = {"atol": 1e-5, "rtol": 1e-4}


def check(case: Path) -> None:
    golden = Golden(case)
    CHECKS[case.stem.split("_")[0]](golden)


def check_gate(golden: Golden) -> None:
    logits = gate_logits(golden["features"], [golden["w1"], golden["w2"]])
    torch.testing.assert_close(logits, golden["logits"], **CLOSE)
    assert torch.equal(wants_exit(logits), golden["exit"])


def released_gates(golden: Golden) -> ExitGates:
    return ExitGates.from_released(golden.prefixed("w/")).float()


@dataclass(frozen=True)
class Noting(DyVTE):
    """DyVTE that notes what its gates saw and said, and what the layers were given."""

    def prefill(self, view):
        text = view.text
        if text.any():
            features = exit_features(view.hidden, text)[:1]
            if text[0].sum() == 1:  # the released mean of nothing
                features[:, : features.shape[1] // 2] = torch.nan
            logits = self.trained(view.layer, features)
            NOTES.append((view.layer, features[0], logits[0], bool(wants_exit(logits))))
        return super().prefill(view)


NOTES: list[tuple[int, torch.Tensor, torch.Tensor, bool]] = []


@torch.no_grad()
def check_exit(golden: Golden) -> None:
    start, count, text = (int(golden[n]) for n in ("prefix_len", "img_len", "text_len"))
    model, inputs = embeds_model(golden, golden["inputs_embeds"], start, count)
    prune(model, Noting(gates=released_gates(golden), compat="official"))
    NOTES.clear()
    output = model(**inputs)
    layers, features, logits, fires = (list(x) for x in zip(*NOTES, strict=True))
    assert layers == golden["gate_layers"].tolist()
    torch.testing.assert_close(torch.stack(features), golden["gate_features"], equal_nan=True, **CLOSE)
    torch.testing.assert_close(torch.stack(logits), golden["gate_logits"], equal_nan=True, **CLOSE)
    assert fires == golden["gate_fires"].tolist()

    torch.testing.assert_close(
        output.logits[:, -text:, :VISUAL], golden["prefill_logits_text"], atol=1e-4, rtol=1e-4
    )
    held = [layer.keys.shape[2] for layer in cache_of(output).layers]
    assert held == golden["cache_len_after_prefill"].tolist() == golden["layer_input_len"].tolist()
    assert model.pruning.receipt.decoder_tokens == held
    if "decode_logits" not in golden:
        return  # no gate fired, and the released code stops at the first new token
    for tokens, official in zip(golden["decode_tokens"], golden["decode_logits"], strict=True):
        output = model(input_ids=tokens[:, None], **{CACHE: cache_of(output)})
        torch.testing.assert_close(output.logits[:, -1, :VISUAL], official, atol=1e-4, rtol=1e-4)


def check_train(golden: Golden) -> None:
    config = LlamaConfig(
        vocab_size=int(golden["vocab"]),
        hidden_size=int(golden["hidden_size"]),
        intermediate_size=int(golden["intermediate_size"]),
        num_hidden_layers=int(golden["num_layers"]),
        num_attention_heads=int(golden["num_heads"]),
        rms_norm_eps=float(golden["rms_eps"]),
        rope_theta=float(golden["rope_theta"]),
    )
    model = LlamaForCausalLM(config).eval()
    llm = {n: x for n, x in golden.prefixed("w/").items() if "visual_gates" not in n}
    model.load_state_dict({n: x.float() for n, x in llm.items()})
    embeds, valid, labels = golden["inputs_embeds"], golden["attention_mask"], golden["labels"]
    start, count, layer = (int(golden[n]) for n in ("prefix_len", "img_len", "exit_layer"))
    visual = torch.zeros_like(valid)
    visual[:, start : start + count] = True

    seen = observe(
        run=lambda: (
            model.model(inputs_embeds=embeds, attention_mask=valid.long(), use_cache=False).last_hidden_state
        ),
        layers=list(model.model.layers),
        norm=model.model.norm,
        head=model.lm_head,
        visual=visual,
        valid=valid,
        labels=labels,
        exits=[layer],
        first_id=1,
    )[layer]
    assert seen.usable.all()
    torch.testing.assert_close(seen.features, golden["features"], **CLOSE)
    torch.testing.assert_close(seen.numbers["agreement"], golden["agreement"].float(), **CLOSE)
    for name in ("loss_full", "loss_masked"):
        torch.testing.assert_close(seen.numbers[name], golden[name], **CLOSE)
    assert torch.equal(seen.labels.long(), golden["gate_labels"])
    logits = released_gates(golden)(layer, seen.features)
    torch.testing.assert_close(logits.detach(), golden["gate_logits"], **CLOSE)
    torch.testing.assert_close(gate_loss(logits, seen.labels).detach(), golden["gate_loss"], **CLOSE)


CHECKS = {"router": check_gate, "exit": check_exit, "train": check_train}
