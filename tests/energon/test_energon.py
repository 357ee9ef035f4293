"""Packs that Energon reads equal those of the map-style pipeline; a restored loader continues with the same ones."""

import copy
import io
import json
import pickle
import shutil
import subprocess
import sys
import tarfile
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.energon.errors import FatalSampleError
from PIL import Image
from torch import Tensor
from transformers import Qwen3VLProcessor

from megatron_vlbridge.config import Config
from megatron_vlbridge.data.chat import Sample, encode_conversation
from megatron_vlbridge.data.energon.loader import PackLoader
from megatron_vlbridge.data.energon.task_encoder import ConversationTaskEncoder
from megatron_vlbridge.data.images import MediaOptions
from megatron_vlbridge.data.labels.options import LabelOptions
from megatron_vlbridge.data.packing.packs import build_pack
from megatron_vlbridge.data.sources.mixture import open_data
from megatron_vlbridge.training.batch import read_pack
from tests.errors import rejects
from tests.functional.doc_blocks import all_blocks
from tests.unit.test_dataset import write_config
from tests.video_writer import moving, write_video

BLOCKS = [one for one in all_blocks() if one.page == "docs/energon.md"]
SEQ_LENGTH = 96
NUM_SAMPLES = 50  # in two shards, the last two with videos
PREPARE = "prepare --non-interactive --split-ratio 1,0,0 --sample-type CrudeWebdataset --num-workers 1 --no-progress"


def png(seed: int) -> bytes:
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (*random.integers(8, 24, 2), 3), dtype=np.uint8)
    Image.fromarray(pixels).save(content := io.BytesIO(), "png")
    return content.getvalue()


def mp4(seed: int) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return write_video(Path(folder) / "a.mp4", moving(8, 16, 16, seed), fps=4).read_bytes()


def members(index: int) -> dict[str, bytes]:
    """A conversation in one of four forms: with its images named, not named, without any, and with a video."""
    record: dict[str, Any]
    key, answer = f"k{index:03}", "seven " * (1 + index % 5)
    if index in (NUM_SAMPLES - 2, NUM_SAMPLES - 1):
        turns = [{"from": "human", "value": f"<video>hello {index}"}, {"from": "gpt", "value": answer.strip()}]
        record, media = {"conversations": turns}, {f"{key}.mp4": mp4(index)}
    elif index % 3 == 0:
        parts = [{"type": "image", "image": f"{key}.{name}.png"} for name in ("b", "a")]
        content = [parts[0], {"type": "text", "text": f"hello {index}"}, parts[1]]
        record = {"messages": [{"role": "user", "content": content}]}
        record["messages"].append({"role": "assistant", "content": answer.strip()})
        media = {f"{key}.a.png": png(index), f"{key}.b.png": png(100 + index)}
    elif index % 3 == 1:
        turns = [{"from": "human", "value": f"<image>\nhello {index}"}, {"from": "gpt", "value": answer.strip()}]
        record, media = {"conversations": turns}, {f"{key}.png": png(index)}
    else:
        turns = [{"from": "human", "value": f"hello {index}"}, {"from": "gpt", "value": answer.strip()}]
        record, media = {"conversations": turns}, {}
    return {**media, f"{key}.json": json.dumps(record).encode()}


