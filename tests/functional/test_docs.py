"""Every code block in README.md and docs/*.md is run, or checked as far as possible."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor

import megatron_vlbridge
from megatron_vlbridge import read_config
from megatron_vlbridge.checkpoint.convert import import_checkpoint
from megatron_vlbridge.checkpoint.verify import verify
from megatron_vlbridge.cli import main
from megatron_vlbridge.data.chat import encode_conversation
from megatron_vlbridge.data.dataset import PackedConversations, read_conversations
from megatron_vlbridge.data.media import load_video
from megatron_vlbridge.data.sources.forms.registry import NAMES
from megatron_vlbridge.data.sources.meta import read_meta
from megatron_vlbridge.data.sources.mixture import open_data
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.training.metrics.columns import COLUMNS
from megatron_vlbridge.training.metrics.csv_file import CsvFile
from tests import digits_checkpoint, reference
from tests.functional.doc_blocks import ROOT, Block, all_blocks, blocks
from tests.functional.pool import Layout, Pool
from tests.functional.test_own_script import documented_script
from tests.functional.test_recipe import documented_recipe

README, CHECKPOINTS, TRAINING = "README.md", "docs/checkpoints.md", "docs/training.md"
LORA = "docs/lora.md"
# All fenced blocks of this page are pasted into one shell, except the first one, which installs; the others are output.
PASTED = "docs/data.md"

COMMANDS = {
    "import": (README, "vlbridge import Qwen3-VL-8B-Instruct qwen3-vl-8b-megatron"),
    "export": (README, "vlbridge export run qwen3-vl-8b-trained --like Qwen3-VL-8B-Instruct"),
    "line": (README, '{"messages": [{"role": "user", "content": [{"type": "image", "image": "cat.png"}, '),
    "data": (README, "vlbridge data check train.jsonl"),
    "train": (README, "torchrun --nproc_per_node 8 examples/pretrain.py \\"),
    "plot": (TRAINING, "vlbridge plot metrics.csv -o metrics.html"),
    "short train": (TRAINING, "torchrun --nproc_per_node 1 examples/pretrain.py --cpu "),
    "lora train": (LORA, "torchrun --nproc_per_node 8 examples/pretrain.py \\"),
    "lora export": (LORA, "vlbridge export run-lora adapter"),  # tests/functional/test_lora_training.py
    "lora merge": (LORA, "vlbridge merge Qwen3-VL-8B-Instruct adapter merged"),
    "usage": (CHECKPOINTS, "vlbridge import  HF_DIR MEGATRON_DIR"),
}
PYTHON = {
    "names": (README, "from megatron_vlbridge import ("),
    "live": (CHECKPOINTS, 'load_hf_weights(model, "Qwen/Qwen3-VL-2B-Instruct")'),
    "digests": (CHECKPOINTS, "from megatron_vlbridge.checkpoint.live import WeightDigests"),
    "video": (TRAINING, "text = processor.apply_chat_template("),
    "console": (TRAINING, "from megatron_vlbridge.training import console"),
    "script": (TRAINING, "import sys"),
    "freeze": (TRAINING, "from megatron_vlbridge.model.parts import freeze"),
    "lora": (LORA, "from megatron_vlbridge.checkpoint.live.adapters import"),
    "recipe": (TRAINING, "from megatron_vlbridge import Qwen3VLModel, load_hf_weights, read_config"),
    # Run by tests/functional/test_auto_bridge_lora.py.
    "bridge": ("docs/auto-bridge.md", "from megatron.core.distributed import"),
    "bridge lora": ("docs/auto-bridge.md", "from megatron_vlbridge.model.lora.attach import"),
    # Run by tests/functional/test_torch_pipeline.py.
    "pipeline": ("docs/torch-pipeline.md", "import torch"),
    # Run by tests/functional/test_transformers_batch.py.
    "packs": ("docs/transformers.md", "import torch"),
    # Run by tests/frameworks/test_mbridge.py.
    "mbridge": ("docs/frameworks.md", "import megatron_vlbridge.integrations.mbridge"),
    # Run by tests/energon/test_energon.py.
    "energon": ("docs/energon.md", "from transformers import AutoProcessor"),
}
# Too long for this test, or needs a GPU; see `test_commands_of_the_project_exist`.
PROJECT = {
    "make": (README, "make demo "),
    "install": (PASTED, "make setup"),
    "interruptions": (CHECKPOINTS, ".venv/bin/python -m pytest -s tests/functional/test_interrupt.py"),
    "costs": ("docs/convert.md", "python benchmarks/convert.py --folder DISK"),
    "te": ("docs/gpu.md", "make test-te"),
    "gpu": ("docs/gpu.md", "ci/gpu.sh "),
    "prepare": ("docs/energon.md", "energon prepare --non-interactive"),  # tests/energon/test_energon.py
}
# Not commands.
OTHER = {
    # Compared by tests/functional/test_data_counts.py.
    "counts": (TRAINING, "data     train.jsonl: 30 read"),
    "pipeline": (README, "HF checkpoint ──import──>"),
    "folder": (CHECKPOINTS, "MEGATRON_DIR/"),
    "output": (TRAINING, "model    Qwen3VLForConditionalGeneration, "),
    "tools": (TRAINING, '{"tools": [{'),  # tests/unit/test_label_masks.py
    "sources": (TRAINING, "train:"),
    "flops": (TRAINING, "3 x forward"),  # tests/unit/test_flops.py
    "router loss": (TRAINING, "(sum of token losses "),  # tests/functional/test_router_loss.py
    "prediction": (TRAINING, "x_i = mtp.fc("),  # tests/functional/test_mtp.py
}
CLAIMS = [*COMMANDS.values(), *PYTHON.values(), *PROJECT.values(), *OTHER.values()]


def block(claim: tuple[str, str]) -> Block:
    page, start = claim
    (found,) = (one for one in all_blocks() if one.page == page and one.first.startswith(start))
    return found


def command(claim: tuple[str, str]) -> list[str]:
    """The arguments of a block with one command."""
    return shlex.split(block(claim).text.replace("\\\n", ""))


def test_each_block_is_covered_once() -> None:
    every = all_blocks()
    assert len(every) > 25
    pasted = [one for one in every if one.page == PASTED][1:]
    for one in every:
        claims = [claim for claim in CLAIMS if one.page == claim[0] and one.first.startswith(claim[1])]
        assert len(claims) + (one in pasted) == 1, f"{one}\nis in {claims or 'none of the tables above'}: add it to one"
    for claim in CLAIMS:
        block(claim)


def test_fenced_and_indented_blocks_are_found() -> None:
    page = (
        "text\n    no block\n\n    one\n\n      two\n\n```\nthree\n    x\n```\ntext\n\n  ````sh\n```\n````\n\n    four"
    )
    found = [(one.line, one.text, one.fenced) for one in blocks("page", page)]
    assert found == [
        (4, "one\n\n  two\n", False),
        (9, "three\n    x\n", True),
        (15, "```\n", True),
        (18, "four\n", False),
    ]


@pytest.fixture(scope="module")
def pasted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder in which docs/data.md was pasted, and the output."""
    folder = tmp_path_factory.mktemp("pasted")
    (folder / "examples").symlink_to(ROOT / "examples")
    page = [one.text for one in all_blocks() if one.page == PASTED and one.fenced]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}
    script = ["bash", "-euo", "pipefail", "-c", "\n".join(page[1:])]
    run = subprocess.run(script, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-4000:]
    return folder, run.stdout


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder `hf`, and a Megatron checkpoint `run` without one, as a training run saves it."""
    folder = digits_checkpoint.write(tmp_path_factory.mktemp("checkpoints"))
    import_checkpoint(folder / "hf", folder / "run")
    shutil.rmtree(folder / "run" / "hf")
    return folder


@pytest.fixture
def workplace(checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the files named on the pages: checkpoints, conversations, a run."""
    for name in ("Qwen3-VL-8B-Instruct", "hf"):
        shutil.copytree(checkpoints / "hf", tmp_path / name)
    Image.new("RGB", (64, 64), "orange").save(tmp_path / "cat.png")
    for name in ("train.jsonl", "valid.jsonl"):
        # The page wraps the line.
        (tmp_path / name).write_text(block(COMMANDS["line"]).text.replace("\n", "") + "\n")
    (tmp_path / "run").symlink_to(checkpoints / "run")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.layouts
