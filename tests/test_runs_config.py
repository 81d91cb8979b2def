"""A run's YAML file: mistakes are found before anything is computed, and the examples are free of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from vlm_prune.errors import PolicyError
from vlm_prune.eval.runs.cells import settings
from vlm_prune.eval.runs.table import joined, markdown, publish
from vlm_prune.eval.runs.yaml_file import ConfigError, load_config, parse_config

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.yaml"))

GOOD = """\
models: [tiny-llava]
policies:
  - flowcut
ratios: [0.25]
tasks:
  - task: pope
    data: {scenes: 4}
output: somewhere
"""


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_valid_and_all_their_policies_can_be_made(path):
    config = load_config(path)
    for model in config.models:
        assert list(settings(config, model)), model.name
    assert config.output.parts[0] == "runs"


def test_examples_cover_the_published_models_and_budgets():
    found = {path.stem: load_config(path) for path in EXAMPLES}
    names = {model.model.split("/")[-1] for config in found.values() for model in config.models}
    assert names >= {"llava-1.5-7b-hf", "llava-1.5-13b-hf", "llava-v1.6-vicuna-7b-hf", "InternVL3-8B-hf"}
    assert names >= {"llava-onevision-qwen2-7b-ov-hf", "tiny-llava", "tiny-internvl"}
    assert names >= {
        "Qwen2.5-VL-7B-Instruct",
        "Qwen3-VL-8B-Instruct",
        "gemma-3-4b-it",
        "SmolVLM2-2.2B-Instruct",
    }
    kinds = {task.kind for config in found.values() for task in config.tasks}
    assert kinds == {"pope", "chair", "amber_g", "amber_d", "mme", "choice", "vqa", "speed"}
    assert found["llava-1.5"].tokens == [192, 128, 64]
    assert found["llava-next"].tokens == [128, 64, 32]


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("ratios", "ratoes", 4, 'ratoes: there is no such key. Did you mean "ratios"?'),
        ("- flowcut", "- {policy: flowcut, setings: {}}", 3, 'Did you mean "settings"?'),
        ("[tiny-llava]", "[{model: tiny-llava, dtyp: float32}]", 1, 'Did you mean "dtype"?'),
        ("{scenes: 4}", "{scenes: 4, sise: [1, 2]}", 7, 'Did you mean "size"? Available: kind, scenes, size, sizes.'),
        ("    data", "    splitz: [random]\n    data", 7, 'Did you mean "splits"?'),
        ("{scenes: 4}", "{jsonl: a.jsonl, columns: {questoin: q}}", 7, 'Did you mean "question"?'),
        ("{scenes: 4}", "{}", 7, "one of the keys scenes, jsonl, disk, hub, coco"),
        ("{scenes: 4}", "{scenes: 0}", 7, "tasks.0.data.scenes: 1 or more is needed, got 0"),
        ("task: pope", "task: pop", 6, 'no task "pop". Did you mean "pope"? Available: pope, chair, amber_g'),
        ("- task: pope", "- taks: pope", 6, 'tasks.0.taks: there is no such key. Did you mean "task"?'),
        ("- task: pope", "- prompt: what", 6, "tasks.0: the key task has to say which task it is, got prompt, data"),
        ("- task: pope\n    data: {scenes: 4}", "- pope", 6, "got 'pope'"),
        ("{scenes: 4}", "{scnes: 2}", 7, 'tasks.0.data.scnes: there is no such key. Did you mean "scenes"?'),
        ("    data", "    splits: [random,\n      randm]\n    data", 8, '"randm". Did you mean "random"?'),
        ("ratios", "dtype: flaot32\nratios", 4, '"flaot32". Did you mean "float32"? Available: float32, float16,'),
        ("- flowcut", "- {policy: none, models: [tiny-lava]}", 3, "policies.0.models.0: unknown model 'tiny-lava'. D"),
        ("ratios", "output: a\nratios", 9, "output: appears twice, first in line 4"),
        ("    data", "    data: {scenes: 1}\n    data", 8, "data: appears twice, first in line 7"),
        ("{scenes: 4}", "{scenes: 4, size: [1, 2], scenes: 3}", 7, "scenes: appears twice, first in line 7"),
        ("    data", "    parser: offical\n    data", 7, "Did you mean 'official'?"),
        ("    data", "    models: [tiny-lava]\n    data", 7, "Did you mean 'tiny-llava'?"),
        ("[0.25]", "[1.5]", 4, "ratios.0: 1 or less is needed, got 1.5"),
        ("[tiny-llava]", "[tiny-llava, tiny-llava]", 1, "appears twice"),
        ("[tiny-llava]", "[tiny-llava", 2, "not YAML"),
        ("[tiny-llava]", "[" * 3000, 1, "more than 50 deep"),
        ("[tiny-llava]", "[tiny-llava\x01]", 1, "not YAML: special characters"),
        ("ratios", "seed: 2020-13-45\nratios", 4, "'2020-13-45' is not what it looks like (month must be in 1..12)"),
        ("ratios", "seed: 2020-12-05\nratios", 4, "seed: a whole number is needed, got datetime.date(2020"),
        ("[0.25]", "[0.5, 0.25, .50]", 4, "ratios.2: the budget 0.5 appears twice: keep one"),
        ("- flowcut", "- {policy: flowcut, tokens: [8, 8]}", 3, "policies.0.tokens.1: the budget 8 appears twice"),
        ("- flowcut", "- flowcut\n  - flowcut", 4, "policies.1: 'flowcut' appears twice, at the same budget: keep one"),
        ("- flowcut", "- none\n  - {policy: none, ratios: [0.1]}", 4, "'none' appears twice, at the same budget"),
        ("- flowcut", "- vhr\n  - {policy: vhr, ratios: [0.1]}", 4, "'vhr' appears twice, at the same budget"),
        (
            "- flowcut", "- {policy: random, tokens: [1]}\n  - {policy: random, settings: {seed: 1}}", 4,
            "policies.1: 'random' appears twice, with other settings: give each a label of its own",
        ),
        ("- flowcut", "- flowcut\n  - {policy: random, label: flowcut}", 4, "'flowcut' appears twice, with other"),
        ("- task", "- {task: pope, data: {scenes: 2}}\n  - task", 7, "tasks.1: 'pope' appears twice"),
        ("    data", "    prompt: Describe it.\n    data", 7, "'Describe it.' has no {question}, and every sample"),
        ("    data", "    prompt: '{quesiton}?'\n    data", 7, "has no {question}, and {quesiton} is not replaced"),
        ("pope", "chair\n    prompt: 'On {question}'", 7, "'On {question}' has {question}, and these data have no"),
        ("output: somewhere", "", 1, "output: this is missing, and has to be given"),
    ],
    ids=lambda value: str(value)[:24],
)  # fmt: skip
def test_mistakes_name_the_line_and_what_is_allowed(old, new, line, message):
    with pytest.raises(ConfigError) as raised:
        parse_config(GOOD.replace(old, new, 1), "run.yaml")
    first = str(raised.value).splitlines()[0]
    assert first.startswith(f"run.yaml:{line}: ")
    assert message in first


WRONG = {
    "models: 3": "models: a list, such as [a, b], is needed, got 3",
    "models: [3]": "models.0: a mapping, such as {key: value}, is needed, got 3",
    "models: []": "models: at least 1 is needed, got []",
    "models: [{model: [a]}]": "models.0.model: a text is needed, got ['a']",
    "models: [{model: m, trust_remote_code: perhaps}]": "trust_remote_code: true or false is needed, got 'perhaps'",
    "models: [{model: m, processor: [a]}]": "processor: a mapping, such as {key: value}, is needed, got ['a']",
    "models: [{model: m, device_map: 3.5}]": 'device_map: "auto", a device, or a mapping of modules to devices is',
    "models: [{model: m, device_map: {a: [1]}}]": 'device_map: "auto", a device, or a mapping of modules to devices',
    "policies: [{policy: none, settings: 4}]": "settings: a mapping, such as {key: value}, is needed, got 4",
    "policies: [{policy: none, per: 4}]": 'per: there is no such value as "4". Available: tile, image.',
    "ratios: [a]": "ratios.0: a number is needed, got 'a'",
    "ratios: [0]": "ratios.0: more than 0 is needed, got 0",
    "ratios: 0.5": "ratios: a list, such as [a, b], is needed, got 0.5",
    "tokens: [1.5]": "tokens.0: a whole number is needed, got 1.5",
    "tokens: [0]": "tokens.0: 1 or more is needed, got 0",
    "seed: [1]": "seed: a whole number is needed, got [1]",
    "batch_size: many": "batch_size: a whole number is needed, got 'many'",
    "on_bad_image: ignore": 'on_bad_image: there is no such value as "ignore". Available: fail, skip.',
    "output: [a]": "output: a path is needed, got ['a']",
    "tasks: []": "tasks: at least 1 is needed, got []",
    "tasks: [{task: pope, data: {scenes: 2, size: 128}}]": "size: a list, such as [128, 128], is needed, got 128",
    "tasks: [{task: pope, data: {scenes: 2, size: [128]}}]": "data.size.1: this is missing, and has to be given",
    "tasks: [{task: pope, data: {scenes: 2, size: [1, 2, 3]}}]": "data.size: at most 2 can be given, got [1, 2, 3]",
    "tasks: [{task: pope, data: {jsonl: {a: 1}}}]": "data.jsonl: a list, such as [a, b], is needed, got {'a': 1}",
    "tasks: [{task: pope, data: {jsonl: a, columns: a}}]": "data.columns: a mapping, such as {key: value}, is needed",
    "tasks: [{task: pope, data: {coco: a}}]": "data.images: this is missing, and has to be given",
    "tasks: [{task: vqa, data: {jsonl: a}, prompt: 3}]": "tasks.0.prompt: a text is needed, got 3",
    "tasks: [{task: speed, data: {scenes: 2}, rounds: .inf}]": "tasks.0.rounds: a number is needed, got inf",
    "tasks: [{task: pope, data: {scenes: 2}, splits: random}]": "tasks.0.splits: a list, such as [a, b], is needed",
}


@pytest.mark.parametrize("line", WRONG)
def test_mistakes_are_told_in_our_own_words(line):
    data = yaml.safe_load(GOOD) | yaml.safe_load(line)
    with pytest.raises(ConfigError) as raised:
        parse_config(yaml.safe_dump(data), "run.yaml")
    assert WRONG[line] in str(raised.value)
    assert "nput should" not in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("scenes: 2\nsize: [128, 128]\nsizess: {tiny-llava: [128, 128]}", 'data.sizess: there is no such key. Did you'),
        ("scenes: 2\nsize: [9, 9]\nsizes:\n  tiny-llava: [128, a]", "sizes.tiny-llava.1: a whole number is needed"),
        ("coco: there\nimages: there\nimage_id: ids.json", 'data.image_id: there is no such key.'),
        ("jsonl: a.jsonl\ncolumns:\n  id: a\n  questoin: q", 'columns.questoin: there is no such key.'),
        ("disk: there\nsplit: a\nlimit: 0", "data.limit: 1 or more is needed, got 0"),
    ],
    ids=lambda value: value.split(":")[0],
)  # fmt: skip
def test_the_key_of_a_source_is_not_taken_for_the_line_of_what_is_in_it(data, message):
    text = GOOD.replace("data: {scenes: 4}", "data:\n      " + data.replace("\n", "\n      "))
    with pytest.raises(ConfigError) as raised:
        parse_config(text, "run.yaml")
    assert str(raised.value).startswith(f"run.yaml:{8 + data.count(chr(10))}: tasks.0.")
    assert message in str(raised.value)


def test_a_policy_may_stand_twice_where_its_rows_differ():
    for policies in (
        "[{policy: random, models: [a]}, {policy: random, models: [b], settings: {seed: 1}}]",
        "[{policy: random, tokens: [8]}, {policy: random, ratios: [0.5]}]",
        "[{policy: random, tokens: [8]}, {policy: random, tokens: [8], per: image}]",
        "[random, {policy: random, label: other, settings: {seed: 1}}]",
        "[misspelt, misspelt]",
    ):
        text = GOOD.replace("\n  - flowcut", f" {policies}").replace(
            "[tiny-llava]", "[{model: m, label: a}, {model: m, label: b}]"
        )
        assert len(parse_config(text, "run.yaml").policies) == 2


def test_unknown_policies_and_settings_show_before_a_model_is_loaded():
    for policy in ("flowcutt", {"policy": "flowcut", "settings": {"compatt": "official"}}):
        config = parse_config(yaml.safe_dump(yaml.safe_load(GOOD) | {"policies": [policy]}), "run.yaml")
        with pytest.raises(PolicyError, match="Did you mean"):
            list(settings(config, config.models[0]))


def test_a_file_of_something_else_is_an_error(tmp_path):
    for text, message in (("- a", "has to hold keys"), ("", "has to hold keys")):
        (tmp_path / "run.yaml").write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_config(tmp_path / "run.yaml")
    with pytest.raises(ValueError, match="does not exist"):
        load_config(tmp_path / "missing.yaml")


def test_budgets_of_a_policy_replace_those_of_the_run():
    text = GOOD.replace("[0.25]", "[0.5, 0.25]\ntokens: [32]").replace(
        "- flowcut",
        "- none\n  - flowcut\n  - vhr\n  - {policy: random, tokens: [8]}\n  - {policy: fastv, ratios: []}",
    )
    config = parse_config(text, "run.yaml")
    found = [(entry.name, budget) for entry, budget in settings(config, config.models[0])]
    assert found == [
        ("none", {}),
        ("flowcut", {"tokens": 32}),
        ("flowcut", {"ratio": 0.5}),
        ("flowcut", {"ratio": 0.25}),
        ("vhr", {}),
        ("random", {"tokens": 8}),
        ("fastv", {}),
    ]


def test_the_results_page_is_the_run_of_its_example(tmp_path):
    docs = EXAMPLES[0].parents[1] / "docs"
    lines = json.loads((docs / "results.json").read_text())
    config = load_config(docs.parent / "examples" / "results-tiny.yaml")
    due = [
        (model.name, entry.name, budget)
        for model in config.models
        for entry, budget in settings(config, model)
    ]
    assert [(line["model"], line["policy"], line["budget"]) for line in lines] == due
    page = tmp_path / "results.md"
    page.write_text((docs / "results.md").read_text())
    publish(lines, page)
    assert page.read_text() == (docs / "results.md").read_text()


def test_labels_do_not_break_the_rows_of_a_table():
    row = {
        "cell": "c", "model": "a|b\nc", "policy": "x|y\r\nz\\|", "task": "t|1\n2", "kind": "vqa", "stages": ["encode"],
        "budget": {}, "tokens": 4, "n": 2, "metrics": {"accuracy": 0.5}, "intervals": {"accuracy": [0, 1]},
    }  # fmt: skip
    head, _, names, rule, shown, *_, end = markdown(joined([row], {}, 0), [("t|1\n2", "vqa")]).splitlines()
    assert head == r"## a\|b c"
    assert names.endswith(r"| t\|1 2 accuracy | 95 % |")
    assert shown == r"| x\|y z\\\| | encode |  | 4 | 50.0 | 0-100 |"
    assert len({len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in (names, rule, shown)}) == 1
    assert end.startswith("2 questions a row")


def test_a_page_without_a_place_for_tables_is_an_error(tmp_path):
    (tmp_path / "page.md").write_text("# Results\n")
    with pytest.raises(ValueError, match="there is no place for the tables"):
        publish([], tmp_path / "page.md")
