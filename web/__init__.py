"""What the console and a participant's own page share: look, guards, and the server in a thread.

Knows nothing of rounds, and imports nothing of ours.
"""
