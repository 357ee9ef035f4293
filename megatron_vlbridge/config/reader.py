"""From the raw `config.json` to a `Config`: which model type it is, and what must agree."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_vlbridge.config.schema import WEIGHT_DTYPES, Config, ConfigFormat
from megatron_vlbridge.config.section import Section
from megatron_vlbridge.config.text import read_text
from megatron_vlbridge.config.vision import read_vision
from megatron_vlbridge.errors import VLBridgeError

_TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


def read_config_file(
    path: str | Path, supported: Sequence[ConfigFormat], unsupported: Mapping[str, str] | None = None
) -> Config:
    """Read a `config.json` in one of the `supported` formats.

    `unsupported` maps the architectures and model types that are known but not supported to the reason.

    `path` is a checkpoint folder or the file itself. For errors see `megatron_vlbridge.read_config`.
    """
    file = Path(path)
    file = file / "config.json" if file.is_dir() else file
    top = Section(file, _read_json_object(file))
    top.only("per_layer_config", None)
    _reject_unsupported(top, unsupported or {})
    found = _find_format(top, supported)
    parts = found.parts_model_type or found.model_type
    config = Config(
        architecture=found.architecture,
        model_type=found.model_type,
        text=read_text(top.section("text_config", defaults=found.text), parts),
        vision=read_vision(top.section("vision_config", defaults=found.vision), parts),
        **{key: top.integer(key, default=token, minimum=0) for key, token in zip(_TOKENS, found.tokens, strict=True)},
        tie_word_embeddings=_read_tie(top),
        dtype=_read_dtype(top),
        fp8=_read_fp8(top),
    )
    _check_parts_match(top, config)
    return config


def _read_json_object(file: Path) -> dict[str, Any]:
    try:
        if file.exists() and not file.is_file():
            raise OSError("not a regular file")  # reading a pipe or device may never end
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise VLBridgeError(
            f"{file}: expected a config.json, found no such file. Give a checkpoint's folder."
        ) from error
    # ValueError is bytes that are not text, text that is not JSON, or an integer of thousands of digits.
    except (OSError, ValueError, RecursionError) as error:
        raise VLBridgeError(f"{file}: expected a JSON file, found: {error}. Fetch the file again.") from error
    if not isinstance(values, dict):
        raise VLBridgeError(f"{file}: expected a JSON object, found {type(values).__name__}. Fetch the file again.")
    return values


def _reject_unsupported(top: Section, unsupported: Mapping[str, str]) -> None:
    for key in ("architectures", "model_type"):
        value = top.value(key)
        for name in value if isinstance(value, list) else [value]:
            if isinstance(name, str) and name in unsupported:
                raise top.fail(key, value, "a supported architecture", unsupported[name])


def _find_format(top: Section, supported: Sequence[ConfigFormat]) -> ConfigFormat:
    """The format named by `architectures` and `model_type`, which must agree; either may be absent."""
    named = top.value("architectures", default=[])
    if not isinstance(named, list) or len(named) > 1 or any(not isinstance(name, str) for name in named):
        raise top.fail("architectures", named, "a list with one name", "Name the one architecture of the checkpoint.")
    formats = {known.model_type: known for known in supported}
    by_name = {
        name: known.model_type for known in supported for name in (known.architecture, *known.other_architectures)
    }
    remedy = f"Supported architectures: {', '.join(known.architecture for known in supported)}."
    if named and named[0] not in by_name:
        raise top.fail("architectures", named[0], "a supported architecture", remedy)
    model_type = top.value("model_type", default=by_name[named[0]] if named else None)
    if not isinstance(model_type, str) or model_type not in formats:
        expected = f"one of {', '.join(formats)}"
        raise top.fail("model_type", model_type, expected, remedy)
    if named and by_name[named[0]] != model_type:
        expected = f"{by_name[named[0]]!r}, as architectures names {named[0]}"
        raise top.fail("model_type", model_type, expected, "Correct whichever is wrong.")
    return formats[model_type]


def _read_tie(top: Section) -> bool:
    """Only the top level counts, as in transformers, which writes either value beside it into `text_config`."""
    nested = top.section("text_config").value("tie_word_embeddings")
    if top.value("tie_word_embeddings") is None and nested is True:
        remedy = "transformers reads only the top level (false when absent): state there which of the two is meant."
        raise top.fail("tie_word_embeddings", None, "the value that text_config has, true", remedy)
    return top.boolean("tie_word_embeddings", False)


def _read_dtype(top: Section) -> str:
    text = top.section("text_config")
    dtype = top.value("dtype", "torch_dtype", default=text.value("dtype", "torch_dtype", default="float32"))
    if dtype not in WEIGHT_DTYPES:
        expected = f"one of {', '.join(WEIGHT_DTYPES)}"
        raise top.fail("dtype", dtype, expected, "Convert the checkpoint to one of these first.")
    return str(dtype)


def _read_fp8(top: Section) -> bool:
    """Whether weights are quantised, which must be to FP8 in blocks of 128 x 128.

    Which modules are not (`modules_to_not_convert`) is not read: the dtypes of the tensors tell.
    """
    if top.value("quantization_config") is None:
        return False
    values = top.section("quantization_config")
    needed: dict[str, object] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    optional: dict[str, object] = {"activation_scheme": "dynamic", "fmt": "e4m3", "expert_dtype": "fp8"}
    for key, expected in (needed | optional).items():
        value = values.value(key, default=optional.get(key))
        if value != expected:
            remedy = "Of quantised checkpoints only FP8 in blocks of 128 x 128 is supported: use the unquantised one."
            raise values.fail(key, value, repr(expected), remedy)
    return True


def _check_parts_match(top: Section, config: Config) -> None:
    """What the two towers and the tokens must agree on."""
    text, vision = config.text, config.vision
    if vision.out_hidden_size != text.hidden_size:
        expected = f"text_config.hidden_size ({text.hidden_size})"
        raise top.fail("vision_config.out_hidden_size", vision.out_hidden_size, expected, "Correct whichever is wrong.")
    if len(vision.deepstack_visual_indexes) > text.num_layers:
        key, expected = (
            "vision_config.deepstack_visual_indexes",
            f"at most {text.num_layers} entries (num_hidden_layers)",
        )
        raise top.fail(key, list(vision.deepstack_visual_indexes), expected, "Correct whichever is wrong.")
    seen: dict[int, str] = {}
    for key in _TOKENS:
        token = getattr(config, key)
        if token >= text.vocab_size:
            raise top.fail(key, token, f"an id below vocab_size ({text.vocab_size})", "Correct the id or vocab_size.")
        if token in seen:
            raise top.fail(key, token, f"another id than {seen[token]}", "Give every vision token its own id.")
        seen[token] = key
