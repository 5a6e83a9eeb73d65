"""What an objective does to given rollouts, token by token: the file, the effect, the table."""
