"""What the lmms-eval plug-in does with prompts, answers and scores. With lmms-eval itself: test_lmms_eval.py."""

from __future__ import annotations

import json
import re
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tests.models import VOCAB, shared
from tests.test_processors import PROCESSORS, ROWS
from vlm_prune import PolicyError, UnsupportedCallError, pruned
from vlm_prune.cli import app
from vlm_prune.eval import load_model
from vlm_prune.eval.chair import Vocabulary
from vlm_prune.eval.lmms import TASKS, scoring
from vlm_prune.eval.lmms.arguments import checkpoint, nested, pruning_options
from vlm_prune.eval.lmms.generate import Answer, Decoding, Job, _Draw, answer_batch, batches
from vlm_prune.eval.lmms.likelihood import score_batch
from vlm_prune.eval.lmms.prompts import Prompt, collate, from_messages, from_text
from vlm_prune.eval.pope import score_pope
from vlm_prune.eval.scenes import PLURALS, make_scene, make_scenes, pope_questions

MODELS = ["tiny-llava", "tiny-internvl"]
model_of = cache(load_model)


@cache
def mixed() -> list[Prompt]:
    """Images of different sizes, several in a prompt, none in another."""
    wide, small, tall = (
        make_scene(n, size).image for n, size in enumerate([(256, 128), (128, 128), (128, 192)])
    )
    return [
        from_text("Is there a star in the image?", [wide]),
        from_text("Please describe this image in detail.", [small]),
        from_text("Is there a moon?", None),
        from_text("Look at <image> and <image>. Is there a circle in the image?", [tall, small]),
        from_text("Is there an arrow in the image?", [tall]),
    ]


def answers(name: str, prompts: list[Prompt], size: int, decoding: Decoding, **options) -> list[Answer]:
    model, processor = model_of(name)
    jobs = [Job(partial(lambda p: p, p), p.size[2], decoding, f"seed {n}") for n, p in enumerate(prompts)]
    found: dict[int, Answer] = {}
    with pruned(model, **options):
        for numbers, built in batches(jobs, size):
            seeds = [jobs[n].seed for n in numbers]
            found |= zip(numbers, answer_batch(model, processor, built, decoding, seeds), strict=True)
    return [found[n] for n in range(len(prompts))]


# --- arguments ---


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"policy": "flowcut", "tokens": 64}, {"policy": "flowcut", "tokens": 64}),
        ({}, {"policy": "flowcut"}),
        ({"tokens": 320, "per": "image"}, {"policy": "flowcut", "tokens": 320, "per": "image"}),
        ({"policy": "random", "ratio": 0.25, "seed": 3}, {"policy": "random", "ratio": 0.25, "seed": 3}),
        (
            {"policy": "flowcut+vhr", "flowcut.compat": "official"},
            {"policy": "flowcut+vhr", "flowcut": {"compat": "official"}},
        ),
        (
            {"policy": "flowcut+vhr", "flowcut": '{"compat": "official"}'},
            {"policy": "flowcut+vhr", "flowcut": {"compat": "official"}},
        ),
    ],
)
def test_model_args_become_arguments_of_prune(given, expected):
    own = {name: given.pop(name, None) for name in ("policy", "tokens", "ratio", "per", "config")}
    assert pruning_options(**own, settings=given) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"policy": "flowcutt"}, 'Did you mean "flowcut"?'),
        ({"policy": "flowcut", "pretraned": "x"}, "no settings of a policy: pretrained, policy"),
        ({"config": "pruning.json", "policy": "vhr"}, "leave out policy"),
        ({"policy": "flowcut+vhr", "flowcut": "{compat"}, "not JSON"),
    ],
)
def test_wrong_model_args_say_what_is_allowed(given, message):
    own = {name: given.pop(name, None) for name in ("policy", "tokens", "ratio", "per", "config")}
    with pytest.raises(ValueError, match=re.escape(message)):
        pruning_options(**own, settings=given)


