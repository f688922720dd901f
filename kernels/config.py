"""Launch parameters of the Triton kernels: pure functions of shape, dtype and architecture.

Kernels are not autotuned at run time: the first call would stall for seconds, and the result would
depend on it. `fewstep.kernels.compile` shows what each choice costs in registers.
"""

from __future__ import annotations

from typing import Any

# The values of `precision` in the ops, in order.
from fewstep.reference.sinkhorn import PRECISIONS as PRECISIONS

# Streaming multiprocessors (compute units) that a grid should fill.
_PROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304}
ARCHITECTURES = tuple(_PROCESSORS)
# Up to this many coordinates, the least depth of a dot here, distances are sums of squared
# differences, which lose nothing to cancellation.
_DIFFERENCES = 16
# Up to this many coordinates the rows of a tile stay in place while columns go past them.
_WHOLE = 64
# Columns per tile. More of them spill: in the dot, whose operands tf32x3 splits in two; in
# float64; and beside the accumulators of a product. Fewer columns than lanes keep their loads free
# of shared memory.
_COLUMNS_DOT, _COLUMNS, _COLUMNS_SMALL = 32, 16, 8
# Coordinates from which costs are quicker to read twice than to compute twice, without and with
# tensor cores: on an H100 8 bytes at 3 TB/s against 4 D operations at 50 TFLOP/s, 12 D at 400.
_KEPT_FROM, _KEPT_FROM_DOT = 24, 80
# Iterations that pay for writing costs.
_KEPT_STEPS = 4


def _options(num_warps: int, num_stages: int = 2) -> dict[str, Any]:
    """Options of every launch. Triton 3.10 no longer fuses multiply-adds unless asked to."""
    return {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}


def uses_dot(dim: int, dtype: str, precision: str = "tf32x3") -> bool:
    """Whether distances are dots on tensor cores rather than sums of squared differences."""
    return dtype == "float32" and dim > _DIFFERENCES and precision != "float32"


def _input_precision(arch: str, precision: str) -> str:
    if arch.startswith("gfx"):
        return "ieee"
    return "tf32" if precision == "tf32" else "tf32x3"


def keeps_costs(
    clouds: int,
    n: int,
    m: int,
    dim: int,
    steps: int,
    dtype: str,
    memory_limit: int,
    precision: str = "tf32x3",
) -> bool:
    """Whether alternating iterations read costs from memory instead of computing them twice.

    >>> keeps_costs(1, 4096, 4096, 512, 100, "float32", memory_limit=2**27)
    True
    >>> keeps_costs(1, 4096, 4096, 3, 100, "float32", memory_limit=2**27)
    False
    """
    least = _KEPT_FROM_DOT if uses_dot(dim, dtype, precision) else _KEPT_FROM
    size = 4 if dtype == "float32" else 8
    return dim >= least and steps >= _KEPT_STEPS and clouds * n * m * size <= memory_limit


