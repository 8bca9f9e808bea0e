"""PyTorch's operations as the dispatcher names them, by their effect on spikes; one that is not listed may multiply."""

from __future__ import annotations

from typing import Any

from ..inference.written import names

# Operations that move values keep spikes spikes; so do those that select among them.
MOVES = names(
    """view _unsafe_view _reshape_alias reshape t transpose permute expand expand_as squeeze unsqueeze select slice
    narrow index index_select gather take clone detach alias contiguous _to_copy to unfold unbind split
    split_with_sizes unsafe_split chunk flatten unflatten cat stack constant_pad_nd pad reflection_pad2d
    replication_pad2d repeat repeat_interleave roll flip pixel_shuffle pixel_unshuffle as_strided lift_fresh
    upsample_nearest1d upsample_nearest2d channel_shuffle im2col index_put index_copy scatter select_scatter
    slice_scatter movedim embedding"""
)
CHOOSES = names(
    """masked_fill where max amax min amin maximum minimum max_pool1d max_pool2d max_pool2d_with_indices max_pool3d
    max_pool3d_with_indices adaptive_max_pool2d relu clamp clamp_min clamp_max sort topk cummax bitwise_and
    bitwise_or"""
)
# Those of MOVES that may put a number among spikes.
FILLS = names("constant_pad_nd pad index_put scatter select_scatter slice_scatter")
COMPARES = names("ge gt le lt eq ne logical_and logical_or logical_xor logical_not heaviside isfinite isnan")
ADDITIONS = names("add sub rsub sum cumsum neg abs sign round floor ceil trunc diff argmax argmin count_nonzero")
MEANS = names(
    """mean avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool2d _adaptive_avg_pool2d _adaptive_avg_pool3d
    upsample_bilinear2d upsample_bicubic2d"""
)
# The positions of the two factors among the arguments.
WEIGHTED = {
    **dict.fromkeys(names("mm bmm mv dot vdot matmul linear convolution conv1d conv2d conv3d"), (0, 1)),
    **dict.fromkeys(names("addmm baddbmm addbmm addmv addr"), (1, 2)),
}
BATCH_NORMS = names(
    """native_batch_norm cudnn_batch_norm miopen_batch_norm batch_norm _native_batch_norm_legit
    _native_batch_norm_legit_no_training _batch_norm_no_update"""
)
# Operations that only ask about a tensor, or make one from nothing but a shape.
SHAPES = names(
    """zeros_like ones_like full_like rand_like randn_like new_zeros new_ones new_full is_same_size _local_scalar_dense
    item equal zero fill bernoulli arange size sym_size dim numel _linalg_check_errors _assert_async"""
)
# Memory that has not been written yet: if it is read and no operation wrote it, foreign code did.
UNWRITTEN = names("empty empty_like empty_strided empty_permuted new_empty new_empty_strided")
FREE = MOVES | CHOOSES | COMPARES | ADDITIONS | MEANS | SHAPES | UNWRITTEN
"""Operations that multiply by nothing but constants."""

REASONS = {
    "native_layer_norm": "divides by the standard deviation of its own input",
    "native_group_norm": "divides by the standard deviation of its own input",
    "_softmax": "takes exponentials and divides by their sum",
    "_log_softmax": "takes exponentials and divides by their sum",
}


def operation(func: Any) -> tuple[str, bool]:
    """The name of an operation and whether it writes in place; operations of other libraries keep their prefix.

    A custom operation may also be called "mul" without being a multiplication.
    """
    name = func.overloadpacket.__name__
    if func.namespace != "aten":
        return f"{func.namespace}::{name}", False
    in_place = name.endswith("_") and not name.endswith("__")
    return (name.rstrip("_") if in_place and name != "copy_" else name), in_place
