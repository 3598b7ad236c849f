"""Assisted decoding: passes whose tokens may still be taken back, and the events that wait until they were."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from kvfold.layer.layer import KVLayer
from kvfold.layer.plan import Plan


@dataclass
class Pending:
    """What waits. A pass is read (`read`), then the columns that were refused go (`crop`), or a further prompt comes
    instead (`turn`); its events come when that is known. A prompt's `after_prompt` waits as `unheard`, also when a
    cache adopts a prompt whose windows are still to come.
    """

    recording: bool = False
    """Whether transformers crops after each pass."""
    opening: bool = False
    """Whether the next pass is the first of an assisted decoding, which reads its prompt and the first candidates."""
    uncropped: bool = False
    """Whether a pass is over, and no crop has come since."""
    plan: Plan | None = None
    """The pass whose layers' events wait."""
    unheard: Plan | None = None
    """A prompt's pass that is over, and whose `after_prompt` is not."""

    @property
    def waits(self) -> bool:
        """Whether events are still to come."""
        return self.uncropped or self.unheard is not None or (self.plan is not None and bool(self.plan.waiting))

    def record(self) -> None:
        """Assisted decoding begins."""
        self.recording = self.opening = True

    def copied(self) -> "Pending":
        """The same for a copy of the cache: what comes of it there changes nothing here."""
        found = {id(plan): plan.copied() for plan in (self.plan, self.unheard) if plan is not None}
        return replace(self, plan=found.get(id(self.plan)), unheard=found.get(id(self.unheard)))

    def opens(self) -> bool:
        """Whether the pass that begins now is the first of an assisted decoding."""
        opening, self.opening = self.opening, False
        return opening

    def read(self, plan: Plan) -> None:
        """A layer has read a pass that may be taken back."""
        self.plan = plan

    def crop(self, layers: Sequence[KVLayer], columns: int) -> Plan | None:
        """So many columns were taken back: the layers' events come, of what is left. The pass they were of."""
        self.uncropped = False
        if self.unheard is not None:
            self.unheard = self.unheard.cropped(columns)
        return self._come(layers, columns)

    def turn(self, layers: Sequence[KVLayer]) -> Plan | None:
        """No crop came: assisted decoding is over, what looked like a draft was a further prompt."""
        self.recording = self.opening = self.uncropped = False
        if self.plan is not None and any(queries.states.shape[2] > 1 for queries in self.plan.waiting.values()):
            layers[0].rows.turned(self.plan)
        if self.unheard is not None:
            layers[0].rows.turned(self.unheard)
        return self._come(layers, 0)

    def _come(self, layers: Sequence[KVLayer], dropped: int) -> Plan | None:
        plan, self.plan = self.plan, None
        if plan is None or not plan.waiting:
            return None
        waiting, plan.waiting = plan.waiting, {}
        for ordinal, queries in waiting.items():
            layers[ordinal].moment(plan).settle(queries, dropped)
        return plan
