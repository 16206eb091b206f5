"""The institution's own page on loopback: how the daemon is, what waits to leave, what left.

It reads what the command line reads, and decides as `cofuse approve` and `pause` do: by files in
the participant's folder. The daemon need not run, and knows nothing of the page.
"""
