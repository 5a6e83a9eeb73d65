"""The commands, a file each: its docstring is its help, `arguments` what may stand behind it, `run` what it does.

What a command loads, it loads in `run`: asking for help, or a mistake in the command line, must not wait for torch.
"""

OVERRIDES = "settings of the config to replace, such as learner.lr=1e-4"
ADDRESS = "of the cluster's dashboard; else Ray's RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or http://127.0.0.1:8265"