def sinkhorn_update(
    batch: int, rows: int, dim: int, dtype: str, arch: str, precision: str = "tf32x3"
) -> dict[str, Any]:
    """Launch parameters of the two potential updates.

    Distances are dots on tensor cores for float32 with `dim > 16`. Blocks of rows are large where
    the grid then still fills the machine and at most a fifth of the rows is padding; a small block
    has a quarter of the rows. Without a dot a thread owns one row.

    Args:
        batch (int): problems.
        rows (int): points per problem whose potential is updated.
        dim (int): coordinates of a point.
        dtype (str): "float32" or "float64".
        arch (str): "sm_80", "sm_90", "sm_100" or "gfx942"; any other is taken for "sm_80".
        precision (str): one of `PRECISIONS`: of dots, and whether there are any.

    Returns:
        dict: the kernel's constants (upper case) and the compiler's options (lower case).

    Raises:
        ValueError: a dtype without kernels.

    >>> sinkhorn_update(1, 4096, 3, "float32", "sm_80")["BLOCK_M"]
    32
    >>> sinkhorn_update(64, 4096, 3, "float32", "sm_80")["BLOCK_M"]
    128
    """
    if dtype not in ("float32", "float64"):
        raise ValueError(f"sinkhorn: dtype must be 'float32' or 'float64', got {dtype!r}")
    dot = uses_dot(dim, dtype, precision)
    large, small = (64, 16) if dot else (128, 32)
    whole = dot and dim <= _WHOLE
    columns = _COLUMNS_DOT if dot else _COLUMNS if dtype == "float32" else _COLUMNS_SMALL
    fills = batch * -(-rows // large) >= _PROCESSORS.get(arch, _PROCESSORS["sm_80"])
    block = large if fills and -rows % large <= rows // 4 else small
    launch: dict[str, Any] = {
        "DOT": dot,
        # AMD's matrix cores take float32 as it is.
        "PRECISION": _input_precision(arch, precision),
        "BLOCK_M": block,
        "BLOCK_N": columns,
        "WHOLE": whole,
        "BLOCK_D": (32 if dim <= 32 else 64) if whole else 16,
    }
    launch |= _options(4 if dot else block // 32)
    streams = dot and not whole and block == small and arch not in ARCHITECTURES[1:]
    if launch["PRECISION"] == "tf32" or streams or (not dot and not arch.startswith("gfx")):
        # Left to itself, ptxas spills a few bytes here for a block more per processor.
        launch["maxnreg"] = 255
    return launch


def sinkhorn_symmetric(launch: dict[str, Any], arch: str) -> dict[str, Any]:
    """Launch parameters of simultaneous updates, from those of `sinkhorn_update` and the cost.

    >>> launch = sinkhorn_update(64, 4096, 64, "float32", "sm_100") | {"EUCLIDEAN": True}
    >>> sinkhorn_symmetric(launch, "sm_100")["maxnreg"]
    168
    """
    heavy = launch["PRECISION"] == "tf32x3" and launch["EUCLIDEAN"]
    if arch not in ARCHITECTURES[1:] and heavy and launch["WHOLE"]:
        return launch | {"maxnreg": 255}  # as in `sinkhorn_update`
    if arch == "sm_100" and heavy and launch["DOT"] and launch["BLOCK_M"] == 64:
        # The most for three blocks per processor; Triton 3.6's ptxas chooses fewer, and spills.
        return launch | {"maxnreg": 168}
    return launch


def sinkhorn_apply(
    batch: int,
    rows: int,
    dim: int,
    width: int,
    dtype: str,
    arch: str,
    precision: str = "tf32x3",
    *,
    gradient: bool = False,
    near_only: bool = False,
    diagonal: bool = False,
) -> dict[str, Any]:
    """Launch parameters of the product of the plan with `width` columns.

    Products are dots on tensor cores where distances are, and for transport of more than 16
    columns in float32; `near_only` never is. See `sinkhorn_update` for the rest.

    >>> sinkhorn_apply(8, 512, 64, 10, "float32", "sm_90")["DOT_V"]
    True
    """
    launch = sinkhorn_update(batch, rows, dim, dtype, arch, precision)
    wide = width > 16 and dtype == "float32" and not gradient and precision != "float32"
    del launch["WHOLE"]
    launch["BLOCK_D"] = 16
    launch["DOT_V"] = (launch["DOT"] or wide) and not near_only
    launch["NEAR_ONLY"] = near_only
    if launch["DOT"]:
        # 64 columns spill with a diagonal to leave out, and on sm_80.
        narrow = near_only or diagonal or width <= 32 or arch not in ARCHITECTURES[1:]
        launch["BLOCK_K"] = 32 if narrow else 64
    elif launch["DOT_V"]:
        launch["BLOCK_K"] = 32
    else:
        launch |= {"BLOCK_K": 4 if width <= 4 else 16, "BLOCK_N": _COLUMNS_SMALL}
    return launch


def sinkhorn_hessian(batch: int, rows: int, arch: str) -> dict[str, Any]:
    """Launch parameters of products with second derivatives, in float64: a thread owns a row.

    >>> sinkhorn_hessian(64, 4096, "sm_90")["BLOCK_K"]
    16
    """
    launch = sinkhorn_update(batch, rows, 1, "float64", arch)
    unknown = ("DOT", "PRECISION", "WHOLE", "BLOCK_D")
    return {k: v for k, v in launch.items() if k not in unknown} | {"BLOCK_K": 16}


def sinkhorn_kept(dtype: str, arch: str) -> dict[str, Any]:
    """Launch parameters of the updates from kept costs.

    A thread owns some columns of a tile, so that sums over its rows cross no threads; those over
    columns do once, at the end.

    >>> sinkhorn_kept("float32", "sm_90")["BLOCK_N"]
    256
    """
    columns = 256 if dtype == "float32" else 128
    launch = {"BLOCK_M": 16, "BLOCK_N": columns} | _options(4, num_stages=3)
    return launch if arch.startswith("gfx") else launch | {"maxnreg": 255}


def sinkhorn_kept_merge() -> dict[str, Any]:
    """Launch parameters of their merge: a thread owns a column, BLOCK_N rows at a time.

    >>> sinkhorn_kept_merge()["BLOCK"]
    128
    """
    return {"BLOCK": 128, "BLOCK_N": 16} | _options(4, num_stages=3)


def sinkhorn_merge() -> dict[str, Any]:
    """Launch parameters of the merge of column sums: a thread owns a column.

    >>> sinkhorn_merge()["BLOCK"]
    128
    """
    return {"BLOCK": 128} | _options(4)


# Elements of a row that a norm's program holds in registers.
LONGEST_ROW = {"float32": 2048, "float64": 1024}


def heun_combine(dtype: str, arch: str) -> dict[str, Any]:
    """Launch parameters of a step of a sampler, by the dtype of its arithmetic.

    >>> heun_combine("float32", "sm_90")["BLOCK"]
    1024
    """
    return {"BLOCK": 1024 if dtype == "float32" else 512} | _options(4)


def dual_activate(dtype: str, arch: str) -> dict[str, Any]:
    """Launch parameters of the activations: a thread owns some elements with all their tangents.

    >>> dual_activate("float32", "sm_90")["BLOCK"]
    1024
    """
    launch = {"BLOCK": 1024 if dtype == "float32" else 512} | _options(4, num_stages=1)
    # As in `sinkhorn_update`.
    return launch if arch.startswith("gfx") else launch | {"maxnreg": 255}


def dual_norm(n: int, dtype: str, arch: str) -> dict[str, Any]:
    """Launch parameters of the norms: a program owns a row of n, 16 elements a thread at most.

    Raises:
        ValueError: a row longer than `LONGEST_ROW`.

    >>> dual_norm(300, "float32", "sm_90")["BLOCK"]
    512
    """
    if not 1 <= n <= LONGEST_ROW[dtype]:
        raise ValueError(f"dual_norm: rows must have 1 to {LONGEST_ROW[dtype]} elements, got {n}")
    block = 1 << (n - 1).bit_length()
    lanes = 64 if arch.startswith("gfx") else 32
    own = 8 if dtype == "float32" else 4
    warps = min(max(block // (own * lanes), 1), 16)
    launch = {"BLOCK": block} | _options(warps, num_stages=1)
    # As in `sinkhorn_update`; 8 warps are the most.
    return launch if arch.startswith("gfx") else launch | {"maxnreg": 255}


def dual_norm_parts(batch: int) -> int:
    """Parts of a batch that have their own sums of weight gradients: of the batch alone, so that
    the same bits come from every device.

    >>> dual_norm_parts(4096)
    64
    """
    return min(batch, 64)


def dual_attention(width: int, dtype: str, arch: str) -> dict[str, Any]:
    """Launch parameters of attention: blocks of rows (M), of columns (N), of what products sum
    over (D), and of the columns of results (W), of which there are `width`.

    >>> dual_attention(72, "float32", "sm_90")["BLOCK_W"]
    64
    """
    single = dtype == "float32"
    launch = {
        "PRECISION": _input_precision(arch, "tf32x3"),
        "BLOCK_M": 32 if single else 16,
        "BLOCK_N": 16,
        "BLOCK_D": 16,
        "BLOCK_W": min(max(1 << (width - 1).bit_length(), 16), 64 if single else 32),
    }
    return launch | _options(8 if single else 4, num_stages=1)


def probe(dtype: str, arch: str) -> dict[str, Any]:
    """Launch parameters of the probes: a program draws one, 512 coordinates at a time.

    >>> probe("float32", "sm_90")["BLOCK"]
    512
    """
    return {"BLOCK": 512} | _options(4, num_stages=1)