def test_the_pasted_page_trains_a_model_that_answers(pasted: tuple[Path, str]) -> None:
    folder, output = pasted
    assert ": the same" in output
    losses = [float(loss) for loss in re.findall(r"iteration +\d+/\d+ +loss ([0-9.]+)", output)]
    assert losses[-1] < 0.1 * losses[0]
    assert "iteration 41/80" in output
    answers = re.findall("expected: (.*?) +found: (.*)", output)
    assert len(answers) == 12
    assert sum(expected == found for expected, found in answers) >= 10
    assert verify(folder / "first-run" / "trained", folder / "first-run" / "hf-trained").equal


@pytest.mark.layouts
def test_the_pasted_page_prints_the_output_on_it(pasted: tuple[Path, str]) -> None:
    """In its order, but for the numbers, and what "..." stands for."""

    def without_numbers(text: str) -> str:
        return re.sub(r"\d+([.,]\d+)*", "0", text)

    printed = iter(without_numbers(pasted[1]).splitlines())
    for one in (one for one in all_blocks() if one.page == PASTED and not one.fenced):
        for line in without_numbers(one.text).splitlines():
            pattern = ".*".join(map(re.escape, line.split("...")))
            assert any(re.fullmatch(pattern, other) for other in printed), line


@pytest.mark.layouts
def test_a_run_prints_the_documented_kinds_of_lines(pasted: tuple[Path, str]) -> None:
    lines = pasted[1].splitlines()
    for line in block(OTHER["output"]).text.splitlines()[:-1]:
        assert any(printed.startswith(f"{line.split()[0]} ") for printed in lines), line


