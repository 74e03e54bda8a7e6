"""Settings for all tests."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

import torch

# The networks here are small: threads would wait for each other more than they compute.
torch.set_num_threads(1)
