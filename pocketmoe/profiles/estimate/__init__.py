"""What a model would take and do elsewhere: shapes, footprint, speed.

elsewhere.py  the same for the machines of `profiles/devices.toml`
footprint.py  what a model takes in each scheme
hit_curve.py  hit rates of a model that nobody has run, by routing like that of real ones
predict.py    a profile to the speed of another budget, disk or machine, and how wrong that is here
roofline.py   time from bytes moved and operations done
shapes.py     a model's parameters by class, from its config.json alone
"""
