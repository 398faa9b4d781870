"""Tiny models run on one thread: more gain nothing, and on a busy machine they wait for each other (40 x).

Nothing is read from the user's cache of token rows or written to it.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is first imported, by child processes too
os.environ["LORAFIT_CACHE"] = "0"