@pytest.mark.layouts
def test_an_imported_folder_has_the_documented_contents(pasted: tuple[Path, str]) -> None:
    documented = [line.split()[0] for line in block(OTHER["folder"]).text.splitlines()[1:]]
    found = [path.name + "/" * path.is_dir() for path in (pasted[0] / "first-run" / "megatron").iterdir()]
    assert sorted(documented) == sorted(found)


def test_the_commands_of_the_readme_convert(workplace: Path) -> None:
    for name in ("import", "export"):
        assert main(command(COMMANDS[name])[1:]) == 0
    assert verify("Qwen3-VL-8B-Instruct", "qwen3-vl-8b-megatron").equal
    assert verify("run", "qwen3-vl-8b-trained").equal


def test_the_data_commands_of_the_readme_check_and_measure(workplace: Path) -> None:
    for line in block(COMMANDS["data"]).text.splitlines():
        assert main(shlex.split(line)[1:]) == 0
    assert "<mark>A cat." in (workplace / "data.html").read_text()
    assert (workplace / "train.jsonl.train.lengths").exists()


def test_the_documented_plot_is_drawn(workplace: Path) -> None:
    CsvFile(workplace / "metrics.csv").append({"iteration": 1, "lm_loss": 2.0})
    assert main(command(COMMANDS["plot"])[1:]) == 0
    assert "lm loss" in (workplace / "metrics.html").read_text()


def test_the_columns_of_the_csv_file_are_documented() -> None:
    documented = (ROOT / TRAINING).read_text().split("| column |")[1].split("\n\n")[0]
    rows = [line.split("|")[1] for line in documented.splitlines()[2:]]
    assert [name for row in rows for name in re.findall("`([a-z_]+)`", row)] == list(COLUMNS)


def test_the_documented_line_is_a_conversation(workplace: Path) -> None:
    processor = AutoProcessor.from_pretrained("hf")
    sample = encode_conversation(read_conversations(workplace / "train.jsonl")[0], processor)
    assert sample.image_grid_thw.tolist() == [[1, 4, 4]]
    assert processor.decode(sample.input_ids[sample.loss_mask]) == "A cat.<|im_end|>"


@contextmanager
def in_folder(folder: Path, **environment: str) -> Iterator[None]:
    """Change the working directory and environment, and restore them, as the worker is shared with other tests."""
    before, where, words = dict(os.environ), Path.cwd(), sys.argv
    os.chdir(folder)
    os.environ.update(environment)
    try:
        yield
    finally:
        os.chdir(where)
        os.environ.clear()
        os.environ.update(before)
        sys.argv = words