def test_a_config_file_gives_all(tmp_path):
    file = tmp_path / "pruning.json"
    file.write_text(json.dumps({"policy": "random", "ratio": 0.5, "settings": {"seed": 1}}))
    options = pruning_options(None, None, None, None, str(file), {})
    assert options == {"policy": "random", "ratio": 0.5, "seed": 1}
    with pytest.raises(PolicyError, match="not a pruning config"):
        pruning_options(None, None, None, None, str(tmp_path / "none.json"), {})


def test_dotted_names_need_a_place():
    with pytest.raises(ValueError, match=r"vhr\.x: vhr has the value 3"):
        nested({"vhr": 3, "vhr.x": 1})


def test_shipped_models_go_by_name():
    assert Path(checkpoint("tiny-llava")).is_dir()
    assert checkpoint("llava-hf/llava-1.5-7b-hf") == "llava-hf/llava-1.5-7b-hf"


# --- prompts ---

IMAGE = {"type": "image"}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


@pytest.mark.parametrize(
    ("words", "images", "content"),
    [
        ("What is it?", 1, [IMAGE, text("What is it?")]),
        ("What is it?", 0, [text("What is it?")]),
        ("In <image> and <image>?", 2, [text("In "), IMAGE, text(" and "), IMAGE, text("?")]),
        ("In <image>?", 2, [IMAGE, IMAGE, text("In ?")]),
        ("In <image>?", 0, [text("In ?")]),
    ],
)
def test_images_stand_where_the_text_says(words, images, content):
    prompt = from_text(words, [make_scene(0).image] * images)
    assert prompt.messages == [{"role": "user", "content": content}]
    assert len(prompt.images) == images


def test_chat_messages_keep_their_order(tmp_path):
    image = make_scene(0).image
    image.save(tmp_path / "a.png")
    turns = [
        {
            "role": "user",
            "content": [{"type": "image", "url": str(tmp_path / "a.png")}, text("<image> one?")],
        },
        {"role": "assistant", "content": [text("yes")]},
        {"role": "user", "content": [text("two?"), {"type": "image", "url": image}]},
    ]
    prompt = from_messages(turns, system="Be brief.")
    assert [m["role"] for m in prompt.messages] == ["system", "user", "assistant", "user"]
    assert prompt.messages[1]["content"] == [IMAGE, text(" one?")]
    assert prompt.messages[3]["content"] == [text("two?"), IMAGE]
    assert [i.tobytes() for i in prompt.images] == [image.tobytes()] * 2


@pytest.mark.parametrize("part", [{"type": "video", "url": "a.mp4"}, {"type": "image", "url": "a.mp4"}])
def test_no_videos(part):
    with pytest.raises(UnsupportedCallError, match="no video, no audio"):
        from_messages([{"role": "user", "content": [part]}])


@pytest.mark.parametrize("name", MODELS)
def test_special_tokens_come_once(name):
    _, processor = model_of(name)
    bos = processor.tokenizer.bos_token_id
    inputs = collate(processor, mixed())
    rows = [
        ids[mask.bool()].tolist()
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    ]
    assert all(row.count(bos) <= 1 for row in rows)


# --- answers ---


@pytest.mark.parametrize(
    "options", [{"policy": "none"}, {"policy": "flowcut+vhr", "ratio": 0.25}], ids=["dense", "pruned"]
)
@pytest.mark.parametrize("name", MODELS)
def test_an_answer_does_not_depend_on_its_batch(name, options):
    decoding = Decoding(max_new_tokens=24)
    alone = answers(name, mixed(), 1, decoding, **options)
    assert answers(name, mixed(), 5, decoding, **options) == alone
    assert answers(name, mixed()[::-1], 3, decoding, **options) == alone[::-1]
    assert alone[1].text.strip().startswith("the image shows")
    assert alone[0].text.strip().lower() in {"yes", "no"}


@pytest.mark.parametrize("family", PROCESSORS)
def test_every_family_takes_mixed_batches(family):
    model, processor = shared(family), PROCESSORS[family]()
    prompts = [from_text(text, images, processor.image_token) for text, images in ROWS]
    words = [i for i in range(VOCAB) if re.fullmatch(r"w\d+", processor.tokenizer.convert_ids_to_tokens(i))]
    others = sorted(set(range(VOCAB)) - set(words))
    decoding = Decoding.of({"max_new_tokens": 4, "suppress_tokens": others})
    with pruned(model, "uniform", ratio=0.3):
        together = answer_batch(model, processor, prompts, decoding, ["", "", "", ""])
        alone = [answer_batch(model, processor, [prompt], decoding, [""])[0] for prompt in prompts]
    assert together == alone


