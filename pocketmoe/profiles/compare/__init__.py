"""A profile or a plan beside rented GPUs and hosted APIs.

columns.py    the columns of the ways to get tokens, and their groups
compare.py    the entry: a model on a device against rented GPUs and hosted APIs
comparing.py  around it: prices gathered, costs assumed, an endpoint measured, records written
cost.py       what a million tokens cost, and from how many a day a device pays
deadline.py   one deadline for all that a request waits for: connecting, TLS, status line, headers, body
endpoint.py   any OpenAI-compatible server, measured
findings.py   what a comparison comes to, in words
offers.py     each way to get tokens as one record: cost, speed, and how that is known
page.py       a comparison as one HTML page
pictures.py   its pictures: cost, break-even, speed, energy
records.py    what a comparison is made of, and the record it comes to
subject.py    what is compared: a model on a device, measured (a profile) or predicted (a plan)
"""
