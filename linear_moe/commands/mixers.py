"""TODO commands.mixers."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import json
import math
import re
import sys
from collections.abc import Iterator
from typing import Any
import torch
from linear_moe.options.errors import ConfigError
from linear_moe.modeling.config import ModelConfig
from linear_moe.modeling.host import Host
from linear_moe.modeling.mixers.base import MixerConfig
from linear_moe.modeling.mixers.registry import MIXERS, mixer_class, mixer_config
from linear_moe.modeling.model import layer_dims
from linear_moe.modeling.ops.backends import has_fla
from linear_moe.plan import human
from linear_moe.plan.mixers import describe
from linear_moe.plan.mixers import markdown
from linear_moe.plan.mixers import show


def main(args: argparse.Namespace) -> int:
    sizes = args.hidden, args.heads, args.length
    if args.markdown:
        print(markdown(*sizes), end="")
        return 0
    rows = [describe(name, *sizes) for name in sorted(MIXERS)]
    if args.json:
        print(json.dumps(rows, indent=2))
    else:
        show(rows, *sizes)
    return 0
