"""How Dagster executes a run of synpipe: all steps in one process, one after the other.

Dagster's own executor for this leaves out everything downstream of a step that failed. An asset that gathers the branches of all
encoders would then wait for the one that failed. This executor makes such an asset at the end, of what the other branches made.
"""

from collections.abc import Iterator

import dagster as dg

# Dagster has no public class to derive an executor from.
from dagster._core.execution.api import execute_plan_iterator
from dagster._core.execution.context.system import PlanOrchestrationContext
from dagster._core.execution.plan.plan import ExecutionPlan
from dagster._core.execution.retries import RetryMode
from dagster._core.executor.in_process import InProcessExecutor
from dagster._core.system_config.objects import ResolvedRunConfig

GATHERS = "synpipe/gathers"  # the tag of a step that takes what is there of the assets upstream


@dg.executor(name="one_process")
def one_process(_context: dg.InitExecutorContext) -> dg.Executor:
    """All steps in one process; what gathers branches is made although some of them failed."""
    return _OneProcess(RetryMode.ENABLED)


class _OneProcess(InProcessExecutor):
    def execute(
        self, plan_context: PlanOrchestrationContext, execution_plan: ExecutionPlan
    ) -> Iterator[dg.DagsterEvent]:
        started, succeeded = set(), set()
        for event in super().execute(plan_context, execution_plan):
            if event.is_step_start:
                started.add(event.step_key)
            if event.is_step_success:
                succeeded.add(event.step_key)
            yield event
        for step in execution_plan.get_steps_to_execute_in_topo_order():
            gathered = execution_plan.get_executable_step_deps()[step.key]
            if GATHERS in (step.tags or {}) and step.key not in started and not succeeded.isdisjoint(gathered):
                yield from self._execute_one(plan_context, execution_plan, step.key)

    def _execute_one(
        self, context: PlanOrchestrationContext, plan: ExecutionPlan, step_key: str
    ) -> Iterator[dg.DagsterEvent]:
        job = context.job.get_definition()
        subset = plan.build_subset_plan([step_key], job, ResolvedRunConfig.build(job, context.run_config))
        return execute_plan_iterator(
            subset, context.job, context.dagster_run, context.instance, self.retries, context.run_config
        )
