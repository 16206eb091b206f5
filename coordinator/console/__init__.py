"""The pages for researchers and operators: rounds, evaluations, pivots, participants, audit.

Whatever a page shows is read from the store, and whatever it does goes through the gRPC services'
own handlers, under the same table of rights (coordinator/access.py).
"""
