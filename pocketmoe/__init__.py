"""PocketMoE: Mixture-of-Experts language models on machines that are too small for them.

calibration.py  what a calibration text showed of a model's experts
cli.py          the group of commands; the one place an error becomes an exit code
errors.py       every error a user can meet, with its exit code and remedy
isolated.py     work on files of strangers in a child process with limits, so that a crash, a hang or a bomb ends the
                child alone
jsonfile.py     a JSON file of foreign making, read as Python's json and so transformers read it, within bounds
ort.py          the one door to ONNX Runtime: every session of the package is made and run here
pipeline.py     what quantize goes by: a text through a bundle, and what that showed, kept until it ends
signals.py      SIGTERM and SIGHUP as an exception
sizes.py        what 800MB or 40% means
"""

__version__ = "0.1.0"
