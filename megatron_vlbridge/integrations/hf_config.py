"""The config of a checkpoint from an object of transformers."""

import tempfile
from pathlib import Path
from typing import Any

from megatron_vlbridge.config import Config
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.families import read_config


def read_hf_config(hf_config: Any) -> Config:
    """What `read_config` reads from the config.json that transformers would write of `hf_config`.

    Raises VLBridgeError as `read_config` does; the config is called `hf_config` there.
    Example: `read_hf_config(AutoConfig.from_pretrained(folder))`.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "config.json")
        # By default only what differs from the defaults of the installed transformers is written.
        hf_config.to_json_file(file, use_diff=False)
        try:
            return read_config(file)
        except VLBridgeError as error:
            raise VLBridgeError(str(error).replace(str(file), "hf_config")) from error
