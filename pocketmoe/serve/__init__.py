"""Serves bundles over HTTP, by the APIs of OpenAI and Anthropic, within one memory budget for the whole process.

A request gets a ticket (or 429), its body is read and understood (or 4xx), it gets a lease of its model, its prompt is
made into token ids, and then it waits for a place, in which a thread computes its answer. A client that goes away gives
its place back within a step.

answers.py      a piece of work computed in a thread, what happens told to the event loop
app.py          paths, and what stands before them
connections.py  connections within limits: how many, how large their headers, how slow
guard.py        who may talk to the server: host names, foreign pages, keys
http.py         bodies within limits, clients that go away, event streams
load.py         tickets, places, room for bodies
log.py          a JSON line for each request
metrics.py      what /metrics tells
models.py       the models that are served, of which one is loaded at a time
server.py       the socket, signals, threads: from the first model to the last answer
state.py        what the page shows of the machine
service.py      a request's way from ticket to answer, and its line in the log
"""
