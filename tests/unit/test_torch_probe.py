"""What a stage does with pixels, positions and gradients, without processes."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_vlbridge.integrations import torch_guard as guard
from megatron_vlbridge.integrations import torch_probe as probe
from megatron_vlbridge.integrations.torch_probe import Change, Like, MicroBatch

POSITIONS = torch.arange(4).expand(3, 1, 4)


class TinyVisionModel(nn.Module):
    """A tower known by its class."""

    def __init__(self) -> None:
        super().__init__()
        self.vision_model = nn.Linear(1, 1)


class Stage(nn.Module):
    """Embeds tokens and adds the pixels to token 1."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.used = nn.Embedding(9, 2), nn.Linear(2, 2)

    def forward(self, tokens: Tensor, pixels: float = 0.0) -> Tensor:
        hidden = self.used(self.embed(tokens))
        return hidden + pixels * (torch.arange(tokens.shape[1]) == 1)[None, :, None]


def part(module_pixels: float = 1.0, tokens: tuple[bool, ...] = (False, True, False, False)) -> MicroBatch:
    change = Change("image", 0, {"pixels": module_pixels}, torch.tensor(tokens))
    return MicroBatch({}, POSITIONS, torch.tensor([[1, 2, 3, 4]]), [change])


def test_towers_are_known_by_attribute_or_class_and_counted_once() -> None:
    by_class = nn.ModuleDict({"encoder": TinyVisionModel(), "head": nn.Linear(1, 1)})
    assert list(probe.towers(by_class)) == ["encoder"]
    by_name = nn.ModuleDict({"visual": nn.Linear(1, 1), "vision_tower": nn.ModuleDict({"visual": nn.Linear(1, 1)})})
    assert list(probe.towers(by_name)) == ["visual", "vision_tower"]
    assert not probe.towers(nn.ModuleDict({"visualize": nn.Linear(1, 1)}))


def test_pixels_change_their_tokens_and_nothing_before() -> None:
    assert probe.check_pixels(Stage(), [part()]) == []
    (finding,) = probe.check_pixels(Stage(), [part(0.0)])
    assert "images to change the output of each" in finding
    assert "1 tokens" in finding
    assert "found: none" in finding
    (finding, leak) = probe.check_pixels(Stage(), [part(tokens=(False, False, True, True))])
    assert "2 tokens" in finding
    assert "images to change only their tokens and later ones" in leak
    assert "found 1 more" in leak


def test_rounding_is_no_change() -> None:
    assert probe.check_pixels(Stage(), [part(1e-6, (False, False, False, False))]) == []
    assert probe.check_pixels(Stage(), [part(1e-1, (False, False, False, False))]) != []


def test_an_output_of_another_shape_is_a_finding() -> None:
    (finding,) = probe.check_pixels(nn.Sequential(Stage(), nn.Flatten()), [MicroBatch({}, POSITIONS, *part_inputs())])
    assert finding == "expected an output [1, 4, 'H'], found [1, 8]"


def part_inputs() -> tuple[Tensor, list[Change]]:
    given = part()
    assert given.input_ids is not None
    return given.input_ids, [Change("image", 0, {}, given.changes[0].tokens)]


def test_a_frozen_parameter_needs_no_path() -> None:
    stage = Stage()
    stage.unused = nn.Linear(2, 2)
    tokens = [[torch.tensor([[1, 2, 3, 4]])]]
    (finding,) = probe.check_path(stage, tokens, [MicroBatch({}, POSITIONS)])
    assert "found none from unused.weight, unused.bias." in finding
    stage.unused.requires_grad_(False)
    assert probe.check_path(stage, tokens, [MicroBatch({}, POSITIONS)]) == []
    stage.requires_grad_(False)
    assert probe.check_path(stage, tokens, [MicroBatch({}, POSITIONS)]) == []


@pytest.mark.parametrize(("count", "words"), [(3, "c"), (4, "c and 1 more")])
def test_three_parameters_without_a_path_are_named(count: int, words: str) -> None:
    stage = Stage()
    for name in "abcd"[:count]:
        stage.register_parameter(name, nn.Parameter(torch.zeros(1)))
    (finding,) = probe.check_path(stage, [[torch.tensor([[1]])]], [MicroBatch({}, POSITIONS)])
    assert f"found none from a, b, {words}." in finding


def test_an_expert_without_tokens_is_no_finding_but_no_expert_is() -> None:
    class Experts(nn.Module):
        def __init__(self, used: int) -> None:
            super().__init__()
            self.mlp = nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(2, 2) for _ in range(2))})
            self.used = used

        def forward(self, hidden: Tensor) -> Tensor:
            for index in range(self.used):
                hidden = self.mlp["experts"][index](hidden)
            return 2 * hidden

    inputs = [[torch.ones(1, 4, 2, requires_grad=True)]]
    assert probe.check_path(Experts(1), inputs, [MicroBatch({}, POSITIONS)]) == []
    assert "mlp.experts.0.weight" in probe.check_path(Experts(0), inputs, [MicroBatch({}, POSITIONS)])[0]


def test_inputs_of_later_stages_are_like_the_outputs_before() -> None:
    hidden = Like((2, 3), torch.bfloat16).tensor(torch.device("cpu"))
    assert (hidden.shape, hidden.dtype, hidden.requires_grad) == ((2, 3), torch.bfloat16, True)
    assert not Like((2,), torch.int64).tensor(torch.device("cpu")).any()
    assert probe.outputs_of([hidden, hidden])[1] is probe.outputs_of(hidden)[0]


class WithMrope(nn.Module):
    config = SimpleNamespace(rope_parameters={"mrope_section": [2, 1, 1]})


@pytest.mark.parametrize(
    ("positions", "tokens", "found"),
    [
        (POSITIONS, (False, True, True, False), 1),
        (POSITIONS[0], (False, True, True, False), 1),
        (POSITIONS * torch.arange(3)[:, None, None], (False, True, True, False), 0),
        # Images of one token each.
        (POSITIONS, (False, True, False, True), 0),
        (POSITIONS, (False, False, False, False), 0),
    ],
)
def test_axes_differ_within_an_image(positions: Tensor, tokens: tuple[bool, ...], found: int) -> None:
    parts: list[Any] = [MicroBatch({}, positions, None, [Change("image", 0, {}, torch.tensor(tokens))])]
    assert len(guard._check_axes(WithMrope(), parts)) == found
    assert not guard._check_axes(nn.Linear(1, 1), parts)


def test_a_digest_is_of_values_shape_and_dtype() -> None:
    same = [torch.zeros(2, 4), torch.zeros(4, 2).T, torch.zeros(1).expand(2, 4)]
    other = [torch.zeros(4, 2), torch.zeros(2, 4, dtype=torch.int32), torch.ones(2, 4), torch.zeros(2, 0)]
    other += [torch.zeros(2, 4, dtype=torch.bool), torch.zeros(2, 8, dtype=torch.bfloat16)]
    assert len({guard._digest(tensor) for tensor in same}) == 1
    assert len({guard._digest(tensor) for tensor in [same[0], *other]}) == 1 + len(other)
