"""What an engine's loop gathers for its next report. Imports no torch."""

from dataclasses import dataclass, field

from hotset.engine.messages import Load, Report
from hotset.engine.status import EngineStatus
from hotset.memory.journal import JournalPart
from hotset.request import RequestOutput


@dataclass(slots=True)
class Outbox:
    """What the next report will have. Used by the engine's thread alone."""

    outputs: list[RequestOutput] = field(default_factory=list)
    started: list[str] = field(default_factory=list)
    taken: list[str] = field(default_factory=list)
    looks: list[tuple[int, EngineStatus | str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    journal: JournalPart | None = None
    load: Load | None = None
    is_draining: bool = False  # since now

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to report."""
        lists = self.outputs or self.started or self.taken or self.looks or self.notes
        is_silent = self.journal is None and self.load is None and not self.is_draining
        return not lists and is_silent

    def take(self, time_s: float) -> Report:
        """The report; what comes after it is for the next one."""
        report = Report(time_s, self.outputs, self.started, self.taken, self.looks, self.notes)
        report.journal, report.load = self.journal, self.load
        report.is_draining, self.is_draining = self.is_draining, False
        self.outputs, self.started, self.taken, self.looks, self.notes = [], [], [], [], []
        self.journal = self.load = None
        return report
