"""mergekit's arithmetic on each tensor, without its reading and writing of models.

Its driver (0.1.5) fails on its own description of BERT and writes nothing for what it does not
know. Run in mergekit's environment with one argument, JSON: base, models, out, method, parameters,
sparse (parameters of each model).
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import torch
from mergekit.merge_methods import registry
from safetensors.torch import load_file, save_file

told = json.loads(sys.argv[1])
method = registry.get(told["method"])
base, *models = (load_file(path) for path in (told["base"], *told["models"]))
torch.manual_seed(0)
merged = {}
for name, tensor in base.items():
    entries = [
        SimpleNamespace(id=number, tensor=model[name].float())
        for number, model in enumerate(models)
    ]
    group = SimpleNamespace(base=SimpleNamespace(tensor=tensor.float()), non_base=entries)
    each = {key: dict.fromkeys(range(len(models)), value) for key, value in told["sparse"].items()}
    found = method.merge_group(group, **told["parameters"], **each)
    merged[name] = found.to(torch.bfloat16)
save_file(merged, told["out"])
