"""The router of a pack: its balancing losses depend neither on padding nor on how the pack is spread over ranks."""

import torch
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.moe.moe_utils import switch_load_balancing_loss_func
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig

BALANCING = ("aux_loss", "seq_aux_loss", "global_aux_loss")
"""The balancing losses of `moe_router_load_balancing_type`."""


def balancing_types(config: TransformerConfig) -> list[str]:
    """Those of `moe_router_load_balancing_type`, which is one or a list."""
    types: str | list[str] = config.moe_router_load_balancing_type
    return [types] if isinstance(types, str) else types


class PackRouter(TopKRouter):
    """Megatron's router, whose balancing losses weigh as the real tokens that they are of.

    Of T real tokens and E experts a loss is `coeff * E * sum_i f_i * P_i`: f_i the share of expert i in the T * k
    choices, P_i its mean probability (softmax over all experts). `aux_loss` takes both of the pack, `seq_aux_loss` of
    each segment by itself, `global_aux_loss` P of the pack and f of all packs of the global batch up to now, of all
    data-parallel ranks. Its gradient is multiplied by T, and like every gradient divided by the supervised tokens of
    the global batch.

    Megatron-Core 0.19 reads a rank's number of tokens after its all-reduce changed the counts in place, which makes
    these losses larger by the number of ranks; and the true counts would weight each rank's share by its own padding.
    Rows of padding are zero in the scores and in the routing map `[tokens, E]`.
    """

    global_tokens_per_expert: torch.Tensor
    segments: tuple[torch.Tensor, int] | None = None
    """Which segment each of this rank's tokens is of, `[tokens]`, and their number; set before each forward."""

    def _apply_aux_loss(
        self,
        probs: torch.Tensor,
        scores_for_aux_loss: torch.Tensor,
        routing_map: torch.Tensor,
        with_padding_mask: bool = False,
    ) -> torch.Tensor:
        coeff = self.get_aux_loss_coeff("aux_loss")
        if coeff == 0:
            return probs
        choices = reduce_from_tensor_model_parallel_region(routing_map.sum(dim=0), self.tp_cp_group)
        tokens = choices.sum() / self.topk
        loss = switch_load_balancing_loss_func(scores_for_aux_loss, choices, tokens, self.topk, self.num_experts, coeff)
        return self._attach(probs, coeff, loss, "load_balancing_loss", tokens)

    def _apply_seq_aux_loss(
        self,
        probs: torch.Tensor,
        scores_for_aux_loss: torch.Tensor,
        routing_map: torch.Tensor,
        seq_length: int,
        bsz: int,
        with_padding_mask: bool = False,
    ) -> torch.Tensor:
        """Of each segment; Megatron-Core takes a whole pack as one sequence."""
        coeff = self.get_aux_loss_coeff("seq_aux_loss")
        if coeff == 0:
            return probs
        assert self.segments is not None
        index, count = self.segments
        zeros = scores_for_aux_loss.new_zeros(count, self.num_experts)
        choices = zeros.index_add(0, index, routing_map.to(zeros.dtype))
        choices = reduce_from_tensor_model_parallel_region(choices, self.tp_cp_group)
        shares = choices / choices.sum(dim=1, keepdim=True).clamp(min=1)
        tokens = choices.sum() / self.topk
        loss = coeff * self.num_experts / tokens * (shares * zeros.index_add(0, index, scores_for_aux_loss)).sum()
        return self._attach(probs, coeff, loss, "seq_load_balancing_loss", tokens)

    def _apply_global_aux_loss(
        self,
        probs: torch.Tensor,
        scores_for_aux_loss: torch.Tensor,
        routing_map: torch.Tensor,
        with_padding_mask: bool = False,
    ) -> torch.Tensor:
        """With the counts of all packs since Megatron last finalised the gradients."""
        coeff = self.get_aux_loss_coeff("global_aux_loss")
        if coeff == 0:
            return probs
        choices = reduce_from_tensor_model_parallel_region(routing_map.sum(dim=0), self.tp_cp_group)
        # A model in bf16 has its buffers cast too.
        self.global_tokens_per_expert = self.global_tokens_per_expert.float()
        self.global_tokens_per_expert += reduce_from_tensor_model_parallel_region(
            routing_map.sum(dim=0), self.tp_dp_cp_group
        )
        tokens = choices.sum() / self.topk
        counts = self.global_tokens_per_expert * (choices.sum() / self.global_tokens_per_expert.sum())
        loss = switch_load_balancing_loss_func(scores_for_aux_loss, counts, tokens, self.topk, self.num_experts, coeff)
        return self._attach(probs, coeff, loss, "global_load_balancing_loss", tokens)

    def _attach(
        self, probs: torch.Tensor, coeff: float, loss: torch.Tensor, name: str, tokens: torch.Tensor
    ) -> torch.Tensor:
        # Megatron multiplies by the number of tokens and by that of ranks.
        count = tokens / self.tp_cp_group.size()
        return self.attach_and_log_load_balancing_loss(
            probs, coeff, loss, name, self.tp_cp_group, valid_token_count=count
        )
