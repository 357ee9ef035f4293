"""The pairs of a LoRA adapter, for each weight of its base."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_vlbridge import families
from megatron_vlbridge.checkpoint.formats import is_megatron
from megatron_vlbridge.checkpoint.hf.header import read_header
from megatron_vlbridge.checkpoint.peft.config import AdapterConfig, read_adapter_config
from megatron_vlbridge.checkpoint.stream.raw import Stored
from megatron_vlbridge.config import Config
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.families.experts import ExpertForm
from megatron_vlbridge.weights import TensorSpec
from megatron_vlbridge.weights.regions import Shape

WEIGHTS = "adapter_model.safetensors"
_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_COPY = "save the adapter with save_embedding_layers=False"
_EXPERTS = ".mlp.experts"
_EMBEDDINGS = ("embed_tokens.weight", "pos_embed.weight")  # `peft` has them in other tensors, `lora_embedding_A`


@dataclass(frozen=True)
class LoraPair:
    """A `[r, in]` and B `[out, r]` of one weight, in the file; of `experts` experts `[E, r, in]` and `[E, out, r]`.

    `parameter` says that `peft` adapts the parameter itself, not a module that has it.
    """

    a: Stored
    b: Stored
    scaling: float
    experts: int | None
    parameter: bool

    def read(self, expert: int | None = None, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """`A [r, in]` and `B [out, r]`, of one expert where the weight has experts; by default in their own dtype.

        Raises VLBridgeError, naming the file, where it cannot be read.
        """
        assert (expert is None) == (self.experts is None)
        lead = () if expert is None else (expert,)
        return _read(self.a, lead, dtype), _read(self.b, lead, dtype)


def _read(stored: Stored, lead: tuple[int, ...], dtype: torch.dtype | None) -> torch.Tensor:
    size = stored.spec.shape[len(lead) :]
    found = torch.empty(size, dtype=dtype or stored.spec.dtype)
    try:
        stored.read_into((*lead, 0, 0), found[(None,) * len(lead)])
    except OSError as error:
        text = f"{stored.path}: expected to read {stored.spec}, found: {error}. Copy the file again."
        raise VLBridgeError(text) from error
    return found


def base_shapes(config: Config) -> dict[str, Shape]:
    """The weights of a base that can have an adapter, as transformers holds them.

    They are `[out, in]`, of experts `[E, out, in]`; not embeddings, norms and convolutions.
    Example: `base_shapes(config)["lm_head.weight"]` is `(151936, 2048)`.
    """
    shapes = families.find(config).table(config, ExpertForm.FUSED_OUT_IN).hf_shapes
    return {
        name: shape
        for name, shape in shapes.items()
        if len(shape) == (3 if f"{_EXPERTS}." in name else 2) and not name.endswith(_EMBEDDINGS)
    }


def read_adapter(folder: Path, base: Mapping[str, Shape]) -> dict[str, LoraPair]:
    """The pairs of a PEFT folder by the name of their weight; reads headers only.

    `base` are the `base_shapes` of the checkpoint that it belongs to.

    Raises VLBridgeError, naming file, tensor, expected and found, for a key that fits no weight of the base, a missing
    half, another rank or shape, and values that are not floating-point.
    Example: `read_adapter(Path("adapter"), shapes)["lm_head.weight"].read()`.
    """
    if is_megatron(folder):
        raise VLBridgeError(
            f"{folder}: expected a folder of peft, found a Megatron checkpoint. Write its adapters as such a folder "
            "with vlbridge export --adapter (in Python: export_adapter)."
        )
    config = read_adapter_config(folder)
    path = folder / WEIGHTS
    if not path.is_file():
        others = ", ".join(sorted(one.name for one in folder.iterdir()))
        raise VLBridgeError(f"{path}: expected this file, found {others}. Save the adapter as safetensors, with peft.")
    halves: dict[str, dict[str, Stored]] = {}
    for key, stored in read_header(path).items():
        match = _KEY.fullmatch(key)
        if match is None:
            is_copy = key.endswith(".base_layer.weight")
            raise _misfit(path, key, f"a copy of a weight of the base ({_COPY})" if is_copy else "another name")
        halves.setdefault(match[1], {})[match[2]] = stored
    if not halves:
        raise VLBridgeError(f"{path}: expected the tensors of an adapter, found none. Fetch the file again.")
    pairs: dict[str, LoraPair] = {}
    for module, found in halves.items():
        weight = _weight_name(module, found, base)
        if weight not in base or weight in pairs:
            twice = " a second time" if weight in pairs else ""
            raise _misfit(path, f"base_model.model.{module}", weight + twice)
        pairs[weight] = _pair(config, path, weight, found, base[weight])
    return pairs


def _misfit(path: Path, key: str, found: str) -> VLBridgeError:
    return VLBridgeError(
        f"{path}: {key}: expected base_model.model.<module>.lora_A.weight or lora_B.weight of a module of the base, "
        f"found {found} (adapters of embeddings, convolutions and tied heads are not supported). Use the base that the "
        "adapter was trained on."
    )


def _weight_name(module: str, found: Mapping[str, Stored], base: Mapping[str, Shape]) -> str:
    """The base weight of an adapted module; `peft` wraps both parameters of the experts in one another.

    Where only one of both has an adapter, the shape tells which.
    """
    if module.endswith(f"{_EXPERTS}.base_layer"):
        return module.removesuffix("base_layer") + "gate_up_proj"
    if not module.endswith(_EXPERTS):
        return f"{module}.weight"
    gate_up = f"{module}.gate_up_proj"
    if gate_up in base and found.keys() == {"A", "B"}:
        sizes = found["B"].spec.shape[:1] + found["A"].spec.shape[-1:]
        if sizes == base[gate_up][-2:]:
            return gate_up
    return f"{module}.down_proj"


def _pair(config: AdapterConfig, path: Path, weight: str, found: Mapping[str, Stored], shape: Shape) -> LoraPair:
    if found.keys() != {"A", "B"}:
        raise VLBridgeError(f"{path}: {weight}: expected lora_A and lora_B, found lora_{min(found)} alone.")
    key, experts = config.key_of(weight), shape[0] if len(shape) == 3 else None
    rank, (rows, columns) = config.rank_of(key), shape[-2:]
    expected = {"A": (rank * (experts or 1), columns), "B": (rows, rank * (experts or 1))}
    for half, size in expected.items():
        spec = found[half].spec
        if spec.shape != size or not spec.dtype.is_floating_point:
            raise VLBridgeError(
                f"{path}: {weight}: lora_{half}: expected {list(size)} in floating point, for {list(shape)} and rank "
                f"{rank}, found {spec}. Use the base that the adapter was trained on."
            )
    a, b, scaling = found["A"], found["B"], config.scaling_of(key)
    if experts is None:
        return LoraPair(a, b, scaling, None, config.is_parameter(weight))
    # A goes expert by expert, in B the expert is the fastest axis (peft 0.21, `ParamWrapper.get_delta_weight`).
    a = replace(a, spec=TensorSpec((experts, rank, columns), a.spec.dtype))
    b = replace(b, spec=TensorSpec((experts, rows, rank), b.spec.dtype), strides=(1, rank * experts, experts))
    return LoraPair(a, b, scaling, experts, True)
