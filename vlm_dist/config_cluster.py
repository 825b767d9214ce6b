"""The part of the configuration that says how ranks find one another, and how they are placed on a Ray cluster."""

from __future__ import annotations

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from vlm_dist.config_model import Section


class DistributedConfig(Section):
    """How the ranks of a run find one another."""

    join_timeout_s: PositiveFloat = 600
    """Give up when not all ranks have joined in so many seconds; who is missing is told after 10 s."""


class RayConfig(Section):
    """Workers of launch/ray_train.py; one worker is one rank."""

    workers: PositiveInt | None = None
    """Workers; none given: one for every GPU of the cluster, or one where there is no GPU."""
    min_workers: PositiveInt | None = None
    """Go on with fewer workers, down to this number, when nodes are lost, and grow again when they come back."""
    cpus_per_worker: PositiveFloat = 1
    """CPUs that each worker reserves."""
    use_gpu: bool | None = None
    """A GPU for each worker: true waits for nodes that have them; none given: GPUs if the cluster has any by now."""
    wait_s: NonNegativeFloat = 300
    """Wait so long for room in a running cluster."""
    max_failures: NonNegativeInt = 3
    """Restarts after a worker or node was lost; each continues from the newest checkpoint."""
    address: str | None = None
    """A running cluster; none given: RAY_ADDRESS, else one that runs on this machine, else a new one here."""
