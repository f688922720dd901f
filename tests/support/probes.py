"""A key and sample ids that use every word of Philox."""

from __future__ import annotations

import torch

KEY = torch.tensor((12345678901234, 7, 3))
IDS = torch.tensor((3, 2**40 + 5, 0, 99))
