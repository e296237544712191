"""The state machine, on the scheduler as it is."""

from hypothesis import HealthCheck, settings

from tests.schedule.machine import SchedulerMachine

TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(
    max_examples=200, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
