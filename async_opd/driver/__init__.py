"""The stream: admission slots, producers, the replay-free queue, publication and supervision. Plain
asyncio."""
