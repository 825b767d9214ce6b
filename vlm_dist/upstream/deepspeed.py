"""DeepSpeed: what it does too early or too late, and weights that ZeRO-3 has sharded, outside of its engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SEEN = "0.19.8"
NAMES = (
    "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer._lazy_init_hp_params_optimizer_state",
    "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3",
    "deepspeed.ops",
    "deepspeed.zero.Init",
    "deepspeed.zero.GatheredParameters",
    "deepspeed.zero.register_external_parameter",
    "deepspeed.runtime.zero.partition_parameters.ZeroParamStatus.NOT_AVAILABLE",
    "deepspeed.runtime.zero.parameter_offload.ZeROOrderedDict",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.torch_autocast.TORCH_AUTOCAST_INITIALIZED",
    "deepspeed.runtime.torch_autocast.TORCH_AUTOCAST_DTYPE",
)


def skip_shared_memory_op() -> None:
    """DeepSpeed compiles a shared-memory collective for CPU ranks when it first starts: 20 s and a compiler, for a path that one GPU
    or one process never takes. It asks this table whether it may; the table itself costs a probe of every op."""
    import deepspeed.ops

    if "__compatible_ops__" not in vars(deepspeed.ops):
        setattr(deepspeed.ops, "__compatible_ops__", {})  # noqa: B010


def forget_autocast() -> None:
    """What one engine of a process computes in is a global of DeepSpeed: after one in float16, gradients of the next would be scaled."""
    from deepspeed.runtime import torch_autocast

    torch_autocast.TORCH_AUTOCAST_INITIALIZED, torch_autocast.TORCH_AUTOCAST_DTYPE = False, None


def create_moments(engine: Any) -> None:
    """ZeRO's inner optimizer makes its moments in its first step; a checkpoint is put back before that."""
    import torch

    zero = engine.optimizer
    flats = zero.fp32_partitioned_groups_flat if engine.zero_optimization_stage() == 3 else zero.single_partition_of_fp32_groups
    for flat in flats:
        zero.optimizer.state[flat] = {
            "step": torch.tensor(0.0),
            "exp_avg": torch.zeros_like(flat),
            "exp_avg_sq": torch.zeros_like(flat),
        }
    if engine.zero_optimization_stage() < 3:
        zero._lazy_init_hp_params_optimizer_state()


def is_sharded(parameter: Any) -> bool:
    """Whether this rank holds a share of it, as ZeRO-3 does."""
    return hasattr(parameter, "ds_id")


def shape_of(parameter: Any) -> tuple[int, ...]:
    """The shape of the whole weight."""
    return tuple(parameter.ds_shape if is_sharded(parameter) else parameter.shape)


def sharder(zero: dict[str, Any]) -> Callable[[torch.nn.Parameter], None]:
    """A function that gives each rank its share of a weight and frees the rest; every rank must call it in the same order.

    Args:
        zero: the DeepSpeed JSON that the engine will be started with.
    """
    import torch

    first: list[Any] = []

    def shard(parameter: torch.nn.Parameter) -> None:
        import deepspeed

        if is_sharded(parameter):
            return
        if parameter.device.type == "cpu":  # it may be a view of a file, which would stay in memory for the sake of the share
            parameter.data = parameter.data.clone()
        if first:
            first[0].convert_to_zero_parameters([parameter])
        else:
            skip_shared_memory_op()
            deepspeed.zero.Init(module=torch.nn.ParameterList([parameter]), config_dict_or_path=zero)
            first.append(parameter)

    return shard


def widen(parameter: Any) -> None:
    """The weight becomes float32, sharded or not."""
    parameter.data = parameter.data.float()
    if is_sharded(parameter):
        parameter.ds_tensor.data = parameter.ds_tensor.data.float()


def gathered(parameters: Iterable[Any]) -> AbstractContextManager[Any]:
    """Inside, those of the weights that are sharded are whole. Every rank must come here."""
    wanted = [one for one in parameters if is_sharded(one) and one.ds_status.name == "NOT_AVAILABLE"]
    if not wanted:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(wanted)


@contextmanager
def gathered_when_read(model: torch.nn.Module) -> Iterator[None]:
    """Inside, a sharded weight is also whole where another module than its own reads it (positions of a tower, torch's attention, what
    stands between pictures). An engine has that on in its own forward pass, round which `generate` goes. Every rank must run the same."""
    from deepspeed.runtime.zero.parameter_offload import ZeROOrderedDict

    held = [module._parameters for module in model.modules() if isinstance(module._parameters, ZeROOrderedDict)]
    for parameters in held:
        parameters._in_forward = True
    try:
        yield
    finally:
        for parameters in held:
            parameters._in_forward = False


@contextmanager
def gathered_in_use(model: torch.nn.Module) -> Iterator[None]:
    """Inside, a sharded model computes before an engine has it: each module's weights are whole while it runs, those of its children, which
    it may read without calling them, and those of other modules that it reads (`reads_weights`). Every rank must run the same."""
    if not any(is_sharded(parameter) for parameter in model.parameters()):
        yield
        return
    opened: list[AbstractContextManager[Any]] = []
    largest = [end for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None]  # called for sure

    def before(module: Any, _: Any) -> None:
        leaves = [one for one in module.children() if one not in largest and not any(True for _ in one.children())]
        own = (parameter for one in (module, *leaves) for parameter in one.parameters(recurse=False))
        opened.append(gathered([*own, *getattr(module, "reads_weights", list)()]))
        opened[-1].__enter__()

    def after(module: Any, _: Any, result: Any) -> None:
        opened.pop().__exit__(None, None, None)

    hooks = [hook for module in model.modules() for hook in (
        module.register_forward_pre_hook(before), module.register_forward_hook(after, always_call=True)
    )]  # fmt: skip
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def scale_by_ourselves(engine: Any) -> None:
    """With torch_autocast in float16 DeepSpeed puts torch's GradScaler beside every optimizer: it clips gradients before they are unscaled
    at stages 1 to 3 (0.19), is in no checkpoint of ours, and each stage asks it at another moment."""
    engine.torch_autocast_z0_gradscaler = None
    if engine.zero_optimization_stage():
        engine.optimizer.torch_autocast_gradscaler = None


def tell_scale(engine: Any, scale: float) -> None:
    """What ZeRO multiplies a loss by, and divides the gradients by before it clips them and updates. At stage 0 the caller does both."""
    if engine.zero_optimization_stage():
        engine.optimizer.loss_scaler.cur_scale = scale
