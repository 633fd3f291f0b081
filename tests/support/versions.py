"""What depends on the version of torch."""

from __future__ import annotations

import pytest
import torch

TRACED_BY_DYNAMO = torch.__version__ >= "2.8"
"""Whether torch.compile takes a neuron into its graphs."""

needs_compile = pytest.mark.skipif(not TRACED_BY_DYNAMO, reason="torch.compile takes neurons from torch 2.8 on")