def parse(layout: Layout, folder: Path, commands: Sequence[tuple[int, Sequence[str]]]) -> list[str]:
    """The result of `parse_arguments` for each command, on the first of `world` processes."""
    from megatron.training.global_vars import unset_global_variables

    from megatron_vlbridge.training.pretrain import parse_arguments

    results = []
    for world, words in commands:
        with in_folder(folder, RANK="0", WORLD_SIZE=str(world)):
            sys.argv = ["pretrain", *words]
            try:
                parse_arguments()
                results.append("accepted")
            except VLBridgeError as error:
                results.append(str(error))
            finally:
                unset_global_variables()
    return results


def training(words: Sequence[str]) -> tuple[int, list[str]]:
    """The number of processes and the arguments of a torchrun command, with `--cpu`."""
    assert list(words[:2]) == ["torchrun", "--nproc_per_node"]
    assert (ROOT / words[3]).is_file()
    return int(words[2]), [*words[4:], *(["--cpu"] if "--cpu" not in words else [])]


def test_documented_training_commands_are_accepted(workplace: Path, pool: Pool) -> None:
    config = workplace / "Qwen3-VL-8B-Instruct" / "config.json"
    config.write_text(
        config.read_text().replace('"max_position_embeddings": 4096', '"max_position_embeddings": 262144')
    )
    assert main(command(COMMANDS["import"])[1:]) == 0
    commands = [training(command(COMMANDS[name])) for name in ("train", "short train", "lora train")]
    assert pool.run(parse, Layout(), folder=workplace, commands=commands) == [["accepted"] * 3]


def training_options(layout: Layout) -> set[str]:
    """All arguments of the training script."""
    from megatron_vlbridge.training.launch.arguments import add_arguments
    from megatron_vlbridge.training.launch.parser import make_parser

    return set(make_parser(add_arguments)._option_string_actions)


