"""What a run notes beside its weights is read as it was written, and nothing else is."""

from pathlib import Path

import pytest

from megatron_vlbridge.checkpoint.run_manifest import RUN_MANIFEST, read_unverified, write_run_manifest
from megatron_vlbridge.errors import VLBridgeError


def test_what_is_written_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    assert read_unverified(tmp_path) == ()
    for names in ({"tp+ep", "fp16", "qk_clip"}, set()):
        write_run_manifest(tmp_path, names)
        assert read_unverified(tmp_path) == tuple(sorted(names))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"unverified": "fp16"}',
        '{"unverified": [1]}',
        '{"unverified": {"fp16": 1}}',
        '{"unverified": ["a\\u001b[2J"]}',
        '{"unverified": ["' + "a" * 1001 + '"]}',
    ],
)
def test_another_file_is_rejected_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / RUN_MANIFEST).write_text(text)
    with pytest.raises(VLBridgeError, match=RUN_MANIFEST):
        read_unverified(tmp_path)
