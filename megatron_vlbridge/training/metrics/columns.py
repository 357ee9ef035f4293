"""The names of what is measured, in the CSV file and in the log."""

# Columns of the CSV file that hold losses, and Megatron's names of these in its log.
LOSSES = {
    "lm_loss": "lm loss",
    "mtp_loss": "mtp_1 loss",
    "load_balancing_loss": "load_balancing_loss",
    "seq_load_balancing_loss": "seq_load_balancing_loss",
    "global_load_balancing_loss": "global_load_balancing_loss",
    "z_loss": "z_loss",
}
# Columns whose values this project adds to Megatron's log line and to TensorBoard, and their names there.
MEASURED = {
    "packs": "packs",
    "tokens": "tokens",
    "supervised_tokens": "supervised tokens",
    "images": "images",
    "videos": "videos",
    "patches": "patches",
    "padding_share": "padding share",
    "tokens_per_second": "tokens per second",
    "model_flops": "model FLOPs",
    "model_tflops_per_rank": "model TFLOP/s per rank",
}
COLUMNS = ("iteration", "seconds", *LOSSES, "grad_norm", "learning_rate", *MEASURED)
"""All columns of the CSV file, in their order."""
