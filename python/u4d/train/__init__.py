"""Training: a recipe says what, the loop does it.

Read `recipe.py`, then `loop.py`, which calls the rest in order: `start.py` (what a run begins with), `data/` (clips,
what is drawn for them), `step.py` (one loss), `shard.py` (weights over processes), `watch/` (log, validation, curves),
`state/` (save and go on). `cost/` accounts for memory and time without training anything.
"""