def write(folder: Path, samples: list[dict[str, bytes]]) -> Path:
    """A folder of two shards, prepared for Energon."""
    folder.mkdir()
    for shard in range(2):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for sample in samples[shard * len(samples) // 2 : (shard + 1) * len(samples) // 2]:
                for name, content in sample.items():
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    command = [sys.executable, "-m", "megatron.energon.cli.main", *PREPARE.split(), str(folder)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("energon") / "set", [members(index) for index in range(NUM_SAMPLES)])


@pytest.fixture(scope="module")
def expected(folder: Path, processor: Qwen3VLProcessor) -> dict[tuple[int, ...], Sample]:
    """The samples of the map-style pipeline by their tokens, which are different for each."""
    conversations = open_data(folder)
    assert conversations is not None
    samples = [encode_conversation(one, processor) for one in conversations]
    found = {tuple(sample.input_ids.tolist()): sample for sample in samples}
    assert len(found) == NUM_SAMPLES
    return found


@pytest.fixture(scope="module")
def encoder(processor: Qwen3VLProcessor, config: Config) -> ConversationTaskEncoder:
    return ConversationTaskEncoder(processor, config, seq_length=SEQ_LENGTH)


def loader(folder: Path, encoder: ConversationTaskEncoder, **settings: Any) -> PackLoader:
    defaults = {"rank": 0, "world_size": 1, "workers": 0, "packing_buffer": 10, "shuffle_buffer": 8}
    return PackLoader(folder, encoder, **defaults | settings)


def segments(pack: dict[str, Tensor]) -> list[tuple[int, ...]]:
    lengths = pack["segment_lengths"][0].tolist()
    return [tuple(part.tolist()) for part in pack["tokens"][0][: sum(lengths)].split(lengths)]


def check_same(found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> None:
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pack_is_the_concatenation_of_map_style_samples(
    folder: Path,
    encoder: ConversationTaskEncoder,
    expected: dict[tuple[int, ...], Sample],
    config: Config,
    workers: int,
) -> None:
    packs = list(islice(loader(folder, encoder, workers=workers), 60))
    pad = encoder.processor.tokenizer.pad_token_id
    seen = [segment for pack in packs for segment in segments(pack)]
    assert set(seen) == expected.keys()
    assert len(seen) > 1.5 * len(packs)
    for pack in packs:
        together = build_pack([expected[segment] for segment in segments(pack)], SEQ_LENGTH, pad)
        check_same([pack], [{name: tensor[None] for name, tensor in together.items()}])
        read_pack(pack, config)


def test_the_first_epoch_has_each_conversation_once(
    folder: Path, encoder: ConversationTaskEncoder, expected: dict[tuple[int, ...], Sample]
) -> None:
    found: list[tuple[int, ...]] = []
    for pack in loader(folder, encoder, packing_buffer=NUM_SAMPLES, shuffle_buffer=1):
        found += segments(pack)
        if len(found) >= NUM_SAMPLES:
            break
    assert sorted(found) == sorted(expected)


def test_the_ranks_read_different_conversations(folder: Path, encoder: ConversationTaskEncoder) -> None:
    ranks = [
        {segment for pack in islice(loader(folder, encoder, rank=rank, world_size=2), 50) for segment in segments(pack)}
        for rank in range(2)
    ]
    assert [len(one) for one in ranks] == [NUM_SAMPLES // 2] * 2
    assert not ranks[0] & ranks[1]


def test_conversations_are_padded_for_context_parallelism(
    folder: Path, processor: Qwen3VLProcessor, config: Config
) -> None:
    encoder = ConversationTaskEncoder(processor, config, seq_length=SEQ_LENGTH, multiple_of=32)
    packs = list(islice(loader(folder, encoder), 20))
    padded = [sum(-(-length // 32) * 32 for length in pack["segment_lengths"][0].tolist()) for pack in packs]
    assert max(padded) == SEQ_LENGTH
    assert any(sum(pack["segment_lengths"][0].tolist()) < total for pack, total in zip(packs, padded, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("read", [1, 8])
def test_a_restored_loader_continues_with_the_same_packs(
    folder: Path, encoder: ConversationTaskEncoder, workers: int, read: int
) -> None:
    first = loader(folder, encoder, workers=workers)
    packs = iter(first)
    before = list(islice(packs, read))
    state = pickle.dumps(first.save_state())
    rest = list(islice(packs, 8))
    restored = loader(folder, encoder, workers=workers)
    restored.restore_state(pickle.loads(state))
    check_same(list(islice(restored, 8)), rest)
    assert segments(before[0]) != segments(rest[0])


OTHER_SETTINGS = {
    "workers": ({"workers": 2}, "workers: expected 0, that of the saved state, found 2; continue with this number"),
    "size": ({"world_size": 2}, "data-parallel size: expected 1, that of the saved state, found 2"),
    "packing buffer": ({"packing_buffer": 11}, "packing buffer: expected 10, that of the saved state, found 11"),
    "shuffle buffer": ({"shuffle_buffer": 9}, "shuffle buffer: expected 8, that of the saved state, found 9"),
}


@pytest.mark.parametrize(("settings", "phrase"), OTHER_SETTINGS.values(), ids=OTHER_SETTINGS)
def test_a_state_of_other_settings_is_rejected(
    folder: Path, encoder: ConversationTaskEncoder, settings: dict[str, Any], phrase: str
) -> None:
    saved = loader(folder, encoder)
    next(iter(saved))
    with rejects("Energon: ", phrase, "or start the data from the beginning"):
        loader(folder, encoder, **settings).restore_state(saved.save_state())


def test_a_state_of_another_rank_or_length_is_rejected(
    folder: Path, encoder: ConversationTaskEncoder, processor: Qwen3VLProcessor, config: Config
) -> None:
    state = loader(folder, encoder, world_size=2).save_state()
    with rejects("data-parallel rank: expected 0, that of the saved state, found 1; give each"):
        loader(folder, encoder, rank=1, world_size=2).restore_state(state)
    state = loader(folder, encoder).save_state()
    for name, value, settings in (
        ("sequence length", SEQ_LENGTH, {"seq_length": 128}),
        ("multiple of", 1, {"seq_length": SEQ_LENGTH, "multiple_of": 2}),
    ):
        other = ConversationTaskEncoder(processor, config, **settings)
        with rejects(f"{name}: expected {value}, that of the saved state"):
            loader(folder, other).restore_state(state)


OTHER_ENCODERS = {
    "form": {"form": "sharegpt"},
    "media options": {"media": MediaOptions(max_pixels=512)},
    "label options": {"labels": LabelOptions(turns="last")},
}


@pytest.mark.parametrize("name", OTHER_ENCODERS)
def test_a_state_of_another_encoder_is_rejected(
    folder: Path, encoder: ConversationTaskEncoder, processor: Qwen3VLProcessor, config: Config, name: str
) -> None:
    other = ConversationTaskEncoder(processor, config, seq_length=SEQ_LENGTH, **OTHER_ENCODERS[name])
    with rejects(f"Energon: {name}: expected ", ", that of the saved state, found "):
        loader(folder, other).restore_state(loader(folder, encoder).save_state())


def test_a_state_belongs_to_its_shards_and_not_to_their_path(
    folder: Path, encoder: ConversationTaskEncoder, tmp_path: Path
) -> None:
    saved = loader(folder, encoder)
    next(iter(saved))
    state = saved.save_state()
    loader(shutil.copytree(folder, tmp_path / "moved"), encoder).restore_state(state)
    # Fewer conversations, and as many of other lengths.
    for name, places in (("fewer", range(NUM_SAMPLES - 2)), ("others", range(100, 100 + NUM_SAMPLES))):
        other = write(tmp_path / name, [members(index) for index in places])
        with rejects("Energon: dataset: expected ", "that of the saved state", "continue with the same shards"):
            loader(other, encoder).restore_state(state)


def test_a_state_of_another_processor_is_rejected(
    folder: Path, encoder: ConversationTaskEncoder, processor: Qwen3VLProcessor, config: Config
) -> None:
    other = copy.deepcopy(processor)
    other.image_processor.size = {"shortest_edge": 64, "longest_edge": 256}
    state = loader(folder, encoder).save_state()
    with rejects("Energon: processor: expected ", "continue with the same processor"):
        loader(folder, ConversationTaskEncoder(other, config, seq_length=SEQ_LENGTH)).restore_state(state)
    del state["settings"]["processor"]
    with rejects("Energon: processor: expected None, that of the saved state"):
        loader(folder, encoder).restore_state(state)


def test_what_is_not_a_state_is_rejected(folder: Path, encoder: ConversationTaskEncoder) -> None:
    started = loader(folder, encoder)
    state = started.save_state()
    next(iter(started))
    with rejects("a state is restored before the first pack is read"):
        started.restore_state(state)
    with rejects("expected a state of PackLoader.save_state, found dict"):
        loader(folder, encoder).restore_state({"state": 1})


BAD = {
    "no answer": ({"k.json": b'{"messages": [{"role": "user", "content": "hello"}]}'}, "no supervised token"),
    "cut image": ({**members(1), "k001.png": png(1)[:-40]}, "cannot be decoded as an image"),
    "missing image": ({"k000.json": members(0)["k000.json"]}, "expected a member 'k000.b.png', found bad.json"),
    "too long": (
        {"k.json": json.dumps({"messages": [{"role": "assistant", "content": "seven " * 200}]}).encode()},
        "tokens do not fit into a pack of 96",
    ),
}


@pytest.mark.parametrize(("name", "workers"), [*((name, 0) for name in BAD), ("cut image", 1)])
def test_an_invalid_conversation_ends_the_run(
    tmp_path: Path, encoder: ConversationTaskEncoder, name: str, workers: int
) -> None:
    sample, phrase = BAD[name]
    folder = write(tmp_path / "set", [members(5), {f"bad.{key.partition('.')[2]}": x for key, x in sample.items()}])
    with pytest.raises(FatalSampleError) as caught:
        list(islice(loader(folder, encoder, workers=workers), 5))
    assert phrase in str(caught.value)
    assert "1.tar, sample bad" in str(caught.value)


def test_the_documented_script_reads_a_pack(
    folder: Path, processor: Qwen3VLProcessor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = [one.text for one in BLOCKS if "PackLoader" in one.text]
    names: dict[str, Any] = {}
    processor.save_pretrained(tmp_path)
    write_config(tmp_path, processor)
    (tmp_path / "shards").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    exec(code.replace("qwen3-vl-8b-megatron/hf", str(tmp_path)), names)
    assert names["pack"]["tokens"].shape == (1, 8192)
    assert names["state"].keys() == {"settings", "state"}


def test_the_documented_command_is_that_of_the_tests() -> None:
    (command,) = [one.text for one in BLOCKS if one.text.startswith("energon prepare")]
    assert command.split()[1:-1] == PREPARE.replace("workers 1 --no-progress", "workers 8").split()
