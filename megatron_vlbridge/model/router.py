"""The router of a pack: its auxiliary loss depends neither on padding nor on how the pack is spread over ranks."""

import torch
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.moe.moe_utils import switch_load_balancing_loss_func
from megatron.core.transformer.moe.router import TopKRouter


class PackRouter(TopKRouter):
    """Megatron's router, whose auxiliary loss weighs as the real tokens of the whole pack.

    Of a pack of T real tokens and E experts the loss is `coeff * E * sum_i f_i * P_i`: f_i the share of expert i in the
    T * k choices, P_i its mean probability (softmax over all experts). Its gradient is multiplied by T, and like every
    gradient divided by the supervised tokens of the global batch.
    """

    def _apply_aux_loss(
        self,
        probs: torch.Tensor,
        scores_for_aux_loss: torch.Tensor,
        routing_map: torch.Tensor,
        with_padding_mask: bool = False,
    ) -> torch.Tensor:
        """Attach the loss to `probs`; rows of padding are zero in the scores and in the routing map `[tokens, E]`.

        Megatron-Core 0.19 reads a rank's number of tokens after its all-reduce changed the counts in place, which makes
        this loss larger by the number of ranks; and the true counts would weight each rank's share by its own padding.
        """
        coeff = self.get_aux_loss_coeff("aux_loss")
        if coeff == 0:
            return probs
        choices = reduce_from_tensor_model_parallel_region(routing_map.sum(dim=0), self.tp_cp_group)
        tokens = choices.sum() / self.topk
        loss = switch_load_balancing_loss_func(scores_for_aux_loss, choices, tokens, self.topk, self.num_experts, coeff)
        return self.attach_and_log_load_balancing_loss(
            probs,
            coeff,
            loss,
            "load_balancing_loss",
            self.tp_cp_group,
            # Megatron multiplies by this and by the number of ranks.
            valid_token_count=tokens / self.tp_cp_group.size(),
        )
