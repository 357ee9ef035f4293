"""Imported once, by the process from which all workers fork: they start with Megatron in memory."""

import logging
import warnings

from megatron_vlbridge.backends import cpu_runtime

# Megatron and torch warn of what is not installed, Megatron also of the class that every model here is.
warnings.simplefilter("ignore")
logging.getLogger("megatron").setLevel(logging.ERROR)
cpu_runtime.enable()

import torch  # noqa: E402
import torch._dynamo  # noqa: E402  an export would import it for a second

# A process that has threads must not fork.
torch.set_num_threads(1)

import tests.functional.ranks  # noqa: E402, F401
