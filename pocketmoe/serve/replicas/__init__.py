"""Several servers behind one address, as Ray Serve deployments: each has its own process, memory budget and prefixes.

What arrives at the front is guarded there, and goes where its beginning has been computed before.

cluster.py         Ray, the replicas in it, and the front before them: from start to end
front.py           one address: what is forwarded, what is answered by all together
merging.py         metrics and states of all replicas as one
prefix_routing.py  which replica a request goes to
replica.py         a server without a socket, within a Ray Serve deployment
"""