def test_a_sample_does_not_depend_on_its_batch():
    hot = Decoding(max_new_tokens=12, temperature=3.0, top_k=40, top_p=0.99)
    prompts = [mixed()[1]] * 4
    alone = answers("tiny-llava", prompts, 1, hot, policy="none")
    assert answers("tiny-llava", prompts, 4, hot, policy="none") == alone
    assert len({answer.text for answer in alone}) > 1


def test_draws_follow_the_softmax():
    scores = torch.tensor([[1.0, 0.0, -1.0, -torch.inf]])
    draws = torch.stack([_Draw([str(n)])(torch.empty(1, 0), scores).argmax(-1) for n in range(4000)])
    shares = torch.bincount(draws.flatten(), minlength=4) / 4000
    assert torch.allclose(shares, scores[0].softmax(-1), atol=0.03)


@pytest.mark.parametrize(
    ("kwargs", "temperature"),
    [
        ({}, 0),
        ({"temperature": 0, "do_sample": False, "top_p": 1.0, "top_k": None}, 0),
        ({"temperature": 0, "do_sample": True}, 0),
        ({"do_sample": True}, 1),
        ({"temperature": 0.7}, 0.7),
        ({"temperature": 0.7, "do_sample": False}, 0.7),
    ],
)
def test_temperature_decides(kwargs, temperature):
    assert Decoding.of(kwargs).temperature == temperature


def test_generation_kwargs_are_understood():
    kwargs = {
        "until": ["\n\n", ""],
        "max_gen_toks": 7,
        "num_beams": 2,
        "top_p": 0,
        "image_aspect_ratio": "pad",
    }
    decoding = Decoding.of(kwargs)
    assert decoding == Decoding(until=("\n\n",), max_new_tokens=7, options=(("num_beams", 2),))
    assert decoding.unknown == ("image_aspect_ratio",)
    assert Decoding.of({"until": "."}, 5) == Decoding(until=(".",), max_new_tokens=5)
    assert Decoding.of({"until": None}).until == ()


@pytest.mark.parametrize(
    "kwargs",
    [{"temperature": -1}, {"temperature": 1, "num_beams": 3}, {"max_new_tokens": -1}, {"num_beams": 0}],
)
def test_impossible_decoding_raises(kwargs):
    with pytest.raises(ValueError, match="num_beams"):
        Decoding.of(kwargs)


def test_stop_strings_cut_and_end_generation():
    prompts = [mixed()[1], mixed()[0]]
    full = answers("tiny-llava", prompts, 2, Decoding(max_new_tokens=24), policy="none")
    word = full[0].text.split()[3]
    stopped = answers(
        "tiny-llava", prompts, 2, Decoding(until=(f" {word}", "zebra"), max_new_tokens=24), policy="none"
    )
    assert stopped[0].text == full[0].text[: full[0].text.index(f" {word}")]
    assert stopped[0].output_tokens < full[0].output_tokens
    assert stopped[1] == full[1]


def test_beams():
    (plain,) = answers("tiny-llava", mixed()[:1], 1, Decoding(max_new_tokens=4), policy="flowcut", ratio=0.25)
    beams = Decoding(max_new_tokens=4, options=(("num_beams", 3),))
    (best,) = answers("tiny-llava", mixed()[:1], 1, beams, policy="flowcut", ratio=0.25)
    assert best.text == plain.text


def test_batches_hold_what_is_alike():
    short, long = (from_text("x" * n, None) for n in (5, 50))
    greedy, beams = Decoding(), Decoding(options=(("num_beams", 2),))
    jobs = [Job(lambda p=p: p, p.size[2], d) for p in (short, long, short, long) for d in (greedy, beams)]
    made = list(batches(jobs, 2))
    assert sorted(n for numbers, _ in made for n in numbers) == list(range(8))
    for numbers, prompts in made:
        assert len({jobs[n].decoding for n in numbers}) == len({prompt.size for prompt in prompts}) == 1


