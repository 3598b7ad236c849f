"""Reports of sweeps: result folders in, Markdown tables and one interactive HTML page out."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvfold.evaluation.report.cells import Cell, tabulate
from kvfold.evaluation.report.depths import depths_of, spots
from kvfold.evaluation.report.drilldown import TEXT_LIMIT
from kvfold.evaluation.report.markdown import markdown_report
from kvfold.evaluation.report.page import check_page_path, page, page_data
from kvfold.evaluation.report.ranking import standings
from kvfold.evaluation.report.reading import Results, read_results
from kvfold.evaluation.report.strata import Strata, stratify

__all__ = ["SweepReport", "check_page_path", "make_report", "read_results"]


@dataclass(frozen=True)
class SweepReport:
    """What was read, and the numbers made of it."""

    results: Results
    strata: Strata
    cells: tuple[Cell, ...]

    def markdown(self) -> str:
        """Tables, one for each model and protocol."""
        return markdown_report(self.cells, self.results.records)

    def html(self, text_limit: int = TEXT_LIMIT) -> str:
        """The page; examples beyond `text_limit` characters are listed without their texts."""
        ranks = standings(self.strata, self.cells)
        heat = spots(self.strata, depths_of(self.results))
        return page(page_data(self.results, self.strata, self.cells, ranks, heat, text_limit))


def make_report(folders: Sequence[Path]) -> SweepReport:
    """Read result folders and put their numbers together. Raises ValueError that names a file and line."""
    results = read_results(folders)
    strata = stratify(results)
    return SweepReport(results, strata, tuple(tabulate(strata)))
