"""PocketMoE: Mixture-of-Experts language models on machines that are too small for them.

Importing it switches off what its dependencies would tell their makers. They look at the environment when they are
imported (ONNX Runtime then already notes machine, interpreter and process below the home directory), so it is set here,
before any module of ours can import them; child processes inherit it. Whoever sets such a variable keeps what was set.
"""

import os

__version__ = "0.1.0"

TELEMETRY_OFF = {
    "ORT_DISABLE_TELEMETRY": "1",  # ONNX Runtime 1.29 and later
    "HF_HUB_DISABLE_TELEMETRY": "1",  # what transformers is used with, in each request to the hub
    "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    "DISABLE_SAFETENSORS_CONVERSION": "1",  # transformers asks the hub's bot to convert a checkpoint of pickles
    "RAY_USAGE_STATS_ENABLED": "0",
}
for _name, _value in TELEMETRY_OFF.items():
    os.environ.setdefault(_name, _value)
