"""What a model would take and do on another machine: shapes, footprint, speed.

classes.py            what a step costs on a machine that was not profiled, by constants of its class (`speed.toml`)
device_prediction.py  a profile's model on the machines of `devices.toml`
footprint.py          what a model takes in each scheme
hit_curve.py          hit rates of a model that nobody has run, by routing like that of real ones
measured.py           what a step costs on a machine whose computing was measured
predict.py            the decode-step model with constants fitted from a profile, and how wrong that is here
roofline.py           rented GPUs: time from bytes moved and operations done
shapes.py             a model's parameters by class, from its config.json alone
step.py               the decode-step model: what a token moves and what a machine costs to seconds
"""
