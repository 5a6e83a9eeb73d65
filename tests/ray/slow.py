"""A role that takes one call up at a time, and tells what became of them."""

import asyncio


class Slow:
    def __init__(self):
        self._turn, self._ended = asyncio.Lock(), []

    async def score(self, group: str) -> tuple[tuple[str, ...], str]:
        """A group called "hangs" is never scored."""
        try:
            async with self._turn:
                await asyncio.sleep(1e9 if group == "hangs" else 0.3)
        except asyncio.CancelledError:
            self._ended.append(f"{group} cancelled")
            raise
        self._ended.append(group)
        return ("",), group

    check = score

    async def generate(self, prompt: str) -> tuple[str, str]:
        return (await self.score(prompt))[::-1]

    def ended(self) -> list[str]:
        return self._ended
