"""Commands ``pope``, ``pope-questions`` and ``chair``: scores for files that are already there.

With ``--json`` stdout holds one JSON object and nothing else. Warnings and errors go to stderr; an error ends
with exit code 2.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from vlm_prune.eval import chair as chair_scores
from vlm_prune.eval import pope as pope_scores
from vlm_prune.eval.pope_questions import (
    SPLITS,
    TEMPLATE,
    build_questions,
    read_object_lists,
    write_questions,
)
from vlm_prune.eval.records import read_records

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Errors in the given files as one line on stderr and exit code 2."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error


def _show(summary: dict[str, Any], as_json: bool) -> None:
    if as_json:
        json.dump(summary, sys.stdout, indent=1, allow_nan=False)
        sys.stdout.write("\n")
        return
    for name, value in summary.items():
        if isinstance(value, float):
            low, high = summary.get("intervals", {}).get(name, (None, None))
            typer.echo(f"{name:<24} {value:.4f}" + (f"  [{low:.4f}, {high:.4f}]" if low is not None else ""))
        elif isinstance(value, dict) and name != "intervals":
            typer.echo(f"{name}:")
            for split, part in value.items():
                rates = part if isinstance(part, dict) else {split: part}
                shown = "  ".join(f"{key} {rates[key]:.4f}" for key in pope_scores.RATES if key in rates)
                typer.echo(f"  {split:<14} {shown}")
        elif isinstance(value, int | str):
            typer.echo(f"{name:<24} {value}")


def _warn(warnings: list[str]) -> None:
    for warning in warnings:
        typer.echo(f"warning: {warning}", err=True)


def _split_name(path: Path) -> str:
    return next((split for split in SPLITS if split in path.stem), path.stem)


def _pope_results(
    questions: list[Path], answers: list[Path], labels: list[Path], parser: str
) -> dict[str, pope_scores.PopeResult]:
    """Results by split: file by file, or one file of each cut by its ``category``."""
    if len(questions) != len(answers):
        raise ValueError(
            f"{len(questions)} question files and {len(answers)} answer files; give them in pairs, in order"
        )
    files: list[tuple[Sequence[Any], Sequence[Any]]] = [
        (read_records(asked), read_records(given, by_id=("question_id", "answer")))
        for asked, given in zip(questions, answers, strict=True)
    ]
    if labels:
        if len(labels) != len(questions):
            raise ValueError(
                f"{len(questions)} question files and {len(labels)} files of labels; give one for each"
            )
        files = [
            pope_scores.relabelled(*rows, read_records(path))
            for rows, path in zip(files, labels, strict=True)
        ]
    if len(files) == 1:
        return pope_scores.score_splits(*files[0], parser)
    names = [_split_name(path) for path in questions]
    if len(set(names)) != len(names):
        names = [f"{name} {number}" for number, name in enumerate(names, 1)]
    return {name: pope_scores.score_pope(*rows, parser) for name, rows in zip(names, files, strict=True)}


def pope(
    questions: Annotated[
        list[Path],
        typer.Option(help="JSON lines or CSV with question_id, text, label, image; once for each split."),
    ],
    answers: Annotated[
        list[Path],
        typer.Option(
            help="JSON lines or CSV with question_id and text, answer or response, or {id: answer}; as often as "
            "--questions."
        ),
    ],
    labels: Annotated[
        list[Path] | None,
        typer.Option(
            help="Other labels, such as RePOPE's, with question_id; questions without one are left out."
        ),
    ] = None,
    parser: Annotated[
        str, typer.Option(help=f"How an answer is read: {', '.join(pope_scores.PARSERS)}.")
    ] = "official",
    as_json: AsJson = False,
) -> None:
    """Score POPE answers: accuracy, precision, recall, f1, yes_ratio; of several splits the mean too."""
    with _plain_errors():
        results = _pope_results(questions, answers, labels or [], parser)
        if len(results) == 1:
            (summary,) = (result.summary() for result in results.values())
            warnings = summary["warnings"]
        else:
            warnings = [
                f"{name}: {warning}" for name, result in results.items() for warning in result.warnings
            ]
            summary = {
                **pope_scores.mean_rates(results),
                "mean_over": list(results),
                "parser": parser,
                "splits": {name: result.summary() for name, result in results.items()},
                "warnings": warnings,
            }
        _warn(warnings)
        _show(summary, as_json)


def pope_questions(
    annotations: Annotated[
        Path, typer.Option(help="COCO instances_*.json, or lines with image and objects.")
    ],
    out: Annotated[
        Path, typer.Option(help="Folder for pope_random.json, pope_popular.json, pope_adversarial.json.")
    ],
    captions: Annotated[
        Path | None, typer.Option(help="COCO captions_*.json: their objects count as present.")
    ] = None,
    images: Annotated[int, typer.Option(help="Images to draw.")] = 500,
    per_image: Annotated[
        int, typer.Option(help="Present objects asked for in an image, and as many absent ones.")
    ] = 3,
    seed: Annotated[int, typer.Option(help="Of the drawn images and random negatives.")] = 0,
    template: Annotated[str, typer.Option(help="The question.")] = TEMPLATE,
) -> None:
    """Build POPE questions (random, popular, adversarial) from annotations, by the published rules."""
    with _plain_errors():
        built = build_questions(
            read_object_lists(annotations, captions),
            n_images=images,
            per_image=per_image,
            seed=seed,
            template=template,
        )
        out.mkdir(parents=True, exist_ok=True)
        for split, rows in built.items():
            write_questions(out / f"pope_{split}.json", rows)
            typer.echo(out / f"pope_{split}.json")


def chair(
    captions: Annotated[
        Path, typer.Option(help="JSON lines, list or CSV with image_id, caption; or {imgToEval: ..}.")
    ],
    annotations: Annotated[Path, typer.Option(help="Folder with instances_*.json and captions_*.json.")],
    variant: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(chair_scores.VARIANTS)}; default official, plain with --vocabulary."),
    ] = None,
    vocabulary: Annotated[
        Path | None, typer.Option(help="Table of objects and their words; default COCO's.")
    ] = None,
    image_ids: Annotated[Path | None, typer.Option(help="Score only the images of this saved list.")] = None,
    save_image_ids: Annotated[
        Path | None, typer.Option(help="Save the ids of the scored images here.")
    ] = None,
    image_key: Annotated[
        str | None, typer.Option(help="Key of the image id, if not image_id or image.")
    ] = None,
    caption_key: Annotated[
        str | None, typer.Option(help="Key of the caption, if not caption, text or answer.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Bootstrap draws for the 95 % intervals; 0 for none.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
    details: Annotated[
        Path | None, typer.Option(help="Write each caption's objects here, as the official script does.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Score captions: chair_s, chair_i, recall, precision, f1 (fractions), length in tokens, repetition."""
    with _plain_errors():
        words = chair_scores.Vocabulary.read(vocabulary) if vocabulary else None
        reader = chair_scores.CaptionReader(words, variant)
        rows = chair_scores.read_captions(captions, image_key, caption_key)
        if image_ids:
            rows = chair_scores.only_images(rows, chair_scores.read_image_ids(image_ids))
        ids = {image for image, _ in rows}
        truth = chair_scores.coco_truth(annotations, reader, ids)
        result = chair_scores.score_captions(rows, truth, reader, samples=samples, seed=seed)
        if save_image_ids:
            chair_scores.write_image_ids(save_image_ids, ids, captions=str(captions))
        summary = result.summary()
        if details:
            sentences = [score.as_official() for score in result.captions]
            details.write_text(
                json.dumps({"overall": summary, "sentences": sentences}, indent=1), encoding="utf-8"
            )
        _warn(result.warnings)
        if result.undefined:
            _warn([f"{', '.join(result.undefined)} set to 0: nothing to divide by"])
        _show(summary, as_json)


COMMANDS: dict[str, Callable[..., None]] = {"pope": pope, "pope-questions": pope_questions, "chair": chair}
"""Name -> command, to mount in another typer app: ``app.command(name)(function)``."""

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Score POPE answers and CHAIR captions.")
for _name, _command in COMMANDS.items():
    app.command(_name)(_command)

if __name__ == "__main__":
    app()
