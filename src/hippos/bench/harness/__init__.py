"""What every benchmark suite shares: cases as data, clocks, the runner, results, tables and figures.

A suite is one module in `hippos.bench`::

    @dataclass(frozen=True)
    class CopySize:
        n_elements: int

    def prepare_copy(size: CopySize, context: Context) -> Workload:
        source = torch.randn(size.n_elements, generator=context.generator(), device=context.device)
        return Workload(
            methods={"clone": timed(source.clone), "add": timed(lambda: source + 0)},
            baseline="clone",
            check=lambda: {"clone": 0.0, "add": 0.0},  # relative errors against float64
        )

    COPY = Case(name="copy", title="Copy", sizes=(CopySize(2**20),), quick_sizes=(CopySize(16),), prepare=prepare_copy)
    SUITE = Suite(name="copy", title="Copies", cases=(COPY,))
"""

from hippos.bench.harness.case import Case, Context, Finding, Goal, Method, Plan, Suite, Workload
from hippos.bench.harness.clock import Clock, measure_rounds, timed
from hippos.bench.harness.figure import write_figures
from hippos.bench.harness.machine import Machine, describe_machine
from hippos.bench.harness.result import CaseResult, GoalResult, Row, SizeResult, SuiteResult
from hippos.bench.harness.runner import run_suite
from hippos.bench.harness.table import print_result

__all__ = [
    "Case",
    "CaseResult",
    "Clock",
    "Context",
    "Finding",
    "Goal",
    "GoalResult",
    "Machine",
    "Method",
    "Plan",
    "Row",
    "SizeResult",
    "Suite",
    "SuiteResult",
    "Workload",
    "describe_machine",
    "measure_rounds",
    "print_result",
    "run_suite",
    "timed",
    "write_figures",
]