# --- likelihoods ---


@torch.no_grad()
def teacher_forced(name: str, prompt: Prompt, continuation: str) -> float:
    """The sum of log-probabilities in one plain forward of the stock model."""
    model, processor = model_of(name)
    inputs = collate(processor, [prompt])
    extra = processor.tokenizer(continuation, add_special_tokens=False, return_tensors="pt")["input_ids"]
    whole = torch.cat([inputs["input_ids"], extra], 1)
    logits = model(**{**inputs, "input_ids": whole, "attention_mask": torch.ones_like(whole)}).logits
    logs = logits[0, -extra.shape[1] - 1 : -1].log_softmax(-1)
    return logs.gather(1, extra[0, :, None]).sum().item()


@pytest.mark.parametrize("name", MODELS)
def test_likelihoods_are_sums_and_rows_are_independent(name):
    model, processor = model_of(name)
    prompts, continuations = mixed(), [" yes", " The image shows a red star.", " no", " no no no", " yes"]
    with pruned(model, "none"):
        together = score_batch(model, processor, prompts, continuations)
    expected = [teacher_forced(name, p, c) for p, c in zip(prompts, continuations, strict=True)]
    assert [total for total, _ in together] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    "options", [{"policy": "flowcut", "ratio": 0.25}, {"policy": "fastv"}, {"policy": "paint"}]
)
def test_the_greedy_answer_is_greedy_and_no_other(options):
    model, processor = model_of("tiny-llava")
    options = dict(options)
    (answer,) = answers("tiny-llava", mixed()[1:2], 1, Decoding(max_new_tokens=8), **options)
    with pruned(model, options.pop("policy"), **options):
        right, wrong = score_batch(
            model, processor, [mixed()[1]] * 2, [answer.text, answer.text.replace("image", "star")]
        )
    assert right[1]
    assert not wrong[1]
    assert wrong[0] < right[0] < 0


def test_an_empty_continuation_raises():
    model, processor = model_of("tiny-llava")
    with pytest.raises(ValueError, match="has no tokens"):
        score_batch(model, processor, mixed()[:1], [""])


# --- scores ---


def test_pope_is_scored_by_our_pope():
    rows = pope_questions(list(make_scenes(3, 1, min_names=3)), "random", 1)
    given = ["Yes.", "No, there is none", "maybe", "not", "yes", "No"] * 3
    records = [scoring.pope_results(row, [answer]) for row, answer in zip(rows, given, strict=True)]
    expected = score_pope(rows, [{**row, "answer": answer} for row, answer in zip(rows, given, strict=True)])
    for rate in ("accuracy", "precision", "recall", "f1", "yes_ratio"):
        assert getattr(scoring, f"pope_{rate}")([r[rate] for r in records]) == expected.rates[rate]
    scores = [record["accuracy"]["score"] for record in records]
    assert sum(scores) / len(scores) == expected.rates["accuracy"]


@pytest.mark.parametrize(
    "row", [{"question": " Is it? ", "answer": "Yes"}, {"text": "Is it?", "label": "yes"}]
)
def test_both_forms_of_pope_rows(row):
    kwargs = {"pre_prompt": "Q: ", "post_prompt": "\nOne word."}
    assert scoring.pope_text(row, kwargs) == "Q: Is it?\nOne word."
    assert scoring.pope_target(row) == "yes"
    with pytest.raises(ValueError, match="needs the column question or text"):
        scoring.pope_text({"image": 0}, kwargs)


