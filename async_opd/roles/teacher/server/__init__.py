"""Teachers that run elsewhere: any server that gives the log-probs of a prompt over HTTP."""
