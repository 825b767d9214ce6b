"""Ray: what a worker of Ray Train is told without asking all the others, what each node has left, and which group sizes are allowed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

SEEN = "2.60.0"
NAMES = (
    "ray.train.v2._internal.execution.context.get_train_context",
    "ray.train.v2._internal.execution.scaling_policy.elastic.ElasticScalingPolicy._count_possible_workers",
    "ray.train.v2.api.data_parallel_trainer.DataParallelTrainer._initialize_and_run_controller",
    "ray._private.state.available_resources_per_node",
)


def preemption_notice() -> Any:
    """What Ray has told this worker of a node that will be taken away (`ray.train.PreemptionInfo`), or None. The public function of
    that name waits for every worker at each call."""
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().preemption_context.preemption_info


def free_by_node() -> list[dict[str, float]]:
    """What is left on each node that lives. The public function adds the nodes up, and no worker lies on two."""
    from ray._private.state import available_resources_per_node

    return list(available_resources_per_node().values())


def trainer_class(allowed: Sequence[int]) -> Any:
    """TorchTrainer, whose elastic group has only these numbers of workers."""
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy

    class OnlyAllowed(ElasticScalingPolicy):
        def _count_possible_workers(self, reserved_resources: Any) -> int:
            room = super()._count_possible_workers(reserved_resources)
            return max((number for number in allowed if number <= room), default=0)

    class Trainer(TorchTrainer):
        def _initialize_and_run_controller(self, **settings: Any) -> Any:
            if self.scaling_config.elasticity_enabled:
                settings["scaling_policy"] = OnlyAllowed(self.scaling_config)
            return super()._initialize_and_run_controller(**settings)

    return Trainer
