"""Prompts from several data sets, each by its weight."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import chain
from typing import Any

from msgspec.structs import replace

from async_opd.core.wire import Prompt
from async_opd.roles.rollout.prompts import PromptSource


class Mixture:
    """An iterator of the `Prompt`s of several sources. Each goes through epochs of its own, in its
    own order; whose turn it is depends on weights and on how many prompts came of each, so it goes
    on from `position` as an unbroken iteration would.

    Of n prompts a source with the share w has given floor(n w) or ceil(n w), for every n: rows that
    are left out, and sets of other sizes, change nothing. A prompt's id begins with its source's
    name and a colon. (`datasets.interleave_datasets` ends, or repeats rows in the same order, where
    the first or last set does, and one that is streamed holds its shares by chance alone.)
    """

    def __init__(self, sources: Mapping[str, PromptSource], weights: Mapping[str, float]):
        """Mix `sources`, each with the positive weight of its name."""
        self.parts = dict(sorted(sources.items()))
        exact = {name: Fraction(repr(float(weights[name]))) for name in self.parts}
        self.shares = {name: weight / sum(exact.values()) for name, weight in exact.items()}
        self._drawn = dict.fromkeys(self.parts, 0)
        self._positions = {name: each.position for name, each in self.parts.items()}
        self._rows = {name: iter(each) for name, each in self.parts.items()}
        self._first = self._first_rows()

    def _first_rows(self) -> dict[str, int]:
        """Number the rows of all sets through; those of streams have no number."""
        first, rows = dict.fromkeys(self.parts, 0), 0
        for name, each in self.parts.items():
            try:
                first[name], rows = rows, rows + len(each)
            except TypeError:
                return dict.fromkeys(self.parts, 0)
        return first

    def __iter__(self) -> Iterator[Prompt]:
        while True:
            name = self._turn()
            prompt = next(self._rows[name])
            self._drawn[name] += 1
            # one dict more, for those that were taken are kept
            self._positions = {**self._positions, name: self.parts[name].position}
            yield self._of(name, prompt)

    def _turn(self) -> str:
        """Choose the next source: of those that may give one more and not be above their share,
        rounded up, the one whose share asks for its next prompt first. By that none is ever below
        its share rounded down either (the quota method: Balinski and Young, 1975)."""
        count = sum(self._drawn.values()) + 1
        may = [name for name, share in self.shares.items() if self._drawn[name] < count * share]
        return min(may, key=lambda name: (self._drawn[name] + 1) / self.shares[name])

    def _of(self, name: str, prompt: Prompt) -> Prompt:
        return replace(prompt, id=f"{name}:{prompt.id}", row=self._first[name] + prompt.row)

    @property
    def position(self) -> dict[str, Any]:
        """How far each source was read, in plain JSON: where `continued` goes on. Its "epoch"
        counts the passes over all rows of all sources that are whole."""
        epoch = min(position["epoch"] for position in self._positions.values())
        return {"epoch": epoch, "drawn": dict(self._drawn), "sources": self._positions}

    def continued(self, position: dict[str, Any], outstanding: Sequence[str]) -> Iterator[Prompt]:
        """Give the prompts `outstanding`, which were handed out before, then those that follow
        `position`. Raises DataError for a set that has changed since."""
        named = [id.partition(":")[::2] for id in outstanding]
        for name, part in self.parts.items():
            ids = [id for its_name, id in named if its_name == name]
            self._rows[name] = part.continued(position["sources"][name], ids)
        self._drawn, self._positions = dict(position["drawn"]), dict(position["sources"])
        again = [self._of(name, next(self._rows[name])) for name, _ in named]
        return chain(again, self)

    def survey(self, poll: Callable[[], None] = lambda: None) -> None:
        """Look at all rows of all sets, as those do, each for its part of the time of one."""
        for part in self.parts.values():
            part.survey(poll, 1 / len(self.parts))

    @property
    def left_out_words(self) -> str:
        """Say how many rows of which sets the surveys leave out; nothing where they leave out
        none."""
        return "; ".join(filter(None, (part.left_out_words for part in self.parts.values())))

    @property
    def counts(self) -> dict[str, int]:
        """How many of the rows that were read are not trained, for `summary.json`."""
        counts = [part.counts for part in self.parts.values()]
        return {key: sum(each[key] for each in counts) for key in counts[0]}

    @property
    def tell(self) -> Callable[[str], None]:
        """Hears of each row left out that no survey knew, with its source's name."""
        return self._tell

    @tell.setter
    def tell(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        for name, part in self.parts.items():
            part.tell = lambda why, name=name: tell(f"{name}:{why}")

    def close(self) -> None:
        """Look at no more rows."""
        for part in self.parts.values():
            part.close()
