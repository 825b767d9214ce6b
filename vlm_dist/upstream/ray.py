"""Ray: what a worker of Ray Train is told without asking all the others, what each node has left, and which group sizes are allowed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

SEEN = "2.60.0"
ADDRESS = "RAY_ADDRESS"
NAMES = (
    "ray.train.v2._internal.execution.context.get_train_context",
    "ray.train.v2._internal.execution.scaling_policy.elastic.ElasticScalingPolicy._count_possible_workers",
    "ray.train.v2.api.data_parallel_trainer.DataParallelTrainer._initialize_and_run_controller",
    "ray._private.state.available_resources_per_node",
    "ray.train.v2._internal.constants.ENV_VARS_TO_PROPAGATE",
)


def preemption_notice() -> Any:
    """What Ray has told this worker of a node that will be taken away (`ray.train.PreemptionInfo`), or None. The public function of
    that name waits for every worker at each call."""
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().preemption_context.preemption_info


@contextmanager
def address_told() -> Iterator[None]:
    """Within this context the actors of Ray Train know which cluster they are of. Its PlacementGroupCleaner looks for any on its machine:
    with two it ends with a traceback, and of another one it learns that its run is gone, whose workers it then takes away."""
    import ray
    from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE

    before = os.environ.get(ADDRESS)
    ENV_VARS_TO_PROPAGATE.add(ADDRESS)
    os.environ[ADDRESS] = ray.get_runtime_context().gcs_address
    try:
        yield
    finally:
        os.environ.pop(ADDRESS)
        os.environ.update({} if before is None else {ADDRESS: before})


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
