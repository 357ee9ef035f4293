"""The stages of the demo, one after the other."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_vlbridge.checkpoint.convert import export_checkpoint, import_checkpoint
from megatron_vlbridge.checkpoint.hf.header import read_header
from megatron_vlbridge.checkpoint.peft.adapter import WEIGHTS
from megatron_vlbridge.checkpoint.peft.export import export_adapter
from megatron_vlbridge.checkpoint.peft.merge import merge_adapter
from megatron_vlbridge.data.images import MediaOptions
from megatron_vlbridge.data.labels.options import LabelOptions
from megatron_vlbridge.data.media import Conversation
from megatron_vlbridge.data.report.commands import Data, index
from megatron_vlbridge.demo.answers import Answers, accuracy, ask_transformers
from megatron_vlbridge.demo.digits import (
    BASE_DIGITS,
    answer,
    conversations,
    images_of,
    is_known_to_base,
    load_conversations,
    load_scans,
    split_scans,
    video_conversations,
    videos_of,
    write_conversations,
)
from megatron_vlbridge.demo.drawing import draw_answer_sheet, draw_loss_curve
from megatron_vlbridge.demo.output import Folder, Progress
from megatron_vlbridge.demo.process import Recipe, adapter_training, base_training, follow, train
from megatron_vlbridge.demo.report import Base, Difference, Result, report_text
from megatron_vlbridge.demo.start import FAMILIES, IMAGE_SIZE, write_checkpoint
from megatron_vlbridge.training.log_lines import duration

# The sources of a training, as for `--data`.
META = "train:\n  - path: {0}images.jsonl\n  - path: {0}videos.jsonl\n"


@dataclass(frozen=True)
class Options(Recipe):
    """What a user chooses, and how much data there is (all scans by default)."""

    out: Path = Path("demo-out")
    family: str = "qwen3_vl"
    train_scans: int = 1500
    train_pairs: int = 1500
    held_out_scans: int = 297
    held_out_pairs: int = 60
    train_videos: int = 750
    held_out_videos: int = 60


def run(options: Options, progress: Progress) -> Result:
    """Run all stages; leaves their results in `options.out` and returns what the report says.

    Raises VLBridgeError: a stage failed, or `options.out` holds something else.
    """
    folder, model = Folder(options.out), FAMILIES[options.family][0]
    folder.prepare()
    with progress.stage("Real handwritten digits become conversations"):
        counts, held_out = _write_data(options, folder, progress)
    with progress.stage(f"A small {model} with random weights, as a Hugging Face checkpoint"):
        parameters = write_checkpoint(folder.hf_start, options.seed, options.family)
        progress.note(f"{parameters:,} parameters, fp32, with its processor: {folder.hf_start}")
    with progress.stage("Index: the length of every conversation"):
        for meta in sorted(folder.data.glob("*.yaml")):
            _index_data(meta, folder, progress)
    with progress.stage("Import: Hugging Face -> Megatron"):
        import_checkpoint(folder.hf_start, folder.megatron_start)
        progress.note(f"{folder.megatron_start}")
    with progress.stage(f"Training with Megatron's own pretrain, TP={options.tp} x PP={options.pp}"):
        losses = train(base_training(folder, options), options, progress)
    with progress.stage("Export: Megatron -> Hugging Face"):
        export_checkpoint(folder.megatron_trained, folder.hf_trained, like=folder.hf_start)
        progress.note(f"{folder.hf_trained}")
    if options.lora:
        losses = losses + _train_adapters(options, folder, progress)
    with progress.stage("Digits that it has never seen, in transformers and in Megatron"):
        transformers = ask_transformers(folder.hf_merged if options.lora else folder.hf_trained, held_out)
        megatron = _ask_megatron(folder, options)
        result = Result(
            recipe=options,
            model=model,
            parameters=parameters,
            train_conversations=counts["images"] + counts["videos"],
            held_out_conversations=len(held_out),
            losses=losses,
            accuracy_megatron=accuracy(megatron.texts, held_out),
            accuracy_transformers=accuracy(transformers.texts, held_out),
            blind_megatron=accuracy(megatron.texts_blind, held_out),
            blind_transformers=accuracy(transformers.texts_blind, held_out),
            accuracy_videos=_accuracy_of(transformers.texts, held_out, [bool(videos_of(one)) for one in held_out]),
            other_answers=sum(one != other for one, other in zip(megatron.texts, transformers.texts, strict=True)),
            logits=Difference.of(megatron.logits, transformers.logits),
            base=_ask_base(folder, counts, held_out) if options.lora else None,
        )
    with progress.stage("Report"):
        draw_loss_curve(losses, folder.loss, title=f"{model} learns to read digits: training loss")
        _draw_answers(held_out, transformers.texts, folder.answers)
    result = replace(result, seconds=progress.seconds)
    folder.report.write_text(report_text(result), encoding="utf-8")
    _show(result, folder, progress)
    return result


def _train_adapters(options: Options, folder: Folder, progress: Progress) -> list[float]:
    """Train adapters of the exported checkpoint and export them; the loss of each iteration."""
    with progress.stage("Training of adapters alone (LoRA), on all digits"):
        losses = train(adapter_training(folder, options), options, progress)
    with progress.stage("Export: adapters -> a folder of peft -> merged into the base"):
        export_adapter(folder.megatron_adapters, folder.adapter)
        progress.note(f"{folder.adapter}")
        merge_adapter(folder.hf_trained, folder.adapter, folder.hf_merged)
        progress.note(f"{folder.hf_merged}")
    return losses


def _write_data(options: Options, folder: Folder, progress: Progress) -> tuple[dict[str, int], list[Conversation]]:
    """Write all files; the number of conversations in each, and the held-out ones as they were written."""
    known, unseen = split_scans(load_scans(IMAGE_SIZE), options.held_out_scans)
    known = known[: options.train_scans]
    held_out = conversations(unseen, options.held_out_pairs, options.seed)
    files = {
        "images": conversations(known, options.train_pairs, options.seed),
        "videos": video_conversations(known, options.train_videos, options.seed),
        "held-out": held_out + video_conversations(unseen, options.held_out_videos, options.seed),
    }
    metas = {"meta": META.format("")}
    if options.lora:
        half = [scan for scan in known if scan.digit in BASE_DIGITS]
        files["base-images"] = conversations(half, options.train_pairs // 2, options.seed)
        files["base-videos"] = video_conversations(half, options.train_videos // 2, options.seed)
        metas["base"] = META.format("base-")
    for name, some in files.items():
        write_conversations(some, folder.data / f"{name}.jsonl")
        two, videos = sum(len(images_of(one)) > 1 for one in some), sum(len(videos_of(one)) for one in some)
        progress.note(
            f"{len(some):,} conversations, {two:,} with two images, {videos:,} with a video: {folder.data / name}.jsonl"
        )
    for name, text in metas.items():
        (folder.data / f"{name}.yaml").write_text(text, encoding="utf-8")
    counts = {name: len(some) for name, some in files.items()}
    return counts, load_conversations(folder.data / "held-out.jsonl")


def _index_data(meta: Path, folder: Folder, progress: Progress) -> None:
    """Write the lengths of a training's conversations, as `vlbridge data index` does."""
    data = Data.open(meta, folder.hf_start, media=MediaOptions(), labels=LabelOptions())
    for one in index(data, workers=1, progress=lambda *_: None):
        progress.note(f"{one.conversations:,} conversations, {one.tokens:,} tokens: {one.path}")


