"""Checks of what a card alone can show. Each is a function of a `Place` that records figures and
fails by an AssertionError; `checks.CHECKS` lists them, `process.run` runs one in a process of its
own. `benchmarks/gpu.py` runs them all and prints a table; `test_gpu.py` has them as tests, and
`test_rehearsal.py` runs what CPUs can at a tiny size, in the default tier."""
