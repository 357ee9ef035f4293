"""Imported once by the fork server of the workers, so that they start with Megatron already imported."""

import logging
import warnings

from megatron_vlbridge.backends import cpu_runtime

# Megatron and torch warn about missing packages, Megatron also about a deprecated base class of the models.
warnings.simplefilter("ignore")
logging.getLogger("megatron").setLevel(logging.ERROR)
cpu_runtime.enable()

import torch  # noqa: E402
import torch._dynamo  # noqa: E402  otherwise an export imports it, which takes a second

# A process with threads must not fork.
torch.set_num_threads(1)

import torch.utils.tensorboard  # noqa: E402
import torchvision  # noqa: E402, F401

import tests.functional.ranks  # noqa: E402, F401
