"""`python -m megatron_vlbridge.cli`."""

import sys

from megatron_vlbridge.cli import main

sys.exit(main())
