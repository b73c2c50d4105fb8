"""The demo: an ordinary PyTorch training, and a view of what gradwatch sees of it.

``data``, ``model`` and ``train`` are what a user of gradwatch writes; ``train`` holds the handful of lines
that watch it. ``view`` is the terminal's picture, drawn from the agent's ``/metrics``.
"""
