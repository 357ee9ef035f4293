"""Imported once, by the process from which all others fork: they start with the TE backend in memory."""

import logging
import warnings

from tests.te import runtime

warnings.simplefilter("ignore")
logging.getLogger("megatron").setLevel(logging.ERROR)
runtime.enable()

import torch  # noqa: E402
import torch._dynamo  # noqa: E402

# A process that has threads must not fork.
torch.set_num_threads(1)

import tests.functional.ranks  # noqa: E402, F401
