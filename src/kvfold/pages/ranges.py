"""Numbers that are given out side by side and come back: the first gap that is wide enough, or what is behind all."""


class Ranges:
    """All numbers from 0 on; those below `top` are somebody's, or in a gap. Neighbouring gaps are one."""

    def __init__(self) -> None:
        self.top, self._gaps = 0, list[tuple[int, int]]()  # (start, length)

    def find(self, length: int) -> int:
        """Where `take` would begin; nothing is taken."""
        return next((start for start, room in self._gaps if room >= length), self.top)

    def take(self, length: int) -> int:
        """The first of so many numbers that are nobody's, and the taker's from now on."""
        found = self.find(length)
        if found == self.top:
            self.top += length
            return found
        place = next(i for i, (start, _) in enumerate(self._gaps) if start == found)
        _, room = self._gaps.pop(place)
        if room > length:
            self._gaps.insert(place, (found + length, room - length))
        return found

    def give_back(self, start: int, length: int) -> None:
        """These are nobody's."""
        if not length:
            return
        merged = list[tuple[int, int]]()
        for begin, room in sorted([*self._gaps, (start, length)]):
            if merged and sum(merged[-1]) == begin:
                begin, room = merged[-1][0], merged.pop()[1] + room
            merged.append((begin, room))
        self._gaps = merged
