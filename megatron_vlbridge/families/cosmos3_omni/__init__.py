"""The reasoner of NVIDIA's Cosmos3 (Nano, Super): Qwen3-VL, in files that also hold a generator."""

from dataclasses import replace

from megatron_vlbridge.families import qwen3_vl

# The generator's experts and projections, the sound and the action tower: what transformers 5.23 leaves out as it loads
# the reasoner (`modular_cosmos3_omni.py`).
_GENERATOR = (
    *("*.add_q_proj.*", "*.add_k_proj.*", "*.add_v_proj.*", "*.to_add_out.*", "*.norm_added_q.*", "*.norm_added_k.*"),
    *("*moe_gen*", "proj_in.*", "proj_out.*", "time_embedder.*"),
    *("audio_proj_in.*", "audio_proj_out.*", "audio_modality_embed"),
    *("action_proj_in.*", "action_proj_out.*", "action_modality_embed"),
)

FAMILY = replace(
    qwen3_vl.FAMILY,
    config=replace(
        qwen3_vl.FAMILY.config,
        model_type="cosmos3_omni",
        architecture="Cosmos3OmniForConditionalGeneration",
        parts_model_type=qwen3_vl.FAMILY.config.model_type,
        in_transformers_4=False,
        # Under which vLLM lists the published files.
        other_architectures=("Cosmos3ForConditionalGeneration",),
    ),
    other_tensors=_GENERATOR,
)