def printed(*words: str) -> str:
    """The output of a Python program that is run in the root of the project and succeeds."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return run.stdout


def help_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit, match="0"):
        main([*words, "--help"])
    return capsys.readouterr().out


def test_the_documented_usage_of_vlbridge_matches_the_parser(capsys: pytest.CaptureFixture[str]) -> None:
    usage = re.split(r"^vlbridge +", block(COMMANDS["usage"]).text, flags=re.MULTILINE)[1:]
    assert len(usage) == 5
    for line in usage:
        known = help_of(capsys, line.split()[0])
        for option in re.findall(r"--[a-z0-9-]+", line):
            assert re.search(rf"{option}\b", known), f"{line}: {option}"


ENERGON = {"--non-interactive", "--split-ratio", "--sample-type"}  # run by tests/energon/test_energon.py
TORCHRUN = {"--nproc_per_node", "--nnodes", "--rdzv-endpoint", "--shutdown-timeout", "--standalone"}
OPTION = r"(?<![\w|-])--[a-z][\w-]*"


def test_each_option_on_the_pages_exists(capsys: pytest.CaptureFixture[str], pool: Pool) -> None:
    known = pool.run(training_options, Layout())[0] | TORCHRUN | ENERGON
    texts = [help_of(capsys, name) for name in ("import", "export", "verify", "inspect", "plot", "data")]
    texts += [printed("-m", "megatron_vlbridge.demo", "--help"), printed("benchmarks/convert.py", "--help")]
    known |= {option for text in texts for option in re.findall(OPTION, text)}
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for number, line in enumerate(page.read_text().splitlines(), 1):
            found = re.findall(OPTION, line)
            assert set(found) <= known, f"{page.name}, line {number}: {set(found) - known}"


def run_names(layout: Layout, code: str) -> list[str]:
    """The names that a block imports."""
    names: dict[str, Any] = {}
    exec(code, names)
    return [name for name in names if name != "__builtins__"]


def test_the_names_of_the_library_can_be_imported(pool: Pool) -> None:
    assert set(pool.run(run_names, Layout(), code=block(PYTHON["names"]).text)[0]) <= set(megatron_vlbridge.__all__)


def run_live(layout: Layout, folder: Path, code: str) -> dict[str, torch.Tensor]:
    """The weights that the engine in the block receives."""
    from megatron_vlbridge import export_hf_weights, load_hf_weights, save_hf
    from tests.functional.ranks import build_model

    received: dict[str, torch.Tensor] = {}
    engine = type("Engine", (), {"load_weights": lambda self, weights: received.update(weights)})()
    names = {"load_hf_weights": load_hf_weights, "export_hf_weights": export_hf_weights, "save_hf": save_hf}
    with in_folder(folder):
        model = build_model(layout, folder / "Qwen" / "Qwen3-VL-2B-Instruct", load=False)
        exec(code, {**names, "model": model, "engine": engine})
    return received


def test_the_functions_on_live_models_run_as_documented(tmp_path: Path, pool: Pool) -> None:
    hf = reference.write_checkpoint(tmp_path / "Qwen" / "Qwen3-VL-2B-Instruct")
    received = pool.run(
        run_live, Layout(), folder=tmp_path, code=block(PYTHON["live"]).text + block(PYTHON["digests"]).text
    )[0]
    expected = {name: tensor for file in hf.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert received.keys() == expected.keys()
    assert all(received[name].equal(tensor) for name, tensor in expected.items())
    assert verify(hf, tmp_path / "trained").equal


def run_freeze(layout: Layout, folder: Path, code: str) -> set[str]:
    """The first names of the parameters that the block freezes."""
    from tests.functional.ranks import build_model

    model = build_model(layout, folder, load=False)
    exec(code, {"model": model})
    return {name.split(".")[0] for name, x in model.named_parameters() if not x.requires_grad}


def test_the_lines_that_freeze_parts_run(tmp_path: Path, pool: Pool) -> None:
    folder = reference.write_checkpoint(tmp_path)
    assert pool.run(run_freeze, Layout(), folder=folder, code=block(PYTHON["freeze"]).text) == [{"vision_model"}]


def run_lora(layout: Layout, folder: Path, code: str) -> list[str]:
    """The names of the tensors that the block exports."""
    from tests.functional.ranks import build_model

    names: dict[str, Any] = {"model": build_model(layout, folder / "hf", load=False)}
    with in_folder(folder):
        exec(code, names)
    return list(names["tensors"])


def test_the_documented_adapters_are_saved(pool: Pool, tmp_path: Path) -> None:
    reference.write_checkpoint(tmp_path / "hf")
    (found,) = pool.run(run_lora, Layout(), folder=tmp_path, code=block(PYTHON["lora"]).text)
    assert found[0] == "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"
    assert load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys() == set(found)


@pytest.mark.layouts
def test_the_prompt_of_a_video_is_that_of_training(pasted: tuple[Path, str]) -> None:
    data = pasted[0] / "first-run"
    processor = AutoProcessor.from_pretrained(data / "hf")
    every = open_data(data / "data" / "meta.yaml", "valid")
    conversation = next(one for one in every if one[0]["content"][0]["type"] == "video")
    video = load_video(conversation[0]["content"][0])
    names = {"processor": processor, "messages": [conversation[0]], "frames": video.frames, "metadata": video.metadata}
    exec(block(PYTHON["video"]).text, names)
    prompt = names["inputs"]["input_ids"][0]
    assert prompt.equal(encode_conversation(conversation, processor).input_ids[: len(prompt)])


def test_the_file_of_sources_is_read(tmp_path: Path) -> None:
    for folder in ("tables", "images"):
        (tmp_path / folder).mkdir()
    for name in ("captions.jsonl", "tables/vqa.jsonl", "valid.jsonl"):
        (tmp_path / name).touch()
    (tmp_path / "meta.yaml").write_text(block(OTHER["sources"]).text)
    found = read_meta(tmp_path / "meta.yaml")
    assert [[source.form and source.form.name for source in found[split]] for split in ("train", "valid")] == [
        ["sharegpt", "columns"],
        [None],
    ]
    table = (ROOT / TRAINING).read_text().split("| form | a record |")[1].split("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == [name for name in NAMES if name != "auto"]


def test_the_lines_for_a_custom_script_run() -> None:
    code = block(PYTHON["console"]).text + 'console.note("printed")\n'
    assert printed("-c", code) == "printed\n"


def test_the_script_and_the_recipe_are_run_by_other_tests() -> None:
    """tests/functional/test_own_script.py and test_recipe.py."""
    script = [line for line in documented_script().splitlines() if "called: " not in line]
    assert script == block(PYTHON["script"]).text.splitlines()
    assert documented_recipe() == block(PYTHON["recipe"]).text


def test_commands_of_the_project_exist() -> None:
    targets = re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    for page in pages:
        text = page.read_text()
        assert set(re.findall(r"(?:`|^    )make ([a-z0-9-]+)", text, re.MULTILINE)) <= set(targets), page.name
        for path in re.findall(r"\b((?:tests|ci|benchmarks|examples)/[\w/-]+\.(?:py|sh|txt|json))", text):
            assert (ROOT / path).is_file(), f"{page.name}: {path}"
        for name in re.findall(r"`(test_\w+\.py)`", text):
            assert list((ROOT / "tests").rglob(name)), f"{page.name}: {name}"
        for extra in re.findall(r"""pip install (?:-e )?['"](?:\.|megatron-vlbridge)\[(\w+)\]""", text):
            assert f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text(), f"{page.name}: {extra}"
    assert command(PROJECT["costs"])[1] == "benchmarks/convert.py"  # its options: the test of all options
    subprocess.run(["bash", "-n", ROOT / "ci" / "gpu.sh"], check=True)


def test_anchors_and_files_of_links_exist() -> None:
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", page.read_text()):
            found = page.parent / target if target else page
            assert found.exists(), f"{page.name}: {target}"
            if anchor:
                titles = re.findall(r"^#+ (.*)", found.read_text(), re.MULTILINE)
                anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
                assert anchor in anchors, f"{page.name}: {target}#{anchor}"


@pytest.mark.layouts
def test_the_messages_in_the_table_exist(
    workplace: Path, pasted: tuple[Path, str], pool: Pool, capsys: pytest.CaptureFixture[str]
) -> None:
    table = (ROOT / PASTED).read_text().split("| message |")[1]
    documented = re.findall(r"^\| `([^`]*)` \|", table, re.MULTILINE)
    messages = [*rejected_runs(pasted[0], pool), *rejected_data(workplace), *rejected_exports(workplace, capsys)]
    # A missing package, a visible GPU: tests/unit/test_console.py, test_cpu_backend.py.
    messages += ["the package tensorboard is not installed", "visible GPU(s)"]
    for phrase in documented:
        assert any(phrase in message for message in messages), f"{phrase}: not in\n" + "\n".join(messages)
    assert len(documented) == len(messages)


def rejected_runs(folder: Path, pool: Pool) -> list[str]:
    words = ["--hf-folder", "first-run/hf", "--seq-length", "64", "--lr", "3e-3", "--cpu", "--train-iters", "200"]
    words += ["--global-batch-size", "2"]
    others = [[], ["--random-weights", "--tensor-model-parallel-size", "3"], ["--load", "first-run/trained"]]
    commands = [(3 if "3" in other else 1, [*words, *other]) for other in others]
    return pool.run(parse, Layout(), folder=folder, commands=commands)[0]


def rejected_data(folder: Path) -> list[str]:
    processor, config = AutoProcessor.from_pretrained("hf"), read_config("hf")
    line = (folder / "train.jsonl").read_text()

    def rejection(line: str, seq_length: int) -> str:
        (folder / "invalid.jsonl").write_text(line)
        sizes = {"seq_length": seq_length, "num_samples": 1, "seed": 0}
        with pytest.raises(VLBridgeError) as rejected:
            PackedConversations(read_conversations(folder / "invalid.jsonl"), processor, config, **sizes)
        return str(rejected.value)

    unknown_key = line.replace('{"messages"', '{"images": ["cat.png"], "messages"')
    return [rejection(unknown_key, 256), rejection(line.replace("cat.png", "dog.png"), 256), rejection(line, 8)]


def rejected_exports(folder: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    (folder / "old" / "iter_0000001" / "mp_rank_00").mkdir(parents=True)
    (folder / "old" / "latest_checkpointed_iteration.txt").write_text("1")
    found = []
    for words in (["run", "out"], ["old", "out", "--like", "hf"]):
        assert main(["export", *words]) == 1
        found.append(capsys.readouterr().err)
    return found
