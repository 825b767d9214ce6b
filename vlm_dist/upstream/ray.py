"""Ray: what a worker of Ray Train is told without asking all the others, what each node has left, and which group sizes are allowed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SEEN = "2.60.0"
ADDRESS = "RAY_ADDRESS"
NAMES = (
    "ray.train.v2._internal.execution.context.get_train_context",
    "ray.train.v2._internal.execution.scaling_policy.elastic.ElasticScalingPolicy._count_possible_workers",
    "ray.train.v2.api.data_parallel_trainer.DataParallelTrainer._initialize_and_run_controller",
    "ray._private.state.available_resources_per_node",
    "ray.train.v2._internal.constants.ENV_VARS_TO_PROPAGATE",
    "ray._private.runtime_env.packaging._get_excludes",
    "ray._private.runtime_env.packaging._get_ignore_file",
    "ray._private.ray_constants.get_runtime_env_default_excludes",
    "ray._private.ray_constants.RAY_RUNTIME_ENV_IGNORE_GITIGNORE",
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


def left_out(path: Path, excludes: Sequence[str]) -> str:
    """Why a file below this folder, by a relative path, is not in the copy that `ray job submit --working-dir .` sends: the pattern or the
    ignore file; empty: it is."""
    from ray._private.ray_constants import RAY_RUNTIME_ENV_IGNORE_GITIGNORE, get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import _get_excludes, _get_ignore_file

    here = Path.cwd()
    inside = Path(os.path.relpath(path))
    ways = [here / parent for parent in reversed(inside.parents)] + [here / inside]
    rules = [(pattern, _get_excludes(here, [pattern])) for pattern in (*get_runtime_env_default_excludes(), *excludes)]
    files = [".rayignore"] if os.environ.get(RAY_RUNTIME_ENV_IGNORE_GITIGNORE) == "1" else [".gitignore", ".rayignore"]
    for way in ways:
        rules += [(os.path.relpath(way / name), rule) for name in files if way.is_dir() and (rule := _get_ignore_file(way, name))]
        if found := next((name for name, matches in rules if matches(way)), ""):
            return f"left out by {found}"
    return ""


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