def test_chair_is_scored_by_our_chair(tmp_path):
    table = tmp_path / "words.txt"
    table.write_text("[objects]\n" + "".join(f"{name}: {plural}\n" for name, plural in PLURALS.items()))
    docs = [
        {"image_id": 1, "objects": ["star", "moon"], "vocabulary": str(table)},
        {"question_id": "2", "gt_object": '["ring"]', "vocabulary": str(table)},
    ]
    records = [
        scoring.chair_results(doc, [said])
        for doc, said in zip(docs, ["A star and a crown.", "Two rings."], strict=True)
    ]
    rates = {
        rate: getattr(scoring, f"chair_{rate.removeprefix('chair_')}")([r[rate] for r in records])
        for rate in records[0]
    }
    assert rates["chair_s"] == 0.5
    assert rates["chair_i"] == pytest.approx(1 / 3)
    assert rates["recall"] == pytest.approx(2 / 3)
    assert scoring.chair_results({"image_id": 3, "objects": "dog, cat"}, [""])["f1"]["objects"] == [
        "dog",
        "cat",
    ]


# --- tasks ---


def call(*arguments: str):
    return CliRunner().invoke(app, ["lmms-tasks", *arguments])


def test_the_command_prints_the_folder_of_the_tasks():
    result = call()
    assert result.exit_code == 0
    folder = Path(result.stdout.rstrip("\n"))
    assert folder == TASKS
    assert {"vlm_prune_pope.yaml", "vlm_prune_chair.yaml"} <= {file.name for file in folder.iterdir()}


def test_every_function_of_a_task_exists():
    for base in ("pope", "chair"):
        named = re.findall(r"!function ([\w.]+)", (TASKS / base).read_text())
        assert len(named) > 8
        for name in named:
            module, _, function = name.rpartition(".")
            assert module == scoring.__name__
            assert callable(getattr(scoring, function))


@pytest.fixture
def files(tmp_path):
    """A question file, an object list and their images."""
    make_scene(0).image.save(tmp_path / "a.png")
    row = {"question_id": 1, "image": "a.png", "text": "Is there a star?", "label": "yes"}
    (tmp_path / "pope_random.json").write_text(json.dumps(row) + "\n")
    (tmp_path / "pope_popular.json").write_text(json.dumps(row) + "\n")
    (tmp_path / "objects.jsonl").write_text(json.dumps({"image": "a.png", "objects": ["star"]}) + "\n")
    (tmp_path / "words.txt").write_text("[objects]\nstar: stars\n")
    return tmp_path


def test_tasks_on_ones_own_data(files):
    arguments = ["--pope", f"{files}/pope_random.json", "--pope", f"{files}/pope_popular.json"]
    arguments += [
        "--chair",
        f"{files}/objects.jsonl",
        "--vocabulary",
        f"{files}/words.txt",
        "--images",
        str(files),
    ]
    result = call(*arguments, "--out", str(files / "tasks"), "--post-prompt", "")
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{files / 'tasks'}\n"
    written = {file.name for file in (files / "tasks").iterdir()}
    assert {
        "vlm_prune_pope.yaml",
        "vlm_prune_pope_random.jsonl",
        "vlm_prune_chair.jsonl",
        "vocabulary.txt",
    } <= written
    row = json.loads((files / "tasks" / "vlm_prune_chair.jsonl").read_text())
    assert Path(row["image"]).is_file()
    assert Vocabulary.read(row["vocabulary"]).objects == {"star"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pope", "{}/pope_random.json"], "--out is needed"),
        (["--pope", "{}/pope_random.json", "--out", "{}/t"], "no such image"),
        (["--pope", "{}/missing.json", "--out", "{}/t"], "neither a file"),
        (["--pope", "{}", "--out", "{}/t"], "not a folder that DatasetDict.save_to_disk wrote"),
        (
            [
                "--pope",
                "{0}/pope_random.json",
                "--pope",
                "{0}/pope_random.json",
                "--images",
                "{0}",
                "--out",
                "{0}/t",
            ],
            "Rename one",
        ),
    ],
)
def test_wrong_data_is_one_line(files, arguments, message):
    result = call(*(argument.format(files) for argument in arguments))
    assert result.exit_code == 2
    assert message in result.output
    assert result.output.count("\n") == 1


def test_hub_names_are_left_to_the_hub(files):
    assert call("--pope", "lmms-lab/POPE", "--out", str(files / "t")).exit_code == 0
    assert "dataset_path: lmms-lab/POPE" in (files / "t" / "vlm_prune_pope.yaml").read_text()
