"""The mark of tests that need a GPU for the kernels."""

from __future__ import annotations

import pytest
import torch

from specdec.kernels import gpu

REASON = gpu.device_unavailable(torch.device("cuda")) if torch.cuda.is_available() else "torch sees no CUDA device"
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(bool(REASON), reason=f"no GPU for the kernels: {REASON}")]