def _ask_base(folder: Folder, counts: Mapping[str, int], held_out: Sequence[Conversation]) -> Base:
    """What the base answers in transformers without adapters, and how large these are."""
    texts = ask_transformers(folder.hf_trained, held_out).texts
    known = [is_known_to_base(one) for one in held_out]
    shapes = [tensor.spec.shape for tensor in read_header(folder.adapter / WEIGHTS).values()]
    return Base(
        conversations=counts["base-images"] + counts["base-videos"],
        adapter_parameters=sum(map(math.prod, shapes)),
        accuracy=accuracy(texts, held_out),
        accuracy_known=_accuracy_of(texts, held_out, known),
        accuracy_others=_accuracy_of(texts, held_out, [not one for one in known]),
    )


def _accuracy_of(texts: Sequence[str], held_out: Sequence[Conversation], chosen: Sequence[bool]) -> float:
    """The accuracy of the chosen conversations; NaN if there are none."""
    asked = [pair for pair, one in zip(zip(texts, held_out, strict=True), chosen, strict=True) if one]
    return accuracy(*zip(*asked, strict=True)) if asked else math.nan


def _ask_megatron(folder: Folder, options: Options) -> Answers:
    """Megatron's answers, in a fresh process, so that they share nothing with those of transformers."""
    result = folder.logs / "megatron-answers.safetensors"
    places = [folder.hf_start, folder.data / "held-out.jsonl", result, folder.megatron_trained]
    places += [folder.megatron_adapters] if options.lora else []
    command = ["-m", "megatron_vlbridge.demo.ask_megatron", *map(str, places)]
    follow(command, folder.logs / "megatron-answers.log")
    return Answers.load(result)


def _draw_answers(held_out: Sequence[Conversation], texts: Sequence[str], path: Path) -> None:
    single = [(one, text) for one, text in zip(held_out, texts, strict=True) if len(images_of(one)) == 1]
    images, expected = [images_of(one)[0] for one, _ in single], [answer(one) for one, _ in single]
    draw_answer_sheet(images, expected, [text for _, text in single], path, title="Digits that it has never seen")


def _show(result: Result, folder: Folder, progress: Progress) -> None:
    progress.note("")
    for claim in result.claims:
        progress.note(f"{'yes' if claim.holds else 'NO ':3}  {claim.text}: {claim.found}")
    progress.note("")
    progress.note(f"All of it in {duration(sum(result.seconds.values()))}. Read {folder.report}")
